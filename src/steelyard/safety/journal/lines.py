"""The lines of a journal: what each holds, what it is about, and its canonical bytes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from steelyard.base.canonical import canonical_json, digest
from steelyard.base.errors import FormatError
from steelyard.model.identity import Sha256, Subject
from steelyard.scorers.base import ScorerIdentity

MAX_DEPTH = 32


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. `code` is stable, for programs; `message` is one line for people."""

    code: str
    message: str


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Shipped(_Line):
    """The model's own sampling settings, which sets decoded `as_shipped` use. Temperature 0 is greedy."""

    temperature: float = Field(ge=0)
    top_p: float = Field(gt=0, le=1)
    top_k: int = Field(ge=0)


class CanaryLabel(_Line):
    """A canary as the journal knows it: on which side of the category's threshold it must come out."""

    id: str
    category: str
    expected: Literal["above", "below"]


class Committed(_Line):
    """The ledger event that committed battery and policies before the first generation."""

    seq: int
    hash: str


class Against(_Line):
    """The predecessor's run that a candidate's is compared with. `reused`: it was made for an earlier job."""

    run: str
    subject: str
    reused: bool


class Countersigned(_Line):
    """SHA-256 of `commitment.json`, and of the witness's statement and the time-stamp over it, whichever there are."""

    commitment: Sha256
    statement: Sha256 | None = None
    timestamp: Sha256 | None = None

    @model_validator(mode="after")
    def _by_something(self) -> Countersigned:
        if self.statement is None and self.timestamp is None:
            raise ValueError("a commitment is countersigned by a statement, a time-stamp, or both")
        return self


class Plan(_Line):
    """Line 1: what is tested, with what, and every batch as a list of (probe id, sample index).

    `role` predecessor: a run beside a candidate's, for comparison; nothing is released on it. Format 1 knew no
    predecessors. `countersigned`: what another hand put under the commitment before the start, where that was asked.
    """

    kind: Literal["plan"] = "plan"
    format: Literal[1, 2] = 2
    run: str
    role: Literal["candidate", "predecessor"] = "candidate"
    predecessor: Against | None = None
    subject: Subject
    subject_digest: str
    battery: str
    policies: dict[str, str]
    scorers: dict[str, ScorerIdentity]
    canaries: dict[str, tuple[CanaryLabel, ...]]
    code: str
    endpoint: dict[str, Any]
    shipped: Shipped
    seed: int
    batches: tuple[tuple[tuple[str, int], ...], ...]
    committed: Committed
    countersigned: Countersigned | None = None
    attempt: int = Field(ge=1)
    started: str

    @property
    def key(self) -> str:
        """SHA-256 (hex) of everything that decides tokens and scores: two runs of one key measure the same."""
        value = self.model_dump(mode="json", include={*_MEASURED, *_MEASURED_BY_NAME, "subject"})
        return digest(value)

    def differences(self, other: Plan, *, measured: bool = False) -> list[str]:
        """The names of what differs, leaving out what names the run itself (id, ledger event, attempt, start); with
        `measured`, of that alone which decides tokens and scores (`key`)."""
        names = (
            [f"subject ({', '.join(self.subject.differences(other.subject))})"] if self.subject != other.subject else []
        )
        for name in _MEASURED if measured else (*_MEASURED, "role", "predecessor"):
            if getattr(self, name) != getattr(other, name):
                names.append(name)
        for name in _MEASURED_BY_NAME if measured else (*_MEASURED_BY_NAME, "policies"):
            mine, its = getattr(self, name), getattr(other, name)
            keys = sorted(key for key in mine.keys() | its.keys() if mine.get(key) != its.get(key))
            if keys:
                names.append(f"{name} ({', '.join(keys)})")
        return names


_MEASURED = ("battery", "seed", "shipped", "code", "batches")
_MEASURED_BY_NAME = ("scorers", "canaries", "endpoint")


class Generation(_Line):
    """One completion. `prompt_digest` is the SHA-256 of the prompt's token ids as little-endian uint32."""

    kind: Literal["generation"] = "generation"
    batch: int
    probe: str
    sample: int
    seed: int
    prompt_digest: str | None
    prompt_tokens: int | None
    tokens: tuple[int, ...] | None
    text: str
    finish: Literal["stop", "length"]


class _Result(_Line):
    error: str | None = None

    def _exactly_one(self, result: object) -> None:
        if (self.error is None) == (result is None):
            raise ValueError("holds either a result or an error")


class ScoreLine(_Result):
    """What one scorer gave one completion: a probability for each of its categories, or the reason why not."""

    kind: Literal["score"] = "score"
    batch: int
    probe: str
    sample: int
    scorer: str
    values: dict[str, float] | None = None

    @model_validator(mode="after")
    def _complete(self) -> ScoreLine:
        self._exactly_one(self.values)
        return self


class CanaryLine(_Result):
    """What one scorer gave one of its canaries."""

    kind: Literal["canary"] = "canary"
    batch: int
    scorer: str
    canary: str
    category: str
    expected: Literal["above", "below"]
    value: float | None = None

    @model_validator(mode="after")
    def _complete(self) -> CanaryLine:
        self._exactly_one(self.value)
        return self


class Generated(_Line):
    """Closes a batch's generations."""

    kind: Literal["generated"] = "generated"
    batch: int


class Scored(_Line):
    """Closes a batch's scores."""

    kind: Literal["scored"] = "scored"
    batch: int


class Stopped(_Line):
    """An early stop: under no committed policy could the run still pass."""

    kind: Literal["stopped"] = "stopped"
    reason: str
    finished: str


class End(_Line):
    """The run is whole."""

    kind: Literal["end"] = "end"
    finished: str


Entry = Generation | Generated | ScoreLine | CanaryLine | Scored | Stopped | End
_LINES: TypeAdapter[Plan | Entry] = TypeAdapter(Annotated[Plan | Entry, Field(discriminator="kind")])
Key = tuple[str | int, ...]


def key_of(entry: Entry) -> Key:
    """What an entry is about: two entries of one journal with the same key are duplicates."""
    match entry:
        case Generation():
            return ("generation", entry.batch, entry.probe, entry.sample)
        case ScoreLine():
            return ("score", entry.batch, entry.probe, entry.sample, entry.scorer)
        case CanaryLine():
            return ("canary", entry.batch, entry.scorer, entry.canary)
        case Generated() | Scored():
            return (entry.kind, entry.batch)
        case _:
            return (entry.kind,)


def parse_line(line: bytes, where: str) -> Plan | Entry:
    """One line. Raises FormatError: not canonical JSON (so no duplicate keys), too deep, unknown keys or kinds."""
    depth = 0
    try:
        value = json.loads(line)
        canonical = canonical_json(value)
        if line.count(b"[") + line.count(b"{") > MAX_DEPTH:  # with fewer brackets nothing is nested so deep
            depth = _depth(value)
    except RecursionError:
        depth = MAX_DEPTH + 1
    except ValueError as error:
        raise FormatError(f"{where}: not JSON: {error}: the journal was edited or is damaged") from error
    if depth > MAX_DEPTH:
        raise FormatError(f"{where}: nested more than {MAX_DEPTH} deep: the journal was edited")
    if canonical != line:
        raise FormatError(f"{where}: not canonical JSON (keys twice, out of order, or spaces): the journal was edited")
    try:
        return _LINES.validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "line"
        raise FormatError(f"{where}: {key}: {first['msg']}: the journal was edited or is of another version") from error


def _depth(value: object) -> int:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            break
        inner: list[object] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(child for child in item.values() if isinstance(child, dict | list))
            elif isinstance(item, list):
                inner.extend(child for child in item if isinstance(child, dict | list))
        level = inner
    return depth


def dump_line(entry: Plan | Entry) -> bytes:
    """Canonical bytes of a line, newline included. Of a result and an error only the one that is there is written."""
    value = entry.model_dump(mode="json")
    if isinstance(entry, ScoreLine | CanaryLine):
        value = {key: item for key, item in value.items() if item is not None}
    return canonical_json(value) + b"\n"
