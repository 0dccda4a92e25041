"""GGUF out: llama.cpp computes what the folder says, an import gives it back, and the rest is refused by name."""

from __future__ import annotations

import ctypes
import json
import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import CONFIG, byte_level_backend, random_weights, strings, tokenizer_files, write_folder

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.base.progress import Silent
from steelyard.model import gguf_export
from steelyard.model.chat import Renderer
from steelyard.model.gguf_export import export_gguf
from steelyard.model.headers import scan_gguf
from steelyard.model.identity import subject_of
from steelyard.model.importer import import_model
from steelyard.model.tokenizer import Tokenizer

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def tokenizer() -> dict[str, bytes]:
    return tokenizer_files(byte_level_backend(), template=TEMPLATE)


@pytest.fixture
def make(tmp_path: Path, tokenizer: dict[str, bytes]) -> Make:
    """A small folder with that tokenizer, under a name of its own."""

    def make(name: str = "model", *, files: dict[str, bytes] | None = None, **options: Any) -> Path:
        return write_folder(tmp_path / name, files=tokenizer | (files or {}), **options)

    return make


def llama_cpp(path: Path, **options: Any) -> Any:
    module = pytest.importorskip("llama_cpp", reason="the oracle is llama-cpp-python: pip install 'steelyard[oracle]'")
    return module.Llama(str(path), verbose=False, n_threads=1, n_threads_batch=1, **options)


def logits_of(oracle: Any, tokens: list[int]) -> np.ndarray[Any, Any]:
    """llama.cpp's logits after each token, float32 [T, V]."""
    oracle.reset()
    oracle.eval(tokens)
    found: np.ndarray[Any, Any] = oracle.scores[: len(tokens)]
    return found


def our_logits(folder: Path, tokens: list[int]) -> np.ndarray[Any, Any]:
    from steelyard.model.llama import load_llama

    with torch.no_grad():
        found: np.ndarray[Any, Any] = load_llama(folder, dtype=torch.float32)(torch.tensor([tokens]))[0].numpy()
    return found


# --- llama.cpp computes what the folder says --------------------------------------------------------------------------

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "tied, groups of 2": {},
    "untied, no groups": {"tie_word_embeddings": False, "num_key_value_heads": 4},
    "heads wider than the model": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32},
    "theta and epsilon": {"rope_theta": 500000.0, "rms_norm_eps": 0.25},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "biases of attention": {"attention_bias": True},
    "linear RoPE": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3 RoPE": {"rope_scaling": LLAMA3},
    "rows without a token": {"vocab_size": 448},
}


def with_biases(config: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Random weights of a configuration, and biases where it has them."""
    from steelyard.model.gguf import hugging_face_name, tensor_shapes

    config = CONFIG | {"attention_bias": False, "mlp_bias": False} | config
    weights, draw = random_weights(config), np.random.default_rng(1)
    for name, shape in tensor_shapes(config).items():
        if name.endswith("bias"):
            weights[hugging_face_name(name)] = draw.integers(-64, 64, shape).astype(np.float32) / 64
    return weights


@pytest.mark.oracle
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_same_logits(case: str, make: Make, tmp_path: Path) -> None:
    """Rows of the wrong order, another RoPE or a lost bias move logits by about their own spread, F16 by a fiftieth."""
    config = CASES[case]
    folder = make(config=config, weights=with_biases(config))
    export_gguf(folder, tmp_path / "m.gguf", "F16")
    tokens = list(range(2, 202))
    found = logits_of(llama_cpp(tmp_path / "m.gguf", n_ctx=256, logits_all=True), tokens)
    expected = our_logits(folder, tokens)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 0.04 * expected.std()
    if case != "tied, groups of 2":  # what the case is about is really in the numbers
        plain = {key: value for key, value in CONFIG.items() if key in ("rope_theta", "rope_scaling")}
        for key in ("rope_scaling", "rms_norm_eps", "rope_theta"):
            if key in config:
                other = make("other", config=config | {"rope_scaling": None, "rms_norm_eps": 1e-5} | plain)
                assert np.abs(our_logits(other, tokens) - expected).max() > 0.2 * expected.std()
                break


@pytest.fixture(scope="module")
def exports(smollm2: Path, once: Callable[[str, Callable[[Path], object]], Path]) -> dict[str, Path]:
    """SmolLM2 as every kind. Read only."""

    def make(folder: Path) -> None:
        for kind in ("F16", "BF16", "Q8_0"):
            export_gguf(smollm2, folder / f"{kind}.gguf", kind)

    place = once("smollm2-gguf", make)
    return {kind: place / f"{kind}.gguf" for kind in ("F16", "BF16", "Q8_0")}


PROMPTS = ("The capital of France is", "def add(a, b):\n    ", "Once upon a time, in a town by the sea,")
# How far llama.cpp's logits may lie from ours: it rounds what it multiplies with to the type of the weights.
NOISE = {"F16": 0.05, "BF16": 0.5}


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_smollm2_in_llama_cpp(kind: str, smollm2: Path, exports: dict[str, Path]) -> None:
    oracle = llama_cpp(exports[kind], n_ctx=256, logits_all=True)
    ours = Renderer(smollm2)
    for text in [*strings(200, seed=21), "<|im_start|>user\nHi<|im_end|>\n"]:
        for special in (False, True):
            expected = ours.tokenizer.encode(text, bos=False, special=special)
            assert oracle.tokenize(text.encode(), add_bos=False, special=special) == expected, ascii(text)
    assert (oracle.token_bos(), oracle.token_eos()) == (1, 2)
    assert not oracle._model.add_bos_token()
    _same_chat_prompt(oracle, ours)
    if kind == "Q8_0":
        expected, found = _logits_of_both(oracle, smollm2)
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.99
        return
    parted = [_greedy(oracle, smollm2, ours.tokenizer, prompt, NOISE[kind]) for prompt in PROMPTS]
    assert sum(length == 24 for length in parted) >= 2, parted


def _same_chat_prompt(oracle: Any, ours: Renderer) -> None:
    """llama.cpp's own renderer makes the same tokens of a conversation."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    from steelyard.inference.endpoint import Message

    turns = (("user", "Who weighs goods?"), ("assistant", "A steelyard."), ("user", "Where?"))
    names = (oracle.detokenize([number], special=True).decode() for number in (oracle.token_eos(), oracle.token_bos()))
    eos, bos = names
    formatter = Jinja2ChatFormatter(oracle.metadata["tokenizer.chat_template"], eos_token=eos, bos_token=bos)
    text = formatter(messages=[{"role": role, "content": content} for role, content in turns]).prompt  # type: ignore[list-item]
    found = oracle.tokenize(text.encode(), add_bos=False, special=True)
    assert found == ours.prompt_tokens([Message(role, content) for role, content in turns])


def _logits_of_both(oracle: Any, folder: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    tokens = Tokenizer.load(folder).encode(PROMPTS[2], bos=False)
    return our_logits(folder, tokens), logits_of(oracle, tokens)


def _greedy(oracle: Any, folder: Path, tokenizer: Tokenizer, prompt: str, noise: float) -> int:
    """How many of 24 tokens both write alike; where they part, it must be a near tie, shown by both sides' logits."""
    from steelyard.inference.endpoint import Request, Sampling

    tokens = tokenizer.encode(prompt, bos=False)
    sampling = Sampling(temperature=0.0, max_tokens=24)
    (ours,) = _endpoint(folder).generate([Request(id="a", prompt=prompt, sampling=sampling, seed=0)])
    oracle.reset()
    theirs: list[int] = []
    for token in oracle.generate(list(tokens), temp=0.0, repeat_penalty=1.0):
        theirs.append(token)
        if len(theirs) == 24 or token in tokenizer.eos_ids:
            break
    written = list(ours.tokens[: len(theirs)])
    if written == theirs:
        return 24
    part = next(index for index, (a, b) in enumerate(zip(written, theirs, strict=False)) if a != b)
    before = tokens + theirs[:part]
    expected, found = our_logits(folder, before)[-1], logits_of(oracle, before)[-1]
    rivals = [written[part], theirs[part]]
    assert expected.argmax() == rivals[0]
    shown = f"no near tie: {expected[rivals]} here, {found[rivals]} there"
    assert max(abs(np.subtract(*expected[rivals])), abs(np.subtract(*found[rivals]))) < noise, shown
    return part


_ENDPOINTS: dict[Path, Any] = {}


def _endpoint(folder: Path) -> Any:
    from steelyard.inference.local import LocalEndpoint

    if folder not in _ENDPOINTS:
        _ENDPOINTS[folder] = LocalEndpoint.open(folder, dtype="float32")
    return _ENDPOINTS[folder]


# --- an import gives it back ------------------------------------------------------------------------------------------


def test_smollm2_comes_back(smollm2: Path, exports: dict[str, Path], tmp_path: Path) -> None:
    assert import_model(exports["F16"], tmp_path / "back", progress=Silent()) == subject_of(smollm2)


GENERATION = {"bos_token_id": 1, "eos_token_id": [0, 5, 7], "do_sample": True, "temperature": 0.2, "top_p": 0.9}


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_everything_comes_back(kind: str, make: Make, tmp_path: Path) -> None:
    from steelyard.model.formats import load_tensors

    config = {
        "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False, "rope_theta": 500000.0,
        "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192}, "head_dim": 64,
    }  # fmt: skip
    weights = {name: np.where(np.abs(w) < 2**-14, 0, w) for name, w in with_biases(config).items()}
    made = make(config=config, weights=weights, files={"generation_config.json": json.dumps(GENERATION).encode()})
    # A folder of the importer's own spelling, so that the bytes of config.json can be compared too.
    export_gguf(made, tmp_path / "first.gguf", "BF16")
    folder = tmp_path / "folder"
    subject = import_model(tmp_path / "first.gguf", folder, progress=Silent())
    written = json.loads((folder / "generation_config.json").read_text())
    assert {key: written[key] for key in GENERATION} == GENERATION
    assert written.keys() - GENERATION.keys() == set()
    assert Tokenizer.load(folder).eos_ids == {0, 5, 7}
    tensors = load_tensors(folder)
    assert tensors.keys() == weights.keys()
    assert all(torch.equal(tensors[name], torch.from_numpy(w).to(torch.bfloat16)) for name, w in weights.items())
    exported = export_gguf(folder, tmp_path / "second.gguf", kind)
    assert exported.rounded == 0
    assert import_model(tmp_path / "second.gguf", tmp_path / "again", progress=Silent()) == subject


@pytest.mark.parametrize(("dtype", "kind"), [("float32", "F16"), ("float32", "BF16"), ("float16", "BF16")])
def test_weights_are_rounded_to_the_nearest(dtype: str, kind: str, make: Make, tmp_path: Path) -> None:
    weights = {name: w + np.float32(1e-3) for name, w in random_weights(CONFIG).items()}
    exported = export_gguf(make(weights=weights, dtype=dtype), tmp_path / "m.gguf", kind)
    header = scan_gguf(tmp_path / "m.gguf")
    found = _values(header, "blk.1.ffn_down.weight")
    stored = torch.from_numpy(weights["model.layers.1.mlp.down_proj.weight"]).to(getattr(torch, dtype))
    assert np.array_equal(
        found, stored.to(getattr(torch, {"F16": "float16", "BF16": "bfloat16"}[kind])).float().numpy()
    )
    assert exported.rounded is not None
    assert 0.4 * exported.values < exported.rounded < exported.values


def _values(header: Any, name: str) -> np.ndarray[Any, Any]:
    from steelyard.model.gguf import _dequantize

    return _dequantize(header, header.tensors[name])


@pytest.mark.oracle
def test_q8_0_is_ggmls_own_to_the_bit_and_within_its_bound(make: Make, tmp_path: Path) -> None:
    """ggml's block: d = max |w| / 127 as float16, q = round(w / d): the error is at most half a step, and what rounding
    d itself costs."""
    folder = make(dtype="float32", weights={name: w + np.float32(1e-3) for name, w in random_weights(CONFIG).items()})
    export_gguf(folder, tmp_path / "m.gguf", "Q8_0")
    header = scan_gguf(tmp_path / "m.gguf")
    weight = random_weights(CONFIG)["model.layers.0.mlp.up_proj.weight"] + np.float32(1e-3)
    tensor = header.tensors["blk.0.ffn_up.weight"]
    raw = np.fromfile(header.path, np.uint8, tensor.end - tensor.start, offset=tensor.start)
    pytest.importorskip("llama_cpp")
    import llama_cpp as oracle

    library = ctypes.CDLL(str(next(Path(oracle.__file__).parent.glob("lib/libggml-base*"))))
    theirs = np.zeros(len(raw), np.uint8)
    library.quantize_row_q8_0_ref(
        weight.ctypes.data_as(ctypes.c_void_p), theirs.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(weight.size)
    )
    assert np.array_equal(raw, theirs)
    blocks = weight.reshape(-1, 32)
    step = np.abs(blocks).max(axis=1, keepdims=True) / 127
    bound = step / 2 + 127 * np.abs(step - step.astype(np.float16))
    error = np.abs(_values(header, "blk.0.ffn_up.weight").reshape(-1, 32) - blocks)
    assert (error <= bound * (1 + 1e-6)).all()
    assert error.max() > 0.4 * step.max()  # the bound is not idle


def test_memory_does_not_grow_with_the_model(
    make: Make, tmp_path: Path, tokenizer: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(config={"vocab_size": 1 << 15})
    whole = export_gguf(folder, tmp_path / "whole.gguf", "Q8_0")
    monkeypatch.setattr(gguf_export, "_CHUNK", 1 << 13)
    config = json.loads((folder / "config.json").read_text())
    stored = {
        name: ("model.safetensors", tensor)
        for name, tensor in gguf_export.weight_files(folder)["model.safetensors"].items()
    }
    from steelyard.model.llama import LlamaConfig

    plan = gguf_export._plan(folder, LlamaConfig.from_dict(config), "Q8_0", stored)
    tracemalloc.start()
    gguf_export._write(tmp_path / "measured.gguf", {}, plan, "Q8_0", Silent())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(item.bytes for item in plan) > 2_000_000
    assert peak < 600_000
    export_gguf(folder, tmp_path / "parts.gguf", "Q8_0")
    assert whole.path.read_bytes() == (tmp_path / "parts.gguf").read_bytes()


# --- refused by name --------------------------------------------------------------------------------------------------


def bad(name: str, value: float) -> Callable[[], dict[str, np.ndarray[Any, Any]]]:
    def weights() -> dict[str, np.ndarray[Any, Any]]:
        found = random_weights(CONFIG)
        found[name][0, 0] = value
        return found

    return weights


def without(name: str) -> Callable[[], dict[str, np.ndarray[Any, Any]]]:
    return lambda: {key: value for key, value in random_weights(CONFIG).items() if key != name}


def generation(**settings: Any) -> dict[str, bytes]:
    return {"generation_config.json": json.dumps(settings).encode()}


DOWN = "model.layers.1.mlp.down_proj.weight"
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "dynamic RoPE": (
        {"config": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}}, "F16", "llama.cpp has no dynamic"
    ),
    "another architecture": ({"config": {"model_type": "qwen2"}}, "F16", "model_type"),
    "digits past float32": ({"config": {"rms_norm_eps": 1.00000000001e-5}}, "F16", "rms_norm_eps: 1.00000000001e-05"),
    "a missing tensor": ({"weights": without(DOWN)}, "F16", f"lacks the tensor {DOWN}"),
    "a tensor too many": (
        {"weights": lambda: random_weights(CONFIG) | {"model.extra": np.ones(3, np.float32)}}, "F16", r"'model\.extra'"
    ),
    "a head that is not tied": (
        {"weights": lambda: random_weights(CONFIG) | {"lm_head.weight": np.ones((400, 64), np.float32)}},
        "F16",
        "is not model.embed_tokens.weight",
    ),
    "not a number": ({"weights": bad(DOWN, math.nan)}, "BF16", f"{DOWN}: holds a value that is not"),
    "past float16": ({"weights": bad(DOWN, 70000.0)}, "F16", "past F16's range"),
    "infinite under Q8_0": ({"weights": bad(DOWN, math.inf)}, "Q8_0", "not a finite number"),
    "rows no multiple of 32": ({"config": {"intermediate_size": 80}}, "Q8_0", "rows of 80, no multiple of Q8_0's 32"),
    "fewer rows than tokens": ({"config": {"vocab_size": 390}}, "F16", "400 tokens for an embedding of 390 rows"),
    "system prompt": ({"files": {"system_prompt.txt": b"Be good."}}, "F16", "system_prompt.txt: a GGUF has no place"),
    "another setting": ({"files": generation(repetition_penalty=1.2)}, "F16", "repetition_penalty: 1.2 has no place"),
    "four ends": ({"files": generation(eos_token_id=[0, 3, 4, 5])}, "F16", "4 tokens end a turn"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_gguf_cannot_hold_is_refused_by_name(case: str, make: Make, tmp_path: Path) -> None:
    options, kind, reason = REFUSED[case]
    options = {key: value() if callable(value) else value for key, value in options.items()}
    if "config" in options and "weights" not in options:
        options["weights"] = random_weights(CONFIG | options["config"])
    folder = make(**options)
    with pytest.raises(FormatError, match=reason) as refusal:
        export_gguf(folder, tmp_path / "m.gguf", kind)
    assert "\n" not in str(refusal.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_another_kind_and_a_file_that_is_there(make: Make, tmp_path: Path) -> None:
    folder = make()
    with pytest.raises(UsageError, match="'Q4_K': not a kind of weights; known are F16, BF16, Q8_0"):
        export_gguf(folder, tmp_path / "m.gguf", "Q4_K")
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(SteelyardError, match="exists already"):
        export_gguf(folder, tmp_path / "m.gguf", "F16")
    assert (tmp_path / "m.gguf").read_text() == "mine"
    with pytest.raises(FormatError, match="is not a folder"):
        export_gguf(tmp_path / "absent", tmp_path / "n.gguf", "F16")


def test_a_full_disk_leaves_nothing(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make()
    usage = gguf_export.shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    with monkeypatch.context() as patched:
        patched.setattr(gguf_export.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(SteelyardError, match=r"m\.gguf: needs 67 MB, 1 MB are free"):
            export_gguf(folder, tmp_path / "m.gguf", "F16")

    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_export, "_encode", full)
    with pytest.raises(OSError, match="No space left"):
        export_gguf(folder, tmp_path / "m.gguf", "F16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_command(make: Make, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from steelyard.base.canonical import sha256_file
    from steelyard.cli.main import app

    folder, out = make(), tmp_path / "m.gguf"
    result = CliRunner().invoke(app, ["model", "export", str(folder), "--gguf", "q8_0", "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["gguf"], found["bytes"], found["sha256"]) == ("Q8_0", out.stat().st_size, sha256_file(out))
    assert found["rounded"] is None
