"""Tokenizers out of GGUF read text as llama.cpp and transformers do; what a user types can't become a special token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf_files import (
    CONFIG,
    USER_DEFINED,
    byte_level_metadata,
    sentencepiece_metadata,
    strings,
    write_gguf,
)

from steelyard.base.errors import FormatError, SteelyardError
from steelyard.model.gguf import import_gguf
from steelyard.model.gguf_tokenizer import PRE_TOKENIZERS
from steelyard.model.tokenizer import Tokenizer

pytest.importorskip("torch")
pytest.importorskip("gguf")
pytest.importorskip("tokenizers")


def make(folder: Path, metadata: dict[str, Any]) -> tuple[Path, Path]:
    """(GGUF, imported folder) of a tiny model with this tokenizer."""
    config = CONFIG | {"vocab_size": len(metadata["tokenizer.ggml.tokens"])}
    source = write_gguf(folder / "m.gguf", config=config, tokenizer=metadata)
    import_gguf(source, folder / "out")
    return source, folder / "out"


def llama_cpp_vocabulary(path: Path) -> Any:
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="the oracle is llama-cpp-python: pip install 'steelyard[oracle]'"
    )
    return llama_cpp.Llama(str(path), vocab_only=True, verbose=False)


def assert_as_llama_cpp(source: Path, folder: Path, texts: list[str]) -> None:
    oracle, tokenizer = llama_cpp_vocabulary(source), Tokenizer.load(folder)
    for special in (False, True):
        for text in texts:
            expected = oracle.tokenize(text.encode(), add_bos=False, special=special)
            assert tokenizer.encode(text, bos=False, special=special) == expected, ascii(text)


def assert_as_transformers(folder: Path, texts: list[str]) -> None:
    transformers = pytest.importorskip("transformers")
    oracle, tokenizer = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder)
    for text in texts:
        found = tokenizer.encode(text, bos=tokenizer.adds_bos, special=True)
        assert oracle(text)["input_ids"] == found, ascii(text)
        assert oracle.decode(found, skip_special_tokens=True) == tokenizer.decode(found), ascii(text)
    assert (oracle.bos_token_id, oracle.eos_token_id in tokenizer.eos_ids) == (tokenizer.bos_id, True)


SPECIAL_TEXTS = [
    "<s>x</s>",
    "</s>",
    "<unk> a",
    "<|end|> b<|open|>",
    "<0x0A>",
    "a<|end|>",
    "▁a ▁",
    "",
    " ",
    "  a",
    "\n",
]


@pytest.mark.oracle
@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_family_reads_as_llama_cpp(prefix: bool, tmp_path: Path) -> None:
    source, folder = make(tmp_path, sentencepiece_metadata(add_space_prefix=prefix))
    texts = strings(1000) + SPECIAL_TEXTS
    assert_as_llama_cpp(source, folder, texts)
    assert_as_transformers(folder, [text for text in texts if text])


@pytest.mark.oracle
def test_user_defined_tokens_are_found_whole(tmp_path: Path) -> None:
    metadata = sentencepiece_metadata()
    tokens = ["<tool>", "[INST]"]
    metadata["tokenizer.ggml.tokens"] += tokens
    metadata["tokenizer.ggml.scores"] += [0.0] * len(tokens)
    metadata["tokenizer.ggml.token_type"] += [USER_DEFINED] * len(tokens)
    source, folder = make(tmp_path, metadata)
    assert_as_llama_cpp(source, folder, ["a <tool> b", "[INST] who [INST]", "<tool><tool>", "<tool", *strings(50)])


@pytest.mark.oracle
@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_byte_level_family_reads_as_llama_cpp(pre: str, tmp_path: Path) -> None:
    source, folder = make(tmp_path, byte_level_metadata(pre))
    assert_as_llama_cpp(source, folder, strings(300, seed=11) + SPECIAL_TEXTS)


@pytest.mark.oracle
def test_smollm2_reads_as_llama_cpp(smollm2_gguf: Path, smollm2: Path) -> None:
    assert_as_llama_cpp(smollm2_gguf, smollm2, [*strings(1000, seed=5), "<|im_start|>user\nHi<|im_end|>\n"])


def test_smollm2_reads_as_transformers_and_renders_chat(smollm2: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = smollm2
    assert_as_transformers(folder, strings(300, seed=6))
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids, tokenizer.adds_bos) == (49152, 1, {2}, False)
    oracle = transformers.AutoTokenizer.from_pretrained(folder)
    turn = [{"role": "user", "content": "Hi"}]
    text = oracle.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = oracle.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == tokenizer.encode(text, bos=False, special=True)


def test_special_tokens_in_text_are_characters_unless_asked(tmp_path: Path) -> None:
    for name, metadata, text, number in (
        ("a", byte_level_metadata("smollm"), "<|open|>", 1),
        ("b", sentencepiece_metadata(), "</s>", 2),
    ):
        (tmp_path / name).mkdir()
        tokenizer = Tokenizer.load(make(tmp_path / name, metadata)[1])
        assert number not in tokenizer.encode(f"a {text} b", bos=False)
        assert number in tokenizer.encode(f"a {text} b", bos=False, special=True)
        assert tokenizer.decode(tokenizer.encode(f"a {text} b", bos=False)) == f"a {text} b"
        assert tokenizer.decode([number]) == ""
        assert tokenizer.decode([number], skip_special=False) == text


def test_merges_never_make_a_control_token(tmp_path: Path) -> None:
    metadata = sentencepiece_metadata()
    metadata["tokenizer.ggml.tokens"] += ["<", "s>", "<s", ">"]  # so that <s> could be merged from what a user types
    tokens = metadata["tokenizer.ggml.tokens"] = list(dict.fromkeys(metadata["tokenizer.ggml.tokens"]))
    metadata["tokenizer.ggml.scores"] += [0.0] * (len(tokens) - len(metadata["tokenizer.ggml.scores"]))
    metadata["tokenizer.ggml.token_type"] += [1] * (len(tokens) - len(metadata["tokenizer.ggml.token_type"]))
    tokenizer = Tokenizer.load(make(tmp_path, metadata)[1])
    assert 1 not in tokenizer.encode("<s>", bos=False)


@pytest.mark.parametrize("adds", [True, False, None])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_add_bos_token_is_honoured(family: str, adds: bool | None, tmp_path: Path) -> None:
    make_metadata = byte_level_metadata if family == "gpt2" else sentencepiece_metadata
    _, folder = make(tmp_path, make_metadata(**({} if adds is None else {"add_bos_token": adds})))
    tokenizer = Tokenizer.load(folder)
    expected = (family == "llama") if adds is None else adds
    assert tokenizer.adds_bos is expected
    assert tokenizer.encode("x", bos=True) == [1, *tokenizer.encode("x", bos=False)]
    assert_as_transformers(folder, strings(20))
    # Where tokenizer_config.json is silent, the post-processor tells.
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["add_bos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert Tokenizer.load(folder).adds_bos is expected


def test_end_of_turn_ends_generation(tmp_path: Path) -> None:
    metadata = byte_level_metadata("llama-bpe", eot_token_id=5)
    metadata["tokenizer.ggml.tokens"][1] = "<|eot_id|>"
    metadata["tokenizer.ggml.bos_token_id"] = 0
    metadata["tokenizer.chat_template"] = "{{ messages[0]['content'] }}<|eot_id|>"
    _, folder = make(tmp_path, metadata)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [0, 1, 5]
    assert Tokenizer.load(folder).eos_ids == {0, 1, 5}
    (folder / "generation_config.json").unlink()
    assert Tokenizer.load(folder).eos_ids == {0, 1}
    (folder / "chat_template.jinja").unlink()
    assert Tokenizer.load(folder).eos_ids == {0}


def test_bos_of_a_tokenizer_without_one(tmp_path: Path) -> None:
    metadata = byte_level_metadata("gpt-2")
    del metadata["tokenizer.ggml.bos_token_id"]
    tokenizer = Tokenizer.load(make(tmp_path, metadata)[1])
    assert tokenizer.bos_id is None
    with pytest.raises(SteelyardError, match="no beginning-of-sequence"):
        tokenizer.encode("a", bos=True)


def _without(metadata: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in metadata.items() if name != f"tokenizer.ggml.{key}"}


BROKEN = {
    "unknown family": lambda: byte_level_metadata(model="bert"),
    "unknown pre-tokenizer": lambda: byte_level_metadata("wonderful"),
    "no pre-tokenizer": lambda: _without(byte_level_metadata(), "pre"),
    "end past the vocabulary": lambda: byte_level_metadata(eos_token_id=10_000),
    "no end": lambda: _without(byte_level_metadata(), "eos_token_id"),
    "ends its own text": lambda: byte_level_metadata(add_eos_token=True),
    "token twice": lambda: byte_level_metadata(tokens=["a"] * 400),
    "types of another number": lambda: byte_level_metadata(token_type=[1]),
    "merge of strangers": lambda: byte_level_metadata(merges=["zzz yyy"]),
    "merge of one": lambda: byte_level_metadata(merges=["a"]),
    "no scores": lambda: _without(sentencepiece_metadata(), "scores"),
    "infinite score": lambda: sentencepiece_metadata(scores=[float("inf")] * 3),
    "no byte tokens": lambda: sentencepiece_metadata(
        tokens=[f"t{i}" for i in range(400)], scores=[0.0] * 400, token_type=[1] * 400
    ),
}
REASONS = {
    "unknown family": "tokenizer.ggml.model is 'bert'; read are gpt2 and llama",
    "unknown pre-tokenizer": "tokenizer.ggml.pre is 'wonderful'; known are",
    "no pre-tokenizer": "tokenizer.ggml.pre is None",
    "end past the vocabulary": "eos_token_id is 10000",
    "no end": "eos_token_id is missing",
    "ends its own text": "add_eos_token is true",
    "token twice": "tokens has an empty token, or one twice",
    "types of another number": "token_type has 1 entries",
    "merge of strangers": "merges do not fit",
    "merge of one": "merges holds 'a', which is not a pair",
    "no scores": "scores: must be an array",
    "infinite score": "must give each token a finite score",
    "no byte tokens": "no token <0x00>",
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_tokenizer_is_refused_by_name(case: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=REASONS[case]) as refusal:
        make(tmp_path, BROKEN[case]())
    assert "\n" not in str(refusal.value)


def test_broken_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"tokenizer\.json: is missing"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FormatError, match="is not a tokenizer"):
        Tokenizer.load(tmp_path)
    _, folder = make(tmp_path, byte_level_metadata())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|absent|>"}))
    with pytest.raises(FormatError, match=r"eos_token: '<\|absent\|>' is not in"):
        Tokenizer.load(folder)
