"""Which release is meant: by its bundle's folder, the SHA-256 of its manifest, or its name in the ledger."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from steelyard.base.canonical import sha256_hex
from steelyard.base.errors import FormatError, SteelyardError
from steelyard.base.files import read_bounded
from steelyard.base.progress import Progress, Silent
from steelyard.model.identity import subject_of
from steelyard.release.attest import ENVELOPE_LIMIT, parse_statement, read_envelope
from steelyard.release.layout import MANIFEST, MANIFEST_LIMIT, TEST_RESULT, parse_manifest

if TYPE_CHECKING:
    from steelyard.ledger.ledger import Ledger

_HEX = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Target:
    """A release that is known: by its bundle, or by the ledger."""

    manifest: str
    weights: str
    name: str


def find_release(what: str, ledger: Ledger, *, weights: str | None = None, progress: Progress | None = None) -> Target:
    """The release that `what` names: a bundle's folder, the SHA-256 of a manifest, or a name in the ledger.

    `weights`: its weights root, where the ledger does not hold it. Raises SteelyardError where nobody knows it, a name
    has several releases, or a bundle is not what its statement says.
    """
    if Path(what).is_dir():
        return _of_bundle(Path(what), ledger, progress or Silent())
    events = [*ledger.events("release.attested"), *ledger.events("release.bundled")]
    by_hex = _HEX.fullmatch(what) is not None
    named = [event.payload for event in events if event.payload.get("bundle" if by_hex else "name") == what]
    manifests = sorted({str(payload.get("bundle")) for payload in named})
    if not manifests:
        text = "neither a bundle's folder, nor a manifest's SHA-256 or a name of a release in this ledger"
        raise SteelyardError(f"{what[:200]}: no release that anyone knows: {text}")
    if len(manifests) > 1:
        text = f"has {len(manifests)} releases, name one by its manifest: {', '.join(manifests)}"
        raise SteelyardError(f"{what}: {text}")
    noted = {str(payload["weights"]) for payload in named if "weights" in payload}
    found = noted or ({weights} if weights else set()) or _published_weights(manifests[0], ledger, progress or Silent())
    if len(found) != 1 or not _HEX.fullmatch(root := next(iter(found))) or (weights and weights != root):
        text = "the ledger does not tell its weights, which would stay in use under another name"
        raise SteelyardError(f"{what}: {text}: give the bundle's folder, or its weights root (--weights)")
    return Target(manifests[0], root, str(named[-1].get("name")))


def _of_bundle(folder: Path, ledger: Ledger, progress: Progress) -> Target:
    try:
        data = read_bounded(folder / MANIFEST, MANIFEST_LIMIT)
        envelope = read_bounded(folder / TEST_RESULT, ENVELOPE_LIMIT)
    except OSError as error:
        raise SteelyardError(f"{folder}: is not a bundle: {error.filename}: {error.strerror}") from error
    parse_manifest(data, folder)
    manifest = sha256_hex(data)
    _, said, _ = parse_statement(read_envelope(envelope, TEST_RESULT)[0], TEST_RESULT)
    weights = subject_of(folder, progress).weights
    if said.get("weights") != weights or said.get(MANIFEST) != manifest:
        text = "its manifest or weights are not those that its test result names, so something else would be withdrawn"
        raise FormatError(f"{folder}: {text}: give the manifest's SHA-256, or an intact copy")
    known = [
        str(event.payload["name"])
        for kind in ("release.attested", "release.bundled")
        for event in ledger.events(kind, bundle=manifest)
    ]
    return Target(manifest, weights, known[-1] if known else folder.resolve().name)


def _published_weights(manifest: str, ledger: Ledger, progress: Progress) -> set[str]:
    for event in ledger.events("release.published", manifest=manifest):
        folder = Path(str(event.payload.get("destination")))
        if folder.is_absolute() and folder.is_dir():
            found = _of_bundle(folder, ledger, progress)
            if found.manifest == manifest:
                return {found.weights}
    return set()
