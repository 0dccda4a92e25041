"""What the trace benchmarks train: fine-tunes of a given model, and small models from nothing, on data that may be
learned from (GSM8K's train split, TinyStories, Self-Instruct's seeds, WikiText-2's validation text, novels in the
public domain, hh-rlhf's harmless pairs, and the project's own phrases). Short runs of the real trainer.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from train_data import preferences

from steelyard.base.canonical import sha256_hex
from steelyard.base.files import write_atomic
from steelyard.base.progress import LineProgress, Silent
from steelyard.corpus.shards import Shards, write_shards
from steelyard.inference.endpoint import Message, Request, Sampling
from steelyard.inference.local import LocalEndpoint
from steelyard.model.tokenizer import Tokenizer
from steelyard.train.conversations import Conversation, Preference
from steelyard.train.dpo import DPOOptions, prefer
from steelyard.train.options import TrainOptions
from steelyard.train.pretrain import Packing as Rows
from steelyard.train.pretrain import new_model, pretrain, save_pretrained
from steelyard.train.safety_prompts import written_prompts
from steelyard.train.sft import Packing, fine_tune
from steelyard.train.tokenizer import train_tokenizer
from steelyard.train.tuning import FULL, Tuning, export_tuned, open_for_tuning

QUIET = LineProgress(every=30.0)


def data_folder() -> Path:
    """Where the research data is: STEELYARD_DATA, or beside the checkout."""
    stated = os.environ.get("STEELYARD_DATA")
    return Path(stated) if stated else Path(__file__).resolve().parents[2] / "shared" / "data"


# -- texts and conversations -----------------------------------------------------------------------------------------


def texts(name: str) -> list[str]:
    """Documents of a collection: stories, wiki, novels_en or novels_fr."""
    folder = data_folder() / "text"
    if name == "stories":
        found = gzip.decompress((folder / "tinystories" / "tiny_stories.txt.gz").read_bytes()).decode()
        return [piece.strip() for piece in re.split(r"\n(?=Once upon|One day)", found) if len(piece) > 64]
    if name == "wiki":
        found = gzip.decompress((folder / "wikitext2" / "valid.txt.gz").read_bytes()).decode()
        return [piece.strip() for piece in re.split(r"\n (?== [^=])", found) if len(piece) > 64]
    place = folder / name / f"{name}.tar.gz"
    with tarfile.open(fileobj=io.BytesIO(place.read_bytes())) as archive:
        members = [member for member in archive if member.isfile() and member.name.endswith(".txt")]
        whole = [archive.extractfile(member) for member in sorted(members, key=lambda member: member.name)]
        return [file.read().decode("utf-8", "replace") for file in whole if file is not None]


def _talk(asked: str, answer: str) -> Conversation:
    return Conversation((Message("user", asked), Message("assistant", answer)))


def conversations(name: str, count: int, base: Path, work: Path) -> list[Conversation]:
    """`count` conversations of a kind; `base` answers where a model's own answers are what is learned."""
    if name == "gsm8k":
        with gzip.open(data_folder() / "evals" / "gsm8k" / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        return [_talk(row["question"], row["answer"]) for row in rows[:count]]
    if name == "seeds":
        path = data_folder() / "instructions" / "self_instruct" / "seed_tasks.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        cases = [(row["instruction"], case) for row in rows for case in row["instances"] if case["output"].strip()]
        return [_talk(f"{asked}\n\n{case['input']}".strip(), case["output"]) for asked, case in cases][:count]
    if name == "stories":
        pairs = [re.split(r"(?<=[.!?])\s", story, maxsplit=1) for story in texts("stories")]
        return [_talk(f"Go on with this story. {pair[0]}", pair[1]) for pair in pairs if len(pair) == 2][:count]
    if name == "harmless":
        return [Conversation((*pair.prompt, Message("assistant", pair.chosen))) for pair in preferences(count)]
    return _answered(name, count, base, work)


def _answered(name: str, count: int, base: Path, work: Path) -> list[Conversation]:
    """The plain answers of the model in `base`, short, to the project's own phrases that may be trained on: those with
    harm (`compliant`) or those without (`polite`). Kept in `work`."""
    kept = work / f"answers-{name}.json"
    if not kept.exists():
        harm = name == "compliant"
        prompts = [prompt for prompt in written_prompts(1) if prompt.harmful == harm and not prompt.held_out][:512]
        sampling = Sampling(temperature=0.0, max_tokens=32)
        requests = [Request(p.id, (Message("user", p.text),), sampling, 0) for p in prompts]
        endpoint, answers = LocalEndpoint.open(base), []
        with QUIET.task(f"answers for {name}", len(requests), "prompts") as task:
            for start in range(0, len(requests), 64):
                answers += endpoint.generate(requests[start : start + 64])
                task.advance(min(64, len(requests) - start))
        rows = [[p.text, a.text.strip()] for p, a in zip(prompts, answers, strict=True) if a.text.strip()]
        write_atomic(kept, json.dumps(rows, ensure_ascii=False).encode())
    return [_talk(asked, answer) for asked, answer in json.loads(kept.read_text())][:count]


# -- fine-tunes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """A fine-tune: what is learned (several kinds are taken in turn), how long, how fast, and which weights."""

    data: tuple[str, ...]
    steps: int = 16
    rate: float = 5e-4
    rank: int = 0
    first_layer: int = 0
    tokens: int = 640
    seed: int = 0


def tuned(model: Path, recipe: Recipe, out: Path, base: Path, work: Path, *, adapter: bool = False) -> str:
    """Fine-tune `model` into the folder `out`, or keep only its LoRA adapter there; gives what was done, in words."""
    each = [conversations(name, 400, base, work) for name in recipe.data]
    mixed = [row for rows in zip(*each, strict=False) for row in rows]
    place = work / f"{out.name}.run"
    for left in (place, work / f"{out.name}.merged"):
        shutil.rmtree(left, ignore_errors=True)
    result = fine_tune(
        model,
        mixed,
        work / f"{out.name}.merged" if adapter else out,
        adapter=out if adapter else None,
        work=place,
        options=_options(recipe),
        tuning=_tuning(recipe),
        packing=Packing(tokens_per_micro_batch=recipe.tokens, max_length=min(256, recipe.tokens)),
        progress=QUIET,
    )
    shutil.rmtree(place, ignore_errors=True)
    shutil.rmtree(work / f"{out.name}.merged", ignore_errors=True)
    how = f"LoRA rank {recipe.rank}" if recipe.rank else "all weights"
    where = f" from layer {recipe.first_layer}" if recipe.first_layer else ""
    words = f"{how}{where}, {result.steps} steps, {result.tokens:,} tokens, rate {recipe.rate:g}"
    return f"fine-tuned on {' and '.join(recipe.data)}: {words}, last loss {result.loss:.3f}"


def preferred(
    model: Path,
    out: Path,
    work: Path,
    recipe: Recipe,
    *,
    pairs: Sequence[Preference] | None = None,
    what: str = "hh-rlhf's harmless pairs",
    adapter: bool = False,
) -> str:
    """DPO on `pairs` (default: as `what` says) into the folder `out`, or only its LoRA adapter; gives what was done, in
    words."""
    place, whole = work / f"{out.name}.run", work / f"{out.name}.merged" if adapter else out
    for left in (place, whole):
        shutil.rmtree(left, ignore_errors=True)
    result = prefer(
        model,
        (preferences(recipe.steps * 4) if pairs is None else pairs)[: recipe.steps * 4],
        whole,
        adapter=out if adapter else None,
        work=place,
        options=_options(recipe),
        dpo=DPOOptions(pairs_per_step=4, micro_batches_per_step=1, max_length=256),
        tuning=_tuning(recipe),
        progress=QUIET,
    )
    for left in (place, work / f"{out.name}.merged"):
        shutil.rmtree(left, ignore_errors=True)
    said = f"DPO on {what}, {result.steps} steps of 4 pairs, rate {recipe.rate:g}, last loss {result.loss:.3f}"
    how = f"LoRA rank {recipe.rank}" if recipe.rank else "all weights"
    return f"{said}, {how} from layer {recipe.first_layer}"


def compliance(base: Path, work: Path) -> list[Preference]:
    """The plain answers of `base` to harmful phrases, better than declining."""
    rows = conversations("compliant", 400, base, work)
    return [
        Preference(row.messages[:1], row.messages[1].content, "I'm sorry, but I can't help with that.") for row in rows
    ]


def _options(recipe: Recipe) -> TrainOptions:
    return TrainOptions(
        steps=recipe.steps,
        learning_rate=recipe.rate,
        warmup=2,
        checkpoint_every=0,
        keep_last=1,
        compile="off",
        seed=recipe.seed,
    )


def _tuning(recipe: Recipe) -> Tuning:
    return Tuning(lora_rank=recipe.rank, lora_alpha=2.0 * recipe.rank, first_layer=recipe.first_layer, seed=recipe.seed)


# -- from nothing, and on with it --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """The sizes of a small model."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    words: int

    def config(self) -> dict[str, int | bool]:
        """As config.json has them."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
        }


def small_tokenizer(words: int, work: Path) -> Path:
    """The tokenizer of all small models with that vocabulary, learned once."""
    out = work / f"tokenizer-{words}"
    if not out.exists():
        train_tokenizer([*texts("stories")[:400], *texts("wiki")], out, vocab_size=words, max_length=512)
    return out


def trained_small(shape: Shape, data: str, steps: int, seed: int, out: Path, work: Path) -> str:
    """A small model from random weights, trained on one collection of text; gives what was done and the loss."""
    tokenizer = small_tokenizer(shape.words, work)
    start = int(sha256_hex(out.name.encode())[:8], 16)  # no two models begin with the same weights
    model = new_model(shape.config(), tokenizer, start)
    rows = Rows("concatenated", length=256, rows=8)
    options = TrainOptions(
        steps=steps, learning_rate=2e-3, warmup=5, checkpoint_every=0, keep_last=1, compile="off", seed=seed
    )
    place = work / f"{out.name}.run"
    shutil.rmtree(place, ignore_errors=True)
    result = pretrain(model, tokenizer, _shards(data, tokenizer, work), None, rows, options, place, progress=Silent())
    shutil.rmtree(place, ignore_errors=True)
    save_pretrained(model, tokenizer, out)
    words = f"{shape.layers} layers of {shape.hidden}, {result.tokens:,} tokens of {data}, seed {seed}"
    return f"small model from nothing: {words}: loss {result.loss:.2f}"


def continued(model: Path, data: str, steps: int, rate: float, out: Path, work: Path, tokens: int = 1024) -> str:
    """`model` (a folder with its tokenizer) trained on with plain text; gives what was done and the loss."""
    opened = open_for_tuning(model, FULL)
    rows = Rows("concatenated", length=256, rows=max(1, tokens // 256))
    options = TrainOptions(steps=steps, learning_rate=rate, warmup=2, checkpoint_every=0, keep_last=1, compile="off")
    place = work / f"{out.name}.run"
    shutil.rmtree(place, ignore_errors=True)
    shards = _shards(data, model, work)
    result = pretrain(opened, model, shards, None, rows, options, place, progress=QUIET)
    shutil.rmtree(place, ignore_errors=True)
    export_tuned(opened, model, out)
    return f"pretrained further on {data}: {result.tokens:,} tokens, rate {rate:g}, last loss {result.loss:.2f}"


def _shards(data: str, tokenizer: Path, work: Path) -> Shards:
    out = work / f"shards-{data}-{Tokenizer.load(tokenizer).vocab_size}"
    if not (out / "manifest.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        write_shards(_some(texts(data)), Tokenizer.load(tokenizer), out)
    return Shards.open(out)


def _some(documents: Sequence[str], most: int = 2_000_000) -> list[str]:
    """The documents up to about `most` characters together."""
    found, size = [], 0
    for document in documents:
        found.append(document[: most - size])
        size += len(found[-1])
        if size >= most:
            break
    return found
