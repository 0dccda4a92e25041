"""What training minimises. Every loss is a sum over valid tokens (or pairs); the loop divides once, by the number of
valid tokens of the whole global step over all ranks, so neither accumulation nor sharding changes a loss or gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from torch import Tensor, nn

from steelyard.model.llama import Llama
from steelyard.train.batch import IGNORE, Batch

BC = TypeVar("BC", contravariant=True)


@dataclass(frozen=True)
class LossSum:
    """A micro-batch's loss as a sum, float32 scalar with gradient; `metrics` are sums over the same `count` too."""

    total: Tensor
    count: int
    metrics: Mapping[str, float | Tensor] = field(default_factory=dict)


class Objective(Protocol[BC]):
    """What a method optimises. `model` in `loss` is the compute copy (bfloat16 where asked), not the masters."""

    @property
    def name(self) -> str: ...

    def loss(self, model: nn.Module, batch: BC) -> LossSum: ...

    def count(self, batch: BC) -> int:
        """Valid tokens or pairs, without a forward pass."""
        ...

    def tokens(self, batch: BC) -> int:
        """Tokens processed, for throughput."""
        ...


class CrossEntropy:
    """Next-token cross-entropy over the supervised tokens of packed batches: pretraining and SFT alike."""

    name = "cross_entropy"

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        assert isinstance(model, Llama)
        hidden = model.packed(batch.tokens, batch.positions, batch.lengths)
        return LossSum(chunked_cross_entropy(hidden, model.head_weight, batch.targets), self.count(batch))

    def count(self, batch: Batch) -> int:
        return int((batch.targets != IGNORE).sum())

    def tokens(self, batch: Batch) -> int:
        return len(batch.tokens)


def chunked_cross_entropy(hidden: Tensor, head_weight: Tensor, targets: Tensor, chunk: int = 1024) -> Tensor:
    """Sum of the cross-entropies of `targets` int64 [T] (IGNORE is left out) under softmax(hidden @ head_weight.T).

    hidden [T, C] and head_weight [V, C] share a dtype; softmax and sum are float32. Logits exist for `chunk` rows at a
    time only: the gradients of both inputs are computed in the forward pass.
    """
    raise NotImplementedError
