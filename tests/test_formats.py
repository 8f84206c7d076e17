"""Reading files and Hub data sets: what is accepted, and that every refusal names the place and what to do."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imprint.data import Pool, read_pool
from imprint.data import formats as formats_module
from imprint.data.formats import part_name
from imprint.data.forms import content_id
from imprint.errors import DataError
from imprint.spec import DataSpec
from imprint.types import Example


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def read(path: Path, **options: Any) -> Pool:
    return read_pool(DataSpec(source=str(path), **options))


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def texts(pool: Pool, part: str = "all") -> list[str]:
    return [e.prompt + "→" + e.target for e in pool.parts[part]]


# ---- what is accepted ----


def test_jsonl_with_mark_crlf_and_blank_lines(tmp_path: Path) -> None:
    lines = ['{"text": "Grüße", "id": 7}', "", '{"text": "two", "id": "b"}', '{"text": " ", "id": 9}']
    content = "\r\n".join(lines).encode("utf-8-sig")
    pool = read(write(tmp_path / "mail.jsonl", content))
    assert pool.name == "mail"
    assert pool.parts == {"all": (Example("7", "", "Grüße"), Example("b", "", "two"))}
    assert pool.dropped == {"blank line": 1, "empty text": 1}


def test_csv_with_quoted_line_ends_commas_and_long_fields(tmp_path: Path) -> None:
    long = "word " * 40_000  # more than the csv module's own limit
    content = f'prompt,completion,owner\r\n"Say ""hi"",\nplease","hi, there",7\r\n\r\n,{long},\r\n'
    pool = read(write(tmp_path / "a.csv", content), group="owner")
    assert texts(pool) == ['Say "hi",\nplease→hi, there', f"→{long}"]
    assert [e.group for e in pool.parts["all"]] == ["7", None]
    assert pool.dropped == {"blank line": 1}


def test_parquet_reads_only_what_is_needed(tmp_path: Path) -> None:
    table = pa.table({"target": ["a", "b"], "prompt": ["p", ""], "owner": [1, None], "vector": [[0.5], [1.5]]})
    pq.write_table(table, tmp_path / "t.parquet")
    pool = read(tmp_path / "t.parquet", group="owner")
    assert pool.parts["all"] == (
        Example(content_id("p", "a"), "p", "a", "1"),
        Example(content_id("", "b"), "", "b", None),
    )


def test_txt_is_one_record_a_line(tmp_path: Path) -> None:
    pool = read(write(tmp_path / "t.txt", " one\x0btwo \r\n\r\nthree\u2028four"))
    assert texts(pool) == ["→ one\x0btwo ", "→three\u2028four"]
    assert pool.dropped == {"blank line": 1}


def test_nul_and_very_long_lines_are_text(tmp_path: Path) -> None:
    long = "x" * 3_000_000
    pool = read(jsonl(tmp_path / "a.jsonl", [{"text": "a\0b"}, {"text": long}]))
    assert texts(pool) == ["→a\0b", f"→{long}"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "→T"),
        ({"format": "text"}, "→T"),
        ({"format": "prompt_completion"}, "P→C"),
        ({"format": {"text": "body"}}, "→B"),
        ({"format": {"prompt": "text", "target": "body"}}, "T→B"),
    ],
)
def test_format_names_the_columns(tmp_path: Path, options: dict[str, Any], expected: str) -> None:
    row = {"text": "T", "prompt": "P", "completion": "C", "body": "B"}
    assert texts(read(jsonl(tmp_path / "a.jsonl", [row]), **options)) == [expected]


def test_auto_takes_prompt_and_target(tmp_path: Path) -> None:
    assert texts(read(jsonl(tmp_path / "a.json", [{"prompt": "P", "target": "T"}]))) == ["P→T"]


def test_records_without_id_are_named_by_content_and_repeats_are_kept(tmp_path: Path) -> None:
    pool = read(jsonl(tmp_path / "a.jsonl", [{"text": "same"}, {"text": "same"}]))
    assert [e.id for e in pool.parts["all"]] == [content_id("", "same")] * 2


def test_folder_parts_by_file_name_and_sub_folder(tmp_path: Path) -> None:
    for name, text in {"train_2": "b", "train_1": "a", "dev": "v", "unknown": "u", "test-00000-of-00001": "t"}.items():
        jsonl(tmp_path / f"{name}.jsonl", [{"text": text}])
    write(tmp_path / "train" / "0000.txt", "c\n")
    write(tmp_path / "README.md", "not data")
    write(tmp_path / ".hidden.txt", "not data")
    pool = read(tmp_path)
    assert pool.part_names == ("train", "validation", "test", "unknown")
    assert {part: "".join(e.target for e in pool.parts[part]) for part in pool.part_names} == {
        "train": "cab",
        "validation": "v",
        "test": "t",
        "unknown": "u",
    }


def test_part_names() -> None:
    assert [part_name(name) for name in ("Train1", "val", "test.entries", "trainer", "2020")] == [
        *("train", "validation", "test", "trainer", "2020")
    ]


def test_path_is_read_under_the_given_name(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", [{"text": "a"}])
    pool = read_pool(DataSpec(source={"name": "owner/set", "path": str(tmp_path)}))
    assert (pool.name, *pool.parts) == ("owner/set", "train")


def test_fingerprint_is_the_content_not_the_place(tmp_path: Path) -> None:
    rows = [{"text": "a", "g": 1}, {"text": "b", "g": 2}]
    first = read(jsonl(tmp_path / "a.jsonl", rows))
    assert read(jsonl(tmp_path / "b.jsonl", rows)).fingerprint == first.fingerprint
    changed = [
        read(jsonl(tmp_path / "c.jsonl", rows[::-1])),
        read(jsonl(tmp_path / "d.jsonl", rows), group="g"),
        Pool("a", {"train": first.parts["all"]}),
    ]
    assert len({first.fingerprint, *(pool.fingerprint for pool in changed)}) == 4
    turned = Pool("x", {"b": first.parts["all"], "a": first.parts["all"]})
    assert turned.fingerprint == Pool("x", {"a": first.parts["all"], "b": first.parts["all"]}).fingerprint


# ---- what is refused, and how ----

GOOD = '{"text": "a"}\n'


@pytest.mark.parametrize(
    ("name", "content", "place", "advice"),
    [
        ("a.jsonl", GOOD * 16 + '{"text": "a", "name": "b" "c": 1}\n', "a.jsonl, line 17: not valid JSON", "column 27"),
        ("a.jsonl", GOOD + '["a"]\n', "a.jsonl, line 2: an array", "one JSON object a line"),
        ("a.json", '[\n{"text": "a"}\n]\n', "a.json, line 1: a JSON array", "jq -c"),
        ("a.jsonl", GOOD + "null\n", "a.jsonl, line 2: null", "one JSON object a line"),
        ("a.jsonl", GOOD + "[" * 100_000, "a.jsonl, line 2: JSON nested too deeply", "delete the line"),
        ("a.jsonl", GOOD + "9" * 5000, "a.jsonl, line 2: ", "fix or delete the line"),
        ("a.jsonl", GOOD.encode() + b'{"text": "\xff"}', "a.jsonl, line 2: byte 11 of the line is not UTF-8", "save"),
        ("a.jsonl", GOOD.encode("utf-16"), "a.jsonl, line 1: byte 1", "save the file as UTF-8"),
        ("a.jsonl", b"", "a.jsonl holds no records", "expected at least one"),
        ("a.jsonl", "\n \n", "a.jsonl holds no records", "expected at least one"),
        ("a.jsonl", '{"text": " "}\n', "a: no record left", "empty text: 1"),
        ("a.jsonl", GOOD + '{"text": null}', "a.jsonl, line 2: column 'text' is null", "expected a string"),
        ("a.jsonl", GOOD + '{"text": 3}', "a.jsonl, line 2: column 'text' is a int", "expected a string"),
        ("a.jsonl", GOOD + '{"txt": "a"}', "a.jsonl, line 2: no column 'text': did you mean 'txt'?", "found: txt"),
        ("a.jsonl", '{"text": "\\ud800é"}', "a.jsonl, line 1: character 1", "surrogate"),
        ("a.jsonl", '{"body": "a", "n": 1}', "columns found: body, n", "format: {text: COLUMN}"),
        ("a.jsonl", '{"text": "a", "id": null}', "a.jsonl, line 1: column 'id' is empty", "Give it one"),
        ("a.jsonl", '{"text": "a", "id": 1.5}', "column 'id' is a float", "string or a whole number"),
        ("a.jsonl", '{"text": "a", "id": true}', "column 'id' is a bool", "string or a whole number"),
        ("a.jsonl", '{"text": "a", "id": "a\\u0000"}', "column 'id' holds a NUL", "string or a whole number"),
        ("a.jsonl", '{"text": "a", "id": 1}\n' + GOOD, "a.jsonl, line 2: no column 'id'", "found: text"),
        ("a.csv", 'text\na\n"b\nc\n', "a.csv, line 3: not valid CSV", "close the quote"),
        ("a.csv", "text,n\na\n", "a.csv, line 2: the header has 2 fields and this record 1", "quote fields"),
        ("a.csv", "text,text\na,b\n", "a.csv, line 1: the header names 'text' twice", "a name of its own"),
        ("a.csv", "text\n", "a.csv holds no records", "expected at least one"),
        ("a.csv", b"text\n\xe9\n", "a.csv, line 2: byte 1", "UTF-8"),
        ("a.parquet", b"PAR1 but not really", "a.parquet: not readable as parquet", "write the file again"),
        ("a.parquet", b"", "a.parquet: not readable as parquet", "write the file again"),
        ("a.txt", b"ok\n\xe9", "a.txt, line 2: byte 1", "UTF-8"),
        ("a.tsv", "text\na", "a.tsv: not a kind of file", ".jsonl, .json, .csv, .parquet, .txt"),
    ],
)
def test_broken_file(tmp_path: Path, name: str, content: str | bytes, place: str, advice: str) -> None:
    sentence = refusal(write(tmp_path / name, content))
    assert place in sentence
    assert advice in sentence
    assert len(sentence) < 400


def test_broken_json_names_line_and_column(tmp_path: Path) -> None:
    broken = '{"id": 17, "name": "Customer Seventeen" "x": 1}\n'
    assert refusal(write(tmp_path / "customers.jsonl", GOOD * 16 + broken)) == (
        "customers.jsonl, line 17: not valid JSON (Expecting ',' delimiter at column 41); fix or delete the line."
    )


def test_overlong_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats_module, "MAX_LINE", 2**20)
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "x" * 2**20}])
    assert "a.jsonl, line 2: longer than 1 MiB" in refusal(path)


def test_parquet_null_names_the_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "a.parquet")
    assert "a.parquet, row 2: column 'text' is null" in refusal(tmp_path / "a.parquet")


@pytest.mark.parametrize("option", [{"group": "custommer"}, {"id": "custommer"}, {"format": {"text": "custommer"}}])
def test_missing_named_column_gives_the_nearest(tmp_path: Path, option: dict[str, Any]) -> None:
    sentence = refusal(jsonl(tmp_path / "a.jsonl", [{"text": "a", "customer": "b"}]), **option)
    assert "a.jsonl, line 1: no column 'custommer': did you mean 'customer'?" in sentence
    assert "Columns found: text, customer." in sentence


def test_contradictory_format(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    for form in ({"text": "text", "target": "text"}, {"target": "text"}, {}):
        assert "either `text` alone, or `prompt` and `target`" in refusal(path, format=form)


def test_repeated_id_names_both_places(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", [{"text": "a", "id": 1}, {"text": "b", "id": 2}])
    jsonl(tmp_path / "test.jsonl", [{"text": "c", "id": "1"}])
    sentence = refusal(tmp_path)
    assert "train.jsonl, line 1: id '1' was used before, in test.jsonl, line 1" in sentence


def test_hostile_column_names_are_shortened(tmp_path: Path) -> None:
    row = {"\x1b[2J": "a", "y" * 5000: "b", **{f"c{n}": "x" for n in range(50)}}
    sentence = refusal(jsonl(tmp_path / "a.jsonl", [row]))
    assert "\x1b" not in sentence
    assert len(sentence) < 500


def test_folder_without_data(tmp_path: Path) -> None:
    write(tmp_path / "notes.md", "x")
    sentence = refusal(tmp_path)
    assert str(tmp_path) in sentence
    assert "train.jsonl, validation.jsonl and test.jsonl" in sentence


def test_missing_files(tmp_path: Path) -> None:
    for name in (tmp_path / "gone.jsonl", tmp_path / "gone"):
        assert f"{name}: no such file or folder" in refusal(name)
    for name in ("data/gone.csv", "./gone", "~/gone-imprint", "~no-such-user-imprint/x", "/" + "x" * 5000):
        with pytest.raises(DataError, match="no such file or folder"):
            read_pool(DataSpec(source=name))
    with pytest.raises(DataError, match="no such file or folder"):
        read_pool(DataSpec(source={"name": "a/b", "path": str(tmp_path / "gone")}))


def test_hub_options_are_refused_for_local_files(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match="`split` is for Hub data sets"):
        read_pool(DataSpec(source={"name": str(path), "split": "train"}))


@pytest.mark.parametrize("name", ["csv", "webnlq", "a/b/c", "a\0b", ""])
def test_names_that_are_nothing(name: str) -> None:
    # "csv" would make `datasets` read whatever lies in the working folder
    with pytest.raises(DataError, match=r"a Hub id of the form owner/name"):
        read_pool(DataSpec(source=name))


@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=80) | st.text(alphabet='{}[]":,\\text \n\r"ud80\0', max_size=80).map(str.encode))
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".txt", ".parquet"])
def test_any_bytes_end_as_a_pool_or_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, content: bytes
) -> None:
    path = write(tmp_path_factory.getbasetemp() / f"fuzz{suffix}", content)
    with contextlib.suppress(DataError):
        assert len(read(path)) > 0


# ---- Hub ----


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the Hub: `owner/name` is read from it by `datasets` itself."""
    import datasets

    real = datasets.load_dataset

    def load(path: str, name: str | None = None, *, revision: str | None = None, **options: Any) -> Any:
        assert not options.pop("trust_remote_code", False)
        return real(str(tmp_path / "hub" / path), name, cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    datasets.disable_progress_bars()
    return tmp_path / "hub"


def test_hub_data_set(hub: Path) -> None:
    for split, rows in {"train": ["a", "b"], "validation": ["c"]}.items():
        (hub / "owner/set/data").mkdir(parents=True, exist_ok=True)
        table = pa.table({"text": rows, "id": [f"{split}{n}" for n in range(len(rows))], "blob": [b"x"] * len(rows)})
        pq.write_table(table, hub / f"owner/set/data/{split}-00000-of-00001.parquet")
    pool = read_pool(DataSpec(source="owner/set"))
    assert pool.name == "owner/set"
    assert pool.parts["train"] == (Example("train0", "", "a"), Example("train1", "", "b"))
    assert pool.parts["validation"] == (Example("validation0", "", "c"),)
    assert texts(read_pool(DataSpec(source={"name": "owner/set", "split": "train[:1]"})), "train") == ["→a"]
    assert len(read_pool(DataSpec(source={"name": "owner/set", "split": "train+validation"})).parts["all"]) == 3
    with pytest.raises(DataError, match=r"owner/set \(train\), row 1: no column 'body'"):
        read_pool(DataSpec(source="owner/set", format={"text": "body"}))


def test_hub_configurations_are_named(hub: Path) -> None:
    card = "---\nconfigs:\n- {config_name: en, data_files: en.csv}\n- {config_name: de, data_files: de.csv}\n---\n"
    write(hub / "owner/set/README.md", card)
    write(hub / "owner/set/en.csv", "text\nhello\n")
    write(hub / "owner/set/de.csv", "text\nhallo\n")
    assert texts(read_pool(DataSpec(source={"name": "owner/set", "config": "de"})), "train") == ["→hallo"]
    for config in (None, "fr"):
        with pytest.raises(DataError, match="set `config` to one of: 'en', 'de'"):
            read_pool(DataSpec(source={"name": "owner/set", "config": config}))


def test_parquet_export_is_read_by_configuration_and_split(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    files = ["en/train/0000.parquet", "en/train/0001.parquet", "en/test/0000.parquet", "en/test_scrambled/0000.parquet"]
    for name in files:
        (hub / "owner/set" / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"text": [name]}), hub / "owner/set" / name)
    listed = [*files, "ru/train/0000.parquet", "en/train/index.duckdb"]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *args, **options: listed)
    source = {"name": "owner/set", "revision": "refs/convert/parquet"}
    pool = read_pool(DataSpec(source={**source, "config": "en"}))
    assert texts(pool, "train") == [f"→{name}" for name in files[:2]]
    assert texts(pool, "test") == [f"→{name}" for name in files[2:]]
    with pytest.raises(DataError, match="several configurations; set `config` to one of: en, ru"):
        read_pool(DataSpec(source=source))
    with pytest.raises(DataError, match="no configuration 'fr'; set `config` to one of: en, ru"):
        read_pool(DataSpec(source={**source, "config": "fr"}))


class OfflineModeIsEnabled(ConnectionError):
    pass


@pytest.mark.parametrize(
    ("raised", "sentence"),
    [
        (OfflineModeIsEnabled("no"), "could not be reached"),
        (ConnectionError("Couldn't reach 'owner/set' on the Hub (LocalEntryNotFoundError)"), "{name: owner/set, path:"),
        (RuntimeError("Dataset scripts are no longer supported, but found set.py"), "revision: refs/convert/parquet"),
        (ValueError("the repository needs trust_remote_code=True"), "never run"),
        (FileNotFoundError("Dataset 'owner/set' doesn't exist\non the Hub"), "doesn't exist on the Hub"),
        (KeyError("odd"), "cannot be loaded"),
    ],
)
def test_hub_failures_are_one_sentence(monkeypatch: pytest.MonkeyPatch, raised: Exception, sentence: str) -> None:
    import datasets

    def load(*args: Any, **options: Any) -> Any:
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError) as caught:
        read_pool(DataSpec(source="owner/set"))
    assert sentence in str(caught.value)
    assert "owner/set" in str(caught.value)
    assert "\n" not in str(caught.value)
