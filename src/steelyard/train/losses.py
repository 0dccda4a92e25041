"""What training minimises. Every loss is a sum over valid tokens (or pairs); the loop divides once, by the number of
valid tokens of the whole global step over all ranks, so neither accumulation nor sharding changes a loss or gradient.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from steelyard.model.llama import Llama
from steelyard.model.shared import SharedStarts
from steelyard.train.batch import IGNORE, Batch
from steelyard.train.speed import step_operations

BC = TypeVar("BC", contravariant=True)


@dataclass(frozen=True)
class LossSum:
    """A micro-batch's loss as a sum, float32 scalar with gradient; `metrics` are sums over the same `count` too.

    `operations`: of its products, forward and backward.
    """

    total: Tensor
    count: int
    operations: float
    metrics: Mapping[str, float | Tensor] = field(default_factory=dict)


class Objective(Protocol[BC]):
    """What a method optimises. `model` in `loss` is the compute copy (bfloat16 where asked), not the masters."""

    @property
    def name(self) -> str: ...

    @property
    def counts(self) -> Literal["tokens", "pairs", "labels"]:
        """What `count` counts."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """What else decides the loss, as JSON: a checkpoint made with others is refused."""
        ...

    def loss(self, model: nn.Module, batch: BC) -> LossSum: ...

    def count(self, batch: BC) -> int:
        """Valid tokens, pairs or labels, without a forward pass."""
        ...

    def tokens(self, batch: BC) -> int:
        """Tokens processed, for throughput."""
        ...


class CrossEntropy:
    """Next-token cross-entropy over the supervised tokens of packed batches: pretraining and SFT alike."""

    name = "cross_entropy"
    counts: Literal["tokens"] = "tokens"
    settings: ClassVar[Mapping[str, Any]] = {}

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        assert isinstance(model, Llama)
        documents = shared_starts(model, batch)
        rows = documents.rows
        hidden = model.packed(batch.tokens[rows], batch.positions[rows], documents)
        total, count = chunked_cross_entropy(hidden, model.head_weight, batch.targets[rows]), self.count(batch)
        return LossSum(total, count, step_operations(model, len(rows), batch.lengths, count))

    def count(self, batch: Batch) -> int:
        return int((batch.targets != IGNORE).sum())

    def tokens(self, batch: Batch) -> int:
        return len(batch.tokens)


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and bytes, in the order of names; about 0.6 s a GB."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def shared_starts(model: Llama, batch: Batch) -> SharedStarts:
    """The batch's documents, what several of them begin with laid down once."""
    wanted = batch.targets != IGNORE
    if model.config.rope.type == "dynamic":  # positions turn by a document's own length: nothing is the same
        wanted = torch.ones_like(wanted)
    return SharedStarts(batch.tokens, batch.lengths, wanted)


def chunked_cross_entropy(hidden: Tensor, head_weight: Tensor, targets: Tensor, chunk: int | None = None) -> Tensor:
    """Sum of the cross-entropies of `targets` int64 [T] (IGNORE is left out) under softmax(hidden @ head_weight.T).

    hidden [T, C] and head_weight [V, C] share a dtype; softmax and sum are float32. Logits exist for `chunk` rows at a
    time only (None: what 32 MiB of float32 hold): the gradients of both inputs are computed in the forward pass.
    """
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, head_weight, targets, chunk)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int | None) -> Tensor:
        rows = chunk or max(64, 2**23 // len(weight))
        kept = (targets != IGNORE).nonzero()[:, 0]  # rows without a target cost nothing
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if wants_hidden else None
        # float32 also for bfloat16 weights: it is a sum over chunks
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        for part in torch.split(kept, rows):
            x, y = hidden[part], targets[part]  # [n, C], [n]
            scores = x @ weight.T  # [n, V]
            loss = _softmax_(scores, y)
            total += loss
            if grad_hidden is not None:
                grad_hidden[part] = scores @ weight
            if grad_weight is not None:
                grad_weight += scores.T @ x
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        scale = grads[0]
        hidden, weight = (None if saved is None else saved * scale.to(saved.dtype) for saved in ctx.saved_tensors)
        return hidden, weight, None, None


def chunked_divergence(hidden: Tensor, teacher: Tensor, head_weight: Tensor, chunk: int = 128) -> Tensor:
    """Sum over rows of KL(teacher's distribution || the model's) under one frozen head: softmax(. @ head_weight.T).

    hidden and teacher [T, C] and head_weight [V, C] share a dtype; softmax and sum are float32. Logits exist for
    `chunk` rows at a time only. Hinton et al., "Distilling the knowledge in a neural network", 2015, at temperature 1.
    """
    loss: Tensor = _ChunkedDivergence.apply(hidden, teacher, head_weight, chunk)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, teacher: Tensor, weight: Tensor, chunk: int) -> Tensor:
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            raise ValueError("teacher and head must be frozen")
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            mine = (hidden[part] @ weight.T).float().log_softmax(-1)
            theirs = (teacher[part] @ weight.T).float().log_softmax(-1)
            shares = theirs.exp()
            total += (shares * (theirs - mine)).sum()
            grad[part] = (mine.exp_() - shares).to(weight.dtype) @ weight
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0].to(grad.dtype), None, None, None


def _softmax_(scores: Tensor, targets: Tensor) -> Tensor:
    """The summed cross-entropy of logits [n, V]; in their place, its derivative: softmax less 1 at the target.

    A few rows at a time in float32: what does not leave the cache is three times faster on a CPU.
    """
    total = torch.zeros((), dtype=torch.float32, device=scores.device)
    if not len(scores):
        return total
    rows = max(16, 2**20 // scores.shape[1]) if scores.device.type == "cpu" else len(scores)
    for part, target in zip(torch.split(scores, rows), torch.split(targets, rows), strict=True):
        wide = part.float()
        shares = torch.softmax(wide, -1)
        # log-sum-exp is the largest logit less the logarithm of its share
        total += (wide.amax(-1) - shares.amax(-1).log() - wide.gather(1, target[:, None])[:, 0]).sum()
        shares.scatter_add_(1, target[:, None], shares.new_full((len(target), 1), -1.0))
        part.copy_(shares)
    return total
