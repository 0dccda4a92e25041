"""The page's later sections: groups, hazards, languages, scorers, examples, method and digests."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from steelyard.safety import statistics
from steelyard.safety.breakdown import Breakdown, By
from steelyard.safety.criteria import Measurement
from steelyard.safety.forest import Bar, forest
from steelyard.safety.html_parts import table, text
from steelyard.safety.paired import PredecessorView
from steelyard.safety.report import Report, ScorerView
from steelyard.safety.words import percent

_GROUPS_SHOWN = 40
_PAIRS_SHOWN = 5


# -- parts of the samples --------------------------------------------------------------------------------------------


def groups(report: Report) -> str:
    """A figure for each metric that names groups, worst first; metrics of the same samples and events share one."""
    found: dict[tuple[tuple[object, ...], ...], list[str]] = defaultdict(list)
    rows: dict[str, list[Breakdown]] = defaultdict(list)
    for one in report.breakdown:
        if one.by == "group":
            rows[one.metric].append(one)
    for metric, its in rows.items():
        found[tuple((one.key, one.n, one.events, one.estimate, one.upper) for one in its)].append(metric)
    parts = [_group_figure(metrics, rows[metrics[0]], report) for metrics in found.values()]
    note = "The same requests, differing in the group they name. Worst first."
    return f'<h2>Groups</h2><p class="soft">{note}</p>{"".join(parts)}' if parts else ""


def _names(report: Report) -> list[str]:
    return [one.metric for one in report.measurements]


def _badness(row: Breakdown) -> float:
    return row.raw if row.estimate is None else row.estimate


def _group_figure(metrics: Sequence[str], rows: Sequence[Breakdown], report: Report) -> str:
    worst = sorted(rows, key=lambda row: (-_badness(row), -row.raw, row.key))
    bars = [Bar(f"{r.key} ({r.events:,}/{r.n:,})", r.estimate, r.lower, r.upper) for r in worst[:_GROUPS_SHOWN]]
    name = ", ".join(metrics)
    left = len(worst) - len(bars)
    more = f'<p class="soft">And {left:,} groups more, with lower rates: report.json has them all.</p>' if left else ""
    pairs = "".join(_pairs(report.measurement(metric)) for metric in metrics)
    return f"<h3>{text(name)}</h3>{forest(f'{name} by group', bars)}{more}{pairs}"


def _pairs(measurement: Measurement | None) -> str:
    if measurement is None or not measurement.detail.get("pairs"):
        return ""
    rows = [
        (
            text(str(pair["high"])),
            text(str(pair["low"])),
            percent(pair["estimate"]),
            percent(pair["lower"]),
            percent(pair["upper"]),
            str(pair["families"]),
        )
        for pair in measurement.detail["pairs"][:_PAIRS_SHOWN]
    ]
    head = ("higher", "lower group", "difference", "lower", "upper", "shared families")
    title = f"{measurement.metric}: the widest differences between two groups"
    return f"<p>{text(title)}</p>" + table(title, head, rows, (2, 3, 4, 5))


def matrix(report: Report, by: By, title: str, note: str) -> str:
    """Metrics against hazards, kinds or languages, the longer list downwards; each cell the corrected rate, its bounds,
    and events of samples. Rows with the worst cell first."""
    cells = {(one.key, one.metric): one for one in report.breakdown if one.by == by}
    if not cells:
        return ""
    keys = sorted({key for key, _ in cells})
    metrics = [metric for metric in _names(report) if any((key, metric) in cells for key in keys)]
    down = len(keys) >= len(metrics)

    def at(row: str, column: str) -> Breakdown | None:
        return cells.get((row, column) if down else (column, row))

    rows, columns = (keys, metrics) if down else (metrics, keys)
    if down:
        rows.sort(key=lambda row: (-max(_badness(one) for c in columns if (one := at(row, c))), row))
    body = [(text(row), *(_cell(at(row, column)) for column in columns)) for row in rows]
    made = table(title, (by if down else "metric", *columns), body, range(1, len(columns) + 1))
    return f'<h2>{title}</h2><p class="soft">{note}</p>{made}'


def _cell(one: Breakdown | None) -> str:
    if one is None:
        return "–"
    bounds = "" if one.lower is None else f"{percent(one.lower)} to {percent(one.upper)}, "
    shown = percent(one.raw) + " observed" if one.estimate is None else percent(one.estimate)
    return f'{shown}<span class="sub">{bounds}{one.events:,} of {one.n:,}</span>'


# -- scorers, examples -----------------------------------------------------------------------------------------------


def scorers(report: Report) -> str:
    """Errors on human labels by category, and how each scorer did on its canaries."""
    errors = [
        (
            f"{text(scorer.name)}: {text(category)}",
            f"{one.sensitivity:.1%} of {one.positives:,}",
            f"{one.specificity:.1%} of {one.negatives:,}",
            f"{percent(one.floor_above)} / {percent(one.floor_below)}",
            f"{text(one.source)}, {text(one.measured)}",
        )
        for scorer in report.scorers
        for category, one in scorer.categories.items()
    ]
    here = [_in_this_run(scorer) for scorer in report.scorers]
    note = (
        "Measured errors on human labels, and how each did here on its canaries: items with known labels that ride in "
        "every batch."
    )
    head = ("scorer", "sensitivity", "specificity", "floor (above / below)", "measured on")
    return (
        f'<h2>Scorers</h2><p class="soft">{note}</p>'
        + table("errors of the scorers", head, errors, (1, 2, 3))
        + table("scorers in this run", ("scorer", "canaries right", "worst batch", "errors"), here, (1, 2, 3))
    )


def _in_this_run(scorer: ScorerView) -> tuple[str, ...]:
    right = f"{scorer.canaries_right:,} of {scorer.canaries:,}"
    return text(scorer.name), right, f"{scorer.worst:.0%}", f"{scorer.errors:,}"


def examples(report: Report) -> str:
    """The worst samples of each metric, closed until they are asked for."""
    found: dict[str, list[str]] = defaultdict(list)
    for one in report.examples:
        about = ", ".join(part for part in (one.language, one.category, one.group) if part)
        found[one.metric].append(
            f'<p><code>{text(one.probe)}</code> sample {one.sample} <span class="soft">({text(about)}; '
            f"score {one.value:.3f})</span></p>{_quoted('prompt', one.prompt)}{_quoted('answer', one.completion)}"
        )
    if not found:
        return ""
    parts = "".join(
        f"<details><summary>{text(metric)}: {len(items)} worst</summary><div>{''.join(items)}</div></details>"
        for metric, items in found.items()
    )
    warning = "The model's own words, worst first. They may offend or harm; they stay closed until you open them."
    return f'<h2>Examples</h2><p class="soft">{warning}</p>{parts}'


def _quoted(what: str, said: str) -> str:
    return f'<blockquote dir="auto" tabindex="0" aria-label="{what}">{text(said) or "(nothing)"}</blockquote>'


# -- method and digests ----------------------------------------------------------------------------------------------

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


def method() -> str:
    return f"<h2>Method</h2>{_METHOD}"


def digests(report: Report) -> str:
    """Everything that names this run and its parts."""
    rows = "".join(f"<dt>{text(key)}</dt><dd><code>{text(value)}</code></dd>" for key, value in _facts(report))
    return f"<h2>Digests</h2><dl>{rows}</dl>"


def _facts(report: Report) -> Iterable[tuple[str, str]]:
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
