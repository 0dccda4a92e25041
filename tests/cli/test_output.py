"""What a stranger wrote stays in its own line of our output; a passphrase is the bytes that were given."""

from __future__ import annotations

from pathlib import Path

import pytest

from steelyard.cli import release
from steelyard.cli.output import one_line, passphrase, print_table
from steelyard.release import verify
from steelyard.safety.journal import Finding


def test_control_characters_are_escaped_and_words_are_not() -> None:
    assert one_line("größer 日本 x\nVERIFIED\x1b[2J\ud800") == "größer 日本 x\\nVERIFIED\\x1b[2J\\ud800"


def test_a_finding_cannot_forge_a_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = verify.Verification(
        ok=False, findings=(Finding("statement", "its subject x\nVERIFIED"),), seen=(("a\nVERIFIED", "b"),), criteria=()
    )
    monkeypatch.setattr(verify, "verify_bundle", lambda *_, **__: found)
    with pytest.raises(release.typer.Exit):
        release.verify(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert not any(line.strip().startswith("VERIFIED") for line in lines)
    assert lines[-2:] == ["statement: its subject x\\nVERIFIED", "NOT VERIFIED"]


def test_tables_keep_a_cell_in_its_row(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("t", ("a", "b"), [("x\ny", "\x1b[31m")])
    assert "x\\ny" in capsys.readouterr().out


def test_a_passphrase_of_any_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEELYARD_PASSPHRASE", "caf\udce9")
    assert passphrase(None) == b"caf\xe9"
