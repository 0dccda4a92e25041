"""A release states its licence, and only one; nobody guesses it."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest

from steelyard.base.errors import UsageError
from steelyard.release.licenses import HUB_LICENSES, License, parse_license
from steelyard.release.lineage import resolve_license

APACHE = parse_license("apache-2.0")


def test_identifiers_of_hub_and_spdx() -> None:
    assert parse_license("Apache-2.0") == APACHE == License("apache-2.0")
    assert parse_license("AGPL-3.0-only").id == "agpl-3.0"
    assert (APACHE.spdx, parse_license("llama3.1").spdx) == ("Apache-2.0", None)
    assert parse_license("other", "acme-research", "LICENSE").title == "acme-research"


def test_every_spdx_identifier_is_one() -> None:
    pytest.importorskip("cyclonedx")
    folder = resources.files("cyclonedx") / "schema" / "_res"
    known = set(json.loads((folder / "spdx.SNAPSHOT.schema.json").read_text())["enum"])
    assert {spdx for spdx in HUB_LICENSES.values() if spdx is not None} <= known


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("apache2",), "did you mean apache-2.0"),
        (("unknown",), "none that the Hub lists"),
        (("",), "none that the Hub lists"),
        (("other",), "needs a license_name"),
        (("other", "x"), "license_link"),
        (("other", "x\ny", "LICENSE"), "license_name"),
        (("other", "x", "http://a.example"), "https:// address"),
        (("other", "x", "https://a.example/)[x](y"), "https:// address"),
        (("other", "x", "../../etc/passwd"), "https:// address"),
    ],
)
def test_what_is_no_licence_is_refused(given: tuple[str, ...], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_license(*given)


def write(folder: Path, metadata: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(f"---\n{metadata}\n---\n")
    return folder


def test_given_then_the_models_own_then_the_base_models(tmp_path: Path) -> None:
    silent, mit = tmp_path / "silent", write(tmp_path / "mit", "license: mit")
    silent.mkdir()
    gemma = write(tmp_path / "gemma", "license: gemma")
    assert resolve_license(silent, APACHE, gemma) == APACHE
    assert resolve_license(mit, None, gemma).id == "mit"
    assert resolve_license(mit, parse_license("MIT"), gemma).id == "mit"
    assert resolve_license(silent, None, gemma).id == "gemma"
    assert resolve_license(write(tmp_path / "u", "license: unknown"), APACHE) == APACHE
    assert resolve_license(write(tmp_path / "list", "license: [mit]"), None).id == "mit"
    assert resolve_license(write(tmp_path / "spdx", "license: Apache-2.0"), APACHE) == APACHE


def test_no_licence_and_two_licences_are_refused(tmp_path: Path) -> None:
    silent, mit = tmp_path / "silent", write(tmp_path / "mit", "license: mit")
    silent.mkdir()
    (silent / "LICENSE").write_text("Apache License, Version 2.0")  # read by people, not guessed from
    for base in (None, write(tmp_path / "base", "tags: [a]"), write(tmp_path / "unknown", "license: unknown")):
        with pytest.raises(UsageError, match="nobody states its licence: say --license"):
            resolve_license(silent, None, base)
    with pytest.raises(UsageError, match=r"states the licence mit, not Apache-2.0: make them one"):
        resolve_license(mit, APACHE)
    with pytest.raises(UsageError, match="each is one text"):
        resolve_license(write(tmp_path / "two", "license: [mit, gemma]"), None)
    with pytest.raises(UsageError, match=r"README.md: license: 'mine' is none"):
        resolve_license(write(tmp_path / "mine", "license: mine"), None)


def test_a_linked_file_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="names LICENSE, which is not there"):
        resolve_license(tmp_path, parse_license("other", "acme", "LICENSE"))
    (tmp_path / "LICENSE").write_text("Terms.")
    assert resolve_license(tmp_path, parse_license("other", "acme", "LICENSE")).name == "acme"
