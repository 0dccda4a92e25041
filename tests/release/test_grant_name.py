"""Whose copy: the right grant is named with its evidence, nobody where the probability does not suffice."""

from __future__ import annotations

import json
import math
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from granting import Desk, person
from scenario import make_model

from steelyard.base.errors import SteelyardError
from steelyard.release import grant_name
from steelyard.release.grant_keys import MarkKey
from steelyard.release.grant_name import Evidence, name_grant
from steelyard.release.grants import forget, revoke
from steelyard.trace.watermark import Detection


@pytest.fixture(scope="module")
def leaked(granting: Desk, tmp_path_factory: pytest.TempPathFactory) -> tuple[Desk, list[str], list[Path]]:
    """Two grants and their copies. Read only."""
    desk = granting.copy(tmp_path_factory.mktemp("leaked") / "desk")
    grants, copies = [], []
    for number in range(2):
        grants.append(desk.granted(desk.sealed(email=f"p{number}@example.org")).id)
        copies.append(desk.root / f"copy-{number}")
        desk.deliver(grants[-1], copies[-1])
    return desk, grants, copies


def named(desk: Desk, suspect: Path, **changes: Any) -> Evidence:
    with desk.book() as book:
        return name_grant(book, suspect, desk.bundle, changes.get("mark", desk.mark))


def test_the_right_grant(leaked: tuple[Desk, list[str], list[Path]], tmp_path: Path) -> None:
    desk, grants, copies = leaked
    for grant, copy in zip(grants, copies, strict=True):
        (tmp_path / "evil `name` <script>.safetensors").unlink(missing_ok=True)
        suspect = tmp_path / "evil `name` <script>.safetensors"
        shutil.copyfile(copy / "model.safetensors", suspect)
        shutil.copyfile(copy / "config.json", tmp_path / "config.json")
        found = named(desk, suspect)
        assert [one.grant.id for one in found.named] == [grant]
        assert found.named[0].log10_p + math.log10(2) < -12
        said = json.loads(found.to_json())
        assert said["grants_compared"] == 2
        assert "could also have" in said["caution"]
        text = found.to_markdown()
        assert grant in text
        assert "<script>" not in text
        other = next(one for one in grants if one != grant)
        assert other not in text + found.to_json().decode()
    with desk.book() as book:
        event = book.events("named")[-1]
    assert event.payload["grants"] == [grants[1]]
    everything = text + json.dumps(said) + json.dumps(event.payload)
    assert not any(value in everything for key, value in person().items() if key in ("name", "organisation", "email"))


def test_after_its_end_and_forgetting(leaked: tuple[Desk, list[str], list[Path]], tmp_path: Path) -> None:
    desk = leaked[0].copy(tmp_path / "desk")
    with desk.book() as book:
        revoke(book, leaked[1][0], "moved on", signer=desk.signer("bob"), trust=desk.trust)
        forget(book, book.grant(leaked[1][0], datetime.now(UTC)).request)
    assert [one.grant.id for one in named(desk, leaked[2][0]).named] == [leaked[1][0]]


def test_the_original_and_another_model(leaked: tuple[Desk, list[str], list[Path]], tmp_path: Path) -> None:
    desk = leaked[0]
    for suspect in (desk.bundle, make_model(tmp_path / "other", seed=5)):
        found = named(desk, suspect)
        assert found.named == ()
        assert "Nobody is named" in found.to_markdown()


@pytest.mark.parametrize(("log10_p", "names"), [(-8.9, 0), (-9.2, 0), (-9.31, 1), (0.0, 0)])
def test_the_bound_counts_all_grants(
    leaked: tuple[Desk, list[str], list[Path]], monkeypatch: pytest.MonkeyPatch, log10_p: float, names: int
) -> None:
    """p N <= 1e-9 for the 2 grants there are, whatever the detector calls accused."""
    desk, grants, copies = leaked

    def detect(_original: Any, _suspect: Any, _key: bytes, compared: Any) -> Detection:
        assert list(compared) == grants
        return Detection(np.array([9.0, 0.0]), np.array([log10_p, 0.0]), (grants[0],))

    monkeypatch.setattr(grant_name.watermark, "detect", detect)
    assert len(named(desk, copies[0]).named) == names


def test_who_was_never_given_a_copy_is_not_named(
    granting: Desk, leaked: tuple[Desk, list[str], list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grant without a copy, or whose code was seen by nobody before it: a mark of it proves nothing."""
    desk = granting.copy(tmp_path / "desk")
    grant = desk.granted()

    def detect(*_: Any) -> Detection:
        return Detection(np.array([9.0]), np.array([-99.0]), (grant.id,))

    monkeypatch.setattr(grant_name.watermark, "detect", detect)
    assert named(desk, leaked[2][0]).named == ()
    with desk.book() as book:
        book.note("marked", grant=grant.id, weights=grant.wanted.weights, marked="0" * 64)
    assert len(named(desk, leaked[2][0]).named) == 1


def test_wrong_keys_and_releases(leaked: tuple[Desk, list[str], list[Path]], granting: Desk, tmp_path: Path) -> None:
    desk, _, copies = leaked
    with pytest.raises(SteelyardError, match="not the one that its code was committed with"):
        named(desk, copies[0], mark=MarkKey(desk.mark.secret, "0" * 64))
    # Another secret under the right fingerprint reads nothing.
    assert named(desk, copies[0], mark=MarkKey(bytes(32), desk.mark.fingerprint)).named == ()
    with pytest.raises(SteelyardError, match="nothing was ever granted"):
        named(granting, copies[0])


def test_a_code_that_was_not_committed(
    leaked: tuple[Desk, list[str], list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key made up so that somebody is accused."""
    desk, grants, copies = leaked

    def detect(*_: Any) -> Detection:
        return Detection(np.array([9.0, 0.0]), np.array([-99.0, 0.0]), (grants[0],))

    monkeypatch.setattr(grant_name.watermark, "detect", detect)
    with pytest.raises(SteelyardError, match="not the one that was committed"):
        named(desk, copies[0], mark=MarkKey(bytes(32), desk.mark.fingerprint))


@pytest.mark.parametrize("kind", ["nothing", "pickle", "empty", "lying", "nan", "other sizes"])
def test_suspects_that_are_none(leaked: tuple[Desk, list[str], list[Path]], tmp_path: Path, kind: str) -> None:
    desk, _, copies = leaked
    suspect = tmp_path / "suspect.safetensors"
    data = bytearray((copies[0] / "model.safetensors").read_bytes())
    if kind == "pickle":
        suspect = tmp_path / "suspect.bin"
        suspect.write_bytes(b"\x80\x04.")
    elif kind == "empty":
        suspect.write_bytes(b"")
    elif kind == "lying":
        suspect.write_bytes(data[:-10])
    elif kind == "nan":
        data[-2:] = b"\xc0\x7f"
        suspect.write_bytes(data)
    elif kind == "other sizes":
        from safetensors.numpy import save_file

        save_file({"model.embed_tokens.weight": np.zeros((8, 8), np.float32)}, suspect)
    with pytest.raises(SteelyardError):
        named(desk, suspect)
