"""Records in every form that people fine-tune on: what is read of them, and that every refusal names the place."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imprint.data import Pool, read_pool
from imprint.data.forms import FORMS, content_id
from imprint.errors import DataError
from imprint.spec import DataSpec
from imprint.types import Chat, Example, Tokenized
from tests.conftest import write_jsonl

USER = {"role": "user", "content": "Who sings?"}
ANSWER = {"role": "assistant", "content": "The hen."}
TOOL = {"type": "function", "function": {"name": "sing", "parameters": {"type": "object"}}}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "sing", "arguments": {"n": 1}}}]}


def read(folder: Path, *rows: dict[str, Any], **options: Any) -> tuple[Example, ...]:
    return read_pool(DataSpec(source=str(write_jsonl(folder / "a.jsonl", list(rows))), **options)).parts["all"]


def one(folder: Path, row: dict[str, Any], **options: Any) -> Example:
    [example] = read(folder, row, **options)
    return example


def refusal(folder: Path, row: dict[str, Any], **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(folder, row, **options)
    sentence = str(caught.value)
    assert sentence.isprintable()
    assert len(sentence) < 400
    return sentence


# ---- what is read ----


def test_messages(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, USER, ANSWER, USER, {**ANSWER, "content": "Still the hen."}]
    found = one(tmp_path, {"messages": turns, "id": 7})
    assert (found.id, found.prompt) == ("7", "Be brief.\nWho sings?")
    assert found.target == "The hen.\nWho sings?\nStill the hen."
    assert found.form == Chat(tuple(turns), (2, 4))


def test_messages_with_tools(tmp_path: Path) -> None:
    turns = [USER, CALL, {"role": "tool", "content": "la", "name": None}, ANSWER]
    row = {"messages": turns, "tools": [TOOL]}
    found = one(tmp_path, row)
    assert found.form == Chat((USER, CALL, {"role": "tool", "content": "la"}, ANSWER), (1, 3), (TOOL,))
    assert found.target == '[{"function":{"arguments":{"n":1},"name":"sing"},"type":"function"}]\nla\nThe hen.'
    assert one(tmp_path, {**row, "tools": json.dumps([TOOL])}) == found
    for nothing in (None, "", []):
        assert one(tmp_path, {"messages": turns, "tools": nothing}).form == Chat(found.form.messages, (1, 3))


def test_messages_in_parquet_lose_the_keys_they_never_had(tmp_path: Path) -> None:
    """A table gives every message every key."""
    pq.write_table(pa.table({"messages": [[USER, {**ANSWER, "name": "Ann"}]]}), tmp_path / "a.parquet")
    [found] = read_pool(DataSpec(source=str(tmp_path / "a.parquet"))).parts["all"]
    assert found.form == Chat((USER, {**ANSWER, "name": "Ann"}), (1,))


def test_a_conversational_prompt_and_completion(tmp_path: Path) -> None:
    """TRL's: all of the completion is learned, and no turn of the prompt."""
    row = {"prompt": [USER, ANSWER, USER], "completion": [CALL, {"role": "tool", "content": "la"}, ANSWER]}
    found = one(tmp_path, row)
    assert found.form == Chat((*row["prompt"], *row["completion"]), (3, 4, 5))
    assert found.prompt == "Who sings?\nThe hen.\nWho sings?"
    named = one(tmp_path, {"ask": row["prompt"], "say": row["completion"]}, format={"prompt": "ask", "target": "say"})
    assert named == found
    assert one(tmp_path, {"prompt": "p", "target": "t"}) == Example(content_id("p", "t"), "p", "t")


def test_sharegpt(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Who sings?"}, {"from": "gpt", "value": "The hen.", "weight": None}]
    found = one(tmp_path, {"conversations": turns, "system": "Be brief."})
    system = {"role": "system", "content": "Be brief."}
    assert found.form == Chat((system, USER, ANSWER), (2,))
    own = [{"from": "system", "value": "Sing."}, *turns]
    assert one(tmp_path, {"conversations": own, "system": "Be brief."}).form.messages[0]["content"] == "Sing."
    assert one(tmp_path, {"conversations": turns, "system": None}).form == Chat((USER, ANSWER), (1,))
    assert one(tmp_path, {"conversations": [USER, ANSWER]}).form == Chat((USER, ANSWER), (1,))
    for speaker in ("gpt", "assistant", "model", "chatgpt"):
        again = [turns[0], {"from": speaker, "value": "The hen."}]
        assert one(tmp_path, {"conversations": again}).form == Chat((USER, ANSWER), (1,))


def test_alpaca_is_stanfords_prompt(tmp_path: Path) -> None:
    """https://github.com/tatsu-lab/stanford_alpaca, train.py, written out."""
    row = {"instruction": "Say {it}.", "input": "loud", "output": "IT"}
    found = one(tmp_path, row)
    assert found.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay {it}.\n\n### Input:\nloud\n\n### Response:"
    )
    assert (found.target, found.form) == ("IT", None)
    short = (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nSay {it}.\n\n### Response:"
    )
    for nothing in ({"input": ""}, {"input": None}, {}):
        assert one(tmp_path, {"instruction": "Say {it}.", "output": "IT", **nothing}).prompt == short


def test_alpaca_as_a_chat(tmp_path: Path) -> None:
    row = {"instruction": "Who", "input": "sings?", "output": "The hen.", "system": "Be brief.", "history": []}
    asked = {"role": "user", "content": "Who\nsings?"}
    found = one(tmp_path, row, format="alpaca_chat")
    assert found.form == Chat(({"role": "system", "content": "Be brief."}, asked, ANSWER), (2,))
    bare = {"instruction": "Who sings?", "output": "The hen."}
    assert one(tmp_path, bare, format="alpaca_chat").form == Chat((USER, ANSWER), (1,))


def test_tokens(tmp_path: Path) -> None:
    ids = [5, 6, 7, 8]
    found = one(tmp_path, {"input_ids": ids, "labels": [-100, -100, 7, 8]})
    assert (found.prompt, found.target) == ("5 6", "7 8")
    assert found.form == Tokenized((5, 6, 7, 8), (False, False, True, True))
    assert one(tmp_path, {"input_ids": ids}).form == Tokenized((5, 6, 7, 8), (True,) * 4)
    masked = {"input_ids": ids, "completion_mask": [0, 1, 1, 1], "assistant_masks": [True, True, True, False]}
    assert one(tmp_path, masked).form.learned == (False, True, True, False)
    assert one(tmp_path, {**masked, "labels": [-100, -100, -100, 8]}).form.learned == (False, False, False, True)
    padded = {"input_ids": [0, *ids, 0], "attention_mask": [0, 1, 1, 1, 1, 0], "labels": [-100, -100, 6, 7, 8, -100]}
    assert one(tmp_path, padded).form == Tokenized((5, 6, 7, 8), (False, True, True, True))


def test_auto_takes_the_first_form_that_fits(tmp_path: Path) -> None:
    row = {
        "text": "t",
        "prompt": "p",
        "completion": "c",
        "messages": [USER, ANSWER],
        "conversations": [USER, ANSWER],
        "input_ids": [1, 2],
        "instruction": "i",
        "output": "o",
    }
    given = dict(row)
    for name, columns in (
        ("text", ["text"]),
        ("prompt_completion", ["prompt", "completion"]),
        ("messages", ["messages"]),
        ("sharegpt", ["conversations"]),
        ("tokens", ["input_ids"]),
        ("alpaca", ["instruction", "output"]),
    ):
        assert one(tmp_path, given) == one(tmp_path, row, format=name)
        for column in columns:
            del given[column]
    assert "expected the columns `text` or `prompt` and `completion` or `messages`" in refusal(tmp_path, {"a": 1})


def test_what_is_learned_decides_whether_a_record_is_empty(tmp_path: Path) -> None:
    blank = {"role": "assistant", "content": " \n"}
    rows = [{"messages": [USER, blank, USER, blank]}, {"messages": [USER, ANSWER]}, {"messages": [USER, CALL]}]
    pool = read_pool(DataSpec(source=str(write_jsonl(tmp_path / "b.jsonl", rows))))
    assert len(pool) == 2
    assert pool.dropped == {"empty text": 1}


def test_a_subgroup_is_a_label(tmp_path: Path) -> None:
    rows = [{"text": "a", "lang": "en", "who": 1}, {"text": "b", "lang": None, "who": 1}]
    found = read(tmp_path, *rows, subgroup="lang", group="who")
    assert [(e.subgroup, e.group) for e in found] == [("en", "1"), (None, "1")]
    assert "no column 'land': did you mean 'lang'?" in refusal(tmp_path, rows[0], subgroup="land")
    with pytest.raises(DataError, match="leave out `subgroup`"):
        read_pool(DataSpec(source="world/news", subgroup="lang"))


def test_ids_and_fingerprints_of_plain_records_are_what_they_were() -> None:
    """Pinned: they name cells and records on other people's disks."""
    assert content_id("p", "t") == "8f4ae97b0bfd0990"
    plain = Pool("x", {"all": (Example("1", "p", "t", "g"), Example("2", "", "ü\ud800"))})
    assert plain.fingerprint == "08cecfe7b716749a320204848a1a56a472968898760f8d0eec55c550d7bfc4fd"


def test_ids_and_fingerprints_cover_the_form() -> None:
    chat = Chat((USER, ANSWER), (1,))
    forms = [
        None,
        chat,
        Chat((USER, ANSWER), (0, 1)),
        Chat((USER, ANSWER), (1,), (TOOL,)),
        Tokenized((1, 2), (False, True)),
    ]
    forms += [Tokenized((1, 2), (True, True)), Tokenized((1, 3), (True, True))]
    assert len({content_id("p", "t", form) for form in forms}) == len(forms)
    examples = [Example("1", "p", "t", form=form) for form in forms] + [Example("1", "p", "t", subgroup="en")]
    assert len({Pool("x", {"all": (example,)}).fingerprint for example in examples}) == len(examples)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"messages": json.dumps([USER, ANSWER])}, "column 'messages' is a string; expected a list of messages."),
        ({"messages": []}, "column 'messages' is an empty list; expected a list of messages"),
        ({"messages": None}, "column 'messages' is null; expected a list of messages"),
        ({"messages": ["hi"]}, "column 'messages[0]' is a str; expected a message {role, content}"),
        ({"messages": [USER]}, "column 'messages' has no turn of the assistant; delete the record, or say `loss: all`"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "'messages[1].content' is null; expected a str"),
        ({"messages": [USER, {"role": "assistant"}]}, "'messages[1].content' is null; expected a string"),
        ({"messages": [USER, {**CALL, "content": 3}]}, "'messages[1].content' is a int; expected a string"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "'messages[0].content' is a list of parts;"),
        ({"messages": [{"content": "x"}]}, "'messages[0].role' is null; expected a string"),
        ({"messages": [{"role": " ", "content": "x"}]}, "'messages[0].role' is empty; expected user, assistant"),
        ({"messages": [USER, {**ANSWER, "content": "\ud83d"}]}, "is half a surrogate pair, not Unicode text"),
        ({"messages": [{**USER, "\udc00": 1}]}, "is half a surrogate pair, not Unicode text"),
        ({"messages": [{**USER, "score": float("nan")}]}, "'messages[0]' holds nan; expected what JSON can say"),
        ({"messages": [USER, ANSWER], "tools": "sing"}, "column 'tools' is no valid JSON; expected a list of tools"),
        ({"messages": [USER, ANSWER], "tools": "[" * 99999}, "column 'tools' is no valid JSON"),
        ({"messages": [USER, ANSWER], "tools": [1]}, "column 'tools' holds a list; expected a list of tools, each a"),
        ({"messages": [USER, ANSWER], "tools": '{"a": 1}'}, "column 'tools' holds a dict; expected a list of tools"),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": {"a": 1}}, "'chat_template_kwargs' holds settings"),
        ({"prompt": [USER], "completion": "x"}, "column 'completion' is a string; expected a list of messages"),
        ({"prompt": "x", "completion": [ANSWER]}, "column 'completion' is a list; expected a string"),
        ({"prompt": [], "completion": [ANSWER]}, "column 'prompt' is an empty list; expected a list of"),
        (
            {"conversations": [{"from": "narrator\x1b[2J" + "y" * 999, "value": "x"}]},
            "column 'conversations[0].from' has an unknown role 'narrator\\x1b[2Jyyy",
        ),
        ({"conversations": [{"from": None, "value": "x"}]}, "'conversations[0].from' is null; expected a string"),
        ({"conversations": [{"from": "gpt"}]}, "'conversations[0].value' is null; expected a string"),
        ({"conversations": [{"from": "gpt", "value": ["x"]}]}, "'conversations[0].value' is a list of parts"),
        ({"instruction": "x", "output": None}, "column 'output' is null; expected a string"),
        ({"instruction": "x", "input": 3, "output": "y"}, "column 'input' is a int; expected a string"),
        ({"input_ids": "1 2"}, "column 'input_ids' is a str; expected a list of whole numbers"),
        ({"input_ids": []}, "column 'input_ids' is an empty list; expected a list of whole numbers"),
        ({"input_ids": [1, -3]}, "'input_ids[1]' is -3; expected a whole number from 0 to 2147483647"),
        ({"input_ids": [1, 10**400]}, "'input_ids[1]' is a int; expected a whole number from 0 to 2147483647"),
        ({"input_ids": [1, 2**31]}, "'input_ids[1]' is 2147483648; expected"),
        ({"input_ids": [1.0]}, "'input_ids[0]' is a float; expected a whole number"),
        ({"input_ids": [float("nan")]}, "'input_ids[0]' is nan; expected a whole number"),
        ({"input_ids": [True]}, "'input_ids[0]' is True; expected a whole number"),
        ({"input_ids": [1, 2], "labels": [1]}, "column 'labels' has 1 entries, and `input_ids` 2; expected as many"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, "'labels[0]' is 2, the token there is 1; expected that or -100"),
        ({"input_ids": [1, 2], "labels": [1, -1]}, "'labels[1]' is -1, the token there is 2"),
        ({"input_ids": [1], "completion_mask": [2]}, "'completion_mask[0]' is 2; expected a whole number from 0 to 1"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "'attention_mask' is no single run of ones"),
        ({"input_ids": [1], "attention_mask": [0]}, "'attention_mask' is no single run of ones"),
        ({"input_ids": [1, 2], "seq_lengths": [1, 1]}, "'seq_lengths' says that texts were packed into one record"),
    ],
)
def test_broken_record(tmp_path: Path, row: dict[str, Any], why: str) -> None:
    sentence = refusal(tmp_path, row)
    assert sentence.startswith("a.jsonl, line 1: ")
    assert why in sentence


def test_earlier_turns_beside_alpaca_are_refused(tmp_path: Path) -> None:
    row = {"instruction": "x", "output": "y", "history": [["a", "b"]]}
    assert "column 'history' holds earlier turns" in refusal(tmp_path, row, format="alpaca_chat")


def test_deep_nesting(tmp_path: Path) -> None:
    arguments: Any = "x"
    for _ in range(900):
        arguments = [arguments]
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    assert "is nested more than 32 levels deep" in refusal(tmp_path, {"messages": [USER, call]})
    path = tmp_path / "deep.jsonl"
    path.write_text('{"messages": ' + "[" * 100_000)
    with pytest.raises(DataError, match=r"deep\.jsonl, line 1: JSON nested too deeply"):
        read_pool(DataSpec(source=str(path)))


@pytest.mark.parametrize("name", FORMS)
def test_a_named_form_names_its_columns(tmp_path: Path, name: str) -> None:
    sentence = refusal(tmp_path, {"body": "x"}, format=name)
    assert "a.jsonl, line 1: expected the columns" in sentence
    assert all(f"`{column}`" in sentence for column in FORMS[name].columns[0])


def test_no_turn_of_the_assistant_is_needed_where_all_is_learned(tmp_path: Path) -> None:
    found = one(tmp_path, {"messages": [USER]}, loss="all")
    assert (found.prompt, found.target, found.form) == ("", "Who sings?", Chat((USER,), ()))


def test_any_text_is_a_text(tmp_path: Path) -> None:
    """Control characters, bidirectional marks, markup, zeros, emoji, right-to-left: read to the letter."""
    texts = [
        "\x00\x07\x1b[2J",
        "\u202eabc\u2066\u200f",
        "<script>alert(1)</script>&lt;",
        "👩‍👩‍👧🏽",
        "שלום مرحبا",
        "\u2028\x85\ufeff|",
    ]
    rows = [{"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": t}]} for t in texts]
    assert [e.target for e in read(tmp_path, *rows)] == texts
    assert [e.target for e in read(tmp_path, *({"text": t} for t in texts))] == texts


def test_long_lines_are_read_quickly(tmp_path: Path) -> None:
    long = "word " * 2_000_000
    started = time.perf_counter()
    found = read(tmp_path, {"text": long}, {"text": "x"})
    chats = read(tmp_path, {"messages": [USER, {"role": "assistant", "content": long}]})
    assert (found[0].target, chats[0].target) == (long, long)
    assert time.perf_counter() - started < 2
