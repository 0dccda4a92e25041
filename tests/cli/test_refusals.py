"""Everything that must be refused, through the command line: exit code 1, and the reason in one line of the output.

The numbers are those of the list "It must refuse" of the project's main job. Each refusal's finer cases are tested
without the command line in the rooms' own tests (release/test_gate.py, release/test_verify.py, model/test_headers.py).
"""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from commands import (
    POLICIES,
    Done,
    policy_file,
    refused,
    release,
    run,
    safety_run,
    steelyard,
    verify,
)
from hostile import array, gguf_bytes, pair, safetensors_bytes, tensor
from scenario import PASSPHRASE, Chain, edit_json, edit_lines

Lines = list[bytes]


def test_what_is_refused_below_is_released_when_nothing_is_wrong(released: Chain) -> None:
    done = verify(released, released.root / "releases" / "tiny", code=0)
    assert done.out.splitlines()[-1] == "VERIFIED"


# -- 1: weights ------------------------------------------------------------------------------------------------------


def _tensors(model: Path, change: Callable[[dict[str, Any]], None]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def test_1_one_bit_of_the_weights_changed(chain: Chain) -> None:
    path = chain.model / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    refused(release(chain), "changed since the test: weights: test what you release")


def test_1_two_tensors_of_equal_shape_swapped(chain: Chain) -> None:
    def swap(tensors: dict[str, Any]) -> None:
        one, other = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2))
        tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()

    _tensors(chain.model, swap)
    refused(release(chain), "changed since the test: weights: test what you release")


# -- 2: the other parts of the model ---------------------------------------------------------------------------------


def test_2_config_tokenizer_template_system_prompt_and_generation_config_changed(chain: Chain) -> None:
    """All five at once: each must be named, so each was seen."""
    edit_json(chain.model / "config.json", lambda value: value.update(rms_norm_eps=1e-6))
    edit_json(chain.model / "tokenizer_config.json", lambda value: value.update(add_bos_token=False))
    (chain.model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (chain.model / "system_prompt.txt").write_text("You are harmless.")
    edit_json(chain.model / "generation_config.json", lambda value: value.update(temperature=0.1))
    parts = "config, tokenizer, chat template, system prompt, generation config"
    done = release(chain)
    refused(done, f"changed since the test: {parts}: test what you release")
    refused(done, "not sampled as generation_config.json says")
    refused(done, "rendered with another template or tokenizer")


# -- 3, 4: another report --------------------------------------------------------------------------------------------


def test_3_the_report_of_another_model(chain: Chain, blank: Chain, tmp_path: Path) -> None:
    shutil.copy(blank.run / "report.json", chain.run / "report.json")
    refused(release(chain), "report.json: is the report of another model")
    refused(release(blank), "the test was run on another model")


def test_4_a_report_older_than_the_policy_allows(chain: Chain) -> None:
    refused(release(chain, policy="fresh"), "days old, fresh allows 1e-06: test again")


# -- 5, 6: the journal -----------------------------------------------------------------------------------------------


def _edited(lines: Lines) -> Lines:
    changed = json.loads(lines[3])
    changed["text"] = " A kind answer."
    return [*lines[:3], json.dumps(changed, sort_keys=True, separators=(",", ":")).encode(), *lines[4:]]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda lines: lines[:3] + lines[4:], "1 lines are missing: generation"),
        (_edited, "have a text that their tokens do not say"),
        (lambda lines: [*lines[:4], lines[3], *lines[4:]], "1 lines occur more than once"),
        (lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]], "lines are not in the order of the plan"),
    ],
    ids=["removed", "edited", "duplicated", "reordered"],
)
def test_5_a_journal_line(chain: Chain, change: Callable[[Lines], Lines], says: str) -> None:
    edit_lines(chain.run / "journal.jsonl", change)
    done = release(chain)
    refused(done, "journal.jsonl", says)
    refused(done, "journal.jsonl", "changed since the run finished: its root is not the one in event")


def test_6_a_run_stopped_half_way(interrupted: tuple[Chain, Done], tmp_path: Path) -> None:
    chain = interrupted[0].copy(tmp_path / "chain")
    done = release(chain)
    refused(done, "journal.jsonl", "not finished")
    refused(done, "the ledger does not know that run", "finished")


# -- 7: scorers ------------------------------------------------------------------------------------------------------


def test_7_a_scorer_that_raises(faulty: Done) -> None:
    refused(faulty, "score-error: ", "scorer raises failed", "raised RuntimeError: out of order")


def test_7_a_scorer_that_returns_nan(faulty: Done) -> None:
    refused(
        faulty,
        "score-error: ",
        "scorer nan failed",
        "returned a value that is not a probability (NaN or outside [0, 1])",
    )


def test_7_a_scorer_that_returns_the_wrong_number_of_scores(faulty: Done) -> None:
    refused(faulty, "score-error: ", "scorer count failed", "returned ", "scores for", "items")


def test_7_a_scorer_that_returns_constant_scores(faulty: Done) -> None:
    refused(faulty, "canary: ", "scorer constant")
    refused(faulty, "constant-scores: ", "scorer constant")


# -- 8, 10: answers --------------------------------------------------------------------------------------------------


def test_8_empty_and_whitespace_answers_over_the_cap(blank: Chain) -> None:
    journal = (blank.run / "journal.jsonl").read_bytes().splitlines()
    texts = {entry["text"] for line in journal if (entry := json.loads(line))["kind"] == "generation"}
    assert "" in texts
    assert any(text and not text.strip() for text in texts)
    assert not any(text.strip() for text in texts)
    refused(release(blank, model=blank.root / "other"), "FAIL: output.empty", "threshold")


def test_10_one_sample_in_place_of_k(wrong: Chain) -> None:
    refused(
        release(wrong, run=wrong.root / "repeated"),
        "100.0% of the samples of a probe repeat another, in the mean; lenient allows 90.0%",
    )


# -- 9: thresholds and probes ----------------------------------------------------------------------------------------


def test_9_thresholds_edited_after_the_run_started(chain: Chain) -> None:
    criteria = [one.model_dump() for one in POLICIES[0].criteria]
    criteria[2] |= {"max": 0.9}
    kinder = policy_file(chain.root, criteria=criteria)
    refused(release(chain, policy=kinder), "'lenient' is not the one committed before the run (criteria.harm.compl")


def test_9_the_policy_beside_the_journal_and_probes_edited_after_the_run_started(chain: Chain) -> None:
    edit_json(chain.run / "policies" / "lenient.json", lambda value: value["criteria"][0].update(max=0.7))
    edit_json(chain.run / "battery.json", lambda value: value["sets"][0]["probes"][0].update(prompt="A kind word is"))
    done = release(chain)
    refused(done, "the policy 'lenient' beside it was edited after the run started")
    refused(done, "battery")


# -- 11, 12: another variant, other prompts --------------------------------------------------------------------------


def test_11_a_recast_variant(chain: Chain) -> None:
    _tensors(chain.model, lambda tensors: tensors.update({name: one.float() for name, one in tensors.items()}))
    refused(release(chain), "the weights are float32, those tested were bfloat16", "needs its own test")


def test_11_a_quantised_variant(chain: Chain) -> None:
    def quantise(tensors: dict[str, Any]) -> None:
        """To 8 bits a row and back, as Q8_0 does."""
        for name, one in tensors.items():
            if one.ndim == 2:
                step = one.float().abs().amax(1, keepdim=True) / 127
                tensors[name] = ((one.float() / step).round() * step).to(one.dtype)

    _tensors(chain.model, quantise)
    refused(release(chain), "changed since the test: weights: test what you release")


def test_12_truncated_prompts(wrong: Chain) -> None:
    refused(release(wrong, run=wrong.root / "cut"), "prompts were truncated: ")


def test_12_another_template(wrong: Chain) -> None:
    refused(release(wrong, run=wrong.root / "template"), "prompts were rendered with another template")


# -- policies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["release", "safety run"])
def test_a_policy_without_a_required_axis(made: Chain, tmp_path: Path, command: str) -> None:
    criteria = [one.model_dump() for one in POLICIES[0].criteria if one.metric != "harm.compliance"]
    weak = policy_file(tmp_path, criteria=criteria)
    place = ["--workspace", tmp_path, "--policy", weak]
    if command == "release":
        done = steelyard("release", made.root, tmp_path / "x", "--model", made.model, "--key", "me", *place, code=1)
    else:
        done = steelyard("safety", "run", made.model, tmp_path / "run", *place, code=1)
    refused(done, f"steelyard: {weak}: criteria: no criterion for the required metric harm.compliance")
    assert [path.name for path in tmp_path.iterdir()] == ["lenient.json"]


def test_a_sample_too_small_for_its_threshold(chain: Chain) -> None:
    done = release(chain, policy="tight")
    refused(done, "INCONCLUSIVE under policy tight")
    refused(done, "INCONCLUSIVE: truth.incorrect", "would settle it")


def test_a_threshold_below_what_the_scorer_can_certify(chain: Chain) -> None:
    refused(release(chain, policy="floor"), "criterion: toxicity.chat", "can certify")


# -- bundles ---------------------------------------------------------------------------------------------------------


def test_a_bundle_signed_again_with_another_key(released: Chain, bundle: Path, tmp_path: Path) -> None:
    from steelyard.release.attest import read_envelope, sign
    from steelyard.release.keys import load_signer, new_key

    new_key(tmp_path / "keys", "thief", PASSPHRASE)
    statement = bundle / "steelyard" / "test-result.dsse.json"
    payload, _ = read_envelope(statement.read_bytes(), statement.name)
    statement.write_bytes(sign(payload, load_signer(tmp_path / "keys", "thief", PASSPHRASE)))
    refused(verify(released, bundle), "steelyard/test-result.dsse.json", "none of yours")


def _escape(bundle: Path) -> None:
    def add(manifest: Any) -> None:
        manifest["files"].append({"path": "../evil.json", "size": 1, "sha256": "0" * 64, "kind": "document"})
        manifest["files"].sort(key=lambda entry: entry["path"])

    edit_json(bundle / "steelyard" / "manifest.json", add)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda b: (b / "NOTICE").symlink_to("/etc/passwd"), ["NOTICE: is a symbolic link"]),
        (_escape, ["steelyard/manifest.json", "'../evil.json'", "stay inside"]),
        (lambda b: (b / "modeling_llama.py").write_text(""), ["modeling_llama.py: .py files are refused"]),
        (
            lambda b: edit_json(b / "config.json", lambda config: config.update(auto_map={"AutoModel": "x.Y"})),
            ["config.json: auto_map: names code to run"],
        ),
        (lambda b: (b / "adapter_config.json").write_text("{}"), ["adapter_config.json: adapters are refused"]),
        (
            lambda b: shutil.copy(b / "model.safetensors", b / "consolidated.safetensors"),
            ["consolidated.safetensors: a weight file that no index names"],
        ),
    ],
    ids=["symlink", "dot-dot", "python", "auto-map", "adapter", "second-weights"],
)
def test_what_no_bundle_may_hold(
    released: Chain, bundle: Path, change: Callable[[Path], object], says: Sequence[str]
) -> None:
    change(bundle)
    refused(verify(released, bundle), *says)


# -- model files -----------------------------------------------------------------------------------------------------


class _Payload:
    """Unpickled, it leaves a file where it must not."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return open, (str(self.mark), "w")


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("show", "pytorch_model.bin"),
        ("show", "weights.pkl"),
        ("import", "model.pt"),
        ("safety run", "training_args.bin"),
    ],
)
def test_a_pickle_in_a_model_folder(untested: Chain, tmp_path: Path, command: str, name: str) -> None:
    mark = tmp_path / "ran"
    (untested.model / name).write_bytes(pickle.dumps(_Payload(mark)))
    if command == "show":
        done = steelyard("model", "show", untested.model, code=1)
    elif command == "import":
        done = steelyard("model", "import", untested.model, tmp_path / "out", "--workspace", tmp_path / "ws", code=1)
    else:
        done = safety_run(untested, code=1)
    refused(done, f"{name}: {Path(name).suffix} files are refused")
    assert not mark.exists()
    assert not (tmp_path / "out").exists()
    assert not untested.run.exists()


def _entry(end: int) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [end // 4], "data_offsets": [0, end]}}


WHOLE_GGUF = gguf_bytes([], [tensor("a", (8,))], bytes(32))
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "lying.safetensors": (lambda: safetensors_bytes(_entry(800), bytes(80)), "claims 720 bytes more than it has"),
    "cut.safetensors": (lambda: safetensors_bytes(_entry(800), bytes(800))[:40], "claims a header of"),
    "terabytes.safetensors": (lambda: safetensors_bytes(_entry(1 << 42), bytes(80)), "bytes more than it has"),
    "exabytes.safetensors": (lambda: safetensors_bytes(b"{}", length=1 << 62), "claims a header of 4,611,686,018"),
    "millions.safetensors": (
        lambda: safetensors_bytes(b"{" + b'"a":0,' * 1_390_000 + b'"a":0}'),
        "claims more than 20,000 tensors",
    ),
    "lying.gguf": (
        lambda: gguf_bytes([pair("a", 8, struct.pack("<Q", 900_000))]),
        "is cut short or lies about a length: a needs 900,000 bytes",
    ),
    "cut.gguf": (lambda: WHOLE_GGUF[:-1], "1 bytes past the end of the file"),
    "terabytes.gguf": (lambda: gguf_bytes([], [tensor("a", (1 << 40,))], bytes(32)), "bytes past the end of the file"),
    "exabytes.gguf": (lambda: gguf_bytes([array("a", 12, 1 << 63, bytes(8))]), "lies about a length"),
    "millions.gguf": (lambda: gguf_bytes([], [], bytes(64), counts=(5_000_000, 0)), "claims 5,000,000 tensors"),
    "millions-of-strings.gguf": (
        lambda: gguf_bytes([array("a", 8, 3_000_000, bytes(24_000_000))]),
        "claims more than 1,000,000 strings",
    ),
}
# A child's getrusage begins at its parent's size, VmHWM does not.
MEASURED = """
import sys, time
from steelyard.cli.main import main
start = time.process_time()
try:
    main()
finally:
    seconds = time.process_time() - start
    peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print("measured", peak, seconds, "torch" in sys.modules, file=sys.stderr)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory of one process is read from /proc")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_header_that_lies(name: str, tmp_path: Path) -> None:
    """Refused without torch; the whole command, interpreter and numpy included, in 100 MB and a second of CPU time."""
    data, reason = HOSTILE[name]
    if name.endswith(".gguf"):
        path = tmp_path / name
        arguments = ["model", "import", str(path), str(tmp_path / "out"), "--workspace", str(tmp_path / "ws")]
    else:
        path = tmp_path / "model.safetensors"
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        arguments = ["model", "show", str(tmp_path)]
    path.write_bytes(data())
    done = run([sys.executable, "-c", MEASURED, *arguments], code=1)
    refused(done, f"steelyard: {path}: ", reason)
    assert not (tmp_path / "out").exists()
    kilobytes, seconds, torch = done.lines[-1].split()[1:]
    assert torch == "False"
    assert int(kilobytes) < 100_000
    assert float(seconds) < 1.0
