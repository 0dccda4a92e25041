"""One way to report a benchmark, a table on the terminal and `benchmarks/out/NAME.json`, and to use both cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from steelyard.cli.output import print_table

OUT = Path(__file__).resolve().parent / "out"


@dataclass(frozen=True)
class Row:
    """A figure of ours beside the peer's from the same run. `bar`: the ratio (ours / peer) to reach, or None; not to
    pass where `less_is_better`, as with memory.
    """

    metric: str
    ours: float
    peer: float
    peer_name: str
    bar: float | None = None
    less_is_better: bool = False

    @property
    def ratio(self) -> float:
        return self.ours / self.peer

    @property
    def holds(self) -> bool | None:
        if self.bar is None:
            return None
        return self.ratio <= self.bar if self.less_is_better else self.ratio >= self.bar


def report(name: str, rows: Sequence[Row]) -> None:
    """Print the table and write the JSON: a list of {metric, ours, peer, peer_name, ratio, bar, holds}."""
    cells = [
        (r.metric, f"{r.ours:,.1f}", f"{r.peer:,.1f}", f"{r.ratio:.2f}", f"{r.bar}" if r.bar else "none", r.peer_name)
        for r in rows
    ]
    print_table(name, ("metric", "ours", "peer", "ratio", "bar", "peer's name"), cells)
    OUT.mkdir(exist_ok=True)
    document = [asdict(row) | {"ratio": row.ratio, "holds": row.holds} for row in rows]
    (OUT / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")


def side_by_side(*commands: Sequence[str]) -> None:
    """Run Python programs at once, each with one thread and only its stderr shown; where one fails, this ends with 1,
    once all have ended."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([sys.executable, *command], env=environment, stdout=subprocess.DEVNULL) for command in commands
    ]
    codes = [process.wait() for process in running]
    if any(codes):
        sys.exit(1)
