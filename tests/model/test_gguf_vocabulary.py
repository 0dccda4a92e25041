"""Tokenizers into GGUF: llama.cpp reads text as the folder's own tokenizer does, or the export is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf_files import (
    CONFIG,
    WORDS,
    byte_level_backend,
    random_weights,
    sentencepiece_metadata,
    strings,
    tokenizer_files,
    write_folder,
    write_gguf,
)

from steelyard.base.errors import FormatError
from steelyard.base.progress import Silent
from steelyard.model.gguf_export import export_gguf
from steelyard.model.gguf_vocabulary import byte_letter, overlapping, vocabulary_metadata
from steelyard.model.headers import scan_gguf
from steelyard.model.identity import subject_of
from steelyard.model.importer import import_model
from steelyard.model.tokenizer import Tokenizer

pytest.importorskip("torch")
pytest.importorskip("gguf")
pytest.importorskip("tokenizers")


def export(folder: Path, files: dict[str, bytes], rows: int | None = None) -> Path:
    """A tiny model with these tokenizer files, exported beside its folder."""
    parts = json.loads(files["tokenizer.json"])
    rows = rows or len(parts["model"]["vocab"].keys() | {token["content"] for token in parts["added_tokens"]})
    config = CONFIG | {"vocab_size": rows}
    write_folder(folder / "model", config=config, weights=random_weights(config), files=files)
    return export_gguf(folder / "model", folder / "m.gguf", "BF16").path


def assert_llama_cpp_reads_the_same(gguf: Path, folder: Path, texts: list[str]) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="the oracle: pip install 'steelyard[oracle]'")
    oracle, tokenizer = llama_cpp.Llama(str(gguf), vocab_only=True, verbose=False), Tokenizer.load(folder)
    for special in (False, True):
        for text in texts:
            expected = tokenizer.encode(text, bos=False, special=special)
            assert oracle.tokenize(text.encode(), add_bos=False, special=special) == expected, ascii(text)
    assert oracle._model.add_bos_token() == tokenizer.adds_bos
    # BOS of a tokenizer without one is no matter
    assert tokenizer.bos_id in (None, oracle.token_bos())
    vocabulary = oracle._model.vocab
    assert all(llama_cpp.llama_vocab_is_eog(vocabulary, number) for number in tokenizer.eos_ids)


SPECIAL_TEXTS = ["<|end|> b<|open|>", "a<|end|>", "<s>x</s>", "<unk> a", "<0x0A>", "", " ", "  a", "\n", "don't 12345"]
SPLITS = {
    "words": "gpt-2", "words, written out": "gpt-2", "digits": "smollm", "digits as pattern": "smollm",
    "llama3": "llama-bpe", "llama3 by removal": "llama-bpe", "qwen2": "qwen2",
}  # fmt: skip


@pytest.mark.oracle
@pytest.mark.parametrize("split", SPLITS)
def test_pre_tokenizer_is_found_by_its_structure(split: str, tmp_path: Path) -> None:
    gguf = export(tmp_path, tokenizer_files(byte_level_backend(split)))
    assert scan_gguf(gguf).metadata["tokenizer.ggml.pre"] == SPLITS[split]
    assert_llama_cpp_reads_the_same(gguf, tmp_path / "model", strings(200, seed=31) + SPECIAL_TEXTS)


@pytest.mark.oracle
def test_a_tokenizer_trained_from_nothing(tmp_path: Path) -> None:
    """The one that `train.tokenizer` makes, with its beginning of text and its two ends."""
    trained = pytest.importorskip("steelyard.train.tokenizer")
    size = trained.train_tokenizer(strings(300, seed=7), tmp_path / "tokenizer", vocab_size=400, max_length=256)
    files = {path.name: path.read_bytes() for path in (tmp_path / "tokenizer").iterdir()}
    gguf = export(tmp_path, files, rows=size + 3)
    found = scan_gguf(gguf).metadata
    assert found["tokenizer.ggml.pre"] == trained.PRE
    assert found["tokenizer.chat_template"] == trained.CHAT_TEMPLATE
    texts = [*strings(200, seed=32), "<|im_start|>user\nHi 123<|im_end|>\n", *SPECIAL_TEXTS]
    assert_llama_cpp_reads_the_same(gguf, tmp_path / "model", texts)


def sentencepiece_files(folder: Path, **more: Any) -> dict[str, bytes]:
    """The tokenizer files of an imported model of the SentencePiece family."""
    metadata = sentencepiece_metadata(**more) | {"tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    config = CONFIG | {"vocab_size": len(metadata["tokenizer.ggml.tokens"])}
    source = write_gguf(folder / "source.gguf", config=config, tokenizer=metadata)
    import_model(source, folder / "imported", progress=Silent())
    return {
        path.name: path.read_bytes()
        for path in (folder / "imported").iterdir()
        if path.name not in ("config.json", "model.safetensors")
    }


@pytest.mark.oracle
@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_family(prefix: bool, tmp_path: Path) -> None:
    files = sentencepiece_files(tmp_path, add_space_prefix=prefix)
    gguf = export(tmp_path, files)
    assert_llama_cpp_reads_the_same(gguf, tmp_path / "model", strings(200, seed=33) + SPECIAL_TEXTS)
    export_gguf(tmp_path / "imported", tmp_path / "again.gguf", "BF16")
    import_model(tmp_path / "again.gguf", tmp_path / "back", progress=Silent())
    assert subject_of(tmp_path / "back") == subject_of(tmp_path / "imported")


@pytest.mark.oracle
def test_sentencepiece_family_with_metaspace(tmp_path: Path) -> None:
    """The spelling of newer converters: the pre-tokenizer turns spaces into bars, nothing is put before."""

    def metaspace(parts: dict[str, Any]) -> None:
        parts["normalizer"] = None
        parts["pre_tokenizer"] = {
            "type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False,
        }  # fmt: skip

    gguf = export(tmp_path, changed(sentencepiece_files(tmp_path, add_space_prefix=False), metaspace))
    assert_llama_cpp_reads_the_same(gguf, tmp_path / "model", strings(200, seed=34))


def changed(files: dict[str, bytes], change: Callable[[dict[str, Any]], None]) -> dict[str, bytes]:
    parts = json.loads(files["tokenizer.json"])
    change(parts)
    return files | {"tokenizer.json": json.dumps(parts).encode()}


def put(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(parts: dict[str, Any]) -> None:
        inner: Any = parts
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return change


def add(content: str, **flags: Any) -> Callable[[dict[str, Any]], None]:
    def change(parts: dict[str, Any]) -> None:
        number = len(parts["model"]["vocab"])
        parts["model"]["vocab"][content] = number
        entry = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        parts["added_tokens"].append({"id": number, "content": content} | entry | flags)

    return change


def both(*changes: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    def change(parts: dict[str, Any]) -> None:
        for one in changes:
            one(parts)

    return change


def ends_texts(parts: dict[str, Any]) -> None:
    end = {"SpecialToken": {"id": "<|end|>", "type_id": 0}}
    pieces = [{"Sequence": {"id": "A", "type_id": 0}}, end]
    parts["post_processor"] = {
        "type": "TemplateProcessing", "single": pieces, "pair": pieces,
        "special_tokens": {"<|end|>": {"id": "<|end|>", "ids": [0], "tokens": ["<|end|>"]}},
    }  # fmt: skip


def without_letter(parts: dict[str, Any]) -> None:
    vocab = parts["model"]["vocab"]
    vocab["removed"] = vocab.pop("A")
    parts["model"]["merges"] = []


DIGITS = ("pre_tokenizer", "pretokenizers", 0)
BYTE_LEVEL_REFUSED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "another model": (
        put("model", value={"type": "Unigram", "unk_id": 0, "vocab": [["<|end|>", 0.0], ["<|open|>", 0.0]]}),
        "model: is 'Unigram': BPE is exported",
    ),
    "dropout": (put("model", "dropout", value=0.1), r"model\.dropout: is 0\.1"),
    "normal form": (put("normalizer", value={"type": "NFC"}), "normalizer: NFC has no place"),
    "digits in runs": (put(*DIGITS, "individual_digits", value=False), "the step .*Digits.* is not one"),
    "another splitting": (
        put(*DIGITS, value={"type": "Split", "pattern": {"Regex": "[aeiou]"}, "behavior": "Isolated", "invert": False}),
        r"splits as \('\[aeiou\]',\) and then into words, ignore_merges False: llama.cpp has no name for it",
    ),
    "a pattern merged with what follows": (
        put(*DIGITS, value={"type": "Split", "pattern": {"Regex": "x"}, "behavior": "MergedWithNext", "invert": False}),
        "MergedWithNext",
    ),
    "llama3's merges on another splitting": (put("model", "ignore_merges", value=True), "ignore_merges True"),
    "a space before": (put("pre_tokenizer", "pretokenizers", 1, "add_prefix_space", value=True), "add_prefix_space"),
    "another decoder": (put("decoder", value={"type": "Fuse"}), "decoder: must be ByteLevel"),
    "a byte without a token": (without_letter, "no token for the byte 0x41"),
    "a token that takes spaces along": (add("<|x|>", lstrip=True), r"added_tokens: '<\|x\|>': lstrip"),
    "a token of whole words only": (add("<|x|>", single_word=True), "single_word"),
    "tokens that overlap": (both(add("ab"), add("bcd")), "'ab' and 'bcd' may overlap"),
    "an end that is no special token": (put("added_tokens", 0, "special", value=False), "eos_token: is not a special"),
    "texts that end themselves": (ends_texts, r"post_processor: adds the tokens \["),
}  # fmt: skip


@pytest.mark.parametrize("case", BYTE_LEVEL_REFUSED)
def test_what_llama_cpp_would_read_otherwise_is_refused(case: str, tmp_path: Path) -> None:
    change, reason = BYTE_LEVEL_REFUSED[case]
    for name, data in changed(tokenizer_files(byte_level_backend()), change).items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(FormatError, match=reason) as refusal:
        vocabulary_metadata(tmp_path, 500)
    assert str(tmp_path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def other_space(parts: dict[str, Any]) -> None:
    parts["normalizer"]["normalizers"][0]["prepend"] = "_"


def drop_merge(parts: dict[str, Any]) -> None:
    del parts["model"]["merges"][5]


def ranked_apart(parts: dict[str, Any]) -> None:
    """Two pairs that spell one token, with another merge between them."""
    merges = parts["model"]["merges"]
    made = [left + right for left, right in merges]
    first = next(rank for rank, token in enumerate(made) if rank and made[rank - 1] == token)
    merges.append(merges.pop(first))


SENTENCEPIECE_REFUSED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "another space": (other_space, "normalizer and pre_tokenizer: .* known are spaces made"),
    "spaces split": (
        put("pre_tokenizer", value={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}),
        "normalizer and pre_tokenizer",
    ),
    "another decoder": (put("decoder", value={"type": "Fuse"}), "does not undo the normalizer"),
    "a pair that is not merged": (drop_merge, "model.merges: lacks .*, which llama.cpp would merge"),
    "pairs ranked apart": (ranked_apart, "ranks the pairs that spell .* apart"),
    "words taken whole": (put("model", "ignore_merges", value=True), r"model\.ignore_merges"),
    "a normalized token": (add("<|x|>", normalized=True), "normalized has no place"),
}


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return sentencepiece_files(tmp_path_factory.mktemp("sentencepiece"))


@pytest.mark.parametrize("case", SENTENCEPIECE_REFUSED)
def test_what_sentencepiece_would_not_do_is_refused(case: str, sentencepiece: dict[str, bytes], tmp_path: Path) -> None:
    change, reason = SENTENCEPIECE_REFUSED[case]
    for name, data in changed(sentencepiece, change).items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(FormatError, match=reason):
        vocabulary_metadata(tmp_path, 6000)


def test_a_template_without_the_beginning_of_text(tmp_path: Path) -> None:
    """llama.cpp would put one before the conversation, and the folder would not."""
    files = tokenizer_files(byte_level_backend(), template="{{ messages[0].content }}", add_bos_token=True)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(FormatError, match=r"jinja: does not begin with '<\|open\|>', which the tokenizer adds"):
        vocabulary_metadata(tmp_path, 400)
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    assert vocabulary_metadata(tmp_path, 400)["tokenizer.ggml.add_bos_token"] is True


def test_rows_without_a_token_get_names_that_nothing_else_has(tmp_path: Path) -> None:
    for name, data in changed(tokenizer_files(byte_level_backend()), add("[PAD402]")).items():
        (tmp_path / name).write_bytes(data)
    found = vocabulary_metadata(tmp_path, 404)
    assert found["tokenizer.ggml.tokens"][400:] == ["[PAD402]", "[PAD401]", "[PAD402]]", "[PAD403]"]
    assert found["tokenizer.ggml.token_type"][400:] == [3, 5, 5, 5]


def test_byte_letters_are_the_librarys() -> None:
    from tokenizers import pre_tokenizers

    assert sorted(map(byte_letter, range(256))) == sorted(pre_tokenizers.ByteLevel.alphabet())
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in ("ab \n\t~\x7f", "é¡ÿ北", *WORDS):
        ((letters, _),) = splitter.pre_tokenize_str(text)
        assert letters == "".join(byte_letter(byte) for byte in text.encode())


@pytest.mark.parametrize(
    ("texts", "clash"),
    [
        (["<a>", "<b>", "<ab>"], None), (["  ", "    ", "   "], None), (["ab", "bcd"], ("ab", "bcd")),
        (["abc", "cd"], None), (["ab", "ba"], ("ba", "ab")), (["xx", "x"], None),
    ],
)  # fmt: skip
def test_overlaps(texts: list[str], clash: tuple[str, str] | None) -> None:
    """Only a text as long or longer that begins inside another is taken first by one side and not by the other."""
    assert overlapping(texts) == clash
