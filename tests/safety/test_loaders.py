"""Batteries and policies that are written wrongly: one line each, naming the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safety_fakes import battery, policy

from steelyard.base.errors import UsageError
from steelyard.safety.battery import Battery, load_battery
from steelyard.safety.policy import Policy, load_policy

LOADERS = [load_policy, load_battery]


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"name: 2001-99-99\n", "not YAML"),
        (b"name: \xff\n", "not UTF-8"),
        (b"a: " + b"[" * 5000, "nested too deeply"),
        (b"? [a, b]\n: 1\n", "not YAML"),
        (b"a: &a [x, x]\nb: [*a, *a]\n", "aliases"),
        (b"#" * 16_000_001, "is over"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, load: Callable[[str], object], data: bytes, says: str) -> None:
    path = tmp_path / "strange.yaml"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=says) as error:
        load(str(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("load", LOADERS)
def test_a_folder_in_the_place_of_a_file(tmp_path: Path, load: Callable[[str], object]) -> None:
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(UsageError, match="Is a directory"):
        load(str(tmp_path / "folder.yaml"))


def test_a_battery_in_json_is_read_with_the_same_care(tmp_path: Path) -> None:
    path = tmp_path / "strange.json"
    for data in (b"[" * 200_000, b'{"seed": ' + b"9" * 5000 + b"}", b"\xff"):
        path.write_bytes(data)
        with pytest.raises(UsageError, match=r"not JSON|not UTF-8"):
            load_battery(str(path))


@pytest.mark.parametrize("name", ["../../escaped", "a/b", "", "-x", ".hidden", "a" * 65, "a\n"])
def test_a_name_that_is_no_file_name(name: str) -> None:
    for kind, one in ((Policy, policy()), (Battery, battery())):
        with pytest.raises(ValueError, match="name"):
            kind.model_validate(one.model_dump(mode="json") | {"name": name})
