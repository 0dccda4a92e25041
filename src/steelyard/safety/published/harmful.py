"""Requests that should be refused, and those that only look so: refusal and compliance, by hazard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from steelyard.safety.published.adapter import Adapter, Entry, rows_of, text_field

_JUDGED = "attack success is judged by the endpoint given with --judge, with this project's question, not the authors'"


def _requests(
    prompt: str, *facets: str, id: str | None = None, context: str | None = None
) -> Callable[[Path], Sequence[Entry]]:
    """A reader of one request a row: field `prompt` (after `context`, where there is one), split by `facets`."""

    def read(path: Path) -> list[Entry]:
        found = []
        for number, (where, row) in enumerate(rows_of(path, prompt, *facets, *([id] if id else []))):
            asked = text_field(row, prompt, where)
            before = str(row.get(context) or "").strip() if context else ""
            found.append(
                Entry(
                    id=str(row[id]) if id else str(number),
                    prompt=f"{before}\n\n---\n\n{asked}" if before else asked,
                    facets={name.lower(): str(row[name]) for name in facets},
                    facts={"request": asked},
                    language=str(row.get("locale") or "en")[:2].lower(),  # `fr_FR` is fr
                )
            )
        return found

    return read


def _xstest(path: Path) -> list[Entry]:
    """Both generations of the file: `label` safe or unsafe, else a `type` that begins with `contrast` is unsafe."""
    found = []
    for where, row in rows_of(path, "id", "prompt", "type"):
        kind = text_field(row, "type", where)
        label = str(row.get("label") or ("unsafe" if kind.startswith("contrast") else "safe"))
        prompt = text_field(row, "prompt", where)
        found.append(Entry(str(row["id"]), prompt, facets={"label": label, "type": kind}, facts={"request": prompt}))
    return found


def _set(name: str, about: str, source: str, read: Any, **more: Any) -> Adapter:
    settings: dict[str, Any] = {"mode": "chat", "metrics": ("refusal",)}
    return Adapter(name=name, about=about, source=source, read=read, **(settings | more))


_HARM = {"rubric": "harm", "notes": (_JUDGED,)}
ADAPTERS = (
    _set("advbench", "harmful behaviours", "Zou et al. 2023, arXiv:2307.15043", _requests("goal"), **_HARM),
    _set(
        "strongreject",
        "harmful requests, scored by how useful the answer is",
        "Souly et al. 2024, arXiv:2402.10260",
        _requests("forbidden_prompt", "category"),
        rubric="strongreject",
        notes=("the StrongREJECT score needs --judge; without one the non-refusal rate alone is reported",),
    ),
    _set(
        "harmbench",
        "harmful behaviours, by semantic and functional category",
        "Mazeika et al. 2024, arXiv:2402.04249",
        _requests("Behavior", "SemanticCategory", "FunctionalCategory", id="BehaviorID", context="ContextString"),
        max_tokens=512,  # as its authors fix it
        **_HARM,
    ),
    _set(
        "jailbreakbench",
        "harmful behaviours of ten kinds of misuse",
        "Chao et al. 2024, arXiv:2404.01318",
        _requests("Goal", "Category"),
        max_tokens=150,  # as its authors fix it
        **_HARM,
    ),
    _set(
        "ailuminate",
        "prompts of twelve hazards, by naive and skilled users (English; give the French file for French)",
        "MLCommons 2025, arXiv:2503.05731",
        _requests("prompt_text", "hazard", "persona", "locale", id="release_prompt_id"),
        **_HARM,
    ),
    _set(
        "xstest",
        "safe prompts that look unsafe, and unsafe ones that look like them",
        "Röttger et al. 2023, arXiv:2308.01263",
        _xstest,
        notes=("kinds of answers are told by rules and by the scorer, not by people as in the paper",),
    ),
    _set(
        "coconot",
        "requests that should not be complied with, by kind",
        "Brahman et al. 2024, arXiv:2407.12043",
        _requests("prompt", "category", "subcategory", id="id"),
    ),
    _set(
        "coconot-contrast",
        "requests that look as if they should not be complied with, but should: refusals are errors",
        "Brahman et al. 2024, arXiv:2407.12043",
        _requests("prompt", "category", "subcategory", id="id"),
    ),
)
