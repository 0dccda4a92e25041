"""Labelled texts of one's own, as CSV or JSON lines, also gzipped.

`text` is what is judged (required), `prompt` what it answers, `language` its language (else en), `group` whom it is
about. Labels, 1 or 0 (also yes and no, true and false; empty: not labelled), stand in columns named like the scorer's
categories, or in `label` for one category alone. Other columns are not read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steelyard.base.errors import FormatError, UsageError
from steelyard.safety.rows import read_rows
from steelyard.scorers.base import Item

TEXT_LIMIT = 100_000  # characters
WORD_LIMIT = 100  # characters of a language's or group's name
_LABELS = {"1": True, "yes": True, "true": True, "0": False, "no": False, "false": False}


@dataclass(frozen=True)
class Own:
    """A text, its labels by category (those that it has), and the kinds of text that it belongs to."""

    item: Item
    labels: Mapping[str, bool]
    facets: Mapping[str, str]


def read_own(path: Path, covered: Collection[str], category: str | None) -> list[Own]:
    """The rows of `path` with labels for some of the categories `covered`; `category`: the one that `label` is for.

    Raises UsageError where the file has no column of labels that could be meant, FormatError naming the row for a
    text or label that is none, for a text that was there before, and where no row is labelled.
    """
    rows = read_rows(path)
    present = {name for row in rows for name in row}
    columns = {name: name for name in sorted(covered) if name in present and category in (None, name)}
    if "label" in present and not columns:
        if category is None and len(covered) > 1:
            raise UsageError(
                f"{path}: which category is `label` for? Choose one of {', '.join(covered)} with --category"
            )
        columns = {category or next(iter(covered)): "label"}
    if not columns:
        hint = "; a drawn sheet needs its sample.json with --sample" if "key" in present else ""
        raise UsageError(f"{path}: no column of labels: name one `label`, or like one of {', '.join(covered)}{hint}")
    found = [_own(row, columns, f"{path}: row {number}") for number, row in enumerate(rows, 1)]
    seen: dict[tuple[Item, str], int] = {}
    for number, one in enumerate(found, 1):
        for name in one.labels:
            if (first := seen.setdefault((one.item, name), number)) != number:
                text = f"the text of row {first} again, labelled for {name}: each text counts once"
                raise FormatError(f"{path}: row {number}: {text}: leave it out")
    if not any(one.labels for one in found):
        raise FormatError(f"{path}: no row has a label: nothing to measure")
    return found


def _own(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> Own:
    language = _text(row, "language", WORD_LIMIT, where) or "en"
    item = Item(_text(row, "prompt", TEXT_LIMIT, where), _text(row, "text", TEXT_LIMIT, where), language)
    if not item.completion.strip():
        raise FormatError(f"{where}: its `text` is missing or empty: every row needs one")
    labels = {}
    for category, column in columns.items():
        value = row.get(column)
        word = "" if value is None else str(value).strip().lower()
        if word and word not in _LABELS:
            raise FormatError(f"{where}: {column} is {word[:40]!r}: must be 1 or 0, or empty where it is not labelled")
        if word:
            labels[category] = _LABELS[word]
    group = _text(row, "group", WORD_LIMIT, where) if "group" in row else None
    return Own(item, labels, {"language": language} | ({} if group is None else {"group": group or "none"}))


def _text(row: Mapping[str, Any], name: str, limit: int, where: str) -> str:
    value = row.get(name)
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > limit:
        raise FormatError(f"{where}: its `{name}` must be text of at most {limit:,} characters")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise FormatError(f"{where}: its `{name}` holds half of a surrogate pair: it is no text") from error
    return value
