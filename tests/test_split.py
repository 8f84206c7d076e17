"""Dividing a pool: duplicates, groups, sizes, and that the result depends on content, numbers and seed alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imprint.data import Pool, make_split, resolve_sizes
from imprint.data import split as split_module
from imprint.data.dedup import far_from_earlier, first_of_each, word_ids
from imprint.data.split import Usable
from imprint.errors import DataError
from imprint.spec import DataSpec
from imprint.types import Example, Split


def sentence(*seed: object, words: int = 20) -> str:
    dice = random.Random(repr(seed))
    return " ".join(f"w{dice.randrange(10**6)}" for _ in range(words))


def records(n: int, name: str = "r", groups: int | None = None) -> tuple[Example, ...]:
    group = (lambda k: None) if groups is None else (lambda k: f"{name}-g{k % groups}")
    return tuple(Example(f"{name}{k}", "", sentence(name, k), group(k)) for k in range(n))


def spec(**options: Any) -> DataSpec:
    return DataSpec(source="test", **options)


def sides(split: Split) -> list[tuple[Example, ...]]:
    return [split.tuned, split.nonmembers, split.validation]


def group_of(e: Example) -> str:
    return e.id if e.group is None else e.group


# ---- near duplicates against brute force ----


def oracle(texts: list[str], groups: list[int]) -> list[bool]:
    """Keep a text unless an earlier kept one of another group has J ≥ 4/5, counted on sets of tuples."""

    def shingled(text: str) -> set[tuple[str, ...]]:
        words = text.casefold().split()
        return {tuple(words[k : k + 5]) for k in range(max(len(words) - 4, min(len(words), 1)))}

    sets = [shingled(text) for text in texts]
    keep: list[bool] = []
    for n, one in enumerate(sets):
        rivals = (m for m in range(n) if keep[m] and groups[m] != groups[n])
        keep.append(not any(one and 5 * len(one & sets[m]) >= 4 * len(one | sets[m]) for m in rivals))
    return keep


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.lists(st.sampled_from("abC"), max_size=14)), max_size=14), st.data())
def test_near_duplicates_are_those_of_brute_force(drawn: list[tuple[int, list[str]]], data: st.DataObject) -> None:
    texts = [" ".join(words) for _, words in drawn]
    for text in texts[:6]:  # small vocabularies seldom give long texts that are almost the same: plant some
        words = text.split() * data.draw(st.integers(1, 4))
        if words:
            words[data.draw(st.integers(0, len(words) - 1))] = data.draw(st.sampled_from("abcd"))
        texts.append("  ".join(words))
    groups = [group for group, _ in drawn] + [4] * (len(texts) - len(drawn))
    ids = word_ids(Example("", "", text) for text in texts)
    assert far_from_earlier(ids, groups).tolist() == oracle(texts, groups)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_letters_that_differ_in_a_few_words(seed: int) -> None:
    dice = random.Random(seed)
    letter = sentence("letter", seed, words=45).split()
    texts = []
    for _ in range(30):
        words = list(letter[: dice.randint(30, 45)])
        for _ in range(dice.randint(0, 4)):
            words[dice.randrange(len(words))] = f"x{dice.randrange(5)}"
        texts.append(" ".join(words))
    groups = [dice.randrange(20) for _ in texts]
    kept = far_from_earlier(word_ids(Example("", text, "") for text in texts), groups)
    assert kept.tolist() == oracle(texts, groups)


def test_threshold_is_met_exactly() -> None:
    # 44 words have 40 shingles. Another word in the k-th place from the end, k ≤ 5, changes k of them, so that
    # J = (40 - k)/(40 + k): 0.8182 at k = 4 and 0.7778 at k = 5.
    words = sentence("t", words=44).split()
    changed = [" ".join([*words[:-k], "other", *words[len(words) - k + 1 :]]) for k in (4, 5)]
    ids = word_ids(Example("", "", text) for text in [" ".join(words), *changed])
    assert far_from_earlier([ids[0], ids[1]], [0, 1]).tolist() == [True, False]
    assert far_from_earlier([ids[0], ids[2]], [0, 1]).tolist() == [True, True]
    # 4/5 itself counts: 5 shingles in one, 4 of them in the other
    ids = word_ids(Example("", "", text) for text in ("a b c d e f g h i", "a b c d e f g h"))
    assert far_from_earlier(ids, [0, 1]).tolist() == [True, False]


def test_no_records() -> None:
    assert far_from_earlier([], []).tolist() == []
    assert first_of_each([]).tolist() == []


def test_exact_duplicates_ignore_case_and_space() -> None:
    same = [Example("1", "Ask", " Tell  Me"), Example("2", "ask tell", "ME"), Example("3", "ask", "tell me not")]
    assert first_of_each(word_ids(same)).tolist() == [True, False, True]


# ---- random split ----


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12)),
    more=st.integers(0, 30),
    extra=st.integers(0, 6),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_pool_of_single_records_that_is_large_enough_fills_every_side(
    sizes: tuple[int, int, int], more: int, extra: int, seed: int
) -> None:
    members, nonmembers, validation = sizes
    asked = spec(members=members, nonmembers=nonmembers, validation=validation, tune_on=members + extra)
    split = make_split(Pool("p", {"all": records(sum(sizes) + extra + more)}), asked, seed)
    assert [len(side) for side in (split.members, split.extra, split.nonmembers, split.validation)] == [
        *(members, extra, nonmembers, validation)
    ]
    drawn = [e.id for side in sides(split) for e in side]
    assert len(set(drawn)) == len(drawn)
    assert split.dropped == {}


@settings(max_examples=60, deadline=None)
@given(owners=st.lists(st.integers(0, 40), min_size=60, max_size=120), seed=st.integers(0, 1000))
def test_groups_and_texts_never_meet(owners: list[int], seed: int) -> None:
    found = [
        Example(f"{k}", "", sentence("own", owner, k % 3), f"g{owner}" if owner else None)
        for k, owner in enumerate(owners)
    ]
    pool = Pool("p", {"train": tuple(found[:30]), "odd": tuple(found[30:])})
    asked = spec(members=3, nonmembers=2, validation=1, tune_on=5)
    try:
        split = make_split(pool, asked, seed)
    except DataError:  # a few large groups need not suit three sides
        return
    groups = [{group_of(e) for e in side} for side in sides(split)]
    drawn = [{" ".join(e.target.casefold().split()) for e in side} for side in sides(split)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not groups[a] & groups[b]
        assert not drawn[a] & drawn[b]
    assert make_split(pool, asked, seed) == split


def test_the_seed_and_only_the_seed_decides() -> None:
    parts = {"train": records(40, "a", groups=15), "test": records(20, "b"), "notes": records(9, "c")}
    asked = spec(members=20, nonmembers=10, validation=5)
    split = make_split(Pool("p", parts), asked, 7)
    turned = Pool("q", dict(reversed(parts.items())))
    assert make_split(turned, asked, 7) == split
    others = [make_split(turned, asked, seed) for seed in range(5)]
    assert len({tuple(e.id for e in other.members) for other in others}) == 5


def test_split_of_today() -> None:
    # A changed draw would silently make old runs and new runs incomparable: raise MEASUREMENT_VERSION with it.
    split = make_split(Pool("p", {"all": records(12, groups=6)}), spec(members=4, nonmembers=2, validation=2), 0)
    assert [[e.id for e in side] for side in sides(split)] == [["r10", "r2", "r3", "r9"], ["r7", "r11"], ["r6", "r0"]]


def test_large_groups_go_to_one_side_each() -> None:
    pool = Pool("p", {"all": records(90, groups=3)})
    split = make_split(pool, spec(members=30, nonmembers=30, validation=30), 1)
    assert [len({e.group for e in side}) for side in sides(split)] == [1, 1, 1]


def test_duplicates_are_dropped_and_counted() -> None:
    base = records(30)
    text = base[0].target.split()
    planted = (
        Example("copy", "", base[1].target.upper().replace(" ", "\n")),
        Example("near", "", " ".join([*text, "more"])),
        Example("kin1", "", sentence("kin"), "kin"),
        Example("kin2", "", sentence("kin") + " again", "kin"),
    )
    pool = Pool("p", {"all": base + planted}, {"empty text": 2})
    split = make_split(pool, spec(members=15, nonmembers=10, validation=7), 3)
    assert split.dropped == {"empty text": 2, "exact duplicate": 1, "near duplicate": 1}
    assert {"kin1", "kin2"} <= {e.id for side in sides(split) for e in side}


def test_unusable_records_are_passed_over_and_counted() -> None:
    pool = Pool("p", {"all": records(60)})
    bad = {f"r{k}" for k in range(0, 60, 5)}
    split = make_split(
        pool,
        spec(members=10, nonmembers=10, validation=10),
        0,
        lambda e: "one token only" if e.id in bad else None,
    )
    assert not bad & {e.id for side in sides(split) for e in side}
    assert 0 < split.dropped["one token only"] <= len(bad)


def test_too_few_records_say_which_option_to_lower() -> None:
    pool = Pool("mail", {"all": records(20)})
    with pytest.raises(DataError) as caught:
        make_split(pool, spec(members=8, nonmembers=8, validation=8), 0)
    assert str(caught.value) == (
        "mail: 8 members asked for; 20 of 20 records are left after filtering, and 7 usable ones fall to that side; "
        "lower `members` or bring more data."
    )
    with pytest.raises(DataError, match=r"19 records to tune on asked for.*lower `tune_on`"):
        make_split(pool, spec(members=8, tune_on=19, nonmembers=2, validation=1), 0)
    first_four = itertools.count()
    with pytest.raises(DataError, match=r"4 non-members asked for.*0 usable.*lower `nonmembers`"):
        make_split(
            pool,
            spec(members=4, nonmembers=4, validation=4),
            0,
            lambda e: None if next(first_four) < 4 else "one token only",
        )


# ---- more records to tune on ----


def grown(pool: Pool, seed: int, sizes: tuple[int, int, int], extra: int, usable: Usable = lambda e: None) -> Split:
    members, nonmembers, validation = sizes
    asked = spec(members=members, nonmembers=nonmembers, validation=validation, tune_on=members + extra)
    return make_split(pool, asked, seed, usable)


def scored(split: Split) -> list[tuple[Example, ...]]:
    return [split.members, split.nonmembers, split.validation]


def tunable(pool: Pool, plain: Split, bad: frozenset[str] = frozenset()) -> set[str]:
    """Ids that may be tuned on beside the members of a split, by the rules as they are written."""
    taken = {e.id for side in scored(plain) for e in side}
    apart = {group_of(e) for e in (*plain.nonmembers, *plain.validation)}
    return {e.id for e in pool.parts["all"] if e.id not in taken | bad and group_of(e) not in apart}


@settings(max_examples=150, deadline=None)
@given(
    owners=st.lists(st.integers(0, 30), min_size=1, max_size=60),
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4)),
    extras=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    bad=st.frozensets(st.integers(0, 59), max_size=12),
    seed=st.integers(0, 2**31 - 1),
)
def test_what_is_scored_never_depends_on_tune_on_and_the_extra_ones_are_nested(
    owners: list[int], sizes: tuple[int, int, int], extras: tuple[int, int], bad: frozenset[int], seed: int
) -> None:
    found = (Example(f"r{k}", "", sentence(k), f"g{o}" if o > 9 else None) for k, o in enumerate(owners))
    pool, unusable = Pool("p", {"all": tuple(found)}), frozenset(f"r{k}" for k in bad)

    def take(extra: int) -> Split | str:
        try:
            return grown(pool, seed, sizes, extra, lambda e: "short" if e.id in unusable else None)
        except DataError as error:
            return str(error)

    plain = take(0)
    if isinstance(plain, str):  # the members, non-members or validation records are too few, whatever is tuned on
        assert take(extras[0]) == plain
        return
    allowed = tunable(pool, plain, unusable)
    most = take(len(allowed))
    assert isinstance(most, Split)
    assert {e.id for e in most.extra} == allowed
    for extra in extras:
        split = take(extra)
        if extra > len(allowed):
            asked, have = sizes[0] + extra, sizes[0] + len(allowed)
            assert split == (
                f"p: {asked} records to tune on asked for; {len(owners)} of {len(owners)} records are left after "
                f"filtering, and {have} usable ones fall to that side; lower `tune_on` or bring more data."
            )
            continue
        assert isinstance(split, Split)
        assert scored(split) == scored(plain)
        assert split.extra == most.extra[:extra]
        assert split.dropped.get("short", 0) <= len([e for e in pool.parts["all"] if e.id in unusable])


def test_the_same_members_with_up_to_eight_times_as_many_records_beside_them() -> None:
    pool = Pool("p", {"all": records(800, groups=700)})
    small, *larger = (grown(pool, 3, (50, 50, 40), 50 * factor - 50) for factor in (1, 2, 4, 8))
    assert small.extra == ()
    for split, next_split in itertools.pairwise((small, *larger)):
        assert scored(next_split) == scored(small)
        assert next_split.extra[: len(split.extra)] == split.extra
    assert [len(split.extra) for split in larger] == [50, 150, 350]


def test_extra_records_come_from_all_that_is_left() -> None:
    """Kin of members and strangers alike, at the rates at which they are left."""
    pool = Pool("p", {"all": records(600, groups=200)})
    share, expected = [], []
    for seed in range(20):
        split = grown(pool, seed, (60, 20, 20), 100)
        kin = {group_of(e) for e in split.members}
        left = tunable(pool, split)
        share.append(np.mean([group_of(e) in kin for e in split.extra]))
        expected.append(np.mean([group_of(e) in kin for e in pool.parts["all"] if e.id in left]))
    assert 0.1 < np.mean(expected) < 0.9
    assert abs(np.mean(share) - np.mean(expected)) < 0.05  # 2,000 draws: a deviation of about .01


def first_of_equals(key: Callable[[str], object], calls: list[str]) -> Usable:
    """A filter with a memory, as of texts that cutting made equal: only the first of those with one key passes."""
    owner: dict[object, str] = {}

    def usable(e: Example) -> str | None:
        calls.append(e.id)
        return None if owner.setdefault(key(e.id), e.id) == e.id else "equal"

    return usable


def test_extra_records_are_tried_last() -> None:
    pool = Pool("p", {"all": records(60)})
    seen: list[list[str]] = [[], [], []]
    splits = [
        grown(pool, 1, (4, 4, 3), extra, first_of_equals(lambda name: int(name[1:]) // 3, calls))
        for extra, calls in zip((0, 3, 9), seen, strict=True)
    ]
    for split, calls in zip(splits, seen, strict=True):
        assert scored(split) == scored(splits[0])
        assert calls[: len(seen[0])] == seen[0]
        assert len(set(calls)) == len(calls)
        assert split.dropped.get("equal", 0) == len(calls) - 11 - len(split.extra)
    assert splits[1].extra == splits[2].extra[:3]
    assert splits[2].dropped["equal"] > splits[0].dropped.get("equal", 0)


def test_extra_records_of_today() -> None:
    split = grown(Pool("p", {"all": records(24, groups=12)}), 2, (3, 2, 2), 6)
    assert [[e.id for e in side] for side in (*scored(split), split.extra)] == [
        *(["r22", "r5", "r10"], ["r14", "r2"], ["r6", "r21"]),
        ["r1", "r20", "r11", "r16", "r15", "r8"],
    ]


# ---- sizes ----


def test_default_sizes() -> None:
    full = resolve_sizes(spec(), Pool("p", {"all": records(1)}))
    assert (full.members, full.nonmembers, full.validation, full.tune_on) == (1000, 1000, 500, 1000)
    assert resolve_sizes(full, Pool("p", {})) == full
    assert resolve_sizes(spec(members=7, tune_on=9), Pool("p", {})).tune_on == 9


def test_tuned_on_less_than_members() -> None:
    with pytest.raises(DataError, match=r"`tune_on: 5` is less than `members: 1000`.*raise `tune_on` or lower"):
        resolve_sizes(spec(tune_on=5), Pool("p", {}))


def test_official_sizes_are_the_papers_or_the_whole_part() -> None:
    parts = {"train": records(50, "a"), "test": records(12, "b"), "validation": records(9, "c")}
    small = resolve_sizes(
        spec(split="official"), Pool("p", parts, {}, {"members": 20, "nonmembers": 20, "tune_on": 80})
    )
    assert (small.members, small.nonmembers, small.validation, small.tune_on) == (20, 12, 9, 50)
    exact = resolve_sizes(
        spec(split="official"), Pool("p", parts, {}, {"members": 20, "nonmembers": 10, "tune_on": 30})
    )
    assert (exact.members, exact.nonmembers, exact.validation, exact.tune_on) == (20, 10, 9, 30)
    plain = resolve_sizes(spec(split="official", members=40), Pool("p", parts))
    assert (plain.members, plain.nonmembers, plain.tune_on) == (40, 12, 40)


# ---- official split ----


def official_pool() -> Pool:
    train = (*records(30, "a", groups=10), Example("shared", "", sentence("s1"), "both"))
    test = (
        *records(8, "b"),
        Example("kin", "", sentence("s2"), "both"),
        Example("copy", "", train[3].target.upper()),
        Example("near", "", train[4].target + " more"),
        Example("t-owner", "", sentence("s3"), "tv"),
    )
    validation = (
        *records(6, "c"),
        Example("v-kin", "", sentence("s4"), "both"),
        Example("v-tv", "", sentence("s5"), "tv"),
        Example("v-copy", "", test[0].target),
    )
    return Pool("p", {"validation": validation, "test": test, "train": train, "other": records(5, "o")})


def test_official_parts_keep_apart_what_is_tuned_on() -> None:
    asked = spec(split="official", members=5, tune_on=31, nonmembers=12, validation=9)
    split = make_split(official_pool(), asked, 0)
    assert len(split.members) == 5
    assert {e.id for e in split.tuned} == {f"a{k}" for k in range(30)} | {"shared"}
    assert {e.id for e in split.nonmembers} == {f"b{k}" for k in range(8)} | {"t-owner"}
    assert {e.id for e in split.validation} == {f"c{k}" for k in range(6)}
    assert split.dropped == {
        "exact duplicate": 2,
        "near duplicate": 1,
        "group also among the tuned": 2,
        "group also among the non-members": 1,
    }
    fewer = make_split(official_pool(), spec(split="official", members=5, nonmembers=9, validation=6), 1)
    assert (len(fewer.members), len(fewer.extra)) == (5, 0)
    assert {e.id for e in fewer.nonmembers} == {e.id for e in split.nonmembers}
    assert [e.id for e in fewer.members] != [e.id for e in split.members]


def test_official_sides_do_not_depend_on_tune_on() -> None:
    """Nor through a filter with a memory, for which a3 of train, b3 of test and c3 of validation are equal."""
    pool = official_pool()
    fewer, more, most = (
        make_split(
            pool,
            spec(split="official", members=5, tune_on=tune_on, nonmembers=4, validation=1),
            0,
            first_of_equals(lambda name: name[1:], []),
        )
        for tune_on in (5, 12, 25)
    )
    assert scored(fewer) == scored(more) == scored(most)
    assert (len(most.extra), fewer.extra, more.extra) == (20, (), most.extra[:7])
    assert {e.id for e in most.tuned} < {e.id for e in pool.parts["train"]}


def test_official_split_needs_official_parts_and_enough() -> None:
    with pytest.raises(DataError, match=r"needs the parts train, test and validation, and p has no test; parts found"):
        make_split(Pool("p", {"train": records(5), "all": records(3, "x")}), spec(split="official"), 0)
    asked = spec(split="official", members=5, nonmembers=10, validation=5)
    with pytest.raises(DataError, match=r"10 non-members asked for; .* 9 usable ones fall to that side; lower `nonm"):
        make_split(official_pool(), asked, 0)
    # all of train to tune on, but no longer as many members as asked for
    twice = {**official_pool().parts, "train": records(10, "a") + records(10, "a")}
    with pytest.raises(DataError, match=r"15 members asked for; .* 10 usable ones fall to that side; lower `members`"):
        make_split(Pool("p", twice), spec(split="official", members=15, tune_on=20, nonmembers=5, validation=5), 0)


# ---- given split ----


def given_pool(validation: bool = True) -> Pool:
    """The official pool's records, by who was tuned on."""
    parts = official_pool().parts
    sides = {"member": parts["train"], "nonmember": parts["test"]}
    return Pool("p", sides | ({"validation": parts["validation"]} if validation else {}))


def test_given_sides_keep_apart_what_was_tuned_on() -> None:
    split = make_split(given_pool(), spec(split="given"), 0)
    assert {e.id for e in split.members} == {f"a{k}" for k in range(30)} | {"shared"}
    assert {e.id for e in split.nonmembers} == {f"b{k}" for k in range(8)} | {"t-owner"}
    assert {e.id for e in split.validation} == {f"c{k}" for k in range(6)}
    assert split.extra == ()
    assert split.dropped == {
        "exact duplicate": 2,
        "near duplicate": 1,
        "group also among the tuned": 2,
        "group also among the non-members": 1,
    }


def test_given_sides_need_no_validation() -> None:
    asked = resolve_sizes(spec(split="given"), given_pool(validation=False))
    assert (asked.members, asked.nonmembers, asked.validation, asked.tune_on) == (31, 12, None, 31)
    assert DataSpec.model_validate(asked.model_dump()) == asked
    assert resolve_sizes(asked, given_pool(validation=False)) == asked
    split = make_split(given_pool(validation=False), asked, 0)
    assert (len(split.members), len(split.nonmembers), split.validation) == (31, 9, ())


def test_given_sides_are_drawn_by_whole_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most so many of each by default; fewer where fewer are left."""
    monkeypatch.setattr(split_module, "GIVEN_MOST", 12)
    pool = Pool("p", {"member": records(60, "a", groups=10), "nonmember": records(13, "b"), "odd": records(5, "c")})
    splits = [make_split(pool, spec(split="given"), seed) for seed in range(4)]
    for split in splits:
        assert (len(split.members), len(split.nonmembers)) == (12, 12)
        sizes = [sum(e.group == group for e in split.members) for group in {e.group for e in split.members}]
        assert sizes == [6, 6]
        assert split.extra == ()
    assert len({frozenset(e.group for e in split.members) for split in splits}) > 1
    assert make_split(pool, spec(split="given"), 0) == splits[0]
    bad = {f"b{n}" for n in range(5)}
    fewer = make_split(pool, spec(split="given"), 0, lambda e: "short" if e.id in bad else None)
    assert {e.id for e in fewer.nonmembers} == {f"b{n}" for n in range(5, 13)}
    more = make_split(pool, spec(split="given", tune_on=20), 0)
    assert (more.members, len(more.extra)) == (splits[0].members, 8)


def test_given_sides_must_be_there_and_large_enough() -> None:
    lonely = Pool("mail", {"member": records(5)})
    with pytest.raises(
        DataError, match=r"needs members and non-members, and mail has no nonmember; parts found: member"
    ):
        make_split(lonely, spec(split="given"), 0)
    assert len(make_split(given_pool(), spec(split="given", nonmembers=10), 0).nonmembers) == 9  # a number is a limit
    with pytest.raises(DataError, match=r"3 validation records asked for.* 0 usable"):
        make_split(given_pool(validation=False), spec(split="given", validation=3), 0)
    with pytest.raises(
        DataError, match=r"no non-members are left to be scored \(left out: .*short\); are the two sides"
    ):
        make_split(given_pool(), spec(split="given"), 0, lambda e: "short" if e.id[0] in "bt" else None)


def test_order_of_sides_does_not_follow_the_file() -> None:
    split = make_split(Pool("p", {"all": records(300)}), spec(members=100, nonmembers=100, validation=100), 0)
    places = [np.mean([int(e.id[1:]) for e in side]) for side in sides(split)]
    assert max(abs(place - 149.5) for place in places) < 35  # the mean of 100 of 300 has a deviation of 7
