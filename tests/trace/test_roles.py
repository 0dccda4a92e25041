"""Names: a suspect's tensors under Hugging Face's names, whatever it calls them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from suspects_made import SMALL, meta_names, weights, write_gguf

from steelyard.base.errors import FormatError
from steelyard.trace.roles import hugging_face
from steelyard.trace.tensors import in_memory, open_tensors


def test_every_row_of_a_gguf_is_read_in_hugging_face_order(tmp_path: Path) -> None:
    ours = weights()
    named = hugging_face(open_tensors(write_gguf(tmp_path / "a.gguf", config=SMALL, weights=ours)))
    assert named.stored.keys() == ours.keys()
    assert (named.sizes.heads, named.sizes.kv_heads, named.sizes.head_dim) == (4, 2, 16)
    for name, values in ours.items():
        np.testing.assert_array_equal(named.read(name), values)
    query = "model.layers.2.self_attn.q_proj.weight"
    np.testing.assert_array_equal(named.read(query, np.array([1, 33])), ours[query][[1, 33]])


def test_meta_names_and_prefixes_are_understood(tmp_path: Path) -> None:
    ours = weights()
    meta = hugging_face(in_memory(meta_names(ours)))
    assert meta.stored.keys() == ours.keys()
    np.testing.assert_array_equal(
        meta.read("model.layers.1.mlp.up_proj.weight"), ours["model.layers.1.mlp.up_proj.weight"]
    )
    vision = {f"vision.layers.{at}.self_attn.q_proj.weight": np.zeros((8, 8)) for at in range(3)}
    mixed = vision | {f"language_model.{name}": values for name, values in ours.items()}
    assert hugging_face(in_memory(mixed)).stored == {name: f"language_model.{name}" for name in ours}


@pytest.mark.parametrize("numbered", [True, False])
def test_names_that_say_nothing_are_found_by_shape(numbered: bool) -> None:
    ours = weights()
    renamed, back = {}, {}
    for at, name in enumerate(ours):  # the file's order is the models'
        layer = name.split(".")[2] if "layers" in name else "e"
        new = f"b{layer}.{chr(97 + at % 9)}x" if numbered else f"t{at:03}"
        renamed[new], back[new] = ours[name], name
    named = hugging_face(in_memory(renamed))
    assert named.guessed
    assert named.sizes.layers == SMALL["num_hidden_layers"]
    assert back[named.stored["model.embed_tokens.weight"]] == "model.embed_tokens.weight"
    for layer in range(4):
        pair = {back[named.stored[f"model.layers.{layer}.mlp.{part}_proj.weight"]] for part in ("gate", "up")}
        assert pair == {f"model.layers.{layer}.mlp.{part}_proj.weight" for part in ("gate", "up")}


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(FormatError, match="adapter"):
        hugging_face(in_memory({"base_model.layers.0.q_proj.lora_A.weight": np.zeros((4, 8))}))
    with pytest.raises(FormatError, match="LLaMA family"):
        hugging_face(in_memory({"conv.weight": np.zeros((4, 8)), "fc.weight": np.zeros((4, 4))}))
    empty = weights() | {"model.layers.0.mlp.gate_proj.weight": np.zeros((0, 64))}
    with pytest.raises(FormatError, match="is empty"):
        hugging_face(in_memory(empty))
    flat = weights() | {"model.layers.0.mlp.gate_proj.weight": np.zeros(64)}
    with pytest.raises(FormatError, match="dimensions"):
        hugging_face(in_memory(flat))


def test_of_several_models_in_one_file_the_largest_is_meant() -> None:
    decoys = {
        f"decoy.layers.{layer}.mlp.{part}_proj.weight": np.zeros((8, 64))
        for layer in range(90)
        for part in ("gate", "up")
    }
    named = hugging_face(in_memory(decoys | weights()))
    assert named.layers == list(range(SMALL["num_hidden_layers"]))


def test_heads_of_one_row_have_one_order() -> None:
    """Settings may claim any number of heads that the rows can be divided by."""
    suspect = in_memory(meta_names(weights()))
    suspect.config = {"num_attention_heads": 64, "num_key_value_heads": 32}
    named = hugging_face(suspect)
    assert (named.interleaved, named.sizes.head_dim) == (True, 1)
    assert named.stored_rows("model.layers.0.self_attn.q_proj.weight") is None
