"""A bundle's files against its manifest: a closed list, every file of it plain and unchanged."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from steelyard.base.canonical import sha256_file, sha256_hex
from steelyard.base.errors import FormatError, SteelyardError
from steelyard.base.files import read_bounded
from steelyard.base.progress import Progress, Silent
from steelyard.model.headers import quote, refuse_unsafe_files
from steelyard.release.layout import (
    FOLDERS,
    HOME,
    HUB_FILE,
    HUB_FILE_LIMIT,
    MANIFEST,
    MANIFEST_LIMIT,
    MAX_FILES,
    MODEL_SIGNATURE,
    REQUIRED,
    SIGNING,
    SUMMARY,
    TEST_RESULT,
    DowngradeError,
    Manifest,
    kind_of,
    parse_manifest,
)
from steelyard.safety.journal import Finding

SEALS = (MODEL_SIGNATURE, SUMMARY)  # what a bundle has and a candidate has not


@dataclass(frozen=True)
class Files:
    """What lies in a bundle. `present`: path to size; `hashes`: SHA-256 of every listed file that was read, and of the
    manifest; `manifest`: the SHA-256 of its bytes, empty where it cannot be read."""

    present: Mapping[str, int] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    manifest: str = ""


def list_files(folder: Path) -> tuple[dict[str, int], list[Finding]]:
    """Plain files of a bundle (relative path to size); a finding for anything else that lies there, and for whatever
    makes it unsafe to open more of it (`unsafe`): links, pipes, pickles, code, a second set of weights."""
    present: dict[str, int] = {}
    findings = []
    for place, prefix in ((folder, ""), *((folder / name, f"{name}/") for name in FOLDERS)):
        if place.is_symlink():
            findings.append(Finding("unsafe", f"{place.name}: is a symbolic link: a bundle holds plain files"))
            continue
        if not place.is_dir():
            if place.name == HOME:
                findings.append(Finding("missing", f"{HOME}: is missing: {folder.name} is not a bundle"))
            continue
        with os.scandir(place) as entries:
            for entry in entries:
                name = prefix + entry.name
                if len(present) >= MAX_FILES:
                    findings.append(Finding("added", f"{folder.name}: holds over {MAX_FILES:,} files"))
                    break
                if entry.is_symlink():
                    text = "is a symbolic link: a bundle holds plain files"
                    findings.append(Finding("unsafe", f"{shown_name(name)}: {text}"))
                elif entry.is_file(follow_symlinks=False):
                    present[name] = entry.stat(follow_symlinks=False).st_size
                elif name not in FOLDERS or not entry.is_dir(follow_symlinks=False):
                    text = "is no plain file: a bundle holds no such thing"
                    findings.append(Finding("unsafe", f"{shown_name(name)}: {text}"))
    try:
        refuse_unsafe_files(folder)
    except FormatError as error:
        findings.append(Finding("unsafe", relative(error, folder)))
    return present, findings


def check_files(
    folder: Path, present: Mapping[str, int], *, sealed: bool, progress: Progress, known: Mapping[str, str]
) -> tuple[Files, list[Finding]]:
    """The folder, whose plain files are `present`, against its manifest. `sealed`: a bundle, not only a candidate.
    `known`: SHA-256 of files that were read already."""
    findings = list(_check_signing(present, sealed=sealed))
    try:
        data = read_bounded(folder / MANIFEST, MANIFEST_LIMIT)
        manifest = parse_manifest(data, folder)
    except OSError as error:
        text = f"{MANIFEST}: {error.strerror}: {folder.name} is not a bundle"
        return Files(present), [Finding("manifest", text), *findings]
    except FormatError as error:
        code = "downgrade" if isinstance(error, DowngradeError) else "manifest"
        return Files(present), [Finding(code, relative(error, folder)), *findings]
    hashes, found = _hash(folder, manifest, present, known, progress)
    findings += found
    findings += _check_list(folder, manifest, present)
    digest = sha256_hex(data)
    return Files(present, {**hashes, MANIFEST: digest}, digest), findings


def right_sizes(folder: Path, present: Mapping[str, int]) -> bool:
    """Whether every file of weights is listed with its size, where the list can be read: others are not worth hashing,
    and a sparse one of terabytes would never end."""
    try:
        manifest = parse_manifest(read_bounded(folder / MANIFEST, MANIFEST_LIMIT), folder)
    except (SteelyardError, OSError):
        return True  # `check_files` says why it is none
    listed = {entry.path: entry.size for entry in manifest.files}
    return all(listed.get(name) == size for name, size in present.items() if name.endswith(".safetensors"))


def _check_signing(present: Mapping[str, int], *, sealed: bool) -> Iterator[Finding]:
    for name in (TEST_RESULT, *(SEALS if sealed else ())):
        if name not in present:
            hint = ": a candidate, not a release" if name in SEALS and TEST_RESULT in present else ""
            yield Finding("missing", f"{name}: is missing{hint}")
    if not sealed:
        for name in SEALS:
            if name in present:
                yield Finding("sealed", f"{name}: is there already: a release is neither approved nor sealed again")


def _hash(
    folder: Path, manifest: Manifest, present: Mapping[str, int], known: Mapping[str, str], progress: Progress
) -> tuple[dict[str, str], list[Finding]]:
    findings, hashes = [], dict[str, str]()
    whole = [entry for entry in manifest.files if present.get(entry.path) == entry.size]
    total = sum(entry.size for entry in whole if entry.path not in known) / 1e6
    shown = progress if total >= 1 else Silent()
    # hashlib lets go of the interpreter lock while it works, so shards are read side by side.
    with shown.task("hash the files", total, "MB") as task, ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda name: known.get(name) or sha256_file(folder / name), [entry.path for entry in whole])
        for entry, value in zip(whole, found, strict=True):
            hashes[entry.path] = value
            task.advance(0 if entry.path in known else entry.size / 1e6)
            if value != entry.sha256:
                text = f"{entry.path}: was changed: its SHA-256 is not the manifest's"
                findings.append(Finding("changed", text))
    for entry in manifest.files:
        size = present.get(entry.path, entry.size)
        if size != entry.size:
            text = f"{entry.path}: was changed: {size:,} bytes, the manifest says {entry.size:,}"
            findings.append(Finding("changed", text))
    return hashes, findings


def _check_list(folder: Path, manifest: Manifest, present: Mapping[str, int]) -> Iterator[Finding]:
    """Nothing missing, nothing added, nothing renamed."""
    listed = {entry.path: entry for entry in manifest.files}
    for name in REQUIRED:
        if name not in listed:
            yield Finding("manifest", f"{MANIFEST}: does not list {name}")
    missing = [entry for name, entry in listed.items() if name not in present]
    renamed = {}
    others = {MANIFEST, *SIGNING} | ({HUB_FILE} if present.get(HUB_FILE, 0) <= HUB_FILE_LIMIT else set())
    for name in sorted(present.keys() - listed.keys() - others):
        origin = next((entry for entry in missing if entry.size == present[name]), None)
        if origin is not None and origin.sha256 == sha256_file(folder / name):
            renamed[name] = origin.path
            yield Finding("renamed", f"{shown_name(name)}: is {origin.path} under another name")
        else:
            kind = "" if kind_of(name) else ", and of no kind that a bundle may hold"
            yield Finding("added", f"{shown_name(name)}: is not in the manifest{kind}: remove it")
    for entry in missing:
        if entry.path not in renamed.values():
            yield Finding("missing", f"{entry.path}: is missing")


def shown_name(name: str) -> str:
    """A file's name, fit for one line whatever a stranger called it."""
    return name if name.isascii() and name.isprintable() and len(name) <= 80 else quote(name)


def relative(error: SteelyardError, folder: Path) -> str:
    """The message with paths as a reader of the bundle sees them."""
    return str(error).replace(f"{folder}{os.sep}", "").replace(f"{folder}: ", "")
