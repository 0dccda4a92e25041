"""Training the upper layers of a model over several epochs, with the frozen lower ones computed once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steelyard.base.canonical import digest
from steelyard.model.llama import Llama
from steelyard.train.batch import IGNORE, Batch
from steelyard.train.losses import LossSum, chunked_cross_entropy, chunked_divergence, shared_starts, tensors_digest
from steelyard.train.speed import step_operations


class UpperLayers:
    """Next-token cross-entropy as `losses.CrossEntropy`, for a model whose layers below `first` are frozen.

    What they make of a sample is kept from the first time it is met: [length, C] in the dtype of computation, which is
    2 * C bytes a token in bfloat16. So a sample must always be whole and the same (`sample_ids`), as chat samples are.
    Up to rounding (other neighbours, other order of sums) the loss is CrossEntropy's; a resumed run computes anew.

    Of `anchored` samples the loss is `weight` times the divergence from `teacher`'s distribution instead: the model as
    it was, whose words these samples are. That holds it where it is far better than its own sampled words could.
    """

    name = "cross_entropy of upper layers"
    counts: Literal["tokens"] = "tokens"

    def __init__(
        self, first: int, anchored: Collection[int] = (), teacher: Llama | None = None, weight: float = 1.0
    ) -> None:
        self.first, self.anchored, self.teacher, self.weight = first, frozenset(anchored), teacher, weight
        if self.anchored and teacher is None:
            raise ValueError("anchored samples need the teacher whose they are")
        self._kept: dict[int, Tensor] = {}

    @property
    def settings(self) -> Mapping[str, Any]:
        held: dict[str, Any] = {"first": self.first}
        if self.teacher is not None:
            taught = tensors_digest(dict(self.teacher.named_parameters()))
            held |= {"anchored": digest(sorted(self.anchored)), "weight": self.weight, "teacher": taught}
        return held

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        assert isinstance(model, Llama)
        documents = shared_starts(model, batch)
        rows = documents.rows
        positions, targets = batch.positions[rows], batch.targets[rows]
        if any(sample not in self._kept for sample in batch.sample_ids):
            with torch.no_grad():
                x = model.model.embed_tokens(batch.tokens[rows])
                x = model.through(range(self.first), x, positions, documents)[documents.whole]
            for sample, part in zip(batch.sample_ids, torch.split(x, list(batch.lengths)), strict=True):
                self._kept[sample] = part.clone()
        x = torch.cat([self._kept[sample] for sample in batch.sample_ids])[rows]
        layers = range(self.first, model.config.num_hidden_layers)
        hidden = model.model.norm(model.through(layers, x, positions, documents))
        anchored = torch.tensor([sample in self.anchored for sample in batch.sample_ids], device=x.device)
        anchored = anchored.repeat_interleave(torch.tensor(documents.lengths, device=x.device))
        total = chunked_cross_entropy(hidden, model.head_weight, targets.masked_fill(anchored, IGNORE))
        held = (anchored & (targets != IGNORE)).nonzero()[:, 0]
        if len(held):
            assert self.teacher is not None
            with torch.no_grad():
                through = self.teacher.through(layers, x, positions, documents)[held]
                taught = self.teacher.model.norm(through)
            total = total + self.weight * chunked_divergence(hidden[held], taught, model.head_weight)
        count, above = self.count(batch), model.config.num_hidden_layers - self.first
        operations = step_operations(model, len(rows), batch.lengths, count, self.first)
        if self.teacher is not None and len(held):  # the teacher goes forward: half of what a frozen model's step is
            share = above / model.config.num_hidden_layers
            operations += share * step_operations(self.teacher, len(rows), batch.lengths, 0) / 2
            operations += 2 * len(held) * model.head_weight.numel()
        return LossSum(total, count, operations)

    def count(self, batch: Batch) -> int:
        return int((batch.targets != IGNORE).sum())

    def tokens(self, batch: Batch) -> int:
        return len(batch.tokens)
