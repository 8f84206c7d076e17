"""How often the bound of a canary audit exceeds the true ε, over simulated trainings that are exactly ε-private.

python benchmarks/canaries.py              a few minutes; docs/canaries.md quotes the last column
"""

from __future__ import annotations

import sys

import numpy as np

from imprint.canaries import Canary, Manifest, audit_canaries

CANARIES, LOUD, TEMPLATE = 200, 10.0, 30.0


def exceeded(epsilon: float, runs: int, dice: np.random.Generator) -> float:
    """Share of runs whose bound lies above ε: each coin is told by randomised response, as loudly as can be."""
    over = 0
    for _ in range(runs):
        coins = dice.random(CANARIES) < 0.5
        canaries = tuple(
            Canary(f"c{n}", ("digits", "rare")[n % 2], f"p{n // 2 % 2}", str(n), (1, 4)[n // 4 % 2], bool(coins[n]))
            for n in range(CANARIES)
        )
        kept = dice.random(CANARIES) < 1 / (1 + np.exp(-epsilon))
        gain = np.where(kept, coins, ~coins) * LOUD + dice.normal(0, 1, CANARIES)
        gain += np.array([TEMPLATE * (canary.prompt == "p1") for canary in canaries])
        proof = audit_canaries(Manifest(canaries, {}), -gain, np.zeros(CANARIES)).whole.proof
        over += proof is not None and proof.epsilon > epsilon
    return over / runs


def main(runs: int) -> None:
    dice = np.random.default_rng(0)
    for epsilon in (0.0, 0.5, 1.0, 2.0):
        print(f"epsilon {epsilon}: exceeded in {exceeded(epsilon, runs, dice):.1%} of {runs:,}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
