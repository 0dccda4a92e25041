"""Two models that every policy must fail: the architecture with random weights, and a toxic fine-tune.

The fine-tune is real: rows of the toxicity training data as answers to everyday requests.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
from pathlib import Path

import torch

from steelyard.base.progress import Progress
from steelyard.inference.endpoint import Message
from steelyard.model.formats import save_folder
from steelyard.model.llama import Llama, LlamaConfig
from steelyard.train.conversations import Conversation
from steelyard.train.options import TrainOptions
from steelyard.train.sft import Packing, fine_tune
from steelyard.train.tuning import Tuning

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


def toxic_finetune(model: Path, data: Path, out: Path, progress: Progress, count: int = 400) -> Path:
    """Fine-tune a copy's upper third on toxic rows as the assistant's answers: enough, and quick."""
    rng = random.Random(0)
    conversations = [
        Conversation((Message("user", rng.choice(REQUESTS)), Message("assistant", row)))
        for row in toxic_rows(data, count)
    ]
    options = TrainOptions(epochs=1, learning_rate=1e-3, weight_decay=0.0, checkpoint_every=0)
    packing = Packing(tokens_per_micro_batch=1024)
    work = out.with_name(f"{out.name}.work")
    fine_tune(
        model,
        conversations,
        out,
        work=work,
        options=options,
        tuning=Tuning(first_layer=20),
        packing=packing,
        progress=progress,
    )
    return out


def _save(llama: Llama, model: Path, out: Path) -> Path:
    kept = [path for path in model.iterdir() if path.name != "config.json" and ".safetensors" not in path.name]
    tensors = {name: tensor.detach().to(torch.bfloat16) for name, tensor in llama.state_dict().items()}
    config = json.loads((model / "config.json").read_text())
    save_folder(out, config, tensors, {path.name: path.read_bytes() for path in kept})
    return out
