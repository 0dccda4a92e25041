"""Ed25519 keys, backups, imports and the spare revocation: what a lost passphrase leaves possible, and what not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.release.attest import SignatureError, sign, statement_bytes, verify_envelope
from steelyard.release.key_backup import export_backup, export_public_key, import_key
from steelyard.release.keys import (
    list_keys,
    load_public_key,
    load_signer,
    new_key,
    read_key_event,
    revoke_key,
    revoke_with_spare,
    rotate_key,
    show_key,
    spare_of,
)

PASSPHRASE = b"correct horse battery"
PAYLOAD = statement_bytes("test:nothing/v1", {"a": "0" * 64}, {})


# -- Ed25519 ---------------------------------------------------------------------------------------------------------


def test_an_ed25519_key_signs_statements_rotates_and_revokes(tmp_path: Path) -> None:
    info = new_key(tmp_path, "me", PASSPHRASE, key_type="ed25519")
    public = load_public_key(tmp_path / "me.pub.pem")
    assert (info.type, public.keytype, public.keyid) == ("ed25519", "ed25519", info.keyid)
    assert verify_envelope(sign(PAYLOAD, load_signer(tmp_path, "me", PASSPHRASE)), "x", [public])[0] == PAYLOAD
    assert rotate_key(tmp_path, "me", "next", PASSPHRASE).type == "ed25519"
    revoke_key(tmp_path, "next", PASSPHRASE, reason="tried out")
    assert [(key.name, key.type, key.status) for key in list_keys(tmp_path)] == [
        ("me", "ed25519", "rotated"),
        ("next", "ed25519", "revoked"),
    ]


def test_a_card_of_before_ed25519_is_read_and_one_that_lies_is_not(tmp_path: Path) -> None:
    new_key(tmp_path, "me", PASSPHRASE)
    card = (tmp_path / "me.json").read_text()
    (tmp_path / "me.json").write_text(card.replace('"type":"p256"', '"type":"ed25519"'))
    with pytest.raises(SteelyardError, match=r"is not the card of me\.pub\.pem"):
        show_key(tmp_path, "me")
    (tmp_path / "me.json").write_text(card.replace(',"type":"p256"', ""))
    assert show_key(tmp_path, "me").type == "p256"


# -- the spare revocation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key_type", ["p256", "ed25519"])
def test_the_spare_revocation_ends_a_key_without_its_passphrase(tmp_path: Path, key_type: str) -> None:
    keys = tmp_path / "keys"
    info = new_key(keys, "me", PASSPHRASE, key_type=key_type)  # type: ignore[arg-type]
    apart = tmp_path / "safe.json"
    shutil.move(spare_of(keys, "me"), apart)
    assert os.stat(apart).st_mode & 0o777 == 0o600
    assert show_key(keys, "me").status == "active"  # made, not published
    load_signer(keys, "me", PASSPHRASE)
    path = revoke_with_spare(keys, "me", apart)
    assert show_key(keys, "me").status == "revoked"
    event = read_key_event(path, [load_public_key(keys / "me.pub.pem")])
    assert event is not None
    assert (event.kind, event.keyid) == ("revocation", info.keyid)
    with pytest.raises(SteelyardError, match="is revoked"):
        load_signer(keys, "me", PASSPHRASE)
    with pytest.raises(SteelyardError, match="revoked already"):
        revoke_with_spare(keys, "me", apart)


def test_the_spare_revocation_of_another_key_ends_nothing(tmp_path: Path) -> None:
    new_key(tmp_path, "me", PASSPHRASE)
    new_key(tmp_path, "you", PASSPHRASE)
    with pytest.raises(SteelyardError, match="is not a revocation of key 'me'"):
        revoke_with_spare(tmp_path, "me", spare_of(tmp_path, "you"))
    edited = spare_of(tmp_path, "me").read_bytes().replace(b'"sig":"', b'"sig":"AAAA')
    (tmp_path / "edited.json").write_bytes(edited)
    with pytest.raises(SignatureError, match="does not fit"):
        revoke_with_spare(tmp_path, "me", tmp_path / "edited.json")
    rotate_key(tmp_path, "you", "next", PASSPHRASE)
    with pytest.raises(SteelyardError, match="is not a revocation of key 'you'"):
        revoke_with_spare(tmp_path, "you", tmp_path / "you.rotation.dsse.json")
    assert show_key(tmp_path, "me").status == "active"


def test_a_rotated_key_leaves_a_successor_with_a_spare_of_its_own(tmp_path: Path) -> None:
    new_key(tmp_path, "me", PASSPHRASE)
    rotate_key(tmp_path, "me", "next", PASSPHRASE)
    revoke_with_spare(tmp_path, "next", spare_of(tmp_path, "next"))
    assert [key.status for key in list_keys(tmp_path)] == ["rotated", "revoked"]


def test_a_spare_of_an_earlier_key_is_not_overwritten(tmp_path: Path) -> None:
    new_key(tmp_path, "me", PASSPHRASE)
    before = spare_of(tmp_path, "me").read_bytes()
    for path in tmp_path.glob("me.*"):
        path.unlink()
    with pytest.raises(SteelyardError, match="of an earlier key of that name"):
        new_key(tmp_path, "me", PASSPHRASE)
    assert spare_of(tmp_path, "me").read_bytes() == before
    assert not (tmp_path / "me.key.pem").exists()


# -- export and import -----------------------------------------------------------------------------------------------


def test_the_public_key_is_exported_and_never_over_a_file(tmp_path: Path) -> None:
    info = new_key(tmp_path / "keys", "me", PASSPHRASE)
    out = export_public_key(tmp_path / "keys", "me", tmp_path / "out.pem")
    assert load_public_key(out).keyid == info.keyid
    with pytest.raises(SteelyardError, match="exists already"):
        export_public_key(tmp_path / "keys", "me", out)
    with pytest.raises(SteelyardError, match="no key 'you'"):
        export_public_key(tmp_path / "keys", "you", tmp_path / "you.pem")


@pytest.mark.parametrize("key_type", ["p256", "ed25519"])
def test_a_backup_comes_back_whole_and_encrypted(tmp_path: Path, key_type: str) -> None:
    keys, backup, other = tmp_path / "keys", tmp_path / "backup", tmp_path / "other"
    info = new_key(keys, "me", PASSPHRASE, throwaway=True, key_type=key_type)  # type: ignore[arg-type]
    export_backup(keys, "me", backup, PASSPHRASE)
    private = backup / "me.key.pem"
    assert os.stat(private).st_mode & 0o777 == 0o600
    assert all(b"BEGIN PRIVATE KEY" not in path.read_bytes() for path in backup.iterdir())
    assert sorted(path.name for path in backup.iterdir()) == ["me.json", "me.key.pem", "me.pub.pem"]  # no spare
    private.chmod(0o755)  # as a stick that knows no modes has it
    assert import_key(other, backup, PASSPHRASE) == info
    assert os.stat(other / "me.key.pem").st_mode & 0o777 == 0o600
    envelope = sign(PAYLOAD, load_signer(other, "me", PASSPHRASE))
    assert verify_envelope(envelope, "x", [load_public_key(keys / "me.pub.pem")])[0] == PAYLOAD
    assert import_key(tmp_path / "third", backup, PASSPHRASE, name="again").name == "again"


@pytest.mark.parametrize("passphrase", [b"", b"wrong horse battery"])
def test_a_backup_opens_with_its_passphrase_alone(tmp_path: Path, passphrase: bytes) -> None:
    keys, backup = tmp_path / "keys", tmp_path / "backup"
    new_key(keys, "me", PASSPHRASE)
    with pytest.raises(SteelyardError, match="passphrase is wrong"):
        export_backup(keys, "me", backup, passphrase)
    assert not backup.exists()
    export_backup(keys, "me", backup, PASSPHRASE)
    with pytest.raises(SteelyardError, match="passphrase is wrong"):
        import_key(tmp_path / "other", backup, passphrase)
    assert not (tmp_path / "other").exists()


def test_a_revoked_key_stays_revoked_through_its_backup(tmp_path: Path) -> None:
    keys, backup = tmp_path / "keys", tmp_path / "backup"
    new_key(keys, "me", PASSPHRASE)
    card = (keys / "me.json").read_bytes()
    revoke_key(keys, "me", PASSPHRASE, reason="stolen")
    export_backup(keys, "me", backup, PASSPHRASE)
    (backup / "me.json").write_bytes(card)  # the card edited back
    assert import_key(tmp_path / "other", backup, PASSPHRASE, name="new").status == "revoked"
    with pytest.raises(SteelyardError, match="is revoked"):
        load_signer(tmp_path / "other", "new", PASSPHRASE)


def test_an_import_replaces_nothing_and_takes_no_key_twice(tmp_path: Path) -> None:
    keys, backup = tmp_path / "keys", tmp_path / "backup"
    new_key(keys, "me", PASSPHRASE)
    export_backup(keys, "me", backup, PASSPHRASE)
    with pytest.raises(SteelyardError, match="this key is there already, as 'me'"):
        import_key(keys, backup, PASSPHRASE, name="you")
    new_key(tmp_path / "other", "me", PASSPHRASE)
    before = (tmp_path / "other" / "me.key.pem").read_bytes()
    with pytest.raises(SteelyardError, match="exists already"):
        import_key(tmp_path / "other", backup, PASSPHRASE)
    assert (tmp_path / "other" / "me.key.pem").read_bytes() == before


def test_an_import_does_not_lay_its_statements_over_those_of_another_key(tmp_path: Path) -> None:
    keys, other, backup = tmp_path / "keys", tmp_path / "other", tmp_path / "backup"
    new_key(keys, "me", PASSPHRASE)
    revoke_key(keys, "me", PASSPHRASE, reason="stolen")
    export_backup(keys, "me", backup, PASSPHRASE)
    new_key(other, "me", PASSPHRASE)
    its = revoke_key(other, "me", PASSPHRASE, reason="lost").read_bytes()
    with pytest.raises(SteelyardError, match="exists already"):
        import_key(other, backup, PASSPHRASE)
    assert (other / "me.revocation.dsse.json").read_bytes() == its


def test_a_mixed_backup_is_refused(tmp_path: Path) -> None:
    keys, backup = tmp_path / "keys", tmp_path / "backup"
    for name in ("me", "you"):
        new_key(keys, name, PASSPHRASE)
    export_backup(keys, "me", backup, PASSPHRASE)
    shutil.copy(keys / "you.key.pem", backup / "me.key.pem")
    with pytest.raises(SteelyardError, match="is not the private half"):
        import_key(tmp_path / "other", backup, PASSPHRASE)
    shutil.copy(keys / "you.key.pem", backup / "you.key.pem")
    with pytest.raises(FormatError, match="2 private keys, where a backup holds 1"):
        import_key(tmp_path / "other", backup, PASSPHRASE)


@pytest.mark.parametrize("private", [ec.generate_private_key(ec.SECP256R1()), Ed25519PrivateKey.generate()])
def test_a_private_key_of_another_tool_is_imported(tmp_path: Path, private: ec.EllipticCurvePrivateKey) -> None:
    pem = tmp_path / "key.pem"
    pem.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(PASSPHRASE)))
    with pytest.raises(UsageError, match="needs a name"):
        import_key(tmp_path / "keys", pem, PASSPHRASE)
    info = import_key(tmp_path / "keys", pem, PASSPHRASE, name="me", throwaway=True)
    assert info.kind == "throwaway"
    load_signer(tmp_path / "keys", "me", PASSPHRASE)
    assert spare_of(tmp_path / "keys", "me").is_file()


def test_a_private_key_in_clear_or_of_another_type_is_not_imported(tmp_path: Path) -> None:
    pem, keys = tmp_path / "key.pem", tmp_path / "keys"
    small = ec.generate_private_key(ec.SECP384R1())
    pem.write_bytes(small.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(FormatError, match="not an encrypted private key"):
        import_key(keys, pem, PASSPHRASE, name="me")
    for private in (small, rsa.generate_private_key(65537, 2048)):
        pem.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(PASSPHRASE)))
        with pytest.raises(FormatError, match="only P-256 and Ed25519"):
            import_key(keys, pem, PASSPHRASE, name="me")
    weak = ec.generate_private_key(ec.SECP256R1())
    pem.write_bytes(weak.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"short")))
    with pytest.raises(UsageError, match="too weak"):
        import_key(keys, pem, b"short", name="me")
    assert not list(keys.glob("*"))
