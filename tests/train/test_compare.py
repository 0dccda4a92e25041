"""Bits per byte: the model's windows count every token once, and the rivals are what they say they are."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
import pytest

from steelyard.base.errors import SteelyardError, UsageError

pytest.importorskip("torch")
pytest.importorskip("tokenizers")
import torch

from steelyard.corpus.shards import Shards, write_shards
from steelyard.corpus.text import Document
from steelyard.inference.endpoint import Message
from steelyard.model.llama import Llama, LlamaConfig
from steelyard.model.tokenizer import Tokenizer
from steelyard.train.compare import _windows, compare, compressed_bits, model_bits
from steelyard.train.made_conversations import made_conversations
from steelyard.train.tokenizer import train_tokenizer

TEXTS = [f"The {c} cat sat on the mat and looked at the {c} dog for a while. " * (1 + i) for i, c in
         enumerate(["red", "blue", "green", "old", "young"])]  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    folder = tmp_path_factory.mktemp("c")
    train_tokenizer(TEXTS, folder / "t", vocab_size=300, max_length=64)
    write_shards(TEXTS, Tokenizer.load(folder / "t"), folder / "s")
    return Shards.open(folder / "s")


def tiny(vocab: int) -> Llama:
    config = LlamaConfig(vocab, 16, 32, 2, 2, 2, 8, max_position_embeddings=512)
    return Llama(config).initialise(1).requires_grad_(False)


def test_windows_count_every_token_once() -> None:
    lengths = [1, 2, 7, 8, 9, 30, 100]
    for window in (2, 3, 8, 64):
        counted: dict[int, list[int]] = {sample: [] for sample in range(len(lengths))}
        for sample, start, end, first in _windows(lengths, window):
            assert end - start <= window
            assert start < first
            assert first == 1 or first - start >= window // 2  # half a window of context
            counted[sample] += range(first, end)
        assert counted == {sample: list(range(1, length)) for sample, length in enumerate(lengths)}


def test_the_models_bits_are_its_cross_entropy(shards: Shards) -> None:
    model = tiny(300)
    expected = 0.0
    for sample, length in enumerate(shards.lengths.tolist()):
        tokens = torch.from_numpy(shards.tokens(sample, 0, length))
        logits = torch.log_softmax(model(tokens[None, :-1])[0].double(), -1)
        expected -= float(logits.gather(1, tokens[1:, None]).sum()) / math.log(2)
    assert model_bits(model, shards, window=512) == pytest.approx(expected, rel=1e-5)
    shorter = model_bits(model, shards, window=16)
    assert shorter != pytest.approx(expected, rel=1e-6)
    assert shorter == pytest.approx(expected, rel=0.05)


def test_what_does_not_fit_is_refused(shards: Shards) -> None:
    with pytest.raises(UsageError, match="512 positions"):
        model_bits(tiny(300), shards, window=513)
    with pytest.raises(SteelyardError, match="another tokenizer"):
        model_bits(tiny(200), shards, window=16)


def test_a_table_of_all_methods(shards: Shards) -> None:
    texts = ("\n\n".join(TEXTS).encode(), "\n\n".join(TEXTS).encode())
    table = compare(tiny(300), shards, shards, texts, window=64)
    assert [m.bits_per_byte for m in table] == sorted(m.bits_per_byte for m in table)
    found = {m.name: m.bits_per_byte for m in table}
    assert len(found) == 5
    size = shards.manifest.bytes
    assert found["gzip -9"] == pytest.approx(8 * len(gzip.compress(texts[1], 9)) / size)
    assert found["xz -9e after the training text"] < found["xz -9e"] / 4  # it has seen the very text
    assert found["modified Kneser-Ney 5-gram"] < 0.2
    ours = next(value for name, value in found.items() if name.startswith("this model (0.0M)"))
    assert ours == pytest.approx(model_bits(tiny(300), shards, window=64) / size)
    assert [m.name for m in table if not m.rival] == ["xz -9e after the training text"]
    with pytest.raises(UsageError, match="dictionary"):
        compressed_bits(bytes(64 << 20), b"x")


def test_conversations_are_made_of_the_documents_own_words() -> None:
    story = " ".join(f"Sentence number {n} tells of a cat." for n in range(40))
    entries = (
        "mod\n\nA module that does many things well.\n\n\nmod.f\n\nReturn the first thing.\n\nMore.\n\n\nmod.g\n\nno"
    )
    documents = [Document("s", "a", story), Document("p", "b", entries), Document("s", "c", "Too short.")]
    made = list(made_conversations(documents))
    said = [turn.content for talk in made for turn in talk.messages if turn.role == "assistant"]
    assert "A module that does many things well." in said
    assert "Return the first thing." in said
    words = story.split()
    own = [answer for answer in said if answer.startswith("Sentence")]
    assert len(own) >= 6
    assert all(" ".join(words).find(answer) >= 0 for answer in own)
    assert any(len(talk.messages) == 4 for talk in made)
    for talk in made:
        assert [turn.role for turn in talk.messages] == ["user", "assistant"] * (len(talk.messages) // 2)
        assert all(isinstance(turn, Message) and turn.content.strip() for turn in talk.messages)
    assert list(made_conversations(documents, most=3)) == made[:3]
    assert np.array_equal([len(t.messages) for t in made_conversations(documents)], [len(t.messages) for t in made])


def test_a_page_of_everything(tmp_path: Path, shards: Shards) -> None:
    from steelyard.train.scratch_report import Report, bits_curve, write_html

    counts = {"tokens": 1100, "documents": 100, "bytes": 4000}
    text = {part: {"<source>": {"documents": 1, "bytes": 2}} for part in ("train", "validation")}
    curve = [{"tokens": 10 * n, "loss": 1.0, **({"validation_loss": 8.0 / n} if n % 2 else {})} for n in range(1, 8)]
    rows = [{"name": name, "bits_per_byte": b, "given": "<x>"} for name, b in (("this model", 1.0), ("gzip -9", 2.0))]
    report = Report("n<", rows, text, {"validation": counts}, {"steps": 3}, None, curve,
                    [{"kind": "continues", "prompt": "<p>", "text": "<t>", "finish": "stop"}])  # fmt: skip
    assert bits_curve(report)[0] == (10, pytest.approx(8.0 / math.log(2) / 4))
    write_html(report, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert all(raw not in page for raw in ("<source>", "<x>", "<p>,", "<t>"))
    assert "polyline" in page
    assert "http" not in page.replace("http-equiv", "")
