"""The attack that watches a record over the epochs: what every run has measured anyway.

Higher = more likely a member. The doctest uses the two texts of `imprint.attacks.worked`.
"""

from __future__ import annotations

import numpy as np

from imprint.errors import UsageError
from imprint.types import Floats


def loss_trace(trace: Floats, low: float = 0.25, high: float = 0.75) -> Floats:
    """Loss trace: interquartile range of the record's loss over the epochs so far. Pollock et al. 2024.

    Made to rank members by how far they give themselves away (their LT-IQR): a record that the base found hard and
    tuning made easy has the widest range. It has no sign: a loss that rises as far scores the same, which records never
    tuned on do where a model overfits. Between epochs quantiles are linear. Needs [N, E + 1] losses in nats per token,
    the base first; at the base alone all scores are 0. Returns [N] scores in nats per token. Raises UsageError unless
    0 ≤ low < high ≤ 1.

    >>> from imprint.attacks.worked import TRACE
    >>> loss_trace(TRACE).tolist()    # of 5, 4, 3 the quartiles are 4.5 and 3.5
    [1.0, 0.0]
    """
    if not 0 <= low < high <= 1:
        raise UsageError(f"low and high are quantiles, 0 <= low < high <= 1, not {low} and {high}.")
    if trace.ndim != 2 or not trace.shape[1]:
        raise UsageError(f"trace must be [N, E + 1] losses, the base's first, not of shape {trace.shape}.")
    finite = np.where(np.isfinite(trace), trace, np.nan)  # a loss that diverged has no range
    lower, upper = np.quantile(finite, [low, high], axis=1)
    scores: Floats = upper - lower
    return scores
