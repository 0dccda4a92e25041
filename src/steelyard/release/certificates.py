"""Signing certificates: a chain from the signer's own to a root that the verifier pins, valid when it was signed.

    authority = load_authority(Path("root.pem"), "alice@example.org")
    key, authority = check_chain(chain, [authority], signed, "steelyard/model.sig")

The path is built and checked by `cryptography` (its X.509 verification, written in Rust), at the time of the signature:
what was valid then stays valid, and a signature that says it was made outside the certificate's life is refused. That
time is the caller's: an RFC 3161 time-stamp, or the time that the signed statement gives. Who has an expired
certificate's key can write any time into a statement; only a time-stamp, or a revocation of the key, stops him.

The signer's certificate must name the identity (subject alternative name, mail address or URI), hold a P-256 key, be
for digital signatures and not for issuing others, and, where it lists extended usages, for code signing. Nothing is
read from the operating system: only the verifier's own roots count. Source: RFC 5280, sections 4.2.1 and 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import verification
from cryptography.x509.oid import ExtendedKeyUsageOID
from securesystemslib.signer import Key, SSlibKey  # type: ignore[attr-defined]  # not re-exported

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.base.files import read_bounded
from steelyard.release.attest import SignatureError
from steelyard.release.oms_format import MAX_CERTIFICATES

_PEM_LIMIT = 100_000  # bytes
_PURPOSE = "a certificate for digital signatures (KeyUsage), for code signing where it lists extended usages"


# What cryptography raises for certificates, besides ValueError.
_UNREADABLE = (x509.DuplicateExtension, x509.InvalidVersion, x509.UnsupportedGeneralNameType)


@dataclass(frozen=True)
class Authority:
    """Whom the verifier trusts: who holds a certificate for `identity` that leads to the root `certificate`."""

    certificate: x509.Certificate
    identity: str  # mail address or URI


def load_authorities(path: Path, identity: str) -> tuple[Authority, ...]:
    """The roots in a PEM file, pinned for one identity. Raises FormatError, or UsageError for an identity that is
    neither a mail address nor a URI.
    """
    if not identity.isascii() or not identity.isprintable() or not (":" in identity or "@" in identity):
        raise UsageError(f"identity {identity[:80]!r}: a mail address or a URI is expected, as in the certificate")
    roots = _certificates(path)
    for root in roots:
        try:
            issues = root.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        except (x509.ExtensionNotFound, ValueError):
            issues = False
        if not issues:
            raise FormatError(f"{path}: {_subject(root)} is no certificate of an authority (CA): give its root")
    return tuple(Authority(root, identity) for root in roots)


def check_chain(
    chain: Sequence[bytes], authorities: Sequence[Authority], signed: datetime | None, where: str
) -> tuple[Key, Authority]:
    """The key of the first certificate of `chain` (DER) and the authority that it was proven by, at the time `signed`.

    Raises SignatureError where none of `authorities` issued it, for that identity and that time, and FormatError.
    """
    certificates = [read_certificate(der, where) for der in chain[:MAX_CERTIFICATES]]
    if not certificates:
        raise FormatError(f"{where}: brings no certificate")
    own = certificates[0]
    names = _identities(own, where)
    if not authorities:
        raise SignatureError(
            f"{where}: signed with a certificate of {', '.join(names) or 'nobody'}; name the authority and the identity"
            " that you trust (a trust file: certificate_authority, identity)"
        )
    mine = [authority for authority in authorities if authority.identity in names]
    if not mine:
        raise SignatureError(f"{where}: signed with a certificate of {_listed(names)}, whom you do not trust")
    if signed is None:
        raise SignatureError(f"{where}: when it was signed is not known, so neither is whether its certificate held")
    signed = signed.astimezone(UTC)
    for certificate in certificates:
        first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        if not first <= signed <= last:
            when = "had expired" if signed > last else "was not valid yet"
            raise SignatureError(
                f"{where}: signed at {signed.isoformat(timespec='seconds')}, when the certificate of"
                f" {_subject(certificate)} {when} (valid {first.isoformat()} to {last.isoformat()})"
            )
    _check_purpose(own, where)
    public = own.public_key()
    if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP256R1):
        raise SignatureError(f"{where}: the certificate of {_subject(own)} holds no P-256 key")
    problem = ""
    for authority in mine:
        try:
            _verifier(authority.certificate, signed).verify(own, certificates[1:])
        except verification.VerificationError as error:
            problem = " ".join(str(error).split())[:300]
            continue
        key: Key = SSlibKey.from_crypto(public)
        return key, authority
    pinned = ", ".join(_subject(authority.certificate) for authority in mine)
    raise SignatureError(
        f"{where}: no chain from {_subject(own)} to the pinned {pinned}: {problem}: the signer adds the certificates"
        " between the two (--certificates), or you pin the root that issued his (a trust file: certificate_authority)"
    )


def read_certificate(der: bytes, where: str) -> x509.Certificate:
    """One certificate. Raises FormatError."""
    try:
        certificate = x509.load_der_x509_certificate(der)
        certificate.public_key()
        certificate.extensions  # noqa: B018 (parsed only here)
    except (ValueError, TypeError, UnsupportedAlgorithm, *_UNREADABLE) as error:
        raise FormatError(f"{where}: not an X.509 certificate: {' '.join(str(error).split())[:200]}") from error
    return certificate


def read_chain(path: Path) -> tuple[bytes, ...]:
    """The certificates (DER) in a PEM file, for `check_chain`. Raises FormatError or SteelyardError."""
    return tuple(certificate.public_bytes(Encoding.DER) for certificate in _certificates(path))


def identity_of(certificate: x509.Certificate) -> str | None:
    """The first mail address or URI that a certificate names."""
    return next(iter(_identities(certificate, "certificate")), None)


def split_chain(path: Path, key: Key, scratch: Path) -> tuple[Path, list[Path]]:
    """A PEM chain as the files that the model-signing library wants: the signer's own, the others.

    Raises SteelyardError where the first certificate is not that of `key`, or is not one to sign with.
    """
    certificates = _certificates(path)
    own = certificates[0]
    if len(certificates) == 1:
        raise SteelyardError(f"{path}: holds the signer's certificate alone: append the authority's that issued it")
    public = own.public_key()
    if not isinstance(public, ec.EllipticCurvePublicKey) or SSlibKey.from_crypto(public).keyid != key.keyid:
        raise SteelyardError(f"{path}: its first certificate is of another key than {key.keyid}")
    _check_purpose(own, str(path))
    if identity_of(own) is None:
        raise SteelyardError(f"{path}: its first certificate names no mail address or URI (subject alternative name)")
    files = []
    for number, certificate in enumerate(certificates):
        files.append(scratch / f"certificate-{number}.pem")
        files[-1].write_bytes(certificate.public_bytes(Encoding.PEM))
    return files[0], files[1:]


def _verifier(root: x509.Certificate, at: datetime) -> verification.ClientVerifier:
    """RFC 5280 path validation. What a signer's certificate may hold differs from a web server's: checked above."""
    own = verification.ExtensionPolicy.permit_all().require_present(
        x509.SubjectAlternativeName, verification.Criticality.AGNOSTIC, None
    )
    return (
        verification.PolicyBuilder()
        .store(verification.Store([root]))
        .time(at)
        .max_chain_depth(MAX_CERTIFICATES)
        .extension_policies(ca_policy=verification.ExtensionPolicy.webpki_defaults_ca(), ee_policy=own)
        .build_client_verifier()
    )


def _check_purpose(own: x509.Certificate, where: str) -> None:
    kinds: dict[type[x509.ExtensionType], Any] = {item.value.__class__: item.value for item in own.extensions}
    usage: x509.KeyUsage | None = kinds.get(x509.KeyUsage)
    extended: x509.ExtendedKeyUsage | None = kinds.get(x509.ExtendedKeyUsage)
    basic: x509.BasicConstraints | None = kinds.get(x509.BasicConstraints)
    if usage is None or not usage.digital_signature:
        raise SignatureError(f"{where}: {_subject(own)}: not {_PURPOSE}")
    if extended is not None and ExtendedKeyUsageOID.CODE_SIGNING not in extended:
        raise SignatureError(f"{where}: {_subject(own)}: its extended usages do not include code signing")
    if usage.key_cert_sign or (basic is not None and basic.ca):
        raise SignatureError(f"{where}: {_subject(own)}: is an authority's own certificate, which signs certificates")


def _identities(certificate: x509.Certificate, where: str) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    except ValueError as error:
        raise FormatError(f"{where}: certificate: {' '.join(str(error).split())[:200]}") from error
    return [*names.get_values_for_type(x509.RFC822Name), *names.get_values_for_type(x509.UniformResourceIdentifier)]


def _certificates(path: Path) -> list[x509.Certificate]:
    try:
        certificates = x509.load_pem_x509_certificates(read_bounded(path, _PEM_LIMIT))
    except OSError as error:
        raise SteelyardError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise FormatError(f"{path}: no certificates in PEM: {' '.join(str(error).split())[:200]}") from error
    if not 1 <= len(certificates) <= MAX_CERTIFICATES:
        raise FormatError(f"{path}: {len(certificates)} certificates, where 1 to {MAX_CERTIFICATES} may be")
    return certificates


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name[:80]) for name in names[:5]) or "nobody (it names no mail address or URI)"


def _subject(certificate: x509.Certificate) -> str:
    names = _identities(certificate, "certificate")
    text = names[0] if names else certificate.subject.rfc4514_string()
    return ascii(text)[1:81].rstrip("'")
