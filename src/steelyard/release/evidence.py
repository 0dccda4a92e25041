"""What a run left behind, as read: nothing of it is believed yet. And what is said where two JSON values differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from steelyard.base.canonical import canonical_json
from steelyard.base.errors import FormatError
from steelyard.base.files import read_bounded
from steelyard.base.strict import strict_json
from steelyard.safety.battery import Battery
from steelyard.safety.journal import Journal, read_journal
from steelyard.safety.overlap import OVERLAP, Overlap, read_overlap
from steelyard.safety.policy import Policy
from steelyard.safety.report import JOURNAL, PREDECESSOR, read_predecessor

CLOCKS_APART = timedelta(minutes=5)  # two machines' clocks may differ so much
FILE_LIMIT = 16_000_000  # bytes of a battery, policy or report; the battery `release` has 3,000,000
REPORT_DEPTH = 64
_T = TypeVar("_T", Battery, Policy)


@dataclass(frozen=True)
class Evidence:
    """A run's parts. `where` gives each part's file, for messages. `predecessor` is the journal beside the candidate's,
    `overlap` what a search of the training data found; each None where there is none."""

    journal: Journal
    battery: Battery
    policies: tuple[Policy, ...]
    report: Any
    predecessor: Journal | None
    overlap: Overlap | None
    where: Mapping[str, str]


def read_evidence(
    root: Path, *, journal: str, battery: str, report: str, policies: Sequence[str], predecessor: str, overlap: str
) -> Evidence:
    """Read a run's files under `root`, each named relative to it; an absent report, predecessor's journal or overlap is
    None.

    Raises SteelyardError (FormatError, UsageError) naming the first file that cannot be read.
    """
    return Evidence(
        journal=read_journal(root / journal),
        battery=_load(root / battery, Battery),
        policies=tuple(_load(root / name, Policy) for name in policies),
        report=_json(root / report) if (root / report).is_file() else None,
        predecessor=read_predecessor(root / predecessor),
        overlap=read_overlap(root / overlap),
        where={
            "journal": journal,
            "battery": battery,
            "report": report,
            "predecessor": predecessor,
            "overlap": overlap,
        },
    )


def read_run(run: Path) -> Evidence:
    """The evidence in a run folder."""
    names = sorted(f"policies/{path.name}" for path in (run / "policies").glob("*.json"))
    return read_evidence(
        run,
        journal=JOURNAL,
        battery="battery.json",
        report="report.json",
        policies=names,
        predecessor=PREDECESSOR,
        overlap=OVERLAP,
    )


def _load(path: Path, kind: type[_T]) -> _T:
    try:
        return kind.model_validate_json(canonical_json(_json(path)))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or kind.__name__.lower()
        raise FormatError(f"{path}: {key}: {first['msg']}") from error


def _json(path: Path) -> Any:
    try:
        data = read_bounded(path, FILE_LIMIT)
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}") from error
    return strict_json(data, str(path), limit=FILE_LIMIT, depth=REPORT_DEPTH)


# -- differences ------------------------------------------------------------------------------------------------------


def differing_keys(left: Any, right: Any, key: str = "") -> list[str]:
    """Paths of the keys in which two JSON values differ, e.g. `criteria.toxicity.chat.max`.

    Lists of objects that all have a name (metric, id, name) are compared by it: their order says nothing.
    """
    if isinstance(left, dict) and isinstance(right, dict):
        names = sorted(left.keys() | right.keys())
        absent = object()
        pairs = [(f"{key}.{name}" if key else name, left.get(name, absent), right.get(name, absent)) for name in names]
    elif isinstance(left, list) and isinstance(right, list):
        for label in ("metric", "id", "name"):
            if _labelled(left, label) and _labelled(right, label):
                mine, its = ({item[label]: item for item in items} for items in (left, right))
                return differing_keys(mine, its, key)
        if len(left) != len(right):
            return [key]
        pairs = [(f"{key}.{i}", one, other) for i, (one, other) in enumerate(zip(left, right, strict=True))]
    else:
        return [] if left == right and type(left) is type(right) else [key]
    return [found for name, one, other in pairs for found in differing_keys(one, other, name)]


def _labelled(items: list[Any], label: str) -> bool:
    names = [item.get(label) if isinstance(item, dict) else None for item in items]
    return all(isinstance(name, str) for name in names) and len(set(names)) == len(names)


def some(names: Sequence[str]) -> str:
    """The first four names, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
