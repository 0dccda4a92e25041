"""The subject names exactly what was tested: nothing of it changes without a digest changing."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import put, safetensors_bytes
from safetensors.numpy import save_file

from steelyard.base.canonical import digest, sha256_hex
from steelyard.base.errors import FormatError
from steelyard.model import identity
from steelyard.model.headers import scan_safetensors
from steelyard.model.identity import INDEX, Subject, is_model_file, subject_and_files, subject_of

TENSORS = {
    "model.embed_tokens.weight": np.arange(12, dtype=np.float32).reshape(4, 3),
    "model.layers.0.self_attn.k_proj.weight": np.full((3, 3), 1, np.float32),
    "model.layers.0.self_attn.v_proj.weight": np.full((3, 3), 2, np.float32),
    "model.norm.weight": np.ones(3, np.float32),
}


def model(folder: Path, tensors: dict[str, Any] | None = None, **config: Any) -> Path:
    folder.mkdir()
    save_file(tensors or TENSORS, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": "{{ old }}"}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").write_text('{"temperature": 0.2}')
    return folder


def shard(folder: Path, out: Path, split: int = 2) -> Path:
    shutil.copytree(folder, out)
    (out / "model.safetensors").unlink()
    names, weight_map = list(TENSORS), {}
    for number, part in enumerate((names[split:], names[:split]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: TENSORS[name] for name in part}, out / file)
        weight_map |= dict.fromkeys(part, file)
    (out / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return out


def test_digest_is_as_specified(tmp_path: Path) -> None:
    subject = subject_of(model(tmp_path / "m"))
    listed = [[name, "F32", list(TENSORS[name].shape), sha256_hex(TENSORS[name].tobytes())] for name in sorted(TENSORS)]
    assert subject.weights == digest(listed)
    assert subject.config == digest({"model_type": "llama"})
    assert subject.chat_template == sha256_hex(b"{{ messages }}")
    assert subject.system_prompt == sha256_hex(b"")
    assert subject.generation_config == digest({"temperature": 0.2})
    assert subject.dtype == "float32"
    assert subject.digest == digest(subject.model_dump())
    assert Subject.model_validate_json(subject.model_dump_json()) == subject


def test_sharding_changes_nothing(tmp_path: Path) -> None:
    whole = model(tmp_path / "m")
    for split in (1, 3):
        assert subject_of(shard(whole, tmp_path / f"s{split}", split)) == subject_of(whole)


def test_every_single_bit_counts(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    subject = subject_of(folder)
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    for tensor in scan_safetensors(path).values():
        for place in (tensor.start, tensor.end - 1):
            path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
            assert subject.differences(subject_of(folder)) == ["weights"]


def test_swapping_two_tensors_of_equal_shape_changes_it(tmp_path: Path) -> None:
    key, value = "model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight"
    swapped = TENSORS | {key: TENSORS[value], value: TENSORS[key]}
    assert subject_of(model(tmp_path / "a")).differences(subject_of(model(tmp_path / "b", swapped))) == ["weights"]


def test_recasting_and_reshaping_change_it(tmp_path: Path) -> None:
    subject = subject_of(model(tmp_path / "a"))
    half = subject_of(model(tmp_path / "b", {name: tensor.astype(np.float16) for name, tensor in TENSORS.items()}))
    assert subject.differences(half) == ["weights", "dtype"]
    flat = subject_of(model(tmp_path / "c", TENSORS | {"model.embed_tokens.weight": np.arange(12, dtype=np.float32)}))
    assert subject.differences(flat) == ["weights"]
    mixed = subject_of(model(tmp_path / "d", TENSORS | {"model.norm.weight": np.ones(3, np.float16)}))
    assert mixed.dtype == "float16+float32"


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_one_reading_gives_the_same_digests_and_those_of_the_files(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = {"model.layers.0.a": np.zeros((0, 3), np.float32), "zz": np.zeros(0, np.float16)}
    monkeypatch.setattr(identity, "_CHUNK", chunk)
    for folder in (
        model(tmp_path / "m"),
        model(tmp_path / "e", TENSORS | empty),
        shard(tmp_path / "m", tmp_path / "s"),
    ):
        subject, files = subject_and_files(folder)
        assert subject == subject_of(folder)
        assert files == {path.name: sha256_hex(path.read_bytes()) for path in folder.glob("*.safetensors")}


def test_each_byte_of_the_weights_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, read = model(tmp_path / "m"), 0
    plain = identity.open_regular
    weights = folder / "model.safetensors"

    class Counting(io.BufferedReader):
        def readinto(self, buffer: Any) -> int:
            nonlocal read
            count = super().readinto(buffer)
            read += count if self.name == str(weights) else 0
            return count

    def counting(path: Path) -> Any:
        file = Counting(plain(path).detach())
        file.raw.name = str(path)
        return file

    monkeypatch.setattr(identity, "open_regular", counting)
    subject_and_files(folder)
    assert read == weights.stat().st_size


@pytest.mark.parametrize("change", [-1, 1, 1 << 23])
def test_a_file_that_changes_its_length_meanwhile_is_refused(
    change: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model(tmp_path / "m")
    plain, path = identity.open_regular, folder / "model.safetensors"

    def late(opened: Path) -> Any:
        os.truncate(path, path.stat().st_size + change)
        return plain(opened)

    monkeypatch.setattr(identity, "open_regular", late)
    with pytest.raises(FormatError, match="changed its length"):
        subject_and_files(folder)


CHANGES = {
    "config.json": ('{"model_type": "llama", "rope_theta": 1.0}', "config"),
    "tokenizer.json": ('{"version": "1.1"}', "tokenizer"),
    "tokenizer_config.json": ('{"eos_token": "<s>"}', "tokenizer"),
    "special_tokens_map.json": ("{}", "tokenizer"),
    "added_tokens.json": ("{}", "tokenizer"),
    "vocab.json": ("{}", "tokenizer"),
    "merges.txt": ("a b", "tokenizer"),
    "tokenizer.model": ("x", "tokenizer"),
    "chat_template.jinja": ("{{ messages }} ", "chat_template"),
    "system_prompt.txt": ("Be kind.", "system_prompt"),
    "generation_config.json": ('{"temperature": 0.3}', "generation_config"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_file_has_its_part(name: str, tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    subject = subject_of(folder)
    content, part = CHANGES[name]
    (folder / name).write_text(content)
    assert subject.differences(subject_of(folder)) == [part]
    assert subject.digest != subject_of(folder).digest


def test_spelling_of_settings_and_readmes_do_not_count(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", a=1, b=2)
    subject = subject_of(folder)
    (folder / "config.json").write_text('{\n "b": 2, "a": 1,\n "model_type": "llama"}\n')
    (folder / "tokenizer_config.json").write_text('{"chat_template": "hidden behind the file", "eos_token": "</s>"}')
    (folder / "README.md").write_text("new")
    assert subject_of(folder) == subject


def test_template_of_tokenizer_config_counts_where_there_is_no_file(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    (folder / "chat_template.jinja").unlink()
    subject = subject_of(folder)
    assert subject.chat_template == sha256_hex(b"{{ old }}")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>", "chat_template": "{{ new }}"}')
    assert subject.differences(subject_of(folder)) == ["chat_template"]


def test_tied_head_is_absent_from_the_digest(tmp_path: Path) -> None:
    tied = model(tmp_path / "a", tie_word_embeddings=True)
    stored = TENSORS | {"lm_head.weight": TENSORS["model.embed_tokens.weight"]}
    assert subject_of(model(tmp_path / "b", stored, tie_word_embeddings=True)) == subject_of(tied)
    other = TENSORS | {"lm_head.weight": TENSORS["model.embed_tokens.weight"] + 1}
    with pytest.raises(FormatError, match="ties them"):
        subject_of(model(tmp_path / "c", other, tie_word_embeddings=True))
    assert subject_of(model(tmp_path / "d", other)).weights != subject_of(tied).weights


def rewrite_index(folder: Path, change: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    source = shard(model(tmp_path / "m"), tmp_path / "s")
    first, second = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))

    def case(name: str) -> Path:
        return Path(shutil.copytree(source, tmp_path / name))

    folder = case("missing shard")
    (folder / first).unlink()
    with pytest.raises(FormatError, match=f"names {first}, which is missing"):
        subject_of(folder)
    folder = case("tensor in no shard")
    rewrite_index(folder, lambda weights: weights.update({"lm_head.weight": first}))
    with pytest.raises(FormatError, match=r"'lm_head\.weight' is in no shard"):
        subject_of(folder)
    folder = case("tensor not in the index")
    rewrite_index(folder, lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(FormatError, match=r"is in .* where the index has it elsewhere"):
        subject_of(folder)
    folder = case("tensor in two shards")
    save_file(TENSORS, folder / second)
    with pytest.raises(FormatError, match=r"is in .* and in .*|where the index has it elsewhere"):
        subject_of(folder)
    folder = case("path out")
    rewrite_index(folder, lambda weights: weights.update({"model.norm.weight": "../m/model.safetensors"}))
    with pytest.raises(FormatError, match="is not a shard's name"):
        subject_of(folder)
    folder = case("shard the index does not name")
    rewrite_index(folder, lambda weights: weights.update(dict.fromkeys(weights, second)))
    with pytest.raises(FormatError, match=f"{first}: a shard that the index does not name"):
        subject_of(folder)
    folder = case("single file too")
    save_file(TENSORS, folder / "model.safetensors")
    with pytest.raises(FormatError, match="two sets of weights"):
        subject_of(folder)


def test_no_weights_no_config_no_tensor(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    put(folder / "model.safetensors", safetensors_bytes({}))
    with pytest.raises(FormatError, match="holds no tensor"):
        subject_of(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"neither model\.safetensors"):
        subject_of(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FormatError, match=r"config\.json: is missing"):
        subject_of(folder)


def test_what_has_no_canonical_form_is_refused(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    (folder / "config.json").write_text('{"a": "\\ud800"}')
    with pytest.raises(FormatError, match="not JSON"):
        subject_of(folder)


def test_model_files_are_a_closed_list() -> None:
    assert is_model_file("model-00001-of-00010.safetensors")
    for name in ("model-1-of-2.safetensors", "modeling.py", "pytorch_model.bin", "config.json.py", "../config.json"):
        assert not is_model_file(name)
