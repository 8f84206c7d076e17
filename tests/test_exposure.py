"""Exposure: ranks by hand, and a distribution function that is right where the library's ends."""

from __future__ import annotations

import doctest
import math
import sys

import numpy as np
import pytest
from scipy.special import log_ndtr
from scipy.stats import skewnorm

import imprint.measures.exposure  # noqa: F401
from imprint.errors import DataError, InvalidAudit
from imprint.measures import exposure, exposure_fitted
from imprint.measures.exposure import fit_skew_normal, log_cdf

module = sys.modules["imprint.measures.exposure"]  # the package has a function of this name


def naive_log_cdf(z, shape):
    """A sum over a fine grid, which begins where the density is e^−60 of that at z, in logarithms throughout."""

    def log_density(t):
        return math.log(2) - t**2 / 2 - math.log(2 * math.pi) / 2 + log_ndtr(shape * t)

    reach = 1.0
    while log_density(z) - log_density(z - reach) < 60:
        reach *= 1.5
    t = z - np.linspace(0, reach, 400_001)
    relative = np.exp(log_density(t) - log_density(z))
    area = (relative.sum() - (relative[0] + relative[-1]) / 2) * reach / 400_000
    return log_density(z) + math.log(area)


# ---- exact


def test_ranks_by_hand():
    losses = np.random.default_rng(0).permutation(np.arange(1024.0))
    assert exposure(losses, 0.0) == 10.0  # log2 1024 − log2 1
    assert exposure(losses, 1.0) == 9.0  # rank 2
    assert exposure(losses, 1023.0) == 0.0  # the last
    assert exposure(losses, 99.0) == pytest.approx(math.log2(1024 / 100))


def test_ties_count_against_the_canary():
    assert exposure(np.zeros(1024), 0.0) == 0.0
    assert exposure([1.0, 1.0, 2.0, 3.0], 1.0) == 1.0  # two are as low: rank 2 of 4
    assert exposure([1.0, 1.0, 1.0, 3.0], 3.0) == 0.0


def test_a_canary_is_on_average_exposed_by_chance():
    """Over all canaries of a space the mean is log2 n − log2(n!)/n, about log2 e."""
    losses = np.random.default_rng(0).normal(size=500)
    mean = np.mean([exposure(losses, loss) for loss in losses])
    assert mean == pytest.approx(math.log2(500) - math.lgamma(501) / math.log(2) / 500)


@pytest.mark.parametrize(
    ("losses", "canary", "sentence"),
    [
        ([1.0, math.nan, 2.0], 1.0, "1 of 3 candidates have a NaN loss"),
        ([1.0], 1.0, "at least 2 candidates: there are 1"),
        ([], 1.0, "at least 2 candidates: there are 0"),
        ([1.0, 2.0, 3.0], 1.0000001, "1.0000001 is not among those of its 3 candidates"),
        ([1.0, 2.0, 3.0], math.nan, "is not among"),
        ([[1.0, 2.0]], 1.0, r"a vector, not of shape \(1, 2\)"),
    ],
)
def test_what_cannot_be_ranked(losses, canary, sentence):
    with pytest.raises(DataError, match=sentence):
        exposure(losses, canary)


# ---- fitted


@pytest.mark.parametrize("shape", [-20.0, -2.0, 0.0, 0.5, 3.0, 30.0])
@pytest.mark.parametrize("z", [-40.0, -10.0, -5.0, -4.0, -1.0, -0.1])
def test_the_tail_equals_its_integral(z, shape):
    assert log_cdf(z, shape) == pytest.approx(naive_log_cdf(z, shape), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("z", [-1000.0, -40.0, -10.0, -3.0, 0.0, 2.0, 30.0])
def test_without_skew_it_is_the_normal(z):
    assert log_cdf(z, 0.0) == pytest.approx(float(log_ndtr(z)), rel=1e-9)


@pytest.mark.parametrize("shape", [-3.0, -1.0, 0.0, 2.0])
def test_it_equals_the_library_where_that_is_exact(shape):
    z = np.linspace(-1.5, 4, 23)
    found = [log_cdf(float(one), shape) for one in z]
    np.testing.assert_allclose(found, skewnorm.logcdf(z, shape), rtol=1e-7, atol=1e-12)


def test_the_ends():
    assert [log_cdf(z, 2.0) for z in (-math.inf, math.inf)] == [-math.inf, 0.0]
    assert math.isnan(log_cdf(math.nan, 2.0))


def test_far_canaries_are_told_apart():
    """At ten to forty deviations the probability underflows; its logarithm falls on, at least as a normal's would."""
    references = np.random.default_rng(0).normal(4, 0.5, 200)
    deviations = np.array([10.0, 20.0, 30.0, 40.0, 100.0])
    bits = exposure_fitted(references.mean() - deviations * references.std(), references)
    assert np.isfinite(bits).all()
    assert (np.diff(bits) > 50).all()
    # −log2 Φ(−k) is about k²/2/ln 2; the fitted skew moves the factor, and not its order.
    ratio = bits / (deviations**2 / 2 / math.log(2))
    assert ((ratio > 0.6) & (ratio < 1.6)).all()


@pytest.mark.parametrize("shape", [0.0, 3.0, -3.0])
def test_it_recovers_the_distribution(shape):
    """From 2,000 references the exposure three deviations below the mean is within a tenth."""
    truth = skewnorm(shape, loc=3, scale=0.4)
    references = truth.rvs(2000, random_state=np.random.default_rng(0))
    at = truth.mean() + truth.std() * np.array([0.0, -1.0, -2.0, -3.0])
    expected = -np.array([log_cdf((one - 3) / 0.4, shape) for one in at]) / math.log(2)
    np.testing.assert_allclose(exposure_fitted(at, references), expected, rtol=0.1)


def test_the_fit_has_no_better_neighbour():
    x = skewnorm(2.0).rvs(300, random_state=np.random.default_rng(1))
    found = fit_skew_normal(x)

    def cost(location, scale, shape):
        penalty = 0.875913 * math.log(1 + 0.856250 * shape**2)
        return penalty - skewnorm.logpdf(x, shape, location, scale).sum()

    for k in range(3):
        for step in (-0.02, 0.02):
            moved = list(found)
            moved[k] += step
            assert cost(*moved) > cost(*found)


def test_the_fit_stays_finite_where_maximum_likelihood_does_not():
    rng, worst = np.random.default_rng(5), 0.0
    for _ in range(20):
        references = skewnorm(3.0).rvs(25, random_state=rng)
        worst = max(worst, float(exposure_fitted(references.mean() - 3 * references.std(), references)))
    assert worst < 100  # the truth is 18 bits; scipy's own fit says 1e12 and more in a quarter of such samples


def test_units_do_not_matter():
    references = np.random.default_rng(0).gamma(9, 1, 60)
    bits = exposure_fitted([1.0, 5.0, 9.0], references)
    np.testing.assert_allclose(
        exposure_fitted(1000 + 1e-3 * np.array([1.0, 5, 9]), 1000 + 1e-3 * references), bits, 1e-3
    )


def test_shapes_and_odd_losses():
    references = np.random.default_rng(0).normal(size=40)
    bits = exposure_fitted([[0.0, np.nan], [np.inf, -np.inf]], references)
    assert bits.shape == (2, 2)
    assert bits[0, 0] == exposure_fitted(0.0, references)
    assert math.isnan(bits[0, 1])
    assert bits[1].tolist() == [0.0, np.inf]


@pytest.mark.parametrize(
    ("references", "error", "sentence"),
    [
        (np.arange(19.0), InvalidAudit, "at least 20 canaries that were not inserted: there are 19"),
        ([], InvalidAudit, "there are 0"),
        (np.full(30, 4.1), InvalidAudit, "all 30 references have the same loss"),
        (np.zeros(30), InvalidAudit, "all 30 references have the same loss"),
        ([*range(30), math.nan], DataError, "1 of 31 references have a NaN loss"),
        ([*range(30), math.inf], DataError, "1 of 31 references have an infinite loss"),
    ],
)
def test_references_that_cannot_be_fitted(references, error, sentence):
    with pytest.raises(error, match=sentence):
        exposure_fitted(1.0, references)


def test_doctests():
    assert doctest.testmod(module).failed == 0
