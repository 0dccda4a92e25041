"""Requests for access taken over from a gated repository, against the stand-in for the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from granting import LICENCE, RETAIN, Desk
from hub_server import Fault, Repository
from publishing import Hub, served_hub

from steelyard.base.canonical import sha256_hex
from steelyard.base.errors import SteelyardError
from steelyard.base.progress import Silent
from steelyard.release.grant_copy import wanted_of
from steelyard.release.grant_hub import Imported, import_requests

pytest.importorskip("huggingface_hub")
TICK = f"I accept the licence with SHA-256 {sha256_hex(LICENCE)}"


def asked(number: int, **fields: Any) -> dict[str, Any]:
    form = {"Organisation": "Clinic", "Country": "FR", "Purpose": "To measure.", TICK: True} | fields
    user = {"user": f"u{number}", "fullname": f"Person {number}", "email": f"p{number}@example.org"}
    given = {key: value for key, value in form.items() if value is not None}
    return {
        "requestId": f"655f3a1c{number:016x}",
        "user": user,
        "status": "pending",
        "timestamp": "2026-11-22T10:11:12.000Z",
        "fields": given,
    }


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with served_hub(tmp_path / "hub", monkeypatch) as server:
        server.repositories["org/tiny"] = Repository(private=False, gated="manual")
        yield server


def taken_over(desk: Desk) -> Imported:
    from steelyard.release.hub_client import HubClient

    with desk.book() as book, HubClient("org/tiny", Silent()) as client:
        wanted = wanted_of(desk.bundle)
        return import_requests(book, client, wanted, licence=sha256_hex(LICENCE), private=desk.identity, retain=RETAIN)


def test_what_is_whole_is_taken_over_once(hub: Hub, desk: Desk) -> None:
    there = hub.repositories["org/tiny"].requests
    there += [asked(1), asked(2, Name="Ada Lovelace"), asked(3) | {"status": "rejected"}]
    hub.page = 1  # in pages
    found = taken_over(desk)
    assert (len(found.entered), found.already, found.left_out) == (2, 0, ())
    with desk.book() as book:
        people = [book.open(one, desk.identity).person for one in found.entered]
    assert [one.name for one in people if one is not None] == ["Person 1", "Ada Lovelace"]
    assert taken_over(desk).already == 2
    assert desk.kinds().count("requested") == 2
    desk.review(found.entered[0].id, "bob", "refuse")
    assert taken_over(desk).already == 2  # what was refused does not come back
    assert all(request.startswith("GET") for request in hub.asked)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({TICK: None}, "licence"),
        ({TICK: False}, "licence"),
        ({TICK: None, TICK.replace(sha256_hex(LICENCE), "0" * 64): True}, "licence"),
        ({TICK: None, "I accept the licence": True}, "licence"),
        ({"Organisation": None}, "organisation"),
        ({"Purpose": "x" * 4001}, "purpose"),
        ({"Purpose": "a\n# Approved"}, "purpose"),
        ({"Organisation": "\x1b[2Jroot"}, "organisation"),
        ({"Name": "\u202egro.elpmaxe"}, "name"),
        ({"Country": ["FR"]}, "country"),
        ({"encrypts_to": "ssh-ed25519 AAAA"}, "encrypts_to"),
    ],
)
def test_what_is_not_whole_is_left_out(hub: Hub, desk: Desk, fields: dict[str, Any], reason: str) -> None:
    hub.repositories["org/tiny"].requests += [asked(1, **fields), asked(2)]
    found = taken_over(desk)
    assert len(found.entered) == 1
    ((_, said),) = found.left_out
    assert said.startswith(f"{reason}: ")
    assert "\x1b" not in said
    assert "@example.org" not in said


def test_hidden_address(hub: Hub, desk: Desk) -> None:
    """A repository whose settings hide who asks."""
    one = asked(1)
    one["user"] = {}
    hub.repositories["org/tiny"].requests += [one]
    ((_, said),) = taken_over(desk).left_out
    assert said.startswith("name: ")


def test_the_hub_refuses(hub: Hub, desk: Desk) -> None:
    hub.repositories["org/tiny"].gated = False
    with pytest.raises(SteelyardError, match=r"could not list the requests for access \(HTTP 400\)"):
        taken_over(desk)
    hub.faults.append(Fault("user-access-request", "status", times=99, status=403))
    with pytest.raises(SteelyardError, match="HTTP 403"):
        taken_over(desk)
    assert desk.kinds() == ["keys"]


def test_a_release_that_went_out(hub: Hub, desk: Desk) -> None:
    hub.repositories["org/tiny"].requests += [asked(1)]
    with desk.chain.ledger() as ledger:
        ledger.append("release.publishing", {"weights": wanted_of(desk.bundle).weights})
    with pytest.raises(SteelyardError, match="cannot be granted"):
        taken_over(desk)
