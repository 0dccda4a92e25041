"""config.json and its like: any JSON object from a stranger, and its canonical form."""

from __future__ import annotations

from steelyard.base.canonical import canonical_json
from steelyard.model.headers import read_json_object
from targets._files import put, scratch

PLACE = scratch() / "config.json"
SHAPE = "json"


def check(data: bytes) -> None:
    """What is read and has a canonical form is read again from that form as the same."""
    value = read_json_object(put(PLACE, data))
    try:
        text = canonical_json(value)
    except ValueError:
        return  # an integer beyond the canonical form's range: the callers refuse it
    assert canonical_json(read_json_object(put(PLACE, text))) == text
