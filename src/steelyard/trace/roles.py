"""Which tensor is which: a suspect's names, whatever they are, to Hugging Face's names of the LLaMA family.

Known spellings are Hugging Face's (with any prefix), GGUF's and Meta's own (`layers.0.feed_forward.w1`). Else shapes,
the numbers in the names and the order in the file decide, and `Named.guessed` says so. Query and key rows that a format
keeps interleaved (GGUF of architecture llama, Meta's) are read in Hugging Face's order.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

import numpy as np

from steelyard.base.errors import FormatError
from steelyard.model.gguf import hugging_face_name
from steelyard.trace.tensors import FLOATS, READABLE, Entry, Float32, IntArray, Rows, Tensors

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
GATE, UP, DOWN = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
QUERY, KEY, VALUE, OUTPUT = (f"self_attn.{one}_proj" for one in "qkvo")
BEFORE_ATTENTION, BEFORE_MLP = "input_layernorm", "post_attention_layernorm"
PARTS = (BEFORE_ATTENTION, QUERY, KEY, VALUE, OUTPUT, BEFORE_MLP, GATE, UP, DOWN)

_HF_LAYER = re.compile(
    rf"(?P<prefix>.*?)layers\.(?P<layer>\d{{1,4}})\.(?P<part>{'|'.join(map(re.escape, PARTS))})\.weight"
)
_HF_OTHER = re.compile(r"(?P<prefix>.*?)(?P<part>embed_tokens|norm|lm_head)\.weight")
_META = {
    "attention_norm": BEFORE_ATTENTION, "attention.wq": QUERY, "attention.wk": KEY, "attention.wv": VALUE,
    "attention.wo": OUTPUT, "ffn_norm": BEFORE_MLP, "feed_forward.w1": GATE, "feed_forward.w3": UP,
    "feed_forward.w2": DOWN,
}  # fmt: skip
_META_LAYER = re.compile(rf"(?:.*\.)?layers\.(\d{{1,4}})\.({'|'.join(map(re.escape, _META))})\.weight")
_META_OTHER = {"tok_embeddings.weight": EMBEDDING, "norm.weight": NORM, "output.weight": HEAD}


def layer_name(layer: int, part: str) -> str:
    """`layer_name(3, GATE)` is `model.layers.3.mlp.gate_proj.weight`."""
    return f"model.layers.{layer}.{part}.weight"


@dataclass(frozen=True)
class Sizes:
    """What the shapes say. `heads`, `kv_heads` and `head_dim` are 0 where neither shapes nor settings tell."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool


@dataclass(frozen=True)
class Named:
    """A suspect's tensors by Hugging Face name. `guessed`: the names said nothing, shapes and order decided."""

    tensors: Tensors
    stored: Mapping[str, str]
    sizes: Sizes
    interleaved: bool
    guessed: bool

    @property
    def layers(self) -> list[int]:
        """Numbers of the layers that are here, which need not be all."""
        return sorted({int(name.split(".")[2]) for name in self.stored if name.startswith("model.layers.")})

    @property
    def whole_layers(self) -> list[int]:
        """Numbers of the layers whose gate and up rows are here, in the model's common shape."""
        shapes, like = self.tensors.entries, (self.sizes.intermediate, self.sizes.hidden)
        return [
            layer
            for layer in self.layers
            if all(
                (stored := self.stored.get(layer_name(layer, part))) is not None
                and shapes[stored].shape == like
                and shapes[stored].dtype in READABLE
                for part in (GATE, UP)
            )
        ]

    @property
    def run_layers(self) -> list[int]:
        """Those of the whole layers that a loader would run, where the settings say how many: it passes over more."""
        arch = self.tensors.config.get("general.architecture", "llama")
        count = _hint(self.tensors, "num_hidden_layers", f"{arch}.block_count")
        return [layer for layer in self.whole_layers if layer < count]

    @property
    def entries(self) -> dict[str, Entry]:
        """Stored entries by Hugging Face name."""
        return {name: self.tensors.entries[stored] for name, stored in self.stored.items()}

    def read(self, name: str, rows: Rows = None) -> Float32:
        """Rows of the tensor of that Hugging Face name, float32, in Hugging Face's order."""
        order = self.stored_rows(name)
        if order is None:
            return self.tensors.read(self.stored[name], rows)
        return self.tensors.read(self.stored[name], order if rows is None else order[rows])

    def stored_rows(self, name: str) -> IntArray | None:
        """For each row in Hugging Face's order, the row it is stored as; None where the order is the same."""
        size = self.sizes.head_dim
        if not self.interleaved or not name.endswith((f"{QUERY}.weight", f"{KEY}.weight")) or not size:
            return None
        count = self.tensors.entries[self.stored[name]].shape[0]
        if count % size or size % 2:
            return None
        return interleaved_rows(count, size)


def interleaved_rows(count: int, head_dim: int) -> IntArray:
    """Row 2i + j of a head in llama.cpp's and Meta's order is row j * head_dim / 2 + i in Hugging Face's: for each of
    the latter, the former."""
    return np.arange(count).reshape(-1, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def hugging_face(tensors: Tensors) -> Named:
    """The tensors under their Hugging Face names.

    Raises FormatError where no LLaMA-like layer or embedding can be found: another architecture, or an adapter alone.
    """
    if any(".lora_" in name for name in tensors.entries):
        raise FormatError("holds an adapter, not a model's weights: merge it into its base first")
    stored, guessed, meta = _hugging_face_names(tensors.entries), False, False
    if not stored and tensors.gguf:
        stored = _gguf_names(tensors.entries)
    if not _has_layers(stored) and (found := _meta_names(tensors.entries)):
        stored, meta = found, True
    if not _has_layers(stored) and (found := _by_shape(tensors.entries)):
        stored, guessed = found, True
    if not stored:
        raise FormatError("no tensor of it fits a model of the LLaMA family: nothing to compare but digests")
    interleaved = meta or (tensors.gguf and tensors.config.get("general.architecture") == "llama")
    return Named(tensors, stored, _sizes(tensors, stored), interleaved, guessed)


def second_model(named: Named, gates: Set[tuple[int, ...]]) -> str | None:
    """A tensor of another model in the same file, under a prefix of its own, whose gates have one of these shapes: what
    is asked of `named` says nothing of it. None where there is no such."""
    known = set(named.stored.values())
    for name, entry in named.tensors.entries.items():
        match = _HF_LAYER.fullmatch(name)
        if match and match["part"] == GATE and name not in known and entry.shape in gates:
            return name
    return None


def _has_layers(stored: Iterable[str]) -> bool:
    return any(name.startswith("model.layers.") for name in stored)


def _hugging_face_names(entries: Mapping[str, Entry]) -> dict[str, str]:
    """Of several sub-models under different prefixes (a vision tower, a decoy), the one with the most bytes."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    others: dict[str, dict[str, str]] = defaultdict(dict)
    for name in entries:
        if match := _HF_LAYER.fullmatch(name):
            found[match["prefix"]][layer_name(int(match["layer"]), match["part"])] = name
        elif match := _HF_OTHER.fullmatch(name):
            to = HEAD if match["part"] == "lm_head" else f"model.{match['part']}.weight"
            others["" if to == HEAD else match["prefix"]][to] = name
    if found:
        prefix = max(
            found, key=lambda one: sum(entries[name].end - entries[name].start for name in found[one].values())
        )
        return found[prefix] | others.get(prefix, {}) | others.get("", {})
    if any(EMBEDDING in part for part in others.values()):  # one shard with nothing but an embedding
        return next(part for part in others.values() if EMBEDDING in part)
    return {}


def _gguf_names(names: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[hugging_face_name(name)] = name
        except KeyError:  # a tensor that a plain LLaMA has not
            continue
    return found


def _meta_names(names: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in names:
        if match := _META_LAYER.fullmatch(name):
            found[layer_name(int(match[1]), _META[match[2]])] = name
        elif name in _META_OTHER:
            found[_META_OTHER[name]] = name
    return found if _has_layers(found) else {}


def _by_shape(entries: Mapping[str, Entry]) -> dict[str, str]:
    """Embedding, MLP, attention and norms by their shapes; the layer by a number in the name, else by order.

    Matrices of equal shape (gate and up, key and value, query and output) are told apart by words in names, else by
    order, which may be wrong: whoever compares tells them apart by what they are compared with (`guessed.py`).
    """
    matrices = [one for one in entries.values() if len(one.shape) == 2 and one.dtype in FLOATS]
    shapes = Counter(one.shape for one in matrices)
    inner = [
        (count, inner, hidden)
        for (hidden, inner), count in shapes.items()
        if hidden != inner and shapes[inner, hidden] == 2 * count
    ]
    if not inner:
        return {}
    layers, inner_size, hidden = max(inner)
    tall = [one for one in matrices if one.shape[1] == hidden and shapes[one.shape] <= 2 and one.shape[0] > hidden]
    tall = [one for one in tall if one.shape[0] != inner_size]
    found = {}
    if tall:
        tall = _in_order(tall)
        tall.sort(key=lambda one: (-one.shape[0], "head" in one.name or "output" in one.name))
        found[EMBEDDING] = tall[0].name
        if len(tall) > 1 and tall[1].shape == tall[0].shape:
            found[HEAD] = tall[1].name
    rest = [one for one in entries.values() if one.name not in found.values() and one.dtype in FLOATS]
    groups = _groups(rest, layers)
    for layer, group in enumerate(groups):
        found |= {layer_name(layer, part): name for part, name in _parts(group, hidden, inner_size).items()}
    inside = {one.name for group in groups for one in group}
    norms = [one.name for one in rest if one.shape == (hidden,) and one.name not in inside]
    return found | ({NORM: norms[0]} if len(norms) == 1 else {})


def _in_order(entries: Iterable[Entry]) -> list[Entry]:
    """By their numbers where names differ in nothing else, for files have w10 before w2; else as they are stored."""
    stored = sorted(entries, key=lambda one: (str(one.file), one.start))
    if len({re.sub(r"\d{1,6}", "0", one.name) for one in stored}) > 1:
        return stored
    return sorted(stored, key=lambda one: [int(text) for text in re.findall(r"\d{1,6}", one.name)])


def _groups(entries: list[Entry], layers: int) -> list[list[Entry]]:
    """The tensors of each layer, by the first number in the name that takes as many values as there are layers."""
    numbers = {one.name: [int(text) for text in re.findall(r"\d{1,6}", one.name)] for one in entries}
    for place in range(3):
        by = defaultdict(list)
        for one in entries:
            if len(numbers[one.name]) > place:
                by[numbers[one.name][place]].append(one)
        sizes = Counter(len(group) for group in by.values())
        if len(by) in (layers, layers + 1) and max(sizes.values(), default=0) >= layers - 1:
            common = max(sizes, key=lambda size: sizes[size])
            return [by[number] for number in sorted(by) if len(by[number]) == common]
    ordered = _in_order(entries)
    for whole in (ordered, ordered[:-1], ordered[1:]):  # the final norm stands last or first
        if len(whole) % layers == 0:
            size = len(whole) // layers
            cut = [whole[at * size : (at + 1) * size] for at in range(layers)]
            if len({tuple(sorted(one.shape for one in group)) for group in cut}) == 1:
                return cut
    matrices = [one for one in ordered if len(one.shape) == 2]
    each = len(matrices) // layers
    return [matrices[at * each : (at + 1) * each] for at in range(layers)]


_ATTENTION = (QUERY, KEY, VALUE, OUTPUT)
_WORDS = {GATE: ("gate", "w1"), UP: ("up", "w3"), KEY: ("k_", "key"), VALUE: ("v_", "value"), QUERY: ("q_", "query"),
          OUTPUT: ("o_", "out")}  # fmt: skip


def _parts(group: list[Entry], hidden: int, inner: int) -> dict[str, str]:
    group = _in_order(group)
    found: dict[str, str] = {}

    def pair(names: list[str], first: str, second: str) -> None:
        if len(names) == 2:
            worded = any(word in names[0] for word in _WORDS[second]) or any(word in names[1] for word in _WORDS[first])
            found[first], found[second] = reversed(names) if worded else names

    def of(*shape: int) -> list[str]:
        return [one.name for one in group if one.shape == shape]

    pair(of(inner, hidden), GATE, UP)
    if down := of(hidden, inner):
        found[DOWN] = down[0]
    square = of(hidden, hidden)
    pair(square, OUTPUT, QUERY)
    if len(square) == 4:  # no head is shared
        worded = {part: [name for name in square if any(w in name for w in _WORDS[part])] for part in _ATTENTION}
        single = all(len(names) == 1 for names in worded.values())
        found |= {part: worded[part][0] if single else name for part, name in zip(_ATTENTION, square, strict=True)}
    rest = {one.shape[0] for one in group if len(one.shape) == 2 and one.shape[1] == hidden} - {inner, hidden}
    for rows in rest:
        pair(of(rows, hidden), KEY, VALUE)
    norms = of(hidden)
    if len(norms) == 2:
        found[BEFORE_ATTENTION], found[BEFORE_MLP] = norms
    return found


def _sizes(tensors: Tensors, stored: Mapping[str, str]) -> Sizes:
    shapes = {name: tensors.entries[one].shape for name, one in stored.items()}
    layers = {int(name.split(".")[2]) for name in stored if name.startswith("model.layers.")}

    def shape(part: str) -> tuple[int, ...]:
        """The shape in which most of the weights are."""
        found: Counter[tuple[int, ...]] = Counter()
        for one in sorted(layers):
            if (name := layer_name(one, part)) in shapes:
                found[shapes[name]] += math.prod(shapes[name])
        return found.most_common(1)[0][0] if found else (0, 0)

    gate, query, key = shape(GATE), shape(QUERY), shape(KEY)
    for name, one in shapes.items():
        if (name.endswith("_proj.weight") or name in (EMBEDDING, HEAD)) and len(one) != 2:
            raise FormatError(f"tensor {stored[name]!r} has {len(one)} dimensions where a matrix belongs")
        if name.endswith("norm.weight") and len(one) != 1:
            raise FormatError(f"tensor {stored[name]!r} has {len(one)} dimensions where a vector belongs")
        if min(one, default=1) == 0:
            raise FormatError(f"tensor {stored[name]!r} is empty")
    vocab, hidden = shapes.get(EMBEDDING, (0, 0))
    hidden = hidden or (gate[1] if len(gate) == 2 else 0)
    arch = tensors.config.get("general.architecture", "llama")
    heads = _hint(tensors, "num_attention_heads", f"{arch}.attention.head_count")
    kv_heads = _hint(tensors, "num_key_value_heads", f"{arch}.attention.head_count_kv") or heads
    if not heads or query[0] % heads or not kv_heads or key[0] % kv_heads or query[0] // heads != key[0] // kv_heads:
        heads = kv_heads = 0
        for size in (128, 64):  # what models of this family have
            if query[0] and query[0] % size == 0 and key[0] % size == 0:
                heads, kv_heads = query[0] // size, key[0] // size
                break
    head_dim = query[0] // heads if heads else 0
    return Sizes(len(layers), hidden, gate[0], heads, kv_heads, head_dim, vocab, HEAD not in stored)


def _hint(tensors: Tensors, *keys: str) -> int:
    for key in keys:
        value = tensors.config.get(key)
        if type(value) is int and 0 < value < 1 << 16:
            return value
    return 0
