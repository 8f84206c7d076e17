"""How often the 95% interval of the TPR at a false positive rate holds the TPR at the true threshold.

    OMP_NUM_THREADS=1 python benchmarks/tpr.py [--rounds 2000] [--only independent]

Non-members' scores are standard normal, those of a subject's records correlated. Members are shifted to an AUC, or a
share of their subjects is exposed (far above all non-members), or their scores are spread three times as wide; or all
scores are cut to steps of a half, so that many tie. Prints the share of rounds in which the interval holds the truth,
lies above it and lies below it, its mean width, and beside it the share for Clopper and Pearson's interval, which takes
the threshold as given and records as independent. Then the same for the bootstrap over subjects; how often a model that
leaks nothing keeps a budget, against what `sizes.passes_tpr` says; and what a call costs.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri

from imprint.measures import sizes, tpr_at_fpr
from imprint.measures.auc import Codes
from imprint.measures.bootstrap import draw, tpr_over_subjects
from imprint.measures.tpr import clopper_pearson
from imprint.types import Floats

STEP = 0.5


@dataclass(frozen=True)
class Leak:
    """What members' scores look like: shifted, spread, a share of subjects exposed, all scores in steps or not."""

    shift: float = 0.0
    spread: float = 1.0
    exposed: float = 0.0
    steps: bool = False

    def truth(self, fpr: float) -> float:
        threshold = float(-ndtri(fpr))
        if self.steps:  # the least step that no more than `fpr` of the non-members exceed
            threshold = STEP * math.ceil(threshold / STEP - 1e-9)
        rest = float(ndtr((self.shift - threshold) / self.spread))
        return self.exposed + (1 - self.exposed) * rest


def of_auc(auc: float, steps: bool = False) -> Leak:
    return Leak(shift=math.sqrt(2) * float(ndtri(auc)), steps=steps)


LEAKS = {
    **{f"AUC {auc}": of_auc(auc) for auc in (0.5, 0.6, 0.7, 0.9, 0.99)},
    "5% exposed": Leak(exposed=0.05),
    "wide": Leak(spread=3.0),
    "AUC .7, ties": of_auc(0.7, steps=True),
}
INDEPENDENT = {
    # members, non-members
    0.1: ((100, 100), (300, 300), (1000, 1000), (2000, 2000), (100, 2000), (2000, 100)),
    0.01: ((100, 100), (400, 400), (1000, 1000), (2000, 2000), (100, 2000), (2000, 200)),
    0.001: ((1000, 1000), (2000, 2000), (100, 2000)),
}
SUBJECTS = {
    # records of a subject, their correlation, members and non-members
    "5, ρ = .2": (5, 0.2, ((100, 100), (400, 400), (2000, 2000))),
    "5, ρ = .5": (5, 0.5, ((100, 100), (400, 400), (2000, 2000), (2000, 200))),
    "10, ρ = .9": (10, 0.9, ((400, 400), (2000, 2000), (2000, 400))),
    "1 to 20, few of many, ρ = .5": ("uneven", 0.5, ((400, 400), (2000, 2000))),
    "2, and three in ten are of one, ρ = .5": ("one", 0.5, ((1000, 1000),)),
    "20, ρ = .5 (20 subjects)": (20, 0.5, ((400, 400),)),
    "50, ρ = .3 (10 subjects)": (50, 0.3, ((500, 500),)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"independent": independent, "subjects": subjects, "bootstrap": bootstrap, "budgets": budgets, "cost": cost}
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--only", choices=parts, action="append")
    given = parser.parse_args()
    for name in given.only or parts:
        print(f"# {name}", flush=True)
        parts[name](given.rounds)


def independent(rounds: int) -> None:
    for fpr, numbers in INDEPENDENT.items():
        for m, n in numbers:
            for title, leak in LEAKS.items():
                print(line(title, fpr, (m, n), covered(leak, fpr, (m, n), rounds)), flush=True)


def subjects(rounds: int) -> None:
    for name, (records, correlation, numbers) in SUBJECTS.items():
        print(f"## {name}", flush=True)
        for m, n in numbers:
            for fpr in (0.1, 0.01, 0.001):
                for title, leak in LEAKS.items():
                    if fpr * n >= 1:
                        found = covered(leak, fpr, (m, n), rounds, records, correlation)
                        print(line(title, fpr, (m, n), found), flush=True)


def bootstrap(rounds: int) -> None:
    """A tenth of the rounds: 10 to 50 ms each."""
    for records, correlation, m, fpr in ((1, 0.0, 300, 0.1), (1, 0.0, 1000, 0.01), (5, 0.5, 400, 0.1)):
        for title in ("AUC 0.5", "AUC 0.7", "AUC 0.99", "5% exposed"):
            leak, rng = LEAKS[title], np.random.default_rng(0)
            quick, slow = [], []
            for seed in range(rounds // 10):
                x, y, of_x, of_y = scored(rng, leak, (m, m), records, correlation)
                truth = leak.truth(fpr)
                for held, one in (
                    (quick, tpr_at_fpr(x, y, fpr, 0.95, of_x, of_y)),
                    (slow, tpr_over_subjects(x, y, fpr, draw(of_x, of_y, seed=seed))),
                ):
                    held.append((truth in one, one.high - one.low))
            (a, wide_a), (b, wide_b) = np.mean(quick, axis=0), np.mean(slow, axis=0)
            print(
                f"{records} of ρ = {correlation}, {m} and {m}, {fpr:.0%} FPR, {title}: {a:.1%} of width {wide_a:.3f}; "
                f"with the bootstrap {b:.1%} of width {wide_b:.3f}",
                flush=True,
            )


def budgets(rounds: int) -> None:
    """A model that leaks nothing keeps a budget with a probability of 50%, 80%, 95%, says `passes_tpr`: does it?"""
    rng, missed = np.random.default_rng(0), []
    sides = {
        0.1: ((60, 60), (100, 100), (100, 300), (300, 100), (300, 300), (1000, 1000), (100, 2000), (2000, 200)),
        0.01: ((100, 100), (300, 300), (500, 500), (1000, 1000), (2000, 2000), (200, 2000), (2000, 200)),
        0.001: ((1000, 1000), (3000, 3000)),
    }
    for fpr, numbers in sides.items():
        for m, n in numbers:
            bounds = np.array([tpr_at_fpr(rng.random(m), rng.random(n), fpr).high for _ in range(rounds)])
            for said in (0.5, 0.8, 0.95):
                budget = brentq(lambda b, m=m, n=n, fpr=fpr, p=said: sizes.passes_tpr(b, fpr, m, n) - p, fpr, 1)
                passed = float(np.mean(bounds < budget))
                missed.append(said - passed)
                print(
                    f"TPR below {budget:.4f} at {fpr:.1%} FPR, {m} and {n}: {passed:.1%}, said {said:.0%}", flush=True
                )
    print(f"{len(missed)} cases: said too much by {np.mean(missed):.1%} in the mean, {max(missed):.1%} at most")


def cost(_: int) -> None:
    rng = np.random.default_rng(0)
    for m in (300, 2000):
        x, y, of = rng.normal(0.7, 1, m), rng.normal(size=m), owners(m, 2)
        labels, draws = [f"s{n}" for n in of], draw(of, of)
        for fpr in (0.1, 0.01):
            calls = {
                "independent": partial(tpr_at_fpr, x, y, fpr),
                "subjects as codes": partial(tpr_at_fpr, x, y, fpr, 0.95, of, of),
                "subjects as labels": partial(tpr_at_fpr, x, y, fpr, 0.95, labels, labels),
                "bootstrap": partial(tpr_over_subjects, x, y, fpr, draws),
            }
            taken = ", ".join(f"{name} {1e3 * seconds(call):.2f} ms" for name, call in calls.items())
            print(f"{m} and {m}, {fpr:.0%} FPR: {taken}", flush=True)


def covered(
    leak: Leak, fpr: float, numbers: tuple[int, int], rounds: int, records: int | str = 1, correlation: float = 0.0
) -> Floats:
    """Shares of rounds: holds the truth, lies above it, lies below; mean width; holds it by Clopper-Pearson."""
    rng, truth = np.random.default_rng(0), leak.truth(fpr)
    found = np.zeros(5)
    for _ in range(rounds):
        x, y, of_x, of_y = scored(rng, leak, numbers, records, correlation)
        one = tpr_at_fpr(x, y, fpr, 0.95, *((of_x, of_y) if records != 1 else ()))
        low, high = clopper_pearson(one.true_positives, one.members)
        found += truth in one, truth < one.low, truth > one.high, one.high - one.low, low <= truth <= high
    return found / rounds


def scored(
    rng: np.random.Generator, leak: Leak, numbers: tuple[int, int], records: int | str, correlation: float
) -> tuple[Floats, Floats, Codes, Codes]:
    """Scores of members and of non-members, and the subjects of either."""
    sides = []
    for N in numbers:
        of = owners(N, records)
        shared = rng.normal(size=1 + of[-1])[of] if records != 1 else 0.0
        sides.append((math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * rng.normal(size=N), of))
    (x, of_x), (y, of_y) = sides
    exposed = rng.random(1 + of_x[-1]) < leak.exposed
    x = np.where(exposed[of_x], 20.0 + x, leak.shift + leak.spread * x)
    return (*((np.ceil(s / STEP) if leak.steps else s) for s in (x, y)), of_x, of_y)


def owners(N: int, records: int | str) -> Codes:
    """The subject of each record."""
    if records == "one":
        return np.concatenate([np.zeros(3 * N // 10, np.int64), 1 + np.arange(N - 3 * N // 10) // 2])
    if isinstance(records, int):
        return np.arange(N) // records
    pattern = np.repeat(np.arange(39), [1] * 20 + [2] * 10 + [4] * 5 + [7] * 3 + [20])  # 20 records of every size
    return np.concatenate([pattern + 39 * n for n in range(N // len(pattern) + 1)])[:N]


def line(title: str, fpr: float, numbers: tuple[int, int], found: Floats) -> str:
    m, n = numbers
    held, above, below, width, known = found
    state = "indicative" if fpr * n < 10 - 1e-9 else ""
    return (
        f"{fpr:5.1%} FPR {m:5} {n:5} {title:13} {held:6.1%} (above {above:.1%}, below {below:.1%}), width {width:.3f}; "
        f"Clopper-Pearson {known:.1%} {state}"
    )


def seconds(call: Callable[[], object], rounds: int = 7) -> float:
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(5):
            call()
        taken.append((time.perf_counter() - start) / 5)
    return min(taken)


if __name__ == "__main__":
    main()
