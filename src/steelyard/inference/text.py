"""Text of a growing completion, in pieces that are never taken back: no half characters, nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

HALF = "\ufffd"  # what bytes that are no whole character decode to


class TextStream:
    """Turns tokens into text as they come. All pieces together are the text of the whole, cut before a stop string.
    (Except that SentencePiece decoders turn characters made of byte tokens back into U+FFFD when a broken one follows.)

    Only a window of the last few tokens is decoded each time. It begins where a character does, and with tokens whose
    text is out already: decoders treat the first token of a text otherwise (they drop its leading space).
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode, self._stops = decode, tuple(stops)
        self._tokens: list[int] = []
        self._start = 0  # of the window
        self._mark = 0  # where the next window begins
        self._taken = 0  # characters of the window's text that were taken already
        self._held = ""  # taken, but perhaps the beginning of a stop string
        self.stopped = False  # by a stop string: nothing more comes

    def push(self, token: int) -> str:
        """The text that `token` completes. Sets `stopped` where it completes a stop string."""
        self._tokens.append(token)
        text = self._decode(self._tokens[self._start :])
        whole = text.rstrip(HALF)  # the rest may yet become a character
        fresh = whole[self._taken :]
        self._taken = max(self._taken, len(whole))
        if fresh and len(whole) == len(text):
            self._start, self._mark = self._mark, len(self._tokens)
            self._taken = len(self._decode(self._tokens[self._start :]))
        return self._release(fresh, final=False)

    def close(self, finish: Literal["stop", "length"]) -> str:
        """What was held back. The first bytes of a character that the length limit cut in two say nothing."""
        rest = self._decode(self._tokens[self._start :])[self._taken :] if finish == "stop" else ""
        return self._release(rest, final=True)

    def _release(self, fresh: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += fresh
        found = [place for place in (self._held.find(stop) for stop in self._stops) if place >= 0]
        if found:
            piece, self._held, self.stopped = self._held[: min(found)], "", True
            return piece
        keep = 0 if final else self._beginning()
        out = len(self._held) - keep
        piece, self._held = self._held[:out], self._held[out:]
        return piece

    def _beginning(self) -> int:
        """How many of the last characters could begin a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
