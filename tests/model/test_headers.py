"""Headers that lie are refused, by name, before memory is asked for."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hostile import array, gguf_bytes, number, pair, put, safetensors_bytes, string, tensor, text
from safetensors.numpy import save_file

from steelyard.base.errors import FormatError
from steelyard.model.headers import (
    MAX_GGUF_HEADER,
    MAX_SAFETENSORS_HEADER,
    MAX_TENSORS,
    GGUFArray,
    read_json_object,
    refuse_unsafe_files,
    scan_gguf,
    scan_safetensors,
)


def entry(start: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


def test_safetensors_of_the_library_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(
        {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones(3, np.float16)},
        path,
        metadata={"format": "pt"},
    )
    found = scan_safetensors(path)
    assert (found["b"].dtype, found["b"].shape) == ("F32", (2, 3))
    assert found["a"].dtype == "F16"
    raw = path.read_bytes()
    assert raw[found["b"].start : found["b"].end] == np.arange(6, dtype="<f4").tobytes()


GOOD = {"a": entry(0, 8)}
BIG_INTEGER = '{"a":{"dtype":"F32","shape":[' + "9" * 5000 + '],"data_offsets":[0,8]}}'
SAFETENSORS = {
    "empty file": (b"", "cut short"),
    "seven bytes": (b"\0" * 7, "cut short"),
    "header past the end": (safetensors_bytes(GOOD, bytes(8), length=10_000), "claims a header"),
    "header of exabytes": (safetensors_bytes(GOOD, bytes(8), length=(1 << 64) - 1), "claims a header"),
    "no JSON": (safetensors_bytes(b"{" + b"\xff" * 20), "UTF-8 JSON"),
    "an array": (safetensors_bytes("[]"), "no safetensors file"),
    "YAML": (b"release:\n  name: ours\n", "no safetensors file"),
    "JSON with a brace for the ninth byte": (b'{"text":{"a": 1}}', "no safetensors file"),
    "GGUF": (b"GGUF\x03\0\0\0\0\0\0\0", "is a GGUF file"),
    "no header where one byte is left": (b"\0" * 8 + b"{", "UTF-8 JSON"),
    "bad UTF-8 in a name": (safetensors_bytes(b'{"\xc3\x28":{}}'), "UTF-8 JSON"),
    "a lone surrogate": (
        safetensors_bytes(b'{"\\ud800":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}', bytes(4)),
        "printable",
    ),
    "a line feed in a name": (safetensors_bytes({"a\nb": entry(0, 4)}, bytes(4)), "printable"),
    "NaN": (safetensors_bytes(b'{"a":NaN}'), "UTF-8 JSON"),
    "deep lists": (safetensors_bytes(b'{"a":' + b"[" * 30_000), "too deeply"),
    "deep objects": (safetensors_bytes(b'{"a":' * 15_000), "too deeply"),
    "an integer of 5,000 digits": (safetensors_bytes(BIG_INTEGER), "UTF-8 JSON"),
    "missing field": (safetensors_bytes({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "exactly dtype"),
    "extra field": (safetensors_bytes({"a": entry(0, 8) | {"x": 1}}, bytes(8)), "exactly dtype"),
    "a field twice": (
        safetensors_bytes('{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
        "exactly dtype",
    ),
    "entry is a number": (safetensors_bytes({"a": 5}), "exactly dtype"),
    "unknown dtype": (safetensors_bytes({"a": entry(0, 8, [2], "F33")}, bytes(8)), "unknown dtype 'F33'"),
    "dtype is a list": (safetensors_bytes({"a": entry(0, 8) | {"dtype": ["F32"]}}, bytes(8)), "unknown dtype"),
    "negative size": (safetensors_bytes({"a": entry(0, 8, [-2])}, bytes(8)), "impossible shape"),
    "size is true": (safetensors_bytes({"a": entry(0, 4, [True])}, bytes(4)), "impossible shape"),
    "size is a float": (safetensors_bytes({"a": entry(0, 8, [2.0])}, bytes(8)), "impossible shape"),  # type: ignore[list-item]
    "nine dimensions": (safetensors_bytes({"a": entry(0, 4, [1] * 9)}, bytes(4)), "impossible shape"),
    "terabytes": (safetensors_bytes({"a": entry(0, 1 << 42)}, bytes(8)), "more than it has"),
    "shape and range differ": (safetensors_bytes({"a": entry(0, 8, [3])}, bytes(8)), "do not fit"),
    "range backwards": (safetensors_bytes({"a": entry(8, 0, [2])}, bytes(8)), "do not fit"),
    "data cut short": (safetensors_bytes(GOOD, bytes(7)), "1 bytes more than it has"),
    "data too long": (safetensors_bytes(GOOD, bytes(9)), "1 bytes no tensor owns"),
    "a hole": (safetensors_bytes({"a": entry(0, 8), "b": entry(12, 16)}, bytes(16)), "'b' leaves a hole"),
    "a hole at the start": (safetensors_bytes({"a": entry(4, 12)}, bytes(12)), "'a' leaves a hole"),
    "an overlap": (safetensors_bytes({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "'b' overlaps"),
    "one range twice": (safetensors_bytes({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)), "overlaps"),
    "a name twice": (
        safetensors_bytes(f'{{"a":{json.dumps(entry(0, 4))},"a":{json.dumps(entry(4, 8))}}}', bytes(8)),
        "'a' twice",
    ),
    "metadata of numbers": (safetensors_bytes({"__metadata__": {"format": 1}}), "__metadata__"),
    "metadata twice": (safetensors_bytes('{"__metadata__":{},"__metadata__":{}}'), "__metadata__"),
    "a million entries": (
        safetensors_bytes("{" + ",".join(f'"{i}":{{}}' for i in range(600_000)) + "}"),
        "claims more",
    ),
    "a million strings": (
        safetensors_bytes('{"__metadata__":{' + ",".join(f'"{i}":""' for i in range(500_000)) + "}}"),
        "claims more",
    ),
    "a header over the limit": (safetensors_bytes(b"{" + b" " * MAX_SAFETENSORS_HEADER), "over the limit"),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_lying_safetensors_is_refused(case: str, tmp_path: Path) -> None:
    data, reason = SAFETENSORS[case]
    path = put(tmp_path / "model.safetensors", data)
    with pytest.raises(FormatError, match=reason) as refusal:
        scan_safetensors(path)
    assert str(refusal.value).startswith(str(path))
    assert "\n" not in str(refusal.value)


def test_every_truncation_of_safetensors_is_refused(tmp_path: Path) -> None:
    whole = safetensors_bytes({"a": entry(0, 8), "b": entry(8, 20)}, bytes(20))
    for length in range(len(whole)):
        with pytest.raises(FormatError):
            scan_safetensors(put(tmp_path / "m.safetensors", whole[:length]))


TOKENS = "tokenizer.ggml.tokens"


def test_gguf_is_read(tmp_path: Path) -> None:
    pairs = [
        string("general.architecture", "llama"),
        number("n", 7),
        pair("flag", 7, b"\1"),
        array(TOKENS, 8, 2, text("é") + text("")),
        array("scores", 6, 2, struct.pack("<2f", 0.5, -1)),
    ]
    tensors = [tensor("x", (32, 2), 8), tensor("y", (3,), 0, 96)]
    data = bytes(68) + bytes(28) + struct.pack("<3f", 1, 2, 3)
    header = scan_gguf(put(tmp_path / "m.gguf", gguf_bytes(pairs, tensors, data)))
    assert header.metadata["n"] == 7
    assert header.metadata["flag"] is True
    assert isinstance(header.metadata[TOKENS], GGUFArray)
    assert header.strings(TOKENS) == ["é", ""]
    assert header.numbers("scores").tolist() == [0.5, -1.0]
    assert (header.tensors["x"].kind, header.tensors["x"].shape) == ("Q8_0", (2, 32))
    assert header.tensors["y"].end - header.tensors["y"].start == 12
    for key in ("n", "absent", "scores"):
        with pytest.raises(FormatError, match="array"):
            header.strings(key)


def test_gguf_written_by_the_gguf_package_is_read(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("w", np.arange(5, dtype=np.float32))
    writer.add_tensor("v", np.arange(6, dtype=np.float16).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = scan_gguf(path)
    assert header.alignment == 64
    assert header.strings(TOKENS) == ["a", "b"]
    raw = path.read_bytes()
    for reference in gguf.GGUFReader(path).tensors:
        found = header.tensors[reference.name]
        assert raw[found.start : found.end] == reference.data.tobytes()


ONE = [tensor("a", (8,))]
GGUF = {
    "empty file": (b"", "not a GGUF file"),
    "other magic": (gguf_bytes(magic=b"GGUX"), "not a GGUF file .*GGUX"),
    "a zip": (b"PK\3\4" + bytes(60), "not a GGUF file"),
    "GGML": (gguf_bytes(magic=b"tjgg"), "before GGUF"),
    "version 1": (gguf_bytes(version=1), "version 1"),
    "version 4": (gguf_bytes(version=4), "version 4"),
    "big-endian": (gguf_bytes(order=">"), "big-endian"),
    "no counts": (b"GGUF\3\0\0\0", "cut short"),
    "2^64 tensors": (gguf_bytes(counts=((1 << 64) - 1, 0)), "claims .* tensors"),
    "a million tensors": (gguf_bytes(counts=(1_000_000, 0)), "claims 1,000,000 tensors"),
    "a million keys": (gguf_bytes(counts=(0, 1_000_000)), "claims 1,000,000 keys"),
    "a key more than there is": (gguf_bytes([number("a", 1)], counts=(0, 2)), "cut short|lies|printable|unknown type"),
    "a tensor more than there is": (gguf_bytes([], ONE, bytes(32), counts=(2, 0)), "name|cut short|lies"),
    "key of 4 GB": (gguf_bytes([struct.pack("<Q", 1 << 32)]), "claims 4,294,967,296 bytes"),
    "string past the end": (gguf_bytes([pair("a", 8, struct.pack("<Q", 900_000))]), "cut short or lies"),
    "string of exabytes": (gguf_bytes([pair("a", 8, struct.pack("<Q", (1 << 64) - 1))]), "claims"),
    "bad UTF-8 in a key": (gguf_bytes([pair(b"\xff\xfe", 4, bytes(4))]), "not UTF-8"),
    "bad UTF-8 in a value": (gguf_bytes([string("a", b"\xff\xfe")]), "not UTF-8"),
    "line feed in a key": (gguf_bytes([number("a\nb", 1)]), "printable"),
    "key twice": (gguf_bytes([number("a", 1), number("a", 2)]), "'a' twice"),
    "unknown value type": (gguf_bytes([pair("a", 99, bytes(4))]), "unknown type 99"),
    "unknown element type": (gguf_bytes([array("a", 99, 1, bytes(8))]), "unknown type 99"),
    "bool of 2": (gguf_bytes([pair("a", 7, b"\2")]), "bool of value 2"),
    "nested arrays": (gguf_bytes([array("a", 9, 1, struct.pack("<IQ", 9, 1) * 1000)]), "array of arrays"),
    "array longer than the file": (gguf_bytes([array("a", 4, 1000, bytes(8))]), "lies about a length"),
    "array of 2^63": (gguf_bytes([array("a", 12, 1 << 63, bytes(8))]), "lies about a length"),
    "strings longer than the file": (gguf_bytes([array("a", 8, 1 << 40, text("x"))]), "lies about a length"),
    "string element past the end": (
        gguf_bytes([array("a", 8, 2, text("x") + struct.pack("<Q", 1 << 50))]),
        "lies about a length",
    ),
    "much text": (gguf_bytes([string(f"k{i}", "a" * 900_000) for i in range(5)]), "over 4,194,304 bytes of names"),
    "two million strings": (gguf_bytes([array("a", 8, 2_000_000, bytes(16_000_000))]), "claims more than 1,000,000"),
    "a header over the limit": (
        gguf_bytes([array("a", 0, MAX_GGUF_HEADER, bytes(MAX_GGUF_HEADER))]),
        "header over the limit",
    ),
    "alignment 0": (gguf_bytes([number("general.alignment", 0)], ONE, bytes(32)), "power of two"),
    "alignment 24": (gguf_bytes([number("general.alignment", 24)], ONE, bytes(32)), "power of two"),
    "alignment 2^31": (gguf_bytes([number("general.alignment", 1 << 31)], ONE, bytes(32)), "power of two"),
    "alignment is text": (gguf_bytes([string("general.alignment", "32")], ONE, bytes(32)), "power of two"),
    "tensor twice": (gguf_bytes([], [*ONE, tensor("a", (8,), 0, 32)], bytes(64)), "'a' twice"),
    "tensor without name": (gguf_bytes([], [tensor("", (8,))], bytes(32)), "empty"),
    "bad UTF-8 in a tensor name": (gguf_bytes([], [tensor(b"\xff", (8,))], bytes(32)), "not UTF-8"),
    "no dimensions": (gguf_bytes([], [tensor("a", ())], bytes(32)), "0 dimensions"),
    "five dimensions": (gguf_bytes([], [tensor("a", (1,) * 5)], bytes(32)), "5 dimensions"),
    "a dimension of 0": (gguf_bytes([], [tensor("a", (0,))], bytes(32)), "impossible size"),
    "overflowing dimensions": (gguf_bytes([], [tensor("a", ((1 << 63), 4, 4))], bytes(32)), "impossible size"),
    "terabytes": (gguf_bytes([], [tensor("a", (1 << 40,))], bytes(32)), "past the end"),
    "unknown ggml type": (gguf_bytes([], [tensor("a", (8,), 4242)], bytes(32)), "ggml type 4242"),
    "IQ type": (gguf_bytes([], [tensor("a", (256,), 16)], bytes(66)), "ggml type 16"),
    "row of a part of a block": (gguf_bytes([], [tensor("a", (33,), 8)], bytes(64)), "not a multiple of 32"),
    "offset overlaps": (gguf_bytes([], [*ONE, tensor("b", (8,), 0, 0)], bytes(64)), "'b' is at offset 0"),
    "offset leaves a hole": (gguf_bytes([], [*ONE, tensor("b", (8,), 0, 64)], bytes(96)), "'b' is at offset 64"),
    "offset of exabytes": (gguf_bytes([], [tensor("a", (8,), 0, 1 << 62)], bytes(32)), "impossible size"),
    "data cut short": (gguf_bytes([], ONE, bytes(31)), "1 bytes past the end"),
    "data too long": (gguf_bytes([], ONE, bytes(65)), "33 bytes after"),
}


@pytest.mark.parametrize("case", GGUF)
def test_lying_gguf_is_refused(case: str, tmp_path: Path) -> None:
    data, reason = GGUF[case]
    path = put(tmp_path / "m.gguf", data)
    with pytest.raises(FormatError, match=reason) as refusal:
        scan_gguf(path)
    assert str(refusal.value).startswith(str(path))
    assert "\n" not in str(refusal.value)


def test_every_truncation_of_gguf_is_refused(tmp_path: Path) -> None:
    pairs = [string("s", "xyz"), array("t", 8, 2, text("ab") + text("c")), array("n", 4, 2, bytes(8)), number("k", 5)]
    whole = gguf_bytes(pairs, [tensor("a", (8,)), tensor("b", (8,), 0, 32)], bytes(64))
    scan_gguf(put(tmp_path / "m.gguf", whole))
    for length in range(len(whole)):
        with pytest.raises(FormatError):
            scan_gguf(put(tmp_path / "m.gguf", whole[:length]))


def _names(count: int) -> str:
    entries = (
        f'"model.layers.{i}.self_attn.q.weight":{{"dtype":"F32","shape":[1,1],"data_offsets":[{4 * i},{4 * i + 4}]}}'
        for i in range(count)
    )
    return "{" + ",".join(entries) + "}"


# The dearest files within the limits, and the dearest outside.
DEAREST = {
    "a.safetensors": lambda: safetensors_bytes(_names(MAX_TENSORS - 1), bytes(7)),
    "b.safetensors": lambda: safetensors_bytes("{" + ",".join(f'"{i}":{{}}' for i in range(600_000)) + "}"),
    "c.safetensors": lambda: safetensors_bytes('{"__metadata__":{"a":"' + "😀" * 1_900_000 + '"},"b":0}'),
    "d.gguf": lambda: gguf_bytes([array(TOKENS, 8, 1_000_000, text("abcdefgh") * 1_000_000), number("k", 0)] * 2),
    "e.gguf": lambda: gguf_bytes([string(f"k{i}", "x" * 3000) for i in range(10_000)], [tensor("a", (1 << 40,))]),
    "f.gguf": lambda: gguf_bytes([], [tensor(f"blk.{i}.q", (8,), 0, 32 * i) for i in range(MAX_TENSORS)], bytes(8)),
    "g.gguf": lambda: gguf_bytes([array(f"k{i}", 0, 3000, bytes(3000)) for i in range(10_000)], counts=(1, 10_000)),
}
MEASURE = """
import sys, time
from pathlib import Path
from steelyard.base.errors import FormatError
from steelyard.model.headers import scan_gguf, scan_safetensors
path = Path(sys.argv[1])
start = time.process_time()
try:
    (scan_gguf if path.suffix == ".gguf" else scan_safetensors)(path)
    sys.exit("was not refused")
except FormatError:
    spent = time.process_time() - start
print(spent, next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory of one process is read from /proc")
@pytest.mark.parametrize("name", DEAREST)
def test_refusing_is_cheap(name: str, tmp_path: Path) -> None:
    """The whole process, interpreter and numpy included, stays under 100 MB; the scan, under a second of CPU time."""
    path = put(tmp_path / name, DEAREST[name]())
    # A child's getrusage begins at its parent's size, VmHWM does not.
    done = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
    seconds, kilobytes = done.stdout.split()
    assert int(kilobytes) < 100_000
    assert float(seconds) < 1.0  # of this process alone, measured 0.02 to 0.4


def test_headers_need_no_torch() -> None:
    code = "import sys, steelyard.model.identity; print({'torch', 'tokenizers', 'gguf'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin", "model.pt", "a.PTH", "x.ckpt", "x.pkl", "tf_model.h5", "flax.msgpack", "modeling.py",
        "adapter_config.json", "adapter_model.safetensors", "second.safetensors", "model.gguf", "a.npz",
        "deep/er/pytorch_model.bin", "deep/modeling.py", "deep/model.safetensors", "model-00001-of-00002.safetensors",
    ],
)  # fmt: skip
def test_unsafe_files_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    refuse_unsafe_files(tmp_path)
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"{}")
    with pytest.raises(FormatError, match=Path(name).name.replace(".", r"\.")):
        refuse_unsafe_files(tmp_path)


def test_symbolic_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").symlink_to(tmp_path / "config.json")
    with pytest.raises(FormatError, match=r"README\.md: is a symbolic link"):
        refuse_unsafe_files(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_auto_map_is_refused_at_any_depth(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps({"a": [{"b": {"auto_map": {"AutoModel": "x.Y"}}}]}))
    with pytest.raises(FormatError, match="auto_map: names code"):
        refuse_unsafe_files(tmp_path)


def test_two_sets_of_shards_are_refused(tmp_path: Path) -> None:
    for name in (
        "model-00001-of-00001.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
    ):
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(FormatError, match="two sets"):
        refuse_unsafe_files(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[1]", "JSON object"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": "\xff"}', "not JSON"),
        (b'{"a":' * 50_000, "nested deeper than 32"),
        (b"{" + b" " * (9 << 20), "is over"),
        (b'{"a": 1e999}', "too large a number"),
        (b'{"a": "\\ud800"}', "not JSON"),
        (b'{"a":[' + b"[]," * 1_000_000 + b"[]]}", "more entries"),
        (b"", "not JSON"),
    ],
)
def test_settings_files_are_strict(content: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=reason):
        read_json_object(put(tmp_path / "config.json", content))
