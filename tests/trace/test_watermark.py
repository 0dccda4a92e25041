"""The mark: equal symbols give equal bits, it is quieter than a cast, and it names its recipient and nobody else."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.base.progress import Silent
from steelyard.trace import tardos, watermark

Tensors = dict[str, np.ndarray]
KEY, OTHER = bytes(range(32)), bytes(32)
INNOCENT = [f"innocent-{number}" for number in range(1000)]
UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, to nearest even, as float32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def weights(size: int = 1024) -> Tensors:
    generator = np.random.default_rng(0)
    tensors = {name: generator.standard_normal((size, size)).astype(np.float32) * 0.03 for name in (UP, DOWN)}
    for layer in range(40):
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = generator.uniform(0.1, 2, size).astype(np.float32)
    return {name: bfloat16(tensor) for name, tensor in tensors.items()}


ORIGINAL = weights()
MARKED = watermark.mark(ORIGINAL, KEY, "leaker")


def store(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    """A safetensors file, without torch."""
    header, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def raw(values: np.ndarray, dtype: str) -> bytes:
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    return values.astype("<f2" if dtype == "F16" else "<f4").tobytes()


def folder(path: Path, tensors: Tensors, dtype: str = "BF16", tied: bool = False) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    (path / "tokenizer.json").write_text("{}")
    store(path / "model.safetensors", {name: (dtype, t.shape, raw(t, dtype)) for name, t in tensors.items()})
    return path


def read(path: Path) -> Tensors:
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for name, entry in json.loads(data[8:start]).items():
        begin, end = (start + offset for offset in entry["data_offsets"])
        if entry["dtype"] == "BF16":
            values = (np.frombuffer(data[begin:end], "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(data[begin:end], "<f2" if entry["dtype"] == "F16" else "<f4").astype(np.float32)
        found[name] = values.reshape(entry["shape"])
    return found


# --- Embedding --------------------------------------------------------------------------------------------------------


def test_equal_symbols_give_equal_bits() -> None:
    grants = [f"grant-{number}" for number in range(8)]
    copies = np.stack([watermark.mark(ORIGINAL, KEY, grant)[UP].reshape(-1) for grant in grants])
    low, high = copies.min(axis=0), copies.max(axis=0)
    assert ((copies == low) | (copies == high)).all()  # two values per weight, whoever holds it
    assert ((low != high) & (low < ORIGINAL[UP].reshape(-1)) & (ORIGINAL[UP].reshape(-1) < high)).sum() > 10_000
    codes = np.stack([tardos.code(KEY, grant) for grant in grants])
    moved = (copies != ORIGINAL[UP].reshape(-1)).any(axis=0)
    differ = (copies[0] != copies[1])[moved].mean()
    assert abs(differ - (codes[0] != codes[1]).mean()) < 0.01


def test_the_mark_is_made_again_from_key_and_grant() -> None:
    again = watermark.mark(ORIGINAL, KEY, "leaker")
    assert all(np.array_equal(again[name], MARKED[name]) for name in ORIGINAL)
    elsewhere = watermark.mark(ORIGINAL, OTHER, "leaker")
    moved, other = MARKED[UP] != ORIGINAL[UP], elsewhere[UP] != ORIGINAL[UP]
    assert abs((moved & other).mean() / moved.mean() - 1 / watermark.BLOCK) < 0.005  # no more than by chance


@pytest.mark.parametrize("name", [UP, "model.layers.0.input_layernorm.weight"])
def test_the_mark_is_quieter_than_a_cast(name: str) -> None:
    generator = np.random.default_rng(1)
    step = np.ldexp(1.0, np.frexp(ORIGINAL[name])[1] - 8)
    masters = ORIGINAL[name] + generator.uniform(-0.49, 0.49, step.shape) * step  # float32 that casts to the original
    assert np.mean(bfloat16(masters.astype(np.float32)) == ORIGINAL[name]) > 0.99
    cast = np.square(masters - ORIGINAL[name]).sum()
    mark = np.square(MARKED[name].astype(np.float64) - ORIGINAL[name]).sum()
    assert 0 < mark < cast


def test_what_cannot_carry_a_step_is_left() -> None:
    odd = np.array([0.0, -0.0, 1e-40, -1e-40, 2.0**-14, np.inf, -np.inf, np.nan, 65504.0, 3e38] * 64, np.float32)
    marked = watermark.mark({"a": odd.reshape(64, 10)}, KEY, "leaker")["a"].reshape(-1)
    assert np.array_equal(marked.view(np.uint32), odd.view(np.uint32))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_folder_is_marked_bit_for_bit_as_the_arrays_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    tensors = {name: tensor[..., :1000] for name, tensor in ORIGINAL.items()}  # the last block is cut short
    source = folder(tmp_path / "source", tensors, dtype)
    monkeypatch.setattr(watermark, "_CHUNK", 1000)
    report = watermark.mark_folder(source, tmp_path / "out", KEY, "leaker", Silent())
    before, after = read(source / "model.safetensors"), read(tmp_path / "out/model.safetensors")
    expected = watermark.mark(before, KEY, "leaker")
    assert all(np.array_equal(after[name], expected[name]) for name in tensors)
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
    change = sum(float(np.square(after[name].astype(np.float64) - before[name]).sum()) for name in tensors)
    energy = sum(float(np.square(before[name].astype(np.float64)).sum()) for name in tensors)
    assert report.relative_rms == pytest.approx(np.sqrt(change / energy))
    assert report.entries == sum(tensor.size for tensor in tensors.values())
    assert report.changed == sum(int((after[name] != before[name]).sum()) for name in tensors)
    assert report.relative_rms < 0.0016


def test_a_stored_copy_of_a_tied_embedding_stays_a_copy(tmp_path: Path) -> None:
    table = ORIGINAL[UP]
    tensors = {watermark.EMBEDDING: table, watermark.HEAD: table}
    source = folder(tmp_path / "source", tensors, tied=True)
    watermark.mark_folder(source, tmp_path / "out", KEY, "leaker", Silent())
    marked = read(tmp_path / "out/model.safetensors")
    assert np.array_equal(marked[watermark.HEAD], marked[watermark.EMBEDDING])
    assert not np.array_equal(marked[watermark.HEAD], table)
    assert watermark.detect(tensors, marked, KEY, [*INNOCENT[:9], "leaker"]).accused == ("leaker",)


def test_marking_needs_no_torch(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", {UP: ORIGINAL[UP]})
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path\nfrom steelyard.base.progress import Silent\n"
        "from steelyard.trace.watermark import mark_folder\n"
        f"print(mark_folder(Path({str(source)!r}), Path({str(tmp_path / 'out')!r}), bytes(32), 'g', Silent()).changed)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 15_000


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": ("I8", (64,), bytes(64))}, "is I8: only BF16, F16 and F32 weights can be marked"),
        ({"a": ("BF16", (64,), bytes(128))}, "nothing can carry the mark"),
    ],
)
def test_what_cannot_be_marked_is_refused_whole(
    tmp_path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]], message: str
) -> None:
    source = folder(tmp_path / "source", {})
    store(source / "model.safetensors", tensors)
    with pytest.raises(FormatError, match=message):
        watermark.mark_folder(source, tmp_path / "out", KEY, "leaker", Silent())
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_finished_copy_is_not_overwritten(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", {UP: ORIGINAL[UP]})
    (tmp_path / "out").mkdir()
    with pytest.raises(SteelyardError, match="exists already"):
        watermark.mark_folder(source, tmp_path / "out", KEY, "leaker", Silent())


# --- Detection --------------------------------------------------------------------------------------------------------


def half_precision(tensors: Tensors) -> Tensors:
    return {name: tensor.astype(np.float16).astype(np.float32) for name, tensor in tensors.items()}


def int8(tensors: Tensors) -> Tensors:
    def rounded(tensor: np.ndarray) -> np.ndarray:
        scale = np.abs(tensor).max(axis=-1, keepdims=True) / 127
        return np.round(tensor / scale) * scale

    return {name: rounded(tensor) if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}


def noise(tensors: Tensors) -> Tensors:
    generator = np.random.default_rng(2)
    return {
        name: (tensor * (1 + 0.01 * generator.standard_normal(tensor.shape))).astype(np.float32)
        for name, tensor in tensors.items()
    }


def pruned(tensors: Tensors) -> Tensors:
    return {
        name: np.where(np.abs(tensor) < np.quantile(np.abs(tensor), 0.3), 0, tensor) if tensor.ndim > 1 else tensor
        for name, tensor in tensors.items()
    }


def matrices_reset(tensors: Tensors) -> Tensors:
    """What weight-only quantisation onto a public base's own grid does: only the norms keep the mark."""
    return {name: tensor if tensor.ndim == 1 else ORIGINAL[name] for name, tensor in tensors.items()}


def few_loud_changes(tensors: Tensors) -> Tensors:
    """One weight in a thousand is replaced by something huge."""
    generator = np.random.default_rng(3)
    return {
        name: np.where(generator.random(tensor.shape) < 0.001, np.float32(100), tensor)
        for name, tensor in noise(tensors).items()
    }


@pytest.mark.parametrize(
    "attack",
    [half_precision, int8, noise, pruned, matrices_reset, few_loud_changes],
    ids=lambda attack: attack.__name__,
)
def test_the_leaker_is_named_and_nobody_else(attack: Callable[[Tensors], Tensors]) -> None:
    found = watermark.detect(ORIGINAL, attack(MARKED), KEY, [*INNOCENT, "leaker"])
    assert found.accused == ("leaker",)
    assert found.p_values[-1] <= 1e-12
    assert found.p_values[:-1].min() > 1e-7


def half_pruned_at_random(tensors: Tensors) -> Tensors:
    draw = np.random.default_rng(6)
    return {
        name: np.where(draw.random(tensor.shape) < 0.5, np.float32(0), tensor)
        for name, tensor in tensors.items()
        if tensor.ndim > 1
    }


def half_of_the_rows_loud(tensors: Tensors) -> Tensors:
    draw = np.random.default_rng(7)
    loudness = np.where(np.arange(1024) < 512, 0.3, 0.0005)[:, None]
    return {
        name: (tensor * (1 + loudness * draw.standard_normal(tensor.shape))).astype(np.float32)
        for name, tensor in tensors.items()
        if tensor.ndim > 1
    }


def matrices_reset_and_noisy(tensors: Tensors) -> Tensors:
    """The matrices have lost the mark and moved by a step or so; the norms have kept it."""
    draw = np.random.default_rng(8)
    return {
        name: tensor if tensor.ndim == 1 else (ORIGINAL[name] * (1 + 0.0056 * draw.standard_normal(tensor.shape)))
        for name, tensor in tensors.items()
    }


# What the same attack reads without the code that is written for it: -0.4 where zeros count as changes, -3 with one
# variance for all rows, -18 where tensors without the mark count like the others.
POWER = [(half_pruned_at_random, -400), (half_of_the_rows_loud, -150), (matrices_reset_and_noisy, -25)]


@pytest.mark.parametrize(("attack", "bound"), POWER, ids=lambda value: getattr(value, "__name__", ""))
def test_detection_keeps_its_power(attack: Callable[[Tensors], Tensors], bound: float) -> None:
    found = watermark.detect(ORIGINAL, attack(MARKED), KEY, ["innocent", "leaker"])
    assert found.accused == ("leaker",)
    assert found.log10_p[1] < bound


def test_a_wrong_key_finds_nothing() -> None:
    found = watermark.detect(ORIGINAL, MARKED, OTHER, [*INNOCENT[:99], "leaker"])
    assert found.accused == ()
    assert found.log10_p.min() > -6


@pytest.mark.parametrize("suspect", ["unmarked", "unrelated"])
def test_unmarked_weights_accuse_nobody(suspect: str) -> None:
    generator = np.random.default_rng(4)
    other = {name: generator.permutation(tensor) for name, tensor in ORIGINAL.items()}
    found = watermark.detect(ORIGINAL, ORIGINAL if suspect == "unmarked" else other, KEY, INNOCENT)
    assert found.accused == ()
    assert found.log10_p.min() > -7


def planted(tensor: np.ndarray, share: float, together: bool) -> np.ndarray:
    """Some weights as large as float32 goes: in dead neurons, where they change nothing that the model does."""
    flat = tensor.copy().reshape(-1)
    count = max(int(flat.size * share), 1)
    flat[slice(count) if together else np.random.default_rng(7).integers(flat.size, size=count)] = 3e38
    return flat.reshape(tensor.shape)


@pytest.mark.parametrize(("share", "together"), [(1e-4, False), (0.02, False), (0.3, True)])
def test_a_few_huge_weights_do_not_drown_the_mark(share: float, together: bool) -> None:
    suspect = {name: planted(tensor, share, together) for name, tensor in MARKED.items()}
    found = watermark.detect(ORIGINAL, suspect, KEY, [*INNOCENT[:99], "leaker"])
    assert found.accused == ("leaker",)
    assert found.log10_p[-1] < -100


def test_a_tensor_of_nothing_but_huge_weights_is_read_as_noise() -> None:
    suspect = {**MARKED, UP: np.full_like(MARKED[UP], 3e38)}
    found = watermark.detect(ORIGINAL, suspect, KEY, [*INNOCENT[:99], "leaker"])
    assert found.accused == ("leaker",)


@pytest.mark.parametrize("colluders", [2, 5, 10])
@pytest.mark.parametrize("strategy", ["average", "random", "minority", "interleave"])
def test_a_coalition_loses_a_member_and_frames_nobody(strategy: str, colluders: int) -> None:
    grants = [f"colluder-{number}" for number in range(colluders)]
    copies = [watermark.mark(ORIGINAL, KEY, grant) for grant in grants]
    draw = np.random.default_rng(5)
    suspect = {name: collude(strategy, np.stack([copy[name] for copy in copies]), draw) for name in ORIGINAL}
    found = watermark.detect(ORIGINAL, suspect, KEY, INNOCENT + grants)
    assert found.accused
    assert set(found.accused) <= set(grants)


def collude(strategy: str, copies: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """One tensor from those of all colluders, [copies, ...]."""
    if strategy == "average":
        return copies.mean(axis=0)
    if strategy == "minority":
        low, high = copies.min(axis=0), copies.max(axis=0)
        return np.where((copies == low).mean(axis=0) < 0.5, low, high)
    flat = copies.reshape(len(copies), -1)
    take = draw.integers(len(copies), size=flat.shape[1])  # random: weight by weight
    if strategy == "interleave":
        take = np.arange(flat.shape[1]) // 500 % len(copies)
    return flat[take, np.arange(flat.shape[1])].reshape(copies.shape[1:])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda tensor: np.where(tensor > 0.1, np.nan, tensor), FormatError, "NaN or infinite"),
        (lambda tensor: np.where(tensor > 0.1, np.inf, tensor), FormatError, "NaN or infinite"),
        (lambda tensor: tensor[:-1], UsageError, "express the suspect in the original's layout first"),
    ],
)
def test_bad_suspects_are_refused(
    change: Callable[[np.ndarray], np.ndarray], error: type[SteelyardError], message: str
) -> None:
    with pytest.raises(error, match=f"(?s){UP}.*{message}"):
        watermark.detect(ORIGINAL, {**MARKED, UP: change(MARKED[UP])}, KEY, ["leaker"])


def test_a_suspect_without_known_tensors_is_refused() -> None:
    with pytest.raises(UsageError, match="no tensor in common"):
        watermark.detect(ORIGINAL, {"layers.0.w1": MARKED[UP]}, KEY, ["leaker"])


class OnDisk(Mapping[str, np.ndarray]):
    """Tensors that are read when they are asked for, and counted."""

    def __init__(self, folder: Path, tensors: Tensors) -> None:
        folder.mkdir()
        self.files = {name: folder / f"{number}.npy" for number, name in enumerate(tensors)}
        self.reads: Counter[str] = Counter()
        for name, tensor in tensors.items():
            np.save(self.files[name], tensor)

    def __getitem__(self, name: str) -> np.ndarray:
        self.reads[name] += 1
        return np.asarray(np.load(self.files[name]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def test_detection_holds_a_pair_of_tensors_at_a_time(tmp_path: Path) -> None:
    names = {f"model.layers.{layer}.mlp.up_proj.weight": np.roll(ORIGINAL[UP], layer) for layer in range(12)}
    original = OnDisk(tmp_path / "original", names)
    suspect = OnDisk(tmp_path / "suspect", watermark.mark(names, KEY, "leaker"))
    watermark.detect({UP: ORIGINAL[UP]}, {UP: MARKED[UP]}, KEY, ["leaker"])  # what is imported, is imported
    tracemalloc.start()
    found = watermark.detect(original, suspect, KEY, ["innocent", "leaker"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.accused == ("leaker",)
    assert set(original.reads.values()) == set(suspect.reads.values()) == {1}
    assert peak < 6 * ORIGINAL[UP].nbytes  # of 24 tensors
    reader = watermark.Reader(KEY)
    for name in reversed(list(names)):
        reader.add(name, original[name], suspect[name])
    assert np.allclose(reader.lean(), watermark.reading(original, suspect, KEY), rtol=0, atol=1e-12)
