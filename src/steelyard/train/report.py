"""A run's curves as one HTML file that needs no network."""

from __future__ import annotations

from pathlib import Path


def write_report(folder: Path) -> None:
    """Write `folder/report.html` from `folder/metrics.jsonl`."""
