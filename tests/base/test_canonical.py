"""Canonical JSON, Merkle roots, code digests."""

import hashlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steelyard.base.canonical import canonical_json, code_digest, digest, merkle_root


def test_key_order_does_not_matter_and_values_do() -> None:
    assert canonical_json({"b": 1, "a": "é"}) == '{"a":"é","b":1}'.encode()
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_json_cannot_spell_is_refused(value: float) -> None:
    with pytest.raises(ValueError):
        canonical_json({"x": value})


def rfc6962(leaves: list[bytes]) -> bytes:
    """The recursive definition of RFC 6962 section 2.1, as the oracle."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    return hashlib.sha256(b"\x01" + rfc6962(leaves[:split]) + rfc6962(leaves[split:])).digest()


@given(st.lists(st.binary(max_size=8), max_size=70))
def test_merkle_root_is_that_of_rfc6962(leaves: list[bytes]) -> None:
    assert merkle_root(leaves) == rfc6962(leaves).hex()


@given(st.lists(st.binary(max_size=4), min_size=2, max_size=20, unique=True), st.data())
def test_any_edit_removal_or_swap_changes_the_root(leaves: list[bytes], data: st.DataObject) -> None:
    root = merkle_root(leaves)
    place = data.draw(st.integers(0, len(leaves) - 2))
    swapped = [*leaves]
    swapped[place], swapped[place + 1] = swapped[place + 1], swapped[place]
    assert merkle_root(swapped) != root
    assert merkle_root(leaves[:place] + leaves[place + 1 :]) != root
    assert merkle_root([*leaves, leaves[-1]]) != root


def test_code_digest_names_the_rooms() -> None:
    assert code_digest("base") == code_digest("base") != code_digest("base", "safety")
    with pytest.raises(ValueError):
        code_digest("no_such_room")
