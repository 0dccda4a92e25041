"""Is this our model? One suspect against every registered one, cheapest first, with evidence and a probability.

Headers say which registered models have its shapes; digests find copies; the order of the neurons finds what was
fine-tuned, merged, pruned or quantised; the signature finds what was permuted or rotated; sampled rows say how far
it is, and which of several related models it was made from.

    >>> answer = trace(Path("suspect"), registry.references)
    >>> answer.verdict, answer.nearest.name, answer.nearest.log10_p
    ('derived', 'smollm2', -57.0)
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from steelyard.base.errors import FormatError
from steelyard.base.progress import Progress, Silent
from steelyard.trace.attribution import Share, shares
from steelyard.trace.compare import (
    Bytes,
    Order,
    Pair,
    Signature,
    Suspect,
    by_bytes,
    by_order,
    by_signature,
    check_compared,
    paired_rows,
    requantised_share,
)
from steelyard.trace.registry import Reference
from steelyard.trace.roles import EMBEDDING
from steelyard.trace.signature import some_neurons
from steelyard.trace.tensors import Float32, Tensors, fingerprint, open_tensors

EXACT, SAME, QUANTISED, DERIVED = "exact copy", "same tensors", "quantised", "derived"
SIBLING, UNRELATED, UNREADABLE = "shares an ancestor", "unrelated", "unreadable"
RELATED = (EXACT, SAME, QUANTISED, DERIVED)

LEVEL = -6.0  # log10 of the p-value, corrected for everything that was tried, from which models count as related
LEAST_AGREEING = 0.2  # share of neurons whose gate and up matchings must agree: independent models share 1-5% of theirs
LIKE = 0.5  # cosine with the base's from which a tensor of a model that is related says what it was made from
DISGUISED = 0.05  # of a base's size: what is left of the rows beyond base and releases, more than most fine-tunes do
OWN = 0.5  # share of a release's own change from which it is named before its base, whatever the distances
MOST_MERGED = 0.8  # of ours in a merge: a fine-tune leaves the weights their scale
SHA256_LOG10 = -77.0  # two different tensors have one SHA-256 with probability 2^-256
# Relative error that quantising LLaMA-like weights to a type makes, for types that cannot be made here.
_QUANTISED_NOISE = {"Q6_K": 0.03, "Q5_K": 0.06, "Q4_K": 0.11, "Q3_K": 0.22, "Q2_K": 0.45}
_TYPE_NOISE = {
    "BF16": 0.0018,
    "F16": 0.0003,
    "F8_E4M3": 0.04,
    "F8_E5M2": 0.06,
    "I8": 0.01,
    "Q8_0": 0.008,
    "Q5_1": 0.05,
    "Q5_0": 0.06,
    "Q4_1": 0.09,
    "Q4_0": 0.11,
}


@dataclass(frozen=True)
class Relation:
    """The suspect and one registered model. `log10_p`: of evidence so strong where the two are independent;
    `distance`: mean relative distance of the matrices; `changes`: what was done, as far as the weights show it."""

    name: str
    kind: str
    verdict: str
    changes: tuple[str, ...] = ()
    log10_p: float = 0.0
    distance: float | None = None
    share: float | None = None
    share_error: float | None = None
    evidence: tuple[str, ...] = ()
    digests: tuple[tuple[str, str], ...] = ()  # the suspect's tensors or files that are ours to the byte, with SHA-256


@dataclass(frozen=True)
class Answer:
    """What a suspect is: the verdict about the nearest registered model, and every other one's."""

    suspect: str
    verdict: str
    nearest: Relation | None
    relations: Sequence[Relation] = ()
    reason: str = ""
    bytes_read: int = 0
    seconds: float = 0.0
    fingerprint: str | None = None  # of a relative whose weights were compared (`tensors.fingerprint`)


def trace(
    path: Path, references: Sequence[Reference], *, full: bool | None = None, progress: Progress | None = None
) -> Answer:
    """The answer for a safetensors file, a model folder or a GGUF; never raises for what the suspect holds.

    `full`: hash every tensor, however large (default: of models up to 1 GiB).
    """
    start = time.monotonic()
    tensors: Tensors | None = None
    try:
        tensors = open_tensors(path)
        relations = relate(tensors, references, full=full, progress=progress)
        best = nearest(relations)
        mark = fingerprint(tensors) if best else None
        answer = Answer(str(path), best.verdict if best else UNRELATED, best, relations, fingerprint=mark)
    except FormatError as error:
        said = str(error)
        answer = Answer(str(path), UNREADABLE, None, reason=said if str(path) in said else f"{path}: {said}")
    except OSError as error:
        answer = Answer(str(path), UNREADABLE, None, reason=f"{path}: cannot be read: {error.strerror}")
    read = tensors.bytes_read if tensors is not None else 0
    spent = time.monotonic() - start
    return replace(answer, bytes_read=read, seconds=spent)


def nearest(relations: Sequence[Relation]) -> Relation | None:
    """The relation that answers the question: a copy before what was derived, of these a release whose own change is
    mostly there before its base, then the closest, then the one with most tensors to the byte."""
    ranks = {EXACT: 0, SAME: 1, QUANTISED: 2, DERIVED: 2, SIBLING: 3}
    known = [one for one in relations if one.verdict in ranks]
    if not known:
        return None
    far = {id(one): math.inf if one.distance is None else one.distance for one in known}
    return min(known, key=lambda one: (ranks[one.verdict], (one.share or 0) < OWN, far[id(one)], -len(one.digests)))


def not_the_bases(relations: Sequence[Relation]) -> list[Relation]:
    """Of relations that rest on equal bytes alone: a release of which nothing was found but what its base has too (an
    embedding that was never trained) shares an ancestor, and no more."""
    shared = {digest for one in relations if one.kind == "base" for _, digest in one.digests}
    return [
        replace(one, verdict=SIBLING, changes=())
        if one.kind == "release" and one.verdict in (SAME, DERIVED) and {digest for _, digest in one.digests} <= shared
        else one
        for one in relations
    ]


def fits(tensors: Tensors, reference: Reference) -> bool:
    """From headers alone: whether any matrix of the suspect has rows or columns of the reference's width, or any tensor
    as many values as a matrix of the reference has (one that was laid flat)."""
    width, counts = reference.sizes.hidden, {math.prod(one.shape) for one in reference.tensors if len(one.shape) >= 2}
    shapes = [entry.shape for entry in tensors.entries.values()]
    return any(len(shape) >= 2 and width in shape for shape in shapes) or any(
        math.prod(one) in counts for one in shapes
    )


def relate(
    tensors: Tensors, references: Sequence[Reference], *, full: bool | None = None, progress: Progress | None = None
) -> list[Relation]:
    """The suspect's relation to each reference. Raises FormatError where it cannot be read or compared."""
    suspect = Suspect(tensors, full=full, progress=progress or Silent())
    found: list[_Found] = []
    for reference in references:
        if not fits(tensors, reference):
            continue
        found.append(_look(suspect, reference, len(references)))
    related = [one for one in found if one.related]
    if found and not related:
        check_compared(suspect, references)
    _attribute(suspect, related)
    known = {one.reference.name: one for one in found}
    relations = []
    for reference in references:
        if reference.name in known:
            relations.append(known[reference.name].relation(suspect))
        else:
            why = f"no matrix is {reference.sizes.hidden} wide"
            relations.append(Relation(reference.name, reference.kind, UNRELATED, evidence=(why,)))
    by_bytes_alone = {one.reference.name for one in related if one.bytes_alone}
    told = {one.name: one for one in not_the_bases([one for one in relations if one.name in by_bytes_alone])}
    shared = {digest for one in relations if one.kind == "base" for _, digest in one.digests}
    return [_own(told.get(one.name, one), shared) for one in relations]


def _own(relation: Relation, shared: Set[str]) -> Relation:
    """What was made from a release, without the digests that its base has too."""
    if relation.kind == "base" or relation.verdict not in (QUANTISED, DERIVED):
        return relation
    return replace(relation, digests=tuple(one for one in relation.digests if one[1] not in shared))


@dataclass
class _Found:
    reference: Reference
    bytes: Bytes
    order: Order | None
    signature: Signature | None
    log10_p: float
    related: bool
    pairs: list[Pair] = field(default_factory=list)
    share: Share | None = None
    weak: Signature | None = None  # one that shows nothing

    def relation(self, suspect: Suspect) -> Relation:
        reference = self.reference
        facts: dict[str, Any] = {"log10_p": max(self.log10_p, -300.0), "evidence": tuple(self._evidence())}
        if self.share is not None:
            facts |= {"share": self.share.value, "share_error": self.share.error}
        if not self.related:
            return Relation(reference.name, reference.kind, UNRELATED, **facts)
        facts |= {"distance": self.distance, "digests": self.bytes.ours}
        changes = self._changes(suspect)
        if self.copied:
            verdict = EXACT if self._unchanged(suspect) else SAME
        elif self.share is not None and not self.share.derived:
            verdict = SIBLING
        elif changes == ("quantised",):
            verdict = QUANTISED
        else:
            verdict = DERIVED
        return Relation(reference.name, reference.kind, verdict, changes, **facts)

    @cached_property
    def copied(self) -> bool:
        """Whether it is a copy: every tensor's bytes are ours, or of a large one all that was hashed and sampled."""
        if self.bytes.complete or not self.bytes.all:
            return self.bytes.all
        return bool(self.pairs) and all(pair.equal for pair in self.pairs)

    @property
    def bytes_alone(self) -> bool:
        """Whether equal bytes are all that relates the two."""
        return self.copied or not (self.pairs or self.signature)

    @property
    def distance(self) -> float | None:
        if self.copied:
            return 0.0
        distances = [pair.distance for pair in self.pairs if pair.ours.ndim == 2]
        if distances:
            return float(np.mean(distances))
        if self.signature is not None and self.signature.cosine > 0:
            return math.sqrt(max(0.0, 2 - 2 * self.signature.cosine))
        return None

    def _unchanged(self, suspect: Suspect) -> bool:
        """The same names, types and files: nothing but the place differs."""
        entries = suspect.tensors.entries
        plain = {one.name: (one.dtype, one.shape) for one in self.reference.tensors}
        if {name: (one.dtype, one.shape) for name, one in entries.items()} != plain:
            return False
        if not all(any(hit.tensor == name for hit in hits) for name, hits in self.bytes.found.items()):
            return False
        sizes = sorted(path.stat().st_size for path in {one.file for one in entries.values()})
        return sizes == sorted(one.size for one in self.reference.files)

    def _evidence(self) -> list[str]:
        found = []
        if self.copied and not self.bytes.complete:
            found.append(f"sampled rows of {len(self.pairs)} tensors are ours")
        if self.bytes.found:
            found.append(f"{len(self.bytes.found)} of {self.bytes.hashed} hashed tensors are ours to the byte")
        if self.related and not self.copied and self.distance is not None:
            found.append(f"its matrices differ from ours by {self.distance:.2%} of their size on average")
        if self.order is not None:
            found.append(f"{self.order.share:.1%} of sampled neurons are closest to ours of the same place")
        if (signature := self.signature or self.weak) is not None:
            found.append(f"{signature.share:.1%} of neurons agree by gate and by up signature")
        if self.share is not None:
            found.append(f"share of this release's own change: {self.share.value:.3f} +- {self.share.error:.3f}")
        return found

    def _changes(self, suspect: Suspect) -> tuple[str, ...]:
        if self.copied:
            return self._copied(suspect)
        if self.bytes_alone:
            return ("some tensors",)
        sizes, ours = suspect.named.sizes, self.reference.sizes
        found = []
        if sizes.layers < ours.layers:
            found.append("layers removed")
        if sizes.layers > ours.layers:
            found.append("layers added")
        if sizes.vocab > ours.vocab:
            found.append("vocabulary extended")
        if self.signature is not None:
            found += ["rotated"] * self.signature.rotated + ["permuted"] * self.signature.permuted
            found += ["quantised"] * suspect.quantised
        matrices = [pair for pair in self.pairs if pair.ours.ndim == 2]
        if matrices and self.order is not None and self.signature is None:
            found += self._row_changes(suspect, matrices)
        if not found:
            found.append("some tensors" if self.bytes.found else "every tensor a little")
        return tuple(found)

    def _copied(self, suspect: Suspect) -> tuple[str, ...]:
        entries, hits = suspect.tensors.entries, self.bytes.found
        found = []
        if any(all(hit.cast for hit in one) for one in hits.values()):
            found.append("cast")
        moved = self.order is not None and any(one != other for one, other in self.order.layers.items())
        if moved:
            found.append("layers removed")
        elif not all(any(hit.tensor == name for hit in one) for name, one in hits.items()):
            found.append("renamed")
        if len({one.file for one in entries.values()}) != len(self.reference.files):
            found.append("re-sharded")
        if len(entries) < len(self.reference.tensors) and not moved:
            found.append("tensors left out")
        return tuple(found)

    def _row_changes(self, suspect: Suspect, matrices: Sequence[Pair]) -> list[str]:
        found = []
        zeros = np.mean([(pair.suspect == 0).mean() - (pair.ours == 0).mean() for pair in matrices])
        if zeros > 0.05 and not suspect.quantised:  # whose grid has a zero
            found.append("pruned")
        noise = _noise(suspect)
        changed = [pair for pair in matrices if pair.distance > 2 * noise]
        if suspect.quantised:
            found.append("quantised")
            equal = requantised_share(suspect, self.reference, self.order.layers if self.order else {})
            if changed if equal is None else equal < 0.5:
                found.append("fine-tuned")
        elif changed and zeros <= 0.05:
            scale = float(np.median([pair.scale for pair in changed]))
            partial = self.share is not None and self.share.derived and self.share.value < MOST_MERGED
            found.append("merged" if scale < MOST_MERGED or partial else "fine-tuned")
        return found


def _noise(suspect: Suspect) -> float:
    """The relative error that the suspect's type makes by itself, by the commonest type of its matrices."""
    kinds = [
        entry.dtype for name, entry in suspect.named.entries.items() if len(entry.shape) == 2 and name != EMBEDDING
    ]
    if not kinds:
        return 0.0
    kind = max(set(kinds), key=kinds.count)
    return (_TYPE_NOISE | _QUANTISED_NOISE).get(kind, 0.0)


def _look(suspect: Suspect, reference: Reference, count: int) -> _Found:
    """Cheapest first: bytes, then the order of neurons, then the signature."""
    same = by_bytes(suspect, reference)
    tried = math.log10(count)
    try:
        order = by_order(suspect, reference)
    except FormatError:
        if same.found:
            return _Found(reference, same, None, None, SHA256_LOG10, True)
        raise
    log10_p = SHA256_LOG10 if same.found else 0.0
    if order is not None and min(0.0, order.log10_p + tried) <= LEVEL:
        found = _Found(reference, same, order, None, min(log10_p, order.log10_p + tried), True)
        found.pairs = paired_rows(suspect, reference, order.layers)
        return found
    signature = None if same.all else by_signature(suspect, reference)
    if signature is not None:
        signed = min(0.0, signature.log10_p + tried + math.log10(2))
        if signed <= LEVEL and signature.share >= LEAST_AGREEING:
            return _Found(reference, same, order, signature, min(log10_p, signed), True)
        log10_p = min(log10_p, signed if signature.share >= LEAST_AGREEING else 0.0)
    ordered = 0.0 if order is None else min(0.0, order.log10_p + tried)
    return _Found(reference, same, order, None, min(log10_p, ordered), bool(same.found), weak=signature)


def _attribute(suspect: Suspect, related: Sequence[_Found]) -> None:
    """Where a base and releases made from it are all related, the releases' shares: of each over the base nearest to
    it."""
    bases = [one for one in related if one.reference.kind == "base"]
    made: dict[int, list[_Found]] = {}
    for release in (one for one in related if one.reference.kind == "release"):
        apart = [_apart(base.reference, release.reference) for base in bases]
        if bases and min(apart) < math.inf:
            made.setdefault(apart.index(min(apart)), []).append(release)
    for at, releases in made.items():
        _shares_over(suspect, bases[at], releases)


def _apart(base: Reference, release: Reference) -> float:
    """Mean difference of two registered models' signatures; infinite where their shapes differ."""
    if base.gate.shape != release.gate.shape:
        return math.inf
    return float(np.abs(base.gate.astype(np.float32) - release.gate.astype(np.float32)).mean())


def _shares_over(suspect: Suspect, base: _Found, releases: Sequence[_Found]) -> None:
    if base.order is not None and base.signature is None:
        by_name = {id(one): {pair.name: pair for pair in one.pairs} for one in (base, *releases)}
        names = [name for name in by_name[id(base)] if all(name in by_name[id(one)] for one in releases)]
        like = [name for name in names if by_name[id(base)][name].cosine > LIKE]
        # Tensors that were put in another order or replaced say nothing of shares: they are left out if some are like.
        names = like if 3 * len(like) >= len(names) else names
        blocks = {one.reference.name: [by_name[id(one)][name].ours for name in names] for one in releases}
        found = shares(
            [by_name[id(base)][name].suspect for name in names],
            [by_name[id(base)][name].ours for name in names],
            blocks,
            _noise(suspect),
        )
        _unfolded(suspect, base, releases, found)
    elif base.signature is not None:
        found = _signature_shares(suspect, base, [one for one in releases if one.signature is not None])
    else:
        return
    for one in releases:
        one.share = found.get(one.reference.name)


def _unfolded(suspect: Suspect, base: _Found, releases: Sequence[_Found], found: dict[str, Share]) -> None:
    """Where the rows are far from all that is registered and the signatures are not, rescaled rows or folded norms hide
    the shares of the rows: the signatures' take their place."""
    if not found or min(one.rest for one in found.values()) < DISGUISED:
        return
    signed = [replace(one, signature=by_signature(suspect, one.reference)) for one in (base, *releases)]
    if signed[0].signature is None:
        return
    for name, share in _signature_shares(suspect, signed[0], [one for one in signed[1:] if one.signature]).items():
        if name in found and 2 * share.rest < found[name].rest:
            found[name] = share


def _signature_shares(suspect: Suspect, base: _Found, releases: Sequence[_Found]) -> dict[str, Share]:
    """The same over signatures, one block a neuron: for what was rotated, whose rows cannot be compared."""
    assert base.signature is not None
    theirs: list[Float32] = []
    ours: dict[str, list[Float32]] = {one.reference.name: [] for one in (base, *releases)}
    most = max(matched.agreeing for _, matched in base.signature.pairs.values())
    for layer, (number, matched) in base.signature.pairs.items():
        if 4 * matched.agreeing < most:  # not one of the base's layers: what agrees in it does so by chance
            continue
        neurons = some_neurons(base.reference.neurons, suspect.named.sizes.intermediate)
        gate, up = suspect.signatures(layer, neurons, base.reference.tokens)
        for row, column in matched.pairs:
            for mine, part in ((gate, "gate"), (up, "up")):
                turned = part == "up" and float(mine[row] @ base.reference.up[number, column]) < 0
                theirs.append(-mine[row] if turned else mine[row])
                for one in (base, *releases):
                    ours[one.reference.name].append(getattr(one.reference, part)[number, column].astype(np.float32))
    return shares(theirs, ours[base.reference.name], {one.reference.name: ours[one.reference.name] for one in releases})
