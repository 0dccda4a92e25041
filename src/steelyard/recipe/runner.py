"""Runs a recipe: each stage once, cached by the digest of all that decides its result, resumable after any end.

A finished stage is an event `stage.finished` in the workspace's ledger, with the SHA-256 of every file it made. A stage
counts as cached only when those files, rehashed now, are still the same. One that came out incomplete is an event
`stage.incomplete`, and is done again.
"""

from __future__ import annotations

import fcntl
import inspect
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from steelyard.base.canonical import code_digest, digest, sha256_file, sha256_hex
from steelyard.base.errors import SteelyardError, UsageError
from steelyard.base.progress import Progress, Silent
from steelyard.base.yamlfile import nearest
from steelyard.ledger.ledger import Event, Ledger
from steelyard.recipe.schema import Context, FieldError, Input, Outcome, Recipe, Stage, load_recipe
from steelyard.recipe.stages import KINDS
from steelyard.safety.pause import Paused

DEFAULT_WORKSPACE = Path(".steelyard")


@dataclass(frozen=True)
class StageResult:
    """What became of a stage. `why` says why it ran (or would); `summary` is what the stage has to show."""

    name: str
    kind: str
    status: Literal["cached", "done", "to run"]
    why: str
    path: Path | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def run_recipe(
    path: Path,
    *,
    workspace: Path = DEFAULT_WORKSPACE,
    force: Collection[str] = (),
    until: str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    passphrase: Callable[[str], bytes] | None = None,
) -> list[StageResult]:
    """Do what the recipe says, in order, and tell what became of each stage.

    `force` names stages to do again; `until` the last one wanted (with those it takes from). `dry_run` writes nothing
    and gives the plan. `passphrase` gives that of a named key. Raises UsageError before any work where the recipe or a
    stage's name is wrong, SteelyardError where the workspace is in use, the ledger was changed, or a stage fails, and
    Paused where one waits to be countersigned; what was finished before stays cached.
    """
    progress = progress or Silent()
    recipe = load_recipe(path, KINDS)
    for option, names in (("--force", force), ("--until", [until] if until else [])):
        for name in names:
            if name not in recipe.stages:
                hint = nearest(name, recipe.stages)
                raise UsageError(f"{option} {name}: no such stage{hint} (in {path}: {', '.join(recipe.stages)})")
    wanted = _needed(recipe, until) if until else set(recipe.stages)
    externals = {name: _externals(recipe, stage, workspace) for name, stage in recipe.stages.items() if name in wanted}
    stages = [stage for name, stage in recipe.stages.items() if name in wanted]
    if dry_run:
        if not (workspace / "ledger.sqlite").exists():
            return [StageResult(stage.name, stage.kind.name, "to run", "first run") for stage in stages]
        with Ledger(workspace / "ledger.sqlite", read_only=True) as ledger:
            return _Run(recipe, workspace, ledger, externals, set(force), progress, passphrase).plan(stages)
    with _locked(workspace), Ledger(workspace / "ledger.sqlite") as ledger:
        return _Run(recipe, workspace, ledger, externals, set(force), progress, passphrase).execute(stages)


@dataclass(frozen=True)
class _Check:
    """A stage, looked at before it runs: its key and parts, and the earlier event that still holds (a hit)."""

    key: str
    parts: dict[str, Any]
    hit: Event | None
    why: str


class _Run:
    def __init__(
        self,
        recipe: Recipe,
        workspace: Path,
        ledger: Ledger,
        externals: dict[str, dict[str, str]],
        force: set[str],
        progress: Progress,
        passphrase: Callable[[str], bytes] | None,
    ) -> None:
        ledger.verify()  # the cache believes what the ledger says
        self.recipe, self.workspace, self.ledger, self.externals = recipe, workspace, ledger, externals
        self.force, self.progress, self.passphrase = force, progress, passphrase
        self.base = workspace.absolute().parent
        self.finished = ledger.events("stage.finished")
        self.incomplete = ledger.events("stage.incomplete")
        self.inputs: dict[str, Input] = {}

    def plan(self, stages: list[Stage]) -> list[StageResult]:
        """What `execute` would do, as far as can be known without doing it."""
        results = []
        for stage in stages:
            waits = [other for other in stage.inputs.values() if other not in self.inputs]
            if waits:
                why = "forced" if stage.name in self.force else f"runs after {', '.join(waits)}, if that changes"
                results.append(StageResult(stage.name, stage.kind.name, "to run", why))
                continue
            start = time.monotonic()
            check = self._check(stage)
            if check.hit is None:
                results.append(StageResult(stage.name, stage.kind.name, "to run", check.why))
            else:
                results.append(self._reuse(stage, check.hit, check.why, start))
        return results

    def execute(self, stages: list[Stage]) -> list[StageResult]:
        """Do the stages, or reuse what is there."""
        results: list[StageResult] = []
        run: str | None = None
        try:
            for stage in stages:
                start = time.monotonic()
                check = self._check(stage)
                if check.hit is not None:
                    results.append(self._reuse(stage, check.hit, check.why, start))
                    continue
                self.progress.say(f"{stage.name}: to run: {check.why}")
                run = run or self.ledger.run_start("recipe", {"recipe": self.recipe.name})
                results.append(self._do(stage, check, start))
        except BaseException as error:  # Ctrl-C too: the ledger says how it ended
            if run is not None:
                status = "paused" if isinstance(error, Paused) else "failed"
                status = status if isinstance(error, Exception) else "interrupted"
                self.ledger.run_finish(run, status, {"stage": stage.name, "error": type(error).__name__})
            raise
        if run is not None:
            self.ledger.run_finish(run, "finished")
        return results

    # -- one stage ---------------------------------------------------------------------------------------------------

    def _check(self, stage: Stage) -> _Check:
        parts = {
            "kind": stage.kind.name,
            "config": stage.config.model_dump(mode="json", exclude={"kind", *stage.kind.references}),
            "inputs": {key: self.inputs[other].digest for key, other in stage.inputs.items()},
            "externals": self.externals[stage.name],
            "code": digest([code_digest(*stage.kind.rooms), sha256_hex(inspect.getsource(type(stage.kind)).encode())]),
        }
        key = digest(parts)
        if stage.name in self.force:
            return _Check(key, parts, None, "forced")
        same = [event for event in self.finished if event.payload["key"] == key]
        if not same:
            return _Check(key, parts, None, self._what_changed(stage, parts))
        damage = self._damage(same[-1])
        if damage:
            return _Check(key, parts, None, f"output damaged: {damage}")
        return _Check(key, parts, same[-1], "nothing changed")

    def _what_changed(self, stage: Stage, parts: dict[str, Any]) -> str:
        earlier = [
            event
            for event in self.finished
            if event.payload["recipe"] == self.recipe.name and event.payload["stage"] == stage.name
        ]
        if not earlier:
            again = any(event.payload["key"] == digest(parts) for event in self.incomplete)
            return "incomplete before" if again else "first run"
        before = earlier[-1].payload
        changes = []
        if before["kind"] != parts["kind"]:
            changes.append("kind changed")
        for part, text in (("config", "config changed"), ("inputs", "input changed"), ("externals", "input changed")):
            keys = sorted(key for key in {*before[part], *parts[part]} if before[part].get(key) != parts[part].get(key))
            if keys:
                changes.append(f"{text} ({', '.join(keys)})")
        if before["code"] != parts["code"]:
            changes.append(f"code changed ({', '.join(stage.kind.rooms)})")
        return ", ".join(changes)

    def _reuse(self, stage: Stage, event: Event, why: str, start: float) -> StageResult:
        payload = event.payload
        path = None if payload["path"] is None else self.base / payload["path"]
        self.inputs[stage.name] = self._input(stage, path, payload["outputs"], payload["summary"])
        seconds = time.monotonic() - start
        self.progress.say(f"{stage.name}: cached, {len(payload['outputs'])} files rehashed in {seconds:.1f} s")
        shown = None if path is None else _short(path)
        return StageResult(stage.name, stage.kind.name, "cached", why, shown, payload["summary"], seconds)

    def _do(self, stage: Stage, check: _Check, start: float) -> StageResult:
        place = self._place(stage, check)
        outcome = stage.kind.run(
            Context(
                recipe=self.recipe.name,
                stage=stage.name,
                config=stage.config,
                workspace=self.workspace,
                place=place,
                ledger=self.ledger,
                progress=self.progress,
                earlier=self._earlier(),
                passphrase=self._passphrase,
            ),
            {key: self.inputs[other] for key, other in stage.inputs.items()},
        )
        outputs = self._hashed(outcome)
        seconds = time.monotonic() - start
        payload = {
            "recipe": self.recipe.name,
            "stage": stage.name,
            "key": check.key,
            **check.parts,
            "path": None if outcome.path is None else self._relative(outcome.path),
            "outputs": outputs,
            "summary": outcome.summary,
            "seconds": round(seconds, 3),
        }
        if outcome.incomplete:
            payload |= {"incomplete": outcome.incomplete}
            self.incomplete.append(self.ledger.append("stage.incomplete", payload))
            self.progress.say(f"{stage.name}: INCOMPLETE, so the next run does it again: {outcome.incomplete}")
        else:
            self.finished.append(self.ledger.append("stage.finished", payload))
        self.inputs[stage.name] = self._input(stage, outcome.path, outputs, outcome.summary)
        self.progress.say(f"{stage.name}: done in {seconds:.1f} s")
        return StageResult(stage.name, stage.kind.name, "done", check.why, outcome.path, outcome.summary, seconds)

    def _place(self, stage: Stage, check: _Check) -> Path:
        """The stage's path in the workspace. Leftovers of a killed run are removed, except where the kind resumes."""
        folder = self.workspace / stage.kind.room
        first = folder / f"{stage.kind.name}-{check.key[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f".{first.name}*"):
            _remove(leftover)
        if not stage.kind.resumable:
            _remove(first)
            return first
        # A finished or damaged run is evidence and stays; an unfinished one is gone on with unless forced.
        made = self._earlier()
        number, place = 1, first
        while place.absolute() in made or (place.exists() and stage.name in self.force):
            number += 1
            place = first.with_name(f"{first.name}-{number}")
        return place

    def _input(self, stage: Stage, path: Path | None, outputs: Mapping[str, str], summary: dict[str, Any]) -> Input:
        # By name within the path handed on, so that the same content elsewhere has the same digest.
        prefix = "" if path is None else self._relative(path)
        content = sorted([name.removeprefix(prefix), value] for name, value in outputs.items())
        inputs = {key: self.inputs[other] for key, other in stage.inputs.items()}
        whole = digest([content, {key: given.digest for key, given in inputs.items()}])
        return Input(stage.name, None if path is None else _short(path), whole, summary, inputs)

    def _passphrase(self, name: str) -> bytes:
        if self.passphrase is None:
            raise UsageError(f"key {name!r} needs its passphrase, and nobody gave one")
        return self.passphrase(name)

    # -- files -------------------------------------------------------------------------------------------------------

    def _relative(self, path: Path) -> str:
        """As the ledger names it: below the folder of the workspace where it lies there, else absolute."""
        path = path.absolute()
        return path.relative_to(self.base).as_posix() if path.is_relative_to(self.base) else path.as_posix()

    def _earlier(self) -> frozenset[Path]:
        paths = (event.payload["path"] for event in (*self.finished, *self.incomplete))
        return frozenset(self.base / path for path in paths if path is not None)

    def _hashed(self, outcome: Outcome) -> dict[str, str]:
        roots = [path for path in (outcome.path, *outcome.extra) if path is not None]
        files = [file for root in roots for file in _files(root)]
        with ThreadPoolExecutor() as pool:
            return dict(zip(map(self._relative, files), pool.map(sha256_file, files), strict=True))

    def _damage(self, event: Event) -> str | None:
        """What is wrong with the files of a finished stage, or None where all are as they were."""
        outputs: dict[str, str] = event.payload["outputs"]
        root = None if event.payload["path"] is None else self.base / event.payload["path"]
        if root is not None and root.exists():
            added = [file for file in map(self._relative, _files(root)) if file not in outputs]
            if added:
                return f"{added[0]} was added"
        for name in outputs:
            path = self.base / name
            if path.is_symlink() or not path.is_file():
                return f"{name} is missing"
        with ThreadPoolExecutor() as pool:
            found = pool.map(lambda name: sha256_file(self.base / name), outputs)
            for (name, expected), now in zip(outputs.items(), found, strict=True):
                if now != expected:
                    return f"{name} was changed"
        return None


def _files(root: Path) -> list[Path]:
    """Every file (or link) at or below `root`, sorted."""
    if root.is_symlink() or not root.is_dir():
        return [root]
    return sorted(path for path in root.rglob("*") if path.is_symlink() or not path.is_dir())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _short(path: Path) -> Path:
    """Relative to the current folder where it lies below it: for people."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _needed(recipe: Recipe, name: str) -> set[str]:
    return {name}.union(*(_needed(recipe, other) for other in recipe.stages[name].inputs.values()))


def _externals(recipe: Recipe, stage: Stage, workspace: Path) -> dict[str, str]:
    try:
        return stage.kind.externals(stage.config, workspace)
    except FieldError as error:
        raise recipe.located(("stages", stage.name, error.field), str(error)) from error


@contextmanager
def _locked(workspace: Path) -> Iterator[None]:
    """One run at a time in a workspace; the lock goes with the process, however that ends."""
    try:
        workspace.mkdir(parents=True, exist_ok=True)
        handle = os.open(workspace / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise SteelyardError(f"{error.filename}: the workspace cannot be used: {error.strerror}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(handle, 32, 0).decode(errors="replace").strip() or "unknown"
            message = f"{workspace}: in use by process {pid}: wait until it is done, or give another --workspace"
            raise SteelyardError(message) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)
