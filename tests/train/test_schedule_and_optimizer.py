"""Learning rates by step, AdamW beside PyTorch's own, event files beside TensorBoard's reader."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch

from steelyard.base.errors import UsageError
from steelyard.train.metrics import EventFile, Metrics, read_metrics
from steelyard.train.optimizer import AdamW, Slab, clip_
from steelyard.train.schedule import learning_rate


def test_cosine_warms_up_to_the_peak_and_ends_at_the_floor() -> None:
    rate = learning_rate("cosine", 1.0, 0.1, 4, 20, 0.0)
    rates = [rate(step) for step in range(20)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[11] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[3:]))


def test_wsd_stays_then_falls_linearly() -> None:
    rate = learning_rate("wsd", 1.0, 0.0, 2, 20, 0.25)
    rates = [rate(step) for step in range(20)]
    assert rates[1:15] == [1.0] * 14
    assert rates[15:] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])


@pytest.mark.parametrize(
    ("peak", "floor", "warmup", "decay"), [(1, 2, 0, 0), (0, 0, 0, 0), (math.inf, 0, 0, 0), (1, 0, 20, 0), (1, 0, 0, 2)]
)
def test_what_makes_no_schedule_is_refused(peak: float, floor: float, warmup: int, decay: float) -> None:
    with pytest.raises(UsageError):
        learning_rate("cosine", peak, floor, warmup, 20, decay)


def test_adamw_is_pytorchs() -> None:
    torch.manual_seed(0)
    start, slopes = torch.randn(30), [torch.randn(30) for _ in range(5)]
    theirs = torch.nn.Parameter(start.clone())
    rival = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1)
    now = slopes[0]
    slab = Slab(start.clone(), lambda: now, True, lambda flat: {"a": flat[:10], "b": flat[10:]})
    ours = AdamW([slab], (0.9, 0.95), 1e-5, 0.1)
    for slope in slopes:
        now = slope.clone()
        theirs.grad = slope.clone()
        ours.step(0.01)
        rival.step()
    assert torch.allclose(slab.master, theirs.detach(), atol=1e-7)
    named = ours.named()
    assert set(named) == {"first.a", "first.b", "second.a", "second.b"}
    assert torch.allclose(torch.cat([named["first.a"], named["first.b"]]), rival.state[theirs]["exp_avg"], atol=1e-7)


def test_clipping_goes_by_the_norm_of_all() -> None:
    slopes = [torch.tensor([3.0]), torch.tensor([4.0])]
    slabs = [Slab(torch.zeros(1), lambda s=s: s, True, lambda flat: {"x": flat}) for s in slopes]  # type: ignore[misc]
    assert clip_(slabs, 10.0, lambda t: t) == pytest.approx(5.0)
    assert slopes[0].item() == 3.0
    assert clip_(slabs, 1.0, lambda t: t) == pytest.approx(5.0)
    assert [s.item() for s in slopes] == pytest.approx([0.6, 0.8])
    slopes[0].fill_(math.nan)
    assert math.isnan(clip_(slabs, 1.0, lambda t: t))


def test_records_after_the_resumed_step_and_half_lines_are_dropped(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0)
    for step in (1, 2, 3):
        metrics.write(step, {"loss": 1.0 / step})
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    Metrics(tmp_path, 2).close()
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]


def test_tensorboard_reads_the_event_file(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first = EventFile(tmp_path, 0)
    for step in (1, 2, 300):
        first.write(step, {"loss": step / 2, "mfu": 0.25})
    first.close()
    found = reader.EventAccumulator(str(tmp_path))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 0.5), (2, 1.0), (300, 150.0)]
    assert [event.value for event in found.Scalars("mfu")] == [0.25] * 3
    second = EventFile(tmp_path, 2)
    second.write(3, {"loss": 7.0})
    second.close()
    again = reader.EventAccumulator(str(tmp_path))
    again.Reload()
    assert [(event.step, event.value) for event in again.Scalars("loss")] == [(1, 0.5), (2, 1.0), (3, 7.0)]
