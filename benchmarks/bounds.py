"""Do the bounds hold? Every bound that decides on a release, simulated on a declared grid: `make bench-statistics`.

Printed: the lowest coverage of a nominal one-sided 95% bound over all cells [coverage_min], the largest mean coverage
of a kind of bound [coverage_mean], the highest share of releases where exactly one true rate sits at its threshold
[false_release], of stops of a run whose rate sits at its threshold [false_stop], and for users the number of prompts at
which a model at half of a threshold is released with 80% [power].

What the data are like stands in `bounds_data.py`.

A cell is written to `out/statistics_cells.jsonl` when it is done (`bounds_run.py`), and a run that was stopped goes on
from there.

The rule on Monte-Carlo error: the estimate itself must lie within the bar, with no allowance. At 95% its standard error
is 0.22 points with 10,000 replications and 0.34 with 4,000, so the lowest of many is low by chance.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bounds_data import (
    Cell,
    Floats,
    Scorers,
    beta_binomial,
    calibrated,
    gap_scorers,
    group_sums,
    histograms,
    paired_histograms,
    rate_bounds,
    seen_counts,
    shipped,
)
from bounds_run import FALSE_RELEASE, LEAST, POWER, POWER_ICC, Task, simulate_all, summarise
from harness import OUT, report

from steelyard.safety import statistics
from steelyard.safety.battery import RateMetric, load_battery
from steelyard.safety.criteria import Measurement, judge
from steelyard.safety.policy import Criterion, load_policy
from steelyard.safety.run import STOP_CHECKS, STOP_CONFIDENCE, STOP_MINIMUM
from steelyard.safety.statistics import ScorerErrors

SEED = 20240415
SLACK = 5e-10  # bounds are judged at nine decimals, as a report's


@dataclass(frozen=True)
class Grid:
    """What is simulated. `families`: prompts of one template family, the cluster (1: every prompt its own)."""

    runs: int = 10_000
    rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.5)
    prompts: tuple[int, ...] = (50, 200, 1_000, 5_000)
    samples: tuple[int, ...] = (1, 5, 25)
    icc: tuple[float, ...] = (0.0, 0.1, 0.3, 0.6)
    families: tuple[int, ...] = (1, 5)
    # The sub-grid of paired differences: a bootstrap of 2,000 draws.
    paired_runs: int = 10_000
    paired: tuple[tuple[float, float, float], ...] = (  # worse, better, both
        (0.002, 0.002, 0.01),
        (0.02, 0.002, 0.01),
        (0.02, 0.02, 0.1),
        (0.1, 0.02, 0.2),
        (0.2, 0.2, 0.2),
    )
    paired_prompts: tuple[int, ...] = (50, 200, 1_000)
    paired_icc: tuple[float, ...] = (0.0, 0.3, 0.6)
    # Gaps, through the scorers of the batteries' gap metrics; the least rate and the highest.
    gap_runs: int = 10_000
    gaps: tuple[tuple[float, float], ...] = ((0.0, 0.05), (0.02, 0.02), (0.02, 0.12), (0.1, 0.3), (0.3, 0.5))
    groups: tuple[int, ...] = (2, 4, 12)
    templates: tuple[int, ...] = (20, 60, 200)
    gap_samples: tuple[int, ...] = (1, 5)
    shared: tuple[float, ...] = (0.0, 0.3)
    shapes: tuple[tuple[int, int], ...] = ((60, 4), (200, 3), (500, 5))  # clusters, samples of a cluster


QUICK = Grid(
    runs=1_000,
    rates=(0.003, 0.03, 0.3),
    prompts=(50, 1_000),
    icc=(0.0, 0.6),
    families=(1,),
    paired_runs=400,
    paired=((0.02, 0.002, 0.01), (0.1, 0.02, 0.2)),
    paired_prompts=(50, 200),
    paired_icc=(0.0, 0.6),
    gap_runs=400,
    gaps=((0.02, 0.12), (0.3, 0.5)),
    groups=(2, 4),
    templates=(20, 60),
    gap_samples=(1,),
    shapes=((60, 4),),
)
POWER_THRESHOLDS = (0.01, 0.02, 0.05, 0.1, 0.3)
POWER_RUNS, POWER_PROMPTS = 2_000, 200_000


# -- coverage --------------------------------------------------------------------------------------------------------


def covered(kind: str, cell: Cell, truth: float, lower: Floats, upper: Floats) -> list[Cell]:
    """Coverage of the two bounds, as two cells."""
    return [
        {"bound": f"{kind}.lower", "coverage": float((lower <= truth + SLACK).mean())} | cell,
        {"bound": f"{kind}.upper", "coverage": float((upper >= truth - SLACK).mean())} | cell,
    ]


def rate_cells(grid: Grid, scorers: Scorers) -> Iterator[Cell]:
    for name in (None, *scorers):
        for rate, prompts, samples, icc, family in itertools.product(
            grid.rates, grid.prompts, grid.samples, grid.icc, grid.families if name is None else (1,)
        ):
            if samples * family > 1 or icc == grid.icc[0]:
                cell = {"rate": rate, "prompts": prompts, "samples": samples, "icc": icc, "family": family}
                yield cell | {"scorer": name, "runs": grid.runs}


def rate_cell(cell: Cell, errors: ScorerErrors | None, rng: np.random.Generator) -> list[Cell]:
    clusters, size, runs = cell["prompts"] // cell["family"], cell["samples"] * cell["family"], cell["runs"]
    drawn = histograms(clusters, size, cell["rate"], cell["icc"], errors, [runs], rng)
    known = None if errors is None else calibrated(errors, runs, rng)
    kind = "rate" if errors is None else "corrected"
    return covered(kind, cell, cell["rate"], *rate_bounds(drawn, known))


def paired_cells(grid: Grid, scorers: Scorers) -> Iterator[Cell]:
    for name in (None, *scorers):
        for outcomes, prompts, samples, icc in itertools.product(
            grid.paired, grid.paired_prompts, grid.samples if name is None else (1, 5), grid.paired_icc
        ):
            if samples > 1 or icc == grid.paired_icc[0]:
                cell = {"outcomes": outcomes, "prompts": prompts, "samples": samples, "icc": icc}
                yield cell | {"scorer": name, "runs": grid.paired_runs}


def paired_cell(cell: Cell, errors: ScorerErrors | None, rng: np.random.Generator) -> list[Cell]:
    """`difference_bounds` are the widest of three: where two of them cover, so do they, and the bootstrap, which is
    slow, is left for the replications that the other two miss."""
    size, truth = cell["samples"], cell["outcomes"][0] - cell["outcomes"][1]
    drawn, values = paired_histograms(cell, errors, rng), np.arange(-size, size + 1)
    mean = drawn @ values / (cell["prompts"] * size)
    known = None if errors is None else calibrated(errors, cell["runs"], rng, statistics.CONFIDENCE)
    two = [bounds(values, size, number=drawn) for bounds in (statistics.cluster_t, statistics.net_bounds)]
    low, high = np.fmin(two[0][0], two[1][0]), np.fmax(two[0][1], two[1][1])
    lower, _, upper = statistics.through_scorer(low, mean, high, known, statistics.CONFIDENCE)
    missed = np.flatnonzero((lower > truth + SLACK) | (upper < truth - SLACK))
    if missed.size:
        sums = rng.permuted(np.array([np.repeat(values, counts) for counts in drawn[missed]], float), axis=1)
        low[missed], high[missed] = statistics.difference_bounds(sums, np.full(cell["prompts"], size))
        lower, _, upper = statistics.through_scorer(low, mean, high, known, statistics.CONFIDENCE)
    return covered("paired", cell, truth, lower, upper)


def gap_cells(grid: Grid, scorers: Scorers) -> Iterator[Cell]:
    for name in (None, *sorted(gap_scorers() & set(scorers))):
        for rates, groups, others, templates, samples, shared in itertools.product(
            grid.gaps,
            grid.groups,
            ("low", "halves", "middle"),
            grid.templates,
            grid.gap_samples if name is None else (1,),
            grid.shared,
        ):
            if others == "low" or (groups > 2 and rates[0] != rates[1]):
                cell = {"rates": rates, "groups": groups, "others": others, "templates": templates}
                yield cell | {"samples": samples, "shared": shared, "scorer": name, "runs": grid.gap_runs}


def gap_cell(cell: Cell, errors: ScorerErrors | None, rng: np.random.Generator) -> list[Cell]:
    """Simulated a tenth of the replications at a time, and no further once both coverages lie three standard errors
    over what is asked."""
    low, high = cell["rates"]
    truth, runs, some = high - low, 0, cell["runs"] // 10
    covers = np.zeros(2)
    while runs < cell["runs"] and (runs == 0 or min(covers / runs) < LEAST + 3 * np.sqrt(LEAST * (1 - LEAST) / runs)):
        lower, upper = gap_bounds(cell | {"runs": some}, errors, rng)
        covers += (lower <= truth + SLACK).sum(), (upper >= truth - SLACK).sum()
        runs += some
    return [
        {"bound": f"gap.{side}", "coverage": float(share)} | cell | {"runs": runs}
        for side, share in zip(("lower", "upper"), covers / runs, strict=True)
    ]


def gap_bounds(cell: Cell, errors: ScorerErrors | None, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """(lower, upper) of the worst gap, from histograms of every pair's differences."""
    samples, groups = cell["samples"], cell["groups"]
    sums = group_sums(cell, errors, rng)
    width = 2 * samples + 1
    offsets = width * np.arange(len(sums))[:, None] + samples
    pairs = [
        np.bincount((offsets + sums[:, i] - sums[:, j]).ravel(), minlength=width * len(sums)).reshape(-1, width)
        for i, j in itertools.combinations(range(groups), 2)
    ]
    sure = 1 - (1 - statistics.CONFIDENCE) / (2 * len(pairs))  # as the lower bound asks
    known = None if errors is None else calibrated(errors, len(sums), rng, sure)
    values = np.arange(-samples, samples + 1) / samples
    found = statistics.difference_of_groups(values, samples, np.array(pairs), len(pairs), known, statistics.CONFIDENCE)
    return found[1].max(axis=0), found[3].max(axis=0)


# -- decisions -------------------------------------------------------------------------------------------------------


def release_cells(grid: Grid, scorers: Scorers) -> Iterator[Cell]:
    """Every criterion on a rate of both policies at its threshold, the others at a tenth of theirs."""
    battery = {metric.id: metric for metric in load_battery("quick").metrics}
    for policy in map(load_policy, ("preview", "public")):
        limits = {one.metric: one.max for one in policy.criteria if battery[one.metric].kind != "gap"}
        used = {
            name: f"{metric.scorer}.{metric.category}.{metric.event}"
            for name in limits
            if isinstance(metric := battery[name], RateMetric)
        }
        for metric, (clusters, size), icc in itertools.product(limits, grid.shapes, (0.1, 0.3, 0.6)):
            cell = {"policy": policy.name, "at": metric, "limits": limits, "scorers": used, "clusters": clusters}
            yield cell | {"size": size, "icc": icc, "runs": grid.runs, "scorer": used.get(metric)}


def release_cell(cell: Cell, scorers: Scorers, rng: np.random.Generator) -> list[Cell]:
    """The share of runs in which `criteria.judge` passes every criterion; in a cell within three standard errors of
    what is asked, or over it, of ten times as many runs."""
    released, runs = 0, 0
    while runs == 0 or (
        runs < 10 * cell["runs"]
        and released / runs > FALSE_RELEASE - 3 * np.sqrt(FALSE_RELEASE * (1 - FALSE_RELEASE) / runs)
    ):
        released += releases(cell, scorers, rng)
        runs += cell["runs"]
    said = {key: cell[key] for key in ("policy", "at", "clusters", "size", "icc", "scorer")}
    return [{"bound": "release", "released": released / runs, "runs": runs} | said]


def releases(cell: Cell, scorers: Scorers, rng: np.random.Generator) -> int:
    """How many of the cell's runs are released."""
    passed = cell["runs"]
    for name in sorted(cell["limits"], key=lambda name: name != cell["at"]):  # that one first: few are left to judge
        if not passed:
            break
        limit, errors = cell["limits"][name], scorers.get(cell["scorers"].get(name, ""))
        rate = limit if name == cell["at"] else limit / 10
        drawn = histograms(cell["clusters"], cell["size"], rate, cell["icc"], errors, [passed], rng)
        known = None if errors is None else calibrated(errors, passed, rng)
        bounds = zip(*rate_bounds(drawn, known), strict=True)
        floors = np.zeros(passed) if known is None else np.asarray(statistics.floor_of(known))
        criterion = Criterion(metric=name, max=limit)
        found = (
            Measurement.model_construct(lower=lower, upper=upper, floor=floor, problem=None)
            for (lower, upper), floor in zip(bounds, floors, strict=True)
        )
        passed = sum(judge(one, criterion) == "PASS" for one in found)
    return passed


def stop_cells(grid: Grid, scorers: Scorers) -> Iterator[Cell]:
    for name, rate, (clusters, size), icc in itertools.product(
        (None, *scorers), (0.02, 0.1, 0.3), grid.shapes, (0.1, 0.3, 0.6)
    ):
        yield {"rate": rate, "clusters": clusters, "size": size, "icc": icc, "scorer": name, "runs": grid.runs // 4}


def stop_cell(cell: Cell, errors: ScorerErrors | None, rng: np.random.Generator) -> list[Cell]:
    """The share of runs stopped at any of the looks, each at the stop's confidence, with the rate at the threshold."""
    runs, size = cell["runs"], cell["size"]
    share = seen_counts(size, beta_binomial(size, cell["rate"], cell["icc"]), errors)
    drawn = rng.multinomial(cell["clusters"] // STOP_CHECKS, share / share.sum(), size=(runs, STOP_CHECKS))
    known = None if errors is None else calibrated(errors, runs, rng)
    stopped = np.zeros(runs, dtype=bool)
    so_far = drawn.cumsum(axis=1)
    for look in range(STOP_CHECKS - 1):
        if so_far[0, look].sum() * size >= STOP_MINIMUM:
            stopped |= rate_bounds(so_far[:, look], known, STOP_CONFIDENCE)[0] > cell["rate"]
    return [{"bound": "stop", "stopped": float(stopped.mean())} | cell]


def power_cells(grid: Grid, scorers: Scorers) -> Iterator[Cell]:
    for name, threshold, samples in itertools.product((None, *scorers), POWER_THRESHOLDS, (1, 5)):
        yield {"threshold": threshold, "samples": samples, "icc": POWER_ICC, "scorer": name, "runs": POWER_RUNS}


def power_cell(cell: Cell, errors: ScorerErrors | None, rng: np.random.Generator) -> list[Cell]:
    """The least number of prompts (to 5%) at which the upper bound lies under the threshold with the power asked for;
    None where POWER_PROMPTS are too few: the calibration is too small."""
    known = None if errors is None else calibrated(errors, cell["runs"], rng)

    def enough(prompts: int) -> bool:
        drawn = histograms(prompts, cell["samples"], cell["threshold"] / 2, cell["icc"], errors, [cell["runs"]], rng)
        upper = rate_bounds(drawn, known)[1]
        allowed = 0 if known is None else np.asarray(statistics.floor_of(known))
        return bool(((upper < cell["threshold"]) & (allowed <= cell["threshold"])).mean() >= POWER)

    low, high = 1, 10
    while not enough(high):
        low, high = high, high * 2
        if high > POWER_PROMPTS:
            return [{"bound": "power", "prompts": None} | cell]
    while high - low > max(1, 0.05 * low):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return [{"bound": "power", "prompts": high} | cell]


# -- the run ---------------------------------------------------------------------------------------------------------

PARTS: dict[str, tuple[Callable[..., Iterator[Cell]], Callable[..., list[Cell]]]] = {
    "rate": (rate_cells, rate_cell),
    "paired": (paired_cells, paired_cell),
    "gap": (gap_cells, gap_cell),
    "release": (release_cells, release_cell),
    "stop": (stop_cells, stop_cell),
    "power": (power_cells, power_cell),
}


def simulate(task: Task) -> list[Cell]:
    """One cell, from a stream of its own."""
    part, number, cell = task
    scorers = shipped()
    rng = np.random.default_rng([SEED, list(PARTS).index(part), number])
    run = PARTS[part][1]
    return run(cell, scorers, rng) if part == "release" else run(cell, scorers.get(cell["scorer"] or ""), rng)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small grid with few replications: for a first look")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="these parts alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=OUT / "statistics_cells.jsonl", help="every cell, a line each")
    options = parser.parse_args()
    grid, scorers = QUICK if options.quick else Grid(), shipped()
    tasks = [(part, i, cell) for part in options.only for i, cell in enumerate(PARTS[part][0](grid, scorers))]
    report("statistics", summarise(simulate_all(tasks, simulate, options.jobs, options.out)))


if __name__ == "__main__":
    main()
