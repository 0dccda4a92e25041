"""The append-only event log: each event holds the hash of the one before it, so no past event changes unnoticed.

On SQLite the log is in WAL mode, appends take the write lock before they read the head, and triggers refuse updates,
deletions and inserts anywhere but at the end. Triggers stop accidents; against a hand that drops them there is the
chain (`verify`), and against one that rewrites the whole chain a head noted elsewhere (`Event.mark`).
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.pool import NullPool
from sqlalchemy.schema import CreateTable

from steelyard.base.canonical import canonical_json, digest
from steelyard.base.errors import SteelyardError, UsageError
from steelyard.ledger.artifacts import ArtifactStore

GENESIS = "0" * 64
FORMAT = 1
BUSY_SECONDS = 60.0
_ATTEMPTS = 20

_METADATA = sa.MetaData()
_EVENTS = sa.Table(
    "events",
    _METADATA,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("time", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("payload", sa.Text, nullable=False),
    sa.Column("previous", sa.Text, nullable=False),
    # Not unique: a unique column would let INSERT OR REPLACE delete an old row past the triggers.
    sa.Column("hash", sa.Text, nullable=False),
)
_FORMAT = sa.Table("steelyard_ledger", _METADATA, sa.Column("format", sa.Integer, primary_key=True))

_TRIGGERS = (
    "CREATE TRIGGER IF NOT EXISTS events_no_update BEFORE UPDATE ON events "
    "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    "CREATE TRIGGER IF NOT EXISTS events_no_delete BEFORE DELETE ON events "
    "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    # INSERT OR REPLACE fires no delete trigger, so the insert itself must go to the end and name the head.
    "CREATE TRIGGER IF NOT EXISTS events_only_append BEFORE INSERT ON events "
    "WHEN NEW.seq IS NOT (SELECT coalesce(max(seq), 0) + 1 FROM events) OR NEW.previous IS NOT "
    f"coalesce((SELECT hash FROM events ORDER BY seq DESC LIMIT 1), '{GENESIS}') "
    "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
)


@dataclass(frozen=True)
class Event:
    """One thing that happened. `time` is UTC in ISO 8601; `hash` is over all the other fields."""

    seq: int
    time: str
    kind: str
    payload: dict[str, Any]
    previous: str
    hash: str

    @property
    def mark(self) -> str:
        """`SEQ:HASH`: note it elsewhere, and `Ledger.verify` finds truncation and rewriting."""
        return f"{self.seq}:{self.hash}"


def event_hash(seq: int, time: str, kind: str, payload: dict[str, Any], previous: str) -> str:
    """SHA-256 (hex) of the canonical JSON of the five fields."""
    return digest({"seq": seq, "time": time, "kind": kind, "payload": payload, "previous": previous})


class Ledger:
    """The log at a path (SQLite, made with its folder where absent) or a database URL, and the artifacts beside it.

    A SQLite file in a place that cannot be written opens for reading; so does any with `read_only`. `create=False`
    refuses where there is no ledger yet. Safe for many processes and threads at once. Raises SteelyardError.
    """

    def __init__(
        self,
        url_or_path: str | Path,
        *,
        create: bool = True,
        read_only: bool = False,
        artifacts: Path | None = None,
    ) -> None:
        self.path: Path | None = _sqlite_path(url_or_path)
        self.read_only = read_only
        if self.path is not None:
            self.where = str(self.path)
            self.read_only = read_only or not _writable(self.path)
            if not self.path.exists():
                if not create or read_only:
                    raise SteelyardError(f"{self.where}: no ledger here")
                _create_sqlite(self.path)
            artifacts = artifacts or self.path.parent / "artifacts"
            self._engine = _sqlite_engine(self.path, self.read_only)
        else:
            url = sa.make_url(str(url_or_path))
            self.where = url.render_as_string(hide_password=True)
            try:
                self._engine = sa.create_engine(url)
            except (ImportError, SQLAlchemyError) as error:
                raise SteelyardError(f"{self.where}: cannot be opened as a ledger: {error}") from error
            if create and not read_only:
                with self._reported(), self._engine.begin() as connection:
                    _METADATA.create_all(connection)
                    if connection.execute(sa.select(_FORMAT.c.format)).first() is None:
                        connection.execute(_FORMAT.insert().values(format=FORMAT))
        self._artifacts = ArtifactStore(artifacts) if artifacts else None
        self._check_schema()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()

    # -- events ------------------------------------------------------------------------------------------------------

    def append(self, kind: str, payload: dict[str, Any], *, check: Callable[[], None] | None = None) -> Event:
        """Add one event at the end; it is on the disk when this returns.

        `payload` is a JSON object (no NaN, no infinity, text that UTF-8 can spell), else ValueError or TypeError.
        `check` reads this ledger and raises what forbids the event; it is asked again where another event came between
        its answer and this one.
        """
        if not kind:
            raise ValueError("an event needs a kind")
        # Through JSON and back, so that what it changes (tuples, number keys) is changed before it is hashed.
        plain = json.loads(canonical_json(payload))
        if not isinstance(plain, dict):
            raise ValueError("an event's payload is a JSON object")
        text = canonical_json(plain).decode()
        if self.read_only:
            raise SteelyardError(f"{self.where}: opened for reading, or in a place that cannot be written")
        for attempt in range(_ATTEMPTS):
            seen = None
            if check is not None:
                seen = self._next()
                check()
            try:
                with self._reported(), self._writing() as connection:
                    return self._append(connection, kind, plain, text, seen)
            except _CollisionError:
                # Elsewhere than on SQLite two writers can pick the same number: the primary key lets one of them win.
                if attempt == _ATTEMPTS - 1:
                    raise SteelyardError(f"{self.where}: too many writers at once, try again") from None
        raise AssertionError("unreachable")

    def _next(self) -> int:
        head = self.head()
        return 1 if head is None else head.seq + 1

    def _append(
        self, connection: sa.Connection, kind: str, payload: dict[str, Any], text: str, checked: int | None
    ) -> Event:
        last = connection.execute(_EVENTS.select().order_by(_EVENTS.c.seq.desc()).limit(1)).first()
        head = None if last is None else self._event(last)
        seq, previous = (1, GENESIS) if head is None else (head.seq + 1, head.hash)
        if checked not in (None, seq):
            raise _CollisionError
        now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        event = Event(seq, now, kind, payload, previous, event_hash(seq, now, kind, payload, previous))
        values = {"seq": seq, "time": now, "kind": kind, "payload": text, "previous": previous, "hash": event.hash}
        connection.execute(_EVENTS.insert().values(**values))
        # A trigger can drop, change or add a row without an error (RAISE(IGNORE)): what is read back was appended.
        found = connection.execute(_EVENTS.select().where(_EVENTS.c.seq >= seq).limit(2)).all()
        if [row._asdict() for row in found] != [values]:
            raise SteelyardError(f"{self.where}: event {seq} was not kept as written: the database was tampered with")
        return event

    def events(self, kind: str | None = None, **payload_equals: Any) -> list[Event]:
        """The events, oldest first: of one kind, and with these values in their payload.

        Each is rehashed as it is read (the chain between them is `verify`'s). Raises SteelyardError naming a bad one.
        """
        query = _EVENTS.select().order_by(_EVENTS.c.seq)
        if kind is not None:
            query = query.where(_EVENTS.c.kind == kind)
        with self._reported(), self._engine.connect() as connection:
            found = [self._event(row) for row in connection.execute(query)]
        missing = object()
        return [
            event
            for event in found
            if all(event.payload.get(key, missing) == value for key, value in payload_equals.items())
        ]

    def head(self) -> Event | None:
        """The last event, or None where nothing has happened."""
        with self._reported(), self._engine.connect() as connection:
            row = connection.execute(_EVENTS.select().order_by(_EVENTS.c.seq.desc()).limit(1)).first()
        return None if row is None else self._event(row)

    def verify(self, expected_head: str | None = None) -> int:
        """Check the whole chain and give the number of events. Raises SteelyardError naming the first bad event.

        `expected_head` is an earlier `Event.mark` (`SEQ:HASH`) noted elsewhere: the chain must still hold that event.
        Without one, events cut off the end and a chain rewritten whole cannot be seen.
        """
        noted = _parse_mark(expected_head) if expected_head is not None else None
        count, previous = 0, GENESIS
        with self._reported(), self._engine.connect() as connection:
            for row in connection.execute(_EVENTS.select().order_by(_EVENTS.c.seq)):
                if row.seq != count + 1:
                    raise SteelyardError(f"{self.where}: event {count + 1} is missing (the next one is {row.seq})")
                event = self._event(row)
                if event.previous != previous:
                    raise SteelyardError(f"{self.where}: event {event.seq} does not follow event {count}")
                if noted and event.seq == noted[0] and event.hash != noted[1]:
                    raise SteelyardError(f"{self.where}: event {event.seq} is not the one noted: history was rewritten")
                count, previous = event.seq, event.hash
        if noted and count < noted[0]:
            raise SteelyardError(
                f"{self.where}: event {count + 1} is missing: cut off before the noted head {noted[0]}"
            )
        return count

    def _event(self, row: sa.Row[Any]) -> Event:
        try:
            payload = json.loads(row.payload)
            intact = (
                isinstance(payload, dict)
                and canonical_json(payload).decode() == row.payload
                and event_hash(row.seq, row.time, row.kind, payload, row.previous) == row.hash
            )
        except (TypeError, ValueError, RecursionError):
            intact = False
        if not intact:
            raise SteelyardError(f"{self.where}: event {row.seq} was changed: its content does not match its hash")
        return Event(row.seq, row.time, row.kind, payload, row.previous, row.hash)

    # -- runs --------------------------------------------------------------------------------------------------------

    def run_start(self, kind: str, payload: dict[str, Any]) -> str:
        """Record that work of a kind begins (`run.started`); gives the new run's id: kind, UTC time, 32 random bits."""
        run = f"{kind}-{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"
        self.append("run.started", {**payload, "run": run, "work": kind})
        return run

    def run_finish(self, run: str, status: str, payload: dict[str, Any] | None = None) -> Event:
        """Record how the run ended (`run.finished`)."""
        return self.append("run.finished", {**(payload or {}), "run": run, "status": status})

    # -- artifacts ---------------------------------------------------------------------------------------------------

    @property
    def keeps_files(self) -> bool:
        """Whether there is a folder for artifacts."""
        return self._artifacts is not None

    def put_file(self, path: Path) -> str:
        """Keep a copy of the file; gives its SHA-256 (hex), by which `get_file` finds it."""
        return self._store().put(path)

    def get_file(self, digest: str) -> Path:
        """The kept file of that SHA-256, rehashed. Raises SteelyardError where it is missing or corrupted."""
        return self._store().get(digest)

    def _store(self) -> ArtifactStore:
        if self._artifacts is None:
            raise SteelyardError(f"{self.where}: no folder for artifacts: open the ledger with artifacts=FOLDER")
        return self._artifacts

    # -- the database ------------------------------------------------------------------------------------------------

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        with self._engine.connect().execution_options(steelyard_write=True) as connection, connection.begin():
            yield connection

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except IntegrityError as error:
            if "append-only" not in str(error.orig):
                raise _CollisionError from error
            raise SteelyardError(f"{self.where}: {error.orig}") from error
        except SQLAlchemyError as error:
            cause = getattr(error, "orig", None) or error
            remedy = "restore it from a copy" if self.path is not None else "check the server"
            if "full" in str(cause) or "disk I/O" in str(cause):
                remedy = "free space on its disk and try again; nothing of it was lost"
            elif "locked" in str(cause):
                remedy = "another process holds it, try again when it is done"
            elif "readonly" in str(cause) or "unable to open" in str(cause):
                remedy = "the file and its folder must be writable, or the -wal and -shm files beside it readable"
            text = " ".join(str(cause).split())
            raise SteelyardError(f"{self.where}: the ledger cannot be used: {text}: {remedy}") from error

    def _check_schema(self) -> None:
        with self._reported(), self._engine.connect() as connection:
            tables = set(sa.inspect(connection).get_table_names())
            if not {"events", "steelyard_ledger"} <= tables:
                raise SteelyardError(f"{self.where}: a database, but not a Steelyard ledger: choose another file")
            columns = [column["name"] for column in sa.inspect(connection).get_columns("events")]
            formats = list(connection.execute(sa.select(_FORMAT.c.format)).scalars())
            strange = [] if self.path is None else _strange(connection)
        if formats != [FORMAT] or columns != [column.name for column in _EVENTS.columns]:
            found = ", ".join(map(str, formats)) or "none"
            raise SteelyardError(f"{self.where}: ledger format {found}, this version reads {FORMAT}")
        if strange:
            names = ", ".join(ascii(name)[:60] for name in strange[:4])
            raise SteelyardError(
                f"{self.where}: tables or triggers missing, added or changed ({names}): restore the ledger from a copy"
            )


def _strange(connection: sa.Connection) -> list[str]:
    """Names in a SQLite database's schema that differ from what `_create_sqlite` makes."""
    tables = {table.name: str(CreateTable(table).compile(connection)) for table in _METADATA.sorted_tables}
    triggers = {sql.split()[5]: sql.replace("IF NOT EXISTS ", "") for sql in _TRIGGERS}  # SQLite keeps it so
    expected = {name: " ".join(sql.split()) for name, sql in (tables | triggers).items()}
    rows = connection.exec_driver_sql("SELECT name, sql FROM sqlite_master")
    found = {str(name): " ".join(str(sql).split()) for name, sql in rows}
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


class _CollisionError(Exception):
    """Two writers took the same number, or one came between a check and its event."""


def _parse_mark(mark: str) -> tuple[int, str]:
    match = re.fullmatch(r"([1-9][0-9]{0,17}):([0-9a-f]{64})", mark.strip())
    if match is None:
        raise UsageError(f"head {mark!r}: write SEQ:HASH as `steelyard ledger head` prints it (hash: 64 hex digits)")
    return int(match[1]), match[2]


def _sqlite_path(url_or_path: str | Path) -> Path | None:
    if isinstance(url_or_path, Path) or "://" not in url_or_path:
        return Path(url_or_path)
    try:
        url = sa.make_url(url_or_path)
    except (SQLAlchemyError, ValueError) as error:
        raise UsageError(f"{url_or_path}: not a database URL: {error}") from error
    if url.get_backend_name() != "sqlite":
        return None
    if not url.database or url.database == ":memory:" or url.query:
        raise UsageError(f"{url_or_path}: a ledger in SQLite is a file: give its path")
    return Path(url.database)


def _writable(path: Path) -> bool:
    """Whether `path` can be written, or made; SQLite needs its folder too, for the WAL."""
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return os.access(folder, os.W_OK) and (not path.exists() or os.access(path, os.W_OK))


def _create_sqlite(path: Path) -> None:
    """Make an empty ledger under another name and link it in: at `path` is nothing or a whole ledger, also when
    several processes start at once or one is killed here."""
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        os.chmod(temporary, 0o644)
        engine = _sqlite_engine(Path(temporary), read_only=False)
        plain = engine.raw_connection()  # the mode cannot be changed inside a transaction
        plain.cursor().execute("PRAGMA journal_mode=WAL")
        plain.close()
        with engine.connect().execution_options(steelyard_write=True) as connection, connection.begin():
            _METADATA.create_all(connection)
            for trigger in _TRIGGERS:
                connection.exec_driver_sql(trigger)
            connection.execute(_FORMAT.insert().values(format=FORMAT))
        engine.dispose()
        os.link(temporary, path)
    except FileExistsError as error:
        if not path.exists():
            raise SteelyardError(f"{path}: a ledger cannot be made here: {error.strerror}") from error
    except (OSError, SQLAlchemyError) as error:
        cause = getattr(error, "strerror", None) or getattr(error, "orig", None) or error
        raise SteelyardError(f"{path}: a ledger cannot be made here: {cause}") from error
    finally:
        if temporary is not None:
            for suffix in ("", "-wal", "-shm", "-journal"):
                Path(temporary + suffix).unlink(missing_ok=True)


def _sqlite_engine(path: Path, read_only: bool) -> sa.Engine:
    uri = f"{path.resolve().as_uri()}?mode={'ro' if read_only else 'rw'}"
    if read_only and not os.access(path.parent, os.W_OK) and not Path(f"{path}-wal").exists():
        # No WAL beside it and no way to make one: nobody can be writing.
        uri += "&immutable=1"

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        # A tampered row must reach the check as a wrong text, not stop the reading.
        connection.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
        connection.execute("PRAGMA trusted_schema=OFF")
        connection.execute("PRAGMA synchronous=FULL")
        return connection

    engine = sa.create_engine("sqlite://", creator=connect, poolclass=NullPool)

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        write = connection.get_execution_options().get("steelyard_write", False)
        # IMMEDIATE takes the write lock before the head is read, so no other process appends in between.
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine
