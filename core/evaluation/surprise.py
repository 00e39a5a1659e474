"""Filtering a prompt by the draft's surprise, in the manner of LLMLingua (arXiv 2310.05736).

LLMLingua drops the tokens that a small model finds likely. `surprise` is that rule on one pass over
the whole prompt (no iteration over segments, no budget controller for demonstrations); `contrast`
is LongLLMLingua's question-aware form (arXiv 2310.06839, section 4.1): how much less surprising a
token becomes once the question stands in front.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..prompt.encoder import PromptEncoder, PromptTokens
from ..prompt.messages import Prompt
from .baselines import Kept
from .squad import Counter
from .tasks import EvalItem, question_first

BLOCK = 256  # positions whose logits exist at once


def token_surprise(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Minus the log probability of each token after those before it; 0 for the first.

    Args:
        model: A causal model with full-vocabulary output embeddings.
        ids: (tokens,) int64.

    Returns:
        (tokens,) float32.
    """
    found = torch.zeros(ids.numel())
    with torch.no_grad():
        fed = ids.unsqueeze(0).to(model.device)
        states = model.get_decoder()(input_ids=fed, use_cache=False).last_hidden_state[0]
        head = model.get_output_embeddings()
        for first in range(0, ids.numel() - 1, BLOCK):
            last = min(first + BLOCK, ids.numel() - 1)
            log_probabilities = head(states[first:last]).float().log_softmax(-1)
            chosen = log_probabilities.gather(1, fed[0, first + 1 : last + 1, None])
            found[first + 1 : last + 1] = -chosen[:, 0].cpu()
    return found


def contrast(
    model: PreTrainedModel, encoder: PromptEncoder, item: EvalItem
) -> tuple[PromptTokens, torch.Tensor]:
    """Surprise without the question minus surprise behind it.

    Returns:
        The prompt with the question in front, and (tokens,) float32; 0 for a passage that the
        tokenizer cuts differently in the two prompts, and outside of passages.
    """
    asked = encoder.encode(question_first(item.question, item.passages, item.system))
    blocks = [{"type": "document", "text": text} for text in item.passages]
    bare = encoder.encode(Prompt.from_messages([{"role": "user", "content": blocks}]))
    with_question = token_surprise(model, asked.ids)
    without = token_surprise(model, bare.ids)
    found = torch.zeros(len(asked))
    for index in range(len(item.passages)):
        here, there = asked.passage == index, bare.passage == index
        if torch.equal(asked.ids[here], bare.ids[there]):
            found[here] = without[there] - with_question[here]
    return asked, found


def keep_highest(
    texts: Sequence[str], tokens: PromptTokens, scores: torch.Tensor, budget: int, count: Counter
) -> tuple[Kept, tuple[str, ...]]:
    """The passage tokens of highest score, joined without any mark, as many as the budget holds.

    Args:
        texts: The passages.
        tokens: A prompt over them.
        scores: (tokens,) float32.
        budget: Most tokens of the kept texts, counted on the joined text.
        count: Token counter.

    Returns:
        The kept characters of every passage, and the kept texts.
    """
    places = torch.nonzero(~tokens.protected).squeeze(1)
    order = places[torch.argsort(scores[places], descending=True, stable=True)]

    def keep(size: int) -> tuple[Kept, tuple[str, ...]]:
        spans: list[set[tuple[int, int]]] = [set() for _ in texts]
        for place in order[:size].tolist():
            bounds = int(tokens.start[place]), int(tokens.end[place])
            spans[int(tokens.passage[place])].add(bounds)
        kept = tuple(tuple(sorted(own)) for own in spans)
        return kept, tuple(
            "".join(text[start:end] for start, end in own).strip()
            for text, own in zip(texts, kept, strict=True)
        )

    low, high = 0, len(order) + 1  # `low` tokens fit, `high` do not (or are not there)
    best = keep(0)
    while high - low > 1:
        middle = (low + high) // 2
        tried = keep(middle)
        if sum(map(count, tried[1])) <= budget:
            low, best = middle, tried
        else:
            high = middle
    return best
