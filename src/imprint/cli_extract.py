"""`imprint extract`: what the weights of a finished run write out of its records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def extract_command(
    folder: Annotated[Path, typer.Argument(help="Output folder of a run.")],
    prefix: Annotated[
        int, typer.Option(min=1, help="Tokens of a record that are given, at least; of a prompt all.")
    ] = 50,
    suffix: Annotated[int, typer.Option(min=1, help="Tokens that have to come out, directly after them.")] = 50,
    tries: Annotated[int, typer.Option(min=1, help="Samples that an attacker draws for each record.")] = 1000,
    probability: Annotated[
        float, typer.Option(help="A record counts if one of the samples is its suffix with this probability.")
    ] = 0.5,
    temperature: Annotated[float, typer.Option(help="Temperature of the samples.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Samples take only so many most probable tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Samples take only tokens of so much probability.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    token_budget: Annotated[int | None, typer.Option(min=1, help="Tokens that are kept in mind at once.")] = None,
    device_map: Annotated[
        bool, typer.Option("--device-map", help="Spread each model over all GPUs and, where these are full, the CPU.")
    ] = False,
) -> None:
    """What do a run's weights write out of its records? Members beside both controls; finishes what is missing."""
    from imprint.cli import quiet_libraries

    quiet_libraries()
    from rich.console import Console

    from imprint.extraction.folder import extract
    from imprint.extraction.sheets import curve_sheet, written_sheet
    from imprint.extraction.spec import ExtractionSpec
    from imprint.progress import ConsoleProgress
    from imprint.report.sheet import print_sheet
    from imprint.spec import Runtime, validated

    asked = validated(
        ExtractionSpec,
        {
            "prefix": prefix,
            "suffix": suffix,
            "tries": tries,
            "probability": probability,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
        },
        "extract",
    )
    console, runtime = Console(), Runtime(device=device, token_budget=token_budget, device_map=device_map)
    found = extract(folder, asked, runtime, ConsoleProgress(console))
    print_sheet(curve_sheet(found.curve, asked), console)
    print_sheet(written_sheet(found.rows, asked, found.short, found.flips), console)
    console.print(f"Written: {folder / 'extraction.json'}", markup=False, highlight=False, soft_wrap=True)
