"""The offline world and the models that ship with the package."""

from __future__ import annotations

import hashlib
import itertools
import json
import re

import numpy as np
import pytest
import torch

import imprint
from imprint.data import world
from imprint.data.tokens import Encoder
from imprint.errors import UsageError
from imprint.scoring.score import token_stats
from imprint.spec import ModelSpec
from imprint.tuning.locate import TINY, locate, shipped
from imprint.tuning.methods import METHODS
from imprint.tuning.models import load_model, load_tokenizer

SIZES = ("gpt2-small", "gpt2-medium", "gpt2-large")


def names(text):
    """Built names: capitalised words of five letters or more that no word list holds."""
    known = {w for value in vars(world.words).values() if isinstance(value, (list, tuple)) for w in value}
    return {word for word in re.findall(r"[A-Z][a-z]{4,}", text) if word not in known}


def test_same_on_every_machine():
    """A seeded generator whose output changes would make the shipped models' pretraining data another."""
    texts = "\n".join(itertools.islice(world.public_texts(), 200))
    private = "\n".join(e.prompt + e.target for e in world.read("world").parts["all"][:200])
    digests = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in (texts, private)]
    assert digests == ["4a00e1e48f3e425d", "48b2c5acb5c3c6ae"]


def test_no_name_occurs_in_both_parts():
    public = names(" ".join(itertools.islice(world.public_texts(), 3000)))
    private = names(" ".join(e.prompt + e.target for e in world.read("world").parts["all"][:3000]))
    built = {name for name in private if any(name.startswith(start) for start in world.words.STARTS)}
    assert len(built) > 2000
    assert not built & public


@pytest.mark.parametrize("kind", world.KINDS)
def test_kinds(kind):
    pool = world.read(f"world/{kind}")
    examples = pool.parts["all"]
    assert len(examples) == world.PRIVATE_RECORDS
    assert len({e.id for e in examples}) == len(examples)
    assert all((e.prompt != "") == (kind in ("triples", "news")) for e in examples)
    assert all(e.group and e.id.startswith(e.group) for e in examples)


def test_customers_come_back_with_the_same_details():
    """Some customers own two records: their details agree, and their group keeps them on one side of a split."""
    by_group: dict[str, list[str]] = {}
    for example in world.read("world/customers").parts["all"]:
        by_group.setdefault(example.group, []).append(example.target)
    twice = [texts for texts in by_group.values() if len(texts) == 2]
    assert 0.1 < len(twice) / len(by_group) < 0.2
    assert all(names(first) & names(second) for first, second in twice[:50])


def test_unknown_kind_names_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'world/customers'"):
        world.read("world/customer")


def test_models_are_small_and_documented():
    assert shipped() == [
        "tiny/gpt2-large",
        "tiny/gpt2-medium",
        "tiny/gpt2-small",
        "tiny/llama-medium",
        "tiny/mixtral-medium",
    ]
    assert sum(file.stat().st_size for file in TINY.rglob("*") if file.is_file()) < 12e6
    for name in shipped():
        card = json.loads((TINY / name.removeprefix("tiny/") / "card.json").read_text())
        assert len(card["pretraining_texts_sha256"]) == 64
        assert card["curve"][-1]["training_loss"] < card["curve"][0]["training_loss"]


def held_out(name, count=150):
    """Perplexity on public texts that no model was pretrained on."""
    located = locate(ModelSpec(name=name))
    encoder = Encoder(load_tokenizer(located), located.context)
    texts = itertools.islice(world.public_texts("held out"), count)
    records = [encoder(world.Example(str(n), "", text)) for n, text in enumerate(texts)]
    stats = token_stats(load_model(located, "float32", torch.device("cpu")), records, 4096)
    return float(np.exp(-stats.logp.mean(dtype=np.float64)))


def test_each_larger_model_reads_clearly_better():
    small, medium, large = (held_out(f"tiny/{size}") for size in SIZES)
    assert medium < 0.95 * small
    assert large < 0.95 * medium
    assert held_out("tiny/llama-medium") < 0.95 * small


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_learns_with_its_defaults(method, tmp_path):
    """Validation perplexity falls clearly below the base's, and the base cannot tell members from non-members."""
    recipe = {
        "model": "tiny/gpt2-small",
        "data": {"source": "world/customers", "members": 160, "nonmembers": 60, "validation": 60},
        "method": method,
        "train": {"epochs": 5},
        "attacks": ["loss"],
    }
    frame = imprint.run(recipe, tmp_path / "out")
    perplexity = frame[frame.metric == "perplexity"].set_index("epoch").value
    assert perplexity.loc[1:].min() < 0.95 * perplexity.loc[0]
    control = frame[(frame.metric == "auc") & (frame.epoch == 0)].iloc[0]
    assert control.low < 0.5 < control.high
