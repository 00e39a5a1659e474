"""Loading models: a hub id, a folder, a GGUF file, or "builtin:target" / "builtin:draft"."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TorchAoConfig,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..config import Quantization
from ..errors import DraftSieveError, MissingExtraError, ModelError, ModelNotFoundError
from .bars import progress_bars
from .devices import auto_dtype, pick_device, pick_dtype
from .footprint import explain_out_of_memory, footprint, is_out_of_memory
from .gguf import gguf_tokenizer, load_gguf
from .gguf_file import find_gguf, read_gguf
from .hub import hub_obstacle
from .int8 import to_int8
from .names import missing, resolve

logger = logging.getLogger(__name__)
AnyQuantization = Quantization | QuantizationConfigMixin  # ours, or any of transformers'
_WARMING = Lock()
_EXPECTED = (OSError, ValueError, ImportError, RuntimeError, MemoryError, SafetensorError)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in evaluation mode with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


def load_model(
    name: str | Path,
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    quantization: AnyQuantization | None = None,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> LoadedModel:
    """Load a causal language model and its tokenizer; only safetensors and GGUF are read.

    Args:
        name: "builtin:target", "builtin:draft", a model of `draftsieve models list`, a folder, a
            Hugging Face hub id, or a GGUF file (on disk, or in a hub repository as
            "owner/repository/file.gguf").
        gguf_file: Name of the GGUF file to take from the folder or the hub repository.
        revision: Branch, tag or commit of a hub repository; None for its default branch.
        quantization: How weights are quantised while loading: a `Quantization`, or any of
            transformers' configs (`BitsAndBytesConfig`, ...); None for as they are.
        device: "auto" (CUDA where present, else CPU), "cpu", "cuda", "cuda:1", ...
        dtype: "auto" is the checkpoint's own type on CUDA. On a CPU it is float32, but bfloat16
            for models of 50 million parameters or more that are stored in half precision, where
            the processor multiplies bfloat16 (AMX, AVX512_BF16) and nothing is quantised.
        attn_implementation: "eager", "sdpa", "flash_attention_2", ...; None for the model's
            default.
        trust_remote_code: Run code that a hub repository carries. Off unless you ask for it.
        progress: Show transformers' loading bars.

    Raises:
        ModelNotFoundError: There is no such model, or it cannot be reached.
        ModelError: It exists but cannot be loaded.
        OutOfMemoryError: It does not fit.
    """
    source = resolve(name)
    place = pick_device(device)
    options: dict[str, Any] = {
        "dtype": pick_dtype(dtype, place),
        "use_safetensors": True,
        "device_map": {"": place},
        "attn_implementation": attn_implementation,
    }
    on_cpu = torch.device(place).type == "cpu"
    by_torch = isinstance(quantization, Quantization) and quantization.backend == "torch"
    if quantization is not None:
        if on_cpu and options["dtype"] == "auto":
            options["dtype"] = torch.float32
        if not by_torch:
            options["quantization_config"] = _quantization_config(quantization, options["dtype"])
    obstacle = None if Path(source).exists() else hub_obstacle()
    files: dict[str, Any] = {"revision": revision, "local_files_only": obstacle is not None}
    where = {**files, "trust_remote_code": trust_remote_code}
    work = f"loading {str(name)!r}"
    with (
        explain_out_of_memory(work),
        loading_errors(str(name), source, obstacle),
        progress_bars(progress),
    ):
        if (file := find_gguf(source, gguf_file, **files)) is not None:
            if on_cpu and options["dtype"] == "auto":  # at about a byte for each parameter
                options["dtype"] = auto_dtype(torch.float16, file.stat().st_size)
            model, tokenizer = load_gguf(file, **options)
        else:
            config = AutoConfig.from_pretrained(source, **where)
            if on_cpu and options["dtype"] == "auto":
                options["dtype"] = _cpu_dtype(config, trust_remote_code)
            tokenizer = AutoTokenizer.from_pretrained(source, **where)
            model = AutoModelForCausalLM.from_pretrained(source, **where, **options)
        if by_torch:
            to_int8(model)
    accept(model)
    logger.info("Loaded %s on %s, %.0f MB", name, place, footprint(model) / 1e6)
    return LoadedModel(model, tokenizer, str(name))


def load_tokenizer(
    name: str | Path,
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """The tokenizer alone; arguments and errors as for `load_model`."""
    source = resolve(name)
    obstacle = None if Path(source).exists() else hub_obstacle()
    files: dict[str, Any] = {"revision": revision, "local_files_only": obstacle is not None}
    with loading_errors(str(name), source, obstacle):
        if (file := find_gguf(source, gguf_file, **files)) is not None:
            return gguf_tokenizer(read_gguf(file))
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source, trust_remote_code=trust_remote_code, **files
        )
    return tokenizer


def _cpu_dtype(config: PreTrainedConfig, trust_remote_code: bool) -> torch.dtype:
    """See `auto_dtype`; the model is only counted, not made."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else None
    return auto_dtype(stored, model.num_parameters())


def context_window(model: PreTrainedModel) -> int | None:
    """Most tokens the model reads, by its configuration; None if it states none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def end_token_ids(model: PreTrainedModel) -> torch.Tensor:
    """(ends,) int64: the tokens that end a generation of this model; empty if it has none."""
    config = model.generation_config
    ends = None if config is None else config.eos_token_id
    return torch.tensor([] if ends is None else ends, dtype=torch.int64).reshape(-1)


def fingerprint(model: PreTrainedModel) -> str:
    """Tells weights apart without reading all of them: 16 hexadecimal digits.

    Some values of each unquantised tensor are looked at, in float32: loading a bfloat16 checkpoint
    as float32 changes nothing, other weights or quantising them do.
    """
    digest = hashlib.sha256()
    for name, weights in model.named_parameters():
        values = weights.detach()
        # quantised tensors of torchao pose as floating point, but cannot be cut
        if type(values) is not torch.Tensor or values.is_meta or not values.numel():
            continue
        if values.is_floating_point():
            flat = values.reshape(-1)
            some = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
            digest.update(f"{name} {tuple(weights.shape)}".encode())
            digest.update(some.numpy().tobytes())
    return digest.hexdigest()[:16]


def _quantization_config(
    options: AnyQuantization, dtype: str | torch.dtype
) -> QuantizationConfigMixin:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns at every int8 matmul
    if isinstance(options, QuantizationConfigMixin):
        return options
    if options.backend == "torchao":
        return _torchao()
    if options.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_use_double_quant=options.double_quant,
    )


def _torchao() -> QuantizationConfigMixin:
    if find_spec("torchao") is None:
        raise MissingExtraError(
            'Quantization(backend="torchao") needs torchao, which is not installed: '
            'pip install "draftsieve[torchao]"'
        )
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(version=2))


def accept(model: PreTrainedModel) -> PreTrainedModel:
    """A model in evaluation mode that requests may use from now on, several at once.

    Raises:
        ModelError: It is no decoder-only model.
    """
    if model.config.is_encoder_decoder or not model.can_generate():
        raise ModelError(
            f"{type(model).__name__} ({model.config.model_type}) is no decoder-only language model "
            "with a head that predicts tokens, which targets and drafts must be: load one with "
            "AutoModelForCausalLM."
        )
    model.eval()
    guard_saving(model)
    warm_up(model)
    return model


def warm_up(model: PreTrainedModel) -> None:
    """Run one pass alone where the first one changes a model.

    bitsandbytes repacks 4-bit weights for the CPU, and moves 8-bit ones, in place and without a
    lock during the first pass: several threads at once would read half-changed weights.
    """
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        with _WARMING, torch.no_grad():
            model(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=model.device))


def guard_saving(model: PreTrainedModel) -> None:
    """Refuse to give out weights that the CPU has repacked: saved, they would be wrong.

    Asking for them would also unpack them in place, below requests that run at the moment.
    Guarding a model again changes nothing.
    """
    for module in model.modules():
        quantised = getattr(getattr(module, "weight", None), "quant_state", None) is not None
        if quantised and _refuse_repacked not in module._state_dict_pre_hooks.values():
            module.register_state_dict_pre_hook(_refuse_repacked)  # type: ignore[no-untyped-call]


def _refuse_repacked(module: torch.nn.Module, *_: Any) -> None:
    state = getattr(module.weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        raise ModelError(
            "These 4-bit weights have been repacked for this CPU and cannot be saved: the file "
            "would be wrong. Save the checkpoint that was loaded, and quantise it when loading."
        )


@contextmanager
def loading_errors(name: str, source: str, obstacle: str | None) -> Iterator[None]:
    """Explain what went wrong while loading; `obstacle` says why the hub could not be asked."""
    try:
        yield
    except DraftSieveError:
        raise
    except _EXPECTED as error:
        if is_out_of_memory(error):
            raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        if isinstance(error, OSError) and not Path(source).exists():
            hub = f"the hub says: {first}"
            if obstacle is not None:
                hub = f"the hub's cache does not hold it ({obstacle})"
            raise ModelNotFoundError(missing(name, hub)) from error
        if isinstance(error, OSError):
            raise ModelNotFoundError(
                f"{name!r} is no complete model, with config.json and safetensors: {first}"
            ) from error
        raise ModelError(f"Cannot load the model {name!r}: {first}") from error
