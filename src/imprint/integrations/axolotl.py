"""A plugin for Axolotl: `plugins: [imprint.integrations.axolotl.ImprintPlugin]`, and a key `imprint`.

Non-members are what Axolotl evaluates on (`val_set_size` or `test_datasets`), which it treats as it treats what it
trains on. Axolotl itself is imported when the plugin is asked for, which only Axolotl does.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from pydantic import BaseModel

from imprint.integrations import Keys
from imprint.spec import validated


class ImprintArgs(BaseModel):
    """What the plugin adds to Axolotl's configuration."""

    imprint: Keys | None = None
    """Arguments of the audit (default: those of `LeakageCallback`)."""


@cache
def _plugin() -> Any:
    base: Any = import_module("axolotl.integrations.base").BasePlugin

    class ImprintPlugin(base):  # type: ignore[misc]
        """Audits the model in training after every epoch or save."""

        def get_input_args(self) -> str:
            return f"{__name__}.ImprintArgs"

        def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
            from imprint.callback import LeakageCallback

            keys = validated(Keys, dict(cfg.get("imprint") or {}), "imprint")
            return [LeakageCallback(trainer, **keys.arguments())]

    return ImprintPlugin


def __getattr__(name: str) -> Any:
    if name == "ImprintPlugin":
        return _plugin()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
