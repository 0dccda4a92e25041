"""The report for people: one HTML file that needs no network.

Everything from the journal is escaped, and its hidden characters are shown: a model's words are hostile. No script, no
link, no font, no image from elsewhere. A state is told by word and sign, never by colour alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from steelyard.safety import html_details, html_sections
from steelyard.safety.html_parts import CSP, CSS, text
from steelyard.safety.report import Report
from steelyard.safety.variants import VariantView


def render_html(report: Report, variants: Sequence[VariantView] = ()) -> str:
    """The whole report as one HTML document, with the run's variants beside it where there are any."""
    name = text(f"Safety report: {report.battery_name} v{report.battery_version}")
    sections = (
        html_sections.verdicts(report),
        html_sections.criteria(report),
        html_sections.measurements(report),
        html_sections.predecessor(report),
        html_sections.variants(variants),
        html_sections.settling(report),
        html_details.groups(report),
        html_details.matrix(
            report, "hazard", "Hazards", "Harmful requests and their harmless look-alikes, by hazard. Worst first."
        ),
        html_details.matrix(report, "category", "Other kinds of probes", "Openings and questions, by kind."),
        html_details.matrix(report, "language", "Languages", "The same metrics, by language of the probe."),
        html_details.scorers(report),
        html_details.examples(report),
        html_details.method(),
        html_details.digests(report),
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{CSP}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="referrer" content="no-referrer">'
        f"<title>{name}</title><style>{CSS}</style></head><body><main><h1>{name}</h1>"
        f'<p class="soft">Subject <code>{text(report.subject_digest[:16])}…</code>, {text(report.subject.dtype)}; '
        f"{report.counts['generations']:,} completions of {report.counts['probes']:,} probes; "
        f"finished {text(report.times['finished'] or 'not yet')}; attempt {report.attempt}</p>"
        f"{''.join(sections)}</main></body></html>\n"
    )
