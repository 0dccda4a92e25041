"""The engine: requests of any length enter and leave one running batch.

Each step writes one token for every row of the batch and then reads prompts for the rows that are free (the rules are
`scheduler.py`'s). A row's noise depends on its seed and position alone, and with the compiled kernels so do its logits:
its tokens are the same in any batch, bit for bit on the same machine. In plain PyTorch another batch rounds otherwise,
which may decide a near tie; the same list of requests is still always served by the same steps. Not for use by several
threads.

>>> handle = engine.submit([1, 5, 9], Sampling(max_tokens=8), text=True)
>>> while not handle.done:
...     engine.step()
...     print(handle.read(), end="")
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steelyard.base.errors import SteelyardError, UsageError
from steelyard.inference.endpoint import Sampling
from steelyard.inference.executor import PAGE, Executor
from steelyard.inference.graphs import DecodeGraphs
from steelyard.inference.memory import cache_pages, memory_error, out_of_memory
from steelyard.inference.pages import Pages
from steelyard.inference.sampling import check_sampling, choose, log_probabilities, margins, penalise, whole
from steelyard.inference.scheduler import Finish, Generation, Plan, Scheduler, pages_for
from steelyard.inference.text import TextStream
from steelyard.model.headers import quote
from steelyard.model.llama import Llama

ROWS = 128  # where SmolLM2's decoding on two cores stops gaining from more
PREFILL_TOKENS = 4096  # prompt tokens read between two writing steps: enough to fill the processor, bounded memory
CHECK_TOKENS = 256  # positions whose logits are held at once in `check`


@dataclass(frozen=True)
class Event:
    """What one step did for one request: a token, the text it completed, and how it ended if it did."""

    generation: Generation
    token: int | None  # None for an error
    text: str


@dataclass
class Counts:
    """Work done since the engine was opened."""

    steps: int = 0
    prompt_tokens: int = 0  # of requests that began to write
    prefilled: int = 0  # of these, read; the others were shared
    generated: int = 0


class Engine:
    """Generates with one model. `decode` (token ids to text) is needed for stop strings and for streamed text."""

    def __init__(
        self,
        model: Llama,
        eos_ids: Collection[int],
        decode: Callable[[Sequence[int]], str] | None = None,
        *,
        rows: int = ROWS,
        cache_bytes: int | None = None,
        queue: int = 1024,
        prefill_tokens: int = PREFILL_TOKENS,
    ) -> None:
        """`rows`: requests that write at a time. `cache_bytes`: the key/value cache's memory (see
        `memory.cache_pages` for None). `queue`: requests that may wait. `prefill_tokens`: prompt tokens read a step.

        Raises UsageError for settings that can't work, SteelyardError where memory does not suffice.
        """
        if rows < 1 or queue < 1 or prefill_tokens < PAGE:
            raise UsageError(f"rows and queue must be at least 1, prefill_tokens at least {PAGE}")
        self.model, self.eos_ids, self.decode, self.rows = model, frozenset(eos_ids), decode, rows
        self.counts, self.prefill_tokens = Counts(), prefill_tokens
        weight = model.model.embed_tokens.weight
        pages = cache_pages(model.config, weight.dtype, weight.device, rows, cache_bytes)
        self.page_bytes = Executor.bytes_per_page(model.config, weight.dtype)
        try:
            self.executor = Executor(model, pages)
        except Exception as error:
            if out_of_memory(error):
                raise memory_error("opening the engine", rows, pages, self.page_bytes) from error
            raise
        self.graphs = DecodeGraphs(self.executor) if self.executor.device.type == "cuda" else None
        self.pages = Pages(pages)
        self._schedule = Scheduler(self.pages, rows, queue, prefill_tokens)
        self._batch: tuple[list[Generation], Tensor] | None = None  # rows and page tables of the last writing step
        self._spoilt: list[int] = []  # pages that may hold a NaN, which must not meet a later request

    @property
    def cache_bytes(self) -> int:
        """What the key/value cache takes."""
        return self.pages.count * self.page_bytes

    @property
    def kernels(self) -> str:
        """What the steps are computed with."""
        if self.graphs is not None:
            return "torch, captured"
        return "torch" if self.executor.kernels is None else "compiled"

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return self._schedule.idle

    # -- one request at a time ------------------------------------------------------------------------------------

    def submit(
        self, prompt: Sequence[int], sampling: Sampling, seed: int = 0, name: str = "0", *, text: bool = False
    ) -> Generation:
        """Put a request into the queue. `text`: whether events and `Generation.read` are to give text.

        Raises SteelyardError, naming the request, where the queue is full, for an empty prompt, a token outside the
        vocabulary, meaningless sampling settings, text or stop strings without `decode`, and a prompt that with its
        max_tokens exceeds the context or the cache.
        """
        generation = self._prepare(prompt, sampling, seed, name, text=text)
        self._schedule.add(generation)
        return generation

    def cancel(self, generation: Generation) -> None:
        """Forget a request; its row and pages are free at once. Nothing happens to one that is done."""
        if not generation.done:
            read = generation.table[: pages_for(len(generation.prompt), 1)]
            # Of a prompt read in part nobody has looked at logits
            if read and not generation.tokens and not self.executor.finite(read):
                self._spoilt += self._schedule.withdraw(generation)
            else:
                self._schedule.remove(generation)
            generation.error = SteelyardError(f"request {generation.name}: cancelled")

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Write one token for every row, then read prompts for free rows. Requests that fail have `error` set.

        Raises SteelyardError where memory runs out; all requests are then forgotten.
        """
        try:
            return self._step()
        except BaseException as error:
            self._abandon(error)
            if out_of_memory(error):
                raise memory_error("in a step", self.rows, self.pages.count, self.page_bytes) from error
            raise

    # -- a list of requests -----------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        samplings: Sequence[Sampling],
        seeds: Sequence[int],
        names: Sequence[str] | None = None,
    ) -> list[tuple[list[int], Finish]]:
        """For each prompt (token ids), in order: the new tokens, any stop token that ended them included, and why.

        A stop string ends a row with the token that completes it, wherever it began; cutting the text before it is the
        caller's. Raises SteelyardError as `submit`, before any work, naming the request (`names`, or its number);
        during work, for logits that are not finite.
        """
        done = self.complete(prompts, samplings, seeds, names)
        return [(generation.tokens, generation.finish) for generation in done if generation.finish is not None]

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        samplings: Sequence[Sampling],
        seeds: Sequence[int],
        names: Sequence[str] | None = None,
    ) -> list[Generation]:
        """As `generate`, with all that is known of each request. The engine must be idle: it begins with an empty
        cache, so that what comes out depends on the list alone."""
        names = [str(i) for i in range(len(prompts))] if names is None else names
        if not len(prompts) == len(samplings) == len(seeds) == len(names):
            raise ValueError("prompts, samplings, seeds and names must be of one length")
        asked = [self._prepare(*request) for request in zip(prompts, samplings, seeds, names, strict=True)]
        self.begin_alone()
        # Longest first, so that the batch stays full to the end
        queue = deque(sorted(asked, key=lambda generation: -generation.sampling.max_tokens))
        try:
            while queue or not self.idle:
                while queue and len(self._schedule.waiting) < self._schedule.queue:
                    self._schedule.add(queue.popleft())
                for event in self.step():
                    if event.generation.error is not None:
                        raise event.generation.error
        finally:
            self._forget()
        return asked

    @torch.inference_mode()
    def check(
        self, prompt: Sequence[int], tokens: Sequence[int], sampling: Sampling, seed: int, name: str = "0"
    ) -> list[float]:
        """How far each of `tokens`, said to come from `prompt`, is from what this model would have chosen there.

        The model reads prompt and tokens. 0.0 where it is the choice, else the margin of `sampling.margins`, in units
        of logit / temperature (of logit, where greedy): small where only rounding differs (other hardware, another
        batch in plain PyTorch; compiled kernels give the same logits in any batch), large where the tokens are not this
        model's. infinity for a token after a stop token. The engine must be idle. Errors as in `submit`; also for more
        tokens than `max_tokens`.
        """
        check_sampling(sampling, name)
        self._check_seed(seed, name)
        self.check_given(prompt, tokens, name)
        if len(tokens) > sampling.max_tokens:
            raise SteelyardError(f"request {name}: {len(tokens)} tokens where max_tokens is {sampling.max_tokens}")
        self.begin_alone()
        table = self.pages.take(pages_for(len(prompt), len(tokens)))
        try:
            found = self._margins(prompt, tokens, sampling, seed, table)
        finally:
            self.executor.clear(table)  # logits that were not finite would leave a NaN behind
            self.pages.release(table)
        stops = [i for i, token in enumerate(tokens) if self._stops(token, sampling)]
        if stops:
            found[stops[0] + 1 :] = [float("inf")] * (len(tokens) - stops[0] - 1)
        return found

    def _margins(
        self, prompt: Sequence[int], tokens: Sequence[int], sampling: Sampling, seed: int, table: Sequence[int]
    ) -> list[float]:
        """`sampling.margins` of all `tokens`, a part of the logits at a time."""
        given, first = torch.tensor(tokens, device=self.executor.device), len(prompt) - 1
        for start in range(0, first, self.prefill_tokens):
            self.executor.prefill([prompt[start : min(start + self.prefill_tokens, first)]], [start], [table])
        read, found = [prompt[-1], *tokens[:-1]], list[float]()
        for start in range(0, len(tokens), CHECK_TOKENS):
            part = range(start, min(start + CHECK_TOKENS, len(tokens)))
            logits = self.executor.prefill([read[start : part.stop]], [first + start], [table], every=True)
            logits = penalise(logits, [sampling] * len(part), [(prompt, tokens[:i]) for i in part])
            found += margins(logits, given[start : part.stop], sampling, seed, part)
        return found

    # -- checks -----------------------------------------------------------------------------------------------------

    def _prepare(
        self, prompt: Sequence[int], sampling: Sampling, seed: int, name: str, *, text: bool = False
    ) -> Generation:
        self._check_request(prompt, sampling, name)
        self._check_seed(seed, name)
        if self.decode is None and (text or sampling.stop):
            raise SteelyardError(f"request {name}: text and stop strings need a tokenizer: this engine was given none")
        stream = TextStream(self.decode, sampling.stop) if self.decode and (text or sampling.stop) else None
        return Generation(name, list(prompt), sampling, seed, stream)

    def check_given(self, prompt: Sequence[int], tokens: Sequence[int], name: str) -> None:
        """Raise SteelyardError, naming the request, where the model cannot read `tokens` after `prompt`."""
        if not len(tokens):
            raise SteelyardError(f"request {name}: no tokens after the prompt")
        # The last token is not read: nothing after it is asked for
        self._check_sizes(prompt, len(tokens), len(prompt) + len(tokens) - 1, name)
        self._check_vocabulary(tokens, name)

    def _check_request(self, prompt: Sequence[int], sampling: Sampling, name: str) -> None:
        check_sampling(sampling, name)
        self._check_sizes(prompt, sampling.max_tokens, len(prompt) + sampling.max_tokens, name)
        self._check_vocabulary(sampling.stop_tokens, name)

    def _check_sizes(self, prompt: Sequence[int], new: int, total: int, name: str) -> None:
        if not len(prompt):
            raise SteelyardError(f"request {name}: the prompt is empty: give at least one token (a BOS, say)")
        self._check_vocabulary(prompt, name)
        limit = self.model.config.max_position_embeddings
        if total > limit:
            raise SteelyardError(
                f"request {name}: {len(prompt)} prompt tokens + {new} new ones exceed the context of "
                f"{limit}: shorten the prompt or lower max_tokens (nothing is ever truncated)"
            )
        needed = pages_for(len(prompt), new)
        if needed >= self.pages.count:
            raise SteelyardError(
                f"request {name}: {len(prompt)} prompt tokens + {new} new ones need "
                f"{(needed + 1) * self.page_bytes:,} bytes of cache; this engine has {self.cache_bytes:,}: "
                "raise cache_bytes, or lower max_tokens"
            )

    def _check_seed(self, seed: int, name: str) -> None:
        if not whole(type(seed)):
            raise SteelyardError(f"request {name}: the seed is {quote(seed)}: it must be a whole number")

    def _check_vocabulary(self, tokens: Sequence[int], name: str) -> None:
        vocabulary = self.model.config.vocab_size
        if not all(map(whole, set(map(type, tokens)))):
            odd = next(token for token in tokens if not whole(type(token)))
            raise SteelyardError(f"request {name}: {quote(odd)} is no token id: it must be a whole number")
        if len(tokens) and not (min(tokens) >= 0 and max(tokens) < vocabulary):
            token = next(token for token in tokens if not 0 <= token < vocabulary)
            raise SteelyardError(f"request {name}: token {token} is outside the model's vocabulary of {vocabulary}")

    def begin_alone(self) -> None:
        """Empty the cache; who calls this may use `executor` and `pages` until the next request.

        Raises SteelyardError while there are requests.
        """
        if not self.idle:
            raise SteelyardError("the engine is serving other requests: this needs it alone")
        self._schedule.clear()
        self._cleanse()

    # -- a step -------------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        """Remove all requests. Nobody has looked at all that they hold."""
        self._spoilt += self.pages.held
        self._schedule.clear()

    def _cleanse(self) -> None:
        """Zero what may be spoilt; after a step that ran out of memory this waits for the next one."""
        if self._spoilt:
            self.executor.clear(self._spoilt)
            self._spoilt = []

    def _step(self) -> list[Event]:
        self._cleanse()
        self.counts.steps += 1
        events: list[Event] = []
        if self._schedule.running:
            rows = list(self._schedule.running)
            events += self._extend(rows, self._write(rows))
        plan = self._schedule.plan()
        self._begin(plan, events)
        if plan.parts:
            logits = self.executor.prefill(
                [part.reader.prompt[part.start : part.stop] for part in plan.parts],
                [part.start for part in plan.parts],
                [part.reader.table for part in plan.parts],
            )
            self.counts.prefilled += sum(part.stop - part.start for part in plan.parts)
            ready = Plan()
            for part, row in zip(plan.parts, logits, strict=True):
                begun = self._schedule.read(part, row.clone())  # rows are kept for others, their neighbours not
                ready.copies += begun.copies
                ready.started += begun.started
            self._begin(ready, events)
        return events

    def _begin(self, plan: Plan, events: list[Event]) -> None:
        """Copy pages, and draw the first token of those who begin."""
        for source, target in plan.copies:
            self.executor.copy_page(source, target)
        if plan.started:
            rows = [generation for generation, _ in plan.started]
            self.counts.prompt_tokens += sum(len(generation.prompt) for generation in rows)
            events += self._extend(rows, torch.stack([logits for _, logits in plan.started]))

    def _write(self, rows: list[Generation]) -> Tensor:
        """Read each row's newest token; logits [B, V] for the next."""
        device = self.executor.device
        if self._batch is None or self._batch[0] != rows:
            widest = max(len(generation.table) for generation in rows)
            tables = [generation.table + [0] * (widest - len(generation.table)) for generation in rows]
            self._batch = (rows, torch.tensor(tables, dtype=torch.int32, device=device))
        cached = [generation.cached for generation in rows]
        used = max(cached) // PAGE + 1
        return (self.graphs or self.executor).decode(
            torch.tensor([generation.tokens[-1] for generation in rows], device=device),
            torch.tensor(cached, device=device),
            self._batch[1][:, :used].contiguous(),
        )

    def _extend(self, rows: Sequence[Generation], logits: Tensor) -> list[Event]:
        """Draw a token for each of `rows` and say what became of it."""
        samplings = [generation.sampling for generation in rows]
        penalised = penalise(logits, samplings, [(generation.prompt, generation.tokens) for generation in rows])
        positions = [len(generation.tokens) for generation in rows]
        chosen = choose(penalised, samplings, [generation.seed for generation in rows], positions).tolist()
        asked = [i for i, sampling in enumerate(samplings) if sampling.logprobs is not None and chosen[i] >= 0]
        if asked:
            counts = [samplings[i].logprobs or 0 for i in asked]
            found = log_probabilities(logits[asked], [chosen[i] for i in asked], counts)
            for i, values in zip(asked, found, strict=True):
                rows[i].logprobs.append(values)
        events = [self._take(generation, token, logits.dtype) for generation, token in zip(rows, chosen, strict=True)]
        self._cleanse()  # before anybody takes the pages of those that failed
        return events

    def _take(self, generation: Generation, token: int, dtype: torch.dtype) -> Event:
        if token < 0:
            generation.error = SteelyardError(
                f"request {generation.name}: the model's logits are not finite: its weights are broken, "
                f"or overflow in {str(dtype).removeprefix('torch.')}"
            )
            self._spoilt += self._schedule.withdraw(generation)
            return Event(generation, None, "")
        self.counts.generated += 1
        generation.tokens.append(token)
        text, stream, sampling = "", generation.stream, generation.sampling
        if self._stops(token, sampling):
            generation.finish = "stop"
        elif stream is not None:
            text = stream.push(token)
            if stream.stopped:
                generation.finish = "stop"
        if generation.finish is None and len(generation.tokens) == sampling.max_tokens:
            generation.finish = "length"
        if generation.finish is not None:
            self._schedule.remove(generation)
            if stream is not None:
                text += stream.close(generation.finish)
        generation.unread += text
        return Event(generation, token, text)

    def _stops(self, token: int, sampling: Sampling) -> bool:
        return token in self.eos_ids or token in sampling.stop_tokens

    def _abandon(self, error: BaseException) -> None:
        schedule: Any = self._schedule
        for generation in [*schedule.waiting, *(part.reader for part in schedule.reading), *schedule.running]:
            generation.error = SteelyardError(f"request {generation.name}: given up: {error}")
        self._forget()
        self._batch = None
