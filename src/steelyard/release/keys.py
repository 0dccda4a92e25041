"""Signing keys: P-256 or Ed25519, encrypted at rest, each with a small card beside it; rotated and revoked by signed
statements.

A key named `me` is three files: `me.key.pem` (PKCS8, encrypted with the passphrase, mode 0600), `me.pub.pem` (to give
to those who verify) and `me.json` (the card). Rotation and revocation leave `me.rotation.dsse.json` and
`me.revocation.dsse.json`: statements that the key itself signed, to be given to those who verify.

`spare/me.revocation.dsse.json` is a revocation signed when the key was made, to be kept apart from it: it ends the key
where nobody can open it any more (docs/keys.md). It has no effect until it is published.

The card's `kind` is what the key's owner says of it. What a verifier trusts is the public key that he holds himself.
"""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from pydantic import BaseModel, ConfigDict, ValidationError
from securesystemslib.signer import CryptoSigner, SSlibKey  # type: ignore[attr-defined]  # not re-exported

from steelyard.base.canonical import canonical_json, sha256_hex
from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.base.files import write_atomic
from steelyard.base.strict import strict_json
from steelyard.release.attest import Sha256, SignatureError, sign, statement_bytes
from steelyard.release.public_keys import (
    KEY_FILE_LIMIT,
    REVOCATION,
    ROTATION,
    KeyEvent,
    KeyType,
    accepted,
    load_public_key,
    read_bytes,
    read_key_event,
    type_of,
)

MINIMUM_PASSPHRASE = 12
SPARE = "spare"  # the folder of revocations made beforehand

PrivateKey = ec.EllipticCurvePrivateKey | Ed25519PrivateKey


class KeyInfo(BaseModel):
    """A key's card."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    keyid: Sha256
    created: str
    kind: Literal["standard", "throwaway"]
    type: KeyType = "p256"
    status: Literal["active", "rotated", "revoked"] = "active"
    rotated_to: Sha256 | None = None
    rotated_from: Sha256 | None = None


def new_key(
    folder: Path, name: str, passphrase: bytes, *, throwaway: bool = False, key_type: KeyType = "p256"
) -> KeyInfo:
    """Make a key in `folder`, and its spare revocation. Raises UsageError for a bad name or a weak passphrase,
    SteelyardError where a key of that name exists.
    """
    return _new_key(folder, name, passphrase, "throwaway" if throwaway else "standard", key_type, None)


def show_key(folder: Path, name: str) -> KeyInfo:
    """The card of one key. Raises SteelyardError where there is none, or where its public key is another."""
    path = path_of(folder, name, "json")
    if not path.is_file():
        known = ", ".join(info.stem for info in sorted(folder.glob("*.json")) if ".dsse" not in info.name) or "none"
        raise SteelyardError(f"{folder}: no key {name!r} (there: {known}): make it with steelyard key new {name}")
    try:
        info = KeyInfo.model_validate(strict_json(path.read_bytes(), str(path), limit=KEY_FILE_LIMIT))
    except ValidationError as error:
        first = error.errors()[0]
        raise FormatError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    public = load_public_key(path_of(folder, name, "pub.pem"))
    if info.name != name or info.keyid != public.keyid or info.type != type_of(public):
        raise SteelyardError(f"{path}: is not the card of {name}.pub.pem, whose key id is {public.keyid}")
    # The signed statement counts, whatever the card says: a card edited back does not bring a key to life again.
    for kind in ("rotation", "revocation"):
        path = path_of(folder, name, f"{kind}.dsse.json")
        if path.is_file():
            event = read_key_event(path, [public])
            if event is not None and event.keyid == info.keyid:
                status: Any = "revoked" if event.kind == "revocation" else "rotated"
                info = info.model_copy(update={"status": status})
    return info


def list_keys(folder: Path) -> list[KeyInfo]:
    """The cards of every key in `folder`, by name; an absent folder holds none."""
    return [show_key(folder, path.name[: -len(".pub.pem")]) for path in sorted(folder.glob("*.pub.pem"))]


def load_signer(folder: Path, name: str, passphrase: bytes) -> CryptoSigner:
    """The signer of an active key. Raises SteelyardError for a wrong passphrase, a rotated or a revoked key."""
    info = show_key(folder, name)
    if info.status == "revoked":
        raise SteelyardError(f"key {name!r} is revoked and signs no more: make another, steelyard key new")
    if info.status == "rotated":
        raise SteelyardError(
            f"key {name!r} was rotated and signs nothing any more: use its successor {info.rotated_to}"
        )
    return _signer(folder, name, passphrase)


def rotate_key(folder: Path, name: str, new_name: str, passphrase: bytes) -> KeyInfo:
    """Make `new_name`, of the same kind, type and passphrase; `name` signs a statement that names it, then no more."""
    signer = load_signer(folder, name, passphrase)
    info = show_key(folder, name)
    successor = _new_key(folder, new_name, passphrase, info.kind, info.type, info.keyid)
    predicate = {"time": now_text(), "successor": successor.keyid, "reason": "rotated"}
    payload = statement_bytes(
        ROTATION, {info.keyid: sha256_hex(read_bytes(path_of(folder, name, "pub.pem")))}, predicate
    )
    write_atomic(path_of(folder, name, "rotation.dsse.json"), sign(payload, signer))
    _write_card(folder, info.model_copy(update={"status": "rotated", "rotated_to": successor.keyid}))
    return successor


def revoke_key(folder: Path, name: str, passphrase: bytes, *, reason: str) -> Path:
    """Sign a revocation of `name` with the key itself, and return its file: for all who verify. A rotated key can still
    be revoked. Every signature of a revoked key is refused, whatever time it claims.
    """
    info = _to_revoke(folder, name)
    if not reason.strip() or len(reason) > 1000:
        raise UsageError("a revocation needs a reason of 1 to 1000 characters")
    envelope = _revocation(_signer(folder, name, passphrase), read_bytes(path_of(folder, name, "pub.pem")), reason)
    return _revoke(folder, info, envelope)


def revoke_with_spare(folder: Path, name: str, spare: Path) -> Path:
    """As `revoke_key`, by the revocation that was signed when the key was made: no passphrase is needed.

    Raises FormatError or SignatureError where `spare` is not a revocation that this key signed.
    """
    info = _to_revoke(folder, name)
    event = read_key_event(spare, [load_public_key(path_of(folder, name, "pub.pem"))])
    if event is None or event.kind != "revocation":
        raise SteelyardError(f"{spare}: is not a revocation of key {name!r} ({info.keyid})")
    return _revoke(folder, info, read_bytes(spare))


def spare_of(folder: Path, name: str) -> Path:
    """Where the spare revocation of a new key is written."""
    return path_of(folder / SPARE, name, "revocation.dsse.json")


def check_passphrase(name: str, passphrase: bytes) -> None:
    """Raises UsageError for a passphrase that is too weak to keep a key with."""
    if len(passphrase) < MINIMUM_PASSPHRASE or len(set(passphrase)) < 5:
        raise UsageError(
            f"the passphrase of key {name!r} is too weak: at least {MINIMUM_PASSPHRASE} characters, 5 of them different"
        )


def open_private(path: Path, passphrase: bytes) -> CryptoSigner:
    """The signer in an encrypted PEM file. Raises SteelyardError for a wrong passphrase, FormatError for another type
    of key.
    """
    try:
        private = load_pem_private_key(read_bytes(path), passphrase or None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SteelyardError(f"{path}: the passphrase is wrong, or the file is not an encrypted key") from error
    if not accepted(private.public_key()):
        raise FormatError(f"{path}: only P-256 and Ed25519 keys are accepted")
    return CryptoSigner(private, SSlibKey.from_crypto(private.public_key()))


def save_key(
    folder: Path, name: str, private: PrivateKey, passphrase: bytes, info: KeyInfo, *, spare: bool = True
) -> KeyInfo:
    """Write the files of a key. Raises SteelyardError where one of them exists."""
    check_passphrase(name, passphrase)
    for ending in ("key.pem", "pub.pem", "json"):
        if (path := path_of(folder, name, ending)).exists():
            raise SteelyardError(f"{path} exists already: choose another name")
    if spare and (path := spare_of(folder, name)).exists():
        raise SteelyardError(f"{path} exists already, of an earlier key of that name: move it away first")
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(passphrase))
    public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    if not folder.exists():
        folder.mkdir(parents=True, mode=0o700)
    if spare:
        signer = CryptoSigner(private, SSlibKey.from_crypto(private.public_key()))
        reason = "its owner published the revocation that was made with the key"
        write_atomic(spare_of(folder, name), _revocation(signer, public, reason), mode=0o600)
    write_atomic(path_of(folder, name, "key.pem"), pem, mode=0o600)
    write_atomic(path_of(folder, name, "pub.pem"), public)
    _write_card(folder, info)
    return info


def _new_key(
    folder: Path, name: str, passphrase: bytes, kind: Any, key_type: KeyType, rotated_from: str | None
) -> KeyInfo:
    path_of(folder, name, "key.pem")  # the name first
    check_passphrase(name, passphrase)
    private = Ed25519PrivateKey.generate() if key_type == "ed25519" else ec.generate_private_key(ec.SECP256R1())
    keyid = SSlibKey.from_crypto(private.public_key()).keyid
    info = KeyInfo(name=name, keyid=keyid, created=now_text(), kind=kind, type=key_type, rotated_from=rotated_from)
    return save_key(folder, name, private, passphrase, info)


def _signer(folder: Path, name: str, passphrase: bytes) -> CryptoSigner:
    path = path_of(folder, name, "key.pem")
    if path.exists() and os.stat(path).st_mode & 0o077:
        raise SteelyardError(f"{path}: others can read this private key: chmod 600 {path}")
    signer = open_private(path, passphrase)
    if signer.public_key.keyid != show_key(folder, name).keyid:
        raise SteelyardError(f"{path}: is not the private half of {name}.pub.pem")
    return signer


def _to_revoke(folder: Path, name: str) -> KeyInfo:
    info = show_key(folder, name)
    if info.status == "revoked":
        raise SteelyardError(f"key {name!r} is revoked already: {path_of(folder, name, 'revocation.dsse.json')}")
    return info


def _revocation(signer: CryptoSigner, public: bytes, reason: str) -> bytes:
    """The envelope in which a key revokes itself; `public` is its PEM."""
    subject = {signer.public_key.keyid: sha256_hex(public)}
    return sign(statement_bytes(REVOCATION, subject, {"time": now_text(), "reason": reason}), signer)


def _revoke(folder: Path, info: KeyInfo, envelope: bytes) -> Path:
    path = path_of(folder, info.name, "revocation.dsse.json")
    write_atomic(path, envelope)
    _write_card(folder, info.model_copy(update={"status": "revoked"}))
    return path


def path_of(folder: Path, name: str, ending: str) -> Path:
    """One file of a key. Raises UsageError for a name that could leave the folder."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
        raise UsageError(f"key name {name[:80]!r}: use letters, digits, - and _, at most 64")
    return folder / f"{name}.{ending}"


def _write_card(folder: Path, info: KeyInfo) -> None:
    write_atomic(path_of(folder, info.name, "json"), canonical_json(info.model_dump(mode="json")) + b"\n")


def now_text() -> str:
    """Now, as statements and cards write it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


__all__ = [
    "KeyEvent",
    "KeyInfo",
    "SignatureError",
    "list_keys",
    "load_public_key",
    "load_signer",
    "new_key",
    "read_key_event",
    "revoke_key",
    "revoke_with_spare",
    "rotate_key",
    "show_key",
    "spare_of",
]
