"""The command line. Heavy imports wait until a command needs them: `imprint --help` loads no torch."""

from __future__ import annotations

import io
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from imprint.cli_audit import audit_command, doctor_command, gate_command, plan_command
from imprint.cli_canaries import canaries
from imprint.cli_extract import extract_command
from imprint.errors import ImprintError, UsageError, unknown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from imprint.spec import Runtime

app = typer.Typer(
    help="How much does a fine-tuned language model remember of its fine-tuning data?",
    epilog="Exit codes: 0 pass; 1 leakage over budget; 2 audit invalid; 3 could not finish; 64 wrong request.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from imprint import __version__

        print(f"imprint {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command("run")
def run_command(
    recipe: Annotated[Path, typer.Argument(help="Recipe in YAML; every list in it is an axis of the grid.")],
    out: Annotated[Path | None, typer.Option(help="Output folder (default: runs/NAME OF THE RECIPE).")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as in train.epochs=3.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    token_budget: Annotated[
        int | None, typer.Option(min=1, help="Tokens of one forward pass (default: 2048 on a CPU, 16384 on a GPU).")
    ] = None,
    device_map: Annotated[
        bool, typer.Option("--device-map", help="Spread each model over all GPUs and, where these are full, the CPU.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what is left and what it will cost.")] = False,
) -> None:
    """Tune and measure every cell of a recipe; the same command again finishes what is missing."""
    quiet_libraries()
    from rich.console import Console

    from imprint.spec import Runtime

    runtime = Runtime(device=device, token_budget=token_budget, device_map=device_map)
    if dry_run:
        return _predict(recipe, out or Path("runs") / recipe.stem, set_ or (), runtime, Console())

    from imprint.progress import ConsoleProgress
    from imprint.release import release
    from imprint.report import print_summary, write_report
    from imprint.rows import load_grid
    from imprint.runs import run

    console = Console()
    folder = out or Path("runs") / recipe.stem
    frame = run(recipe, folder, set_ or (), runtime, ConsoleProgress(console))
    grid = load_grid(folder)
    print_summary(grid, frame, console)
    console.print(f"Report: {write_report(folder)}", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(release(grid, frame).code)


def _predict(recipe: Path, folder: Path, overrides: Sequence[str], runtime: Runtime, console: Console) -> None:
    from imprint.report.predictions import print_predictions
    from imprint.runs import predicted

    print_predictions(predicted(recipe, folder, overrides, runtime), console)


@app.command("report")
def report_command(
    folder: Annotated[Path, typer.Argument(help="Output folder of a run or an audit.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    attack: Annotated[
        list[str] | None, typer.Option(help="An attack of your own, module:function, that the folder names: run it.")
    ] = None,
) -> None:
    """Recompute every number from the stored evidence and write the HTML report; needs no GPU and no torch."""
    from rich.console import Console

    from imprint.attacks import allow
    from imprint.details import write_details
    from imprint.report import print_summary, to_markdown, write_report
    from imprint.rows import load_grid, write_results
    from imprint.validity import write_gates

    allow(attack or ())
    grid = load_grid(folder)
    frame = write_results(grid)
    write_gates(grid)
    write_details(grid)
    console = Console()
    if markdown:
        print(to_markdown(grid, frame))
    else:
        print_summary(grid, frame, console)
    report = write_report(folder)
    if not markdown:
        console.print(f"Report: {report}", markup=False, highlight=False, soft_wrap=True)


@app.command("recommend")
def recommend_command(
    folder: Annotated[Path, typer.Argument(help="Output folder of a run or an audit.")],
    budget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LIMIT=NUMBER", help="As auc=0.55, tpr_at_1pct_fpr=0.05 or attack=ref (default: the recipe's)."
        ),
    ] = None,
    attack: Annotated[
        list[str] | None, typer.Option(help="An attack of your own, module:function, that the folder names: run it.")
    ] = None,
) -> None:
    """The checkpoint of best validation perplexity that keeps a leakage budget; exit code 1 where none does."""
    from rich.console import Console

    from imprint.attacks import allow
    from imprint.recommend import parse_budget, recommend
    from imprint.report.advice import advice_text
    from imprint.report.terms import terms
    from imprint.rows import load_grid

    allow(attack or ())
    grid, console = load_grid(folder), Console()
    found = recommend(grid, parse_budget(budget or (), grid.attacks))
    for advice in found:
        for line in advice_text(advice, terms(grid)):
            console.print(line, markup=False, highlight=False)
    raise typer.Exit(0 if all(advice.chosen for advice in found) else 1)


app.command("audit")(audit_command)
app.command("gate")(gate_command)
app.command("plan")(plan_command)
app.command("doctor")(doctor_command)
app.command("extract")(extract_command)
app.add_typer(canaries, name="canaries")
studies = typer.Typer(help="The paper's tables, figures and observations, and what it left open.", no_args_is_help=True)
app.add_typer(studies, name="study")


@studies.command("list")
def study_list() -> None:
    """Every study with what it repeats or asks."""
    from rich.console import Console

    from imprint.report.sheet import Sheet, print_sheet
    from imprint.studies.catalogue import STUDIES

    rows = tuple((name, study.title) for name, study in STUDIES.items())
    print_sheet(Sheet("Studies", ("name", "what it is"), rows), Console())


@studies.command("show")
def study_show(
    name: Annotated[str, typer.Argument(help="Name of a study.")],
    model: Annotated[list[str] | None, typer.Option(help="As for `study run`.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="As for `study run`.")] = None,
    scale: Annotated[str, typer.Option(help="small or paper.")] = "small",
    protocol: Annotated[str, typer.Option(help="controlled or published.")] = "controlled",
    seeds: Annotated[int | None, typer.Option(min=1, help="Training seeds.")] = None,
) -> None:
    """What a study claims, and the recipes that it runs."""
    quiet_libraries()
    import yaml

    from imprint.studies.run import study_named
    from imprint.studies.setting import setting

    study = study_named(name)
    print(f"{study.title}\n{study.claim}\n")
    for part in study.parts(setting(scale, protocol, model or (), data or (), seeds)):
        print(yaml.safe_dump(part.recipe, sort_keys=False, allow_unicode=True))


@studies.command("run")
def study_run(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Studies; `imprint study list` lists them.")],
    model: Annotated[
        list[str] | None, typer.Option(help="Model in place of the scale's; several times: models of growing size.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(metavar="NAME[=FOLDER]", help="Data in place of the scale's; several times.")
    ] = None,
    scale: Annotated[
        str, typer.Option(help="small: minutes on a CPU, offline. paper: the paper's, on a GPU.")
    ] = "small",
    protocol: Annotated[str, typer.Option(help="controlled, or published: as in the paper.")] = "controlled",
    seeds: Annotated[int | None, typer.Option(min=1, help="Training seeds (default: 3, published: 1).")] = None,
    out: Annotated[Path, typer.Option(help="Output folder, shared by all studies.")] = Path("runs/studies"),
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as in train.epochs=3.")
    ] = None,
    style: Annotated[str, typer.Option("--format", help="text, markdown, latex or csv.")] = "text",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    token_budget: Annotated[int | None, typer.Option(min=1, help="Tokens of one forward pass.")] = None,
    device_map: Annotated[
        bool, typer.Option("--device-map", help="Spread each model over all GPUs and the CPU.")
    ] = False,
) -> None:
    """Run what is missing of a study, print its tables and verdicts, and write its page."""
    quiet_libraries()
    from rich.console import Console

    from imprint.progress import ConsoleProgress
    from imprint.spec import Runtime
    from imprint.studies.run import run_study, study_named
    from imprint.studies.setting import setting
    from imprint.studies.show import FORMATS, show

    if style not in FORMATS:
        raise UsageError(f"--format: {unknown('format', style, FORMATS)}")
    for name in names:
        study_named(name)
    where = setting(scale, protocol, model or (), data or (), seeds)
    runtime, console = Runtime(device=device, token_budget=token_budget, device_map=device_map), Console()
    progress = ConsoleProgress(Console(stderr=True) if style != "text" else console)
    done = []
    for name in names:
        done.append(run_study(name, where, out, tuple(set_ or ()), runtime, progress))
        show(done[-1], style, console)
    raise typer.Exit(3 if any(one.failed for one in done) else 2 if any(one.withheld for one in done) else 0)


def quiet_libraries() -> None:
    """Imprint says what matters itself; the libraries' bars and advice would bury it."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module="(peft|transformers|accelerate|torch|datasets|huggingface_hub)")


def main() -> None:
    """Entry point: every expected error is one sentence on stderr and its documented exit code."""
    for stream in (sys.stdout, sys.stderr):  # a terminal without umlauts must not cost a run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(standalone_mode=False)
    except ImprintError as error:
        sys.exit(_say(str(error), error.exit_code))
    except KeyboardInterrupt:
        code = 130
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        sys.exit(_say(f"could not finish: {what}", 3))
    except Exception as error:
        if not hasattr(error, "format_message"):  # not the argument parser's: a fault of ours, shown whole
            traceback.print_exc()
            sys.exit(3)
        sys.exit(_say(error.format_message() or "give a command; `imprint --help` lists them", 64))
    if code == 130:  # the argument parser turns Ctrl-C into this
        _say("stopped; the same command goes on where this one was", 130)
    sys.exit(code or 0)


def _say(sentence: str, code: int) -> int:
    """One printable line, whatever a name in it holds."""
    line = "".join(
        c if c.isprintable() else " " if c.isspace() else c.encode("unicode_escape").decode() for c in sentence
    )
    print(f"imprint: {line}", file=sys.stderr)
    return code
