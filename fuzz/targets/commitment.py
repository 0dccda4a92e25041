"""Commitments: what a run was going to test, and with what."""

from __future__ import annotations

from steelyard.safety.pause import parse_commitment

SHAPE = "json"


def check(data: bytes) -> None:
    """What is accepted is spelled in one way only."""
    assert parse_commitment(data, "commitment.json").as_bytes == data
