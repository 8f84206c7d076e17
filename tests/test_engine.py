"""The engine: every quick way against the plain one it stands for."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as t
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from imprint.data.tokens import Encoded
from imprint.engine import features as features_module
from imprint.engine import forward as forward_module
from imprint.engine import layout as layout_module
from imprint.engine import output as output_module
from imprint.engine.clock import Clock
from imprint.engine.compiled import compiled
from imprint.engine.costs import costs_of
from imprint.engine.features import features, kept_forward
from imprint.engine.forward import forward_of, joined, may_join, padded_hidden
from imprint.engine.layout import layout, rounded
from imprint.engine.memory import blocks_of, kept_bytes
from imprint.engine.output import OutputLayer, output_layer
from imprint.engine.products import LowRank, Updates, engaged, exchanges, product
from imprint.scoring.score import token_stats
from imprint.spec import MethodSpec, TrainSpec
from imprint.tuning.methods import METHODS, resolve_method
from imprint.tuning.models import shared_copy, trainable
from imprint.tuning.train import Trainer, backward, train
from tests.test_scoring import check, records, tuned
from tests.tiny_models import CONFIGS, VOCABULARY, build

CPU = torch.device("cpu")


def gradients(model, texts, budget=1000, forward=None):
    """Of every trainable parameter, of the mean loss over the scored tokens of `texts`."""
    model.zero_grad()
    backward(forward or forward_of(model), [texts], budget, Clock(CPU))
    return {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}


def plain_gradients(model, texts):
    """The same by the model's own full logits, one text at a time."""
    model.zero_grad()
    count = sum(int(r.scored.sum()) for r in texts)
    for record in texts:
        ids = torch.from_numpy(record.ids).long()[None]
        logits = model(input_ids=ids).logits[0, -len(record) :]
        nll = F.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")[torch.from_numpy(record.scored[1:])]
        (nll.sum() / count).backward()
    return {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}


# ---- products ----


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 40), st.integers(1, 50)),
    conv=st.booleans(),
    bias=st.booleans(),
    trains=st.booleans(),
    cut=st.floats(0, 1),
    ranks=st.tuples(st.integers(0, 5), st.integers(0, 5)),
)
def test_linear_layers_and_their_updates_equal_plain_arithmetic(shape, conv, bias, trains, cut, ranks):
    """Forward and every gradient, for two runs in one row, either of which may have no update here."""
    count, width, out = shape
    torch.manual_seed(count + 100 * width)
    module = Conv1D(out, width) if conv else nn.Linear(width, out, bias=bias)
    module.requires_grad_(trains)
    border = round(cut * count)
    spans = [(0, border), (border, count)]
    updates = [
        LowRank(torch.randn(r, width).requires_grad_(), torch.randn(out, r).requires_grad_(), 0.7) if r else None
        for r in ranks
    ]
    x = torch.randn(1, count, width, requires_grad=True)
    g = torch.randn(1, count, out)
    leaves = [x, *(m for u in updates if u for m in (u.a, u.b)), *(p for p in module.parameters() if trains)]
    holder = nn.Module()
    holder.get_output_embeddings = lambda: None
    holder.inner = module
    with engaged(exchanges(holder, {module}), Updates(spans, {module: updates})):
        found = module(x)
        found_grads = torch.autograd.grad(found, leaves, g, allow_unused=True)
    weight = module.weight if not conv else module.weight.t()
    parts = []
    for (begin, end), update in zip(spans, updates, strict=True):
        y = x[:, begin:end] @ weight.t()
        parts.append(y if update is None else y + update.scale * (x[:, begin:end] @ update.a.t()) @ update.b.t())
    wanted = torch.cat(parts, 1) + (0 if module.bias is None else module.bias)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    for one, other in zip(found_grads, torch.autograd.grad(wanted, leaves, g, allow_unused=True), strict=True):
        torch.testing.assert_close(
            0 * one if other is None else one, 0 * one if other is None else other, atol=1e-3, rtol=1e-3
        )
    assert type(module) is (Conv1D if conv else nn.Linear)  # given back


def test_products_take_any_strides():
    x, weight = torch.randn(30, 50)[:, ::2], torch.randn(25, 40).t()
    torch.testing.assert_close(product(x, weight), (x.double() @ weight.t().double()).float(), atol=1e-5, rtol=1e-5)
    assert product(x[:0], weight).shape == (0, 40)


def test_activation_and_its_gradient():
    """Against torch's own in float64, far into both tails."""
    model = build("gpt2")
    act = model.transformer.h[0].mlp.act
    x = torch.linspace(-12, 12, 4001).requires_grad_()
    with engaged(exchanges(model, set())):
        found = act(x)
        [slope] = torch.autograd.grad(found.sum(), x)
        with torch.no_grad():
            assert torch.equal(act(x), found)
    exact = x.detach().double().requires_grad_()
    wanted = F.gelu(exact, approximate="tanh")
    torch.testing.assert_close(found.double(), wanted, atol=2e-6, rtol=0)
    torch.testing.assert_close(slope.double(), torch.autograd.grad(wanted.sum(), exact)[0], atol=3e-6, rtol=0)


# ---- the output layer ----


def exact_moments(z, targets):
    logp = z.double().log_softmax(-1)
    p = logp.exp()
    mean = (p * logp).sum(-1)
    deviation = (p * (logp - mean[:, None]).square()).sum(-1).sqrt()
    return logp.gather(-1, targets[:, None])[:, 0], mean, deviation, z.argmax(-1) == targets


@pytest.mark.parametrize("spread", [0.0, 1e-3, 0.3, 3.0, 30.0])
def test_moments_in_pieces_equal_float64(spread):
    """A vocabulary of many pieces, from flat to nearly certain; a row of equal logits has its first token on top."""
    torch.manual_seed(0)
    weight, hidden = torch.randn(5_003, 24), torch.randn(700, 24)
    layer = OutputLayer(weight * spread / 24**0.5)
    z = product(hidden, layer.weight)
    targets = torch.where(torch.arange(700) % 2 == 0, z.argmax(-1), torch.randint(0, 5_003, (700,)))
    found, wanted = layer.moments(hidden, targets), exact_moments(z, targets)
    for one, other in zip(found[:3], wanted[:3], strict=True):
        torch.testing.assert_close(one.double(), other, atol=1e-5, rtol=1e-5)
    assert torch.equal(found[3], wanted[3])


def test_ties_go_to_the_first_token_across_pieces():
    weight = torch.zeros(3_000, 4)
    weight[[5, 9, 1_500, 2_999]] = 1
    targets = torch.tensor([5, 9, 1_500, 2_999, 7])
    assert OutputLayer(weight).moments(torch.ones(5, 4), targets)[3].tolist() == [True, False, False, False, False]


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradient_equal_autograd(trains, cap, bias, monkeypatch):
    monkeypatch.setattr(output_module, "CPU_TOKENS", 64)
    monkeypatch.setattr(output_module, "CPU_VOCABULARY", 100)
    torch.manual_seed(0)
    weight, b = torch.randn(301, 12).requires_grad_(trains), torch.randn(301).requires_grad_(trains) if bias else None
    layer, weights = OutputLayer(weight, b, 0.5, cap), torch.rand(150)
    hidden, targets = torch.randn(150, 12, requires_grad=True), torch.randint(0, 301, (150,))
    z = 0.5 * F.linear(hidden, weight, b)
    z = z if cap is None else cap * torch.tanh(z / cap)
    wanted = F.cross_entropy(z, targets, reduction="none")
    leaves = [hidden, *(p for p in (weight, b) if p is not None and trains)]
    grads = torch.autograd.grad((wanted * weights).sum(), leaves)
    nll, gradient = layer.loss_and_gradient(hidden, targets, weights)
    torch.testing.assert_close(nll, wanted.detach(), atol=1e-5, rtol=1e-5)
    found = [gradient, *(p.grad for p in leaves[1:])]
    for one, other in zip(found, grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert layer.loss_and_gradient(hidden.detach(), targets, weights)[1] is None  # nobody below asks


SCALED = {
    "granite": t.GraniteConfig(logits_scaling=6.5, **CONFIGS["llama"].to_diff_dict() | {"model_type": "granite"}),
    "cohere": t.CohereConfig(logit_scale=0.3, **CONFIGS["llama"].to_diff_dict() | {"model_type": "cohere"}),
}


def scaled(name):
    torch.manual_seed(0)
    config = copy.deepcopy(SCALED[name])
    config.initializer_range = 0.2
    return t.AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)


@pytest.mark.parametrize(("name", "scale"), [("granite", 1 / 6.5), ("cohere", 0.3)])
def test_scales_are_found_in_the_configuration(name, scale):
    model = scaled(name)
    found = output_layer(model)
    assert (found.scale, found.cap, found.opaque) == (pytest.approx(scale), None, None)
    check(model, records([2, 40, 7, 3, 23]), 60)


def test_a_cap_is_found():
    assert (output_layer(build("gemma2")).scale, output_layer(build("gemma2")).cap) == (1.0, 3.0)


class Cubed(t.LlamaForCausalLM):
    """An output that no formula of ours explains."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits**3
        return out


@pytest.mark.parametrize("method", ["lora", "head", "full"])
def test_an_output_that_no_formula_explains_is_computed_by_the_models_own_code(method):
    torch.manual_seed(0)
    model = Cubed(copy.deepcopy(CONFIGS["llama"])).eval().requires_grad_(False)
    model = METHODS[method].attach(model, resolve_method(MethodSpec(name=method), 32, None).options)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert output_layer(model).opaque is not None
    texts = records([2, 40, 7, 3, 23])
    check(model, texts, 60)
    wanted, found = plain_gradients(model, texts), gradients(model, texts)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-5, rtol=1e-3)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max(
            [self.numel, *(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor))]
        )
        return out


def test_no_tensor_of_all_tokens_and_the_vocabulary_is_ever_built():
    """Scoring 1,200 tokens over 20,000 words: nothing larger than a piece, or than the weights themselves."""
    torch.manual_seed(0)
    config = t.GPT2Config(n_layer=1, n_embd=16, n_head=2, n_positions=128, vocab_size=20_000)
    model = t.GPT2LMHeadModel(config).eval().requires_grad_(False)
    forward, texts = (
        forward_of(model),
        [Encoded(str(n), np.full(100, n, np.int32), np.arange(100) > 0, 1) for n in range(12)],
    )
    with Largest() as seen:
        token_stats(model, texts, 10_000, forward=forward)
    assert seen.numel <= max(output_module.CPU_TOKENS * output_module.CPU_VOCABULARY, 20_000 * 16)


def test_compiled_sums_equal_eager_ones():
    z = torch.randn(300, 1024) * 5
    top = z.amax(1)
    wanted = output_module._sums(z.clone(), top)
    for one, other in zip(compiled(output_module._sums, "cpu")(z.clone(), top), wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


# ---- packing ----


@pytest.mark.parametrize("per_call", [0.0, 1e18])
@pytest.mark.parametrize("method", ["full", "lora", "prefix", "prompt"])
@pytest.mark.parametrize("name", ["gpt2", "qwen2", "gemma2", "mixtral"])
def test_attention_in_groups_of_any_size_gives_the_oracle(name, method, per_call, monkeypatch):
    """Every text a call of its own, and all texts in one padded call."""
    monkeypatch.setitem(layout_module.PER_CALL, "cpu", per_call)
    model = tuned(name, method)
    assert forward_of(model).packed is not None
    check(model, records([2, 40, 7, 3, 23, 2, 16, 31]) + records([9, 30, 12], seed=1, prompt=6), budget=120)


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("name", list(CONFIGS))
def test_packed_gradients_equal_the_models_own(name, method):
    model, texts = tuned(name, method), records([2, 21, 7, 3, 12]) + records([9, 15], seed=1, prompt=6)
    wanted = plain_gradients(model, texts)
    for budget in (1000, 30):
        found = gradients(model, texts, budget)
        assert found.keys() == wanted.keys()
        for key in wanted:
            size = wanted[key].abs().max().item()
            torch.testing.assert_close(found[key], wanted[key], atol=1e-5 + 1e-4 * size, rtol=0, msg=f"{key} {budget}")


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 30), max_size=6), min_size=1, max_size=3),
    virtual=st.integers(0, 4),
    spare=st.sampled_from([0.0, 300.0, 1e9]),
)
def test_a_layout_covers_its_row_once(lengths, virtual, spare):
    runs = [(sorted(own, reverse=True), virtual, None) for own in lengths]
    layout_module_value = layout_module.PER_CALL["cpu"]
    layout_module.PER_CALL["cpu"] = spare * 12
    try:
        if not virtual and not any(lengths):
            return
        row = layout(runs, 1, CPU)
    finally:
        layout_module.PER_CALL["cpu"] = layout_module_value
    used = sum(virtual + sum(own) for own in lengths)
    total = rounded(used)
    assert used <= total < used * 1.07 + 8
    assert len(row.position_ids) == row.spans[-1][1] == total
    assert [group.begin for group in row.groups] == [0, *(group.end for group in row.groups)][:-1]
    assert row.groups[-1].end == total
    wanted = [p for own, _, _ in runs for p in [*range(virtual), *(virtual + i for n in own for i in range(n))]]
    assert row.position_ids.tolist() == [*wanted, *range(total - used)]


def test_a_sliding_window_shorter_than_the_texts():
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS["mistral"])
    config.sliding_window, config.initializer_range = 8, 0.2
    model = t.AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
    assert forward_of(model).packed is not None
    check(model, records([2, 40, 7, 3, 23, 31]), 120)


BLOOM = t.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2)


@pytest.mark.parametrize("method", ["full", "head", "lora", "prompt", "p_tuning"])
def test_an_architecture_that_cannot_be_packed_is_padded(method):
    """Bloom adds ALiBi to its attention, which knows nothing of positions that are handed in."""
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(copy.deepcopy(BLOOM)).float().eval().requires_grad_(False)
    spec = resolve_method(MethodSpec(name=method), 32, None)
    model = METHODS[method].attach(model, spec.options)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert forward_of(model).packed is None
    texts = records([2, 21, 7, 3, 12])
    check(model, texts, 60)
    wanted, found = plain_gradients(model.eval(), texts), gradients(model, texts, 30)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-4, rtol=1e-3)


def test_a_wrong_quick_way_is_noticed(monkeypatch):
    """Positions off by one give plausible numbers; the comparison with the plain way rejects them."""
    original = layout_module.layout

    def shifted(*args):
        row = original(*args)
        row.position_ids = row.position_ids + 1
        return row

    monkeypatch.setattr("imprint.engine.packed.layout", shifted)
    model = tuned("gpt2", "lora")
    assert forward_of(model).packed is None
    check(model, records([2, 40, 7]), 60)


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
def test_sixteen_bits_are_packed_too(name, method, tmp_path):
    """Against the plain way in the same precision: positions and masks are the same, rounding is not."""
    build(name).save_pretrained(tmp_path)
    base = t.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).requires_grad_(False)
    model = METHODS[method].attach(base, resolve_method(MethodSpec(name=method), 32, None).options)
    forward, texts = forward_of(model), records([2, 21, 7, 3, 12])
    assert forward.packed is not None
    with torch.no_grad():
        wanted, _ = padded_hidden(model)([texts])
        for hidden in (forward.hidden, forward.checkpoint()):
            found, _ = hidden([texts])
            assert (found - wanted).abs().mean() < 0.03 * wanted.abs().mean()
    found = gradients(model, texts, 1000, forward)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in found.values())
    assert found.keys() == trainable(model).keys()


def test_the_model_is_its_own_again_after_a_pass():
    model = tuned("gpt2", "lora")
    before = {name: type(module) for name, module in model.named_modules()}
    attention = model.config._attn_implementation
    token_stats(model, records([9, 5]), 100)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert model.config._attn_implementation == attention


# ---- several runs on one base ----


def run_of(base, method, seed, texts, **options):
    spec = resolve_method(MethodSpec(name=method, options=options), 32, None)
    torch.manual_seed(seed)
    model = METHODS[method].attach(shared_copy(base), spec.options)
    settings_ = TrainSpec(epochs=2, batch_size=3)
    return Trainer(model, texts, settings_, 3e-3, seed)


def crew_of(base):
    return [
        run_of(base, "lora", 0, records([9, 21, 7, 3, 12, 30, 4]), rank=2),
        run_of(base, "lora", 1, records([5, 11, 17], seed=3), rank=5, placement="attention"),
        run_of(base, "prefix", 2, records([9, 21, 7, 3], seed=4), tokens=3),
        run_of(base, "prompt", 3, records([6, 8, 10, 4, 4, 4], seed=5), tokens=4),
        run_of(base, "p_tuning", 4, records([12, 13], seed=6), tokens=2),
    ]


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "mixtral"])
@pytest.mark.parametrize("budget", [1000, 25])
def test_runs_that_share_passes_end_where_they_end_alone(name, budget):
    """Other methods, ranks, placements, seeds, records and numbers of steps, in one pass and each by itself."""
    methods = [2, 3, 4] if name == "mixtral" else range(5)  # LoRA on fused experts needs modules of its own
    base = build(name)
    alone = [crew_of(base)[n] for n in methods]
    losses = [[r.training_loss for [r] in train([w], forward_of(w.model), 1000)] for w in alone]
    crew = [crew_of(base)[n] for n in methods]
    forwards = [forward_of(w.model) for w in crew]
    assert may_join(forwards)
    together = list(train(crew, joined([w.model for w in crew], forwards[0].output), budget))
    for n, (one, other) in enumerate(zip(crew, alone, strict=True)):
        assert [epoch[n].training_loss for epoch in together] == pytest.approx(losses[n], abs=1e-5)
        for key, value in other.state().items():
            torch.testing.assert_close(one.state()[key], value, rtol=1e-3, atol=2e-5, msg=f"{n} {key}")


def test_a_run_that_diverges_leaves_the_others_alone():
    base = build("llama")
    crew = [crew_of(base)[n] for n in (0, 3)]
    crew[0].peak = 1e38
    forwards = [forward_of(w.model) for w in crew]
    reports = list(train(crew, joined([w.model for w in crew], forwards[0].output), 1000))
    assert reports[0][0].diverged or reports[1][0].diverged
    [alone] = [crew_of(base)[3]]
    losses = [r.training_loss for [r] in train([alone], forward_of(alone.model), 1000)]
    assert [epoch[1].training_loss for epoch in reports] == pytest.approx(losses, abs=1e-5)


def test_adapters_with_dropout_or_on_fused_experts_go_alone():
    base = build("mixtral")
    lora, prompt = run_of(base, "lora", 0, records([9])), run_of(base, "prompt", 0, records([9]), tokens=2)
    assert not may_join([forward_of(lora.model), forward_of(prompt.model)])
    with pytest.raises(ValueError, match="alone"):
        joined([prompt.model, lora.model], forward_of(prompt.model).output)
    dropped = run_of(build("llama"), "lora", 0, records([9]), dropout=0.3)
    assert forward_of(dropped.model).packed is not None
    assert not may_join([forward_of(dropped.model)])


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].leaves_base])
@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_a_lent_base_comes_back_untouched(name, method):
    base = build(name)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    config = base.config.to_dict()
    work = run_of(base, method, 0, records([9, 21, 7, 3]))
    list(train([work], forward_of(work.model), 1000))
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    assert base.state_dict().keys() == before.keys()
    assert base.config.to_dict() == config
    assert not trainable(base)
    again = run_of(base, method, 0, records([9, 21, 7, 3]))
    list(train([again], forward_of(again.model), 1000))
    assert all(torch.equal(value, again.state()[key]) for key, value in work.state().items())


# ---- hidden states kept ----


def test_mapped_hidden_states_are_the_same(monkeypatch, tmp_path):
    """What is too large for memory lies in a file without a name that outlives the process."""
    model, texts = tuned("llama", "head"), records([2, 40, 7, 3, 23])
    in_memory = token_stats(model, texts, 50, forward=kept_forward(model, features(model, texts, 60)))
    monkeypatch.setattr(features_module, "IN_MEMORY", 0)
    kept = features(model, texts, 60, tmp_path)
    assert [file.stat().st_size for file in tmp_path.iterdir()] == [kept.states.numel() * 4]
    mapped = token_stats(model, texts, 50, forward=kept_forward(model, kept))
    np.testing.assert_array_equal(mapped.logp, in_memory.logp)
    del kept, mapped
    assert not list(tmp_path.iterdir())


# ---- memory ----


@pytest.mark.parametrize("method", ["full", "lora", "prefix", "prompt"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "mixtral"])
def test_activations_computed_again_give_the_same_gradients(name, method):
    model, texts = tuned(name, method), records([9, 21, 7, 3])
    forward = forward_of(model)
    wanted = gradients(model, texts, forward=forward)
    kept = kept_bytes(lambda: forward.hidden([texts]), model)
    forward.packed.recompute = blocks_of(forward.packed.host)
    assert len(forward.packed.recompute) == 2
    found = gradients(model, texts, forward=forward)
    assert kept_bytes(lambda: forward.hidden([texts]), model) < 0.6 * kept
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], atol=1e-6, rtol=1e-5)


def test_memory_asks_for_it(monkeypatch):
    model, texts = tuned("llama", "lora"), records([9, 21, 7, 3])
    for free, blocks in ((1 << 30, 0), (1_000, 2), (None, 0)):
        forward = forward_of(model)
        monkeypatch.setattr(forward_module, "free_bytes", lambda device, free=free: free)
        forward.spare_memory(texts, 1000)
        assert len(forward.packed.recompute) == blocks


# ---- accounting ----

D, L, V, FF = 32, 2, VOCABULARY, 48


def test_operations_by_hand():
    """Llama with two of four heads for keys: per block q, o: D², k, v: D²/2, three of D x 48."""
    body = L * (2 * D * D + 2 * D * D // 2 + 3 * D * FF)
    texts = records([5, 3])  # 8 tokens, 6 scored, 15 + 6 pairs
    pairs, attention = 21, L * D
    forward = 2 * body * 8 + 2 * V * D * 6 + 4 * attention * pairs
    full = costs_of(tuned("llama", "full"))
    assert (full.backbone, full.head, full.attention) == (body, V * D, attention)
    assert full.scoring(texts) == forward
    assert full.training(texts, 1) == 2 * forward + 4 * attention * pairs + 2 * body * 8 + 2 * V * D * 6
    lora = costs_of(tuned("llama", "lora"))
    rank = 8 * L * (2 * (D + D) + 2 * (D + D // 2) + 3 * (D + FF))
    assert lora.low_rank == rank
    assert lora.training(texts, 1) == 2 * (forward + 2 * rank * 8) + 4 * attention * pairs + 2 * rank * 8
    prompt = costs_of(tuned("llama", "prompt"))  # five virtual tokens, once a step, and in front of every text
    assert prompt.forward(texts) == forward + 4 * attention * 8 * 5
    assert prompt.training(texts, 2) == 2 * (prompt.forward(texts) + 2 * body * 10) + 4 * attention * (pairs + 40)
    head = costs_of(tuned("llama", "head"), kept=True)
    assert (head.training(texts, 1), head.scoring(texts)) == (4 * V * D * 6, 2 * V * D * 6)


def test_of_a_mixture_a_token_meets_its_chosen_experts():
    """Two of four experts of three matrices D x 48, and the router."""
    body = L * (2 * D * D + D * D + 2 * 3 * D * FF)
    router = L * 4 * D
    assert costs_of(build("mixtral").requires_grad_(True)).backbone in (body, body + router)


def test_the_clock_adds_up_by_part():
    clock = Clock(CPU)
    for _ in range(3):
        with clock("forward"):
            sum(range(1000))
    with clock("backward"):
        pass
    seconds = clock.read()
    assert set(seconds) == {"forward", "backward"}
    assert all(value >= 0 and math.isfinite(value) for value in seconds.values())
    assert clock.read() == {}
