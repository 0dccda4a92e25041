"""A Sigstore of our own, for tests without a network: Fulcio's root, a certificate log and Rekor, all as keys.

    stand_in = StandIn()
    stand_in.sign(payload)           # the bundle that Sigstore's client would have written
    stand_in.trusted_root            # what a verifier pins, as Sigstore's trusted_root.json

What it makes is whole: an embedded certificate time-stamp (RFC 6962), a log entry with inclusion proof, checkpoint and
signed time, so that the sigstore package verifies it as it does the real ones.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from authority import ALICE, CODE_SIGNING, Issuer, root, usage
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from securesystemslib.dsse import Envelope

from steelyard.base.canonical import canonical_json
from steelyard.release.attest import PAYLOAD_TYPE
from steelyard.release.oms_format import MEDIA_TYPE

ISSUER = "https://accounts.example.org"
WHEN = datetime(2026, 6, 1, tzinfo=UTC)
_ISSUER_OID = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.1")
_SCT_OID = x509.ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")


class StandIn:
    """One Sigstore."""

    def __init__(self) -> None:
        self.fulcio: Issuer = root("Stand-in Fulcio")
        self.ct = ec.generate_private_key(ec.SECP256R1())
        self.rekor = ec.generate_private_key(ec.SECP256R1())

    @property
    def trusted_root(self) -> dict[str, Any]:
        def log(key: ec.EllipticCurvePrivateKey) -> dict[str, Any]:
            return {
                "baseUrl": "https://log.example.org",
                "hashAlgorithm": "SHA2_256",
                "publicKey": {
                    "rawBytes": _b64(_spki(key.public_key())),
                    "keyDetails": "PKIX_ECDSA_P256_SHA_256",
                    "validFor": {"start": "2020-01-01T00:00:00Z"},
                },
                "logId": {"keyId": _b64(_key_id(key.public_key()))},
            }

        chain = {"certificates": [{"rawBytes": _b64(self.fulcio.certificate.public_bytes(Encoding.DER))}]}
        return {
            "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
            "tlogs": [log(self.rekor)],
            "certificateAuthorities": [
                {
                    "subject": {"organization": "example", "commonName": "Stand-in Fulcio"},
                    "uri": "https://fulcio.example.org",
                    "certChain": chain,
                    "validFor": {"start": "2020-01-01T00:00:00Z"},
                }
            ],
            "ctlogs": [log(self.ct)],
            "timestampAuthorities": [],
        }

    def sign(
        self, payload: bytes, *, identity: str = ALICE, issuer: str = ISSUER, logged: datetime = WHEN
    ) -> dict[str, Any]:
        """A bundle over `payload`, with a certificate of ten minutes, logged at `logged`."""
        key = ec.generate_private_key(ec.SECP256R1())
        own = self._certificate(key.public_key(), identity, issuer)
        pae = Envelope(payload, PAYLOAD_TYPE, {}).pae()
        sig = key.sign(pae, ec.ECDSA(hashes.SHA256()))
        envelope = {"payload": _b64(payload), "payloadType": PAYLOAD_TYPE, "signatures": [{"sig": _b64(sig)}]}
        return {
            "mediaType": MEDIA_TYPE,
            "verificationMaterial": {
                "certificate": {"rawBytes": _b64(own.public_bytes(Encoding.DER))},
                "tlogEntries": [self._entry(payload, sig, own, logged)],
            },
            "dsseEnvelope": envelope,
        }

    def _certificate(self, public: ec.EllipticCurvePublicKey, identity: str, issuer: str) -> x509.Certificate:
        def build(change: Callable[[x509.CertificateBuilder], x509.CertificateBuilder]) -> x509.Certificate:
            builder = (
                x509.CertificateBuilder()
                .subject_name(x509.Name([]))
                .issuer_name(self.fulcio.certificate.subject)
                .public_key(public)
                .serial_number(serial)
                .not_valid_before(WHEN - timedelta(minutes=5))
                .not_valid_after(WHEN + timedelta(minutes=5))
                .add_extension(usage(digital_signature=True), critical=True)
                .add_extension(CODE_SIGNING, critical=False)
                .add_extension(above, critical=False)
                .add_extension(x509.SubjectAlternativeName([x509.RFC822Name(identity)]), critical=True)
                .add_extension(x509.UnrecognizedExtension(_ISSUER_OID, issuer.encode()), critical=False)
            )
            return change(builder).sign(self.fulcio.key, hashes.SHA256())

        serial = x509.random_serial_number()
        fulcio = self.fulcio.key.public_key()
        above = x509.AuthorityKeyIdentifier.from_issuer_public_key(fulcio)
        tbs = build(lambda builder: builder).tbs_certificate_bytes
        milliseconds = int(WHEN.timestamp() * 1000)
        # RFC 6962, section 3.2: version, signature type, time, entry type (precertificate), issuer, certificate.
        said = struct.pack("!BBQH", 0, 0, milliseconds, 1) + _key_id(fulcio) + len(tbs).to_bytes(3, "big") + tbs
        sig = self.ct.sign(said + b"\0\0", ec.ECDSA(hashes.SHA256()))
        stamp = struct.pack("!B32sQHBBH", 0, _key_id(self.ct.public_key()), milliseconds, 0, 4, 3, len(sig)) + sig
        stamps = struct.pack("!HH", len(stamp) + 2, len(stamp)) + stamp
        octets = x509.UnrecognizedExtension(_SCT_OID, b"\x04" + _der_length(len(stamps)) + stamps)
        return build(lambda builder: builder.add_extension(octets, critical=False))

    def _entry(self, payload: bytes, sig: bytes, own: x509.Certificate, logged: datetime) -> dict[str, Any]:
        sha = hashlib.sha256(payload).hexdigest()
        signature = {"signature": _b64(sig), "verifier": _b64(own.public_bytes(Encoding.PEM))}
        spec = {
            "envelopeHash": {"algorithm": "sha256", "value": "0" * 64},
            "payloadHash": {"algorithm": "sha256", "value": sha},
            "signatures": [signature],
        }
        body = json.dumps({"apiVersion": "0.0.1", "kind": "dsse", "spec": spec}).encode()
        log, leaf = _key_id(self.rekor.public_key()), hashlib.sha256(b"\0" + body).digest()  # a log of one entry
        note = f"log.example.org - 1\n1\n{_b64(leaf)}\n"
        checkpoint = f"{note}\n\u2014 log.example.org {_b64(log[:4] + self._rekor(note.encode()))}\n"
        time = int(logged.timestamp())
        promised = {"body": _b64(body), "integratedTime": time, "logID": log.hex(), "logIndex": 0}
        return {
            "logIndex": "0",
            "logId": {"keyId": _b64(log)},
            "kindVersion": {"kind": "dsse", "version": "0.0.1"},
            "integratedTime": str(time),
            "inclusionPromise": {"signedEntryTimestamp": _b64(self._rekor(canonical_json(promised)))},
            "inclusionProof": {
                "logIndex": "0",
                "rootHash": _b64(leaf),
                "treeSize": "1",
                "hashes": [],
                "checkpoint": {"envelope": checkpoint},
            },
            "canonicalizedBody": _b64(body),
        }

    def _rekor(self, data: bytes) -> bytes:
        return self.rekor.sign(data, ec.ECDSA(hashes.SHA256()))


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _spki(public: ec.EllipticCurvePublicKey) -> bytes:
    return public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _key_id(public: ec.EllipticCurvePublicKey) -> bytes:
    return hashlib.sha256(_spki(public)).digest()


def _der_length(length: int) -> bytes:
    return bytes([length]) if length < 128 else b"\x81" + bytes([length])  # of what is never over 255 bytes here
