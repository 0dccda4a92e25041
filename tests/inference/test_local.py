"""The local endpoint over a real folder whose model says known words."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from steelyard.base.errors import SteelyardError, UsageError
from steelyard.inference.endpoint import Endpoint, Message, Request, Sampling
from steelyard.inference.local import LocalEndpoint
from steelyard.model.formats import save_folder
from steelyard.model.llama import Llama

SuccessorModel = Callable[[int, Mapping[int, int]], Llama]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
END, ASSISTANT, START = 256, 257, 258


@pytest.fixture
def folder(tmp_path: Path, successor_model: SuccessorModel) -> Callable[[str], Path]:
    """Makes a folder of a byte-level tokenizer and a model that answers `text` (no byte twice) and then ends."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    backend.add_special_tokens(["<e>", "<a>", "<s>"])

    def make(text: str) -> Path:
        tokens = backend.encode(text).ids
        assert len(set(tokens)) == len(tokens)
        model = successor_model(259, dict(zip([ASSISTANT, *tokens], [*tokens, END], strict=True)))
        config = {
            "model_type": "llama",
            "vocab_size": 259,
            "hidden_size": 260,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "head_dim": 2,
            "max_position_embeddings": 64,
        }
        files = {
            "tokenizer.json": backend.to_str().encode(),
            "tokenizer_config.json": json.dumps({"eos_token": "<e>", "bos_token": "<s>"}).encode(),
            "generation_config.json": json.dumps({"eos_token_id": END}).encode(),
            "chat_template.jinja": TEMPLATE.encode(),
        }
        save_folder(tmp_path / "model", config, model.state_dict(), files)
        return tmp_path / "model"

    return make


def ask(text: str, name: str = "q", **sampling: int | tuple[str, ...]) -> Request:
    return Request(name, (Message("user", text),), Sampling(**{"max_tokens": 40, **sampling}))  # type: ignore[arg-type]


def test_answers_whole_without_stop_tokens_and_strings(folder: Callable[[str], Path]) -> None:
    endpoint: Endpoint = LocalEndpoint.open(folder("Così→27 kg!"))
    whole, cut, short, early = endpoint.generate(
        [ask("a"), ask("b", "r", stop=("27", "kg")), ask("c", max_tokens=2), ask("d", stop=("absent", " k"))]
    )
    assert (whole.id, whole.text, whole.finish) == ("q", "Così→27 kg!", "stop")
    assert whole.tokens is not None
    assert whole.tokens[-1] == END
    assert whole.prompt_tokens is not None
    assert whole.prompt_tokens[-1] == ASSISTANT
    assert (cut.id, cut.text, cut.finish) == ("r", "Così→", "stop")
    assert (short.text, short.finish) == ("Co", "length")
    assert (early.text, early.finish) == ("Così→27", "stop")


def test_a_character_cut_by_max_tokens_is_left_out_whole(folder: Callable[[str], Path]) -> None:
    endpoint = LocalEndpoint.open(folder("a→é"))  # 1, 3 and 2 bytes: a token each
    texts = [endpoint.generate([ask("x", max_tokens=n)])[0].text for n in range(1, 8)]
    assert texts == ["a", "a", "a", "a→", "a→", "a→é", "a→é"]


def test_identity_names_what_changes_rounding(folder: Callable[[str], Path]) -> None:
    place = folder("ab")
    before = torch.get_num_threads()
    try:
        endpoint = LocalEndpoint.open(place, dtype="bfloat16", threads=1)
        assert endpoint.identity() == {
            "kind": "local",
            "device": "cpu",
            "dtype": "bfloat16",
            "threads": 1,
            "torch": torch.__version__,
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "rows": 128,
            "cache_bytes": (128 * 4 + 1) * endpoint.engine.page_bytes,  # all that 128 contexts of 64 tokens need
            "prefill_tokens": 4096,
            "kernels": endpoint.engine.kernels,
        }
    finally:
        torch.set_num_threads(before)
    json.dumps(endpoint.identity())
    assert LocalEndpoint.open(place).identity()["dtype"] == "float32"
    with pytest.raises(UsageError, match="int3"):
        LocalEndpoint.open(place, dtype="int3")
    with pytest.raises(UsageError, match="threads 0"):
        LocalEndpoint.open(place, threads=0)


def test_errors_name_the_request(folder: Callable[[str], Path]) -> None:
    endpoint = LocalEndpoint.open(folder("ab"))
    with pytest.raises(SteelyardError, match="request long-one: 21 prompt tokens"):
        endpoint.generate([ask("a"), ask("b" * 20, "long-one", max_tokens=60)])
    with pytest.raises(SteelyardError, match="request nothing: "):
        endpoint.generate([ask("a"), Request("nothing", ())])


def test_check_finds_the_completion_it_gave(folder: Callable[[str], Path]) -> None:
    endpoint = LocalEndpoint.open(folder("abc"))
    request = ask("x")
    tokens = endpoint.generate([request])[0].tokens
    assert tokens is not None
    assert endpoint.check(request, tokens) == [0.0] * 4
    assert endpoint.check(request, [tokens[0], tokens[2]])[1] > 0.5
