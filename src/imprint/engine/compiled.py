"""Elementwise work fused by torch's compiler, where there is enough of it to pay for the compiling."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

PAYS_FROM = {"cpu": 5e10, "cuda": 3e12}
"""Logits to be read in a whole cell, from which compiling (about 15 s, once a machine) costs less than it saves."""


def pays(logits: float, device: torch.device) -> bool:
    """Whether a cell that reads so many logits should compile what reads them."""
    return logits >= PAYS_FROM.get(device.type, float("inf"))


@cache
def compiled(work: Callable[..., Any], device: str) -> Callable[..., Any]:
    """`work` of a tensor [n, m] and one [n], fused; itself where this machine has no working compiler."""
    try:
        with warnings.catch_warnings():  # the compiler's own, about torch's own
            warnings.simplefilter("ignore")
            fused = torch.compile(work, dynamic=True)
            for n, m in ((512, 1024), (300, 81)):
                fused(torch.randn(n, m, device=device), torch.zeros(n, device=device))
    except Exception as error:  # no C++ compiler, no Triton, an unsupported Python: slower, not wrong
        warnings.warn(f"torch.compile does not work here ({type(error).__name__}): going on without", stacklevel=2)
        return work
    return fused
