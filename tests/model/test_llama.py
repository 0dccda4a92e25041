"""The decoder against transformers' own, number by number; and everything its configuration must refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig as PeerConfig
from transformers import LlamaForCausalLM

from steelyard.base.errors import FormatError
from steelyard.inference.executor import Executor
from steelyard.model.llama import Llama, LlamaConfig, from_tensors, load_llama, rope_frequencies

TINY: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}


def variant(heads: int, kv: int, head_dim: int, **more: Any) -> dict[str, Any]:
    return {**TINY, "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": head_dim, **more}


VARIANTS = {
    "multi-head, untied": variant(4, 4, 32, hidden_size=128),
    "ratio 3, tied": variant(9, 3, 64, hidden_size=576, tie_word_embeddings=True),
    "ratio 8, untied, linear": variant(8, 1, 32, hidden_size=256, rope_parameters=LINEAR | {"rope_theta": 5e4}),
    "ratio 8, tied, llama3": variant(
        16, 2, 64, hidden_size=256, tie_word_embeddings=True, rope_parameters=LLAMA3 | {"rope_theta": 5e5}
    ),
    "ratio 3, head 128, llama3": variant(3, 1, 128, hidden_size=96, rope_parameters=LLAMA3 | {"rope_theta": 1e4}),
    "ratio 1, head 128, linear, tied": variant(
        2, 2, 128, tie_word_embeddings=True, rope_parameters=LINEAR | {"rope_theta": 1e4}
    ),
    "biases everywhere": variant(6, 2, 48, hidden_size=96, attention_bias=True, mlp_bias=True),
    "transformers 4 spelling": variant(4, 2, 80, rope_theta=1e6, rope_scaling={"type": "linear", "factor": 2.0}),
    "dynamic NTK": variant(4, 1, 32, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
    "large norm epsilon, five layers": variant(8, 8, 32, rms_norm_eps=1e-2, num_hidden_layers=5),
}


def peer_of(raw: dict[str, Any], seed: int) -> LlamaForCausalLM:
    """transformers' model with random weights, also where it would start with zeros or ones."""
    torch.manual_seed(seed)
    peer = LlamaForCausalLM(PeerConfig(**json.loads(json.dumps(raw)))).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    return peer


def ours_of(raw: dict[str, Any], peer: LlamaForCausalLM) -> Llama:
    return from_tensors(LlamaConfig.from_dict(raw), peer.state_dict(), "test")


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_logits_equal_transformers(name: str) -> None:
    raw = VARIANTS[name]
    peer = peer_of(raw, seed=len(name))
    model = ours_of(raw, peer)
    tokens = torch.randint(0, 320, (3, 100))
    theirs = peer(tokens).logits
    assert theirs.std() > 0.1
    assert relative(model(tokens), theirs) < 1e-4

    # the same logits from reading rows of different lengths into a paged cache, and from decoding on
    executor, lengths, rows = Executor(model, 22), torch.tensor([90, 1, 57]), torch.arange(3)
    tables = torch.arange(1, 22, dtype=torch.int32).view(3, 7)
    prompts = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
    logits = executor.prefill(prompts, [0, 0, 0], tables.tolist())
    for step in range(10):
        assert relative(logits, theirs[rows, lengths + step - 1]) < 1e-4
        logits = executor.decode(tokens[rows, lengths + step], lengths + step, tables)


@torch.inference_mode()
def test_dynamic_ntk_stretches_past_the_context_like_transformers() -> None:
    raw = VARIANTS["dynamic NTK"]
    peer = peer_of(raw, seed=5)
    tokens = torch.randint(0, 320, (2, 200))
    model = ours_of(raw, peer)
    assert relative(model(tokens), peer(tokens).logits) < 1e-4
    assert not torch.equal(rope_frequencies(model.config, 200), rope_frequencies(model.config, 128))


@torch.inference_mode()
def test_bfloat16_stays_close_to_transformers() -> None:
    raw = VARIANTS["ratio 3, tied"]
    peer = peer_of(raw, seed=6)
    frequencies = peer.model.rotary_emb.inv_freq.clone()
    peer = peer.to(torch.bfloat16)
    peer.model.rotary_emb.inv_freq = frequencies  # `.to` rounds it, `from_pretrained` does not
    tokens = torch.randint(0, 320, (2, 33))
    model = ours_of(raw, peer)
    assert model.frequencies.dtype == torch.float32
    ours, theirs = model(tokens).float(), peer(tokens).logits.float()
    assert relative(ours, theirs) < 0.02


def test_a_fresh_model_depends_on_its_seed_alone() -> None:
    config = LlamaConfig.from_dict(TINY)
    first, again, other = (Llama(config).initialise(seed).state_dict() for seed in (1, 1, 2))
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])
    assert first[name].std() == pytest.approx(0.02, rel=0.05)


def test_it_trains_a_step() -> None:
    model = Llama(LlamaConfig.from_dict(TINY)).initialise(0)
    tokens = torch.randint(0, 320, (2, 17))
    loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


REFUSED = {
    "model_type": ("mistral", "model_type"),
    "architectures": (["LlamaForSequenceClassification"], "architectures"),
    "hidden_act": ("gelu", "hidden_act"),
    "quantization_config": ({"quant_method": "gptq"}, "quantization_config"),
    "is_encoder_decoder": (True, "is_encoder_decoder"),
    "num_key_value_heads": (3, "num_key_value_heads"),
    "hidden_size": (63, "hidden_size"),
    "head_dim": (33, "head_dim"),
    "num_hidden_layers": (10**8, "num_hidden_layers"),
    "vocab_size": (0, "vocab_size"),
    "intermediate_size": (True, "intermediate_size"),
    "rms_norm_eps": (float("nan"), "rms_norm_eps"),
    "max_position_embeddings": ("2048", "max_position_embeddings"),
    "tie_word_embeddings": ("yes", "tie_word_embeddings"),
    "rope_theta": (-1.0, "rope_theta"),
    "partial_rotary_factor": (0.5, "partial_rotary_factor"),
    "rope_scaling": ({"rope_type": "yarn", "factor": 2.0}, "rope_scaling: rope_type = 'yarn'"),
    "rope_parameters": ({"rope_type": "linear"}, "rope_parameters: factor is missing"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_refuses_what_it_does_not_compute(key: str) -> None:
    value, named = REFUSED[key]
    with pytest.raises(FormatError, match=r"config\.json") as error:
        LlamaConfig.from_dict({**TINY, key: value})
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"rope_scaling": LINEAR, "rope_parameters": LLAMA3}, "contradicts rope_parameters"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, "contradicts"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor = 0.5"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_scaling": ["linear"]}, "rope_scaling"),
        ({"vocab_size": None}, "vocab_size is missing"),
    ],
)
def test_refuses_contradictions(more: dict[str, Any], named: str) -> None:
    with pytest.raises(FormatError, match=named):
        LlamaConfig.from_dict({**TINY, **more})


def test_defaults_are_those_of_transformers() -> None:
    raw = {key: value for key, value in TINY.items() if key not in ("max_position_embeddings", "num_key_value_heads")}
    ours, theirs = LlamaConfig.from_dict(raw), PeerConfig(**raw)
    for name in ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]


def test_names_tensors_that_are_missing_surplus_or_misshapen() -> None:
    config = LlamaConfig.from_dict(TINY)
    good = Llama(config).initialise(0).state_dict()
    name = "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(FormatError, match=rf"somewhere: tensor {name} \[32, 64\] is missing"):
        from_tensors(config, {key: value for key, value in good.items() if key != name}, "somewhere")
    with pytest.raises(FormatError, match=rf"tensor {name} is \[64, 32\]; config.json says \[32, 64\]"):
        from_tensors(config, good | {name: good[name].T}, "somewhere")
    with pytest.raises(FormatError, match=r"tensor model.layers.2.x \[3\] has no place"):
        from_tensors(config, good | {"model.layers.2.x": torch.zeros(3)}, "somewhere")
    with pytest.raises(FormatError, match=r"tensor model.norm.weight is torch.int8"):
        from_tensors(config, good | {"model.norm.weight": torch.ones(64, dtype=torch.int8)}, "somewhere")
    mixed = good | {"model.norm.weight": good["model.norm.weight"].bfloat16()}
    with pytest.raises(FormatError, match="several dtypes"):
        from_tensors(config, mixed, "somewhere")
    assert from_tensors(config, mixed, "somewhere", dtype=torch.bfloat16).model.norm.weight.dtype == torch.bfloat16
    from_tensors(config, good | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(16)}, "somewhere")


def test_a_tied_head_stored_twice_must_be_the_same() -> None:
    config = replace(LlamaConfig.from_dict(TINY), tie_word_embeddings=True)
    good = Llama(config).initialise(0).state_dict()
    assert "lm_head.weight" not in good
    embedding = good["model.embed_tokens.weight"]
    from_tensors(config, good | {"lm_head.weight": embedding.clone()}, "somewhere")
    with pytest.raises(FormatError, match=r"lm_head\.weight"):
        from_tensors(config, good | {"lm_head.weight": embedding + 1}, "somewhere")


def test_loads_a_folder(tmp_path: Path) -> None:
    raw = VARIANTS["ratio 8, tied, llama3"]
    peer = peer_of(raw, seed=8)
    peer.save_pretrained(tmp_path)  # writes config.json in the newest spelling
    model = load_llama(tmp_path)
    tokens = torch.randint(0, 320, (1, 20))
    with torch.inference_mode():
        assert relative(model(tokens), peer(tokens).logits) < 1e-4
    assert load_llama(tmp_path, dtype=torch.bfloat16).model.norm.weight.dtype == torch.bfloat16
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(FormatError, match=r"config\.json"):
        load_llama(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FormatError, match=r"config\.json"):
        load_llama(tmp_path)


@pytest.mark.slow
@torch.inference_mode()
def test_smollm2_logits_equal_transformers(smollm2: Path) -> None:
    model = load_llama(smollm2, dtype=torch.float32)
    peer = LlamaForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    for length in (1, 5, 300):
        tokens = torch.randint(0, model.config.vocab_size, (2, length), generator=generator)
        assert relative(model(tokens), peer(tokens).logits) < 1e-4
