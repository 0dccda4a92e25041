"""Attention over preference pairs whose prompt is laid down once: [prompt, chosen answer, rejected answer].

The chosen answer reads prompt and itself, the rejected one prompt and itself, neither the other: the same as two
documents that repeat the prompt, at the cost of one prompt. Letters as in `llama.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from steelyard.model.packed import Documents, attend


class Pairs(Documents):
    """Where the pairs of one flat micro-batch lie; takes the place of `lengths` in `Llama.packed`."""

    def __init__(self, shapes: Sequence[tuple[int, int, int]], device: torch.device) -> None:
        """`shapes`: tokens of prompt (at least one), chosen and rejected answer of each pair."""
        self.shapes = tuple(shapes)
        super().__init__([length for p, a, b in self.shapes for length in (p + a, b)], device)
        self.firsts = Documents([p + a for p, a, _ in self.shapes], device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, H, D], k and v [T, K, D] -> [T, H, D]."""
        queries, keys, values = (torch.split(x, list(self.lengths)) for x in (q, k, v))
        firsts = attend(torch.cat(queries[::2]), torch.cat(keys[::2]), torch.cat(values[::2]), self.firsts)
        first = torch.split(firsts, list(self.firsts.lengths))
        out: list[Tensor] = []
        for number, (prompt, _, _) in enumerate(self.shapes):
            before, here = 2 * number, 2 * number + 1
            k, v = (torch.cat((parts[before][:prompt], parts[here])) for parts in (keys, values))
            out += [first[number], _behind(queries[here], k, v)]
        return torch.cat(out)


def _behind(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries [B, H, D] at the end of keys and values [P + B, K, D], causal."""
    later = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, tokens, D]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=later, enable_gqa=q.shape[1] != k.shape[1])
    return y[0].transpose(0, 1)
