"""95 % intervals for rates, and for the difference of two rates measured on the same items."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist

import torch


def wilson(successes: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a rate (Wilson, 1927); (0, 1) where nothing was measured.

    Args:
        successes: Items that succeeded, between 0 and `total`.
        total: Items measured.
        confidence: Coverage of the interval, in (0, 1).
    """
    if not 0 <= successes <= total:
        raise ValueError(f"successes must lie between 0 and {total}, but is {successes}.")
    if total == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = successes / total
    scale = 1 + z * z / total
    centre = (rate + z * z / (2 * total)) / scale
    half = z * sqrt(rate * (1 - rate) / total + z * z / (4 * total * total)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_mean(
    values: Sequence[float], *, confidence: float = 0.95, samples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of values measured item by item, and its percentile bootstrap interval.

    Args:
        values: At least one.
        confidence: Coverage of the interval, in (0, 1).
        samples: Number of bootstrap samples.
        seed: Seed of the resampling.

    Returns:
        The mean, the lower and the upper end.
    """
    if not values:
        raise ValueError("an interval needs at least one value, but there is none.")
    measured = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(measured), (samples, len(measured)), generator=generator)
    means = measured[picks].mean(dim=1)  # (samples,)
    tail = (1 - confidence) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return float(measured.mean()), float(low), float(high)


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    *,
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Mean of `first` minus mean of `second`, and its bootstrap interval over items.

    Args:
        first: Outcomes of one method, item by item.
        second: Outcomes of the other method on the same items, in the same order.
        confidence: Coverage of the percentile interval, in (0, 1).
        samples: Number of bootstrap samples.
        seed: Seed of the resampling.

    Returns:
        The difference, the lower and the upper end.
    """
    if len(first) != len(second) or not first:
        raise ValueError(
            f"paired outcomes need the same number of items, at least one: "
            f"got {len(first)} and {len(second)}."
        )
    differences = [float(a) - float(b) for a, b in zip(first, second, strict=True)]
    return bootstrap_mean(differences, confidence=confidence, samples=samples, seed=seed)


def ratio_of_means(
    first: Sequence[float],
    second: Sequence[float],
    *,
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Mean of `first` over mean of `second`, and its bootstrap interval over items.

    Args:
        first: Values of one method, item by item.
        second: Values of the other method on the same items, at least one above 0 and none below.
        confidence: Coverage of the percentile interval, in (0, 1).
        samples: Number of bootstrap samples; those without a value above 0 are left out.
        seed: Seed of the resampling.

    Returns:
        The ratio, the lower and the upper end.
    """
    if len(first) != len(second) or not any(second):
        raise ValueError(
            "a ratio needs the same number of items, and a mean above 0 below the line: got "
            f"{len(first)} and {len(second)}."
        )
    both = torch.tensor([first, second], dtype=torch.float64)  # (2, items)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(first), (samples, len(first)), generator=generator)
    above, below = both[:, picks].sum(dim=2)  # (samples,) each
    drawn = (above / below)[below > 0]
    tail = (1 - confidence) / 2
    low, high = torch.quantile(drawn, torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return float(both[0].sum() / both[1].sum()), float(low), float(high)
