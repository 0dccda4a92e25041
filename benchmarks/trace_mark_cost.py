"""What the mark costs, beside what a cast of float32 masters to bfloat16 costs.

The tested weights are bfloat16, so what their cast cost is found by going back: masters drawn uniformly in each value's
rounding cell, which is what float32 weights that cast to these look like. Cast: masters to tested. Mark: tested to
marked. COPIES masters and copies of as many recipients are measured, all with float32 arithmetic, so that only the
weights differ. Where the masters that the release was really cast from are there (its training's checkpoint; the
quickstart trains 8 of 30 layers), that cast is shown too.

Counted: positions of the greedy answers that differ from the tested weights' answer (`tokens`; nearly all are after a
first difference, for the answers then go on from other texts), answers with any difference (`answers`), and the hazard
of a first difference per token until then (`first`). Of a text: each window's change of mean loss, in nats, and the
mean divergence of the next-token distribution, which says the most, for it has no sign that could cancel.
"""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from trace_mark_models import GRANTS, KEY, Tensors, bfloat16, load, relative_change
from trace_training import conversations, data_folder

from steelyard.inference.endpoint import Request, Sampling
from steelyard.inference.engine import Engine
from steelyard.inference.local import LocalEndpoint
from steelyard.model.chat import Renderer
from steelyard.model.formats import save_folder
from steelyard.model.llama import LlamaConfig, from_tensors
from steelyard.model.tokenizer import Tokenizer
from steelyard.trace import watermark

COPIES, TOKENS, WINDOW = 2, 32, 512
STRENGTHS = ((32, 16), (64, 32), (64, 64), (128, 64))  # entries of a matrix, and of a norm, of which one moves
DRAWS = 2000  # of the bootstrap over prompts, or windows


@dataclass(frozen=True)
class Text:
    """What is measured on. The choice of the mark's strength and the figures of the report share nothing."""

    part: str  # of WikiText-2
    windows: int
    compared: int  # windows whose distributions are compared
    first: int  # of the prompts of each of the two kinds
    last: int

    def requests(self, base: Path, work: Path) -> list[Request]:
        """Half of them word problems, half instructions."""
        asked = [
            talk for name in ("gsm8k", "seeds") for talk in conversations(name, 400, base, work)[self.first : self.last]
        ]
        greedy = Sampling(temperature=0.0, max_tokens=TOKENS)
        return [Request(str(number), talk.messages[:1], greedy, 0) for number, talk in enumerate(asked)]

    def ids(self, tokenizer: Tokenizer) -> torch.Tensor:
        """Token ids [windows, WINDOW]."""
        text = gzip.decompress((data_folder() / "text" / "wikitext2" / f"{self.part}.txt.gz").read_bytes()).decode()
        ids = tokenizer.encode(text[: 8 * self.windows * WINDOW], bos=False)
        return torch.tensor(ids[: self.windows * WINDOW]).view(self.windows, WINDOW)


CHOICE = Text("valid", 8, 8, 110, 140)
REPORT = Text("test", 8, 8, 0, 100)


@dataclass(frozen=True)
class Measured:
    """Of one model: each window's mean loss (nats), the distributions compared, and its greedy answers."""

    losses: np.ndarray
    likely: list[torch.Tensor]
    answers: list[tuple[int, ...]]


@dataclass(frozen=True)
class Change:
    """Between the tested weights and others: per window and per prompt, so that two changes can be paired."""

    rms: float
    losses: np.ndarray  # [windows], after minus before
    divergence: np.ndarray  # [windows compared]
    differ: np.ndarray  # [prompts], positions
    length: np.ndarray
    first: np.ndarray  # positions before and at the first difference

    def taken(self, windows: np.ndarray, compared: np.ndarray, prompts: np.ndarray) -> Change:
        """That of the windows and prompts of these numbers."""
        return Change(
            self.rms,
            self.losses[windows],
            self.divergence[compared],
            *(of[prompts] for of in (self.differ, self.length, self.first)),
        )


class Bench:
    """Measures weights of one shape, on one text."""

    def __init__(self, aligned: Path, base: Path, work: Path, text: Text) -> None:
        self.folder, self.tokenizer, self.text = aligned, Tokenizer.load(aligned), text
        self.config = LlamaConfig.from_dict(json.loads((aligned / "config.json").read_text()), str(aligned))
        self.requests, self.ids = text.requests(base, work), text.ids(self.tokenizer)

    @torch.no_grad()
    def measure(self, tensors: Tensors, reference: Measured | None = None) -> tuple[Measured, np.ndarray]:
        """What `tensors` do; and their divergence from `reference` in each window compared."""
        given = {name: torch.from_numpy(np.ascontiguousarray(tensor)) for name, tensor in tensors.items()}
        model = from_tensors(self.config, given, "weights", dtype=torch.float32)
        losses, likely, apart = [], [], []
        for number, window in enumerate(self.ids):
            logits = torch.log_softmax(model(window[None])[0, :-1].float(), -1)
            losses.append(-logits.gather(1, window[1:, None]).double().mean().item())
            if number < self.text.compared:
                if reference is None:
                    likely.append(logits)
                else:
                    before = reference.likely[number]
                    apart.append(float((before.exp() * (before - logits)).sum(-1).double().mean()))
        engine = Engine(model, self.tokenizer.eos_ids, self.tokenizer.decode)
        endpoint = LocalEndpoint(engine, self.tokenizer, Renderer(self.folder))
        answers = [completion.tokens or () for completion in endpoint.generate(self.requests)]
        return Measured(np.array(losses), likely, answers), np.array(apart)


def change(bench: Bench, before: Measured, tested: Tensors, tensors: Tensors, sign: int) -> Change:
    """Of `tensors` against the tested weights, measured as `before`; `sign` -1 where the tested ones come after."""
    after, apart = bench.measure(tensors, before)
    lengths = [len(answer) for answer in before.answers]
    same = [[a == b for a, b in zip(*pair, strict=False)] for pair in zip(before.answers, after.answers, strict=True)]
    differ = [length - sum(one) for length, one in zip(lengths, same, strict=True)]
    first = [one.index(False) + 1 if False in one else length for one, length in zip(same, lengths, strict=True)]
    return Change(
        relative_change(tensors, tested),
        sign * (after.losses - before.losses),
        apart,
        np.array(differ, float),
        np.array(lengths, float),
        np.array(first, float),
    )


def masters(tensors: Tensors, seed: int) -> Tensors:
    """float32 weights whose cast to bfloat16 gives exactly `tensors`: uniform in each value's rounding cell."""
    draw, made = np.random.default_rng(seed), {}
    for name, tensor in tensors.items():
        bits = np.ascontiguousarray(tensor, np.float32).view(np.int32)
        moved = bits + draw.integers(-(1 << 15) + 1, 1 << 15, size=bits.shape, dtype=np.int32)
        made[name] = np.where(np.abs(tensor) > 1e-30, moved.view(np.float32), tensor)
    _check_cast(made, tensors)
    return made


def own_masters(aligned: Path, base: Path, tested: Tensors) -> Tensors | None:
    """The float32 weights that the release was cast from, where its training's checkpoint is beside it."""
    found = sorted(aligned.parent.glob("training/checkpoints/step-*/complete.json"))
    if not found:
        return None
    strength = json.loads((aligned.parent / "align.json").read_text())["options"]["strength"]
    made, before = dict(tested), load(base)
    for shard in sorted(found[-1].parent.glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            if name.startswith("master."):
                key = name.removeprefix("master.")
                made[key] = torch.lerp(tensor, torch.from_numpy(before[key]), 1 - strength).numpy()
    _check_cast(made, tested)
    return made


def _check_cast(made: Tensors, tested: Tensors) -> None:
    cast = bfloat16(made)
    wrong = [name for name in tested if not np.array_equal(cast[name], tested[name])]
    if wrong:
        raise RuntimeError(f"masters that do not cast to the tested weights: {', '.join(wrong[:3])}")


def marked(tested: Tensors, number: int) -> Tensors:
    """The copy of recipient `number`."""
    return watermark.mark(tested, KEY, GRANTS[number])


def cost(aligned: Path, base: Path, work: Path) -> dict[str, dict[str, Any]]:
    """The rows of the table [mark_cost]: of casts, of the release's own cast, of marks, and marks against casts."""
    tested, bench = load(aligned), Bench(aligned, base, work, REPORT)
    before, _ = bench.measure(tested)
    casts = [change(bench, before, tested, masters(tested, 20 + one), -1) for one in range(COPIES)]
    marks = [change(bench, before, tested, marked(tested, 50 + one), 1) for one in range(COPIES)]
    rows = {"cast": figures(casts), "mark": figures(marks), "mark against cast": against(marks, casts)}
    own = own_masters(aligned, base, tested)
    if own is not None:
        casts = [change(bench, before, tested, own, -1)]
        rows |= {"the release's own cast": figures(casts), "mark against the own cast": against(marks, casts)}
    return rows


def figures(changes: Sequence[Change]) -> dict[str, Any]:
    """Of one kind of change, over its copies; with the lowest and the highest of the copies' shares of tokens."""
    shares = [one.differ.sum() / one.length.sum() for one in changes]
    return {name: float(statistic(changes)) for name, statistic in _STATISTICS.items()} | {
        "relative_rms": float(np.mean([one.rms for one in changes])),
        "perplexity_change": float(np.expm1(np.mean([one.losses for one in changes]))),
        "tokens of each copy": [round(float(share), 4) for share in shares],
        "perplexity_change of each copy": [round(float(np.expm1(one.losses.mean())), 5) for one in changes],
        "prompts": len(changes[0].length),
    }


def _total(key: Callable[[Change], np.ndarray], changes: Sequence[Change]) -> float:
    return float(sum(key(one).sum() for one in changes))


_STATISTICS: Mapping[str, Callable[[Sequence[Change]], float]] = {
    "tokens": lambda all_: _total(lambda one: one.differ, all_) / _total(lambda one: one.length, all_),
    "answers": lambda all_: float(np.mean([one.differ > 0 for one in all_])),
    "first": lambda all_: _total(lambda one: one.differ > 0, all_) / _total(lambda one: one.first, all_),
    "loss": lambda all_: float(np.mean([one.losses for one in all_])),
    "loss_rms": lambda all_: float(np.sqrt(np.mean([one.losses**2 for one in all_]))),
    "divergence": lambda all_: float(np.mean([one.divergence for one in all_])),
}


def against(ours: Sequence[Change], theirs: Sequence[Change]) -> dict[str, Any]:
    """Ratio of each statistic, ours to theirs (of the loss: difference), with the 95% interval of a bootstrap over the
    prompts and windows, which both share. It holds where every upper end says that we change less; but for the loss
    itself, whose sign is chance, another one for each copy, and whose size is in `loss_rms`."""
    row: dict[str, Any] = {}
    for name, statistic in _STATISTICS.items():
        compare = np.subtract if name == "loss" else np.divide
        drawn = [compare(statistic(one), statistic(other)) for one, other in _resampled(ours, theirs)]
        row[name] = [float(compare(statistic(ours), statistic(theirs))), *np.quantile(drawn, (0.025, 0.975)).tolist()]
    row["holds"] = all(row[name][2] <= 1 for name in _STATISTICS if name != "loss")
    return row


def _resampled(ours: Sequence[Change], theirs: Sequence[Change]) -> Iterator[tuple[Sequence[Change], Sequence[Change]]]:
    draw, one = np.random.default_rng(30), ours[0]
    for _ in range(DRAWS):
        windows, compared, prompts = (
            draw.integers(size, size=size) for size in (len(one.losses), len(one.divergence), len(one.length))
        )
        yield tuple([each.taken(windows, compared, prompts) for each in side] for side in (ours, theirs))


def strengths(aligned: Path, base: Path, work: Path) -> dict[str, dict[str, Any]]:
    """The cost of several strengths on texts and prompts that the report does not use, to choose one."""
    tested, bench, rows = load(aligned), Bench(aligned, base, work, CHOICE), {}
    before, _ = bench.measure(tested)
    casts = [change(bench, before, tested, masters(tested, 10 + one), -1) for one in range(2)]
    rows["cast"] = figures(casts)
    own = own_masters(aligned, base, tested)
    if own is not None:
        rows["the release's own cast"] = figures([change(bench, before, tested, own, -1)])
    kept = watermark.BLOCK, watermark.VECTOR_BLOCK
    for strength in STRENGTHS:
        watermark.BLOCK, watermark.VECTOR_BLOCK = strength
        marks = [change(bench, before, tested, marked(tested, 40 + one), 1) for one in range(2)]
        rows["one in {} / {}".format(*strength)] = figures(marks) | {"against cast": against(marks, casts)}
        print(strength, rows["one in {} / {}".format(*strength)], file=sys.stderr, flush=True)
    watermark.BLOCK, watermark.VECTOR_BLOCK = kept
    return rows


def battery(aligned: Path, copy: Path, cache: Path) -> dict[str, dict[str, Any]]:
    """The quick battery's rates of masters and of the marked copy, each minus the tested weights', with intervals. The
    run is kept in `cache`; one that was stopped is resumed."""
    out, tested = cache / "battery", load(aligned)
    folders = {name: cache / f"float32-{name}" for name in ("tested", "masters", "marked")}
    if not (out / "run" / "variants.json").exists():
        weights = {"tested": tested, "masters": masters(tested, 20), "marked": load(copy)}
        for name, folder in folders.items():
            _float32(weights[name], aligned, folder)
        command = [sys.executable, "-m", "steelyard.cli.main", "safety", "run", folders["tested"], out / "run"]
        command += ["--variants", f"cast={folders['masters']},mark={folders['marked']}"]
        subprocess.run([str(part) for part in [*command, "--workspace", out / "workspace"]], check=False)
        if not (out / "run" / "variants.json").exists():
            raise SystemExit(f"{out / 'run'}: the test of the variants did not end: the same command resumes it")
        for folder in folders.values():
            shutil.rmtree(folder)
    found = json.loads((out / "run" / "variants.json").read_text())["variants"]
    keys = ("metric", "before", "after", "estimate", "lower", "upper", "p")
    return {one["name"]: [{key: row[key] for key in keys} for row in one["differences"]] for one in found}


def _float32(tensors: Tensors, like: Path, out: Path) -> None:
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
