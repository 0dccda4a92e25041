"""The engine beside transformers and llama.cpp on SmolLM2, in one run: `make bench-inference`.

Every figure is a rate in tokens/s, the median of rounds in which the sides take turns. Decoding rates leave reading the
prompt out: the time for 64 new tokens less the time for 1. llama.cpp decodes through llama-cpp-python's low-level API
(one batch, a token a sequence, the arg max taken outside the clock). The bound is the measured bf16 matrix-product rate
over the operations of a token.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from harness import Row, report
from transformers import AutoModelForCausalLM

from steelyard.inference.endpoint import Sampling
from steelyard.inference.engine import Engine
from steelyard.inference.kernels import describe
from steelyard.model.gguf_export import export_gguf
from steelyard.model.llama import load_llama

PROMPT, NEW, ROUNDS = 40, 64, 2
LONG, LONG_COUNT = 400, 64
THREADS = torch.get_num_threads()


def clock(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def turns(*sides: Callable[[], float], rounds: int = ROUNDS) -> list[float]:
    """Each side's median rate; they take turns, after one round that warms up."""
    found: list[list[float]] = [[] for _ in sides]
    for number in range(rounds + 1):
        for side, rates in zip(sides, found, strict=True):
            rate = side()
            if number:
                rates.append(rate)
    return [statistics.median(rates) for rates in found]


def prompts(count: int, length: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(100, 40_000, (count, length), generator=generator).tolist()


class Ours:
    def __init__(self, folder: Path) -> None:
        self.engine = Engine(load_llama(folder), frozenset())

    def generate(
        self, batch: Sequence[Sequence[int]], new: int | Sequence[int], samples: int = 1, **how: float
    ) -> None:
        lengths = [new] * len(batch) if isinstance(new, int) else new
        asked = [
            (prompt, Sampling(max_tokens=length, **how))
            for prompt, length in zip(batch, lengths, strict=True)
            for _ in range(samples)
        ]
        done = self.engine.generate([p for p, _ in asked], [s for _, s in asked], range(len(asked)))
        assert all(len(tokens) == s.max_tokens for (tokens, _), (_, s) in zip(done, asked, strict=True))

    def decode(self, batch: int) -> float:
        these = prompts(batch, PROMPT, batch)
        return batch * (NEW - 1) / (clock(lambda: self.generate(these, NEW)) - clock(lambda: self.generate(these, 1)))

    def prefill(self) -> float:
        return LONG_COUNT * LONG / clock(lambda: self.generate(prompts(LONG_COUNT, LONG), 1))


class Transformers:
    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self.model.generation_config.eos_token_id = None

    def generate(self, batch: Sequence[Sequence[int]], new: int, samples: int = 1, **how: float) -> None:
        tokens = torch.tensor(batch)
        sample = {"do_sample": True, "top_k": 0, **how} if how else {"do_sample": False}
        out = self.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new,
            min_new_tokens=new,
            num_return_sequences=samples,
            **sample,
        )
        assert out.shape == (len(batch) * samples, tokens.shape[1] + new)

    def decode(self, batch: int) -> float:
        these = prompts(batch, PROMPT, batch)
        return batch * (NEW - 1) / (clock(lambda: self.generate(these, NEW)) - clock(lambda: self.generate(these, 1)))

    @torch.inference_mode()
    def prefill(self, batch: int) -> float:
        these = torch.tensor(prompts(LONG_COUNT, LONG))

        def run() -> None:
            for part in these.split(batch):
                self.model(part, logits_to_keep=1)

        return these.numel() / clock(run)


class LlamaCpp:
    """llama.cpp in bf16: sequences side by side, one batch a step."""

    def __init__(self, gguf: Path) -> None:
        import llama_cpp

        self.cpp = llama_cpp
        llama_cpp.llama_backend_init()
        quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(quiet, ctypes.c_void_p())
        self.keep = quiet
        settings = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(gguf).encode(), settings)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def context(self, sequences: int, length: int) -> ctypes.c_void_p:
        settings = self.cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = sequences * length, sequences
        settings.n_batch = settings.n_ubatch = 2048
        settings.n_threads = settings.n_threads_batch = THREADS
        found: ctypes.c_void_p = self.cpp.llama_init_from_model(self.model, settings)
        return found

    def step(self, context: ctypes.c_void_p, tokens: Sequence[tuple[int, int, int, bool]]) -> float:
        """Seconds of one batch of (token, position, sequence, whether its logits are wanted)."""
        batch = self.cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence

        def run() -> None:
            if self.cpp.llama_decode(context, batch):
                sys.exit("llama.cpp failed to decode")
            self.cpp.llama_synchronize(context)

        seconds = clock(run)
        self.cpp.llama_batch_free(batch)
        return seconds

    def decode(self, batch: int) -> float:
        context = self.context(batch, PROMPT + NEW + 8)
        for i, prompt in enumerate(prompts(batch, PROMPT, batch)):
            self.step(context, [(token, j, i, False) for j, token in enumerate(prompt)])
        tokens, seconds = [1] * batch, 0.0
        for position in range(PROMPT, PROMPT + NEW):
            seconds += self.step(context, [(token, position, i, True) for i, token in enumerate(tokens)])
            logits = self.cpp.llama_get_logits(context)
            tokens = np.ctypeslib.as_array(logits, (batch, self.vocab)).argmax(-1).tolist()
        self.cpp.llama_free(context)
        return batch * NEW / seconds

    def prefill(self) -> float:
        context = self.context(LONG_COUNT, LONG + 8)
        seconds, these = 0.0, prompts(LONG_COUNT, LONG)
        for start in range(0, LONG_COUNT, 5):  # 5 x 400 tokens fill its batch
            part = range(start, min(start + 5, LONG_COUNT))
            flat = [(token, j, i, j + 1 == LONG) for i in part for j, token in enumerate(these[i])]
            seconds += self.step(context, flat)
        self.cpp.llama_free(context)
        return LONG_COUNT * LONG / seconds


def product_rate() -> float:
    """bf16 operations/s of a matrix product: the best of several shapes."""
    best = 0.0
    for size in (1024, 2048, 4096):
        a, b = (torch.randn(size, size).bfloat16() for _ in range(2))
        best = max(best, *(2 * size**3 / clock(lambda a=a, b=b: a @ b) for _ in range(5)))
    return best


def ragged() -> tuple[list[list[int]], list[int]]:
    """512 prompts of 10 to 400 tokens and new-token counts of 1 to 200, both long-tailed (log-normal, clipped)."""
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(4.2, 0.9, 512), 10, 400).astype(int)
    new = np.clip(draw.lognormal(3.3, 1.1, 512), 1, 200).astype(int)
    return [prompts(1, int(length), i)[0] for i, length in enumerate(lengths)], [int(n) for n in new]


def note(rows: list[Row], row: Row) -> None:
    print(f"{row.metric}: {row.ours:,.1f} beside {row.peer:,.1f} ({row.peer_name})", file=sys.stderr, flush=True)
    rows.append(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="the imported SmolLM2 folder")
    folder = parser.parse_args().model
    ours, hf = Ours(folder), Transformers(folder)
    with tempfile.TemporaryDirectory() as scratch:
        gguf = Path(scratch) / "model.gguf"
        export_gguf(folder, gguf, "BF16")
        cpp = LlamaCpp(gguf)
    config = ours.engine.model.config
    weights = sum(
        p.numel() for name, p in ours.engine.model.named_parameters() if p.dim() == 2 and "embed" not in name
    ) + (config.vocab_size * config.hidden_size)
    rate = product_rate()
    bound = rate / (2 * weights)
    print(
        f"{THREADS} threads; kernels {describe()}; bf16 product {rate / 1e9:,.0f} GFLOP/s; bound {bound:,.0f} tokens/s"
    )

    rows = []
    for batch, bar in ((1, 2.0), (64, 3.5)):
        mine, theirs = turns(lambda b=batch: ours.decode(b), lambda b=batch: hf.decode(b))
        note(rows, Row(f"decode_b{batch}", mine, theirs, "transformers generate, bf16", bar))
    decode, theirs = turns(lambda: ours.decode(128), lambda: cpp.decode(128))
    note(rows, Row("decode_b128", decode, theirs, "llama.cpp, bf16", 1.6))
    note(rows, Row("decode_bound", decode, bound, "bf16 product rate / operations a token", 0.55))

    prefill, by_cpp, *by_hf = turns(
        ours.prefill, cpp.prefill, *(lambda b=batch: hf.prefill(b) for batch in (1, 8)), rounds=1
    )
    peers = {"llama.cpp, bf16": by_cpp} | {
        f"transformers forward, {b} at a time": r for b, r in zip((1, 8), by_hf, strict=True)
    }
    best = max(peers, key=lambda name: peers[name])
    note(rows, Row("prefill", prefill, peers[best], f"the best: {best}", 1.2))

    work, new = ragged()
    total = sum(map(len, work)) + sum(new)
    predicted = total / (sum(map(len, work)) / prefill + sum(new) / decode)
    measured = statistics.median(total / clock(lambda: ours.generate(work, new)) for _ in range(1))
    note(rows, Row("ragged", measured, predicted, "from the prefill and decode rates above", 0.75))

    how = {"temperature": 1.0, "top_p": 0.9}
    many, some = prompts(200, PROMPT), prompts(16, PROMPT)
    mine = len(many) * 25 * 20 / clock(lambda: ours.generate(many, 20, 25, **how))
    candidates = {}
    for batch in (1, 4):  # prompts at a time, so 25 and 100 sequences
        parts = [some[i : i + batch] for i in range(0, len(some), batch)][: max(1, 8 // batch)]
        seconds = clock(lambda parts=parts: [hf.generate(part, 20, 25, **how) for part in parts])
        candidates[batch] = sum(map(len, parts)) * 25 * 20 / seconds
    best_batch = max(candidates, key=lambda b: candidates[b])
    note(rows, Row("samples25", mine, candidates[best_batch], f"transformers, {best_batch} prompts at a time", 4.0))
    report("inference", rows)


if __name__ == "__main__":
    main()
