"""LoRA adapts exactly the matrices it is asked to, whatever an architecture calls them."""

from __future__ import annotations

import copy

import pytest
import transformers
from torch import nn

from imprint.errors import UsageError
from imprint.spec import MethodSpec
from imprint.tuning.methods import METHODS, resolve_method
from imprint.tuning.placement import targets
from tests import tiny_models
from tests.tiny_models import CONFIGS

_LLAMA_ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
_LLAMA_MLP = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
_LLAMA = ("model.layers", _LLAMA_ATTENTION, _LLAMA_MLP, [])
# architecture -> (where the blocks are, attention matrices of a block, projections, parameters of fused experts)
WANTED = {
    "gpt2": ("transformer.h", ["attn.c_attn", "attn.c_proj"], ["mlp.c_fc", "mlp.c_proj"], []),
    "llama": _LLAMA,
    "gpt_neox": (
        "gpt_neox.layers",
        ["attention.query_key_value", "attention.dense"],
        ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
        [],
    ),
    "opt": ("model.decoder.layers", [f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")], ["fc1", "fc2"], []),
    "qwen2": _LLAMA,
    "mistral": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "mixtral": ("model.layers", _LLAMA_ATTENTION, [], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
}


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
    attention, projection, experts = (paths(architecture, part) for part in range(3))
    conv = architecture == "gpt2"
    for placement, wanted in (
        ("attention", (attention, set())),
        ("projection", (projection, experts)),
        ("both", (attention | projection, experts)),
    ):
        modules, parameters, transposed = targets(model, placement)
        assert (set(modules), set(parameters)) == wanted
        assert (len(modules), len(parameters)) == tuple(len(one) for one in wanted)
        assert transposed == (conv and bool(modules))


@pytest.mark.parametrize("architecture", [name for name in WANTED if name != "mixtral"])
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


def test_routers_that_are_plain_linear_layers():
    """Older and remote implementations of Mixtral-like blocks."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.router, self.up, self.gate_proj = (nn.Linear(4, 4) for _ in range(4))

    model = nn.Module()
    model.layers = nn.ModuleList([Block()])
    assert set(targets(model, "both")[0]) == {"layers.0.up", "layers.0.gate_proj"}


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
