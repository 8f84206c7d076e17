"""The paper's data sets: from the real local files where they lie beside the checkout, and in the Hub's layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imprint.data import BENCHMARKS, Pool, make_split, read_pool
from imprint.errors import DataError
from imprint.spec import DataSpec

SHARED = Path(__file__).parents[1] / ".." / "shared" / "data"
real = pytest.mark.skipif(not SHARED.is_dir(), reason="the real data are not beside this checkout")


def read(name: str, path: Path) -> Pool:
    return read_pool(DataSpec(source={"name": name, "path": str(path)}))


def jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def ids(pool: Pool) -> list[str]:
    return [e.id for part in pool.part_names for e in pool.parts[part]]


# ---- WikiText-2 ----

LINES = [
    "a line of nine words before the first title",
    " = Robert Boulter = \n",
    "",
    " Robert Boulter is an English film , television and theatre actor . \n",
    " = = Career = = \n",
    " Eight words are just enough for a text \n",
    " Seven words are too few for it \n",
    " = National record was set on that day by him \n",
    " = = = E = m c ² = = = \n",
    " = The equation E = m c ² = \n",
    " It relates the energy E = m c ² of a body to its mass . \n",
    " = = \n",
]


def test_wikitext_rule(tmp_path: Path) -> None:
    parquet(tmp_path / "wikitext-2-raw-v1" / "test-00000-of-00001.parquet", [{"text": line} for line in LINES])
    pool = read("wikitext-2", tmp_path)
    assert [(e.id, e.prompt, e.target, e.group) for e in pool.parts["test"]] == [
        ("test/1", "", LINES[0], "(test, before the first title)"),
        ("test/4", "", LINES[3].strip(), "Robert Boulter"),
        ("test/6", "", "Eight words are just enough for a text", "Robert Boulter"),
        ("test/8", "", LINES[7].strip(), "Robert Boulter"),
        ("test/11", "", LINES[10].strip(), "The equation E = m c ²"),
    ]
    assert pool.dropped == {"blank line": 1, "heading": 4, "line under 8 words": 2}


@real
def test_wikitext_files() -> None:
    pool = read("wikitext-2", SHARED / "wikitext2")
    assert {part: len(pool.parts[part]) for part in pool.part_names} == {
        "train": 4478,
        "validation": 1745,
        "test": 1975,
    }
    assert pool.dropped == {"blank line": 4989, "heading": 2950, "line under 8 words": 563}
    assert len({e.group for e in pool.parts["validation"]}) == 60
    first = pool.parts["train"][0]
    assert first.group == "Valkyria Chronicles III"
    assert first.target.startswith("Senjō no Valkyria 3 : Unrecorded")
    # train_part stops inside an article that train_part2 goes on with
    assert {e.group for e in pool.parts["train"] if e.id in ("train/2119", "train/2120")} == {"Species of Allosaurus"}
    assert len(set(ids(pool))) == len(pool)


# ---- WebNLG ----

TRIPLES = ["Aarhus_Airport | city | Aarhus", "Aarhus | leader | Jacob"]
PROMPT = "Aarhus_Airport : city : Aarhus | Aarhus : leader : Jacob\nText:"


def gem(number: int, text: str, triples: list[str]) -> dict[str, Any]:
    name = f"web_nlg_en-train-{number}"
    more = {"gem_parent_id": name, "references": [], "category": "Airport", "webnlg_id": "train/Airport/1/Id1"}
    return {"gem_id": name, "input": triples, "target": text, **more}


def test_webnlg_as_gem_has_it(tmp_path: Path) -> None:
    parquet(tmp_path / "en/train/0000.parquet", [gem(0, "One.", TRIPLES), gem(1, " Two. ", TRIPLES[::-1])])
    parquet(tmp_path / "en/test/0000.parquet", [gem(2, "Three.", TRIPLES[:1])])
    parquet(tmp_path / "en/challenge_train_sample/0000.parquet", [gem(3, "Four.", TRIPLES)])
    pool = read("webnlg", tmp_path)
    first, second = pool.parts["train"]
    assert (first.prompt, first.target, first.id) == (PROMPT, " One.", "web_nlg_en-train-0")
    assert (second.target, second.group) == (" Two.", first.group)
    assert pool.parts["test"][0].group != first.group
    assert pool.part_names == ("train", "test")


@pytest.mark.parametrize("hub_layout", [True, False])
def test_webnlg_entries(tmp_path: Path, hub_layout: bool) -> None:
    lex = {"comment": ["good", "toFix"], "lid": ["Id1", "Id3"], "text": ["One.", "Two."]}
    none: dict[str, list[str]] = {"comment": [], "lid": [], "text": []}
    if hub_layout:
        sets: Any = {"mtriple_set": [TRIPLES]}
        rows = [{"eid": "Id1", "modified_triple_sets": sets, "lex": texts} for texts in (lex, none)]
        parquet(tmp_path / "train-00000-of-00001.parquet", rows)
    else:
        sets = [{"mtriple_set": TRIPLES}]
        listed = [{"lid": lid, "text": text} for lid, text in zip(lex["lid"], lex["text"], strict=True)]
        rows = [{"id": "e1", "modified_triple_sets": sets, "lex": texts} for texts in (listed, [])]
        jsonl(tmp_path / "train.entries.jsonl", rows)
    pool = read("webnlg", tmp_path)
    start = "train/1" if hub_layout else "e1"
    assert ids(pool) == [f"{start}/Id1", f"{start}/Id3"]
    assert [e.prompt + e.target for e in pool.parts["train"]] == [PROMPT + " One.", PROMPT + " Two."]
    assert pool.dropped == {"entry without a text": 1}


def test_webnlg_repeated_ids_are_told_apart(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", [{"id": "a", "triples": TRIPLES, "text": text} for text in "xy"])
    jsonl(tmp_path / "test.jsonl", [{"id": "a", "triples": TRIPLES, "text": text} for text in ("z", " ")])
    pool = read("webnlg", tmp_path)
    assert {part: [e.id for e in pool.parts[part]] for part in pool.parts} == {"test": ["a"], "train": ["a#2", "a#3"]}
    assert pool.dropped == {"empty text": 1}


def test_webnlg_entries_beside_the_flat_file_are_not_read_twice(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", [{"id": "e1/Id1", "triples": TRIPLES, "text": "One."}])
    jsonl(tmp_path / "train.entries.jsonl", [{"id": "e1", "lex": {"text": ["One."]}}])
    assert ids(read("webnlg", tmp_path)) == ["e1/Id1"]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"body": "x"}, "train.jsonl, line 1: expected WebNLG columns"),
        ({"triples": "A | b | C", "text": "x"}, "train.jsonl, line 1: column 'triples' is not as in WebNLG"),
        ({"triples": [1], "text": "x"}, "expected a list of strings"),
        ({"triples": TRIPLES}, "train.jsonl, line 1: no column 'text'"),
        ({"triples": ["A | b | \ud800"], "text": "x"}, "character 9 of column 'triples' is half a surrogate pair"),
        ({"triples": TRIPLES, "text": "x", "id": [1]}, "column 'id' is a list; expected a string or a whole number"),
        ({"lex": {"text": ["x"]}}, "column 'modified_triple_sets' is not as in WebNLG"),
        ({"lex": "x", "modified_triple_sets": [{"mtriple_set": TRIPLES}]}, "column 'lex' is not as in WebNLG"),
    ],
)
def test_webnlg_of_another_layout(tmp_path: Path, row: dict[str, Any], sentence: str) -> None:
    jsonl(tmp_path / "train.jsonl", [row])
    with pytest.raises(DataError) as caught:
        read("webnlg", tmp_path)
    assert sentence in str(caught.value)


@real
def test_webnlg_files(tmp_path: Path) -> None:
    pool = read("webnlg", SHARED / "webnlg")
    assert {part: len(pool.parts[part]) for part in pool.part_names} == {
        "train": 18102,
        "validation": 2268,
        "test": 4928,
    }
    assert pool.dropped == {}
    assert len(set(ids(pool))) == len(pool)
    with (SHARED / "webnlg" / "train.jsonl").open(encoding="utf-8") as lines:
        for e, line in zip(pool.parts["train"], lines, strict=True):
            row = json.loads(line)
            assert (e.id, e.prompt, e.target) == (row["id"], row["source"] + "\nText:", " " + row["text"])
    # the entries alone give the same texts, ids and groups
    (tmp_path / "test.entries.jsonl").symlink_to((SHARED / "webnlg" / "test.entries.jsonl").resolve())
    assert sorted(read("webnlg", tmp_path).parts["test"], key=str) == sorted(pool.parts["test"], key=str)


# ---- XSum ----


def test_xsum(tmp_path: Path) -> None:
    rows = [
        {"document": "Long story.\nMore.\n", "summary": "Story. ", "id": 11},
        {"document": "Long story.\nMore.", "summary": "Another.", "id": 12},
        {"document": "", "summary": "Of nothing.", "id": 13},
    ]
    parquet(tmp_path / "data" / "x.parquet", rows)  # not where a part is looked for
    parquet(tmp_path / "default" / "validation" / "0000.parquet", rows)
    pool = read("xsum", tmp_path)
    first, second = pool.parts["validation"]
    assert (first.id, first.prompt, first.target) == ("11", "Long story.\nMore.\nSummary:", " Story.")
    assert first.group == second.group
    assert pool.dropped == {"empty text": 1}


@real
def test_xsum_files() -> None:
    pool = read("xsum", SHARED / "xsum")
    assert {part: len(pool.parts[part]) for part in pool.part_names} == {"train": 999, "test": 2774, "unknown": 822}
    assert len(set(ids(pool))) == len({e.group for part in pool.parts.values() for e in part}) == 4595
    with pytest.raises(DataError, match="xsum has no validation; parts found: train, test, unknown"):
        make_split(pool, DataSpec(source="xsum", split="official"), 0)


# ---- where they come from ----


def test_papers_numbers() -> None:
    assert {name: benchmark.paper for name, benchmark in BENCHMARKS.items()} == {
        "wikitext-2": {"members": 2000, "nonmembers": 2000, "tune_on": 22335},
        "webnlg": {"members": 1779, "nonmembers": 1779, "tune_on": 35426},
        "xsum": {"members": 1000, "nonmembers": 1000, "tune_on": 5000},
    }


def test_hub_files_are_named_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load(path: str, *, split: None, revision: str, data_files: dict[str, str], **options: Any) -> dict[str, Any]:
        asked.append((path, revision, data_files))
        return {"train": datasets.Dataset.from_list([gem(0, "One.", TRIPLES)])}

    monkeypatch.setattr(datasets, "load_dataset", load)
    pool = read_pool(DataSpec(source="webnlg"))
    assert pool.name == "webnlg"
    assert pool.parts["train"][0].prompt == PROMPT
    files = {part: f"en/{part}/*.parquet" for part in ("train", "validation", "test")}
    assert asked == [("GEM/web_nlg", "refs/convert/parquet", files)]
    read_pool(DataSpec(source={"name": "webnlg", "revision": "abc"}))
    assert asked[1][1] == "abc"


def test_unreachable_hub_says_how_to_read_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(*args: Any, **options: Any) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"'EdinburghNLP/xsum' could not be reached.*\{name: xsum, path: FOLDER\}"):
        read_pool(DataSpec(source="xsum"))


def test_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="leave out `revision`"):
        read_pool(DataSpec(source={"name": "xsum", "path": str(tmp_path), "revision": "main"}))


@pytest.mark.parametrize("option", [{"group": "category"}, {"id": "id"}, {"format": "text"}])
def test_options_that_would_be_ignored_are_refused(option: dict[str, Any]) -> None:
    for name in ("xsum", "world/news"):
        with pytest.raises(DataError, match=f"brings its own texts, ids and groups; leave out `{next(iter(option))}`"):
            read_pool(DataSpec(source=name, **option))


def test_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone: no such file or folder"):
        read("xsum", tmp_path / "gone")
    jsonl(tmp_path / "train.jsonl", [])
    with pytest.raises(DataError, match="a benchmark's `path` is a folder"):
        read("xsum", tmp_path / "train.jsonl")
    with pytest.raises(DataError, match=r"train\.jsonl holds no records"):
        read("xsum", tmp_path)


def test_world_is_read_by_name() -> None:
    pool = read_pool(DataSpec(source="world/news"))
    assert (pool.name, *pool.parts) == ("world/news", "all")
