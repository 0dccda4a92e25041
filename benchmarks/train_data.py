"""What the fine-tuning benchmarks share: real conversations of mixed lengths, and turns between two processes.

The conversations are hh-rlhf's harmless-base (its test file, the only one at hand): one to a dozen turns, cut
at 512 tokens. They are read for speed only; what is trained on them is thrown away.
"""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from steelyard.inference.endpoint import Message
from steelyard.train.conversations import Preference

STEPS, LONGEST = 2, 512  # updates of a round, tokens after which a conversation is cut
_FILE = "preferences/hh_rlhf/harmless-base-test.jsonl.gz"


def data_file() -> Path:
    """Where the conversations are: STEELYARD_DATA, or beside the checkout."""
    folder = os.environ.get("STEELYARD_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(folder) / _FILE


def unavailable(model: str) -> str:
    """Why the benchmark can't run here; '' where it can."""
    if not data_file().is_file():
        return f"{data_file()} is absent: set STEELYARD_DATA to the folder of the research data"
    return "" if model else "give the folder of the imported model (make bench-train does)"


def preferences(count: int) -> list[Preference]:
    """The first `count` pairs whose prompt is the same on both sides and whose turns alternate."""
    found = []
    with gzip.open(data_file(), "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            chosen, rejected = (_turns(row[side]) for side in ("chosen", "rejected"))
            proper = [t.role for t in chosen] == ["user", "assistant"] * (len(chosen) // 2)
            if proper and chosen[:-1] == rejected[:-1] and chosen[-1].content.strip() and rejected[-1].content.strip():
                found.append(Preference(tuple(chosen[:-1]), chosen[-1].content, rejected[-1].content))
            if len(found) == count:
                return found
    raise SystemExit(f"{data_file()} holds {len(found)} usable pairs, {count} are needed")


def _turns(text: str) -> list[Message]:
    parts = re.split(r"\n\n(Human|Assistant): ?", text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [Message(roles[who], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True)]  # type: ignore[arg-type]


class Turns:
    """A Progress for `train`: the rounds begin with the task named `training`, and end with their last step."""

    def __init__(self, rounds: Any, sizes: list[int]) -> None:
        self.rounds, self.sizes, self.done, self.training = rounds, sizes, 0, False

    @contextmanager
    def task(self, name: str, total: float, unit: str, done: float = 0) -> Iterator[Turns]:
        self.training = name == "training"
        yield self

    def advance(self, amount: float = 1, note: str = "") -> None:
        if self.training:
            self.done += 1
            if self.done % STEPS == 0:
                self.rounds.end(sum(self.sizes[self.done - STEPS : self.done]))

    def begin(self, step: int) -> bool:
        """Wait for the turn where a round begins with `step`."""
        starts = self.training and step % STEPS == 0
        if starts:
            self.rounds.begin()
        return starts

    def say(self, text: str) -> None:
        return None
