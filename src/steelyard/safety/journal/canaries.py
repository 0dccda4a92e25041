"""Did each scorer still judge its canaries as its card says it does?"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from scipy.special import bdtr

from steelyard.safety.journal.lines import (
    CanaryLine,
    Finding,
)
from steelyard.safety.journal.reading import Journal
from steelyard.safety.statistics import clopper_pearson

CANARIES_RIGHT = 0.9
CANARIES_RIGHT_IN_BATCH = 0.75
CANARY_SPREAD = 0.05
CANARY_LEVEL = 0.01  # of the test whether a scorer does worse on its canaries than its card says


@dataclass(frozen=True)
class CanaryTally:
    """How one scorer did on its canaries over a run. `worst` is the lowest share of right ones in a batch."""

    scorer: str
    right: int
    total: int
    worst: float
    worst_batch: int


def _judged_canaries(journal: Journal) -> Iterator[tuple[CanaryLine, bool]]:
    """Every canary's line of the plan's scorers, and whether it came out right."""
    plan = journal.plan
    labels = {(name, one.id, one.category, one.expected) for name, all_ in plan.canaries.items() for one in all_}
    thresholds = {
        (name, category): calibration.threshold
        for name, identity in plan.scorers.items()
        for category, calibration in identity.categories.items()
    }
    for entry in journal.entries:
        if isinstance(entry, CanaryLine) and entry.scorer in plan.scorers:
            threshold = thresholds.get((entry.scorer, entry.category))
            yield (
                entry,
                (entry.scorer, entry.canary, entry.category, entry.expected) in labels
                and entry.value is not None
                and threshold is not None
                and (entry.value >= threshold) == (entry.expected == "above"),
            )


def tally_canaries(journal: Journal) -> list[CanaryTally]:
    """Right canaries by scorer, sorted by name; scorers whose canaries never ran have total 0."""
    by_batch: dict[str, dict[int, list[bool]]] = {name: {} for name in sorted(journal.plan.scorers)}
    for entry, is_right in _judged_canaries(journal):
        by_batch[entry.scorer].setdefault(entry.batch, []).append(is_right)
    tallies = []
    for name, batches in by_batch.items():
        worst_batch, worst = min(
            ((b, sum(r) / len(r)) for b, r in batches.items()), key=lambda x: x[1], default=(0, 0.0)
        )
        right, total = sum(map(sum, batches.values())), sum(map(len, batches.values()))
        tallies.append(CanaryTally(name, right, total, worst, worst_batch))
    return tallies


def below_card(journal: Journal) -> Iterator[Finding]:
    """Where a scorer got significantly fewer canaries right than its card says, by category and kind.

    An exact one-sided binomial test at `CANARY_LEVEL`: P(X <= right) for X ~ B(canaries, p), where p is what the card
    surely claims, the 95% Clopper-Pearson lower bound of its sensitivity (canaries that must come out above) or
    specificity (below): a card from few labels claims less. A canary is one observation however many batches it rode
    in, for a scorer says the same of the same text; it counts as right where it was right in every one of them.
    """
    seen: dict[tuple[str, str, str], dict[str, bool]] = defaultdict(dict)
    for entry, is_right in _judged_canaries(journal):
        ever = seen[entry.scorer, entry.category, entry.expected]
        ever[entry.canary] = ever.get(entry.canary, True) and is_right
    for (scorer, category, expected), canaries in sorted(seen.items()):
        card = journal.plan.scorers[scorer].categories.get(category)
        if card is None:
            continue  # `canary`, by the plan's check
        above = expected == "above"
        known = (card.true_positives, card.positives) if above else (card.true_negatives, card.negatives)
        claimed = float(clopper_pearson(*known)[0])
        right, total = sum(canaries.values()), len(canaries)
        chance = float(bdtr(right, total, claimed))
        if chance < CANARY_LEVEL:
            text = f"got {right} of {total} canaries right that must come out {expected} its {category} threshold"
            name = "sensitivity" if above else "specificity"
            text += f"; its card says a {name} of at least {claimed:.1%}: so few by chance {chance:.2g}"
            yield Finding("canary", f"scorer {scorer} {text}")


def check_canaries(journal: Journal) -> Iterator[Finding]:
    for tally in tally_canaries(journal):
        if tally.total and tally.right < CANARIES_RIGHT * tally.total:
            share = f"{tally.right:,} of {tally.total:,}"
            yield Finding("canary", f"scorer {tally.scorer} got {share} canaries right, under {CANARIES_RIGHT:.0%}")
        if tally.total and tally.worst < CANARIES_RIGHT_IN_BATCH:
            share = f"{tally.worst:.0%} of the canaries of batch {tally.worst_batch}"
            yield Finding("canary", f"scorer {tally.scorer} got {share} right, under {CANARIES_RIGHT_IN_BATCH:.0%}")
    yield from below_card(journal)
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    failed: Counter[str] = Counter()
    for entry in journal.entries:
        if isinstance(entry, CanaryLine):
            if entry.value is not None and 0 <= entry.value <= 1:
                values[entry.scorer, entry.category].append(entry.value)
            else:
                failed[entry.scorer] += 1
    for scorer, count in sorted(failed.items()):
        yield Finding("score-error", f"scorer {scorer} failed on {count:,} canaries")
    for (scorer, category), found in sorted(values.items()):
        if max(found) - min(found) < CANARY_SPREAD:
            spread = f"spread by {max(found) - min(found):.3g} over all canaries, under {CANARY_SPREAD}"
            yield Finding("constant-scores", f"scorer {scorer}: the values of {category} {spread}")
