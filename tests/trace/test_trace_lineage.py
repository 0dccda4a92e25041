"""Verdicts: each way to make a copy is recognised, and what has nothing to do with ours is not."""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from suspects_made import (
    SMALL,
    Weights,
    meta_names,
    mixed,
    noised,
    permuted,
    put,
    references,
    rotated,
    rounded,
    safetensors_bytes,
    weights,
    write,
    write_gguf,
)
from test_digests import bencode, torrent

from steelyard.base.errors import FormatError
from steelyard.trace import elsewhere
from steelyard.trace.digests import cast
from steelyard.trace.elsewhere import trace_elsewhere
from steelyard.trace.lineage import (
    DERIVED,
    EXACT,
    LEVEL,
    QUANTISED,
    SAME,
    SIBLING,
    UNREADABLE,
    UNRELATED,
    Answer,
    Relation,
    relate,
    trace,
)
from steelyard.trace.registry import Reference
from steelyard.trace.suspects import find_suspects, trace_all
from steelyard.trace.tensors import in_memory, open_tensors

BASE = weights(0)
RELEASE = rounded(noised(BASE, 0.01, seed=1))


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> list[Reference]:
    """A public base, our release made from it, and a model of another team."""
    models = {"base": ("base", BASE), "release": ("release", RELEASE), "other": ("release", weights(5))}
    return references(tmp_path_factory.mktemp("registry"), models)


def _by_name(answer: Answer) -> dict[str, Relation]:
    return {one.name: one for one in answer.relations}


def _memory(tensors: Weights, registered: list[Reference]) -> dict[str, Relation]:
    suspect = in_memory(tensors)
    suspect.config = SMALL
    return {one.name: one for one in relate(suspect, registered)}


def test_a_copy_is_an_exact_copy(tmp_path: Path, registered: list[Reference]) -> None:
    answer = trace(write(tmp_path / "copy", RELEASE), registered)
    assert (answer.verdict, answer.nearest.name, answer.nearest.changes) == (EXACT, "release", ())
    assert _by_name(answer)["other"].verdict == UNRELATED


def test_renamed_cast_and_sharded_copies_are_the_same_tensors(tmp_path: Path, registered: list[Reference]) -> None:
    names = list(RELEASE)
    (tmp_path / "shards").mkdir()
    for at, part in enumerate((names[:9], names[9:])):
        write(tmp_path / "shards" / f"part{at}.safetensors", meta_names({name: RELEASE[name] for name in part}), "F16")
    answer = trace(tmp_path / "shards", registered)
    assert (answer.verdict, answer.nearest.name) == (SAME, "release")
    assert set(answer.nearest.changes) == {"cast", "renamed", "re-sharded"}


def test_metas_names_with_either_order_of_rows_are_a_fine_tune(registered: list[Reference]) -> None:
    found = _memory(meta_names(noised(RELEASE, 0.02)), registered)["release"]
    assert (found.verdict, found.changes) == (DERIVED, ("fine-tuned",))
    assert found.distance == pytest.approx(0.02, rel=0.1)


def test_bytes_are_found_under_names_and_in_an_order_that_say_nothing(
    tmp_path: Path, registered: list[Reference]
) -> None:
    shuffled = sorted(RELEASE, key=lambda name: hashlib.sha256(name.encode()).digest())
    answer = trace(
        write(tmp_path / "a.safetensors", {f"x{at}": RELEASE[n] for at, n in enumerate(shuffled)}), registered
    )
    assert (answer.verdict, answer.nearest.name) == (SAME, "release")


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_a_quantised_gguf(tmp_path: Path, registered: list[Reference], kind: str) -> None:
    path = write_gguf(tmp_path / "a.gguf", config=SMALL, weights=RELEASE, kind=kind)
    answer = trace(path, registered)
    assert (answer.verdict, answer.nearest.name, answer.nearest.changes) == (QUANTISED, "release", ("quantised",))


@pytest.mark.parametrize("ftype", ["Q4_K_M", "Q6_K", "Q3_K_S", "Q2_K"])
def test_k_quants_as_llama_cpp_makes_them(tmp_path: Path, ftype: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    config = SMALL | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    ours = weights(0, config)
    ours_alone = references(tmp_path / "registry", {"ours": ("release", ours)}, config)
    source = write_gguf(tmp_path / "f32.gguf", config=config, weights=ours)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{ftype}")
    out = tmp_path / "k.gguf"
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(options)) == 0
    assert any(one.dtype.endswith("_K") for one in open_tensors(out).entries.values())
    answer = trace(out, ours_alone)
    assert (answer.verdict, answer.nearest.changes) == (QUANTISED, ("quantised",))
    assert answer.nearest.log10_p < LEVEL


def test_a_gguf_of_a_fine_tune_is_not_only_quantised(tmp_path: Path, registered: list[Reference]) -> None:
    tuned = noised(RELEASE, 0.05)
    answer = trace(write_gguf(tmp_path / "a.gguf", config=SMALL, weights=tuned, kind="Q8_0"), registered)
    assert (answer.verdict, answer.nearest.name) == (DERIVED, "release")
    assert set(answer.nearest.changes) == {"quantised", "fine-tuned"}


@pytest.mark.parametrize("relative", [0.01, 0.2])
def test_a_fine_tune_is_derived_with_its_distance(registered: list[Reference], relative: float) -> None:
    found = _memory(noised(RELEASE, relative), registered)
    assert found["release"].verdict == DERIVED if relative < 0.1 else found["base"].verdict == DERIVED
    assert found["release"].distance == pytest.approx(relative, rel=0.1)
    assert found["release"].log10_p < -20
    assert found["other"].verdict == UNRELATED


def test_another_fine_tune_of_the_base_shares_an_ancestor(registered: list[Reference]) -> None:
    found = _memory(noised(BASE, 0.01, seed=2), registered)
    assert (found["base"].verdict, found["release"].verdict) == (DERIVED, SIBLING)
    assert abs(found["release"].share) < 0.1


@pytest.mark.parametrize("share", [0.5, 0.3, 0.1])
def test_a_merge_names_its_parents(registered: list[Reference], share: float) -> None:
    with_base = _memory(mixed(RELEASE, noised(BASE, 0.01, seed=3), share), registered)
    assert with_base["release"].share == pytest.approx(share, abs=0.05)
    strange = _memory(mixed(RELEASE, weights(8), max(share, 0.3)), registered)
    assert strange["base"].log10_p < -6
    assert "merged" in strange["base"].changes
    assert with_base["other"].verdict == strange["other"].verdict == UNRELATED


def test_a_permuted_and_rotated_copy_is_found(registered: list[Reference]) -> None:
    found = _memory(rotated(permuted(RELEASE)), registered)
    assert found["base"].verdict == found["release"].verdict == DERIVED
    assert found["release"].changes == ("rotated", "permuted")
    assert found["release"].log10_p < -100
    assert found["release"].share == pytest.approx(1, abs=0.1)
    only = _memory(permuted(BASE), registered)
    assert (only["base"].changes, only["release"].verdict) == (("permuted",), SIBLING)
    assert found["other"].verdict == UNRELATED


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_a_hidden_copy_is_found_after_quantising(tmp_path: Path, registered: list[Reference], kind: str) -> None:
    hidden = rotated(permuted(RELEASE))
    answer = trace(write_gguf(tmp_path / "a.gguf", config=SMALL, weights=hidden, kind=kind), registered)
    found = _by_name(answer)
    assert found["base"].verdict == DERIVED
    assert found["base"].changes == ("rotated", "permuted", "quantised")
    assert found["base"].log10_p < -50
    assert found["other"].verdict == UNRELATED


def test_pruned_extended_and_shortened_models(registered: list[Reference]) -> None:
    pruned = {name: np.where(np.abs(one) < np.quantile(np.abs(one), 0.3), 0, one) for name, one in RELEASE.items()}
    assert "pruned" in _memory(pruned, registered)["release"].changes
    rows = np.random.default_rng(3).normal(size=(16, 64))
    longer = np.concatenate([RELEASE["model.embed_tokens.weight"], rows])
    extended = _memory(RELEASE | {"model.embed_tokens.weight": longer}, registered)["release"]
    assert (extended.verdict, "vocabulary extended" in extended.changes) == (DERIVED, True)
    short = {
        name.replace("layers.3.", "layers.1.").replace("layers.2.", "layers.1."): one
        for name, one in noised(RELEASE, 0.02).items()
        if "layers.1." not in name and "layers.2." not in name
    }
    found = _memory(short, registered)
    assert "layers removed" in found["release"].changes
    assert found["release"].distance < 0.05  # our last layer was found for its second


def test_a_model_whose_vectors_alone_are_ours_is_told_by_them(registered: list[Reference]) -> None:
    other = weights(9)
    found = _memory({name: RELEASE[name] if one.ndim == 1 else one for name, one in other.items()}, registered)
    assert found["release"].evidence[0].startswith("9 of ")


def test_independent_models_are_unrelated_and_headers_alone_rule_out_other_widths(
    tmp_path: Path, registered: list[Reference]
) -> None:
    for seed in range(20, 40):
        found = _memory(weights(seed), registered)
        assert all(one.verdict == UNRELATED and one.log10_p > -3 for one in found.values())
    wide = SMALL | {"hidden_size": 48, "head_dim": 12, "intermediate_size": 80}
    answer = trace(write(tmp_path / "wide", weights(0, wide), config=wide), registered)
    assert (answer.verdict, answer.bytes_read) == (UNRELATED, 0)


def test_a_large_suspect_is_sampled(
    tmp_path: Path, registered: list[Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "copy", RELEASE)
    monkeypatch.setattr("steelyard.trace.compare.SMALL", 1000)
    whole, sampled = trace(path, registered, full=True), trace(path, registered, full=False)
    assert (sampled.verdict, sampled.nearest.name) == (EXACT, "release")
    assert "sampled rows" in sampled.nearest.evidence[0]
    changed = dict(RELEASE)
    name = "model.layers.2.mlp.down_proj.weight"
    changed[name] = changed[name] * np.float32(1.02)
    assert trace(write(tmp_path / "changed", changed), registered, full=False).verdict == DERIVED
    assert whole.bytes_read > 1.2 * sampled.bytes_read


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_unreadable(tmp_path: Path, registered: list[Reference], value: float) -> None:
    spoiled = RELEASE | {"model.layers.1.mlp.up_proj.weight": np.full((96, 64), value, dtype=np.float32)}
    for full in (True, False):
        answer = trace(write(tmp_path / f"spoiled{full}", spoiled), registered, full=full)
        assert answer.verdict == UNREADABLE
        assert "not finite" in answer.reason


def test_broken_files_are_unreadable_with_a_reason(tmp_path: Path, registered: list[Reference]) -> None:
    broken = put(tmp_path / "a.safetensors", b"\xff" * 64)
    adapter = write(tmp_path / "b.safetensors", {"layers.0.lora_A.weight": np.zeros((4, 64))})
    absent = tmp_path / "c.safetensors"
    for path in (broken, adapter, absent):
        answer = trace(path, registered)
        assert answer.verdict == UNREADABLE
        assert answer.reason


# --- checkpoints, listings, torrents
# ----------------------------------------------------------------------------------


def _checkpoint(path: Path, tensors: Weights, kind: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for at, values in enumerate(tensors.values()):
            archive.writestr(f"archive/data/{at}", cast(np.ascontiguousarray(values), kind).tobytes())
    return path


def test_a_checkpoint_is_compared_by_its_storages(tmp_path: Path, registered: list[Reference]) -> None:
    answer = trace_elsewhere(_checkpoint(tmp_path / "a.bin", RELEASE, "F16"), registered)
    assert (answer.verdict, answer.nearest.name) == (SAME, "release")
    assert answer.nearest.changes == ("a PyTorch checkpoint", "cast")
    half = {name: one if at % 2 else one + 1 for at, (name, one) in enumerate(RELEASE.items())}
    assert trace_elsewhere(_checkpoint(tmp_path / "b.bin", half, "BF16"), registered).verdict == DERIVED
    answer = trace_elsewhere(_checkpoint(tmp_path / "c.bin", weights(9), "BF16"), registered)
    assert answer.verdict == UNREADABLE
    assert "convert it to safetensors" in answer.reason


def test_a_listing_is_compared_by_its_digests(tmp_path: Path, registered: list[Reference]) -> None:
    def listing(digest: str) -> Path:
        value: Any = {"siblings": [{"rfilename": "w", "lfs": {"sha256": digest, "size": 5}}]}
        return put(tmp_path / "listing.json", json.dumps(value).encode())

    release = next(one for one in registered if one.name == "release")
    answer = trace_elsewhere(listing(release.files[0].sha256), registered)
    assert (answer.verdict, answer.nearest.name) == (EXACT, "release")
    assert trace_elsewhere(listing("ab" * 32), registered).verdict == UNREADABLE


def test_a_torrent_is_compared_by_its_pieces(tmp_path: Path, registered: list[Reference]) -> None:
    release = next(one for one in registered if one.name == "release")
    content = (release.folder / "model.safetensors").read_bytes()
    path = put(tmp_path / "a.torrent", bencode(torrent({"README": b"x" * 100, "w": content})))
    answer = trace_elsewhere(path, registered)
    assert (answer.verdict, answer.nearest.name) == (EXACT, "release")
    path = put(tmp_path / "b.torrent", bencode(torrent({"w": bytes(len(content))})))
    assert trace_elsewhere(path, registered).verdict == UNREADABLE


def test_a_torrent_that_shares_our_header_alone_is_not_ours(tmp_path: Path, registered: list[Reference]) -> None:
    """Unrelated models of the same shapes have the same header; a copy that was changed has some of our pieces."""
    release = next(one for one in registered if one.name == "release")
    content = (release.folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    tail = bytes(255 - byte for byte in content)
    small = torrent({"w": content[:start] + tail[start:]})
    answer = trace_elsewhere(put(tmp_path / "a.torrent", bencode(small)), registered)
    assert answer.verdict == UNREADABLE
    middle = start + (len(content) - start) // 2
    half = torrent({"w": content[:middle] + tail[middle:]})
    answer = trace_elsewhere(put(tmp_path / "b.torrent", bencode(half)), registered)
    assert (answer.verdict, answer.nearest.changes, answer.nearest.distance) == (DERIVED, ("some pieces",), None)


def test_a_torrent_of_many_files_of_our_size_reads_no_more_than_its_budget(
    tmp_path: Path, registered: list[Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    release = next(one for one in registered if one.name == "release")
    size = (release.folder / "model.safetensors").stat().st_size
    read: list[int] = []

    def matching(torrent: Any, file: Any, ours: Path, limit: int) -> tuple[int, int]:
        read.append(limit)
        return 0, max(1, limit // torrent.piece_length)

    path = put(tmp_path / "a.torrent", bencode(torrent({f"w{at}": bytes(size) for at in range(50)})))
    monkeypatch.setattr(elsewhere, "matching_pieces", matching)
    monkeypatch.setattr(elsewhere, "TORRENT_BUDGET", 10 * 16384)
    assert trace_elsewhere(path, [release]).verdict == UNREADABLE
    assert 0 < len(read) <= 10


def test_frequencies_that_follow_from_the_settings_prove_nothing(tmp_path: Path) -> None:
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.linspace(1, 0, 8, dtype=np.float32)}
    ours = references(tmp_path, {"ours": ("base", weights(0) | frequencies)})
    assert _memory(weights(9) | frequencies, ours)["ours"].verdict == UNRELATED


def test_a_release_is_held_against_the_base_it_was_made_from(tmp_path: Path) -> None:
    """Of two related bases the nearer one explains it, in whatever order they were registered."""
    near = rounded(noised(BASE, 0.2, seed=4))
    made = rounded(noised(near, 0.01, seed=5))
    for at, names in enumerate((("far", "near"), ("near", "far"))):
        bases = {"far": ("base", BASE), "near": ("base", near)}
        ours = references(tmp_path / str(at), {name: bases[name] for name in names} | {"made": ("release", made)})
        found = _memory(noised(near, 0.01, seed=6), ours)["made"]
        assert found.verdict == SIBLING
        assert found.share == pytest.approx(0, abs=0.1)


# --- trees
# ------------------------------------------------------------------------------------------------------------


def test_a_tree_of_a_thousand_files_is_triaged_by_headers(tmp_path: Path, registered: list[Reference]) -> None:
    wide = {"a.weight": np.zeros((8, 48), dtype=np.float32)}
    file = write(tmp_path / "wide.safetensors", wide).read_bytes()
    for at in range(1000):
        folder = tmp_path / "tree" / f"{at % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        put(folder / f"{at}.safetensors", file)
    write(tmp_path / "tree" / "3" / "ours", RELEASE)
    start = time.process_time()
    answers = trace_all(tmp_path / "tree", registered)
    assert time.process_time() - start < 20
    assert len(answers) == 1001
    (ours,) = (one for one in answers if one.verdict != UNRELATED)
    assert (ours.verdict, Path(ours.suspect).name) == (EXACT, "ours")
    assert sum(one.bytes_read for one in answers if one is not ours) == 0


def test_what_in_a_tree_is_a_model(tmp_path: Path) -> None:
    for name in ("m/model.safetensors", "m/pytorch_model.bin", "m/optimizer.pt", "many/a.safetensors",
                 "many/b.safetensors", "g/x.gguf", "g/y.gguf", "t/z.torrent", "t/readme.md"):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    put(tmp_path / "m" / "config.json", b'{"model_type": "llama"}')
    put(tmp_path / "t" / "model.json", b'{"id": "a/b", "siblings": [{"rfilename": "a"}]}')
    put(tmp_path / "t" / "tree.json", b'[{"type": "file", "oid": "0", "path": "a"}]')
    (tmp_path / "t" / "closed.json").symlink_to(tmp_path / "t" / "tree.json")
    (tmp_path / "m" / "loop").symlink_to(tmp_path)
    found = [one.relative_to(tmp_path).as_posix() for one in find_suspects(tmp_path)]
    assert found == ["g/x.gguf", "g/y.gguf", "m", "m/pytorch_model.bin", "many/a.safetensors", "many/b.safetensors",
                     "t/model.json", "t/tree.json", "t/z.torrent"]  # fmt: skip


def test_trees_without_models_or_end_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="nothing to compare"):
        find_suspects(tmp_path / "empty")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(FormatError, match="cannot be opened"):
        find_suspects(loop)
    deep = tmp_path / "deep"
    (deep / "/".join("d" * 70)).mkdir(parents=True)
    with pytest.raises(FormatError, match="nested deeper"):
        find_suspects(deep)
    monkeypatch.setattr("steelyard.trace.suspects.MAX_FILES", 10)
    for at in range(11):
        (tmp_path / "empty" / f"{at}.txt").touch()
    with pytest.raises(FormatError, match="holds over 10 files"):
        find_suspects(tmp_path / "empty")


def test_lying_headers_among_a_tree_do_not_stop_it(tmp_path: Path, registered: list[Reference]) -> None:
    put(tmp_path / "bad.safetensors", safetensors_bytes({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}))
    put(tmp_path / "bad.pt", b"\x80\x04.")
    write(tmp_path / "good.safetensors", RELEASE)
    answers = {Path(one.suspect).name: one.verdict for one in trace_all(tmp_path, registered)}
    assert answers == {"bad.safetensors": UNREADABLE, "bad.pt": UNREADABLE, "good.safetensors": EXACT}
