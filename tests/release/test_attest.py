"""Statements and envelopes from strangers: bounded, one spelling, nothing unknown, nothing twice."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steelyard.base.errors import FormatError
from steelyard.release.attest import (
    RunFacts,
    parse_test_result,
    parse_time,
    read_envelope,
    sign,
    test_result,
    verify_envelope,
)
from steelyard.release.keys import load_public_key, load_signer, new_key

FACTS = RunFacts(
    name="tiny",
    run="safety-1",
    started="2026-01-01T00:00:00+00:00",
    finished="2026-01-01T01:00:00+00:00",
    signed="2026-01-01T02:00:00+00:00",
    key_kind="standard",
    endpoint={"kind": "local"},
    ledger_head="3:" + "0" * 64,
    version="0.1.0",
)


def _payload() -> bytes:
    return test_result(
        subjects={"weights": "a" * 64, "steelyard/manifest.json": "b" * 64},
        configuration={"battery": "c" * 64, "policy": "d" * 64},
        passed=["toxicity.chat", "output.empty"],
        facts=FACTS,
    )


@pytest.fixture(scope="module")
def envelope(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("keys")
    new_key(folder, "me", b"correct horse battery")
    data = sign(_payload(), load_signer(folder, "me", b"correct horse battery"))
    assert verify_envelope(data, "x", [load_public_key(folder / "me.pub.pem")])[0] == _payload()
    loaded: dict[str, Any] = json.loads(data)
    return loaded


def test_a_test_result_reads_back() -> None:
    statement = parse_test_result(_payload(), "x")
    assert statement.subjects == {"weights": "a" * 64, "steelyard/manifest.json": "b" * 64}
    assert statement.configuration == {"battery": "c" * 64, "policy": "d" * 64}
    assert statement.predicate.passedTests == ("output.empty", "toxicity.chat")
    assert statement.predicate.steelyard == FACTS


def test_the_statement_is_valid_by_the_in_toto_library() -> None:
    from google.protobuf.json_format import Parse
    from in_toto_attestation.predicates.test_result.v0 import test_result_pb2
    from in_toto_attestation.v1 import statement_pb2
    from in_toto_attestation.v1.statement import Statement

    parsed = Parse(_payload(), statement_pb2.Statement())
    Statement.copy_from_pb(parsed).validate()
    predicate = json.loads(_payload())["predicate"]
    result = Parse(json.dumps(predicate), test_result_pb2.TestResult(), ignore_unknown_fields=True)
    assert result.result == "PASSED"
    assert [descriptor.name for descriptor in result.configuration] == ["battery", "policy"]


def _change(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda raw: raw.update(changes)


def _first_signature(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda raw: raw["signatures"][0].update(changes)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_change(extra=1), "alone"),
        (lambda raw: raw.pop("payloadType"), "alone"),
        (_change(payloadType="text/plain"), "payloadType"),
        (_change(signatures=[]), "0 signatures"),
        (lambda raw: raw["signatures"].append(raw["signatures"][0]), "2 signatures"),
        (_change(signatures={}), "no list of"),
        (_first_signature(cert="x"), "keyid and sig"),
        (_first_signature(keyid=5), "keyid is not"),
        (_first_signature(sig="!!!"), "base64"),
        (_first_signature(sig=None), "base64"),
        (lambda raw: raw.update(payload=raw["payload"] + "\n"), "base64"),
        (lambda raw: raw.update(payload=base64.urlsafe_b64encode(b"\xff\xfe\xfd" * 3).decode()), "base64"),
    ],
)
def test_a_malformed_envelope_is_refused(
    envelope: dict[str, Any], change: Callable[[dict[str, Any]], None], says: str
) -> None:
    raw = json.loads(json.dumps(envelope))
    change(raw)
    with pytest.raises(FormatError, match=says):
        read_envelope(json.dumps(raw).encode(), "x")


def _statement(change: Callable[[dict[str, Any]], Any]) -> bytes:
    raw = json.loads(_payload())
    change(raw)
    return json.dumps(raw).encode()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: raw.update(_type="https://in-toto.io/Statement/v0.1"), "_type"),
        (lambda raw: raw.update(predicateType="https://slsa.dev/verification_summary/v1"), "predicateType"),
        (lambda raw: raw.update(note="hello"), "note"),
        (lambda raw: raw.update(subject=[]), "subject"),
        (lambda raw: raw["subject"].append(raw["subject"][0]), "twice"),
        (lambda raw: raw["subject"][0]["digest"].update(sha256="A" * 64), "sha256"),
        (lambda raw: raw["subject"][0]["digest"].update(md5="0" * 32), "md5"),
        (lambda raw: raw["subject"][0].update(uri="file:///"), "uri"),
        (lambda raw: raw["predicate"].update(result="GOOD"), "result"),
        (lambda raw: raw["predicate"].update(waived=["toxicity"]), "waived"),
        (lambda raw: raw["predicate"]["steelyard"].update(key_kind="super"), "key_kind"),
        (lambda raw: raw["predicate"]["steelyard"].pop("signed"), "signed"),
        (lambda raw: raw["predicate"]["configuration"].append(raw["predicate"]["configuration"][0]), "twice"),
    ],
)
def test_a_malformed_statement_is_refused(change: Callable[[dict[str, Any]], Any], says: str) -> None:
    with pytest.raises(FormatError, match=says):
        parse_test_result(_statement(change), "x")


def test_the_largest_envelope_is_read_quickly() -> None:
    start = time.monotonic()
    with pytest.raises(FormatError):
        read_envelope(b'{"payload": "' + b"A" * 999_000 + b'"}', "x")
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("text", ["yesterday", "2026-01-01T00:00:00", "", "9" * 500])
def test_a_time_needs_a_zone(text: str) -> None:
    with pytest.raises(FormatError):
        parse_time(text, "x")


def test_no_envelope_in_the_tests_names_a_path(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"^bundle/x\.json: "):
        read_envelope(b"{}", "bundle/x.json")


@pytest.mark.parametrize(
    "text", ["9999-12-31T23:59:59+00:00", "9999-12-31T23:59:59-14:00", "0001-01-01T00:00:00+14:00", "1999-01-01T00:00Z"]
)
def test_times_at_the_ends_of_the_calendar_are_refused(text: str) -> None:
    with pytest.raises(FormatError, match=r"^x: "):
        parse_time(text, "x")
