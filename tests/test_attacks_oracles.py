"""The attacks beyond the first six against a loop over texts, on random ragged evidence with ties and repeats."""

from __future__ import annotations

import math
import zlib as zlib_module

import numpy as np
import pytest

from imprint.attacks import evidence_needed, run_attack
from imprint.attacks.perturbed import con_recall, grad_norm, lowercase, neighbourhood, recall
from imprint.attacks.reference import WINDOWS, ez_mia, ref_min_k_plus, wbc
from imprint.attacks.sequence import FEATURES
from imprint.attacks.single import MIN_STD, dc_pdd, surp, zlib_sum
from imprint.attacks.trace import loss_trace
from imprint.types import TokenStats
from tests.test_attacks import Bigrams, mean_of_lowest, renamed

V = 12  # tokens recur within a text
MORE = (zlib_sum, surp, dc_pdd, wbc, ez_mia, ref_min_k_plus, loss_trace)
MORE += (lowercase, neighbourhood, recall, con_recall, grad_norm)
FUNCTIONS = {attack.__name__: attack for attack in MORE}


def ragged(seed: int, lengths, ties: bool) -> TokenStats:
    """Random stats; with ties, log p are multiples of a half and entropies of one."""
    rng = np.random.default_rng(seed)
    R = int(np.sum(lengths))
    logp, mean = -rng.gamma(0.7, 2.5, R), -rng.gamma(1.5, 1.3, R)
    return TokenStats(
        ids=np.array([f"x{n}" for n in range(len(lengths))], np.str_),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        tokens=np.random.default_rng(0).integers(0, V, R).astype(np.int32),  # the same for all stats of a seed
        logp=(np.round(2 * logp) / 2 if ties else logp).astype(np.float32),
        mean=(np.round(mean) if ties else mean).astype(np.float32),
        std=rng.gamma(1.0, 1.0, R).astype(np.float32),
        top=rng.random(R) < 0.4,
    )


def evidence(seed: int, lengths=None) -> dict:
    """Every piece that arithmetic on evidence needs, of texts of 1 to 60 tokens."""
    rng = np.random.default_rng(seed)
    if lengths is None:
        lengths = np.concatenate([[1, 1, 2, 2, 3], rng.integers(1, 61, 25)])
    N, ties = len(lengths), seed % 2 == 1
    names = ("target", "reference", "prefixed", "prefixed_members")
    pieces = {name: ragged(10 * seed + i, lengths, ties) for i, name in enumerate(names)}
    return pieces | {
        "lowercase": ragged(10 * seed + 9, lengths + 1, ties),  # another number of tokens
        "zlib_bytes": rng.integers(9, 90, N),
        "trace": rng.gamma(2.0, 1.0, (N, 6)),
        "neighbours": rng.gamma(2.0, 1.0, (N, 5)),
        "gradient_norm": rng.gamma(2.0, 1.0, N),
        "token_counts": rng.integers(0, 5, V),
    }


def part(pieces: dict, rows: list[int]) -> dict:
    def one(name, piece):
        if name == "token_counts":
            return piece
        return piece.select(np.array(rows, np.intp)) if isinstance(piece, TokenStats) else piece[rows]

    return {name: one(name, piece) for name, piece in pieces.items()}


def scores(name: str, pieces: dict):
    return run_attack(FUNCTIONS[name], **{piece: pieces[piece] for piece in evidence_needed(FUNCTIONS[name])})


def logp(stats: TokenStats) -> list[float]:
    return [float(value) for value in stats.logp]


def L(stats: TokenStats) -> float:
    return -math.fsum(logp(stats)) / len(stats.logp)


def naive_surp(e):
    entropy, values = [-float(mean) for mean in e["target"].mean], logp(e["target"])
    lowest = sorted(range(len(values)), key=lambda i: (values[i], i))[: max(1, int(0.4 * len(values)))]
    kept = [i for i in lowest if entropy[i] < 2] or lowest
    return math.fsum(values[i] for i in kept) / len(kept)


def naive_dc_pdd(e):
    counts, seen, found = e["token_counts"], set(), []
    for token, value in zip(e["target"].tokens.tolist(), logp(e["target"]), strict=True):
        if token not in seen:
            frequency = (counts[token] + 1) / (sum(counts) + len(counts))
            found.append(min(math.exp(value) * math.log(1 / frequency), 0.01))
        seen.add(token)
    return math.fsum(found) / len(found)


def naive_wbc(e):
    t, r = logp(e["target"]), logp(e["reference"])
    shares = []
    for w in [w for w in WINDOWS if w <= len(t)] or [len(t)]:
        votes = []
        for i in range(len(t) - w + 1):
            nll_t, nll_r = -math.fsum(t[i : i + w]), -math.fsum(r[i : i + w])
            votes.append(1.0 if nll_r > nll_t else 0.5 if nll_r == nll_t else 0.0)
        shares.append(sum(votes) / len(votes))
    return sum(shares) / len(shares)


def naive_ez_mia(e):
    t, r, errors = logp(e["target"]), logp(e["reference"]), (~e["target"].top).tolist()
    if not any(errors):
        return 1.0 if e["reference"].top.all() else math.inf
    shifts = [a - b for a, b, error in zip(t, r, errors, strict=True) if error]
    gained, lost = math.fsum(s for s in shifts if s > 0), -math.fsum(s for s in shifts if s < 0)
    if lost:
        return gained / lost
    return math.inf if gained else 1.0


def min_k_plus(stats):
    rows = zip(logp(stats), stats.mean.tolist(), stats.std.tolist(), strict=True)
    return mean_of_lowest([(x - mu) / max(sigma, MIN_STD) for x, mu, sigma in rows], 0.2)


def naive_loss_trace(e):
    ordered = sorted(e["trace"][0].tolist())  # 6 values: the quartiles lie a quarter beyond the 2nd and before the 5th
    return (ordered[4] - 0.25 * (ordered[4] - ordered[3])) - (ordered[1] + 0.25 * (ordered[2] - ordered[1]))


NAIVE = {
    "zlib_sum": lambda e: math.fsum(logp(e["target"])) / e["zlib_bytes"][0],
    "surp": naive_surp,
    "dc_pdd": naive_dc_pdd,
    "wbc": naive_wbc,
    "ez_mia": naive_ez_mia,
    "ref_min_k_plus": lambda e: min_k_plus(e["target"]) - min_k_plus(e["reference"]),
    "loss_trace": naive_loss_trace,
    "lowercase": lambda e: L(e["lowercase"]) / L(e["target"]),
    "neighbourhood": lambda e: math.fsum(e["neighbours"][0]) / 5 - L(e["target"]),
    "recall": lambda e: -L(e["prefixed"]) / -L(e["target"]),
    "con_recall": lambda e: (-L(e["prefixed"]) + L(e["prefixed_members"])) / -L(e["target"]),
    "grad_norm": lambda e: -e["gradient_norm"][0],
}
SEEDS = range(8)
SPOILT = ("target", "reference", "prefixed", "prefixed_members", "trace")
MAY_HOLD_NAN = [(name, piece) for name in NAIVE for piece in evidence_needed(FUNCTIONS[name]) if piece in SPOILT]


@pytest.mark.parametrize("name", NAIVE)
def test_attacks_equal_a_loop_over_texts(name):
    for seed in SEEDS:
        pieces = evidence(seed)
        pieces["target"].logp[pieces["target"].offsets[:5]] = np.minimum(  # short texts whose L is 0 have edge tests
            pieces["target"].logp[pieces["target"].offsets[:5]], -0.5
        )
        found = scores(name, pieces)
        assert found.dtype == np.float64
        expected = [NAIVE[name](part(pieces, [n])) for n in range(len(found))]
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12, err_msg=f"seed {seed}")


def test_the_random_evidence_has_the_cases_that_matter():
    """Else the loops above prove little: saturated and ordinary EZ-MIA, ties in WBC, texts SURP finds nothing in."""
    pieces = [evidence(seed) for seed in SEEDS]
    ez = np.concatenate([scores("ez_mia", e) for e in pieces])
    assert np.isinf(ez).any()
    assert (ez == 1).any()
    assert (np.isfinite(ez) & (ez != 1) & (ez > 0)).sum() > 50
    assert any(np.any(e["target"].logp == e["reference"].logp) for e in pieces)
    default, without = (np.concatenate([surp(e["target"], max_entropy=h) for e in pieces]) for h in (2.0, 0.0))
    assert 0.1 < np.mean(default == without) < 0.9
    dc = np.concatenate([scores("dc_pdd", e) for e in pieces])
    assert (dc == 0.01).any()
    assert (dc < 0.0099).any()


@pytest.mark.parametrize("name", NAIVE)
def test_score_does_not_depend_on_the_neighbours(name):
    """A text scored alone gets bit for bit the score it has among others."""
    pieces = evidence(4)
    together = scores(name, pieces)
    alone = [scores(name, part(pieces, [n]))[0] for n in range(len(together))]
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("name", NAIVE)
def test_no_texts_have_no_scores(name):
    assert scores(name, part(evidence(0), [])).shape == (0,)


@pytest.mark.parametrize(("name", "piece"), MAY_HOLD_NAN)
def test_nan_is_passed_on_to_its_text_alone(name, piece):
    """Even where it stands at a token that the attack leaves out: no error, not the first of its kind, none of k%."""
    pieces = evidence(2)
    clean, bounds = scores(name, pieces), pieces["target"].offsets
    texts = [pieces["target"].tokens[bounds[n] : bounds[n + 1]].tolist() for n in range(len(clean))]
    n = next(n for n, text in enumerate(texts) if len(text) > 9 and text[-1] in text[:-1])
    if piece == "trace":
        spoilt = pieces[piece].copy()
        spoilt[n, 2] = np.nan
    else:
        logp_R, top_R = pieces[piece].logp.copy(), pieces[piece].top.copy()
        logp_R[bounds[n + 1] - 1], top_R[bounds[n + 1] - 1] = np.nan, True
        spoilt = renamed(pieces[piece], logp=logp_R, top=top_R)
    found = scores(name, pieces | {piece: spoilt})
    assert np.flatnonzero(np.isnan(found)).tolist() == [n]
    np.testing.assert_array_equal(np.delete(found, n), np.delete(clean, n))


@pytest.mark.parametrize("name", ["ref_min_k_plus", "wbc", "ez_mia"])
def test_the_untouched_base_ties_on_all_texts(name):
    """Target and reference are one model before the first step: an AUC of exactly one half, whatever the texts."""
    pieces = evidence(3)
    neutral = {"ref_min_k_plus": 0.0, "wbc": 0.5, "ez_mia": 1.0}[name]
    for top in (pieces["target"].top, np.zeros_like(pieces["target"].top), np.ones_like(pieces["target"].top)):
        target = renamed(pieces["target"], top=top)
        assert set(scores(name, {"target": target, "reference": target}).tolist()) == {neutral}


@pytest.mark.parametrize("name", ["zlib_sum", "surp", "dc_pdd", "wbc", "ez_mia", "ref_min_k_plus", "neighbourhood"])
def test_higher_means_member(name):
    rng = np.random.default_rng(7)
    texts = [rng.integers(0, 120, size=rng.integers(8, 40)) for _ in range(80)]
    members = np.arange(80) < 40
    base = Bigrams(120, rng)
    changed = [[np.where(np.arange(len(t)) == i, rng.integers(120), t) for t in texts] for i in (2, 4, 6)]
    sizes = np.array([len(zlib_module.compress(text.astype(np.uint8).tobytes())) for text in texts])

    def of(model):
        pieces = {
            "target": model.score(texts),
            "reference": base.score(texts),
            "zlib_bytes": sizes,
            "token_counts": np.bincount(rng.integers(0, 120, 5000), minlength=120),
            "neighbours": np.column_stack([model.score(others).nll for others in changed]),
        }
        return run_attack(FUNCTIONS[name], **{piece: pieces[piece] for piece in evidence_needed(FUNCTIONS[name])})

    def auc(found):
        beats = np.sign(np.where(np.isinf(found), 1e300, found)[members][:, None] - found[~members])
        return (1 + beats.mean()) / 2

    before, after = of(base), of(base.tuned(texts[:40]))
    assert auc(after) > 0.75
    assert auc(before) < 0.65


def test_features_of_a_sequence_are_none_of_the_attacks():
    assert not {*FEATURES} & {*FUNCTIONS}
