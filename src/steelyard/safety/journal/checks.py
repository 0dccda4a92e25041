"""What a journal must hold: every rule of the package's docstring, canaries apart."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from steelyard.safety.battery import Battery, ProbeSet
from steelyard.safety.journal.canaries import check_canaries
from steelyard.safety.journal.lines import (
    CanaryLine,
    End,
    Finding,
    Generation,
    Plan,
    Scored,
    ScoreLine,
    Stopped,
    key_of,
)
from steelyard.safety.journal.planned import expected_keys, sample_seed
from steelyard.safety.journal.reading import Journal

CONSTANT_AFTER = 20
_VERDICTS = frozenset({0.0, 1.0})
_FEW_LINES = 200_000  # a plan of more lines, and of so many times those that are there, is not followed
_UNDONE = 10


def check_journal(journal: Journal, battery: Battery) -> list[Finding]:
    """Every rule of the package's docstring; an empty list where all hold. One finding a code, not one a line."""
    return [
        *_check_plan(journal.plan, battery),
        *_check_lines(journal, battery),
        *_check_generations(journal, battery),
        *_check_scores(journal),
        *check_canaries(journal),
    ]


def _some(keys: Sequence[object]) -> str:
    shown = [" ".join(map(str, key)) if isinstance(key, tuple) else str(key) for key in keys[:3]]
    return ", ".join(shown) + (f" and {len(keys) - 3:,} more" if len(keys) > 3 else "")


def _check_plan(plan: Plan, battery: Battery) -> Iterator[Finding]:
    if plan.battery != battery.digest or plan.seed != battery.seed:
        yield Finding(
            "battery", f"the run was planned with battery {plan.battery[:16]}, this one is {battery.digest[:16]}"
        )
    if plan.subject.digest != plan.subject_digest:
        yield Finding("subject", "the plan's subject does not have the digest that the plan names")
    if set(plan.scorers) != set(battery.scorers) or set(plan.canaries) != set(battery.scorers):
        yield Finding("scorers", f"the plan's scorers are {_some(sorted(plan.scorers))}, not those of the battery")
    for name, identity in sorted(plan.scorers.items()):
        sides = Counter((canary.category, canary.expected) for canary in plan.canaries.get(name, ()))
        lacking = [c for c in sorted(identity.categories) if not (sides[c, "above"] and sides[c, "below"])]
        if lacking:
            yield Finding("canary", f"scorer {name} has no canaries of both kinds for {_some(lacking)}")
        strange = sorted({c for c, _ in sides} - set(identity.categories))
        if strange:
            yield Finding("canary", f"scorer {name} has canaries for {_some(strange)}, which it does not cover")
    wanted = {(probe.id, i) for part in battery.sets for probe in part.probes for i in range(part.samples)}
    planned = Counter(sample for batch in plan.batches for sample in batch)
    for what, keys in (
        ("leaves out", sorted(wanted - planned.keys())),
        ("asks twice for", sorted(key for key, count in planned.items() if count > 1)),
        ("asks for unknown", sorted(planned.keys() - wanted)),
    ):
        if keys:
            yield Finding("plan", f"the plan {what} {_some(keys)}")
    sets = {probe.id: probe_set.name for probe_set in battery.sets for probe in probe_set.probes}
    mixed = [i for i, batch in enumerate(plan.batches) if len({sets.get(probe) for probe, _ in batch}) != 1]
    if mixed:
        yield Finding("plan", f"batch {_some(mixed)} of the plan is empty or mixes sets")
    large = [i for i, batch in enumerate(plan.batches) if len(batch) > battery.batch_size]
    if large:
        yield Finding("plan", f"batch {_some(large)} of the plan is larger than {battery.batch_size}")


def _planned_lines(plan: Plan) -> int:
    """At least as many as `expected_keys` gives, without making them: a hostile plan may ask for billions."""
    each = sum(len(canaries) for canaries in plan.canaries.values())
    return 1 + sum(2 + each + len(samples) * (1 + len(plan.canaries)) for samples in plan.batches)


def _check_lines(journal: Journal, battery: Battery) -> Iterator[Finding]:
    planned = _planned_lines(journal.plan)
    if planned > max(_FEW_LINES, _UNDONE * len(journal.entries)):
        yield Finding("unfinished", f"the plan asks for some {planned:,} lines, here are {len(journal.entries):,}")
        return
    actual = [key_of(entry) for entry in journal.entries]
    expected = list(expected_keys(journal.plan, battery))
    last = journal.entries[-1] if journal.entries else None
    if isinstance(last, Stopped):
        yield Finding("stopped", f"the run was stopped early: {last.reason}")
    elif journal.torn or not isinstance(last, End):
        done = sum(isinstance(entry, Scored) for entry in journal.entries)
        yield Finding("unfinished", f"the run is not finished: {done:,} of {len(journal.plan.batches):,} batches are")
    if actual == expected and not journal.torn:
        return
    counts = Counter(actual)
    wanted = set(expected)
    missing = [key for key in expected if key not in counts]
    twice = [key for key, count in counts.items() if count > 1]
    unknown = [key for key in counts if key not in wanted and key != ("stopped",)]
    if missing and missing != [("end",)]:
        yield Finding("missing", f"{len(missing):,} lines are missing: {_some(missing)}")
    if twice:
        yield Finding("duplicate", f"{len(twice):,} lines occur more than once: {_some(twice)}")
    if unknown:
        yield Finding("unknown", f"{len(unknown):,} lines belong to no plan: {_some(unknown)}")
    seen = [key for key in dict.fromkeys(actual) if key in wanted]
    present = set(seen)
    if seen != [key for key in expected if key in present]:
        yield Finding("order", "lines are not in the order of the plan")


def _check_generations(journal: Journal, battery: Battery) -> Iterator[Finding]:
    sets = _sets_by_probe(battery)
    seeds, lengths, silent = [], [], []
    for entry in journal.entries:
        if not isinstance(entry, Generation) or entry.probe not in sets:
            continue
        key = (entry.probe, entry.sample)
        if entry.seed != sample_seed(battery.seed, *key):
            seeds.append(key)
        if entry.tokens is None or entry.prompt_digest is None or entry.prompt_tokens is None:
            silent.append(key)
        else:
            limit = sets[entry.probe].decoding.max_tokens
            if len(entry.tokens) > limit or (entry.finish == "length" and len(entry.tokens) != limit):
                lengths.append(key)
    if seeds:
        yield Finding("seed", f"{len(seeds):,} samples have another seed than the derived one: {_some(seeds)}")
    if lengths:
        yield Finding("length", f"{len(lengths):,} completions have an impossible length: {_some(lengths)}")
    if silent:
        yield Finding("no-tokens", f"{len(silent):,} generations come without token ids: {_some(silent)}")


def _check_scores(journal: Journal) -> Iterator[Finding]:
    errors: dict[str, list[str]] = defaultdict(list)
    texts: dict[str, set[tuple[str, int]]] = defaultdict(set)
    values: dict[tuple[str, str], set[float]] = defaultdict(set)
    different: dict[str, set[str]] = defaultdict(set)
    completion = {(entry.probe, entry.sample): entry.text for entry in journal.generations()}
    for entry in journal.entries:
        if not isinstance(entry, ScoreLine) or entry.scorer not in journal.plan.scorers:
            continue
        where = f"{entry.probe} {entry.sample}"
        if entry.values is None:
            errors[entry.scorer].append(f"{where}: {entry.error}")
        elif entry.values.keys() != journal.plan.scorers[entry.scorer].categories.keys():
            errors[entry.scorer].append(f"{where}: not exactly the scorer's categories")
        elif not all(0 <= value <= 1 for value in entry.values.values()):
            errors[entry.scorer].append(f"{where}: not a probability")
        else:
            for category, value in entry.values.items():
                values[entry.scorer, category].add(value)
            different[entry.scorer].add(completion.get((entry.probe, entry.sample), ""))
            texts[entry.scorer].add((entry.probe, entry.sample))
    for scorer, reasons in sorted(errors.items()):
        yield Finding("score-error", f"scorer {scorer} failed on {len(reasons):,} completions; {reasons[0]}")
    told: dict[tuple[str, str], set[float]] = defaultdict(set)
    for entry in journal.entries:
        if isinstance(entry, CanaryLine) and entry.value is not None:
            told[entry.scorer, entry.category].add(entry.value)
    for (scorer, category), found in sorted(values.items()):
        verdicts = (found | told[scorer, category]) <= _VERDICTS
        if len(found) == 1 and len(different[scorer]) >= CONSTANT_AFTER and not verdicts:
            yield Finding(
                "constant-scores",
                f"scorer {scorer} gave all {len(texts[scorer]):,} completions the same {category}",
            )


def _sets_by_probe(battery: Battery) -> dict[str, ProbeSet]:
    return {probe.id: probe_set for probe_set in battery.sets for probe in probe_set.probes}


def identical_samples(journal: Journal) -> float | None:
    """Of a probe's k samples, the share that repeats another, (k - different) / (k - 1): the mean over the probes with
    several; None where none has. 0: all differ, 1: all are one text."""
    texts: dict[str, list[str]] = defaultdict(list)
    for entry in journal.generations():
        texts[entry.probe].append(entry.text)
    repeated = [found for found in texts.values() if len(found) > 1]
    shares = [(len(found) - len(set(found))) / (len(found) - 1) for found in repeated]
    return sum(shares) / len(shares) if shares else None
