"""What we published is taken down: folders give way to the notice, repositories on the Hub are closed."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from test_withdraw import forked
from withdrawing import entry

from steelyard.base.canonical import sha256_hex
from steelyard.ledger.ledger import Ledger
from steelyard.release.notice import Notice
from steelyard.release.takedown import Taken, take_down

MANIFEST = b'{"files":[],"format":2}\n'
ENTRY = entry(manifest=sha256_hex(MANIFEST))
NOTICE = Notice(ENTRY, "example", 1, ENTRY.time)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    with Ledger(tmp_path / "ledger.sqlite") as made:
        return made


def published(ledger: Ledger, place: Path | str, manifest: str = ENTRY.manifest, kind: str = "published") -> None:
    ledger.append(f"release.{kind}", {"destination": str(place), "manifest": manifest})


def put(place: Path, manifest: bytes = MANIFEST) -> Path:
    (place / "steelyard").mkdir(parents=True)
    (place / "steelyard" / "manifest.json").write_bytes(manifest)
    (place / "model.safetensors").write_bytes(b"weights")
    return place


def take(ledger: Ledger, tmp_path: Path, **more: Any) -> list[Taken]:
    return take_down(NOTICE, ledger, tmp_path / "aside", **more)


def files(place: Path) -> set[str]:
    return {path.name for path in place.iterdir()}


def test_a_folder_gives_way_to_the_notice_and_its_weights_are_kept_aside(ledger: Ledger, tmp_path: Path) -> None:
    place = put(tmp_path / "site" / "wizard")
    published(ledger, place)
    (taken,) = take(ledger, tmp_path)
    assert taken.done
    assert files(place) == {"README.md", "index.html", "WITHDRAWN.json"}
    assert "the toxicity test was missed" in (place / "index.html").read_text()
    aside = tmp_path / "aside" / f"wizard-{ENTRY.manifest[:16]}"
    assert (aside / "model.safetensors").read_bytes() == b"weights"
    assert aside.stat().st_mode & 0o077 == 0
    assert str(aside) in taken.what
    assert [event.payload["destination"] for event in ledger.events("release.taken_down")] == [str(place)]
    assert take(ledger, tmp_path) == []


def test_what_is_put_back_is_taken_down_again(ledger: Ledger, tmp_path: Path) -> None:
    place = put(tmp_path / "wizard")
    published(ledger, place)
    take(ledger, tmp_path)
    shutil.rmtree(place)
    put(place)
    assert [one.done for one in take(ledger, tmp_path)] == [True]
    assert (place / "index.html").is_file()
    assert len(list((tmp_path / "aside").iterdir())) == 2


def test_on_demand_the_weights_are_deleted(ledger: Ledger, tmp_path: Path) -> None:
    place = put(tmp_path / "wizard")
    published(ledger, place)
    (taken,) = take(ledger, tmp_path, delete=True)
    assert taken.done
    assert not list(tmp_path.rglob("model.safetensors"))
    assert (place / "index.html").is_file()


def test_what_was_half_published_goes_too(ledger: Ledger, tmp_path: Path) -> None:
    partial = put(tmp_path / ".wizard.partial")
    published(ledger, tmp_path / "wizard", kind="publishing")
    (taken,) = take(ledger, tmp_path)
    assert taken.done
    assert not partial.exists()
    assert (tmp_path / "wizard" / "index.html").is_file()
    assert len(list((tmp_path / "aside").rglob("model.safetensors"))) == 1


def test_what_holds_something_else_by_now_is_left_alone(ledger: Ledger, tmp_path: Path) -> None:
    other = put(tmp_path / "other", b"{}")
    link = tmp_path / "link"
    link.symlink_to(put(tmp_path / "elsewhere"))
    for place in (other, link):
        published(ledger, place)
    taken = take(ledger, tmp_path)
    assert [one.done for one in taken] == [False, False]
    assert (other / "model.safetensors").is_file()
    assert (link / "model.safetensors").is_file()
    assert ledger.events("release.taken_down") == []


def test_other_releases_stay(ledger: Ledger, tmp_path: Path) -> None:
    place = put(tmp_path / "good", b"{}")
    published(ledger, place, sha256_hex(b"{}"))
    assert take(ledger, tmp_path) == []
    assert (place / "model.safetensors").is_file()


def test_a_place_on_another_disk_is_closed_beside_it(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    place, rename = put(tmp_path / "site" / "wizard"), os.rename

    def across(source: Any, target: Any) -> None:
        if Path(target).is_relative_to(tmp_path / "aside"):
            raise OSError(errno.EXDEV, "another disk")
        rename(source, target)

    monkeypatch.setattr(os, "rename", across)
    published(ledger, place)
    (taken,) = take(ledger, tmp_path)
    assert taken.done
    (kept,) = (tmp_path / "site").glob(".wizard.withdrawn-*")
    assert (kept / "model.safetensors").is_file()
    assert kept.stat().st_mode & 0o077 == 0
    assert str(kept) in taken.what


def test_killed_between_its_steps_the_next_call_completes(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    for delete in (False, True):
        for stop_at in range(1, 6):
            root = tmp_path / f"{stop_at}-{delete}"
            place = put(root / "site" / "wizard")
            published(ledger, place)

            def act(root: Path = root, stop_at: int = stop_at, delete: bool = delete) -> None:
                rename, count = os.rename, 0

                def stepping(source: Any, target: Any) -> None:
                    nonlocal count
                    for after in (False, True):
                        count += 1
                        if count == stop_at:
                            os.kill(os.getpid(), signal.SIGKILL)
                        if not after:
                            rename(source, target)

                monkeypatch.setattr(os, "rename", stepping)
                take(ledger, root, delete=delete)

            os.waitpid(forked(act), 0)
            take(ledger, root, delete=delete)
            assert files(place) == {"README.md", "index.html", "WITHDRAWN.json"}
            assert len(list(root.rglob("model.safetensors"))) == (0 if delete else 1)
            assert not list((root / "site").glob("wizard/steelyard"))


# -- the Hub ---------------------------------------------------------------------------------------------------------


class Hub:
    """The two calls that taking down makes, as the Hub answers them."""

    def __init__(self) -> None:
        self.settings: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.order: list[str] = []
        self.status = 200
        self.url = ""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        path = request.path
        if path.startswith("/api/models/"):
            self.tokens.add(request.headers.get("Authorization"))
        if self.status != 200:
            self.reply(request, self.status, {"error": "refused"})
        elif request.command == "PUT" and path == "/api/models/org/wizard/settings":
            self.order.append("settings")
            self.settings.append(json.loads(body))
            self.reply(request, 200, {})
        elif path == "/api/models/org/wizard/preupload/main":
            sent = json.loads(body)["files"]
            told = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in sent]
            self.reply(request, 200, {"files": told})
        elif path == "/api/models/org/wizard/commit/main":
            self.order.append("commit")
            for line in body.splitlines():
                one = json.loads(line)
                if one["key"] == "file":
                    self.files[one["value"]["path"]] = base64.b64decode(one["value"]["content"])
            self.reply(request, 200, {"commitUrl": f"{self.url}/org/wizard/commit/{'0' * 40}", "commitOid": "0" * 40})
        elif path.startswith("/api/validate-yaml"):
            self.reply(request, 200, {"errors": [], "warnings": []})
        else:
            self.reply(request, 404, {"error": f"no {request.command} {path}"})

    @staticmethod
    def reply(request: BaseHTTPRequestHandler, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)


@contextmanager
def serving(hub: Hub) -> Iterator[None]:
    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            hub.answer(self)

        do_GET = do_POST = do_PUT = handle_any  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    pytest.importorskip("huggingface_hub")
    made = Hub()
    with serving(made):
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield made


@pytest.mark.parametrize(
    ("access", "setting"), [("private", {"visibility": "private"}), ("gated", {"gated": "manual"})]
)
def test_a_repository_is_closed_first_and_then_shows_the_notice(
    hub: Hub, ledger: Ledger, tmp_path: Path, access: Any, setting: dict[str, str]
) -> None:
    published(ledger, "hf://org/wizard")
    (taken,) = take(ledger, tmp_path, access=access)
    assert taken.done, taken
    assert hub.order == ["settings", "commit"]
    assert hub.settings in ([setting], [{"private": True}] if access == "private" else [])  # by the library's version
    assert set(hub.files) == {"README.md"}
    assert b"# Withdrawn: wizard" in hub.files["README.md"]
    assert hub.tokens == {"Bearer hf_secret"}
    assert take(ledger, tmp_path, access=access) == []
    assert hub.order == ["settings", "commit"]


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_a_hub_that_refuses_is_reported_and_tried_again_by_the_next_call(
    hub: Hub, ledger: Ledger, tmp_path: Path, status: int
) -> None:
    published(ledger, "hf://org/wizard")
    hub.status = status
    (taken,) = take(ledger, tmp_path)
    assert not taken.done
    assert str(status) in taken.what
    assert "hf_secret" not in taken.what
    hub.status = 200
    assert [one.done for one in take(ledger, tmp_path)] == [True]


def test_a_hub_that_is_not_there_is_reported(hub: Hub, ledger: Ledger, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    published(ledger, "hf://org/wizard")
    (taken,) = take(ledger, tmp_path)
    assert not taken.done
    assert "cannot be reached" in taken.what


def test_a_repository_with_a_later_good_release_is_left_to_a_person(hub: Hub, ledger: Ledger, tmp_path: Path) -> None:
    published(ledger, "hf://org/wizard")
    published(ledger, "hf://org/wizard", "0" * 64)
    (taken,) = take(ledger, tmp_path)
    assert not taken.done
    assert "later release" in taken.what
    assert hub.order == []
