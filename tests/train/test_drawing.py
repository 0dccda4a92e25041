"""Kept answers: what a file holds is not drawn again, and nothing else is taken from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from training_runs import Reported

from steelyard.base.progress import Silent
from steelyard.inference.endpoint import Completion, Message, Request, Sampling
from steelyard.train.drawing import KeptAnswers


class Counting:
    """An endpoint that says what it was asked how often."""

    def __init__(self) -> None:
        self.asked = 0

    def identity(self) -> dict[str, Any]:
        return {"kind": "local"}

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        self.asked += len(requests)
        return [Completion(r.id, f"é {r.seed} {r.sampling.max_tokens}\n", "stop", None, (1,)) for r in requests]


def request(text: str = "Hi", seed: int = 0, **sampling: Any) -> Request:
    return Request(f"{text}/{seed}", (Message("user", text),), Sampling(**sampling), seed)


def test_a_file_gives_what_it_holds_and_opens_no_model_for_it(tmp_path: Path) -> None:
    path, endpoint = tmp_path / "a" / "answers.jsonl", Counting()
    asked = [request(seed=seed) for seed in range(3)]
    first = KeptAnswers(path, "m", lambda: endpoint, Silent()).generate(asked)

    def refuse() -> Counting:
        raise AssertionError("opened")

    said = Reported()
    assert KeptAnswers(path, "m", refuse, said).generate(asked[::-1]) == first[::-1]
    assert said.lines == [f"{path}: holds 3 answers drawn before; they are not drawn again"]


@pytest.mark.parametrize(
    ("model", "other"),
    [
        ("n", request()),
        ("m", request("Ho")),
        ("m", request(seed=1)),
        ("m", request(max_tokens=3)),
        ("m", Request("Hi/0", "Hi")),
    ],
)
def test_another_model_prompt_or_setting_is_drawn(tmp_path: Path, model: str, other: Request) -> None:
    path, endpoint = tmp_path / "answers.jsonl", Counting()
    KeptAnswers(path, "m", lambda: endpoint, Silent()).generate([request()])
    KeptAnswers(path, model, lambda: endpoint, Silent()).generate([other, request()][: 1 if model == "n" else 2])
    assert endpoint.asked == 2


@pytest.mark.parametrize("damage", [b"", b"{}\n", b"[1]\n", b'{"key": 1, "text": "", "finish": "stop"}\n', b"\xff\n"])
@pytest.mark.parametrize("keep", [True, False])
def test_a_line_that_is_not_whole_is_drawn_again(tmp_path: Path, damage: bytes, keep: bool) -> None:
    path, endpoint = tmp_path / "answers.jsonl", Counting()
    asked = [request(seed=seed) for seed in range(3)]
    KeptAnswers(path, "m", lambda: endpoint, Silent()).generate(asked)
    cut = damage + path.read_bytes()[:-1]
    path.write_bytes(cut)
    found = KeptAnswers(path, "m", lambda: endpoint, Silent(), keep=keep).generate(asked)
    assert [one.text for one in found] == [f"é {seed} 64\n" for seed in range(3)]
    assert endpoint.asked == 4
    assert (path.read_bytes() == cut) is not keep
    if keep:
        KeptAnswers(path, "m", lambda: endpoint, Silent()).generate(asked)
        assert endpoint.asked == 4
