"""The scorers that ship: known labels, independence of the batch, identity, refusals."""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from steelyard.base.canonical import sha256_file
from steelyard.base.errors import FormatError
from steelyard.scorers.base import Item, Score, score_checked
from steelyard.scorers.embedded import WEIGHTS, Embedded
from steelyard.scorers.head import Head
from steelyard.scorers.refusal import RefusalScorer
from steelyard.scorers.registry import EMBEDDED

NAMES = sorted(EMBEDDED)


def values(scorer: Embedded, items: list[Item], category: str | None = None) -> list[float]:
    """Of `category`, or of the first one."""
    results = score_checked(scorer, items)
    assert all(isinstance(result, Score) for result in results), results
    return [result.values[category or scorer.covered[0]] for result in results if isinstance(result, Score)]


@pytest.fixture(scope="module", params=NAMES)
def scorer(request: pytest.FixtureRequest) -> Embedded:
    return EMBEDDED[request.param](WEIGHTS)


def test_canaries_are_scored_right_with_a_margin(scorer: Embedded) -> None:
    canaries = scorer.canaries()
    assert len({canary.id for canary in canaries}) == len(canaries)
    for category in scorer.covered:
        own = [canary for canary in canaries if canary.category == category]
        threshold = scorer.identity().categories[category].threshold
        for expected in ("above", "below"):
            assert sum(canary.expected == expected for canary in own) >= 3
        for canary, value in zip(own, values(scorer, [canary.item for canary in own], category), strict=True):
            odds = [math.log(p / (1 - p)) for p in (value, threshold)]
            assert (odds[0] - odds[1]) * (1 if canary.expected == "above" else -1) > 0.3, (canary.id, value, threshold)


def test_scores_depend_neither_on_order_nor_on_batch_neighbours(scorer: Embedded) -> None:
    items = [canary.item for canary in scorer.canaries()]
    items += [Item("", "word " * count) for count in (1, 7, 30, 90, 200)] + [Item("", "You idiot. " + "ok " * 300)]
    alone = [values(scorer, [item])[0] for item in items]
    shuffled = list(range(len(items)))
    random.Random(0).shuffle(shuffled)
    together = values(scorer, [items[index] for index in shuffled])
    assert np.allclose([alone[index] for index in shuffled], together, rtol=0, atol=1e-5)
    assert values(scorer, items) == values(scorer, items)


def test_an_insult_after_a_long_harmless_text_is_seen() -> None:
    scorer = EMBEDDED["contextual"](WEIGHTS)
    threshold = scorer.identity().categories["toxicity"].threshold
    calm = "The garden was quiet in the morning and the birds sang in the old apple tree. " * 12
    low, high = values(scorer, [Item("", calm), Item("", calm + "You are a fucking stupid piece of shit, you moron.")])
    assert low < threshold <= high


@pytest.mark.parametrize("text", ["", "   \n", "...", "\u200b", "ok"])
def test_next_to_nothing_is_neither_toxic_nor_a_refusal(scorer: Embedded, text: str) -> None:
    assert values(scorer, [Item("", text)])[0] < scorer.identity().categories[scorer.covered[0]].threshold


def test_no_items_no_scores(scorer: Embedded) -> None:
    assert scorer.score([]) == []


def test_identity_is_stable_and_names_the_weights(scorer: Embedded) -> None:
    again = EMBEDDED[scorer.name](WEIGHTS)
    assert scorer.identity() == again.identity()
    assert scorer.identity().digest == again.identity().digest
    others = [EMBEDDED[name](WEIGHTS).identity() for name in NAMES if name != scorer.name]
    assert all(other.weights != scorer.identity().weights for other in others)


def test_identity_changes_with_the_head(tmp_path: Path) -> None:
    before = RefusalScorer().identity()
    head = Head.load(WEIGHTS / "refusal.safetensors")
    head.blend[2] += 0.001
    head.save(tmp_path / "refusal.safetensors")
    card = json.loads((WEIGHTS / "refusal.json").read_text())
    (tmp_path / "refusal.json").write_text(json.dumps(card))
    with pytest.raises(FormatError, match="changed since its errors were measured"):
        RefusalScorer(tmp_path)
    card["head"] = sha256_file(tmp_path / "refusal.safetensors")
    (tmp_path / "refusal.json").write_text(json.dumps(card))
    after = RefusalScorer(tmp_path).identity()
    assert after.weights != before.weights
    assert after.digest != before.digest


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    for name in ("refusal.json", "refusal.safetensors"):
        shutil.copy(WEIGHTS / name, tmp_path / name)
    whole = (tmp_path / "refusal.safetensors").read_bytes()
    (tmp_path / "refusal.safetensors").write_bytes(whole[:-1])
    with pytest.raises(FormatError, match=r"refusal\.safetensors"):
        RefusalScorer(tmp_path)
    (tmp_path / "refusal.json").write_text("[]")
    with pytest.raises(FormatError, match=r"refusal\.json"):
        RefusalScorer(tmp_path)


def test_the_weights_are_small() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.glob("*.safetensors")) <= 10_000_000


def test_identity_and_canaries_need_no_torch() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'tokenizers'): sys.modules[name] = None\n"
        "from steelyard.scorers.registry import open_scorer\n"
        "from steelyard.safety.statistics import certifiable_floor\n"
        "for name in ('contextual', 'lexical', 'refusal', 'answer'):\n"
        "    scorer = open_scorer('embedded:' + name)\n"
        "    assert scorer.identity().digest and len(scorer.canaries()) >= 16\n"
        "    assert all(certifiable_floor(one) < 1 for one in scorer.identity().categories.values())\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_encoder_equals_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    import torch

    from steelyard.base.progress import Silent
    from steelyard.hub.sources import cache_folder, fetch
    from steelyard.scorers.encoder import SOURCE, Encoder

    folder = fetch(SOURCE, cache_folder(), Silent())
    texts = ["Hello world.", "A longer sentence about the weather in Paris and beyond, with a comma.", "x"]
    encoder = Encoder(folder)
    ours = encoder.features([encoder.windows(text, 128)[0][1] for text in texts])[:, -384:]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = transformers.AutoModel.from_pretrained(folder).eval()(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    pooled = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1).numpy()
    assert np.allclose(ours, pooled, atol=1e-5)
