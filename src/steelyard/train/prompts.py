"""Prompts to answer, out of a JSONL file.

    {"prompt": "Why is the sky blue?"}
    {"id": "sky-2", "messages": [{"role": "user", "content": "Why is the sky blue?"}]}

A prompt without an id is named by its line.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from steelyard.base.errors import FormatError
from steelyard.base.files import read_bounded
from steelyard.inference.endpoint import Message
from steelyard.train.answers import Prompt, check_prompts

MAX_BYTES = 256 << 20


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of `path`. Raises FormatError naming line and field, UsageError where there is none or two share an
    id.
    """
    try:
        text = read_bounded(path, MAX_BYTES).decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not UTF-8 ({error})") from error
    prompts = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{where}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise FormatError(f"{where}: must be an object")
        name = row.get("id", f"line-{number}")
        if not isinstance(name, str) or not name:
            raise FormatError(f"{where}: id: must be a text")
        prompts.append(Prompt(name, _messages(where, row)))
    check_prompts(prompts)
    return prompts


def _messages(where: str, row: dict[str, Any]) -> tuple[Message, ...]:
    if isinstance(row.get("prompt"), str) and row["prompt"].strip():
        return (Message("user", row["prompt"]),)
    turns = row.get("messages")
    if not isinstance(turns, list) or not turns:
        raise FormatError(f"{where}: has neither a prompt nor messages")
    found = []
    for number, turn in enumerate(turns):
        field = f"{where}: messages.{number}"
        if not isinstance(turn, dict) or turn.get("role") not in ("system", "user", "assistant"):
            raise FormatError(f"{field}.role: must be system, user or assistant")
        if not isinstance(turn.get("content"), str):
            raise FormatError(f"{field}.content: must be text")
        found.append(Message(turn["role"], turn["content"]))
    return tuple(found)
