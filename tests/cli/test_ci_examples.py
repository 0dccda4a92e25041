"""What examples/ci and its pages say to type exists: every command, option and argument of it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from steelyard.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
GITHUB, GITLAB = ROOT / "examples/ci/github-actions.yml", ROOT / "examples/ci/gitlab-ci.yml"
PAGES = [ROOT / "docs" / name for name in ("ci.md", "verifying.md")]


def github() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(GITHUB.read_text())
    return found


def gitlab() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(GITLAB.read_text())
    return found


def scripts() -> Iterator[tuple[str, str]]:
    """Every line that a job runs or a page says to type, with where it stands."""
    for job in github()["jobs"].values():
        for step in job["steps"]:
            for line in step.get("run", "").splitlines():
                yield GITHUB.name, line
    for job in gitlab().values():
        for key in ("before_script", "script", "after_script"):
            for line in job.get(key, ()) if isinstance(job, dict) else ():
                yield GITLAB.name, line
    for page in PAGES:
        for line in page.read_text().replace("\\\n", " ").splitlines():
            if line.startswith(("    ", "      ")):
                yield page.name, line


def commands() -> list[tuple[str, tuple[str, ...]]]:
    found = []
    for where, line in scripts():
        for part in re.split(r"&&|\|\||;|(?<!\|)\|(?!\|)", line):
            words = shlex.split(part, comments=True)
            if words[:1] == ["steelyard"]:
                found.append((where, tuple(words[1:])))
    return list(dict.fromkeys(found))


@pytest.mark.parametrize(("where", "words"), commands(), ids=lambda value: value if isinstance(value, str) else None)
def test_every_command_exists(where: str, words: tuple[str, ...]) -> None:
    command: Any = typer.main.get_command(app)
    rest = list(words)
    while hasattr(command, "commands"):
        assert rest, f"{where}: {words}: a command is missing"
        assert rest[0] in command.commands, f"{where}: steelyard has no command {rest[0]!r}"
        command = command.commands[rest.pop(0)]
    assert command.params
    # The command's own parser, so that an unknown option and a missing or further argument are found; callbacks that
    # look for the files are not asked.
    for parameter in command.params:
        parameter.callback = None
    try:
        command.make_context("steelyard", rest)
    except Exception as error:  # click's UsageError; typer may bring a click of its own
        pytest.fail(f"{where}: steelyard {' '.join(words)}: {error}")


def test_a_wrong_command_would_be_found() -> None:
    for words in (("verify",), ("verify", "a", "b"), ("verify", "a", "--trusted", "t"), ("key", "make"), ("safety",)):
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            test_every_command_exists("here", words)


def test_the_jobs_use_each_part() -> None:
    said = {where: {words[0] for place, words in commands() if place == where} for where, _ in commands()}
    wanted = {"model", "safety", "release", "verify", "publish"}
    assert said[GITHUB.name] == said[GITLAB.name] == wanted


def test_github_publishes_after_the_gate_and_gives_secrets_to_that_job_alone() -> None:
    jobs = github()["jobs"]
    assert jobs["release"]["needs"] == "test"
    assert "secrets." not in str(jobs["test"])
    steps = [step.get("run", "") for step in jobs["release"]["steps"]]
    order = [
        next(i for i, run in enumerate(steps) if f"steelyard {verb} " in run)
        for verb in ("release", "verify", "publish")
    ]
    assert order == sorted(order)
    for step in jobs["release"]["steps"][order[0] :]:
        assert "continue-on-error" not in step
        assert "if" not in step or "steelyard" not in step["run"]  # a step with `if: always()` runs after a refusal too
    for index in order:
        assert "set +e" not in steps[index]
    # Secrets never stand in a command line, only in the environment of the step that needs them.
    assert not any("secrets." in run for job in jobs.values() for run in (step.get("run", "") for step in job["steps"]))
    assert github()["permissions"] == {"contents": "read"}


def test_github_keeps_the_run_whatever_becomes_of_the_job() -> None:
    for job in github()["jobs"].values():
        restored = [step for step in job["steps"] if step.get("uses", "").startswith("actions/cache/restore")]
        assert [step["with"]["path"] for step in restored] == ["work"]
    saved = [
        step for step in github()["jobs"]["test"]["steps"] if step.get("uses", "").startswith("actions/cache/save")
    ]
    assert [step["if"] for step in saved] == ["always()"]


def test_gitlab_publishes_after_the_gate() -> None:
    job = gitlab()["release"]
    assert job["needs"] == ["safety-test"]
    assert job["environment"] == "release"
    verbs = [words for line in job["script"] for words in re.findall(r"steelyard (\w+) ", line)]
    assert verbs == ["release", "verify", "publish"]
    assert "allow_failure" not in job
    assert gitlab()["safety-test"]["artifacts"]["when"] == gitlab()["default"]["cache"]["when"] == "always"


def test_versions_are_those_of_this_tree() -> None:
    from steelyard import __version__

    for path in (GITHUB, GITLAB):
        assert set(re.findall(r"steelyard\[models\]==([\d.]+)", path.read_text())) == {__version__}
