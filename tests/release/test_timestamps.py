"""Time-stamps (RFC 3161): asked of an authority on 127.0.0.1, checked offline, refused for every reason there is."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID
from tsa import Authority, rejection, serving

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.release.timestamps import (
    TIMESTAMP_LIMIT,
    TimestampError,
    ask,
    check_timestamp,
    load_roots,
    read_timestamp,
    stamped_time,
)

MESSAGE = b"a commitment"
NOW = datetime.now(UTC).replace(microsecond=0)


@pytest.fixture(scope="module")
def tsa() -> Authority:
    return Authority.new()


def test_a_stamp_is_asked_for_checked_and_checks_again_offline(tsa: Authority, tmp_path: Path) -> None:
    roots = load_roots(tsa.save(tmp_path / "root.pem"))
    with serving(tsa.answer) as url:
        stamp = ask(url, MESSAGE, roots)
    stamped = check_timestamp(stamp, MESSAGE, roots, "here")
    assert abs(stamped - datetime.now(UTC)) < timedelta(minutes=5)
    assert stamped.utcoffset() == timedelta(0)
    assert stamped_time(stamp, MESSAGE, "here") == stamped


def test_a_certificate_must_have_been_valid_when_it_stamped_not_when_one_looks() -> None:
    year = timedelta(days=365)
    tsa = Authority.new(since=NOW - 3 * year, until=NOW - year)
    stamp = tsa.stamp(MESSAGE, time=NOW - 2 * year)
    assert check_timestamp(stamp, MESSAGE, [tsa.root], "here") == NOW - 2 * year
    for when, reason in ((NOW, "certificate has expired"), (NOW - 4 * year, "certificate is not yet valid")):
        with pytest.raises(TimestampError, match=f"here: does not check .*: {reason}"):
            check_timestamp(tsa.stamp(MESSAGE, time=when), MESSAGE, [tsa.root], "here")


@pytest.mark.parametrize(
    ("usage", "critical", "reason"),
    [
        (None, True, "unsuitable certificate purpose"),
        (ExtendedKeyUsageOID.TIME_STAMPING, False, "unsuitable certificate purpose|not critical"),
        (ExtendedKeyUsageOID.CODE_SIGNING, True, "unsuitable certificate purpose"),
    ],
)
def test_a_certificate_that_is_not_for_time_stamping_is_refused(usage: object, critical: bool, reason: str) -> None:
    tsa = Authority.new(usage=usage, critical=critical)  # type: ignore[arg-type]
    with pytest.raises(TimestampError, match=reason):
        check_timestamp(tsa.stamp(MESSAGE), MESSAGE, [tsa.root], "here")


def test_a_stamp_over_something_else_or_by_another_is_refused(tsa: Authority) -> None:
    with pytest.raises(TimestampError, match="over something else"):
        check_timestamp(tsa.stamp(b"another"), MESSAGE, [tsa.root], "here")
    with pytest.raises(TimestampError, match="does not check against the authorities"):
        check_timestamp(tsa.stamp(MESSAGE), MESSAGE, [Authority.new().root], "here")
    with pytest.raises(TimestampError, match="does not check against the authorities"):
        check_timestamp(tsa.stamp(MESSAGE, signature=b"\x30\x00"), MESSAGE, [tsa.root], "here")
    with pytest.raises(TimestampError, match="no time-stamping authority is pinned"):
        check_timestamp(tsa.stamp(MESSAGE), MESSAGE, [], "here")
    with pytest.raises(TimestampError, match="no SHA-256, SHA-384 or SHA-512"):
        check_timestamp(tsa.stamp(MESSAGE, algorithm="1.3.14.3.2.26"), MESSAGE, [tsa.root], "here")
    with pytest.raises(TimestampError, match="its nonce is not that of the request"):
        check_timestamp(tsa.stamp(MESSAGE, nonce=5), MESSAGE, [tsa.root], "here", nonce=6)
    with pytest.raises(TimestampError, match="its nonce is not that of the request"):
        check_timestamp(tsa.stamp(MESSAGE), MESSAGE, [tsa.root], "here", nonce=6)


def test_what_is_no_time_stamp_is_told_so(tsa: Authority, tmp_path: Path) -> None:
    stamp = tsa.stamp(MESSAGE)
    for data in (b"", b"\x30\x03\x02\x01\x00", stamp[:-1], b"{}", b"\x30" * 100):
        with pytest.raises(FormatError, match="here: not an RFC 3161 time-stamp"):
            read_timestamp(data, "here")
    with pytest.raises(FormatError, match="more than the 100,000"):
        read_timestamp(stamp + bytes(TIMESTAMP_LIMIT), "here")
    with pytest.raises(TimestampError, match=r"granted no stamp \(status 2\) 'not today'"):
        check_timestamp(rejection("not today"), MESSAGE, [tsa.root], "here")
    for text, error in (("no certificate", FormatError), (None, UsageError)):
        path = tmp_path / f"{error.__name__}.pem"
        if text is not None:
            path.write_text(text)
        with pytest.raises(error, match=r"certificate"):
            load_roots(path)


# -- HTTP --------------------------------------------------------------------------------------------------------------


def test_an_answer_to_another_request_is_refused(tsa: Authority) -> None:
    def replayed(_: bytes) -> bytes:
        return tsa.stamp(MESSAGE, nonce=12345)

    with serving(replayed) as url, pytest.raises(TimestampError, match="nonce"):
        ask(url, MESSAGE, [tsa.root])


@pytest.mark.parametrize(
    ("answer", "settings", "reason"),
    [
        (rejection(), {}, "granted no stamp"),
        (b"<html>", {}, "not an RFC 3161 time-stamp"),
        (b"", {"status": 500}, "answered 500"),
        (b"", {"status": 302, "location": "http://127.0.0.1:1/"}, "answered 302"),
        (bytes(TIMESTAMP_LIMIT + 1), {}, "over 100,000 bytes"),
    ],
)
def test_an_authority_that_answers_anything_else_is_refused(
    tsa: Authority, answer: bytes, settings: dict[str, object], reason: str
) -> None:
    with (
        serving(lambda _: answer, **settings) as url,  # type: ignore[arg-type]
        pytest.raises(SteelyardError, match=reason) as caught,
    ):
        ask(url, MESSAGE, [tsa.root])
    assert str(caught.value).startswith(url)


@contextmanager
def _dripping(first: bytes) -> Iterator[str]:
    """A server that takes a request, sends `first`, and then a byte now and then, for ever."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        over = threading.Event()

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(first)
                while not over.wait(0.05):
                    if first:
                        try:
                            connection.sendall(b"x")
                        except OSError:
                            return

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}/"
        finally:
            over.set()
            thread.join()


@pytest.mark.parametrize("first", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 90000\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: "])
def test_an_authority_that_takes_for_ever_is_given_up(tsa: Authority, first: bytes) -> None:
    start = time.monotonic()
    with _dripping(first) as url, pytest.raises(SteelyardError, match=r"did not answer within 0.2 s"):
        ask(url, MESSAGE, [tsa.root], timeout=0.2)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "tsa.example", "http://", "http://a b/", "ftp://x/", "http://[1"]
)
def test_only_web_addresses_are_asked(tsa: Authority, url: str) -> None:
    with pytest.raises(UsageError, match="timestamp-url"):
        ask(url, MESSAGE, [tsa.root])


def test_an_authority_that_is_not_there_is_told_without_the_password(tsa: Authority) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(SteelyardError, match="cannot be asked") as caught:
        ask(f"http://me:secret@127.0.0.1:{port}/stamp", MESSAGE, [tsa.root])
    assert "secret" not in str(caught.value)
    with pytest.raises(UsageError, match="root certificate"):
        ask("http://127.0.0.1:1/", MESSAGE, [])


# -- another implementation --------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl command here to compare with")
def test_openssl_accepts_our_authority_s_stamps_and_we_accept_openssl_s(tsa: Authority, tmp_path: Path) -> None:
    def openssl(*arguments: object) -> str:
        done = subprocess.run(
            ["openssl", *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    (tmp_path / "message").write_bytes(MESSAGE)
    (tmp_path / "ours.tsr").write_bytes(tsa.stamp(MESSAGE))
    tsa.save(tmp_path / "root.pem")
    said = openssl("ts", "-verify", "-data", "message", "-in", "ours.tsr", "-CAfile", "root.pem")
    assert "OK" in said
    tsa.save_key(tmp_path)
    (tmp_path / "serial").write_text("01")
    (tmp_path / "ts.cnf").write_text(
        "[tsa]\ndefault_tsa = it\n[it]\nserial = serial\ndefault_policy = 1.2.3.4\ndigests = sha256\n"
        "signer_digest = sha256\ness_cert_id_alg = sha256\nclock_precision_digits = 3\naccuracy = secs:1\n"
    )
    openssl("ts", "-query", "-data", "message", "-sha256", "-cert", "-out", "query.tsq")
    openssl(
        *("ts", "-reply", "-config", "ts.cnf", "-queryfile", "query.tsq", "-signer", "stamps.pem"),
        *("-inkey", "stamps.key", "-out", "theirs.tsr"),
    )
    stamped = check_timestamp((tmp_path / "theirs.tsr").read_bytes(), MESSAGE, [tsa.root], "theirs.tsr")
    assert abs(stamped - datetime.now(UTC)) < timedelta(minutes=5)
