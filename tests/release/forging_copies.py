"""An insider's tools for marked copies: everything fits again after a change, signed by the same people.

Copies(desk, folder).remake()                       # verifies
Copies(desk, folder).remake(statement=lambda s: s["predicate"].update(expires=...), by="alice")
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forging import set_subject, statement_of
from granting import Desk

from steelyard.base.canonical import canonical_json, sha256_file
from steelyard.model.identity import subject_of
from steelyard.release.attest import sign
from steelyard.release.grant_copy import (
    COMMITMENT,
    COUNTERSIGNATURE,
    LIST,
    REVIEWS,
    SOURCE_SUMMARY,
    SOURCE_TEST,
    STATEMENT,
    list_bytes,
)

Change = Callable[[Any], object]


@dataclass(frozen=True)
class Copies:
    """Whoever holds all the keys of `desk`, and a copy."""

    desk: Desk
    folder: Path

    def resign(self, name: str, by: str, change: Change | None = None) -> None:
        """A statement changed and signed again."""
        statement = statement_of(self.folder / name)
        if change is not None:
            change(statement)
        (self.folder / name).write_bytes(sign(canonical_json(statement), self.desk.signer(by)))

    def remake(
        self,
        *,
        statement: Change | None = None,
        by: str = "dora",
        commitment: Change | None = None,
        countersignature: Change | None = None,
        witness: str | None = "fay",
    ) -> None:
        """List, commitment, countersignature and statement over what lies there now; each then changed as asked."""
        held = json.loads((self.folder / COMMITMENT).read_bytes())
        held["reviews"] = [sha256_file(self.folder / name) for name in REVIEWS if (self.folder / name).exists()]
        if commitment is not None:
            commitment(held)
        (self.folder / COMMITMENT).write_bytes(canonical_json(held) + b"\n")
        digest = sha256_file(self.folder / COMMITMENT)
        if witness is not None:

            def seen(one: Any) -> None:
                set_subject(one, "commitment", digest)
                if countersignature is not None:
                    countersignature(one)

            self.resign(COUNTERSIGNATURE, witness, seen)
        (self.folder / LIST).write_bytes(list_bytes(self.folder))
        subject = subject_of(self.folder)

        def said(one: Any) -> None:
            for name, value in (
                ("weights", subject.weights),
                ("subject", subject.digest),
                (LIST, sha256_file(self.folder / LIST)),
            ):
                set_subject(one, name, value)
            one["predicate"]["commitment"] = digest
            source = one["predicate"]["derived_from"]
            source["test_result"] = sha256_file(self.folder / SOURCE_TEST)
            source["summary"] = sha256_file(self.folder / SOURCE_SUMMARY)
            if statement is not None:
                statement(one)

        self.resign(STATEMENT, by, said)
