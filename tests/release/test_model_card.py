"""The card: the Hub reads its metadata, the maker's words stay, and no stranger's text becomes markup."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from papers import BARE, HOSTILE, LINEAGE, Told
from scenario import Chain

from steelyard.base.errors import FormatError, SteelyardError
from steelyard.release.card import BEGIN, END
from steelyard.release.front_matter import split_card, with_metadata
from steelyard.release.lineage import Ancestor, Dataset, Stage
from steelyard.safety.markup import code, escape, yaml_text

HIS = """\
---
# ours, please keep
license: apache-2.0   # since 2024
language: no
tags:
- poetry

# what it writes
model-index:
- name: verse
  results:
  - task: {type: text-generation}
    dataset: {type: rhymes, name: Rhymes}
    metrics: [{type: accuracy, value: 0.5}]
  - task: {type: text-generation}
    dataset: {type: Steelyard/quick, name: in our name}
    metrics: [{type: toxicity.chat, value: 0.0}]
custom: {a: [1, 2]}
---
# Verse

It writes verse.
"""


@pytest.fixture(scope="module")
def told(built: Chain, tmp_path_factory: pytest.TempPathFactory) -> Told:
    return Told.of(built.copy(tmp_path_factory.mktemp("told") / "root"))


def metadata(card: str) -> dict[str, Any]:
    found = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(found, dict)
    return found


def test_the_hub_reads_the_card_and_its_results(told: Told) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    card = huggingface_hub.ModelCard(told.card())
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "text-generation")
    assert (data.base_model, data.base_model_relation) == (["acme/base"], "finetune")
    assert (data.language, data.datasets, data.tags) == (["en"], ["acme/talk"], ["llama", "steelyard"])
    measured = {one.metric: one for one in told.report.measurements}
    rates = {one.metric_type: one for one in data.eval_results if not one.metric_type.endswith(".upper_bound")}
    bounds = {one.metric_type.removesuffix(".upper_bound"): one for one in data.eval_results} | {}
    assert rates.keys() == measured.keys() == bounds.keys()
    for metric, one in measured.items():
        assert rates[metric].metric_value == one.estimate
        assert bounds[metric].metric_value == one.upper
        assert rates[metric].task_type == "text-generation"
        assert rates[metric].dataset_type == "steelyard/tiny"
        assert rates[metric].source_url == "https://huggingface.co/acme/tiny/blob/main/steelyard/report.md"
        assert rates[metric].verified is None
    assert data.model_name == "tiny"


def test_what_it_says_stands_in_the_evidence(told: Told) -> None:
    card = told.card()
    assert card.split("---\n", 2)[2].startswith("\n# tiny\n")
    assert "### Policy `lenient` v1: PASS" in card
    assert "`LlamaForCausalLM`" in card
    assert "[acme/base](https://huggingface.co/acme/base)" in card
    assert "[acme/talk](https://huggingface.co/datasets/acme/talk), 200 words" in card
    assert "licence CC-BY-4.0." in card
    assert "`rows.jsonl`, 2 words, SHA-256 `" + "34" * 32 + "`; licence not on record." in card
    assert "Not declared: `what acme/base@main was trained on`." in card
    assert "Languages tested: en (58 probes). Nothing is known of others." in card
    assert "99.5% of 2,000" in card
    assert "enough for a preview, not for a release to the public" in card
    assert told.decision.subject in card
    assert told.card() == card


def test_nothing_is_claimed_that_is_not_on_record(told: Told) -> None:
    card = told.card(lineage=BARE)
    found = metadata(card)
    assert found["license"] == "other"
    assert (found["license_name"], found["license_link"]) == ("acme-research", "https://acme.example/terms")
    assert not {"base_model", "base_model_relation", "datasets"} & found.keys()
    assert all("source" not in result for result in found["model-index"][0]["results"])
    for text in ("Base model: not on record.", "How it was made is not on record.", "this is a first release"):
        assert text in card
    assert "What it was trained on is not on record." in card
    # Imported and released as it is, it is no derivative of that model.
    copied = replace(LINEAGE, relation=None)
    assert "base_model" not in metadata(told.card(lineage=copied))
    assert "No stage on record trained it further." in told.card(lineage=copied)


def test_the_makers_words_stay(told: Told) -> None:
    card = told.card(existing=HIS)
    for text in ("# ours, please keep\nlicense: apache-2.0   # since 2024\nlanguage: no\n", "\n\n# what it writes\n"):
        assert text in card
    assert "custom: {a: [1, 2]}\n" in card
    assert card.split("---\n", 2)[2].startswith("# Verse\n\nIt writes verse.\n\n" + BEGIN)
    found = metadata(card)
    assert found["tags"] == ["poetry", "llama", "steelyard"]
    assert found["pipeline_tag"] == "text-generation"
    his, ours = found["model-index"]
    assert [one["dataset"]["type"] for one in his["results"]] == ["rhymes"]
    assert ours["name"] == "tiny"
    assert len(ours["results"]) == len(told.report.measurements)


def test_a_second_release_replaces_the_first_ones_part_alone(told: Told) -> None:
    once = told.card(existing=HIS)
    moved = once.replace("It writes verse.\n", "It writes better verse.\n") + "\n## Thanks\n\nTo all.\n"
    again = told.card(name="other", existing=moved)
    assert again.count(BEGIN) == again.count(END) == 1
    assert again.endswith("\n## Thanks\n\nTo all.\n")
    assert "It writes better verse." in again
    assert [one["name"] for one in metadata(again)["model-index"]] == ["verse", "other"]
    assert told.card(existing=once) == once


def test_line_ends_are_kept(told: Told) -> None:
    card = told.card(existing="\ufeff" + HIS.replace("\n", "\r\n"))
    assert card.startswith("---\r\n# ours")
    assert card.replace("\r\n", "").count("\n") == 0


def test_a_card_without_metadata_gets_it(told: Told) -> None:
    card = told.card(existing="# Verse\n\n---\n\nlicense: gpl-3.0\n")
    assert metadata(card)["license"] == "apache-2.0"
    assert "\n---\n# Verse\n\n---\n\nlicense: gpl-3.0\n" in card


@pytest.mark.parametrize(
    ("existing", "says"),
    [
        ("---\n- a\n---\n", "metadata is no mapping"),
        ("---\n{license: mit}\n---\n", "write each key at the start of a line"),
        ("---\nlicense: mit\nlicense: mit\n---\n", "this key is there already"),
        ("---\nlicense: &a mit\nother: *a\n---\n", "anchors and aliases"),
        ("---\nlicense: [mit\n---\n", "not YAML"),
        ("---\nx: !!python/name:os.system\n---\n", "tags"),
        ("---\ntags: [1]\n---\n", "tags: must be a list of texts"),
        ("---\nmodel-index: 3\n---\n", "model-index: must be a list"),
        ("---\nmodel-index: [{name: x}]\n---\n", "model-index: must be a list"),
        ("---\nx: " + "[" * 40 + "]" * 40 + "\n---\n", "nested deeper"),
        ("---\nx: a\u2028b\n---\n", "line separator"),
        ("---\nx: " + "a" * 300_000 + "\n---\n", "is longer than"),
        ("---\na: 1\n...\n---\n", ""),
        (f"# A\n{BEGIN}\n", "markers of ours"),
        (f"# A\n{END}\n{BEGIN}\n", "markers of ours"),
        (f"# A\n{BEGIN}\n{END}\n<!--steelyard:begin-->\n", "markers of ours"),
    ],
)
def test_a_card_that_cannot_be_read_is_refused(told: Told, existing: str, says: str) -> None:
    with pytest.raises(SteelyardError, match=r"README\.md") as caught:
        told.card(existing=existing)
    assert says in str(caught.value)


def _flat(tokens: list[Token]) -> Iterator[Token]:
    for token in tokens:
        yield token
        yield from _flat(token.children or [])


def test_strangers_text_is_text(told: Told) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    lineage = replace(
        LINEAGE,
        base=Ancestor(HOSTILE),
        predecessor=Ancestor(HOSTILE),
        datasets=(Dataset(HOSTILE),),
        undeclared=(HOSTILE,),
        stages=(Stage(HOSTILE, HOSTILE, HOSTILE),),
        recipe=HOSTILE,
    )
    decision = told.decision.model_copy(update={"training_data": HOSTILE})
    config = {"model_type": HOSTILE, "architectures": [HOSTILE]}
    card = told.card(HOSTILE, lineage=lineage, decision=decision, config=config)
    assert card.count(END) == 1
    assert card.endswith(f"{END}\n")
    body = card.split("---\n", 2)[2]
    tokens = list(_flat(MarkdownIt("commonmark", {"linkify": False}).enable("table").parse(body)))
    assert [token.content.strip() for token in tokens if token.type in ("html_block", "html_inline")] == [BEGIN, END]
    assert not [token.attrs for token in tokens if token.type == "link_open"]
    assert not [token.type for token in tokens if token.type in ("strong_open", "em_open", "hr", "image")]
    assert "http://" not in re.sub("`[^`\n]*`", "", body)  # GFM makes links of bare addresses
    assert "\u202e" not in card
    read = huggingface_hub.ModelCard(card)
    assert read.data.tags == ["steelyard"]
    assert "\n\n# " in f"\n{read.text}"


@pytest.mark.parametrize(
    "text", ["no", "1e3", "0x10", "2024-01-01", "---", "a: b", "- a", "#a", "", "null", "a\u202eb", "{a}", "~", "'\"\\"]
)
def test_yaml_gives_back_the_text(text: str) -> None:
    made = yaml_text({"key": text, "list": [text]})
    assert yaml.safe_load(made) == {"key": text, "list": [text]}
    # YAML 1.2 has other numbers and words than 1.1: what may be one is quoted.
    if text in ("1e3", "0x10", "2024-01-01", "no", "null", "~"):
        assert made.splitlines()[0] in (f'key: "{text}"', f"key: '{text}'")


def test_markdown_is_escaped() -> None:
    assert escape("a *b* [c](d) <e> `f` g_h") == r"a \*b\* \[c\](d) \<e\> \`f\` g\_h"
    assert escape("http://x www.y") == r"http\://x www\.y"
    assert [escape(text) for text in ("1. a", "- a", "+ a", "# a", "12)")] == [
        r"1\. a",
        r"\- a",
        r"\+ a",
        r"\# a",
        r"12\)",
    ]
    assert code("a`b|c<d>\ne") == "`a'b¦c‹d› e`"


def test_a_decision_without_a_report_makes_no_card(told: Told) -> None:
    with pytest.raises(SteelyardError, match="no report"):
        told.card(decision=told.decision.model_copy(update={"report": None}))


def test_the_error_names_the_line() -> None:
    with pytest.raises(FormatError, match=r"README.md: metadata:[0-9]+: not YAML"):
        split_card("---\na: 1\nb: [\n---\n", "README.md")


_PIECES = st.sampled_from(
    ["---\n", "---", "\n", "\r\n", "\r", "a: 1\n", "tags:\n- x\n", "license: mit\n", "# c\n", "  ", "...\n", "'",
     '"k": [2]\n', "model-index: []\n", "{", "|\n", "? x\n", "<<: 1\n", "=: 1\n", "\x00", "\ufeff", "\x85",
     "text\n", "- ", "\t"]
)  # fmt: skip


@given(st.lists(_PIECES, max_size=12).map("".join))
@settings(deadline=None, max_examples=500)
def test_any_card_is_changed_exactly_or_refused(text: str) -> None:
    try:
        made = with_metadata(text, {"license": "apache-2.0", "tags": ["a b", "no"]}, "README.md")
    except SteelyardError:
        return
    before, after = split_card(text, "README.md"), split_card(made, "README.md")
    assert after.data == {**before.data, "license": "apache-2.0", "tags": ["a b", "no"]}
    assert after.body == before.body
    assert with_metadata(made, {"license": "apache-2.0"}, "README.md").replace("\r\n", "\n") == made.replace(
        "\r\n", "\n"
    )
