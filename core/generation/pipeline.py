"""The stages of a request behind `Engine`: prepare, evict while reading, decode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..compressor import Compressor
from ..config import Generation, Method, OnError
from ..kv_cache.layers import cache_bytes, has_sliding_layers
from ..models.loading import explain_out_of_memory
from ..prompt.encoder import PromptEncoder
from ..prompt.messages import Prompt
from ..prompt.tool_calls import ToolReader
from ..runtime.clock import Clock
from ..runtime.deadline import until
from ..speckv.batch import start_evicted
from ..specpc.sparse_positions import start_at
from ..types import Chunk
from .decode import RowText, decode_text
from .preparing import Preparer, earliest
from .request import Memories, Request
from .speculative.drafters.store import TrigramStore
from .speculative.verify import Speculation


class Pipeline:
    """Runs requests through a target and, where a method asks for it, a draft.

    Args:
        target: The model that answers.
        tokenizer: Its tokenizer.
        encoder: Its prompt encoder.
        compressor: The draft, or None.
        draft_store: Tri-grams for drafting, shared with whoever else has them; None for own ones.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        encoder: PromptEncoder,
        compressor: Compressor | None,
        draft_store: TrigramStore | None = None,
    ) -> None:
        self._prepare = Preparer(target, tokenizer, encoder, compressor, draft_store)
        self.target, self.tokenizer, self.encoder = target, tokenizer, encoder
        self.compressor = compressor
        self.context_window = self._prepare.context_window
        self.drafters = self._prepare.drafters
        self._models = {"target": target, "draft": None if compressor is None else compressor.model}

    def stream(
        self,
        prompt: Prompt,
        method: Method | None,
        options: Generation,
        on_error: OnError,
        memories: Memories | None = None,
    ) -> Iterator[Chunk]:
        """One request piece by piece; the last chunk carries the answer."""
        request = self.prepare(prompt, method, options, on_error, memories)
        reader = ToolReader(request.calls_first) if request.reads_tools else None
        text = ""
        for (piece,) in self.decode([request]):
            text += piece
            said, calls = (piece, ()) if reader is None else reader.push(piece)
            if said or calls:
                yield Chunk(said, tool_calls=calls)
        yield Chunk("" if reader is None else reader.close(), request.answer(text))

    def prepare(
        self,
        prompt: Prompt,
        method: Method | None,
        options: Generation,
        on_error: OnError,
        memories: Memories | None = None,
    ) -> Request:
        """`prepare_many` for one prompt, whose beginning may be known already."""
        return self._prepare([prompt], method, [options], on_error, memories)[0]

    def prepare_many(
        self,
        prompts: Sequence[Prompt],
        method: Method | None,
        options: Sequence[Generation],
        on_error: OnError,
    ) -> list[Request]:
        """Compress and encode prompts, and let the draft guess where the method needs it."""
        return self._prepare(prompts, method, options, on_error)

    def decode(self, requests: Sequence[Request]) -> Iterator[list[str]]:
        """Read the prompts and generate as one batch; yields each request's new text.

        Evicted caches of models with sliding windows cannot be padded: those run one by one.
        """
        evicts = any(request.eviction is not None for request in requests)
        if len(requests) > 1 and evicts and has_sliding_layers(self.target):
            for place, request in enumerate(requests):
                for (piece,) in self.decode([request]):
                    yield [piece if i == place else "" for i in range(len(requests))]
            return
        prompts = [request.ids for request in requests]
        rows = [request.row for request in requests]
        deadline = earliest(request.deadline for request in requests)
        stage = "prefill"
        with explain_out_of_memory(_describe(requests), **self._models):
            with until(deadline):
                speculation = self._speculate(requests)
            steps = self._steps(requests, prompts, rows, speculation)
            while True:
                clock = Clock()
                with until(deadline), clock(stage):
                    pieces = next(steps, None)
                for request in requests:
                    request.clock.add(clock.seconds)
                if pieces is None:
                    return
                yield pieces
                stage = "decode"

    def _speculate(self, requests: Sequence[Request]) -> Speculation | None:
        """The drafter of a request that runs alone; rows of a batch are told why they have none."""
        planned = [request for request in requests if request.drafts is not None]
        if len(requests) > 1:
            for request in planned:
                assert request.drafts is not None
                request.drafts.tally.note = f"decoded in a batch of {len(requests)} prompts"
            return None
        for request in planned:
            assert request.drafts is not None
            if request.positions is not None:
                request.drafts.tally.note = 'tokens stand at their old positions (positions="keep")'
                return None
            with request.clock("draft"):
                return self.drafters.start(request.drafts)
        return None

    def _steps(
        self,
        requests: Sequence[Request],
        prompts: Sequence[torch.Tensor],
        rows: Sequence[RowText],
        speculation: Speculation | None,
    ) -> Iterator[list[str]]:
        """Evict while the prompts are read, if a method asks for it, and decode."""
        plans = [request.eviction for request in requests]
        chosen = next((plan for plan in plans if plan is not None), None)
        start = None
        if chosen is not None:
            nothing = torch.tensor([], dtype=torch.int64)
            start = start_evicted(
                self.target,
                prompts,
                [nothing if plan is None else plan.lookahead for plan in plans],
                chosen.method,
                [
                    p.numel() if q is None else q.capacity
                    for p, q in zip(prompts, plans, strict=True)
                ],
                [request.protected for request in requests],
                requests[0].memory,
            )
            for request in requests:
                request.sizes["cache"] = cache_bytes(start.cache) // len(requests)
        elif any(request.positions is not None for request in requests):
            start = start_at(self.target, prompts, [request.positions for request in requests])
        elif requests[0].memory is not None:
            start = requests[0].memory.start(self.target, prompts[0])
        options = [request.options for request in requests]
        yield from decode_text(self.target, prompts, options, rows, start, speculation)

    def need_compressor(self) -> Compressor:
        """The draft, or a `ModelError` where there is none."""
        return self._prepare.need_compressor()


def _describe(requests: Sequence[Request]) -> str:
    """What is done and how large it is, for an error message."""
    longest = max((request.ids.numel() for request in requests), default=0)
    count = "a prompt of" if len(requests) == 1 else f"{len(requests)} prompts of up to"
    kept = [request.eviction.capacity for request in requests if request.eviction is not None]
    cache = f"a cache capacity of {max(kept):,} entries" if kept else "a full cache, no SpecKV"
    return f"answering {count} {longest:,} tokens ({cache})"
