"""Tokenizers out of GGUF metadata, as the files of a Hugging Face folder.

Two families: byte-level BPE (`gpt2`, with merges and a named pre-tokenizer) and SentencePiece's BPE (`llama`, with a
score for each token, from which the merges follow). Parity with llama.cpp is tested for both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from steelyard.base.errors import FormatError, require_extra
from steelyard.model.headers import GGUFHeader, quote
from steelyard.model.tokenizer import end_of_turn_ids

if TYPE_CHECKING:
    import tokenizers

# Token types, gguf's TokenType.
UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6

# Split patterns, as the tokenizer.json of the models they are named after has them.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# What llama.cpp itself splits with where a converter did not know the model's own pre-tokenizer.
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2_WORDS, r"\p{N}+", r"[0-9][0-9][0-9]")
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")


@dataclass(frozen=True)
class _PreTokenizer:
    """How text is split before merging: patterns in turn, then (where `words`) GPT-2's own pattern."""

    patterns: tuple[str, ...] = ()
    words: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False


_GPT2 = _PreTokenizer(words=True)
_DIGITS = _PreTokenizer((r"\p{N}",), words=True)
_LLAMA3_SPLIT = _PreTokenizer((_LLAMA3,), ignore_merges=True, adds_bos=True)
PRE_TOKENIZERS = {
    "default": _PreTokenizer(_DEFAULT),
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "mpt": _GPT2,
    "olmo": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
    "codeshell": _DIGITS,
    "exaone": _DIGITS,
    "minerva-7b": _DIGITS,
    "llama3": _LLAMA3_SPLIT,
    "llama-v3": _LLAMA3_SPLIT,
    "llama-bpe": _LLAMA3_SPLIT,
    "falcon3": _LLAMA3_SPLIT,
    "dbrx": _PreTokenizer((_LLAMA3,)),
    "smaug-bpe": _PreTokenizer((_LLAMA3,)),
    "qwen2": _PreTokenizer((_QWEN2,)),
    "deepseek-r1-qwen": _PreTokenizer((_QWEN2,)),
    "stablelm2": _PreTokenizer((_QWEN2,)),
    "megrez": _PreTokenizer((_QWEN2,)),
    "deepseek-coder": _PreTokenizer(_DEEPSEEK_CODER),
}


@dataclass(frozen=True)
class TokenizerParts:
    """A tokenizer's files by name, and the ids that config.json and generation_config.json repeat."""

    files: Mapping[str, bytes]
    vocab_size: int
    bos_id: int | None
    eos_id: int
    eos_ids: frozenset[int]
    pad_id: int | None


def read_tokenizer(header: GGUFHeader, max_length: int) -> TokenizerParts:
    """Build tokenizer.json and what lies beside it. `max_length` is the model's context in tokens.

    Raises FormatError for another family than the two, an unknown pre-tokenizer (by name), and tables that disagree.
    """
    family = header.metadata.get("tokenizer.ggml.model")
    tokens = header.strings("tokenizer.ggml.tokens")
    kinds = _kinds(header, len(tokens))
    vocab = {token: number for number, token in enumerate(tokens)}
    if len(vocab) != len(tokens) or "" in vocab:
        _refuse(header, "tokenizer.ggml.tokens", "has an empty token, or one twice")
    ids = {name: _id(header, name, len(tokens)) for name in ("bos", "eos", "unknown", "padding", "eot", "eom")}
    if family == "gpt2":
        backend, adds_bos = _byte_level(header, vocab)
    elif family == "llama":
        for name, default in (("bos", 1), ("eos", 2), ("unknown", 0)):  # the family's own where the file is silent
            ids[name] = default if ids[name] is None else ids[name]
        backend, adds_bos = _sentencepiece(header, vocab, kinds, tokens[ids["unknown"] or 0])
    else:
        _refuse(header, "tokenizer.ggml.model", f"is {quote(family)}; read are gpt2 and llama")
    adds_bos = _flag(header, "tokenizer.ggml.add_bos_token", adds_bos)
    if _flag(header, "tokenizer.ggml.add_eos_token", False):
        _refuse(header, "tokenizer.ggml.add_eos_token", "is true: a prompt that ends its own text cannot be continued")
    if (eos := ids["eos"]) is None:
        _refuse(header, "tokenizer.ggml.eos_token_id", "is missing: generation could never end")
    if adds_bos and ids["bos"] is None:
        _refuse(header, "tokenizer.ggml.bos_token_id", "is missing, though add_bos_token asks for it")
    special = _add_tokens(backend, tokens, kinds, ids)
    template = header.metadata.get("tokenizer.chat_template", "")
    if not isinstance(template, str):
        _refuse(header, "tokenizer.chat_template", "must be a text")
    if adds_bos and ids["bos"] is not None:
        _prepend_bos(backend, tokens[ids["bos"]], ids["bos"])
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": adds_bos,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    named = (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding"))
    names = {key: tokens[number] for key, name in named if (number := ids[name]) is not None}
    files = {
        "tokenizer.json": backend.to_str(pretty=False).encode(),
        "tokenizer_config.json": _json(settings | names),
        "special_tokens_map.json": _json(names),
    }
    if template:
        files["chat_template.jinja"] = template.encode()
    ends = {eos, *(number for name in ("eot", "eom") if (number := ids[name]) is not None)}
    return TokenizerParts(
        files, len(tokens), ids["bos"], eos, frozenset(ends) | end_of_turn_ids(special, template), ids["padding"]
    )


def _refuse(header: GGUFHeader, key: str, what: str) -> NoReturn:
    raise FormatError(f"{header.path}: {key} {what}: convert the model again")


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _library() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.normalizers
        import tokenizers.pre_tokenizers
        import tokenizers.processors
    except ImportError:
        raise require_extra("tokenizers", "models") from None
    return tokenizers


def _id(header: GGUFHeader, name: str, count: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value = header.metadata.get(key)
    if value is not None and (type(value) is not int or not 0 <= value < count):
        _refuse(header, key, f"is {quote(value)}, not one of {count:,} tokens")
    return value


def _flag(header: GGUFHeader, key: str, default: bool) -> bool:
    value = header.metadata.get(key, default)
    if not isinstance(value, bool):
        _refuse(header, key, "must be true or false")
    return bool(value)


def _kinds(header: GGUFHeader, count: int) -> list[int]:
    kinds: list[int] = header.numbers("tokenizer.ggml.token_type").tolist()
    if len(kinds) != count:
        _refuse(header, "tokenizer.ggml.token_type", f"has {len(kinds):,} entries for {count:,} tokens")
    return kinds


def _bpe(header: GGUFHeader, **settings: Any) -> tokenizers.Tokenizer:
    library = _library()
    try:
        backend: tokenizers.Tokenizer = library.Tokenizer(library.models.BPE(**settings))
        return backend
    except Exception as error:  # the library raises bare Exception
        reason = " ".join(str(error).split())[:200]
        raise FormatError(f"{header.path}: tokenizer.ggml.merges do not fit the tokens ({reason})") from None


def _byte_level(header: GGUFHeader, vocab: dict[str, int]) -> tuple[tokenizers.Tokenizer, bool]:
    name = header.metadata.get("tokenizer.ggml.pre")
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        _refuse(header, "tokenizer.ggml.pre", f"is {quote(name)}; known are {', '.join(PRE_TOKENIZERS)}")
    pre = PRE_TOKENIZERS[str(name)]
    merges = []
    for merge in header.strings("tokenizer.ggml.merges"):
        left, space, right = merge.partition(" ")
        if not space or not left or not right or " " in right:
            _refuse(header, "tokenizer.ggml.merges", f"holds {quote(merge)}, which is not a pair")
        merges.append((left, right))
    backend = _bpe(header, vocab=vocab, merges=merges, ignore_merges=pre.ignore_merges)
    library = _library()
    splitters = library.pre_tokenizers
    steps = [splitters.Split(library.Regex(pattern), "isolated") for pattern in pre.patterns]
    steps.append(splitters.ByteLevel(add_prefix_space=False, use_regex=pre.words))
    backend.pre_tokenizer = steps[0] if len(steps) == 1 else splitters.Sequence(steps)
    backend.decoder = library.decoders.ByteLevel()
    return backend, pre.adds_bos


def _sentencepiece(
    header: GGUFHeader, vocab: dict[str, int], kinds: list[int], unknown: str
) -> tuple[tokenizers.Tokenizer, bool]:
    scores = header.numbers("tokenizer.ggml.scores").astype(np.float64)
    if len(scores) != len(vocab) or not np.isfinite(scores).all():
        _refuse(header, "tokenizer.ggml.scores", "must give each token a finite score")
    missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in vocab]
    if missing:
        _refuse(header, "tokenizer.ggml.tokens", f"has no token <0x{missing[0]:02X}>: byte fallback needs all 256")
    backend = _bpe(
        header,
        vocab=vocab,
        merges=_merges_from_scores(vocab, kinds, scores.tolist()),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    library = _library()
    replace = library.normalizers.Replace(" ", "▁")
    decoding = [library.decoders.Replace("▁", " "), library.decoders.ByteFallback(), library.decoders.Fuse()]
    if _flag(header, "tokenizer.ggml.add_space_prefix", True):
        backend.normalizer = library.normalizers.Sequence([library.normalizers.Prepend("▁"), replace])
        decoding.append(library.decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = replace
    backend.decoder = library.decoders.Sequence(decoding)
    return backend, True


def _merges_from_scores(vocab: Mapping[str, int], kinds: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """Every split of a token into two tokens, best score first.

    SentencePiece merges the adjacent pair whose union has the best score; a merge table ranked by that score does the
    same. Control and byte tokens are never made by merging: text a user types can't become one.
    """
    plain = {token for token, number in vocab.items() if kinds[number] not in (UNKNOWN, CONTROL, BYTE)}
    ranked = []
    for token in plain:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in plain and right in plain:
                ranked.append((-scores[vocab[token]], vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _add_tokens(
    backend: tokenizers.Tokenizer, tokens: list[str], kinds: list[int], ids: Mapping[str, int | None]
) -> dict[str, int]:
    """Mark the tokens that are found whole before anything else; returns the special ones by text."""
    library = _library()
    special_ids = {number for number, kind in enumerate(kinds) if kind in (UNKNOWN, CONTROL)}
    special_ids |= {number for number in ids.values() if number is not None}
    added = special_ids | {number for number, kind in enumerate(kinds) if kind == USER_DEFINED}
    marked = [
        library.AddedToken(tokens[number], special=number in special_ids, normalized=False) for number in sorted(added)
    ]
    backend.add_tokens(marked)
    return {tokens[number]: number for number in special_ids}


def _prepend_bos(backend: tokenizers.Tokenizer, token: str, number: int) -> None:
    processors = _library().processors
    backend.post_processor = processors.TemplateProcessing(
        single=f"{token}:0 $A:0", pair=f"{token}:0 $A:0 {token}:1 $B:1", special_tokens=[(token, number)]
    )
