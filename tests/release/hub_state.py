"""What the stand-in for the Hugging Face Hub holds: repositories with their commits, large files, faults to come."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WRITE, READ = "hf_" + "w" * 34, "hf_" + "r" * 34
LFS_NAMES = ("*.safetensors", "*.gguf", "*.bin")
ATTRIBUTES = "".join(f"{name} filter=lfs diff=lfs merge=lfs -text\n" for name in LFS_NAMES).encode()


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose `METHOD /path` holds `on`, after `skip` that go well.

    `kind`: "status" answers so (with `headers`) and does nothing; "drop" ends the connection, half-way through the
    body where there is one; "lost" does what is asked and ends the connection without an answer; "slow" waits
    `seconds` first; "ignore" answers as if all were well, and does nothing; "endless" answers with `text` and never
    ends; "drip" sends `text` for an answer and then a byte every 20 ms.
    """

    on: str
    kind: str
    times: int = 1
    skip: int = 0
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.5
    text: str = "ordered by the test"


@dataclass(frozen=True)
class Blob:
    """A file in a commit: its bytes, or the SHA-256 of a large one."""

    size: int
    data: bytes | None = None
    lfs: str | None = None

    @property
    def oid(self) -> str:
        data = self.data if self.data is not None else f"oid sha256:{self.lfs}\nsize {self.size}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repository:
    private: bool
    gated: Any = False
    commits: list[tuple[str, dict[str, Blob]]] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)  # for access, as the Hub's API gives them

    def commit(self, files: dict[str, Blob], message: str) -> str:
        oid = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits.append((oid, files))
        self.messages.append(message)
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, Blob]] | None:
        if revision == "main":
            return self.commits[-1]
        wanted = self.tags.get(revision, revision)
        return next((commit for commit in self.commits if commit[0] == wanted), None)


class HubState:
    """All that the server holds; `asked` lists every request as `METHOD /path`.

    `part`: files over so many bytes are taken in parts of that size. `regular`: texts up to so many bytes travel in the
    commit. `page`: entries of a listing that are given at a time. `on_request` is called first of all.
    """

    url = ""

    def __init__(self, folder: Path, *, part: int | None = None, regular: int = 20_000, page: int = 1000) -> None:
        self.folder, self.part, self.regular, self.page = folder, part, regular, page
        self.verified_at: str | None = None  # another host that is to say whether a large file arrived
        self.repositories: dict[str, Repository] = {}
        self.faults: list[Fault] = []
        self.asked: list[str] = []
        self.bodies: dict[str, int] = {}  # bytes of large files received whole, by SHA-256
        self.on_request: Callable[[str], object] | None = None
        self.lock = threading.RLock()
        (folder / "lfs").mkdir(parents=True, exist_ok=True)

    def stored(self, sha256: str) -> Path:
        return self.folder / "lfs" / sha256

    def files(self, name: str, revision: str = "main") -> dict[str, Blob]:
        found = self.repositories[name].at(revision)
        assert found is not None
        return found[1]

    def checkout(self, name: str, out: Path, revision: str = "main") -> Path:
        """What somebody who downloads that revision has, the Hub's own `.gitattributes` left out."""
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        for path, blob in self.files(name, revision).items():
            if path == ".gitattributes":
                continue
            (out / path).parent.mkdir(exist_ok=True)
            if blob.data is not None:
                (out / path).write_bytes(blob.data)
            else:
                shutil.copyfile(self.stored(str(blob.lfs)), out / path)
        return out

    def fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.on in request:
                    if fault.skip:
                        fault.skip -= 1
                    elif fault.times:
                        fault.times -= 1
                        return fault
        return None
