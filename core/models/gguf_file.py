"""GGUF files: found, and what they say of themselves, checked before anything is loaded."""

from __future__ import annotations

import logging
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from transformers.utils.hub import cached_file

from ..errors import MissingExtraError, ModelError, ModelNotFoundError
from .names import GGUF

logger = logging.getLogger(__name__)

_CONTROL = 3  # token type: never to be spelled by text
# What ends a turn, whether or not the file names it as its end token (as llama.cpp takes them).
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>")


@dataclass(frozen=True, slots=True)
class GgufFile:
    """What a GGUF file says of itself."""

    path: Path
    architecture: str
    tokens: int  # size of its vocabulary
    control: Mapping[int, str]  # its control tokens
    ends: tuple[int, ...]  # tokens that end a generation
    pre_tokenizer: str | None  # llama.cpp's name of how text is split
    rope_factors: tuple[float, ...]  # (head_dim / 2,) divisors of the rotations, or empty


def find_gguf(
    name: str,
    gguf_file: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Path | None:
    """The GGUF file that a name stands for; None for a model in another form.

    Args:
        name: A .gguf file, a folder that holds one and no config.json, a hub repository, or a
            file in one ("owner/repository/file.gguf").
        gguf_file: Its name in the folder or the repository.
        revision: Of the hub repository.
        local_files_only: Look into the hub's cache only.

    Raises:
        ModelNotFoundError: There is no such file, or the folder holds several.
        OSError: The hub does not have it or cannot be reached.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        return _in_folder(path, gguf_file)
    if gguf_file is None:
        *repository, file = name.split("/")
        if len(repository) != 2 or not file.endswith(GGUF):
            return None
        name, gguf_file = "/".join(repository), file
    found = cached_file(name, gguf_file, revision=revision, local_files_only=local_files_only)
    return None if found is None else Path(found)


def _in_folder(folder: Path, gguf_file: str | None) -> Path | None:
    names = sorted(path.name for path in folder.glob(f"*{GGUF}"))
    if gguf_file is not None:
        if (folder / gguf_file).is_file():
            return folder / gguf_file
        raise ModelNotFoundError(
            f"There is no {gguf_file!r} in {str(folder)!r}; there are: {names}."
        )
    if not names or (folder / "config.json").is_file():
        return None
    if len(names) > 1:
        raise ModelNotFoundError(
            f"The folder {str(folder)!r} holds {len(names)} GGUF files: {names}. Name one, as in "
            f"{str(folder / names[0])!r} or gguf_file={names[0]!r}."
        )
    return folder / names[0]


def require_gguf(user: str) -> None:
    """Check that the `gguf` package is installed.

    Raises:
        MissingExtraError: It is not; the message names the pip command.
    """
    if find_spec("gguf") is None:
        raise MissingExtraError(
            f'{user} needs the gguf package, which is not installed: pip install "draftsieve[gguf]"'
        )


def read_gguf(path: Path) -> GgufFile:
    """Read what a GGUF file says of itself, and check that it can be loaded.

    Raises:
        MissingExtraError: The `gguf` package is not installed.
        ModelError: The file is damaged, one part of several, or of a kind that is not read.
    """
    require_gguf(f"The file {str(path)!r}")
    from gguf import GGMLQuantizationType, GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items() if _wanted(key)}
        architecture = str(fields["general.architecture"])
    except (ValueError, LookupError, TypeError, OverflowError, struct.error) as error:
        if GGMLQuantizationType.__name__ in str(error):
            number = "".join(filter(str.isdigit, str(error).split(" is ")[0].split("(")[-1]))
            raise ModelError(_unread_type(path, number)) from error
        raise ModelError(
            f"{str(path)!r} is damaged or no GGUF file: download it again. ({error!r})"
        ) from error
    parts = fields.get("split.count", 1)
    if parts > 1:
        raise ModelError(
            f"{str(path)!r} is one of {parts} parts of a model: join them with llama.cpp's "
            "`llama-gguf-split --merge`, then load the whole file."
        )
    _check_architecture(path, architecture)
    for kind in {tensor.tensor_type for tensor in reader.tensors}:
        if not _unpacks(kind):
            raise ModelError(_unread_type(path, kind.name))
    if scaled := [t.name for t in reader.tensors if t.name.startswith("rope_factors_")]:
        logger.warning("%s: position scaling (%s) is not read: keep prompts short.", path, scaled)
    tokens = fields.get("tokenizer.ggml.tokens", [])
    kinds = fields.get("tokenizer.ggml.token_type", [])
    control = {i: tokens[i] for i, kind in enumerate(kinds) if kind == _CONTROL}
    named = (fields.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom"))
    ends = dict.fromkeys(i for i in named if i is not None)
    # Where "<|return|>" ends an answer, "<|end|>" only ends one of its parts.
    inner = {"<|end|>"} if "<|return|>" in control.values() else set()
    ends |= {i: None for i, text in control.items() if text in _TURN_ENDS and text not in inner}
    factors = [tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"]
    return GgufFile(
        path=path,
        architecture=architecture,
        tokens=len(tokens),
        control=control,
        ends=tuple(ends),
        pre_tokenizer=fields.get("tokenizer.ggml.pre"),
        rope_factors=tuple(float(factor) for data in factors for factor in data),
    )


def _wanted(key: str) -> bool:
    return key.startswith(("general.", "split.", "tokenizer.ggml.")) and not key.endswith(
        ("merges", "scores")
    )


def _check_architecture(path: Path, architecture: str) -> None:
    """transformers' names differ from the file's in their hyphens and underscores."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    known = set(GGUF_SUPPORTED_ARCHITECTURES) - {"general", "tokenizer"}
    if find_spec("transformers.integrations.gguf") is not None:
        from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS

        known |= set(GGUF_ARCHS)
    plain = {name.replace("-", "").replace("_", "") for name in known}
    if architecture.replace("-", "").replace("_", "") not in plain:
        raise ModelError(
            f"{str(path)!r} holds a model of architecture {architecture!r}, which transformers "
            f"{transformers.__version__} does not read from GGUF files; it reads: {sorted(known)}. "
            "Load the model's safetensors instead."
        )


def _unpacks(kind: Any) -> bool:
    """Whether the `gguf` package can dequantise this tensor type."""
    from gguf import GGML_QUANT_SIZES, dequantize

    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _unread_type(path: Path, found: str) -> str:
    from gguf import GGMLQuantizationType

    known = [kind.name for kind in GGMLQuantizationType if _unpacks(kind)]
    return (
        f"{str(path)!r} holds tensors of type {found}, which the installed gguf package does not "
        f"unpack; it unpacks: {known}. Take a file of one of these types."
    )
