"""The list of withdrawn releases, as whoever verifies meets it: what it refuses, and every way to lie about it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner
from withdrawing import (
    NOW,
    Verifier,
    after,
    certified,
    content,
    edited,
    entry,
    hexed,
    host,
    redirect,
    serve,
    stamp,
)

from steelyard.base.canonical import canonical_json
from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.release import attest, withdrawal_source
from steelyard.release.keys import KeyEvent
from steelyard.release.withdrawal import MAX_ENTRIES, list_bytes, read_list
from steelyard.release.withdrawal_seen import default_state
from steelyard.release.withdrawal_source import read_source


@pytest.fixture
def verifier(tmp_path: Path) -> Verifier:
    return Verifier(tmp_path)


# -- what it is for --------------------------------------------------------------------------------------------------


def test_a_release_that_is_not_listed_passes(verifier: Verifier) -> None:
    assert verifier.check(content()) == []
    assert verifier.check(after(content(), [entry()])) == []


def test_a_withdrawn_release_is_refused_by_its_manifest_with_the_reason(verifier: Verifier) -> None:
    listed = content([entry(replaced_by=hexed("better"))])
    found = verifier.check(listed, "wizard", weights=hexed("other weights"))
    assert [finding.code for finding in found] == ["withdrawn"]
    for text in ("wizard", "the toxicity test was missed", stamp(NOW - timedelta(days=2)), hexed("better")):
        assert text in found[0].message


def test_the_same_weights_under_another_name_are_withdrawn_too(verifier: Verifier) -> None:
    found = verifier.check(content([entry()]), "renamed", weights=hexed("wizard weights"))
    assert [finding.code for finding in found] == ["withdrawn"]
    assert "the same weights, released as 'wizard'" in found[0].message


def test_a_later_list_of_the_same_signers_is_followed_also_over_a_gap(verifier: Verifier) -> None:
    first = content([entry()])
    third = after(after(first), [entry(), entry("second")])
    assert verifier.check(first) == []
    assert verifier.check(third) == []
    assert verifier.codes(third, "second") == ["withdrawn"]
    assert json.loads(verifier.state.read_bytes())["lists"][0]["sequence"] == 3


def test_any_quorum_of_the_signers_will_do_and_a_stranger_beside_them_does_no_harm(verifier: Verifier) -> None:
    assert verifier.check(verifier.signed(content(), 2, 0)) == []
    foreign = CryptoSigner.generate_ecdsa()
    assert verifier.check(list_bytes(content(), [*verifier.signers[:2], foreign])) == []


def test_the_same_list_with_more_signatures_is_the_same_list(verifier: Verifier) -> None:
    assert verifier.check(verifier.signed(content(), 0, 1)) == []
    assert verifier.check(verifier.signed(content(), 0, 1, 2)) == []


def test_ed25519_signers_and_others_sign_one_list(tmp_path: Path) -> None:
    verifier = Verifier(tmp_path, [CryptoSigner.generate_ed25519(), CryptoSigner.generate_ecdsa()], trusted=2)
    assert verifier.check(content()) == []


def test_the_state_lies_in_the_users_data_folder_by_default(
    verifier: Verifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert default_state() == tmp_path / "data" / "steelyard" / "withdrawals.json"
    assert verifier.check(content(), state=None) == []
    assert default_state().is_file()
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_state() == tmp_path / ".local" / "share" / "steelyard" / "withdrawals.json"


# -- attacks on what was seen before ---------------------------------------------------------------------------------

FIRST = content([entry()])
SECOND = after(FIRST, [entry(), entry("second")])


@pytest.mark.parametrize(
    ("seen", "shown", "code"),
    [
        (SECOND, FIRST, "list-rollback"),
        (FIRST, content([entry(), entry("second")]), "list-fork"),
        (FIRST, content([]), "list-fork"),
        (FIRST, after(content([entry()], expires=stamp(NOW + timedelta(days=9)))), "list-fork"),
        (FIRST, after(FIRST, []), "list-stripped"),
        (SECOND, after(after(SECOND), [entry()]), "list-stripped"),
        (FIRST, after(FIRST, [entry(reason="no harm meant")]), "list-stripped"),
        (SECOND, after(SECOND, [entry("second"), entry()]), "list-stripped"),
        (FIRST, after(FIRST, [entry("second"), entry()]), "list-stripped"),
        (FIRST, content([], name="staging"), "list-name"),
        (FIRST, after(after(FIRST), name="staging"), "list-name"),
    ],
    ids=[
        "rollback",
        "fork",
        "fork without the entry",
        "fork seen by what follows it",
        "stripped",
        "stripped over a gap",
        "another reason",
        "reordered",
        "a new entry in front",
        "another list's signatures",
        "another list's later number",
    ],
)
def test_a_list_that_contradicts_what_was_seen_is_refused(verifier: Verifier, seen: Any, shown: Any, code: str) -> None:
    assert verifier.check(seen) == []
    remembered = verifier.state.read_bytes()
    assert verifier.codes(shown) == [code]
    assert verifier.state.read_bytes() == remembered
    assert verifier.check(seen) == []


def test_a_withdrawal_is_told_even_where_the_list_is_refused(verifier: Verifier) -> None:
    assert verifier.check(SECOND) == []
    assert verifier.codes(FIRST, "wizard") == ["withdrawn", "list-rollback"]


def test_a_rollback_is_seen_with_other_signers_of_the_same_quorum_too(verifier: Verifier) -> None:
    assert verifier.check(verifier.signed(SECOND, 0, 1)) == []
    assert verifier.codes(verifier.signed(FIRST, 1, 2)) == ["list-rollback"]


def test_a_trust_file_that_gains_or_loses_a_signer_does_not_forget(verifier: Verifier) -> None:
    verifier.trusted = 2
    assert verifier.check(SECOND) == []
    verifier.trusted = 3
    assert verifier.codes(verifier.signed(FIRST, 0, 1)) == ["list-rollback"]


def test_lists_of_other_people_are_followed_beside_ours(verifier: Verifier) -> None:
    other = Verifier(verifier.folder)
    assert verifier.check(SECOND) == []
    assert other.check(FIRST) == []  # the same name, and a lower number
    assert len(json.loads(verifier.state.read_bytes())["lists"]) == 2


@pytest.mark.parametrize("junk", [b"", b"{}", b"[[[[[[[[[", b'{"format":2,"lists":[]}', b"\x00" * 100])
def test_a_damaged_state_is_refused_and_left_for_its_owner(verifier: Verifier, junk: bytes) -> None:
    verifier.state.write_bytes(junk)
    assert verifier.codes(content()) == ["list-state"]
    assert verifier.state.read_bytes() == junk


def test_a_state_that_cannot_be_kept_is_refused(verifier: Verifier, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    found = verifier.check(content(), state=tmp_path / "file" / "state.json")
    assert [finding.code for finding in found] == ["list-state"]
    assert "--state" in found[0].message


def test_a_clock_set_back_does_not_bring_an_expired_list_to_life(verifier: Verifier) -> None:
    short = content(expires=stamp(NOW + timedelta(days=2)))
    verifier.now = NOW + timedelta(days=1)
    assert verifier.check(short) == []
    verifier.now = NOW + timedelta(days=3)
    assert verifier.codes(short) == ["list-expired"]
    verifier.now = NOW
    assert verifier.codes(short) == ["list-clock"]


# -- attacks on time -------------------------------------------------------------------------------------------------


def test_a_frozen_list_is_refused_once_its_end_is_over(verifier: Verifier) -> None:
    listed = content([entry()])
    assert verifier.check(listed) == []
    verifier.now = NOW + timedelta(days=29)
    assert verifier.codes(listed) == ["list-expired"]
    assert verifier.codes(listed, "wizard") == ["withdrawn", "list-expired"]


def test_a_list_first_seen_after_its_end_is_remembered_all_the_same(verifier: Verifier) -> None:
    first = content()
    second = after(first, [entry()], expires=stamp(NOW + timedelta(hours=12)))
    assert verifier.check(first) == []
    verifier.now = NOW + timedelta(days=1)
    assert verifier.codes(second, "wizard") == ["withdrawn", "list-expired"]
    assert "list-rollback" in verifier.codes(first, "wizard")


def test_a_list_of_the_future_is_refused_and_not_remembered(verifier: Verifier) -> None:
    later = content(issued=stamp(NOW + timedelta(minutes=6)), sequence=9, previous=hexed("eighth"))
    assert verifier.codes(later) == ["list-future"]
    assert verifier.check(content()) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"expires": stamp(NOW + timedelta(days=366))},
        {"expires": stamp(NOW - timedelta(days=1))},
        {"expires": "2026-12-01T00:00:00"},
        {"expires": "never"},
        {"issued": "0001-01-01T00:00:00+00:00"},
        {"issued": stamp(NOW - timedelta(days=3))},  # before its entry
    ],
)
def test_times_that_no_list_may_have_are_refused(verifier: Verifier, changes: dict[str, str]) -> None:
    assert verifier.codes(content([entry()], **changes)) == ["list"]


# -- attacks on signatures -------------------------------------------------------------------------------------------


def twice(envelope: dict[str, Any]) -> None:
    envelope["signatures"] *= 2


def two_names(envelope: dict[str, Any]) -> None:
    envelope["signatures"].append(envelope["signatures"][0] | {"keyid": "me again"})


def sign_as_other(verifier: Verifier) -> bytes:
    """The signature of one signer under the key id of another."""

    def change(envelope: dict[str, Any]) -> None:
        envelope["signatures"].append(envelope["signatures"][0] | {"keyid": verifier.signers[1].public_key.keyid})

    return edited(verifier.signed(FIRST, 0), change, inside=False)


def in_toto(verifier: Verifier) -> bytes:
    """A list's payload as the statement type of every other signature of ours."""
    from securesystemslib.dsse import Envelope

    envelope = Envelope(canonical_json(FIRST.model_dump(mode="json")), attest.PAYLOAD_TYPE, {})
    for signer in verifier.signers[:2]:
        envelope.sign(signer)
    return canonical_json(envelope.to_dict() | {"payloadType": "application/vnd.steelyard.withdrawals+json"})


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda v: v.signed(FIRST, 0), "list-signature"),
        (lambda v: edited(v.signed(FIRST, 0), twice, inside=False), "list"),
        (lambda v: edited(v.signed(FIRST, 0), two_names, inside=False), "list-signature"),
        (sign_as_other, "list-signature"),
        (lambda v: list_bytes(FIRST, [CryptoSigner.generate_ecdsa() for _ in range(2)]), "list-signature"),
        (lambda v: list_bytes(FIRST, [v.signers[0], CryptoSigner.generate_ecdsa()]), "list-signature"),
        (lambda v: edited(v.signed(FIRST), lambda e: e.update(signatures=[]), inside=False), "list"),
        (lambda v: edited(v.signed(FIRST), lambda p: p.update(entries=[])), "list-signature"),
        (lambda v: edited(v.signed(FIRST), lambda p: p.update(sequence=7, previous="0" * 64)), "list-signature"),
        (lambda v: edited(v.signed(FIRST), lambda p: p.update(expires=stamp(NOW + timedelta(90)))), "list-signature"),
        (in_toto, "list-signature"),
    ],
    ids=[
        "one signer",
        "one signer twice",
        "one signer under two names",
        "one signer in another's name",
        "strangers",
        "a signer and a stranger",
        "unsigned",
        "entries taken out",
        "another number",
        "a longer life",
        "signed as another type",
    ],
)
def test_a_list_that_the_quorum_did_not_sign_is_refused_and_not_believed(
    verifier: Verifier, make: Callable[[Verifier], bytes], code: str
) -> None:
    assert verifier.codes(make(verifier), "wizard") == [code]
    assert not verifier.state.exists() or b"example" not in verifier.state.read_bytes()


def test_the_payload_of_another_list_under_these_signatures_is_refused(verifier: Verifier) -> None:
    other = json.loads(verifier.signed(content(name="staging")))
    swapped = edited(verifier.signed(FIRST), lambda e: e.update(payload=other["payload"]), inside=False)
    assert verifier.codes(swapped) == ["list-signature"]


@pytest.mark.parametrize(
    ("changes", "codes"),
    [
        ({"kind": "revocation", "time": NOW + timedelta(days=1)}, ["list-signature"]),
        ({"kind": "rotation", "time": NOW - timedelta(days=2)}, ["list-signature"]),
        ({"kind": "rotation", "time": NOW}, []),
    ],
    ids=["revoked", "rotated before", "rotated after"],
)
def test_a_revoked_signer_never_counts_and_a_rotated_one_not_after_it(
    verifier: Verifier, changes: dict[str, Any], codes: list[str]
) -> None:
    event = KeyEvent(keyid=verifier.signers[0].public_key.keyid, reason="lost", **changes)
    verifier.changes["events"] = (event,)
    assert verifier.codes(content()) == codes
    assert verifier.codes(verifier.signed(content(), 1, 2)) == []


def test_a_signer_whose_time_ran_out_counts_no_more(verifier: Verifier) -> None:
    verifier.changes["until"] = {verifier.signers[0].public_key.keyid: NOW - timedelta(days=2)}
    assert verifier.codes(content()) == ["list-signature"]


@pytest.mark.parametrize(("trusted", "quorum"), [(0, 0), (2, 0), (1, 2)])
def test_a_verifier_who_names_no_quorum_of_signers_is_told(verifier: Verifier, trusted: int, quorum: int) -> None:
    verifier.trusted, verifier.quorum = trusted, quorum
    with pytest.raises(UsageError, match=r"withdrawal\.signers"):
        verifier.check(content())


# -- attacks on form -------------------------------------------------------------------------------------------------


def payload_is(value: Any) -> Callable[[Verifier], bytes]:
    from securesystemslib.dsse import Envelope

    def make(verifier: Verifier) -> bytes:
        payload = value if isinstance(value, bytes) else canonical_json(value)
        envelope = Envelope(payload, "application/vnd.steelyard.withdrawals+json", {})
        for signer in verifier.signers[:2]:
            envelope.sign(signer)
        return canonical_json(envelope.to_dict())

    return make


PLAIN = FIRST.model_dump(mode="json")
ENTRY = PLAIN["entries"][0]


@pytest.mark.parametrize(
    "make",
    [
        lambda v: b"",
        lambda v: b"null",
        lambda v: b"[" * 100_000,
        lambda v: b'{"payload":' + b"[" * 50 + b"]" * 50 + b"}",
        lambda v: b" " * 16_000_001,
        lambda v: v.signed(FIRST) + v.signed(FIRST),
        lambda v: edited(v.signed(FIRST), lambda e: e.update(more=1), inside=False),
        lambda v: edited(v.signed(FIRST), lambda e: e.update(payloadType="application/json"), inside=False),
        lambda v: edited(v.signed(FIRST), lambda e: e.update(payload=e["payload"] + "\n"), inside=False),
        lambda v: edited(v.signed(FIRST), lambda e: e.update(signatures=e["signatures"] * 50), inside=False),
        lambda v: edited(v.signed(FIRST), lambda e: e["signatures"][0].update(cert="x"), inside=False),
        lambda v: edited(v.signed(FIRST), lambda e: e["signatures"][0].update(keyid=["x"]), inside=False),
        payload_is(b"[" * 1000),
        payload_is(b'{"a":1,"a":2}'),
        payload_is([PLAIN]),
        payload_is(PLAIN | {"format": 2}),
        payload_is(PLAIN | {"sequence": True}),
        payload_is(PLAIN | {"sequence": "1"}),
        payload_is(PLAIN | {"sequence": 0}),
        payload_is(PLAIN | {"sequence": 10**30}),
        payload_is(PLAIN | {"sequence": 2}),
        payload_is(PLAIN | {"previous": "0" * 64}),
        payload_is(PLAIN | {"name": "../example"}),
        payload_is(PLAIN | {"removed": []}),
        payload_is(PLAIN | {"entries": [ENTRY, ENTRY]}),
        payload_is(PLAIN | {"entries": [ENTRY | {"manifest": "A" * 64}]}),
        payload_is(PLAIN | {"entries": [ENTRY | {"manifest": "a" * 64 + "\n"}]}),
        payload_is(PLAIN | {"entries": [ENTRY | {"reason": " \n"}]}),
        payload_is(PLAIN | {"entries": [ENTRY | {"reason": "x" * 1001}]}),
        payload_is(PLAIN | {"entries": [ENTRY | {"weights": None}]}),
        payload_is(PLAIN | {"entries": [ENTRY | {"manifest": hexed(str(n))} for n in range(MAX_ENTRIES + 1)]}),
    ],
)
def test_a_malformed_list_is_refused_in_one_line(verifier: Verifier, make: Callable[[Verifier], bytes]) -> None:
    found = verifier.check(make(verifier), "wizard")
    assert [finding.code for finding in found] == ["list"]
    assert len(found[0].message) < 600
    with pytest.raises(FormatError):
        read_list(make(verifier), "list")


def test_a_full_list_is_read_in_bounds(verifier: Verifier) -> None:
    entries = [entry(f"{n:\U0001d7d9<200}", reason="\U0001d7d8" * 1000) for n in range(MAX_ENTRIES)]
    data = verifier.signed(content(entries))
    assert 10_000_000 < len(data) < 16_000_000
    assert verifier.check(data) == []


def test_a_file_that_is_no_plain_file_or_absent_is_refused(verifier: Verifier, tmp_path: Path) -> None:
    path = verifier.put(content())
    (tmp_path / "link").symlink_to(path)
    for name in ("link", "absent", "."):
        assert verifier.codes(tmp_path / name) == ["list"]


# -- a host ----------------------------------------------------------------------------------------------------------


def test_any_static_host_can_serve_it(verifier: Verifier) -> None:
    with host(serve(verifier.signed(FIRST))) as url:
        assert verifier.check(f"{url}/withdrawn.json?v=1") == []
        assert verifier.codes(f"{url}/withdrawn.json", "wizard") == ["withdrawn"]


def test_a_redirect_on_this_machine_is_followed(verifier: Verifier) -> None:
    with host(serve(verifier.signed(FIRST))) as url, host(redirect(f"{url}/there")) as first:
        assert verifier.check(f"{first}/here") == []


def test_a_redirect_to_a_file_to_plain_http_elsewhere_or_in_circles_is_refused(verifier: Verifier) -> None:
    path = verifier.put(content(), "secret.json")
    for to in (
        f"file://{path}",
        "ftp://127.0.0.1/x",
        "data:,x",
        "http://example.org/",
        "/again",
        "http://u:p@127.0.0.1/",
    ):
        with host(redirect(to)) as url:
            assert verifier.codes(url) == ["list"], to


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://example.org/list",
        "http://example.org/list",
        "http://127.0.0.1.example.org/list",
        "https://",
        "https://user:secret@example.org/list",
        "https://example.org:port/list",
        "https://example.org/a b",
        "https://[::1/list",
    ],
)
def test_an_address_of_another_kind_is_a_wrong_usage(verifier: Verifier, url: str) -> None:
    with pytest.raises(UsageError) as raised:
        verifier.check(url)
    assert "secret" not in str(raised.value)


def test_https_goes_on_to_nothing_weaker() -> None:
    handler = withdrawal_source._Redirects(False)
    request = withdrawal_source.urllib.request.Request("https://example.org/list")
    for to in ("http://127.0.0.1/list", "http://example.org/list", "https://127.0.0.1/list", "https://localhost/x"):
        with pytest.raises(FormatError):
            handler.redirect_request(request, None, 302, "", {}, to)
    assert handler.redirect_request(request, None, 302, "", {}, "https://cdn.example.org/list") is not None


def test_a_host_that_answers_with_an_error_or_not_at_all_is_refused(verifier: Verifier) -> None:
    def error(request: BaseHTTPRequestHandler) -> None:
        request.send_error(404)

    with host(error) as url:
        found = verifier.check(url)
    assert [finding.code for finding in found] == ["list"]
    assert "404" in found[0].message
    assert verifier.codes(url) == ["list"]  # nobody listens there any more


def test_a_host_that_never_ends_is_left_in_time() -> None:
    def drip(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()
        for _ in range(100):
            request.wfile.write(b" ")
            time.sleep(0.05)

    with host(drip) as url:
        began = time.monotonic()
        with pytest.raises(SteelyardError, match="within"):
            read_source(url, 1000, total=0.3)
        assert time.monotonic() - began < 3


def test_a_host_that_sends_more_than_a_list_is_cut_off() -> None:
    with host(serve(b"x" * 5000)) as url, pytest.raises(FormatError, match="over 1,000 bytes"):
        read_source(url, 1000)


def test_a_cut_answer_is_refused(verifier: Verifier) -> None:
    data = verifier.signed(FIRST)

    def cut(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data[: len(data) // 2])

    with host(cut) as url:
        assert verifier.codes(url) == ["list"]


def test_https_is_verified(verifier: Verifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tls, certificate = certified(tmp_path)
    with host(serve(verifier.signed(FIRST)), tls) as url:
        found = verifier.check(url)
        assert [finding.code for finding in found] == ["list"]
        assert "CERTIFICATE_VERIFY_FAILED" in found[0].message
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert verifier.check(url) == []
        assert verifier.codes(url.replace("127.0.0.1", "localhost")) == ["list"]  # the certificate names another


def test_it_needs_no_extra() -> None:
    extras = ("torch", "transformers", "huggingface_hub", "httpx", "httpx2", "requests")
    code = (
        f"import sys\nfor name in {extras!r}: sys.modules[name] = None\n"
        "import steelyard.release.withdrawal, steelyard.release.withdrawal_seen, steelyard.release.withdraw\n"
        "import steelyard.release.notice, steelyard.release.releases, steelyard.release.takedown\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
