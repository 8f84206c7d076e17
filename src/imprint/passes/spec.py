"""How the evidence that needs more passes is made."""

from __future__ import annotations

from pydantic import Field

from imprint.spec import Strict


class EvidenceSpec(Strict):
    """How the evidence is made that needs more passes over a checkpoint."""

    neighbours: int = Field(default=25, ge=1)
    """Texts per record that differ from it in one word, for `neighbourhood` (Mattern et al. 2023)."""
    masked_model: str | None = None
    """Masked language model that proposes those words, a Hub id or a local folder (default: none; tokens are drawn as
    often as they occur in the records that nobody is tuned or evaluated on, or evenly where there are none)."""
    shots: int = Field(default=7, ge=1)
    """Texts put in front of each record, for `recall` and `con_recall` (Xie et al. 2024); fewer where the model's
    context holds no more."""
