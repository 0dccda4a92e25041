"""The training loop on tiny models: what it computes, what it refuses, how it stops."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from training_runs import LENGTHS, VOCABULARY, Data, Reported, batch, options, tiny

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.model.llama import Llama
from steelyard.train import checkpoint, loop, metrics, preflight, speed
from steelyard.train.batch import IGNORE, Batch
from steelyard.train.guard import Interrupted, folder_lock
from steelyard.train.loop import TrainOptions, TrainResult, train
from steelyard.train.losses import CrossEntropy
from steelyard.train.metrics import Metrics, read_metrics


def run(
    folder: Path, model: Llama | None = None, data: Any = None, said: Reported | None = None, **more: Any
) -> TrainResult:
    extra = {name: more.pop(name) for name in ("validation", "chat") if name in more}
    return train(
        model or tiny(), data or Data(), CrossEntropy(), options(**more), folder, progress=said or Reported(), **extra
    )


def weights(model: Llama) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def steps_kept(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))


# -- what it computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_trajectory_is_that_of_transformers(tmp_path: Path, tied: bool) -> None:
    from transformers import LlamaConfig as TheirConfig
    from transformers import LlamaForCausalLM

    model = tiny(tie_word_embeddings=tied)
    config = model.config
    theirs = LlamaForCausalLM(
        TheirConfig(
            vocab_size=VOCABULARY,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=tied,
        )
    )
    theirs.load_state_dict(model.state_dict() | ({"lm_head.weight": model.head_weight} if tied else {}))
    data = Data(2)
    run(tmp_path, model, data, steps=20, warmup=4, checkpoint_every=0)

    matrices = [p for p in theirs.parameters() if p.ndim >= 2]
    vectors = [p for p in theirs.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-5)
    losses = []
    for step in range(20):
        done = (step - 3) / 16
        rate = 1e-2 * (step + 1) / 4 if step < 4 else 1e-2 - 9e-3 * (1 - math.cos(math.pi * done)) / 2
        total, count = torch.zeros(()), 0
        for packed in data.step(step):
            for tokens in packed.tokens.split(packed.lengths):
                logits = theirs(input_ids=tokens[None]).logits[0]
                total = total + F.cross_entropy(logits[:-1], tokens[1:], reduction="sum")
                count += len(tokens) - 1
        optimizer.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        losses.append(float(total) / count)
    assert [record["loss"] for record in read_metrics(tmp_path)] == pytest.approx(losses, abs=1e-4)
    expected = theirs.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, expected[name], atol=1e-4), name
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True}, {"num_key_value_heads": 4}])
def test_packed_documents_are_as_if_alone(changes: dict[str, Any]) -> None:
    model = tiny(**changes)
    documents = [torch.randint(0, VOCABULARY, (n,)).tolist() for n in (5, 9, 5, 1, 12, 9)]
    packed = batch(documents)
    logits = model.head(model.packed(packed.tokens, packed.positions, packed.lengths))
    for part, document in zip(logits.split(packed.lengths), documents, strict=True):
        assert torch.allclose(part, model(torch.tensor([document]))[0], atol=1e-5)


def test_packed_stretches_dynamic_rope_by_each_document_alone() -> None:
    from steelyard.model.llama import Rope

    model = tiny(rope=Rope(type="dynamic", factor=4.0), max_position_embeddings=8)
    documents = [list(range(n)) for n in (4, 20, 30)]
    packed = batch(documents)
    logits = model.head(model.packed(packed.tokens, packed.positions, packed.lengths))
    for part, document in zip(logits.split(packed.lengths), documents, strict=True):
        assert torch.allclose(part, model(torch.tensor([document]))[0], atol=1e-5)


class Split:
    """The documents of `Data(1)`, in as many micro-batches as asked."""

    digest, steps_per_epoch = "split", 4

    def __init__(self, parts: int) -> None:
        self.parts = parts

    def step(self, index: int) -> Sequence[Batch]:
        whole = [d.tolist() for b in Data(3).step(index) for d in b.tokens.split(b.lengths)]
        size = math.ceil(len(whole) / self.parts)
        return [batch(whole[i : i + size]) for i in range(0, len(whole), size)]


def test_accumulation_changes_neither_loss_nor_gradient(tmp_path: Path) -> None:
    models, records = [], []
    for parts in (1, 2, 8):
        model = tiny()
        run(tmp_path / str(parts), model, Split(parts), clip=0.0)
        models.append(weights(model))
        records.append(read_metrics(tmp_path / str(parts)))
    for other, record in zip(models[1:], records[1:], strict=True):
        for ours, theirs in zip(records[0], record, strict=True):
            assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)
            assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-5)
        for name, tensor in models[0].items():
            assert float((tensor - other[name]).norm() / tensor.norm()) < 1e-5, name


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain, saving = tiny(), tiny()
    run(tmp_path / "plain", plain)
    run(tmp_path / "saving", saving, activation_checkpointing=True)
    for name, tensor in weights(plain).items():
        assert torch.equal(tensor, saving.get_parameter(name)), name


def test_bfloat16_follows_float32_and_masters_keep_small_updates(tmp_path: Path) -> None:
    exact, half, start = tiny(), tiny(), weights(tiny())
    one = run(tmp_path / "exact", exact, steps=6, learning_rate=1e-3)
    two = run(tmp_path / "half", half, steps=6, learning_rate=1e-3, dtype="bfloat16")
    assert two.loss == pytest.approx(one.loss, rel=0.01)
    for name, tensor in weights(half).items():
        assert tensor.dtype is torch.float32
        if tensor.ndim < 2:  # norms stay near 1, where bfloat16 could not hold updates of a thousandth
            moved, expected = tensor - start[name], exact.get_parameter(name) - start[name]
            assert float((moved - expected).abs().max()) < 2e-3
            assert float(moved.abs().max()) > 1e-4


def test_only_what_requires_a_gradient_moves(tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        model = tiny().requires_grad_(False)
        model.model.layers[1].requires_grad_(True)
        before = weights(model)
        run(tmp_path / dtype, model, dtype=dtype)
        for name, tensor in model.named_parameters():
            assert torch.equal(tensor, before[name]) != name.startswith("model.layers.1."), name
    with pytest.raises(UsageError, match="requires_grad"):
        run(tmp_path / "none", tiny().requires_grad_(False))


# -- checkpoints -----------------------------------------------------------------------------------------------------


def test_a_broken_checkpoint_is_reported_and_skipped(tmp_path: Path) -> None:
    whole = tiny()
    run(tmp_path / "whole", whole, steps=8)
    run(tmp_path / "broken", tiny(), steps=8, keep_last=9)
    newest = tmp_path / "broken" / "checkpoints" / "step-00000008"
    shard = next(newest.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    (newest.parent / "step-00000006" / "complete.json").write_text("{")
    said, again = Reported(), tiny()
    run(tmp_path / "broken", again, said=said, steps=8, keep_last=9)
    text = "\n".join(said.lines)
    assert f"{shard}: damaged" in text
    assert "step-00000006/complete.json: not readable" in text
    assert "going on from" in text
    assert "step 4 of 8" in text
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, again.get_parameter(name)), name
    assert [record["step"] for record in read_metrics(tmp_path / "broken")] == list(range(1, 9))


@pytest.mark.parametrize(
    ("data", "changes", "said"),
    [
        (Data(digest="other"), {}, r"data = data, this run has other"),
        (None, {"learning_rate": 2e-2}, r"learning_rate = 0\.01, this run has 0\.02"),
        (None, {"steps": 9}, r"steps = 4, this run has 9"),
        (None, {"betas": (0.9, 0.99)}, r"betas = \[0\.9, 0\.95\], this run has \[0\.9, 0\.99\]"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, data: Any, changes: dict[str, Any], said: str) -> None:
    run(tmp_path)
    with pytest.raises(SteelyardError, match=said):
        run(tmp_path, data=data, **changes)
    with pytest.raises(SteelyardError, match="model = "):
        run(tmp_path, tiny(hidden_size=16, head_dim=4))


def test_the_last_ones_and_the_best_one_are_kept(tmp_path: Path) -> None:
    model = tiny()
    # it learns one sentence by heart, so that of others it soon knows less
    data, validation = Fixed([1, 2, 3, 4], {2, 3, 4}), Data(1, 2)
    found = run(
        tmp_path, model, data, steps=10, keep_best=True, checkpoint_every=1, evaluate_every=1, validation=validation
    )
    records = read_metrics(tmp_path)
    best = min(records, key=lambda record: record["validation_loss"])
    assert found.best_step == best["step"] < 9
    assert found.validation_loss == best["validation_loss"]
    assert steps_kept(tmp_path) == sorted({int(best["step"]), 9, 10})
    with torch.no_grad():
        losses = [CrossEntropy().loss(model, b) for i in range(2) for b in Data(1, 2).step(i)]
    assert float(sum(each.total for each in losses)) / sum(each.count for each in losses) == pytest.approx(
        best["validation_loss"], rel=1e-5
    )


def test_a_finished_run_is_taken_as_it_is(tmp_path: Path) -> None:
    first, again = tiny(), tiny()
    one = run(tmp_path, first)
    two = run(tmp_path, again)
    assert (two.steps, two.tokens, two.loss) == (one.steps, one.tokens, one.loss)
    for name, tensor in weights(first).items():
        assert torch.equal(tensor, again.get_parameter(name)), name


def test_disk_full_is_said_and_the_old_checkpoint_is_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = checkpoint.write_tensors, []

    def full(folder: Path, tensors: dict[str, Tensor], *, alone: bool) -> None:
        calls.append(folder)
        real(folder, tensors, alone=alone)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(SteelyardError, match=r"step-00000004: checkpoint not written: the disk is full.*make room"):
        run(tmp_path, steps=6)
    assert steps_kept(tmp_path) == [2]
    assert not list((tmp_path / "checkpoints").glob(".*"))
    said = Reported()
    assert run(tmp_path, said=said, steps=6).steps == 6
    assert any("step 2 of 6" in line for line in said.lines)


def _full(limit: int) -> Any:
    """What a write to a disk does that is full from the `limit`-th on."""
    calls = []

    def write(*_: Any) -> None:
        calls.append(1)
        if len(calls) >= limit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return write


class FullFile:
    """An open file whose disk is full from the `limit`-th flush on."""

    def __init__(self, file: Any, limit: int) -> None:
        self.file, self.full = file, _full(limit)

    def write(self, data: Any) -> None:
        self.file.write(data)

    def flush(self) -> None:
        self.full()
        self.file.flush()

    def close(self) -> None:
        self.file.close()


@pytest.mark.parametrize("part", ["metrics.jsonl", "tensorboard"])
def test_a_full_disk_met_by_the_metrics_saves_then_says_which_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    class Full(Metrics):
        def __init__(self, folder: Path, start: int) -> None:
            super().__init__(folder, start)
            if part == "tensorboard":
                self.events.file = FullFile(self.events.file, 3)  # type: ignore[assignment]
            else:
                self.file = FullFile(self.file, 3)  # type: ignore[assignment]

    with monkeypatch.context() as patch:
        patch.setattr(loop, "Metrics", Full)
        with pytest.raises(SteelyardError, match=rf"{part}.*: metrics not written: the disk is full: make r") as caught:
            run(tmp_path, steps=6, checkpoint_every=0)
    assert str(caught.value).endswith(f"Saved as {tmp_path / 'checkpoints' / 'step-00000003'} after step 3")
    assert caught.value.exit_code == 1
    said, whole, again = Reported(), tiny(), tiny()
    run(tmp_path, again, said=said, steps=6, checkpoint_every=0)
    assert any("step 3 of 6" in line for line in said.lines)
    run(tmp_path / "whole", whole, steps=6)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, again.get_parameter(name)), name
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]  # completed on closing


def test_a_disk_too_full_for_a_checkpoint_too_names_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics.EventFile, "write", _full(3))
    real = checkpoint.write_tensors

    def full(folder: Path, tensors: dict[str, Tensor], *, alone: bool) -> None:
        real(folder, tensors, alone=alone)
        if "00000003" in folder.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(SteelyardError, match=r"tfevents.*: the disk is full.*step-00000003: checkpoint not written"):
        run(tmp_path, steps=6)
    assert steps_kept(tmp_path) == [2]


def test_metrics_that_cannot_be_begun_are_named(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(SteelyardError, match=r"tensorboard: metrics not written: .*: mend that and run again"):
        run(tmp_path)


def test_a_report_that_cannot_be_written_costs_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "write_report", _full(1))
    said = Reported()
    assert run(tmp_path, said=said).steps == 4
    assert any("report not written: " in line for line in said.lines)


# -- stopping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_then_stops_with_130(tmp_path: Path, number: signal.Signals) -> None:
    class Interrupting(Data):
        def step(self, index: int) -> Sequence[Batch]:
            if index == 2 and (tmp_path / "metrics.jsonl").exists() and len(read_metrics(tmp_path)) == 2:
                os.kill(os.getpid(), number)
            return super().step(index)

    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"{number.name} after step 3") as caught:
        run(tmp_path, data=Interrupting(), steps=6, checkpoint_every=0)
    assert caught.value.exit_code == 130
    assert signal.getsignal(number) is before
    whole, again = tiny(), tiny()
    run(tmp_path / "whole", whole, steps=6)
    run(tmp_path, again, steps=6, checkpoint_every=0)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, again.get_parameter(name)), name


class Poisoned(Data):
    """Token 96 comes in step 3 only, in samples 7 and 8."""

    def step(self, index: int) -> Sequence[Batch]:
        usual = list(super().step(index))
        return [usual[0], batch([[5, 96, 3], [4, 2]], [7, 8])] if index == 2 else usual


def test_a_loss_that_is_not_finite_stops_and_names_the_samples(tmp_path: Path) -> None:
    model = tiny()
    with torch.no_grad():
        model.model.embed_tokens.weight[96] = math.nan
    with pytest.raises(SteelyardError, match=r"step 3: the loss is not finite, in samples \[7, 8\].*step-00000002"):
        run(tmp_path, model, Poisoned(steps_per_epoch=2), checkpoint_every=1)
    assert steps_kept(tmp_path) == [1, 2]


def test_a_gradient_that_is_not_finite_stops(tmp_path: Path) -> None:
    class Steep(CrossEntropy):
        def loss(self, model: torch.nn.Module, batch: Batch) -> Any:
            found = super().loss(model, batch)
            bad = 7 in batch.sample_ids
            if bad:
                found.total.register_hook(lambda slope: slope * math.inf)
            return found

    with pytest.raises(SteelyardError, match=r"step 3: the gradient is not finite, in samples.*samples \[7, 8\]"):
        train(tiny(), Poisoned(steps_per_epoch=2), Steep(), options(), tmp_path, progress=Reported())
    assert steps_kept(tmp_path) == [2]


def test_two_runs_in_one_folder_are_refused_but_a_dead_ones_lock_is_not(tmp_path: Path) -> None:
    with folder_lock(tmp_path), pytest.raises(SteelyardError, match=rf"process {os.getpid()} on .* is training here"):
        run(tmp_path)
    (tmp_path / "lock").write_text("process 1 on elsewhere")
    assert run(tmp_path).steps == 4


# -- preflight -------------------------------------------------------------------------------------------------------


class Chat:
    end_of_turn = frozenset({3})

    def examples(self, count: int) -> Sequence[Sequence[tuple[str, bool]]]:
        return [[("question", False), ("answer", True)]] * count


class Fixed(Data):
    def __init__(self, tokens: list[int], supervised: set[int]) -> None:
        super().__init__()
        made = batch([tokens])
        kept = torch.tensor([int(t) in supervised for t in made.targets])
        self.made = Batch(made.tokens, made.targets.where(kept, IGNORE), made.positions, made.lengths, (1,))

    def step(self, index: int) -> Sequence[Batch]:
        return [self.made]


def test_preflight_says_what_the_run_will_need(tmp_path: Path) -> None:
    said = Reported()
    run(tmp_path, data=Fixed([1, 2, 3, 4], {2, 3}), said=said, chat=Chat())
    text = "\n".join(said.lines)
    assert "about 16 tokens an epoch in 4 steps, 50.0% of them supervised" in text
    assert "4 supervised end-of-turn tokens" in text
    assert "example 3: «question»answer" in text
    assert "peak memory" in text
    assert "free needed" in text
    assert "\x1b[" in preflight.show_examples(Chat().examples(1), colour=True)
    assert not list(tmp_path.glob(".preflight*"))


@pytest.mark.parametrize(
    ("data", "kind", "said"),
    [
        (Fixed([1, 2, 3, 4], set()), SteelyardError, "no supervised token"),
        (Fixed([1, 2, 3, 4], {2}), SteelyardError, "would never learn to stop"),
        (Fixed([1, 97, 3, 4], {3}), FormatError, r"step 1, .*token 97, but the model's vocabulary has 97"),
        (Data(steps_per_epoch=0), SteelyardError, "no whole step"),
    ],
)
def test_preflight_refuses_data_that_cannot_teach(tmp_path: Path, data: Any, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        run(tmp_path, data=data, chat=Chat())
    assert not (tmp_path / "checkpoints").exists()


def test_a_token_beyond_the_vocabulary_is_named_also_when_it_comes_late(tmp_path: Path) -> None:
    class Late(Data):
        def step(self, index: int) -> Sequence[Batch]:
            return [batch([[1, 2, 500]], [42])] if index == 3 else super().step(index)

    with pytest.raises(FormatError, match=r"step 4, samples \[42\]: token 500"):
        run(tmp_path, data=Late(steps_per_epoch=2))


def test_preflight_refuses_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage(1, 1, 1000))
    with pytest.raises(SteelyardError, match=r"checkpoints need .* are free: make room or lower keep_last"):
        run(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 1.0},
        {"steps": None},
        {"steps": 0},
        {"steps": None, "epochs": -1.0},
        {"dtype": "float16"},
        {"schedule": "linear"},
        {"warmup": -1},
        {"keep_last": 0},
        {"clip": math.nan},
    ],
)
def test_options_that_contradict_themselves_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        options(**changes)


def test_compiling_without_a_compiler_is_said_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "compiler", lambda: None)
    with pytest.raises(UsageError, match=r"compile: on needs a C\+\+ compiler"):
        run(tmp_path / "on", compile="on")
    said = Reported()
    run(tmp_path / "auto", said=said)
    assert any("no C++ compiler" in line for line in said.lines)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_resumed_run_is_compiled_as_before_however_busy_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    class Stopped(Exception):  # noqa: N818, it is no failure
        pass

    class Ending(Data):
        def step(self, index: int) -> Sequence[Batch]:
            if index == 2:
                raise Stopped
            return super().step(index)

    def measure(rate: float) -> None:
        monkeypatch.setattr(speed, "matrix_rate", lambda *_: rate)

    seen: list[Any] = []
    monkeypatch.setattr(speed, "compiler", lambda: "g++")
    monkeypatch.setattr(torch, "compile", lambda function: seen.append(function) or function)
    slow, fast = 1.0, 1e30  # on a slow machine every run is long enough to compile
    measure(slow if compiled else fast)
    with pytest.raises(Stopped):
        run(tmp_path, data=Ending(steps_per_epoch=2), checkpoint_every=1)
    assert bool(seen) is compiled
    seen.clear()
    mark = tmp_path / "checkpoints" / "step-00000002" / "complete.json"
    document = json.loads(mark.read_text())
    assert document["compiled"] is compiled
    measure(fast if compiled else slow)
    for mode, state, expected in (
        ("on", compiled, True),  # what is asked for outright is done
        ("off", compiled, False),
        ("auto", None, not compiled),  # of a checkpoint that does not say
        ("auto", compiled, compiled),
    ):
        mark.write_text(json.dumps({**document, "compiled": state}))
        with pytest.raises(Stopped):
            run(tmp_path, data=Ending(steps_per_epoch=2), checkpoint_every=1, compile=mode)
        assert bool(seen) is expected, (mode, state)
        seen.clear()
    del document["compiled"]
    mark.write_text(json.dumps(document))
    run(tmp_path, data=Data(steps_per_epoch=2), checkpoint_every=1)
    assert bool(seen) is not compiled


def test_operations_of_a_step_are_those_of_its_products() -> None:
    model = tiny()
    tokens, config = 10, model.config
    every = sum(p.numel() for p in model.parameters() if p.ndim == 2) - model.model.embed_tokens.weight.numel()
    attention = 12 * config.num_hidden_layers * 32 * (6 * 6 + 4 * 4) / 2
    assert speed.step_operations(model, tokens, (6, 4)) == 6 * every * tokens + attention
    head = model.head_weight.numel()
    assert speed.step_operations(model, tokens, (6, 4), heads=3) == 6 * (every * tokens - head * 7) + attention
    model.requires_grad_(False)
    assert speed.step_operations(model, tokens, (6, 4)) == 4 * every * tokens + attention
    depth = config.num_hidden_layers  # layers that nothing behind them needs a gradient of only go forward
    frozen = speed.step_operations(model, tokens, (6, 4), heads=0, first=depth)
    assert frozen == 2 * (every - head) * tokens + attention / 3


def test_epochs_are_counted_in_steps() -> None:
    assert TrainOptions(epochs=1.5).total_steps(10) == 15
    assert TrainOptions(epochs=0.01).total_steps(10) == 1
    assert TrainOptions(steps=7).total_steps(10) == 7


def test_metrics_and_report_tell_the_run(tmp_path: Path) -> None:
    from html.parser import HTMLParser

    found = run(tmp_path, steps=5, validation=Data(1, 1), evaluate_every=2)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    assert [record["step"] for record in records if "validation_loss" in record] == [2, 4, 5]
    keys = {"loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "mfu", "seconds", "seconds_left"}
    assert all(keys <= record.keys() for record in records)
    assert records[-1]["tokens"] == found.tokens == 5 * sum(map(sum, LENGTHS[:2]))
    assert records[-1]["learning_rate"] == pytest.approx(1e-3)
    page = (tmp_path / "report.html").read_text()
    HTMLParser().feed(page)
    assert page.count("<svg") == 5
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
