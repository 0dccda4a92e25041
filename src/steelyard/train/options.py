"""How to train, and what a run says when it has."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from steelyard.base.errors import UsageError

Number = Literal["auto", "bfloat16", "float32"]


@dataclass(frozen=True)
class TrainOptions:
    """How to train. Steps are global steps (one optimizer update); defaults are LLaMA 2's (table 1 and section 2.2)."""

    steps: int | None = None  # exactly one of steps and epochs
    epochs: float | None = None
    learning_rate: float = 3e-4
    min_lr: float | None = None  # None: a tenth of learning_rate
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup: int = 0  # steps of linear warm-up
    decay: float = 0.2  # wsd: the last share of the steps, in which the rate falls to min_lr
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-5
    weight_decay: float = 0.1
    clip: float = 1.0  # global gradient norm; 0 does not clip
    dtype: Number = "auto"  # of computation, see `speed.compute_dtype`; masters are float32
    checkpoint_every: int = 500  # steps; 0: only at the end
    keep_last: int = 2
    keep_best: bool = False  # by validation loss; the result's weights are then the best ones
    evaluate_every: int = 0  # steps; 0: only at the end, where there is validation data
    evaluate_steps: int | None = None  # None: all of the validation data
    activation_checkpointing: bool = False
    compile: Literal["auto", "on", "off"] = "auto"  # auto: decided once a run, at its start
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise UsageError("exactly one of steps and epochs must be given")
        if (self.steps or 0) < 0 or self.steps == 0 or (self.epochs is not None and not 0 < self.epochs < math.inf):
            raise UsageError(f"steps {self.steps}, epochs {self.epochs}: must be positive")
        if self.dtype not in get_args(Number) or self.compile not in ("auto", "on", "off"):
            raise UsageError(f"dtype {self.dtype!r} or compile {self.compile!r}: not one of those known")
        if self.schedule not in ("cosine", "wsd"):
            raise UsageError(f"schedule {self.schedule!r}: must be cosine or wsd")
        counts = ("warmup", "clip", "checkpoint_every", "evaluate_every", "weight_decay")
        for name in counts:
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name} {getattr(self, name)}: must not be negative")
        if self.keep_last < 1:
            raise UsageError(f"keep_last {self.keep_last}: at least the newest checkpoint must be kept")

    def total_steps(self, steps_per_epoch: int) -> int:
        """Global steps of the run."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, math.ceil(self.epochs * steps_per_epoch - 1e-9))


@dataclass(frozen=True)
class TrainResult:
    """What a finished run did. Losses are means per valid token (or pair); `model` of `train` holds the weights."""

    steps: int
    tokens: int
    loss: float
    validation_loss: float | None
    best_step: int | None
    seconds: float  # of this process, without preflight
    tokens_per_second: float
    mfu: float  # share of the measured matrix-product rate
    folder: Path
    checkpoint: Path
