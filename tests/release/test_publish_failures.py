"""Publishing to a Hub that fails: what passes is tried again, what lasts is told in words, and a rerun completes."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import READ, WRITE, Fault, HubServer
from publishing import Hub, There, send, served_hub, to_damage, whole

from steelyard.base.canonical import sha256_file
from steelyard.base.errors import MissingDependencyError, SteelyardError
from steelyard.release.hub_client import HubError

pytest.importorskip("huggingface_hub")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with served_hub(tmp_path / "hub", monkeypatch) as server:
        yield server


@pytest.fixture
def there(released: There, tmp_path: Path) -> There:
    return to_damage(released, tmp_path / "chain")


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
def test_a_passing_failure_does_not_stop_it(what: str, hub: Hub, there: There, tmp_path: Path) -> None:
    fault = PASSING[what]
    hub.faults.append(Fault(**vars(fault)))
    send(there)
    assert hub.faults[0].times == 0, "the fault was not met"
    whole(hub, there, tmp_path)
    assert len(hub.repositories["org/tiny"].commits) == 3  # none made twice
    assert sum(hub.naps) < 20
    if what == "too many requests":
        assert max(hub.naps) >= 3


def test_parts_are_tried_again_one_by_one(hub: Hub, there: There, tmp_path: Path) -> None:
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
    what: str, hub: Hub, there: There, tmp_path: Path
) -> None:
    fault, words = LASTING[what]
    hub.faults.append(Fault(**vars(fault)))
    with pytest.raises(SteelyardError, match=rf"^hf://org/tiny: .*{words}") as caught:
        send(there)
    assert "\n" not in str(caught.value)
    assert WRITE not in "".join(traceback.format_exception(caught.value))
    assert "X-Amz-Signature" not in str(caught.value)
    assert len(hub.naps) < 60
    assert sum(hub.naps) < 300
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


def test_large_files_that_are_there_are_not_sent_again(hub: Hub, there: There) -> None:
    hub.faults.append(Fault("/commit/", "status", 99))
    with pytest.raises(HubError):
        send(there)
    hub.faults.clear()
    sent = dict(hub.bodies)
    assert sha256_file(there[1] / "model.safetensors") in sent
    send(there)
    assert hub.bodies == sent


def test_the_token_is_never_shown(
    hub: Hub, there: There, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
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
    hub: Hub, there: There, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Its warnings hold signed addresses, its bars fill a log."""
    hub.faults += [Fault("PUT /lfs/", "status", 2), Fault("/preupload/", "status")]
    send(there)
    assert "".join(capfd.readouterr()) == ""
    assert "X-Amz-Signature" not in caplog.text


def test_a_token_that_may_only_read_and_none(
    hub: Hub, there: There, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", READ)
    with pytest.raises(HubError, match=r"HTTP 403.*write access to org"):
        send(there)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(HubError, match="no token: log in with `hf auth login`, or set HF_TOKEN"):
        send(there)
    assert not hub.repositories


def test_nobody_listens(hub: Hub, there: There, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(HubError, match=r"http://127\.0\.0\.1:1 cannot be reached"):
        send(there)


def test_without_the_library(there: There, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match=r"steelyard\[models\]"):
        send(there)


# -- a Hub that points elsewhere ---------------------------------------------------------------------------------------


def test_the_token_goes_to_no_other_host(hub: Hub, there: There, tmp_path: Path) -> None:
    with HubServer(tmp_path / "other") as other:
        hub.verified_at = other.url
        with pytest.raises(HubError, match="would get the token: nothing was sent there"):
            send(there)
    hub.verified_at = None
    send(there)
    whole(hub, there, tmp_path)


@pytest.mark.parametrize("what", ["GET /api/whoami", "POST /api/models/org/tiny/commit", "/objects/batch"])
def test_a_call_that_is_redirected_to_another_host_is_not_followed(
    hub: Hub, there: There, tmp_path: Path, what: str
) -> None:
    with HubServer(tmp_path / "other") as other:
        hub.faults.append(Fault(what, "status", status=307, headers={"Location": f"{other.url}/anything"}))
        with pytest.raises(HubError, match=r"redirected to 127\.0\.0\.1, which is not the Hub: it was not followed"):
            send(there)
    send(there)
    whole(hub, there, tmp_path)
