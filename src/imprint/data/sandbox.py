"""The process in which chat templates are rendered: `python -I sandbox.py`, started by `templates.py`.

A chat template is a program that came with a model or a data set. It runs in Transformers' own sandboxed Jinja, and
that runs here, where there are no secrets in the environment, no files may be written, and memory and time have
limits. Nothing of Imprint is imported, and of Transformers one module, so that it starts in a sixth of a second.

A line of JSON in, a line of JSON out. The first says what is wanted (`path`, `template`, `tokens`, `limits`) and is
answered once all is ready; each further one is a conversation.
"""

from __future__ import annotations

import datetime
import importlib
import importlib.util
import json
import random
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Render = Callable[[Sequence[Any], bool], tuple[str, list[tuple[int, int]]]]
TODAY = datetime.datetime(2024, 7, 26)
"""What a template that asks for the date is told, so that a record's text is the same every day: the date that
Llama's templates name themselves where they cannot ask."""


class Refused(Exception):
    """What is wrong with a template or a conversation, as the rest of a sentence."""


class _Clock(datetime.datetime):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> _Clock:
        return cls(TODAY.year, TODAY.month, TODAY.day, tzinfo=tz)


def told(render: Render, asked: dict[str, Any]) -> dict[str, Any]:
    """The text of a conversation, and the characters of it that are learned.

    Args:
        render: messages and whether the next turn is opened → the text and what the template itself marks.
        asked: `messages`; `marked`, whether the template's own marks say what is learned; else `blocks`, first and
            last message of each run of learned ones.

    Returns:
        `text`, and `spans` as pairs of character offsets, in order.

    Raises:
        Refused: a span cannot be found.
    """
    messages = asked["messages"]
    text, marks = render(messages, False)
    text.encode()  # a template can spell halves of surrogate pairs, which no tokenizer takes
    if not asked["marked"]:
        return {"text": text, "spans": [_span(render, text, messages, *block) for block in asked["blocks"]]}
    spans = [(start, end) for start, end in marks if start < end]
    if not spans:
        raise Refused("marks nothing of it as generated, although it has {% generation %}")
    return {"text": text, "spans": spans}


def _span(render: Render, text: str, messages: Sequence[Any], first: int, last: int) -> tuple[int, int]:
    """From where the turn of message `first` has been opened to the end of message `last`, less white space.

    What comes before is a beginning of the text, or the template rewrites earlier turns when later ones follow. Some
    open a turn otherwise than they write it down (with `<think>`, say): there it begins where the two part.
    """
    before = _opened(render, messages[:first])
    start = len(before)
    if not text.startswith(before):
        start = next((n for n, (one, other) in enumerate(zip(before, text, strict=False)) if one != other), len(text))
        if start < len(_beginning(render, text, messages, first)):
            raise Refused(_rewritten(first))
    end = len(_beginning(render, text, messages, last + 1).rstrip())
    if end <= start:
        raise Refused(f"writes nothing for message {first + 1}")
    return start, end


def _opened(render: Render, messages: Sequence[Any]) -> str:
    """The messages and what opens the next turn."""
    try:
        return render(messages, True)[0]
    except (Refused, MemoryError):
        raise
    except Exception as error:
        if messages:
            raise
        choice = "give a template with {% generation %} marks, or say `loss: all`"
        raise Refused(f"renders no conversation that a learned turn opens ({_words(error)}); {choice}") from error


def _beginning(render: Render, text: str, messages: Sequence[Any], count: int) -> str:
    """The text up to the end of the first `count` messages."""
    shorter = text if count == len(messages) else render(messages[:count], False)[0]
    if not text.startswith(shorter):
        raise Refused(_rewritten(count))
    return shorter


def _rewritten(count: int) -> str:
    return (
        f"writes the first {count} messages otherwise when more follow, so where a turn ends cannot be seen; give a "
        "template with {% generation %} marks, learn the last turn alone (`prompt` and `completion`), or say "
        "`loss: all`"
    )


def _rendering(template: str, tokens: dict[str, Any], longest: int) -> Callable[[Any, bool], Render]:
    """Tools, and whether marks are wanted → how such conversations are rendered, by Transformers."""
    module = _transformers()
    module.datetime = _Clock

    def of(tools: Any, marked: bool) -> Render:
        def render(messages: Sequence[Any], opened: bool) -> tuple[str, list[tuple[int, int]]]:
            random.seed(0)  # Jinja has a filter `random`
            options = {"add_generation_prompt": opened, "return_assistant_tokens_mask": marked}
            texts, marks = module.render_jinja_template(
                conversations=[messages], tools=tools, chat_template=template, **options, **tokens
            )
            if len(texts[0]) > longest:
                raise Refused(f"writes more than {longest >> 20} Mi characters")
            return texts[0], marks[0] if marks else []

        return render

    return of


def _transformers() -> Any:
    """The module that renders templates, without the half second that all of Transformers takes to import."""
    found = importlib.util.find_spec("transformers")
    name = "transformers.utils.chat_template_utils"
    if found and found.submodule_search_locations:
        root = Path(found.submodule_search_locations[0])
        for package, folder in (("transformers", root), ("transformers.utils", root / "utils")):
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = [str(folder)]
        try:
            return importlib.import_module(name)
        except ImportError:  # a version in which it needs the rest
            for module in [module for module in sys.modules if module.partition(".")[0] == "transformers"]:
                del sys.modules[module]
    return importlib.import_module(name)


def _limit(memory: int) -> Callable[[float], None]:
    """No files, and `memory` bytes more than now; returns what allows so many seconds more of the processor."""
    try:
        import resource
    except ImportError:  # Windows: the clock outside is all there is
        return lambda seconds: None

    def lower(kind: int, soft: int) -> None:
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))

    lower(resource.RLIMIT_FSIZE, 0)
    held = Path("/proc/self/statm")
    if held.exists():
        lower(resource.RLIMIT_AS, int(held.read_text().split()[0]) * resource.getpagesize() + memory)

    def more(seconds: float) -> None:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        lower(resource.RLIMIT_CPU, int(usage.ru_utime + usage.ru_stime + seconds) + 1)

    return more


def _reason(error: BaseException, memory: int) -> str:
    if isinstance(error, Refused):
        return str(error)
    if isinstance(error, MemoryError):
        return f"needs more than {memory >> 20} MiB of memory"
    line = getattr(error, "lineno", None)
    return f"fails{f' in its line {line}' if isinstance(line, int) else ''} ({_words(error)})"


def _words(error: BaseException) -> str:
    """What an exception says, on one line and printable."""
    words = " ".join(str(error).split())[:200].rstrip(".") or "without a word"
    return f"{type(error).__name__}: {words if words.isprintable() else ascii(words)}"


def main() -> None:
    """Answer until nobody asks any more."""
    asked, answer = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    wanted = json.loads(asked.readline())
    sys.path[:] = wanted["path"]
    rendering = _rendering(wanted["template"], wanted["tokens"], wanted["longest"])
    more = _limit(wanted["memory"])

    def say(document: Any) -> None:
        answer.write(json.dumps(document).encode() + b"\n")
        answer.flush()

    say({})
    for line in asked:
        more(wanted["seconds"])
        try:
            conversation = json.loads(line)
            say(told(rendering(conversation["tools"], conversation["marked"]), conversation))
        except Exception as error:  # a template may fail in any way: each is a sentence
            say({"why": _reason(error, wanted["memory"])})


if __name__ == "__main__":
    main()
