"""Learned weights of a draft's attention heads, as a token score.

Either of all heads: how likely a logistic model finds a token to belong to the evidence (Sentinel,
arXiv 2505.23277), from the strongest attention of the asking rows, head by head. Or of a few heads
that find evidence (as retrieval heads, arXiv 2506.09944): their mean attention. The modules
`evaluation/calibration.py` and `evaluation/few_heads.py` learn them; using them needs torch only.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from ..config import SpecPC
from ..errors import ModelError, ModelNotFoundError
from ..models.attention_capture import AttentionCall, observing
from ..models.loading import fingerprint
from ..prompt.encoder import PromptTokens
from ..types import TensorValue
from .apart import read_apart

Rows = Literal["max", "mean"]
FILE = "head_weights.json"  # beside the draft's own files
CALIBRATED = "calibrated"  # names that file, or one that the package carries
AUTO = "auto"  # the same where there is one
SHIPPED = Path(__file__).parent / "heads"
logger = logging.getLogger(__name__)
_ALIKE = 0.02  # how far the means of normalisation weights may be apart, relative
_LOADED: WeakKeyDictionary[PreTrainedModel, dict[Path, HeadWeights]] = WeakKeyDictionary()
_CARRIED: WeakKeyDictionary[PreTrainedModel, Path | None] = WeakKeyDictionary()
_SETTLED: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()  # weights are known


@dataclass(frozen=True, slots=True, eq=False)
class HeadWeights(TensorValue):
    """Weights of one draft's heads.

    `rows` says what counts of a head: its strongest asking row ("max", in a logistic model), or the
    mean of its asking rows ("mean", in a plain sum).
    """

    heads: torch.Tensor  # (layers, heads) float32
    bias: float
    weights: str  # fingerprint of the draft they were learned for
    about: Mapping[str, Any] = field(default_factory=dict, hash=False)  # how they were learned
    family: tuple[float, ...] = ()  # `norms_of` that draft: known again however it is quantised
    rows: Rows = "max"

    @property
    def last_layer(self) -> int:
        """The last layer of which a head counts; nothing above it need be computed."""
        used = (self.heads != 0).any(1).nonzero()
        return int(used[-1]) if len(used) else 0

    def scores(self, weighed: torch.Tensor) -> torch.Tensor:
        """Scores of at least 0 from the weighed sum of all heads, same shape.

        The softplus orders tokens as the probability does, but never saturates into ties.
        """
        if self.rows == "mean":
            return (weighed + self.bias).clamp(min=0.0)
        return functional.softplus(weighed + self.bias)

    def fit(self, model: PreTrainedModel) -> bool:
        """Whether a draft is the one that they were learned for, in this or another precision."""
        if self.weights == fingerprint(model):
            return True
        return alike_norms(self.family, norms_of(model))

    def save(self, path: str | Path) -> Path:
        """Write the weights as JSON."""
        row = {
            "weights": self.weights,
            "bias": self.bias,
            "heads": self.heads.tolist(),
            "about": dict(self.about),
            "family": list(self.family),
            "rows": self.rows,
        }
        Path(path).write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> HeadWeights:
        """Read what `save` has written.

        Raises:
            ModelNotFoundError: There is no such file.
            ModelError: It holds something else.
        """
        try:
            row = json.loads(Path(path).read_text(encoding="utf-8"))
            heads = torch.tensor(row["heads"], dtype=torch.float32)
            family = tuple(map(float, row.get("family", ())))
            about = row.get("about", {})
            rows = row.get("rows", "max")
            found = cls(heads, float(row["bias"]), str(row["weights"]), about, family, rows)
        except FileNotFoundError as error:
            raise ModelNotFoundError(
                f"There are no head weights at {str(path)!r}: run `draftsieve calibrate` with this "
                "draft, or leave head_weights out."
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{str(path)!r} holds no head weights: {error}.") from error
        if heads.dim() != 2 or not bool(torch.isfinite(heads).all()):
            raise ModelError(f"{str(path)!r} holds no head weights: no finite layers x heads.")
        if rows not in get_args(Rows):
            raise ModelError(f"{str(path)!r} holds no head weights: rows is {rows!r}.")
        return found


def norms_of(model: PreTrainedModel) -> tuple[float, ...]:
    """The mean weight of each normalisation: what quantising leaves alone, and tells models by."""
    named = model.named_parameters()
    norms = [weight for name, weight in named if weight.dim() == 1 and "norm" in name]
    return tuple(round(float(weight.detach().float().mean()), 5) for weight in norms)


def alike_norms(family: Sequence[float], own: Sequence[float]) -> bool:
    """Whether two `norms_of` are of one model, whatever its precision."""
    pairs = zip(family, own, strict=False)
    alike = all(abs(a - b) <= _ALIKE * max(abs(a), abs(b), 1e-3) for a, b in pairs)
    return bool(family) and len(family) == len(own) and alike


def weights_path(model: PreTrainedModel, source: str | Path) -> Path:
    """The file that `SpecPC.head_weights` names: "calibrated" looks beside the draft, then here.

    Raises:
        ModelError: "calibrated", but the draft was not loaded from a folder, and the package
            carries no weights for it.
    """
    if str(source) != CALIBRATED:
        return Path(source).expanduser()
    folder = Path(str(model.config.name_or_path))
    if (folder / FILE).is_file():
        return folder / FILE
    if (shipped := _shipped(model)) is not None:
        return shipped
    if not folder.is_dir():
        raise ModelError(
            f'head_weights="calibrated" looks beside the draft, but {str(folder)!r} is no folder, '
            "and the package carries no weights for this model: give the path of a file that "
            "`draftsieve calibrate --out FILE` has written."
        )
    return folder / FILE


def _shipped(model: PreTrainedModel) -> Path | None:
    """The file that the package carries for a draft; looked for once a model."""
    if model not in _CARRIED:
        paths = sorted(SHIPPED.glob("*.json"))
        _CARRIED[model] = next((path for path in paths if HeadWeights.load(path).fit(model)), None)
    return _CARRIED[model]


def settled(method: SpecPC, model: PreTrainedModel) -> SpecPC:
    """A method with `head_weights="auto"` as it is for this draft; any other as it is."""
    if method.head_weights != AUTO:
        return method
    if model not in _SETTLED:
        try:
            _SETTLED[model] = weights_path(model, CALIBRATED).is_file()
        except ModelError:
            _SETTLED[model] = False
        if not _SETTLED[model]:
            logger.info(
                "No weights of heads are known for the draft %r: it reads as with the preset "
                "2026-11. `draftsieve calibrate` learns them.",
                str(model.config.name_or_path),
            )
    if _SETTLED[model]:
        return method.model_copy(update={"head_weights": CALIBRATED})
    return method.uncalibrated()


def head_weights(model: PreTrainedModel, source: str | Path) -> HeadWeights:
    """The learned weights of this draft; a file is read once a model.

    Args:
        model: The draft.
        source: `SpecPC.head_weights`.

    Raises:
        ModelNotFoundError: There is no such file.
        ModelError: The weights were learned for another draft.
    """
    path = weights_path(model, source)
    known = _LOADED.setdefault(model, {})
    if path not in known:
        found = HeadWeights.load(path)
        if not found.fit(model):
            raise ModelError(
                f"The head weights in {str(path)!r} were learned for another draft (weights "
                f"{found.weights}, this one has {fingerprint(model)}): run `draftsieve calibrate` "
                "with this draft."
            )
        known[path] = found
    return known[path]


def read_heads(
    model: PreTrainedModel,
    prompt: torch.Tensor | PromptTokens,
    weights: torch.Tensor,
    rows: Rows = "max",
) -> torch.Tensor:
    """How strongly the newest rows of a text look at each of its tokens, head by head.

    Args:
        model: Any causal model.
        prompt: (tokens,) int64; or a prompt whose passages are read apart, see `apart.py`.
        weights: (rows,) weights of the newest rows.
        rows: What counts of a head, see `HeadWeights`.

    Returns:
        (layers, heads, tokens) float32: the maximum or the mean of weighted rows; 0 in layers
        without attention and where a sliding window hides the token.

    Raises:
        ModelError: No attention layer could be observed.
    """
    heads = _Heads(model, len(prompt), weights, rows)
    if isinstance(prompt, PromptTokens):
        read_apart(model, prompt, heads)
    else:
        with torch.no_grad(), observing(model, heads):
            model.get_decoder()(input_ids=prompt.unsqueeze(0).to(model.device), use_cache=False)
    if not heads.called:
        raise ModelError(
            "No attention layer could be observed: this architecture does not use transformers' "
            "attention interface. Choose another model."
        )
    return heads.found


class _Heads:
    """Attention callback that keeps one number a layer, head and token."""

    def __init__(
        self, model: PreTrainedModel, tokens: int, weights: torch.Tensor, rows: Rows
    ) -> None:
        config = model.config.get_text_config()
        self.weights, self.rows = weights, rows
        self.padding = torch.ones((1, tokens), dtype=torch.bool, device=model.device)
        self.found = torch.zeros(config.num_hidden_layers, config.num_attention_heads, tokens)
        self.called = False

    def __call__(self, call: AttentionCall) -> None:
        self.called = True
        probabilities, first = call.probabilities(self.padding, self.weights.numel())
        weights = self.weights.to(probabilities.device).unsqueeze(0)  # (1, rows)
        found = merge_rows(probabilities, weights, self.rows)[0]  # (heads, keys)
        self.found[call.layer, :, first:] = found.cpu()


def merge_rows(probabilities: torch.Tensor, weights: torch.Tensor, rows: Rows) -> torch.Tensor:
    """What counts of each head: its strongest weighted row, or the weighted mean of its rows.

    Args:
        probabilities: (batch, heads, rows, keys) of one layer.
        weights: (batch, rows) of the rows.
        rows: See `HeadWeights`.

    Returns:
        (batch, heads, keys) float32.
    """
    if rows == "max":
        return (probabilities * weights[:, None, :, None]).amax(2)
    shares = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.einsum("bhrk,br->bhk", probabilities, shares)
