"""Signing keys: P-256, encrypted at rest, each with a small card beside it; rotated and revoked by signed statements.

A key named `me` is three files: `me.key.pem` (PKCS8, encrypted with the passphrase, mode 0600), `me.pub.pem` (to give
to those who verify) and `me.json` (the card). Rotation and revocation leave `me.rotation.dsse.json` and
`me.revocation.dsse.json`: statements that the key itself signed, to be given to those who verify.

The card's `kind` is what the key's owner says of it. What a verifier trusts is the public key that he holds himself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from pydantic import BaseModel, ConfigDict, ValidationError
from securesystemslib.signer import CryptoSigner, Key, SSlibKey  # type: ignore[attr-defined]  # not re-exported

from steelyard.base.canonical import canonical_json, sha256_hex
from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.base.files import write_atomic
from steelyard.base.strict import strict_json
from steelyard.release.attest import (
    Sha256,
    SignatureError,
    parse_statement,
    parse_time,
    read_envelope,
    sign,
    statement_bytes,
    verify_envelope,
)

REVOCATION = "steelyard:key-revocation/v1"
ROTATION = "steelyard:key-rotation/v1"
MINIMUM_PASSPHRASE = 12
_FILE_LIMIT = 100_000  # bytes, of a key, card or statement


class KeyInfo(BaseModel):
    """A key's card."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    keyid: Sha256
    created: str
    kind: Literal["standard", "throwaway"]
    status: Literal["active", "rotated", "revoked"] = "active"
    rotated_to: Sha256 | None = None
    rotated_from: Sha256 | None = None


class KeyEvent(BaseModel):
    """A signed statement about a key: since `time` it is revoked, or succeeded by `successor`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["revocation", "rotation"]
    keyid: Sha256
    time: datetime
    reason: str
    successor: Sha256 | None = None


def new_key(folder: Path, name: str, passphrase: bytes, *, throwaway: bool = False) -> KeyInfo:
    """Make a P-256 key in `folder`. Raises UsageError for a bad name or a weak passphrase, SteelyardError where a key
    of that name exists.
    """
    return _new_key(folder, name, passphrase, "throwaway" if throwaway else "standard", None)


def show_key(folder: Path, name: str) -> KeyInfo:
    """The card of one key. Raises SteelyardError where there is none, or where its public key is another."""
    path = _path(folder, name, "json")
    if not path.is_file():
        known = ", ".join(info.stem for info in sorted(folder.glob("*.json")) if ".dsse" not in info.name) or "none"
        raise SteelyardError(f"{folder}: no key {name!r} (there: {known}): make it with steelyard key new {name}")
    try:
        info = KeyInfo.model_validate(strict_json(path.read_bytes(), str(path), limit=_FILE_LIMIT))
    except ValidationError as error:
        first = error.errors()[0]
        raise FormatError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    public = load_public_key(_path(folder, name, "pub.pem"))
    if info.name != name or info.keyid != public.keyid:
        raise SteelyardError(f"{path}: is not the card of {name}.pub.pem, whose key id is {public.keyid}")
    # The signed statement counts, whatever the card says: a card edited back does not bring a key to life again.
    for kind in ("rotation", "revocation"):
        path = _path(folder, name, f"{kind}.dsse.json")
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
    """Make `new_name`, of the same kind and passphrase; `name` signs a statement that names it, then nothing more."""
    signer = load_signer(folder, name, passphrase)
    info = show_key(folder, name)
    successor = _new_key(folder, new_name, passphrase, info.kind, info.keyid)
    predicate = {"time": _now(), "successor": successor.keyid, "reason": "rotated"}
    payload = statement_bytes(ROTATION, {info.keyid: _public_digest(folder, name)}, predicate)
    write_atomic(_path(folder, name, "rotation.dsse.json"), sign(payload, signer))
    _write_card(folder, info.model_copy(update={"status": "rotated", "rotated_to": successor.keyid}))
    return successor


def revoke_key(folder: Path, name: str, passphrase: bytes, *, reason: str) -> Path:
    """Sign a revocation of `name` with the key itself, and return its file: for all who verify. A rotated key can still
    be revoked. Every signature of a revoked key is refused, whatever time it claims.
    """
    if not reason.strip() or len(reason) > 1000:
        raise UsageError("a revocation needs a reason of 1 to 1000 characters")
    info = show_key(folder, name)
    if info.status == "revoked":
        raise SteelyardError(f"key {name!r} is revoked already: {_path(folder, name, 'revocation.dsse.json')}")
    payload = statement_bytes(
        REVOCATION, {info.keyid: _public_digest(folder, name)}, {"time": _now(), "reason": reason}
    )
    path = _path(folder, name, "revocation.dsse.json")
    write_atomic(path, sign(payload, _signer(folder, name, passphrase)))
    _write_card(folder, info.model_copy(update={"status": "revoked"}))
    return path


def load_public_key(path: Path) -> Key:
    """A P-256 or Ed25519 public key (PEM), under the key id that securesystemslib gives it. Raises FormatError."""
    data = _read(path)
    if b"PRIVATE KEY" in data:
        raise FormatError(f"{path}: is a private key: give the public one, NAME.pub.pem")
    try:
        public = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise FormatError(f"{path}: not a public key in PEM: {' '.join(str(error).split())[:200]}") from error
    is_p256 = isinstance(public, ec.EllipticCurvePublicKey) and isinstance(public.curve, ec.SECP256R1)
    if not is_p256 and not isinstance(public, Ed25519PublicKey):
        raise FormatError(f"{path}: only P-256 and Ed25519 keys are accepted")
    key: Key = SSlibKey.from_crypto(public)
    return key


def read_key_event(path: Path, keys: Sequence[Key]) -> KeyEvent | None:
    """A rotation or revocation statement, signed by one of `keys`; None where it is about a key outside `keys`, which
    nothing depends on. Raises FormatError, or SignatureError where it is about one of `keys` but none of them signed.
    """
    data, where = _read(path), str(path)
    kind, subjects, predicate = parse_statement(read_envelope(data, where)[0], where)
    if kind not in (REVOCATION, ROTATION) or len(subjects) != 1:
        raise FormatError(f"{where}: neither a revocation nor a rotation of one key")
    if next(iter(subjects)) not in {key.keyid for key in keys}:
        return None
    verify_envelope(data, where, keys)
    fields = {"time", "reason"} | ({"successor"} if kind == ROTATION else set())
    if set(predicate) != fields or not all(isinstance(value, str) for value in predicate.values()):
        raise FormatError(f"{where}: predicate: expected {', '.join(sorted(fields))}")
    try:
        return KeyEvent(
            kind="revocation" if kind == REVOCATION else "rotation",
            keyid=next(iter(subjects)),
            time=parse_time(predicate["time"], where),
            reason=predicate["reason"],
            successor=predicate.get("successor"),
        )
    except ValidationError as error:
        raise FormatError(f"{where}: {error.errors()[0]['msg']}") from error


def _new_key(folder: Path, name: str, passphrase: bytes, kind: Any, rotated_from: str | None) -> KeyInfo:
    if len(passphrase) < MINIMUM_PASSPHRASE or len(set(passphrase)) < 5:
        raise UsageError(
            f"the passphrase of key {name!r} is too weak: at least {MINIMUM_PASSPHRASE} characters, 5 of them different"
        )
    for ending in ("key.pem", "pub.pem", "json"):
        if (path := _path(folder, name, ending)).exists():
            raise SteelyardError(f"{path} exists already: choose another name")
    private = ec.generate_private_key(ec.SECP256R1())
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(passphrase))
    public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    if not folder.exists():
        folder.mkdir(parents=True, mode=0o700)
    write_atomic(_path(folder, name, "key.pem"), pem, mode=0o600)
    write_atomic(_path(folder, name, "pub.pem"), public)
    keyid = SSlibKey.from_crypto(private.public_key()).keyid
    info = KeyInfo(name=name, keyid=keyid, created=_now(), kind=kind, rotated_from=rotated_from)
    _write_card(folder, info)
    return info


def _signer(folder: Path, name: str, passphrase: bytes) -> CryptoSigner:
    path = _path(folder, name, "key.pem")
    if path.exists() and os.stat(path).st_mode & 0o077:
        raise SteelyardError(f"{path}: others can read this private key: chmod 600 {path}")
    try:
        private = load_pem_private_key(_read(path), passphrase or None)
    except (ValueError, TypeError) as error:
        raise SteelyardError(f"{path}: the passphrase is wrong, or the file is not an encrypted key") from error
    public = SSlibKey.from_crypto(private.public_key())
    if public.keyid != show_key(folder, name).keyid:
        raise SteelyardError(f"{path}: is not the private half of {name}.pub.pem")
    return CryptoSigner(private, public)


def _path(folder: Path, name: str, ending: str) -> Path:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
        raise UsageError(f"key name {name[:80]!r}: use letters, digits, - and _, at most 64")
    return folder / f"{name}.{ending}"


def _public_digest(folder: Path, name: str) -> str:
    return sha256_hex(_read(_path(folder, name, "pub.pem")))


def _write_card(folder: Path, info: KeyInfo) -> None:
    write_atomic(_path(folder, info.name, "json"), canonical_json(info.model_dump(mode="json")) + b"\n")


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_FILE_LIMIT + 1)
    except OSError as error:
        raise SteelyardError(f"{path}: {error.strerror}") from error
    if len(data) > _FILE_LIMIT:
        raise FormatError(f"{path}: over {_FILE_LIMIT:,} bytes: not a key or a statement about one")
    return data


def _now() -> str:
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
    "rotate_key",
    "show_key",
]
