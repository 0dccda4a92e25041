"""Pretraining's own checks, and a folder that is read back as it was trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steelyard.base.errors import FormatError, UsageError
from steelyard.base.progress import Silent

pytest.importorskip("torch")
pytest.importorskip("tokenizers")
import torch

from steelyard.corpus.shards import Shards, write_shards
from steelyard.model.identity import subject_of
from steelyard.model.llama import load_llama
from steelyard.model.tokenizer import Tokenizer
from steelyard.train.options import TrainOptions
from steelyard.train.pretrain import Packing, new_model, pretrain, save_pretrained
from steelyard.train.tokenizer import train_tokenizer

TEXTS = [f"The {number % 7} cats sat on {number % 5} mats and looked at the dog." for number in range(80)]
SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Shards]:
    folder = tmp_path_factory.mktemp("p")
    train_tokenizer(TEXTS, folder / "t", vocab_size=300, max_length=64)
    write_shards(TEXTS, Tokenizer.load(folder / "t"), folder / "s")
    return folder / "t", Shards.open(folder / "s")


@pytest.mark.parametrize("kind", ["concatenated", "best_fit"])
@pytest.mark.parametrize("tied", [True, False])
def test_it_learns_and_is_read_back(tmp_path: Path, data: tuple[Path, Shards], kind: str, tied: bool) -> None:
    tokenizer, shards = data
    model = new_model(SHAPE | {"tie_word_embeddings": tied}, tokenizer, 0)
    options = TrainOptions(steps=25, learning_rate=1e-2, warmup=2, dtype="float32", compile="off", evaluate_every=12)
    packing = Packing(kind, 32, 4)  # type: ignore[arg-type]
    found = pretrain(model, tokenizer, shards, shards, packing, options, tmp_path / "w", progress=Silent())
    assert found.validation_loss is not None
    assert found.validation_loss < 3.5  # ln(300) is 5.7
    save_pretrained(model, tokenizer, tmp_path / "m")
    again = load_llama(tmp_path / "m")
    tokens = torch.from_numpy(shards.tokens(0, 0, 12))[None]
    rounded = model.to(torch.bfloat16).eval()
    assert torch.equal(again(tokens), rounded(tokens))
    assert subject_of(tmp_path / "m", Silent()).digest  # a folder that a release can name
    assert Tokenizer.load(tmp_path / "m").eos_ids == {1, 4}


def test_the_start_is_a_guess_and_depth_does_not_blow_it_up(data: tuple[Path, Shards]) -> None:
    model = new_model(SHAPE | {"num_hidden_layers": 12}, data[0], 3)
    layer = model.model.layers[0]
    small, large = (float(w.detach().std()) for w in (layer.self_attn.o_proj.weight, layer.self_attn.q_proj.weight))  # type: ignore[union-attr]
    assert small == pytest.approx(large / 24**0.5, rel=0.1)
    loss = torch.nn.functional.cross_entropy(model(torch.arange(60)[None])[0], torch.arange(1, 61))
    assert float(loss) == pytest.approx(5.70, abs=0.2)


def test_what_does_not_belong_together_is_refused(tmp_path: Path, data: tuple[Path, Shards]) -> None:
    tokenizer, shards = data
    train_tokenizer(TEXTS[:5], tmp_path / "other", vocab_size=280, max_length=64)
    options = TrainOptions(steps=1)
    model = new_model(SHAPE, tokenizer, 0)
    with pytest.raises(UsageError, match="made with another tokenizer"):
        pretrain(model, tmp_path / "other", shards, None, Packing("best_fit", 16, 1), options, tmp_path / "w",
                 progress=Silent())  # fmt: skip
    with pytest.raises(UsageError, match="rows of 65 tokens, but the model has 64 positions"):
        pretrain(model, tokenizer, shards, None, Packing("concatenated", 65, 1), options, tmp_path / "w",
                 progress=Silent())  # fmt: skip
    with pytest.raises(FormatError, match="hidden_size"):
        new_model(SHAPE | {"hidden_size": 33}, tokenizer, 0)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({"num_key_value_head": 1}, r"s\.json: num_key_value_head: .* did you mean num_key_value_heads\?"),
        ({"colour": 1}, r"s\.json: colour: no LLaMA has such a size: remove it"),
        (
            {"rope_parameters": {"rope_tehta": 5e5}},
            r"s\.json: rope_parameters: rope_tehta: .* did you mean rope_theta\?",
        ),
        ({"hidden_size": 33}, r"s\.json: hidden_size"),
        ({"vocab_size": 7}, r"s\.json: vocab_size = 7: the tokenizer .* has \d+: leave it out"),
    ],
)
def test_a_size_that_would_be_ignored_is_refused(
    data: tuple[Path, Shards], shape: dict[str, object], said: str
) -> None:
    with pytest.raises(FormatError, match=said):
        new_model(SHAPE | shape, data[0], 0, "s.json")


def test_a_whole_config_is_a_shape(tmp_path: Path, data: tuple[Path, Shards]) -> None:
    model = new_model(SHAPE, data[0], 0)
    save_pretrained(model, data[0], tmp_path / "m")
    again = new_model(json.loads((tmp_path / "m" / "config.json").read_text()), data[0], 0)
    assert again.config == model.config
