"""Where a list of withdrawn releases comes from: a file, or one bounded GET of an https URL. It needs no extra.

Its content is signed, so the host is not trusted; what is bounded here is what a host could do to who asks: size, time,
the number of redirects, and where they lead (never to a file, never from https to http).
"""

from __future__ import annotations

import http.client
import ipaddress
import ssl
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from steelyard import __version__
from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.base.files import read_bounded

SILENCE = 10.0  # seconds without a byte
TOTAL = 30.0  # seconds for all of it
REDIRECTS = 3


def read_source(source: Path | str, limit: int, *, insecure: bool = False, total: float = TOTAL) -> tuple[bytes, str]:
    """The bytes of a file or URL, and its name for messages. Plain http only from this machine, or with `insecure`.

    Raises UsageError for an address of another kind; FormatError for over `limit` bytes; SteelyardError where it cannot
    be had in `total` seconds.
    """
    text = str(source)
    if isinstance(source, str) and "://" in text:
        _check_address(text, insecure, UsageError)
        return _fetch(text, limit, insecure, total), text
    path = Path(source)
    try:
        return read_bounded(path, limit), text
    except FormatError:
        raise
    except OSError as error:
        remedy = "before the first release issue the first, empty list: steelyard withdraw --refresh --name NAME"
        said = f"{text}: {error.strerror}: the list of withdrawn releases cannot be read"
        raise SteelyardError(f"{said} ({remedy})" if isinstance(error, FileNotFoundError) else said) from error


def _check_address(url: str, insecure: bool, kind: type[SteelyardError]) -> None:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise kind(f"{url[:200]!r}: not an address: {error}") from error
    shown = f"{parts.scheme}://{host}"  # whatever else stands in it may be a secret
    if parts.scheme not in ("https", "http") or not host:
        raise kind(f"{shown[:200]!r}: a list is a file, or comes from an https address")
    if parts.username is not None or parts.password is not None:
        raise kind(f"{shown}: a name or password in an address is not sent: a list is public")
    if any(not character.isprintable() or character == " " for character in url):
        raise kind(f"{shown}: a character in the address is not printable")
    if parts.scheme == "http" and not insecure and not _loopback(host):
        raise kind(f"{shown}: plain http is refused, except from this machine: use https")


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Few, and to nothing weaker: https stays https, this machine is only reached from itself."""

    max_redirections = REDIRECTS
    max_repeats = 1

    def __init__(self, insecure: bool) -> None:
        self.insecure = insecure

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        _check_address(newurl, self.insecure, FormatError)
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if (old.scheme, new.scheme) == ("https", "http"):
            raise FormatError(f"{old.hostname}: redirects from https to http")
        if _loopback(new.hostname or "") and not _loopback(old.hostname or ""):
            raise FormatError(f"{old.hostname}: redirects to this machine itself")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener(url: str, insecure: bool) -> urllib.request.OpenerDirector:
    # Built by hand: build_opener would add file, ftp and data, which a redirect could reach.
    opener = urllib.request.OpenerDirector()
    proxies: dict[str, str] | None = {} if _loopback(urlsplit(url).hostname or "") else None
    for handler in (
        urllib.request.ProxyHandler(proxies),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(context=ssl.create_default_context()),
        urllib.request.HTTPDefaultErrorHandler(),
        _Redirects(insecure),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    opener.addheaders = [("User-Agent", f"steelyard/{__version__}"), ("Accept-Encoding", "identity")]
    return opener


def _fetch(url: str, limit: int, insecure: bool, total: float) -> bytes:
    found: list[bytes | Exception] = []

    def get() -> None:
        try:
            request = urllib.request.Request(url, headers={"Cache-Control": "no-cache"})
            with _opener(url, insecure).open(request, timeout=min(SILENCE, total)) as response:
                found.append(response.read(limit + 1))
        except Exception as error:  # handed to the caller, who raises it
            found.append(error)

    # A host that sends a byte every few seconds never trips a socket's time-out: the whole has its own.
    thread = threading.Thread(target=get, daemon=True)
    thread.start()
    thread.join(total)
    shown = f"{urlsplit(url).scheme}://{urlsplit(url).netloc}{urlsplit(url).path}"
    if not found:
        raise SteelyardError(f"{shown}: no whole answer within {total:g} s: the list of withdrawn releases is needed")
    result = found[0]
    if isinstance(result, SteelyardError):
        raise result
    if isinstance(result, urllib.error.HTTPError):
        raise SteelyardError(f"{shown}: answers {result.code}: is that where the list lies?") from result
    if isinstance(result, OSError | http.client.HTTPException | ValueError):
        cause = getattr(result, "reason", None) or result
        raise SteelyardError(f"{shown}: cannot be fetched: {' '.join(str(cause).split())[:200]}") from result
    if isinstance(result, Exception):
        raise result
    if len(result) > limit:
        raise FormatError(f"{shown}: is over {limit:,} bytes, more than such a file may have")
    return result
