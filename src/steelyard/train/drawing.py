"""Answers that are kept as they are drawn: a run that was killed draws only what it lacks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steelyard.base.canonical import sha256_hex
from steelyard.base.progress import Progress
from steelyard.inference.endpoint import Completion, Endpoint, Request


class KeptAnswers:
    """An endpoint that gives from the file `path` what it holds, and draws the rest from `open_endpoint()`, which is
    called where something is lacking and not before.

    A line holds an answer under a digest of `model` (what names the weights), conversation, sampling and seed, so
    answers of another model or to other settings are never taken. A line that a kill cut off is drawn again. With
    `keep` False the file is read and not written: one process writes it.
    """

    def __init__(
        self, path: Path, model: str, open_endpoint: Callable[[], Endpoint], progress: Progress, *, keep: bool = True
    ) -> None:
        self._path, self._model, self._open, self._keep = path, model, open_endpoint, keep
        self._endpoint: Endpoint | None = None
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if keep and len(whole) < len(data):
            os.truncate(path, len(whole))
        self._found = dict(filter(None, map(_read, whole.splitlines())))
        if self._found:
            progress.say(f"{path}: holds {len(self._found):,} answers drawn before; they are not drawn again")

    def identity(self) -> dict[str, Any]:
        return self._opened().identity()

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order; without tokens. Raises what the endpoint raises."""
        keys = [self._key(request) for request in requests]
        lacking = {key: request for key, request in zip(keys, requests, strict=True) if key not in self._found}
        if lacking:
            drawn = self._opened().generate(list(lacking.values()))
            self._add(list(lacking), drawn)
        return [Completion(r.id, *self._found[key], None, None) for key, r in zip(keys, requests, strict=True)]

    def _opened(self) -> Endpoint:
        self._endpoint = self._endpoint or self._open()
        return self._endpoint

    def _add(self, keys: Sequence[str], drawn: Sequence[Completion]) -> None:
        lines = []
        for key, one in zip(keys, drawn, strict=True):
            self._found[key] = (one.text, one.finish)
            lines.append(json.dumps({"key": key, "text": one.text, "finish": one.finish}) + "\n")
        if not self._keep:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            file.write("".join(lines).encode())
            file.flush()
            os.fsync(file.fileno())

    def _key(self, request: Request) -> str:
        prompt = request.prompt if isinstance(request.prompt, str) else [[m.role, m.content] for m in request.prompt]
        asked = [self._model, prompt, asdict(request.sampling), request.seed]
        return sha256_hex(json.dumps(asked, sort_keys=True).encode())


def _read(line: bytes) -> tuple[str, tuple[str, Any]] | None:
    """Key, text and finish; None for a line that is none of ours."""
    try:
        row = json.loads(line)
        key, text, finish = row["key"], row["text"], row["finish"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    fits = isinstance(key, str) and isinstance(text, str) and finish in ("stop", "length")
    return (key, (text, finish)) if fits else None
