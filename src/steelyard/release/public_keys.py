"""Public keys and the statements about them: what a verifier needs of keys. See `keys` for those who sign."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from pydantic import BaseModel, ConfigDict, ValidationError
from securesystemslib.signer import Key, SSlibKey  # type: ignore[attr-defined]  # not re-exported

from steelyard.base.errors import FormatError, SteelyardError
from steelyard.release.attest import Sha256, parse_statement, parse_time, read_envelope, verify_envelope

REVOCATION = "steelyard:key-revocation/v1"
ROTATION = "steelyard:key-rotation/v1"
KEY_FILE_LIMIT = 100_000  # bytes, of a key, card or statement

KeyType = Literal["p256", "ed25519"]


class KeyEvent(BaseModel):
    """A signed statement about a key: since `time` it is revoked, or succeeded by `successor`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["revocation", "rotation"]
    keyid: Sha256
    time: datetime
    reason: str
    successor: Sha256 | None = None


def load_public_key(path: Path) -> Key:
    """A P-256 or Ed25519 public key (PEM), under the key id that securesystemslib gives it. Raises FormatError."""
    data = read_bytes(path)
    if b"PRIVATE KEY" in data:
        raise FormatError(f"{path}: is a private key: give the public one, NAME.pub.pem")
    try:
        public = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise FormatError(f"{path}: not a public key in PEM: {' '.join(str(error).split())[:200]}") from error
    if not accepted(public):
        raise FormatError(f"{path}: only P-256 and Ed25519 keys are accepted")
    key: Key = SSlibKey.from_crypto(public)
    return key


def read_key_event(path: Path, keys: Sequence[Key], *, unpinned: bool = False) -> KeyEvent | None:
    """A rotation or revocation statement, signed by one of `keys`; None where it is about a key outside `keys`.

    `unpinned`: then it counts all the same, unproven, for that key may sign by a certificate. It can only take away,
    and the file is the verifier's own. Raises FormatError, or SignatureError where it is about one of `keys` but none
    of them signed.
    """
    data, where = read_bytes(path), str(path)
    kind, subjects, predicate = parse_statement(read_envelope(data, where)[0], where)
    if kind not in (REVOCATION, ROTATION) or len(subjects) != 1:
        raise FormatError(f"{where}: neither a revocation nor a rotation of one key")
    if next(iter(subjects)) in {key.keyid for key in keys}:
        verify_envelope(data, where, keys)
    elif not unpinned:
        return None
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


def accepted(public: object) -> bool:
    """Whether a public key (of `cryptography`) is of a type that we sign with and verify."""
    is_p256 = isinstance(public, ec.EllipticCurvePublicKey) and isinstance(public.curve, ec.SECP256R1)
    return is_p256 or isinstance(public, Ed25519PublicKey)


def type_of(key: Key) -> KeyType:
    """The type of a public key that `load_public_key` accepted."""
    return "ed25519" if key.keytype == "ed25519" else "p256"


def read_bytes(path: Path) -> bytes:
    """A key, card or statement. Raises SteelyardError, or FormatError where it is too large to be one."""
    try:
        with path.open("rb") as file:
            data = file.read(KEY_FILE_LIMIT + 1)
    except OSError as error:
        raise SteelyardError(f"{path}: {error.strerror}") from error
    if len(data) > KEY_FILE_LIMIT:
        raise FormatError(f"{path}: over {KEY_FILE_LIMIT:,} bytes: not a key or a statement about one")
    return data
