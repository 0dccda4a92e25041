"""How many samples would settle what is open."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

MAX_SAMPLE = 10_000_000


def sample_to_settle(bounds: Callable[[float], tuple[float, float]], n: int, threshold: float) -> int | None:
    """The number of samples at which a rate like the one seen would no longer straddle `threshold`.

    `bounds(factor)` gives (lower, upper) had `factor` times the data shown the same rates. The answer is a plan, not a
    promise: it takes the present estimate for the truth. None where even MAX_SAMPLE samples would not settle it: the
    estimate is at the threshold, or the scorer's calibration is what is too small.
    """

    def settled(factor: float) -> bool:
        lower, upper = bounds(factor)
        return upper < threshold or lower > threshold

    low, high = 1.0, 2.0
    while not settled(high):
        low, high = high, high * 2
        if high * n > MAX_SAMPLE:
            return None
    while high / low > 1.005:
        middle = (low + high) / 2
        low, high = (low, middle) if settled(middle) else (middle, high)
    return int(np.ceil(high * n))
