"""Every score against a naive oracle: one text at a time, unpadded, full logits, float64 arithmetic in numpy."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imprint.data.tokens import Encoded
from imprint.engine.clock import Clock
from imprint.engine.features import features, kept_forward
from imprint.engine.forward import forward_of
from imprint.errors import ImprintError
from imprint.scoring.score import token_stats
from imprint.spec import MethodSpec
from imprint.tuning import virtual
from imprint.tuning.methods import METHODS, resolve_method
from imprint.tuning.models import base_of, trainable
from imprint.tuning.train import backward
from tests.tiny_models import CONFIGS, VOCABULARY, build

TOLERANCE = 1e-5


def records(lengths, seed=0, prompt=0):
    """Random texts; the first `prompt` tokens are context, and the first token of a text is never scored."""
    rng = np.random.default_rng(seed)
    made = []
    for n, length in enumerate(lengths):
        ids = rng.integers(0, VOCABULARY, length).astype(
            np.int32
        )  # ids 0 (padding) and 2 (EOS) occur: no token is special
        made.append(Encoded(str(n), ids, np.arange(length) >= max(1, min(prompt, length - 1)), 10))
    return made


def tuned(name, method, seed=0):
    """A model with the method attached and its parameters moved away from where they start."""
    model = build(name, seed)
    spec = resolve_method(
        MethodSpec(name=method, options={"tokens": 5} if method in ("prefix", "prompt", "p_tuning") else {}), 32, None
    )
    model = METHODS[method].attach(model, spec.options)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def oracle(model, record):
    """(logp, mean, std, top) of the scored tokens, from the model's full logits for this text alone.

    The last T logits belong to the text whether or not virtual tokens stand in front.
    """
    ids = torch.from_numpy(record.ids.astype(np.int64))[None]
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(record) :].double().numpy()
    rows = []
    for t in np.flatnonzero(record.scored):
        x = logits[t - 1]
        logp = x - x.max() - np.log(np.exp(x - x.max()).sum())
        p = np.exp(logp)
        mean = (p * logp).sum()
        rows.append((logp[record.ids[t]], mean, np.sqrt((p * (logp - mean) ** 2).sum()), x.argmax() == record.ids[t]))
    return [np.array(column) for column in zip(*rows, strict=True)]


def check(model, texts, budget):
    stats = token_stats(model, texts, budget)
    want = [np.concatenate(column) for column in zip(*(oracle(model, record) for record in texts), strict=True)]
    for name, expected in zip(("logp", "mean", "std"), want, strict=False):
        np.testing.assert_allclose(getattr(stats, name), expected, atol=TOLERANCE, rtol=0, err_msg=name)
    np.testing.assert_array_equal(stats.top, want[3])
    assert stats.ids.tolist() == [record.id for record in texts]
    np.testing.assert_array_equal(stats.tokens, np.concatenate([r.ids[r.scored] for r in texts]))
    np.testing.assert_array_equal(stats.lengths, [r.scored.sum() for r in texts])


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("name", list(CONFIGS))
def test_equals_oracle(name, method):
    texts = records([2, 40, 7, 3, 23, 2, 16, 31], prompt=0) + records([9, 30, 12], seed=1, prompt=6)
    check(tuned(name, method), texts, budget=90)


@pytest.mark.parametrize("method", ["full", "lora", "prefix", "prompt"])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=12), budget=st.integers(1, 300), prompt=st.integers(0, 8)
)
def test_any_batching_gives_the_oracle(method, lengths, budget, prompt):
    check(gpt2_tuned_by(method), records(lengths, prompt=prompt), budget)


@cache
def gpt2_tuned_by(method):
    return tuned("gpt2", method)


@pytest.mark.parametrize("method", ["prefix", "prompt"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_vocabulary_start_equals_real_tokens_in_front(name, method, monkeypatch):
    """Before any step, virtual tokens drawn from the vocabulary score a text as if those tokens stood before it."""
    drawn, text = np.array([5, 60, 7, 33], np.int32), records([17])[0]
    monkeypatch.setattr(virtual, "_draw", lambda model, count: torch.from_numpy(drawn).long())
    spec = resolve_method(MethodSpec(name=method, options={"tokens": 4}), 32, None)
    stats = token_stats(METHODS[method].attach(build(name), spec.options), [text], 100)
    longer = Encoded("0", np.concatenate([drawn, text.ids]), np.arange(21) >= 5, 10)
    np.testing.assert_allclose(stats.logp, token_stats(build(name), [longer], 100).logp, atol=TOLERANCE)


def test_untied_head_leaves_the_embedding_alone():
    """GPT-2 ties its head to the embedding; tuning the head must not move the embedding."""
    model = tuned("gpt2", "head")
    before = build("gpt2").get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert not torch.equal(model.get_output_embeddings().weight, before)
    assert list(trainable(model)) == ["lm_head.weight"]


@pytest.mark.parametrize("method", ["lora", "prefix", "prompt", "p_tuning"])
def test_the_base_does_not_train(method):
    """Only what the method adds is trainable."""
    model = tuned("llama", method)
    frozen = {id(p) for p in build("llama").parameters()}
    assert trainable(model)
    assert not any(p.requires_grad for name, p in base_of(model).named_parameters() if "lora" not in name)
    assert not frozen & {id(p) for p in trainable(model).values()}


def test_nothing_to_score_is_refused():
    with pytest.raises(ImprintError, match="record '0' has no token to score"):
        token_stats(build("gpt2"), records([1]), 100)


def test_masked_out_tokens_keep_the_moments_finite():
    """A model that gives a token no chance (logit -inf) has finite moments for the others."""
    model = build("gpt2")
    head = model.get_output_embeddings()
    biased = torch.nn.Linear(32, VOCABULARY)
    with torch.no_grad():
        biased.weight.copy_(head.weight)
        biased.bias.zero_()
        biased.bias[7] = -torch.inf
    model.set_output_embeddings(biased)
    texts = [r for r in records([12, 9]) if not (r.ids == 7).any()]
    stats = token_stats(model, texts, 100)
    assert np.isfinite(stats.mean).all()
    assert np.isfinite(stats.std).all()


@pytest.mark.parametrize("method", list(METHODS))
def test_sixteen_bits(method, tmp_path):
    """A base in bfloat16: what trains is float32, the base and the untrained tuner score alike, gradients flow."""
    build("llama").save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).requires_grad_(False)
    texts = records([30, 12, 25])
    base = token_stats(model, texts, 100)
    spec = resolve_method(MethodSpec(name=method, options={}), 32, None)
    model = METHODS[method].attach(model, spec.options)
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    if method in ("head", "lora"):
        np.testing.assert_array_equal(token_stats(model, texts, 100).logp, base.logp)
    if method == "full":  # float32 weights carry the residual stream in float32: the same within bfloat16's rounding
        np.testing.assert_allclose(token_stats(model, texts, 100).logp, base.logp, atol=0.1)
    np.testing.assert_allclose(base.logp, token_stats(build("llama"), texts, 100).logp, atol=0.3)
    backward(forward_of(model), [texts[:1]], 100, Clock(torch.device("cpu")))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable(model).values())


@pytest.mark.parametrize("name", list(CONFIGS))
def test_kept_hidden_states_give_the_oracle(name):
    """FT head from hidden states computed once, after its weights have moved, scores like the whole model."""
    model = build(name)
    spec = resolve_method(MethodSpec(name="head", options={}), 32, None)
    model = METHODS["head"].attach(model, spec.options)
    texts = records([2, 40, 7, 3, 23]) + [dataclasses.replace(r, id=f"p{r.id}") for r in records([9, 30], 1, prompt=6)]
    forward = kept_forward(model, features(model, texts, budget=70))
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(0.05 * torch.randn_like(model.get_output_embeddings().weight))
    stats = token_stats(model, texts, 50, forward=forward)
    want = np.concatenate([oracle(model, record)[0] for record in texts])
    np.testing.assert_allclose(stats.logp, want, atol=TOLERANCE, rtol=0)
    chosen, gradients = [texts[4], texts[0]], []
    for way in (forward_of(model), forward):
        model.zero_grad()
        backward(way, [chosen], 100, Clock(torch.device("cpu")))
        gradients.append(model.get_output_embeddings().weight.grad.clone())
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-5)
