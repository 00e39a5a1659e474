"""Frozen, validated options. Names follow the paper (arXiv 2506.08373) where it has one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, PlainSerializer, model_validator

from .errors import ConfigError
from .grammar import Grammar
from .options import Options, named

Pool = Literal["max", "mean"]
Reduction = Literal["max", "mean", "mean-max"]
Unit = Literal["token", "word", "sentence", "passage"]
Scorer = Literal[
    "speckv", "snapkv", "laq", "oracle", "kvzip", "tova", "h2o", "streaming", "key_norm", "random"
]
OnError = Literal["raise", "original"]
PositiveInt = Annotated[int, Field(ge=1, strict=True)]


_PRESETS: dict[str, dict[str, Any]] = {
    "2026-11": {"unit": "sentence", "lookahead_tokens": 16, "lexical_weight": 0.25},
    "2026-12": {
        "unit": "sentence",
        "unit_score": "mean",
        "head_weights": "auto",
        "passages_apart": True,
        "passage_weight": 0.5,
        "likelihood_weight": 0.5,
        "semantic_weight": 0.5,
    },
}
NEWEST_PRESET = "2026-12"
_UNCALIBRATED = "2026-11"  # stands for the newest where no weights of the draft's heads are known
_CACHE_PRESETS: dict[str, dict[str, Any]] = {"2026-12": {"lookahead_sentences": 1}}
SEMANTIC_WEIGHT = 0.5
"""What an embedder counts that is given without a weight, beside a preset that has none."""
_SHARES = ("semantic_weight", "passage_weight", "likelihood_weight")
_SMALL = ("token", "word")  # units that no second opinion is asked about


def can_embed(value: Any) -> Any:
    """The value, if it is None or can be an embedder.

    Raises:
        ConfigError: It cannot.
    """
    if isinstance(value, str) and (not value or value.startswith("<")):
        raise ConfigError(
            f"embedder={value!r} is no name of a model, but how another embedder was written out: "
            "give the object itself."
        )
    pair = [callable(getattr(value, name, None)) for name in ("embed_documents", "embed_query")]
    if value is None or isinstance(value, str | Path) or callable(value) or all(pair):
        return value
    raise ConfigError(
        f"embedder={named(value)} cannot embed: give a function from texts to vectors, an object "
        "with embed_documents and embed_query, or a folder in sentence-transformers' form."
    )


AnyEmbedder = Annotated[Any | None, AfterValidator(can_embed), PlainSerializer(named)]
"""What can be an embedder; an object of the caller's is written out by its name."""


def _one_budget(values: object, default: int) -> object:
    """`capacity` unless `ratio` is given; both together are an error."""
    if not isinstance(values, dict):
        return values
    if values.get("capacity") is not None and values.get("ratio") is not None:
        raise ValueError("capacity and ratio exclude each other: give one of them.")
    if values.get("ratio") is None and values.get("capacity") is None:
        return {**values, "capacity": default}
    return values


class SpecPC(Options):
    """Prompt compression by draft attention (paper section 4.2, Algorithm 2).

    Args:
        capacity: Budget in draft tokens for the whole prompt, 1024 unless `ratio` is given.
        ratio: Budget as a share of the passage tokens, in (0, 1]; excludes `capacity`.
        window_size: Number W of last prompt tokens whose attention rows are read and, in a bare
            prompt without segments, always kept. Cut to the capacity and to the prompt length;
            in a prompt with passages, to what follows the last of them (the question).
        kernel_size: Width of the pooling over positions.
        pool: "max", "mean" or None (no pooling).
        reduction: How rows, heads and layers are merged: "max" or "mean"; or "mean-max", the mean
            of a layer's heads, then the maximum over rows, layers and lookahead steps.
        neighbor_tokens: A selected token brings this many tokens, itself included, centred on
            it; None means `kernel_size`, 0 or 1 the token alone. Used with `unit="token"` and
            `unit="word"`.
        starting_layer: First draft layer that is read; None means min(8, layers // 2).
        lookahead_tokens: Draft tokens generated; the rows of all but the last are read too.
            None means the generation's `max_new_tokens`.
        weighted_query: Weight row j of the W window rows by j / (W - 1), newest 1.
        unit: What is kept or dropped as a whole: a "token" as in the paper, or a "word",
            "sentence" or "passage", which never cuts a number, identifier or URL.
        unit_score: A sentence or passage counts as its best token ("max") or as the mean of its
            tokens ("mean").
        language: ISO code ("de") of the passages' language, whose abbreviations and ordinals do
            not end a sentence; None finds it for each passage by its frequent words or its
            script, English rules being the fallback. Used with `unit="sentence"`.
        lexical_weight: Share in 0..1 of what a sentence or passage counts that comes from BM25,
            the words it has in common with the question; the draft's score makes up the rest, both
            as shares of the best one's. 0 asks the draft alone, as in the paper. Used with
            `unit="sentence"` and `unit="passage"`.
        semantic_weight: Share in 0..1 of what a sentence or passage counts that comes from an
            embedder, the cosine of its vector and the question's. All shares are then of z-scores
            over the prompt's sentences or passages, of the draft's scores the logarithm. Without
            an embedder it has no effect. Needs `unit="sentence"` or `unit="passage"`.
        embedder: What `semantic_weight` asks: a function from texts to vectors, an object with
            `embed_documents` and `embed_query`, or the folder (or hub id) of a model in
            sentence-transformers' form. Vectors are remembered while it lives. It takes no part
            in the hash.
        passage_weight: Share in 0..1 of what a sentence counts that comes from the best sentence of
            its passage, both as z-scores over the prompt's sentences (of the draft's scores the
            logarithm): an answer stands where the rest of the passage fits too. Needs
            `unit="sentence"`.
        likelihood_weight: Share in 0..1 of what a sentence or passage counts that comes from how
            likely the draft finds the question behind the passage alone (query likelihood, arXiv
            2204.07496), as a z-score over sentences or passages. Needs `passages_apart=True`;
            passages then go through all of the draft's layers.
        likelihood_passages: Ask how likely the question is behind at most this many passages, those
            with the best sentences; the others count as the least likely of them. None for all.
            Saves time where passages come from a store.
        passage_floor: Units that every passage is sure of, its best ones, before all others
            compete; given out best first while the budget lasts.
        score_mass: Keep the best units only until they hold this share of the scores of all
            passage tokens, in (0, 1]; `capacity` or `ratio` is then an upper bound. None keeps
            what the budget holds.
        head_weights: Merge the draft's heads by weights that `draftsieve calibrate` has learned
            (Sentinel, arXiv 2505.23277) in place of `reduction` and `starting_layer`: "calibrated"
            for the file beside the draft, or the one that the package carries for this model; or
            the path of one. Rows of a lookahead take no part. None merges them as the paper does.
            "auto" is "calibrated" where weights are known for the draft; with other drafts the
            preset "2026-12" reads as "2026-11" does, which the log says once.
        passages_apart: Read each passage behind the prompt's beginning, without the others; what
            follows the passages sees all of them. Needs `lookahead_tokens=1` and a draft with full
            attention in every layer.
        positions: "reset" gives the target a shorter prompt, as in the paper. "keep" leaves each
            kept token at the position it had (SpecPrefill, arXiv 2502.02789), without gap
            markers; an engine does this, a compressor alone returns text and cannot. Such
            answers are decoded without drafting.
        gap_marker: Text put where something was left out between kept spans; None for a space.
        drop_empty: Leave out passages of which nothing is kept (else they stay, empty).
        min_tokens: Passages of fewer draft tokens together stay whole, unread.
        max_passages: Keep something of at most this many passages, those with the best scored
            tokens; the draft then reads also what fits the budget. None for all.
    """

    capacity: PositiveInt | None = None
    ratio: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    window_size: PositiveInt = 64
    kernel_size: PositiveInt = 32
    pool: Pool | None = "max"
    reduction: Reduction = "max"
    neighbor_tokens: Annotated[int, Field(ge=0, strict=True)] | None = None
    starting_layer: Annotated[int, Field(ge=0, strict=True)] | None = None
    lookahead_tokens: PositiveInt | None = 1
    weighted_query: bool = True
    unit: Unit = "token"
    unit_score: Pool = "max"
    language: Annotated[str, Field(pattern="^[a-z]{2,3}$")] | None = None
    lexical_weight: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    semantic_weight: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    embedder: AnyEmbedder = None
    passage_weight: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    likelihood_weight: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    likelihood_passages: PositiveInt | None = None
    passage_floor: Annotated[int, Field(ge=0, strict=True)] = 0
    score_mass: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    head_weights: str | Path | None = None
    passages_apart: bool = False
    positions: Literal["reset", "keep"] = "reset"
    gap_marker: str | None = " … "
    drop_empty: bool = False
    min_tokens: Annotated[int, Field(ge=0, strict=True)] = 0
    max_passages: PositiveInt | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_budget(cls, values: object) -> object:
        return _one_budget(values, 1024)

    @model_validator(mode="after")
    def _apart_without_guess(self) -> SpecPC:
        if self.passages_apart and self.lookahead_tokens != 1:
            raise ValueError(
                f"passages_apart=True guesses no answer, but lookahead_tokens is "
                f"{self.lookahead_tokens}: set it to 1."
            )
        return self

    @model_validator(mode="after")
    def _opinions(self) -> SpecPC:
        if self.semantic_weight and self.unit in _SMALL:
            raise ValueError(
                f"semantic_weight={self.semantic_weight} asks an embedder about sentences or "
                f'passages, but unit is "{self.unit}": set it to "sentence" or "passage".'
            )
        if self.passage_weight and self.unit != "sentence":
            raise ValueError(
                f"passage_weight={self.passage_weight} is a share of what sentences count, but "
                f'unit is "{self.unit}": set it to "sentence".'
            )
        if self.likelihood_weight and not (self.passages_apart and self.unit not in _SMALL):
            raise ValueError(
                f"likelihood_weight={self.likelihood_weight} asks about each passage alone: set "
                'passages_apart=True, and unit to "sentence" or "passage".'
            )
        if self.lexical_weight + self.semantic_weight > 1 + 1e-9:
            raise ValueError(
                f"lexical_weight={self.lexical_weight} and semantic_weight={self.semantic_weight} "
                "are shares of one score: together they must not exceed 1."
            )
        return self

    def __hash__(self) -> int:
        """Of everything but the embedder, which may have no hash."""
        return hash((type(self), *(value for name, value in self if name != "embedder")))

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """A copy with the same embedder: nothing else in it can change."""
        return self.__copy__()

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """pydantic's; a deep copy has the same embedder too."""
        return super().model_copy(update=update)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """The options, the embedder by its name."""
        for name, value in super().__repr_args__():
            yield name, named(value) if name == "embedder" else value

    @classmethod
    def preset(cls, name: str, **changes: Any) -> SpecPC:
        """A dated combination for prompts with passages, beside the paper's settings.

        Args:
            name: "2026-12": whole sentences by their mean attention in a few heads that find
                evidence, mixed with the best of their passage and with how likely the question is
                behind it; passages are read apart, nothing is guessed, and an embedder counts half
                of a sentence's score where one is given. Chosen on Natural Questions
                (docs/results.md). For drafts whose heads are not calibrated
                it is "2026-11": whole sentences, scored by the question and by 16 tokens of the
                draft's guessed answer, a quarter of the score being words in common with the
                question. Chosen on generated questions and confirmed on others.
            changes: Options that differ from the preset, such as `ratio=0.3`.

        Raises:
            ConfigError: There is no such preset, or an option is invalid.
        """
        if name not in _PRESETS:
            raise ConfigError(f"There is no preset {name!r}; there are: {sorted(_PRESETS)}.")
        chosen = {**_PRESETS[name], **changes}
        unfit = {"token": _SHARES, "word": _SHARES, "passage": ("passage_weight",)}
        for share in unfit.get(str(chosen["unit"]), ()):
            if share not in changes:
                chosen.pop(share, None)
        return cls(**chosen)

    def uncalibrated(self) -> SpecPC:
        """What `head_weights="auto"` means for a draft whose heads have no weights.

        Options as the newest preset has them become those of the preset that needs no weights.
        """
        newest, other = _PRESETS[NEWEST_PRESET], _PRESETS[_UNCALIBRATED]
        usual = {name: field.default for name, field in type(self).model_fields.items()}
        names = {*newest, *other} - {"semantic_weight"}
        changed = {
            name: other.get(name, usual[name])
            for name in names
            if getattr(self, name) == newest.get(name, usual[name])
        }
        if "lexical_weight" in changed:  # both opinions are shares of one score
            changed["lexical_weight"] = min(changed["lexical_weight"], 1 - self.semantic_weight)
        return self.model_copy(update=changed)

    @property
    def neighbors(self) -> int:
        """Tokens a selected token brings, itself included (at least 1)."""
        return max(1, self.kernel_size if self.neighbor_tokens is None else self.neighbor_tokens)


DEFAULT_METHOD = SpecPC.preset(NEWEST_PRESET, ratio=0.35)
"""What compresses where no method is given: the newest preset, whole sentences, with a ratio of
0.35, a share of the draft tokens of all passages together. `SpecPC()` has the paper's settings."""


class SpecKV(Options):
    """KV-cache eviction by the draft's lookahead (paper section 4.1, Algorithm 1).

    Args:
        capacity: KV entries kept per layer and KV head, window included; 512 unless `ratio` is
            given.
        ratio: Entries kept as a share of the passages' tokens (of all tokens where there are no
            passages), in (0, 1]; excludes `capacity`.
        window_size: The last W prompt tokens before the final one look at the rest and stay.
        kernel_size: Odd width of the pooling over positions.
        pool: "max", "mean" or None.
        reduction: How rows and the heads of a group are merged, "max" or "mean".
        lookahead_tokens: Tokens the draft guesses; None means the generation's `max_new_tokens`, at
            most 256 (`Engine.trace` takes its own `max_new_tokens` as it is).
        lookahead_sentences: Sentences of the passages, those with the most words in common with the
            question (BM25), that the target reads once more behind the guess, whose rows they ask
            like: they help where the guess misses the answer. 0 for the guess alone, as in the
            paper. Used with passages, by "speckv", "snapkv", "laq" and "oracle".
        scorer: "speckv"; or a baseline that needs no draft: "snapkv", "laq", "tova", "h2o",
            "streaming", "key_norm", "random", "kvzip" (what the target needs to repeat the
            passages; the same for every question, for two more passes over them), and "oracle" (the
            target's own greedy answer as lookahead, an upper bound that costs more than it saves).
            See `core/speckv/scorers/`.
        seed: Of "random".
        prefill_vertical_size: Sparse prefill: while the target reads, every token sees only this
            many best-scored columns per KV head, protected tokens among them, and the last
            `prefill_window_size` tokens. None reads dense. Both sizes are given or none (2048 each
            in the paper). Prompts that are no longer than both together, too short to gain
            (`core/sparse_prefill.py`), not evicted, or read in a session stay dense, and so do
            sliding-window layers.
        prefill_window_size: See `prefill_vertical_size`.
        head_budgets: "even", or "adaptive": the heads of a layer share kv_heads * C entries, which
            go to the best-scored ones of all heads together (Ada-KV, arXiv 2407.11550).
        head_floor: With "adaptive", the share of the entries beyond the protected ones (or the
            window) that every head is sure of, in 0..1; 1 is the same as "even".
        layer_budgets: "even", or "pyramid": lower layers keep more and higher ones less, C on
            average (PyramidKV, arXiv 2406.02069). Sliding-window layers take no part.
        pyramid_slope: With "pyramid", the lowest layer keeps (1 + slope) times and the highest
            (1 - slope) times the mean number of entries beyond the protected ones, in 0..1.
    """

    capacity: PositiveInt | None = None
    ratio: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    window_size: PositiveInt = 32
    kernel_size: PositiveInt = 7
    pool: Pool | None = "max"
    reduction: Pool = "max"
    lookahead_tokens: PositiveInt | None = None
    lookahead_sentences: Annotated[int, Field(ge=0, strict=True)] = 0
    scorer: Scorer = "speckv"
    seed: Annotated[int, Field(ge=0)] = 0
    prefill_vertical_size: PositiveInt | None = None
    prefill_window_size: PositiveInt | None = None
    head_budgets: Literal["even", "adaptive"] = "even"
    head_floor: Annotated[float, Field(ge=0.0, le=1.0)] = 0.2
    layer_budgets: Literal["even", "pyramid"] = "even"
    pyramid_slope: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5

    @model_validator(mode="before")
    @classmethod
    def _one_budget(cls, values: object) -> object:
        return _one_budget(values, 512)

    @model_validator(mode="after")
    def _odd_kernel(self) -> SpecKV:
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {self.kernel_size}.")
        return self

    @model_validator(mode="after")
    def _both_prefill_sizes(self) -> SpecKV:
        sizes = self.prefill_vertical_size, self.prefill_window_size
        if sizes.count(None) == 1:
            raise ValueError(
                "Sparse prefill needs prefill_vertical_size and prefill_window_size, got "
                f"{sizes[0]} and {sizes[1]}: give both, or none to read dense."
            )
        return self

    @classmethod
    def preset(cls, name: str, **changes: Any) -> SpecKV:
        """A dated combination for prompts with passages, beside the paper's settings.

        Args:
            name: "2026-12": behind the guess the target reads the sentence of the passages that has
                most words in common with the question. Chosen on 8 real questions; what it does on
                9 others stands in docs/results.md.
            changes: Options that differ from the preset, such as `ratio=0.125`.

        Raises:
            ConfigError: There is no such preset, or an option is invalid.
        """
        if name not in _CACHE_PRESETS:
            raise ConfigError(
                f"There is no preset {name!r} of SpecKV; there are: {sorted(_CACHE_PRESETS)}."
            )
        return cls(**{**_CACHE_PRESETS[name], **changes})

    @property
    def uneven(self) -> bool:
        """Whether heads or layers may keep different numbers of entries."""
        return self.head_budgets != "even" or self.layer_budgets != "even"


class SpecKVPC(Options):
    """SpecPC, then SpecKV on the compressed prompt with the same draft answer (Algorithm 3).

    Args:
        specpc: Prompt compression; its `lookahead_tokens` serve both stages.
        speckv: Eviction; its `lookahead_tokens` must stay None.
    """

    specpc: SpecPC = SpecPC(capacity=2048, lookahead_tokens=8)
    speckv: SpecKV = SpecKV()

    @model_validator(mode="after")
    def _one_lookahead(self) -> SpecKVPC:
        if self.speckv.lookahead_tokens is not None:
            raise ValueError("speckv.lookahead_tokens must be None: specpc's lookahead is used.")
        return self

    @model_validator(mode="after")
    def _new_positions(self) -> SpecKVPC:
        if self.specpc.positions == "keep":
            raise ValueError('positions="keep" belongs to SpecPC alone: use "reset" with SpecKV.')
        return self


Method = SpecPC | SpecKV | SpecKVPC


def stages(method: Method | None) -> tuple[SpecPC | None, SpecKV | None]:
    """The prompt stage and the cache stage of a method."""
    if isinstance(method, SpecKVPC):
        return method.specpc, method.speckv
    if isinstance(method, SpecKV):
        return None, method
    return method, None


DraftKind = Literal["aded", "lookup", "lookahead", "model", "graph", "auto"]


class Generation(Options):
    """How the target decodes. Temperature 0 is greedy; the same seed gives the same output.

    Args:
        max_new_tokens: Most tokens generated.
        temperature: 0 for greedy, else the sampling temperature.
        top_p: Nucleus size for sampling, in (0, 1].
        top_k: Sample among the k likeliest tokens; 0 for all.
        min_p: Drop tokens below this share of the likeliest one's probability.
        repetition_penalty: 1.0 for none (Keskar et al., 2019).
        stop: Strings that end the answer; none of them is part of its text.
        seed: Seed of the sampling; None draws a fresh one.
        grammar: What the answer must look like, see `Grammar`; None for anything.
        timeout: Seconds from the request's start after which it fails; None for no limit.
        drafting: Who guesses ahead, so that the target reads several tokens in one pass; the
            answer stays the same. "lookup" copies from the original prompt, "aded" asks the
            engine's tri-gram store, "lookahead" follows the draft's guessed answer, "model" and
            "graph" let the draft model guess ahead. "auto" joins the cheap ones and drafts only
            while that is faster. None reads one token a pass. Batches are never drafted for.
    """

    max_new_tokens: PositiveInt = 256
    temperature: Annotated[float, Field(ge=0.0)] = 0.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0.0)] = 1.0
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    seed: Annotated[int, Field(ge=0)] | None = None
    grammar: Grammar | None = None
    timeout: Annotated[float, Field(gt=0.0)] | None = None
    drafting: DraftKind | None = None


class Quantization(Options):
    """Weight quantisation while loading, on CPU or CUDA.

    Args:
        bits: 4 (nf4) or 8.
        double_quant: Quantise the 4-bit scales too; saves about 0.4 bits a weight.
        backend: "bitsandbytes" (8 bits: LLM.int8); "torchao" (8 bits: weights alone, one scale a
            row, which is closer to the unquantised model; needs the extra `[torchao]`); or "torch"
            (8 bits: weights and activations, which is the fastest for a draft on a CPU).
    """

    bits: Literal[4, 8] = 4
    double_quant: bool = False
    backend: Literal["bitsandbytes", "torchao", "torch"] = "bitsandbytes"

    @model_validator(mode="after")
    def _backend_can(self) -> Quantization:
        if self.backend != "bitsandbytes" and (self.bits == 4 or self.double_quant):
            raise ValueError(
                f'backend="{self.backend}" quantises to 8 bits without double_quant: give bits=8, '
                'or backend="bitsandbytes".'
            )
        return self
