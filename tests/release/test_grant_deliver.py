"""Delivering: the marked copy, whole or not at all; what it says of itself; on its way to the recipient, and back."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import tarfile
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from granting import LICENCE, Desk, public_pem
from scenario import PASSPHRASE
from securesystemslib.signer import CryptoSigner

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.ledger.ledger import Event, Ledger
from steelyard.release import grant_deliver
from steelyard.release.grant_deliver import mark_only
from steelyard.release.grant_sealed import SealedWriter
from steelyard.release.grant_transport import check_receipt, receipt, unpack
from steelyard.release.grant_verify import verify_copy
from steelyard.release.grants import revoke
from steelyard.release.keys import new_key
from steelyard.release.verify import verify_bundle
from steelyard.trace import tardos


@pytest.fixture(scope="module")
def delivered(granting: Desk, tmp_path_factory: pytest.TempPathFactory) -> tuple[Desk, Path]:
    """A desk that delivered, and the copy. Read only."""
    desk = granting.copy(tmp_path_factory.mktemp("delivered") / "desk")
    grant = desk.granted()
    desk.deliver(grant.id, desk.root / "copy")
    return desk, desk.root / "copy"


@pytest.fixture
def copy(delivered: tuple[Desk, Path], tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(delivered[1], tmp_path / "copy"))


def nothing_left(desk: Desk, name: str = "copy") -> bool:
    """Neither at the place, nor beside it, nor in the workspace."""
    staging = desk.root / "grants" / "staging"
    left = [path for path in desk.root.iterdir() if name in path.name and path.name != "deskcopy"]
    return not left and not any(staging.rglob("*.safetensors"))


# -- what is delivered -----------------------------------------------------------------------------------------------


def test_delivered(delivered: tuple[Desk, Path]) -> None:
    desk, folder = delivered
    result = verify_copy(folder, desk.trust)
    assert result.ok, result.findings
    with desk.book() as book:
        (grant,) = book.grants(datetime.now(UTC))
        assert grant.state == "delivered"
        assert result.grant == grant.id
        assert result.subject == grant.wanted.subject
        (event,) = book.events("delivered")
        assert event.payload["marked"] == result.weights != grant.wanted.weights
    assert desk.kinds()[-3:] == ["delivering", "marked", "delivered"]
    assert "tested subject" in result.says()
    assert nothing_left(desk, "nothing")


def test_what_was_not_measured_is_absent(delivered: tuple[Desk, Path]) -> None:
    import base64

    envelope = json.loads((delivered[1] / "steelyard" / "copy.dsse.json").read_bytes())
    predicate = json.loads(base64.b64decode(envelope["payload"]))["predicate"]
    assert set(predicate["bound"]) == {"relative_change"}
    assert 0 < predicate["bound"]["relative_change"] < 0.0016
    assert "could also have" in predicate["caution"]


def test_verify_says_what_it_is(delivered: tuple[Desk, Path]) -> None:
    desk, folder = delivered
    result = verify_bundle(folder, trust=desk.trust)
    assert not result.ok
    (finding,) = result.findings
    assert "marked copy, derived from tested subject" in finding.message
    assert "not a release" in finding.message


def test_the_statement_makes_no_release_of_a_bundle(delivered: tuple[Desk, Path], tmp_path: Path) -> None:
    """And a bundle's files make no release of a copy."""
    desk, folder = delivered
    bundle = Path(shutil.copytree(desk.bundle, tmp_path / "tiny"))
    assert verify_bundle(bundle, trust=desk.trust).ok
    shutil.copyfile(folder / "steelyard" / "copy.dsse.json", bundle / "steelyard" / "copy.dsse.json")
    assert not verify_bundle(bundle, trust=desk.trust).ok
    assert not verify_copy(bundle, desk.trust).ok
    both = Path(shutil.copytree(desk.bundle, tmp_path / "both"))
    shutil.copyfile(folder / "model.safetensors", both / "model.safetensors")
    assert not verify_bundle(both, trust=desk.trust).ok


def test_twice_is_the_same(delivered: tuple[Desk, Path], tmp_path: Path) -> None:
    desk = delivered[0].copy(tmp_path / "deskcopy")
    with desk.book() as book:
        (grant,) = book.grants(datetime.now(UTC))
    desk.deliver(grant.id, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (delivered[1] / "model.safetensors").read_bytes()
    assert desk.kinds().count("marked") == 1


def test_two_grants_differ(desk: Desk) -> None:
    one, other = desk.granted(), desk.granted(desk.sealed(email="b@example.org"))
    for number, grant in enumerate((one, other)):
        desk.deliver(grant.id, desk.root / f"copy-{number}")
    files = [(desk.root / f"copy-{number}" / "model.safetensors").read_bytes() for number in range(2)]
    assert files[0] != files[1]
    assert not np.array_equal(tardos.code(desk.mark.secret, one.id), tardos.code(desk.mark.secret, other.id))


# -- a copy that was changed -----------------------------------------------------------------------------------------


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def _other_statement(copy: Path) -> None:
    path = copy / "steelyard" / "copy.dsse.json"
    import base64

    envelope = json.loads(path.read_bytes())
    statement = json.loads(base64.b64decode(envelope["payload"]))
    statement["predicate"]["bound"]["relative_change"] = 1e-9
    envelope["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    path.write_text(json.dumps(envelope))


CHANGES: dict[str, Callable[[Path], Any]] = {
    "weights": lambda copy: _flip(copy / "model.safetensors"),
    "licence": lambda copy: (copy / "LICENSE").write_bytes(b"Anything goes.\n"),
    "card": lambda copy: (copy / "README.md").write_bytes(b"# A release\n"),
    "added": lambda copy: (copy / "vocab.json").write_bytes(b"{}"),
    "pickle": lambda copy: (copy / "pytorch_model.bin").write_bytes(b"\x80\x04."),
    "list": lambda copy: _flip(copy / "steelyard" / "copy.json"),
    "no list": lambda copy: (copy / "steelyard" / "copy.json").unlink(),
    "statement": _other_statement,
    "commitment": lambda copy: _flip(copy / "steelyard" / "commitment.json"),
    "no countersignature": lambda copy: (copy / "steelyard" / "commitment.dsse.json").unlink(),
    "no review": lambda copy: (copy / "steelyard" / "review-2.dsse.json").unlink(),
    "no test result": lambda copy: (copy / "steelyard" / "source-test-result.dsse.json").unlink(),
    "link": lambda copy: [(copy / "LICENSE").unlink(), (copy / "LICENSE").symlink_to("/etc/hostname")],
    "pipe": lambda copy: [(copy / "LICENSE").unlink(), os.mkfifo(copy / "LICENSE")],
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed(delivered: tuple[Desk, Path], copy: Path, name: str) -> None:
    CHANGES[name](copy)
    result = verify_copy(copy, delivered[0].trust)
    assert not result.ok
    assert all(finding.message for finding in result.findings)


def test_what_holds_only_for_whom_and_until(delivered: tuple[Desk, Path], tmp_path: Path) -> None:
    """Other people's keys, too few reviewers, a time after its end, a revoked grant."""
    from dataclasses import replace

    desk, folder = delivered
    trust = desk.trust
    assert not verify_copy(folder, replace(trust, releasers=())).ok
    assert not verify_copy(folder, replace(trust, evaluators=())).ok
    assert not verify_copy(folder, replace(trust, witnesses=())).ok
    assert not verify_copy(folder, replace(trust, grants=replace(trust.grants, needed=3))).ok
    late = verify_copy(folder, trust, now=datetime.now(UTC) + timedelta(days=101))
    assert [finding.code for finding in late.findings] == ["expired"]
    other = desk.copy(tmp_path / "deskcopy")
    with other.book() as book:
        (grant,) = book.grants(datetime.now(UTC))
        path = revoke(book, grant.id, "moved on", signer=other.signer("bob"), trust=trust)
    ended = verify_copy(folder, trust, revoked=[path])
    assert [finding.code for finding in ended.findings] == ["revoked"]


def test_the_original_under_a_copys_papers(delivered: tuple[Desk, Path], copy: Path) -> None:
    """Somebody who has the unmarked weights cannot pass them off as the marked copy."""
    shutil.copyfile(delivered[0].bundle / "model.safetensors", copy / "model.safetensors")
    codes = {finding.code for finding in verify_copy(copy, delivered[0].trust).findings}
    assert {"changed", "statement"} <= codes


# -- what is not delivered -------------------------------------------------------------------------------------------


def test_not_countersigned(desk: Desk) -> None:
    request = desk.request()
    for name in ("bob", "carol"):
        desk.review(request.id, name)
    grant = desk.issue(request.id)
    with pytest.raises(SteelyardError, match="countersign it first"):
        desk.deliver(grant.id, desk.root / "copy")
    assert "marked" not in desk.kinds()
    assert nothing_left(desk)


def test_countersigned_by_no_witness_of_mine(desk: Desk) -> None:
    request = desk.request()
    for name in ("bob", "carol"):
        desk.review(request.id, name)
    grant = desk.issue(request.id)
    with pytest.raises(SteelyardError, match="none of yours"):
        desk.countersign(grant.id, "alice")
    desk.countersign(grant.id, "alice", trust=desk.trusting("alice"))
    with pytest.raises(SteelyardError, match="none of yours"):
        desk.deliver(grant.id, desk.root / "copy")


def test_countersigned_later_than_now(desk: Desk) -> None:
    request = desk.request()
    for name in ("bob", "carol"):
        desk.review(request.id, name)
    grant = desk.issue(request.id)
    desk.countersign(grant.id, now=datetime.now(UTC) + timedelta(hours=1))
    with pytest.raises(SteelyardError, match="later than the copy"):
        desk.deliver(grant.id, desk.root / "copy")


def test_unknown_expired(desk: Desk) -> None:
    with pytest.raises(SteelyardError, match="not in this workspace's ledger"):
        desk.deliver("g-" + "0" * 16, desk.root / "copy")
    grant = desk.granted(days=1)
    with pytest.raises(SteelyardError, match="expired at"):
        desk.deliver(grant.id, desk.root / "copy", now=datetime.now(UTC) + timedelta(days=2))
    assert nothing_left(desk)


def test_another_licence(desk: Desk, tmp_path: Path) -> None:
    grant = desk.granted()
    (tmp_path / "LICENSE").write_bytes(b"Anything goes.\n")
    with pytest.raises(SteelyardError, match="the recipient accepted"):
        desk.deliver(grant.id, desk.root / "copy", licence=tmp_path / "LICENSE")


def test_by_another_hand(desk: Desk) -> None:
    grant = desk.granted()
    with pytest.raises(SteelyardError, match="none of the releasers"):
        desk.deliver(grant.id, desk.root / "copy", keys=desk.keys("alice"))


def test_another_release(desk: Desk) -> None:
    grant = desk.granted()
    _flip(desk.bundle / "model.safetensors")
    with pytest.raises(SteelyardError, match="does not verify, so nothing is delivered"):
        desk.deliver(grant.id, desk.root / "copy")
    (desk.bundle / "steelyard" / "manifest.json").write_bytes(b"{}")
    with pytest.raises(SteelyardError, match="give an intact bundle"):
        desk.deliver(grant.id, desk.root / "copy")
    assert nothing_left(desk)


def test_a_commitment_that_was_changed(desk: Desk) -> None:
    grant = desk.granted()
    path = desk.root / "grants" / "issued" / grant.id / "commitment.json"
    path.write_bytes(path.read_bytes().replace(b'"public":false', b'"public":true'))
    with pytest.raises(SteelyardError, match="is not what the ledger noted"):
        desk.deliver(grant.id, desk.root / "copy")


@pytest.mark.parametrize("kind", ["folder", "file", "link", "dangling", "inside"])
def test_a_place_that_is_taken(desk: Desk, tmp_path: Path, kind: str) -> None:
    grant = desk.granted()
    to, other = desk.root / "place", tmp_path / "other"
    other.mkdir()
    if kind == "folder":
        to.mkdir()
    elif kind == "file":
        to.write_bytes(b"x")
    elif kind == "link":
        to.symlink_to(other)
    elif kind == "dangling":
        to.symlink_to(tmp_path / "nowhere")
    else:
        to = desk.bundle / "copy"
    with pytest.raises(SteelyardError, match=r"exists already|lies in the bundle"):
        desk.deliver(grant.id, to)
    assert not any(other.iterdir())
    assert not (tmp_path / "nowhere").exists()
    assert "delivering" not in desk.kinds()


def test_a_link_in_the_bundle(desk: Desk, tmp_path: Path) -> None:
    grant = desk.granted()
    (desk.bundle / "model.safetensors").rename(tmp_path / "model.safetensors")
    (desk.bundle / "model.safetensors").symlink_to(tmp_path / "model.safetensors")
    with pytest.raises(SteelyardError, match="symbolic link"):
        desk.deliver(grant.id, desk.root / "copy")


# -- two at once, full disk ------------------------------------------------------------------------------------------


def _at_once(desk: Desk, wanted: list[tuple[str, Path]]) -> list[SteelyardError]:
    """Deliver all of them in threads; gives what was refused."""
    failed: list[SteelyardError] = []

    def one(grant: str, to: Path) -> None:
        try:
            desk.deliver(grant, to)
        except SteelyardError as error:
            failed.append(error)

    threads = [threading.Thread(target=one, args=both) for both in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failed


def test_two_at_once(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two grants at once come one after the other; for one place, one of them is refused."""
    grants = [desk.granted(), desk.granted(desk.sealed(email="b@example.org"))]
    inside, most, lock = 0, 0, threading.Lock()
    real = grant_deliver.watermark.mark_folder

    def slow(*arguments: Any) -> Any:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        try:
            threading.Event().wait(0.3)
            return real(*arguments)
        finally:
            with lock:
                inside -= 1

    monkeypatch.setattr(grant_deliver.watermark, "mark_folder", slow)
    for places in (("copy-0", "copy-1"), ("copy-2", "copy-2")):
        failed = _at_once(desk, [(grant.id, desk.root / place) for grant, place in zip(grants, places, strict=True)])
        assert len(failed) == 2 - len(set(places))
        assert all("exists already" in str(error) for error in failed)
        for place in set(places):
            assert verify_copy(desk.root / place, desk.trust).ok
    assert most == 1
    assert desk.kinds().count("delivered") == 3


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("at", ["write_bytes", "mark", "pack"])
def test_disk_full(desk: Desk, monkeypatch: pytest.MonkeyPatch, at: str, sealed: bool) -> None:
    """Wherever it strikes: nothing at the place, nothing of the weights left, and then it can be done again."""
    key = public_pem(X25519PrivateKey.generate()) if sealed else None
    grant = desk.granted(desk.sealed(encrypts_to=key))
    full = OSError(errno.ENOSPC, "No space left on device")

    def fails(*_: Any, **__: Any) -> Any:
        raise full

    with monkeypatch.context() as patch:
        if at == "write_bytes":
            real = Path.write_bytes

            def write(path: Path, data: bytes) -> int:
                if path.name == "copy.dsse.json":
                    real(path, data[: len(data) // 2])
                    raise full
                return real(path, data)

            patch.setattr(Path, "write_bytes", write)
        elif at == "mark":

            def half(source: Path, out: Path, *_: Any) -> Any:
                out.mkdir()
                (out / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-100])
                raise full

            patch.setattr(grant_deliver.watermark, "mark_folder", half)
        elif sealed:
            patch.setattr(SealedWriter, "finish", fails)
        else:
            patch.setattr("steelyard.base.files.fsync_folder", fails)
        with pytest.raises(OSError, match="No space left"):
            desk.deliver(grant.id, desk.root / "copy")
        assert nothing_left(desk)
        assert "delivered" not in desk.kinds() or at == "pack"
    desk.deliver(grant.id, desk.root / "copy")
    assert (desk.root / "copy").exists()


# -- sealed for the recipient, and the receipt -----------------------------------------------------------------------


def test_sealed_opened_received(desk: Desk, tmp_path: Path) -> None:
    box, signer = X25519PrivateKey.generate(), CryptoSigner.generate_ed25519()
    pem = str(signer.public_key.keyval["public"])
    new_key(tmp_path, "ada", PASSPHRASE, key_type="ed25519")
    pem = (tmp_path / "ada.pub.pem").read_text()
    grant = desk.granted(desk.sealed(encrypts_to=public_pem(box), signs_with=pem))
    done = desk.deliver(grant.id, desk.root / "copy")
    assert done.sealed
    assert done.place.stat().st_mode & 0o777 == 0o600
    assert done.place.is_file()
    assert nothing_left(desk, "nothing")
    data = done.place.read_bytes()
    assert b"model.safetensors" not in data
    assert b"LlamaForCausalLM" not in data
    folder = unpack(done.place, box, tmp_path / "mine")
    result = verify_copy(folder, desk.trust)
    assert result.ok, result.findings

    from steelyard.release.keys import load_signer

    mine = load_signer(tmp_path, "ada", PASSPHRASE)
    (tmp_path / "r.json").write_bytes(receipt(result, mine))
    with desk.book() as book:
        assert check_receipt(book, tmp_path / "r.json", desk.identity) == grant.id
        assert check_receipt(book, tmp_path / "r.json", desk.identity) == grant.id
        assert len(book.events("received")) == 1
        assert book.grant(grant.id, datetime.now(UTC)).state == "received"
        (tmp_path / "r.json").write_bytes(receipt(result, desk.signer("bob")))
        with pytest.raises(SteelyardError, match="none of yours"):
            check_receipt(book, tmp_path / "r.json", desk.identity)
        other = result.model_copy(update={"weights": "0" * 64})
        (tmp_path / "r.json").write_bytes(receipt(other, mine))
        with pytest.raises(SteelyardError, match="never delivered"):
            check_receipt(book, tmp_path / "r.json", desk.identity)
        with pytest.raises(SteelyardError, match="No such file"):
            check_receipt(book, tmp_path / "none.json", desk.identity)
    with pytest.raises(SteelyardError, match="does not verify"):
        receipt(result.model_copy(update={"ok": False}), mine)


def test_a_sealed_copy_that_was_cut(desk: Desk, tmp_path: Path) -> None:
    box = X25519PrivateKey.generate()
    grant = desk.granted(desk.sealed(encrypts_to=public_pem(box)))
    whole = desk.deliver(grant.id, desk.root / "copy").place.read_bytes()
    for end in (10, 100, len(whole) // 2, len(whole) - 70_000, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:end])
        with pytest.raises(FormatError, match=r"cut off|not a sealed file|changed"):
            unpack(tmp_path / "cut", box, tmp_path / "mine")
        assert [path.name for path in tmp_path.iterdir() if "mine" in path.name] == []
    with pytest.raises(FormatError, match="another key"):
        unpack(desk.root / "copy", X25519PrivateKey.generate(), tmp_path / "mine")
    (tmp_path / "mine").mkdir()
    with pytest.raises(SteelyardError, match="exists already"):
        unpack(desk.root / "copy", box, tmp_path / "mine")


def _tar(*members: tarfile.TarInfo) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    return file.getvalue()


def _member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 3) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size if kind == tarfile.REGTYPE else 0, "/etc/passwd"
    return info


@pytest.mark.parametrize(
    "data",
    [
        _tar(_member("../LICENSE")),
        _tar(_member("/LICENSE")),
        _tar(_member("steelyard/../../x")),
        _tar(_member("LICENSE", tarfile.SYMTYPE)),
        _tar(_member("LICENSE", tarfile.LNKTYPE)),
        _tar(_member("LICENSE", tarfile.FIFOTYPE)),
        _tar(_member("LICENSE", tarfile.CHRTYPE)),
        _tar(_member("steelyard", tarfile.DIRTYPE)),
        _tar(_member("LICENSE"), _member("LICENSE")),
        _tar(_member("evil.py")),
        _tar(_member("LICENSE\n# Verified")),
        _tar(_member("LICENSE")),  # no statement
        _tar(_member("LICENSE", size=3000))[:1024],
        b"",
        b"no tar at all" * 100,
    ],
)
def test_a_sealed_file_of_a_stranger(tmp_path: Path, data: bytes) -> None:
    """Whoever has the recipient's public key can seal anything to him."""
    from steelyard.release.grant_sealed import seal

    box = X25519PrivateKey.generate()
    (tmp_path / "sealed").write_bytes(seal(data, box.public_key()))
    with pytest.raises(FormatError):
        unpack(tmp_path / "sealed", box, tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["sealed"]


# -- the public's copy -----------------------------------------------------------------------------------------------


END = "2199-01-01T00:00:00Z"


def test_the_publics_copy(desk: Desk) -> None:
    """It is a grant too, but released only as what it is: a subject of its own, tested."""
    grant = desk.granted(desk.sealed(public=True))
    with pytest.raises(SteelyardError, match="there already"):
        desk.request(desk.sealed(public=True))
    with pytest.raises(SteelyardError, match="needs a test of its own"):
        desk.deliver(grant.id, desk.root / "copy")
    with desk.book() as book:
        change = mark_only(book, grant.id, desk.bundle, desk.root / "marked", mark=desk.mark, trust=desk.trust)
    assert 0 < change < 0.0016
    assert (desk.root / "marked" / "LICENSE").read_bytes() == LICENCE
    assert not (desk.root / "marked" / "steelyard").exists()
    assert desk.kinds()[-1] == "marked"


def test_what_is_granted_is_not_published_unmarked(desk: Desk, tmp_path: Path) -> None:
    from steelyard.release.publish import publish

    def check(folder: Path) -> Any:
        return verify_bundle(folder, trust=desk.trust)

    desk.granted()
    with desk.chain.ledger() as ledger, pytest.raises(SteelyardError, match="not published unmarked"):
        publish(desk.bundle, str(tmp_path / "site"), check=check, ledger=ledger)
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize("second", ["release.publishing", "grant.issued"])
def test_granted_and_published_at_the_same_moment(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: str
) -> None:
    """Whichever comes second in the ledger is refused, however early it had looked."""
    from steelyard.release.publish import publish

    def check(folder: Path) -> Any:
        return verify_bundle(folder, trust=desk.trust)

    def beaten(ledger: Ledger, kind: str, payload: dict[str, Any], **options: Any) -> Event:
        if kind == second:
            monkeypatch.setattr(Ledger, "append", append)
            options["check"]()
            first = "grant.issued" if kind == "release.publishing" else "release.published"
            append(ledger, first, {"weights": desk.sealed().wanted.weights, "grant": "g-" + "0" * 16})
        return append(ledger, kind, payload, **options)

    request = desk.request()
    desk.review(request.id, "bob")
    desk.review(request.id, "carol")
    append = Ledger.append
    monkeypatch.setattr(Ledger, "append", beaten)
    if second == "release.publishing":
        with desk.chain.ledger() as ledger, pytest.raises(SteelyardError, match="not published unmarked"):
            publish(desk.bundle, str(tmp_path / "site"), check=check, ledger=ledger)
        assert not (tmp_path / "site").exists()
    else:
        with pytest.raises(SteelyardError, match="cannot be granted"):
            desk.issue(request.id)
    with desk.chain.ledger() as ledger:
        assert not ledger.events(second)


def test_one_recipients_copy_is_not_published(desk: Desk, tmp_path: Path) -> None:
    """Were it tested and released like the public's: a leak would name who got it. The public's own may go out."""
    from steelyard.release.publish import Release, _refuse_granted

    with desk.chain.ledger() as ledger:
        for public in (True, False):
            grant = f"g-{int(public):016x}"
            ledger.append("grant.issued", {"grant": grant, "weights": "3" * 64, "public": public, "expires": END})
            ledger.append("grant.marked", {"grant": grant, "marked": str(int(public)) * 64})
        _refuse_granted(Release("tiny", "2" * 64, "1" * 64, (), ()), ledger, datetime.now(UTC))
        with pytest.raises(SteelyardError, match="carry the mark of grant g-0000000000000000"):
            _refuse_granted(Release("tiny", "2" * 64, "0" * 64, (), ()), ledger, datetime.now(UTC))


@pytest.mark.parametrize(("tier", "says"), [("quick", "needs one of tier release"), ("release", None)])
def test_the_publics_copy_goes_out_on_a_full_battery(tmp_path: Path, tier: str, says: str | None) -> None:
    """No other's test speaks for it, and no quick one."""
    from scenario import Chain, make_battery

    from steelyard.release.publish import publish

    chain = Chain.build(tmp_path / "root", battery=make_battery(tier=tier))
    bundle, to = chain.bundle(), tmp_path / "site"
    with chain.ledger() as ledger:
        weights, grant = chain.verify(bundle).weights, "g-" + "0" * 16
        ledger.append("grant.issued", {"grant": grant, "weights": "3" * 64, "public": True, "expires": END})
        ledger.append("grant.marked", {"grant": grant, "marked": weights})
        if says is None:
            publish(bundle, str(to), check=chain.verify, ledger=ledger)
        else:
            with pytest.raises(SteelyardError, match=says):
                publish(bundle, str(to), check=chain.verify, ledger=ledger)
            assert not ledger.events("release.publishing")
    assert to.exists() == (says is None)


def test_no_licence_anywhere(desk: Desk) -> None:
    from steelyard.release.grant_copy import licence_of

    (desk.bundle / "LICENSE").unlink()
    with pytest.raises(UsageError, match="--licence FILE"):
        licence_of(desk.bundle)
    with pytest.raises(UsageError, match="No such file"):
        licence_of(desk.bundle, desk.root / "none")
