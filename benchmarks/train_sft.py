"""SFT of a real model on real conversations: `steelyard.train.loop.train`, packed, beside a plain transformers loop.

The rival pads each batch to its longest conversation; tokens are counted without padding on both sides.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from train_data import LONGEST, STEPS, Turns, preferences
from train_data import unavailable as unavailable  # asked by train.py

from steelyard.inference.endpoint import Message
from steelyard.model.chat import Renderer
from steelyard.train.batch import IGNORE, Batch

BAR = 1.5
PEER = "transformers, bf16 autocast, fused AdamW, padded"
RATE = 1e-5
BATCH = 8  # conversations of an update


def batches(model: str, count: int) -> list[list[tuple[list[int], list[bool]]]]:
    """For each step its conversations: tokens, and which of them are taught."""
    renderer = Renderer(Path(model))
    rows = []
    for pair in preferences(count * BATCH):
        tokens, taught = renderer.training_tokens((*pair.prompt, Message("assistant", pair.chosen)))
        rows.append((list(tokens)[:LONGEST], list(taught)[:LONGEST]))
    return [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]


def peer(rounds: Any, model: str) -> None:
    from transformers import LlamaForCausalLM

    steps = batches(model, rounds.count * STEPS)
    rival = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(rival.parameters(), lr=RATE, betas=(0.9, 0.95), fused=True)
    for number in range(rounds.count):
        mine = steps[number * STEPS : (number + 1) * STEPS]
        rounds.begin()
        for rows in mine:
            width = max(len(tokens) for tokens, _ in rows)
            tokens = torch.zeros(len(rows), width, dtype=torch.int64)
            mask, labels = torch.zeros_like(tokens), torch.full_like(tokens, IGNORE)
            for i, (ids, taught) in enumerate(rows):
                read = torch.tensor(ids)
                tokens[i, : len(ids)], mask[i, : len(ids)] = read, 1
                labels[i, : len(ids)] = torch.where(torch.tensor(taught), read, IGNORE)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = rival(input_ids=tokens, attention_mask=mask, labels=labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(rival.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            print(f"loss {loss.item():.4f}", file=sys.stderr)
        rounds.end(sum(len(tokens) for rows in mine for tokens, _ in rows))


class _Data:
    """The same conversations, flat."""

    digest = "benchmark"

    def __init__(self, steps: list[list[tuple[list[int], list[bool]]]], turns: Turns) -> None:
        self.steps, self.turns, self.steps_per_epoch = steps, turns, len(steps)

    def step(self, index: int) -> Sequence[Batch]:
        self.turns.begin(index)
        tokens, targets, positions = [], [], []
        for ids, taught in self.steps[index]:
            read = torch.tensor(ids)
            tokens.append(read)
            following = torch.where(torch.tensor(taught[1:]), read[1:], IGNORE)
            targets.append(torch.cat([following, torch.tensor([IGNORE])]))
            positions.append(torch.arange(len(ids)))
        lengths = tuple(len(ids) for ids, _ in self.steps[index])
        return [Batch(torch.cat(tokens), torch.cat(targets), torch.cat(positions), lengths, tuple(range(len(lengths))))]


def ours(rounds: Any, model: str) -> None:
    from steelyard.train.loop import TrainOptions, train
    from steelyard.train.losses import CrossEntropy
    from steelyard.train.tuning import FULL, open_for_tuning

    steps = batches(model, rounds.count * STEPS + 1)  # with the last one comes the checkpoint: not measured
    turns = Turns(rounds, [sum(len(tokens) for tokens, _ in rows) for rows in steps])
    options = TrainOptions(steps=len(steps), learning_rate=RATE, checkpoint_every=0)
    with tempfile.TemporaryDirectory() as folder:
        opened = open_for_tuning(Path(model), FULL, "bfloat16")
        train(opened, _Data(steps, turns), CrossEntropy(), options, Path(folder), progress=turns)
