"""DPO: the shared prompt changes nothing, the loss is the paper's, and neither accumulation nor order matters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_folder
from training_runs import Reported

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.base.progress import Silent
from steelyard.inference.endpoint import Message
from steelyard.model.chat import Renderer
from steelyard.model.llama import Llama, load_llama
from steelyard.train.conversations import Preference
from steelyard.train.dpo import (
    DPO,
    DPOOptions,
    answer_log_probs,
    cached_reference,
    chunked_log_probs,
    prefer,
    reference_log_probs,
)
from steelyard.train.options import TrainOptions
from steelyard.train.pairs import Pair, PairLoader, ShownPairs, assemble_pairs, pairs_digest, render_pairs
from steelyard.train.preflight import check_data

PREFERENCES = [
    Preference((Message("user", "How are you?"),), "Very well, thank you.", "No."),
    Preference((Message("user", "Tell me a joke, please"),), "A", "A horse walks into a bar, and orders hay."),
    Preference(
        (Message("user", "Hi"), Message("assistant", "Hello!"), Message("user", "Bye")), "See you soon", "See me never"
    ),
    Preference((Message("system", "Be brief."), Message("user", "2+2?")), "4", "It is a hard question: five."),
    Preference((Message("user", "x" * 40),), "yes", "no, and no again"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("dpo") / "model")


@pytest.fixture(scope="module")
def pairs(folder: Path) -> list[Pair]:
    return render_pairs(PREFERENCES, Renderer(folder), 200, Silent())[0]


def policy(folder: Path) -> Llama:
    """The model, moved away from the reference."""
    model = load_llama(folder).requires_grad_(True)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def plain_log_probs(model: Llama, pair: Pair) -> list[torch.Tensor]:
    """Each answer in a sequence of its own, through the ordinary forward and all logits."""
    found = []
    for part, start in ((pair.chosen, pair.chosen_start), (pair.rejected, pair.rejected_start)):
        tokens = torch.cat([torch.from_numpy(pair.prompt), torch.from_numpy(part)])
        scores = model(tokens[None])[0].float().log_softmax(-1)
        first = len(pair.prompt) + start
        found.append(scores[first - 1 : -1].gather(1, tokens[first:, None]).sum())
    return found


def gradient(model: Llama, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_a_pair_teaches_its_answers_and_their_ends_and_nothing_else(folder: Path, pairs: list[Pair]) -> None:
    renderer = Renderer(folder)
    for preference, pair in zip(PREFERENCES, pairs, strict=True):
        assert renderer.tokenizer.decode(pair.prompt.tolist(), skip_special=False).endswith("<|im_start|>assistant\n")
        assert pair.prompt.tolist() == renderer.prompt_tokens(preference.prompt)
        for part, text in ((pair.chosen, preference.chosen), (pair.rejected, preference.rejected)):
            assert renderer.tokenizer.decode(part.tolist(), skip_special=False) == text + "<|im_end|>"
        assert (pair.chosen_start, pair.rejected_start) == (0, 0)


def test_a_shared_prompt_changes_neither_log_probabilities_nor_gradients(folder: Path, pairs: list[Pair]) -> None:
    model = policy(folder)
    weights = torch.linspace(-1, 2, 2 * len(pairs)).view(-1, 2)
    shared = answer_log_probs(model, assemble_pairs(pairs, range(len(pairs))))
    plain = torch.stack([torch.stack(plain_log_probs(model, pair)) for pair in pairs])
    torch.testing.assert_close(shared, plain, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        gradient(model, (weights * shared).sum()), gradient(model, (weights * plain).sum()), rtol=1e-4, atol=1e-4
    )


def test_where_the_prompts_tokens_differ_only_the_beginning_is_shared(folder: Path, pairs: list[Pair]) -> None:
    model, pair = policy(folder), pairs[0]
    split = Pair(pair.prompt[:3], *(
        torch.cat([torch.from_numpy(pair.prompt[3:]), torch.from_numpy(part)]).numpy()
        for part in (pair.chosen, pair.rejected)
    ), len(pair.prompt) - 3, len(pair.prompt) - 3)  # fmt: skip
    whole = answer_log_probs(model, assemble_pairs([pair], [0]))
    torch.testing.assert_close(answer_log_probs(model, assemble_pairs([split], [0])), whole, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunked_log_probabilities_are_those_of_all_logits(chunk: int) -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(20, 16, generator=generator, dtype=torch.float32).requires_grad_()
    weight = torch.randn(31, 16, generator=generator).requires_grad_()
    targets = torch.randint(31, (20,), generator=generator)
    factors = torch.randn(20, generator=generator)
    wanted = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    found = chunked_log_probs(hidden, weight, targets, chunk)
    torch.testing.assert_close(found, wanted)
    expected = torch.autograd.grad((wanted * factors).sum(), (hidden, weight))
    for ours, theirs in zip(torch.autograd.grad((found * factors).sum(), (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        DPOOptions(beta=0.3),
        DPOOptions(beta=0.3, label_smoothing=0.2),
        DPOOptions(beta=5.0, length_normalised=True),
        DPOOptions(beta=0.1, sft_weight=0.7),
    ],
)
def test_the_loss_is_the_papers(folder: Path, pairs: list[Pair], options: DPOOptions) -> None:
    reference, model = load_llama(folder), policy(folder)
    found = DPO(options, reference_log_probs(reference, pairs, progress=Silent())).loss(
        model, assemble_pairs(pairs, [4, 0, 2])
    )
    total, right = torch.tensor(0.0), 0
    for index in (4, 0, 2):
        pair = pairs[index]
        chosen, rejected = plain_log_probs(model, pair)
        ref_chosen, ref_rejected = plain_log_probs(reference, pair)
        size_chosen, size_rejected = len(pair.chosen), len(pair.rejected)
        by = (size_chosen, size_rejected) if options.length_normalised else (1, 1)
        z = options.beta * ((chosen - ref_chosen) / by[0] - (rejected - ref_rejected) / by[1])
        e = options.label_smoothing
        total = total - (1 - e) * F.logsigmoid(z) - e * F.logsigmoid(-z) - options.sft_weight * chosen / size_chosen
        right += int(z > 0)
    assert found.count == 3
    torch.testing.assert_close(found.total, total, rtol=1e-4, atol=1e-4)
    assert float(found.metrics["accuracy"]) == right


def test_splitting_a_batch_changes_neither_loss_nor_gradient(folder: Path, pairs: list[Pair]) -> None:
    model = policy(folder)
    objective = DPO(DPOOptions(), reference_log_probs(load_llama(folder), pairs, progress=Silent()))
    losses, gradients = [], []
    for split in ([[0, 1, 2, 3, 4]], [[3, 0], [4, 1, 2]], [[0], [1], [2], [3], [4]]):
        found = [objective.loss(model, assemble_pairs(pairs, ids)) for ids in split]
        assert sum(part.count for part in found) == 5
        loss = torch.stack([part.total for part in found]).sum() / 5
        losses.append(loss.detach())
        gradients.append(gradient(model, loss))
    for loss, found_gradient in zip(losses, gradients, strict=True):
        torch.testing.assert_close(loss, losses[0], rtol=1e-5, atol=0)
        assert (found_gradient - gradients[0]).norm() < 1e-5 * gradients[0].norm()


def test_the_reference_is_cached_by_model_data_and_dtype(folder: Path, pairs: list[Pair], tmp_path: Path) -> None:
    first = cached_reference(folder, pairs, tmp_path, torch.float32, Silent())
    assert torch.equal(first, reference_log_probs(load_llama(folder), pairs, progress=Silent()))
    (file,) = tmp_path.iterdir()
    before = file.stat().st_mtime_ns
    assert torch.equal(cached_reference(folder, pairs, tmp_path, torch.float32, Silent()), first)
    assert file.stat().st_mtime_ns == before
    cached_reference(folder, pairs[1:], tmp_path, torch.float32, Silent())
    cached_reference(folder, pairs, tmp_path, torch.bfloat16, Silent())
    assert len(list(tmp_path.iterdir())) == 3
    other = next(path for path in tmp_path.iterdir() if path != file)
    file.write_bytes(other.read_bytes())
    with pytest.raises(FormatError, match="remove it"):
        cached_reference(folder, pairs, tmp_path, torch.float32, Silent())


def test_packing_of_the_reference_does_not_matter(folder: Path, pairs: list[Pair]) -> None:
    model = load_llama(folder)
    together = reference_log_probs(model, pairs, progress=Silent())
    alone = reference_log_probs(model, pairs, tokens_at_once=1, progress=Silent())
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


def test_every_pair_comes_once_an_epoch_and_every_step_has_as_many_micro_batches(pairs: list[Pair]) -> None:
    loader = PairLoader(pairs, range(5), pairs_per_step=5, micro_batches_per_step=2, seed=3)
    for step in range(4):
        batches = loader.step(step)
        assert len(batches) == 2
        assert sorted(index for batch in batches for index in batch.sample_ids) == [0, 1, 2, 3, 4]
    again = PairLoader(pairs, range(5), pairs_per_step=5, micro_batches_per_step=2, seed=3)
    assert [torch.equal(a.tokens, b.tokens) for a, b in zip(loader.step(2), again.step(2), strict=True)] == [True] * 2
    assert again.digest == loader.digest
    assert PairLoader(pairs, range(4), pairs_per_step=4, micro_batches_per_step=2, seed=3).digest != loader.digest
    crossing = PairLoader(pairs, range(5), pairs_per_step=3, micro_batches_per_step=3, seed=3)
    seen = [[index for batch in crossing.step(step) for index in batch.sample_ids] for step in range(5)]
    assert sorted(index for step in seen for index in step) == sorted([0, 1, 2, 3, 4] * 3)
    assert len({tuple(sorted(step)) for step in seen}) > 2  # no epoch is like the other


def test_validation_sees_each_pair_once_and_fills_up_with_blanks(folder: Path, pairs: list[Pair]) -> None:
    loader = PairLoader(pairs, range(1, 5), pairs_per_step=3, micro_batches_per_step=3, seed=0, endless=False)
    assert loader.steps_per_epoch == 2
    batches = [*loader.step(0), *loader.step(1)]
    assert len(batches) == 6
    assert sorted(index for batch in batches for index in batch.sample_ids) == [1, 2, 3, 4]
    objective = DPO(DPOOptions(), torch.zeros(5, 2))
    blank = objective.loss(policy(folder), batches[-1])
    assert (blank.count, float(blank.total.detach()), objective.count(batches[-1])) == (0, 0.0, 0)


def test_long_pairs_are_cut_and_empty_ones_left_out(folder: Path) -> None:
    renderer = Renderer(folder)
    same = Preference(PREFERENCES[0].prompt, "No.", "No.")
    pairs, counts = render_pairs([*PREFERENCES, same], renderer, 60, Silent())
    assert all(len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) <= 60 for pair in pairs)
    assert (counts.pairs, counts.dropped) == (len(pairs), 6 - len(pairs))
    assert counts.cut >= 1
    with pytest.raises(SteelyardError, match="none of 1 preferences"):
        render_pairs([same], renderer, 200, Silent())
    assert pairs_digest(pairs) != pairs_digest(pairs[:-1])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [({"beta": 0.0}, "beta"), ({"label_smoothing": 0.5}, "label_smoothing"), ({"sft_weight": -1.0}, "sft_weight")],
)
def test_impossible_options_are_named(change: dict[str, float], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        DPO(replace(DPOOptions(), **change), torch.zeros(0, 2))  # type: ignore[arg-type]


def test_impossible_sizes_are_named(pairs: list[Pair]) -> None:
    with pytest.raises(UsageError, match="pairs_per_step is 2"):
        PairLoader(pairs, range(5), pairs_per_step=2, micro_batches_per_step=3, seed=0)


QUICK = TrainOptions(steps=1, learning_rate=1e-3, dtype="float32", compile="off", checkpoint_every=0)


def test_the_preflight_counts_and_shows_what_the_chosen_answers_teach(folder: Path, tmp_path: Path) -> None:
    said = Reported()
    dpo = DPOOptions(pairs_per_step=5, micro_batches_per_step=1, max_length=200)
    found = prefer(folder, PREFERENCES, tmp_path / "out", work=tmp_path / "work", options=QUICK, dpo=dpo, progress=said)
    text = "\n".join(said.lines)
    assert (found.data.ends, found.data.cut) == (5, 0)
    assert "5 chosen answers keep their end of turn" in text
    assert "% of them supervised" in text  # tokens, though the loss is per pair
    assert "preflight: 5 supervised end-of-turn tokens in those steps; three examples:" in text
    for number, preference in enumerate(PREFERENCES[:3], 1):
        assert f"example {number}: «" in text
        assert f"»{preference.chosen}<|im_end|>" in text
    renderer = Renderer(folder)
    pairs = render_pairs(PREFERENCES, renderer, 200, Silent())[0]
    loader = PairLoader(pairs, range(5), pairs_per_step=5, micro_batches_per_step=1, seed=0)
    counted = check_data(loader, DPO(dpo, torch.zeros(5, 2)), 1000, ShownPairs(pairs, renderer))
    assert counted.supervised == sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)


def test_chosen_answers_that_never_end_are_refused_before_the_reference(folder: Path, tmp_path: Path) -> None:
    # The rejected answers keep their ends: those are to become less likely.
    cut = [Preference((Message("user", f"q{number}"),), "x" * 200, f"no {number}") for number in range(4)]
    dpo = DPOOptions(pairs_per_step=4, micro_batches_per_step=1, max_length=100)
    with pytest.raises(SteelyardError, match=r"no chosen answer of 4 pairs keeps its end of turn .*--max-length"):
        prefer(folder, cut, tmp_path / "out", work=tmp_path / "work", options=QUICK, dpo=dpo, progress=Silent())
    assert not (tmp_path / "work").exists()
    renderer = Renderer(folder)
    pairs, counts = render_pairs(cut, renderer, 100, Silent())
    assert (counts.ends, counts.cut) == (0, 4)
    loader = PairLoader(pairs, range(4), pairs_per_step=4, micro_batches_per_step=1, seed=0)
    with pytest.raises(SteelyardError, match="no end-of-turn token"):
        check_data(loader, DPO(dpo, torch.zeros(4, 2)), 1000, ShownPairs(pairs, renderer))
