"""Threads spin on a quiet machine, sleep on a busy one, and do as the environment says."""

from __future__ import annotations

import os

import pytest

from steelyard.base import threads


@pytest.mark.parametrize(
    ("running", "expected"),
    [
        ([0, 0, 0, 0], {"GOMP_SPINCOUNT": threads.SPINS}),
        ([0, 1, 0, 1], {"GOMP_SPINCOUNT": threads.SPINS}),  # something woke for a moment
        ([1, 1, 1, 0], {"OMP_WAIT_POLICY": "PASSIVE"}),
        ([5, 0, 4, 2], {"OMP_WAIT_POLICY": "PASSIVE"}),
    ],
)
def test_the_machine_decides(monkeypatch: pytest.MonkeyPatch, running: list[int], expected: dict[str, str]) -> None:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    for name in names:
        monkeypatch.setenv(name, "")  # so that what is set here is taken back
        monkeypatch.delenv(name)
    looks = iter(running)
    threads.choose_waiting(lambda: next(looks))
    assert {name: os.environ[name] for name in names if name in os.environ} == expected
    threads.choose_waiting(lambda: pytest.fail("what is set stays"))


def test_the_system_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert threads._others() >= 0
    monkeypatch.setattr(threads.Path, "read_text", lambda _: "0.1 0.2 0.3 3/99 1234")
    assert threads._others() == 2
    monkeypatch.setattr(threads.Path, "read_text", lambda _: "")
    assert threads._others() == 1
