"""A bundle's manifest."""

from __future__ import annotations

from steelyard.release.layout import SIGNING, parse_manifest
from targets._files import scratch

BUNDLE = scratch()
SHAPE = "json"


def check(data: bytes) -> None:
    """Every path of a manifest that is accepted stays inside the bundle, and none is that of a file that signs."""
    for file in parse_manifest(data, BUNDLE).files:
        assert (BUNDLE / file.path).resolve().is_relative_to(BUNDLE.resolve())
        assert file.path not in SIGNING
