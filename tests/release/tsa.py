"""A time-stamping authority on 127.0.0.1 that does what it is told, wrong things too (RFC 3161, RFC 5652, RFC 5816).

tsa = Authority.new()
stamp = tsa.stamp(message)                          # DER, as an honest one would answer
stamp = tsa.stamp(message, time=..., imprint=...)   # or not
with serving(tsa) as url: ...
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

TIME_STAMPING = ExtendedKeyUsageOID.TIME_STAMPING
SHA256, ECDSA_SHA256 = "2.16.840.1.101.3.4.2.1", "1.2.840.10045.4.3.2"
SIGNED_DATA, TST_INFO = "1.2.840.113549.1.7.2", "1.2.840.113549.1.9.16.1.4"
CONTENT_TYPE, MESSAGE_DIGEST, SIGNING_CERTIFICATE = (
    "1.2.840.113549.1.9.3",
    "1.2.840.113549.1.9.4",
    "1.2.840.113549.1.9.16.2.47",
)


# -- DER ---------------------------------------------------------------------------------------------------------------


def der(tag: int, *parts: bytes) -> bytes:
    content = b"".join(parts)
    if len(content) < 128:
        return bytes([tag, len(content)]) + content
    size = len(content).to_bytes((len(content).bit_length() + 7) // 8)
    return bytes([tag, 0x80 | len(size)]) + size + content


def sequence(*parts: bytes) -> bytes:
    return der(0x30, *parts)


def set_of(*parts: bytes) -> bytes:
    return der(0x31, *sorted(parts))


def integer(value: int) -> bytes:
    return der(0x02, value.to_bytes(value.bit_length() // 8 + 1))


def octets(value: bytes) -> bytes:
    return der(0x04, value)


def oid(dotted: str) -> bytes:
    first, second, *rest = map(int, dotted.split("."))
    encoded = bytearray([40 * first + second])
    for number in rest:
        groups = [number & 0x7F]
        while number := number >> 7:
            groups.append(0x80 | number & 0x7F)
        encoded += bytes(reversed(groups))
    return der(0x06, bytes(encoded))


def children(data: bytes) -> list[tuple[int, bytes]]:
    """Tag and content of each element in a row."""
    found = []
    while data:
        tag, size, start = data[0], data[1], 2
        if size & 0x80:
            start = 2 + (size & 0x7F)
            size = int.from_bytes(data[2:start])
        found.append((tag, data[start : start + size]))
        data = data[start + size :]
    return found


# -- the authority -----------------------------------------------------------------------------------------------------


def certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None,
    since: datetime,
    until: datetime,
    usage: x509.ObjectIdentifier | None = None,
    critical: bool = True,
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[0].subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(since)
        .not_valid_after(until)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    )
    if usage is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=critical)
    return builder.sign(issuer[1] if issuer else key, hashes.SHA256())


@dataclass(frozen=True)
class Authority:
    """Its root, and the certificate and key that it stamps with."""

    root: x509.Certificate
    signer: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def new(
        cls,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        usage: x509.ObjectIdentifier | None = TIME_STAMPING,
        critical: bool = True,
    ) -> Authority:
        """`since`, `until`: when its own certificate is valid; the root's is, ten years to either side of now."""
        now, years = datetime.now(UTC), timedelta(days=3650)
        root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
        root = certificate("root", root_key, None, now - years, now + years)
        signer = certificate(
            "stamps", key, (root, root_key), since or now - years, until or now + years, usage, critical
        )
        return cls(root, signer, key)

    def save(self, path: Path) -> Path:
        """The root, as a verifier pins it."""
        path.write_bytes(self.root.public_bytes(Encoding.PEM))
        return path

    def save_key(self, folder: Path) -> tuple[Path, Path]:
        """Certificate and key, for another program to stamp with."""
        pem, key = folder / "stamps.pem", folder / "stamps.key"
        pem.write_bytes(self.signer.public_bytes(Encoding.PEM))
        key.write_bytes(self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return pem, key

    def stamp(
        self,
        message: bytes = b"",
        *,
        time: datetime | None = None,
        imprint: bytes | None = None,
        nonce: int | None = None,
        algorithm: str = SHA256,
        signature: bytes | None = None,
    ) -> bytes:
        """A granted response over `message`, or over another `imprint`."""
        stamped = (time or datetime.now(UTC)).strftime("%Y%m%d%H%M%SZ").encode()
        info = sequence(
            integer(1),
            oid("1.3.6.1.4.1.99999.1"),
            sequence(sequence(oid(algorithm)), octets(imprint or sha256(message).digest())),
            integer(4711),
            der(0x18, stamped),
            *([] if nonce is None else [integer(nonce)]),
        )
        whole = self.signer.public_bytes(Encoding.DER)
        attributes = set_of(
            sequence(oid(CONTENT_TYPE), set_of(oid(TST_INFO))),
            sequence(oid(MESSAGE_DIGEST), set_of(octets(sha256(info).digest()))),
            sequence(oid(SIGNING_CERTIFICATE), set_of(sequence(sequence(sequence(octets(sha256(whole).digest())))))),
        )
        signed = sequence(
            integer(3),
            set_of(sequence(oid(SHA256))),
            sequence(oid(TST_INFO), der(0xA0, octets(info))),
            der(0xA0, whole),
            set_of(
                sequence(
                    integer(1),
                    sequence(self.signer.issuer.public_bytes(), integer(self.signer.serial_number)),
                    sequence(oid(SHA256)),
                    b"\xa0" + attributes[1:],
                    sequence(oid(ECDSA_SHA256)),
                    octets(signature or self.key.sign(attributes, ec.ECDSA(hashes.SHA256()))),
                )
            ),
        )
        return sequence(sequence(integer(0)), sequence(oid(SIGNED_DATA), der(0xA0, signed)))

    def answer(self, request: bytes) -> bytes:
        """What an honest authority answers to a request (DER)."""
        fields = children(children(request)[0][1])
        imprint = children(fields[1][1])[1][1]
        nonces = [content for tag, content in fields[2:] if tag == 0x02]
        return self.stamp(imprint=imprint, nonce=int.from_bytes(nonces[0]) if nonces else None)


def rejection(text: str = "no") -> bytes:
    """A response that grants nothing."""
    return sequence(sequence(integer(2), sequence(der(0x0C, text.encode()))))


@contextmanager
def serving(answer: Callable[[bytes], bytes], *, status: int = 200, location: str = "") -> Iterator[str]:
    """An HTTP server whose answers are `answer(request)`; gives its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.headers["Content-Type"] == "application/timestamp-query"
            body = answer(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(status)
            if location:
                self.send_header("Location", location)
            self.send_header("Content-Type", "application/timestamp-reply")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/stamp"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
