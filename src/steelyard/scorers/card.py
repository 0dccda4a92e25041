"""The card of a scorer: its errors on human labels it never saw (TEST sets), and the lowest rate it can certify."""

from __future__ import annotations

import csv
import gzip
import io
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steelyard.base.errors import SteelyardError, UsageError
from steelyard.scorers.base import Item, Score, Scorer, score_checked

Floats = NDArray[np.float64]
Z_TWO_SIDED = 1.959963984540054
csv.field_size_limit(1 << 24)


@dataclass(frozen=True)
class Labelled:
    """A TEST case: what is scored, whether people called it positive, and the kinds of case it belongs to, by facet."""

    item: Item
    positive: bool
    facets: Mapping[str, str] = field(default_factory=dict)


def wilson(successes: int, total: int) -> tuple[float, float]:
    """The two-sided 95% score interval of a proportion (Wilson 1927). ValueError where `total` is not positive."""
    if total <= 0:
        raise ValueError("an interval needs at least one observation")
    z, share = Z_TWO_SIDED, successes / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * (share * (1 - share) / total + z * z / (4 * total * total)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def auc(scores: Floats, positive: NDArray[np.bool_]) -> float:
    """Area under the ROC curve by ranks, ties shared (Mann-Whitney). ValueError unless both labels occur."""
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if n_positive == 0 or n_negative == 0:
        raise ValueError("the area under the curve needs both labels")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[positive].sum() - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))


def evaluate(scores: Floats, positive: NDArray[np.bool_], threshold: float) -> dict[str, Any]:
    """AUC; accuracy, sensitivity and specificity at the threshold, each with counts and its Wilson interval."""
    return {"auc": auc(scores, positive), **_shares(scores >= threshold, positive)}


def _shares(called: NDArray[np.bool_], positive: NDArray[np.bool_]) -> dict[str, Any]:
    """Accuracy, and sensitivity and specificity where there is a case of the kind."""

    def share(right: NDArray[np.bool_]) -> dict[str, Any]:
        low, high = wilson(int(right.sum()), len(right))
        return {"value": float(right.mean()), "low": low, "high": high, "right": int(right.sum()), "n": len(right)}

    found = {"accuracy": share(called == positive)}
    if positive.any():
        found["sensitivity"] = share(called[positive])
    if not positive.all():
        found["specificity"] = share(~called[~positive])
    return found


def _lines(path: Path) -> Iterator[str]:
    with io.TextIOWrapper(gzip.open(path), encoding="utf-8", newline="") as file:
        yield from file


def _hatecheck(path: Path, language: str) -> Iterator[Labelled]:
    with path.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            facets = {"functionality": line["functionality"], "target": line["target_ident"] or "none"}
            yield Labelled(Item("", line["test_case"], language), line["label_gold"] == "hateful", facets)


def _openai_moderation(path: Path) -> Iterator[Labelled]:
    """Any category: positive where one is set; negative where none is (absent labels count as not set)."""
    for line in _lines(path):
        case = json.loads(line)
        yield Labelled(Item("", case["prompt"]), any(value == 1 for key, value in case.items() if key != "prompt"))


def _realtoxicityprompts(path: Path) -> Iterator[Labelled]:
    """Continuations; positive where Perspective's toxicity is at least 0.5. Cases without a value are left out."""
    for line in _lines(path):
        case = json.loads(line)
        toxicity = case["continuation"]["toxicity"]
        if toxicity is not None:
            yield Labelled(Item(case["prompt"]["text"], case["continuation"]["text"]), toxicity >= 0.5)


def _edos_test(path: Path) -> Iterator[Labelled]:
    for line in csv.DictReader(_lines(path)):
        if line["split"] == "test":
            yield Labelled(Item("", line["text"]), line["label_sexist"] == "sexist")


def _xstest(path: Path, category: str) -> Iterator[Labelled]:
    """As two people labelled them: full and partial refusals against full compliance ("refusal"), full refusals against
    the others ("full_refusal"), full compliance against full refusals ("harm_compliance")."""
    for line in csv.DictReader(_lines(path)):
        item, label = Item(line["prompt"], line["completion"]), line["final_label"]
        if category == "refusal":
            yield Labelled(item, label != "1_full_compliance")
        elif category == "full_refusal":
            yield Labelled(item, label == "2_full_refusal")
        elif label != "3_partial_refusal":
            yield Labelled(item, label == "1_full_compliance")


_Reader = Callable[[Path], Iterator[Labelled]]


def _xstest_sets(category: str) -> tuple[tuple[str, str, _Reader], ...]:
    files = {"xstest_gpt4": "completions_gpt4", "xstest_llama2": "completions_llama2orig"}
    return tuple(
        (name, f"probes/xstest/{file}.csv.gz", lambda path: _xstest(path, category)) for name, file in files.items()
    )


ANY = "any"  # whether any category of a scorer of several holds
_HATECHECK = ("hatecheck", "toxicity/test/hatecheck/test_suite_cases.csv", lambda path: _hatecheck(path, "en"))
_HATECHECK_FR = (
    "hatecheck_fr",
    "toxicity/test/multilingual_hatecheck/hatecheck_cases_final_french.csv",
    lambda path: _hatecheck(path, "fr"),
)
_OPENAI = ("openai_moderation", "toxicity/test/openai_moderation/samples-1680.jsonl.gz", _openai_moderation)
_EDOS = ("edos_test", "toxicity/train/edos/edos_labelled_aggregated.csv.gz", _edos_test)
_RTP = ("realtoxicityprompts", "probes/realtoxicityprompts/val5k.jsonl.gz", _realtoxicityprompts)
TEST_SETS: dict[str, tuple[tuple[str, str, _Reader], ...]] = {
    "toxicity": (_HATECHECK, _HATECHECK_FR, _OPENAI, _RTP, _EDOS),
    "identity_attack": (_HATECHECK, _HATECHECK_FR, _EDOS),
    ANY: (_OPENAI,),
    "refusal": _xstest_sets("refusal"),
    "full_refusal": _xstest_sets("full_refusal"),
    "harm_compliance": _xstest_sets("harm_compliance"),
}
_SPEED_TEXT = (
    "The council met on Tuesday evening to talk about the new bridge, and after a long debate it was agreed that the "
    "work would begin in spring, once the money had been found and the river was low enough."
)


def scores_of(scorer: Scorer, items: Sequence[Item]) -> dict[str, Floats]:
    """The scores of all items by category, and of a scorer of several categories ANY: how far over its threshold, in
    log-odds, the worst category is."""
    results = score_checked(scorer, items)
    values = []
    for result in results:
        if not isinstance(result, Score):
            raise SteelyardError(
                f"{scorer.identity().name}: {result.reason}; its errors are measured on scores for every text"
            )
        values.append(result.values)
    categories = scorer.identity().categories
    found = {category: np.array([value[category] for value in values], dtype=np.float64) for category in categories}
    if len(found) > 1:
        over = [log_odds(found[key]) - log_odds(np.array(one.threshold)) for key, one in categories.items()]
        found[ANY] = np.max(over, axis=0)
    return found


def log_odds(p: Floats) -> Floats:
    """log(p / (1 - p)), finite also at 0 and 1."""
    p = np.clip(p, 1e-12, 1 - 1e-12)
    odds: Floats = np.log(p / (1 - p))
    return odds


def measured(cases: Sequence[Labelled], scores: Floats, threshold: float) -> dict[str, Any]:
    """`evaluate`, and by facet the shares of each kind of case."""
    positive = np.array([case.positive for case in cases])
    found = evaluate(scores, positive, threshold)
    facets: dict[str, Any] = {}
    for facet in sorted({facet for case in cases for facet in case.facets}):
        kinds = np.array([case.facets.get(facet, "") for case in cases])
        facets[facet] = {
            str(kind): _shares(scores[kinds == kind] >= threshold, positive[kinds == kind]) for kind in np.unique(kinds)
        }
    return found | ({"facets": facets} if facets else {})


def _languages(sets: Sequence[tuple[Sequence[Labelled], Floats]], threshold: float) -> dict[str, Any]:
    """The shares of each kind of case by language, over all TEST sets together. No AUC: sets differ in their rates."""
    if not sets:
        return {}
    cases, scores = [case for given, _ in sets for case in given], np.concatenate([found for _, found in sets])
    languages = np.array([case.item.language for case in cases])
    positive = np.array([case.positive for case in cases])
    return {
        str(one): _shares(scores[languages == one] >= threshold, positive[languages == one])
        for one in np.unique(languages)
    }


def scorer_card(scorer: Scorer, data: Path) -> dict[str, Any]:
    """Everything a reader must know before trusting `scorer`, with the TEST sets found under the folder `data`.

    For each category, and for ANY of several: calibration, and per TEST set present `evaluate`'s figures, also by
    facet (HateCheck's functionalities and target groups), and by language over all sets; the absent ones are listed
    under "absent". XSTest is also given over both models' completions together ("xstest"). Throughput is texts of 40
    word pieces a second on this machine. Training data and licences come from the scorer's own `card`.
    Raises UsageError where `data` is no folder, SteelyardError where an item can't be scored.
    """
    if not data.is_dir():
        raise UsageError(f"{data}: no such folder; give the data folder with --data")
    identity = scorer.identity()
    thresholds = {category: calibration.threshold for category, calibration in identity.categories.items()}
    if "toxicity" in thresholds and len(thresholds) > 1:
        thresholds[ANY] = 0.0
    wanted = {test_set for category in thresholds for test_set in TEST_SETS.get(category, ())}
    cases = {one: list(one[2](data / one[1])) for one in wanted if (data / one[1]).is_file()}
    scores = {one: scores_of(scorer, [case.item for case in given]) for one, given in cases.items()}
    categories: dict[str, Any] = {}
    for category, threshold in thresholds.items():
        present = [one for one in TEST_SETS.get(category, ()) if one in cases]
        sets = {one[0]: measured(cases[one], scores[one][category], threshold) for one in present}
        if len(xstest := [one for one in present if one[0].startswith("xstest_")]) == 2:
            both = [case for one in xstest for case in cases[one]]
            sets["xstest"] = measured(both, np.concatenate([scores[one][category] for one in xstest]), threshold)
        categories[category] = {
            "test_sets": sets,
            "languages": _languages([(cases[one], scores[one][category]) for one in present], threshold),
            "absent": [one[0] for one in TEST_SETS.get(category, ()) if one not in cases],
        }
        if category in identity.categories:
            calibration = identity.categories[category]
            categories[category] |= {
                "calibration": calibration.model_dump(mode="json"),
                "sensitivity": wilson(calibration.true_positives, calibration.positives),
                "specificity": wilson(calibration.true_negatives, calibration.negatives),
            }
    items = [Item("", f"{number}. {_SPEED_TEXT}") for number in range(256)]
    start = time.perf_counter()
    score_checked(scorer, items)
    card = {
        "name": identity.name,
        "identity": identity.digest,
        "weights": identity.weights,
        "pin": identity.pin,
        "categories": categories,
        "texts_per_second": len(items) / (time.perf_counter() - start),
    }
    training = getattr(scorer, "card", {}).get("training")
    return card | ({"training": training} if training else {})
