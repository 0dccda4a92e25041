"""Listings of a Hub repository's files, as its API gives them."""

from __future__ import annotations

from steelyard.trace.listings import is_listing, read_listing
from targets._files import put, scratch

PLACE = scratch() / "listing.json"
SHAPE = "json"


def check(data: bytes) -> None:
    """Digests are digests."""
    is_listing(put(PLACE, data))
    found = read_listing(PLACE)
    assert all(one.sha256 is None or len(bytes.fromhex(one.sha256)) == 32 for one in found)
