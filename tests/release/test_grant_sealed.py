"""What is sealed opens for its recipient alone, whole or not at all."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.release.grant_sealed import (
    CHUNK,
    MAGIC,
    SealedReader,
    SealedWriter,
    load_recipient,
    new_recipient,
    parse_recipient,
    seal,
    unseal,
)

HEAD = len(MAGIC) + 32
WHOLE = CHUNK + 16
KEY = X25519PrivateKey.generate()


def pem(public: object) -> bytes:
    return bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_any_size_comes_back(size: int) -> None:
    data = os.urandom(size)
    assert unseal(seal(data, KEY.public_key()), KEY, "x") == data


def test_in_pieces() -> None:
    size, file = 200_000, io.BytesIO()
    data = os.urandom(size)
    writer = SealedWriter(file, KEY.public_key())
    for at in range(0, size, 7_001):
        writer.write(data[at : at + 7_001])
    writer.finish()
    reader = SealedReader(io.BytesIO(file.getvalue()), KEY, "x")
    parts = list(iter(lambda: reader.read(10_240), b""))
    assert b"".join(parts) == data
    assert max(map(len, parts)) == 10_240


def test_nothing_of_it_is_seen_and_no_two_are_alike() -> None:
    text = b"ada@example.org" * 10
    one, other = seal(text, KEY.public_key()), seal(text, KEY.public_key())
    assert b"example" not in one
    assert one[HEAD:] != other[HEAD:]


def test_for_another_key() -> None:
    with pytest.raises(FormatError, match="for another key"):
        unseal(seal(b"x", KEY.public_key()), X25519PrivateKey.generate(), "x")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda sealed: sealed[:-1], "cut off or changed"),
        (lambda sealed: sealed[: HEAD + WHOLE], "for another key, or was changed"),  # the first chunk is not the last
        (lambda sealed: sealed[: HEAD + 2 * WHOLE], "cut off or changed"),
        (lambda sealed: sealed + b"x", "cut off or changed"),
        (lambda sealed: sealed[:HEAD] + sealed[HEAD + WHOLE :], "or was changed"),  # the first chunk left out
        (lambda sealed: sealed[: HEAD + WHOLE] * 1 + sealed[HEAD:], "cut off or changed"),  # repeated
        (lambda sealed: sealed[:-1] + bytes([sealed[-1] ^ 1]), "cut off or changed"),
        (lambda sealed: sealed[:HEAD], "changed"),
        (lambda sealed: sealed[: HEAD - 1], "not a sealed file"),
        (lambda sealed: b"X" + sealed[1:], "not a sealed file"),
        (lambda sealed: MAGIC + bytes(32) + sealed[HEAD:], "not a sealed file"),  # a key of low order
    ],
)
def test_cut_moved_or_changed(change: object, said: str) -> None:
    sealed = change(seal(os.urandom(2 * CHUNK + 10), KEY.public_key()))  # type: ignore[operator]
    with pytest.raises(FormatError, match=said):
        unseal(sealed, KEY, "x")


def test_what_was_not_finished_does_not_open() -> None:
    file = io.BytesIO()
    writer = SealedWriter(file, KEY.public_key())
    writer.write(os.urandom(3 * CHUNK))
    writer.close()
    with pytest.raises(FormatError, match="cut off"):
        unseal(file.getvalue(), KEY, "x")


def test_keys(tmp_path: Path) -> None:
    made = new_recipient(tmp_path / "me", b"correct horse battery")
    read = load_recipient(tmp_path / "me.key.pem", b"correct horse battery")
    assert read.private_bytes_raw() == made.private_bytes_raw()
    assert made.private_bytes_raw() not in (tmp_path / "me.key.pem").read_bytes()
    assert (tmp_path / "me.key.pem").stat().st_mode & 0o777 == 0o600
    parse_recipient((tmp_path / "me.pub.pem").read_bytes(), "me")
    with pytest.raises(SteelyardError, match="passphrase is wrong"):
        load_recipient(tmp_path / "me.key.pem", b"another horse battery")
    with pytest.raises(SteelyardError, match="exists already"):
        new_recipient(tmp_path / "me", b"correct horse battery")
    with pytest.raises(UsageError, match="too weak"):
        new_recipient(tmp_path / "other", b"horse")
    (tmp_path / "me.key.pem").chmod(0o644)
    with pytest.raises(SteelyardError, match="chmod 600"):
        load_recipient(tmp_path / "me.key.pem", b"correct horse battery")


def test_keys_that_are_none(tmp_path: Path) -> None:
    new_recipient(tmp_path / "me", b"correct horse battery")
    with pytest.raises(FormatError, match="is a private key"):
        parse_recipient((tmp_path / "me.key.pem").read_bytes(), "k")
    with pytest.raises(FormatError, match="must be an X25519 key"):
        parse_recipient(pem(Ed25519PrivateKey.generate().public_key()), "k")
    with pytest.raises(FormatError, match="not a public key in PEM"):
        parse_recipient(b"ssh-ed25519 AAAA", "k")
    order = b"MCowBQYDK2VuAyEA" + b"A" * 42 + b"A="
    with pytest.raises(FormatError, match="low order"):
        parse_recipient(b"-----BEGIN PUBLIC KEY-----\n" + order + b"\n-----END PUBLIC KEY-----\n", "k")
