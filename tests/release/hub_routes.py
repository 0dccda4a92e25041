"""The Hub's HTTP, request by request, for hub_server.py."""

from __future__ import annotations

import base64
import contextlib
import fnmatch
import hashlib
import json
import re
import socket
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_state import ATTRIBUTES, LFS_NAMES, READ, WRITE, Blob, Fault, HubState, Repository


class _RefusedError(Exception):
    def __init__(self, status: int, text: str, code: str | None = None, **more: str) -> None:
        self.status, self.text, self.code, self.more = status, text, code, more


class Handler(BaseHTTPRequestHandler):
    hub: HubState
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_one()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def handle_one(self) -> None:
        split = urlsplit(self.path)
        self.route, self.query = unquote(split.path), parse_qs(split.query)
        request = f"{self.command} {self.route}"
        with self.hub.lock:
            self.hub.asked.append(request)
        if self.hub.on_request is not None:
            self.hub.on_request(request)
        fault = self.hub.fault(request)
        self.left = int(self.headers.get("Content-Length") or 0)
        try:
            if fault is not None and fault.kind == "drop":
                self.rfile.read(self.left // 2)
                return self.hang_up()
            if fault is not None and fault.kind in ("endless", "drip"):
                self.rfile.read(self.left)
                return self.never_end(fault)
            if fault is not None and fault.kind == "status":
                self.rfile.read(self.left)
                return self.answer({"error": fault.text}, fault.status, fault.headers)
            if fault is not None and fault.kind == "ignore":
                self.rfile.read(self.left)
                return self.answer({"commitUrl": f"{self.hub.url}/org/x/commit/{'0' * 40}", "commitOid": "0" * 40})
            if fault is not None and fault.kind == "slow":
                time.sleep(fault.seconds)
            self.dispatch(lost=fault is not None and fault.kind == "lost")
        except _RefusedError as refused:
            self.rfile.read(self.left)
            headers = {"X-Error-Message": refused.text} | ({"X-Error-Code": refused.code} if refused.code else {})
            self.answer({"error": refused.text} | refused.more, refused.status, headers)
        except (ConnectionError, TimeoutError):
            self.hang_up()

    def hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def never_end(self, fault: Fault) -> None:
        """`fault.text`, then its last character again and again; a drip does so slowly, from the head on."""
        self.close_connection = True
        if fault.kind == "endless":
            self.send_response(200)
            for name, text in ({"Content-Type": "application/json"} | fault.headers).items():
                self.send_header(name, text)
            self.end_headers()
        packed = zlib.compressobj(wbits=31) if fault.headers.get("Content-Encoding") == "gzip" else None
        data = fault.text.encode()
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(packed.compress(data) if packed is not None else data)
                data = fault.text[-1:].encode() * (1 if fault.kind == "drip" else 100_000)
                if fault.kind == "drip":
                    time.sleep(0.02)

    def read(self) -> bytes:
        data = self.rfile.read(self.left)
        if len(data) != self.left:
            raise ConnectionResetError
        self.left = 0
        return data

    def json(self) -> Any:
        return json.loads(self.read() or b"{}")

    def answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in (
            {"Content-Length": str(len(data)), "Content-Type": "application/json"} | (headers or {})
        ).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # -- who asks, for what ------------------------------------------------------------------------------------------

    def account(self, *, write: bool = False) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in (WRITE, READ, ""):
            raise _RefusedError(401, f"Invalid credentials in Authorization header: {token}")
        if write and token != WRITE:
            raise _RefusedError(403 if token else 401, "this token may only read")
        return {WRITE: "alice", READ: "bob"}.get(token)

    def repository(self, name: str, *, write: bool = False) -> Repository:
        account = self.account(write=write)
        found = self.hub.repositories.get(name)
        if found is None or (found.private and account != "alice"):
            raise _RefusedError(404 if account else 401, "Repository not found", "RepoNotFound")
        return found

    def at(self, repository: Repository, revision: str) -> tuple[str, dict[str, Blob]]:
        found = repository.at(revision)
        if found is None:
            raise _RefusedError(404, "Invalid rev id", "RevisionNotFound")
        return found

    def dispatch(self, lost: bool) -> None:
        for method, pattern, name in ROUTES:
            match = re.fullmatch(pattern, self.route)
            if match and self.command in method:
                # The transfer of large files takes no lock; all the rest is done one after the other.
                if name.startswith("put_"):
                    result = getattr(self, name)(**match.groupdict())
                else:
                    with self.hub.lock:
                        result = getattr(self, name)(**match.groupdict())
                if lost:
                    return self.hang_up()
                value, headers = result if isinstance(result, tuple) else (result, None)
                return self.answer(value, headers=headers)
        raise _RefusedError(404, f"no such address: {self.route}")

    # -- account and settings ----------------------------------------------------------------------------------------

    def whoami(self) -> Any:
        account = self.account()
        if account is None:
            raise _RefusedError(401, "Invalid credentials in Authorization header")
        return {"type": "user", "name": account, "orgs": [{"name": "org"}], "auth": {"type": "access_token"}}

    def create(self) -> Any:
        self.account(write=True)
        wanted = self.json()
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.hub.repositories:
            raise _RefusedError(409, "You already created this model repo", url=f"{self.hub.url}/{name}")
        if wanted["organization"] not in ("org", "alice"):
            raise _RefusedError(403, "You don't have the rights to create a model under this namespace")
        made = Repository(private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
        made.commit({".gitattributes": Blob(len(ATTRIBUTES), ATTRIBUTES)}, "initial commit")
        self.hub.repositories[name] = made
        return {"url": f"{self.hub.url}/{name}", "name": name, "id": "1"}

    def settings(self, name: str) -> Any:
        repository, wanted = self.repository(name, write=True), self.json()
        repository.gated = wanted.get("gated", repository.gated)
        if "visibility" in wanted:
            repository.private = wanted["visibility"] == "private"
        return {"gated": repository.gated, "private": repository.private}

    def info(self, name: str, revision: str | None = None) -> Any:
        repository = self.repository(name)
        head, files = self.at(repository, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(files)]
        access = {"private": repository.private, "gated": repository.gated, "disabled": False}
        return {"id": name, "modelId": name, "sha": head, "siblings": siblings, "tags": [], **access}

    def access_requests(self, name: str, status: str) -> Any:
        repository = self.repository(name, write=True)
        if not repository.gated:
            raise _RefusedError(400, "This repository is not gated")
        found = [one for one in repository.requests if one["status"] == status]
        first = int(self.query.get("cursor", ["0"])[0])
        address = f"{self.hub.url}{urlsplit(self.path).path}?cursor={first + self.hub.page}"
        more = {"Link": f'<{address}>; rel="next"'} if len(found) > first + self.hub.page else {}
        return found[first : first + self.hub.page], more

    def refs(self, name: str) -> Any:
        repository = self.repository(name)
        tags = [{"name": t, "ref": f"refs/tags/{t}", "targetCommit": c} for t, c in repository.tags.items()]
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repository.commits[-1][0]}
        return {"branches": [main], "converts": [], "tags": tags}

    def tag(self, name: str, revision: str) -> Any:
        repository, wanted = self.repository(name, write=True), self.json()
        if wanted["tag"] in repository.tags:
            raise _RefusedError(409, "Tag reference exists already")
        repository.tags[wanted["tag"]] = self.at(repository, revision)[0]
        return {}

    def validate_yaml(self) -> Any:
        text = self.json()["content"]
        if not text.startswith("---\n") or "\n---" not in text[4:]:
            return {"warnings": [{"message": "empty or missing yaml metadata in repo card"}], "errors": []}
        return {"warnings": [], "errors": []}

    # -- files -------------------------------------------------------------------------------------------------------

    def entry(self, path: str, blob: Blob) -> dict[str, Any]:
        lfs = {"lfs": {"oid": blob.lfs, "size": blob.size, "pointerSize": 134}} if blob.lfs else {}
        return {"type": "file", "path": path, "size": blob.size, "oid": blob.oid, **lfs}

    def tree(self, name: str, revision: str) -> Any:
        files = self.at(self.repository(name), revision)[1]
        entries = [self.entry(path, blob) for path, blob in sorted(files.items())]
        folders = sorted({path.rsplit("/", 1)[0] for path in files if "/" in path})
        entries += [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders]
        first = int(self.query.get("cursor", ["0"])[0])
        address = f"{self.hub.url}{urlsplit(self.path).path}?recursive=True&cursor={first + self.hub.page}"
        more = {"Link": f'<{address}>; rel="next"'} if len(entries) > first + self.hub.page else {}
        return entries[first : first + self.hub.page], more

    def paths_info(self, name: str, revision: str) -> Any:
        files = self.at(self.repository(name), revision)[1]
        wanted = parse_qs(self.read().decode()).get("paths", [])
        return [self.entry(path, files[path]) for path in wanted if path in files]

    def resolve(self, name: str, revision: str, path: str) -> Any:
        repository = self.repository(name)
        if repository.gated and self.account() != "alice":
            raise _RefusedError(403 if self.account() else 401, f"Access to model {name} is restricted", "GatedRepo")
        head, files = self.at(repository, revision)
        if path not in files:
            raise _RefusedError(404, "Entry not found", "EntryNotFound")
        blob = files[path]
        data = blob.data if blob.data is not None else self.hub.stored(str(blob.lfs)).read_bytes()
        return data, {"X-Repo-Commit": head, "ETag": f'"{blob.lfs or blob.oid}"', "Content-Type": "text/plain"}

    def preupload(self, name: str, revision: str) -> Any:
        files = self.at(self.repository(name, write=True), revision)[1]

        def mode(file: dict[str, Any]) -> dict[str, Any]:
            by_name = any(fnmatch.fnmatch(file["path"], pattern) for pattern in LFS_NAMES)
            binary = b"\0" in base64.b64decode(file["sample"])
            large = by_name or binary or file["size"] > self.hub.regular
            there = files.get(file["path"])
            oid = {} if there is None else {"oid": there.lfs or there.oid}
            return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, **oid}

        return {"files": [mode(file) for file in self.json()["files"]]}

    def commit(self, name: str, revision: str) -> Any:
        repository = self.repository(name, write=True)
        head, files = self.at(repository, revision)
        lines = [json.loads(line) for line in self.read().splitlines()]
        header, changed = lines[0]["value"], dict(files)
        if header.get("parentCommit", head) != head:
            raise _RefusedError(412, "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                data = base64.b64decode(value["content"])
                changed[value["path"]] = Blob(len(data), data)
            elif line["key"] == "lfsFile":
                if not self.hub.stored(value["oid"]).is_file():
                    raise _RefusedError(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                changed[value["path"]] = Blob(self.hub.stored(value["oid"]).stat().st_size, lfs=value["oid"])
            else:
                raise _RefusedError(400, f"not served here: {line['key']}")
        oid = repository.commit(changed, header["summary"])
        return {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, "hookOutput": ""}

    # -- large files -------------------------------------------------------------------------------------------------

    def batch(self, name: str) -> Any:
        self.repository(name, write=True)
        wanted = self.json()
        assert wanted["operation"] == "upload" and wanted["hash_algo"] == "sha256", wanted  # noqa: PT018
        verify = {"href": f"{self.hub.verified_at or self.hub.url}/{name}.git/info/lfs/objects/verify"}

        def actions(oid: str, size: int) -> dict[str, Any]:
            if self.hub.stored(oid).is_file():
                return {"oid": oid, "size": size}
            base, part = f"{self.hub.url}/lfs/{oid}?X-Amz-Signature=secret", self.hub.part
            upload: dict[str, Any] = {"href": base}
            if part is not None and size > part:
                parts = range(1, -(-size // part) + 1)
                urls = {f"{n:05d}": f"{self.hub.url}/lfs/{oid}/{n}?X-Amz-Signature=secret" for n in parts}
                upload = {"href": f"{self.hub.url}/lfs/{oid}/complete", "header": {"chunk_size": str(part), **urls}}
            return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}

        return {"transfer": "basic", "objects": [actions(file["oid"], file["size"]) for file in wanted["objects"]]}

    def put_object(self, oid: str, part: str = "") -> Any:
        """What arrives is kept only where it arrives whole, and is what its name says."""
        place = self.hub.stored(f"{oid}.{part or 'whole'}.{threading.get_ident()}")
        found, size = hashlib.sha256(), self.left
        with place.open("wb") as file:
            while self.left:
                data = self.rfile.read1(min(self.left, 1 << 20))  # type: ignore[attr-defined]
                if not data:
                    place.unlink()
                    raise ConnectionResetError
                self.left -= len(data)
                found.update(data)
                file.write(data)
        if part:
            place.rename(self.hub.stored(f"{oid}.part{part}"))
        elif found.hexdigest() != oid:
            place.unlink()
            raise _RefusedError(400, "BadDigest")
        else:
            place.rename(self.hub.stored(oid))
            self.hub.bodies[oid] = self.hub.bodies.get(oid, 0) + size
        return {}, {"ETag": f'"{found.hexdigest()[:32]}"'}

    def complete(self, oid: str) -> Any:
        parts = self.json()["parts"]
        place, found = self.hub.stored(f"{oid}.joined"), hashlib.sha256()
        with place.open("wb") as file:
            for number in sorted(part["partNumber"] for part in parts):
                data = self.hub.stored(f"{oid}.part{number}").read_bytes()
                found.update(data)
                file.write(data)
        if found.hexdigest() != oid:
            raise _RefusedError(400, "BadDigest")
        place.rename(self.hub.stored(oid))
        self.hub.bodies[oid] = self.hub.bodies.get(oid, 0) + self.hub.stored(oid).stat().st_size
        return {}

    def verify(self, name: str) -> Any:
        self.repository(name, write=True)
        wanted = self.json()
        place = self.hub.stored(wanted["oid"])
        if not place.is_file() or place.stat().st_size != wanted["size"]:
            raise _RefusedError(404, "object not found")
        return {}


_NAME = "(?P<name>[^/]+/[^/]+?)"
_REVISION = "(?P<revision>[^/]+)"
ROUTES = (
    (("GET",), "/api/whoami-v2", "whoami"),
    (("POST",), "/api/repos/create", "create"),
    (("POST",), "/api/validate-yaml", "validate_yaml"),
    (("PUT",), f"/api/models/{_NAME}/settings", "settings"),
    (("GET",), f"/api/models/{_NAME}/refs", "refs"),
    (("GET",), f"/api/models/{_NAME}/user-access-request/(?P<status>[a-z]+)", "access_requests"),
    (("POST",), f"/api/models/{_NAME}/tag/{_REVISION}", "tag"),
    (("GET",), f"/api/models/{_NAME}/tree/{_REVISION}", "tree"),
    (("POST",), f"/api/models/{_NAME}/paths-info/{_REVISION}", "paths_info"),
    (("POST",), f"/api/models/{_NAME}/preupload/{_REVISION}", "preupload"),
    (("POST",), f"/api/models/{_NAME}/commit/{_REVISION}", "commit"),
    (("GET",), f"/api/models/{_NAME}/revision/{_REVISION}", "info"),
    (("GET",), f"/api/models/{_NAME}", "info"),
    (("POST",), rf"/{_NAME}\.git/info/lfs/objects/batch", "batch"),
    (("POST",), rf"/{_NAME}\.git/info/lfs/objects/verify", "verify"),
    (("PUT",), "/lfs/(?P<oid>[0-9a-f]{64})", "put_object"),
    (("PUT",), "/lfs/(?P<oid>[0-9a-f]{64})/(?P<part>[0-9]+)", "put_object"),
    (("POST",), "/lfs/(?P<oid>[0-9a-f]{64})/complete", "complete"),
    (("GET", "HEAD"), f"/{_NAME}/resolve/{_REVISION}/(?P<path>.+)", "resolve"),
)
