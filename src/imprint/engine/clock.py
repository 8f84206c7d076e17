"""Where the time goes: seconds by part of the work, without making a GPU wait for the clock."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

PARTS = ("data", "forward", "output", "backward", "optimizer", "scoring")
"""`output` is the output layer of a training step, its gradient included."""


class Clock:
    """Adds up seconds by part."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        if self.device.type == "cuda":  # launches return at once: the stream itself takes the time
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            yield
            end.record()
            self._events.append((part, start, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds[part] += time.perf_counter() - started

    def read(self) -> dict[str, float]:
        """Seconds by part since the last reading."""
        if self._events:
            torch.cuda.synchronize(self.device)
        for part, start, end in self._events:
            self._seconds[part] += start.elapsed_time(end) / 1000
        seconds = dict(self._seconds)
        self._seconds.clear()
        self._events.clear()
        return seconds
