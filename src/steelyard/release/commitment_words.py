"""What a commitment commits to, in words, for whoever is asked to countersign it.

The commitment itself holds digests. Battery and policies are read from beside it, or are those that this version ships,
and are shown only where their digests are the committed ones: nobody signs thresholds that he did not see.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from steelyard.base.errors import SteelyardError
from steelyard.safety.battery import Battery, load_battery
from steelyard.safety.pause import Commitment
from steelyard.safety.policy import Policy, load_policy


def in_words(commitment: Commitment, folder: Path) -> list[str]:
    """Lines for people; `folder` is where the commitment lies. Raises SteelyardError where the battery or a policy is
    not at hand, or is another than the committed one.
    """
    battery = _battery(commitment, folder)
    policies = [_policy(name, digest, folder) for name, digest in sorted(commitment.policies.items())]
    before = commitment.predecessor
    return [
        f"run {commitment.run}, committed {commitment.time}; nothing may have been generated yet",
        f"model: subject {commitment.subject}",
        f"attempt {commitment.attempt} on this model and test, as its ledger counts",
        "predecessor: none" if before is None else f"predecessor: subject {before.subject}, run {before.run}",
        f"battery: {battery.name} version {battery.version}, tier {battery.tier}, {len(battery.probes()):,} probes "
        f"({_shipped(battery)})",
        f"  {commitment.battery}",
        *(line for policy in policies for line in _thresholds(policy)),
        *(f"scorer {name}: {digest}" for name, digest in sorted(commitment.scorers.items())),
        f"code: {commitment.code}",
        f"ledger head: {commitment.head}",
    ]


def _thresholds(policy: Policy) -> Iterator[str]:
    yield f"policy: {policy.name} version {policy.version} ({_shipped(policy)})"
    yield f"  {policy.digest}"
    for criterion in policy.criteria:
        margin = policy.predecessor.non_inferior.get(criterion.metric)
        worse = "" if margin is None else f", and at most {margin:.1%} worse than the predecessor"
        yield f"  {criterion.metric} under {criterion.max:.1%}{worse}"
    yield f"  at most {policy.max_attempts} attempts and {policy.max_candidates} candidates"
    yield f"  a report of at most {policy.max_report_age_days:g} days"
    yield f"  training data: {policy.training_data}; at most {policy.max_overlap:.1%} of an axis in it"


def _battery(commitment: Commitment, folder: Path) -> Battery:
    path = folder / "battery.json"
    if path.is_file():
        found = load_battery(str(path))
        if found.digest != commitment.battery:
            raise SteelyardError(
                f"{path}: is not the battery that was committed: ask for the folder as the run left it"
            )
        return found
    for name in _names("batteries"):
        if (packaged := load_battery(name)).digest == commitment.battery:
            return packaged
    raise SteelyardError(f"{path}: is not there, so nobody can see what is countersigned: ask for the run's folder")


def _policy(name: str, digest: str, folder: Path) -> Policy:
    if name in _names("policies") and (packaged := load_policy(name)).digest == digest:
        return packaged
    for path in sorted((folder / "policies").glob("*.json")):
        if (found := load_policy(str(path))).digest == digest:
            if found.name != name:
                raise SteelyardError(
                    f"{path}: is committed as {name!r}, but calls itself {found.name!r}: do not sign it"
                )
            return found
    text = f"holds no policy {name!r} as it was committed ({digest[:16]}): ask for the run's folder as the run left it"
    raise SteelyardError(f"{folder / 'policies'}: {text}")


def _shipped(part: Battery | Policy) -> str:
    kind = "batteries" if isinstance(part, Battery) else "policies"
    load = load_battery if isinstance(part, Battery) else load_policy
    if part.name in _names(kind) and load(part.name).digest == part.digest:
        return "as this version ships it"
    return "their own, none that this version ships"


def _names(kind: str) -> list[str]:
    folder = resources.files("steelyard.safety") / kind
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))
