"""Copies under disguises that leave a model computing what it did, and models that only look like ours."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from suspects_made import SMALL, Weights, noised, permuted, put, references, rounded, safetensors_bytes, weights, write

from steelyard.trace.digests import cast
from steelyard.trace.elsewhere import trace_elsewhere
from steelyard.trace.lineage import DERIVED, EXACT, SAME, SIBLING, UNREADABLE, UNRELATED, Relation, nearest, relate
from steelyard.trace.registry import Reference
from steelyard.trace.suspects import trace_all
from steelyard.trace.tensors import in_memory

BASE = weights(0)
RELEASE = rounded(noised(BASE, 0.01, seed=1))
LAYERS = range(SMALL["num_hidden_layers"])


def tuned(tensors: Weights, seed: int) -> Weights:
    """Every tensor moved, vectors too: nothing is left that equal bytes would show."""
    random = np.random.default_rng(seed)
    found = noised(tensors, 0.01, seed)
    return {
        name: one if one.ndim == 2 else (one * (1 + 0.003 * random.normal(size=one.shape))).astype(np.float32)
        for name, one in found.items()
    }


OURS, SIBLINGS, STRANGER = tuned(RELEASE, 3), tuned(BASE, 4), weights(9)


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> list[Reference]:
    models = {"base": ("base", BASE), "release": ("release", RELEASE)}
    return references(tmp_path_factory.mktemp("registry"), models)


def related(tensors: Weights, registered: list[Reference]) -> dict[str, Relation]:
    suspect = in_memory(tensors)
    suspect.config = SMALL
    return {one.name: one for one in relate(suspect, registered)}


def mlp(layer: int, part: str) -> str:
    return f"model.layers.{layer}.mlp.{part}_proj.weight"


def rescaled(tensors: Weights, factors: Callable[[int], np.ndarray]) -> Weights:
    """Each neuron's up row times its factor, its down column by that."""
    found = dict(tensors)
    for layer in LAYERS:
        factor = factors(layer).astype(np.float32)
        found[mlp(layer, "up")] = tensors[mlp(layer, "up")] * factor[:, None]
        found[mlp(layer, "down")] = tensors[mlp(layer, "down")] / factor
    return found


def half_flipped(tensors: Weights) -> Weights:
    return rescaled(tensors, lambda layer: np.random.default_rng(layer).choice([-1.0, 1.0], 96))


def flipped(tensors: Weights) -> Weights:
    return rescaled(tensors, lambda layer: -np.ones(96))


def scaled(tensors: Weights) -> Weights:
    return rescaled(tensors, lambda layer: np.exp(np.random.default_rng(layer).normal(size=96)))


def folded(tensors: Weights) -> Weights:
    """Norms put into the rows that read them, no rotation."""
    found = dict(tensors)
    for name, one in tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            found[name] = one * tensors[name.split("self_attn")[0] + "input_layernorm.weight"]
        elif name.endswith(("gate_proj.weight", "up_proj.weight")):
            found[name] = one * tensors[name.split("mlp")[0] + "post_attention_layernorm.weight"]
        elif name.endswith("layernorm.weight"):
            found[name] = np.ones_like(one)
    return found


def heads_moved(tensors: Weights) -> Weights:
    """The two groups of heads change places."""
    found = dict(tensors)
    for layer in LAYERS:
        for part, axis in (("q", 0), ("k", 0), ("v", 0), ("o", 1)):
            name = f"model.layers.{layer}.self_attn.{part}_proj.weight"
            found[name] = np.roll(tensors[name], tensors[name].shape[axis] // 2, axis=axis)
    return found


def stacked(tensors: Weights, order: list[int], other: Weights | None = None) -> Weights:
    """Layers in that order; those of `other` where the number is negative (-1: its first)."""
    found = {name: one for name, one in tensors.items() if ".layers." not in name}
    for at, layer in enumerate(order):
        source, number = (tensors, layer) if layer >= 0 else (other or {}, -1 - layer)
        for name, one in source.items():
            if f".layers.{number}." in name:
                found[name.replace(f".layers.{number}.", f".layers.{at}.")] = one
    return found


def doubled(tensors: Weights) -> Weights:
    """Depth up-scaling: the middle layers twice."""
    return stacked(tensors, [0, 1, 2, 1, 2, 3])


def interleaved(tensors: Weights) -> Weights:
    """Layers of a stranger between ours."""
    return stacked(tensors, [-1, 0, -2, 1, -3, 2, -4, 3], STRANGER)


def with_empty_layers(tensors: Weights) -> Weights:
    found = stacked(tensors, [0, 0, 1, 2, 3, 3])
    return {name: np.zeros_like(one) if ".layers.0." in name else one for name, one in found.items()}


def tokens_moved(tensors: Weights) -> Weights:
    order = np.random.default_rng(0).permutation(SMALL["vocab_size"])
    return tensors | {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"][order]}


def beside_decoys(tensors: Weights) -> Weights:
    """Many small layers under another prefix."""
    random = np.random.default_rng(1)
    decoys = {
        f"decoy.{mlp(layer, part)}": random.normal(size=(8, 64)) for layer in range(50) for part in ("gate", "up")
    }
    return tensors | decoys


def fused(tensors: Weights) -> Weights:
    """Gate and up in one matrix, query, key and value in another, as Phi-3 has them."""
    found = dict(tensors)
    for layer in LAYERS:
        head = f"model.layers.{layer}.self_attn."
        one, two = (found.pop(mlp(layer, part)) for part in ("gate", "up"))
        found[mlp(layer, "gate_up")] = np.concatenate([one, two])
        parts = [found.pop(f"{head}{part}_proj.weight") for part in "qkv"]
        found[f"{head}qkv_proj.weight"] = np.concatenate(parts)
    return found


DISGUISES = (
    half_flipped, flipped, scaled, folded, heads_moved, doubled, interleaved, with_empty_layers, tokens_moved,
    beside_decoys,
)  # fmt: skip


@pytest.mark.parametrize("disguise", DISGUISES)
def test_a_disguised_copy_is_derived_and_a_disguised_relative_is_not(
    disguise: Callable[[Weights], Weights], registered: list[Reference]
) -> None:
    found = related(disguise(OURS), registered)
    assert found["release"].verdict == DERIVED
    assert nearest(list(found.values())) == found["release"]
    assert found["release"].log10_p < -15
    found = related(disguise(SIBLINGS), registered)
    assert (found["base"].verdict, found["release"].verdict) == (DERIVED, SIBLING)
    found = related(disguise(STRANGER), registered)
    assert {one.verdict for one in found.values()} == {UNRELATED}


def test_flipped_and_permuted(registered: list[Reference]) -> None:
    found = related(permuted(flipped(OURS)), registered)["release"]
    assert (found.verdict, found.changes) == (DERIVED, ("permuted",))


def test_fused_matrices_are_taken_apart(tmp_path: Path, registered: list[Reference]) -> None:
    (copy,) = trace_all(write(tmp_path / "copy", fused(RELEASE)), registered)
    assert (copy.verdict, copy.nearest.name) == (SAME, "release")
    (tune,) = trace_all(write(tmp_path / "tuned", fused(OURS)), registered)
    assert (tune.verdict, tune.nearest.name, tune.nearest.changes) == (DERIVED, "release", ("fine-tuned",))


# --- what looks like ours, or says nothing
# ----------------------------------------------------------------------------


def _constant_embedding(value: float) -> Weights:
    return STRANGER | {"model.embed_tokens.weight": np.full((300, 64), value, np.float32)}


def _no_mlp(rows: Callable[[np.ndarray], np.ndarray]) -> Weights:
    return {name: rows(one) if "gate_proj" in name or "up_proj" in name else one for name, one in STRANGER.items()}


@pytest.mark.parametrize(
    "suspect",
    [
        _constant_embedding(0.0),
        _constant_embedding(1.0),
        _no_mlp(np.zeros_like),
        _no_mlp(np.ones_like),
        _no_mlp(lambda one: np.eye(*one.shape, dtype=np.float32)),
        _no_mlp(lambda one: np.repeat(one[:1], len(one), axis=0)),
        _no_mlp(lambda one: np.outer(one[:, 0], one[0])),
    ],
    ids=["no embedding", "equal embeddings", "zero rows", "rows of ones", "identity", "equal rows", "rank one"],
)
def test_weights_that_say_nothing_are_not_ours(suspect: Weights, registered: list[Reference]) -> None:
    found = related(suspect, registered)
    assert {(one.verdict, one.log10_p > -3) for one in found.values()} == {(UNRELATED, True)}


def test_a_norm_of_two_values_proves_nothing(tmp_path: Path) -> None:
    norm = np.ones(64, np.float32)
    norm[5] = 0.5
    one = {"model.norm.weight": norm, "mask": np.tri(64, dtype=np.float32)}
    registered = references(tmp_path, {"release": ("release", RELEASE | one)})
    assert related(STRANGER | one, registered)["release"].verdict == UNRELATED
    (copy,) = trace_all(tmp_path / "release", registered)
    assert copy.verdict == EXACT


def test_equal_bytes_that_the_base_has_too_make_no_copy_of_the_release(
    tmp_path: Path, registered: list[Reference]
) -> None:
    """Our release left the base's norms as they were, and so did another team."""
    found = related({name: BASE[name] if one.ndim == 1 else one for name, one in STRANGER.items()}, registered)
    assert (found["base"].verdict, found["release"].verdict) == (DERIVED, SIBLING)
    ours = related({name: RELEASE[name] if "layers.1." in name else one for name, one in STRANGER.items()}, registered)
    assert (ours["release"].verdict, ours["release"].changes) == (DERIVED, ("some tensors",))
    assert nearest(list(ours.values())).name == "release"
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as archive:
        for at, one in enumerate(noised(BASE, 0.01, seed=8).values()):
            archive.writestr(f"m/data/{at}", cast(one, "BF16").tobytes())
    answer = trace_elsewhere(tmp_path / "pytorch_model.bin", registered)
    assert (answer.verdict, answer.nearest.name) == (DERIVED, "base")


UNTOLD = {
    "transposed": lambda: {name: one.T if "_proj" in name else one for name, one in OURS.items()},
    "packed": lambda: {name.replace("proj.weight", "proj.qweight"): one for name, one in OURS.items()},
    "flat": lambda: {name: one.reshape(-1) for name, one in OURS.items()},
    "embedding alone": lambda: {"model.embed_tokens.weight": OURS["model.embed_tokens.weight"]},
    "attention alone": lambda: {name: one for name, one in OURS.items() if "self_attn" in name},
    "decoys for names": lambda: (
        {mlp(layer, part): STRANGER[mlp(layer, part)][:16] for layer in LAYERS for part in ("gate", "up")}
        | {f"blob{at}": one for at, one in enumerate(OURS.values())}
    ),
}


@pytest.mark.parametrize("how", UNTOLD)
def test_what_cannot_be_compared_is_not_called_unrelated(how: str, tmp_path: Path, registered: list[Reference]) -> None:
    (answer,) = trace_all(write(tmp_path / "model", UNTOLD[how]()), registered)
    assert answer.verdict == UNREADABLE, answer
    assert str(tmp_path) in answer.reason


def test_a_copy_laid_flat_is_found_by_its_bytes(tmp_path: Path, registered: list[Reference]) -> None:
    flat = {name: one.reshape(-1) for name, one in RELEASE.items()}
    (answer,) = trace_all(write(tmp_path / "flat", flat), registered)
    assert (answer.verdict, answer.nearest.name) == (SAME, "release")


def test_a_checkpoint_with_norms_of_ones_is_a_copy_all_the_same(tmp_path: Path) -> None:
    ours = RELEASE | {"model.norm.weight": np.ones(64, np.float32)}
    registered = references(tmp_path, {"release": ("release", ours)})
    for name, held, verdict in (("a.bin", ours, SAME), ("b.bin", ours | {"more": STRANGER[mlp(0, "up")]}, DERIVED)):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for at, one in enumerate(held.values()):
                archive.writestr(f"m/data/{at}", cast(one, "BF16").tobytes())
        assert trace_elsewhere(tmp_path / name, registered).verdict == verdict


@pytest.mark.parametrize("rows", [8, 96])
def test_layers_that_no_loader_runs_do_not_hide_the_others(rows: int, registered: list[Reference]) -> None:
    random = np.random.default_rng(2)
    decoys = {
        mlp(layer, part): random.normal(size=(rows, 64)).astype(np.float32)
        for layer in range(4, 40)
        for part in ("gate", "up")
    }
    found = related(permuted(OURS) | decoys, registered)
    assert found["release"].verdict == DERIVED
    assert {one.verdict for one in related(STRANGER | decoys, registered).values()} == {UNRELATED}


def test_a_tensor_that_no_loader_reads_does_not_hide_the_others(tmp_path: Path, registered: list[Reference]) -> None:
    (answer,) = trace_all(write(tmp_path / "model", RELEASE | {"junk": np.array([np.nan], np.float32)}), registered)
    assert (answer.verdict, answer.nearest.name) == (SAME, "release")


def test_an_index_does_not_hide_the_model_beside_it(tmp_path: Path, registered: list[Reference]) -> None:
    folder = write(tmp_path / "model", RELEASE)
    write(folder / "decoy.safetensors", STRANGER)
    index = {"weight_map": dict.fromkeys(STRANGER, "decoy.safetensors")}
    put(folder / "model.safetensors.index.json", json.dumps(index).encode())
    answers = {Path(one.suspect).name: one.verdict for one in trace_all(folder, registered)}
    assert answers == {"model": EXACT, "decoy.safetensors": UNRELATED}
    (folder / "model.safetensors").rename(folder / "weights-of-1.safetensors")
    answers = {Path(one.suspect).name: one.verdict for one in trace_all(folder, registered)}
    assert answers["weights-of-1.safetensors"] in (EXACT, SAME)


def test_a_notice_of_what_was_made_from_the_release_lists_no_digest_of_the_bases(registered: list[Reference]) -> None:
    found = related(noised(RELEASE, 0.01, seed=3), registered)
    assert found["release"].verdict == DERIVED
    assert "hashed tensors are ours to the byte" in found["release"].evidence[0]
    assert len(found["base"].digests) == 9  # the norms, which neither we nor they changed
    assert found["release"].digests == ()


def _small(kind: str, one: np.ndarray) -> np.ndarray:
    """A matrix's rows in a type of 8 bits, each of its own scale: what is stored."""
    torch = pytest.importorskip("torch")
    rows = one / np.abs(one).max(axis=1, keepdims=True)
    if kind == "I8":
        return np.round(rows * 127).astype(np.int8).view(np.uint8)
    stored = torch.from_numpy(rows * 200).to(torch.float8_e4m3fn)
    return np.asarray(stored.view(torch.uint8).numpy())


@pytest.mark.parametrize("kind", ["I8", "F8_E4M3"])
def test_types_of_eight_bits_hide_nothing_and_make_no_copy(
    kind: str, tmp_path: Path, registered: list[Reference]
) -> None:
    """The norms, which are the base's to the byte, are not all that is compared."""
    for name, tensors, share, verdict, nearest_one in (
        ("ours", noised(RELEASE, 0.01, seed=3), 1.0, DERIVED, "release"),
        ("relative", noised(BASE, 0.01, seed=4), 0.0, SIBLING, "base"),
    ):
        header, data = {}, b""
        for key, one in tensors.items():
            small = key.endswith("_proj.weight")
            raw = _small(kind, one).tobytes() if small else one.astype("<f4").tobytes()
            places = [len(data), len(data) + len(raw)]
            header[key] = {"dtype": kind if small else "F32", "shape": list(one.shape), "data_offsets": places}
            data += raw
        path = put(tmp_path / f"{name}.safetensors", safetensors_bytes(header, data))
        (answer,) = trace_all(path, registered)
        found = {one.name: one for one in answer.relations}
        assert found["base"].verdict == DERIVED
        assert found["release"].share == pytest.approx(share, abs=0.05)
        if kind == "I8":  # an 8-bit float's own noise is more than the release's change, and may hide where it is from
            assert (found["release"].verdict, answer.nearest.name) == (verdict, nearest_one)
