"""Models in memory: the base below an adapter, copies that compute by their own class, and leaving no trace."""

from __future__ import annotations

import random
from functools import wraps
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import imprint
from imprint.auditing.live import (
    adds_something,
    alters_base,
    base_trains,
    located,
    method_of,
    plain_copy,
    pristine,
    tunable,
    undisturbed,
    weights_fingerprint,
)
from imprint.auditing.memory import score_live
from imprint.data.tokens import Encoded
from imprint.errors import UsageError
from imprint.spec import MethodSpec
from imprint.tuning.base import Base
from imprint.tuning.methods import resolve_method

TEXT = torch.tensor([[5, 17, 99, 3, 42, 8, 200]])
# peft remarks on tied embeddings, in some versions also where nothing is tied
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")

CONFIGS = {
    "lora": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.3),
    "lora, dora": LoraConfig(r=4, target_modules=["q_proj"], use_dora=True),
    "lora, head trained whole": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "lora, new tokens": LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 17]),
    "lora on the embedding": LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prompt": PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "p_tuning": PromptEncoderConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "prefix": PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def adapted(folder: Path, name: str) -> PeftModel:
    """An adapter whose every number is random, so that it changes what the model says."""
    torch.manual_seed(0)
    model = get_peft_model(loaded(folder), CONFIGS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=TEXT, attention_mask=torch.ones_like(TEXT), use_cache=False).logits
    return found[:, -TEXT.shape[1] :]


def patch(model: Any) -> None:
    """As trainers do: a forward of the instance, which calls the one that was there."""
    former = model.forward

    @wraps(type(model).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return former(*args, **kwargs)

    model.forward = MethodType(forward, model)


@pytest.mark.parametrize("name", CONFIGS)
def test_below_an_adapter_is_the_model_that_it_was_put_on(llama: Path, name: str) -> None:
    model = adapted(llama, name)
    model.train()
    patch(model.get_base_model())  # TRL
    patch(model)  # Accelerate, in mixed precision
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    want = logits(loaded(llama).eval())
    torch.testing.assert_close(logits(pristine(model)), want)
    model.eval()
    assert (logits(model) - want).abs().max() > 0.01  # the adapter does something, and is still on
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_a_merged_adapter_cannot_be_taken_off(llama: Path) -> None:
    model = adapted(llama, "lora")
    model.merge_adapter()
    with pytest.raises(UsageError, match="merged into the model: unmerge it, or name the base as `reference`"):
        pristine(model)


STARTS = {  # how an adapter begins, whether the model then says what it said without it, what is said of its base
    "plain": ({}, False, ""),
    "gaussian": ({"init_lora_weights": "gaussian"}, False, ""),
    "dora": ({"use_dora": True}, False, ""),
    "not zero": ({"init_lora_weights": False}, True, ""),
    "pissa": ({"init_lora_weights": "pissa"}, True, "init_lora_weights='pissa' takes a part out of the base's weights"),
    "pissa, quick": ({"init_lora_weights": "pissa_niter_4"}, True, "init_lora_weights='pissa_niter_4' takes a part"),
    "olora": ({"init_lora_weights": "olora"}, True, "init_lora_weights='olora' takes a part"),
    "biases": ({"bias": "lora_only"}, False, "bias='lora_only' trains biases of the base"),
}


@pytest.mark.parametrize("name", STARTS)
def test_it_is_known_what_a_start_does_to_the_base(llama: Path, name: str) -> None:
    options, adds, why = STARTS[name]
    torch.manual_seed(0)
    model = get_peft_model(loaded(llama), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **options)).eval()
    below, now, want = logits(pristine(model)), logits(model), logits(loaded(llama).eval())
    assert adds_something(model) is adds is not torch.allclose(below, now, atol=1e-4)
    assert alters_base(model).startswith(why)
    assert bool(alters_base(model)) is bool(why)
    assert torch.allclose(below, want, atol=1e-4) or why.startswith("init")  # what is lost, and only that, is named
    assert model.get_base_model().peft_config  # still there


def test_of_virtual_tokens_nothing_is_known(llama: Path) -> None:
    assert not adds_something(adapted(llama, "prompt"))
    assert alters_base(adapted(llama, "prefix")) == ""


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("prompt", "p_tuning", "prefix")])
def test_on_a_model_with_its_adapter_another_one_can_be_tuned(llama: Path, name: str) -> None:
    model = adapted(llama, name).eval()
    want = logits(model)
    copied = tunable(model)
    torch.testing.assert_close(logits(copied), want)
    assert weights_fingerprint(copied) != weights_fingerprint(pristine(model))
    lora = resolve_method(MethodSpec(name="lora", options={"rank": 4}), 32, None)
    tuned = Base.around(copied, located(copied), "float32").tuned(lora, 0)
    tuned.eval()
    torch.testing.assert_close(logits(tuned), want)  # it begins where the model is
    tuned(input_ids=TEXT).logits.square().mean().backward()
    trains = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    assert any(parameter.grad.abs().max() > 0 for parameter in trains)
    with torch.no_grad():
        for parameter in trains:
            parameter.add_(0.5)
    assert (logits(tuned) - want).abs().max() > 0.01
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(logits(model), want)


class Seen(Exception):
    pass


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"), "init_lora_weights='pissa' takes"),
        (LoraConfig(r=4, target_modules=["q_proj"], bias="all"), "bias='all' trains biases of the base"),
        (CONFIGS["lora"], "weights of the base are trained beside"),
    ],
)
def test_in_memory_a_base_that_is_lost_has_to_be_named(llama: Path, config: Any, why: str) -> None:
    model, words = get_peft_model(loaded(llama), config), AutoTokenizer.from_pretrained(llama)
    if config is CONFIGS["lora"]:
        model.get_base_model().model.norm.requires_grad_(True)
    sides = [[f"{side} {n}" for n in range(20)] for side in ("one", "other")]

    def seen(*_: Any) -> None:
        raise Seen

    with pytest.raises(UsageError, match=rf"not the one that it was put on \({why}.*\): name the base as `reference`"):
        imprint.audit(model, words, *sides, preflight=seen)
    with pytest.raises(Seen):
        imprint.audit(model, words, *sides, reference=loaded(llama), preflight=seen)


def test_a_copy_has_modules_of_its_own_around_the_same_weights(gpt2: Path) -> None:
    model = loaded(gpt2).train()
    calls: list[int] = []
    former = model.transformer.forward
    model.transformer.forward = lambda *args, **kwargs: calls.append(1) or former(*args, **kwargs)
    patch(model)
    copied = plain_copy(model)
    assert "forward" not in vars(copied)
    assert "forward" in vars(model)
    ours, theirs = dict(copied.named_parameters()), dict(model.named_parameters())
    assert all(ours[name] is theirs[name] for name in theirs)
    assert not any(module.training for module in copied.modules())
    assert model.training
    assert copied.config is not model.config
    with torch.no_grad():
        model.lm_head.weight[0] += 1.0
    assert torch.equal(copied.lm_head.weight, model.lm_head.weight)


def test_a_copy_of_a_model_with_accelerate_hooks_keeps_them(gpt2: Path) -> None:
    from accelerate import dispatch_model

    want = logits(loaded(gpt2).eval())
    model = dispatch_model(loaded(gpt2), {"": "cpu"}, force_hooks=True)
    with torch.no_grad():
        model(input_ids=TEXT)  # the hooks work
    patch(model)
    copied = plain_copy(model)
    moved: list[str] = []
    hook = copied._hf_hook
    before = type(hook).pre_forward
    hook.pre_forward = lambda module, *args, **kwargs: moved.append("") or before(hook, module, *args, **kwargs)
    torch.testing.assert_close(logits(copied), want)
    assert moved


@pytest.mark.parametrize(
    ("config", "trains"),
    [
        (None, True),
        (CONFIGS["lora"], False),
        (LoraConfig(r=4, target_modules=["q_proj"], bias="all"), True),
        (CONFIGS["lora, head trained whole"], False),
        (CONFIGS["prefix"], False),
    ],
)
def test_it_is_known_whether_training_changes_the_base(llama: Path, config: Any, trains: bool) -> None:
    biased = AutoModelForCausalLM.from_pretrained(llama, attention_bias=True, ignore_mismatched_sizes=True)
    model = biased if config is None else get_peft_model(biased, config)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    assert base_trains(model) is trains
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted


def test_nothing_is_left_behind(gpt2: Path) -> None:
    model = get_peft_model(
        loaded(gpt2), LoraConfig(r=4, fan_in_fan_out=True, target_modules=["c_attn"], bias="all")
    ).train()
    model.base_model.model.transformer.h[0].eval()
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(3)
    want = random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002
    modes = [module.training for module in model.modules()]
    trains = [parameter.requires_grad for parameter in model.parameters()]
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(3)

    def disturbed() -> None:
        with undisturbed(model):
            random.random()
            np.random.rand(5)  # noqa: NPY002
            torch.rand(5)
            model.eval()
            model.requires_grad_(False)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        disturbed()
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == want  # noqa: NPY002
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == trains


def test_a_fingerprint_tells_weights_apart(gpt2: Path) -> None:
    model = loaded(gpt2)
    before = weights_fingerprint(model)
    assert weights_fingerprint(loaded(gpt2)) == before == weights_fingerprint(plain_copy(model))
    with torch.no_grad():
        model.transformer.h[0].ln_1.bias[0] += 1e-6
    assert weights_fingerprint(model) != before


def test_a_fingerprint_reaches_to_the_end_of_a_large_weight() -> None:
    """A float32 has no numbers for all places beyond 2²⁴: some of them it would round up, over the end."""
    large = nn.Module()
    large.weight = nn.Parameter(torch.zeros(2**24 + 3, dtype=torch.bfloat16), requires_grad=False)
    seen = {weights_fingerprint(large)}
    for place in (-1, 0, (2**24 + 2) // 255, 100 * (2**24 + 2) // 255):
        large.weight[place] = 1.0
        seen.add(weights_fingerprint(large))
    assert len(seen) == 5
    for size in (0, 1, 2):
        large.weight = nn.Parameter(torch.zeros(size))
        seen.add(weights_fingerprint(large))
    assert len(seen) == 8


def test_what_a_model_in_memory_is(llama: Path) -> None:
    place = located(loaded(llama))
    assert place.path == llama
    assert place.context == loaded(llama).config.max_position_embeddings
    assert method_of(loaded(llama)).name == "full"
    lora = method_of(adapted(llama, "lora"))
    assert lora.name == "lora"
    assert lora.options == {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj"]}
    assert method_of(adapted(llama, "prefix")).options == {"tokens": 4}
    assert method_of(adapted(llama, "ia3")).name == "ia3"


@pytest.mark.parametrize("name", ["full", "lora", "prompt", "ia3"])
def test_scores_are_those_of_the_model_itself(llama: Path, name: str) -> None:
    """Log-probabilities one text at a time, by the model's own forward in evaluation mode."""
    model = loaded(llama) if name == "full" else adapted(llama, name)
    model.eval()
    dice = np.random.default_rng(0)
    records = [
        Encoded(f"r{n}", dice.integers(0, 300, n).astype(np.int32), np.arange(n) >= n // 2, 1) for n in (9, 3, 30)
    ]
    want = []
    for record in records:
        ids = torch.from_numpy(record.ids).long()[None]
        with torch.no_grad():
            found = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        logp = found[0, -len(record) : -1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        want.append(logp[torch.from_numpy(record.scored[1:])])
    model.train()
    patch(model)
    stats, cost = score_live(model, records, 20)
    np.testing.assert_allclose(stats.logp, torch.cat(want).numpy(), rtol=2e-4, atol=2e-5)
    assert stats.ids.tolist() == ["r9", "r3", "r30"]
    assert cost["flops"] > 0
    assert model.training
