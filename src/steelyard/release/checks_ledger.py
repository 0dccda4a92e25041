"""What the gate asks of a run with the ledger at hand: committed, noted, finished, how often tried, beside whom?"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from steelyard.base.canonical import sha256_hex
from steelyard.base.errors import SteelyardError
from steelyard.base.progress import Progress, Silent
from steelyard.model.identity import subject_of
from steelyard.release.attest import parse_time
from steelyard.release.checks_model import check_generations
from steelyard.release.commitment import check_noted
from steelyard.release.evidence import CLOCKS_APART, Evidence, some
from steelyard.safety.attempts import attempts, candidates, kin, releases_of_kin
from steelyard.safety.commit import commitment
from steelyard.safety.journal import Finding, Journal, read_journal
from steelyard.safety.overlap import overlap_json, searches
from steelyard.safety.paired import comparable, compare
from steelyard.safety.policy import Policy

if TYPE_CHECKING:
    from steelyard.ledger.ledger import Event, Ledger


def check_ledger(evidence: Evidence, policy: Policy, ledger: Ledger, now: datetime) -> Iterator[Finding]:
    """Is the ledger whole, and does it know this run, begun and grown and ended, one of not too many?"""
    try:
        ledger.verify()
    except SteelyardError as error:
        yield Finding("ledger", str(error))
        return
    event = yield from _check_run(evidence, ledger)
    if event is None:
        return
    yield from check_noted(evidence, ledger, event)
    yield from _check_attempts(evidence, policy, ledger, event)
    yield from _check_searches(evidence, policy, ledger)
    head = ledger.head()
    if head is not None and parse_time(head.time, "ledger") > now + CLOCKS_APART:
        yield Finding("time", f"the ledger's last event is of {head.time}, later than now: the clock was set back")


def _check_attempts(evidence: Evidence, policy: Policy, ledger: Ledger, event: Event) -> Iterator[Finding]:
    plan, committed = evidence.journal.plan, commitment(evidence.journal.plan, evidence.battery)
    count = attempts(ledger, committed, event.seq)
    if count > policy.max_attempts:
        text = f"is attempt {count} on this subject and test, {policy.name} allows {policy.max_attempts}"
        yield Finding("attempts", f"run {plan.run} {text}")
    if plan.attempt != count:
        text = f"says that it is attempt {plan.attempt}, the ledger counts {count}"
        yield Finding("attempts", f"{evidence.where['journal']}: {text}")
    tried = candidates(ledger, committed, event.seq)
    if tried > policy.max_candidates:
        text = f"{tried} models that differ in their weights alone were tried on this test since the last release"
        yield Finding("attempts", f"{text}, {policy.name} allows {policy.max_candidates}")


def _check_searches(evidence: Evidence, policy: Policy, ledger: Ledger) -> Iterator[Finding]:
    """Is overlap.json the last search that the ledger knows, and was no earlier one, over other data, worse?"""
    plan, where = evidence.journal.plan, evidence.where["overlap"]
    noted = searches(ledger, plan.subject_digest, evidence.battery)
    if evidence.overlap is None:
        if noted:
            text = f"is missing, but the training data was searched (event {noted[-1].seq} of the ledger)"
            yield Finding("overlap", f"{where}: {text}")
        return
    if not any(
        event.payload.get("overlap") == sha256_hex(overlap_json(evidence.overlap))
        and event.payload.get("run") == plan.run
        for event in noted
    ):
        yield Finding("overlap", f"{where}: is not what a search noted in the ledger: search again")
    for event in noted:
        worst = event.payload.get("worst")
        if isinstance(worst, float | int) and worst > max(policy.max_overlap, evidence.overlap.worst):
            text = f"event {event.seq} of the ledger found {worst:.1%} of an axis in the training data"
            yield Finding(
                "overlap", f"{where}: {text}, {policy.name} allows {policy.max_overlap:.1%}: no later search undoes it"
            )


def _check_run(evidence: Evidence, ledger: Ledger) -> Generator[Finding, None, Event | None]:
    """Is this journal that of a run which the ledger saw committed, growing and finished? Gives its commitment."""
    journal, plan = evidence.journal, evidence.journal.plan
    committed = ledger.events("safety.committed", run=plan.run)
    if len(committed) != 1:
        yield Finding("ledger", f"the ledger holds {len(committed)} commitments of run {plan.run}, not 1")
        return None
    event = committed[0]
    if (event.seq, event.hash) != (plan.committed.seq, plan.committed.hash):
        yield Finding("ledger", f"{evidence.where['journal']}: names another commitment than event {event.seq}")
    promised = commitment(plan, evidence.battery)
    changed = [name for name, value in promised.items() if event.payload.get(name) != value]
    if changed:
        text = f"{some(changed)} differ from what was committed before the start (event {event.seq} of the ledger)"
        yield Finding("committed", f"{evidence.where['journal']}: {text}")
    yield from _check_progress(evidence, event, ledger)
    finished = ledger.events("safety.finished", run=plan.run)
    if not finished:
        yield Finding("ledger", f"the ledger does not know that run {plan.run} finished")
    for end in finished:
        if end.seq < event.seq or end.payload.get("subject") != plan.subject_digest:
            yield Finding("ledger", f"event {end.seq} of the ledger does not end run {plan.run}")
        elif end.payload.get("journal_root") != journal.root:
            text = f"changed since the run finished: its root is not the one in event {end.seq} of the ledger"
            yield Finding("journal-root", f"{evidence.where['journal']}: {text}")
    return event


def _check_progress(evidence: Evidence, committed: Event, ledger: Ledger) -> Iterator[Finding]:
    """Every block was noted when it was written, once, in order, after the commitment, and is still the same."""
    plan, marks = evidence.journal.plan, evidence.journal.marks()
    noted = ledger.events("safety.progress", run=plan.run)
    wrong = [
        str(mark["batch"])
        for event, mark in zip(noted, marks, strict=False)
        if event.payload != mark | {"run": plan.run} or event.seq < committed.seq
    ]
    if wrong:
        text = f"batch {some(wrong)} is not what the ledger noted when it was written"
        yield Finding("progress", f"{evidence.where['journal']}: {text}")
    elif len(noted) != len(marks):
        text = f"has {len(marks):,} blocks, the ledger noted {len(noted):,}"
        yield Finding("progress", f"{evidence.where['journal']}: {text}")


def _of_predecessor(evidence: Evidence, predecessor: Journal) -> Evidence:
    """The predecessor's journal as evidence of its own: the same checks, with its own file in the messages."""
    where = {**evidence.where, "journal": evidence.where["predecessor"]}
    return replace(evidence, journal=predecessor, predecessor=None, report=None, where=where)


def check_predecessor(
    evidence: Evidence,
    policy: Policy,
    ledger: Ledger,
    folder: Path | None,
    name: str | None,
    progress: Progress | None,
) -> Iterator[Finding]:
    """Is there a predecessor where there must be one, is it the right one, and is its journal what the ledger saw?"""
    subject, named = evidence.journal.plan.subject_digest, evidence.journal.plan.predecessor
    earlier = ledger.events("release.bundled", name=name) if name is not None else []
    others = [str(event.payload.get("subject")) for event in earlier if event.payload.get("subject") != subject]
    if named is None:
        if others:
            text = f"{name!r} was released before, as subject {others[-1][:16]}: test it beside that one"
            yield Finding("predecessor", f"{text} (steelyard safety run --predecessor FOLDER)")
        if folder is not None:
            yield Finding("predecessor", f"{folder}: was given as the predecessor, but the run knows none")
        return
    where = evidence.where["predecessor"]
    if others and named.subject != others[-1]:
        text = f"is not a run on the last release of {name!r}, subject {others[-1][:16]}: test beside that one"
        yield Finding("predecessor", f"{where}: {text}, or release it under another name")
    if evidence.predecessor is None:
        return  # missing, by check_pair
    if not others:
        yield from _check_another(evidence, evidence.predecessor, ledger)
        yield from _check_strength(evidence, evidence.predecessor, policy, ledger)
    its = _of_predecessor(evidence, evidence.predecessor)
    for found in _check_run(its, ledger):
        yield Finding("predecessor", found.message)
    if its.journal.plan.committed.seq >= evidence.journal.plan.committed.seq:
        yield Finding("predecessor", f"{where}: was committed after the candidate's run, not before it")
    if folder is not None:
        try:
            digest = subject_of(folder, progress or Silent()).digest
        except SteelyardError as error:
            yield Finding("predecessor", str(error))
            return
        if digest != its.journal.plan.subject_digest:
            yield Finding("predecessor", f"{folder}: is not the predecessor that was tested, but {digest[:16]}")
            return
        yield from check_generations(folder, its, progress)
    elif its.journal.plan.endpoint.get("kind") != "local":
        text = "a server answered, which proves nothing about its weights: give the model's folder (--predecessor)"
        yield Finding("predecessor", f"{where}: {text}")


def _check_another(evidence: Evidence, ours: Journal, ledger: Ledger) -> Iterator[Finding]:
    """A model is no reference for itself: of the candidate's weights in another dress (another system prompt, other
    sampling) nothing can be worse. Only where that was released before is it a predecessor."""
    mine, its = evidence.journal.plan.subject, ours.plan.subject
    if mine.weights == its.weights and not ledger.events("release.bundled", subject=ours.plan.subject_digest):
        others = some([name.replace("_", " ") for name in mine.differences(its)])
        text = f"has the candidate's own weights (other is the {others}) and was never released"
        yield Finding("predecessor", f"{evidence.where['predecessor']}: {text}: test beside another model")


def _check_strength(evidence: Evidence, ours: Journal, policy: Policy, ledger: Ledger) -> Iterator[Finding]:
    """Under a new name too, the predecessor is no weaker than the last release of the candidate's kin.

    The predecessor's journal is compared with that release's, which the ledger keeps, pair by pair as candidate and
    predecessor are. Weaker: in a metric with a margin, a one-sided 95% bound of the difference is clear of zero.
    """
    plan = evidence.journal.plan
    family = [
        event
        for event in releases_of_kin(ledger, kin(plan.subject))
        if event.payload.get("subject") != plan.subject_digest
    ]
    if not family or family[-1].payload.get("subject") == ours.plan.subject_digest:
        return
    last = family[-1].payload
    text = f"the last release of such a model is {last.get('name')!r}, subject {str(last.get('subject'))[:16]}"
    where = f"{evidence.where['predecessor']}: {text}"
    kept = _kept(ledger, str(last.get("run")))
    if kept is None or not comparable(ours, kept, evidence.battery):
        yield Finding("predecessor", f"{where}, and cannot be compared with this predecessor: test beside that one")
        return
    margins = policy.predecessor.non_inferior
    worse = [
        one.metric for one in compare(ours, kept, evidence.battery) if one.metric in margins and one.said == "worse"
    ]
    if worse:
        yield Finding("predecessor", f"{where}, and this predecessor is worse in {some(worse)}: test beside that one")


def _kept(ledger: Ledger, run: str) -> Journal | None:
    """The journal that the ledger keeps of a run, or None where it keeps none that is still whole."""
    for event in reversed(ledger.events("safety.finished", run=run)):
        try:
            journal = read_journal(ledger.get_file(str(event.payload["file"])))
        except (SteelyardError, KeyError):
            continue
        if journal.root == event.payload.get("journal_root"):
            return journal
    return None
