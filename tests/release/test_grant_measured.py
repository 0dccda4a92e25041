"""The bound of a copy: what was measured stands in its statement as it was measured, the rest is absent."""

from __future__ import annotations

from pathlib import Path

import pytest
from granting import Desk
from scenario import make_model

from steelyard.base.canonical import sha256_file
from steelyard.base.errors import SteelyardError
from steelyard.base.progress import Silent
from steelyard.release.grant_deliver import Measure, mark_only
from steelyard.release.grant_verify import verify_copy
from steelyard.safety.perplexity import perplexity

TEXT = "The traveller went to Paris and Rome, then on to Oslo. " * 20


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_measured(desk: Desk, text: Path, tmp_path: Path) -> None:
    grant = desk.granted().id
    marked, run = desk.root / "marked", desk.root / "run-of-copy"
    with desk.book() as book:
        mark_only(book, grant, desk.bundle, marked, mark=desk.mark, trust=desk.trust)
    desk.chain.test(run=run, model=marked, predecessor=desk.chain.model)
    copy = desk.deliver(grant, desk.root / "copy", measure=Measure(text, run)).copy
    assert (desk.root / "copy" / "model.safetensors").read_bytes() == (marked / "model.safetensors").read_bytes()
    result = verify_copy(desk.root / "copy", desk.trust)
    assert result.ok, result.findings
    assert result.copy_ == copy
    found = copy.bound.perplexity
    assert found is not None
    assert found.original == perplexity(desk.chain.model, text, Silent(), window=1024 // 2, stride=256).per_token
    assert found.text == sha256_file(text)
    battery = copy.bound.battery
    assert battery is not None
    assert battery.name == "tiny"
    metrics = {one.metric for one in battery.differences}
    assert {"toxicity.chat", "refusal.benign", "truth.incorrect"} <= metrics
    card = (desk.root / "copy" / "README.md").read_text()
    assert "toxicity.chat" in card
    assert "was not tested" in card


def test_a_run_on_something_else(desk: Desk, tmp_path: Path) -> None:
    """The release's own run, a run without the release beside it, a run that was edited."""
    grant = desk.granted().id
    with pytest.raises(SteelyardError, match="is not a run on this copy"):
        desk.deliver(grant, desk.root / "copy", measure=Measure(run=desk.chain.run))
    marked, run = desk.root / "marked", desk.root / "run-of-copy"
    with desk.book() as book:
        mark_only(book, grant, desk.bundle, marked, mark=desk.mark, trust=desk.trust)
    desk.chain.test(run=run, model=marked)
    with pytest.raises(SteelyardError, match="did not compare it with the release"):
        desk.deliver(grant, desk.root / "copy", measure=Measure(run=run))
    other = make_model(tmp_path / "other", seed=3)
    desk.chain.test(run=desk.root / "run-2", model=marked, predecessor=other)
    with pytest.raises(SteelyardError, match="did not compare it with the release"):
        desk.deliver(grant, desk.root / "copy", measure=Measure(run=desk.root / "run-2"))
    assert not (desk.root / "copy").exists()


def test_a_mark_that_is_too_loud(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    from steelyard.release import grant_deliver
    from steelyard.trace.watermark import MarkReport

    real = grant_deliver.watermark.mark_folder
    grant = desk.granted().id
    for change in (0.0, 0.0017, float("nan")):

        def loud(*arguments: object, change: float = change) -> MarkReport:
            real(*arguments)  # type: ignore[arg-type]
            return MarkReport(change, 1, 1)

        monkeypatch.setattr(grant_deliver.watermark, "mark_folder", loud)
        with pytest.raises(SteelyardError, match="nothing is delivered"):
            desk.deliver(grant, desk.root / "copy")
    assert not (desk.root / "copy").exists()
