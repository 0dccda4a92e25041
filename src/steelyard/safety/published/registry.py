"""From a set's name, and where its data is, to its adapter and a path."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

from steelyard.base.errors import UsageError
from steelyard.base.files import inside
from steelyard.base.progress import Progress
from steelyard.base.yamlfile import nearest
from steelyard.hub.sources import fetch_data
from steelyard.safety.published import choices, continuations, descriptors, harmful, leakage
from steelyard.safety.published.adapter import Adapter
from steelyard.safety.published.custom import custom_adapter

ADAPTERS: dict[str, Adapter] = {
    adapter.name: adapter
    for module in (continuations, harmful, choices, descriptors, leakage)
    for adapter in module.ADAPTERS
}


def adapter_of(name: str) -> tuple[Adapter, str | None]:
    """(the set of that name, or of that .yaml file; the scorer its file names). Raises UsageError."""
    if name.endswith((".yaml", ".yml")):
        return custom_adapter(Path(name))
    if name not in ADAPTERS:
        known = ", ".join(ADAPTERS)
        raise UsageError(f"set {name!r} is unknown{nearest(name, ADAPTERS)}: give one of {known}, or a .yaml file")
    return ADAPTERS[name], None


def locate(adapter: Adapter, data: str | None, cache: Path, progress: Progress) -> Path:
    """Where the set's files are: a path, `hf://datasets/ORG/NAME@REVISION/PATH`, `python:PACKAGE/PATH` (a file of an
    installed package, which is not imported), or what the set names itself. Raises UsageError where nothing does."""
    if data is None:
        if adapter.data is None:
            raise UsageError(
                f"set {adapter.name}: its data is not part of this package: give --data PATH, "
                "hf://datasets/ORG/NAME@REVISION/PATH or python:PACKAGE/PATH"
            )
        path = adapter.data
    elif data.startswith("hf://"):
        return fetch_data(data, cache, progress)
    elif data.startswith("python:"):
        package, _, rest = data.removeprefix("python:").partition("/")
        path = inside(_package(package, data), rest)
    else:
        path = Path(data).expanduser()
    if not path.exists():
        raise UsageError(f"set {adapter.name}: {path}: no such file or folder")
    return path


def _package(name: str, data: str) -> Path:
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"--data {data}: no package {name!r} is installed: write python:PACKAGE/PATH")
    return Path(next(iter(spec.submodule_search_locations)))


def with_settings(adapter: Adapter, *, samples: int | None = None, max_tokens: int | None = None) -> Adapter:
    """The adapter with the user's own numbers in place of its authors'."""
    return replace(
        adapter,
        samples=adapter.samples if samples is None else samples,
        max_tokens=adapter.max_tokens if max_tokens is None else max_tokens,
        sampling=adapter.sampling
        if adapter.sampling is None or max_tokens is None
        else replace(adapter.sampling, max_tokens=max_tokens),
    )
