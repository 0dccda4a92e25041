"""Publishing to the Hub, against a server that speaks its HTTP: whole or not at all, resumed, refused in words."""

from __future__ import annotations

import re
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hub_server import READ, WRITE, Blob, Fault, HubServer, Repository
from scenario import Chain

from steelyard.base.canonical import sha256_file, sha256_hex
from steelyard.base.errors import MissingDependencyError, SteelyardError
from steelyard.base.progress import Silent
from steelyard.release.hub_client import HubClient, HubError
from steelyard.release.publish import Published, ReleaseFile, publish
from steelyard.release.publish_hub import COMMIT_BYTES, COMMIT_FILES, SMALL, _batches

huggingface_hub = pytest.importorskip("huggingface_hub")
WHERE = "hf://org/tiny"


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """No waiting between tries; how long it would have been."""
    slept: list[float] = []
    clock = SimpleNamespace(**{name: getattr(time, name) for name in dir(time)} | {"sleep": slept.append})
    monkeypatch.setattr("huggingface_hub.utils._http.time", clock)
    monkeypatch.setattr("steelyard.release.hub_client.time", clock)
    return slept


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, naps: list[float]) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", WRITE)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.AGENT_HARNESSES_PATH", str(tmp_path / "harnesses.json"))
        yield server


@pytest.fixture
def there(released: tuple[Chain, Path], tmp_path: Path) -> tuple[Chain, Path]:
    chain = released[0].copy(tmp_path / "chain")
    return chain, chain.root / "releases" / "tiny"


def send(there: tuple[Chain, Path], to: str = WHERE, **more: Any) -> Published:
    chain, bundle = there
    with chain.ledger() as ledger:
        return publish(bundle, to, ledger=ledger, **({"check": chain.verify} | more))


def listing(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in folder.rglob("*") if path.is_file()}


def whole(hub: HubServer, there: tuple[Chain, Path], tmp_path: Path, name: str = "org/tiny") -> None:
    """What somebody downloads is the bundle, and verifies; the tag names it."""
    manifest = sha256_file(there[1] / "steelyard" / "manifest.json")
    repository = hub.repositories[name]
    assert repository.tags == {f"steelyard-{manifest}": repository.commits[-1][0]}
    for revision in ("main", f"steelyard-{manifest}"):
        out = hub.checkout(name, tmp_path / "download", revision)
        assert listing(out) == listing(there[1])
    assert there[0].verify(out).ok


def signing(there: tuple[Chain, Path]) -> set[str]:
    import json

    listed = {file["path"] for file in json.loads((there[1] / "steelyard" / "manifest.json").read_bytes())["files"]}
    return listing(there[1]).keys() - listed - {"steelyard/manifest.json"}


# -- whole -----------------------------------------------------------------------------------------------------------


def test_published_downloaded_verified(hub: HubServer, there: tuple[Chain, Path], tmp_path: Path) -> None:
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


def test_what_signs_comes_last_in_one_commit(hub: HubServer, there: tuple[Chain, Path], tmp_path: Path) -> None:
    send(there)
    names = [set(files) - {".gitattributes"} for _, files in hub.repositories["org/tiny"].commits]
    assert names == [set(), listing(there[1]).keys() - signing(there), set(listing(there[1]))]
    out = hub.checkout("org/tiny", tmp_path / "half", hub.repositories["org/tiny"].commits[1][0])
    assert not there[0].verify(out).ok


def test_private_until_it_is_whole(hub: HubServer, there: tuple[Chain, Path]) -> None:
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


def test_settings(hub: HubServer, there: tuple[Chain, Path], tmp_path: Path) -> None:
    send(there, private=True, gated="auto")
    assert (hub.repositories["org/tiny"].private, hub.repositories["org/tiny"].gated) == (True, "auto")
    send(there, recipient="clinic")
    whole(hub, there, tmp_path, "org/tiny-clinic")
    assert hub.repositories["org/tiny-clinic"].private
    with there[0].ledger() as ledger:
        events = ledger.events("release.published")
    assert [event.payload["recipient"] for event in events] == [None, "clinic"]
    assert [event.payload["private"] for event in events] == [True, True]


def test_access_that_the_hub_does_not_set_stops_it(hub: HubServer, there: tuple[Chain, Path]) -> None:
    hub.faults.append(Fault("/settings", "ignore", times=99))
    with pytest.raises(SteelyardError, match="the Hub did not make it private, gated manual"):
        send(there, gated="manual")
    assert hub.repositories["org/tiny"].private
    assert len(hub.repositories["org/tiny"].commits) == 1


def test_a_public_repository_is_made_private_before_anything_is_sent(hub: HubServer, there: tuple[Chain, Path]) -> None:
    made = Repository(private=False)
    made.commit({".gitattributes": Blob(1, b"x")}, "initial commit")
    hub.repositories["org/tiny"] = made
    send(there, private=True)
    order = [request for request in hub.asked if "settings" in request or "/commit/" in request]
    assert "settings" in order[0]
    assert made.private


def test_once_more_is_nothing_to_do(hub: HubServer, there: tuple[Chain, Path], tmp_path: Path) -> None:
    send(there)
    hub.asked.clear()
    assert send(there).already
    assert not [request for request in hub.asked if not request.startswith("GET")]
    whole(hub, there, tmp_path)
    with there[0].ledger() as ledger:
        assert len(ledger.events("release.published")) == 1


def test_large_files_in_parts_by_plain_lfs(hub: HubServer, there: tuple[Chain, Path], tmp_path: Path) -> None:
    """Although hf-xet is installed; and a listing in pages."""
    hub.part, hub.page = 7_000, 4
    send(there)
    whole(hub, there, tmp_path)
    weights = sha256_file(there[1] / "model.safetensors")
    parts = [request for request in hub.asked if request.startswith(f"PUT /lfs/{weights}/")]
    assert len(parts) == -(-(there[1] / "model.safetensors").stat().st_size // 7_000) > 3
    assert not [request for request in hub.asked if "xet" in request]
    assert any("tree/" in request for request in hub.asked)


def test_a_large_sparse_file(hub: HubServer, tmp_path: Path) -> None:
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


# -- what passes -----------------------------------------------------------------------------------------------------

PASSING = {
    "connection dropped while sending": Fault("PUT /lfs/", "drop", times=2),
    "storage fails": Fault("PUT /lfs/", "status", status=500),
    "too many requests": Fault("/preupload/", "status", status=429, headers={"Retry-After": "3"}),
    "batch fails": Fault("/objects/batch", "status", status=503),
    "no listing": Fault("/tree/", "status", status=502),
    "no settings": Fault("/settings", "status", status=500),
    "not created": Fault("/repos/create", "status", status=504),
    "created, answer lost": Fault("/repos/create", "lost"),
    "first commit fails": Fault("/commit/", "status", status=500),
    "first commit dropped": Fault("/commit/", "drop"),
    "first commit's answer lost": Fault("/commit/", "lost"),
    "last commit fails": Fault("/commit/", "status", status=503, skip=1),
    "last commit's answer lost": Fault("/commit/", "lost", skip=1),
    "card not checked": Fault("/validate-yaml", "status", status=500, headers={"Content-Type": "text/html"}),
    "tag's answer lost": Fault("/tag/", "lost"),
    "tags not listed": Fault("/refs", "status", status=429),
    "account not found": Fault("whoami", "drop"),
    "repository not seen": Fault("GET /api/models/org/tiny", "drop", skip=1),
    "slow": Fault("PUT /lfs/", "slow", seconds=0.3),
}


@pytest.mark.parametrize("what", PASSING)
def test_a_passing_failure_does_not_stop_it(
    what: str, hub: HubServer, there: tuple[Chain, Path], tmp_path: Path, naps: list[float]
) -> None:
    fault = PASSING[what]
    hub.faults.append(Fault(**vars(fault)))
    send(there)
    assert hub.faults[0].times == 0, "the fault was not met"
    whole(hub, there, tmp_path)
    assert len(hub.repositories["org/tiny"].commits) == 3  # none made twice
    assert sum(naps) < 20
    if what == "too many requests":
        assert max(naps) >= 3


def test_parts_are_tried_again_one_by_one(hub: HubServer, there: tuple[Chain, Path], tmp_path: Path) -> None:
    hub.part = 7_000
    weights = sha256_file(there[1] / "model.safetensors")
    hub.faults.append(Fault(f"{weights}/2", "drop", times=2))
    send(there)
    whole(hub, there, tmp_path)
    numbers = [request.rsplit("/", 1)[1] for request in hub.asked if request.startswith(f"PUT /lfs/{weights}/")]
    assert numbers[:5] == ["1", "2", "2", "2", "3"]


# -- what stays ------------------------------------------------------------------------------------------------------

LASTING = {
    "unauthorised": (Fault("/commit/", "status", 99, status=401), "HTTP 401.*hf auth login"),
    "forbidden": (Fault("/repos/create", "status", 99, status=403), r"HTTP 403.*write access to org"),
    "gone": (Fault("/preupload/", "status", 99, status=404), "HTTP 404.*check the name"),
    "conflict": (Fault("/commit/", "status", 99, status=409), "HTTP 409.*publish again"),
    "broken": (Fault("/commit/", "status", 99, status=500), "HTTP 500.*the Hub has failed"),
    "broken at the end": (Fault("/commit/", "status", 99, skip=1, status=503), "HTTP 503.*goes on from here"),
    "storage broken": (Fault("PUT /lfs/", "status", 99, status=500), "HTTP 500.*goes on from here"),
    "storage dropped": (Fault("PUT /lfs/", "drop", 99), "no answer.*cannot be reached"),
    "told to wait": (Fault("/preupload/", "status", 99, status=429, headers={"Retry-After": "7200"}), "7,200 seconds"),
    "over the limit": (
        Fault("/commit/", "status", 99, status=429, headers={"RateLimit": '"api";r=0;t=300'}),
        "wait for 300 seconds",
    ),
    "too many": (Fault("/commit/", "status", 99, status=429), "HTTP 429.*wait"),
    "busy account": (
        Fault("/repos/create", "status", 99, status=409, text="another conflicting operation is in progress"),
        "busy with another change",
    ),
    "not kept": (Fault("/commit/", "ignore", 99), "did not keep"),
    "tag not kept": (Fault("/tag/", "ignore", 99), "did not keep the tag"),
    "full": (Fault("/commit/", "status", 99, status=413, text="Payload too large"), "HTTP 413.*Payload too large"),
}


@pytest.mark.parametrize("what", LASTING)
def test_a_lasting_failure_is_told_in_words_and_a_rerun_completes(
    what: str, hub: HubServer, there: tuple[Chain, Path], tmp_path: Path, naps: list[float]
) -> None:
    fault, words = LASTING[what]
    hub.faults.append(Fault(**vars(fault)))
    with pytest.raises(SteelyardError, match=rf"^hf://org/tiny: .*{words}") as caught:
        send(there)
    assert "\n" not in str(caught.value)
    assert WRITE not in "".join(traceback.format_exception(caught.value))
    assert "X-Amz-Signature" not in str(caught.value)
    assert len(naps) < 60
    assert sum(naps) < 300
    repository = hub.repositories.get("org/tiny")
    if repository is not None and what != "tag not kept":
        assert repository.private
        assert not there[0].verify(hub.checkout("org/tiny", tmp_path / "half")).ok
    with there[0].ledger() as ledger:
        assert len(ledger.events("release.publishing")) == 1
        assert not ledger.events("release.published")
    hub.faults.clear()
    send(there)
    whole(hub, there, tmp_path)
    assert not hub.repositories["org/tiny"].private


def test_large_files_that_are_there_are_not_sent_again(hub: HubServer, there: tuple[Chain, Path]) -> None:
    hub.faults.append(Fault("/commit/", "status", 99))
    with pytest.raises(HubError):
        send(there)
    hub.faults.clear()
    sent = dict(hub.bodies)
    assert sha256_file(there[1] / "model.safetensors") in sent
    send(there)
    assert hub.bodies == sent


def test_the_token_is_never_shown(
    hub: HubServer, there: tuple[Chain, Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Even where the Hub says it back."""
    wrong = "hf_" + "s" * 34
    monkeypatch.setenv("HF_TOKEN", wrong)
    with pytest.raises(HubError, match=r"HTTP 401.*\(the token\)") as caught:
        send(there)
    shown = "".join(traceback.format_exception(caught.value)) + "".join(capfd.readouterr())
    assert wrong not in shown
    assert not hub.repositories


def test_nothing_of_the_library_is_printed(
    hub: HubServer, there: tuple[Chain, Path], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Its warnings hold signed addresses, its bars fill a log."""
    hub.faults += [Fault("PUT /lfs/", "status", 2), Fault("/preupload/", "status")]
    send(there)
    assert "".join(capfd.readouterr()) == ""
    assert "X-Amz-Signature" not in caplog.text


def test_a_token_that_may_only_read_and_none(
    hub: HubServer, there: tuple[Chain, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", READ)
    with pytest.raises(HubError, match=r"HTTP 403.*write access to org"):
        send(there)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(HubError, match="no token: log in with `hf auth login`, or set HF_TOKEN"):
        send(there)
    assert not hub.repositories


def test_nobody_listens(hub: HubServer, there: tuple[Chain, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(HubError, match=r"http://127\.0\.0\.1:1 cannot be reached"):
        send(there)


def test_without_the_library(there: tuple[Chain, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match=r"steelyard\[models\]"):
        send(there)


# -- what is there already -------------------------------------------------------------------------------------------


def test_another_release_is_never_overwritten(hub: HubServer, there: tuple[Chain, Path], tmp_path: Path) -> None:
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


def test_a_repository_with_other_files_is_refused(hub: HubServer, there: tuple[Chain, Path]) -> None:
    for name, data in (("README.md", b"# mine"), ("pytorch_model.bin", b"weights"), ("x/y", b"")):
        made = Repository(private=False)
        made.commit({name: Blob(len(data), data)}, "mine")
        hub.repositories["org/tiny"] = made
        with pytest.raises(SteelyardError, match="which is not of this release"):
            send(there)
        assert len(made.commits) == 1
        assert not made.private


def test_a_change_of_another_hand_while_it_is_filled(hub: HubServer, there: tuple[Chain, Path], tmp_path: Path) -> None:
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


def test_a_tag_on_another_commit_is_refused(hub: HubServer, there: tuple[Chain, Path]) -> None:
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
def test_a_file_changed_after_the_check_is_not_published(
    name: str, hub: HubServer, there: tuple[Chain, Path], tmp_path: Path
) -> None:
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


def test_a_signing_file_changed_after_the_check_is_sent_as_checked(
    hub: HubServer, there: tuple[Chain, Path], tmp_path: Path
) -> None:
    bundle = there[1]
    name = sorted(signing(there))[0]
    good = (bundle / name).read_bytes()
    hub.on_request = lambda request: (bundle / name).write_bytes(b"{}") and None
    send(there)
    (bundle / name).write_bytes(good)
    whole(hub, there, tmp_path)
