"""All releases of a workspace with their state, from its ledger and, where given, the list of withdrawn releases.

    for release in releases(ledger, signed_list, policies, now): print(release.name, release.state)

`candidate`: attested, not sealed yet. `expired`: a candidate whose test is older than its policy allows, so that it can
not be sealed any more. `released`: a bundle was written. `published`: it went out, to `published`. `withdrawn`: by its
manifest, or by its weights under another name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from steelyard.release.attest import parse_time
from steelyard.release.withdrawal import SignedList
from steelyard.safety.policy import Policy

if TYPE_CHECKING:
    from steelyard.ledger.ledger import Event, Ledger

State = Literal["candidate", "expired", "released", "published", "withdrawn"]


class ReleaseState(BaseModel):
    """One release: its digests, what became of it, and when."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    manifest: str
    subject: str
    policy: str
    state: State
    attested: str | None
    released: str | None
    published: tuple[str, ...]
    publishing: tuple[str, ...]  # begun, not finished
    withdrawn: str | None
    reason: str | None
    taken_down: tuple[str, ...]


def releases(
    ledger: Ledger, withdrawals: SignedList | None, policies: Sequence[Policy], now: datetime
) -> list[ReleaseState]:
    """Oldest first. `policies`: those whose greatest age of a report is known, by digest."""
    events: dict[str, list[Event]] = {kind: ledger.events(f"release.{kind}") for kind in _KINDS}
    known: dict[str, Mapping[str, Any]] = {}
    for event in sorted((*events["attested"], *events["bundled"]), key=lambda event: event.seq):
        known[str(event.payload.get("bundle"))] = event.payload
    entries = [event.payload for event in events["withdrawn"]]
    if withdrawals is not None:
        entries += [entry.model_dump(mode="json") for entry in withdrawals.content.entries]
    ages = {policy.digest: timedelta(days=policy.max_report_age_days) for policy in policies}
    finished = {str(event.payload.get("run")): event.time for event in ledger.events("safety.finished")}
    return [
        _state(manifest, payload, events, entries, known, ages, finished, now) for manifest, payload in known.items()
    ]


_PLACED = ("publishing", "published", "taken_down")
_KINDS = ("attested", "bundled", "withdrawn", *_PLACED)


def _state(
    manifest: str,
    payload: Mapping[str, Any],
    events: Mapping[str, Sequence[Event]],
    entries: Sequence[Mapping[str, Any]],
    known: Mapping[str, Mapping[str, Any]],
    ages: Mapping[str, timedelta],
    finished: Mapping[str, str],
    now: datetime,
) -> ReleaseState:
    def when(kind: str) -> str | None:
        return next((event.time for event in events[kind] if event.payload.get("bundle") == manifest), None)

    def where(kind: str) -> tuple[str, ...]:
        places = [str(e.payload.get("destination")) for e in events[kind] if e.payload.get("manifest") == manifest]
        return tuple(dict.fromkeys(places))

    def gone(place: str) -> bool:
        """Whether it was not published there again since."""
        there = {"destination": place, "manifest": manifest}
        found = [e for kind in _PLACED for e in events[kind] if there.items() <= e.payload.items()]
        return max(found, key=lambda event: event.seq).kind == "release.taken_down"

    entry = next((entry for entry in entries if _meant(entry, manifest, payload, known)), None)
    released, published = when("bundled"), where("published")
    tested, age = finished.get(str(payload.get("run"))), ages.get(str(payload.get("policy")))
    if entry is not None:
        state: State = "withdrawn"
    elif published:
        state = "published"
    elif released is not None:
        state = "released"
    elif tested is not None and age is not None and parse_time(tested, "ledger") + age < now:
        state = "expired"
    else:
        state = "candidate"
    return ReleaseState(
        name=str(payload.get("name")),
        manifest=manifest,
        subject=str(payload.get("subject")),
        policy=str(payload.get("policy")),
        state=state,
        attested=when("attested"),
        released=released,
        published=published,
        publishing=tuple(place for place in where("publishing") if place not in published),
        withdrawn=None if entry is None else str(entry["time"]),
        reason=None if entry is None else str(entry["reason"]),
        taken_down=tuple(place for place in where("taken_down") if gone(place)),
    )


def _meant(
    entry: Mapping[str, Any], manifest: str, payload: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]]
) -> bool:
    """By manifest, by weights, or because it is the subject of the release that the entry names."""
    named = known.get(str(entry["manifest"]), {})
    return (
        entry["manifest"] == manifest
        or entry["weights"] == payload.get("weights")
        or ("subject" in named and named["subject"] == payload.get("subject"))
    )
