"""The file of a request: what LLaMA's form asked for, strictly, in any script, nothing hidden in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from granting import person, public_pem
from securesystemslib.signer import CryptoSigner
from withdrawing import HOSTILE

from steelyard.base.errors import FormatError, SteelyardError
from steelyard.release.grant_request import FILE_LIMIT, Person, Sealed, Wanted, parse_sealed, read_person

BOX = public_pem(X25519PrivateKey.generate())
SIGNS = str(CryptoSigner.generate_ecdsa().public_key.keyval["public"])
WANTED = Wanted(weights="a" * 64, subject="b" * 64, manifest="c" * 64)


def written(folder: Path, value: Any, name: str = "request.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(value) if name.endswith("json") else yaml.safe_dump(value))
    return path


@pytest.mark.parametrize("name", ["request.json", "request.yaml"])
def test_read(tmp_path: Path, name: str) -> None:
    key = public_pem(X25519PrivateKey.generate())
    given = person(name="Ада Лавлейс 🧮", organisation="जाँच", encrypts_to=key)
    assert read_person(written(tmp_path, given, name)).model_dump(exclude_none=True) == given


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": ""}, "name"),
        ({"name": "  "}, "name: must not be blank"),
        ({"name": "x" * 201}, "name"),
        ({"name": "a\nb"}, "name: holds control characters"),
        ({"name": "\u202egro"}, "name: holds control characters"),
        ({"organisation": "a\x1b[2J"}, "organisation"),
        ({"purpose": "x" * 4001}, "purpose"),
        ({"purpose": "x" * 900 + "\u200b" + "x" * 900}, "purpose: holds control characters"),
        ({"country": False}, "country: must be text"),  # NO in YAML
        ({"email": "ada"}, "email"),
        ({"email": "ada@example.org\nBcc: x"}, "email"),
        ({"email": "<script>@example.org"}, "email"),
        ({"name": "\u200d"}, "name: must not be blank"),
        ({"name": "\ufe0f\u00a0"}, "name: must not be blank"),
        ({"name": "\u3164"}, "name: holds control characters"),
        ({"organisation": "\u2800"}, "organisation: holds control characters"),
        ({"name": "Ada\u034f\U000e0101"}, "name: holds control characters"),
        ({"email": "ada@example.org."}, "email"),
        ({"email": "ada@example..org"}, "email"),
        ({"email": ".ada@example.org"}, "email"),
        ({"email": "ada@-example.org"}, "email"),
        ({"encrypts_to": "\u202egro\x1b[2J\n" + BOX}, "encrypts_to: must be one public key"),
        ({"encrypts_to": BOX + BOX}, "encrypts_to: must be one public key"),
        ({"signs_with": "Approved.\n" + SIGNS}, "signs_with: must be one public key"),
        ({"licence": "mit"}, "licence"),
        ({"licence": "A" * 64}, "licence"),
        ({"licence": None}, "licence"),
        ({"signs_with": "-----BEGIN PUBLIC KEY-----"}, "signs_with"),
        ({"encrypts_to": "x" * 3000}, "encrypts_to"),
        ({"role": "admin"}, "role: unknown key"),
        ({"nmae": "Ada"}, "nmae: unknown key, did you mean name"),
    ],
)
def test_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SteelyardError, match=f"request.json: {said}"):
        read_person(written(tmp_path, person(**changes)))


@pytest.mark.parametrize("key", ["name", "organisation", "country", "email", "purpose", "licence"])
def test_missing(tmp_path: Path, key: str) -> None:
    given = person()
    del given[key]
    with pytest.raises(SteelyardError, match=f"{key}: this key is missing"):
        read_person(written(tmp_path, given))


def test_keys_of_the_wrong_kind(tmp_path: Path) -> None:
    signs = str(CryptoSigner.generate_ecdsa().public_key.keyval["public"])
    with pytest.raises(SteelyardError, match=r"encrypts_to: .*must be an X25519 key"):
        read_person(written(tmp_path, person(encrypts_to=signs)))
    box = public_pem(X25519PrivateKey.generate())
    with pytest.raises(SteelyardError, match=r"signs_with: .*only P-256 and Ed25519"):
        read_person(written(tmp_path, person(signs_with=box)))
    private = "-----BEGIN PRIVATE KEY-----\nMC4CAQ==\n-----END PRIVATE KEY-----\n"
    for key in ("encrypts_to", "signs_with"):
        with pytest.raises(SteelyardError, match=f"{key}: .*is a private key"):
            read_person(written(tmp_path, person(**{key: private})))


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"{", b"\xff", b'{"name": "a", "name": "b"}', b"[" * 10_000])
def test_files_that_are_none(tmp_path: Path, data: bytes) -> None:
    for name in ("request.json", "request.yaml"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(SteelyardError):
            read_person(tmp_path / name)


def test_too_large_absent_a_pipe(tmp_path: Path) -> None:
    import os

    for name in ("request.json", "request.yaml"):
        (tmp_path / name).write_bytes(b" " * (FILE_LIMIT + 1))
        with pytest.raises(SteelyardError, match="50,000"):
            read_person(tmp_path / name)
        (tmp_path / name).unlink()
        with pytest.raises(SteelyardError, match="No such file"):
            read_person(tmp_path / name)
    os.mkfifo(tmp_path / "request.json")
    with pytest.raises(FormatError, match="not a plain file"):
        read_person(tmp_path / "request.json")


def test_hostile_texts() -> None:
    """Markup is no control character: it is kept as text, and shown as text."""
    taken = []
    for text in HOSTILE:
        try:
            taken.append(Person.model_validate(person(name=text)).name)
        except ValueError:
            assert not text.isprintable()
    assert '"><img src=x onerror=alert(1)>&amp;' in taken


@pytest.mark.parametrize("field", ["encrypts_to", "signs_with"])
def test_one_key_is_one_person(field: str) -> None:
    """Under two addresses: each could open the other's copy, or has signed for both."""
    key = {"encrypts_to": BOX, "signs_with": SIGNS}[field]
    given = [person(email="a@example.org", **{field: key}), person(email="b@example.org", **{field: key.strip()})]
    one, other = (Sealed.new(WANTED, Person.model_validate(each)) for each in given)
    assert one.same_person(other)
    third = Sealed.new(WANTED, Person.model_validate(person(email="c@example.org")))
    assert not one.same_person(third)
    fourth = Sealed.new(WANTED, Person.model_validate(person(email="d@example.org")))
    assert not third.same_person(fourth)


def test_the_digest_is_salted() -> None:
    given = Person.model_validate(person())
    one, other = Sealed.new(WANTED, given), Sealed.new(WANTED, given)
    assert one.digest != other.digest
    assert parse_sealed(one.to_bytes(), "x") == one
    with pytest.raises(FormatError, match="x: "):
        parse_sealed(b'{"format": 1}', "x")
