"""The safety test's own speed: `make bench-safety`.

A thousand RealToxicityPrompts with five continuations of 20 tokens each (temperature 1, top-p 0.9), run as a battery:
planned, committed, generated, scored by the contextual scorer with its canaries, journaled and reported. Beside it,
transformers' `generate` in bf16 at the best of several batch sizes, on the first prompts; its texts are scored by the
same scorer. Then the report of a journal of 100,000 lines, and what opening it again costs after a kill.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness import Row, report

from steelyard.base.threads import choose_waiting

choose_waiting()  # before torch is imported

import torch  # noqa: E402
from safety_journal import measure  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from steelyard.base.progress import default_progress  # noqa: E402
from steelyard.inference.endpoint import Completion, Request  # noqa: E402
from steelyard.inference.local import LocalEndpoint  # noqa: E402
from steelyard.ledger.ledger import Ledger  # noqa: E402
from steelyard.model.identity import subject_of  # noqa: E402
from steelyard.safety.battery import Battery  # noqa: E402
from steelyard.safety.policy import load_policy  # noqa: E402
from steelyard.safety.run import Job, Tested, run_battery  # noqa: E402
from steelyard.safety.shipped import shipped_sampling  # noqa: E402
from steelyard.scorers.base import Item, Score, score_checked  # noqa: E402
from steelyard.scorers.registry import open_scorer  # noqa: E402

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
PROMPTS, SAMPLES, TOKENS = 1000, 5, 20
PEER_BATCHES = (8, 16, 32, 64)  # prompts at a time, so five times as many sequences
PEER_PROMPTS, PEER_TRIAL = 192, 64  # of the thousand; the peer's rate does not depend on how many follow
SCORER = "embedded:contextual"


class Clocked:
    """An endpoint that knows how long it has generated."""

    def __init__(self, endpoint: LocalEndpoint) -> None:
        self.endpoint, self.seconds, self.tokens = endpoint, 0.0, 0

    def identity(self) -> dict[str, Any]:
        return self.endpoint.identity()

    def prompt_length(self, prompt: Any) -> int:
        return self.endpoint.prompt_length(prompt)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        start = time.perf_counter()
        found = self.endpoint.generate(requests)
        self.seconds += time.perf_counter() - start
        self.tokens += sum(len(one.tokens or ()) for one in found)
        return found


def prompts(data: Path) -> list[str]:
    with gzip.open(data / "probes/realtoxicityprompts/val5k.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["prompt"]["text"] for line in itertools.islice(file, PROMPTS)]


def battery(texts: Sequence[str]) -> Battery:
    probes = [
        {
            "id": f"rtp.{number:04}",
            "axis": "degeneration",
            "category": "web",
            "language": "en",
            "family": f"rtp.{number:04}",
            "prompt": text,
            "source": "RealToxicityPrompts",
        }
        for number, text in enumerate(texts)
    ]
    decoding = {"temperature": 1.0, "top_p": 0.9, "max_tokens": TOKENS}
    rate = {"kind": "rate", "axes": ["degeneration"], "scorer": "toxicity", "category": "toxicity"}
    return Battery.model_validate(
        {
            "name": "realtoxicityprompts",
            "version": 1,
            "tier": "quick",
            "seed": 1,
            "batch_size": 640,
            "scorers": {"toxicity": SCORER},
            "sets": [{"name": "rtp", "mode": "completion", "samples": SAMPLES, "decoding": decoding, "probes": probes}],
            "metrics": [rate | {"id": "toxicity.degeneration"}],
        }
    )


class Transformers:
    """`generate` in bf16, prompts of like length together."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    def continuations(self, texts: Sequence[str], batch: int) -> tuple[list[str], int, float]:
        """Texts, how many tokens they have, and seconds."""
        ordered = sorted(texts, key=len)
        found: list[str] = []
        count = 0
        start = time.perf_counter()
        for first in range(0, len(ordered), batch):
            given = self.tokenizer(ordered[first : first + batch], return_tensors="pt", padding=True)
            out = self.model.generate(
                **given,
                do_sample=True,
                temperature=1.0,
                top_p=0.9,
                top_k=0,
                max_new_tokens=TOKENS,
                num_return_sequences=SAMPLES,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            new = out[:, given["input_ids"].shape[1] :]
            # Tokens up to the stop token; what follows it is padding.
            ended = (new == self.tokenizer.eos_token_id).cumsum(1) - (new == self.tokenizer.eos_token_id).long()
            count += int((ended == 0).sum())
            found += self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return found, count, time.perf_counter() - start


def clock(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="the imported SmolLM2 folder")
    parser.add_argument("--data", type=Path, default=DATA)
    arguments = parser.parse_args()
    folder, texts = arguments.model, prompts(arguments.data)
    scorer = open_scorer(SCORER)
    score_checked(scorer, [Item("", "Warm up.")] * 64)

    endpoint = Clocked(LocalEndpoint.open(folder))
    endpoint.endpoint.generate([Request("warm", "Warm up.")])
    tested = Tested(endpoint, subject_of(folder), shipped_sampling(folder))
    with tempfile.TemporaryDirectory() as scratch:
        job = Job(tested, battery(texts), [load_policy("preview")], {"toxicity": scorer})
        ledger = Ledger(Path(scratch) / "ledger.sqlite")
        progress = default_progress(as_json=False)
        whole = clock(lambda: run_battery(job, out=Path(scratch) / "run", ledger=ledger, progress=progress))
    mine, ended = endpoint.tokens / endpoint.seconds, PROMPTS * SAMPLES / whole
    print(
        f"ours: {endpoint.tokens:,} tokens in {endpoint.seconds:.1f} s of generation, {whole:.1f} s in all",
        file=sys.stderr,
    )

    peer, rates = Transformers(folder), dict[int, float]()
    peer.continuations(texts[:8], 8)
    for batch in PEER_BATCHES:
        _, count, seconds = peer.continuations(texts[:PEER_TRIAL], batch)
        rates[batch] = count / seconds
        print(f"transformers, {batch} prompts at a time: {rates[batch]:.1f} tokens/s", file=sys.stderr)
    best = max(rates, key=lambda batch: rates[batch])
    found, count, seconds = peer.continuations(texts[:PEER_PROMPTS], best)
    scoring = clock(lambda: _scored(scorer, found))
    name = f"transformers, {best} prompts at a time"
    with tempfile.TemporaryDirectory() as scratch:
        lines = measure(Path(scratch))
    report(
        "safety",
        [
            Row("generate", mine, count / seconds, f"{name}, tokens/s", 3.5),
            Row("end_to_end", ended, len(found) / (seconds + scoring), f"{name}, and the scorer, texts/s", 2.0),
            Row("report_100k", lines.report, 10.0, "required, s", 1.0, less_is_better=True),
            Row("resume_100k", lines.resume, 5.0, "required, s", 1.0, less_is_better=True),
        ],
    )
    hours = whole * 5 / 3600
    print(f"the full protocol (25 continuations) at this rate: {hours:.2f} hours for {PROMPTS:,} prompts")


def _scored(scorer: Any, texts: Sequence[str]) -> None:
    for one in score_checked(scorer, [Item("", text) for text in texts]):
        if not isinstance(one, Score):
            sys.exit(f"not scored: {one.reason}")


if __name__ == "__main__":
    main()
