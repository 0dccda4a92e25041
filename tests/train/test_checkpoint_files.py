"""A checkpoint's tensors are spread over files of bounded size, and come back to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from steelyard.train import checkpoint


def test_tensors_are_spread_over_small_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 1000)
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": 100, "b": 100, "c": 100, "d": 900, "e": 3}
    tensors = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    checkpoint.write_tensors(tmp_path, tensors, alone=True)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 4  # a and b, c, d (larger than the bound), e
    assert max(file.stat().st_size for file in files) < 4 * 900 + 500
    found = {name: torch.zeros(size) for name, size in sizes.items()}
    checkpoint.read_tensors(tmp_path, found, alone=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
