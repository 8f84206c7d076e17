"""Which tokens of a text are trained on and scored, and that batching and padding lose none of them."""

from __future__ import annotations

import random
import time
import zlib
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imprint.data import Pool
from imprint.data.templates import Templates
from imprint.data.tokens import Encoded, Encoder, batches, pad, unusable
from imprint.errors import DataError
from imprint.records import prepare
from imprint.scoring.score import token_stats
from imprint.spec import DataSpec
from imprint.types import Chat, Example, Tokenized
from tests.conftest import WORDS
from tests.conftest import tokenizer as make_tokenizer
from tests.tiny_models import build

LONG = 1000


@cache
def tokenizer(bos=False):
    """Building one takes a tenth of a second."""
    return make_tokenizer(bos)


def encode(prompt, target, max_length=LONG, bos=False, overlong="truncate", **how):
    return Encoder(tokenizer(bos), max_length, overlong, **how)(Example("x", prompt, target))


def ids_of(text, bos=False):
    return tokenizer(bos)(text, add_special_tokens=False).input_ids


def scored_text(record, bos=False):
    return tokenizer(bos).decode(record.ids[record.scored])


# ---- what is scored ----


def test_plain_text_without_bos_starts_with_its_second_token():
    record = encode("", "the quick fox")
    assert record.ids.tolist() == ids_of("the quick fox")
    assert record.scored.tolist() == [False, *[True] * (len(record) - 1)]


def test_plain_text_with_bos_is_scored_whole():
    record = encode("", "the quick fox", bos=True)
    assert record.ids.tolist() == [tokenizer(True).bos_token_id, *ids_of("the quick fox")]
    assert scored_text(record, bos=True) == "the quick fox"


def test_plain_text_ends_without_eos():
    assert tokenizer().eos_token_id not in encode("", "the fox").ids


@pytest.mark.parametrize("bos", [False, True])
def test_a_prompt_is_context_and_its_target_ends_with_eos(bos):
    record = encode("the quick:", " lazy dog", bos=bos)
    assert scored_text(record, bos) == " lazy dog</s>"
    assert not record.scored[0]
    assert (~record.scored).sum() == bos + len(ids_of("the quick:"))


def test_a_token_across_the_boundary_belongs_to_the_target():
    """` fox` is one token, ` fo` another: the prompt's last one does not occur in the whole text."""
    assert ids_of("the fo")[-1] not in ids_of("the fox dog")
    record = encode("the fo", "x dog")
    assert record.ids.tolist() == [*ids_of("the fox dog"), tokenizer().eos_token_id]
    assert scored_text(record) == " fox dog</s>"


def test_a_prompt_that_merges_with_the_target_altogether_leaves_no_context():
    record = encode("th", "e fox")
    assert record.ids.tolist() == [*ids_of("the fox"), tokenizer().eos_token_id]
    assert record.scored.tolist() == [False, *[True] * (len(record) - 1)]


def test_no_token_is_special_inside_a_text():
    """Id 0 fills padding elsewhere, EOS often does: inside a text both are tokens like others."""
    text = "!!! fox </s> dog ! </s>"
    ids = ids_of(text)
    assert ids.count(0) == 4
    assert ids.count(tokenizer().eos_token_id) == 2
    record = encode("", text)
    assert record.scored.sum() == len(ids) - 1
    longer = encode("", text + " the the the the")
    padded, mask = pad([record, longer])
    assert mask[0].sum() == len(ids) - 1
    assert padded[0, : len(ids)].tolist() == ids
    small = [Encoded(r.id, r.ids % 61, r.scored, 9) for r in (record, longer)]
    stats = token_stats(build("gpt2"), small, LONG)
    np.testing.assert_array_equal(stats.lengths, [len(ids) - 1, longer.scored.sum()])


def test_one_token_without_bos_is_not_usable():
    alone = Example("x", "", "!")
    assert Encoder(tokenizer(), LONG).usable(alone) is not None
    assert Encoder(tokenizer(True), LONG).usable(alone) is None
    assert Encoder(tokenizer(), LONG).usable(Example("x", "", "!!")) is None


def test_unusable_records_are_passed_over_and_counted():
    texts = tuple(Example(str(n), "", text) for n, text in enumerate(["!", "?", *(f"dog {n} fox" for n in range(16))]))
    sizes = DataSpec(source="x", members=4, nonmembers=4, validation=4, tune_on=4, max_length=LONG)
    audits = [
        prepare(Pool("x", {"all": texts}), sizes.model_copy(update={"seed": seed}), tokenizer()) for seed in range(9)
    ]
    for audit in audits:
        assert len(audit.scored) == 12
        assert not {"0", "1"} & {record.id for record in (*audit.scored, *audit.tuned)}
    counted = {sum(audit.dropped.values()) for audit in audits}  # only those that a draw met
    assert counted <= {0, 1, 2}
    assert len(counted) > 1


@given(prompt=st.text("the quickfox!:\n", max_size=30), target=st.text("the quickfox!:\n", min_size=1, max_size=30))
def test_the_scored_tokens_hold_the_whole_target_and_at_most_one_token_of_the_prompt(prompt, target):
    record = encode(prompt, target, bos=True)
    found = scored_text(record, bos=True).removesuffix("</s>") if prompt else scored_text(record, bos=True)
    assert found.endswith(target)
    assert (prompt + target).endswith(found)
    straddling = tokenizer().decode(record.ids[record.scored][:1])
    assert len(found) - len(target) < max(len(straddling), 1)


# ---- what is too long ----


def test_prompts_lose_their_beginning_first():
    prompt, target = "the quick fox jumps over: ", "lazy dog"
    whole = encode(prompt, target)
    wanted = int(whole.scored.sum())
    record = encode(prompt, target, max_length=wanted + 3)
    assert record.cut == "prompt"
    assert record.ids.tolist() == whole.ids[-wanted - 3 :].tolist()
    assert record.scored.tolist() == [False] * 3 + [True] * wanted
    assert record.zlib_bytes == whole.zlib_bytes


def test_bos_stays_when_a_prompt_is_cut():
    record = encode("the quick fox jumps over: ", "lazy dog", max_length=9, bos=True)
    assert record.ids[0] == tokenizer(True).bos_token_id
    assert len(record) == 9


def test_targets_lose_their_end_and_the_eos():
    whole = encode("a fox: ", "the lazy dog jumps over the quick fox")
    record = encode("a fox: ", "the lazy dog jumps over the quick fox", max_length=4)
    assert record.cut == "target"
    assert record.ids.tolist() == whole.ids[whole.scored][:4].tolist()
    assert record.scored.tolist() == [False, True, True, True]  # no prompt is left, so the first has nothing before it
    assert tokenizer().eos_token_id not in record.ids
    kept = tokenizer().decode(record.ids)
    assert record.zlib_bytes == len(zlib.compress(kept.encode()))


@pytest.mark.parametrize("bos", [False, True])
@given(
    prompt=st.text("the quickfox!:", max_size=40),
    target=st.text("the quickfox!:", min_size=1, max_size=40),
    max_length=st.integers(2, 40),
)
def test_nothing_is_ever_longer_than_max_length(bos, prompt, target, max_length):
    whole, record = encode(prompt, target, bos=bos), encode(prompt, target, max_length, bos)
    assert len(record) == min(len(whole), max_length)
    assert bool(record.cut) == (len(whole) > max_length)
    assert not record.scored[0]


@pytest.mark.parametrize("bos", [False, True])
@given(
    prompt=st.text("the quickfox!:", max_size=30),
    target=st.text("the quickfox!:", min_size=1, max_size=30),
    max_length=st.integers(2, 30),
)
def test_keeping_the_start_cuts_the_end_alone(bos, prompt, target, max_length):
    whole = encode(prompt, target, bos=bos)
    record = encode(prompt, target, max_length, bos, "keep_start")
    assert record.ids.tolist() == whole.ids[:max_length].tolist()
    assert record.scored.tolist() == whole.scored[:max_length].tolist()
    assert record.cut == ("target" if len(whole) > max_length else "")


def test_a_start_without_a_target_is_not_usable():
    record = encode("the quick fox jumps over: ", "lazy dog", 5, overlong="keep_start")
    assert unusable(record) == "nothing to predict once cut to max_length"
    assert record.zlib_bytes == len(zlib.compress(b""))


def test_refusing_names_the_record_and_both_lengths():
    text = "the quick fox jumps over the lazy dog"
    length = len(ids_of(text))
    assert encode("", text, length, overlong="refuse").cut == ""
    with pytest.raises(DataError, match=rf"'x' has {length} tokens.*{length - 1}"):
        encode("", text, length - 1, overlong="refuse")


def test_cuts_are_counted():
    texts = tuple(Example(str(n), "fox ! " * n, f"dog {n} fox") for n in range(12))
    sizes = DataSpec(source="x", members=4, nonmembers=4, validation=4, tune_on=4, max_length=10)
    audit = prepare(Pool("x", {"all": texts}), sizes.model_copy(update={"seed": 0}), tokenizer())
    by_hand = [encode("fox ! " * n, f"dog {n} fox", 10).cut for n in range(12)]
    assert audit.summary()["truncated"] == {part: by_hand.count(part) for part in ("prompt", "target")}
    assert by_hand.count("prompt") > 0


def test_texts_made_equal_by_cutting_do_not_stand_on_both_sides():
    """Ten letters on the same letterhead: what is left of them at this length is the same text."""
    texts = tuple(Example(str(n), "", f"{'the quick fox ' * 4}{n} {chr(97 + n) * 40}") for n in range(10))
    others = tuple(Example(f"o{n}", "", f"lazy dog {n} jumps over {n * n} lazy foxes") for n in range(20))
    sizes = DataSpec(source="x", members=6, nonmembers=6, validation=2, tune_on=6, max_length=8)
    for seed in range(5):
        audit = prepare(Pool("x", {"all": texts + others}), sizes.model_copy(update={"seed": seed}), tokenizer())
        sides: dict[bytes, set[str]] = {}
        for record, role in zip(audit.scored, audit.roles, strict=True):
            sides.setdefault(record.ids.tobytes(), set()).add(role)
        assert all(len(roles) == 1 for roles in sides.values())


@pytest.mark.parametrize("words", [WORDS, ["xyzxyz", "a", "!", "é😀"], ["the" * 40]])
@pytest.mark.parametrize("apart", [" ", "", "\n\n"])
@pytest.mark.parametrize("how", [{}, {"loss": "all"}, {"bos": True}, {"prompt": "a fox: ", "overlong": "keep_start"}])
def test_a_book_is_not_read_to_its_end(words, apart, how):
    """The first tokens are those of the whole text, though only a beginning of it is looked at."""
    dice = random.Random(f"{words} {apart}")
    book = apart.join(dice.choice(words) for _ in range(4000))
    how = {"prompt": "", **how}
    prompt = how.pop("prompt")
    record = encode(prompt, book, 5, **how)
    ids = [tokenizer(True).bos_token_id] * ("bos" in how) + ids_of(prompt + book, "bos" in how)
    assert record.ids.tolist() == ids[:5]
    assert record.cut == "target"


def test_a_book_takes_no_longer_than_its_beginning():
    book = "the quick fox " * 700_000
    started = time.perf_counter()
    assert len(encode("", book, 64)) == 64
    assert time.perf_counter() - started < 1


# ---- everything learned; the end of a text ----


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("overlong", ["truncate", "keep_start"])
@pytest.mark.parametrize("max_length", [LONG, 9])
def test_everything_is_scored_but_what_nothing_stands_before(bos, overlong, max_length):
    text = ("the quick fox: ", "the lazy dog")
    target = encode(*text, max_length, bos, overlong)
    record = encode(*text, max_length, bos, overlong, loss="all")
    assert record.ids.tolist() == target.ids.tolist()
    assert record.scored.tolist() == [False, *[True] * (len(record) - 1)]
    assert record.cut == target.cut
    kept = record.ids[bos:] if record.cut else ids_of("".join(text))
    assert record.zlib_bytes == len(zlib.compress(tokenizer().decode(kept).encode()))


@pytest.mark.parametrize("prompt", ["", "the fox: "])
@pytest.mark.parametrize("eos", [None, True, False])
def test_whether_a_text_ends_with_eos(prompt, eos):
    record = encode(prompt, "lazy dog", eos=eos)
    wanted = bool(prompt) if eos is None else eos
    assert record.ids.tolist() == ids_of(f"{prompt}lazy dog") + [tokenizer().eos_token_id] * wanted
    assert record.scored[-1]
    assert record.zlib_bytes == len(zlib.compress(b"lazy dog"))


def test_no_second_eos_where_it_is_asked_for():
    """As TRL, which looks whether it is there."""
    assert encode("", "lazy dog</s>", eos=True).ids.tolist() == ids_of("lazy dog</s>")


# ---- records in tokens ----


def in_tokens(ids, learned, max_length=LONG, **how):
    return Encoder(tokenizer(), max_length, **how)(Example("x", "", "", form=Tokenized(tuple(ids), tuple(learned))))


def test_tokens_stay_as_they_are():
    ids = ids_of("the quick fox jumps")
    mask = [True, False, *[True] * (len(ids) - 2)]
    record = in_tokens(ids, mask, eos=True)
    assert record.ids.tolist() == ids
    assert record.scored.tolist() == [False, False, *[True] * (len(ids) - 2)]
    assert record.zlib_bytes == len(zlib.compress(tokenizer().decode(ids[2:]).encode()))
    assert in_tokens(ids, mask, loss="all").scored.tolist() == [False, *[True] * (len(ids) - 1)]


def test_tokens_are_cut_at_their_end():
    ids = ids_of("the quick fox jumps over")
    mask = [False, True, True, *[False] * (len(ids) - 3)]
    assert [in_tokens(ids, mask, length).cut for length in (len(ids), 3, 2)] == ["", "prompt", "target"]
    assert in_tokens(ids, mask, 2).ids.tolist() == ids[:2]
    with pytest.raises(DataError, match=rf"'x' has {len(ids)} tokens"):
        in_tokens(ids, mask, 3, overlong="refuse")


def test_tokens_of_another_tokenizer_are_refused():
    last = len(tokenizer()) - 1
    assert in_tokens([1, last], [True, True]).ids.tolist() == [1, last]
    with pytest.raises(
        DataError, match=rf"record 'x' holds the token {last + 1}, and this tokenizer knows {last + 1}:"
    ):
        in_tokens([1, last + 1], [True, True])


def test_nothing_learned_is_not_usable():
    assert unusable(in_tokens([1, 2], [False, False])) == "no learned token"
    assert unusable(in_tokens([1, 2], [True, False])) == "no learned token"


def test_records_of_every_form_are_prepared_with_one_process():
    """A pool of chats; one template for all of them, and the same ids as one by one."""
    words = make_tokenizer()
    words.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    chats = [
        Chat(({"role": "user", "content": f"fox {n}"}, {"role": "assistant", "content": f"dog {n * n}"}), (1,))
        for n in range(8)
    ]
    texts = tuple(Example(str(n), f"fox {n}", f"dog {n * n}", form=form) for n, form in enumerate(chats))
    spec = DataSpec(source="x", split="given", members=4, nonmembers=4, max_length=LONG, seed=0)
    audit = prepare(Pool("x", {"member": texts[:4], "nonmember": texts[4:]}), spec, words)
    assert audit.roles == ("member",) * 4 + ("nonmember",) * 4
    with Templates(words) as templates:
        encoder = Encoder(words, LONG, templates=templates)
        for example, record in zip(audit.examples, audit.scored, strict=True):
            assert record.ids.tolist() == encoder(example).ids.tolist()
            assert record.scored.sum() > 1
    alone = Encoder(words, LONG)(texts[3])
    assert words.decode(alone.ids) == "<user>fox 3<assistant>dog 9"
    assert words.decode(alone.ids[alone.scored]) == "<assistant>dog 9"


# ---- zlib ----


@pytest.mark.parametrize("prompt", ["", "the fox: "])
def test_zlib_measures_the_scored_text_only(prompt):
    target = " ünïcode dog " * 3
    assert encode(prompt, target).zlib_bytes == len(zlib.compress(target.encode("utf-8")))


# ---- batches ----


@given(lengths=st.lists(st.integers(1, 200), max_size=60), budget=st.integers(1, 500))
def test_batches_hold_every_position_once_within_the_budget(lengths, budget):
    groups = batches(lengths, budget)
    assert sorted(n for group in groups for n in group) == list(range(len(lengths)))
    for group in groups:
        padded = max(lengths[n] for n in group) * len(group)
        assert padded <= budget or len(group) == 1
    sizes = [lengths[n] for group in groups for n in group]
    assert sizes == sorted(sizes, reverse=True)  # alike in length: little padding; longest first: memory fails early


@given(lengths=st.lists(st.integers(1, 50), min_size=2, max_size=40), budget=st.integers(50, 500))
def test_batches_are_no_smaller_than_they_must_be(lengths, budget):
    """The next text would not have fitted: of the sizes in descending order, the longest decides."""
    groups = batches(lengths, budget)
    for before in groups[:-1]:
        assert lengths[before[0]] * (len(before) + 1) > budget


def test_padding_is_on_the_right_and_never_scored():
    records = [encode("", "the fox"), encode("", "the quick fox jumps over the dog")]
    ids, scored = pad(records)
    for n, record in enumerate(records):
        np.testing.assert_array_equal(ids[n, : len(record)], record.ids)
        np.testing.assert_array_equal(scored[n, : len(record)], record.scored)
        assert not scored[n, len(record) :].any()
