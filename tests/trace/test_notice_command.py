"""`steelyard notice` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from steelyard.base.errors import UsageError
from steelyard.cli.main import app
from steelyard.ledger.ledger import Ledger
from steelyard.trace.notices import PAGE, SIGHTED, STEPPED, TEXT


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    reference = {"name": "tiny", "kind": "release", "subject": "5" * 64, "weights": "6" * 64}
    with Ledger(tmp_path / "ws" / "ledger.sqlite") as ledger:
        ledger.append(SIGHTED, {"reference": reference, "verdict": "derived", "evidence": ["order"], "log10_p": -40.0})
    return tmp_path / "ws"


def test_a_notice_is_written_and_its_steps_are_noted(workspace: Path) -> None:
    call = ["notice", "1", "--workspace", str(workspace), "--location", "https://example.org/x"]
    written = CliRunner().invoke(app, [*call, "--kind", "takedown", "--json"])
    assert written.exit_code == 0, written.output
    folder = Path(json.loads(written.stdout)["folder"])
    assert {path.name for path in folder.iterdir()} == {PAGE, TEXT}
    garbled = CliRunner().invoke(
        app, ["notice", "1", "--workspace", str(workspace), "--step", "sent", "--note", "\udcff"]
    )
    assert isinstance(garbled.exception, UsageError), garbled.output
    noted = CliRunner().invoke(
        app, ["notice", "1", "--workspace", str(workspace), "--step", "sent", "--note", "case 12"]
    )
    assert noted.exit_code == 0, noted.output
    with Ledger(workspace / "ledger.sqlite", read_only=True) as ledger:
        assert [event.payload["note"] for event in ledger.events(STEPPED)] == ["case 12"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["1", "--kind", "revenge", "--location", "x"], "a notice is one of takedown, withdrawal, abuse"),
        (["1", "--kind", "takedown"], "names no location"),
        (["2", "--kind", "takedown"], "is no sighting"),
        (["1", "--kind", "takedown", "--step", "sent"], "give --kind to write a notice, or --step"),
        (["1", "--kind", "takedown", "--location", "\udcff"], "is no UTF-8"),
        (["1", "--kind", "abuse", "--location", "x", "--reason", "\udcff"], "is no UTF-8"),
    ],
)
def test_wrong_calls_are_refused_and_leave_nothing(workspace: Path, arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["notice", *arguments, "--workspace", str(workspace)])
    assert isinstance(result.exception, UsageError), result.output
    assert said in str(result.exception)
    assert not Path("notices").exists()
