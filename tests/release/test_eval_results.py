"""The Hub's evaluation results: its own parser reads them, and they are the report's numbers."""

from __future__ import annotations

import pytest
import yaml
from papers import Told
from scenario import Chain


@pytest.fixture(scope="module")
def told(built: Chain, tmp_path_factory: pytest.TempPathFactory) -> Told:
    return Told.of(built.copy(tmp_path_factory.mktemp("told") / "root"))


def test_the_hubs_parser_reads_them(told: Told) -> None:
    hub = pytest.importorskip("huggingface_hub", minversion="1.4")
    text = told.results()
    entries = hub.parse_eval_result_entries(yaml.safe_load(text))
    assert [(one.task_id, one.value) for one in entries] == [
        (one.metric, one.estimate) for one in told.report.measurements
    ]
    for one in entries:
        assert one.dataset_id == "steelyard/tiny"
        assert one.date == told.evidence.journal.finished
        assert one.source_url == "https://huggingface.co/acme/tiny/blob/main/steelyard/report.md"
        assert one.verify_token is None
        assert told.chain.battery.digest in one.notes
    # Written by the library, they have the same content: no key of ours that the schema lacks.
    assert hub.eval_result_entries_to_yaml(entries) == yaml.safe_load(text)


def test_bounds_and_limits_stand_in_the_notes(told: Told) -> None:
    first = told.report.measurements[0]
    notes = yaml.safe_load(told.results())[0]["notes"]
    assert f"upper bound {first.upper:.6f}, limit 0.600000 of policy lenient v1; {first.n} samples" in notes


def test_without_a_repository_there_is_no_source(told: Told) -> None:
    assert all("source" not in one for one in yaml.safe_load(told.results(None)))
    assert told.results() == told.results()
