"""Words that a masked language model would put in a text: the neighbours of Mattern et al. 2023.

As in the paper, a word is not masked: dropout of .7 on its embedding leaves the model an idea of what stood there. Each
other token is ranked by p(new) / (1 - p(old)), and the best n swaps of a text, wherever they are, make its neighbours.
Unlike the authors' code, dropout falls on the word's own embedding alone (that code adds positions twice), a token is
replaced only by one of its kind (a word's beginning by such, a continuation by such) and in the text as it is written,
and a place may have more than five of the swaps. The model sees the scored text alone, in windows of what it takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from imprint.errors import ModelError, first_line
from imprint.passes.bench import digest
from imprint.passes.texts import check_texts, scored_texts, variants, with_texts
from imprint.spec import ModelSpec
from imprint.tuning.locate import Located, locate, own_code

if TYPE_CHECKING:
    import torch
    from torch import nn

    from imprint.data.tokens import Encoder
    from imprint.passes.bench import Bench
    from imprint.types import Example

DROPOUT = 0.7
WINDOW = 512
"""Tokens that most masked models take."""


class Swap(NamedTuple):
    """Other characters in place of those from `start` to `end` of one of a record's scored texts."""

    score: float
    text: int
    start: int
    end: int
    word: str


def with_swap(example: Example, swap: Swap, loss: str) -> Example:
    """The record with one word replaced."""
    texts = scored_texts(example, loss)
    old = texts[swap.text]
    texts[swap.text] = f"{old[: swap.start]}{swap.word}{old[swap.end :]}"
    return with_texts(example, texts, loss)


def located(name: str) -> Located:
    """Where a masked model lies, by a Hub id or a folder.

    Raises:
        ModelError: there is none, or not as safetensors.
    """
    return locate(ModelSpec(name=name))


def swaps(bench: Bench) -> list[list[Swap]]:
    """The best swaps of each record, as many as the neighbours asked for; none where there are fewer.

    Raises:
        DataError: records come in tokens.
        ModelError: the masked model cannot be used.
    """
    assert bench.spec.masked_model is not None
    key = f"swaps {bench.spec.masked_model} {bench.spec.neighbours} {bench.seed}"
    if key not in bench.memo:
        check_texts(bench.audit.examples, "leave `masked_model` out, and tokens are swapped")
        proposer = load(located(bench.spec.masked_model), next(bench.model.parameters()).device, bench.budget)
        bench.memo[key] = [_best(bench, proposer, n) for n in range(len(bench.audit.examples))]
    found: list[list[Swap]] = bench.memo[key]
    return found


def _best(bench: Bench, proposer: Proposer, n: int) -> list[Swap]:
    """Those of which the tokens show something: a word beyond what is kept of a record makes no neighbour."""
    import torch

    example, record, count = bench.audit.examples[n], bench.audit.scored[n], bench.spec.neighbours
    encoder, found = variants(bench.encoder), []
    dice = torch.Generator().manual_seed(int.from_bytes(digest(bench.seed, record.id)[:8], "big") >> 1)
    reach = len(encoder.tokenizer.decode(record.ids.tolist())) if record.cut else None
    texts = scored_texts(example, encoder.loss)
    proposed = [swap for t, text in enumerate(texts) for swap in proposer(t, text[:reach], count, dice)]
    for swap in sorted(proposed, key=lambda swap: (-swap.score, swap[1:])):
        if _differs(encoder, with_swap(example, swap, encoder.loss), record.ids):
            found.append(swap)
        if len(found) == count:
            return found
    return []


def _differs(encoder: Encoder, example: Example, ids: NDArray[np.int32]) -> bool:
    made = encoder(example)
    return bool(made.scored.any()) and not np.array_equal(made.ids, ids)


@dataclass(frozen=True)
class Proposer:
    """A masked language model at work.

    Attributes:
        width: tokens of its longest window, those that it puts around a text included.
        budget: tokens of one forward pass.
    """

    model: nn.Module
    tokenizer: Any
    width: int
    budget: int

    def __call__(self, number: int, text: str, count: int, dice: torch.Generator) -> Iterator[Swap]:
        """The best `count` swaps of every word of a text, which is the record's scored text of that number."""
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, spans = found["input_ids"], found["offset_mapping"]
        front, back = self._around
        step = self.width - len(front) - len(back)
        for begin in range(0, len(ids), step):
            window = ids[begin : begin + step]
            places = [n for n, token in enumerate(window) if self._kinds[token] >= 0]
            for place, scores, tokens in self._ranked([*front, *window, *back], len(front), places, count, dice):
                start, end = spans[begin + place]
                start += len(text[start:end]) - len(text[start:end].lstrip())
                words = [self._surfaces[token] for token in tokens]
                yield from (
                    Swap(score, number, start, end, word)
                    for score, word in zip(scores, words, strict=True)
                    if score > -np.inf and word != text[start:end]
                )

    def _ranked(
        self, ids: Sequence[int], front: int, places: Sequence[int], count: int, dice: torch.Generator
    ) -> Iterator[tuple[int, list[float], list[int]]]:
        """Of each place: log p(new) - log(1 - p(old)) of the best tokens of the old one's kind, and these tokens."""
        import torch

        device = next(self.model.parameters()).device
        kinds = torch.from_numpy(self._kinds).to(device)
        row = torch.tensor(ids, device=device)
        with torch.inference_mode():
            embedded = self.model.get_input_embeddings()(row)  # type: ignore[operator]
            kept = (torch.rand(embedded.shape, generator=dice) >= DROPOUT).to(device) / (1 - DROPOUT)
            size = max(1, self.budget // len(ids))
            for group in (places[n : n + size] for n in range(0, len(places), size)):
                rows, at = torch.arange(len(group), device=device), torch.tensor(group, device=device) + front
                batch = embedded.repeat(len(group), 1, 1)
                batch[rows, at] *= kept[at]
                old = row[at]
                mask = torch.ones(batch.shape[:2], dtype=torch.long, device=device)
                logits = self.model(inputs_embeds=batch, attention_mask=mask).logits[rows, at].float()
                logits[rows, old] = -torch.inf  # the others' probabilities are then those over 1 - p(old)
                scores = logits.log_softmax(-1)[:, : len(kinds)]
                scores = scores.masked_fill(kinds[None] != kinds[old][:, None], -torch.inf)
                best = scores.topk(min(count, scores.shape[1]))
                yield from zip(group, best.values.tolist(), best.indices.tolist(), strict=True)

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts in front of a text, and behind it."""
        plain, full = (list(self.tokenizer("a", add_special_tokens=special).input_ids) for special in (False, True))
        begin = next((n for n in range(len(full)) if full[n : n + len(plain)] == plain), None)
        return ([], []) if begin is None else (full[:begin], full[begin + len(plain) :])

    @cached_property
    def _names(self) -> dict[int, str]:
        return {number: token for token, number in self.tokenizer.get_vocab().items()}

    @cached_property
    def _surfaces(self) -> list[str]:
        """What each token looks like in a text."""
        whole = self.tokenizer.batch_decode([[n] for n in range(max(self._names) + 1)])
        return [text.strip().removeprefix("##") for text in whole]

    @cached_property
    def _kinds(self) -> NDArray[np.int64]:
        """Of each token: 0 within a word as WordPiece marks it, 1 after a space, 2 neither; -1 if it is no word."""
        special, found = set(self.tokenizer.all_special_ids), np.full(max(self._names) + 1, -1)
        for number, token in self._names.items():
            word = self._surfaces[number]
            if number not in special and word.isprintable() and word and "\ufffd" not in word:
                found[number] = 0 if token.startswith("##") else 1 if token.startswith(("Ġ", "▁")) else 2
        return found


def load(found: Located, device: torch.device, budget: int) -> Proposer:
    """A masked language model in float32, from safetensors and by Transformers' own code.

    Raises:
        ModelError: it cannot be loaded, lacks weights, or its tokenizer does not say which characters a token is.
    """
    import torch
    from transformers import AutoModelForMaskedLM

    from imprint.tuning.models import load_tokenizer

    try:
        model, info = AutoModelForMaskedLM.from_pretrained(
            found.path,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # the library raises many kinds; each means that this folder is no usable model
        code = own_code(found.path) if "trust_remote_code" in str(error) else ""
        raise ModelError(
            f"the masked model {found.path} cannot be loaded as a masked language model: {code or first_line(error)}"
        ) from None
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"the masked model {found.path} lacks {len(missing)} weights, which would be random "
            f"({', '.join(missing[:3])}): it is damaged or no masked language model"
        )
    tokenizer = load_tokenizer(found)
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"the tokenizer of the masked model {found.path} does not say which characters a token comes from: use one "
            "with a tokenizer.json"
        )
    width = min(WINDOW, found.context - 2)  # RoBERTa counts its positions from 2
    return Proposer(model.to(device).eval().requires_grad_(False), tokenizer, width, budget)
