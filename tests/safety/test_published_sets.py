"""Adapters on tiny files in the published formats; what is wrong in a file is named. Row counts of the real files."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.base.progress import Silent
from steelyard.safety.published.adapter import Entry, chosen
from steelyard.safety.published.registry import ADAPTERS, adapter_of, locate, with_settings
from steelyard.safety.rows import read_rows, read_texts


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table(path: Path, *rows: dict[str, Any]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def archive(path: Path, **members: str) -> Path:
    with tarfile.open(path, "w:gz") as file:
        for name, text in members.items():
            entry = tarfile.TarInfo(f"prompts/{name}")
            entry.size = len(text.encode())
            file.addfile(entry, io.BytesIO(text.encode()))
    return path


def read(name: str, path: Path) -> list[Entry]:
    return list(ADAPTERS[name].read(path))


# -- continuations ---------------------------------------------------------------------------------------------------


def test_realtoxicityprompts_are_split_by_the_prompts_own_toxicity(tmp_path: Path) -> None:
    rows = [{"prompt": {"text": "So", "toxicity": value}, "challenging": value == 0.5} for value in (0.4, 0.5, None)]
    found = read("realtoxicityprompts", lines(tmp_path / "a.jsonl", *rows))
    assert [entry.facets["prompt"] for entry in found] == ["non-toxic", "toxic", "unknown"]
    assert [entry.facets["challenging"] for entry in found] == ["no", "yes", "no"]
    adapter = ADAPTERS["realtoxicityprompts"]
    assert adapter.sampling is not None
    assert (adapter.samples, adapter.sampling.max_tokens, adapter.sampling.top_p) == (25, 20, 0.9)
    with pytest.raises(FormatError, match=r"a\.jsonl: row 1: prompt\.toxicity must be a number"):
        read("realtoxicityprompts", lines(tmp_path / "a.jsonl", {"prompt": {"text": "So", "toxicity": "high"}}))


def test_toxigen_is_read_by_group_from_files_or_their_archive(tmp_path: Path) -> None:
    path = archive(
        tmp_path / "p.tar.gz",
        **{"hate_middle_east_1k.txt": "- a\\n- b\\n-\n", "neutral_women_1k.txt": "- c\\n-\n\n- d\\n-\n"},
    )
    found = read("toxigen", path)
    assert [entry.facets["kind and group"] for entry in found] == ["hate middle_east", "neutral women", "neutral women"]
    assert found[0].prompt == "- a\n- b\n-"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "women.txt").write_text("- a")
    with pytest.raises(FormatError, match=r"women\.txt: must be named as published"):
        read("toxigen", tmp_path / "folder")


def test_bold_clusters_the_prompts_of_one_entity(tmp_path: Path) -> None:
    groups = {"dancing": {"Dancer": ["A dancer is ", "Dancers often "], "Tutor": ["A tutor is "]}}
    found = read("bold", archive(tmp_path / "p.tar.gz", **{"profession_prompt.json": json.dumps(groups)}))
    assert [entry.prompt for entry in found] == ["A dancer is", "Dancers often", "A tutor is"]
    assert len({entry.cluster for entry in found}) == 2
    assert found[0].facets == {"domain": "profession", "group": "profession: dancing"}
    bad = json.dumps({"dancing": {"Dancer": "A dancer"}})
    with pytest.raises(FormatError, match="dancing: Dancer: must be a list"):
        read("bold", archive(tmp_path / "p.tar.gz", **{"race_prompt.json": bad}))


# -- requests --------------------------------------------------------------------------------------------------------


def test_requests_with_their_hazards(tmp_path: Path) -> None:
    (one,) = read("advbench", table(tmp_path / "a.csv", {"goal": "Do harm", "target": "Sure"}))
    assert (one.prompt, one.facts["request"]) == ("Do harm", "Do harm")
    row = {"category": "Fraud", "source": "me", "forbidden_prompt": "How?"}
    assert read("strongreject", table(tmp_path / "s.csv", row))[0].facets == {"category": "Fraud"}
    kinds = {"FunctionalCategory": "contextual", "SemanticCategory": "harm", "Tags": ""}
    row = {"Behavior": "Explain it", **kinds, "ContextString": "A text.", "BehaviorID": "x1"}
    (one,) = read("harmbench", table(tmp_path / "h.csv", row))
    assert (one.id, one.prompt) == ("x1", "A text.\n\n---\n\nExplain it")
    assert one.facts["request"] == "Explain it"
    row = {"": "0", "Goal": "Lie", "Target": "Sure", "Behavior": "Lies", "Category": "Fraud", "Source": "me"}
    assert read("jailbreakbench", table(tmp_path / "j.csv", row))[0].facets == {"category": "Fraud"}
    row = {"release_prompt_id": "r", "prompt_text": "Comment?", "hazard": "hte", "persona": "normal", "locale": "fr_FR"}
    (one,) = read("ailuminate", table(tmp_path / "f.csv", row))
    assert (one.facets["hazard"], one.language) == ("hte", "fr")
    row = {"id": "c", "category": "Safety", "subcategory": "x", "prompt": "Is it?", "response": ""}
    assert read("coconot-contrast", lines(tmp_path / "c.jsonl", row))[0].id == "c"
    with pytest.raises(FormatError, match=r"c\.jsonl: row 1 has no field goal"):
        read("advbench", tmp_path / "c.jsonl")


def test_xstest_tells_safe_from_unsafe_in_both_generations_of_the_file(tmp_path: Path) -> None:
    new = [{"id": i, "prompt": "p", "type": "homonyms", "label": label} for i, label in enumerate(("safe", "unsafe"))]
    assert [e.facets["label"] for e in read("xstest", table(tmp_path / "n.csv", *new))] == ["safe", "unsafe"]
    old = [{"id": kind, "prompt": "p", "type": kind} for kind in ("homonyms", "contrast_homonyms")]
    assert [e.facets["label"] for e in read("xstest", table(tmp_path / "o.csv", *old))] == ["safe", "unsafe"]


# -- likelihood ------------------------------------------------------------------------------------------------------

QUESTION = {
    "Type": "Adversarial",
    "Category": "Myths",
    "Question": "Is it so?",
    "Best Answer": "No",
    "Correct Answers": "It isn't; No; ",
    "Incorrect Answers": "Yes.; It is",
    "Source": "me",
}


def test_truthfulqa_puts_the_best_answer_first_and_closes_every_sentence(tmp_path: Path) -> None:
    (one,) = read("truthfulqa-mc", table(tmp_path / "t.csv", QUESTION))
    assert one.options == (" No.", " It isn't.", " Yes.", " It is.")
    assert (one.prompt, one.facts["true"]) == ("Q: Is it so?\nA:", 2)
    (asked,) = read("truthfulqa", tmp_path / "t.csv")
    assert (asked.prompt, asked.facts["incorrect"]) == ("Is it so?", ["Yes.", "It is."])


def test_crows_pairs_keep_the_more_stereotyping_sentence_first(tmp_path: Path) -> None:
    row = {"": "7", "sent_more": "M.", "sent_less": "L.", "stereo_antistereo": "antistereo", "bias_type": "age"}
    (one,) = read("crows-pairs", table(tmp_path / "c.csv", row))
    assert (one.id, one.prompt, one.options) == ("7", "", ("M.", "L."))
    assert one.facets == {"bias type": "age", "direction": "antistereo"}


def bbq_row(**changes: Any) -> dict[str, Any]:
    return {
        "example_id": 1,
        "question_index": "3",
        "question_polarity": "neg",
        "context_condition": "ambig",
        "category": "Age",
        "answer_info": {"ans0": ["the boy", "nonOld"], "ans1": ["unsure", "unknown"], "ans2": ["the man", "old"]},
        "additional_metadata": {"stereotyped_groups": ["old"]},
        "context": "A boy met a man.",
        "question": "Who forgot?",
        "ans0": "The boy",
        "ans1": "Not known",
        "ans2": "The man",
        "label": 1,
    } | changes


def test_bbq_knows_the_target_from_the_row_or_from_the_authors_table(tmp_path: Path) -> None:
    path = lines(tmp_path / "Age.jsonl", bbq_row(), bbq_row(example_id=2, additional_metadata={}))
    first, second = read("bbq", path)
    assert (first.facts["target"], first.facts["unknown"], first.facts["condition"]) == (2, 1, "ambiguous")
    assert (first.options[2], first.cluster, second.facts["target"]) == (" The man", "Age/3", None)
    names = ("category", "question_index", "example_id", "target_loc")
    rows = [dict(zip(names, ("Age", 3, i, place), strict=True)) for i, place in ((1, 0), (2, 2))]
    table(tmp_path / "additional_metadata.csv", *rows)
    assert [entry.facts["target"] for entry in read("bbq", tmp_path)] == [0, 2]
    for wrong in ({"label": 3}, {"context_condition": "unclear"}, {"question_polarity": "bad"}):
        with pytest.raises(FormatError, match=r"Age\.jsonl: row 1"):
            read("bbq", lines(path, bbq_row(**wrong)))


# -- descriptors and leakage -----------------------------------------------------------------------------------------


def test_every_descriptor_meets_every_template(tmp_path: Path) -> None:
    found = chosen(read("descriptors", locate(ADAPTERS["descriptors"], None, tmp_path, Silent())), None, 0)
    descriptors = {entry.facets["descriptor"] for entry in found}
    templates = {entry.cluster for entry in found}
    assert len(found) == len(descriptors) * len(templates) >= 300
    (tmp_path / "d.yaml").write_text("templates: ['He is {}', She is]\ndescriptors: {age: [old]}\n")
    with pytest.raises(UsageError, match=r"d\.yaml.* must hold \{\} once"):
        read("descriptors", tmp_path / "d.yaml")


def test_canaries_and_prompts_for_leakage(tmp_path: Path) -> None:
    path = lines(tmp_path / "c.jsonl", {"prefix": "The code is", "secret": "408-118-221"})
    (one,) = read("canary-exposure", path)
    assert (len(one.options), one.options[0]) == (512, " 408-118-221")
    assert read("canary-extraction", path)[0].facts == {"secret": "408-118-221"}
    (mail,) = read("contact-extraction", lines(path, {"prompt": "Mail", "kind": "mail"}))
    assert (mail.facts, mail.facets) == ({}, {"kind": "mail"})


# -- a set of one's own ----------------------------------------------------------------------------------------------

OWN = """name: mine
data: mine.jsonl
prompt: ask.text
id: key
facets: {hazard: kind}
mode: chat
metrics: [refusal]
max_tokens: 32
scorer: embedded:refusal
"""


def test_a_set_of_ones_own_in_ten_lines(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(OWN)
    row = {"key": "k", "kind": "lies", "ask": {"text": "Lie?"}}
    lines(tmp_path / "mine.jsonl", row)
    adapter, scorer = adapter_of(str(path))
    found = adapter.read(locate(adapter, None, tmp_path, Silent()))
    assert [(e.id, e.prompt, e.facets) for e in found] == [("k", "Lie?", {"hazard": "lies"})]
    assert (scorer, adapter.max_tokens, adapter.sampling) == ("embedded:refusal", 32, None)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("metrics: [refusals]", "'refusals' is unknown, did you mean refusal?"),
        ("mode: likelihood", "does not go with mode likelihood"),
        ("options: choices", "options belongs to mode likelihood"),
        ("samples: 3", "samples > 1 needs a temperature"),
        ("metrics: [extraction]", "needs facts"),
        ("rubric: nice", "rubric: must be one of harm"),
        ("promt: x", "did you mean prompt"),
        ("data: ../x.jsonl", "must be relative and stay inside"),
    ],
)
def test_a_wrong_key_is_named_with_its_line(tmp_path: Path, change: str, says: str) -> None:
    path, key = tmp_path / "mine.yaml", change.split(":")[0]
    path.write_text("".join(f"{line}\n" for line in OWN.splitlines() if not line.startswith(f"{key}:")) + change + "\n")
    with pytest.raises(UsageError, match=r"mine\.yaml:\d+: ") as error:
        adapter_of(str(path))
    assert says in str(error.value)


def test_a_choice_needs_a_label_among_its_options(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: c\nmode: likelihood\nmetrics: [choice]\nprompt: q\noptions: o\nfacts: {label: l}\ndata: mine.jsonl\n"
    )
    adapter, _ = adapter_of(str(path))
    good = {"q": "1+1=", "o": [" 2", " 3"], "l": 0}
    assert adapter.read(lines(tmp_path / "mine.jsonl", good))[0].options == (" 2", " 3")
    for wrong, says in (({"l": 2}, "from 0 to 1"), ({"l": True}, "from 0 to 1"), ({"o": [" 2"]}, "two texts or more")):
        with pytest.raises(FormatError, match=says):
            adapter.read(lines(tmp_path / "mine.jsonl", good | wrong))


# -- finding and choosing --------------------------------------------------------------------------------------------


def test_names_and_places_that_are_wrong(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="set 'xtest' is unknown, did you mean xstest"):
        adapter_of("xtest")
    adapter, _ = adapter_of("xstest")
    for data, says in (
        (None, "its data is not part of this package: give --data"),
        (str(tmp_path / "absent.csv"), "no such file or folder"),
        ("python:no_such_package/x.csv", "no package 'no_such_package' is installed"),
        ("hf://datasets/org", "must be hf://datasets/ORG/NAME@REVISION/PATH"),
        ("python:steelyard/../x.csv", "stay inside"),
    ):
        with pytest.raises(SteelyardError, match=says):
            locate(adapter, data, tmp_path, Silent())
    assert locate(adapter, "python:steelyard/safety/published/descriptors.yaml", tmp_path, Silent()).is_file()


def test_a_draw_keeps_the_order_and_follows_from_the_seed() -> None:
    entries = [Entry(str(i), "p") for i in range(100)]
    found = chosen(entries, 10, 3)
    assert found == chosen(entries, 10, 3) != chosen(entries, 10, 4)
    assert [int(entry.id) for entry in found] == sorted(int(entry.id) for entry in found)
    assert chosen(entries, 200, 3) == entries
    with pytest.raises(FormatError, match="the id '1' twice"):
        chosen([entries[1], entries[1]], None, 0)
    with pytest.raises(FormatError, match="no prompt"):
        chosen([], None, 0)


def test_settings_of_the_user_replace_the_authors() -> None:
    made = with_settings(ADAPTERS["realtoxicityprompts"], samples=5, max_tokens=10)
    assert made.sampling is not None
    assert (made.samples, made.sampling.max_tokens, made.sampling.top_p) == (5, 10, 0.9)


def test_rows_of_every_kind_and_damage(tmp_path: Path) -> None:
    rows = [{"a": "x"}, {"a": "y"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.tsv").write_text("a\nx\ny\n")
    for path in (lines(tmp_path / "a.jsonl", *rows), tmp_path / "a.json", table(tmp_path / "a.csv", *rows)):
        assert read_rows(path) == rows
    assert read_rows(tmp_path / "a.tsv") == rows
    assert read_rows(tmp_path) == rows * 4
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.tar.gz").write_bytes(b"no archive")
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    for path, says in ((tmp_path / "a.json", "list of objects"), (tmp_path / "b.parquet", "not a sound Parquet")):
        with pytest.raises(FormatError, match=says):
            read_rows(path)
    with pytest.raises(FormatError, match="cannot be unpacked"):
        list(read_texts(tmp_path / "b.tar.gz", ".txt"))
    with pytest.raises(UsageError, match="of these kinds files are read"):
        read_rows(tmp_path / "a.txt")


def test_parquet_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"goal": "Do harm", "n": 1}, {"goal": "Lie", "n": 2}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [entry.prompt for entry in read("advbench", tmp_path / "a.parquet")] == ["Do harm", "Lie"]


def test_files_that_unpack_to_more_than_they_seem_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kilobyte that becomes gigabytes: columns that every row holds, rows of two bytes, one text repeated."""
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "wide.csv").write_text(",".join(f"c{number}" for number in range(1001)) + "\n" + "x\n" * 3)
    (tmp_path / "twice.csv").write_text("text,label,text\na,1,b\n")
    (tmp_path / "many.csv").write_text("a\n" + "x\n" * 4)
    (tmp_path / "many.jsonl").write_text("{}\n" * 4)
    (tmp_path / "values.jsonl").write_text("[]" + ",[]" * 250)
    (tmp_path / "values.json").write_text("[" + "{}," * 50 + "{}]")
    repeated = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 2000, pyarrow.int32()), ["x" * 10_000])
    pyarrow.parquet.write_table(pyarrow.table({"text": repeated}), tmp_path / "one.parquet")
    assert (tmp_path / "one.parquet").stat().st_size < 20_000
    monkeypatch.setattr("steelyard.safety.rows.FILE_LIMIT", 1_000_000)
    with pytest.raises(FormatError, match="unpacks to over 1,000,000 bytes"):
        read_rows(tmp_path / "one.parquet")
    monkeypatch.setattr("steelyard.safety.rows.ROW_LIMIT", 3)
    monkeypatch.setattr("steelyard.safety.rows.VALUE_LIMIT", 60)
    for name, says in (
        ("wide.csv", "over 1,000 columns"),
        ("twice.csv", "the column 'text' occurs twice"),
        ("many.csv", "over 3 rows"),
        ("many.jsonl", "over 3 rows"),
        ("values.jsonl", "over 240 values"),
        ("values.json", "over 60 values"),
        ("one.parquet", "over 3 rows"),
    ):
        with pytest.raises(FormatError, match=says):
            read_rows(tmp_path / name)


def test_archives_that_unpack_to_more_than_they_seem_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def packed(name: str, count: int, size: int) -> Path:
        with tarfile.open(tmp_path / name, "w:gz") as archive:
            for number in range(count):
                member = tarfile.TarInfo(f"{number}.bin")
                member.size = size
                archive.addfile(member, io.BytesIO(b"0" * size))
        return tmp_path / name

    monkeypatch.setattr("steelyard.safety.rows.FILE_LIMIT", 1_000_000)
    monkeypatch.setattr("steelyard.safety.rows.MEMBER_LIMIT", 3)
    with pytest.raises(FormatError, match="unpacks to over 1,000,000 bytes"):  # also where nobody asks for the member
        list(read_texts(packed("large.tar.gz", 1, 2_000_000), ".txt"))
    with pytest.raises(FormatError, match="holds over 3 files"):
        list(read_texts(packed("many.tar.gz", 4, 1), ".txt"))


# -- the real files --------------------------------------------------------------------------------------------------

COUNTS = {
    "realtoxicityprompts": ("realtoxicityprompts/val5k.jsonl.gz", 5000),
    "advbench": ("harmful/advbench.csv", 520),
    "strongreject": ("harmful/strongreject.csv", 313),
    "harmbench": ("harmful/harmbench_test.csv", 320),
    "jailbreakbench": ("harmful/jailbreakbench.csv", 100),
    "ailuminate": ("ailuminate/fr.csv", 1200),
    "xstest": ("xstest/xstest_prompts.csv", 450),
    "coconot": ("coconot/coconot_eval.jsonl", 1001),
    "coconot-contrast": ("coconot/coconot_contrast_eval.jsonl", 379),
    "bold": ("bold/prompts.tar.gz", 23674),
    "crows-pairs": ("crows_pairs/crows_pairs_anonymized.csv", 1508),
    "truthfulqa-mc": ("truthfulqa/TruthfulQA.csv", 813),
    "toxigen": ("toxigen/prompts.tar.gz", 31000),
}


@pytest.mark.parametrize("name", COUNTS)
def test_the_published_files_are_read_whole(name: str, shared_data: Path) -> None:
    path, count = COUNTS[name]
    if not (shared_data / "probes" / path).exists():
        pytest.skip(f"{shared_data / 'probes' / path} is absent")
    assert len(chosen(read(name, shared_data / "probes" / path), None, 0)) == count
