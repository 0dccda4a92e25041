"""Changes to the weights that leave what a LLaMA computes as it is: made secretly at release, or by who hides a copy.

All work on tensors by Hugging Face name and return new mappings; permutations keep every bit, whatever the dtype.
`permute_neurons` is applied at release with a secret, committed key: it makes the p-values of lineage exact, since a
model made without ours cannot know the order. The others are what a thief may do, and `alignment.py` undoes.

    >>> shuffled = permute_neurons(tensors, key)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steelyard.base.errors import FormatError
from steelyard.base.progress import Progress
from steelyard.model.headers import DTYPE_BYTES, TensorInfo
from steelyard.model.identity import weight_files
from steelyard.trace import tardos
from steelyard.trace.rewrite import Pieces, read_exactly, rewrite_folder

Array = NDArray[Any]
Tensors = Mapping[str, Array]

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
# What a norm feeds: its scale can be moved into these.
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")  # their rows are the residual stream


def layer_count(tensors: Mapping[str, object]) -> int:
    """How many layers there are, numbered from 0. Raises FormatError where there is none, or one is missing."""
    found = 0
    while f"model.layers.{found}.mlp.gate_proj.weight" in tensors:
        found += 1
    numbers = {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}
    if not found or numbers != {str(number) for number in range(found)}:
        raise FormatError(
            f"layers {', '.join(sorted(numbers)[:8]) or 'none'}: they must be numbered from 0 and hold "
            "mlp.gate_proj.weight: rename the tensors to Hugging Face names"
        )
    return found


# --- The secret order of a release ------------------------------------------------------------------------------------


def neuron_order(key: bytes, layer: int, neurons: int) -> NDArray[np.int64]:
    """The uniformly random order of a layer's neurons under `key`: new neuron i is old neuron order[i]."""
    draws = np.frombuffer(tardos.stream(key, "neurons", str(layer), count=8 * neurons), "<u8")
    return np.argsort(draws, kind="stable")  # equal draws: once in 10^12 layers


def order_commitment(key: bytes) -> str:
    """SHA-256 in hex that binds to the orders of `key` and tells nothing about them, for the ledger."""
    return hashlib.sha256(b"steelyard neuron order 1" + tardos.stream(key, "order commitment", count=32)).hexdigest()


def permute_neurons(tensors: Tensors, key: bytes) -> dict[str, Array]:
    """Every layer's MLP neurons in the secret order of `key`. Raises FormatError as `layer_count` does."""
    layer_count(tensors)
    return {name: permute_tensor(name, tensor, key) for name, tensor in tensors.items()}


def permute_tensor(name: str, tensor: Array, key: bytes) -> Array:
    """One tensor of `permute_neurons`, for whoever streams: any tensor that has no neurons comes back as it is."""
    parts = name.split(".")
    if len(parts) != 6 or parts[:2] != ["model", "layers"] or parts[3] != "mlp":
        return tensor
    if parts[4] == "down_proj":
        return tensor[:, neuron_order(key, int(parts[2]), tensor.shape[1])] if parts[5] == "weight" else tensor
    return tensor[neuron_order(key, int(parts[2]), tensor.shape[0])]


def permute_folder(source: Path, out: Path, key: bytes, progress: Progress) -> None:
    """Write the model folder `out`: `source` with its neurons in the secret order of `key`, every other byte the same.
    Holds one tensor at a time. It is another subject, to be tested after, not before. Raises FormatError for a broken
    folder or other tensor names, SteelyardError where `out` exists, UsageError for a bad key."""
    files = weight_files(source)
    layer_count({name: None for tensors in files.values() for name in tensors})

    def change(tensor: TensorInfo, reader: BufferedReader) -> Pieces:
        data = read_exactly(reader, tensor.end - tensor.start)
        stored = np.frombuffer(data, f"V{DTYPE_BYTES[tensor.dtype]}").reshape(tensor.shape)
        yield permute_tensor(tensor.name, stored, key).tobytes()

    rewrite_folder(source, out, files, change, "permuting", progress)


# --- What a thief may do ----------------------------------------------------------------------------------------------


def permute_heads(tensors: Tensors, heads: int, kv_heads: int, draw: np.random.Generator) -> dict[str, Array]:
    """Key/value heads in another order, each with its query heads, which change places too."""
    changed = dict(tensors)
    for layer in range(layer_count(tensors)):
        groups = draw.permutation(kv_heads)
        queries = np.concatenate([g * (heads // kv_heads) + draw.permutation(heads // kv_heads) for g in groups])
        for part, order in (("q_proj", queries), ("k_proj", groups), ("v_proj", groups)):
            for kind in ("weight", "bias"):
                name = f"model.layers.{layer}.self_attn.{part}.{kind}"
                if name in tensors:
                    changed[name] = split_heads(tensors[name], len(order))[order].reshape(tensors[name].shape)
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        changed[name] = join_columns(split_columns(tensors[name], heads)[queries])
    return changed


def split_heads(rows: Array, heads: int) -> Array:
    """[heads * D, ...] as [heads, D, ...]."""
    return rows.reshape(heads, len(rows) // heads, *rows.shape[1:])


def split_columns(matrix: Array, heads: int) -> Array:
    """[hidden, heads * D] as [heads, hidden, D]."""
    return matrix.reshape(len(matrix), heads, -1).transpose(1, 0, 2)


def join_columns(parts: Array) -> Array:
    """The reverse of `split_columns`."""
    return np.ascontiguousarray(parts.transpose(1, 0, 2)).reshape(parts.shape[1], -1)


def fold_norms(tensors: Tensors) -> dict[str, Array]:
    """All norms' scales moved into the matrices that read them; the norms become 1, and a tied head its own tensor."""
    changed = dict(tensors)
    for layer in range(layer_count(tensors)):
        for norm, readers in READERS.items():
            scale = f"model.layers.{layer}.{norm}.weight"
            for reader in readers:
                name = f"model.layers.{layer}.{reader}.weight"
                changed[name] = tensors[name] * tensors[scale]
            changed[scale] = np.ones_like(tensors[scale])
    changed[HEAD] = tensors.get(HEAD, tensors[EMBEDDING]) * tensors[FINAL_NORM]
    changed[FINAL_NORM] = np.ones_like(tensors[FINAL_NORM])
    return changed


def rotate(tensors: Tensors, rotation: Array) -> dict[str, Array]:
    """The residual stream turned by an orthogonal matrix [hidden, hidden]; norms are folded first, as they must be.
    The norm of a turned vector is the same, so RMSNorm without a scale commutes with it."""
    changed = fold_norms(tensors)
    for layer in range(layer_count(tensors)):
        for readers in READERS.values():
            for reader in readers:
                name = f"model.layers.{layer}.{reader}.weight"
                changed[name] = changed[name] @ rotation
        for writer in WRITERS:
            name = f"model.layers.{layer}.{writer}.weight"
            changed[name] = rotation.T @ changed[name]
            bias = f"model.layers.{layer}.{writer}.bias"
            if bias in changed:
                changed[bias] = changed[bias] @ rotation
    for name in (EMBEDDING, HEAD):
        changed[name] = changed[name] @ rotation
    return changed


def random_rotation(size: int, draw: np.random.Generator) -> Array:
    """A uniformly random orthogonal matrix, float32 [size, size] (Mezzadri 2007: QR with the signs of R's diagonal)."""
    q, r = np.linalg.qr(draw.standard_normal((size, size)))
    return np.asarray(q * np.sign(np.diag(r)), np.float32)


def rescale(tensors: Tensors, heads: int, kv_heads: int, draw: np.random.Generator) -> dict[str, Array]:
    """Scales that cancel: each neuron's up row against its down column, each value head against its output columns,
    each key head against its queries. Factors are e^N(0, 0.5) of either sign."""
    changed = dict(tensors)

    def factors(count: int) -> Array:
        return np.asarray(np.exp(0.5 * draw.standard_normal(count)) * draw.choice([-1, 1], count), np.float32)

    def times(name: str, factor: Array) -> None:
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in changed:
                tensor = changed[f"{name}.{kind}"]
                changed[f"{name}.{kind}"] = tensor * factor.reshape(-1, *[1] * (tensor.ndim - 1))

    for layer in range(layer_count(tensors)):
        mlp, attention = f"model.layers.{layer}.mlp", f"model.layers.{layer}.self_attn"
        size = len(tensors[f"{attention}.k_proj.weight"]) // kv_heads
        neurons = factors(len(tensors[f"{mlp}.up_proj.weight"]))
        times(f"{mlp}.up_proj", neurons)
        changed[f"{mlp}.down_proj.weight"] = changed[f"{mlp}.down_proj.weight"] / neurons
        values, keys = factors(kv_heads), factors(kv_heads)
        times(f"{attention}.v_proj", np.repeat(values, size))
        output = f"{attention}.o_proj.weight"
        changed[output] = changed[output] / np.repeat(values, size * heads // kv_heads)
        times(f"{attention}.k_proj", np.repeat(keys, size))
        times(f"{attention}.q_proj", 1 / np.repeat(keys, size * heads // kv_heads))
    return changed
