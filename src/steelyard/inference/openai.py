"""Completions from any server that speaks the OpenAI protocol: vLLM, llama.cpp, a hosted service.

A request ends in a completion or in an error that names the address and the request; never in an empty stand-in. What
a server adds of its own (its template, its system prompt, sampling settings the protocol has no field for) is its own:
a remote endpoint proves nothing about the weights behind it.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit, urlunsplit

from steelyard.base.errors import SteelyardError, UsageError, require_extra
from steelyard.inference.endpoint import Completion, Logprob, Request, Sampling, TokenLogprobs

try:
    import httpx
except ImportError:
    raise require_extra("httpx", "models") from None

KEY_VARIABLE = "STEELYARD_API_KEY"
BODY_BYTES = 16 << 20  # an answer of 100,000 tokens takes about 1 MB
BACKOFF_S = 0.5  # before the second try; doubles with every further one
LONGEST_WAIT_S = 60.0  # whatever a server's Retry-After asks for
RETRIED_STATUS = frozenset({408, 409, 429, *range(500, 600)})
KEY_PART = 8  # characters of a key that give it away in an excerpt that cuts it
_FINISH: dict[str, Literal["stop", "length"]] = {"stop": "stop", "length": "length"}
T = TypeVar("T")


class _TryAgainError(Exception):
    """A failure that may pass; `wait_s` is what the server asked for, if it did."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class OpenAIEndpoint:
    """An Endpoint over HTTP."""

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        concurrency: int = 8,
        timeout_s: float = 60.0,
        retries: int = 5,
    ) -> None:
        """`base_url`: `http://host:8000` (then `/v1` is added) or an address with its path, `https://host/openai/v1`.

        `api_key` is sent as a bearer token; without it, the environment's STEELYARD_API_KEY is, if set. `concurrency`
        requests are under way at once, each try at most `timeout_s` seconds, with at most `retries` tries after the
        first. Raises UsageError for settings that can't work; opens no connection.
        """
        try:
            parts = urlsplit(base_url)
            well_formed = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            httpx.URL(base_url)
        except (ValueError, httpx.InvalidURL):
            well_formed = False
        if not well_formed:
            raise UsageError("base_url: must be an http:// or https:// address, such as http://localhost:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise UsageError(
                f"base_url: must hold no user, password, query or fragment: give the key in {KEY_VARIABLE}"
            )
        if not model:
            raise UsageError("model: must name a model that the server serves")
        if concurrency < 1 or retries < 0 or not (0 < timeout_s < math.inf):
            raise UsageError("concurrency must be at least 1, retries at least 0, timeout_s a positive time")
        key = api_key if api_key is not None else os.environ.get(KEY_VARIABLE, "")
        if not (key.isascii() and key.isprintable() and " " not in key):
            raise UsageError(f"the API key (argument or {KEY_VARIABLE}) holds characters no HTTP header can carry")
        path = parts.path.rstrip("/") or "/v1"
        self.base_url = urlunsplit((parts.scheme, parts.netloc, path, "", ""))
        self.model, self.concurrency, self.timeout_s, self.retries = model, concurrency, timeout_s, retries
        self._key = key

    def __repr__(self) -> str:
        return f"OpenAIEndpoint({self.base_url!r}, {self.model!r})"

    def identity(self) -> dict[str, Any]:
        """`kind` (`remote`), `base_url` and `model`: a claim of the server's, not a proof."""
        return {"kind": "remote", "base_url": self.base_url, "model": self.model}

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order. Raises SteelyardError at the first that fails for good.

        A conversation goes to `/chat/completions`, text to `/completions`. Statuses 408, 409, 429 and 5xx, failed
        connections and time-outs are tried again. Redirects are not followed, so the key goes to `base_url` alone.
        Sampling settings that the protocol has no field for are refused before anything is sent.
        """
        for request in requests:
            self._check_settings(request)
        return _run(self._each(self._complete, requests))

    def attempt(self, requests: Sequence[Request]) -> list[Completion | SteelyardError]:
        """As `generate`, but a request that fails for good leaves its error in its place, and the others go on."""
        for request in requests:
            self._check_settings(request)
        return _run(self._each(_settled(self._complete), requests))

    def post(self, path: str, bodies: Mapping[str, Mapping[str, Any]]) -> list[Any]:
        """What `base_url`/`path` answers to each body, in order: a JSON value, or the SteelyardError of a body that
        fails for good, which names its key in `bodies`. Tries and bounds are those of `generate`."""

        async def one(client: httpx.AsyncClient, job: tuple[str, Mapping[str, Any]]) -> Any:
            return await self._answer(client, f"{self.base_url}/{path}", *job)

        return _run(self._each(_settled(one), list(bodies.items())))

    def redacted(self, text: str) -> str:
        """`text` on one line and without the API key: some servers quote the key they refuse. Of a key that an excerpt
        cuts, whatever follows its first KEY_PART characters goes too."""
        if self._key:
            text = re.sub(re.escape(self._key[:KEY_PART]) + r"\S*", "***", text)
        return "".join(c if c.isprintable() else " " for c in text)

    def _check_settings(self, request: Request) -> None:
        """Refuse what the protocol has no field for: servers would ignore it, or each call it something else."""
        sampling, plain = request.sampling, Sampling()
        for name in ("min_p", "repetition_penalty", "stop_tokens"):
            if getattr(sampling, name) != getattr(plain, name):
                reason = f"{name}: the OpenAI protocol has no such setting: leave it out, or use a local endpoint"
                raise self._error(self._url(request), request.id, reason)

    def _url(self, request: Request) -> str:
        return f"{self.base_url}/{'completions' if isinstance(request.prompt, str) else 'chat/completions'}"

    async def _each(self, work: Callable[[httpx.AsyncClient, Any], Awaitable[T]], jobs: Sequence[Any]) -> list[T]:
        """`work` on each job, `concurrency` at once; the first that raises ends the others."""
        done: dict[int, T] = {}
        queue = iter(enumerate(jobs))
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"

        async def worker(client: httpx.AsyncClient, queue: Iterator[tuple[int, Any]]) -> None:
            for index, job in queue:
                done[index] = await work(client, job)

        try:
            async with (
                httpx.AsyncClient(headers=headers, timeout=self.timeout_s, follow_redirects=False) as client,
                asyncio.TaskGroup() as group,
            ):
                for _ in range(min(self.concurrency, len(jobs))):
                    group.create_task(worker(client, queue))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [done[index] for index in range(len(jobs))]

    async def _answer(self, client: httpx.AsyncClient, url: str, name: str, content: Mapping[str, Any]) -> Any:
        """The JSON value answered to `content`, after as many tries as it takes and may. Raises SteelyardError."""
        body = json.dumps(content).encode()
        for attempt in range(self.retries + 1):
            try:
                async with asyncio.timeout(self.timeout_s):
                    return await self._post(client, url, body)
            except TimeoutError:
                failure = _TryAgainError(f"no answer within {self.timeout_s:g} s")
            except (httpx.UnsupportedProtocol, httpx.LocalProtocolError) as error:
                raise self._error(url, name, f"the request can't be sent: {type(error).__name__}") from None
            except httpx.TransportError as error:
                failure = _TryAgainError(f"{type(error).__name__}: {error}".rstrip(": "))
            except _TryAgainError as error:
                failure = error
            except SteelyardError as error:
                raise self._error(url, name, str(error)) from None
            if attempt == self.retries:
                break
            # Half of the wait is drawn anew each time, so that clients turned away together don't return together.
            wait = BACKOFF_S * 2**attempt * random.uniform(0.5, 1.0) if failure.wait_s is None else failure.wait_s
            await asyncio.sleep(min(wait, LONGEST_WAIT_S))
        raise self._error(url, name, f"gave up after {self.retries + 1} tries, the last: {failure}")

    async def _complete(self, client: httpx.AsyncClient, request: Request) -> Completion:
        chat = not isinstance(request.prompt, str)
        url = self._url(request)
        answer = await self._answer(client, url, request.id, self._body(request))
        try:
            text, finish = _read_answer(answer, chat=chat)
            logprobs = None if request.sampling.logprobs is None else _read_logprobs(answer["choices"][0], chat=chat)
        except SteelyardError as error:
            raise self._error(url, request.id, str(error)) from None
        stops = [text.find(stop) for stop in request.sampling.stop if stop in text]
        if stops:  # a server that sends the stop string along, or ignored it
            text, finish = text[: min(stops)], "stop"
        return Completion(id=request.id, text=text, finish=finish, prompt_tokens=None, tokens=None, logprobs=logprobs)

    def _body(self, request: Request) -> dict[str, Any]:
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": request.seed,
            "stream": False,
        }
        if isinstance(request.prompt, str):
            body["prompt"] = request.prompt
        else:
            body["messages"] = [{"role": message.role, "content": message.content} for message in request.prompt]
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if sampling.top_k > 0:  # not of OpenAI's own protocol, but of every open server's
            body["top_k"] = sampling.top_k
        if sampling.presence_penalty:
            body["presence_penalty"] = sampling.presence_penalty
        if sampling.frequency_penalty:
            body["frequency_penalty"] = sampling.frequency_penalty
        if sampling.logprobs is not None and isinstance(request.prompt, str):
            body["logprobs"] = sampling.logprobs
        elif sampling.logprobs is not None:
            body["logprobs"], body["top_logprobs"] = True, sampling.logprobs
        return body

    async def _post(self, client: httpx.AsyncClient, url: str, body: bytes) -> Any:
        """The JSON value answered with status 200. Raises _TryAgainError, httpx.TransportError, SteelyardError."""
        headers = {"Content-Type": "application/json"}
        async with client.stream("POST", url, content=body, headers=headers) as response:
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise SteelyardError("the answer is compressed, though that was declined")
            content = bytearray()
            async for chunk in response.aiter_raw():
                content += chunk
                if len(content) > BODY_BYTES:
                    raise SteelyardError(f"the answer is longer than {BODY_BYTES >> 20} MiB")
            kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
            if response.status_code in RETRIED_STATUS:
                raise _TryAgainError(_status_line(response, content), _wait_asked(response))
            if response.is_redirect:
                where = _excerpt(response.headers.get("Location", "nowhere").encode())
                raise SteelyardError(
                    f"HTTP {response.status_code}, a redirect to {where!r}: give the final address as base_url"
                )
            if response.status_code != 200:
                raise SteelyardError(_status_line(response, content))
            if kind != "application/json":
                said = _excerpt(kind.encode()) or "without a type"
                raise SteelyardError(f"answered {said}, not JSON: is this an OpenAI-style server?")
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise SteelyardError(f"the answer is not valid JSON ({error}): {_excerpt(content)}") from None

    def _error(self, url: str, name: str, reason: str) -> SteelyardError:
        return SteelyardError(self.redacted(f"{url}: request {name!r}: {reason}"))


def _settled(
    work: Callable[[httpx.AsyncClient, Any], Awaitable[T]],
) -> Callable[[httpx.AsyncClient, Any], Awaitable[T | SteelyardError]]:
    async def settled(client: httpx.AsyncClient, job: Any) -> T | SteelyardError:
        try:
            return await work(client, job)
        except SteelyardError as error:
            return error

    return settled


def _run(work: Coroutine[Any, Any, T]) -> T:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:  # the caller has a loop of its own, as notebooks do
        return pool.submit(asyncio.run, work).result()


def _read_logprobs(choice: dict[str, Any], *, chat: bool) -> tuple[TokenLogprobs, ...]:
    """The log-probabilities of a choice; SteelyardError where they are not as the protocol has them."""
    try:
        found = choice["logprobs"]
        if chat:
            return tuple(
                TokenLogprobs(
                    _logprob(item["token"], item["logprob"]),
                    tuple(_logprob(top["token"], top["logprob"]) for top in item["top_logprobs"]),
                )
                for item in found["content"]
            )
        tops = found.get("top_logprobs") or [None] * len(found["tokens"])
        return tuple(
            TokenLogprobs(_logprob(token, value), tuple(_logprob(*top) for top in (best or {}).items()))
            for token, value, best in zip(found["tokens"], found["token_logprobs"], tops, strict=True)
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise SteelyardError("the answer has no logprobs as the protocol has them, though asked for") from None


def _logprob(text: Any, value: Any) -> Logprob:
    if not isinstance(text, str) or isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    return Logprob(None, text, float(value))


def _read_answer(answer: Any, *, chat: bool) -> tuple[str, Literal["stop", "length"]]:
    """Text and finish of a response object; SteelyardError says what it lacks."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list):
        raise SteelyardError(f"the answer has no list of choices: {_excerpt(json.dumps(answer).encode())}")
    if len(choices) != 1:
        raise SteelyardError(f"the answer has {len(choices)} choices, not the one asked for")
    choice = choices[0] if isinstance(choices[0], dict) else {}
    reason = choice.get("finish_reason")
    if not isinstance(reason, str) or reason not in _FINISH:
        said = _excerpt(repr(reason).encode(errors="replace"))
        raise SteelyardError(f"finish_reason is {said}: the server withheld or cut its answer (stop or length wanted)")
    holder = choice.get("message") if chat else choice
    name, where = ("content", "message.content") if chat else ("text", "text")
    if not isinstance(holder, dict) or name not in holder:
        raise SteelyardError(f"the answer has no {where}")
    text = holder[name]
    if not isinstance(text, str):
        raise SteelyardError(f"{where} is {'null' if text is None else type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise SteelyardError(f"{where} is not valid Unicode") from None
    return text, _FINISH[reason]


def _status_line(response: httpx.Response, content: bytes | bytearray) -> str:
    """`HTTP 429 (what the server says)`, the message picked out of an OpenAI-style error object."""
    said = _excerpt(content)
    try:
        error = json.loads(content)["error"]
        said = _excerpt(str(error["message"] if isinstance(error, dict) else error).encode())
    except (ValueError, KeyError, TypeError, RecursionError):
        pass  # the body as it is
    return f"HTTP {response.status_code}" + (f" ({said})" if said else "")


def _excerpt(content: bytes | bytearray) -> str:
    text = " ".join(content[:1000].decode(errors="replace").split())
    return text if len(text) <= 200 else text[:197] + "..."


def _wait_asked(response: httpx.Response) -> float | None:
    """Seconds to wait by the Retry-After header (a number or a date); None where it is absent or makes no sense."""
    value = response.headers.get("Retry-After", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            when = parsedate_to_datetime(value)
            when = when if when.tzinfo else when.replace(tzinfo=UTC)
            seconds = when.timestamp() - datetime.now(UTC).timestamp()
        except (ValueError, TypeError, OverflowError):  # the last for the year 10^20
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
