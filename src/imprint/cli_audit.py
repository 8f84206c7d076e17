"""`imprint audit`, `gate`, `plan` and `doctor`: for models that somebody else's trainer tuned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imprint.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from imprint.auditing.api import Ready
    from imprint.spec import Budget

BUDGET = "As auc=0.55, tpr_at_1pct_fpr=0.05 or attack=ref; the upper bound must stay below."


def audit_command(
    members: Annotated[
        Path | None, typer.Option(help="Records that the model was tuned on: jsonl, csv, parquet or txt.")
    ] = None,
    nonmembers: Annotated[Path | None, typer.Option(help="Records of the same kind that it never saw.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Both in one file, which a column `member` or `split` divides.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The base: Hub id or folder (default: what the adapter names).")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="DIR", help="Adapter or tuned model; 'out/checkpoint-*' audits each as an epoch."),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Model to compare with (default: the same weights with the adapter off).")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision of the base.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    quantize: Annotated[str | None, typer.Option(help="4bit or 8bit, where it was tuned so.")] = None,
    style: Annotated[
        str,
        typer.Option(
            "--format",
            help="auto, text, prompt_completion, messages, sharegpt, alpaca, alpaca_chat, tokens, or columns as in "
            "'{prompt: question, target: answer}'.",
        ),
    ] = "auto",
    loss: Annotated[
        str, typer.Option(help="Tokens that were trained on: target, all, or auto: what tuning changed tells.")
    ] = "auto",
    eos: Annotated[
        bool | None,
        typer.Option("--eos/--no-eos", help="Whether the end token follows a text (default: a completion)."),
    ] = None,
    template: Annotated[
        Path | None, typer.Option(help="Chat template of the training, in place of the tokenizer's own.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Tokens kept of a text, as in training.")] = None,
    overlong: Annotated[str, typer.Option(help="keep_start (as trainers cut), truncate or refuse.")] = "keep_start",
    id_column: Annotated[str | None, typer.Option("--id", help="Column with the record's id.")] = None,
    group: Annotated[str | None, typer.Option(help="Column with the owner of a record, who may have several.")] = None,
    subgroup: Annotated[
        str | None, typer.Option(help="Column of a property (language) for whose values leakage is reported.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most records of each side (default: 2,000).")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Draws them, where there are more.")] = 0,
    attacks: Annotated[
        str | None,
        typer.Option(help="Names with commas, or module:function for your own (default: all that need one pass)."),
    ] = None,
    evidence: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="For attacks that need more passes, as neighbours=50 or shots=10."),
    ] = None,
    auxiliary: Annotated[
        int | None,
        typer.Option(min=1, help="Records of each side set apart for attacks that learn (ensemble, camia)."),
    ] = None,
    budget: Annotated[list[str] | None, typer.Option(metavar="LIMIT=NUMBER", help=BUDGET)] = None,
    out: Annotated[Path | None, typer.Option(help="Output folder (default: runs/audit-NAME).")] = None,
    id_key: Annotated[
        Path | None, typer.Option(help="File with the key that hides ids (default: OUT.key, made if missing).")
    ] = None,
    show_text: Annotated[bool, typer.Option("--show-text", help="Let texts be written and printed.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    token_budget: Annotated[int | None, typer.Option(min=1, help="Tokens of one forward pass.")] = None,
    device_map: Annotated[
        bool, typer.Option("--device-map", help="Spread each model over all GPUs and the CPU.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be scored, three members among it; write nothing.")
    ] = False,
) -> None:
    """Does a tuned model leak its data? Scores it against its base; the same command again finishes what is missing."""
    from imprint.cli import quiet_libraries

    quiet_libraries()
    from rich.console import Console

    from imprint.auditing.api import audit
    from imprint.progress import ConsoleProgress
    from imprint.recipe import key_values
    from imprint.report.text import printable
    from imprint.spec import ModelSpec, Runtime, validated

    members, nonmembers = _records(members, nonmembers, data)
    console = Console()
    asked = {"name": model, "revision": revision, "dtype": dtype, "quantize": quantize}
    if not model:
        _refuse_base_options(asked)
    base = validated(ModelSpec, asked, "--model") if model else None
    columns = {"format": _style(style), "eos": eos, "max_length": max_length, "overlong": overlong, "id": id_column}
    columns |= {"group": group, "subgroup": subgroup, "members": limit, "nonmembers": limit, "seed": seed}
    columns["auxiliary"] = auxiliary
    out = out or Path("runs") / f"audit-{_title(model, adapter)}"

    def show(ready: Ready) -> None:
        _preflight(ready, console, texts=dry_run or show_text or console.is_terminal)
        if dry_run:
            console.print(printable("Nothing has been written.", console))
            raise typer.Exit

    found = audit(
        base,
        members=members,
        nonmembers=nonmembers,
        adapter=adapter or (),
        reference=reference,
        data={key: value for key, value in columns.items() if value is not None},
        loss=loss,
        template=template,
        attacks=[name for name in attacks.split(",") if name] if attacks else None,
        evidence=key_values(evidence or (), "--evidence", "neighbours=50"),
        budget=_limits(budget),
        out=out,
        id_key=id_key,
        show_text=show_text,
        runtime=Runtime(device=device, token_budget=token_budget, device_map=device_map),
        progress=ConsoleProgress(console),
        preflight=show,
    )
    from imprint.auditing.identity import key_beside
    from imprint.report import print_summary, write_report
    from imprint.rows import load_grid

    print_summary(load_grid(out), found.frame, console)
    console.print(f"Report: {write_report(out)}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"Ids are hidden by the key in {id_key or key_beside(out)}", markup=False, soft_wrap=True)
    console.print(printable(str(found), console, "bold"), highlight=False)
    raise typer.Exit(found.release.code)


def gate_command(
    folder: Annotated[Path, typer.Argument(help="Output folder of an audit or a run.")],
    budget: Annotated[
        list[str] | None, typer.Option(metavar="LIMIT=NUMBER", help=f"{BUDGET} (default: its own)")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="The checkpoint that is to be judged, by name (default: the last).")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, for a pull request.")] = False,
    attack: Annotated[
        list[str] | None, typer.Option(help="An attack of your own, module:function, that the folder names: run it.")
    ] = None,
) -> None:
    """One paragraph, and the exit code: 0 pass, 1 leakage over budget, 2 audit invalid, 3 could not finish."""
    from rich.console import Console

    from imprint.attacks import allow
    from imprint.recommend import parse_budget
    from imprint.release import release
    from imprint.report import gate
    from imprint.report.text import printable
    from imprint.rows import load_grid, write_results

    allow(attack or ())
    grid, console = load_grid(folder), Console()
    limits = parse_budget(budget or (), grid.attacks)
    if limits is None and not grid.budget:
        raise UsageError("gate needs a budget, as in --budget auc=0.55: the audit gives none")
    found = release(grid, write_results(grid), limits, checkpoint)
    if markdown:
        print(gate.markdown(found), end="")
    else:
        console.print(printable(gate.paragraph(found), console), highlight=False, soft_wrap=not console.is_terminal)
    raise typer.Exit(found.code)


def plan_command(
    budget: Annotated[list[str] | None, typer.Option(metavar="LIMIT=NUMBER", help=BUDGET)] = None,
    members: Annotated[
        str | None, typer.Option(help="How many members there will be: a number, or their file (default: as many).")
    ] = None,
    power: Annotated[float, typer.Option(help="With what probability the claim is to hold.")] = 0.8,
    model: Annotated[
        str | None, typer.Option(help="The base; with a file of members: time, memory and disk as well.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder whose tokenizer and template are the training's.")
    ] = None,
    template: Annotated[Path | None, typer.Option(help="As for `imprint audit`.")] = None,
    checkpoints: Annotated[int, typer.Option(min=1, help="Checkpoints that will be audited.")] = 1,
    style: Annotated[str, typer.Option("--format", help="As for `imprint audit`.")] = "auto",
    group: Annotated[str | None, typer.Option(help="Column with the owner of a record.")] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Tokens kept of a text.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
) -> None:
    """How many non-members a claim needs, and what the audit will cost here; nothing is written."""
    from imprint.cli import quiet_libraries

    quiet_libraries()
    from rich.console import Console

    from imprint.attacks import ATTACKS
    from imprint.auditing.api import read_template
    from imprint.auditing.plan import cost, needs, read_members
    from imprint.measures.sizes import design_effect
    from imprint.recommend import parse_budget
    from imprint.report.predictions import print_cost, print_needs
    from imprint.spec import DataSpec, ModelSpec, Runtime, Source, validated

    console, count, effect, records = Console(), None, 1.0, None
    if members is not None and members.isdecimal():
        count = int(members)
    elif members is not None:
        if model is None:
            raise UsageError("--model is missing: with a file of members it is what reads them; or give their number")
        asked = {"source": Source(name=members), "format": _style(style), "group": group, "max_length": max_length}
        data = validated(DataSpec, asked | {"overlong": "keep_start"}, "")
        told = None if template is None else read_template(template)
        records, owners = read_members(Path(members), ModelSpec(name=model), data, adapter, told)
        count, effect = len(records), design_effect(owners)
    found = needs(parse_budget(budget or (), list(ATTACKS)), count, power, effect)
    print_needs(found, count, effect, power, console)
    if records is not None and model is not None:
        most = max((need.nonmembers or 0 for need in found if "firm" not in need.claim), default=0)
        print_cost(cost(records, most, checkpoints, ModelSpec(name=model), Runtime(device=device)), most, console)


def doctor_command(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
) -> None:
    """Look at this installation, and audit a planted leak and an absent one: a minute, offline."""
    from imprint.cli import quiet_libraries

    quiet_libraries()
    from rich.console import Console

    from imprint.auditing.doctor import examine
    from imprint.report.text import printable
    from imprint.spec import Runtime

    console, ill = Console(), False
    for check in examine(Runtime(device=device)):
        word = {True: "ok", False: "FAILED", None: "--"}[check.good]
        line = f"{word:>6}  {check.name}: {check.finding}"
        console.print(printable(line, console), highlight=False, soft_wrap=not console.is_terminal)
        ill = ill or check.good is False
    raise typer.Exit(3 if ill else 0)


def _records(members: Path | None, nonmembers: Path | None, data: Path | None) -> tuple[Path, Path | None]:
    if data is not None:
        if members is not None or nonmembers is not None:
            raise UsageError("--data holds both sides: leave out --members and --nonmembers")
        return data, None
    if members is None or nonmembers is None:
        lacking = "--members" if members is None else "--nonmembers"
        raise UsageError(
            f"{lacking} is missing: give --members FILE and --nonmembers FILE, or --data FILE with a column `member`"
        )
    return members, nonmembers


def _refuse_base_options(asked: dict[str, Any]) -> None:
    """Options of a base that is not named would be ignored: they are refused."""
    given = [key for key in ("revision", "quantize") if asked[key]] + (["dtype"] if asked["dtype"] != "auto" else [])
    if given:
        raise UsageError(f"--{given[0]} is about the base: name it with --model")


def _style(style: str) -> Any:
    from imprint.recipe import read_yaml

    return read_yaml(style, "--format")


def _title(model: str | None, adapter: Sequence[str] | None) -> str:
    name = (adapter[-1] if adapter else model or "model").rstrip("/*")
    parts = [part for part in Path(name).parts if part.strip("/.")]
    return "-".join(parts[-1:]).rstrip("-*") or "model"


def _limits(given: Sequence[str] | None) -> dict[str, Any] | None:
    from imprint.attacks import ATTACKS
    from imprint.recommend import parse_budget

    limits: Budget | None = parse_budget(given or (), list(ATTACKS))
    return limits.model_dump(exclude_none=True) if limits else None


def _preflight(ready: Ready, console: Console, texts: bool) -> None:
    from imprint.auditing import preflight
    from imprint.report.text import printable

    for line in preflight.lines(ready, texts):
        console.print(printable(line, console), highlight=False, soft_wrap=not console.is_terminal)
