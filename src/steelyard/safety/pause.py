"""The pause before the first generation: what a run will do is written down, for another hand to countersign.

A run that was asked for a countersignature commits to the ledger as always, writes `commitment.json` into its folder,
notes that file in the ledger (`safety.paused`) and stops there. A witness signs the file (`commitment.dsse.json`), or a
time-stamping authority stamps it (`commitment.tsr`); then the same command goes on. The journal's plan holds the
SHA-256 of all three, so a journal that was begun earlier cannot claim them. Whose signature counts is asked in
`release`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from steelyard.base.canonical import canonical_json, sha256_hex
from steelyard.base.errors import FormatError, SteelyardError
from steelyard.base.files import read_bounded, write_atomic
from steelyard.base.strict import strict_json
from steelyard.model.identity import Sha256
from steelyard.safety.attempts import alike
from steelyard.safety.journal import Against, Countersigned, Plan

if TYPE_CHECKING:  # `verify` reads this module too, and needs no database
    from steelyard.ledger.ledger import Event, Ledger

COMMITMENT = "commitment.json"
COUNTERSIGNATURE = "commitment.dsse.json"
TIMESTAMP = "commitment.tsr"
COMMITMENT_LIMIT = 100_000  # bytes; one with a hundred scorers has ten thousand

Look = Callable[[Path], Countersigned | None]
"""Gives the digests of what countersigns the commitment in a run's folder, None where nothing lies there. Raises
SteelyardError for what does not fit."""


class Paused(SteelyardError):  # noqa: N818 - nothing is wrong
    """Not an error: runs are committed, and wait for their countersignatures. Nothing was generated of them yet.

    `waiting`: the file of each run's commitment.
    """

    exit_code = 0

    def __init__(self, waiting: Mapping[str, Path]) -> None:
        self.waiting = dict(waiting)
        told = "; ".join(
            f"run {run} is committed and waits before its first generation: have {commitment} countersigned (steelyard "
            f"countersign {commitment.parent} --key WITNESS, or --timestamp-url URL)"
            for run, commitment in waiting.items()
        )
        super().__init__(f"{told}, put {COUNTERSIGNATURE} or {TIMESTAMP} beside it, and give the same command again")


class Commitment(BaseModel):
    """What a run was going to test, with what: written before the first generation.

    `head` is the ledger's head at that moment (SEQ:HASH), the event that commits this run, so all that happened before
    is countersigned with it; `attempt` how often this model was tried on this test by then; `policies` and `scorers`
    name to SHA-256; `nonce` makes every commitment another file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal[1] = 1
    run: str = Field(min_length=1, max_length=100)
    subject: Sha256
    battery: Sha256
    policies: dict[str, Sha256] = Field(min_length=1, max_length=100)
    scorers: dict[str, Sha256] = Field(max_length=100)
    code: Sha256
    predecessor: Against | None
    attempt: int = Field(ge=1)
    head: Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,18}:[0-9a-f]{64}$")]
    time: str = Field(max_length=40)
    nonce: Sha256

    @property
    def as_bytes(self) -> bytes:
        """The file: canonical JSON, and a newline."""
        return canonical_json(self.model_dump(mode="json")) + b"\n"


def commitment_of(plan: Plan) -> dict[str, Any]:
    """What the commitment to the run of this plan must say, time and nonce apart."""
    return {
        "run": plan.run,
        "subject": plan.subject_digest,
        "battery": plan.battery,
        "policies": plan.policies,
        "scorers": {name: identity.digest for name, identity in plan.scorers.items()},
        "code": plan.code,
        "predecessor": plan.predecessor,
        "attempt": plan.attempt,
        "head": f"{plan.committed.seq}:{plan.committed.hash}",
    }


def differing(commitment: Commitment, plan: Plan) -> list[str]:
    """The names of what a commitment says otherwise than a plan."""
    return [name for name, value in commitment_of(plan).items() if getattr(commitment, name) != value]


def parse_commitment(data: bytes, where: str) -> Commitment:
    """A commitment of strict and canonical JSON. Raises FormatError naming `where`."""
    raw = strict_json(data, where, limit=COMMITMENT_LIMIT)
    try:
        commitment = Commitment.model_validate_json(canonical_json(raw))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "commitment"
        raise FormatError(f"{where}: {key}: {first['msg']}: not a commitment, or edited") from error
    if commitment.as_bytes != data:
        raise FormatError(f"{where}: not canonical JSON as it was written: it was edited")
    return commitment


def load_commitment(path: Path) -> tuple[Commitment, bytes]:
    """A commitment and the bytes of its file. Raises FormatError."""
    try:
        data = read_bounded(path, COMMITMENT_LIMIT)
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}: give a run's {COMMITMENT}") from error
    return parse_commitment(data, str(path)), data


# -- the run -----------------------------------------------------------------------------------------------------------


def check_asked(folder: Path, ledger: Ledger, look: Look | None) -> None:
    """Before a run is committed: one that waits here is gone on with as it was started, in a ledger that still holds
    what its commitment names. Raises SteelyardError."""
    path = folder / COMMITMENT
    if not path.exists():
        return
    if look is None:
        raise SteelyardError(f"{path}: this run was started with --countersign: go on as it was started")
    commitment, _ = load_commitment(path)
    try:
        ledger.verify(expected_head=commitment.head)
    except SteelyardError as error:
        text = f"the ledger is not the one it was committed to ({error}): give that ledger, or a new run folder"
        raise SteelyardError(f"{path}: {text}") from error


def countersigned(plan: Plan, committed: Event, folder: Path, ledger: Ledger, look: Look, now: str) -> Countersigned:
    """What countersigns the run of `plan`, which is committed as event `committed` and has generated nothing.

    Writes and notes the commitment where that was not done yet. Raises Paused where nothing countersigns it, and
    SteelyardError where the commitment was edited, does not fit the plan, or the model was tried meanwhile.
    """
    path = folder / COMMITMENT
    if not path.exists():
        values = commitment_of(plan) | {"time": now, "nonce": secrets.token_hex(32)}
        write_atomic(path, Commitment(**values).as_bytes)
    commitment, data = load_commitment(path)
    if changed := differing(commitment, plan):
        text = f"{', '.join(changed)} changed since it was written: give a new run folder, and have that countersigned"
        raise SteelyardError(f"{path}: {text}")
    noted = {"run": plan.run, "commitment": sha256_hex(data)}
    events = ledger.events("safety.paused", run=plan.run)
    if not events:
        ledger.append("safety.paused", noted)
    elif events[-1].payload != noted:
        text = f"is not the one noted as event {events[-1].seq} of the ledger: it was edited: give a new run folder"
        raise SteelyardError(f"{path}: {text}")
    if tried := tried_meanwhile(ledger, committed):
        raise SteelyardError(
            f"{path}: the ledger moved: run {tried.payload['run']} (event {tried.seq}) was started on this model and "
            "test meanwhile: give a new run folder, and have that countersigned"
        )
    found = look(folder)
    if found is None:
        raise Paused({plan.run: path})
    if found.commitment != noted["commitment"]:
        raise SteelyardError(f"{path}: changed while it was read: leave it alone and try again")
    return found


def tried_meanwhile(ledger: Ledger, committed: Event, until: int | None = None) -> Event | None:
    """Another run that was started on the same subject and a like test after event `committed` (and before event
    `until`), or None: a pause is not there for trying first."""
    for event in ledger.events("safety.committed", subject=committed.payload["subject"]):
        later = event.seq > committed.seq and (until is None or event.seq < until)
        if later and alike(event.payload.get("questions", ()), committed.payload["questions"]):
            return event
    return None


def check_resumed(plan: Plan, folder: Path, look: Look | None) -> None:
    """A journal is gone on with as it was begun: with what countersigned it, or with nothing. Raises SteelyardError."""
    if (plan.countersigned is None) != (look is None):
        raise SteelyardError(
            f"{folder}: this run was started with{'out' if look else ''} --countersign: go on as it was started, or "
            "give a new run folder"
        )
    if look is not None and look(folder) != plan.countersigned:
        raise SteelyardError(
            f"{folder}: {COMMITMENT} or what countersigns it is not what the run was started with: put that back, or "
            "give a new run folder"
        )
