"""What the watermark survives, what breaks it, what it costs: `trace_mark.py BASE ALIGNED BASE.gguf CACHE`.

The quickstart's aligned model is marked for one of 10,000 recipients and attacked; each row of the table says with
which bound on the probability of accusing an innocent the recipient is named, and the most suspicious other recipient.
CACHE keeps the marked copy and what is trained from it. Needs trace_models.py's CACHE beside it for independent models
(`--models`), and llama-cpp-python for Q4_K.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from harness import OUT
from trace_mark_attacks import STRATEGIES, Given, attacks, breaks, collusions
from trace_mark_cost import cost
from trace_mark_models import GRANTS, KEY, LEAKER, Tensors, build, load, relative_change

from steelyard.base.errors import SteelyardError
from steelyard.cli.output import print_table
from steelyard.trace import tardos, watermark
from steelyard.trace.alignment import align

BAR = -12.0  # log10 of the probability that the right grant must reach
COALITION = [GRANTS[number] for number in range(100, 10_000, 49)][:200]


class Table:
    """Rows as they come, on the terminal and in benchmarks/out/trace_mark.json."""

    def __init__(self) -> None:
        path = OUT / "trace_mark.json"
        self.rows: dict[str, dict[str, object]] = json.loads(path.read_text()) if path.exists() else {}

    def add(self, name: str, **row: object) -> None:
        """One row, printed at once and kept."""
        self.rows[name] = row
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in row.items()), file=sys.stderr, flush=True)
        OUT.mkdir(exist_ok=True)
        (OUT / "trace_mark.json").write_text(json.dumps(self.rows, indent=1) + "\n")


def named(original: Tensors, suspect: Tensors, grants: list[str], guilty: Iterable[str]) -> dict[str, object]:
    """Read a suspect in the original's layout, and say who is accused."""
    found = watermark.detect(original, suspect, KEY, grants)
    is_guilty = np.isin(grants, list(guilty))
    row: dict[str, object] = {"innocent": round(float(found.log10_p[~is_guilty].min()), 1)}
    if is_guilty.any():
        row["guilty"] = round(float(found.log10_p[is_guilty].min()), 1)
        row["named"] = sum(grant in set(guilty) for grant in found.accused)
    row["framed"] = len(found.accused) - int(row.get("named", 0))
    return row


def attacked(table: Table, given: Given, original: Tensors, quick: bool) -> None:
    """Every attack and every breaker on the marked copy."""
    marked = load(given.marked)
    for kind, plans in (("attack", attacks(given)), ("break", breaks(given))):
        for name, attack in plans.items():
            if quick and name in table.rows:
                continue
            start = time.monotonic()
            suspect = attack(marked)
            change = relative_change(suspect, marked) if suspect.keys() == marked.keys() else None
            aligned = align(original, suspect, given.heads, given.kv_heads)
            del suspect
            row = named(original, aligned.tensors, GRANTS, [LEAKER])
            holds = None if kind == "break" else bool(row["guilty"] <= BAR and row["named"] == 1 and row["framed"] == 0)
            note = given.trained[name][1] if name in given.trained else ""
            seconds = round(time.monotonic() - start)
            table.add(name, kind=kind, **row, holds=holds, change=change, seconds=seconds, note=note)


def colluded(table: Table, original: Tensors, quick: bool) -> None:
    """Coalitions of 2, 5 and 10, then of 20, 50 and 200, on the norms and four layers: there every position is carried
    by several weights already, so that the rest would read the same."""
    layers = ("norm.weight", "layers.0.", "layers.9.", "layers.19.", "layers.29.")
    part = {name: tensor for name, tensor in original.items() if any(key in name for key in layers) or tensor.ndim == 1}
    for size in (2, 5, 10, 20, 50, 200):
        for strategy in STRATEGIES:
            name = f"{size} collude: {strategy}"
            if (quick and name in table.rows) or (size == 200 and strategy not in ("average", "minority")):
                continue
            coalition = COALITION[:size]
            row = named(part, collusions(part, strategy, coalition), GRANTS, coalition)
            holds = bool(row["named"]) and not row["framed"] if size <= 10 else None
            table.add(name, kind="attack" if size <= 10 else "break", **row, holds=holds)


def innocents(table: Table, given: Given, original: Tensors, models: Path | None) -> None:
    """Keys and recipients that have nothing to do with it, and models that nobody marked."""
    marked = load(given.marked)
    strangers = [f"never-delivered-{number}" for number in range(1000)]
    table.add("1,000 grants never delivered", kind="innocent", **named(original, marked, strangers, []))
    keys = [hashlib.sha256(f"another key {number}".encode()).digest() for number in range(1000)]
    part = [name for name in original if original[name].ndim == 1 or ".layers.0.self_attn" in name]
    bounds = [
        watermark.detect({name: original[name] for name in part}, marked, key, [LEAKER]).log10_p[0] for key in keys
    ]
    framed = int((np.array(bounds) <= np.log10(tardos.ACCUSE)).sum())
    table.add("1,000 other keys", kind="innocent", innocent=round(float(min(bounds)), 1), framed=framed)
    del marked
    table.add("the release itself", kind="innocent", **named(original, original, GRANTS, []))
    draw, worst, framed, pairs = np.random.default_rng(15), 0.0, 0, 0
    for _ in range(20):
        drawn = {name: draw.permutation(tensor, axis=0) for name, tensor in original.items()}
        row = named(original, drawn, GRANTS[:1000], [])
        worst, framed = min(worst, float(row["innocent"])), framed + int(row["framed"])
    table.add("20 models of the same weights, rows shuffled", kind="innocent", innocent=worst, framed=framed)
    if models is None:
        return
    rows = [row for row in json.loads((models / "index.json").read_text()) if Path(row["path"]).is_dir()]
    small = [row for row in rows if row["family"].startswith("trained from nothing")]
    worst, framed = 0.0, 0
    for one in small:
        for other in small:
            if one is other:
                continue
            ours, theirs = load(Path(one["path"])), load(Path(other["path"]))
            config = json.loads((Path(one["path"]) / "config.json").read_text())
            heads = config["num_attention_heads"], config["num_key_value_heads"]
            try:
                aligned = align(ours, theirs, *heads)
                row = named(ours, aligned.tensors, GRANTS[:1000], [])
            except SteelyardError:  # another size, which is an error by itself
                continue
            worst, framed, pairs = min(worst, float(row["innocent"])), framed + int(row["framed"]), pairs + 1
    table.add(f"{pairs} pairs of models trained apart", kind="innocent", innocent=worst, framed=framed)
    same_size = [
        row for row in rows if row["name"] in ("base", "untrained-0", "untrained-1") or "other-" in row["name"]
    ]
    for row in same_size:
        try:
            aligned = align(original, load(Path(row["path"])), given.heads, given.kv_heads)
            found = named(original, aligned.tensors, GRANTS, [])
        except SteelyardError as error:
            print(f"{row['name']}: {error}", file=sys.stderr)
            continue
        table.add(f"unmarked: {row['name']}", kind="innocent", **found, note=row["family"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("base", "aligned", "base_gguf", "cache"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--models", type=Path, help="trace_models.py's cache")
    parser.add_argument("--steps", type=int, default=16, help="of each fine-tune of the marked copy")
    parser.add_argument("--only", choices=["attacks", "collusions", "innocents", "cost"], nargs="*")
    parser.add_argument("--missing", action="store_true", help="only rows that the last run did not come to")
    parser.add_argument("--battery", action="store_true", help="the quick battery's rates of all three, too")
    chosen = parser.parse_args()
    parts = chosen.only or ["attacks", "collusions", "innocents", "cost"]
    given = Given.of(chosen.base, chosen.base_gguf, build(chosen.base, chosen.aligned, chosen.cache, chosen.steps))
    table, original = Table(), load(chosen.aligned)
    table.add("mark", kind="cost", relative_rms=relative_change(load(given.marked), original))
    if "attacks" in parts:
        attacked(table, given, original, chosen.missing)
    if "collusions" in parts:
        colluded(table, original, chosen.missing)
    if "innocents" in parts:
        innocents(table, given, original, chosen.models)
    if "cost" in parts:
        for name, row in cost(chosen.aligned, given.marked, chosen.base, chosen.cache, chosen.battery).items():
            table.add(name, kind="cost", **row)
    columns = ("kind", "guilty", "innocent", "named", "framed", "holds")
    cells = [(name, *(str(row.get(column, "")) for column in columns)) for name, row in table.rows.items()]
    print_table("trace_mark (log10 p)", ("case", *columns), cells)


if __name__ == "__main__":
    main()
