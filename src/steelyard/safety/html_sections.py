"""The page's first sections, on the verdict: criteria, bounds against thresholds, predecessor, variants, what to ask
for next."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal

from steelyard.safety.criteria import CriterionResult
from steelyard.safety.forest import Bar, forest
from steelyard.safety.html_parts import listed, scroll, state, table, text
from steelyard.safety.paired import Difference
from steelyard.safety.report import PolicyView, Report
from steelyard.safety.variants import VariantView
from steelyard.safety.words import NOTE, SAID, SIGNS, in_words, meaning, percent, signed, whose

Limits = dict[str, list[tuple[str, float]]]
_HEAD = ("upper bound", "threshold", "margin", "samples")


def verdicts(report: Report) -> str:
    """A card for each policy, and what is wrong with the run."""
    cards = "".join(
        f'<div class="card {view.status}"><div class="verdict"><span aria-hidden="true">{SIGNS[view.status]}</span> '
        f"{view.status}</div><div><strong>{text(view.name)}</strong> v{view.version}: {SAID[view.status]}</div></div>"
        for view in report.policies
    )
    found = listed(f"<code>{text(one.code)}</code> {text(one.message)}" for one in report.findings)
    wrong = f"<h3>What is wrong with this run</h3>{found}" if found else ""
    return f'<div class="cards">{cards}</div><p class="soft">{NOTE}</p>{wrong}'


def criteria(report: Report) -> str:
    """One line a criterion, and why it says so under it."""
    if not report.policies:
        return '<p class="soft">No policy was given.</p>'
    asked = dict.fromkeys(one.metric for view in report.policies for one in view.criteria)
    known = [f"<strong>{text(metric)}</strong>: {said}" for metric in asked if (said := meaning(metric)) is not None]
    about = f"<details><summary>What each one counts</summary>{listed(known)}</details>" if known else ""
    return f"<h2>Criteria</h2>{about}" + "".join(map(_criteria_of, report.policies))


def _criteria_of(view: PolicyView) -> str:
    head = '<th scope="col">criterion</th><th scope="col">says</th>' + "".join(
        f'<th scope="col" class="n">{name}</th>' for name in _HEAD
    )
    body = "".join(map(_criterion, view.criteria))
    made = f'<table class="crit"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f"<h3>{text(view.name)}</h3>" + scroll(made, f"criteria of policy {view.name}")


def _criterion(one: CriterionResult) -> str:
    show = signed if one.against == "predecessor" else percent
    margin = "–" if one.margin is None else signed(one.margin)
    values = zip(_HEAD, (show(one.upper), show(one.threshold), margin, f"{one.n:,}"), strict=True)
    cells = "".join(f'<td class="n" data-l="{name}">{value}</td>' for name, value in values)
    return (
        f'<tr class="said"><th scope="row">{text(one.name)}</th><td class="state">{state(one.status)}</td>{cells}</tr>'
        f'<tr class="why"><td colspan="6">{text(one.message)}</td></tr>'
    )


def _limits(report: Report, against: Literal["limit", "predecessor"]) -> Limits:
    """Metric -> (policy, threshold)."""
    found: Limits = defaultdict(list)
    for view in report.policies:
        for one in view.criteria:
            if one.against == against:
                found[one.metric].append((view.name, one.threshold))
    return found


def measurements(report: Report) -> str:
    """Every metric's bounds: as a figure with the thresholds, as a table."""
    limits = _limits(report, "limit")
    bars = [Bar(one.metric, one.estimate, one.lower, one.upper, limits[one.metric]) for one in report.measurements]
    rows = [
        (
            text(one.metric),
            percent(one.raw),
            percent(one.estimate),
            percent(one.lower),
            percent(one.upper),
            percent(one.floor),
            f"{one.events:,} of {one.n:,}",
            f"{one.clusters:,}",
        )
        for one in report.measurements
    ]
    head = ("metric", "observed", "corrected", "lower", "upper", "floor", "events", "families")
    problems = listed(f"{text(one.metric)}: {text(one.problem)}" for one in report.measurements if one.problem)
    note = (
        "Dot: estimate, corrected for the scorer's errors. Bar: from the lower to the upper one-sided 95% bound; a "
        "pass needs the bar's right end left of the dashed line."
    )
    return (
        f'<h2>Bounds against thresholds</h2><p class="soft">{note}</p>'
        + forest("Estimates and bounds against thresholds", bars)
        + table("all measurements", head, rows, range(1, 8))
        + problems
    )


# -- differences -----------------------------------------------------------------------------------------------------


def predecessor(report: Report) -> str:
    """Candidate against predecessor: in words, as a figure, as a table."""
    before = report.predecessor
    if before is None:
        return ""
    title = "<h2>Against the predecessor</h2>"
    its = f'<p class="soft">Subject <code>{text(before.subject_digest[:16])}…</code>, {text(whose(before))}.</p>'
    if not before.differences:
        return f"{title}{its}<p>They were not measured alike, so nothing can be said about their difference.</p>"
    note = (
        "The same prompts with the same seeds, answered by both; candidate minus predecessor, so left of zero is "
        "better; undecided where there are too few samples to tell. Bar: one-sided 95% bounds, corrected for the "
        "scorer's errors; dashed: how much worse a policy lets it be."
    )
    return (
        f'{title}<p>{text(in_words(before.differences))}</p><p class="soft">{note}</p>'
        + _differences("Candidate minus predecessor", before.differences, _limits(report, "predecessor"))
        + its
    )


def _differences(title: str, found: Sequence[Difference], limits: Limits, names: tuple[str, str] | None = None) -> str:
    """`names`: of the one before and the one after."""
    before, after = names or ("predecessor", "candidate")
    bars = [Bar(f"{d.metric}: {d.said}", d.estimate, d.lower, d.upper, limits[d.metric]) for d in found]
    rows = [
        (
            text(one.metric),
            f"<strong>{one.said}</strong>" if one.said in ("improved", "worse") else one.said,
            percent(one.before),
            percent(one.after),
            signed(one.estimate),
            signed(one.lower),
            signed(one.upper),
            f"{one.worse:,} / {one.better:,} of {one.n:,}",
            "–" if one.mcnemar is None else f"{one.mcnemar:.3g}",
        )
        for one in found
    ]
    head = ("metric", f"{after} is", before, after, "difference", "lower", "upper", "worse / better pairs", "McNemar p")
    problems = listed(f"{text(one.metric)}: {text(one.problem)}" for one in found if one.problem)
    return forest(f"{title}, with bounds", bars, difference=True) + table(title, head, rows, range(2, 9)) + problems


def variants(found: Sequence[VariantView]) -> str:
    """What each variant's own test says, and how it differs from the main candidate."""
    if not found:
        return ""
    note = (
        "The same model in other number formats, each tested as a subject of its own on the same prompts and seeds. "
        "Each has a whole report of its own in variants/NAME, and is released on its own PASS, never on this one."
    )
    policies = sorted({name for one in found for name in one.states})
    rows = [
        (
            text(one.name),
            *(state(one.states[name]) if name in one.states else "–" for name in policies),
            text(one.subject.dtype),
            f"<code>{text(one.subject_digest[:16])}…</code>",
        )
        for one in found
    ]
    return (
        f'<h2>Variants</h2><p class="soft">{note}</p>'
        + table("variants", ("variant", *policies, "dtype", "subject"), rows)
        + "".join(map(_variant, found))
    )


def _variant(one: VariantView) -> str:
    title = f"<h3>{text(one.name)} against the model itself</h3><p>Tested: {text(one.what)}.</p>"
    wrong = listed(map(text, one.findings))
    if not one.differences:
        return f"{title}{wrong}<p>They were not measured alike, so nothing can be said about their difference.</p>"
    figures = _differences(f"{one.name} minus the model", one.differences, defaultdict(list), ("model", one.name))
    return f"{title}{wrong}<p>{text(in_words(one.differences))}</p>{figures}"


# -- what to ask for next --------------------------------------------------------------------------------------------


def settling(report: Report) -> str:
    """Sample sizes that would settle what is INCONCLUSIVE."""
    rows = list(_settling_rows(report))
    if not rows:
        return ""
    note = "Samples that would settle what is inconclusive, if the rates seen are the true ones."
    head = ("criterion", "policy", "samples now", "samples needed")
    return f'<h2>How much more to ask</h2><p class="soft">{note}</p>' + table(
        "samples that would settle it", head, rows, (2, 3)
    )


def _settling_rows(report: Report) -> Iterable[tuple[str, ...]]:
    for view in report.policies:
        for one in view.criteria:
            if one.status == "INCONCLUSIVE":
                needed = "no number would" if one.settle is None else f"about {one.settle:,}"
                yield text(one.name), text(view.name), f"{one.n:,}", needed
