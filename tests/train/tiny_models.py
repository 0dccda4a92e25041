"""A tiny LLaMA with a byte-level tokenizer and a chat template, as a Hugging Face folder that every tool reads."""

from __future__ import annotations

import json
from pathlib import Path

from steelyard.model.formats import save_folder
from steelyard.model.llama import Llama, LlamaConfig

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
    "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_folder(folder: Path, *, layers: int = 2, width: int = 64, tied: bool = True, seed: int = 0) -> Path:
    """Write the model folder `folder` with random float32 weights, and return it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    vocab = backend.get_vocab_size(with_added_tokens=True)
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "initializer_range": 0.1,
        "bos_token_id": backend.token_to_id("<|im_start|>"),
        "eos_token_id": backend.token_to_id("<|im_end|>"),
        "dtype": "float32",
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 512,
    }
    model = Llama(LlamaConfig.from_dict(raw)).initialise(seed)
    files = {
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
        "chat_template.jinja": TEMPLATE.encode(),
    }
    save_folder(folder, raw, model.state_dict(), files)
    return folder
