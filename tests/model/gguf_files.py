"""Small GGUF models for tests: a random LLaMA in llama.cpp's layout, and tokenizers of both families."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SCRIPTS = (
    (0x21, 0x7E), (0xA1, 0x24F), (0x391, 0x3CE), (0x410, 0x44F), (0x5D0, 0x5EA), (0x620, 0x64A), (0x904, 0x939),
    (0x985, 0x9B9), (0xE01, 0xE3A), (0x10D0, 0x10F0), (0x3041, 0x3096), (0x30A1, 0x30FA), (0x4E00, 0x9FA5),
    (0xAC00, 0xD7A3), (0x1F300, 0x1F64F), (0x300, 0x36F), (0x2010, 0x2046), (0x660, 0x669), (0x1D400, 0x1D433),
)  # fmt: skip
TEXT = """the steelyard weighs goods before they leave town la bascule pèse les marchandises avant qu'elles quittent la
ville la stadera pesa le merci don't we'll I'm 1234 56 7 Größe naïve 北京 東京 Привет мир مرحبا नमस्ते สวัสดี 안녕하세요"""
WORDS = TEXT.split()
CONTROL, USER_DEFINED, BYTE, UNKNOWN, NORMAL = 3, 4, 6, 2, 1


def strings(count: int, seed: int = 0) -> list[str]:
    """Strings of many scripts, digits, contractions, odd spacing; no control characters but tab and line ends."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        parts = []
        for _ in range(draw.randint(1, 10)):
            if draw.random() < 0.5:
                parts.append(draw.choice(WORDS))
            else:
                low, high = draw.choice(SCRIPTS)
                parts.append("".join(chr(draw.randint(low, high)) for _ in range(draw.randint(1, 8))))
            parts.append(draw.choice([" ", " ", "  ", "\n", "\r\n", "\t", "", "", "'s", "...", " 12345 ", "   \n  "]))
        found.append("".join(parts))
    return found


def byte_level(size: int = 400, specials: Sequence[str] = ("<|end|>", "<|open|>")) -> tuple[list[str], list[str]]:
    """(tokens, merges) of a byte-level BPE trained on strings of many scripts."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(specials), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(strings(300, seed=7), trainer)
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return tokens, [" ".join(pair) for pair in model["merges"]]


def sentencepiece(size: int = 4000) -> tuple[list[str], list[float], list[int]]:
    """(tokens, scores, types) of a SentencePiece BPE vocabulary, LLaMA's layout: <unk> <s> </s>, bytes, pieces.

    Trained by the tokenizers library on the text that SentencePiece would see; a piece's score is minus its rank.
    """
    import tokenizers
    from tokenizers import models, normalizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    texts = [piece for text in strings(400, seed=3) for piece in (text, *text.split(" "))] + WORDS * 20
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    model = json.loads(backend.to_str())["model"]
    made = ["".join(pair) for pair in model["merges"]]
    merged = list(dict.fromkeys(piece for piece in made if " " not in piece))
    assert len(merged) > 1000  # a vocabulary of letters alone would show nothing
    letters = sorted(token for token in model["vocab"] if len(token) == 1)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *merged, *letters]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(merged) + len(letters))]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(merged) + len(letters))]
    return tokens, scores, kinds


def permute(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Hugging Face's order of query or key rows to llama.cpp's, as its converter does it."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def write_gguf(
    path: Path,
    *,
    config: Mapping[str, Any] | None = None,
    weights: Mapping[str, np.ndarray[Any, Any]] | None = None,
    kind: str = "F32",
    tokenizer: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    drop: Sequence[str] = (),
) -> Path:
    """A GGUF of architecture llama. `weights` have Hugging Face names; matrices are stored as `kind`.

    `tokenizer` and `extra` are metadata by key; `drop` leaves keys or tensors out.
    """
    import gguf

    config = config or CONFIG
    metadata: dict[str, Any] = {
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.block_count": config["num_hidden_layers"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.rope.dimension_count": config["head_dim"],
        "llama.attention.key_length": config["head_dim"],
        "llama.attention.value_length": config["head_dim"],
        "llama.rope.freq_base": float(config["rope_theta"]),
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": config["vocab_size"],
    }
    metadata |= dict(tokenizer or {}) | dict(extra or {})
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if key not in drop:
            _put(writer, key, value)
    for name, weight in (weights or random_weights(config)).items():
        short = _gguf_name(name)
        if short in drop:
            continue
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
        part = short.split(".")[-2]
        values = permute(weight, heads[part]) if part in heads else weight
        values = np.ascontiguousarray(values, dtype=np.float32)
        number = gguf.GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
        writer.add_tensor(short, gguf.quants.quantize(values, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _put(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, list(value))


CONFIG: dict[str, Any] = {
    "vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}  # fmt: skip


def random_weights(config: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Weights by Hugging Face name, already rounded to bfloat16 so that an import loses nothing."""
    draw = np.random.default_rng(seed)
    width, inner, vocab, size = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size", "head_dim"))
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (width,), prefix + "post_attention_layernorm.weight": (width,),
            prefix + "self_attn.q_proj.weight": (queries, width), prefix + "self_attn.k_proj.weight": (keys, width),
            prefix + "self_attn.v_proj.weight": (keys, width), prefix + "self_attn.o_proj.weight": (width, queries),
            prefix + "mlp.gate_proj.weight": (inner, width), prefix + "mlp.up_proj.weight": (inner, width),
            prefix + "mlp.down_proj.weight": (width, inner),
        }  # fmt: skip
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, width)
    made = {}
    for name, shape in shapes.items():
        values = draw.normal(1.0 if len(shape) == 1 else 0.0, 0.2, shape).astype(np.float32)
        made[name] = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    return made


def _gguf_name(name: str) -> str:
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "q_proj": "attn_q", "k_proj": "attn_k",
        "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up",
        "down_proj": "ffn_down",
    }  # fmt: skip
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, layer, *rest = stem.split(".")
        return f"blk.{layer}.{names[rest[-1]]}.weight"
    return f"{names.get(stem, stem)}.weight"


def byte_level_metadata(pre: str = "gpt-2", size: int = 400, **more: Any) -> dict[str, Any]:
    """Tokenizer metadata of the byte-level family."""
    tokens, merges = byte_level(size)
    kinds = [CONTROL, CONTROL, *[NORMAL] * (len(tokens) - 2)]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.merges": merges, "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
    } | {f"tokenizer.ggml.{key}": value for key, value in more.items()}  # fmt: skip


def sentencepiece_metadata(size: int = 4000, **more: Any) -> dict[str, Any]:
    """Tokenizer metadata of the SentencePiece family."""
    tokens, scores, kinds = sentencepiece(size)
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores, "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
    } | {f"tokenizer.ggml.{key}": value for key, value in more.items()}  # fmt: skip


def write_folder(
    out: Path,
    *,
    config: Mapping[str, Any] | None = None,
    weights: Mapping[str, np.ndarray[Any, Any]] | None = None,
    dtype: str = "bfloat16",
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """A Hugging Face folder of a small random LLaMA. `files` by name: the tokenizer's and whatever else."""
    import torch

    from steelyard.model.formats import save_folder

    config = CONFIG | dict(config or {})
    settings = {"model_type": "llama", "rms_norm_eps": 1e-5, "architectures": ["LlamaForCausalLM"]} | config
    tensors = {
        name: torch.from_numpy(weight).to(getattr(torch, dtype))
        for name, weight in (weights or random_weights(config)).items()
    }
    save_folder(out, settings, tensors, files or {})
    return out


def tokenizer_files(
    backend: Any, *, template: str | None = None, generation: Mapping[str, Any] | None = None, **settings: Any
) -> dict[str, bytes]:
    """The files of a Hugging Face folder for a tokenizer of the `tokenizers` library."""
    files = {
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_config.json": json.dumps({"eos_token": "<|end|>", "bos_token": "<|open|>"} | settings).encode(),
    }
    if template is not None:
        files["chat_template.jinja"] = template.encode()
    if generation is not None:
        files["generation_config.json"] = json.dumps(generation).encode()
    return files


def byte_level_backend(split: str = "digits", size: int = 400) -> Any:
    """A byte-level BPE trained on strings of many scripts, special tokens <|end|> and <|open|>. `split`: its form."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    from steelyard.model.gguf_tokenizer import GPT2_WORDS, PRE_TOKENIZERS

    def isolate(pattern: str, behavior: str = "isolated", invert: bool = False) -> Any:
        return pre_tokenizers.Split(tokenizers.Regex(pattern), behavior, invert)

    words, bare = (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use) for use in (True, False))
    steps = {
        "words": words,
        "words, written out": pre_tokenizers.Sequence([isolate(GPT2_WORDS), bare]),
        "digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words]),
        "digits as pattern": pre_tokenizers.Sequence([isolate(r"\p{N}"), words]),
        "llama3": pre_tokenizers.Sequence([isolate(PRE_TOKENIZERS["llama-bpe"].patterns[0]), bare]),
        "llama3 by removal": pre_tokenizers.Sequence(
            [isolate(PRE_TOKENIZERS["llama-bpe"].patterns[0], "removed", True), bare]
        ),
        "qwen2": pre_tokenizers.Sequence([isolate(PRE_TOKENIZERS["qwen2"].patterns[0]), bare]),
    }
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=split.startswith("llama3")))
    backend.pre_tokenizer = steps[split]
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|end|>", "<|open|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(strings(300, seed=7), trainer)
    return backend
