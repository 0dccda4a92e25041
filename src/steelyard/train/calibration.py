"""From scores and labels of held-out rows to a scorer's threshold and its errors."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from steelyard.scorers.base import Calibration


def best_cut(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """The threshold with the best sum of sensitivity and specificity (Youden 1950), between two scores."""
    order = np.argsort(scores, kind="stable")
    below_positive = np.cumsum(positive[order]) / positive.sum()
    below_negative = np.cumsum(~positive[order]) / (~positive).sum()
    values = scores[order]
    last = np.append(values[1:] != values[:-1], False)  # a cut lies between different scores
    gain = np.where(last, below_negative - below_positive, -np.inf)
    best = int(np.argmax(gain))
    return float((values[best] + values[min(best + 1, len(values) - 1)]) / 2)


def calibration_at(
    threshold: float, scores: NDArray[np.float64], positive: NDArray[np.bool_], sources: Iterable[str]
) -> Calibration:
    """The errors at `threshold` (rounded, and kept off 0 and 1) on held-out rows of `sources`."""
    threshold = min(max(round(threshold, 4), 0.001), 0.999)
    called = scores >= threshold
    return Calibration(
        threshold=threshold,
        true_positives=int((called & positive).sum()),
        positives=int(positive.sum()),
        true_negatives=int((~called & ~positive).sum()),
        negatives=int((~positive).sum()),
        source="held-out 15% of: " + ", ".join(sorted(set(sources))),
        measured=datetime.now(UTC).date().isoformat(),
    )
