"""What the watermark survives, what breaks it, what it costs: `trace_mark.py BASE ALIGNED BASE.gguf CACHE`.

The quickstart's aligned model is marked for one of 10,000 recipients and attacked; each row says with which bound on
the probability of accusing an innocent the recipient is named, and the most suspicious other recipient and other key.
CACHE keeps the marked copy, what is trained from it and the battery's run. `--models` names trace_models.py's cache,
for models that nobody marked. llama-cpp-python makes Q4_K. The tables are of one run, or with `--missing` of the last
one and this; benchmarks/out/trace_mark.json holds {table: {row: figures}}.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trace_mark_cost as costs
import trace_mark_innocents as innocents
from harness import OUT
from trace_mark_attacks import STRATEGIES, Given, attacks, breaks, collusions, own_grid
from trace_mark_models import GRANTS, KEY, LEAKER, Tensors, build, load, relative_change

from steelyard.cli.output import print_table
from steelyard.trace import watermark
from steelyard.trace.alignment import align

BAR = -12.0  # log10 of the probability that the right grant must reach
COALITION = [GRANTS[number] for number in range(100, 10_000, 49)][:200]
PARTS = ("attacks", "collusions", "innocents", "bound", "cost", "battery")
WORKERS = 2

Row = dict[str, Any]


class Tables:
    """Rows as they come, on stderr and in benchmarks/out/trace_mark.json; as tables at the end."""

    def __init__(self, keep: bool) -> None:
        self.path = OUT / "trace_mark.json"
        self.all: dict[str, dict[str, Row]] = json.loads(self.path.read_text()) if keep and self.path.exists() else {}

    def add(self, table: str, name: str, row: Row) -> None:
        """One row, said at once and kept."""
        self.all.setdefault(table, {})[name] = row
        print(f"{table}: {name}: {json.dumps(row)}", file=sys.stderr, flush=True)
        OUT.mkdir(exist_ok=True)
        self.path.write_text(json.dumps(self.all, indent=1) + "\n")

    def lacks(self, table: str, names: Iterable[str]) -> list[str]:
        """Those of `names` that have no row yet."""
        return [name for name in names if name not in self.all.get(table, {})]

    def show(self) -> None:
        """All tables on stdout."""
        for title, rows in self.all.items():
            if title in ("mark_cost", "strengths"):  # few cases with many figures each
                names = list(dict.fromkeys(key for row in rows.values() for key in row))
                rows = {name: {case: row.get(name) for case, row in rows.items()} for name in names}
            columns = list(dict.fromkeys(key for row in rows.values() for key in row))
            cells = [(name, *(_cell(row.get(key)) for key in columns)) for name, row in rows.items()]
            print_table(title, ("case", *columns), cells)
        for name, row in self.all.get("mark_p", {}).items():
            print(f"[mark_p_{re.sub('[^a-z0-9]+', '_', name.lower()).strip('_')}] {row['guilty']:g}")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " ".join(_cell(one) for one in value)
    return "" if value is None else str(value)


class Work:
    """What one process needs to read suspects; the weights are loaded once."""

    def __init__(self, given: Given) -> None:
        torch.set_num_threads(1)
        self.given, self.original, self.marked = given, load(given.original), load(given.marked)

    def attacked(self, name: str, is_break: bool) -> Row:
        """Attack the marked copy, undo what can be undone, and say who is accused."""
        start, given = time.monotonic(), self.given
        suspect = (breaks if is_break else attacks)(given)[name](self.marked)
        change = relative_change(suspect, self.marked) if suspect.keys() == self.marked.keys() else None
        aligned = align(self.original, suspect, given.heads, given.kv_heads)
        del suspect
        row = named(self.original, aligned.tensors, [LEAKER]) | innocents.other_keys(self.original, aligned.tensors)
        if not is_break:
            row["holds"] = bool(row["guilty"] <= BAR and row["named"] == 1 and not row["framed"] + row["keys_accused"])
        note = given.trained[name][1] if name in given.trained else None
        return row | {"change": change, "seconds": round(time.monotonic() - start), "note": note}

    def granted_base(self, norms: bool) -> Row:
        """A release of which nothing was trained: a marked copy of the public base, back on the base's own grid."""
        base = load(self.given.base)
        return named(base, own_grid(self.given, norms, watermark.mark(base, KEY, LEAKER)), [LEAKER])

    def colluded(self, size: int, strategy: str) -> Row:
        """What a coalition of `size` makes, on the norms and four layers: there every position of the code is carried
        by several weights already, so that the rest would read the same."""
        layers = ("norm.weight", "layers.0.", "layers.9.", "layers.19.", "layers.29.")
        part = {name: tensor for name, tensor in self.original.items() if any(key in name for key in layers)}
        part |= {name: tensor for name, tensor in self.original.items() if tensor.ndim == 1}
        coalition = COALITION[:size]
        row = named(part, collusions(part, strategy, coalition), coalition)
        return row | {"holds": bool(row["named"]) and not row["framed"]}

    def colluded_until(self, strategy: str) -> Row:
        """Larger and larger coalitions, until nobody is named; the row says how many are named of each."""
        row: Row = {}
        for size in (20, 50, 100, 200):
            found = self.colluded(size, strategy)
            row |= {f"of {size}": found["named"], "framed": row.get("framed", 0) + found["framed"]}
            if not found["named"]:
                break
        return row

    def innocent(self, kind: str, *arguments: Any) -> Row:
        """One of the ways of `trace_mark_innocents` to suspect an unmarked model."""
        return getattr(innocents, kind)(self.original, *arguments)  # type: ignore[no-any-return]


def named(original: Tensors, suspect: Tensors, guilty: Sequence[str]) -> Row:
    """Read a suspect in the original's layout: log10 of the bound of the guilty one who is surest (`guilty`) and of the
    most suspicious innocent; how many guilty are named and how many innocent."""
    found = watermark.detect(original, suspect, KEY, GRANTS)
    is_guilty = np.isin(GRANTS, list(guilty))
    right = sum(grant in set(guilty) for grant in found.accused)
    return {
        "guilty": round(float(found.log10_p[is_guilty].min()), 1),
        "innocent": round(float(found.log10_p[~is_guilty].min()), 1),
        "named": right,
        "framed": len(found.accused) - right,
    }


_work: Work


def _begin(given: Given) -> None:
    global _work
    _work = Work(given)


def _do(method: str, *arguments: Any) -> Row:
    return getattr(_work, method)(*arguments)  # type: ignore[no-any-return]


def spread(tables: Tables, given: Given, jobs: dict[tuple[str, str], tuple[Any, ...]]) -> None:
    """Do jobs, by table and row, in WORKERS processes."""
    if not jobs:
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, context, _begin, (given,)) as pool:
        running = {pool.submit(_do, *job): place for place, job in jobs.items()}
        for done in as_completed(running):
            tables.add(*running[done], done.result())


def jobs(parts: Sequence[str], tables: Tables, given: Given, models: Path | None) -> dict[tuple[str, str], Any]:
    """Everything that is read from suspects and has no row yet."""
    found: dict[tuple[str, str], Any] = {}
    if "attacks" in parts:
        for table, plans in (("mark_p", attacks(given)), ("limits", breaks(given))):
            found |= {(table, name): ("attacked", name, table == "limits") for name in tables.lacks(table, plans)}
        grids = {"nothing trained, own grid": False, "nothing trained, own grid, norms too": True}
        found |= {("limits", name): ("granted_base", grids[name]) for name in tables.lacks("limits", grids)}
    if "collusions" in parts:
        kinds = {f"{size} collude: {kind}": ("colluded", size, kind) for size in (2, 5, 10) for kind in STRATEGIES}
        found |= {("collusion", name): kinds[name] for name in tables.lacks("collusion", kinds)}
        kinds = {f"more collude: {kind}": ("colluded_until", kind) for kind in STRATEGIES}
        found |= {("limits", name): kinds[name] for name in tables.lacks("limits", kinds)}
    if "innocents" in parts:
        heads = given.heads, given.kv_heads
        rows: dict[str, tuple[Any, ...]] = {
            "the release itself": ("innocent", "unmarked", given.original, heads),
            "10 models of random weights": ("innocent", "of_random_weights", 10),
        }
        if models is not None:
            same, other = innocents.independent(models, given.original)
            rows |= {name: ("innocent", "unmarked", path, heads) for name, path in same}
            rows["models of other sizes"] = ("innocent", "of_other_sizes", other, heads)
        found |= {("innocents", name): rows[name] for name in tables.lacks("innocents", rows)}
    return found


def alone(tables: Tables, given: Given, parts: Sequence[str], models: Path | None, cache: Path) -> None:
    """What takes all cores, or little time."""
    if "innocents" in parts and models is not None and tables.lacks("innocents", ["trained apart"]):
        tables.add("innocents", "trained apart", innocents.pairs_apart(models))
    if "bound" in parts:
        readings = innocents.readings()
        for name in tables.lacks("bound", readings):
            tables.add("bound", name, innocents.bound_holds(readings[name]))
    if "cost" in parts and "mark_cost" not in tables.all:
        for name, row in costs.cost(given.original, given.base, cache / "work").items():
            tables.add("mark_cost", name, row)
    if "battery" in parts and "battery" not in tables.all:
        for kind, rows in costs.battery(given.original, given.marked, cache).items():
            for row in rows:
                tables.add("battery", f"{kind}: {row['metric']}", row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("base", "aligned", "base_gguf", "cache"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--models", type=Path, help="trace_models.py's cache")
    parser.add_argument("--only", choices=[*PARTS, "strengths"], nargs="*", help="strengths only where named")
    parser.add_argument("--missing", action="store_true", help="only rows that the last run did not come to")
    chosen = parser.parse_args()
    parts, work = chosen.only or PARTS, chosen.cache / "work"
    tables, start = Tables(chosen.missing), time.monotonic()
    if "strengths" in parts:
        for name, row in costs.strengths(chosen.aligned, chosen.base, work).items():
            tables.add("strengths", name, row)
    if parts != ["strengths"]:
        trained = build(chosen.base, chosen.aligned, chosen.cache)
        given = Given.of(chosen.aligned, chosen.base, chosen.base_gguf, trained)
        spread(tables, given, jobs(parts, tables, given, chosen.models))
        alone(tables, given, parts, chosen.models, chosen.cache)
    tables.show()
    print(f"{time.monotonic() - start:,.0f} s")


if __name__ == "__main__":
    main()
