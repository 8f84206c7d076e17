"""The versions that other trainers pin, and which of them Imprint has been run beside.

    pip install torch==2.13.0 && pip install $(python -m tests.pins axolotl 0.19.0) && pip install .

`docs/environments.md` says what was run in each environment and what differs there.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

TORCH = "2.13.0"
"""What every environment was tested with, a build for CPUs."""
FLOOR = "lower bounds"
"""The tool that is none: every dependency of Imprint's at the lower bound that pyproject.toml declares."""


@dataclass(frozen=True)
class Row:
    """One environment.

    Attributes:
        tool: a trainer, as its package is called.
        version: of the tool.
        declares: what its own metadata requires of the packages that Imprint requires too, and of trl.
        installed: the versions that Imprint was run beside.
        tested: how far, when, and what passed.
    """

    tool: str
    version: str
    declares: dict[str, str]
    installed: dict[str, str]
    tested: str


def _pairs(text: str, sign: str) -> dict[str, str]:
    """Words such as `peft==0.20.0` or `peft<=0.18.1,>=0.18.0`: split where the first of the signs stands."""
    cut = [(word, min(word.find(mark) for mark in sign if mark in word)) for word in text.split()]
    return {word[:place]: word[place:] for word, place in cut}


def _row(tool: str, version: str, declares: str, installed: str, tested: str) -> Row:
    exact = {name: found.removeprefix("==") for name, found in _pairs(installed, "=").items()}
    return Row(tool, version, _pairs(declares, "<>=!"), exact, tested)


WHOLE = "by hand, 2026-11-24: the tool itself ran with the callback; scripts/smoke.py passed"
PINS = "by hand, 2026-11-24: the pins without the tool; scripts/smoke.py passed with transformers and trl"

ROWS = (
    _row(
        "axolotl",
        "0.19.0",
        "torch>=2.11.0,<=2.13.0 transformers==5.16.1 peft==0.20.0 accelerate==1.13.0 datasets==4.8.4 trl==1.9.0 "
        "huggingface-hub==1.17.0 pydantic==2.12.5 typer==0.25.1 pyyaml==6.0.3 numpy<3.0,>=2.1",
        "transformers==5.16.1 peft==0.20.0 accelerate==1.13.0 datasets==4.8.4 trl==1.9.0 huggingface-hub==1.17.0 "
        "pydantic==2.12.5 typer==0.25.1 pyyaml==6.0.3 numpy==2.3.5",
        WHOLE,
    ),
    _row(
        "axolotl",
        "0.18.0",
        "torch>=2.11.0,<=2.12.1 transformers==5.14.1 peft==0.19.1 accelerate==1.13.0 datasets==4.8.4 trl==1.8.0 "
        "pydantic==2.12.5 typer==0.25.1 pyyaml==6.0.3 numpy>=2.1,<3.0",
        "transformers==5.14.1 peft==0.19.1 accelerate==1.13.0 datasets==4.8.4 trl==1.8.0 pydantic==2.12.5 "
        "typer==0.25.1 pyyaml==6.0.3",
        PINS,
    ),
    _row(
        "axolotl",
        "0.16.1",
        "transformers==5.5.0 peft>=0.18.1 accelerate==1.13.0 datasets==4.5.0 trl==0.29.0 pydantic>=2.10.6 numpy>=2.2.6",
        "transformers==5.5.0 peft==0.18.1 accelerate==1.13.0 datasets==4.5.0 trl==0.29.0",
        PINS,
    ),
    _row(
        "axolotl",
        "0.14.0",
        "transformers==5.0.0 peft>=0.18.1 accelerate==1.12.0 datasets==4.5.0 trl==0.27.1 pydantic>=2.10.6 numpy>=2.2.6",
        "transformers==5.0.0 peft==0.18.1 accelerate==1.12.0 datasets==4.5.0 trl==0.27.1",
        PINS,
    ),
    _row(
        "axolotl",
        "0.13.2",
        "transformers==4.57.6 peft>=0.18.1 accelerate==1.12.0 datasets==4.5.0 trl==0.27.0 pydantic>=2.10.6 "
        "numpy>=2.2.6",
        "transformers==4.57.6 peft==0.18.1 accelerate==1.12.0 datasets==4.5.0 trl==0.27.0",
        PINS,
    ),
    _row(
        "llamafactory",
        "0.9.5",
        "torch>=2.4.0 transformers!=4.52.0,!=4.57.0,<=5.6.0,>=4.55.0 peft<=0.18.1,>=0.18.0 accelerate<=1.11.0,>=1.3.0 "
        "datasets<=4.0.0,>=2.16.0 trl<=0.24.0,>=0.18.0",
        "transformers==5.6.0 peft==0.18.1 accelerate==1.11.0 datasets==4.0.0 trl==0.24.0",
        WHOLE,
    ),
    _row(
        "llamafactory",
        "0.9.4",
        "torch>=2.4.0 transformers!=4.52.0,!=4.57.0,<=4.57.1,>=4.51.0 peft<=0.17.1,>=0.14.0 accelerate<=1.11.0,>=1.3.0 "
        "datasets<=4.0.0,>=2.16.0 trl<=0.24.0,>=0.18.0",
        "transformers==4.57.1 peft==0.17.1 accelerate==1.11.0 datasets==4.0.0 trl==0.24.0",
        WHOLE,
    ),
    _row(
        "trl",
        "1.16.0",
        "transformers>=4.56.2 accelerate>=1.10.1 datasets>=4.7.0 huggingface-hub>=0.34.0 numpy>=1.26.0 pandas>=2.1.1 "
        "pyarrow>=21.0.0 pyyaml>=6.0.1",
        "transformers==5.24.0 peft==0.21.2 accelerate==1.15.0 datasets==5.2.0",
        WHOLE,
    ),
    _row(
        "trl",
        "1.16.0",
        "transformers>=4.56.2 accelerate>=1.10.1 datasets>=4.7.0 huggingface-hub>=0.34.0 numpy>=1.26.0 pandas>=2.1.1 "
        "pyarrow>=21.0.0 pyyaml>=6.0.1",
        "transformers==4.56.2 peft==0.17.0 accelerate==1.10.1 datasets==4.7.0",
        WHOLE,
    ),
    _row(
        FLOOR,
        "",
        "",
        "transformers==4.56.0 peft==0.17.0 accelerate==1.10.0 datasets==3.0.0 huggingface-hub==0.34.0 "
        "safetensors==0.4.3 numpy==1.26.0 scipy==1.11.1 scikit-learn==1.3.0 pandas==2.0.0 pyarrow==15.0.0 "
        "pydantic==2.6.0 typer==0.18.0 rich==13.0.0 jinja2==3.1.0 pyyaml==6.0",
        "by hand, 2026-11-24: scripts/smoke.py passed with transformers",
    ),
)
TOO_OLD = {("llamafactory", "0.9.3"): "transformers<=4.52.4", ("axolotl", "0.12.2"): "transformers==4.55.2"}
"""Releases that pin what Imprint does not work beside."""


if __name__ == "__main__":
    tool, version = sys.argv[1:] if len(sys.argv) == 3 else (FLOOR, "")
    wanted = next(row for row in ROWS if (row.tool, row.version) == (tool, version))
    print(f"torch=={TORCH}", *(f"{name}=={found}" for name, found in wanted.installed.items()))
