"""Conversation to token ids: the one rendering for tests, chat and training alike.

The template's text becomes control tokens; what people wrote never does. Templates run in `template_worker.py`, a
child process with bounds on time, memory and output, because a template is a program from a stranger.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import re
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from steelyard.base.errors import FormatError, SteelyardError, require_extra
from steelyard.model.headers import read_json_object

if TYPE_CHECKING:
    import tokenizers

    from steelyard.model.tokenizer import Tokenizer

TEMPLATE_BYTES = 1 << 20  # the longest in use are under 30 kB
OUTPUT_CHARACTERS = 8 << 20
REPLY_BYTES = 12 * OUTPUT_CHARACTERS + (1 << 16)  # a character takes up to 12 in the worker's JSON
CPU_SECONDS = 2.0  # compiling and rendering take about 10 and 0.1 ms
WALL_SECONDS = 60.0  # for a machine that is busy or asleep; CPU time is the bound that counts
MEMORY_BYTES = 512 << 20
ROLES = ("system", "user", "assistant")
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# A template needs none of the parent's environment, which may hold keys and passphrases.
_KEPT_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "HOME", "LANG", "LC_ALL")


class Turn(Protocol):
    """One turn of a conversation (`inference.endpoint.Message` is one)."""

    @property
    def role(self) -> str: ...
    @property
    def content(self) -> str: ...


class _Worker:
    """A running template worker. Used under `_LOCK` only."""

    def __init__(self) -> None:
        if importlib.util.find_spec("jinja2") is None:
            raise require_extra("jinja2", "models")
        limits = [str(CPU_SECONDS), str(MEMORY_BYTES), str(OUTPUT_CHARACTERS)]
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("template_worker.py")), *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ},
            start_new_session=True,  # Ctrl-C in the terminal is for the parent
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.sink, self.source = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.sink, False)
        os.set_blocking(self.source, False)
        if self.exchange(b"") != b"ready":
            self.end()
            raise SteelyardError("the chat template renderer did not start: check that `import jinja2` works")

    def exchange(self, request: bytes) -> bytes | None:
        """Send a line, read a line (without its end). None where the worker died or the time was up."""
        deadline = time.monotonic() + WALL_SECONDS
        left, reply = memoryview(request), bytearray()
        poll = select.poll()
        poll.register(self.source, select.POLLIN)
        if request:
            poll.register(self.sink, select.POLLOUT)
        while not reply.endswith(b"\n"):
            ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            if not ready:
                return None
            for handle, _ in ready:
                if handle == self.source:
                    data = os.read(self.source, 1 << 20)
                    if not data:
                        return None
                    reply += data
                    if len(reply) > REPLY_BYTES:
                        raise SteelyardError(f"the chat template renderer sent over {REPLY_BYTES:,} bytes")
                else:
                    try:
                        left = left[os.write(self.sink, left) :]
                    except BrokenPipeError:
                        return None
                    if not left:
                        poll.unregister(self.sink)
        return bytes(reply[:-1])

    def end(self) -> int:
        """Kill it; its exit status."""
        self.process.kill()
        status = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        return status


_LOCK = threading.Lock()
_worker: _Worker | None = None


def _forget_worker() -> None:
    # In a forked child: the worker belongs to the parent, and the lock may have been held by a thread that is not here.
    global _LOCK, _worker
    _LOCK, _worker = threading.Lock(), None


def _end_worker() -> None:
    global _worker
    if _worker is not None:
        _worker.end()
        _worker = None


os.register_at_fork(after_in_child=_forget_worker)
atexit.register(_end_worker)


def _render(template: str, variables: Mapping[str, Any]) -> dict[str, str]:
    """The worker's reply; kinds `time` and `crash` are added where it died of this template."""
    global _worker
    request = json.dumps({"template": template, "variables": variables}).encode() + b"\n"
    with _LOCK:
        if _worker is not None and _worker.process.poll() is not None:
            _end_worker()
        worker = _worker = _worker or _Worker()
        try:
            line = worker.exchange(request)
        except BaseException:
            _end_worker()  # a reply read later would be taken for the next request's
            raise
        if line is None:
            alive = worker.process.poll() is None and not _ended_soon(worker.process)
            status, _worker = worker.end(), None
            return {"error": "time" if alive or status == -signal.SIGPROF else "crash", "message": ""}
    reply: dict[str, str] = json.loads(line)
    return reply


def _ended_soon(process: subprocess.Popen[bytes]) -> bool:
    # A pipe closes a moment before its process can be waited for.
    try:
        process.wait(1.0)
    except subprocess.TimeoutExpired:
        return False
    return True


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else line[:297] + "..."


def _settings(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def template_text(folder: Path) -> tuple[str, Path] | None:
    """A model folder's chat template and the file it stands in; None where there is none (or an empty one).

    `chat_template.jinja` wins over `chat_template` in tokenizer_config.json; of a list of named templates the one
    named `default` counts. Raises FormatError for anything else. Needs the core only.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        if path.stat().st_size > TEMPLATE_BYTES:
            raise FormatError(f"{path}: longer than {TEMPLATE_BYTES >> 10} KiB, which no chat template needs")
        try:
            text: Any = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{path}: not UTF-8 ({error})") from error
    else:
        path = folder / "tokenizer_config.json"
        text = _settings(path).get("chat_template")
        if isinstance(text, list):
            if not all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in text):
                raise FormatError(f"{path}: chat_template: a list must hold objects with name and template")
            named = {entry["name"]: entry.get("template") for entry in text}
            if "default" not in named:
                names = ", ".join(named) or "none"
                raise FormatError(f"{path}: chat_template: none of its templates is named default ({names})")
            text = named["default"]
        if text is None:
            return None
        if not isinstance(text, str):
            raise FormatError(f"{path}: chat_template: must be text, is {type(text).__name__}")
        if len(text) > TEMPLATE_BYTES:
            raise FormatError(f"{path}: chat_template: longer than {TEMPLATE_BYTES >> 10} KiB")
    return (text, path) if text else None


def _named_tokens(folder: Path) -> dict[str, str]:
    """`bos_token` and its like as templates know them; tokenizer_config.json wins over special_tokens_map.json."""
    found = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        settings = _settings(folder / name)
        for key in _NAMED_TOKENS:
            value = settings.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                found[key] = value
    return found


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template: its text, the file it came from, and the named tokens it may write."""

    text: str
    origin: Path
    tokens: Mapping[str, str]

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """A model folder's template (see `template_text`); None where it has none."""
        found = template_text(folder)
        return cls(*found, _named_tokens(folder)) if found else None

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        """The conversation as one text, as transformers renders it.

        Raises SteelyardError where the template turns the conversation down (with its own words), is broken, reaches
        outside the sandbox, asks for today's date, or goes past a bound on time, memory or output.
        """
        variables = {
            **self.tokens,
            "messages": list(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        reply = _render(self.text, variables)
        if "text" in reply:
            try:
                reply["text"].encode()
            except UnicodeEncodeError as error:
                raise SteelyardError(
                    f"{self.origin}: the chat template wrote no valid Unicode: {error.reason}"
                ) from error
            return reply["text"]
        message = _one_line(reply["message"])
        if "strftime_now' is undefined" in message:
            message = "asks for today's date, which would make prompts differ from day to day: write a date into it"
        reason = {
            "refused": f"turns this conversation down: {message}",
            "broken": f"is broken or forbidden: {message}",
            "too-long": f"wrote more than {OUTPUT_CHARACTERS:,} characters, and was stopped",
            "memory": f"used more than {MEMORY_BYTES >> 20} MiB of memory, and was stopped",
            "time": f"ran for more than {CPU_SECONDS:g} s, and was stopped",
            "crash": "crashed the process that rendered it",
        }[reply["error"]]
        raise SteelyardError(f"{self.origin}: the chat template {reason}")


@dataclass(frozen=True)
class _Added:
    """An entry of tokenizer.json's added_tokens; `left`/`right`: it swallows the white space on that side."""

    id: int
    left: bool
    right: bool


_BEHIND_TEXT = _Added(-1, False, False)  # what a piece that follows on a text stands behind


class Renderer:
    """Renders prompts of one model folder. Safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        """Load tokenizer, template and system prompt of `folder`. Raises FormatError where one is malformed."""
        from steelyard.model.tokenizer import Tokenizer

        self.folder = folder
        self.tokenizer: Tokenizer = Tokenizer.load(folder)
        self.template = ChatTemplate.load(folder)
        prompt = folder / "system_prompt.txt"
        try:
            self.system_prompt = prompt.read_text(encoding="utf-8") if prompt.is_file() else ""
        except UnicodeDecodeError as error:
            raise FormatError(f"{prompt}: not UTF-8 ({error})") from error

    def prompt_tokens(self, prompt: Sequence[Turn] | str) -> list[int]:
        """Token ids to generate from: a text to continue, or a conversation with the assistant's turn opened.

        A text gets a beginning-of-sequence token where the tokenizer adds one; a conversation has exactly what the
        template writes, as in transformers and vLLM, so none is ever doubled. The text of a control token inside a
        text or a turn is encoded as plain text. Raises SteelyardError for an empty prompt, a role other than system,
        user and assistant, a model without a template asked to chat, and what `ChatTemplate.render` refuses.
        """
        if isinstance(prompt, str):
            _check_text(prompt)
            tokens = self.tokenizer.encode(prompt, bos=self.tokenizer.adds_bos)
        else:
            tokens = self._chat_tokens(prompt)
        if not tokens:
            raise SteelyardError("the prompt is empty: no token to start from")
        return tokens

    def user_turn_tokens(self) -> list[int]:
        """Token ids up to where a user's first words stand: what follows is what the model takes users to say.

        Raises SteelyardError for a template that does not show a user's words once, as they are.
        """
        mark, template = "0b6f1c", self._template()
        messages = [{"role": "user", "content": mark}]
        if self.system_prompt:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        before, *after = template.render(messages, add_generation_prompt=True).split(mark)
        if len(after) != 1:
            raise SteelyardError(f"{self.folder}: the chat template does not show a user's words once, as they are")
        return self.tokenizer.encode(before, bos=False, special=True)

    def messages(self, turns: Sequence[Turn]) -> list[dict[str, str]]:
        """The turns as the template gets them, with the folder's system prompt first where they have none."""
        if not turns:
            raise SteelyardError("the conversation is empty: give at least one message")
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        for number, message in enumerate(messages, 1):
            if message["role"] not in ROLES:
                raise SteelyardError(f"message {number}: role {message['role']!r} is none of {', '.join(ROLES)}")
            _check_text(message["content"])
        if self.system_prompt and all(message["role"] != "system" for message in messages):
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        return messages

    def training_tokens(self, turns: Sequence[Turn]) -> tuple[list[int], list[bool]]:
        """Token ids of a whole conversation, and which of them an assistant's turn teaches.

        Taught are the tokens of each answer up to and with the first token that ends a turn. Each answer is encoded
        apart from the prompt before it, as the model meets it when it generates. Raises SteelyardError where the
        template writes the beginning of a conversation another way once more turns follow (one that drops earlier
        thoughts, or opens a turn with words that the finished turn lacks), and what `prompt_tokens` refuses.
        """
        template, messages = self._template(), self.messages(turns)
        fenced, fence = self._fenced(messages, template)
        text = template.render(fenced, add_generation_prompt=False)
        cuts = [0]
        for number, message in enumerate(fenced):
            if message["role"] == "assistant":
                before = template.render(fenced[:number], add_generation_prompt=True)
                after = template.render(fenced[: number + 1], add_generation_prompt=False)
                if not text.startswith(before) or not text.startswith(after) or len(before) > len(after):
                    raise SteelyardError(
                        f"{template.origin}: the chat template writes the turns before answer {len(cuts) // 2 + 1} "
                        "another way once the answer stands there, so that it cannot be taught token for token: "
                        "train on conversations of one answer, or change the template"
                    )
                cuts += [len(before), len(after)]
        tokens: list[int] = []
        taught: list[bool] = []
        for index, (start, end) in enumerate(zip(cuts, [*cuts[1:], len(text)], strict=True)):
            piece = self._rendered_tokens(text[start:end], fence, start == 0)
            ending = next((place for place, token in enumerate(piece) if token in self.tokenizer.eos_ids), len(piece))
            tokens += piece
            taught += [index % 2 == 1 and place <= ending for place in range(len(piece))]
        return tokens, taught

    def _template(self) -> ChatTemplate:
        if self.template is None:
            raise SteelyardError(
                f"{self.folder}: the model has no chat template: use plain completion, or give one "
                "(chat_template.jinja in its folder)"
            )
        return self.template

    def _chat_tokens(self, turns: Sequence[Turn]) -> list[int]:
        template, messages = self._template(), self.messages(turns)
        if self._control.search("\0".join(message["content"] for message in messages)) is None:
            return self.tokenizer.encode(template.render(messages, add_generation_prompt=True), bos=False, special=True)
        return self._guarded_tokens(messages, template)

    def _guarded_tokens(self, messages: list[dict[str, str]], template: ChatTemplate) -> list[int]:
        fenced, fence = self._fenced(messages, template)
        return self._rendered_tokens(template.render(fenced, add_generation_prompt=True), fence, True)

    def _fenced(self, messages: list[dict[str, str]], template: ChatTemplate) -> tuple[list[dict[str, str]], str]:
        """The messages with a character that nobody uses before the text of each control token, by which that is told
        from the template's own once it is rendered; and that character.
        """
        used = {template.text, *(message["content"] for message in messages)}
        fence = next(chr(code) for code in range(0xF0000, 0xFFFFE) if not any(chr(code) in text for text in used))
        return [
            {**message, "content": self._control.sub(rf"{fence}\g<0>", message["content"])} for message in messages
        ], fence

    def _rendered_tokens(self, rendered: str, fence: str, start: bool) -> list[int]:
        """Tokens of rendered messages that `_fenced` made, or of a piece of them; `start`: nothing stands before it."""
        # A fence whose token the template cut off (by splitting there, say) still stands between two texts.
        pieces = re.split(f"({fence}(?:{self._control.pattern}))|{fence}", rendered)
        tokens: list[int] = []
        text, after = "", None if start else _BEHIND_TEXT
        for index, piece in enumerate(pieces):
            if index % 2:
                text += piece[1:] if piece else ""
                continue
            position = 0
            for match in self._control.finditer(piece):
                control = self._added[match[0]]
                text += piece[position : match.start()]
                tokens += self._text_tokens(text, after, control)
                tokens.append(control.id)
                text, after, position = "", control, match.end()
            text += piece[position:]
        return tokens + self._text_tokens(text, after, None)

    def _text_tokens(self, text: str, after: _Added | None, before: _Added | None) -> list[int]:
        """Tokens of a text between two control tokens, with no control token in them whatever it says."""
        if after is not None and after.right:
            text = text.lstrip()
        if before is not None and before.left:
            text = text.rstrip()
        if not text:
            return []
        tokenizer, mark = self._plain
        # Behind a token the text is not at the start of anything, and gets no space put before it.
        tokens = tokenizer.encode(text if after is None else mark + text, add_special_tokens=False).ids
        tokens = tokens if after is None else tokens[1:]
        if not self._control_ids.isdisjoint(tokens):
            raise SteelyardError(f"{self.folder}: the tokenizer makes a control token of plain text: {text[:80]!r}")
        return tokens

    @cached_property
    def _added(self) -> dict[str, _Added]:
        """The added tokens that control: the special ones, and any other that the template writes."""
        added = {}
        written = self.template.text if self.template else ""
        for entry in _settings(self.folder / "tokenizer.json").get("added_tokens", []):
            if entry["special"] or entry["content"] in written:
                added[entry["content"]] = _Added(entry["id"], entry["lstrip"], entry["rstrip"])
        return added

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Matches a control token's text, the longest there is."""
        longest_first = sorted(self._added, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        return frozenset(token.id for token in self._added.values())

    @cached_property
    def _plain(self) -> tuple[tokenizers.Tokenizer, str]:
        """A tokenizer blind to control tokens, and a text that is one token of its own to it."""
        import tokenizers

        settings = _settings(self.folder / "tokenizer.json")
        for entry in settings.get("added_tokens", []):
            entry["special"] = entry["special"] or entry["content"] in self._added
        plain = tokenizers.Tokenizer.from_str(json.dumps(settings))
        plain.no_truncation()
        plain.no_padding()
        plain.encode_special_tokens = True
        mark = f"<{secrets.token_hex(16)}>"  # nobody can write it, and its token is dropped again
        plain.add_tokens([tokenizers.AddedToken(mark, normalized=False)])
        return plain, mark


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SteelyardError(f"the prompt is not valid Unicode: {error}") from error
