"""The model and the tokenizer of a GGUF file, every weight dequantised.

transformers reads them with the `gguf` package. What it leaves out is put right here from the
file's own words: the tokens that end a turn, control tokens spelled outside the byte alphabet, how
some vocabularies split digits, and Llama 3.1's position scaling.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..errors import ModelError
from .gguf_file import GgufFile, read_gguf

# Vocabularies whose digits are tokens of their own (llama.cpp's names of pre-tokenizers).
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")


def load_gguf(path: Path, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model and the tokenizer of a GGUF file.

    Args:
        path: The file.
        options: As for `from_pretrained`; dtype "auto" is bfloat16. With a `quantization_config`
            the unpacked weights are quantised anew, in memory.

    Raises:
        MissingExtraError: The `gguf` package is not installed.
        ModelError: The file is damaged, one part of several, or of a kind that is not read.
    """
    file = read_gguf(path)
    if options["dtype"] == "auto":
        options["dtype"] = torch.bfloat16
    quantization = options.pop("quantization_config", None)
    plain = getattr(transformers, "GgufConfig", None)  # newer ones may leave weights packed
    unpack = {} if plain is None else {"quantization_config": plain(dequantize=True)}
    read = {"gguf_file": path.name, **unpack, **options}
    if quantization is not None:
        read["device_map"] = {"": "cpu"}
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    if file.rope_factors:
        _scale_positions(config, file)
    model = AutoModelForCausalLM.from_pretrained(path.parent, config=config, **read)
    generation = model.generation_config
    if quantization is not None:
        again = {**options, "state_dict": model.state_dict(), "quantization_config": quantization}
        model = type(model).from_pretrained(None, config=model.config, **again)
    model.config.name_or_path = str(path)
    if generation is not None and file.ends:
        generation.eos_token_id = list(file.ends)
        model.generation_config = generation
    return model, gguf_tokenizer(file)


def _scale_positions(config: PreTrainedConfig, file: GgufFile) -> None:
    """Llama 3.1's position scaling, of which a file holds what it divides each frequency by."""
    theta = config.rope_parameters["rope_theta"]
    shares = torch.arange(len(file.rope_factors)) / len(file.rope_factors)
    config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": max(file.rope_factors),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    found = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
    wanted = theta**-shares / torch.tensor(file.rope_factors)
    if not torch.allclose(found, wanted, rtol=1e-3):
        raise ModelError(
            f"{str(file.path)!r} scales positions in a way that is not known (not Llama 3.1's): "
            "load the model's safetensors instead."
        )


def gguf_tokenizer(file: GgufFile) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file, with its chat template."""
    tokenizer = PreTrainedTokenizerFast(
        gguf_file=file.path.name, name_or_path=str(file.path.parent)
    )
    if file.pre_tokenizer in _SINGLE_DIGITS:
        steps = pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    return _with_control_tokens(tokenizer, file)


def _with_control_tokens(
    tokenizer: PreTrainedTokenizerFast, file: GgufFile
) -> PreTrainedTokenizerFast:
    """Control tokens as the file numbers them: none spelled byte by byte, none made up."""
    spec: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    known = {token["id"] for token in spec["added_tokens"]}
    missing = {i: text for i, text in file.control.items() if i not in known}
    if not missing and max(known, default=0) < file.tokens:
        return tokenizer
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": text, "special": True, **flags} for i, text in missing.items()]
    vocabulary: dict[str, int] = spec["model"]["vocab"]
    kept = {text: i for text, i in vocabulary.items() if i not in missing}
    spec["model"]["vocab"] = kept | {text: i for i, text in missing.items()}
    genuine = [token for token in spec["added_tokens"] if token["id"] < file.tokens]
    spec["added_tokens"] = sorted([*genuine, *added], key=lambda token: token["id"])
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        chat_template=tokenizer.chat_template,
        name_or_path=tokenizer.name_or_path,
        **tokenizer.special_tokens_map,
    )
