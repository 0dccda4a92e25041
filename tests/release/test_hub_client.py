"""The Hub's client where the environment says nothing of a Hub."""

from __future__ import annotations

import os
import subprocess
import sys


def test_the_hub_itself_where_no_other_is_named() -> None:
    """In a process of its own: here somebody has loaded the library's constants long ago."""
    code = (
        "from steelyard.base.progress import Silent; from steelyard.release.hub_client import HubClient; "
        "print(HubClient('org/name', Silent()).endpoint)"
    )
    plain = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True, check=True)
    assert done.stdout == "https://huggingface.co\n"
