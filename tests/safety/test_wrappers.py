"""Attack wrappers: what they do to a prompt, in which order, and what they refuse."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from steelyard.base.errors import FormatError, SteelyardError, UsageError
from steelyard.inference.endpoint import Completion, Message, Request
from steelyard.safety.wrappers import (
    PLAIN,
    Prompt,
    Translations,
    read_translations,
    text_of,
    wrap,
    wrapper_of,
)

NONE = Translations()
ASKED: Prompt = (Message("user", "Où est l'eau?"),)


def through(*names: str, prompt: Prompt = ASKED, source: Translations = NONE) -> Prompt:
    return wrap([prompt], [wrapper_of(name, source) for name in names])[0]


def test_base64_can_be_read_again() -> None:
    code = text_of(through("base64")).splitlines()[-1]
    assert base64.b64decode(code).decode() == "Où est l'eau?"


def test_leetspeak_changes_letters_only() -> None:
    assert text_of(through("leetspeak", prompt="Toast? is 5 IO")) == "70457? 15 5 10"


@pytest.mark.parametrize("name", ["role-play", "prefix-injection"])
def test_the_request_stands_in_it_word_for_word(name: str) -> None:
    found = text_of(through(name))
    assert "Où est l'eau?" in found
    assert len(found) > 40


def test_many_turns_come_before_the_request_and_after_the_system_prompt() -> None:
    found = through("many-turn", prompt=(Message("system", "Be kind."), Message("user", "Why?")))
    assert not isinstance(found, str)
    assert [turn.role for turn in found] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert found[-1].content == "Why?"
    with pytest.raises(UsageError, match="text to continue"):
        through("many-turn", prompt="Once")


def test_wrappers_compose_in_order_and_keep_the_number_and_order_of_prompts() -> None:
    one, other = through("leetspeak", "base64"), through("base64", "leetspeak")
    assert base64.b64decode(text_of(one).splitlines()[-1]).decode() == "0ù 357 l'34u?"
    assert text_of(other).startswith("7h3 l1n3 b3l0w")
    turns = through("many-turn", "leetspeak")
    assert not isinstance(turns, str)
    assert turns[-1].content == "0ù 357 l'34u?"
    assert turns[0] == through("many-turn")[0]  # the earlier turns stay
    many = wrap([(Message("user", str(i)),) for i in range(5)], list(PLAIN.values()))
    assert len(set(map(text_of, many))) == 5


def test_completion_prompts_stay_text() -> None:
    assert isinstance(through("base64", "role-play", prompt="Once upon"), str)


def test_an_unknown_wrapper_is_named() -> None:
    with pytest.raises(UsageError, match="wrapper 'rot13' is unknown: give one of base64"):
        wrapper_of("rot13", NONE)
    with pytest.raises(UsageError, match="is unknown"):
        wrapper_of("translate:F R", NONE)


class Translator:
    def __init__(self, text: str, finish: Any = "stop") -> None:
        self.text, self.finish, self.asked = text, finish, list[str]()

    def identity(self) -> dict[str, Any]:
        return {"kind": "remote"}

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        self.asked += [text_of(request.prompt) for request in requests]
        return [Completion(request.id, self.text, self.finish, None, None) for request in requests]


def test_a_translator_is_asked_and_its_failure_is_an_error() -> None:
    translator = Translator("Wo ist das {} Wasser?\n")
    found = through("translate:it", source=Translations(translator=translator))
    assert text_of(found) == "Wo ist das {} Wasser?"
    assert "into Italian" in translator.asked[0]
    assert "\nOù est l'eau?\n" in translator.asked[0]
    for broken in (Translator(""), Translator("Où est l'eau?"), Translator("Wo ist", "length")):
        with pytest.raises(SteelyardError, match="did not translate"):
            through("translate:it", source=Translations(translator=broken))


def test_a_table_translates_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    rows = [{"prompt": "Où est l'eau? ", "language": "it", "translation": "Dov'è l'acqua?"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Translations(read_translations(path))
    assert text_of(through("translate:it", source=source)) == "Dov'è l'acqua?"
    with pytest.raises(SteelyardError, match=r"translate:fr: the table has no translation of .*: add a row"):
        through("translate:fr", source=source)
    with pytest.raises(UsageError, match="nothing to translate with"):
        through("translate:fr")
    path.write_text('{"prompt": "a", "language": "it", "translation": " "}\n')
    with pytest.raises(FormatError, match="row 1: prompt, language and translation must be text"):
        read_translations(path)
