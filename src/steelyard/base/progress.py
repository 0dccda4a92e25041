"""Progress of long work: a live bar with rate and time left on a terminal, plain lines elsewhere, JSON for machines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TextIO


def one_line(text: str) -> str:
    """Text from a stranger, fit for a line of ours: what is not printable (line ends, terminal codes) is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Task(Protocol):
    """One piece of countable work."""

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Count `amount` more units done; `note` is shown beside the bar."""


class Progress(Protocol):
    """Where long work tells how far it is. Everything that can take over a second takes one of these."""

    def task(self, name: str, total: float, unit: str, done: float = 0) -> Any:
        """A context manager yielding a Task of `total` units, `done` of them already there (a resumed run)."""

    def say(self, text: str) -> None:
        """One line for the reader."""


class _LineTask:
    def __init__(self, out: TextIO, name: str, total: float, unit: str, done: float, every: float) -> None:
        self.out, self.name, self.total, self.unit, self.done, self.every = out, name, total, unit, done, every
        self.first = done
        self.start = self.last = time.monotonic()

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.done += amount
        now = time.monotonic()
        if now - self.last >= self.every or self.done >= self.total:
            self.last = now
            rate = (self.done - self.first) / max(now - self.start, 1e-9)
            left = (self.total - self.done) / rate if rate > 0 else float("inf")
            text = f"{self.name}: {self.done:,.0f}/{self.total:,.0f} {self.unit}, {rate:,.1f}/s, {left:,.0f} s left"
            print(text + (f"  {note}" if note else ""), file=self.out, flush=True)


class LineProgress:
    """Plain lines, at most one every `every` seconds a task: for logs and CI."""

    def __init__(self, out: TextIO | None = None, every: float = 10.0) -> None:
        self.out, self.every = out or sys.stderr, every

    @contextmanager
    def task(self, name: str, total: float, unit: str, done: float = 0) -> Iterator[Task]:
        yield _LineTask(self.out, name, total, unit, done, self.every)

    def say(self, text: str) -> None:
        print(one_line(text), file=self.out, flush=True)


class _JSONTask:
    def __init__(self, parent: JSONProgress, name: str, total: float, unit: str, done: float) -> None:
        self.parent, self.name, self.total, self.unit, self.done = parent, name, total, unit, done
        self.last, self.told = -float("inf"), done

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.done += amount
        if self.done >= self.total or time.monotonic() - self.last >= self.parent.every:
            self.tell()

    def tell(self) -> None:
        self.last, self.told = time.monotonic(), self.done
        self.parent.emit(event="progress", task=self.name, done=self.done, total=self.total, unit=self.unit)


class JSONProgress:
    """One JSON object a line on standard error, at most one every `every` seconds a task, and where a task ends: for
    machines (`--json`)."""

    def __init__(self, out: TextIO | None = None, every: float = 1.0) -> None:
        self.out, self.every = out or sys.stderr, every

    def emit(self, **event: Any) -> None:
        print(json.dumps(event, sort_keys=True), file=self.out, flush=True)

    @contextmanager
    def task(self, name: str, total: float, unit: str, done: float = 0) -> Iterator[Task]:
        task = _JSONTask(self, name, total, unit, done)
        try:
            yield task
        finally:
            if task.told != task.done:
                task.tell()

    def say(self, text: str) -> None:
        self.emit(event="say", text=text)


class Silent:
    """No progress at all: for tests and libraries."""

    @contextmanager
    def task(self, name: str, total: float, unit: str, done: float = 0) -> Iterator[Task]:
        yield self

    def advance(self, amount: float = 1, note: str = "") -> None:
        return None

    def say(self, text: str) -> None:
        return None


class BarProgress:
    """A live rich bar on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)

    @contextmanager
    def task(self, name: str, total: float, unit: str, done: float = 0) -> Iterator[Task]:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        start = time.monotonic()
        with RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            transient=True,
        ) as bars:
            bar = bars.add_task(name, total=total, completed=int(done), rate="", note="")

            class _BarTask:
                count = 0.0

                def advance(self, amount: float = 1, note: str = "") -> None:
                    self.count += amount
                    rate = self.count / max(time.monotonic() - start, 1e-9)
                    bars.update(bar, advance=amount, rate=f"{rate:,.1f} {unit}/s", note=note)

            yield _BarTask()

    def say(self, text: str) -> None:
        self.console.print(one_line(text), highlight=False, markup=False)


def default_progress(*, as_json: bool = False) -> Progress:
    """The right kind for where standard error goes."""
    if as_json:
        return JSONProgress()
    return BarProgress() if sys.stderr.isatty() else LineProgress()
