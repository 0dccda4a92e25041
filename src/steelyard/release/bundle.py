"""The way of a release: attested by an evaluator, approved, sealed by a releaser; or all of it by one person.

    attest        the gate decides; on PASS a candidate is written: the files, their manifest, the signed test-result
    approve       an approver checks a candidate and adds a signed approval
    seal          a releaser checks all of it and adds the summary and the model signature; the bundle appears at OUT
    write_bundle  all of that with one key, where the policy does not ask for distinct people

A candidate is written only on a PASS that the gate gives here and now, and does not verify; a bundle appears only once
it has verified. Whatever is killed half-way leaves nothing that verifies, and can be done again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]  # not re-exported

from steelyard import __version__
from steelyard.base.canonical import sha256_file
from steelyard.base.errors import SteelyardError
from steelyard.base.files import new_folder
from steelyard.base.progress import Progress, Silent
from steelyard.release.attest import sign
from steelyard.release.gate import Decision, decide
from steelyard.release.keys import KeyInfo
from steelyard.release.layout import MANIFEST, TEST_RESULT
from steelyard.release.lineage import check_license
from steelyard.release.refused import Refused
from steelyard.release.signers import Signing, trusted_signer
from steelyard.release.statements import Approval, approval_payload, release_subjects, stamp
from steelyard.release.trust import Trust, one_key
from steelyard.release.writing import (
    About,
    add_approval,
    copy_candidate,
    find_approval,
    write_candidate,
    write_seals,
)
from steelyard.safety.policy import Policy

if TYPE_CHECKING:
    from steelyard.ledger.ledger import Ledger
    from steelyard.release.verify import Stage, Verification


@dataclass(frozen=True)
class Released:
    """A candidate or bundle, and the one decision it was written on."""

    bundle: Path
    decision: Decision


# -- one person ------------------------------------------------------------------------------------------------------


def write_bundle(
    *,
    run: Path,
    model: Path,
    policy: Policy,
    ledger: Ledger,
    signer: CryptoSigner,
    key: KeyInfo,
    out: Path,
    predecessor: Path | None = None,
    aside: Path | None = None,
    trust: Trust | None = None,
    about: About = About(),  # noqa: B008 (frozen)
    how: Signing = Signing(),  # noqa: B008 (frozen)
    now: datetime | None = None,
    progress: Progress | None = None,
) -> Released:
    """Ask the gate, once, and on PASS write, sign and verify the bundle; it appears at `out` whole or not at all.

    The release is called by the name of `out`; an earlier one there is renamed to `aside` after the PASS, and back
    where this fails. `predecessor` as in `decide`; `trust`: what the finished bundle is verified with (None: the key
    itself); `about`: for its papers; `how`: to sign, besides the key. Raises UsageError, before the gate is asked,
    where nobody states a licence; Refused, with the decision, on any other verdict; SteelyardError where `out` exists
    and there is no `aside`, and where the finished bundle does not verify.
    """
    progress, now = progress or Silent(), now or datetime.now(UTC)
    _check_signer(signer, key)
    if aside is None:
        _check_free(out)
    check_license(model, run, ledger, about.license)
    decision = decide(
        run=run,
        model=model,
        policy=policy,
        ledger=ledger,
        key=key,
        predecessor=predecessor,
        name=out.name,
        trust=trust,
        alone=True,
        now=now,
        progress=progress,
    )
    _check_pass(decision, run)
    with _moved_aside(out, aside), new_folder(out) as folder:
        write_candidate(folder, run, model, policy, decision, ledger, signer, key, out.name, about, how, now, progress)
        trust = trust or one_key([signer.public_key], policy)
        # Before its seals too: a signature, Sigstore's above all, cannot be taken back.
        candidate = _examined(folder, trust, "approved", now, progress, f"{out}: what was just written")
        _note(ledger, folder, candidate)
        write_seals(folder, candidate, policy, signer, key, how, now)
        _examined(folder, trust, "sealed", now, progress, f"{out}: the bundle just written")
    return Released(out, decision)


# -- several people --------------------------------------------------------------------------------------------------


def attest(
    *,
    run: Path,
    model: Path,
    policy: Policy,
    ledger: Ledger,
    signer: CryptoSigner,
    key: KeyInfo,
    out: Path,
    name: str | None = None,
    predecessor: Path | None = None,
    trust: Trust | None = None,
    about: About = About(),  # noqa: B008 (frozen)
    how: Signing = Signing(),  # noqa: B008 (frozen)
    now: datetime | None = None,
    progress: Progress | None = None,
) -> Released:
    """The evaluator's part: ask the gate, and on PASS write the candidate `out`, to be released as `name` (else under
    its folder's name). `predecessor` and `trust` as in `decide`. Raises Refused and SteelyardError as `write_bundle`.
    """
    progress, now = progress or Silent(), now or datetime.now(UTC)
    _check_signer(signer, key)
    _check_free(out)
    check_license(model, run, ledger, about.license)
    decision = decide(
        run=run,
        model=model,
        policy=policy,
        ledger=ledger,
        key=key,
        predecessor=predecessor,
        name=name or out.name,
        trust=trust,
        now=now,
        progress=progress,
    )
    _check_pass(decision, run)
    with new_folder(out) as folder:
        write_candidate(
            folder, run, model, policy, decision, ledger, signer, key, name or out.name, about, how, now, progress
        )
        own = Trust(evaluators=(signer.public_key,), approvers=(), releasers=(), policy=policy)
        _examined(folder, own, "attested", now, progress, f"{out}: the candidate just written")
        ledger.append("release.attested", _event(decision.run, policy, decision.subject, name or out.name, folder))
    return Released(out, decision)


def approve(
    candidate: Path,
    *,
    signer: CryptoSigner,
    key: KeyInfo,
    trust: Trust,
    how: Signing = Signing(),  # noqa: B008 (frozen)
    now: datetime | None = None,
    progress: Progress | None = None,
) -> Path:
    """An approver's part: check a candidate with one's own trust, and add an approval to it. Gives its file; where
    this key's is there already (a kill came after it), that one.

    Raises SteelyardError, with every reason, where the candidate does not hold, or this key may not approve it.
    """
    progress, now = progress or Silent(), now or datetime.now(UTC)
    _check_signer(signer, key)
    found = _examined(candidate, trust, "candidate", now, progress, str(candidate))
    if (there := find_approval(candidate, signer.public_key.keyid)) is not None:
        return there
    approval = Approval(
        name=found.name,
        test_result=sha256_file(candidate / TEST_RESULT),
        policy=found.policy,
        signed=stamp(now),
        key_kind=key.kind,
        version=__version__,
    )
    payload = approval_payload(release_subjects(found.weights, found.oms, found.manifest), approval)
    envelope = sign(payload, signer, how.pem)
    try:
        trusted_signer(envelope, "approval", "approvers", trust, now)
    except SteelyardError as error:
        raise SteelyardError(f"key {key.name!r} is none of the approvers of your trust file: {error}") from error
    added = add_approval(candidate, envelope)
    try:
        _examined(candidate, trust, "candidate", now, progress, f"{added}: not added")
    except SteelyardError:
        added.unlink()
        raise
    return added


def seal(
    candidate: Path,
    out: Path,
    *,
    signer: CryptoSigner,
    key: KeyInfo,
    trust: Trust,
    ledger: Ledger,
    how: Signing = Signing(),  # noqa: B008 (frozen)
    now: datetime | None = None,
    progress: Progress | None = None,
) -> Verification:
    """The releaser's part: check a candidate and its approvals, and write the bundle `out`, which has verified.

    Raises SteelyardError, with every reason, where something does not hold, where `out` exists, or where it is not
    called by the name that was attested.
    """
    progress, now = progress or Silent(), now or datetime.now(UTC)
    _check_signer(signer, key)
    _check_free(out)
    _examined(candidate, trust, "approved", now, progress, str(candidate))
    with new_folder(out) as folder:
        copy_candidate(candidate, folder, progress)
        # Once more: what is signed is the copy, whatever happened to the candidate meanwhile.
        found = _examined(folder, trust, "approved", now, progress, str(candidate))
        if found.name != out.name:
            raise SteelyardError(f"{out}: the candidate was attested as {found.name!r}: give the bundle that name")
        policy = trust.policy
        if policy is None:
            raise SteelyardError("the trust file names no policy: add policy: NAME, or a policy's .yaml")
        _note(ledger, folder, found)
        write_seals(folder, found, policy, signer, key, how, now)
        return _examined(folder, trust, "sealed", now, progress, f"{out}: the bundle just written")


# -- checks and notes -----------------------------------------------------------------------------------------------


def _check_signer(signer: CryptoSigner, key: KeyInfo) -> None:
    if key.keyid != signer.public_key.keyid:
        raise SteelyardError(f"key {key.name!r} is not the key that signs ({signer.public_key.keyid})")


def _check_free(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise SteelyardError(f"{out} exists already: a release is never overwritten: name another folder")


def _check_pass(decision: Decision, run: Path) -> None:
    if decision.verdict != "PASS":
        raise Refused(decision, run)


def _examined(folder: Path, trust: Trust, stage: Stage, now: datetime, progress: Progress, what: str) -> Verification:
    """What `verify` says of a folder at this stage. Raises SteelyardError, with every reason, where it is not ok."""
    from steelyard.release.verify import examine

    found = examine(folder, trust=trust, stage=stage, now=now, progress=progress)
    if not found.ok:
        reasons = "; ".join(finding.message for finding in found.findings)
        raise SteelyardError(f"{what}: does not verify: {reasons}")
    return found


def _note(ledger: Ledger, folder: Path, found: Verification) -> None:
    # Before the seals: better an event without a bundle than a bundle, or what a kill left of it, that no event knows.
    event = {"run": found.run, "policy": found.policy, "subject": found.subject, "name": found.name}
    ledger.append("release.bundled", event | {"bundle": sha256_file(folder / MANIFEST)})


def _event(run: str, policy: Policy, subject: str, name: str, folder: Path) -> dict[str, str]:
    return {
        "run": run,
        "policy": policy.digest,
        "subject": subject,
        "name": name,
        "bundle": sha256_file(folder / MANIFEST),
    }


@contextmanager
def _moved_aside(out: Path, aside: Path | None) -> Iterator[None]:
    """Give way at `out`: an earlier release is renamed, never deleted, and put back where this fails."""
    if aside is None or not out.exists():
        yield
        return
    os.rename(out, aside)
    try:
        yield
    except BaseException:
        os.rename(aside, out)
        raise
