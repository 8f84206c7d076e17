"""What a run is: everything that may change a number, frozen, with one canonical form and one identity.

`RunSpec` is the *what*; `Runtime` is the *how* (device, memory, folder). A run's id hashes all of the
first, so there is no list of fields to forget. Where a model or a data file lies is no part of it: the
content is (`model.fingerprint`, `data.fingerprint`).
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from imprint.errors import UsageError, unknown

MEASUREMENT_VERSION = 4
"""Raised whenever the code changes a number; old cells are then computed again."""

_LATER = ("goldfish", "dp", "stop")
"""Parts of the training that an identity holds only where they are asked for."""
VIRTUAL_TOKEN_ROOM = 32
"""Positions of the context kept free for virtual tokens, so that every method sees the same texts."""


class Strict(BaseModel):
    """A frozen record that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class ModelSpec(Strict):
    """A Transformers causal language model."""

    name: str
    """Hub id, local folder, or the name of a shipped model (`tiny/gpt2-medium`)."""
    revision: str | None = None
    """Hub revision: a branch, tag or commit."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the frozen weights; `auto` is float32 on a CPU and bfloat16 on a GPU. What trains is float32."""
    quantize: Literal["4bit", "8bit"] | None = None
    """Linear layers of the frozen model in 4 bits (NF4) or 8 (needs `imprint-audit[bnb]`); not for `full`."""
    fingerprint: str = ""
    """SHA-256 of weights, configuration and tokenizer; filled in when the recipe is read."""


class Source(Strict):
    """Where records come from. In a recipe a plain string is short for its `name`."""

    name: str
    """A benchmark (`wikitext-2`, `webnlg`, `xsum`), `world/…`, a local file or folder, or a Hub id."""
    path: str | None = None
    """A local folder that holds the named benchmark."""
    config: str | None = None
    """Hub configuration."""
    split: str | None = None
    """Hub split (default: all of them)."""
    revision: str | None = None
    """Hub revision: a branch, tag or commit."""


class Columns(Strict):
    """Which columns hold the text: `text` alone, or `prompt` and `target`."""

    text: str | None = None
    """Column of a plain text."""
    prompt: str | None = None
    """Column of the context."""
    target: str | None = None
    """Column of what is tuned on and scored; it follows the prompt as it is: a space belongs in one of them."""


def _source(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class DataSpec(Strict):
    """Which records, and how they are divided."""

    source: Annotated[Source, BeforeValidator(_source)]
    """Where records come from: a name, or a mapping with the keys of `data.source` below."""
    members: int | None = Field(default=None, ge=1)
    """Records tuned on and scored (default 1,000; with `split: official` the paper's number)."""
    nonmembers: int | None = Field(default=None, ge=1)
    """Records never tuned on, scored (default 1,000; with `split: official` the paper's number)."""
    validation: int | None = Field(default=None, ge=1)
    """Records never tuned on, for perplexity (default 500)."""
    tune_on: int | None = Field(default=None, ge=1)
    """Records tuned on, where more are wanted than are scored (default: `members`)."""
    auxiliary: int | None = Field(default=None, ge=1)
    """Records kept apart for attacks that learn (`ensemble`, `camia`, `con_recall`): so many tuned on and so many never
    tuned on, all scored, none evaluated."""
    canaries: str | None = None
    """A sealed file of `imprint canaries make`: its canaries are scored, and tuned on where its coin flips say so."""
    repeat: int = Field(default=1, ge=1)
    """Times that each member is tuned on per epoch; the records that `tune_on` adds beside them: once."""
    group: str | None = None
    """Column naming the owner of a record (subject, document); a group never spans two sides."""
    subgroup: str | None = None
    """Column of a property (language, region) for each of whose values leakage is reported apart."""
    id: str | None = None
    """Column holding the record's id (default `id` where there is one, else a content hash)."""
    split: Literal["random", "official", "given"] = "random"
    """`random`: drawn from all records by the seed. `official`: the source's own train, test and validation parts.
    `given`: a column `member` or `split` says who was tuned on."""
    format: (
        Literal["auto", "text", "prompt_completion", "messages", "sharegpt", "alpaca", "alpaca_chat", "tokens"]
        | Columns
    ) = "auto"
    """`text`, `prompt_completion`, `messages`, `sharegpt`, `alpaca` (Stanford's prompt), `alpaca_chat` (a chat),
    `tokens` (`input_ids` with `labels`), or a mapping of column names; `auto` looks at the columns."""
    loss: Literal["target", "all"] = "target"
    """Trained on and scored: the `target` (completion, assistant's turns, unmasked labels), or `all`."""
    eos: bool | None = None
    """Whether the end-of-sequence token ends a text (default: one with a prompt); a conversation's template says it."""
    max_length: int | None = Field(default=None, ge=2)
    """Tokens kept of a text (default: the model's context less 32 for virtual tokens, at most 1,024)."""
    overlong: Literal["truncate", "keep_start", "refuse"] = "truncate"
    """A text longer than `max_length`: `truncate` cuts the start of its prompt, then its end; `keep_start` its end
    alone, as most trainers do; both are counted. `refuse` stops."""
    seed: int | None = Field(default=None, ge=0, lt=2**31)
    """Draws the split (default: the recipe's seed). Give it where seeds shall differ in training alone."""
    sealed: str = ""
    """Seal of the canaries; filled in when the recipe is read."""
    tokenizer: str = ""
    """SHA-256 of a tokenizer or chat template that is not the model's own; filled in by an audit."""
    fingerprint: str = ""
    """SHA-256 of the records as read; filled in when the recipe is read."""


class Privacy(Strict):
    """Differentially private training (Abadi et al. 2016), through Opacus."""

    epsilon: float = Field(gt=0)
    """The ε that is spent over all epochs."""
    delta: float | None = Field(default=None, gt=0, lt=1)
    """The δ that goes with it (default: half of one over the number of tuned records)."""
    clip: float = Field(default=1.0, gt=0)
    """Norm to which each record's gradient is clipped."""


class Stop(Strict):
    """Early stopping on leakage."""

    attack: str = "ref"
    """The attack that is watched: one that needs no more than the scores of the model and its base."""
    auc: float = Field(gt=0.5, le=1)
    """Training ends after the first epoch whose AUC is above this; the cell ships the epoch before."""


class TrainSpec(Strict):
    """How a method is trained."""

    epochs: int = Field(default=15, ge=1)
    """Passes over the tuned records."""
    batch_size: int = Field(default=16, ge=1)
    """Records per optimiser step, whatever the memory."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate (default: the method's own)."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Decay of the learning rate to zero over the run."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises linearly from zero."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradient norm is clipped to this."""
    goldfish: int | None = Field(default=None, ge=2)
    """Leave one token in so many out of the loss, the same ones in every copy of a passage (Hans et al. 2024)."""
    dp: Privacy | None = None
    """Train with differential privacy: `{epsilon: 8}`."""
    stop: Stop | None = None
    """Stop when the records leak: `{attack: ref, auc: 0.6}`."""


class MethodSpec(Strict):
    """A tuning method with every option resolved."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)


class Budget(Strict):
    """How much leakage is acceptable: the *upper* bound of the interval must stay below each number given."""

    attack: str | None = None
    """The attack that is held to it (default: every one of those run)."""
    auc: float | None = Field(default=None, gt=0.5, le=1)
    """Limit on the AUC."""
    tpr_at_10pct_fpr: float | None = Field(default=None, ge=0, le=1)
    """Limit on the true positive rate at 10% false positives."""
    tpr_at_1pct_fpr: float | None = Field(default=None, ge=0, le=1)
    """Limit on the true positive rate at 1% false positives."""


class CellSpec(Strict):
    """One cell: everything that may change one of its numbers."""

    model: ModelSpec
    data: DataSpec
    method: MethodSpec
    seed: int = Field(ge=0, lt=2**31)
    """Draws the initial values, the order of the records, dropout and, unless `data.seed` is given, the split."""
    version: int = MEASUREMENT_VERSION

    def identity(self) -> dict[str, Any]:
        """The canonical form: names of places replaced by the fingerprints of what lies there."""
        document = self.model_dump(mode="json")
        document["model"] = {"fingerprint": self.model.fingerprint, "dtype": self.model.dtype}
        if self.model.quantize:
            document["model"]["quantize"] = self.model.quantize
        document["data"]["source"] = None
        for key in ("id", "format", "group", "subgroup"):  # already applied in the records that the fingerprint covers
            document["data"].pop(key)
        document["data"].pop("canaries")
        for key in ("loss", "eos", "tokenizer", "auxiliary", "sealed"):  # only where they are not as they always were
            if document["data"][key] == DataSpec.model_fields[key].default:
                document["data"].pop(key)
        return document

    @property
    def run_id(self) -> str:
        """Sixteen hexadecimal digits of the SHA-256 of the identity."""
        return content_key(self.identity())


class RunSpec(CellSpec):
    """A cell that is tuned here."""

    train: TrainSpec
    shadow: int | None = Field(default=None, ge=0)
    """Number of a shadow model, which is tuned on a random half of the scored records instead of the members."""

    def identity(self) -> dict[str, Any]:
        document = super().identity()
        document["train"] = {key: value for key, value in document["train"].items() if key not in _LATER or value}
        if self.shadow is None:
            document.pop("shadow")
        return document


class AuditSpec(CellSpec):
    """A cell that was tuned elsewhere; `method` is what was found out about it."""

    reference: ModelSpec | None = None
    """The model that it is compared with, where that is not the one below the adapter."""

    def identity(self) -> dict[str, Any]:
        document = super().identity()
        document["reference"] = self.reference.fingerprint if self.reference else None
        return document


class Runtime(Strict):
    """The how: nothing here may change a number by more than float rounding.

    One exception: with `lora.dropout`, `token_budget` decides which masks are drawn.
    """

    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""
    token_budget: int | None = Field(default=None, ge=1)
    """Tokens of one forward pass (default: 2,048 on a CPU, 16,384 on a GPU)."""
    device_map: bool = False
    """Spread the layers over all GPUs and, where these are full, the CPU: for a model that no single GPU holds."""


def canonical_json(document: Any) -> str:
    """Sorted keys, no spaces: equal documents give equal bytes."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def content_key(document: Any) -> str:
    """Sixteen hexadecimal digits that name a JSON document by its content."""
    return hashlib.sha256(canonical_json(document).encode()).hexdigest()[:16]


Model = TypeVar("Model", bound=BaseModel)


def validated(kind: type[Model], document: Any, where: str) -> Model:
    """`kind` built from plain data, or one sentence about the first thing that is wrong with it.

    Raises:
        UsageError: names the key, what was expected and, for an unknown key, the nearest right one.
    """
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        raise UsageError(_sentence(kind, error, where)) from None


def _sentence(kind: type[BaseModel], error: ValidationError, where: str) -> str:
    errors = error.errors(include_url=False)
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])  # of a union: the mapping's own
    path = [str(part) for part in first["loc"] if not str(part).startswith(("literal[", "Columns", "function-"))]
    key = ".".join([where, *path] if where else path)
    if first["type"] == "extra_forbidden":
        place = ".".join([where, *path[:-1]] if where else path[:-1]) or "recipe"
        return f"{place}: {unknown('key', path[-1], _owner(kind, path[:-1]))}"
    if first["type"] == "missing":
        return f"{key or where}: this key is required and missing"
    given = first.get("input")
    return f"{key}: {first['msg'][:1].lower() + first['msg'][1:]} (got {given!r})"


def _owner(kind: type[BaseModel], path: list[str]) -> list[str]:
    """The keys that the record at `path` knows."""
    for part in path:
        annotation = kind.model_fields[part].annotation
        choices = [annotation, *get_args(annotation)]
        kind = next(c for c in choices if isinstance(c, type) and issubclass(c, BaseModel))
    return list(kind.model_fields)
