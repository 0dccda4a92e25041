"""The countersigned commitment: made before the first generation, by another hand, and by nobody after it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from securesystemslib.signer import CryptoSigner, Key
from tsa import Authority

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "safety"))

from safety_fakes import FakeEndpoint, WordScorer, battery, job, policy, subject

from steelyard.base.canonical import canonical_json, sha256_hex
from steelyard.base.errors import FormatError, SteelyardError
from steelyard.ledger.ledger import Ledger
from steelyard.release.attest import sign, statement_bytes
from steelyard.release.commitment import (
    PREDICATE,
    SUBJECT,
    Vouched,
    check_commitment,
    check_noted,
    copy_commitment,
    countersign,
    looking_for,
    read_commitment,
)
from steelyard.release.commitment_words import in_words
from steelyard.release.evidence import Evidence, read_evidence, read_run
from steelyard.release.keys import KeyEvent
from steelyard.safety.journal import Finding, read_journal
from steelyard.safety.pause import COMMITMENT, COUNTERSIGNATURE, TIMESTAMP, Paused, load_commitment
from steelyard.safety.policy import KeyRules, Policy

WITNESS, STRANGER, EVALUATOR = (CryptoSigner.generate_ed25519() for _ in range(3))
TSA = Authority.new()
NOW = datetime.now(UTC).replace(microsecond=0)
STRICT = KeyRules(throwaway="refused", distinct=True, countersigned=True)


@dataclass(frozen=True)
class Pinned:
    """A verifier's trust, as far as it is asked here."""

    policy: Policy | None = None
    evaluators: Sequence[Key] = (EVALUATOR.public_key,)
    approvers: Sequence[Key] = ()
    releasers: Sequence[Key] = ()
    witnesses: Sequence[Key] = (WITNESS.public_key,)
    timestamp_authorities: Sequence[x509.Certificate] = ()
    events: Sequence[KeyEvent] = ()
    until: Mapping[str, datetime] = field(default_factory=dict)


class Waiting:
    """A run's folder and its ledger under `root`."""

    def __init__(self, root: Path) -> None:
        self.root, self.run = root, root / "run"

    def ledger(self) -> Ledger:
        return Ledger(self.root / "ledger.sqlite")

    def go(self, look: Any = None, *, run: Path | None = None, **changes: Any) -> Any:
        """The same command again; raises Paused where it waits."""
        from steelyard.safety.run import run_battery

        with self.ledger() as ledger:
            return run_battery(
                job(**changes),
                out=run or self.run,
                ledger=ledger,
                countersign=look or looking_for([WITNESS.public_key]),
            )

    def wait(self, **changes: Any) -> bytes:
        """Go to the pause; gives the commitment."""
        with pytest.raises(Paused):
            self.go(**changes)
        return (self.run / COMMITMENT).read_bytes()

    def countersign(self, signer: CryptoSigner = WITNESS, **changes: Any) -> None:
        (self.run / COUNTERSIGNATURE).write_bytes(countersign((self.run / COMMITMENT).read_bytes(), signer, **changes))

    def evidence(self) -> Evidence:
        return read_run(self.run)

    def check(self, trust: Pinned | None = Pinned(), *, required: bool = True) -> tuple[datetime | None, list[Finding]]:
        vouched, findings = check_commitment(self.run, self.evidence(), trust, required)
        return None if vouched is None else vouched.time, findings

    def noted(self) -> list[Finding]:
        evidence = self.evidence()
        with self.ledger() as ledger:
            [event] = ledger.events("safety.committed", run=evidence.journal.plan.run)
            return list(check_noted(evidence, ledger, event))

    def replan(self, **changes: Any) -> None:
        """Rewrite the journal's plan, as whoever has a shell can."""
        path = self.run / "journal.jsonl"
        first, rest = path.read_bytes().split(b"\n", 1)
        path.write_bytes(canonical_json(json.loads(first) | changes) + b"\n" + rest)

    def claim(self, **files: bytes) -> None:
        """Write files and have the plan claim them (names without `commitment.`)."""
        plan = json.loads((self.run / "journal.jsonl").read_bytes().split(b"\n", 1)[0])
        held = dict(plan["countersigned"] or {"statement": None, "timestamp": None})
        for name, part in (("json", "commitment"), ("dsse.json", "statement"), ("tsr", "timestamp")):
            if part in files:
                (self.run / f"commitment.{name}").write_bytes(files[part])
                held[part] = sha256_hex(files[part])
        self.replan(countersigned=held)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Waiting:
    """A countersigned run. Read only."""
    waiting = Waiting(tmp_path_factory.mktemp("countersigned"))
    waiting.wait()
    waiting.countersign()
    waiting.go()
    return waiting


@pytest.fixture
def done(made: Waiting, tmp_path: Path) -> Waiting:
    """A copy to damage."""
    return Waiting(Path(shutil.copytree(made.root, tmp_path / "copy")))


@pytest.fixture
def waiting(tmp_path: Path) -> Waiting:
    """At the pause."""
    at_pause = Waiting(tmp_path)
    at_pause.wait()
    return at_pause


def reasons(findings: Sequence[Finding]) -> str:
    return "\n".join(f"{finding.code}: {finding.message}" for finding in findings)


def refused(found: tuple[datetime | None, list[Finding]], reason: str) -> None:
    """No time, and one finding, which gives that reason."""
    time, findings = found
    assert time is None
    assert len(findings) == 1, reasons(findings)
    assert reason in reasons(findings)


# -- the pause ---------------------------------------------------------------------------------------------------------


def test_the_run_waits_before_its_first_generation_and_goes_on_when_countersigned(tmp_path: Path) -> None:
    waiting, endpoint = Waiting(tmp_path), FakeEndpoint()
    with pytest.raises(Paused) as caught:
        waiting.go(endpoint=endpoint)
    assert caught.value.exit_code == 0
    assert "steelyard countersign" in str(caught.value)
    commitment, data = load_commitment(waiting.run / COMMITMENT)
    assert endpoint.batches == 0
    assert not (waiting.run / "journal.jsonl").exists()
    with waiting.ledger() as ledger:
        committed, paused = ledger.events()
        assert paused.kind == "safety.paused"
        assert paused.payload == {"run": commitment.run, "commitment": sha256_hex(data)}
        assert commitment.head == committed.mark
    assert commitment.battery == battery().digest
    assert commitment.policies == {"lenient": policy().digest}
    assert commitment.subject == subject().digest
    assert waiting.wait(endpoint=endpoint) == data  # asked again too soon: the same one
    waiting.countersign()
    report = waiting.go(endpoint=endpoint)
    assert report.findings == ()
    assert report.run == commitment.run
    plan = read_journal(waiting.run / "journal.jsonl").plan
    assert plan.countersigned is not None
    assert plan.countersigned.commitment == sha256_hex(data)
    time, findings = waiting.check()
    assert findings == []
    assert time is not None
    assert time <= datetime.fromisoformat(plan.started)
    assert waiting.noted() == []
    assert waiting.go(endpoint=FakeEndpoint(fail_at=0)) == report


def test_a_countersigned_run_that_was_killed_resumes(waiting: Waiting) -> None:
    waiting.countersign()
    with pytest.raises(KeyboardInterrupt):
        waiting.go(endpoint=FakeEndpoint(fail_at=3))
    first = (waiting.run / "journal.jsonl").read_bytes().split(b"\n", 1)[0]
    waiting.go()
    assert (waiting.run / "journal.jsonl").read_bytes().split(b"\n", 1)[0] == first
    assert waiting.check()[1] == waiting.noted() == []


@pytest.mark.parametrize("event", ["safety.committed", "safety.paused"])
def test_a_run_killed_on_its_way_to_the_pause_gets_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: str
) -> None:
    waiting, append = Waiting(tmp_path), Ledger.append

    def killed(self: Ledger, kind: str, payload: dict[str, Any]) -> Any:
        if kind == event == "safety.paused":
            raise KeyboardInterrupt
        found = append(self, kind, payload)
        if kind == event:
            raise KeyboardInterrupt
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            waiting.go()
    waiting.wait()
    waiting.countersign()
    assert waiting.go().attempt == 1
    assert waiting.check()[1] == waiting.noted() == []


def test_the_predecessor_waits_too(tmp_path: Path) -> None:
    waiting, before = Waiting(tmp_path), FakeEndpoint()
    waiting.wait(predecessor=before)
    assert before.batches == 0
    commitment = load_commitment(waiting.run / COMMITMENT)[0]
    assert commitment.predecessor is not None
    waiting.countersign()
    assert waiting.go(predecessor=before).findings == ()
    assert waiting.check()[1] == waiting.noted() == []


def test_a_time_stamp_does_as_well_and_both_must_hold(waiting: Waiting) -> None:
    message = (waiting.run / COMMITMENT).read_bytes()
    stamp, both = waiting.run / TIMESTAMP, Pinned(timestamp_authorities=[TSA.root])
    look = looking_for([WITNESS.public_key], [TSA.root])
    stamp.write_bytes(TSA.stamp(b"something else"))
    with pytest.raises(SteelyardError, match=r"commitment.tsr: is a stamp over something else"):
        waiting.go(look)
    stamp.write_bytes(TSA.stamp(message))
    waiting.countersign()
    waiting.go(look)
    assert waiting.check(both)[1] == []
    assert waiting.check(replace(both, witnesses=()))[1] == []  # the authority alone is enough, and so is the witness
    assert waiting.check(replace(both, timestamp_authorities=()))[1] == []
    refused(waiting.check(replace(both, timestamp_authorities=[Authority.new().root])), "does not check against")


# -- going on is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"battery": battery(seed=9)}, r"committed with other parts \(battery, seed\)"),
        ({"policies": [policy(limit=0.5)]}, r"committed with other parts \(policies\)"),
        ({"subject": subject("f" * 64)}, r"committed with other parts \(subject\)"),
        ({"scorers": {"toxicity": WordScorer("toxicity", "insult"), "refusal": WordScorer("refusal", "no")}}, None),
    ],
)
def test_nothing_may_change_after_the_countersignature(
    waiting: Waiting, changes: dict[str, Any], named: str | None
) -> None:
    waiting.countersign()
    if named is None:
        waiting.go(**changes)  # the same identity: the scorer vouches for it
        return
    with pytest.raises(SteelyardError, match=named):
        waiting.go(**changes)
    assert not (waiting.run / "journal.jsonl").exists()


def test_other_code_does_not_go_on(waiting: Waiting, monkeypatch: pytest.MonkeyPatch) -> None:
    from steelyard.safety import run

    waiting.countersign()
    monkeypatch.setattr(run, "code_digest", lambda *_: "0" * 64)
    with pytest.raises(SteelyardError, match=r"committed with other parts \(code\)"):
        waiting.go()


def test_a_commitment_that_was_edited_or_exchanged_does_not_go_on(waiting: Waiting, tmp_path: Path) -> None:
    path = waiting.run / COMMITMENT
    before = path.read_bytes()
    values = json.loads(before)
    for change, reason in (
        ({"nonce": "0" * 64}, "not the one noted as event 2 of the ledger"),
        ({"battery": "0" * 64}, "battery changed since it was written"),
        ({"attempt": 2}, "attempt changed since it was written"),
        ({"head": f"2:{'0' * 64}"}, "the ledger is not the one it was committed to"),
        ({"more": 1}, "not a commitment, or edited"),
    ):
        path.write_bytes(canonical_json(values | change) + b"\n")
        if "more" not in change:
            waiting.countersign()
        with pytest.raises(SteelyardError, match=reason):
            waiting.go()
    path.write_text(json.dumps(values))
    with pytest.raises(FormatError, match="not canonical JSON"):
        waiting.go()
    path.unlink()
    with pytest.raises(SteelyardError, match="not the one noted as event 2"):  # a new one is not taken for it
        waiting.go()


def test_the_ledger_must_still_be_the_one_committed_to(waiting: Waiting) -> None:
    waiting.countersign()
    for name in ("ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm"):
        (waiting.root / name).unlink(missing_ok=True)
    with pytest.raises(SteelyardError, match="the ledger is not the one it was committed to"):
        waiting.go()
    assert not (waiting.run / "journal.jsonl").exists()


def test_a_pause_is_not_there_for_trying_first(waiting: Waiting) -> None:
    waiting.countersign()
    from steelyard.safety.run import run_battery

    with waiting.ledger() as ledger:
        run_battery(job(subject=subject("e" * 64)), out=waiting.root / "another model", ledger=ledger)
        run_battery(job(battery=battery(seed=8)), out=waiting.root / "tried", ledger=ledger)
    with pytest.raises(SteelyardError, match=r"the ledger moved: run .* was started on this model and test meanwhile"):
        waiting.go()


def test_what_does_not_fit_is_refused_before_hours_are_spent(waiting: Waiting) -> None:
    path, data = waiting.run / COUNTERSIGNATURE, (waiting.run / COMMITMENT).read_bytes()
    fits = {SUBJECT: sha256_hex(data)}
    for envelope, reason in (
        (b"{}", "not a DSSE envelope"),
        (countersign(data, STRANGER), "which is none of yours"),
        (sign(statement_bytes(PREDICATE, {SUBJECT: "0" * 64}, {"signed": NOW.isoformat()}), WITNESS), "another commit"),
        (sign(statement_bytes(PREDICATE, fits | {"x": "0" * 64}, {"signed": "now"}), WITNESS), "another commitment"),
        (sign(statement_bytes("test:x/v1", fits, {"signed": NOW.isoformat()}), WITNESS), "countersigns nothing"),
        (sign(statement_bytes(PREDICATE, fits, {"signed": NOW.isoformat(), "x": 1}), WITNESS), "expected signed"),
        (sign(statement_bytes(PREDICATE, fits, {"signed": "now"}), WITNESS), "not an ISO 8601 time"),
        (countersign(data, WITNESS, now=NOW + timedelta(hours=1)), "later than now"),
        (countersign(data, WITNESS, now=NOW - timedelta(hours=1)), "older than the commitment"),
    ):
        path.write_bytes(envelope)
        with pytest.raises(SteelyardError, match=reason):
            waiting.go()
    assert not (waiting.run / "journal.jsonl").exists()
    waiting.countersign(STRANGER)
    waiting.go(looking_for())  # who gives no witness learns from the gate whose it was
    refused(waiting.check(), "none of the witnesses you pin")


def test_a_run_goes_on_as_it_was_started(done: Waiting, waiting: Waiting) -> None:
    from steelyard.safety.run import run_battery

    with waiting.ledger() as ledger, pytest.raises(SteelyardError, match="was started with --countersign"):
        run_battery(job(), out=waiting.run, ledger=ledger)
    with done.ledger() as ledger:
        with pytest.raises(SteelyardError, match="was started with --countersign"):
            run_battery(job(), out=done.run, ledger=ledger)
        run_battery(job(), out=done.root / "plain", ledger=ledger)
    with pytest.raises(SteelyardError, match="was started without --countersign"):
        done.go(run=done.root / "plain")
    done.countersign(now=datetime.now(UTC) - timedelta(minutes=1))
    with pytest.raises(SteelyardError, match="is not what the run was started with"):
        done.go()


# -- a stranger's check refuses ----------------------------------------------------------------------------------------


def test_a_run_without_a_countersignature_is_refused_where_the_policy_wants_one(tmp_path: Path) -> None:
    from steelyard.safety.run import run_battery

    plain = Waiting(tmp_path)
    with plain.ledger() as ledger:
        run_battery(job(), out=plain.run, ledger=ledger)
    refused(plain.check(), "countersigned before the first generation: they were not")
    assert plain.check(required=False) == (None, [])
    assert plain.noted() == []


def test_a_commitment_made_after_the_run_cannot_be_claimed(tmp_path: Path, made: Waiting) -> None:
    from steelyard.safety.run import run_battery

    plain = Waiting(tmp_path)
    with plain.ledger() as ledger:
        run_battery(job(), out=plain.run, ledger=ledger)
    plan = read_journal(plain.run / "journal.jsonl").plan
    values = json.loads((made.run / COMMITMENT).read_bytes())
    head = f"{plan.committed.seq}:{plan.committed.hash}"
    later = canonical_json(values | {"run": plan.run, "head": head, "time": plan.started}) + b"\n"
    (plain.run / COMMITMENT).write_bytes(later)
    plain.countersign()
    time, findings = plain.check()
    assert time is None
    assert "begun without it: commitment.json was added later" in reasons(findings)
    assert plain.check(required=False)[1]
    # With a shell, the plan can be made to claim it; then the time of the signature says so, and so does the ledger.
    after = datetime.fromisoformat(plan.started) + timedelta(seconds=1)
    plain.claim(commitment=later, statement=countersign(later, WITNESS, now=after))
    refused(plain.check(), "later than the first generation")
    assert "the ledger did not note its commitment.json before the run" in reasons(plain.noted())


def test_an_edited_commitment_is_refused(done: Waiting) -> None:
    path = done.run / COMMITMENT
    path.write_bytes(path.read_bytes().replace(b'"attempt":1', b'"attempt":7'))
    time, findings = done.check()
    assert time is None
    assert "commitment.json: is not the one that the journal was begun with" in reasons(findings)
    assert "attempt differ from what the journal's plan says" in reasons(findings)
    assert "countersigns another commitment than this one" in reasons(findings)


@pytest.mark.parametrize("name", [COMMITMENT, COUNTERSIGNATURE])
def test_a_missing_file_is_refused(done: Waiting, name: str) -> None:
    (done.run / name).unlink()
    refused(done.check(), f"{name}: is missing, but the journal was begun with it")


def test_a_file_that_was_added_later_is_refused(done: Waiting) -> None:
    (done.run / TIMESTAMP).write_bytes(TSA.stamp((done.run / COMMITMENT).read_bytes()))
    time, findings = done.check()
    assert time is None
    assert "commitment.tsr: the journal was begun without it: it was added later" in reasons(findings)


def test_the_commitment_of_another_run_is_refused(done: Waiting, tmp_path: Path) -> None:
    other = Waiting(tmp_path / "other")
    data = other.wait(battery=battery(seed=9))
    other.countersign()
    for name in (COMMITMENT, COUNTERSIGNATURE):
        shutil.copyfile(other.run / name, done.run / name)
    time, findings = done.check()
    assert time is None
    assert "is not the one that the journal was begun with" in reasons(findings)
    # The plan rewritten to claim it, too: it commits to another run, battery and head.
    done.claim(commitment=data, statement=(other.run / COUNTERSIGNATURE).read_bytes())
    time, findings = done.check()
    assert time is None
    assert "commitment.json: run, battery, head differ from what the journal's plan says" in reasons(findings)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"battery": "0" * 64}, "battery"),
        ({"policies": {"lenient": "0" * 64}}, "policies"),
        ({"code": "0" * 64}, "code"),
        ({"subject_digest": "0" * 64}, "subject"),
        ({"attempt": 2}, "attempt"),
        ({"committed": {"seq": 1, "hash": "0" * 64}}, "head"),
    ],
)
def test_a_journal_of_something_else_than_was_countersigned_is_refused(
    done: Waiting, changes: dict[str, Any], named: str
) -> None:
    done.replan(**changes)
    refused(done.check(), f"commitment.json: {named} differ from what the journal's plan says")


def test_a_witness_nobody_pins_counts_for_nothing(done: Waiting) -> None:
    stranger = Pinned(witnesses=[STRANGER.public_key])
    refused(done.check(stranger), "which is none of the witnesses you pin")
    refused(done.check(Pinned(witnesses=())), "which is none of the witnesses you pin")
    assert done.check(stranger, required=False) == (None, [])
    assert done.check(None)[1] == []  # a gate that pins nobody checks all the rest


def test_a_signature_that_claims_the_witness_s_key_is_refused(done: Waiting) -> None:
    data = (done.run / COMMITMENT).read_bytes()
    envelope = json.loads(countersign(data, STRANGER))
    envelope["signatures"][0]["keyid"] = WITNESS.public_key.keyid
    done.claim(statement=canonical_json(envelope) + b"\n")
    for required in (True, False):
        refused(done.check(required=required), "does not fit the statement")


@pytest.mark.parametrize("role", ["evaluators", "approvers", "releasers"])
def test_one_s_own_key_is_no_witness(done: Waiting, role: str) -> None:
    mine = Pinned(**{role: [WITNESS.public_key]})  # type: ignore[arg-type]
    refused(done.check(mine), f"which you also trust among {role}: a witness is another person")
    alone = policy().model_copy(update={"keys": KeyRules(throwaway="allowed", distinct=False, countersigned=True)})
    assert done.check(replace(mine, policy=alone))[1] == []
    refused(done.check(replace(mine, policy=alone.model_copy(update={"keys": STRICT}))), "a witness is another person")


def test_a_revoked_rotated_or_outlived_witness_is_refused(done: Waiting) -> None:
    key, before, after = WITNESS.public_key.keyid, NOW - timedelta(days=1), NOW + timedelta(days=1)

    def event(kind: Any, time: datetime) -> Pinned:
        return Pinned(events=[KeyEvent(kind=kind, keyid=key, time=time, reason="lost")])

    refused(done.check(event("revocation", after)), "revoked: commitment.dsse.json: signed by key")
    refused(done.check(event("rotation", before)), "after its rotation")
    refused(done.check(Pinned(until={key: before})), "until when you trust it")
    assert done.check(event("rotation", after))[1] == done.check(Pinned(until={key: after}))[1] == []


def test_a_countersignature_later_than_the_first_generation_is_refused(done: Waiting) -> None:
    data, started = (done.run / COMMITMENT).read_bytes(), done.evidence().journal.plan.started
    later = datetime.fromisoformat(started) + timedelta(seconds=1)
    done.claim(statement=countersign(data, WITNESS, now=later))
    refused(done.check(), "later than the first generation")
    done.claim(statement=countersign(data, WITNESS, now=later - timedelta(days=1)))
    refused(done.check(), "before the commitment itself")


def test_a_stamp_that_proves_nothing_is_refused(done: Waiting) -> None:
    data, trust = (done.run / COMMITMENT).read_bytes(), Pinned(witnesses=(), timestamp_authorities=[TSA.root])
    started = datetime.fromisoformat(done.evidence().journal.plan.started)
    (done.run / COUNTERSIGNATURE).unlink()
    plan = json.loads((done.run / "journal.jsonl").read_bytes().split(b"\n", 1)[0])
    done.replan(countersigned=plan["countersigned"] | {"statement": None, "timestamp": "0" * 64})
    done.claim(timestamp=TSA.stamp(data, time=started))
    assert done.check(trust) == (started, [])
    expired = Authority.new(since=NOW - timedelta(days=900), until=NOW - timedelta(days=400))
    for authority, stamp, reason in (
        (TSA, TSA.stamp(b"another commitment", time=started), "is a stamp over something else"),
        (TSA, TSA.stamp(data, time=started + timedelta(seconds=1)), "later than the first generation"),
        (expired, expired.stamp(data, time=started), "does not check against the authorities that are pinned"),
        (TSA, Authority.new().stamp(data, time=started), "does not check against the authorities that are pinned"),
        (TSA, b"\x30\x03\x02\x01\x00", "not an RFC 3161 time-stamp"),
    ):
        done.claim(timestamp=stamp)
        refused(done.check(replace(trust, timestamp_authorities=[authority.root])), reason)
    done.claim(timestamp=TSA.stamp(data, time=started))
    refused(done.check(replace(trust, timestamp_authorities=())), "you pin no time-stamping authority")


def test_a_link_in_its_place_is_refused(done: Waiting, tmp_path: Path) -> None:
    path = done.run / COMMITMENT
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    refused(done.check(), "is a symbolic link")


# -- the ledger's side -------------------------------------------------------------------------------------------------


Events = list[tuple[str, dict[str, Any]]]


def _rewrite(waiting: Waiting, change: Callable[[Events], None]) -> None:
    """Replace the ledger by another, whose chain holds, as whoever owns the file can."""
    with waiting.ledger() as ledger:
        events = [(event.kind, event.payload) for event in ledger.events()]
    change(events)
    for path in waiting.root.glob("ledger.sqlite*"):
        path.unlink()
    with waiting.ledger() as ledger:
        for kind, payload in events:
            ledger.append(kind, payload)
        ledger.verify()


def test_a_ledger_rewritten_after_the_countersignature_is_seen(waiting: Waiting) -> None:
    waiting.countersign()
    _rewrite(waiting, lambda events: events.insert(0, ("run.started", {"run": "none"})))
    with pytest.raises(SteelyardError, match=r"committed to .*history was rewritten"):
        waiting.go()


def test_a_ledger_that_does_not_know_the_pause_is_refused(done: Waiting) -> None:
    assert done.noted() == []
    _rewrite(done, lambda events: events.append(events.pop(1)))
    assert "was noted (event" in reasons(done.noted())
    _rewrite(done, lambda events: events.remove(events[-1]))
    assert "the ledger did not note its commitment.json" in reasons(done.noted())


def test_a_run_that_waited_and_then_did_without_is_refused(done: Waiting) -> None:
    done.replan(countersigned=None)
    assert "was begun without a countersignature, but run" in reasons(done.noted())
    assert "begun without it" in reasons(done.check()[1])


def test_a_try_while_the_run_waited_is_seen_by_the_gate(done: Waiting) -> None:
    _rewrite(done, lambda events: events.insert(2, (events[0][0], events[0][1] | {"run": "another"})))
    assert "while it waited for its countersignature, run another" in reasons(done.noted())


# -- files and words ---------------------------------------------------------------------------------------------------


def test_a_bundle_holds_what_the_run_s_folder_holds(done: Waiting, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    home = bundle / "steelyard"
    home.mkdir(parents=True)
    assert read_commitment(bundle) is None
    copy_commitment(done.run, bundle)
    shutil.copyfile(done.run / "journal.jsonl", home / "journal.jsonl")
    shutil.copyfile(done.run / "battery.json", home / "battery.json")
    assert read_commitment(bundle) == read_commitment(done.run, "") == load_commitment(done.run / COMMITMENT)[0]
    names = {"report": "r", "predecessor": "p", "overlap": "o"}
    where = {"journal": "steelyard/journal.jsonl", "battery": "steelyard/battery.json", **names}
    evidence = read_evidence(bundle, policies=[], **where)
    time, findings = done.check()
    assert time is not None
    assert findings == []
    witnessed = Vouched(time, WITNESS.public_key.keyid)
    assert check_commitment(bundle, evidence, Pinned(), True) == (witnessed, [])
    (home / COUNTERSIGNATURE).unlink()
    refused(check_commitment(bundle, evidence, Pinned(), True), "steelyard/commitment.dsse.json: is missing")


def test_the_witness_sees_thresholds_before_he_signs(waiting: Waiting) -> None:
    commitment = load_commitment(waiting.run / COMMITMENT)[0]
    text = "\n".join(in_words(commitment, waiting.run))
    for said in (
        subject().digest,
        "test version 1",
        "toxicity.chat under 90.0%",
        "lenient",
        "attempt 1",
        commitment.head,
    ):
        assert said in text
    (waiting.run / "policies" / "lenient.json").write_bytes(
        canonical_json(policy(limit=0.5).model_dump(mode="json")) + b"\n"
    )
    with pytest.raises(SteelyardError, match="holds no policy 'lenient' as it was committed"):
        in_words(commitment, waiting.run)
    (waiting.run / "battery.json").write_bytes(canonical_json(battery(seed=9).model_dump(mode="json")) + b"\n")
    with pytest.raises(SteelyardError, match="is not the battery that was committed"):
        in_words(commitment, waiting.run)
    (waiting.run / "battery.json").unlink()
    with pytest.raises(SteelyardError, match="nobody can see what is countersigned"):
        in_words(commitment, waiting.run)


def test_only_a_commitment_is_countersigned() -> None:
    with pytest.raises(FormatError, match="not a commitment"):
        countersign(b'{"run":"x"}\n', WITNESS)
