"""Publishing: where to, that only what was verified leaves, and the folder as destination."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from publishing import There, listing, to_damage
from scenario import Chain

from steelyard.base.canonical import sha256_file, sha256_hex
from steelyard.base.errors import SteelyardError, UsageError
from steelyard.base.progress import Silent
from steelyard.model.identity import subject_of
from steelyard.release.layout import MANIFEST
from steelyard.release.publish import (
    Published,
    Release,
    ReleaseFile,
    VerifiedFile,
    parse_destination,
    publish,
    verified_release,
)
from steelyard.release.publish_folder import publish_folder


@pytest.fixture
def there(released: There, tmp_path: Path) -> There:
    return to_damage(released, tmp_path / "chain")


def checker(chain: Chain) -> Callable[[Path], Any]:
    return lambda folder: chain.verify(folder)


def publish_to(chain: Chain, bundle: Path, to: Path | str, **more: Any) -> Published:
    with chain.ledger() as ledger:
        return publish(bundle, str(to), ledger=ledger, **({"check": checker(chain)} | more))


class Counting(Silent):
    """Progress that adds up, by task, what was there and what was done."""

    def __init__(self) -> None:
        self.done: dict[str, float] = {}
        self.said: list[str] = []

    @contextmanager
    def task(self, name: str, total: float, unit: str, done: float = 0) -> Iterator[Any]:
        outer = self
        outer.done[name] = outer.done.get(name, 0.0)

        class Task:
            def advance(self, amount: float = 1, note: str = "") -> None:
                outer.done[name] += amount

        yield Task()

    def say(self, text: str) -> None:
        self.said.append(text)


# -- where to --------------------------------------------------------------------------------------------------------


def test_destinations() -> None:
    assert parse_destination("hf://org/name").repository == "org/name"
    assert parse_destination("hf://org/name", "clinic.7").text == "hf://org/name-clinic.7"
    assert parse_destination("out/here").folder == Path("out/here").absolute()


@pytest.mark.parametrize(
    ("to", "recipient"),
    [
        ("", None),
        ("s3://bucket/x", None),
        ("hf://name", None),
        ("hf://org/name@main", None),
        ("hf://org/name/file", None),
        ("hf://datasets/org/name", None),
        ("hf://org/na--me", None),
        ("hf://org/name.git", None),
        ("hf://org/../name", None),
        ("hf://org/name\n", None),
        ("hf://org/" + "n" * 100, None),
        ("hf://org/name", "a/b"),
        ("hf://org/name", ""),
        ("hf://org/name", "-x"),
        ("folder", "clinic"),
    ],
)
def test_wrong_destinations_are_usage_errors(to: str, recipient: str | None) -> None:
    with pytest.raises(UsageError):
        parse_destination(to, recipient)


def test_a_folder_has_no_hub_settings(there: There, tmp_path: Path) -> None:
    for more in ({"gated": "auto"}, {"private": True}):
        with pytest.raises(UsageError, match="settings of a repository"):
            publish_to(*there, tmp_path / "out", **more)


# -- only what was verified ------------------------------------------------------------------------------------------


def verified(path: Path, data: bytes, *, told: Any = None) -> VerifiedFile:
    path.write_bytes(data)
    return VerifiedFile(ReleaseFile(path.name, len(data), sha256_hex(data), path), told)


def test_a_verified_file_reads_as_it_is_and_counts_each_byte_once(tmp_path: Path) -> None:
    counts: list[int] = []
    data = bytes(range(256)) * 40
    file = verified(tmp_path / "x", data, told=counts.append)
    assert file.seek(0, os.SEEK_END) == len(data)
    assert file.seek(0) == 0
    assert file.read(5000) + file.read() == data
    assert file.read() == b""
    file.seek(0)
    assert file.read() == data
    assert sum(counts) == len(data)


def test_parts_can_be_read_again_from_where_they_began(tmp_path: Path) -> None:
    data = bytes(range(256)) * 40
    file = verified(tmp_path / "x", data)
    for start in (0, 4000, 8000):
        for _ in range(3):
            file.seek(start)
            assert file.read(100) == data[start : start + 100]
        file.seek(start)
        assert file.read(4000) == data[start : start + 4000]
    assert file.complete


def test_a_changed_file_never_arrives_whole(tmp_path: Path) -> None:
    data = b"a" * 1000
    for change in (b"b" * 1000, b"a" * 999, b"a" * 1001, b"a" * 999 + b"b", b""):
        file = verified(tmp_path / "x", data)
        (tmp_path / "x").write_bytes(change)
        got: list[bytes] = []
        with pytest.raises(SteelyardError, match="was changed after it was verified"):
            got.extend(iter(lambda file=file: file.read(100), b""))
        assert len(got) < 10


def test_a_part_that_changes_between_two_tries_is_seen(tmp_path: Path) -> None:
    """The first try's bytes were right; those of the second, which count, are not."""
    data = b"a" * 1_000_000  # more than is read ahead
    file = verified(tmp_path / "x", data)
    assert file.read(500_000) == data[:500_000]
    (tmp_path / "x").write_bytes(b"b" * 500_000 + b"a" * 500_000)
    file.seek(0)
    file.read(500_000)
    file.seek(500_000)
    with pytest.raises(SteelyardError, match="was changed"):
        file.read(500_000)


def test_an_empty_file_and_a_link(tmp_path: Path) -> None:
    file = verified(tmp_path / "empty", b"")
    assert file.read() == b""
    assert file.complete
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(SteelyardError, match="symbolic link"):
        VerifiedFile(replace(file.file, source=tmp_path / "link", size=1)).read()


def test_nothing_is_published_that_does_not_verify(there: There, tmp_path: Path) -> None:
    chain, bundle = there
    (bundle / "config.json").write_bytes((bundle / "config.json").read_bytes() + b" ")
    with pytest.raises(SteelyardError, match=r"does not verify, so nothing is published: config\.json"):
        publish_to(chain, bundle, tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if path.name != "chain"]
    with chain.ledger() as ledger:
        assert not ledger.events("release.publishing")


def test_nothing_is_published_under_another_policy(there: There, tmp_path: Path) -> None:
    chain, bundle = there
    with pytest.raises(SteelyardError, match="nothing is published"):
        publish_to(chain, bundle, tmp_path / "out", check=lambda folder: chain.verify(folder, policy="preview"))


@pytest.mark.parametrize("known", ["manifest", "weights"])
def test_what_was_withdrawn_is_not_published_again(there: There, tmp_path: Path, known: str) -> None:
    chain, bundle = there
    entry = {"manifest": "0" * 64, "weights": "0" * 64, "reason": "it helps\nwith harm"}
    digests = {"manifest": sha256_file(bundle / MANIFEST), "weights": subject_of(bundle, Silent()).weights}
    with chain.ledger() as ledger:
        ledger.append("release.withdrawn", entry | {known: digests[known]})
    with pytest.raises(SteelyardError, match=r"withdrawn \(it helps with harm\)"):
        publish_to(chain, bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bundle_that_is_none(tmp_path: Path, there: There) -> None:
    (tmp_path / "none" / "steelyard").mkdir(parents=True)
    with pytest.raises(SteelyardError, match=r"manifest\.json"):
        publish_to(there[0], tmp_path / "none", tmp_path / "out")


def test_a_signature_swapped_while_it_is_verified(there: There, tmp_path: Path) -> None:
    chain, bundle = there
    signing = next(iter(sorted((bundle / "steelyard").glob("*.dsse.json"))))

    def check(folder: Path) -> Any:
        result = chain.verify(folder)
        signing.write_bytes(signing.read_bytes() + b"\n")
        return result

    with pytest.raises(SteelyardError, match="changed while it was verified"):
        publish_to(chain, bundle, tmp_path / "out", check=check)


# -- to a folder -----------------------------------------------------------------------------------------------------


def test_to_a_folder(there: There, tmp_path: Path) -> None:
    chain, bundle = there
    out = tmp_path / "site" / "tiny"
    done = publish_to(chain, bundle, out)
    assert listing(out) == listing(bundle)
    assert chain.verify(out).ok
    assert [path.name for path in out.parent.iterdir()] == ["tiny"]
    assert done == Published(str(out), "tiny", sha256_file(bundle / "steelyard" / "manifest.json"), already=False)
    with chain.ledger() as ledger:
        (started,) = ledger.events("release.publishing")
        (finished,) = ledger.events("release.published")
    assert finished.payload == {
        "destination": str(out),
        "manifest": done.manifest,
        "name": "tiny",
        "weights": subject_of(bundle).weights,
        "recipient": None,
        "started": started.payload["started"],
        "finished": finished.payload["finished"],
    }
    assert started.payload["started"] <= finished.payload["finished"]


def test_once_more_is_nothing_to_do(there: There, tmp_path: Path) -> None:
    chain, bundle = there
    publish_to(chain, bundle, tmp_path / "out")
    assert publish_to(chain, bundle, tmp_path / "out").already
    with chain.ledger() as ledger:
        assert len(ledger.events("release.publishing")) == len(ledger.events("release.published")) == 1


def test_what_is_there_is_never_overwritten(there: There, tmp_path: Path) -> None:
    chain, bundle = there
    publish_to(chain, bundle, tmp_path / "out")
    for path, text in (("README.md", "mine"), ("notes.txt", "more")):
        other = Path(shutil.copytree(tmp_path / "out", tmp_path / f"with-{path}"))
        (other / path).write_text(text)
        before = listing(other)
        with pytest.raises(SteelyardError, match="never overwritten"):
            publish_to(chain, bundle, other)
        assert listing(other) == before
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(SteelyardError, match="never overwritten"):
            publish_to(chain, bundle, tmp_path / name)


def test_an_empty_folder_is_filled_and_the_bundle_itself_refused(there: There, tmp_path: Path) -> None:
    chain, bundle = there
    (tmp_path / "out").mkdir()
    assert not publish_to(chain, bundle, tmp_path / "out").already
    for inside in (bundle, bundle / "copy", bundle / "steelyard" / "copy"):
        with pytest.raises(UsageError, match="lies in the bundle"):
            publish_to(chain, bundle, inside)


def make(chain: Chain, bundle: Path) -> Release:
    return verified_release(bundle, checker(chain))


def test_it_goes_on_from_what_is_there(there: There, tmp_path: Path) -> None:
    chain, bundle = there
    partial = tmp_path / ".out.partial"
    (partial / "steelyard" / "old").mkdir(parents=True)
    shutil.copy(bundle / "model.safetensors", partial)  # kept
    inode = (partial / "model.safetensors").stat().st_ino
    data = (bundle / "config.json").read_bytes()
    (partial / "config.json").write_bytes(data[:-1] + b"?")  # copied again
    (partial / "evil.py").write_text("x")
    (partial / "tokenizer.json").symlink_to(bundle / "tokenizer.json")
    os.mkfifo(partial / "README.md")
    shutil.copy(bundle / "steelyard" / "test-result.dsse.json", partial / "steelyard")
    progress = Counting()
    release = make(chain, bundle)
    publish_folder(release, tmp_path / "out", checker(chain), progress)
    assert listing(tmp_path / "out") == listing(bundle)
    assert (tmp_path / "out" / "model.safetensors").stat().st_ino == inode
    rest = sum(file.size for file in release.content) - (bundle / "model.safetensors").stat().st_size
    assert progress.done[f"copy to {tmp_path}"] == pytest.approx(rest / 1e6)
    assert progress.said == [f"1 of {len(release.content)} files are there already"]


def test_stale_signatures_go_first(there: There, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What signs is gone from the hidden folder before anything else changes in it."""
    chain, bundle = there
    partial = Path(shutil.copytree(bundle, tmp_path / ".out.partial"))
    (partial / "extra").write_text("x")
    removed: list[str] = []
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path, **more: (removed.append(path.name), unlink(path, **more))[1])
    release = make(chain, bundle)
    publish_folder(release, tmp_path / "out", checker(chain), Silent())
    assert set(removed[: len(release.signing)]) == {Path(file.path).name for file in release.signing}


def test_a_file_changed_while_it_is_copied(there: There, tmp_path: Path) -> None:
    chain, bundle = there
    release = make(chain, bundle)
    weights = bundle / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(SteelyardError, match=r"model\.safetensors: was changed after it was verified"):
        publish_folder(release, tmp_path / "out", checker(chain), Silent())
    assert not (tmp_path / "out").exists()
    assert not chain.verify(tmp_path / ".out.partial").ok


def test_a_copy_that_does_not_verify_is_not_published(there: There, tmp_path: Path) -> None:
    chain, bundle = there
    release = make(chain, bundle)
    partial = tmp_path / ".out.partial"

    def check(folder: Path) -> Any:
        (folder / "config.json").write_text("{}")
        return chain.verify(folder)

    with pytest.raises(SteelyardError, match=r"the copy does not verify, so it is not published: config\.json"):
        publish_folder(release, tmp_path / "out", check, Silent())
    assert not (tmp_path / "out").exists()
    assert not any((partial / file.path).exists() for file in release.signing)
    publish_folder(release, tmp_path / "out", checker(chain), Silent())
    assert chain.verify(tmp_path / "out").ok


def test_one_at_a_time(there: There, tmp_path: Path) -> None:
    chain, bundle = there
    (tmp_path / ".out.partial").mkdir()
    handle = os.open(tmp_path / ".out.partial", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(SteelyardError, match="another process is publishing there"):
        publish_to(chain, bundle, tmp_path / "out")
    os.close(handle)
    publish_to(chain, bundle, tmp_path / "out")


def test_a_disk_too_small_is_said_before_copying(there: There, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(SteelyardError, match="MB are to be copied"):
        publish_to(*there, tmp_path / "out")
    assert not list((tmp_path / ".out.partial").iterdir())
