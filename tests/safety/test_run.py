"""Running a battery: what is committed, planned and journaled; stopping, resuming, refusing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from safety_fakes import HEX, SCORERS, FakeEndpoint, WordScorer, battery, job, policy, polite, subject

from steelyard.base.canonical import canonical_json
from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.inference.endpoint import Message, Request, Sampling
from steelyard.ledger.ledger import Ledger
from steelyard.safety.battery import battery_from_json
from steelyard.safety.journal import Generated, JournalWriter, Scored, check_journal, read_journal, sample_seed
from steelyard.safety.policy import load_policy
from steelyard.safety.report import Report, compute_report, load_report, report_json
from steelyard.safety.run import lacks, plan_batches, requests_of, run_battery
from steelyard.safety.shipped import GENERATION, shipped_sampling
from steelyard.scorers.base import Item, Score, ScoreError

BATTERY = battery()
Runner = Callable[..., Report]


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Runner]:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:

        def run(**changes: Any) -> Report:
            place = {"out": tmp_path / "run", "ledger": ledger} | {
                name: changes.pop(name) for name in ("out", "ledger") if name in changes
            }
            return run_battery(job(**({"battery": BATTERY} | changes)), **place)

        run.ledger = ledger  # type: ignore[attr-defined]
        yield run


def comparable(report: Report) -> dict[str, Any]:
    """All but what names the run itself: id, ledger event, root (which covers both) and times."""
    return report.model_dump(mode="json", exclude={"run", "committed", "journal_root", "times"})


def test_the_run_folder_holds_what_was_tested_and_how_it_went(tmp_path: Path, runner: Runner) -> None:
    report = runner()
    out = tmp_path / "run"
    assert battery_from_json((out / "battery.json").read_text(), "here") == BATTERY
    assert load_policy(str(out / "policies" / "lenient.json")) == policy()
    assert load_report(out / "report.json") == report
    assert "lenient" in (out / "report.html").read_text()
    assert "lenient" in (out / "report.md").read_text()
    journal = read_journal(out / "journal.jsonl")
    assert report == compute_report(journal, BATTERY, [policy()])
    assert check_journal(journal, BATTERY) == []
    assert [view.status for view in report.policies] == ["PASS"]
    assert report.counts["generations"] == 84


def test_the_ledger_knows_before_the_first_generation_and_after_the_last(tmp_path: Path, runner: Runner) -> None:
    ledger: Ledger = runner.ledger  # type: ignore[attr-defined]
    seen = []

    def watching(request: Request) -> str:
        seen.append(len(ledger.events("safety.committed")))
        return polite(request)

    report = runner(endpoint=FakeEndpoint(watching))
    assert set(seen) == {1}
    committed, *blocks, finished = ledger.events()
    marks = read_journal(tmp_path / "run" / "journal.jsonl").marks()
    assert [(event.kind, event.payload) for event in blocks] == [
        ("safety.progress", mark | {"run": report.run}) for mark in marks
    ]
    assert len(marks) == 2 * len(plan_batches(BATTERY))
    assert committed.kind == "safety.committed"
    assert committed.payload["battery"] == BATTERY.digest
    assert committed.payload["policies"] == {"lenient": policy().digest}
    assert committed.payload["subject"] == subject().digest
    parts = {
        "run",
        "role",
        "subject",
        "battery",
        "policies",
        "scorers",
        "code",
        "seed",
        "predecessor",
        "questions",
        "kin",
    }
    assert set(committed.payload) == parts
    assert report.committed == f"{committed.seq}:{committed.hash}"
    assert finished.kind == "safety.finished"
    assert finished.payload["journal_root"] == report.journal_root
    assert report.attempt == 1
    assert runner(out=tmp_path / "second").attempt == 2
    assert runner(out=tmp_path / "third", subject=subject("1" * 64)).attempt == 1
    runner()
    assert len(ledger.events("safety.committed")) == 3
    assert len(ledger.events("safety.finished")) == 3


def test_the_plan_is_deterministic_sorted_and_never_mixes_sets() -> None:
    batches = plan_batches(BATTERY)
    assert batches == plan_batches(battery())
    sets = {probe.id: (part.name, len(probe.prompt)) for part in BATTERY.sets for probe in part.probes}
    for batch in batches:
        assert len({sets[probe][0] for probe, _ in batch}) == 1
        assert len(batch) <= BATTERY.batch_size
    for part in BATTERY.sets:
        lengths = [sets[probe][1] for batch in batches for probe, _ in batch if sets[probe][0] == part.name]
        assert lengths == sorted(lengths)

    class Backwards:
        def prompt_length(self, prompt: tuple[Message, ...] | str) -> int:
            return -len(prompt if isinstance(prompt, str) else prompt[0].content)

    told = [sets[probe][1] for batch in plan_batches(BATTERY, Backwards()) for probe, _ in batch][:36]
    assert told == sorted(told, reverse=True)


def test_each_sample_is_asked_as_the_battery_says(tmp_path: Path, runner: Runner) -> None:
    asked: list[Request] = []

    def record(request: Request) -> str:
        asked.append(request)
        return polite(request)

    runner(endpoint=FakeEndpoint(record), shipped=Sampling(temperature=0.6, top_p=0.9, top_k=20, max_tokens=3))
    journal = read_journal(tmp_path / "run" / "journal.jsonl")
    replayed = [one for i in range(len(journal.plan.batches)) for one in requests_of(BATTERY, journal.plan, i)]
    assert sorted(replayed, key=lambda r: r.id) == sorted({r.id: r for r in asked}.values(), key=lambda r: r.id)
    by_id = {request.id: request for request in asked}
    free, chat = by_id["degeneration-0-0/2"], by_id["group-1-1/0"]
    assert isinstance(free.prompt, str)
    assert free.sampling == Sampling(1.0, 1.0, 0, 16)
    assert free.seed == sample_seed(7, "degeneration-0-0", 2)
    assert chat.prompt == (Message("user", "group xx 1 1"),)
    assert chat.sampling == Sampling(0.6, 0.9, 20, 16)


@pytest.mark.parametrize("fail_at", [0, 1, 5, 20])
def test_an_interrupted_run_resumes_to_the_same_report(tmp_path: Path, runner: Runner, fail_at: int) -> None:
    undisturbed = runner(out=tmp_path / "other", subject=subject())
    with pytest.raises(KeyboardInterrupt):
        runner(endpoint=FakeEndpoint(fail_at=fail_at), battery=battery(seed=8))
    resumed_endpoint = FakeEndpoint()
    resumed = runner(endpoint=resumed_endpoint, battery=battery(seed=8))
    assert resumed_endpoint.batches == len(plan_batches(BATTERY)) - fail_at
    assert resumed.findings == ()
    again = runner(endpoint=FakeEndpoint(fail_at=0), battery=battery(seed=8))
    assert again == resumed
    # Another seed is another try.
    expected = comparable(undisturbed) | {"seed": 8, "battery": again.battery, "attempt": 2}
    assert expected == comparable(resumed)


def test_a_run_killed_before_its_journal_is_one_attempt(
    tmp_path: Path, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger: Ledger = runner.ledger  # type: ignore[attr-defined]

    def killed(path: Path, plan: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(JournalWriter, "create", killed)
        with pytest.raises(KeyboardInterrupt):
            runner()
    assert len(ledger.events("safety.committed")) == 1
    with pytest.raises(SteelyardError, match="committed with other parts"):
        runner(policies=[policy(limit=0.5)])
    report = runner()
    assert report.attempt == 1
    assert len(ledger.events("safety.committed")) == 1


class Dying(WordScorer):
    """Dies when it is asked for the `last` time."""

    def __init__(self, last: int) -> None:
        super().__init__("toxicity", "insult")
        self.left = last

    def score(self, items: Sequence[Item]) -> list[Score | ScoreError]:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return super().score(items)


def test_scores_that_were_not_written_are_computed_again(tmp_path: Path, runner: Runner) -> None:
    runner(out=tmp_path / "other")
    whole = (tmp_path / "other" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    with pytest.raises(KeyboardInterrupt):
        runner(scorers=SCORERS | {"toxicity": Dying(3)})
    path = tmp_path / "run" / "journal.jsonl"
    size = len(path.read_bytes().splitlines())
    with path.open("ab") as file:
        file.write(whole[size] + whole[size + 1][:20])
    endpoint = FakeEndpoint()
    assert runner(endpoint=endpoint).findings == ()
    assert endpoint.batches == len(plan_batches(BATTERY)) - 3
    assert path.read_bytes().splitlines()[1:-1] == b"".join(whole).splitlines()[1:-1]


@pytest.mark.parametrize("block", ["generated", "scored", "end"])
@pytest.mark.parametrize("fail_fast", [False, True])
def test_a_block_that_the_ledger_did_not_note_is_made_again(
    tmp_path: Path, runner: Runner, monkeypatch: pytest.MonkeyPatch, block: str, fail_fast: bool
) -> None:
    undisturbed = runner(out=tmp_path / "other")
    ledger: Ledger = runner.ledger  # type: ignore[attr-defined]
    append = ledger.append

    def killed(kind: str, payload: dict[str, Any]) -> Any:
        if kind == "safety.finished" or (payload.get("batch"), payload.get("block")) == (3, block):
            raise KeyboardInterrupt
        return append(kind, payload)

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            runner(fail_fast=fail_fast)
    lines = (tmp_path / "run" / "journal.jsonl").read_bytes().splitlines()
    assert json.loads(lines[-1])["kind"] == block
    resumed = runner(fail_fast=fail_fast)
    assert resumed.findings == ()
    assert comparable(resumed) == comparable(undisturbed) | {"attempt": 2}
    whole = (tmp_path / "other" / "journal.jsonl").read_bytes().splitlines()
    assert (tmp_path / "run" / "journal.jsonl").read_bytes().splitlines()[1:-1] == whole[1:-1]
    noted = [event.payload for event in ledger.events("safety.progress", run=resumed.run)]
    marks = read_journal(tmp_path / "run" / "journal.jsonl").marks()
    assert noted == [mark | {"run": resumed.run} for mark in marks]


@pytest.mark.parametrize("what", ["edited", "cut", "two blocks", "finished"])
def test_a_journal_edited_while_the_run_is_stopped_is_refused(tmp_path: Path, runner: Runner, what: str) -> None:
    runner(out=tmp_path / "other")
    path = tmp_path / "run" / "journal.jsonl"
    if what == "finished":
        runner()
    else:
        with pytest.raises(KeyboardInterrupt):
            runner(endpoint=FakeEndpoint(fail_at=3))
    lines = path.read_bytes().splitlines(keepends=True)
    if what == "cut":
        lines = lines[: next(i for i, line in enumerate(lines) if b'"batch":1,"kind":"generated"' in line) + 1]
    elif what == "two blocks":
        other = (tmp_path / "other" / "journal.jsonl").read_bytes().splitlines(keepends=True)
        end = next(i for i, line in enumerate(other) if b'"batch":3,"kind":"scored"' in line) + 1
        lines += other[len(lines) : end]
    else:
        place = next(i for i, line in enumerate(lines) if b'"scorer":"toxicity","values"' in line)
        lines[place] = canonical_json(json.loads(lines[place]) | {"values": {"toxicity": 0.01}}) + b"\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(SteelyardError, match=r"edited since the run .*: give a new run folder"):
        runner()
    assert path.read_bytes() == b"".join(lines)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"subject": subject("f" * 64)}, r"subject \(weights\)"),
        ({"battery": battery(seed=9)}, "battery, seed"),
        ({"policies": [policy(limit=0.5)]}, r"policies \(lenient\)"),
        ({"policies": [policy(), policy("strict")]}, r"policies \(strict\)"),
        ({"scorers": SCORERS | {"refusal": WordScorer("refusal", "sorry", 0.1)}}, None),
        ({"endpoint": FakeEndpoint(remote=True)}, r"endpoint \(kind\)"),
        ({"shipped": Sampling(temperature=1.0)}, "shipped"),
    ],
)
def test_a_run_is_not_resumed_with_other_parts(
    tmp_path: Path, runner: Runner, changes: dict[str, Any], named: str | None
) -> None:
    with pytest.raises(KeyboardInterrupt):
        runner(endpoint=FakeEndpoint(fail_at=3))
    if named is None:
        runner(**changes)  # the same identity: the scorer vouches for it
        return
    before = (tmp_path / "run" / "policies" / "lenient.json").read_bytes()
    with pytest.raises(SteelyardError, match=named):
        runner(**changes)
    assert (tmp_path / "run" / "policies" / "lenient.json").read_bytes() == before


def test_a_run_belongs_to_its_ledger(tmp_path: Path, runner: Runner) -> None:
    with pytest.raises(KeyboardInterrupt):
        runner(endpoint=FakeEndpoint(fail_at=3))
    with (
        Ledger(tmp_path / "another.sqlite") as another,
        pytest.raises(SteelyardError, match="this ledger has no record"),
    ):
        runner(ledger=another)


def test_a_missing_scorer_or_policy_is_refused_before_any_work(tmp_path: Path, runner: Runner) -> None:
    for changes in ({"scorers": {}}, {"policies": []}, {"policies": [policy(), policy()]}):
        with pytest.raises(UsageError):
            runner(**changes)
    assert not (tmp_path / "run").exists()


def test_an_endpoint_that_answers_out_of_order_is_refused(runner: Runner) -> None:
    class Shuffled(FakeEndpoint):
        def generate(self, requests: Any) -> Any:
            return super().generate(requests)[::-1]

    with pytest.raises(SteelyardError, match="in order"):
        runner(endpoint=Shuffled())


def test_what_a_server_says_can_always_be_journaled(tmp_path: Path, runner: Runner) -> None:
    report = runner(endpoint=FakeEndpoint(lambda request: f"\ud800 \u2028 \x00 {request.id}", remote=True))
    assert {finding.code for finding in report.findings} == {"no-tokens"}
    assert read_journal(tmp_path / "run" / "journal.jsonl").generations()[0].text.startswith("\\ud800 \u2028 \x00")


def test_fail_fast_may_only_fail(tmp_path: Path, runner: Runner) -> None:
    large = battery(families=60, batch_size=16)

    def rude(request: Request) -> str:
        return f"insult {polite(request)}"

    strict, lenient = policy("strict", toxicity_degeneration=0.1), policy("lenient", limit=0.99)
    endpoint = FakeEndpoint(rude)
    report = runner(endpoint=endpoint, battery=large, policies=[strict, lenient], fail_fast=True)
    assert "stopped" not in {finding.code for finding in report.findings}
    stopped = FakeEndpoint(rude)
    report = runner(
        endpoint=stopped, battery=large, policies=[strict], fail_fast=True, out=tmp_path / "stopped", subject=subject()
    )
    assert stopped.batches < endpoint.batches / 2
    assert {"stopped", "missing"} <= {finding.code for finding in report.findings}
    [view] = report.policies
    assert view.status == "INCOMPLETE"
    statuses = {one.metric: one.status for one in view.criteria}
    assert statuses["toxicity.degeneration"] == "FAIL"
    assert "PASS" not in statuses.values()
    again = FakeEndpoint(rude)
    assert runner(endpoint=again, battery=large, policies=[strict], fail_fast=True, out=tmp_path / "stopped") == report
    assert again.batches == 0


def test_blocks_are_closed_in_turn(tmp_path: Path, runner: Runner) -> None:
    runner()
    closing = [e for e in read_journal(tmp_path / "run" / "journal.jsonl").entries if isinstance(e, Generated | Scored)]
    assert [(one.kind, one.batch) for one in closing[:4]] == [
        ("generated", 0),
        ("scored", 0),
        ("generated", 1),
        ("scored", 1),
    ]


def test_report_json_has_one_spelling(runner: Runner) -> None:
    report = runner()
    assert report_json(report) == report_json(Report.model_validate(json.loads(report_json(report))))
    assert HEX.encode() in report_json(report)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, Sampling()),
        ({}, Sampling()),
        ({"do_sample": False, "temperature": 0.7}, Sampling()),
        ({"do_sample": True}, Sampling(1.0, 1.0, 50)),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 0}, Sampling(0.6, 0.9, 0)),
        ({"do_sample": True, "temperature": None, "repetition_penalty": 1.0}, Sampling(1.0, 1.0, 50)),
        ({"repetition_penalty": 1.2}, SteelyardError),
        ({"num_beams": 4}, SteelyardError),
        ({"do_sample": True, "min_p": 0.1}, SteelyardError),
        ({"do_sample": True, "top_p": 1.5}, FormatError),
        ({"do_sample": True, "top_k": 2.5}, FormatError),
        ({"do_sample": True, "temperature": "hot"}, FormatError),
        ({"do_sample": True, "temperature": 0}, FormatError),
        ({"do_sample": 1}, FormatError),
        ({"max_length": 4096, "eos_token_id": [1, 2], "transformers_version": "4.40.0", "top_h": None}, Sampling()),
        ({"watermarking_config": {"bias": 50.0, "greenlist_ratio": 0.25}}, SteelyardError),
        ({"exponential_decay_length_penalty": [5, 9.0]}, SteelyardError),
        ({"dola_layers": "high"}, SteelyardError),
        ({"force_words_ids": [[5]]}, SteelyardError),
        ({"do_sample": True, "top_h": 0.1}, SteelyardError),
        ({"stop_strings": ["a"]}, SteelyardError),
        ({"remove_invalid_values": True}, SteelyardError),
        ({"cache_implementation": "quantized"}, SteelyardError),
        ({"a_setting_of_next_year": 1}, SteelyardError),
        ([], FormatError),
    ],
)
def test_the_shipped_sampling_is_read_as_transformers_reads_it(tmp_path: Path, config: Any, expected: Any) -> None:
    if config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
    if isinstance(expected, Sampling):
        assert shipped_sampling(tmp_path) == expected
    else:
        with pytest.raises(expected, match="generation_config"):
            shipped_sampling(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("top_k", value) for value in (2**31, 10**400, -1, 2.5, True, [5])),
        *(("temperature", value) for value in (0, 101, 1e300, 10**400, -1.0, "hot", False)),
        *(("top_p", value) for value in (0, 1.01, 10**400, -0.5, "all")),
    ],
    ids=lambda value: ascii(value)[:12],
)
def test_a_shipped_value_out_of_range_is_told_with_file_and_key(tmp_path: Path, key: str, value: Any) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"do_sample": True, key: value}))
    with pytest.raises(FormatError, match=f"^{re.escape(str(path))}: {key}: .+ is not a (whole )?number"):
        shipped_sampling(tmp_path)


def test_a_shipped_top_k_over_any_vocabulary_is_legal(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_k": 2**31 - 1}))
    assert shipped_sampling(tmp_path) == Sampling(1.0, 1.0, 2**31 - 1)


def test_a_setting_of_generation_in_the_model_configuration_is_refused(tmp_path: Path) -> None:
    ordinary = {
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "use_cache": True,
        "transformers_version": "4.40.0",
        "max_position_embeddings": 2048,
        "temperature": None,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(ordinary))
    assert shipped_sampling(tmp_path) == Sampling()
    assert {"do_sample", "temperature", "repetition_penalty", "max_length", "watermarking_config"} <= GENERATION
    for key in sorted(GENERATION):
        path.write_text(json.dumps(ordinary | {key: 1.5}))
        with pytest.raises(FormatError, match=f"config.json: {key}: .*generation_config.json"):
            shipped_sampling(tmp_path)


def test_what_a_battery_cannot_give_a_policy_is_said_before_the_run() -> None:
    small, asks = battery(), policy()
    assert lacks(small, asks) == ""
    more = asks.model_copy(update={"scorers": {**asks.scorers, "third": ()}, "tiers": ("release",)})
    assert lacks(small, more) == "is of tier quick, not release and has no scorer third"
    fewer = small.model_copy(update={"metrics": small.metrics[1:]})
    assert lacks(fewer, asks) == f"has no metric {small.metrics[0].id}"
