"""Data sets on the Hub: the files asked for and no others, kept by commit, wrong sources named."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.base.progress import Silent
from steelyard.hub.sources import fetch_data

COMMIT = "a" * 40
ROW = json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]})
FILES = {
    "data/train-0.jsonl": ROW.encode(),
    "data/train-1.jsonl": ROW.encode(),
    "data/test.jsonl": b"no",
    "x.py": b"evil",
}


class Hub(BaseHTTPRequestHandler):
    asked: list[str]

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.asked.append(path)
        if path.startswith("/api/datasets/org/name/tree/"):
            listing = [{"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                       for name, data in FILES.items()]  # fmt: skip
            self.answer(json.dumps(listing).encode(), {})
        elif path.startswith("/api/datasets/org/name"):
            siblings = [{"rfilename": name} for name in FILES]
            self.answer(json.dumps({"id": "org/name", "sha": COMMIT, "siblings": siblings}).encode(), {})
        elif path.startswith(f"/datasets/org/name/resolve/{COMMIT}/"):
            data = FILES[path.removeprefix(f"/datasets/org/name/resolve/{COMMIT}/")]
            self.answer(data, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})
        else:
            self.send_error(404)

    def answer(self, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in ({"Content-Length": str(len(data)), "Content-Type": "application/json"} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    pytest.importorskip("huggingface_hub")
    mine = type("Mine", (Hub,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), mine)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield mine
    server.shutdown()
    server.server_close()


def test_the_files_asked_for_and_no_others(hub: type[Hub], tmp_path: Path) -> None:
    source = "hf://datasets/org/name@main/data/train-*.jsonl"
    found = fetch_data(source, tmp_path, Silent())
    assert sorted(path.relative_to(found).as_posix() for path in found.rglob("*") if path.is_file()) == [
        "data/train-0.jsonl", "data/train-1.jsonl",
    ]  # fmt: skip
    assert not [path for path in hub.asked if path.endswith(("x.py", "test.jsonl"))]
    hub.asked.clear()
    assert fetch_data(source.replace("main", COMMIT), tmp_path, Silent()) == found
    assert hub.asked == []


def test_conversations_come_straight_from_it(hub: type[Hub], tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from steelyard.train.conversations import read_conversations

    assert len(read_conversations(f"hf://datasets/org/name@{COMMIT}/data/train-*.jsonl", cache=tmp_path)) == 2


def test_what_is_not_there(hub: type[Hub], tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="has no such file"):
        fetch_data("hf://datasets/org/name@main/none.jsonl", tmp_path, Silent())
    with pytest.raises(SteelyardError, match="the hub could not be read"):
        fetch_data("hf://datasets/org/other@main/a.jsonl", tmp_path, Silent())


@pytest.mark.parametrize(
    "source",
    [
        "hf://datasets/org/name@main", "hf://datasets/org/name@main/", "hf://datasets/org/name/a.jsonl",
        "hf://datasets/org/name@main/../a.jsonl", "hf://datasets/org/name@main/a/../../b.jsonl",
        "hf://datasets/org/name@main/a.py", "hf://datasets/org/name@main/a.bin", "hf://datasets/org/name@main//a.jsonl",
    ],
)  # fmt: skip
def test_sources_that_are_written_wrongly(tmp_path: Path, source: str) -> None:
    with pytest.raises(UsageError, match=r"must be hf://datasets|of these kinds"):
        fetch_data(source, tmp_path, Silent())
