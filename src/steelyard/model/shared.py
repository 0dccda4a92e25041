"""Documents that begin alike, as chats under one system prompt do: what they share is computed once.

Attention is causal, so a shared start is the same in every document. Only attention itself runs over all tokens; what
costs time, the linear layers, runs over each start once. Loss and gradients are those of separate documents, up to
rounding. Letters as in `llama.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from steelyard.model.packed import Documents, attend

WORTH = 8  # tokens in common from which sharing pays


class SharedStarts(Documents):
    """Takes the place of `lengths` in `Llama.packed`, for the tokens `rows` of a flat micro-batch.

    rows: int64 [S], which of the T tokens are computed; everything else that goes with them is to be indexed by it.
    whole: int64 [T], where among these S each of the T tokens is found.
    """

    def __init__(self, tokens: Tensor, lengths: Sequence[int], wanted: Tensor) -> None:
        """tokens int64 [T] of documents of `lengths`; `wanted` bool [T]: whose outputs matter to their own document
        (a start ends before the first of them, so that none is lost)."""
        given, firsts = tokens.cpu().numpy(), np.cumsum([0, *lengths])
        own = np.append(np.flatnonzero(wanted.cpu().numpy()), len(given))
        # a document may share what lies before its first wanted output, and must keep something of its own
        free = np.minimum(own[np.searchsorted(own, firsts[:-1])] - firsts[:-1], np.array(lengths) - 1)
        groups: dict[bytes, list[int]] = {}
        for number, (first, length) in enumerate(zip(firsts, free, strict=False)):
            key = given[first : first + WORTH].tobytes() if length >= WORTH else str(number).encode()
            groups.setdefault(key, []).append(number)
        leader: dict[int, tuple[int, int]] = {}  # of a document: the first of its group, and what they share
        for members in groups.values():
            shared = _common([given[firsts[i] : firsts[i] + free[i]] for i in members]) if len(members) > 1 else 0
            leader |= dict.fromkeys(members, (members[0], shared))
        rows, whole, done = [], np.arange(len(given)), 0
        places: list[int] = []  # of the documents among the S
        for number, length in enumerate(lengths):
            first, (head, shared) = int(firsts[number]), leader[number]
            skipped = 0 if number == head else shared  # an earlier one computes them
            places.append(done)
            rows.append(np.arange(first + skipped, first + length))
            whole[first : first + skipped] = places[head] + np.arange(skipped)
            whole[first + skipped : first + length] = done + np.arange(length - skipped)
            done += length - skipped
        device = tokens.device
        super().__init__([len(part) for part in rows], device)
        self.full = Documents(lengths, device)
        self.rows, self.whole = (torch.from_numpy(x).to(device) for x in (np.concatenate(rows), whole))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [S, H, D], k and v [S, K, D] -> [S, H, D]."""
        if len(self.rows) == len(self.whole):
            return attend(q, k, v, self.full)
        return attend(q[self.whole], k[self.whole], v[self.whole], self.full)[self.rows]


def _common(parts: Sequence[np.ndarray]) -> int:
    """How many elements all `parts` begin with in common."""
    shortest = min(len(part) for part in parts)
    stacked = np.stack([part[:shortest] for part in parts])
    differ = np.flatnonzero((stacked != stacked[0]).any(0))
    return int(differ[0]) if len(differ) else shortest
