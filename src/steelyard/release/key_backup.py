"""Keys in and out: the public key for those who verify, a backup of the private one, and importing either a backup or
a private key that another tool made.

A backup is a folder with the key's own files. The private key in it is encrypted as it always is, with the same
passphrase, and `import_key` (here or on another machine) finds it whole or refuses it. Statements that ended the key
travel with it: a revoked key is not brought back to life by its backup. The spare revocation
does not: it is kept apart.
"""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]  # not re-exported

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.base.files import new_file, new_folder, write_atomic
from steelyard.release.keys import (
    KeyInfo,
    PrivateKey,
    list_keys,
    now_text,
    open_private,
    path_of,
    save_key,
    show_key,
)
from steelyard.release.public_keys import read_bytes, type_of

EVENTS = ("rotation.dsse.json", "revocation.dsse.json")


def export_public_key(folder: Path, name: str, out: Path) -> Path:
    """Write the public key (PEM) to the file `out`. Raises SteelyardError where `out` exists, or there is no key."""
    show_key(folder, name)
    with new_file(out) as file:
        file.write_bytes(read_bytes(path_of(folder, name, "pub.pem")))
    return out


def export_backup(folder: Path, name: str, out: Path, passphrase: bytes) -> Path:
    """Write a backup of the key to the new folder `out`.

    The passphrase opens the key once, and the copy once more: a backup that nobody can open is none. Raises
    SteelyardError for a wrong passphrase, or where `out` exists.
    """
    info = show_key(folder, name)
    _opened(folder, info, passphrase)
    with new_folder(out) as copy:
        copy.chmod(0o700)
        for ending in ("pub.pem", "json", *EVENTS):
            if (path := path_of(folder, name, ending)).exists():
                write_atomic(copy / path.name, read_bytes(path))
        write_atomic(path_of(copy, name, "key.pem"), read_bytes(path_of(folder, name, "key.pem")), mode=0o600)
        _opened(copy, show_key(copy, name), passphrase)
    return out


def import_key(
    folder: Path, source: Path, passphrase: bytes, *, name: str | None = None, throwaway: bool = False
) -> KeyInfo:
    """Take over a key from a backup (a folder), or from a PEM file with an encrypted private key (PKCS8).

    `name`: another name than in the backup; for a PEM file it is needed. A key from a PEM file gets a card of today, of
    the kind that `throwaway` says, and a spare revocation; one from a backup keeps its card and what ended it. Raises
    SteelyardError for a wrong passphrase, or where a key of that name or the same key is there already.
    """
    info = _backed_up(source) if source.is_dir() else None
    if info is not None:
        old = info.name
        signer = _opened(source, info, passphrase)
        info = info.model_copy(update={"name": name or old})
    else:
        old = ""
        if name is None:
            raise UsageError(f"{source}: a key from a PEM file needs a name (--name)")
        if b"BEGIN ENCRYPTED PRIVATE KEY" not in read_bytes(source):
            raise FormatError(f"{source}: not an encrypted private key (PKCS8 in PEM): encrypt it first")
        signer = open_private(source, passphrase)
        info = KeyInfo(
            name=name,
            keyid=signer.public_key.keyid,
            created=now_text(),
            kind="throwaway" if throwaway else "standard",
            type=type_of(signer.public_key),
        )
    for known in list_keys(folder):
        if known.keyid == info.keyid:
            raise SteelyardError(f"{source}: this key is there already, as {known.name!r}")
    for ending in ("key.pem", "pub.pem", "json", *EVENTS):
        if (path := path_of(folder, info.name, ending)).exists():
            raise SteelyardError(f"{path} exists already: choose another name")
    if old:
        # What ended it goes first: at no moment does a revoked key lie there as if it were not.
        for ending in EVENTS:
            if (path := path_of(source, old, ending)).exists():
                write_atomic(path_of(folder, info.name, ending), read_bytes(path))
    save_key(folder, info.name, _private(signer), passphrase, info, spare=not old)
    return show_key(folder, info.name)


def _backed_up(source: Path) -> KeyInfo:
    """The one key of a backup, its card checked. Raises FormatError."""
    found = sorted(path.name[: -len(".key.pem")] for path in source.glob("*.key.pem"))
    if len(found) != 1:
        raise FormatError(f"{source}: {len(found)} private keys, where a backup holds 1 (NAME.key.pem)")
    return show_key(source, found[0])


def _opened(folder: Path, info: KeyInfo, passphrase: bytes) -> CryptoSigner:
    """Open the private key without asking whether it may still sign: a revoked key may be kept."""
    path = path_of(folder, info.name, "key.pem")
    signer = open_private(path, passphrase)
    if signer.public_key.keyid != info.keyid:
        raise SteelyardError(f"{path}: is not the private half of {info.name}.pub.pem")
    return signer


def _private(signer: CryptoSigner) -> PrivateKey:
    private: PrivateKey = load_pem_private_key(signer.private_bytes, None)  # type: ignore[assignment]
    return private
