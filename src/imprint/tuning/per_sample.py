"""The gradient of each record apart from the others', which differentially private training clips one by one.

Two ways. Together: records are padded to one batch, and hooks of Opacus on the layers that train tell whose gradient is
whose. They rely on the batch being the first dimension of whatever such a layer meets, which is not so everywhere:
experts meet tokens of all records in one row, and PEFT computes virtual tokens once for a whole batch (here they are
computed once for each record). Alone: one record after another through the pass that trains without privacy.

A gradient that is another record's, or a sum over records, would make the guarantee false and show nowhere. So before
anything is trained a way must give, for probes of several lengths, what plain autograd gives for each by itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, PeftType
from torch import nn

from imprint.data.tokens import Encoded
from imprint.data.tokens import batches as budgeted
from imprint.engine.clock import Clock
from imprint.engine.forward import Forward, padded_hidden
from imprint.errors import ImprintError
from imprint.tuning.adapter_config import KINDS
from imprint.tuning.models import autocast, base_of, only_head_trains, trainable, training_mode
from imprint.tuning.train import backward

Passes = Callable[[Sequence[Encoded]], Iterator[tuple[list[int], float]]]
"""Records → pass by pass: which of them went through it, the sum of their losses; meanwhile each trained parameter's
`grad_sample` [B, …] holds the gradients of their mean losses."""
Way = Callable[[nn.Module, Forward, int, Clock], AbstractContextManager[Passes]]
"""(model, its forward, tokens of a pass, clock) → passes."""

BROKEN = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What hooks may raise where a layer is not what they take it for."""
GRADIENTS = {"cpu": 1 << 26, "cuda": 1 << 29}
"""Numbers that the gradients of a pass may have, all records together."""


@contextmanager
def alone(model: nn.Module, forward: Forward, budget: int, clock: Clock) -> Iterator[Passes]:
    """One record a pass, by `forward`: right for everything that trains."""
    parameters: list[Any] = list(trainable(model).values())

    def passes(records: Sequence[Encoded]) -> Iterator[tuple[list[int], float]]:
        for n, record in enumerate(records):
            for parameter in parameters:
                parameter.grad = None
            [loss] = backward(forward, [[record]], budget, clock)
            for parameter in parameters:
                found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad_sample = found[None]
            yield [n], loss

    yield passes


@contextmanager
def together(model: nn.Module, forward: Forward, budget: int, clock: Clock) -> Iterator[Passes]:
    """As many records a pass as the budget and the memory for their gradients allow, by Opacus' hooks."""
    from opacus import GradSampleModule

    numbers = sum(parameter.numel() for parameter in trainable(model).values())
    device = next(model.parameters()).device
    room = max(1, GRADIENTS.get(device.type, 1 << 26) // numbers)
    hidden_of = padded_hidden(model)

    def passes(records: Sequence[Encoded]) -> Iterator[tuple[list[int], float]]:
        for group in budgeted([len(record) for record in records], budget):
            for some in (group[n : n + room] for n in range(0, len(group), room)):
                yield some, one_pass([records[n] for n in some])

    def one_pass(records: list[Encoded]) -> float:
        sizes = torch.tensor([len(record.predictors) for record in records])
        with clock("forward"):
            hidden, targets = hidden_of([records])
        with clock("output"):
            weights = torch.repeat_interleave(1 / sizes, sizes).to(hidden.device)
            hooks.disable_hooks()  # where the output layer is the model's own code, that runs the whole model
            nll, gradient = forward.output.loss_and_gradient(hidden, targets, weights)
            hooks.enable_hooks()
        with clock("backward"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's: nothing below the first layers that train asks for a gradient
            hidden.backward(gradient)  # type: ignore[no-untyped-call]
        return float(nll.sum())

    hooks = GradSampleModule(model, loss_reduction="sum")
    try:
        with prompts_apart(model):
            yield passes
    finally:
        hooks.to_standard_module()


@contextmanager
def prompts_apart(model: nn.Module) -> Iterator[None]:
    """PEFT computes virtual tokens once and repeats them: their gradient is then one of all records together."""
    if not isinstance(model, PeftModel) or not model.active_peft_config.is_prompt_learning:
        yield
        return
    if model.active_peft_config.peft_type == PeftType.PREFIX_TUNING:  # PEFT's own are computed for each record
        yield
        return
    encoder, tokens_P = model.prompt_encoder[model.active_adapter], model.prompt_tokens[model.active_adapter]

    def get_prompt(batch_size: int, *_: Any, **__: Any) -> torch.Tensor:
        tokens = tokens_P.to(encoder.embedding.weight.device)
        return encoder(tokens[None].expand(batch_size, -1))  # type: ignore[no-any-return]

    model.get_prompt = get_prompt
    try:
        yield
    finally:
        del model.get_prompt


def way_for(model: nn.Module, forward: Forward, records: Sequence[Encoded], budget: int) -> Way:
    """The quickest way that gives the right gradients.

    Args:
        records: those that will be trained on.
        budget: tokens of a pass.

    Raises:
        ImprintError: neither does; what trains, and the first parameter whose gradient is wrong, are named.
    """
    if isinstance(model, PeftModel):
        try:
            check(model, forward, records, budget, together)
            return together
        except (ImprintError, *BROKEN):  # experts, or an architecture that puts all tokens in one row
            pass
    check(model, forward, records, budget, alone)
    return alone


def check(model: nn.Module, forward: Forward, records: Sequence[Encoded], budget: int, way: Way) -> None:
    """A way's gradients of a short, a middling and a long record must be those of plain autograd, one at a time.

    Plain autograd goes through the model as it is, PEFT's own virtual tokens included. Nothing is changed.

    Raises:
        ImprintError: they differ by more than rounding.
    """
    parameters, some = trainable(model), _some(records, budget)
    training_mode(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    clock = Clock(next(model.parameters()).device)
    with _nothing_zero(parameters.values()):
        wanted = [_plain(model, record, parameters.values()) for record in some]
        try:
            with way(model, forward, max(budget, sum(map(len, some)) * len(some)), clock) as passes:
                for which, _ in passes(some):
                    _compare(model, parameters, [wanted[n] for n in which])
                    forget(parameters.values())
        finally:
            forget(parameters.values())


def forget(parameters: Iterable[nn.Parameter]) -> None:
    """All gradients of a pass."""
    for parameter in parameters:
        parameter.grad = parameter.grad_sample = None  # type: ignore[attr-defined]


def _some(records: Sequence[Encoded], budget: int) -> list[Encoded]:
    """The shortest, the middling and the longest of the records that fit a pass three at a time."""
    ordered = sorted(records, key=len)
    fit = [record for record in ordered if 3 * len(record) <= budget] or ordered[:3]
    return [fit[n] for n in sorted({0, len(fit) // 2, len(fit) - 1})]


@contextmanager
def _nothing_zero(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """LoRA starts with B = 0, where A has no gradient that could be wrong."""
    generator = torch.Generator().manual_seed(0)
    zero = [parameter for parameter in parameters if not parameter.any()]
    with torch.no_grad():
        for parameter in zero:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in zero:
                parameter.zero_()


def _plain(model: nn.Module, record: Encoded, parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    """Gradients of the mean loss of one text alone, by its logits."""
    ids = torch.from_numpy(record.ids).long().to(next(model.parameters()).device)
    places = torch.from_numpy(record.predictors).to(ids.device)
    with autocast(model):
        logits = model(input_ids=ids[None], use_cache=False).logits[0, -len(ids) :].float()
    loss = F.cross_entropy(logits[places.to(logits.device)], ids[places + 1].to(logits.device))
    return list(torch.autograd.grad(loss, list(parameters), allow_unused=True, materialize_grads=True))


def _compare(model: nn.Module, parameters: Mapping[str, Any], wanted: Sequence[Sequence[torch.Tensor]]) -> None:
    """Parameter by parameter, relative to its gradient; of one that hardly counts, to a hundredth of the whole."""
    rounding = 0.25 if base_of(model).config.dtype in (torch.float16, torch.bfloat16) else 1e-3
    whole = [float(sum(one.double().square().sum().cpu() for one in gradients) ** 0.5) for gradients in wanted]
    for n, (name, parameter) in enumerate(parameters.items()):
        found, right = parameter.grad_sample, torch.stack([gradients[n] for gradients in wanted])
        if not isinstance(found, torch.Tensor) or found.shape != right.shape:
            raise _refused(model, f"the gradient of {name} is not apart for each record")
        gaps, sizes = (one.flatten(1).norm(dim=1).tolist() for one in (found - right, right))
        for gap, size, all_of_it in zip(gaps, sizes, whole, strict=True):
            if not gap <= rounding * max(size, 0.01 * all_of_it):
                raise _refused(
                    model, f"the gradient of {name} is not each record's own (off by {gap:.2g} of {size:.2g})"
                )


def _refused(model: nn.Module, why: str) -> ImprintError:
    kind = "head" if only_head_trains(model) else "full"
    if isinstance(model, PeftModel):
        kind = KINDS[model.active_peft_config.peft_type.value]
    return ImprintError(
        f"train.dp: {kind} cannot be trained with differential privacy on {type(base_of(model)).__name__}: {why}, so "
        "nothing was trained; use another method or model"
    )
