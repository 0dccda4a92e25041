"""A published folder gives way to the notice, and nothing else is touched; what was interrupted is completed."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from withdrawing import HOSTILE, note_published, notice_of, small_bundle

from steelyard.base.errors import SteelyardError
from steelyard.ledger.ledger import Ledger
from steelyard.release import takedown_folder
from steelyard.release.layout import MANIFEST, SUMMARY
from steelyard.release.notice import DATA, PAGE, README, notice_files
from steelyard.release.takedown import Outcome, published_places, take_down
from steelyard.release.trust import Trust
from steelyard.release.verify import examine

NOTICE = {README, PAGE, DATA}


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "workspace" / "ledger.sqlite") as opened:
        yield opened


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "public" / "tiny"


@pytest.fixture
def manifest(ledger: Ledger, place: Path) -> str:
    """Of the release that is published at `place`."""
    made = small_bundle(place)
    note_published(ledger, made, place)
    return made


def aside_of(place: Path, manifest: str, number: str = "") -> Path:
    return place.with_name(f"{place.name}.withdrawn-{manifest[:8]}{number}")


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def only(outcomes: tuple[Outcome, ...]) -> Outcome:
    assert len(outcomes) == 1
    return outcomes[0]


# -- done ------------------------------------------------------------------------------------------------------------


def test_the_notice_takes_its_place_and_the_files_are_kept_aside(ledger: Ledger, place: Path, manifest: str) -> None:
    before, notice = tree(place), notice_of(manifest)
    done = only(take_down(notice, ledger=ledger))
    aside = aside_of(place, manifest)
    assert (done.state, done.destination) == ("taken down", str(place))
    assert str(aside) in done.detail
    assert tree(place) == notice_files(notice)
    assert stat.S_IMODE(place.stat().st_mode) == 0o755
    assert {stat.S_IMODE(path.stat().st_mode) for path in place.iterdir()} == {0o644}
    assert tree(aside) == before
    assert stat.S_IMODE(aside.stat().st_mode) == 0o700
    (event,) = ledger.events("release.taken_down")
    assert event.payload["manifest"] == manifest
    assert event.payload["destination"] == str(place)
    # Again: nothing is left to do, and nothing is noted twice.
    assert only(take_down(notice, ledger=ledger)).state == "already"
    assert len(ledger.events("release.taken_down")) == 1
    assert sorted(path.name for path in place.parent.iterdir()) == sorted([place.name, aside.name])


def test_verify_points_to_the_notice(ledger: Ledger, place: Path, manifest: str) -> None:
    take_down(notice_of(manifest), ledger=ledger)
    first = examine(place, trust=Trust(evaluators=(), approvers=(), releasers=())).findings[0]
    assert first.code == "withdrawn"
    assert "took down: read it" in first.message


def test_deleted_on_demand_at_once_or_later(ledger: Ledger, place: Path, manifest: str) -> None:
    take_down(notice_of(manifest), ledger=ledger)
    done = only(take_down(notice_of(manifest), ledger=ledger, delete=True))
    assert done.state == "taken down"
    assert [path.name for path in place.parent.iterdir()] == ["tiny"]
    other = place.with_name("other")
    small_bundle(other)
    note_published(ledger, manifest, other)
    assert [one.state for one in take_down(notice_of(manifest), ledger=ledger, delete=True)] == [
        "already",
        "taken down",
    ]
    assert sorted(path.name for path in place.parent.iterdir()) == ["other", "tiny"]


def test_every_place_is_taken_down_also_where_the_end_of_publishing_was_not_noted(
    ledger: Ledger, place: Path, manifest: str
) -> None:
    second = place.with_name("killed before it was noted")
    small_bundle(second)
    note_published(ledger, manifest, second, finished=False)
    assert published_places(ledger, manifest) == (str(place), str(second))
    assert [one.state for one in take_down(notice_of(manifest), ledger=ledger)] == ["taken down", "taken down"]


def test_a_copy_that_publishing_left_beside_it_is_taken_too(ledger: Ledger, place: Path, manifest: str) -> None:
    partial = place.with_name(".tiny.partial")
    small_bundle(partial)
    assert only(take_down(notice_of(manifest), ledger=ledger)).state == "taken down"
    assert not partial.exists()
    assert (aside_of(place, manifest, "-2") / "model.safetensors").is_file()


def test_published_again_it_is_taken_down_again(ledger: Ledger, place: Path, manifest: str) -> None:
    take_down(notice_of(manifest), ledger=ledger)
    for path in place.iterdir():
        path.unlink()
    small_bundle(place)
    assert only(take_down(notice_of(manifest), ledger=ledger)).state == "taken down"
    assert aside_of(place, manifest, "-2").is_dir()
    assert len(ledger.events("release.taken_down")) == 2
    take_down(notice_of(manifest), ledger=ledger, delete=True)
    assert [path.name for path in place.parent.iterdir()] == ["tiny"]


def test_a_notice_that_was_damaged_or_says_less_is_put_right(ledger: Ledger, place: Path, manifest: str) -> None:
    take_down(notice_of(manifest), ledger=ledger)
    (place / PAGE).unlink()
    (place / README).write_text("All is well")
    better = notice_of(manifest, reason="It answers wrongly, and worse.")
    assert only(take_down(better, ledger=ledger)).state == "taken down"
    assert tree(place) == notice_files(better)


@pytest.mark.parametrize("words", HOSTILE)
def test_hostile_words_reach_no_path(ledger: Ledger, place: Path, manifest: str, words: str) -> None:
    notice = notice_of(manifest, name=f"../../{words}"[:100].encode("utf-8", "replace").decode(), reason=words)
    assert only(take_down(notice, ledger=ledger)).state == "taken down"
    assert sorted(path.name for path in place.parent.iterdir()) == ["tiny", aside_of(place, manifest).name]
    assert set(tree(place)) == NOTICE


def test_nothing_was_published(ledger: Ledger) -> None:
    assert take_down(notice_of("00" * 32), ledger=ledger) == ()
    assert ledger.events() == []


# -- not touched -----------------------------------------------------------------------------------------------------


def put_other_release(place: Path) -> None:
    small_bundle(place, words=b"others")


def put_changed_manifest(place: Path) -> None:
    small_bundle(place)
    (place / MANIFEST).write_bytes((place / MANIFEST).read_bytes() + b" ")


def put_other_things(place: Path) -> None:
    place.mkdir(parents=True)
    (place / "thesis.tex").write_text("years of work")


def put_other_notice(place: Path) -> None:
    place.mkdir(parents=True)
    for name, data in notice_files(notice_of("99" * 32)).items():
        (place / name).write_bytes(data)


def put_file(place: Path) -> None:
    place.parent.mkdir(parents=True)
    place.write_text("a file")


def put_link(place: Path) -> None:
    small_bundle(place.parent / "elsewhere")
    place.symlink_to(place.parent / "elsewhere")


def put_linked_home(place: Path) -> None:
    small_bundle(place.parent / "elsewhere")
    place.mkdir()
    (place / "steelyard").symlink_to(place.parent / "elsewhere" / "steelyard")


@pytest.mark.parametrize(
    ("put", "said"),
    [
        (put_other_release, "holds another release"),
        (put_changed_manifest, "holds another release"),
        (put_other_things, "holds something else"),
        (put_other_notice, "holds something else"),
        (put_file, "is no folder"),
        (put_link, "is a symbolic link"),
        (put_linked_home, "holds something else"),
    ],
)
@pytest.mark.parametrize("delete", [False, True])
def test_what_is_not_this_release_is_not_touched(
    ledger: Ledger, tmp_path: Path, place: Path, put: Callable[[Path], None], said: str, delete: bool
) -> None:
    manifest = small_bundle(tmp_path / "ours")
    note_published(ledger, manifest, place)
    put(place)
    before = tree(place.parent)
    mode = place.lstat().st_mode
    done = only(take_down(notice_of(manifest), ledger=ledger, delete=delete))
    assert done.state == "failed"
    assert said in done.detail
    assert str(place) in done.detail
    assert tree(place.parent) == before
    assert place.lstat().st_mode == mode
    assert ledger.events("release.taken_down") == []


def test_a_place_that_is_used_again_after_the_take_down(ledger: Ledger, place: Path, manifest: str) -> None:
    take_down(notice_of(manifest), ledger=ledger)
    for path in place.iterdir():
        path.unlink()
    put_other_release(place)
    before = tree(place)
    assert only(take_down(notice_of(manifest), ledger=ledger)).state == "already"
    assert tree(place) == before


def test_an_absent_folder_and_an_absent_disk(ledger: Ledger, tmp_path: Path, place: Path, manifest: str) -> None:
    place.rename(tmp_path / "gone")
    assert only(take_down(notice_of(manifest), ledger=ledger)).state == "absent"
    assert not place.exists()
    note_published(ledger, manifest, tmp_path / "disk" / "tiny")
    failed = take_down(notice_of(manifest), ledger=ledger)[1]
    assert failed.state == "failed"
    assert "mount or restore it" in failed.detail


def test_one_failure_does_not_stop_the_others_and_a_rerun_does_the_rest(
    ledger: Ledger, tmp_path: Path, manifest: str, place: Path
) -> None:
    first, last = tmp_path / "a" / "tiny", tmp_path / "z" / "tiny"
    put_other_things(first)
    small_bundle(last)
    for one in (first, last):
        note_published(ledger, manifest, one)
    assert [one.state for one in take_down(notice_of(manifest), ledger=ledger)] == [
        "taken down",
        "failed",
        "taken down",
    ]
    (first / "thesis.tex").rename(tmp_path / "thesis.tex")
    first.rmdir()
    small_bundle(first)
    assert [one.state for one in take_down(notice_of(manifest), ledger=ledger)] == ["already", "taken down", "already"]
    assert len(ledger.events("release.taken_down")) == 3


def test_files_that_are_not_of_the_release_are_not_deleted(ledger: Ledger, place: Path, manifest: str) -> None:
    (place / "notes").mkdir()
    (place / "notes" / "mine.txt").write_text("keep me")
    done = only(take_down(notice_of(manifest), ledger=ledger, delete=True))
    aside = aside_of(place, manifest)
    assert done.state == "failed"
    assert "notes/mine.txt: not of the release, so kept" in done.detail
    assert set(tree(place)) == NOTICE
    assert set(tree(aside)) == {"notes/mine.txt", MANIFEST}
    (aside / "notes" / "mine.txt").unlink()
    assert only(take_down(notice_of(manifest), ledger=ledger, delete=True)).state == "taken down"
    assert not aside.exists()


def test_a_link_among_the_files_leads_the_deletion_nowhere(
    ledger: Ledger, tmp_path: Path, place: Path, manifest: str
) -> None:
    kept = tmp_path / "kept.safetensors"
    kept.write_bytes(b"somebody's")
    (place / "model.safetensors").unlink()
    (place / "model.safetensors").symlink_to(kept)
    done = only(take_down(notice_of(manifest), ledger=ledger, delete=True))
    assert done.state == "failed"
    assert "symbolic link" in done.detail
    assert kept.read_bytes() == b"somebody's"


# -- changed meanwhile, interrupted ----------------------------------------------------------------------------------


def test_a_folder_that_is_exchanged_meanwhile_is_put_back(
    ledger: Ledger, tmp_path: Path, place: Path, manifest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename
    other = tmp_path / "public" / "next"
    put_other_release(other)
    before = tree(other)
    other.chmod(0o750)

    def exchange(source: Path, target: Path) -> None:
        if source == place and other.exists():
            rename(place, tmp_path / "first")
            rename(other, place)
        rename(source, target)

    monkeypatch.setattr(os, "rename", exchange)
    done = only(take_down(notice_of(manifest), ledger=ledger))
    assert done.state == "failed"
    assert "was changed meanwhile" in done.detail
    assert tree(place) == before
    assert stat.S_IMODE(place.stat().st_mode) == 0o750
    assert not aside_of(place, manifest).exists()


def test_a_manifest_that_is_changed_meanwhile_is_put_back(
    ledger: Ledger, place: Path, manifest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.chmod(0o750)
    rename = os.rename

    def change(source: Path, target: Path) -> None:
        (Path(source) / MANIFEST).write_bytes(b"{}")
        rename(source, target)

    monkeypatch.setattr(os, "rename", change)
    done = only(take_down(notice_of(manifest), ledger=ledger))
    assert done.state == "failed"
    assert "was changed meanwhile" in done.detail
    assert (place / "model.safetensors").is_file()
    assert stat.S_IMODE(place.stat().st_mode) == 0o750


class KilledError(BaseException):
    """As by a signal: no handler of ours runs to its end."""


STEPS = ("fchmod", "rename", "unlink", "rmdir", "replace", "chmod", "fsync", "mkdir")


def kill_at(monkeypatch: pytest.MonkeyPatch, moment: int) -> list[str]:
    """Raise at that call, counted over all that change the disk, and at every one after it. Gives those that were
    done."""
    asked: list[str] = []

    def counted(name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: object, **more: object) -> object:
            if len(asked) >= moment:
                raise KilledError(name)
            asked.append(name)
            return real(*arguments, **more)

        monkeypatch.setattr(os, name, call)

    for name in STEPS:
        counted(name)
    return asked


@pytest.mark.parametrize("delete", [False, True])
def test_killed_at_every_step_a_rerun_completes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, delete: bool
) -> None:
    for moment in range(200):
        place = tmp_path / str(moment) / "tiny"
        manifest = small_bundle(place)
        note, aside, killed = notice_of(manifest), aside_of(place, manifest), False
        with monkeypatch.context() as patch:
            kill_at(patch, moment)
            try:
                takedown_folder.take_down_folder(place, note, delete=delete)
            except KilledError:
                killed = True
        # At no moment: the release's files beside a notice, or a copy aside that others may read.
        if place.exists():
            assert set(tree(place)) in (NOTICE, {MANIFEST, "README.md", "model.safetensors", SUMMARY})
        if aside.exists():
            assert stat.S_IMODE(aside.stat().st_mode) == 0o700
        takedown_folder.take_down_folder(place, note, delete=delete)
        assert tree(place) == notice_files(note)
        assert aside.exists() == (not delete)
        if not killed:
            break
    assert moment > (20 if delete else 12)
    assert moment < 199


def test_killed_before_it_is_noted_it_is_noted_by_the_next(ledger: Ledger, place: Path, manifest: str) -> None:
    takedown_folder.take_down_folder(place, notice_of(manifest))
    assert only(take_down(notice_of(manifest), ledger=ledger)).state == "already"
    assert len(ledger.events("release.taken_down", manifest=manifest, destination=str(place))) == 1


def test_a_folder_that_may_not_be_changed_is_named(
    ledger: Ledger, place: Path, manifest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied", str(source))

    monkeypatch.setattr(os, "rename", refuse)
    done = only(take_down(notice_of(manifest), ledger=ledger))
    assert done.state == "failed"
    assert done.detail == f"{place}: Permission denied"
    monkeypatch.undo()
    assert only(take_down(notice_of(manifest), ledger=ledger)).state == "taken down"


def test_a_hundred_take_downs_are_too_many(place: Path, manifest: str) -> None:
    for number in range(1, 100):
        aside_of(place, manifest, "" if number == 1 else f"-{number}").mkdir()
    with pytest.raises(SteelyardError, match="lie beside it already"):
        takedown_folder.take_down_folder(place, notice_of(manifest))
    assert (place / MANIFEST).is_file()
