"""`Engine`: a draft that sieves and a target that answers.

prompt -> (draft: shorter prompt) -> target tokens -> decode -> answer with provenance.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .compressor import Compressor
from .config import Generation, Method, OnError, SpecPC
from .errors import NO_DRAFT, ModelError, PromptError
from .generation.pipeline import Pipeline, answer_of
from .generation.speculative.drafters.store import TrigramStore
from .generation.trace import trace
from .kv_cache.storage import Storage
from .models.footprint import footprint
from .models.loading import (
    AnyQuantization,
    accept,
    context_window,
    explain_out_of_memory,
    load_model,
)
from .prompt.encoder import PromptEncoder
from .prompt.messages import DEFAULT_SYSTEM, Prompt
from .runtime.worker import Worker
from .session import Session, last_answer, load_session, open_session
from .types import Answer, Chunk, CompressedContext, Passage, Trace


class Engine:
    """A target model with an optional draft. Safe to use from several threads at once.

    Args:
        target_model: Any causal model of transformers.
        tokenizer: Its tokenizer; may be None where only `trace` is used.
        draft_model: The model that reads first; None leaves what needs no draft.
        draft_tokenizer: None means the target's.
        template_options: Extra arguments of both chat templates, such as `enable_thinking`.
        name: What `model_name` says.
        progress: Show bars for long work (many prompts, prompts beyond the draft's window).
        draft_store: Tri-grams for `Generation(drafting="aded")`, as from `draftsieve drafts build`.
            It remembers text, and so does None: an own store, filled by this engine's requests.
    """

    def __init__(
        self,
        target_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        draft_model: PreTrainedModel | None = None,
        draft_tokenizer: PreTrainedTokenizerBase | None = None,
        template_options: Mapping[str, Any] | None = None,
        name: str | None = None,
        progress: bool = True,
        draft_store: TrigramStore | None = None,
    ) -> None:
        self.progress = progress
        self.target = accept(target_model)
        self.draft = None if draft_model is None else accept(draft_model)
        self.model_name = name or target_model.config.name_or_path or "target"
        self.context_window = context_window(target_model)
        self.tokenizer = tokenizer
        self.compressor: Compressor | None = None
        self._pipeline: Pipeline | None = None
        self._worker = Worker()  # runs the asynchronous requests
        reader = draft_tokenizer or tokenizer
        if draft_model is not None and reader is not None:
            self.compressor = Compressor(
                draft_model, reader, template_options=template_options, progress=progress
            )
        if tokenizer is not None:
            encoder = PromptEncoder(tokenizer, template_options)
            draft = None if self.compressor is None else self.compressor.draft
            self._pipeline = Pipeline(target_model, tokenizer, encoder, draft, draft_store)

    @classmethod
    def load(
        cls,
        target: str | Path,
        draft: str | Path | None = None,
        *,
        gguf_file: str | None = None,
        draft_gguf_file: str | None = None,
        revision: str | None = None,
        draft_revision: str | None = None,
        quantization: AnyQuantization | None = None,
        draft_quantization: AnyQuantization | None = None,
        device: str = "auto",
        draft_device: str | None = None,
        dtype: str | torch.dtype = "auto",
        attn_implementation: str | None = None,
        draft_attn_implementation: str | None = None,
        template_options: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
        progress: bool = True,
        draft_store: TrigramStore | None = None,
    ) -> Engine:
        """Load a pair: "builtin:target" with "builtin:draft", folders, GGUF files, or hub ids.

        Args:
            target: The model that answers.
            draft: The model that reads first; None for an engine without compression.
            gguf_file: Name of the target's GGUF file in its folder or hub repository.
            draft_gguf_file: The same for the draft.
            revision: Branch, tag or commit of the target's hub repository.
            draft_revision: Of the draft's.
            quantization: Of the target's weights: a `Quantization` or one of transformers' configs.
            draft_quantization: Of the draft's weights.
            device: Of the target, see `load_model`.
            draft_device: Of the draft; None means the target's.
            dtype: Of both, see `load_model`.
            attn_implementation: Of the target: "eager", "sdpa", ...; None for the model's default.
            draft_attn_implementation: Of the draft.
            template_options: Extra arguments of both chat templates.
            trust_remote_code: Run code that a hub repository carries; off unless you ask for it.
            progress: Show bars while loading and for long work.
            draft_store: See `Engine`.

        Raises:
            ModelNotFoundError: A model does not exist or cannot be reached.
        """
        options: dict[str, Any] = {
            "dtype": dtype,
            "trust_remote_code": trust_remote_code,
            "progress": progress,
        }
        big = load_model(
            target,
            gguf_file=gguf_file,
            revision=revision,
            quantization=quantization,
            device=device,
            attn_implementation=attn_implementation,
            **options,
        )
        small = None
        if draft is not None:
            small = load_model(
                draft,
                gguf_file=draft_gguf_file,
                revision=draft_revision,
                quantization=draft_quantization,
                device=draft_device or device,
                attn_implementation=draft_attn_implementation,
                **options,
            )
        return cls(
            big.model,
            big.tokenizer,
            draft_model=None if small is None else small.model,
            draft_tokenizer=None if small is None else small.tokenizer,
            template_options=template_options,
            name=big.name,
            progress=progress,
            draft_store=draft_store,
        )

    # -- question and passages ------------------------------------------------------------------

    def answer(
        self,
        question: str,
        passages: Sequence[str | Passage],
        *,
        method: Method | None = None,
        generation: Generation | None = None,
        system: str | None = DEFAULT_SYSTEM,
        on_error: OnError = "raise",
    ) -> Answer:
        """Answer a question from passages.

        Args:
            question: The user's question.
            passages: Retrieved texts.
            method: How to compress; None reads everything.
            generation: Decoding options; greedy by default.
            system: System text.
            on_error: What a failed compression does: "raise", or "original" to go on with the
                whole passages (logged, and told in `answer.context.stats.fallback`).

        Raises:
            PromptError: The question is empty, or the prompt exceeds the target's window.
            BudgetError: Question and system text exceed the capacity.
            ModelError: A method was given, but the engine has no draft.
            OutOfMemoryError: Names both models' footprints.
        """
        prompt = Prompt.from_question(question, passages, system=system)
        return self.generate(prompt, method=method, generation=generation, on_error=on_error)

    def answer_many(
        self,
        questions: Sequence[str],
        passages: Sequence[Sequence[str | Passage]],
        *,
        method: Method | None = None,
        generation: Generation | None = None,
        system: str | None = DEFAULT_SYSTEM,
        on_error: OnError = "raise",
    ) -> list[Answer]:
        """`answer` for several questions, decoded by the target as one batch."""
        prompts = [
            Prompt.from_question(question, found, system=system)
            for question, found in zip(questions, passages, strict=True)
        ]
        return self.generate_many(prompts, method=method, generation=generation, on_error=on_error)

    def stream(
        self,
        question: str,
        passages: Sequence[str | Passage],
        *,
        method: Method | None = None,
        generation: Generation | None = None,
        system: str | None = DEFAULT_SYSTEM,
        on_error: OnError = "raise",
    ) -> Iterator[Chunk]:
        """`answer` piece by piece; the last chunk carries the `Answer`. Close it to cancel."""
        prompt = Prompt.from_question(question, passages, system=system)
        return self.stream_prompt(prompt, method=method, generation=generation, on_error=on_error)

    async def aanswer(
        self, question: str, passages: Sequence[str | Passage], **options: Any
    ) -> Answer:
        """`answer` without blocking the event loop; takes the same options.

        Asynchronous requests of an engine take turns, token by token. Cancelling the task ends its
        request at the next layer or token, also while the draft reads or looks ahead.
        """
        return await last_answer(self.astream(question, passages, **options))

    def astream(
        self, question: str, passages: Sequence[str | Passage], **options: Any
    ) -> AsyncIterator[Chunk]:
        """`stream` without blocking the event loop; takes the same options."""
        return self._worker.steps(self.stream(question, passages, **options))

    # -- prompts --------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Prompt,
        *,
        method: Method | None = None,
        generation: Generation | None = None,
        on_error: OnError = "raise",
    ) -> Answer:
        """Answer a chat prompt; only its passages are compressed. Options as for `answer`."""
        return self.generate_many(
            [prompt], method=method, generation=generation, on_error=on_error
        )[0]

    def generate_many(
        self,
        prompts: Sequence[Prompt],
        *,
        method: Method | None = None,
        generation: Generation | Sequence[Generation] | None = None,
        on_error: OnError = "raise",
    ) -> list[Answer]:
        """Answer several prompts, decoded as one left-padded batch.

        In float32 each row gets what it gets alone, token for token.

        Args:
            prompts: The prompts.
            method: As for `answer`.
            generation: Decoding options of all prompts, or one for each.
            on_error: As for `answer`.
        """
        return list(self._steps(prompts, method, generation, on_error))[-1]

    def _steps(
        self,
        prompts: Sequence[Prompt],
        method: Method | None = None,
        generation: Generation | Sequence[Generation] | None = None,
        on_error: OnError = "raise",
    ) -> Iterator[list[Answer]]:
        """Nothing for each step of a batch, at last its answers."""
        each = generation or Generation()
        options = [each] * len(prompts) if isinstance(each, Generation) else each
        pipeline = self._need_pipeline()
        requests = pipeline.prepare(prompts, method, options, on_error)
        if not requests:
            yield []
            return
        texts = [""] * len(requests)
        for pieces in pipeline.decode(requests):
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
            yield []
        yield [answer_of(request, text) for request, text in zip(requests, texts, strict=True)]

    def stream_prompt(
        self,
        prompt: Prompt,
        *,
        method: Method | None = None,
        generation: Generation | None = None,
        on_error: OnError = "raise",
    ) -> Iterator[Chunk]:
        """`generate` piece by piece; the last chunk carries the `Answer`. Close it to cancel."""
        options = generation or Generation()
        return self._need_pipeline().stream(prompt, method, options, on_error)

    async def agenerate(self, prompt: Prompt, **options: Any) -> Answer:
        """`generate` without blocking the event loop, as `aanswer`; takes the same options."""
        return await last_answer(self.astream_prompt(prompt, **options))

    async def agenerate_many(self, prompts: Sequence[Prompt], **options: Any) -> list[Answer]:
        """`generate_many` without blocking the event loop, as `aanswer`; takes the same options."""
        return [step async for step in self._worker.steps(self._steps(prompts, **options))][-1]

    def astream_prompt(self, prompt: Prompt, **options: Any) -> AsyncIterator[Chunk]:
        """`stream_prompt` without blocking the event loop; takes the same options."""
        return self._worker.steps(self.stream_prompt(prompt, **options))

    def compress(
        self,
        question: str,
        passages: Sequence[str | Passage],
        method: SpecPC | None = None,
        *,
        system: str | None = DEFAULT_SYSTEM,
        on_error: OnError = "raise",
    ) -> CompressedContext:
        """What the target would be given: `Compressor.compress` with this engine's draft."""
        self._need_pipeline()
        if self.compressor is None:
            raise ModelError(NO_DRAFT)
        return self.compressor.compress(
            question, passages, method, system=system, on_error=on_error
        )

    def session(
        self,
        passages: Sequence[str | Passage],
        *,
        system: str | None = DEFAULT_SYSTEM,
        storage: Storage = "memory",
    ) -> Session:
        """Read documents once, ask many questions (see `Session`).

        Args:
            passages: The documents; their keys and values stay on the CPU, outside any cache.
            system: System text in front of them.
            storage: "memory" for the models' own numbers, or "int8" for a rounded quarter of their
                size in float32 (half in bfloat16); answers may then differ in rare words.

        Raises:
            PromptError: There is nothing to read, or more than the target's window holds.
            ModelError: A layer of a model is not plain full attention.
        """
        pipeline = self._need_pipeline()
        return open_session(pipeline, self._worker, passages, system, self.model_name, storage)

    async def asession(self, passages: Sequence[str | Passage], **options: Any) -> Session:
        """`session` without blocking the event loop; takes the same options."""
        return await self._worker.run(self.session, passages, **options)

    def load_session(self, path: str | Path, *, mmap: bool = True) -> Session:
        """Open what `Session.save` wrote; the same target must be loaded.

        Args:
            path: The session's folder.
            mmap: Leave keys and values in the file, from where the system pages them in as they
                are used; False reads them into memory.

        Raises:
            ModelError: There is no session, it is damaged, or it was made with other weights.
        """
        return load_session(self._need_pipeline(), self._worker, path, self.model_name, mmap)

    @property
    def footprint(self) -> dict[str, int]:
        """Bytes of the weights of each model, "target" and "draft", as they are loaded."""
        models = {"target": self.target, "draft": self.draft}
        return {role: footprint(model) for role, model in models.items() if model is not None}

    def trace(
        self, input_ids: torch.Tensor, method: Method | None = None, max_new_tokens: int = 16
    ) -> Trace:
        """Run a method on bare token ids and return every intermediate.

        The method behaves as in the paper: no template, no protected text but the window. The
        draft is always asked, also when the prompt fits the capacity. Greedy.

        Args:
            input_ids: (1, tokens) int64, ids of both models.
            method: None for the target alone.
            max_new_tokens: Most tokens generated; an end token stops and is included.
        """
        if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
            raise PromptError(
                f"trace takes ids of shape (1, tokens), got {tuple(input_ids.shape)}."
            )
        work = f"tracing {input_ids.shape[1]:,} tokens with {method!r}"
        with explain_out_of_memory(work, target=self.target, draft=self.draft):
            return trace(self.target, self.draft, input_ids, method, max_new_tokens)

    @property
    def draft_store(self) -> TrigramStore:
        """What drafting has learnt from this engine's requests; it can be saved."""
        return self._need_pipeline().drafters.store

    def count_tokens(self, text: str) -> int:
        """Tokens of a text under the target's tokenizer, without special tokens."""
        return self._need_pipeline().pair.encoder.count(text)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text under the target's tokenizer, without special tokens."""
        return self._need_pipeline().pair.encoder.encode_text(text)

    def _need_pipeline(self) -> Pipeline:
        if self._pipeline is None:
            raise ModelError("This engine has no tokenizer, so it can only trace token ids.")
        return self._pipeline
