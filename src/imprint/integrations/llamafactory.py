"""LLaMA-Factory with an audit: `python -m imprint.integrations.llamafactory train.yaml`.

The file is LLaMA-Factory's own with one key more, `imprint`. Non-members are what it evaluates on (`eval_dataset` or
`val_size`), which it treats as it treats what it trains on. With several GPUs: `torchrun --nproc-per-node 8 -m …`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from imprint.errors import ImprintError, UsageError
from imprint.integrations import Keys
from imprint.recipe import read_yaml
from imprint.spec import validated


def train(file: str | Path, overrides: Sequence[str] = ()) -> None:
    """Train as the file says, and audit.

    Args:
        file: LLaMA-Factory's configuration in YAML, with a key `imprint`.
        overrides: `key=value`, as for LLaMA-Factory.

    Raises:
        UsageError: the file or its key `imprint` cannot be used, or LLaMA-Factory is not installed.
    """
    try:
        document = read_yaml(Path(file).read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise UsageError(f"{file}: expected a mapping of LLaMA-Factory's options, and `imprint`")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UsageError(f"{override!r}: expected KEY=VALUE, as in num_train_epochs=3")
        document[key] = read_yaml(value, key)
    keys = validated(Keys, document.pop("imprint", None) or {}, "imprint")
    try:
        tuner = import_module("llamafactory.train.tuner")
    except ImportError as error:
        raise UsageError(f"LLaMA-Factory cannot be imported ({error}): pip install llamafactory") from None
    from imprint.callback import LeakageCallback

    tuner.run_exp(document, callbacks=[LeakageCallback(**keys.arguments())])


def main(arguments: Sequence[str]) -> int:
    """One sentence and an exit code for what is wrong with the request."""
    if not arguments:
        print("imprint: give a file, as in python -m imprint.integrations.llamafactory train.yaml", file=sys.stderr)
        return UsageError.exit_code
    try:
        train(arguments[0], arguments[1:])
    except ImprintError as error:
        print(f"imprint: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
