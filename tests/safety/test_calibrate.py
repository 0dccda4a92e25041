"""A scorer's errors from labels: the verification correction by hand and by simulation, thresholds, own labels."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safety_fakes import HEX, WordScorer, calibration
from scipy.special import ndtr, ndtri

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.safety.calibrate import (
    Labels,
    Rule,
    calibrate_own,
    calibrate_sample,
    check_canaries,
    choose_threshold,
    counted,
    half,
    of_sample,
    rule_of,
    verified,
    whole,
)
from steelyard.safety.draw import Drawn, Sample
from steelyard.safety.own_labels import read_own
from steelyard.safety.statistics import clopper_pearson
from steelyard.scorers.base import Calibration, Item, Score, ScorerIdentity

SAID: Any = ("made for a test", "2026-01-01")
KEEP, YOUDEN = Rule("keep"), Rule("youden")
HOW: dict[str, Any] = {"seed": 0, "source": SAID[0], "date": SAID[1]}


def specific(share: float) -> Rule:
    return Rule("specificity", share)


def labels(*parts: tuple[str, float, float, int, int]) -> Labels:
    """Of (stratum, score, weight, positives, negatives)."""
    rows = [(s, x, w, yes) for s, x, w, pos, neg in parts for yes in [True] * pos + [False] * neg]
    strata, scores, weights, positive = zip(*rows, strict=True)
    return Labels(np.array(scores), np.array(positive), np.array(weights), np.array(strata))


# -- errors of a drawn sample ----------------------------------------------------------------------------------------


def test_verification_correction_by_hand() -> None:
    """All 100 over the threshold are labelled, and a tenth of the 900 under it: 90 positives are missed, not 9."""
    found = verified(labels(("above", 0.9, 1, 80, 20), ("below", 0.1, 10, 9, 81)), 0.5, *SAID)
    assert found.sensitivity == pytest.approx(80 / 170, abs=0.5 / found.positives)
    assert found.specificity == pytest.approx(810 / 830, abs=0.5 / found.negatives)
    # The positives are worth fewer than the 89 labelled: most of the doubt lies in nine that stand for ninety.
    assert 15 < found.positives < 80
    assert found.negatives == 101  # never more than were labelled


def test_where_all_are_labelled_it_counts() -> None:
    all_of = labels(("above", 0.9, 1, 800, 200), ("below", 0.1, 1, 90, 810))
    assert verified(all_of, 0.5, *SAID) == counted(all_of, 0.5, *SAID)


def test_no_positive_found_under_the_threshold_is_not_none_there() -> None:
    found = verified(labels(("above", 0.9, 1, 40, 0), ("below", 0.1, 20, 0, 90)), 0.5, *SAID)
    assert found.true_positives == found.positives <= 4
    more = verified(labels(("above", 0.9, 1, 40, 0), ("below", 0.1, 1, 0, 1800)), 0.5, *SAID)
    assert more.positives > 25
    with pytest.raises(SteelyardError, match="worth less than one: 1 of them"):
        verified(labels(("above", 0.9, 1, 1, 9), ("below", 0.1, 1000, 0, 10)), 0.5, *SAID)


def test_a_new_threshold_splits_a_stratum() -> None:
    both = labels(("a", 0.9, 1, 50, 0), ("b", 0.7, 4, 20, 20), ("b", 0.6, 4, 0, 40), ("c", 0.1, 10, 5, 95))
    kept, moved = (verified(both, threshold, *SAID) for threshold in (0.5, 0.65))
    assert kept.sensitivity == pytest.approx(130 / 180, abs=0.5 / kept.positives)
    assert moved.sensitivity == pytest.approx(kept.sensitivity, abs=0.03)
    assert kept.specificity == pytest.approx(950 / 1190, abs=0.5 / kept.negatives)
    assert moved.specificity == pytest.approx(1110 / 1190, abs=0.5 / moved.negatives)


@pytest.mark.parametrize(("rate", "drawn"), [(0.03, 100), (0.2, 60)])
def test_bounds_from_the_effective_numbers_hold(rate: float, drawn: int) -> None:
    """One-sided 95% exact bounds cover the true sensitivity and specificity, in 200 runs of 2,000 completions of which
    all over the threshold (at most `drawn`) and `drawn` under it are labelled."""
    chance = np.random.default_rng(0)
    sensitivity, specificity = float(ndtr(1.0)), float(ndtr(2.0))
    hits = np.zeros(3)
    for _ in range(200):
        positive = chance.random(2000) < rate
        score = ndtr(np.where(positive, 1.0, -2.0) + ndtri(chance.random(2000)))
        strata = np.where(score >= 0.5, "above", "below")
        parts = []
        for side in ("above", "below"):
            members = np.flatnonzero(strata == side)
            some = chance.choice(members, min(drawn, len(members)), replace=False)
            weights = np.full(len(some), len(members) / len(some))
            parts.append(Labels(score[some], positive[some], weights, strata[some]))
        both = Labels(*(np.concatenate([getattr(part, name) for part in parts]) for name in Labels.__annotations__))
        found = verified(both, 0.5, *SAID)
        hits += (
            clopper_pearson(found.true_positives, found.positives)[0] <= sensitivity,
            clopper_pearson(found.true_negatives, found.negatives)[0] <= specificity,
            clopper_pearson(found.true_negatives, found.negatives)[1] >= specificity,
        )
    assert hits.min() >= 0.92 * 200


# -- labels of a draw ------------------------------------------------------------------------------------------------


def sample(*parts: tuple[str, float, int, int]) -> Sample:
    """Of (band, score, drawn, population)."""
    return Sample(
        run="r",
        journal=HEX,
        scorer="python:a:b",
        identity=WordScorer("toxicity", "insult").identity(),
        category="toxicity",
        seed=0,
        population={band: population for band, _, _, population in parts},  # type: ignore[misc]
        drawn=tuple(
            Drawn(
                key=f"{band} {i}",
                probe=f"p{i}",
                sample=0,
                axis="harmful",
                language="en",
                band=band,  # type: ignore[arg-type]
                score=score,
                probability=count / population,
            )
            for band, score, count, population in parts
            for i in range(count)
        ),
    )


def test_what_was_skipped_counts_as_the_rest_of_its_band() -> None:
    one = sample(("far above", 0.95, 4, 4), ("far below", 0.05, 10, 100))
    given = {f"far above {i}": "yes" for i in range(3)} | {"far above 3": "skip"}
    given |= {f"far below {i}": "no" for i in range(5)}
    found = of_sample(one, given)
    assert found.weights.tolist() == pytest.approx([4 / 3] * 3 + [20] * 5)
    with pytest.raises(SteelyardError, match="no label of a completion that scored far below the threshold"):
        of_sample(one, {key: label for key, label in given.items() if "above" in key})
    with pytest.raises(SteelyardError, match="none of 8 labels is positive, so sensitivity"):
        of_sample(one, {key: "no" if label == "yes" else label for key, label in given.items()})


def test_a_calibration_of_a_draw() -> None:
    one = sample(("far above", 0.95, 40, 40), ("far below", 0.05, 100, 1000))
    given = {f"far above {i}": "yes" if i < 30 else "no" for i in range(40)}
    given |= {f"far below {i}": "yes" if i < 2 else "no" for i in range(100)}
    found = calibrate_sample(WordScorer("toxicity", "insult"), one, given, rule=KEEP, **HOW)
    assert found.calibration == verified(of_sample(one, given), 0.5, *SAID)
    assert found.figures["positive_share"] == pytest.approx((30 + 20) / 1040)
    assert found.figures["bands"]["far below"] == {"population": 1000, "labelled": 100, "positive": 2}
    chosen = calibrate_sample(WordScorer("toxicity", "insult"), one, given, rule=YOUDEN, **HOW).calibration
    assert chosen.threshold == pytest.approx(0.5)
    assert chosen.specificity == pytest.approx(980 / 990, abs=0.03)
    assert chosen.negatives <= 60


# -- thresholds ------------------------------------------------------------------------------------------------------


def test_thresholds_by_hand() -> None:
    some = labels(("x", 0.9, 1, 6, 0), ("x", 0.6, 1, 3, 1), ("x", 0.4, 1, 1, 3), ("x", 0.1, 1, 0, 16))
    assert choose_threshold(some, YOUDEN) == pytest.approx(0.5)  # .9 + .95; at .75 .6 + 1, at .25 1 + .8
    assert choose_threshold(some, specific(0.8)) == pytest.approx(0.25)
    assert choose_threshold(some, specific(0.95)) == pytest.approx(0.5)
    assert choose_threshold(some, specific(0.96)) == pytest.approx(0.75)
    weighted = labels(("x", 0.9, 1, 6, 0), ("x", 0.6, 20, 0, 1), ("x", 0.4, 1, 4, 0), ("x", 0.1, 1, 0, 16))
    assert choose_threshold(weighted, YOUDEN) == pytest.approx(0.75)
    with pytest.raises(SteelyardError, match=r"no threshold reaches a specificity of 0\.9"):
        choose_threshold(labels(("x", 0.9, 1, 5, 5), ("x", 0.1, 1, 5, 5)), specific(0.9))
    with pytest.raises(SteelyardError, match="one score"):
        choose_threshold(labels(("x", 0.9, 1, 5, 5)), YOUDEN)


def test_rules() -> None:
    assert [rule_of(text) for text in ("keep", "youden", "specificity:0.98", "specificity:.9")] == [
        KEEP,
        YOUDEN,
        specific(0.98),
        specific(0.9),
    ]
    for wrong in (
        "",
        "best",
        "specificity:",
        "specificity:1.0",
        "specificity:0.0",
        "specificity:-1",
        "specificity:nan",
    ):
        with pytest.raises(UsageError, match="give keep, youden, or specificity:X"):
            rule_of(wrong)


def test_halves_are_stratified_and_stand_for_the_whole() -> None:
    one = labels(("a", 0.9, 2, 5, 6), ("b", 0.5, 3, 3, 4), ("c", 0.1, 10, 1, 40))
    first = half(one, 0)
    assert {s: int(first[one.strata == s].sum()) for s in "abc"} == {"a": 5, "b": 4, "c": 20}
    assert first.tolist() == half(one, 0).tolist() != half(one, 1).tolist()
    for kept in (first, ~first):
        part = one.part(kept)
        for stratum in "abc":
            assert part.weights[part.strata == stratum].sum() == pytest.approx(one.weights[one.strata == stratum].sum())
    with pytest.raises(SteelyardError, match="no label is left of the texts b"):
        one.part(one.strata != "b")


class Noise:
    """Scores that say nothing; canaries that come out right."""

    def __init__(self, values: dict[str, float]) -> None:
        self.values = values

    def identity(self) -> ScorerIdentity:
        return ScorerIdentity(name="noise", weights=HEX, code=HEX, categories={"toxicity": calibration()})

    def score(self, items: Any) -> list[Any]:
        return [Score({"toxicity": self.values.get(item.completion, 0.5)}) for item in items]

    def canaries(self) -> list[Any]:
        return []


def test_a_chosen_threshold_is_measured_on_other_labels(tmp_path: Path) -> None:
    """On pure noise the best threshold of a half looks good there; on the other half it is worth nothing."""
    chance = np.random.default_rng(1)
    texts = [f"text {i}" for i in range(400)]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps({"text": t, "label": int(chance.random() < 0.2)}) + "\n" for t in texts))
    rows, gains = read_own(path, ["toxicity"], None), []
    for seed in range(12):
        noise = Noise({text: float(chance.random()) for text in texts})
        found = calibrate_own(noise, rows, rule=YOUDEN, **(HOW | {"seed": seed}))["toxicity"].calibration
        assert found.positives + found.negatives == 200
        gains.append(found.sensitivity + found.specificity - 1)
    assert abs(float(np.mean(gains))) < 0.08


def test_a_threshold_at_which_canaries_fail_is_refused() -> None:
    scorer = WordScorer("toxicity", "insult")
    check_canaries(scorer, "toxicity", 0.7)
    with pytest.raises(SteelyardError, match=r"at the threshold 0\.9900 only 5 of 10 canaries come out right"):
        check_canaries(scorer, "toxicity", 0.99)


# -- labels of one's own ---------------------------------------------------------------------------------------------

OWN = [
    ("an insult", "1", "en", "men"),
    ("insult me", "1", "fr", "women"),
    ("vile", "1", "en", "women"),
    ("a fine insult of old", "0", "en", ""),
    *((f"good day {i}", "0", "fr" if i % 2 else "en", "men") for i in range(6)),
]


def test_own_labels_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text("text,label,language,group,note\n" + "".join(f"{','.join(row)},x\n" for row in OWN))
    rows = read_own(path, ["toxicity"], None)
    assert rows[1].item == Item("", "insult me", "fr")
    found = calibrate_own(WordScorer("toxicity", "insult"), rows, rule=KEEP, **HOW)["toxicity"]
    assert found.calibration == Calibration(
        threshold=0.5,
        true_positives=2,
        positives=3,
        true_negatives=6,
        negatives=7,
        source=SAID[0],
        measured=SAID[1],
    )
    assert found.figures["accuracy"]["right"] == 8
    assert found.figures["facets"]["group"]["women"]["sensitivity"]["right"] == 1
    assert set(found.figures["facets"]["group"]) == {"men", "women", "none"}
    assert found.figures["facets"]["language"]["fr"]["accuracy"]["right"] == 4


def test_columns_of_categories(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl.gz"
    rows = [{"text": "a", "prompt": "b", "threat": 1, "sexual": None}, {"text": "c", "threat": False, "sexual": "no"}]
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    found = read_own(path, ["threat", "sexual", "toxicity"], None)
    assert [row.labels for row in found] == [{"threat": True}, {"threat": False, "sexual": False}]
    assert found[0].item == Item("b", "a", "en")
    assert [row.labels for row in read_own(path, ["threat", "sexual"], "threat")] == [
        {"threat": True},
        {"threat": False},
    ]


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        ('{"text": "a", "label": 1}', UsageError, "which category is `label` for"),
        (
            '{"text": "a", "toxicty": 1}',
            UsageError,
            "no column of labels: name one `label`, or like one of threat, sexual",
        ),
        ('{"key": "a", "completion": "b", "prompt": ""}', UsageError, "a drawn sheet needs its sample.json"),
        ('{"text": "a", "threat": 2}', FormatError, "row 1: threat is '2': must be 1 or 0"),
        (
            '{"text": "a", "threat": 1}\n{"text": " ", "threat": 1}',
            FormatError,
            "row 2: its `text` is missing or empty",
        ),
        ('{"text": 3, "threat": 1}', FormatError, "row 1: its `text` must be text"),
        (
            '{"text": "a", "language": "%s", "threat": 1}' % ("e" * 101),
            FormatError,
            "`language` must be text of at most 100",
        ),
        ('{"text": "a", "threat": ""}', FormatError, "no row has a label"),
        ("", UsageError, "no column of labels"),
        (
            '{"text": "a", "threat": 1}\n' * 2,
            FormatError,
            "row 2: the text of row 1 again, labelled for threat: each text counts once",
        ),
        ('{"text": "\\ud800", "threat": 1}', FormatError, "row 1: its `text` holds half of a surrogate pair"),
    ],
    ids=range(11),
)
def test_own_labels_that_are_none(tmp_path: Path, content: str, error: type[Exception], says: str) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(content)
    with pytest.raises(error, match=says):
        read_own(path, ["threat", "sexual"], None)


def test_labels_of_one_kind_measure_nothing() -> None:
    with pytest.raises(SteelyardError, match="none of 2 labels is negative, so specificity"):
        whole(np.array([0.1, 0.9]), np.array([True, True]))
