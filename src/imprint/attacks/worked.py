"""Two texts small enough to check by hand; every attack's docstring shows its numbers on them.

    text   logp target    logp reference   mean   std   zlib bytes
    "a"    -1, -2, -6     -3, -4, -8       -2     2     30
    "b"    -4             -4               -2     4     20

So L_t = (3, 4) and L_r = (5, 4): tuning helped "a" by two nats per token and left "b" alone.

    text   lower case   behind others   behind members   two neighbours' L   gradient   L at the base, epochs 1 and 2
    "a"    -4, -5, -9   -3, -1.5, -9    -1, -2, -6       5, 4                .5         5, 4, 3
    "b"    -4           -4              -5               4, 3                2          4, 4, 4

The tokens are 11, 12 and 13, and 14. In a corpus of five tokens, of 15 that there are, 11 occurs once and 0 four times.
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
LOWERCASE = _stats(-4, -5, -9, -4)
PREFIXED = _stats(-3, -1.5, -9, -4)
PREFIXED_MEMBERS = _stats(-1, -2, -6, -5)
NEIGHBOURS = np.array([[5.0, 4.0], [4.0, 3.0]])
GRADIENT_NORM = np.array([0.5, 2.0])
TRACE = np.array([[5.0, 4.0, 3.0], [4.0, 4.0, 4.0]])
TOKEN_COUNTS = np.bincount([11, 0, 0, 0, 0], minlength=15)
