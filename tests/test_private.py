"""Private training: each record's gradient is its own, every step is the textbook's, and ε is what it is said to be."""

from __future__ import annotations

import math
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm

from imprint.data.tokens import Encoded
from imprint.engine.clock import Clock
from imprint.engine.features import features, kept_forward
from imprint.engine.forward import forward_of
from imprint.errors import ImprintError, UsageError
from imprint.spec import Privacy, TrainSpec
from imprint.tuning import per_sample, private
from imprint.tuning.methods import METHODS
from imprint.tuning.models import trainable
from imprint.tuning.per_sample import alone, check, together, way_for
from imprint.tuning.private import PrivateTrainer, epsilon, noise_multiplier, require, train_privately
from imprint.tuning.train import Trainer, schedule
from imprint.tuning.train import train as train_openly
from tests.test_training import ROOM, records, same, tuned, weights
from tests.tiny_models import VOCABULARY

pytest.importorskip("opacus")
HOOKED = ["lora", "prefix", "prompt", "p_tuning"]


@pytest.fixture(autouse=True)
def given_noise(monkeypatch):
    """Finding the noise takes seconds: but where that is tested, it is given."""
    monkeypatch.setattr(private, "noise_multiplier", lambda *_: 0.5)


def trainer(model, texts=None, seed=0, clip=1.0, rate=1e-3, **settings):
    dp = Privacy(epsilon=8, clip=clip)
    spec = TrainSpec(**{"epochs": 2, "batch_size": 4, "dp": dp, **settings})
    return PrivateTrainer(model, texts or records(), spec, rate, seed)


def train(work, done=0, budget=ROOM, progress=None):
    return [report for [report] in train_privately([work], forward_of(work.model), budget, done, progress)]


def plain(model, record):
    """(gradients of one text's mean loss, [scored] its losses), by autograd through the model's own code."""
    ids = torch.from_numpy(record.ids).long()
    logp = model(input_ids=ids[None]).logits[0, -len(ids) :].log_softmax(-1)
    nll = -logp[:-1].gather(-1, ids[1:, None])[record.scored[1:], 0]
    parameters = list(trainable(model).values())
    return torch.autograd.grad(nll.mean(), parameters, allow_unused=True, materialize_grads=True), nll.detach()


def size(gradients):
    return math.sqrt(sum(float(one.double().square().sum()) for one in gradients))


# ---- each record's own gradient ----


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mixtral"])
@pytest.mark.parametrize("method", list(METHODS))
def test_gradients_are_each_records_own(method, architecture):
    """Of every trained parameter, padding and prompts among the texts; the model as it was before and afterwards."""
    model, texts = tuned(method, architecture), records(6, prompt=3)
    forward, before, found = forward_of(model), weights(model), {}
    way = way_for(model, forward, texts, ROOM)
    assert way is (together if method in HOOKED and (method, architecture) != ("lora", "mixtral") else alone)
    parameters = trainable(model)
    with way(model, forward, 60, Clock(torch.device("cpu"))) as passes:
        for which, _ in passes(texts):
            for place, n in enumerate(which):
                found[n] = [p.grad_sample[place].clone() for p in parameters.values()]
            per_sample.forget(parameters.values())
    assert sorted(found) == list(range(6))
    for n, text in enumerate(texts):
        wanted, _ = plain(model, text)
        whole = size(wanted)
        for name, one, other in zip(parameters, found[n], wanted, strict=True):
            assert size([one - other]) <= 1e-4 * whole, name
    assert same(before, weights(model))
    assert "get_prompt" not in vars(model)
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


def test_head_on_kept_states():
    model = tuned("head")
    texts = records()
    check(model, kept_forward(model, features(model, texts, ROOM)), texts, ROOM, alone)


def test_layers_that_see_no_records_are_tuned_one_record_at_a_time():
    """OPT puts the tokens of all records in one row before its feed-forward layers, and not before its attention."""
    for placement, wanted in (("both", alone), ("attention", together)):
        model = tuned("lora", "opt", placement=placement)
        assert way_for(model, forward_of(model), records(), ROOM) is wanted


@pytest.mark.parametrize("method", ["prompt", "p_tuning"])
def test_virtual_tokens_computed_once_for_a_batch_are_found_out(method, monkeypatch):
    """As PEFT itself computes them."""
    monkeypatch.setattr(per_sample, "prompts_apart", lambda model: nullcontext())
    model = tuned(method)
    with pytest.raises(ImprintError, match=rf"train\.dp: {method} cannot .*LlamaForCausalLM: .*prompt_encoder"):
        check(model, forward_of(model), records(), ROOM, together)


def spoiled(change):
    """A way whose gradients are changed."""

    @contextmanager
    def way(model, forward, budget, clock):
        with together(model, forward, budget, clock) as passes:

            def wrong(texts):
                for which, loss in passes(texts):
                    for name, parameter in trainable(model).items():
                        parameter.grad_sample = change(name, parameter.grad_sample)
                    yield which, loss

            yield wrong

    return way


@pytest.mark.parametrize(
    ("change", "parameter"),
    [
        (lambda name, g: g.roll(1, 0), r"\S+"),  # a neighbour's
        (lambda name, g: g.mean(0, keepdim=True).expand_as(g), r"\S+"),  # everybody's
        (lambda name, g: g * len(g), r"\S+"),  # of a loss that was averaged over the batch
        (lambda name, g: g * 0 if "lora_A" in name else g, r"\S*lora_A\S*"),  # which is 0 while B is
        (lambda name, g: g * (1.01 if "1.self_attn.v_proj.lora_B" in name else 1), r"\S*1.self_attn.v_proj.lora_B\S*"),
        (lambda name, g: g * math.nan, r"\S+"),
        (lambda name, g: None, r"\S+"),
    ],
)
def test_wrong_gradients_are_found_out(change, parameter):
    model = tuned("lora")
    with pytest.raises(ImprintError, match=rf"train\.dp: lora cannot .*the gradient of {parameter} is not"):
        check(model, forward_of(model), records(), ROOM, spoiled(change))


def test_nothing_is_trained_with_wrong_gradients(monkeypatch):
    wrong = spoiled(lambda name, g: g * 2)
    monkeypatch.setattr(per_sample, "together", wrong)
    monkeypatch.setattr(per_sample, "alone", wrong)
    work = trainer(tuned("lora"))
    before = work.state()
    with pytest.raises(ImprintError, match="nothing was trained"):
        train(work)
    assert same(before, work.state())


# ---- what a step is ----


@pytest.mark.parametrize("method", list(METHODS))
def test_equals_a_plain_loop(method):
    """Poisson sampling, each gradient clipped to .5, noise of .5 · .5 on the sum, divided by 10 / 3 expected records,
    AdamW with decay and the schedule; two epochs of three steps."""
    settings = {"weight_decay": 0.1, "warmup": 0.3, "seed": 3, "clip": 0.5}
    work = trainer(tuned(method), records(prompt=3), **settings)
    other = trainer(tuned(method), records(prompt=3), **settings)
    reports, parameters = train(work), list(other.parameters.values())
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.1)
    for epoch in (1, 2):
        losses, tokens = [], 0
        [seed] = np.random.SeedSequence([3, epoch, 2]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(seed))
        drawn = np.random.default_rng([3, epoch, 1]).random((3, 10)) < 1 / 3
        for step in range(3):
            total = [torch.zeros_like(parameter) for parameter in parameters]
            for n in np.flatnonzero(drawn[step]):
                gradients, nll = plain(other.model, other.records[n])
                for one, gradient in zip(total, gradients, strict=True):
                    one += gradient * min(1, 0.5 / size(gradients))
                losses.append(nll)
                tokens += len(other.records[n])
            for parameter, one in zip(parameters, total, strict=True):
                parameter.grad = (one + torch.normal(0, 0.25, one.shape, generator=generator)) / (10 / 3)
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * schedule(other.spec, (epoch - 1) * 3 + step, 6)
            optimizer.step()
        assert reports[epoch - 1].training_loss == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)
        assert reports[epoch - 1].tokens == tokens
    state = work.state()
    for name, parameter in other.parameters.items():
        for key in ("exp_avg", "exp_avg_sq"):
            wanted = optimizer.state[parameter][key]
            torch.testing.assert_close(state[f"optimizer/{key}/{name}"], wanted, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(state[f"weights/{name}"], parameter.detach(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", HOOKED)
def test_without_noise_clipping_and_sampling_it_is_plain_training(method, monkeypatch):
    """Ten texts of one length in one step: a mean over records is then one over tokens."""
    monkeypatch.setattr(private, "noise_multiplier", lambda *_: 0.0)
    rng = np.random.default_rng(0)
    texts = [Encoded(str(n), rng.integers(0, VOCABULARY, 12).astype(np.int32), np.arange(12) > 0, 9) for n in range(10)]
    settings = {"epochs": 1, "batch_size": 10}
    work = trainer(tuned(method), texts, clip=1e9, **settings)
    other = Trainer(tuned(method), texts, TrainSpec(max_grad_norm=1e9, **settings), 1e-3, 0)
    [report] = train(work)
    [[wanted]] = train_openly([other], forward_of(other.model), ROOM)
    assert report.training_loss == pytest.approx(wanted.training_loss, rel=1e-5)
    a, b = work.state(), other.state()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=2e-6, msg=key)


def test_a_record_counts_for_no_more_than_the_norm(monkeypatch):
    """One record, whose gradient is far longer: AdamW's first moment after a step is a tenth of what it was given."""
    monkeypatch.setattr(private, "noise_multiplier", lambda *_: 0.0)
    work = trainer(tuned("lora"), records(1), clip=0.01, epochs=1)
    assert size(plain(work.model, work.records[0])[0]) > 1
    train(work)
    moved = [value for key, value in work.state().items() if "exp_avg/" in key]
    assert 10 * size(moved) == pytest.approx(0.01, rel=1e-3)


def test_a_step_without_records_is_noise_alone(monkeypatch):
    """Of standard deviation noise · norm / expected records = .5 · 3 / (10 / 3) = .45, also where nobody is drawn."""
    work = trainer(tuned("prefix"), clip=3.0, epochs=1)
    monkeypatch.setattr(work, "batches", lambda epoch: [[]])
    train(work)
    [moved] = [10 * value for key, value in work.state().items() if "exp_avg/" in key]
    assert moved.numel() == 4 * 2 * 2 * 16
    assert float(moved.std()) == pytest.approx(0.45, rel=0.15)


def test_sampling():
    """Each record by itself, once an epoch on average: over 200 epochs of 10 steps, rate 1 / 10."""
    work = trainer(tuned("head"), records(40), epochs=200)
    drawn = np.array([[[t in step for t in work.records] for step in work.batches(e + 1)] for e in range(200)])
    assert drawn.shape == (200, 10, 40)
    assert drawn.mean() == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / drawn.size))
    sizes = drawn.sum(2).reshape(-1)  # binomial: 40 · .1 · .9 = 3.6
    assert sizes.var() == pytest.approx(3.6, rel=0.2)
    again = trainer(tuned("head"), records(40), epochs=200)
    assert [[r.id for r in step] for step in work.batches(5)] == [[r.id for r in step] for step in again.batches(5)]
    assert work.batches(5) != work.batches(6)


# ---- memory and interruptions change nothing ----


@pytest.mark.parametrize("method", ["lora", "p_tuning"])
def test_packing_changes_nothing(method, monkeypatch):
    roomy, tight, few = (trainer(tuned(method), epochs=1) for _ in range(3))
    train(roomy)
    train(tight, budget=26)
    numbers = sum(parameter.numel() for parameter in few.parameters.values())
    monkeypatch.setitem(per_sample.GRADIENTS, "cpu", 2 * numbers)
    train(few)
    a = roomy.state()
    for key, value in a.items():
        torch.testing.assert_close(value, tight.state()[key], rtol=1e-3, atol=2e-5, msg=key)
        torch.testing.assert_close(value, few.state()[key], rtol=1e-3, atol=2e-5, msg=key)


@pytest.mark.parametrize(("method", "options"), [("lora", {"dropout": 0.3}), ("p_tuning", {}), ("head", {})])
def test_resumes_to_the_bit(method, options):
    whole = trainer(tuned(method, **options))
    reports = train(whole)
    first = trainer(tuned(method, **options), epochs=2)
    run = train_privately([first], forward_of(first.model), ROOM)
    next(run)
    state = first.state()
    rest = trainer(tuned(method, seed=1, **options))
    for name, parameter in rest.model.named_parameters():  # another start, the same base
        parameter.data.copy_(dict(first.model.named_parameters())[name])
    rest.restore(state)
    [report] = train(rest, done=1)
    assert same(whole.state(), rest.state())
    assert report.training_loss == reports[1].training_loss


def test_other_seeds_draw_other_noise():
    a, b = (trainer(tuned("lora"), seed=seed) for seed in (0, 1))
    train(a)
    train(b)
    assert not same(a.state(), b.state())


def test_progress_counts_the_tokens_that_were_drawn():
    seen = []
    work = trainer(tuned("prompt"))
    reports = train(work, progress=seen.append)
    assert len(seen) == 6
    assert sum(seen) == sum(report.tokens for report in reports)


def test_a_loss_that_is_not_finite_moves_nothing(monkeypatch):
    monkeypatch.setattr(private, "way_for", lambda *_: alone)
    work = trainer(tuned("head"))
    next(iter(work.parameters.values())).data[0, 0] = math.inf
    before = work.state()
    [report] = train(work)
    assert "stopped being finite in epoch 1" in report.diverged
    assert same(before, work.state())


# ---- the guarantee ----


def exact(noise, delta, steps):
    """ε of so many normal mechanisms on all records, which are one (Balle & Wang 2018; Dong et al. 2022)."""
    mu = math.sqrt(steps) / noise

    def excess(e):
        return norm.cdf(mu / 2 - e / mu) - math.exp(e + norm.logcdf(-mu / 2 - e / mu)) - delta

    return brentq(excess, 0, 1000)


@pytest.mark.parametrize(("target", "slack"), [(0.5, 0.03), (8.0, 0.03), (40.0, 0.12)])
def test_epsilon_without_sampling_is_the_normal_mechanisms(target, slack):
    """Above the truth and close to it; by moments (beyond ε = 20) less close."""
    noise = noise_multiplier(target, 1e-3, 1.0, 5)
    claimed = epsilon(noise, 1e-3, 1.0, 5, target)
    assert 0.99 * target <= claimed <= target
    assert claimed * (1 - slack) <= exact(noise, 1e-3, 5) <= claimed


@pytest.mark.parametrize(("noise", "rate"), [(0.5, 0.25), (1.0, 0.05)])
def test_epsilon_of_one_sampled_step(noise, rate):
    """Outputs x are N(0, σ²) without the record and (1 - q) N(0, σ²) + q N(1, σ²) with it; those above x* = 1/2 +
    σ² ln((e^ε - 1 + q) / q) are more than e^ε times likelier with it, and δ is what they are likelier together."""

    def excess(e):
        least = 0.5 + noise**2 * math.log((math.exp(e) - 1 + rate) / rate)
        without, given = norm.sf(least / noise), norm.sf((least - 1) / noise)
        return (1 - rate) * without + rate * given - math.exp(e) * without - 1e-3

    true = brentq(excess, 1e-6, 20)
    assert 0.97 * epsilon(noise, 1e-3, rate, 1, true) <= true <= epsilon(noise, 1e-3, rate, 1, true)


def test_epsilon_is_spent_over_all_epochs(monkeypatch):
    monkeypatch.setattr(private, "noise_multiplier", noise_multiplier)
    work = trainer(tuned("head"), records(12), batch_size=4, epochs=2)
    assert work.delta == 1 / 24
    assert work.rate == 1 / 3
    assert work.spent(0) == 0 < work.spent(1) < work.spent(2) <= 8
    assert work.spent(2) >= 0.99 * 8
    assert work.noise < noise_multiplier(8.0, 1 / 24, 1.0, 6)  # sampling helps


def test_a_stated_delta():
    spec = TrainSpec(dp=Privacy(epsilon=8, delta=1e-5))
    assert PrivateTrainer(tuned("head"), records(), spec, 1e-3, 0).delta == 1e-5


def test_too_little_epsilon():
    with pytest.raises(
        UsageError, match=r"train\.dp: no noise is found to be enough for ε = 1e-07 at δ = 0\.001 over 5 steps: ask"
    ):
        noise_multiplier(1e-7, 1e-3, 1.0, 5)


def test_a_record_twice_is_refused():
    texts = records()
    with pytest.raises(UsageError, match=r"train\.dp: record '3' is tuned on 2 times an epoch.* data\.repeat"):
        trainer(tuned("head"), [*texts, texts[3]])


def test_without_opacus(monkeypatch):
    monkeypatch.setattr(private, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'train\.dp needs Opacus.*pip install "imprint-audit\[dp\]"'):
        require()
    with pytest.raises(UsageError, match="Opacus"):
        trainer(tuned("head"))
