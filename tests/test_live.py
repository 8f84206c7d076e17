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
from transformers import AutoModelForCausalLM

from imprint.auditing.live import (
    base_trains,
    located,
    method_of,
    plain_copy,
    pristine,
    undisturbed,
    weights_fingerprint,
)
from imprint.auditing.memory import score_live
from imprint.data.tokens import Encoded
from imprint.errors import UsageError

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
