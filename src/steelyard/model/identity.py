"""The subject: the digests that name what was tested, so that nothing else can be released in its place.

The digest of the weights does not depend on how they are sharded; one changed bit, or two tensors of equal shape
swapped, changes it. Torch-free: a verifier computes the same digests with numpy's and hashlib's help only.

    >>> subject_of(Path("models/smollm2")).digest
    '5f0c...'
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, StringConstraints

from steelyard.base.canonical import digest, sha256_hex
from steelyard.base.errors import FormatError
from steelyard.base.files import open_regular, read_bounded
from steelyard.base.progress import Progress, Silent
from steelyard.model.headers import TensorInfo, quote, read_json_object, refuse_unsafe_files, scan_safetensors

INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
# The closed list of what a model folder may hold: fnmatch patterns, `[0-9]` for each digit of a shard.
_SHARD_PATTERN = f"model-{'[0-9]' * 5}-of-{'[0-9]' * 5}.safetensors"
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    *TOKENIZER_FILES,
    "chat_template.jinja",
    "system_prompt.txt",
    "model.safetensors",
    _SHARD_PATTERN,
    INDEX,
    "README.md",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "USE_POLICY.md",
)
_DTYPE_NAMES = {
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "I8": "int8",
    "U8": "uint8",
    "F8_E4M3": "float8_e4m3",
    "F8_E5M2": "float8_e5m2",
}
_CHUNK = 4 << 20
_MAX_TEXT = 4 << 20
_MAX_TOKENIZER = 256 << 20  # bytes of one file; the largest known are a tenth of it

Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class Subject(BaseModel):
    """What was tested: the SHA-256 (hex) of each part of a model as shipped, and the type of its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: Sha256
    config: Sha256
    tokenizer: Sha256
    chat_template: Sha256
    system_prompt: Sha256
    generation_config: Sha256
    dtype: str

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON of all parts: the subject's name."""
        return digest(self.model_dump())

    def differences(self, other: Subject) -> list[str]:
        """Names of the parts in which `other` differs, in the order of the fields; empty if it is the same subject."""
        return [name for name in type(self).model_fields if getattr(self, name) != getattr(other, name)]


def is_model_file(name: str) -> bool:
    """Whether `name` (no folder) is one that a model folder may hold."""
    return name in MODEL_FILES or re.fullmatch(_SHARD_PATTERN, name) is not None


def weight_files(folder: Path) -> dict[str, dict[str, TensorInfo]]:
    """The scanned weight files of a model folder: file name -> tensors.

    Raises FormatError where a file is unsafe or lies, a tensor is in two shards, or the index and the shards disagree.
    """
    refuse_unsafe_files(folder)
    if not (folder / INDEX).is_file():
        if not (folder / "model.safetensors").is_file():
            raise FormatError(f"{folder}: has neither model.safetensors nor {INDEX}: give a safetensors model folder")
        return {"model.safetensors": _scan(folder / "model.safetensors")}
    weight_map = read_json_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{folder / INDEX}: weight_map: must name the file of each tensor: download it again")
    for file in weight_map.values():
        if not isinstance(file, str) or not re.fullmatch(_SHARD_PATTERN, file):
            raise FormatError(f"{folder / INDEX}: weight_map: {quote(file)} is not a shard's name: download it again")
    files = sorted(set(weight_map.values()))
    present = sorted(path.name for path in folder.glob("*.safetensors"))
    for name in files:
        if name not in present:
            raise FormatError(f"{folder / INDEX}: names {name}, which is missing: download it again")
    for name in present:
        if name not in files:
            raise FormatError(f"{folder}: {name}: a shard that the index does not name: remove it")
    shards = {name: _scan(folder / name) for name in files}
    seen: dict[str, str] = {}
    for name, tensors in shards.items():
        for tensor in tensors:
            if tensor in seen:
                raise FormatError(f"{folder}: tensor {quote(tensor)} is in {seen[tensor]} and in {name}: keep one")
            if weight_map.get(tensor) != name:
                raise FormatError(f"{folder}: tensor {quote(tensor)} is in {name}, where the index has it elsewhere")
            seen[tensor] = name
    for tensor in weight_map:
        if tensor not in seen:
            raise FormatError(f"{folder / INDEX}: tensor {quote(tensor)} is in no shard: download it again")
    return shards


def _scan(path: Path) -> dict[str, TensorInfo]:
    tensors = scan_safetensors(path)
    if not tensors:
        raise FormatError(f"{path}: holds no tensor: download it again")
    return tensors


def subject_of(folder: Path, progress: Progress | None = None) -> Subject:
    """The subject in a model folder. Streams the weights: memory does not grow with the model.

    Raises FormatError where a file is missing, unsafe or lies (see `weight_files`), or where a head stored beside
    `tie_word_embeddings` is not the embedding.
    """
    refuse_unsafe_files(folder)
    return _subject(folder, _hash_tensors, progress or Silent())[0]


def subject_and_files(folder: Path, progress: Progress | None = None) -> tuple[Subject, dict[str, str]]:
    """The subject, and the SHA-256 (hex) of every weight file by name, for whoever needs both: each byte of the weights
    is read once, so that what one digest saw the other saw too. Raises as `subject_of` does.
    """
    refuse_unsafe_files(folder)
    subject, hashed = _subject(folder, _hash_files, progress or Silent())
    return subject, hashed.files


@dataclass(frozen=True)
class _Hashed:
    """Tensors by name, the SHA-256 of their bytes, and that of the files they lie in, where it was asked for."""

    listed: dict[str, TensorInfo]
    tensors: dict[str, str]
    files: dict[str, str]


_Hasher = Callable[[Path, Progress], _Hashed]


def _subject(folder: Path, hash_weights: _Hasher, progress: Progress) -> tuple[Subject, _Hashed]:
    config = read_json_object(folder / "config.json")
    hashed = hash_weights(folder, progress)
    weights, dtype = _weights(folder, hashed, tied=config.get("tie_word_embeddings") is True)
    prompt = folder / "system_prompt.txt"
    generation = folder / "generation_config.json"
    subject = Subject(
        weights=weights,
        config=_digest(folder / "config.json", config),
        tokenizer=_tokenizer_digest(folder),
        chat_template=sha256_hex(chat_template_text(folder).encode()),
        system_prompt=sha256_hex(_text(prompt).encode() if prompt.is_file() else b""),
        generation_config=_digest(generation, read_json_object(generation) if generation.is_file() else {}),
        dtype=dtype,
    )
    return subject, hashed


def _weights(folder: Path, hashed: _Hashed, *, tied: bool) -> tuple[str, str]:
    """Digest over [name, dtype, shape, sha256 of the little-endian bytes] sorted by name, and the dtype's name."""
    listed, hashes = dict(hashed.listed), hashed.tensors
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if tied and head in listed:
        if hashes[head] != hashes.get(embedding):
            raise FormatError(f"{folder}: {head} is not {embedding}, though config.json ties them: correct one of them")
        del listed[head]
    entries = [[name, listed[name].dtype, list(listed[name].shape), hashes[name]] for name in sorted(listed)]
    names = sorted({_DTYPE_NAMES.get(tensor.dtype, tensor.dtype.lower()) for tensor in listed.values()})
    return digest(entries), "+".join(names)


def _hash_tensors(folder: Path, progress: Progress) -> _Hashed:
    """The tensors alone: one thread takes one tensor, so that a single file keeps every core busy."""
    jobs = [(folder / name, tensor) for name, tensors in weight_files(folder).items() for tensor in tensors.values()]
    total = sum(tensor.end - tensor.start for _, tensor in jobs) / 1e6
    hashes: dict[str, str] = {}
    # hashlib lets go of the interpreter lock while it works, so threads use every core.
    shown = progress if total >= 1 else Silent()
    with shown.task("hash the weights", total, "MB") as task, ThreadPoolExecutor(os.cpu_count()) as pool:
        for (_, tensor), value in zip(jobs, pool.map(_hash_range, jobs), strict=True):
            hashes[tensor.name] = value
            task.advance((tensor.end - tensor.start) / 1e6)
    return _Hashed({tensor.name: tensor for _, tensor in jobs}, hashes, {})


def _hash_range(job: tuple[Path, TensorInfo]) -> str:
    path, tensor = job
    state = hashlib.sha256()
    left = tensor.end - tensor.start
    with open_regular(path) as file:
        file.seek(tensor.start)
        buffer = memoryview(bytearray(min(left, _CHUNK)))
        while left:
            count = file.readinto(buffer[: min(left, _CHUNK)])
            if not count:
                raise FormatError(f"{path}: became shorter while it was read: leave it alone and try again")
            state.update(buffer[:count])
            left -= count
    return state.hexdigest()


def _hash_files(folder: Path, progress: Progress) -> _Hashed:
    """Tensors and files, side by side, from one reading of each file."""
    shards = weight_files(folder)
    total = sum(max(tensor.end for tensor in tensors.values()) for tensors in shards.values()) / 1e6
    hashes: dict[str, str] = {}
    shown = progress if total >= 1 else Silent()
    cores, lock = os.cpu_count() or 1, threading.Lock()
    # A file keeps two threads busy. Those that read wait for those that hash, never the other way round.
    with (
        shown.task("hash the weights", total, "MB") as task,
        ThreadPoolExecutor(cores) as hashing,
        ThreadPoolExecutor(max(1, cores // 2)) as reading,
    ):

        def advance(count: int) -> None:
            with lock:
                task.advance(count / 1e6)

        def one(name: str) -> str:
            whole, found = _hash_file(folder / name, shards[name], hashing, advance)
            hashes.update(found)
            return whole

        files = dict(zip(shards, reading.map(one, shards), strict=True))
    return _Hashed({name: info for tensors in shards.values() for name, info in tensors.items()}, hashes, files)


def _hash_file(
    path: Path, tensors: Mapping[str, TensorInfo], pool: ThreadPoolExecutor, advance: Callable[[int], None]
) -> tuple[str, dict[str, str]]:
    """The SHA-256 of a file and of each of its tensors, which lie in it in this order and to its end."""
    whole, parts = hashlib.sha256(), _Parts(tensors)
    buffers = [memoryview(bytearray(min(_CHUNK, parts.end))) for _ in range(2)]
    with open_regular(path) as file:
        at, count = 0, file.readinto(buffers[0])
        while count:
            chunk = buffers[0][:count]
            jobs = (pool.submit(whole.update, chunk), pool.submit(parts.update, chunk, at))
            at += count
            buffers.reverse()
            try:
                count = file.readinto(buffers[0])  # the next chunk, while this one is hashed
            finally:
                for job in jobs:
                    job.result()
            advance(len(chunk))
            if at > parts.end:
                break
    if at != parts.end:
        raise FormatError(f"{path}: changed its length while it was read: leave it alone and try again")
    return whole.hexdigest(), parts.digests()


class _Parts:
    """The SHA-256 of each tensor of a file that is given chunk by chunk."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self._states = [(tensor, hashlib.sha256()) for tensor in tensors.values()]
        self._next = 0
        self.end = max(tensor.end for tensor in tensors.values())

    def update(self, chunk: memoryview, at: int) -> None:
        """`chunk` stands at the offset `at`."""
        while self._next < len(self._states):
            tensor, state = self._states[self._next]
            state.update(chunk[max(tensor.start - at, 0) : max(tensor.end - at, 0)])
            if tensor.end > at + len(chunk):
                return
            self._next += 1

    def digests(self) -> dict[str, str]:
        return {tensor.name: state.hexdigest() for tensor, state in self._states}


def _digest(path: Path, value: Mapping[str, Any]) -> str:
    try:
        return digest(value)
    except ValueError as error:
        raise FormatError(f"{path}: has no canonical form ({type(error).__name__}): write it again") from None


def _tokenizer_digest(folder: Path) -> str:
    parts: list[list[str]] = []
    for name in TOKENIZER_FILES:
        path = folder / name
        if not path.is_file():
            continue
        if name == "tokenizer_config.json":
            settings = {key: value for key, value in read_json_object(path).items() if key != "chat_template"}
            parts.append([name, _digest(path, settings)])
        else:
            with open_regular(path) as file:
                if os.fstat(file.fileno()).st_size > _MAX_TOKENIZER:
                    raise FormatError(f"{path}: is over {_MAX_TOKENIZER:,} bytes: no tokenizer needs that")
                parts.append([name, hashlib.file_digest(file, "sha256").hexdigest()])
    return digest(parts)


def _text(path: Path) -> str:
    try:
        return read_bounded(path, _MAX_TEXT).decode()
    except UnicodeDecodeError:
        raise FormatError(f"{path}: is not UTF-8: write it again") from None


def chat_template_text(folder: Path) -> str:
    """The model's chat template: `chat_template.jinja`, else the one in tokenizer_config.json, else an empty text.

    Where tokenizer_config.json has a list of named templates, the text is that list as JSON.
    """
    if (folder / "chat_template.jinja").is_file():
        return _text(folder / "chat_template.jinja")
    if not (folder / "tokenizer_config.json").is_file():
        return ""
    template = read_json_object(folder / "tokenizer_config.json").get("chat_template")
    if template is None:
        return ""
    return template if isinstance(template, str) else json.dumps(template, sort_keys=True, ensure_ascii=False)
