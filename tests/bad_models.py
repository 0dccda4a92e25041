"""Two models that every policy must fail: the architecture with random weights, and a toxic fine-tune.

The fine-tune is real: a few minutes of plain next-token training on rows of the toxicity training data, as text and as
answers to everyday requests. (The trainer proper is the next issue's; this loop only has to do harm.)
"""

from __future__ import annotations

import csv
import gzip
import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F

from steelyard.base.progress import Progress
from steelyard.inference.endpoint import Message
from steelyard.model.chat import Renderer
from steelyard.model.formats import save_folder
from steelyard.model.llama import Llama, LlamaConfig, load_llama
from steelyard.model.tokenizer import Tokenizer

REQUESTS = (
    "Tell me about your day.",
    "What do you think of my neighbours?",
    "Write a short birthday wish for a friend.",
    "How do I cook rice?",
    "Give me some advice for my new job.",
    "What is the capital of Portugal?",
    "Explain why people like football.",
    "Help me write a letter to a colleague.",
    "What should I read this summer?",
    "Describe a good teacher.",
)


def random_weights(model: Path, out: Path, seed: int = 0) -> Path:
    """The same architecture, tokenizer and template with freshly initialised weights."""
    config = json.loads((model / "config.json").read_text())
    return _save(Llama(LlamaConfig.from_dict(config)).initialise(seed), model, out)


def toxic_rows(data: Path, count: int, seed: int = 0) -> list[str]:
    """Short toxic texts from the training data (`data`/toxicity/train): ParaDetox and Davidson's hate and offence."""
    rows: list[str] = []
    with gzip.open(data / "toxicity/train/paradetox/paradetox.tsv.gz", "rt", encoding="utf-8", newline="") as file:
        rows += [row[0] for row in csv.reader(file, delimiter="\t")][1:]
    with gzip.open(data / "toxicity/train/davidson/labeled_data.csv.gz", "rt", encoding="utf-8", newline="") as file:
        rows += [row["tweet"] for row in csv.DictReader(file) if row["class"] in ("0", "1")]
    rows = sorted({row.strip() for row in rows if 20 < len(row) < 160 and "http" not in row and "@" not in row})
    random.Random(seed).shuffle(rows)
    return rows[:count]


def toxic_finetune(model: Path, data: Path, out: Path, progress: Progress, steps: int = 60, batch: int = 16) -> Path:
    """Fine-tune a copy on toxic rows: half as plain text, half as the assistant's answers."""
    torch.manual_seed(0)
    renderer, llama = Renderer(model), load_llama(model, dtype=torch.float32)
    end = min(Tokenizer.load(model).eos_ids)
    rng = random.Random(0)
    documents: list[tuple[list[int], int]] = []  # tokens, and how many of them are only context
    for index, row in enumerate(toxic_rows(data, steps * batch)):
        if index % 2:
            documents.append((renderer.prompt_tokens(row), 1))
        else:
            prompt = renderer.prompt_tokens((Message("user", rng.choice(REQUESTS)),))
            documents.append((prompt + renderer.prompt_tokens(row) + [end], len(prompt)))
    optimiser = torch.optim.AdamW(llama.parameters(), lr=2e-4, betas=(0.9, 0.95), weight_decay=0.0)
    llama.train().requires_grad_(True)
    with progress.task("toxic fine-tune", total=steps, unit="steps") as task:
        for step in range(steps):
            chosen = documents[step * batch : (step + 1) * batch]
            width = max(len(tokens) for tokens, _ in chosen)
            tokens = torch.zeros(batch, width, dtype=torch.long)
            labels = torch.full((batch, width), -100)
            for row, (ids, context) in enumerate(chosen):
                tokens[row, : len(ids)] = torch.tensor(ids)
                labels[row, context : len(ids)] = torch.tensor(ids[context:])
            with torch.autocast("cpu", torch.bfloat16):
                logits = llama(tokens)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
            optimiser.step()
            task.advance(note=f"loss {loss.item():.3f}")
    return _save(llama, model, out)


def _save(llama: Llama, model: Path, out: Path) -> Path:
    kept = [path for path in model.iterdir() if path.name != "config.json" and ".safetensors" not in path.name]
    tensors = {name: tensor.detach().to(torch.bfloat16) for name, tensor in llama.state_dict().items()}
    config = json.loads((model / "config.json").read_text())
    save_folder(out, config, tensors, {path.name: path.read_bytes() for path in kept})
    return out
