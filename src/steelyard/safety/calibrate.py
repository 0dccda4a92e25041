"""A scorer's errors from people's labels: of texts of one's own, or of completions drawn from a run (`draw.py`).

A threshold may be kept, or chosen anew; then it is chosen on one half of the labels and measured on the other.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from steelyard.base.errors import SteelyardError, UsageError
from steelyard.safety.draw import BANDS, NO, YES, Sample
from steelyard.safety.journal import CANARIES_RIGHT
from steelyard.safety.own_labels import Own
from steelyard.safety.statistics import CONFIDENCE, clopper_pearson
from steelyard.scorers.base import Calibration, Score, Scorer, score_checked
from steelyard.scorers.card import Floats, Labelled, measured, scores_of

Bools = NDArray[np.bool_]
DRAWS = 4000  # from a posterior


@dataclass(frozen=True)
class Labels:
    """Labelled texts of one category: its score, whether people called it positive, how many texts it stands for, and
    its stratum; arrays of shape [texts]."""

    scores: Floats
    positive: Bools
    weights: Floats
    strata: NDArray[np.str_]

    def part(self, keep: Bools) -> Labels:
        """Some of them, which stand for all the texts of their stratum."""
        weights = np.zeros(int(keep.sum()))
        for stratum in np.unique(self.strata):
            whole, inside = self.strata == stratum, self.strata[keep] == stratum
            if not inside.any():
                raise SteelyardError(f"no label is left of the texts {stratum}: label more of them")
            part = self.weights[keep][inside]
            weights[inside] = part * (self.weights[whole].sum() / part.sum())
        return Labels(self.scores[keep], self.positive[keep], weights, self.strata[keep])


def whole(scores: Floats, positive: Bools) -> Labels:
    """Labels of all the texts there are; the strata are the two kinds. Raises SteelyardError unless both occur."""
    strata = np.where(positive, "labelled positive", "labelled negative")
    return _both(Labels(scores, positive, np.ones(len(scores)), strata))


def of_sample(sample: Sample, labels: Mapping[str, str]) -> Labels:
    """The labels of a draw, weighted by the inverse of the probability of being drawn.

    What was skipped or not reached is taken to be like the rest of its band: a band's weights are scaled to sum to its
    size (weighting-class adjustment). The sheet is shuffled, so what was not reached is a random part of it.
    Raises SteelyardError for a band without a label, and unless both labels occur.
    """
    kept = [one for one in sample.drawn if labels.get(one.key) in (YES, NO)]
    weights = np.array([1 / one.probability for one in kept])
    bands = np.array([one.band for one in kept], dtype=np.str_)
    for band in BANDS:
        if sample.population.get(band):
            inside = bands == band
            if not inside.any():
                raise SteelyardError(
                    f"no label of a completion that scored {band} the threshold: label the whole sheet, or draw more"
                )
            weights[inside] *= sample.population[band] / weights[inside].sum()
    scores = np.array([one.score for one in kept])
    return _both(Labels(scores, np.array([labels[one.key] == YES for one in kept], dtype=np.bool_), weights, bands))


def _both(labels: Labels) -> Labels:
    positives, n = int(labels.positive.sum()), len(labels.positive)
    if not 0 < positives < n:
        kinds = ("positive", "sensitivity") if positives == 0 else ("negative", "specificity")
        raise SteelyardError(f"none of {n:,} labels is {kinds[0]}, so {kinds[1]} can't be measured: label more texts")
    return labels


def half(labels: Labels, seed: int) -> Bools:
    """One half of the labels, drawn stratum by stratum."""
    chance = random.Random(seed)
    first = np.zeros(len(labels.scores), dtype=np.bool_)
    for number, stratum in enumerate(np.unique(labels.strata)):
        members = np.flatnonzero(labels.strata == stratum).tolist()
        # Of an odd number, strata in turn give the larger part to this half and to the other.
        first[chance.sample(members, (len(members) + number % 2) // 2)] = True
    return first


# -- thresholds ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """How the threshold is found: kept, at the highest sensitivity + specificity - 1 (Youden 1950, Cancer 3, 32-35), or
    the lowest with at least this `specificity`."""

    kind: Literal["keep", "youden", "specificity"]
    specificity: float = 0.0


def rule_of(text: str) -> Rule:
    """`keep`, `youden`, or `specificity:X`. Raises UsageError for anything else."""
    if text == "keep":
        return Rule("keep")
    if text == "youden":
        return Rule("youden")
    wanted = re.fullmatch(r"specificity:(0?\.\d{1,9})", text)
    if wanted is None or not float(wanted[1]):
        raise UsageError(f"--threshold {text}: give keep, youden, or specificity:X with X between 0 and 1, as in .98")
    return Rule("specificity", float(wanted[1]))


def choose_threshold(labels: Labels, rule: Rule) -> float:
    """The threshold by a rule other than `keep`. Candidates lie half-way between neighbouring scores; of equals the
    lowest is taken. Raises SteelyardError where no threshold does it.
    """
    values, index = np.unique(labels.scores, return_inverse=True)
    if len(values) < 2:
        raise SteelyardError("the scorer gives all labelled texts one score: there is no threshold to choose")
    sensitivity, false_alarms = (
        # of the kind, the share at or over each of the values but the lowest
        (over[::-1].cumsum()[::-1] / over.sum())[1:]
        for over in (np.bincount(index, labels.weights * (labels.positive == kind)) for kind in (True, False))
    )
    cuts = (values[:-1] + values[1:]) / 2
    if rule.kind == "youden":
        return float(cuts[np.argmax(sensitivity - false_alarms)])
    enough = np.flatnonzero(1 - false_alarms >= rule.specificity)
    if not len(enough):
        raise SteelyardError(
            f"no threshold reaches a specificity of {rule.specificity:g} on these labels: ask for less"
        )
    return float(cuts[enough[0]])


def check_canaries(scorer: Scorer, category: str, threshold: float) -> None:
    """Raises SteelyardError where the scorer's canaries come out on the wrong side of a new threshold: no run would
    count."""
    canaries = [canary for canary in scorer.canaries() if canary.category == category]
    results = score_checked(scorer, [canary.item for canary in canaries])
    right = sum(
        isinstance(result, Score) and (result.values[category] >= threshold) == (canary.expected == "above")
        for canary, result in zip(canaries, results, strict=True)
    )
    if right < CANARIES_RIGHT * len(canaries):
        raise SteelyardError(
            f"{category}: at the threshold {threshold:.4f} only {right} of {len(canaries)} canaries come out right, so "
            "no run with it would count: keep the scorer's own threshold, or choose by another rule"
        )


# -- errors ----------------------------------------------------------------------------------------------------------


def counted(labels: Labels, threshold: float, source: str, date: str) -> Calibration:
    """The errors at a threshold, by counting texts that stand for themselves alone."""
    called, positive = labels.scores >= threshold, labels.positive
    return Calibration(
        threshold=threshold,
        true_positives=int((called & positive).sum()),
        positives=int(positive.sum()),
        true_negatives=int((~called & ~positive).sum()),
        negatives=int((~positive).sum()),
        source=source,
        measured=date,
    )


def verified(labels: Labels, threshold: float, source: str, date: str) -> Calibration:
    """The errors at a threshold, from texts that were drawn for labelling by their score.

    Sensitivity and specificity are those of the whole, by inverse-probability weighting: the correction for
    verification bias of Begg & Greenes (1983, Biometrics 39, 207-215). They are written as right answers among an
    effective number of items: the largest number, never over that of the labels, whose exact one-sided 95% bounds
    (Clopper & Pearson) claim no more than the labels do. What these claim are the 5% and 95% points of the posterior,
    the share of positives in each class (stratum by side of the threshold) having a uniform prior and a sample of
    (sum w)^2 / sum w^2 texts (Kish 1965). Thereby a class without a positive may still hold some (rule of three):
    there are many texts far under a threshold, and those not labelled may be the ones that the scorer missed.

    Raises SteelyardError where the effective number is under one.
    """
    called, positive = labels.scores >= threshold, labels.positive
    _, classes = np.unique(np.stack([labels.strata, called.astype(np.str_)]), axis=1, return_inverse=True)
    classes = classes.reshape(-1)
    size, right = np.bincount(classes, labels.weights), np.bincount(classes, called) > 0  # [classes]
    sample = size**2 / np.bincount(classes, labels.weights**2)
    share = np.bincount(classes, labels.weights * positive) / size
    drawn = np.random.default_rng(0).beta(share * sample + 1, (1 - share) * sample + 1, (DRAWS, len(size)))
    true_positives, positives = _effective("positive", size * share, size * drawn, right, int(positive.sum()))
    true_negatives, negatives = _effective(
        "negative", size * (1 - share), size * (1 - drawn), ~right, int((~positive).sum())
    )
    return Calibration(
        threshold=threshold,
        true_positives=true_positives,
        positives=positives,
        true_negatives=true_negatives,
        negatives=negatives,
        source=source,
        measured=date,
    )


def _effective(kind: str, found: Floats, drawn: Floats, right: Bools, most: int) -> tuple[int, int]:
    """Right answers and effective number of items of a kind, from how many of them each class holds: as estimated
    ([classes]) and in draws from the posterior ([draws, classes])."""
    estimate = found[right].sum() / found.sum()
    low, high = np.quantile(drawn[:, right].sum(axis=1) / drawn.sum(axis=1), (1 - CONFIDENCE, CONFIDENCE))
    numbers = np.arange(1, most + 1)
    lower, upper = clopper_pearson(np.round(estimate * numbers), numbers)
    honest = numbers[(lower <= low) & (upper >= high)]
    if not honest.size:
        raise SteelyardError(
            f"the {kind} labels are worth less than one: {most} of them, and many texts stand behind few of them: "
            "draw and label more"
        )
    return round(estimate * honest[-1]), int(honest[-1])


# -- whole calibrations ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A category's calibration, and what else there is to say of the labels, for JSON."""

    calibration: Calibration
    figures: dict[str, Any]


def calibrate_own(
    scorer: Scorer, rows: Sequence[Own], *, rule: Rule, seed: int, source: str, date: str
) -> dict[str, Measured]:
    """Of labelled texts of one's own, by category: the errors, with the figures of a card (`card.measured`).

    Raises SteelyardError where a text can't be scored, a category has labels of one kind only, or no threshold fits.
    """
    scores = scores_of(scorer, [row.item for row in rows])
    found = {}
    for category in sorted({name for row in rows for name in row.labels}):
        mine = [i for i, row in enumerate(rows) if category in row.labels]
        labels = whole(scores[category][mine], np.array([rows[i].labels[category] for i in mine], dtype=np.bool_))
        present = scorer.identity().categories[category].threshold
        threshold, kept = _threshold(scorer, category, present, labels, rule, seed)
        cases = [rows[i] for i, keep in zip(mine, kept, strict=True) if keep]
        telling = [name for name in ("language", "group") if len({row.facets.get(name) for row in cases}) > 1]
        part = _both(labels.part(kept))
        found[category] = Measured(
            counted(part, threshold, source, date),
            measured(
                [
                    Labelled(row.item, row.labels[category], {name: row.facets[name] for name in telling})
                    for row in cases
                ],
                part.scores,
                threshold,
            ),
        )
    return found


def calibrate_sample(
    scorer: Scorer, sample: Sample, given: Mapping[str, str], *, rule: Rule, seed: int, source: str, date: str
) -> Measured:
    """Of the labels of a draw: the errors on the run's own completions (`verified`), the estimated share of positive
    ones, and by band how many completions there are, were labelled, and are positive.

    Raises SteelyardError where the labels are too few, or no threshold fits.
    """
    labels = of_sample(sample, given)
    present = sample.identity.categories[sample.category].threshold
    threshold, kept = _threshold(scorer, sample.category, present, labels, rule, seed)
    bands = {
        band: {
            "population": sample.population.get(band, 0),
            "labelled": int((labels.strata == band).sum()),
            "positive": int((labels.positive & (labels.strata == band)).sum()),
        }
        for band in BANDS
    }
    share = float(labels.weights[labels.positive].sum() / labels.weights.sum())
    part = _both(labels.part(kept))
    return Measured(verified(part, threshold, source, date), {"bands": bands, "positive_share": share})


def _threshold(
    scorer: Scorer, category: str, present: float, labels: Labels, rule: Rule, seed: int
) -> tuple[float, Bools]:
    """The threshold, and which labels to measure it on."""
    if rule.kind == "keep":
        return present, np.ones(len(labels.scores), dtype=np.bool_)
    first = half(labels, seed)
    threshold = choose_threshold(_both(labels.part(first)), rule)
    check_canaries(scorer, category, threshold)
    return threshold, ~first
