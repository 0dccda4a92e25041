"""in-toto statements: what stands inside an envelope."""

from __future__ import annotations

from steelyard.base.errors import FormatError
from steelyard.release.attest import parse_statement, parse_test_result
from steelyard.release.statements import parse_approval, parse_summary

SHAPE = "json"


def check(data: bytes) -> None:
    """A statement is of one kind at most."""
    parse_statement(data, "statement")
    kinds = 0
    for parse in (parse_test_result, parse_summary, parse_approval):
        try:
            parse(data, "statement")
            kinds += 1
        except FormatError:
            pass
    assert kinds <= 1
    if not kinds:
        raise FormatError("statement: of no kind that a release has")
