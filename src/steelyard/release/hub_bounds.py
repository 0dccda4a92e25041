"""What the Hub's answers may cost: the size of one, the entries of a listing, the questions and the time of a call.

The client library bounds none of these, and a time-out of the socket ends no answer that comes a byte at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from threading import Thread
from typing import Any, TypeVar

from steelyard.base.errors import SteelyardError

ANSWER_LIMIT = 32_000_000  # bytes of one answer; a page of 1,000 files has about 300 kB
MAX_ENTRIES = 10_000  # files and folders of a repository; a release has about 2,000 at most
MAX_QUESTIONS = 1_000  # GETs of one call, of which a listing makes one for each page
TOTAL = 600.0  # seconds of one call; where it sends files, since it last sent something
_ENCODINGS = ("", "identity", "gzip")  # one step of gzip makes at most 70 MB of what is read at a time

Item = TypeVar("Item")
Result = TypeVar("Result")


def bound_answer(response: Any, where: str) -> None:
    """Let an answer (of either HTTP library that huggingface_hub has used) be read up to its limits, then raise."""
    encoding = response.headers.get("content-encoding", "").strip().lower()
    if encoding not in _ENCODINGS:
        raise SteelyardError(f"{where}: the Hub answers in the encoding {encoding[:40]!r}, which was not asked for")
    pieces, end = response.iter_bytes, time.monotonic() + TOTAL

    def bounded(chunk_size: int | None = None) -> Iterator[bytes]:
        size = 0
        for piece in pieces(chunk_size):
            size += len(piece)
            if size > ANSWER_LIMIT:
                raise SteelyardError(f"{where}: the Hub answers over {ANSWER_LIMIT:,} bytes: no such answer is so long")
            if time.monotonic() > end:
                raise _too_long(where)
            yield piece

    response.iter_bytes = bounded  # its read() goes through this


def at_most(entries: Iterable[Item], where: str) -> Iterator[Item]:
    """The entries of a listing, which raises SteelyardError where there are too many."""
    for number, entry in enumerate(entries):
        if number == MAX_ENTRIES:
            raise SteelyardError(f"{where}: holds over {MAX_ENTRIES:,} files and folders, more than a release may have")
        yield entry


def in_time(action: Callable[[], Result], moved: Callable[[], float], stop: Callable[[], object], where: str) -> Result:
    """What `action` gives or raises; SteelyardError, and `stop` called, once `moved` is TOTAL seconds ago.

    `moved`: when it began, or last sent something (`time.monotonic`). It runs in a thread of its own: where it hangs
    while an answer's head drips in, nothing else ends the waiting.
    """
    future: Future[Result] = Future()

    def act() -> None:
        try:
            future.set_result(action())
        except BaseException as error:  # raised below, in the caller's thread
            future.set_exception(error)

    Thread(target=act, daemon=True).start()
    while not future.done():
        left = moved() + TOTAL - time.monotonic()
        if left <= 0:
            with suppress(Exception):
                stop()
            raise _too_long(where)
        with suppress(TimeoutError):
            future.exception(left)
    return future.result()


def _too_long(where: str) -> SteelyardError:
    return SteelyardError(f"{where}: no whole answer within {TOTAL:g} s: try again later, it goes on from here")
