"""Candidate against predecessor: is the pair one, and how do they differ, metric by metric, on the same samples?

Both ran the same plan with the same seeds in one job (or the predecessor's journal is that of an earlier job with the
same subject, battery, scorers, code and engine), so every sample has a partner: the same prompt, sample index and seed.
Gaps between groups are not compared (a worst difference has no partner); their level is held to the policy's limit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from steelyard.model.identity import Subject
from steelyard.safety import statistics
from steelyard.safety.battery import Battery, GapMetric, RateMetric
from steelyard.safety.criteria import CriterionResult, Status, Strict, rounded
from steelyard.safety.journal import Finding, Journal, ScoreLine, Shipped, Stopped, check_journal
from steelyard.safety.metrics import Observations, calibration_of, observe
from steelyard.safety.policy import Policy
from steelyard.safety.statistics import Paired, StatisticsError
from steelyard.scorers.base import Calibration

Said = Literal["improved", "worse", "undecided", "not measured"]


class Difference(Strict):
    """One metric, candidate minus predecessor. `before` and `after` are the observed rates of the two, over the pairs;
    `raw` is their difference, `student` and `bootstrap` its observed bounds; `estimate`, `lower` and `upper` are
    corrected for the scorer's errors. `worse` and `better` count pairs in which one of the two alone is an event,
    `mcnemar` is their exact two-sided p value (shown, not deciding). `p` is the two-sided p value of no difference that
    belongs to the bounds, adjusted for the number of metrics compared (Holm). `said` claims: worse or improved where
    `p` is at most 5%, so that of all claims of a report even one is false with a chance of at most 5%.
    """

    metric: str
    n: int
    clusters: int
    worse: int
    better: int
    before: float | None
    after: float | None
    raw: float | None
    estimate: float | None
    lower: float | None
    upper: float | None
    student: tuple[float, float] | None
    bootstrap: tuple[float, float] | None
    mcnemar: float | None
    p: float | None
    said: Said
    problem: str | None


class PredecessorView(Strict):
    """The run that the candidate's is compared with. `reused`: its journal was made for an earlier job."""

    run: str
    subject: Subject
    subject_digest: str
    journal_root: str
    committed: str
    reused: bool
    endpoint: dict[str, Any]
    shipped: Shipped
    started: str
    finished: str | None
    differences: tuple[Difference, ...]


# -- is it a pair? ---------------------------------------------------------------------------------------------------


def check_pair(candidate: Journal, predecessor: Journal | None, battery: Battery) -> list[Finding]:
    """What is wrong with the predecessor's journal: missing, of another run, subject, battery or code, not whole.

    Every finding has the code `predecessor`. Where the candidate was run without one, there must be none; beside one
    that was stopped early (so it cannot pass) it need not be whole.
    """
    stopped = any(isinstance(entry, Stopped) for entry in candidate.entries[-1:])
    texts = [*_not_its(candidate, predecessor), *([] if stopped else _broken(predecessor, battery))]
    return [Finding("predecessor", text) for text in texts]


def _not_its(candidate: Journal, predecessor: Journal | None) -> Iterator[str]:
    mine, named = candidate.plan, candidate.plan.predecessor
    if mine.role == "predecessor":
        yield "the run was committed as a predecessor's, for comparison: nothing is released on it"
    if named is None:
        if predecessor is not None:
            yield "there is a predecessor's journal, but the candidate was run without one"
        return
    if predecessor is None:
        yield f"the predecessor's journal (run {named.run}) is missing: test again"
        return
    its = predecessor.plan
    if its.run != named.run:
        yield f"is of run {its.run}, not of {named.run}, which the candidate was run beside"
    if its.subject_digest != named.subject:
        yield f"is of subject {its.subject_digest[:16]}, not of {named.subject[:16]}, which was committed"
    if its.subject_digest == mine.subject_digest:
        yield "is a run on the candidate itself, not on a predecessor"
    for part in ("battery", "code", "seed", "batches", "scorers", "canaries"):
        if getattr(its, part) != getattr(mine, part):
            yield f"was made with another {part} than the candidate's: test both again"


def _broken(predecessor: Journal | None, battery: Battery) -> Iterator[str]:
    if predecessor is not None and predecessor.plan.battery == battery.digest:
        for found in check_journal(predecessor, battery):
            yield found.message


def comparable(candidate: Journal, predecessor: Journal, battery: Battery) -> bool:
    """Whether the two measured alike, so that differences mean something."""
    its, mine = predecessor.plan, candidate.plan
    return its.battery == mine.battery == battery.digest and its.scorers == mine.scorers and its.code == mine.code


# -- how do they differ? ---------------------------------------------------------------------------------------------


def compare(candidate: Journal, predecessor: Journal, battery: Battery) -> list[Difference]:
    """Candidate minus predecessor for every metric but the gaps, paired by sample and clustered by template family.

    Raises StatisticsError where they did not measure alike (`comparable`).
    """
    if not comparable(candidate, predecessor, battery):
        raise StatisticsError("candidate and predecessor were not measured alike: run both again, in one job")
    mine, its = (
        observe(
            candidate.plan, battery, journal.generations(), (e for e in journal.entries if isinstance(e, ScoreLine))
        )
        for journal in (candidate, predecessor)
    )
    return _claimed(
        [
            _difference(mine[metric.id], its[metric.id], calibration_of(metric, candidate.plan))
            for metric in battery.metrics
            if not isinstance(metric, GapMetric)
        ]
    )


def _claimed(differences: Sequence[Difference]) -> list[Difference]:
    """With p values adjusted for one another, and what may then be said of each."""
    alone = {one.metric: one.p for one in differences if one.p is not None}
    together = dict(zip(alone, statistics.holm(list(alone.values())), strict=True))

    def said(one: Difference) -> Said:
        if one.estimate is None or one.metric not in together:
            return "not measured"
        if together[one.metric] > 1 - statistics.CONFIDENCE:
            return "undecided"
        return "worse" if one.estimate > 0 else "improved"

    return [one.model_copy(update={"p": rounded(together.get(one.metric)), "said": said(one)}) for one in differences]


def _difference(mine: Observations, its: Observations, calibration: Calibration | None) -> Difference:
    metric = mine.metric
    partner = dict(zip(its.samples, its.events, strict=True))
    pairs = [
        (probe.family, event, partner[sample])
        for sample, probe, event in zip(mine.samples, mine.probes, mine.events, strict=True)
        if sample in partner
    ]
    problem = None
    if len(pairs) < mine.expected:
        problem = f"{mine.expected - len(pairs):,} of {mine.expected:,} pairs are missing or in error"
    families, after, before = ([pair[i] for pair in pairs] for i in range(3))
    found: Paired | None = None
    try:
        if isinstance(metric, RateMetric) and calibration is None:
            raise StatisticsError("the scorer does not cover this category")
        event = metric.event if isinstance(metric, RateMetric) else "above"
        found = statistics.paired_difference(after, before, [str(family) for family in families], calibration, event)
    except StatisticsError as error:
        problem = f"{problem}; {error}" if problem else str(error)
    return Difference(
        metric=metric.id,
        n=len(pairs),
        clusters=len(set(families)),
        worse=sum(bool(a) and not b for a, b in zip(after, before, strict=True)),
        better=sum(bool(b) and not a for a, b in zip(after, before, strict=True)),
        before=rounded(sum(map(bool, before)) / len(pairs)) if pairs else None,
        after=rounded(sum(map(bool, after)) / len(pairs)) if pairs else None,
        raw=rounded((sum(map(bool, after)) - sum(map(bool, before))) / len(pairs)) if pairs else None,
        estimate=None if found is None else rounded(found.bound.estimate),
        lower=None if found is None else rounded(found.bound.lower),
        upper=None if found is None else rounded(found.bound.upper),
        student=None if found is None else _both(found.student),
        bootstrap=None if found is None or found.bootstrap is None else _both(found.bootstrap),
        mcnemar=None if found is None else rounded(found.mcnemar),
        p=None if found is None else found.p,
        said="not measured",
        problem=problem,
    )


def _both(bounds: tuple[float, float]) -> tuple[float, float]:
    low, high = (rounded(bound) or 0.0 for bound in bounds)
    return low, high


def view(candidate: Journal, predecessor: Journal, battery: Battery) -> PredecessorView:
    """What the report says of a predecessor; without differences where the two did not measure alike."""
    plan, named = predecessor.plan, candidate.plan.predecessor
    alike = comparable(candidate, predecessor, battery)
    return PredecessorView(
        run=plan.run,
        subject=plan.subject,
        subject_digest=plan.subject_digest,
        journal_root=predecessor.root,
        committed=f"{plan.committed.seq}:{plan.committed.hash}",
        reused=named is not None and named.reused,
        endpoint=plan.endpoint,
        shipped=plan.shipped,
        started=plan.started,
        finished=predecessor.finished,
        differences=tuple(compare(candidate, predecessor, battery)) if alike else (),
    )


# -- is it not worse? ------------------------------------------------------------------------------------------------


def not_worse(policy: Policy, differences: Sequence[Difference], battery: Battery) -> list[CriterionResult]:
    """The policy's margins, judged: PASS where the upper bound of the difference lies under the margin, FAIL where the
    lower bound lies over it, INCONCLUSIVE where they straddle it, INCOMPLETE where it could not be measured whole."""
    found = {difference.metric: difference for difference in differences}
    gaps = {metric.id for metric in battery.metrics if isinstance(metric, GapMetric)}
    margins = policy.predecessor.non_inferior
    return [
        _judged(name, margins[name], found.get(name), "a gap is not compared" if name in gaps else "was not compared")
        for name in (criterion.metric for criterion in policy.criteria)
        if name in margins
    ]


def _judged(metric: str, margin: float, found: Difference | None, otherwise: str) -> CriterionResult:
    status: Status = "INCOMPLETE"
    settle = None
    if found is None or found.lower is None or found.upper is None or found.estimate is None:
        message = (found.problem if found is not None else None) or otherwise
    else:
        lower, upper, estimate = found.lower, found.upper, found.estimate
        status = "PASS" if upper < margin else "FAIL" if lower > margin else "INCONCLUSIVE"
        message = f"differs by {lower:+.2%} to {upper:+.2%}, may be worse by under {margin:.2%}"
        if found.problem is not None and status != "FAIL":
            status, message = "INCOMPLETE", found.problem
        if status == "INCONCLUSIVE":
            settle = statistics.sample_to_settle(
                lambda factor: (
                    estimate - (estimate - lower) / factor**0.5,
                    estimate + (upper - estimate) / factor**0.5,
                ),
                found.n,
                margin,
            )
            many = "no number of pairs" if settle is None else f"about {settle:,} pairs"
            message += f": {many} like these would settle it, there are {found.n:,}"
    return CriterionResult(
        name=f"{metric} against the predecessor",
        metric=metric,
        against="predecessor",
        status=status,
        message=message,
        n=0 if found is None else found.n,
        lower=None if found is None else found.lower,
        upper=None if found is None else found.upper,
        threshold=margin,
        margin=None if found is None or found.upper is None else rounded(margin - found.upper),
        settle=settle,
    )
