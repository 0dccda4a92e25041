"""Headers of safetensors files."""

from __future__ import annotations

from steelyard.model.headers import scan_safetensors
from targets._files import put, scratch

PLACE = scratch() / "model.safetensors"
SHAPE = "safetensors"


def check(data: bytes) -> None:
    """Every tensor of a file that is accepted lies inside it."""
    tensors = scan_safetensors(put(PLACE, data))
    assert all(8 <= tensor.start <= tensor.end <= len(data) for tensor in tensors.values())
