"""`PromptEngine`: a draft that sieves and a target that answers chat prompts.

prompt -> (draft: shorter prompt) -> target tokens -> decode -> answer with provenance.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .compressor import Compressor
from .config import Generation, Method, OnError
from .errors import NO_DRAFT, ModelError, PromptError
from .generation.answer import answer_of
from .generation.pipeline import Pipeline
from .generation.scheduler import Scheduler
from .generation.speculative.drafters.store import TrigramStore
from .generation.trace import trace
from .models.footprint import explain_out_of_memory, footprint
from .models.loading import AnyQuantization, accept, context_window, load_model
from .prompt.encoder import PromptEncoder
from .prompt.messages import Prompt
from .runtime.worker import Worker
from .specpc.stored.passage_store import PassageStore
from .types import Answer, Chunk, Trace


class PromptEngine:
    """A target model with an optional draft, asked with chat prompts; see `Engine`.

    Asynchronous twins run in the engine's one worker thread: prompts are read in turn, what is
    being answered goes on as one batch meanwhile. Cancelling the task ends its request at the next
    layer or token of either model.

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
        store: Passages that the draft has read before, see `Compressor`.
        store_new: Whether passages that are not in the store are put there.
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
        store: PassageStore | str | Path | None = None,
        store_new: bool = False,
    ) -> None:
        self.progress = progress
        self.target = accept(target_model)
        self.draft = None if draft_model is None else accept(draft_model)
        self.model_name = name or target_model.config.name_or_path or "target"
        self.context_window = context_window(target_model)
        self.tokenizer, self.template_options = tokenizer, template_options
        self.compressor: Compressor | None = None
        self._scheduler: Scheduler | None = None
        reader = draft_tokenizer or tokenizer
        if draft_model is not None and reader is not None:
            self.compressor = Compressor(
                draft_model,
                reader,
                template_options=template_options,
                progress=progress,
                store=store,
                store_new=store_new,
            )
        elif store is not None:
            raise ModelError(f"A store needs a draft that reads with it. {NO_DRAFT}")
        # one thread for the asynchronous requests of both models
        self._worker = Worker() if self.compressor is None else self.compressor.worker
        if tokenizer is not None:
            encoder = PromptEncoder(tokenizer, template_options)
            draft = None if self.compressor is None else self.compressor.draft
            pipeline = Pipeline(target_model, tokenizer, encoder, draft, draft_store)
            self._scheduler = Scheduler(pipeline, self._worker)

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
        store: PassageStore | str | Path | None = None,
        store_new: bool = False,
    ) -> Self:
        """Load a pair: "builtin:target" with "builtin:draft", folders, GGUF files, or hub ids.

        Args:
            target: The model that answers.
            draft: The model that reads first; None for an engine without compression. The target's
                own name, loaded alike, is the target itself: no second copy.
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
            draft_store: See the class.
            store: See the class.
            store_new: See the class.

        Raises:
            ModelNotFoundError: A model does not exist or cannot be reached.
        """
        one: dict[str, Any] = {
            "dtype": dtype,
            "trust_remote_code": trust_remote_code,
            "progress": progress,
            "gguf_file": gguf_file,
            "revision": revision,
            "quantization": quantization,
            "device": device,
            "attn_implementation": attn_implementation,
        }
        other: dict[str, Any] = {
            **one,
            "gguf_file": draft_gguf_file,
            "revision": draft_revision,
            "quantization": draft_quantization,
            "device": draft_device or device,
            "attn_implementation": draft_attn_implementation,
        }
        big = load_model(target, **one)
        small = None
        if draft is not None:
            same = (draft, other) == (target, one)
            small = big if same else load_model(draft, **other)
        return cls(
            big.model,
            big.tokenizer,
            draft_model=None if small is None else small.model,
            draft_tokenizer=None if small is None else small.tokenizer,
            template_options=template_options,
            name=big.name,
            progress=progress,
            draft_store=draft_store,
            store=store,
            store_new=store_new,
        )

    def generate(
        self,
        prompt: Prompt,
        method: Method | None = None,
        *,
        generation: Generation | None = None,
        on_error: OnError = "raise",
    ) -> Answer:
        """Answer a chat prompt; only its passages are compressed. Options as for `answer`."""
        return self.generate_many([prompt], method, generation=generation, on_error=on_error)[0]

    async def agenerate(
        self,
        prompt: Prompt,
        method: Method | None = None,
        *,
        generation: Generation | None = None,
        on_error: OnError = "raise",
    ) -> Answer:
        """`generate` without blocking the event loop."""
        options = generation or Generation()
        return await self._need_scheduler().answer(prompt, method, options, on_error)

    def generate_many(
        self,
        prompts: Sequence[Prompt],
        method: Method | None = None,
        *,
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
        options = _options(prompts, generation)
        pipeline = self._need_pipeline()
        if not prompts:
            return []
        requests = pipeline.prepare(prompts, method, options, on_error)
        texts = [""] * len(requests)
        for pieces in pipeline.decode(requests):
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        return [answer_of(request, text) for request, text in zip(requests, texts, strict=True)]

    async def agenerate_many(
        self,
        prompts: Sequence[Prompt],
        method: Method | None = None,
        *,
        generation: Generation | Sequence[Generation] | None = None,
        on_error: OnError = "raise",
    ) -> list[Answer]:
        """`generate_many` without blocking the event loop; prompts are read one by one."""
        options = _options(prompts, generation)
        return await self._need_scheduler().answer_many(prompts, method, options, on_error)

    def stream_prompt(
        self,
        prompt: Prompt,
        method: Method | None = None,
        *,
        generation: Generation | None = None,
        on_error: OnError = "raise",
    ) -> Iterator[Chunk]:
        """`generate` piece by piece; the last chunk carries the `Answer`. Close it to cancel."""
        options = generation or Generation()
        return self._need_pipeline().stream(prompt, method, options, on_error)

    def astream_prompt(
        self,
        prompt: Prompt,
        method: Method | None = None,
        *,
        generation: Generation | None = None,
        on_error: OnError = "raise",
    ) -> AsyncIterator[Chunk]:
        """`stream_prompt` without blocking the event loop."""
        options = generation or Generation()
        return self._need_scheduler().stream(prompt, method, options, on_error)

    def render(self, prompt: Prompt) -> str:
        """The text of a prompt exactly as the target reads it, the template's tokens included.

        Args:
            prompt: Any prompt, such as `Prompt.from_question(question, passages)`.
        """
        return self._need_pipeline().pair.encoder.render(prompt)

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

    def _need_compressor(self) -> Compressor:
        self._need_pipeline()
        if self.compressor is None:
            raise ModelError(NO_DRAFT)
        return self.compressor

    def _need_pipeline(self) -> Pipeline:
        return self._need_scheduler().pipeline

    def _need_scheduler(self) -> Scheduler:
        if self._scheduler is None:
            raise ModelError("This engine has no tokenizer, so it can only trace token ids.")
        return self._scheduler


def _options(
    prompts: Sequence[Prompt], generation: Generation | Sequence[Generation] | None
) -> Sequence[Generation]:
    """Decoding options of each prompt."""
    if generation is None or isinstance(generation, Generation):
        return [generation or Generation()] * len(prompts)
    require_equal("prompts", prompts, "generation options", generation)
    return generation


def require_equal(what: str, some: Sequence[Any], others: str, more: Sequence[Any]) -> None:
    if len(some) != len(more):
        raise PromptError(
            f"There are {len(some)} {what} but {len(more)} {others}: give one for each."
        )
