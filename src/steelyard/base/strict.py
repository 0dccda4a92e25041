"""JSON and base64 from strangers: the one reader of whatever a model folder, a bundle or a report brings along."""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from typing import Any

from steelyard.base.errors import FormatError

JSON_DEPTH = 32

# A string, closed or not, in one pass without backtracking: nesting is counted outside of them.
_STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def strict_json(data: bytes, where: str, *, limit: int, depth: int = JSON_DEPTH) -> Any:
    """JSON from a stranger. Raises FormatError, naming `where`, for more than `limit` bytes, nesting over `depth`, a
    key that occurs twice, a number that is not finite, text that UTF-8 cannot spell, or anything that is not JSON.
    """
    if len(data) > limit:
        raise FormatError(f"{where}: {len(data):,} bytes, more than the {limit:,} such a file may have")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise FormatError(f"{where}: the key {twice[:80]!r} occurs twice")
        return found

    def refuse(constant: str) -> Any:
        raise FormatError(f"{where}: {constant} is not JSON")

    def finite(text: str) -> float:
        if math.isinf(number := float(text)):
            raise FormatError(f"{where}: {text[:20]} is too large a number")
        return number

    level = 0
    for bracket in _STRINGS.sub(b"", data).translate(None, delete=_NOT_BRACKETS):
        level += 1 if bracket in b"[{" else -1
        if level > depth:
            raise FormatError(f"{where}: nested deeper than {depth}")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=once, parse_constant=refuse, parse_float=finite)
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()  # a half of a pair alone has no spelling
        return value
    except (UnicodeDecodeError, ValueError) as error:
        raise FormatError(f"{where}: not JSON: {error}") from error


def strict_base64(text: object, where: str) -> bytes:
    """The bytes that a stranger's standard base64 spells: padded, without spaces or line ends, and never none at all.

    Raises FormatError, naming `where`, for anything else, and for a second spelling of the same bytes (RFC 4648,
    section 3.5): a file that means the same must be the same file.
    """
    try:
        data = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except (binascii.Error, ValueError) as error:
        raise FormatError(f"{where}: not standard base64") from error
    if not data or base64.standard_b64encode(data).decode() != text:
        raise FormatError(f"{where}: not standard base64")
    return data
