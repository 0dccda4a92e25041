"""What a workspace knows of requests and grants: ids, digests and times from its ledger, files from `grants/`.

    book = Book(workspace / "grants", ledger)
    book.grant("g-0123456789abcdef").expires

    grants/keys/                            see grant_keys
    grants/requests/R/request.sealed        who asks, for what: sealed, erased by `forget`
    grants/requests/R/receipt.dsse.json     the recipient's receipt, which his key's id is in: erased with it
    grants/requests/R/review-1.dsse.json    the reviews
    grants/issued/G/commitment.json         the code's commitment, with its countersignature or time-stamp, the reviews
                                            that were counted, a revocation

No event holds a name, an address or a text of a request.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.base.files import fsync_folder, locked, read_bounded
from steelyard.release.attest import parse_time
from steelyard.release.evidence import CLOCKS_APART
from steelyard.release.grant_request import FILE_LIMIT, Sealed, Wanted, parse_sealed
from steelyard.release.grant_sealed import unseal

if TYPE_CHECKING:
    from steelyard.ledger.ledger import Event, Ledger

SEALED = "request.sealed"
COMMITMENT = "commitment.json"
COUNTERSIGNATURE = "commitment.dsse.json"
TIMESTAMP = "commitment.tsr"
RECEIPT = "receipt.dsse.json"
REVOCATION = "revocation.dsse.json"

RequestState = Literal["requested", "refused", "granted", "ended", "forgotten"]
GrantState = Literal["issued", "countersigned", "delivered", "received", "expired", "revoked"]


@dataclass(frozen=True)
class Request:
    """A request as the ledger has it. `digest`: of the sealed file's content; `due`: when it is to be erased, where
    that is known; `ended`: when the grant that it led to ends or ended, or the request was refused."""

    id: str
    digest: str
    wanted: Wanted
    licence: str
    public: bool
    time: datetime
    retain: timedelta
    state: RequestState
    grant: str | None
    ended: datetime | None

    @property
    def due(self) -> datetime:
        """When the identity is to be erased: so long after the grant's end; after the request where there is none."""
        return (self.ended or self.time) + self.retain

    def is_due(self, now: datetime) -> bool:
        """Whether the identity is to be erased; never while a grant is in force."""
        return self.due <= now and self.state not in ("granted", "forgotten")


@dataclass(frozen=True)
class Grant:
    """A grant as the ledger has it: digests of its code and commitment, the fingerprint of the key they come from."""

    id: str
    request: str
    wanted: Wanted
    licence: str
    public: bool
    code: str
    commitment: str
    mark: str
    issued: datetime
    expires: datetime
    revoked: datetime | None
    state: GrantState


class Book:
    """Requests and grants of a workspace; `folder` is its `grants/`. Raises SteelyardError naming what is unknown."""

    def __init__(self, folder: Path, ledger: Ledger) -> None:
        self.folder, self.ledger = folder, ledger
        self.erased: list[str] = []  # requests, by the last that held the lock

    @property
    def keys(self) -> Path:
        return self.folder / "keys"

    def request_folder(self, request: str) -> Path:
        """Where the files of a request lie. Raises UsageError for an id that is none, before it becomes a path."""
        return self.folder / "requests" / _id(request, "r")

    def grant_folder(self, grant: str) -> Path:
        """The same for a grant."""
        return self.folder / "issued" / _id(grant, "g")

    @contextmanager
    def locked(self, now: datetime | None) -> Iterator[datetime]:
        """One at a time: whoever enters, reviews, issues, delivers or forgets waits for the one before, and erases
        whose time is over. Gives the time: `now`, or (None) that at which the waiting was over. Raises SteelyardError
        where it is before what the ledger holds: a grant that expired would be in force again."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with locked(self.folder / "lock"):
            now = now or datetime.now(UTC)
            head = self.ledger.head()
            if head is not None and now < parse_time(head.time, "ledger") - CLOCKS_APART:
                text = f"the ledger's last event is of {head.time}, the clock says {now:%Y-%m-%dT%H:%M:%SZ}"
                raise SteelyardError(f"{text}: it was set back: set it right")
            self.sweep()
            self.erased = self.erase_due(now)
            yield now

    # -- requests ----------------------------------------------------------------------------------------------------

    def requests(self, now: datetime) -> list[Request]:
        """All of them, oldest first."""
        grants = {grant.request: grant for grant in self.grants(now)}
        refused = {str(e.payload["request"]): parse_time(e.time, "ledger") for e in self.events("refused")}
        forgotten = {str(event.payload["request"]) for event in self.events("forgotten")}
        return [_request(event, grants, refused, forgotten, now) for event in self.events("requested")]

    def request(self, request: str, now: datetime) -> Request:
        """One of them."""
        _id(request, "r")
        found = next((one for one in self.requests(now) if one.id == request), None)
        if found is None:
            raise SteelyardError(f"request {request}: not in this workspace's ledger: see steelyard grant list")
        return found

    def open(self, request: Request, private: X25519PrivateKey, now: datetime | None = None) -> Sealed:
        """What a request says. Raises SteelyardError where it was forgotten, is to be, is lost, or is not what the
        ledger noted."""
        path = self.request_folder(request.id) / SEALED
        if request.state == "forgotten":
            raise SteelyardError(f"request {request.id}: was forgotten: nobody can read any more whose it was")
        if request.is_due(now or datetime.now(UTC)):
            text = f"was kept until {request.due:%Y-%m-%d}, as was promised: steelyard grant forget --due"
            raise SteelyardError(f"request {request.id}: {text}")
        try:
            data = read_bounded(path, FILE_LIMIT)
        except OSError as error:
            raise SteelyardError(f"{path}: {error.strerror}: restore it from a copy, or forget the request") from error
        found = parse_sealed(unseal(data, private, str(path)), str(path))
        if found.digest != request.digest:
            raise FormatError(f"{path}: is not the request that the ledger noted under {request.id}: restore it")
        return found

    def erase(self, request: str) -> None:
        """Remove a request's files, durably."""
        folder = self.request_folder(request)
        if folder.is_dir():
            shutil.rmtree(folder)
            fsync_folder(folder.parent)

    def erase_due(self, now: datetime) -> list[str]:
        """Erase who asked, of all whose time of retention is over; gives their ids."""
        due = [one.id for one in self.requests(now) if one.is_due(now)]
        for request in due:
            self.erase(request)
            self.note("forgotten", request=request)
        return due

    def sweep(self) -> None:
        """Erase what the ledger does not know: a request whose entering was killed half-way."""
        known = {str(event.payload["request"]) for event in self.events("requested")}
        there = self.folder / "requests"
        for folder in there.iterdir() if there.is_dir() else ():
            if folder.name not in known and re.fullmatch("r-[0-9a-f]{16}", folder.name):
                self.erase(folder.name)

    # -- grants ------------------------------------------------------------------------------------------------------

    def grants(self, now: datetime) -> list[Grant]:
        """All of them, oldest first."""
        revoked = {str(e.payload["grant"]): parse_time(e.time, "ledger") for e in self.events("revoked")}
        done = {
            kind: {str(event.payload["grant"]) for event in self.events(kind)}
            for kind in ("countersigned", "delivered", "received")
        }
        return [_grant(event, revoked, done, now) for event in self.events("issued")]

    def grant(self, grant: str, now: datetime) -> Grant:
        """One of them."""
        _id(grant, "g")
        found = next((one for one in self.grants(now) if one.id == grant), None)
        if found is None:
            raise SteelyardError(f"grant {grant}: not in this workspace's ledger: see steelyard grant list")
        return found

    def live(self, grant: str, now: datetime) -> Grant:
        """A grant that has neither ended nor been revoked."""
        found = self.grant(grant, now)
        if found.state == "revoked":
            raise SteelyardError(f"grant {grant}: was revoked at {found.revoked}: nothing is delivered on it any more")
        if found.state == "expired":
            raise SteelyardError(f"grant {grant}: expired at {found.expires}: ask for another one")
        return found

    # -- the ledger --------------------------------------------------------------------------------------------------

    def events(self, kind: str, **payload: Any) -> list[Event]:
        """Events of a kind, oldest first."""
        return self.ledger.events(f"grant.{kind}", **payload)

    def note(self, kind: str, check: Callable[[], None] | None = None, /, **payload: Any) -> None:
        """Add an event: ids, digests, times; where nothing that `check` finds in the ledger forbids it."""
        self.ledger.append(f"grant.{kind}", payload, check=check)


def refuse_released(ledger: Ledger, wanted: Wanted) -> None:
    """Raises SteelyardError where this release ever went out without a mark, or began to, or was withdrawn: a mark in
    later copies would prove nothing. What the ledger says without weights is counted as such a release."""
    for kind in ("release.publishing", "release.published"):
        for event in ledger.events(kind):
            weights, manifest = event.payload.get("weights"), event.payload.get("manifest")
            if not weights or weights == wanted.weights or manifest == wanted.manifest:
                what = (
                    "went out unmarked" if weights else "names no weights, so it may have been this release, unmarked"
                )
                text = f"({kind}, event {event.seq}): what anyone may have without a mark cannot be granted"
                raise SteelyardError(f"weights {wanted.weights[:16]}: {what} {text}")
    for event in ledger.events("release.withdrawn"):
        if event.payload.get("weights") == wanted.weights or event.payload.get("manifest") == wanted.manifest:
            raise SteelyardError(f"weights {wanted.weights[:16]}: withdrawn (event {event.seq}): they are not granted")
    if ledger.events("grant.marked", marked=wanted.weights):
        raise SteelyardError(f"weights {wanted.weights[:16]}: are a marked copy themselves: grant what they came from")


def _id(text: str, kind: Literal["r", "g"]) -> str:
    if re.fullmatch(f"{kind}-[0-9a-f]{{16}}", text) is None:
        what = "request" if kind == "r" else "grant"
        raise UsageError(f"{what} {text[:80]!r}: write {kind}- and 16 hexadecimal digits, as steelyard grant list does")
    return text


def _wanted(event: Event) -> Wanted:
    return Wanted(**{key: event.payload[key] for key in Wanted.model_fields})


def _request(
    event: Event, grants: dict[str, Grant], refused: dict[str, datetime], forgotten: set[str], now: datetime
) -> Request:
    payload = event.payload
    request = str(payload["request"])
    grant, ended = grants.get(request), refused.get(request)
    state: RequestState = "requested"
    if request in forgotten:
        state = "forgotten"
    elif grant is not None:
        state = "ended" if grant.state in ("expired", "revoked") else "granted"
        ended = grant.revoked or grant.expires
    elif ended is not None:
        state = "refused"
    return Request(
        id=request,
        digest=str(payload["digest"]),
        wanted=_wanted(event),
        licence=str(payload["licence"]),
        public=bool(payload["public"]),
        time=parse_time(event.time, "ledger"),
        retain=timedelta(days=int(payload["retain_days"])),
        state=state,
        grant=None if grant is None else grant.id,
        ended=ended,
    )


def _grant(event: Event, revoked: dict[str, datetime], done: dict[str, set[str]], now: datetime) -> Grant:
    payload = event.payload
    grant, expires = str(payload["grant"]), parse_time(str(payload["expires"]), "ledger")
    state: GrantState = "issued"
    for reached in ("countersigned", "delivered", "received"):
        if grant in done[reached]:
            state = reached
    if grant in revoked:
        state = "revoked"
    elif now >= expires:
        state = "expired"
    return Grant(
        id=grant,
        request=str(payload["request"]),
        wanted=_wanted(event),
        licence=str(payload["licence"]),
        public=bool(payload["public"]),
        code=str(payload["code"]),
        commitment=str(payload["commitment"]),
        mark=str(payload["mark"]),
        issued=parse_time(str(payload["issued"]), "ledger"),
        expires=expires,
        revoked=revoked.get(grant),
        state=state,
    )
