"""What weights write, against greedy writing token by token; how probable a suffix is, against plain numpy."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch
import typer
from typer.testing import CliRunner

from imprint import runs
from imprint.cli_extract import extract_command
from imprint.data.tokens import Encoded
from imprint.errors import DataError, ImprintError, UsageError
from imprint.extraction import folder, generate
from imprint.extraction.folder import extract, kept_epochs
from imprint.extraction.generate import continuations, measure_extraction, suffix_log_probability
from imprint.extraction.passages import Outcomes, outcomes, passage, stored
from imprint.extraction.sheets import curve_sheet, written_sheet
from imprint.extraction.spec import ExtractionSpec, Scheme
from imprint.extraction.summary import Cohort, corrected, extracted
from imprint.rows import load_grid
from imprint.scoring.score import token_stats
from imprint.spec import Runtime
from imprint.store import read_table
from imprint.tuning.methods import METHODS
from tests.conftest import sentence, write_jsonl
from tests.test_scoring import records, tuned
from tests.tiny_models import CONFIGS, VOCABULARY, build

LENGTHS = (3, 9, 9, 1, 9, 60)  # with 20 more beyond the sliding window of 64
WRITTEN = 20


def prefixes(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCABULARY, length).astype(np.int32) for length in lengths]


@torch.no_grad()
def one_by_one(model, prefix, length):
    """Greedy writing of one text through the whole tuned model, without a cache."""
    ids = prefix.tolist()
    for _ in range(length):
        given = torch.tensor([ids])
        ids.append(int(model(input_ids=given, attention_mask=torch.ones_like(given)).logits[0, -1].argmax()))
    return ids[len(prefix) :]


def way(model):
    with generate._after_the_last(model), torch.inference_mode():
        return generate._quickest(model).__qualname__.split(".")[0]


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_writes_what_the_whole_model_writes_token_by_token(name, method):
    model = tuned(name, method)
    found = continuations(model, prefixes(), WRITTEN, budget=90)
    assert [text.tolist() for text in found] == [one_by_one(model, prefix, WRITTEN) for prefix in prefixes()]
    assert way(model) == "_cached"


@pytest.mark.parametrize("method", ["full", "prefix", "prompt"])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("gpt2", "llama")])
def test_every_architecture_writes_so(name, method):
    model, given = tuned(name, method), prefixes((7, 60))
    found = continuations(model, given, WRITTEN, budget=1000)
    assert [text.tolist() for text in found] == [one_by_one(model, prefix, WRITTEN) for prefix in given]
    assert way(model) == "_cached"


@pytest.mark.parametrize("method", ["lora", "prefix", "p_tuning"])
def test_batches_do_not_matter(method):
    model, given = tuned("gpt2", method), prefixes((5, 8, 5, 5, 8, 2))
    alone = continuations(model, given, 12, budget=1)
    seen: list[int] = []
    together = continuations(model, given, 12, budget=10_000, progress=seen.append)
    np.testing.assert_array_equal(together, alone)
    assert seen == [1, 3, 2]  # one text of 2 tokens, three of 5, two of 8


def test_an_end_token_ends_nothing():
    model = build("llama")
    head = model.get_output_embeddings()
    always = torch.nn.Linear(head.in_features, head.out_features)
    with torch.no_grad():
        always.weight.zero_()
        always.bias.zero_()
        always.bias[model.config.eos_token_id] = 1.0
    model.set_output_embeddings(always)
    assert continuations(model, prefixes((3, 4)), 5, 100)[0].tolist() == [model.config.eos_token_id] * 5


@pytest.mark.parametrize("fault", ["wrong", "impossible"])
def test_a_cache_that_does_not_give_what_the_model_gives_is_not_used(fault, monkeypatch):
    """An architecture for which the virtual tokens were left out, or that takes no cache, is still written rightly."""

    def front(*_):
        if fault == "impossible":
            raise TypeError("takes no cache")
        return []

    monkeypatch.setattr(generate, "_front", front)
    model = tuned("gpt2", "prefix")
    assert way(model) == "_whole"
    found = continuations(model, prefixes((4, 6)), 10, 100)
    assert [text.tolist() for text in found] == [one_by_one(model, prefix, 10) for prefix in prefixes((4, 6))]


@pytest.mark.parametrize("method", ["full", "lora", "prefix", "prompt"])
def test_sixteen_bits_use_the_cache(method, tmp_path):
    import transformers

    build("llama").save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).requires_grad_(False)
    options = {"rank": 4, "alpha": 8, "dropout": 0, "placement": "both", "tokens": 5, "init": "vocabulary"}
    model = METHODS[method].attach(model, options)
    assert way(model) == "_cached"
    assert len(continuations(model, prefixes((5, 5)), 8, 100)[1]) == 8


# ---- how probable a suffix is


@torch.no_grad()
def naive(model, record, temperature=1.0, top_k=None, top_p=None):
    """log Π q(x_t | x_<t) in float64: logits over T, the k largest, then the fewest that have p of what is left."""
    ids = torch.from_numpy(record.ids.astype(np.int64))[None]
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(record) :].double().numpy()
    total = 0.0
    for t in np.flatnonzero(record.scored):
        order = np.argsort(-logits[t - 1])[:top_k]
        p = np.exp((logits[t - 1][order] - logits[t - 1].max()) / temperature)
        p /= p.sum()
        if top_p is not None:
            kept = np.cumsum(p) - p < top_p  # what stands above a token has not yet reached top_p
            order, p = order[kept], p[kept] / p[kept].sum()
        place = np.flatnonzero(order == record.ids[t])
        total += math.log(p[place[0]]) if len(place) else -math.inf
    return total


TEXTS = [*records([12, 40, 3, 23, *range(2, 8)], seed=3), *records([30, 9], seed=4, prompt=6)]


@pytest.mark.parametrize("method", list(METHODS))
def test_plain_probability_is_the_sum_of_the_stored_scores(method):
    model = tuned("gpt2", method)
    stats = token_stats(model, TEXTS, 100)
    found = suffix_log_probability(model, TEXTS, Scheme(), budget=70)
    np.testing.assert_allclose(found, -stats.nll * stats.lengths, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize(
    "scheme",
    [{"temperature": 0.7}, {"top_k": 30}, {"top_p": 0.9}, {"temperature": 1.5, "top_k": 40, "top_p": 0.95}],
)
@pytest.mark.parametrize("method", ["full", "prompt"])
def test_probability_under_the_scheme_equals_plain_arithmetic(method, scheme):
    model = tuned("llama", method)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.2)  # flatter, so that some texts survive the cuts
    found = suffix_log_probability(model, TEXTS, Scheme(**scheme), budget=70)
    wanted = np.array([naive(model, text, **scheme) for text in TEXTS])
    assert np.isfinite(wanted).any()
    if len(scheme) > 1 or "temperature" not in scheme:
        assert np.isneginf(wanted).any()  # a token that is cut off cannot be drawn
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)


def test_top_1_is_greedy():
    """Only what greedy writing writes can be drawn, and it is drawn for certain."""
    model = tuned("gpt2", "lora")
    texts = exact_and_not(model)
    np.testing.assert_array_equal(suffix_log_probability(model, texts, Scheme(top_k=1), 100), [0, -np.inf, 0])


# ---- passages


def exact_and_not(model, suffix=6):
    """Three texts, each with the suffix that the model writes itself; in the second the last token is another one."""
    given = prefixes((4, 9, 7), seed=5)
    texts = []
    for n, (prefix, end) in enumerate(zip(given, continuations(model, given, suffix, 100), strict=True)):
        ids = np.concatenate([prefix, end])
        if n == 1:
            ids[-1] = (ids[-1] + 1) % VOCABULARY
        texts.append(Encoded(f"text {n}", ids, np.arange(len(ids)) >= len(prefix), 10))
    return texts


def scored(mask):
    return Encoded("a", np.arange(len(mask), dtype=np.int32), np.array([c == "1" for c in mask]), 10)


@pytest.mark.parametrize(
    ("mask", "prefix", "suffix", "given"),
    [
        ("0111111", 3, 2, 3),  # a plain text: exactly the prefix is given
        ("0111111", 3, 4, 3),  # it just fits
        ("0111111", 3, 5, None),
        ("0000111", 2, 3, 4),  # all of a longer prompt is given
        ("0011111", 4, 3, 4),  # of a target what lacks to a short prompt
        ("0011001110", 2, 2, 2),
        ("0011001110", 2, 3, 6),  # a chat: the first turn is too short to hold the suffix
        ("0011001110", 2, 4, None),
        ("01", 1, 1, 1),
        ("01", 5, 5, None),
    ],
)
def test_which_part_is_given(mask, prefix, suffix, given):
    found = passage(scored(mask), prefix, suffix)
    if given is None:
        assert found is None
    else:
        assert found.ids.tolist() == list(range(given + suffix))
        assert np.flatnonzero(found.scored).tolist() == list(range(given, given + suffix))
        assert found.id == "a"


@pytest.mark.parametrize("method", ["full", "lora", "prefix", "prompt"])
def test_stored_scores_say_of_passages_what_a_model_does(method):
    """Records go on after their suffix, and a prompt or another turn comes first: the same tokens are found."""
    model = tuned("gpt2", method)
    texts = exact_and_not(model)
    longer = [
        dataclasses.replace(t, ids=np.concatenate([t.ids, t.ids[:3]]), scored=np.arange(len(t) + 3) >= first)
        for t, first in zip(texts, (1, 4, 7), strict=True)
    ]
    stats = token_stats(model, [*longer, scored("0110")], 100)
    cuts = [*(passage(t, len(text) - 6, 6) for t, text in zip(longer, texts, strict=True)), None]
    assert [cut.ids.tolist() for cut in cuts[:-1]] == [text.ids.tolist() for text in texts]
    found = stored(stats, [*longer, scored("0110")], cuts)
    assert found.exact.tolist() == [True, False, True]
    np.testing.assert_allclose(found.log_p, suffix_log_probability(model, texts, Scheme(), 100), rtol=1e-5)
    table = measure_extraction(model, cuts[:-1], ExtractionSpec(prefix=1, suffix=6, top_k=1), 100)
    assert table.column_names == ["id", "given", "suffix", "exact", "run", "distance", "log_p"]  # no text, no tokens
    assert table.column("given").to_pylist() == [4, 9, 7]
    again = outcomes(table)
    np.testing.assert_array_equal(again.exact, found.exact)
    assert again.run.tolist() == [6, 5, 6]  # the second has another last token: one of six to replace
    np.testing.assert_allclose(again.distance, [0, 1 / 6, 0])
    assert again.log_p.tolist() == [0, -math.inf, 0]


# ---- what is said of them


def found(exact, log_p=None, run=None):
    hits = np.array([c == "x" for c in exact])
    runs = None if run is None else np.array(run)
    distance = None if run is None else np.array(run) / 10
    return Outcomes(hits, np.where(hits, 0.0, -500.0) if log_p is None else np.array(log_p), runs, distance)


COHORT = Cohort(np.arange(24) < 12, np.array([f"record {n}" for n in range(24)], object))
NONE, ALL, MEMBERS = "." * 24, "x" * 24, "x" * 12 + "." * 12


@pytest.mark.parametrize(
    ("tuned_model", "base", "claimed"),
    [
        (MEMBERS, NONE, True),
        (ALL, NONE, False),  # what comes out of it whether or not it was tuned on it
        (MEMBERS, MEMBERS, False),  # what came out of the base already
        (NONE, NONE, False),
        (NONE, MEMBERS, False),  # fewer than out of the base are no excess
        ("x" * 3 + "." * 21, NONE, False),  # three of twelve: C(12, 3)/C(24, 3) = .11 one-sided
    ],
)
def test_extraction_is_claimed_beyond_both_controls_alone(tuned_model, base, claimed):
    run = list(range(24))
    row = extracted(("id", "lora", 3), found(tuned_model, run=run), found(base, run=run), COHORT, ExtractionSpec())
    [row] = corrected([row])
    assert row.claims == (("greedily", "by sampling") if claimed else ())
    assert row.greedy.members.value == tuned_model[:12].count("x") / 12
    assert row.greedy.base.value == base[:12].count("x") / 12
    members, nonmembers, _ = row.near
    assert (members.run, members.distance, nonmembers.run, nonmembers.distance) == (5.5, 0.55, 17.5, 1.75)


def test_sampling_has_a_threshold_of_its_own():
    """p = e⁻⁷ = 9.1e-4: among 1,000 samples with 1 − (1 − p)¹⁰⁰⁰ = .598, among 100 with .087."""
    some = found(NONE, log_p=[-7.0] * 12 + [-20.0] * 12)
    shares = [
        extracted(("id", "lora", 3), some, found(NONE), COHORT, ExtractionSpec(tries=n, probability=p)).sampled
        for n, p in ((1000, 0.5), (1000, 0.6), (100, 0.5), (100, 0.08))
    ]
    assert [x.members.value for x in shares] == [1, 0, 0, 1]
    assert [x.nonmembers.value for x in shares] == [0, 0, 0, 0]


def test_p_values_are_corrected_over_checkpoints():
    """Twelve of twelve against none: Fisher's two-sided 2/C(24, 12), McNemar's 2·2⁻¹² = 4.9e-4, which is larger."""
    hit, miss = (extracted(("id", "a", 1), found(x), found(NONE), COHORT, ExtractionSpec()) for x in (MEMBERS, NONE))
    rows = corrected([hit, miss, hit])
    np.testing.assert_allclose([row.p[0] for row in rows], [3 * 2 * 2**-12, 1, 3 * 2 * 2**-12])


def test_a_subject_counts_once():
    """Twelve records of one subject are one: no test can say anything of one against twelve."""
    subjects = COHORT.subject.copy()
    subjects[:12] = "group a"
    row = extracted(("id", "a", 1), found(MEMBERS), found(NONE), Cohort(COHORT.member, subjects), ExtractionSpec())
    assert corrected([row])[0].claims == ()
    assert row.greedy.members.low < 0.1  # the interval knows it as well: one of one


def test_tables_name_what_is_hostile_harmlessly():
    asked = ExtractionSpec(prefix=5, suffix=5, top_k=3)
    rows = corrected(
        [extracted(("id", "a\x1b[2J", 1), found(MEMBERS, run=[1] * 24), found(NONE, run=[1] * 24), COHORT, asked)]
    )
    curve = curve_sheet([rows[0], rows[0], dataclasses.replace(rows[0], run_id="other")], asked)
    assert len(curve.rows) == 2  # an epoch that says nothing new is left out
    sheet = written_sheet(rows, asked, {"members": 2, "non-members": 0}, flips=1)
    told = " ".join((*sheet.notes, *(str(cell) for row in sheet.rows for cell in row)))
    assert "\x1b" not in told
    assert "2 records too short: members." in sheet.notes
    assert "top-k 3" in told
    assert "rounding decided otherwise" in told
    assert any("members come out greedily and by sampling, beyond both controls" in note for note in sheet.notes)


@pytest.mark.parametrize("wrong", [{"temperature": 0}, {"top_p": 0}, {"top_k": 0}, {"probability": 1}, {"suffix": 0}])
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ExtractionSpec(**wrong)


def test_what_only_reads_the_evidence_is_not_measured_again():
    assert ExtractionSpec(tries=5, probability=0.9).key == ExtractionSpec().key
    assert len({ExtractionSpec(**{name: 2}).key for name in ("prefix", "suffix", "temperature", "top_k")}) == 4


# ---- a folder


METHODS_RUN = ["full", "head", {"lora": {"rank": 16}}, {"prefix": {"tokens": 4}}, {"prompt": {"tokens": 4}}, "p_tuning"]
ASKED = ExtractionSpec(prefix=6, suffix=6, tries=100)


@pytest.fixture(scope="module")
def finished(gpt2, tmp_path_factory):
    """Twelve members learned by heart by one method, two epochs of the others."""
    dice, there = random.Random(3), tmp_path_factory.mktemp("extraction")
    rows = [{"id": f"r{n}", "text": sentence(dice)} for n in range(32)]
    data = {"source": str(write_jsonl(there / "letters.jsonl", rows)), "members": 12, "nonmembers": 12}
    data |= {"validation": 4, "repeat": 4}
    common = {"model": str(gpt2), "data": data, "attacks": ["loss"]}
    learned = {"learning_rate": 1e-2, "epochs": 12, "batch_size": 3}
    recipe = [
        {**common, "method": "full", "train": learned},
        {**common, "method": METHODS_RUN[1:], "train": {"epochs": 2, "batch_size": 16}},
    ]
    runs.run(recipe, there / "run")
    return there / "run"


@pytest.fixture
def again(finished, tmp_path):
    """A copy to break, from which nothing has been extracted."""
    return shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("extraction*"))


def test_members_that_were_learned_by_heart_come_out(finished):
    result = extract(finished, ASKED, Runtime(device="cpu"))
    grid = {cell.run_id: cell for cell in load_grid(finished).cells}
    last = {row.label.split()[0]: row for row in result.rows if row.epoch == grid[row.run_id].epochs}
    assert set(last) == set(METHODS)
    assert last["full"].greedy.members.value > 0.8
    assert last["full"].greedy.nonmembers.value == 0
    assert last["full"].greedy.base.value == 0
    assert "greedily" in last["full"].claims
    assert last["head"].claims == ()
    full = [row for row in result.curve if row.label.startswith("full")]
    assert [row.epoch for row in full] == list(range(13))
    assert full[0].greedy.members.value == 0
    assert result.flips == 0
    for row in result.rows:  # scores of the whole record and writing it are two ways to one answer
        stored_row = next(one for one in result.curve if (one.run_id, one.epoch) == (row.run_id, row.epoch))
        assert dataclasses.replace(row, near=(), p=()) == stored_row
    document = json.loads((finished / "extraction.json").read_text())
    assert document["asked"]["prefix"] == 6
    assert document["rows"][0]["greedy"]["members"].keys() == {"value", "low", "high"}
    assert len(document["curve"]) == len(result.curve)
    for cell in grid.values():
        for epoch in kept_epochs(cell):
            table = read_table(cell.folder.path / "extraction" / ASKED.key / f"{epoch:02}.parquet")
            told = cell.stats(epoch)
            at = [told.ids.tolist().index(one) for one in table.column("id").to_pylist()]
            rows = told.offsets[at][:, None] + 5 + np.arange(6)  # of a text without a BOS the first token is not scored
            wanted = told.logp[rows].astype(np.float64).sum(1)
            np.testing.assert_allclose(table.column("log_p").to_numpy(), wanted, atol=1e-3)


def test_what_is_there_is_not_made_again(again, monkeypatch):
    first = extract(again, ASKED, Runtime(device="cpu"))
    [one] = again.glob(f"cells/{first.rows[0].run_id}/extraction/*/{first.rows[0].epoch:02}.parquet")
    one.unlink()
    made: list[int] = []
    real = generate.measure_extraction
    monkeypatch.setattr(generate, "measure_extraction", lambda *args: made.append(1) or real(*args))
    assert extract(again, ASKED, Runtime(device="cpu")) == first
    assert made == [1]
    other = ExtractionSpec(prefix=6, suffix=6, tries=7, probability=0.9)  # read differently, measured alike
    extract(again, other, Runtime(device="cpu"))
    assert made == [1]


def test_weights_that_are_not_those_of_the_scores_are_refused(again):
    cell = next(cell for cell in load_grid(again).cells if cell.label.startswith("full"))
    best, last = kept_epochs(cell)
    weights = "adapter/trained.safetensors"
    (cell.folder.epoch(last) / weights).write_bytes((cell.folder.epoch(best) / weights).read_bytes())
    with pytest.raises(ImprintError, match=r"does not give the scores that are stored beside it \(off by"):
        extract(again, ASKED, Runtime(device="cpu"))
    assert not (again / "extraction.json").exists()


def test_data_that_has_changed_is_refused(finished):
    source = finished.parent / "letters.jsonl"
    before = source.read_text()
    try:
        source.write_text(before.replace("r3", "r33"))
        with pytest.raises(UsageError, match=r"no longer holds the records that .* was measured on: put back"):
            extract(finished, ASKED, Runtime(device="cpu"))
    finally:
        source.write_text(before)


def test_tokens_that_have_changed_are_refused(finished, monkeypatch):
    real = folder.prepare

    def other(*args):
        audit = real(*args)
        first = dataclasses.replace(audit.scored[0], ids=audit.scored[0].ids[::-1])
        return dataclasses.replace(audit, scored=(first, *audit.scored[1:]))

    monkeypatch.setattr(folder, "prepare", other)
    with pytest.raises(UsageError, match="no longer become the tokens"):
        extract(finished, ASKED, Runtime(device="cpu"))


def test_records_that_are_all_too_short_are_refused(finished):
    with pytest.raises(DataError, match="none of the 12 members has 500 scored tokens in a row after 6 others"):
        extract(finished, ExtractionSpec(prefix=6, suffix=500), Runtime(device="cpu"))


def test_records_that_are_too_short_are_counted(finished):
    asked = ExtractionSpec(prefix=20, suffix=12)
    result = extract(finished, asked, Runtime(device="cpu"))
    left = result.rows[0].greedy.records
    assert result.short == {"members": 12 - left[0], "non-members": 12 - left[1]}
    assert sum(result.short.values()) > 0


def test_a_folder_without_weights_is_refused(again):
    for weights in again.glob("cells/*/epochs/*/adapter"):
        shutil.rmtree(weights)
    with pytest.raises(UsageError, match="holds no tuned weights"):
        extract(again, ASKED, Runtime(device="cpu"))


def test_a_table_of_other_records_is_refused(again):
    first = extract(again, ASKED, Runtime(device="cpu"))
    [file] = again.glob(f"cells/{first.rows[0].run_id}/extraction/*/{first.rows[0].epoch:02}.parquet")
    pa.parquet.write_table(read_table(file).slice(1), file)
    with pytest.raises(ImprintError, match="is of other records: delete it"):
        extract(again, ASKED, Runtime(device="cpu"))


def test_the_command(finished):
    app = typer.Typer()
    app.command()(extract_command)
    call = [str(finished), "--prefix", "6", "--suffix", "6", "--tries", "100", "--device", "cpu"]
    done = CliRunner().invoke(app, call, catch_exceptions=False)
    assert done.exit_code == 0
    assert "Extraction by epoch, 6 tokens given, 6 to come" in done.output
    assert "members come out greedily" in " ".join(done.output.split())
    wrong = CliRunner().invoke(app, [*call, "--temperature", "0"])
    assert str(wrong.exception) == "extract.temperature: input should be greater than 0 (got 0.0)"
