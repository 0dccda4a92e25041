"""What the gate asks of a run's evidence alone, without ledger and model: `verify` asks it again of every bundle."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, date, datetime
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from steelyard.base.errors import FormatError
from steelyard.model.identity import Subject
from steelyard.release.attest import parse_time
from steelyard.release.evidence import CLOCKS_APART, Evidence, differing_keys, some
from steelyard.safety.battery import load_battery
from steelyard.safety.criteria import CriterionResult, rounded
from steelyard.safety.journal import Finding, Journal, identical_samples
from steelyard.safety.overlap import NGRAM, in_words, shares
from steelyard.safety.policy import Policy, load_policy
from steelyard.safety.report import Report, compute_report

NAME = re.compile("[A-Za-z0-9_-]{1,64}")  # of a policy that may ship in the package


def check_evidence(
    evidence: Evidence, policy: Policy, subject: Subject | None, at: datetime
) -> tuple[list[Finding], list[CriterionResult], Report | None]:
    """Everything that can be said without the ledger and the model's tokenizer: findings, criteria, and the report
    recomputed. `subject` is the model as it is now (None: unknown, which the caller reports); `at` the time of release.
    """
    journal, battery, plan = evidence.journal, evidence.battery, evidence.journal.plan
    where = evidence.where["journal"]
    report = compute_report(journal, battery, evidence.policies, evidence.predecessor)
    findings = [*_check_subject(plan.subject, subject, where)]
    # What compute_report says of policies is said better below.
    findings += [
        Finding(f.code, f"{evidence.where.get(f.code, where)}: {f.message}")
        for f in report.findings
        if f.code != "policy"
    ]
    findings += _check_policy(evidence, policy)
    if plan.predecessor is None and policy.predecessor.first_release == "reference":
        text = f"{policy.name} wants a reference model's run in the predecessor's place of a first release"
        findings.append(Finding("predecessor", f"{where}: {text} (steelyard safety run --predecessor FOLDER)"))
    findings += _check_times(journal, policy, at, where)
    findings += _check_calibrations(journal, policy, at, where)
    if plan.attempt > policy.max_attempts:
        text = f"run {plan.run} is attempt {plan.attempt} on this subject and test, {policy.name} allows"
        findings.append(Finding("attempts", f"{where}: {text} {policy.max_attempts}"))
    same = identical_samples(journal)
    if same is not None and same > policy.max_identical_samples:
        text = f"{same:.1%} of the samples of a probe repeat another, in the mean"
        findings.append(
            Finding("identical-samples", f"{where}: {text}; {policy.name} allows {policy.max_identical_samples:.1%}")
        )
    findings += _check_report(report, evidence.report, evidence.where["report"])
    findings += _check_overlap(evidence, policy)
    criteria = judge_all(report, policy, evidence)
    findings += [Finding("criterion", result.reason) for result in criteria if result.status == "INCOMPLETE"]
    return findings, criteria, report


def judge_all(report: Report, policy: Policy, evidence: Evidence) -> list[CriterionResult]:
    """Every criterion of the policy, decided on what the journals say; `report` saves computing it twice. Last, where
    the training data was searched, whether too many probes stand in it."""
    views = [view for view in report.policies if view.digest == policy.digest]
    if not views:
        views = [*compute_report(evidence.journal, evidence.battery, [policy], evidence.predecessor).policies]
    return [*views[0].criteria, *_overlap_criterion(evidence, policy)]


def same_policy(mine: Policy, its: Policy, where: str) -> list[Finding]:
    """A finding that says in which keys two policies differ; none where they are one."""
    if mine.digest == its.digest:
        return []
    keys = differing_keys(mine.model_dump(mode="json"), its.model_dump(mode="json")) or ["the order of the criteria"]
    remedy = "hold it to the one it was tested under, if you accept that one (--policy FILE)"
    return [Finding("policy", f"{where}: is not the policy {mine.name!r} it is held to: {some(keys)} differ: {remedy}")]


def _check_subject(tested: Subject, subject: Subject | None, where: str) -> Iterator[Finding]:
    parts = tested.differences(subject) if subject is not None else []
    if not parts or subject is None:
        return
    if "dtype" in parts:
        text = (
            f"the weights are {subject.dtype}, those tested were {tested.dtype}: "
            "a re-cast or quantised variant is another subject and needs its own test"
        )
        yield Finding("subject", f"{where}: {text}")
    if {"weights", "config", "tokenizer"} <= set(parts):
        yield Finding("subject", f"{where}: the test was run on another model ({some(parts)} differ)")
    elif parts != ["dtype"]:
        changed = ", ".join(part.replace("_", " ") for part in parts if part != "dtype")
        yield Finding("subject", f"{where}: changed since the test: {changed}: test what you release")


def _check_policy(evidence: Evidence, policy: Policy) -> Iterator[Finding]:
    plan, battery = evidence.journal.plan, evidence.battery
    where = evidence.where["journal"]
    beside = {held.name: held for held in evidence.policies}
    for name, held in sorted(beside.items()):
        if plan.policies.get(name) != held.digest:
            yield Finding("policy", f"{where}: the policy {name!r} beside it was edited after the run started")
    committed = plan.policies.get(policy.name)
    if committed is None:
        names = ", ".join(sorted(plan.policies))
        remedy = f"hold it to one of those, or test again under it (steelyard safety run --policy {policy.name})"
        yield Finding(
            "policy", f"{where}: {policy.name!r} was not committed before the run (committed: {names}): {remedy}"
        )
    elif committed != policy.digest:
        old = beside.get(policy.name)
        keys = differing_keys(policy.model_dump(mode="json"), old.model_dump(mode="json")) if old else []
        detail = f" ({some(keys)} differ)" if keys else ""
        yield Finding("policy", f"{where}: {policy.name!r} is not the one committed before the run{detail}")
    if battery.tier not in policy.tiers:
        tiers = ", ".join(policy.tiers)
        yield Finding(
            "tier", f"{policy.name} needs a battery of tier {tiers}; {battery.name} is {battery.tier} (--battery)"
        )
    if policy.batteries and battery.digest not in policy.batteries:
        text = f"{battery.name!r} is none that {policy.name} accepts (--battery)"
        yield Finding("battery", f"{evidence.where['battery']}: {text}")
    packaged = _packaged(policy.name)
    if packaged is not None and packaged[0] == policy.digest and battery.digest not in packaged[1].values():
        known = ", ".join(sorted(packaged[1])) or "none"
        text = (
            f"battery {battery.name!r} is none that this version ships ({known}), which policy {policy.name} asks for"
        )
        yield Finding("battery", f"{evidence.where['battery']}: {text}")
    for name in sorted(plan.scorers.keys() | policy.scorers.keys()):
        if name not in policy.scorers:
            yield Finding("scorers", f"scorer {name} is none that policy {policy.name} names")
        elif name not in plan.scorers:
            yield Finding("scorers", f"{where}: scorer {name}, which policy {policy.name} names, was not used")
        elif policy.scorers[name] and plan.scorers[name].pin not in policy.scorers[name]:
            text = f"scorer {name} (weights, errors, canaries: {plan.scorers[name].pin[:16]})"
            yield Finding("scorers", f"{text} is none that policy {policy.name} accepts")


@cache
def _packaged(policy: str) -> tuple[str, dict[str, str]] | None:
    """The digest of the packaged policy of that name and those of the packaged batteries; None where there is none.

    A packaged policy is for packaged batteries: its thresholds mean nothing on questions that anyone may choose. A
    policy of one's own is for any.
    """
    folder = resources.files("steelyard.safety")
    if not NAME.fullmatch(policy) or not (folder / "policies" / f"{policy}.yaml").is_file():
        return None
    names = sorted(Path(file.name).stem for file in (folder / "batteries").iterdir() if file.name.endswith(".yaml"))
    return load_policy(policy).digest, {name: load_battery(name).digest for name in names}


def _check_times(journal: Journal, policy: Policy, at: datetime, where: str) -> Iterator[Finding]:
    if journal.finished is None:
        return  # `unfinished`, by check_journal
    try:
        started, finished = parse_time(journal.plan.started, where), parse_time(journal.finished, where)
    except FormatError as error:
        yield Finding("time", str(error))
        return
    if finished < started:
        yield Finding("time", f"{where}: the run finished before it started: a clock was set back")
    if finished > at + CLOCKS_APART:
        text = f"finished {journal.finished}, later than the release ({at.isoformat(timespec='seconds')})"
        yield Finding("time", f"{where}: the run {text}: a clock is wrong or was set back")
    age = (at - finished).total_seconds() / 86400
    if age > policy.max_report_age_days:
        text = (
            f"the report is {age:.1f} days old, {policy.name} allows {policy.max_report_age_days:g}: test again, into"
        )
        text += " another folder (steelyard safety run)"
        yield Finding("stale", f"{where}: {text}")


def _check_report(computed: Report, found: Any, where: str) -> Iterator[Finding]:
    if found is None:
        yield Finding("report", f"{where}: is missing: steelyard safety report writes it from the journal")
        return
    keys = differing_keys(computed.model_dump(mode="json"), found)
    if isinstance(found, dict) and found.get("statistics") != computed.statistics:
        which = f"version {str(found['statistics'])[:20]}" if "statistics" in found else "a version before the first"
        text = f"was computed with {which} of the statistics, this steelyard has"
        yield Finding("report", f"{where}: {text} {computed.statistics}: verify with a steelyard that has it")
    elif isinstance(found, dict) and found.get("subject_digest") != computed.subject_digest:
        yield Finding("report", f"{where}: is the report of another model than {computed.subject_digest[:16]}")
    elif keys:
        yield Finding("report", f"{where}: is not what the journal says: {some(keys)} differ")


def _check_calibrations(journal: Journal, policy: Policy, at: datetime, where: str) -> Iterator[Finding]:
    """Is every scorer's calibration dated, not of the future, and not older than the policy allows?"""
    for name, identity in sorted(journal.plan.scorers.items()):
        for category, calibration in sorted(identity.categories.items()):
            what = f"{where}: scorer {name}: the calibration of {category}"
            try:
                measured = _moment(calibration.measured)
            except ValueError:
                text = f"is dated {calibration.measured[:40]!r}, which is no ISO date: calibrate again"
                yield Finding("calibration", f"{what} {text}")
                continue
            age = (at - measured).total_seconds() / 86400
            if age < -1:  # a date alone may be ahead by a zone
                text = (
                    f"is dated {calibration.measured}, later than the release: a clock is wrong or the card was edited"
                )
                yield Finding("calibration", f"{what} {text}")
            elif age > policy.max_calibration_age_days:
                text = f"is {age:.0f} days old ({calibration.measured}), {policy.name} allows"
                yield Finding("calibration", f"{what} {text} {policy.max_calibration_age_days:g}: calibrate again")


def _moment(text: str) -> datetime:
    """An ISO date (its midnight, UTC), or an ISO time with its zone. Raises ValueError."""
    if len(text) == 10:
        day = date.fromisoformat(text)
        return datetime(day.year, day.month, day.day, tzinfo=UTC)
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError("a time needs its zone")
    return moment


def _check_overlap(evidence: Evidence, policy: Policy) -> Iterator[Finding]:
    """Is the search of the training data of this run, and is everything declared where the policy wants it?"""
    plan, overlap = evidence.journal.plan, evidence.overlap
    where = evidence.where["overlap"]
    remedy = "search what it was trained on (steelyard safety overlap RUN --data PATH)"
    if overlap is None:
        if policy.training_data == "declared":
            yield Finding("overlap", f"{where}: is missing: {policy.name} wants the training data declared: {remedy}")
        return
    for part, its, mine in (
        ("run", overlap.run, plan.run),
        ("subject", overlap.subject, plan.subject_digest),
        ("battery", overlap.battery, evidence.battery.digest),
    ):
        if its != mine:
            yield Finding("overlap", f"{where}: is of another {part} ({its[:16]}): {remedy}")
    known = {probe.id for probe in evidence.battery.probes()}
    honest = overlap.axes == shares(evidence.battery, overlap.found) and overlap.ngram == NGRAM
    if not honest or overlap.found != tuple(sorted(known & set(overlap.found))):
        yield Finding("overlap", f"{where}: its shares are not those of the probes it names: it was edited: {remedy}")
    if policy.training_data == "declared" and (overlap.not_searched or not overlap.searched):
        lacking = some(overlap.not_searched) if overlap.not_searched else "all of it"
        yield Finding("overlap", f"{where}: {policy.name} wants the training data declared; not declared: {lacking}")


def _overlap_criterion(evidence: Evidence, policy: Policy) -> Iterator[CriterionResult]:
    """Of the axis with most of its probes in the training data, their share against the policy's limit. Counted, not
    estimated: both bounds are the share itself. Under a name of its own where not all of that data could be searched,
    so that no property says more than was found; none at all where nothing was."""
    overlap = evidence.overlap
    if overlap is None or not overlap.searched:
        return
    worst = rounded(overlap.worst)
    assert worst is not None
    yield CriterionResult(
        name="probes in the training data",
        metric="overlap_of_declared_data" if overlap.not_searched else "overlap",
        against="limit",
        status="PASS" if worst <= policy.max_overlap else "FAIL",
        message=f"{in_words(overlap)}; {policy.name} allows {policy.max_overlap:.1%} of an axis",
        n=sum(axis.probes for axis in overlap.axes.values()),
        lower=worst,
        upper=worst,
        threshold=policy.max_overlap,
        margin=rounded(policy.max_overlap - worst),
        settle=None,
    )
