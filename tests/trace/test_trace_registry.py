"""The registry: what is kept is enough to compare with, and a registration does not change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from suspects_made import SMALL, put, safetensors_bytes, weights, write

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.ledger.ledger import Ledger
from steelyard.model.identity import subject_of
from steelyard.trace.registry import EVENT, Registry, register


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "workspace" / "ledger.sqlite")


def test_what_is_kept_is_the_models(tmp_path: Path, ledger: Ledger) -> None:
    ours = weights()
    folder = write(tmp_path / "ours", ours)
    event = register(folder, "ours", kind="release", ledger=ledger)
    (reference,) = Registry.load(ledger).references
    subject = subject_of(folder)
    assert (event.kind, reference.subject, reference.weights) == (EVENT, subject.digest, subject.weights)
    assert reference.sizes.layers == SMALL["num_hidden_layers"]
    name = "model.layers.1.mlp.up_proj.weight"
    np.testing.assert_array_equal(reference.rows[name].values, ours[name][reference.rows[name].index])
    assert reference.gate.shape == (4, len(reference.neurons), len(reference.tokens))
    assert reference.files[0].size == (folder / "model.safetensors").stat().st_size
    # By hand: the signature of one neuron over the tokens, of length one.
    embedding = ours["model.embed_tokens.weight"][reference.tokens].astype(np.float64)
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    row = ours[name][reference.neurons[7]] * ours["model.layers.1.post_attention_layernorm.weight"]
    expected = (embedding - embedding.mean(axis=0)) @ row
    np.testing.assert_allclose(reference.up[1, 7], expected / np.linalg.norm(expected), atol=2e-3)


def test_registering_again_gives_the_first_event(tmp_path: Path, ledger: Ledger) -> None:
    folder = write(tmp_path / "ours", weights())
    first = register(folder, "ours", kind="release", ledger=ledger)
    assert register(folder, "ours", kind="release", ledger=ledger) == first
    assert len(ledger.events(EVENT)) == 1
    with pytest.raises(UsageError, match="another model is registered"):
        register(write(tmp_path / "other", weights(1)), "ours", kind="release", ledger=ledger)


def test_what_cannot_be_compared_with_is_not_registered(tmp_path: Path, ledger: Ledger) -> None:
    ours = weights()
    with pytest.raises(UsageError, match="write release or base"):
        register(write(tmp_path / "a", ours), "a", kind="other", ledger=ledger)
    with pytest.raises(UsageError, match="printable"):
        register(tmp_path / "a", "a\n", kind="base", ledger=ledger)
    part = {name: values for name, values in ours.items() if "layers.2.mlp.up" not in name}
    with pytest.raises(FormatError, match="register a whole model"):
        register(write(tmp_path / "b", part), "b", kind="base", ledger=ledger)
    spoiled = ours | {"model.layers.0.mlp.gate_proj.weight": np.full((96, 64), np.nan)}
    with pytest.raises(FormatError, match="not finite"):
        register(write(tmp_path / "c", spoiled), "c", kind="base", ledger=ledger)
    renamed = {name.replace("model.", "language.model."): values for name, values in ours.items()}
    with pytest.raises(FormatError, match="other names"):
        register(write(tmp_path / "d", renamed), "d", kind="base", ledger=ledger)
    assert ledger.events(EVENT) == []


def test_a_changed_artifact_is_refused(tmp_path: Path, ledger: Ledger) -> None:
    event = register(write(tmp_path / "ours", weights()), "ours", kind="release", ledger=ledger)
    path = ledger.get_file(event.payload["artifact"])
    path.chmod(0o644)
    put(path, safetensors_bytes({}, b""))
    with pytest.raises(SteelyardError, match="corrupted"):
        Registry.load(ledger)
