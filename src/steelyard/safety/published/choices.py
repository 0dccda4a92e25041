"""Sets that are read by likelihood: which of several given texts the model finds likelier."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steelyard.base.errors import FormatError
from steelyard.safety.published.adapter import Adapter, Entry, rows_of, text_field
from steelyard.safety.rows import Row, field_of, read_rows

# -- TruthfulQA ------------------------------------------------------------------------------------------------------


def _answers(text: str) -> list[str]:
    """Answers separated by semicolons, each with a full stop at its end (as the authors' own scoring has them)."""
    found = [part.strip() for part in text.split(";") if part.strip()]
    return [part if part.endswith(".") else f"{part}." for part in found]


def _truths(path: Path) -> list[tuple[str, Row, str, list[str], list[str]]]:
    """(place, row, best, correct, incorrect answers) of every question; the best is among the correct ones."""
    found = []
    for where, row in rows_of(path, "Question", "Category"):
        best = _answers(text_field(row, "Best Answer", where))[0]
        correct = list(dict.fromkeys(_answers(text_field(row, "Correct Answers", where))))
        wrong = list(dict.fromkeys(_answers(text_field(row, "Incorrect Answers", where))))
        found.append((where, row, best, correct, wrong))
    return found


def _truthfulqa_mc(path: Path) -> list[Entry]:
    found = []
    for number, (where, row, best, correct, wrong) in enumerate(_truths(path)):
        right = list(dict.fromkeys([best, *correct]))
        found.append(
            Entry(
                id=str(number),
                prompt=f"Q: {text_field(row, 'Question', where)}\nA:",
                options=tuple(f" {answer}" for answer in (*right, *wrong)),
                facets={"category": str(row["Category"])},
                facts={"true": len(right)},  # the best answer is the first of them
            )
        )
    return found


def _truthfulqa(path: Path) -> list[Entry]:
    return [
        Entry(
            id=str(number),
            prompt=text_field(row, "Question", where),
            facets={"category": str(row["Category"])},
            facts={"request": text_field(row, "Question", where), "correct": correct, "incorrect": wrong},
        )
        for number, (where, row, _, correct, wrong) in enumerate(_truths(path))
    ]


# -- CrowS-Pairs -----------------------------------------------------------------------------------------------------


def _crows_pairs(path: Path) -> list[Entry]:
    found = []
    for number, (where, row) in enumerate(rows_of(path, "bias_type", "stereo_antistereo")):
        pair = (text_field(row, "sent_more", where), text_field(row, "sent_less", where))
        facets = {"bias type": str(row["bias_type"]), "direction": str(row["stereo_antistereo"])}
        found.append(Entry(str(row.get("") or number), "", options=pair, facets=facets))
    return found


# -- BBQ -------------------------------------------------------------------------------------------------------------

_UNKNOWN = "unknown"  # the label of the option that says that it cannot be known
_CONDITIONS = {"ambig": "ambiguous", "disambig": "disambiguated"}


def _bbq(path: Path) -> list[Entry]:
    """The JSON lines of a category, or a folder of them. Which option is the target of the bias is told by
    `additional_metadata.csv` (target_loc) where it lies in the folder, else by the stereotyped groups of the row; where
    neither tells, the entry counts for accuracy alone."""
    folder = path if path.is_dir() else path.parent
    targets = _bbq_targets(folder / "additional_metadata.csv")
    files = sorted(file for file in path.rglob("*.jsonl*")) if path.is_dir() else [path]
    if not files:
        raise FormatError(f"{path}: holds no .jsonl file of BBQ")
    found = []
    for where, row in (pair for file in files for pair in rows_of(file, "example_id", "category", "question_index")):
        condition = text_field(row, "context_condition", where)
        polarity = text_field(row, "question_polarity", where)
        if condition not in _CONDITIONS or polarity not in ("neg", "nonneg"):
            raise FormatError(
                f"{where}: context_condition {condition!r}, question_polarity {polarity!r}: not as in BBQ"
            )
        groups = [str(field_of(row, f"answer_info.ans{i}.1", where)).casefold() for i in range(3)]
        label = field_of(row, "label", where)
        if label not in (0, 1, 2) or groups.count(_UNKNOWN) != 1:
            raise FormatError(f"{where}: must have a label of 0 to 2 and one answer of the group unknown")
        key = (str(row["category"]), str(row["question_index"]), str(row["example_id"]))
        target = targets[key] if key in targets else _bbq_target(row, groups)
        question = text_field(row, "question", where)
        found.append(
            Entry(
                id="/".join(key),
                prompt=f"{text_field(row, 'context', where)}\nQ: {question}\nA:",
                options=tuple(f" {text_field(row, f'ans{i}', where)}" for i in range(3)),
                facets={"category": key[0]},
                facts={
                    "label": label,
                    "unknown": groups.index(_UNKNOWN),
                    "target": target,
                    "condition": _CONDITIONS[condition],
                    "negative": polarity == "neg",
                },
                family=f"{key[0]}/{key[1]}",
            )
        )
    return found


def _bbq_targets(path: Path) -> Mapping[tuple[str, str, str], int | None]:
    if not path.is_file():
        return {}
    found: dict[tuple[str, str, str], int | None] = {}
    for number, row in enumerate(read_rows(path), 1):
        names = ("category", "question_index", "example_id", "target_loc")
        category, index, example, place = (str(field_of(row, name, f"{path}: row {number}")) for name in names)
        found[category, index, example] = int(place) if place in ("0", "1", "2") else None
    return found


def _bbq_target(row: Row, groups: list[str]) -> int | None:
    metadata: Any = row.get("additional_metadata")
    stereotyped = metadata.get("stereotyped_groups") if isinstance(metadata, dict) else None
    wanted = {str(one).casefold() for one in stereotyped} if isinstance(stereotyped, list) else set()
    matching = [i for i, group in enumerate(groups) if group in wanted and group != _UNKNOWN]
    return matching[0] if len(matching) == 1 else None


_TRUTHFULQA = "Lin et al. 2022, arXiv:2109.07958"
ADAPTERS = (
    Adapter(
        name="truthfulqa-mc",
        about="questions that people answer wrongly: MC1 and MC2 by likelihood",
        source=_TRUTHFULQA,
        mode="likelihood",
        metrics=("truthfulqa_mc",),
        read=_truthfulqa_mc,
        notes=(
            'zero-shot, each question as "Q: ...\\nA:", without the authors\' preset of examples: not their figures',
            "MC1 and MC2 from the CSV: the best answer, all correct ones, all incorrect ones",
        ),
    ),
    Adapter(
        name="truthfulqa",
        about="questions that people answer wrongly, answered freely: the share of true answers (needs --judge)",
        source=_TRUTHFULQA,
        mode="chat",
        metrics=(),
        read=_truthfulqa,
        max_tokens=128,
        rubric="truthful",
        notes=("the judge is asked with the reference answers; the authors fine-tuned judges of their own",),
    ),
    Adapter(
        name="crows-pairs",
        about="pairs of sentences, one more stereotyping: how often the model finds it the likelier one, by bias type",
        source="Nangia et al. 2020, arXiv:2010.00133",
        mode="likelihood",
        metrics=("crows_pairs",),
        read=_crows_pairs,
        notes=(
            "the authors' pseudo-likelihood is for masked models; here each sentence's full log-likelihood after the "
            "beginning-of-text token is compared; a tie counts as not preferred; 50% is unbiased",
        ),
    ),
    Adapter(
        name="bbq",
        about="questions about two people of different groups, in ambiguous and disambiguated contexts",
        source="Parrish et al. 2022, arXiv:2110.08193",
        mode="likelihood",
        metrics=("bbq",),
        read=_bbq,
        notes=("the answer is the option of the highest log-likelihood per byte after the context and question",),
    ),
)
