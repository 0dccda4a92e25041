"""Mutations that keep a file's shape, so that more than its first line of defence is reached.

libFuzzer's own mutations of bytes nearly always break JSON, base64 or a length; these change a value inside.
`mutate(data, shape, draw)` gives another file; shapes are `bytes`, `json`, `lines` (JSON lines), `safetensors` and
`tagged` (a byte, then text).
"""

from __future__ import annotations

import base64
import json
import random
import struct
from collections.abc import Callable
from typing import Any

TEXTS = (
    *(
        "",
        "a",
        ".",
        "..",
        "../x",
        "/etc/passwd",
        "a\\b",
        "a\0b",
        "é",
        "\u202e",
        "\ud800",
        "A" * 300,
        "model.sig",
        "steelyard",
    ),
    *("0" * 64, "f" * 63, "NaN", "1e400", "PASSED", "FAILED", "2024-02-30", "9999-12-31T23:59:59+00:00"),
    *("0001-01-01T00:00:00-14:00", "2026-01-01T00:00:00", "2026-01-01T00:00:00Z", "{{ x }}", "\n---\n", "%s%n"),
)
NUMBERS = (0, -1, 1, 2, 7, 255, 2**31 - 1, 2**31, 2**53, 2**53 + 1, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, 5e-324)
VALUES = (None, True, False, [], {}, [[]], [{}], {"a": 1}, float("nan"), float("inf"), *TEXTS, *NUMBERS)
EXTREMES = tuple(
    struct.pack(code, value & (2 ** (8 * struct.calcsize(code)) - 1))
    for code in ("<B", "<H", "<I", "<Q")
    for value in (0, 1, 2, 3, 8, 16, 31, 32, 255, 2**16 - 1, 2**31 - 1, 2**31, 2**46, 2**63 - 1, 2**63, 2**64 - 1)
)


def mutate(data: bytes, shape: str, draw: random.Random) -> bytes:
    """Another file than `data`, in most cases one of the same shape."""
    try:
        return _SHAPES[shape](data, draw)
    except (ValueError, RecursionError, IndexError, struct.error):
        return mutate_bytes(data, draw)


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    """One to four edits: bytes changed, cut out, repeated, put elsewhere, or an extreme number written over them."""
    made = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at, length = draw.randint(0, len(made)), draw.choice((1, 1, 2, 4, 8, 30, 300))
        piece = bytes(made[at : at + length])
        kind = draw.randrange(6)
        if kind == 0:
            made[at : at + length] = draw.randbytes(len(piece))
        elif kind == 1:
            del made[at : at + length]
        elif kind == 2:
            made[at:at] = piece * draw.choice((1, 2, 100))
        elif kind == 3:
            extreme = draw.choice(EXTREMES)
            made[at : at + len(extreme)] = extreme
        elif kind == 4:
            target = draw.randint(0, len(made))
            made[target:target] = piece
        elif made:
            made[min(at, len(made) - 1)] ^= 1 << draw.randrange(8)
    return bytes(made)


def _mutate_json(data: bytes, draw: random.Random) -> bytes:
    value = json.loads(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        value = _edit(value, draw)
    return _dump(value) + (b"\n" if data.endswith(b"\n") else b"")


def _dump(value: Any) -> bytes:
    """Canonical JSON where there is such a form, as the files have it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in `value`."""
    found, level = list[tuple[Any, Any]](), [value]
    while level and len(found) < 20_000:
        inner = level.pop()
        items = inner.items() if isinstance(inner, dict) else enumerate(inner)
        for key, child in items:
            found.append((inner, key))
            if isinstance(child, dict | list):
                level.append(child)
    return found


def _edit(value: Any, draw: random.Random) -> Any:
    places = _places(value) if isinstance(value, dict | list) else []
    if not places:
        return draw.choice(VALUES)
    container, key = draw.choice(places)
    child = container[key]
    if key == "payload" and isinstance(child, str) and draw.random() < 0.8:
        container[key] = base64.b64encode(_mutate_json(base64.b64decode(child), draw)).decode()
        return value
    kind = draw.randrange(7)
    if kind == 0:
        container[key] = draw.choice(VALUES)
    elif kind == 1:
        other, name = draw.choice(places)
        container[key] = json.loads(json.dumps(other[name]))
    elif kind == 2:
        del container[key]
    elif kind == 3 and isinstance(container, list):
        container.insert(draw.randint(0, len(container)), json.loads(json.dumps(child)))
    elif kind == 3:
        container[draw.choice(TEXTS)] = child
    elif kind == 4:
        container[key] = [child] if draw.random() < 0.5 else {"a": child}
    elif kind == 5 and isinstance(child, str):
        container[key] = mutate_bytes(child.encode("utf-8", "surrogatepass"), draw).decode("latin-1")
    elif isinstance(child, int | float) and not isinstance(child, bool):
        container[key] = child + draw.choice((-1, 1, 0.5, 2**32, -(2**32)))
    else:
        container[key] = draw.choice(VALUES)
    return value


def _mutate_lines(data: bytes, draw: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    at, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    kind = draw.randrange(8)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(other, lines[at])
    elif kind == 2:
        lines[at], lines[other] = lines[other], lines[at]
    elif kind == 3:
        lines[at] = mutate_bytes(lines[at], draw)
    else:
        lines[at] = _mutate_json(lines[at], draw)
    return b"".join(lines)


def _mutate_safetensors(data: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.3:
        return mutate_bytes(data, draw)
    (length,) = struct.unpack_from("<Q", data)
    header = _mutate_json(data[8 : 8 + length], draw)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def _mutate_tagged(data: bytes, draw: random.Random) -> bytes:
    tag, text = data[:1], data[1:]
    if text.lstrip().startswith(b"{"):  # JSON is YAML
        return tag + _mutate_json(text, draw)
    lines = text.splitlines(keepends=True)
    at, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    if draw.random() < 0.5:
        lines[at], lines[other] = lines[other], lines[at]
        return tag + b"".join(lines)
    lines[at] = mutate_bytes(lines[at], draw)
    return tag + b"".join(lines)


_SHAPES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bytes": mutate_bytes,
    "json": _mutate_json,
    "lines": _mutate_lines,
    "safetensors": _mutate_safetensors,
    "tagged": _mutate_tagged,
}
