"""`make bench`: what does compressing cost, and what does it save?

Times the target on the whole prompt against draft + target on the compressed one, both with the
same number of new tokens. Runs are interleaved, so that a busy moment of the machine hits both.
The bundled pair shows small models, where the draft is nearly as slow as the target; random weights
have the proportion of a usual pair, about 1 to 6. Prints a Markdown table; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from draftsieve import Answer, Engine, Generation, SpecPC
from draftsieve.core.evaluation.python_reference import read_reference

QUESTIONS = Path(__file__).resolve().parents[1] / "data/python_reference.jsonl"
DRAFT_STAGES = ("draft", "select")


@dataclass(frozen=True, slots=True)
class Text:
    """Natural text, and questions about it."""

    paragraphs: tuple[str, ...]
    questions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """One timed request."""

    seconds: float
    answer: Answer


def main(argv: Sequence[str] | None = None) -> int:
    """Time all pairs and lengths, and print the table."""
    options = _options(argv)
    text = python_reference()
    bundled = Engine.load(options.target, options.draft, progress=False)
    assert bundled.tokenizer is not None  # `load` always brings one
    bundled.target.generation_config.eos_token_id = None  # both variants decode as many tokens
    pairs = {"bundled": bundled, "random 8M + 50M": random_pair(bundled.tokenizer)}
    print(f"{torch.get_num_threads()} threads, keeping {options.ratio:.0%} of the passages, ")
    print(f"{options.new_tokens} new tokens at most, {options.repeats} interleaved repeats; ")
    print("median (fastest to slowest) seconds.\n")
    print("| pair | prompt | compressed | whole | sieved | draft part | whole / sieved |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, engine in pairs.items():
        for row in table(name, engine, text, options):
            print(row, flush=True)
    return 0


def table(name: str, engine: Engine, text: Text, options: argparse.Namespace) -> Iterator[str]:
    """One row for each prompt length."""
    method = SpecPC(ratio=options.ratio)
    for length in options.lengths:
        passages = take(text.paragraphs, length, engine.count_tokens)
        question = text.questions[0]
        whole: list[Run] = []
        sieved: list[Run] = []
        for repeat in range(options.repeats + 1):
            for runs, chosen in ((whole, None), (sieved, method)):
                run = timed(engine, question, passages, chosen, options.new_tokens)
                if repeat:  # the first round warms up
                    runs.append(run)
        yield _row(name, whole, sieved)


def timed(
    engine: Engine,
    question: str,
    passages: Sequence[str],
    method: SpecPC | None,
    new_tokens: int,
) -> Run:
    """Answer once."""
    began = time.perf_counter()
    generation = Generation(max_new_tokens=new_tokens)
    answer = engine.answer(question, passages, method=method, generation=generation)
    return Run(time.perf_counter() - began, answer)


def python_reference() -> Text:
    """Passages of the language reference that this Python carries, long topics first."""
    found = read_reference(QUESTIONS)
    texts = tuple(passage.text for passage in reversed(found.passages))
    return Text(texts, tuple(question.text for question in found.questions))


def take(paragraphs: Sequence[str], tokens: int, count: Callable[[str], int]) -> list[str]:
    """Paragraphs in their order, the text over and over, up to about so many tokens."""
    taken: list[str] = []
    while tokens > 0:
        taken.append(paragraphs[len(taken) % len(paragraphs)])
        tokens -= count(taken[-1])
    return taken


def random_pair(tokenizer: PreTrainedTokenizerBase) -> Engine:
    """A draft of about 8M and a target of about 50M parameters; what they say means nothing."""
    torch.manual_seed(0)
    draft, target = (
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=hidden,
                intermediate_size=hidden * 11 // 4,
                num_hidden_layers=layers,
                num_attention_heads=hidden // 64,
                num_key_value_heads=hidden // 128,
                max_position_embeddings=8192,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=None,  # both variants then decode the same number of tokens
            )
        )
        for hidden, layers in ((384, 4), (640, 10))
    )
    return Engine(target, tokenizer, draft_model=draft, name="random")


def _row(name: str, whole: Sequence[Run], sieved: Sequence[Run]) -> str:
    before, after = (runs[0].answer.usage for runs in (whole, sieved))
    pairs = zip(whole, sieved, strict=True)
    gain = sorted(first.seconds / second.seconds for first, second in pairs)
    draft = [sum(run.answer.timings.get(s, 0.0) for s in DRAFT_STAGES) for run in sieved]
    cells = [
        name,
        f"{before.prompt_tokens:,}",
        f"{after.prompt_tokens:,}",
        _spread([run.seconds for run in whole]),
        _spread([run.seconds for run in sieved]),
        _spread(draft),
        f"{median(gain):.2f}x ({gain[0]:.2f} to {gain[-1]:.2f})",
    ]
    return f"| {' | '.join(cells)} |"


def _spread(seconds: Sequence[float]) -> str:
    return f"{median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})"


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="builtin:target")
    parser.add_argument("--draft", default="builtin:draft")
    parser.add_argument("--lengths", type=int, nargs="+", default=[500, 1000, 1600])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--new-tokens", type=int, default=16)
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
