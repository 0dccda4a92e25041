"""Replay: generate random entries of a journal again from the weights, and compare token by token.

The batch plan is fixed and journaled, so the batch of an entry is generated whole, as it was. On the machine and with
the libraries of the run the tokens come out the same. Elsewhere rounding differs: an entry that came out otherwise is
then read in one forward pass (`Engine.check`), which gives for each token how far it is from being this model's choice.
Rounding moves a choice by a little, at few tokens; tokens of other weights, or made up, are far off at many.
Imports torch, when called.
"""

from __future__ import annotations

import random
import secrets
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from steelyard.base.errors import require_extra
from steelyard.base.progress import Progress, Silent
from steelyard.safety.battery import Battery
from steelyard.safety.journal import Finding, Journal, prompt_digest
from steelyard.safety.run import requests_of

# How far, in logits, rounding may move one token's choice, by the coarser dtype of the two. Measured on SmolLM2-135M,
# greedy, 384 tokens: 4 moved, by up to 0.16, between decoding and one pass in bf16; 9, by up to 0.34, from bf16 to
# float32. A sampled choice has three such terms (see `sampling.margins`), each divided by the temperature.
ROUNDING = {"float32": 0.02, "float16": 0.25, "bfloat16": 1.0, "int8": 1.0}
MOVED = 0.25  # share of an entry's tokens that rounding may move
MAX_THREADS = 256  # more are not asked for, whatever a journal says
MAX_ROWS = 4096


@dataclass(frozen=True)
class Replay:
    """What came of it: entries compared, those that came out token for token, and those that rounding explains.
    `changed` names what the journal says of its endpoint (threads, cpu, torch, ...) that is otherwise here."""

    entries: int
    identical: int
    drifted: int
    changed: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def summary(self) -> str:
        """One line: what came out the same, and what may explain the rest."""
        text = f"{self.identical} of {self.entries} entries token for token"
        if self.drifted:
            here = f" ({', '.join(self.changed)} differ here)" if self.changed else ""
            text += f", {self.drifted} within rounding{here}"
        return text


def replay(
    model: Path, journal: Journal, battery: Battery, entries: int, *, progress: Progress | None = None
) -> Replay:
    """Generate `entries` random entries (chosen by the system's own randomness) of the journal again with `model`.

    Raises SteelyardError where the model cannot be loaded, MissingDependencyError without torch.
    """
    try:
        import torch

        from steelyard.inference.engine import ROWS
        from steelyard.inference.local import DTYPES, LocalEndpoint
        from steelyard.inference.memory import memory_bytes
    except ImportError as error:
        raise require_extra(error.name or "torch", "models") from error

    plan, known = journal.plan, {probe.id for probe in battery.probes()}
    generations = {(entry.probe, entry.sample): entry for entry in journal.generations()}
    where = {
        sample: number
        for number, batch in enumerate(plan.batches)
        if all(sample in generations and sample[0] in known for sample in batch)
        for sample in batch
    }
    if not where:
        return Replay(0, 0, 0, (), (Finding("replay", "steelyard/journal.jsonl: holds no batch that can be replayed"),))
    chosen: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for sample in random.Random(secrets.randbits(128)).sample(sorted(where), min(entries, len(where))):
        chosen[where[sample]].append(sample)

    local = plan.endpoint if plan.endpoint.get("kind") == "local" else {}
    dtype, threads, rows, cache = (local.get(name) for name in ("dtype", "threads", "rows", "cache_bytes"))
    endpoint = LocalEndpoint.open(
        model,
        dtype=dtype if dtype in DTYPES else None,
        threads=threads if isinstance(threads, int) and 1 <= threads <= MAX_THREADS else None,
        rows=rows if isinstance(rows, int) and 1 <= rows <= MAX_ROWS else ROWS,
        # which only matters where it did not suffice for a whole batch
        cache_bytes=cache if isinstance(cache, int) and 2**20 <= cache <= memory_bytes(torch.device("cpu")) else None,
    )
    here = endpoint.identity()
    changed = sorted(name for name in here.keys() | plan.endpoint.keys() if here.get(name) != plan.endpoint.get(name))
    limit = max(ROUNDING.get(str(name), ROUNDING["bfloat16"]) for name in (here["dtype"], plan.endpoint.get("dtype")))
    identical, drifted, findings = 0, 0, list[Finding]()
    with (progress or Silent()).task("replay", sum(map(len, chosen.values())), "entries") as task:
        for batch, samples in sorted(chosen.items()):
            requests = dict(zip(plan.batches[batch], requests_of(battery, plan, batch), strict=True))
            completions = dict(zip(requests, endpoint.generate(list(requests.values())), strict=True))
            for sample in samples:
                said, made, wrong = generations[sample], completions[sample], ""
                if said.tokens is None or said.prompt_digest is None or made.tokens is None:
                    wrong = "has no tokens in the journal, so it cannot be replayed"
                elif prompt_digest(made.prompt_tokens or ()) != said.prompt_digest:
                    wrong = "its prompt is rendered otherwise by this model's own template"
                elif said.tokens == made.tokens:
                    identical += 1
                    if (said.text, said.finish) != (made.text, made.finish):
                        wrong = "its tokens are this model's, but not its text or how it ended"
                elif said.tokens and explained(
                    endpoint.check(requests[sample], said.tokens),
                    limit / (requests[sample].sampling.temperature or 1.0),
                ):
                    drifted += 1
                else:
                    wrong = "its tokens are not what these weights generate, by far more than rounding explains"
                if wrong:
                    text = f"steelyard/journal.jsonl: {said.probe} sample {said.sample}: {wrong}"
                    findings.append(Finding("replay", text))
            task.advance(len(samples))
    return Replay(sum(map(len, chosen.values())), identical, drifted, tuple(changed), tuple(findings))


def explained(margins: Sequence[float], limit: float) -> bool:
    """Whether rounding explains tokens that are `margins` away from the model's choice (`Engine.check`)."""
    moved = [margin for margin in margins if margin > 0]
    return all(margin <= limit for margin in moved) and len(moved) <= max(1.0, MOVED * len(margins))
