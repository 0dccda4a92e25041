"""What is signed about a grant: reviews, the code's countersignature, the marked copy, its receipt, a revocation.

All are in-toto statements v1 in DSSE envelopes, of predicate types of our own, for in-toto has none for these. None of
them is a test result: a marked copy was derived from a tested subject, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Literal, TypeVar

from pydantic import Field, StringConstraints, ValidationError

from steelyard.base.canonical import canonical_json
from steelyard.base.errors import FormatError
from steelyard.base.strict import strict_json
from steelyard.release.attest import (
    KeyKind,
    ReleaseName,
    Sha256,
    Strict,
    first_of,
    parse_statement,
    parse_time,
    statement_bytes,
)
from steelyard.release.layout import MAX_REVIEWS

REVIEW = "steelyard:grant-review/v1"
COUNTERSIGNATURE = "steelyard:grant-countersignature/v1"
COPY = "steelyard:marked-copy/v1"
RECEIPT = "steelyard:grant-receipt/v1"
REVOCATION = "steelyard:grant-revocation/v1"
COMMITMENT_LIMIT = 20_000  # bytes
LOUDEST = 0.0016  # relative RMS change of a copy: what a cast of float32 masters to bf16 costs
FRAMED = (
    "The mark says from which grant's copy these weights came. It does not say who passed them on: a holder of the "
    "release keys could also have made or leaked this copy."
)

GrantId = Annotated[str, StringConstraints(pattern=r"^g-[0-9a-f]{16}$")]
RequestId = Annotated[str, StringConstraints(pattern=r"^r-[0-9a-f]{16}$")]
Short = Annotated[str, StringConstraints(max_length=100)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Review(Strict):
    """A reviewer's word on a request. `days`: how long a grant may last."""

    request: RequestId
    decision: Literal["approve", "refuse"]
    days: int = Field(ge=1, le=3650)
    signed: Short
    key_kind: KeyKind
    version: Short


class Commitment(Strict):
    """What is fixed before a copy is made: the grant's code. `code`: salted SHA-256 of it (`trace.tardos`); `mark`:
    fingerprint of the key that it comes from; `reviews`: SHA-256 of their envelopes; `retain_days`: how long after the
    grant's end it is kept who asked."""

    format: Literal[1] = 1
    grant: GrantId
    request: Sha256
    weights: Sha256
    subject: Sha256
    manifest: Sha256
    licence: Sha256
    code: Sha256
    mark: Sha256
    reviews: tuple[Sha256, ...] = Field(min_length=2, max_length=MAX_REVIEWS)
    public: bool
    retain_days: int = Field(ge=1, le=3650)
    issued: Short
    expires: Short

    def to_bytes(self) -> bytes:
        return canonical_json(self.model_dump(mode="json")) + b"\n"


class Countersignature(Strict):
    """A witness's word that a commitment existed."""

    grant: GrantId
    signed: Short


class Perplexity(Strict):
    """Measured on one text (`text`: its SHA-256), per token, in the stored dtype, in windows that advance by half."""

    text: Sha256
    tokens: int = Field(ge=1)
    window: int = Field(ge=2)
    original: Finite
    copy_: Finite = Field(alias="copy")


class Difference(Strict):
    """A metric of the battery, on the same prompts: rates of the original and of the copy, and the 95% interval of
    their difference, where there is one."""

    metric: Annotated[str, StringConstraints(max_length=200)]
    n: int = Field(ge=1)
    original: Finite
    copy_: Finite = Field(alias="copy")
    lower: Finite | None = None
    upper: Finite | None = None


class Battery(Strict):
    """Differences found by a run of a battery on the copy beside the original (`journal_root`: the copy's)."""

    name: Annotated[str, StringConstraints(max_length=200)]
    battery: Sha256
    journal_root: Sha256
    differences: tuple[Difference, ...] = Field(min_length=1, max_length=200)


class Bound(Strict):
    """How far the copy is from what was tested. What was not measured is absent."""

    relative_change: float = Field(gt=0, lt=1, description="root of the squared change over the squared weights")
    perplexity: Perplexity | None = None
    battery: Battery | None = None


class Tested(Strict):
    """The release that a copy was derived from; `test_result` and `summary`: SHA-256 of their envelopes."""

    name: ReleaseName
    weights: Sha256
    subject: Sha256
    manifest: Sha256
    test_result: Sha256
    summary: Sha256


class MarkedCopy(Strict):
    """The predicate of a marked copy: derived from a tested subject, within a bound, for a grant."""

    grant: GrantId
    derived_from: Tested
    bound: Bound
    commitment: Sha256
    licence: Sha256
    expires: Short
    retain_days: int = Field(ge=1, le=3650)
    caution: Annotated[str, StringConstraints(max_length=1000)] = FRAMED
    signed: Short
    key_kind: KeyKind
    version: Short


class Receipt(Strict):
    """The recipient's word: this copy arrived whole, and its licence is accepted."""

    grant: GrantId
    licence: Sha256
    signed: Short


class Revocation(Strict):
    """A reviewer's word that a grant has ended."""

    grant: GrantId
    reason: Annotated[str, StringConstraints(min_length=1, max_length=1000)]
    signed: Short


Predicate = TypeVar("Predicate", Review, Countersignature, MarkedCopy, Receipt, Revocation)
_TYPES: Mapping[type[Strict], str] = {
    Review: REVIEW,
    Countersignature: COUNTERSIGNATURE,
    MarkedCopy: COPY,
    Receipt: RECEIPT,
    Revocation: REVOCATION,
}


def payload(subjects: Mapping[str, str], predicate: Strict) -> bytes:
    """The statement's bytes. What is None is left out: what was not measured is absent."""
    found = predicate.model_dump(mode="json", by_alias=True, exclude_none=True)
    return statement_bytes(_TYPES[type(predicate)], subjects, found)


def parse(data: bytes, where: str, kind: type[Predicate]) -> tuple[dict[str, str], datetime, Predicate]:
    """Subjects, time and content of a payload. Raises FormatError."""
    found, subjects, predicate = parse_statement(data, where)
    if found != _TYPES[kind]:
        raise FormatError(f"{where}: predicateType is {found[:100]!r}, not {_TYPES[kind]!r}")
    try:
        read = kind.model_validate(predicate)
    except ValidationError as error:
        raise FormatError(f"{where}: {first_of(error, 'predicate')}") from error
    return subjects, parse_time(read.signed, f"{where}: signed"), read


def parse_commitment(data: bytes, where: str) -> Commitment:
    """A grant's commitment. Raises FormatError, also for a second spelling of the same."""
    raw = strict_json(data, where, limit=COMMITMENT_LIMIT)
    try:
        found = Commitment.model_validate(raw)
    except ValidationError as error:
        raise FormatError(f"{where}: {first_of(error, 'commitment')}") from error
    if found.to_bytes() != data:
        raise FormatError(f"{where}: is not spelled as a commitment is")
    for name, time in (("issued", found.issued), ("expires", found.expires)):
        parse_time(time, f"{where}: {name}")
    return found
