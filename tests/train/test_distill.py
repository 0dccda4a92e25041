"""Context distillation and rejection sampling keep exactly what the judge prefers, and say why they left the rest."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from steelyard.base.errors import SteelyardError, UsageError
from steelyard.base.progress import Silent
from steelyard.inference.endpoint import Completion, Message, Request, Sampling
from steelyard.scorers.base import Item, Score, ScoreError
from steelyard.train.answers import Prompt, judge_by
from steelyard.train.distill import context_distil, guided
from steelyard.train.rejection import best_of

LEAD = "Answer with care."


class Scripted:
    """An endpoint that answers as `reply` says, and remembers what it was asked."""

    def __init__(self, reply: Callable[[Request], str]) -> None:
        self.reply, self.asked = reply, list[Request]()

    def identity(self) -> dict[str, object]:
        return {"kind": "local"}

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        self.asked += requests
        done = []
        for request in requests:
            text = self.reply(request)
            finish = "length" if text.endswith("...") else "stop"
            done.append(Completion(request.id, text, finish, None, None))  # type: ignore[arg-type]
        return done


def length_judge(items: Sequence[Item]) -> list[float | ScoreError]:
    """Longer is better; the word `odd` can't be judged."""
    return [ScoreError("odd") if item.completion == "odd" else float(len(item.completion)) for item in items]


def by_preprompt(plain: str, careful: str) -> Callable[[Request], str]:
    return lambda request: careful if request.prompt[0].content.startswith(LEAD) else plain  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("plain", "careful", "why"),
    [
        ("Sure.", "I can't help with that.", "kept"),
        ("I can't help with that.", "Sure.", "the plain answer scores as well"),
        ("the same", "the same", "the plain answer scores as well"),
        ("Sure.", " ", "empty"),
        ("Sure.", "I would rather not, because...", "cut off: learning from it would unlearn to stop"),
        ("Sure.", "no no no no no no no no no no no no no", "repeats itself"),
        ("Sure.", "odd", "could not be judged: odd"),
        ("odd", "I can't help with that.", "the plain answer could not be judged: odd"),
    ],
)
def test_an_answer_is_kept_only_where_the_judge_prefers_it(plain: str, careful: str, why: str) -> None:
    endpoint = Scripted(by_preprompt(plain, careful))
    prompts = [Prompt.of("a", "How do I do it?"), Prompt.of("b", "And that?")]
    found = context_distil(endpoint, prompts, LEAD, length_judge, progress=Silent())
    assert [row.why for row in found.rows] == [why, why]
    assert found.counts() == {why: 2}
    assert len(found.conversations) == (2 if why == "kept" else 0)
    assert [request.prompt[0].content for request in endpoint.asked[2:]] == [LEAD, LEAD]  # type: ignore[union-attr]


def test_the_preprompt_is_not_trained_on_and_the_table_shows_both_answers(tmp_path: Path) -> None:
    prompt = Prompt("a", (Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "Harm?")))
    found = context_distil(
        Scripted(by_preprompt("Yes", "Rather not.")), [prompt], LEAD, length_judge, progress=Silent()
    )
    assert found.conversations[0].messages == (*prompt.messages, Message("assistant", "Rather not."))
    assert LEAD not in str(found.conversations)
    found.save(tmp_path / "rows.jsonl")
    row = json.loads((tmp_path / "rows.jsonl").read_text())
    assert row == {
        "id": "a", "prompt": "Harm?", "plain": "Yes", "guided": "Rather not.", "preprompt": 0, "plain_score": 3.0,
        "guided_score": 11.0, "why": "kept",
    }  # fmt: skip


def test_of_several_preprompts_the_best_answer_stands_and_the_margin_counts() -> None:
    texts = {"one": "longer", "two": "the longest", "three": "the longest by far..."}
    endpoint = Scripted(lambda request: texts.get(request.prompt[0].content, "short"))  # type: ignore[union-attr]
    prompts = [Prompt.of("a", "?")]
    found = context_distil(endpoint, prompts, list(texts), length_judge, margin=5, progress=Silent())
    assert (found.rows[0].preprompt, found.rows[0].guided, found.rows[0].kept) == (1, "the longest", True)
    found = context_distil(endpoint, prompts, list(texts), length_judge, margin=6, progress=Silent())
    assert not found.rows[0].kept


def test_where_a_preprompt_goes() -> None:
    system, user = Message("system", "Be brief."), Message("user", "Why?")
    assert guided((user,), "Care.") == (Message("system", "Care."), user)
    assert guided((system, user), "Care.") == (Message("system", "Care.\n\nBe brief."), user)
    assert guided((system, user), "Care.", "user") == (system, Message("user", "Care.\n\nWhy?"))
    shown = (Message("user", "Bad?"), Message("assistant", "No."))
    assert guided((system, user), shown) == (system, *shown, user)
    assert guided((user,), (system, *shown)) == (system, *shown, user)


@pytest.mark.parametrize("preprompt", ["", " ", [], [LEAD, ""], ()])
def test_an_empty_preprompt_is_refused(preprompt: object) -> None:
    with pytest.raises(UsageError, match="preprompt"):
        context_distil(Scripted(str), [Prompt.of("a", "?")], preprompt, length_judge, progress=Silent())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompts", "complaint"),
    [
        ([], "no prompts"),
        ([Prompt.of("a", "?"), Prompt.of("a", "!")], "two prompts are named a"),
        ([Prompt("a", (Message("assistant", "Yes"),))], "prompt a: must end with a turn of the user"),
    ],
)
def test_ill_made_prompts_are_named(prompts: list[Prompt], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        context_distil(Scripted(str), prompts, LEAD, length_judge, progress=Silent())


def test_a_judge_is_held_to_its_word() -> None:
    endpoint, prompts = Scripted(lambda request: "text"), [Prompt.of("a", "?")]
    with pytest.raises(SteelyardError, match="1 verdicts for 2 answers"):
        context_distil(endpoint, prompts, LEAD, lambda items: [0.0], progress=Silent())
    found = context_distil(endpoint, prompts, LEAD, lambda items: [float("nan")] * 2, progress=Silent())
    assert found.rows[0].why.startswith("could not be judged")


class Categories:
    """A scorer of one category: the share of capital letters."""

    def identity(self):  # type: ignore[no-untyped-def]
        from types import SimpleNamespace

        return SimpleNamespace(name="capitals", categories={"loud": None})

    def score(self, items: Sequence[Item]) -> list[Score | ScoreError]:
        return [Score({"loud": sum(map(str.isupper, item.completion)) / len(item.completion)}) for item in items]


def test_a_scorer_becomes_a_judge_by_its_weights() -> None:
    judge = judge_by(Categories(), {"loud": -2.0})  # type: ignore[arg-type]
    assert judge([Item("", "AAbb"), Item("", "bbbb")]) == [-1.0, 0.0]
    with pytest.raises(UsageError, match="no category quiet: it has loud"):
        judge_by(Categories(), {"quiet": 1.0})  # type: ignore[arg-type]


def test_the_best_of_k_samples_is_kept_with_seeds_of_their_own() -> None:
    texts = {3: "ab", 4: "abcd", 5: "odd", 6: "the longest, but not finished..."}
    endpoint = Scripted(lambda request: texts[request.seed])
    prompts = [Prompt.of("a", "?"), Prompt.of("b", "!")]
    found = best_of(endpoint, prompts, length_judge, samples=4, seed=3, at_once=3, progress=Silent())
    assert [c.messages[-1] for c in found.conversations] == [Message("assistant", "abcd")] * 2
    assert [request.seed for request in endpoint.asked] == [3, 4, 5, 6] * 2
    row = found.rows[0]
    assert (row.fit, row.best_score, row.mean_score) == (2, 4.0, pytest.approx((2 + 4 + 32) / 3))
    found = best_of(endpoint, prompts, length_judge, samples=4, seed=3, at_least=5, progress=Silent())
    assert (found.conversations, found.counts()) == ([], {"the best scores too low": 2})


def test_no_fit_sample_says_why_and_greedy_sampling_is_refused() -> None:
    prompts = [Prompt.of("a", "?")]
    found = best_of(Scripted(lambda request: "and so on..."), prompts, length_judge, progress=Silent())
    assert found.rows[0].why.startswith("no fit sample: most cut off")
    with pytest.raises(UsageError, match="temperature 0"):
        best_of(Scripted(str), prompts, length_judge, sampling=Sampling(), progress=Silent())
    with pytest.raises(UsageError, match="samples 1"):
        best_of(Scripted(str), prompts, length_judge, samples=1, progress=Silent())
