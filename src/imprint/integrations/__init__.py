"""`LeakageCallback` where a training is described in a file: the key `imprint` and what it holds."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from imprint.spec import Strict


class Keys(Strict):
    """The key `imprint` of a training's configuration: arguments of `LeakageCallback`, for which see there."""

    members: str | None = None
    """Records that are trained on: a file (default: what the trainer trains on)."""
    nonmembers: str | None = None
    """Records that are like them and not trained on: a file (default: what the trainer evaluates on)."""
    attacks: list[str] | None = None
    """Names (default: all)."""
    every: Literal["epoch", "save"] = "epoch"
    """When a checkpoint is audited."""
    out: str | None = None
    """Output folder (default: beside the trainer's, with `-leakage` behind its name)."""
    budget: dict[str, Any] | str | None = None
    """Limits that an upper bound has to stay below, as in `{auc: 0.6}`."""
    stop: bool = False
    """Whether training stops once it does not."""
    reference: str | None = None
    """A model to compare with (default: the model as it was before training)."""
    data: dict[str, Any] | None = None
    """Keys of a recipe's `data`."""
    id_key: str | None = None
    """File with the key that hides ids (default: beside the output folder)."""
    token_budget: int | None = Field(default=None, ge=1)
    """Tokens of one forward pass."""
    seed: int = Field(default=0, ge=0)
    """Draws records where there are more than are scored."""
    device: str = "auto"
    """Where saved checkpoints are scored if the model in training lies in pieces."""

    def arguments(self) -> dict[str, Any]:
        """For `LeakageCallback`."""
        return self.model_dump(mode="json", exclude_none=True)  # plain, whatever kind of mapping it came from
