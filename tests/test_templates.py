"""Chats as their templates tell them: what is learned of them by rules in plain terms, and hostile templates."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imprint.data import templates as templates_module
from imprint.data.templates import SANDBOX, Templates, template_of
from imprint.data.tokens import Encoded, Encoder, unusable
from imprint.errors import DataError, ModelError
from imprint.types import Chat, Example
from tests.conftest import tokenizer as make_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content.strip() }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content.strip() }} {{ eos_token }}"
    "{% else %}{{ raise_exception('unknown role ' + m.role) }}{% endif %}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<A>{% generation %}{{ m.content }}</A>\n{% endgeneration %}"
    "{% else %}<U>{{ m.content }}</U>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<A>{% endif %}"
)
THINKING = (  # as Qwen3: the last answer gets room for thoughts, which earlier ones lose
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENED_OTHERWISE = CHATML.replace(
    "{% if add_generation_prompt %}<|im_start|>assistant\n",
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n",
)
TURNS = ("red fox", "blue dog", "the hen?", "lazy old fox")


@cache
def tokenizer() -> Any:
    """One whose special tokens are those of ChatML, too."""
    words = make_tokenizer()
    words.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    return words


def chat(*contents: str, learned: tuple[int, ...] | None = None, **beside: Any) -> Chat:
    """User and assistant in turn; the assistant's turns are learned."""
    roles = ("user", "assistant")
    messages = tuple({"role": roles[n % 2], "content": text} for n, text in enumerate(contents))
    return Chat(messages, tuple(range(1, len(contents), 2)) if learned is None else learned, **beside)


@pytest.fixture(scope="module")
def processes() -> Any:
    """One process for each template of this module, since each start takes a tenth of a second."""
    with Templates(tokenizer()) as target, Templates(tokenizer(), "all") as everything:
        yield {"target": target, "all": everything}


def rendered(processes: Any, template: str, one: Chat, loss: str = "target") -> list[str]:
    """The learned pieces of text."""
    tokenizer().chat_template = template
    text, spans = processes[loss]("x", one)
    return [text[start:end] for start, end in spans]


def encode(
    processes: Any, template: str, one: Chat, max_length: int = 1000, loss: str = "target", **how: Any
) -> Encoded:
    tokenizer().chat_template = template
    return Encoder(tokenizer(), max_length, loss=loss, templates=processes[loss], **how)(Example("x", "", "", form=one))


def ids_of(text: str) -> list[int]:
    return list(tokenizer()(text, add_special_tokens=False).input_ids)


def pieces(*parts: tuple[str, bool]) -> tuple[list[int], list[bool]]:
    """Ids and mask by hand, from pieces that end where a token ends."""
    told = [(ids_of(text), learned) for text, learned in parts]
    return [n for ids, _ in told for n in ids], [learned for ids, learned in told for _ in ids]


def transformers_ids(messages: Any, template: str, **options: Any) -> list[int]:
    found = tokenizer().apply_chat_template(list(messages), chat_template=template, **options)
    return list(getattr(found, "input_ids", found))


# ---- what is learned ----


def test_chatml_by_hand(processes: Any) -> None:
    record = encode(processes, CHATML, chat(*TURNS))
    ids, mask = pieces(
        ("<|im_start|>user\nred fox<|im_end|>\n<|im_start|>assistant\n", False),
        ("blue dog<|im_end|>", True),
        ("\n<|im_start|>user\nthe hen?<|im_end|>\n<|im_start|>assistant\n", False),
        ("lazy old fox<|im_end|>", True),
        ("\n", False),
    )
    assert record.ids.tolist() == ids == transformers_ids(chat(*TURNS).messages, CHATML)
    assert record.scored.tolist() == mask
    assert record.cut == ""
    decoded = tokenizer().decode(record.ids[record.scored].tolist())
    assert record.zlib_bytes == len(zlib.compress(decoded.encode()))


def test_llama2_by_hand(processes: Any) -> None:
    record = encode(processes, LLAMA2, chat(*TURNS))
    ids, mask = pieces(
        ("<s>[INST] red fox [/INST]", False),
        (" blue dog </s>", True),
        ("[INST] the hen? [/INST]", False),
        (" lazy old fox </s>", True),
    )
    assert record.ids.tolist() == ids == transformers_ids(chat(*TURNS).messages, LLAMA2)
    assert record.scored.tolist() == mask


def test_marks_of_the_template_are_those_of_transformers(processes: Any) -> None:
    """What a template marks is learned to the letter, a line end too."""
    one = chat(*TURNS)
    assert rendered(processes, MARKED, one) == ["blue dog</A>\n", "lazy old fox</A>\n"]
    record = encode(processes, MARKED, one)
    theirs = tokenizer().apply_chat_template(
        list(one.messages), chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    assert record.ids.tolist() == theirs["input_ids"]
    assert record.scored.astype(int).tolist() == theirs["assistant_masks"]


def test_marks_are_passed_over_where_other_turns_are_learned(processes: Any) -> None:
    assert rendered(processes, MARKED, chat(*TURNS, learned=(3,))) == ["lazy old fox</A>"]


def test_thoughts_that_earlier_turns_lose(processes: Any) -> None:
    """The last turn can be learned, its thoughts too; one that is written otherwise when more follows cannot."""
    one = chat(*TURNS, learned=(3,))
    assert rendered(processes, THINKING, one) == ["<think>\n\n</think>\n\nlazy old fox<|im_end|>"]
    assert encode(processes, THINKING, one).ids.tolist() == transformers_ids(one.messages, THINKING)
    with pytest.raises(ModelError, match=r"record 'x': the chat template .* first 2 messages otherwise.*generation"):
        rendered(processes, THINKING, chat(*TURNS))
    everything = encode(processes, THINKING, chat(*TURNS), loss="all")
    assert everything.scored.tolist() == [False, *[True] * (len(everything) - 1)]


def test_a_turn_that_is_opened_otherwise_begins_where_it_is_written_down(processes: Any) -> None:
    """As DeepSeek-R1, whose prompt ends with `<think>` and whose records do not hold it."""
    assert rendered(processes, OPENED_OTHERWISE, chat(*TURNS)) == ["blue dog<|im_end|>", "lazy old fox<|im_end|>"]


def test_neighbours_are_learned_as_one(processes: Any) -> None:
    """A completion of several messages, as TRL has it: everything from where it begins."""
    one = chat(*TURNS, learned=(1, 2, 3))
    [piece] = rendered(processes, CHATML, one)
    assert (
        piece
        == "blue dog<|im_end|>\n<|im_start|>user\nthe hen?<|im_end|>\n<|im_start|>assistant\nlazy old fox<|im_end|>"
    )


def test_a_prompt_and_completion_are_those_of_trl(processes: Any) -> None:
    """TRL learns what follows the common beginning of both; here white space behind the turn is left out."""
    one = chat(*TURNS, learned=(3,))
    whole = transformers_ids(one.messages, CHATML)
    before = transformers_ids(one.messages[:3], CHATML, add_generation_prompt=True)
    common = next((n for n, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
    record = encode(processes, CHATML, one)
    theirs = np.arange(len(whole)) >= common
    assert record.ids.tolist() == whole
    differ = np.flatnonzero(record.scored != theirs)
    assert [tokenizer().decode([whole[n]]) for n in differ] == ["\n"]
    assert differ.tolist() == [len(whole) - 1]


def test_tools_and_their_calls_reach_the_template(processes: Any) -> None:
    said = "{{ m.content or m.tool_calls[0].function.name }}"
    template = "{{ tools | tojson }}{% for m in messages %}<{{ m.role }}>" + said + "{% endfor %}"
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "sing", "arguments": {}}}]}
    one = Chat(({"role": "user", "content": "é"}, call), (1,), ({"type": "function", "name": "sing"},))
    tokenizer().chat_template = template
    text, spans = processes["target"]("x", one)
    assert text == '[{"type": "function", "name": "sing"}]<user>é<assistant>sing'
    assert [text[a:b] for a, b in spans] == ["<assistant>sing"]
    assert text == tokenizer().apply_chat_template(list(one.messages), tools=list(one.tools), tokenize=False)


def test_a_token_across_the_boundary_is_learned(processes: Any) -> None:
    """`the` is one token; the turn begins within it."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    [_, *scored] = encode(processes, template, chat("! th", "e fox")).scored.tolist()
    ids = ids_of("! the fox")
    assert tokenizer().decode([ids[1]]) == " the"
    assert scored == [True] * (len(ids) - 1)


def test_text_of_many_scripts(processes: Any) -> None:
    """Offsets count characters, tokens of an emoji share one; control and bidirectional marks are text like other."""
    turns = ("שלום 👩‍👩‍👧 \u202e\u0007", "<b>👋🏽</b> مرحبا\0\u200f", "é\u0301", "日本語\x1b[2J😀")
    record = encode(processes, CHATML, chat(*turns))
    assert record.ids.tolist() == transformers_ids(chat(*turns).messages, CHATML)
    found = tokenizer().decode(record.ids[record.scored].tolist(), clean_up_tokenization_spaces=False)
    assert found == f"{turns[1]}<|im_end|>{turns[3]}<|im_end|>"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("the quickfox!:\n<|é😀", min_size=1, max_size=12), min_size=2, max_size=5), st.booleans())
def test_any_chat_is_what_transformers_makes_of_it(processes: Any, contents: list[str], llama: bool) -> None:
    template = LLAMA2 if llama else CHATML
    one = chat(*contents)
    record = encode(processes, template, one)
    assert record.ids.tolist() == transformers_ids(one.messages, template)
    pieces_of_text = rendered(processes, template, one)
    for n, piece in zip(one.learned, pieces_of_text, strict=True):
        assert contents[n].strip() in piece
    assert record.scored.sum() >= sum(len(ids_of(piece)) > 0 for piece in pieces_of_text)


# ---- how it is cut ----


def test_chats_are_cut_at_their_end(processes: Any) -> None:
    whole = encode(processes, CHATML, chat(*TURNS))
    last = int(np.flatnonzero(whole.scored)[-1])
    for length, cut in ((last + 1, "prompt"), (last, "target"), (12, "target")):
        record = encode(processes, CHATML, chat(*TURNS), length)
        assert record.ids.tolist() == whole.ids[:length].tolist()
        assert record.scored.tolist() == whole.scored[:length].tolist()
        assert record.cut == cut
    gone = encode(processes, CHATML, chat(*TURNS), 5)
    assert unusable(gone) == "nothing to predict once cut to max_length"
    with pytest.raises(DataError, match=rf"'x' has {len(whole)} tokens.*max_length 9"):
        encode(processes, CHATML, chat(*TURNS), 9, overlong="refuse")


def test_a_long_chat_is_not_read_to_its_end(processes: Any) -> None:
    """Its tokens, and whether learned ones were lost, are those of the whole."""
    long = "the fox " * 4000
    for contents, learned, cut in (
        (("hi", long), (1,), "target"),
        (("hi", "yo", long, "end"), (1, 3), "target"),
        (("hi", "yo", long), (1,), "prompt"),
    ):
        one = chat(*contents, learned=learned)
        whole = encode(processes, CHATML, one, 10**6)
        record = encode(processes, CHATML, one, 30)
        assert record.ids.tolist() == whole.ids[:30].tolist()
        assert record.scored.tolist() == whole.scored[:30].tolist()
        assert record.cut == cut


def test_no_eos_is_put_behind_a_template(processes: Any) -> None:
    plain, asked = (encode(processes, CHATML, chat(*TURNS), eos=eos) for eos in (None, True))
    assert plain.ids.tolist() == asked.ids.tolist()


# ---- templates that are not there, or hostile ----


def test_which_template() -> None:
    words = make_tokenizer()
    for nothing in (None, "", {}, {"rag": "x"}):
        words.chat_template = nothing
        with pytest.raises(ModelError, match="no chat template, and the records are conversations: give the template"):
            template_of(words)
    words.chat_template = {"default": "a", "tool_use": "b"}
    assert (template_of(words), template_of(words, tools=True)) == ("a", "b")


def test_slow_tokenizers_are_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match=r"Slow does not say which characters.*tokenizer\.json"):
        Encoder(Slow(), 99)(Example("x", "", "", form=chat("a", "b")))


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ ''.__class__.__mro__ }}", "SecurityError: access to attribute '__class__'"),
        ("{{ cycler.__init__.__globals__ }}", "SecurityError: access to attribute '__init__'"),
        ("{% set x = messages.append(1) %}", "SecurityError"),
        ("{{ raise_exception('no\n\x1b[2Jsystem') }}", r"fails (TemplateError: 'no \x1b[2Jsystem')"),
        ("\n{% if %}", "fails in its line 2 (TemplateSyntaxError"),
        ("{{ messages[9].role }}", "UndefinedError"),
        ("{% for i in range(10**9) %}x{% endfor %}", "OverflowError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ '\\ud800' }}", "UnicodeEncodeError"),
        ("{% include '/etc/passwd' %}", "TypeError: no loader for this environment specified"),
        ("{% generation %}{% endgeneration %}", "marks nothing of it as generated"),
        ("nothing", "writes nothing for message 2"),
    ],
)
def test_hostile_template(template: str, why: str) -> None:
    words = make_tokenizer()
    words.chat_template = template
    with Templates(words) as templates, pytest.raises(ModelError) as caught:
        templates("r1", chat("a", "b"))
    sentence = str(caught.value)
    assert sentence.startswith("record 'r1': the chat template of this tokenizer ")
    assert why in sentence
    assert sentence.isprintable()
    assert len(sentence) < 400


def test_the_assistant_cannot_open_every_conversation(processes: Any) -> None:
    first = chat("hi", "yo", learned=(0,))
    assert rendered(processes, CHATML.replace("assistant", "user"), first) == ["hi<|im_end|>"]
    picky = "{{ messages[0].role }}" + CHATML
    with pytest.raises(ModelError, match="renders no conversation that a learned turn opens"):
        rendered(processes, picky, first)


@pytest.mark.parametrize(
    ("template", "limits", "why"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            {"SECONDS": 0.3},
            "0.3 seconds",
        ),
        ("{{ (10 ** 8) ** (10 ** 8) }}", {"SECONDS": 0.3}, "longer than 0.3 seconds"),
        ("{{ 'x' * 10**10 }}", {}, "needs more than 2048 MiB of memory"),
        ("{{ [1] * 10**9 }}", {}, "needs more than 2048 MiB of memory"),
        ("{% for i in range(1000) %}{{ 'x' * 10**5 }}{% endfor %}", {}, "writes more than 64 Mi characters"),
    ],
)
def test_greedy_template(monkeypatch: pytest.MonkeyPatch, template: str, limits: dict[str, Any], why: str) -> None:
    for name, value in limits.items():
        monkeypatch.setattr(templates_module, name, value)
    words = make_tokenizer()
    words.chat_template = template
    started = time.perf_counter()
    with Templates(words, "all") as templates:
        for _ in range(2):  # the next record meets a new process
            with pytest.raises(ModelError, match=why):
                templates("r1", chat("a", "b"))
    assert time.perf_counter() - started < 8


def test_a_process_that_breaks_off(processes: Any) -> None:
    with Templates(tokenizer()) as templates:
        tokenizer().chat_template = CHATML
        templates("a", chat("a", "b"))
        [process] = templates._processes.values()
        process.kill()
        process.wait()
        with pytest.raises(ModelError, match=r"record 'b': .* broke off its process \(code -9\)"):
            templates("b", chat("a", "b"))
        assert templates("c", chat("a", "b")).text
    assert not templates._processes


def test_no_process_is_left_behind() -> None:
    tokenizer().chat_template = CHATML
    with Templates(tokenizer()) as templates:
        templates("a", chat("a", "b"))
        [process] = templates._processes.values()
    assert process.returncode is not None


def test_secrets_stay_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of the process is a short list of names, and it is the sandbox that runs in it."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    seen: dict[str, Any] = {}
    real = subprocess.Popen

    def popen(command: list[str], **options: Any) -> Any:
        seen.update(options, command=command)
        return real(command, **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    tokenizer().chat_template = CHATML
    with Templates(tokenizer()) as templates:
        templates("a", chat("a", "b"))
    assert seen["command"] == [sys.executable, "-I", str(SANDBOX)]
    assert "hf_secret" not in json.dumps(seen["env"])
    assert set(seen["env"]) <= {*templates_module._KEPT, *templates_module._GIVEN}


def test_the_day_is_always_the_same_and_so_is_chance(processes: Any) -> None:
    """A record's text must not change over night."""
    tokenizer().chat_template = "{{ strftime_now('%d %b %Y') }} {{ range(1000) | random }}"
    first, second = (processes["all"]("x", chat("a", "b")).text for _ in range(2))
    assert first == second
    assert first.startswith("26 Jul 2024 ")


def test_the_sandbox_writes_no_files_and_imports_no_torch(tmp_path: Path) -> None:
    code = """
import runpy, sys
from pathlib import Path
space = runpy.run_path(sys.argv[1])
space["_transformers"]()
assert "torch" not in sys.modules
space["_limit"](2**30)
try:
    Path("file").write_text("x")
except OSError as error:
    print(error.strerror)
"""
    done = subprocess.run([sys.executable, "-c", code, SANDBOX], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "File too large\n", done.stderr
