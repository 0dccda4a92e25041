"""Signed statements: in-toto Statement v1 in a DSSE envelope, made and read with bounds.

    payload = test_result(subjects=..., configuration=..., passed=..., facts=...)
    envelope = sign(payload, signer)
    statement, key = read_test_result(envelope, "steelyard/test-result.dsse.json", keys)

The envelope is securesystemslib's, so `cosign` and any DSSE tool can check it. What is read here comes from strangers:
size and depth are bounded, a key that occurs twice or that we do not know is refused, and only the caller's own keys
are ever trusted. Sources: github.com/in-toto/attestation (spec/v1/statement.md, spec/predicates/test-result.md),
github.com/secure-systems-lab/dsse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import Key, Signature, Signer  # type: ignore[attr-defined]  # names it does not re-export

from steelyard.base.canonical import canonical_json
from steelyard.base.errors import FormatError, SteelyardError
from steelyard.base.strict import strict_base64, strict_json

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
TEST_RESULT = "https://in-toto.io/attestation/test-result/v0.1"
OWN = "(--key PEM, or --trust FILE)"
FOREIGN = f"if it is right, get that public key from its holder, not from here, and name it {OWN}"
ENVELOPE_LIMIT = 1_000_000  # bytes; a test result is a few kilobytes

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
ReleaseName = Annotated[str, StringConstraints(pattern=r"^[^/\\\x00-\x1f\x7f]{1,200}$")]
KeyKind = Literal["standard", "throwaway"]


class SignatureError(SteelyardError):
    """An envelope that is well formed, but not signed by any key that the caller trusts."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DigestSet(Strict):
    """in-toto's DigestSet; SHA-256 is the one algorithm here."""

    sha256: Sha256


class ResourceDescriptor(Strict):
    """in-toto's ResourceDescriptor: a name and what it must hash to."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    digest: DigestSet


class PredecessorFacts(Strict):
    """What the candidate was found not worse than: a run's subject and journal."""

    subject: Sha256
    journal_root: Sha256


class RunFacts(Strict):
    """What test-result v0.1 has no field for: when and on what the test ran, for which release, and who says so."""

    name: ReleaseName
    run: str
    started: str
    finished: str
    signed: str = Field(description="ISO time of the signature")
    key_kind: KeyKind
    endpoint: dict[str, Any]
    ledger_head: str | None = Field(description="SEQ:HASH of the last event before the signature")
    predecessor: PredecessorFacts | None = None
    version: str = Field(description="of steelyard")


class TestResult(Strict):
    """The predicate of test-result v0.1, with our own extension under `steelyard`."""

    __test__ = False  # not a test class, whatever pytest thinks of its name

    result: Literal["PASSED", "WARNED", "FAILED"]
    configuration: tuple[ResourceDescriptor, ...] = Field(min_length=1, max_length=100)
    passedTests: tuple[str, ...] = Field(max_length=1000)  # noqa: N815 (the format's spelling)
    warnedTests: tuple[str, ...] = ()  # noqa: N815
    failedTests: tuple[str, ...] = ()  # noqa: N815
    steelyard: RunFacts


class _Statement(Strict):
    type: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    subject: tuple[ResourceDescriptor, ...] = Field(min_length=1, max_length=100)
    predicateType: str  # noqa: N815
    predicate: dict[str, Any]


class Statement(Strict):
    """A test-result statement as read: `subjects` and `configuration` by name."""

    subjects: dict[str, str]
    configuration: dict[str, str]
    predicate: TestResult


def parse_time(text: str, where: str) -> datetime:
    """An ISO 8601 time with its zone, in UTC. Raises FormatError."""
    try:
        time = datetime.fromisoformat(text)
        if time.tzinfo is None:
            raise FormatError(f"{where}: the time {text[:40]!r} has no zone")
        time = time.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise FormatError(f"{where}: {text[:40]!r} is not an ISO 8601 time") from error
    # Far from the ends of the calendar, where sums with times overflow.
    if not 2000 <= time.year <= 2200:
        raise FormatError(f"{where}: the time {text[:40]!r} is not in the years 2000 to 2200")
    return time


def statement_bytes(predicate_type: str, subjects: Mapping[str, str], predicate: Mapping[str, Any]) -> bytes:
    """An in-toto Statement v1 as canonical JSON. `subjects`: name to SHA-256 (hex)."""
    return canonical_json(
        {
            "_type": STATEMENT_TYPE,
            "subject": descriptors(subjects),
            "predicateType": predicate_type,
            "predicate": predicate,
        }
    )


def test_result(
    *, subjects: Mapping[str, str], configuration: Mapping[str, str], passed: Sequence[str], facts: RunFacts
) -> bytes:
    """The payload of a PASSED test result (there is no release on anything else)."""
    predicate = {
        "result": "PASSED",
        "configuration": descriptors(configuration),
        "passedTests": sorted(passed),
        "warnedTests": [],
        "failedTests": [],
        "steelyard": facts.model_dump(mode="json"),
    }
    return statement_bytes(TEST_RESULT, subjects, predicate)


test_result.__test__ = False  # type: ignore[attr-defined]


def sign(payload: bytes, signer: Signer, certificates: str | None = None) -> bytes:
    """The DSSE envelope over `payload`, as canonical JSON with one signature; `certificates` (PEM, the signer's own
    first) go into it, for those who trust the authority that issued them instead of the key."""
    envelope = Envelope(payload, PAYLOAD_TYPE, {})
    envelope.sign(signer)
    data = envelope.to_dict()
    if certificates is not None:
        data["signatures"][0]["certificate"] = certificates
    return canonical_json(data) + b"\n"


def read_envelope(data: bytes, where: str) -> tuple[bytes, dict[str, str]]:
    """The payload and the signatures (key id to hex) of an envelope, *unverified*. Raises FormatError.

    Exactly one signature is expected: a second one could only be there to confuse.
    """
    raw = strict_json(data, where, limit=ENVELOPE_LIMIT)
    if not isinstance(raw, dict) or set(raw) != {"payload", "payloadType", "signatures"}:
        raise FormatError(f"{where}: not a DSSE envelope of payload, payloadType and signatures alone")
    if raw["payloadType"] != PAYLOAD_TYPE:
        raise FormatError(f"{where}: payloadType is {str(raw['payloadType'])[:80]!r}, not {PAYLOAD_TYPE!r}")
    signatures = raw["signatures"]
    if not isinstance(signatures, list) or len(signatures) != 1:
        count = len(signatures) if isinstance(signatures, list) else "no list of"
        raise FormatError(f"{where}: {count} signatures, where exactly 1 is expected")
    found: dict[str, str] = {}
    for signature in signatures:
        if not isinstance(signature, dict) or set(signature) - {"certificate"} != {"keyid", "sig"}:
            raise FormatError(f"{where}: a signature holds keyid and sig, perhaps a certificate, nothing else")
        if not isinstance(signature.get("certificate", ""), str):
            raise FormatError(f"{where}: certificate is not a text in PEM")
        if not isinstance(signature["keyid"], str):
            raise FormatError(f"{where}: keyid is not a string")
        found[signature["keyid"]] = strict_base64(signature["sig"], f"{where}: sig").hex()
    return strict_base64(raw["payload"], f"{where}: payload"), found


def envelope_certificates(data: bytes, where: str) -> str | None:
    """The certificates (PEM) that an envelope carries, *unverified*; None where it carries none. Raises FormatError."""
    read_envelope(data, where)
    found: str | None = strict_json(data, where, limit=ENVELOPE_LIMIT)["signatures"][0].get("certificate")
    return found


def verify_envelope(data: bytes, where: str, keys: Sequence[Key]) -> tuple[bytes, Key]:
    """The payload of an envelope signed by one of `keys`, and that key. Raises FormatError or SignatureError."""

    payload, signatures = read_envelope(data, where)
    keyid = next(iter(signatures))
    if not keys:
        raise SignatureError(f"{where}: signed by key {keyid[:80]}; give a public key of your own to check it {OWN}")
    envelope = Envelope(payload, PAYLOAD_TYPE, {name: Signature(name, sig) for name, sig in signatures.items()})
    try:
        accepted = envelope.verify(list(keys), 1)
    except VerificationError as error:
        if keyid in {key.keyid for key in keys}:
            message = f"{where}: the signature of key {keyid} does not fit the statement: one of them was changed"
        else:
            message = f"{where}: signed by key {keyid[:80]}, which is none of yours: {FOREIGN}"
        raise SignatureError(message) from error
    return payload, next(iter(accepted.values()))


def parse_statement(payload: bytes, where: str) -> tuple[str, dict[str, str], dict[str, Any]]:
    """Predicate type, subjects (name to SHA-256) and predicate of an in-toto Statement v1. Raises FormatError."""
    raw = strict_json(payload, where, limit=ENVELOPE_LIMIT)
    try:
        statement = _Statement.model_validate(raw)
    except ValidationError as error:
        raise FormatError(f"{where}: {first_of(error, 'statement')}") from error
    return statement.predicateType, by_name(statement.subject, where, "subject"), statement.predicate


def parse_test_result(payload: bytes, where: str) -> Statement:
    """A test-result statement, with no field that we do not know. Raises FormatError."""
    kind, subjects, predicate = parse_statement(payload, where)
    if kind != TEST_RESULT:
        raise FormatError(f"{where}: predicateType is {kind[:100]!r}, not {TEST_RESULT!r}")
    try:
        result = TestResult.model_validate(predicate)
    except ValidationError as error:
        raise FormatError(f"{where}: {first_of(error, 'predicate')}") from error
    return Statement(
        subjects=subjects, configuration=by_name(result.configuration, where, "configuration"), predicate=result
    )


def descriptors(named: Mapping[str, str]) -> list[dict[str, Any]]:
    """Name to SHA-256 as in-toto's ResourceDescriptors."""
    return [{"name": name, "digest": {"sha256": sha}} for name, sha in sorted(named.items())]


def by_name(listed: Sequence[ResourceDescriptor], where: str, what: str) -> dict[str, str]:
    """The reverse of `descriptors`. Raises FormatError where a name occurs twice."""
    named = {descriptor.name: descriptor.digest.sha256 for descriptor in listed}
    if len(named) != len(listed):
        raise FormatError(f"{where}: {what}: a name occurs twice")
    return named


def first_of(error: ValidationError, root: str) -> str:
    """What pydantic found first, in one line: the key and what is wrong with it."""
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc']) or root}: {first['msg']}"
