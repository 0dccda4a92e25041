"""The metadata block at the head of a Hugging Face card: read with bounds, changed key by key, the rest left alone.

    text = with_metadata(text, {"license": "apache-2.0"}, "README.md")

A block is what stands between a first line `---` and the next line `---`
(huggingface.co/docs/hub/model-cards#model-card-metadata). Keys that are not changed keep their bytes: their spelling,
comments and order are the maker's. What was written is read again and compared before it is given out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.base.yamlfile import SIZE_LIMIT, Document, parse_yaml
from steelyard.safety.markup import yaml_text

_LINES = re.compile(r"[^\r\n]*(?:\r\n|\r|\n|\Z)")
_FENCE = re.compile(r"---[ \t]*[\r\n]*")
# Line ends to YAML 1.1, but not to cards: they would make its line numbers and ours differ.
_STRANGE_ENDS = re.compile("[\x85\u2028\u2029]")


@dataclass(frozen=True)
class Card:
    """A card taken apart. `block` are the lines of its metadata with their ends, None where it has none; `lines` is the
    line, from 0, at which each top-level key starts; `body` the text after the block; `end` how its lines end."""

    block: tuple[str, ...] | None
    data: Mapping[str, Any]
    lines: Mapping[str, int]
    body: str
    end: str


def split_card(text: str, where: str) -> Card:
    """The metadata and the text of a card. Raises FormatError naming the place of what cannot be read."""
    text = text.removeprefix("\ufeff")
    lines = [line for line in _LINES.findall(text) if line]
    end = "\r\n" if any(line.endswith("\r\n") for line in lines) else "\n"
    first = next((index for index, line in enumerate(lines) if line.strip()), None)
    if first is None or not re.fullmatch(r"[ \t]*---[\r\n]+", lines[first]):
        return Card(None, {}, {}, text, end)
    last = next((index for index in range(first + 1, len(lines)) if _FENCE.fullmatch(lines[index])), None)
    if last is None:
        return Card(None, {}, {}, text, end)
    block, body = tuple(lines[first + 1 : last]), "".join(lines[last + 1 :])
    if sum(map(len, block)) > SIZE_LIMIT:
        raise FormatError(f"{where}: its metadata is longer than {SIZE_LIMIT:,} characters: no card's is")
    if _STRANGE_ENDS.search("".join(block)):
        raise FormatError(f"{where}: its metadata holds a line separator of Unicode: write plain line ends")
    try:
        data, document = parse_yaml("".join(block), f"{where}: metadata", "card")
    except UsageError as error:
        raise FormatError(str(error)) from error
    if data is None:
        return Card(block, {}, {}, body, end)
    return Card(block, data, _top_lines(data, document, block, where), body, end)


def _top_lines(data: Any, document: Document, block: tuple[str, ...], where: str) -> dict[str, int]:
    if not isinstance(data, dict):
        raise FormatError(f"{where}: its metadata is no mapping: write KEY: VALUE, a line each")
    lines = {key: document.lines[(key,)] - 1 for key in data}
    for key, line in lines.items():
        # A key that starts its line can be replaced by lines; one within {...} cannot.
        if not re.match(rf"""["']?{re.escape(key)}["']?[ \t]*:""", block[line]):
            raise FormatError(f"{where}: metadata:{line + 1}: {key[:40]!r}: write each key at the start of a line")
    return lines


def with_metadata(text: str, changes: Mapping[str, Any], where: str) -> str:
    """The card with these top-level keys set, in the place of its own or after them. Raises FormatError."""
    card = split_card(text, where)
    lines = list(card.block or ())
    if lines and not lines[-1].endswith(("\r", "\n")):
        lines[-1] += card.end
    # From the last to the first, so that the places of the others stay true.
    for key in sorted(changes.keys() & card.lines.keys(), key=lambda key: -card.lines[key]):
        first = card.lines[key]
        last = min((line for line in card.lines.values() if line > first), default=len(lines))
        while last > first + 1 and re.match(r"\s*(#|$)", lines[last - 1]):
            last -= 1  # comments and empty lines before the next key belong to that
        lines[first:last] = [_dumped(key, changes[key], card.end)]
    lines += [_dumped(key, value, card.end) for key, value in changes.items() if key not in card.lines]
    fence = f"---{card.end}"
    made = f"{fence}{''.join(lines)}{fence}{card.body}"
    again = split_card(made, where)
    if dict(again.data) != {**card.data, **changes} or again.body != card.body:
        raise SteelyardError(f"{where}: its metadata cannot be changed without changing the rest: write it out plainly")
    return made


def _dumped(key: str, value: Any, end: str) -> str:
    return yaml_text({key: value}).replace("\n", end)
