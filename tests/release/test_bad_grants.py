"""Bad input of requests, grants and deliveries: a clear error each, and nothing half-written that verifies."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from bad_grants import NOW, flipped, issue_folder, noted, revoked
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from forging import statement_of
from granting import LICENCE, Desk, person
from scenario import PASSPHRASE

from steelyard.base.canonical import canonical_json, sha256_hex
from steelyard.base.errors import SteelyardError
from steelyard.release.attest import sign
from steelyard.release.grant_deliver import Keys, mark_only
from steelyard.release.grant_keys import MarkKey, load_identity_key, load_mark_key
from steelyard.release.grant_request import read_person
from steelyard.release.grant_transport import check_receipt, receipt
from steelyard.release.grant_verify import verify_copy
from steelyard.release.grants import countersign, forget, revoke


def copies(desk: Desk) -> list[Path]:
    """What lies about that is a copy in the eyes of `verify`."""
    homes = [home.parent for home in desk.root.rglob("steelyard/copy.dsse.json")]
    return [folder for folder in homes if verify_copy(folder, desk.trust).ok]


# -- hostile requests ------------------------------------------------------------------------------------------------


def nested(kind: str, depth: int = 5_000) -> str:
    return {"json": "[" * depth + "]" * depth, "yaml": "a: " + "[" * depth + "]" * depth}[kind]


REQUESTS: dict[str, tuple[str, bytes | dict[str, Any], str]] = {
    "nested": ("json", nested("json").encode(), "deep|nest|JSON"),
    "nested in YAML": ("yaml", nested("yaml").encode(), "deep|nest|YAML"),
    "nested in a field": ("json", {"name": [[[["Ada"]]]]}, "name: must be"),
    "huge": ("json", {"purpose": "x" * 60_000}, "50,000"),
    "a YAML bomb": ("yaml", b"a: &a [x, x]\nb: &b [*a, *a]\nname: [*b, *b]\n", "alias|anchor|unknown key|\\*a"),
    "a YAML tag": ("yaml", b"name: !!python/object/apply:os.system ['id']\n", "tag|constructor|python"),
    "a second document": ("yaml", b"name: Ada\n---\nname: Eve\n", "document"),
    "not UTF-8": ("json", b'{"name": "\xff"}', "UTF-8|utf-8"),
    "NaN": ("json", b'{"name": NaN}', "NaN|name"),
    "a zero byte": ("json", {"organisation": "Engines\x00"}, "organisation: holds control"),
    "an escape sequence": ("json", {"organisation": "\x1b]0;owned\x07"}, "organisation: holds control"),
    "a line end": ("json", {"purpose": "study\nlicence: accepted"}, "purpose: holds control"),
    "a separator of lines": ("json", {"purpose": "study\u2028more"}, "purpose: holds control"),
    "a bidirectional override": ("json", {"name": "ada\u202eevil"}, "name: holds control"),
    "a bidirectional isolate": ("json", {"country": "GB\u2066x"}, "country: holds control"),
    "a letter of no width": ("json", {"name": "Ada\u200b"}, "name: holds control"),
    "a surrogate": ("json", b'{"name": "\\ud800"}', "name|surrogate|UTF-8"),
    "an address with a space": ("json", {"email": "ada@example.org bob@example.org"}, "email"),
    "an address of other letters": ("json", {"email": "аda@example.org"}, "email"),
    "a private key": (
        "json",
        {"signs_with": "-----BEGIN PRIVATE KEY-----\nAA==\n-----END PRIVATE KEY-----"},
        "private",
    ),
    "a key of low order": (
        "json",
        {"encrypts_to": "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VuAyEA" + "A" * 43 + "=\n-----END PUBLIC KEY-----\n"},
        "low order",
    ),
    "a licence in capitals": ("json", {"licence": sha256_hex(LICENCE).upper()}, "licence"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_is_refused(tmp_path: Path, name: str) -> None:
    kind, given, says = REQUESTS[name]
    path = tmp_path / f"request.{kind}"
    path.write_bytes(given if isinstance(given, bytes) else json.dumps(person(**given)).encode())
    with pytest.raises(SteelyardError, match=says) as refused:
        read_person(path)
    assert str(path) in str(refused.value)
    assert "\x1b" not in str(refused.value)
    assert "\u202e" not in str(refused.value)
    assert len(str(refused.value)) < 1_000


@pytest.mark.parametrize("field", ["name", "organisation", "country", "purpose"])
@pytest.mark.parametrize("text", ["../../etc/passwd", "/etc/cron.d/x", "C:\\x", "$(touch owned)", "-rf ~", "%n", "{0}"])
def test_a_text_is_never_a_path_or_a_command(desk: Desk, tmp_path: Path, field: str, text: str) -> None:
    """Whoever calls himself so gets a grant like any other; his words stand in the sealed file alone."""
    (tmp_path / "request.yaml").write_text(yaml.safe_dump(person(**{field: text})))
    before = {path.relative_to(desk.root) for path in desk.root.rglob("*")}
    request = desk.request(desk.sealed(**{field: text}))
    assert getattr(read_person(tmp_path / "request.yaml"), field) == text
    added = {path.relative_to(desk.root) for path in desk.root.rglob("*")} - before
    folder = Path("grants/requests") / request.id
    assert {path for path in added if path.parts[0] == "grants"} <= {
        Path("grants/lock"), Path("grants/requests"), folder, folder / "request.sealed",
    }  # fmt: skip
    with desk.chain.ledger() as ledger:
        assert text not in json.dumps([event.payload for event in ledger.events()])


# -- what is not granted or delivered --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def issued(granting: Desk, tmp_path_factory: pytest.TempPathFactory) -> tuple[Desk, str]:
    """A desk with a countersigned grant of a recipient with a key. Read only."""
    desk = granting.copy(tmp_path_factory.mktemp("issued") / "desk")
    return desk, desk.granted().id


@pytest.fixture
def at_hand(issued: tuple[Desk, str], tmp_path: Path) -> tuple[Desk, str]:
    return issued[0].copy(tmp_path / "desk"), issued[1]


def only_request(desk: Desk) -> str:
    with desk.book() as book:
        return book.requests(NOW)[0].id


def request_file(desk: Desk) -> Path:
    return desk.root / "grants" / "requests" / only_request(desk) / "request.sealed"


def stranger(desk: Desk) -> X25519PrivateKey:
    return X25519PrivateKey.generate()


def with_identity(desk: Desk, private: X25519PrivateKey) -> dict[str, Any]:
    keys = desk.keys()
    return {"keys": Keys(keys.mark, private, keys.signer, keys.card)}


def with_mark(desk: Desk, mark: MarkKey) -> dict[str, Any]:
    keys = desk.keys()
    return {"keys": Keys(mark, keys.identity, keys.signer, keys.card)}


def without_event(desk: Desk, grant: str) -> None:
    """Countersigned, and killed before the ledger had it."""
    with desk.book() as book:
        book.note("countersigned", grant=grant, commitment="0" * 64, countersignature="0" * 64)
    path = issue_folder(desk, grant) / "commitment.dsse.json"
    path.write_bytes(sign(canonical_json(statement_of(path)), desk.signer("fay")))


def planted_lock(desk: Desk) -> None:
    lock = desk.root / "grants" / "lock"
    lock.unlink()
    lock.symlink_to(desk.bundle / "LICENSE")


Prepare = Callable[[Desk, str], Any]
DELIVERIES: dict[str, tuple[Prepare, str]] = {
    "another's identity key": (lambda d, _: with_identity(d, stranger(d)), "another key, or was changed"),
    "another mark key": (lambda d, _: with_mark(d, MarkKey(bytes(32), "0" * 64)), "not the one that its code"),
    "another secret": (
        lambda d, _: with_mark(d, MarkKey(bytes(32), d.mark.fingerprint)), "not the one that its code was committed",
    ),
    "a signer who releases nothing": (lambda d, _: {"keys": d.keys("bob")}, "none of the releasers"),
    "the identity was changed": (lambda d, _: flipped(request_file(d)), "another key, or was changed"),
    "the identity was cut": (lambda d, _: os.truncate(request_file(d), 60), "is not a sealed file|changed"),
    "the identity is empty": (lambda d, _: request_file(d).write_bytes(b""), "is not a sealed file"),
    "the identity is huge": (lambda d, _: request_file(d).write_bytes(bytes(60_000)), "50,000"),
    "the identity is lost": (lambda d, _: request_file(d).unlink(), "restore it from a copy"),
    "the identity is a link": (
        lambda d, _: [request_file(d).rename(d.root / "x"), request_file(d).symlink_to(d.root / "x")], "symbolic link",
    ),
    "revoked": (revoked, "was revoked at"),
    "expired": (lambda _d, _: {"now": NOW + timedelta(days=101)}, "expired at"),
    "the clock was set back": (lambda _d, _: {"now": NOW - timedelta(days=3)}, "it was set back: set it right"),
    "another licence": (lambda d, _: {"licence": licence(d, b"Anything goes.\n")}, "the recipient accepted"),
    "an empty licence": (lambda d, _: {"licence": licence(d, b"")}, "the recipient accepted"),
    "a huge licence": (lambda d, _: {"licence": licence(d, bytes(2_000_000))}, "1,000,000"),
    "no commitment": (lambda d, g: (issue_folder(d, g) / "commitment.json").unlink(), "restore it from a copy"),
    "another commitment": (lambda d, g: flipped(issue_folder(d, g) / "commitment.json"), "not what the ledger noted"),
    "no countersignature": (
        lambda d, g: (issue_folder(d, g) / "commitment.dsse.json").unlink(), "countersign it first",
    ),
    "a countersignature that was changed": (
        lambda d, g: flipped(issue_folder(d, g) / "commitment.dsse.json"), "commitment",
    ),
    "a countersignature that no event knows": (without_event, "is not noted in the ledger"),
    "fewer reviews": (lambda d, g: (issue_folder(d, g) / "review-2.dsse.json").unlink(), "was not made on the reviews"),
    "a review that was changed": (lambda d, g: flipped(issue_folder(d, g) / "review-1.dsse.json"), "review"),
    "a release that is withdrawn": (
        lambda d, _: noted(d, "release.withdrawn", weights=d.sealed().wanted.weights, manifest=""), "withdrawn",
    ),
    "a release that went out": (
        lambda d, _: noted(d, "release.publishing", weights=d.sealed().wanted.weights), "went out unmarked",
    ),
    "no bundle": (lambda d, _: shutil.rmtree(d.bundle / "steelyard"), "is not a bundle"),
    "a planted lock": (lambda d, _: planted_lock(d), "symbolic link, where a lock belongs"),
    "a text that is none": (lambda d, _: {"licence": d.root}, "is not a plain file"),
}  # fmt: skip


def licence(desk: Desk, text: bytes) -> Path:
    path = desk.root / "terms"
    path.write_bytes(text)
    return path


@pytest.mark.parametrize("name", DELIVERIES)
def test_nothing_is_delivered(at_hand: tuple[Desk, str], name: str) -> None:
    desk, grant = at_hand
    prepare, says = DELIVERIES[name]
    kinds = desk.kinds()
    given = prepare(desk, grant)
    with pytest.raises(SteelyardError, match=says):
        desk.deliver(grant, desk.root / "copy", **(given if isinstance(given, dict) else {}))
    assert not (desk.root / "copy").exists()
    assert copies(desk) == []
    assert "delivered" not in desk.kinds()
    assert not any((desk.root / "grants").rglob("*.safetensors"))
    assert (desk.bundle / "LICENSE").read_bytes() == LICENCE
    assert kinds == desk.kinds()[: len(kinds)]


@pytest.mark.parametrize("act", ["request", "review", "issue", "countersign", "revoke", "forget", "mark", "receipt"])
def test_a_clock_that_was_set_back(desk: Desk, tmp_path: Path, act: str) -> None:
    """A grant that expired would be in force again, and a review be older than its request."""
    before = NOW - timedelta(days=3)
    request = desk.request().id
    if act != "review":
        desk.review(request, "bob")
        desk.review(request, "carol")
    grant = "" if act in ("request", "review", "issue", "forget") else desk.issue(request).id
    if act in ("mark", "receipt"):
        desk.countersign(grant)

    def other() -> Any:
        with desk.book() as book:
            if act == "countersign":
                return countersign(book, grant, signer=desk.signer("fay"), trust=desk.trust, now=before)
            if act == "revoke":
                return revoke(book, grant, "x", signer=desk.signer("bob"), trust=desk.trust, now=before)
            if act == "mark":
                to = desk.root / "marked"
                return mark_only(book, grant, desk.bundle, to, mark=desk.mark, trust=desk.trust, now=before)
            return forget(book, request, now=before)

    acts: dict[str, Callable[[], Any]] = {
        "request": lambda: desk.request(desk.sealed(email="b@example.org"), now=before),
        "review": lambda: desk.review(request, "bob", now=before),
        "issue": lambda: desk.issue(request, now=before),
        "receipt": lambda: _receipt(desk, grant, tmp_path, now=before),
    }
    kinds = desk.kinds()
    with pytest.raises(SteelyardError, match="set back"):
        acts.get(act, other)()
    assert desk.kinds() == kinds or act == "receipt"


def _receipt(desk: Desk, grant: str, folder: Path, now: datetime) -> str:
    desk.deliver(grant, folder / "copy")
    word = receipt(verify_copy(folder / "copy", desk.trust), desk.signer("bob"))
    (folder / "receipt.json").write_bytes(word)
    with desk.book() as book:
        return check_receipt(book, folder / "receipt.json", desk.identity, now=now)


# -- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.unlink(), "steelyard grant key new"),
        (lambda path: path.chmod(0o644), "others can read"),
        (lambda path: path.write_bytes(b""), "passphrase is wrong, or"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "passphrase is wrong, or"),
        (lambda path: path.write_bytes(b"x" * 2_000_000), "bytes|passphrase is wrong, or"),
        (lambda path: _swapped(path), "X25519 key|not a key of steelyard grant key new"),
    ],
)
@pytest.mark.parametrize("which", ["mark", "identity"])
def test_keys_of_granting(desk: Desk, which: str, damage: Callable[[Path], Any], says: str) -> None:
    folder = desk.root / "grants" / "keys"
    damage(folder / f"{which}.key.pem")
    load = load_mark_key if which == "mark" else load_identity_key
    with pytest.raises(SteelyardError, match=says):
        load(folder, PASSPHRASE)


def _swapped(path: Path) -> None:
    """The other of the two, in its place."""
    other = path.with_name("identity.key.pem" if path.name.startswith("mark") else "mark.key.pem")
    path.write_bytes(other.read_bytes())


def test_there_are_many() -> None:
    assert len(REQUESTS) + len(DELIVERIES) >= 40
