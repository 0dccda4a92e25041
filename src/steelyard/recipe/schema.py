"""What a recipe says: strict YAML, checked whole before any work starts, every error with its line, key and remedy."""

from __future__ import annotations

import difflib
import re
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from steelyard.base.errors import UsageError
from steelyard.base.progress import Progress

if TYPE_CHECKING:
    from steelyard.ledger.ledger import Ledger

SIZE_LIMIT = 200_000  # bytes of a recipe file
DEPTH_LIMIT = 12
NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"

Loc = tuple[str | int, ...]


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


def nearest(word: object, known: Iterable[str]) -> str:
    """`, did you mean X?` or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1) if isinstance(word, str) else []
    return f", did you mean {close[0]}?" if close else ""


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
    lines: Mapping[Loc, int]

    def located(self, loc: Loc, message: str) -> UsageError:
        """An error at a key of this recipe: `FILE:LINE: KEY: MESSAGE`."""
        return _located(self.path, self.lines, loc, message)


class _Top(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(pattern=NAME)
    stages: dict[str, dict[str, Any]] = Field(min_length=1)


def load_recipe(path: Path, kinds: Mapping[str, StageKind[StageConfig]]) -> Recipe:
    """Read and check a recipe. Raises UsageError naming file, line, key, allowed values and the nearest spelling."""
    raw, lines = _read_yaml(path)
    top = _validated(_Top, raw, path, lines, ())
    stages: dict[str, Stage] = {}
    for name, settings in top.stages.items():
        loc: Loc = ("stages", name)
        if not _is_name(name):
            raise _located(path, lines, loc, "a stage's name is small letters, digits, and . _ - within")
        allowed = f"(allowed: {', '.join(sorted(kinds))})"
        if "kind" not in settings:
            raise _located(path, lines, loc, f"the key kind is missing {allowed}")
        kind = kinds.get(settings["kind"]) if isinstance(settings["kind"], str) else None
        if kind is None:
            hint = nearest(settings["kind"], kinds)
            message = f"unknown kind of stage {_shown(settings['kind'])}{hint} {allowed}"
            raise _located(path, lines, (*loc, "kind"), message)
        config = _validated(kind.config, settings, path, lines, loc)
        inputs = {key: getattr(config, key) for key in kind.references if getattr(config, key) is not None}
        stages[name] = Stage(name, kind, config, inputs)
    recipe = Recipe(path, top.name, stages, lines)
    _check_references(recipe)
    recipe = Recipe(path, top.name, _ordered(recipe), lines)
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
                raise recipe.located(loc, f"there is no stage {_shown(other)}{hint} {listed}")
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


# -- YAML, the plain part of it --------------------------------------------------------------------------------------


def _read_yaml(path: Path) -> tuple[Any, dict[Loc, int]]:
    """The data, and the line of every key. No aliases, tags or second document; keys are text and occur once."""
    try:
        with path.open("rb") as file:
            data = file.read(SIZE_LIMIT + 1)
        text = data.decode("utf-8")
    except OSError as error:
        raise UsageError(
            f"{path}: {error.strerror}: give the path of a recipe, such as recipes/quickstart.yaml"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text (byte {error.start})") from error
    if len(data) > SIZE_LIMIT:
        raise UsageError(f"{path}: longer than {SIZE_LIMIT:,} bytes: no recipe is")
    lines: dict[Loc, int] = {}
    try:
        _check_events(path, text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return (None if node is None else _plain(path, node, (), lines)), lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = str(path) if mark is None else f"{path}:{mark.line + 1}"
        cause = getattr(error, "problem", None) or " ".join(str(error).split())
        raise UsageError(f"{where}: not YAML: {cause}") from error


def _check_events(path: Path, text: str) -> None:
    depth = documents = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        where = str(path) if event.start_mark is None else f"{path}:{event.start_mark.line + 1}"
        tag = getattr(event, "tag", None)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise UsageError(f"{where}: YAML anchors and aliases (&, *) are not read in a recipe: write it out")
        if tag is not None:
            raise UsageError(f"{where}: YAML tags ({_shown(tag)}) are not read in a recipe: plain values only")
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise UsageError(f"{where}: a second YAML document: a recipe is one")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEPTH_LIMIT:
            raise UsageError(f"{where}: nested deeper than {DEPTH_LIMIT} levels: no recipe is")


def _plain(path: Path, node: yaml.Node, loc: Loc, lines: dict[Loc, int]) -> Any:
    lines.setdefault(loc, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                shown = _shown(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
                raise UsageError(f"{path}:{line}: {_dotted(loc)}: the key {shown} is not text: put it in quotes")
            key = key_node.value
            if key in found:
                first = lines[(*loc, key)]
                raise UsageError(f"{path}:{line}: {_dotted((*loc, key))}: this key is there already, in line {first}")
            lines[(*loc, key)] = line
            found[key] = _plain(path, value_node, (*loc, key), lines)
        return found
    if isinstance(node, yaml.SequenceNode):
        return [_plain(path, item, (*loc, index), lines) for index, item in enumerate(node.value)]
    try:
        return yaml.SafeLoader("").construct_object(node)
    except (ValueError, OverflowError) as error:
        raise _located(
            path, lines, loc, f"{_shown(node.value)} cannot be read ({error}): put text in quotes"
        ) from error


# -- errors ----------------------------------------------------------------------------------------------------------

M = TypeVar("M", bound=BaseModel)


def _validated(model: type[M], raw: Any, path: Path, lines: Mapping[Loc, int], loc: Loc) -> M:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        problems = error.errors()
        # A wrong key is the cause of a missing one, so it is told first.
        first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        message = _explained(model, first["type"], first["loc"], first) + more
        raise _located(path, lines, (*loc, *first["loc"]), message) from error


def _explained(model: type[BaseModel], kind: str, loc: Loc, problem: Mapping[str, Any]) -> str:
    if kind == "extra_forbidden":
        allowed = list(_model_at(model, loc[:-1]).model_fields)
        return f"unknown key{nearest(loc[-1], allowed)} (allowed: {', '.join(allowed)})"
    if kind == "missing":
        return "this key is missing"
    if kind == "value_error":
        return str(problem["msg"]).removeprefix("Value error, ")
    text = (
        str(problem["msg"])
        .replace("Input should be ", "must be ")
        .replace("String should ", "must ")
        .replace("valid tuple", "list")
    )
    text = text.replace("valid dictionary or instance of ", "mapping of ").replace("valid dictionary", "mapping")
    if kind == "literal_error":
        text += nearest(problem["input"], [word.strip("' ") for word in problem["ctx"]["expected"].split("'")[1::2]])
    return f"{text}, not {_shown(problem['input'])}"


def _model_at(model: type[BaseModel], loc: Loc) -> type[BaseModel]:
    annotation: Any = model
    for part in loc:
        annotation = model.model_fields[str(part)].annotation if annotation is model else get_args(annotation)[-1]
        choices = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
        nested = [choice for choice in choices if isinstance(choice, type) and issubclass(choice, BaseModel)]
        if nested:  # else a mapping from names to models
            annotation = model = nested[0]
    return model


def _located(path: Path, lines: Mapping[Loc, int], loc: Loc, message: str) -> UsageError:
    known = loc
    while known and known not in lines:
        known = known[:-1]
    line = f":{lines[known]}" if known in lines else ""
    return UsageError(f"{path}{line}: {_dotted(loc)}: {message}")


def _dotted(loc: Loc) -> str:
    return ".".join(str(part) for part in loc) or "recipe"


def _shown(value: object) -> str:
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    if value is None:
        return "empty"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
