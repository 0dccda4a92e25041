"""The parts of the decoder's training forward that differ from inference: documents lie one after another in one flat
sequence, linear layers run over all tokens at once, attention never crosses a document.

Letters as in `llama.py`; T is the number of tokens of all documents together.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 64  # queries of one block: its scores stay in the cache, and few of them are masked
BLOCKED_UP_TO = 1024  # tokens of a document; probabilities are kept for the backward pass, so memory grows with it


class Documents:
    """Where the documents of one flat micro-batch lie, grouped by length: one attention call for each length."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = tuple(lengths)
        self.groups: dict[int, list[int]] = {}
        for index, length in enumerate(self.lengths):
            self.groups.setdefault(length, []).append(index)
        self.longest = max(self.lengths)
        self.bounds: Tensor | None = None  # int32 [N + 1], only where the variable-length kernel runs
        if device.type == "cuda":
            ends = torch.tensor((0, *self.lengths), dtype=torch.int64).cumsum(0)
            self.bounds = ends.to(device=device, dtype=torch.int32)
        self._buckets: list[Bucket] | None = None

    def buckets(self) -> list[Bucket]:
        """The documents in groups of nearly equal length, made once for all layers."""
        if self._buckets is None:
            self._buckets = list(_buckets(self.lengths))
        return self._buckets

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`attend` over these documents; preference pairs that share a prompt have their own (`model/pairs.py`)."""
        return attend(q, k, v, self)


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Causal attention inside each document: q [T, H, D], k and v [T, K, D] -> [T, H, D]."""
    # not measured: no GPU was at hand
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and _has_variable_length():
        return _variable_length(q, k, v, documents)
    if not q.is_cuda and torch.is_grad_enabled() and documents.longest <= BLOCKED_UP_TO:
        blocked: Tensor = _Blocked.apply(q, k, v, documents)  # type: ignore[no-untyped-call]
        return blocked
    if len(documents.groups) == 1:
        shape = (len(documents.lengths), documents.longest)
        return _same_length(*(x.reshape(*shape, *x.shape[1:]) for x in (q, k, v))).flatten(0, 1)
    parts = [torch.split(x, list(documents.lengths)) for x in (q, k, v)]
    out: list[Tensor] = [q] * len(documents.lengths)
    for members in documents.groups.values():
        stacked = (torch.stack([part[i] for i in members]) for part in parts)
        for i, y in zip(members, _same_length(*stacked).unbind(), strict=True):
            out[i] = y
    return torch.cat(out)


class Bucket:
    """Documents of nearly equal length as one batch of N rows of L tokens.

    Short ones are filled up at their end by repeating the last token: attention is causal, so no real token sees that.
    """

    def __init__(self, starts: Sequence[int], lengths: Sequence[int], whole: bool) -> None:
        self.rows, self.length = len(starts), max(lengths)
        self.whole = whole  # the documents are all of the micro-batch, in its order and of one length
        place = torch.arange(self.length)
        last = torch.tensor(lengths)[:, None] - 1
        self.index = (torch.tensor(starts)[:, None] + place.minimum(last)).flatten()  # int64 [N * L]
        self.kept = (place <= last).flatten().nonzero()[:, 0]  # which of them are no filling
        self.target = self.index[self.kept]

    def take(self, x: Tensor, kv_heads: int) -> Tensor:
        """[T, heads, D] -> contiguous [N * K, heads / K, L, D]."""
        rows = x if self.whole else x[self.index]
        parts = rows.reshape(self.rows, self.length, kv_heads, -1, x.shape[-1]).permute(0, 2, 3, 1, 4)
        return parts.reshape(self.rows * kv_heads, -1, self.length, x.shape[-1])

    def put(self, y: Tensor, kv_heads: int, out: Tensor) -> None:
        """The inverse of `take`, into the rows of `out` that are this bucket's."""
        parts = y.view(self.rows, kv_heads, -1, self.length, y.shape[-1]).permute(0, 3, 1, 2, 4)
        rows = parts.reshape(self.rows * self.length, *out.shape[1:])
        if self.whole:
            out.copy_(rows)
        else:
            out[self.target] = rows[self.kept].to(out.dtype)


def _buckets(lengths: Sequence[int]) -> Iterator[Bucket]:
    if len(set(lengths)) == 1:
        yield Bucket([i * lengths[0] for i in range(len(lengths))], lengths, True)
        return
    groups: dict[int, list[tuple[int, int]]] = {}
    start = 0
    for length in lengths:
        groups.setdefault(math.ceil(length / BLOCK), []).append((start, length))
        start += length
    for _, members in sorted(groups.items()):
        yield Bucket([start for start, _ in members], [length for _, length in members], False)


class _Blocked(torch.autograd.Function):
    """Causal attention by blocks of queries in plain matrix products: on a CPU, forward and backward together take
    less than half the time of PyTorch's own (docs/log.md). Scores and softmax are float32.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        kv_heads = k.shape[1]
        ctx.documents, ctx.kv_heads, ctx.shapes = documents, kv_heads, (q.shape, k.shape)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        saved: list[Tensor] = []
        for bucket in documents.buckets():
            parts = [bucket.take(x, kv_heads) for x in (q, k, v)]
            y, probabilities = _forward(parts[0], parts[1][:, 0], parts[2][:, 0])
            bucket.put(y, kv_heads, out)
            saved += [*parts, y, *probabilities]
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        saved, kv_heads = list(ctx.saved_tensors), ctx.kv_heads
        (q_shape, k_shape), slope = ctx.shapes, slopes[0]
        dq, dk, dv = (torch.empty(shape, dtype=slope.dtype) for shape in (q_shape, k_shape, k_shape))
        for bucket in ctx.documents.buckets():
            count = 4 + math.ceil(bucket.length / BLOCK)
            (q, k, v, y), probabilities = saved[:4], saved[4:count]
            del saved[:count]
            taken = bucket.take(slope, kv_heads)
            if not bucket.whole:  # what fills a row up has no slope
                rows = torch.zeros(bucket.rows * bucket.length, dtype=torch.bool)
                rows[bucket.kept] = True
                real = rows.view(bucket.rows, 1, 1, bucket.length, 1)
                shape = (bucket.rows, kv_heads, -1, bucket.length, taken.shape[-1])
                taken = (taken.view(shape) * real).view_as(taken)
            for part, out in zip(_backward(q, k[:, 0], v[:, 0], y, probabilities, taken), (dq, dk, dv), strict=True):
                bucket.put(part, kv_heads, out)
        return dq, dk, dv, None


def _forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
    """q [M, G, L, D], k and v [M, L, D] -> output like q, and each block's probabilities [M, G * rows, keys]."""
    many, group, length, width = q.shape
    scaled, keys = q.float() * width**-0.5, k.float().transpose(1, 2)
    out, kept = torch.empty_like(q), []
    later = torch.full((BLOCK, BLOCK), -math.inf).triu_(1)
    for start in range(0, length, BLOCK):
        end = min(length, start + BLOCK)
        rows = end - start
        scores = torch.bmm(scaled[:, :, start:end].reshape(many, group * rows, width), keys[:, :, :end])
        scores.view(many, group, rows, end)[..., start:].add_(later[:rows, :rows])
        probabilities = torch.softmax(scores, -1).to(q.dtype)
        out[:, :, start:end] = torch.bmm(probabilities, v[:, :end]).view(many, group, rows, width)
        kept.append(probabilities)
    return out, kept


def _backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Sequence[Tensor], slope: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Slopes of q, k and v from that of the output; formulas of FlashAttention (arXiv 2205.14135, appendix B.4)."""
    many, group, length, width = q.shape
    delta = (slope.float() * out.float()).sum(-1, keepdim=True)  # [M, G, L, 1]
    wide, values = slope.float(), v.float().transpose(1, 2)
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros(many, length, width, dtype=torch.float32) for _ in range(2))
    for start, probabilities in zip(range(0, length, BLOCK), kept, strict=True):
        end = min(length, start + BLOCK)
        rows = end - start
        flat = (many, group * rows, -1)
        slopes = torch.bmm(wide[:, :, start:end].reshape(flat), values[:, :, :end])  # of the probabilities
        slopes = slopes.sub_(delta[:, :, start:end].reshape(flat)).mul_(probabilities).to(q.dtype)  # of the scores
        dv[:, :end] += torch.bmm(probabilities.transpose(1, 2), slope[:, :, start:end].reshape(flat))
        dk[:, :end] += torch.bmm(slopes.transpose(1, 2), q[:, :, start:end].reshape(flat))
        block = torch.bmm(slopes, k[:, :end]).view(many, group, rows, width)
        torch.mul(block, width**-0.5, out=dq[:, :, start:end])
    return dq, dk.mul_(width**-0.5), dv


def _same_length(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[N, L, H, D], [N, L, K, D] twice -> [N, L, H, D]."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)


@functools.cache
def _has_variable_length() -> bool:
    """Whether this PyTorch's kernel takes grouped heads and a causal window; older ones do not."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys()


def _variable_length(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = documents.bounds, documents.longest
    assert bounds is not None
    out = varlen_attn(
        q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0), enable_gqa=q.shape[1] != k.shape[1]
    )
    assert isinstance(out, Tensor)
    return out


def together(x: Tensor, *layers: nn.Module) -> Sequence[Tensor]:
    """Each layer's output for the same x. Plain linear layers run as one product over their stacked weights."""
    if not all(type(layer) is nn.Linear and layer.bias is None for layer in layers):
        return [layer(x) for layer in layers]
    weights = [layer.weight for layer in layers if isinstance(layer, nn.Linear)]
    return torch.split(F.linear(x, torch.cat(weights)), [len(weight) for weight in weights], dim=-1)
