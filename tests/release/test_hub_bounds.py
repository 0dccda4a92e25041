"""A Hub whose answers never end costs bounded memory, questions and time, and is told of in words."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_routes import Handler
from hub_server import Fault, Repository
from publishing import Hub, There, send, served_hub, to_damage, whole

from steelyard.base.errors import SteelyardError
from steelyard.base.progress import Silent
from steelyard.release import hub_bounds
from steelyard.release.hub_client import HubClient

pytest.importorskip("huggingface_hub")

MODEL = "GET /api/models/org/tiny"
DRIPS = {
    "status": "HTTP/1.1 2",
    "head": "HTTP/1.1 200 OK\r\nX-Long: a",
    "body": 'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{"id":"a',
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with served_hub(tmp_path / "hub", monkeypatch) as server:
        made = Repository(private=True)
        made.commit({}, "initial commit")
        server.repositories["org/tiny"] = made
        yield server


def look(seconds: float = 10) -> str:
    """What `look` raises. It must not take so many `seconds`."""
    with HubClient("org/tiny", Silent()) as client:
        begun = time.monotonic()
        with pytest.raises(SteelyardError) as raised:
            client.look()
        assert time.monotonic() - begun < seconds
    return str(raised.value)


@pytest.mark.parametrize("headers", [{}, {"Content-Encoding": "gzip"}], ids=["plain", "gzip"])
@pytest.mark.parametrize("on", [MODEL, "/tree/", "/refs"])
def test_an_answer_without_end_is_left(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, on: str, headers: dict[str, str]
) -> None:
    monkeypatch.setattr(hub_bounds, "ANSWER_LIMIT", 3_000_000)
    hub.faults.append(Fault(on, "endless", text='{"id":"a', headers=headers, times=100))
    assert "answers over 3,000,000 bytes" in look()
    assert sum(on in one for one in hub.asked) == 1


def test_gzip_in_gzip_is_not_unpacked(hub: Hub) -> None:
    hub.faults.append(Fault(MODEL, "endless", text="a", headers={"Content-Encoding": "gzip, gzip"}))
    assert "encoding 'gzip, gzip'" in look()


@pytest.mark.parametrize("what", DRIPS)
def test_an_answer_a_byte_at_a_time_has_an_end(hub: Hub, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setattr(hub_bounds, "TOTAL", 0.5)
    hub.faults.append(Fault(MODEL, "drip", text=DRIPS[what], times=100))
    before = threading.active_count()
    assert "no whole answer within 0.5 s" in look(3)
    # What waited for it is no longer there: it would keep the process from ending, where it is one of the library's.
    deadline = time.monotonic() + 3
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before


@pytest.mark.parametrize(
    ("each", "said"), [(50, "over 200 files and folders"), (0, "over 20 pages")], ids=["full", "empty"]
)
def test_pages_without_end_are_left(hub: Hub, monkeypatch: pytest.MonkeyPatch, each: int, said: str) -> None:
    monkeypatch.setattr(hub_bounds, "MAX_ENTRIES", 200)
    monkeypatch.setattr(hub_bounds, "MAX_QUESTIONS", 20)

    def tree(self: Any, name: str, revision: str) -> Any:
        page = len(hub.asked)
        entries = [{"type": "file", "path": f"{page}-{n}", "size": 1, "oid": "0" * 40} for n in range(each)]
        return entries, {"Link": f'<{hub.url}/api/models/{name}/tree/{revision}?cursor={page}>; rel="next"'}

    monkeypatch.setattr(Handler, "tree", tree)
    assert said in look()
    assert len(hub.asked) < 30


def test_sending_takes_as_long_as_it_gets_on(
    released: There, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer in all than a call may stand still, which is counted from the last piece sent."""
    there = to_damage(released, tmp_path / "chain")
    hub.repositories.clear()
    monkeypatch.setattr(hub_bounds, "TOTAL", 1.0)
    rounds = []

    def upload(self: Any, *repository: str, additions: Any, **more: Any) -> None:
        if not rounds:
            begun = time.monotonic()
            while time.monotonic() - begun < 1.5:
                for addition in additions:
                    addition.path_or_fileobj.read(1)
                    addition.path_or_fileobj.seek(0)
                time.sleep(0.1)
        rounds.append(1)
        real(self, *repository, additions=additions, **more)

    import huggingface_hub

    real = huggingface_hub.HfApi.preupload_lfs_files
    monkeypatch.setattr(huggingface_hub.HfApi, "preupload_lfs_files", upload)
    assert send(there).destination
    whole(hub, there, tmp_path)
