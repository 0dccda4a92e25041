"""Running a battery: plan, commit to the ledger, generate, score, journal, report. Killed at any moment, it resumes.

The plan (which sample in which batch) is fixed before the first generation and written first, so a resumed run repeats
whole batches and ends with the same tokens. What was committed is in the ledger before the first generation, so a run
that went badly cannot be forgotten: the next one on the same model and battery is attempt two.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from steelyard.base.canonical import canonical_json, code_digest, sha256_hex
from steelyard.base.errors import SteelyardError, UsageError
from steelyard.base.files import write_atomic
from steelyard.base.progress import Progress, Silent
from steelyard.inference.endpoint import Completion, Endpoint, Message, Request, Sampling
from steelyard.model.identity import Subject
from steelyard.safety.battery import Battery, Probe, ProbeSet
from steelyard.safety.commit import finish, note, now, open_journal, reusable, started, write_inputs
from steelyard.safety.criteria import measure
from steelyard.safety.journal import (
    Against,
    CanaryLabel,
    CanaryLine,
    Committed,
    Generation,
    JournalWriter,
    Plan,
    ScoreLine,
    Shipped,
    Stopped,
    needed_scorers,
    prompt_digest,
    read_journal,
    read_plan,
    sample_seed,
)
from steelyard.safety.metrics import calibration_of, observe
from steelyard.safety.pause import Look, Paused
from steelyard.safety.policy import Policy, refuse_disguised
from steelyard.safety.report import (
    JOURNAL,
    PREDECESSOR,
    Report,
    compute_report,
    read_predecessor,
    report_json,
    save_report,
)
from steelyard.safety.variants import view_variants
from steelyard.scorers.base import Item, Score, ScoreError, Scorer, score_checked

if TYPE_CHECKING:  # `verify` reads this module too, and needs no database
    from steelyard.ledger.ledger import Ledger

CODE = ("base", "model", "inference", "scorers", "safety")
STOP_CONFIDENCE = 0.999
STOP_MINIMUM = 100  # completions of a metric before an early stop may rest on it
STOP_CHECKS = 20  # how often in a run
Batches = tuple[tuple[tuple[str, int], ...], ...]
Role = Literal["candidate", "predecessor"]


@runtime_checkable
class TellsPromptLength(Protocol):
    """An endpoint that knows how many tokens a prompt becomes, so that a batch holds prompts of like length."""

    def prompt_length(self, prompt: tuple[Message, ...] | str) -> int:
        """Tokens of the rendered prompt."""


@dataclass(frozen=True)
class Tested:
    """A model under test: what answers for it, its digests, and its own sampling (`shipped_sampling`)."""

    __test__ = False  # not a test class, whatever pytest thinks of its name

    endpoint: Endpoint
    subject: Subject
    shipped: Sampling


@dataclass(frozen=True)
class Job:
    """What is tested, with what, against which thresholds. `scorers` are the battery's, by name.

    With a `predecessor`, both are run on the same plan with the same seeds, and the report compares them pair by pair.
    `fail_fast` stops the candidate as soon as every policy has a criterion whose one-sided 99.9% lower bound lies over
    its threshold: such a run can fail or be incomplete, never pass; its predecessor is then not run to the end.

    Raises UsageError for scorers that are not the battery's, for no policy, one named twice or one named like
    a packaged one that it is not, and for a predecessor that is the candidate.
    """

    candidate: Tested
    battery: Battery
    policies: Sequence[Policy]
    scorers: Mapping[str, Scorer]
    predecessor: Tested | None = None
    fail_fast: bool = False

    def __post_init__(self) -> None:
        if set(self.scorers) != set(self.battery.scorers):
            wanted = ", ".join(sorted(self.battery.scorers))
            raise UsageError(f"battery {self.battery.name} needs the scorers {wanted}, no others")
        names = [policy.name for policy in self.policies]
        if not names or len(set(names)) != len(names):
            raise UsageError("give at least one policy, and each once: thresholds are committed before the test")
        for policy in self.policies:
            refuse_disguised(policy)
        if self.predecessor is not None and self.predecessor.subject.digest == self.candidate.subject.digest:
            raise UsageError("the predecessor is the candidate itself, bit for bit: give the model it comes after")


def run_battery(
    job: Job, *, out: Path, ledger: Ledger, progress: Progress | None = None, countersign: Look | None = None
) -> Report:
    """Do the job; gives the report, written to `out` with the journals (`journal.jsonl`, `predecessor/journal.jsonl`).

    Where `out` holds the journals of a run that was started with exactly these parts, that run is finished (or, if it
    is whole, only reported); with others, SteelyardError names what differs. The predecessor's journal is taken from an
    earlier run in this ledger where one has the same subject, battery, scorers, code, engine and plan.

    With `countersign` the run is committed, battery and policies are written, and Paused is raised before the first
    generation; once `countersign` finds what countersigns the commitment in `out`, the same call goes on.
    """
    progress = progress or Silent()
    for policy in job.policies:
        if lacking := lacks(job.battery, policy):
            progress.say(f"policy {policy.name} will refuse this run: battery {job.battery.name} {lacking}")
    with ExitStack() as stack:
        try:
            before, writer = _open_all(job, out, ledger, progress, stack, countersign)
        except Paused:
            write_inputs(out, job.battery, job.policies)  # whoever countersigns reads them
            raise
        write_inputs(out, job.battery, job.policies)
        _fill(job, job.candidate, writer, ledger, progress, "candidate" if before else "safety")
        stopped = any(isinstance(entry, Stopped) for entry in writer.entries[-1:])
        if before is not None and job.predecessor is not None and not stopped:
            _fill(job, job.predecessor, before, ledger, progress, "predecessor")
            finish(ledger, before.path, job.battery)
    journal, predecessor = read_journal(out / JOURNAL), read_predecessor(out / PREDECESSOR)
    report = compute_report(journal, job.battery, list(job.policies), predecessor)
    save_report(report, out, view_variants(out, journal))
    finish(ledger, out / JOURNAL, job.battery, report=sha256_hex(report_json(report)))
    return report


def lacks(battery: Battery, policy: Policy) -> str:
    """What no run of the battery can give the policy, in words; nothing where it lacks nothing."""
    has = {metric.id for metric in battery.metrics}
    found = []
    if battery.tier not in policy.tiers:
        found.append(f"is of tier {battery.tier}, not {' or '.join(policy.tiers)}")
    for what, names in (
        ("scorer", policy.scorers.keys() - battery.scorers.keys()),
        ("metric", {criterion.metric for criterion in policy.criteria} - has),
    ):
        if names:
            found.append(f"has no {what} {', '.join(sorted(names))}")
    return " and ".join(found)


def _fill(job: Job, tested: Tested, writer: JournalWriter, ledger: Ledger, progress: Progress, name: str) -> None:
    """Generate and score what the journal still lacks."""
    places, needed = places_of(job.battery), needed_scorers(job.battery)
    samples = sum(len(batch) for batch in writer.plan.batches)
    done = sum(isinstance(entry, Generation) for entry in writer.entries)
    if writer.entries and not writer.done:
        progress.say(f"resuming run {writer.plan.run} at batch {writer.batch + 1} of {len(writer.plan.batches)}")
    with progress.task(name, samples, "completions", done=done) as task:
        while not writer.done:
            number = writer.batch
            if number == len(writer.plan.batches):
                writer.end(now())
            elif writer.generations is not None:
                writer.scored(_score(job.scorers, places, needed, writer))
                note(ledger, writer, number, "scored")
            elif (
                job.fail_fast
                and writer.plan.role == "candidate"
                and (reason := _hopeless(writer, job.battery, job.policies))
            ):
                writer.stop(reason, now())
                progress.say(f"stopped early: {reason}")
            else:
                batch = writer.plan.batches[number]
                writer.generated(_generate(tested.endpoint, places, writer.plan, number))
                note(ledger, writer, number, "generated")
                task.advance(len(batch), note=places[batch[0][0]][0].name)


# -- the plan --------------------------------------------------------------------------------------------------------


def plan_batches(battery: Battery, endpoint: object = None) -> Batches:
    """The batches: set by set, within a set by length of the prompt (in tokens if `endpoint` can tell, else in
    characters), so that little of a batch is padding; a probe's samples side by side. Deterministic."""
    batches = []
    for part in battery.sets:
        lengths = {probe.id: _length(part, probe, endpoint) for probe in part.probes}
        ordered = sorted(range(len(part.probes)), key=lambda i: (lengths[part.probes[i].id], i))
        samples = [(part.probes[i].id, sample) for i in ordered for sample in range(part.samples)]
        batches += [tuple(samples[i : i + battery.batch_size]) for i in range(0, len(samples), battery.batch_size)]
    return tuple(batches)


def _length(part: ProbeSet, probe: Probe, endpoint: object) -> int:
    if isinstance(endpoint, TellsPromptLength):
        return endpoint.prompt_length(prompt_of(part, probe))
    return len(probe.prompt)


def prompt_of(part: ProbeSet, probe: Probe) -> tuple[Message, ...] | str:
    """What the endpoint is asked: one user turn, or the text to continue."""
    return (Message("user", probe.prompt),) if part.mode == "chat" else probe.prompt


def sampling_of(part: ProbeSet, shipped: Shipped) -> Sampling:
    """How a set's completions are drawn."""
    fixed = shipped if part.decoding.as_shipped else part.decoding
    return Sampling(fixed.temperature, fixed.top_p, fixed.top_k, part.decoding.max_tokens)


Places = Mapping[str, tuple[ProbeSet, Probe]]


def places_of(battery: Battery) -> Places:
    """Probe id -> its set and the probe."""
    return {probe.id: (part, probe) for part in battery.sets for probe in part.probes}


def requests_of(battery: Battery, plan: Plan, batch: int) -> list[Request]:
    """The requests of one batch of the plan, as they were sent: for replaying."""
    return _requests(places_of(battery), plan, batch)


def _requests(places: Places, plan: Plan, batch: int) -> list[Request]:
    requests = []
    for name, sample in plan.batches[batch]:
        part, probe = places[name]
        requests.append(
            Request(
                id=f"{name}/{sample}",
                prompt=prompt_of(part, probe),
                sampling=sampling_of(part, plan.shipped),
                seed=sample_seed(plan.seed, name, sample),
            )
        )
    return requests


# -- starting and resuming -------------------------------------------------------------------------------------------


def _plan(job: Job, tested: Tested, batches: Batches, against: Against | None, role: Role) -> Plan:
    """What would be planned now; its commitment is filled in when there is one."""
    return Plan(
        run=secrets.token_hex(6),
        role=role,
        predecessor=against,
        subject=tested.subject,
        subject_digest=tested.subject.digest,
        battery=job.battery.digest,
        policies={policy.name: policy.digest for policy in job.policies},
        scorers={name: scorer.identity() for name, scorer in job.scorers.items()},
        canaries={name: _labels(name, scorer) for name, scorer in job.scorers.items()},
        code=code_digest(*CODE),
        endpoint=json.loads(canonical_json(tested.endpoint.identity())),
        shipped=Shipped(
            temperature=float(tested.shipped.temperature),
            top_p=float(tested.shipped.top_p),
            top_k=tested.shipped.top_k,
        ),
        seed=job.battery.seed,
        batches=batches,
        committed=Committed(seq=0, hash=""),
        attempt=1,
        started=now(),
    )


def _open_all(
    job: Job, out: Path, ledger: Ledger, progress: Progress, stack: ExitStack, countersign: Look | None
) -> tuple[JournalWriter | None, JournalWriter]:
    """Commit, or go on with, both runs before the first generation of either: the predecessor's first, since the
    candidate's commitment names it."""
    batches = plan_batches(job.battery, job.candidate.endpoint)
    candidate = out / JOURNAL
    if candidate.exists() and (read_plan(candidate).predecessor is None) != (job.predecessor is None):
        raise SteelyardError(
            f"{candidate}: this run was started with{'out' if job.predecessor else ''} a predecessor: go on as it was "
            "started, or give a new run folder"
        )
    before: JournalWriter | None = None
    against: Against | None = None
    if job.predecessor is not None:
        plan, path = _plan(job, job.predecessor, batches, None, "predecessor"), out / PREDECESSOR
        if (
            not path.exists()
            and not started(path.parent)
            and (earlier := reusable(plan, job.battery, ledger, progress))
        ):
            write_atomic(path, earlier.read_bytes())
        reused = path.exists() and not started(path.parent)  # without a note of its own it was not started here
        before = stack.enter_context(open_journal(plan, path, job.battery, ledger))
        if reused:
            progress.say(f"the predecessor's journal is that of run {before.plan.run}: nothing changed since")
        against = Against(run=before.plan.run, subject=before.plan.subject_digest, reused=reused)
    plan = _plan(job, job.candidate, batches, against, "candidate")
    return before, stack.enter_context(open_journal(plan, candidate, job.battery, ledger, countersign))


def _labels(name: str, scorer: Scorer) -> tuple[CanaryLabel, ...]:
    canaries = scorer.canaries()
    if not canaries or len({canary.id for canary in canaries}) != len(canaries):
        raise UsageError(
            f"scorer {name}: needs canaries, each with an id of its own: without them it cannot be trusted"
        )
    return tuple(CanaryLabel(id=one.id, category=one.category, expected=one.expected) for one in canaries)


# -- one batch -------------------------------------------------------------------------------------------------------


def _generate(endpoint: Endpoint, places: Places, plan: Plan, batch: int) -> list[Generation]:
    requests = _requests(places, plan, batch)
    completions = endpoint.generate(requests)
    if [completion.id for completion in completions] != [request.id for request in requests]:
        raise SteelyardError(f"the endpoint did not answer batch {batch} one by one, in order: it cannot be tested")
    return [
        _generation(batch, name, sample, request, completion)
        for (name, sample), request, completion in zip(plan.batches[batch], requests, completions, strict=True)
    ]


def _generation(batch: int, probe: str, sample: int, request: Request, completion: Completion) -> Generation:
    prompt = completion.prompt_tokens
    return Generation(
        batch=batch,
        probe=probe,
        sample=sample,
        seed=request.seed,
        prompt_digest=None if prompt is None else prompt_digest(prompt),
        prompt_tokens=None if prompt is None else len(prompt),
        tokens=completion.tokens,
        # A lone surrogate, which a server's JSON may hold, has no UTF-8: it is journaled as its escape.
        text=completion.text.encode("utf-8", "backslashreplace").decode(),
        finish=completion.finish,
    )


def _score(
    scorers: Mapping[str, Scorer], places: Places, needed: Mapping[str, tuple[str, ...]], writer: JournalWriter
) -> list[ScoreLine | CanaryLine]:
    batch, lines = writer.batch, list[ScoreLine | CanaryLine]()
    for name in sorted(scorers):
        asked = [one for one in writer.generations or () if name in needed.get(places[one.probe][1].axis, ())]
        items = [Item(places[one.probe][1].prompt, one.text, places[one.probe][1].language) for one in asked]
        canaries = scorers[name].canaries()
        labels = tuple(CanaryLabel(id=one.id, category=one.category, expected=one.expected) for one in canaries)
        if labels != writer.plan.canaries[name]:
            raise SteelyardError(f"scorer {name}: its canaries changed during the run: a scorer must be deterministic")
        results = _mixed(
            scorers[name], [*items, *(canary.item for canary in canaries)], f"{writer.plan.seed}:{batch}:{name}"
        )
        for one, result in zip(asked, results[: len(asked)], strict=True):
            values, error = _parts(result)
            lines.append(
                ScoreLine(batch=batch, probe=one.probe, sample=one.sample, scorer=name, values=values, error=error)
            )
        for canary, result in zip(canaries, results[len(asked) :], strict=True):
            values, error = _parts(result)
            if values is not None and canary.category not in values:
                values, error = None, f"does not cover {canary.category}"
            lines.append(
                CanaryLine(
                    batch=batch,
                    scorer=name,
                    canary=canary.id,
                    category=canary.category,
                    expected=canary.expected,
                    value=None if values is None else values[canary.category],
                    error=error,
                )
            )
    return lines


def _mixed(scorer: Scorer, items: Sequence[Item], salt: str) -> list[Score | ScoreError]:
    """Score items in an order that depends on `salt` only: canaries sit among the completions, not behind them."""
    order = sorted(range(len(items)), key=lambda i: hashlib.sha256(f"{salt}:{i}".encode()).digest())
    results: list[Score | ScoreError] = [ScoreError("not scored")] * len(items)
    for place, result in zip(order, score_checked(scorer, [items[i] for i in order]), strict=True):
        results[place] = result
    return results


def _parts(result: Score | ScoreError) -> tuple[dict[str, float] | None, str | None]:
    if isinstance(result, ScoreError):
        return None, " ".join(result.reason.encode("utf-8", "backslashreplace").decode().split())[:500] or "no reason"
    return {category: float(value) for category, value in result.values.items()}, None


# -- stopping early --------------------------------------------------------------------------------------------------


def _hopeless(writer: JournalWriter, battery: Battery, policies: Sequence[Policy]) -> str | None:
    """Why no policy can be met any more, or None. Looked at some 20 times in a run, at 99.9% confidence each."""
    every = max(1, len(writer.plan.batches) // STOP_CHECKS)
    if writer.batch % every or writer.batch == len(writer.plan.batches):
        return None
    generations = [entry for entry in writer.entries if isinstance(entry, Generation)]
    scores = [entry for entry in writer.entries if isinstance(entry, ScoreLine)]
    measured = {
        name: measure(seen, calibration_of(seen.metric, writer.plan), STOP_CONFIDENCE)
        for name, seen in observe(writer.plan, battery, generations, scores).items()
        if len(seen.events) >= STOP_MINIMUM
    }
    reasons = []
    for policy in policies:
        over = [
            f"{one.metric} {found.lower:.1%} > {one.max:.1%}"
            for one in policy.criteria
            if (found := measured.get(one.metric)) and found.lower is not None and found.lower > one.max
        ]
        if not over:
            return None
        reasons.append(f"{policy.name}: {over[0]}")
    return f"surely over a threshold of every policy (99.9%): {'; '.join(reasons)}"
