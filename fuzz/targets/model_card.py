"""The metadata at the head of a model card that somebody else wrote."""

from __future__ import annotations

from steelyard.base.errors import FormatError
from steelyard.release.licenses import parse_license
from steelyard.release.lineage import read_card, stated_license
from targets._files import put, scratch

FOLDER = scratch()
SHAPE = "bytes"


def check(data: bytes) -> None:
    """A licence that is stated can be looked up, or is refused."""
    put(FOLDER / "README.md", data)
    found = stated_license(read_card(FOLDER), "README.md")
    if found is None:
        raise FormatError("states no licence")
    parse_license(*found)
