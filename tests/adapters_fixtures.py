"""A tiny random pair with a tokenizer trained here, and a counter of core calls."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from draftsieve.core.compressor import Compressor
from draftsieve.core.engine import Engine

EXAMPLES = Path(__file__).parent.parent / "examples"
BUILTIN = Path(__file__).parent.parent / "core" / "builtin"
QUESTION = "When does the ferry to Holm leave?"
TEXTS = [
    "The ferry to Holm leaves at seven in the morning. It returns at noon, except on Sundays.",
    "Tickets are sold at the harbour office. Children travel free. Dogs need a ticket of 3.50.",
    "The museum of Holm opens at ten. Its lamp of 1887 can still be lit by visitors.",
]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the texts above."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([QUESTION, *TEXTS], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_model(hidden: int, seed: int, layers: int = 2) -> LlamaForCausalLM:
    """A random Llama for the tokenizer above that never ends an answer by itself."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        name_or_path=f"tiny-{hidden}",
    )
    return LlamaForCausalLM(config)


def save_pair(home: Path) -> dict[str, str]:
    """Folders of a tiny target ("model") and draft with that tokenizer."""
    for seed, name in enumerate(("model", "draft")):
        tiny_model(32, seed=7 + seed).save_pretrained(home / name)
        tiny_tokenizer().save_pretrained(home / name)
    return {name: str(home / name) for name in ("model", "draft")}


@cache
def tiny_compressor() -> Compressor:
    return Compressor(tiny_model(32, seed=1), tiny_tokenizer())


@cache
def tiny_engine() -> Engine:
    return Engine(
        tiny_model(64, seed=2), tiny_tokenizer(), draft_model=tiny_model(32, seed=1), name="tiny"
    )


@contextmanager
def tokens_read(model: Any) -> Iterator[Callable[[], int]]:
    """Tokens that went through a model's first layer since the last look."""
    seen: list[int] = []
    layer = model.get_decoder().layers[0]
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2].numel()))

    def look() -> int:
        found = sum(seen)
        seen.clear()
        return found

    try:
        yield look
    finally:
        hook.remove()


@contextmanager
def counted(thing: Any) -> Iterator[list[str]]:
    """Names of the public methods of a real object that the adapters call."""
    calls: list[str] = []

    def wrap(name: str, method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if sys._getframe(1).f_globals["__name__"].startswith("draftsieve.integrations"):
                calls.append(name)
            return method(*args, **kwargs)

        return call

    names = [n for n in dir(type(thing)) if not n.startswith("_") and n != "load"]
    wrapped = [n for n in names if callable(getattr(type(thing), n))]
    for name in wrapped:
        setattr(thing, name, wrap(name, getattr(thing, name)))
    try:
        yield calls
    finally:
        for name in wrapped:
            delattr(thing, name)
