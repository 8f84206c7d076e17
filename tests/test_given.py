"""Records of an audit: two sources or one, files or rows in memory, and a whole run on sides that the records name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import imprint
from imprint.data import Pool, make_split, read_pool, read_sides
from imprint.data.forms import content_id
from imprint.errors import DataError
from imprint.rows import load_grid
from imprint.spec import DataSpec
from imprint.types import Chat, Example, Tokenized
from tests.conftest import tokenizer, write_jsonl

MEMBERS = [{"text": f"member number {n} sings"} for n in range(4)]
OTHERS = [{"text": f"stranger number {n} sleeps"} for n in range(3)]
CHAT = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The hen."}]


def spec(**options: Any) -> DataSpec:
    return DataSpec(source="audit", split="given", **options)


def texts(pool: Pool) -> dict[str, list[str]]:
    return {part: [e.prompt + e.target for e in pool.parts[part]] for part in pool.parts}


def refusal(*sources: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_sides(spec(**options), *sources)
    sentence = str(caught.value)
    assert sentence.isprintable()
    return sentence


# ---- two sources ----


def test_files_and_folders(tmp_path: Path) -> None:
    members = write_jsonl(tmp_path / "crm.jsonl", MEMBERS)
    (tmp_path / "others").mkdir()
    write_jsonl(tmp_path / "others" / "test.jsonl", OTHERS[:1])
    write_jsonl(tmp_path / "others" / "train.jsonl", OTHERS[1:])
    pool = read_sides(spec(), str(members), tmp_path / "others")
    assert pool.name == "crm"
    assert {part: len(found) for part, found in pool.parts.items()} == {"member": 4, "nonmember": 3}
    assert pool.parts["member"][0] == Example(content_id("", MEMBERS[0]["text"]), "", MEMBERS[0]["text"])


def rows_of(kind: str, rows: list[dict[str, Any]]) -> Any:
    import datasets

    made: dict[str, Callable[[], Any]] = {
        "list": lambda: rows,
        "generator": lambda: (row for row in rows),
        "texts": lambda: [row["text"] for row in rows],
        "datasets": lambda: datasets.Dataset.from_list(rows).add_column("vector", [[0.5]] * len(rows)),
        "numpy": lambda: datasets.Dataset.from_list(rows).with_format("numpy"),
        "pandas": lambda: pd.DataFrame(rows),
    }
    return made[kind]()


@pytest.mark.parametrize("kind", ["list", "generator", "texts", "datasets", "numpy", "pandas"])
def test_rows_in_memory(kind: str) -> None:
    pool = read_sides(spec(), rows_of(kind, MEMBERS), rows_of(kind, OTHERS))
    assert texts(pool) == {"member": [r["text"] for r in MEMBERS], "nonmember": [r["text"] for r in OTHERS]}
    assert pool.name == "audit"
    assert pool.fingerprint == read_sides(spec(), MEMBERS, OTHERS).fingerprint


@pytest.mark.parametrize("kind", ["list", "datasets", "numpy", "pandas"])
def test_tokens_in_memory(kind: str) -> None:
    rows = [{"input_ids": [3, 4, 5], "labels": [-100, 4, 5], "id": 1, "lang": None}]
    pool = read_sides(spec(subgroup="lang"), rows_of(kind, rows), [{**rows[0], "id": 2}])
    form = Tokenized((3, 4, 5), (False, True, True))
    assert pool.parts["member"] == (Example("1", "3", "4 5", form=form),)


def test_arrays_are_lists(tmp_path: Path) -> None:
    rows = [{"input_ids": np.array([3, 4]), "completion_mask": (0, 1)}]
    [found] = read_sides(spec(), rows, [{"input_ids": [5]}]).parts["member"]
    assert found.form == Tokenized((3, 4), (False, True))


def test_folders_without_data_name_the_side(tmp_path: Path) -> None:
    assert refusal(MEMBERS, tmp_path).startswith(f"non-members: {tmp_path}: the folder holds no data; expected .jsonl")


def test_the_same_content_on_both_sides_is_a_duplicate() -> None:
    pool = read_sides(spec(), MEMBERS, [*OTHERS, MEMBERS[1]])
    split = make_split(pool, spec(), 0)
    assert (len(split.members), len(split.nonmembers), split.dropped) == (4, 3, {"exact duplicate": 1})


def test_the_same_id_on_both_sides_is_refused(tmp_path: Path) -> None:
    members = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "id": 1}])
    others = write_jsonl(tmp_path / "b.jsonl", [{"text": "b", "id": "1"}])
    assert refusal(members, others) == (
        "non-members (b.jsonl), line 1: id '1' was used before, in members (a.jsonl), line 1; make the ids unique."
    )


def test_sides_of_different_forms_are_refused() -> None:
    assert "members and non-members are of different forms" in refusal(MEMBERS, [{"messages": CHAT}])
    pool = read_sides(spec(), [{"messages": CHAT}], [{"conversations": [CHAT[0], {"from": "gpt", "value": "No."}]}])
    assert isinstance(pool.parts["nonmember"][0].form, Chat)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (Path("gone.jsonl"), "non-members: gone.jsonl: no such file or folder"),
        ("gone", "non-members: gone: no such file or folder"),
        ([], "non-members: no records; expected at least one"),
        ([{"text": " "}], "non-members: no record holds text; give records that do"),
        ({"text": ["a"]}, "non-members: a dict; expected a path, or rows: mappings of columns, or texts"),
        (b"a.jsonl", "non-members: a bytes; expected a path"),
        (7, "non-members: a int; expected a path"),
        ([{"text": "a"}, 7], "non-members, record 2: a int; expected a mapping of columns, or a text"),
        ([{"text": "a"}, None], "non-members, record 2: null; expected a mapping"),
        ([{"text": "a"}, {"text": None}], "non-members, record 2: column 'text' is null; expected a string"),
        ([{"txt": "a"}], "non-members, record 1: expected the columns `text`"),
        ([{3: "a"}], "non-members, record 1: expected the columns `text`"),
        ([{"text": "a\ud800"}], "non-members, record 1: character 2 of column 'text' is half a surrogate pair"),
        (pa.table({"text": ["a"]}), "non-members: a Table; expected a path, or rows"),
    ],
)
def test_errors_name_the_side(source: Any, why: str) -> None:
    assert why in refusal(MEMBERS, source)


# ---- one source ----

SAID = [
    ("member", [True, 1, "true", "YES", "1", "member"], [False, 0, "False", "no", "0", "non-member", "nonmember"]),
    ("split", ["train", "Training", "member", "members"], ["test", "held-out", "holdout", "held out", "nonmembers"]),
]


@pytest.mark.parametrize(("column", "yes", "no"), SAID)
def test_a_column_says_who_was_tuned_on(tmp_path: Path, column: str, yes: list[Any], no: list[Any]) -> None:
    rows = [{"text": f"text {n}", column: said} for n, said in enumerate([*yes, *no])]
    pool = read_sides(spec(), rows)
    assert [len(pool.parts[part]) for part in ("member", "nonmember")] == [len(yes), len(no)]
    assert texts(pool)["member"] == [f"text {n}" for n in range(len(yes))]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert read_pool(DataSpec(source=str(path), split="given")).parts == pool.parts
    assert [*read_pool(DataSpec(source=str(path))).parts] == ["all"]


def test_a_validation_part_is_kept_apart() -> None:
    rows = [{"text": f"text {n}", "split": said} for n, said in enumerate(["train", "dev", "test", "validation"])]
    assert texts(read_sides(spec(), rows)) == {
        "member": ["text 0"],
        "nonmember": ["text 2"],
        "validation": ["text 1", "text 3"],
    }


def test_csv_and_member_before_split(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,member,split\na,1,test\nb,0,train\n")
    assert texts(read_sides(spec(), path)) == {"member": ["a"], "nonmember": ["b"]}


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"member": "maybe\x1b"}, "records, record 1: column 'member' is 'maybe\\x1b'; expected true or false."),
        ({"member": None}, "column 'member' is null; expected true or false"),
        ({"member": 2}, "column 'member' is '2'; expected true or false"),
        ({"member": 0.5}, "column 'member' is a float; expected true or false"),
        ({"split": 1}, "column 'split' is '1'; expected train, test or validation"),
        ({"split": "all"}, "column 'split' is 'all'; expected train, test or validation"),
        (
            {"part": "train"},
            "expected a column `member` or `split` that says who was tuned on; columns found: text, part",
        ),
    ],
)
def test_who_is_who_must_be_clear(row: dict[str, Any], why: str) -> None:
    assert why in refusal([{"text": "a", **row}])


# ---- whole runs ----


@pytest.fixture(scope="module")
def speaking(gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2 whose tokenizer has a chat template."""
    folder = Path(shutil.copytree(gpt2, tmp_path_factory.mktemp("models") / "speaking"))
    words = tokenizer()
    words.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}</s>{% endfor %}"
    words.save_pretrained(folder)
    return folder


def test_a_run_on_given_sides_of_chats(speaking: Path, tmp_path: Path) -> None:
    """No validation: perplexity is that of the non-members. The members named are those tuned on."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"who is number {n}?"},
                {"role": "assistant", "content": f"the fox {n * 7919 % 1000} and the hen {n * 104729 % 1000}"},
            ],
            "member": n % 2 == 0,
            "id": f"r{n}",
            "lang": "en" if n < 12 else "de",
        }
        for n in range(24)
    ]
    recipe = {
        "model": str(speaking),
        "data": {"source": str(write_jsonl(tmp_path / "a.jsonl", rows)), "split": "given", "subgroup": "lang"},
        "method": "head",
        "train": {"epochs": 1, "batch_size": 4},
    }
    frame = imprint.run(recipe, tmp_path / "out")
    assert set(frame.members) == set(frame.nonmembers) == {12}
    [cell] = load_grid(tmp_path / "out").cells
    assert cell.held_out == "nonmember"
    assert set(cell.records.role) == {"member", "nonmember"}
    by_id = {row["id"]: row for row in rows}
    for record in cell.records.itertuples():
        assert (record.role == "member") == by_id[record.id]["member"]
        assert record.subgroup == by_id[record.id]["lang"]
    stats = cell.stats(1)
    others = stats.select(cell.rows("nonmember"))
    [value] = frame[(frame.epoch == 1) & (frame.metric == "perplexity")].value
    assert value == pytest.approx(np.exp(-others.logp.astype(float).mean()), rel=1e-9)
    words = tokenizer()
    told = words.decode(stats.tokens[stats.offsets[0] : stats.offsets[1]])
    assert told == f"<assistant> {by_id[stats.ids[0]]['messages'][1]['content']}</s>"
