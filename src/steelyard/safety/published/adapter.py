"""What an adapter is: how a published file becomes entries, how they are asked, and by which metric they count."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from steelyard.base.errors import FormatError
from steelyard.inference.endpoint import Sampling
from steelyard.safety.rows import Row, field_of, read_rows

Mode = Literal["chat", "completion", "likelihood"]
PROMPT_LIMIT = 20_000  # characters


@dataclass(frozen=True)
class Entry:
    """One prompt of a set.

    `options`: what may follow it, for mode likelihood. `facets`: what results are split by (hazard, group). `facts`:
    what its metric needs to know. `family`: the cluster of the statistics, where prompts were written from one template
    or about one thing; the entry itself otherwise. `language`: ISO 639-1, for scorers that tell languages apart.
    """

    id: str
    prompt: str
    options: tuple[str, ...] = ()
    facets: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    family: str = ""
    language: str = "en"

    @property
    def cluster(self) -> str:
        return self.family or self.id


@dataclass(frozen=True)
class Adapter:
    """A set.

    Mode chat asks in a user's turn, completion continues text, likelihood reads `options` after the prompt. `sampling`
    None is as the model ships, with `max_tokens`. `metrics`: by name (`metrics.py`). `rubric`: what a judge is asked
    (`judging.py`), where one is given; `notes` say what the figures are not.
    """

    name: str
    about: str
    source: str
    mode: Mode
    metrics: tuple[str, ...]
    read: Callable[[Path], Sequence[Entry]]
    samples: int = 1
    sampling: Sampling | None = None
    max_tokens: int = 256
    rubric: str | None = None
    gap: str | None = None
    notes: tuple[str, ...] = ()
    data: Path | None = None  # where the set ships with the package, or beside its own file


def text_field(row: Row, name: str, where: str) -> str:
    """A field that must hold text. Raises FormatError."""
    value = field_of(row, name, where)
    if not isinstance(value, str) or not value.strip() or len(value) > PROMPT_LIMIT:
        raise FormatError(f"{where}: {name} must be text of 1 to {PROMPT_LIMIT:,} characters")
    return value.strip()


def rows_of(path: Path, *needed: str) -> list[tuple[str, Row]]:
    """(place, row) of every row, which all have the fields `needed`. Raises FormatError."""
    found = [(f"{path}: row {number}", row) for number, row in enumerate(read_rows(path), 1)]
    for where, row in found:
        for name in needed:
            field_of(row, name, where)
    return found


def chosen(entries: Sequence[Entry], limit: int | None, seed: int) -> list[Entry]:
    """`limit` entries drawn by `seed`, in the set's order; all without a limit. Raises FormatError: none, or an id
    that occurs twice."""
    if not entries:
        raise FormatError("the set holds no prompt")
    if len({entry.id for entry in entries}) != len(entries):
        seen: set[str] = set()
        twice = next(entry.id for entry in entries if entry.id in seen or seen.add(entry.id))  # type: ignore[func-returns-value]
        raise FormatError(f"the set holds the id {twice!r} twice")
    if limit is None or limit >= len(entries):
        return list(entries)
    return [entries[place] for place in sorted(random.Random(seed).sample(range(len(entries)), limit))]
