"""Publishing to the Hub, against a server that speaks its HTTP: whole or not at all, resumed, refused in words."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import WRITE, Blob, Fault, Repository
from publishing import WHERE, Hub, There, listing, send, served_hub, signing, to_damage, whole

from steelyard.base.canonical import sha256_file, sha256_hex
from steelyard.base.errors import SteelyardError
from steelyard.base.progress import Silent
from steelyard.release.hub_client import HubClient
from steelyard.release.publish import ReleaseFile
from steelyard.release.publish_hub import COMMIT_BYTES, COMMIT_FILES, SMALL, _batches

huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with served_hub(tmp_path / "hub", monkeypatch) as server:
        yield server


@pytest.fixture
def there(released: There, tmp_path: Path) -> There:
    return to_damage(released, tmp_path / "chain")


# -- whole -----------------------------------------------------------------------------------------------------------


def test_published_downloaded_verified(hub: Hub, there: There, tmp_path: Path) -> None:
    done = send(there)
    whole(hub, there, tmp_path)
    repository = hub.repositories["org/tiny"]
    assert (repository.private, repository.gated) == (False, False)
    assert done.commit == repository.commits[-1][0]
    assert done.tag == f"steelyard-{done.manifest}"
    # The library's own download is the bundle too, but for what the Hub and the library add.
    out = tmp_path / "snapshot"
    huggingface_hub.HfApi(endpoint=hub.url).snapshot_download("org/tiny", local_dir=out)
    shutil.rmtree(out / ".cache")
    (out / ".gitattributes").unlink()
    assert there[0].verify(out).ok
    with there[0].ledger() as ledger:
        (event,) = ledger.events("release.published", destination=WHERE, manifest=done.manifest)
    assert event.payload["commit"] == done.commit
    assert WRITE not in str(event.payload)


def test_what_signs_comes_last_in_one_commit(hub: Hub, there: There, tmp_path: Path) -> None:
    send(there)
    names = [set(files) - {".gitattributes"} for _, files in hub.repositories["org/tiny"].commits]
    assert names == [set(), listing(there[1]).keys() - signing(there), set(listing(there[1]))]
    out = hub.checkout("org/tiny", tmp_path / "half", hub.repositories["org/tiny"].commits[1][0])
    assert not there[0].verify(out).ok


def test_private_until_it_is_whole(hub: Hub, there: There) -> None:
    opened: list[str] = []

    def look(request: str) -> None:
        if not all(repository.private for repository in hub.repositories.values()):
            opened.append(request)

    hub.on_request = look
    send(there, gated="manual")
    assert not any("commit" in request or "tag/" in request for request in opened)
    assert hub.repositories["org/tiny"].gated == "manual"
    assert not hub.repositories["org/tiny"].private
    settings = [request for request in hub.asked if "settings" in request]
    assert len(settings) == 2  # gated, and only later public


def test_settings(hub: Hub, there: There, tmp_path: Path) -> None:
    send(there, private=True, gated="auto")
    assert (hub.repositories["org/tiny"].private, hub.repositories["org/tiny"].gated) == (True, "auto")
    send(there, recipient="clinic")
    whole(hub, there, tmp_path, "org/tiny-clinic")
    assert hub.repositories["org/tiny-clinic"].private
    with there[0].ledger() as ledger:
        events = ledger.events("release.published")
    assert [event.payload["recipient"] for event in events] == [None, "clinic"]
    assert [event.payload["private"] for event in events] == [True, True]


def test_access_that_the_hub_does_not_set_stops_it(hub: Hub, there: There) -> None:
    hub.faults.append(Fault("/settings", "ignore", times=99))
    with pytest.raises(SteelyardError, match="the Hub did not make it private, gated manual"):
        send(there, gated="manual")
    assert hub.repositories["org/tiny"].private
    assert len(hub.repositories["org/tiny"].commits) == 1


def test_a_public_repository_is_made_private_before_anything_is_sent(hub: Hub, there: There) -> None:
    made = Repository(private=False)
    made.commit({".gitattributes": Blob(1, b"x")}, "initial commit")
    hub.repositories["org/tiny"] = made
    send(there, private=True)
    order = [request for request in hub.asked if "settings" in request or "/commit/" in request]
    assert "settings" in order[0]
    assert made.private


def test_once_more_is_nothing_to_do(hub: Hub, there: There, tmp_path: Path) -> None:
    send(there)
    hub.asked.clear()
    assert send(there).already
    assert not [request for request in hub.asked if not request.startswith("GET")]
    whole(hub, there, tmp_path)
    with there[0].ledger() as ledger:
        assert len(ledger.events("release.published")) == 1


def test_large_files_in_parts_by_plain_lfs(hub: Hub, there: There, tmp_path: Path) -> None:
    """Although hf-xet is installed; and a listing in pages."""
    hub.part, hub.page = 7_000, 4
    send(there)
    whole(hub, there, tmp_path)
    weights = sha256_file(there[1] / "model.safetensors")
    parts = [request for request in hub.asked if request.startswith(f"PUT /lfs/{weights}/")]
    assert len(parts) == -(-(there[1] / "model.safetensors").stat().st_size // 7_000) > 3
    assert not [request for request in hub.asked if "xet" in request]
    assert any("tree/" in request for request in hub.asked)


def test_a_large_sparse_file(hub: Hub, tmp_path: Path) -> None:
    size, place = 48_000_000, tmp_path / "model.safetensors"
    with place.open("wb") as file:
        file.seek(size - 1)
        file.write(b"x")
    hub.part = 16_000_000
    with HubClient("org/tiny", Silent()) as client:
        client.create()
        remote = client.look()
        assert remote is not None
        client.commit([ReleaseFile(place.name, size, sha256_file(place), place)], "large", remote.head)
    assert sha256_file(hub.stored(str(hub.files("org/tiny")[place.name].lfs))) == sha256_file(place)
    assert len([request for request in hub.asked if request.startswith("PUT")]) == 3


def test_commits_are_bounded(tmp_path: Path) -> None:
    def files(count: int, size: int) -> list[ReleaseFile]:
        return [ReleaseFile(f"{number:04}", size, "0" * 64, tmp_path) for number in range(count)]

    assert [len(batch) for batch in _batches(files(2 * COMMIT_FILES + 1, 10))] == [COMMIT_FILES, COMMIT_FILES, 1]
    assert [len(batch) for batch in _batches(files(5, SMALL))] == [COMMIT_BYTES // SMALL] * 2 + [1]
    assert [len(batch) for batch in _batches(files(5, SMALL + 1))] == [5]  # by LFS
    assert list(_batches([])) == []


# -- what is there already -------------------------------------------------------------------------------------------


def test_another_release_is_never_overwritten(hub: Hub, there: There, tmp_path: Path) -> None:
    send(there)
    repository = hub.repositories["org/tiny"]
    # The same files, but one: as another release under the same name would be.
    head = dict(repository.commits[-1][1])
    head["config.json"] = Blob(2, b"{}")
    repository.commit(head, "another release")
    before = len(repository.commits)
    with pytest.raises(SteelyardError, match=r"holds \"?'?config\.json.*never overwritten"):
        send(there)
    assert len(repository.commits) == before


def test_a_repository_with_other_files_is_refused(hub: Hub, there: There) -> None:
    for name, data in (("README.md", b"# mine"), ("pytorch_model.bin", b"weights"), ("x/y", b"")):
        made = Repository(private=False)
        made.commit({name: Blob(len(data), data)}, "mine")
        hub.repositories["org/tiny"] = made
        with pytest.raises(SteelyardError, match="which is not of this release"):
            send(there)
        assert len(made.commits) == 1
        assert not made.private


def test_a_change_of_another_hand_while_it_is_filled(hub: Hub, there: There, tmp_path: Path) -> None:
    def meddle(request: str) -> None:
        repository = hub.repositories.get("org/tiny")
        if "/commit/" in request and repository is not None and len(repository.commits) == 2:
            repository.commit(repository.commits[-1][1] | {"evil.py": Blob(1, b"x")}, "meddled")

    hub.on_request = meddle
    with pytest.raises(SteelyardError, match=r"evil\.py.*which is not of this release"):
        send(there)
    names = set(hub.files("org/tiny"))
    assert not names & signing(there)
    assert hub.repositories["org/tiny"].private


def test_a_tag_on_another_commit_is_refused(hub: Hub, there: There) -> None:
    manifest = sha256_file(there[1] / "steelyard" / "manifest.json")
    made = Repository(private=True)
    first = made.commit({".gitattributes": Blob(1, b"x")}, "initial commit")
    made.tags[f"steelyard-{manifest}"] = first
    hub.repositories["org/tiny"] = made
    with pytest.raises(SteelyardError, match="remove the tag"):
        send(there)
    assert made.private


# -- what was verified is what is sent -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "steelyard/journal.jsonl"])
def test_a_file_changed_after_the_check_is_not_published(name: str, hub: Hub, there: There, tmp_path: Path) -> None:
    chain, bundle = there

    def check(folder: Path) -> Any:
        result = chain.verify(folder)
        data = (bundle / name).read_bytes()
        (bundle / name).write_bytes(data[:-2] + b"??")
        return result

    with pytest.raises(SteelyardError, match=f"{re.escape(name)}: was changed after it was verified"):
        send(there, check=check)
    assert set(hub.files("org/tiny")) == {".gitattributes"}
    assert sha256_hex((bundle / name).read_bytes()) not in hub.bodies


def test_a_signing_file_changed_after_the_check_is_sent_as_checked(hub: Hub, there: There, tmp_path: Path) -> None:
    bundle = there[1]
    name = sorted(signing(there))[0]
    good = (bundle / name).read_bytes()
    hub.on_request = lambda request: (bundle / name).write_bytes(b"{}") and None
    send(there)
    (bundle / name).write_bytes(good)
    whole(hub, there, tmp_path)
