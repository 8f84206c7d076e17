"""LoRA adapts exactly the matrices it is asked to, whatever an architecture calls them."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from imprint.checkpoint import load_trained, save_trained
from imprint.engine.clock import Clock
from imprint.engine.forward import forward_of
from imprint.errors import UsageError
from imprint.runs import run
from imprint.scoring.score import token_stats
from imprint.spec import MethodSpec
from imprint.tuning.methods import METHODS, resolve_method
from imprint.tuning.models import base_of, trainable
from imprint.tuning.placement import PLACEMENTS, targets
from imprint.tuning.train import backward
from tests import tiny_models
from tests.conftest import save_model
from tests.test_scoring import TOLERANCE, check, oracle, records
from tests.tiny_models import CONFIGS, VOCABULARY

_LLAMA_ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
_LLAMA_MLP = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
_LLAMA = ("model.layers", _LLAMA_ATTENTION, _LLAMA_MLP, [], [])
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# architecture -> (where the blocks are, attention matrices of a block, dense projections, experts, routers)
WANTED = {
    "gpt2": ("transformer.h", ["attn.c_attn", "attn.c_proj"], ["mlp.c_fc", "mlp.c_proj"], [], []),
    "llama": _LLAMA,
    "gpt_neox": (
        "gpt_neox.layers",
        ["attention.query_key_value", "attention.dense"],
        ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
        [],
        [],
    ),
    "opt": (
        "model.decoder.layers",
        [f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")],
        ["fc1", "fc2"],
        [],
        [],
    ),
    "qwen2": _LLAMA,
    "mistral": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "mixtral": ("model.layers", _LLAMA_ATTENTION, [], _EXPERTS, ["mlp.gate.weight"]),
    "qwen2_moe": (
        "model.layers",
        _LLAMA_ATTENTION,
        [f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")],
        _EXPERTS,
        ["mlp.shared_expert_gate", "mlp.gate.weight"],
    ),
    "olmoe": ("model.layers", _LLAMA_ATTENTION, [], _EXPERTS, ["mlp.gate.weight"]),
}
SPARSE = [name for name in WANTED if WANTED[name][3]]
DENSE = [name for name in WANTED if not WANTED[name][3]]


def model_of(architecture):
    """Not `build` alone: what is attached may write into the shared configuration."""
    CONFIGS[architecture] = copy.deepcopy(CONFIGS[architecture])
    return tiny_models.build(architecture)


def paths(architecture, *parts):
    blocks, *named = WANTED[architecture]
    return {f"{blocks}.{n}.{name}" for n in range(2) for part in parts for name in named[part]}


def adapted(architecture, **options):
    """Paths of what PEFT really put an adapter on."""
    spec = resolve_method(MethodSpec(name="lora", options={"rank": 2, **options}), 32, None)
    model = METHODS["lora"].attach(model_of(architecture), spec.options).get_base_model()
    found = set()
    for name, _ in model.named_parameters():
        owner, lora, _ = name.partition(".lora_A")
        if lora:
            found.add(owner)
    return found


def test_every_architecture_is_listed():
    assert {*WANTED} == {*CONFIGS}


@pytest.mark.parametrize("architecture", list(WANTED))
def test_placements(architecture):
    model = model_of(architecture)
    for placement, parts in (
        ("attention", (0,)),
        ("projection", (1, 2)),
        ("experts", (2,)),
        ("router", (3,)),
        ("both", (0, 1, 2)),
        ("all", (0, 1, 2, 3)),
    ):
        if architecture in DENSE and placement in ("experts", "router"):
            continue
        modules, parameters, transposed = targets(model, placement)
        assert {*modules, *parameters} == paths(architecture, *parts)
        assert len(modules) + len(parameters) == len(paths(architecture, *parts))
        assert all(isinstance(model.get_submodule(name), nn.Module) for name in modules)
        assert all(model.get_parameter(name).ndim in (2, 3) for name in parameters)
        assert transposed == (architecture == "gpt2" and bool(modules))


@pytest.mark.parametrize("placement", ["experts", "router"])
@pytest.mark.parametrize("architecture", DENSE)
def test_a_dense_model_has_no_experts(architecture, placement):
    with pytest.raises(UsageError, match=f"'{placement}' needs a mixture of experts, and .* has no experts"):
        targets(model_of(architecture), placement)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_all_of_a_dense_model_is_both(architecture):
    assert targets(model_of(architecture), "all") == targets(model_of(architecture), "both")


@pytest.mark.parametrize("architecture", DENSE)
@pytest.mark.parametrize(("placement", "parts"), [("attention", (0,)), ("projection", (1,)), ("both", (0, 1))])
def test_peft_adapts_what_it_is_told(architecture, placement, parts):
    assert adapted(architecture, placement=placement) == paths(architecture, *parts)


def test_experts_are_adapted_and_routers_are_not():
    found = adapted("mixtral", placement="projection")
    assert len(found) == 4  # two fused matrices in each of two layers
    assert all(".mlp.experts" in name for name in found)
    assert not any("gate." in f"{name}." or "router" in name for name in found)


@pytest.mark.parametrize("architecture", list(WANTED))
def test_head_embeddings_norms_and_routers_are_never_targets(architecture):
    model = model_of(architecture)
    modules, parameters, _ = targets(model, "both")
    chosen = {id(model.get_submodule(name)) for name in modules}
    assert id(model.get_output_embeddings()) not in chosen
    assert id(model.get_input_embeddings()) not in chosen
    for name, module in model.named_modules():
        kind = type(module).__name__
        if "Router" in kind or "Norm" in kind or "Embedding" in kind:
            assert name not in modules
            assert not any(parameter.startswith(f"{name}.") for parameter in parameters)


def test_the_gate_of_a_shared_expert_is_a_router_too():
    """Qwen2-MoE weighs its shared expert by a linear layer of one output."""
    config = transformers.Qwen2MoeConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
    )
    modules, parameters, _ = targets(transformers.AutoModelForCausalLM.from_config(config), "projection")
    shared = {f"model.layers.0.mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")}
    assert set(modules) == shared
    assert set(parameters) == {f"model.layers.0.mlp.experts.{name}_proj" for name in ("gate_up", "down")}


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gate_proj = nn.Linear(4, 4), nn.Linear(4, 4)


def old_style(*routers):
    """Transformers 4 and remote implementations of Mixtral-like blocks: linear layers throughout."""
    block = nn.Module()
    block.shared, block.experts = Expert(), nn.ModuleList([Expert()])
    for name in routers:
        block.add_module(name, nn.Linear(4, 4))
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    return model


def test_routers_and_experts_that_are_plain_linear_layers():
    model = old_style("gate", "router")
    experts = {"layers.0.experts.0.up", "layers.0.experts.0.gate_proj"}
    routers = {"layers.0.gate", "layers.0.router"}
    dense = {"layers.0.shared.up", "layers.0.shared.gate_proj"}
    for placement, wanted in (
        ("experts", experts),
        ("router", routers),
        ("both", experts | dense),
        ("all", experts | dense | routers),
    ):
        modules, parameters, _ = targets(model, placement)
        assert (set(modules), parameters) == (wanted, [])


def test_a_router_that_is_not_found_is_refused():
    with pytest.raises(UsageError, match="has no router"):
        targets(old_style("chooser"), "router")


def test_two_matrices_of_one_name_are_told_apart():
    """GPT-2 calls the outputs of both attention and feed-forward `c_proj`."""
    attention, projection = (set(targets(model_of("gpt2"), part)[0]) for part in ("attention", "projection"))
    assert {name for name in attention if name.endswith("c_proj")} == {f"transformer.h.{n}.attn.c_proj" for n in (0, 1)}
    assert {name for name in projection if name.endswith("c_proj")} == {f"transformer.h.{n}.mlp.c_proj" for n in (0, 1)}
    assert adapted("gpt2", placement="attn.c_proj") == {f"transformer.h.{n}.attn.c_proj" for n in (0, 1)}


@pytest.mark.parametrize(
    ("placement", "wanted"),
    [
        ("c_proj", {f"transformer.h.{n}.{part}.c_proj" for n in (0, 1) for part in ("attn", "mlp")}),
        ("mlp.c_proj, c_attn", {f"transformer.h.{n}.{part}" for n in (0, 1) for part in ("mlp.c_proj", "attn.c_attn")}),
        ("transformer.h.1.mlp.c_fc", {"transformer.h.1.mlp.c_fc"}),
    ],
)
def test_matrices_by_name(placement, wanted):
    assert set(targets(model_of("gpt2"), placement)[0]) == wanted
    assert adapted("gpt2", placement=placement) == wanted


@pytest.mark.parametrize("placement", ["q_proj", "c_proj,q_proj", "lm_head", "proj", "wte", "", ","])
def test_an_unknown_name_is_refused_with_those_there_are(placement):
    with pytest.raises(UsageError, match=r"c_attn, c_fc, c_proj") as caught:
        targets(model_of("gpt2"), placement)
    assert "lora.placement" in str(caught.value)


def sinks():
    """GPT-OSS: experts with biases, stored [E, in, out], a router with a bias, and attention that cannot be packed."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=64,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return transformers.AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)


def sparse_model(architecture):
    return sinks() if architecture == "gpt_oss" else model_of(architecture)


def moved(architecture, placement, scale=0.1):
    """A mixture of experts with LoRA whose every matrix has left its initial value."""
    spec = resolve_method(MethodSpec(name="lora", options={"rank": 2, "placement": placement}), 32, None)
    model = METHODS["lora"].attach(sparse_model(architecture), spec.options)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(scale * torch.randn_like(parameter))
    return model.eval()


def updates(wrapper):
    """(A [E, r, in], B [E, out, r]) of a bare parameter; PEFT lays them out [E r, in] and [out, r E]."""
    a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
    experts = wrapper.num_experts
    return a.view(experts, -1, a.shape[1]), b.view(b.shape[0], -1, experts).permute(2, 0, 1)


def wrapped(model):
    """(wrapper, path in the plain model) of every bare parameter with an update."""
    for name, module in base_of(model).named_modules():
        if isinstance(module, ParamWrapper):
            yield module, f"{name.replace('.base_layer', '')}.{module.parameter_name}"


@torch.no_grad()
def merged_by_hand(model, architecture):
    """A plain model with W_e + s B_e A_e for each expert e; that of GPT-OSS is stored the other way round."""
    plain = sparse_model(architecture)
    for wrapper, path in wrapped(model):
        parameter = plain.get_parameter(path)
        for e, (a, b) in enumerate(zip(*updates(wrapper), strict=True)):
            change = wrapper.scaling["default"] * b @ a
            one = parameter if parameter.ndim == 2 else parameter[e]
            one += change.T if architecture == "gpt_oss" and parameter.ndim == 3 else change
    return plain


@pytest.mark.parametrize("placement", ["experts", "router", "mlp.experts.gate_up_proj,gate.weight"])
@pytest.mark.parametrize("architecture", ["mixtral", "olmoe", "gpt_oss"])
def test_bare_parameters_score_like_weights_merged_by_hand(architecture, placement):
    """An expert has an update of its own, and both of its matrices may have one; scores are those of the sum."""
    placement = placement.replace("gate.weight", "router.weight") if architecture == "gpt_oss" else placement
    model, texts = moved(architecture, placement), records([2, 40, 7, 23, 16], prompt=3)
    found = token_stats(model, texts, budget=60)
    want, untouched = (
        [np.concatenate(column) for column in zip(*(oracle(one, text) for text in texts), strict=True)]
        for one in (merged_by_hand(model, architecture), sparse_model(architecture))
    )
    np.testing.assert_allclose(found.logp, want[0], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(found.std, want[2], atol=TOLERANCE, rtol=0)
    assert np.abs(want[0] - untouched[0]).max() > 0.1


@pytest.mark.parametrize("placement", ["attention", "projection", "experts", "router", "both", "all"])
@pytest.mark.parametrize("architecture", [*SPARSE, "gpt_oss"])
def test_every_placement_on_experts_scores_like_one_text_alone(architecture, placement):
    check(moved(architecture, placement), records([2, 40, 7, 3, 23, 16], prompt=2), budget=70)


@pytest.mark.parametrize("placement", ["experts", "router", "all"])
@pytest.mark.parametrize("architecture", ["mixtral", "olmoe", "gpt_oss"])
def test_gradients_of_bare_parameters(architecture, placement):
    """By the chain rule from the gradient of the sum W = W₀ + s B A: s Bᵀ ∂W for A, s ∂W Aᵀ for B."""
    model, texts = moved(architecture, placement), records([12, 5], prompt=2)
    backward(forward_of(model), [texts], 100, Clock(torch.device("cpu")))
    plain = merged_by_hand(model, architecture)
    for name, module in base_of(model).named_modules():  # attention's adapters, which are none of these
        if "lora_A" in dir(module) and not isinstance(module, ParamWrapper):
            plain.get_submodule(name).weight.data += module.get_delta_weight("default").detach()
    plain.requires_grad_(True)
    logp = [
        plain(torch.from_numpy(text.ids.astype(np.int64))[None]).logits[0].log_softmax(-1)[t - 1, text.ids[t]]
        for text in texts
        for t in np.flatnonzero(text.scored)
    ]
    (-torch.stack(logp).mean()).backward()
    for wrapper, path in wrapped(model):
        weight, scale = plain.get_parameter(path).grad, wrapper.scaling["default"]
        weight = weight[None] if weight.ndim == 2 else weight
        weight = weight.transpose(1, 2) if architecture == "gpt_oss" and wrapper.num_experts > 1 else weight
        a, b = updates(wrapper)
        grad_a = wrapper.lora_A["default"].weight.grad.view_as(a)
        grad_b = wrapper.lora_B["default"].weight.grad.view(b.shape[1], -1, b.shape[0]).permute(2, 0, 1)
        torch.testing.assert_close(grad_a, scale * b.transpose(1, 2) @ weight, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(grad_b, scale * weight @ a.transpose(1, 2), atol=1e-5, rtol=1e-3)
        assert grad_a.abs().max() > 1e-4
        assert grad_b.abs().max() > 1e-4


def test_exactly_the_experts_that_were_routed_to_get_gradients():
    model, [text] = moved("mixtral", "experts"), records([4])
    backward(forward_of(model), [[text]], 100, Clock(torch.device("cpu")))
    ids = torch.from_numpy(text.ids.astype(np.int64))[None]
    logits = merged_by_hand(model, "mixtral")(ids, output_router_logits=True).router_logits
    met = [set(layer[:-1].topk(2).indices.flatten().tolist()) for layer in logits]  # the last token predicts nothing
    assert any(len(layer) < 4 for layer in met)
    for wrapper, path in wrapped(model):
        grad = wrapper.lora_A["default"].weight.grad.view_as(updates(wrapper)[0])
        moving = {e for e in range(4) if grad[e].abs().max() > 0}
        assert moving == met[int(path.split(".")[2])]


CELLS = ["full", "head", "prefix", "prompt", "p_tuning", *({"lora": {"placement": p, "rank": 2}} for p in PLACEMENTS)]


@pytest.mark.slow
def test_every_method_and_placement_runs_on_a_mixture_from_end_to_end(recipe, tmp_path):
    folder = save_model(tmp_path / "model", "mixtral", bos=True)
    frame = run(
        recipe(model=str(folder), method=CELLS, train={"epochs": 2, "batch_size": 4}, attacks=["loss", "ref"]),
        tmp_path / "out",
    )
    cells = list((tmp_path / "out" / "cells").iterdir())
    assert len(cells) == len(CELLS)
    assert {json.loads((cell / "done.json").read_text())["status"] for cell in cells} == {"done"}
    perplexity = frame[frame["metric"] == "perplexity"].groupby(["method", "options"])["value"]
    assert len(perplexity) > len(PLACEMENTS)
    assert (perplexity.nunique() > 1).all()  # nothing was tuned in vain


@pytest.mark.parametrize("placement", ["experts", "router", "all"])
@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_stored_experts_and_routers_load_again(architecture, placement, tmp_path):
    model, texts = moved(architecture, placement), records([9, 14])
    save_trained(tmp_path / "adapter", model)
    by_peft = PeftModel.from_pretrained(sparse_model(architecture), str(tmp_path / "adapter")).eval()
    spec = resolve_method(MethodSpec(name="lora", options={"rank": 2, "placement": placement}), 32, None)
    ours = METHODS["lora"].attach(sparse_model(architecture), spec.options)
    load_trained(tmp_path / "adapter", ours)
    want = token_stats(model, texts, 100).logp
    for loaded in (by_peft, ours):
        np.testing.assert_allclose(token_stats(loaded, texts, 100).logp, want, atol=TOLERANCE)


@pytest.mark.parametrize("placement", ["experts", "router"])
def test_a_recipe_that_asks_a_dense_model_for_experts_is_refused(placement, recipe, tmp_path):
    with pytest.raises(UsageError, match="has no experts"):
        run(recipe(method={"lora": {"placement": placement}}), tmp_path / "out")
