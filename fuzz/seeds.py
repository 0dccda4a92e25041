"""Small files that every target accepts, made by the code that makes real ones: `python fuzz/seeds.py FOLDER`.

A tiny model, its test, its release in several hands: FOLDER/TARGET/NAME. Made anew each time, so that they are always
of the formats that this tree writes.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from hashlib import sha1
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "release"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "model"))

import gguf_files
import numpy as np
import yaml
from authority import root as new_root
from authority import signer, write_chain
from cryptography.hazmat.primitives.serialization import Encoding
from safetensors.numpy import save
from scenario import Chain, battery_dict, make_model, policy_dict
from targets.withdrawal_list import SIGNER
from tsa import Authority

from steelyard.release.attest import read_envelope
from steelyard.release.layout import MANIFEST, MODEL_SIGNATURE, SIGNING
from steelyard.release.oms import sign_model
from steelyard.release.withdrawal import Entry, WithdrawalList, list_bytes
from steelyard.safety.battery import Battery
from steelyard.safety.pause import Commitment
from steelyard.safety.report import JOURNAL, PREDECESSOR

ROOT = Path(__file__).resolve().parents[1]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALTERNATING = (
    "{%- set ns = namespace(n=0) -%}{{ bos_token }}{%- for m in messages -%}{%- set ns.n = ns.n + 1 -%}"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('must alternate') }}{%- endif -%}"
    "{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else m.content | tojson }}"
    "{% generation %}x{% endgeneration %}{%- endfor -%}{% macro f(a, b=1) %}{{ a ~ b }}{% endmacro %}{{ f(ns.n) }}"
)
CARD = "---\nlicense: {}\nlanguage:\n- en\ntags: [a, b]\n{}---\n\n# A model\n\nText.\n"
ZERO = "0" * 64


def battery(per_axis: int) -> dict[str, object]:
    """The scenario's battery, with few probes on each axis."""
    raw = battery_dict(samples=1)
    for part in raw["sets"]:
        axes = dict.fromkeys(probe["axis"] for probe in part["probes"])
        part["probes"] = [
            probe for axis in axes for probe in [one for one in part["probes"] if one["axis"] == axis][:per_axis]
        ]
    return raw


def release(chain: Chain) -> Path:
    """A bundle with every kind of statement."""
    chain.people()
    candidate = chain.candidate()
    for name in ("bob", "carol"):
        chain.approve(candidate, name)
    return chain.seal(candidate)


def seeds(scratch: Path) -> Iterator[tuple[str, str, bytes]]:
    """(target, name, content)."""
    yield from headers(scratch)
    yield from texts()
    yield from stamps(scratch)
    yield from copies()
    chain = Chain.build(scratch / "whole")
    bundle = release(chain)
    yield "manifest", "bundle.json", (bundle / MANIFEST).read_bytes()
    for path in sorted((bundle / "steelyard").glob("*.dsse.json")):
        yield "envelope", path.name, path.read_bytes()
        yield "statement", path.name, read_envelope(path.read_bytes(), path.name)[0]
    yield "model_signature", "key.sig", (bundle / MODEL_SIGNATURE).read_bytes()
    private, public = signer()
    root = new_root()
    between = root.issuer("between")
    certificate = between.certify(public)
    chained = write_chain(scratch / "chain.pem", [certificate, between.certificate])
    (bundle / MODEL_SIGNATURE).unlink()
    sign_model(bundle, bundle / MODEL_SIGNATURE, private, SIGNING, certificates=chained)
    yield "model_signature", "certificate.sig", (bundle / MODEL_SIGNATURE).read_bytes()
    for name, one in (("root", root.certificate), ("alice", certificate)):
        yield "timestamp", f"{name}.der", b"C" + one.public_bytes(Encoding.DER)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        yield "json_settings", name, (bundle / name).read_bytes()
    small = Chain.build(scratch / "small", battery=Battery.model_validate(battery(2) | {"batch_size": 4}))
    yield "journal", "small.jsonl", (small.run / "journal.jsonl").read_bytes()
    small.test(run=scratch / "beside", predecessor=make_model(scratch / "before", seed=1))
    for name in (JOURNAL, PREDECESSOR):
        yield "journal", f"paired-{Path(name).name}", (scratch / "beside" / name).read_bytes()


def headers(scratch: Path) -> Iterator[tuple[str, str, bytes]]:
    """Model files."""
    tensors = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros((0, 3), np.float16)}
    tensors["c"] = np.arange(5, dtype=np.uint8)
    yield "safetensors_header", "three.safetensors", save(tensors, {"format": "pt", "made by": "seeds"})
    yield "safetensors_header", "one.safetensors", save({"x": np.ones((2, 2), np.int64)})
    shape = {"vocab_size": 300, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    config = gguf_files.CONFIG | shape
    sampling = {"general.sampling.temp": 0.5, "general.sampling.top_k": 40}
    bytewise = gguf_files.byte_level_metadata(size=300, add_bos_token=True, chat_template=CHATML)
    path = gguf_files.write_gguf(scratch / "b.gguf", config=config, tokenizer=bytewise, extra=sampling)
    yield "gguf_header", "byte-level.gguf", path.read_bytes()
    merged = ("he", "th", "the", "▁the", "in", "an", "and", "▁and")
    letters = sorted({letter for piece in merged for letter in piece})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *merged, *letters]
    pieces = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(tokens) - 259)],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    config |= {"vocab_size": len(tokens)}
    path = gguf_files.write_gguf(scratch / "s.gguf", config=config, tokenizer=pieces)
    yield "gguf_header", "sentencepiece.gguf", path.read_bytes()


def texts() -> Iterator[tuple[str, str, bytes]]:
    """What people write."""
    policies = ROOT / "src" / "steelyard" / "safety" / "policies"
    for name in ("preview", "public"):
        yield "policy", f"{name}.yaml", b"P" + (policies / f"{name}.yaml").read_bytes()
    yield "policy", "lenient.yaml", b"P" + yaml.safe_dump(policy_dict()).encode()
    yield "policy", "battery.yaml", b"B" + yaml.safe_dump(battery(1)).encode()
    yield (
        "policy",
        "trust.yaml",
        b"T"
        + b"\n".join(
            (
                b"format: 1",
                b"policy: preview",
                b"evaluators: [one.pub.pem]",
                b'approvers: [two.pub.pem, {key: three.pub.pem, until: "2030-01-01T00:00:00Z"}]',
                b"approvals: 2",
                b"releasers: [four.pub.pem]",
                b"withdrawal: {signers: [one.pub.pem, two.pub.pem], quorum: 2}",
            )
        ),
    )
    for name, template in (("chatml", CHATML), ("alternating", ALTERNATING)):
        yield "chat_template", f"{name}.jinja", template.encode()
    yield "model_card", "apache.md", CARD.format("apache-2.0", "").encode()
    yield "model_card", "other.md", CARD.format("other", "license_name: mine\nlicense_link: LICENSE\n").encode()


def stamps(scratch: Path) -> Iterator[tuple[str, str, bytes]]:
    """A commitment and a time-stamp."""
    named = {"toxicity": ZERO}
    commitment = Commitment(
        run="r",
        subject=ZERO,
        battery=ZERO,
        policies=named,
        scorers=named,
        code=ZERO,
        predecessor=None,
        attempt=1,
        head=f"1:{ZERO}",
        time="2026-01-01T00:00:00+00:00",
        nonce=ZERO,
    )
    yield "commitment", "commitment.json", commitment.as_bytes
    entry = Entry(manifest="a" * 64, weights="b" * 64, name="tiny", time="2026-01-01T00:00:00+00:00", reason="leaks")
    times = {"issued": "2026-01-02T00:00:00+00:00", "expires": "2026-03-01T00:00:00+00:00"}
    first = WithdrawalList(format=1, name="example", sequence=1, previous=None, entries=(), **times)
    second = first.model_copy(update={"sequence": 2, "previous": ZERO, "entries": (entry,)})
    for name, content in (("empty", first), ("one", second)):
        yield "withdrawal_list", f"{name}.json", list_bytes(content, [SIGNER])
    yield "timestamp", "granted.tsr", b"T" + Authority.new().stamp(b"a commitment", nonce=7)


def copies() -> Iterator[tuple[str, str, bytes]]:
    """What a copy in the wild may look like: a PyTorch checkpoint, torrents of both versions, a Hub listing."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("model/data.pkl", b"never opened")
        archive.writestr("model/data/0", bytes(range(64)))
        archive.writestr("model/data/1", bytes(16))
        archive.writestr("model/version", b"3\n")
    yield "torch_archive", "pytorch_model.bin", made.getvalue()
    ours = bytes(range(256)) * 150
    pieces = b"".join(sha1(ours[at : at + 16384], usedforsecurity=False).digest() for at in range(0, len(ours), 16384))
    one: dict[bytes, Any] = {b"length": len(ours), b"name": b"ours", b"piece length": 16384, b"pieces": pieces}
    yield "torrent", "one.torrent", bencode({b"announce": b"http://example.org", b"info": one})
    listed = [{b"length": 38000, b"path": [b"a", b"ours"]}, {b"length": 400, b"path": [b"b"]}]
    many = {b"files": listed, b"name": b"folder", b"piece length": 16384, b"pieces": pieces}
    yield "torrent", "many.torrent", bencode({b"info": many})
    tree = {b"a": {b"ours": {b"": {b"length": len(ours), b"pieces root": bytes(32)}}}}
    second = {b"file tree": tree, b"meta version": 2, b"name": b"folder", b"piece length": 16384}
    yield "torrent", "second.torrent", bencode({b"info": second})
    files = [
        {"rfilename": "config.json", "size": 600},
        {"rfilename": "model.safetensors", "size": 99, "lfs": {"sha256": "a" * 64, "size": 99, "pointerSize": 134}},
    ]
    yield "hub_listing", "model.json", json.dumps({"id": "a/b", "siblings": files}).encode()
    shown = [{"type": "directory", "path": "onnx"}, {"type": "file", "path": "w", "lfs": {"oid": "b" * 64, "size": 1}}]
    yield "hub_listing", "tree.json", json.dumps(shown).encode()


def bencode(value: Any) -> bytes:
    """BEP 3's encoding of integers, byte strings, lists and dictionaries."""
    match value:
        case int():
            return b"i%de" % value
        case bytes():
            return b"%d:%s" % (len(value), value)
        case list():
            return b"l" + b"".join(map(bencode, value)) + b"e"
        case _:
            return b"d" + b"".join(bencode(key) + bencode(value[key]) for key in sorted(value)) + b"e"


def write(folder: Path) -> None:
    """Every seed below `folder`."""
    with tempfile.TemporaryDirectory(prefix="steelyard-seeds-") as scratch:
        for target, name, data in seeds(Path(scratch)):
            (folder / target).mkdir(parents=True, exist_ok=True)
            (folder / target / name).write_bytes(data)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
