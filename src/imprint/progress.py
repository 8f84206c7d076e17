"""What a person sees while a grid runs: a bar with tokens per second and time left, or plain lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from imprint.measures import auc
from imprint.types import TokenStats

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

    from imprint.records import Audit
    from imprint.tuning.train import EpochReport


class Progress:
    """Receives what happens and shows nothing: the default of the Python interface."""

    def note(self, text: str) -> None:
        """Something worth a line."""

    def cells(self, labels: Sequence[str], numbers: Sequence[int], count: int) -> None:
        """A cell begins, or several that share their passes."""

    def base(self, label: str, stats: TokenStats, audit: Audit) -> None:
        """The base has been scored, or its scores were found."""

    def start(self, audits: Sequence[Audit], epochs: int, done: int) -> None:
        """Training begins after `done` finished epochs."""

    def trained(self, tokens: int) -> None:
        """Tokens have been trained on."""

    def scored(self, tokens: int) -> None:
        """Tokens have been scored."""

    def epoch(self, label: str, report: EpochReport, stats: TokenStats, audit: Audit) -> None:
        """An epoch of a cell has been trained, scored and written."""

    def checkpoint(self, label: str, name: str, stats: TokenStats, audit: Audit) -> None:
        """A checkpoint that was trained elsewhere has been scored and written."""


class ConsoleProgress(Progress):
    """For the command line: one line per epoch; on a terminal also a bar for the cell."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: Bar | None = None
        self.place: dict[str, str] = {}
        self.started, self.tokens, self.total = 0.0, 0, 0
        self.epochs = 0

    def note(self, text: str) -> None:
        self._stop()
        self.console.print(text, markup=False, highlight=False)

    def cells(self, labels: Sequence[str], numbers: Sequence[int], count: int) -> None:
        self._stop()
        self.place = {label: f"[{number}/{count}] {label}" for label, number in zip(labels, numbers, strict=True)}

    def base(self, label: str, stats: TokenStats, audit: Audit) -> None:
        self._line(f"{self.place[label]}: base {_utility(stats, audit)}")

    def start(self, audits: Sequence[Audit], epochs: int, done: int) -> None:
        per_epoch = sum(audit.tokens + sum(len(record) for record in audit.tuned) for audit in audits)
        self.epochs, self.started, self.tokens = epochs, time.perf_counter(), 0
        self.total = per_epoch * (epochs - done)
        for place in self.place.values():
            if done:
                self._line(f"{place}: resuming after epoch {done}")
        if self.console.is_terminal:
            self._open()

    def _open(self) -> None:
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[rate]} tokens/s"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self.bar.add_task(" + ".join(self.place.values()), total=self.total, rate="…")
        self.bar.start()

    def trained(self, tokens: int) -> None:
        self.tokens += tokens
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=self.tokens, rate=f"{self._rate():,.0f}")

    scored = trained

    def epoch(self, label: str, report: EpochReport, stats: TokenStats, audit: Audit) -> None:
        left = (self.total - self.tokens) / max(self._rate(), 1e-9)
        self._line(
            f"{self.place[label]}: epoch {report.epoch}/{self.epochs}  {_utility(stats, audit)}  "
            f"{self._rate():,.0f} tokens/s  {_clock(left)} left"
        )
        if report.epoch == self.epochs and label == list(self.place)[-1]:
            self._stop()

    def checkpoint(self, label: str, name: str, stats: TokenStats, audit: Audit) -> None:
        self._line(f"{self.place[label]}: {name}  {_utility(stats, audit)}")

    def _rate(self) -> float:
        return self.tokens / max(time.perf_counter() - self.started, 1e-9)

    def _line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        sys.stdout.flush()

    def _stop(self) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None


def _utility(stats: TokenStats, audit: Audit) -> str:
    """Validation perplexity and the AUC of LOSS, for a line on the screen."""
    roles = np.array(audit.roles)
    loss = auc(-stats.nll[roles == "member"], -stats.nll[roles == "nonmember"])
    return f"perplexity {audit.perplexity(stats):.2f}  LOSS AUC {loss.value:.3f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"
