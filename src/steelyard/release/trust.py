"""Whom a verifier trusts, for what: his own file, never one found in a bundle.

    # trust.yaml; every path is relative, inside its folder
    format: 1
    policy: public
    evaluators: [alice.pub.pem]
    approvers: [bob.pub.pem, {key: carol.pub.pem, until: "2027-01-01T00:00:00Z"}]
    approvals: 2
    releasers: [{certificate_authority: root.pem, identity: dora@example.org}]   # or a key
    witnesses: [eve.pub.pem]
    timestamp_authorities: [tsa-root.pem]
    withdrawal: {signers: [dora.pub.pem, bob.pub.pem], quorum: 2,
                 list: "https://example.org/withdrawn.json", name: models}
    grants: {reviewers: [bob.pub.pem, carol.pub.pem], needed: 2}
    revocations: [x.revocation.dsse.json]

With public keys alone (`one_key`) each of them may hold every role; that is enough only for a policy that does not ask
for distinct people.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from cryptography import x509
from pydantic import BaseModel, ConfigDict, Field, model_validator
from securesystemslib.signer import Key  # type: ignore[attr-defined]  # not re-exported

from steelyard.base.errors import FormatError, UsageError
from steelyard.base.files import inside, read_bounded
from steelyard.base.yamlfile import Document, read_yaml
from steelyard.release.attest import parse_time
from steelyard.release.certificates import Authority, load_authorities
from steelyard.release.keyless import SigstoreIdentity
from steelyard.release.keys import KeyEvent, load_public_key, read_key_event
from steelyard.release.layout import MAX_APPROVALS, MAX_REVIEWS
from steelyard.safety.journal import Finding
from steelyard.safety.policy import Policy, load_policy

FILE_LIMIT = 100_000  # bytes, of a trust file and of a certificate
MAX_KEYS = 50  # of one role

Role = Literal["evaluators", "approvers", "releasers", "witnesses"]
ROLES: tuple[Role, ...] = ("evaluators", "approvers", "releasers", "witnesses")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Who(_Strict):
    """A public key, perhaps only until a time; whoever a certificate authority calls by that identity; or, for model
    signatures alone, whoever a Sigstore issuer does."""

    key: str | None = None
    until: str | None = None
    certificate_authority: str | None = None
    issuer: str | None = None
    identity: str | None = Field(default=None, min_length=1, max_length=500)

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return {"key": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_of_two(self) -> _Who:
        given = {name for name in type(self).model_fields if getattr(self, name) is not None}
        if given not in ({"key"}, {"key", "until"}, {"certificate_authority", "identity"}, {"issuer", "identity"}):
            raise ValueError("give the path of a public key, or an identity with its certificate_authority or issuer")
        return self


class _Withdrawal(_Strict):
    signers: tuple[str, ...] = Field(min_length=1, max_length=MAX_KEYS)
    quorum: int = Field(ge=1, le=MAX_KEYS)
    list: str | None = Field(default=None, min_length=1, max_length=2000)
    name: str | None = Field(default=None, min_length=1, max_length=200)


class _Grants(_Strict):
    reviewers: tuple[str, ...] = Field(min_length=2, max_length=MAX_KEYS)
    needed: int = Field(ge=2, le=MAX_REVIEWS)


class _TrustFile(_Strict):
    format: Literal[1]
    policy: str = Field(min_length=1, max_length=500)
    evaluators: tuple[_Who, ...] = Field(min_length=1, max_length=MAX_KEYS)
    approvers: tuple[_Who, ...] = Field(default=(), max_length=MAX_KEYS)
    approvals: int = Field(default=0, ge=0, le=MAX_APPROVALS)
    releasers: tuple[_Who, ...] = Field(min_length=1, max_length=MAX_KEYS)
    witnesses: tuple[_Who, ...] = Field(default=(), max_length=MAX_KEYS)
    timestamp_authorities: tuple[str, ...] = Field(default=(), max_length=MAX_KEYS)
    withdrawal: _Withdrawal | None = None
    grants: _Grants | None = None
    revocations: tuple[str, ...] = Field(default=(), max_length=1000)


@dataclass(frozen=True)
class Withdrawal:
    """Who may withdraw a release: `quorum` of the `signers`. Nobody, where there are none. `source`: the list (a file
    or an https URL) that every verification asks; `name`: what it must be called. None: whatever is given."""

    signers: tuple[Key, ...] = ()
    quorum: int = 0
    source: Path | str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Reviewers:
    """Who reviews requests for access: `needed` of the `keys`, at least two people. Nobody, where there are none."""

    keys: tuple[Key, ...] = ()
    needed: int = 0


@dataclass(frozen=True)
class Trust:
    """Keys by role, with what else the verifier holds a release to. `policy` None: the packaged one that it names.

    `until`: by key id, the time after which a key signs nothing any more. `events`: revocations and rotations.
    `authorities`: by role, those who may certify its keys. `sigstore`: whose keyless model signatures count.
    """

    evaluators: tuple[Key, ...]
    approvers: tuple[Key, ...]
    releasers: tuple[Key, ...]
    witnesses: tuple[Key, ...] = ()
    approvals: int = 0
    policy: Policy | None = None
    timestamp_authorities: tuple[x509.Certificate, ...] = ()
    withdrawal: Withdrawal = Withdrawal()
    grants: Reviewers = Reviewers()
    events: tuple[KeyEvent, ...] = ()
    until: Mapping[str, datetime] = field(default_factory=dict)
    authorities: Mapping[Role, tuple[Authority, ...]] = field(default_factory=dict)
    sigstore: tuple[SigstoreIdentity, ...] = ()

    def keys(self, role: Role) -> tuple[Key, ...]:
        """The keys of a role."""
        found: tuple[Key, ...] = getattr(self, role)
        return found

    def shared(self) -> Iterator[Finding]:
        """A finding for every two roles that one key may hold: two roles in one hand are not two people."""
        for one, other in combinations(ROLES, 2):
            both = {key.keyid for key in self.keys(one)} & {key.keyid for key in self.keys(other)}
            both |= _names(self, one) & _names(self, other)
            if both:
                yield Finding("trust", f"{sorted(both)[0]} is trusted among {one} and {other}: pin another for each")


def _names(trust: Trust, role: Role) -> set[str]:
    return {authority.identity for authority in trust.authorities.get(role, ())}


def one_key(
    keys: Sequence[Key], policy: Policy | None, *, events: Sequence[KeyEvent] = (), withdrawal: Withdrawal | None = None
) -> Trust:
    """Trust in bare public keys: each of them may hold every role."""
    every = tuple(keys)
    return Trust(
        evaluators=every,
        approvers=every,
        releasers=every,
        witnesses=every,
        policy=policy,
        withdrawal=withdrawal or Withdrawal(every, 1 if every else 0),
        events=tuple(events),
    )


def load_trust(path: Path) -> Trust:
    """The verifier's file. Raises UsageError naming the key that is wrong, SteelyardError for what it points to."""
    raw, document = read_yaml(path, "trust file", FILE_LIMIT)
    file = document.validate(_TrustFile, raw)
    folder = path.parent
    keys: dict[Role, tuple[Key, ...]] = {}
    until: dict[str, datetime] = {}
    authorities: dict[Role, tuple[Authority, ...]] = {}
    for role in ROLES:
        entries: tuple[_Who, ...] = getattr(file, role)
        keys[role] = tuple(_keys(document, folder, role, entries, until))
        authorities[role] = tuple(_authorities(document, folder, role, entries))
    if file.approvals > len(file.approvers):
        text = f"must be at most {len(file.approvers)}, the number of approvers, not {file.approvals}"
        raise document.located(("approvals",), text)
    withdrawal = Withdrawal()
    if file.withdrawal is not None:
        signers = [_Who(key=name) for name in file.withdrawal.signers]
        loaded = tuple(_keys(document, folder, "withdrawal", signers, until, "signers"))
        if file.withdrawal.quorum > len(loaded):
            raise document.located(("withdrawal", "quorum"), f"must be at most {len(loaded)}, the number of signers")
        withdrawal = Withdrawal(loaded, file.withdrawal.quorum, _source(document, folder, file), file.withdrawal.name)
    grants = Reviewers()
    if file.grants is not None:
        reviewers = [_Who(key=name) for name in file.grants.reviewers]
        loaded = tuple(_keys(document, folder, "grants", reviewers, until, "reviewers"))
        if file.grants.needed > len(loaded):
            raise document.located(("grants", "needed"), f"must be at most {len(loaded)}, the number of reviewers")
        grants = Reviewers(loaded, file.grants.needed)
    every = [*withdrawal.signers, *grants.keys, *(key for role in ROLES for key in keys[role])]
    events = [
        read_key_event(_place(document, folder, "revocations", name), every, unpinned=True) for name in file.revocations
    ]
    return Trust(
        **keys,
        approvals=file.approvals,
        policy=_policy(document, folder, file.policy),
        timestamp_authorities=tuple(
            certificate
            for name in file.timestamp_authorities
            for certificate in _certificates(_place(document, folder, "timestamp_authorities", name))
        ),
        withdrawal=withdrawal,
        grants=grants,
        events=tuple(event for event in events if event is not None),
        until=until,
        authorities={role: found for role, found in authorities.items() if found},
        sigstore=tuple(_sigstore(document, file)),
    )


def _policy(document: Document, folder: Path, name: str) -> Policy:
    own = name.endswith((".yaml", ".yml", ".json"))
    return load_policy(str(_place(document, folder, "policy", name)) if own else name)


def _source(document: Document, folder: Path, file: _TrustFile) -> Path | str | None:
    """Where the list is: an address as it is written, a file beside the trust file."""
    named = None if file.withdrawal is None else file.withdrawal.list
    return named if named is None or "://" in named else _place(document, folder, "withdrawal", named)


def _keys(
    document: Document, folder: Path, role: str, entries: Sequence[_Who], until: dict[str, datetime], *more: str
) -> Iterator[Key]:
    seen: dict[str, str] = {}
    for index, entry in enumerate(entries):
        if entry.key is None:
            continue
        key = load_public_key(_place(document, folder, role, entry.key))
        if key.keyid in seen:
            text = f"is the key of {seen[key.keyid]} again: two names in one hand are not two people"
            raise document.located((role, *more, index), text)
        seen[key.keyid] = entry.key
        if entry.until is not None:
            end = parse_time(entry.until, f"{document.where}: {role}: until")
            until[key.keyid] = min(end, until.get(key.keyid, end))
        yield key


def _authorities(document: Document, folder: Path, role: str, entries: Sequence[_Who]) -> Iterator[Authority]:
    for entry in entries:
        if entry.certificate_authority is not None and entry.identity is not None:
            path = _place(document, folder, role, entry.certificate_authority)
            yield from load_authorities(path, entry.identity)


def _sigstore(document: Document, file: _TrustFile) -> Iterator[SigstoreIdentity]:
    for role in ROLES:
        entries: tuple[_Who, ...] = getattr(file, role)
        for index, entry in enumerate(entries):
            if entry.issuer is None or entry.identity is None:
                continue
            if role != "releasers":
                raise document.located((role, index), "Sigstore signs models, not statements: a releaser's only")
            yield SigstoreIdentity(entry.identity, entry.issuer)


def _place(document: Document, folder: Path, key: str, name: str) -> Path:
    try:
        return inside(folder, name)
    except FormatError as error:
        raise document.located((key,), str(error)) from error


def _certificates(path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(read_bounded(path, FILE_LIMIT))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}: give a certificate in PEM") from error
    except ValueError as error:
        raise FormatError(f"{path}: not a certificate in PEM: {' '.join(str(error).split())[:200]}") from error
