"""Tiny models and data that a whole run takes a fraction of a second on; nothing here reaches the network."""

from __future__ import annotations

import os

# Before torch and huggingface_hub are imported: two busy cores, no network, nothing on stderr but our own sentences.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

VOCABULARY = 300
WORDS = "red green blue one two three cat dog fox hen sings jumps sleeps under over the a quick lazy old".split()


def tokenizer(bos: bool = False) -> Any:
    """A byte-level BPE without a padding token whose id 0 is an ordinary character (`!`); 280 merges, then `<s> </s>`.

    Args:
        bos: put `<s>` in front of every text, as Llama does.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(["the quick fox jumps over the lazy dog " * 20], trainer)
    inner.add_special_tokens(["<s>", "</s>"])
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def save_model(folder: Path, architecture: str, seed: int = 0, bos: bool = False, **changes: Any) -> Path:
    """A random model with its tokenizer, as `save_pretrained` leaves them."""
    import torch
    import transformers

    from tests.tiny_models import CONFIGS

    words = tokenizer(bos)
    config = copy.deepcopy(CONFIGS[architecture])
    config.update({"vocab_size": VOCABULARY, "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id})
    config.update(changes)
    torch.manual_seed(seed)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2 (tied head, dropout .1); its tokenizer puts nothing in front."""
    return save_model(tmp_path_factory.mktemp("models") / "gpt2", "gpt2")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama (untied head, no dropout); its tokenizer puts a BOS in front."""
    return save_model(tmp_path_factory.mktemp("models") / "llama", "llama", bos=True)


@pytest.fixture
def damaged(gpt2: Path, tmp_path: Path) -> Path:
    """A copy of the GPT-2 folder to break."""
    return Path(shutil.copytree(gpt2, tmp_path / "damaged"))


def sentence(dice: random.Random) -> str:
    return f"{' '.join(dice.choice(WORDS) for _ in range(dice.randint(4, 12)))} {dice.randint(0, 10**6)}"


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty texts of forty owners, every second owner with two."""
    dice = random.Random(7)
    rows = [{"id": f"r{n}", "text": sentence(dice), "owner": f"o{n * 2 // 3}"} for n in range(60)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "letters.jsonl", rows)


@pytest.fixture
def recipe(gpt2: Path, data: Path) -> Callable[..., dict[str, Any]]:
    """A recipe that runs in under half a second; keyword arguments replace its keys, `data__x` one of `data`."""

    def made(**changes: Any) -> dict[str, Any]:
        document: dict[str, Any] = {
            "model": str(gpt2),
            "data": {"source": str(data), "members": 8, "nonmembers": 8, "validation": 4},
            "method": "head",
            "train": {"epochs": 1, "batch_size": 4},
        }
        for key, value in changes.items():
            if key.startswith("data__"):
                document["data"][key.removeprefix("data__")] = value
            else:
                document[key] = value
        return document

    return made


@pytest.fixture(scope="session", autouse=True)
def short_controls() -> Iterator[None]:
    """Most whole runs ask for anything but the positive control: two epochs of it, not thirty."""
    from imprint import controls

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(controls, "EPOCHS", 2)
        yield
