"""`steelyard scorer`: train the embedded scorers, print their cards, calibrate on labels of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from steelyard.cli.options import AsJSON, existing_file
from steelyard.cli.output import print_json, print_table

app = typer.Typer(no_args_is_help=True, help="Train and calibrate scorers, print their cards.", rich_markup_mode=None)

_EVENTS: tuple[Literal["above", "below"], ...] = ("above", "below")
_MEASURES = ("accuracy", "sensitivity", "specificity")
_COUNTS = ("population", "labelled", "positive")
_ENOUGH = 30  # labels of a kind; with fewer it is said plainly what they can't show

Data = Annotated[Path, typer.Option(help="The research data's folder (see CONTRIBUTING.md); nothing is downloaded.")]


@app.command()
def train(
    name: Annotated[str, typer.Argument(help="contextual, lexical, refusal or answer.")],
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for NAME.safetensors and NAME.json.")],
    seed: Annotated[int, typer.Option(min=0, help="The same machine, data and seed give the same bytes.")] = 0,
    as_json: AsJSON = False,
) -> None:
    """Train an embedded scorer from declared data; it learns from no test set."""
    from steelyard.base.errors import UsageError
    from steelyard.base.progress import default_progress
    from steelyard.scorers.registry import EMBEDDED

    if name not in EMBEDDED:
        raise UsageError(f"scorer {name!r} is unknown: give one of {', '.join(EMBEDDED)}")
    progress = default_progress(as_json=as_json)
    if name in ("contextual", "lexical"):
        from steelyard.train.moderation import train_moderation

        card = train_moderation(name, data, out, seed, progress)
    elif name == "answer":
        from steelyard.train.answer import train_answer

        card = train_answer(data, out, seed, progress)
    else:
        from steelyard.train.refusal import train_refusal

        card = train_refusal(data, out, seed, progress)
    if as_json:
        print_json(card)
        return
    rows = []
    for category, c in card["categories"].items():
        sensitivity, specificity = c["true_positives"] / c["positives"], c["true_negatives"] / c["negatives"]
        rows.append((category, f"{c['threshold']:.4f}", f"{sensitivity:.3f}", f"{specificity:.3f}"))
    print_table(f"{name}, on held-out rows", ("category", "threshold", "sensitivity", "specificity"), rows)


@app.command()
def card(
    data: Data,
    references: Annotated[list[str] | None, typer.Argument(help="Default: every embedded scorer.")] = None,
    as_json: AsJSON = False,
) -> None:
    """Measure scorers on the TEST sets found under --data: AUC, accuracy, sensitivity and specificity."""
    from steelyard.safety.statistics import certifiable_floor
    from steelyard.scorers.base import Calibration
    from steelyard.scorers.card import scorer_card
    from steelyard.scorers.registry import EMBEDDED, open_uncalibrated

    names = references or [f"embedded:{name}" for name in EMBEDDED]
    cards = [scorer_card(open_uncalibrated(reference), data) for reference in names]
    for category in (category for found in cards for category in found["categories"].values()):
        if "calibration" not in category:  # of any category
            continue
        calibration = Calibration.model_validate(category["calibration"])
        category["certifiable_floor"] = {event: certifiable_floor(calibration, event) for event in _EVENTS}
    if as_json:
        print_json(cards)
        return
    for found in cards:
        print(f"{found['name']}: a policy pins it as {found['pin']}")
        for name, category in found["categories"].items():
            rows = [
                (
                    test_set,
                    str(s["accuracy"]["n"]),
                    f"{s['auc']:.3f}",
                    *(_interval(s[measure]) for measure in _MEASURES),
                )
                for test_set, s in category["test_sets"].items()
            ]
            title = f"{found['name']}: {name}, {found['texts_per_second']:.0f} texts/s"
            print_table(title, ("test set", "n", "AUC", *_MEASURES), rows)
            if "certifiable_floor" in category:
                _print_floor(category)
            for test_set, s in category["test_sets"].items():
                _print_facets(f"{name} on {test_set}", s.get("facets", {}))
            if len(category["languages"]) > 1:
                _print_facets(f"{name} on all sets", {"language": category["languages"]})
            if category["absent"]:
                print(f"absent from {data}: {', '.join(category['absent'])}")
        if "training" in found:
            training = found["training"]
            sources = [
                (source, licence, ", ".join(f"{kind} {n:,}" for kind, n in training["rows"].get(source, {}).items()))
                for source, licence in training["sources"].items()
            ]
            print_table(f"{found['name']}: learned from", ("source", "where from, licence", "rows"), sources)
            if "own_sentences_dropped" in training:
                dropped = training["own_sentences_dropped"]
                print(f"sentences of our own dropped, since they resemble a TEST case: {dropped:,}")


def _print_floor(category: dict[str, Any]) -> None:
    floors = ", ".join(f"{floor:.4f} {event}" for event, floor in category["certifiable_floor"].items())
    print(f"lowest rate it can certify, of events above and below its threshold: {floors}")


def _print_facets(title: str, facets: dict[str, Any]) -> None:
    for facet, kinds in facets.items():
        table = [(kind, *(_counted(shares, measure) for measure in _MEASURES)) for kind, shares in kinds.items()]
        print_table(f"{title}, by {facet}", (facet, *_MEASURES), table)


def _counted(shares: dict[str, dict[str, float]], measure: str) -> str:
    return f"{_interval(shares[measure])} of {shares[measure]['n']}" if measure in shares else "-"


def _interval(share: dict[str, float]) -> str:
    return f"{share['value']:.3f} ({share['low']:.3f}-{share['high']:.3f})"


@app.command()
def calibrate(
    labels: Annotated[Path, typer.Option(help="CSV or JSONL of your own, or the filled sheet of `safety sample`.")],
    out: Annotated[Path, typer.Option(help="The calibration's file; a battery names it calibrated:FILE.")],
    scorer: Annotated[
        str | None, typer.Option(help="The scorer's reference, as in a battery. Default: the sample's.")
    ] = None,
    sample: Annotated[Path | None, typer.Option(help="The sample.json of the drawn sheet.")] = None,
    category: Annotated[str | None, typer.Option(help="Which category a column `label` is for.")] = None,
    threshold: Annotated[
        str,
        typer.Option(
            help="keep, youden or specificity:X; a new one is chosen on half of the labels, measured on half."
        ),
    ] = "keep",
    seed: Annotated[int, typer.Option(min=0, help="Of the halves.")] = 0,
    as_json: AsJSON = False,
) -> None:
    """Measure a scorer's errors on labels of your own; the page `safety sample` makes helps to label."""
    from steelyard.base.canonical import sha256_file
    from steelyard.base.errors import UsageError
    from steelyard.safety.calibrate import calibrate_own, calibrate_sample, rule_of
    from steelyard.safety.commit import now
    from steelyard.safety.draw import SKIP, read_labels, read_sample
    from steelyard.safety.own_labels import read_own
    from steelyard.safety.statistics import certifiable_floor
    from steelyard.scorers.base import Calibration
    from steelyard.scorers.calibrated import CalibratedScorer, CalibrationFile, write_calibration
    from steelyard.scorers.card import wilson
    from steelyard.scorers.registry import open_uncalibrated

    rule, date = rule_of(threshold), now()[:10]
    existing_file(labels)
    if out.exists():
        raise UsageError(f"--out {out} exists: a policy may pin it; write to another file")
    drawn = None if sample is None else read_sample(sample)
    reference = scorer or (drawn.scorer if drawn is not None else None)
    if reference is None:
        raise UsageError("give --scorer, or the --sample that the labels are of")
    opened = open_uncalibrated(reference)
    identity, before = opened.identity(), dict[str, Calibration]()
    if isinstance(opened, CalibratedScorer):  # what it says of other categories stays, and so does its threshold
        reference, identity, before = opened.reference, opened.underlying.identity(), opened.measured
    source = f"labels SHA-256 {sha256_file(labels)}"
    if rule.kind != "keep":
        source += f"; threshold by {threshold} on one half (seed {seed}), errors on the other"
    if drawn is None:
        if category is not None and category not in identity.categories:
            raise UsageError(f"--category {category}: {reference} covers {', '.join(identity.categories)}")
        rows = read_own(labels, tuple(identity.categories), category)
        found = calibrate_own(opened, rows, rule=rule, seed=seed, source=source, date=date)
    else:
        if category not in (None, drawn.category):
            raise UsageError(f"--category {category}: the sample is of {drawn.category}")
        if identity.weights != drawn.identity.weights:
            raise UsageError(f"--scorer {reference}: its weights are not those that gave the sample's scores")
        given = read_labels(labels, drawn)
        skipped = sum(label == SKIP for label in given.values())
        source += (
            f"; {len(given) - skipped} of {len(drawn.drawn)} drawn by score from run {drawn.run}, {skipped} skipped"
        )
        one = calibrate_sample(opened, drawn, given, rule=rule, seed=seed, source=source, date=date)
        found = {drawn.category: one}
    calibrations = before | {name: one.calibration for name, one in found.items()}
    write_calibration(out, CalibrationFile(scorer=reference, identity=identity, categories=calibrations))
    made = f"calibrated:{out}"
    shown: dict[str, Any] = {"scorer": made, "pin": open_uncalibrated(made).identity().pin}
    shown["categories"] = {
        name: one.figures
        | {
            "calibration": (c := one.calibration).model_dump(mode="json"),
            "sensitivity": wilson(c.true_positives, c.positives),
            "specificity": wilson(c.true_negatives, c.negatives),
            "certifiable_floor": {event: certifiable_floor(c, event) for event in _EVENTS},
        }
        for name, one in found.items()
    }
    if as_json:
        print_json(shown)
        return
    for name, measured in shown["categories"].items():
        _show_calibration(name, measured)
    print(f"{shown['scorer']}: a policy pins it as {shown['pin']}")


def _show_calibration(name: str, measured: dict[str, Any]) -> None:
    found = measured["calibration"]
    rows = [
        (
            kind,
            f"{found[right]} of {found[total]}",
            f"{found[right] / found[total]:.3f}",
            "{:.3f}-{:.3f}".format(*between),
        )
        for kind, right, total, between in (
            ("sensitivity", "true_positives", "positives", measured["sensitivity"]),
            ("specificity", "true_negatives", "negatives", measured["specificity"]),
        )
    ]
    print_table(f"{name} at the threshold {found['threshold']:.4f}", ("", "right", "share", "95% interval"), rows)
    if "auc" in measured:
        print(f"AUC {measured['auc']:.3f}, accuracy {_interval(measured['accuracy'])} of {measured['accuracy']['n']}")
        _print_facets(name, measured.get("facets", {}))
    else:
        print(f"estimated share of positive completions in the run: {measured['positive_share']:.4f}")
        table = [(band, *(str(counts[key]) for key in _COUNTS)) for band, counts in measured["bands"].items()]
        print_table("completions by their score's place to the threshold", ("band", *_COUNTS), table)
    _print_floor(measured)
    scarce = [kind for kind in ("positives", "negatives") if found[kind] < _ENOUGH]
    if scarce:
        worth = " and ".join(f"{found[kind]} {kind}" for kind in scarce)
        floor = measured["certifiable_floor"]["above"]
        print(f"The labels are worth only {worth}: no rate of {name} under {floor:.1%} can be certified. Label more.")
