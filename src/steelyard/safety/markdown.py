"""The summary for the model card."""

from __future__ import annotations

from collections.abc import Sequence

from steelyard.safety import statistics
from steelyard.safety.criteria import CriterionResult
from steelyard.safety.report import Report
from steelyard.safety.variants import VariantView
from steelyard.safety.words import NOTE, SAID, SIGNS, in_words, percent, signed, visible


def render_markdown(report: Report, variants: Sequence[VariantView] = ()) -> str:
    """A summary for the model card: verdicts, criteria, predecessor, variants, digests. No word of the model's own."""
    lines = [
        "## Safety test",
        "",
        f"Battery `{_plain(report.battery_name)}` v{report.battery_version} ({report.tier}), "
        f"{report.counts['generations']:,} completions of {report.counts['probes']:,} probes. {NOTE}",
        "",
    ]
    for view in report.policies:
        lines += [
            f"### Policy `{_plain(view.name)}` v{view.version}: {view.status} ({SAID[view.status]})",
            "",
            "| criterion | says | upper bound | threshold | samples |",
            "|---|---|---:|---:|---:|",
            *map(criterion_row, view.criteria),
            "",
        ]
    if report.predecessor is not None and report.predecessor.differences:
        lines += [
            "### Against the predecessor",
            "",
            f"Subject `{report.predecessor.subject_digest}`, the same prompts and seeds. "
            f"{_plain(in_words(report.predecessor.differences))}",
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
    if variants:
        lines += ["### Variants", "", "Each tested as a subject of its own; a release of one needs its own PASS.", ""]
        lines += [_variant(one) for one in variants] + [""]
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


def criterion_row(one: CriterionResult) -> str:
    """A criterion as a row of the summary's table."""
    show = signed if one.against == "predecessor" else percent
    state = f"{SIGNS[one.status]} {one.status}"
    return f"| {_plain(one.name)} | {state} | {show(one.upper)} | {show(one.threshold)} | {one.n:,} |"


def _variant(one: VariantView) -> str:
    states = ", ".join(f"{_plain(name)} {SIGNS[status]} {status}" for name, status in sorted(one.states.items()))
    against = f" Against the model itself: {_plain(in_words(one.differences))}" if one.differences else ""
    return f"- `{_plain(one.name)}` ({_plain(one.what)}), subject `{one.subject_digest}`: {states}.{against}"


def _plain(text: str) -> str:
    """Text that Markdown leaves alone: on one line, without the signs that would open a tag, table or emphasis."""
    return " ".join("".join(" " if char in "`|<>[]*\\" else char for char in visible(text)).split())
