"""What the tests of bad grants share: damage, ends, and a kill before an event."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from granting import Desk

from steelyard.release.grant_book import Book
from steelyard.release.grants import revoke

NOW = datetime.now(UTC)


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def issue_folder(desk: Desk, grant: str) -> Path:
    return desk.root / "grants" / "issued" / grant


def revoked(desk: Desk, grant: str) -> None:
    with desk.book() as book:
        revoke(book, grant, "moved on", signer=desk.signer("bob"), trust=desk.trust)


def noted(desk: Desk, kind: str, **payload: Any) -> None:
    with desk.chain.ledger() as ledger:
        ledger.append(kind, payload)


def reviewed(desk: Desk, **review: Any) -> str:
    request = desk.request().id
    for name in ("bob", "carol"):
        desk.review(request, name, **review)
    return request


class Killed(BaseException):
    """Stands for a kill: nothing after it runs."""


def killed_before_its_event(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    def note(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Book, "note", note)
        with pytest.raises(Killed):
            act()
