"""The pair's byte-level BPE tokenizer with its chat template.

Run `python -m examples.train_builtin.tokenizer --corpus .work/corpus --out .work/tokenizer`.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from .generator import make_conversation
from .scenes import SceneOptions, natural_sentences

SPECIAL = ["<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 4096
SEED = 4096
# words with their space; every digit, capital letter of an abbreviation and sign by itself
PATTERN = r" ?\p{Lu}?\p{Ll}+| ?\p{L}|\p{N}| ?[^\s\p{L}\p{N}]|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def training_text(corpus: list[str], scenes: int) -> Iterator[str]:
    """Natural text and generated conversations, of training names only."""
    yield from corpus
    rng = random.Random(SEED)
    for _ in range(scenes):
        conversation = make_conversation(rng, SceneOptions(characters=1500), 8, corpus)
        yield from conversation.scene.passages
        for turn in conversation.turns:
            yield f"Question: {turn.question}"
            yield turn.answer
    for word in ("system", "user", "assistant", "…"):  # one token each
        yield from [word] * 5000


def train_tokenizer(corpus: list[str], scenes: int = 6000) -> Tokenizer:
    """Train the merges."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(corpus, scenes), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, longest: int) -> None:
    """Write it as transformers reads it, with the chat template."""
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|endoftext|>", "<|im_start|>"],
        model_max_length=longest,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, default=Path(".work/corpus"))
    parser.add_argument("--out", type=Path, default=Path(".work/tokenizer"))
    options = parser.parse_args()
    corpus = natural_sentences(options.corpus / "sentences.txt")
    save_tokenizer(train_tokenizer(corpus), options.out, 4608)


if __name__ == "__main__":
    main()
