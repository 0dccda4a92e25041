"""`steelyard grant`, each command as it is typed: the whole way from a request to a named leak."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "release"))

from granting import LICENCE, Desk, person
from scenario import PASSPHRASE

from steelyard.base.canonical import sha256_hex
from steelyard.cli import main as cli


@pytest.fixture(scope="module")
def desk(once: Any, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    folder = once("release-granting", lambda folder: Desk.build(folder / "root"))
    return Desk.at(folder / "root").copy(tmp_path_factory.mktemp("cli-granting") / "root")


class Run:
    """Runs commands; gives what they print. `code` is what they end with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], desk: Desk) -> None:
        self.monkeypatch, self.capsys, self.desk, self.code = monkeypatch, capsys, desk, 0

    def __call__(self, *arguments: object, code: int = 0) -> str:
        self.monkeypatch.setattr(sys, "argv", ["steelyard", *map(str, arguments)])
        self.monkeypatch.setenv("STEELYARD_PASSPHRASE", PASSPHRASE.decode())
        self.monkeypatch.setenv("STEELYARD_WORKSPACE", str(self.desk.root))
        found: Any = 0
        try:
            cli.main()
        except SystemExit as end:
            found = end.code or 0
        said = self.capsys.readouterr()
        assert found == code, said
        return str(said.out + said.err)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], desk: Desk) -> Run:
    return Run(monkeypatch, capsys, desk)


def test_the_whole_way(run: Run, desk: Desk, tmp_path: Path) -> None:
    run("grant", "key", "recipient", tmp_path / "box")
    run("key", "new", "ada", "--keys", tmp_path)
    given = person(
        encrypts_to=(tmp_path / "box.pub.pem").read_text(), signs_with=(tmp_path / "ada.pub.pem").read_text()
    )
    (tmp_path / "request.json").write_text(json.dumps(given))
    release = ("--release", desk.bundle)
    trust = ("--trust", desk.trust_file)
    found = json.loads(run("grant", "request", "--from", tmp_path / "request.json", *release, "--json"))
    request = found["request"]
    assert "there already" in run("grant", "request", "--from", tmp_path / "request.json", *release, code=1)
    assert "Ada Lovelace" in run("grant", "show", request)
    assert "Ada" not in run("grant", "list")
    assert "wants 2 approvals" in run("grant", "issue", request, *trust, code=1)
    assert "none of the reviewers" in run("grant", "review", request, "--key", "dora", *trust, "--yes", code=1)
    for name in ("bob", "carol"):
        said = run("grant", "review", request, "--key", name, *trust, "--days", 90, "--yes")
        assert "Analytical Engines" in said
    grant = json.loads(run("grant", "issue", request, *trust, "--json"))["grant"]
    copy, key = ("grant", "deliver", grant, *release, "--to", tmp_path / "copy"), ("--key", "dora", *trust)
    assert "countersign it first" in run(*copy, *key, code=1)
    asked = run("grant", "countersign", grant, "--key", "fay", *trust, code=2)
    assert "code's commitment" in asked
    assert "give --yes" in asked
    assert "Ada" not in asked
    run("grant", "countersign", grant, "--key", "fay", "--yes", *trust)
    assert "sealed to the recipient" in run(*copy, *key)
    run("grant", "open", tmp_path / "copy", "--key-file", tmp_path / "box.key.pem", "--to", tmp_path / "mine")
    said = run("grant", "verify", tmp_path / "mine", *trust)
    assert "CHECKED: a marked copy, derived from tested subject" in said
    assert json.loads(run("grant", "verify", tmp_path / "mine", *trust, "--json"))["copy"]["grant"] == grant
    assert "not a release" in said
    assert "VERIFIED" not in said
    said = run("verify", tmp_path / "mine", *trust, code=1)
    assert "derived from tested subject" in said
    assert f"grant {grant}" in said
    assert "VERIFIED" not in said
    receipt = ("--key", "ada", "--keys", tmp_path, *trust, "--out", tmp_path / "receipt.json")
    run("grant", "receipt", tmp_path / "mine", *receipt)
    assert grant in run("grant", "receipt", "--check", tmp_path / "receipt.json")
    said = run("grant", "name", tmp_path / "mine", *release, "--out", tmp_path / "evidence")
    assert f"named: {grant}" in said
    assert grant in (tmp_path / "evidence" / "evidence.md").read_text()
    assert (tmp_path / "evidence" / grant / "commitment.dsse.json").is_file()
    sighting = re.search(r"sighting (\d+); next: steelyard notice", said)
    assert sighting is not None
    notice = ("--kind", "takedown", "--location", "https://example.org/leak", "--out", tmp_path / "notices")
    run("notice", sighting[1], *notice)
    text = (tmp_path / "notices" / f"sighting-{sighting[1]}-takedown" / "notice.md").read_text()
    assert grant in text
    assert "Lovelace" not in text
    run("grant", "revoke", grant, "--key", "bob", *trust, "--reason", "moved on")
    revoked = desk.root / "grants" / "issued" / grant / "revocation.dsse.json"
    said = run("grant", "verify", tmp_path / "mine", *trust, "--revoked", revoked, code=1)
    assert "moved on" in said
    assert "REVOKED: " in said
    assert "Ada Lovelace" in run("grant", "show", grant)
    assert request in run("grant", "forget", request)
    said = run("grant", "list")
    assert "forgotten" in said
    assert "revoked" in said
    assert "was forgotten" in run("grant", "show", request, code=1)
    assert "none" in run("grant", "forget", "--due")


def test_the_publics_copy(run: Run, desk: Desk, tmp_path: Path) -> None:
    release, trust = ("--release", desk.bundle), ("--trust", desk.trust_file)
    (tmp_path / "terms").write_bytes(LICENCE + b"And more.\n")
    said = run("grant", "public", *release, "--licence", tmp_path / "terms", "--json")
    request = json.loads(said)["request"]
    for name in ("bob", "carol"):
        assert "the public" in run("grant", "review", request, "--key", name, *trust, "--yes")
    grant = json.loads(run("grant", "issue", request, *trust, "--json"))["grant"]
    run("grant", "countersign", grant, "--key", "fay", "--yes", *trust)
    assert "nothing of it was tested" in run("grant", "mark", grant, *release, "--to", tmp_path / "marked", *trust)
    to = ("--to", tmp_path / "copy", "--key", "dora", *trust)
    assert "a test of its own" in run("grant", "deliver", grant, *release, *to, code=1)
    assert "NOT VERIFIED" in run("verify", tmp_path / "marked", *trust, code=1)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["review", "r-x", "--key", "bob", "--yes"], 2, "16 hexadecimal digits"),
        (["show", "r-" + "0" * 16], 1, "not in this workspace's ledger"),
        (["forget"], 2, "give the id of one request, or --due"),
        (["countersign", "g-" + "0" * 16, "--trust", __file__], 2, "give --key NAME"),
        (["receipt"], 2, "to sign a receipt, or --check FILE"),
        (["list", "--workspace", "/nowhere"], 2, "no ledger here"),
        (["import", "folder"], 2, "give a repository on the Hub"),
        (["key", "new"], 1, "never replaced"),
    ],
)
def test_wrong_commands(run: Run, desk: Desk, arguments: list[str], code: int, said: str) -> None:
    if arguments[0] == "review":
        arguments = [*arguments, "--trust", str(desk.trust_file)]
    if arguments[0] == "import":
        arguments = [*arguments, "--release", str(desk.bundle)]
    assert said in run("grant", *arguments, code=code)


def test_a_yes_is_needed(run: Run, desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "request.json").write_text(json.dumps(person(email="b@example.org", licence=sha256_hex(LICENCE))))
    release = ("--release", desk.bundle)
    request = json.loads(run("grant", "request", "--from", tmp_path / "request.json", *release, "--json"))["request"]
    said = run("grant", "review", request, "--key", "bob", "--trust", desk.trust_file, code=2)
    assert "give --yes" in said
