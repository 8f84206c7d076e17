"""Loading models and tokenizers, and the few things that differ between architectures."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from imprint.errors import ModelError, UsageError, first_line
from imprint.tuning.locate import Located, check_tokenizer, json_object, own_code
from imprint.tuning.quantised import constants, keep_layout, quantisation, require

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """`auto` is the first GPU where there is one.

    Raises:
        UsageError: no such device on this machine.
    """
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        torch.zeros(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"device {name!r} cannot be used on this machine ({first_line(error)}): try `auto` or `cpu`"
        ) from None


def resolve_dtype(name: str, device: torch.device) -> str:
    """`auto` is bfloat16 on a GPU that has it and float32 elsewhere."""
    if name != "auto":
        return name
    return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"


def load_model(
    located: Located, dtype: str, device: torch.device, quantize: str | None = None, device_map: bool = False
) -> nn.Module:
    """A causal language model in evaluation mode, all parameters frozen.

    Args:
        located: where it lies.
        dtype: precision of the weights, or of what is not quantised.
        device: where it goes, or with `device_map` its first layers.
        quantize: `4bit` or `8bit` for the linear layers of the blocks.
        device_map: whether to spread it over all devices, as Accelerate thinks best.

    Raises:
        ModelError: the folder cannot be loaded, the reason is the library's own first line; or it fits nowhere.
        UsageError: bitsandbytes is wanted and not installed.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {}
    ready = bool(located.config.get("quantization_config"))
    if quantize and ready:
        raise ModelError(f"model {located.path} is quantised already (quantization_config): leave model.quantize out")
    if ready:
        require("4bit" if located.config["quantization_config"].get("load_in_4bit") else "8bit")
    if quantize:
        options["quantization_config"] = quantisation(quantize, DTYPES[dtype])
    if quantize or ready or device_map:  # what is quantised is so on the way to its device
        options["device_map"] = "auto" if device_map else {"": str(device)}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            located.path,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # the library raises many kinds; each means that this folder is no usable model
        raise ModelError(f"model {located.path} cannot be loaded: {_reason(error, located.path)}") from None
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"model {located.path} lacks {len(missing)} weights, which would be random ({', '.join(missing[:3])}): "
            "it is damaged or no causal language model"
        )
    if not options:
        model = model.to(device)
    model.eval().requires_grad_(False)
    keep_layout(model)
    _check_placed(model)
    _check_causal(model)
    return model  # type: ignore[no-any-return]


def _check_placed(model: Any) -> None:
    """Embedding and output layer are read outside the model's own passes: they must lie where they are used."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    offloaded = any(parameter.is_meta for end in ends if end is not None for parameter in end.parameters())
    if offloaded or "disk" in getattr(model, "hf_device_map", {}).values():
        raise ModelError(
            f"{type(model).__name__} does not fit the memory of this machine's devices: its output layer or embedding "
            "would have to be fetched for every pass; quantize it, or use larger or more GPUs"
        )


@torch.no_grad()
def _check_causal(model: nn.Module) -> None:
    """What comes later must not change what is predicted: some encoders load as causal models and look both ways."""
    device = next(model.parameters()).device
    one, other = (torch.tensor([[1, 2, last]], device=device) for last in (1, 2))
    first, second = (model(input_ids=ids, use_cache=False).logits[0].float() for ids in (one, other))
    change = (first - second).abs().amax(-1)  # [T]: rounding at most before the last position, a lot at it
    rounding = 1e-4 if next(model.parameters()).dtype == torch.float32 else 2e-2
    if change[:2].max() > rounding * change[2]:
        raise ModelError(f"{type(model).__name__} is not causal: later tokens change what it predicts for earlier ones")


def load_tokenizer(located: Located, folder: Path | None = None) -> Any:
    """A model's tokenizer.

    Args:
        located: the model.
        folder: where the tokenizer lies, if not beside the model: an adapter may bring its own. The model's
            configuration still says of what kind it is, as it did when that tokenizer was loaded and saved.

    Raises:
        ModelError: there is none, it cannot be read, or it knows more tokens than the model.
    """
    from transformers import AutoConfig

    path = folder or located.path
    check_tokenizer(located.path)
    check_tokenizer(path)
    safely: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    try:
        kind = AutoConfig.from_pretrained(located.path, **safely) if folder else None
        tokenizer = _tokenizer_class(path).from_pretrained(path, config=kind, **safely)
    except Exception as error:  # as above
        raise ModelError(f"the tokenizer in {path} cannot be loaded: {_reason(error, path)}") from None
    tokenizer.model_max_length = int(1e9)  # length is ours to watch: no warning about long texts
    if not tokenizer("a", add_special_tokens=False).input_ids:
        raise ModelError(f"the tokenizer in {path} knows no text: its files (tokenizer.json) are missing or empty")
    if len(tokenizer) > (size := vocabulary_size(located)):
        raise ModelError(
            f"the tokenizer in {path} knows {len(tokenizer)} tokens, the model only {size}: they do not match"
        )
    return tokenizer


def _tokenizer_class(folder: Path) -> Any:
    """Transformers 5 saves plain tokenizers under a name that Transformers 4 does not know; the file is the same."""
    import transformers

    file = folder / "tokenizer_config.json"
    named = json_object(file).get("tokenizer_class") if file.is_file() else None
    if named == "TokenizersBackend" and not hasattr(transformers, named):
        return transformers.PreTrainedTokenizerFast
    return transformers.AutoTokenizer


def _reason(error: Exception, folder: Path) -> str:
    """Transformers' own first line, but never its advice to run code from the folder."""
    code = own_code(folder) if "trust_remote_code" in str(error) else ""
    return code or first_line(error)


def vocabulary_size(located: Located) -> int:
    """Rows of the embedding, as the configuration states them."""
    return located._number("vocab_size")


def base_of(model: nn.Module) -> Any:
    """The Transformers model inside a tuned one."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def head_of(model: nn.Module) -> nn.Module:
    """The output layer, whose input are the last hidden states.

    Raises:
        ModelError: the architecture names none.
    """
    head = base_of(model).get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise ModelError(f"{type(base_of(model)).__name__} names no output layer: it is not a causal language model")
    return head


def vocabulary(model: nn.Module) -> int:
    """Tokens that the model can predict."""
    return int(next(head_of(model).parameters()).shape[0])


def autocast(model: nn.Module) -> AbstractContextManager[object]:
    """Mixed precision where the base was loaded in 16 bits: what trains is stored in float32, the products are not.

    The base, and whatever is tuned on top of it, are scored in the same precision, or their difference would be noise.
    """
    dtype = base_of(model).config.dtype
    if dtype not in (torch.bfloat16, torch.float16):
        return nullcontext()
    return torch.autocast(next(model.parameters()).device.type, dtype)


def before_head(model: nn.Module, **inputs: Any) -> torch.Tensor:
    """[B, T, D] what meets the output layer, which is then given nothing to do."""
    kept: list[torch.Tensor] = []

    def keep(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        kept.append(args[0])
        return (args[0][:, :0], *args[1:])

    hook = head_of(model).register_forward_pre_hook(keep)
    try:
        model(use_cache=False, **inputs)
    finally:
        hook.remove()
    return kept[0]


def own_head(model: nn.Module) -> nn.Module:
    """Give the output layer weights of its own; returns it.

    GPT-2 and Llama-3.2-1B share them with the input embedding: training "the head" would train that as well. Elsewhere
    they may be shared with other runs on the same base.
    """
    head = copy.deepcopy(head_of(model))
    model.set_output_embeddings(head)  # type: ignore[operator]
    model.config.tie_word_embeddings = False  # type: ignore[union-attr]
    return head


def experts_of(config: Any) -> int:
    """Experts among which a token's router chooses in each layer; 0 in a dense model."""
    counts = (getattr(config, key, None) for key in ("num_local_experts", "num_experts", "n_routed_experts"))
    return next((int(count) for count in counts if count), 0)


def expert_share(config: Any) -> float:
    """Of the experts of a layer those that a token meets."""
    chosen, experts = getattr(config, "num_experts_per_tok", None), experts_of(config)
    return chosen / experts if chosen and experts else 1.0


@contextmanager
def names_as_they_are(base: Any) -> Iterator[None]:
    """PEFT takes some names of some architectures for those of an older Transformers, and adapts other matrices."""
    config = base.config
    known = config.model_type
    config.model_type = "as the tensors say"
    try:
        yield
    finally:
        config.model_type = known


def shared_copy(model: nn.Module) -> nn.Module:
    """New modules and a new configuration around the same weights: what is attached to one copy leaves others alone."""
    shared = (*model.parameters(), *model.buffers(), *constants(model))
    return copy.deepcopy(model, {id(one): one for one in shared})


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name; a shared one counts once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def training_mode(model: nn.Module) -> None:
    """No dropout but the adapter's own, the same for every method.

    A frozen base is a fixed function, whose noise would only be noise; and masks would differ with the packing.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    model.train()
    base = base_of(model).eval()
    for module in base.modules():
        if isinstance(module, BaseTunerLayer):
            module.train()


def only_head_trains(model: nn.Module) -> bool:
    """Whether the backbone and its inputs stay as they are, so that hidden states can be computed once."""
    head = {id(parameter) for parameter in head_of(model).parameters()}
    return all(id(parameter) in head for parameter in trainable(model).values())


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all)."""
    return sum(numel(p) for p in trainable(model).values()), sum(numel(p) for p in model.parameters())


def numel(parameter: nn.Parameter) -> int:
    """Numbers of a parameter; two four-bit ones lie in a byte."""
    packed = getattr(parameter, "quant_state", None)
    return math.prod(packed.shape) if packed else parameter.numel()
