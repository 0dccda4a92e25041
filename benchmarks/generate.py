"""Generated tokens/s of SmolLM2 in bf16, ours beside transformers' `generate`, on the same prompts in one run.

Prompts of 40 tokens, 64 new tokens, greedy, no early stop; alternating rounds, the best of each. A first figure for
the log; the engine's real bars are the next issue's.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from harness import Row, report
from transformers import AutoModelForCausalLM

from steelyard.inference.endpoint import Sampling
from steelyard.inference.engine import Engine
from steelyard.model.llama import load_llama

PROMPT, NEW, ROUNDS = 40, 64, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="the imported SmolLM2 folder")
    folder = parser.parse_args().model
    engine = Engine(load_llama(folder), frozenset())
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    peer.generation_config.eos_token_id = None
    rows = []
    for batch in (1, 16, 64):
        prompts = torch.randint(100, 40_000, (batch, PROMPT), generator=torch.Generator().manual_seed(batch))

        def ours(prompts: torch.Tensor = prompts) -> None:
            sampling = Sampling(max_tokens=NEW)
            engine.generate(prompts.tolist(), [sampling] * len(prompts), [0] * len(prompts))

        def theirs(prompts: torch.Tensor = prompts) -> None:
            mask = torch.ones_like(prompts)
            peer.generate(prompts, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)

        best = {ours: float("inf"), theirs: float("inf")}
        for _ in range(ROUNDS):
            for run in best:
                start = time.perf_counter()
                run()
                best[run] = min(best[run], time.perf_counter() - start)
        rates = [batch * NEW / seconds for seconds in best.values()]
        rows.append(Row(f"generate_b{batch}", rates[0], rates[1], "transformers generate, bf16"))
    report("generate", rows)


if __name__ == "__main__":
    main()
