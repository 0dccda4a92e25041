"""A model of 6 million parameters trained from nothing: `train` of `steelyard.train.loop` beside transformers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

BAR = 1.5
PEER = "transformers, bf16 autocast, fused AdamW"
ROWS, LENGTH, STEPS = 8, 512, 3  # sequences of a batch, tokens of each, updates of a round
SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}


def tokens(step: int) -> Tensor:
    """The batch of a step, int64 [ROWS, LENGTH]: common tokens are common, as in text."""
    generator = torch.Generator().manual_seed(step)
    uniform = torch.rand(ROWS, LENGTH, generator=generator)
    return (SHAPE["vocab_size"] ** uniform - 1).long()


def peer(rounds: Any, model: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    rival = LlamaForCausalLM(LlamaConfig(**SHAPE))
    optimizer = torch.optim.AdamW(rival.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    for number in range(rounds.count):
        rounds.begin()
        for step in range(STEPS):
            batch = tokens(number * STEPS + step)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = rival(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(rival.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
        rounds.end(STEPS * ROWS * LENGTH)


class _Data:
    """A loader that waits for its turn at the beginning of each round, once training is under way."""

    digest = "benchmark"

    def __init__(self, rounds: Any) -> None:
        self.rounds, self.training = rounds, False
        self.steps_per_epoch = rounds.count * STEPS + 1  # with the last step comes the checkpoint: not measured

    def step(self, index: int) -> Sequence[Any]:
        from steelyard.train.batch import IGNORE, Batch

        if self.training and index % STEPS == 0 and index + 1 < self.steps_per_epoch:
            self.rounds.begin()
        batch = tokens(index)
        targets = batch.roll(-1, 1)
        targets[:, -1] = IGNORE
        positions = torch.arange(LENGTH).repeat(ROWS)
        lengths = (LENGTH,) * ROWS
        return [Batch(batch.flatten(), targets.flatten(), positions, lengths, tuple(range(ROWS)))]


class _Turns:
    """A Progress: training begins with the task, and a round ends with its last step."""

    def __init__(self, data: _Data) -> None:
        self.data, self.done = data, 0

    @contextmanager
    def task(self, name: str, total: float, unit: str, done: float = 0) -> Iterator[_Turns]:
        self.data.training = True
        yield self

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.done += 1
        if self.done % STEPS == 0:
            self.data.rounds.end(STEPS * ROWS * LENGTH)

    def say(self, text: str) -> None:
        return None


def ours(rounds: Any, model: str) -> None:
    from steelyard.model.llama import Llama, LlamaConfig
    from steelyard.train.loop import TrainOptions, train
    from steelyard.train.losses import CrossEntropy
    from steelyard.train.speed import compiler

    data = _Data(rounds)
    fresh = Llama(LlamaConfig(**SHAPE)).initialise(0)  # type: ignore[arg-type]
    # as `auto` decides for a run of some minutes; compiling falls into preflight, before the first round
    mode: Literal["on", "off"] = "on" if compiler() else "off"
    options = TrainOptions(steps=data.steps_per_epoch, learning_rate=1e-3, checkpoint_every=0, compile=mode)
    with tempfile.TemporaryDirectory() as folder:
        train(fresh, data, CrossEntropy(), options, Path(folder), progress=_Turns(data))
