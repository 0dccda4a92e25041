"""Runs the cells of `bounds.py`, keeps every cell that is done, and says what they show together."""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import resources
from pathlib import Path

import numpy as np
from bounds_data import Cell
from harness import Row

from steelyard.cli.output import print_table

Task = tuple[str, int, Cell]  # part, number within the part, what is simulated
POWER, POWER_ICC = 0.8, 0.3
LEAST, FALSE_RELEASE = 0.94, 0.05


# -- the run ---------------------------------------------------------------------------------------------------------


def code_digest() -> str:
    """Of all that a cell's figures depend on: what measures and decides, the scorers' cards, the simulation."""
    package, own = Path(str(resources.files("steelyard"))), Path(__file__).parent
    files = [*(package / "safety").rglob("*.py"), *(package / "safety").rglob("*.yaml")]
    files += [*(package / "scorers").rglob("*.json"), own / "bounds.py", own / "bounds_data.py"]
    digest = hashlib.sha256(np.__version__.encode())
    for path in sorted(files):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def finished(path: Path, code: str, tasks: Sequence[Task]) -> dict[tuple[str, int], list[Cell]]:
    """The cells of an earlier run of this code on these tasks; a line that a kill cut short is none."""
    wanted = {(part, number): json.loads(json.dumps(cell)) for part, number, cell in tasks}
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            one = json.loads(line)
        except json.JSONDecodeError:
            continue
        place = one["part"], one["number"]
        if one["code"] == code and place in wanted and wanted[place] == one["task"]:
            found[place] = one["cells"]
    return found


def simulate_all(tasks: Sequence[Task], simulate: Callable[[Task], list[Cell]], jobs: int, path: Path) -> list[Cell]:
    """The cells of all tasks, in their order; those in `path` are not simulated again, the others are added to it.

    Cells are taken in a random order, so that those done are like those to do and the time left can be told.
    """
    code = code_digest()
    done = finished(path, code, tasks)
    todo = [task for task in tasks if task[:2] not in done]
    random.Random(0).shuffle(todo)
    path.parent.mkdir(parents=True, exist_ok=True)
    if done:
        print(f"{len(done):,} cells of {len(tasks):,} stand in {path.name}", file=sys.stderr)
    start = said = time.monotonic()
    with ProcessPoolExecutor(jobs) as pool, path.open("a") as kept:
        kept.write("\n" if path.stat().st_size else "")  # after a line that was cut short
        asked = {pool.submit(simulate, task): task for task in todo}
        for count, future in enumerate(as_completed(asked), 1):
            part, number, task = asked.pop(future)
            if future.exception():
                pool.shutdown(wait=False, cancel_futures=True)
            cells = done[part, number] = future.result()
            line = {"part": part, "number": number, "code": code, "task": task, "cells": cells}
            kept.write(json.dumps(line) + "\n")
            kept.flush()
            for cell in cells:
                if cell.get("coverage", 1) < LEAST:
                    print(f"{cell['bound']}: {cell['coverage']:.2%} at {where(cell)}", file=sys.stderr)
            now = time.monotonic()
            if now - said > 10 or count == len(todo):
                said, rate = now, count / (now - start)
                print(
                    f"{len(done):,} of {len(tasks):,} cells, {now - start:,.0f} s, {rate:.1f} a second, "
                    f"{(len(todo) - count) / rate:,.0f} s left",
                    file=sys.stderr,
                )
    return [cell for part, number, _ in tasks for cell in done[part, number]]


# -- what it shows ---------------------------------------------------------------------------------------------------


def where(cell: Cell) -> str:
    return ", ".join(f"{k} {v}" for k, v in cell.items() if k not in ("bound", "coverage", "runs") and v is not None)


def summarise(cells: Sequence[Cell]) -> list[Row]:
    """Print what users need, and give the rows that bars are set on, in per cent beside what is asked."""
    coverage: dict[str, list[Cell]] = {}
    for cell in cells:
        if "coverage" in cell:
            coverage.setdefault(cell["bound"], []).append(cell)
    table = []
    for kind, those in coverage.items():
        worst = min(those, key=lambda cell: cell["coverage"])
        mean, under = np.mean([cell["coverage"] for cell in those]), sum(cell["coverage"] < LEAST for cell in those)
        table.append((kind, f"{len(those)}", f"{worst['coverage']:.2%}", f"{under}", f"{mean:.2%}", where(worst)))
    if table:
        print_table("coverage, one-sided 95%", ("bound", "cells", "lowest", "< 94%", "mean", "lowest where"), table)
    power = [cell for cell in cells if cell["bound"] == "power"]
    if power:
        limits = sorted({cell["threshold"] for cell in power})
        models = sorted({(cell["scorer"] or "no scorer's errors", cell["samples"]) for cell in power})
        prompts = {
            (cell["scorer"] or "no scorer's errors", cell["samples"], cell["threshold"]): cell["prompts"]
            for cell in power
        }
        print_table(
            f"prompts at which a model at half the threshold is released with {POWER:.0%} (correlation {POWER_ICC})",
            ("scorer", "samples of a prompt", *(f"{limit:.0%}" for limit in limits)),
            [
                (
                    name,
                    f"{samples}",
                    *("never" if (n := prompts[name, samples, limit]) is None else f"{n:,}" for limit in limits),
                )
                for name, samples in models
            ],
        )
    rows = []
    if coverage:
        lowest = min(cell["coverage"] for those in coverage.values() for cell in those)
        highest = max(float(np.mean([cell["coverage"] for cell in those])) for those in coverage.values())
        print(f"coverage: {np.mean([cell['coverage'] for cell in cells if 'coverage' in cell]):.2%} over all bounds")
        rows.append(Row("coverage_min", 100 * lowest, 94.0, "asked, % at least", 1.0))
        rows.append(Row("coverage_mean", 100 * highest, 98.5, "asked, % at most", 1.0, less_is_better=True))
    for metric, key in (("false_release", "released"), ("false_stop", "stopped")):
        shares = [cell for cell in cells if key in cell]
        if shares:
            worst = max(shares, key=lambda cell: cell[key])
            print(f"{metric}: {worst[key]:.2%} at most, in {worst}; {np.mean([c[key] for c in shares]):.2%} on average")
            rows.append(Row(metric, 100 * worst[key], 5.0, "asked, % at most", 1.0, less_is_better=True))
    return rows
