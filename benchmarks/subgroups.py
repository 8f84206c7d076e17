"""Do the numbers of subgroups, exposed records and `imprint plan` keep what they promise, where the truth is known?

    OMP_NUM_THREADS=1 python benchmarks/subgroups.py [--rounds 1000]

Scores are normal, those of a subject's records correlated; members are shifted to the true AUC. Prints, for subgroups:
how often the 95% intervals hold the true AUC, the true difference from the others, and the TPR at the true threshold of
10% and 1% FPR, beside Clopper-Pearson's of the main table; how often no difference is rejected at 5%. For exposed
records: how often an audit of a model that leaks nothing names one, or counts more than chance. For sizes: how often a
model that leaks nothing keeps its budget with the numbers asked for.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
from scipy.special import ndtr, ndtri

from imprint.exposed import FALSE_SHARE, RATE, SIGNIFICANT, conformal_p, count_of, false_shares
from imprint.measures import auc, sizes, tpr_at_fpr
from imprint.measures.bootstrap import draw, tpr_over_subjects
from imprint.measures.contrast import auc_difference
from imprint.measures.estimate import holm
from imprint.measures.tpr import TPR
from imprint.types import Floats

SETTINGS = {
    # subjects a side of the subgroup and of the others, records of each, their correlation, over both
    "10 + 90 records": (10, 90, 1, 0.0, False),
    "20 + 180 records": (20, 180, 1, 0.0, False),
    "50 + 450 records": (50, 450, 1, 0.0, False),
    "400 + 600 records": (400, 600, 1, 0.0, False),
    "20 + 80 subjects of 5, ρ = .5": (20, 80, 5, 0.5, False),
    "100 + 100 subjects of 10, ρ = .9": (100, 100, 10, 0.9, False),
    "60 subjects of 10, ρ = .8, half their records": (30, 30, 10, 0.8, True),
    "200 subjects of 5, ρ = .2, half their records": (100, 100, 5, 0.2, True),
}
TRUTHS = ((0.5, 0.5), (0.7, 0.7), (0.95, 0.95), (0.95, 0.7), (0.99, 0.6))
NULLS = {
    # subjects of members and of non-members, records of each, their correlation
    "1,000 and 1,000 records": (1000, 1000, 1, 1, 0.0),
    "100 and 100 records": (100, 100, 1, 1, 0.0),
    "100 and 10,000 records": (100, 10_000, 1, 1, 0.0),
    "200 and 200 subjects of 5, ρ = .5": (200, 200, 5, 5, 0.5),
    "200 and 200 subjects of 5, ρ = .95": (200, 200, 5, 5, 0.95),
    "100 subjects of 10 and 1,000 of 1, ρ = .9": (100, 1000, 10, 1, 0.9),
    "1,000 subjects of 1 and 100 of 10, ρ = .9": (1000, 100, 1, 10, 0.9),
    "20 and 20 subjects of 50, ρ = .9": (20, 20, 50, 50, 0.9),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000)
    rounds, rng = parser.parse_args().rounds, np.random.default_rng(0)
    print("subgroups: true AUC of subgroup and others; 95% intervals that hold the truth; differences rejected at 5%")
    for title, (*numbers, mixed) in SETTINGS.items():
        for truth in TRUTHS:
            print(
                f"  {title:46} {truth[0]:.2f} {truth[1]:.2f}  {coverage(rng, rounds, mixed, *numbers, *truth)}",
                flush=True,
            )
    print(f"six equal subgroups of 50: a difference is found in {family(rng, rounds):.1%} after Holm's correction")
    print("exposed records of a model that leaks nothing: audits that name one; that count more than chance (5%)")
    for title, setting in NULLS.items():
        print(f"  {title:46} {exposures(rng, rounds, *setting)}", flush=True)
    print("5% of 1,000 members shifted by so many standard deviations: named, and the share of these not shifted")
    for shift in (2.0, 3.0, 4.0, 5.0):
        print(f"  {shift:.0f}: {leak(rng, rounds, shift)}", flush=True)
    print("sizes: non-members asked for at 80%, and how often a model that leaks nothing passes")
    for budget in (0.52, 0.55, 0.6, 0.7):
        for members in (None, 2000):
            n = sizes.for_auc_budget(budget, members=members)
            passed = np.mean([auc(*null(rng, members or n, n)).high < budget for _ in range(rounds)])
            print(f"  AUC below {budget}: {members or n} and {n}: {passed:.1%}", flush=True)
    for budget, fpr in ((0.05, 0.01), (0.02, 0.01), (0.15, 0.1)):
        n = sizes.for_tpr_budget(budget, fpr)
        passed = np.mean([tpr_at_fpr(*null(rng, n, n), fpr).high < budget for _ in range(rounds)])
        print(f"  TPR below {budget} at {fpr}: {n} and {n}: {passed:.1%}", flush=True)


def null(rng: np.random.Generator, m: int, n: int) -> tuple[Floats, Floats]:
    return rng.normal(size=m), rng.normal(size=n)


def scored(rng: np.random.Generator, subjects: int, records: int, correlation: float) -> tuple[Floats, np.ndarray]:
    """Standard normal scores of all records, and their subjects."""
    of = np.repeat(np.arange(subjects), records)
    shared, own = rng.normal(size=subjects)[of], rng.normal(size=len(of))
    return math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own, of


def coverage(rng: np.random.Generator, rounds: int, mixed: bool, *numbers: float) -> str:
    """Shares of rounds, in words."""
    here, there, records, correlation, a, b = numbers
    shifts = math.sqrt(2) * ndtri(a), math.sqrt(2) * ndtri(b)
    counts: dict[str, list[bool]] = {}
    for seed in range(rounds):
        (x, of_x), (y, of_y) = (scored(rng, here + there, records, correlation) for _ in range(2))
        inside_x, inside_y = (rng.random(len(s)) < 0.5 if mixed else s < here for s in (of_x, of_y))
        x = x + np.where(inside_x, *shifts)
        difference, p = auc_difference((x, y), (inside_x, inside_y), (of_x, of_y))
        sides, owners = (x[inside_x], y[inside_y]), (of_x[inside_x], of_y[inside_y] + here + there)
        held = {"AUC": a in auc(*sides, 0.95, *owners), "difference": a - b in difference, "rejected": p < 0.05}
        for fpr in (0.1, 0.01):
            if fpr * len(sides[1]) >= 1 and seed < 400:  # slow
                truth = float(ndtr(shifts[0] - ndtri(1 - fpr)))
                held[f"TPR at {fpr:.0%}"] = truth in tpr_over_subjects(*sides, fpr, draw(*owners, seed=seed))
                held[f"({fpr:.0%} as in the main table)"] = truth in tpr_at_fpr(*sides, fpr)
        for name, hit in held.items():
            counts.setdefault(name, []).append(hit)
    return ", ".join(f"{name} {np.mean(hits):.1%}" for name, hits in counts.items())


def family(rng: np.random.Generator, rounds: int) -> float:
    """How often any of six subgroups of 50 records a side, none of which differs, is found to differ."""
    label, found = np.repeat(np.arange(6), 50), 0
    for _ in range(rounds):
        x, y = rng.normal(1, 1, 300), rng.normal(size=300)
        subjects = np.arange(300), np.arange(300)
        p = [auc_difference((x, y), (label == n, label == n), subjects)[1] for n in range(6)]
        found += min(holm(p)) < 0.05
    return found / rounds


def exposures(rng: np.random.Generator, rounds: int, m: int, n: int, k_m: int, k_n: int, correlation: float) -> str:
    named, more, counted, expected = 0, 0, 0.0, 0.0
    for _ in range(rounds):
        (x, of_x), (y, of_y) = scored(rng, m, k_m, correlation), scored(rng, n, k_n, correlation)
        named += bool(np.any(false_shares(conformal_p(x, y, of_y)) <= FALSE_SHARE))
        count = count_of(1, tpr(x, y), (sizes.design_effect(of_x), sizes.design_effect(of_y)))
        more += count.p < SIGNIFICANT
        counted, expected = counted + count.exposed / rounds, count.expected
    return f"{named / rounds:.1%}; {more / rounds:.1%}; {counted:.1f} counted, {expected:.1f} expected at most"


def tpr(x: Floats, y: Floats) -> TPR:
    return tpr_at_fpr(x, y, RATE)


def leak(rng: np.random.Generator, rounds: int, shift: float) -> str:
    named, false, told = np.zeros(rounds), np.zeros(rounds), 0
    for n in range(rounds):
        x, y = null(rng, 1000, 1000)
        x[:50] += shift
        found = false_shares(conformal_p(x, y, np.arange(1000))) <= FALSE_SHARE
        named[n], false[n] = found.sum(), found[50:].sum() / max(1, found.sum())
        told += count_of(1, tpr(x, y), (1.0, 1.0)).p < SIGNIFICANT
    return f"{named.mean():.1f} named, {false.mean():.1%} falsely; {told / rounds:.1%} count more than chance"


if __name__ == "__main__":
    main()
