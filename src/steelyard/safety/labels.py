"""Sheets: texts for a person to read and label; and how far a judge agrees with the labels.

A sheet hides which model wrote a text and what a judge or scorer said: JSON lines, shuffled, with a `key`, the texts
and an empty `label`. On a sheet of answers (`draw_sheet`) the reader fills in one of `judge.VERDICTS` each, and what
`note` he likes; `draw.py` makes sheets from a journal.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from steelyard.base.canonical import digest
from steelyard.base.errors import FormatError, UsageError
from steelyard.base.files import read_bounded, write_atomic
from steelyard.base.strict import strict_json
from steelyard.safety.judge import VERDICTS
from steelyard.safety.measure import Answer

SHEET_LIMIT = 64 << 20  # bytes
ROW_LIMIT = 1 << 20  # bytes of a row
G = TypeVar("G", bound=Hashable)


# -- sheets ----------------------------------------------------------------------------------------------------------


def apportion(sizes: Mapping[G, int], total: int, weights: Mapping[G, float] | None = None) -> dict[G, int]:
    """How many to draw from each group, `total` in all: one from each (the first ones, if `total` is less), then in
    proportion to `weights` (default: alike), no group over its size; what a full group leaves goes to the others.

    Huntington and Hill's divisor method. Raises UsageError where `total` is under 1 or over the sum of `sizes`.
    """
    if not 1 <= total <= sum(sizes.values()):
        raise UsageError(
            f"{total:,} were asked for, there are {sum(sizes.values()):,} to draw from: ask for no more (--n)"
        )
    weight = weights or dict.fromkeys(sizes, 1.0)
    given = dict.fromkeys(sizes, 0)

    def priority(group: G) -> float:
        return weight[group] / (given[group] * (given[group] + 1)) ** 0.5 if given[group] else math.inf

    for _ in range(total):
        given[max((group for group in sizes if given[group] < sizes[group]), key=priority)] += 1
    return given


def write_sheet(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write rows as JSON lines. Raises UsageError where `path` exists: labels are never overwritten."""
    if path.exists():
        raise UsageError(f"{path} exists: labels may be in it; move it, or draw elsewhere")
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def read_sheet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a sheet, each with its place (`FILE:LINE`). Raises FormatError naming the line."""
    for number, line in enumerate(read_bounded(path, SHEET_LIMIT).splitlines(), 1):
        where = f"{path}:{number}"
        row = strict_json(line, where, limit=ROW_LIMIT, depth=2)
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("key", "label")):
            raise FormatError(f"{where}: not a row of a sheet: it needs a key and a label, both text")
        yield where, row


# -- answers and a judge ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """Judge against labels: `table` counts (label, verdict). `kappa` is Cohen's (1960); None where it is undefined."""

    n: int
    agreement: float
    kappa: float | None
    table: dict[str, dict[str, int]]


def key_of(model: str, answer: Answer) -> str:
    """What an answer is called on a sheet: says nothing to the reader, but finds the answer again."""
    return digest([model, answer.id, answer.answer])[:16]


def draw_sheet(answers: Mapping[str, Sequence[Answer]], count: int, seed: int, path: Path) -> int:
    """Write `count` answers of each model (the same prompts), shuffled, to `path`; gives how many lines it has.

    The draw is spread evenly over the sets of prompts. Raises UsageError where there are fewer prompts than `count`,
    or the sheet exists.
    """
    first = next(iter(answers.values()))
    by_set: dict[str, list[str]] = {}
    for answer in first:
        by_set.setdefault(answer.id.rsplit("/", 1)[0], []).append(answer.id)
    quota = apportion({name: len(ids) for name, ids in by_set.items()}, count)
    chance = random.Random(seed)
    wanted = {one for name, ids in by_set.items() for one in chance.sample(ids, quota[name])}
    rows = [
        {"key": key_of(model, answer), "prompt": answer.prompt, "answer": answer.answer, "label": "", "note": ""}
        for model, given in answers.items()
        for answer in given
        if answer.id in wanted
    ]
    chance.shuffle(rows)
    write_sheet(path, rows)
    return len(rows)


def score_sheet(answers: Mapping[str, Sequence[Answer]], path: Path) -> dict[str, Agreement]:
    """Agreement of the judge with a filled sheet, by model and over all.

    Raises FormatError naming the line for a row without a label, with an unknown one, or of other answers.
    """
    known = {key_of(model, answer): (model, answer) for model, given in answers.items() for answer in given}
    pairs: list[tuple[str, str, str]] = []  # model, label, verdict
    for where, row in read_sheet(path):
        key, label = row["key"], row["label"]
        if key not in known:
            raise FormatError(f"{where}: key {key!r} is of no answer measured here")
        if label not in VERDICTS:
            raise FormatError(f"{where}: label {label!r}: must be one of {', '.join(VERDICTS)}")
        model, answer = known[key]
        pairs.append((model, label, answer.verdict))
    if not pairs:
        raise FormatError(f"{path}: no row: nothing to compare")
    found = {model: agreement([(a, b) for who, a, b in pairs if who == model]) for model in answers}
    return found | {"all": agreement([(a, b) for _, a, b in pairs])}


def agreement(pairs: Sequence[tuple[str, str]]) -> Agreement:
    """Of (label, verdict) pairs. Raises UsageError for none."""
    if not pairs:
        raise UsageError("no labels: agreement has nothing to count")
    n = len(pairs)
    same = sum(label == verdict for label, verdict in pairs) / n
    labels, verdicts = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    chance = sum(labels[kind] * verdicts[kind] for kind in VERDICTS) / n**2
    counts = Counter(pairs)
    table = {str(a): {str(b): counts[a, b] for b in VERDICTS if counts[a, b]} for a in VERDICTS if labels[a]}
    return Agreement(n, same, None if chance == 1 else (same - chance) / (1 - chance), table)
