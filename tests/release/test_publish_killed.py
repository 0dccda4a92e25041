"""kill -9 while publishing, to a folder and to the Hub: nothing half-published verifies, the same command completes."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from hub_server import WRITE, HubServer
from killing import MOMENTS, Killable, spread
from publishing import There, listing, to_damage

pytest.importorskip("huggingface_hub")


@pytest.fixture
def there(released: There, tmp_path: Path) -> There:
    return to_damage(released, tmp_path / "chain")


def command(there: There, to: object) -> list[object]:
    chain, bundle = there
    place = ["--key", chain.public, "--policy", chain.policy_file, "--workspace", chain.root]
    return ["publish", bundle, "--to", to, *place]


def whole_or_not(there: There, folder: Path) -> bool:
    """Whether it verifies, which only what is whole may."""
    ok: bool = folder.is_dir() and there[0].verify(folder).ok
    assert not ok or listing(folder) == listing(there[1])
    return ok


def test_killed_while_publishing_to_a_folder(killable: Killable, there: There, tmp_path: Path) -> None:
    """At some of the moments at which it changes or reads something there."""
    mark = "site-"
    killable.start(*command(there, tmp_path / "site-0"), watch=mark)
    assert killable.end() == 0, killable.said()
    steps = int(killable.said().rsplit("seen ", 1)[1])
    assert steps > MOMENTS
    kept = 0
    for number, moment in enumerate(spread(steps), 1):
        out = tmp_path / f"site-{number}"
        killable.start(*command(there, out), watch=mark, die=moment)
        assert killable.end() == -signal.SIGKILL
        partial = out.with_name(f".{out.name}.partial")
        assert not out.exists() or whole_or_not(there, out)
        whole_or_not(there, partial)
        kept += (partial / "model.safetensors").exists()
        killable.start(*command(there, out))
        assert killable.end() == 0, killable.said()
        assert whole_or_not(there, out)
        assert not partial.exists()
    assert kept >= 3, "no kill struck while it copied"
    with there[0].ledger() as ledger:
        assert ledger.verify()
        assert {event.payload["destination"] for event in ledger.events("release.publishing")} == {
            event.payload["destination"] for event in ledger.events("release.published")
        }


def test_killed_while_publishing_to_the_hub(killable: Killable, there: There, tmp_path: Path) -> None:
    """At the moment of some of its requests, which the server then still carries out."""
    with HubServer(tmp_path / "hub", part=20_000) as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITE}
        killable.start(*command(there, "hf://org/first"), **env)
        assert killable.end() == 0, killable.said()
        requests = len([request for request in hub.asked if "harnesses" not in request])
        unsigned = 0
        for number, moment in enumerate(spread(requests), 1):
            name = f"org/tiny-{number}"
            for sent in list((tmp_path / "hub" / "lfs").iterdir()):
                sent.rename(tmp_path / "hub" / f"{number}-{sent.name}")  # large files are to be sent again
            state: dict[str, Any] = {"count": 0, "pid": None}

            def strike(request: str, state: dict[str, Any] = state, moment: int = moment) -> None:
                if "harnesses" in request:
                    return
                with hub.lock:
                    state["count"] += 1
                    strikes = state["count"] == moment
                while strikes and state["pid"] is None:
                    time.sleep(0.001)
                if strikes:
                    os.kill(state["pid"], signal.SIGKILL)

            hub.on_request = strike
            state["pid"] = killable.start(*command(there, f"hf://{name}"), **env)
            code = killable.end()
            hub.on_request = None
            assert code == -signal.SIGKILL
            time.sleep(0.05)  # what was under way at the server
            if name in hub.repositories:
                repository = hub.repositories[name]
                verifies = whole_or_not(there, hub.checkout(name, tmp_path / "found"))
                assert verifies or repository.private
                unsigned += not verifies and len(repository.commits) > 1
            killable.start(*command(there, f"hf://{name}"), **env)
            assert killable.end() == 0, killable.said()
            assert whole_or_not(there, hub.checkout(name, tmp_path / "found"))
            assert not hub.repositories[name].private
            assert len(hub.repositories[name].commits) == 3
            assert len(hub.repositories[name].tags) == 1
        assert unsigned >= 1, "no kill struck between the content and what signs"


@pytest.mark.parametrize("to", ["folder", "hub"])
def test_killed_at_random_times(to: str, killable: Killable, there: There, tmp_path: Path) -> None:
    with HubServer(tmp_path / "hub") as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITE}

        def destination(number: int) -> str:
            return str(tmp_path / f"out-{number}") if to == "folder" else f"hf://org/out-{number}"

        began = time.monotonic()
        killable.start(*command(there, destination(0)), **env)
        assert killable.end() == 0, killable.said()
        whole_time, chance = time.monotonic() - began, random.Random(6)
        for number in range(1, 7):
            pid = killable.start(*command(there, destination(number)), **env)
            time.sleep(chance.uniform(0.3, 0.95) * whole_time)
            with contextlib.suppress(ProcessLookupError):  # it was faster than before
                os.kill(pid, signal.SIGKILL)
            assert killable.end() in (0, -signal.SIGKILL)
            time.sleep(0.02)
            name = f"org/out-{number}"
            if to == "folder":
                out = tmp_path / f"out-{number}"
                assert not out.exists() or whole_or_not(there, out)
                whole_or_not(there, out.with_name(f".{out.name}.partial"))
            elif name in hub.repositories:
                assert whole_or_not(there, hub.checkout(name, tmp_path / "found")) or hub.repositories[name].private
            killable.start(*command(there, destination(number)), **env)
            assert killable.end() == 0, killable.said()
            done = tmp_path / f"out-{number}" if to == "folder" else hub.checkout(name, tmp_path / "found")
            assert whole_or_not(there, done)
