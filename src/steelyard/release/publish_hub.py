"""Publish to a repository on the Hub: private while it is filled, the content first, the files that sign in one commit
at the end, then a tag with the manifest's SHA-256, and public last of all.

Every step looks first at what is there, so an interrupted publishing goes on from wherever it was: large files that
the Hub has are not sent again, and a commit whose answer was lost is not made twice. A repository that holds anything
but parts of this very release is refused: what is published is never overwritten.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from steelyard.base.errors import SteelyardError
from steelyard.base.progress import Progress
from steelyard.model.headers import quote
from steelyard.release.hub_client import ATTEMPTS, HubClient, HubError, Remote, RemoteFile
from steelyard.release.publish import Gated, Published, Release, ReleaseFile

HUBS_OWN = frozenset({".gitattributes"})  # made by the Hub in every repository
COMMIT_FILES = 100
COMMIT_BYTES = 20_000_000  # of files of up to SMALL bytes, which may travel in the commit itself
SMALL = 10_000_000
CHANGED = 412  # HTTP status: `main` is no longer where the commit should go on from


def publish_hub(
    release: Release, client: HubClient, *, gated: Gated | None, private: bool, progress: Progress
) -> Published:
    """Make the repository of `client` hold exactly `release`. Raises SteelyardError, HubError among them."""
    where = f"hf://{client.repository}"
    account = client.whoami()
    remote = client.look()
    if remote is None:
        progress.say(f"{where}: makes the repository, as {account}; it stays private until the release is whole")
        client.create()
        remote = _found(client)
    _refuse_other(remote, release, where)
    already = not _missing(remote.files, release.files)
    commit = remote.tags.get(release.tag)
    if commit is not None and _missing(client.files(commit), release.files):
        raise SteelyardError(f"{where}: the tag {release.tag} is there, on another content: remove the tag")
    _set_access(client, remote, gated, private or remote.private)
    if not already:
        for batch in _batches(release.content):
            _send(client, batch, f"Files of {release.name}, manifest {release.manifest}", release)
        # Only what is on the Hub counts: all of the content as verified, and nothing besides.
        remote = _found(client)
        _refuse_other(remote, release, where)
        if missing := _missing(remote.files, release.content):
            raise SteelyardError(f"{where}: the Hub did not keep {quote(missing[0].path)}: publish again")
        _send(client, release.signing, f"Sign the release {release.name}, manifest {release.manifest}", release)
        remote = _found(client)
        _refuse_other(remote, release, where)
        if missing := _missing(remote.files, release.files):
            raise SteelyardError(f"{where}: the Hub did not keep {quote(missing[0].path)}: publish again")
    if commit is None:
        client.tag(release.tag, remote.head, f"Steelyard release {release.name}: manifest SHA-256 {release.manifest}")
        commit = _found(client).tags.get(release.tag)
        if commit != remote.head:
            raise SteelyardError(f"{where}: the Hub did not keep the tag {release.tag}: publish again")
    _set_access(client, _found(client), gated, private)
    return Published(where, release.name, release.manifest, already, commit, release.tag)


def _found(client: HubClient) -> Remote:
    remote = client.look()
    if remote is None:
        raise HubError(f"hf://{client.repository}: the repository is gone: see who removed it", 404)
    return remote


def _missing(there: Mapping[str, RemoteFile], files: Sequence[ReleaseFile]) -> list[ReleaseFile]:
    """Those of `files` that are not `there`."""
    return [file for file in files if file.path not in there or not there[file.path].holds(file)]


def _refuse_other(remote: Remote, release: Release, where: str) -> None:
    """Raise SteelyardError where the repository holds anything else than parts of `release`."""
    ours = {file.path: file for file in release.files}
    for path in sorted(remote.files.keys() - HUBS_OWN):
        if path not in ours or not remote.files[path].holds(ours[path]):
            text = "is not of this release, and what is published is never overwritten: publish to another repository"
            raise SteelyardError(f"{where}: holds {quote(path)}, which {text}")


def _set_access(client: HubClient, remote: Remote, gated: Gated | None, private: bool) -> None:
    """Make the repository `private` or public, gated first: it is never open to all in between."""
    if gated is not None and remote.gated != gated:
        client.settings(gated=gated)
    if remote.private != private:
        client.settings(private=private)
    if (gated is not None and remote.gated != gated) or remote.private != private:
        found = _found(client)
        if found.private != private or (gated is not None and found.gated != gated):
            asked = f"{'private' if private else 'public'}, gated {gated or 'as it was'}"
            raise SteelyardError(f"hf://{client.repository}: the Hub did not make it {asked}: see its settings")


def _batches(files: Sequence[ReleaseFile]) -> Iterator[list[ReleaseFile]]:
    """In order, so many at a time as one commit may hold."""
    batch: list[ReleaseFile] = []
    size = 0
    for file in files:
        small = file.size if file.size <= SMALL else 0
        if batch and (len(batch) >= COMMIT_FILES or size + small > COMMIT_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(file)
        size += small
    if batch:
        yield batch


def _send(client: HubClient, files: Sequence[ReleaseFile], message: str, release: Release) -> None:
    """Commit those of `files` that are not there. After a failure look again: only the answer may have been lost."""
    for attempt in range(ATTEMPTS):
        remote = _found(client)
        missing = _missing(remote.files, files)
        if not missing:
            return
        if attempt:
            _refuse_other(remote, release, f"hf://{client.repository}")
        try:
            client.commit(missing, message, remote.head)
        except HubError as error:
            if attempt == ATTEMPTS - 1 or not (error.passing or error.status == CHANGED):
                raise
            client.pause(attempt)
