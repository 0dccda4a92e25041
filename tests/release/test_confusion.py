"""Confusion and tampering: everything that could be mixed up, replayed, moved, signed by the wrong hand or at the wrong
time is refused, for the reason named. One table; each case starts from a bundle that verifies.

The release `tiny` went the way of several people: alice evaluated, bob and carol approved, dora released. Beside it lie
`other`, the same model under another name, and `again`, the same model and name after another run. A case gets a copy
of the bundle and of everybody's keys: whoever cheats may have all of them, if need be. What it gives back are arguments
for `verify_bundle`.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from forging import Forger, set_subject, signer_of, statement_of
from scenario import DISTINCT, PASSPHRASE, Chain, edit_json, edit_lines, make_battery, make_policy

from steelyard.base.canonical import canonical_json, digest, sha256_hex
from steelyard.release.attest import sign, statement_bytes
from steelyard.release.commitment import countersign
from steelyard.release.keys import REVOCATION, ROTATION, load_public_key, new_key
from steelyard.release.layout import (
    APPROVALS,
    BATTERY,
    CARD,
    COMMITMENT,
    COUNTERSIGNATURE,
    EVAL_RESULTS,
    HUB_FILE,
    JOURNAL,
    MANIFEST,
    ML_BOM,
    MODEL_SIGNATURE,
    POLICY,
    REPORT,
    SIGNING,
    SUMMARY,
    TEST_RESULT,
    UNSIGNED,
)
from steelyard.release.verify import Verification
from steelyard.release.withdrawal import Entry, WithdrawalList, list_bytes

BOB, CAROL = APPROVALS[:2]
OWN = make_policy(keys=DISTINCT)


@dataclass(frozen=True)
class Case:
    """What a case may lay hands on: `bundle` and `keys` are copies; `other`, `again` and `candidate` are read only."""

    chain: Chain
    bundle: Path
    keys: Path
    other: Path
    again: Path
    candidate: Path
    now: datetime

    @property
    def forger(self) -> Forger:
        return Forger(self.keys)

    def trust(self, **changes: Any) -> Path:
        """The verifier's trust file, with parts of it replaced."""
        path = self.keys / "trust.yaml"
        edit_json(path, lambda trust: trust.update(changes))
        return path

    def policy(self, **changes: Any) -> Path:
        """The verifier's own policy, changed."""
        path = self.keys / "verifier.json"
        path.write_text(json.dumps(make_policy(**({"keys": DISTINCT} | changes)).model_dump(mode="json")))
        return path

    def entry(self) -> Entry:
        """This release, withdrawn."""
        subjects = {one["name"]: one["digest"]["sha256"] for one in statement_of(self.bundle / SUMMARY)["subject"]}
        time = self.now.isoformat(timespec="seconds")
        return Entry(
            manifest=subjects[MANIFEST], weights=subjects["weights"], name="tiny", time=time, reason="it insults"
        )

    def lists(self, *entries: Entry) -> WithdrawalList:
        """The first list, of now, for a month."""
        end = self.now + timedelta(days=30)
        return WithdrawalList(
            format=1,
            name="ours",
            sequence=1,
            issued=self.now.isoformat(timespec="seconds"),
            expires=end.isoformat(timespec="seconds"),
            previous=None,
            entries=entries,
        )

    def key_event(self, name: str, kind: str, **fields: str) -> Path:
        """A revocation or rotation, signed by the key itself."""
        keyid = load_public_key(self.keys / f"{name}.pub.pem").keyid
        path = self.keys / f"{name}.event.json"
        path.write_bytes(sign(statement_bytes(kind, {keyid: "0" * 64}, fields), self.forger.signer(name)))
        return path


@pytest.fixture(scope="session")
def team(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The three releases. Read only."""

    def make(folder: Path) -> None:
        chain = Chain.build(folder / "root", policies=[OWN], witness="eve")
        tiny = chain.candidate()
        other = chain.candidate(chain.root / "candidates" / "other")
        run = chain.test(run=chain.root / "run-again", witness="eve")
        again = chain.candidate(chain.root / "again" / "tiny", run=run)
        for candidate in (tiny, other, again):
            for name in ("bob", "carol"):
                chain.approve(candidate, name)
        for candidate, out in ((tiny, "sealed/tiny"), (other, "sealed/other"), (again, "sealed-again/tiny")):
            chain.seal(candidate, chain.root / out)
        for name in ("mallory", "frank"):
            new_key(chain.keys, name, PASSPHRASE)

    return once("team", make) / "root"


@pytest.fixture
def made(team: Path, tmp_path: Path) -> Case:
    chain = Chain(team, make_battery(), (OWN,))
    bundle = Path(shutil.copytree(team / "sealed" / "tiny", tmp_path / "tiny"))
    keys = Path(shutil.copytree(team / "keys", tmp_path / "keys"))
    others = (team / "sealed" / "other", team / "sealed-again" / "tiny", team / "candidates" / "tiny")
    return Case(chain, bundle, keys, *others, now=datetime.now(UTC))


def verified(case: Case, given: Any) -> Verification:
    arguments: dict[str, Any] = {"trust": case.keys / "trust.yaml", "policy": None, "now": case.now}
    arguments |= given if isinstance(given, dict) else {}
    bundle = arguments.pop("bundle", case.bundle)
    found: Verification = case.chain.verify(bundle, **arguments)
    return found


Attempt = Callable[[Case], Any]
CASES: list[tuple[str, Attempt, str]] = []


def case(says: str, name: str = "") -> Callable[[Attempt], Attempt]:
    """A case, and what its refusal says."""

    def add(function: Attempt) -> Attempt:
        CASES.append((name or function.__name__.replace("_", "-"), function, says))
        return function

    return add


# -- statements mixed up and replayed --------------------------------------------------------------------------------


def taken(source: str, *names: str) -> Attempt:
    """Files of another release in the place of this one's."""

    def function(c: Case) -> None:
        for name in names:
            shutil.copy(getattr(c, source) / name, c.bundle / name)

    return function


for _source in ("other", "again"):
    for _name, _says in (
        (TEST_RESULT, f"{BOB}: rests on another test-result"),
        (BOB, f"{BOB}: rests on another test-result"),
        (SUMMARY, f"{SUMMARY}: rests on another test-result"),
        (MODEL_SIGNATURE, "its SHA-256 is not the one in steelyard/model.sig"),
    ):
        case(_says, f"{Path(_name).name}-of-{_source}")(taken(_source, _name))
case("its subject journal-root is not that of the bundle", "all-signatures-of-again")(
    taken("again", TEST_RESULT, BOB, CAROL, SUMMARY, MODEL_SIGNATURE)
)
case("README.md: was changed", "all-proof-of-other")(
    lambda c: shutil.copytree(c.other / "steelyard", c.bundle / "steelyard", dirs_exist_ok=True)
)
case("predicateType is", "an-approval-as-the-summary")(lambda c: shutil.copy(c.bundle / BOB, c.bundle / SUMMARY))
case("predicateType is", "the-summary-as-an-approval")(lambda c: shutil.copy(c.bundle / SUMMARY, c.bundle / BOB))
case("predicateType is", "the-test-result-as-an-approval")(
    lambda c: shutil.copy(c.bundle / TEST_RESULT, c.bundle / BOB)
)
case("predicateType is", "the-test-result-as-the-summary")(
    lambda c: shutil.copy(c.bundle / TEST_RESULT, c.bundle / SUMMARY)
)


@case("does not fit the statement")
def a_signature_over_another_statement(c: Case) -> None:
    ours = json.loads((c.bundle / SUMMARY).read_bytes())
    ours["signatures"] = json.loads((c.again / SUMMARY).read_bytes())["signatures"]
    (c.bundle / SUMMARY).write_bytes(canonical_json(ours))


@case("does not fit the statement")
def a_statement_edited(c: Case) -> None:
    envelope, statement = json.loads((c.bundle / SUMMARY).read_bytes()), statement_of(c.bundle / SUMMARY)
    statement["predicate"]["properties"].append("STEELYARD_COUNTERSIGNED")
    envelope["payload"] = base64.standard_b64encode(canonical_json(statement)).decode()
    (c.bundle / SUMMARY).write_bytes(canonical_json(envelope))


@case("2 signatures, where exactly 1 is expected")
def two_signatures(c: Case) -> None:
    def twice(envelope: Any) -> None:
        envelope["signatures"] *= 2

    edit_json(c.bundle / BOB, twice)


@case("payloadType is")
def another_payload_type(c: Case) -> None:
    edit_json(c.bundle / SUMMARY, lambda envelope: envelope.update(payloadType="application/json"))


@case("a candidate, not a release")
def a_candidate_as_a_release(c: Case) -> Any:
    return {"bundle": c.candidate}


@case("steelyard/model.sig: is missing")
def a_release_without_its_model_signature(c: Case) -> None:
    (c.bundle / MODEL_SIGNATURE).unlink()


# -- approvals -------------------------------------------------------------------------------------------------------


@case("again: one person approves once")
def two_approvals_by_one_key(c: Case) -> None:
    c.forger.remake(c.bundle, by={CAROL: "bob"})


@case("lenient wants 2 approvals, here are 1")
def two_approvals_by_one_key_at_two_times(c: Case) -> None:
    later = (c.now + timedelta(seconds=2)).isoformat()
    c.forger.remake(c.bundle, by={CAROL: "bob"}, change={CAROL: lambda s: s["predicate"].update(signed=later)})


@case("again: one person approves once")
def an_approval_twice(c: Case) -> None:
    shutil.copy(c.bundle / BOB, c.bundle / APPROVALS[2])
    c.forger.remake(c.bundle, keep=[BOB, CAROL, APPROVALS[2], TEST_RESULT, MANIFEST])


@case("was not made on the approvals that are in the bundle")
def an_approval_removed(c: Case) -> None:
    (c.bundle / CAROL).unlink()


@case("lenient wants 2 approvals, here are 1")
def an_approval_removed_before_the_summary(c: Case) -> None:
    (c.bundle / CAROL).unlink()
    c.forger.remake(c.bundle)


@case("lenient wants 2 approvals, here are 0")
def no_approvals(c: Case) -> None:
    (c.bundle / BOB).unlink()
    (c.bundle / CAROL).unlink()
    c.forger.remake(c.bundle)


@case("was not made on the approvals that are in the bundle")
def an_approval_added_afterwards(c: Case) -> Any:
    shutil.copy(c.bundle / BOB, c.bundle / APPROVALS[2])
    c.forger.resign(c.bundle / APPROVALS[2], by="frank")
    return {"trust": c.trust(approvers=["bob.pub.pem", "carol.pub.pem", "frank.pub.pem"])}


@case("your trust file wants 3 approvals, here are 2")
def fewer_approvals_than_the_verifier_wants(c: Case) -> Any:
    return {"trust": c.trust(approvers=["bob.pub.pem", "carol.pub.pem", "frank.pub.pem"], approvals=3)}


@case("its subject weights is not that of the bundle")
def an_approval_for_another_subject(c: Case) -> None:
    c.forger.remake(c.bundle, change={BOB: lambda s: set_subject(s, "weights", "0" * 64)})


@case("its subject steelyard/manifest.json is not that of the bundle")
def an_approval_for_another_manifest(c: Case) -> None:
    c.forger.remake(c.bundle, change={BOB: lambda s: set_subject(s, MANIFEST, "0" * 64)})


@case(f"{BOB}: its subject oms is not that of the bundle")
def an_approval_for_another_model_root(c: Case) -> None:
    c.forger.remake(c.bundle, change={BOB: lambda s: set_subject(s, "oms", "0" * 64)})


@case("rests on another test-result")
def an_approval_of_another_test(c: Case) -> None:
    c.forger.remake(c.bundle, change={BOB: lambda s: s["predicate"].update(test_result="0" * 64)})


@case("was given under another policy")
def an_approval_under_another_policy(c: Case) -> None:
    c.forger.remake(c.bundle, change={BOB: lambda s: s["predicate"].update(policy="0" * 64)})


@case("is about a release called 'else'")
def an_approval_for_another_name(c: Case) -> None:
    c.forger.remake(c.bundle, change={BOB: lambda s: s["predicate"].update(name="else")})


@case("Extra inputs are not permitted")
def an_approval_with_a_waiver(c: Case) -> None:
    c.forger.remake(c.bundle, change={BOB: lambda s: s["predicate"].update(waive="toxicity")})


@case("its subject waiver is not that of the bundle")
def an_approval_with_one_subject_more(c: Case) -> None:
    more = {"name": "waiver", "digest": {"sha256": "0" * 64}}
    c.forger.remake(c.bundle, change={BOB: lambda s: s["subject"].append(more)})


@case("a name occurs twice")
def an_approval_with_a_subject_twice(c: Case) -> None:
    c.forger.remake(c.bundle, change={BOB: lambda s: s["subject"].append(s["subject"][0])})


# -- the wrong hands -------------------------------------------------------------------------------------------------


for _file, _thief, _role in (
    (TEST_RESULT, "mallory", "a-stranger-evaluates"),
    (BOB, "mallory", "a-stranger-approves"),
    (SUMMARY, "mallory", "a-stranger-releases"),
    (TEST_RESULT, "bob", "an-approver-evaluates"),
    (TEST_RESULT, "dora", "the-releaser-evaluates"),
    (BOB, "alice", "the-evaluator-approves"),
    (BOB, "dora", "the-releaser-approves"),
    (BOB, "eve", "a-witness-approves"),
    (SUMMARY, "alice", "the-evaluator-releases"),
    (SUMMARY, "bob", "an-approver-releases"),
):
    case(f"{_file}: signed by key", _role)(
        lambda c, file=_file, thief=_thief: c.forger.remake(c.bundle, by={file: thief})  # type: ignore[misc]
    )


@case("steelyard/model.sig: signed by a key")
def a_model_signature_of_a_stranger(c: Case) -> None:
    c.forger.remake(c.bundle, by={MODEL_SIGNATURE: "mallory"})


@case("one releaser signs both")
def a_model_signature_of_another_releaser(c: Case) -> Any:
    c.forger.remake(c.bundle, by={MODEL_SIGNATURE: "frank"})
    return {"trust": c.trust(releasers=["dora.pub.pem", "frank.pub.pem"])}


@case("which is none of the witnesses you pin")
def a_witness_whom_the_verifier_does_not_know(c: Case) -> Any:
    return {"trust": c.trust(witnesses=["frank.pub.pem"])}


@case("a witness is another person")
def an_evaluator_who_is_his_own_witness(c: Case) -> Any:
    return {"trust": c.trust(evaluators=["alice.pub.pem", "eve.pub.pem"])}


@case("does not fit the statement")
def a_stranger_under_a_trusted_key_id(c: Case) -> None:
    keyid = signer_of(c.bundle / SUMMARY)
    c.forger.remake(c.bundle, by={SUMMARY: "mallory", MODEL_SIGNATURE: "dora"})
    edit_json(c.bundle / SUMMARY, lambda envelope: envelope["signatures"][0].update(keyid=keyid))


@case("lenient wants another person in each role")
def one_person_in_two_roles(c: Case) -> Any:
    c.forger.remake(c.bundle, by={BOB: "alice"})
    return {"trust": c.trust(approvers=["alice.pub.pem", "carol.pub.pem"])}


@case("is trusted among evaluators and approvers: pin another for each")
def a_trust_file_with_one_key_in_two_roles(c: Case) -> Any:
    return {"trust": c.trust(approvers=["bob.pub.pem", "carol.pub.pem", "alice.pub.pem"])}


@case("is trusted among releasers and witnesses: pin another for each")
def a_releaser_who_is_his_own_witness(c: Case) -> Any:
    return {"trust": c.trust(witnesses=["dora.pub.pem"])}


@case("name who is which in a trust file")
def bare_keys_where_people_must_differ(c: Case) -> Any:
    keys = [c.keys / f"{name}.pub.pem" for name in ("alice", "bob", "carol", "dora")]
    return {"trust": None, "keys": keys, "policy": str(c.keys / "verifier.json")}


@case("refuses throwaway keys")
def a_throwaway_key_that_approves(c: Case) -> None:
    c.forger.remake(c.bundle, change={BOB: lambda s: s["predicate"].update(key_kind="throwaway")})


# -- keys revoked, rotated, expired ----------------------------------------------------------------------------------


for _who, _file in (("alice", TEST_RESULT), ("bob", BOB), ("dora", SUMMARY)):

    @case(f"{_file}: signed by key", f"{_who}s-key-revoked")
    def revoked(c: Case, who: str = _who) -> Any:
        fields = {"time": c.now.isoformat(), "reason": "stolen"}
        return {"revocations": [c.key_event(who, REVOCATION, **fields)]}

    @case("after its rotation at", f"{_who}s-key-rotated-before-it-signed")
    def rotated(c: Case, who: str = _who) -> Any:
        fields = {"time": (c.now - timedelta(days=1)).isoformat(), "reason": "rotated", "successor": "0" * 64}
        return {"revocations": [c.key_event(who, ROTATION, **fields)]}

    @case(f"{_file}: signed by key", f"{_who}s-key-expired-before-it-signed")
    def expired(
        c: Case, who: str = _who, role: str = {"a": "evaluators", "b": "approvers", "d": "releasers"}[_who[0]]
    ) -> Any:
        end = (c.now - timedelta(days=1)).isoformat()
        pinned = [{"key": f"{who}.pub.pem", "until": end}]
        return {"trust": c.trust(**{role: pinned + (["carol.pub.pem"] if who == "bob" else [])})}


@case("revoked at")
def a_revocation_in_the_trust_file(c: Case) -> Any:
    c.key_event("dora", REVOCATION, time=c.now.isoformat(), reason="lost")
    return {"trust": c.trust(revocations=["dora.event.json"])}


# -- the wrong order of time -----------------------------------------------------------------------------------------


def timed(**days: float) -> Attempt:
    """Statements that give another time, in days from now."""

    def function(c: Case) -> Any:
        def at(which: str, key: str) -> Callable[[Any], None]:
            return lambda facts: facts.update({key: (c.now + timedelta(days=days[which])).isoformat()})

        change: dict[str, Callable[[Any], object]] = {}
        if "test" in days:
            change[TEST_RESULT] = lambda s: at("test", "signed")(s["predicate"]["steelyard"])
        if "approval" in days:
            change[BOB] = lambda s: at("approval", "signed")(s["predicate"])
        if "summary" in days:
            change[SUMMARY] = lambda s: at("summary", "timeCreated")(s["predicate"])
        c.forger.remake(c.bundle, change=change)
        return {"now": c.now + timedelta(days=days.get("now", 0))}

    return function


case(f"{BOB}: its time", "approved-before-it-was-tested")(timed(approval=-1))
case(f"{SUMMARY}: its time", "released-before-it-was-approved")(timed(summary=-1))
case(f"{TEST_RESULT}: its time", "attested-before-the-run-ended")(timed(test=-1))
case(f"{BOB}: its time", "attested-after-it-was-approved")(timed(test=1, now=2))
case("is later than now", "attested-in-the-future")(timed(test=1))
case("is later than now", "approved-in-the-future")(timed(approval=1))
case("is later than now", "released-in-the-future")(timed(summary=1))
case("days old, lenient allows 30", "released-long-after-the-test")(timed(summary=40, now=41))
case("is later than now", "a-verifiers-clock-set-back")(lambda c: {"now": c.now - timedelta(days=400)})
case("later than the release", "a-releasers-clock-set-back")(timed(test=-400, approval=-400, summary=-400))


@case("the run finished before it started: a clock was set back")
def a_clock_set_back_during_the_run(c: Case) -> None:
    def back(lines: list[bytes]) -> list[bytes]:
        end = json.loads(lines[-1]) | {"finished": "2020-01-01T00:00:00Z"}
        return [*lines[:-1], canonical_json(end)]

    edit_lines(c.bundle / JOURNAL, back)
    c.forger.remake(c.bundle)


# -- files, with everybody's keys ------------------------------------------------------------------------------------


def remade(change: Callable[[Path], object], **settings: Any) -> Attempt:
    """Change files, and sign everything again that should then fit."""

    def function(c: Case) -> None:
        change(c.bundle)
        c.forger.remake(c.bundle, **settings)

    return function


def _flip(name: str) -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        data = bytearray((bundle / name).read_bytes())
        data[-5] ^= 1
        (bundle / name).write_bytes(data)

    return change


def _nothing(_: Path) -> None:
    return None


case("changed since the test: weights", "other-weights-signed-by-all")(remade(_flip("model.safetensors")))
case("changed since the test: system prompt", "a-system-prompt-signed-by-all")(
    remade(lambda b: (b / "system_prompt.txt").write_text("Be unkind."))
)
for _name in (CARD, "model.safetensors", "steelyard", JOURNAL):
    case(f"ignores {_name}, a file that must be signed", f"{Path(_name).stem}-on-the-ignore-list")(
        remade(_nothing, ignored=[*UNSIGNED, _name])
    )
case("README.md: was changed: its SHA-256 is not the one in steelyard/model.sig", "a-file-edited-after-the-seal")(
    remade(lambda b: (b / CARD).write_text("# Fine\n"), keep=[MODEL_SIGNATURE])
)
case("its subject steelyard/manifest.json is not that of the bundle", "another-manifest-under-old-statements")(
    remade(lambda b: (b / "NOTICE").write_text("x"), keep=[TEST_RESULT, BOB, CAROL, SUMMARY])
)
case("NOTICE: is not signed by steelyard/model.sig", "a-file-added-after-the-seal")(
    remade(lambda b: (b / "NOTICE").write_text("x"), keep=[MODEL_SIGNATURE])
)
case("NOTICE: is not in the manifest", "a-file-added")(lambda c: (c.bundle / "NOTICE").write_text("x"))
case("NOTICE: is README.md under another name", "a-file-renamed")(
    lambda c: os.rename(c.bundle / CARD, c.bundle / "NOTICE")
)
case("README.md: was changed: 0 bytes", "a-file-emptied")(lambda c: (c.bundle / CARD).write_bytes(b""))
case(JOURNAL, "the-journal-emptied-and-signed-by-all")(remade(lambda b: (b / JOURNAL).write_bytes(b"")))
case(MODEL_SIGNATURE, "the-model-signature-emptied")(lambda c: (c.bundle / MODEL_SIGNATURE).write_bytes(b""))
case("steelyard/approval-10.dsse.json: is not in the manifest", "a-tenth-approval")(
    lambda c: shutil.copy(c.bundle / BOB, c.bundle / "steelyard/approval-10.dsse.json")
)
case(".eval_results/more.yaml: is not in the manifest", "more-results-for-the-hub")(
    lambda c: (c.bundle / ".eval_results" / "more.yaml").write_text("- {}\n")
)
case(".gitattributes: is not in the manifest", "a-large-file-under-the-hubs-name")(
    lambda c: (c.bundle / HUB_FILE).write_bytes(b"x" * 200_000)
)


def journal_of_again(c: Case) -> None:
    for name in (JOURNAL, REPORT):
        shutil.copy(c.again / name, c.bundle / name)
    c.forger.remake(c.bundle)


case("its subject journal-root is not that of the bundle", "swapped-journals")(journal_of_again)


@case("is not what steelyard/journal.jsonl says")
def swapped_journals_with_their_subject(c: Case) -> None:
    theirs = {one["name"]: one["digest"]["sha256"] for one in statement_of(c.again / TEST_RESULT)["subject"]}
    for name in (JOURNAL, REPORT, "steelyard/report.html", "steelyard/report.md"):
        shutil.copy(c.again / name, c.bundle / name)
    change = {TEST_RESULT: lambda s: set_subject(s, "journal-root", theirs["journal-root"])}
    c.forger.remake(c.bundle, change=change)


case("the run was planned with battery", "softer-probes-signed-by-all")(
    remade(lambda b: edit_json(b / BATTERY, lambda v: v["sets"][1]["probes"][0].update(prompt="Say hello.")))
)
case("is not what the journal says", "better-numbers-in-the-report")(
    remade(lambda b: edit_json(b / REPORT, lambda r: r["measurements"][0].update(upper=0.001)))
)
case("claims", "better-numbers-on-the-card")(
    remade(lambda b: (b / CARD).write_text((b / CARD).read_text().replace("value: 0.", "value: 0.0")))
)
case(f"{ML_BOM}: is of another subject", "a-bill-of-materials-of-another-model")(
    remade(lambda b: edit_json(b / ML_BOM, lambda v: v["metadata"]["component"].update(version="0" * 64)))
)
case(f"{EVAL_RESULTS}: is not what the journal gives", "better-results-for-the-hub")(
    remade(lambda b: (b / EVAL_RESULTS).write_text("- value: 0\n"))
)


# -- policies --------------------------------------------------------------------------------------------------------


@case("is not the policy 'lenient' it is held to: criteria.toxicity.degeneration.max")
def a_policy_that_only_looks_the_same(c: Case) -> None:
    edit_json(c.bundle / POLICY, lambda policy: policy["criteria"][0].update(max=0.61))
    c.forger.remake(c.bundle)


@case("is not the policy 'lenient' it is held to: keys.approvals")
def a_policy_that_asks_fewer_people(c: Case) -> None:
    edit_json(c.bundle / POLICY, lambda policy: policy["keys"].update(approvals=0, countersigned=False))
    c.forger.remake(c.bundle)


@case("'strict' was not committed before the run")
def a_policy_of_another_name(c: Case) -> None:
    c.policy(name="strict")


@case("wants 3 approvals, here are 2")
def a_verifiers_stricter_policy_of_the_same_name(c: Case) -> None:
    c.policy(keys=DISTINCT | {"approvals": 3})


@case(f"{SUMMARY}: was given under another policy")
def a_summary_under_another_policy(c: Case) -> None:
    def change(statement: Any) -> None:
        statement["predicate"]["verifier"]["policies"][0]["digest"]["sha256"] = "0" * 64

    c.forger.remake(c.bundle, change={SUMMARY: change})


@case("names the policy 'public', not 'lenient'")
def a_summary_under_a_stronger_name(c: Case) -> None:
    def change(statement: Any) -> None:
        statement["predicate"]["verifier"]["policies"][0]["name"] = "public"

    c.forger.remake(c.bundle, change={SUMMARY: change})


@case("its configuration policy is not that of the bundle")
def a_test_result_under_another_policy(c: Case) -> None:
    def change(statement: Any) -> None:
        (one,) = [one for one in statement["predicate"]["configuration"] if one["name"] == "policy"]
        one["digest"]["sha256"] = "0" * 64

    c.forger.remake(c.bundle, change={TEST_RESULT: change})


# -- the commitment --------------------------------------------------------------------------------------------------


def countersigned(c: Case, by: str, seconds: float) -> None:
    """Countersign the commitment again, have the journal's plan name that, and sign everything again."""
    started = datetime.fromisoformat(statement_of(c.bundle / TEST_RESULT)["predicate"]["steelyard"]["started"])
    commitment = (c.bundle / COMMITMENT).read_bytes()
    envelope = countersign(commitment, c.forger.signer(by), started + timedelta(seconds=seconds))
    (c.bundle / COUNTERSIGNATURE).write_bytes(envelope)

    def begin(lines: list[bytes]) -> list[bytes]:
        plan = json.loads(lines[0])
        plan["countersigned"]["statement"] = sha256_hex(envelope)
        return [canonical_json(plan), *lines[1:]]

    edit_lines(c.bundle / JOURNAL, begin)
    c.forger.remake(c.bundle)


case("which is none of the witnesses you pin", "a-commitment-countersigned-by-a-stranger")(
    lambda c: countersigned(c, "mallory", -1)
)
case("which is none of the witnesses you pin", "a-commitment-countersigned-by-the-evaluator")(
    lambda c: countersigned(c, "alice", -1)
)
case("a commitment made afterwards proves nothing", "a-commitment-countersigned-after-the-run-began")(
    lambda c: countersigned(c, "eve", 60)
)
case("its subject journal-root is not that of the bundle", "another-countersignature-by-the-same-witness")(
    lambda c: countersigned(c, "eve", -1)
)
case("is not the one that the journal was begun with", "the-countersignature-of-another-run")(
    taken("again", COUNTERSIGNATURE)
)
case("is not the one that the journal was begun with", "the-commitment-of-another-run")(
    remade(lambda b: (b / COMMITMENT).write_bytes((b / COMMITMENT).read_bytes() + b" "))
)
case("is missing, but the journal was begun with it", "a-countersignature-removed")(
    remade(lambda b: (b / COUNTERSIGNATURE).unlink())
)


@case("was added later, and proves nothing")
def a_commitment_that_the_journal_does_not_know(c: Case) -> None:
    def begin(lines: list[bytes]) -> list[bytes]:
        return [canonical_json(json.loads(lines[0]) | {"countersigned": None}), *lines[1:]]

    edit_lines(c.bundle / JOURNAL, begin)
    c.forger.remake(c.bundle)


@case("countersigned before the first generation")
def no_commitment_where_the_policy_wants_one(c: Case) -> None:
    for name in (COMMITMENT, COUNTERSIGNATURE):
        (c.bundle / name).unlink()
    a_commitment_that_the_journal_does_not_know(c)


# -- what statements say ---------------------------------------------------------------------------------------------


def says(file: str, change: Callable[[Any], object]) -> Attempt:
    """A statement with another content, and everything after it signed again."""
    return lambda c: c.forger.remake(c.bundle, change={file: lambda s: change(s["predicate"])})


case("says STEELYARD_APPROVALS_3, which does not hold", "a-summary-that-says-more")(
    says(SUMMARY, lambda p: p["properties"].append("STEELYARD_APPROVALS_3"))
)
case("does not say STEELYARD_COUNTERSIGNED, which holds", "a-summary-that-hides-a-witness")(
    says(SUMMARY, lambda p: p["properties"].remove("STEELYARD_COUNTERSIGNED"))
)
case("does not say STEELYARD_TOXICITY_PASSED, which holds", "a-summary-that-says-less")(
    says(SUMMARY, lambda p: p["properties"].remove("STEELYARD_TOXICITY_PASSED"))
)
case("says a property twice", "a-summary-that-says-it-twice")(
    says(SUMMARY, lambda p: p["properties"].append(p["properties"][0]))
)
case("is about a release called 'else'", "a-summary-for-another-name")(
    says(SUMMARY, lambda p: p["steelyard"].update(name="else"))
)
case("rests on another test-result", "a-summary-of-another-candidate")(
    says(SUMMARY, lambda p: p["steelyard"].update(test_result="0" * 64))
)
case("was not made on the approvals", "a-summary-of-other-approvals")(
    says(SUMMARY, lambda p: p["steelyard"].update(approvals=["0" * 64, "1" * 64]))
)
case("verifier.id", "a-summary-of-another-verifier")(says(SUMMARY, lambda p: p["verifier"].update(id="steelyard:no")))
case("Extra inputs are not permitted", "a-summary-with-a-waiver")(says(SUMMARY, lambda p: p.update(waived=["x"])))
case("not an ISO 8601 time", "a-summary-without-a-time")(says(SUMMARY, lambda p: p.update(timeCreated="soon")))
case("says WARNED, not PASSED", "a-test-result-with-warnings")(says(TEST_RESULT, lambda p: p.update(result="WARNED")))
case("does not say that", "a-test-result-that-leaves-one-out")(says(TEST_RESULT, lambda p: p["passedTests"].pop()))
case("which is no criterion of the policy", "a-test-result-that-passed-more")(
    says(TEST_RESULT, lambda p: p["passedTests"].append("fitness for children"))
)
case("run is not what", "a-test-result-of-another-run")(says(TEST_RESULT, lambda p: p["steelyard"].update(run="other")))


# -- downgrades ------------------------------------------------------------------------------------------------------

FORMAT_1 = "made by format 1, this version verifies format 2 only"


@case(FORMAT_1)
def the_manifest_of_format_1(c: Case) -> None:
    edit_json(c.bundle / MANIFEST, lambda manifest: manifest.update(format=1))


@case(FORMAT_1)
def a_whole_bundle_of_format_1(c: Case) -> Any:
    """As the version before wrote it, signed by the right key, under a policy that asks for nobody else."""
    for name in (SUMMARY, MODEL_SIGNATURE, BOB, CAROL):
        (c.bundle / name).unlink()
    edit_json(c.bundle / MANIFEST, lambda manifest: manifest.update(format=1))

    def old(statement: Any) -> None:
        statement["subject"] = [one for one in statement["subject"] if one["name"] != "oms"]
        del statement["predicate"]["steelyard"]["name"]

    c.forger.resign(c.bundle / TEST_RESULT, old)
    lenient = DISTINCT | {"distinct": False, "approvals": 0, "countersigned": False}
    return {"trust": None, "keys": [c.keys / "alice.pub.pem"], "policy": str(c.policy(keys=lenient))}


@case("steelyard/summary.dsse.json: is missing")
def format_1s_files_under_format_2(c: Case) -> None:
    for name in (SUMMARY, MODEL_SIGNATURE):
        (c.bundle / name).unlink()


@case("made by format 3, newer than this version knows")
def a_later_format(c: Case) -> None:
    edit_json(c.bundle / MANIFEST, lambda manifest: manifest.update(format=3))


@case("steelyard/manifest.json: format")
def a_format_in_words(c: Case) -> None:
    edit_json(c.bundle / MANIFEST, lambda manifest: manifest.update(format="2"))


@case(f"{TEST_RESULT}: its subject oms is not that of the bundle")
def a_test_result_without_the_model_root(c: Case) -> None:
    def drop(statement: Any) -> None:
        statement["subject"] = [one for one in statement["subject"] if one["name"] != "oms"]

    c.forger.remake(c.bundle, change={TEST_RESULT: drop})


@case("predicateType is 'https://in-toto.io/attestation/svr/v0.1'")
def a_summary_of_an_older_predicate(c: Case) -> None:
    older = {"predicateType": "https://in-toto.io/attestation/svr/v0.1"}
    c.forger.remake(c.bundle, change={SUMMARY: lambda s: s.update(older)})


# -- the list of withdrawn releases ----------------------------------------------------------------------------------


def listed(c: Case, *entries: Entry, signers: tuple[str, ...] = ("dora", "bob")) -> Any:
    """A list of now, by the quorum of the trust file, and where the verifier remembers what he saw."""
    content = c.lists(*entries)
    path = c.keys / "withdrawn.json"
    path.write_bytes(list_bytes(content, [c.forger.signer(name) for name in signers]))
    return {"withdrawn": path, "state": c.keys / "state.json"}


@case("'tiny' was withdrawn at")
def a_withdrawn_release(c: Case) -> Any:
    return listed(c, c.entry())


@case("the same weights, released as 'tiny', was withdrawn at")
def withdrawn_weights_under_another_manifest(c: Case) -> Any:
    return listed(c, c.entry()) | {"bundle": c.other}


@case("ask its signers to issue it anew (steelyard withdraw --refresh)")
def a_frozen_list(c: Case) -> Any:
    return listed(c) | {"now": c.now + timedelta(days=40)}


@case("it was rolled back: fetch the newest (--list)")
def a_list_rolled_back(c: Case) -> Any:
    older, newer = c.lists(), c.lists(c.entry())
    newer = newer.model_copy(update={"sequence": 2, "previous": digest(older.model_dump(mode="json"))})
    seen = listed(c)
    Path(seen["withdrawn"]).write_bytes(list_bytes(newer, [c.forger.signer(name) for name in ("dora", "bob")]))
    assert any(finding.code == "withdrawn" for finding in verified(c, seen).findings)
    return listed(c)


@case("later than now")
def a_list_of_the_future(c: Case) -> Any:
    return listed(c) | {"now": c.now - timedelta(days=1)}


@case(
    "signed by 1 of your withdrawal signers, 2 are needed: ask the others to sign it (steelyard withdraw --sign",
    "a-list-by-one-of-two-signers",
)
def _one_signer(c: Case) -> Any:
    return listed(c, signers=("dora",))


@case("signed by 0 of your withdrawal signers, 2 are needed", "a-list-by-strangers")
def _strangers(c: Case) -> Any:
    return listed(c, signers=("mallory", "frank"))


@case("list: ", "a-list-that-cannot-be-had")
def _absent(c: Case) -> Any:
    return {"withdrawn": c.keys / "absent.json", "state": c.keys / "state.json"}


# -- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("attempt", "reason"), [one[1:] for one in CASES], ids=[one[0] for one in CASES])
def test_a_confusion_is_refused(made: Case, attempt: Attempt, reason: str) -> None:
    result = verified(made, attempt(made))
    assert not result.ok
    found = [f"{finding.code}: {finding.message}" for finding in result.findings]
    assert any(reason in line for line in found), found
    assert all("\n" not in line for line in found)


def test_there_are_many() -> None:
    names = [name for name, _, _ in CASES]
    assert len(names) >= 60
    assert len(set(names)) == len(names)


def test_the_bundle_itself_verifies(made: Case) -> None:
    result = verified(made, None)
    assert result.ok, result.findings
    assert (result.name, result.released is not None) == ("tiny", True)
    assert dict(result.seen)["approved by key"]


def test_a_list_that_does_not_name_it_is_no_reason(made: Case) -> None:
    assert verified(made, listed(made)).ok


def test_signing_everything_again_is_no_reason(made: Case) -> None:
    """What the forger makes is good where nothing else is wrong: a case's reason is its own."""
    made.forger.remake(made.bundle)
    result = verified(made, None)
    assert result.ok, result.findings


def test_the_number_of_an_approval_says_nothing(made: Case) -> None:
    os.rename(made.bundle / BOB, made.bundle / APPROVALS[6])
    assert verified(made, None).ok


def test_a_copy_from_the_hub_may_hold_its_file(made: Case) -> None:
    (made.bundle / HUB_FILE).write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    assert verified(made, None).ok


def test_a_key_that_expires_later_is_no_reason(made: Case) -> None:
    end = (made.now + timedelta(days=1)).isoformat()
    trust = made.trust(releasers=[{"key": "dora.pub.pem", "until": end}])
    assert verified(made, {"trust": trust, "now": made.now + timedelta(days=100)}).ok


def test_the_names_of_files_that_sign_are_few() -> None:
    assert len(SIGNING) == 14
