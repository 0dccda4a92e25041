"""Decoding and training on one GPU: `python benchmarks/gpu.py`, under ten minutes on an H100.

Weights are random, shapes are real, nothing is downloaded. Decoding is compared with the measured bandwidth of the
memory (weights and cache are read once a step) and with transformers' static cache; training of a 1B-shaped LLaMA with
the measured rate of bf16 products (MFU) and with a plain transformers loop. `--tiny --device cpu` tries the code
anywhere; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from harness import Row, report

from steelyard.inference.endpoint import Sampling
from steelyard.inference.engine import Engine
from steelyard.model.llama import Llama, LlamaConfig
from steelyard.train.batch import IGNORE, Batch
from steelyard.train.loop import TrainOptions, train
from steelyard.train.losses import CrossEntropy
from steelyard.train.metrics import read_metrics

BILLION = LlamaConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=4096,
)
TINY = replace(
    BILLION,
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
)
PROMPT, NEW = 128, 128
STEPS = 8  # training steps measured, after two that warm up


def transformers_model(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    from transformers import LlamaConfig as Theirs
    from transformers import LlamaForCausalLM

    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings")
    torch.manual_seed(0)
    return LlamaForCausalLM(Theirs(**{name: getattr(config, name) for name in names})).to(device, dtype)


def clock(device: torch.device, run: Callable[[], object]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def bandwidth(device: torch.device, size: int) -> float:
    """Bytes/s of a copy, read and write counted: the best of ten."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return max(2 * size / clock(device, lambda: target.copy_(source)) for _ in range(10))


def ours(config: LlamaConfig, device: torch.device, prompts: Sequence[Sequence[Sequence[int]]]) -> list[float]:
    """Tokens/s of decoding for each batch of prompts."""
    model = Llama(config).initialise(0).to(device, torch.bfloat16).eval().requires_grad_(False)
    engine = Engine(model, frozenset(), rows=max(map(len, prompts)))

    def generate(batch: Sequence[Sequence[int]], new: int) -> float:
        samplings = [Sampling(max_tokens=new)] * len(batch)
        return clock(device, lambda: engine.generate(batch, samplings, range(len(batch))))

    found = []
    for batch in prompts:
        generate(batch, NEW)  # captures its graphs
        seconds = statistics.median(generate(batch, NEW) - generate(batch, 1) for _ in range(3))
        found.append(len(batch) * (NEW - 1) / seconds)
    return found


def theirs(config: LlamaConfig, device: torch.device, prompts: Sequence[Sequence[Sequence[int]]]) -> list[float]:
    """The same of transformers with a static cache."""
    model = transformers_model(config, device, torch.bfloat16).eval()
    model.generation_config.eos_token_id = None

    def generate(tokens: torch.Tensor, new: int) -> float:
        how = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "cache_implementation": "static"}
        return clock(device, lambda: model.generate(tokens, attention_mask=torch.ones_like(tokens), **how))

    found = []
    for batch in prompts:
        tokens = torch.tensor(batch, device=device)
        generate(tokens, NEW)
        seconds = statistics.median(generate(tokens, NEW) - generate(tokens, 1) for _ in range(2))
        found.append(len(batch) * (NEW - 1) / seconds)
    return found


def decode(config: LlamaConfig, device: torch.device, batches: Sequence[int], memory: int) -> list[Row]:
    """Tokens/s at each batch beside what the bandwidth allows, and beside transformers."""
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, config.vocab_size, (batch, PROMPT), generator=draw).tolist() for batch in batches]
    rate = bandwidth(device, memory)
    with torch.device("meta"):
        shape = Llama(config)
    read = 2 * sum(p.numel() for p in shape.parameters())  # bytes of weights a step
    if not config.tie_word_embeddings:
        read -= 2 * shape.model.embed_tokens.weight.numel()  # only looked up
    per_token = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # bytes of keys and values
    mine, rivals, rows = ours(config, device, prompts), theirs(config, device, prompts), []
    for batch, own, rival in zip(batches, mine, rivals, strict=True):
        bound = batch * rate / (read + batch * per_token * (PROMPT + NEW / 2))
        rows.append(Row(f"decode_b{batch}_bandwidth", own, bound, f"bound by {rate / 1e9:,.0f} GB/s"))
        rows.append(Row(f"decode_b{batch}", own, rival, "transformers, static cache"))
    return rows


class _EnoughError(Exception):
    """All steps that are wanted are done: no checkpoint of gigabytes at the end."""


class _Steps:
    """A Progress that ends training after `STEPS` + 2 steps."""

    done = 0

    @contextmanager
    def task(self, name: str, total: float, unit: str, done: float = 0) -> Iterator[_Steps]:
        yield self

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.done += 1
        print(f"step {self.done}: {note}", file=sys.stderr)
        if self.done == STEPS + 2:
            raise _EnoughError

    def say(self, text: str) -> None:
        print(text, file=sys.stderr)


class _Data:
    """Random tokens, `rows` documents of `length` a step."""

    digest, steps_per_epoch = "benchmark", 1000

    def __init__(self, config: LlamaConfig, rows: int, length: int) -> None:
        self.config, self.rows, self.length = config, rows, length

    def tokens(self, index: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(index)
        return torch.randint(0, self.config.vocab_size, (self.rows, self.length), generator=draw)

    def step(self, index: int) -> Sequence[Batch]:
        tokens = self.tokens(index)
        targets = tokens.roll(-1, 1)
        targets[:, -1] = IGNORE
        positions = torch.arange(self.length).repeat(self.rows)
        lengths = (self.length,) * self.rows
        return [Batch(tokens.flatten(), targets.flatten(), positions, lengths, tuple(range(self.rows)))]


def training(config: LlamaConfig, device: torch.device, rows: int, length: int) -> list[Row]:
    """Tokens/s and MFU of the loop, and tokens/s of a plain loop on the same batches."""
    data = _Data(config, rows, length)
    options = TrainOptions(steps=1000, learning_rate=1e-4, checkpoint_every=0)
    with tempfile.TemporaryDirectory() as folder:
        try:
            model = Llama(config).initialise(0).to(device)
            train(model, data, CrossEntropy(), options, Path(folder), progress=_Steps())
        except _EnoughError:
            pass
        records = read_metrics(Path(folder))[2:]
    mine, mfu = (statistics.median(record[name] for record in records) for name in ("tokens_per_second", "mfu"))
    del model
    theirs = transformers_model(config, device, torch.float32)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    rates = []

    def update(batch: torch.Tensor) -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = theirs(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    for index in range(STEPS + 2):
        batch = data.tokens(index).to(device)
        rates.append(batch.numel() / clock(device, lambda batch=batch: update(batch)))
    peer = statistics.median(rates[2:])
    return [
        Row("train_mfu_percent", 100 * mfu, 100, "the measured bf16 product rate", 0.5),
        Row("train", mine, peer, "transformers, bf16 autocast, fused AdamW"),
    ]


@torch.inference_mode()
def parity(config: LlamaConfig, device: torch.device) -> Row:
    """The largest difference of float32 logits between the GPU and the CPU, beside 1e-3 of their spread."""
    small = replace(config, num_hidden_layers=2)
    model = Llama(small).initialise(0).eval()
    tokens = torch.randint(0, small.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    here = model(tokens)
    torch.backends.cuda.matmul.allow_tf32 = False
    there = model.to(device)(tokens.to(device)).cpu()
    worst, spread = (there - here).abs().max(), here.std()
    return Row("parity_1e-6", 1e6 * float(worst), 1e3 * float(spread), "1e-3 of the logits' spread", 1.0, True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of nothing, to try the code")
    given = parser.parse_args()
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("not measured: no CUDA device here")
    config = TINY if given.tiny else BILLION
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}; torch {torch.__version__}; {'tiny' if given.tiny else '1B-shaped'}, random weights")
    rows = [parity(config, device)]
    rows += decode(config, device, (1, 4) if given.tiny else (1, 64, 256), 2**20 if given.tiny else 2**32)
    rows += training(config, device, 2 if given.tiny else 4, 64 if given.tiny else 2048)
    report("gpu", rows)


if __name__ == "__main__":
    main()
