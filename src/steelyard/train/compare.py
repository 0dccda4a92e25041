"""How many bits a model needs for each byte of text it never saw, beside compressors and an n-gram model.

Every method is given the same training text and codes the same held-out documents. The model and the n-gram model pay
for each document's end; compressors get the documents joined by blank lines.
"""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from steelyard.base.errors import SteelyardError, UsageError
from steelyard.base.progress import Progress, Silent
from steelyard.corpus.ngram import KneserNey
from steelyard.corpus.shards import Shards
from steelyard.model.llama import Llama

_ROWS = 8  # windows of one length in a forward pass


@dataclass(frozen=True)
class Measure:
    """One method's bits for each byte of the validation text. `given`: what it knew, in words; `rival`: whether the
    model is to beat it (xz behind the training text is shown for fairness: it copies what documents have in common).
    """

    name: str
    bits_per_byte: float
    given: str
    rival: bool = True


@torch.no_grad()
def model_bits(model: Llama, shards: Shards, *, window: int, progress: Progress | None = None) -> float:
    """Bits that `model` needs for all documents of `shards` but each one's first token (the beginning of sequence).

    Windows of `window` tokens move on by half, so each token but a document's first ones has at least window / 2
    tokens before it. Raises UsageError for a window that the model has no positions for, SteelyardError where the
    shards' vocabulary is larger than the model's.
    """
    if not 2 <= window <= model.config.max_position_embeddings:
        raise UsageError(f"a window of {window}: the model has {model.config.max_position_embeddings} positions")
    if shards.manifest.vocab_size > model.config.vocab_size:
        raise SteelyardError(
            f"the shards have {shards.manifest.vocab_size:,} tokens, the model {model.config.vocab_size:,}: they were "
            "made with another tokenizer"
        )
    pieces = sorted(_windows(shards.lengths, window), key=lambda piece: piece[2] - piece[1])
    total = 0.0
    model.eval()
    with (progress or Silent()).task("bits of held-out text", len(pieces), "windows") as task:
        while pieces:
            length = pieces[-1][2] - pieces[-1][1]
            taken: list[tuple[int, int, int, int]] = []
            while pieces and len(taken) < _ROWS and pieces[-1][2] - pieces[-1][1] == length:
                taken.append(pieces.pop())
            rows = torch.from_numpy(np.stack([shards.tokens(sample, start, end) for sample, start, end, _ in taken]))
            logits = model(rows[:, :-1].to(model.head_weight.device)).float()
            losses = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none").view(len(taken), -1)
            for row, (_, start, _, first) in zip(losses, taken, strict=True):
                total += float(row[first - start - 1 :].sum())
            task.advance(len(taken))
    return total / math.log(2)


def _windows(lengths: Sequence[int] | np.ndarray[Any, Any], window: int) -> list[tuple[int, int, int, int]]:
    """(document, start, end, first): tokens start to end are read, those from `first` on are counted."""
    found = []
    for sample, length in enumerate(int(length) for length in lengths):
        first, start = 1, 0
        while first < length:
            end = min(start + window, length)
            found.append((sample, start, end, first))
            first, start = end, max(end - (window - window // 2), 0)
    return found


def compressed_bits(train: bytes, validation: bytes) -> list[tuple[str, float, str]]:
    """(name, bits, what it knew) of gzip and xz at their best, and of xz behind the training text.

    The last one is what xz adds for the validation text when it has just compressed the training text: its dictionary
    (64 MiB) then holds all of it, which is a preset dictionary by another name.
    """
    best = lzma.PRESET_EXTREME | 9

    def xz(data: bytes) -> int:
        return len(lzma.compress(data, preset=best))

    if len(train) + len(validation) > 64 << 20:
        raise UsageError("over 64 MiB of text: xz's dictionary would not hold it")
    alone = "the validation text alone"
    return [
        ("gzip -9", 8.0 * len(gzip.compress(validation, 9)), alone),
        ("xz -9e", 8.0 * xz(validation), alone),
        ("xz -9e after the training text", 8.0 * (xz(train + validation) - xz(train)), "the training text before it"),
    ]


def compare(
    model: Llama,
    train: Shards,
    validation: Shards,
    texts: tuple[bytes, bytes],
    *,
    window: int,
    order: int = 5,
    progress: Progress | None = None,
) -> list[Measure]:
    """All methods on the documents of `validation`, the fewest bits first; `texts` are training and validation text."""
    progress = progress or Silent()
    size = validation.manifest.bytes
    measures = []

    def add(name: str, given: str, bits: Callable[[], float]) -> None:
        progress.say(f"measuring {name}")
        measures.append(Measure(name, bits() / size, given))

    parameters = sum(parameter.numel() for parameter in model.parameters())
    add(
        f"this model ({parameters / 1e6:.1f}M)",
        f"the training tokens; {window // 2} to {window} tokens of context",
        lambda: model_bits(model, validation, window=window, progress=progress),
    )

    def ngram() -> float:
        tokens, ends = train.stream(0, len(train)), train.ends
        fitted = KneserNey.fit(tokens, ends, order=order, vocab_size=train.manifest.vocab_size)
        return float(fitted.bits(validation.stream(0, len(validation)), validation.ends).sum())

    add(f"modified Kneser-Ney {order}-gram", f"the training tokens; {order - 1} tokens of context", ngram)
    progress.say("measuring gzip and xz")
    measures += [
        Measure(name, bits / size, given, rival="after" not in name) for name, bits, given in compressed_bits(*texts)
    ]
    return sorted(measures, key=lambda measure: measure.bits_per_byte)


def as_json(measures: Sequence[Measure]) -> list[dict[str, Any]]:
    return [asdict(measure) for measure in measures]
