"""GGUF in: the same logits as the original, every quantisation, every hyperparameter understood or refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import CONFIG, byte_level_metadata, random_weights, write_gguf

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.base.progress import Silent
from steelyard.model.headers import GGML_TYPES, scan_safetensors
from steelyard.model.identity import subject_of
from steelyard.model.importer import import_model

torch = pytest.importorskip("torch")
pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def tokenizer() -> dict[str, Any]:
    return byte_level_metadata() | {"tokenizer.chat_template": "{{ messages[0].content }}"}


def vocab_of(tokenizer: dict[str, Any]) -> int:
    return len(tokenizer["tokenizer.ggml.tokens"])


def convert(tmp_path: Path, tokenizer: dict[str, Any], **options: Any) -> Path:
    source = write_gguf(tmp_path / "m.gguf", tokenizer=tokenizer, **options)
    import_model(source, tmp_path / "out", progress=Silent())
    return tmp_path / "out"


def original(config: dict[str, Any], weights: dict[str, np.ndarray[Any, Any]], **more: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, rms_norm_eps=1e-5, **more))
    state = {name: torch.from_numpy(weight) for name, weight in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


CONFIGS = {
    "tied, groups of 2": {},
    "untied, groups of 4": {"tie_word_embeddings": False, "num_key_value_heads": 1},
    "no groups, head size 32": {"num_attention_heads": 2, "head_dim": 32},
    "heads wider than the model": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32},
    "theta": {"rope_theta": 500000.0},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_logits_are_those_of_the_original(case: str, tmp_path: Path, tokenizer: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    config = CONFIG | CONFIGS[case] | {"vocab_size": vocab_of(tokenizer)}
    weights = random_weights(config)
    folder = convert(tmp_path, tokenizer, config=config, weights=weights)
    ids = torch.randint(0, config["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = original(config, weights)(ids).logits
        found = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_rope_scaling_is_that_of_the_original(kind: str, tmp_path: Path, tokenizer: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    config = CONFIG | {"vocab_size": vocab_of(tokenizer), "rope_theta": 500000.0}
    weights = random_weights(config)
    scaling: dict[str, Any] = {"rope_type": "linear", "factor": 4.0}
    extra: dict[str, Any] = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    if kind == "llama3":
        scaling = {
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }  # fmt: skip
        extra = {}
        weights_in_file = weights | {"rope_freqs.weight": llama3_divisors(32.0)}
    else:
        weights_in_file = weights
    folder = convert(tmp_path, tokenizer, config=config, weights=weights_in_file, extra=extra)
    assert json.loads((folder / "config.json").read_text())["rope_scaling"] == scaling
    ids = torch.arange(200)[None] % config["vocab_size"]
    with torch.no_grad():
        expected = original(config, weights, rope_scaling=dict(scaling))(ids).logits
        found = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
    assert torch.equal(found, expected)


def llama3_divisors(factor: float, head_dim: int = 16, theta: float = 500000.0) -> np.ndarray[Any, Any]:
    """The loop of llama.cpp's converter."""
    divisors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (index / head_dim)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, dtype=np.float32)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_every_type_of_weights_is_read(kind: str, tmp_path: Path, tokenizer: dict[str, Any]) -> None:
    gguf = pytest.importorskip("gguf")
    from steelyard.model.formats import load_tensors

    config = CONFIG | {"vocab_size": vocab_of(tokenizer)}
    weights = random_weights(config)
    found = load_tensors(convert(tmp_path, tokenizer, config=config, weights=weights, kind=kind))
    number = gguf.GGMLQuantizationType[kind]
    for name, weight in weights.items():
        expected = weight
        if weight.ndim == 2:  # rounding to blocks works on whole rows, so it does not mind their order
            expected = gguf.quants.dequantize(gguf.quants.quantize(weight, number), number)
        assert torch.equal(found[name], torch.from_numpy(expected.astype(np.float32)).to(torch.bfloat16)), name


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_are_read(kind: str, tmp_path: Path) -> None:
    """The gguf package can't write these; their blocks are filled with random bits and finite scales."""
    from gguf import GGMLQuantizationType, quants
    from hostile import gguf_bytes, put, tensor

    from steelyard.model.gguf import _dequantize
    from steelyard.model.headers import scan_gguf

    number = GGMLQuantizationType[kind].value
    _, block, size = GGML_TYPES[number]
    rows = np.random.default_rng(0).integers(
        0, 60, (3, 2 * size), dtype=np.uint8
    )  # small: no float16 of it is infinite
    header = scan_gguf(put(tmp_path / "m.gguf", gguf_bytes([], [tensor("w", (2 * block, 3), number)], rows.tobytes())))
    found = _dequantize(header, header.tensors["w"])
    assert found.shape == (3, 2 * block)
    assert np.array_equal(found, quants.dequantize(rows, GGMLQuantizationType[kind]))
    assert np.isfinite(found).all()
    assert found.std() > 0


def test_sizes_of_types_are_those_of_the_gguf_package() -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    for number, (name, block, size) in GGML_TYPES.items():
        assert GGMLQuantizationType[name] == number
        assert GGML_QUANT_SIZES[GGMLQuantizationType(number)] == (block, size)


def test_folder_has_what_tools_need(tmp_path: Path, tokenizer: dict[str, Any]) -> None:
    config = CONFIG | {"vocab_size": vocab_of(tokenizer)}
    source = write_gguf(tmp_path / "m.gguf", tokenizer=tokenizer, config=config)
    settings = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}
    subject = import_model(source, tmp_path / "out", generation=settings, progress=Silent())
    assert subject == subject_of(tmp_path / "out")
    assert subject.dtype == "bfloat16"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "special_tokens_map.json",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 0} | settings
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["rms_norm_eps"] == 1e-5  # not 9.999999747378752e-06
    assert (written["architectures"], written["torch_dtype"]) == (["LlamaForCausalLM"], "bfloat16")
    assert "lm_head.weight" not in scan_safetensors(tmp_path / "out/model.safetensors")
    with pytest.raises(SteelyardError, match="exists already"):
        import_model(source, tmp_path / "out", progress=Silent())
    again = import_model(source, tmp_path / "again", generation=settings, progress=Silent())
    assert again == subject


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"extra": {"general.architecture": "qwen2"}}, "architecture is 'qwen2'"),
    "unknown hyperparameter": ({"extra": {"llama.attention.sliding_window": 4096}}, "sliding_window is 4096"),
    "experts": ({"extra": {"llama.expert_count": 8}}, "expert_count is 8"),
    "yarn": ({"extra": {"llama.rope.scaling.type": "yarn"}}, "'yarn'"),
    "partial rotary": ({"extra": {"llama.rope.dimension_count": 8}}, "rope.dimension_count differs"),
    "eps of 0": ({"extra": {"llama.attention.layer_norm_rms_epsilon": 0.0}}, "rms_epsilon is 0.0"),
    "no context length": ({"drop": ["llama.context_length"]}, "context_length is None"),
    "heads of layers": ({"extra": {"llama.attention.head_count": [4, 2]}}, "head_count is"),
    "zero heads": ({"extra": {"llama.attention.head_count": 0}}, "head_count is 0"),
    "a billion layers": ({"extra": {"llama.block_count": 1_000_000_000}}, "claims 1,000,000,000 layers"),
    "fewer layers": ({"extra": {"llama.block_count": 1}}, r"'blk.1.*not understood"),
    "a missing tensor": ({"drop": ["blk.1.attn_q.weight"]}, "lacks the tensor blk.1.attn_q.weight"),
    "no embedding": ({"drop": ["token_embd.weight"]}, "no token_embd.weight"),
    "wrong shape": ({"extra": {"llama.feed_forward_length": 100}}, "must have"),
    "part of several": ({"extra": {"split.count": 2}}, "one part of several"),
    "strange RoPE divisors": ({"rope": np.linspace(1, 9, 8, dtype=np.float32)}, "not Llama 3's scaling"),
    "RoPE divisors of another number": ({"rope": np.ones(7, np.float32)}, "must be 8 float32"),
    "NaN RoPE divisors": ({"rope": np.full(8, np.nan, np.float32)}, "impossible divisor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_by_name(case: str, tmp_path: Path, tokenizer: dict[str, Any]) -> None:
    options, reason = REFUSED[case]
    config = CONFIG | {"vocab_size": vocab_of(tokenizer)}
    options = dict(options)
    weights = random_weights(config)
    if "rope" in options:
        weights["rope_freqs.weight"] = options.pop("rope")
    with pytest.raises(FormatError, match=reason) as refusal:
        convert(tmp_path, tokenizer, config=config, weights=weights, **options)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_vocabulary_of_another_size_is_refused(tmp_path: Path, tokenizer: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match="tokens but an embedding of 17 rows"):
        convert(tmp_path, tokenizer, config=CONFIG | {"vocab_size": 17})


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"temperatur": 1.0}, "temperatur: unknown"), ({"temperature": 0}, "temperature"), ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"), ({"do_sample": "yes"}, "do_sample"), ({"temperature": float("nan")}, "temperature"),
        ({"top_k": True}, "top_k"),
    ],
)  # fmt: skip
def test_generation_settings_are_strict(settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    source = tmp_path / "m.gguf"
    source.write_bytes(b"")
    with pytest.raises(UsageError, match=reason):
        import_model(source, tmp_path / "out", generation=settings, progress=Silent())


def test_huggingface_folder_is_copied_after_the_checks(tmp_path: Path, tokenizer: dict[str, Any]) -> None:
    source = convert(tmp_path, tokenizer, config=CONFIG | {"vocab_size": vocab_of(tokenizer)})
    (source / "notes.txt").write_text("not of the model")
    (source / "LICENSE").write_text("Apache-2.0")
    copy = tmp_path / "copy"
    subject = import_model(source, copy, progress=Silent())
    assert subject == subject_of(source)
    assert (copy / "LICENSE").is_file()
    assert not (copy / "notes.txt").exists()
    other = import_model(source, tmp_path / "hot", generation={"temperature": 0.9}, progress=Silent())
    assert subject.differences(other) == ["generation_config"]
    (source / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(FormatError, match=r"pytorch_model\.bin"):
        import_model(source, tmp_path / "third", progress=Silent())
    assert not (tmp_path / "third").exists()


def test_folder_of_another_architecture_is_refused(tmp_path: Path, tokenizer: dict[str, Any]) -> None:
    source = convert(tmp_path, tokenizer, config=CONFIG | {"vocab_size": vocab_of(tokenizer)})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(FormatError, match="model_type is 'gpt2'"):
        import_model(source, tmp_path / "copy", progress=Silent())


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="neither a GGUF file nor a folder"):
        import_model(tmp_path / "absent", tmp_path / "out", progress=Silent())
