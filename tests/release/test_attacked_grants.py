"""What a recipient, a desk or a stranger tries against granting, and what stops it."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from bad_grants import issue_folder, revoked
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from forging_copies import Copies
from granting import GRANTS, Desk, public_pem
from scenario import PASSPHRASE
from withdrawing import Verifier, content, entry, stamp

from steelyard.base.errors import FormatError, SteelyardError
from steelyard.model import identity
from steelyard.release import grant_book, grant_deliver, grants
from steelyard.release.grant_copy import STATEMENT
from steelyard.release.grant_deliver import mark_only
from steelyard.release.grant_name import name_grant
from steelyard.release.grant_sealed import seal
from steelyard.release.grant_transport import check_receipt, receipt, unpack
from steelyard.release.grant_verify import verify_copy
from steelyard.release.grants import forget
from steelyard.release.keys import load_signer, new_key
from steelyard.release.publish import Release, _refuse_granted

# -- time ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[timedelta]:
    """Whoever comes next waits so long for the workspace's lock."""
    clock, wait, real = [datetime.now(UTC)], [timedelta()], grant_book.locked

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return clock[0].astimezone(tz)

    @contextmanager
    def locked(path: Path) -> Iterator[None]:
        with real(path):
            clock[0] += wait[0]
            yield

    for module in (grant_book, grant_deliver, grants):
        monkeypatch.setattr(module, "datetime", Clock)
    monkeypatch.setattr(grant_book, "locked", locked)
    return wait


def test_a_grant_that_ends_while_its_delivery_waits(desk: Desk, waits: list[timedelta]) -> None:
    """Another delivery may take hours; the time is read once it is one's turn."""
    grant = desk.granted(days=1)
    waits[0] = timedelta(days=2)
    with pytest.raises(SteelyardError, match="expired"):
        desk.deliver(grant.id, desk.root / "copy")
    assert not (desk.root / "copy").exists()


# -- two reviews, and only real ones ---------------------------------------------------------------------------------


def test_nothing_is_marked_on_reviews_of_strangers(desk: Desk) -> None:
    """A desk that was its own reviewers; the trust file knows others."""
    grant = desk.granted()
    desk.chain.people(witnesses=["fay.pub.pem"], grants=GRANTS | {"reviewers": ["carol.pub.pem", "eve.pub.pem"]})
    with desk.book() as book, pytest.raises(SteelyardError, match="wants 2 approvals, here are 1"):
        mark_only(book, grant.id, desk.bundle, desk.root / "marked", mark=desk.mark, trust=desk.trust)
    with pytest.raises(SteelyardError, match="wants 2 approvals, here are 1"):
        desk.deliver(grant.id, desk.root / "copy")
    assert not {"marked", "delivering"} & set(desk.kinds())


def test_nothing_is_marked_on_other_reviews_than_those_committed(desk: Desk) -> None:
    grant = desk.granted()
    (issue_folder(desk, grant.id) / "review-2.dsse.json").unlink()
    with desk.book() as book, pytest.raises(SteelyardError, match="was not made on the reviews"):
        mark_only(book, grant.id, desk.bundle, desk.root / "marked", mark=desk.mark, trust=desk.trust)
    assert "marked" not in desk.kinds()


# -- what may not go out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("end", "says"), [("revoked", "was revoked"), ("expired", "expired at")])
def test_the_publics_copy_is_not_published_after_its_end(desk: Desk, end: str, says: str) -> None:
    grant = desk.granted(desk.sealed(public=True))
    with desk.book() as book:
        mark_only(book, grant.id, desk.bundle, desk.root / "marked", mark=desk.mark, trust=desk.trust)
        weights = book.events("marked")[-1].payload["marked"]
    release = Release("tiny", "2" * 64, weights, (), ())
    now = datetime.now(UTC)
    with desk.chain.ledger() as ledger:
        _refuse_granted(release, ledger, now)
    if end == "revoked":
        revoked(desk, grant.id)
    with desk.chain.ledger() as ledger, pytest.raises(SteelyardError, match=says):
        _refuse_granted(release, ledger, now if end == "revoked" else grant.expires)


def test_a_copy_of_a_withdrawn_release(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trust file names a list of withdrawn releases: what comes from one of them does not verify."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    grant = desk.granted()
    copy = desk.deliver(grant.id, desk.root / "copy")
    entries, now = [entry(manifest=grant.wanted.manifest, weights="0" * 64)], datetime.now(UTC)
    dates = {"issued": stamp(now - timedelta(minutes=1)), "expires": stamp(now + timedelta(days=1))}
    for what in ([], entries):
        people = Verifier(tmp_path)
        listed = replace(people.trust.withdrawal, source=people.put(content(what, name=f"of-{len(what)}", **dates)))
        found = verify_copy(copy.place, replace(desk.trust, withdrawal=listed))
        assert found.ok == (not what), found.findings
    assert [finding.code for finding in found.findings] == ["withdrawn"]


# -- who asked -------------------------------------------------------------------------------------------------------


def test_a_receipt_is_forgotten_with_who_signed_it(desk: Desk, tmp_path: Path) -> None:
    """It holds the id of the recipient's key, which he may use elsewhere."""
    new_key(tmp_path, "ada", PASSPHRASE)
    grant = desk.granted(desk.sealed(signs_with=(tmp_path / "ada.pub.pem").read_text()))
    desk.deliver(grant.id, tmp_path / "copy")
    mine = load_signer(tmp_path, "ada", PASSPHRASE)
    (tmp_path / "receipt.json").write_bytes(receipt(verify_copy(tmp_path / "copy", desk.trust), mine))
    keyid = str(mine.public_key.keyid).encode()

    def known() -> list[str]:
        files = [path for path in desk.root.rglob("*") if path.is_file()]
        return [path.name for path in files if keyid in path.read_bytes()]

    with desk.book() as book:
        check_receipt(book, tmp_path / "receipt.json", desk.identity)
    assert known() == ["receipt.dsse.json"]
    revoked(desk, grant.id)
    with desk.book() as book:
        forget(book, grant.request)
    assert known() == []


def test_others_on_the_machine_see_nothing(desk: Desk, tmp_path: Path) -> None:
    """Neither what the desk keeps, nor a copy that names whoever lets it out."""
    box = X25519PrivateKey.generate()
    grant = desk.granted(desk.sealed(encrypts_to=public_pem(box)))
    desk.deliver(grant.id, desk.root / "sealed-copy")
    unpack(desk.root / "sealed-copy", box, tmp_path / "mine")
    plain = desk.granted(desk.sealed(email="b@example.org"))
    desk.deliver(plain.id, desk.root / "copy")
    with desk.book() as book:
        mark_only(book, plain.id, desk.bundle, desk.root / "marked", mark=desk.mark, trust=desk.trust)
    for folder in ("grants", "copy", "marked"):
        assert (desk.root / folder).stat().st_mode & 0o077 == 0, folder
    assert (tmp_path / "mine").stat().st_mode & 0o077 == 0


# -- framing ---------------------------------------------------------------------------------------------------------


def test_a_copy_that_never_left_the_desk_is_said_to(desk: Desk, tmp_path: Path) -> None:
    """Marked to be measured, leaked by who did that: the recipient had nothing."""
    grant = desk.granted()
    with desk.book() as book:
        mark_only(book, grant.id, desk.bundle, tmp_path / "marked", mark=desk.mark, trust=desk.trust)
        found = name_grant(book, tmp_path / "marked", desk.bundle, desk.mark)
    assert json.loads(found.to_json())["named"][0]["delivered"] is None
    assert "never delivered" in found.to_markdown()
    desk.deliver(grant.id, tmp_path / "copy")
    with desk.book() as book:
        found = name_grant(book, tmp_path / "copy", desk.bundle, desk.mark)
        assert json.loads(found.to_json())["named"][0]["delivered"] == book.events("delivered")[0].time
    assert "never delivered" not in found.to_markdown()


# -- files of strangers ----------------------------------------------------------------------------------------------


def sparse(version: str) -> bytes:
    """A tar of a few hundred bytes, of one file that has 64 MiB."""
    info = tarfile.TarInfo("LICENSE")
    if version == "old":
        info.type = tarfile.GNUTYPE_SPARSE
        block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        block[386 : 386 + 24] = b"00000000000\x0000000000000\x00"
        block[483 : 483 + 12] = (1 << 26).to_bytes(12, "big")
        block[483] |= 0x80
        block[148:156] = b" " * 8
        block[148:156] = f"{sum(block):06o}\0 ".encode()
        return bytes(block) + bytes(1024)
    info.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 26), "GNU.sparse.numblocks": "1"}
    return info.tobuf(tarfile.PAX_FORMAT) + bytes(1024)


@pytest.mark.parametrize("version", ["old", "pax"])
def test_a_sealed_file_that_holds_much_of_nothing(tmp_path: Path, version: str) -> None:
    """Whoever has the recipient's public key could fill his disk, were it a petabyte."""
    box, data = X25519PrivateKey.generate(), sparse(version)
    with tarfile.open(fileobj=io.BytesIO(data), mode="r|") as tar:
        assert next(iter(tar)).size == 1 << 26
    (tmp_path / "sealed").write_bytes(seal(data, box.public_key()))
    with pytest.raises(FormatError, match="not a file that a copy holds"):
        unpack(tmp_path / "sealed", box, tmp_path / "mine")


def test_what_was_not_looked_at_in_a_copy(desk: Desk) -> None:
    """Files behind more folders than anybody looks into were not listed, and the copy was checked all the same."""
    grant = desk.granted()
    desk.deliver(grant.id, desk.root / "copy")
    for number in range(2_100):
        (desk.root / "copy" / "zz" / f"d{number}").mkdir(parents=True)
        (desk.root / "copy" / "zz" / f"d{number}" / "install.sh").write_text("sh\n") if number > 2_000 else None
    found = verify_copy(desk.root / "copy", desk.trust)
    assert [one.code for one in found.findings][:1] == ["added"]
    assert not found.ok


def _headers(kind: str) -> bytes:
    """Headers that make the reader of a tar fail otherwise than with an error of its own."""
    info = tarfile.TarInfo("LICENSE")
    if kind in ("long header", "all of it"):  # bytes that tarfile would hold in memory
        info.type, info.size = tarfile.XHDTYPE, 1 << 20 if kind == "long header" else 8 << 30
        return info.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 21)
    if kind == "nested":
        info.type = tarfile.GNUTYPE_LONGNAME
        return info.tobuf(tarfile.GNU_FORMAT) * 2000
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = ((1 << 96) - 700).to_bytes(12, "big") if kind == "negative" else b"\x80\x00\x00" + b"\x7f" * 9
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block) + bytes(2048)


@pytest.mark.parametrize("kind", ["nested", "negative", "enormous", "long header", "all of it"])
def test_a_sealed_tar_with_hostile_headers(tmp_path: Path, kind: str) -> None:
    box = X25519PrivateKey.generate()
    (tmp_path / "sealed").write_bytes(seal(_headers(kind), box.public_key()))
    with pytest.raises(FormatError, match="sealed: "):
        unpack(tmp_path / "sealed", box, tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["sealed"]


def test_a_strangers_list_is_not_worked_off(granting: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing large is hashed before somebody whom the verifier trusts has signed what is listed."""
    desk = granting.copy(tmp_path / "desk")
    copies = Copies(desk, desk.deliver(desk.granted().id, tmp_path / "copy").place)
    copies.remake(by="fay")
    monkeypatch.setattr(identity, "_hash_range", lambda *_: pytest.fail("the weights are hashed"))
    monkeypatch.setattr(identity, "_hash_file", lambda *_: pytest.fail("the weights are hashed"))
    found = verify_copy(copies.folder, desk.trust)
    assert any("none of yours" in finding.message for finding in found.findings)
    (copies.folder / STATEMENT).unlink()
    assert [one.code for one in verify_copy(copies.folder, desk.trust).findings] == ["missing"]
