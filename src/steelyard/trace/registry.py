"""What suspects are compared with: releases and public bases, each an artifact of digests, sampled rows and
signatures.

The artifact (one safetensors file, content-addressed) is enough to compare with: the weights themselves may be gone.
For a 7B model it takes about 110 MB. An event `trace.registered` in the ledger names it, so that a registration has
a date that nobody can change afterwards.

    >>> register(Path("releases/smollm2"), "smollm2", kind="release", ledger=ledger)
    >>> registry = Registry.load(ledger)
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from steelyard.base.canonical import canonical_json
from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.base.progress import Progress, Silent
from steelyard.ledger.ledger import Event, Ledger
from steelyard.model.identity import subject_and_files
from steelyard.trace.digests import Table, TensorDigests, tensor_digests
from steelyard.trace.roles import EMBEDDING, GATE, UP, Named, Sizes, hugging_face, layer_name
from steelyard.trace.signature import (
    Rows,
    chosen_neurons,
    chosen_tokens,
    embedding_rows,
    finite,
    sampled_rows,
    signatures,
)
from steelyard.trace.tensors import Float32, IntArray, decode, open_tensors

Float16 = np.ndarray[Any, np.dtype[np.float16]]

FORMAT = 2  # 2: signatures over embedding rows of length one
KINDS = ("release", "base")
Kind = Literal["release", "base"]
EVENT = "trace.registered"


@dataclass(frozen=True)
class WeightFile:
    """A weight file of a registered model, by which an unchanged copy is recognised."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Reference:
    """A registered model. `folder` is where its weights were at registration; they may be gone."""

    name: str
    kind: Kind
    subject: str
    weights: str
    folder: Path
    files: Sequence[WeightFile]
    sizes: Sizes
    tensors: Sequence[TensorDigests]
    artifact: Path

    @cached_property
    def table(self) -> Table:
        """Its tensors by digest."""
        return Table(self.tensors)

    @cached_property
    def tokens(self) -> IntArray:
        """Ids of the tokens of the signature."""
        found: IntArray = self._array("tokens")
        return found

    @cached_property
    def neurons(self) -> IntArray:
        """The neurons whose signatures are kept."""
        found: IntArray = self._array("neurons")
        return found

    @cached_property
    def embedding(self) -> Float32:
        """Embedding rows of the tokens: [tokens, hidden]."""
        found: Float32 = self._array("embedding").astype(np.float32)
        return found

    @cached_property
    def gate(self) -> Float16:
        """Signatures by gate rows: [layers, neurons, tokens]."""
        found: Float16 = self._array("gate")
        return found

    @cached_property
    def up(self) -> Float16:
        """Signatures by up rows: [layers, neurons, tokens]."""
        found: Float16 = self._array("up")
        return found

    @cached_property
    def rows(self) -> Mapping[str, Rows]:
        """Sampled rows by Hugging Face name."""
        found = {}
        with safe_open(self.artifact, framework="np") as file:
            kept = set(file.keys())
            for tensor in self.tensors:
                if f"index.{tensor.name}" in kept:
                    index, raw = file.get_tensor(f"index.{tensor.name}"), file.get_tensor(f"rows.{tensor.name}")
                    values = decode(raw.reshape(-1), tensor.dtype).reshape(len(index), *tensor.shape[1:])
                    found[tensor.name] = Rows(index.astype(np.int64), values)
        return found

    def _array(self, name: str) -> Any:
        with safe_open(self.artifact, framework="np") as file:
            return file.get_tensor(name)


@dataclass(frozen=True)
class Registry:
    """The registered models, in the order of registration."""

    references: Sequence[Reference]

    @classmethod
    def load(cls, ledger: Ledger) -> Registry:
        """The models that the ledger's events name. Raises SteelyardError where an artifact is missing or
        corrupted.
        """
        return cls([_load(ledger, event) for event in ledger.events(EVENT)])


def register(folder: Path, name: str, *, kind: str, ledger: Ledger, progress: Progress | None = None) -> Event:
    """Compare suspects with this model from now on; gives the event, the earlier one where it is registered already.

    Raises UsageError for an unknown kind or a name that another model has, FormatError where the folder is no model.
    """
    if kind not in KINDS:
        raise UsageError(f"--kind {kind!r}: write release or base")
    if not name or len(name) > 200 or not name.isprintable():
        raise UsageError(f"--name {name!r}: write a printable name of at most 200 characters")
    progress = progress or Silent()
    subject, files = subject_and_files(folder, progress)
    for event in ledger.events(EVENT, name=name):
        if event.payload["weights"] == subject.weights:
            return event
        raise UsageError(f"--name {name!r}: another model is registered under it: choose another name")
    with tempfile.TemporaryDirectory(prefix="steelyard-trace-") as scratch:
        path = Path(scratch) / "reference.safetensors"
        listed = [WeightFile(file, (folder / file).stat().st_size, digest) for file, digest in sorted(files.items())]
        write_reference(path, folder, listed, progress=progress)
        artifact = ledger.put_file(path)
    return ledger.append(
        EVENT,
        {
            "name": name,
            "kind": kind,
            "subject": subject.digest,
            "weights": subject.weights,
            "artifact": artifact,
            "folder": str(folder.resolve()),
        },
    )


def write_reference(
    path: Path, folder: Path, files: Sequence[WeightFile], *, progress: Progress, digests: bool = True
) -> None:
    """Write the artifact of the model in `folder`; without `digests`, copies of it are found by rows alone.

    Raises FormatError where it is no whole model of the LLaMA family.
    """
    model = hugging_face(open_tensors(folder))
    sizes = model.sizes
    for needed in (EMBEDDING, *(layer_name(layer, part) for layer in range(sizes.layers) for part in (GATE, UP))):
        if needed not in model.stored:
            raise FormatError(f"{folder}: lacks {needed}: register a whole model of the LLaMA family")
    if any(name != stored for name, stored in model.stored.items()):
        raise FormatError(f"{folder}: its tensors have other names than Hugging Face's: import it first")
    table = list(tensor_digests(model.tensors, progress)) if digests else _undigested(model)
    tokens, neurons = chosen_tokens(sizes.vocab), chosen_neurons(sizes.intermediate)
    embedding = embedding_rows(model, tokens)
    arrays: dict[str, Any] = {"tokens": tokens, "neurons": neurons, "embedding": embedding}
    by_layer = [signatures(model, layer, neurons, embedding) for layer in range(sizes.layers)]
    arrays["gate"] = np.stack([gate for gate, _ in by_layer]).astype(np.float16)
    arrays["up"] = np.stack([up for _, up in by_layer]).astype(np.float16)
    for name, stored in model.stored.items():
        index = sampled_rows(model.tensors.entries[stored])
        finite(model.tensors.read(stored, index), stored)
        arrays[f"index.{name}"] = index.astype(np.int32)
        arrays[f"rows.{name}"] = model.tensors.raw(stored, index)
    facts = {
        "format": FORMAT,
        "files": [asdict(one) for one in files],
        "sizes": asdict(sizes),
        "tensors": [asdict(one) for one in table],
    }
    save_file({key: np.ascontiguousarray(value) for key, value in arrays.items()}, path, _metadata(facts))


def _metadata(facts: Mapping[str, Any]) -> dict[str, str]:
    return {"steelyard": canonical_json(dict(facts)).decode()}


def _undigested(model: Named) -> list[TensorDigests]:
    return [TensorDigests(name, entry.dtype, entry.shape, {}) for name, entry in model.entries.items()]


def _load(ledger: Ledger, event: Event) -> Reference:
    payload = event.payload
    artifact = ledger.get_file(payload["artifact"])
    where = Path(payload["folder"])
    return read_reference(artifact, payload["name"], payload["kind"], payload["subject"], payload["weights"], where)


def read_reference(artifact: Path, name: str, kind: Kind, subject: str, weights: str, folder: Path) -> Reference:
    """The reference in an artifact. Raises SteelyardError where another version wrote it."""
    with safe_open(artifact, framework="np") as file:
        facts = json.loads((file.metadata() or {}).get("steelyard", "{}"))
    if facts.get("format") != FORMAT:
        raise SteelyardError(f"{artifact}: a registration of another format: register {name} anew")
    tensors = [TensorDigests(**(one | {"shape": tuple(one["shape"])})) for one in facts["tensors"]]
    files = [WeightFile(**one) for one in facts["files"]]
    return Reference(name, kind, subject, weights, folder, files, Sizes(**facts["sizes"]), tensors, artifact)
