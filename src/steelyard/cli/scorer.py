"""`steelyard scorer`: train the embedded scorers and print their cards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from steelyard.cli.options import AsJSON
from steelyard.cli.output import print_json, print_table

app = typer.Typer(no_args_is_help=True, help="Train scorers and print their cards.", rich_markup_mode=None)

_EVENTS: tuple[Literal["above", "below"], ...] = ("above", "below")
_MEASURES = ("accuracy", "sensitivity", "specificity")

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
                floors = ", ".join(f"{floor:.4f} {event}" for event, floor in category["certifiable_floor"].items())
                print(f"lowest rate it can certify, of events above and below its threshold: {floors}")
            for test_set, s in category["test_sets"].items():
                for facet, kinds in s.get("facets", {}).items():
                    table = [
                        (kind, *(_counted(shares, measure) for measure in _MEASURES)) for kind, shares in kinds.items()
                    ]
                    print_table(f"{name} on {test_set}, by {facet}", (facet, *_MEASURES), table)
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


def _counted(shares: dict[str, dict[str, float]], measure: str) -> str:
    return f"{_interval(shares[measure])} of {shares[measure]['n']}" if measure in shares else "-"


def _interval(share: dict[str, float]) -> str:
    return f"{share['value']:.3f} ({share['low']:.3f}-{share['high']:.3f})"
