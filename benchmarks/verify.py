"""How fast does `verify` hash? A release of the size of SmolLM2 is verified: `make bench-verify`.

The release is made here: a LLaMA of 135M random parameters, tested with the tests' small battery, released with a key.
Hashing is timed inside `verify`: from when it begins to read files until file digests and weights root are known.
Beside it, in turns and from a cold page cache: `sha256sum` over the same files, and reading them. The bar [hash_rate]
is 80% of the slower of the two; what `verify` does besides hashing must stay under 5 s. The best of several rounds
counts, for what else the machine does only ever slows.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "release"))

from harness import Row, report
from scenario import PASSPHRASE, Chain, make_battery, make_model, make_policy

from steelyard.model.formats import save_folder
from steelyard.model.headers import read_json_object
from steelyard.release import verify as verifying
from steelyard.release.keys import new_key

SIZES = {"hidden_size": 768, "intermediate_size": 1536, "num_hidden_layers": 10, "vocab_size": 49152}
HASHING = ("subject_of", "subject_and_files", "check_files")  # what of verify.py reads the files
CHUNK = 1 << 20


def release(root: Path) -> tuple[Chain, Path]:
    """A release of a model of SIZES."""
    import torch

    from steelyard.model.llama import Llama, LlamaConfig

    chain = Chain(root, make_battery(), (make_policy(),))
    small = make_model(root / "small")
    config = read_json_object(small / "config.json") | SIZES
    model = Llama(LlamaConfig.from_dict(config)).initialise(0)
    with torch.no_grad():  # as the scenario's own, a few words are likelier than all else; the layers add nothing
        assert model.lm_head is not None
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[262:270, 0] = 0.6
        model.lm_head.weight[257, 0] = 0.57
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    files = {path.name: path.read_bytes() for path in small.iterdir() if path.suffix != ".safetensors"}
    del files["config.json"]
    save_folder(chain.model, config, tensors, files)
    shutil.rmtree(small)
    new_key(chain.keys, "me", PASSPHRASE)
    chain.test()
    return chain, chain.bundle()


def forget(files: list[Path]) -> None:
    """Put the files out of the page cache."""
    for path in files:
        with path.open("rb") as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def read(files: list[Path]) -> None:
    buffer = bytearray(CHUNK)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


@dataclass
class Hashing:
    """When what reads files in `verify` began and ended."""

    times: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return max(self.times) - min(self.times)

    @contextmanager
    def watched(self) -> Any:
        """While this lasts, the functions named in HASHING are timed where verify.py calls them."""
        plain = {name: getattr(verifying, name) for name in HASHING if hasattr(verifying, name)}
        assert "check_files" in plain

        def around(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                self.times.append(time.perf_counter())
                try:
                    return function(*arguments, **named)
                finally:
                    self.times.append(time.perf_counter())

            return call

        for name, function in plain.items():
            setattr(verifying, name, around(function))
        try:
            yield
        finally:
            for name, function in plain.items():
                setattr(verifying, name, function)


def bytes_read() -> int:
    """How many bytes this process has asked files for."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def verify(chain: Chain, bundle: Path) -> tuple[float, float, int]:
    """Seconds of hashing, seconds of all else, bytes read."""
    hashing, before = Hashing(), bytes_read()
    with hashing.watched():
        start = time.perf_counter()
        result = chain.verify(bundle)
        whole = time.perf_counter() - start
    assert result.ok, result.findings
    return hashing.seconds, whole - hashing.seconds, bytes_read() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="steelyard-bench-") as root:
        chain, bundle = release(Path(root))
        files = sorted(path for path in bundle.rglob("*") if path.is_file())
        size = sum(path.stat().st_size for path in files)
        print(f"{len(files)} files, {size / 1e6:,.0f} MB, {rounds} rounds in turns")
        verify(chain, bundle)  # imports
        disk, peer, ours, rest, times = [], [], [], [], 0.0
        for _ in range(rounds):
            forget(files)
            disk.append(timed(lambda: read(files)))
            forget(files)
            peer.append(timed(lambda: subprocess.run(["sha256sum", *files], check=True, stdout=subprocess.DEVNULL)))
            forget(files)
            hashing, other, count = verify(chain, bundle)
            ours.append(hashing)
            rest.append(other)
            times = count / size
    rate = {name: size / 1e6 / min(seconds) for name, seconds in (("disk", disk), ("sha256sum", peer), ("ours", ours))}
    slower = min("disk", "sha256sum", key=lambda name: rate[name])
    report(
        "verify",
        [
            Row("hash_rate, MB/s", rate["ours"], rate[slower], f"{slower}, the slower", bar=0.8),
            Row("MB/s", rate["ours"], rate["sha256sum"], "sha256sum"),
            Row("MB/s", rate["ours"], rate["disk"], "reading alone"),
            Row("all but hashing, s", min(rest), 5.0, "bound", bar=1.0, less_is_better=True),
            Row("readings of each byte", times, 1.0, "once"),
        ],
    )


if __name__ == "__main__":
    main()
