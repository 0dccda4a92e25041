"""kill -9 while delivering: what is left does not verify, and the same command delivers."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from granting import Desk, public_pem
from killing import Killable, spread
from scenario import PASSPHRASE

from steelyard.base.errors import SteelyardError
from steelyard.release.grant_copy import STATEMENT
from steelyard.release.grant_transport import unpack
from steelyard.release.grant_verify import verify_copy
from steelyard.release.verify import verify_bundle

pytest.importorskip("huggingface_hub")
MOMENTS = 6


@pytest.fixture(scope="module")
def killable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killable]:
    running = Killable(tmp_path_factory.mktemp("killable"))
    yield running
    running.process.kill()
    running.process.wait()


def command(desk: Desk, grant: str, to: Path) -> list[object]:
    whose = ["--key", "dora", "--trust", desk.trust_file, "--keys", desk.chain.keys, "--workspace", desk.root]
    return ["grant", "deliver", grant, "--release", desk.bundle, "--to", to, *whose]


def verifies(desk: Desk, folder: Path) -> bool:
    if not folder.is_dir():
        return False
    assert not verify_bundle(folder, trust=desk.trust).ok
    return verify_copy(folder, desk.trust).ok


@pytest.mark.parametrize("watch", ["site-", "staging"])
def test_killed_while_delivering(killable: Killable, desk: Desk, tmp_path: Path, watch: str) -> None:
    """At some of the moments at which it opens, makes, renames or removes something; sealed, in the workspace too."""
    env = {"STEELYARD_PASSPHRASE": PASSPHRASE.decode()}
    box = X25519PrivateKey.generate() if watch == "staging" else None
    sealed = desk.sealed(encrypts_to=None if box is None else public_pem(box))
    grant = desk.granted(sealed).id
    killable.start(*command(desk, grant, tmp_path / "site-0"), watch=watch, **env)
    assert killable.end() == 0, killable.said()
    steps = int(killable.said().rsplit("seen ", 1)[1])
    assert steps > MOMENTS
    torsos = 0
    for number, moment in enumerate(spread(steps, MOMENTS), 1):
        out = tmp_path / f"site-{number}"
        killable.start(*command(desk, grant, out), watch=watch, die=moment, **env)
        assert killable.end() == -signal.SIGKILL
        for place in (*tmp_path.glob(f"*site-{number}*"), desk.root / "grants" / "staging" / "copy"):
            torsos += place.is_dir() and any(place.rglob("*.safetensors"))
            if place.name != out.name and verifies(desk, place):
                # Whole, and only its name was missing: nothing of it is half-written.
                assert (place / STATEMENT).is_file()
        if out.exists() and box is None:
            assert verifies(desk, out)
        elif out.exists() and box is not None:
            assert verifies(desk, unpack(out, box, tmp_path / f"mine-{number}"))
        if out.exists():
            continue  # killed after it had its name
        killable.start(*command(desk, grant, out), **env)
        assert killable.end() == 0, killable.said()
        assert out.exists()
        assert not list((desk.root / "grants" / "staging").rglob("*.safetensors"))
    assert torsos, "no kill struck while it wrote"
    with desk.book() as book:
        assert book.ledger.verify()
        assert len({event.payload["marked"] for event in book.events("delivered")}) == 1
        assert book.grant(grant, datetime.now(UTC)).state == "delivered"


def test_a_torso_of_a_sealed_file(killable: Killable, desk: Desk, tmp_path: Path) -> None:
    """The name of the sealed file appears once it is whole; what has another name does not open."""
    env = {"STEELYARD_PASSPHRASE": PASSPHRASE.decode()}
    box = X25519PrivateKey.generate()
    grant = desk.granted(desk.sealed(encrypts_to=public_pem(box))).id
    killable.start(*command(desk, grant, tmp_path / "site-0"), watch="site-", **env)
    assert killable.end() == 0, killable.said()
    steps = int(killable.said().rsplit("seen ", 1)[1])
    opened = 0
    for moment in range(1, steps + 1):
        out = tmp_path / f"site-{moment}"
        killable.start(*command(desk, grant, out), watch="site-", die=moment, **env)
        assert killable.end() == -signal.SIGKILL
        for place in tmp_path.glob(f"*site-{moment}*"):
            try:
                unpack(place, box, tmp_path / f"mine-{moment}")
                opened += 1
            except SteelyardError:
                assert place.name != out.name
        if (tmp_path / f"mine-{moment}").exists():
            assert verifies(desk, tmp_path / f"mine-{moment}")
    assert opened
