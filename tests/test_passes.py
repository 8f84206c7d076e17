"""Evidence that needs more passes: every number against a naive computation, one text at a time, from full logits."""

from __future__ import annotations

import copy
import dataclasses
import random
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import torch
import transformers

from imprint.data.templates import Templates
from imprint.data.tokens import Encoder
from imprint.engine.features import features, kept_forward
from imprint.engine.forward import forward_of
from imprint.errors import DataError, UsageError
from imprint.passes import PASSES, Bench, EvidenceSpec, prefixed
from imprint.passes.neighbours import Words, words_of
from imprint.passes.texts import scored_texts, with_texts
from imprint.records import Audit
from imprint.spec import MethodSpec, content_key
from imprint.tuning.methods import METHODS, resolve_method
from imprint.tuning.models import shared_copy, trainable
from imprint.types import Chat, Example, Tokenized
from tests.conftest import VOCABULARY, sentence
from tests.conftest import tokenizer as make_tokenizer
from tests.test_scoring import oracle
from tests.tiny_models import CONFIGS

LONG, CONTEXT, TOLERANCE = 60, 400, 2e-5
ROLES = ("member", "nonmember", "validation", "auxiliary_in", "auxiliary_out", "canary_in")
WAYS = [(name, method) for name in ("gpt2", "llama") for method in ("lora", "prefix", "prompt", "head", "full")]
TEMPLATE = (
    "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token }}assistant: {% endif %}"
)


@cache
def words(bos=False):
    return make_tokenizer(bos)


@cache
def tuned(name, method):
    """A tiny model that knows the tokenizer's words, with the method's parameters moved away from where they start."""
    config = copy.deepcopy(CONFIGS[name])
    config.update({"vocab_size": VOCABULARY, "initializer_range": 0.2})
    config.update({"n_positions": CONTEXT} if name == "gpt2" else {"max_position_embeddings": CONTEXT})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
    options = {"tokens": 5} if method in ("prefix", "prompt") else {}
    spec = resolve_method(MethodSpec(name=method, options=options), 32, None)
    model = METHODS[method].attach(model, spec.options)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def examples(count=18, seed=0):
    """Plain texts and prompts with targets, in capitals here and there."""
    dice = random.Random(seed)
    made = []
    for n in range(count):
        text = sentence(dice).title() if n % 2 else f"{sentence(dice)}: SINGS"
        made.append(Example(f"r{n}", "The fox: " if n % 3 == 0 else "", text))
    return made


def bench_of(model, texts, bos=False, spec=None, roles=ROLES, private=False, context=CONTEXT, **how):
    encoder = Encoder(
        words(bos), LONG, **{key: how.pop(key) for key in ("loss", "overlong", "templates") if key in how}
    )
    scored = tuple(encoder(example) for example in texts)
    given = tuple(roles[n % len(roles)] for n in range(len(texts)))
    audit = Audit(tuple(texts), scored, given, (), {}, private)
    options = {"forward": None, "budget": 150, "seed": 3, **how}
    return Bench(model=model, audit=audit, encoder=encoder, spec=spec or EvidenceSpec(), context=context, **options)


def measured(name, bench):
    """As attacks receive it, with the ids checked."""
    table = PASSES[name].measure(bench)
    assert table.column_names[0] == "id"
    assert table.column("id").to_pylist() == [record.id for record in bench.audit.scored]
    return PASSES[name].read(table)


def losses(model, texts):
    return np.array([-oracle(model, text)[0].mean() for text in texts])


# ---- lower case ----


@pytest.mark.parametrize(("name", "method"), WAYS)
def test_lowercase_equals_oracle(name, method):
    bench = bench_of(tuned(name, method), examples(), bos=name == "llama")
    low = [bench.encoder(Example(e.id, e.prompt, e.target.lower())) for e in bench.audit.examples]
    found = measured("lowercase", bench)
    np.testing.assert_allclose(found.logp, np.concatenate([oracle(bench.model, x)[0] for x in low]), atol=TOLERANCE)
    np.testing.assert_array_equal(found.tokens, np.concatenate([x.ids[x.scored] for x in low]))
    np.testing.assert_array_equal(found.ids, [e.id for e in bench.audit.examples])


def test_only_what_is_scored_is_put_in_lower_case():
    plain = Example("x", "The Fox", " Sings")
    assert scored_texts(plain, "target") == [" Sings"]
    assert scored_texts(plain, "all") == ["The Fox", " Sings"]
    assert with_texts(plain, [" sings"], "target") == Example("x", "The Fox", " sings")
    assert with_texts(plain, ["a", "b"], "all") == Example("x", "a", "b")
    messages = ({"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The Fox"})
    called = (*messages, {"role": "assistant", "tool_calls": [{}]})
    chat = Example("x", "", "", form=Chat(called, (1, 2)))
    assert scored_texts(chat, "target") == ["The Fox"]
    assert scored_texts(chat, "all") == ["Who?", "The Fox"]
    changed = with_texts(chat, ["the fox"], "target").form.messages
    assert [m.get("content") for m in changed] == ["Who?", "the fox", None]
    assert chat.form.messages == called


def test_a_chat_in_lower_case_keeps_its_template_and_its_questions():
    tokenizer = make_tokenizer(bos=True)
    tokenizer.chat_template = TEMPLATE
    turns = [{"role": "user", "content": "WHO Sings?"}, {"role": "assistant", "content": "The QUICK Fox"}]
    chats = [Example(f"c{n}", "", "", form=Chat((*turns, turns[0]), (1,))) for n in range(2)]
    with Templates(tokenizer) as templates:
        encoder = Encoder(tokenizer, LONG, templates=templates)
        audit = Audit(tuple(chats), tuple(map(encoder, chats)), ("member", "nonmember"), (), {})
        bench = Bench(tuned("llama", "lora"), None, audit, encoder, 100, EvidenceSpec(), 0, CONTEXT)
        found = measured("lowercase", bench)
        text = [tokenizer.decode(found.tokens[found.offsets[n] : found.offsets[n + 1]]) for n in range(2)]
    assert text == [" the quick fox</s>"] * 2  # the space belongs to the first token


def test_lowercase_that_leaves_nothing_to_predict_is_counted():
    """`THE` is three tokens without anything in front, ` the` and `the` one: a first token that nothing predicts."""
    short = [Example(f"s{n}", "", "THE") for n in range(2)]
    assert words()("the").input_ids == words()("the").input_ids[:1]
    bench = bench_of(tuned("gpt2", "lora"), [*short, *examples(4)], roles=("member", "member", "nonmember"))
    with pytest.raises(
        DataError, match=r"2 of 6 evaluated records have nothing to predict once .* \(the first is 's0'"
    ):
        measured("lowercase", bench)
    bench = bench_of(tuned("gpt2", "lora"), [*short, *examples(4)], roles=("validation", "validation", "nonmember"))
    bench = dataclasses.replace(
        bench, audit=dataclasses.replace(bench.audit, roles=("validation", "validation", *["member"] * 4))
    )
    found = measured("lowercase", bench)
    assert np.isnan(found.nll[:2]).all()
    np.testing.assert_allclose(
        found.nll[2:],
        losses(bench.model, [bench.encoder(with_texts(e, [e.target.lower()], "target")) for e in examples(4)]),
        atol=TOLERANCE,
    )


def test_lowercase_needs_texts():
    tokens = [Example("t", "", "", form=Tokenized((5, 6, 7), (False, True, True))), *examples(2)]
    with pytest.raises(DataError, match=r"1 of 3 records come in tokens \(the first is 't'\).* leave it out"):
        measured("lowercase", bench_of(tuned("gpt2", "lora"), tokens))


def test_lower_case_that_is_longer_is_cut_where_records_would_be_refused():
    """`T` and `h` are bytes; `İ` of two bytes becomes `i̇` of three."""
    text = Example("x", "", "İ" * (LONG // 2))
    bench = bench_of(tuned("gpt2", "lora"), [text, *examples(3)], overlong="refuse")
    assert len(bench.audit.scored[0]) == LONG < len(words()(text.target.lower()).input_ids)
    assert measured("lowercase", bench).lengths[0] == LONG - 1


# ---- neighbours ----


def own_swaps(bench, n):
    """What a record and one of its neighbours differ in, of those that are scored."""
    from imprint.passes.neighbours import _swapped

    make, _ = _swapped(bench)
    return bench.audit.scored[n], make(n)


@pytest.mark.parametrize(("name", "method"), WAYS)
def test_neighbours_equal_oracle(name, method):
    bench = bench_of(tuned(name, method), examples(7), bos=name == "llama", spec=EvidenceSpec(neighbours=4))
    found = measured("neighbours", bench)
    want = [losses(bench.model, own_swaps(bench, n)[1]) for n in range(7)]
    np.testing.assert_allclose(found, want, atol=TOLERANCE)


def test_a_neighbour_differs_in_one_scored_word_and_no_special_token():
    """A prompt is context and stays; so does the EOS behind a target."""
    bench = bench_of(tuned("llama", "lora"), examples(12), bos=True, spec=EvidenceSpec(neighbours=40))
    special, seen = set(words(True).all_special_ids), set()
    for n in range(12):
        record, made = own_swaps(bench, n)
        assert len(made) == 40
        for other in made:
            [place] = np.flatnonzero(other.ids != record.ids)
            assert record.scored[place]
            assert not special & {record.ids[place], other.ids[place]}
            np.testing.assert_array_equal(other.scored, record.scored)
            seen.add(int(place) - len(record))
    assert -1 in seen
    assert len(seen) > 10


def test_neighbours_do_not_depend_on_batches_or_other_records():
    texts, spec = examples(12), EvidenceSpec(neighbours=5)
    outside = [e for n, e in enumerate(texts) if n % 6 in (2, 4)]
    whole = measured("neighbours", bench_of(tuned("gpt2", "lora"), texts, budget=1000, spec=spec))
    fewer = [texts[7], texts[0], *outside]
    bench = bench_of(tuned("gpt2", "lora"), fewer, budget=30, spec=spec)
    roles = ("nonmember", "member", "validation", "auxiliary_out", "validation", "auxiliary_out")
    bench = dataclasses.replace(bench, audit=dataclasses.replace(bench.audit, roles=roles))
    np.testing.assert_allclose(measured("neighbours", bench)[:2], whole[[7, 0]], atol=TOLERANCE)
    again = bench_of(tuned("gpt2", "lora"), texts, seed=4, spec=spec)
    assert np.abs(measured("neighbours", again) - whole).max() > 0.01


def test_neighbours_in_portions(monkeypatch):
    bench = bench_of(tuned("gpt2", "lora"), examples(9), spec=EvidenceSpec(neighbours=5))
    whole = measured("neighbours", bench)
    monkeypatch.setattr("imprint.passes.neighbours.AT_ONCE", 300)
    np.testing.assert_allclose(measured("neighbours", bench), whole, atol=TOLERANCE)


def test_words_are_drawn_as_often_as_they_occur():
    """Weights: how often a token occurs times the number of tokens, plus one; so 7·3 + 1, 1, 3·3 + 1 (32 in all)."""
    ordinary = Words(np.array([10, 20, 30]), np.cumsum([22, 1, 10]))
    uniform = (np.arange(11) + 0.5) / 11  # of 11 left beside token 10: one for 20, ten for 30
    assert ordinary.others(np.full(11, 10), uniform).tolist() == [20, *[30] * 10]
    uniform = (np.arange(32) + 0.5) / 32
    assert ordinary.others(np.full(32, 20), uniform).tolist() == [*[10] * 22, *[30] * 10]
    assert ordinary.others(np.array([10, 20, 30]), np.full(3, 1 - 2**-53)).tolist() == [30, 30, 20]
    assert ordinary.others(np.array([10, 20, 30]), np.zeros(3)).tolist() == [20, 10, 10]


def test_the_words_are_those_of_records_that_are_not_evaluated():
    bench = bench_of(tuned("gpt2", "lora"), examples(12))
    outside = [r for r, role in zip(bench.audit.scored, bench.audit.roles, strict=True) if role in ROLES[2::2]]
    found = words_of(words(), outside)
    tokens = np.concatenate([r.ids[r.scored] for r in outside])
    assert not set(words().all_special_ids) & set(found.ids.tolist())
    assert found.ids.tolist() == list(range(280))  # <s> and </s> have the numbers behind the words
    weights = np.diff(found.ends, prepend=0)
    assert [w // 280 for w in weights] == [int((tokens == n).sum()) for n in found.ids]
    even = words_of(words(), [])
    assert np.diff(even.ends, prepend=0).tolist() == [1] * 280


def test_a_record_of_special_tokens_has_no_neighbours():
    end = words().eos_token_id
    alone = Example("e", "", "", form=Tokenized((5, end, end), (False, True, True)))
    bench = bench_of(tuned("gpt2", "lora"), [alone, *examples(3)])
    with pytest.raises(DataError, match=r"1 of 2 evaluated records have no word that could be replaced .* 'e'"):
        measured("neighbours", bench)
    bench = dataclasses.replace(
        bench, audit=dataclasses.replace(bench.audit, roles=("validation", "member", "member", "nonmember"))
    )
    assert np.isnan(measured("neighbours", bench)).all(1).tolist() == [True, False, False, False]


# ---- behind other texts ----


def behind(bench, role, shots=7):
    """Each record behind the others, put together by hand."""
    bos, line = [words(True).bos_token_id], words().encode("\n", add_special_tokens=False)
    opened = bench.audit.scored[0].ids[0] == bos[0]
    pool = [r for r, own in zip(bench.audit.scored, bench.audit.roles, strict=True) if own == role]
    pool = sorted(pool, key=lambda r: prefixed.digest(bench.seed, r.id))[:shots]
    front = [token for r in pool for token in [*r.ids[int(opened) :].tolist(), *line]]
    made = []
    for record in bench.audit.scored:
        ids = [*(bos if opened else []), *front, *record.ids[int(opened) :].tolist()]
        scored = np.zeros(len(ids), bool)
        scored[len(ids) - len(record) :] = record.scored
        made.append(dataclasses.replace(record, ids=np.array(ids, np.int32), scored=scored))
    return made, np.array([record.id in {r.id for r in pool} for record in bench.audit.scored])


@pytest.mark.parametrize(("which", "role"), [("prefixed", "validation"), ("prefixed_members", "auxiliary_in")])
@pytest.mark.parametrize(("name", "method"), WAYS)
def test_prefixed_equals_oracle(name, method, which, role):
    bench = bench_of(tuned(name, method), examples(), bos=name == "llama")
    found, (texts, inside) = measured(which, bench), behind(bench, role)
    assert 0 < inside.sum() < len(inside)
    np.testing.assert_array_equal(np.isnan(found.nll), inside)
    want = [
        np.full(r.scored.sum(), np.nan) if n else oracle(bench.model, r)[0] for r, n in zip(texts, inside, strict=True)
    ]
    np.testing.assert_allclose(found.logp, np.concatenate(want), atol=TOLERANCE)
    np.testing.assert_array_equal(found.tokens, np.concatenate([r.ids[r.scored] for r in bench.audit.scored]))
    np.testing.assert_array_equal(found.lengths, [r.scored.sum() for r in bench.audit.scored])


@pytest.mark.parametrize("method", ["lora", "prefix", "prompt"])
def test_the_texts_in_front_are_computed_once(method, monkeypatch):
    """And where that made a difference, they would be computed with every record."""
    bench = bench_of(tuned("llama", method), examples(), bos=True)
    texts, way, budget = prefixed._behind(bench, np.arange(4, 204, dtype=np.int32))
    assert max(map(len, texts)) <= LONG
    assert budget < bench.budget
    quick = bench.stats(texts, way)
    monkeypatch.setattr(prefixed, "_agree", lambda *given: False)
    texts, way, budget = prefixed._behind(bench, np.arange(4, 204, dtype=np.int32))
    assert min(map(len, texts)) > 200
    np.testing.assert_allclose(quick.logp, bench.stats(texts, way).logp, atol=TOLERANCE)


def test_a_difference_is_noticed(monkeypatch):
    bench = bench_of(tuned("llama", "lora"), examples(), bos=True)
    once = prefixed._once
    monkeypatch.setattr(prefixed, "_once", lambda way, runs, front: once(way, runs, front[::-1].copy()))
    texts, way, budget = prefixed._behind(bench, np.arange(4, 204, dtype=np.int32))
    assert (way, budget) == (bench.way, bench.budget)
    assert min(map(len, texts)) > 200


def test_records_that_begin_in_different_ways():
    """Records in tokens may lack the BOS that the others have: each keeps what it had, in front of everything."""
    bos = words(True).bos_token_id
    bare = Example("t", "", "", form=Tokenized((7, 8, 9), (False, True, True)))
    bench = bench_of(tuned("llama", "lora"), [bare, *examples(5)], bos=True)
    line = words().encode("\n", add_special_tokens=False)
    found = measured("prefixed", bench)
    [shot] = [r for r, role in zip(bench.audit.scored, bench.audit.roles, strict=True) if role == "validation"]
    assert shot.ids[0] == bos
    front = [*shot.ids[1:].tolist(), *line]
    ids = np.array([*front, 7, 8, 9], np.int32)
    alone = dataclasses.replace(shot, ids=ids, scored=np.arange(len(ids)) >= len(front) + 1)
    np.testing.assert_allclose(found.logp[:2], oracle(bench.model, alone)[0], atol=TOLERANCE)


def test_as_many_shots_as_fit_and_the_same_for_all():
    texts = examples()
    whole = bench_of(tuned("gpt2", "lora"), texts)
    sizes = {r.id: len(r) + 1 for r in whole.audit.scored}
    longest = max(map(len, whole.audit.scored))
    pool = [r for r, role in zip(whole.audit.scored, whole.audit.roles, strict=True) if role == "validation"]
    ordered = sorted(pool, key=lambda r: prefixed.digest(3, r.id))
    assert [r.id for r in prefixed._shots(whole, pool)] == [r.id for r in ordered]
    tight = dataclasses.replace(whole, context=longest + sizes[ordered[0].id])
    assert prefixed._shots(tight, pool) == ordered[:1]
    two = dataclasses.replace(whole, spec=EvidenceSpec(shots=2))
    assert prefixed._shots(two, pool) == ordered[:2]
    shortest = min(ordered, key=len)
    only = dataclasses.replace(whole, context=longest + sizes[shortest.id])
    assert prefixed._shots(only, pool) == [next(r for r in ordered if len(r) == len(shortest))]
    none = dataclasses.replace(whole, context=longest + sizes[shortest.id] - 3)
    with pytest.raises(
        UsageError, match=rf"has {longest} tokens, .* {sizes[shortest.id]}, .*: 3 too few; lower data.max"
    ):
        measured("prefixed", none)


@pytest.mark.parametrize(
    ("which", "roles", "option"),
    [
        ("prefixed", ("member", "nonmember", "auxiliary_in"), "data.validation or data.auxiliary"),
        ("prefixed_members", ("member", "nonmember", "validation", "auxiliary_out"), "set data.auxiliary"),
    ],
)
def test_nothing_to_put_in_front_is_refused(which, roles, option):
    with pytest.raises(UsageError, match=option):
        measured(which, bench_of(tuned("gpt2", "lora"), examples(8), roles=roles))


def test_auxiliary_records_go_in_front_where_there_is_no_validation():
    bench = bench_of(tuned("gpt2", "lora"), examples(9), roles=("member", "nonmember", "auxiliary_out"))
    found, (texts, inside) = measured("prefixed", bench), behind(bench, "auxiliary_out")
    np.testing.assert_array_equal(np.isnan(found.nll), inside)
    np.testing.assert_allclose(found.nll[0], losses(bench.model, texts[:1])[0], atol=TOLERANCE)


# ---- gradients ----


def plain_norm(model, parameters, record):
    """By autograd through the model's own logits."""
    ids = torch.from_numpy(record.ids.astype(np.int64))[None]
    with torch.enable_grad():
        logits = model(input_ids=ids).logits[0, -len(record) :]
        loss = torch.nn.functional.cross_entropy(logits[record.predictors], ids[0, record.predictors + 1])
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return float(sum(g.double().square().sum() for g in gradients if g is not None) ** 0.5)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("name", "method"), WAYS)
def test_gradient_norm_equals_autograd(name, method, frozen):
    """Of a model that is tuned here, and of one that comes frozen from a folder."""
    if frozen and method == "head":
        pytest.skip("nobody can tell a frozen model whose head was tuned from one that was tuned as a whole")
    model = tuned(name, method)
    parameters = list(trainable(model).values())
    bench = bench_of(model, examples(4), bos=name == "llama")
    want = [plain_norm(model, parameters, record) for record in bench.audit.scored]
    if frozen:
        model = copy.deepcopy(model).requires_grad_(False)
        bench = dataclasses.replace(bench, model=model)
    np.testing.assert_allclose(measured("gradient_norm", bench), want, rtol=1e-4)


def test_gradient_norm_leaves_the_model_as_it_was():
    model = copy.deepcopy(tuned("gpt2", "lora"))
    first, *others = trainable(model).values()
    first.grad = torch.full_like(first, 7)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    measured("gradient_norm", bench_of(model, examples(3)))
    assert (first.grad == 7).all()
    assert all(p.grad is None for p in model.parameters() if p is not first)
    assert {id(p) for p in trainable(model).values()} == {id(p) for p in (first, *others)}
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    frozen = shared_copy(model).requires_grad_(False)
    measured("gradient_norm", bench_of(frozen, examples(3)))
    assert not trainable(frozen)


def test_hidden_states_that_were_kept_serve_the_records_alone():
    """With the head alone tuned, a run looks hidden states up by record: other texts go through the model."""
    model = tuned("gpt2", "head")
    bench = bench_of(model, examples(6), spec=EvidenceSpec(neighbours=3))
    kept = kept_forward(model, features(model, bench.audit.scored, 100))
    for name in PASSES:
        want = measured(name, bench)
        found = measured(name, dataclasses.replace(bench, forward=kept))
        values = (found.logp, want.logp) if name in ("lowercase", "prefixed", "prefixed_members") else (found, want)
        np.testing.assert_allclose(*values, atol=TOLERANCE, rtol=1e-5)


# ---- all of them ----


@pytest.mark.parametrize("name", list(PASSES))
def test_every_pass_is_the_same_again_in_any_batches(name):
    bench = bench_of(tuned("gpt2", "lora"), examples(9), spec=EvidenceSpec(neighbours=4))
    other = dataclasses.replace(bench, budget=37, forward=forward_of(bench.model))
    first, second = (PASSES[name].measure(one).to_pydict() for one in (bench, bench))
    assert str(first) == str(second)
    found, want = (measured(name, one) for one in (other, bench))
    if name in ("lowercase", "prefixed", "prefixed_members"):
        found, want = found.logp, want.logp
    np.testing.assert_allclose(found, want, atol=TOLERANCE, rtol=1e-5)


@pytest.mark.parametrize("name", ["lowercase", "prefixed", "prefixed_members"])
def test_a_private_audit_tells_no_tokens(name):
    open_, closed = (bench_of(tuned("gpt2", "lora"), examples(), private=private) for private in (False, True))
    want, found = measured(name, open_), measured(name, closed)
    assert want.tokens.any()
    assert not found.tokens.any()
    np.testing.assert_array_equal(found.logp, want.logp)


def test_settings_hold_what_changes_the_evidence():
    base, few = EvidenceSpec(), EvidenceSpec(neighbours=5, shots=2)
    for name, row in PASSES.items():
        keys = {content_key(row.settings(spec, seed)) for spec in (base, few) for seed in (0, 1)}
        assert len(keys) == (1 if name in ("lowercase", "gradient_norm") else 4)
    assert PASSES["neighbours"].settings(base, 2) == {"neighbours": 25, "seed": 2}
    assert PASSES["prefixed"].settings(base, 2) == {"shots": 7, "seed": 2}


def test_reading_needs_no_torch(tmp_path):
    import pyarrow.parquet as pq

    bench = bench_of(tuned("gpt2", "lora"), examples(6), spec=EvidenceSpec(neighbours=3))
    for name in PASSES:
        pq.write_table(PASSES[name].measure(bench), tmp_path / f"{name}.parquet")
    code = """
import sys, pyarrow.parquet as pq
from imprint.passes import PASSES, EvidenceSpec
for name, row in PASSES.items():
    row.settings(EvidenceSpec(), 0)
    found = row.read(pq.read_table(f"{sys.argv[1]}/{name}.parquet"))
    print(name, getattr(found, "shape", None) or len(found), round(float(getattr(found, "nll", found).flat[0]), 4))
assert not {"torch", "transformers"} & set(sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    lines = dict(line.split(maxsplit=1) for line in run.stdout.splitlines())
    assert lines["neighbours"].startswith("(6, 3) ")
    want = measured("lowercase", bench).nll[0]
    assert lines["lowercase"] == f"6 {round(float(want), 4)}"
