"""Lineage on built variants: `trace_lineage.py CACHE` (`make bench-trace`; CACHE is what `make trace-models` wrote).

Every variant is traced against all registered models; a pair is right where the answer is "derived" (or a copy) of an
ancestor, "shares an ancestor" for another model of the family, and "unrelated" else. [lineage_accuracy] counts pairs,
[lineage_false] unrelated pairs called related: those of the models that were trained here, each also with the
neurons of the suspect freshly permuted, which is the very chance that the p-value is about. [lineage_7b_seconds] is
a sparse file of LLaMA 7B's shapes in bfloat16, 13.5 GB by its size; [smollm2_seconds] the slowest answer on a suspect
made from the quickstart's model.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from harness import OUT
from trace_index import pairs, read_index

from steelyard.base.progress import default_progress
from steelyard.cli.output import print_table
from steelyard.ledger.ledger import Ledger
from steelyard.trace.digests import cast
from steelyard.trace.lineage import LEVEL, RELATED, SIBLING, UNRELATED, Relation, relate, trace
from steelyard.trace.registry import Reference, Registry, read_reference, register, write_reference
from steelyard.trace.roles import DOWN, EMBEDDING, GATE, UP, hugging_face, layer_name
from steelyard.trace.signature import chosen_neurons, chosen_tokens, sampled_rows, some_neurons
from steelyard.trace.tensors import Entry, Tensors, decode, in_memory, open_tensors

PERMUTATIONS = 12
LEAST = {"derived": 60, "unrelated": 90}  # pairs that the accuracy needs
LEAST_FALSE = 1000  # and the false positives
BARS = {"lineage_accuracy": 0.98, "lineage_7b_seconds": 10.0, "lineage_7b_megabytes": 40.0, "smollm2_seconds": 5.0}
RIGHT = {"derived": RELATED, "sibling": (SIBLING,), "unrelated": (UNRELATED,)}
FAMILIES = (  # of derived models, that must be among them
    "re-shard + rename + fp16", "GGUF Q8_0", "GGUF Q4_0", "fine-tune", "fine-tune + int4", "LoRA", "DPO",
    "rotate + permute + scale + fold", "merge", "abliteration", "continued pretraining", "pruning",
    "vocabulary extension", "layer removal",
)  # fmt: skip
SHAPES_7B = {"hidden": 4096, "intermediate": 11008, "layers": 32, "vocab": 32000}


def registered(cache: Path, rows: list[dict[str, Any]], names: set[str]) -> dict[str, Reference]:
    """The references by name, registered once in a ledger of the benchmark's own."""
    by_name = {row["name"]: row for row in rows}
    with Ledger(cache / "registry" / "ledger.sqlite") as ledger:
        for name in sorted(names):
            kind = "base" if name == "base" else "release"
            register(Path(by_name[name]["path"]), name, kind=kind, ledger=ledger, progress=default_progress())
        return {one.name: one for one in Registry.load(ledger).references if one.name in names}


def start(row: dict[str, Any], rows: dict[str, dict[str, Any]]) -> set[str]:
    """The random initialisations that a model comes from: two models of one are not independent, whatever they were
    trained on, and count neither as related nor as unrelated."""
    if not row["parents"]:
        return {row.get("start", row["name"])}
    return set().union(*(start(rows[parent], rows) for parent in row["parents"]))


def judged(rows: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any], str]]:
    """The pairs whose truth is known; unrelated ones must come from different initialisations."""
    by_name = {row["name"]: row for row in rows}
    return [
        (suspect, reference, truth)
        for suspect, reference, truth in pairs(rows)
        if truth != "unrelated" or not start(suspect, by_name) & start(reference, by_name)
    ]


def all_pairs(cache: Path) -> tuple[list[dict[str, Any]], dict[str, Reference]]:
    """A row for each pair (suspect, family, reference, truth, verdict, log10 p, seconds), and the references."""
    rows = read_index(cache / "index.json")
    wanted = judged(rows)
    references = registered(cache, rows, {reference["name"] for _, reference, _ in wanted})
    by_suspect: dict[str, list[tuple[dict[str, Any], str]]] = defaultdict(list)
    for suspect, reference, truth in wanted:
        by_suspect[suspect["name"]].append((reference, truth))
    found = []
    for row in rows:
        chosen = by_suspect[row["name"]]
        if not chosen:
            continue
        answer = trace(Path(row["path"]), list(references.values()))
        relations = {one.name: one for one in answer.relations}
        for reference, truth in chosen:
            relation = relations.get(reference["name"], Relation(reference["name"], "", answer.verdict))
            found.append(_row(row, reference["name"], truth, relation) | {"seconds": answer.seconds})
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found, references


def _row(row: dict[str, Any], reference: str, truth: str, relation: Relation) -> dict[str, Any]:
    return {
        "suspect": row["name"],
        "family": row["family"],
        "reference": reference,
        "truth": truth,
        "verdict": relation.verdict,
        "changes": list(relation.changes),
        "log10_p": relation.log10_p,
        "distance": relation.distance,
        "share": relation.share,
        "share_error": relation.share_error,
        "right": relation.verdict in RIGHT[truth],
        "evidence": list(relation.evidence),
    }


def false_positives(cache: Path, references: dict[str, Reference]) -> tuple[int, int]:
    """(pairs called related, pairs) over unrelated models of one width, with and without fresh permutations."""
    rows = read_index(cache / "index.json")
    small = [row for row in rows if "small" in row["family"] or row["family"].startswith("random")]
    unrelated = {(suspect["name"], one["name"]) for suspect, one, truth in judged(rows) if truth == "unrelated"}
    random, related, count = np.random.default_rng(0), 0, 0
    for row in small:
        model = open_tensors(Path(row["path"]))
        against = [one for name, one in references.items() if (row["name"], name) in unrelated]
        against = [one for one in against if one.sizes.hidden == hugging_face(model).sizes.hidden]
        for number in range(PERMUTATIONS + 1) if against else ():
            for relation in relate(permuted(model, random) if number else model, against):
                count += 1
                related += relation.verdict != UNRELATED
    return related, count


def permuted(model: Tensors, random: np.random.Generator) -> Tensors:
    """The same model with its neurons in another order."""
    named = hugging_face(model)
    tensors = {name: named.read(name) for name in named.stored}
    for layer in named.layers:
        order = random.permutation(named.sizes.intermediate)
        for part in (GATE, UP):
            tensors[layer_name(layer, part)] = tensors[layer_name(layer, part)][order]
        tensors[layer_name(layer, DOWN)] = tensors[layer_name(layer, DOWN)][:, order]
    found = in_memory(tensors)
    found.config = model.config
    return found


# --- a model of LLaMA 7B's shapes
# -------------------------------------------------------------------------------------


def shapes_7b() -> dict[str, tuple[int, ...]]:
    hidden, inner, vocab = SHAPES_7B["hidden"], SHAPES_7B["intermediate"], SHAPES_7B["vocab"]
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for layer in range(SHAPES_7B["layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{prefix}self_attn.{one}_proj.weight": (hidden, hidden) for one in "qkvo"}
        shapes |= {layer_name(layer, part): (inner, hidden) for part in (GATE, UP)}
        shapes[layer_name(layer, DOWN)] = (hidden, inner)
    return shapes


def write_sparse(path: Path, seed: int, *, ours: bool = False, change: float = 0.0, order: int | None = None) -> None:
    """A safetensors file of these shapes, sparse: of each matrix only rows that may be read are written, those of the
    registry where it is `ours`, else those of a suspect. `change`: relative noise; `order`: seed of a permutation of
    the neurons."""
    header, at = {}, 0
    for name, shape in shapes_7b().items():
        size = int(np.prod(shape)) * 2
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        file.truncate(start + at)
        for number, (name, shape) in enumerate(shapes_7b().items()):
            rows = sampled_rows(Entry(name, "BF16", shape, path, 0, 0))
            if name == EMBEDDING:
                rows = np.union1d(rows, chosen_tokens(shape[0]))
            source = np.arange(shape[0])
            if name.endswith((f"{GATE}.weight", f"{UP}.weight")):
                kept = chosen_neurons(shape[0])
                rows = np.union1d(rows, kept if ours else some_neurons(kept, shape[0]))
                if order is not None:
                    source = np.random.default_rng((order, int(name.split(".")[2]))).permutation(shape[0])
            width = shape[1] if len(shape) > 1 else 1
            for row in rows:
                file.seek(start + header[name]["data_offsets"][0] + int(row) * width * 2)
                file.write(_row_bytes(seed, number, int(source[row]), width, change))


def _row_bytes(seed: int, tensor: int, row: int, width: int, change: float) -> bytes:
    """bfloat16 of random sign and mantissa, so between 2^-7 and 2^-6 in size, with noise where `change` asks for
    it.
    """
    bits = np.random.default_rng((seed, tensor, row)).integers(0, 256, width, dtype=np.uint16)
    bits = ((bits & 0x80) << 8) | (120 << 7) | (bits & 0x7F)
    if not change:
        return bits.astype("<u2").tobytes()
    values = decode(bits.astype("<u2").view(np.uint8), "BF16")
    noise = np.random.default_rng((seed, tensor, row, 1)).normal(size=width) * change * np.abs(values).mean()
    return cast((values + noise).astype(np.float32), "BF16").tobytes()


def seven_billion(folder: Path) -> list[dict[str, Any]]:
    """Trace a fine-tuned, a permuted and an unrelated suspect of 7B; seconds, bytes read and verdict of each."""
    config = {"num_attention_heads": 32, "num_key_value_heads": 32}
    (folder / "ours").mkdir(parents=True)
    (folder / "ours" / "config.json").write_text(json.dumps(config))
    write_sparse(folder / "ours" / "model.safetensors", 1, ours=True)
    artifact = folder / "reference.safetensors"
    # The digests of 13 GB are beside the point here: what a large suspect is compared with is rows and signatures.
    write_reference(artifact, folder / "ours", [], progress=default_progress(), digests=False)
    reference = read_reference(artifact, "ours", "release", "0" * 64, "0" * 64, folder / "ours")
    found = []
    for name, options in (
        ("fine-tuned by 5%", {"seed": 1, "change": 0.05}),
        ("permuted", {"seed": 1, "order": 3}),
        ("unrelated", {"seed": 2}),
    ):
        path = folder / f"{name.split()[0]}.safetensors"
        write_sparse(path, **options)  # type: ignore[arg-type]
        start = time.monotonic()
        answer = trace(path, [reference])
        found.append(
            {
                "suspect": name,
                "verdict": answer.verdict,
                "changes": list(answer.relations[0].changes) if answer.relations else [],
                "log10_p": answer.relations[0].log10_p if answer.relations else 0.0,
                "seconds": time.monotonic() - start,
                "megabytes": answer.bytes_read / 1e6,
                "file_gigabytes": path.stat().st_size / 1e9,
            }
        )
        path.unlink()
    return found


def lacking(found: list[dict[str, Any]], false_pairs: int) -> list[str]:
    """What the models at hand are too few for, in words: the figures then say less than they are asked to."""
    counts = Counter(one["truth"] for one in found)
    families = {one["family"].removesuffix(" (small)") for one in found if one["truth"] == "derived"}
    said = [f"{counts[truth]} {truth} pairs of {least}" for truth, least in LEAST.items() if counts[truth] < least]
    said += [f"{false_pairs} pairs of {LEAST_FALSE} for lineage_false"] * (false_pairs < LEAST_FALSE)
    return said + [f"no {family}" for family in FAMILIES if family not in families]


def main() -> None:
    cache = Path(sys.argv[1])
    found, references = all_pairs(cache)
    families: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for one in found:
        families[one["family"], one["truth"]].append(one)
    table = [
        (family, truth, str(len(rows)), str(sum(row["right"] for row in rows)),
         f"{min(row['log10_p'] for row in rows):.0f} to {max(row['log10_p'] for row in rows):.0f}",
         ", ".join(sorted({row["verdict"] for row in rows})))
        for (family, truth), rows in sorted(families.items())
    ]  # fmt: skip
    print_table("Lineage", ("family", "truth", "pairs", "right", "log10 p", "verdicts"), table)
    for one in found:
        if not one["right"]:
            print(f"wrong: {one['suspect']} / {one['reference']}: {one['verdict']}, truth {one['truth']}; {one}")
    false, count = false_positives(cache, references)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        large = seven_billion(Path(scratch))
    print_table(
        "7B shapes",
        ("suspect", "seconds", "MB read", "GB", "log10 p", "verdict"),
        [(one["suspect"], f"{one['seconds']:.1f}", f"{one['megabytes']:.1f}", f"{one['file_gigabytes']:.1f}",
          f"{one['log10_p']:.0f}", ", ".join((one["verdict"], *one["changes"]))) for one in large],
    )  # fmt: skip
    figures = {
        "lineage_accuracy": sum(one["right"] for one in found) / len(found),
        "pairs": len(found),
        "derived_pairs": sum(one["truth"] == "derived" for one in found),
        "unrelated_pairs": sum(one["truth"] == "unrelated" for one in found),
        "lineage_false": false,
        "false_pairs": count,
        "level_log10": LEVEL,
        "lineage_7b_seconds": max(one["seconds"] for one in large),
        "lineage_7b_megabytes": max(one["megabytes"] for one in large),
    }
    ours = [one for one in found if one["truth"] == "derived" and "(small)" not in one["family"]]
    if ours:
        slowest = max(ours, key=lambda one: one["seconds"])
        figures["smollm2_seconds"] = slowest["seconds"]
        traced = len({one["suspect"] for one in ours})
        print(f"of {traced} suspects of SmolLM2's size the slowest was {slowest['suspect']}")
    for name, value in figures.items():
        bar = BARS.get(name)
        asked = "" if bar is None else f" (asked: {bar:g})"
        print(f"[{name}] {value:g}{asked}")
    for words in lacking(found, count):
        print(f"too few models: {words}")
    OUT.mkdir(exist_ok=True)
    (OUT / "trace_lineage.json").write_text(json.dumps({"figures": figures, "pairs": found, "7b": large}, indent=1))


if __name__ == "__main__":
    main()
