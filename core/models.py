"""Loading models: a hub id, a local folder, or the bundled "builtin:target" / "builtin:draft"."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from .config import Quantization
from .errors import ModelError, ModelNotFoundError, OutOfMemoryError

logger = logging.getLogger(__name__)
BUILTIN = "builtin:"
_PROGRESS = Lock()


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in evaluation mode with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


def load_model(
    name: str | Path,
    *,
    quantization: Quantization | None = None,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    progress: bool = True,
) -> LoadedModel:
    """Load a causal language model and its tokenizer; only safetensors weights are read.

    Args:
        name: "builtin:target", "builtin:draft", a folder, or a Hugging Face hub id.
        quantization: bitsandbytes weights, on CPU or CUDA; None for none.
        device: "auto" (CUDA where present, else CPU), "cpu", "cuda", "cuda:1", ...
        dtype: "auto" is the checkpoint's own type on CUDA and float32 on CPU.
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
        "trust_remote_code": trust_remote_code,
        "use_safetensors": True,
        "device_map": {"": place},
    }
    if quantization is not None:
        options["quantization_config"] = _bitsandbytes(quantization, options["dtype"])
    with _loading_errors(str(name)), _progress_bars(progress):
        AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(source, **options).eval()
    if quantization is not None:
        _warm_up(model)
    logger.info("Loaded %s on %s, %.0f MB", name, place, model.get_memory_footprint() / 1e6)
    return LoadedModel(model, tokenizer, str(name))


def resolve(name: str | Path) -> str:
    """The folder of a bundled model, or the name as it is.

    Raises:
        ModelNotFoundError: "builtin:..." names no bundled model, or a path is not there.
    """
    text = str(name)
    if not text.strip():
        raise ModelNotFoundError("The model name is empty: give a hub id, a folder or builtin:...")
    if text.startswith(BUILTIN):
        home = Path(str(files(f"{__package__}.builtin")))
        folder = home / text.removeprefix(BUILTIN)
        if not (folder / "config.json").is_file():
            known = sorted(f"{BUILTIN}{p.parent.name}" for p in home.glob("*/config.json"))
            raise ModelNotFoundError(f"There is no bundled model {text!r}; there are: {known}.")
        return str(folder)
    looks_local = isinstance(name, Path) or text.startswith((".", "/", "~"))
    path = Path(text).expanduser()
    if looks_local and not path.is_dir():
        raise ModelNotFoundError(f"The model folder {text!r} does not exist.")
    return str(path) if path.is_dir() else text


def pick_device(device: str) -> str:
    """ "auto" is CUDA where present, else CPU; anything else is checked and returned."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ModelError(f"{device!r} is no device; try 'auto', 'cpu' or 'cuda'.") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device={device!r}, but this torch sees no CUDA device; try 'auto'.")
    return device


def pick_dtype(dtype: str | torch.dtype, device: str) -> str | torch.dtype:
    """ "auto" stays the checkpoint's own type on an accelerator and becomes float32 on CPU."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if device == "cpu" else "auto"
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise ModelError(f"{dtype!r} is no dtype; try 'auto', 'float32' or 'bfloat16'.")
    return found


def context_window(model: PreTrainedModel) -> int | None:
    """Most tokens the model reads, by its configuration; None if it states none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


@contextmanager
def explain_out_of_memory(**models: PreTrainedModel | None) -> Iterator[None]:
    """Turn an allocation failure into an `OutOfMemoryError` that names the models' sizes."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        sizes = ", ".join(
            f"{role} {model.get_memory_footprint() / 1e6:.0f} MB"
            for role, model in models.items()
            if model is not None
        )
        raise OutOfMemoryError(
            f"Out of memory; the weights take: {sizes}. Use a smaller capacity, "
            "Quantization(bits=4), fewer prompts at once, or put the draft on another device."
        ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        "can't allocate memory" in str(error) or "not enough memory" in str(error)
    )


def _bitsandbytes(options: Quantization, dtype: str | torch.dtype) -> BitsAndBytesConfig:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns at every int8 matmul
    if options.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_use_double_quant=options.double_quant,
    )


def _warm_up(model: PreTrainedModel) -> None:
    """One forward pass alone: on CPU the first one repacks 4-bit weights in place."""
    with torch.no_grad():
        model(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=model.device))


@contextmanager
def _loading_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError, MemoryError) as error:
        if _is_out_of_memory(error):
            raise OutOfMemoryError(f"{name!r} does not fit into memory; try 4 bits.") from error
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        if isinstance(error, OSError):
            raise ModelNotFoundError(
                f"Cannot find the model {name!r}: give a folder with config.json and safetensors, "
                "a hub id that this machine can reach, or builtin:target / builtin:draft. "
                f"({first})"
            ) from error
        raise ModelError(f"Cannot load the model {name!r}: {first}") from error


@contextmanager
def _progress_bars(show: bool) -> Iterator[None]:
    """transformers' loading bars are a process-wide switch: set it, load, put it back."""
    with _PROGRESS:
        before = transformers_logging.is_progress_bar_enabled()
        if not show:
            transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            if before and not show:
                transformers_logging.enable_progress_bar()
