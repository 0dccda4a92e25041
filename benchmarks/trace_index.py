"""What models the trace benchmarks have, who their ancestors are, and which pairs of them are judged (the index that
`trace_models.py` writes)."""

from __future__ import annotations

import fcntl
import json
from itertools import product
from pathlib import Path
from typing import Any

RELEASE, BASE = "aligned", "base"
REFERENCES = (RELEASE, BASE, "small-stories-0", "middle-wiki-0", "large-novels_en-0")


def read_index(path: Path) -> list[dict[str, Any]]:
    """The rows that are there."""
    found: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return found


def add_to_index(path: Path, new: list[dict[str, Any]]) -> None:
    """Add rows; a row of the same name gives way. `related` is told from all that is known."""
    with (path.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        names = {row["name"] for row in new}
        rows = [row for row in read_index(path) if row["name"] not in names] + new
        known = lineage(rows)
        for row in rows:
            row["related"] = RELEASE in known[row["name"]]
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(rows, indent=1) + "\n")
        temporary.replace(path)


def lineage(rows: list[dict[str, Any]]) -> dict[str, set[str]]:
    """The ancestors of every model by name, itself included."""
    parents = {row["name"]: row["parents"] for row in rows}

    def of(name: str) -> set[str]:
        return {name}.union(*(of(parent) for parent in parents.get(name, [])))

    return {name: of(name) for name in parents}


def pairs(rows: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any], str]]:
    """(suspect, reference, truth): `derived` where the reference is an ancestor, `sibling` where they share one, else
    `unrelated`. References are `REFERENCES`; among unrelated models of one shape each is one for the others."""
    known, by_name = lineage(rows), {row["name"]: row for row in rows}
    alone = [row["name"] for row in rows if row["family"].startswith("trained from nothing")]
    found = []
    counted = [row for row in rows if row.get("counted", True)]
    for row, name in product(counted, [*REFERENCES, *(name for name in alone if name not in REFERENCES)]):
        if name == row["name"] or (name not in REFERENCES and name.split("-")[0] != row["name"].split("-")[0]):
            continue
        shared = known[row["name"]] & known[name]
        truth = "derived" if name in known[row["name"]] else "sibling" if shared else "unrelated"
        found.append((row, by_name[name], truth))
    return found
