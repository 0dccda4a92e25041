"""The journal: what is written is what is read, and nothing can be taken from it, added or changed unnoticed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from safety_fakes import SCORERS, FakeEndpoint, WordScorer, battery, job, policy

from steelyard.base.canonical import canonical_json, merkle_root
from steelyard.base.errors import FormatError, SteelyardError
from steelyard.ledger.ledger import Ledger
from steelyard.safety.journal import (
    CanaryLine,
    JournalWriter,
    check_journal,
    identical_samples,
    parse_line,
    read_journal,
    reading,
    sample_seed,
    tally_canaries,
)
from steelyard.safety.report import compute_report
from steelyard.safety.run import run_battery
from steelyard.scorers.base import Item, Score, ScoreError

BATTERY = battery()


def run(folder: Path, **changes: Any) -> Path:
    with Ledger(folder / "ledger.sqlite") as ledger:
        run_battery(job(**({"battery": BATTERY} | changes)), out=folder / "run", ledger=ledger)
    return folder / "run" / "journal.jsonl"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return run(tmp_path_factory.mktemp("whole")).read_bytes()


def codes(path: Path) -> set[str]:
    return {finding.code for finding in check_journal(read_journal(path), BATTERY)}


def edited(tmp_path: Path, whole: bytes, edit: Callable[[list[bytes]], Sequence[bytes]]) -> Path:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b"\n".join([*edit(whole.splitlines()), b""]))
    return path


def place(lines: list[bytes], kind: str, nth: int = 3) -> int:
    return [i for i, line in enumerate(lines) if json.loads(line)["kind"] == kind][nth]


def changed(lines: list[bytes], kind: str, **values: Any) -> list[bytes]:
    i = place(lines, kind)
    return [*lines[:i], canonical_json(json.loads(lines[i]) | values), *lines[i + 1 :]]


def test_a_whole_journal_has_no_findings_and_a_merkle_root_over_its_lines(tmp_path: Path, whole: bytes) -> None:
    path = edited(tmp_path, whole, lambda lines: lines)
    journal = read_journal(path)
    assert check_journal(journal, BATTERY) == []
    assert path.read_bytes() == whole
    assert journal.root == merkle_root(whole.splitlines())
    assert len(journal.generations()) == 12 * 3 + 4 * 12
    assert journal.generations()[0].seed == sample_seed(7, *journal.plan.batches[0][0])
    assert identical_samples(journal) == 0


@pytest.mark.parametrize("kind", ["generation", "generated", "score", "canary", "scored"])
def test_a_line_removed_duplicated_or_moved_is_found(tmp_path: Path, whole: bytes, kind: str) -> None:
    def cut(lines: list[bytes]) -> list[bytes]:
        i = place(lines, kind)
        return [*lines[:i], *lines[i + 1 :]]

    def double(lines: list[bytes]) -> list[bytes]:
        i = place(lines, kind)
        return [*lines[: i + 1], *lines[i:]]

    def move(lines: list[bytes]) -> list[bytes]:
        i = place(lines, kind)
        return [*lines[:i], lines[i + 1], lines[i], *lines[i + 2 :]]

    assert "missing" in codes(edited(tmp_path, whole, cut))
    assert "duplicate" in codes(edited(tmp_path, whole, double))
    assert "order" in codes(edited(tmp_path, whole, move))


def test_an_edited_line_is_found(tmp_path: Path, whole: bytes) -> None:
    journal = read_journal(edited(tmp_path, whole, lambda lines: changed(lines, "generation", text="kind words")))
    assert journal.root != merkle_root(whole.splitlines())
    for values, code in (
        ({"seed": 1}, "seed"),
        ({"sample": 90}, "unknown"),
        ({"tokens": list(range(17))}, "length"),
        ({"finish": "length", "tokens": [1]}, "length"),
        ({"tokens": None}, "no-tokens"),
        ({"prompt_digest": None}, "no-tokens"),
    ):
        assert code in codes(edited(tmp_path, whole, lambda lines, v=values: changed(lines, "generation", **v)))
    for values in ({"values": {"refusal": 1.5}}, {"values": {}}, {"values": {"other": 0.5}}):
        assert "score-error" in codes(edited(tmp_path, whole, lambda lines, v=values: changed(lines, "score", **v)))


def test_a_run_stopped_half_way_is_unfinished(tmp_path: Path, whole: bytes) -> None:
    assert codes(edited(tmp_path, whole, lambda lines: lines[:-1])) == {"unfinished"}
    assert {"unfinished", "missing"} <= codes(edited(tmp_path, whole, lambda lines: lines[:40]))
    torn = tmp_path / "torn.jsonl"
    torn.write_bytes(whole[:-1])
    assert read_journal(torn).torn
    assert codes(torn) == {"unfinished"}


def test_the_plan_must_be_the_batterys(tmp_path: Path, whole: bytes) -> None:
    path = edited(tmp_path, whole, lambda lines: lines)
    assert "battery" in {finding.code for finding in check_journal(read_journal(path), battery(seed=8))}

    def plan(**values: Any) -> set[str]:
        return codes(edited(tmp_path, whole, lambda lines: [canonical_json(json.loads(lines[0]) | values), *lines[1:]]))

    assert "subject" in plan(subject_digest="0" * 64)
    batches = json.loads(whole.splitlines()[0])["batches"]
    assert "plan" in plan(batches=batches[1:])
    assert "plan" in plan(batches=[*batches, batches[0]])
    assert "plan" in plan(batches=[batches[0] + batches[-1], *batches[1:-1]])
    assert "canary" in plan(canaries={"refusal": [], "toxicity": []})
    assert "scorers" in plan(scorers={})


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        (b'{"batch":1,"batch":2,"kind":"scored"}', "canonical"),
        (b'{"kind":"scored","batch":2}', "canonical"),
        (b'{"batch":2, "kind":"scored"}', "canonical"),
        (b'{"batch":NaN,"kind":"scored"}', "not JSON"),
        (b'{"batch":2,"kind":"scored"', "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'{"batch":2,"extra":1,"kind":"scored"}', "extra"),
        (b'{"batch":"2","kind":"scored"}', "batch"),
        (b'{"batch":2,"kind":"other"}', "kind"),
        (b'{"batch":2,"kind":"canary","canary":"c","category":"t","expected":"above","scorer":"s"}', "canonical"),
        (b'{"batch":2,"canary":"c","category":"t","expected":"above","kind":"canary","scorer":"s"}', "either"),
        (b"[" * 20_000 + b"]" * 20_000, "deep"),
        (b"[" * 100 + b"]" * 100, "deep"),
        (b"9" * 5000, "not JSON"),
    ],
)
def test_a_malformed_line_is_refused_with_its_place(tmp_path: Path, whole: bytes, line: bytes, cause: str) -> None:
    path = edited(tmp_path, whole, lambda lines: [*lines[:5], line, *lines[5:]])
    with pytest.raises(FormatError, match=rf"journal.jsonl:6: .*{cause}"):
        read_journal(path)


def test_no_line_is_endless(tmp_path: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    path = edited(tmp_path, whole, lambda lines: [*lines[:5], b'"' + b"x" * 5_000_000 + b'"', *lines[5:]])
    with pytest.raises(FormatError, match=":6: line longer"):
        read_journal(path)
    monkeypatch.setattr(reading, "MAX_LINES", 10)
    with pytest.raises(FormatError, match="more than 10 lines"):
        read_journal(edited(tmp_path, whole, lambda lines: lines))
    for content in (b"", b"{"):
        path.write_bytes(content)
        with pytest.raises(FormatError, match="no plan"):
            read_journal(path)
    with pytest.raises(FormatError, match="give the folder of a run"):
        read_journal(tmp_path / "absent.jsonl")


class Raises(WordScorer):
    def score(self, items: Sequence[Item]) -> list[Score | ScoreError]:
        raise ValueError("out of memory")


class NaN(WordScorer):
    def value(self, item: Item) -> float:
        return float("nan")


class Fewer(WordScorer):
    def score(self, items: Sequence[Item]) -> list[Score | ScoreError]:
        return super().score(items)[:-1]


class Constant(WordScorer):
    def value(self, item: Item) -> float:
        return 0.2


class Dead(WordScorer):
    """Knows its canaries by heart and nothing else."""

    def value(self, item: Item) -> float:
        return super().value(item) if item.prompt == "?" else 0.2


class Blind(WordScorer):
    """Sees none of what it looks for."""

    def value(self, item: Item) -> float:
        return 0.1 + super().value(item) / 10


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (Raises, "score-error"),
        (NaN, "score-error"),
        (Fewer, "score-error"),
        (Constant, "constant-scores"),
        (Constant, "canary"),
        (Dead, "constant-scores"),
        (Blind, "canary"),
    ],
)
def test_a_broken_scorer_is_found(tmp_path: Path, kind: type[WordScorer], code: str) -> None:
    path = run(tmp_path, scorers=SCORERS | {"refusal": kind("refusal", "sorry")})
    findings = check_journal(read_journal(path), BATTERY)
    assert code in {finding.code for finding in findings}
    assert all("refusal" in finding.message for finding in findings)


class Verdicts(WordScorer):
    """Says 0 or 1, as a guard does, and finds nothing in what the model writes."""

    def value(self, item: Item) -> float:
        return float(super().value(item) > 0.5) if item.prompt == "?" else 0.0


def test_a_guard_may_find_every_completion_innocent(tmp_path: Path) -> None:
    path = run(tmp_path, scorers=SCORERS | {"refusal": Verdicts("refusal", "sorry")})
    assert check_journal(read_journal(path), BATTERY) == []


def test_one_bad_batch_of_canaries_is_found(tmp_path: Path, whole: bytes) -> None:
    def spoil(lines: list[bytes]) -> list[bytes]:
        found = []
        for line in lines:
            value = json.loads(line)
            if value["kind"] == "canary" and value["batch"] == 4 and value["canary"] in ("yes0", "yes1", "yes2"):
                value["value"] = 0.1
            found.append(canonical_json(value))
        return found

    path = edited(tmp_path, whole, spoil)
    assert codes(path) == {"canary"}
    assert [(one.worst, one.worst_batch) for one in tally_canaries(read_journal(path))] == [(0.7, 4), (0.7, 4)]


def test_a_canary_that_changed_sides_is_not_right(tmp_path: Path, whole: bytes) -> None:
    lines = [json.loads(line) for line in whole.splitlines()]
    for line in lines:
        if line["kind"] == "canary" and line["expected"] == "above":
            line |= {"expected": "below", "value": 0.1}
    path = edited(tmp_path, whole, lambda _: [canonical_json(line) for line in lines])
    assert "canary" in codes(path)


def test_the_same_sample_repeated_is_seen(tmp_path: Path) -> None:
    path = run(tmp_path, endpoint=FakeEndpoint(lambda request: f"the same for {request.id.split('/')[0]}"))
    journal = read_journal(path)
    assert identical_samples(journal) == 1
    assert compute_report(journal, BATTERY).identical_samples == 1


def test_a_sample_that_repeats_one_of_three_is_half_a_repetition(tmp_path: Path) -> None:
    path = run(tmp_path, endpoint=FakeEndpoint(lambda request: request.id.replace("/2", "/1")))
    assert identical_samples(read_journal(path)) == 0.5


def test_a_remote_run_says_that_it_has_no_tokens(tmp_path: Path) -> None:
    assert codes(run(tmp_path, endpoint=FakeEndpoint(remote=True))) == {"no-tokens"}


def test_two_processes_cannot_write_one_journal(tmp_path: Path, whole: bytes) -> None:
    path = edited(tmp_path, whole, lambda lines: lines[:60])
    plan = read_journal(path).plan
    with (
        JournalWriter.resume(path, plan, BATTERY),
        pytest.raises(SteelyardError, match="another process is writing"),
    ):
        JournalWriter.resume(path, plan, BATTERY)


def test_every_prefix_resumes_at_its_last_closing_line(tmp_path: Path, whole: bytes) -> None:
    plan = parse_line(whole.splitlines()[0], "plan")
    start = len(whole.splitlines()[0]) + 1
    path = tmp_path / "journal.jsonl"
    for size in range(start, len(whole), 997):
        path.write_bytes(whole[:size])
        with JournalWriter.resume(path, plan, BATTERY) as writer:  # type: ignore[arg-type]
            kept = path.read_bytes()
            assert whole.startswith(kept)
            assert len(kept) == start or json.loads(kept.splitlines()[-1])["kind"] in ("generated", "scored")
            if writer.generations is not None:
                assert [(g.probe, g.sample) for g in writer.generations] == list(writer.plan.batches[writer.batch])


def test_an_edited_prefix_is_not_resumed(tmp_path: Path, whole: bytes) -> None:
    plan: Any = parse_line(whole.splitlines()[0], "plan")
    path = edited(tmp_path, whole, lambda lines: [*lines[:3], *lines[4:60]])
    with pytest.raises(FormatError, match="not the line that the plan calls for"):
        JournalWriter.resume(path, plan, BATTERY)


def test_a_journal_of_100_000_lines_is_read_and_reported_in_ten_seconds(tmp_path: Path) -> None:
    large = battery(families=2750, batch_size=64)
    start = run(tmp_path, battery=large, policies=[policy()])
    lines = sum(1 for _ in start.open("rb"))
    assert lines >= 100_000
    before = time.process_time()  # other work on the machine is none of its business
    report = compute_report(read_journal(start), large, [policy()])
    assert time.process_time() - before < 10
    assert report.findings == ()
    assert report.policies[0].status == "PASS"


def test_results_hold_a_value_or_an_error() -> None:
    with pytest.raises(ValueError, match="either"):
        CanaryLine(batch=0, scorer="s", canary="c", category="t", expected="above", value=0.1, error="x")


def test_a_plan_of_many_megabytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b" " * (17 << 20))
    with pytest.raises(FormatError, match="line longer than 16,777,216 bytes"):
        read_journal(path)
