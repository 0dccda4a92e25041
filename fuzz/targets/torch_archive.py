"""PyTorch checkpoints: zips whose storages are hashed, and whose pickle is never opened."""

from __future__ import annotations

from steelyard.trace.archives import storages
from targets._files import put, scratch

PLACE = scratch() / "pytorch_model.bin"
SHAPE = "bytes"


def check(data: bytes) -> None:
    """No storage is larger than the file that holds it."""
    assert all(0 <= size <= len(data) for _, size, _ in storages(put(PLACE, data)))
