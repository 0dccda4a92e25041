"""A verifier recomputes what card, Hub results and bill of materials claim; the maker's own words are his."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from papers import BARE, LINEAGE, Told
from scenario import Chain, edit_json

from steelyard.release.card import END
from steelyard.release.claims import check_claims

CARD, RESULTS, BOM = "README.md", ".eval_results/steelyard.yaml", "steelyard/ml-bom.cdx.json"
HIS = """\
---
model-index:
- name: verse
  results:
  - task: {type: text-generation}
    dataset: {type: rhymes, name: Rhymes}
    metrics: [{type: accuracy, value: 0.5}]
---
# Verse

Toxicity 0%, says its maker.
"""


@pytest.fixture(scope="module")
def told(built: Chain, tmp_path_factory: pytest.TempPathFactory) -> Told:
    return Told.of(built.copy(tmp_path_factory.mktemp("told") / "root"))


@pytest.fixture
def papers(told: Told, tmp_path: Path) -> Path:
    return write(told, tmp_path)


def write(told: Told, folder: Path, existing: str | None = None, repository: bool = True) -> Path:
    lineage = LINEAGE if repository else BARE
    (folder / ".eval_results").mkdir()
    (folder / "steelyard").mkdir()
    (folder / CARD).write_bytes(told.card(existing=existing, lineage=lineage).encode())
    (folder / RESULTS).write_bytes(told.results(lineage.repository).encode())
    (folder / BOM).write_bytes(told.bom(lineage=lineage))
    return folder


def findings(told: Told, folder: Path) -> list[str]:
    found = list(check_claims(folder, told.evidence, told.chain.policy, told.decision.criteria, told.report))
    assert all(one.code == "claims" for one in found)
    return [one.message for one in found]


@pytest.mark.parametrize("existing", [None, HIS, HIS.replace("\n", "\r\n")])
@pytest.mark.parametrize("repository", [True, False])
def test_what_was_generated_agrees(told: Told, tmp_path: Path, existing: str | None, repository: bool) -> None:
    assert findings(told, write(told, tmp_path, existing, repository)) == []


def edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / name).read_bytes().decode()
        assert old in text
        (folder / name).write_bytes(text.replace(old, new).encode())

    return change


def drop_metric(folder: Path) -> None:
    def change(bom: dict[str, object]) -> None:
        component = bom["metadata"]["component"]  # type: ignore[index]
        component["modelCard"]["quantitativeAnalysis"]["performanceMetrics"].pop()

    edit_json(folder / BOM, change)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (edit(CARD, "value: 0.", "value: 0.0"), "README.md: model-index: our results are not those"),
        (edit(CARD, "type: steelyard/tiny", "type: someone/else"), "README.md: model-index: our results"),
        (edit(CARD, "threshold: 0.6", "threshold: 0.7"), "README.md: model-index: our results"),
        (
            edit(CARD, "| 60.0% |", "| 10.0% |"),
            "README.md: the part that Steelyard wrote does not hold what the journal gives for",
        ),
        (edit(CARD, END, ""), "README.md: does not hold the one part"),
        (edit(CARD, END, f"{END}\n{END}"), "README.md: does not hold the one part"),
        (edit(CARD, "model-index:", "model-index: ["), "README.md: metadata"),
        (edit(CARD, "| toxicity.chat | ✓ PASS", "| toxicity.chat | ✕ FAIL"), "journal gives for toxicity.chat"),
        (
            edit(CARD, "| toxicity.chat |", "| toxicity.chat | ✓ PASS | 0.01% | 60.0% | 36 |\n| toxicity.chat |"),
            "journal gives for toxicity.chat",
        ),
        (edit(CARD, "| toxicity.chat | ✓ PASS", "toxicity.chat: none"), "journal gives for toxicity.chat"),
        (edit(RESULTS, "value: 0.", "value: 1."), "steelyard.yaml: is not what the journal gives"),
        (edit(RESULTS, "id: steelyard/tiny", "id: steelyard/quick"), "steelyard.yaml: is not what the journal gives"),
        (edit(RESULTS, "limit 0.6", "limit 0.5"), "steelyard.yaml: its notes on toxicity.chat are not"),
        (lambda folder: (folder / RESULTS).write_text("3"), "steelyard.yaml: is not what the journal gives"),
        (lambda folder: (folder / RESULTS).write_text("- a\n- [b"), "steelyard.yaml"),
        (lambda folder: (folder / RESULTS).write_text(""), "steelyard.yaml: is not what the journal gives"),
        (edit(BOM, '"value":"0.', '"value":"0.0'), "ml-bom.cdx.json: its performance metrics"),
        (edit(BOM, '"version":"', '"version":"a'), "ml-bom.cdx.json: is of another subject"),
        (drop_metric, "ml-bom.cdx.json: its performance metrics"),
        (lambda folder: (folder / BOM).write_text("[1]"), "ml-bom.cdx.json: is of another subject"),
        (lambda folder: (folder / BOM).write_text("[" * 99), "ml-bom.cdx.json"),
        (lambda folder: (folder / CARD).unlink(), "README.md: is missing"),
        (lambda folder: (folder / RESULTS).unlink(), "steelyard.yaml: No such file"),
        (lambda folder: (folder / RESULTS).write_bytes(b"a" * 2_000_000), "steelyard.yaml"),
    ],
)
def test_what_was_edited_is_named(told: Told, papers: Path, change: Callable[[Path], object], says: str) -> None:
    change(papers)
    found = findings(told, papers)
    assert len([one for one in found if says in one]) == 1, found
    assert str(papers) not in "".join(found)


def test_another_runs_papers_do_not_fit(told: Told, papers: Path) -> None:
    report = told.report.model_copy(update={"subject_digest": "01" * 32})
    found = list(check_claims(papers, told.evidence, told.chain.policy, told.decision.criteria, report))
    assert {one.message.split(":")[0] for one in found} == {CARD, BOM}
    assert json.loads((papers / BOM).read_bytes())["metadata"]["component"]["version"] == told.decision.subject


def test_files_are_held_against_their_hashes(told: Told, papers: Path) -> None:
    from steelyard.base.canonical import sha256_file

    hashes = {path.name: sha256_file(path) for path in told.chain.model.iterdir()} | {CARD: "ab" * 32}
    arguments = (papers, told.evidence, told.chain.policy, told.decision.criteria, told.report)
    assert list(check_claims(*arguments, hashes)) == []
    for wrong in ({**hashes, "config.json": "cd" * 32}, {**hashes, "LICENSE": "cd" * 32}):
        (found,) = check_claims(*arguments, wrong)
        assert "its list of the model's files" in found.message


def test_other_words_of_a_later_version_still_verify(told: Told, papers: Path) -> None:
    edit(CARD, "## Limits, as measured", "## What was found")(papers)
    edit(CARD, "(lower is better)", "(less is better)")(papers)
    edit(RESULTS, "lower is better", "less is better")(papers)
    assert findings(told, papers) == []
