"""Folders written are read back whole, by us and by transformers, however they are sharded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.model.identity import INDEX, subject_of

torch = pytest.importorskip("torch")

from steelyard.model.formats import load_tensors, save_folder  # noqa: E402 - needs torch

TENSORS = {
    f"model.layers.{layer}.mlp.up_proj.weight": torch.arange(64.0).reshape(8, 8).to(torch.bfloat16) + layer
    for layer in range(5)
}


@pytest.mark.parametrize(("limit", "shards"), [(10_000, 1), (300, 3), (1, 5)])
def test_tensors_come_back(limit: int, shards: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    save_folder(out, {"model_type": "llama"}, TENSORS, {"tokenizer.json": b"{}"}, max_shard_bytes=limit)
    assert len(list(out.glob("*.safetensors"))) == shards
    assert (out / INDEX).exists() == (shards > 1)
    found = load_tensors(out)
    assert found.keys() == TENSORS.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )
    assert (out / "tokenizer.json").read_bytes() == b"{}"
    assert subject_of(out).dtype == "bfloat16"


def test_sharding_does_not_change_the_subject(tmp_path: Path) -> None:
    save_folder(tmp_path / "a", {}, TENSORS, {})
    save_folder(tmp_path / "b", {}, dict(reversed(TENSORS.items())), {}, max_shard_bytes=200)
    assert subject_of(tmp_path / "a") == subject_of(tmp_path / "b")


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    save_folder(tmp_path / "a", {}, {"x": base.T, "y": base[1]}, {})
    found = load_tensors(tmp_path / "a")
    assert torch.equal(found["x"], base.T)
    assert torch.equal(found["y"], base[1])


@pytest.mark.parametrize("limit", [5_000_000_000, 40_000])
def test_transformers_loads_it(limit: int, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    written = json.loads(config.to_json_string()) | {"architectures": ["LlamaForCausalLM"]}
    save_folder(tmp_path / "m", written, model.state_dict(), {}, max_shard_bytes=limit)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, loaded(ids).logits)


@pytest.mark.parametrize(
    "name", ["modeling.py", "config.json", "model.safetensors", INDEX, "../x.json", "a/config.json"]
)
def test_other_files_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a file to write"):
        save_folder(tmp_path / "out", {}, TENSORS, {name: b""})
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_and_nothing_left_half(tmp_path: Path) -> None:
    save_folder(tmp_path / "out", {}, TENSORS, {})
    with pytest.raises(SteelyardError, match="exists already"):
        save_folder(tmp_path / "out", {}, TENSORS, {})
    with pytest.raises(RuntimeError, match="sparse"):
        save_folder(tmp_path / "bad", {}, {"x": torch.eye(3).to_sparse()}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_loading_checks_first(tmp_path: Path) -> None:
    save_folder(tmp_path / "m", {}, TENSORS, {})
    (tmp_path / "m/extra.bin").write_bytes(b"")
    with pytest.raises(FormatError, match=r"extra\.bin"):
        load_tensors(tmp_path / "m")
    (tmp_path / "m/extra.bin").unlink()
    path = tmp_path / "m/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match="1 bytes more than it has"):
        load_tensors(tmp_path / "m")
