"""LoRA is PEFT's LoRA: the same forward, gradient and files; merging changes nothing; hostile adapters are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.model.formats import save_folder
from steelyard.model.llama import Llama, LlamaConfig
from steelyard.train.lora import TARGETS, LoraLinear, adapters, add_lora, load_adapter, merge_lora, save_adapter

CONFIG = LlamaConfig(97, 64, 112, 3, 4, 2, 16, max_position_embeddings=64)


def tiny() -> Llama:
    return Llama(CONFIG).initialise(1).eval()


def shake(model: Llama) -> None:
    """Give B values, as training does: with B zero every mistake in A is invisible."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, adapted in adapters(model):
            adapted.lora_B.normal_(std=0.3, generator=generator)


def save_hugging_face(model: Llama, folder: Path) -> Path:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": CONFIG.vocab_size,
        "hidden_size": CONFIG.hidden_size,
        "intermediate_size": CONFIG.intermediate_size,
        "num_hidden_layers": CONFIG.num_hidden_layers,
        "num_attention_heads": CONFIG.num_attention_heads,
        "num_key_value_heads": CONFIG.num_key_value_heads,
        "max_position_embeddings": CONFIG.max_position_embeddings,
        "rms_norm_eps": CONFIG.rms_norm_eps,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    save_folder(folder, config, model.state_dict(), {})
    return folder


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(97, (2, 11), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("layers", [None, range(1, 3)])
def test_peft_loads_our_adapter_and_computes_the_same(
    tmp_path: Path, tokens: torch.Tensor, layers: range | None
) -> None:
    peft = pytest.importorskip("peft", reason="peft is the oracle: pip install 'steelyard[dev]'")
    from transformers import LlamaForCausalLM

    model = tiny()
    folder = save_hugging_face(model, tmp_path / "base")
    plain = model(tokens)
    add_lora(model, 4, 10.0, ("q", "v", "down"), layers)
    shake(model)
    save_adapter(model, tmp_path / "adapter", str(folder))
    theirs = peft.PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(folder), tmp_path / "adapter", is_trainable=True
    )
    ours, expected = model(tokens), theirs(tokens).logits
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert (ours - plain).abs().max() > 0.1
    ours.square().sum().backward()
    theirs(tokens).logits.square().sum().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert len(gradients) == 6 * len(layers or range(3))
    for name, adapted in adapters(model):
        for part in ("A", "B"):
            wanted = gradients[f"base_model.model.{name}.lora_{part}.default.weight"]
            torch.testing.assert_close(getattr(adapted, f"lora_{part}").grad, wanted, rtol=1e-4, atol=1e-4)


def test_we_load_the_adapter_that_peft_writes(tmp_path: Path, tokens: torch.Tensor) -> None:
    peft = pytest.importorskip("peft", reason="peft is the oracle: pip install 'steelyard[dev]'")
    from transformers import LlamaForCausalLM

    model = tiny()
    base = LlamaForCausalLM.from_pretrained(save_hugging_face(model, tmp_path / "base"))
    settings = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["k_proj", "o_proj", "gate_proj", "up_proj"])
    theirs = peft.get_peft_model(base, settings)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    theirs.save_pretrained(tmp_path / "adapter")
    load_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_a_fresh_adapter_changes_nothing_and_only_adapters_learn(tokens: torch.Tensor) -> None:
    model = tiny()
    before = model(tokens)
    names = set(model.state_dict())
    add_lora(model, 2, 4.0)
    assert torch.equal(model(tokens), before)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert len(list(adapters(model))) == 3 * len(TARGETS)
    assert names < set(model.state_dict())
    again = tiny()
    add_lora(again, 2, 4.0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    for _, adapted in adapters(model):
        assert 0 < adapted.lora_A.abs().max() <= adapted.in_features**-0.5  # PEFT's bound: sqrt(6 / ((1 + 5) in))


def test_merged_equals_unmerged_and_is_plain_again(tokens: torch.Tensor) -> None:
    model = tiny()
    names = list(model.state_dict())
    add_lora(model, 4, 8.0)
    shake(model)
    adapted = model(tokens)
    merge_lora(model)
    torch.testing.assert_close(model(tokens), adapted, rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == names
    assert not any(isinstance(module, LoraLinear) for module in model.modules())


def test_a_saved_adapter_comes_back_to_the_bit(tmp_path: Path, tokens: torch.Tensor) -> None:
    model, other = tiny(), tiny()
    add_lora(model, 4, 8.0, ("q", "up"), range(2, 3))
    shake(model)
    save_adapter(model, tmp_path / "adapter")
    load_adapter(other, tmp_path / "adapter")
    assert torch.equal(model(tokens), other(tokens))
    with pytest.raises(SteelyardError, match="exists already"):
        save_adapter(model, tmp_path / "adapter")


def test_layers_below_the_lowest_adapter_build_no_graph(tokens: torch.Tensor) -> None:
    model = tiny()
    add_lora(model, 2, 4.0, layers=range(2, 3))
    seen = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output.requires_grad))
    model.hidden(tokens)
    assert seen == [False, False, True]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"rank": 0}, "rank 0"),
        ({"alpha": float("nan")}, "alpha nan"),
        ({"targets": ("q", "head")}, "q, head"),
        ({"targets": ()}, "none"),
        ({"layers": range(2, 4)}, "layers 0 to 2"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        add_lora(tiny(), **({"rank": 2, "alpha": 4.0} | change))  # type: ignore[arg-type]


def test_a_second_adapter_is_refused_and_none_is_not_saved(tmp_path: Path) -> None:
    model = tiny()
    with pytest.raises(UsageError, match="no adapter"):
        save_adapter(model, tmp_path / "adapter")
    add_lora(model, 2, 4.0)
    with pytest.raises(UsageError, match="already"):
        add_lora(model, 2, 4.0)


@pytest.mark.parametrize(
    ("settings", "tensors", "complaint"),
    [
        ({"peft_type": "IA3"}, {}, "peft_type"),
        ({"use_dora": True}, {}, "use_dora"),
        ({"rank_pattern": {"q_proj": 8}}, {}, "rank_pattern"),
        ({"bias": "all"}, {}, "bias"),
        ({"r": 1 << 40}, {}, "r is"),
        ({"lora_alpha": "16"}, {}, "lora_alpha"),
        ({}, {"lora_A": None}, "no lora_A"),
        ({}, {"lora_B": torch.zeros(64, 3)}, r"\[64, 3\]; rank and model say \[64, 2\]"),
        ({}, {"surplus": torch.zeros(1)}, "surplus"),
    ],
)
def test_a_foreign_or_damaged_adapter_is_named(
    tmp_path: Path, settings: dict[str, object], tensors: dict[str, torch.Tensor | None], complaint: str
) -> None:
    model = tiny()
    add_lora(model, 2, 4.0, ("q",), range(1))
    folder = tmp_path / "adapter"
    save_adapter(model, folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    stored = load_file(folder / "adapter_model.safetensors")
    for part, tensor in tensors.items():
        name = next((key for key in stored if part in key), part)
        stored.pop(name, None)
        if tensor is not None:
            stored[name] = tensor
    save_file(stored, folder / "adapter_model.safetensors")
    with pytest.raises(FormatError, match=complaint):
        load_adapter(tiny(), folder)
