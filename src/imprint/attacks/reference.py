"""Attacks that compare the target with a reference model, by default the same base before tuning.

Higher = more likely a member. The doctests use the two texts of `imprint.attacks.worked`.
"""

from __future__ import annotations

import numpy as np

from imprint.types import Floats, TokenStats


def ref(target: TokenStats, reference: TokenStats) -> Floats:
    """Ref: L_r(x) − L_t(x), what tuning gained on the text. Carlini et al. 2021, Mireshghallah et al. 2022.

    Needs the target's and the reference's pass over the same tokens. Returns [N] scores in nats per token.

    >>> from imprint.attacks.worked import REFERENCE, TARGET
    >>> ref(TARGET, REFERENCE).tolist()
    [2.0, 0.0]
    """
    return reference.nll - target.nll


def ratio(target: TokenStats, reference: TokenStats) -> Floats:
    """Ratio: −L_t(x) / L_r(x), the share of the surprise that tuning left. Used as FLoRA's score, among others.

    −1 says that tuning changed nothing, 0 that it left no surprise at all. Where L_r = 0 the reference was
    already certain: the score is the limit −∞ if the target is not, and −1 ("nothing changed") if it is too.
    Needs the target's and the reference's pass over the same tokens. Returns [N] scores, without unit.

    >>> from imprint.attacks.worked import REFERENCE, TARGET
    >>> ratio(TARGET, REFERENCE).tolist()    # -3/5 and -4/4
    [-0.6, -1.0]
    """
    # log p can come out a rounding error above 0; a negative L_r would turn the sign of the score.
    L_t, L_r = np.maximum(target.nll, 0.0), np.maximum(reference.nll, 0.0)
    limit = np.where(L_t > 0, -np.inf, np.where(L_t == 0, -1.0, np.nan))
    return np.divide(-L_t, L_r, out=limit, where=L_r != 0)
