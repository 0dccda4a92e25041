"""The runner, on toy stages: what is cached, what is done again and why, and what is left after any end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toys

from steelyard.base.errors import SteelyardError, UsageError
from steelyard.ledger.ledger import Ledger
from steelyard.recipe import runner
from steelyard.recipe.runner import StageResult, run_recipe
from steelyard.recipe.stages import KINDS

RECIPE = """\
name: toy
stages:
  text: {kind: text, text: hello}
  count: {kind: count, source: text}
  out: {kind: out, source: count, to: made/out.txt}
"""
RECIPE_PATH, WORKSPACE = Path("x.yaml"), Path("work")
RUN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import toys
from steelyard.recipe.runner import run_recipe
from steelyard.recipe.stages import KINDS
KINDS.update(toys.TOYS)
for result in run_recipe(Path("x.yaml"), workspace=Path("work")):
    print(result.name, result.status, result.summary)
"""


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, kind in toys.TOYS.items():
        monkeypatch.setitem(KINDS, name, kind)
    write()


def write(old: str = "", new: str = "") -> None:
    assert old in RECIPE
    RECIPE_PATH.write_text(RECIPE.replace(old, new))


def go(
    *, force: set[str] | None = None, until: str | None = None, dry_run: bool = False
) -> tuple[list[StageResult], list[str]]:
    """The results, and the names of the stages that were really called."""
    toys.CALLS.clear()
    results = run_recipe(RECIPE_PATH, workspace=WORKSPACE, force=force or set(), until=until, dry_run=dry_run)
    return results, list(toys.CALLS)


def whys(results: list[StageResult]) -> dict[str, str]:
    return {result.name: f"{result.status}: {result.why}" for result in results}


def events(kind: str) -> list[dict[str, object]]:
    with Ledger(WORKSPACE / "ledger.sqlite") as ledger:
        ledger.verify()
        return [event.payload for event in ledger.events(kind)]


def the(pattern: str) -> Path:
    [path] = WORKSPACE.glob(pattern)
    return path


def test_a_second_run_does_nothing_and_shows_the_same() -> None:
    first, called = go()
    assert called == ["text", "count", "out"]
    assert whys(first) == dict.fromkeys(called, "done: first run")
    assert Path("made/out.txt").read_text() == "hello"
    [text, _, out] = events("stage.finished")
    assert text["recipe"] == "toy"
    assert text["kind"] == "text"
    assert text["config"] == {"text": "hello", "number": 1, "beside": None}
    assert len(text["outputs"]) == 2  # type: ignore[arg-type]
    assert sorted(out["outputs"]) == ["made/out.pub", "made/out.txt"]  # type: ignore[call-overload]
    assert [run["status"] for run in events("run.finished")] == ["finished"]
    second, called = go()
    assert called == []
    assert whys(second) == dict.fromkeys(["text", "count", "out"], "cached: nothing changed")
    assert [r.summary for r in second] == [r.summary for r in first]
    assert [r.path for r in second] == [r.path for r in first]
    assert len(events("run.started")) == 1


def test_a_changed_setting_runs_the_stage_and_only_what_it_changes() -> None:
    go()
    write("text: hello", "text: hullo")
    results, called = go()
    assert called == ["text", "count", "out"]
    assert whys(results)["text"] == "done: config changed (text)"
    assert whys(results)["count"] == "done: input changed (source)"
    assert Path("made/out.txt").read_text() == "hullo"
    write("text: hello", "text: hello, number: 2")
    results, called = go()
    assert called == ["text", "out"]  # the content is the first run's, so count is; out.txt was overwritten since
    assert whys(results)["count"] == "cached: nothing changed"
    assert whys(results)["out"].startswith("done: output damaged: made/out.txt was changed")
    write()
    assert go()[1] == []


def test_a_changed_file_beside_the_recipe() -> None:
    write("text: hello", "text: hello, beside: b.txt")
    with pytest.raises(UsageError, match=r"x.yaml:3: stages.text.beside: there is no file b.txt"):
        go()
    assert not WORKSPACE.exists()
    Path("b.txt").write_text("1")
    go()
    Path("b.txt").write_text("2")
    results, called = go()
    assert called == ["text"]
    assert whys(results)["text"] == "done: input changed (beside)"


def test_changed_code(monkeypatch: pytest.MonkeyPatch) -> None:
    go()
    monkeypatch.setattr(runner, "code_digest", lambda *rooms: "other")
    results, called = go()
    assert called == ["text", "count", "out"]
    assert whys(results)["text"] == "done: code changed (ledger)"


def test_the_same_stage_in_another_recipe_under_another_name_is_shared() -> None:
    go()
    Path("y.yaml").write_text("name: other\nstages: {words: {kind: text, text: hello}}\n")
    [result] = run_recipe(Path("y.yaml"), workspace=WORKSPACE)
    assert result.status == "cached"


@pytest.mark.parametrize(
    ("pattern", "damage", "message"),
    [
        ("texts/*/a.txt", lambda path: path.write_text("hellO"), "a.txt was changed"),
        ("texts/*/deep/b.txt", lambda path: path.unlink(), "b.txt is missing"),
        ("texts/*/deep", lambda path: (path / "new").touch(), "new was added"),
        ("texts/*/deep", lambda path: (path / "new").symlink_to("b.txt"), "new was added"),
        ("texts/*/a.txt", lambda path: (path.rename("a"), path.symlink_to(Path("a").absolute())), "a.txt is missing"),
        ("../made/out.pub", lambda path: path.write_text(""), "out.pub was changed"),
    ],
)
def test_damage_is_found_told_and_made_good(pattern: str, damage: object, message: str) -> None:
    go()
    damage(the(pattern))  # type: ignore[operator]
    plan, called = go(dry_run=True)
    results, called = go()
    assert called in (["text"], ["out"])
    [again] = [result for result in results if result.status == "done"]
    assert again.why.startswith("output damaged: ")
    assert again.why.endswith(message)
    assert again.why in [result.why for result in plan]
    assert go()[1] == []


def test_a_damaged_resumable_run_is_kept_and_done_elsewhere() -> None:
    go()
    lines = the("counts/*/lines")
    lines.write_text("0\n1\n")
    results, called = go()
    assert called == ["count"]
    assert results[1].summary == {"resumed": 0}
    assert lines.read_text() == "0\n1\n"
    assert results[1].path is not None
    assert (results[1].path / "lines").read_text() == "0\n1\n2\n3\n4\n"
    assert go()[1] == []


def test_what_came_out_incomplete_is_handed_on_and_done_again() -> None:
    Path("broken").touch()
    first, called = go()
    assert called == ["text", "count", "out"]
    assert len(events("stage.finished")) == 2
    [incomplete] = events("stage.incomplete")
    assert incomplete["incomplete"] == "a scorer failed on 3 lines"
    again, called = go()
    assert called == ["count"]
    assert whys(again)["count"] == "done: incomplete before"
    Path("broken").unlink()
    whole, called = go()
    assert called == ["count"]
    paths = [results[1].path for results in (first, again, whole)]
    assert len(set(paths)) == 3  # what an incomplete run wrote is evidence, and stays; nothing goes on with it
    assert [results[1].summary for results in (first, again, whole)] == [{"resumed": 0}] * 3
    assert go()[1] == []


def test_force_until_and_unknown_names() -> None:
    results, called = go(until="count")
    assert called == ["text", "count"] == [result.name for result in results]
    results, called = go(force={"text"})
    assert called == ["text", "out"]
    assert whys(results)["text"] == "done: forced"
    results, called = go(force={"count"}, until="count")
    assert called == ["count"]
    assert results[1].path is not None
    assert results[1].path.name.endswith("-2")
    with pytest.raises(
        UsageError, match=r"--force cuont: no such stage, did you mean count\? \(in x.yaml: text, count"
    ):
        go(force={"cuont"})
    with pytest.raises(UsageError, match="--until xxx: no such stage"):
        go(until="xxx")


def test_the_plan_writes_nothing() -> None:
    results, called = go(dry_run=True)
    assert called == []
    assert whys(results) == dict.fromkeys(["text", "count", "out"], "to run: first run")
    assert not WORKSPACE.exists()
    go()
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*") if "ledger" not in path.name}
    assert {result.status for result in go(dry_run=True)[0]} == {"cached"}
    write("to: made", "to: other")
    assert whys(go(dry_run=True)[0])["out"] == "to run: config changed (to)"
    results, called = go(dry_run=True, force={"text", "out"})
    assert called == []
    assert whys(results)["text"] == "to run: forced"
    assert whys(results)["count"] == "to run: runs after text, if that changes"
    assert whys(results)["out"] == "to run: forced"
    assert before.keys() == {path for path in Path().rglob("*") if "ledger" not in path.name}


@pytest.mark.parametrize(
    ("text", "error", "status"), [("raise", SteelyardError, "failed"), ("interrupt", KeyboardInterrupt, "interrupted")]
)
def test_a_stage_that_does_not_end_well_leaves_nothing_done(text: str, error: type[BaseException], status: str) -> None:
    write("text: hello", f"text: {text}")
    with pytest.raises(error):
        go()
    assert events("stage.finished") == []
    assert [(run["status"], run["stage"]) for run in events("run.finished")] == [(status, "text")]
    assert list((WORKSPACE / "texts").iterdir()) == []
    write()
    assert go()[1] == ["text", "count", "out"]


def start() -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, str(Path(__file__).parent)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(pattern: str) -> None:
    for _ in range(1200):
        if any(path.is_dir() or path.read_text() for path in WORKSPACE.glob(pattern)):
            return
        time.sleep(0.05)
    raise AssertionError(f"{pattern} never came")


def test_killed_it_goes_on_and_one_run_at_a_time() -> None:
    write("source: text", "source: text, to: 40, pause: 0.05")
    with start() as worker:
        wait_for("counts/*/lines")
        with pytest.raises(SteelyardError, match=f"work: in use by process {worker.pid}: wait"):
            go()
        assert whys(go(dry_run=True)[0])["text"] == "cached: nothing changed"
        os.kill(worker.pid, signal.SIGKILL)
    with start() as worker:
        out, err = worker.communicate(timeout=120)
    assert worker.returncode == 0, err
    assert "text cached" in out
    assert "count done {'resumed': " in out
    assert "'resumed': 0}" not in out
    assert the("counts/*/lines").read_text().split() == [str(number) for number in range(40)]


def test_killed_in_a_stage_that_cannot_resume() -> None:
    write("text: hello", "text: hang")
    with start() as worker:
        wait_for("hanging")
        os.kill(worker.pid, signal.SIGKILL)
    [leftover] = (WORKSPACE / "texts").iterdir()
    assert leftover.name == (WORKSPACE / "hanging").read_text()
    (WORKSPACE / "hanging").unlink()
    with start() as worker:
        wait_for("hanging")
        worker.kill()
    [leftover] = (WORKSPACE / "texts").iterdir()
    assert leftover.name == (WORKSPACE / "hanging").read_text()


def test_a_changed_ledger_stops_the_run() -> None:
    import sqlite3

    go()
    connection = sqlite3.connect(WORKSPACE / "ledger.sqlite")
    (trigger,) = connection.execute("SELECT sql FROM sqlite_master WHERE name = 'events_no_update'").fetchone()
    connection.execute("DROP TRIGGER events_no_update")
    connection.execute("UPDATE events SET payload = replace(payload, 'hello', 'hullo') WHERE seq = 2")
    connection.execute(trigger)
    connection.commit()
    connection.close()
    with pytest.raises(SteelyardError, match="event 2 was changed"):
        go()


def test_the_project_folder_can_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go()
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("work", "made", "x.yaml"):
        (tmp_path / name).rename(moved / name)
    monkeypatch.chdir(moved)
    assert go()[1] == []


def test_a_hit_loads_no_torch() -> None:
    heavy = ("torch", "transformers", "scipy.stats")
    code = f"import sys, steelyard.recipe.runner; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
