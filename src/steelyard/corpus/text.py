"""Documents to learn from: a folder of text, and the text that ships inside Python and its packages.

A document is a file; a docstring collection (all docstrings of one module) is one; a file that holds many works is cut
where one ends and the next begins, so that a validation split by document holds out whole works.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import importlib.util
import io
import re
import sysconfig
import tarfile
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.base.files import open_regular
from steelyard.base.progress import Progress, Silent

MAX_FILE = 64 << 20  # bytes, once unpacked: a text file larger than this wants a format made for it
SUFFIXES = (".txt", ".md", ".rst", ".txt.gz", ".md.gz", ".rst.gz", ".tar.gz")
PACKAGES = ("numpy",)
"""Installed packages whose docstrings are read besides the standard library's: what the core already needs."""
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__", "pydoc_data"}
_SHORTEST = 64  # characters


@dataclass(frozen=True)
class Document:
    """A text, and where it comes from (`source` names the collection, for the counts)."""

    source: str
    name: str
    text: str


# -- a folder --------------------------------------------------------------------------------------------------------


def folder_documents(
    folder: Path, *, only: Sequence[str] = (), boundary: str = "", progress: Progress | None = None
) -> Iterator[Document]:
    """Every text file below `folder` (`SUFFIXES`; members of .tar.gz too), in order of its path.

    `only`: glob patterns of paths below the folder. `boundary`: a regular expression that matches at the beginning of
    each document within a file; empty: a file is one. Raises UsageError where there is no such file, FormatError for
    one that is not UTF-8, not sound, or larger than `MAX_FILE`.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    try:
        splitter = re.compile(boundary) if boundary else None
    except re.error as error:
        raise UsageError(f"boundary {boundary!r}: {error}") from error
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name.endswith(SUFFIXES))
    if only:
        found = [path for path in found if any(path.relative_to(folder).match(pattern) for pattern in only)]
    if not found:
        raise UsageError(f"{folder}: holds no text file ({', '.join(SUFFIXES)})")
    with (progress or Silent()).task(f"read {folder.name}", len(found), "files") as task:
        for path in found:
            for name, text in file_texts(path):
                for number, piece in enumerate(_pieces(text, splitter)):
                    yield Document(folder.name, f"{path.relative_to(folder)}{name}#{number}", piece)
            task.advance()


def _pieces(text: str, splitter: re.Pattern[str] | None) -> list[str]:
    if splitter is None:
        return [text]
    cuts = sorted({0, *(match.start() for match in splitter.finditer(text)), len(text)})
    return [text[start:end] for start, end in pairwise(cuts)]


def file_texts(path: Path) -> Iterator[tuple[str, str]]:
    """(name within the file, text) of a file, or of each plain member of an archive."""
    try:
        with open_regular(path) as raw:
            if path.name.endswith(".tar.gz"):
                with tarfile.open(fileobj=raw, mode="r:gz") as archive:
                    for member in archive:
                        if member.isfile() and member.name.endswith((".txt", ".md", ".rst")):
                            file = archive.extractfile(member)
                            assert file is not None
                            yield f":{member.name}", _decoded(path, file.read(MAX_FILE + 1))
            elif path.suffix == ".gz":
                with gzip.open(raw) as packed:
                    yield "", _decoded(path, packed.read(MAX_FILE + 1))
            else:
                yield "", _decoded(path, raw.read(MAX_FILE + 1))
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise FormatError(f"{path}: is not a sound archive ({error})") from error
    except OSError as error:
        raise SteelyardError(f"{path}: {error.strerror or error}") from error


def _decoded(path: Path, data: bytes) -> str:
    if len(data) > MAX_FILE:
        raise FormatError(f"{path}: holds a text of over {MAX_FILE:,} bytes")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: is not UTF-8 (byte {error.start})") from None


# -- what is installed ------------------------------------------------------------------------------------------------


def python_documents(packages: Sequence[str] = PACKAGES, *, progress: Progress | None = None) -> Iterator[Document]:
    """The documentation inside Python: the language's help topics, and the docstrings of every module of the standard
    library and of `packages`. Nothing is imported: source is parsed. A docstring of several modules is given once.

    Raises UsageError for a package that is not installed.
    """
    standard = Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    yield from _topics(standard)
    for name, root in (("python", standard), *((package, _package(package)) for package in packages)):
        files = sorted(p for p in root.rglob("*.py") if not _SKIPPED & {*p.relative_to(root).parts})
        with (progress or Silent()).task(f"docstrings of {name}", len(files), "modules") as task:
            for path in files:
                text = docstrings(path, seen)
                if text:
                    yield Document(name, path.relative_to(root).as_posix(), text)
                task.advance()


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name) if re.fullmatch(r"[A-Za-z_]\w*", name) else None
    if spec is None or spec.origin is None:
        raise UsageError(f"package {name!r} is not installed")
    return Path(spec.origin).parent


def _topics(standard: Path) -> Iterator[Document]:
    """The help topics (`help("assert")`): parts of the language reference that Python carries as one module."""
    path = standard / "pydoc_data" / "topics.py"
    if not path.is_file():  # some distributions leave it out
        return
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for key, value in ast.literal_eval(node.value).items():
                yield Document("python", f"topic {key}", value.strip())


def docstrings(path: Path, seen: set[str]) -> str:
    """The docstrings of a module, its classes and functions, each behind the name of what it describes; empty where
    the file is no Python of this version. Those in `seen` are left out, and the others put there.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError, OSError):
        return ""
    found: list[tuple[str, str]] = []

    def visit(node: ast.AST, name: str) -> None:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= _SHORTEST and text not in seen:
                seen.add(text)
                found.append((name, text))
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child, f"{name}.{child.name}")

    visit(tree, path.stem if path.stem != "__init__" else path.parent.name)
    return "\n\n\n".join(f"{name}\n\n{text.strip()}" for name, text in found)


# -- one set to train on, one to hold out -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Documents to train on and to hold out, and what was left out on the way."""

    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    paragraphs: int
    """Paragraphs that stood in an earlier document, or earlier in their own."""
    duplicates: int
    """Documents of which nothing new was left."""
    short: int
    over: int
    """Documents past the limit on a source's characters."""


def split_documents(
    documents: Iterable[Document],
    *,
    validation_share: float,
    limits: Mapping[str, int] | None = None,
    longest: int | None = None,
) -> Split:
    """Drop paragraphs and documents that occurred before, order the rest by a hash of their text, hold out a share.

    Paragraphs of `_SHORTEST` characters and more are compared, white space and case aside, as CCNet's are (Wenzek et
    al., LREC 2020, section 3.1; LLaMA's crawl came that way): without that, held-out text would be there to copy. A
    document's part depends on its text alone. `limits`: the most characters of a source; `longest`: where a document
    is cut, in characters (a novel must not be most of a split). Raises SteelyardError where either part is empty.
    """
    if not 0 < validation_share < 1:
        raise UsageError(f"validation_share is {validation_share}: must be between 0 and 1")
    kept: dict[bytes, Document] = {}
    seen: set[bytes] = set()
    paragraphs = duplicates = short = over = 0
    for document in documents:
        whole = document.text.strip()
        if len(whole) < _SHORTEST:
            short += 1
            continue
        text, dropped = _new_paragraphs(whole if longest is None else _cut(whole, longest), seen)
        paragraphs += dropped
        if len(text) < _SHORTEST:
            duplicates += 1
            continue
        kept[_key(text)] = Document(document.source, document.name, text)
    used: dict[str, int] = {}
    parts: tuple[list[Document], list[Document]] = ([], [])
    for key in sorted(kept):
        document = kept[key]
        size = used.get(document.source, 0) + len(document.text)
        if limits and size > limits.get(document.source, size):
            over += 1
            continue
        used[document.source] = size
        held_out = int.from_bytes(hashlib.sha256(key).digest()[:8]) < validation_share * 2**64
        parts[held_out].append(document)
    if not parts[0] or not parts[1]:
        raise SteelyardError(
            f"of {len(kept):,} documents {len(parts[1]):,} would be held out: give more text, or another "
            "validation_share"
        )
    return Split(tuple(parts[0]), tuple(parts[1]), paragraphs, duplicates, short, over)


def _key(text: str) -> bytes:
    return hashlib.sha256(" ".join(text.casefold().split()).encode()).digest()


def _new_paragraphs(text: str, seen: set[bytes]) -> tuple[str, int]:
    """The text without the paragraphs in `seen`, where the others are put; and how many went."""
    pieces = re.split(r"(\n\s*\n)", text)
    out: list[str] = []
    dropped = 0
    for number in range(0, len(pieces), 2):
        paragraph = pieces[number]
        if len(paragraph) >= _SHORTEST:
            key = _key(paragraph)
            if key in seen:
                dropped += 1
                continue
            seen.add(key)
        out += [pieces[number - 1] if out else "", paragraph]
    return "".join(out).strip(), dropped


def _cut(text: str, longest: int) -> str:
    """The first `longest` characters at most, up to a paragraph's end where one is in the last quarter."""
    if len(text) <= longest:
        return text
    end = text.rfind("\n\n", longest * 3 // 4, longest)
    return text[: end if end > 0 else longest].rstrip()


def part_sizes(documents: Iterable[Document]) -> dict[str, dict[str, int]]:
    """Documents and bytes by source, for a report."""
    sizes: dict[str, dict[str, int]] = {}
    for document in documents:
        entry = sizes.setdefault(document.source, {"documents": 0, "bytes": 0})
        entry["documents"] += 1
        entry["bytes"] += len(document.text.encode())
    return sizes


def joined(documents: Iterable[Document]) -> bytes:
    """The documents as one text, a blank line between them: what a compressor is given."""
    buffer = io.BytesIO()
    for document in documents:
        buffer.write(document.text.encode() + b"\n\n")
    return buffer.getvalue()
