"""`steelyard chat`: talk to a model folder, as it would be shipped."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from steelyard.base.errors import UsageError
from steelyard.cli.options import ModelFolder


def chat(
    folder: ModelFolder,
    prompt: Annotated[str | None, typer.Option(help="Answer this one prompt and stop.")] = None,
    system: Annotated[str | None, typer.Option(help="A system prompt in place of the model's own.")] = None,
    completion: Annotated[bool, typer.Option("--completion", help="Continue plain text; no chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first answer; counts up by one an answer.")] = 0,
) -> None:
    """Chat on a terminal, or answer one --prompt. Ctrl-C ends an answer, an empty line or Ctrl-C the chat."""
    if prompt is not None and not prompt.strip():
        raise UsageError("--prompt is empty: nothing to answer")
    if completion and system is not None:
        raise UsageError("--system with --completion: plain text has no system prompt: leave one of the two out")
    from dataclasses import replace

    from steelyard.inference.endpoint import Message, Request
    from steelyard.inference.local import LocalEndpoint
    from steelyard.safety.shipped import shipped_sampling

    endpoint = LocalEndpoint.open(folder)
    sampling = replace(shipped_sampling(folder), max_tokens=max_tokens)
    turns: list[Message] = [Message("system", system)] if system is not None else []
    while True:
        try:
            text = prompt if prompt is not None else _ask()
        except KeyboardInterrupt:
            print(flush=True)
            return
        if not text.strip():
            return
        turns.append(Message("user", text))
        asked = text if completion else tuple(turns)
        answer = ""
        pieces = endpoint.stream(Request(id="chat", prompt=asked, sampling=sampling, seed=seed))
        try:
            for piece in pieces:
                answer += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pieces.close()  # frees the request's row
            if prompt is not None:
                raise
        print(flush=True)
        if prompt is not None:
            return
        turns.append(Message("assistant", answer))
        seed += 1


def _ask() -> str:
    if sys.stdin.isatty():
        print("> ", end="", flush=True)
    return sys.stdin.readline()
