"""A classifier on a LLaMA: the stream of a text's last token through one linear layer, a logit for each category.

The last token is the only one that has read the whole text (attention is causal). Loss: binary cross-entropy, summed
over categories, so that a text may belong to several or none. Tune with full weights, upper layers or LoRA
(`tuning.open_for_tuning`); the head is kept beside the model's folder as `classifier.safetensors`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from steelyard.base.canonical import digest
from steelyard.base.errors import FormatError, UsageError
from steelyard.base.files import write_atomic
from steelyard.model.headers import scan_safetensors
from steelyard.model.llama import Llama
from steelyard.train.losses import LossSum
from steelyard.train.packing import permuted
from steelyard.train.speed import step_operations

HEAD_FILE = "classifier.safetensors"


class Classifier(Llama):
    """A LLaMA with a classification head [categories, C] (float32 as a master), in place of what predicts tokens."""

    categories: tuple[str, ...]
    score: nn.Linear

    @classmethod
    def of(cls, model: Llama, categories: Sequence[str], seed: int = 0) -> Classifier:
        """`model`, turned into a classifier in place. The head starts small and always learns."""
        if not categories or len(set(categories)) != len(categories):
            raise UsageError(f"categories {', '.join(categories) or '(none)'}: name at least one, and none twice")
        head = nn.Linear(model.config.hidden_size, len(categories))
        nn.init.normal_(head.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(head.bias)
        model.__class__ = cls
        assert isinstance(model, Classifier)
        model.categories, model.score = tuple(categories), head
        if model.lm_head is not None:
            model.lm_head.requires_grad_(False)  # no token is predicted
        return model

    def logits(self, batch: LabelledBatch) -> Tensor:
        """Float32 [n, categories]."""
        device = self.head_weight.device
        stream = self.packed(batch.tokens.to(device), batch.positions.to(device), batch.lengths)
        last = torch.tensor(batch.lengths, device=device).cumsum(0) - 1
        found: Tensor = self.score(stream[last]).float()
        return found


@dataclass(frozen=True)
class LabelledBatch:
    """n texts, flat as in `Batch`; labels: float32 [n, categories], 0 to 1, NaN where a label is not known."""

    tokens: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    labels: Tensor
    sample_ids: tuple[int, ...]


class BinaryCrossEntropy:
    """The objective over `LabelledBatch`es; what counts are known labels."""

    name = "classifier"
    counts: Literal["labels"] = "labels"
    settings: ClassVar[Mapping[str, Any]] = {}

    def loss(self, model: nn.Module, batch: LabelledBatch) -> LossSum:
        assert isinstance(model, Classifier)
        logits = model.logits(batch)
        labels = batch.labels.to(logits.device)
        known = ~labels.isnan()
        total = F.binary_cross_entropy_with_logits(logits[known], labels[known], reduction="sum")
        right = ((logits.detach() > 0) == (labels > 0.5))[known].float().sum()
        operations = step_operations(model, len(batch.tokens), batch.lengths, 0)
        return LossSum(total, self.count(batch), operations, {"accuracy": right})

    def count(self, batch: LabelledBatch) -> int:
        return int((~batch.labels.isnan()).sum())

    def tokens(self, batch: LabelledBatch) -> int:
        return len(batch.tokens)


class LabelledLoader:
    """`Loader[LabelledBatch]`: micro-batches of `texts_per_micro_batch` texts, each epoch permuted by (seed, epoch)."""

    def __init__(
        self,
        rows: Sequence[tuple[Sequence[int], Sequence[float]]],
        *,
        texts_per_micro_batch: int,
        micro_batches_per_step: int,
        seed: int,
    ) -> None:
        """`rows`: token ids (at least one) and labels of each text. Raises UsageError for none and for empty ones."""
        if not rows or not all(len(tokens) for tokens, _ in rows):
            raise UsageError("no texts, or one without a token: nothing to classify")
        if min(texts_per_micro_batch, micro_batches_per_step) < 1:
            raise UsageError("texts_per_micro_batch and micro_batches_per_step must be at least 1")
        self._rows, self._seed, self._size, self._micro = rows, seed, texts_per_micro_batch, micro_batches_per_step
        content = [[list(map(int, tokens)), [None if y != y else float(y) for y in labels]] for tokens, labels in rows]
        self._digest = digest({"rows": content, "size": self._size, "micro": self._micro, "seed": seed})

    @property
    def digest(self) -> str:
        return self._digest

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._rows) // (self._size * self._micro))

    def step(self, index: int) -> Sequence[LabelledBatch]:
        if index < 0:
            raise ValueError(f"step {index}")
        count, each = len(self._rows), self._size * self._micro
        places = range(index * each, (index + 1) * each)
        chosen = [int(permuted(place % count, count, self._seed, place // count)[0]) for place in places]
        return [labelled(self._rows, chosen[start : start + self._size]) for start in range(0, each, self._size)]


def labelled(rows: Sequence[tuple[Sequence[int], Sequence[float]]], ids: Sequence[int]) -> LabelledBatch:
    """The micro-batch of rows `ids`."""
    texts = [np.asarray(rows[index][0], dtype=np.int64) for index in ids]
    return LabelledBatch(
        torch.from_numpy(np.concatenate(texts)),
        torch.from_numpy(np.concatenate([np.arange(len(text)) for text in texts])),
        tuple(len(text) for text in texts),
        torch.tensor([list(rows[index][1]) for index in ids], dtype=torch.float32),
        tuple(ids),
    )


def save_head(model: Classifier, path: Path) -> None:
    """Write head and categories, beside (not in) the folder that `export_tuned` writes."""
    tensors = {"weight": model.score.weight.detach().cpu().float(), "bias": model.score.bias.detach().cpu().float()}
    write_atomic(path, save(tensors, metadata={str(i): name for i, name in enumerate(model.categories)}))


def load_head(model: Llama, path: Path) -> Classifier:
    """`model` as the classifier whose head is in `path`. Raises FormatError where the two do not fit."""
    infos = scan_safetensors(path)
    with safe_open(path, framework="pt") as file:
        stored = file.metadata() or {}
        names = [stored.get(str(number)) for number in range(len(stored))]
        shapes = {"weight": (len(names), model.config.hidden_size), "bias": (len(names),)}
        if not names or None in names or {name: tuple(info.shape) for name, info in infos.items()} != shapes:
            raise FormatError(f"{path}: does not hold a head of named categories for this model")
        found = Classifier.of(model, [str(name) for name in names])
        with torch.no_grad():
            found.score.weight.copy_(file.get_tensor("weight"))
            found.score.bias.copy_(file.get_tensor("bias"))
    return found
