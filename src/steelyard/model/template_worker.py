"""The child process that renders chat templates, so that a hostile template can hurt nobody but itself.

A chat template is a program that came with somebody's weights. It runs here in Jinja's immutable sandbox, in a process
that may open no file, start no process, use little memory and little CPU time. `chat.py` starts it by path, one for
each process, and talks JSON lines with it; only jinja2 and the standard library are imported.

Arguments: CPU seconds for one rendering, bytes of address space, characters of output.
Request:  {"template": text, "variables": {...}}
Reply:    {"text": rendered} or {"error": kind, "message": text}, kind one of refused, broken, too-long, memory.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

MESSAGE = 2000  # characters of one


class Refused(jinja2.TemplateError):
    """The template itself turned the conversation down, through raise_exception."""


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training in some templates; it renders as its body."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def raise_exception(message: str) -> None:
    """What templates call to turn a conversation down."""
    raise Refused(str(message)[:MESSAGE])


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers' templates expect it: without Jinja's escaping for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The environment transformers renders with, less what gives another text at another time (clock, random)."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    del made.filters["random"], made.globals["lipsum"]
    return made


ENVIRONMENT = environment()


@lru_cache(maxsize=64)
def compiled(text: str) -> jinja2.Template:
    """The template, compiled once."""
    return ENVIRONMENT.from_string(text)


def render(text: str, variables: dict[str, Any], limit: int) -> dict[str, str]:
    """Render within `limit` characters; the reply to send."""
    pieces, length = [], 0
    try:
        for piece in compiled(text).generate(**variables):
            pieces.append(piece)
            length += len(piece)
            if length > limit:
                return {"error": "too-long", "message": ""}
        return {"text": "".join(pieces)}
    except Refused as error:
        return {"error": "refused", "message": str(error)[:MESSAGE]}
    except MemoryError:
        return {"error": "memory", "message": ""}
    except Exception as error:
        return {"error": "broken", "message": f"{type(error).__name__}: {error}"[:MESSAGE]}


def main(cpu_seconds: float, memory: int, limit: int) -> None:
    """Answer requests until standard input ends (as it does when the parent dies)."""
    # Codecs and modules that Jinja loads at first use must be there before files are out of reach.
    render("{{ 'a\\n' ~ 1 | pprint }}{{ missing.attribute }}", {}, limit)
    if sys.platform == "linux":  # elsewhere address space can't be limited: the time bound stands alone
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sink.write(b"ready\n")
    sink.flush()
    while line := source.readline():
        request = json.loads(line)
        # SIGPROF's default action ends this process even inside a C call, such as 9**9**9, that no exception reaches.
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        reply = render(request["template"], request["variables"], limit)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sink.write(json.dumps(reply).encode() + b"\n")
        sink.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
