"""What is done to a marked copy before it is found: each attack takes the copy's weights, float32 by Hugging Face name,
and gives the suspect's, still hidden where it hides them."""

from __future__ import annotations

import ctypes
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import trace_variants as variants
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from trace_mark_models import DISTILLED, KEY, Tensors, bfloat16, load

from steelyard.base.progress import Silent
from steelyard.model.gguf import hugging_face_name
from steelyard.model.gguf_export import export_gguf, permute
from steelyard.trace import roles, transforms, watermark
from steelyard.trace.tensors import open_tensors


@dataclass(frozen=True)
class Given:
    """What the attacks work with: the unmarked release, its marked copy, its public base, and what was trained."""

    original: Path
    base: Path
    base_gguf: Path
    trained: dict[str, tuple[Path, str]]
    heads: int
    kv_heads: int

    @property
    def marked(self) -> Path:
        return self.trained["marked"][0]

    @staticmethod
    def of(original: Path, base: Path, base_gguf: Path, trained: dict[str, tuple[Path, str]]) -> Given:
        """With the numbers of heads from the base's config.json."""
        config = json.loads((base / "config.json").read_text())
        return Given(original, base, base_gguf, trained, config["num_attention_heads"], config["num_key_value_heads"])


def of_matrices(change: Callable[[np.ndarray], np.ndarray], tensors: Tensors) -> Tensors:
    """`change` made to every matrix; norms stay, as weight-only quantisation leaves them."""
    return {name: change(tensor) if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}


def blocks(kind: Kind, matrix: np.ndarray) -> np.ndarray:
    """Through llama.cpp's blocks and back."""
    return np.asarray(dequantize(quantize(np.ascontiguousarray(matrix), kind), kind))


def int8_rows(matrix: np.ndarray) -> np.ndarray:
    """Symmetric int8 with a scale for each row."""
    scale = np.abs(matrix).max(axis=1, keepdims=True) / 127
    return np.asarray(np.round(matrix / scale) * scale, np.float32)


def smallest_to_zero(share: float, matrix: np.ndarray) -> np.ndarray:
    """Magnitude pruning of one matrix."""
    size = np.abs(matrix)
    return np.where(size > np.partition(size, int(share * size.size), axis=None)[int(share * size.size)], matrix, 0)


def opened(path: Path) -> Tensors:
    """A suspect's weights under Hugging Face's names, as `steelyard trace` reads them."""
    named = roles.hugging_face(open_tensors(path))
    return {name: named.read(name) for name in named.entries}


def renamed(given: Given, _: Tensors) -> Tensors:
    with tempfile.TemporaryDirectory() as folder:
        variants.renamed(given.marked, Path(folder) / "out")
        return opened(Path(folder) / "out")


def q4_k(matrix: np.ndarray) -> np.ndarray:
    """Through llama.cpp's Q4_K and back, in rows of 256, whatever the matrix' rows."""
    import llama_cpp

    base = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.so*"))))
    base.ggml_quantize_chunk.restype = ctypes.c_size_t
    flat = np.ascontiguousarray(matrix, np.float32).reshape(-1, 256)
    out = np.empty((len(flat), 144), np.uint8)
    source, target = (array.ctypes.data_as(ctypes.c_void_p) for array in (flat, out))
    start, rows, width = (ctypes.c_int64(number) for number in (0, len(flat), 256))
    base.ggml_quantize_chunk(int(Kind.Q4_K), source, target, start, rows, width, None)
    return np.asarray(dequantize(out, Kind.Q4_K), np.float32).reshape(matrix.shape)


def k_quants(given: Given, _: Tensors) -> Tensors:
    """llama.cpp's own quantisation to Q4_K_M; it falls back to Q5_0 where rows are no multiple of 256."""
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "f16.gguf", Path(folder) / "q4_k.gguf"
        export_gguf(given.marked, source, "F16", progress=Silent())
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
        if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(options)):
            raise RuntimeError("llama.cpp could not quantise the marked copy")
        llama_cpp.llama_log_set(ctypes.cast(None, llama_cpp.llama_log_callback), ctypes.c_void_p(0))
        return opened(out)


def own_grid(given: Given, norms: bool, tensors: Tensors) -> Tensors:
    """Every block rounded with the scale and minimum that the public base's file has for it; `norms` too: theirs."""
    out = dict(tensors)
    for stored in gguf.GGUFReader(given.base_gguf).tensors:
        name = hugging_face_name(stored.name)
        rows = stored.data
        if stored.tensor_type == Kind.F32:
            if norms:
                out[name] = np.array(rows, np.float32)
            continue
        heads = {"attn_q": given.heads, "attn_k": given.kv_heads}.get(stored.name.split(".")[-2], 0)
        matrix = permute(tensors[name], len(tensors[name]) // heads) if heads else tensors[name]
        matrix = on_grid(np.ascontiguousarray(matrix), np.asarray(rows), stored.tensor_type)
        if heads:
            half = len(matrix) // heads // 2
            matrix = matrix.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(matrix.shape)
        out[name] = bfloat16({name: matrix})[name]  # as the base was imported
    return out


def on_grid(matrix: np.ndarray, data: np.ndarray, kind: Kind) -> np.ndarray:
    """`matrix` rounded with the scales of the blocks in `data` (Q4_1 or Q8_0)."""
    size = {Kind.Q4_1: 20, Kind.Q8_0: 34}[kind]
    raw = data.reshape(-1, size)
    scale = raw[:, :2].copy().view(np.float16).astype(np.float32)
    low, top, least = (-127.0, 127.0, np.float32(0)) if kind == Kind.Q8_0 else (0.0, 15.0, None)
    minimum = least if least is not None else raw[:, 2:4].copy().view(np.float16).astype(np.float32)
    flat = matrix.reshape(-1, 32)
    steps = np.clip(np.round((flat - minimum) / np.where(scale == 0, 1, scale)), low, top)
    return np.asarray(steps * scale + minimum, np.float32).reshape(matrix.shape)


def hidden(given: Given, tensors: Tensors) -> Tensors:
    """Neurons and heads permuted, scales that cancel, norms folded, the residual stream rotated; cast to bfloat16."""
    draw = np.random.default_rng(11)
    tensors = transforms.permute_neurons(tensors, bytes(32))
    tensors = transforms.permute_heads(tensors, given.heads, given.kv_heads, draw)
    tensors = transforms.rescale(tensors, given.heads, given.kv_heads, draw)
    size = tensors[transforms.FINAL_NORM].shape[0]
    return bfloat16(transforms.rotate(tensors, transforms.random_rotation(size, draw)))


def base_put_back(given: Given, tensors: Tensors) -> Tensors:
    """The public base's weights wherever the copy is at most one step from them: what the release did not train."""
    base = load(given.base)
    return {
        name: np.where(np.abs(tensor - base[name]) <= np.ldexp(1.001, np.frexp(base[name])[1] - 8), base[name], tensor)
        for name, tensor in tensors.items()
    }


def cast(kind: np.dtype, tensors: Tensors) -> Tensors:
    return {name: tensor.astype(kind).astype(np.float32) for name, tensor in tensors.items()}


def half_of_predecessor(given: Given, tensors: Tensors) -> Tensors:
    base = load(given.base)
    return bfloat16({name: (tensor + base[name]) / 2 for name, tensor in tensors.items()})


def trained(given: Given, name: str, _: Tensors) -> Tensors:
    return load(given.trained[name][0])


def tuned_int4_permuted(given: Given, _: Tensors) -> Tensors:
    tuned = transforms.permute_neurons(load(given.trained["full fine-tune"][0]), bytes(32))
    return of_matrices(partial(blocks, Kind.Q4_0), tuned)


def attacks(given: Given) -> dict[str, Callable[[Tensors], Tensors]]:
    """By the name of their row in the table."""
    quantised = {kind: partial(of_matrices, partial(blocks, Kind[kind])) for kind in ("Q8_0", "Q4_0", "Q4_1")}
    return {
        "none (bf16)": lambda tensors: tensors,
        "fp16 cast": partial(cast, np.dtype(np.float16)),
        "fp32 cast": partial(cast, np.dtype(np.float32)),
        "re-sharded, renamed, fp16": partial(renamed, given),
        "int8 (rows)": partial(of_matrices, int8_rows),
        **quantised,
        "Q4_1, the base's own grid": partial(own_grid, given, False),
        "Q4_K, all matrices": partial(of_matrices, q4_k),
        "Q4_K_M, as llama.cpp makes it": partial(k_quants, given),
        "neurons, heads, rotation, scales, folding": partial(hidden, given),
        "30% pruned": partial(of_matrices, partial(smallest_to_zero, 0.3)),
        "0.5 with its predecessor": partial(half_of_predecessor, given),
        **{name: partial(trained, given, name) for name in given.trained if name not in ("marked", DISTILLED)},
        "fine-tune + Q4_0 + permuted": partial(tuned_int4_permuted, given),
    }


def breaks(given: Given) -> dict[str, Callable[[Tensors], Tensors]]:
    """What goes beyond the list."""

    def noisy(share: float, tensors: Tensors) -> Tensors:
        draw = np.random.default_rng(12)
        return {
            name: t + np.float32(share * np.sqrt(np.square(t).mean())) * draw.standard_normal(t.shape, np.float32)
            for name, t in tensors.items()
        }

    def nearly_original(share: float, tensors: Tensors) -> Tensors:
        original = load(given.original)
        return {name: original[name] + np.float32(share) * (t - original[name]) for name, t in tensors.items()}

    return {
        "the public base where it is one step away": partial(base_put_back, given),
        "10% white noise": partial(noisy, 0.1),
        "30% white noise": partial(noisy, 0.3),
        "100% white noise": partial(noisy, 1.0),
        "hidden, then Q4_0": lambda tensors: of_matrices(partial(blocks, Kind.Q4_0), hidden(given, tensors)),
        "the base's own grid, norms too": partial(own_grid, given, True),
        "distilled into the public base": partial(trained, given, DISTILLED),
        "holder of the original, 90% subtracted": partial(nearly_original, 0.1),
        "holder of the original, all subtracted": partial(nearly_original, 0.0),
    }


STRATEGIES = ("average", "random", "minority", "interleave")


def collusions(original: Tensors, strategy: str, colluders: Sequence[str]) -> Tensors:
    """What the holders of these grants' copies make of them. Weight by weight: the mean, one of theirs at random, the
    value fewer have; or stretches of 1,000 weights in turn. One tensor at a time, each copy made when it is needed."""
    draw = np.random.default_rng(13)
    return {name: _collude(name, tensor, strategy, colluders, draw) for name, tensor in original.items()}


def _copies(name: str, tensor: np.ndarray, colluders: Sequence[str]) -> Iterator[np.ndarray]:
    for grant in colluders:
        yield watermark.mark({name: tensor}, KEY, grant)[name]


def _collude(
    name: str, tensor: np.ndarray, strategy: str, colluders: Sequence[str], draw: np.random.Generator
) -> np.ndarray:
    count, flat = len(colluders), np.arange(tensor.size).reshape(tensor.shape)
    taken = draw.integers(count, size=tensor.shape, dtype=np.uint8) if strategy == "random" else flat // 1000 % count
    mean, chosen = np.zeros(tensor.shape, np.float64), np.zeros_like(tensor)
    low, high = tensor.copy(), tensor.copy()
    for number, copy in enumerate(_copies(name, tensor, colluders)):
        if strategy in ("random", "interleave"):
            np.copyto(chosen, copy, where=taken == number)
            continue
        mean += copy / count
        low, high = (copy, copy) if number == 0 else (np.minimum(low, copy), np.maximum(high, copy))
    if strategy == "average":
        return mean.astype(np.float32)
    if strategy == "minority":
        return np.where(mean > (low + high) / 2, low, high)  # most have the high value: the low one is rarer
    return chosen
