"""Files that people write in YAML (recipes, batteries, policies): the plain part of YAML, and errors with file, line
and key, in our own words, with the nearest spelling.

    raw, document = read_yaml(path, "policy")
    policy = document.validate(Policy, raw)
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from steelyard.base.errors import FormatError, UsageError
from steelyard.base.files import inside

SIZE_LIMIT = 200_000  # bytes
DEPTH_LIMIT = 12
VALUES_LIMIT = 100_000  # values, keys, lists and mappings of a file; packaged ones have under 5,000
NUMBER_LIMIT = 1_000  # characters of a number; sexagesimal ones (1:30) take time by the square of their length

Loc = tuple[str | int, ...]
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Document:
    """Where the parts of a file that people wrote stand. `kind` is what it is (`recipe`); `lines` the line of every
    key; `elsewhere` names the place (`FILE:LINE`) of parts that another file holds."""

    where: str
    kind: str
    lines: Mapping[Loc, int] = field(default_factory=dict)
    elsewhere: Mapping[Loc, str] = field(default_factory=dict)

    def located(self, loc: Loc, message: str) -> UsageError:
        """An error at a key: `FILE:LINE: KEY: MESSAGE`."""
        for size in range(len(loc), 0, -1):
            if loc[:size] in self.elsewhere:
                key = f"{dotted(loc[size:], '')}: " if loc[size:] else ""
                return UsageError(f"{self.elsewhere[loc[:size]]}: {key}{message}")
        known = loc
        while known and known not in self.lines:
            known = known[:-1]
        line = f":{self.lines[known]}" if known in self.lines else ""
        return UsageError(f"{self.where}{line}: {dotted(loc, self.kind)}: {message}")

    def validate(self, model: type[M], raw: Any, loc: Loc = ()) -> M:
        """`raw`, which stands at `loc`, as a `model`. Raises UsageError naming the first thing that is wrong."""
        try:
            return model.model_validate(raw)
        except ValidationError as error:
            raise self.explained(model, error, loc) from error

    def explained(self, model: type[BaseModel], error: ValidationError, loc: Loc = ()) -> UsageError:
        """What pydantic found, in our words."""
        problems = error.errors()
        # A wrong key is the cause of a missing one, so it is told first.
        first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        owner, path = _walk(model, first["loc"])
        return self.located((*loc, *path), _words(owner, first["type"], first) + more)


def read_yaml(path: Path, kind: str, limit: int = SIZE_LIMIT) -> tuple[Any, Document]:
    """The data of a file and where its parts stand. No aliases, tags or second document; keys are text and occur once.

    Raises UsageError: not there, over `limit` bytes, not UTF-8, not YAML, nested deeper than DEPTH_LIMIT, of more than
    VALUES_LIMIT values.
    """
    return parse_yaml(read_text(path, kind, limit), str(path), kind)


def extended(
    path: Path,
    raw: Any,
    document: Document,
    load: Callable[[str], dict[str, Any]],
    merge: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]],
    limit: int = SIZE_LIMIT,
) -> Any:
    """`raw` merged over what its key `extends` names (`load`): a name, or a `.yaml` file beside this one; `raw` itself
    without that key. A file that is extended may not extend another, and who extends one has a `name` of his own: what
    was loosened must not be shown under the name of the strict one. Raises UsageError."""
    if not isinstance(raw, dict) or "extends" not in raw:
        return raw
    base, loc = raw["extends"], ("extends",)
    if not isinstance(base, str) or not base:
        raise document.located(loc, f"must name a {document.kind}, or a file beside this one")
    if not base.endswith((".yaml", ".yml")):
        if "." in base or "/" in base:
            raise document.located(
                loc, f"{shown(base)} must name a packaged {document.kind}, or a .yaml file beside this one"
            )
    else:
        try:
            base = str(inside(path.parent, base))
        except FormatError as error:
            raise document.located(loc, str(error)) from error
        inner, _ = read_yaml(Path(base), document.kind, limit)
        if isinstance(inner, dict) and "extends" in inner:
            raise document.located(loc, f"{base} extends another itself: extend that one, or write the keys out")
    found = load(base)
    if raw.get("name") in (None, found["name"]):
        raise document.located(
            ("name",), f"must be given, and be another than {found['name']!r}, which this file extends"
        )
    return merge(found, {key: value for key, value in raw.items() if key != "extends"})


def parse_yaml(text: str, where: str, kind: str) -> tuple[Any, Document]:
    """`read_yaml` of a text that is at hand; `where` names it in messages."""
    lines: dict[Loc, int] = {}
    try:
        _check_events(where, text, kind)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        document = Document(where, kind, lines)
        value = None if node is None else _plain(document, lines, node, (), yaml.SafeLoader(""))
        return value, document
    except RecursionError as error:
        raise UsageError(f"{where}: nested deeper than {DEPTH_LIMIT} levels: no {kind} is") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = where if mark is None else f"{where}:{mark.line + 1}"
        cause = getattr(error, "problem", None) or " ".join(str(error).split())
        raise UsageError(f"{place}: not YAML: {cause}") from error


def read_text(path: Path, kind: str, limit: int) -> str:
    """The text of a UTF-8 file of at most `limit` bytes. Raises UsageError naming file, cause and remedy."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
        text = data.decode("utf-8") if len(data) <= limit else ""
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}: give the path of a {kind}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text (byte {error.start})") from error
    if len(data) > limit:
        raise UsageError(f"{path}: longer than {limit:,} bytes: no {kind} is")
    return text


def _check_events(source: str, text: str, kind: str) -> None:
    depth = documents = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        if count > VALUES_LIMIT:
            raise UsageError(f"{source}: more than {VALUES_LIMIT:,} values: no {kind} has so many")
        where = source if event.start_mark is None else f"{source}:{event.start_mark.line + 1}"
        tag = getattr(event, "tag", None)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise UsageError(f"{where}: YAML anchors and aliases (&, *) are not read in a {kind}: write it out")
        if tag is not None:
            raise UsageError(f"{where}: YAML tags ({shown(tag)}) are not read in a {kind}: plain values only")
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise UsageError(f"{where}: a second YAML document: a {kind} is one")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEPTH_LIMIT:
            raise UsageError(f"{where}: nested deeper than {DEPTH_LIMIT} levels: no {kind} is")


def _plain(document: Document, lines: dict[Loc, int], node: yaml.Node, loc: Loc, loader: yaml.SafeLoader) -> Any:
    lines.setdefault(loc, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            where = f"{document.where}:{line}: {dotted(loc, document.kind)}"
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                what = shown(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
                raise UsageError(f"{where}: the key {what} is not text: put it in quotes")
            key = _spelled(document, key_node.value, loc)
            if key in found:
                first = lines[(*loc, key)]
                raise UsageError(
                    f"{document.where}:{line}: {dotted((*loc, key), '')}: this key is there already, in line {first}"
                )
            lines[(*loc, key)] = line
            found[key] = _plain(document, lines, value_node, (*loc, key), loader)
        return found
    if isinstance(node, yaml.SequenceNode):
        return [_plain(document, lines, item, (*loc, index), loader) for index, item in enumerate(node.value)]
    if node.tag != "tag:yaml.org,2002:str" and len(node.value) > NUMBER_LIMIT:
        raise document.located(loc, f"{shown(node.value)} is longer than any number or date: put text in quotes")
    try:
        value = loader.construct_object(node)
    except (ValueError, OverflowError) as error:
        raise document.located(loc, f"{shown(node.value)} cannot be read ({error}): put text in quotes") from error
    return _spelled(document, value, loc) if isinstance(value, str) else value


def _spelled(document: Document, text: str, loc: Loc) -> str:
    """`text`, refused where UTF-8 cannot spell it: it could neither be digested nor shown."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise document.located(loc, f"{shown(text)} holds half of a surrogate pair: it is no text") from error
    return text


# -- words -----------------------------------------------------------------------------------------------------------

_TYPES = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "greater_than": "over {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "under {lt:g}",
    "less_than_equal": "at most {le:g}",
    "string_pattern_mismatch": "of the pattern {pattern}",
    "string_too_short": "at least {min_length} characters long",
    "string_too_long": "at most {max_length} characters long",
}


def _words(owner: type[BaseModel] | None, kind: str, problem: Mapping[str, Any]) -> str:
    context = problem.get("ctx") or {}
    if kind == "extra_forbidden":
        allowed = [] if owner is None else list(owner.model_fields)
        return f"unknown key{nearest(problem['loc'][-1], allowed)} (allowed: {', '.join(allowed)})"
    if kind == "missing":
        return "this key is missing"
    if kind == "value_error":
        return str(problem["msg"]).removeprefix("Value error, ")
    if kind == "union_tag_not_found":
        return "the key kind is missing"
    if kind in ("literal_error", "union_tag_invalid"):
        expected = str(context.get("expected") or context.get("expected_tags")).split("'")[1::2]
        found = context.get("tag", problem["input"])
        return f"{shown(found)} is unknown{nearest(found, expected)} (allowed: {', '.join(expected)})"
    if kind in ("too_short", "too_long"):
        bound = f"at least {context['min_length']}" if kind == "too_short" else f"at most {context['max_length']}"
        return f"must have {bound} item{'s' * (bound[-2:] != ' 1')}, has {context['actual_length']}"
    if kind in _TYPES:
        return f"must be {_TYPES[kind].format(**context)}, not {shown(problem['input'])}"
    return f"{problem['msg']}, not {shown(problem['input'])}"


def _walk(model: type[BaseModel], loc: Loc) -> tuple[type[BaseModel] | None, Loc]:
    """The model that the last key of `loc` belongs to, and `loc` without the tags that pydantic adds for a union."""
    at: Any = model
    path: list[str | int] = []
    owner: type[BaseModel] | None = model
    for part in loc:
        at = _plain_type(at)
        models = [one for one in _choices(at) if isinstance(one, type) and issubclass(one, BaseModel)]
        tagged = [one for one in models if part in _tags(one)] if len(models) > 1 else []
        if tagged:
            at = tagged[0]
            continue
        path.append(part)
        owner = models[0] if models else None
        if isinstance(part, str) and owner is not None and part in owner.model_fields:
            at = owner.model_fields[part].annotation
        elif get_origin(at) is dict:
            at = get_args(at)[1]
        elif get_origin(at) in (tuple, list):
            at = get_args(at)[0]
        else:
            at = None
    return owner, tuple(path)


def _plain_type(annotation: Any) -> Any:
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return annotation


def _choices(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) or get_origin(annotation) in (dict, tuple, list, Literal):
        return [annotation]
    return [_plain_type(one) for one in get_args(annotation)] or [annotation]


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    kind = model.model_fields.get("kind")
    return () if kind is None else get_args(kind.annotation)


def nearest(word: object, known: Iterable[str]) -> str:
    """`, did you mean X?` or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1) if isinstance(word, str) else []
    return f", did you mean {close[0]}?" if close else ""


def dotted(loc: Loc, root: str) -> str:
    """`stages.align.learning_rate`; `root` for the whole."""
    return ".".join(str(part) for part in loc) or root


def shown(value: object) -> str:
    """A value for a message: short, on one line."""
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    if value is None:
        return "empty"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
