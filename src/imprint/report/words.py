"""Numbers and names as people read them. Names, labels and reasons are hostile text: `clean` before anything else."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from imprint.report.readings import Reading
from imprint.spec import canonical_json
from imprint.types import Interval

REFUSED = {"too_few": "too few", "diverged": "diverged"}
"""What is shown in place of a number that was refused."""


def clean(text: object) -> str:
    """`text` on one line, without the control and direction characters that rewrite a terminal or a page.

    >>> clean("a\\x1b[2J\\n\\u202eb")
    'a�[2J �b'
    """
    shown = "".join(
        "�" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Cn") and c not in "\t\n\r" else c for c in str(text)
    )
    return " ".join(shown.split())


def share(x: float) -> str:
    """A probability or an AUC to three digits, without the leading zero.

    >>> share(0.7119), share(1.0), share(-0.02), share(10.5)
    ('.712', '1.000', '-.020', '10.500')
    """
    return re.sub(r"^(-?)0\.", r"\1.", f"{x:.3f}")


def probability(p: float) -> str:
    """Two significant digits, without the leading zero.

    >>> probability(0.0314), probability(0.00049975), probability(1), probability(2e-12)
    ('.031', '.0005', '1', '<.0001')
    """
    return "<.0001" if p < 1e-4 else re.sub(r"^0\.", ".", f"{p:.2g}")


def bounds(low: float, high: float) -> str:
    """An interval of shares; empty where it could not be computed.

    >>> bounds(0.69, 0.733)
    '[.690 .733]'
    """
    return f"[{share(low)} {share(high)}]" if math.isfinite(low) and math.isfinite(high) else ""


def interval(x: Interval) -> str:
    """A share with its interval.

    >>> interval(Interval(0.712, 0.69, 0.733))
    '.712 [.690 .733]'
    """
    return f"{share(x.value)} {bounds(x.low, x.high)}".rstrip()


def refused(reading: Reading) -> str:
    """Why a reading has no number."""
    return REFUSED.get(reading.status, reading.status)


def perplexity(x: float) -> str:
    """Four significant digits.

    >>> perplexity(7.5842), perplexity(1234.5), perplexity(3.2e9), perplexity(float("inf"))
    ('7.584', '1,234', '3.2e+09', 'infinite')
    """
    if not math.isfinite(x):
        return "infinite"
    if x >= 1e6:
        return f"{x:.2g}"
    return f"{x:,.0f}" if x >= 1000 else f"{x:#.4g}"


def clock(seconds: float) -> str:
    """
    >>> clock(0.4), clock(59.7), clock(185), clock(3725)
    ('<1 s', '1 min 00 s', '3 min 05 s', '1 h 02 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if whole else "<1 s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def operations(flops: float) -> str:
    """Floating point operations to three digits.

    >>> operations(4.2e9), operations(1.2345e13), operations(2.5e16)
    ('4.2 GFLOP', '12.3 TFLOP', '25 PFLOP')
    """
    for unit, name in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if flops >= unit:
            return f"{flops / unit:.3g} {name}"
    return f"{flops / 1e6:.3g} MFLOP"


def size(count: float) -> str:
    """Bytes to three digits.

    >>> size(2.5e9), size(7.3e8)
    ('2.33 GiB', '696 MiB')
    """
    return f"{count / 2**30:.3g} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"


def percent(part: int, whole: int) -> str:
    """
    >>> percent(1, 3), percent(20_480, 1_557_611_200), percent(5, 5)
    ('33.3%', '0.00131%', '100%')
    """
    return f"{100 * part / whole:.3g}%" if whole else ""


def listed(names: Sequence[str]) -> str:
    """
    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def plural(n: int, noun: str) -> str:
    """
    >>> plural(1, "record"), plural(1200, "record")
    ('1 record', '1,200 records')
    """
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def names(documents: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """One name per document: its `name`, with whatever sets it apart from others that have the same one.

    >>> names([{"name": "gpt2", "dtype": "float32"}, {"name": "gpt2", "dtype": "float16"}, {"name": "opt"}], "name")
    ['gpt2 (dtype=float32)', 'gpt2 (dtype=float16)', 'opt']
    """
    unique = {canonical_json(document): document for document in documents}
    titles = {key: _title(document, unique.values(), name) for key, document in unique.items()}
    return [titles[canonical_json(document)] for document in documents]


def _title(document: Mapping[str, Any], others: Iterable[Mapping[str, Any]], name: str) -> str:
    peers = [other for other in others if other[name] == document[name]]
    differ = [key for key in document if any(other.get(key) != document[key] for other in peers)]
    detail = ", ".join(f"{key}={_short(key, document[key])}" for key in differ)
    return clean(f"{document[name]} ({detail})" if detail else document[name])


def _short(key: str, value: object) -> str:
    return str(value)[:8] if key == "fingerprint" else str(value)
