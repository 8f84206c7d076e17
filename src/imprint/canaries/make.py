"""Canaries are made: secrets drawn at random, and a fair coin for each, which says whether it goes into the data."""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from imprint.canaries.manifest import Canary, Manifest, Space
from imprint.canaries.words import FIRST_NAMES, LAST_NAMES, PROMPTS
from imprint.errors import UsageError, unknown

SPACES = {"digits": Space((tuple("0123456789"),) * 4), "names": Space((FIRST_NAMES, LAST_NAMES), " ")}
"""Family → its secrets, where they can be counted out."""
RARE_WORDS = 8
"""Of a sequence of rare tokens."""
TRIES = 1000
"""Draws in a row that may be of no use before that is given up."""
Samples = Callable[[int, int], list[str]]
"""How many, and a seed → so many texts of the base's own making."""


@dataclass(frozen=True)
class _Source:
    """What secrets are drawn from."""

    dice: random.Random
    tokenizer: Any
    samples: Samples | None


Filling = tuple[str, str]
"""A prompt and the secret that follows it."""


def make(
    count: int = 200,
    families: Sequence[str] = ("digits", "names", "rare", "sample"),
    repetitions: Sequence[int] = (1, 4, 16),
    seed: int | None = None,
    tokenizer: Any = None,
    samples: Samples | None = None,
    model: str = "",
) -> Manifest:
    """Draw canaries, and flip a fair coin for each of them, independently of all others.

    Families and repetitions take turns, so that each combination has as many canaries as any other, or one more.

    Args:
        count: canaries, of which about half will be in the data.
        families: kinds of secret: `digits`, `names`, `rare` (needs `tokenizer`), `sample` (needs `samples`).
        repetitions: how often a canary is told in the data.
        seed: what everything is drawn from, to repeat it; by default the operating system's randomness, which nobody
            can repeat, not even whoever is to be convinced that the coins were fair.
        tokenizer: that of the model.
        samples: draws texts from the base (`sample.sampler`).
        model: its name, for people to read.

    Raises:
        UsageError: an unknown family, one that lacks what it needs, or more canaries than secrets.
    """
    for family in families:
        if family not in FAMILIES:
            raise UsageError(f"--family: {unknown('family', family, FAMILIES)}")
    if count < 1 or not families or not repetitions or min(repetitions) < 1:
        raise UsageError("canaries need a count, a family and repetitions of at least 1 each")
    dice = secrets.SystemRandom() if seed is None else random.Random(seed)
    source = _Source(dice, tokenizer, samples)
    combinations = list(product(dict.fromkeys(families), dict.fromkeys(repetitions)))
    chosen = [combinations[n % len(combinations)] for n in range(count)]
    drawn = {}
    for family in dict.fromkeys(family for family, _ in chosen):
        wanted = sum(family == other for other, _ in chosen)
        drawn[family] = iter(FAMILIES[family](source, family, wanted))
    digits = len(str(count - 1))
    canaries = tuple(
        Canary(f"canary {n:0{digits}}", family, *next(drawn[family]), copies, bool(dice.getrandbits(1)))
        for n, (family, copies) in enumerate(chosen)
    )
    return Manifest(canaries, {family: SPACES[family] for family in drawn if family in SPACES}, model, seed)


def _counted(source: _Source, family: str, wanted: int) -> list[Filling]:
    """Secrets that can be counted out, each at most once with the same prompt."""
    prompts, space = PROMPTS[family], SPACES[family]
    most = len(prompts) * space.size // 2
    if wanted > most:
        raise UsageError(f"--count: {wanted:,} canaries of the family {family}: it has secrets for {most:,}")

    def draw(n: int) -> Filling:
        return prompts[n % len(prompts)], space.joint.join(source.dice.choice(part) for part in space.parts)

    return _distinct(draw, family, wanted)


def _rare(source: _Source, family: str, wanted: int) -> list[Filling]:
    """Sequences of words that the tokenizer has a token for and learned last, which are those it met least."""
    tokenizer = source.tokenizer
    if tokenizer is None:
        raise UsageError("--family rare draws from a tokenizer's vocabulary: name the model with --model")
    [prompt], known = PROMPTS[family], len(tokenizer)
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    before = ids(prompt)

    def word() -> str:
        for _ in range(TRIES):
            token = known // 2 + source.dice.randrange(known - known // 2)
            told = tokenizer.decode([token]).strip()
            usable = token not in special and told.isprintable() and "\ufffd" not in told and not told.isspace()
            if usable and told and ids(f"{prompt} {told}") == [*before, token]:
                return str(told)
        raise UsageError("--family rare: among the tokens that this tokenizer learned last are no words: leave it out")

    return _distinct(lambda _: (prompt, " ".join(word() for _ in range(RARE_WORDS))), family, wanted)


def _sampled(source: _Source, family: str, wanted: int) -> list[Filling]:
    """Texts of the model itself, whose beginning is the prompt."""
    if source.samples is None:
        raise UsageError("--family sample draws from the model itself: name it with --model")
    samples = source.samples
    stock: list[str] = []

    def draw(_: int) -> Filling:
        if not stock:
            stock.extend(samples(wanted, source.dice.getrandbits(62)))
        return parted(stock.pop())

    return _distinct(draw, family, wanted)


def parted(text: str) -> Filling:
    """The first fifth of a text up to a space, and the rest; either is empty where there is too little.

    >>> parted("It  was a bright\\ncold day in April.")
    ('It was', 'a bright cold day in April.')
    """
    text = " ".join("".join(c if c.isprintable() and c != "\ufffd" else " " for c in text).split())
    least = len(text) // 5
    cut = text.find(" ", least)
    cut = cut if cut >= 0 else least
    return text[:cut].strip(), text[cut:].strip()


def _distinct(draw: Callable[[int], Filling], family: str, wanted: int) -> list[Filling]:
    """So many fillings that differ and lack nothing; what has been drawn before is drawn again."""
    found: dict[Filling, None] = {}
    useless = 0
    while len(found) < wanted:
        filling = draw(len(found))
        if filling in found or not all(filling):
            useless += 1
            if useless > TRIES:
                raise UsageError(f"--family {family}: no more than {len(found)} different canaries could be drawn")
        else:
            found[filling], useless = None, 0
    return list(found)


FAMILIES: dict[str, Callable[[_Source, str, int], list[Filling]]] = {
    "digits": _counted,
    "names": _counted,
    "rare": _rare,
    "sample": _sampled,
}
