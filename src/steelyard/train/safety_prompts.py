"""The prompts of the align stage, written for this project: wishes with and without harm, put in the same words.

A phrase (`pick a lock that is not mine`, `pick the ripest melon`) meets several forms (`How do I {}?`), drawn from its
own hash, so that neither the form nor a single word tells harm from harmlessness. What they are and how they were
checked against the test sets stands in `align/README.md`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from steelyard.base.canonical import digest, sha256_file, sha256_hex
from steelyard.base.errors import FormatError
from steelyard.inference.endpoint import Message

FOLDER = Path(__file__).parent / "align"
_NOT_PROMPTS = ("forms.yaml", "preprompts.yaml")
HELD_OUT = 8  # one phrase in so many is never trained on


@dataclass(frozen=True)
class WrittenPrompt:
    """One prompt. `held_out` goes by phrase, so that no other form of a held-out phrase is trained on."""

    id: str
    text: str
    hazard: str
    harmful: bool
    held_out: bool


def written_prompts(forms_per_phrase: int = 2, folder: Path = FOLDER) -> list[WrittenPrompt]:
    """All prompts, in the order of the files. Raises FormatError naming file and key for what can't be read."""
    forms = _read(folder / "forms.yaml")
    found: dict[str, WrittenPrompt] = {}
    for path in sorted(folder.glob("*.yaml")):
        if path.name in _NOT_PROMPTS:
            continue
        for hazard, sides in _read(path).items():
            for side, kinds in sides.items():
                if side not in ("harmful", "harmless"):
                    raise FormatError(f"{path}: {hazard}.{side}: must be harmful or harmless")
                for kind, phrases in kinds.items():
                    if kind != "asks" and kind not in forms:
                        raise FormatError(f"{path}: {hazard}.{side}.{kind}: must be asks or one of {', '.join(forms)}")
                    for phrase in phrases:
                        for text in _put(phrase, forms.get(kind), forms_per_phrase):
                            name = (
                                f"{hazard}.{'harm' if side == 'harmful' else 'fine'}.{sha256_hex(text.encode())[:10]}"
                            )
                            if name in found:
                                raise FormatError(f"{path}: {hazard}.{side}: {text!r} stands there twice")
                            held = int(sha256_hex(f"held out {phrase}".encode()), 16) % HELD_OUT == 0
                            found[name] = WrittenPrompt(name, text, hazard, side == "harmful", held)
    return list(found.values())


def _put(phrase: str, forms: list[str] | None, count: int) -> list[str]:
    if forms is None:
        return [phrase]
    drawn = sorted(forms, key=lambda form: sha256_hex(f"{phrase}|{form}".encode()))
    return [form.replace("{}", phrase) for form in drawn[:count]]


def preprompts(folder: Path = FOLDER) -> dict[str, tuple[Message, ...]]:
    """By hazard: the system message and turns that show how such requests are declined. Raises FormatError."""
    path = folder / "preprompts.yaml"
    written = _read(path)
    found: dict[str, tuple[Message, ...]] = {}
    for name, group in written["groups"].items():
        messages = [Message("system", written["system"].strip())]
        for turn in group["turns"]:
            if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
                raise FormatError(f"{path}: groups.{name}.turns: each must be a question and its answer")
            messages += [Message("user", turn[0]), Message("assistant", turn[1])]
        found |= dict.fromkeys(group["hazards"], tuple(messages))
    return found


def prompts_digest(folder: Path = FOLDER) -> str:
    """Digest of all that stands in the folder's YAML files."""
    return digest([[path.name, sha256_file(path)] for path in sorted(folder.glob("*.yaml"))])


def _read(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise FormatError(
            f"{path}: cannot be read ({' '.join(str(error).split())}): install the package again"
        ) from error
    if not isinstance(found, dict):
        raise FormatError(f"{path}: must be a mapping")
    return found
