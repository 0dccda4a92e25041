"""One finished chain and one bundle a session; tests that damage them take a copy."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from granting import Desk
from killing import Killable
from scenario import Chain, make_battery, make_policy

Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def built(once: Once, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Read only."""
    folder = once("release-built", lambda folder: Chain.build(folder / "root"))
    return _chain(folder / "root").copy(tmp_path_factory.mktemp("chain") / "root")


def _chain(root: Path) -> Chain:
    """What `Chain.build` made there."""
    return Chain(root, make_battery(), (make_policy(),))


@pytest.fixture
def chain(built: Chain, tmp_path: Path) -> Chain:
    """A copy to damage."""
    return built.copy(tmp_path / "chain")


@pytest.fixture(scope="session")
def released(built: Chain, tmp_path_factory: pytest.TempPathFactory) -> tuple[Chain, Path]:
    """A chain and its bundle. Read only."""
    chain = built.copy(tmp_path_factory.mktemp("released") / "root")
    return chain, chain.bundle()


@pytest.fixture
def bundle_copy(released: tuple[Chain, Path], tmp_path: Path) -> Callable[[], Path]:
    """Makes copies of the bundle to damage."""

    def make() -> Path:
        return Path(shutil.copytree(released[1], tmp_path / "bundle"))

    return make


@pytest.fixture(scope="module")
def killable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killable]:
    running = Killable(tmp_path_factory.mktemp("killable"))
    yield running
    running.process.kill()
    running.process.wait()


@pytest.fixture(scope="session")
def granting(once: Once, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """A workspace that grants. Read only."""
    folder = once("release-granting", lambda folder: Desk.build(folder / "root"))
    return Desk.at(folder / "root").copy(tmp_path_factory.mktemp("granting") / "root")


@pytest.fixture
def desk(granting: Desk, tmp_path: Path) -> Desk:
    """A copy to damage."""
    return granting.copy(tmp_path / "desk")
