"""Drawing the next token: penalties, filters in float32, noise that depends on (seed, position) alone, or greedy.

The noise is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), a counter-based
generator: no state, so a row draws the same whatever its neighbours, and a replay may start anywhere.

Of the ways to turn noise into a token, Gumbel-max (argmax of logit + Gumbel noise) changes its choice least when logits
change a little (other hardware, another batch size): the chance of another token is about the total variation between
the two distributions. Inverting the cumulative distribution needs one number only, but every rounding moves all later
boundaries. One Gumbel number for each of 49,152 tokens and 64 rows would cost more than the model, so the argmax is
taken in two levels, which is exactly as distributed: first a block of 256 neighbouring token ids by
log-sum-exp(block) + noise, then a token in it by logit + noise: 448 numbers a row.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from steelyard.base.errors import SteelyardError
from steelyard.inference import kernels
from steelyard.inference.endpoint import Sampling
from steelyard.model.headers import quote

BLOCK = 256
FAINT = -80.0  # no noise lifts a token so far down; exp of less is denormal, which processors compute very slowly
MAX_LOGPROBS = 20  # OpenAI's limit
LEADING = 64  # how many leading logits are looked at before a row's nucleus is sorted for in full


def philox(counter: npt.NDArray[np.uint32], key: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Philox4x32-10: counters uint32 [..., 4] and keys uint32 [..., 2] (broadcast) to uint32 [..., 4]."""
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = (key[..., i].astype(np.uint64) for i in range(2))
    for _ in range(10):
        left, right = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (right >> shift) ^ c1 ^ k0, right & low, (left >> shift) ^ c3 ^ k1, left & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1).astype(np.uint32)


def gumbel(seeds: Sequence[int], positions: Sequence[int], count: int) -> Tensor:
    """Standard Gumbel noise, float32 [len(seeds), count], a function of each row's seed and position only.

    Seeds are taken modulo 2**64, positions modulo 2**32. Number i comes from word i % 4 of counter (i // 4, position).
    """
    seed = np.array([s & 0xFFFFFFFFFFFFFFFF for s in seeds], dtype=np.uint64)
    key = np.stack((seed & np.uint64(0xFFFFFFFF), seed >> np.uint64(32)), axis=-1).astype(np.uint32)
    quads = -(-count // 4)
    counter = np.zeros((len(seed), quads, 4), dtype=np.uint32)
    counter[:, :, 0] = np.arange(quads)
    counter[:, :, 1] = np.array([p & 0xFFFFFFFF for p in positions], dtype=np.uint32)[:, None]
    words = philox(counter, key[:, None]).reshape(len(seed), -1)[:, :count]
    uniform = (words.astype(np.float64) + 0.5) * 2.0**-32  # never 0 or 1
    return torch.from_numpy((-np.log(-np.log(uniform))).astype(np.float32))


def whole(kind: type) -> bool:
    """Whether values of this type are whole numbers: Python's or numpy's, and not truth values."""
    return issubclass(kind, int | np.integer) and not issubclass(kind, bool)


def check_sampling(sampling: Sampling, name: str) -> None:
    """Raise SteelyardError, naming the request, the setting and what it may be, for a value that means nothing.

    A request that got past this must not fail in a step, which would end all others with it.
    """
    for setting, (allowed, words) in _ALLOWED.items():
        value = getattr(sampling, setting)
        if not allowed(value):
            raise SteelyardError(f"request {name}: {setting} is {quote(value)}: it must be {words}")


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: (whole(type(value)) or isinstance(value, float | np.floating)) and bool(low <= value <= high)


def _count(low: int, high: float = math.inf) -> Callable[[Any], bool]:
    return lambda value: whole(type(value)) and bool(low <= value <= high)


def _all_of(allowed: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: isinstance(values, Collection) and not isinstance(values, str) and all(map(allowed, values))


# What each setting may be, and in words. Those of temperature and repetition_penalty keep float32 logits finite.
_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (_number(0, 100), "a number from 0 (greedy) to 100"),
    "top_p": (lambda value: _number(0, 1)(value) and value > 0, "a number over 0 and at most 1 (off)"),
    "top_k": (_count(0), "a whole number from 0 (off)"),
    "min_p": (_number(0, 1), "a number from 0 (off) to 1"),
    "repetition_penalty": (_number(0.01, 100), "a number from 0.01 to 100 (1 is off)"),
    "presence_penalty": (_number(-2, 2), "a number from -2 to 2 (0 is off)"),
    "frequency_penalty": (_number(-2, 2), "a number from -2 to 2 (0 is off)"),
    "max_tokens": (_count(1), "a whole number from 1"),
    "stop": (_all_of(lambda value: isinstance(value, str) and value != ""), "strings, none of them empty"),
    "stop_tokens": (_all_of(_count(0)), "token ids, whole numbers from 0"),
    "logprobs": (
        lambda value: value is None or _count(0, MAX_LOGPROBS)(value),
        f"a whole number from 0 to {MAX_LOGPROBS}, or None",
    ),
}


def penalise(
    logits: Tensor, samplings: Sequence[Sampling], histories: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> Tensor:
    """Logits [B, V] with each row's penalties applied, in float32; `logits` itself where no row has any.

    `histories` are each row's tokens: of the prompt, and generated. The formulas are of transformers'
    RepetitionPenaltyLogitsProcessor (over both) and of OpenAI's API (over the generated ones).
    """
    rows = [i for i, sampling in enumerate(samplings) if penalises(sampling)]
    if not rows:
        return logits
    penalised = logits.float() if logits.dtype != torch.float32 else logits.clone()
    for i in rows:
        sampling, row, (prompt, generated) = samplings[i], penalised[i], histories[i]
        if sampling.repetition_penalty != 1:
            seen = torch.tensor(sorted({*prompt, *generated}), device=row.device)
            old = row[seen]
            row[seen] = torch.where(old < 0, old * sampling.repetition_penalty, old / sampling.repetition_penalty)
        if (sampling.presence_penalty or sampling.frequency_penalty) and generated:
            counts = Counter(generated)
            repeats = torch.tensor(list(counts.values()), dtype=torch.float32, device=row.device)
            less = repeats * sampling.frequency_penalty + sampling.presence_penalty
            row[torch.tensor(list(counts), device=row.device)] -= less
    return penalised


def penalises(sampling: Sampling) -> bool:
    """Whether any penalty is on."""
    return sampling.repetition_penalty != 1 or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0


def log_probabilities(
    logits: Tensor, tokens: Sequence[int], counts: Sequence[int]
) -> list[tuple[float, list[tuple[int, float]]]]:
    """For each row of logits [B, V]: the log-probability of its token, and the `counts[i]` likeliest tokens with
    theirs, best first (natural logarithms, float32)."""
    logs = logits.float().log_softmax(-1)
    own = logs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    best = logs.topk(min(max(counts), logs.shape[1]), -1)
    values, ids = best.values.tolist(), best.indices.tolist()
    return [(own[i], list(zip(ids[i][:count], values[i][:count], strict=True))) for i, count in enumerate(counts)]


def choose(logits: Tensor, samplings: Sequence[Sampling], seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
    """The next token of every row: int64 [B], for logits [B, V] of any floating dtype.

    `positions` are the indices of the generated token within its completion. A row's token depends on that row's
    arguments alone. A row whose largest logit is NaN or infinite gives -1.
    """
    compiled = kernels.load(logits.dtype) if logits.device.type == "cpu" and logits.dtype in kernels.SUFFIX else None
    if compiled is not None:
        return compiled.choose(logits.contiguous(), samplings, seeds, positions)
    greedy = [i for i, sampling in enumerate(samplings) if sampling.temperature == 0]
    if len(greedy) == len(samplings):
        return _greedy(logits)
    if not greedy:
        return _draw(logits, samplings, seeds, positions)
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    tokens[greedy] = _greedy(logits[greedy])
    drawn = [i for i, sampling in enumerate(samplings) if sampling.temperature != 0]
    tokens[drawn] = _draw(
        logits[drawn], [samplings[i] for i in drawn], [seeds[i] for i in drawn], [positions[i] for i in drawn]
    )
    return tokens


def margins(logits: Tensor, tokens: Tensor, sampling: Sampling, seed: int, positions: Sequence[int]) -> list[float]:
    """How far each of `tokens` [T], generated at `positions` of one completion, is from what `logits` [T, V] choose.

    0.0 where it is the choice; otherwise the sum, in units of logit / temperature (of logit, where greedy), of what it
    lacks: to pass the filters, for its block to win, and to win in its block. infinity where logits are not finite.
    """
    rows = torch.arange(len(tokens), device=logits.device)
    if sampling.temperature == 0:
        wide = logits.float()
        top = wide.amax(-1)
        lacking = (top - wide[rows, tokens]).masked_fill(~top.isfinite(), torch.inf)
        return [float(value) for value in lacking]
    samplings, count = [sampling] * len(tokens), len(tokens)
    scaled, finite = _scale(logits, samplings)
    own = scaled[rows, tokens]
    threshold = _thresholds(scaled, _weights(scaled), samplings)
    lacking = (threshold - own).clamp_min(0.0) if threshold is not None else torch.zeros_like(own)
    kept = scaled if threshold is None else scaled.masked_fill(scaled < threshold[:, None], -torch.inf)
    kept[rows, tokens] = own
    blocks, within = _noise(kept, [seed] * count, positions)
    mass = _blocks(kept).logsumexp(-1) + blocks
    lacking += mass.amax(-1) - mass[rows, tokens // BLOCK]
    inner = _blocks(kept)[rows, tokens // BLOCK] + within
    lacking += inner.amax(-1) - inner[rows, tokens % BLOCK]
    lacking[~finite] = torch.inf
    return [float(value) for value in lacking]


def _blocks(x: Tensor, filler: float = -torch.inf) -> Tensor:
    """[B, V] as [B, V / BLOCK, BLOCK]; a short last block is filled up (a copy only then)."""
    if x.shape[1] % BLOCK:
        x = F.pad(x, (0, -x.shape[1] % BLOCK), value=filler)
    return x.view(len(x), -1, BLOCK)


def _greedy(logits: Tensor) -> Tensor:
    """argmax, the lowest id on a tie, -1 for rows that are not finite. By blocks: argmax itself is slow, and slower in
    bfloat16, whose conversion to float32 is exact and cheap."""
    blocks = _blocks(logits.float())
    tops = blocks.amax(-1)  # [B, blocks]
    best, block = tops.max(-1)
    token = block * BLOCK + blocks[torch.arange(len(block), device=block.device), block].argmax(-1)
    return torch.where(best.isfinite(), token, -1)


def _scale(logits: Tensor, samplings: Sequence[Sampling]) -> tuple[Tensor, Tensor]:
    """(logits - their maximum) / temperature in float32 [B, V], and which rows are finite [B].

    The maximum goes first, so that no temperature overflows.
    """
    temperatures = torch.tensor([sampling.temperature for sampling in samplings], device=logits.device)
    wide = logits.float()
    top = wide.amax(-1, keepdim=True)
    scaled = torch.sub(wide, top)
    scaled /= temperatures[:, None].clamp_min(torch.finfo(torch.float32).tiny)
    return scaled, top[:, 0].isfinite()


def _weights(scaled: Tensor) -> Tensor:
    """exp(scaled), but never denormal."""
    return scaled.clamp_min(FAINT).exp_()


def _noise(scaled: Tensor, seeds: Sequence[int], positions: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Gumbel numbers for blocks [B, V / BLOCK] and for the tokens of the chosen block [B, BLOCK]."""
    blocks = -(-scaled.shape[1] // BLOCK)
    noise = gumbel(seeds, positions, BLOCK + blocks).to(scaled.device)
    return noise[:, BLOCK:], noise[:, :BLOCK]


def _draw(logits: Tensor, samplings: Sequence[Sampling], seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
    scaled, finite = _scale(logits, samplings)
    weights = _weights(scaled)
    threshold = _thresholds(scaled, weights, samplings)
    if threshold is not None:
        weights.masked_fill_(scaled < threshold[:, None], 0.0)
    for_blocks, within = _noise(scaled, seeds, positions)
    block = (_blocks(weights, 0.0).sum(-1).log() + for_blocks).argmax(-1)  # [B]
    rows = torch.arange(len(block), device=block.device)
    inside = _blocks(scaled)[rows, block]  # [B, BLOCK]
    if threshold is not None:
        inside.masked_fill_(inside < threshold[:, None], -torch.inf)
    token = block * BLOCK + (inside + within).argmax(-1)
    return torch.where(finite, token, -1)


def _thresholds(scaled: Tensor, weights: Tensor, samplings: Sequence[Sampling]) -> Tensor | None:
    """The lowest scaled logit each row keeps under top-k, then top-p, and min-p: float32 [B]; None without filters.

    `weights` are `_weights(scaled)`. Top-p keeps the fewest leading tokens whose probability, among those top-k kept,
    reaches `top_p`. Tokens that tie with the last one kept stay: a threshold does not depend on a sort's order. Min-p
    keeps what has at least `min_p` of the likeliest token's probability (Nguyen et al., "Turning up the heat", 2024).
    """
    leading = _leading_thresholds(scaled, weights, samplings)
    if not any(sampling.min_p for sampling in samplings):
        return leading
    floor = torch.tensor(
        [math.log(sampling.min_p) if sampling.min_p else -math.inf for sampling in samplings], device=scaled.device
    )
    return floor if leading is None else torch.maximum(leading, floor)


def _leading_thresholds(scaled: Tensor, weights: Tensor, samplings: Sequence[Sampling]) -> Tensor | None:
    """`_thresholds` of top-k and top-p."""
    vocab = scaled.shape[1]
    top_k = [sampling.top_k if 0 < sampling.top_k < vocab else vocab for sampling in samplings]
    # over 1 where off: a sum rounded to just 1 must not cut the tail
    top_p = [sampling.top_p if sampling.top_p < 1 else 2.0 for sampling in samplings]
    if not any(k < vocab or p < 1 for k, p in zip(top_k, top_p, strict=True)):
        return None
    totals = weights.sum(-1)  # [B]
    threshold = torch.full_like(totals, -torch.inf)
    # Most rows are settled by a few leading logits, all rows at once
    first = _leading(scaled, min(LEADING, vocab))  # [B, LEADING], descending
    running = first.exp().cumsum(-1)
    ks = torch.tensor(top_k, device=scaled.device).clamp_max(first.shape[1])
    total = torch.where(ks == first.shape[1], totals, running.gather(1, ks[:, None] - 1)[:, 0])
    share = torch.tensor(top_p, device=scaled.device) * total
    # number of leading tokens whose predecessors do not reach the share yet
    count = torch.minimum((running < share[:, None]).sum(-1) + 1, ks)
    settled = first.gather(1, count[:, None] - 1)[:, 0]
    reached = running[:, -1] >= share
    for row, (k, p, done) in enumerate(zip(top_k, top_p, reached.tolist(), strict=True)):
        if not math.isfinite(totals[row]):
            continue  # broken logits, which the caller tells
        if k < first.shape[1] or (k == vocab and p < 1 and done):
            threshold[row] = settled[row]
        elif k < vocab or p < 1:
            threshold[row] = _threshold(scaled[row], float(totals[row]), k, p)
    return threshold


def _threshold(scaled: Tensor, total: float, k: int, p: float) -> Tensor:
    """`_leading_thresholds` of one row [V] whose kept tokens are more than LEADING."""
    vocab = len(scaled)
    if k < vocab:
        kept = scaled.topk(k).values
        total = float(kept.exp().sum())
    else:
        # All tokens lighter than this together weigh less than top-p cuts, so it is the others that need sorting
        kept = scaled[scaled >= math.log((1 - p) * total / vocab)].sort(descending=True).values
    count = int((kept.exp().cumsum(-1) < p * total).sum()) + 1
    return kept[min(count, len(kept)) - 1]


def _leading(scaled: Tensor, count: int) -> Tensor:
    """The `count` largest of every row, descending: [B, count].

    They lie in the `count` groups with the largest maxima, so only these are searched: several times faster than topk
    over the vocabulary.
    """
    group = 32
    if scaled.shape[1] % group or scaled.shape[1] < 4 * group * count:
        return scaled.topk(count, -1).values
    groups = scaled.view(len(scaled), -1, group)
    best = groups.amax(-1).topk(count, -1).indices[:, :, None].expand(-1, -1, group)
    return groups.gather(1, best).reshape(len(scaled), -1).topk(count, -1).values
