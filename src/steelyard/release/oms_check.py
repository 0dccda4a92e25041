"""Checking OpenSSF model signatures against a folder; see `oms`, which signs them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import UnverifiedSignatureError, VerificationError
from securesystemslib.signer import Key, Signature  # type: ignore[attr-defined]  # not re-exported

from steelyard.base.errors import FormatError, SteelyardError
from steelyard.base.files import open_regular, read_bounded
from steelyard.base.progress import Progress, Silent
from steelyard.release.attest import FOREIGN, OWN, PAYLOAD_TYPE, SignatureError
from steelyard.release.oms_format import (
    MAX_FILES,
    SIGNATURE_LIMIT,
    ModelSignature,
    ParsedSignature,
    parse_model_signature,
)
from steelyard.safety.journal import Finding

if TYPE_CHECKING:
    from steelyard.release.certificates import Authority
    from steelyard.release.keyless import SigstoreIdentity

_UNHASHED = 16_000_000  # bytes of a file that the manifest's check left unhashed


# -- checking --------------------------------------------------------------------------------------------------------


def read_model_signature(path: Path) -> ModelSignature:
    """What the signature file says: its form is checked, nothing else. Raises FormatError."""
    return _read(path, str(path)).signature


def check_model_signature(
    folder: Path,
    signature: Path,
    keys: Sequence[Key],
    allowed: Sequence[str],
    hashes: Mapping[str, str] | None = None,
    *,
    authorities: Sequence[Authority] = (),
    identities: Sequence[SigstoreIdentity] = (),
    signed: datetime | None = None,
    progress: Progress | None = None,
) -> tuple[ModelSignature | None, list[Finding]]:
    """Check the signature file against `folder`. It is good only if there is no finding.

    It must be signed by one of `keys`; or with a certificate that one of `authorities` issued to the identity that it
    names, valid at the time `signed`; or by Sigstore for one of `identities`. Only paths of `allowed` may be ignored.
    `hashes` as in `model_root`.
    """
    inside = signature.is_relative_to(folder)
    where = signature.relative_to(folder).as_posix() if inside else signature.name
    try:
        parsed = _read(signature, where)
    except FormatError as error:
        return None, [Finding("signature", str(error))]
    try:
        proven = _authentic(parsed, where, keys, authorities, identities, signed)
    except SteelyardError as error:
        return parsed.signature, [Finding("signature", str(error))]
    findings = []
    for name in proven.ignored:
        if name not in allowed:
            findings.append(Finding("ignored", f"{where}: ignores {name}, a file that must be signed"))
        if any(path == name or path.startswith(f"{name}/") for path in proven.files):
            findings.append(Finding("ignored", f"{where}: both signs and ignores {name}"))
    # The file cannot sign itself, whether it says so (as ours do) or not (as the library's before 1.1).
    unsigned = {*proven.ignored, *({where} & set(allowed) if inside else ())}
    return proven, findings + _check_files(folder, proven, unsigned, where, hashes or {}, progress or Silent())


def certified_key(
    signature: Path, authorities: Sequence[Authority], signed: datetime | None, where: str = ""
) -> tuple[Key, Authority] | None:
    """The key that the certificates in a signature file prove at the time `signed`, and by which authority; None where
    it brings none. So a statement that the same key signed can be checked: a DSSE envelope carries no certificates.

    Raises SignatureError where nobody of `authorities` vouches for it, FormatError for a file that is no signature.
    """
    parsed = _read(signature, where or str(signature))
    if parsed.signature.method != "certificate":
        return None
    from steelyard.release.certificates import check_chain

    return check_chain(parsed.chain, authorities, signed, where or str(signature))


def _check_files(
    folder: Path,
    proven: ModelSignature,
    unsigned: Set[str],
    where: str,
    hashes: Mapping[str, str],
    progress: Progress,
) -> list[Finding]:
    """The folder's files against the signed ones."""
    present, findings = plain_files(folder)
    for name in unsigned & present.keys():
        del present[name]
    # What the manifest's check did not hash is small (what signs), or has another size than the manifest says.
    found = hashed(folder, present, hashes, progress, limit=_UNHASHED if hashes else None)
    missing = {name: sha for name, sha in proven.files.items() if name not in found}
    for name, sha in sorted(found.items()):
        if name in proven.files:
            if sha != proven.files[name]:
                findings.append(Finding("changed", f"{name}: was changed: its SHA-256 is not the one in {where}"))
            continue
        origin = next((old for old, digest in missing.items() if digest == sha and present[name]), None)
        if origin is not None:
            del missing[origin]
            findings.append(Finding("renamed", f"{name}: is {origin} under another name, says {where}"))
        else:
            findings.append(Finding("added", f"{name}: is not signed by {where}: remove it"))
    findings += [Finding("missing", f"{name}: is missing, but signed by {where}") for name in sorted(missing)]
    return findings


def _read(path: Path, where: str) -> ParsedSignature:
    try:
        data = read_bounded(path, SIGNATURE_LIMIT)
    except OSError as error:
        raise FormatError(f"{where}: {error.strerror}") from error
    except FormatError as error:
        raise FormatError(str(error).replace(str(path), where)) from error
    return parse_model_signature(data, where)


def _authentic(
    parsed: ParsedSignature,
    where: str,
    keys: Sequence[Key],
    authorities: Sequence[Authority],
    identities: Sequence[SigstoreIdentity],
    signed: datetime | None,
) -> ModelSignature:
    """What was signed, by whom. Raises SignatureError or FormatError."""
    if parsed.signature.method == "sigstore":
        from steelyard.release.keyless import check_sigstore

        identity, keyid = check_sigstore(parsed, identities, where)
        return replace(parsed.signature, key=identity, keyid=keyid)
    if parsed.signature.method == "certificate":
        from steelyard.release.certificates import check_chain

        key, authority = check_chain(parsed.chain, authorities, signed, where)
        if not signed_by(parsed, key):
            raise SignatureError(f"{where}: the signature does not fit the certificate of {authority.identity}")
        return replace(parsed.signature, key=authority.identity, keyid=key.keyid)
    for key in keys:
        if signed_by(parsed, key):
            if parsed.hint is not None and parsed.hint != _hint(key):
                raise SignatureError(f"{where}: signed by key {key.keyid}, but its hint names another")
            return replace(parsed.signature, key=key.keyid, keyid=key.keyid)
    if not keys:
        raise SignatureError(f"{where}: signed by a key; give a public key of your own to check it {OWN}")
    known = next((key for key in keys if parsed.hint is not None and parsed.hint == _hint(key)), None)
    if known is not None:
        text = f"the signature of key {known.keyid} does not fit the statement: one of them was changed"
        raise SignatureError(f"{where}: {text}")
    raise SignatureError(f"{where}: signed by a key (hint {str(parsed.hint)[:80]}) that is none of yours: {FOREIGN}")


# -- the files of a folder -------------------------------------------------------------------------------------------


def plain_files(folder: Path) -> tuple[dict[str, int], list[Finding]]:
    """Plain files under `folder` (path to size); a finding for whatever else lies there. No link is followed."""
    present: dict[str, int] = {}
    findings: list[Finding] = []
    seen, places = 0, [""]
    while places:
        prefix = places.pop()
        with os.scandir(folder / prefix) as entries:
            for entry in entries:
                seen += 1
                if seen > MAX_FILES:
                    return present, [*findings, Finding("added", f"holds over {MAX_FILES:,} files and folders")]
                name = prefix + entry.name
                if entry.is_symlink():
                    findings.append(Finding("unsafe", f"{_name(name)}: is a symbolic link: a model holds plain files"))
                elif entry.is_dir(follow_symlinks=False):
                    places.append(f"{name}/")
                elif not entry.is_file(follow_symlinks=False) or not name.isprintable():
                    findings.append(Finding("unsafe", f"{_name(name)}: is no plain file with a plain name"))
                else:
                    present[name] = entry.stat(follow_symlinks=False).st_size
    return present, findings


def hashed(
    folder: Path, sizes: Mapping[str, int], hashes: Mapping[str, str], progress: Progress, limit: int | None = None
) -> dict[str, str]:
    """SHA-256 of every file of `sizes`; those in `hashes` are not read, and none of over `limit` bytes is: it has the
    empty text in the place of a digest."""
    found = {name: hashes[name] for name in sizes if name in hashes}
    found |= {name: "" for name, size in sizes.items() if limit is not None and size > limit and name not in found}
    total = sum(size for name, size in sizes.items() if name not in found) / 1e6
    with (progress if total >= 1 else Silent()).task("hash the files", total, "MB") as task:
        for name, size in sizes.items():
            if name not in found:
                with open_regular(folder / name) as file:
                    found[name] = hashlib.file_digest(file, "sha256").hexdigest()
                task.advance(size / 1e6)
    return found


def _name(name: str) -> str:
    """A file's name, fit for one line whatever a stranger called it."""
    return name if name.isprintable() and len(name) <= 200 else ascii(name)[:200]


# -- the signature ---------------------------------------------------------------------------------------------------


def signed_by(parsed: ParsedSignature, key: Key) -> bool:
    if p256(key) is None:
        return False
    with suppress(UnverifiedSignatureError, VerificationError):
        pae = Envelope(parsed.payload, PAYLOAD_TYPE, {}).pae()
        key.verify_signature(Signature(key.keyid, parsed.sig.hex()), pae)
        return True
    return False


def p256(key: Key) -> ec.EllipticCurvePublicKey | None:
    if key.scheme != "ecdsa-sha2-nistp256":
        return None
    public = load_pem_public_key(key.keyval["public"].encode())
    return public if isinstance(public, ec.EllipticCurvePublicKey) else None


def _hint(key: Key) -> str | None:
    """What the library gives as a key's hint: SHA-256 of its PEM."""
    public = p256(key)
    if public is None:
        return None
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()
