"""RFC 3161 time-stamps: ask an authority for one over HTTP, and check one against roots that the caller pins.

    stamp = ask(url, data, roots)                                     # the response's bytes (DER), already checked
    time = check_timestamp(stamp, data, roots, "commitment.tsr")      # offline, whenever

A stamp counts where the authority granted it, its imprint is the SHA-256, SHA-384 or SHA-512 of exactly these bytes,
its signer's certificate is for time-stamping alone and leads to a pinned root, and the whole chain was valid at the
stamped time. Whether a certificate was revoked is not asked: that needs the network. Sources: RFC 3161 (2.4, 3.4),
RFC 5816; the rfc3161-client library checks signature and chain.
"""

from __future__ import annotations

import hashlib
import http.client
import re
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, Request, build_opener

from cryptography import x509
from rfc3161_client import (
    HashAlgorithm,
    TimestampRequestBuilder,
    TimeStampResponse,
    VerificationError,
    VerifierBuilder,
    decode_timestamp_response,
)

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.base.files import read_bounded

TIMESTAMP_LIMIT = 100_000  # bytes of a response; with its whole chain of certificates one has some 6,000
ROOTS_LIMIT = 1_000_000
TIMEOUT = 20.0  # seconds, for each step of the exchange, and twice that for the whole of it


class TimestampError(SteelyardError):
    """A time-stamp that is well formed, but does not prove what it should to whoever pins these roots."""


def load_roots(path: Path) -> tuple[x509.Certificate, ...]:
    """The certificates (PEM) of the authorities that the caller trusts. Raises UsageError, FormatError."""
    try:
        return tuple(x509.load_pem_x509_certificates(read_bounded(path, ROOTS_LIMIT)))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}: give a time-stamping authority's certificate (PEM)") from error
    except ValueError as error:
        raise FormatError(f"{path}: not a certificate in PEM: {' '.join(str(error).split())[:200]}") from error


def ask(url: str, data: bytes, roots: Sequence[x509.Certificate], *, timeout: float = TIMEOUT) -> bytes:
    """A time-stamp over `data` from the authority at `url`, checked (the nonce too) before it is handed on.

    Raises UsageError for an address that is none or no roots, SteelyardError where the authority cannot be reached,
    takes too long or refuses, and FormatError or TimestampError where its answer is not a stamp over `data`.
    """
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        known = False
    if not known or any(character <= " " for character in url):
        raise UsageError(f"--timestamp-url {url[:200]!r}: give an http:// or https:// address")
    if not roots:
        raise UsageError("a stamp is worth what its authority is: give its root certificate (--timestamp-authority)")
    request = TimestampRequestBuilder().data(data).hash_algorithm(HashAlgorithm.SHA256).build()
    where = _shown(url)
    answer = _post(url, where, request.as_bytes(), timeout)
    check_timestamp(answer, data, roots, where, nonce=request.nonce)
    return answer


def read_timestamp(data: bytes, where: str) -> TimeStampResponse:
    """A time-stamp response (DER) as an authority sent it, *unverified*. Raises FormatError naming `where`."""
    if len(data) > TIMESTAMP_LIMIT:
        raise FormatError(f"{where}: {len(data):,} bytes, more than the {TIMESTAMP_LIMIT:,} a time-stamp may have")
    try:
        response = decode_timestamp_response(data)
        if response.status == 0:
            _ = response.tst_info.gen_time, response.tst_info.message_imprint.message, response.signed_data.signer_infos
    except BaseException as error:
        raise _unreadable(error, where) from error
    return response


def stamped_time(data: bytes, message: bytes, where: str, *, nonce: int | None = None) -> datetime:
    """The time (UTC) that a stamp over `message` gives, whoever made it: its signature is *unverified*. Raises
    FormatError or TimestampError."""
    return _granted(data, message, where, nonce)[1]


def check_timestamp(
    data: bytes, message: bytes, roots: Sequence[x509.Certificate], where: str, *, nonce: int | None = None
) -> datetime:
    """The time (UTC) at which one of `roots` says, through its authority, that `message` existed.

    `nonce`: of the request, where the caller made it. Raises FormatError or TimestampError naming `where`.
    """
    response, stamped = _granted(data, message, where, nonce)
    if not roots:
        raise TimestampError(f"{where}: no time-stamping authority is pinned: give its root certificate")
    try:
        VerifierBuilder(roots=list(roots), nonce=nonce).build().verify_message(response, message)
    except VerificationError as error:
        raise TimestampError(
            f"{where}: does not check against the authorities that are pinned: {_why(error)}"
        ) from error
    except BaseException as error:
        raise _unreadable(error, where) from error
    return stamped


def _granted(data: bytes, message: bytes, where: str, nonce: int | None) -> tuple[TimeStampResponse, datetime]:
    """A stamp that was granted over this message, and its time."""
    response = read_timestamp(data, where)
    if response.status != 0:
        said = "; ".join(response.status_string)[:200]
        raise TimestampError(f"{where}: the authority granted no stamp (status {response.status}) {said!r}")
    info = response.tst_info
    if nonce is not None and info.nonce != nonce:
        raise TimestampError(f"{where}: its nonce is not that of the request: it answers another one")
    hashed = _HASHES.get(info.message_imprint.hash_algorithm.dotted_string)
    if hashed is None:
        raise TimestampError(f"{where}: its imprint is no SHA-256, SHA-384 or SHA-512")
    if info.message_imprint.message != hashlib.new(hashed, message).digest():
        raise TimestampError(f"{where}: is a stamp over something else: its imprint is not that of these bytes")
    time = info.gen_time
    return response, time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)


_HASHES = {
    "2.16.840.1.101.3.4.2.1": "sha256",
    "2.16.840.1.101.3.4.2.2": "sha384",
    "2.16.840.1.101.3.4.2.3": "sha512",
}


def _why(error: VerificationError) -> str:
    """The library's reason; of a list of OpenSSL's errors the one that names it."""
    text = " ".join(str(error).split())
    named = re.findall(r'data: "Verify error: ?([^"]+)"', text) or re.findall(r'reason: "([^"]+)"', text)
    return str(named[-1] if named else text)[:200]


def _unreadable(error: BaseException, where: str) -> BaseException:
    """What to raise where the library gave up on a file. A panic of its Rust half is no Exception of Python."""
    if isinstance(error, Exception) or type(error).__module__ == "pyo3_runtime":
        return FormatError(f"{where}: not an RFC 3161 time-stamp: {' '.join(str(error).split())[:200]}")
    return error


# -- HTTP --------------------------------------------------------------------------------------------------------------


class _NoRedirect(HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> Request | None:
        return None


def _post(url: str, where: str, body: bytes, timeout: float) -> bytes:
    """The answer's body. No proxy's login, no redirect, no more than the limit, no longer than twice the time-out."""
    headers = {"Content-Type": "application/timestamp-query", "Accept": "application/timestamp-reply"}
    found: list[bytes | Exception] = []

    def ask() -> None:
        try:
            opener: OpenerDirector = build_opener(_NoRedirect)
            with opener.open(Request(url, data=body, headers=headers, method="POST"), timeout=timeout) as answer:
                found.append(answer.read(TIMESTAMP_LIMIT + 1))
        except Exception as error:  # handed to the caller, who raises it
            found.append(error)

    # An authority that sends a byte every few seconds never trips a socket's time-out: the whole has its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2 * timeout)
    result = found[0] if found else TimeoutError()
    if isinstance(result, bytes):
        if len(result) > TIMESTAMP_LIMIT:
            raise FormatError(f"{where}: answered over {TIMESTAMP_LIMIT:,} bytes: no time-stamp is so long")
        return result
    if isinstance(result, HTTPError):
        with result:
            text = f"the authority answered {result.code} {str(result.reason)[:80]!r}"
        raise SteelyardError(f"{where}: {text}: is this the address of a time-stamping authority?") from result
    if not isinstance(result, URLError | http.client.HTTPException | OSError):
        raise result
    reason = getattr(result, "reason", None) or result
    if isinstance(reason, TimeoutError):
        text = f"the authority did not answer within {timeout:g} s"
    else:
        text = f"the authority cannot be asked: {' '.join(str(reason).split())[:200] or type(reason).__name__}"
    raise SteelyardError(f"{where}: {text}: try again later, or another authority") from result


def _shown(url: str) -> str:
    """The address without a user's name and password, which do not belong in a message."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{host}{port}{parts.path}"[:200]
