"""Stages that make what a model learns from: text, tokenizer, shards."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from steelyard.base.canonical import digest, sha256_file
from steelyard.base.files import new_folder
from steelyard.recipe.schema import Context, FieldError, Input, Outcome, StageConfig, StageKind

if TYPE_CHECKING:
    from steelyard.corpus.text import Document

TRAIN, VALIDATION = "train.jsonl", "validation.jsonl"
ROOMS = ("base", "model", "corpus", "train")


class Settings(BaseModel):
    """Keys inside a stage: no other, none converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


# -- text ------------------------------------------------------------------------------------------------------------


class PythonText(Settings):
    """The documentation inside Python and `packages`; `limit`: the most characters of each of them."""

    packages: tuple[str, ...] = Field(default=("numpy",), strict=False)
    limit: int | None = Field(default=None, ge=1)


class FolderText(Settings):
    """Text files below `path` (relative to the current folder). `only`: patterns; `boundary`: a regular expression that
    matches where a document begins; `optional`: left out, aloud, where the folder is absent.
    """

    path: str = Field(min_length=1)
    only: tuple[str, ...] = Field(default=(), strict=False)
    boundary: str = ""
    limit: int | None = Field(default=None, ge=1)
    optional: bool = False


class TextConfig(StageConfig):
    """`validation_share`: of documents, held out; `longest`: characters at which a document is cut."""

    kind: Literal["text"]
    python: PythonText | None = None
    folders: dict[str, FolderText] = Field(default_factory=dict)
    validation_share: float = Field(gt=0, lt=1)
    longest: int | None = Field(default=None, ge=1000)

    @model_validator(mode="after")
    def _some(self) -> TextConfig:
        if self.python is None and not self.folders:
            raise ValueError("names no source: give python, or folders")
        return self


class TextStage(StageKind[TextConfig]):
    """Documents to learn from and documents held out, each once."""

    name, config, produces = "text", TextConfig, "text"
    rooms = ("base", "corpus")

    def externals(self, config: TextConfig, workspace: Path) -> dict[str, str]:
        found = {}
        if config.python is not None:
            found["python"] = sys.version
            for package in config.python.packages:
                try:
                    found[f"package {package}"] = metadata.version(package)
                except metadata.PackageNotFoundError:
                    raise FieldError("python", f"package {package} is not installed") from None
        for name, source in config.folders.items():
            folder = Path(source.path).expanduser()
            if folder.is_dir():
                files = sorted(path for path in folder.rglob("*") if path.is_file())
                listed = [[path.relative_to(folder).as_posix(), sha256_file(path)] for path in files]
                found[f"folder {name}"] = digest(listed)
            elif source.optional:
                found[f"folder {name}"] = "absent"
            else:
                raise FieldError("folders", f"{name}: there is no folder {folder} (optional: true would leave it out)")
        return found

    def run(self, context: Context[TextConfig], inputs: Mapping[str, Input]) -> Outcome:
        from steelyard.corpus.text import Document, folder_documents, part_sizes, python_documents, split_documents

        config, limits = context.config, {}

        def documents() -> Iterator[Document]:
            for name, source in config.folders.items():
                folder = Path(source.path).expanduser()
                if not folder.is_dir():
                    context.progress.say(f"{context.stage}: no folder {folder}: goes on without {name}")
                    continue
                for found in folder_documents(
                    folder, only=source.only, boundary=source.boundary, progress=context.progress
                ):
                    yield Document(name, found.name, found.text)
            if config.python is not None:
                yield from python_documents(config.python.packages, progress=context.progress)

        for name, source in config.folders.items():
            if source.limit is not None:
                limits[name] = source.limit
        if config.python is not None and config.python.limit is not None:
            limits |= dict.fromkeys(("python", *config.python.packages), config.python.limit)
        split = split_documents(
            documents(), validation_share=config.validation_share, limits=limits, longest=config.longest
        )
        with new_folder(context.place) as folder:
            for file, part in ((TRAIN, split.train), (VALIDATION, split.validation)):
                lines = (json.dumps(vars(document), ensure_ascii=False) for document in part)
                (folder / file).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        summary = {
            "train": part_sizes(split.train),
            "validation": part_sizes(split.validation),
            "left_out": {
                "paragraphs_seen_before": split.paragraphs,
                "documents_seen_before": split.duplicates,
                "short": split.short,
                "over_limit": split.over,
            },
            "learned_from": [TRAIN],
        }
        return Outcome(context.place, summary)


def read_documents(folder: Path, part: str) -> Iterator[Document]:
    """The documents of a text stage's folder: of `TRAIN` or `VALIDATION`."""
    from steelyard.corpus.text import Document

    with (folder / part).open(encoding="utf-8") as file:
        for line in file:
            yield Document(**json.loads(line))


# -- tokenizer, shards -----------------------------------------------------------------------------------------------


class TokenizerConfig(StageConfig):
    """`max_length`: tokens of context of the model that the tokenizer is for."""

    kind: Literal["tokenizer"]
    text: str
    vocab_size: int = Field(ge=300, le=1_000_000)
    max_length: int = Field(ge=16)


class TokenizerStage(StageKind[TokenizerConfig]):
    """Byte-level BPE from the training documents."""

    name, config, produces = "tokenizer", TokenizerConfig, "tokenizer"
    references = {"text": "text"}  # noqa: RUF012
    rooms = ROOMS

    def run(self, context: Context[TokenizerConfig], inputs: Mapping[str, Input]) -> Outcome:
        from steelyard.train.tokenizer import train_tokenizer

        texts = (document.text for document in read_documents(inputs["text"].made, TRAIN))
        size = train_tokenizer(
            texts,
            context.place,
            vocab_size=context.config.vocab_size,
            max_length=context.config.max_length,
            progress=context.progress,
        )
        return Outcome(context.place, {"vocab_size": size})


class ShardsConfig(StageConfig):
    kind: Literal["shards"]
    text: str
    tokenizer: str


class ShardsStage(StageKind[ShardsConfig]):
    """Documents as tokens: train/ and validation/."""

    name, config, produces = "shards", ShardsConfig, "shards"
    references = {"text": "text", "tokenizer": "tokenizer"}  # noqa: RUF012
    rooms = ROOMS
    resumable = True

    def run(self, context: Context[ShardsConfig], inputs: Mapping[str, Input]) -> Outcome:
        from steelyard.corpus.shards import MANIFEST, Shards, write_shards
        from steelyard.model.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(inputs["tokenizer"].made)
        summary = {}
        for name, file in (("train", TRAIN), ("validation", VALIDATION)):
            folder = context.place / name
            if (folder / MANIFEST).exists():  # whole, of a run that was interrupted later
                manifest = Shards.open(folder).manifest
            else:
                texts = (document.text for document in read_documents(inputs["text"].made, file))
                manifest = write_shards(texts, tokenizer, folder, progress=context.progress)
            summary[name] = manifest.model_dump(include={"documents", "tokens", "bytes"})
        return Outcome(context.place, summary)


TEXT_KINDS: tuple[StageKind[Any], ...] = (TextStage(), TokenizerStage(), ShardsStage())
