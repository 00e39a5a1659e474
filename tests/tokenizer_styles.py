"""Small tokenizers in the styles of well-known models, trained on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram, WordPiece
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer, UnigramTrainer, WordPieceTrainer
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The lighthouse at Kestrel Point was built in 1884 by the harbour board.",
    "Question: who repaired the lamp? Answer the question using only the passages.",
    "Its lamp turns once in twelve seconds; the keeper's log says so, twice.",
    "Ada Fenwick wrote to the board on 3 May 1902: 'We need oil, rope and paint.'",
    "system user assistant tool model text end start im header id inst",
    "[1] [2] [3] first second third passage, and many other words in between.\n\n",
    "def main(argv):\n    return {'name': argv[0], 'size': 12.5}\n",
    "Äußerst schöne Grüße, naïve café, 東京は夜の七時、 привет мир",
]

CHATML = (
    "{% if tools %}<|im_start|>system\n<tools>{% for tool in tools %}{{ tool | tojson }}\n"
    "{% endfor %}</tools><|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% if m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content | trim }}{% endif %}"
    "<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set head = '<<SYS>>\n' + messages[0].content + "
    "'\n<</SYS>>\n\n' %}{% set rest = messages[1:] %}{% else %}{% set head = '' %}"
    "{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{% if m.role == 'user' %}{% set text = head + m.content if loop.first else m.content %}"
    "{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
UNIGRAM = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@cache
def chatml() -> PreTrainedTokenizerFast:
    """Byte-level BPE with NFC and non-special added tokens, as Qwen."""
    tokenizer = _byte_level(normalizers.NFC())
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    names = ("<tool_call>", "</tool_call>", "<think>", "</think>")
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])
    return _fast(tokenizer, CHATML, eos_token="<|im_end|>")


@cache
def llama3() -> PreTrainedTokenizerFast:
    """Byte-level BPE that takes whole words, headers as special tokens, trims, quotes tools."""
    tokenizer = _byte_level(None, ignore_merges=True)
    names = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    tokenizer.add_special_tokens(names)
    bos = tokenizer.token_to_id(names[0])
    tokenizer.post_processor = TemplateProcessing(f"{names[0]} $A", None, [(names[0], bos)])
    return _fast(tokenizer, LLAMA3, bos_token=names[0], eos_token=names[1])


@cache
def llama2() -> PreTrainedTokenizerFast:
    """Metaspace BPE with byte fallback; [INST] is a control token, as in later Mistrals."""
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    trained = _metaspace_bpe(names, prefix="first")
    return _fast(trained, LLAMA2, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@cache
def llama2_legacy() -> PreTrainedTokenizerFast:
    """As `llama2`, but the prefix comes from a normalizer, at the start of each stretch."""
    tokenizer = _metaspace_bpe(["<unk>", "<s>", "</s>"], prefix="always")
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = None
    return _fast(tokenizer, LLAMA2, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@cache
def unigram() -> PreTrainedTokenizerFast:
    """Unigram whose vocabulary itself spells </s>, NFKC, spaces squeezed, as T5."""
    tokenizer = Tokenizer(Unigram())
    steps = [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    specials = ["<pad>", "</s>", "<unk>"]
    trainer = UnigramTrainer(
        vocab_size=300, special_tokens=specials, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<extra_id_0>", normalized=True)])
    eos = tokenizer.token_to_id("</s>")
    tokenizer.post_processor = TemplateProcessing("$A </s>", None, [("</s>", eos)])
    return _fast(tokenizer, UNIGRAM, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")


@cache
def gemma() -> PreTrainedTokenizerFast:
    """BPE with byte fallback, no prefix, whitespace runs as added tokens; no system role."""
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer = _metaspace_bpe(names, prefix="never")
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in ("<table>", "\n\n\n")])
    return _fast(tokenizer, GEMMA, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>")


@cache
def phi3() -> PreTrainedTokenizerFast:
    """Metaspace BPE whose role tokens swallow the whitespace after them."""
    tokenizer = _metaspace_bpe(["<unk>", "<s>", "</s>"], prefix="first")
    names = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>")
    tokenizer.add_special_tokens([AddedToken(name, rstrip=True, special=True) for name in names])
    return _fast(tokenizer, PHI3, unk_token="<unk>", bos_token="<s>", eos_token="<|end|>")


@cache
def wordpiece() -> PreTrainedTokenizerFast:
    """Lower-casing WordPiece without a chat template; a mask token takes the space before it."""
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", AddedToken("[MASK]", lstrip=True, special=True)]
    trainer = WordPieceTrainer(vocab_size=300, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _fast(tokenizer, None, unk_token="[UNK]", pad_token="[PAD]", mask_token="[MASK]")


STYLES: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "chatml": chatml,
    "llama3": llama3,
    "llama2": llama2,
    "llama2_legacy": llama2_legacy,
    "unigram": unigram,
    "gemma": gemma,
    "phi3": phi3,
    "wordpiece": wordpiece,
}


def _byte_level(
    normalizer: normalizers.Normalizer | None, *, ignore_merges: bool = False
) -> Tokenizer:
    tokenizer = Tokenizer(BPE(ignore_merges=ignore_merges))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=450,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _metaspace_bpe(specials: list[str], prefix: str) -> Tokenizer:
    """BPE over ▁-words with a byte token for each byte, special tokens inside the vocabulary."""
    tokenizer = Tokenizer(BPE(unk_token=specials[0], byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=True)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    names = [name for name in specials if name != "<unk>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", *names, *byte_tokens],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _plain_bytes(tokenizer)


def _plain_bytes(tokenizer: Tokenizer) -> Tokenizer:
    """Byte tokens are vocabulary, not added tokens."""

    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if not t["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(spec))


def _fast(tokenizer: Tokenizer, template: str | None, **names: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=template,
        clean_up_tokenization_spaces=False,
        **names,
    )
