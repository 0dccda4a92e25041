"""A server on 127.0.0.1 that speaks the Hugging Face Hub's HTTP as far as publishing and downloading models go.

    with HubServer(folder) as hub:      # HF_ENDPOINT=hub.url, HF_TOKEN=WRITE
        hub.faults.append(Fault("PUT /lfs/", "drop"))

Large files go by Git LFS, in one request or in parts, and are hashed as they arrive; a commit is whole or not at all.
There is no xet: whoever asks for its tokens gets 404. As the real one, it makes `.gitattributes` in every repository.
"""

from __future__ import annotations

import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

from hub_routes import Handler
from hub_state import READ, WRITE, Blob, Fault, HubState, Repository

__all__ = ["READ", "WRITE", "Blob", "Fault", "HubServer", "Repository"]


class HubServer(HubState):
    """The server; a context manager."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, **options)

        class Served(Handler):
            hub = self

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Served)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> HubServer:
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.server.shutdown()
        self.server.server_close()
