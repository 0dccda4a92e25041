"""Copies that can only be compared by digests: PyTorch checkpoints, which are never unpickled, and what is not here at
all: a Hub repository's listing, a torrent. Equal digests prove a copy; other digests prove nothing, so the answer is
then "unreadable" and says what to fetch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from steelyard.base.errors import FormatError
from steelyard.trace.archives import storages
from steelyard.trace.lineage import (
    DERIVED,
    EXACT,
    SAME,
    SHA256_LOG10,
    UNREADABLE,
    Answer,
    Relation,
    nearest,
    not_the_bases,
)
from steelyard.trace.listings import TorrentFile, matching_pieces, merkle_root, read_listing, read_torrent
from steelyard.trace.registry import Reference

TORRENT_BUDGET = 1 << 30  # bytes of ours that are hashed for a torrent's pieces
SHA1_LOG10 = -48.0  # two different pieces have one SHA-1 with probability 2^-160


def by_archive(path: Path, references: Sequence[Reference]) -> Answer:
    """A PyTorch checkpoint by its raw storages. Raises FormatError where it is no zip of them."""
    found = list(storages(path))
    read = sum(size for _, size, _ in found)
    relations = []
    for reference in references:
        hits = {member: match for member, _, digest in found if (match := reference.table.find(digest))}
        if not hits:
            continue
        evidence = (f"{len(hits)} of {len(found)} storages are our tensors to the byte",)
        cast = ("cast",) if all(one.cast for match in hits.values() for one in match) else ()
        ours, met = (
            {one.name for one in reference.tensors if one.digests},
            {o.tensor for one in hits.values() for o in one},
        )
        # Tensors of few values have no digest: whoever has all the others has a copy.
        whole = len(hits) == len(found) or (met >= ours and len(found) <= len(reference.tensors))
        changes = ("a PyTorch checkpoint", *cast) if whole else ("some tensors",)
        verdict, distance = (SAME, 0.0) if whole else (DERIVED, None)
        digests = tuple((member, digest) for member, _, digest in found if member in hits)
        relation = Relation(reference.name, reference.kind, verdict, changes, SHA256_LOG10, distance)
        relations.append(replace(relation, evidence=evidence, digests=digests))
    return _answer(
        path,
        relations,
        f"{path}: none of its {len(found)} storages is ours to the byte, and more cannot be seen without unpickling: "
        "convert it to safetensors in a sandbox and trace that",
        read,
    )


def by_listing(path: Path, references: Sequence[Reference]) -> Answer:
    """A Hub listing by the SHA-256 of its large files. Raises FormatError where the file is no listing."""
    listed = {one.sha256 for one in read_listing(path) if one.sha256 is not None}
    relations = []
    for reference in references:
        same = [one for one in reference.files if one.sha256 in listed]
        if same:
            evidence = (f"{len(same)} of our {len(reference.files)} weight files are listed with our SHA-256",)
            verdict = EXACT if len(same) == len(reference.files) else SAME
            changes = () if verdict == EXACT else ("some files",)
            digests = tuple((one.name, one.sha256) for one in same)
            relation = Relation(reference.name, reference.kind, verdict, changes, SHA256_LOG10, 0.0)
            relations.append(replace(relation, evidence=evidence, digests=digests))
    why = f"{path}: none of its {len(listed)} digests is one of our files: a changed copy shows only in its weights"
    why = f"{why}: download a weight file and trace that"
    if not listed:
        why = f"{path}: holds no digests to compare: save the listing again, with ?blobs=true after its address"
    return _answer(path, relations, why, path.stat().st_size)


def by_torrent(path: Path, references: Sequence[Reference]) -> Answer:
    """A torrent by its pieces, against our files of the same length. Raises FormatError for a broken torrent."""
    torrent = read_torrent(path)
    relations, absent, budget = [], [], TORRENT_BUDGET
    of_length: dict[int, list[TorrentFile]] = {}
    for one in torrent.files:
        if one.root is not None or torrent.pieces:
            of_length.setdefault(one.length, []).append(one)
    # Each attempt has the same share, so that a model of our shapes that comes first does not use up all of it.
    attempts = sum(len(of_length.get(ours.size, ())) for reference in references for ours in reference.files)
    for reference in references:
        evidence, whole, part = [], 0, False
        for ours in reference.files:
            file = reference.folder / ours.name
            candidates = of_length.get(ours.size, [])
            if candidates and not file.is_file():
                absent.append(str(file))
                continue
            root = merkle_root(file) if any(one.root is not None for one in candidates) else None
            for one in candidates:
                if one.root is not None:
                    equal = compared = int(one.root == root)
                    said = f"{one.path}: the root of its SHA-256 tree is that of our {ours.name}"
                elif budget > 0:
                    equal, compared = matching_pieces(torrent, one, file, min(budget, TORRENT_BUDGET // attempts))
                    # An attempt without a whole piece costs one too: a torrent may list any number of such files.
                    budget -= max(compared, 1) * torrent.piece_length
                    said = f"{one.path}: {equal} of {compared} pieces are those of our {ours.name}"
                else:
                    break
                if equal:
                    evidence.append(said)
                    whole += equal == compared
                    part |= equal < compared
                    break
        if evidence:
            verdict = DERIVED if part else EXACT if whole == len(reference.files) else SAME
            changes = ("some pieces",) if part else ()
            relation = Relation(reference.name, reference.kind, verdict, changes, SHA1_LOG10, None if part else 0.0)
            relations.append(replace(relation, evidence=tuple(evidence)))
    why = f"{path}: no piece of it is of our files: a changed copy shows only in its weights: download and trace them"
    if budget <= 0:
        most = f"at most {TORRENT_BUDGET:,} bytes of pieces are"
        why = f"{path}: no piece that was compared ({most}) is of our files: download and trace them"
    if absent and not relations:
        why = f"{path}: our own {absent[0]} is no longer there, so its pieces cannot be hashed: put it back"
    return _answer(path, relations, why, path.stat().st_size)


def _answer(path: Path, relations: Sequence[Relation], reason: str, read: int) -> Answer:
    relations = relations if all(not one.digests for one in relations) else not_the_bases(relations)
    best = nearest(relations)
    if best is None:
        return Answer(str(path), UNREADABLE, None, reason=reason, bytes_read=read)
    return Answer(str(path), best.verdict, best, relations, bytes_read=read)


def is_elsewhere(path: Path) -> bool:
    """Whether `trace_elsewhere` is for this file."""
    from steelyard.trace.archives import SUFFIXES

    return path.suffix.lower() in (*SUFFIXES, ".torrent", ".json")


def trace_elsewhere(path: Path, references: Sequence[Reference]) -> Answer:
    """The answer for a checkpoint, a listing or a torrent, by the file's suffix; never raises for what it holds."""
    kinds = {".torrent": by_torrent, ".json": by_listing}
    try:
        return kinds.get(path.suffix.lower(), by_archive)(path, references)
    except FormatError as error:
        return Answer(str(path), UNREADABLE, None, reason=str(error))
    except OSError as error:
        return Answer(str(path), UNREADABLE, None, reason=f"{path}: cannot be read: {error.strerror}")
