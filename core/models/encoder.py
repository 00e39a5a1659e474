"""Sentence embeddings from a folder in sentence-transformers' form, through transformers alone.

Read are `modules.json` (Transformer, Pooling, Normalize), the pooling's `config.json`,
`sentence_bert_config.json` (length, lower case) and the prompts of
`config_sentence_transformers.json`. Another folder with an encoder is pooled by the mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModel, AutoTokenizer
from transformers.tokenization_utils_base import LARGE_INTEGER

from ..errors import ModelError, ModelNotFoundError
from ..runtime.limits import check_deadline
from .bars import progress_bars
from .devices import pick_device
from .hub import hub_obstacle
from .loading import loading_errors
from .names import resolve

BATCH = 64  # texts that are read together, of similar length
_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]
_DOCUMENT = ("document", "passage", "corpus")  # names of the prompt for what is searched
_MODE = "pooling_mode_"
_POOLINGS = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens", "lasttoken": ""}


@dataclass(frozen=True, slots=True)
class _Form:
    """What the files beside the weights say."""

    path: str = ""  # of the transformer, inside the folder
    pooling: tuple[str, ...] = ("mean",)  # of `_POOLINGS`; several are put side by side
    document: str = ""  # text in front of what is searched
    query: str = ""
    length: int | None = None  # most tokens that are read
    lower: bool = False


class Encoder:
    """Texts to vectors of length one; documents and questions may differ in their prompts.

    Args:
        model: An encoder, or a decoder made for embeddings.
        tokenizer: Its tokenizer. Control tokens that a text spells are read as plain text.
        form: How states become a vector.
        name: Where it was loaded from.
    """

    def __init__(self, model: Any, tokenizer: Any, form: _Form, name: str) -> None:
        self.model_name, self._form = name, form
        self._model, self._tokenizer = model.eval(), tokenizer
        limits = (
            form.length,
            getattr(model.config, "max_position_embeddings", None),
            tokenizer.model_max_length,
        )
        self._length = min((limit for limit in limits if limit), default=LARGE_INTEGER)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """`embed_documents`."""
        return self.embed_documents(texts)

    def embed_documents(self, texts: Sequence[str]) -> torch.Tensor:
        """(texts, width) float32 on the CPU, for texts that are searched."""
        return self._embed([self._form.document + text for text in texts])

    def embed_query(self, text: str) -> torch.Tensor:
        """(width,) float32 on the CPU, for a question."""
        return self._embed([self._form.query + text])[0]

    def _embed(self, texts: Sequence[str]) -> torch.Tensor:
        order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
        found: list[torch.Tensor] = [torch.empty(0)] * len(texts)
        for start in range(0, len(order), BATCH):
            check_deadline()
            chosen = order[start : start + BATCH]
            rows = self._pooled([self._cleaned(texts[index]) for index in chosen])
            for index, row in zip(chosen, rows, strict=True):
                found[index] = row
        return torch.stack(found) if found else torch.empty(0, 0)

    def _cleaned(self, text: str) -> str:
        """As sentence-transformers has it; lone surrogates, which no tokenizer takes, replaced."""
        text = text.encode("utf-8", "replace").decode("utf-8").strip()
        return text.lower() if self._form.lower else text

    def _pooled(self, texts: list[str]) -> torch.Tensor:
        batch = self._tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=self._length,
            split_special_tokens=True,
            return_tensors="pt",
        ).to(self._model.device)
        with torch.inference_mode():
            states = self._model(**batch).last_hidden_state.float()  # (texts, tokens, hidden)
        mask = batch["attention_mask"]  # (texts, tokens)
        parts = [_pool(states, mask, how) for how in self._form.pooling]
        rows: torch.Tensor = torch.nn.functional.normalize(torch.cat(parts, dim=-1), dim=-1)
        return rows.cpu().clone()  # a plain tensor, also outside of inference mode


def load_encoder(name: str | Path, *, revision: str | None = None, device: str = "auto") -> Encoder:
    """Load a model for sentence embeddings; only safetensors are read, and no code.

    Args:
        name: A folder or a hub id, in sentence-transformers' form or of a plain encoder.
        revision: Branch, tag or commit of a hub repository; None for its default branch.
        device: "auto" (CUDA where present, else CPU), "cpu", "cuda", ...

    Raises:
        ModelNotFoundError: There is no such model, or its files are not complete.
        ModelError: It is damaged, or made of parts that are not known here.
    """
    source, place = resolve(name), pick_device(device)
    if Path(source).is_file():
        raise ModelError(f"{str(name)!r} is a file: give the folder of an embedding model.")
    obstacle = None if Path(source).exists() else hub_obstacle()
    with loading_errors(str(name), source, obstacle), progress_bars(False):
        folder = Path(source)
        if not folder.is_dir():
            offline = obstacle is not None
            folder = Path(
                snapshot_download(
                    source, revision=revision, allow_patterns=_FILES, local_files_only=offline
                )
            )
        form = _read_form(folder)
        inner = folder / form.path
        if not (inner / "config.json").is_file():
            raise ModelNotFoundError(
                f"{str(name)!r} is no complete model: there is no {str(inner / 'config.json')!r}."
            )
        tokenizer: Any = AutoTokenizer.from_pretrained(inner)
        model, report = AutoModel.from_pretrained(
            inner,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
        lost = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
        if lost:
            raise ModelError(
                f"The weights of {str(name)!r} lack {len(lost)} tensors, such as {lost[0]!r}: "
                "fetch the model again."
            )
        return Encoder(model.to(place), tokenizer, form, str(name))


def _pool(states: torch.Tensor, mask: torch.Tensor, how: str) -> torch.Tensor:
    """(texts, hidden) of (texts, tokens, hidden), padding left out."""
    rows = torch.arange(len(states), device=states.device)
    if how == "cls":
        return states[rows, mask.argmax(1)]
    if how == "lasttoken":
        return states[rows, mask.cumsum(1).argmax(1)]
    inside = mask.unsqueeze(-1).bool()
    if how == "max":
        return states.masked_fill(~inside, -torch.inf).amax(1)
    return states.masked_fill(~inside, 0.0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def _read_form(folder: Path) -> _Form:
    modules = _read_json(folder / "modules.json", [])
    if not modules:
        return _Form()
    try:
        kinds = [str(module["type"]).rsplit(".", 1)[-1] for module in modules]
        paths = [str(module["path"]) for module in modules]
    except (TypeError, KeyError) as error:
        raise ModelError(
            f"{str(folder / 'modules.json')!r} is no list of modules with type and path: fetch the "
            "model again."
        ) from error
    if kinds[:2] != ["Transformer", "Pooling"] or {*kinds[2:]} - {"Normalize"}:
        raise ModelError(
            f"{str(folder)!r} is made of the modules {', '.join(kinds)}; read are Transformer, "
            "Pooling and Normalize: give a function from texts to vectors in its place, such as "
            "the `encode` of a SentenceTransformer."
        )
    about = _read_json(folder / paths[0] / "sentence_bert_config.json", {})
    said = _read_json(folder / "config_sentence_transformers.json", {})
    prompts: Mapping[str, str] = said.get("prompts") or {}
    usual = prompts.get(said.get("default_prompt_name") or "", "")
    return _Form(
        path=paths[0],
        pooling=_read_pooling(folder / paths[1] / "config.json", any(prompts.values())),
        document=next((prompts[name] for name in _DOCUMENT if name in prompts), usual),
        query=prompts.get("query", usual),
        length=about.get("max_seq_length"),
        lower=bool(about.get("do_lower_case")),
    )


def _read_pooling(path: Path, prompted: bool) -> tuple[str, ...]:
    """Names of `_POOLINGS`, in the order in which sentence-transformers joins them."""
    said = _read_json(path, None)
    if said is None:
        raise ModelError(f"There is no {str(path)!r}, which modules.json names: fetch it again.")
    named = said.get("pooling_mode")
    asked = {named} if isinstance(named, str) else set(named or ())
    asked |= {key.removeprefix(_MODE) for key, on in said.items() if on and key.startswith(_MODE)}
    known = {alias: how for how, token in _POOLINGS.items() for alias in (how, token or how)}
    if not asked or asked - known.keys() or (prompted and said.get("include_prompt") is False):
        raise ModelError(
            f"{str(path)!r} asks for the pooling {sorted(asked)}; known are "
            f"{', '.join(_POOLINGS)}, over all tokens with those of the prompt."
        )
    return tuple(how for how in _POOLINGS if how in {known[name] for name in asked})


def _read_json(path: Path, default: Any) -> Any:
    """What a file says; `default` where there is none.

    Raises:
        ModelError: It is no JSON.
    """
    if not path.is_file():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{str(path)!r} is damaged: {error}. Fetch the model again.") from error
