"""Learns the weights of a draft's heads: which of them look at the evidence of a question.

A logistic model over passage tokens, as Sentinel's over sentences (arXiv 2505.23277): one feature
per head, the strongest attention of the asking rows; one label, whether the token belongs to a
sentence that the answer needs. Needs scikit-learn; what it gives does not.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..compressor import Compressor
from ..config import SpecPC
from ..errors import ConfigError, ModelError
from ..models.loading import context_window, fingerprint
from ..prompt.encoder import PromptTokens
from ..specpc.draft import asking_rows
from ..specpc.draft_scores import row_weights
from ..specpc.head_weights import HeadWeights, norms_of, read_heads
from .puzzles import TASKS
from .scorers import require_eval
from .tasks import EvalItem

SEED = 1_000_000  # of generated items; evaluations use other ones
OTHERS = 200  # tokens besides the evidence that an item gives at most
HELD_OUT = 5  # one of so many items is kept for the check
_REGULARISATION = 0.1  # scikit-learn's C on standardised features


@dataclass(frozen=True, slots=True)
class Calibration:
    """Learned weights, and what they are worth on items that had no part in learning them.

    Average precision of finding the evidence's tokens: by the learned weights, and by the paper's
    maximum over the heads of the upper layers.
    """

    weights: HeadWeights
    items: int
    precision: float
    precision_before: float


@dataclass(frozen=True, slots=True, eq=False)
class _Tokens:
    """Passage tokens of one item."""

    features: torch.Tensor  # (tokens, layers * heads) float32
    evidence: torch.Tensor  # (tokens,) bool
    share: torch.Tensor  # (tokens,) how many tokens each one stands for


def calibrate(
    compressor: Compressor,
    items: Sequence[EvalItem],
    *,
    source: str | None = None,
    progress: bool = True,
) -> Calibration:
    """Learn the weights of a draft's heads from questions whose evidence is known.

    Args:
        compressor: The draft.
        items: Questions over passages; those without evidence, or longer than the draft's window,
            are left out. One of every five is kept for the check.
        source: Where the items come from, saved with the weights: the name of a data file. By
            default "generated", or the task's name for items that are not.
        progress: Show a bar.

    Returns:
        The weights, and their average precision on the items kept for the check.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        ConfigError: Fewer than ten items can be used.
    """
    require_eval("sklearn", "calibration")
    window = context_window(compressor.model)
    read: list[_Tokens] = []
    for item in tqdm(items, "Draft reads", disable=not progress):
        tokens = compressor.encoder.encode(item.prompt())
        if item.evidence and (window is None or len(tokens) <= window):
            thinned = bool((len(read) + 1) % HELD_OUT)
            read.append(_read(compressor, item, tokens, OTHERS if thinned else None))
    if len(read) < 2 * HELD_OUT:
        raise ConfigError(
            f"Only {len(read)} items can teach this draft, at least {2 * HELD_OUT} are needed: "
            "give more items, or shorter ones where the draft's window is small."
        )
    checked = read[HELD_OUT - 1 :: HELD_OUT]
    taught = [tokens for place, tokens in enumerate(read) if (place + 1) % HELD_OUT]
    config = compressor.model.config.get_text_config()
    shape = config.num_hidden_layers, config.num_attention_heads
    heads, bias = _fit(taught)
    folder = Path(str(compressor.model.config.name_or_path))
    about = {"items": len(taught), "draft": folder.name}  # its name, not where it lies
    about |= _origin(items, source)
    model = compressor.model
    weights = HeadWeights(heads.reshape(shape), bias, fingerprint(model), about, norms_of(model))
    upper = min(8, shape[0] // 2) * shape[1]  # the first feature that the paper's setting reads
    return Calibration(
        weights,
        len(taught),
        _precision(checked, lambda features: features @ heads),
        _precision(checked, lambda features: features[:, upper:].amax(1)),
    )


def _origin(items: Sequence[EvalItem], source: str | None) -> dict[str, Any]:
    """Source and seed of the items, so that nobody judges the weights on what they learned from.

    The seed stands in the ids; None where they hold none, a list where they hold several.
    """
    found = [re.match(rf"{re.escape(i.task)}-{i.length}-(-?\d+)-", i.id) for i in items]
    seeds = sorted({int(match[1]) for match in found if match})
    kinds = {"generated" if item.task in TASKS else item.task for item in items}
    seed = seeds if len(seeds) > 1 else seeds[0] if seeds else None
    return {"source": source or ", ".join(sorted(kinds)), "seed": seed}


def _read(
    compressor: Compressor, item: EvalItem, tokens: PromptTokens, others: int | None
) -> _Tokens:
    """Features and labels; of what is no evidence, a seeded part that stands for the whole."""
    rows = asking_rows(tokens, SpecPC().window_size)
    weights = row_weights(torch.tensor([rows]), rows, SpecPC().weighted_query)[0]
    found = read_heads(compressor.model, tokens.ids, weights)  # (layers, heads, tokens)
    places = torch.nonzero(~tokens.protected).squeeze(1)
    features = found.flatten(0, 1).T[places]
    if not bool(torch.isfinite(features).all()):
        raise ModelError("The draft's attention is not finite; try another dtype (float32).")
    evidence = torch.zeros(len(tokens), dtype=torch.bool)
    for part in item.evidence:
        place = part.sentence
        inside = (tokens.start < place.end) & (tokens.end > place.start)
        evidence |= (tokens.passage == place.passage) & inside
    evidence = evidence[places]
    share = torch.ones(len(places))
    rest = torch.nonzero(~evidence).squeeze(1).tolist()
    if others is None or len(rest) <= others:
        return _Tokens(features, evidence, share)
    chosen = sorted(random.Random(item.id).sample(rest, others))
    share[chosen] = len(rest) / others
    stays = evidence.clone()
    stays[chosen] = True
    return _Tokens(features[stays], evidence[stays], share[stays])


def _fit(taught: Sequence[_Tokens]) -> tuple[torch.Tensor, float]:
    """(layers * heads,) weights of the raw features, and the bias."""
    from sklearn.linear_model import LogisticRegression

    features = torch.cat([tokens.features for tokens in taught]).double()
    labels = torch.cat([tokens.evidence for tokens in taught])
    shares = torch.cat([tokens.share for tokens in taught])
    mean, spread = features.mean(0), features.std(0)
    spread = torch.where(spread > 0, spread, 1.0)  # a head that sees nothing teaches nothing
    model = LogisticRegression(C=_REGULARISATION, max_iter=1000)
    model.fit(((features - mean) / spread).numpy(), labels.numpy(), sample_weight=shares.numpy())
    heads = torch.from_numpy(model.coef_[0]) / spread
    bias = float(model.intercept_[0]) - float(heads @ mean)
    return heads.float(), bias


def _precision(checked: Sequence[_Tokens], score: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Mean over items of the average precision of finding evidence tokens."""
    from sklearn.metrics import average_precision_score

    values = [
        average_precision_score(tokens.evidence.numpy(), score(tokens.features).numpy())
        for tokens in checked
    ]
    return float(sum(values) / len(values))
