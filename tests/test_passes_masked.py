"""Neighbours that a masked language model proposes, against a naive search: one word, one pass, one text at a time."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from imprint.errors import DataError, ModelError
from imprint.passes import PASSES, EvidenceSpec, masked
from imprint.passes.bench import digest
from imprint.types import Chat, Example, Tokenized
from tests.conftest import WORDS, save_model
from tests.test_passes import LONG, TOLERANCE, bench_of, examples, losses, measured, tuned, words

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = [
    *SPECIAL,
    *WORDS,
    *"sing jump sleep er".split(),
    "##s",
    "##ed",
    "##er",
    ":",
    *"0123456789",
    *map("##{}".format, range(10)),
]


def bert_tokenizer():
    inner = Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names)


SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_bert(folder: Path, **changes) -> Path:
    torch.manual_seed(1)
    config = transformers.BertConfig(vocab_size=len(PIECES) + 3, max_position_embeddings=64, **SMALL)
    config.initializer_range = 0.5
    config.update(changes)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    bert_tokenizer().save_pretrained(folder)
    return folder


def save_roberta(folder: Path) -> Path:
    torch.manual_seed(1)
    tokenizer = words()
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=66, pad_token_id=1, initializer_range=0.5, **SMALL
    )
    transformers.RobertaForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("masked") / "bert")


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    return save_roberta(tmp_path_factory.mktemp("masked") / "roberta")


def asking(folder, count=6):
    return EvidenceSpec(neighbours=count, masked_model=str(folder))


def naive_swaps(bench, folder, n, count, same_kind):
    """The best swaps of a plain text, by softmax and division as the paper writes it, in float64."""
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text, record = bench.audit.examples[n].target, bench.audit.scored[n]
    plain = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = tokenizer(text).input_ids
    front = ids.index(plain.input_ids[0])
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    dice = torch.Generator().manual_seed(int.from_bytes(digest(bench.seed, record.id)[:8], "big") >> 1)
    embedded = model.get_input_embeddings()(torch.tensor(ids))
    kept = torch.rand(embedded.shape, generator=dice) >= 0.7
    swaps = []
    for place, (start, end) in enumerate(plain.offset_mapping):
        row = embedded.clone()
        row[front + place] = torch.where(kept[front + place], row[front + place] / 0.3, 0)
        with torch.no_grad():
            p = model(inputs_embeds=row[None]).logits[0, front + place].double().softmax(-1).numpy()
        old = plain.input_ids[place]
        for new, token in names.items():
            shown = tokenizer.decode([new]).strip().removeprefix("##")
            fits = new != old and new not in tokenizer.all_special_ids and same_kind(token, names[old])
            if (
                fits
                and old not in tokenizer.all_special_ids
                and shown.isprintable()
                and shown
                and "\ufffd" not in shown
            ):
                begin = end - len(text[start:end].lstrip())
                swaps.append((p[new] / (1 - p[old]), f"{text[:begin]}{shown}{text[end:]}"))
    best = [other for _, other in sorted(swaps, reverse=True) if other != text]
    return best[:count]


def continuation(new, old):
    return new.startswith("##") == old.startswith("##")


def after_space(new, old):
    return new.startswith("Ġ") == old.startswith("Ġ")


@pytest.mark.parametrize(("which", "kind"), [("bert", continuation), ("roberta", after_space)])
@pytest.mark.parametrize("budget", [30, 2000])
def test_the_best_swaps_are_those_of_a_naive_search(which, kind, budget, request):
    folder = request.getfixturevalue(which)
    texts = [dataclasses.replace(e, prompt="", target=e.target.lower()) for e in examples(4)]
    bench = bench_of(tuned("gpt2", "lora"), texts, spec=asking(folder), budget=budget)
    found = masked.swaps(bench)
    for n, example in enumerate(texts):
        made = [masked.with_swap(example, swap, "target").target for swap in found[n]]
        assert sorted(made) == sorted(naive_swaps(bench, folder, n, 6, kind))
        assert [swap.score for swap in found[n]] == sorted((swap.score for swap in found[n]), reverse=True)
        assert max(math.exp(swap.score) for swap in found[n]) <= 1


def test_losses_equal_oracle(bert):
    bench = bench_of(tuned("llama", "lora"), examples(5), bos=True, spec=asking(bert, 3))
    found, swaps = measured("neighbours", bench), masked.swaps(bench)
    for n, example in enumerate(bench.audit.examples):
        made = [bench.encoder(masked.with_swap(example, swap, "target")) for swap in swaps[n]]
        assert all(not np.array_equal(one.ids, bench.audit.scored[n].ids) for one in made)
        np.testing.assert_allclose(found[n], losses(bench.model, made), atol=TOLERANCE)
        assert all(swap.text == 0 and 0 <= swap.start < swap.end <= len(example.target) for swap in swaps[n])


def test_a_record_has_the_same_swaps_among_others_and_another_seed_has_others(bert):
    texts = examples(6)
    whole = masked.swaps(bench_of(tuned("gpt2", "lora"), texts, spec=asking(bert)))
    assert masked.swaps(bench_of(tuned("gpt2", "lora"), texts[::-2], spec=asking(bert)))[0] == whole[5]
    other = masked.swaps(bench_of(tuned("gpt2", "lora"), texts, spec=asking(bert), seed=4))
    assert [swap.word for swap in other[0]] != [swap.word for swap in whole[0]] or other[0] != whole[0]


def test_swaps_are_searched_once_for_all_checkpoints(bert, monkeypatch):
    memo = {}
    first = bench_of(tuned("gpt2", "lora"), examples(3), spec=asking(bert), memo=memo)
    found = masked.swaps(first)
    monkeypatch.setattr(masked, "load", None)
    assert masked.swaps(bench_of(tuned("gpt2", "prefix"), examples(3), spec=asking(bert), memo=memo)) is found


def test_a_text_longer_than_a_window_is_searched_all_over(bert):
    text = Example("x", "", " ".join(WORDS * 8))
    bench = bench_of(tuned("gpt2", "lora"), [text], spec=asking(bert, 400))
    encoder = dataclasses.replace(bench.encoder, max_length=1000)
    audit = dataclasses.replace(bench.audit, scored=(encoder(text),))
    [found] = masked.swaps(dataclasses.replace(bench, encoder=encoder, audit=audit))
    assert {swap.start // 100 for swap in found} == set(range(len(text.target) // 100 + 1))


def test_words_beyond_what_is_kept_make_no_neighbours(bert):
    """Sixty tokens are kept of a text of a thousand words: a swap behind them would change nothing."""
    text = Example("x", "", " ".join(WORDS * 50))
    bench = bench_of(tuned("gpt2", "lora"), [text], spec=asking(bert, 30))
    record = bench.audit.scored[0]
    assert record.cut
    assert len(record) == LONG
    [found] = masked.swaps(bench)
    assert max(swap.start for swap in found) < len(words().decode(record.ids.tolist()))
    made = [bench.encoder(masked.with_swap(text, swap, "target")) for swap in found]
    assert all(not np.array_equal(one.ids, record.ids) for one in made)


def test_what_is_learned_of_a_chat_is_swapped():
    turns = ({"role": "user", "content": "who sings"}, {"role": "assistant", "content": "the fox jumps"})
    chat = Example("c", "", "", form=Chat(turns, (1,)))
    changed = masked.with_swap(chat, masked.Swap(0.0, 0, 4, 7, "dog"), "target")
    assert [m["content"] for m in changed.form.messages] == ["who sings", "the dog jumps"]
    changed = masked.with_swap(chat, masked.Swap(0.0, 0, 0, 3, "cat"), "all")
    assert [m["content"] for m in changed.form.messages] == ["cat sings", "the fox jumps"]


def test_a_record_without_words_is_counted(bert):
    blank = Example("b", "", "\t\t\t \t")
    with pytest.raises(DataError, match=r"1 of 2 evaluated records have no word that could be replaced .* 'b'"):
        measured("neighbours", bench_of(tuned("gpt2", "lora"), [blank, *examples(1)], spec=asking(bert)))


def test_records_in_tokens_have_no_words(bert):
    tokens = Example("t", "", "", form=Tokenized((5, 6, 7), (False, True, True)))
    with pytest.raises(DataError, match=r"1 of 1 records come in tokens .*leave `masked_model` out"):
        measured("neighbours", bench_of(tuned("gpt2", "lora"), [tokens], spec=asking(bert)))


def test_settings_name_the_weights(bert, roberta, tmp_path):
    copied = save_bert(tmp_path / "elsewhere")
    one, same, other = (PASSES["neighbours"].settings(asking(folder), 0) for folder in (bert, copied, roberta))
    assert one == same
    assert len(one["masked_model"]) == 64
    assert one["masked_model"] != other["masked_model"]


# ---- hostile and unfit models ----


def refused(folder):
    with pytest.raises(ModelError) as caught:
        measured("neighbours", bench_of(tuned("gpt2", "lora"), examples(1), spec=asking(folder)))
    return str(caught.value)


def test_a_causal_model_is_refused(tmp_path):
    assert "as a masked language model" in refused(save_model(tmp_path / "llama", "llama"))


def test_missing_weights_are_refused(tmp_path):
    folder = save_bert(tmp_path / "bert")
    transformers.BertModel.from_pretrained(folder).save_pretrained(folder)
    assert "which would be random" in refused(folder)


def test_pickled_weights_are_refused(tmp_path):
    folder = save_bert(tmp_path / "bert")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "which can run code when loaded" in refused(folder)


def test_code_of_its_own_is_never_run(tmp_path):
    folder = save_bert(tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "own.Config", "AutoModelForMaskedLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('it ran')")
    assert "which is never run" in refused(folder)


def test_an_unknown_model_is_refused():
    assert "does not exist" in refused("./no/such/folder")
