"""A marked copy's files: a plain Hugging Face folder, and `steelyard/` with what says where it comes from.

It holds no manifest, journal or test result of its own, so that nothing takes it for a release: `steelyard verify` says
what it is. `copy.dsse.json` signs `copy.json`, which lists every other file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from steelyard.base.canonical import canonical_json, sha256_file, sha256_hex
from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.base.files import read_bounded
from steelyard.base.strict import strict_json
from steelyard.model.identity import is_model_file
from steelyard.release.attest import ENVELOPE_LIMIT, Sha256, Strict, first_of, parse_statement, read_envelope
from steelyard.release.grant_request import Wanted
from steelyard.release.grant_statements import FRAMED, MarkedCopy, parse
from steelyard.release.layout import CARD, HOME, MANIFEST, MANIFEST_LIMIT, MAX_REVIEWS, SUMMARY, TEST_RESULT
from steelyard.safety.markup import code, escape

LIST = f"{HOME}/copy.json"
STATEMENT = f"{HOME}/copy.dsse.json"
COMMITMENT = f"{HOME}/commitment.json"
COUNTERSIGNATURE = f"{HOME}/commitment.dsse.json"
TIMESTAMP = f"{HOME}/commitment.tsr"
REVIEWS = tuple(f"{HOME}/review-{number}.dsse.json" for number in range(1, MAX_REVIEWS + 1))
SOURCE_TEST = f"{HOME}/source-test-result.dsse.json"
SOURCE_SUMMARY = f"{HOME}/source-summary.dsse.json"
SOURCE_CARD = f"{HOME}/source-card.md"
LICENCE = f"{HOME}/licence.txt"  # what the recipient accepted; the model's own LICENSE stays as it is
PAPERS = (LICENCE, COMMITMENT, COUNTERSIGNATURE, TIMESTAMP, *REVIEWS, SOURCE_TEST, SOURCE_SUMMARY, SOURCE_CARD)
LICENCE_LIMIT = 1_000_000  # bytes
LIST_LIMIT = 1_000_000
MAX_FILES = 2_000
MAX_CARD = 2_000_000


class CopyFile(Strict):
    path: Annotated[str, Field(min_length=1, max_length=200)]
    size: int = Field(ge=0)
    sha256: Sha256


class CopyList(Strict):
    """Every file of a copy but this one and the statement."""

    format: Literal[1] = 1
    files: tuple[CopyFile, ...] = Field(min_length=1, max_length=MAX_FILES)


def may_hold(path: str) -> bool:
    """Whether a copy may hold a file of this name: a closed list."""
    return path in (LIST, STATEMENT, *PAPERS) or is_model_file(path)


def list_bytes(folder: Path) -> bytes:
    """The list of what lies in `folder`. Raises FormatError for a file that a copy may not hold."""
    files = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name in (LIST, STATEMENT):
            continue
        if not may_hold(name):
            raise FormatError(f"{name}: not a file that a copy may hold")
        files.append({"path": name, "size": path.stat().st_size, "sha256": sha256_file(path)})
    return canonical_json({"format": 1, "files": files}) + b"\n"


def parse_list(data: bytes) -> CopyList:
    """The list of a copy's files, each name checked. Raises FormatError."""
    try:
        found = CopyList.model_validate(strict_json(data, LIST, limit=LIST_LIMIT))
    except ValidationError as error:
        raise FormatError(f"{LIST}: {first_of(error, 'list')}") from error
    paths = [file.path for file in found.files]
    if paths != sorted(set(paths)):
        raise FormatError(f"{LIST}: files must be sorted by path, each once")
    for path in paths:
        if not may_hold(path) or path in (LIST, STATEMENT):
            raise FormatError(f"{LIST}: lists {path!r}, which no copy may hold")
    return found


def said_to_be(folder: Path) -> MarkedCopy | None:
    """What a folder's statement says that it is, *unverified*; None where it is no marked copy."""
    if not os.path.lexists(folder / STATEMENT):
        return None
    try:
        data = read_bounded(folder / STATEMENT, ENVELOPE_LIMIT)
        return parse(read_envelope(data, STATEMENT)[0], STATEMENT, MarkedCopy)[2]
    except (SteelyardError, OSError):
        return None


def wanted_of(bundle: Path) -> Wanted:
    """Which release lies in a bundle, as its test result says it: *unverified*. Raises FormatError."""
    try:
        manifest = sha256_hex(read_bounded(bundle / MANIFEST, MANIFEST_LIMIT))
        envelope = read_bounded(bundle / TEST_RESULT, ENVELOPE_LIMIT)
    except OSError as error:
        raise FormatError(f"{bundle}: is not a bundle: {error.filename}: {error.strerror}") from error
    _, said, _ = parse_statement(read_envelope(envelope, TEST_RESULT)[0], TEST_RESULT)
    if said.get(MANIFEST) != manifest:
        raise FormatError(f"{bundle}: its manifest is not the one that its test result names: give an intact bundle")
    try:
        return Wanted(weights=said["weights"], subject=said["subject"], manifest=manifest)
    except (KeyError, ValidationError) as error:
        raise FormatError(f"{bundle}: its test result names no weights or subject: give an intact bundle") from error


def licence_of(bundle: Path, file: Path | None = None) -> bytes:
    """The text that a recipient accepts: `file`, else the bundle's own. Raises UsageError where there is none."""
    path = file or next((bundle / name for name in ("LICENSE", "LICENSE.txt") if (bundle / name).is_file()), None)
    if path is None:
        raise UsageError(f"{bundle}: holds no LICENSE: give the text that recipients accept (--licence FILE)")
    try:
        return read_bounded(path, LICENCE_LIMIT)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}: give the licence's file") from error


def source_papers(bundle: Path) -> dict[str, bytes]:
    """What a copy takes along of the release that it comes from: the signed results, and the card."""
    return {
        SOURCE_TEST: read_bounded(bundle / TEST_RESULT, ENVELOPE_LIMIT),
        SOURCE_SUMMARY: read_bounded(bundle / SUMMARY, ENVELOPE_LIMIT),
        SOURCE_CARD: read_bounded(bundle / CARD, MAX_CARD),
    }


def card(copy: MarkedCopy) -> str:
    """The README of a copy: what it is, and what it is not. The release's name is a text of strangers."""
    source, bound = copy.derived_from, copy.bound
    measured = [f"- relative change of the weights (root mean square): {bound.relative_change:.3g}"]
    if bound.perplexity is not None:
        found = bound.perplexity
        measured.append(
            f"- perplexity per token on {found.tokens:,} tokens: {found.copy_:.4f}, was {found.original:.4f}"
        )
    if bound.battery is not None:
        for one in bound.battery.differences:
            measured.append(f"- {escape(one.metric)}, {one.n:,} prompts: {one.copy_:.4f}, was {one.original:.4f}")
    name = re.sub(r"\s+", " ", source.name)
    lines = [
        f"# A marked copy of {escape(name)}",
        "",
        f"This is not a release and was not tested. It is derived from tested subject {code(source.subject)} for grant",
        f"{code(copy.grant)}, until {code(copy.expires)}, and carries a mark that names this grant. Who asked for",
        f"it is kept apart, and erased {copy.retain_days} days after the grant's end.",
        "",
        "## How far it is from what was tested",
        "",
        *measured,
        "",
        "What is not listed was not measured.",
        "",
        "## How to check it",
        "",
        "    steelyard grant verify COPY --trust trust.yaml",
        "",
        f"{SOURCE_CARD} is the card of the release that it comes from. {LICENCE} is the licence that was accepted.",
        "",
        FRAMED,
    ]
    return "\n".join(lines) + "\n"


def write_papers(folder: Path, papers: Mapping[str, bytes]) -> None:
    """Write small files below `folder`."""
    for name, data in papers.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
