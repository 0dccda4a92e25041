from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The research data beside the checkout. Skips where absent; fails where STEELYARD_REQUIRE_DATA=1."""
    folder = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    if not folder.is_dir():
        if os.environ.get("STEELYARD_REQUIRE_DATA") == "1":
            pytest.fail(f"{folder} is absent, and STEELYARD_REQUIRE_DATA=1")
        pytest.skip(f"{folder} is absent")
    return folder
