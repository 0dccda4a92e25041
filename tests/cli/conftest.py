"""Finished runs, a bundle, an interrupted run and the wrong runs, made once for all test processes through the command
line."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from commands import POLICIES, Done, interrupt, release, run, safety_run, steelyard
from scenario import Chain, make_battery, make_model

Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def made(once: Once, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """A model folder and a key, not tested yet. Read only."""

    def make(folder: Path) -> None:
        chain = _chain(folder / "root")
        make_model(chain.model)
        steelyard("key", "new", "me", "--workspace", chain.root)

    return _own(once("cli-made", make), tmp_path_factory)


def _chain(root: Path) -> Chain:
    return Chain(root, make_battery(), POLICIES)


def _own(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """This process's copy of what all share: some commands write policy files beside it, and to the ledger."""
    return _chain(folder / "root").copy(tmp_path_factory.mktemp(folder.name) / "root")


@pytest.fixture(scope="session")
def built(made: Chain, once: Once, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The model tested under every policy. Read only."""
    return _own(once("cli-built", lambda folder: safety_run(made.copy(folder / "root"))), tmp_path_factory)


@pytest.fixture
def chain(built: Chain, tmp_path: Path) -> Chain:
    """A copy to damage."""
    return built.copy(tmp_path / "chain")


@pytest.fixture
def untested(made: Chain, tmp_path: Path) -> Chain:
    """A copy of what was not tested yet."""
    return made.copy(tmp_path / "chain")


@pytest.fixture(scope="session")
def released(built: Chain, once: Once, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The model released as `releases/tiny`. Read only."""
    return _own(once("cli-released", lambda folder: release(built.copy(folder / "root"), code=0)), tmp_path_factory)


@pytest.fixture
def bundle(released: Chain, tmp_path: Path) -> Path:
    """A copy of the bundle to damage."""
    return Path(shutil.copytree(released.root / "releases" / "tiny", tmp_path / "tiny"))


@pytest.fixture(scope="session")
def interrupted(made: Chain, once: Once, tmp_path_factory: pytest.TempPathFactory) -> tuple[Chain, Done]:
    """A run that was interrupted after its first batch, and what it said. Read only."""
    folder = once("cli-interrupted", lambda folder: interrupt(made.copy(folder / "root")).save(folder / "done.json"))
    return _own(folder, tmp_path_factory), Done.load(folder / "done.json")


@pytest.fixture(scope="session")
def wrong(built: Chain, once: Once, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The runs of wrong_runs.py, in folders `cut`, `template` and `repeated`. Read only but for the ledger."""

    def make(folder: Path) -> None:
        chain = built.copy(folder / "root")
        run([sys.executable, str(Path(__file__).parent / "wrong_runs.py"), str(chain.root)])

    return _own(once("cli-wrong", make), tmp_path_factory)


@pytest.fixture(scope="session")
def blank(made: Chain, once: Once, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Another model, tested in the same workspace, that answers with nothing or with spaces. Read only."""

    def make(folder: Path) -> None:
        chain = made.copy(folder / "root")
        make_model(chain.root / "other", words=(" ",), seed=1)
        safety_run(chain, model=chain.root / "other", battery=make_battery(samples=1))

    return _own(once("cli-blank", make), tmp_path_factory)


@pytest.fixture(scope="session")
def faulty(made: Chain, once: Once) -> Done:
    """What `release` says of a run on four metrics, each with its own scorer of faulty.py."""

    def make(folder: Path) -> None:
        chain = made.copy(folder / "root")
        tiny, names = make_battery(), ("raises", "nan", "count", "constant")
        metrics = [
            metric.model_copy(update={"scorer": name, "category": name})
            for metric, name in zip(tiny.metrics, names, strict=False)
        ]
        scorers = {"refusal": tiny.scorers["refusal"]} | {name: f"python:faulty:{name}" for name in names}
        battery = tiny.model_copy(update={"metrics": (*metrics, *tiny.metrics[4:]), "scorers": scorers})
        safety_run(chain, battery=battery)
        release(chain).save(folder / "done.json")

    return Done.load(once("cli-faulty", make) / "done.json")
