"""The training loop: accumulate, divide once, clip, step; measure, validate, checkpoint; resume by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from steelyard.base.progress import Progress
from steelyard.model.llama import Llama
from steelyard.train.batch import Loader
from steelyard.train.losses import Objective

B = TypeVar("B")


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
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of computation; masters are float32
    checkpoint_every: int = 500  # steps; 0: only at the end
    keep_last: int = 2
    keep_best: bool = False  # by validation loss; the result's weights are then the best ones
    evaluate_every: int = 0  # steps; 0: only at the end, where there is validation data
    evaluate_steps: int | None = None  # None: all of the validation data
    activation_checkpointing: bool = False
    compile: Literal["auto", "on", "off"] = "auto"
    seed: int = 0


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


class ChatCheck(Protocol):
    """What preflight asks of chat data (train/chat_data.py gives one)."""

    @property
    def end_of_turn(self) -> frozenset[int]:
        """Token ids that end an answer: at least one of them must be supervised."""
        ...

    def examples(self, count: int) -> Sequence[Sequence[tuple[str, bool]]]:
        """Rendered samples as pieces of text, each with whether it is supervised."""
        ...


def train(
    model: Llama,
    loader: Loader[B],
    objective: Objective[B],
    options: TrainOptions,
    folder: Path,
    *,
    validation: Loader[B] | None = None,
    chat: ChatCheck | None = None,
    progress: Progress,
) -> TrainResult:
    """Train the parameters of `model` with requires_grad, in place; resume from the newest complete checkpoint in
    `folder` (`checkpoints/step-N`). Metrics go to `folder/metrics.jsonl` and `folder/tensorboard`.
    """
    raise NotImplementedError
