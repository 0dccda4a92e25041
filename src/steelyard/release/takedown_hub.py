"""Take down a repository on the Hub: closed first, which ends the downloads, then the notice as its README.

Closed is private, or gated by hand: whoever was let in before still gets the files of a gated one. The files stay in
the repository, which its owners alone see where it is private: what was withdrawn remains evidence, and to
delete a repository would free its name for somebody else. No message holds the token (`hub_client`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from steelyard.base.canonical import sha256_hex
from steelyard.base.errors import SteelyardError
from steelyard.release.layout import CARD, MANIFEST, MODEL_SIGNATURE, SUMMARY
from steelyard.release.notice import Notice, notice_markdown
from steelyard.release.takedown_folder import Done

if TYPE_CHECKING:
    from steelyard.release.hub_client import HubClient, Remote

Access = Literal["private", "gated"]

CHANGED = 412  # HTTP status: `main` is no longer where the commit should go on from


def take_down_repository(client: HubClient, notice: Notice, access: Access = "private") -> tuple[Done, str]:
    """Make the repository of `client` private or gated, with the notice as README; gives the state and what was done.

    Each of the two is tried where the other fails. Raises SteelyardError, HubError among them, naming what failed, and
    where the repository holds anything else than this release.
    """
    client.whoami()  # else a bad token would look like a repository that is gone
    remote = client.look()
    if remote is None:
        return "absent", "there is no such repository, or it is private and this token may not see it"
    where = f"hf://{client.repository}"
    if not _holds(client, remote, notice.manifest, where):
        return "absent", "it is private, and publishing there never came to its end"
    done: list[str] = []
    failed: list[str] = []
    steps: tuple[Callable[[], str | None], ...] = (
        lambda: _close(client, remote, access),
        lambda: _put_notice(client, notice),
    )
    for step in steps:
        try:
            if said := step():
                done.append(said)
        except SteelyardError as error:
            failed.append(str(error))
    if failed:
        so_far = f" (done: {', '.join(done)})" if done else ""
        raise SteelyardError("; ".join(failed) + so_far)
    closed = "private" if remote.private else access
    return ("taken down", "; ".join(done)) if done else ("already", f"it is {closed}, the notice is its README")


def _holds(client: HubClient, remote: Remote, manifest: str, where: str) -> bool:
    """Whether it is this release's: `publish` tags what it has sent whole, and sends nothing on top of another."""
    tag = f"steelyard-{manifest}"
    commit = remote.tags.get(tag)
    if commit is None:
        if remote.private:
            # The tag comes last: what signs a release lies there before it, and what lies there so verifies.
            others = any(name.startswith("steelyard-") for name in remote.tags)
            return not others and (MODEL_SIGNATURE in remote.files or SUMMARY in remote.files)
        raise SteelyardError(f"{where}: has no tag {tag}, so it is not known to hold this release: it is left as it is")
    released = client.files(commit).get(MANIFEST)
    now = remote.files.get(MANIFEST)
    if released is None or (now is not None and (now.size, now.blob) != (released.size, released.blob)):
        text = f"holds another release than its tag {tag}, and is left as it is: make it private or remove the tag"
        raise SteelyardError(f"{where}: {text} yourself")
    return True


def _closed(remote: Remote, access: Access) -> bool:
    return remote.private or (access == "gated" and remote.gated == "manual")


def _close(client: HubClient, remote: Remote, access: Access) -> str | None:
    if _closed(remote, access):
        return None
    if access == "private":
        client.settings(private=True)
    else:
        client.settings(gated="manual")
    found = client.look()
    if found is not None and not _closed(found, access):
        raise SteelyardError(f"hf://{client.repository}: the Hub did not make it {access}: see its settings")
    return f"made {access}"


def _put_notice(client: HubClient, notice: Notice) -> str | None:
    """Commit the notice. After a failure look again: only the answer may have been lost."""
    from steelyard.release.hub_client import ATTEMPTS, HubError
    from steelyard.release.publish import ReleaseFile

    data = notice_markdown(notice).encode()
    file = ReleaseFile(CARD, len(data), sha256_hex(data), Path(CARD), data)
    for attempt in range(ATTEMPTS + 1):
        found = client.look()
        if found is None:
            raise SteelyardError(f"hf://{client.repository}: the repository is gone: see who removed it")
        if CARD in found.files and found.files[CARD].holds(file):
            return "notice put as its README" if attempt else None
        if attempt == ATTEMPTS:
            break
        try:
            client.commit([file], f"Withdrawn: manifest {notice.manifest}", found.head)
        except HubError as error:
            if attempt == ATTEMPTS - 1 or not (error.passing or error.status == CHANGED):
                raise
            client.pause(attempt)
    raise SteelyardError(f"hf://{client.repository}: the Hub did not keep the notice: try again")
