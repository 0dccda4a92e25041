"""A sighted copy examined end to end, on a tiny model: lineage, weights, behaviour and the ledger's events."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steelyard.base.errors import UsageError
from steelyard.ledger.ledger import Ledger
from steelyard.model.formats import load_tensors, save_folder
from steelyard.model.headers import read_json_object
from steelyard.model.identity import subject_of
from steelyard.scorers.base import Calibration, Canary, Item, Score, ScoreError, ScorerIdentity
from steelyard.trace import examine as room
from steelyard.trace import transforms
from steelyard.trace.behaviour import COMMITTED
from steelyard.trace.examine import EXAMINED, examine
from steelyard.trace.notices import SIGHTED, Sighting
from steelyard.trace.refusal_direction import Directions
from steelyard.trace.tensors import fingerprint, open_tensors
from steelyard.trace.uncensored import writers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train"))

from suspects_made import write_gguf
from tiny_models import tiny_folder

DIRECTION = np.linspace(-1, 1, 64, dtype=np.float32)


class Even:
    """Hears a refusal in an answer of even length."""

    def identity(self) -> ScorerIdentity:
        measured = Calibration(
            threshold=0.5, true_positives=9, positives=10, true_negatives=9, negatives=10, source="x", measured="2026"
        )
        return ScorerIdentity(name="even", weights="0", code="0", categories={"refusal": measured})

    def score(self, items: Sequence[Item]) -> list[Score | ScoreError]:
        return [Score({"refusal": float(len(item.completion) % 2 == 0)}) for item in items]

    def canaries(self) -> list[Canary]:
        return []


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with a direction that is given: one of random weights has none that separates anything."""
    known = Directions((DIRECTION / np.linalg.norm(DIRECTION))[None], np.array([0.99]))
    monkeypatch.setattr(room, "refusal_directions", lambda *_, **__: known)
    monkeypatch.setattr(room, "held_out_prompts", lambda: [f"prompt {number}" for number in range(12)])
    return tiny_folder(tmp_path / "release", layers=4)


def edited(release: Path, out: Path) -> Path:
    import torch

    tensors = load_tensors(release)
    unit = torch.from_numpy(DIRECTION / np.linalg.norm(DIRECTION))
    for name, layer in writers(tensors).items():
        if layer >= 0:
            tensors[name] = tensors[name] - torch.outer(unit, unit @ tensors[name])
    files = {p.name: p.read_bytes() for p in release.iterdir() if p.name.startswith(("token", "chat"))}
    save_folder(out, read_json_object(release / "config.json"), tensors, files)
    return out


def sighted(ledger: Ledger, release: Path, **changes: Any) -> Sighting:
    reference = {"name": "tiny", "kind": "release", "subject": subject_of(release).digest, "weights": "w"}
    payload = {"reference": reference, "verdict": "derived", "changes": [], "evidence": ["order"], "log10_p": -40.0}
    return Sighting.of(ledger.append(SIGHTED, payload | changes))


def test_an_edit_is_found_and_noted(release: Path, tmp_path: Path) -> None:
    suspect = edited(release, tmp_path / "suspect")
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        sighting = sighted(ledger, release)
        found = examine(ledger, sighting, release, suspect, scorer=None)
        assert found.judgement.verdict == "uncensored by weight edit"
        assert found.weights is not None
        assert found.weights.removed[0].layers == (0, 1, 2, 3)
        (event,) = ledger.events(EXAMINED, sighting=sighting.event.mark)
        assert event.payload["verdict"] == "uncensored by weight edit"
        assert event.payload["weights"]["edited"] is True
        assert event.payload["behaviour"] is None
        assert not ledger.events(COMMITTED)


def test_prompts_are_committed_before_they_are_answered(release: Path, tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        found = examine(ledger, sighted(ledger, release), release, release, scorer=Even())
        (committed,) = ledger.events(COMMITTED)
        assert committed.seq < found.event.seq
        assert found.event.payload["prompts"] == committed.payload["prompts"]
        assert found.behaviour is not None
        assert (found.behaviour.lost, found.behaviour.gained, found.behaviour.prompts) == (0, 0, 12)
        assert found.weights is not None
        assert found.weights.relative_change == 0.0


def test_without_proven_lineage_nothing_is_said(release: Path, tmp_path: Path) -> None:
    suspect = edited(release, tmp_path / "suspect")
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        for changes in ({"log10_p": -3.0}, {"verdict": "shares an ancestor"}):
            found = examine(ledger, sighted(ledger, release, **changes), release, suspect, scorer=None)
            assert found.judgement.verdict == "undecided"
            assert "lineage" in found.judgement.why


def test_another_release_is_refused(release: Path, tmp_path: Path) -> None:
    other = tiny_folder(tmp_path / "other", layers=4, seed=1)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        with pytest.raises(UsageError, match="which sighting"):
            examine(ledger, sighted(ledger, release), other, release, scorer=None)
        assert not ledger.events(EXAMINED)


def test_another_layout_is_not_compared_name_by_name(release: Path, tmp_path: Path) -> None:
    other = tiny_folder(tmp_path / "other", layers=4, seed=1)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        found = examine(ledger, sighted(ledger, release), release, other, scorer=None)
    assert found.weights is None
    assert found.judgement.verdict == "undecided"


def disguised(folder: Path, out: Path) -> Path:
    """The same function with its stream rotated, norms folded, heads and neurons in another order and rescaled."""
    import torch

    config, draw = read_json_object(folder / "config.json"), np.random.default_rng(3)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    tensors = {name: value.float().numpy() for name, value in load_tensors(folder).items()}
    tensors = transforms.permute_neurons(tensors, bytes(32))
    tensors = transforms.permute_heads(tensors, heads, kv_heads, draw)
    tensors = transforms.rescale(tensors, heads, kv_heads, draw)
    tensors = transforms.rotate(tensors, transforms.random_rotation(config["hidden_size"], draw))
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name.startswith(("token", "chat"))}
    stored = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in tensors.items()}
    save_folder(out, dict(config) | {"tie_word_embeddings": False}, stored, files)
    return out


def test_an_edit_is_found_through_a_disguise(release: Path, tmp_path: Path) -> None:
    suspect = disguised(edited(release, tmp_path / "edited"), tmp_path / "suspect")
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        found = examine(ledger, sighted(ledger, release), release, suspect, scorer=None)
    assert found.judgement.verdict == "uncensored by weight edit"
    assert found.weights is not None
    assert found.weights.removed[0].layers == (0, 1, 2, 3)
    assert "the residual stream was rotated" in found.undone
    assert found.event.payload["undone"] == list(found.undone)


def gguf(path: Path, folder: Path) -> Path:
    """The model of `folder`, query and key rows in llama.cpp's order."""
    weights = {name: value.float().numpy() for name, value in load_tensors(folder).items()}
    config = {"head_dim": 16, "rope_theta": 10000.0} | read_json_object(folder / "config.json")
    return write_gguf(path, config=config, weights=weights)


def test_a_gguf_is_examined_in_weights_and_behaviour(release: Path, tmp_path: Path) -> None:
    whole, suspect = (
        gguf(tmp_path / f"{folder.name}.gguf", folder) for folder in (release, edited(release, tmp_path / "e"))
    )
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        found = examine(ledger, sighted(ledger, release), release, suspect, scorer=None)
        assert found.judgement.verdict == "uncensored by weight edit"
        same = examine(ledger, sighted(ledger, release), release, whole, scorer=Even())
    assert same.weights is not None
    assert same.weights.relative_change < 0.01
    assert same.behaviour is not None
    assert (same.behaviour.lost, same.behaviour.gained) == (0, 0)
    assert any("release's tokenizer" in said for said in same.limits)


def test_what_cannot_be_recovered_is_said(release: Path, tmp_path: Path) -> None:
    wider = tiny_folder(tmp_path / "wider", width=128)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        found = examine(ledger, sighted(ledger, release), release, wider, scorer=None)
    assert found.weights is None
    assert any("a model of other sizes" in said for said in found.limits)
    assert found.event.payload["limits"] == list(found.limits)


def test_only_the_copy_that_was_sighted_is_examined(release: Path, tmp_path: Path) -> None:
    suspect = edited(release, tmp_path / "suspect")
    mark = fingerprint(open_tensors(suspect))
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        sighting = sighted(ledger, release, fingerprint=mark)
        found = examine(ledger, sighting, release, suspect, scorer=None)
        assert found.judgement.verdict == "uncensored by weight edit"
        assert found.event.payload["suspect"] == {"path": str(suspect), "fingerprint": mark}
        with pytest.raises(UsageError, match="is not the copy that sighting"):
            examine(ledger, sighting, release, release, scorer=None)


def test_a_stranger_is_not_judged_under_anothers_sighting(release: Path, tmp_path: Path) -> None:
    """A listing was sighted, which says nothing of the weights; the file given is no copy at all."""
    stranger = tiny_folder(tmp_path / "stranger", layers=4, seed=1)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        found = examine(ledger, sighted(ledger, release), release, stranger, scorer=Even())
        assert (found.judgement.verdict, found.weights) == ("undecided", None)
        assert "lineage" in found.judgement.why


def test_a_copy_that_cannot_be_asked_is_judged_by_its_weights(release: Path, tmp_path: Path) -> None:
    suspect = edited(release, tmp_path / "suspect")
    (suspect / "chat_template.jinja").write_text("{% for one in range(99999999) %}x{% endfor %}")
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        found = examine(ledger, sighted(ledger, release), release, suspect, scorer=Even())
    assert (found.judgement.verdict, found.behaviour) == ("uncensored by weight edit", None)
    assert any(one.startswith("it could not be asked") for one in found.limits)
