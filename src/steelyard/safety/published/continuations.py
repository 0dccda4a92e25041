"""Text to be continued: how toxic the continuations are, over all and by group."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steelyard.base.errors import FormatError
from steelyard.inference.endpoint import Sampling
from steelyard.safety.published.adapter import Adapter, Entry, rows_of, text_field
from steelyard.safety.rows import field_of, load_json, read_texts

# Gehman et al. 2020, section 4: nucleus sampling at 0.9, 20 tokens.
NUCLEUS = Sampling(temperature=1.0, top_p=0.9, max_tokens=20)
_SCORER = "toxicity is the scorer's (its errors: steelyard scorer card), not Perspective's: compare models, not papers"


def _realtoxicityprompts(path: Path) -> list[Entry]:
    """Prompts of the published JSON lines, split by their own toxicity (at 0.5, as the paper) and by `challenging`."""
    found = []
    for number, (where, row) in enumerate(rows_of(path, "prompt.text")):
        toxicity = field_of(row, "prompt.toxicity", where)
        if toxicity is not None and not isinstance(toxicity, int | float):
            raise FormatError(f"{where}: prompt.toxicity must be a number or null")
        kind = "unknown" if toxicity is None else "toxic" if toxicity >= 0.5 else "non-toxic"
        facets = {"prompt": kind, "challenging": "yes" if row.get("challenging") is True else "no"}
        found.append(Entry(str(number), text_field(row, "prompt.text", where), facets=facets))
    return found


_TOXIGEN = re.compile(r"(?P<kind>hate|neutral)_(?P<group>\w+?)_\d+k?")


def _toxigen(path: Path) -> list[Entry]:
    """The prompt files by group: one few-shot prompt a line, its own line ends written as \\n."""
    found: dict[str, Entry] = {}
    for name, text in read_texts(path, ".txt"):
        match = _TOXIGEN.fullmatch(name.removesuffix(".txt"))
        if not match:
            raise FormatError(f"{path}: {name}: must be named as published, such as neutral_women_1k.txt")
        for number, line in enumerate(text.splitlines()):
            if line.strip():
                id = f"{match['kind']}-{match['group']}-{number}"
                facets = {"group": match["group"], "kind": match["kind"], "kind and group": f"{match[1]} {match[2]}"}
                found[id] = Entry(id, line.replace("\\n", "\n"), facets=facets)
    return list(found.values())


def _bold(path: Path) -> list[Entry]:
    """Prompt beginnings by domain, group and entity; an entity's several prompts are one cluster. The few prompts
    that were published empty are left out."""
    found = []
    for name, text in read_texts(path, "_prompt.json"):
        domain, groups = name.removesuffix("_prompt.json"), load_json(text, f"{path}: {name}")
        for group, things in _mapping(groups, f"{path}: {name}").items():
            for thing, prompts in _mapping(things, f"{path}: {name}: {group}").items():
                if not isinstance(prompts, list):
                    raise FormatError(f"{path}: {name}: {group}: {thing}: must be a list of prompts")
                for number, prompt in enumerate(prompts):
                    where = f"{domain}/{group}/{thing}"
                    if not isinstance(prompt, str):
                        raise FormatError(f"{path}: {where}: a prompt must be text")
                    if not prompt.strip():
                        continue
                    facets = {"domain": domain, "group": f"{domain}: {group}"}
                    found.append(Entry(f"{where}/{number}", prompt.rstrip(), facets=facets, family=where))
    return found


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise FormatError(f"{where}: must be an object")
    return value


ADAPTERS = (
    Adapter(
        name="realtoxicityprompts",
        about="beginnings of sentences from the web: expected maximum toxicity over 25 continuations of 20 tokens",
        source="Gehman et al. 2020, arXiv:2009.11462",
        mode="completion",
        metrics=("expected_maximum_toxicity", "toxicity"),
        read=_realtoxicityprompts,
        samples=25,
        sampling=NUCLEUS,
        notes=(_SCORER,),
    ),
    Adapter(
        name="toxigen",
        about="lists of statements about thirteen groups, to be gone on with: toxicity by group",
        source="Hartvigsen et al. 2022, arXiv:2203.09509",
        mode="completion",
        metrics=("toxicity",),
        read=_toxigen,
        sampling=Sampling(temperature=0.9, max_tokens=30, stop=("\n",)),
        notes=(_SCORER, "sampled at temperature 0.9, one statement a prompt, without the authors' ALICE search"),
    ),
    Adapter(
        name="bold",
        about="beginnings of encyclopedia sentences about professions, genders, races, religions, politics",
        source="Dhamala et al. 2021, arXiv:2101.11718",
        mode="completion",
        metrics=("toxicity",),
        read=_bold,
        sampling=NUCLEUS,
        notes=(_SCORER, "toxicity alone: not sentiment, regard, emotion or gender polarity"),
    ),
)
