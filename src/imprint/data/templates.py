"""Chats → texts, by the tokenizer's own template, and which characters of a text are learned.

What is learned is what the template itself marks with `{% generation %}`, where it does so and the assistant's turns
are what is learned. Else it is found by rendering: a turn begins where the messages before it, the next turn opened,
end, and reaches to the end of what it is rendered to, its end-of-turn token included and white space behind that not.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from threading import Timer
from types import TracebackType
from typing import Any, NamedTuple

from imprint.errors import ModelError
from imprint.types import Chat

SANDBOX = Path(__file__).with_name("sandbox.py")
START_SECONDS = 120.0
"""For a start from a slow disk."""
SECONDS = 10.0
"""For one conversation, which takes a thousandth of one."""
MEMORY = 2 * 2**30
"""Bytes for one conversation."""
LONGEST = 64 * 2**20
"""Characters of one rendered text; a line of a file has no more bytes."""
_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_KEPT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TEMP", "TMPDIR")
_GIVEN = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "USE_TORCH": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


class Rendered(NamedTuple):
    """A conversation as text, and the characters that are learned, as pairs of offsets in order."""

    text: str
    spans: tuple[tuple[int, int], ...]


class Templates:
    """Renders chats in one process of its own, which starts with the first and ends with the `with` block."""

    def __init__(self, tokenizer: Any, loss: str = "target") -> None:
        self.tokenizer, self.loss = tokenizer, loss
        self.name = f"the chat template of {getattr(tokenizer, 'name_or_path', '') or 'this tokenizer'}"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Templates:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes.values():
            _end(process)
        self._processes.clear()

    def __call__(self, record: str, chat: Chat) -> Rendered:
        """The text of a chat, and what of it is learned; with `loss: all` nothing is marked, since everything is.

        Args:
            record: its id, for messages.

        Raises:
            ModelError: there is no template, it fails, or where the learned turns are cannot be seen in its text.
        """
        template = template_of(self.tokenizer, bool(chat.tools))
        turns = [n for n, message in enumerate(chat.messages) if message["role"] == "assistant"]
        marked = self.loss != "all" and bool(_MARK.search(template)) and list(chat.learned) == turns
        asked = {
            "messages": chat.messages,
            "tools": chat.tools or None,
            "marked": marked,
            "blocks": [] if self.loss == "all" else _blocks(chat.learned),
        }
        process = self._process(template)
        answer, late = _answer(process, asked, SECONDS)
        if answer is None:
            self._processes.pop(template)
            code = _end(process)
            why = f"takes longer than {SECONDS:g} seconds" if late else f"broke off its process (code {code})"
            raise ModelError(f"record {record[:80]!r}: {self.name} {why}; give another template.")
        if "why" in answer:
            raise ModelError(f"record {record[:80]!r}: {self.name} {answer['why']}.")
        return Rendered(answer["text"], tuple((start, end) for start, end in answer["spans"]))

    def _process(self, template: str) -> subprocess.Popen[bytes]:
        """The one that renders `template`; a tokenizer may have one for chats with tools and one for others."""
        if template in self._processes:
            return self._processes[template]
        wanted = {
            "path": [folder for folder in sys.path if folder],
            "template": template,
            "tokens": {name: _plain(token) for name, token in self.tokenizer.special_tokens_map.items()},
            "seconds": SECONDS,
            "memory": MEMORY,
            "longest": LONGEST,
        }
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ} | _GIVEN
        process = subprocess.Popen(
            [sys.executable, "-I", str(SANDBOX)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        answer, _ = _answer(process, wanted, START_SECONDS)
        if answer is None:
            code = _end(process)
            raise ModelError(f"{self.name} cannot be rendered: its process ended at once (code {code}).")
        self._processes[template] = process
        return process


def template_of(tokenizer: Any, tools: bool = False) -> str:
    """The template that Transformers would take.

    Raises:
        ModelError: the tokenizer has none.
    """
    found = getattr(tokenizer, "chat_template", None)
    if isinstance(found, dict):
        found = (found.get("tool_use") if tools else None) or found.get("default")
    if not isinstance(found, str) or not found:
        raise ModelError(
            f"the tokenizer {getattr(tokenizer, 'name_or_path', '') or ''} has no chat template, and the records are "
            "conversations: give the template that the model was tuned with, or the rendered texts."
        )
    return found


def _plain(token: Any) -> Any:
    return [str(one) for one in token] if isinstance(token, list | tuple) else str(token)


def _blocks(learned: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run of neighbours.

    >>> _blocks([1, 3, 4])
    [(1, 1), (3, 4)]
    """
    starts = [n for n in learned if n - 1 not in learned]
    ends = [n for n in learned if n + 1 not in learned]
    return list(zip(starts, ends, strict=True))


def _answer(process: subprocess.Popen[bytes], asked: Any, seconds: float) -> tuple[dict[str, Any] | None, bool]:
    """What the process says, or None if it ended or was ended; and whether that was for being late."""
    assert process.stdin is not None
    assert process.stdout is not None
    fired: list[bool] = []

    def kill() -> None:
        fired.append(True)
        process.kill()

    timer = Timer(seconds, kill)
    timer.start()
    try:
        process.stdin.write(json.dumps(asked).encode() + b"\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except OSError:  # it has ended
        line = b""
    finally:
        timer.cancel()
    return (json.loads(line) if line.endswith(b"\n") else None), bool(fired)


def _end(process: subprocess.Popen[bytes]) -> int:
    process.kill()
    process.communicate()
    return process.returncode
