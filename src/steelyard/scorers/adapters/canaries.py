"""The canaries of an adapter: those that ship, or a user's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from steelyard.base.errors import FormatError, UsageError
from steelyard.base.strict import strict_json
from steelyard.base.yamlfile import Document, read_text
from steelyard.scorers import moderation, refusal
from steelyard.scorers.base import Canary, Item

SHIPPED = {
    **dict.fromkeys(moderation.CATEGORIES, moderation.CANARIES),
    "refusal": refusal.CANARIES,
    "harm_compliance": Path(__file__).with_name("harm_canaries.jsonl"),
}
LIMIT = 4 << 20  # bytes of a file
LINE_LIMIT = 64 << 10


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(min_length=1, max_length=80)
    category: str
    expected: Literal["above", "below"]
    language: str = Field(min_length=2, max_length=8)
    prompt: str
    completion: str


def shipped_canaries(categories: Sequence[str]) -> list[Canary]:
    """Those that ship for these categories."""
    found: list[Canary] = []
    for path in dict.fromkeys(SHIPPED[category] for category in categories):
        wanted = [category for category in categories if SHIPPED[category] == path]
        found += [canary for canary in _read(path) if canary.category in wanted]
    return found


def own_canaries(path: Path, categories: Sequence[str]) -> list[Canary]:
    """A user's, one JSON object a line as the shipped ones. Raises UsageError naming file and line, for an id that
    occurs twice, a category not covered, and a category without canaries of both kinds."""
    found, seen = _read(path), set[str]()
    for canary in found:
        if canary.category not in categories:
            raise UsageError(f"{path}: canary {canary.id}: the adapter does not cover {canary.category!r}")
        if canary.id in seen:
            raise UsageError(f"{path}: canary {canary.id} occurs twice: give each an id of its own")
        seen.add(canary.id)
    for category in categories:
        sides = {canary.expected for canary in found if canary.category == category}
        if len(sides) < 2:
            raise UsageError(f"{path}: {category}: needs canaries expected above and below its threshold")
    return found


def _read(path: Path) -> list[Canary]:
    found = []
    for number, line in enumerate(read_text(path, "file of canaries", LIMIT).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            raw = strict_json(line.encode(), where, limit=LINE_LIMIT)
        except FormatError as error:
            raise UsageError(str(error)) from error
        entry = Document(where, "canary").validate(_Line, raw)
        item = Item(entry.prompt, entry.completion, entry.language)
        found.append(Canary(entry.id, item, entry.category, entry.expected))
    return found
