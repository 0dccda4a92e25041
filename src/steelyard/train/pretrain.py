"""Pretraining: a LLaMA from random weights to a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from steelyard.base.errors import FormatError, UsageError
from steelyard.base.progress import Progress
from steelyard.base.yamlfile import nearest
from steelyard.corpus.shards import Shards, tokenizer_digest
from steelyard.model.formats import save_folder
from steelyard.model.identity import is_model_file
from steelyard.model.llama import Llama, LlamaConfig
from steelyard.model.tokenizer import Tokenizer
from steelyard.train.batch import Batch, Loader
from steelyard.train.loop import train
from steelyard.train.losses import CrossEntropy
from steelyard.train.options import TrainOptions, TrainResult
from steelyard.train.packing import BestFit, Concatenated


@dataclass(frozen=True)
class Packing:
    """How shards fill a step: `concatenated` rows of `length` tokens, `rows` in a micro-batch; or `best_fit`, documents
    cut at `length`, in micro-batches of `length` * `rows` tokens."""

    kind: Literal["concatenated", "best_fit"]
    length: int
    rows: int
    micro_batches_per_step: int = 1

    def loader(self, shards: Shards, seed: int) -> Loader[Batch]:
        """Training batches."""
        if self.kind == "concatenated":
            return Concatenated(
                shards,
                row_length=self.length,
                rows_per_micro_batch=self.rows,
                micro_batches_per_step=self.micro_batches_per_step,
                seed=seed,
            )
        return BestFit(
            shards,
            tokens_per_micro_batch=self.length * self.rows,
            micro_batches_per_step=self.micro_batches_per_step,
            max_length=self.length,
            seed=seed,
        )


# What `LlamaConfig.from_dict` reads.
_SIZES = {
    "model_type", "architectures", "hidden_act", "quantization_config", "compression_config", "is_encoder_decoder",
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "rms_norm_eps", "initializer_range", "tie_word_embeddings",
    "attention_bias", "mlp_bias", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor",
    "original_max_position_embeddings",
}  # fmt: skip
_ROPE = {
    "rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "partial_rotary_factor",
    "original_max_position_embeddings",
}  # fmt: skip
# What else stands in a LLaMA's config.json, which may be given as it is; of the model's computation it says nothing.
_BESIDE = {
    "_name_or_path", "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "pretraining_tp",
    "torch_dtype", "transformers_version", "unk_token_id", "use_cache",
}  # fmt: skip


def new_model(shape: Mapping[str, Any], tokenizer: Path, seed: int, source: str = "the model's sizes") -> Llama:
    """A LLaMA with the sizes of `shape` (names as in config.json) over the tokens of `tokenizer`, its folder.

    Projections that write into the residual stream begin smaller by sqrt(2 * layers), as GPT-2's (Radford et al. 2019,
    section 2.3), so that the stream's variance does not grow with depth. Raises FormatError naming `source`
    for impossible sizes, and for a name that a LLaMA's config.json does not have: left alone, it would be another
    model.
    """
    _refuse_unknown(shape, _SIZES | _BESIDE, source)
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(shape.get(name), Mapping):
            _refuse_unknown(shape[name], _ROPE, f"{source}: {name}")
    words = Tokenizer.load(tokenizer).vocab_size
    config = LlamaConfig.from_dict({"model_type": "llama", "vocab_size": words, **shape}, source)
    if config.vocab_size < words:
        raise FormatError(
            f"{source}: vocab_size = {config.vocab_size}: the tokenizer {tokenizer} has {words}: leave it out"
        )
    model = Llama(config).initialise(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_((2 * model.config.num_hidden_layers) ** -0.5)
    return model


def _refuse_unknown(given: Mapping[str, Any], known: Set[str], source: str) -> None:
    for name in given:
        if name not in known:
            raise FormatError(f"{source}: {name}: no LLaMA has such a size{nearest(name, known) or ': remove it'}")


def pretrain(
    model: Llama,
    tokenizer: Path,
    shards: Shards,
    validation: Shards | None,
    packing: Packing,
    options: TrainOptions,
    work: Path,
    *,
    progress: Progress,
) -> TrainResult:
    """Train `model` on `shards`; `work` holds checkpoints and metrics, and the same call goes on from there.

    Raises UsageError where shards and tokenizer do not belong together or rows are longer than the model's context, and
    what `train` raises.
    """
    for part in (shards, validation):
        if part is not None and part.manifest.tokenizer != tokenizer_digest(tokenizer):
            raise UsageError(f"{part.folder}: made with another tokenizer than {tokenizer}: make the shards again")
    positions = model.config.max_position_embeddings
    if packing.length > positions:
        raise UsageError(f"rows of {packing.length:,} tokens, but the model has {positions:,} positions")
    held_out = None
    if validation is not None:
        held_out = BestFit(
            validation,
            tokens_per_micro_batch=packing.length * packing.rows,
            micro_batches_per_step=1,
            max_length=packing.length,
            seed=0,
            endless=False,
        )
    loader = packing.loader(shards, options.seed)
    return train(model, loader, CrossEntropy(), options, work, validation=held_out, progress=progress)


def save_pretrained(model: Llama, tokenizer: Path, out: Path) -> None:
    """Write the model with its tokenizer as a Hugging Face folder, in bfloat16. SteelyardError where `out` exists."""
    config, ids = model.config, Tokenizer.load(tokenizer).named_ids()
    special = {f"{name.removesuffix('_token')}_token_id": number for name, number in ids.items()}
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "rope_theta": config.rope.theta,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        **special,
    }
    ends = sorted(Tokenizer.load(tokenizer).eos_ids)
    generation = special | {"eos_token_id": ends, "do_sample": False}
    files = {path.name: path.read_bytes() for path in sorted(tokenizer.iterdir()) if is_model_file(path.name)}
    files["generation_config.json"] = (json.dumps(generation, indent=2) + "\n").encode()
    tensors = {name: value.detach().to("cpu", torch.bfloat16) for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    save_folder(out, raw, tensors, files)
