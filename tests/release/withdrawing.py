"""Signers, trust and lists for the tests of withdrawal; no model is needed for them."""

from __future__ import annotations

import base64
import json
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from securesystemslib.signer import CryptoSigner

from steelyard.base.canonical import canonical_json, digest, sha256_file, sha256_hex
from steelyard.ledger.ledger import Ledger
from steelyard.release.layout import MANIFEST, SUMMARY
from steelyard.release.notice import Notice
from steelyard.release.trust import Trust, Withdrawal
from steelyard.release.withdrawal import Entry, SignedList, WithdrawalList, check_withdrawn, list_bytes, read_list

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
WEIGHTS = "ab" * 32
TIME = "2026-11-22T10:11:12Z"
HOSTILE = (
    "</title><script>alert(1)</script>",
    "[click](https://evil.example) ![x](https://evil.example/x.png) <https://evil.example>",
    "a\n# Not withdrawn\n\nAll is well",
    "\x1b[2J\x1b[1;1HVERIFIED\x07",
    "\u202eesrever\u2066 and \u200bhidden",
    "`code` | cell | *bold* ``` fence",
    "\ud800 has no UTF-8",
    '"><img src=x onerror=alert(1)>&amp;',
    "---\nlicense: mit\n---",
)


def hexed(text: str) -> str:
    return digest(text)


def stamp(time: datetime) -> str:
    return time.isoformat(timespec="seconds")


def entry(name: str = "wizard", **changes: Any) -> Entry:
    fields = {
        "manifest": hexed(f"{name} manifest"),
        "weights": hexed(f"{name} weights"),
        "name": name,
        "time": stamp(NOW - timedelta(days=2)),
        "reason": "the toxicity test was missed",
    }
    return Entry(**(fields | changes))


def content(entries: Sequence[Entry] = (), **changes: Any) -> WithdrawalList:
    fields = {
        "format": 1,
        "name": "example",
        "sequence": 1,
        "issued": stamp(NOW - timedelta(days=1)),
        "expires": stamp(NOW + timedelta(days=29)),
        "previous": None,
        "entries": tuple(entries),
    }
    return WithdrawalList(**(fields | changes))


def after(before: WithdrawalList, entries: Sequence[Entry] | None = None, **changes: Any) -> WithdrawalList:
    """The list that follows `before`."""
    follows = {"sequence": before.sequence + 1, "previous": digest(before.model_dump(mode="json"))}
    return content(before.entries if entries is None else entries, **(follows | changes))


@dataclass
class Verifier:
    """Who follows the list: his signers, his state file, his clock."""

    folder: Path
    signers: Sequence[CryptoSigner] = field(default_factory=lambda: [CryptoSigner.generate_ecdsa() for _ in range(3)])
    quorum: int = 2
    trusted: int = 3  # of the signers, the first so many
    now: datetime = NOW
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> Path:
        return self.folder / "state.json"

    @property
    def trust(self) -> Trust:
        keys = tuple(signer.public_key for signer in self.signers[: self.trusted])
        return Trust((), (), (), withdrawal=Withdrawal(keys, self.quorum), **self.changes)

    def signed(self, what: WithdrawalList, *who: int) -> bytes:
        return list_bytes(what, [self.signers[number] for number in who or (0, 1)])

    def put(self, data: bytes | WithdrawalList, name: str = "withdrawn.json") -> Path:
        path = self.folder / name
        path.write_bytes(data if isinstance(data, bytes) else self.signed(data))
        return path

    def read(self, what: WithdrawalList, *who: int) -> SignedList:
        return read_list(self.signed(what, *who), "list")

    def codes(self, source: bytes | WithdrawalList | str | Path, name: str = "good", **more: Any) -> list[str]:
        return [finding.code for finding in self.check(source, name, **more)]

    def check(self, source: bytes | WithdrawalList | str | Path, name: str = "good", **more: Any) -> list[Any]:
        if isinstance(source, bytes | WithdrawalList):
            source = self.put(source)
        arguments = {
            "manifest": hexed(f"{name} manifest"),
            "weights": hexed(f"{name} weights"),
            "state": self.state,
            "now": self.now,
        }
        return check_withdrawn(source, self.trust, **(arguments | more))


def edited(data: bytes, change: Callable[[dict[str, Any]], None], *, inside: bool = True) -> bytes:
    """An envelope whose payload (or, not `inside`, whose own keys) was changed by hand, the signatures left alone."""
    envelope = json.loads(data)
    if not inside:
        change(envelope)
        return canonical_json(envelope)
    payload = json.loads(base64.b64decode(envelope["payload"]))
    change(payload)
    envelope["payload"] = base64.b64encode(canonical_json(payload)).decode()
    return canonical_json(envelope)


@contextmanager
def host(answer: Callable[[BaseHTTPRequestHandler], None], tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """A static host on this machine; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"{'http' if tls is None else 'https'}://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def serve(data: bytes) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    return answer


def redirect(to: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(302)
        request.send_header("Location", to)
        request.send_header("Content-Length", "0")
        request.end_headers()

    return answer


def certified(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """TLS for this machine's address, and the certificate that it is by (signed by itself)."""
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    today = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, today - timedelta(1), today + timedelta(1))
        .add_extension(address, critical=True)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    public, private = folder / "tls.pem", folder / "tls.key"
    public.write_bytes(certificate.public_bytes(Encoding.PEM))
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(public, private)
    return context, public


# -- take-downs -------------------------------------------------------------------------------------------------------


def small_bundle(folder: Path, *, words: bytes = b"weights") -> str:
    """A folder with the files, the manifest and one file that signs of a release; gives the manifest's SHA-256. It is
    no bundle that verifies: a take-down asks for the manifest alone."""
    (folder / "steelyard").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(words)
    (folder / "README.md").write_bytes(b"# a model\n")
    (folder / SUMMARY).write_bytes(b"{}\n")
    files = [
        {"path": path, "size": len(data), "sha256": sha256_hex(data), "kind": kind}
        for path, data, kind in (("README.md", b"# a model\n", "document"), ("model.safetensors", words, "weights"))
    ]
    (folder / MANIFEST).write_bytes(canonical_json({"format": 2, "files": files}) + b"\n")
    return sha256_file(folder / MANIFEST)


def notice_of(manifest: str, **changes: Any) -> Notice:
    given = {"name": "tiny", "manifest": manifest, "weights": WEIGHTS, "time": TIME, "reason": "It answers wrongly."}
    return Notice(**(given | changes))


def note_published(ledger: Ledger, manifest: str, destination: object, *, finished: bool = True) -> None:
    known = {"destination": str(destination), "manifest": manifest, "name": "tiny", "weights": WEIGHTS}
    ledger.append("release.publishing", known | {"started": TIME})
    if finished:
        ledger.append("release.published", known | {"started": TIME, "finished": TIME, "recipient": None})
