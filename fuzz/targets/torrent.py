"""Torrents, compared with a file of ours by their pieces."""

from __future__ import annotations

from steelyard.trace.listings import matching_pieces, merkle_root, read_torrent
from targets._files import put, scratch

FOLDER = scratch()
OURS = put(FOLDER / "ours", bytes(range(256)) * 150)
LIMIT = 1 << 20
SHAPE = "bytes"


def check(data: bytes) -> None:
    """A torrent that is accepted names files, and no more pieces of one agree than were compared."""
    found = read_torrent(put(FOLDER / "model.torrent", data))
    assert found.files
    for file in found.files:
        equal, compared = matching_pieces(found, file, OURS, LIMIT)
        assert 0 <= equal <= compared <= len(found.pieces)
    merkle_root(OURS)
