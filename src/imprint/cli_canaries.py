"""`imprint canaries make`, `insert` and `audit`."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imprint.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imprint.canaries.check import Checker

canaries = typer.Typer(
    help="Put canaries into data by fair coins, and see what a model tuned on them proves about its privacy.",
    no_args_is_help=True,
)
Manifest = Annotated[Path, typer.Argument(metavar="CANARIES", help="The file of `imprint canaries make`.")]
FORMAT = "auto, text, prompt_completion, messages, sharegpt, alpaca, alpaca_chat, or columns as in '{text: body}'."


@canaries.command("make")
def make_command(
    out: Annotated[Path, typer.Option(help="File to write; nothing is overwritten.")] = Path("canaries.json"),
    model: Annotated[
        str | None, typer.Option(help="The base: Hub id or folder; for the families rare and sample.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, max=100_000, help="Canaries; about half will be in the data.")] = 200,
    family: Annotated[
        list[str] | None, typer.Option(help="digits, names, rare or sample; several times (default: all).")
    ] = None,
    repetitions: Annotated[
        list[int] | None,
        typer.Option(min=1, max=100_000, help="Copies in the data; several times (default: 1, 4, 16)."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="To draw the same again (default: the system's randomness).")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps; for the family sample.")] = "auto",
) -> None:
    """Draw canaries, flip a coin for each, and seal the file: publish the seal before the training."""
    from imprint.canaries.make import FAMILIES, make
    from imprint.canaries.manifest import check_new, write_manifest

    _quiet()
    check_new(out)
    families = list(family or FAMILIES)
    needed = [name for name in families if name in ("rare", "sample")]
    tokenizer = samples = None
    if needed and model is None:
        raise UsageError(f"--family {needed[0]} needs the base: name it with --model, or give --family digits")
    if needed and model is not None:
        from imprint.canaries.sample import sampler
        from imprint.spec import ModelSpec
        from imprint.tuning.locate import locate
        from imprint.tuning.models import load_model, load_tokenizer, resolve_device, resolve_dtype

        place = locate(ModelSpec(name=model))
        tokenizer = load_tokenizer(place)
        if "sample" in needed:
            where = resolve_device(device)
            samples = sampler(load_model(place, resolve_dtype("auto", where), where), tokenizer)
    made = make(count, families, tuple(repetitions or (1, 4, 16)), seed, tokenizer, samples, model or "")
    write_manifest(out, made)
    _say(f"{len(made.canaries):,} canaries, {len(made.included):,} of them to go into the data: {out}")
    _say(f"Seal, to be published before the training: {made.seal}")


@canaries.command("insert")
def insert_command(
    manifest: Manifest,
    data: Annotated[Path, typer.Argument(help="The data: one jsonl, csv, parquet or txt.")],
    out: Annotated[Path, typer.Option(help="File to write, of the same kind; nothing is overwritten.")],
    style: Annotated[str, typer.Option("--format", help=FORMAT)] = "auto",
    id_column: Annotated[str | None, typer.Option("--id", help="Column with the record's id.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="The base: checks that every canary reaches it whole, and writes nothing if one does not."),
    ] = None,
    template: Annotated[Path | None, typer.Option(help="Chat template of the training, with --model.")] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Tokens kept of a text, with --model.")] = None,
    packing: Annotated[
        int | None, typer.Option(min=2, help="Tokens of the blocks that records are packed into, with --model.")
    ] = None,
    eos: Annotated[
        bool | None, typer.Option("--eos/--no-eos", help="Whether the end token follows a text, with --packing.")
    ] = None,
) -> None:
    """Write the data with the included canaries among them, told as the data tell their own records."""
    from imprint.canaries.insert import insert
    from imprint.canaries.manifest import read_manifest
    from imprint.canaries.telling import reading
    from imprint.recipe import read_yaml

    _quiet()
    asked = {"--template": template, "--max-length": max_length, "--packing": packing}
    if model is None and (given := next((name for name, value in asked.items() if value is not None), None)):
        raise UsageError(f"{given} is about the model: name it with --model")
    found, spec = read_manifest(manifest), reading(read_yaml(style, "--format"), id=id_column)
    with _checker(model, template, max_length, packing, eos) as checker:
        done = insert(found, data, out, spec, checker)
    _say(
        f"{done.canaries:,} canaries in {done.copies:,} copies among {done.records:,} records, told as "
        f"{done.telling.form}: {out}"
    )
    _say(
        f"{done.check}." if done.check else "Name the model with --model to see whether every canary reaches it whole."
    )


@canaries.command("audit")
def audit_command(
    manifest: Manifest,
    model: Annotated[
        str | None, typer.Option(help="The base: Hub id or folder (default: what the adapter names).")
    ] = None,
    adapter: Annotated[str | None, typer.Option(metavar="DIR", help="Adapter or tuned model.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="Model to compare with (default: the same weights with the adapter off).")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="The file that was tuned on: says how canaries are told, and is checked.")
    ] = None,
    style: Annotated[str, typer.Option("--format", help=FORMAT)] = "auto",
    template: Annotated[Path | None, typer.Option(help="Chat template of the training.")] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Tokens kept of a text, as in training.")] = None,
    guesses: Annotated[
        int | None, typer.Option(min=1, help="Guesses about canaries, fixed before (default: several, corrected).")
    ] = None,
    delta: Annotated[float, typer.Option(min=0, max=1, help="The δ that goes with ε.")] = 0.0,
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("runs/canaries"),
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    quantize: Annotated[str | None, typer.Option(help="4bit or 8bit, where it was tuned so.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    token_budget: Annotated[int | None, typer.Option(min=1, help="Tokens of one forward pass.")] = None,
) -> None:
    """What a tuned model remembers of the canaries, and what that proves about the privacy of its training."""
    from rich.console import Console

    from imprint.canaries.audit import audit
    from imprint.canaries.manifest import read_manifest
    from imprint.canaries.report import sentence, sheet
    from imprint.progress import ConsoleProgress
    from imprint.recipe import read_yaml
    from imprint.report.sheet import print_sheet
    from imprint.report.text import printable
    from imprint.spec import ModelSpec, Runtime, validated

    _quiet()
    if model is None and (dtype != "auto" or quantize):
        raise UsageError(f"--{'quantize' if quantize else 'dtype'} is about the base: name it with --model")
    base = validated(ModelSpec, {"name": model, "dtype": dtype, "quantize": quantize}, "--model") if model else None
    console = Console()
    found = audit(
        read_manifest(manifest),
        base,
        adapter,
        reference=reference,
        data=data,
        style=read_yaml(style, "--format"),
        template=template,
        max_length=max_length,
        guesses=guesses,
        delta=delta,
        out=out,
        runtime=Runtime(device=device, token_budget=token_budget),
        progress=ConsoleProgress(console),
    )
    print_sheet(sheet(found), console)
    console.print(printable(sentence(found), console, "bold"), highlight=False, soft_wrap=not console.is_terminal)


@contextmanager
def _checker(
    model: str | None, template: Path | None, max_length: int | None, packing: int | None, eos: bool | None
) -> Iterator[Checker | None]:
    """What looks whether canaries reach a model; None where none is named."""
    if model is None:
        yield None
        return
    from imprint.auditing.api import read_template
    from imprint.canaries.check import Checker
    from imprint.data.templates import Templates
    from imprint.recipe import default_length
    from imprint.spec import ModelSpec
    from imprint.tuning.locate import locate
    from imprint.tuning.models import load_tokenizer

    place = locate(ModelSpec(name=model))
    tokenizer = load_tokenizer(place)
    if template is not None:
        tokenizer.chat_template = read_template(template)
    with Templates(tokenizer) as templates:
        yield Checker(tokenizer, max_length or default_length(place.context), eos, packing, templates)


def _say(line: str) -> None:
    from rich.console import Console

    from imprint.report.text import printable

    console = Console()
    console.print(printable(line, console), highlight=False, soft_wrap=True)


def _quiet() -> Any:
    from imprint.cli import quiet_libraries

    quiet_libraries()
