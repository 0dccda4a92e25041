"""Canonical bytes and their digests: one spelling for every value that is ever hashed or signed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

JSON = Mapping[str, Any] | Sequence[Any] | str | int | float | bool | None


def canonical_json(value: JSON) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces. NaN and infinity raise ValueError: they have no JSON spelling."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_hex(data: bytes) -> str:
    """SHA-256 as 64 lower-case hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def digest(value: JSON) -> str:
    """SHA-256 (hex) of the canonical JSON of `value`."""
    return sha256_hex(canonical_json(value))


def sha256_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes, streamed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def merkle_root(leaves: Iterable[bytes]) -> str:
    """RFC 6962 section 2.1 Merkle tree hash (SHA-256, hex) over `leaves` in order; no leaf gives SHA-256 of nothing.

    Leaves and inner nodes are hashed with different prefixes, so no inner node can pass for a leaf. The unpaired node
    at the end of a level is carried up unchanged, which is the same tree as the RFC's recursive definition.
    """
    level = [hashlib.sha256(b"\x00" + leaf).digest() for leaf in leaves]
    if not level:
        return sha256_hex(b"")
    while len(level) > 1:
        paired = [hashlib.sha256(b"\x01" + level[i] + level[i + 1]).digest() for i in range(0, len(level) - 1, 2)]
        level = paired + ([level[-1]] if len(level) % 2 else [])
    return level[0].hex()


SOURCES = {".py", ".cpp", ".h"}


def code_digest(*packages: str) -> str:
    """SHA-256 (hex) over every source file of the named `steelyard` rooms (`"safety"`, `"model"`), by relative path.

    This is the "code version that matters" of a stage or a scorer: it changes when, and only when, the source does.
    """
    root = Path(__file__).resolve().parents[1]
    files = sorted(path for package in packages for path in (root / package).rglob("*") if path.suffix in SOURCES)
    if not files:
        raise ValueError(f"no source files under {', '.join(packages)}")
    return digest([[path.relative_to(root).as_posix(), sha256_file(path)] for path in files])
