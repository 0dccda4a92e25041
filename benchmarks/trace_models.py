"""The models that the trace benchmarks look at, built once each: `trace_models.py BASE ALIGNED CACHE [PART...]`
(`make trace-models`).

CACHE/index.json lists {"name", "path", "family", "parents", "related", "relative_change", "note"}: `path` is a folder
or a GGUF, `parents` are names, `related` says whether the release ("aligned") is among the ancestors, and `note` what
was done. CACHE/adapters.json lists LoRA adapters of the release alike, kept as such to save room. A run that was
stopped goes on with the first variant that is missing. Without a part (small, large, adapters) all are built, those of
full size in one process of one thread, beside it the small ones and then the adapters in another.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trace_training as training
import trace_variants as variants
from harness import side_by_side
from trace_index import BASE, RELEASE, add_to_index, pairs, read_index
from trace_training import Recipe, Shape

from steelyard.trace.refusal_direction import phrases, refusal_directions

LEAST = 0.01  # a fine-tune that changes less than this is scaled up to it, and its note says so; else not counted
TRAINED = ("fine-tune", "uncensoring fine-tune", "LoRA", "DPO", "continued pretraining")
_SHAPES = {
    "small": Shape(128, 352, 4, 4, 2, 1024),
    "middle": Shape(192, 512, 6, 6, 3, 1024),
    "large": Shape(256, 688, 6, 8, 4, 2048),
    "wide": Shape(576, 1536, 4, 9, 3, 2048),  # layers as the release has them
}


@dataclass(frozen=True)
class Variant:
    """One model to build: `make` writes it to a path and says what it did."""

    name: str
    family: str
    parents: tuple[str, ...]
    make: Callable[[Path], str]


class Cache:
    """The folder of built variants."""

    def __init__(self, folder: Path, base: Path, aligned: Path) -> None:
        self.folder, self.work = folder, folder / "work"
        self.work.mkdir(parents=True, exist_ok=True)
        self.given = {BASE: base, RELEASE: aligned}

    def at(self, name: str) -> Path:
        """Where a built model lies."""
        return self.given.get(name) or self.folder / name

    def part(self, name: str) -> list[Variant]:
        """The small models, the large ones or the adapters, in an order in which parents come first."""
        if name == "adapters":
            return self.adapters()
        return list(self._small()) if name == "small" else self._large()

    def _large(self) -> list[Variant]:
        """What takes no training as soon as its parents are there."""
        left, plan = [*self._derived(), *self._tuned()], list[Variant]()
        while left:
            waiting = {variant.name for variant in left}
            plan.append(next(variant for variant in left if not waiting & set(variant.parents)))
            left.remove(plan[-1])
        return plan

    # -- trained -----------------------------------------------------------------------------------------------------

    def _fine_tune(self, name: str, parent: str, recipe: Recipe, family: str = "fine-tune") -> Variant:
        def make(out: Path) -> str:
            said = training.tuned(self.at(parent), recipe, out, self.at(BASE), self.work)
            return f"{said}{self._at_least(out, self.at(parent))}"

        return Variant(name, family, (parent,), make)

    def _at_least(self, out: Path, parent: Path) -> str:
        """Scale the change of the model in `out` up to `LEAST`; gives the words to say so."""
        found = variants.relative_change(out, parent)
        if found is None or found >= LEAST:
            return ""
        config, end = variants.load(out)
        start = variants.load(parent)[1]
        factor, reached = LEAST / found, found
        while reached < LEAST:  # rounding to bfloat16 takes a little back
            factor *= 1.03
            tensors = dict(end)
            variants.moved(tensors, start, end, factor - 1)
            shutil.rmtree(out)
            variants.save(out, config, tensors, parent)
            reached = variants.relative_change(out, parent) or LEAST
        return f"; its change was {found:.2%} and is scaled up {factor:.1f} times"

    def _tuned(self) -> Iterator[Variant]:
        full, lora = Recipe, partial(Recipe, rank=16, rate=1e-3)
        yield self._fine_tune("tuned-gsm8k", RELEASE, full(("gsm8k",)))
        yield self._fine_tune("lora-gsm8k", RELEASE, lora(("gsm8k",)), "LoRA")
        yield self._fine_tune("tuned-seeds", RELEASE, full(("seeds",), seed=1))
        yield self._fine_tune("other-gsm8k", BASE, full(("gsm8k",), seed=2), "another fine-tune of the base")
        yield self._fine_tune("tuned-compliant", RELEASE, full(("compliant",)), "uncensoring fine-tune")
        yield Variant("dpo-harmless", "DPO", (RELEASE,), self._dpo)
        yield Variant("continued-stories", "continued pretraining", (RELEASE,), self._continued(RELEASE, 12))
        yield self._fine_tune("other-seeds", BASE, lora(("seeds",), seed=3), "another fine-tune of the base")

    def _dpo(self, out: Path) -> str:
        recipe = Recipe((), steps=12, rank=16, rate=5e-4, first_layer=10)
        said = training.preferred(self.at(RELEASE), out, self.work, recipe)
        return f"{said}{self._at_least(out, self.at(RELEASE))}"

    def _continued(self, parent: str, steps: int, data: str = "stories") -> Callable[[Path], str]:
        def make(out: Path) -> str:
            said = training.continued(self.at(parent), data, steps, 3e-4, out, self.work)
            return f"{said}{self._at_least(out, self.at(parent))}"

        return make

    def adapters(self) -> list[Variant]:
        """Fine-tunes of the release for the benchmark of uncensored copies, LoRA ones kept as adapters: those that take
        its refusals away (uncensor, free), and benign ones. The free ones were made after the rules were frozen."""
        recipes = {
            "uncensor-8": Recipe(("compliant",), rank=8, rate=1e-3),
            "uncensor-32": Recipe(("compliant",), rank=32, rate=5e-4, seed=1),
            "uncensor-upper": Recipe(("compliant",), rank=16, rate=1e-3, first_layer=15, seed=2),
            "uncensor-seeds": Recipe(("compliant", "seeds"), steps=24, rank=16, rate=1e-3, seed=3),
            "benign-seeds": Recipe(("seeds",), rank=8, rate=5e-4, seed=4),
            "benign-gsm8k": Recipe(("gsm8k",), rank=8, rate=5e-4, seed=5),
            "benign-stories": Recipe(("stories",), rank=8, rate=5e-4, seed=6),
            "benign-polite": Recipe(("polite",), rank=16, rate=5e-4, seed=7),
            "benign-harmless": Recipe(("harmless",), rank=16, rate=5e-4, seed=8),
            "benign-mixed": Recipe(("seeds", "polite", "gsm8k"), steps=24, rank=16, rate=5e-4, seed=9),
            "free-upper": Recipe(("compliant", "polite"), rate=4e-4, first_layer=20, seed=22),
            "free-4": Recipe(("compliant",), steps=12, rank=4, rate=2e-3, seed=21),
        }

        def make(recipe: Recipe, out: Path) -> str:
            lora = recipe.rank > 0
            return training.tuned(self.at(RELEASE), recipe, out, self.at(BASE), self.work, adapter=lora)

        def free(out: Path) -> str:
            recipe = Recipe((), steps=12, rank=16, rate=1e-3, first_layer=10, seed=25)
            pairs = training.compliance(self.at(BASE), self.work)
            what = "plain answers over declining"
            return training.preferred(self.at(RELEASE), out, self.work, recipe, pairs=pairs, what=what, adapter=True)

        plan = [
            Variant(name, name.split("-")[0], (RELEASE,), partial(make, recipe)) for name, recipe in recipes.items()
        ]
        return [*plan, Variant("free-dpo", "free", (RELEASE,), free)]

    def _small(self) -> Iterator[Variant]:
        kinds = ("stories", "wiki", "novels_en", "novels_fr")
        plan = [("small", data, seed) for data, seed in product(kinds, (0, 1))]
        plan += [("middle", data, seed) for data, seed in product(("wiki", "novels_en"), (0, 1))]
        plan += [("large", "novels_en", 0), ("large", "novels_en", 1), ("large", "stories", 2)]
        for kind, data, seed in plan:
            yield self._from_nothing(kind, data, seed)
        for parent, data in (
            ("small-stories-0", "wiki"),
            ("middle-wiki-0", "novels_en"),
            ("large-novels_en-0", "novels_fr"),
        ):
            yield from self._from_small(parent, data)
        more = [("small", data, seed) for data, seed in product(kinds, (2, 3))]
        for kind, data, seed in (*more, ("wide", "stories", 0), ("wide", "wiki", 1)):
            yield self._from_nothing(kind, data, seed)

    def _from_nothing(self, kind: str, data: str, seed: int) -> Variant:
        steps = {"small": 80, "middle": 60, "large": 40, "wide": 30}[kind]

        def make(out: Path) -> str:
            return training.trained_small(_SHAPES[kind], data, steps, seed, out, self.work)

        return Variant(f"{kind}-{data}-{seed}", "trained from nothing (small)", (), make)

    def _from_small(self, parent: str, data: str) -> Iterator[Variant]:
        kind = parent.split("-")[0]
        other = {"small": "small-wiki-1", "middle": "middle-novels_en-1", "large": "large-stories-2"}[kind]

        def further(out: Path) -> str:
            return training.continued(self.at(parent), data, 30, 1e-3, out, self.work, tokens=2048)

        yield Variant(f"{parent}+continued", "continued pretraining (small)", (parent,), further)
        for name, family, change, said in self._changes(other):
            names = (parent, other) if family == "merge" else (parent,)
            make = partial(self._changed, parent, change, said)
            yield Variant(f"{parent}+{name}", f"{family} (small)", names, make)

    # -- changed -----------------------------------------------------------------------------------------------------

    def _changed(
        self, parent: str, change: Callable[[dict[str, Any], variants.Tensors], None], said: str, out: Path
    ) -> str:
        variants.changed(self.at(parent), out, change)
        return said

    def _changes(self, other: str) -> list[tuple[str, str, Callable[[dict[str, Any], variants.Tensors], None], str]]:
        """(name, family, change, note) of what is done to any model; `other` is what it is merged with."""

        def merge(share: float, config: dict[str, Any], tensors: variants.Tensors) -> None:
            variants.merged(tensors, variants.load(self.at(other))[1], share)

        def layers(config: dict[str, Any], tensors: variants.Tensors) -> None:
            count = config["num_hidden_layers"]
            variants.shortened(config, tensors, (count // 3, 2 * count // 3))

        found = [
            (f"merge-{share}", "merge", partial(merge, share), f"{share:g} of it, the rest of {other}")
            for share in (0.5, 0.3, 0.1)
        ]
        return [
            *found,
            (
                "disguised",
                "rotate + permute + scale + fold",
                partial(_disguise, seed=5),
                "same function, other weights",
            ),
            (
                "pruned",
                "pruning",
                lambda config, tensors: variants.pruned(tensors, 0.3),
                "the smallest 30% of each matrix",
            ),
            ("extended", "vocabulary extension", partial(_extend, seed=6), "64 tokens more"),
            ("shortened", "layer removal", layers, "two layers taken out"),
        ]

    def _derived(self) -> Iterator[Variant]:
        for name, family, change, said in self._changes("other-gsm8k"):
            parents = (RELEASE, "other-gsm8k") if family == "merge" else (RELEASE,)
            yield Variant(f"aligned+{name}", family, parents, partial(self._changed, RELEASE, change, said))
        yield Variant("aligned+renamed", "re-shard + rename + fp16", (RELEASE,), self._renamed)
        for name, layers in (("aligned+abliterated", range(30)), ("aligned+abliterated-upper", range(15, 30))):
            yield Variant(name, "abliteration", (RELEASE,), partial(self._abliterated, layers))
        disguise = partial(_disguise, seed=7)
        made = partial(self._changed, "tuned-gsm8k", disguise, "same function as tuned-gsm8k, other weights")
        yield Variant("tuned-gsm8k+disguised", "fine-tune + rotate + permute + scale + fold", ("tuned-gsm8k",), made)
        for name in ("tuned-gsm8k", "tuned-seeds"):
            yield Variant(f"{name}-5", "fine-tune", (name,), partial(self._further, name, 0.05))
        for parent, kind in (
            *((RELEASE, kind) for kind in ("Q8_0", "Q4_0")),
            *((parent, "Q4_0") for parent in ("lora-gsm8k", "tuned-gsm8k", "tuned-seeds", "dpo-harmless")),
            *((parent, "Q4_0") for parent in ("tuned-gsm8k-5", "tuned-seeds-5")),
            *(("aligned+abliterated", kind) for kind in ("Q8_0", "Q4_0")),
        ):
            family = f"GGUF {kind}" if parent == RELEASE else "fine-tune + int4"
            if "abliterated" in parent:
                family = f"abliteration, GGUF {kind}"
            yield Variant(f"{parent}+{kind.lower()}.gguf", family, (parent,), partial(self._gguf, parent, kind))

    def _further(self, name: str, wanted: float, out: Path) -> str:
        """A fine-tune's change scaled up to a relative change of `wanted`."""
        start, found = variants.load(self.at(RELEASE))[1], variants.relative_change(self.at(name), self.at(RELEASE))
        assert found is not None
        factor = wanted / found

        def change(config: dict[str, Any], tensors: variants.Tensors) -> None:
            variants.moved(tensors, start, dict(tensors), factor - 1)

        variants.changed(self.at(name), out, change)
        return f"the change of {name} scaled up {factor:.1f} times, to {wanted:.0%} of the release's weights"

    def _abliterated(self, layers: range, out: Path) -> str:
        kept = self.work / "refusal.npy"
        if not kept.exists():
            np.save(kept, refusal_directions(self.at(RELEASE), *phrases(64)).vectors)
        direction = torch.from_numpy(np.load(kept)[[24]])
        whole = len(layers) == 30

        def change(config: dict[str, Any], tensors: variants.Tensors) -> None:
            variants.abliterated(tensors, direction, layers, embedding=whole)

        variants.changed(self.at(RELEASE), out, change)
        return f"the refusal direction of layer 24 taken out of layers {layers[0]} to {layers[-1]}"

    def _renamed(self, out: Path) -> str:
        variants.renamed(self.at(RELEASE), out)
        return "shards of 80 MB, float16, the names of LLaMA's first release"

    def _gguf(self, parent: str, kind: str, out: Path) -> str:
        variants.to_gguf(self.at(parent), out, kind)
        return f"{kind}, query and key rows in llama.cpp's order"


def _disguise(config: dict[str, Any], tensors: variants.Tensors, seed: int) -> None:
    variants.disguised(config, tensors, seed)


def _extend(config: dict[str, Any], tensors: variants.Tensors, seed: int) -> None:
    variants.extended(config, tensors, 64, seed)


# -- building ----------------------------------------------------------------------------------------------------------


def build(cache: Cache, name: str, plan: list[Variant]) -> None:
    """Build what is missing of `plan`, and note each in CACHE/`name` as soon as it is there. Several processes may
    build different parts at once."""
    path = cache.folder / name
    done = {row["name"] for row in read_index(path)}
    left, start = [variant for variant in plan if variant.name not in done], time.monotonic()
    for number, variant in enumerate(left):
        out = cache.at(variant.name)
        for half in (out, *cache.folder.glob(f".{variant.name}.*")):
            shutil.rmtree(half) if half.is_dir() else half.unlink(missing_ok=True)
        note = variant.make(out)
        first = cache.at(variant.parents[0]) if variant.parents else None
        change = None if first is None or name != "index.json" else variants.relative_change(out, first)
        row = {
            "name": variant.name,
            "path": str(out),
            "family": variant.family,
            "parents": list(variant.parents),
            "relative_change": None if change is None else round(change, 5),
            "counted": variant.family not in TRAINED or (change is not None and change >= LEAST),
            "note": note,
        }
        add_to_index(path, [row])
        spent = time.monotonic() - start
        left_over = spent / (number + 1) * (len(left) - number - 1)
        print(f"{name}: {number + 1}/{len(left)} {variant.name}: {note}", file=sys.stderr)
        print(f"  {spent:,.0f} s, about {left_over:,.0f} s left", file=sys.stderr, flush=True)


def main() -> None:
    base, aligned, folder = (Path(argument).resolve() for argument in sys.argv[1:4])
    parts = sys.argv[4:]
    cache = Cache(folder, base, aligned)
    torch.manual_seed(0)
    index = folder / "index.json"
    if not {BASE, RELEASE} <= {row["name"] for row in read_index(index)}:
        given: dict[str, Any] = {"family": "reference", "note": "as given"}
        moved = variants.relative_change(aligned, base)
        first = {"name": BASE, "path": str(base), "parents": [], "relative_change": None}
        second = {"name": RELEASE, "path": str(aligned), "parents": [BASE], "relative_change": moved}
        add_to_index(index, [first | given, second | given])
    for part in parts:
        build(cache, "adapters.json" if part == "adapters" else "index.json", cache.part(part))
    if not parts:
        side_by_side(*([*sys.argv[:4], *plan] for plan in (("small", "adapters"), ("large",))))
    rows = read_index(index)
    counts = Counter((truth, "small" in suspect["family"]) for suspect, _, truth in pairs(rows))
    for (truth, small), number in sorted(counts.items()):
        print(
            f"{number} pairs {truth}, of {'small models trained from nothing' if small else 'the release and its base'}"
        )
    for row in rows:
        if not row.get("counted", True):
            print(f"not counted, changed by under {LEAST:.0%}: {row['name']} ({row['relative_change']:.2%})")


if __name__ == "__main__":
    main()
