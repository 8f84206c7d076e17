"""WikiText-2, WebNLG and XSum, as the paper uses them: from the Hub, or from a local folder.

**Prompt and target.** A prompt ends with a cue on a line of its own (`\\nText:`, `\\nSummary:`) and the target begins
with the space after it, so that `prompt + target` reads naturally and the target's first token is the ordinary
mid-sentence one. A tokenizer must therefore never strip the target, and one that shortens a prompt must cut its
front. Running text (WikiText) has no prompt.

**Groups.** WikiText: the article. WebNLG: the set of triples, wherever it occurs. XSum: the document.

**Local folders** hold one `.jsonl` (or csv, parquet) file per part, or the Hub's parquet files as they are.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imprint.data.formats import folder_files
from imprint.data.forms import content_id
from imprint.data.hub import hub_rows
from imprint.data.pool import OFFICIAL_PARTS, Pool, file_rows, local_path, missing, nonempty
from imprint.data.row import Row, checked_text, read_key, read_text, shown
from imprint.errors import DataError
from imprint.spec import Source, content_key
from imprint.types import Example

WORDS_OF_A_LINE = 8
"""A WikiText line of fewer white-space separated words is not a text: list items, captions, track names."""
TEXT_CUE = "\nText:"
SUMMARY_CUE = "\nSummary:"


def wikitext(part: str, rows: Iterable[Row]) -> Iterator[Example | str]:
    """Lines of articles.

    The stated rule: a line is stripped of surrounding white space; blank lines, headings of any level, and lines
    under eight words are left out. A heading is a line framed by as many `=` words before as after its title;
    one such word on each side begins a new article.
    """
    article = f"({part}, before the first title)"
    for number, row in enumerate(rows, 1):
        words = (line := read_text(row, "text").strip()).split()
        level = _heading_level(words)
        if level == 1:
            article = line.strip("= ")
        if not words:
            yield "blank line"
        elif level:
            yield "heading"
        elif len(words) < WORDS_OF_A_LINE:
            yield f"line under {WORDS_OF_A_LINE} words"
        else:
            yield Example(f"{part}/{number}", "", line, article)


def _heading_level(words: list[str]) -> int:
    """Equals signs on each side of a title; 0 where the line is none (`= National record`, `E = m c ²`)."""
    before = sum(1 for _ in itertools.takewhile("=".__eq__, words))
    after = sum(1 for _ in itertools.takewhile("=".__eq__, reversed(words)))
    return before if before == after and 2 * before < len(words) else 0


def webnlg(part: str, rows: Iterable[Row]) -> Iterator[Example | str]:
    """Triples → text, one example a text, whatever the annotators' remark on it (`good`, `toFix`).

    The layouts: one row a text with `triples` and `text` (ours) or `input` and `target` (GEM on the Hub); one row an
    entry with `modified_triple_sets` and `lex`, which may hold any number of texts (the challenge's own).
    """
    for number, row in enumerate(rows, 1):
        texts = list(_webnlg_texts(row))
        if not texts:
            yield "entry without a text"
        for name, triples, text in texts:
            if not triples or not text.strip():
                yield "empty text"
                continue
            fallback = f"{part}/{number}" if len(texts) == 1 else f"{part}/{number}/{name}"
            key = _own_id(row, "id", "gem_id")
            own = f"{key}/{name}" if "lex" in row.values and key else key
            prompt = linearised(triples) + TEXT_CUE
            yield Example(own or fallback, prompt, f" {text.strip()}", content_key(sorted(set(triples))))


def linearised(triples: list[str]) -> str:
    """Triples as one line.

    >>> linearised(["Aarhus | leader | Jacob_Bundsgaard", "Aarhus | country | Denmark"])
    'Aarhus : leader : Jacob_Bundsgaard | Aarhus : country : Denmark'
    """
    return " | ".join(triple.replace(" | ", " : ") for triple in triples)


def _webnlg_texts(row: Row) -> list[tuple[str, list[str], str]]:
    """(name, triples, text) of each text of a row."""
    if "lex" in row.columns:
        triples = _strings(row, "modified_triple_sets", _listed(row, "modified_triple_sets", "mtriple_set"))
        texts = _strings(row, "lex", _listed(row, "lex", "text"))
        names = _listed(row, "lex", "lid")
        if not isinstance(names, list) or len(names) != len(texts):
            names = [f"Id{n}" for n in range(1, len(texts) + 1)]
        return [(str(name), triples, text) for name, text in zip(names, texts, strict=True)]
    if "input" in row.columns:
        return [("", _strings(row, "input", row.values["input"]), read_text(row, "target"))]
    if "triples" in row.columns:
        return [("", _strings(row, "triples", row.values["triples"]), read_text(row, "text"))]
    layouts = "`triples` and `text`, `input` and `target`, or `modified_triple_sets` and `lex`"
    raise DataError(f"{row.where}: expected WebNLG columns {layouts}; found: {shown(row.columns)}.")


def _listed(row: Row, column: str, key: str) -> Any:
    """`{key: [...]}` (how the Hub stores it) or `[{key: ...}, ...]` (how JSON has it) → the list of what `key` holds.

    An entry has one set of triples; should there be more, the first is meant.
    """
    value = row.values.get(column)
    if isinstance(value, list):
        value = {key: [one[key] for one in value if isinstance(one, dict) and key in one]}
    held = value.get(key) if isinstance(value, dict) else None
    return held[0] if held and isinstance(held, list) and isinstance(held[0], list) else held


def _strings(row: Row, column: str, value: Any) -> list[str]:
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return [checked_text(row, column, one) for one in value]
    raise DataError(f"{row.where}: column {column!r} is not as in WebNLG; expected a list of strings in it.")


def xsum(part: str, rows: Iterable[Row]) -> Iterator[Example | str]:
    """A news report → its one-sentence summary."""
    for number, row in enumerate(rows, 1):
        document, summary = read_text(row, "document").strip(), read_text(row, "summary").strip()
        if document and summary:
            key = _own_id(row, "id") or f"{part}/{number}"
            yield Example(key, document + SUMMARY_CUE, f" {summary}", content_id("", document))
        else:
            yield "empty text"


def _own_id(row: Row, *columns: str) -> str | None:
    """The source's id of the row, by the first of `columns` that there is."""
    return next((read_key(row, column, optional=True) for column in columns if column in row.values), None)


@dataclass(frozen=True)
class Benchmark:
    """One of the paper's data sets.

    Args:
        hub: Hub id.
        revision: the branch that holds parquet files.
        folder: where in the repository they lie.
        files: their pattern inside it, with the part's name for `*part*`.
        paper: sizes of the paper's protocol.
        read: part and rows → examples, and a reason for each record left out.
    """

    hub: str
    revision: str
    folder: str
    files: str
    paper: dict[str, int]
    read: Callable[[str, Iterable[Row]], Iterator[Example | str]]


BENCHMARKS: dict[str, Benchmark] = {
    "wikitext-2": Benchmark(
        hub="Salesforce/wikitext",
        revision="main",
        folder="wikitext-2-raw-v1",
        files="*part*-*.parquet",
        paper={"members": 2000, "nonmembers": 2000, "tune_on": 22335},
        read=wikitext,
    ),
    # GEM's copy is the one with the paper's counts: 35,426 texts in train, 1,779 entries in test.
    "webnlg": Benchmark(
        hub="GEM/web_nlg",
        revision="refs/convert/parquet",
        folder="en",
        files="*part*/*.parquet",
        paper={"members": 1779, "nonmembers": 1779, "tune_on": 35426},
        read=webnlg,
    ),
    "xsum": Benchmark(
        hub="EdinburghNLP/xsum",
        revision="refs/convert/parquet",
        folder="default",
        files="*part*/*.parquet",
        paper={"members": 1000, "nonmembers": 1000, "tune_on": 5000},
        read=xsum,
    ),
}


def read_benchmark(source: Source) -> Pool:
    """The benchmark `source.name`, from the Hub or from the folder `source.path`.

    Raises:
        DataError: the Hub cannot be reached, or the folder is not laid out as expected.
    """
    benchmark = BENCHMARKS[source.name]
    dropped: Counter[str] = Counter()
    rows = _hub(benchmark, source) if source.path is None else _local(benchmark, source.path, dropped)
    parts: dict[str, list[Example]] = {}
    for part, found in rows.items():
        for item in benchmark.read(part, found):
            if isinstance(item, str):
                dropped[item] += 1
            else:
                parts.setdefault(part, []).append(item)
    kept = {part: tuple(parts[part]) for part in parts}
    return nonempty(Pool(source.name, _distinct_ids(kept), dict(dropped), benchmark.paper))


def _hub(benchmark: Benchmark, source: Source) -> dict[str, Iterator[Row]]:
    # Files by name: the repositories also hold other languages and challenge sets drawn from train.
    pattern = f"{benchmark.folder}/{benchmark.files}"
    files = {part: pattern.replace("*part*", part) for part in OFFICIAL_PARTS}
    located = source.model_copy(update={"revision": source.revision or benchmark.revision})
    return hub_rows(located, hub=benchmark.hub, files=files)


def _local(benchmark: Benchmark, path: str, dropped: Counter[str]) -> dict[str, Iterator[Row]]:
    root = local_path(path)
    if root is None:
        raise missing(path)
    if not root.is_dir():
        raise DataError(f"{path}: a benchmark's `path` is a folder with a file for each part; this is a file.")
    inside = root / benchmark.folder  # a clone of the Hub's repository
    files = folder_files(inside if inside.is_dir() else root)
    return {part: file_rows(_once(files[part]), dropped) for part in sorted(files)}


def _once(files: list[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """WebNLG's `train.entries.jsonl` repeats `train.jsonl`: read where it stands alone."""
    flat = [file for file in files if ".entries" not in file[1].name]
    return flat or files


def _distinct_ids(parts: dict[str, tuple[Example, ...]]) -> dict[str, tuple[Example, ...]]:
    """A source's own ids, with `#2`, `#3`, … appended where one is used again."""
    used: set[str] = set()

    def distinct(e: Example) -> Example:
        key = next(key for n in itertools.count(1) if (key := e.id if n == 1 else f"{e.id}#{n}") not in used)
        used.add(key)
        return e if key == e.id else Example(key, e.prompt, e.target, e.group)

    return {part: tuple(distinct(e) for e in parts[part]) for part in sorted(parts)}
