"""How far a marked copy is from what was tested: perplexity on a text, and a battery's differences, where measured."""

from __future__ import annotations

from pathlib import Path

from steelyard.base.canonical import sha256_file
from steelyard.base.errors import SteelyardError
from steelyard.base.progress import Progress
from steelyard.model.headers import read_json_object
from steelyard.model.identity import subject_of
from steelyard.release.evidence import read_run
from steelyard.release.grant_statements import Battery, Difference, Perplexity
from steelyard.safety.report import compute_report

WINDOW = 1024  # tokens


def measure_perplexity(original: Path, copy: Path, text: Path, progress: Progress) -> Perplexity:
    """Of both models on the same text (needs torch), in windows of up to 1,024 tokens, each half over the last."""
    from steelyard.safety.perplexity import perplexity

    context = read_json_object(copy / "config.json").get("max_position_embeddings")
    window = min(WINDOW, context) if isinstance(context, int) and context > 1 else WINDOW
    before, after = (perplexity(one, text, progress, window=window, stride=window // 2) for one in (original, copy))
    return Perplexity(
        text=sha256_file(text),
        tokens=after.tokens,
        window=window,
        original=before.per_token,
        copy=after.per_token,
    )


def measured_battery(run: Path, copy: Path, subject: str) -> Battery:
    """The differences that a finished run found on the copy beside its original, computed anew from its journals.

    Raises SteelyardError where it is a run on anything else, or is not whole. `subject`: the original's digest.
    """
    evidence = read_run(run)
    its, before = evidence.journal.plan.subject, evidence.predecessor
    if its.digest != subject_of(copy).digest:
        raise SteelyardError(f"{run}: is not a run on this copy: mark it (steelyard grant mark), run, then deliver")
    if before is None or before.plan.subject_digest != subject:
        raise SteelyardError(f"{run}: did not compare it with the release it comes from: run with --predecessor")
    report = compute_report(evidence.journal, evidence.battery, (), before)
    if report.findings or report.predecessor is None:
        reason = report.findings[0].message if report.findings else "it compares nothing"
        raise SteelyardError(f"{run}: {reason}: finish the run first")
    return Battery(
        name=report.battery_name,
        battery=report.battery,
        journal_root=report.journal_root,
        differences=tuple(
            Difference(
                metric=one.metric, n=one.n, original=one.before, copy=one.after, lower=one.lower, upper=one.upper
            )
            for one in report.predecessor.differences
            if one.before is not None and one.after is not None
        ),
    )
