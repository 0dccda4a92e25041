"""`steelyard withdraw` and `steelyard releases` as people type them, up to a stranger's verify."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from commands import Done, refused, steelyard
from scenario import PASSPHRASE, Chain
from withdrawing import content

from steelyard.ledger.ledger import Ledger
from steelyard.release.keys import load_signer, new_key
from steelyard.release.withdrawal import list_bytes


@pytest.fixture
def chain(released: Chain, tmp_path: Path) -> Chain:
    """A released model, keys of three people, and a trust file of two of them."""
    chain = released.copy(tmp_path / "chain")
    for name in ("dora", "bob", "mallory"):
        new_key(chain.keys, name, PASSPHRASE)
    trust = {
        "format": 1,
        "policy": chain.policy_file.name,
        "evaluators": ["keys/me.pub.pem"],
        "releasers": ["keys/me.pub.pem"],
        "withdrawal": {"signers": ["keys/dora.pub.pem", "keys/bob.pub.pem"], "quorum": 2},
    }
    (chain.root / "trust.yaml").write_text(json.dumps(trust))
    return chain


def bundle(chain: Chain) -> Path:
    return chain.root / "releases" / "tiny"


def listed(chain: Chain) -> Path:
    return chain.root / "withdrawn.json"


def withdraw(chain: Chain, *what: Any, code: int = 0, trust: bool = True) -> Done:
    more = ["--trust", chain.root / "trust.yaml"] if trust else []
    return steelyard("withdraw", *what, "--list", listed(chain), *more, "--workspace", chain.root, code=code)


def check(chain: Chain, *more: Any, code: int, folder: Path | None = None) -> Done:
    place = ["--trust", chain.root / "trust.yaml", "--state", chain.root / "stranger.json"]
    return steelyard("verify", folder or bundle(chain), *place, *more, code=code)


def test_from_a_proposal_to_everyone_who_verifies(chain: Chain, tmp_path: Path) -> None:
    site = Path(shutil.copytree(bundle(chain), tmp_path / "site" / "tiny"))
    copy = Path(shutil.copytree(bundle(chain), tmp_path / "a copy under another name"))
    with Ledger(chain.root / "ledger.sqlite") as ledger:
        manifest = ledger.events("release.bundled")[-1].payload["bundle"]
        ledger.append("release.published", {"destination": str(site), "manifest": manifest})
    first = ["--refresh", "--name", "example", "--key", "dora", "--key", "bob"]
    assert "number 1, is in place" in withdraw(chain, *first).out
    check(chain, "--list", listed(chain), code=0)

    begin = [bundle(chain), "--reason", "the toxicity test was missed", "--key", "dora"]
    assert "1 more signature" in withdraw(chain, *begin).out
    check(chain, "--list", listed(chain), code=0)
    done = withdraw(chain, "--sign", f"{listed(chain)}.proposal", "--key", "bob")
    assert "the toxicity test was missed" in done.out  # shown before it is signed
    assert f"taken down: {site}" in done.out

    refused(check(chain, "--list", listed(chain), code=1, folder=copy), "withdrawn", "the toxicity test was missed")
    check(chain, code=0, folder=copy)  # who asks no list is not told
    assert {path.name for path in site.iterdir()} == {"README.md", "index.html", "notice.json"}
    (aside,) = site.parent.glob("tiny.withdrawn-*")
    assert (aside / "model.safetensors").is_file()
    assert aside.stat().st_mode & 0o077 == 0
    assert {path.suffix for path in (chain.root / "notices").iterdir()} == {".html", ".md"}

    found = steelyard("releases", "--workspace", chain.root, "--json").json
    assert [(one["name"], one["state"]) for one in found] == [("tiny", "withdrawn")]
    assert found[0]["taken_down"] == [str(site)]
    table = steelyard("releases", "--workspace", chain.root).out
    assert "withdrawn" in table
    assert "the toxicity test was missed" in table
    again = withdraw(chain, *begin)
    assert "is in place already" in again.out
    shutil.rmtree(site)
    shutil.copytree(bundle(chain), site)  # somebody puts it back
    (aside / "thesis.tex").write_text("of somebody else")
    assert f"taken down: {site}" in withdraw(chain, *begin).out
    kept = withdraw(chain, *begin, "--delete", code=1)
    assert f"NOT taken down: {site}" in kept.out
    assert "thesis.tex" in kept.out
    (aside / "thesis.tex").rename(tmp_path / "thesis.tex")
    assert f"taken down: {site}" in withdraw(chain, *begin, "--delete").out
    assert [path.name for path in site.parent.iterdir()] == ["tiny"]
    assert not list(site.parent.rglob("model.safetensors"))

    before = Path(shutil.copy(listed(chain), tmp_path / "second.json"))
    assert withdraw(chain, "--refresh", "--key", "dora", "--key", "bob", "--json").json["list"]["sequence"] == 3
    refused(check(chain, "--list", listed(chain), code=1), "withdrawn")
    refused(check(chain, "--list", before, code=1), "list-rollback")


def test_the_list_that_the_trust_file_names_is_asked_without_an_option(chain: Chain) -> None:
    trust = json.loads((chain.root / "trust.yaml").read_text())
    trust["withdrawal"] |= {"list": "withdrawn.json", "name": "example"}
    (chain.root / "trust.yaml").write_text(json.dumps(trust))
    refused(check(chain, code=1), "list", "withdrawn.json")  # there is none yet: nobody knows
    withdraw(chain, "--refresh", "--name", "example", "--key", "dora", "--key", "bob")
    check(chain, code=0)
    withdraw(chain, bundle(chain), "--reason", "toxic", "--key", "dora", "--key", "bob")
    refused(check(chain, code=1), "withdrawn", "toxic")
    trust["withdrawal"]["name"] = "another"
    (chain.root / "trust.yaml").write_text(json.dumps(trust))
    refused(check(chain, code=1), "list-name", "your trust file asks for 'another'")


def test_what_is_withdrawn_is_not_published_and_no_stale_list_is_asked(chain: Chain, tmp_path: Path) -> None:
    def publish(name: str, source: Path, code: int, *more: object) -> Done:
        out = tmp_path / "site" / name
        place = ["--trust", chain.root / "trust.yaml", "--workspace", chain.root, "--list", source, *more]
        done = steelyard("publish", bundle(chain), "--to", out, *place, code=code)
        if code:
            refused(done, "does not verify, so nothing is published")
            assert not out.exists()
        return done

    # One whose end is over says nothing of what was withdrawn since.
    over = content(issued="2026-01-01T00:00:00+00:00", expires="2026-01-02T00:00:00+00:00")
    expired = tmp_path / "expired.json"
    expired.write_bytes(list_bytes(over, [load_signer(chain.keys, name, PASSPHRASE) for name in ("dora", "bob")]))
    refused(
        publish("expired", expired, 1, "--state", tmp_path / "other.json"), "expired at 2026-01-02", "fetch a newer one"
    )

    withdraw(chain, "--refresh", "--name", "mine", "--key", "dora", "--key", "bob")
    first = Path(shutil.copy(listed(chain), tmp_path / "first.json"))
    assert "published: " in publish("tiny", first, 0).out
    verified = ["--list", first, "--state", tmp_path / "state.json"]
    steelyard("verify", tmp_path / "site" / "tiny", "--trust", chain.root / "trust.yaml", *verified)

    withdraw(chain, bundle(chain), "--reason", "the toxicity test was missed", "--key", "dora", "--key", "bob")
    refused(publish("again", listed(chain), 1), "the toxicity test was missed")
    # The list of before, which does not name it, is not asked any more.
    refused(publish("stale", first, 1), "it was rolled back")


def test_one_person_withdraws_by_name_with_one_key(chain: Chain) -> None:
    begin = ["tiny", "--reason", "a fault", "--key", "me", "--name", "mine", "--expires", "12h"]
    done = withdraw(chain, *begin, trust=False)
    assert "signed by the keys given" in done.out
    shutil.rmtree(chain.root / "artifacts")
    found = steelyard(
        "withdraw", "tiny", *begin[1:], "--list", chain.root / "b.json", "--workspace", chain.root, code=1
    )
    assert "--weights" in found.err  # the journal that told them is gone
    stranger = ["--key", chain.public, "--key", chain.keys / "dora.pub.pem", "--policy", chain.policy_file]
    shown = ["--list", listed(chain), "--state", chain.root / "state.json"]
    refused(steelyard("verify", bundle(chain), *stranger, *shown, code=1), "withdrawn: ")


def test_what_is_refused(chain: Chain) -> None:
    reason = ["--reason", "a fault"]
    for what, code in (
        ([bundle(chain), "--key", "dora"], 2),
        ([bundle(chain), "--reason", " ", "--key", "dora"], 2),
        ([bundle(chain), *reason], 2),
        ([*reason, "--key", "dora"], 2),
        ([bundle(chain), "--refresh", *reason, "--key", "dora"], 2),
        ([bundle(chain), *reason, "--key", "dora", "--expires", "1y"], 2),
        ([bundle(chain), *reason, "--key", "dora", "--expires", "400d", "--name", "x"], 2),
        ([bundle(chain), *reason, "--key", "dora", "--hub", "gone"], 2),
        ([bundle(chain), *reason, "--key", "dora"], 2),  # the first list needs a name
        ([bundle(chain), *reason, "--key", "mallory", "--name", "x"], 1),
        ([bundle(chain), *reason, "--key", "nobody", "--name", "x"], 1),
        (["unheard-of", *reason, "--key", "dora", "--name", "x"], 1),
        ([chain.model, *reason, "--key", "dora", "--name", "x"], 1),
        (["--sign", chain.root / "absent", "--key", "dora"], 2),
        ([bundle(chain), *reason, "--key", "dora", "--name", "x", "--replaced-by", bundle(chain)], 2),
    ):
        withdraw(chain, *what, code=code)
    assert not listed(chain).exists()
    assert not listed(chain).with_name("withdrawn.json.proposal").exists()
    steelyard("releases", "--workspace", chain.root, "--list", listed(chain), code=2)
    steelyard("releases", "--workspace", chain.root / "elsewhere", code=2)


def test_releases_asks_the_list_of_the_trust_file(chain: Chain, tmp_path: Path) -> None:
    """What was withdrawn from another workspace is told, as by `verify`, once the trust file names the list."""
    other = chain.copy(tmp_path / "other")
    begin = [bundle(other), "--reason", "the toxicity test was missed", "--key", "dora", "--key", "bob"]
    withdraw(other, *begin, "--name", "example")
    shutil.copyfile(listed(other), listed(chain))
    path = chain.root / "trust.yaml"
    asked = ("releases", "--workspace", chain.root, "--trust", path)
    assert "names no list (withdrawal.list): give --list" in steelyard(*asked, code=2).err
    trust = json.loads(path.read_text())
    trust["withdrawal"] |= {"list": "withdrawn.json", "name": "example"}
    path.write_text(json.dumps(trust))
    assert [one["state"] for one in steelyard(*asked, "--json").json] == ["withdrawn"]
    assert [one["state"] for one in steelyard("releases", "--workspace", chain.root, "--json").json] == ["released"]
    refused(check(chain, code=1), "withdrawn", "the toxicity test was missed")
