"""`Engine.session`: read documents once, ask many questions.

The full keys and values of the documents stay outside (on the CPU, or in a file); for each question
the draft's lookahead selects, and only the selected entries make up the small working cache. A
question loses nothing that an earlier one evicted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .config import Generation, Method, SpecKV
from .errors import ModelError, PromptError
from .memory import Memory, read_memory
from .pipeline import Memories, Pipeline
from .prompt import Prompt
from .types import Answer, Chunk, Passage, PromptTokens, Segment

_TENSORS, _DESCRIPTION = "memory.safetensors", "session.json"


@dataclass(frozen=True, slots=True)
class Session:
    """Documents that have been read; made by `Engine.session` or `Engine.load_session`.

    Safe to use from several threads: asking changes nothing.
    """

    pipeline: Pipeline
    passages: tuple[Passage, ...]
    system: str | None
    memories: Memories
    model_name: str

    def answer(
        self,
        question: str,
        *,
        method: SpecKV | None = None,
        generation: Generation | None = None,
    ) -> Answer:
        """Answer a question about the documents without reading them again.

        Args:
            question: The user's question.
            method: Selects cache entries per question; None uses all of them.
            generation: Decoding options; greedy by default.

        Returns:
            What `Engine.answer` returns for the same documents and method.

        Raises:
            ModelError: The method compresses text, which would have to be read again.
        """
        *_, last = self.stream(question, method=method, generation=generation)
        assert last.answer is not None  # the last chunk carries it
        return last.answer

    def stream(
        self,
        question: str,
        *,
        method: SpecKV | None = None,
        generation: Generation | None = None,
    ) -> Iterator[Chunk]:
        """`answer` piece by piece; the last chunk carries the `Answer`. Close it to cancel."""
        _require_cache_method(method)
        options = generation or Generation()
        prompt = Prompt.from_question(question, self.passages, system=self.system)
        return self.pipeline.stream(prompt, method, options, "raise", self.memories)

    @property
    def bytes(self) -> int:
        """Size of the stored keys and values, the draft's included."""
        draft = self.memories.draft
        return self.memories.target.bytes + (0 if draft is None else draft.bytes)

    def save(self, path: str | Path) -> None:
        """Write the session into a folder: safetensors and JSON, no code."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, torch.Tensor] = {}
        for role, memory in (("target", self.memories.target), ("draft", self.memories.draft)):
            if memory is None:
                continue
            tensors[f"{role}.ids"] = memory.ids
            for layer, (keys, values) in enumerate(zip(memory.keys, memory.values, strict=True)):
                tensors[f"{role}.{layer}.keys"] = keys.contiguous()
                tensors[f"{role}.{layer}.values"] = values.contiguous()
        save_file(tensors, folder / _TENSORS)
        described = {
            "model": self.model_name,
            "system": self.system,
            "passages": [
                {"text": p.text, "id": p.id, "metadata": dict(p.metadata)} for p in self.passages
            ],
        }
        text = json.dumps(described, ensure_ascii=False)
        (folder / _DESCRIPTION).write_text(text, encoding="utf-8")


def open_session(
    pipeline: Pipeline, passages: Sequence[str | Passage], system: str | None, model_name: str
) -> Session:
    """Read the documents with the target, and with the draft where there is one."""
    prompt = Prompt.from_question("?", passages, system=system)
    if not any(passage.text.strip() for passage in prompt.passages):
        raise PromptError("A session needs passages with text: there is nothing to read.")
    beginning = _beginning(pipeline.encoder.encode(prompt))
    if pipeline.context_window is not None and len(beginning) >= pipeline.context_window:
        raise PromptError(
            f"The passages take {len(beginning)} tokens, the target reads at most "
            f"{pipeline.context_window}: give fewer."
        )
    target = read_memory(pipeline.target, beginning)
    draft = None
    if pipeline.compressor is not None:
        beginning = _beginning(pipeline.compressor.encoder.encode(prompt))
        draft = read_memory(pipeline.compressor.model, beginning)
    return Session(pipeline, prompt.passages, system, Memories(target, draft), model_name)


def load_session(pipeline: Pipeline, path: str | Path, model_name: str) -> Session:
    """Read what `Session.save` wrote; tensors are mapped from the file.

    Raises:
        ModelError: There is no session, or it was made with another model.
    """
    folder = Path(path)
    if not (folder / _DESCRIPTION).is_file() or not (folder / _TENSORS).is_file():
        raise ModelError(f"{str(folder)!r} holds no session: it lacks {_DESCRIPTION}, {_TENSORS}.")
    described = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
    if described["model"] != model_name:
        raise ModelError(
            f"The session was read by {described['model']!r}, this engine's target is "
            f"{model_name!r}: load the same model, or read the passages again."
        )
    tensors = load_file(folder / _TENSORS)
    target = _memory(tensors, "target")
    assert target is not None  # saved by every session
    draft = None if pipeline.compressor is None else _memory(tensors, "draft")
    passages = tuple(Passage(**passage) for passage in described["passages"])
    return Session(pipeline, passages, described["system"], Memories(target, draft), model_name)


def _memory(tensors: dict[str, torch.Tensor], role: str) -> Memory | None:
    if f"{role}.ids" not in tensors:
        return None
    layers = sum(name.startswith(f"{role}.") and name.endswith(".keys") for name in tensors)
    return Memory(
        tensors[f"{role}.ids"],
        tuple(tensors[f"{role}.{layer}.keys"] for layer in range(layers)),
        tuple(tensors[f"{role}.{layer}.values"] for layer in range(layers)),
    )


def _beginning(tokens: PromptTokens) -> torch.Tensor:
    """Ids up to the last token of the last passage."""
    places = torch.nonzero(tokens.segment == int(Segment.PASSAGE))
    return tokens.ids[: int(places[-1]) + 1]


def _require_cache_method(method: Method | None) -> None:
    if method is not None and not isinstance(method, SpecKV):
        raise ModelError(
            f"A session holds keys and values of whole documents; {type(method).__name__} shortens "
            "their text, which would have to be read again. Use SpecKV, or Engine.answer."
        )
