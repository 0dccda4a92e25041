"""Publish a bundle: to a folder, or to a repository on the Hugging Face Hub. Only what verifies is published.

    published = publish(bundle, "hf://org/name", check=check, ledger=ledger, gated="manual")

`check` verifies a folder, freshly, under the policy and the keys of who publishes. What it verified is what is sent:
every file is hashed again while it is read, and its last bytes are given out only where the whole has the SHA-256 of
the verified manifest (`VerifiedFile`). The files that sign are sent last, so a place that holds half of a release never
verifies. Interrupted, the same call goes on: what is there with the right hash is not sent again.

The ledger gets `release.publishing` before the first byte leaves, and `release.published` once all of it is there.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from steelyard.base.canonical import sha256_hex
from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.base.files import open_regular, read_bounded
from steelyard.base.progress import Progress, Silent
from steelyard.base.strict import strict_json
from steelyard.release.attest import parse_time
from steelyard.release.evidence import FILE_LIMIT
from steelyard.release.layout import BATTERY, MANIFEST, MANIFEST_LIMIT, SIGNING, read_manifest
from steelyard.safety.battery import Battery

if TYPE_CHECKING:
    from steelyard.ledger.ledger import Ledger
    from steelyard.release.verify import Verification

Gated = Literal["auto", "manual"]
Check = Callable[[Path], "Verification"]

SIGNING_LIMIT = 50_000_000  # bytes of a file that signs; a keyless model signature lists every file
_REPOSITORY = re.compile(r"hf://(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?)")
_RECIPIENT = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
_MAX_NAME = 96  # characters of ORG/NAME on the Hub
_SHOWN = 3  # findings in a message


@dataclass(frozen=True)
class ReleaseFile:
    """One file of a release; `path` is relative, with `/`. `data` is held for the files that sign and the manifest."""

    path: str
    size: int
    sha256: str
    source: Path
    data: bytes | None = None

    def open(self, told: Callable[[int], None] | None = None) -> io.BufferedIOBase:
        """The verified content, to be read from the start."""
        return io.BytesIO(self.data) if self.data is not None else VerifiedFile(self, told)


@dataclass(frozen=True)
class Release:
    """What was verified: the content (the manifest last), and the files that sign. `manifest` is its SHA-256."""

    name: str
    manifest: str
    weights: str
    content: tuple[ReleaseFile, ...]
    signing: tuple[ReleaseFile, ...]

    @property
    def files(self) -> tuple[ReleaseFile, ...]:
        return self.content + self.signing

    @property
    def tag(self) -> str:
        """The tag of this release in a repository."""
        return f"steelyard-{self.manifest}"


@dataclass(frozen=True)
class Destination:
    """Where to: a `folder`, or a `repository` (ORG/NAME) on the Hub; `text` is how the ledger and the reader see it."""

    text: str
    folder: Path | None = None
    repository: str | None = None


@dataclass(frozen=True)
class Published:
    """A release where it was published. `already`: nothing had to be sent. `commit` and `tag` are a repository's."""

    destination: str
    name: str
    manifest: str
    already: bool
    commit: str | None = None
    tag: str | None = None


def parse_destination(to: str, recipient: str | None = None) -> Destination:
    """`--to`: hf://ORG/NAME or a folder; with a recipient, the repository ORG/NAME-RECIPIENT. Raises UsageError."""
    if not to.startswith("hf://"):
        if "://" in to or not to:
            raise UsageError(f"--to {to!r}: unknown kind of place: write a folder or hf://ORG/NAME")
        if recipient is not None:
            raise UsageError("--recipient: only a repository on the Hub (hf://ORG/NAME) is made for each recipient")
        folder = Path(to).expanduser().absolute()
        return Destination(str(folder), folder=folder)
    match = _REPOSITORY.fullmatch(to)
    if match is None:
        raise UsageError(f"--to {to}: must be hf://ORG/NAME, without a revision")
    if recipient is not None and _RECIPIENT.fullmatch(recipient) is None:
        raise UsageError(f"--recipient {recipient!r}: use letters, digits, '.', '-' and '_', as in a repository's name")
    name = match["name"] if recipient is None else f"{match['name']}-{recipient}"
    if "--" in name or ".." in name or name.endswith(".git") or len(name) > _MAX_NAME:
        text = f"the Hub takes no name with '--', '..' or '.git' at its end, nor one of over {_MAX_NAME} characters"
        raise UsageError(f"hf://{name}: {text}")
    return Destination(f"hf://{name}", repository=name)


def publish(
    bundle: Path,
    to: str,
    *,
    check: Check,
    ledger: Ledger,
    gated: Gated | None = None,
    private: bool = False,
    recipient: str | None = None,
    progress: Progress | None = None,
) -> Published:
    """Verify `bundle` and publish it to `to`: see the module, `publish_folder` and `publish_hub`.

    A repository is public once the release is whole, unless it is `private` or for a `recipient`. Raises UsageError for
    a place that is written wrongly; SteelyardError where the bundle does not verify, was withdrawn, or changes
    meanwhile, where another release lies there already, and where the place cannot be written.
    """
    progress = progress or Silent()
    where = parse_destination(to, recipient)
    if where.folder is not None and (gated is not None or private):
        raise UsageError("--gated and --private are settings of a repository on the Hub: a folder has none")
    if where.folder is not None and where.folder.resolve().is_relative_to(bundle.resolve()):
        raise UsageError(f"--to {to}: lies in the bundle: choose a place outside of it")
    release = verified_release(bundle, check)
    known: dict[str, Any] = {"destination": where.text, "manifest": release.manifest}
    named = {"name": release.name, "weights": release.weights}
    refuse = partial(_refuse, release, ledger)
    if ledger.events("release.publishing", **known):
        refuse()
    else:
        ledger.append("release.publishing", {**known, **named, "started": _now()}, check=refuse)
    if where.folder is not None:
        from steelyard.release.publish_folder import publish_folder

        published = publish_folder(release, where.folder, check, progress)
        settings: dict[str, Any] = {}
    else:
        from steelyard.release.hub_client import HubClient
        from steelyard.release.publish_hub import publish_hub

        private = private or recipient is not None
        with HubClient(str(where.repository), progress) as client:
            published = publish_hub(release, client, gated=gated, private=private, progress=progress)
        settings = {"commit": published.commit, "tag": published.tag, "private": private, "gated": gated}
    if not ledger.events("release.published", **known):
        began = ledger.events("release.publishing", **known)[0].payload["started"]
        done = {"started": began, "finished": _now(), "recipient": recipient}
        ledger.append("release.published", {**known, **named, **done, **settings})
    return published


def _refuse(release: Release, ledger: Ledger) -> None:
    """Raises SteelyardError where the ledger forbids that this release goes out."""
    _refuse_withdrawn(release, ledger)
    _refuse_granted(release, ledger, datetime.now(UTC))
    _refuse_half_tested(release, ledger)


def _refuse_withdrawn(release: Release, ledger: Ledger) -> None:
    for event in ledger.events("release.withdrawn"):
        if event.payload.get("manifest") == release.manifest or event.payload.get("weights") == release.weights:
            reason = " ".join(str(event.payload.get("reason", "")).split())[:200]
            raise SteelyardError(f"{release.name}: was withdrawn ({reason}): what is withdrawn is not published again")


def _refuse_granted(release: Release, ledger: Ledger, now: datetime) -> None:
    """What is granted copy by copy goes out neither without a mark, for all those marks would prove nothing any more,
    nor with the mark of one recipient, nor the public's copy once its grant has ended."""
    for event in ledger.events("grant.issued", weights=release.weights):
        text = f"grant {event.payload.get('grant')} is for these weights, so they are not published unmarked"
        raise SteelyardError(f"{release.name}: {text}: publish the marked public copy (docs/grants.md)")
    for event in ledger.events("grant.marked", marked=release.weights):
        grant = event.payload.get("grant")
        issued = ledger.events("grant.issued", grant=grant, public=True)
        if not issued:
            text = f"these weights carry the mark of grant {grant}, whom a leak of them would name"
            raise SteelyardError(f"{release.name}: {text}: publish the marked public copy (docs/grants.md)")
        if ledger.events("grant.revoked", grant=grant):
            raise SteelyardError(f"{release.name}: the public's grant {grant} was revoked: ask for another one")
        if now >= parse_time(expires := str(issued[0].payload["expires"]), "ledger"):
            raise SteelyardError(
                f"{release.name}: the public's grant {grant} expired at {expires}: ask for another one"
            )


def _refuse_half_tested(release: Release, ledger: Ledger) -> None:
    """The public's copy is a subject of its own, which no other's test speaks for: it goes out on a full battery."""
    if not ledger.events("grant.marked", marked=release.weights):
        return
    with next(file for file in release.content if file.path == BATTERY).open() as stream:
        battery = Battery.model_validate(strict_json(stream.read(), BATTERY, limit=FILE_LIMIT))
    if battery.tier != "release":
        text = f"the public's copy was tested with {battery.name} (tier {battery.tier}), and needs one of tier release"
        raise SteelyardError(f"{release.name}: {text}: steelyard safety run MODEL --battery release")


def verified_release(bundle: Path, check: Check) -> Release:
    """Verify `bundle` and take down what was verified. Raises SteelyardError where it does not verify, or changed."""
    before = _held(bundle)
    result = check(bundle)
    if not result.ok:
        reasons = [finding.message for finding in result.findings] or ["it holds no results of a test"]
        more = f"; and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
        text = "; ".join(reasons[:_SHOWN]) + more
        remedy = f"see all of it with steelyard verify {bundle}, the same options"
        raise SteelyardError(f"{bundle}: does not verify, so nothing is published: {text}: {remedy}")
    manifest = read_manifest(bundle)
    held = {name: ReleaseFile(name, len(data), sha256_hex(data), bundle / name, data) for name, data in before.items()}
    if _held(bundle) != before or result.manifest != held[MANIFEST].sha256:
        raise SteelyardError(f"{bundle}: changed while it was verified: leave it alone and try again")
    listed = tuple(ReleaseFile(file.path, file.size, file.sha256, bundle / file.path) for file in manifest.files)
    signing = tuple(held[name] for name in SIGNING if name in held)
    return Release(result.name, result.manifest, result.weights, (*listed, held[MANIFEST]), signing)


def _held(bundle: Path) -> Mapping[str, bytes]:
    """The manifest and the files that sign."""
    limits = dict.fromkeys(SIGNING, SIGNING_LIMIT) | {MANIFEST: MANIFEST_LIMIT}
    there = [name for name in (MANIFEST, *SIGNING) if os.path.lexists(bundle / name)]
    try:
        return {name: read_bounded(bundle / name, limits[name]) for name in there}
    except FormatError as error:
        raise SteelyardError(f"{bundle}: does not verify, so nothing is published: {error}") from error


class VerifiedFile(io.BufferedIOBase):
    """A release's file, hashed while it is read. The last bytes are given out only where the whole has the verified
    SHA-256: a file changed since then never arrives whole. Raises SteelyardError at that point.

    It can be read again from any place where a reading began (an upload, or one part of it, that is tried again).
    `told` is given, at each reading, the number of bytes read for the first time.
    """

    def __init__(self, file: ReleaseFile, told: Callable[[int], None] | None = None) -> None:
        self.file, self.complete = file, False
        self._told = told or (lambda count: None)
        self._handle: io.BufferedReader | None = None
        self._position = self._hashed = self._furthest = 0
        self._hash = hashlib.sha256()
        self._began = {0: self._hash.copy()}
        self._sought = False

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.file.size}[whence]
        self._position, self._sought = max(0, base + offset), True
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        left = self.file.size - self._position
        wanted = max(0, left if size is None or size < 0 else min(size, left))
        if wanted == 0 and self.complete:
            return b""
        if self._sought:
            self._reach()
        data = self._source().read(wanted)
        self._hash.update(data)
        self._position += len(data)
        self._hashed = self._position
        if len(data) != wanted or (self._position == self.file.size and self._hash.hexdigest() != self.file.sha256):
            raise self._changed()
        self.complete = self.complete or self._position == self.file.size
        self._told(max(0, self._position - self._furthest))
        self._furthest = max(self._furthest, self._position)
        return data

    def close(self) -> None:
        if self._handle is not None:
            self._handle.close()
        super().close()

    def _source(self) -> io.BufferedReader:
        if self._handle is None:  # only now: a release has more files than a process may hold open
            self._handle = open_regular(self.file.source)
            if os.fstat(self._handle.fileno()).st_size != self.file.size:
                raise self._changed()
        return self._handle

    def _reach(self) -> None:
        """Go on from a place where the hash of all that comes before is known."""
        if self._position == self._hashed:
            self._began[self._position] = self._hash.copy()
        elif self._position in self._began:
            self._hash = self._began[self._position].copy()
        else:
            raise ValueError(f"{self.file.path}: read from the middle, at {self._position}")
        self._source().seek(self._position)
        self._sought = False

    def _changed(self) -> SteelyardError:
        text = "was changed after it was verified: leave the bundle alone and publish it again"
        return SteelyardError(f"{self.file.source}: {text}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
