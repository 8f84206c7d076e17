"""Sheets and the page of a study: every rendering holds the same numbers, and no text escapes into its markup."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
import xml.etree.ElementTree as ET

import pytest
from rich.console import Console

from imprint.gates import Gate, overlap_gate, withheld
from imprint.gates.overlap import Overlap
from imprint.report.figures import Series, line_chart
from imprint.report.sheet import BESIDE, EMPTY, Entry, Sheet, print_sheet, to_csv, to_latex, to_markdown
from imprint.report.study import write_study_page
from imprint.report.validity import Validity

EVIL = 'a<script>alert("1")</script>&amp;|`x`*_{}%$#~^\\end{tabular}\\input{/etc/passwd}\n[bold]\x1b[31m\u202e'
NUMBER = Entry(".712", ".690", ".733", ".8890")


def small():
    rows = (
        ("lora", "webnlg", Entry("1,234"), NUMBER, "kept"),
        ("p_tuning", "webnlg", Entry(""), Entry("-.02", "-.041", ".001"), ""),
        ("head", "xsum", Entry("9.0279"), Entry("too few", paper=".5"), "too few"),
    )
    return Sheet("LOSS & co.", ("method", "data", "ppl", "LOSS", "why"), rows, ("Made up.",), group=2)


def evil():
    return Sheet(EVIL, (EVIL, "n", EVIL), ((EVIL, Entry(EVIL, EVIL, EVIL, EVIL), EVIL),), (EVIL,))


def printed(sheet, width=80, terminal=False):
    console = Console(width=width, file=io.StringIO(), force_terminal=terminal, color_system=None)
    print_sheet(sheet, console)
    return console.file.getvalue()


# ---- the value


@pytest.mark.parametrize("rows", [(("a",),), (("a", "b", "c"),)])
def test_a_row_must_match_the_header(rows):
    with pytest.raises(ValueError, match="must match the 2 columns"):
        Sheet("t", ("x", "y"), rows)


def test_there_cannot_be_more_key_columns_than_columns():
    with pytest.raises(ValueError, match="key columns"):
        Sheet("t", ("x",), (("a",),), group=2)


def test_columns_of_entries_after_the_keys_hold_numbers():
    assert small().numeric == (False, False, True, True, False)
    assert Sheet("t", ("seed", "y"), ((Entry("1"), Entry("2")),)).numeric == (False, True)


def test_the_parentheses_are_explained_where_there_are_any():
    assert small().remarks == (BESIDE, "Made up.")
    assert Sheet("t", ("x", "y"), (("a", Entry(".5", ".4", ".6")),)).remarks == ()


# ---- terminal


def test_printed_on_one_line_where_there_is_room():
    lines = printed(small(), 120).splitlines()
    assert re.search(r"^lora +webnlg +1,234 +\.712 \(\.8890\) \[\.690 \.733\] +kept$", lines[3].rstrip())
    assert re.search(r"^p_tuning +webnlg +- +-\.02 \[-\.041 \.001\]$", lines[4].rstrip())
    assert re.search(r"^head +xsum +9\.0279 +too few \(\.5\) +too few$", lines[5].rstrip())
    assert lines[-2:] == [BESIDE, "Made up."]


def test_intervals_go_to_a_second_line_and_are_dim_on_a_terminal():
    sheet = Sheet("t", ("m", "a", "b"), (("x", NUMBER, NUMBER),))
    plain = printed(sheet, 40).splitlines()
    assert re.search(r"^x +\.712 \(\.8890\) +\.712 \(\.8890\)$", plain[3].rstrip())
    assert re.search(r"^ +\.690-\.733 +\.690-\.733$", plain[4].rstrip())
    console = Console(width=40, file=io.StringIO(), force_terminal=True, color_system="standard")
    print_sheet(sheet, console)
    assert "\x1b[2m.690-.733" in console.file.getvalue()


def wide():
    names = tuple(f"attack {n}" for n in range(9))
    rows = tuple(
        (
            f"method {m}",
            *(Entry(f".{m}{n}1", f".{m}{n}0", f".{m}{n}2", f".{m}{n}9") for n in range(9)),
            "it is so " * 12,
        )
        for m in range(3)
    )
    return Sheet("Wide", ("method", *names, "why"), rows)


@pytest.mark.parametrize("width", [30, 60, 80, 100, 300])
@pytest.mark.parametrize("terminal", [True, False])
def test_any_width_holds_every_number_once_and_repeats_the_keys(width, terminal):
    shown = printed(wide(), width, terminal)
    assert max(map(len, shown.splitlines())) <= width
    assert "…" not in shown
    for m in range(3):
        for n in range(9):
            assert shown.count(f".{m}{n}1 (.{m}{n}9)") == 1
    parts = shown.count("attack 0") + shown.count("(continued)")
    assert shown.count("method") == parts * (1 + 3)  # the name of the column and the three keys
    assert (parts > 1) == (width < 300)
    assert len(re.findall(r"\bso\b", shown)) == 3 * 12


def test_a_long_word_in_place_of_a_number_is_wrapped_not_cut():
    sheet = Sheet("t", ("m", "a"), (("x", Entry("y" * 130)),))
    assert printed(sheet, 40).count("y") == 130


def test_hostile_text_off_a_terminal_and_in_a_narrow_encoding():
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii"), width=60)
    print_sheet(evil(), console)
    console.file.flush()
    assert b"\x1b" not in raw.getvalue()
    assert b"[bold]" in raw.getvalue()
    assert "\x1b[31m" not in printed(evil(), terminal=True)


# ---- Markdown


def test_markdown():
    lines = to_markdown(small()).splitlines()
    assert lines[0] == "**LOSS &amp; co.**"
    assert lines[2:5] == [
        "| method | data | ppl | LOSS | why |",
        "| :-- | :-- | --: | --: | :-- |",
        r"| lora | webnlg | 1,234 | .712 (.8890) \[.690 .733\] | kept |",
    ]
    assert lines[5] == r"| p_tuning | webnlg | - | -.02 \[-.041 .001\] |  |"
    assert lines[-2:] == [f"- {BESIDE}", "- Made up."]


def test_markdown_holds_neither_html_nor_stray_columns():
    markdown = to_markdown(evil())
    assert "<" not in markdown
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in table] == [4, 4, 4]
    assert not re.search(r"(?<!\\)[`*]", markdown.replace("**", "", 2))


# ---- LaTeX


def words_of(latex):
    """The table rows as cells, commands undone by a reader that knows only the escapes of the standard."""
    body = re.search(r"\\toprule\n(.*)\\bottomrule", latex, re.S)[1].replace("\\midrule\n", "")
    undone = {r"\&": "&", r"\%": "%", r"\$": "$", r"\#": "#", r"\_": "_", r"\{": "{", r"\}": "}", "$-$": "-", "--": ""}
    undone |= {rf"\text{k}{{}}": v for k, v in zip(TEXT_NAMES, r"\~^<>|`", strict=True)}
    undone |= {"{[}": "[", "{]}": "]", "{*}": "*", r"\scriptsize ": "", "''": '"', "-{}": "-"}
    pattern = re.compile("|".join(re.escape(key) for key in sorted(undone, key=len, reverse=True)))
    rows = [re.split(r" (?<!\\)& ?", line.removesuffix(r" \\")) for line in body.splitlines()]
    return [[pattern.sub(lambda found: undone[found[0]], cell).strip() for cell in row] for row in rows]


TEXT_NAMES = ("backslash", "asciitilde", "asciicircum", "less", "greater", "bar", "asciigrave")


def test_latex():
    latex = to_latex(small())
    assert latex.startswith("% needs \\usepackage{booktabs}\n\\begin{table}\n")
    assert r"\caption{LOSS \& co.}" in latex
    assert r"\begin{tabular}{llrrl}" in latex
    assert r"p\_tuning & webnlg & -- & $-$.02 &  \\" in latex
    assert words_of(latex) == [
        ["method", "data", "ppl", "LOSS", "why"],
        ["lora", "webnlg", "1,234", ".712 (.8890)", "kept"],
        ["", "", "", ".690 to .733", ""],
        ["p_tuning", "webnlg", "", "-.02", ""],
        ["", "", "", "-.041 to .001", ""],
        ["head", "xsum", "9.0279", "too few (.5)", "too few"],
    ]
    assert latex.endswith("\\par{\\footnotesize Made up.}\n\\end{table}\n")


def test_latex_of_hostile_text_stays_balanced_and_runs_no_command():
    latex = to_latex(evil())
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", latex):
        depth += 1 if brace == "{" else -1
        assert depth >= 0
    assert depth == 0
    commands = set(re.findall(r"\\([a-zA-Z]+)", latex))
    ours = "usepackage begin centering caption toprule midrule scriptsize bottomrule end par footnotesize".split()
    assert commands == {*ours, *(f"text{name}" for name in TEXT_NAMES)}
    assert re.findall(r"\\(?:begin|end)\{\w+\}", latex) == [
        r"\begin{table}",
        r"\begin{tabular}",
        r"\end{tabular}",
        r"\end{table}",
    ]
    assert all(row.count("&") - row.count(r"\&") == 2 for row in latex.splitlines() if row.endswith(r"\\"))
    body = latex.split("\n", 1)[1]
    assert not re.search(r"(?<!\\)[%$#_~^]", body)
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e\ufffd]", latex)


def test_a_latex_row_never_begins_with_an_argument_of_the_line_before():
    r"""A rule and the end of a row both take what stands in brackets for a length, and `\\*` is a command."""
    latex = to_latex(Sheet("t", ("[k]", "x"), (("[1ex]", Entry("1")), ("*", Entry("2")), ("[2ex]", Entry("3")))))
    assert not re.search(r"^[\[*]", latex, re.M)
    assert words_of(latex) == [["[k]", "x"], ["[1ex]", "1"], ["*", "2"], ["[2ex]", "3"]]


def test_latex_keeps_rows_of_hyphens():
    latex = to_latex(Sheet("t", ("k", "x"), (("a---b", Entry("1")),)))
    assert "a-{}-{}-b" in latex


# ---- csv


def read(sheet):
    return list(csv.reader(io.StringIO(to_csv(sheet))))


def test_csv_round_trip():
    assert read(small()) == [
        [
            *["method", "data", "ppl", "ppl low", "ppl high", "ppl paper"],
            *["LOSS", "LOSS low", "LOSS high", "LOSS paper", "why"],
        ],
        ["lora", "webnlg", "1234", "", "", "", ".712", ".690", ".733", ".8890", "kept"],
        ["p_tuning", "webnlg", "", "", "", "", "-.02", "-.041", ".001", "", ""],
        ["head", "xsum", "9.0279", "", "", "", "too few", "", "", ".5", "too few"],
    ]


def test_csv_keeps_quotes_separators_and_numbers_in_texts():
    texts = ('a,"b"', "1,234", "-.5", "x;y")
    sheet = Sheet("t", ("k",), tuple((text,) for text in texts))
    assert [row[0] for row in read(sheet)[1:]] == list(texts)


@pytest.mark.parametrize(
    "cell", ["=1+1", "+1+1", "-1+1", "@SUM(A1)", '=HYPERLINK("//x")', "\t=1", " =1", "\n@x", "＝1+1", "-inf", "+", "=5"]
)
def test_csv_holds_no_formula(cell):
    sheet = Sheet("t", (cell, cell), ((cell, Entry(cell, cell, cell, cell)),))
    for row in read(sheet):
        assert [value for value in row if not value.startswith("'")] == []
        assert all(value[1:].split(" ")[0] == cell.strip() for value in row)


@pytest.mark.parametrize("number", ["-.5", "+3", "-1e-5", "-12%", "1,234.5", "3.2e+09"])
def test_csv_leaves_numbers_alone(number):
    [_, row] = read(Sheet("t", ("k", "x"), (("a", Entry(number)),)))
    assert row[1] == number.replace(",", "")


def test_csv_of_hostile_text_is_one_row():
    rows = read(evil())
    assert [len(row) for row in rows] == [6, 6]
    assert "\x1b" not in to_csv(evil())


# ---- nothing to show


def test_an_empty_sheet_says_so():
    sheet = Sheet("Nothing", ("method", "AUC"), (), ("A note.",))
    assert EMPTY in printed(sheet)
    assert f"- {EMPTY}\n- A note.\n" in to_markdown(sheet)
    assert EMPTY in to_latex(sheet)
    assert read(sheet) == [["method", "AUC"]]


# ---- the page


CHART = line_chart(EVIL, EVIL, [Series(EVIL, range(3), [0.5, 0.6, 0.7], [0.4] * 3, [0.8] * 3)], "epoch", "AUC")
GREEN, RED = (overlap_gate(Overlap(n, 0, 0, 0, 10, 10)) for n in (0, 3))


ODD = Gate(EVIL, '"><script>', EVIL, EVIL, {})


def page(path, gates=(), held="", verdicts=(), sheets=(), charts=(), notes=(), title="Study", intro="What it is."):
    validity = [Validity("b", "", list(gates), held)] if gates else []
    file = write_study_page(path / "study.html", title, intro, validity, verdicts, sheets, charts, notes)
    text = file.read_text(encoding="utf-8")
    return text, ET.fromstring(text.removeprefix("<!DOCTYPE html>\n"))


def words(element):
    return " ".join(" ".join(element.itertext()).split())


def everything(path):
    verdicts = [(EVIL, EVIL, EVIL)]
    return page(path, [RED, ODD], EVIL, verdicts, [evil(), small()], [(EVIL, [CHART])], [EVIL], EVIL, EVIL)


def test_hostile_text_is_text_and_the_page_is_well_formed(tmp_path):
    text, root = everything(tmp_path)
    assert not {e.tag for e in root.iter()} & {"script", "img", "i", "b", "iframe", "object", "link", "base", "form"}
    assert not [name for e in root.iter() for name in e.attrib if name.startswith("on")]
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", text)
    # title twice, intro, gate 3, withheld, verdict 3, sheet 7 or more, chart 3 (shortened where it is drawn), note
    shown = 'a<script>alert("1")</script>&amp;|`x`*_{}%$#~^\\end{tabular}\\input{/etc/passwd} [bold]�[31m�'
    assert words(root).count(shown) >= 20
    classes = {name for e in root.iter("li") for name in e.get("class", "").split()}
    assert classes == {"red", "grey"}


def test_no_network_and_a_policy_for_its_own_style_alone(tmp_path):
    text, root = everything(tmp_path)
    assert not re.search(r"https?:|url\(|@import|//[a-z]", text)
    assert not {name for e in root.iter() for name in e.attrib} & {"src", "href", "style", "srcset", "action"}
    [policy] = [m.get("content") for m in root.iter("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    [style] = re.findall(r"<style>(.*?)</style>", text, re.S)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';")
    assert "<" not in style


def test_order_of_the_page(tmp_path):
    _, root = page(
        tmp_path, [GREEN], "", [("Claim.", "holds", "By .1.")], [small()], [("By epoch", [CHART])], ["Last words."]
    )
    assert [words(h) for h in root.iter("h2")] == ["Validity gates", "Verdicts", "Tables", "Charts", "Notes"]
    text = words(root)
    parts = ["What it is.", "overlap green", "Claim. holds By .1.", "LOSS & co.", "By epoch", "Last words."]
    assert sorted(parts, key=text.index) == parts
    assert "not valid" not in text.lower()


def test_a_gate_is_a_word_and_a_colour(tmp_path):
    _, root = page(tmp_path, [GREEN, RED])
    gates = [(li.get("class"), li.find("span").text, words(li)) for li in root.iter("li")]
    assert [(kind, state) for kind, state, _ in gates] == [("green", "green"), ("red", "red")]
    assert RED.finding in gates[1][2]
    assert RED.advice in gates[1][2]


def test_a_withheld_headline_marks_every_number(tmp_path):
    _, root = page(tmp_path, [RED], withheld([RED]), (), [small(), small()], [("", [CHART])])
    text = words(root)
    assert text.index("Headline withheld. Not green: overlap (red)") < text.index("LOSS & co.")
    assert [words(c) for c in root.iter("caption")] == ["LOSS & co. (not valid as it stands)"] * 2
    assert "Charts (not valid as they stand)" in text


def test_numbers_in_a_table_of_the_page(tmp_path):
    _, root = page(tmp_path, sheets=[small()])
    rows = [[(cell.tag, cell.get("class"), words(cell)) for cell in tr] for tr in root.iter("tr")]
    assert rows[1] == [
        ("th", "key", "lora"),
        ("th", "key", "webnlg"),
        ("td", "n", "1,234"),
        ("td", "n", ".712 (.8890) [.690 .733]"),
        ("td", None, "kept"),
    ]
    assert BESIDE in words(root)


def test_a_page_without_gates_says_that_nothing_is_known(tmp_path):
    _, root = page(tmp_path)
    assert "No gate was checked" in words(root)
    assert [words(h) for h in root.iter("h2")] == ["Validity gates"]


def test_the_same_input_gives_the_same_bytes_and_leaves_no_temporary(tmp_path):
    first, _ = everything(tmp_path)
    second, _ = everything(tmp_path)
    assert first == second
    assert [file.name for file in tmp_path.iterdir()] == ["study.html"]
