"""OpenSSF model signatures."""

from __future__ import annotations

from steelyard.release.oms_format import files_root, parse_model_signature

SHAPE = "json"


def check(data: bytes) -> None:
    """The root of a signature that is accepted is that of the files it lists."""
    signature = parse_model_signature(data, "model.sig").signature
    assert files_root(signature.files) == signature.root
