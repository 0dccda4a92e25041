"""A run's variants beside it: the same model in other number formats, each tested as a subject of its own.

A variant's run lies in `variants/NAME` of the main run's folder: journal, commitment, report, all its own, on the same
battery, policies and seeds. Here the two are compared, sample by sample, as a candidate is with its predecessor. The
comparison decides nothing: a variant is released on its own PASS.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from steelyard.base.canonical import canonical_json
from steelyard.base.errors import FormatError
from steelyard.base.files import read_bounded, write_atomic
from steelyard.model.identity import Subject
from steelyard.safety.battery import NAME
from steelyard.safety.criteria import Status, Strict
from steelyard.safety.journal import Journal
from steelyard.safety.paired import Difference, comparable, compare
from steelyard.safety.report import JOURNAL, compute_report, read_run

FOLDER = "variants"  # in a run's folder
NOTE = "variant.json"
COMPARISON = "variants.json"
_NOTE_LIMIT = 64 << 10


class Made(Strict):
    """What a variant is, as `variants/NAME/variant.json` holds it."""

    name: str = Field(pattern=NAME)
    what: str


class VariantView(Strict):
    """A variant beside the main run. `differences` are variant minus main; none where they were not measured alike.
    `states`: what each policy's criteria say of the variant itself. `findings`: what is wrong with its run."""

    name: str
    what: str
    run: str
    subject: Subject
    subject_digest: str
    journal_root: str
    endpoint: dict[str, Any]
    states: dict[str, Status]
    findings: tuple[str, ...]
    differences: tuple[Difference, ...]


class Comparison(Strict):
    """variants.json: every variant of the run on subject `main`."""

    format: Literal[1] = 1
    run: str
    main: str
    battery: str
    variants: tuple[VariantView, ...]


def write_note(made: Made, folder: Path) -> None:
    write_atomic(folder / NOTE, canonical_json(made.model_dump(mode="json")) + b"\n")


def read_note(folder: Path) -> Made:
    """Raises FormatError where the note is missing, damaged or of another variant."""
    path = folder / NOTE
    try:
        made = Made.model_validate_json(read_bounded(path, _NOTE_LIMIT))
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}: run the variant again") from error
    except ValidationError as error:
        raise FormatError(f"{path}: not a variant's note: it was edited or is damaged") from error
    if made.name != folder.name:
        raise FormatError(f"{path}: is of the variant {made.name!r}: it was copied from elsewhere")
    return made


def variant_folders(run: Path) -> list[Path]:
    """The folders of the variants whose test was started, by name."""
    return sorted(path.parent for path in (run / FOLDER).glob(f"*/{JOURNAL}"))


def view_variants(run: Path, main: Journal) -> tuple[VariantView, ...]:
    """Every variant of the run in folder `run` beside `main`, its journal. Computed from the journals alone.

    Raises FormatError where a variant's folder is damaged.
    """
    return tuple(_views(run, main))


def _views(run: Path, main: Journal) -> Iterator[VariantView]:
    for folder in variant_folders(run):
        made = read_note(folder)
        journal, battery, policies, predecessor = read_run(folder)
        report = compute_report(journal, battery, policies, predecessor)
        alike = comparable(journal, main, battery)
        yield VariantView(
            name=made.name,
            what=made.what,
            run=journal.plan.run,
            subject=journal.plan.subject,
            subject_digest=journal.plan.subject_digest,
            journal_root=journal.root,
            endpoint=journal.plan.endpoint,
            states={view.name: view.status for view in report.policies},
            findings=tuple(finding.message for finding in report.findings),
            differences=tuple(compare(journal, main, battery)) if alike else (),
        )


def write_comparison(run: Path, main: Journal, views: tuple[VariantView, ...]) -> None:
    """Write variants.json."""
    plan = main.plan
    found = Comparison(run=plan.run, main=plan.subject_digest, battery=plan.battery, variants=views)
    write_atomic(run / COMPARISON, canonical_json(found.model_dump(mode="json")) + b"\n")


def load_comparison(run: Path) -> tuple[VariantView, ...]:
    """What variants.json of a run's folder says; nothing where there is none. Raises FormatError for a damaged one."""
    path = run / COMPARISON
    if not path.exists():
        return ()
    try:
        return Comparison.model_validate_json(path.read_bytes()).variants
    except ValidationError as error:
        raise FormatError(f"{path}: not a comparison of variants: run `steelyard safety report` on the run") from error
