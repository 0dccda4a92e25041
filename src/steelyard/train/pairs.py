"""Preference pairs as training data: rendered, the prompt laid down once for both answers, dealt out to steps.

A pair lies flat as [prompt, chosen answer, rejected answer]; positions of the rejected answer restart at the prompt's
end, and its attention skips the chosen one. The stream of the prompt is the same under both answers, so this is exact
and saves one pass over it (`model/pairs.py` does the attention).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from steelyard.base.canonical import digest, sha256_hex
from steelyard.base.errors import SteelyardError, UsageError
from steelyard.base.progress import Progress
from steelyard.inference.endpoint import Message
from steelyard.model.chat import Renderer
from steelyard.train.conversations import Preference
from steelyard.train.packing import permuted

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pair:
    """A rendered pair: what both share, the rest of each, and which tokens of each rest are the answer's."""

    prompt: Ints  # [P], at least one token
    chosen: Ints  # [A]
    rejected: Ints  # [B]
    chosen_start: int  # in tokens of `chosen`: before it the prompts differ, as tokenizers may have it
    rejected_start: int

    @property
    def size(self) -> int:
        """Tokens that the model reads."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


@dataclass(frozen=True)
class PairBatch:
    """One micro-batch of n pairs, flat. Answer 2i is the chosen one of pair i, 2i + 1 the rejected one.

    tokens, positions: int64 [T]. shapes: (prompt, chosen, rejected) tokens of each pair; they sum to T.
    rows, targets, owners: int64 [N], one entry for every token of an answer: the position whose stream predicts it, the
    token, and the answer it belongs to. sample_ids: which pairs of the data set.
    """

    tokens: Tensor
    positions: Tensor
    shapes: tuple[tuple[int, int, int], ...]
    rows: Tensor
    targets: Tensor
    owners: Tensor
    sample_ids: tuple[int, ...]

    @property
    def chosen_targets(self) -> Tensor:
        """Targets of the chosen answers: what is to become likelier, so what a preflight looks for ends of turns in."""
        return self.targets[self.owners % 2 == 0]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of prompt and chosen answer, and of rejected answer: what the loop reckons attention's cost by."""
        return tuple(length for p, a, b in self.shapes for length in (p + a, b))

    def blank(self) -> PairBatch:
        """The same tokens, counting nothing."""
        none = torch.zeros(0, dtype=torch.int64)
        return PairBatch(self.tokens, self.positions, self.shapes, none, none, none, ())


@dataclass(frozen=True)
class PairCounts:
    """What became of the preferences: pairs, those cut at the greatest length, those left out, tokens read, and how
    many chosen answers still end their turn.
    """

    pairs: int
    cut: int
    dropped: int
    tokens: int
    answer_tokens: int
    ends: int


def render_pairs(
    preferences: Sequence[Preference], renderer: Renderer, max_length: int, progress: Progress
) -> tuple[list[Pair], PairCounts]:
    """Render `preferences`; each side is cut after `max_length` tokens, prompt included.

    Left out is a pair of which the cut leaves no token of an answer, or the same tokens for both. Raises SteelyardError
    naming the preference (from 1) that the template refuses, and where none is left.
    """
    pairs, cut, dropped, ends = [], 0, 0, 0
    with progress.task("render pairs", len(preferences), "pairs") as task:
        for number, preference in enumerate(preferences, 1):
            try:
                sides = [_side(preference, answer, renderer) for answer in (preference.chosen, preference.rejected)]
            except SteelyardError as error:
                raise SteelyardError(f"preference {number}: {error}") from error
            task.advance()
            (chosen, start), (rejected, other) = sides
            long = max(len(chosen), len(rejected)) > max_length
            chosen, rejected = chosen[:max_length], rejected[:max_length]
            if start >= len(chosen) or other >= len(rejected) or np.array_equal(chosen, rejected):
                dropped += 1
                continue
            cut += long
            ends += int(chosen[-1]) in renderer.tokenizer.eos_ids
            shared = _common(chosen[:start], rejected[:other])
            pairs.append(Pair(chosen[:shared], chosen[shared:], rejected[shared:], start - shared, other - shared))
    if not pairs:
        raise SteelyardError(
            f"none of {len(preferences):,} preferences has two different answers within {max_length:,} tokens: raise "
            "max_length (--max-length)"
        )
    answers = sum(len(p.chosen) - p.chosen_start + len(p.rejected) - p.rejected_start for p in pairs)
    return pairs, PairCounts(len(pairs), cut, dropped, sum(pair.size for pair in pairs), answers, ends)


class ShownPairs:
    """What preflight asks of chat data (`preflight.ChatCheck`), of the chosen answers of `pairs`."""

    def __init__(self, pairs: Sequence[Pair], renderer: Renderer) -> None:
        self._pairs, self._decode = pairs, renderer.tokenizer.decode
        self.end_of_turn = renderer.tokenizer.eos_ids

    def examples(self, count: int) -> list[tuple[tuple[str, bool], ...]]:
        """The first prompts with their chosen answers, special tokens written out."""
        found = []
        for pair in self._pairs[:count]:
            start = pair.chosen_start
            before, taught = np.concatenate([pair.prompt, pair.chosen[:start]]), pair.chosen[start:]
            parts = ((before, False), (taught, True))
            found.append(tuple((self._decode(part.tolist(), skip_special=False), on) for part, on in parts))
        return found


def _side(preference: Preference, answer: str, renderer: Renderer) -> tuple[Ints, int]:
    """Tokens of a conversation up to the end of its last answer, and where that answer starts."""
    tokens, taught = renderer.training_tokens((*preference.prompt, Message("assistant", answer)))
    mask = np.array(taught, dtype=np.bool_)
    if not mask.any():
        raise SteelyardError("the template leaves nothing of the answer to learn")
    end = int(np.flatnonzero(mask)[-1]) + 1
    start = int(np.flatnonzero(~mask[:end])[-1]) + 1 if not mask[:end].all() else 0
    if start == 0:
        raise SteelyardError("no token stands before the answer: its first one has nothing to be predicted from")
    return np.array(tokens[:end], dtype=np.int64), start


def _common(a: Ints, b: Ints) -> int:
    """Length of the common beginning."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if len(differ) else size


def assemble_pairs(pairs: Sequence[Pair], ids: Sequence[int]) -> PairBatch:
    """The micro-batch of pairs `ids`."""
    tokens, positions, rows, targets, owners = [], [], [], [], []
    shapes, base = [], 0
    for number, index in enumerate(ids):
        pair = pairs[index]
        p, a, b = len(pair.prompt), len(pair.chosen), len(pair.rejected)
        tokens += [pair.prompt, pair.chosen, pair.rejected]
        positions += [np.arange(p + a), np.arange(p, p + b)]
        for side, part, start, offset in (
            (0, pair.chosen, pair.chosen_start, p),
            (1, pair.rejected, pair.rejected_start, p + a),
        ):
            before = offset + np.arange(start, len(part)) - 1
            if start == 0:
                before[0] = p - 1  # the answer's first token is predicted by the prompt's last
            rows.append(base + before)
            targets.append(part[start:])
            owners.append(np.full(len(part) - start, 2 * number + side))
        shapes.append((p, a, b))
        base += p + a + b
    flat = [torch.from_numpy(np.concatenate(parts)) for parts in (tokens, positions, rows, targets, owners)]
    return PairBatch(flat[0], flat[1], tuple(shapes), flat[2], flat[3], flat[4], tuple(int(index) for index in ids))


class PairLoader:
    """`Loader[PairBatch]`: every step has `pairs_per_step` pairs in `micro_batches_per_step` micro-batches.

    Each epoch is a permutation of (seed, epoch). A step's pairs go to its micro-batches the longest first, each to the
    one with the fewest tokens, so that they take about as long; none is empty.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        members: range,
        *,
        pairs_per_step: int,
        micro_batches_per_step: int,
        seed: int,
        endless: bool = True,
    ) -> None:
        """`members`: which of `pairs`. `endless` False: for validation, every pair once, in the order given; where the
        last step lacks pairs, micro-batches that count nothing fill it, so that all ranks have as many. Raises
        UsageError for sizes that cannot be.
        """
        if micro_batches_per_step < 1:
            raise UsageError(f"micro_batches_per_step is {micro_batches_per_step}: must be at least 1")
        if not micro_batches_per_step <= pairs_per_step:
            raise UsageError(
                f"pairs_per_step is {pairs_per_step}: must be at least micro_batches_per_step "
                f"({micro_batches_per_step}), a pair for each"
            )
        self.pairs, self._members, self._seed = pairs, members, seed
        self._per_step, self._micro = pairs_per_step, micro_batches_per_step
        self._endless = endless
        self._sizes = [pair.size for pair in pairs]
        settings = {"pairs": pairs_per_step, "micro": micro_batches_per_step, "seed": seed, "endless": endless}
        self._digest = digest(settings | {"data": pairs_digest([pairs[member] for member in members])})

    @property
    def digest(self) -> str:
        return self._digest

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._members) // self._per_step)

    def step(self, index: int) -> Sequence[PairBatch]:
        """The micro-batches of step `index`; where an epoch ends within a step, the next begins there."""
        if index < 0:
            raise ValueError(f"step {index}")
        count = len(self._members)
        if self._endless:
            numbers = range(index * self._per_step, (index + 1) * self._per_step)
            places = [int(permuted(number % count, count, self._seed, number // count)[0]) for number in numbers]
        else:
            first = index % self.steps_per_epoch * self._per_step
            places = list(range(first, min(first + self._per_step, count)))
        chosen = [self._members[place] for place in places]
        bins: list[list[int]] = [[] for _ in range(min(self._micro, len(chosen)))]
        loads = [(0, 0)] * len(bins)  # pairs first: no bin may stay empty
        for pair in sorted(chosen, key=lambda pair: -self._sizes[pair]):
            place = min(range(len(bins)), key=lambda place: (loads[place][0] > 0, loads[place][1]))
            bins[place].append(pair)
            loads[place] = (loads[place][0] + 1, loads[place][1] + self._sizes[pair])
        found = [assemble_pairs(self.pairs, members) for members in bins]
        return found + [found[-1].blank()] * (self._micro - len(found))


def pairs_digest(pairs: Sequence[Pair]) -> str:
    """SHA-256 of the rendered pairs in their order."""
    parts = []
    for pair in pairs:
        head = (len(pair.prompt), len(pair.chosen), len(pair.rejected), pair.chosen_start, pair.rejected_start)
        parts.append(np.concatenate([np.array(head), pair.prompt, pair.chosen, pair.rejected]).astype("<i8").tobytes())
    return sha256_hex(b"".join(parts))
