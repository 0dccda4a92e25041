"""An insider's tools: sign any statement of a bundle again, over whatever lies there now, with any key.

Forger(keys).remake(bundle)                                        # everything fits again, signed by the same people
Forger(keys).remake(bundle, change={SUMMARY: lambda s: ...}, by={SUMMARY: "mallory"}, keep={TEST_RESULT})
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scenario import PASSPHRASE

from steelyard.base.canonical import canonical_json, sha256_file
from steelyard.release.attest import sign
from steelyard.release.keys import list_keys, load_signer
from steelyard.release.layout import (
    APPROVALS,
    MANIFEST,
    MODEL_SIGNATURE,
    REPORT,
    SUMMARY,
    TEST_RESULT,
    UNSIGNED,
    manifest_bytes,
)
from steelyard.release.oms import model_root, sign_model

Change = Callable[[Any], object]


def statement_of(path: Path) -> Any:
    """The in-toto statement in an envelope."""
    return json.loads(base64.b64decode(json.loads(path.read_bytes())["payload"]))


def signer_of(path: Path) -> str:
    """The key id in an envelope."""
    return str(json.loads(path.read_bytes())["signatures"][0]["keyid"])


def set_subject(statement: Any, name: str, sha256: str) -> None:
    """Change a subject of a statement."""
    (subject,) = [one for one in statement["subject"] if one["name"] == name]
    subject["digest"]["sha256"] = sha256


def sparse_weights(path: Path, size: int) -> None:
    """A safetensors file of `size` bytes whose header is right, and which takes no room on the disk."""
    tensor = {"dtype": "BF16", "shape": [(size - 1008) // 2], "data_offsets": [0, size - 1008]}
    header = canonical_json({"w": tensor}).ljust(1000)
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, size)


@dataclass(frozen=True)
class Forger:
    """Whoever has all these keys."""

    keys: Path

    def signer(self, name: str) -> Any:
        return load_signer(self.keys, name, PASSPHRASE)

    def name(self, keyid: str) -> str:
        """The key of that id."""
        return next(card.name for card in list_keys(self.keys) if card.keyid == keyid)

    def resign(self, path: Path, change: Change = lambda statement: None, by: str | None = None) -> None:
        """Change one statement and sign it, with the same key or another."""
        statement = statement_of(path)
        change(statement)
        signer = self.signer(by or self.name(signer_of(path)))
        path.write_bytes(sign(canonical_json(statement), signer))

    def remake(
        self,
        bundle: Path,
        *,
        change: Mapping[str, Change] | None = None,
        by: Mapping[str, str] | None = None,
        keep: Collection[str] = (),
        ignored: Collection[str] = UNSIGNED,
    ) -> None:
        """Make the manifest and every statement fit what lies there. `keep` names files to leave as they are."""
        changes, signers = dict(change or {}), dict(by or {})
        if MANIFEST not in keep:
            (bundle / MANIFEST).unlink(missing_ok=True)
            (bundle / MANIFEST).write_bytes(manifest_bytes(bundle))
        root = model_root(bundle, UNSIGNED)
        present = [name for name in (TEST_RESULT, *APPROVALS, SUMMARY) if (bundle / name).exists()]
        releaser = signers.get(SUMMARY) or (
            self.name(signer_of(bundle / SUMMARY)) if SUMMARY in present else self.name(signer_of(bundle / TEST_RESULT))
        )

        def fit(name: str) -> Change:
            def change_it(statement: Any) -> None:
                set_subject(statement, "oms", root)
                set_subject(statement, MANIFEST, sha256_file(bundle / MANIFEST))
                if name == TEST_RESULT:
                    set_subject(statement, REPORT, sha256_file(bundle / REPORT))
                else:
                    facts = statement["predicate"] if name in APPROVALS else statement["predicate"]["steelyard"]
                    facts["test_result"] = sha256_file(bundle / TEST_RESULT)
                if name == SUMMARY:
                    paths = [bundle / approval for approval in APPROVALS]
                    facts["approvals"] = [sha256_file(path) for path in paths if path.exists()]
                changes.get(name, lambda statement: None)(statement)

            return change_it

        for name in present:
            if name not in keep:
                self.resign(bundle / name, fit(name), signers.get(name))
        if MODEL_SIGNATURE not in keep and SUMMARY in present:
            signer = self.signer(signers.get(MODEL_SIGNATURE, releaser))
            sign_model(bundle, bundle / MODEL_SIGNATURE, signer, sorted(ignored))
