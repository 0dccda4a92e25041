"""A run and the ledger: committed before the first generation, noted block by block, finished, and found again.

safety.committed  what a run was going to test, with what; a candidate's names its predecessor's run
safety.paused     the commitment that waits to be countersigned, where that was asked (`pause`)
safety.progress   a block of the journal, when it was written
safety.finished   the root of a whole journal; the ledger keeps the file, so that it can stand in for another run of
                  the same model under the same battery, scorers, code and engine
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steelyard.base.canonical import canonical_json, sha256_hex
from steelyard.base.errors import FormatError, SteelyardError
from steelyard.base.files import write_atomic
from steelyard.base.progress import Progress
from steelyard.safety.attempts import attempts, kin, questions
from steelyard.safety.battery import Battery
from steelyard.safety.journal import Committed, End, Journal, JournalWriter, Plan, check_journal, read_journal
from steelyard.safety.pause import Look, check_asked, check_resumed, countersigned
from steelyard.safety.policy import Policy

if TYPE_CHECKING:  # `verify` reads this module too, and needs no database
    from steelyard.ledger.ledger import Event, Ledger

NOTE = "run.json"  # beside a journal: the id its run was going to have


def now() -> str:
    """UTC, to the second, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def started(folder: Path) -> bool:
    """Whether a run of its own was started in this folder; a journal without is one that was taken from elsewhere."""
    return (folder / NOTE).exists()


def commitment(plan: Plan, battery: Battery) -> dict[str, Any]:
    """The payload of `safety.committed`. `questions` and `kin` tell which starts are tries at one test."""
    return {
        "run": plan.run,
        "role": plan.role,
        "subject": plan.subject_digest,
        "battery": plan.battery,
        "policies": plan.policies,
        "scorers": {name: identity.digest for name, identity in plan.scorers.items()},
        "code": plan.code,
        "seed": plan.seed,
        "questions": questions(battery),
        "kin": kin(plan.subject),
        "predecessor": None if plan.predecessor is None else plan.predecessor.model_dump(mode="json"),
    }


def open_journal(
    plan: Plan, path: Path, battery: Battery, ledger: Ledger, countersign: Look | None = None
) -> JournalWriter:
    """The journal at `path`, to go on with: one that is there already (of the same parts), or a new, committed one.

    With `countersign`, a new one only once its commitment is countersigned; raises Paused before.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        check_asked(path.parent, ledger, countersign)
        run, event = _commit(plan, battery, path.parent, ledger)
        attempt = attempts(ledger, event.payload, event.seq)
        update = {"run": run, "committed": Committed(seq=event.seq, hash=event.hash), "attempt": attempt}
        plan = plan.model_copy(update=update)
        if countersign is not None:
            found = countersigned(plan, event, path.parent, ledger, countersign, now())
            plan = plan.model_copy(update={"countersigned": found, "started": now()})
        return JournalWriter.create(path, plan)
    writer = JournalWriter.resume(path, plan, battery, measured=plan.role == "predecessor")
    try:
        committed = writer.plan.committed
        events = ledger.events("safety.committed", run=writer.plan.run)
        if not any(event.seq == committed.seq and event.hash == committed.hash for event in events):
            raise SteelyardError(f"{path}: this ledger has no record of the run: give the ledger it was started with")
        _check_noted(ledger, writer)
        if plan.role == "candidate":  # a predecessor's journal may be one that was taken from elsewhere
            check_resumed(writer.plan, path.parent, countersign)
    except BaseException:
        writer.close()
        raise
    return writer


def _commit(plan: Plan, battery: Battery, folder: Path, ledger: Ledger) -> tuple[str, Event]:
    """The ledger event that commits this run, before anything is generated, and its run id.

    The id is noted in `run.json` first: a run killed between the event and its journal's first line finds its own
    event again, and is not counted twice.
    """
    noted = folder / NOTE
    if noted.exists():
        try:
            plan = plan.model_copy(update={"run": str(json.loads(noted.read_bytes())["run"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise FormatError(f"{noted}: damaged: give a new run folder") from error
    payload = commitment(plan, battery)
    for event in ledger.events("safety.committed", run=plan.run):
        if event.payload == payload:
            return plan.run, event
        changed = ", ".join(sorted(name for name in payload if event.payload.get(name) != payload[name]))
        text = f"run {plan.run} was committed with other parts ({changed}): give a new run folder"
        raise SteelyardError(f"{noted}: {text}")
    write_atomic(noted, canonical_json({"run": plan.run}) + b"\n")
    return plan.run, ledger.append("safety.committed", payload)


def note(ledger: Ledger, writer: JournalWriter, batch: int, block: str) -> None:
    """Note a block that is written: whoever edits it while the run is stopped cannot go on with it."""
    lines, root = writer.mark
    ledger.append(
        "safety.progress", {"run": writer.plan.run, "batch": batch, "block": block, "lines": lines, "root": root}
    )


def _check_noted(ledger: Ledger, writer: JournalWriter) -> None:
    """Go on where the ledger last saw the journal. Raises SteelyardError where it was edited since."""
    finished = ledger.events("safety.finished", run=writer.plan.run)
    if finished:
        if finished[-1].payload.get("journal_root") != writer.found_root:
            raise SteelyardError(f"{writer.path}: edited since the run finished: give a new run folder")
        return
    noted = ledger.events("safety.progress", run=writer.plan.run)
    if noted:
        writer.back_to(noted[-1].payload["lines"], noted[-1].payload["root"])
    else:
        writer.back_to(1, sha256_hex(writer.plan_line))


def write_inputs(out: Path, battery: Battery, policies: Sequence[Policy]) -> None:
    """battery.json and policies/NAME.json. They are those of the plan: `open_journal` has compared the digests."""
    write_atomic(out / "battery.json", canonical_json(battery.model_dump(mode="json")) + b"\n")
    for policy in policies:
        write_atomic(out / "policies" / f"{policy.name}.json", canonical_json(policy.model_dump(mode="json")) + b"\n")


# -- the end, and a second life --------------------------------------------------------------------------------------


def finish(ledger: Ledger, path: Path, battery: Battery, **more: str) -> None:
    """Say once that the run of this journal ended; keep the file of a whole and sound one in the ledger's store."""
    journal = read_journal(path)
    said = {"run": journal.plan.run, "subject": journal.plan.subject_digest, "journal_root": journal.root} | more
    if ledger.events("safety.finished", **said):
        return
    kept = {}
    if ledger.keeps_files and _sound(journal, battery):
        kept = {"key": journal.plan.key, "file": ledger.put_file(path)}
    ledger.append("safety.finished", said | kept)


def _sound(journal: Journal, battery: Battery) -> bool:
    whole = bool(journal.entries) and isinstance(journal.entries[-1], End)
    return whole and not check_journal(journal, battery)


def reusable(plan: Plan, battery: Battery, ledger: Ledger, progress: Progress) -> Path | None:
    """The kept journal of an earlier run that measured what `plan` would: same subject, battery, scorers, code, engine,
    sampling and batches (`Plan.key`). It is read and checked again; one that was damaged is passed over, and said."""
    if not ledger.keeps_files:
        return None
    for event in reversed(ledger.events("safety.finished", key=plan.key)):
        try:
            path = ledger.get_file(str(event.payload["file"]))
            journal = read_journal(path)
        except SteelyardError as error:
            progress.say(f"run {event.payload.get('run')} cannot be used again: {error}")
            continue
        same = not journal.plan.differences(plan, measured=True) and journal.root == event.payload.get("journal_root")
        if same and _sound(journal, battery):
            return path
        progress.say(f"run {event.payload.get('run')} cannot be used again: its journal is not what was kept")
    return None
