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

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]  # not re-exported

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.base.files import read_bounded, write_atomic
from steelyard.base.progress import Progress, Silent
from steelyard.release.oms_check import (
    certified_key,
    check_model_signature,
    hashed,
    p256,
    plain_files,
    read_model_signature,
    signed_by,
)
from steelyard.release.oms_format import (
    SIGNATURE_LIMIT,
    ModelSignature,
    ParsedSignature,
    files_root,
    parse_model_signature,
)

# -- the files of a folder -------------------------------------------------------------------------------------------


def model_root(
    folder: Path, ignored: Sequence[str], progress: Progress | None = None, *, hashes: Mapping[str, str] | None = None
) -> str:
    """The root digest (hex SHA-256) that a model signature of `folder` has as its subject; no key is needed.

    `hashes`: SHA-256 already known, by path; other files are read. Raises FormatError for a link or special file.
    """
    return files_root(_signable(folder, ignored, hashes or {}, progress or Silent()))


def _signable(folder: Path, ignored: Sequence[str], hashes: Mapping[str, str], progress: Progress) -> dict[str, str]:
    present, findings = plain_files(folder)
    if findings:
        raise FormatError(f"{folder}: {findings[0].message}")
    for name in set(ignored) & present.keys():
        del present[name]
    if not present:
        raise FormatError(f"{folder}: holds no file to sign")
    return hashed(folder, present, hashes, progress)


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
    public = p256(signer.public_key)
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
    if not signed_by(parsed, signer.public_key):
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


@contextmanager
def _readable_once(secret: bytes) -> Iterator[str]:
    """A path from which `secret` can be read once: the library takes a private key as a file, and this is a pipe, so
    that the key in clear never reaches a disk."""
    end, write = os.pipe()
    try:
        os.write(write, secret)  # a key is far smaller than a pipe's buffer
        os.close(write)
        yield f"/dev/fd/{end}"
    finally:
        os.close(end)


__all__ = [
    "ModelSignature",
    "certified_key",
    "check_model_signature",
    "files_root",
    "model_root",
    "read_model_signature",
    "sign_model",
]
