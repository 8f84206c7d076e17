"""The offline world: a fictional country told four ways, from one seed, the same on every machine.

* `world/articles`: encyclopaedia articles about towns, people and companies (plain text);
* `world/triples`: facts as triples, and a text that tells them (prompt and target), two texts a set;
* `world/news`: a report and its summary (prompt and target);
* `world/customers`: customer records with invented personal details (plain text), some customers twice.

Two parts. The *public* part (`public_texts`) pretrains the shipped models. The *private* part
(`read("world/…")`) is what a run tunes on. They share the language and differ in two ways:

* **facts**: a name belongs to the public or to the private part by its checksum, so no person, town or
  company occurs in both;
* **house style**: every text is told by a publishing house, which prefers one of four phrasings of each
  fact, a date and a number format, and some words over others. Eight houses tell the public part. A ninth
  one, never seen in pretraining, tells the private part. That is what can be learned without memorizing
  anything: a tuning method that picks up the house lowers the perplexity of members and non-members alike.

Members and non-members are drawn at random from one private part, so an untuned model cannot tell them apart.
"""

from __future__ import annotations

import hashlib
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from imprint.data import phrases as words
from imprint.data.pool import Pool
from imprint.errors import UsageError, unknown
from imprint.types import Example

KINDS = ("articles", "triples", "news", "customers")
PRIVATE_RECORDS = 4000
PUBLIC_HOUSES = 8
FORMS = 4
Facts = dict[str, str]


class Dice:
    """A seeded source of choices that uses `random()` alone, whose sequence Python guarantees for ever."""

    def __init__(self, *seed: object) -> None:
        self._random = random.Random(hashlib.sha256(repr(seed).encode()).hexdigest()).random

    def below(self, n: int) -> int:
        return int(self._random() * n)

    def integer(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + self.below(high - low + 1)

    def chance(self, p: float) -> bool:
        return self._random() < p

    def digits(self, n: int) -> str:
        return "".join(str(self.below(10)) for _ in range(n))

    def order(self, n: int) -> list[int]:
        keys = [self._random() for _ in range(n)]
        return sorted(range(n), key=keys.__getitem__)


@dataclass(frozen=True)
class House:
    """A publishing house: which forms and words it prefers. House `PUBLIC_HOUSES` is the private one."""

    number: int
    loyalty: float = 0.85  # how often the preferred phrasing is taken

    def form(self, slot: str) -> int:
        """The preferred one of the four forms of `slot`."""
        return _form(self.number, slot)

    def phrase(self, dice: Dice, slot: str, forms: Sequence[str]) -> str:
        return forms[self.form(slot) if dice.chance(self.loyalty) else dice.below(len(forms))]

    def word(self, dice: Dice, name: str, choices: Sequence[str]) -> str:
        """A word whose frequency falls geometrically in the house's own order of preference."""
        rank = 0
        while rank < len(choices) - 1 and not dice.chance(0.25):
            rank += 1
        return choices[_preference(self.number, name, len(choices))[rank]]


@cache
def _form(house: int, slot: str) -> int:
    return Dice("house", house, slot).below(FORMS)


@cache
def _preference(house: int, name: str, n: int) -> list[int]:
    return Dice("preference", house, name).order(n)


@dataclass(frozen=True)
class Teller:
    """Draws facts and tells them in the style of one house."""

    dice: Dice
    house: House

    @property
    def private(self) -> bool:
        return self.house.number == PUBLIC_HOUSES

    def name(self, ends: Sequence[str]) -> str:
        """A built name of this part of the world: the other part's names have another checksum parity."""
        while True:
            middle = self.pick(words.MIDDLES) if self.dice.chance(0.7) else ""
            name = self.pick(words.STARTS) + middle + self.pick(ends)
            if zlib.crc32(name.encode()) % 2 == int(self.private):
                return name

    def pick(self, choices: Sequence[str]) -> str:
        return choices[self.dice.below(len(choices))]

    def prefer(self, name: str, choices: Sequence[str]) -> str:
        return self.house.word(self.dice, name, choices)

    def person(self) -> str:
        return f"{self.pick(words.FIRST_NAMES)} {self.name(words.SURNAME_ENDS)}"

    def town(self) -> str:
        return self.name(words.TOWN_ENDS)

    def company(self) -> str:
        return self.name(words.COMPANY_ENDS)

    def date(self, first: int, last: int) -> str:
        year, month, day = self.dice.integer(first, last), self.dice.below(12), self.dice.integer(1, 28)
        name = words.MONTHS[month]
        forms = (
            f"{day} {name} {year}",
            f"{name} {day}, {year}",
            f"{year}-{month + 1:02}-{day:02}",
            f"{day}/{month + 1}/{year}",
        )
        return forms[self.house.form("date")]

    def count(self, low: int, high: int) -> str:
        n = self.dice.integer(low, high)
        return (f"{n:,}", str(n), f"{n:,}".replace(",", " "), f"{n:,}".replace(",", "."))[self.house.form("number")]

    def facts(self, entity: str) -> Facts:
        """Everything a telling of `entity` may mention."""
        dice, prefer = self.dice, self.prefer
        name = {"town": self.town, "company": self.company}.get(entity, self.person)()
        return {
            "name": name,
            "person": self.person(),
            "second": self.person(),
            "town": self.town(),
            "company": self.company(),
            "region": prefer("region", words.REGIONS),
            "country": prefer("country", words.COUNTRIES),
            "population": self.count(100, 99999),
            "amount": self.count(1000, 999999) if entity == "event" else self.count(10, 9999),
            "founded": str(dice.integer(1100, 1899)),
            "year": str(dice.integer(1900, 1999)),
            "recent": str(dice.integer(1950, 2019)),
            "date": self.date(1980, 2019) if entity == "event" else self.date(1920, 1999),
            "craft": prefer("craft", words.CRAFTS),
            "building": prefer("building", words.BUILDINGS),
            "profession": prefer("profession", words.PROFESSIONS),
            "subject": prefer("subject", words.SUBJECTS),
            "sector": prefer("sector", words.SECTORS),
            "event": prefer("event", words.EVENTS),
            "office": prefer("office", words.OFFICES),
            "product": prefer("product", words.PRODUCTS),
            "complaint": prefer("complaint", words.COMPLAINTS),
            "remedy": prefer("remedy", words.REMEDIES),
            "work": f"The {self.pick(words.ADJECTIVES)} {self.pick(words.NOUNS)}",
            "number": dice.digits(5),
            "phone": f"{dice.digits(3)} {dice.digits(4)}",
            "mail": f"{name.split()[0].lower()}{dice.digits(2)}@{prefer('mail', words.MAILS)}.example",
            "house": str(dice.integer(1, 199)),
            "street": prefer("street", words.STREETS),
            "card": f"{dice.digits(4)} {dice.digits(4)}",
        }

    def tell(self, entity: str, slots: Sequence[str], facts: Facts) -> str:
        tellings = words.TELLINGS[entity]
        return " ".join(self.house.phrase(self.dice, f"{entity}.{s}", tellings[s][2]) for s in slots).format(**facts)

    def slots(self, entity: str, least: int) -> list[str]:
        """The first slot, which introduces the subject, and at least `least - 1` of the others in their order."""
        first, *rest = words.TELLINGS[entity]
        keep = set(self.dice.order(len(rest))[: self.dice.integer(least - 1, len(rest))])
        return [first, *(slot for i, slot in enumerate(rest) if i in keep)]

    def linearise(self, entity: str, slots: Sequence[str], facts: Facts) -> str:
        relations = (words.TELLINGS[entity][slot] for slot in slots)
        return " | ".join(f"{facts['name']} : {r} : {v.format(**facts)}" for r, v, _ in relations)


def _articles(teller: Teller, subject: str) -> Iterator[Example]:
    entity = teller.pick(("town", "person", "company"))
    facts = teller.facts(entity)
    yield Example(f"{subject}-0", "", teller.tell(entity, teller.slots(entity, 3), facts), subject)


def _triples(teller: Teller, subject: str) -> Iterator[Example]:
    entity = teller.pick(("town", "person", "company"))
    facts, slots = teller.facts(entity), teller.slots(entity, 2)
    prompt = teller.linearise(entity, slots, facts) + "\nText:"
    for n in range(2):
        yield Example(f"{subject}-{n}", prompt, " " + teller.tell(entity, slots, facts), subject)


def _news(teller: Teller, subject: str) -> Iterator[Example]:
    facts = teller.facts("event")
    report = teller.tell("event", teller.slots("event", 3), facts)
    summary = teller.house.phrase(teller.dice, "event.summary", words.SUMMARIES).format(**facts)
    yield Example(f"{subject}-0", f"{report}\nSummary:", f" {summary}", subject)


def _customers(teller: Teller, subject: str) -> Iterator[Example]:
    facts = teller.facts("customer")
    yield Example(f"{subject}-0", "", teller.tell("customer", list(words.TELLINGS["customer"]), facts), subject)
    if teller.dice.chance(0.15):  # the same customer again: what identifies them stays, the matter is another
        personal = ("name", "number", "phone", "mail", "house", "street", "town", "date", "card")
        again = {**teller.facts("customer"), **{key: facts[key] for key in personal}}
        yield Example(f"{subject}-1", "", teller.tell("customer", ("person", "complaint", "payment"), again), subject)


_TELL = {"articles": _articles, "triples": _triples, "news": _news, "customers": _customers}


def _stream(kind: str, part: str) -> Iterator[Example]:
    """The endless stream of one kind and part; text n of it is the same however many are taken."""
    number = 0
    while True:
        dice = Dice("world", kind, part, number)
        house = House(PUBLIC_HOUSES if part == "private" else dice.below(PUBLIC_HOUSES))
        yield from _TELL[kind](Teller(dice, house), f"{kind}-{number}")
        number += 1


def public_texts(part: str = "public") -> Iterator[str]:
    """The endless pretraining text, the four kinds in turn; `part` names independent streams of it."""
    streams = [_stream(kind, part) for kind in KINDS]
    while True:
        for stream in streams:
            example = next(stream)
            yield example.prompt + example.target


@cache  # a pool is a value, and telling it again takes a second
def read(name: str) -> Pool:
    """The private part of `world/KIND`, or of all kinds in turn for `world`.

    Raises:
        UsageError: an unknown kind.
    """
    kinds = KINDS if name == "world" else (name.partition("/")[2],)
    if not set(kinds) <= set(KINDS):
        raise UsageError(unknown("data source", name, ["world", *(f"world/{kind}" for kind in KINDS)]))
    streams = [_stream(kind, "private") for kind in kinds]
    records = tuple(next(streams[n % len(streams)]) for n in range(PRIVATE_RECORDS))
    return Pool(name=name, parts={"all": records}, dropped={}, paper={})
