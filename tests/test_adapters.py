"""Adapters that PEFT saved score here as they score in PEFT; the base below them stays as it was."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file

from imprint.checkpoint import save_trained
from imprint.errors import ModelError
from imprint.scoring.score import token_stats
from imprint.spec import MethodSpec, ModelSpec
from imprint.tuning.adapter_patterns import alpha_of
from imprint.tuning.adapters import adapter_parameters, attach, is_adapter, read_adapter
from imprint.tuning.locate import locate, tokenizer_fingerprint
from imprint.tuning.methods import METHODS, resolve_method
from imprint.tuning.models import load_tokenizer
from tests.conftest import tokenizer
from tests.test_scoring import check, records
from tests.tiny_models import build

CAUSAL = {"task_type": "CAUSAL_LM"}
VIRTUAL = {**CAUSAL, "num_virtual_tokens": 5}
ATTENTION = {"gpt2": ["c_attn", "c_proj"]}
NAMES = ["gpt2", "llama", "gemma2", "mixtral", "qwen2_moe"]
TEXTS = [*records([2, 40, 7, 23]), *records([9, 30], seed=1, prompt=6)]


def lora(name, **changes):
    return LoraConfig(
        **{
            **CAUSAL,
            "r": 4,
            "lora_alpha": 12,
            "lora_dropout": 0.1,
            "target_modules": ATTENTION.get(name, ["q_proj", "v_proj"]),
            "fan_in_fan_out": name == "gpt2",
            **changes,
        }
    )


CASES = {
    "plain": lora,
    "rslora": lambda name: lora(name, use_rslora=True),
    "dora": lambda name: lora(name, use_dora=True),
    "patterns": lambda name: lora(
        name,
        rank_pattern={"0.self_attn.q_proj": 2, "attn.c_proj": 6},
        alpha_pattern={"v_proj": 3, "h.1.attn.c_attn": 0.5},
    ),
    "bias": lambda name: lora(name, lora_bias=True),
    "head": lambda name: lora(name, modules_to_save=["lm_head"]),
    "norms and embedding": lambda name: lora(name, modules_to_save=["norm", "ln_1", "wte", "embed_tokens"]),
    "LoRA on the embedding": lambda name: lora(name, target_modules=["wte", "embed_tokens", "q_proj"]),
    "LoRA on the head": lambda name: lora(name, target_modules=["lm_head"]),
    "all linear": lambda name: lora(name, target_modules="all-linear", lora_dropout=0.0),
    "prefix": lambda name: PrefixTuningConfig(**VIRTUAL),
    "projected prefix": lambda name: PrefixTuningConfig(**VIRTUAL, prefix_projection=True, encoder_hidden_size=16),
    "prompt": lambda name: PromptTuningConfig(**VIRTUAL, prompt_tuning_init="SAMPLE_VOCAB"),
    "p-tuning, MLP": lambda name: PromptEncoderConfig(**VIRTUAL, encoder_hidden_size=16),
    "p-tuning, LSTM": lambda name: PromptEncoderConfig(
        **VIRTUAL, encoder_hidden_size=16, encoder_reparameterization_type="LSTM", encoder_num_layers=1
    ),
}


def save(name, config, folder, model=None):
    """An adapter as PEFT leaves it, moved away from where it starts."""
    torch.manual_seed(1)
    tuned = get_peft_model(model or build(name), config)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    tuned.eval().save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model, **options):
    return model(input_ids=torch.tensor([[5, 60, 7, 33, 0, 2, 19]]), **options).logits


def state(model):
    """What attaching must leave alone."""
    flags = [parameter.requires_grad for parameter in model.parameters()]
    return logits(model), flags, model.config.to_dict(), [type(module) for module in model.modules()]


@pytest.mark.filterwarnings("ignore")  # PEFT's own, when it makes and loads the adapter
@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("name", NAMES)
def test_scores_as_peft_does(name, case, tmp_path):
    """Bit for bit the logits of PeftModel.from_pretrained; scored, those of one text at a time."""
    save(name, CASES[case](name), tmp_path)
    theirs = PeftModel.from_pretrained(build(name), tmp_path)
    base = build(name)
    before = state(base)
    ours = attach(base, read_adapter(tmp_path))
    assert torch.equal(logits(ours), logits(theirs))
    after = state(base)
    assert torch.equal(after[0], before[0])
    assert after[1:] == before[1:]
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    check(ours, TEXTS, budget=90)
    assert np.abs(token_stats(ours, TEXTS, 90).logp - token_stats(base, TEXTS, 90).logp).max() > 0.1


MOE = {
    "experts": lambda: lora(
        "mixtral", lora_dropout=0.0, target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    ),
    "one matrix": lambda: lora("mixtral", lora_dropout=0.0, target_parameters=["mlp.experts.down_proj"]),
    "router": lambda: lora("mixtral", lora_dropout=0.0, target_parameters=["gate.weight"]),
    "names of Transformers 4": lambda: lora("mixtral", lora_dropout=0.0, target_modules=["q_proj", "w1", "w2", "w3"]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", list(MOE))
def test_experts_and_routers_score_as_peft_does(case, tmp_path):
    save("mixtral", MOE[case](), tmp_path)
    ours = attach(build("mixtral"), read_adapter(tmp_path))
    torch.testing.assert_close(
        logits(ours), logits(PeftModel.from_pretrained(build("mixtral"), tmp_path)), atol=1e-6, rtol=0
    )
    check(ours, TEXTS, budget=90)


def test_a_name_is_what_it_says(tmp_path):
    """In some mixtures PEFT takes `gate_proj` for all experts', though dense layers and shared experts have one too."""
    torch.manual_seed(0)
    config = transformers.Glm4MoeConfig(
        **{"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "head_dim": 8},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2},
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    )
    base = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    wanted, tensors = copy.deepcopy(base), {}
    for path in ("model.layers.0.mlp.gate_proj", "model.layers.1.mlp.shared_experts.down_proj"):
        weight = wanted.get_submodule(path).weight
        a, b = torch.randn(4, weight.shape[1]), torch.randn(weight.shape[0], 4)
        weight += 12 / 4 * b @ a
        tensors |= {f"base_model.model.{path}.lora_{x}.weight": y for x, y in (("A", a), ("B", b))}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 12}')
    ours = attach(base, read_adapter(tmp_path))
    assert base.config.model_type == ours.config.model_type == "glm4_moe"
    torch.testing.assert_close(logits(ours), logits(wanted), atol=1e-4, rtol=0)
    assert not torch.allclose(logits(base), logits(wanted), atol=0.1)


@pytest.mark.parametrize("method", ["lora", "prefix", "prompt", "p_tuning"])
@pytest.mark.parametrize("name", ["gpt2", "qwen2_moe"])
def test_our_own_adapters(name, method, tmp_path):
    """What `imprint run` keeps of an epoch is an adapter like any other."""
    options = {"placement": "all"} if method == "lora" else {"tokens": 4}
    spec = resolve_method(MethodSpec(name=method, options=options), 32, None)
    tuned = METHODS[method].attach(build(name), spec.options)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    save_trained(tmp_path / "adapter", tuned.eval())
    adapter = read_adapter(tmp_path / "adapter")
    assert adapter.kind == method
    assert torch.equal(logits(attach(build(name), adapter)), logits(tuned))


# ---- what is said of it ----


def test_what_is_read(tmp_path):
    config = lora("llama", modules_to_save=["lm_head"], revision="v1.0")
    adapter = read_adapter(edited(save("llama", config, tmp_path), base_model_name_or_path="someone/llama"))
    assert adapter.kind == "lora"
    assert adapter.options == {
        "rank": 4,
        "alpha": 12.0,
        "rslora": False,
        "dora": False,
        "targets": ["q_proj", "v_proj"],
        "modules_to_save": ["lm_head"],
    }
    assert (adapter.base, adapter.revision) == ("someone/llama", "v1.0")
    # two layers of q (32 → 32) and v (32 → 16) at rank 4, and a head of 61 by 32
    assert adapter_parameters(adapter) == 2 * (4 * (32 + 32) + 4 * (32 + 16)) + 61 * 32
    json.dumps(adapter.options)


def edited(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def test_tokens_are_read(tmp_path):
    adapter = read_adapter(save("gpt2", PromptTuningConfig(**VIRTUAL), tmp_path))
    assert (adapter.kind, adapter.options, adapter_parameters(adapter)) == ("prompt", {"tokens": 5}, 5 * 32)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_the_fingerprint_is_of_both_files(file, tmp_path):
    before = read_adapter(save("gpt2", lora("gpt2"), tmp_path)).fingerprint
    assert read_adapter(tmp_path).fingerprint == before
    if file.endswith(".json"):
        edited(tmp_path, lora_alpha=13)
    else:
        tensors = load_file(tmp_path / file)
        next(iter(tensors.values())).view(-1)[0] += 1
        save_file(tensors, tmp_path / file)
    assert read_adapter(tmp_path).fingerprint != before


def test_is_adapter(gpt2, tmp_path):
    assert is_adapter(save("gpt2", lora("gpt2"), tmp_path))
    assert not is_adapter(gpt2)
    assert not is_adapter(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "base", [None, "../models/llama", "a/../../b", "..\\llama", "a\nb", "\ud800", "-rf", "x" * 501]
)
def test_a_base_that_cannot_be_looked_up(base, tmp_path):
    """The adapter is as good as before: its base has to be named."""
    adapter = read_adapter(edited(save("gpt2", lora("gpt2"), tmp_path), base_model_name_or_path=base))
    assert adapter.base == ""


def test_reading_imports_no_torch(tmp_path):
    save("gpt2", lora("gpt2"), tmp_path)
    code = (
        "import sys; from pathlib import Path; from imprint.tuning.adapters import read_adapter\n"
        f"read_adapter(Path({str(tmp_path)!r}))\n"
        "print(*{'torch', 'peft', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# ---- settings that a stranger's file may have ----


def test_empty_keys_of_a_newer_peft_change_nothing(tmp_path):
    save("gpt2", lora("gpt2"), tmp_path)
    before = logits(attach(build("gpt2"), read_adapter(tmp_path)))
    edited(tmp_path, new_flag=False, new_config=None, new_list=[], new_object={}, new_name="", bias=None)
    assert torch.equal(logits(attach(build("gpt2"), read_adapter(tmp_path))), before)


def test_training_settings_change_nothing(tmp_path):
    save("gpt2", lora("gpt2"), tmp_path)
    before = logits(attach(build("gpt2"), read_adapter(tmp_path)))
    edited(
        tmp_path,
        target_modules="(a+)+$",  # never run
        exclude_modules="(a+)+$",
        rank_pattern={"(a+)+$": 7},
        layers_to_transform=[0],
        lora_dropout=0.9,
        fan_in_fan_out=False,
        init_lora_weights="eva",
        eva_config={"rho": 2.0},
        auto_mapping={
            "base_model_class": "GPT2LMHeadModel",
            "parent_library": "transformers.models.gpt2.modeling_gpt2",
        },
        task_type=None,
        megatron_core="megatron.core",
    )
    assert torch.equal(logits(attach(build("gpt2"), read_adapter(tmp_path))), before)


PARTS = st.sampled_from(["q_proj", "v_proj", "layers", "0", "1", "10", "q-x", "p"])
PATHS = st.lists(PARTS, min_size=1, max_size=4).map(".".join)


@settings(max_examples=200, deadline=None)
@given(path=PATHS, parts=st.lists(PARTS, min_size=1, max_size=3), data=st.data())
def test_alpha_patterns_mean_what_they_mean_in_peft(path, parts, data):
    """PEFT's rule is a regular expression; ours gives the same answers without running one."""
    joint = data.draw(st.sampled_from([".", r"\."]))
    key = joint.join(parts)
    key = data.draw(st.sampled_from([key, key[1:], f".*\\.{key}", f"^{key}", f"{key}$", f".{key}"]))
    if not key.strip("$"):
        return
    found = alpha_of(path, {"lora_alpha": 1.0, "alpha_pattern": {key: 2.0}})
    assert found == (2.0 if re.match(rf"(.*\.)?({key})$", path) else 1.0)


def test_the_first_alpha_pattern_counts():
    settings = {"lora_alpha": 1.0, "alpha_pattern": {"b": 2.0, "a.b": 3.0}}
    assert [alpha_of(path, settings) for path in ("a.b", "a.c")] == [2.0, 1.0]


# ---- precision ----


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["plain", "dora", "head", "prefix", "prompt"])
def test_sixteen_bits(case, tmp_path):
    """A base in bfloat16 under an adapter saved in 16 bits: its tensors are float32, the scores are PEFT's."""
    config = CASES[case]("llama")
    config.lora_dropout = 0.0  # with dropout PEFT's layers go the plain way, which rounds elsewhere
    save("llama", config, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    ours = attach(build("llama").bfloat16(), read_adapter(tmp_path))
    theirs = PeftModel.from_pretrained(build("llama").bfloat16(), tmp_path)
    added = {name: p.dtype for name, p in ours.named_parameters() if "lora_" in name or "prompt_encoder" in name}
    assert set(added.values()) == {torch.float32}
    if case == "head":  # a whole copy has the type of the layer that it replaces, as in PEFT
        assert ours.get_output_embeddings().weight.dtype == torch.bfloat16
    np.testing.assert_array_equal(token_stats(ours, TEXTS, 90).logp, token_stats(theirs, TEXTS, 90).logp)


# ---- weights that are stored whole ----


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_embeddings_saved_along_are_the_base_s_own(name, tmp_path):
    """`save_embedding_layers` writes them whether or not they changed; a tied head stays tied."""
    torch.manual_seed(1)
    get_peft_model(build(name), lora(name, init_lora_weights=False)).save_pretrained(
        tmp_path, save_embedding_layers=True
    )
    base = build(name)
    ours = attach(base, read_adapter(tmp_path))
    assert ours.get_output_embeddings().weight is base.get_output_embeddings().weight
    assert ours.get_input_embeddings().weight is base.get_input_embeddings().weight


@pytest.mark.filterwarnings("ignore")
def test_embeddings_that_changed_are_applied(tmp_path):
    """Tied in the base, saved twice: both places get what was saved, as in PEFT; the base keeps its own."""
    model = build("gpt2")
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.1)
    torch.manual_seed(1)
    get_peft_model(model, lora("gpt2", init_lora_weights=False)).save_pretrained(tmp_path, save_embedding_layers=True)
    base = build("gpt2")
    before = logits(base)
    ours = attach(base, read_adapter(tmp_path))
    assert torch.equal(logits(ours), logits(PeftModel.from_pretrained(build("gpt2"), tmp_path)))
    assert torch.equal(logits(base), before)
    assert (base.config.tie_word_embeddings, ours.config.tie_word_embeddings) == (True, False)


def test_a_head_that_would_drag_the_embedding_along(tmp_path):
    """PEFT would copy it into the weight that both share."""
    save("gpt2", lora("gpt2"), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.lm_head.weight": torch.ones(61, 32)}, file)
    with pytest.raises(ModelError, match=r"lm_head.weight would replace a weight that is in 2 places of the base"):
        attach(build("gpt2"), read_adapter(tmp_path))


@pytest.mark.filterwarnings("ignore")
def test_a_resized_vocabulary(tmp_path):
    model = build("llama")
    model.resize_token_embeddings(64)
    save("llama", lora("llama", modules_to_save=["lm_head", "embed_tokens"]), tmp_path, model)
    with pytest.raises(ModelError) as caught:
        attach(build("llama"), read_adapter(tmp_path))
    assert re.search(r"has 64 rows, the model 61.*--reference", str(caught.value))


def test_a_module_to_save_that_was_not_saved(tmp_path):
    edited(save("llama", lora("llama"), tmp_path), modules_to_save=["lm_head"])
    with pytest.raises(ModelError, match=r"lacks lm_head.weight, which .* names among modules_to_save"):
        attach(build("llama"), read_adapter(tmp_path))


# ---- the tokenizer beside it ----


def test_an_adapter_may_bring_its_tokenizer(gpt2, llama, tmp_path):
    """Its BOS is put in front although the base's tokenizer has none."""
    tokenizer(bos=True).save_pretrained(tmp_path)
    located = locate(ModelSpec(name=str(gpt2)))
    own, brought = load_tokenizer(located), load_tokenizer(located, tmp_path)
    assert brought("fox").input_ids == [brought.bos_token_id, *own("fox").input_ids]


def test_a_larger_tokenizer_is_refused(gpt2, tmp_path):
    words = tokenizer()
    words.add_tokens([f"<{n}>" for n in range(40)])
    words.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"{tmp_path} knows 322 tokens, the model only 300: they do not match"):
        load_tokenizer(locate(ModelSpec(name=str(gpt2))), tmp_path)


@pytest.mark.parametrize(
    "file", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "added_tokens.json"]
)
def test_the_tokenizer_s_fingerprint(file, tmp_path):
    tokenizer().save_pretrained(tmp_path)
    before = tokenizer_fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("not part of it")
    assert tokenizer_fingerprint(tmp_path) == before
    with (tmp_path / file).open("a") as opened:
        opened.write(" ")
    assert tokenizer_fingerprint(tmp_path) != before


def test_a_chat_template_is_no_part_of_the_model(damaged):
    """Runs that were made before keep their names."""
    before = locate(ModelSpec(name=str(damaged))).fingerprint
    (damaged / "chat_template.jinja").write_text("{{ messages }}")
    assert locate(ModelSpec(name=str(damaged))).fingerprint == before
