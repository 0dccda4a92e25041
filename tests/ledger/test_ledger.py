"""The event log: the chain, what finds tampering, what stops it, and many processes at once."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sqlalchemy import event

from steelyard.base.canonical import digest
from steelyard.base.errors import SteelyardError, UsageError
from steelyard.ledger.ledger import GENESIS, Ledger

APPEND = """
import sys
from steelyard.ledger.ledger import Ledger
with Ledger(sys.argv[1]) as ledger:
    for number in range(int(sys.argv[3])):
        print(ledger.append("work", {"who": sys.argv[2], "number": number}).mark, flush=True)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "work" / "ledger.sqlite"


def filled(path: Path, count: int = 5) -> str:
    with Ledger(path) as ledger:
        for number in range(count):
            event = ledger.append("thing", {"number": number, "text": "é\u2028"})
    return event.mark


def check(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.verify()


def tamper(path: Path, *statements: str) -> None:
    """What a hand with a database shell can do: the triggers gone first, and back when it is done."""
    connection = sqlite3.connect(path)
    triggers = list(connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'"))
    assert len(triggers) == 3
    for name, _ in triggers:
        connection.execute(f"DROP TRIGGER {name}")
    for statement in statements:
        connection.execute(statement)
    for _, sql in triggers:
        connection.execute(sql)
    connection.commit()
    connection.close()


def test_events_chain_and_their_hash_is_over_the_five_fields(path: Path) -> None:
    with Ledger(path) as ledger:
        assert ledger.head() is None
        assert ledger.verify() == 0
        first = ledger.append("a", {"x": 1, "list": (1, 2), "none": None})
        second = ledger.append("b", {"x": 1})
        assert (first.seq, second.seq) == (1, 2)
        assert first.previous == GENESIS
        assert second.previous == first.hash
        fields = {"seq": 1, "time": first.time, "kind": "a", "payload": first.payload, "previous": GENESIS}
        assert first.hash == digest(fields)
        assert first.payload == {"x": 1, "list": [1, 2], "none": None}
        assert first.time.endswith("Z")
        assert ledger.events() == [first, second]
        assert ledger.events("a") == [first]
        assert ledger.events(x=1) == [first, second]
        assert ledger.events("a", x=2) == []
        assert ledger.events(missing=None) == []
        assert ledger.head() == second
        assert ledger.verify(first.mark) == ledger.verify(second.mark) == 2
    with Ledger(f"sqlite:///{path}") as again:
        assert again.events() == [first, second]


def test_payload_must_be_json(path: Path) -> None:
    with Ledger(path) as ledger:
        for payload in ({"x": float("nan")}, {"x": "\ud800"}, {1: 1, "1": 2}, [1]):
            with pytest.raises((ValueError, TypeError)):
                ledger.append("a", payload)  # type: ignore[arg-type]
        assert ledger.append("a", {2: "x", 10: "y"}).payload == {"2": "x", "10": "y"}  # type: ignore[dict-item]
        assert ledger.verify() == 1


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE events SET kind = 'other' WHERE seq = 3",
        "DELETE FROM events WHERE seq = 5",
        "INSERT OR REPLACE INTO events SELECT seq, time, 'other', payload, previous, hash FROM events WHERE seq = 3",
        "INSERT OR REPLACE INTO events SELECT 6, time, kind, payload, previous, hash FROM events WHERE seq = 3",
        "INSERT INTO events VALUES (9, '', '', '{}', '', '')",
        "INSERT INTO events VALUES (0, '', '', '{}', '', '')",
    ],
)
def test_triggers_refuse_all_but_appending(path: Path, statement: str) -> None:
    mark = filled(path)
    connection = sqlite3.connect(path)
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        connection.execute(statement)
    connection.close()
    with Ledger(path) as ledger:
        assert ledger.verify(mark) == 5


@pytest.mark.parametrize(
    ("statements", "message"),
    [
        (["UPDATE events SET time = '2020-01-01T00:00:00.000000Z' WHERE seq = 3"], "event 3 was changed"),
        (["UPDATE events SET kind = 'other' WHERE seq = 3"], "event 3 was changed"),
        (["UPDATE events SET payload = replace(payload, '2', '7') WHERE seq = 3"], "event 3 was changed"),
        (["UPDATE events SET payload = payload || ' ' WHERE seq = 3"], "event 3 was changed"),
        (["UPDATE events SET payload = '[' WHERE seq = 3"], "event 3 was changed"),
        (["UPDATE events SET payload = x'ff' WHERE seq = 3"], "event 3 was changed"),
        (["UPDATE events SET payload = cast(x'ff' AS TEXT) WHERE seq = 3"], "event 3 was changed"),
        ([f"UPDATE events SET previous = '{GENESIS}' WHERE seq = 3"], "event 3 was changed"),
        ([f"UPDATE events SET hash = '{GENESIS}' WHERE seq = 3"], "event 3 was changed"),
        (["UPDATE events SET seq = 9 WHERE seq = 5"], "event 5 is missing"),
        (["DELETE FROM events WHERE seq = 3"], "event 3 is missing"),
        (["DELETE FROM events WHERE seq = 1"], "event 1 is missing"),
        (["UPDATE events SET seq = -seq", "UPDATE events SET seq = 6 + seq"], "event 1 was changed"),
        (["DELETE FROM events WHERE seq = 3", "UPDATE events SET seq = seq - 1 WHERE seq > 3"], "event 3 was changed"),
    ],
)
def test_verify_names_the_first_bad_event(path: Path, statements: list[str], message: str) -> None:
    filled(path)
    tamper(path, *statements)
    with Ledger(path) as ledger, pytest.raises(SteelyardError, match=f"ledger.sqlite: {message}"):
        ledger.verify()


def test_a_changed_event_is_found_when_read_and_when_appended_to(path: Path) -> None:
    filled(path)
    tamper(path, "UPDATE events SET payload = '{}' WHERE seq = 5")
    with Ledger(path) as ledger:
        for read in (lambda: ledger.events("thing"), ledger.head, lambda: ledger.append("b", {})):
            with pytest.raises(SteelyardError, match="event 5 was changed"):
                read()


def test_a_link_cut_and_rehashed_is_found(path: Path) -> None:
    filled(path, 3)
    with Ledger(path) as ledger:
        second = ledger.events()[1]
    fields = {"seq": 2, "time": second.time, "kind": "forged", "payload": second.payload, "previous": second.previous}
    tamper(path, f"UPDATE events SET kind = 'forged', hash = '{digest(fields)}' WHERE seq = 2")
    with Ledger(path) as ledger, pytest.raises(SteelyardError, match="event 3 does not follow event 2"):
        ledger.verify()


def test_truncation_and_rewriting_are_found_against_a_noted_head(path: Path, tmp_path: Path) -> None:
    mark = filled(path)
    tamper(path, "DELETE FROM events WHERE seq > 3")
    with Ledger(path) as ledger:
        assert ledger.verify() == 3
        with pytest.raises(SteelyardError, match="event 4 is missing: cut off before the noted head 5"):
            ledger.verify(mark)
    rewritten = tmp_path / "other.sqlite"
    filled(rewritten, 6)
    with Ledger(rewritten) as ledger:
        assert ledger.verify() == 6
        with pytest.raises(SteelyardError, match="event 5 is not the one noted"):
            ledger.verify(mark)
        for wrong in ("", "5", "5:abc", "0:" + "0" * 64, "x:" + "0" * 64):
            with pytest.raises(UsageError, match="SEQ:HASH"):
                ledger.verify(wrong)


def test_processes_at_once_lose_and_break_nothing(path: Path) -> None:
    command = [sys.executable, "-c", APPEND, str(path)]
    workers = [
        subprocess.Popen([*command, str(who), "50"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for who in range(4)
    ]
    marks: set[str] = set()
    for worker in workers:
        out, err = worker.communicate(timeout=120)
        assert worker.returncode == 0, err
        marks |= set(out.split())
    with Ledger(path) as ledger:
        assert ledger.verify() == 200
        assert {event.mark for event in ledger.events()} == marks
        for who in range(4):
            assert [event.payload["number"] for event in ledger.events("work", who=str(who))] == list(range(50))


def test_what_comes_between_a_check_and_its_event_is_checked_too(path: Path) -> None:
    asked: list[int] = []
    with Ledger(path) as ledger, Ledger(path) as other:

        def check() -> None:
            asked.append(len(ledger.events("revoked")))
            if asked[-1]:
                raise SteelyardError("revoked")
            if len(asked) == 2:
                other.append("revoked", {})

        ledger.append("sent", {}, check=check)
        with pytest.raises(SteelyardError, match="revoked"):
            ledger.append("sent", {}, check=check)
        assert asked == [0, 0, 1]
        assert [event.kind for event in ledger.events()] == ["sent", "revoked"]

        def always_late() -> None:
            other.append("busy", {})

        with pytest.raises(SteelyardError, match="too many writers"):
            ledger.append("sent", {}, check=always_late)
        assert not ledger.events("sent")[1:]


def test_kill_during_appends_keeps_what_was_acknowledged(path: Path) -> None:
    marks: list[str] = []
    for round_ in range(5):
        command = [sys.executable, "-c", APPEND, str(path), str(round_), "100000"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdout is not None
            marks.append(worker.stdout.readline().strip())
            time.sleep(0.02 * round_)
            os.kill(worker.pid, signal.SIGKILL)
            marks += [line.strip() for line in worker.stdout.readlines() if line.endswith("\n")]
        with Ledger(path) as ledger:
            count = ledger.verify(marks[-1])
            assert len(marks) <= count <= len(marks) + round_ + 1
    assert [name for name in os.listdir(path.parent) if name.startswith(".")] == []


def test_reading_a_copy_that_cannot_be_written(path: Path, tmp_path: Path) -> None:
    mark = filled(path)
    place = tmp_path / "copy"
    place.mkdir()
    shutil.copy(path, place)
    (place / path.name).chmod(0o444)
    place.chmod(0o555)
    try:
        with Ledger(place / path.name, read_only=True) as ledger:
            assert ledger.verify(mark) == 5
            with pytest.raises(SteelyardError, match="opened for reading"):
                ledger.append("a", {})
        if os.geteuid():  # root may write anywhere
            assert [file.name for file in place.iterdir()] == [path.name]
            with Ledger(place / path.name) as ledger:
                assert ledger.verify(mark) == 5
                with pytest.raises(SteelyardError, match="cannot be written"):
                    ledger.append("a", {})
    finally:
        place.chmod(0o755)


def test_no_ledger_here(tmp_path: Path) -> None:
    for options in ({"create": False}, {"read_only": True}):
        with pytest.raises(SteelyardError, match="no ledger here"):
            Ledger(tmp_path / "none.sqlite", **options)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(SteelyardError, match="a ledger cannot be made here"):
        Ledger(tmp_path / "file" / "ledger.sqlite")


def test_foreign_and_corrupt_files(path: Path, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not a database\n" * 100)
    with pytest.raises(SteelyardError, match=r"notes.txt: the ledger cannot be used: file is not a database"):
        Ledger(text)
    empty = tmp_path / "empty.sqlite"
    empty.touch()
    with pytest.raises(SteelyardError, match="not a Steelyard ledger"):
        Ledger(empty)
    with pytest.raises(SteelyardError, match=r"cannot be used"):
        Ledger(tmp_path)
    foreign = tmp_path / "foreign.sqlite"
    connection = sqlite3.connect(foreign)
    connection.execute("CREATE TABLE events (id INTEGER)")
    connection.commit()
    connection.close()
    with pytest.raises(SteelyardError, match="not a Steelyard ledger"):
        Ledger(foreign)


def test_every_damaged_page_of_events_is_found(path: Path) -> None:
    filled(path, 100)
    connection = sqlite3.connect(path)
    names = ("events", "sqlite_schema", "sqlite_master")
    pages = [row[0] for row in connection.execute(f"SELECT pageno FROM dbstat WHERE name IN {names}")]
    connection.close()
    whole = path.read_bytes()
    assert len(pages) > 5
    for page in pages:
        start = (page - 1) * 4096
        path.write_bytes(whole[:start] + b"\xff" * 4096 + whole[start + 4096 :])
        with pytest.raises(SteelyardError, match=r"^[^\n]*ledger\.sqlite: [^\n]*$"):
            check(path)


def test_a_ledger_of_another_format_is_refused(path: Path) -> None:
    filled(path)
    connection = sqlite3.connect(path)
    connection.execute("UPDATE steelyard_ledger SET format = 2")
    connection.commit()
    connection.close()
    with pytest.raises(SteelyardError, match="ledger format 2, this version reads 1"):
        Ledger(path)


def test_other_databases_are_named_in_the_error() -> None:
    with pytest.raises(SteelyardError, match="cannot be opened as a ledger"):
        Ledger("nosuchbase://user:secret@host/db")
    with pytest.raises(UsageError, match="is a file"):
        Ledger("sqlite://")


def test_runs(path: Path) -> None:
    with Ledger(path) as ledger:
        run = ledger.run_start("recipe", {"recipe": "x"})
        other = ledger.run_start("recipe", {"recipe": "x"})
        ledger.run_finish(run, "finished")
        assert run != other
        assert [event.kind for event in ledger.events(run=run)] == ["run.started", "run.finished"]


SWALLOW = "CREATE TRIGGER quiet BEFORE INSERT ON events BEGIN SELECT RAISE(IGNORE); END"


@pytest.mark.parametrize(
    "statement",
    [
        SWALLOW,
        "CREATE TRIGGER quiet AFTER INSERT ON steelyard_ledger BEGIN DELETE FROM steelyard_ledger; END",
        "DROP TRIGGER events_no_delete",
        "CREATE TABLE other (x)",
        "CREATE VIEW other AS SELECT 1",
        "ALTER TABLE events RENAME COLUMN kind TO Kind",
    ],
)
def test_a_changed_schema_is_refused(path: Path, statement: str) -> None:
    filled(path)
    connection = sqlite3.connect(path)
    connection.execute(statement)
    connection.commit()
    connection.close()
    with pytest.raises(SteelyardError, match=r"^[^\n]*ledger\.sqlite: [^\n]*$"):
        Ledger(path)


@pytest.mark.parametrize(
    "trigger",
    [
        SWALLOW,
        "CREATE TRIGGER late AFTER INSERT ON events BEGIN INSERT OR REPLACE INTO events "
        "VALUES (NEW.seq + 1, NEW.time, 'forged', '{}', NEW.hash, ''); "
        "END",
    ],
    ids=["swallowed", "one-behind-it"],
)
def test_an_event_that_is_not_kept_is_an_error(path: Path, trigger: str) -> None:
    with Ledger(path) as ledger:
        ledger.append("thing", {})
        connection = sqlite3.connect(path)
        connection.execute(trigger)
        connection.commit()
        connection.close()
        with pytest.raises(SteelyardError, match="event 2 was not kept as written"):
            ledger.append("thing", {})
        assert len(ledger.events()) == 1


def test_a_full_disk_asks_for_space_and_not_for_an_older_copy(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Ledger(path) as ledger:
        ledger.append("thing", {})
        pages = sqlite3.connect(path).execute("PRAGMA page_count").fetchone()[0]
        event.listen(ledger._engine, "connect", lambda raw, _: raw.execute(f"PRAGMA max_page_count = {pages}"))
        with pytest.raises(SteelyardError, match=r"full.*: free space on its disk"):
            ledger.append("thing", {"text": "x" * 100_000})
        assert len(ledger.events()) == 1
