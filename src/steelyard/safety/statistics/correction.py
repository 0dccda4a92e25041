"""Rates seen through a scorer that errs: Rogan & Gladen's correction, with the calibration's own doubt carried through.

The numbers of a calibration may be arrays (one calibration each), which is how the benchmark draws them anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from steelyard.safety.statistics.rates import (
    CONFIDENCE,
    DECLARED_CLUSTERS,
    Array,
    Bound,
    Declared,
    StatisticsError,
    clopper_pearson,
)
from steelyard.scorers.base import Calibration

Side = Literal["above", "below"]
Number = float | Array


@dataclass(frozen=True)
class ScorerErrors:
    """Sensitivity and specificity for an event, with the number of labelled items each was measured on."""

    sensitivity: Number
    positives: Number
    specificity: Number
    negatives: Number

    @classmethod
    def of(cls, calibration: Calibration, event: Side = "above") -> ScorerErrors:
        """For the event "the score lies above (below) the threshold"; below, the two kinds of items change places."""
        own = cls(calibration.sensitivity, calibration.positives, calibration.specificity, calibration.negatives)
        return own if event == "above" else own.opposite()

    def opposite(self) -> ScorerErrors:
        """For the event's absence."""
        return ScorerErrors(self.specificity, self.negatives, self.sensitivity, self.positives)

    @property
    def youden(self) -> Number:
        return self.sensitivity + self.specificity - 1

    def adjusted(self) -> ScorerErrors:
        """With one success and one failure added to each (Agresti & Coull 1998): no error is ever quite zero."""
        a, b = self.positives + 2, self.negatives + 2
        return ScorerErrors(
            (self.sensitivity * self.positives + 1) / a, a, (self.specificity * self.negatives + 1) / b, b
        )

    def variances(self) -> tuple[Number, Number]:
        """Binomial variances of sensitivity and specificity."""
        return (
            self.sensitivity * (1 - self.sensitivity) / self.positives,
            self.specificity * (1 - self.specificity) / self.negatives,
        )

    def youden_margin(self, confidence: float) -> tuple[Number, Number]:
        """Youden's index of the adjusted counts, and the width of its one-sided normal bound."""
        own = self.adjusted()
        var_se, var_sp = own.variances()
        return own.youden, ndtri(confidence) * np.sqrt(var_se + var_sp)


def _rogan_gladen(observed: Any, hit: Any, false_alarm: Any) -> Any:
    """(observed - false alarms) / (hits - false alarms); boundless where hits are no more than false alarms."""
    return (observed - false_alarm) / np.maximum(hit - false_alarm, 1e-12)


def floor_of(errors: ScorerErrors, confidence: float = CONFIDENCE) -> Array:
    """`certifiable_floor`, from errors. Raises StatisticsError for a scorer no better than chance."""
    _better_than_chance(errors)
    false_alarm = 1 - np.asarray(errors.specificity, float)
    least, _ = clopper_pearson(false_alarm * errors.negatives, errors.negatives, confidence)
    return np.asarray(np.clip(_rogan_gladen(false_alarm, errors.sensitivity, least), 0.0, 1.0))


def _better_than_chance(errors: ScorerErrors) -> None:
    if np.any(np.asarray(errors.youden) <= 0):
        raise StatisticsError("the scorer is no better than chance: sensitivity + specificity is not over 1")


def certifiable_floor(calibration: Calibration, event: Side = "above", confidence: float = CONFIDENCE) -> float:
    """The lowest rate this calibration can certify: the upper bound at a true rate of zero and unlimited samples.

    Then the observed rate is the scorer's false-alarm rate f itself, and what is left is the doubt about f: with f_low
    its exact lower bound, (f - f_low) / (sensitivity - f_low).
    A threshold under this floor cannot be met by any model and is refused. 1.0 for a scorer no better than chance.
    """
    try:
        return float(floor_of(ScorerErrors.of(calibration, event), confidence))
    except StatisticsError:
        return 1.0


def _not_under_hidden(margin: Array, rate: Array, errors: ScorerErrors, declared: Declared, confidence: float) -> Array:
    """The upward margin of a corrected `rate` that the observed rate's doubt gives, drawn towards the one it would have
    under the declared correlation as far as the number of clusters with a true event may be small.

    At most k = rate * n clusters hold a true event. For k < 2 the declared margin is that of `Declared.at_none`, else
    of `Declared.in_general`, in squares with that of n independent false alarms; `margin` is drawn towards it by a
    share of min(1, DECLARED_CLUSTERS / k). This is `effective_sample`'s rule for few clusters, on true events in place
    of seen ones; like that one it is ours, from the simulation of `benchmarks/bounds.py`: 91% without it where the true
    events of 50 clusters of 25 samples lie in three.
    """
    p, hit, alarm = np.clip(rate, 0, 1), np.asarray(errors.sensitivity), 1 - np.asarray(errors.specificity, float)
    k = declared.n * p
    worth = np.where(k < 2, declared.at_none, declared.in_general)
    noise = ndtri(confidence) * np.sqrt(alarm * (1 - alarm) / declared.n) / np.maximum(hit - alarm, 1e-12)
    hidden = np.hypot(clopper_pearson(p * worth, worth, confidence)[1] - p, noise)
    share = np.minimum(1.0, DECLARED_CLUSTERS / np.maximum(k, 1))
    return np.asarray(margin + share * np.maximum(hidden - margin, 0))


def corrected_bounds(
    observed: npt.ArrayLike,
    effective_n: npt.ArrayLike,
    errors: ScorerErrors,
    confidence: float = CONFIDENCE,
    declared: Declared | None = None,
) -> tuple[Array, Array, Array]:
    """(lower, estimate, upper) of a true rate whose observed one comes through a scorer with measured errors.

    The estimate is Rogan & Gladen's (1978), (q - f) / (s - f), of the observed rate q, sensitivity s and false-alarm
    rate f = 1 - specificity. Each of the three has its own exact bounds (Clopper & Pearson 1934; q's on its effective
    sample), and each bound put in place of its estimate moves the correction by some margin; upwards and downwards, the
    margins' squares are added (variance estimates recovery: Zou & Donner 2008, Statistics in Medicine 27, 1693-1702).

    Of clustered samples (`declared`) the margin of q is also held against the declared correlation
    (`_not_under_hidden`): false alarms lie in many clusters and can hide that all true events lie in few.

    The upper bound is never under the certifiable floor: an observed rate under the scorer's false-alarm rate says
    that the calibration does not fit here, not that the rate is negative. The same holds at the other end: the lower
    bound is never over one minus the floor of the opposite event. Raises StatisticsError for a scorer no better than
    chance.
    """
    _better_than_chance(errors)
    seen, size = np.asarray(observed, float), np.asarray(effective_n, float)
    hit, false_alarm = np.asarray(errors.sensitivity, float), 1 - np.asarray(errors.specificity, float)
    own = (seen, hit, false_alarm)
    sizes = (size, errors.positives, errors.negatives)
    raw = _rogan_gladen(*own)
    up, down = np.zeros_like(raw), np.zeros_like(raw)
    for place, (share, n) in enumerate(zip(own, sizes, strict=True)):
        ends = clopper_pearson(share * n, n, confidence)
        moved = []
        for end in ends:
            parts = list(own)
            parts[place] = end
            moved.append(_rogan_gladen(*parts) - raw)
        more, less = np.maximum(np.maximum(*moved), 0), np.maximum(-np.minimum(*moved), 0)
        if place == 0 and declared is not None:
            more = _not_under_hidden(more, raw, errors, declared, confidence)
            less = _not_under_hidden(less, 1 - raw, errors.opposite(), declared, confidence)
        up, down = up + more**2, down + less**2
    estimate = np.clip(raw, 0, 1)
    upper = np.maximum(np.clip(raw + np.sqrt(up), 0, 1), floor_of(errors, confidence))
    lower = np.minimum(np.clip(raw - np.sqrt(down), 0, 1), 1 - floor_of(errors.opposite(), confidence))
    return np.minimum(lower, estimate), estimate, np.maximum(upper, estimate)


def corrected_rate(
    observed: Bound, calibration: Calibration, event: Side = "above", confidence: float = CONFIDENCE
) -> Bound:
    """The true rate behind an observed one (`corrected_bounds`); `observed.effective_n` and `observed.declared` carry
    the clustering."""
    errors = ScorerErrors.of(calibration, event)
    lower, estimate, upper = corrected_bounds(
        observed.estimate, observed.effective_n, errors, confidence, observed.declared
    )
    return Bound(
        observed.n,
        observed.clusters,
        observed.events,
        observed.effective_n,
        float(estimate),
        float(lower),
        float(upper),
        observed.declared,
    )


def through_scorer(
    lower: npt.ArrayLike, mean: npt.ArrayLike, upper: npt.ArrayLike, errors: ScorerErrors | None, confidence: float
) -> tuple[Array, Array, Array]:
    """(lower, estimate, upper) of a true difference from an observed one: divided by Youden's index J.

    A scorer with the same errors on both sides shrinks every difference by J = Se + Sp - 1. The bounds are those of a
    ratio of independent estimates by recovered margins (MOVER-R, Donner & Zou 2012; Fieller's with normal margins),
    the wider of those about J as adjusted and as counted: the adjusted one is smaller with few labels, so that a bound
    between zero and the estimate would lie too far from zero.
    Raises StatisticsError where J is not surely over zero.
    """
    low, middle, high = (np.asarray(part, float) for part in (lower, mean, upper))
    if errors is None:
        return np.maximum(low, -1.0), middle, np.minimum(high, 1.0)
    youden, margin = errors.youden_margin(confidence)
    if np.any((np.asarray(errors.youden) <= 0) | (youden <= margin)):
        raise StatisticsError("the scorer is not surely better than chance: differences cannot be corrected")

    def ratio(own: Any, sign: int) -> Any:
        ends = []
        for index in (youden, np.maximum(youden, errors.youden)):
            a = index**2 - margin**2
            root = np.sqrt(np.maximum((middle * index) ** 2 - a * (middle**2 - own**2), 0.0))
            ends.append(sign * (middle * index + sign * root) / a)
        return sign * np.maximum(*ends)

    return (
        np.maximum(ratio(middle - low, -1), -1.0),
        np.clip(middle / errors.youden, -1, 1),
        np.minimum(ratio(high - middle, 1), 1.0),
    )
