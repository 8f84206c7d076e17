"""Validity gates: what must hold before the numbers of an audit are evidence of memorization."""

from imprint.gates.blind import blind_scores
from imprint.gates.judge import (
    Gate,
    base_control,
    blind_baseline,
    direction,
    missing,
    overlap_gate,
    positive_control,
    power,
    withheld,
)
from imprint.gates.overlap import Overlap, overlap

__all__ = [
    "Gate",
    "Overlap",
    "base_control",
    "blind_baseline",
    "blind_scores",
    "direction",
    "missing",
    "overlap",
    "overlap_gate",
    "positive_control",
    "power",
    "withheld",
]
