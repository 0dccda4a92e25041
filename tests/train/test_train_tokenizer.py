"""A tokenizer from nothing: digits alone, every byte writable, and the same tokens in three programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.base.errors import SteelyardError, UsageError

pytest.importorskip("tokenizers")
from steelyard.model.chat import Renderer
from steelyard.model.tokenizer import Tokenizer
from steelyard.train.tokenizer import CHAT_TEMPLATE, PRE, SPECIAL, train_tokenizer

TEXTS = [
    "The quick brown fox jumps over 13 lazy dogs, in 2024 or 1999; don't we'll I'm.",
    "def f(x):\n    return x ** 2\n\n\n# naïve Größe café — 北京, Привет, 🙂",
    "Pack my box with five dozen liquor jugs; sphinx of black quartz, judge my vow! Quick daft zebras jump.",
] * 20
HARD = [
    "", " ", "  x", "\n\n", " 12345 3.14 1,000", "x²½Ⅷ٣", "don't WE'LL", "a\tb\r\nc", "北京 123 東京",
    "<|im_end|> <|begin_of_text|>", "\U0001f468\u200d\U0001f469", "e\u0301", "\u00a0\u2003", "\x00\x01", "trailing  ",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "tokenizer"
    assert train_tokenizer(TEXTS, out, vocab_size=390, max_length=128) == 390
    return out


def test_special_tokens_come_first_and_digits_stand_alone(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    assert [tokenizer.special_ids[token] for token in SPECIAL] == [0, 1, 2, 3, 4]
    assert tokenizer.bos_id == 0
    assert tokenizer.adds_bos
    assert tokenizer.eos_ids == {1, 4}  # the end of a text, and of a turn
    assert tokenizer.decode(tokenizer.encode("in 2024 or", bos=False)) == "in 2024 or"
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    digits = [token for token in vocabulary if any(c in "0123456789" for c in token)]
    assert len(digits) == 10
    assert all(len(token) == 1 for token in digits)


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_text_comes_back(folder: Path, text: str) -> None:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.decode(tokenizer.encode(text, bos=False), skip_special=False) == text
    assert tokenizer.encode_batch([text, "x"])[0] == tokenizer.encode(text, bos=False)


def test_the_same_texts_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    train_tokenizer(iter(TEXTS), tmp_path / "again", vocab_size=390, max_length=128)
    for path in folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_transformers_reads_it_alike(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.load(folder)
    for text in (*HARD, *TEXTS[:2]):
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text, bos=False, special=True)
        assert theirs(text)["input_ids"] == ours.encode(text, bos=True, special=True)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    talk = [{"role": "user", "content": "Hi 42?"}, {"role": "assistant", "content": "Yes."}]
    assert theirs.chat_template == CHAT_TEMPLATE
    renderer = Renderer(folder)
    assert renderer.template is not None
    rendered = renderer.template.render(talk, add_generation_prompt=True)
    assert theirs.apply_chat_template(talk, add_generation_prompt=True, tokenize=False) == rendered


@pytest.mark.oracle
def test_llama_cpp_reads_it_alike(folder: Path, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="the oracle: pip install 'steelyard[oracle]'")
    pytest.importorskip("torch")
    from steelyard.base.progress import Silent
    from steelyard.model.gguf_export import export_gguf
    from steelyard.train.pretrain import new_model, save_pretrained

    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = new_model({**shape, "max_position_embeddings": 64}, folder, 0)
    save_pretrained(model, folder, tmp_path / "model")
    export_gguf(tmp_path / "model", tmp_path / "m.gguf", "F16", progress=Silent())
    oracle = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    assert oracle.metadata["tokenizer.ggml.pre"] == PRE
    assert oracle.metadata["tokenizer.chat_template"] == CHAT_TEMPLATE
    ours = Tokenizer.load(folder)
    for text in (*HARD, *TEXTS[:2]):
        if "\x00" not in text:
            for special in (False, True):
                expected = oracle.tokenize(text.encode(), add_bos=False, special=special)
                assert ours.encode(text, bos=False, special=special) == expected, ascii(text)


def test_what_cannot_be_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="bytes and special tokens alone are 261"):
        train_tokenizer(TEXTS, tmp_path / "t", vocab_size=260, max_length=64)
    with pytest.raises(SteelyardError, match="no document"):
        train_tokenizer([], tmp_path / "t", vocab_size=300, max_length=64)
    with pytest.raises(SteelyardError, match="exists"):
        train_tokenizer(TEXTS, folder, vocab_size=300, max_length=64)
    assert train_tokenizer(["ab ab"], tmp_path / "small", vocab_size=5000, max_length=64) < 300
