"""Order and packing are functions of numbers: nothing lost, nothing twice, no document seen by another."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from steelyard.base.errors import SteelyardError, UsageError

pytest.importorskip("torch")
from steelyard.train.batch import IGNORE, Batch
from steelyard.train.packing import BestFit, Concatenated, best_fit, permuted


class Numbered:
    """Documents whose tokens tell where they come from: sample * 1000 + place."""

    def __init__(self, lengths: list[int], taught_from: int | None = None) -> None:
        self.lengths: npt.NDArray[np.int64] = np.array(lengths, dtype=np.int64)
        self.taught_from, self.digest = taught_from, f"{lengths}"

    def tokens(self, sample: int, start: int, end: int) -> npt.NDArray[np.int64]:
        return sample * 1000 + np.arange(start, end)

    def taught(self, sample: int, start: int, end: int) -> npt.NDArray[np.bool_] | None:
        return None if self.taught_from is None else np.arange(start, end) >= self.taught_from

    def __len__(self) -> int:
        return int(self.lengths.sum())

    def stream(self, start: int, end: int) -> npt.NDArray[np.int64]:
        return np.arange(start, end)


def sound(batch: Batch) -> None:
    """What every batch promises."""
    assert sum(batch.lengths) == len(batch.tokens) == len(batch.targets) == len(batch.positions)
    assert len(batch.lengths) == len(batch.sample_ids)
    at = 0
    for length in batch.lengths:
        tokens, targets = batch.tokens[at : at + length], batch.targets[at : at + length]
        assert batch.positions[at : at + length].tolist() == list(range(length))
        assert targets[-1] == IGNORE
        taught = targets[:-1] != IGNORE
        assert (targets[:-1][taught] == tokens[1:][taught]).all()
        at += length


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 65_537])
def test_a_permutation_is_one(size: int) -> None:
    found = permuted(np.arange(size), size, 7, 3)
    assert (np.sort(found) == np.arange(size)).all()
    assert permuted(size - 1, size, 7, 3)[0] == found[-1]  # one alone is as among all
    if size > 100:
        for other in ((7, 4), (8, 3), (3, 7), (7, 3, 0)):
            same = (permuted(np.arange(size), size, *other) == found).mean()
            assert same < 0.05
        steps = np.diff(found)
        assert (np.abs(steps) < size / 50).mean() < 0.1  # neighbours do not stay neighbours


def test_the_permutation_has_not_changed() -> None:
    # Pinned: another order would silently be another run.
    assert permuted(np.arange(8), 8, 1, 2).tolist() == PINNED
    assert permuted([0, 1, 10**11], 10**12, 5, 0).tolist() == PINNED_LARGE


PINNED = [0, 7, 1, 3, 4, 5, 2, 6]
PINNED_LARGE = [697914322734, 978261599409, 847420502072]


def test_an_index_outside_is_refused() -> None:
    for index in (5, -1):
        with pytest.raises(ValueError, match="index"):
            permuted([index], 5, 0)


def test_best_fit_fills_and_never_overfills() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 513, size=3000)
    bins = best_fit(lengths, 512)
    assert sorted(sample for chosen in bins for sample in chosen) == list(range(3000))
    used = [int(lengths[chosen].sum()) for chosen in bins]
    assert max(used) <= 512
    assert sum(used) / (512 * len(bins)) > 0.97  # half of the lengths leave no room for another of their half
    assert len(best_fit(rng.permutation(lengths), 512)) == len(bins)  # the number does not depend on the order
    with pytest.raises(SteelyardError, match="513 tokens does not fit"):
        best_fit(np.array([513]), 512)


def test_every_token_but_the_first_is_a_target_once_an_epoch() -> None:
    data = Numbered([1, 2, 37, 150, 90, 3, 16, 15, 17] * 3)
    loader = BestFit(data, tokens_per_micro_batch=40, micro_batches_per_step=2, max_length=16, seed=1)
    seen: list[int] = []
    count = loader.micro_batches_per_epoch
    for number in range(count):
        batch = loader._micro_batch(0, number)
        sound(batch)
        assert len(batch.tokens) <= 40
        assert max(batch.lengths) <= 16
        seen += [int(t) for t in batch.targets if t != IGNORE]
    expected = [s * 1000 + i for s, length in enumerate(data.lengths.tolist()) for i in range(1, length)]
    assert sorted(seen) == sorted(expected)
    assert loader.steps_per_epoch == -(-count // 2)
    assert loader.tokens_per_epoch >= len(expected)


def _flat(batches: list[Batch]) -> list[list[int]]:
    return [batch.tokens.tolist() for batch in batches]


@pytest.mark.parametrize("kind", ["best_fit", "concatenated"])
def test_a_step_is_a_function_of_its_number(kind: str) -> None:
    def make(seed: int) -> BestFit | Concatenated:
        data = Numbered(np.random.default_rng(1).integers(2, 60, 300).tolist())
        if kind == "best_fit":
            return BestFit(data, tokens_per_micro_batch=64, micro_batches_per_step=3, max_length=32, seed=seed)
        return Concatenated(data, row_length=16, rows_per_micro_batch=4, micro_batches_per_step=3, seed=seed)

    first, other = make(5), make(5)
    walked = [_flat(list(first.step(index))) for index in range(3 * first.steps_per_epoch)]
    for index in (len(walked) - 1, 0, first.steps_per_epoch - 1, 2, first.steps_per_epoch):  # in any order
        assert _flat(list(other.step(index))) == walked[index]
        assert len(walked[index]) == 3  # all ranks have as many, also where an epoch ends
    assert first.digest == other.digest != make(6).digest
    assert _flat(list(make(6).step(0))) != walked[0]
    assert walked[: first.steps_per_epoch - 1] != walked[first.steps_per_epoch : 2 * first.steps_per_epoch - 1]
    with pytest.raises(ValueError, match="step -1"):
        first.step(-1)


def test_validation_gives_each_token_once_and_all_ranks_as_much() -> None:
    data = Numbered([5, 9, 33, 2, 2, 50])
    for loader in (
        BestFit(data, tokens_per_micro_batch=20, micro_batches_per_step=4, max_length=20, seed=0, endless=False),
        Concatenated(data, row_length=8, rows_per_micro_batch=2, micro_batches_per_step=4, seed=0, endless=False),
    ):
        steps = [list(loader.step(index)) for index in range(loader.steps_per_epoch)]
        assert all(len(step) == 4 for step in steps)
        for step in steps:
            for batch in step:
                sound(batch)
        targets = [int(t) for step in steps for batch in step for t in batch.targets if t != IGNORE]
        assert len(targets) == len(set(targets)) == (95 if isinstance(loader, BestFit) else 100)
        assert _flat(list(loader.step(loader.steps_per_epoch))) == _flat(steps[0])


def test_concatenated_rows_cross_documents_and_move_with_the_epoch() -> None:
    data = Numbered([10] * 101)  # 1,010 tokens in a ring
    loader = Concatenated(data, row_length=11, rows_per_micro_batch=1, micro_batches_per_step=1, seed=3)
    assert loader.steps_per_epoch == 100
    epochs = []
    for epoch in range(2):
        rows = [loader.step(epoch * 100 + index)[0] for index in range(100)]
        for row in rows:
            sound(row)
        targets = [int(t) for row in rows for t in row.targets if t != IGNORE]
        assert len(set(targets)) == 1000
        epochs.append({int(row.tokens[0]) for row in rows})
    assert epochs[0] == set(range(0, 1000, 10))
    assert epochs[1] != epochs[0]


def test_only_what_is_taught_is_a_target() -> None:
    data = Numbered([10, 30], taught_from=7)
    loader = BestFit(data, tokens_per_micro_batch=64, micro_batches_per_step=1, max_length=12, seed=0)
    batch = loader.step(0)[0]
    sound(batch)
    assert sorted(int(t) for t in batch.targets if t != IGNORE) == [*range(7, 10), *range(1007, 1030)]


def test_sizes_that_cannot_be() -> None:
    data = Numbered([5, 6])
    for wrong in ({"max_length": 1}, {"max_length": 65}, {"micro_batches_per_step": 0}):
        settings = {"tokens_per_micro_batch": 64, "micro_batches_per_step": 1, "max_length": 16, "seed": 0} | wrong
        with pytest.raises(UsageError):
            BestFit(data, **settings)  # type: ignore[arg-type]
    with pytest.raises(SteelyardError, match="no sample has two tokens"):
        BestFit(Numbered([1, 1]), tokens_per_micro_batch=8, micro_batches_per_step=1, max_length=8, seed=0)
    with pytest.raises(SteelyardError, match="less than one row"):
        Concatenated(data, row_length=32, rows_per_micro_batch=1, micro_batches_per_step=1, seed=0)
