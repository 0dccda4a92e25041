"""The report for people: one HTML file that needs no network, and a Markdown summary for the model card.

Everything from the journal is escaped: a model's words are hostile. No script, no link, no font, no image from
elsewhere. A state is told by word and sign, never by colour alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from html import escape

from steelyard.safety import statistics
from steelyard.safety.criteria import CriterionResult, Measurement, Status
from steelyard.safety.html_parts import CSS, forest, percent, table
from steelyard.safety.paired import Difference, PredecessorView, Said
from steelyard.safety.report import Breakdown, PolicyView, Report

_SIGNS: dict[Status, str] = {"PASS": "✓", "FAIL": "✕", "INCONCLUSIVE": "?", "INCOMPLETE": "–"}
_SAID: dict[Status, str] = {
    "PASS": "every criterion is met",
    "FAIL": "at least one criterion is surely not met",
    "INCONCLUSIVE": "too few samples to tell for at least one criterion",
    "INCOMPLETE": "the test is not whole, so it says nothing",
}
_NOTE = "What each policy's criteria say. The release gate decides: it also looks at the model, ledger, keys and age."
_GROUPS_SHOWN = 40


def _state(status: Status) -> str:
    return f'<span class="{status}"><span aria-hidden="true">{_SIGNS[status]}</span> {status}</span>'


# -- sections --------------------------------------------------------------------------------------------------------


def _criteria(view: PolicyView) -> str:
    rows = []
    for one in view.criteria:
        show = signed if one.against == "predecessor" else percent
        cells = (
            f"<td>{escape(one.name)}</td>"
            f'<td class="state">{_state(one.status)}</td>'
            f'<td class="n" data-l="upper bound">{show(one.upper)}</td>'
            f'<td class="n" data-l="threshold">{show(one.threshold)}</td>'
            f'<td class="n" data-l="margin">{_margin(one)}</td>'
            f'<td class="n" data-l="samples">{one.n:,}</td>'
        )
        rows.append(f'<tr class="said">{cells}</tr><tr class="why"><td colspan="6">{escape(one.message)}</td></tr>')
    head = "<th>criterion</th><th>says</th>" + "".join(
        f'<th class="n">{name}</th>' for name in ("upper bound", "threshold", "margin", "samples")
    )
    return (
        f"<h3>{escape(view.name)}</h3>"
        f'<table class="crit"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )


def _margin(one: CriterionResult) -> str:
    return "–" if one.margin is None else f"{one.margin * 100:+.2f} pt"


def _verdicts(report: Report) -> str:
    cards = "".join(
        f'<div class="card {view.status}"><div class="verdict"><span aria-hidden="true">{_SIGNS[view.status]}</span> '
        f"{view.status}</div><div><strong>{escape(view.name)}</strong> v{view.version}: {_SAID[view.status]}</div>"
        "</div>"
        for view in report.policies
    )
    found = "".join(f"<li><code>{escape(one.code)}</code> {escape(one.message)}</li>" for one in report.findings)
    wrong = f"<h3>What is wrong with this run</h3><ul>{found}</ul>" if found else ""
    return f'<div class="cards">{cards}</div><p class="soft">{_NOTE}</p>{wrong}'


def _all_measurements(report: Report) -> str:
    rows = [
        (
            escape(one.metric),
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
    problems = "".join(
        f"<li>{escape(one.metric)}: {escape(one.problem)}</li>" for one in report.measurements if one.problem
    )
    return table(head, rows, range(1, 8)) + (f"<ul>{problems}</ul>" if problems else "")


def _thresholds(report: Report) -> str:
    limits: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for view in report.policies:
        for one in view.criteria:
            if one.against == "limit":
                limits[one.metric].append((view.name, one.threshold))
    rows = [(one.metric, one.estimate, one.lower, one.upper, limits[one.metric]) for one in report.measurements]
    return forest("Estimates and bounds against thresholds", rows)


_WORDS: tuple[Said, ...] = ("improved", "worse", "undecided", "not measured")


def _against(report: Report) -> str:
    """Candidate against predecessor: in words, as a figure, as a table."""
    before = report.predecessor
    if before is None:
        return ""
    note = (
        "The same prompts with the same seeds, answered by both; candidate minus predecessor, so left of zero is "
        "better; undecided where there are too few samples to tell. Bar: one-sided 95% bounds, corrected for the "
        "scorer's errors; dashed: how much worse a policy lets it be."
    )
    if not before.differences:
        why = "They were not measured alike, so nothing can be said about their difference."
        return f'<h2>Against the predecessor</h2><p class="soft">{_whose(before)}</p><p>{why}</p>'
    limits: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for view in report.policies:
        for one in view.criteria:
            if one.against == "predecessor":
                limits[one.metric].append((view.name, one.threshold))
    bars = [(f"{d.metric}: {d.said}", d.estimate, d.lower, d.upper, limits[d.metric]) for d in before.differences]
    rows = [
        (
            escape(one.metric),
            f"<strong>{one.said}</strong>" if one.said in ("improved", "worse") else one.said,
            percent(one.before),
            percent(one.after),
            signed(one.estimate),
            signed(one.lower),
            signed(one.upper),
            f"{one.worse:,} / {one.better:,} of {one.n:,}",
            "–" if one.mcnemar is None else f"{one.mcnemar:.3g}",
        )
        for one in before.differences
    ]
    head = (
        "metric",
        "candidate is",
        "predecessor",
        "candidate",
        "difference",
        "lower",
        "upper",
        "worse / better pairs",
    )
    problems = "".join(f"<li>{escape(d.metric)}: {escape(d.problem)}</li>" for d in before.differences if d.problem)
    return (
        f'<h2>Against the predecessor</h2><p>{escape(in_words(before.differences))}</p><p class="soft">{note}</p>'
        + forest("Candidate minus predecessor, with bounds", bars, signed=True)
        + table((*head, "McNemar p"), rows, range(2, 9))
        + (f"<ul>{problems}</ul>" if problems else "")
        + f'<p class="soft">{_whose(before)}</p>'
    )


def in_words(differences: Sequence[Difference]) -> str:
    """`Improved: a, b. Worse: none. Undecided: c.`"""
    names = {said: [one.metric for one in differences if one.said == said] for said in _WORDS}
    shown = [said for said in _WORDS if names[said] or said in ("improved", "worse")]
    return " ".join(f"{said.capitalize()}: {', '.join(names[said]) or 'none'}." for said in shown)


def _whose(before: PredecessorView) -> str:
    made = "taken from an earlier job: same subject, battery, scorers, code and engine" if before.reused else "this job"
    return (
        f"Predecessor: subject <code>{escape(before.subject_digest[:16])}…</code>, {escape(before.subject.dtype)}; "
        f"run {escape(before.run)}, {made}."
    )


def signed(value: float | None) -> str:
    """A difference in points of a percent."""
    return "not measured" if value is None else f"{value * 100:+.2f} pt"


def _parts(report: Report, by: str, title: str, note: str) -> str:
    tables = []
    found: dict[str, list[Breakdown]] = defaultdict(list)
    for row in report.breakdown:
        if row.by == by:
            found[row.metric].append(row)
    for metric, rows in found.items():
        if by == "group":
            rows = sorted(rows, key=lambda row: (-(row.estimate or row.raw), row.key))[:_GROUPS_SHOWN]
            tables.append(f"<h3>{escape(metric)}</h3>")
            bars = [(f"{r.key}  ({r.events}/{r.n})", r.estimate, r.lower, r.upper, ()) for r in rows]
            tables.append(forest(f"{metric} by group", bars))
            tables.append(_pairs(report.measurement(metric)))
            continue
        cells = [
            (escape(r.key), f"{r.events:,} of {r.n:,}", percent(r.estimate), percent(r.lower), percent(r.upper))
            for r in rows
        ]
        tables.append(f"<h3>{escape(metric)}</h3>")
        tables.append(table((by, "events", "corrected", "lower", "upper"), cells, (1, 2, 3, 4)))
    return f'<h2>{title}</h2><p class="soft">{note}</p>{"".join(tables)}' if tables else ""


def _pairs(measurement: Measurement | None) -> str:
    if measurement is None or not measurement.detail.get("pairs"):
        return ""
    rows = [
        (
            escape(str(pair["high"])),
            escape(str(pair["low"])),
            percent(pair["estimate"]),
            percent(pair["lower"]),
            percent(pair["upper"]),
            str(pair["families"]),
        )
        for pair in measurement.detail["pairs"][:5]
    ]
    head = ("higher", "lower group", "difference", "lower", "upper", "shared families")
    return "<p>The widest differences between two groups:</p>" + table(head, rows, (2, 3, 4, 5))


def _scorers(report: Report) -> str:
    rows = [
        (
            f"{escape(scorer.name)}: {escape(category)}",
            f"{one.sensitivity:.1%} of {one.positives:,}",
            f"{one.specificity:.1%} of {one.negatives:,}",
            f"{percent(one.floor_above)} / {percent(one.floor_below)}",
            f"{scorer.canaries_right:,} of {scorer.canaries:,}",
            f"{scorer.worst:.0%}",
            f"{scorer.errors:,}",
            f"{escape(one.source)}, {escape(one.measured)}",
        )
        for scorer in report.scorers
        for category, one in scorer.categories.items()
    ]
    head = ("scorer", "sensitivity", "specificity", "floor (above / below)", "canaries right", "worst batch", "errors")
    return table((*head, "measured on"), rows, (1, 2, 3, 4, 5, 6))


def _settling(report: Report) -> str:
    rows = [
        (
            escape(view.name),
            escape(one.name),
            f"{one.n:,}",
            "no number would" if one.settle is None else f"about {one.settle:,}",
        )
        for view in report.policies
        for one in view.criteria
        if one.status == "INCONCLUSIVE"
    ]
    if not rows:
        return ""
    note = "Samples that would settle what is inconclusive, if the rates seen are the true ones."
    head = ("policy", "criterion", "samples now", "samples needed")
    return f'<h2>How much more to ask</h2><p class="soft">{note}</p>' + table(head, rows, (2, 3))


def _examples(report: Report) -> str:
    found: dict[str, list[str]] = defaultdict(list)
    for one in report.examples:
        about = ", ".join(part for part in (one.language, one.category, one.group) if part)
        found[one.metric].append(
            f"<p><code>{escape(one.probe)}</code> sample {one.sample} <span class='soft'>({escape(about)}; "
            f"score {one.value:.3f})</span></p><blockquote>{escape(one.prompt)}</blockquote>"
            f'<blockquote dir="auto">{escape(one.completion) or "(nothing)"}</blockquote>'
        )
    if not found:
        return ""
    parts = "".join(
        f"<details><summary>{escape(metric)}: {len(items)} worst</summary><div>{''.join(items)}</div></details>"
        for metric, items in found.items()
    )
    warning = "The model's own words, worst first. They may offend or harm; they stay closed until you open them."
    return f'<h2>Examples</h2><p class="soft">{warning}</p>{parts}'


def _facts(report: Report) -> list[tuple[str, str]]:
    shipped = report.shipped
    sampling = "greedy"
    if shipped.temperature > 0:
        sampling = f"temperature {shipped.temperature:g}, top-p {shipped.top_p:g}, top-k {shipped.top_k}"
    identical = (
        "no probe has several samples" if report.identical_samples is None else percent(report.identical_samples)
    )
    return [
        ("subject", report.subject_digest),
        *((f"· {name}", str(value)) for name, value in report.subject.model_dump().items()),
        ("battery", f"{report.battery_name} v{report.battery_version} ({report.tier}), {report.battery}"),
        *((f"policy {view.name}", view.digest) for view in report.policies),
        *((f"scorer {scorer.name}", scorer.digest) for scorer in report.scorers),
        ("code", report.code),
        ("answered by", ", ".join(f"{key} {value}" for key, value in sorted(report.endpoint.items()))),
        ("sampling as shipped", sampling),
        ("seed", str(report.seed)),
        ("run", report.run),
        ("attempt on this model and battery", str(report.attempt)),
        ("committed in the ledger as", report.committed),
        ("journal root", report.journal_root),
        *_facts_before(report.predecessor),
        ("samples of a probe that repeat another", identical),
        *((name.replace("_", " "), f"{count:,}") for name, count in report.counts.items()),
        ("started", report.times["started"] or ""),
        ("finished", report.times["finished"] or "not finished"),
    ]


def _facts_before(before: PredecessorView | None) -> list[tuple[str, str]]:
    if before is None:
        return [("predecessor", "none")]
    return [
        ("predecessor's subject", before.subject_digest),
        ("predecessor's run", f"{before.run}{' (an earlier job)' if before.reused else ''}"),
        ("predecessor's journal root", before.journal_root),
        ("predecessor committed in the ledger as", before.committed),
        ("predecessor answered by", ", ".join(f"{key} {value}" for key, value in sorted(before.endpoint.items()))),
    ]


_METHOD = f"""
<p>Each sample counts as an event or not (for a scorer: at or over its threshold). Bounds are one-sided at
{statistics.CONFIDENCE:.0%}, clustered by template family: Clopper-Pearson on the effective sample size of Korn and
Graubard (1998). With few events, when the data cannot show how alike a family's samples are, an intra-cluster
correlation of {statistics.DECLARED_ICC:g} is assumed. Rates seen through a scorer are corrected for its measured
sensitivity and specificity (Rogan and Gladen 1978); their bounds carry the calibration's own uncertainty (exact bounds
of all three, margins added in squares after Zou and Donner 2008). The floor is the lowest rate that the calibration can
certify; a threshold under it is refused.</p>
<p>A gap is the worst difference between two groups, paired by family, corrected by the scorer's Youden index; its lower
bound is simultaneous over all pairs (Bonferroni), its upper bound the largest of the pairs' (intersection-union).</p>
<p>A difference from the predecessor is paired by sample: same prompt, same seed. Of each side the widest bound counts:
Student's between template families, that of the studentised cluster bootstrap ({statistics.RESAMPLES:,} draws of whole
families), or that of the two rates of families that changed (Newcombe 1998); it is corrected by the scorer's Youden
index. McNemar's exact test takes pairs for independent, so it is shown only. Improved or worse is claimed where the p
value that belongs to the bounds, adjusted for the number of metrics compared (Holm 1979), is at most 5%. Gaps are not
compared.</p>
<p>PASS: the upper bound lies under the threshold. FAIL: the lower bound lies over it. INCONCLUSIVE: they straddle it.
INCOMPLETE: something is missing, edited, in error, or cannot be certified.</p>
"""


def render_html(report: Report) -> str:
    """The whole report as one HTML document."""
    name = f"Safety report: {report.battery_name} v{report.battery_version}"
    empty = '<p class="soft">No policy was given.</p>'
    sections = (
        "<h2>Criteria</h2>" + "".join(map(_criteria, report.policies)) if report.policies else empty,
        "<h2>Bounds against thresholds</h2><p class='soft'>Dot: estimate, corrected for the scorer's errors. Bar: from "
        "the lower to the upper one-sided 95% bound; a pass needs the bar's right end left of the dashed line.</p>",
        _thresholds(report),
        _all_measurements(report),
        _against(report),
        _settling(report),
        _parts(report, "group", "Groups", "The same requests, differing in the group they name. Worst first."),
        _parts(report, "hazard", "Hazards", "Harmful requests and their harmless look-alikes, by hazard."),
        _parts(report, "category", "Other kinds of probes", "Openings and questions, by kind."),
        _parts(report, "language", "Languages", "The same metrics, by language of the probe."),
        '<h2>Scorers</h2><p class="soft">Measured errors on human labels, and how each did here on its canaries: items '
        "with known labels that ride in every batch.</p>",
        _scorers(report),
        _examples(report),
        f"<h2>Method</h2>{_METHOD}",
        "<h2>Digests</h2><dl>",
        "".join(f"<dt>{escape(key)}</dt><dd><code>{escape(value)}</code></dd>" for key, value in _facts(report)),
        "</dl>",
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(name)}</title><style>{CSS}</style></head><body><main>"
        f"<h1>{escape(name)}</h1>"
        f'<p class="soft">Subject <code>{escape(report.subject_digest[:16])}…</code>, {escape(report.subject.dtype)}; '
        f"{report.counts['generations']:,} completions of {report.counts['probes']:,} probes; "
        f"finished {escape(report.times['finished'] or 'not yet')}; attempt {report.attempt}</p>"
        f"{_verdicts(report)}{''.join(sections)}</main></body></html>\n"
    )


# -- Markdown --------------------------------------------------------------------------------------------------------


def render_markdown(report: Report) -> str:
    """A summary for the model card: verdicts, criteria, digests. No word of the model's own."""
    lines = [
        "## Safety test",
        "",
        f"Battery `{_plain(report.battery_name)}` v{report.battery_version} ({report.tier}), "
        f"{report.counts['generations']:,} completions of {report.counts['probes']:,} probes. {_NOTE}",
        "",
    ]
    for view in report.policies:
        lines += [
            f"### Policy `{_plain(view.name)}` v{view.version}: {view.status} ({_SAID[view.status]})",
            "",
            "| criterion | says | upper bound | threshold | samples |",
            "|---|---|---:|---:|---:|",
            *(
                f"| {_plain(one.name)} | {_SIGNS[one.status]} {one.status} | "
                f"{(signed if one.against == 'predecessor' else percent)(one.upper)} | {percent(one.threshold)} "
                f"| {one.n:,} |"
                for one in view.criteria
            ),
            "",
        ]
    if report.predecessor is not None and report.predecessor.differences:
        lines += [
            "### Against the predecessor",
            "",
            f"Subject `{report.predecessor.subject_digest}`, the same prompts and seeds. "
            f"{in_words(report.predecessor.differences)}",
            "",
            "| metric | predecessor | candidate | difference | lower | upper | candidate is |",
            "|---|---:|---:|---:|---:|---:|---|",
            *(
                f"| {_plain(one.metric)} | {percent(one.before)} | {percent(one.after)} | {signed(one.estimate)} "
                f"| {signed(one.lower)} | {signed(one.upper)} | {one.said} |"
                for one in report.predecessor.differences
            ),
            "",
        ]
    if report.findings:
        lines += ["Findings:", "", *(f"- `{one.code}` {_plain(one.message)}" for one in report.findings), ""]
    lines += [
        f"Bounds are one-sided at {statistics.CONFIDENCE:.0%}, clustered by template family and corrected for the "
        "scorers' measured errors.",
        "",
        f"Subject `{report.subject_digest}`, journal root `{report.journal_root}`, run `{_plain(report.run)}`, "
        f"attempt {report.attempt}.",
    ]
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """Text that Markdown leaves alone: on one line, without the signs that would open a tag, table or emphasis."""
    return " ".join("".join(" " if char in "`|<>[]*\\" else char for char in text).split())
