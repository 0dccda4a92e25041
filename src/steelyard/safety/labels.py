"""Answers for a person to read and label, and how far a judge agrees with the labels.

The sheet hides which model wrote an answer and what the judge said: JSON lines with `key`, `prompt`, `answer` and an
empty `label`, shuffled. The reader fills in one of `judge.VERDICTS` each (and what `note` he likes).
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from steelyard.base.canonical import digest
from steelyard.base.errors import FormatError, UsageError
from steelyard.base.files import read_bounded, write_atomic
from steelyard.safety.judge import VERDICTS
from steelyard.safety.measure import Answer

SHEET_LIMIT = 16 << 20  # bytes


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
    or the sheet exists: labels are never overwritten.
    """
    if path.exists():
        raise UsageError(f"{path} exists: labels may be in it; move it, or draw elsewhere")
    first = next(iter(answers.values()))
    by_set: dict[str, list[str]] = {}
    for answer in first:
        by_set.setdefault(answer.id.rsplit("/", 1)[0], []).append(answer.id)
    if not 1 <= count <= len(first):
        raise UsageError(f"count {count}: there are {len(first)} answers of each model")
    chance = random.Random(seed)
    for ids in by_set.values():
        chance.shuffle(ids)
    chosen: list[str] = []
    while len(chosen) < count:
        for ids in by_set.values():
            if ids and len(chosen) < count:
                chosen.append(ids.pop())
    wanted = set(chosen)
    rows = [
        {"key": key_of(model, answer), "prompt": answer.prompt, "answer": answer.answer, "label": "", "note": ""}
        for model, given in answers.items()
        for answer in given
        if answer.id in wanted
    ]
    chance.shuffle(rows)
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    return len(rows)


def score_sheet(answers: Mapping[str, Sequence[Answer]], path: Path) -> dict[str, Agreement]:
    """Agreement of the judge with a filled sheet, by model and over all.

    Raises FormatError naming the line for a row without a label, with an unknown one, or of other answers.
    """
    known = {key_of(model, answer): (model, answer) for model, given in answers.items() for answer in given}
    pairs: list[tuple[str, str, str]] = []  # model, label, verdict
    for number, line in enumerate(read_bounded(path, SHEET_LIMIT).decode("utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            key, label = row["key"], row["label"]
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{path}:{number}: not a row of a sheet: {error}") from error
        if key not in known:
            raise FormatError(f"{path}:{number}: key {key!r} is of no answer measured here")
        if label not in VERDICTS:
            raise FormatError(f"{path}:{number}: label {label!r}: must be one of {', '.join(VERDICTS)}")
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
