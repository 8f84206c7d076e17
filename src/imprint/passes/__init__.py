"""`PASSES`: evidence that needs more passes over a checkpoint, how each piece is made, kept and read again.

Reading needs no torch; what measures imports it when it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from imprint.passes import gradient, lowercase, neighbours, prefixed
from imprint.passes.bench import Bench, table_losses, table_norms
from imprint.passes.spec import EvidenceSpec
from imprint.store import table_stats

__all__ = ["PASSES", "Bench", "EvidenceSpec", "Pass"]


@dataclass(frozen=True)
class Pass:
    """A row of `PASSES`.

    Attributes:
        settings: `(spec, seed) -> document` of all that may change this piece beside the cell itself; plain JSON.
        measure: one row per record of the audit, in its order, its id first. Leaves the model as it was. Raises
            UsageError where the records or the model do not allow it, with the reason.
        read: what attacks receive (`attacks.evidence.EVIDENCE`), from such a table.
    """

    settings: Callable[[EvidenceSpec, int], dict[str, Any]]
    measure: Callable[[Bench], pa.Table]
    read: Callable[[pa.Table], Any]


def _nothing(spec: EvidenceSpec, seed: int) -> dict[str, Any]:
    return {}


PASSES: dict[str, Pass] = {
    "lowercase": Pass(_nothing, lowercase.measure, table_stats),
    "neighbours": Pass(neighbours.settings, neighbours.measure, table_losses),
    "prefixed": Pass(prefixed.settings, prefixed.measure_others, table_stats),
    "prefixed_members": Pass(prefixed.settings, prefixed.measure_members, table_stats),
    "gradient_norm": Pass(_nothing, gradient.measure, table_norms),
}
"""Name of the evidence → how it is made."""
