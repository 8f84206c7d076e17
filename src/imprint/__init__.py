"""Imprint: how much does a fine-tuned language model remember of its fine-tuning data, and what leaks least?

The names below are the whole public interface; each is imported when it is first used, so that `import imprint`
is fast and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "run": "imprint.runs",
    "audit": "imprint.auditing.api",
    "LeakageCallback": "imprint.callback",
    "results": "imprint.rows",
    "METHODS": "imprint.tuning.methods",
    "ATTACKS": "imprint.attacks",
    "auc": "imprint.measures",
    "paired_auc": "imprint.measures",
    "tpr_at_fpr": "imprint.measures",
    "one_run_epsilon": "imprint.measures",
    "extraction_probability": "imprint.measures",
    "ImprintError": "imprint.errors",
}
__all__ = [
    "ATTACKS",
    "METHODS",
    "ImprintError",
    "LeakageCallback",
    "auc",
    "audit",
    "extraction_probability",
    "one_run_epsilon",
    "paired_auc",
    "results",
    "run",
    "tpr_at_fpr",
]

if TYPE_CHECKING:
    from imprint.attacks import ATTACKS
    from imprint.auditing.api import audit
    from imprint.callback import LeakageCallback
    from imprint.errors import ImprintError
    from imprint.measures import auc, extraction_probability, one_run_epsilon, paired_auc, tpr_at_fpr
    from imprint.rows import results
    from imprint.runs import run
    from imprint.tuning.methods import METHODS


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'imprint' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
