"""Sealed to one public key: what only the holder of an X25519 key can read, streamed in chunks, whole or refused.

    out = SealedWriter(file, public); out.write(data); out.finish()
    data = SealedReader(file, private, "copy.sealed").read()

An ephemeral X25519 key agrees with the recipient's; HKDF-SHA256 makes of it the key of AES-256-GCM, which seals chunks
of CHUNK bytes. A chunk's nonce is its number and whether it is the last, so that chunks cannot be moved, dropped,
repeated or cut off unnoticed. The reader gives out a chunk only once its tag is checked; that the end was reached is
known only when `read` has returned b"". It is the construction of age (github.com/C2SP/C2SP, age.md: "Payload").
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.base.files import write_atomic
from steelyard.release.keys import check_passphrase
from steelyard.release.public_keys import read_bytes

CHUNK = 64 << 10  # bytes of plain text
MAGIC = b"steelyard sealed 1\n"
_TAG = 16
_KEY = 32


class SealedWriter(io.RawIOBase):
    """A stream that seals what is written to it. Only `finish` writes the last chunk: without it nothing opens."""

    def __init__(self, file: BinaryIO, public: X25519PublicKey) -> None:
        ephemeral = X25519PrivateKey.generate()
        own = ephemeral.public_key().public_bytes_raw()
        self._file, self._number, self._held = file, 0, bytearray()
        self._cipher = _cipher(ephemeral, public, own, public.public_bytes_raw())
        file.write(MAGIC + own)

    def writable(self) -> bool:
        return True

    def write(self, data: object, /) -> int:
        given = memoryview(data).cast("B")  # type: ignore[arg-type]  # any buffer
        self._held += given
        while len(self._held) > CHUNK:  # a full chunk is held back: it may be the last
            self._seal(bytes(self._held[:CHUNK]), last=False)
            del self._held[:CHUNK]
        return len(given)

    def finish(self) -> None:
        """Write the last chunk. What is closed without it stays a torso that nobody can open."""
        self._seal(bytes(self._held), last=True)
        self._held.clear()

    def _seal(self, data: bytes, *, last: bool) -> None:
        self._file.write(self._cipher.encrypt(_nonce(self._number, last), data, None))
        self._number += 1


class SealedReader(io.RawIOBase):
    """The plain text of a sealed file. Raises FormatError where it was cut or changed, or is for another key."""

    def __init__(self, file: BinaryIO, private: X25519PrivateKey, where: str) -> None:
        self._file, self._where, self._number, self._plain, self._last = file, where, 0, b"", False
        head = file.read(len(MAGIC) + _KEY)
        if len(head) != len(MAGIC) + _KEY or not head.startswith(MAGIC):
            raise FormatError(f"{where}: is not a sealed file")
        own = head[len(MAGIC) :]
        try:
            other = X25519PublicKey.from_public_bytes(own)
            self._cipher = _cipher(private, other, own, private.public_key().public_bytes_raw())
        except (ValueError, UsageError) as error:
            raise FormatError(f"{where}: is not a sealed file: its key is none") from error
        self._next = file.read(CHUNK + _TAG)

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        """Up to `size` bytes; fewer only at the end, b"" once the end was reached."""
        parts, left = [], -1 if size is None else size
        while left and (self._plain or not self._last):
            if not self._plain:
                self._open()
            part = self._plain if left < 0 else self._plain[:left]
            self._plain = self._plain[len(part) :]
            parts.append(part)
            left -= len(part) if left > 0 else 0
        return b"".join(parts)

    def _open(self) -> None:
        data, self._next = self._next, self._file.read(CHUNK + _TAG)
        last = not self._next
        try:
            self._plain = self._cipher.decrypt(_nonce(self._number, last), data, None)
        except InvalidTag as error:
            cause = "it is for another key, or was changed" if self._number == 0 else "it was cut off or changed"
            raise FormatError(f"{self._where}: does not open: {cause}") from error
        self._number, self._last = self._number + 1, last


def seal(data: bytes, public: X25519PublicKey) -> bytes:
    """A small text, sealed."""
    file = io.BytesIO()
    writer = SealedWriter(file, public)
    writer.write(data)
    writer.finish()
    return file.getvalue()


def unseal(data: bytes, private: X25519PrivateKey, where: str) -> bytes:
    """What `seal` sealed. Raises FormatError."""
    return SealedReader(io.BytesIO(data), private, where).read()


# -- keys --------------------------------------------------------------------------------------------------------------


def parse_recipient(pem: bytes, where: str) -> X25519PublicKey:
    """An X25519 public key (PEM). Raises FormatError, also for one with which nothing can be agreed in secret."""
    if b"PRIVATE KEY" in pem:
        raise FormatError(f"{where}: is a private key: give the public one")
    try:
        public = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise FormatError(f"{where}: not a public key in PEM: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(public, X25519PublicKey):
        raise FormatError(f"{where}: must be an X25519 key (steelyard grant key recipient NAME)")
    try:
        X25519PrivateKey.generate().exchange(public)
    except ValueError as error:
        raise FormatError(f"{where}: is of low order: nothing sealed to it would be secret") from error
    return public


def new_recipient(stem: Path, passphrase: bytes) -> X25519PrivateKey:
    """Make an X25519 key: STEM.key.pem (PKCS8, encrypted, mode 0600) and STEM.pub.pem. Raises SteelyardError where one
    of them exists, UsageError for a weak passphrase."""
    check_passphrase(stem.name, passphrase)
    private, public = stem.with_name(f"{stem.name}.key.pem"), stem.with_name(f"{stem.name}.pub.pem")
    for path in (private, public):
        if path.exists() or path.is_symlink():
            raise SteelyardError(f"{path} exists already: choose another name")
    key = X25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(passphrase))
    write_atomic(private, pem, mode=0o600)
    write_atomic(public, key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return key


def load_recipient(path: Path, passphrase: bytes) -> X25519PrivateKey:
    """An encrypted X25519 private key (PEM). Raises SteelyardError for a wrong passphrase, FormatError for another
    type of key."""
    if path.exists() and path.stat().st_mode & 0o077:
        raise SteelyardError(f"{path}: others can read this private key: chmod 600 {path}")
    try:
        private = load_pem_private_key(read_bytes(path), passphrase or None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SteelyardError(f"{path}: the passphrase is wrong, or the file is not an encrypted key") from error
    if not isinstance(private, X25519PrivateKey):
        raise FormatError(f"{path}: must be an X25519 key")
    return private


def _cipher(private: X25519PrivateKey, public: X25519PublicKey, ephemeral: bytes, recipient: bytes) -> AESGCM:
    try:
        shared = private.exchange(public)
    except ValueError as error:
        raise UsageError("the recipient's key is of low order: nothing sealed to it would be secret") from error
    return AESGCM(HKDF(SHA256(), 32, salt=ephemeral + recipient, info=MAGIC).derive(shared))


def _nonce(number: int, last: bool) -> bytes:
    return number.to_bytes(11, "big") + (b"\x01" if last else b"\x00")
