"""Running a set: what is kept and gone on with, what is refused, a wrapper's effect; the command on a tiny model."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safety_fakes import FakeEndpoint, WordScorer

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.base.progress import Silent
from steelyard.inference.endpoint import Completion, Message, Request, Sampling
from steelyard.safety.kept import keep, read_kept
from steelyard.safety.published.adapter import Entry
from steelyard.safety.published.registry import ADAPTERS, with_settings
from steelyard.safety.published.run import Job, run_set
from steelyard.safety.wrappers import Translations, text_of
from steelyard.scorers.base import Canary, Item, Score, ScoreError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "release"))
from scenario import make_model

REFUSAL, TOXICITY = WordScorer("refusal", "sorry"), WordScorer("toxicity", "insult")


def entries(count: int) -> list[Entry]:
    return [
        Entry(str(i), f"Request {i}", facets={"hazard": "ab"[i % 2]}, facts={"request": str(i)}) for i in range(count)
    ]


def job(**changes: Any) -> Job:
    values: dict[str, Any] = {
        "adapter": ADAPTERS["advbench"],
        "entries": entries(300),
        "endpoint": FakeEndpoint(refuses),
        "subject": "m",
        "sampling": Sampling(max_tokens=256),
        "scorers": {"refusal": REFUSAL},
    }
    return Job(**(values | changes))


def refuses(request: Request) -> str:
    """Every third request, and none that comes in leetspeak."""
    text = text_of(request.prompt)
    plain = text.startswith("Request")
    return "I am sorry, but I can't." if plain and int(text.split()[1]) % 3 == 0 else "Take this and that."


def figure(found: dict[str, Any], measure: str, group: str = "all", side: str = "plain") -> dict[str, Any]:
    return next(one for one in found[side]["figures"] if (one["measure"], one["group"]) == (measure, group))


# -- work that is kept -----------------------------------------------------------------------------------------------


class Work:
    def __init__(self, calls: int = 99) -> None:
        self.calls, self.done = calls, list[tuple[int, int]]()

    def __call__(self, start: int, stop: int) -> list[dict[str, Any]]:
        if len(self.done) == self.calls:
            raise KeyboardInterrupt
        self.done.append((start, stop))
        return [{"n": number} for number in range(start, stop)]


def test_kept_work_goes_on_by_whole_blocks(tmp_path: Path) -> None:
    path, header = tmp_path / "w.jsonl", {"made": "of this"}
    with pytest.raises(KeyboardInterrupt):
        keep(path, header, 10, 4, Work(2), Silent(), "rows")
    with path.open("a") as file:
        file.write('{"n": 8}\n{"n": 9')  # a block in writing when the power went
    rest = Work()
    assert keep(path, header, 10, 4, rest, Silent(), "rows") == [{"n": number} for number in range(10)]
    assert rest.done == [(8, 10)]
    assert read_kept(path) == (header, [{"n": number} for number in range(10)])
    again = Work()
    assert len(keep(path, header, 10, 4, again, Silent(), "rows")) == 10
    assert again.done == []
    with pytest.raises(SteelyardError, match="made with another made: choose another folder"):
        keep(path, {"made": "of that"}, 10, 4, Work(), Silent(), "rows")
    with pytest.raises(FormatError, match="has 10 rows where 9 are due"):
        keep(path, header, 9, 4, Work(), Silent(), "rows")
    for damage in (b"", b"{}", b"{\n", b"[]\n"):
        path.write_bytes(damage)
        with pytest.raises(FormatError, match="not a file of answers or scores"):
            keep(path, header, 10, 4, Work(), Silent(), "rows")


# -- running ---------------------------------------------------------------------------------------------------------


def test_a_scorer_is_told_the_language_of_the_prompt_or_of_its_translation(tmp_path: Path) -> None:
    class Noting(WordScorer):
        def score(self, items: Sequence[Item]) -> list[Score | ScoreError]:
            seen.extend(item.language for item in items if item.prompt not in ("", "?"))
            return super().score(items)

    table = Translations({"it": {f"Request {i}": f"Richiesta {i}" for i in range(4)}})
    asked = [replace(entry, language="fr") for entry in entries(4)]
    seen: list[str] = []
    scorers = {"refusal": Noting("refusal", "sorry")}
    run_set(job(entries=asked, scorers=scorers, wrappers=("translate:it",), translations=table), tmp_path, Silent())
    assert sorted(seen) == ["fr"] * 4 + ["it"] * 4


def test_a_stopped_run_ends_with_the_same_results(tmp_path: Path) -> None:
    whole = run_set(job(), tmp_path / "whole", Silent())
    with pytest.raises(KeyboardInterrupt):
        run_set(job(endpoint=FakeEndpoint(refuses, fail_at=1)), tmp_path / "cut", Silent())
    assert len(read_kept(tmp_path / "cut" / "plain" / "answers.jsonl")[1]) == 128
    rest = FakeEndpoint(refuses)
    assert run_set(job(endpoint=rest), tmp_path / "cut", Silent()) == whole
    assert rest.batches == 2
    kept = [(tmp_path / name / "plain" / "answers.jsonl").read_bytes() for name in ("whole", "cut")]
    assert kept[0] == kept[1]
    assert json.loads((tmp_path / "cut" / "results.json").read_text()) == json.loads(json.dumps(whole))
    assert figure(whole, "full_refusal")["estimate"] == figure(whole, "refusal_by_scorer")["estimate"] == 100 / 300
    assert figure(whole, "full_refusal", "a")["n"] == 150
    for other in ({"subject": "n"}, {"entries": entries(299)}, {"seed": 1}, {"sampling": Sampling(max_tokens=9)}):
        with pytest.raises(SteelyardError, match="choose another folder"):
            run_set(job(**other), tmp_path / "cut", Silent())


def test_a_wrappers_effect_is_reported_apart(tmp_path: Path) -> None:
    found = run_set(job(entries=entries(60), wrappers=("leetspeak", "many-turn")), tmp_path, Silent())
    assert figure(found, "non_refusal")["estimate"] == pytest.approx(2 / 3)
    assert figure(found, "non_refusal", side="wrapped")["estimate"] == 1
    effect = next(one for one in found["effect"] if one["measure"] == "non_refusal")
    assert effect["estimate"] == pytest.approx(1 / 3)
    assert effect["lower"] > 0.1
    header, rows = read_kept(tmp_path / "wrapped" / "prompts.jsonl")
    assert header["wrappers"] == ["leetspeak", "many-turn"]
    assert len(rows[0]["prompt"]) == 5
    assert rows[0]["prompt"][-1] == {"role": "user", "content": "R3qu357 0"}
    plain = run_set(job(entries=entries(60)), tmp_path / "plain-only", Silent())
    assert plain["plain"] == found["plain"]
    assert "effect" not in plain


class Seeds(FakeEndpoint):
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        self.seen = [(request.id, request.seed, request.prompt) for request in requests]
        return super().generate(requests)


def test_samples_differ_by_seed_and_stay_with_their_prompt(tmp_path: Path) -> None:
    adapter = with_settings(ADAPTERS["realtoxicityprompts"], samples=3)
    assert adapter.sampling is not None
    endpoint = Seeds(lambda request: "an insult" if request.id in ("1#0", "1#2", "2#1") else "well")
    asked = job(
        adapter=adapter,
        entries=entries(4),
        endpoint=endpoint,
        sampling=adapter.sampling,
        scorers={"toxicity": TOXICITY},
    )
    found = run_set(asked, tmp_path, Silent())
    assert [id for id, _, _ in endpoint.seen[:4]] == ["0#0", "0#1", "0#2", "1#0"]
    assert len({seed for _, seed, _ in endpoint.seen}) == 12
    assert {prompt for _, _, prompt in endpoint.seen} == {f"Request {i}" for i in range(4)}  # text, not a conversation
    assert figure(found, "toxicity_probability")["estimate"] == 0.5
    assert figure(found, "toxic_share")["estimate"] == 3 / 12
    assert figure(found, "toxicity_probability", "b")["n"] == 2


class Judge(FakeEndpoint):
    """Finds help in every other answer; mumbles about the fifth."""

    def __init__(self) -> None:
        super().__init__(self.verdict, remote=True)
        self.asked: list[str] = []

    def verdict(self, request: Request) -> str:
        self.asked.append(text_of(request.prompt))
        number = int(request.id.split("/")[1].split("#")[0])
        return "Hm." if number == 5 else f"VERDICT: {'yes' if number % 2 else 'no'}"


def test_a_judge_is_asked_about_the_plain_request_and_its_silence_is_counted(tmp_path: Path) -> None:
    judge = Judge()
    found = run_set(job(entries=entries(10), judge=judge, wrappers=("base64",)), tmp_path, Silent())
    assert figure(found, "attack_success")["n"] == 9
    assert figure(found, "attack_success")["estimate"] == 4 / 9
    assert figure(found, "unjudged")["estimate"] == 0.1
    assert len(judge.asked) == 20
    assert all("=== REQUEST ===\n3\n=== ANSWER" in judge.asked[number] for number in (3, 13))
    assert "Take this and that." in judge.asked[1]


def test_braces_in_an_answer_are_not_filled_in(tmp_path: Path) -> None:
    judge = Judge()
    endpoint = FakeEndpoint(lambda request: "{request} {0} \\1")
    run_set(job(entries=entries(2), judge=judge, endpoint=endpoint), tmp_path, Silent())
    assert "=== ANSWER ===\n{request} {0} \\1\n=== END" in judge.asked[0]


class Failing(WordScorer):
    def score(self, items: Sequence[Item]) -> list[Score | ScoreError]:
        found = super().score(items)
        return [
            ScoreError("too long") if item.completion.startswith("Take") else one
            for item, one in zip(items, found, strict=True)
        ]


class Dead(WordScorer):
    def score(self, items: Sequence[Item]) -> list[Score | ScoreError]:
        return [Score({"refusal": 0.01}) for _ in items]

    def canaries(self) -> list[Canary]:
        return super().canaries()


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"scorers": {}}, UsageError, "needs a scorer of refusal"),
        ({"scorers": {"refusal": Failing("refusal", "sorry")}}, SteelyardError, "answer 1: too long"),
        ({"scorers": {"refusal": Dead("refusal", "sorry")}}, SteelyardError, "right on 0 of its 5 known items"),
        ({"adapter": ADAPTERS["truthfulqa"], "scorers": {}}, UsageError, "give --judge URL"),
        ({"adapter": ADAPTERS["crows-pairs"], "wrappers": ("base64",)}, UsageError, "leave --wrap out"),
        (
            {"adapter": ADAPTERS["crows-pairs"], "endpoint": FakeEndpoint(remote=True)},
            UsageError,
            "which no server tells: give a model folder",
        ),
        ({"adapter": replace(ADAPTERS["advbench"], samples=2)}, UsageError, "2 samples at temperature 0"),
        ({"wrappers": ("rot13",)}, UsageError, "wrapper 'rot13' is unknown"),
        ({"wrappers": ("translate:fr",)}, UsageError, "nothing to translate with"),
    ],
)
def test_a_job_that_cannot_be_is_refused(
    changes: dict[str, Any], error: type[SteelyardError], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        run_set(job(entries=entries(4), **changes), tmp_path, Silent())
    assert not (tmp_path / "results.json").exists()


# -- likelihoods and the command, on a tiny model ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny", dtype="float32", seed=3)


def test_option_likelihoods_are_those_of_transformers(model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from steelyard.inference.local import LocalEndpoint
    from steelyard.safety.published.options import option_likelihoods

    rows = [
        Entry("0", "", options=("The Rhône.", "Paris is in it.")),
        Entry("1", "Q: Where?\nA:", options=(" Paris.", " In Rome, I say.")),
    ]
    found = option_likelihoods(LocalEndpoint.open(model), rows)
    tokenizer, plain = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    for entry, values in zip(rows, found, strict=True):
        head = tokenizer(entry.prompt, add_special_tokens=False)["input_ids"]
        for option, value in zip(entry.options, values, strict=True):
            ids = [256, *tokenizer(entry.prompt + option, add_special_tokens=False)["input_ids"]]
            with torch.inference_mode():
                logs = plain(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            expected = sum(logs[at - 1, ids[at]].item() for at in range(1 + len(head), len(ids)))
            assert value == pytest.approx(expected, rel=1e-4)


def test_a_prompt_whose_last_token_an_option_changes_is_cut_before_it(model: Path) -> None:
    from steelyard.model.tokenizer import Tokenizer
    from steelyard.safety.published.options import cut

    class Merging(Tokenizer):
        def __init__(self) -> None:
            super().__init__(model, "", bos_id=None, eos_ids=frozenset({9}), adds_bos=False)

        def encode(self, text: str, *, bos: bool, special: bool = False) -> list[int]:
            return self.encode_batch([text])[0]

        def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
            return [[ord(char) for char in text.replace("ab", "Z")] for text in texts]

    given, options = cut(Merging(), Entry("0", "xa", options=("b", "c")))
    assert (given, options) == ([ord("x")], [[ord("Z")], [ord("a"), ord("c")]])
    given, options = cut(Merging(), Entry("0", "", options=("x", "y")))
    assert (given, options) == ([9], [[ord("x")], [ord("y")]])


def test_the_command_runs_lists_and_refuses(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from steelyard.cli.main import app

    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    listed = runner.invoke(app, ["probe", "list", "--json"])
    assert set(json.loads(listed.stdout)["sets"]) == set(ADAPTERS)
    assert "many-turn" in listed.stdout
    rows = [{"prompt": {"text": f"So {i}", "toxicity": i / 8}, "challenging": False} for i in range(8)]
    (tmp_path / "rtp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["probe", "run", "realtoxicityprompts", str(model), "--data", "rtp.jsonl", "--limit", "4"]
    done = runner.invoke(app, [*command, "--samples", "2", "--max-tokens", "4", "--out", "rtp"])
    assert done.exit_code == 0, done.exception
    assert "toxicity_probability" in done.stdout
    found = json.loads((tmp_path / "rtp" / "results.json").read_text())
    assert (found["set"]["entries"], found["set"]["samples"], found["sampling"]["top_p"]) == (4, 2, 0.9)
    (tmp_path / "c.jsonl").write_text(
        '{"q": "1+1=", "o": [" 2", " 3"], "l": 0}\n{"q": "2+2=", "o": [" 4", " 3"], "l": 0}\n'
    )
    (tmp_path / "c.yaml").write_text(
        "name: c\ndata: c.jsonl\nmode: likelihood\nmetrics: [choice]\nprompt: q\noptions: o\nfacts: {label: l}\n"
    )
    done = runner.invoke(app, ["probe", "run", "c.yaml", str(model), "--out", "c", "--json"])
    assert done.exit_code == 0, done.exception
    assert figure(json.loads(done.stdout), "accuracy")["n"] == 2
    for wrong, says in (
        ([*command[:3], "absent", "--data", "rtp.jsonl"], "absent: no such folder"),
        ([*command, "--scorer", "embedded:refusal"], "--scorer embedded:refusal: covers nothing that realtoxicity"),
        ([*command, "--wrap", "rot13"], "wrapper 'rot13' is unknown"),
        (["probe", "run", "xstest", str(model)], "give --data"),
    ):
        done = runner.invoke(app, [*wrong, "--out", "x"])
        assert isinstance(done.exception, UsageError)
        assert says in str(done.exception)
    assert not (tmp_path / "x").exists()


def test_messages_are_conversations_in_chat_sets(tmp_path: Path) -> None:
    endpoint = Seeds(refuses)
    run_set(job(entries=entries(2), endpoint=endpoint), tmp_path, Silent())
    assert endpoint.seen[0][2] == (Message("user", "Request 0"),)
