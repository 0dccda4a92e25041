"""Stages that train a model, and tell what came of it: pretraining, conversations, tuning, GGUF, comparison.

Training goes on where it was interrupted: what is unfinished lies in the workspace under training/, by the stage's key.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from steelyard.base.canonical import digest, sha256_file
from steelyard.base.errors import SteelyardError
from steelyard.base.files import new_folder, write_atomic
from steelyard.recipe.schema import Context, FieldError, Input, Outcome, StageConfig, StageKind
from steelyard.recipe.text_stages import ROOMS, TRAIN, VALIDATION, Settings, read_documents

if TYPE_CHECKING:
    from steelyard.train.conversations import Conversation
    from steelyard.train.options import TrainOptions

# -- training --------------------------------------------------------------------------------------------------------


class Training(Settings):
    """How to train: names and defaults as in `train.options.TrainOptions`."""

    steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    learning_rate: float = Field(gt=0, le=1)
    min_lr: float | None = Field(default=None, ge=0)
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup: int = Field(default=0, ge=0)
    decay: float = Field(default=0.2, gt=0, le=1)
    beta2: float = Field(default=0.95, gt=0, lt=1)
    eps: float = Field(default=1e-5, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip: float = Field(default=1.0, ge=0)
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    checkpoint_every: int = Field(default=500, ge=0)
    evaluate_every: int = Field(default=0, ge=0)
    keep_best: bool = False
    compile: Literal["auto", "on", "off"] = "auto"
    seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _one(self) -> Training:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        return self

    def options(self) -> TrainOptions:
        from steelyard.train.options import TrainOptions

        given = self.model_dump(exclude={"beta2"})
        return TrainOptions(**given, betas=(0.9, self.beta2))


class Shape(Settings):
    """The sizes of a LLaMA, named as in its config.json."""

    hidden_size: int = Field(ge=8)
    intermediate_size: int = Field(ge=8)
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int | None = Field(default=None, ge=1)
    max_position_embeddings: int = Field(ge=16)
    tie_word_embeddings: bool = False
    rope_theta: float = Field(default=10_000.0, gt=0)
    initializer_range: float = Field(default=0.02, gt=0)


class PretrainConfig(StageConfig):
    """`packing`: `concatenated` (rows across document ends, as LLaMA) or `best_fit` (documents whole). `length`: tokens
    of a row, or at which documents are cut; `rows`: such lengths in a micro-batch.
    """

    kind: Literal["pretrain"]
    shards: str
    tokenizer: str
    model: Shape
    packing: Literal["concatenated", "best_fit"] = "concatenated"
    length: int = Field(ge=2)
    rows: int = Field(ge=1)
    micro_batches: int = Field(default=1, ge=1)
    training: Training

    @model_validator(mode="after")
    def _fits(self) -> PretrainConfig:
        if self.length > self.model.max_position_embeddings:
            raise ValueError(
                f"length {self.length} is over the model's max_position_embeddings {self.model.max_position_embeddings}"
            )
        return self


class PretrainStage(StageKind[PretrainConfig]):
    """A LLaMA from nothing, as a Hugging Face folder."""

    name, config, produces, room = "pretrain", PretrainConfig, "model", "models"
    references = {"shards": "shards", "tokenizer": "tokenizer"}  # noqa: RUF012
    rooms = ROOMS

    def run(self, context: Context[PretrainConfig], inputs: Mapping[str, Input]) -> Outcome:
        from steelyard.corpus.shards import Shards
        from steelyard.train.pretrain import Packing, new_model, pretrain, save_pretrained

        config = context.config
        folder, tokenizer = inputs["shards"].made, inputs["tokenizer"].made
        parts = [Shards.open(folder / name, progress=context.progress) for name in ("train", "validation")]
        model = new_model(config.model.model_dump(exclude_none=True), tokenizer, config.training.seed)
        work = _work(context)
        packing = Packing(config.packing, config.length, config.rows, config.micro_batches)
        result = pretrain(
            model, tokenizer, parts[0], parts[1], packing, config.training.options(), work, progress=context.progress
        )
        save_pretrained(model, tokenizer, context.place)
        record = _keep_record(work)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        summary = _result(result) | {"parameters": parameters, "model": str(context.place), "record": str(record)}
        return Outcome(context.place, summary, extra=(record,))


class ConversationsConfig(StageConfig):
    """`most`: how many conversations to make for training."""

    kind: Literal["conversations"]
    text: str
    most: int | None = Field(default=None, ge=1)


class ConversationsStage(StageKind[ConversationsConfig]):
    """Conversations made out of the text by rule, where no others are at hand."""

    name, config, produces = "conversations", ConversationsConfig, "conversations"
    references = {"text": "text"}  # noqa: RUF012
    rooms = ROOMS

    def run(self, context: Context[ConversationsConfig], inputs: Mapping[str, Input]) -> Outcome:
        from steelyard.train.made_conversations import made_conversations

        counts = {}
        with new_folder(context.place) as folder:
            for file in (TRAIN, VALIDATION):
                documents = read_documents(inputs["text"].made, file)
                rows = [
                    json.dumps({"messages": [vars(message) for message in made.messages]}, ensure_ascii=False)
                    for made in made_conversations(documents, most=context.config.most)
                ]
                counts[file.removesuffix(".jsonl")] = len(rows)
                (folder / file).write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
        return Outcome(context.place, {"conversations": counts, "learned_from": [TRAIN]})


class SftConfig(StageConfig):
    """Exactly one of `conversations` (a stage) and `data` (a .jsonl or .parquet file, a folder of them, or
    hf://datasets/ORG/NAME@REVISION/PATH). `max_bad`: the share of rows that may be bad.
    """

    kind: Literal["sft"]
    model: str
    conversations: str | None = None
    data: str | None = None
    max_bad: float = Field(default=0.0, ge=0, lt=1)
    tokens_per_micro_batch: int = Field(default=2048, ge=16)
    micro_batches: int = Field(default=1, ge=1)
    training: Training

    @model_validator(mode="after")
    def _one(self) -> SftConfig:
        if (self.conversations is None) == (self.data is None):
            raise ValueError("give exactly one of conversations and data")
        return self


class SftStage(StageKind[SftConfig]):
    """A model tuned on conversations: its answers' tokens only."""

    name, config, produces, room = "sft", SftConfig, "model", "models"
    references = {"model": "model", "conversations": "conversations"}  # noqa: RUF012
    rooms = (*ROOMS, "inference", "hub")

    def externals(self, config: SftConfig, workspace: Path) -> dict[str, str]:
        if config.data is None or "://" in config.data:
            return {}
        path = Path(config.data).expanduser()
        if not path.exists():
            raise FieldError("data", f"there is no file or folder {path}")
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        return {"data": digest([[file.name, sha256_file(file)] for file in files])}

    def run(self, context: Context[SftConfig], inputs: Mapping[str, Input]) -> Outcome:
        from steelyard.train.sft import Packing, fine_tune

        config, work = context.config, _work(context)
        learned, held_out = self._read(context, inputs)
        result = fine_tune(
            inputs["model"].made,
            learned,
            context.place,
            work=work,
            options=config.training.options(),
            packing=Packing(config.tokens_per_micro_batch, config.micro_batches),
            validation=held_out,
            progress=context.progress,
        )
        record = _keep_record(work)
        summary = _result(result) | {"conversations": len(learned), "model": str(context.place), "record": str(record)}
        if config.data is not None:
            summary["learned_from"] = [str(self._data(context).absolute())]
        return Outcome(context.place, summary, extra=(record,))

    @staticmethod
    def _data(context: Context[SftConfig]) -> Path:
        """The conversations' file or folder, downloaded where it has to be."""
        from steelyard.hub.sources import fetch_data

        data = context.config.data or ""
        if "://" in data:
            return fetch_data(data, context.workspace / "cache", context.progress)
        return Path(data).expanduser()

    @staticmethod
    def _read(
        context: Context[SftConfig], inputs: Mapping[str, Input]
    ) -> tuple[list[Conversation], list[Conversation]]:
        from steelyard.train.conversations import read_conversations

        if context.config.data is not None:
            path, most = SftStage._data(context), context.config.max_bad
            return read_conversations(path, max_bad=most, progress=context.progress), []
        folder = inputs["conversations"].made
        held_out = read_conversations(folder / VALIDATION, progress=context.progress)
        return read_conversations(folder / TRAIN, progress=context.progress), held_out


def _work(context: Context[Any]) -> Path:
    """Where an interrupted training goes on: named by the stage's key, so that other settings begin anew."""
    return context.workspace / "training" / context.place.name


def _keep_record(work: Path) -> Path:
    """The record of a finished training: its curves; the checkpoints have served."""
    shutil.rmtree(work / "checkpoints", ignore_errors=True)
    shutil.rmtree(work / "tensorboard", ignore_errors=True)
    return work / "metrics.jsonl"


def _result(result: Any) -> dict[str, Any]:
    return {
        "steps": result.steps,
        "tokens": result.tokens,
        "loss": result.loss,
        "validation_loss": result.validation_loss,
        "seconds": round(result.seconds, 1),
        "tokens_per_second": round(result.tokens_per_second),
        "mfu": round(result.mfu, 3),
    }


# -- export, comparison ----------------------------------------------------------------------------------------------


class ExportConfig(StageConfig):
    """`type`: what the matrices are stored as."""

    kind: Literal["export"]
    model: str
    type: Literal["F16", "BF16", "Q8_0"] = "F16"


class ExportStage(StageKind[ExportConfig]):
    """A model as one GGUF file, for llama.cpp."""

    name, config, produces = "export", ExportConfig, "gguf"
    references = {"model": "model"}  # noqa: RUF012
    rooms = ("base", "model")

    def run(self, context: Context[ExportConfig], inputs: Mapping[str, Input]) -> Outcome:
        from steelyard.model.gguf_export import export_gguf

        path = context.place.with_suffix(".gguf")
        path.unlink(missing_ok=True)
        made = export_gguf(inputs["model"].made, path, context.config.type, progress=context.progress)
        return Outcome(path, {"gguf": str(path), "type": made.kind, "bytes": made.bytes})


class CompareConfig(StageConfig):
    """`window`: tokens of context at most when held-out text is measured; `must_win`: fail where the model
    needs more bits than gzip, xz or the n-gram model. `chat`: a tuned model to show answers of.
    """

    kind: Literal["compare"]
    model: str
    shards: str
    text: str
    chat: str | None = None
    window: int = Field(ge=2)
    order: int = Field(default=5, ge=1, le=8)
    must_win: bool = False


class CompareStage(StageKind[CompareConfig]):
    """Bits per byte of held-out text, beside gzip, xz and a Kneser-Ney n-gram model: report.json and report.html."""

    name, config, produces = "compare", CompareConfig, "report"
    references = {"model": "model", "shards": "shards", "text": "text", "chat": "model"}  # noqa: RUF012
    rooms = (*ROOMS, "inference")

    def run(self, context: Context[CompareConfig], inputs: Mapping[str, Input]) -> Outcome:
        from steelyard.corpus.shards import Shards
        from steelyard.corpus.text import joined
        from steelyard.model.llama import load_llama
        from steelyard.train.compare import as_json, compare
        from steelyard.train.metrics import read_metrics
        from steelyard.train.scratch_report import Report, samples, write_html

        config = context.config
        parts = [Shards.open(inputs["shards"].made / name) for name in ("train", "validation")]
        held_out = list(read_documents(inputs["text"].made, VALIDATION))
        texts = (joined(read_documents(inputs["text"].made, TRAIN)), joined(held_out))
        measures = compare(
            load_llama(inputs["model"].made),
            parts[0],
            parts[1],
            texts,
            window=config.window,
            order=config.order,
            progress=context.progress,
        )
        # The record of the training, unless the model came another way.
        record = inputs["model"].summary.get("record")
        curve = read_metrics(Path(record).parent) if record is not None else []
        chat = inputs.get("chat")
        shown = samples(inputs["model"].made, None if chat is None else chat.made, held_out, progress=context.progress)
        report = Report(context.recipe, as_json(measures), inputs["text"].summary, inputs["shards"].summary,
                        inputs["model"].summary, None if chat is None else chat.summary, curve, shown)  # fmt: skip
        context.place.mkdir(parents=True)
        write_atomic(context.place / "report.json", report.to_json())
        write_html(report, context.place / "report.html")
        ours = next(measure for measure in measures if measure.name.startswith("this model"))
        ahead = [m for m in measures[: measures.index(ours)] if m.rival]
        if config.must_win and ahead:
            raise SteelyardError(
                f"the model needs {ours.bits_per_byte:.4f} bits per byte, {ahead[0].name} "
                f"{ahead[0].bits_per_byte:.4f}: train longer (see {context.place / 'report.html'})"
            )
        return Outcome(
            context.place, {"bits_per_byte": as_json(measures), "report": str(context.place / "report.html")}
        )


TRAIN_KINDS: tuple[StageKind[Any], ...] = (
    PretrainStage(), ConversationsStage(), SftStage(), ExportStage(), CompareStage(),
)  # fmt: skip
