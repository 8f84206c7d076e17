"""A release verdict in words: a paragraph for a terminal, and Markdown for a pull request."""

from __future__ import annotations

import math

from imprint.release import INVALID, LEAKS, PASS, UNABLE, Held, Judged, Release
from imprint.report import words
from imprint.report.readings import LIMITS
from imprint.report.text import escaped
from imprint.rows import FALSE_POSITIVE_RATES

WORDS = {PASS: "pass", LEAKS: "over budget", INVALID: "invalid", UNABLE: "could not finish"}
MEASURED = "measured"
"""For 0 without a budget: nothing can exceed what was not limited."""
NAMED = 3
"""Up to so many cells are named in a sentence."""


def word(release: Release) -> str:
    """The verdict in a word or two."""
    return WORDS[release.code] if release.budget or release.code else MEASURED


def paragraph(release: Release) -> str:
    """The verdict and what it rests on, in a few sentences."""
    return f"{word(release).upper()}: {' '.join(sentences(release))}"


def markdown(release: Release) -> str:
    """A heading, the paragraph, a table of what was held to the budget, and the gates."""
    lines = [f"### Imprint: {word(release)}", "", escaped(release.title), "", escaped(" ".join(sentences(release)))]
    if release.code in (PASS, LEAKS):
        lines += ["", *_table(release)]
    shut = f"{len(release.doubts)} of {len(release.gates)} not green" if release.doubts else "all green"
    gates = [f"- {escaped(f'{gate.name} {gate.state}: {gate.finding}')}" for gate in release.gates]
    lines += ["", "<details>", f"<summary>Validity gates: {shut}</summary>", "", *gates, "", "</details>"]
    return "\n".join(lines) + "\n"


def sentences(release: Release) -> list[str]:
    """What the paragraph is made of."""
    if release.code == UNABLE:
        did = f"{_share(release, len(release.unable))} did not finish"
        return [f"{did}: {_some(release.unable)}.", "The same command again continues where it ended."]
    if release.doubts:
        opening = "The audit proves nothing either way."
        told = [f"{gate.name} is {gate.state}: {gate.finding} {gate.advice}".rstrip() for gate in release.doubts]
        return [opening, *(one[:1].upper() + one[1:] for one in told)]
    if release.code == INVALID:
        told = _refused(release) or ["Nothing was measured."]
        return [f"Whether {_limits(release)} is kept nobody can say.", *told]
    told = _measured(release) if release.budget is None else _kept(release) if release.code == PASS else _over(release)
    return [*told, _rests_on(release)]


def _share(release: Release, some: int) -> str:
    """
    >>> _share(Release(3, "", None, (Judged("a", None, ()),) * 4, (), (), ()), 2)
    '2 of 4 cells'
    """
    return f"{some} of {len(release.cells)} cells" if len(release.cells) > 1 else "The audit"


def _some(names: tuple[str, ...] | list[str]) -> str:
    return words.listed([*names] if len(names) <= NAMED else [*names[:NAMED], f"{len(names) - NAMED} more"])


def _limits(release: Release) -> str:
    """
    >>> from imprint.spec import Budget
    >>> _limits(Release(0, "", Budget(attack="ref", auc=0.55), (), (), (), ()))
    'the budget (AUC below .550, by ref)'
    """
    given = [(title, getattr(release.budget, metric)) for metric, title in LIMITS.items()]
    shown = [f"{title} below {words.share(limit)}" for title, limit in given if limit is not None]
    who = words.clean(release.budget.attack) if release.budget and release.budget.attack else "every attack"
    return f"the budget ({words.listed(shown)}, by {who})"


def _measured(release: Release) -> list[str]:
    """Without a budget: where the strongest attack stands, of each cell or of the first few."""
    told = [f"No budget was given. {_strongest(one)}" for one in release.cells[:1]]
    told += [_strongest(one) for one in release.cells[1:NAMED]]
    left = len(release.cells) - NAMED
    return [*told, f"{left} more cells are in the report."] if left > 0 else told


def _strongest(one: Judged) -> str:
    held = one.worst("auc")
    if held is None or held.reading.interval is None:
        return f"{one.name}: nothing was measured."
    x = held.reading.interval
    shown = f"{one.name}: the strongest attack is {held.attack}, AUC {words.interval(x)}"
    if x.low > 0.5:
        return f"{shown}. The interval lies above .5: members can be told from non-members."
    told = "so many records show no leakage, which is no proof that there is none"
    return f"{shown}. The interval does not lie above .5: {told}."


def _kept(release: Release) -> list[str]:
    kept = [one for one in release.cells if one.kept]
    if len(release.cells) == 1:
        return [f"T{_limits(release)[1:]} is kept by {kept[0].name}.", *_bounds(kept[0])]
    least = min(kept, key=lambda one: one.excess)
    names = _some([one.name for one in kept])
    return [
        f"T{_limits(release)[1:]} is kept by {len(kept)} of {len(release.cells)} cells: {names}.",
        f"Furthest below it is {least.name}.",
        *_bounds(least),
        "Each was judged alone; `imprint recommend` allows for the choice among them.",
    ]


def _over(release: Release) -> list[str]:
    if len(release.cells) == 1:
        [one] = release.cells
        told = f"T{_limits(release)[1:]} is not kept by {one.name}."
        return [told, *_bounds(one), *_refused(release), *_up_to(one)]
    closest = min(release.cells, key=lambda one: one.excess)
    told = f"T{_limits(release)[1:]} is kept by none of {len(release.cells)} cells. Closest is {closest.name}."
    return [told, *_bounds(closest)]


def _bounds(one: Judged) -> list[str]:
    """Of each measure that is limited, the attack whose upper bound is highest."""
    several = len({held.attack for held in one.held}) > 1
    return [_bound(held, several) for metric in LIMITS if (held := one.worst(metric))]


def _bound(held: Held, several: bool) -> str:
    x, limit = held.reading.interval, held.limit
    assert x is not None
    assert limit is not None
    who = f"is highest by {held.attack}," if several else f"by {held.attack} is"
    mark = f" ({held.reading.status})" if held.reading.status != "ok" else ""
    sign = "below" if held.excess < 0 else "not below"
    bound = f"the upper bound {_exactly(x.high, limit)} is {sign} {words.share(limit)}"
    more = ", though the value is: more records would tell" if x.value < limit <= x.high else ""
    return f"{LIMITS[held.metric]} {who} {words.interval(x)}{mark}: {bound}{more}."


def _exactly(bound: float, limit: float) -> str:
    """To three digits, or to as many as tell it from the limit.

    >>> _exactly(0.5631, 0.55), _exactly(0.5499996, 0.55)
    ('.563', '.5499996')
    """
    if words.share(bound) != words.share(limit) or bound == limit or math.isnan(bound):
        return words.share(bound)
    return f"{bound:.7f}".removeprefix("0").rstrip("0")


def _up_to(one: Judged) -> list[str]:
    """Which earlier checkpoints may go."""
    if one.points < 2:
        return []
    if not one.keeping:
        return ["The first checkpoint does not keep it either."]
    return [f"It is kept up to {one.keeping[-1]}, the first {len(one.keeping)} of {one.points}."]


def _refused(release: Release) -> list[str]:
    """Which limited measures were refused, each once."""
    refused: dict[str, tuple[str, Held]] = {}
    for one in release.cells:
        for held in one.held:
            if held.reading.interval is None or math.isnan(held.reading.interval.high):
                refused.setdefault(held.metric, (one.name, held))
    return [
        f"{LIMITS[metric]} was refused for {name}: {_why(held, release)}." for metric, (name, held) in refused.items()
    ]


def _why(held: Held, release: Release) -> str:
    if held.reading.status != "too_few":
        return words.refused(held.reading)
    there = min((one.counts["nonmembers"] for one in release.records if one.known), default=0)
    needed = math.ceil(1 / FALSE_POSITIVE_RATES[held.metric])
    return f"it takes {needed:,} non-members, and there are {there:,}"


def _rests_on(release: Release) -> str:
    counts = [one.counts for one in release.records if one.known]
    told = f"All {len(release.gates)} validity gates are green"
    if len(counts) != 1:
        return f"{told}."
    return f"{told}; {counts[0]['members']:,} members and {counts[0]['nonmembers']:,} non-members were scored."


# ---- the table


def _table(release: Release) -> list[str]:
    """A row per measure and attack; of several cells only the attack of the highest bound."""
    several, limited = len(release.cells) > 1, release.budget is not None
    header = [*(["model"] if several else []), "attack", "measure", "value", "95% interval"]
    header += ["limit", "kept"] if limited else []
    rows = [_row(one.name if several else "", held, limited) for one in release.cells for held in _listed(one, several)]
    lines = [header, ["--:" if name in ("value", "limit") else ":--" for name in header], *rows]
    return [f"| {' | '.join(line)} |" for line in lines] if rows else []


def _listed(one: Judged, several: bool) -> list[Held]:
    if not several:
        return list(one.held)
    return [held for metric in LIMITS if (held := one.worst(metric))]


def _row(name: str, held: Held, limited: bool) -> list[str]:
    x = held.reading.interval
    shown = [words.refused(held.reading), ""] if x is None else [words.share(x.value), words.bounds(x.low, x.high)]
    cells = [*([name] if name else []), held.attack, LIMITS[held.metric], *shown]
    if limited and held.limit is not None:
        kept = "?" if math.isnan(held.excess) else "yes" if held.excess < 0 else "no"
        cells += [words.share(held.limit), kept]
    return [escaped(words.clean(cell)) for cell in cells]
