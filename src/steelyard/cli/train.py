"""`steelyard train`: pretraining, fine-tuning, preferences, rejection sampling, context distillation.

The same command goes on from the last checkpoint after Ctrl-C or a crash. Under torchrun the ranks share the work.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from steelyard.base.errors import SteelyardError, UsageError
from steelyard.cli.options import AsJSON
from steelyard.cli.output import print_json, print_table

if TYPE_CHECKING:
    from steelyard.base.progress import Progress
    from steelyard.inference.endpoint import Endpoint
    from steelyard.train.answers import Judge
    from steelyard.train.conversations import Conversation
    from steelyard.train.distill import Distilled
    from steelyard.train.options import TrainOptions, TrainResult
    from steelyard.train.rejection import Selected
    from steelyard.train.tuning import Tuning

app = typer.Typer(no_args_is_help=True, help="Train a model, or tune one for a use of your own.", rich_markup_mode=None)

ModelFolder = Annotated[Path, typer.Argument(help="The model folder to start from.")]
Out = Annotated[Path, typer.Option(help="Folder for the tuned model; must not exist.")]
Work = Annotated[Path | None, typer.Option(help="Folder for checkpoints and metrics; default: OUT with .work behind.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Updates; or give --epochs.")]
Epochs = Annotated[float | None, typer.Option(help="Passes over the data; default 1 where --steps is not given.")]
Rate = Annotated[float, typer.Option(help="Highest learning rate.")]
Warmup = Annotated[int, typer.Option(min=0, help="Steps of linear warm-up.")]
Tokens = Annotated[int, typer.Option(min=2, help="Tokens of a micro-batch: what memory must hold at once.")]
Micro = Annotated[int, typer.Option(min=1, help="Micro-batches of an update.")]
Dtype = Annotated[str, typer.Option(help="What is computed in: bfloat16, float32, or auto, whichever is faster here.")]
Rank = Annotated[int, typer.Option(min=0, help="Rank of LoRA adapters; 0 tunes the weights themselves.")]
Alpha = Annotated[float, typer.Option(help="Scale of LoRA adapters (alpha / rank).")]
Targets = Annotated[str, typer.Option(help="Projections that get an adapter, of q,k,v,o,gate,up,down.")]
First = Annotated[int, typer.Option(min=0, help="Layers below this one stay as they are, and cost no backward pass.")]
Adapter = Annotated[Path | None, typer.Option(help="Also save the LoRA adapter here, in PEFT's format.")]
Validation = Annotated[Path | None, typer.Option(help="Held-out data, in the same form.")]
MaxBad = Annotated[float, typer.Option(min=0, max=1, help="Share of rows that may be bad; they are left out.")]
Every = Annotated[int, typer.Option(min=0, help="Steps between checkpoints; 0: only at the end.")]
Seed = Annotated[int, typer.Option(min=0, help="Order of the data, and the start of adapters.")]
Prompts = Annotated[Path, typer.Argument(help='JSONL: {"prompt": "..."} or {"messages": [...]} a line.')]
ScorerName = Annotated[
    str, typer.Option("--scorer", help="embedded:contextual, embedded:refusal, python:MODULE:FACTORY.")
]
Weights = Annotated[
    list[str], typer.Option("--weight", help="CATEGORY=NUMBER, may be repeated; negative: less is better.")
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens; longer ones are not learned from.")]
ALL = "q,k,v,o,gate,up,down"
# What to change where nothing was kept, by what the reason says.
_REMEDIES = {
    "cut off": "raise --max-tokens",
    "scores as well": "lower --margin, or give another --preprompt",
    "scores too low": "lower --at-least",
    "repeats itself": "give other prompts, or a model that answers them",
    "empty": "give other prompts, or a model that answers them",
    "judged": "give a --scorer that can judge them",
}


@app.command()
def pretrain(
    shards: Annotated[Path, typer.Argument(help="A folder of token shards.")],
    tokenizer: Annotated[Path, typer.Option(help="The folder of the tokenizer that made the shards.")],
    shape: Annotated[Path, typer.Option(help="JSON file with the model's sizes, named as in config.json.")],
    out: Out,
    validation: Annotated[Path | None, typer.Option(help="Held-out shards.")] = None,
    work: Work = None,
    steps: Steps = None,
    epochs: Epochs = None,
    learning_rate: Rate = 3e-4,
    warmup: Warmup = 100,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 1024,
    rows: Annotated[int, typer.Option(min=1, help="Rows of a micro-batch.")] = 4,
    micro_batches: Micro = 1,
    best_fit: Annotated[bool, typer.Option("--best-fit", help="Whole documents instead of rows across them.")] = False,
    dtype: Dtype = "auto",
    checkpoint_every: Every = 500,
    seed: Seed = 0,
    as_json: AsJSON = False,
) -> None:
    """Train a LLaMA from nothing on token shards."""
    from steelyard.base.progress import default_progress
    from steelyard.corpus.shards import Shards
    from steelyard.model.headers import read_json_object
    from steelyard.train import pretrain as pretraining
    from steelyard.train.sft import check_outputs
    from steelyard.train.tuning import FULL, first_rank

    options = _options(steps, epochs, learning_rate, warmup, dtype, checkpoint_every, seed)
    check_outputs(out, None, FULL)
    model = pretraining.new_model(read_json_object(shape), tokenizer, seed, str(shape))
    positions = model.config.max_position_embeddings
    if length > positions:
        raise UsageError(
            f"--length {length}: {shape} has max_position_embeddings = {positions}: lower one, raise the other"
        )
    packing = pretraining.Packing("best_fit" if best_fit else "concatenated", length, rows, micro_batches)
    held_out = Shards.open(validation) if validation else None
    progress = default_progress(as_json=as_json)
    place = _work(out, work)
    result = pretraining.pretrain(
        model, tokenizer, Shards.open(shards), held_out, packing, options, place, progress=progress
    )
    if first_rank():
        pretraining.save_pretrained(model, tokenizer, out)
        _show(result, out, as_json)


@app.command()
def sft(
    model: ModelFolder,
    data: Annotated[str, typer.Argument(help="Conversations: JSONL, Parquet, a folder of them, or hf://datasets/...")],
    out: Out,
    validation: Validation = None,
    work: Work = None,
    steps: Steps = None,
    epochs: Epochs = None,
    learning_rate: Rate = 2e-5,
    warmup: Warmup = 0,
    tokens: Tokens = 2048,
    micro_batches: Micro = 4,
    dtype: Dtype = "auto",
    lora_rank: Rank = 0,
    lora_alpha: Alpha = 32.0,
    lora_targets: Targets = ALL,
    first_layer: First = 0,
    adapter: Adapter = None,
    max_bad: MaxBad = 0.0,
    checkpoint_every: Every = 500,
    seed: Seed = 0,
    as_json: AsJSON = False,
) -> None:
    """Fine-tune on conversations: the answers' tokens alone are learned."""
    from steelyard.base.progress import default_progress
    from steelyard.hub.sources import cache_folder
    from steelyard.train.conversations import read_conversations

    options = _options(steps, epochs, learning_rate, warmup, dtype, checkpoint_every, seed)
    tuning = _tuning(lora_rank, lora_alpha, lora_targets, first_layer, seed)
    progress, place = default_progress(as_json=as_json), _work(out, work)
    job = _Job(model, out, place, options, tuning, tokens, micro_batches, adapter, progress, as_json).check()
    read = [
        read_conversations(source, max_bad=max_bad, cache=cache_folder(), progress=progress) if source else []
        for source in (data, validation)
    ]
    job.tune(read[0], read[1])


@app.command()
def dpo(
    model: ModelFolder,
    data: Annotated[
        str, typer.Argument(help="Rows of prompt, chosen and rejected: JSONL, Parquet, a folder, hf://...")
    ],
    out: Out,
    validation: Validation = None,
    work: Work = None,
    steps: Steps = None,
    epochs: Epochs = None,
    learning_rate: Rate = 1e-6,
    warmup: Warmup = 0,
    beta: Annotated[float, typer.Option(help="How closely the model is held to where it started.")] = 0.1,
    label_smoothing: Annotated[float, typer.Option(help="Share of pairs taken to be the wrong way round.")] = 0.0,
    length_normalised: Annotated[bool, typer.Option("--length-normalised", help="Per token of the answer.")] = False,
    sft_weight: Annotated[float, typer.Option(help="Weight of the chosen answer's own likelihood.")] = 0.0,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of an update.")] = 32,
    micro_batches: Micro = 4,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of prompt and answer; the rest is cut.")] = 1024,
    dtype: Dtype = "auto",
    lora_rank: Rank = 0,
    lora_alpha: Alpha = 32.0,
    lora_targets: Targets = ALL,
    first_layer: First = 0,
    adapter: Adapter = None,
    max_bad: MaxBad = 0.0,
    checkpoint_every: Every = 500,
    seed: Seed = 0,
    as_json: AsJSON = False,
) -> None:
    """Direct preference optimisation: chosen answers become likelier than rejected ones."""
    from steelyard.base.progress import default_progress
    from steelyard.hub.sources import cache_folder
    from steelyard.train.conversations import read_preferences
    from steelyard.train.dpo import DPOOptions, prefer
    from steelyard.train.tuning import first_rank

    options = _options(steps, epochs, learning_rate, warmup, dtype, checkpoint_every, seed, weight_decay=0.0)
    how = DPOOptions(beta, label_smoothing, length_normalised, sft_weight, pairs, micro_batches, max_length)
    how.check()
    if pairs < micro_batches:
        raise UsageError(f"--pairs {pairs}: must be at least --micro-batches ({micro_batches}), a pair for each")
    tuning = _tuning(lora_rank, lora_alpha, lora_targets, first_layer, seed)
    _check(model, out, adapter, tuning)
    progress = default_progress(as_json=as_json)
    read = [
        read_preferences(source, max_bad=max_bad, cache=cache_folder(), progress=progress) if source else []
        for source in (data, validation)
    ]
    result = prefer(
        model,
        read[0],
        out,
        work=_work(out, work),
        options=options,
        dpo=how,
        tuning=tuning,
        validation=read[1],
        adapter=adapter,
        progress=progress,
    )
    if first_rank():
        _show(result, out, as_json)


@app.command()
def rejection(
    model: ModelFolder,
    prompts: Prompts,
    out: Out,
    scorer: ScorerName,
    weight: Weights,
    samples: Annotated[int, typer.Option(min=2, help="Answers drawn to each prompt.")] = 8,
    temperature: Annotated[float, typer.Option(help="Of the samples.")] = 1.0,
    at_least: Annotated[float | None, typer.Option(help="Leave a prompt out where its best scores under this.")] = None,
    max_tokens: MaxTokens = 256,
    work: Work = None,
    steps: Steps = None,
    epochs: Epochs = None,
    learning_rate: Rate = 1e-5,
    tokens: Tokens = 2048,
    micro_batches: Micro = 1,
    lora_rank: Rank = 0,
    lora_alpha: Alpha = 32.0,
    lora_targets: Targets = ALL,
    first_layer: First = 0,
    adapter: Adapter = None,
    seed: Seed = 0,
    as_json: AsJSON = False,
) -> None:
    """Draw several answers to each prompt, and fine-tune on the one a scorer likes best."""
    from steelyard.base.progress import default_progress
    from steelyard.inference.endpoint import Sampling
    from steelyard.train.prompts import read_prompts
    from steelyard.train.rejection import best_of

    progress, place = default_progress(as_json=as_json), _work(out, work)
    options = _options(steps, epochs, learning_rate, 0, "bfloat16", 500, seed)
    tuning = _tuning(lora_rank, lora_alpha, lora_targets, first_layer, seed)
    job = _Job(model, out, place, options, tuning, tokens, micro_batches, adapter, progress, as_json).check()
    judge, asked = _judge(scorer, weight), read_prompts(prompts)

    def draw(endpoint: Endpoint) -> Selected:
        return best_of(
            endpoint,
            asked,
            judge,
            samples=samples,
            sampling=Sampling(temperature=temperature, max_tokens=max_tokens),
            at_least=at_least,
            seed=seed,
            progress=progress,
        )

    job.learn(draw, "samples.jsonl")


@app.command()
def distil(
    model: ModelFolder,
    prompts: Prompts,
    out: Out,
    preprompt: Annotated[list[Path], typer.Option(help="A text file to put before each prompt; may be repeated.")],
    scorer: ScorerName,
    weight: Weights,
    margin: Annotated[float, typer.Option(help="By how much the guided answer must score better.")] = 0.0,
    max_tokens: MaxTokens = 256,
    work: Work = None,
    steps: Steps = None,
    epochs: Epochs = None,
    learning_rate: Rate = 1e-5,
    tokens: Tokens = 2048,
    micro_batches: Micro = 1,
    lora_rank: Rank = 0,
    lora_alpha: Alpha = 32.0,
    lora_targets: Targets = ALL,
    first_layer: First = 0,
    adapter: Adapter = None,
    seed: Seed = 0,
    as_json: AsJSON = False,
) -> None:
    """Context distillation: learn to answer without a preprompt as with one, where a scorer prefers that."""
    from steelyard.base.progress import default_progress
    from steelyard.inference.endpoint import Sampling
    from steelyard.train.distill import context_distil
    from steelyard.train.prompts import read_prompts

    progress, place = default_progress(as_json=as_json), _work(out, work)
    options = _options(steps, epochs, learning_rate, 0, "bfloat16", 500, seed)
    tuning = _tuning(lora_rank, lora_alpha, lora_targets, first_layer, seed)
    job = _Job(model, out, place, options, tuning, tokens, micro_batches, adapter, progress, as_json).check()
    judge, asked = _judge(scorer, weight), read_prompts(prompts)
    leads = [_text(path) for path in preprompt]

    def draw(endpoint: Endpoint) -> Distilled:
        return context_distil(
            endpoint,
            asked,
            leads,
            judge,
            sampling=Sampling(max_tokens=max_tokens),
            margin=margin,
            seed=seed,
            progress=progress,
        )

    job.learn(draw, "distilled.jsonl")


def _options(
    steps: int | None, epochs: float | None, rate: float, warmup: int, dtype: str, every: int, seed: int, **rest: Any
) -> TrainOptions:
    from steelyard.train.options import Number, TrainOptions

    if steps is not None and epochs is not None:
        raise UsageError("give --steps or --epochs, not both")
    if epochs is not None and not 0 < epochs < math.inf:
        raise UsageError(f"--epochs {epochs:g}: must be above 0")
    if not 0 < rate < math.inf:
        raise UsageError(f"--learning-rate {rate:g}: must be above 0")
    if steps is not None and warmup >= steps:
        raise UsageError(f"--warmup {warmup}: must be fewer than the {steps} steps of --steps")
    if dtype not in get_args(Number):
        raise UsageError(f"--dtype {dtype}: choose one of {', '.join(get_args(Number))}")
    passes = None if steps is not None else 1.0 if epochs is None else epochs
    kind = cast("Number", dtype)
    return TrainOptions(
        steps, passes, learning_rate=rate, warmup=warmup, dtype=kind, checkpoint_every=every, seed=seed, **rest
    )


def _tuning(rank: int, alpha: float, targets: str, first_layer: int, seed: int) -> Tuning:
    from steelyard.train.tuning import Tuning

    return Tuning(rank, alpha, tuple(part.strip() for part in targets.split(",")), first_layer, seed)


def _check(model: Path, out: Path, adapter: Path | None, tuning: Tuning, tokens: int | None = None) -> None:
    """What can be refused at once, before data are read or answers drawn."""
    from steelyard.train.sft import PACKING, Packing, check_outputs, check_tuning

    check_outputs(out, adapter, tuning)
    check_tuning(model, tuning, PACKING if tokens is None else Packing(tokens))


def _judge(scorer: str, weights: list[str]) -> Judge:
    from steelyard.scorers.registry import open_scorer
    from steelyard.train.answers import judge_by

    found = {}
    for text in weights:
        category, _, number = text.partition("=")
        try:
            found[category] = float(number)
        except ValueError:
            raise UsageError(f"--weight {text}: write CATEGORY=NUMBER, as in toxicity=-1") from None
    return judge_by(open_scorer(scorer), found)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise UsageError(f"--preprompt {path}: not UTF-8 ({error})") from error


def _work(out: Path, work: Path | None) -> Path:
    return work or out.with_name(out.name + ".work")


@dataclass(frozen=True)
class _Job:
    """What the commands that fine-tune on conversations have in common."""

    model: Path
    out: Path
    work: Path
    options: TrainOptions
    tuning: Tuning
    tokens: int
    micro_batches: int
    adapter: Path | None
    progress: Progress
    as_json: bool

    def check(self) -> _Job:
        """Itself; raises for what can be refused at once, before data are read or answers drawn."""
        _check(self.model, self.out, self.adapter, self.tuning, self.tokens)
        return self

    def learn(self, draw: Callable[[Endpoint], Selected | Distilled], name: str) -> None:
        """Draw answers, write what became of each prompt to the table `name` of the work folder, tune on those kept.

        The answers lie in a folder of their own, locked until the end: `train` locks the work folder itself, and a
        process must not take one lock twice.
        """
        from steelyard.inference.local import LocalEndpoint
        from steelyard.model.identity import subject_of
        from steelyard.train.drawing import KeptAnswers
        from steelyard.train.guard import folder_lock
        from steelyard.train.tuning import first_rank

        table, answers, first = self.work / name, self.work / "answers", first_rank()
        with ExitStack() as held:
            if first:
                held.enter_context(folder_lock(answers))
            with ExitStack() as drawing:
                if first:
                    drawing.enter_context(folder_lock(self.work))  # nor while something else trains here
                subject = subject_of(self.model, self.progress).digest
                kept = answers / "answers.jsonl"
                endpoint = KeptAnswers(kept, subject, lambda: LocalEndpoint.open(self.model), self.progress, keep=first)
                found = draw(endpoint)
                if first:
                    found.save(table)
            counts = found.counts()
            if first and not self.as_json:
                rows = [(why, f"{n:,}") for why, n in counts.items()]
                print_table(f"prompts (each in {table})", ("fate", "prompts"), rows)
            if not found.conversations:
                fates = "; ".join(f"{n:,}: {why}" for why, n in counts.items())
                remedies = dict.fromkeys(text for part, text in _REMEDIES.items() if any(part in why for why in counts))
                raise SteelyardError(f"{table}: no answer was kept ({fates}): {'; '.join(remedies)}")
            self.tune(found.conversations, [], counts)

    def tune(
        self,
        conversations: list[Conversation],
        validation: list[Conversation],
        prompts: dict[str, int] | None = None,
    ) -> None:
        """Fine-tune, and show the result. `prompts`: how many met each fate."""
        from steelyard.train.sft import Packing, fine_tune
        from steelyard.train.tuning import first_rank

        result = fine_tune(
            self.model,
            conversations,
            self.out,
            work=self.work,
            options=self.options,
            tuning=self.tuning,
            packing=Packing(self.tokens, self.micro_batches),
            validation=validation,
            adapter=self.adapter,
            progress=self.progress,
        )
        if first_rank():
            _show(result, self.out, self.as_json, prompts)


def _show(result: TrainResult, out: Path, as_json: bool, prompts: dict[str, int] | None = None) -> None:
    """What a run did, and where its model lies. `prompts`: how many met each fate."""
    found = asdict(result) | {"folder": str(result.folder), "checkpoint": str(result.checkpoint), "model": str(out)}
    found |= {} if prompts is None else {"prompts": prompts}
    if as_json:
        print_json(found)
        return
    held_out = "" if result.validation_loss is None else f", validation loss {result.validation_loss:.4f}"
    print(f"{result.steps:,} steps, loss {result.loss:.4f}{held_out}; {result.tokens_per_second:,.0f} tokens/s")
    print(f"model:  {out}\nreport: {result.folder}")
