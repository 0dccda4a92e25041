"""GGUF out: a Hugging Face LLaMA folder becomes one file of F16, BF16 or Q8_0 weights that llama.cpp runs.

The file says what the folder says, or is not written: a RoPE variant, a tokenizer or a setting that a GGUF cannot hold
is refused by name. Written aside and read back before it appears; memory does not grow with the model.

    >>> export_gguf(Path("models/smollm2"), Path("smollm2.gguf"), "Q8_0").bytes
    144811328
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from steelyard.base.errors import FormatError, SteelyardError, UsageError, require_extra
from steelyard.base.files import new_file
from steelyard.base.progress import Progress, Silent
from steelyard.model.gguf import ROPE_FREQS, SAMPLING_DEFAULTS, SAMPLING_KEYS, hugging_face_name, tensor_shapes
from steelyard.model.gguf_tokenizer import read_tokenizer
from steelyard.model.gguf_vocabulary import vocabulary_metadata
from steelyard.model.headers import GGML_TYPES, TensorInfo, quote, read_json_object, scan_gguf
from steelyard.model.identity import weight_files
from steelyard.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from steelyard.model.llama import LlamaConfig

Array = np.ndarray[Any, np.dtype[Any]]

KINDS = {"F16": 1, "BF16": 32, "Q8_0": 7}  # -> llama.cpp's number for a file of mostly that type
_STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_CHUNK = 1 << 22  # values converted at a time: about 100 MB at the widest
# What in generation_config.json says nothing about how a token is drawn, or stands elsewhere in the file.
_HARMLESS = frozenset(
    (
        *("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config"),
        *("max_length", "max_new_tokens", "use_cache", "num_beams", "num_return_sequences"),
    )
)
# llama.cpp would otherwise filter before it applies the temperature; transformers applies it first.
_SAMPLERS = "temperature;top_k;top_p"
_PROBES = (
    *("", " ", "  ", "\n", "\r\n \t x", "Hello, world!", " 12345 3.14 1,000", "don't WE'LL I'm", "naïve Größe café"),
    *("北京 東京", "Привет мир", "नमस्ते สวัสดี", "🙂 \U0001f468\u200d\U0001f469", "def f(x):\n    return x**2\n\n\n"),
    *("a\u0301 \u00a0\u2003x", "<s></s><unk><|endoftext|>"),
)


@dataclass(frozen=True)
class Exported:
    """What was written. `rounded`: how many values of the matrices F16 or BF16 could not hold exactly (None: Q8_0)."""

    path: Path
    kind: str
    bytes: int
    values: int
    rounded: int | None


def export_gguf(folder: Path, out: Path, kind: str, *, progress: Progress | None = None) -> Exported:
    """Write the model folder as the GGUF file `out`, its matrices as `kind` (F16, BF16, Q8_0), all else as float32.

    `out` appears whole or not at all. Raises UsageError for another kind, FormatError for a folder that is broken or
    holds what llama.cpp would compute or read otherwise, SteelyardError where `out` exists or the disk is too full.
    """
    if kind not in KINDS:
        raise UsageError(f"{quote(kind)}: not a kind of weights; known are {', '.join(KINDS)}")
    stored = {
        name: (file, tensor) for file, tensors in weight_files(folder).items() for name, tensor in tensors.items()
    }
    from steelyard.model.llama import LlamaConfig  # torch: after what may refuse the folder without it

    path = folder / "config.json"
    config = LlamaConfig.from_dict(read_json_object(path), str(path))
    plan = _plan(folder, config, kind, stored)
    metadata = {
        "general.name": folder.resolve().name,
        "general.file_type": KINDS[kind],
        "general.quantization_version": 2,
        **_sampling(folder),
        **_hyperparameters(path, config),
        **vocabulary_metadata(folder, config.vocab_size),
    }
    needed = sum(item.bytes for item in plan) + (64 << 20)
    space = next(parent for parent in out.absolute().parents if parent.exists())
    if (free := shutil.disk_usage(space).free) < needed:
        raise SteelyardError(f"{out}: needs {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free: make room")
    with new_file(out) as temporary:
        rounded = _write(temporary, metadata, plan, kind, progress or Silent())
        _read_back(temporary, folder, config.max_position_embeddings)
    return Exported(
        out, kind, out.stat().st_size, sum(math.prod(item.shape) for item in plan), None if kind == "Q8_0" else rounded
    )


# --- configuration ----------------------------------------------------------------------------------------------------


def _sampling(folder: Path) -> dict[str, Any]:
    """generation_config.json as `general.sampling`: greedy unless it says do_sample, as in transformers.

    llama.cpp's programs take these where the user says nothing else.
    """
    if (folder / "system_prompt.txt").is_file() and (folder / "system_prompt.txt").stat().st_size:
        raise FormatError(
            f"{folder / 'system_prompt.txt'}: a GGUF has no place for it: write it into the chat template, or remove it"
        )
    path = folder / "generation_config.json"
    settings = read_json_object(path) if path.is_file() else {}
    for key, value in settings.items():
        known = key in _HARMLESS or key == "do_sample" or key in SAMPLING_DEFAULTS
        if not known and value not in (None, False, 0, 1, []):  # nearly every setting that does nothing is one of these
            raise FormatError(f"{path}: {key}: {quote(value)} has no place in a GGUF: remove it, and test without it")
    if not settings.get("do_sample"):
        return {"general.sampling.temp": 0.0}
    stated = {key: settings[key] for key in SAMPLING_DEFAULTS if settings.get(key) is not None}
    values = dict(SAMPLING_DEFAULTS) | stated
    found: dict[str, Any] = {}
    for key, name in SAMPLING_KEYS.items():
        value = values[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise FormatError(f"{path}: {name}: {quote(value)} is not a number")
        found[f"general.sampling.{key}"] = int(value) if name == "top_k" else _real(path, name, value)
    return found | {"general.sampling.min_p": 0.0, "general.sampling.sequence": _SAMPLERS}


def _real(path: Path, key: str, value: float) -> float:
    """A number that a GGUF's float32 holds to the last stated digit."""
    if float(str(np.float32(value))) != value:
        raise FormatError(f"{path}: {key}: {value!r} has more digits than a GGUF holds: shorten it, and test with that")
    return float(value)


def _hyperparameters(path: Path, config: LlamaConfig) -> dict[str, Any]:
    found: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": _real(path, "rms_norm_eps", config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": _real(path, "rope_theta", config.rope.theta),
    }
    if config.rope.type == "linear":
        found["rope.scaling.type"] = "linear"
        found["rope.scaling.factor"] = _real(path, "rope_scaling.factor", config.rope.factor)
    elif config.rope.type not in ("default", "llama3"):
        raise FormatError(f"{path}: rope_scaling: llama.cpp has no {config.rope.type} scaling: none, linear and llama3")
    return {f"llama.{key}": value for key, value in found.items()}


def _rope_divisors(config: LlamaConfig) -> Array:
    """What each pair's frequency is divided by under Llama 3's scaling (Meta, 2024): float32 [D / 2]."""
    rope = config.rope
    wavelength = 2 * math.pi * rope.theta ** (np.arange(0, config.head_dim, 2) / config.head_dim)
    position = rope.original_max_position_embeddings / wavelength - rope.low_freq_factor
    smooth = (position / (rope.high_freq_factor - rope.low_freq_factor)).clip(0, 1)
    divisors: Array = (1 / ((1 - smooth) / rope.factor + smooth)).astype("<f4")
    return divisors


# --- weights ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Item:
    """One tensor to write: its GGUF name, type and shape, the bytes it takes, and where its values are.

    `heads` is set for query and key projections, whose rows change places.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    source: tuple[Path, TensorInfo] | Array
    heads: int | None = None

    @property
    def bytes(self) -> int:
        _, block, size = next(entry for entry in GGML_TYPES.values() if entry[0] == self.kind)
        return math.prod(self.shape) // block * size

    def chunks(self) -> Iterator[Array]:
        """The values in rows of the GGUF's order, float32, or uint16 for bfloat16."""
        if isinstance(self.source, np.ndarray):
            yield self.source
            return
        path, tensor = self.source
        rows, *rest = self.shape
        per_head = rows // self.heads if self.heads else 1
        step = max(_CHUNK // math.prod(rest) // per_head, 1) * per_head
        data = np.memmap(path, dtype=_STORED[tensor.dtype], mode="r", offset=tensor.start, shape=self.shape)
        for start in range(0, rows, step):
            values: Array = data[start : start + step]
            yield permute(values, per_head) if self.heads else values


def permute(values: Array, head_dim: int) -> Array:
    """Rows of a query or key projection (or its bias) from Hugging Face's order to llama.cpp's, for whole heads.

    llama.cpp rotates neighbouring pairs of a head, Hugging Face its first half against its second.
    """
    rows, *rest = values.shape
    return values.reshape(rows // head_dim, 2, head_dim // 2, *rest).swapaxes(1, 2).reshape(rows, *rest)


def _plan(folder: Path, config: LlamaConfig, kind: str, stored: Mapping[str, tuple[str, TensorInfo]]) -> list[_Item]:
    """What to write, after every check that needs no weight. Raises FormatError, naming the tensor."""
    left = {name for name in stored if not name.endswith(".rotary_emb.inv_freq")}  # follows from config.json
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    items = []
    if config.rope.type == "llama3":
        items.append(_Item(ROPE_FREQS, "F32", (config.head_dim // 2,), _rope_divisors(config)))
    for name, shape in tensor_shapes(vars(config)).items():
        own = hugging_face_name(name)
        if own not in stored:
            raise FormatError(f"{folder}: lacks the tensor {own}")
        file, tensor = stored[own]
        left.discard(own)
        if tensor.shape != shape:
            raise FormatError(f"{folder}: tensor {own} has shape {list(tensor.shape)}, must have {list(shape)}")
        if tensor.dtype not in _STORED:
            raise FormatError(f"{folder}: tensor {own} is of type {tensor.dtype}: read are {', '.join(_STORED)}")
        if kind == "Q8_0" and len(shape) == 2 and shape[1] % 32:
            raise FormatError(f"{folder}: tensor {own} has rows of {shape[1]}, no multiple of Q8_0's 32: export F16")
        part = name.split(".")[-2]
        items.append(_Item(name, kind if len(shape) == 2 else "F32", shape, (folder / file, tensor), heads.get(part)))
    if config.tie_word_embeddings and "lm_head.weight" in left:
        left.discard("lm_head.weight")
        _require_tied(folder, stored)
    if left:
        raise FormatError(f"{folder}: has the tensor {quote(min(left))}, which a LLaMA of this config.json has not")
    return items


def _require_tied(folder: Path, stored: Mapping[str, tuple[str, TensorInfo]]) -> None:
    """A head stored beside the embedding that it is tied to must be that embedding."""
    names = ("lm_head.weight", "model.embed_tokens.weight")
    chunks = [_Item(name, "F32", stored[name][1].shape, (folder / stored[name][0], stored[name][1])) for name in names]
    same = chunks[0].shape == chunks[1].shape and stored[names[0]][1].dtype == stored[names[1]][1].dtype
    if not same or not all(map(np.array_equal, chunks[0].chunks(), chunks[1].chunks())):
        raise FormatError(f"{folder}: {names[0]} is not {names[1]}, though config.json ties them: correct one of them")


def _write(path: Path, metadata: Mapping[str, Any], plan: list[_Item], kind: str, progress: Progress) -> int:
    """Write the file; returns how many values of the matrices were rounded."""
    try:
        import gguf
    except ImportError:
        raise require_extra("gguf", "models") from None
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        _put(writer, key, value)
    for item in plan:
        number = gguf.GGMLQuantizationType[item.kind]
        writer.add_tensor_info(item.name, item.shape, np.dtype(np.float32), item.bytes, raw_dtype=number)
    rounded = 0
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        file = writer.fout[0]
        writer.write_padding(file, file.tell())
        with progress.task(f"write {kind}", sum(math.prod(item.shape) for item in plan) / 1e6, "M values") as task:
            for item in plan:
                for values in item.chunks():
                    data, changed = _encode(item, values)
                    file.write(data)
                    rounded += changed
                    task.advance(values.size / 1e6)
                writer.write_padding(file, item.bytes)
    finally:
        writer.close()
    return rounded


def _put(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        (writer.add_int32 if key.startswith("general.sampling") else writer.add_uint32)(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value:
        writer.add_array(key, value)


def _encode(item: _Item, values: Array) -> tuple[bytes, int]:
    """(bytes of a chunk in the item's type, how many values were rounded). Raises FormatError for NaN, and for values
    past the type's range."""
    from gguf import GGMLQuantizationType, quants

    stored_as_bfloat16 = values.dtype == np.uint16
    wide: Array = values.astype("<u4") << 16 if stored_as_bfloat16 else values
    wide = wide.view("<f4") if stored_as_bfloat16 else values.astype("<f4", copy=False)
    if not np.isfinite(wide).all():
        raise FormatError(f"tensor {hugging_face_name(item.name)}: holds a value that is not a finite number")
    if item.kind == "F32":
        return wide.tobytes(), 0
    if item.kind == "BF16" and stored_as_bfloat16:
        return values.tobytes(), 0
    reach = {"F16": 65504.0, "BF16": 3.3895313892515355e38, "Q8_0": 65504.0 * 127}[item.kind]
    if np.abs(wide).max() > reach:
        raise FormatError(
            f"tensor {hugging_face_name(item.name)}: holds {np.abs(wide).max():g}, past {item.kind}'s range"
        )
    if item.kind == "F16":
        narrow = wide.astype("<f2")
        return narrow.tobytes(), int(np.count_nonzero(narrow.astype("<f4") != wide))
    data = quants.quantize(np.ascontiguousarray(wide), GGMLQuantizationType[item.kind])
    changed = 0
    if item.kind == "BF16":
        changed = int(np.count_nonzero((data.view("<u2").astype("<u4") << 16).view("<f4") != wide))
    return data.tobytes(), changed


# --- reading back -----------------------------------------------------------------------------------------------------


def _read_back(path: Path, folder: Path, max_length: int) -> None:
    """Read the finished file's tokenizer as `model import` would (whose reading is tested against llama.cpp's), and
    compare it with the folder's on every token and on texts of many kinds. Raises FormatError where they differ.
    """
    parts = read_tokenizer(scan_gguf(path), max_length)
    original = Tokenizer.load(folder)
    with tempfile.TemporaryDirectory() as place:
        for name, data in parts.files.items():
            (Path(place) / name).write_bytes(data)
        ends = set(parts.eos_ids)
        written = Tokenizer.load(Path(place))
        if (written.bos_id, written.adds_bos, ends) != (original.bos_id, original.adds_bos, set(original.eos_ids)):
            raise FormatError(f"{folder}: special tokens: a GGUF cannot hold them as they are")
        for text in (*_PROBES, *_token_texts(original)):
            for special in (False, True):
                if written.encode(text, bos=False, special=special) != original.encode(
                    text, bos=False, special=special
                ):
                    raise FormatError(f"{folder}: tokenizer.json: reads {quote(text)} otherwise than its GGUF would")


def _token_texts(tokenizer: Tokenizer) -> Iterator[str]:
    """The texts of all tokens, eight at a time, neighbours drawn from all over the vocabulary."""
    count = tokenizer.vocab_size
    step = next(step for step in range(int(count * 0.618) | 1, 0, -1) if math.gcd(step, count) == 1)
    order = [index * step % count for index in range(count)]
    for start in range(0, count, 8):
        yield tokenizer.decode(order[start : start + 8], skip_special=False)
