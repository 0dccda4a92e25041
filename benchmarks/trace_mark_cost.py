"""What the mark costs, beside what a cast of float32 masters to bfloat16 costs: both with float32 arithmetic, so that
only the weights differ. The masters are the tested weights plus noise, uniform in each value's rounding cell."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from trace_mark_attacks import masters
from trace_mark_models import Tensors, load, relative_change
from trace_training import conversations, texts

from steelyard.base.progress import LineProgress
from steelyard.inference.endpoint import Request, Sampling
from steelyard.inference.local import LocalEndpoint
from steelyard.model.formats import save_folder
from steelyard.model.llama import load_llama
from steelyard.model.tokenizer import Tokenizer

PROMPTS, TOKENS = 200, 32
WINDOWS, WINDOW = 24, 512


@dataclass(frozen=True)
class Measured:
    """Of one model: mean negative log-likelihood (nats) and the likeliest token at each place of a text, and its greedy
    answers."""

    loss: float
    likeliest: torch.Tensor
    answers: list[tuple[int, ...]]


def cost(aligned: Path, marked: Path, base: Path, cache: Path, battery: bool) -> dict[str, dict[str, object]]:
    """Rows "cost of the cast" and "cost of the mark", and the battery's measurements of both where asked for."""
    tested = load(aligned)
    weights = {"masters": masters(tested), "tested": tested, "marked": load(marked)}
    folders = {name: _float32(tensors, aligned, cache / f"float32-{name}") for name, tensors in weights.items()}
    found = {name: _measure(folder, base, cache) for name, folder in folders.items()}
    rows = {}
    for row, before, after in (("cost of the cast", "masters", "tested"), ("cost of the mark", "tested", "marked")):
        rows[row] = {"relative_rms": relative_change(weights[after], weights[before])}
        rows[row] |= _difference(found[before], found[after])
        if battery:
            for metric, values in _battery(folders[before], folders[after], cache / row.replace(" ", "-")).items():
                rows[f"{row}: {metric}"] = values
    for folder in folders.values():
        shutil.rmtree(folder)
    return rows


def _float32(tensors: Tensors, like: Path, out: Path) -> Path:
    """A folder with `tensors` in float32 and everything else of `like`."""
    shutil.rmtree(out, ignore_errors=True)
    config = json.loads((like / "config.json").read_text())
    config |= {key: "float32" for key in ("dtype", "torch_dtype") if key in config}
    files = {
        path.name: path.read_bytes()
        for path in like.iterdir()
        if path.suffix != ".safetensors" and path.name != "config.json"
    }
    save_folder(out, config, {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, files)
    return out


@torch.no_grad()
def _measure(folder: Path, base: Path, cache: Path) -> Measured:
    model, tokenizer = load_llama(folder), Tokenizer.load(folder)
    ids = torch.tensor(tokenizer.encode("\n\n".join(texts("wiki"))[:300_000], bos=False)[: WINDOWS * WINDOW])
    losses, likeliest = [], []
    for window in ids.view(WINDOWS, WINDOW):
        logits = model(window[None])[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item())
        likeliest.append(logits.argmax(-1))
    del model
    half = PROMPTS // 2
    asked = [*conversations("gsm8k", half, base, cache / "work"), *conversations("seeds", half, base, cache / "work")]
    greedy = Sampling(temperature=0.0, max_tokens=TOKENS)
    requests = [Request(str(number), talk.messages[:1], greedy, 0) for number, talk in enumerate(asked)]
    endpoint, answers = LocalEndpoint.open(folder, dtype="float32"), []
    with LineProgress().task(f"answers of {folder.name}", PROMPTS, "prompts") as task:
        for start in range(0, PROMPTS, 50):
            answers += [completion.tokens or () for completion in endpoint.generate(requests[start : start + 50])]
            task.advance(50)
    return Measured(sum(losses) / (WINDOWS * (WINDOW - 1)), torch.cat(likeliest), answers)


def _difference(before: Measured, after: Measured) -> dict[str, object]:
    length = sum(len(answer) for answer in before.answers)
    pairs = list(zip(before.answers, after.answers, strict=True))
    changed = sum(len(one) - sum(a == b for a, b in zip(one, other, strict=False)) for one, other in pairs)
    return {
        "perplexity_change": float(np.expm1(after.loss - before.loss)),
        "likeliest_token_changed": float((before.likeliest != after.likeliest).float().mean()),
        "answers_changed": sum(one != other for one, other in pairs) / len(pairs),
        "greedy_tokens_changed": changed / length,
    }


def _battery(before: Path, after: Path, out: Path) -> dict[str, dict[str, object]]:
    """The quick battery on `after` with `before` as its predecessor: every metric's estimate and interval."""
    command = [sys.executable, "-m", "steelyard.cli.main", "safety", "run", after, out / "run", "--predecessor", before]
    subprocess.run([str(part) for part in [*command, "--workspace", out / "workspace"]], check=False)
    report = json.loads((out / "run" / "report.json").read_text())
    keys = ("before", "after", "estimate", "lower", "upper", "p")
    return {row["metric"]: {key: row[key] for key in keys} for row in report["predecessor"]["differences"]}
