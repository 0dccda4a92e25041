"""What a recipe says: strict YAML, checked whole before any work starts, every error with its line, key and remedy."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from steelyard.base.errors import UsageError
from steelyard.base.progress import Progress
from steelyard.base.yamlfile import Document, Loc, nearest, read_yaml, shown

if TYPE_CHECKING:
    from steelyard.ledger.ledger import Ledger

NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"


class StageConfig(BaseModel):
    """What a recipe may say about a stage. Strict: no key it doesn't know, no "1" for a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    kind: str


C = TypeVar("C", bound=StageConfig, covariant=True)


@dataclass(frozen=True)
class Input:
    """The finished stage that a reference names: its file or folder, its digest, and what it said.

    `inputs` are that stage's own, so that a release finds the model that its run tested; `digest` is over its content
    and theirs.
    """

    stage: str
    path: Path | None
    digest: str
    summary: dict[str, Any]
    inputs: Mapping[str, Input]

    @property
    def made(self) -> Path:
        """The file or folder of a stage that makes one."""
        assert self.path is not None, f"stage {self.stage} made no file"
        return self.path


@dataclass(frozen=True)
class Outcome:
    """What a stage made: the file or folder it hands on, other files it wrote, and a JSON summary to show.

    `incomplete` says why it is not whole: it is handed on all the same, but never reused; the next run does it again.
    """

    path: Path | None
    summary: dict[str, Any]
    extra: tuple[Path, ...] = ()
    incomplete: str = ""


@dataclass(frozen=True)
class Context(Generic[C]):
    """Where a stage works.

    `place` is its own path in the workspace: absent, or holding an unfinished run to go on with. `earlier` are the
    paths that stages have finished before, as the ledger has them: what may be moved aside. `passphrase` gives that of
    the key of a name.
    """

    recipe: str
    stage: str
    config: C
    workspace: Path
    place: Path
    ledger: Ledger
    progress: Progress
    earlier: frozenset[Path]
    passphrase: Callable[[str], bytes]


class StageKind(ABC, Generic[C]):
    """One kind of stage. Recipes pick it by `kind`."""

    name: ClassVar[str]
    config: type[C]
    produces: ClassVar[str]
    """What references look for: model, run, bundle ..."""
    references: ClassVar[Mapping[str, str]] = {}
    """Fields that name another stage, and what that stage must produce."""
    rooms: ClassVar[tuple[str, ...]]
    """The rooms whose code decides the result."""
    room: ClassVar[str] = "stages"
    """Folder of the workspace that `Context.place` lies in."""
    resumable: ClassVar[bool] = False
    """Whether `run` goes on with what an interrupted run left in `Context.place`; else that is removed first."""

    def check(self, config: Any, others: Mapping[str, StageConfig]) -> None:
        """Refuse what cannot work with the other stages of the recipe (FieldError), before any work starts."""

    def externals(self, config: Any, workspace: Path) -> dict[str, str]:
        """Digests, by name, of what the result depends on besides configuration, other stages and code: batteries,
        policies, weights, local files. Called before any work starts: raises FieldError where one cannot be had.
        """
        return {}

    @abstractmethod
    def run(self, context: Context[Any], inputs: Mapping[str, Input]) -> Outcome:
        """Do the work. Whatever it raises, nothing of it counts as done."""


class FieldError(UsageError):
    """A field of a stage holds an impossible value; the reader of the recipe adds file, line and stage."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@contextmanager
def field(name: str) -> Iterator[None]:
    """Put what is wrong inside down to the field."""
    try:
        yield
    except FieldError:
        raise
    except UsageError as error:
        raise FieldError(name, str(error)) from error


@dataclass(frozen=True)
class Stage:
    """A stage of a recipe: its configuration, and by field the stages it takes from."""

    name: str
    kind: StageKind[StageConfig]
    config: StageConfig
    inputs: dict[str, str]


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; `stages` in an order in which they can run."""

    path: Path
    name: str
    stages: dict[str, Stage]
    document: Document

    def located(self, loc: Loc, message: str) -> UsageError:
        """An error at a key of this recipe: `FILE:LINE: KEY: MESSAGE`."""
        return self.document.located(loc, message)


class _Top(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(pattern=NAME)
    stages: dict[str, dict[str, Any]] = Field(min_length=1)


def load_recipe(path: Path, kinds: Mapping[str, StageKind[StageConfig]]) -> Recipe:
    """Read and check a recipe. Raises UsageError naming file, line, key, allowed values and the nearest spelling."""
    raw, document = read_yaml(path, "recipe")
    top = document.validate(_Top, raw)
    stages: dict[str, Stage] = {}
    for name, settings in top.stages.items():
        loc: Loc = ("stages", name)
        if not _is_name(name):
            raise document.located(loc, "a stage's name is small letters, digits, and . _ - within")
        allowed = f"(allowed: {', '.join(sorted(kinds))})"
        if "kind" not in settings:
            raise document.located(loc, f"the key kind is missing {allowed}")
        kind = kinds.get(settings["kind"]) if isinstance(settings["kind"], str) else None
        if kind is None:
            hint = nearest(settings["kind"], kinds)
            message = f"unknown kind of stage {shown(settings['kind'])}{hint} {allowed}"
            raise document.located((*loc, "kind"), message)
        config = document.validate(kind.config, settings, loc)
        inputs = {key: getattr(config, key) for key in kind.references if getattr(config, key) is not None}
        stages[name] = Stage(name, kind, config, inputs)
    recipe = Recipe(path, top.name, stages, document)
    _check_references(recipe)
    recipe = Recipe(path, top.name, _ordered(recipe), document)
    for stage in recipe.stages.values():
        try:
            stage.kind.check(stage.config, {key: stages[other].config for key, other in stage.inputs.items()})
        except FieldError as error:
            raise recipe.located(("stages", stage.name, error.field), str(error)) from error
    return recipe


def _is_name(name: str) -> bool:
    return re.fullmatch(NAME, name) is not None


def _check_references(recipe: Recipe) -> None:
    for stage in recipe.stages.values():
        for key, other in stage.inputs.items():
            wanted = stage.kind.references[key]
            makers = [name for name, found in recipe.stages.items() if found.kind.produces == wanted]
            listed = f"(stages that make a {wanted}: {', '.join(makers) or 'none'})"
            loc = ("stages", stage.name, key)
            if other not in recipe.stages:
                hint = nearest(other, recipe.stages)
                raise recipe.located(loc, f"there is no stage {shown(other)}{hint} {listed}")
            if recipe.stages[other].kind.produces != wanted:
                raise recipe.located(loc, f"stage {other} makes no {wanted} {listed}")


def _ordered(recipe: Recipe) -> dict[str, Stage]:
    done: dict[str, Stage] = {}
    trail: list[str] = []

    def visit(name: str) -> None:
        if name in trail:
            circle = [*trail[trail.index(name) :], name]
            field_name = next(key for key, other in recipe.stages[circle[0]].inputs.items() if other == circle[1])
            message = f"stages need one another in a circle: {' -> '.join(circle)}"
            raise recipe.located(("stages", circle[0], field_name), message)
        if name not in done:
            trail.append(name)
            for other in recipe.stages[name].inputs.values():
                visit(other)
            trail.pop()
            done[name] = recipe.stages[name]

    for name in recipe.stages:
        visit(name)
    return done
