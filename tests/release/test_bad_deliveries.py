"""Receipts that are not what they should be; deliveries at once, and without room."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_grants import flipped
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from forging import set_subject, statement_of
from granting import Desk, public_pem
from scenario import PASSPHRASE

from steelyard.base.canonical import canonical_json
from steelyard.base.errors import SteelyardError
from steelyard.release.attest import sign
from steelyard.release.grant_transport import check_receipt, receipt
from steelyard.release.grant_verify import verify_copy
from steelyard.release.keys import load_signer, new_key

HERE = Path(__file__).resolve().parent


def copies(desk: Desk) -> list[Path]:
    """What lies about that is a copy in the eyes of `verify`."""
    homes = [home.parent for home in desk.root.rglob("steelyard/copy.dsse.json")]
    return [folder for folder in homes if verify_copy(folder, desk.trust).ok]


# -- receipts --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def received(granting: Desk, tmp_path_factory: pytest.TempPathFactory) -> tuple[Desk, Path]:
    """A desk that delivered, and the recipient's folder with his key and receipt. Read only."""
    home = tmp_path_factory.mktemp("received")
    desk = granting.copy(home / "desk")
    new_key(home, "ada", PASSPHRASE)
    grant = desk.granted(desk.sealed(signs_with=(home / "ada.pub.pem").read_text()))
    desk.deliver(grant.id, home / "copy")
    word = receipt(verify_copy(home / "copy", desk.trust), load_signer(home, "ada", PASSPHRASE))
    (home / "receipt.json").write_bytes(word)
    return desk, home


def _another(desk: Desk) -> str:
    return desk.granted(desk.sealed(email="b@example.org")).id


RECEIPTS: dict[str, tuple[Callable[[Desk, Any], Any], str]] = {
    "of an unknown grant": (lambda _, s: s["predicate"].update(grant="g-" + "0" * 16), "not in this workspace"),
    "of another's grant": (lambda d, s: s["predicate"].update(grant=_another(d)), "names no key|none of yours"),
    "of an id that is a path": (lambda _, s: s["predicate"].update(grant="../../x"), "grant"),
    "under another licence": (lambda _, s: s["predicate"].update(licence="0" * 64), "another licence"),
    "of other weights": (lambda _, s: set_subject(s, "weights", "0" * 64), "never delivered"),
    "of another copy": (lambda _, s: set_subject(s, "copy", "0" * 64), "never delivered"),
    "of more": (lambda _, s: s["subject"].append({"name": "x", "digest": {"sha256": "0" * 64}}), "never delivered"),
    "with more to say": (lambda _, s: s["predicate"].update(refund=True), "refund"),
    "that is a review": (lambda _, s: s.update(predicateType="steelyard:grant-review/v1"), "predicateType"),
    "without a time": (lambda _, s: s["predicate"].pop("signed"), "signed"),
    "of no time": (lambda _, s: s["predicate"].update(signed="soon"), "signed"),
}


@pytest.mark.parametrize("name", RECEIPTS)
def test_a_receipt_is_refused(received: tuple[Desk, Path], tmp_path: Path, name: str) -> None:
    """Signed by the recipient's own key, and not for what he got."""
    desk, home = received[0].copy(tmp_path / "desk"), received[1]
    change, says = RECEIPTS[name]
    statement = statement_of(home / "receipt.json")
    change(desk, statement)
    path = tmp_path / "receipt.json"
    path.write_bytes(sign(canonical_json(statement), load_signer(home, "ada", PASSPHRASE)))
    with desk.book() as book, pytest.raises(SteelyardError, match=says):
        check_receipt(book, path, desk.identity)
    assert "received" not in desk.kinds()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (flipped, "receipt.json"),
        (lambda path: path.write_bytes(b""), "receipt.json"),
        (lambda path: path.write_bytes(b"[" * 100_000), "receipt.json"),
        (lambda path: path.write_bytes(b" " * 10_000_000), "receipt.json"),
        (lambda path: path.write_bytes(_other_signature(path)), "signature|none of yours"),
    ],
)
def test_a_receipt_that_was_damaged(
    received: tuple[Desk, Path], tmp_path: Path, damage: Callable[[Path], Any], says: str
) -> None:
    desk, path = received[0].copy(tmp_path / "desk"), tmp_path / "receipt.json"
    shutil.copyfile(received[1] / "receipt.json", path)
    damage(path)
    with desk.book() as book, pytest.raises(SteelyardError, match=says):
        check_receipt(book, path, desk.identity)
    assert "received" not in desk.kinds()


def _other_signature(path: Path) -> bytes:
    envelope = json.loads(path.read_bytes())
    signature = envelope["signatures"][0]["sig"]
    envelope["signatures"][0]["sig"] = signature[:20] + ("A" if signature[20] != "A" else "B") + signature[21:]
    return json.dumps(envelope).encode()


# -- processes -------------------------------------------------------------------------------------------------------


def command(desk: Desk, grant: str, to: Path) -> list[str]:
    whose = ["--key", "dora", "--trust", desk.trust_file, "--keys", desk.chain.keys, "--workspace", desk.root]
    given = ["grant", "deliver", grant, "--release", desk.bundle, "--to", to, *whose]
    run = f"import sys; sys.path.insert(0, {str(HERE)!r}); from steelyard.cli.main import main; main()"
    return [sys.executable, "-c", run, *map(str, given)]


ENVIRONMENT = os.environ | {"STEELYARD_PASSPHRASE": PASSPHRASE.decode(), "OMP_NUM_THREADS": "1"}


def test_two_processes_deliver_at_once(desk: Desk, tmp_path: Path) -> None:
    """Two grants to two places both arrive; the same place goes to one of them."""
    grants = [desk.granted().id, desk.granted(desk.sealed(email="b@example.org")).id]
    for places, right in (((tmp_path / "a", tmp_path / "b"), [0, 0]), ((tmp_path / "c", tmp_path / "c"), [0, 1])):
        running = [
            subprocess.Popen(command(desk, grant, to), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for grant, to in zip(grants, places, strict=True)
        ]
        said = [process.communicate()[1].decode() for process in running]
        assert sorted(process.returncode for process in running) == right, said
        assert all("Traceback" not in text for text in said)
        for place in set(places):
            assert verify_copy(place, desk.trust).ok
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "desk") == ["a", "b", "c"]
    with desk.chain.ledger() as ledger:
        assert ledger.verify()


@pytest.mark.parametrize("share", [0.1, 0.6, 0.95])
@pytest.mark.parametrize("sealed", [False, True])
def test_a_file_that_cannot_grow(desk: Desk, tmp_path: Path, share: float, sealed: bool) -> None:
    """The system refuses to write more of a file than part of the weights: said in one line, nothing is left, and then
    it can be done again."""
    key = public_pem(X25519PrivateKey.generate()) if sealed else None
    grant = desk.granted(desk.sealed(encrypts_to=key)).id
    limit = int((desk.bundle / "model.safetensors").stat().st_size * share)
    assert limit > desk.chain.root.joinpath("ledger.sqlite").stat().st_size or share < 0.5

    def bounded() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    full = subprocess.run(
        command(desk, grant, tmp_path / "copy"), env=ENVIRONMENT, preexec_fn=bounded, capture_output=True, text=True
    )
    assert full.returncode == 1, full.stderr
    assert "Traceback" not in full.stderr
    assert full.stderr.strip()
    assert [path.name for path in tmp_path.iterdir()] == ["desk"]
    assert copies(desk) == []
    assert not any((desk.root / "grants").rglob("*.safetensors"))
    done = subprocess.run(command(desk, grant, tmp_path / "copy"), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "copy").is_file() == sealed
