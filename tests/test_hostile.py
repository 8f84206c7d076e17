"""A gallery of hostile and broken adapters, models and tokenizers: one sentence each, and nothing of them is run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import struct
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from imprint.errors import ModelError, UsageError
from imprint.spec import ModelSpec
from imprint.tuning import quantised
from imprint.tuning.adapters import attach, read_adapter
from imprint.tuning.locate import json_object, locate
from imprint.tuning.models import load_model, load_tokenizer
from tests.conftest import tokenizer
from tests.tiny_models import build

CANARY = "imprint_canary"
"""A module that can be imported while these tests run, and says so on disk."""
BOMB = "(a+)+$"
PREFIX = "base_model.model.transformer.h.0.attn.c_attn"


@pytest.fixture(autouse=True)
def canary(tmp_path_factory, monkeypatch):
    """Nothing is imported or run, and nothing takes long."""
    folder = tmp_path_factory.mktemp("canary")
    sung = folder / "sung"
    (folder / f"{CANARY}.py").write_text(f"open({str(sung)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(folder)
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("this takes too long"))
    signal.setitimer(signal.ITIMER_REAL, 20)
    yield sung
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    assert not sung.exists()
    assert CANARY not in sys.modules


class Bird:
    """Unpickled, it sings."""

    def __init__(self, sung):
        self.sung = sung

    def __reduce__(self):
        return open, (str(self.sung), "w")


def test_the_canary_can_sing(canary):
    """Without this the gallery would prove nothing."""
    pickle.loads(pickle.dumps(Bird(canary))).close()
    assert canary.exists()
    canary.unlink()
    __import__(CANARY)
    assert canary.exists()
    canary.unlink()
    del sys.modules[CANARY]


def refused(work, *words):
    """One sentence of exactly this class, with all these words."""
    with pytest.raises(ModelError) as caught:
        work()
    assert caught.type is ModelError
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert "Traceback" not in sentence
    for word in words:
        assert str(word) in sentence
    return sentence


# ---- adapters: the configuration ----

CONFIGS = {
    "lora": lambda: LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn"], fan_in_fan_out=True),
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
}


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Good adapters for GPT-2, as PEFT leaves them."""
    folder = tmp_path_factory.mktemp("adapters")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, that the base has no name
        for name, config in CONFIGS.items():
            get_peft_model(build("gpt2"), config()).save_pretrained(folder / name)
    return folder


@pytest.fixture
def good(saved, tmp_path):
    """A copy to break."""

    def copy(name="lora", **changes):
        folder = Path(shutil.copytree(saved / name, tmp_path / name))
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return folder

    return copy


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_good_ones_are_good(good, name):
    attach(build("gpt2"), read_adapter(good(name)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["cannot be read as JSON"]),
        (b"{", ["cannot be read as JSON"]),
        (b"[]", ["JSON object"]),
        (b"\xff\xfe{}", ["cannot be read as JSON"]),
        (b"[" * 100_000, ["cannot be read as JSON"]),
        (b'{"peft_type": "LORA", "lora_alpha": NaN}', ["NaN is no number"]),
        (b'{"peft_type": "LORA", "lora_alpha": -Infinity}', ["-Infinity is no number"]),
        (b'{"peft_type": "LORA", "lora_alpha": 1e999}', ["lora_alpha is inf"]),
        (b'{"peft_type": "LORA", "r": 1' + b"0" * 5000 + b"}", ["cannot be read as JSON"]),
        (b'{"peft_type": "LORA"' + b" " * (1 << 20) + b"}", ["larger than 1,048,576 bytes"]),
        (b"{}", ["peft_type is None", "LORA, PREFIX_TUNING, PROMPT_TUNING, P_TUNING"]),
    ],
)
def test_a_configuration_that_is_none(good, content, words):
    folder = good()
    (folder / "adapter_config.json").write_bytes(content)
    refused(lambda: read_adapter(folder), folder / "adapter_config.json", *words)


IMPORTS = [
    ("auto_mapping", {"base_model_class": "Model", "parent_library": CANARY}),
    ("auto_mapping", {"base_model_class": "Model", "parent_library": f"transformers.{CANARY}; import {CANARY}"}),
    ("auto_mapping", {"base_model_class": "__import__('os')", "parent_library": "transformers.models"}),
    ("auto_mapping", {"base_model_class": "Model", "parent_library": "transformers_modules.someone.model"}),
    ("auto_mapping", {"base_model_class": "Model", "parent_library": "transformers.models", "more": CANARY}),
    ("auto_mapping", {"base_model_class": "Model", "parent_library": ["transformers"]}),
    ("auto_mapping", {"base_model_class": "Model"}),
    ("auto_mapping", CANARY),
    ("auto_mapping", {}),
    ("megatron_core", CANARY),
    ("megatron_core", "megatron"),
    ("megatron_core", {"a": 1}),
]
COMPUTE = [
    ("megatron_config", {"init_method": CANARY}),
    ("layer_replication", [[0, 1], [0, 1]]),
    ("alora_invocation_tokens", [1, 2]),
    ("use_qalora", True),
    ("use_bdlora", {"nblocks": 2}),
    ("arrow_config", {"top_k": 3}),
    ("kasa_config", {"beta": 0.1}),
    ("velora_config", {"scale": 1.0}),
    ("monteclora_config", {"samples": 4}),
    ("trainable_token_indices", [5]),
    ("ensure_weight_tying", True),
    ("bias", "all"),
    ("bias", "lora_only"),
    ("init_lora_weights", "pissa"),
    ("init_lora_weights", "pissa_niter_16"),
    ("init_lora_weights", "olora"),
    ("init_lora_weights", "corda"),
    ("init_lora_weights", "loftq"),
    ("init_lora_weights", "lora_ga"),
    ("init_lora_weights", CANARY),
    ("a_key_of_tomorrow", 1),
    ("a_key_of_tomorrow", "on"),
    ("num_virtual_tokens", 5),
]
VALUES = [
    ("peft_type", "ADALORA"),
    ("peft_type", "XLORA"),
    ("peft_type", ["LORA"]),
    ("task_type", "SEQ_CLS"),
    ("task_type", 1),
    ("r", 0),
    ("r", "4"),
    ("r", True),
    ("r", 4.0),
    ("r", 1 << 40),
    ("lora_alpha", 0),
    ("lora_alpha", -8),
    ("lora_alpha", "8"),
    ("lora_alpha", [8]),
    ("use_dora", "yes"),
    ("use_rslora", 1),
    ("lora_bias", []),
    ("rank_pattern", [4]),
    ("rank_pattern", {"c_attn": "4"}),
    ("alpha_pattern", {"c_attn": None}),
    ("rank_pattern", {"c_attn": None}),
    ("alpha_pattern", {BOMB: 8}),
    ("alpha_pattern", {"c_(attn|proj)": 8}),
    ("alpha_pattern", {"": 8}),
    ("modules_to_save", BOMB),
    ("modules_to_save", [BOMB]),
    ("modules_to_save", ["../lm_head"]),
    ("target_parameters", [BOMB]),
    ("alpha_pattern", {f"a{n}": 8 for n in range(5000)}),
    ("modules_to_save", ["a"] * 5000),
    ("base_model_name_or_path", ["a"]),
    ("revision", "../../main"),
    ("revision", "--upload-pack=x"),
]


@pytest.mark.parametrize(("key", "value"), IMPORTS + COMPUTE + VALUES)
def test_a_key_of_a_lora_that_is_refused(good, key, value):
    folder = good(**{key: value})
    refused(lambda: read_adapter(folder), folder / "adapter_config.json", key)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_virtual_tokens", None),
        ("num_virtual_tokens", 0),
        ("num_virtual_tokens", 1 << 40),
        ("num_virtual_tokens", 6),
        ("num_transformer_submodules", 2),
        ("token_dim", "32"),
        ("tokenizer_kwargs", {"trust_remote_code": True}),
        ("modules_to_save", ["lm_head"]),
        ("lora_alpha", 8),
        *IMPORTS[:2],
    ],
)
def test_a_key_of_a_prompt_that_is_refused(good, key, value):
    refused(lambda: read_adapter(good("prompt", **{key: value})), key)


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "layers_pattern", "rank_pattern"])
def test_a_pattern_that_never_ends_is_never_run(good, key):
    attach(build("gpt2"), read_adapter(good(**{key: {BOMB: 8} if key == "rank_pattern" else BOMB})))


def test_a_prompt_names_a_tokenizer_that_nobody_loads(good):
    folder = good("prompt", prompt_tuning_init="TEXT", prompt_tuning_init_text="a", tokenizer_name_or_path=CANARY)
    attach(build("gpt2"), read_adapter(folder))


# ---- adapters: the weights ----


def rewritten(**changes):
    """Tensors of a LoRA, changed; None takes one out."""

    def change(folder):
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        for name, tensor in changes.items():
            key = name if name.startswith("base_model") else f"{PREFIX}.{name}"
            tensors[key] = tensor
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)

    return change


def file_of(data):
    return lambda folder: (folder / "adapter_model.safetensors").write_bytes(data)


def header(document, body=b"", length=None):
    text = json.dumps(document).encode() if not isinstance(document, bytes) else document
    return file_of(struct.pack("<Q", len(text) if length is None else length) + text + body)


def cut(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def endless(folder):
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")


def no_file(folder):
    (folder / "adapter_model.safetensors").unlink()


def device(folder):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to("/dev/null")


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
WEIGHTS = {
    "nothing": (file_of(b""), ["damaged"]),
    "cut off": (cut, ["damaged"]),
    "a header as long as a disk": (header(b"{}", length=1 << 62), ["4,611,686,018,427,387,904 bytes"]),
    "a header longer than the file": (header(b"{}", length=3000), ["3,000 bytes"]),
    "a header that nests": (header(b"[" * 100_000), ["damaged"]),
    "two tensors in one place": (header({"a": ONE, "b": ONE}, bytes(4)), ["damaged"]),
    "a tensor beyond the end": (header({"a": {**ONE, "data_offsets": [0, 1 << 50]}}, bytes(4)), ["damaged"]),
    "a shape that overflows": (header({"a": {**ONE, "shape": [1 << 40, 1 << 40]}}, bytes(4)), ["damaged"]),
    "no tensor": (header({}), ["holds no tensor"]),
    "whole numbers": (header({"a": {**ONE, "dtype": "I32"}}, bytes(4)), ["'a'", "I32"]),
    "a name with a line break": (header({"a\nb": ONE}, bytes(4)), [r"'a\nb'"]),
    "a name that climbs": (header({"../../a": ONE}, bytes(4)), ["'../../a'"]),
    "an empty tensor": (rewritten(**{"lora_A.weight": torch.empty(0, 32)}), ["shape [0, 32]"]),
    "A alone": (rewritten(**{"lora_B.weight": None}), [PREFIX.removeprefix("base_model.model."), "no lora_B.weight"]),
    "B alone": (rewritten(**{"lora_A.weight": None}), ["no lora_A.weight"]),
    "a magnitude alone": (
        rewritten(**{"base_model.model.lm_head.lora_magnitude_vector": torch.ones(61)}),
        ["lm_head", "no lora_A.weight"],
    ),
    "no product": (rewritten(**{"lora_B.weight": torch.ones(96, 5)}), ["[4, 32]", "[96, 5]", "no product"]),
    "vectors": (rewritten(**{"lora_A.weight": torch.ones(4), "lora_B.weight": torch.ones(4)}), ["no product"]),
    "another method's": (
        lambda f: save_file({"prompt_embeddings": torch.ones(5, 32)}, f / "adapter_model.safetensors"),
        ["prompt_embeddings", "no place in a LoRA"],
    ),
    "whole weights only": (
        lambda f: save_file({"base_model.model.lm_head.weight": torch.ones(61, 32)}, f / "adapter_model.safetensors"),
        ["holds no LoRA matrix"],
    ),
    "no weights": (no_file, ["adapter_model.safetensors is missing", "safe_serialization=True"]),
    "a pipe": (endless, ["adapter_model.safetensors is missing"]),
    "a device": (device, ["adapter_model.safetensors is missing"]),
}


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_weights_that_are_none(good, name):
    change, words = WEIGHTS[name]
    folder = good()
    change(folder)
    refused(lambda: read_adapter(folder), folder / "adapter_model.safetensors", *words)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_pickled_weights_stay_pickled(good, canary, name):
    folder = good()
    no_file(folder)
    (folder / name).write_bytes(pickle.dumps(Bird(canary)))
    refused(lambda: read_adapter(folder), f"only {name}", "can run code", "safe_serialization=True")


def test_pickled_weights_under_a_safe_name(good, canary):
    folder = good()
    file_of(pickle.dumps(Bird(canary)))(folder)
    refused(lambda: read_adapter(folder), "adapter_model.safetensors", "damaged")


def test_a_trainer_s_pickled_files_are_left_alone(good, canary):
    """`checkpoint-*` folders hold optimizer states and arguments."""
    folder = good()
    for name in ("optimizer.pt", "training_args.bin", "rng_state.pth"):
        (folder / name).write_bytes(pickle.dumps(Bird(canary)))
    attach(build("gpt2"), read_adapter(folder))


def test_a_whole_model_beside_it(good, gpt2):
    folder = good()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(gpt2 / name, folder)
    refused(lambda: read_adapter(folder), folder, "model.safetensors", "beside an adapter")
    refused(lambda: locate(ModelSpec(name=str(folder))), folder, "adapter_config.json")


ELSEWHERE = "may be of another base"
PLACES = {
    "an unknown module": (
        rewritten(**{f"base_model.model.layers.0.q.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}),
        {},
        ["layers.0.q", "GPT2LMHeadModel does not have", ELSEWHERE],
    ),
    "a module that is no matrix": (
        rewritten(**{f"base_model.model.transformer.ln_f.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}),
        {},
        ["transformer.ln_f", "target_parameters", ELSEWHERE],
    ),
    "a wider model": (
        rewritten(**{"lora_A.weight": torch.ones(4, 33)}),
        {},
        [f"{PREFIX}.lora_A.weight", "[4, 33]", "[4, 32]", ELSEWHERE],
    ),
    "a rank that fills a disk": (
        rewritten(**{"lora_A.weight": torch.ones(1 << 20, 1), "lora_B.weight": torch.ones(1, 1 << 20)}),
        {"r": 1 << 20},
        [f"{PREFIX}.lora_A.weight", "[1048576, 1]", "[1048576, 32]", ELSEWHERE],
    ),
    "another rank": (
        rewritten(**{"lora_A.weight": torch.ones(5, 32), "lora_B.weight": torch.ones(96, 5)}),
        {},
        ["transformer.h.0.attn.c_attn has rank 5", "states 4"],
    ),
    "a bias too many": (
        rewritten(**{"lora_B.bias": torch.ones(96)}),
        {},
        [f"{PREFIX}.lora_B.bias", "no place", ELSEWHERE],
    ),
    "a bias too few": (rewritten(), {"lora_bias": True}, [f"lacks the tensor {PREFIX}.lora_B.bias"]),
    "magnitudes too few": (rewritten(), {"use_dora": True}, [f"lacks the tensor {PREFIX}.lora_magnitude_vector"]),
    "no number": (
        rewritten(**{"lora_A.weight": torch.full((4, 32), torch.nan)}),
        {},
        [f"{PREFIX}.lora_A.weight", "not finite"],
    ),
    "too large": (
        rewritten(**{"lora_B.weight": torch.full((96, 4), 1e300, dtype=torch.float64)}),
        {},
        [f"{PREFIX}.lora_B.weight", "not finite"],
    ),
    "no end": (
        rewritten(**{"lora_B.weight": torch.full((96, 4), torch.inf)}),
        {},
        [f"{PREFIX}.lora_B.weight", "not finite"],
    ),
    "a weight of nothing": (
        rewritten(**{"base_model.model.classifier.weight": torch.ones(2, 32)}),
        {},
        ["classifier.weight", "does not have", ELSEWHERE],
    ),
    "a weight below an adapter": (
        rewritten(**{"weight": torch.ones(32, 96)}),
        {},
        [f"{PREFIX}.weight", "no place", ELSEWHERE],
    ),
    "a weight below no adapter": (
        rewritten(**{"base_model.model.lm_head.base_layer.weight": torch.ones(61, 32)}),
        {},
        ["lm_head.base_layer.weight", "no place", ELSEWHERE],
    ),
    "a norm too wide": (
        rewritten(**{"base_model.model.transformer.ln_f.weight": torch.ones(33)}),
        {},
        ["transformer.ln_f.weight", "[33]", "[32]", ELSEWHERE],
    ),
    "another vocabulary": (
        rewritten(**{"base_model.model.lm_head.weight": torch.ones(70, 32)}),
        {},
        ["lm_head.weight", "70 rows, the model 61", "--reference"],
    ),
}


@pytest.mark.parametrize("name", list(PLACES))
def test_a_lora_that_does_not_fit(good, name):
    """It is refused as a whole: the base is as it was."""
    change, config, words = PLACES[name]
    folder = good(**config)
    change(folder)
    base = build("gpt2")
    refused(lambda: attach(base, read_adapter(folder)), folder, *words)
    fresh = build("gpt2")
    assert all(torch.equal(one, other) for one, other in zip(base.parameters(), fresh.parameters(), strict=True))
    assert base.config.to_dict() == fresh.config.to_dict()


def prompt(*shape):
    return lambda f: save_file({"prompt_embeddings": torch.ones(*shape)}, f / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("kind", "change", "config", "words"),
    [
        ("prompt", prompt(5, 33), {}, ["prompt_embeddings", "[5, 33]", "[5, 32]", ELSEWHERE]),
        ("prefix", prompt(1 << 20, 1), {"num_virtual_tokens": 1 << 20}, ["[1048576, 1]", "[1048576, 128]", ELSEWHERE]),
        ("prompt", prompt(6, 32), {}, ["prompt_embeddings", "num_virtual_tokens 5"]),
        ("prompt", prompt(160), {}, ["prompt_embeddings", "num_virtual_tokens 5"]),
        ("prompt", rewritten(**{"lora_A.weight": torch.ones(4, 32)}), {}, [f"{PREFIX}.lora_A.weight", "no place"]),
        ("prefix", prompt(5, 64), {}, ["prompt_embeddings", "[5, 64]", "[5, 128]", ELSEWHERE]),
        ("prefix", prompt(5, 128), {"num_attention_heads": 2}, ["num_attention_heads is 2", "needs 4"]),
        ("prefix", prompt(5, 128), {"num_layers": 4, "token_dim": 16}, ["num_layers is 4", "needs 2"]),
    ],
)
def test_virtual_tokens_that_do_not_fit(good, kind, change, config, words):
    folder = good(kind, **config)
    change(folder)
    refused(lambda: attach(build("gpt2"), read_adapter(folder)), folder, *words)


# ---- models ----


def config(**changes):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def index(shards, document=None, keep=False):
    def change(folder):
        if not keep:
            (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(document or {"weight_map": shards}))

    return change


MODELS = {
    "a shard above": (index({"a": "../model.safetensors"}), ["index.json", "'../model.safetensors'"]),
    "a shard at the root": (index({"a": "/etc/passwd"}), ["index.json", "'/etc/passwd'"]),
    "a shard of Windows": (index({"a": "..\\model.safetensors"}), ["index.json", "model.safetensors'"]),
    "a pickled shard": (index({"a": "model-1.bin"}), ["index.json", "'model-1.bin'"]),
    "a shard that is no name": (index({"a": 1}), ["index.json", "weight_map"]),
    "a shard that is missing": (index({"a": "model-2.safetensors"}), ["index.json", "model-2.safetensors", "missing"]),
    "an index beside the weights": (index({"a": "../x.safetensors"}, keep=True), ["index.json", "'../x.safetensors'"]),
    "an index of nothing": (index({}, document=[1]), ["index.json", "JSON object"]),
    "no weight_map": (index({}, document={"metadata": {}}), ["index.json", "weight_map"]),
    "a deep configuration": (lambda f: (f / "config.json").write_bytes(b'{"a":' * 100_000), ["cannot be read as JSON"]),
    "a kernel": (config(_attn_implementation="someone/kernel"), ["kernel", "_attn_implementation"]),
    "a kernel below": (config(text_config={"attn_implementation": "someone/kernel"}), ["kernel"]),
    "kernels by name": (config(attn_implementation={"text_config": "a/b"}), ["kernel"]),
    "kernels for experts": (config(experts_implementation="a/b"), ["kernel", "experts_implementation"]),
    "a billion layers": (config(n_layer=10**9), ["n_layer is 1,000,000,000", "4,096"]),
    "a billion experts": (config(text_config={"num_experts": 10**9}), ["num_experts is 1,000,000,000", "4,096"]),
    "GPTQ": (config(quantization_config={"quant_method": "gptq", "bits": 4}), ["quantization_config", "'gptq'"]),
    "AWQ below": (config(text_config={"quantization_config": {"quant_method": "awq"}}), ["'awq'"]),
    "compressed": (config(compression_config={"quant_method": "compressed-tensors"}), ["compression_config"]),
    "quantised by nobody": (config(quantization_config=[CANARY]), ["quantization_config"]),
    "eight bits with a threshold": (
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}),
        ["quantization_config", "bitsandbytes in 4 bits"],
    ),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_a_model_that_is_refused_unread(damaged, name):
    change, words = MODELS[name]
    change(damaged)
    refused(lambda: locate(ModelSpec(name=str(damaged))), damaged, *words)


def test_a_configuration_without_end(tmp_path):
    (tmp_path / "config.json").write_bytes(b" " * 101)
    refused(lambda: json_object(tmp_path / "config.json", limit=100), "config.json", "larger than 100 bytes")


def test_pickled_models_stay_pickled(damaged, canary):
    (damaged / "model.safetensors").unlink()
    (damaged / "pytorch_model.bin").write_bytes(pickle.dumps(Bird(canary)))
    refused(lambda: locate(ModelSpec(name=str(damaged))), "pytorch_model.bin", "can run code")


CODE = {"AutoConfig": "modeling_canary.Config", "AutoModelForCausalLM": "modeling_canary.Model"}


def sings(folder):
    """Code of its own, as remote code lies in a model's folder."""
    (folder / "modeling_canary.py").write_text(f"import {CANARY}\n")


def test_code_of_an_unknown_architecture_is_never_run(damaged):
    config(model_type=CANARY, architectures=["Model"], auto_map=CODE)(damaged)
    sings(damaged)
    located = locate(ModelSpec(name=str(damaged)))
    refused(lambda: load_model(located, "float32", torch.device("cpu")), damaged, "config.json", "auto_map")


def test_code_of_a_known_architecture_is_ignored(damaged):
    """Transformers has GPT-2 itself; some folders bring the code that came before."""
    config(auto_map=CODE)(damaged)
    sings(damaged)
    load_model(locate(ModelSpec(name=str(damaged))), "float32", torch.device("cpu"))


def test_four_bits_need_their_library(damaged, monkeypatch):
    """What bitsandbytes quantised is known, but not loaded without it, nor quantised again."""
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})(damaged)
    located = locate(ModelSpec(name=str(damaged)))
    with pytest.raises(UsageError, match="4bit needs bitsandbytes, which is not installed"):
        load_model(located, "float32", torch.device("cpu"))
    refused(lambda: load_model(located, "float32", torch.device("cpu"), "4bit"), damaged, "quantised already")


# ---- tokenizers ----


def tokens(**changes):
    def change(folder):
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def template(name, size):
    def change(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x" * size)

    return change


def gone(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


TOKENIZERS = {
    "a class that loads models": (tokens(tokenizer_class="AutoModel"), ["tokenizer_config.json", "tokenizer_class"]),
    "a class that is a path": (tokens(tokenizer_class=f"{CANARY}.Tokenizer"), ["tokenizer_config.json", CANARY]),
    "a class that is no name": (tokens(tokenizer_class=["a"]), ["tokenizer_config.json", "tokenizer_class"]),
    "a file elsewhere": (tokens(tokenizer_file="/etc/passwd"), ["tokenizer_file", "'/etc/passwd'"]),
    "a file above": (tokens(vocab_file="../vocab.json"), ["tokenizer_config.json", "vocab_file"]),
    "files above": (tokens(fast_tokenizer_files=["tokenizer.x/../../y.json"]), ["fast_tokenizer_files"]),
    "a template of a book": (tokens(chat_template="x" * 1_048_577), ["tokenizer_config.json", "chat_template"]),
    "templates of a book": (tokens(chat_template=[{"template": "x" * 1_048_577}]), ["chat_template"]),
    "a template's file": (template("chat_template.jinja", 1_048_577), ["chat_template.jinja", "1,048,576"]),
    "one template more": (template("additional_chat_templates/a.jinja", 1_048_577), ["a.jinja", "1,048,576"]),
    "no JSON": (lambda f: (f / "tokenizer_config.json").write_text("["), ["tokenizer_config.json", "JSON"]),
    "no tokenizer": (gone, ["tokenizer"]),
    "a broken one": (lambda f: (f / "tokenizer.json").write_text("{}"), ["tokenizer"]),
    "too many tokens": (
        lambda f: (lambda words: (words.add_tokens([f"<{n}>" for n in range(40)]), words.save_pretrained(f)))(
            tokenizer()
        ),
        ["322 tokens", "300"],
    ),
}


@pytest.mark.parametrize("beside", ["the model", "an adapter"])
@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_a_tokenizer_that_is_refused(damaged, tmp_path, name, beside):
    located = locate(ModelSpec(name=str(damaged)))
    folder = damaged
    if beside == "an adapter":
        folder = tmp_path / "adapter"
        tokenizer().save_pretrained(folder)
    change, words = TOKENIZERS[name]
    change(folder)
    refused(lambda: load_tokenizer(located, None if folder == damaged else folder), folder, *words)


def test_code_of_an_unknown_tokenizer_is_never_run(damaged):
    tokens(tokenizer_class="CanaryTokenizer", auto_map={"AutoTokenizer": ["modeling_canary.Tokenizer", None]})(damaged)
    config(model_type=CANARY)(damaged)
    sings(damaged)
    located = locate(ModelSpec(name=str(damaged)))
    refused(lambda: load_tokenizer(located), damaged, "tokenizer_config.json", "auto_map")


def test_where_a_special_token_map_once_lay_is_no_concern(damaged):
    """Older versions of Transformers wrote it down, and never look."""
    tokens(special_tokens_map_file="/home/someone/special_tokens_map.json", name_or_path="/home/someone")(damaged)
    load_tokenizer(locate(ModelSpec(name=str(damaged))))
