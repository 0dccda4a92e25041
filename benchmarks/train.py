"""Training speed and memory beside plain loops of others: `python benchmarks/train.py [CASE ...]`.

Each side of a case runs in a process of its own (so that peak memory is its own), and both take turns, round by round,
so that what else the machine does falls on both. A case is a module with `BAR`, `PEER` and two functions `ours(rounds,
model)` and `peer(rounds, model)`, which call `rounds.begin()` before each round and `rounds.end(tokens)` after it.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

from steelyard.base.threads import choose_waiting

choose_waiting()  # as the command line does, and before torch is imported

CASES = {"pretrain_6m": "train_pretrain", "sft": "train_sft", "dpo": "train_dpo"}
ROUNDS = 5


class Rounds:
    """The worker's end: waits for its turn, tells how long a round took."""

    count = ROUNDS + 1  # the first one warms up

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print must not get between

    def begin(self) -> None:
        self._say({"ready": True})
        if not sys.stdin.readline():
            sys.exit("the benchmark has gone")
        self.start = time.perf_counter()

    def end(self, tokens: int) -> None:
        rate = tokens / (time.perf_counter() - self.start)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self._say({"rate": rate, "peak": peak})

    def _say(self, message: dict[str, object]) -> None:
        print(json.dumps(message), file=self.out, flush=True)


def _ask(worker: subprocess.Popen[str], key: str) -> dict[str, float]:
    out: IO[str] | None = worker.stdout
    assert out is not None
    message = json.loads(out.readline() or "{}")
    if key not in message:
        sys.exit(f"a worker failed: {message}")
    return dict(message)


def measure(case: str, model: str) -> dict[str, list[dict[str, float]]]:
    """Rounds of both sides in turn: rate (tokens a second) and peak (bytes of the process so far)."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", case]
    sides = {
        side: subprocess.Popen([*command, side, model], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for side in ("ours", "peer")
    }
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    try:
        for worker in sides.values():
            _ask(worker, "ready")
        for number in range(Rounds.count):
            for side, worker in sides.items():
                assert worker.stdin is not None
                worker.stdin.write("go\n")
                worker.stdin.flush()
                found[side].append(_ask(worker, "rate"))
                if number + 1 < Rounds.count:
                    _ask(worker, "ready")
                print(f"{case} round {number} {side}: {found[side][-1]['rate']:,.0f} tokens/s", file=sys.stderr)
    finally:
        for worker in sides.values():
            worker.kill()
            worker.wait()
    return found


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        case, side, model = sys.argv[2:]
        getattr(importlib.import_module(CASES[case]), side)(Rounds(), model)
        return
    from harness import Row, report

    # `make bench-train` passes the imported model's folder; a case that trains from nothing does not look at it
    names = [name for name in sys.argv[1:] if name in CASES] or list(CASES)
    model = next((name for name in sys.argv[1:] if name not in CASES), "")
    rows = []
    for name in names:
        module = importlib.import_module(CASES[name])
        if reason := getattr(module, "unavailable", str)(model):
            print(f"{name}: skipped: {reason}", file=sys.stderr)
            continue
        found = measure(name, model)
        rates = {side: statistics.median(r["rate"] for r in rounds[1:]) for side, rounds in found.items()}
        peaks = {side: max(r["peak"] for r in rounds) / 1e6 for side, rounds in found.items()}
        rows.append(Row(name, rates["ours"], rates["peer"], f"{module.PEER}, tokens/s", module.BAR))
        rows.append(Row(f"{name}_memory", peaks["ours"], peaks["peer"], f"{module.PEER}, MB at the peak", 1.0, True))
    report("train", rows)


if __name__ == "__main__":
    main()
