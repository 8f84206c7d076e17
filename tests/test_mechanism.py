"""What a method changes inside a model: distances against naive twins, captures against the model's own numbers."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import stats

from imprint.errors import DataError, ImprintError, UsageError
from imprint.mechanism import drift, loss_shift, observe, prefix_identity
from imprint.mechanism.distance import energy_distance, kolmogorov_smirnov, linear_cka, shift, wasserstein
from imprint.mechanism.observe import states
from imprint.mechanism.prefix import both_sides
from imprint.spec import MethodSpec
from imprint.tuning import virtual
from imprint.tuning.methods import METHODS, resolve_method
from imprint.tuning.models import base_of, shared_copy, trainable
from tests.test_scoring import records
from tests.tiny_models import CONFIGS, build

P = 5
VIRTUAL = ("prefix", "prompt", "p_tuning")
LEARNED_POSITIONS = ("gpt2", "opt")


def tune(base, method, noise=0.05):
    """A tuned model around the base's weights (a copy of them for `full`), its parameters moved by noise."""
    options = {"tokens": P} if method in VIRTUAL else {}
    spec = resolve_method(MethodSpec(name=method, options=options), 32, None)
    torch.manual_seed(1)
    tuned = METHODS[method].attach(copy.deepcopy(base) if method == "full" else shared_copy(base), spec.options).eval()
    with torch.no_grad():
        for parameter in trainable(tuned).values():
            parameter.add_(noise * torch.randn_like(parameter))
    return tuned


# Distances


def test_losses_slide_apart():
    """Both sides start alike; members' losses fall by one nat, non-members' by nothing."""
    rng = np.random.default_rng(0)
    members, nonmembers = rng.normal(3, 0.5, (2, 300))
    found = loss_shift(members, nonmembers, members - 1, nonmembers)
    assert found.members.fall == pytest.approx(1)
    assert found.members.wasserstein == pytest.approx(1)
    assert found.nonmembers.fall == found.nonmembers.wasserstein == 0
    assert found.before.ks.p > 0.05
    assert found.after.ks.p < 1e-20
    assert found.after.wasserstein == pytest.approx(np.abs(np.sort(members - 1) - np.sort(nonmembers)).mean())
    with pytest.raises(DataError, match="300 losses before and 299 after"):
        loss_shift(members, nonmembers, members[1:], nonmembers)


def test_kolmogorov_smirnov_is_the_largest_gap():
    a, b = np.random.default_rng(1).normal(size=(2, 40))
    gaps = [abs((a <= x).mean() - (b <= x).mean()) for x in np.concatenate([a, b])]
    assert kolmogorov_smirnov(a, b).statistic == pytest.approx(max(gaps))
    assert wasserstein(a, b) == pytest.approx(np.abs(np.sort(a) - np.sort(b)).mean())
    with pytest.raises(DataError, match="NaN"):
        wasserstein([math.nan], b)


def naive_energy(x, y):
    def mean(a, b):
        return sum(float(np.linalg.norm(p - q)) for p in a for q in b) / (len(a) * len(b))

    return 2 * mean(x, y) - mean(x, x) - mean(y, y)


def test_energy_distance_equals_a_double_loop():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(9, 3)), rng.normal(size=(14, 3)) + 0.3
    found = energy_distance(x, y, permutations=1)
    assert found.value == pytest.approx(naive_energy(x, y), abs=1e-12)
    assert 0 < found.relative < 1
    line = energy_distance(x[:, :1], y[:, :1], permutations=1)
    assert math.sqrt(line.value) == pytest.approx(stats.energy_distance(x[:, 0], y[:, 0]), abs=1e-12)


@pytest.mark.parametrize("clusters", [False, True])
def test_the_p_value_equals_a_loop_over_the_same_relabellings(clusters):
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(8, 2)), rng.normal(size=(12, 2)) + 0.4
    labels = [*"aabbcdee", *"ffgghijklmno"] if clusters else list(range(20))
    names, where = np.unique(labels, return_inverse=True)
    of_x = np.isin(names, labels[:8])
    both, seen = np.concatenate([x, y]), []
    draws = np.random.default_rng(5).permuted(np.tile(of_x, (199, 1)), axis=1)
    for side in [of_x, *draws]:
        chosen = side[where]
        n, m = chosen.sum(), (~chosen).sum()
        seen.append(n * m / (n + m) * naive_energy(both[chosen], both[~chosen]))
    want = (1 + sum(value >= seen[0] - 1e-9 for value in seen[1:])) / 200
    groups = {"x_groups": labels[:8], "y_groups": labels[8:]} if clusters else {}
    assert energy_distance(x, y, 199, 5, **groups).p == want
    assert 0.005 < want < 0.9


def test_p_is_uniform_without_a_difference_and_small_with_one():
    rng = np.random.default_rng(4)
    p = [energy_distance(*rng.normal(size=(2, 15, 4)), permutations=99, seed=n).p for n in range(200)]
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert energy_distance(rng.normal(size=(30, 4)), rng.normal(size=(30, 4)) + 1).p == 0.001
    wide = energy_distance(rng.normal(size=(60, 4)), 3 * rng.normal(size=(60, 4)))
    assert wide.p == 0.001  # the same mean: not only means are compared


def test_dependent_records_need_their_groups():
    """Ten copies of each of six vectors a side: as 120 records they differ, as 12 clusters they do not."""
    x, y = np.random.default_rng(9).normal(size=(2, 6, 3))
    copies = [np.repeat(side, 10, axis=0) for side in (x, y)]
    groups = [[f"{side}{n}" for n in range(6) for _ in range(10)] for side in "xy"]
    assert energy_distance(*copies).p < 0.01
    clustered = energy_distance(*copies, x_groups=groups[0], y_groups=groups[1])
    assert clustered.p == pytest.approx(energy_distance(x, y).p, abs=0.05)
    assert clustered.p > 0.05
    with pytest.raises(DataError, match="6 groups have records on both sides"):
        energy_distance(*copies, x_groups=groups[0], y_groups=groups[0])
    with pytest.raises(DataError, match="one side only"):
        energy_distance(*copies, x_groups=groups[0])


def test_nothing_moved_is_no_evidence():
    found = energy_distance(np.zeros((5, 3)), np.zeros((7, 3)))
    assert (found.value, found.relative, found.p) == (0, 0, 1)


def test_cka_is_what_it_should_be():
    rng = np.random.default_rng(6)
    for n, d, e in ((50, 4, 7), (6, 9, 5)):  # through features, through records
        x, y = rng.normal(size=(n, d)), rng.normal(size=(n, e))
        centre = np.eye(n) - 1 / n
        k, l = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
        want = np.trace(k @ l) / math.sqrt(np.trace(k @ k) * np.trace(l @ l))
        assert linear_cka(x, y) == pytest.approx(want)
        turn, _ = np.linalg.qr(rng.normal(size=(d, d)))
        assert linear_cka(3 * x @ turn + 5, y) == pytest.approx(want)
        assert linear_cka(x, 0.1 * x @ turn - 2) == pytest.approx(1)
        assert linear_cka(x @ np.diag(np.arange(1, d + 1)), x) < 0.999  # stretching is no rotation
    assert linear_cka([[1.0, 0], [-1, 0], [0, 0], [0, 0]], [[0.0], [0], [1], [-1]]) == 0
    assert math.isnan(linear_cka(np.ones((4, 2)), rng.normal(size=(4, 2))))
    with pytest.raises(DataError, match="4 and 5 rows"):
        linear_cka(np.ones((4, 2)), np.ones((5, 2)))


def test_shift_is_in_units_of_the_spread():
    base = np.array([[0.0, 0], [4, 0], [0, 3], [4, 3]])  # each 2.5 from the centre
    assert shift(base, base + np.array([3, 4])) == pytest.approx(2)
    assert shift(base, base[::-1]) == 0
    assert shift(base[:1], base[:1]) == 0
    assert shift(base[:1], base[:1] + 1) == math.inf
    with pytest.raises(DataError, match="2 and 1"):
        shift(base, base[:, :1])
    with pytest.raises(DataError, match="1 of 4 values are not finite"):
        shift(base, [[0, 0], [math.nan, 1]])


# Capture

OUTPUT = ("o_proj", "c_proj", "dense", "out_proj")


def own_outputs(model, ids):
    """[T, H · D] per layer: what meets the attention's output projection under the model's own attention."""
    found, hooks = [], []
    for name, module in base_of(model).named_modules():
        if name.rpartition(".")[2] in OUTPUT and "att" in name.rpartition(".")[0].rpartition(".")[2]:
            hooks.append(module.register_forward_pre_hook(lambda _, args: found.append(args[0][0])))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("length", [23, 70])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_capture_is_what_the_model_computes(name, length):
    """Attention from the captured queries, keys and values is each layer's own output; 70 exceeds the windows."""
    tuned = tune(build(name), "prefix", noise=0.2)
    ids = torch.from_numpy(records([length])[0].ids.astype(np.int64))[None]
    calls = []
    states(tuned, ids, calls.append)
    own = own_outputs(tuned, ids)
    assert len(own) == len(calls) == 2
    for call, want in zip(calls, own, strict=True):
        assert call.key.shape[2] == length + P
        for sides in (both_sides(call, torch.float32), both_sides(call, torch.float64)):
            for side in (sides.left, sides.right):
                torch.testing.assert_close(side[0].transpose(0, 1).flatten(1).float(), want, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_identity_holds_in_every_layer(name):
    texts = records([2, 40, 7, 70, 23]) + records([30, 12], seed=1, prompt=6)
    found = prefix_identity(tune(build(name), "prefix", noise=0.2), texts)
    assert (found.residual64_L < 1e-12).all()
    assert (found.residual_L < 2e-5).all()
    assert (found.residual_L > found.residual64_L).all()
    assert found.mass_NLH.shape == (7, 2, 4)
    assert found.tokens_N.tolist() == [1, 39, 6, 69, 22, 24, 6]
    assert ((found.mass_NLH > 0) & (found.mass_NLH < 1)).all()
    assert (np.abs(found.bias_LH) <= 1).all()
    alone = [prefix_identity(tune(build(name), "prefix", noise=0.2), [text]).mass_NLH[0] for text in texts]
    np.testing.assert_allclose(found.mass_NLH, alone, atol=1e-6)
    np.testing.assert_allclose(found.mass_NL, np.array(alone).mean(2), atol=1e-6)
    np.testing.assert_allclose(found.mass_LH, np.average(alone, axis=0, weights=found.tokens_N), atol=1e-6)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_prefix_of_real_tokens_is_those_tokens_in_front(name, monkeypatch):
    """The mass on it is the plain model's attention on these tokens, as `eager` returns it."""
    drawn, texts = np.array([5, 60, 7, 33, 9]), records([17, 40, 9])
    monkeypatch.setattr(virtual, "_draw", lambda model, count: torch.from_numpy(drawn))
    base = build(name)
    found = prefix_identity(tune(base, "prefix", noise=0), texts)
    base.set_attn_implementation("eager")
    for record, mass_LH in zip(texts, found.mass_NLH, strict=True):
        ids = torch.from_numpy(np.concatenate([drawn, record.ids]).astype(np.int64))[None]
        attention = torch.stack(base(input_ids=ids, output_attentions=True).attentions)[:, 0]  # [L, H, T, T]
        want = attention[:, :, P:, :P].sum(-1)[..., record.predictors].mean(-1)
        np.testing.assert_allclose(mass_LH, want, atol=1e-5)


def test_the_bias_is_the_mean_cosine_to_the_mean():
    tuned, texts = tune(build("llama"), "prefix", noise=0.5), records([12, 30, 9])
    calls = [[] for _ in texts]
    for record, kept in zip(texts, calls, strict=True):
        states(tuned, torch.from_numpy(record.ids.astype(np.int64))[None], kept.append)
    want = np.empty((2, 4))
    for layer in range(2):
        sides = [both_sides(kept[layer], torch.float64) for kept in calls]
        added = [(s.added / s.mass[..., None])[0, :, r.predictors] for s, r in zip(sides, texts, strict=True)]
        for head in range(4):
            rows = np.concatenate([each[head].numpy() for each in added])
            mean = rows.mean(0)
            want[layer, head] = (rows @ mean / np.linalg.norm(rows, axis=1) / np.linalg.norm(mean)).mean()
    np.testing.assert_allclose(prefix_identity(tuned, texts).bias_LH, want, atol=1e-6)
    assert want.max() < 0.999


def test_one_virtual_token_adds_one_direction():
    options = resolve_method(MethodSpec(name="prefix", options={"tokens": 1}), 32, None).options
    tuned = METHODS["prefix"].attach(build("gpt2"), options)
    np.testing.assert_allclose(prefix_identity(tuned, records([20, 9])).bias_LH, 1, atol=1e-6)


def test_beyond_the_window_there_is_no_prefix():
    """Mistral's 64 keys: a text's 70th token sees none of it, its first sees all."""
    tuned = tune(build("mistral"), "prefix")
    text = records([90])[0]
    late = dataclasses.replace(text, scored=np.arange(90) >= 70)
    found = prefix_identity(tuned, [late])
    assert (found.mass_NLH == 0).all()
    assert np.isnan(found.bias_LH).all()
    assert (found.residual64_L < 1e-12).all()
    assert (prefix_identity(tuned, [text]).mass_NLH > 0).all()


def test_only_a_prefix_has_an_identity():
    with pytest.raises(UsageError, match="the model has no prefix"):
        prefix_identity(tune(build("gpt2"), "prompt"), records([9]))
    with pytest.raises(DataError, match="no record"):
        prefix_identity(tune(build("gpt2"), "prefix"), [])
    with pytest.raises(DataError, match="record '0' cannot be measured: one token"):
        prefix_identity(tune(build("gpt2"), "prefix"), records([1]))


def test_an_attention_that_cannot_be_observed_is_refused(monkeypatch):
    """Bloom's does not go through the interface; a wrong arithmetic is noticed before it is reported."""
    import transformers

    config = transformers.BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4)
    bloom = transformers.AutoModelForCausalLM.from_config(config).requires_grad_(False)
    with pytest.raises(ImprintError, match="BloomForCausalLM cannot be observed"):
        drift(bloom, tune(bloom, "lora"), records([9, 8]), records([7, 6]))
    tuned = tune(build("mistral"), "prefix")
    monkeypatch.setattr(observe.Attended, "_seen", lambda self, q, k: torch.ones(q, k, dtype=torch.bool).tril(k - q))
    with pytest.raises(ImprintError, match="MistralForCausalLM cannot be observed"):
        prefix_identity(tuned, records([80]))  # the window is left out


# Drift


def two_sides_of_texts(lengths=(20, 9, 33, 12, 27, 15)):
    return records(lengths), records(lengths, seed=1)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_an_untrained_adapter_moves_nothing_and_a_trained_one_does(name):
    base, sides = build(name), two_sides_of_texts()
    still = drift(base, tune(base, "lora", noise=0), *sides, permutations=9)
    assert still.virtual == 0
    for side in (still.members, still.nonmembers):
        assert side.attention_NLH.shape == (6, 2, 4)
        assert side.base_NSD.shape == (6, 3, 32)
        assert not side.attention_NLH.any()
        assert np.array_equal(side.base_NSD, side.tuned_NSD)
        assert not side.shift_S.any()
        np.testing.assert_allclose(side.cka_S, 1)
    assert (still.moved.p_S == 1).all()
    moved = drift(base, tune(base, "lora"), *sides, permutations=9)
    for side in (moved.members, moved.nonmembers):
        assert (side.attention_NLH > 0).all()
        assert np.array_equal(side.attention_NLH, side.shifted_NLH)
        assert side.shift_S[0] == 0  # the embeddings are not adapted
        assert (side.shift_S[1:] > 0).all()
        assert (side.cka_S[1:] < 1 - 1e-6).all()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_head_tuning_moves_nothing_inside(name):
    base = build(name)
    tuned = tune(base, "head", noise=1.0)
    found = drift(base, tuned, *two_sides_of_texts(), permutations=9)
    for side in (found.members, found.nonmembers):
        assert not side.attention_NLH.any()
        assert np.array_equal(side.base_NSD, side.tuned_NSD)
    assert not found.moved.value_S.any()


@pytest.mark.parametrize("method", VIRTUAL)
@pytest.mark.parametrize("name", list(CONFIGS))
def test_virtual_tokens_leave_the_first_layer_and_change_the_next(name, method):
    """Content attention is that of the base at the shifted positions in layer 0, and of no base deeper."""
    base = build(name)
    found = drift(base, tune(base, method, noise=0.3), *two_sides_of_texts(), permutations=9)
    assert found.virtual == P
    for side in (found.members, found.nonmembers):
        np.testing.assert_allclose(side.shifted_NLH[:, 0], 0, atol=1e-6)
        assert (side.shifted_NLH[:, 1].mean(0) > 5e-4).all()
        if name in LEARNED_POSITIONS:
            assert (side.attention_NLH[:, 0].mean(0) > 1e-4).all()
        else:
            np.testing.assert_allclose(side.attention_NLH, side.shifted_NLH, atol=2e-5)
            assert np.array_equal(side.base_NSD[:, 0], side.tuned_NSD[:, 0])
        assert (side.shift_S[1:] > 0).all()


def naive_drift(base, tuned, record):
    """One text, `eager`, from the library's own attentions and hidden states: [L, H], [L + 1, D] twice."""
    ids = torch.from_numpy(record.ids.astype(np.int64))[None]
    found = []
    for model in (base, tuned):
        base_of(model).set_attn_implementation("eager")
        with torch.no_grad():
            out = model(input_ids=ids, output_attentions=True, output_hidden_states=True, use_cache=False)
        content = torch.stack(out.attentions)[:, 0, :, -len(record) :, -len(record) :]
        hidden = torch.stack(out.hidden_states)[:, 0, -len(record) :]
        found.append((content / content.sum(-1, keepdim=True), hidden[:, record.predictors].mean(1)))
    gap = (found[0][0] - found[1][0]).abs().sum(-1) / 2
    return gap[..., record.predictors].mean(-1), found[0][1], found[1][1]


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "mistral"])
def test_drift_equals_one_text_at_a_time(name, method, monkeypatch):
    base = build(name)
    tuned = tune(base, method)
    members = records([20, 70, 5]) + records([33, 12], seed=2, prompt=6)
    nonmembers = records([9, 41, 26], seed=1)
    monkeypatch.setattr(observe, "ENTRIES", 80 * 8 * 70)  # several batches, with padding
    found = drift(base, tuned, members, nonmembers, permutations=9)
    for side, texts in ((found.members, members), (found.nonmembers, nonmembers)):
        columns = zip(*(naive_drift(base, tuned, record) for record in texts), strict=True)
        want = [torch.stack(column).numpy() for column in columns]
        for array, expected in zip((side.attention_NLH, side.base_NSD, side.tuned_NSD), want, strict=True):
            np.testing.assert_allclose(array, expected, atol=2e-5, rtol=2e-5)
        for s in range(3):
            assert side.shift_S[s] == pytest.approx(shift(want[1][:, s], want[2][:, s]), abs=1e-4)
            assert side.cka_S[s] == pytest.approx(linear_cka(want[1][:, s], want[2][:, s]), abs=1e-4)
    x, y = (side.tuned_NSD[:, 1] - side.base_NSD[:, 1] for side in (found.members, found.nonmembers))
    assert found.moved.value_S[1] == pytest.approx(naive_energy(x, y), abs=1e-9)
    assert found.control.value_S[1] == pytest.approx(
        naive_energy(found.members.base_NSD[:, 1], found.nonmembers.base_NSD[:, 1]), abs=1e-9
    )


def test_a_displacement_of_members_alone_is_found():
    """Members contain token 7 where non-members contain token 8; the base takes them for the same, tuning moves 7."""
    base = build("llama")
    with torch.no_grad():
        base.get_input_embeddings().weight[7] = base.get_input_embeddings().weight[8]
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.get_input_embeddings().weight[7] += 0.3
    lengths = np.random.default_rng(0).integers(10, 20, 60)
    texts = records(lengths)
    for n, record in enumerate(texts):
        record.ids[record.ids == 7] = 8
        record.ids[[2, 5]] = 7 if n < 30 else 8
    found = drift(base, tuned, texts[:30], texts[30:], permutations=199)
    assert (found.moved.p_S == 1 / 200).all()
    assert (found.control.p_S > 0.05).all()
    assert (found.moved.relative_S > 3 * found.control.relative_S).all()
    none = drift(base, tune(base, "lora"), texts[:30], texts[30:], permutations=199)
    assert (none.moved.p_S > 0.05).all()
    paired = [f"pair {n // 2}" for n in range(60)]
    grouped = drift(base, tuned, texts[:30], texts[30:], 199, 0, paired[:30], paired[30:])
    assert (grouped.moved.p_S < 0.02).all()
    with pytest.raises(DataError, match="every vector needs a group"):
        drift(base, tuned, texts[:30], texts[30:], 199, 0, paired[:29], paired[30:])


def test_rounding_is_no_displacement():
    """Prefix tuning shifts GPT-2's positions: texts of one length move alike, whatever their tokens."""
    base, rng = build("gpt2"), np.random.default_rng(0)
    texts = records([16] * 40)
    for n, record in enumerate(texts):
        record.ids[:] = rng.integers(0, 30, 16) + (30 if n < 20 else 0)  # members' embeddings differ in size and place
    found = drift(base, tune(base, "prefix"), texts[:20], texts[20:], permutations=99)
    assert found.members.shift_S[0] > 0
    assert (found.moved.value_S[0], found.moved.p_S[0]) == (0, 1)
    assert (found.moved.p_S[1:] == 0.01).all()
    assert (found.control.p_S == 0.01).all()  # which says that `moved` means nothing here


@pytest.mark.parametrize("method", list(METHODS))
def test_models_are_left_as_they_were(method):
    """Attention implementation, hooks and weights; dropout is off while measuring."""
    base = build("gpt2")
    tuned = tune(base, method).train()
    before = [
        (model.config._attn_implementation, {k: v.clone() for k, v in model.state_dict().items()})
        for model in (base_of(base), base_of(tuned))
    ]
    sides = two_sides_of_texts()
    found = [drift(base, tuned, *sides, permutations=9) for _ in range(2)]
    assert np.array_equal(found[0].members.tuned_NSD, found[1].members.tuned_NSD)
    for model, (implementation, weights) in zip((base_of(base), base_of(tuned)), before, strict=True):
        assert model.config._attn_implementation == implementation
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        assert not any(module._forward_pre_hooks for module in model.modules() if module is not model)


@pytest.mark.parametrize("method", list(METHODS))
def test_sixteen_bits(method, tmp_path):
    """A base in bfloat16, tuned parameters in float32: the identity holds, an untrained adapter moves nothing."""
    import transformers

    build("llama").save_pretrained(tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).requires_grad_(False)
    tuned = tune(base, method, noise=0)
    found = drift(base, tuned, *two_sides_of_texts(), permutations=9)
    if method in ("head", "lora"):
        assert np.array_equal(found.members.base_NSD, found.members.tuned_NSD)
    if method == "prefix":
        identity = prefix_identity(tuned, records([20, 9]))
        assert (identity.residual64_L < 1e-12).all()
        assert (identity.residual_L < 2e-5).all()  # float32 arithmetic on what the model rounded to 16 bits
    single = drift(build("llama"), tune(build("llama"), method, noise=0), *two_sides_of_texts(), permutations=9)
    np.testing.assert_allclose(found.members.base_NSD, single.members.base_NSD, atol=0.1)
