"""The moderation scorers, trained small here: long texts, neighbours, canaries; and damage refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from steelyard.base.errors import FormatError, UsageError
from steelyard.base.progress import Silent
from steelyard.scorers import backbone, contextual
from steelyard.scorers.base import Item, Score, Scorer
from steelyard.scorers.card import auc
from steelyard.scorers.moderation import CATEGORIES
from steelyard.scorers.registry import open_scorer
from steelyard.train import moderation
from steelyard.train.moderation_data import contrast_sentences

NAMES = ["contextual", "lexical"]
backbone_folder = backbone.backbone_folder  # as it is, before the fixture below stands in for it


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Iterator[Path]:
    """A folder of both scorers, from our own sentences alone; the contextual one of two layers and a few steps."""
    folder = tmp_path_factory.mktemp("scorers")
    rows = contrast_sentences()
    with pytest.MonkeyPatch.context() as patch:
        for module in (contextual, moderation):
            patch.setattr(module, "LAYERS", 2)
        patch.setattr(moderation, "FIRST_LAYER", 0)
        patch.setattr(moderation, "backbone_folder", lambda cache, progress: smollm2)
        patch.setattr(backbone, "backbone_folder", lambda cache, progress: smollm2)
        for name in NAMES:
            weights = folder / f"{name}.safetensors"
            if name == "lexical":
                moderation.save_lexical(rows, weights)
            else:
                moderation.save_contextual(moderation.tuned(rows, folder / "work", 0, Silent(), 0.2), weights)
            moderation.write_card(name, rows[::4], weights, {}, Silent())
        yield folder


def values(scorer: Scorer, *texts: str) -> list[dict[str, float]]:
    found = scorer.score([Item("", text) for text in texts])
    return [dict(one.values) for one in found if isinstance(one, Score)]


def test_the_lexical_scorer_learned(trained: Path) -> None:
    import numpy as np

    scorer = open_scorer(f"trained:{trained}/lexical")
    rows = [row for row in contrast_sentences() if row.part == "calibration"]
    found = values(scorer, *(row.text for row in rows))
    toxic = np.array([row.labels[0] == 1 for row in rows])
    # The sentences are written so that words alone tell little: chance is .5
    assert auc(np.array([one["toxicity"] for one in found]), toxic) > 0.65
    calibration = scorer.identity().categories
    assert set(calibration) == set(CATEGORIES)
    assert all(one.positives and one.negatives for one in calibration.values())


@pytest.mark.parametrize("name", NAMES)
def test_canaries_of_both_kinds_for_every_category(trained: Path, name: str) -> None:
    found = open_scorer(f"trained:{trained}/{name}").canaries()
    assert {(one.category, one.expected) for one in found} == {(c, e) for c in CATEGORIES for e in ("above", "below")}


@pytest.mark.parametrize("name", NAMES)
def test_the_worst_window_of_a_long_text_counts(trained: Path, name: str) -> None:
    scorer = open_scorer(f"trained:{trained}/{name}")
    calm = "The committee met on Tuesday and agreed on the plan for the new bridge over the river. " * 40
    insult = " ".join(["You are a stupid, worthless piece of shit."] * 60)
    alone, after, without = values(scorer, insult, calm + insult, calm)
    for category in CATEGORIES:
        assert after[category] >= 0.999 * max(without[category], 0)
    assert after["toxicity"] >= 0.5 * alone["toxicity"]


@pytest.mark.parametrize("name", NAMES)
def test_a_score_does_not_depend_on_its_neighbours(trained: Path, name: str) -> None:
    scorer = open_scorer(f"trained:{trained}/{name}")
    texts = ["", "a", "Good morning.", "My Muslim neighbours brought us soup.", "Go to hell, all of you. " * 40]
    together = values(scorer, *texts)
    assert [values(scorer, text)[0] for text in texts] == together


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_the_card_does_not_describe_are_refused(trained: Path, name: str, tmp_path: Path) -> None:
    for file in (f"{name}.safetensors", f"{name}.json"):
        shutil.copyfile(trained / file, tmp_path / file)
    assert open_scorer(f"trained:{tmp_path}/{name}").identity() == open_scorer(f"trained:{trained}/{name}").identity()
    data = bytearray((tmp_path / f"{name}.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / f"{name}.safetensors").write_bytes(data)
    with pytest.raises(FormatError, match="changed since its errors were measured"):
        open_scorer(f"trained:{tmp_path}/{name}")
    card = json.loads((tmp_path / f"{name}.json").read_text())
    del card["categories"]
    (tmp_path / f"{name}.json").write_text(json.dumps(card))
    with pytest.raises(FormatError, match="not a scorer's card"):
        open_scorer(f"trained:{tmp_path}/{name}")


def test_a_name_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'kindness' is no scorer's name"):
        open_scorer(f"trained:{tmp_path}/kindness")


def test_a_backbone_that_was_changed_is_refused(smollm2: Path, tmp_path: Path) -> None:
    from steelyard.base.errors import SteelyardError

    folder = tmp_path / "backbone" / backbone.WEIGHTS[:16]
    shutil.copytree(smollm2, folder)
    assert backbone_folder(tmp_path, Silent()) == folder
    assert len(backbone.lower_layers(folder, 2).model.layers) == 2
    with pytest.raises(SteelyardError, match="has 30 layers, not 31"):
        backbone.lower_layers(folder, 31)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(SteelyardError, match="is not the model that the scorer was trained with"):
        backbone_folder(tmp_path, Silent())
