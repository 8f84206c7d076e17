"""Which records a shadow model is tuned on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_STREAM = 0x5AD0
"""Keeps these draws apart from others of the same seed."""


def inside(roles: Sequence[str], groups: Sequence[str], seed: int, shadow: int) -> NDArray[np.bool_]:
    """[N] which of the scored records a shadow model is tuned on: half of members and non-members, whole groups.

    Shadow models 2j and 2j + 1 have the two halves of one division, so that each record is inside as often as outside
    (Carlini et al. 2022).

    Args:
        roles: [N] of each record.
        groups: [N] who owns it.
        seed: of the split.
        shadow: number of the shadow model.

    >>> roles, groups = ["member", "member", "nonmember", "nonmember", "validation"], ["a", "b", "c", "c", "d"]
    >>> [inside(roles, groups, 0, shadow).tolist() for shadow in (0, 1)]
    [[True, True, False, False, False], [False, False, True, True, False]]
    """
    pool = np.isin(roles, ("member", "nonmember"))
    names, of = np.unique(np.asarray(groups)[pool], return_inverse=True)
    of = of.reshape(-1)
    order = np.argsort(np.random.default_rng([seed, shadow // 2, _STREAM]).random(len(names)), kind="stable")
    sizes = np.bincount(of, minlength=len(names))[order]
    before = np.cumsum(sizes) - sizes
    first = np.zeros(len(names), bool)
    first[order] = before + sizes / 2 <= pool.sum() / 2
    found = np.zeros(len(pool), bool)
    found[pool] = first[of] == (shadow % 2 == 0)
    return found
