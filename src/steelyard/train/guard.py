"""A run's folder belongs to one run at a time, and a run that is asked to stop does so between two steps."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from steelyard.base.errors import SteelyardError


class Interrupted(SteelyardError):  # noqa: N818, it is no failure
    """Ctrl-C or SIGTERM, after the checkpoint was written."""

    exit_code = 130


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process. The system lets go of it when the process ends, however it ends, so a dead
    run's lock blocks nobody. Raises SteelyardError naming the process that holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            raise SteelyardError(
                f"{folder}: {holder} is training here: wait for it, or choose another folder"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


class StopRequest:
    """Whether SIGINT or SIGTERM came. The second one is handled as it was before (it interrupts at once)."""

    def __init__(self) -> None:
        self.name = ""
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, self.before[number])
