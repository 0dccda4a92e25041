"""The calls to the Hugging Face Hub that publishing needs, for one repository; errors in words, retries bounded.

The token and the cache are huggingface_hub's own (`HF_TOKEN`, `hf auth login`); `HF_ENDPOINT` names another Hub. No
message holds the token, and the library's own logging, which prints signed upload addresses, is silenced.

Files go by plain Git LFS. huggingface_hub would choose xet wherever the hf-xet package is installed, without asking the
server; xet reads a file by its path and believes the SHA-256 that it is told, so it could send other bytes than those
that were verified. It is not used for file objects, which is what it is given here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urlsplit

from steelyard.base.errors import SteelyardError, require_extra
from steelyard.base.progress import Progress
from steelyard.release import hub_bounds
from steelyard.release.publish import Gated, ReleaseFile

ATTEMPTS = 4  # of a call that the library does not try again by itself
LONGEST_WAIT = 60.0  # seconds; where the Hub asks for a longer one, the user is told
TIMEOUT = 300.0  # seconds without a byte; the library's own client would wait for ever
THREADS = 4
_PASSING = (408, 429, 500, 502, 503, 504)
_CREATE = "/api/repos/create"

Result = TypeVar("Result")


class HubError(SteelyardError):
    """The Hub refused or failed. `status` is the HTTP status, None where there was no answer; `passing` where it may
    help to try again."""

    def __init__(self, message: str, status: int | None = None, *, passing: bool = False) -> None:
        super().__init__(message)
        self.status, self.passing = status, passing


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub lists it: a large one by its SHA-256, a small one by git's SHA-1 of the blob."""

    size: int
    blob: str
    sha256: str | None = None

    def holds(self, file: ReleaseFile) -> bool:
        """Whether it has the content of `file`."""
        if self.size != file.size:
            return False
        return self.sha256 == file.sha256 if self.sha256 is not None else self.blob == _git_blob(file)


@dataclass(frozen=True)
class Remote:
    """The repository as it is: the newest commit of `main`, its files, its settings, its tags (name to commit)."""

    head: str
    files: Mapping[str, RemoteFile]
    private: bool
    gated: str | None
    tags: Mapping[str, str]


@dataclass(frozen=True)
class HubRequest:
    """A request for access to a gated repository, as its form has it: a stranger's words."""

    id: str
    name: str | None
    email: str | None
    fields: Mapping[str, Any]


class HubClient:
    """One repository (ORG/NAME) on the Hub; a context manager. Raises HubError, in words, for whatever goes wrong."""

    def __init__(self, repository: str, progress: Progress) -> None:
        try:
            import huggingface_hub
            import huggingface_hub.constants  # not loaded with it
        except ImportError:
            raise require_extra("huggingface_hub", "models") from None
        self.repository, self._progress = repository, progress
        self._hub: Any = huggingface_hub
        # Read here, not at the library's import: a process may set it later.
        self.endpoint = (os.environ.get("HF_ENDPOINT") or huggingface_hub.constants.ENDPOINT).rstrip("/")
        self._api = huggingface_hub.HfApi(endpoint=self.endpoint)
        self._token: str | None = None
        self._moved, self._questions = 0.0, 0  # of the call under way: when it last got on, its GETs
        self._quiet = ExitStack()

    def __enter__(self) -> HubClient:
        session = self._hub.get_session()
        kind, request = type(session), session.event_hooks["request"]

        def limited() -> Any:
            hooks = {"request": [*request, self._ask], "response": [self._look]}
            return kind(event_hooks=hooks, follow_redirects=True, timeout=TIMEOUT)

        self._before = lambda: kind(event_hooks={"request": request}, follow_redirects=True, timeout=None)
        self._hub.set_client_factory(limited)
        quiet = self._hub.utils.logging
        self._quiet.callback(quiet.set_verbosity, quiet.get_verbosity())
        quiet.set_verbosity(logging.CRITICAL)
        if not self._hub.utils.are_progress_bars_disabled():
            self._hub.utils.disable_progress_bars()
            self._quiet.callback(self._hub.utils.enable_progress_bars)
        self._quiet.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        self._token = self._call("read the token", self._hub.get_token)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._hub.set_client_factory(self._before)
        self._quiet.close()

    # -- looking -----------------------------------------------------------------------------------------------------

    def whoami(self) -> str:
        """The name of the account that the token belongs to."""
        if self._token is None:
            raise HubError(f"hf://{self.repository}: no token: log in with `hf auth login`, or set HF_TOKEN", 401)
        name: str = self._call("look up the account", self._api.whoami)["name"]
        return name

    def look(self) -> Remote | None:
        """The repository as it is; None where there is none that this token may see."""
        try:
            info = self._call("look at the repository", lambda: self._api.model_info(self.repository))
        except HubError as error:
            if error.status == 404 or (error.status == 401 and self._token is not None):
                return None  # the Hub answers 401 for what is not there; the token itself was accepted by whoami
            raise
        head = info.sha
        if head is None:
            raise HubError(f"hf://{self.repository}: the Hub names no commit of it: see whether it is a model")
        files = self.files(head)
        refs = self._call("list the tags", lambda: self._api.list_repo_refs(self.repository))
        tags = {tag.name: tag.target_commit for tag in refs.tags}
        return Remote(head, files, bool(info.private), info.gated or None, tags)

    def files(self, commit: str) -> Mapping[str, RemoteFile]:
        """The files of a commit, by path."""
        return self._call("list the files", lambda: self._tree(commit), library_tries=True)

    def _tree(self, commit: str) -> dict[str, RemoteFile]:
        from huggingface_hub.hf_api import RepoFile

        found = {}
        entries = self._api.list_repo_tree(self.repository, recursive=True, revision=commit)
        for entry in hub_bounds.at_most(entries, f"hf://{self.repository}"):
            if isinstance(entry, RepoFile):
                large = entry.lfs.sha256 if entry.lfs is not None else None
                found[entry.path] = RemoteFile(entry.size, entry.blob_id, large)
        return found

    def access_requests(self) -> list[HubRequest]:
        """The requests for access that wait for an answer; the token must belong to an owner."""
        api, name = self._api, self.repository

        def ask() -> list[HubRequest]:
            return [
                HubRequest(str(one.request_id), one.fullname, one.email, one.fields or {})
                for one in api.list_pending_access_requests(name)
            ]

        return self._call("list the requests for access", ask, library_tries=True)

    # -- changing ----------------------------------------------------------------------------------------------------

    def create(self) -> None:
        """Make the repository, private; one that is there already is left as it is."""
        api, name = self._api, self.repository
        self._call("create the repository", lambda: api.create_repo(name, private=True, exist_ok=True))

    def settings(self, *, gated: Gated | None = None, private: bool | None = None) -> None:
        """Set what is not None."""
        api, name = self._api, self.repository
        what = "set the repository's access"
        self._call(what, lambda: api.update_repo_settings(name, gated=gated, private=private))

    def commit(self, files: Sequence[ReleaseFile], message: str, parent: str) -> None:
        """Send the large ones of `files`, then all in one commit on top of `parent`. Where this fails and the error is
        `passing`, look whether it arrived before trying again.
        """
        api, name = self._api, self.repository
        total, sent, lock = sum(file.size for file in files) / 1e6, 0, threading.Lock()
        with self._progress.task(f"send to {name}", total, "MB") as task, ExitStack() as streams:

            def told(count: int) -> None:
                nonlocal sent
                self._moved = time.monotonic()
                with lock:
                    sent += count
                    task.advance(count / 1e6)

            additions = [self._addition(file, streams.enter_context(closing(file.open(told)))) for file in files]

            def upload() -> None:
                api.preupload_lfs_files(name, additions=additions, num_threads=THREADS, free_memory=False)

            def send() -> Any:
                return api.create_commit(name, operations=additions, commit_message=message, parent_commit=parent)

            self._call("send the large files", upload, library_tries=True)
            self._call("commit the files", send, attempts=1)
            task.advance(max(0.0, total - sent / 1e6))  # what the Hub had already

    def tag(self, name: str, commit: str, message: str) -> None:
        """Tag `commit`; a tag of that name that is there already stays."""
        api, repository = self._api, self.repository

        def create() -> None:
            api.create_tag(repository, tag=name, tag_message=message, revision=commit, exist_ok=True)

        self._call("tag the release", create)

    def _addition(self, file: ReleaseFile, stream: Any) -> Any:
        """A file to commit. The library would read it once more for its SHA-256, which is known."""
        from huggingface_hub.lfs import UploadInfo

        addition = self._hub.CommitOperationAdd(path_in_repo=file.path, path_or_fileobj=b"")
        with closing(file.open()) as first:
            sample = first.read(512)
        addition.upload_info = UploadInfo(size=file.size, sample=sample, sha256=bytes.fromhex(file.sha256))
        addition.path_or_fileobj = stream
        return addition

    # -- trying and telling ------------------------------------------------------------------------------------------

    def pause(self, attempt: int, asked: float | None = None) -> None:
        """Wait before the next try, as long as the Hub asks for."""
        time.sleep(min(LONGEST_WAIT, asked if asked is not None else 2.0**attempt))

    def _call(
        self, what: str, action: Callable[[], Result], *, attempts: int = ATTEMPTS, library_tries: bool = False
    ) -> Result:
        """`action`, again after a passing failure; once where the library itself tries several times."""
        for attempt in range(attempts):
            self._moved, self._questions = time.monotonic(), 0
            try:
                where = f"hf://{self.repository}: could not {what}"
                return hub_bounds.in_time(action, lambda: self._moved, self._hub.close_session, where)
            except Exception as error:  # the library lets its HTTP library's errors through, another in each version
                ours = _of_kind(error, SteelyardError)
                if ours is not None:
                    raise ours from None
                status = _status(error)
                passing = not library_tries and _is_passing(error, status)
                if attempt == attempts - 1 or not passing:
                    raise HubError(self._in_words(what, error, status), status, passing=passing) from None
                self.pause(attempt, _asked_wait(error))
        raise AssertionError("unreachable")

    def _is_ours(self, url: Any) -> bool:
        """Whether an address is of the Hub that was named: scheme, host and port."""
        mine = urlsplit(self.endpoint)
        port = {"https": 443, "http": 80}
        return (url.scheme, url.host, url.port or port.get(url.scheme)) == (
            mine.scheme,
            mine.hostname,
            mine.port or port.get(mine.scheme),
        )

    def _ask(self, request: Any) -> None:
        """Of every request: not too many for a call. The addresses that the Hub's answers name may be anywhere; the
        token goes to the Hub."""
        request.headers["accept-encoding"] = "gzip"
        self._questions += request.method == "GET"
        if self._questions > hub_bounds.MAX_QUESTIONS:
            text = f"over {hub_bounds.MAX_QUESTIONS:,} pages for one answer: no release is so large"
            raise HubError(f"hf://{self.repository}: {text}")
        if "authorization" in request.headers and not self._is_ours(request.url):
            text = f"{request.url.host}, an address that the Hub named, would get the token: nothing was sent there"
            raise HubError(f"hf://{self.repository}: {text}")

    def _look(self, response: Any) -> None:
        """Of every answer: bounded, no redirect of a call of the API or of content to another host, and an end to two
        waits of the library that have no bound."""
        hub_bounds.bound_answer(response, f"hf://{self.repository}")
        request = response.request
        if response.has_redirect_location and (
            request.method not in ("GET", "HEAD", "PUT") or request.url.path.startswith("/api/")
        ):
            aim = request.url.join(response.headers["location"])
            if self._is_ours(request.url) and not self._is_ours(aim):
                text = f"a call was redirected to {aim.host}, which is not the Hub: it was not followed"
                raise HubError(f"hf://{self.repository}: {text}", response.status_code)
        wait = _retry_after(response.headers)
        if response.status_code in _PASSING and wait is not None and wait > LONGEST_WAIT:
            text = f"the Hub asks to wait for {wait:,.0f} seconds: publish again after that, it goes on from here"
            raise HubError(f"hf://{self.repository}: {text}", response.status_code)
        if response.status_code == 409 and response.request.url.path == _CREATE:
            response.read()
            if "in progress" in response.text:
                text = "the Hub is busy with another change of this account: publish again, it goes on from here"
                raise HubError(f"hf://{self.repository}: {text}", 409)

    def _in_words(self, what: str, error: BaseException, status: int | None) -> str:
        name = self.repository
        said = next((text for cause in _chain(error) if (text := getattr(cause, "server_message", None))), "")
        remedy = {
            401: "the token is not accepted: log in with `hf auth login`, or set HF_TOKEN to a token that may write",
            403: f"the token may not do this: it needs write access to {name.split('/')[0]}",
            404: "there is no such repository, or the token may not see it: check the name and the token",
            409: "another change is under way: publish again, it goes on from here",
            412: "the repository was changed meanwhile: see what was changed, and publish again",
            429: "too many requests: wait, and publish again, it goes on from here",
        }.get(status or 0)
        if status is None:
            network = _is_passing(error, None)
            said = f"{type(error).__name__}: {error}"
            remedy = f"{self.endpoint} cannot be reached: check the network and HF_ENDPOINT" if network else "refused"
        elif status >= 500:
            remedy = "the Hub has failed: publish again later, it goes on from here"
        answer = "no answer" if status is None else f"HTTP {status}"
        text = f"hf://{name}: could not {what} ({answer}): {remedy or 'the Hub refuses this'}"
        said = " ".join(said.split())[:200]
        text = f"{text} ({said})" if said else text
        return text.replace(self._token, "(the token)") if self._token else text


def _git_blob(file: ReleaseFile) -> str:
    """Git's name of a blob with the verified content of `file`."""
    found = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
    with closing(file.open()) as content:
        while data := content.read(1 << 20):
            found.update(data)
    return found.hexdigest()


def _chain(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _of_kind(error: BaseException, kind: type[Any]) -> Any:
    """The first of that kind among an error and what led to it; None where there is none."""
    return next((cause for cause in _chain(error) if isinstance(cause, kind)), None)


def _response(error: BaseException) -> Any:
    return next((found for cause in _chain(error) if (found := getattr(cause, "response", None)) is not None), None)


def _status(error: BaseException) -> int | None:
    response = _response(error)
    return None if response is None else int(response.status_code)


def _is_passing(error: BaseException, status: int | None) -> bool:
    """Whether to try again may help. An HTTP library's failures to connect, to send or to receive are known by the
    name of their base class: which library it is depends on the version of huggingface_hub.
    """
    if status is not None:
        return status in _PASSING
    if _of_kind(error, json.JSONDecodeError) is not None:
        return True  # an error page where an answer was expected
    names = {base.__name__ for cause in _chain(error) for base in type(cause).__mro__}
    return "TransportError" in names or "ConnectionError" in names


def _asked_wait(error: BaseException) -> float | None:
    response = _response(error)
    return None if response is None else _retry_after(response.headers)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the Hub asks to wait: `Retry-After`, or the `t` of an exhausted `RateLimit`."""
    asked = headers.get("retry-after", "").strip()
    if asked.isdigit():
        return float(asked[:9])
    limit = dict(part.strip().split("=", 1) for part in headers.get("ratelimit", "").split(";") if "=" in part)
    return float(limit["t"][:9]) if limit.get("r") == "0" and limit.get("t", "").isdigit() else None
