"""A certificate authority for tests: a root, one between, and certificates for signers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from securesystemslib.signer import CryptoSigner

FIRST = datetime(2026, 1, 1, tzinfo=UTC)
LAST = datetime(2026, 12, 31, tzinfo=UTC)
CODE_SIGNING = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING])
ALICE = "alice@example.org"


def usage(**on: bool) -> x509.KeyUsage:
    names = list(inspect.signature(x509.KeyUsage).parameters)
    return x509.KeyUsage(**{name: on.get(name, False) for name in names})


@dataclass(frozen=True)
class Issuer:
    """A certificate that issues others, and its key."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    def pem(self, path: Path) -> Path:
        path.write_bytes(self.certificate.public_bytes(Encoding.PEM))
        return path

    def issuer(self, name: str) -> Issuer:
        """One between this and the signers."""
        key = ec.generate_private_key(ec.SECP256R1())
        return Issuer(key, _certificate(name, key.public_key(), self, authority=True))

    def certify(self, public: Any, **changes: Any) -> x509.Certificate:
        """A signer's certificate; `changes` as in `_certificate`."""
        return _certificate("alice", public, self, **changes)


def root(name: str = "Example Root") -> Issuer:
    key = ec.generate_private_key(ec.SECP256R1())
    return Issuer(key, _certificate(name, key.public_key(), None, authority=True, signed_with=key))


def signer() -> tuple[CryptoSigner, ec.EllipticCurvePublicKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    return CryptoSigner(key), key.public_key()


def write_chain(path: Path, certificates: Sequence[x509.Certificate]) -> Path:
    path.write_bytes(b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates))
    return path


def _certificate(
    name: str,
    public: Any,
    issuer: Issuer | None,
    *,
    authority: bool = False,
    signed_with: Any = None,
    names: Sequence[x509.GeneralName] = (x509.RFC822Name(ALICE),),
    first: datetime = FIRST,
    last: datetime = LAST,
    key_usage: x509.KeyUsage | None = None,
    extended: x509.ExtendedKeyUsage | None = CODE_SIGNING,
    more: Sequence[tuple[x509.ExtensionType, bool]] = (),
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    key = signed_with or (issuer.key if issuer else None)
    above = subject if issuer is None else issuer.certificate.subject
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(above)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(first - timedelta(days=365) if authority else first)
        .not_valid_after(last + timedelta(days=3650) if authority else last)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
    )
    if authority:
        builder = builder.add_extension(usage(key_cert_sign=True, crl_sign=True), critical=True)
    else:
        builder = builder.add_extension(key_usage or usage(digital_signature=True), critical=True)
        if extended is not None:
            builder = builder.add_extension(extended, critical=False)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(list(names)), critical=False)
    for extension, critical in more:
        builder = builder.add_extension(extension, critical)
    return builder.sign(key, hashes.SHA256())
