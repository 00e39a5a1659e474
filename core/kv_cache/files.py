"""A session's folder: keys and values as safetensors, the rest as JSON; no code."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import ModelError, PromptError
from ..types import Passage
from .prefix import Memory
from .storage import Storage, StoredLayer, StoredStates

TENSORS, DESCRIPTION = "memory.safetensors", "session.json"


@dataclass(frozen=True, slots=True)
class SavedSession:
    """What the two files hold. Roles are "target" and, where a draft has read too, "draft"."""

    model: str  # the target's name, for messages
    weights: Mapping[str, str] = field(hash=False)  # fingerprint of each role's model
    system: str | None
    storage: Storage
    passages: tuple[Passage, ...]
    memories: Mapping[str, Memory | None] = field(hash=False)


def write_files(saved: SavedSession, folder: Path) -> None:
    """Write both files under other names first, so that a mapped or half-written one is no risk.

    Raises:
        PromptError: Metadata is no JSON; nothing has been written then.
    """
    text = json.dumps(  # ASCII, so that even lone surrogates come back as they were
        {
            "model": saved.model,
            "weights": dict(saved.weights),
            "system": saved.system,
            "storage": saved.storage,
            "passages": [_described(*each) for each in enumerate(saved.passages, start=1)],
        }
    )
    tensors: dict[str, torch.Tensor] = {}
    for role, memory in saved.memories.items():
        if memory is not None:
            tensors.update(_named(role, memory))
    folder.mkdir(parents=True, exist_ok=True)
    new = {name: folder / f"{name}.new" for name in (TENSORS, DESCRIPTION)}
    try:
        save_file(tensors, new[TENSORS])
        new[DESCRIPTION].write_text(text, encoding="utf-8")
        for name, file in new.items():
            os.replace(file, folder / name)
    finally:
        for file in new.values():
            file.unlink(missing_ok=True)


def _described(number: int, passage: Passage) -> dict[str, Any]:
    for key, value in passage.metadata.items():
        try:
            json.dumps({key: value})
        except (TypeError, ValueError) as error:
            raise PromptError(
                f"Metadata {key!r} of passage {number} (id {passage.id!r}) cannot be saved: "
                f"{error}. Give it as text or numbers, or as lists or dictionaries of these."
            ) from error
    return {"text": passage.text, "id": passage.id, "metadata": dict(passage.metadata)}


def read_files(folder: Path, mmap: bool) -> SavedSession:
    """Read what `write_files` wrote.

    Args:
        folder: Where it is.
        mmap: Leave the tensors in the file and let the system page them in; else read them now.

    Raises:
        ModelError: A file is missing or damaged.
    """
    if not (folder / DESCRIPTION).is_file() or not (folder / TENSORS).is_file():
        raise ModelError(f"{str(folder)!r} holds no session: it lacks {DESCRIPTION}, {TENSORS}.")
    try:
        described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS)
        if not mmap:
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        return SavedSession(
            model=described["model"],
            weights=described["weights"],
            system=described["system"],
            storage=cast(Storage, described["storage"]),
            passages=tuple(Passage(**passage) for passage in described["passages"]),
            memories={
                role: _memory(tensors, role)
                for role in ("target", "draft")
                if role == "target" or f"{role}.ids" in tensors
            },
        )
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"The session in {str(folder)!r} is damaged or of another version "
            f"({type(error).__name__}: {error}): read the passages again."
        ) from error


def _named(role: str, memory: Memory) -> dict[str, torch.Tensor]:
    """Tensors by name, such as "target.3.keys"; those of int8 have a "target.3.keys.scale"."""
    found = {f"{role}.ids": memory.ids.contiguous()}
    for index, layer in enumerate(memory.layers):
        for kind, states in (("keys", layer.keys), ("values", layer.values)):
            found[f"{role}.{index}.{kind}"] = states.data.contiguous()
            if states.scale is not None:
                found[f"{role}.{index}.{kind}.scale"] = states.scale.contiguous()
    return found


def _memory(tensors: Mapping[str, torch.Tensor], role: str) -> Memory:
    def stored(name: str) -> StoredStates:
        return StoredStates(tensors[name], tensors.get(f"{name}.scale"))

    count = sum(name.startswith(f"{role}.") and name.endswith(".keys") for name in tensors)
    layers: Any = (
        StoredLayer(stored(f"{role}.{index}.keys"), stored(f"{role}.{index}.values"))
        for index in range(count)
    )
    return Memory(tensors[f"{role}.ids"], tuple(layers))
