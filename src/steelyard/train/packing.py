"""Which samples are in which batch: an order that is computed, never stored, and two ways to fill a micro-batch.

`BestFit` keeps documents whole (cut at the greatest length) and never lets attention cross from one to another;
`Concatenated` is the LLaMA way: rows of one length out of the stream of all tokens, across document ends. Both are
`Loader[Batch]`: step n is a function of (data, settings, n), whatever the ranks and workers, so a resumed run needs no
more than the number.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from steelyard.base.canonical import digest
from steelyard.base.errors import SteelyardError, UsageError
from steelyard.train.batch import IGNORE, Batch

_ROUNDS = 8
_Words = npt.NDArray[np.uint64]


def _mixed(words: _Words) -> _Words:
    # The finaliser of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014).
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def permuted(indices: npt.ArrayLike, size: int, *key: int) -> npt.NDArray[np.int64]:
    """Where a permutation of range(size), named by `key` (whole numbers), sends each of `indices`.

    A Feistel network over the next even power of two (Luby and Rackoff, 1988; the rounds' function is SplitMix64's
    mixer), walked on until it falls below `size` (Black and Rogaway: Ciphers with arbitrary finite domains, CT-RSA
    2002, "cycle walking"; under 4 steps on average). For shuffling, not for secrets.
    """
    values = np.atleast_1d(np.asarray(indices, dtype=np.int64)).astype(np.uint64)
    if size < 1 or (len(values) and int(values.max()) >= size):
        raise ValueError(f"an index is not below {size}")
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    state = np.zeros(1, dtype=np.uint64)
    for word in key:
        state = _mixed(state + np.uint64(word & (2**64 - 1)) + np.uint64(0x9E3779B97F4A7C15))
    rounds = [_mixed(state + np.uint64(number + 1)) for number in range(_ROUNDS)]

    def walk(words: _Words) -> _Words:
        left, right = words >> half, words & mask
        for secret in rounds:
            left, right = right, left ^ (_mixed(right + secret) & mask)
        return (left << half) | right

    values = walk(values)
    while (out := values >= size).any():
        values[out] = walk(values[out])
    return values.astype(np.int64)


class Samples(Protocol):
    """Documents to train on, by number."""

    @property
    def digest(self) -> str:
        """SHA-256 of their content and order."""
        ...

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each."""
        ...

    def tokens(self, sample: int, start: int, end: int) -> npt.NDArray[np.int64]:
        """Tokens `start` to `end` of a sample."""
        ...

    def taught(self, sample: int, start: int, end: int) -> npt.NDArray[np.bool_] | None:
        """Which of these tokens are to be predicted; None: all."""
        ...


def best_fit(lengths: npt.NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Bins of at most `capacity` tokens: each sample in turn, the longest first, goes where it leaves least room.

    Best-fit decreasing (Johnson 1974); for language models Ding et al., "Fewer truncations improve language modeling",
    arXiv:2404.10830. Samples of one length are taken in the order given, so how many bins there are does not depend on
    that order. Raises SteelyardError for a sample that fits no bin.
    """
    if len(lengths) and int(lengths.max()) > capacity:
        raise SteelyardError(f"a sample of {int(lengths.max()):,} tokens does not fit a micro-batch of {capacity:,}")
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left -> bins that have it
    rooms: list[int] = []  # the keys of by_room, sorted
    for sample in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[sample])
        place = bisect.bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            chosen = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
            bins[chosen].append(sample)
        else:
            room, chosen = capacity, len(bins)
            bins.append([sample])
        left = room - length
        if left not in by_room:
            by_room[left] = []
            bisect.insort(rooms, left)
        by_room[left].append(chosen)
    return bins


@dataclass(frozen=True)
class _Pieces:
    """Samples cut at the greatest length: which sample, and from where to where. A piece begins with the token that
    the one before ended with, so that every token but a sample's first is predicted once."""

    sample: npt.NDArray[np.int64]
    start: npt.NDArray[np.int64]
    end: npt.NDArray[np.int64]


def _cut(lengths: npt.NDArray[np.int64], longest: int) -> _Pieces:
    # A sample of 1 token teaches nothing; one of n > 1 has n - 1 targets, up to longest - 1 in each piece.
    targets = np.maximum(lengths - 1, 0)
    counts = -(-targets // (longest - 1))
    sample = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(sample)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = number * (longest - 1)
    return _Pieces(sample, start, np.minimum(start + longest, lengths[sample]))


class _Steps:
    """Micro-batches in a row, dealt out to steps. Subclasses make micro-batch `number` of `epoch`."""

    def __init__(self, name: str, per_epoch: int, per_step: int, endless: bool, parts: dict[str, object]) -> None:
        if per_step < 1:
            raise UsageError(f"micro_batches_per_step is {per_step}: must be at least 1")
        self._per_epoch, self._per_step, self._endless = per_epoch, per_step, endless
        self._digest = digest({"packing": name, "per_step": per_step, "endless": endless, **parts})

    @property
    def digest(self) -> str:
        """SHA-256 of data, order and packing."""
        return self._digest

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every micro-batch of an epoch comes by."""
        return -(-self._per_epoch // self._per_step)

    @property
    def micro_batches_per_epoch(self) -> int:
        return self._per_epoch

    def step(self, index: int) -> Sequence[Batch]:
        """The micro-batches of step `index`, as many in each. Where an epoch ends within a step, the next begins there;
        where the loader is not `endless`, copies of its last micro-batch with no target fill the last step, so that
        all ranks have as many, and a step past the epoch is one of the next (the same data again).
        """
        if index < 0:
            raise ValueError(f"step {index}")
        if self._endless:
            numbers = range(index * self._per_step, (index + 1) * self._per_step)
            return [self._micro_batch(*divmod(number, self._per_epoch)) for number in numbers]
        first = index % self.steps_per_epoch * self._per_step
        found = [self._micro_batch(0, n) for n in range(first, min(first + self._per_step, self._per_epoch))]
        last = found[-1]
        blank = Batch(last.tokens, torch.full_like(last.targets, IGNORE), last.positions, last.lengths, last.sample_ids)
        return found + [blank] * (self._per_step - len(found))

    def _micro_batch(self, epoch: int, number: int) -> Batch:
        raise NotImplementedError


class BestFit(_Steps):
    """Whole documents, best-fit packed: `Loader[Batch]`.

    Each epoch is packed anew from a permutation of (seed, epoch), its micro-batches are permuted once more.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        tokens_per_micro_batch: int,
        micro_batches_per_step: int,
        max_length: int,
        seed: int,
        endless: bool = True,
    ) -> None:
        """`max_length`: where documents are cut, in tokens. `endless` False: for validation, each document once an
        epoch, always in the same order. Raises UsageError for sizes that cannot be, SteelyardError where no sample has
        two tokens.
        """
        if not 2 <= max_length <= tokens_per_micro_batch:
            raise UsageError(
                f"max_length is {max_length}: must be from 2 to tokens_per_micro_batch ({tokens_per_micro_batch})"
            )
        self._samples, self._capacity, self._seed = samples, tokens_per_micro_batch, seed
        self._pieces = _cut(samples.lengths, max_length)
        self._lengths = self._pieces.end - self._pieces.start
        self._packed: tuple[int, list[list[int]]] = (-1, [])
        if not len(self._lengths):
            raise SteelyardError("no sample has two tokens or more: nothing to predict")
        settings = {"tokens": tokens_per_micro_batch, "max_length": max_length, "seed": seed, "data": samples.digest}
        self._endless = endless
        super().__init__("best-fit", len(self._bins(0)), micro_batches_per_step, endless, dict(settings))

    @property
    def tokens_per_epoch(self) -> int:
        return int(self._lengths.sum())

    def _bins(self, epoch: int) -> list[list[int]]:
        if self._packed[0] != epoch:
            count = len(self._lengths)
            order = permuted(np.arange(count), count, self._seed, epoch) if self._endless else np.arange(count)
            packed = best_fit(self._lengths[order], self._capacity)
            self._packed = (epoch, [order[chosen].tolist() for chosen in packed])
        return self._packed[1]

    def _micro_batch(self, epoch: int, number: int) -> Batch:
        bins = self._bins(epoch)
        if self._endless:
            number = int(permuted(number, len(bins), self._seed, epoch, 1)[0])
        chosen = bins[number]
        return assemble(self._samples, self._pieces, chosen)


def assemble(samples: Samples, pieces: _Pieces, chosen: Sequence[int]) -> Batch:
    """One micro-batch of these pieces."""
    tokens, targets, positions, lengths = [], [], [], []
    for piece in chosen:
        where = int(pieces.sample[piece]), int(pieces.start[piece]), int(pieces.end[piece])
        read = samples.tokens(*where)
        following = np.full(len(read), IGNORE, dtype=np.int64)
        following[:-1] = read[1:]
        if (taught := samples.taught(*where)) is not None:
            following[:-1][~taught[1:]] = IGNORE
        tokens.append(read)
        targets.append(following)
        positions.append(np.arange(len(read)))
        lengths.append(len(read))
    return Batch(
        torch.from_numpy(np.concatenate(tokens)),
        torch.from_numpy(np.concatenate(targets)),
        torch.from_numpy(np.concatenate(positions)),
        tuple(lengths),
        tuple(int(pieces.sample[piece]) for piece in chosen),
    )


class Stream(Protocol):
    """All tokens of a data set in one row, each document's end token in its place."""

    @property
    def digest(self) -> str: ...

    def __len__(self) -> int: ...

    def stream(self, start: int, end: int) -> npt.NDArray[np.int64]:
        """Tokens `start` to `end`."""
        ...


class Concatenated(_Steps):
    """Rows of `row_length` tokens across document ends: `Loader[Batch]`, as LLaMA was pretrained.

    A row counts as one document (positions 0 to row_length - 1, attention within it) and begins with the token that
    the one before ended with. Where the first row begins moves with the epoch: the stream is read as a ring.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        row_length: int,
        rows_per_micro_batch: int,
        micro_batches_per_step: int,
        seed: int,
        endless: bool = True,
    ) -> None:
        """Raises UsageError for sizes that cannot be, SteelyardError where the stream is shorter than a row. Without
        `endless` (for validation) the last row is shorter, and every token but the first is predicted once."""
        if row_length < 2 or rows_per_micro_batch < 1:
            raise UsageError("row_length must be at least 2 and rows_per_micro_batch at least 1")
        targets = len(stream) - 1
        self._stream, self._row, self._rows_each, self._seed = stream, row_length, rows_per_micro_batch, seed
        self._rows = targets // (row_length - 1) if endless else -(-targets // (row_length - 1))
        if self._rows < 1:
            raise SteelyardError(f"the data has {len(stream):,} tokens, less than one row of {row_length:,}")
        settings = {"row_length": row_length, "rows": rows_per_micro_batch, "seed": seed, "data": stream.digest}
        count = -(-self._rows // rows_per_micro_batch)
        super().__init__("concatenated", count, micro_batches_per_step, endless, dict(settings))

    @property
    def tokens_per_epoch(self) -> int:
        return self._rows * self._row if self._endless else len(self._stream) - 1 + self._rows

    def _micro_batch(self, epoch: int, number: int) -> Batch:
        rows = np.arange(number * self._rows_each, min((number + 1) * self._rows_each, self._rows))
        offset = 0
        if self._endless:
            rows = permuted(rows, self._rows, self._seed, epoch)
            if epoch:
                offset = int(permuted(epoch % len(self._stream), len(self._stream), self._seed, 2)[0])
        read = [self._read(int(row), offset) for row in rows]
        following = [np.append(row[1:], IGNORE) for row in read]
        return Batch(
            torch.from_numpy(np.concatenate(read)),
            torch.from_numpy(np.concatenate(following)),
            torch.from_numpy(np.concatenate([np.arange(len(row)) for row in read])),
            tuple(len(row) for row in read),
            tuple(rows.tolist()),
        )

    def _read(self, row: int, offset: int) -> npt.NDArray[np.int64]:
        start, total = row * (self._row - 1), len(self._stream)
        end = min(start + self._row, total)
        if not offset:
            return self._stream.stream(start, end)
        start, end = (start + offset) % total, (end + offset - 1) % total + 1
        if start < end:
            return self._stream.stream(start, end)
        return np.concatenate([self._stream.stream(start, total), self._stream.stream(0, end)])
