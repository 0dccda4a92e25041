"""The two secrets of granting, made once for a workspace: what copies are marked with, and what identities are read
with.

    new_grant_keys(folder, passphrase, ledger)      # steelyard grant key new
    key = load_mark_key(folder, passphrase)

In `grants/keys/`: `mark.key.pem` holds an Ed25519 key that signs nothing: of its 32 secret bytes HKDF-SHA256 makes the
watermark's master key, and its public half is the fingerprint by which the ledger knows it. `identity.key.pem` is the
X25519 key to which requests are sealed. Both are PKCS8 encrypted with the passphrase, mode 0600. Neither is ever shown.
Who loses the mark key can neither trace a copy nor make one again; who loses the other can read no request.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from steelyard.base.canonical import sha256_hex
from steelyard.base.errors import FormatError, SteelyardError
from steelyard.base.files import new_folder, write_atomic
from steelyard.release.grant_sealed import load_recipient, new_recipient
from steelyard.release.keys import check_passphrase
from steelyard.release.public_keys import read_bytes

if TYPE_CHECKING:
    from steelyard.ledger.ledger import Ledger

MARK = "mark.key.pem"
IDENTITY = "identity"
_INFO = b"steelyard watermark master key 1"


@dataclass(frozen=True)
class MarkKey:
    """The watermark's master key (32 bytes, never shown), and the fingerprint by which the ledger knows it."""

    secret: bytes = field(repr=False)
    fingerprint: str


def new_grant_keys(folder: Path, passphrase: bytes, ledger: Ledger) -> str:
    """Make both keys in the new folder `folder`, and note their fingerprints; gives the mark key's. Raises
    SteelyardError where there are keys already: copies that were marked with them could not be traced any more."""
    check_passphrase("grants", passphrase)
    if folder.exists() or folder.is_symlink():
        raise SteelyardError(f"{folder} exists already: its keys trace what was granted, and are never replaced")
    private = Ed25519PrivateKey.generate()
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(passphrase))
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with new_folder(folder, mode=0o700) as made:
        write_atomic(made / MARK, pem, mode=0o600)
        identity = new_recipient(made / IDENTITY, passphrase)
        found = fingerprint(identity.public_key())
        ledger.append("grant.keys", {"mark": fingerprint(private.public_key()), "identity": found})
    return fingerprint(private.public_key())


def load_mark_key(folder: Path, passphrase: bytes) -> MarkKey:
    """The master key. Raises SteelyardError where there is none or the passphrase is wrong."""
    path = folder / MARK
    if not path.is_file():
        raise SteelyardError(f"{path}: no key to mark copies with: make it with steelyard grant key new")
    if path.stat().st_mode & 0o077:
        raise SteelyardError(f"{path}: others can read this private key: chmod 600 {path}")
    try:
        private = load_pem_private_key(read_bytes(path), passphrase or None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SteelyardError(f"{path}: the passphrase is wrong, or the file is not an encrypted key") from error
    if not isinstance(private, Ed25519PrivateKey):
        raise FormatError(f"{path}: is not a key of steelyard grant key new")
    secret = HKDF(SHA256(), 32, salt=None, info=_INFO).derive(private.private_bytes_raw())
    return MarkKey(secret, fingerprint(private.public_key()))


def load_identity_key(folder: Path, passphrase: bytes) -> X25519PrivateKey:
    """What opens the requests. Raises SteelyardError where there is none or the passphrase is wrong."""
    path = folder / f"{IDENTITY}.key.pem"
    if not path.is_file():
        raise SteelyardError(f"{path}: no key to read identities with: make it with steelyard grant key new")
    return load_recipient(path, passphrase)


def fingerprint(public: object) -> str:
    """SHA-256 (hex) of a public key's SubjectPublicKeyInfo (DER)."""
    return sha256_hex(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))  # type: ignore[attr-defined]
