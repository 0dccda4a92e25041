"""Bounds: against textbook values, against brute force, and by simulation on a small declared grid."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from safety_fakes import calibration
from scipy.special import bdtr

from steelyard.base.errors import SteelyardError
from steelyard.safety import statistics
from steelyard.safety.statistics import (
    Bound,
    Declared,
    ScorerErrors,
    StatisticsError,
    certifiable_floor,
    clopper_pearson,
    cluster_bootstrap,
    cluster_t,
    clustered_bounds,
    clustered_rate,
    corrected_bounds,
    corrected_rate,
    declared_effective_n,
    difference_bounds,
    difference_p,
    effective_sample,
    group_gap,
    holm,
    mcnemar,
    net_bounds,
    pair_bounds,
    paired_difference,
    sample_to_settle,
    through_scorer,
    wilson,
)

GOOD = calibration(true_positives=9_999, positives=10_000, true_negatives=99_999, negatives=100_000)


def labels(sizes: Sequence[int]) -> list[str]:
    return [f"family{i}" for i, size in enumerate(sizes) for _ in range(size)]


# -- one rate --------------------------------------------------------------------------------------------------------


def test_clopper_pearson_against_its_definition_and_the_rule_of_three() -> None:
    lower, upper = clopper_pearson([0, 1, 4, 10], [10, 10, 10, 10])
    assert lower[0] == 0
    assert upper[3] == 1
    assert upper[0] == pytest.approx(1 - 0.05 ** (1 / 10))
    for i, events in ((1, 1), (2, 4)):  # P(X <= x | upper) = P(X >= x | lower) = 5%
        assert bdtr(events, 10, upper[i]) == pytest.approx(0.05)
        assert 1 - bdtr(events - 1, 10, lower[i]) == pytest.approx(0.05)
    assert float(clopper_pearson(0, 1000)[1]) == pytest.approx(0.003, rel=0.01)
    # Two-sided 95% of 4 in 10, as every table has it: 0.1216 to 0.7376.
    low, high = clopper_pearson(4, 10, 0.975)
    assert (float(low), float(high)) == (pytest.approx(0.1216, abs=1e-4), pytest.approx(0.7376, abs=1e-4))


def test_wilson_by_its_textbook_value() -> None:
    assert wilson(81, 263) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))  # Newcombe 1998
    with pytest.raises(ValueError, match="observation"):
        wilson(0, 0)


def test_a_histogram_of_clusters_says_the_same_as_the_list() -> None:
    events = np.random.default_rng(2).binomial(5, 0.2, 60)
    kinds = np.bincount(events, minlength=6)
    for whole, short in zip(
        clustered_bounds(events, np.full(60, 5)), clustered_bounds(np.arange(6), 5, number=kinds), strict=True
    ):
        assert whole == pytest.approx(short)
    assert cluster_t(events, np.full(60, 5)) == pytest.approx(cluster_t(np.arange(6), np.full(6, 5), number=kinds))


def test_one_sample_a_cluster_is_the_plain_binomial_but_for_the_clusters_own_doubt() -> None:
    bound = clustered_rate([True] * 30 + [False] * 70, labels([1] * 100))
    assert bound.effective_n == pytest.approx(99, rel=0.011)
    assert bound.upper == pytest.approx(float(clopper_pearson(30, 100)[1]), abs=0.002)
    assert clustered_rate([False] * 50, labels([1] * 50)).effective_n == pytest.approx(50)


def test_clusters_that_agree_within_count_as_one_sample_each() -> None:
    sizes = [5] * 40
    alike = [family % 2 == 0 for family in range(40) for _ in range(5)]
    bound = clustered_rate(alike, labels(sizes))
    assert bound.effective_n == pytest.approx(39, rel=0.12)  # less a tenth for the doubt about it
    mixed = [i % 5 < 2 for i in range(200)]  # every family the same rate: no more than n
    assert clustered_rate(mixed, labels(sizes)).effective_n == 200


@pytest.mark.parametrize("event", [True, False])
def test_zero_and_all_events_take_the_declared_correlation(event: bool) -> None:
    sizes = [10] * 20
    bound = clustered_rate([event] * 200, labels(sizes))
    b = (1 - statistics.DECLARED_ICC) / statistics.DECLARED_ICC
    # The definition: integrated over a beta distribution, the chance that a family of 10 stays without event.
    rate = 1e-6
    empty = np.prod([(b * (1 - rate) + i) / (b + i) for i in range(10)])
    assert 20 * np.log(empty) / np.log1p(-rate) == pytest.approx(bound.effective_n, rel=1e-4)
    assert 20 < bound.effective_n < 200
    assert (bound.lower if event else 1 - bound.upper) == pytest.approx(0.05 ** (1 / bound.effective_n))
    assert float(declared_effective_n([1, 1, 1])) == pytest.approx(3)


def test_korn_and_graubards_effective_sample_by_hand() -> None:
    y, m = np.array([0, 1, 2, 1, 4, 0, 3, 1, 2, 1]), np.full(10, 5)
    p = 15 / 50
    variance = 10 / 9 * ((y - p * m) ** 2).sum() / 50**2
    t9, t49 = 1.8331129, 1.6765509  # Student's t, one-sided 5%
    estimated = p * (1 - p) / variance * (t49 / t9) ** 2
    assert estimated < 50
    squares = (y - p * m) ** 2
    k = min(8, 2 * squares.sum() ** 2 / (squares**2).sum())  # eight clusters with an event, the variance rests on fewer
    assert 7 < k < 8
    seen = 1 + (50 / estimated - 1) * (1 + 2 / k)
    in_general = 1 + 4 * statistics.DECLARED_ICC  # Kish, five samples a cluster
    assert seen < in_general
    effect = seen + statistics.DECLARED_CLUSTERS / k * (in_general - seen)
    assert float(effective_sample(y, m)) == pytest.approx(50 / effect, rel=1e-6)
    # One cluster with an event: what is declared for none, unless more is seen.
    one = np.array([1] + [0] * 9)
    assert float(effective_sample(one, m)) == pytest.approx(float(declared_effective_n(m)))
    assert float(effective_sample(one * 5, m)) < float(declared_effective_n(m))


def test_nothing_is_said_without_samples_or_with_one_cluster() -> None:
    for events, clusters in (([], []), ([True, False], ["a", "a"]), ([True], ["a", "b"])):
        with pytest.raises(StatisticsError):
            clustered_rate(events, clusters)
    for nameless in (["a", ""], ["a", None]):
        with pytest.raises(StatisticsError, match="sample 2 has no cluster"):
            clustered_rate([True, False], nameless)  # type: ignore[arg-type]
    assert issubclass(StatisticsError, ValueError)
    assert issubclass(StatisticsError, SteelyardError)


def clustered_draws(
    rng: np.random.Generator, rate: float, icc: float, clusters: int, size: int, runs: int
) -> np.ndarray[Any, np.dtype[np.int64]]:
    if icc == 0:
        return rng.binomial(size, rate, (runs, clusters))
    a, b = rate * (1 - icc) / icc, (1 - rate) * (1 - icc) / icc
    return rng.binomial(size, rng.beta(a, b, (runs, clusters)))


def test_coverage_of_a_clustered_rate() -> None:
    rng = np.random.default_rng(11)
    upper_covers, lower_covers = [], []
    for rate, icc, clusters, size in itertools.product(
        (0.002, 0.01, 0.05, 0.2, 0.5), (0, 0.1, 0.3, 0.6), (20, 60), (2, 10)
    ):
        draws = clustered_draws(rng, rate, icc, clusters, size, 2000)
        _, lower, upper = clustered_bounds(draws, np.full(draws.shape, size))
        upper_covers.append((upper >= rate).mean())
        lower_covers.append((lower <= rate).mean())
    assert min(upper_covers) >= 0.93  # 94%, less two standard errors of 2,000 runs
    assert min(lower_covers) >= 0.93
    assert np.mean(upper_covers) <= 0.99


# -- through a scorer ------------------------------------------------------------------------------------------------


def test_rogan_and_gladens_estimate_with_the_margins_of_all_three_parts() -> None:
    errors = ScorerErrors(0.9, 100, 0.9, 200)
    lower, estimate, upper = corrected_bounds(0.259, 1000, errors)
    true = (0.259 - 0.1) / 0.8
    assert float(estimate) == pytest.approx(true)
    q, hit, alarm = clopper_pearson(259, 1000), clopper_pearson(90, 100), clopper_pearson(20, 200)
    ups = ((q[1] - 0.1) / 0.8, (0.259 - 0.1) / (hit[0] - 0.1), (0.259 - alarm[0]) / (0.9 - alarm[0]))
    downs = ((q[0] - 0.1) / 0.8, (0.259 - 0.1) / (hit[1] - 0.1), (0.259 - alarm[1]) / (0.9 - alarm[1]))
    assert float(upper) == pytest.approx(true + np.sqrt(sum((float(end) - true) ** 2 for end in ups)))
    assert float(lower) == pytest.approx(true - np.sqrt(sum((float(end) - true) ** 2 for end in downs)))
    # More labels, and more samples, leave less doubt; endless ones none.
    more = corrected_bounds(0.259, 1000, ScorerErrors(0.9, 10_000, 0.9, 20_000))
    assert lower < more[0] < estimate < more[2] < upper
    endless = corrected_bounds(0.259, 1e12, ScorerErrors(0.9, 1e12, 0.9, 1e12))
    assert float(endless[0]) == pytest.approx(true, abs=1e-4) == float(endless[2])
    observed = Bound(1000, 100, 259, 1000, 0.259, 0.23, 0.28)
    corrected = corrected_rate(observed, calibration(true_positives=900, true_negatives=1800))
    assert corrected.estimate == pytest.approx(true)
    assert corrected.lower < corrected.estimate < corrected.upper


def test_a_perfect_scorer_known_perfectly_changes_next_to_nothing() -> None:
    observed = clustered_rate([True] * 60 + [False] * 240, labels([1] * 300))
    corrected = corrected_rate(observed, GOOD)
    assert corrected.estimate == pytest.approx(observed.estimate, abs=1e-3)
    assert corrected.upper == pytest.approx(observed.upper, abs=0.004)
    assert corrected.lower == pytest.approx(observed.lower, abs=0.004)


def test_the_floor_is_where_the_bound_ends_with_endless_clean_samples() -> None:
    cal = calibration(true_negatives=1900, negatives=2000)
    floor = certifiable_floor(cal)
    endless = Bound(10**9, 10**6, 0, 1e12, 0.05, 0.05, 0.05)
    assert corrected_rate(endless, cal).upper == pytest.approx(floor, rel=1e-4)
    assert 0.005 < floor < 0.02
    assert certifiable_floor(calibration(true_negatives=190, negatives=200)) > 2 * floor
    # Under the false-positive rate: the calibration does not fit, the bound stays at the floor.
    assert corrected_rate(Bound(1000, 100, 0, 1000, 0.0, 0.0, 0.003), cal).upper == floor
    # And at the other end: more seen than the scorer's sensitivity allows does not make the rate one for sure.
    all_seen = corrected_rate(Bound(1000, 100, 1000, 1000, 1.0, 0.997, 1.0), cal)
    assert all_seen.lower == 1 - certifiable_floor(cal, "below") < 1


def test_events_below_the_threshold_swap_the_scorers_errors() -> None:
    cal = calibration(true_positives=80, positives=100, true_negatives=297, negatives=300)
    assert ScorerErrors.of(cal, "below") == ScorerErrors(0.99, 300, 0.8, 100)
    observed = Bound(100, 20, 30, 100, 0.3, 0.2, 0.4)
    assert corrected_rate(observed, cal, "below").estimate == pytest.approx((0.3 + 0.8 - 1) / 0.79)
    assert certifiable_floor(cal, "below") > certifiable_floor(cal)


def test_a_scorer_no_better_than_chance_measures_nothing() -> None:
    useless = calibration(true_positives=500, true_negatives=1000)
    assert certifiable_floor(useless) == 1
    with pytest.raises(StatisticsError, match="chance"):
        corrected_rate(Bound(100, 20, 30, 100, 0.3, 0.2, 0.4), useless)
    with pytest.raises(StatisticsError, match="chance"):
        paired_difference([1, 0, 1, 0], [0, 0, 1, 1], list("aabb"), useless)


def test_coverage_of_a_corrected_rate() -> None:
    rng = np.random.default_rng(12)
    for (se, sp), rate, icc in itertools.product(((0.95, 0.99), (0.8, 0.95)), (0.01, 0.05, 0.2), (0, 0.3)):
        draws = clustered_draws(rng, rate, icc, 60, 4, 500)
        seen = rng.binomial(draws, se) + rng.binomial(4 - draws, 1 - sp)
        n_eff, lower, upper = clustered_bounds(seen, np.full(seen.shape, 4))
        covers = []
        for i, observed in enumerate(seen.sum(axis=1)):
            cal = calibration(
                true_positives=rng.binomial(300, se), positives=300, true_negatives=rng.binomial(900, sp), negatives=900
            )
            bound = Bound(240, 60, int(observed), float(n_eff[i]), observed / 240, float(lower[i]), float(upper[i]))
            corrected = corrected_rate(bound, cal)
            covers.append((corrected.upper >= rate, corrected.lower <= rate))
        assert np.mean(covers, axis=0).min() >= 0.92  # 94%, less two standard errors of 500 runs


def test_true_events_of_few_clusters_are_not_hidden_by_false_alarms() -> None:
    """50 families of 25 samples, correlation .6: at a true rate of 3% all true events lie in about three families."""
    rng, errors = np.random.default_rng(16), ScorerErrors(0.96, 5_000, 0.973, 100_000)
    true = clustered_draws(rng, 0.03, 0.6, 50, 25, 4_000)
    seen = rng.binomial(true, errors.sensitivity) + rng.binomial(25 - true, 1 - np.asarray(errors.specificity))
    sizes = np.full(50, 25)
    rate, n_eff = seen.mean(axis=1) / 25, effective_sample(seen, sizes)
    known = corrected_bounds(rate, n_eff, errors, declared=Declared.of(sizes))[2]
    hidden = corrected_bounds(rate, n_eff, errors)[2]
    assert (known >= 0.03).mean() >= 0.94
    assert (hidden >= 0.03).mean() < 0.92


def test_what_false_alarms_may_hide_by_hand() -> None:
    errors, sizes = ScorerErrors(0.9, 1e9, 0.98, 1e9), np.full(50, 25)
    worth = Declared.of(sizes)
    assert (worth.n, worth.at_none) == (1250, declared_effective_n(sizes))
    assert float(worth.in_general) == pytest.approx(1250 / (1 + 24 * statistics.DECLARED_ICC))
    noise = 1.6448536 * np.sqrt(0.02 * 0.98 / 1250) / 0.88
    # No event but false alarms: the exact bound of none under the declared correlation, and the false alarms' noise.
    upper = float(corrected_bounds(0.02, 1000, errors, declared=worth)[2])
    assert upper == pytest.approx(np.hypot(1 - 0.05 ** (1 / float(worth.at_none)), noise), rel=1e-3)
    # Ten true events may lie in as many clusters: a fifth of the way from the observed rate's own margin.
    p, seen = 10 / 1250, 0.02 + 0.88 * 10 / 1250
    own = (float(clopper_pearson(seen * 1000, 1000)[1]) - seen) / 0.88
    n = float(worth.in_general)
    declared = np.hypot(float(clopper_pearson(p * n, n)[1]) - p, noise)
    upper = float(corrected_bounds(seen, 1000, errors, declared=worth)[2])
    assert upper - p == pytest.approx(own + 0.2 * (declared - own), rel=1e-3)
    # The same of the event's absence, mirrored.
    mirrored = corrected_bounds(1 - seen, 1000, errors.opposite(), declared=worth)
    assert 1 - float(mirrored[0]) == pytest.approx(upper)
    # One sample a cluster: nothing can hide.
    alone = Declared.of(np.ones(1250))
    assert float(alone.in_general) == float(alone.at_none) == pytest.approx(1250)
    bound = clustered_rate([True] * 30 + [False] * 70, labels([2] * 50))
    assert bound.declared == Declared.of(np.full(50, 2)) == corrected_rate(bound, GOOD).declared


# -- differences -----------------------------------------------------------------------------------------------------


def test_a_paired_difference_by_hand() -> None:
    candidate, before = [1, 1, 0, 1, 0, 0, 1, 0], [0, 1, 0, 0, 0, 0, 1, 1]
    found = paired_difference(candidate, before, list("aabbccdd"))
    bound = found.bound
    means = np.array([0.5, 0.5, 0.0, -0.5])
    t3 = 2.3533634
    assert bound.estimate == pytest.approx(means.mean())
    assert bound.upper - bound.estimate >= t3 * means.std(ddof=1) / 2 - 1e-9
    assert (bound.n, bound.clusters, bound.events) == (8, 4, 3)
    assert (found.worse, found.better, found.mcnemar) == (2, 1, 1.0)
    large = paired_difference(candidate * 50, before * 50, [f"{i // 2}" for i in range(400)])
    spread = np.tile(means, 50).std(ddof=1) / np.sqrt(200)
    assert large.student[1] - large.bound.estimate == pytest.approx(1.6525 * spread, rel=1e-3)
    assert large.bootstrap is not None
    assert large.bootstrap[1] - large.bound.estimate == pytest.approx(1.6525 * spread, rel=0.1)
    assert large.bound.upper >= max(large.student[1], large.bootstrap[1])
    assert large.bound.upper == pytest.approx(max(large.student[1], large.bootstrap[1]), abs=0.01)


def test_models_that_never_differ_are_not_known_to_be_equal() -> None:
    found = paired_difference([1, 0] * 30, [1, 0] * 30, labels([2] * 30))
    bound = found.bound
    assert found.bootstrap is None
    assert found.mcnemar == 1
    n_eff = float(declared_effective_n([2] * 30))
    assert bound.estimate == 0
    assert bound.upper == pytest.approx(1 - 0.05 ** (1 / n_eff)) == -bound.lower


def test_a_difference_seen_through_a_scorer_is_larger() -> None:
    rng = np.random.default_rng(3)
    candidate, before = rng.random(2000) < 0.4, rng.random(2000) < 0.3
    families = [f"{i // 2}" for i in range(2000)]
    plain = paired_difference(candidate, before, families).bound
    seen = paired_difference(candidate, before, families, calibration(true_positives=800)).bound
    youden = 0.8 + 0.99 - 1
    assert seen.estimate == pytest.approx(plain.estimate / youden)
    assert seen.upper > plain.upper / youden
    assert seen.upper - seen.lower > (plain.upper - plain.lower) / youden
    assert paired_difference(candidate, before, families, GOOD).bound.upper == pytest.approx(plain.upper, abs=1e-3)


def test_a_difference_is_not_made_larger_by_the_doubt_about_few_labels() -> None:
    """12 positives, as a shipped scorer has: adjusting their counts alone would make J smaller, and the bound between
    zero and the estimate larger."""
    errors = ScorerErrors(0.75, 12, 0.976, 1_733)
    lower, estimate, upper = through_scorer(0.05, 0.06, 0.07, errors, 0.95)
    youden, margin = 0.75 + 0.976 - 1, float(errors.youden_margin(0.95)[1])
    a = youden**2 - margin**2
    assert float(estimate) == pytest.approx(0.06 / youden)
    root = np.sqrt((0.06 * youden) ** 2 - a * (0.06**2 - 0.01**2))
    assert float(lower) == pytest.approx((0.06 * youden - root) / a)
    adjusted = float(errors.adjusted().youden)
    assert adjusted < youden
    a = adjusted**2 - margin**2
    root = np.sqrt((0.06 * adjusted) ** 2 - a * (0.06**2 - 0.01**2))
    assert float(upper) == pytest.approx((0.06 * adjusted + root) / a)
    turned = through_scorer(-0.07, -0.06, -0.05, errors, 0.95)
    assert [float(one) for one in turned] == pytest.approx([-float(upper), -float(estimate), -float(lower)])


def test_coverage_of_a_paired_difference() -> None:
    rng = np.random.default_rng(13)
    covers = []
    for rate, more in itertools.product((0.05, 0.3), (0.0, 0.1)):
        for _ in range(500):
            shared = rng.random(120) < rate
            candidate = shared | (rng.random(120) < more)
            before = shared | (rng.random(120) < 0.02)
            truth = (1 - rate) * (more - 0.02)
            bound = paired_difference(candidate, before, labels([3] * 40)).bound
            covers.append((bound.upper >= truth, bound.lower <= truth))
        assert np.mean(covers[-500:], axis=0).min() >= 0.92


def test_the_bootstrap_mends_what_student_misses_with_skew_differences() -> None:
    """Families that agree within, and few of them worse: the cell of a grid in which Student's bound was lowest."""
    rng, covers = np.random.default_rng(13), []
    for _ in range(400):
        shared = np.where(rng.random(40) < 0.5, 1, 0).repeat(3)

        def draw() -> Any:
            return np.where(shared, rng.random(40).repeat(3), rng.random(120))  # noqa: B023 - called at once

        common = draw() < 0.05
        candidate, before = common | (draw() < 0.1), common | (draw() < 0.02)
        found = paired_difference(candidate, before, labels([3] * 40))
        truth = 0.95 * 0.08
        covers.append((found.bound.upper >= truth, found.student[1] >= truth, found.bound.lower <= truth))
    both, student, lower = np.mean(covers, axis=0)
    assert both >= 0.92
    assert both >= student
    assert lower >= 0.92


def test_the_bootstrap_is_the_same_every_time_and_knows_nothing_of_clusters_all_alike() -> None:
    rng = np.random.default_rng(4)
    sums, sizes = rng.integers(-2, 3, 30), np.full(30, 3)
    assert cluster_bootstrap(sums, sizes) == cluster_bootstrap(sums, sizes)
    assert np.isnan(cluster_bootstrap(np.full(30, 3), sizes)).all()
    # Many at once, as the benchmark asks, or one by one: the same.
    rows = rng.integers(-2, 3, (3, 30))
    together = np.array(cluster_bootstrap(rows, sizes))
    assert together == pytest.approx(np.array([cluster_bootstrap(row, sizes) for row in rows]).T)


def test_the_p_value_of_a_difference_belongs_to_its_bounds() -> None:
    rng = np.random.default_rng(8)
    sizes = np.full(40, 3)
    for shift in (0.0, 0.4, 1.0):
        sums = np.clip(rng.normal(shift, 1, 40).round(), -3, 3)
        p = difference_p(sums, sizes)
        assert p == pytest.approx(difference_p(-sums, sizes))
        for confidence in (0.9, 0.95, 0.975, 0.99):
            low, high = difference_bounds(sums, sizes, confidence)
            if abs(p - 2 * (1 - confidence)) > 2e-3:  # two draws of the bootstrap
                assert (low > 0 or high < 0) == (p < 2 * (1 - confidence))
    assert difference_p(np.zeros(40), sizes) == 1
    # Five clusters, one pair of three worse in each: no spread at all, and still not beyond doubt.
    assert difference_p(np.full(5, 1.0), np.full(5, 3)) > 0.05


def test_holm_against_its_definition() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1, 1]
    assert holm([]) == []
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(StatisticsError, match="p value lies in"):
            holm([0.5, wrong])


def test_holm_claims_nothing_false_more_often_than_it_says() -> None:
    rng = np.random.default_rng(9)
    p_values = rng.random((4_000, 8))
    p_values[:, :3] /= 1_000  # three differences that are there
    false = [any(p <= 0.05 for p in holm(list(row))[3:]) for row in p_values]
    assert 0.03 < np.mean(false) <= 0.06
    assert np.mean([any(p <= 0.05 for p in row[3:]) for row in p_values]) > 0.2


def test_mcnemar_is_the_exact_binomial() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(1, 9) == mcnemar(9, 1) == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar(5, 5) == 1
    assert paired_difference([0.5, 0, 1, 1], [0, 0, 1, 0], list("aabb")).mcnemar is None


def test_pairs_that_are_missing_are_an_error() -> None:
    for mine, its in (([1, 0, 1], [1, 0]), ([1, 0, 1], [1]), ([1.0, float("nan"), 0], [1, 1, 1]), ([1, 0, 1], 1)):
        with pytest.raises(StatisticsError, match="pairs are missing"):
            paired_difference(mine, its, list("aab"))
    with pytest.raises(StatisticsError, match="no samples"):
        paired_difference([], [], [])
    with pytest.raises(StatisticsError, match="one cluster"):
        paired_difference([1, 0], [0, 0], ["a", "a"])


def grouped(
    rates: dict[str, float], families: int, rng: np.random.Generator
) -> tuple[list[bool], list[str], list[str]]:
    rows = [(bool(rng.random() < rate), name, f"f{i}") for i in range(families) for name, rate in rates.items()]
    events, groups, places = zip(*rows, strict=True)
    return list(events), list(groups), list(places)


def test_the_gap_is_between_the_two_groups_that_differ_most() -> None:
    rng = np.random.default_rng(5)
    gap = group_gap(*grouped({"a": 0.0, "b": 0.5, "c": 0.1}, 80, rng))
    widest = max(gap.pairs, key=lambda pair: pair.estimate)
    assert (widest.high, widest.low, widest.families) == ("b", "a", 80)
    assert gap.estimate == widest.estimate == pytest.approx(gap.rates["b"] - gap.rates["a"])
    assert gap.lower < gap.estimate < gap.upper
    assert len(gap.pairs) == 3
    assert gap.pairs[0].upper == gap.upper
    # Bonferroni: three pairs, two directions.
    d = np.array(grouped({"a": 0.0, "b": 0.5, "c": 0.1}, 80, np.random.default_rng(5))[0]).reshape(80, 3)
    spread = (d[:, 1].astype(float) - d[:, 0]).std(ddof=1) / np.sqrt(80)
    assert gap.estimate - gap.lower == pytest.approx(2.4460 * spread, rel=2e-3)


def test_groups_that_never_differ_are_not_known_to_be_equal() -> None:
    gap = group_gap([False] * 40, ["a", "b"] * 20, [f"f{i // 2}" for i in range(40)])
    assert (gap.estimate, gap.lower) == (0, 0)
    assert gap.upper == pytest.approx(1 - 0.05 ** (1 / 20))


def test_a_gap_needs_groups_that_share_families() -> None:
    for events, groups, families, cause in (
        ([], [], [], "no samples"),
        ([True, False], ["a", "a"], ["x", "y"], "one group"),
        ([True, False], ["a", "b"], ["x", "x"], "no two template families"),
        ([True] * 6, list("aabbcc"), ["x", "y", "x", "y", "u", "v"], "group c"),
        ([True], ["a", "b"], ["x", "y"], "differ in number"),
        ([True] * 2, ["a", ""], ["x", "y"], "sample 2 has no group"),
        ([True] * 2, ["a", "b"], ["x", ""], "sample 2 has no cluster"),
    ):
        with pytest.raises(StatisticsError, match=cause):
            group_gap(events, groups, families)


def test_a_gap_seen_through_a_scorer_is_larger() -> None:
    parts = grouped({"a": 0.1, "b": 0.5}, 100, np.random.default_rng(5))
    plain, seen = group_gap(*parts), group_gap(*parts, calibration(true_positives=800))
    assert seen.estimate == pytest.approx(plain.estimate / (0.8 + 0.99 - 1))
    assert seen.upper > plain.upper


def test_a_difference_of_two_rates_by_hand() -> None:
    # 100 pairs of a sample each, 9 worse, 2 better.
    sums, ones = np.array([1] * 9 + [-1] * 2 + [0] * 89), np.ones(100)
    low, high = net_bounds(sums, ones)
    _, low_p, high_p = clustered_bounds(sums > 0, ones)
    _, low_q, high_q = clustered_bounds(sums < 0, ones)
    c = np.sqrt(0.09 * 0.02 / (0.91 * 0.98))  # of a multinomial
    a, b = float(high_p) - 0.09, 0.02 - float(low_q)
    assert float(high) == pytest.approx(0.07 + np.sqrt(a * a + b * b + 2 * c * a * b))
    a, b = 0.09 - float(low_p), float(high_q) - 0.02
    assert float(low) == pytest.approx(0.07 - np.sqrt(a * a + b * b + 2 * c * a * b))
    # The other way round; and none that differ: the exact bound for no event, as `cluster_t` has it.
    assert np.array(net_bounds(-sums, ones)) == pytest.approx(np.array([-high, -low]))
    assert np.array(net_bounds(0 * sums, ones)) == pytest.approx(np.array(cluster_t(0 * sums, ones)))


def test_coverage_of_a_gap_of_rare_events() -> None:
    """Where Student's bound alone covers 88%."""
    rng = np.random.default_rng(15)
    sums = rng.binomial(1, np.array([[0.05], [0.0]]), (1_000, 2, 200))
    [pair] = pair_bounds(sums, np.ones((2, 200)))
    assert (pair.upper >= 0.05).mean() >= 0.94


def test_coverage_of_a_gap() -> None:
    rng = np.random.default_rng(14)
    for rates in ({"a": 0.02, "b": 0.12}, {"a": 0.1, "b": 0.1, "c": 0.3}, {"a": 0.05, "b": 0.05, "c": 0.05}):
        truth = max(rates.values()) - min(rates.values())
        gaps = [group_gap(*grouped(rates, 40, rng)) for _ in range(400)]
        assert np.mean([gap.upper >= truth for gap in gaps]) >= 0.92
        assert np.mean([gap.lower <= truth for gap in gaps]) >= 0.92


# -- planning --------------------------------------------------------------------------------------------------------


def test_the_sample_that_would_settle_does() -> None:
    bound = clustered_rate([True] * 8 + [False] * 92, labels([1] * 100))

    def bounds(factor: float) -> tuple[float, float]:
        n = bound.effective_n * factor
        lower, upper = clopper_pearson(0.08 * n, n)
        return float(lower), float(upper)

    for threshold in (0.1, 0.06):
        needed = sample_to_settle(bounds, 100, threshold)
        assert needed is not None
        lower, upper = bounds(needed / 100)
        assert upper < threshold or lower > threshold
        lower, upper = bounds(needed / 100 * 0.98)
        assert lower < threshold < upper
    assert sample_to_settle(bounds, 100, 0.08) is None
