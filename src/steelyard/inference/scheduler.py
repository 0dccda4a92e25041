"""Who reads and who writes in the next step: a queue, a bounded batch, and pages promised before work begins.

Rules, so that the same requests in the same order are always served by the same steps (no clock decides anything):
requests are let in first come, first served, while a row and all pages they can ever need (prompt + max_tokens) are
free, so a request let in never waits for memory again. Prompts are read in parts, at most `part` tokens a step.
Requests with the same prompt are read once, and each gets its own copy of the last page, which they will fill in
different ways. A request whose next page is being read in this very step waits for the next, and then shares it.
Nothing here knows of tensors: the engine does what `plan` says.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from steelyard.base.errors import SteelyardError
from steelyard.inference.endpoint import Sampling
from steelyard.inference.executor import PAGE
from steelyard.inference.pages import Pages, page_keys
from steelyard.inference.text import TextStream

Finish = Literal["stop", "length"]
GATHER = 16  # newcomers are let in when 1 / GATHER of the rows is free: reading a few prompts at a time costs more
PATIENCE = 8  # ... or after so many steps of waiting


@dataclass(eq=False)
class Generation:
    """A request under way, and the caller's handle on it."""

    name: str
    prompt: Sequence[int]
    sampling: Sampling
    seed: int
    stream: TextStream | None = None  # where text is needed: for stop strings, or for the caller
    tokens: list[int] = field(default_factory=list)  # generated so far, the stop token included
    logprobs: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list)  # chosen; (token, value) of top
    finish: Finish | None = None
    error: SteelyardError | None = None
    table: list[int] = field(default_factory=list)  # pages held
    unread: str = ""  # text the caller has not fetched yet

    def __post_init__(self) -> None:
        keys = page_keys(self.prompt)
        self.identity = (keys[-1] if keys else b"", tuple(self.prompt[len(keys) * PAGE :]))  # of the whole prompt
        self.keys = keys
        self.sharable = (len(self.prompt) - 1) // PAGE  # pages; the last token is always read, for its logits

    @property
    def pages(self) -> int:
        """Pages it can ever need. The last token it writes is not read again."""
        return pages_for(len(self.prompt), self.sampling.max_tokens)

    @property
    def done(self) -> bool:
        return self.finish is not None or self.error is not None

    @property
    def cached(self) -> int:
        """Tokens in its pages when its newest token is about to be read."""
        return len(self.prompt) + len(self.tokens) - 1

    def read(self) -> str:
        """The text that came since the last call."""
        text, self.unread = self.unread, ""
        return text


def pages_for(prompt: int, max_tokens: int) -> int:
    """Pages that a request of so many tokens can need."""
    return -(-(prompt + max_tokens - 1) // PAGE)


@dataclass
class Part:
    """Tokens start .. stop - 1 of a prompt, to be read in this step."""

    reader: Generation
    start: int
    stop: int

    @property
    def last(self) -> bool:
        return self.stop == len(self.reader.prompt)


@dataclass
class Plan:
    """One step's reading: page copies (source, target) first, then rows that begin on a prompt read before (with its
    logits), then the parts to read."""

    copies: list[tuple[int, int]] = field(default_factory=list)
    started: list[tuple[Generation, Any]] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)


@dataclass
class _Kept:
    """A prompt that was read and that others still wait for: its pages, and its logits."""

    pages: list[int]
    logits: Any


class Scheduler:
    """See the module. `waiting` is the queue; `running` the rows of the batch, in order of arrival there."""

    def __init__(self, pages: Pages, rows: int, queue: int, part: int) -> None:
        self.pages, self.rows, self.queue, self.part = pages, rows, queue, part
        self.waiting: deque[Generation] = deque()
        self.reading: list[Part] = []  # the part read last of each prompt begun
        self.running: list[Generation] = []
        self._same: Counter[Any] = Counter()  # how many in the queue have this prompt
        self._kept: dict[Any, _Kept] = {}
        self._patience = 0

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.reading or self.running)

    def add(self, generation: Generation) -> None:
        """Put it into the queue. Raises SteelyardError where that is full."""
        if len(self.waiting) >= self.queue:
            raise SteelyardError(
                f"request {generation.name}: the queue is full ({self.queue} requests wait): "
                "ask again later, or open the engine with a larger queue"
            )
        self.waiting.append(generation)
        self._same[generation.identity] += 1

    def remove(self, generation: Generation) -> None:
        """Forget it, wherever it is; its pages and row are free at once."""
        if generation in self.running:
            self.running.remove(generation)
        elif generation in self.waiting:
            self.waiting.remove(generation)
            self._leave_queue(generation)
        else:
            self.reading = [part for part in self.reading if part.reader is not generation]
        self.pages.release(generation.table)
        generation.table = []

    def withdraw(self, generation: Generation) -> list[int]:
        """`remove` one whose pages are spoilt. Returns those that nobody else holds: zero them before the next `plan`.

        What they held is not found any more, and who waits with the same prompt reads it again. Who still holds one of
        its spoilt pages has read the same tokens, and so fails too, and then gives that page back here.
        """
        kept = self._kept.get(generation.identity)
        partly = [] if kept is None else kept.pages[len(generation.prompt) // PAGE :]
        self._drop(generation.identity)
        own = self.pages.withdraw(generation.table)
        self.remove(generation)
        return [*own, *partly]

    def clear(self) -> None:
        """Remove all, and forget what pages hold: the next work is done as by a new scheduler."""
        for generation in [*self.waiting, *(part.reader for part in self.reading), *self.running]:
            self.remove(generation)
        self._patience = 0
        self.pages.forget()

    def plan(self) -> Plan:
        """What to read in this step. The caller does it and then calls `read` for each part."""
        plan, budget = Plan(), self.part
        coming: set[bytes] = set()  # pages that this step completes
        for i, part in enumerate(self.reading):
            if budget >= PAGE:
                self.reading[i] = self._next(part.reader, part.stop, budget)
                plan.parts.append(self.reading[i])
                budget -= self.reading[i].stop - self.reading[i].start
                coming.update(_completed(self.reading[i]))
        if not self._let_in():
            return plan
        begun = {part.reader.identity for part in self.reading}
        free = self.rows - len(self.running) - len(self.reading)
        for generation in list(self.waiting):
            if free <= 0:
                break
            free -= 1  # also for those who wait for a page that is being read: theirs is the row after
            kept = self._kept.get(generation.identity)
            if kept is not None:
                if not self._join(generation, kept, plan):
                    break
                continue
            if generation.identity in begun:
                continue
            shared = self.pages.find(generation.keys[: generation.sharable])
            if len(shared) < generation.sharable and generation.keys[len(shared)] in coming:
                continue
            if budget < min(PAGE, len(generation.prompt) - len(shared) * PAGE):
                break
            if not self._reserve(generation, shared):
                break
            self._leave_queue(generation, remove=True)
            part = self._next(generation, len(shared) * PAGE, budget)
            self.reading.append(part)
            plan.parts.append(part)
            begun.add(generation.identity)
            budget -= part.stop - part.start
            coming.update(_completed(part))
        self.running += [generation for generation, _ in plan.started]
        return plan

    def read(self, part: Part, logits: Any) -> Plan:
        """`part` is in its pages; `logits` are those after its last token. Returns what begins to write now."""
        reader, plan = part.reader, Plan()
        for page in range(part.start // PAGE, part.stop // PAGE):
            self.pages.publish(reader.keys[page], reader.table[page])
        if part.last:
            self.reading = [other for other in self.reading if other.reader is not reader]
            self.running.append(reader)
            plan.started.append((reader, logits))
            self._keep(reader, logits, plan)
        return plan

    def _let_in(self) -> bool:
        """Whether newcomers are let in at this step."""
        free = self.rows - len(self.running) - len(self.reading)
        if not self.waiting or free <= 0:
            return False
        if not self.running or free * GATHER >= self.rows or self._patience >= PATIENCE:
            self._patience = 0
            return True
        self._patience += 1
        return False

    def _next(self, reader: Generation, start: int, budget: int) -> Part:
        stop = len(reader.prompt)
        return Part(reader, start, stop if stop - start <= budget else start + budget // PAGE * PAGE)

    def _reserve(self, generation: Generation, shared: Sequence[int]) -> bool:
        """Give it all pages it can need, the first of them `shared`; False where there are not enough now."""
        self.pages.hold(shared)
        own = generation.pages - len(shared)
        if own > self.pages.available and not (self.running or self.reading):
            for identity in list(self._kept):  # nobody will leave: prompts kept for others must give way
                self._drop(identity)
        if own > self.pages.available:
            self.pages.release(shared)
            return False
        generation.table = [*shared, *self.pages.take(own)]
        return True

    def _join(self, generation: Generation, kept: _Kept, plan: Plan) -> bool:
        """Begin on a prompt that another request read."""
        whole = len(generation.prompt) // PAGE
        if not self._reserve(generation, kept.pages[:whole]):
            return False
        if len(kept.pages) > whole:
            plan.copies.append((kept.pages[whole], generation.table[whole]))
        plan.started.append((generation, kept.logits))
        self._leave_queue(generation, remove=True)
        return True

    def _keep(self, reader: Generation, logits: Any, plan: Plan) -> None:
        """Keep a prompt for those who wait with the same: whole pages shared, a copy of the partly filled one."""
        whole, partly = divmod(len(reader.prompt), PAGE)
        if not self._same[reader.identity] or (partly and not self.pages.available):
            return  # nobody waits; or no room, so that they will read it again
        pages = reader.table[:whole]
        self.pages.hold(pages)
        if partly:
            pages = [*pages, *self.pages.take(1)]
            plan.copies.append((reader.table[whole], pages[whole]))
        self._kept[reader.identity] = _Kept(pages, logits)

    def _leave_queue(self, generation: Generation, *, remove: bool = False) -> None:
        if remove:
            self.waiting.remove(generation)
        self._same[generation.identity] -= 1
        if not self._same[generation.identity]:
            del self._same[generation.identity]
            self._drop(generation.identity)

    def _drop(self, identity: Any) -> None:
        kept = self._kept.pop(identity, None)
        if kept is not None:
            self.pages.release(kept.pages)


def _completed(part: Part) -> list[bytes]:
    return part.reader.keys[part.start // PAGE : part.stop // PAGE]
