"""Take down what we control: the folders and the Hub repositories to which this ledger published a withdrawn release.

A folder gives way to the notice; its weights are moved aside, where nobody is served from, or deleted on demand. A
repository is made private, or gated by hand, and its README becomes the notice. What was taken down is noted, and is
not done again; what holds another release by now is left alone and reported.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from steelyard.base.canonical import canonical_json, sha256_file
from steelyard.base.errors import FormatError, SteelyardError, require_extra
from steelyard.base.files import fsync_folder, new_folder, read_bounded
from steelyard.base.strict import strict_json
from steelyard.release.layout import MANIFEST
from steelyard.release.notice import Notice, notice_html, notice_markdown

if TYPE_CHECKING:
    from steelyard.ledger.ledger import Ledger

MARK = "WITHDRAWN.json"  # tells a notice's folder from anything else
TIMEOUT = 60.0  # seconds without a byte from the Hub
Access = Literal["private", "gated"]


@dataclass(frozen=True)
class Taken:
    """What became of one place. `done` False: it needs a person, `what` says why."""

    destination: str
    done: bool
    what: str


def take_down(
    notice: Notice, ledger: Ledger, aside: Path, *, delete: bool = False, access: Access = "private"
) -> list[Taken]:
    """Every place to which the ledger says that this release went, whole or in part. `aside`: for its weights."""
    found = []
    manifest = notice.entry.manifest
    for destination in _destinations(ledger, manifest):
        again = not destination.startswith("hf://") and _holds(Path(destination), manifest)  # somebody put it back
        if ledger.events("release.taken_down", destination=destination, manifest=manifest) and not again:
            continue
        newer = _newer(ledger, destination, manifest)
        if newer is not None and destination.startswith("hf://"):
            text = f"holds a later release by now ({newer[:16]}): left as it is; remove the old revision by hand"
            found.append(Taken(destination, False, text))
            continue
        try:
            if destination.startswith("hf://"):
                taken = _repository(destination, notice, access)
            else:
                taken = _folder(Path(destination), notice, aside, delete)
        except (SteelyardError, OSError) as error:
            taken = Taken(destination, False, " ".join(str(error).split()))
        if taken.done:
            ledger.append("release.taken_down", {"destination": destination, "manifest": manifest, "what": taken.what})
        found.append(taken)
    return found


def _destinations(ledger: Ledger, manifest: str) -> list[str]:
    events = [*ledger.events("release.publishing", manifest=manifest), *ledger.events("release.published")]
    return list(
        dict.fromkeys(
            str(event.payload["destination"])
            for event in events
            if event.payload.get("manifest") == manifest and "destination" in event.payload
        )
    )


def _newer(ledger: Ledger, destination: str, manifest: str) -> str | None:
    events = ledger.events("release.published", destination=destination)
    last = str(events[-1].payload.get("manifest")) if events else manifest
    gone = {event.payload.get("manifest") for event in ledger.events("release.withdrawn")}
    return last if last != manifest and last not in gone else None


# -- a folder --------------------------------------------------------------------------------------------------------


def _folder(place: Path, notice: Notice, aside: Path, delete: bool) -> Taken:
    manifest = notice.entry.manifest
    if place.is_symlink():
        raise SteelyardError("is a symbolic link: take down what it points to by hand")
    for one in (place, place.with_name(f".{place.name}.partial")):  # a half-published copy has the weights as well
        if _holds(one, manifest):
            _move(one, aside / f"{place.name}-{manifest[:16]}")
    if not place.exists():
        with new_folder(place) as folder:
            (folder / "README.md").write_text(notice_markdown(notice), encoding="utf-8")
            (folder / "index.html").write_text(notice_html(notice), encoding="utf-8")
            (folder / MARK).write_bytes(canonical_json({"manifest": manifest}) + b"\n")
    elif not _is_notice(place, manifest):
        raise SteelyardError("holds something else by now: left as it is")
    kept = _kept(place, aside / f"{place.name}-{manifest[:16]}", manifest)
    if delete:
        for one in kept:
            shutil.rmtree(one)
        return Taken(str(place), True, "replaced by the notice, the weights deleted")
    where = ", ".join(map(str, kept)) or "nowhere: they were gone"
    return Taken(str(place), True, f"replaced by the notice, the weights kept at {where}")


def _move(place: Path, target: Path) -> None:
    """Out of the way in one step; beside it, hidden and closed to others, where `target` is on another disk."""
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    for number in range(1, 100):
        free = target if number == 1 else target.with_name(f"{target.name}-{number}")
        if not free.exists():
            break
    try:
        os.rename(place, free)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        free = place.with_name(f".{place.name.lstrip('.')}.withdrawn-{free.name[-20:]}")
        os.rename(place, free)
    free.chmod(0o700)
    fsync_folder(place.parent)
    fsync_folder(free.parent)


def _kept(place: Path, target: Path, manifest: str) -> list[Path]:
    """Where the weights of this release lie aside, whoever moved them."""
    beside = [
        *target.parent.glob(f"{target.name}*"),
        *place.parent.glob(f".{place.name}.withdrawn-*"),
        *place.parent.glob(f".{place.name}.partial.withdrawn-*"),
    ]
    return [one for one in sorted(beside) if _holds(one, manifest)]


def _holds(folder: Path, manifest: str) -> bool:
    path = folder / MANIFEST
    return folder.is_dir() and not folder.is_symlink() and path.is_file() and sha256_file(path) == manifest


def _is_notice(folder: Path, manifest: str) -> bool:
    try:
        said = strict_json(read_bounded(folder / MARK, 1000), MARK, limit=1000, depth=2)
    except (OSError, FormatError):
        return False
    return bool(said == {"manifest": manifest})


# -- a repository on the Hub -----------------------------------------------------------------------------------------


def _repository(destination: str, notice: Notice, access: Access) -> Taken:
    name = destination.removeprefix("hf://")
    readme = notice_markdown(notice, hub=True).encode()
    with _hub() as (hub, api):
        try:
            # Access first: should the second call fail, nobody downloads it any more.
            if access == "private":
                api.update_repo_settings(name, private=True)
            else:
                api.update_repo_settings(name, gated="manual")
            operation = hub.CommitOperationAdd(path_in_repo="README.md", path_or_fileobj=readme)
            api.create_commit(name, operations=[operation], commit_message=f"Withdrawn: {notice.entry.manifest[:16]}")
        except (hub.errors.HfHubHTTPError, OSError, ValueError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            said = f"answers {status}" if status is not None else f"cannot be reached ({type(error).__name__})"
            text = f"the Hub {said}: check the token (HF_TOKEN) and the name, and run the same command again"
            raise SteelyardError(text) from error
    return Taken(destination, True, f"made {access}, its README replaced by the notice")


@contextmanager
def _hub() -> Iterator[tuple[Any, Any]]:
    """huggingface_hub, whose own client would wait for ever, and its API."""
    try:
        import huggingface_hub as hub
        import huggingface_hub.errors
    except ImportError:
        raise require_extra("huggingface_hub", "models") from None
    session = hub.get_session()
    kind, hooks = type(session), {"request": session.event_hooks["request"]}
    library: Any = import_module(kind.__module__.partition(".")[0])  # httpx, or what took its place
    hub.set_client_factory(lambda: kind(event_hooks=hooks, follow_redirects=True, timeout=TIMEOUT))
    try:
        # Read here, not at the library's import: a process may set it later.
        yield hub, hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT") or hub.constants.ENDPOINT)
    except library.HTTPError as error:
        raise SteelyardError(
            f"the Hub cannot be reached ({type(error).__name__}): run the same command again"
        ) from error
    finally:
        hub.set_client_factory(lambda: kind(event_hooks=hooks, follow_redirects=True, timeout=None))
