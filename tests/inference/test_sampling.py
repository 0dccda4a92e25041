"""The noise against published vectors; the drawn tokens against the distribution they must have."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from steelyard.base.errors import SteelyardError
from steelyard.inference import sampling as sampling_module
from steelyard.inference.endpoint import Sampling
from steelyard.inference.sampling import (
    check_sampling,
    choose,
    gumbel,
    log_probabilities,
    margins,
    penalise,
    philox,
)

DRAW = Sampling(temperature=1.0)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123's kat_vectors, philox4x32 10
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    assert philox(np.array(counter, dtype=np.uint32), np.array(key, dtype=np.uint32)).tolist() == expected


def test_noise_depends_on_seed_and_position_alone() -> None:
    seeds, positions = [5, 2**63 + 5, 5, -1, 5], [0, 0, 1, 0, 0]
    noise = gumbel(seeds, positions, 448)
    assert torch.equal(noise[0], noise[4])
    assert torch.equal(gumbel([5], [1], 448)[0], noise[2])
    assert torch.equal(gumbel([5], [0], 3)[0], noise[0, :3])
    assert len({tuple(row[:4].tolist()) for row in noise}) == 4
    assert gumbel([2**63 - 1], [2**31], 5).isfinite().all()


def test_noise_is_gumbel() -> None:
    noise = gumbel(range(1000), [3] * 1000, 448).double()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.02)
    assert abs(float(torch.corrcoef(noise[:, :8].T).fill_diagonal_(0).abs().max())) < 0.15


def expected_distribution(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The plain definition: sort, cut, renormalise."""
    p = torch.softmax(logits.double() / sampling.temperature, -1)
    order = p.argsort(descending=True)
    kept = order[: sampling.top_k] if sampling.top_k else order
    q = p[kept] / p[kept].sum()
    ahead = q.cumsum(0) - q
    kept = kept[(ahead < sampling.top_p) | (torch.arange(len(q)) == 0)]
    out = torch.zeros_like(p)
    out[kept] = p[kept] / p[kept].sum()
    return out


@pytest.mark.parametrize(
    "sampling",
    [
        DRAW,
        replace(DRAW, temperature=0.7),
        replace(DRAW, top_k=5),
        replace(DRAW, top_k=300),
        replace(DRAW, top_p=0.5),
        replace(DRAW, top_p=0.999),
        replace(DRAW, top_k=40, top_p=0.8, temperature=1.5),
        replace(DRAW, temperature=50.0),
    ],
)
@pytest.mark.parametrize("vocab", [3, 700, 10240])
def test_drawn_tokens_have_the_right_distribution(sampling: Sampling, vocab: int) -> None:
    torch.manual_seed(vocab)
    logits = torch.randn(vocab) * 3
    count, share = 4000, 200
    expected = expected_distribution(logits, sampling)
    drawn = torch.cat(
        [
            choose(logits.expand(share, -1), [sampling] * share, range(start, start + share), [7] * share)
            for start in range(0, count, share)
        ]
    )
    assert (expected[drawn] > 0).all()  # nothing that the filters cut
    # chi-square over cells of at least 5 expected draws each, the rest pooled
    observed = torch.bincount(drawn, minlength=vocab).double()
    cells = expected * count >= 5
    o = torch.cat((observed[cells], observed[~cells].sum()[None]))
    e = torch.cat((expected[cells] * count, (expected[~cells].sum() * count)[None]))
    keep = e > 0
    freedom = max(int(keep.sum()) - 1, 1)
    chi = float(((o - e)[keep] ** 2 / e[keep]).sum())
    assert chi < freedom + 4.5 * math.sqrt(2 * freedom) + 8


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(0)
    logits = torch.randn(9, 49152) * 4
    samplings = [DRAW, Sampling(), replace(DRAW, top_p=0.9), replace(DRAW, top_k=3), Sampling(), DRAW]
    samplings += [
        replace(DRAW, top_p=0.9999999, temperature=3.0),
        replace(DRAW, top_k=100, top_p=0.5),
        replace(DRAW, temperature=1e-30),
    ]
    together = choose(logits, samplings, range(9), range(9))
    for i in range(9):
        assert choose(logits[i : i + 1], samplings[i : i + 1], [i], [i])[0] == together[i]
        assert margins(logits[i : i + 1], together[i : i + 1], samplings[i], i, [i]) == [0.0]
    assert together[8] == logits[8].argmax()


def test_penalties_are_those_of_transformers_and_openai() -> None:
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    torch.manual_seed(4)
    logits, history = torch.randn(4, 300) * 3, ([5, 9, 9, 250], [7, 7, 7, 9, 0])
    samplings = [
        Sampling(repetition_penalty=1.7),
        Sampling(),
        Sampling(presence_penalty=0.5, frequency_penalty=-0.25),
        Sampling(repetition_penalty=0.8, presence_penalty=-1.0, frequency_penalty=2.0),
    ]
    kept = logits.clone()
    found = penalise(logits, samplings, [history] * 4)
    assert torch.equal(logits, kept)  # untouched: log-probabilities are read from it
    seen = torch.tensor([[*history[0], *history[1]]])

    def repeated(row: int, penalty: float) -> torch.Tensor:
        return RepetitionPenaltyLogitsProcessor(penalty)(seen, logits[row : row + 1].clone())[0]

    assert torch.equal(found[0], repeated(0, 1.7))
    assert torch.equal(found[1], logits[1])
    expected, last = logits[2].clone(), repeated(3, 0.8)
    for token, count in {7: 3, 9: 1, 0: 1}.items():  # of the completion only
        expected[token] -= 0.5 - 0.25 * count
        last[token] -= -1.0 + 2.0 * count
    assert torch.allclose(found[2], expected, atol=1e-6)
    assert torch.allclose(found[3], last, atol=1e-6)
    assert penalise(logits, [Sampling()] * 4, [history] * 4) is logits
    assert penalise(logits.bfloat16(), samplings, [([1], [])] * 4).dtype == torch.float32


@pytest.mark.parametrize("sampling", [replace(DRAW, min_p=0.3), replace(DRAW, min_p=0.02, top_p=0.9, top_k=70)])
def test_min_p_keeps_what_transformers_keeps(sampling: Sampling) -> None:
    from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    torch.manual_seed(5)
    logits = torch.randn(20, 2000) * 3
    samplings = [replace(sampling, temperature=0.5 + i / 10) for i in range(20)]
    scaled = torch.stack([row / each.temperature for row, each in zip(logits, samplings, strict=True)])
    ids = torch.zeros(20, 1, dtype=torch.int64)
    if sampling.top_k:
        scaled = TopKLogitsWarper(sampling.top_k)(ids, scaled)
        scaled = TopPLogitsWarper(sampling.top_p)(ids, scaled)
    kept = MinPLogitsWarper(sampling.min_p)(ids, scaled).isfinite()
    own, _ = sampling_module._scale(logits, samplings)
    threshold = sampling_module._thresholds(own, sampling_module._weights(own), samplings)
    assert threshold is not None
    assert torch.equal(own >= threshold[:, None], kept)
    assert 20 < int(kept.sum()) < 2000
    for seed in range(30):
        tokens = choose(logits, samplings, [seed] * 20, [0] * 20)
        assert kept[torch.arange(20), tokens].all()


def test_log_probabilities_are_log_softmax() -> None:
    torch.manual_seed(6)
    logits = torch.randn(3, 1000) * 5
    found = log_probabilities(logits, [3, 999, 0], [2, 0, 20])
    for row, token, (own, top), count in zip(logits.log_softmax(-1), [3, 999, 0], found, [2, 0, 20], strict=True):
        assert own == pytest.approx(float(row[token]), abs=1e-5)
        assert [token for token, _ in top] == row.topk(count).indices.tolist()
        assert [value for _, value in top] == pytest.approx(row.topk(count).values.tolist(), abs=1e-5)


def test_greedy_is_argmax_and_ties_go_to_the_lowest() -> None:
    torch.manual_seed(1)
    logits = torch.randn(20, 5000).bfloat16()  # so coarse that ties abound
    logits[3] = 1.0
    expected = [int((row == row.max()).nonzero()[0]) for row in logits]
    assert choose(logits, [Sampling()] * 20, [0] * 20, [0] * 20).tolist() == expected
    assert margins(logits, torch.tensor(expected), Sampling(), 0, range(20)) == [0.0] * 20


def test_margins_say_how_far_a_token_is() -> None:
    logits = torch.tensor([[4.0, 3.0, 1.0, -50.0]])
    one = [torch.tensor([i]) for i in range(4)]
    assert margins(logits, one[2], Sampling(), 0, [0]) == [3.0]
    for seed in range(50):
        found = [margins(logits, token, replace(DRAW, top_k=3), seed, [2])[0] for token in one]
        chosen = int(choose(logits, [replace(DRAW, top_k=3)], [seed], [2])[0])
        assert found[chosen] == 0.0
        assert sum(value == 0.0 for value in found) == 1
        assert found[3] > 51  # below the cut by 51, then beaten as well


def test_a_small_change_of_logits_seldom_changes_the_token() -> None:
    torch.manual_seed(2)
    logits = torch.randn(1, 8192).expand(500, -1) * 2
    moved = logits + torch.randn(500, 8192) * 0.01
    samplings = [DRAW] * 500
    first, second = (choose(x, samplings, range(500), [0] * 500) for x in (logits, moved))
    assert int((first != second).sum()) <= 15  # total variation is about 0.4%
    assert max(margins(moved[i : i + 1], first[i : i + 1], DRAW, i, [0])[0] for i in range(500)) < 0.1


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [Sampling(), DRAW, replace(DRAW, top_p=0.5)])
def test_broken_logits_are_told(broken: float, sampling: Sampling) -> None:
    logits = torch.randn(2, 500)
    logits[1, 77] = broken
    tokens = choose(logits, [sampling] * 2, [0, 1], [0, 0])
    assert tokens[0] >= 0
    assert tokens[1] == -1
    assert margins(logits[1:], torch.tensor([3]), sampling, 1, [0]) == [math.inf]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": float("nan")}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"stop_tokens": (3, -1)}, "stop_tokens"),
        ({"stop_tokens": (3, 4.0)}, "stop_tokens"),
        ({"stop_tokens": 3}, "stop_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"stop": ("a", "")}, "stop"),
        ({"stop": "a"}, "stop"),
        ({"stop": (5,)}, "stop"),
        ({"temperature": True}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": 1e39}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": float("nan")}, "top_p"),
        ({"top_p": None}, "top_p"),
        ({"top_k": 5.0}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"top_k": float("inf")}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),
        ({"repetition_penalty": 1e300}, "repetition_penalty"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty"),
        ({"presence_penalty": float("nan")}, "presence_penalty"),
        ({"frequency_penalty": "1"}, "frequency_penalty"),
        ({"max_tokens": 5.0}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"logprobs": 2.0}, "logprobs"),
    ],
)
def test_meaningless_settings_are_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(SteelyardError, match=f"^request p-17: {named} is .+: it must be ") as error:
        check_sampling(replace(DRAW, **change), "p-17")
    assert ascii(change[named])[:77] in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0, "top_p": 1, "min_p": 1, "repetition_penalty": 100},
        {"temperature": np.float32(0.5), "top_k": np.int64(5), "presence_penalty": -2, "frequency_penalty": 2},
        {"temperature": 1e-320, "top_p": 1e-320, "min_p": 1e-320, "repetition_penalty": 0.01},
        {"temperature": 100.0, "top_k": 2**31},
        {"top_k": 10**30, "stop": ["a"], "stop_tokens": {3}, "logprobs": 0},
    ],
)
def test_whatever_is_let_in_can_be_drawn_from(change: dict[str, Any]) -> None:
    sampling = replace(DRAW, **change)
    check_sampling(sampling, "0")
    for dtype in (torch.float32, torch.bfloat16, torch.float64):  # torch.float64: not by the kernels
        logits = penalise(torch.randn(1, 300).mul(1e4).to(dtype), [sampling], [([1, 2], [3, 3])])
        token = choose(logits, [sampling], [1], [0])
        assert 0 <= int(token) < 300
        assert margins(logits, token, sampling, 1, [0])[0] < 1e-3


def test_a_top_k_over_the_vocabulary_is_off() -> None:
    for dtype in (torch.float32, torch.float64):
        logits, rows = torch.randn(50, 300).to(dtype), range(50)
        plain = choose(logits, [replace(DRAW, top_k=0)] * 50, rows, rows)
        for top_k in (300, 301, 2**31 - 1, 2**31, 2**64):
            assert choose(logits, [replace(DRAW, top_k=top_k)] * 50, rows, rows).equal(plain)
