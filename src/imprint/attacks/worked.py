"""Two texts small enough to check by hand; every attack's docstring shows its numbers on them.

    text   logp target    logp reference   mean   std   zlib bytes
    "a"    -1, -2, -6     -3, -4, -8       -2     2     30
    "b"    -4             -4               -2     4     20

So L_t = (3, 4) and L_r = (5, 4): tuning helped "a" by two nats per token and left "b" alone.
"""

from __future__ import annotations

import numpy as np

from imprint.types import TokenStats


def _stats(*logp: float) -> TokenStats:
    return TokenStats(
        ids=np.array(["a", "b"]),
        offsets=np.array([0, 3, 4]),
        tokens=np.array([11, 12, 13, 14], np.int32),
        logp=np.array(logp, np.float32),
        mean=np.full(4, -2, np.float32),
        std=np.array([2, 2, 2, 4], np.float32),
        top=np.zeros(4, np.bool_),
    )


TARGET = _stats(-1, -2, -6, -4)
REFERENCE = _stats(-3, -4, -8, -4)
ZLIB_BYTES = np.array([30, 20])
