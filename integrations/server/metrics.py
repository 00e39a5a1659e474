"""What a server counts, in Prometheus' form."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ...core.conversation.turns import ShortTurns
from ...core.types import Answer

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Metrics:
    """The counters of one app, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "draftsieve_requests",
            "Requests by route and status.",
            ["route", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "draftsieve_request_seconds",
            "Seconds of a request, its whole answer included.",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.first = Histogram(
            "draftsieve_first_token_seconds",
            "Seconds until an answer began.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.stages = Histogram(
            "draftsieve_stage_seconds",
            "Seconds of a stage of an answer.",
            ["stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.running = Gauge(
            "draftsieve_requests_running",
            "Requests that are answered or wait.",
            registry=self.registry,
        )
        self.waiting = Gauge(
            "draftsieve_requests_waiting",
            "Requests of which nothing is answered yet.",
            registry=self.registry,
        )
        self.original = self._counter("original_prompt_tokens", "Prompt tokens before compression.")
        self.prompt = self._counter("prompt_tokens", "Prompt tokens that were left to read.")
        self.said = self._counter("completion_tokens", "Tokens of answers.")
        self.fallbacks = self._counter("fallbacks", "Answers from documents left whole by a fault.")
        self.refused = self._counter("refused", "Requests that were sent away with 429.")
        self.left = self._counter("clients_left", "Requests whose client left before the end.")
        self.cache = Gauge(
            "draftsieve_evicted_cache_bytes",
            "Bytes of the evicted cache of the latest such answer.",
            registry=self.registry,
        )

    def answered(self, answer: Answer) -> None:
        """Count an answer."""
        self.original.inc(answer.usage.original_prompt_tokens)
        self.prompt.inc(answer.usage.prompt_tokens)
        self.said.inc(answer.usage.completion_tokens)
        for stage, seconds in answer.timings.items():
            self.stages.labels(stage).observe(seconds)
        if answer.fallback is not None:
            self.fallbacks.inc()
        if answer.cache_bytes is not None:
            self.cache.set(answer.cache_bytes)

    def compressed(self, found: ShortTurns) -> None:
        """Count a conversation that was shortened for another server."""
        self.original.inc(found.original_tokens)
        self.prompt.inc(found.tokens)
        if found.fallback is not None:
            self.fallbacks.inc()

    def sent_on(self, original: int, tokens: int) -> None:
        """Count what a proxy has shortened, in draft tokens."""
        self.original.inc(original)
        self.prompt.inc(tokens)

    def text(self) -> bytes:
        """All of them, as `/metrics` shows them."""
        return generate_latest(self.registry)

    def _counter(self, name: str, meaning: str) -> Counter:
        return Counter(f"draftsieve_{name}", meaning, registry=self.registry)
