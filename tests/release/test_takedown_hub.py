"""A repository on the Hub becomes private and shows the notice, against a server that speaks the Hub's HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import READ, WRITE, Blob, Fault, Repository
from publishing import WHERE, Hub, served_hub
from withdrawing import HOSTILE, note_published, notice_of

from steelyard.ledger.ledger import Ledger
from steelyard.release.layout import MANIFEST, MODEL_SIGNATURE
from steelyard.release.notice import README, notice_markdown
from steelyard.release.takedown import Outcome, take_down
from steelyard.release.takedown_hub import Access

pytest.importorskip("huggingface_hub")

SHA256 = "cd" * 32
TAG = f"steelyard-{SHA256}"
NAME = "org/tiny"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with served_hub(tmp_path / "hub", monkeypatch) as server:
        yield server


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "workspace" / "ledger.sqlite") as opened:
        note_published(opened, SHA256, WHERE)
        yield opened


def blob(data: bytes) -> Blob:
    return Blob(len(data), data)


@pytest.fixture
def repository(hub: Hub) -> Repository:
    """As `publish` leaves it: public, with the tag of the release."""
    made = Repository(private=False)
    made.commit({".gitattributes": blob(b"x")}, "initial commit")
    files = {README: blob(b"# a model\n"), MANIFEST: blob(b"{}\n"), "model.safetensors": blob(b"weights")}
    made.tags[TAG] = made.commit(files, "Sign the release")
    hub.repositories[NAME] = made
    return made


def down(ledger: Ledger, access: Access = "private", **changes: str) -> Outcome:
    (outcome,) = take_down(notice_of(SHA256, **changes), ledger=ledger, access=access)
    assert WRITE not in outcome.detail
    assert READ not in outcome.detail
    assert WRITE not in str([event.payload for event in ledger.events()])
    return outcome


def readme(repository: Repository) -> bytes | None:
    return repository.commits[-1][1][README].data


def test_private_first_then_the_notice(hub: Hub, repository: Repository, ledger: Ledger) -> None:
    done = down(ledger)
    assert (done.state, done.detail) == ("taken down", "made private; notice put as its README")
    assert repository.private
    assert readme(repository) == notice_markdown(notice_of(SHA256)).encode()
    assert {MANIFEST, "model.safetensors"} <= repository.commits[-1][1].keys()
    order = [one for one in hub.asked if "/settings" in one or "/commit/" in one]
    assert ["settings" in one for one in order] == [True, False]
    assert len(ledger.events("release.taken_down", destination=WHERE, manifest=SHA256)) == 1
    commits = len(repository.commits)
    assert down(ledger).state == "already"
    assert len(repository.commits) == commits
    assert len(ledger.events("release.taken_down")) == 1


def test_gated_by_hand_on_demand_and_private_after_all(repository: Repository, ledger: Ledger) -> None:
    assert down(ledger, "gated").detail == "made gated; notice put as its README"
    assert (repository.private, repository.gated) == (False, "manual")
    assert down(ledger, "gated").state == "already"
    assert down(ledger).detail == "made private"
    assert repository.private
    assert down(ledger, "gated").state == "already"  # never opened again


@pytest.mark.parametrize("words", [words for words in HOSTILE if "\ud800" not in words])
def test_hostile_words_make_no_front_matter(repository: Repository, ledger: Ledger, words: str) -> None:
    assert down(ledger, reason=words, name=words).state == "taken down"
    data = readme(repository)
    assert data is not None
    assert data.startswith(b"# Withdrawn: ")


@pytest.mark.parametrize("kind", ["drop", "lost"])
@pytest.mark.parametrize("on", ["/settings", "/commit/"])
def test_a_passing_failure_is_tried_again(hub: Hub, repository: Repository, ledger: Ledger, on: str, kind: str) -> None:
    hub.faults.append(Fault(on, kind))
    assert down(ledger).state == "taken down"
    assert repository.private
    assert readme(repository) == notice_markdown(notice_of(SHA256)).encode()
    assert len(repository.commits) == 3  # a commit whose answer was lost is not made twice
    assert len(hub.naps) >= 1


def test_a_hub_that_keeps_failing_is_asked_so_often_and_a_rerun_does_the_rest(
    hub: Hub, repository: Repository, ledger: Ledger
) -> None:
    fault = Fault("/settings", "status", times=10_000, status=503)
    hub.faults.append(fault)
    done = down(ledger)
    assert done.state == "failed"
    assert "could not set the repository's access (HTTP 503)" in done.detail
    assert "(done: notice put as its README)" in done.detail
    assert sum("/settings" in one for one in hub.asked) <= 10
    assert not repository.private
    assert ledger.events("release.taken_down") == []
    fault.times = 0
    assert down(ledger).detail == "made private"
    assert repository.private


def test_the_notice_that_fails_leaves_it_private(hub: Hub, repository: Repository, ledger: Ledger) -> None:
    hub.faults.append(Fault("/commit/", "status", times=10_000, status=403))
    done = down(ledger)
    assert done.state == "failed"
    assert "(done: made private)" in done.detail
    assert repository.private
    hub.faults.clear()
    assert down(ledger).detail == "notice put as its README"


@pytest.mark.parametrize("on", ["/settings", "/commit/"])
def test_a_hub_that_only_says_so_is_not_believed(hub: Hub, repository: Repository, ledger: Ledger, on: str) -> None:
    hub.faults.append(Fault(on, "ignore", times=10_000))
    done = down(ledger)
    assert done.state == "failed"
    assert "the Hub did not" in done.detail
    assert ledger.events("release.taken_down") == []


def test_another_release_in_it_is_not_touched(repository: Repository, ledger: Ledger) -> None:
    files = repository.commits[-1][1] | {MANIFEST: blob(b"[]\n")}
    repository.commit(files, "another")
    done = down(ledger)
    assert done.state == "failed"
    assert f"holds another release than its tag {TAG}" in done.detail
    assert not repository.private
    assert readme(repository) == b"# a model\n"


def test_a_public_one_without_the_tag_is_not_touched(repository: Repository, ledger: Ledger) -> None:
    repository.tags.clear()
    done = down(ledger)
    assert done.state == "failed"
    assert f"has no tag {TAG}" in done.detail
    assert not repository.private


def test_where_publishing_never_ended_nothing_is_public(repository: Repository, ledger: Ledger) -> None:
    repository.tags.clear()
    repository.private = True
    assert down(ledger).state == "absent"
    assert readme(repository) == b"# a model\n"


def test_where_only_the_tag_is_missing_a_recipient_has_the_release(repository: Repository, ledger: Ledger) -> None:
    files = repository.commits[-1][1]
    repository.commit(files | {MODEL_SIGNATURE: blob(b"{}")}, "Sign the release")
    repository.private = True
    repository.tags = {"steelyard-of-another": repository.commits[0][0]}
    assert down(ledger).state == "absent"
    repository.tags.clear()
    assert down(ledger).detail == "notice put as its README"
    assert b"withdrawn" in (readme(repository) or b"")


def test_what_is_gone_is_absent_but_a_bad_token_does_not_say_so(
    hub: Hub, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    done = down(ledger)
    assert done.state == "failed"
    assert "token is not accepted" in done.detail
    assert "x" * 34 not in done.detail
    monkeypatch.setenv("HF_TOKEN", WRITE)
    assert down(ledger).state == "absent"


def test_a_token_that_may_only_read_changes_nothing(
    repository: Repository, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", READ)
    done = down(ledger)
    assert done.state == "failed"
    assert "it needs write access to org" in done.detail
    assert not repository.private
