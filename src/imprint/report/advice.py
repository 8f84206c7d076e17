"""A recommendation in words."""

from __future__ import annotations

import math

from imprint.recommend import ERROR, Advice, Candidate
from imprint.report import words
from imprint.report.readings import LIMITS
from imprint.report.terms import RUN, Terms
from imprint.report.words import share


def advice_text(advice: Advice, called: Terms = RUN) -> list[str]:
    """Sentences: what to ship, the runner-up, what the budget costs; or what came closest.

    Args:
        called: the words of the grid, `terms(grid)`.
    """
    limits = [
        f"{title} below {share(x)}" for key, title in LIMITS.items() if (x := getattr(advice.budget, key)) is not None
    ]
    who = f"by {words.clean(advice.budget.attack)}" if advice.budget.attack else "by every attack"
    lines = [f"{words.clean(advice.place)}; budget: {words.listed(limits)}, {who}, {_bound(advice)}."]
    if advice.unheld:
        unheld = words.listed([words.clean(attack) for attack in advice.unheld])
        lines.append(f"Not held to it, for want of a number at every epoch: {unheld}.")
    if advice.chosen is None:
        closest = advice.closest
        lines.append(
            f"No checkpoint keeps the budget. Closest: {_named(closest, called)}; its upper bound is over the limit by "
            f"{share(closest.excess)}."
        )
        return lines
    lines.append(f"Recommended: {_named(advice.chosen, called)}.")
    if advice.runner_up:
        lines.append(f"Runner-up: {_named(advice.runner_up, called)}.{_compared(advice)}")
    else:
        lines.append("Runner-up: none; no other method or option keeps the budget.")
    if advice.unlimited == advice.chosen:
        lines.append("The budget costs nothing: this is also the best perplexity of the whole grid.")
    else:
        ratio = advice.chosen.perplexity / advice.unlimited.perplexity
        best = _named(advice.unlimited, called)
        lines.append(f"What the budget costs: {100 * (ratio - 1):.2g}% of perplexity, against {best}.")
    return lines


def _bound(advice: Advice) -> str:
    """At which level, and why it is not the usual one; AUCs are shown at the same."""
    shown = f"upper bound of the {100 * advice.level:.5g}% interval"
    if advice.variants == 1:
        return shown
    return f"{shown} ({100 * (1 - ERROR):g}% for all {advice.variants} methods and options together)"


def _named(one: Candidate, called: Terms) -> str:
    return (
        f"{words.clean(one.label)}, {called.point} {one.epoch}: {called.utility} {words.perplexity(one.perplexity)}, "
        f"{words.clean(one.attack)} AUC {words.interval(one.auc)}"
    )


def _compared(advice: Advice) -> str:
    if advice.difference is None:
        return ""
    found = advice.difference
    ratio = [100 * (math.exp(x) - 1) for x in (found.value, found.low, found.high)]
    return (
        f" Its perplexity is {ratio[0]:.2g}% higher [{ratio[1]:.2g}% {ratio[2]:.2g}%] on the same records "
        f"(p {found.p:.2g})."
    )
