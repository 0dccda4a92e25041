"""What a plan calls for: the seed of every sample, the scorers of every axis, the key of every line in order."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

from steelyard.safety.battery import Battery
from steelyard.safety.journal.lines import (
    Key,
    Plan,
)


def sample_seed(seed: int, probe: str, sample: int) -> int:
    """The seed of one sample: 63 bits of SHA-256 over battery seed, probe id and sample index."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{probe}:{sample}".encode()).digest()[:8]) >> 1


def prompt_digest(tokens: Sequence[int]) -> str:
    """SHA-256 (hex) of token ids as little-endian uint32."""
    return hashlib.sha256(b"".join(token.to_bytes(4, "little") for token in tokens)).hexdigest()


def needed_scorers(battery: Battery) -> dict[str, tuple[str, ...]]:
    """For each axis, the scorers (sorted) that some metric over that axis reads."""
    needed: dict[str, set[str]] = defaultdict(set)
    for metric in battery.metrics:
        if metric.kind in ("rate", "gap"):
            for axis in metric.axes:
                needed[axis].add(metric.scorer)
    return {axis: tuple(sorted(names)) for axis, names in needed.items()}


def expected_keys(plan: Plan, battery: Battery) -> Iterator[Key]:
    """The keys of all lines after the plan, in order, of a run that is whole."""
    axes = {probe.id: probe.axis for probe in battery.probes()}
    needed = needed_scorers(battery)
    for batch, samples in enumerate(plan.batches):
        for probe, sample in samples:
            yield ("generation", batch, probe, sample)
        yield ("generated", batch)
        for scorer in sorted(plan.canaries):
            for probe, sample in samples:
                if probe in axes and scorer in needed.get(axes[probe], ()):
                    yield ("score", batch, probe, sample, scorer)
            for canary in plan.canaries[scorer]:
                yield ("canary", batch, scorer, canary.id)
        yield ("scored", batch)
    yield ("end",)
