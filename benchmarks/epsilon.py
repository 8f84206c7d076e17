"""How often the bound of one run exceeds the true ε, where the mechanism and so its ε is known: 5% at most is allowed.

    OMP_NUM_THREADS=1 python benchmarks/epsilon.py [--rounds 2000]

A mechanism turns the coins of m canaries into scores, each canary by itself:

- response: tells a coin rightly with probability 1/(1 + e^−ε), else wrongly; all scores are 0 or 1, so that most tie.
- leaky response: with probability δ tells the coin for certain, with a score above all others; else a response.
- Laplace: the coin with noise of scale 1/ε.
- Gaussian: the coin with the least noise that is (ε, δ)-private (Balle and Wang 2018).
- broken: a response that with probability δ tells all coins at once, the worst for the term of δ.

Prints the share of rounds in which the bound exceeds ε, the mean bound and the ceiling: with a number of guesses fixed
in advance, and with the numbers of `SHARES`, corrected. For a response with few enough guesses that all are of coins
told alike, the number of right ones is binomial, and the share that is expected stands beside the one found.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import bdtrc, expit, ndtr

from imprint.measures.epsilon import one_run_audit, one_run_epsilon
from imprint.types import Floats

Mechanism = Callable[[NDArray[np.bool_], float, float, np.random.Generator], Floats]
"""Coins [m], ε, δ, generator to scores [m]."""


def response(coins: NDArray[np.bool_], epsilon: float, delta: float, rng: np.random.Generator) -> Floats:
    return np.where(rng.random(len(coins)) < expit(epsilon), coins, ~coins).astype(float)


def leaky(coins: NDArray[np.bool_], epsilon: float, delta: float, rng: np.random.Generator) -> Floats:
    certain = rng.random(len(coins)) < delta
    return np.where(certain, 3.0 * coins - 1, response(coins, epsilon, delta, rng))


def laplace(coins: NDArray[np.bool_], epsilon: float, delta: float, rng: np.random.Generator) -> Floats:
    return coins + rng.laplace(0, 1 / epsilon, len(coins))


def gaussian(coins: NDArray[np.bool_], epsilon: float, delta: float, rng: np.random.Generator) -> Floats:
    return coins + rng.normal(0, noise(epsilon, delta), len(coins))


def broken(coins: NDArray[np.bool_], epsilon: float, delta: float, rng: np.random.Generator) -> Floats:
    return coins.astype(float) if rng.random() < delta else response(coins, epsilon, delta, rng)


def noise(epsilon: float, delta: float) -> float:
    """The least standard deviation on a sensitivity of 1: Φ(1/2σ − εσ) − e^ε Φ(−1/2σ − εσ) = δ."""

    def excess(sigma: float) -> float:
        a, b = 1 / (2 * sigma), epsilon * sigma
        return float(ndtr(a - b) - math.exp(epsilon) * ndtr(-a - b)) - delta

    return float(brentq(excess, 1e-2, 1e3))


CASES: tuple[tuple[str, Mechanism, float], ...] = (
    ("response", response, 0.0),
    ("Laplace", laplace, 0.0),
    ("leaky response", leaky, 1e-3),
    ("leaky response", leaky, 1e-2),
    ("broken response", broken, 1e-2),
    ("Gaussian", gaussian, 1e-5),
    ("Gaussian", gaussian, 1e-3),
)
CANARIES = (100, 1000)
EPSILONS = (0.5, 1.0, 2.0, 4.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2000)
    rounds, worst = parser.parse_args().rounds, {"fixed": 0.0, "corrected": 0.0}
    for title, mechanism, delta in CASES:
        for m in CANARIES:
            for epsilon in EPSILONS:
                for name, guesses in (("fixed", m // 5), ("fixed", m), ("corrected", None)):
                    over, mean, ceiling = audited(mechanism, epsilon, delta, m, guesses, rounds)
                    worst[name] = max(worst[name], over)
                    known = (
                        f" ({level(m, guesses, epsilon):.2%} expected)"
                        if mechanism is response and guesses == m // 5
                        else ""
                    )
                    case = f"{title:15} δ {delta:<6g} ε {epsilon:3} m {m:4} r {guesses or name!s:9}"
                    print(f"{case} exceeds {over:5.2%}{known}, mean {mean:.2f}, ceiling {ceiling:.2f}", flush=True)
    print("at most: " + ", ".join(f"{name} {share:.2%}" for name, share in worst.items()))


def level(m: int, guesses: int, epsilon: float) -> float:
    """The probability that a bound from binomial guesses exceeds ε."""
    over = [v for v in range(guesses + 1) if one_run_epsilon(m, guesses, v) > epsilon]
    return float(bdtrc(over[0] - 1, guesses, expit(epsilon))) if over else 0.0


def audited(
    mechanism: Mechanism, epsilon: float, delta: float, m: int, guesses: int | None, rounds: int
) -> tuple[float, float, float]:
    """Share of rounds in which the bound exceeds ε, the mean bound, the ceiling."""
    rng, bounds, ceiling = np.random.default_rng(0), [], 0.0
    for _ in range(rounds):
        coins = rng.random(m) < 0.5
        found = one_run_audit(mechanism(coins, epsilon, delta, rng), coins, guesses, delta)
        bounds.append(found.epsilon)
        ceiling = found.ceiling
    return float(np.mean(np.array(bounds) > epsilon)), float(np.mean(bounds)), ceiling


if __name__ == "__main__":
    main()
