"""OpenSSF model signatures: sign every file of a folder with the `model-signing` library, and check such signatures.

    signature = sign_model(folder, folder / "steelyard/model.sig", signer, ignored=["steelyard/model.sig"])
    signature, findings = check_model_signature(folder, folder / "steelyard/model.sig", [public_key], allowed=[...])

The hashing is stated in the signature and fixed: SHA-256 over whole files, no symbolic links, a list of ignored paths
that the caller gives (the library's own default, to leave out git's files, is off). The `model_signing verify` command
reads what is written here, and signatures that the command made are read here.

Checking does not call the library: it takes the ignored paths from the signature itself, follows older formats, and
would hash a large model a second time. Here the caller says which paths may be ignored, and every file must be signed
under its name; hashes that the caller has are used. (A Sigstore signature is checked by sigstore, see `keyless`.)
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import UnverifiedSignatureError, VerificationError
from securesystemslib.signer import CryptoSigner, Key, Signature  # type: ignore[attr-defined]  # not re-exported

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.base.files import open_regular, read_bounded, write_atomic
from steelyard.base.progress import Progress, Silent
from steelyard.release.attest import PAYLOAD_TYPE, SignatureError
from steelyard.release.oms_format import (
    MAX_FILES,
    SIGNATURE_LIMIT,
    ModelSignature,
    ParsedSignature,
    files_root,
    parse_model_signature,
)
from steelyard.safety.journal import Finding

if TYPE_CHECKING:
    from steelyard.release.certificates import Authority
    from steelyard.release.keyless import SigstoreIdentity


# -- the files of a folder -------------------------------------------------------------------------------------------


def model_root(
    folder: Path, ignored: Sequence[str], progress: Progress | None = None, *, hashes: Mapping[str, str] | None = None
) -> str:
    """The root digest (hex SHA-256) that a model signature of `folder` has as its subject; no key is needed.

    `hashes`: SHA-256 already known, by path; other files are read. Raises FormatError for a link or special file.
    """
    return files_root(_signable(folder, ignored, hashes or {}, progress or Silent()))


def _signable(folder: Path, ignored: Sequence[str], hashes: Mapping[str, str], progress: Progress) -> dict[str, str]:
    present, findings = _plain_files(folder)
    if findings:
        raise FormatError(f"{folder}: {findings[0].message}")
    for name in set(ignored) & present.keys():
        del present[name]
    if not present:
        raise FormatError(f"{folder}: holds no file to sign")
    return _hashed(folder, present, hashes, progress)


def _plain_files(folder: Path) -> tuple[dict[str, int], list[Finding]]:
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


def _hashed(folder: Path, sizes: Mapping[str, int], hashes: Mapping[str, str], progress: Progress) -> dict[str, str]:
    """SHA-256 of every file of `sizes`; those in `hashes` are not read."""
    found = {name: hashes[name] for name in sizes if name in hashes}
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


# -- signing ---------------------------------------------------------------------------------------------------------


def sign_model(
    folder: Path,
    signature: Path,
    signer: CryptoSigner,
    ignored: Sequence[str],
    expected_root: str | None = None,
    *,
    hashes: Mapping[str, str] | None = None,
    name: str | None = None,
    certificates: Path | None = None,
    progress: Progress | None = None,
) -> ModelSignature:
    """Sign every file of `folder` but the `ignored` paths, and write the signature to the file `signature`.

    `expected_root`: refuse to sign anything else. `hashes`: as in `model_root`. `name`: the model's, in the signature
    (the folder's). `certificates`: PEM, the signer's own first, then those between it and the root; the signature then
    carries them, and whoever trusts the root can check it. Raises UsageError for a key that is not P-256, which the
    format does not allow, SteelyardError for another root or a certificate of another key, FormatError as `model_root`.
    """
    public = _p256(signer.public_key)
    if public is None:
        raise UsageError(
            f"key {signer.public_key.keyid} is {signer.public_key.keytype}: a model signature (OpenSSF) needs a P-256"
            " key: make one with steelyard key new --type p256; an Ed25519 key signs statements only"
        )

    def configure(config: Any, scratch: Path) -> None:
        with _readable_once(signer.private_bytes) as private:
            if certificates is None:
                config.use_elliptic_key_signer(private_key=private)
                return
            from steelyard.release.certificates import split_chain

            own, others = split_chain(certificates, signer.public_key, scratch)
            config.use_certificate_signer(private_key=private, signing_certificate=own, certificate_chain=others)

    parsed = write_signature(
        folder, signature, configure, ignored, expected_root, hashes=hashes, name=name, progress=progress
    )
    if not _signed_by(parsed, signer.public_key):
        raise SteelyardError(f"{signature}: the signature just made does not verify: nothing was written")
    write_atomic(signature, parsed.raw)
    return replace(parsed.signature, key=parsed.signature.key or signer.public_key.keyid, keyid=signer.public_key.keyid)


def write_signature(
    folder: Path,
    signature: Path,
    configure: Callable[[Any, Path], None],
    ignored: Sequence[str],
    expected_root: str | None,
    *,
    hashes: Mapping[str, str] | None,
    name: str | None,
    progress: Progress | None,
) -> ParsedSignature:
    """Make a signature with the library; `configure(config, scratch folder)` says how to sign. Writes nothing."""
    for path in ignored:
        if path != Path(path).as_posix() or Path(path).is_absolute() or ".." in Path(path).parts or path == ".":
            raise UsageError(f"{path!r}: a path that a signature ignores is that of a file inside {folder}")
    if signature.is_relative_to(folder) and signature.relative_to(folder).as_posix() not in ignored:
        raise UsageError(f"{signature}: lies in {folder}: put it on the list of ignored paths")
    files = _signable(folder, ignored, hashes or {}, progress or Silent())
    if expected_root is not None and files_root(files) != expected_root:
        raise SteelyardError(f"{folder}: was changed: its root is {files_root(files)}, not {expected_root}")
    from model_signing import signing

    config = signing.Config()  # type: ignore[no-untyped-call]
    config.set_hashing_config(_known(files, ignored, name or folder.name or "model"))
    with tempfile.TemporaryDirectory(prefix="steelyard-") as scratch:
        configure(config, Path(scratch))
        written = Path(scratch) / "model.sig"
        config.sign(folder, written)
        data = read_bounded(written, SIGNATURE_LIMIT)
    parsed = parse_model_signature(data, str(signature))
    if parsed.signature.files != files or set(parsed.signature.ignored) != set(ignored):
        raise SteelyardError(f"{signature}: the library signed other files than it was given: nothing was written")
    return parsed


def _known(files: Mapping[str, str], ignored: Sequence[str], name: str) -> Any:
    """The library's hashing configuration, with the hashes that are known: it reads no file."""
    from model_signing import hashing, manifest
    from model_signing._hashing.hashing import Digest  # its manifest's public type has no public name

    serialization = manifest.SerializationType.from_args(
        {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": sorted(ignored)}
    )
    items = [serialization.new_item(path, Digest("sha256", bytes.fromhex(sha))) for path, sha in files.items()]

    class Known(hashing.Config):
        def hash(self, model_path: Any, *, files_to_hash: Any = None) -> Any:
            return manifest.Manifest(name, items, serialization)

    return Known()  # type: ignore[no-untyped-call]


class _readable_once:  # noqa: N801 (a context manager)
    """A path from which `secret` can be read once: the library takes a private key as a file, and this is a pipe, so
    that the key in clear never reaches a disk."""

    def __init__(self, secret: bytes) -> None:
        self.secret = secret

    def __enter__(self) -> str:
        self.end, write = os.pipe()
        os.write(write, self.secret)  # a key is far smaller than a pipe's buffer
        os.close(write)
        return f"/dev/fd/{self.end}"

    def __exit__(self, *_: object) -> None:
        os.close(self.end)


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
    present, findings = _plain_files(folder)
    for name in unsigned & present.keys():
        del present[name]
    found = _hashed(folder, present, hashes, progress)
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
        if not _signed_by(parsed, key):
            raise SignatureError(f"{where}: the signature does not fit the certificate of {authority.identity}")
        return replace(parsed.signature, key=authority.identity, keyid=key.keyid)
    for key in keys:
        if _signed_by(parsed, key):
            if parsed.hint is not None and parsed.hint != _hint(key):
                raise SignatureError(f"{where}: signed by key {key.keyid}, but its hint names another")
            return replace(parsed.signature, key=key.keyid, keyid=key.keyid)
    if not keys:
        raise SignatureError(f"{where}: signed by a key; give a public key of your own to check it")
    known = next((key for key in keys if parsed.hint is not None and parsed.hint == _hint(key)), None)
    if known is not None:
        text = f"the signature of key {known.keyid} does not fit the statement: one of them was changed"
        raise SignatureError(f"{where}: {text}")
    raise SignatureError(f"{where}: signed by a key (hint {str(parsed.hint)[:80]}) that is none of yours")


def _signed_by(parsed: ParsedSignature, key: Key) -> bool:
    if _p256(key) is None:
        return False
    with suppress(UnverifiedSignatureError, VerificationError):
        pae = Envelope(parsed.payload, PAYLOAD_TYPE, {}).pae()
        key.verify_signature(Signature(key.keyid, parsed.sig.hex()), pae)
        return True
    return False


def _p256(key: Key) -> ec.EllipticCurvePublicKey | None:
    if key.scheme != "ecdsa-sha2-nistp256":
        return None
    public = load_pem_public_key(key.keyval["public"].encode())
    return public if isinstance(public, ec.EllipticCurvePublicKey) else None


def _hint(key: Key) -> str | None:
    """What the library gives as a key's hint: SHA-256 of its PEM."""
    public = _p256(key)
    if public is None:
        return None
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


__all__ = [
    "ModelSignature",
    "certified_key",
    "check_model_signature",
    "files_root",
    "model_root",
    "read_model_signature",
    "sign_model",
]
