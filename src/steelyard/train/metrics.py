"""What a run measured: JSON lines for machines, event files for TensorBoard."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from steelyard.base.errors import SteelyardError
from steelyard.base.files import write_atomic
from steelyard.train.checkpoint import cause

FILE = "metrics.jsonl"


class Metrics:
    """Appends records of one run to `folder/metrics.jsonl` and `folder/tensorboard/`.

    Every method raises SteelyardError naming the file that cannot be written, why, and what to do.
    """

    def __init__(self, folder: Path, start: int) -> None:
        """`start`: updates done already; records of later steps are of a run that was cut off, and are dropped."""
        self.path = folder / FILE
        with _told(self.path):
            kept = [line for line in read_metrics(folder) if line["step"] <= start]
            write_atomic(self.path, b"".join(json.dumps(line).encode() + b"\n" for line in kept))
            self.file = self.path.open("a", encoding="utf-8")
        with _told(folder / "tensorboard"):
            self.events = EventFile(folder / "tensorboard", start)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One record: `values` after `step` updates."""
        with _told(self.path):
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            self.file.flush()
        with _told(self.events.path):
            self.events.write(step, values)

    def close(self) -> None:
        try:
            with _told(self.path):
                self.file.close()
        finally:
            with _told(self.events.path):
                self.events.close()


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # of a write to an open file it does not say which
        why, remedy = cause(error)
        raise SteelyardError(f"{path}: metrics not written: {why}: {remedy}") from error


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The whole records of a run; a last line cut off by a kill is left out."""
    path = folder / FILE
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


class EventFile:
    """TensorBoard's event file: length-framed protobuf records (tensorflow/core/util/event.proto), written directly,
    so that a run needs no TensorBoard; looking at it does.
    """

    def __init__(self, folder: Path, start: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self.path = folder / name
        self.file = self.path.open("wb")
        self._record(_time() + _bytes(3, b"brain.Event:2"))
        # session_log {status: START}: TensorBoard then hides what an earlier process wrote from this step on
        self._record(_time() + _integer(2, start + 1) + _bytes(7, _integer(1, 1)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        parts = [_bytes(1, _bytes(1, tag.encode()) + b"\x15" + struct.pack("<f", v)) for tag, v in values.items()]
        self._record(_time() + _integer(2, step) + _bytes(5, b"".join(parts)))
        self.file.flush()

    def close(self) -> None:
        self.file.close()

    def _record(self, data: bytes) -> None:
        length = struct.pack("<Q", len(data))
        self.file.write(length + _masked(length) + data + _masked(data))


def _time() -> bytes:
    return b"\x09" + struct.pack("<d", time.time())


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_CRC = _table()


def _masked(data: bytes) -> bytes:
    """CRC-32C (Castagnoli), rotated and offset as TFRecord wants it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
