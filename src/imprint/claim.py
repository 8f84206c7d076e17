"""An output folder belongs to one recipe and one process: written down before anything else is added to it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import yaml

from imprint import __version__
from imprint.errors import UsageError
from imprint.probes import pass_keys
from imprint.recipe import AnyPlan
from imprint.store import LOCK, PART, Store, write_json, write_text


@contextmanager
def claim(store: Store, planned: AnyPlan) -> Iterator[None]:
    """Hold the folder and make it this recipe's own; a recipe that loses no measured cell may continue another's.

    Raises:
        UsageError: the folder belongs to a different recipe or holds other files, is in use, or cannot be written.
    """
    with ExitStack() as stack:
        try:
            check_folder(store)
            stack.enter_context(store.alone())
            if (store.path / "recipe.lock.json").exists():
                if store.shared is None:  # else nothing is lost: the cells lie in the shared folder
                    _same_recipe(store, planned)
                store.sweep()
            write_json(store.path / "recipe.lock.json", _lock(store, planned))
            write_text(store.path / "recipe.yaml", yaml.safe_dump(planned.recipe, sort_keys=False, allow_unicode=True))
        except OSError as error:
            raise UsageError(f"--out {store.path} cannot be written ({error.strerror}): give another folder") from None
        yield


def check_folder(store: Store) -> None:
    """
    Raises:
        UsageError: it is a file, or holds what is not Imprint's.
    """
    if store.path.exists() and not store.path.is_dir():
        raise UsageError(f"--out {store.path} is a file: expected a folder")
    if not store.path.is_dir() or (store.path / "recipe.lock.json").exists():
        return
    if any(not file.name.endswith((PART, LOCK)) for file in store.path.iterdir()):
        raise UsageError(f"--out {store.path} holds files that are not Imprint's: give an empty or new folder")


def _lock(store: Store, planned: AnyPlan) -> dict[str, object]:
    return {
        "imprint": __version__,
        "evidence": os.path.relpath(store.shared, store.path) if store.shared else None,
        "recipe": planned.recipe,
        "attacks": list(planned.attacks),
        "budget": planned.budget.model_dump() if planned.budget else None,
        "cells": [
            {
                "run_id": c.spec.run_id,
                "label": c.label,
                "base": c.base,
                "spec": c.spec.model_dump(mode="json"),
                "shadows": [shadow.spec.run_id for shadow in planned.shadows_of(c)],
                "passes": pass_keys(planned, c),
            }
            for c in planned.cells
        ],
    }


def _same_recipe(store: Store, planned: AnyPlan) -> None:
    run_ids = {cell.spec.run_id for cell in planned.cells}
    orphans = [c for c in store.lock()["cells"] if c["run_id"] not in run_ids]
    lost = [c for c in orphans if store.cell(c["run_id"]).measured]
    if not lost:
        return
    old = lost[0]["spec"]
    new = [cell.spec.model_dump(mode="json") for cell in planned.cells]
    differ = []
    for part in ("model", "data", "train"):
        before = old.get(part, {})  # an audit trains nothing
        differ += [f"{part}.{key}" for key in before if all(spec.get(part, {}).get(key) != before[key] for spec in new)]
    if all(spec["seed"] != old["seed"] for spec in new):
        differ = ["seed", *(key for key in differ if key != "data.seed")]
    what = ", ".join(differ) or "its methods"
    raise UsageError(
        f"--out {store.path} belongs to another recipe or audit (it differs in {what}; {len(lost)} of its cells are "
        "not in this one): give another folder"
    )
