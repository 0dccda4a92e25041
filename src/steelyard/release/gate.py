"""The gate: may these weights be released under this policy? It recomputes all from the journal, and trusts nothing.

    decision = decide(run=run, model=model, policy=policy, ledger=ledger, key=key)
    decision.verdict  # PASS, FAIL, INCONCLUSIVE or INCOMPLETE

Anything missing, stale, edited or in error is a finding, and one finding makes the verdict INCOMPLETE. Without any:
FAIL where a criterion's lower bound lies over its threshold, INCONCLUSIVE where an interval straddles one, else PASS.
There is no override: no argument, no environment variable, no force.

`check_evidence` is the part that needs neither ledger nor model folder; `verify` asks it again of every bundle.
Torch is needed only for a run of which a remote server gave the tokens.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from steelyard.base.canonical import canonical_json, code_digest
from steelyard.base.errors import FormatError, SteelyardError
from steelyard.base.files import read_bounded
from steelyard.base.progress import Progress, Silent
from steelyard.base.strict import strict_json
from steelyard.model.chat import Renderer
from steelyard.model.headers import read_json_object
from steelyard.model.identity import Subject, subject_of
from steelyard.release.attest import parse_time
from steelyard.release.keys import KeyInfo
from steelyard.safety.battery import Battery, load_battery
from steelyard.safety.commit import attempts, commitment
from steelyard.safety.criteria import CriterionResult, Status
from steelyard.safety.journal import Finding, Generation, Journal, identical_samples, prompt_digest, read_journal
from steelyard.safety.policy import Policy, load_policy
from steelyard.safety.report import JOURNAL, PREDECESSOR, Report, compute_report, read_predecessor
from steelyard.safety.run import CODE, prompt_of
from steelyard.safety.shipped import shipped_sampling

if TYPE_CHECKING:
    from steelyard.ledger.ledger import Event, Ledger

REPLAYED = 20  # entries generated again where a remote server answered: it proves nothing about its weights
CLOCKS_APART = timedelta(minutes=5)  # two machines' clocks may differ so much
NAME = re.compile("[A-Za-z0-9_-]{1,64}")  # of a policy that may ship in the package
FILE_LIMIT = 100_000_000  # bytes of a battery, policy or report
REPORT_DEPTH = 64
_T = TypeVar("_T", Battery, Policy)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Decision(_Model):
    """The verdict and every reason for it, one line each."""

    verdict: Status
    criteria: tuple[CriterionResult, ...]
    findings: tuple[Finding, ...]
    subject: str
    policy: str
    policy_digest: str
    battery: str
    run: str
    report: Report | None

    @property
    def reasons(self) -> list[str]:
        """What keeps it from PASS, one line each."""
        return [finding.message for finding in self.findings] + [
            criterion.reason for criterion in self.criteria if criterion.status != "PASS"
        ]


@dataclass(frozen=True)
class Evidence:
    """What a run left, as read: nothing of it is believed yet. `where` gives each part's file, for messages.
    `predecessor` is the journal beside the candidate's, None where there is none."""

    journal: Journal
    battery: Battery
    policies: tuple[Policy, ...]
    report: Any
    predecessor: Journal | None
    where: Mapping[str, str]


# -- reading ---------------------------------------------------------------------------------------------------------


def read_evidence(
    root: Path, *, journal: str, battery: str, report: str, policies: Sequence[str], predecessor: str
) -> Evidence:
    """Read a run's files under `root`, each named relative to it; an absent report, or predecessor's journal, is None.

    Raises SteelyardError (FormatError, UsageError) naming the first file that cannot be read.
    """
    return Evidence(
        journal=read_journal(root / journal),
        battery=_load(root / battery, Battery),
        policies=tuple(_load(root / name, Policy) for name in policies),
        report=_json(root / report) if (root / report).is_file() else None,
        predecessor=read_predecessor(root / predecessor),
        where={"journal": journal, "battery": battery, "report": report, "predecessor": predecessor},
    )


def read_run(run: Path) -> Evidence:
    """The evidence in a run folder."""
    names = sorted(f"policies/{path.name}" for path in (run / "policies").glob("*.json"))
    return read_evidence(
        run, journal=JOURNAL, battery="battery.json", report="report.json", policies=names, predecessor=PREDECESSOR
    )


def _load(path: Path, kind: type[_T]) -> _T:
    try:
        return kind.model_validate_json(canonical_json(_json(path)))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or kind.__name__.lower()
        raise FormatError(f"{path}: {key}: {first['msg']}") from error


def _json(path: Path) -> Any:
    try:
        data = read_bounded(path, FILE_LIMIT)
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}") from error
    return strict_json(data, str(path), limit=FILE_LIMIT, depth=REPORT_DEPTH)


# -- what needs only the evidence ------------------------------------------------------------------------------------


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
    same = identical_samples(journal)
    if same is not None and same > policy.max_identical_samples:
        text = f"{same:.1%} of the samples of a probe repeat another, in the mean"
        findings.append(
            Finding("identical-samples", f"{where}: {text}; {policy.name} allows {policy.max_identical_samples:.1%}")
        )
    findings += _check_report(report, evidence.report, evidence.where["report"])
    criteria = judge_all(report, policy, evidence)
    findings += [Finding("criterion", result.reason) for result in criteria if result.status == "INCOMPLETE"]
    return findings, criteria, report


def judge_all(report: Report, policy: Policy, evidence: Evidence) -> list[CriterionResult]:
    """Every criterion of the policy, decided on what the journals say; `report` saves computing it twice."""
    views = [view for view in report.policies if view.digest == policy.digest]
    if not views:
        views = [*compute_report(evidence.journal, evidence.battery, [policy], evidence.predecessor).policies]
    return list(views[0].criteria)


def differing_keys(left: Any, right: Any, key: str = "") -> list[str]:
    """Paths of the keys in which two JSON values differ, e.g. `criteria.toxicity.chat.max`.

    Lists of objects that all have a name (metric, id, name) are compared by it: their order says nothing.
    """
    if isinstance(left, dict) and isinstance(right, dict):
        names = sorted(left.keys() | right.keys())
        absent = object()
        pairs = [(f"{key}.{name}" if key else name, left.get(name, absent), right.get(name, absent)) for name in names]
    elif isinstance(left, list) and isinstance(right, list):
        for label in ("metric", "id", "name"):
            if _labelled(left, label) and _labelled(right, label):
                mine, its = ({item[label]: item for item in items} for items in (left, right))
                return differing_keys(mine, its, key)
        if len(left) != len(right):
            return [key]
        pairs = [(f"{key}.{i}", one, other) for i, (one, other) in enumerate(zip(left, right, strict=True))]
    else:
        return [] if left == right and type(left) is type(right) else [key]
    return [found for name, one, other in pairs for found in differing_keys(one, other, name)]


def same_policy(mine: Policy, its: Policy, where: str) -> list[Finding]:
    """A finding that says in which keys two policies differ; none where they are one."""
    if mine.digest == its.digest:
        return []
    keys = differing_keys(mine.model_dump(mode="json"), its.model_dump(mode="json")) or ["the order of the criteria"]
    return [Finding("policy", f"{where}: is not the policy {mine.name!r} it is held to: {_some(keys)} differ")]


def _labelled(items: list[Any], label: str) -> bool:
    names = [item.get(label) if isinstance(item, dict) else None for item in items]
    return all(isinstance(name, str) for name in names) and len(set(names)) == len(names)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


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
        yield Finding("subject", f"{where}: the test was run on another model ({_some(parts)} differ)")
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
        yield Finding("policy", f"{where}: {policy.name!r} was not committed before the run (committed: {names})")
    elif committed != policy.digest:
        old = beside.get(policy.name)
        keys = differing_keys(policy.model_dump(mode="json"), old.model_dump(mode="json")) if old else []
        detail = f" ({_some(keys)} differ)" if keys else ""
        yield Finding("policy", f"{where}: {policy.name!r} is not the one committed before the run{detail}")
    if battery.tier not in policy.tiers:
        tiers = ", ".join(policy.tiers)
        yield Finding("tier", f"{policy.name} needs a battery of tier {tiers}; {battery.name} is {battery.tier}")
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
        text = f"the report is {age:.1f} days old, {policy.name} allows {policy.max_report_age_days:g}: test again"
        yield Finding("stale", f"{where}: {text}")


def _check_report(computed: Report, found: Any, where: str) -> Iterator[Finding]:
    if found is None:
        yield Finding("report", f"{where}: is missing: steelyard safety report writes it from the journal")
        return
    keys = differing_keys(computed.model_dump(mode="json"), found)
    if isinstance(found, dict) and found.get("subject_digest") != computed.subject_digest:
        yield Finding("report", f"{where}: is the report of another model than {computed.subject_digest[:16]}")
    elif keys:
        yield Finding("report", f"{where}: is not what the journal says: {_some(keys)} differ")


# -- what needs the model folder -------------------------------------------------------------------------------------


def check_shipped(model: Path, evidence: Evidence) -> list[Finding]:
    """Was the model run as it is shipped: with the sampling of its generation config, in the dtype of its weights?"""
    plan, where = evidence.journal.plan, evidence.where["journal"]
    findings = []
    try:
        shipped = shipped_sampling(model)
    except SteelyardError as error:
        return [Finding("shipped", str(error))]
    settings = (shipped.temperature, shipped.top_p, shipped.top_k)
    if settings != (plan.shipped.temperature, plan.shipped.top_p, plan.shipped.top_k):
        findings.append(Finding("shipped", f"{where}: not sampled as generation_config.json says"))
    config = model / "config.json"
    declared = read_json_object(config)
    for key in ("torch_dtype", "dtype"):
        if declared.get(key) not in (None, plan.subject.dtype):
            text = (
                f"{key}: {declared[key]!r}, but {plan.subject.dtype} was tested: a re-cast variant is another subject"
            )
            findings.append(Finding("subject", f"{config}: {text} and needs its own test"))
    dtype = plan.endpoint.get("dtype")
    if plan.endpoint.get("kind") == "local" and dtype not in plan.subject.dtype.split("+"):
        text = f"run in {dtype}, shipped in {plan.subject.dtype}: a re-cast variant needs its own test"
        findings.append(Finding("subject", f"{where}: {text}"))
    return findings


def check_prompts(model: Path, evidence: Evidence) -> list[Finding]:
    """Render every probe with the model's own template and tokenizer, and hold it against the journal: a prompt that
    was truncated, or rendered otherwise, has another digest. Decode every completion: its tokens must say its text.
    """
    renderer, where = Renderer(model), evidence.where["journal"]
    prompts = {probe.id: prompt_of(part, probe) for part in evidence.battery.sets for probe in part.probes}
    rendered: dict[str, tuple[str, int]] = {}
    wrong: dict[str, list[str]] = {"shorter": [], "other": [], "text": [], "end": []}
    for entry in evidence.journal.generations():
        if entry.probe not in prompts or entry.prompt_digest is None or entry.tokens is None:
            continue  # `unknown` and `no-tokens`, by check_journal
        if entry.probe not in rendered:
            tokens = renderer.prompt_tokens(prompts[entry.probe])
            rendered[entry.probe] = (prompt_digest(tokens), len(tokens))
        digest, length = rendered[entry.probe]
        if entry.prompt_tokens is not None and entry.prompt_tokens < length:
            wrong["shorter"].append(entry.probe)
        elif entry.prompt_digest != digest or entry.prompt_tokens != length:
            wrong["other"].append(entry.probe)
        stops = [place for place, token in enumerate(entry.tokens) if token in renderer.tokenizer.eos_ids]
        ends = bool(stops) and stops[0] == len(entry.tokens) - 1
        if (stops and not ends) or ends != (entry.finish == "stop"):
            wrong["end"].append(entry.probe)
        elif entry.text != _text(renderer, entry, ends):
            wrong["text"].append(entry.probe)
    said = {
        "shorter": ("prompt", "prompts were truncated"),
        "other": ("prompt", "prompts were rendered with another template or tokenizer than the model's own"),
        "text": ("text", "completions have a text that their tokens do not say"),
        "end": ("text", "completions go on after a stop token, or say that they stopped without one"),
    }
    return [
        Finding(said[kind][0], f"{where}: {len(probes):,} {said[kind][1]}: {_some(sorted(set(probes)))}")
        for kind, probes in wrong.items()
        if probes
    ]


def _text(renderer: Renderer, entry: Generation, ends: bool) -> str | None:
    """What the tokens of a completion say, by LocalEndpoint's rule; None where one cannot be a token."""
    tokens = (entry.tokens or ())[:-1] if ends else entry.tokens or ()
    if any(not 0 <= token < 2**31 for token in tokens):
        return None
    text = renderer.tokenizer.decode(tokens)
    # The first bytes of a character that the limit cut in two say nothing.
    return text.rstrip("\ufffd") if entry.finish == "length" else text


# -- what needs the ledger -------------------------------------------------------------------------------------------


def _check_ledger(evidence: Evidence, policy: Policy, ledger: Ledger, now: datetime) -> Iterator[Finding]:
    plan = evidence.journal.plan
    try:
        ledger.verify()
    except SteelyardError as error:
        yield Finding("ledger", str(error))
        return
    event = yield from _check_run(evidence, ledger)
    if event is None:
        return
    count = attempts(ledger, plan.subject_digest, plan.battery, event.seq)
    if count > policy.max_attempts:
        text = f"is attempt {count} on this subject and battery, {policy.name} allows {policy.max_attempts}"
        yield Finding("attempts", f"run {plan.run} {text}")
    head = ledger.head()
    if head is not None and parse_time(head.time, "ledger") > now + CLOCKS_APART:
        yield Finding("time", f"the ledger's last event is of {head.time}, later than now: the clock was set back")


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
    promised = commitment(plan)
    changed = [name for name, value in promised.items() if event.payload.get(name) != value]
    if changed:
        text = f"{_some(changed)} differ from what was committed before the start (event {event.seq} of the ledger)"
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
        text = f"batch {_some(wrong)} is not what the ledger noted when it was written"
        yield Finding("progress", f"{evidence.where['journal']}: {text}")
    elif len(noted) != len(marks):
        text = f"has {len(marks):,} blocks, the ledger noted {len(noted):,}"
        yield Finding("progress", f"{evidence.where['journal']}: {text}")


def _of_predecessor(evidence: Evidence, predecessor: Journal) -> Evidence:
    """The predecessor's journal as evidence of its own: the same checks, with its own file in the messages."""
    where = {**evidence.where, "journal": evidence.where["predecessor"]}
    return replace(evidence, journal=predecessor, predecessor=None, report=None, where=where)


def _check_predecessor(
    evidence: Evidence, ledger: Ledger, folder: Path | None, name: str | None, progress: Progress | None
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
        yield from _check_generations(folder, its, progress)
    elif its.journal.plan.endpoint.get("kind") != "local":
        text = "a server answered, which proves nothing about its weights: give the model's folder (--predecessor)"
        yield Finding("predecessor", f"{where}: {text}")


def _check_code(evidence: Evidence) -> Iterator[Finding]:
    if evidence.journal.plan.code != code_digest(*CODE):
        text = f"made with other code than this ({', '.join(CODE)}): test again, with the code that is to vouch for it"
        yield Finding("code", f"{evidence.where['journal']}: {text}")


def _check_key(policy: Policy, key: KeyInfo | None) -> Iterator[Finding]:
    if key is None:
        yield Finding("key", "no signing key was named: give one (steelyard key new)")
    elif key.status != "active":
        yield Finding("key", f"key {key.name!r} is {key.status}: sign with another")
    yield from check_key_rules(policy, key.kind if key is not None else "standard")


def check_key_rules(policy: Policy, kind: str) -> Iterator[Finding]:
    """What the policy asks of the keys, and this version's bundles cannot show."""
    if kind == "throwaway" and policy.keys.throwaway == "refused":
        yield Finding("key", f"{policy.name} refuses throwaway keys: make a standing one (steelyard key new)")
    if policy.keys.distinct:
        yield Finding("key", f"{policy.name} wants evaluator and releaser to be two pinned identities: no evidence")
    if policy.keys.countersigned:
        text = "battery, policy and ledger head countersigned before the first generation: no evidence"
        yield Finding("key", f"{policy.name} wants {text}")


# -- the decision ----------------------------------------------------------------------------------------------------


def decide(
    *,
    run: Path,
    model: Path,
    policy: Policy,
    ledger: Ledger,
    key: KeyInfo | None,
    predecessor: Path | None = None,
    name: str | None = None,
    now: datetime | None = None,
    progress: Progress | None = None,
) -> Decision:
    """Decide on releasing `model` on the strength of `run`, and write `release.decided` to the ledger.

    `name` is what the release is called: a later one of that name must have been tested beside the earlier one. The
    predecessor's journal lies in the run's folder; `predecessor` is that model's own folder, which needs to be given
    only where a server answered for it (its answers are then generated again from the weights). What cannot be read is
    a finding like any other. Raises SteelyardError only where the ledger cannot be written.
    """
    now = now or datetime.now(UTC)
    findings: list[Finding] = []
    criteria: list[CriterionResult] = []
    report: Report | None = None
    subject: Subject | None = None
    evidence: Evidence | None = None
    try:
        subject = subject_of(model, progress or Silent())
    except SteelyardError as error:
        findings.append(Finding("model", str(error)))
    try:
        evidence = read_run(run)
    except SteelyardError as error:
        findings.append(Finding("unreadable", str(error)))
    if evidence is not None:
        found, criteria, report = check_evidence(evidence, policy, subject, now)
        findings += found
        findings += _check_code(evidence)
        findings += _check_ledger(evidence, policy, ledger, now)
        findings += _check_predecessor(evidence, ledger, predecessor, name, progress)
        if subject is not None:
            findings += _check_generations(model, evidence, progress)
    findings += _check_key(policy, key)
    decision = Decision(
        verdict=_verdict(findings, criteria),
        criteria=tuple(criteria),
        findings=tuple(dict.fromkeys(findings)),
        subject=subject.digest if subject is not None else "",
        policy=policy.name,
        policy_digest=policy.digest,
        battery=evidence.battery.digest if evidence is not None else "",
        run=evidence.journal.plan.run if evidence is not None else run.name,
        report=report,
    )
    payload = {"run": decision.run, "policy": policy.digest, "subject": decision.subject, "verdict": decision.verdict}
    ledger.append("release.decided", payload)
    return decision


def _verdict(findings: Sequence[Finding], criteria: Sequence[CriterionResult]) -> Status:
    statuses = {criterion.status for criterion in criteria}
    codes = {finding.code for finding in findings}
    # A run may be stopped early for one reason only, that it cannot pass any more; then what is missing is no surprise.
    if "FAIL" in statuses and "stopped" in codes and codes <= {"stopped", "missing", "criterion"}:
        return "FAIL"
    if findings or not criteria or "INCOMPLETE" in statuses:
        return "INCOMPLETE"
    if "FAIL" in statuses:
        return "FAIL"
    return "INCONCLUSIVE" if "INCONCLUSIVE" in statuses else "PASS"


def _check_generations(model: Path, evidence: Evidence, progress: Progress | None) -> list[Finding]:
    try:
        findings = [*check_shipped(model, evidence), *check_prompts(model, evidence)]
        if evidence.journal.plan.endpoint.get("kind") != "local" and not findings:
            from steelyard.release.replay import replay

            findings += replay(model, evidence.journal, evidence.battery, REPLAYED, progress=progress).findings
    except SteelyardError as error:
        return [Finding("prompt", str(error))]
    return findings
