"""What a bundle may cost whoever checks it: hostile plans, lines, sizes and numbers are refused in bounded time and
memory; pages that the journal does not bear out are refused before anybody vouches for them."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forging import sparse_weights
from scenario import Chain, edit_lines, make_battery
from withdrawing import WEIGHTS

from steelyard.base.canonical import canonical_json, sha256_hex
from steelyard.base.errors import FormatError, SteelyardError
from steelyard.model import identity
from steelyard.release import checks_files
from steelyard.release.layout import JOURNAL, MANIFEST, REPORT_HTML, REPORT_MARKDOWN
from steelyard.release.verify import examine
from steelyard.safety.journal import check_journal, read_journal
from steelyard.scorers.base import Calibration

Released = tuple[Chain, Path]
Copy = Callable[[], Path]


# -- pages -----------------------------------------------------------------------------------------------------------


def relist(folder: Path, name: str) -> None:
    """Write a changed file's size and SHA-256 into the manifest, as the evaluator can before he signs."""
    data = (folder / name).read_bytes()
    manifest = json.loads((folder / MANIFEST).read_bytes())
    for entry in manifest["files"]:
        if entry["path"] == name:
            entry |= {"size": len(data), "sha256": sha256_hex(data)}
    (folder / MANIFEST).write_bytes(canonical_json(manifest) + b"\n")


@pytest.mark.parametrize("name", [REPORT_HTML, REPORT_MARKDOWN])
def test_a_page_that_says_something_else(
    chain: Chain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """The evaluator alone lies on a page: signed as the candidate is, it is neither approved nor sealed, and a bundle
    in which it lies is told as not checked."""
    from steelyard.release import writing

    real = writing.save_report

    def lying(report: Any, folder: Path) -> None:
        real(report, folder)
        page = folder.parent / name
        page.write_bytes(page.read_bytes() + b" ")

    policy = chain.people(approvals=1, witnesses=None)
    with monkeypatch.context() as patch:
        patch.setattr(writing, "save_report", lying)
        with pytest.raises(SteelyardError, match=f"{name}: is not the page that this version"):
            chain.candidate()
        # An evaluator who has taken the check out of his own copy.
        patch.setattr("steelyard.release.verify._check_pages", lambda *_: None)
        candidate = chain.candidate()
        whole = chain.candidate(chain.root / "again" / "tiny")
    with pytest.raises(SteelyardError, match=f"{name}: is not the page that this version"):
        chain.approve(candidate, "bob")
    with pytest.raises(SteelyardError, match=f"{name}: is not the page that this version"):
        chain.seal(candidate)
    assert policy.exists()
    assert not list((chain.root / "sealed").glob("*"))
    monkeypatch.setattr("steelyard.release.bundle._examined", _unchecked(chain))
    chain.approve(whole, "bob")
    bundle = chain.seal(whole)
    found = dict(chain.verify(bundle, trust=policy, policy=None).seen)
    assert found[name].startswith("NOT CHECKED")


def _unchecked(chain: Chain) -> Callable[..., Any]:
    """Approvers and releasers who do not look at pages either."""

    def examined(folder: Path, trust: Any, stage: Any, now: Any, progress: Any, _what: str) -> Any:
        return examine(folder, trust=trust, stage=stage, now=now, progress=progress)

    return examined


# -- plans -----------------------------------------------------------------------------------------------------------


def test_a_plan_of_many_empty_batches(released: Released, bundle_copy: Copy) -> None:
    """A journal of some ten kilobytes that asks for millions of lines is refused without making them."""
    bundle = bundle_copy()

    def bomb(lines: list[bytes]) -> list[bytes]:
        plan = json.loads(lines[0])
        plan["batches"] = [[]] * 20_000
        canaries = next(iter(plan["canaries"].values()))
        plan["canaries"] = dict.fromkeys(plan["canaries"], canaries * 10)
        return [canonical_json(plan)]

    edit_lines(bundle / JOURNAL, bomb)
    assert (bundle / JOURNAL).stat().st_size < 200_000
    journal = read_journal(bundle / JOURNAL)
    tracemalloc.start()
    begun = time.monotonic()
    try:
        findings = check_journal(journal, make_battery())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert any(finding.code == "unfinished" and "asks for some" in finding.message for finding in findings)
    assert peak < 20 << 20
    assert time.monotonic() - begun < 5
    assert not released[0].verify(bundle).ok


# -- lines -----------------------------------------------------------------------------------------------------------


def test_a_card_of_many_blanks(released: Released, bundle_copy: Copy) -> None:
    """A row of the card that is nothing but blanks takes time in proportion to its length."""
    bundle = bundle_copy()
    card = (bundle / "README.md").read_text()
    took = []
    for length in (20_000, 40_000):
        marked = card.replace("<!-- steelyard:end", "a" + " " * length + "a\n<!-- steelyard:end", 1)
        assert marked != card
        (bundle / "README.md").write_text(marked)
        begun = time.monotonic()
        assert not released[0].verify(bundle).ok
        took.append(time.monotonic() - begun)
    assert max(took) < 3


# -- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00001.safetensors", "tokenizer.json"])
def test_a_sparse_file_of_another_size_is_not_read(
    released: Released, bundle_copy: Copy, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A terabyte costs no disk, and would take an hour to hash: its size is compared first."""
    bundle, size = bundle_copy(), 1 << 40
    if name == "model.safetensors":
        sparse_weights(bundle / name, size)
    else:
        with (bundle / name).open("ab") as file:
            file.truncate(size)

    def hashed(path: Path, *_: Any) -> str:
        assert os.path.getsize(path) < size, f"{path} is read whole"
        return sha256_hex(Path(path).read_bytes())

    monkeypatch.setattr(checks_files, "sha256_file", hashed)
    for one in ("_hash_file", "_hash_range") if name != "tokenizer.json" else ():
        monkeypatch.setattr(identity, one, lambda *_: pytest.fail("the weights are hashed"))
    begun = time.monotonic()
    found = released[0].verify(bundle)
    assert any(name in finding.message for finding in found.findings)
    assert not found.ok
    assert time.monotonic() - begun < 5


# -- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["positives", "negatives", "true_positives", "true_negatives", "threshold"])
@pytest.mark.parametrize("value", [10**400, -(10**400), 10**10])
def test_numbers_of_a_calibration(released: Released, tmp_path: Path, key: str, value: int) -> None:
    """Of which rates are computed: no float holds them."""
    fields: dict[str, Any] = {
        "threshold": 0.5,
        "true_positives": 9,
        "positives": 10,
        "true_negatives": 9,
        "negatives": 10,
        "source": "labels",
        "measured": "2026-11-01",
    }
    Calibration(**fields)
    with pytest.raises(ValueError, match=key if key.startswith("true") is False else "items|greater"):
        Calibration(**(fields | {key: value}))

    def edit(lines: list[bytes]) -> list[bytes]:
        plan = json.loads(lines[0])
        calibration = next(iter(next(iter(plan["scorers"].values()))["categories"].values()))
        calibration[key] = value
        return [json.dumps(plan, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode(), *lines[1:]]

    (tmp_path / "journal.jsonl").write_bytes((released[1] / JOURNAL).read_bytes())
    edit_lines(tmp_path / "journal.jsonl", edit)
    with pytest.raises(FormatError, match=r"journal\.jsonl:1: "):
        read_journal(tmp_path / "journal.jsonl")


# -- the list of withdrawn releases ----------------------------------------------------------------------------------


def test_a_withdrawn_candidate_is_neither_approved_nor_sealed(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the trust file names a list, whoever approves and seals asks it, as `verify` does."""
    from datetime import UTC, datetime, timedelta

    from withdrawing import content, entry

    from steelyard.base.canonical import sha256_file
    from steelyard.release.keys import load_signer
    from steelyard.release.withdrawal import list_bytes

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    signers = {"signers": ["dora.pub.pem", "bob.pub.pem"], "quorum": 2}
    chain.people(approvals=1, witnesses=None, withdrawal=signers)
    candidate = chain.candidate()
    chain.approve(candidate, "bob")
    now = datetime.now(UTC)
    what = content(
        [entry(manifest=sha256_file(candidate / MANIFEST), weights=WEIGHTS, name="tiny")],
        issued=now.isoformat(timespec="seconds"),
        expires=(now + timedelta(days=5)).isoformat(timespec="seconds"),
    )
    from scenario import PASSPHRASE

    hands = [load_signer(chain.keys, name, PASSPHRASE) for name in ("dora", "bob")]
    (chain.keys / "withdrawn.json").write_bytes(list_bytes(what, hands))
    path = chain.keys / "trust.yaml"
    trust = json.loads(path.read_text())
    trust["withdrawal"]["list"] = "withdrawn.json"
    path.write_text(json.dumps(trust))
    for act in (lambda: chain.approve(candidate, "carol"), lambda: chain.seal(candidate)):
        with pytest.raises(SteelyardError, match="withdrawn"):
            act()
    assert not list((chain.root / "sealed").glob("*"))
