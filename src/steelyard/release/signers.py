"""Who signed an envelope: the holder of a key that the verifier pins for that role, or whoever one of the certificate
authorities that he pins calls by the name that he expects, at the time of the signature.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from steelyard.base.errors import FormatError
from steelyard.base.files import read_bounded
from steelyard.release.attest import SignatureError, envelope_certificates, verify_envelope
from steelyard.release.certificates import check_chain
from steelyard.release.oms_format import MAX_CERTIFICATES
from steelyard.release.trust import Role, Trust

PEM_LIMIT = 100_000  # bytes


@dataclass(frozen=True)
class Signing:
    """How to sign, besides the key: with its `certificates` (a PEM file, the signer's own first), and the model
    signature by Sigstore instead of the key (`sigstore`; needs the network)."""

    certificates: Path | None = None
    sigstore: bool = False

    @property
    def pem(self) -> str | None:
        """The certificates, as an envelope carries them. Raises FormatError."""
        if self.certificates is None:
            return None
        try:
            return read_bounded(self.certificates, PEM_LIMIT).decode("ascii")
        except OSError as error:
            raise FormatError(f"{self.certificates}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise FormatError(f"{self.certificates}: is not PEM") from error


def trusted_signer(data: bytes, where: str, role: Role, trust: Trust, signed: datetime | None) -> str:
    """Who signed: a key id, or the identity in a certificate. Raises SignatureError or FormatError where it is nobody
    whom `trust` has in that role. `signed`: when, as the statement says.
    """
    chain = _chain(envelope_certificates(data, where), where)
    # A pinned key counts with or without a certificate; a certificate is asked only where its holder is not pinned.
    if not chain or not trust.authorities.get(role):
        return str(verify_envelope(data, where, trust.keys(role))[1].keyid)
    try:
        return str(verify_envelope(data, where, trust.keys(role))[1].keyid)
    except SignatureError:
        return _certified(data, chain, where, role, trust, signed)


def _certified(
    data: bytes, chain: tuple[bytes, ...], where: str, role: Role, trust: Trust, signed: datetime | None
) -> str:
    key, authority = check_chain(chain, trust.authorities.get(role, ()), signed, where)
    verify_envelope(data, where, [key])
    return authority.identity


def _chain(pem: str | None, where: str) -> tuple[bytes, ...]:
    if pem is None:
        return ()
    if len(pem) > PEM_LIMIT:
        raise FormatError(f"{where}: certificate: over {PEM_LIMIT:,} bytes")
    try:
        certificates = x509.load_pem_x509_certificates(pem.encode("ascii"))
    except ValueError as error:
        raise FormatError(f"{where}: certificate: not PEM: {' '.join(str(error).split())[:200]}") from error
    if len(certificates) > MAX_CERTIFICATES:
        raise FormatError(f"{where}: certificate: over {MAX_CERTIFICATES} of them")
    return tuple(certificate.public_bytes(Encoding.DER) for certificate in certificates)
