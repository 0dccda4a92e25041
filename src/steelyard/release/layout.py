"""What a bundle is made of, format 2: the names, kinds and limits of its files, and the manifest that lists them.

A bundle is a plain Hugging Face folder, `.eval_results/` for the Hub, and `steelyard/` with what proves that it was
tested. The list is closed: a file that is not named here is refused. Two sorts of files:

- Files that the manifest lists, each with size, SHA-256 and kind: the model, the documents, the evidence.
- Files that sign (`SIGNING`), a fixed set of names. Neither the manifest nor the model signature lists them, for they
  are written later; each of them signs the manifest instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from steelyard.base.canonical import canonical_json, sha256_file
from steelyard.base.errors import FormatError
from steelyard.base.files import inside, read_bounded
from steelyard.base.strict import strict_json
from steelyard.model.identity import Sha256, is_model_file

FORMAT = 2
HOME = "steelyard"
RESULTS_HOME = ".eval_results"
MANIFEST = f"{HOME}/manifest.json"
JOURNAL = f"{HOME}/journal.jsonl"
BATTERY = f"{HOME}/battery.json"
POLICY = f"{HOME}/policy.json"
REPORT = f"{HOME}/report.json"
REPORT_HTML = f"{HOME}/report.html"
REPORT_MARKDOWN = f"{HOME}/report.md"
PREDECESSOR = f"{HOME}/predecessor.jsonl"  # only where there was one
OVERLAP = f"{HOME}/overlap.json"  # likewise
COMMITMENT = f"{HOME}/commitment.json"  # likewise
ML_BOM = f"{HOME}/ml-bom.cdx.json"
EVAL_RESULTS = f"{RESULTS_HOME}/steelyard.yaml"
CARD = "README.md"

# The files that sign.
MODEL_SIGNATURE = f"{HOME}/model.sig"
TEST_RESULT = f"{HOME}/test-result.dsse.json"
SUMMARY = f"{HOME}/summary.dsse.json"
MAX_APPROVALS = 9
MAX_REVIEWS = 9  # of a request for access
APPROVALS = tuple(f"{HOME}/approval-{number}.dsse.json" for number in range(1, MAX_APPROVALS + 1))
COUNTERSIGNATURE = f"{HOME}/commitment.dsse.json"
TIMESTAMP = f"{HOME}/commitment.tsr"
SIGNING = (MODEL_SIGNATURE, TEST_RESULT, SUMMARY, *APPROVALS, COUNTERSIGNATURE, TIMESTAMP)

# The Hub makes this in every repository, and it steers nothing: a copy from there may hold it, unlisted and unsigned.
HUB_FILE = ".gitattributes"
HUB_FILE_LIMIT = 100_000  # bytes
UNSIGNED = (*SIGNING, HUB_FILE)  # what the model signature leaves out

FOLDERS = (HOME, RESULTS_HOME)  # and no other
EVIDENCE = (JOURNAL, BATTERY, POLICY, REPORT, REPORT_HTML, REPORT_MARKDOWN)
DOCUMENTS = (EVAL_RESULTS, ML_BOM)
REQUIRED = (*EVIDENCE, *DOCUMENTS, CARD, "config.json")  # of the manifest
OPTIONAL_EVIDENCE = (PREDECESSOR, OVERLAP, COMMITMENT)

MANIFEST_LIMIT = 1_000_000  # bytes
MAX_FILES = 2_000

Kind = Literal["weights", "config", "tokenizer", "prompt", "document", "evidence"]


class DowngradeError(FormatError):
    """A bundle of an older format, which proves less: refused under every policy."""


class ManifestFile(BaseModel):
    """One file of a bundle; `path` is relative to it, with `/`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(min_length=1, max_length=200)
    size: int = Field(ge=0)
    sha256: Sha256
    kind: Kind


class Manifest(BaseModel):
    """Every file of a bundle but the manifest itself and the files that sign, sorted by path."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[2]
    files: tuple[ManifestFile, ...] = Field(max_length=MAX_FILES)

    @model_validator(mode="after")
    def _sorted(self) -> Manifest:
        paths = [file.path for file in self.files]
        if paths != sorted(set(paths)):
            raise ValueError("files must be sorted by path, each once")
        return self


def kind_of(path: str) -> Kind | None:
    """The kind of a file that the manifest lists; None for a path that it may not list."""
    if path in (*EVIDENCE, *OPTIONAL_EVIDENCE):
        return "evidence"
    if path in DOCUMENTS:
        return "document"
    if "/" in path or not is_model_file(path):
        return None
    if path.startswith("model"):
        return "weights"
    if path in ("config.json", "generation_config.json"):
        return "config"
    if path in ("chat_template.jinja", "system_prompt.txt"):
        return "prompt"
    return "document" if path.split(".")[0].isupper() else "tokenizer"


def manifest_bytes(folder: Path) -> bytes:
    """The manifest of what lies in `folder`, files that sign left out. Raises FormatError for a file of no kind."""
    files = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name == MANIFEST or name in UNSIGNED:
            continue
        kind = kind_of(name)
        if kind is None:
            raise FormatError(f"{name}: not a file that a bundle may hold")
        files.append({"path": name, "size": path.stat().st_size, "sha256": sha256_file(path), "kind": kind})
    return canonical_json({"format": FORMAT, "files": sorted(files, key=lambda entry: str(entry["path"]))}) + b"\n"


def read_manifest(bundle: Path) -> Manifest:
    """The manifest of a bundle, with every path checked. Raises FormatError; DowngradeError for an older format."""
    path = bundle / MANIFEST
    try:
        data = read_bounded(path, MANIFEST_LIMIT)
    except OSError as error:
        raise FormatError(f"{MANIFEST}: {error.strerror}: {bundle} is not a bundle") from error
    return parse_manifest(data, bundle)


def parse_manifest(data: bytes, bundle: Path) -> Manifest:
    """`read_manifest` of bytes; `bundle` is where its paths must stay inside."""
    raw = strict_json(data, MANIFEST, limit=MANIFEST_LIMIT)
    found = raw.get("format") if isinstance(raw, dict) else None
    if isinstance(found, int) and not isinstance(found, bool) and found != FORMAT:
        if found < FORMAT:
            text = f"made by format {found}, this version verifies format {FORMAT} only: release it again"
            raise DowngradeError(f"{MANIFEST}: {text}")
        raise FormatError(f"{MANIFEST}: made by format {found}, newer than this version knows ({FORMAT}): update it")
    try:
        manifest = Manifest.model_validate_json(canonical_json(raw))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise FormatError(f"{MANIFEST}: {key}: {first['msg']}") from error
    for entry in manifest.files:
        try:
            inside(bundle, entry.path)
        except FormatError as error:
            raise FormatError(f"{MANIFEST}: {error}") from error
        if kind_of(entry.path) is None:
            raise FormatError(f"{MANIFEST}: lists {entry.path!r}, which no bundle may hold")
        if kind_of(entry.path) != entry.kind:
            raise FormatError(f"{MANIFEST}: {entry.path}: kind is {entry.kind!r}, must be {kind_of(entry.path)!r}")
    return manifest
