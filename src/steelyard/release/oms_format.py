"""The file of an OpenSSF model signature, read with bounds: a Sigstore bundle (v0.3) around a DSSE envelope around an
in-toto statement whose predicate lists every file with its SHA-256.

    parsed = parse_model_signature(data, "steelyard/model.sig")
    parsed.signature.files["model.safetensors"]

What is read here comes from strangers, and nothing in it is proven yet: `steelyard.release.oms` checks it. Only one
spelling of the format is accepted: whole files hashed with SHA-256, no symbolic links, the predicate v1.0. The two
older predicates that the model-signing library still reads are refused, and so is a list that names a file twice.
Sources: github.com/sigstore/model-transparency (the predicate, in model_signing/_signing/signing.py), and
github.com/sigstore/protobuf-specs (sigstore_bundle.proto).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from steelyard.base.errors import FormatError
from steelyard.base.strict import strict_base64, strict_json
from steelyard.release.attest import PAYLOAD_TYPE, Sha256

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
SIGNATURE_LIMIT = 4_000_000  # bytes; 2,000 files make about 0.7 MB
MAX_FILES = 2_000
MAX_CERTIFICATES = 10
_ENVELOPE_KEYS = {"payload", "payloadType", "signatures"}

Method = Literal["key", "certificate", "sigstore"]


@dataclass(frozen=True)
class ModelSignature:
    """What a signature file says. From `read_model_signature`: checked for form only. From `check_model_signature`
    without a finding: true.
    """

    root: str  # hex SHA-256, subject digest of the statement: over the files' digests, in the order of their paths
    files: Mapping[str, str]  # path -> SHA-256, hex
    ignored: tuple[str, ...]  # paths that it does not cover, sorted
    method: Method
    key: str | None  # the key id, or a certificate's identity; of a key None until it is checked
    keyid: str | None = None  # id of the key that signed, also of a certificate's; None until it is checked


@dataclass(frozen=True)
class ParsedSignature:
    """A signature file taken apart, nothing of it verified."""

    signature: ModelSignature
    payload: bytes
    sig: bytes
    hint: str | None  # SHA-256 of the signer's public key in PEM, where the file gives it
    chain: tuple[bytes, ...]  # certificates, DER, the signer's first
    raw: bytes  # the whole file


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


_Path = Annotated[str, StringConstraints(min_length=1, max_length=1000)]


class _Digest(_Strict):
    sha256: Sha256


class _Subject(_Strict):
    name: str = Field(default="", max_length=1000)
    digest: _Digest


class _Resource(_Strict):
    name: _Path
    algorithm: Literal["sha256"]
    digest: Sha256


class _Serialization(_Strict):
    method: Literal["files"]
    hash_type: Literal["sha256"]
    allow_symlinks: Literal[False]
    ignore_paths: tuple[_Path, ...] = Field(default=(), max_length=MAX_FILES)


class _Predicate(_Strict):
    serialization: _Serialization
    resources: tuple[_Resource, ...] = Field(min_length=1, max_length=MAX_FILES)


class _Statement(_Strict):
    type: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    subject: tuple[_Subject, ...] = Field(min_length=1, max_length=1)
    predicateType: Literal["https://model_signing/signature/v1.0"]  # noqa: N815 (the format's spelling)
    predicate: _Predicate


def parse_model_signature(data: bytes, where: str) -> ParsedSignature:
    """Take a signature file apart. Raises FormatError, naming `where` and the field."""
    bundle = strict_json(data, where, limit=SIGNATURE_LIMIT)
    if not isinstance(bundle, dict) or set(bundle) != {"mediaType", "verificationMaterial", "dsseEnvelope"}:
        raise FormatError(f"{where}: not a Sigstore bundle of mediaType, verificationMaterial and dsseEnvelope alone")
    if bundle["mediaType"] != MEDIA_TYPE:
        raise FormatError(f"{where}: mediaType is {str(bundle['mediaType'])[:80]!r}, not {MEDIA_TYPE!r}")
    method, hint, chain = _material(bundle["verificationMaterial"], where)
    payload, sig = _envelope(bundle["dsseEnvelope"], where)
    root, files, ignored = _statement(payload, where)
    identity = None
    if chain:
        from steelyard.release.certificates import identity_of, read_certificate

        identity = identity_of(read_certificate(chain[0], where))
    signature = ModelSignature(root=root, files=files, ignored=ignored, method=method, key=identity)
    return ParsedSignature(signature, payload, sig, hint, chain, data)


def files_root(files: Mapping[str, str]) -> str:
    """The root digest of files (path to SHA-256): SHA-256 over their digests, in the order of their paths.

    The paths themselves are not in it: a renaming that keeps the order keeps the root. Whoever trusts a root must
    also compare the list of files, or the SHA-256 of a manifest that is among them.
    """
    return _root(files[path] for path in sorted(files, key=_order))


def _root(digests: Iterable[str]) -> str:
    return hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in digests)).hexdigest()


def _order(path: str) -> tuple[str, ...]:
    """The library sorts paths by their parts, not as text: `a/b` comes before `a.b`."""
    return PurePosixPath(path).parts


def _material(raw: object, where: str) -> tuple[Method, str | None, tuple[bytes, ...]]:
    """How it was signed: method, hint of the key, certificates."""
    where = f"{where}: verificationMaterial"
    if not isinstance(raw, dict):
        raise FormatError(f"{where}: not an object")
    match sorted(set(raw) - {"tlogEntries", "timestampVerificationData"}):
        case ["certificate"]:
            return "sigstore", None, (_der(raw["certificate"], where),)
        case ["publicKey"]:
            method: Method = "key"
        case ["x509CertificateChain"]:
            method = "certificate"
        case names:
            raise FormatError(f"{where}: holds {', '.join(names)[:100] or 'nothing'}, not one way to sign")
    if raw.get("tlogEntries") or raw.get("timestampVerificationData"):
        raise FormatError(f"{where}: log entries or time-stamps, which only a Sigstore signature has")
    if method == "key":
        key = raw["publicKey"]
        hint = key.get("hint") if isinstance(key, dict) and set(key) <= {"hint"} else 0
        if not (hint is None or isinstance(hint, str)):
            raise FormatError(f"{where}: publicKey: expected a hint alone")
        return method, hint or None, ()
    chain = raw["x509CertificateChain"]
    if not isinstance(chain, dict) or set(chain) != {"certificates"} or not isinstance(chain["certificates"], list):
        raise FormatError(f"{where}: x509CertificateChain: not a list of certificates")
    if not 1 <= len(chain["certificates"]) <= MAX_CERTIFICATES:
        raise FormatError(f"{where}: {len(chain['certificates'])} certificates, where 1 to {MAX_CERTIFICATES} may be")
    return method, None, tuple(_der(certificate, where) for certificate in chain["certificates"])


def _der(raw: object, where: str) -> bytes:
    if not isinstance(raw, dict) or set(raw) != {"rawBytes"}:
        raise FormatError(f"{where}: a certificate holds rawBytes, nothing else")
    return strict_base64(raw["rawBytes"], f"{where}: rawBytes")


def _envelope(raw: object, where: str) -> tuple[bytes, bytes]:
    """Payload and the one signature of the DSSE envelope."""
    if not isinstance(raw, dict) or set(raw) != _ENVELOPE_KEYS:
        raise FormatError(f"{where}: dsseEnvelope: not payload, payloadType and signatures alone")
    if raw["payloadType"] != PAYLOAD_TYPE:
        raise FormatError(f"{where}: payloadType is {str(raw['payloadType'])[:80]!r}, not {PAYLOAD_TYPE!r}")
    signatures = raw["signatures"]
    if not isinstance(signatures, list) or len(signatures) != 1:
        raise FormatError(f"{where}: dsseEnvelope: exactly 1 signature is expected")
    # keyid is null, empty or absent, as the version of the writer had it.
    if not isinstance(signatures[0], dict) or set(signatures[0]) - {"keyid"} != {"sig"} or signatures[0].get("keyid"):
        raise FormatError(f"{where}: dsseEnvelope: a signature holds sig and an empty keyid, nothing else")
    sig = strict_base64(signatures[0]["sig"], f"{where}: sig")
    return strict_base64(raw["payload"], f"{where}: payload"), sig


def _statement(payload: bytes, where: str) -> tuple[str, dict[str, str], tuple[str, ...]]:
    """Root, files and ignored paths of the statement."""
    raw = strict_json(payload, f"{where}: statement", limit=SIGNATURE_LIMIT)
    try:
        statement = _Statement.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "statement"
        raise FormatError(f"{where}: {place}: {first['msg']}, is {_short(raw, first['loc'])}") from error
    names = [resource.name for resource in statement.predicate.resources]
    for name in (*names, *statement.predicate.serialization.ignore_paths):
        path = PurePosixPath(name)
        if str(path) != name or path.is_absolute() or ".." in path.parts or name == "." or not name.isprintable():
            raise FormatError(f"{where}: names {name[:80]!r}, which is no plain path inside the model")
    if names != sorted(set(names), key=_order):
        raise FormatError(f"{where}: resources must be sorted by path, each once")
    root = statement.subject[0].digest.sha256
    if root != _root(resource.digest for resource in statement.predicate.resources):
        raise FormatError(f"{where}: the digest of its subject is not that of its list of files")
    files = {resource.name: resource.digest for resource in statement.predicate.resources}
    return root, files, tuple(sorted(set(statement.predicate.serialization.ignore_paths)))


def _short(raw: Any, place: tuple[int | str, ...]) -> str:
    for part in place:
        try:
            raw = raw[part]
        except (KeyError, IndexError, TypeError):
            return "absent"
    return repr(raw)[:60]
