"""The refusal direction on a tiny model, beside transformers as an oracle of the residual stream."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from steelyard.base.canonical import sha256_hex
from steelyard.base.errors import SteelyardError, UsageError
from steelyard.inference.endpoint import Message
from steelyard.model.chat import Renderer
from steelyard.trace.refusal_direction import Directions, last_token_states, phrases, refusal_directions
from steelyard.train.safety_prompts import written_prompts

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train"))

from tiny_models import tiny_folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "model", layers=3)


def test_states_are_those_of_transformers(tiny: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    prompts = [f"prompt {'x' * number}" for number in range(35)]  # more than one batch, every one of another length
    found = last_token_states(tiny, prompts)
    assert found.shape == (35, 3, 64)
    peer, renderer = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), Renderer(tiny)
    for number in (0, 7, 34):
        tokens = torch.tensor([renderer.prompt_tokens((Message("user", prompts[number]),))])
        with torch.no_grad():
            states = peer(tokens, output_hidden_states=True).hidden_states
        for layer in (0, 1):  # transformers gives the last one behind the final norm
            np.testing.assert_allclose(found[number, layer], states[layer + 1][0, -1], rtol=1e-3, atol=1e-4)


def test_a_difference_in_the_prompts_is_found_and_points_to_the_harmful(tiny: Path) -> None:
    harmful, harmless = [f"{'z' * 30}{n}" for n in range(16)], [f"{'a' * 30}{n}" for n in range(16)]
    found = refusal_directions(tiny, harmful, harmless)
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), 1, rtol=1e-5)
    assert found.separation.max() > 0.95
    other = refusal_directions(tiny, harmless, harmful)
    np.testing.assert_allclose(other.vectors, -found.vectors, atol=1e-6)


def test_nothing_to_tell_apart_is_near_a_half(tiny: Path) -> None:
    """Measured on prompts that the direction was not made from: else it would always seem to separate."""
    texts = [sha256_hex(str(number).encode())[:8] for number in range(160)]
    found = refusal_directions(tiny, texts[::2], texts[1::2])
    assert np.abs(found.separation - 0.5).max() < 0.2


def test_the_telling_ones_come_best_first() -> None:
    found = Directions(np.eye(4, dtype=np.float32), np.array([0.5, 0.8, 0.95, 0.71]))
    assert [int(vector.argmax()) for vector in found.telling()] == [2, 1, 3]
    with pytest.raises(SteelyardError, match="no refusal direction"):
        found.telling(0.99)


def test_too_few_prompts_are_refused(tiny: Path) -> None:
    with pytest.raises(UsageError, match="at least 8"):
        refusal_directions(tiny, ["x"] * 7, ["y"] * 9)


def test_phrases_are_spread_over_hazards_and_never_the_held_out_ones() -> None:
    harmful, harmless = phrases(128)
    of = {prompt.text: prompt for prompt in written_prompts(1)}
    assert len(set(harmful)) == len(set(harmless)) == 128
    assert all(of[text].harmful and not of[text].held_out for text in harmful)
    assert not any(of[text].harmful or of[text].held_out for text in harmless)
    assert len({of[text].hazard for text in harmful}) == len(
        {prompt.hazard for prompt in of.values() if prompt.harmful}
    )
    with pytest.raises(UsageError, match="are written"):
        phrases(100_000)
