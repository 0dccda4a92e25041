"""Take down what we control of a withdrawn release: every place where the ledger says it was published.

    outcomes = take_down(notice, ledger=ledger)

A folder gives way to the notice; what it held is moved aside, closed to others, or deleted (`takedown_folder`). A
repository on the Hub becomes private, or gated by hand, and shows the notice as its README (`takedown_hub`). Copies
that others made are not reached: for them there is the signed list. A place that holds anything else than this very
release is not touched.

Every step looks first at what is there, so a take-down that was interrupted, or failed in one place, is completed by
the same call. The ledger gets `release.taken_down` for each place once nothing is left to do there.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from steelyard.base.errors import SteelyardError
from steelyard.base.progress import Progress, Silent
from steelyard.release.notice import Notice
from steelyard.release.takedown_folder import Done, OtherReleaseError, take_down_folder
from steelyard.release.takedown_hub import Access, take_down_repository

if TYPE_CHECKING:
    from steelyard.ledger.ledger import Ledger

HUB = "hf://"
_EVENTS = ("publishing", "published", "taken_down")


@dataclass(frozen=True)
class Outcome:
    """What came of one place. `absent`: nothing was there, or nothing that anybody else may see."""

    destination: str
    state: Done | Literal["failed"]
    detail: str

    @property
    def done(self) -> bool:
        return self.state != "failed"


def published_places(ledger: Ledger, manifest: str) -> tuple[str, ...]:
    """Where that manifest was published, in order; also where publishing began and was not noted as finished: it may
    have been killed after the last byte."""
    events = ledger.events("release.published", manifest=manifest)
    events += ledger.events("release.publishing", manifest=manifest)
    places = (event.payload.get("destination") for event in sorted(events, key=lambda event: event.seq))
    return tuple(dict.fromkeys(place for place in places if isinstance(place, str)))


def take_down(
    notice: Notice,
    *,
    ledger: Ledger,
    delete: bool = False,
    access: Access = "private",
    progress: Progress | None = None,
) -> tuple[Outcome, ...]:
    """Take the release down in every place; `delete`: delete what folders held, in place of moving it aside;
    `access`: what a repository becomes.

    A failure in one place is an outcome, and does not stop the others. Raises SteelyardError where the ledger fails.
    """
    progress = progress or Silent()
    outcomes = []
    for place in published_places(ledger, notice.manifest):
        known: dict[str, Any] = {"manifest": notice.manifest, "destination": place}
        before = _noted(ledger, known)
        outcome = _tried(place, notice, delete, access, before, progress)
        if outcome.done and (outcome.state == "taken down" or not before):
            said = {"name": notice.name, "weights": notice.weights, "state": outcome.state, "detail": outcome.detail}
            ledger.append("release.taken_down", {**known, **said, "time": _now()})
        outcomes.append(outcome)
    return tuple(outcomes)


def _noted(ledger: Ledger, known: dict[str, Any]) -> bool:
    """Whether the ledger says that it was taken down there, and not published there again since."""
    events = [event for kind in _EVENTS for event in ledger.events(f"release.{kind}", **known)]
    return max(events, key=lambda event: event.seq).kind == "release.taken_down"


def _tried(place: str, notice: Notice, delete: bool, access: Access, before: bool, progress: Progress) -> Outcome:
    try:
        state, detail = _one(place, notice, delete, access, progress)
    except OtherReleaseError as error:
        # Where it was taken down before, the place may be used again.
        return Outcome(place, "already" if before else "failed", str(error))
    except SteelyardError as error:
        return Outcome(place, "failed", str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return Outcome(place, "failed", f"{where}{error.strerror or error}")
    return Outcome(place, state, detail)


def _one(place: str, notice: Notice, delete: bool, access: Access, progress: Progress) -> tuple[Done, str]:
    if not place.startswith(HUB):
        return take_down_folder(Path(place), notice, delete=delete)
    from steelyard.release.hub_client import HubClient

    with HubClient(place.removeprefix(HUB), progress) as client:
        return take_down_repository(client, notice, access)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
