"""Training: what moves, by how much, and that memory, packing and interruptions change nothing."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from imprint.data.tokens import Encoded
from imprint.engine.features import features, kept_forward
from imprint.engine.forward import forward_of
from imprint.spec import MethodSpec, TrainSpec
from imprint.tuning.methods import METHODS, resolve_method
from imprint.tuning.models import base_of, count_parameters
from imprint.tuning.train import Trainer, schedule
from imprint.tuning.train import train as train_together
from tests import tiny_models
from tests.tiny_models import CONFIGS, VOCABULARY

PRISTINE = copy.deepcopy(CONFIGS)
OPTIONS = {"prefix": {"tokens": 4}, "prompt": {"tokens": 4}, "p_tuning": {"tokens": 4}, "lora": {"rank": 2}}
ROOM = 10_000
WIDTH = 32


def build(architecture, seed=0):
    """With a configuration of its own: `head` unties the two ends and writes that into the configuration."""
    CONFIGS[architecture] = copy.deepcopy(PRISTINE[architecture])
    return tiny_models.build(architecture, seed)


def records(count=10, seed=0, prompt=0):
    """Texts of 5 to 25 random tokens, padding's id 0 and EOS among them."""
    rng = np.random.default_rng(seed)
    made = []
    for n in range(count):
        length = int(rng.integers(5, 26))
        ids = rng.integers(0, VOCABULARY, length).astype(np.int32)
        made.append(Encoded(str(n), ids, np.arange(length) >= max(prompt, 1), 10))
    return made


def tuned(method, architecture="llama", seed=0, **options):
    model = build(architecture, seed)
    spec = resolve_method(MethodSpec(name=method, options=OPTIONS.get(method, {}) | options), WIDTH, None)
    torch.manual_seed(seed)
    return METHODS[method].attach(model, spec.options)


def trainer(model, texts=None, seed=0, rate=1e-3, **settings):
    spec = TrainSpec(**{"epochs": 2, "batch_size": 4, **settings})
    return Trainer(model, texts or records(), spec, rate, seed)


def train(work, done=0, progress=None, budget=ROOM, forward=None):
    """The reports of one run that trains alone."""
    for [report] in train_together([work], forward or forward_of(work.model), budget, done, progress):
        yield report


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- what an optimiser step is ----


@pytest.mark.parametrize("budget", [ROOM, 30])
def test_equals_a_plain_loop(budget):
    """Cross-entropy averaged over all scored tokens of a step, clipping, AdamW with decay, the schedule; six steps."""
    texts, settings = records(10, prompt=3), {"weight_decay": 0.1, "max_grad_norm": 0.5, "warmup": 0.3}
    model = tuned("full")
    work = trainer(model, texts, seed=3, **settings)
    reports = list(train(work, budget=budget))
    plain, losses = build("llama").train().requires_grad_(True), []
    optimizer = torch.optim.AdamW(plain.parameters(), weight_decay=0.1)
    for epoch in (1, 2):
        total, count = 0.0, 0
        order = np.random.default_rng([3, epoch]).permutation(10)
        for step, chosen in enumerate((order[:4], order[4:8], order[8:])):
            rate = [0.5, 1, 1, 0.75, 0.5, 0.25][(epoch - 1) * 3 + step]  # 30% of six steps is two of warmup
            nll = [_nll(plain, texts[n]) for n in chosen]
            tokens = sum(len(x) for x in nll)
            optimizer.zero_grad()
            (sum(x.sum() for x in nll) / tokens).backward()
            nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * rate
            optimizer.step()
            total, count = total + sum(x.detach().sum().item() for x in nll), count + tokens
        losses.append(total / count)
    assert [r.training_loss for r in reports] == pytest.approx(losses, rel=1e-5)
    state = work.state()
    for name, parameter in plain.named_parameters():
        moments = optimizer.state[parameter]
        for key in ("exp_avg", "exp_avg_sq"):  # gradients themselves: AdamW's first steps hide their scale
            torch.testing.assert_close(state[f"optimizer/{key}/{name}"], moments[key], rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(state[f"weights/{name}"], parameter.detach(), rtol=0, atol=2e-5)


def _nll(model, record):
    """[scored] of one text alone, unpadded."""
    ids = torch.from_numpy(record.ids).long()
    logp = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    return -logp[:-1].gather(-1, ids[1:, None])[record.scored[1:], 0]


def test_reports_count_tokens_and_steps():
    texts = records(10)
    work = trainer(tuned("head"), texts)
    assert work.steps == 3
    seen = []
    [first, second] = train(work, progress=seen.append)
    assert (first.epoch, second.epoch) == (1, 2)
    assert first.tokens == second.tokens == sum(len(r) for r in texts)
    assert sum(seen) == first.tokens + second.tokens


# ---- memory changes nothing ----


@pytest.mark.parametrize("method", list(METHODS))
def test_packing_changes_nothing(method):
    """Llama, since it has no dropout. Weights, moments and losses agree within rounding."""
    roomy, tight = trainer(tuned(method)), trainer(tuned(method))
    for one, other in zip(train(roomy), train(tight, budget=26), strict=True):
        assert one.training_loss == pytest.approx(other.training_loss, abs=1e-5)
    a, b = roomy.state(), tight.state()
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-5, msg=key)


def test_packing_changes_nothing_where_the_base_has_dropout():
    """GPT-2's configuration asks for dropout; memory is no part of a run's identity, so it must not draw the masks."""
    losses = []
    for budget in (ROOM, 26):
        work = trainer(tuned("prompt", "gpt2"), epochs=1)
        losses += [report.training_loss for report in train(work, budget=budget)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_kept_hidden_states_train_like_the_whole_model(architecture):
    """FT head on features computed once, against every text through the whole model at every step."""
    texts = records(8)
    plain, kept = (trainer(tuned("head", architecture), texts) for _ in range(2))
    forward = kept_forward(kept.model, features(kept.model, texts, budget=60))
    for one, other in zip(train(plain), train(kept, forward=forward), strict=True):
        assert one.training_loss == pytest.approx(other.training_loss, rel=1e-5)
    for name, parameter in plain.parameters.items():
        torch.testing.assert_close(parameter, kept.parameters[name], rtol=0, atol=1e-5)


# ---- seeds and resuming ----


@pytest.mark.parametrize("method", list(METHODS))
def test_one_seed_gives_one_result_and_another_seed_another(method):
    ends = []
    for seed in (1, 1, 2):
        work = trainer(tuned(method, "gpt2"), seed=seed, epochs=1)
        list(train(work))
        ends.append(work.state())
    assert same(ends[0], ends[1])
    assert not same(ends[0], ends[2])


@pytest.mark.parametrize(
    ("method", "options"),
    [("full", {}), ("head", {}), ("lora", {"dropout": 0.3}), ("prefix", {}), ("prompt", {}), ("p_tuning", {})],
)
def test_resuming_equals_going_on_to_the_bit(method, options):
    """GPT-2 with dropout: the masks of an epoch must not depend on the epochs before it."""
    straight = trainer(tuned(method, "gpt2", **options), epochs=3)
    states = []
    for _ in train(straight):
        states.append(straight.state())
    for done in (1, 2):
        again = trainer(tuned(method, "gpt2", seed=5, **options), epochs=3)  # other initial values, all replaced
        if method != "full":
            _put_back(again, straight)
        again.restore(states[done - 1])
        torch.manual_seed(99 + done)
        reports = list(train(again, done))
        assert [r.epoch for r in reports] == [*range(done + 1, 4)]
        assert same(again.state(), states[2])


def _put_back(again, straight):
    """Give `again` the frozen weights of `straight`, as loading the same base would."""
    frozen = {name: p for name, p in straight.model.named_parameters() if not p.requires_grad}
    with torch.no_grad():
        for name, parameter in again.model.named_parameters():
            if not parameter.requires_grad:
                parameter.copy_(frozen[name])


def test_resuming_takes_parameters_that_no_gradient_reached():
    """Some models hold parameters their language modelling never uses; AdamW keeps no moments for them."""
    states = []
    for _ in range(2):
        model = tuned("full")
        model.unused = nn.Parameter(torch.ones(3))
        work = trainer(model, epochs=2)
        if states:
            work.restore(states[0])
        for _ in train(work, len(states[:1])):
            states.append(work.state())
    assert same(states[-1], states[1])


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_virtual_tokens_start_from_words_drawn_by_the_seed(method):
    starts = [next(iter(trainer(tuned(method, seed=seed, tokens=8)).parameters.values())) for seed in (0, 1, 1)]
    assert torch.equal(starts[1], starts[2])
    assert len(starts[0].unique(dim=0)) > 4  # not one word eight times
    words = build("llama", 1).get_input_embeddings().weight
    if method == "prompt":
        assert all((words == row).all(1).any() for row in starts[1])


# ---- what moves ----


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "opt", "mixtral"])
def test_only_what_should_train_changes(architecture, method):
    """Everything trainable moves, and every other weight is the same to the bit. GPT-2 and OPT tie their head."""
    before = weights(build(architecture))
    model = tuned(method, architecture)
    start = weights(model)
    work = trainer(model, epochs=2, rate=1e-2)
    list(train(work))
    after = weights(model)
    moved = {name for name in after if not torch.equal(after[name], start[name])}
    assert moved == set(work.parameters)
    if method != "full":
        base = {k.replace(".base_layer", ""): p for k, p in weights(base_of(model)).items() if "lora_" not in k}
        assert before.keys() - base.keys() == set()
        assert all(torch.equal(base[name], before[name]) for name in before if name not in moved)


def test_the_head_leaves_a_tied_embedding_alone():
    model = tuned("head", "gpt2")
    before = model.get_input_embeddings().weight.clone()
    list(train(trainer(model, rate=1e-2)))
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert not torch.equal(model.get_output_embeddings().weight, before)


@pytest.mark.parametrize("method", list(METHODS))
def test_training_lowers_the_loss(method):
    """Eight texts, thirty epochs: each method learns something; those with room enough learn them by heart."""
    rate = {"full": 1e-2, "head": 3e-2, "lora": 3e-2, "prefix": 0.1, "prompt": 0.1, "p_tuning": 2e-2}[method]
    reports = list(train(trainer(tuned(method), records(8), epochs=30, rate=rate, schedule="constant")))
    lower = {"full": 2.0, "head": 1.0, "lora": 1.0, "prefix": 0.3, "prompt": 0.2, "p_tuning": 0.2}[method]
    assert reports[-1].training_loss < reports[0].training_loss - lower


# ---- divergence ----


def test_weights_that_are_not_numbers_are_reported_not_raised():
    model = tuned("full")
    with torch.no_grad():
        model.get_output_embeddings().weight[3, 3] = math.nan
    work = trainer(model, epochs=5)
    [report] = train(work)
    assert report.diverged == "the loss stopped being finite in epoch 1"
    assert math.isnan(report.training_loss)


def test_a_huge_learning_rate_is_reported_once_and_is_the_end():
    reports = list(train(trainer(tuned("full"), epochs=9, rate=1e30)))
    assert reports[-1].diverged
    assert not any(report.diverged for report in reports[:-1])
    assert all(math.isfinite(report.training_loss) for report in reports[:-1])
    assert len(reports) < 9


def test_an_infinite_gradient_moves_nothing():
    model = tuned("lora")
    work = trainer(model, epochs=1)
    hook = next(iter(work.parameters.values())).register_hook(lambda gradient: gradient * math.inf)
    before = weights(model)
    [report] = train(work)
    hook.remove()
    assert "gradient stopped being finite" in report.diverged
    assert same(weights(model), before)


# ---- schedules ----


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"schedule": "constant", "warmup": 0}, [1, 1, 1, 1, 1]),
        ({"schedule": "linear", "warmup": 0}, [1, 0.8, 0.6, 0.4, 0.2]),
        ({"schedule": "cosine", "warmup": 0}, [1, 0.9045085, 0.6545085, 0.3454915, 0.0954915]),  # ½(1 + cos(kπ/5))
        ({"schedule": "constant", "warmup": 0.4}, [0.5, 1, 1, 1, 1]),
        ({"schedule": "linear", "warmup": 0.4}, [0.5, 1, 1, 2 / 3, 1 / 3]),
        ({"schedule": "cosine", "warmup": 0.4}, [0.5, 1, 1, 0.75, 0.25]),  # ½(1 + cos(kπ/3))
        ({"schedule": "linear", "warmup": 0.01}, [1, 1, 0.75, 0.5, 0.25]),  # a started step is a step
        ({"schedule": "linear", "warmup": 0.99}, [0.2, 0.4, 0.6, 0.8, 1]),
    ],
    ids=str,
)
def test_schedules(settings, wanted):
    spec = TrainSpec(**settings)
    assert [schedule(spec, step, 5) for step in range(5)] == pytest.approx(wanted, abs=1e-7)


def test_a_single_step_is_made_at_the_peak():
    for kind in ("constant", "linear", "cosine"):
        for warmup in (0, 0.05, 0.99):
            assert schedule(TrainSpec(schedule=kind, warmup=warmup), 0, 1) == 1


def test_the_rate_follows_the_schedule_over_all_epochs():
    work = trainer(tuned("head"), records(8), rate=0.5, warmup=0.25)
    rates = []
    work.optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    list(train(work))
    assert rates == pytest.approx([0.5, 0.5, 1 / 3, 1 / 6])


# ---- how much trains ----

D, V, P, R, L = 32, VOCABULARY, 4, 2, 2
GPT2 = {"attention": (D + 3 * D) + (D + D), "projection": (D + 4 * D) + (4 * D + D)}  # in + out of each matrix
KV = D // 2  # two of four heads
LLAMA = {"attention": 2 * (D + D) + 2 * (D + KV), "projection": 3 * (D + 48)}


@pytest.mark.parametrize(
    ("architecture", "method", "options", "wanted"),
    [
        ("gpt2", "head", {}, V * D),
        ("llama", "head", {}, V * D),
        ("gpt2", "lora", {"placement": "attention"}, L * R * GPT2["attention"]),
        ("gpt2", "lora", {"placement": "projection"}, L * R * GPT2["projection"]),
        ("gpt2", "lora", {"placement": "both", "rank": 5}, L * 5 * sum(GPT2.values())),
        ("llama", "lora", {"placement": "attention"}, L * R * LLAMA["attention"]),
        ("llama", "lora", {"placement": "both"}, L * R * sum(LLAMA.values())),
        ("llama", "lora", {"placement": "q_proj"}, L * R * (D + D)),
        ("gpt2", "prefix", {}, P * L * 2 * D),
        ("llama", "prefix", {}, P * L * 2 * KV),
        ("gpt2", "prompt", {}, P * D),
        ("llama", "prompt", {"tokens": 9}, 9 * D),
        ("gpt2", "p_tuning", {}, P * D + 3 * D * D + 3 * D),
        ("llama", "p_tuning", {"encoder_width": 8}, P * D + (D * 8 + 8) + (8 * 8 + 8) + (8 * D + D)),
    ],
)
def test_trainable_parameters_by_hand(architecture, method, options, wanted):
    assert count_parameters(tuned(method, architecture, **options))[0] == wanted


def test_full_trains_everything_once():
    """A tied matrix is one matrix: V·D once, positions, two blocks, the last norm."""
    block = 2 * 2 * D + (3 * D * D + 3 * D) + (D * D + D) + (4 * D * D + 4 * D) + (4 * D * D + D)
    assert count_parameters(tuned("full", "gpt2")) == (V * D + 96 * D + L * block + 2 * D,) * 2


def test_untying_counts_the_head_a_second_time():
    trains, everything = count_parameters(tuned("head", "gpt2"))
    assert everything == count_parameters(build("gpt2"))[1] + V * D
    assert trains == V * D
