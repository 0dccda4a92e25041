"""Perplexity of a model on a text, by sliding window: per token, and per byte, which tokenizers cannot flatter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import ndtri

from steelyard.base.errors import UsageError
from steelyard.base.progress import Progress
from steelyard.inference.engine import Engine
from steelyard.inference.likelihood import log_likelihoods
from steelyard.model.llama import load_llama
from steelyard.model.tokenizer import Tokenizer
from steelyard.safety.measure import TWO_SIDED, Interval
from steelyard.safety.rows import read_text

Z95 = float(ndtri(TWO_SIDED))


@dataclass(frozen=True)
class Perplexity:
    """`per_token` is exp of the mean negative log-likelihood; `bits_per_byte` counts UTF-8 bytes of the text.

    `windows`: each window's sum of negative log-likelihoods (nats) and its number of scored tokens.
    """

    tokens: int
    bytes: int
    per_token: float
    bits_per_byte: float
    windows: tuple[tuple[float, int], ...]


def perplexity(folder: Path, text: Path, progress: Progress, *, window: int = 1024, stride: int = 512) -> Perplexity:
    """Of the model in `folder` on the file `text`, in the model's stored dtype (softmax in float32).

    The text is read in windows of `window` tokens that advance by `stride`: each token is scored once, with at least
    `window - stride + 1` tokens before it but at the text's start. Raises UsageError for sizes that cannot be.
    """
    tokenizer, model = Tokenizer.load(folder), load_llama(folder)
    content = read_text(text)
    if not 1 <= stride <= window <= model.config.max_position_embeddings:
        raise UsageError(
            f"window {window}, stride {stride}: needs 1 <= stride <= window <= {model.config.max_position_embeddings}"
        )
    ids = tokenizer.encode(content, bos=False)
    if len(ids) < 2:
        raise UsageError(f"{text}: {len(ids)} tokens: nothing to predict")
    given: list[list[int]] = []
    scored: list[list[int]] = []
    done = 1  # the first token is given
    while done < len(ids):
        # The first window scores all it holds, a later one its last `stride` tokens.
        end = min(done + stride if scored else 1 + window, len(ids))
        start = max(0, end - 1 - window)  # `window` tokens are read to predict up to the one before `end`
        given.append(ids[start:done])
        scored.append(ids[done:end])
        done = end
    with progress.task(f"perplexity of {folder.name}", len(ids) - 1, "tokens") as task:
        found = log_likelihoods(Engine(model, tokenizer.eos_ids), given, scored, advance=task.advance)
    windows = tuple((-math.fsum(values), len(values)) for values in found)
    total, count, size = math.fsum(loss for loss, _ in windows), len(ids) - 1, len(content.encode())
    return Perplexity(count, size, math.exp(total / count), total / math.log(2) / size, windows)


def relative_rise(before: Perplexity, after: Perplexity) -> Interval:
    """By how much perplexity per token rose, relative to before, paired by window (log ratio, normal interval)."""
    if [count for _, count in before.windows] != [count for _, count in after.windows]:
        raise UsageError("the two models read the text in different tokens: compare bits per byte instead")
    difference = np.array([y - x for (x, _), (y, _) in zip(before.windows, after.windows, strict=True)])
    sizes = np.array([count for _, count in before.windows], float)
    mean = difference.sum() / sizes.sum()
    count = len(sizes)
    if count < 2:
        raise UsageError("one window alone has no interval: give a longer text or a shorter window")
    spread = float(np.sqrt(count / (count - 1) * ((difference - mean * sizes) ** 2).sum()) / sizes.sum())
    low, high = mean - Z95 * spread, mean + Z95 * spread
    return Interval(math.expm1(mean), math.expm1(low), math.expm1(high))
