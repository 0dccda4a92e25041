"""Training the upper layers of a model over several epochs, with the frozen lower ones computed once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from steelyard.model.llama import Llama
from steelyard.model.packed import Documents
from steelyard.train.batch import IGNORE, Batch
from steelyard.train.losses import LossSum, chunked_cross_entropy


class UpperLayers:
    """Next-token cross-entropy as `losses.CrossEntropy`, for a model whose layers below `first` are frozen.

    What they make of a sample is kept from the first time it is met: [length, C] in the dtype of computation, which is
    2 * C bytes a token in bfloat16. So a sample must always be whole and the same (`sample_ids`), as chat samples are.
    Up to rounding (other neighbours, other order of sums) the loss is CrossEntropy's; a resumed run computes anew.
    """

    name = "cross_entropy of upper layers"

    def __init__(self, first: int) -> None:
        self.first = first
        self._kept: dict[int, Tensor] = {}

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        assert isinstance(model, Llama)
        documents = Documents(batch.lengths, batch.tokens.device)
        if any(sample not in self._kept for sample in batch.sample_ids):
            with torch.no_grad():
                x = model.through(range(self.first), model.model.embed_tokens(batch.tokens), batch.positions, documents)
            for sample, part in zip(batch.sample_ids, torch.split(x, list(batch.lengths)), strict=True):
                self._kept[sample] = part.clone()
        x = torch.cat([self._kept[sample] for sample in batch.sample_ids])
        layers = range(self.first, model.config.num_hidden_layers)
        hidden = model.model.norm(model.through(layers, x, batch.positions, documents))
        return LossSum(chunked_cross_entropy(hidden, model.head_weight, batch.targets), self.count(batch))

    def count(self, batch: Batch) -> int:
        return int((batch.targets != IGNORE).sum())

    def tokens(self, batch: Batch) -> int:
        return len(batch.tokens)
