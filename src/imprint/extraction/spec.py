"""What is asked of an extraction: how much of a record is given, how much must come out, and how tokens are drawn."""

from __future__ import annotations

from pydantic import Field

from imprint.spec import Strict, content_key


class Scheme(Strict):
    """How a token is drawn from the model: logits over `temperature`, then the `top_k` cut, then the `top_p` cut."""

    temperature: float = Field(default=1.0, gt=0)
    """Logits are divided by this."""
    top_k: int | None = Field(default=None, ge=1)
    """Only so many most probable tokens may be drawn."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Only the fewest most probable tokens that together have this probability may be drawn."""


class ExtractionSpec(Scheme):
    """Discoverable extraction (Carlini et al. 2022) and its probabilistic form (Hayes et al. 2024)."""

    prefix: int = Field(default=50, ge=1)
    """Tokens that are given: at least so many, with a BOS as one of them; of a prompt all."""
    suffix: int = Field(default=50, ge=1)
    """Tokens that have to come out, directly after those given."""
    tries: int = Field(default=1000, ge=1)
    """Samples that an attacker draws for each record."""
    probability: float = Field(default=0.5, gt=0, lt=1)
    """A record counts as extractable if one of the samples is its suffix with at least this probability."""

    @property
    def scheme(self) -> Scheme:
        """How tokens are drawn."""
        return Scheme(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)

    @property
    def key(self) -> str:
        """Names what is measured with a model; `tries` and `probability` only read it."""
        return content_key(self.model_dump(exclude={"tries", "probability"}))
