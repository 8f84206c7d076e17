"""The records of a trainer: the very tokens and labels that it trains on, one record at a time.

A row of a tokenised data set goes through the trainer's own collator alone, which masks, cuts and pads as it does in
training. Records that are handed over as texts or chats are encoded here, as in any other audit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from imprint.auditing.groups import COLUMN, read_records
from imprint.data import Pool
from imprint.data.forms import IGNORED
from imprint.data.split import GIVEN_MOST
from imprint.errors import DataError, UsageError, first_line
from imprint.spec import DataSpec, Source, validated

_FOUND = ("source", "split", "validation", "tune_on", "repeat", "tokenizer", "fingerprint")
"""Keys of a recipe's `data` that an audit finds out itself."""
_NO_TEXT = ("pixel_", "image_", "video_", "audio_", "input_features")
UNPACKED = "give `members` and `nonmembers` as the records before packing, or train without packing"


@dataclass(frozen=True)
class Side:
    """Members or non-members, as they were given.

    Attributes:
        called: for errors.
        source: a file, or rows.
        own: whether they are the trainer's.
    """

    called: str
    source: Any
    own: bool


def records_of(
    trainer: Any, loader: Any, members: Any, nonmembers: Any, data: Mapping[str, Any], seed: int
) -> tuple[Pool, DataSpec]:
    """The records of an audit in training.

    Args:
        trainer: its data sets are members and non-members where others are not given.
        loader: what it trains from.
        members, nonmembers: a file, rows or a data set; None: the trainer's.
        data: keys of a recipe's `data`.
        seed: draws records where there are more than will be scored.

    Raises:
        UsageError: a side is missing, or cannot be used; the sentence says what to do.
    """
    sides = [_side("members", members, trainer.train_dataset), _side("nonmembers", nonmembers, _held_out(trainer))]
    spec = _spec(data, trainer, sides[0], seed)
    found = [_rows(side, number, trainer, loader, spec) for number, side in enumerate(sides)]
    if _in_tokens(found[0]) != _in_tokens(found[1]):
        texts = sides[_in_tokens(found[0])].called
        raise UsageError(
            f"{texts} are texts and the records on the other side tokens, which may have been made by other rules: "
            "give the trainer a train_dataset and an eval_dataset, which it treats alike, or give both sides as texts"
        )
    if _in_tokens(found[0]):
        longest = max(len(row["input_ids"]) for rows in found for row in rows)
        spec = spec.model_copy(update={"format": "tokens", "max_length": spec.max_length or max(2, longest)})
    pool, spec = read_records(spec, *found)
    return pool, spec


def _side(called: str, given: Any, own: Any) -> Side:
    source = own if given is None else given
    if source is None:
        kept = "train_dataset" if called == "members" else "eval_dataset"
        who = "were trained on" if called == "members" else "are like the members but are not trained on"
        raise UsageError(f"{called} are missing: give `{called}`, or the trainer an {kept}: records that {who}")
    return Side(called, source, given is None)


def _held_out(trainer: Any) -> Any:
    found = trainer.eval_dataset
    if isinstance(found, Mapping) and not hasattr(found, "column_names"):
        if len(found) > 1:
            raise UsageError(f"the trainer has several eval_datasets ({', '.join(found)}): give one as `nonmembers`")
        return next(iter(found.values()), None)
    return found


def _spec(data: Mapping[str, Any], trainer: Any, members: Side, seed: int) -> DataSpec:
    """How the records are read; cut as the trainer cuts."""
    for key in _FOUND:
        if key in data:
            raise UsageError(f"data.{key}: an audit has its records from `members` and `nonmembers`; leave it out")
    named = isinstance(members.source, str | os.PathLike)
    name = os.path.basename(members.source) if named else "train_dataset" if members.own else "records"  # noqa: PTH119
    known = {"source": Source(name=name), "split": "given", "overlong": "keep_start", "seed": seed, **data}
    length = getattr(trainer.args, "max_length", None)
    if length and not members.own:
        known.setdefault("max_length", length)
    return validated(DataSpec, known, "data")


def _in_tokens(rows: Any) -> bool:
    return isinstance(rows, list) and isinstance(rows[0], Mapping) and "input_ids" in rows[0]


def _rows(side: Side, number: int, trainer: Any, loader: Any, spec: DataSpec) -> Any:
    """A file as it is; of rows those that will be scored, in tokens where they are or become tokens."""
    source = side.source
    if isinstance(source, str | os.PathLike):
        return source
    if hasattr(source, "iterrows"):  # pandas
        source = source.astype(object).where(source.notna(), None).to_dict("records")
    if not hasattr(source, "__getitem__") or not hasattr(source, "__len__"):
        raise UsageError(
            f"{side.called} are a stream, from which nothing can be drawn: give `{side.called}` as a list of records, "
            f"as in list(dataset.take({GIVEN_MOST}))"
        )
    if not len(source):
        raise DataError(f"{side.called}: no records; expected at least one")
    most = (spec.members, spec.nonmembers)[number] or GIVEN_MOST
    places = draw(_owners(source, spec.group), most, [spec.seed or 0, number])
    rows = [source[place] for place in places]
    if not side.own and not _in_tokens(rows):
        return rows
    collate = _collated(side, trainer, loader)
    beside = [name for name in (spec.id, spec.group or COLUMN, spec.subgroup) if name]
    kept = ((row, collate(row, place)) for row, place in zip(rows, places, strict=True))
    return [{**{name: row[name] for name in beside if name in row}, **tokens} for row, tokens in kept]


def draw(owners: Sequence[object], most: int, seed: Sequence[int]) -> list[int]:
    """Positions of records that are scored, all of an owner's: `most`, or what the last owner has more.

    Args:
        owners: of each record; None is an owner of one.

    >>> draw(["a", "b", "a", None], 4, [0])
    [0, 1, 2, 3]
    >>> len(draw([None] * 10, 3, [0]))
    3
    """
    if len(owners) <= most:
        return list(range(len(owners)))
    of: dict[object, list[int]] = {}
    for place, owner in enumerate(owners):
        of.setdefault(("nobody", place) if owner is None else owner, []).append(place)
    held, drawn = list(of.values()), list[int]()
    for n in np.argsort(np.random.default_rng(seed).random(len(held)), kind="stable"):
        if len(drawn) >= most:
            break
        drawn += held[n]
    return sorted(drawn)


def _owners(source: Any, column: str | None) -> Sequence[object]:
    if column is None:
        return [None] * len(source)
    if column in (getattr(source, "column_names", None) or ()):
        return list(source[column])
    return [row.get(column) if isinstance(row, Mapping) else None for row in (source[n] for n in range(len(source)))]


def _collated(side: Side, trainer: Any, loader: Any) -> Callable[[Any, int], dict[str, Any]]:
    """What the trainer makes of a row: `input_ids`, `labels`, `attention_mask`."""
    if side.own and getattr(trainer.args, "packing", False):
        raise UsageError(f"{side.called}: the trainer packs records into rows, where some are cut: {UNPACKED}")
    if getattr(loader.collate_fn, "mlm", False) or getattr(trainer.data_collator, "mlm", False):
        raise UsageError("the trainer's collator masks tokens (mlm=True): only causal language models can be audited")
    used = getattr(loader.dataset, "column_names", None)  # others have been removed before a collator sees them

    def collated(row: Any, place: int) -> dict[str, Any]:
        where = f"{side.called}, record {place + 1}"
        features = {key: row[key] for key in row if used is None or key in used} if isinstance(row, Mapping) else row
        try:
            batch = loader.collate_fn([features])
        except Exception as error:  # any collator, any error
            raise DataError(f"{where}: the trainer's collator cannot use it: {first_line(error)}") from error
        return _tokens(batch, row, where)

    return collated


def _tokens(batch: Any, row: Any, where: str) -> dict[str, Any]:
    if not {"input_ids", "labels"} <= {*batch}:
        raise DataError(f"{where}: the trainer's collator makes no `input_ids` and `labels` of it: nothing to score")
    if beside := [key for key in batch if key.startswith(_NO_TEXT)]:
        raise DataError(f"{where} comes with {beside[0]}: records of images or sounds cannot be audited")
    shapes = [tuple(batch[key].shape) for key in ("input_ids", "labels", "attention_mask") if key in batch]
    if any(len(shape) != 2 or shape[0] != 1 for shape in shapes):
        raise DataError(
            f"{where}: the trainer's collator makes {shapes[0]} tokens of it: expected one text; {UNPACKED}"
        )
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    if any(label not in (IGNORED, token) for label, token in zip(labels, ids, strict=True)):
        raise DataError(
            f"{where}: its labels are not its own tokens: only a causal loss with labels that are not shifted can be "
            "audited"
        )
    mask, positions = (
        batch[key][0].tolist() if key in batch and batch[key].ndim == 2 else None
        for key in ("attention_mask", "position_ids")
    )
    kept = positions if mask is None or positions is None else [p for p, on in zip(positions, mask, strict=True) if on]
    told = row if isinstance(row, Mapping) else {}
    texts = [len(told.get("seq_lengths") or ()), *map(_texts, (kept, told.get("position_ids")))]
    if max(*texts, *(mask or ())) > 1:
        raise DataError(f"{where} is several records in one: {UNPACKED}")
    return {"input_ids": ids, "labels": labels, "attention_mask": mask or _filled(positions, len(ids))}


def _texts(positions: Sequence[int] | None) -> int:
    """How many texts there are, by the places where positions begin anew.

    >>> _texts([0, 1, 2, 0, 1, 0, 0])
    2
    """
    steps = zip(positions or (), (positions or ())[1:], strict=False)
    return sum(here == 0 < there for here, there in steps)


def _filled(positions: Sequence[int] | None, length: int) -> list[int]:
    """[T] where there is text, where positions alone tell: what is filled up behind a text has position 0.

    >>> _filled([0, 1, 2, 0, 0], 5)
    [1, 1, 1, 0, 0]
    """
    end = length
    while positions is not None and end > 1 and positions[end - 1] == 0:
        end -= 1
    return [1] * end + [0] * (length - end)
