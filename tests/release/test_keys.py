"""Keys: encrypted at rest, private, named safely; rotation and revocation end their use."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.release.attest import SignatureError, sign, statement_bytes, verify_envelope
from steelyard.release.keys import (
    list_keys,
    load_public_key,
    load_signer,
    new_key,
    read_key_event,
    revoke_key,
    rotate_key,
    show_key,
)

PASSPHRASE = b"correct horse battery"
PAYLOAD = statement_bytes("test:nothing/v1", {"a": "0" * 64}, {})


def test_a_new_key_is_encrypted_private_and_named_as_securesystemslib_names_it(tmp_path: Path) -> None:
    info = new_key(tmp_path, "me", PASSPHRASE)
    private = tmp_path / "me.key.pem"
    assert private.read_text().startswith("-----BEGIN ENCRYPTED PRIVATE KEY-----")
    assert os.stat(private).st_mode & 0o777 == 0o600
    assert info.kind == "standard"
    assert info.status == "active"
    assert info.keyid == load_public_key(tmp_path / "me.pub.pem").keyid == show_key(tmp_path, "me").keyid
    assert load_signer(tmp_path, "me", PASSPHRASE).public_key.keyid == info.keyid
    assert new_key(tmp_path, "toy", PASSPHRASE, throwaway=True).kind == "throwaway"
    assert [key.name for key in list_keys(tmp_path)] == ["me", "toy"]
    assert list_keys(tmp_path / "absent") == []


@pytest.mark.parametrize("passphrase", [b"", b"short", b"elevenchars", b"aaaaaaaaaaaaaaaaaaaa"])
def test_weak_passphrases_are_refused(tmp_path: Path, passphrase: bytes) -> None:
    with pytest.raises(UsageError, match="too weak"):
        new_key(tmp_path, "me", passphrase)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "..", "../me", "a/b", "/etc/me", "a.b", "me\n", "x" * 65, "-x"])
def test_a_name_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="key name"):
        new_key(tmp_path / "keys", name, PASSPHRASE)


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    new_key(tmp_path, "me", PASSPHRASE)
    with pytest.raises(SteelyardError, match="exists already"):
        new_key(tmp_path, "me", PASSPHRASE)


@pytest.mark.parametrize("passphrase", [b"", b"wrong horse battery"])
def test_a_wrong_passphrase_says_so(tmp_path: Path, passphrase: bytes) -> None:
    new_key(tmp_path, "me", PASSPHRASE)
    with pytest.raises(SteelyardError, match="passphrase is wrong"):
        load_signer(tmp_path, "me", passphrase)


def test_a_private_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    new_key(tmp_path, "me", PASSPHRASE)
    (tmp_path / "me.key.pem").chmod(0o644)
    with pytest.raises(SteelyardError, match="chmod 600"):
        load_signer(tmp_path, "me", PASSPHRASE)


def test_the_private_half_of_another_key_is_refused(tmp_path: Path) -> None:
    new_key(tmp_path, "me", PASSPHRASE)
    new_key(tmp_path, "you", PASSPHRASE)
    os.replace(tmp_path / "you.key.pem", tmp_path / "me.key.pem")
    with pytest.raises(SteelyardError, match="private half"):
        load_signer(tmp_path, "me", PASSPHRASE)
    os.replace(tmp_path / "you.pub.pem", tmp_path / "me.pub.pem")
    with pytest.raises(SteelyardError, match="not the card"):
        load_signer(tmp_path, "me", PASSPHRASE)


def test_no_such_key_names_those_there_are(tmp_path: Path) -> None:
    new_key(tmp_path, "me", PASSPHRASE)
    with pytest.raises(SteelyardError, match=r"no key 'you' \(there: me\)"):
        load_signer(tmp_path, "you", PASSPHRASE)


def test_rotation_is_signed_by_the_old_key_which_then_signs_nothing(tmp_path: Path) -> None:
    old = new_key(tmp_path, "old", PASSPHRASE, throwaway=True)
    new = rotate_key(tmp_path, "old", "new", PASSPHRASE)
    assert new.rotated_from == old.keyid
    assert new.kind == "throwaway"
    assert show_key(tmp_path, "old").rotated_to == new.keyid
    with pytest.raises(SteelyardError, match="was rotated"):
        load_signer(tmp_path, "old", PASSPHRASE)
    event = read_key_event(tmp_path / "old.rotation.dsse.json", [load_public_key(tmp_path / "old.pub.pem")])
    assert event is not None
    assert (event.kind, event.keyid, event.successor) == ("rotation", old.keyid, new.keyid)
    load_signer(tmp_path, "new", PASSPHRASE)


def test_a_revoked_key_signs_nothing_even_if_its_card_is_edited_back(tmp_path: Path) -> None:
    info = new_key(tmp_path, "me", PASSPHRASE)
    card = (tmp_path / "me.json").read_bytes()
    path = revoke_key(tmp_path, "me", PASSPHRASE, reason="laptop stolen")
    assert show_key(tmp_path, "me").status == "revoked"
    (tmp_path / "me.json").write_bytes(card)
    with pytest.raises(SteelyardError, match="is revoked"):
        load_signer(tmp_path, "me", PASSPHRASE)
    with pytest.raises(SteelyardError, match="revoked already"):
        revoke_key(tmp_path, "me", PASSPHRASE, reason="again")
    event = read_key_event(path, [load_public_key(tmp_path / "me.pub.pem")])
    assert event is not None
    assert (event.kind, event.keyid, event.reason) == ("revocation", info.keyid, "laptop stolen")


def test_a_revocation_needs_a_reason_and_the_passphrase(tmp_path: Path) -> None:
    new_key(tmp_path, "me", PASSPHRASE)
    with pytest.raises(UsageError, match="reason"):
        revoke_key(tmp_path, "me", PASSPHRASE, reason="  ")
    with pytest.raises(SteelyardError, match="passphrase"):
        revoke_key(tmp_path, "me", b"wrong horse battery", reason="lost")
    assert show_key(tmp_path, "me").status == "active"


def test_a_stranger_cannot_revoke_my_key(tmp_path: Path) -> None:
    mine = new_key(tmp_path, "mine", PASSPHRASE)
    new_key(tmp_path, "other", PASSPHRASE)
    keys = [load_public_key(tmp_path / "mine.pub.pem")]
    path = revoke_key(tmp_path, "mine", PASSPHRASE, reason="stolen")
    assert read_key_event(path, [load_public_key(tmp_path / "other.pub.pem")]) is None

    payload = statement_bytes(
        "steelyard:key-revocation/v1", {mine.keyid: "0" * 64}, {"time": "2026-01-01T00:00:00+00:00", "reason": "x"}
    )
    forged = tmp_path / "forged.json"
    forged.write_bytes(sign(payload, load_signer(tmp_path, "other", PASSPHRASE)))
    with pytest.raises(SignatureError, match="none of yours"):
        read_key_event(forged, keys)
    edited = json.loads(path.read_bytes())
    edited["signatures"][0]["sig"] = json.loads(forged.read_bytes())["signatures"][0]["sig"]
    forged.write_text(json.dumps(edited))
    with pytest.raises(SignatureError, match="does not fit"):
        read_key_event(forged, keys)


def test_a_private_key_is_not_taken_for_a_public_one(tmp_path: Path) -> None:
    new_key(tmp_path, "me", PASSPHRASE)
    with pytest.raises(FormatError, match="give the public one"):
        load_public_key(tmp_path / "me.key.pem")
    (tmp_path / "junk.pem").write_text("junk")
    with pytest.raises(FormatError, match="not a public key"):
        load_public_key(tmp_path / "junk.pem")
    with pytest.raises(SteelyardError, match="No such file"):
        load_public_key(tmp_path / "absent.pem")


def test_an_rsa_key_is_refused(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    public = rsa.generate_private_key(65537, 2048).public_key()
    (tmp_path / "rsa.pem").write_bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(FormatError, match="P-256"):
        load_public_key(tmp_path / "rsa.pem")


def test_what_a_key_signs_verifies_with_that_key_alone(tmp_path: Path) -> None:
    new_key(tmp_path, "me", PASSPHRASE)
    new_key(tmp_path, "you", PASSPHRASE)
    envelope = sign(PAYLOAD, load_signer(tmp_path, "me", PASSPHRASE))
    mine, yours = (load_public_key(tmp_path / f"{name}.pub.pem") for name in ("me", "you"))
    assert verify_envelope(envelope, "x", [yours, mine]) == (PAYLOAD, mine)
    with pytest.raises(SignatureError, match="none of yours"):
        verify_envelope(envelope, "x", [yours])
    with pytest.raises(SignatureError, match="of your own"):
        verify_envelope(envelope, "x", [])
