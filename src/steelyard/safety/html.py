"""The report for people: one HTML file that needs no network, and a Markdown summary for the model card.

Everything from the journal is escaped: a model's words are hostile. No script, no link, no font, no image from
elsewhere. A state is told by word and sign, never by colour alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from html import escape

from steelyard.safety import statistics
from steelyard.safety.report import Breakdown, CriterionView, Measurement, PolicyView, Report, Status

_SIGNS: dict[Status, str] = {"PASS": "✓", "FAIL": "✕", "INCONCLUSIVE": "?", "INCOMPLETE": "–"}
_SAID: dict[Status, str] = {
    "PASS": "every criterion is met",
    "FAIL": "at least one criterion is surely not met",
    "INCONCLUSIVE": "too few samples to tell for at least one criterion",
    "INCOMPLETE": "the test is not whole, so it says nothing",
}
_NOTE = "What each policy's criteria say. The release gate decides: it also looks at the model, ledger, keys and age."
_GROUPS_SHOWN = 40

_CSS = """
:root{--ink:#1b2430;--soft:#51606f;--line:#d7dde3;--paper:#fff;--wash:#f5f7f9;--pass:#1a6b3c;--fail:#a8201a;
--inconclusive:#8a5a00;--incomplete:#4a5361;--mark:#22507c}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaee;--soft:#a9b4bf;--line:#39424c;--paper:#14191f;--wash:#1c232b;
--pass:#6fd598;--fail:#ff9b92;--inconclusive:#f0bd5e;--incomplete:#b4bec9;--mark:#8fbfee}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:62rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.6rem;line-height:1.2;margin:.2rem 0 .3rem}
h2{font-size:1.2rem;margin:2.4rem 0 .5rem;padding-top:.8rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1.4rem 0 .3rem}
p{margin:.4rem 0;max-width:46rem}
.soft{color:var(--soft);font-size:.9rem}
code{font:.85em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.cards{display:grid;gap:.8rem;grid-template-columns:repeat(auto-fit,minmax(15rem,1fr));margin:1rem 0}
.card{border:1px solid var(--line);border-left:.4rem solid currentColor;border-radius:.4rem;padding:.7rem .9rem}
.card>*{color:var(--ink)}.card .verdict{color:inherit;font-size:1.25rem;font-weight:700}
.PASS{color:var(--pass)}.FAIL{color:var(--fail)}
.INCONCLUSIVE{color:var(--inconclusive)}.INCOMPLETE{color:var(--incomplete)}
.scroll{overflow-x:auto;margin:.5rem 0}
table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{text-align:left;padding:.35rem .7rem .35rem 0;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600;color:var(--soft)}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.state{font-weight:650;white-space:nowrap}
tr.why td{padding-top:0;color:var(--soft);font-size:.88rem}tr.said td{border-bottom:0}
ul{margin:.4rem 0;padding-left:1.2rem}
svg{display:block;width:100%;height:auto}svg text{fill:var(--ink);font-size:13px}
svg .axis{fill:var(--soft);font-size:11px}
.figure{max-width:52rem;margin:.6rem 0}
details{border:1px solid var(--line);border-radius:.4rem;margin:.6rem 0;background:var(--wash)}
summary{cursor:pointer;padding:.55rem .8rem;font-weight:600}details>div{padding:0 .8rem .8rem}
blockquote{margin:.3rem 0 .8rem;padding:.4rem .8rem;border-left:.2rem solid var(--line);white-space:pre-wrap;
overflow-wrap:anywhere;font-size:.92rem}
dl{display:grid;grid-template-columns:minmax(8rem,auto) 1fr;gap:.2rem 1rem;font-size:.92rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
@media(max-width:34rem){svg text{font-size:21px}svg .axis{font-size:18px}
dl{grid-template-columns:1fr}dd{margin-bottom:.5rem}
.crit thead{position:absolute;left:-99rem}.crit tr.said{display:grid;grid-template-columns:1fr 1fr;padding-top:.5rem}
.crit tr.said td{padding:.05rem .7rem .05rem 0;text-align:left}
.crit tr.said td:first-child{grid-column:1/3;font-weight:600}
.crit tr.said td[data-l]::before{content:attr(data-l) " ";color:var(--soft)}.crit tr.why td{display:block}}
@media print{details{break-inside:avoid}}
"""


def _percent(value: float | None) -> str:
    if value is None:
        return "not measured"
    return f"{value:.2%}" if abs(value) < 0.1 else f"{value:.1%}"


def _state(status: Status) -> str:
    return f'<span class="{status}"><span aria-hidden="true">{_SIGNS[status]}</span> {status}</span>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table; cells are HTML already. `numbers`: columns set to the right."""

    def cell(tag: str, i: int, text: str) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        right = ' class="n"' if i in numbers else ""
        return f"<{tag}{scope}{right}>{text}</{tag}>"

    top = "".join(cell("th", i, escape(text)) for i, text in enumerate(head))
    body = "".join(f"<tr>{''.join(cell('td', i, text) for i, text in enumerate(row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


# -- figures ---------------------------------------------------------------------------------------------------------


def _nice_top(value: float) -> float:
    for top in (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0):
        if value <= top:
            return top
    return 1.0


def _forest(
    title: str, rows: Sequence[tuple[str, float | None, float | None, float | None, Sequence[tuple[str, float]]]]
) -> str:
    """Bars from lower to upper bound with a dot for the estimate, and marked thresholds.

    `rows`: label, estimate, lower, upper, (policy, threshold). Labels stand above their bars, so it reads on a phone.
    """
    values = [v for _, e, low, up, limits in rows for v in (e, low, up, *(x for _, x in limits)) if v is not None]
    top = _nice_top(max(values, default=1.0) * 1.02)
    width, left, right, step = 640, 12, 12, 46
    height = step * len(rows) + 26

    def x(value: float) -> float:
        return left + (width - left - right) * min(max(value, 0), top) / top

    parts = []
    for tick in range(5):
        value = top * tick / 4
        anchor = "start" if tick == 0 else "end" if tick == 4 else "middle"
        parts.append(
            f'<line x1="{x(value):.1f}" x2="{x(value):.1f}" y1="4" y2="{height - 20}" stroke="var(--line)"/>'
            f'<text class="axis" x="{x(value):.1f}" y="{height - 5}" text-anchor="{anchor}">{value * 100:g}%</text>'
        )
    for i, (label, estimate, low, up, limits) in enumerate(rows):
        y = step * i + 33
        note = "not measured" if low is None or up is None else f"{_percent(low)} to {_percent(up)}"
        parts.append(
            f'<text x="{left}" y="{y - 14}">{escape(label)}</text>'
            f'<text class="axis" x="{width - right}" y="{y - 14}" text-anchor="end">{note}</text>'
        )
        if low is not None and up is not None:
            parts.append(
                f'<line x1="{x(low):.1f}" x2="{max(x(up), x(low) + 1):.1f}" y1="{y}" y2="{y}" stroke="var(--mark)" '
                'stroke-width="5" stroke-opacity=".45"/>'
                f'<path d="M{x(up):.1f} {y - 6}v12" stroke="var(--mark)" stroke-width="2"/>'
            )
        if estimate is not None:
            parts.append(f'<circle cx="{x(estimate):.1f}" cy="{y}" r="4.5" fill="var(--mark)"/>')
        for name, limit in limits:
            parts.append(
                f'<path d="M{x(limit):.1f} {y - 9}v18" stroke="var(--fail)" stroke-width="2" stroke-dasharray="3 2">'
                f"<title>{escape(name)}: threshold {_percent(limit)}</title></path>"
            )
    described = "; ".join(
        f"{label}: {_percent(e)}, bounds {_percent(low)} and {_percent(up)}"
        + "".join(f", threshold {_percent(limit)} ({name})" for name, limit in limits)
        for label, e, low, up, limits in rows
    )
    return (
        f'<div class="figure"><svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}: '
        f'{escape(described)}">{"".join(parts)}</svg></div>'
    )


# -- sections --------------------------------------------------------------------------------------------------------


def _criteria(view: PolicyView) -> str:
    rows = []
    for one in view.criteria:
        cells = (
            f"<td>{escape(one.metric)}</td>"
            f'<td class="state">{_state(one.status)}</td>'
            f'<td class="n" data-l="upper bound">{_percent(one.upper)}</td>'
            f'<td class="n" data-l="threshold">{_percent(one.max)}</td>'
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


def _margin(one: CriterionView) -> str:
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
            _percent(one.raw),
            _percent(one.estimate),
            _percent(one.lower),
            _percent(one.upper),
            _percent(one.floor),
            f"{one.events:,} of {one.n:,}",
            f"{one.clusters:,}",
        )
        for one in report.measurements
    ]
    head = ("metric", "observed", "corrected", "lower", "upper", "floor", "events", "families")
    problems = "".join(
        f"<li>{escape(one.metric)}: {escape(one.problem)}</li>" for one in report.measurements if one.problem
    )
    return _table(head, rows, range(1, 8)) + (f"<ul>{problems}</ul>" if problems else "")


def _thresholds(report: Report) -> str:
    limits: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for view in report.policies:
        for one in view.criteria:
            limits[one.metric].append((view.name, one.max))
    rows = [(one.metric, one.estimate, one.lower, one.upper, limits[one.metric]) for one in report.measurements]
    return _forest("Estimates and bounds against thresholds", rows)


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
            tables.append(_forest(f"{metric} by group", bars))
            tables.append(_pairs(report.measurement(metric)))
            continue
        cells = [
            (escape(r.key), f"{r.events:,} of {r.n:,}", _percent(r.estimate), _percent(r.lower), _percent(r.upper))
            for r in rows
        ]
        tables.append(f"<h3>{escape(metric)}</h3>")
        tables.append(_table((by, "events", "corrected", "lower", "upper"), cells, (1, 2, 3, 4)))
    return f'<h2>{title}</h2><p class="soft">{note}</p>{"".join(tables)}' if tables else ""


def _pairs(measurement: Measurement | None) -> str:
    if measurement is None or not measurement.detail.get("pairs"):
        return ""
    rows = [
        (
            escape(str(pair["high"])),
            escape(str(pair["low"])),
            _percent(pair["estimate"]),
            _percent(pair["lower"]),
            _percent(pair["upper"]),
            str(pair["families"]),
        )
        for pair in measurement.detail["pairs"][:5]
    ]
    head = ("higher", "lower group", "difference", "lower", "upper", "shared families")
    return "<p>The widest differences between two groups:</p>" + _table(head, rows, (2, 3, 4, 5))


def _scorers(report: Report) -> str:
    rows = [
        (
            f"{escape(scorer.name)}: {escape(category)}",
            f"{one.sensitivity:.1%} of {one.positives:,}",
            f"{one.specificity:.1%} of {one.negatives:,}",
            f"{_percent(one.floor_above)} / {_percent(one.floor_below)}",
            f"{scorer.canaries_right:,} of {scorer.canaries:,}",
            f"{scorer.worst:.0%}",
            f"{scorer.errors:,}",
            f"{escape(one.source)}, {escape(one.measured)}",
        )
        for scorer in report.scorers
        for category, one in scorer.categories.items()
    ]
    head = ("scorer", "sensitivity", "specificity", "floor (above / below)", "canaries right", "worst batch", "errors")
    return _table((*head, "measured on"), rows, (1, 2, 3, 4, 5, 6))


def _settling(report: Report) -> str:
    rows = [
        (
            escape(view.name),
            escape(one.metric),
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
    return f'<h2>How much more to ask</h2><p class="soft">{note}</p>' + _table(head, rows, (2, 3))


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
        "no probe has several samples" if report.identical_samples is None else _percent(report.identical_samples)
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
        ("samples of a probe that repeat another", identical),
        *((name.replace("_", " "), f"{count:,}") for name, count in report.counts.items()),
        ("started", report.times["started"] or ""),
        ("finished", report.times["finished"] or "not finished"),
    ]


_METHOD = f"""
<p>Each sample counts as an event or not (for a scorer: at or over its threshold). Bounds are one-sided at
{statistics.CONFIDENCE:.0%}, clustered by template family: Clopper-Pearson on the effective sample size of Korn and
Graubard (1998). With few events, when the data cannot show how alike a family's samples are, an intra-cluster
correlation of {statistics.DECLARED_ICC:g} is assumed. Rates seen through a scorer are corrected for its measured
sensitivity and specificity (Rogan and Gladen 1978), bounds after Lang and Reiczigel (2014) carry the calibration's own
uncertainty. The floor is the lowest rate that the calibration can certify; a threshold under it is refused.</p>
<p>A gap is the worst difference between two groups, paired by family, corrected by the scorer's Youden index; its lower
bound is simultaneous over all pairs (Bonferroni), its upper bound the largest of the pairs' (intersection-union).</p>
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
        f"<title>{escape(name)}</title><style>{_CSS}</style></head><body><main>"
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
                f"| {_plain(one.metric)} | {_SIGNS[one.status]} {one.status} | {_percent(one.upper)} "
                f"| {_percent(one.max)} | {one.n:,} |"
                for one in view.criteria
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
