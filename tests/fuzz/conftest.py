"""The fuzz targets and their seeds, for a pytest without a fuzzer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "fuzz"))

Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def corpus(once: Once) -> Path:
    """FOLDER/TARGET/NAME. Read only."""
    from seeds import write

    return once("fuzz-seeds", write)
