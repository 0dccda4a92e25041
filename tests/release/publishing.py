"""What the tests of publishing to the Hub share: the stand-in, a bundle to send there, and what must come of it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hub_server import WRITE, HubServer
from scenario import Chain

from steelyard.base.canonical import sha256_file
from steelyard.release.publish import Published, publish

WHERE = "hf://org/tiny"
There = tuple[Chain, Path]


class Hub(HubServer):
    """`naps`: how long would have been waited between tries."""

    naps: list[float]


@contextmanager
def served_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The Hub of this process, with a token that may write, while a test lasts; nothing waits between tries."""
    with Hub(folder) as server:
        server.naps = []
        clock = SimpleNamespace(**{name: getattr(time, name) for name in dir(time)} | {"sleep": server.naps.append})
        monkeypatch.setattr("huggingface_hub.utils._http.time", clock)
        monkeypatch.setattr("steelyard.release.hub_client.time", clock)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", WRITE)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.AGENT_HARNESSES_PATH", str(folder / "harnesses.json"))
        yield server


def to_damage(released: There, folder: Path) -> There:
    """A chain and its bundle, copied."""
    chain = released[0].copy(folder)
    return chain, chain.root / "releases" / "tiny"


def send(there: There, to: str = WHERE, **more: Any) -> Published:
    chain, bundle = there
    with chain.ledger() as ledger:
        return publish(bundle, to, ledger=ledger, **({"check": chain.verify} | more))


def listing(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in folder.rglob("*") if path.is_file()}


def whole(hub: HubServer, there: There, tmp_path: Path, name: str = "org/tiny") -> None:
    """What somebody downloads is the bundle, and verifies; the tag names it."""
    manifest = sha256_file(there[1] / "steelyard" / "manifest.json")
    repository = hub.repositories[name]
    assert repository.tags == {f"steelyard-{manifest}": repository.commits[-1][0]}
    for revision in ("main", f"steelyard-{manifest}"):
        out = hub.checkout(name, tmp_path / "download", revision)
        assert listing(out) == listing(there[1])
    assert there[0].verify(out).ok


def signing(there: There) -> set[str]:
    listed = {file["path"] for file in json.loads((there[1] / "steelyard" / "manifest.json").read_bytes())["files"]}
    return listing(there[1]).keys() - listed - {"steelyard/manifest.json"}
