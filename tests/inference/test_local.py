"""The local endpoint over a real folder whose model says known words."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from steelyard.base.errors import SteelyardError, UsageError
from steelyard.base.progress import Silent
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


def test_streams_what_it_would_generate_in_whole_characters(folder: Callable[[str], Path]) -> None:
    endpoint = LocalEndpoint.open(folder("Così→27 kg!"))
    for request in (
        ask("a"),
        ask("b", stop=("27 kilo", "kg")),
        ask("c", max_tokens=6),
        ask("d", stop=("absent", " k")),
    ):
        pieces = list(endpoint.stream(request))
        assert "".join(pieces) == endpoint.generate([request])[0].text
        assert all(pieces)
        assert "\ufffd" not in "".join(pieces)
    assert list(endpoint.stream(ask("a")))[:4] == ["C", "o", "s", "ì"]
    stream = endpoint.stream(ask("a"))
    assert next(stream) == "C"
    with pytest.raises(SteelyardError, match="serving other requests"):
        endpoint.generate([ask("b")])
    stream.close()  # type: ignore[attr-defined]
    assert endpoint.engine.idle
    both = [endpoint.stream(ask("a")), endpoint.stream(ask("b", max_tokens=3))]
    assert [next(both[0]), next(both[1]), next(both[0]), *both[1], *both[0]][-4:] == [" ", "k", "g", "!"]
    with pytest.raises(SteelyardError, match="request long-one"):
        next(endpoint.stream(ask("b", "long-one", max_tokens=90)))


def test_logprobs_of_text(folder: Callable[[str], Path]) -> None:
    endpoint = LocalEndpoint.open(folder("aé"))
    plain, asked = endpoint.generate([ask("x"), ask("x", logprobs=2)])
    assert plain.logprobs is None
    assert asked.logprobs is not None
    assert [each.chosen.text for each in asked.logprobs] == ["a", "\ufffd", "\ufffd", "<e>"]
    assert [each.chosen.token for each in asked.logprobs] == list(asked.tokens or ())
    assert all(each.top[0] == each.chosen and len(each.top) == 2 for each in asked.logprobs)


def test_the_cache_is_stated_before_the_start(folder: Callable[[str], Path]) -> None:
    class Said(Silent):
        lines: ClassVar[list[str]] = []

        def say(self, text: str) -> None:
            self.lines.append(text)

    place = folder("ab")
    endpoint = LocalEndpoint.open(place, rows=2, cache_bytes=2**12, progress=Said())
    assert endpoint.identity()["cache_bytes"] == 2304
    assert Said.lines == [
        "key/value cache: up to 0 MiB (cache_bytes) for 128 tokens; up to 2 requests at a time (rows)"
    ]
    with pytest.raises(UsageError, match="cache_bytes 10: one page of 16 tokens takes"):
        LocalEndpoint.open(place, cache_bytes=10)


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
    assert LocalEndpoint.open(place, dtype="int8").identity()["dtype"] == "int8"
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
