"""Where a model comes from, as far as its run and the ledger know: base model, predecessor, data, recipe, licence.

    lineage = gather_lineage(model, evidence, ledger, license=parse_license("apache-2.0"))

The ledger's `stage.finished` events name, by digest, what each stage took and made: from the run whose journal is
released they lead back to the stages that made its model. A model that no recipe made has no such trail; then nothing
is claimed. Paths of the machine it was made on are not published.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from steelyard import __version__
from steelyard.base.canonical import digest, sha256_hex
from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.base.files import read_bounded
from steelyard.release.evidence import Evidence, read_run
from steelyard.release.front_matter import split_card
from steelyard.release.licenses import LICENSE_FILES, License, parse_license

if TYPE_CHECKING:
    from steelyard.ledger.ledger import Event, Ledger

CARD = "README.md"
CARD_LIMIT = 1_000_000  # bytes
HUB_ID = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
TUNES = ("align", "sft")  # kinds of stage that change the weights of a model they are given
_HF = re.compile(
    r"hf://(?:(?P<data>datasets/)(?P<set>[^/@]+/[^/@]+)@(?P<commit>[A-Za-z0-9._-]+)/.*"
    r"|(?P<model>[^/@]+/[^/@]+)@(?P<revision>[A-Za-z0-9._/-]+))"
)
_PIP = re.compile(r"pip://(?P<name>[A-Za-z0-9._-]+)==(?P<version>[A-Za-z0-9.!+_-]+)/.*")


@dataclass(frozen=True)
class Ancestor:
    """A model this one comes from or after. `hub` is its id on the Hub, `purl` its package URL, where there is one;
    `subject` the digest under which it was imported or tested."""

    name: str
    hub: str | None = None
    revision: str | None = None
    purl: str | None = None
    subject: str | None = None
    weights: str | None = None


@dataclass(frozen=True)
class Dataset:
    """Data that the model learned from. `digest` is over the files that were searched for the battery's probes."""

    name: str
    hub: str | None = None
    revision: str | None = None
    digest: str | None = None
    files: int | None = None
    bytes: int | None = None
    words: int | None = None
    license: License | None = None


@dataclass(frozen=True)
class Stage:
    """A stage that made the model: its kind, its key (digest of all that decides its result) and what it did."""

    kind: str
    key: str
    about: str


@dataclass(frozen=True)
class Lineage:
    """`stages` from the first to the last. `undeclared` names data that nobody here could search. `relation` is the
    Hub's word for how the model comes from `base`, None where nobody said. `repository`: the id under which it is to
    stand on the Hub."""

    license: License
    base: Ancestor | None = None
    relation: str | None = None
    predecessor: Ancestor | None = None
    datasets: tuple[Dataset, ...] = ()
    undeclared: tuple[str, ...] = ()
    stages: tuple[Stage, ...] = ()
    recipe: str | None = None
    recipe_digest: str | None = None
    repository: str | None = None
    version: str = __version__


def gather_lineage(
    model: Path,
    evidence: Evidence,
    ledger: Ledger,
    *,
    license: License | None = None,
    base_model: str | None = None,
    repository: str | None = None,
    data_licenses: Mapping[str, License] | None = None,
) -> Lineage:
    """What run, ledger and the model's folder say of its origin, with what the releaser states.

    `license`: else that of the model's own README.md, else of the base model's. `base_model` and `repository` are ids
    on the Hub; `data_licenses` by name or id of a data set. Raises UsageError where no licence is stated, or two
    sources contradict each other; FormatError for a README.md that cannot be read.
    """
    for option, value in (("base model", base_model), ("repository", repository)):
        if value is not None and not HUB_ID.fullmatch(value):
            raise UsageError(f"{option}: {value[:80]!r} is no id on the Hub: write ORG/NAME")
    trail = _trail(evidence, ledger)
    imports = _imports(trail)
    base = _base(imports[0]) if imports else None
    if base_model is not None:
        if base is not None and base.hub not in (None, base_model):
            raise UsageError(f"base model: {base_model} was given, but the ledger says that it came from {base.hub}")
        base = replace(base, hub=base_model) if base is not None else Ancestor(base_model, hub=base_model)
    tuned = any(event.payload.get("kind") in TUNES for event in trail)
    stages = tuple(_stage(event) for event in trail)
    datasets = _datasets(evidence, trail, data_licenses or {})
    return Lineage(
        license=resolve_license(model, license, _base_folder(imports, ledger)),
        base=base,
        relation="finetune" if base is not None and tuned else None,
        predecessor=_predecessor(evidence, ledger, base),
        datasets=datasets,
        undeclared=() if evidence.overlap is None else evidence.overlap.undeclared,
        stages=stages,
        recipe=str(trail[-1].payload.get("recipe")) if trail else None,
        recipe_digest=digest([[stage.kind, stage.key] for stage in stages]) if stages else None,
        repository=repository,
    )


# -- the licence -----------------------------------------------------------------------------------------------------


def read_card(folder: Path) -> str | None:
    """The README.md of a model folder as it is, line ends included; None where there is none. Raises FormatError."""
    path = folder / CARD
    if not path.exists() and not path.is_symlink():
        return None
    try:
        return read_bounded(path, CARD_LIMIT).decode("utf-8")
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not UTF-8 text (byte {error.start}): write it again") from error


def stated_license(card: str | None, where: str) -> tuple[str, str | None, str | None] | None:
    """The licence, its name and its link as a card's metadata state them; None where it states none, or `unknown`.

    Raises FormatError for metadata that cannot be read, UsageError where one of the three is no text.
    """
    data = split_card(card, where).data if card is not None else {}
    found, name, link = (data.get(key) for key in ("license", "license_name", "license_link"))
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if found is None or found == "unknown":
        return None
    if not isinstance(found, str) or not all(value is None or isinstance(value, str) for value in (name, link)):
        raise UsageError(f"{where}: license, license_name, license_link: each is one text: correct it")
    return found, name, link


def resolve_license(model: Path, given: License | None, base: Path | None = None) -> License:
    """The licence to release under: the one `given`, the one that the model's README.md states (not two different
    ones), or that of the model folder it came from. Raises UsageError where there is none."""
    own = stated_license(read_card(model), str(model / CARD))
    if given is not None and own is not None:
        same = own[0].lower() in (given.id, (given.spdx or given.id).lower())
        if not same or (given.name is not None and own[1] not in (None, given.name)):
            named = f"{own[0]} ({own[1]})" if own[1] is not None else own[0]
            raise UsageError(f"{model / CARD}: states the licence {named}, not {given.title}: make them one")
    found = given
    for folder, stated in ((model, own), (base, None)):
        if found is None and folder is not None:
            stated = stated or stated_license(read_card(folder), str(folder / CARD))
            if stated is not None:
                found = _parsed(stated, folder / CARD)
    if found is None:
        raise UsageError(
            f"{model}: nobody states its licence: say --license ID (apache-2.0, mit, ..., or other with a name and a "
            f"link; in a recipe `license: ID`), or write `license:` into the metadata of {CARD}"
        )
    if found.link in LICENSE_FILES and not (model / found.link).is_file():
        raise UsageError(f"{model}: license_link names {found.link}, which is not there: add the licence's text")
    return found


def check_license(model: Path, run: Path, ledger: Ledger, given: License | None) -> None:
    """What `gather_lineage` would refuse for its licence, refused before the gate's long work and not after it.

    Raises as `resolve_license`. A run that cannot be read says nothing here: the gate says why.
    """
    base = None
    if given is None and stated_license(read_card(model), str(model / CARD)) is None:
        try:
            evidence = read_run(run)
        except SteelyardError:
            return
        base = _base_folder(_imports(_trail(evidence, ledger)), ledger)
    resolve_license(model, given, base)


def _parsed(stated: tuple[str, str | None, str | None], where: Path) -> License:
    try:
        return parse_license(*stated)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error


# -- the trail -------------------------------------------------------------------------------------------------------


def _trail(evidence: Evidence, ledger: Ledger) -> list[Event]:
    """The stages that the tested model came from, the first of them first; none where no recipe made it."""
    finished = ledger.events("stage.finished")
    made = {key: event for event in finished if (key := _made(event.payload)) is not None}
    journal = sha256_hex(b"".join(line + b"\n" for line in evidence.journal.raw))
    last: Event | None = None
    for event in finished:
        outputs, inputs = event.payload.get("outputs"), event.payload.get("inputs")
        if isinstance(outputs, dict) and isinstance(inputs, dict) and journal in outputs.values():
            last = made.get(str(inputs.get("model")), last)
    if last is None:
        subject = evidence.journal.plan.subject_digest
        last = next((event for event in reversed(finished) if _summary(event).get("subject") == subject), None)
    found: dict[int, Event] = {}
    waiting = [] if last is None else [last]
    while waiting:
        event = waiting.pop()
        if event.seq not in found:
            found[event.seq] = event
            inputs = event.payload.get("inputs")
            keys = inputs.values() if isinstance(inputs, dict) else ()
            waiting += [made[str(key)] for key in keys if str(key) in made]
    return [found[seq] for seq in sorted(found)]


def _imports(trail: list[Event]) -> list[Event]:
    return [event for event in trail if event.payload.get("kind") == "import"]


def _made(payload: Mapping[str, Any]) -> str | None:
    """The digest by which a later stage names what this one made (as `recipe.runner` computes it)."""
    path, outputs, inputs = payload.get("path"), payload.get("outputs"), payload.get("inputs")
    if not isinstance(outputs, dict) or not isinstance(inputs, dict):
        return None
    content = sorted([name.removeprefix(path or ""), value] for name, value in outputs.items())
    return digest([content, inputs])


def _summary(event: Event) -> Mapping[str, Any]:
    found = event.payload.get("summary")
    return found if isinstance(found, dict) else {}


def _config(event: Event) -> Mapping[str, Any]:
    found = event.payload.get("config")
    return found if isinstance(found, dict) else {}


def _stage(event: Event) -> Stage:
    kind, config, summary = str(event.payload.get("kind")), _config(event), _summary(event)
    about = ""
    if kind == "import":
        about = _source(str(config.get("source"))).name
    elif kind == "text":
        externals = event.payload.get("externals")
        about = ", ".join(sorted(externals)) if isinstance(externals, dict) else ""
    elif kind == "sft":
        about = _source(str(config["data"])).name if config.get("data") else "conversations made from the text"
    elif kind == "align":
        about = "context distillation"
    if isinstance(steps := summary.get("steps"), int) and isinstance(tokens := summary.get("tokens"), int):
        about += f"{'; ' if about else ''}{steps:,} steps, {tokens:,} tokens"
    return Stage(kind, str(event.payload.get("key")), about)


def _source(source: str) -> Ancestor:
    """A model or data by the source it was fetched from; of a local path the last part alone."""
    if match := _HF.fullmatch(source):
        hub, revision = match["set"] or match["model"], match["commit"] or match["revision"]
        if HUB_ID.fullmatch(hub):
            purl = f"pkg:huggingface/{hub}@{quote(revision.lower(), safe='')}" if match["model"] else None
            return Ancestor(hub, hub, revision, purl)
    if match := _PIP.fullmatch(source):
        name = re.sub(r"[-_.]+", "-", match["name"]).lower()
        return Ancestor(source.partition("#")[0].rpartition("/")[2], purl=f"pkg:pypi/{name}@{match['version']}")
    return Ancestor(Path(source).name)


def _base(event: Event) -> Ancestor:
    subject = _summary(event).get("subject")
    return replace(_source(str(_config(event).get("source"))), subject=subject if isinstance(subject, str) else None)


def _base_folder(imports: list[Event], ledger: Ledger) -> Path | None:
    """The base model's folder in the workspace, where its README.md is still the one that was imported."""
    if not imports or ledger.path is None or not isinstance(imports[0].payload.get("path"), str):
        return None
    payload = imports[0].payload
    folder = ledger.path.absolute().parent.parent / payload["path"]
    card = read_card(folder) if folder.is_dir() else None
    kept = payload["outputs"].get(f"{payload['path']}/{CARD}")
    return folder if card is not None and sha256_hex(card.encode()) == kept else None


def _predecessor(evidence: Evidence, ledger: Ledger, base: Ancestor | None) -> Ancestor | None:
    named, journal = evidence.journal.plan.predecessor, evidence.predecessor
    if named is None:
        return None
    released = ledger.events("release.bundled", subject=named.subject)
    weights = journal.plan.subject.weights if journal is not None else None
    if not released and base is not None and base.subject == named.subject:
        return replace(base, weights=weights)
    name = str(released[-1].payload.get("name")) if released else "a model that was never released here"
    return Ancestor(name, subject=named.subject, weights=weights)


def _datasets(evidence: Evidence, trail: list[Event], licenses: Mapping[str, License]) -> tuple[Dataset, ...]:
    hub = {}
    for event in trail:
        data = _config(event).get("data")
        if isinstance(data, str) and data.startswith("hf://datasets/"):
            named = _source(data)
            # What is fetched lies in a folder of this name: so it is called where it was searched.
            hub[named.name.replace("/", "--")] = named
    found = []
    for searched in evidence.overlap.searched if evidence.overlap is not None else ():
        there = hub.pop(searched.name, None)
        found.append(
            Dataset(
                name=searched.name if there is None else there.name,
                hub=None if there is None else there.hub,
                revision=None if there is None else there.revision,
                digest=searched.digest,
                files=searched.files,
                bytes=searched.bytes,
                words=searched.words,
            )
        )
    found += [Dataset(name=one.name, hub=one.hub, revision=one.revision) for one in hub.values()]
    return tuple(replace(one, license=licenses.get(one.name)) for one in found)
