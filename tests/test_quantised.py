"""Base models in 4 and 8 bits, and models spread over devices: what is tuned on them is scored as they are."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, dispatch_model

from imprint.engine.clock import Clock
from imprint.engine.features import features, kept_forward
from imprint.engine.forward import Forward, forward_of
from imprint.engine.packed import low_rank_updates
from imprint.errors import ImprintError, ModelError, UsageError
from imprint.recipe import plan
from imprint.runs import run
from imprint.scoring.score import token_stats
from imprint.spec import MethodSpec, ModelSpec, TrainSpec
from imprint.tuning.base import Base
from imprint.tuning.locate import locate
from imprint.tuning.methods import METHODS, resolve_method
from imprint.tuning.models import (
    _check_placed,
    base_of,
    count_parameters,
    load_model,
    only_head_trains,
    shared_copy,
    trainable,
)
from imprint.tuning.train import Trainer, backward, train
from tests.test_scoring import TOLERANCE, oracle, records

CPU = torch.device("cpu")
NAMES = ["tiny/llama-medium", "tiny/gpt2-medium"]
BITS = ["4bit", "8bit"]
FROZEN = [name for name, row in METHODS.items() if row.leaves_base]
STEP = 1e-2
"""Activations are rounded to 127 steps of a token's largest: float rounding moves a few of them by a step."""


@cache
def loaded(name, bits=None):
    if bits:
        pytest.importorskip("bitsandbytes", exc_type=ImportError)
    return load_model(locate(ModelSpec(name=name)), "float32", CPU, bits)


def tuned(base, method):
    options = {"tokens": 5} if method in ("prefix", "prompt", "p_tuning") else {}
    spec = resolve_method(MethodSpec(name=method, options=options), 96, None)
    torch.manual_seed(0)
    return METHODS[method].attach(shared_copy(base), spec.options), spec.options["learning_rate"]


def forward_for(model, texts) -> Forward:
    return kept_forward(model, features(model, texts, 90)) if only_head_trains(model) else forward_of(model)


def learnt(base, method, texts, epochs=2):
    """(model, forward, training loss of each epoch)."""
    model, rate = tuned(base, method)
    forward = forward_for(model, texts)
    trainer = Trainer(model, texts, TrainSpec(epochs=epochs, batch_size=2), rate, seed=0)
    losses = [report.training_loss for [report] in train([trainer], forward, 90)]
    return model.eval(), forward, losses


def alone(model, texts):
    return np.concatenate([oracle(model, text)[0] for text in texts])


TEXTS = records([40, 20, 35, 8, 60, 25, 12, 30])


@pytest.mark.parametrize("method", FROZEN)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_tuned_on_quantised_weights_learns_and_is_scored_as_one_text_alone(name, bits, method):
    base = loaded(name, bits)
    before = token_stats(base, TEXTS, 90).logp
    model, forward, losses = learnt(base, method, TEXTS)
    gap = np.abs(token_stats(model, TEXTS, 90, forward=forward).logp - alone(model, TEXTS))
    assert losses[1] < losses[0] - 0.1
    assert np.median(gap) < TOLERANCE
    assert gap.mean() < (TOLERANCE if bits == "4bit" else STEP)
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    np.testing.assert_array_equal(token_stats(base, TEXTS, 90).logp, before)


@pytest.mark.parametrize("bits", BITS)
def test_a_quantised_base_is_another_model_than_the_plain_one_but_a_near_one(bits):
    plain, other = (token_stats(loaded(NAMES[0], b), TEXTS, 90).logp for b in (None, bits))
    assert 1e-4 < np.abs(plain - other).mean() < 2


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_flow_through_quantised_weights(name, bits):
    """Those of LoRA in the first block go through all others; compared with the same weights in full."""
    model, _ = tuned(loaded(name, bits), "lora")
    plain, _ = tuned(unpacked(name, bits), "lora")
    for one in (model, plain):
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in trainable(one).values():
                parameter.add_(0.02 * torch.randn_like(parameter))
        backward(forward_of(one), [TEXTS[:3]], 200, Clock(CPU))
    assert [*trainable(model)] == [*trainable(plain)]
    ours, theirs = (torch.cat([p.grad.flatten() for p in trainable(one).values()]) for one in (model, plain))
    assert (ours - theirs).norm() < (1e-4 if bits == "4bit" else 0.05) * theirs.norm()


@torch.no_grad()
def unpacked(name, bits):
    """A plain model that holds the numbers that the quantised one stands for, each layer read off unit inputs."""
    plain = load_model(locate(ModelSpec(name=name)), "float32", CPU)
    for path, module in loaded(name, bits).named_modules():
        target = plain.get_submodule(path)
        if type(module) is type(target) or not hasattr(target, "weight"):
            continue
        if bits == "8bit":
            weight = module.state.CB.float() * (module.state.SCB[:, None] / 127)
        else:
            weight = (module(torch.eye(module.in_features)) - (0 if module.bias is None else module.bias)).T
        target.weight.copy_(weight if isinstance(target, torch.nn.Linear) else weight.T)
    return plain


@pytest.mark.parametrize("bits", BITS)
def test_scores_do_not_depend_on_the_texts_beside(bits):
    """LLM.int8's threshold would: here one text has activations above it, in features of its own."""
    base = shared_copy(loaded(NAMES[0], bits))
    norm = base.model.layers[0].input_layernorm
    norm.weight = torch.nn.Parameter(norm.weight * 20, requires_grad=False)
    together, beside = token_stats(base, TEXTS, 1000).logp, alone(base, TEXTS)
    assert np.median(np.abs(together - beside)) < TOLERANCE
    assert np.abs(together - beside).mean() < (TOLERANCE if bits == "4bit" else STEP)


@pytest.mark.parametrize("bits", BITS)
def test_runs_share_the_quantised_weights(bits):
    base = loaded(NAMES[0], bits)
    one, other = (layer(shared_copy(base)) for _ in range(2))
    assert one is not other
    assert one.weight is other.weight is layer(base).weight
    if bits == "4bit":
        assert one.quant_state is other.quant_state is layer(base).quant_state
    else:
        assert one.state is not other.state
        assert one.state.CB is other.state.CB is layer(base).state.CB
        assert one.state.SCB is other.state.SCB is layer(base).state.SCB


def layer(model):
    return model.model.layers[0].mlp.up_proj


@pytest.mark.parametrize("bits", BITS)
def test_lora_is_never_merged_into_quantised_weights(bits):
    model, _ = tuned(loaded(NAMES[0], bits), "lora")
    assert low_rank_updates(model) is None
    forward = forward_of(model)
    assert forward.packed is not None  # texts are packed all the same
    assert forward.packed.alone
    assert forward.packed.checkpoint().merged == {}


@pytest.mark.parametrize("bits", BITS)
def test_parameters_are_counted_as_numbers_not_as_bytes(bits):
    assert count_parameters(loaded(NAMES[0], bits))[1] == count_parameters(loaded(NAMES[0]))[1]


def test_only_the_blocks_are_quantised():
    base = loaded(NAMES[0], "4bit")
    assert type(base.lm_head) is torch.nn.Linear
    assert type(layer(base)).__name__ == "Linear4bit"


def test_without_bitsandbytes_the_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr("imprint.tuning.quantised.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'needs bitsandbytes.*pip install "imprint-audit\[bnb\]"'):
        load_model(locate(ModelSpec(name=NAMES[0])), "float32", CPU, "4bit")


def test_full_tuning_of_quantised_weights_is_refused(recipe, gpt2):
    with pytest.raises(UsageError, match=r"model\.quantize: full trains the model's own weights.*4bit"):
        plan(recipe(model={"name": str(gpt2), "quantize": "4bit"}, method=["full", "lora"]))


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_a_recipe_may_compare_precisions(recipe, llama, tmp_path):
    """Each precision has a base and cells of its own."""
    pytest.importorskip("bitsandbytes", exc_type=ImportError)
    models = [{"name": str(llama), "quantize": bits} for bits in (None, *BITS)]
    document = recipe(model=models, method=["head", "lora", "prefix"], attacks=["loss", "ref"])
    cells = plan(document).cells
    assert len({cell.spec.run_id for cell in cells}) == 9
    assert len({cell.base for cell in cells}) == len({cell.model_key for cell in cells}) == 3
    run(document, tmp_path / "out")
    done = [json.loads(file.read_text())["status"] for file in (tmp_path / "out" / "cells").glob("*/done.json")]
    assert done == ["done"] * 9


# ---- spread over devices ----


def test_a_device_map_on_one_device_changes_nothing():
    spread = load_model(locate(ModelSpec(name=NAMES[0])), "float32", CPU, device_map=True)
    np.testing.assert_array_equal(token_stats(spread, TEXTS, 90).logp, token_stats(loaded(NAMES[0]), TEXTS, 90).logp)


def hooked(name):
    """As Accelerate leaves a model that it has spread: every layer's `forward` moves its inputs first."""
    model = load_model(locate(ModelSpec(name=name)), "float32", CPU)
    leaves = [path for path, module in model.named_modules() if path and not list(module.children())]
    dispatch_model(model, dict.fromkeys(leaves, "cpu"), main_device="cpu", force_hooks=True)
    del model.hf_device_map  # names no GPU, which peft looks for
    return model


@pytest.mark.filterwarnings("ignore:Some parameters are on the meta device")
@pytest.mark.parametrize("method", ["lora", "prefix", "p_tuning"])
def test_a_model_that_is_spread_learns_and_scores_like_one_that_is_not(method):
    """The engine must not take its own way past the hooks: LoRA would then have no effect at all."""
    (one, ours, found), (two, theirs, wanted) = (
        learnt(base, method, TEXTS) for base in (hooked(NAMES[0]), loaded(NAMES[0]))
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    scores = [token_stats(m, TEXTS, 90, forward=f).logp for m, f in ((one, ours), (two, theirs))]
    np.testing.assert_allclose(*scores, atol=1e-3)


def test_hooks_outlive_activations_that_are_computed_again():
    model, _ = tuned(hooked(NAMES[0]), "lora")
    forward = forward_of(model)
    blocks = base_of(model).model.layers
    for block in blocks:
        block.forward = block.forward  # a hook on a block, as a device map by blocks sets it
    forward.packed.recompute = [*blocks]
    backward(forward, [TEXTS[:2]], 200, Clock(CPU))
    assert all("forward" in vars(block) for block in blocks)


def test_an_output_layer_that_is_fetched_for_every_pass_is_refused():
    model = load_model(locate(ModelSpec(name=NAMES[0])), "float32", CPU)
    cpu_offload(model.lm_head, execution_device=CPU)
    with pytest.raises(ModelError, match="does not fit the memory"):
        _check_placed(model)


@pytest.mark.filterwarnings("ignore:Some parameters are on the meta device")
def test_lora_on_layers_that_are_fetched_for_every_pass_is_refused():
    """PEFT puts its matrices where the layer's are, which is nowhere between passes."""
    base = Base(locate(ModelSpec(name=NAMES[0])), "float32", CPU, 100)
    cpu_offload(base.model.model.layers[1], execution_device=CPU)
    with pytest.raises(ImprintError, match="lora cannot train layers that lie on the CPU beside a GPU"):
        base.tuned(resolve_method(MethodSpec(name="lora"), 96, None), 0)
    prefix = base.tuned(resolve_method(MethodSpec(name="prefix", options={"tokens": 5}), 96, None), 0)
    plain, _ = tuned(loaded(NAMES[0]), "prefix")
    scores = [token_stats(model, TEXTS, 90).logp for model in (prefix, plain)]
    np.testing.assert_allclose(*scores, atol=1e-3)
