"""The pages of the key/value cache: who holds which, and which of them hold a prefix that a newcomer can share.

A whole page is known by a key: a SHA-256 chain over its tokens and all tokens before them, so equal keys mean equal
keys and values. A page that nobody holds any more keeps its content until its room is needed, oldest first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from steelyard.inference.executor import PAGE


def page_keys(tokens: Sequence[int]) -> list[bytes]:
    """The key of every whole page of `tokens`."""
    keys, key = [], b""
    for end in range(PAGE, len(tokens) + 1, PAGE):
        key = hashlib.sha256(key + array("q", tokens[end - PAGE : end]).tobytes()).digest()
        keys.append(key)
    return keys


class Pages:
    """Hands out pages 1 .. count - 1 (page 0 is the executor's scratch) and counts who holds them.

    The order in which pages are handed out is a function of the calls alone, so that equal work is done equally.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.holders = [0] * count
        self._free: list[int] = []  # content unknown; taken from the end
        self._idle: OrderedDict[int, None] = OrderedDict()  # content known, held by nobody; oldest first
        self._page: dict[bytes, int] = {}
        self._key: dict[int, bytes] = {}
        self.forget()

    @property
    def available(self) -> int:
        """How many pages `take` could hand out now."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> list[int]:
        """The pages that somebody holds."""
        return [page for page, holders in enumerate(self.holders) if holders]

    def take(self, count: int) -> list[int]:
        """`count` pages of no known content, each held once. The caller has looked at `available`."""
        if count > self.available:
            raise ValueError(f"{count} pages asked for, {self.available} there")
        taken = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _none = self._idle.popitem(last=False)
                del self._page[self._key.pop(page)]
            self.holders[page] = 1
            taken.append(page)
        return taken

    def hold(self, pages: Sequence[int]) -> None:
        """Hold each of `pages`, found or held already, once more."""
        for page in pages:
            if not self.holders[page]:
                del self._idle[page]  # only pages of known content are found while nobody holds them
            self.holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Let go of a sequence's pages once. Its last ones become the oldest: a prefix outlives what follows it."""
        for page in reversed(pages):
            if self.holders[page] < 1:
                raise ValueError(f"page {page} is held by nobody")
            self.holders[page] -= 1
            if not self.holders[page]:
                if page in self._key:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def publish(self, key: bytes, page: int) -> None:
        """Make known that `page` holds the content `key`. Where another page does already, that one stays."""
        if key not in self._page and page not in self._key:
            self._page[key], self._key[page] = page, key

    def withdraw(self, pages: Sequence[int]) -> list[int]:
        """Those of `pages` that have one holder, and whose content is from now on unknown: it is spoilt."""
        own = [page for page in pages if self.holders[page] == 1]
        for page in own:
            if page in self._key:
                del self._page[self._key.pop(page)]
        return own

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest known prefix of `keys`, not yet held for the caller."""
        found = []
        for key in keys:
            page = self._page.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def forget(self) -> None:
        """Back to the beginning: no content known. Nobody may hold a page."""
        if any(self.holders):
            raise ValueError("pages are still held")
        self._free = list(range(self.count - 1, 0, -1))
        self._idle.clear()
        self._page.clear()
        self._key.clear()
