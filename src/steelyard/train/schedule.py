"""The learning rate as a function of the step's number alone, so that a resumed run goes on exactly where it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from steelyard.base.errors import UsageError


def learning_rate(
    kind: Literal["cosine", "wsd"], peak: float, floor: float, warmup: int, steps: int, decay: float
) -> Callable[[int], float]:
    """The rate of the update number `step`, from 0 to `steps` - 1.

    Linear warm-up over `warmup` steps (its last has the peak), then `cosine`: half a cosine down to `floor`, reached
    at the last step (LLaMA 2, section 2.2); or `wsd`: the peak, then linearly to `floor` over the last `decay` share
    of all steps (warm-up-stable-decay, arXiv 2404.06395). Raises UsageError for what makes no schedule.
    """
    if not 0 <= floor <= peak or not 0 < peak < math.inf:
        raise UsageError(f"learning_rate {peak:g} with min_lr {floor:g}: 0 <= min_lr <= learning_rate must hold")
    if not 0 <= warmup < steps:
        raise UsageError(f"warmup {warmup}: must be fewer than the {steps} steps of the run")
    if not 0 <= decay <= 1:
        raise UsageError(f"decay {decay:g}: must be a share of the steps, from 0 to 1")
    first_decaying = max(warmup, steps - round(decay * steps)) if kind == "wsd" else warmup
    length = steps - first_decaying

    def rate(step: int) -> float:
        if step < warmup:
            return peak * (step + 1) / warmup
        if step < first_decaying:
            return peak
        done = (step - first_decaying + 1) / length if length > 1 or kind == "wsd" else 0.0
        fall = (1 - math.cos(math.pi * done)) / 2 if kind == "cosine" else done
        return peak - (peak - floor) * fall

    return rate
