"""A server of known answers, and the files of adapters."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from steelyard.base.canonical import canonical_json
from steelyard.scorers.base import Calibration

CALIBRATION = Calibration(
    threshold=0.5,
    true_positives=95,
    positives=100,
    true_negatives=990,
    negatives=1000,
    source="made for a test",
    measured="2026-01-01",
)


@dataclass
class Reply:
    """What the server does with one request: wait, then answer `body` (JSON, or bytes as they are)."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    wait_s: float = 0.0
    lack: int = 0  # bytes announced and never sent


@dataclass
class Asked:
    """A request that came: its path, headers and body."""

    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class Server:
    """`reply` gives the answer to a request's body; what came is kept in `asked`."""

    reply: Callable[[Any], Reply]
    url: str = ""
    asked: list[Asked] = field(default_factory=list)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[Any], Reply]], Server]]:
    """Starts servers on free ports; a client that tries again does so at once."""
    pytest.importorskip("httpx")
    from steelyard.inference import openai

    monkeypatch.setattr(openai, "BACKOFF_S", 0.01)
    running = []

    def start(reply: Callable[[Any], Reply]) -> Server:
        state = Server(reply)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                state.asked.append(Asked(self.path, dict(self.headers), body))
                answer = state.reply(body)
                time.sleep(answer.wait_s)
                data = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
                try:
                    self.send_response(answer.status)
                    headers = {"Content-Type": "application/json", "Content-Length": str(len(data) + answer.lack)}
                    for name, value in (headers | answer.headers).items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:  # the client left
                    pass
                self.close_connection = self.close_connection or bool(answer.lack)

            def log_message(self, *arguments: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        running.append((server, thread))
        state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        return state

    yield start
    for server, thread in running:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def adapter_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes `scorer.yaml` with these keys, and a calibration of `calibrated` categories that it names."""

    def write(calibrated: tuple[str, ...] = (), **keys: Any) -> Path:
        if calibrated:
            measured = {category: CALIBRATION.model_dump(mode="json") for category in calibrated}
            (tmp_path / "calibration.json").write_bytes(canonical_json({"format": 1, "categories": measured}))
            keys = {"calibration": "calibration.json", **keys}
        path = tmp_path / "scorer.yaml"
        path.write_text(yaml.safe_dump({"name": "test", **keys}, sort_keys=False))
        return path

    return write
