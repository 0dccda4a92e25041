"""The compiled kernels compute what PyTorch does, and a row's result never depends on its neighbours."""

from __future__ import annotations

import ctypes
import random
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from steelyard.base.errors import SteelyardError
from steelyard.inference import kernels, sampling
from steelyard.inference.endpoint import Sampling
from steelyard.inference.engine import Engine
from steelyard.inference.executor import PAGE, Executor
from steelyard.model.llama import Llama, LlamaConfig

compiled = pytest.mark.skipif(kernels.compiler() is None, reason="no C++ compiler on this machine")


def build(heads: int = 6, kv_heads: int = 2, head_dim: int = 32, bias: bool = True, dtype: torch.dtype = torch.float32):
    config = LlamaConfig(
        vocab_size=301,  # odd, so the last panel of the head is not full
        hidden_size=96,
        intermediate_size=144,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=256,
        attention_bias=bias,
        initializer_range=0.2,
    )
    return Llama(config).initialise(3).to(dtype).eval().requires_grad_(False)


SEQUENCES = [
    torch.randint(0, 301, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 16, 33, 33, 90)
]
TABLES = [list(range(1 + 6 * i, 7 + 6 * i)) for i in range(len(SEQUENCES))]


def decode(executor: Executor, rows: list[int]) -> Tensor:
    return executor.decode(
        torch.tensor([SEQUENCES[i][-1] for i in rows]),
        torch.tensor([len(SEQUENCES[i]) - 1 for i in rows]),
        torch.tensor([TABLES[i] for i in rows], dtype=torch.int32),
    )


def prefill(executor: Executor, rows: list[int], cut: int = 1) -> Tensor:
    """All tokens but the last `cut`."""
    parts = [SEQUENCES[i][: len(SEQUENCES[i]) - cut] for i in rows]
    return executor.prefill(parts, [0] * len(rows), [TABLES[i] for i in rows])


@compiled
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 2), (8, 1), (26, 2)])
@pytest.mark.parametrize("head_dim", [32, 96])
def test_prefill_and_decode_compute_the_model(heads: tuple[int, int], head_dim: int) -> None:
    model = build(*heads, head_dim)
    executor = Executor(model, 40)
    assert executor.kernels is not None
    rows = list(range(len(SEQUENCES)))
    whole = [model(torch.tensor([sequence]))[0] for sequence in SEQUENCES]
    torch.testing.assert_close(prefill(executor, rows), torch.stack([x[-2] for x in whole]), atol=5e-4, rtol=1e-4)
    torch.testing.assert_close(decode(executor, rows), torch.stack([x[-1] for x in whole]), atol=5e-4, rtol=1e-4)


@compiled
def test_bfloat16_is_as_exact_as_pytorchs() -> None:
    wide, narrow = build(), build(dtype=torch.bfloat16)
    executor = Executor(narrow, 40)
    wide.load_state_dict({name: tensor.float() for name, tensor in narrow.state_dict().items()})
    ours, theirs = [], []
    for i, sequence in enumerate(SEQUENCES):
        for n in range(2, len(sequence), 3):
            exact = wide(torch.tensor([sequence[:n]]))[0, -1]
            row = executor.prefill([sequence[:n]], [0], [TABLES[i]])[0]
            ours.append((row.float() - exact).square().mean())
            theirs.append((narrow(torch.tensor([sequence[:n]]))[0, -1].float() - exact).square().mean())
    assert torch.stack(ours).mean().sqrt() < 1.2 * torch.stack(theirs).mean().sqrt()


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_bit_for_bit_in_any_batch_and_any_cut(dtype: torch.dtype) -> None:
    model = build(dtype=dtype)
    together, alone = Executor(model, 40), Executor(model, 40)
    rows = list(range(len(SEQUENCES)))
    first = prefill(together, rows)
    crowd = decode(together, rows * 9)[: len(rows)]
    for i in rows:
        assert torch.equal(prefill(alone, [i])[0], first[i])
        assert torch.equal(decode(alone, [i])[0], crowd[i])
    # a prompt read in two parts, cut inside a page, and its last token as a decoding step or as a prefill
    long, table = SEQUENCES[4], TABLES[4]
    parts = Executor(model, 40)
    parts.prefill([long[:37]], [0], [table])
    assert torch.equal(parts.prefill([long[37:-1]], [37], [table])[0], first[4])
    assert torch.equal(parts.prefill([long[-1:]], [len(long) - 1], [table])[0], crowd[4])


@compiled
def test_what_a_full_batch_wrote_is_exactly_what_a_check_finds() -> None:
    engine = Engine(build(dtype=torch.bfloat16), frozenset(), rows=7)
    draw = random.Random(2)
    prompts = [[draw.randrange(301) for _ in range(draw.randrange(1, 60))] for _ in range(30)]
    samplings = [
        Sampling(max_tokens=draw.randrange(1, 30), temperature=draw.choice([0, 1]), top_p=0.9) for _ in prompts
    ]
    done = engine.generate(prompts, samplings, range(30))
    for i, (tokens, _) in enumerate(done):
        assert max(engine.check(prompts[i], tokens, samplings[i], i)) < 1e-5
        assert max(engine.check(prompts[i], [(tokens[0] + 1) % 301], samplings[i], i)) > 1e-5


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_choices_are_the_references(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(5)
    generator = torch.Generator().manual_seed(5)
    for vocab in (49152, 1000, 301):
        logits = (torch.randn(48, vocab, generator=generator) * draw.choice([1, 3, 6])).to(dtype)
        logits[:, 7] = -torch.inf  # a ban, not a broken model
        samplings = [
            Sampling(
                temperature=draw.choice([0, 0.2, 0.8, 1, 2]),
                top_p=draw.choice([1, 0.9, 0.5, 0.99]),
                top_k=draw.choice([0, 1, 5, 50, 400]),
                min_p=draw.choice([0, 0.05]),
            )
            for _ in logits
        ]
        seeds = [draw.getrandbits(70) for _ in logits]
        positions = [draw.randrange(3000) for _ in logits]
        ours = sampling.choose(logits, samplings, seeds, positions)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "load", lambda dtype: None)
            theirs = sampling.choose(logits, samplings, seeds, positions)
        # rounding may decide a near tie: where they differ, what was drawn must be all but the reference's choice
        for i in (ours != theirs).nonzero()[:, 0].tolist():
            found = sampling.margins(logits[i : i + 1], ours[i : i + 1], samplings[i], seeds[i], [positions[i]])
            assert found[0] < 1e-3
        assert (ours != theirs).sum() <= 1


@compiled
def test_logits_that_are_not_finite_are_told() -> None:
    logits = torch.zeros(3, 40)
    logits[0, 3], logits[1, 39], logits[2] = torch.nan, torch.inf, -torch.inf
    for temperature in (0.0, 1.0):
        chosen = sampling.choose(logits, [Sampling(temperature=temperature)] * 3, [0] * 3, [0] * 3)
        assert chosen.tolist() == [-1, -1, -1]


@compiled
def test_processors_without_the_bf16_instruction_compute_the_same(tmp_path: Path) -> None:
    library = tmp_path / "plain.so"
    command = [
        str(kernels.compiler()),
        *kernels.FLAGS,
        "-O1",
        "-mno-avx512bf16",
        *map(str, kernels.SOURCES),
        "-o",
        str(library),
    ]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this compiler or processor knows no -mno-avx512bf16")
    plain, native = kernels.Kernels(ctypes.CDLL(str(library)), torch.bfloat16), kernels.load(torch.bfloat16)
    assert native is not None
    x, weight = torch.randn(29, 96).bfloat16(), torch.randn(100, 96).bfloat16()
    found = [k.linear(x, k.pack(weight), None, x.new_empty(29, 100)) for k in (plain, native)]
    torch.testing.assert_close(*found, atol=0.1, rtol=0.01)
    torch.testing.assert_close(found[0], x @ weight.T, atol=0.1, rtol=0.01)


def test_without_a_compiler_pytorch_computes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    kernels.load.cache_clear()
    try:
        assert Executor(build(), 40).kernels is None
        assert "no C++ compiler" in kernels.describe()
    finally:
        kernels.load.cache_clear()


@compiled
def test_a_compiler_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels.load.cache_clear()
    try:
        with pytest.raises(SteelyardError, match=r"cannot compile the CPU kernels.*STEELYARD_KERNELS=off"):
            kernels.load(torch.float32)
    finally:
        kernels.load.cache_clear()


@compiled
def test_code_is_never_loaded_from_a_folder_that_others_may_write(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "steelyard" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels.load.cache_clear()
    try:
        with pytest.raises(SteelyardError, match="others may write here"):
            kernels.load(torch.float32)
    finally:
        kernels.load.cache_clear()


def test_pages_are_registers() -> None:
    assert PAGE == kernels.LANES
