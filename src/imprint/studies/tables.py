"""The paper's tables and curves from our runs, in its layout, its numbers beside ours where the set-up is its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from imprint.measures.estimate import Effect, auc_over_seeds
from imprint.measures.frontier import best, pareto
from imprint.report import words
from imprint.report.figures import Series, line_chart
from imprint.report.sheet import Entry, Sheet
from imprint.studies import paper
from imprint.studies.claims import FIFTH, names, shortest
from imprint.studies.evidence import Place, Variant, after, last, matched, pick
from imprint.studies.judgement import entry

TITLES = {
    "full": "FFT",
    "head": "FT head",
    "lora": "LoRA",
    "prefix": "Prefix",
    "prompt": "Prompt",
    "p_tuning": "P-tuning",
    "loss": "LOSS",
    "ref": "Ref",
    "zlib": "Zlib",
    "min_k": "Min-K%",
}
"""What the paper calls them."""
PUBLISHED: Place = after(FIFTH)


def _places(found: Sequence[Variant]) -> list[tuple[str, Place]]:
    """As published where the runs are long enough, at the best epoch, and at the last."""
    published = [(f"after {FIFTH} epochs", PUBLISHED)] if shortest(found) >= FIFTH else []
    return [*published, ("at the epoch of best validation perplexity", best), ("at the last epoch", last)]


Row = tuple[Entry | str, ...]


def title(name: str) -> str:
    return TITLES.get(name, name)


def table2(found: Sequence[Variant], attacks: Sequence[str]) -> Iterator[Sheet]:
    """AUC of every attack and validation perplexity, data by methods, at each place a reader may ask for."""
    methods = names(found, "method")
    for where, place in _places(found):
        rows: list[Row] = []
        for data in names(found, "data"):
            of_data = {one.method: one for one in pick(found, data=data)}
            beside = place is PUBLISHED and _comparable(found, data, "table2")
            for attack in attacks:
                cells = []
                for method in methods:
                    theirs = paper.table2(data, method, attack) if beside else None
                    cells.append(entry(of_data[method].auc(attack, place), theirs) if method in of_data else Entry(""))
                rows.append((data, title(attack), *cells))
            theirs_by = {m: paper.table2_perplexity(data, m) if beside else None for m in methods}
            rows.append((data, "PPL", *(_perplexity(of_data.get(m), place, theirs_by[m]) for m in methods)))
        yield Sheet(f"AUC {where}", ("data", "attack", *map(title, methods)), tuple(rows), group=2)


def at_equal_perplexity(found: Sequence[Variant], attacks: Sequence[str]) -> Sheet:
    """All methods where they have learned as much as the weakest of them ever did."""
    methods, notes = names(found, "method"), []
    rows: list[Row] = []
    for data in names(found, "data"):
        of_data = pick(found, data=data)
        for attack in attacks:
            stops = matched(of_data, attack)
            if stops is None:
                notes.append(
                    f"{data}: a method never came below the base's perplexity, so there is none to compare at."
                )
                break
            by_method = {one.method: auc_over_seeds([row[n].auc for row in stops]) for n, one in enumerate(of_data)}
            rows.append((data, title(attack), *(entry(by_method[m]) if m in by_method else Entry("") for m in methods)))
        else:
            weakest = max(of_data, key=lambda one: one.log_perplexity(best).value)
            level = words.perplexity(math.exp(weakest.log_perplexity(best).value))
            inside = sorted(
                {title(one.method) for row in stops or () for one, s in zip(of_data, row, strict=True) if s.epoch == 1}
            )
            notes.append(
                f"{data}: at the best perplexity of the weakest method of each seed, {level} on average "
                f"({title(weakest.method)}). Read within the first epoch, where a straight line is coarse: "
                f"{words.listed(inside) if inside else 'none'}."
            )
    header = ("data", "attack", *map(title, methods))
    return Sheet("AUC at equal validation perplexity", header, tuple(rows), tuple(notes), group=2)


def table3(found: Sequence[Variant], attacks: Sequence[str] = ("loss",)) -> Iterator[Sheet]:
    """AUC by model and method, smallest model first."""
    methods = names(found, "method")
    models = sorted(names(found, "model"), key=lambda model: pick(found, model=model)[0].parameters)
    for (where, place), attack in ((p, a) for p in _places(found) for a in attacks):
        rows: list[Row] = []
        for model in models:
            of_model = {one.method: one for one in pick(found, model=model)}
            size = min(one.parameters for one in of_model.values())
            cells = []
            for method in methods:
                beside = (
                    place is PUBLISHED and attack == "loss" and _comparable(list(of_model.values()), None, "table3")
                )
                theirs = paper.table3(model, method) if beside else None
                cells.append(entry(of_model[method].auc(attack, place), theirs) if method in of_model else Entry(""))
            rows.append((model, Entry(f"{size:,}"), *cells))
        header = ("model", "parameters", *map(title, methods))
        yield Sheet(f"{title(attack)} AUC {where}", header, tuple(rows))


def table4(found: Sequence[Variant], attacks: Sequence[str]) -> Iterator[Sheet]:
    """AUC by model, data and LoRA placement; ranks and trainable parameters stand beside."""
    heads = ("model", "data") if len(names(found, "model")) > 1 else ("data",)

    def keys(one: Variant) -> tuple[str, ...]:
        return tuple(getattr(one, head) for head in heads)

    for where, place in _places(found):
        rows: list[Row] = []
        for one in found:
            if one.method != "lora":
                continue
            beside = place is PUBLISHED and _comparable([one], one.data, "table4")
            at, rank = str(one.options["placement"]), one.options["rank"]
            cells = [
                entry(one.auc(attack, place), paper.table4(one.data, at, attack) if beside else None)
                for attack in attacks
            ]
            shown = (f"{one.trainable:,}", _perplexity(one, place, None))
            rows.append((*keys(one), at, Entry(str(rank)), Entry(shown[0]), shown[1], *cells))
        header = (*heads, "placement", "rank", "trainable", "PPL", *map(title, attacks))
        yield Sheet(f"AUC {where}", header, tuple(rows), group=len(heads) + 1)


def curves(found: Sequence[Variant], attack: str) -> Iterator[Sheet]:
    """AUC by epoch, and validation perplexity by epoch: Figures 1 and 3 as tables."""
    epochs = range(1, 1 + max(len(path) - 1 for one in found for path in one.paths))
    header = ("data", "method", *(str(epoch) for epoch in epochs))
    auc_rows: list[Row] = [
        (
            one.data,
            title(one.method),
            *(_at(one, epoch, lambda v, p: words.share(v.auc(attack, p).value)) for epoch in epochs),
        )
        for one in found
    ]
    yield Sheet(f"{title(attack)} AUC by epoch", header, tuple(auc_rows), group=2)
    ppl_rows: list[Row] = [
        (one.data, title(one.method), *(_at(one, epoch, _shown_perplexity) for epoch in epochs)) for one in found
    ]
    yield Sheet("Validation perplexity by epoch", header, tuple(ppl_rows), group=2)


def paper_curves(found: Sequence[Variant], block: str) -> Sheet | None:
    """The paper's own curve, where the set-up is its own."""
    figure = paper.figure1 if block == "figure1" else paper.figure3
    rows: list[Row] = []
    for one in found:
        theirs = figure(one.data, one.method) if _comparable([one], one.data, block) else None
        if theirs:
            shown = [Entry("" if math.isnan(x) else f"{x:g}") for x in theirs]
            rows.append((one.data, title(one.method), *shown))
    header = ("data", "method", *(str(epoch + 1) for epoch in range(paper.EPOCHS)))
    return Sheet(f"The paper's curve ({paper.SOURCE[block]})", header, tuple(rows), group=2) if rows else None


def _at(one: Variant, epoch: int, shown: Callable[[Variant, Place], str]) -> Entry:
    return Entry(shown(one, after(epoch))) if epoch < min(len(path) for path in one.paths) else Entry("")


def _shown_perplexity(one: Variant, place: Place) -> str:
    return words.perplexity(math.exp(one.log_perplexity(place).value))


def what_was_run(found: Sequence[Variant]) -> Sheet:
    """Trainable parameters and learning rate of every variant, and what seeds and records each add to its error."""
    rows: list[Row] = []
    for one in found:
        effect = one.auc("loss", last)
        rows.append(
            (
                one.model,
                one.data,
                title(one.method),
                options_text(one.options),
                Entry(f"{one.trainable:,}"),
                Entry(words.percent(one.trainable, one.parameters)),
                Entry(f"{one.options['learning_rate']:g}"),
                Entry(str(len(one.cells))),
                Entry(f"{effect.error:.4f}"),
                Entry("" if effect.seeds < 2 else f"{effect.spread:.4f}"),
            )
        )
    header = ("model", "data", "method", "options", "trainable", "of all", "rate", "runs", "sampling", "seeds")
    note = (
        "sampling: standard error of the last epoch's LOSS AUC from drawing records; seeds: its standard deviation "
        "between training seeds on the same records."
    )
    return Sheet("What was run", header, tuple(rows), (note,), group=4)


def options_text(options: Mapping[str, Any]) -> str:
    """What tells variants of one method apart."""
    return ", ".join(f"{key}={options[key]}" for key in ("placement", "rank", "tokens") if key in options)


def _perplexity(one: Variant | None, place: Place, theirs: float | None) -> Entry:
    if one is None:
        return Entry("")
    effect = one.log_perplexity(place)
    value, low, high = (words.perplexity(math.exp(x)) for x in (effect.value, effect.low, effect.high))
    return Entry(value, low, high, "" if theirs is None else f"{theirs:g}")


def _comparable(found: Sequence[Variant], data: str | None, block: str) -> bool:
    return all(paper.comparable(one.model, data or one.data, block) for one in found)


def curve_charts(found: Sequence[Variant], attack: str) -> list[tuple[str, list[str]]]:
    """AUC and validation perplexity by epoch, a pair of charts for each data set."""
    charts = []
    for data in names(found, "data"):
        of_data = pick(found, data=data)
        about = f"{title(attack)} AUC by epoch on {data}, mean over seeds with 95% intervals."
        lines = [_line(one, n, lambda v, p: v.auc(attack, p)) for n, one in enumerate(of_data)]
        auc = line_chart(f"{title(attack)} AUC", about, lines, "epoch", "AUC", rule=0.5)
        about = f"Validation perplexity by epoch on {data}, mean over seeds with 95% intervals."
        lines = [_line(one, n, _perplexity_effect) for n, one in enumerate(of_data)]
        charts.append((data, [auc, line_chart("Validation perplexity", about, lines, "epoch", "perplexity", log=True)]))
    return charts


def _perplexity_effect(one: Variant, place: Place) -> Effect:
    e = one.log_perplexity(place)
    return Effect(math.exp(e.value), math.exp(e.low), math.exp(e.high), e.p, e.error, e.spread, e.seeds)


def _line(one: Variant, colour: int, read: Callable[[Variant, Place], Effect]) -> Series:
    epochs = range(min(len(path) for path in one.paths))
    effects = [read(one, after(epoch)) for epoch in epochs]
    label = title(one.method)
    return Series(
        label, epochs, [e.value for e in effects], [e.low for e in effects], [e.high for e in effects], colour
    )


def frontier(found: Sequence[Variant], attack: str) -> Sheet:
    """The checkpoints of all methods and rates that no other beats in both utility and leakage."""
    rows: list[Row] = []
    for data in names(found, "data"):
        places = [(one, epoch) for one in pick(found, data=data) for epoch in range(1, len(one.paths[0]))]
        points = [
            (one.log_perplexity(after(epoch)).value, max(0.5, one.auc(attack, after(epoch)).value))
            for one, epoch in places  # below .5 is chance, and less of it is no gain
        ]
        for n in pareto(points):
            one, epoch = places[n]
            shown = (_perplexity(one, after(epoch), None), entry(one.auc(attack, after(epoch))))
            rate = Entry(f"{one.options['learning_rate']:g}")
            rows.append((data, title(one.method), rate, Entry(str(epoch)), *shown))
    note = "Rates that were not chosen have one seed. The least leakage of many checkpoints is flattered by chance."
    header = ("data", "method", "rate", "epoch", "PPL", f"{title(attack)} AUC")
    return Sheet(f"Frontier of perplexity and {title(attack)} AUC", header, tuple(rows), (note,), group=2)


def _series_name(one: Variant, others: Sequence[Variant]) -> str:
    """The method, with its options and its model where others have the same."""
    same = [other for other in others if other.method == one.method]
    parts = [title(one.method)]
    if len({options_text(other.options) for other in same}) > 1:
        parts.append(options_text(one.options))
    if len({other.model for other in same}) > 1:
        parts.append(one.model)
    return ", ".join(parts)


def frontier_charts(found: Sequence[Variant], attack: str) -> list[tuple[str, list[str]]]:
    """Every checkpoint of every method as (validation perplexity, AUC): what leakage each level of utility costs."""
    from imprint.report.figures import frontier_chart

    charts = []
    for data in names(found, "data"):
        series = [
            Series(
                _series_name(one, pick(found, data=data)),
                [math.exp(one.log_perplexity(after(epoch)).value) for epoch in range(len(one.paths[0]))],
                [one.auc(attack, after(epoch)).value for epoch in range(len(one.paths[0]))],
                [],
                [],
                n,
            )
            for n, one in enumerate(pick(found, data=data))
        ]
        about = f"{title(attack)} AUC against validation perplexity on {data}, one mark per epoch, from the base on."
        charts.append((data, [frontier_chart(f"Utility against leakage, {title(attack)}", about, series)]))
    return charts
