"""One finished run, one bundle, one interrupted run and the wrong runs, made once through the command line."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from commands import POLICIES, Done, interrupt, release, run, safety_run, steelyard
from scenario import Chain, make_battery, make_model


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """A model folder and a key, not tested yet. Read only."""
    chain = Chain(tmp_path_factory.mktemp("made") / "root", make_battery(), POLICIES)
    make_model(chain.model)
    steelyard("key", "new", "me", "--workspace", chain.root)
    return chain


@pytest.fixture(scope="session")
def built(made: Chain, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The model tested under every policy. Read only."""
    chain = made.copy(tmp_path_factory.mktemp("built") / "root")
    safety_run(chain)
    return chain


@pytest.fixture
def chain(built: Chain, tmp_path: Path) -> Chain:
    """A copy to damage."""
    return built.copy(tmp_path / "chain")


@pytest.fixture
def untested(made: Chain, tmp_path: Path) -> Chain:
    """A copy of what was not tested yet."""
    return made.copy(tmp_path / "chain")


@pytest.fixture(scope="session")
def released(built: Chain, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The model released as `releases/tiny`. Read only."""
    chain = built.copy(tmp_path_factory.mktemp("released") / "root")
    release(chain, code=0)
    return chain


@pytest.fixture
def bundle(released: Chain, tmp_path: Path) -> Path:
    """A copy of the bundle to damage."""
    return Path(shutil.copytree(released.root / "releases" / "tiny", tmp_path / "tiny"))


@pytest.fixture(scope="session")
def interrupted(made: Chain, tmp_path_factory: pytest.TempPathFactory) -> tuple[Chain, Done]:
    """A run that was interrupted after its first batch, and what it said. Read only."""
    chain = made.copy(tmp_path_factory.mktemp("interrupted") / "root")
    return chain, interrupt(chain)


@pytest.fixture(scope="session")
def wrong(built: Chain, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The runs of wrong_runs.py, in folders `cut`, `template` and `repeated`. Read only but for the ledger."""
    chain = built.copy(tmp_path_factory.mktemp("wrong") / "root")
    run([sys.executable, str(Path(__file__).parent / "wrong_runs.py"), str(chain.root)])
    return chain
