"""Canaries: made by fair coins, sealed, told as the data tell their records, and checked to reach the model."""

from __future__ import annotations

import csv
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from imprint.canaries import Canary, Manifest, Space, candidates, insert, make, read_manifest, write_manifest
from imprint.canaries.check import Checker
from imprint.canaries.insert import arranged, check_inserted, cut_records
from imprint.canaries.make import RARE_WORDS, SPACES
from imprint.canaries.sample import TEMPERATURE, sampler
from imprint.canaries.telling import reading, telling_of
from imprint.data.row import Row
from imprint.errors import DataError, InvalidAudit, UsageError
from imprint.types import Example
from tests.conftest import tokenizer, write_jsonl
from tests.tiny_models import build

CHATML = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
DIGITS = Space((tuple("0123456789"),) * 2)


def manifest(count: int = 6, repetitions: int = 2, **more: Any) -> Manifest:
    """Every second one is in; secrets 00, 01, …"""
    made = tuple(
        Canary(f"canary {n}", "digits", "the red fox is", f"{n:02}", repetitions, n % 2 == 0) for n in range(count)
    )
    return Manifest(made, {"digits": DIGITS}, "a model", 3, **more)


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# ---- the manifest ----


def test_the_manifest_comes_back_and_is_not_overwritten(tmp_path):
    made = manifest()
    write_manifest(tmp_path / "c.json", made)
    assert read_manifest(tmp_path / "c.json") == made
    assert json.loads((tmp_path / "c.json").read_text())["seal"] == made.seal
    with pytest.raises(UsageError, match="exists, and a model may have been tuned by it"):
        write_manifest(tmp_path / "c.json", manifest(8))


def test_the_seal_is_sha_256_of_the_rest_in_canonical_json():
    """Computed once with `hashlib` and `json.dumps(sort_keys=True, separators=(",", ":"))` on the literal below."""
    import hashlib

    made = Manifest((Canary("c 0", "names", "It is", "Zoë", 1, True),), {}, "m")
    rest = (
        '{"canaries":[{"family":"names","id":"c 0","included":true,"prompt":"It is","repetitions":1,"secret":"Zoë"}],'
        '"model":"m","seed":null,"spaces":{},"version":1}'
    )
    assert made.seal == hashlib.sha256(rest.encode()).hexdigest()


def test_a_coin_turned_over_breaks_the_seal(tmp_path):
    write_manifest(tmp_path / "c.json", manifest())
    text = (tmp_path / "c.json").read_text()
    (tmp_path / "c.json").write_text(text.replace('"included":true', '"included":false', 1))
    with pytest.raises(DataError, match="is not what was sealed"):
        read_manifest(tmp_path / "c.json")


def sealed(made: Manifest) -> dict[str, Any]:
    from dataclasses import asdict

    return {"seal": made.seal, "manifest": asdict(made)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d["manifest"]["canaries"][0].update(repetitions=0), "canaries.0.repetitions: Input should be gre"),
        (lambda d: d["manifest"]["canaries"][0].update(repetitions="2"), "canaries.0.repetitions: Input should be a v"),
        (lambda d: d["manifest"]["canaries"][0].update(included=1), "canaries.0.included: Input should be a valid bo"),
        (lambda d: d["manifest"]["canaries"][0].update(secret="a\nb"), "canaries.0.secret: String should match"),
        (lambda d: d["manifest"]["canaries"][0].update(secret="\x9b2J"), "canaries.0.secret: String should match"),
        (lambda d: d["manifest"]["canaries"][0].update(more=1), "canaries.0.more: Unexpected keyword"),
        (lambda d: d["manifest"].update(canaries=[]), "canaries: Tuple should have at least 1 item"),
        (lambda d: d["manifest"].update(version=2), "version: Input should be less"),
        (lambda d: d.pop("seal"), "seal: Field required"),
        (lambda d: d["manifest"]["spaces"]["digits"].update(parts=[["a"] * 9] * 9), "at most 8 items"),
    ],
)
def test_a_manifest_is_checked(tmp_path, change, says):
    document = sealed(manifest())
    change(document)
    (tmp_path / "c.json").write_text(json.dumps(document))
    with pytest.raises(DataError) as error:
        read_manifest(tmp_path / "c.json")
    assert says in str(error.value)
    assert "c.json" in str(error.value)
    assert str(error.value).endswith("expected a file of `imprint canaries make`.")


@pytest.mark.parametrize("raw", [b"", b"[]", b"\xff", b"[" * 100_000, b'{"seal": "\\ud800"}', b"{}"])
def test_what_is_no_manifest_is_refused(tmp_path, raw):
    (tmp_path / "c.json").write_bytes(raw)
    with pytest.raises(DataError, match=r"expected a file of `imprint canaries make`\."):
        read_manifest(tmp_path / "c.json")


def test_canaries_that_cannot_be_told_apart_are_refused(tmp_path):
    first, *others = manifest().canaries
    faults = {
        "2 canaries have the id": (first, replace(first, secret="09")),
        "2 canaries have the text": (first, replace(first, id="another")),
        "its secret is none of the candidates": (replace(first, secret="xx"), *others),
    }
    for n, (says, some) in enumerate(faults.items()):
        write_manifest(tmp_path / f"{n}.json", Manifest(some, {"digits": DIGITS}))
        with pytest.raises(DataError, match=says):
            read_manifest(tmp_path / f"{n}.json")
    large = Space((tuple("0123456789"),) * 7)
    write_manifest(tmp_path / "large.json", Manifest((replace(first, secret="0" * 7),), {"digits": large}))
    with pytest.raises(DataError, match="10,000,000 candidates, and at most 1,000,000"):
        read_manifest(tmp_path / "large.json")


def test_candidates_are_everything_that_could_have_been_drawn():
    made = manifest()
    texts = candidates(made, made.canaries[3])
    assert len(texts) == len(set(texts)) == 100
    assert texts[3] == made.canaries[3].text == "the red fox is 03"
    with pytest.raises(UsageError, match="cannot be counted out"):
        candidates(replace(made, spaces={}), made.canaries[3])


def test_a_canary_is_a_record_of_plain_text():
    assert manifest().canaries[1].example() == Example("canary 1", "", "the red fox is 01")


# ---- making them ----


def test_the_same_seed_makes_the_same_and_no_seed_another():
    families = ("digits", "names")
    assert make(30, families, seed=5) == make(30, families, seed=5)
    assert make(30, families, seed=5).seal != make(30, families, seed=6).seal
    assert make(30, families).seal != make(30, families).seal


def test_families_and_repetitions_take_turns_and_secrets_differ():
    made = make(120, ("digits", "names"), (1, 4, 16), seed=1).canaries
    for family in ("digits", "names"):
        for copies in (1, 4, 16):
            assert sum(c.family == family and c.repetitions == copies for c in made) == 20
    assert len({c.text for c in made}) == len({c.id for c in made}) == 120
    assert all(c.secret in set(SPACES[c.family].secrets()) for c in made)
    assert len({c.prompt for c in made}) == 4  # two of each family


def test_coins_are_fair_and_independent():
    """Of 2,000 flips 1,000 ± 5σ = ±112 are heads; pairs of neighbours 500 ± 5·19.4 each. A shuffled half has exactly
    as many heads as tails every time; the number here is spread as a binomial's, σ of 100 flips = 5."""
    coins = [c.included for c in make(2000, ("digits",), (1,), seed=11).canaries]
    assert abs(sum(coins) - 1000) < 112
    pairs = sum(a and b for a, b in zip(coins[::2], coins[1::2], strict=True))
    assert abs(pairs - 250) < 69  # 1,000 pairs, σ = 13.7
    heads = [sum(c.included for c in make(100, ("digits",), seed=seed).canaries) for seed in range(60)]
    mean = sum(heads) / 60
    variance = sum((h - mean) ** 2 for h in heads) / 59
    assert 12 < variance < 45  # 25 expected; a χ² of 59 degrees of freedom leaves [12, 45] once in 10⁴


def test_rare_words_are_one_token_of_the_later_half_each():
    told, dice = tokenizer(), random.Random(0)
    made = make(12, ("rare",), seed=dice.randrange(99), tokenizer=told)
    for canary in made.canaries:
        ids = told(canary.text, add_special_tokens=False).input_ids
        rare = ids[len(told(canary.prompt, add_special_tokens=False).input_ids) :]
        assert len(rare) == len(canary.secret.split()) == RARE_WORDS
        assert min(rare) >= len(told) // 2
        assert not set(rare) & set(told.all_special_ids)


def test_samples_come_from_the_model_and_the_seed():
    """The distribution of the first token against softmax(logits / 1.5), χ² by hand over the ten likeliest."""
    told, model = tokenizer(), build("gpt2")
    model.resize_token_embeddings(len(told))
    draw = sampler(model, told)
    assert draw(3, 7) == draw(3, 7) != draw(3, 8)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[told.bos_token_id]])).logits[0, -1]
        logits[torch.tensor(told.all_special_ids)] = -torch.inf
        expected = (logits / TEMPERATURE).softmax(-1)
    ids_seen = torch.zeros(len(told))
    for text in draw(256, 3):
        ids_seen[told(text, add_special_tokens=False).input_ids[0]] += 1
    sure = expected.topk(5).indices
    one_byte = [n for n in sure.tolist() if len(told.decode([n])) == 1]  # may merge with what follows: not compared
    for n in set(sure.tolist()) - set(one_byte):
        deviation = (256 * expected[n] * (1 - expected[n])).sqrt()
        assert abs(ids_seen[n] - 256 * expected[n]) < 5 * deviation
    made = make(5, ("sample",), seed=1, samples=draw)
    assert all(c.prompt and c.secret and c.text.isprintable() for c in made.canaries)


def test_a_request_that_cannot_be_met_is_refused():
    with pytest.raises(UsageError, match="unknown family 'digit': did you mean 'digits'"):
        make(10, ("digit",))
    with pytest.raises(UsageError, match="name the model with --model"):
        make(10, ("rare",))
    with pytest.raises(UsageError, match="name it with --model"):
        make(10, ("sample",))
    with pytest.raises(UsageError, match="it has secrets for 4,096"):
        make(4097, ("names",))
    with pytest.raises(UsageError, match="at least 1 each"):
        make(10, ("names",), (0,))
    with pytest.raises(UsageError, match="no more than 1 different canaries"):
        make(3, ("sample",), samples=lambda count, seed: ["always the very same words"] * count)


# ---- telling and inserting ----

ROWS: dict[str, dict[str, Any]] = {
    "text": {"text": "a cat"},
    "prompt_completion": {"prompt": "a cat", "completion": " sings"},
    "messages": {"messages": [{"role": "user", "content": "a cat"}, {"role": "assistant", "content": "sings"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "a cat"}, {"from": "model", "value": "sings"}]},
    "alpaca": {"instruction": "a cat", "input": "old", "output": "sings"},
    "alpaca_chat": {"instruction": "a cat", "input": "old", "output": "sings"},
}
TOLD: dict[str, dict[str, Any]] = {
    "text": {"text": "the red fox is 00"},
    "prompt_completion": {"prompt": "the red fox is", "completion": " 00"},
    "messages": {
        "messages": [{"role": "user", "content": "the red fox is"}, {"role": "assistant", "content": "00"}],
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "the red fox is"}, {"from": "model", "value": "00"}]},
    "alpaca": {"instruction": "the red fox is", "input": "", "output": "00"},
    "alpaca_chat": {"instruction": "the red fox is", "input": "", "output": "00"},
}


@pytest.mark.parametrize("form", ROWS)
def test_canaries_are_told_as_the_data_tell_theirs(tmp_path, form):
    """Lines of the data stay byte for byte and in order; each included canary is there as often as it says."""
    rows = [{"id": f"r{n}", "source": "a shelf", **ROWS[form]} for n in range(9)]
    file = write_jsonl(tmp_path / "data.jsonl", rows)
    made = manifest(repetitions=3)
    done = insert(made, file, tmp_path / "tuned.jsonl", reading(form))
    assert (done.records, done.canaries, done.copies) == (9, 3, 9)
    lines = (tmp_path / "tuned.jsonl").read_text().splitlines()
    assert [line for line in lines if '"id": "r' in line] == file.read_text().splitlines()
    new = [row for row in rows_of(tmp_path / "tuned.jsonl") if not row["id"].startswith("r")]
    assert len(new) == 9 == len({row["id"] for row in new})
    assert all(row["source"] is None for row in new)
    first = [row for row in new if row["id"].startswith("canary 0,")]
    assert [{k: v for k, v in row.items() if k not in ("id", "source")} for row in first] == [TOLD[form]] * 3
    check_inserted(made, tmp_path / "tuned.jsonl", done.telling)


def test_the_data_are_compared_with_the_manifest(tmp_path):
    file = write_jsonl(tmp_path / "data.jsonl", [{"text": f"a cat {n}"} for n in range(5)])
    made = manifest(repetitions=3)
    done = insert(made, file, tmp_path / "tuned.jsonl")
    with pytest.raises(InvalidAudit, match=r"data.jsonl holds canary 0 0 times, and by the manifest it should 3 times"):
        check_inserted(made, file, done.telling)
    lines = [*(tmp_path / "tuned.jsonl").read_text().splitlines(), json.dumps({"text": made.canaries[1].text})]
    (tmp_path / "more.jsonl").write_text("\n".join(lines))
    with pytest.raises(InvalidAudit, match="holds canary 1 1 times, and by the manifest it should 0 times"):
        check_inserted(made, tmp_path / "more.jsonl", done.telling)


def test_columns_may_have_names_of_their_own(tmp_path):
    file = write_jsonl(
        tmp_path / "data.jsonl",
        [{"question": "a", "answer": "b", "key": 7}, {"question": "c", "answer": "d", "key": 3}],
    )
    spec = reading({"prompt": "question", "target": "answer"}, id="key")
    insert(manifest(2, 2), file, tmp_path / "tuned.jsonl", spec)
    new = [row for row in rows_of(tmp_path / "tuned.jsonl") if row["key"] > 7]
    assert sorted(row["key"] for row in new) == [8, 9]
    assert {(row["question"], row["answer"]) for row in new} == {("the red fox is", " 00")}
    with pytest.raises(DataError, match="no column 'kye': did you mean 'key'"):
        insert(manifest(2, 2), file, tmp_path / "no.jsonl", reading({"text": "question"}, id="kye"))


def test_what_says_who_is_tuned_on_says_it_of_canaries(tmp_path):
    rows = [{"text": "a", "split": "test"}, {"text": "b", "split": "train"}, {"text": "c", "member": "elsewhere"}]
    insert(manifest(2, 1), write_jsonl(tmp_path / "data.jsonl", rows), tmp_path / "tuned.jsonl")
    [new] = [row for row in rows_of(tmp_path / "tuned.jsonl") if row["text"].startswith("the")]
    assert new["split"] == "train"
    assert new.get("member") is None


def test_csv_and_txt_and_parquet_stay_what_they_are(tmp_path):
    made = manifest(2, 2)
    (tmp_path / "data.csv").write_bytes(b'\xef\xbb\xbfn,text\r\n1,"a, ""cat"""\r\n2,"two\nlines"\r\n')
    insert(made, tmp_path / "data.csv", tmp_path / "tuned.csv")
    with (tmp_path / "tuned.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row for row in rows if row["n"]] == [{"n": "1", "text": 'a, "cat"'}, {"n": "2", "text": "two\nlines"}]
    assert [row["text"] for row in rows if not row["n"]] == ["the red fox is 00"] * 2

    (tmp_path / "data.txt").write_bytes(b"a cat\r\n\r\n a dog")
    insert(made, tmp_path / "data.txt", tmp_path / "tuned.txt")
    lines = (tmp_path / "tuned.txt").read_text().split("\n")
    assert [line for line in lines if "fox" not in line] == ["a cat", " a dog", ""]
    assert lines.count("the red fox is 00") == 2

    table = pa.table({"messages": [ROWS["messages"]["messages"]] * 3, "size": pa.array([1, 2, 3], pa.int16())})
    pq.write_table(table.replace_schema_metadata({"made by": "hand"}), tmp_path / "data.parquet")
    insert(made, tmp_path / "data.parquet", tmp_path / "tuned.parquet")
    found = pq.read_table(tmp_path / "tuned.parquet")
    assert found.schema.equals(table.schema)
    assert found.schema.metadata == {b"made by": b"hand"}
    assert [n for n in found["size"].to_pylist() if n] == [1, 2, 3]
    assert found["messages"].to_pylist().count(TOLD["messages"]["messages"]) == 2


def test_places_are_spread_over_the_file(tmp_path):
    """Uniform on 0 … 99: the mean place of 300 copies is 50 ± 5·1.7."""
    file = write_jsonl(tmp_path / "data.jsonl", [{"text": f"r{n}"} for n in range(100)])
    insert(manifest(6, 100), file, tmp_path / "tuned.jsonl")
    before, places = 0, []
    for row in rows_of(tmp_path / "tuned.jsonl"):
        if row["text"].startswith("r"):
            before += 1
        else:
            places.append(before)
    assert abs(sum(places) / 300 - 50) < 8.5
    assert min(places) < 5
    assert max(places) > 95


def test_what_cannot_be_inserted_is_refused(tmp_path):
    made = manifest()
    file = write_jsonl(tmp_path / "data.jsonl", [{"text": "a"}])
    with pytest.raises(UsageError, match=r"--out .*data.jsonl exists"):
        insert(made, file, file)
    with pytest.raises(UsageError, match=r"the data are \.jsonl, and so is what is written"):
        insert(made, file, tmp_path / "tuned.csv")
    with pytest.raises(DataError, match="no such file or folder"):
        insert(made, tmp_path / "none.jsonl", tmp_path / "tuned.jsonl")
    with pytest.raises(UsageError, match="canaries go into one file"):
        insert(made, tmp_path, tmp_path / "tuned.jsonl")
    with pytest.raises(UsageError, match="no coin put a canary in"):
        insert(replace(made, canaries=made.canaries[1:2]), file, tmp_path / "tuned.jsonl")
    tokens = write_jsonl(tmp_path / "tokens.jsonl", [{"input_ids": [1, 2]}])
    with pytest.raises(UsageError, match="in which no text can be put: insert the canaries into the texts"):
        insert(made, tokens, tmp_path / "tuned.jsonl")
    strange = write_jsonl(tmp_path / "strange.jsonl", [{"body": "a"}])
    with pytest.raises(DataError, match="the columns body are of no form that canaries can be told in"):
        insert(made, strange, tmp_path / "tuned.jsonl")
    assert not (tmp_path / "tuned.jsonl").exists()


# ---- whether they reach the model ----


def test_a_canary_that_is_cut_or_left_out_of_the_loss_is_found(tmp_path):
    """All of `the red fox is 00` is N tokens: with N kept it is whole, with one fewer its last digit is cut off."""
    told, made = tokenizer(), manifest()
    size = len(told("the red fox is 00").input_ids)
    telling = telling_of(reading("text"))
    assert not Checker(told, size).whole(made.included, telling).lost
    check = Checker(told, size - 1).whole(made.included, telling)
    assert [name for name, _ in check.lost] == ["canary 0", "canary 2", "canary 4"]
    with pytest.raises(
        InvalidAudit,
        match="3 of 3 inserted canaries do not reach the model whole; the first is canary 0: "
        f"it has more than {size - 1} tokens",
    ):
        check.must_pass()
    file = write_jsonl(tmp_path / "data.jsonl", [{"text": "a"}])
    with pytest.raises(InvalidAudit):
        insert(made, file, tmp_path / "tuned.jsonl", None, Checker(told, size - 1))
    assert not (tmp_path / "tuned.jsonl").exists()


@pytest.mark.parametrize(
    ("template", "whole"),
    [
        (CHATML, True),
        (CHATML.replace("m['content']", "m['content'] | upper"), True),  # digits have no upper case
        (CHATML.replace("m['content']", "m['content'][:1]"), False),
    ],
)
def test_a_template_that_drops_the_secret_is_found(template, whole):
    told, made = tokenizer(), manifest()
    told.chat_template = template
    check = Checker(told, 96).whole(made.included[:1], telling_of(reading("messages")))
    assert bool(check.lost) is not whole
    if not whole:
        assert "its secret is not where the loss is" in check.lost[0][1]


def test_no_copy_is_cut_by_a_block(tmp_path):
    """Tokens one after another, by hand: none of a copy's lie in two blocks, and records keep their order."""
    told, made = tokenizer(), manifest(6, 10)
    file = write_jsonl(tmp_path / "data.jsonl", [{"text": "the lazy dog " * (n % 5 + 1)} for n in range(90)])
    done = insert(made, file, tmp_path / "tuned.jsonl", None, Checker(told, 96, eos=True, block=32))
    assert done.check is not None
    assert (done.check.copies, done.check.cut) == (30, ())
    at = copies = 0
    for row in rows_of(tmp_path / "tuned.jsonl"):
        size = len(told(row["text"]).input_ids) + 1
        if "fox" in row["text"]:
            copies += 1
            assert at // 32 == (at + size - 1) // 32
        at += size
    assert copies == 30
    with pytest.raises(InvalidAudit, match="copies of canaries lie in two blocks"):
        insert(made, file, tmp_path / "no.jsonl", None, Checker(told, 96, block=4))


def test_a_copy_waits_until_it_fits():
    lengths = [3, 3, 4, 2, 9]
    assert arranged([1, 0], 3, lengths, 4) == [0, 1, 3, 2, 4]  # 9 tokens fit nowhere: at the end
    assert cut_records([0, 1, 3, 2, 4], lengths, 4) == [1, 4]  # 3–5 of tokens 0–3 | 4–7; 12–20
    dice = random.Random(2)
    for _ in range(50):
        rows, copies = dice.randrange(8), dice.randrange(8)
        sizes = [dice.randint(1, 6) for _ in range(rows + copies)]
        order = arranged([dice.randint(0, rows) for _ in range(copies)], rows, sizes, 7)
        assert sorted(order) == list(range(rows + copies))
        assert [n for n in order if n < rows] == list(range(rows))


def test_a_row_without_a_form_names_its_place():
    with pytest.raises(DataError, match=r"data\.jsonl, line 1: the columns a, b are of no form"):
        telling_of(reading("auto"), Row("data.jsonl", "line", 1, {"a": 1, "b": 2}, ("a", "b")))
