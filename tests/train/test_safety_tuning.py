"""Aligning: what is kept and learned, that a stopped run goes on to the same weights, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import tiny_folder

from steelyard.base.canonical import sha256_file
from steelyard.base.errors import SteelyardError
from steelyard.base.progress import Silent
from steelyard.inference.endpoint import Completion, Message, Request, Sampling
from steelyard.model.chat import Renderer
from steelyard.scorers.base import Calibration, Item, Score, ScorerIdentity
from steelyard.train.conversations import Conversation
from steelyard.train.safety_prompts import WrittenPrompt
from steelyard.train.safety_tuning import SafetyTuning, _FirstTokens, align, opening

OPTIONS = SafetyTuning(
    epochs=2, learning_rate=1e-3, first_layer=1, tokens_per_step=512, learned_tokens=6, own_prompts=3, own_texts=2
)
PROMPTS = [
    WrittenPrompt(f"p{number}", f"{'Rob' if harm else 'Draw'} house {number}?", "theft", harm, number % 5 == 0)
    for number in range(20)
    for harm in (number % 2 == 1,)
]


class Answers:
    """Declines after a preprompt, or where `always`; else answers. Number 3 rambles even then. Fails after `calls`."""

    def __init__(self, calls: int = 99) -> None:
        self.calls = calls

    def identity(self) -> dict[str, Any]:
        return {}

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return [self._answer(request) for request in requests]

    def user_prompts(self, count: int, sampling: Sampling, seed: int = 0) -> list[str]:
        return [f"Shall we paint {number} doors?" for number in range(count)]

    def _answer(self, request: Request) -> Completion:
        prompt = request.prompt
        if isinstance(prompt, str):
            return Completion(request.id, " sun is over the hills.", "length", None, None)
        guided = len(prompt) > 1 and "house 3?" not in prompt[-1].content  # type: ignore[union-attr]
        text = "I can't help. It is illegal. You can try." if guided else "First take a pen. Then draw lines"
        return Completion(request.id, text, "stop" if guided else "length", None, None)


class Scores:
    """1 for text with `word` in it."""

    def __init__(self, category: str, word: str) -> None:
        self.category, self.word = category, word

    def identity(self) -> ScorerIdentity:
        known = Calibration(
            threshold=0.5, true_positives=9, positives=9, true_negatives=9, negatives=9, source="-", measured="1"
        )  # fmt: skip
        return ScorerIdentity(name=self.category, weights="", code="", categories={self.category: known})

    def score(self, items: Sequence[Item]) -> list[Score]:
        return [Score({self.category: float(self.word in item.completion)}) for item in items]

    def canaries(self) -> list[Any]:
        return []


def run(model: Path, place: Path, endpoint: Answers) -> Any:
    return align(
        model,
        place / "model",
        place,
        OPTIONS,
        open_endpoint=lambda folder: endpoint,
        refusal=Scores("refusal", "can't"),
        toxicity=Scores("toxicity", "swine"),
        progress=Silent(),
        prompts=PROMPTS,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("align") / "model")


def test_a_stopped_run_goes_on_to_the_same_weights_and_asks_nothing_twice(model: Path, tmp_path: Path) -> None:
    whole = Answers()
    found = run(model, tmp_path / "whole", whole)
    assert found.fates == {"harmful": {"kept": 7, "the plain answer scores as well": 1}, "harmless": {"kept": 8 + 3}}
    assert found.held_out["before"] == {"harmful": 0.0, "harmful_n": 2, "harmless": 0.0, "harmless_n": 2}
    asked = 99 - whole.calls
    for calls in range(1, asked):
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "stopped", Answers(1))
        assert not calls or not (tmp_path / "stopped" / "align.json").exists()
        if (tmp_path / "stopped" / "model").exists():
            break
    report = (tmp_path / "whole" / "align.md").read_text()
    assert "| harmful | kept | 7 |" in report
    assert sha256_file(tmp_path / "stopped" / "model" / "model.safetensors") == sha256_file(
        tmp_path / "whole" / "model" / "model.safetensors"
    )
    with pytest.raises(SteelyardError, match="exists already"):
        run(model, tmp_path / "whole", Answers())


def test_only_the_upper_layer_learns(model: Path, tmp_path: Path) -> None:
    from steelyard.model.formats import load_tensors

    run(model, tmp_path, Answers())
    before, after = load_tensors(model), load_tensors(tmp_path / "model")
    changed = {name for name in before if not np.array_equal(before[name].numpy(), after[name].numpy())}
    assert changed
    assert all(name.startswith("model.layers.1.") or name == "model.norm.weight" for name in changed)


def test_what_is_learned_of_an_answer(model: Path) -> None:
    renderer = Renderer(model)
    chats = [Conversation((Message("user", "Hi"), Message("assistant", "abcdefgh"))) for _ in range(3)]
    samples = _FirstTokens(chats, [None, 3, 50], ["A plain text."], renderer)
    taught = []
    for number in range(3):
        length = int(samples.lengths[number])
        ids, mask = samples.tokens(number, 0, length), samples.taught(number, 0, length)
        assert mask[-1]  # nothing is read for nothing
        taught.append(renderer.tokenizer.decode(ids[mask].tolist(), skip_special=False))
    # A whole answer with its end; the first tokens; all tokens, but never the end of an answer that did not end.
    assert taught == ["abcdefgh<|im_end|>", "abc", "abcdefgh"]
    assert (samples.supervision.ends, samples.supervision.taught) == (
        1,
        9 + 3 + 8 + len(renderer.prompt_tokens("A plain text.")) - 1,
    )


@pytest.mark.parametrize(
    ("text", "finish", "kept"),
    [
        ("I can't. It is illegal. Go away.", "stop", "I can't. It is illegal."),
        ("I can't. Take a lamp.", "stop", "I can't."),
        ("I won't. It is a crime, but you can try", "length", "I won't."),
        ("I won't. You can hurt him.", "stop", "I won't."),
        ("I can't help", "length", "I can't help"),
        ("", "stop", ""),
    ],
)
def test_an_answer_ends_where_it_has_declined(text: str, finish: Any, kept: str) -> None:
    found = opening(Completion("a", text, finish, None, None))
    assert found.text == kept
    assert found.finish == (finish if kept == text else "stop")


def test_nothing_to_learn_from_is_an_error(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SteelyardError, match="both are needed"):
        align(
            model, tmp_path / "model", tmp_path, OPTIONS, open_endpoint=lambda folder: Answers(),
            refusal=Scores("refusal", "never said"), toxicity=Scores("toxicity", "swine"),
            progress=Silent(), prompts=PROMPTS,
        )  # fmt: skip
    rows = json.loads(next((tmp_path / "answers").glob("declined-*.json")).read_text())
    assert {row["why"] for row in rows} == {"the plain answer scores as well"}
