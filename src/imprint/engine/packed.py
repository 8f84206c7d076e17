"""One pass over the packed records of one or several runs on the same frozen base.

Virtual tokens (Li & Liang 2021; Lester et al. 2021; Liu et al. 2021) are computed once for all texts of a pass, and
once a checkpoint when scoring: a prefix is keys and values already; those of a prompt come from one pass over it alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel, PeftType
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from imprint.data.tokens import Encoded
from imprint.engine.attention import packed
from imprint.engine.layout import Layout, Shared, layout
from imprint.engine.memory import recomputed
from imprint.engine.products import FAST, LowRank, Updates, engaged, exchanges, merged
from imprint.tuning.models import autocast, base_of, before_head
from imprint.tuning.virtual import cache_pairs


@dataclass(frozen=True)
class Checkpoint:
    """What is the same for all texts while the weights stay as they are.

    Attributes:
        shared: per run the keys and values that stand in front of its texts.
        merged: matrices with the LoRA update added.
    """

    shared: Sequence[Shared | None]
    merged: Mapping[nn.Module, torch.Tensor]


class PackedRuns:
    """Tuned models that share their base's weights; the first one's modules do the work, with the updates of all."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        """
        Raises:
            ValueError: several models, and one of them has an adapter that only its own modules can compute.
        """
        self.models, self.host = list(models), base_of(models[0])
        self.kinds = [_kind(model) for model in models]
        found = [low_rank_updates(model) for model in models]
        self.alone = any(updates is None for updates in found)
        """Whether an adapter needs modules of its own, so that its run can share passes with no other."""
        if self.alone and len(models) > 1:
            raise ValueError("an adapter needs modules of its own: its run goes alone")
        self.of: dict[nn.Module, list[LowRank | None]] = {}
        for path in sorted({path for updates in found for path in updates or ()}):
            self.of[_plain(self.host, path)] = [(updates or {}).get(path) for updates in found]
        self.exchanged = exchanges(self.host, set(self.of))
        if self.of:
            self.exchanged += [(module, _Through) for module in self.host.modules() if type(module) is Linear]
        self.recompute: Sequence[nn.Module] = ()
        """Blocks whose inner activations are computed again in the backward pass instead of kept."""

    def hidden(
        self, asked: Sequence[Sequence[Encoded]], ready: Checkpoint | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """([R, D], [R]) of each run's records, run after run, record after record.

        Args:
            asked: per run its records; a run may have none.
            ready: what all texts share, where it has been computed already.
        """
        device = next(self.host.parameters()).device
        checkpoint = ready or Checkpoint([self._prefix(run) for run in range(len(self.models))], {})
        shared = checkpoint.shared
        prompts = [self._prompt(run) if shared[run] is None else None for run in range(len(self.models))]
        ordered = [sorted(records, key=len, reverse=True) for records in asked]
        row = layout(
            [
                ([len(record) for record in records], 0 if prompt is None else prompt.shape[1], keys)
                for records, prompt, keys in zip(ordered, prompts, shared, strict=True)
            ],
            self.host.config.get_text_config().hidden_size,
            device,
        )
        ids = [torch.from_numpy(np.concatenate([record.ids for record in records])) for records in ordered if records]
        states = self._states(row, [part.long().to(device) for part in ids], prompts, checkpoint.merged)
        return states[_picked(asked, ordered, row).to(device)], targets(asked).to(device)

    def _states(
        self,
        row: Layout,
        ids: Sequence[torch.Tensor],
        prompts: Sequence[torch.Tensor | None],
        weights: Mapping[nn.Module, torch.Tensor],
    ) -> torch.Tensor:
        """[N, D] before the output layer."""
        inputs: dict[str, torch.Tensor] = {"position_ids": row.position_ids[None]}
        filling = len(row.position_ids) - sum(map(len, ids)) - sum(end - begin for begin, end in row.prompts)
        with self._at_work(row, weights):
            if all(prompt is None for prompt in prompts):
                inputs["input_ids"] = F.pad(torch.cat(list(ids)), (0, filling))[None]
            else:
                embed, texts, parts = self.host.get_input_embeddings(), iter(ids), []
                for prompt, has_texts in zip(prompts, row.has_texts, strict=True):
                    parts += [] if prompt is None else [prompt[0]]
                    parts += [embed(next(texts))] if has_texts else []
                row_ND = torch.cat([part.to(embed.weight.dtype) for part in parts])
                inputs["inputs_embeds"] = F.pad(row_ND, (0, 0, 0, filling))[None]
            return before_head(self.host, **inputs)[0]

    @contextmanager
    def _at_work(self, row: Layout, weights: Mapping[nn.Module, torch.Tensor]) -> Iterator[None]:
        """Fast modules, packed attention, mixed precision, and activations kept or computed again."""

        @contextmanager
        def inside() -> Iterator[None]:
            with (
                engaged(self.exchanged, Updates(row.spans, self.of, weights)),
                packed(self.host.config, row),
                autocast(self.host),
            ):
                yield

        with inside(), recomputed(self.recompute if torch.is_grad_enabled() else (), inside):
            yield

    def _prefix(self, run: int) -> Shared | None:
        if self.kinds[run] != "prefix":
            return None
        return dict(enumerate(cache_pairs(self.models[run].get_prompt(batch_size=1))))  # type: ignore[operator]

    def _prompt(self, run: int) -> torch.Tensor | None:
        """[1, P, D] embeddings."""
        return self.models[run].get_prompt(batch_size=1) if self.kinds[run] == "prompt" else None  # type: ignore[operator]

    @torch.no_grad()
    def checkpoint(self) -> Checkpoint:
        """What the texts of each run share, as the weights are now."""
        shared = [self._prefix(run) or self._from_prompt(run) for run in range(len(self.models))]
        return Checkpoint(shared, merged(self.of) if len(self.models) == 1 else {})

    def _from_prompt(self, run: int) -> Shared | None:
        prompt = self._prompt(run)
        if prompt is None:
            return None
        lengths: list[tuple[list[int], int, None]] = [
            ([], prompt.shape[1] if other == run else 0, None) for other in range(len(self.models))
        ]
        row = layout(lengths, prompt.shape[-1], prompt.device)
        row.kept = {}
        self._states(row, [], [prompt if other == run else None for other in range(len(self.models))], {})
        begin, end = row.prompts[run]  # without the filling
        return {layer: (k[:, :, begin:end], v[:, :, begin:end]) for layer, (k, v) in row.kept.items()}


class _Through(Linear):  # type: ignore[misc]
    """A LoRA layer while its base matrix adds the update itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x)  # type: ignore[no-any-return]


def _kind(model: nn.Module) -> str:
    if not isinstance(model, PeftModel) or not model.active_peft_config.is_prompt_learning:
        return ""
    return "prefix" if model.active_peft_config.peft_type == PeftType.PREFIX_TUNING else "prompt"


def low_rank_updates(model: nn.Module) -> dict[str, LowRank] | None:
    """path → update of every adapted matrix; None where an adapter is anything but plain LoRA on plain matrices."""
    updates = {}
    for path, module in base_of(model).named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if type(module) is not Linear or not _is_plain(module):
            return None
        [name] = module.active_adapters
        updates[path] = LowRank(module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])
    return updates


def _is_plain(module: Any) -> bool:
    if (
        len(module.active_adapters) != 1
        or module.merged
        or module.disable_adapters
        or type(module.base_layer) not in FAST
        or "forward" in vars(module.base_layer)  # spread over devices: its own class's way is not the one it goes
    ):
        return False
    [name] = module.active_adapters
    special = getattr(module, "lora_variant", {}).get(name) or getattr(module, "lora_bias", {}).get(name)
    return name in module.lora_A and isinstance(module.lora_dropout[name], nn.Identity) and not special


def _plain(host: nn.Module, path: str) -> nn.Module:
    """The matrix at `path`, whether or not the host itself has an adapter there."""
    module = host.get_submodule(path)
    return getattr(module, "base_layer", module)


def _picked(asked: Sequence[Sequence[Encoded]], ordered: Sequence[Sequence[Encoded]], row: Layout) -> torch.Tensor:
    """[R] where in the row the states lie that predict the scored tokens."""
    places = []
    for records, sorted_records, (_, begin) in zip(asked, ordered, row.prompts, strict=True):
        start, starts = begin, {}
        for record in sorted_records:
            starts[id(record)] = start
            start += len(record)
        places += [starts[id(record)] + record.predictors for record in records]
    return torch.from_numpy(np.concatenate(places) if places else np.zeros(0, np.int64))


def targets(asked: Sequence[Sequence[Encoded]]) -> torch.Tensor:
    ids = [record.ids[record.scored] for records in asked for record in records]
    return torch.from_numpy(np.concatenate(ids) if ids else np.zeros(0, np.int32)).long()
