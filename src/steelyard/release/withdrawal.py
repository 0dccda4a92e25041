"""The list of withdrawn releases: one signed file on any static host, that reaches everyone who verifies.

    findings = check_withdrawn("https://example.org/withdrawn.json", trust, manifest=..., weights=..., state=None)

The file is a DSSE envelope with a payload type of its own, so that no signature made for anything else fits it, and
with the signatures of a quorum. A list only grows: its entries never change and never go. Each has a sequence number,
an end, and the SHA-256 of the list before it. What a verifier has seen is remembered (`withdrawal_seen`), so an older,
a forked or a shortened list is refused; a list that was held back is refused once its end is over. The roles are those
of The Update Framework's snapshot and timestamp (theupdateframework.github.io, sections 5.4 and 5.5) in one file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import UnverifiedSignatureError
from securesystemslib.signer import Signature, Signer  # type: ignore[attr-defined]  # names it does not re-export

from steelyard.base.canonical import canonical_json, sha256_hex
from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.base.strict import strict_base64, strict_json
from steelyard.model.identity import Sha256
from steelyard.release.attest import parse_time
from steelyard.release.evidence import CLOCKS_APART
from steelyard.release.trust import Trust
from steelyard.release.withdrawal_source import read_source
from steelyard.safety.journal import Finding

PAYLOAD_TYPE = "application/vnd.steelyard.withdrawals+json"
LIST_LIMIT = 16_000_000  # bytes of the file; the longest list has 14 million
MAX_ENTRIES = 2_000
MAX_SIGNATURES = 20
MAX_VALID = timedelta(days=366)  # from issue to end
LIST_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
MAX_REASON = 1_000  # characters
_DEPTH = 4


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Entry(_Strict):
    """One withdrawn release: SHA-256 of its manifest file, and its weights root, under whatever name they go about."""

    manifest: Sha256
    weights: Sha256
    name: str = Field(min_length=1, max_length=200)
    time: str = Field(max_length=40)
    reason: str = Field(min_length=1, max_length=MAX_REASON, pattern=r"\S")
    replaced_by: Sha256 | None = Field(default=None, description="the manifest of the release to use instead")


class WithdrawalList(_Strict):
    """The list as signed. `entries` are in the order in which they were added; `previous` is the SHA-256 of the payload
    of the list before."""

    format: Literal[1]
    name: str = Field(pattern=LIST_NAME)
    sequence: int = Field(ge=1, le=10**9)
    issued: str = Field(max_length=40)
    expires: str = Field(max_length=40)
    previous: Sha256 | None
    entries: tuple[Entry, ...] = Field(max_length=MAX_ENTRIES)

    @model_validator(mode="after")
    def _whole(self) -> WithdrawalList:
        if (self.sequence == 1) != (self.previous is None):
            raise ValueError("previous: the first list has none, every other one has it")
        manifests = [entry.manifest for entry in self.entries]
        if len(set(manifests)) != len(manifests):
            raise ValueError("entries: a manifest occurs twice")
        return self


@dataclass(frozen=True)
class SignedList:
    """An envelope as read; nothing of it is believed before `check_quorum`. `signatures`: key id to hex."""

    where: str
    content: WithdrawalList
    payload: bytes
    signatures: Mapping[str, str]
    issued: datetime
    expires: datetime

    @property
    def digest(self) -> str:
        """SHA-256 of the payload: the list's name, however many have signed it."""
        return sha256_hex(self.payload)

    def envelope(self) -> Envelope:
        signatures = {key: Signature(key, value) for key, value in self.signatures.items()}
        return Envelope(self.payload, PAYLOAD_TYPE, signatures)


def list_bytes(content: WithdrawalList, signers: Sequence[Signer] = ()) -> bytes:
    """The file of a new list, signed by `signers`."""
    envelope = Envelope(canonical_json(content.model_dump(mode="json")), PAYLOAD_TYPE, {})
    for signer in signers:
        envelope.sign(signer)
    return canonical_json(envelope.to_dict()) + b"\n"


def signed_again(signed: SignedList, signers: Sequence[Signer]) -> bytes:
    """The same list with the signatures of `signers` besides."""
    envelope = signed.envelope()
    for signer in signers:
        envelope.sign(signer)
    return canonical_json(envelope.to_dict()) + b"\n"


def read_list(data: bytes, where: str) -> SignedList:
    """A list of a stranger, checked for form only. Raises FormatError."""
    raw = strict_json(data, where, limit=LIST_LIMIT, depth=_DEPTH)
    if not isinstance(raw, dict) or set(raw) != {"payload", "payloadType", "signatures"}:
        raise FormatError(f"{where}: not a DSSE envelope of payload, payloadType and signatures alone")
    if raw["payloadType"] != PAYLOAD_TYPE:
        raise FormatError(f"{where}: payloadType is {str(raw['payloadType'])[:80]!r}, not {PAYLOAD_TYPE!r}")
    payload = strict_base64(raw["payload"], f"{where}: payload")
    signatures = _signatures(raw["signatures"], where)
    inner = strict_json(payload, f"{where}: payload", limit=LIST_LIMIT, depth=_DEPTH)
    try:
        content = WithdrawalList.model_validate_json(json.dumps(inner))
    except ValidationError as error:
        first = error.errors()[0]
        raise FormatError(f"{where}: {'.'.join(map(str, first['loc'])) or 'list'}: {first['msg']}") from error
    issued, expires = (parse_time(getattr(content, name), f"{where}: {name}") for name in ("issued", "expires"))
    if not issued < expires <= issued + MAX_VALID:
        raise FormatError(f"{where}: expires: must be after issued, by at most {MAX_VALID.days} days")
    for entry in content.entries:
        if parse_time(entry.time, f"{where}: entries") > issued + CLOCKS_APART:
            raise FormatError(f"{where}: entries: {entry.manifest[:16]} was withdrawn after the list was issued")
    return SignedList(where, content, payload, signatures, issued, expires)


def check_quorum(signed: SignedList, trust: Trust) -> list[Finding]:
    """Did enough of the verifier's own signers sign it? A key that is not one of his counts for nothing; one of his
    that is revoked, or was rotated or ran out before the list was issued, neither. Raises UsageError where he names
    none.
    """
    rule, envelope = trust.withdrawal, signed.envelope()
    own = {key.keyid: key for key in rule.signers}
    if not own or not 1 <= rule.quorum <= len(own):
        raise UsageError("a list of withdrawn releases: the trust file names no withdrawal.signers with their quorum")
    pae, count = envelope.pae(), 0
    for keyid, signature in envelope.signatures.items():
        if keyid not in own:
            continue
        try:
            own[keyid].verify_signature(signature, pae)
        except UnverifiedSignatureError:
            text = f"{signed.where}: the signature of key {keyid} does not fit the list: one of them was changed"
            return [Finding("list-signature", text)]
        count += _may_sign(keyid, signed.issued, trust)
    if count >= rule.quorum:
        return []
    text = f"{signed.where}: signed by {count} of your withdrawal signers, {rule.quorum} are needed: ask the others"
    text += " to sign it (steelyard withdraw --sign PROPOSAL)"
    return [Finding("list-signature", text)]


def check_withdrawn(
    list_file: Path | str,
    trust: Trust,
    *,
    manifest: str,
    weights: str,
    state: Path | None,
    now: datetime | None = None,
    insecure: bool = False,
) -> list[Finding]:
    """Is the release withdrawn, by its manifest or by its weights under any name, and can the list be relied on?

    `list_file` is a file or an https URL (`insecure`: plain http, too); `state` is where the last list seen is
    remembered (None: in the user's data folder). A list that cannot be had or read is a finding: without it nobody
    knows. Raises UsageError for an address of another kind, and where `trust` names no signers.
    """
    from steelyard.release.withdrawal_seen import check_seen

    now = now or datetime.now(UTC)
    try:
        signed = read_list(*read_source(list_file, LIST_LIMIT, insecure=insecure))
    except UsageError:
        raise
    except SteelyardError as error:
        return [Finding("list", str(error))]
    findings = check_quorum(signed, trust)
    if trust.withdrawal.name not in (None, signed.content.name):
        text = (
            f"{signed.where}: is the list {signed.content.name!r}, your trust file asks for {trust.withdrawal.name!r}"
        )
        findings.append(Finding("list-name", text))
    if findings:
        return findings  # nothing that it says is believed
    faults = check_time(signed, now)
    # Also a list whose end is over was signed: whoever has seen it believes no earlier one.
    keep = all(fault.code == "list-expired" for fault in faults)
    faults += check_seen(signed, trust, state, now, keep=keep)
    return [*withdrawn(signed, manifest, weights), *faults]


def withdrawn(signed: SignedList, manifest: str, weights: str) -> list[Finding]:
    """A finding for every entry that names this manifest or these weights."""
    found = []
    for entry in signed.content.entries:
        if manifest != entry.manifest and weights != entry.weights:
            continue
        what = repr(entry.name) if manifest == entry.manifest else f"the same weights, released as {entry.name!r},"
        instead = f"; use the release with manifest {entry.replaced_by}" if entry.replaced_by else ""
        text = f"{signed.where}: {what} was withdrawn at {entry.time}: {' '.join(entry.reason.split())}{instead}"
        found.append(Finding("withdrawn", text))
    return found


def check_time(signed: SignedList, now: datetime) -> list[Finding]:
    """A list of the future, and one whose end is over."""
    if signed.issued > now + CLOCKS_APART:
        return [Finding("list-future", f"{signed.where}: was issued at {signed.content.issued}, later than now")]
    if signed.expires <= now:
        text = f"{signed.where}: expired at {signed.content.expires}: fetch a newer one, or where there is none ask its"
        text += " signers to issue it anew (steelyard withdraw --refresh)"
        return [Finding("list-expired", text)]
    return []


def _may_sign(keyid: str, issued: datetime, trust: Trust) -> bool:
    until = trust.until.get(keyid)
    if until is not None and issued > until:
        return False
    return not any(
        event.keyid == keyid and (event.kind == "revocation" or issued > event.time) for event in trust.events
    )


def _signatures(raw: object, where: str) -> dict[str, str]:
    if not isinstance(raw, list) or not 1 <= len(raw) <= MAX_SIGNATURES:
        raise FormatError(f"{where}: signatures: a list of 1 to {MAX_SIGNATURES} is expected")
    found: dict[str, str] = {}
    for one in raw:
        if not isinstance(one, dict) or set(one) != {"keyid", "sig"}:
            raise FormatError(f"{where}: a signature holds keyid and sig, nothing else")
        keyid = one["keyid"]
        if not isinstance(keyid, str) or not 1 <= len(keyid) <= 200:
            raise FormatError(f"{where}: keyid is not a short string")
        if keyid in found:
            raise FormatError(f"{where}: key {keyid[:80]!r} signs twice: two signatures of one key are not two signers")
        found[keyid] = strict_base64(one["sig"], f"{where}: sig").hex()
    return found
