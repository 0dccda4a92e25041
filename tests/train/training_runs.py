"""Tiny training runs for the tests, also for processes that the tests start and kill."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from steelyard.model.llama import Llama, LlamaConfig
from steelyard.train.batch import IGNORE, Batch
from steelyard.train.loop import TrainOptions, train
from steelyard.train.losses import CrossEntropy

VOCABULARY = 97
LENGTHS = ((16, 8, 8), (20, 2), (7, 7, 7))


def tiny(**changes: Any) -> Llama:
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
    }
    return Llama(LlamaConfig(**{**shape, **changes})).initialise(1)


def batch(documents: Sequence[Sequence[int]], ids: Sequence[int] = ()) -> Batch:
    tokens = torch.tensor([token for document in documents for token in document])
    targets = torch.tensor([t for document in documents for t in [*document[1:], IGNORE]])
    positions = torch.tensor([position for document in documents for position in range(len(document))])
    return Batch(tokens, targets, positions, tuple(map(len, documents)), tuple(ids or range(len(documents))))


class Data:
    """Random documents; a step's micro-batches depend on its number alone."""

    def __init__(self, micro_batches: int = 2, steps_per_epoch: int = 4, digest: str = "data") -> None:
        self.micro_batches, self.steps_per_epoch, self.digest = micro_batches, steps_per_epoch, digest

    def step(self, index: int) -> Sequence[Batch]:
        made = []
        for micro in range(self.micro_batches):
            generator = torch.Generator().manual_seed(1000 * index + micro)
            lengths = LENGTHS[micro % len(LENGTHS)]
            documents = [torch.randint(0, 90, (n,), generator=generator).tolist() for n in lengths]
            made.append(batch(documents, [100 * index + 10 * micro + i for i in range(len(lengths))]))
        return made


def options(**changes: Any) -> TrainOptions:
    usual: dict[str, Any] = {"steps": 4, "learning_rate": 1e-2, "dtype": "float32", "checkpoint_every": 2}
    return TrainOptions(**{**usual, **changes})


class Reported:
    """A progress that counts finished steps where another process can see it, and keeps what was said."""

    def __init__(self, counter: Any = None) -> None:
        self.counter, self.lines = counter, list[str]()

    @contextmanager
    def task(self, name: str, total: float, unit: str, done: float = 0) -> Iterator[Reported]:
        self._count(done)
        yield self

    def advance(self, amount: float = 1, note: str = "") -> None:
        if self.counter is not None:
            self._count(self.counter.value + amount)

    def _count(self, value: float) -> None:
        if self.counter is not None:
            self.counter.value = int(value)

    def say(self, text: str) -> None:
        self.lines.append(text)


def run_rank(folder: str, rank: int, world: int, port: int, changes: dict[str, Any], counter: Any) -> None:
    """One rank of a run, in a process of its own."""
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    progress = Reported(counter if rank == 0 else None)
    train(tiny(), Data(3), CrossEntropy(), options(**changes), Path(folder), progress=progress)
