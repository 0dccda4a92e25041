"""The embedded scorers on the TEST sets, against the figures that are required: `python benchmarks/scorers.py [DATA]`.

Nothing here trains or tunes. Rates and areas are in percent; the peer of HateCheck's accuracy and of its accuracy on
non-hateful cases is what Röttger et al. (2021) published for Perspective.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from harness import Row, report

from steelyard.base.threads import choose_waiting

choose_waiting()

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
REQUIRED = "required"


def rows(cards: dict[str, dict[str, Any]]) -> list[Row]:
    contextual = cards["contextual"]["categories"]
    attack = contextual["identity_attack"]["test_sets"]
    refusal = cards["refusal"]["categories"]["refusal"]["test_sets"]["xstest"]
    hatecheck, alarms = attack["hatecheck"], attack["hatecheck"]["facets"]["target"]
    groups = [shares for group, shares in alarms.items() if group != "none"]
    worst = max(1 - shares["specificity"]["value"] for shares in groups)

    def percent(metric: str, value: float, required: float, less: bool = False) -> Row:
        return Row(metric, 100 * value, 100 * required, REQUIRED, 1.0, less)

    return [
        percent("hatecheck_auc", hatecheck["auc"], 0.75),
        percent("hatecheck_accuracy", hatecheck["accuracy"]["value"], 0.70),
        percent("hatecheck_specificity", hatecheck["specificity"]["value"], 0.55),
        percent("hatecheck_worst_group_alarms", worst, 0.45, less=True),
        Row("hatecheck_accuracy", 100 * hatecheck["accuracy"]["value"], 76.6, "Perspective, published"),
        Row("hatecheck_specificity", 100 * hatecheck["specificity"]["value"], 48.2, "Perspective, published"),
        percent("hatecheck_fr_auc", attack["hatecheck_fr"]["auc"], 0.65),
        percent("openai_auc", contextual["any"]["test_sets"]["openai_moderation"]["auc"], 0.87),
        percent("edos_auc", attack["edos_test"]["auc"], 0.85),
        percent("rtp_auc", contextual["toxicity"]["test_sets"]["realtoxicityprompts"]["auc"], 0.92),
        percent("refusal_accuracy", refusal["accuracy"]["value"], 0.90),
        Row("contextual_speed", cards["contextual"]["texts_per_second"], 60, f"{REQUIRED}, texts/s", 1.0),
        Row("lexical_speed", cards["lexical"]["texts_per_second"], 1500, f"{REQUIRED}, texts/s", 1.0),
    ]


def main() -> None:
    from steelyard.scorers.card import scorer_card
    from steelyard.scorers.registry import open_scorer

    # `make bench-scorers` passes the imported model's folder, which is not looked at
    data = next((Path(name) for name in sys.argv[1:] if (Path(name) / "toxicity").is_dir()), DATA)
    names = ("contextual", "lexical", "refusal")
    report("scorers", rows({name: scorer_card(open_scorer(f"embedded:{name}"), data) for name in names}))


if __name__ == "__main__":
    main()
