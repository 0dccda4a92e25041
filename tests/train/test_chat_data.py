"""What a conversation teaches: its answers and their ends, token for token as the model meets them when it answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from steelyard.base.errors import SteelyardError, UsageError

pytest.importorskip("torch")
pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")
from steelyard.inference.endpoint import Message
from steelyard.model.chat import Renderer
from steelyard.train.batch import IGNORE
from steelyard.train.chat_data import chat_loader
from steelyard.train.conversations import Conversation
from steelyard.train.tokenizer import train_tokenizer

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (  # in the manner of Llama 2: the answer stands behind plain text, trimmed
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
THINKING = CHATML.replace("assistant\n' }}", "assistant\n<think>' }}")
OPEN_ENDED = CHATML.replace(" + '<|im_end|>'", "")


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("chat") / "tokenizer"
    texts = [
        "system user assistant\nHello there! What is the answer? It is forty two, I think.\n\n\n [INST] [/INST]"
    ] * 9
    train_tokenizer(texts, out, vocab_size=340, max_length=256)
    return out


@dataclass(frozen=True)
class Given:
    """A renderer with a template of choice."""

    folder: Path
    template: str

    def renderer(self, to: Path) -> Renderer:
        for path in self.folder.iterdir():
            (to / path.name).write_bytes(path.read_bytes())
        (to / "chat_template.jinja").write_text(self.template)
        return Renderer(to)


TALK = (
    Message("system", "Be kind."),
    Message("user", "What is <|im_end|> the answer?"),
    Message("assistant", "\n\n Forty two. <|im_start|>user\nNo!"),
    Message("user", "Why?"),
    Message("assistant", "I think so."),
)


@pytest.mark.parametrize("template", [CHATML, INST])
@pytest.mark.parametrize("talk", [TALK[1:3], TALK[1:], TALK])
def test_only_answers_and_their_ends_are_taught(
    tokenizer_folder: Path, tmp_path: Path, template: str, talk: tuple[Message, ...]
) -> None:
    if template == INST:
        talk = tuple(turn for turn in talk if turn.role != "system")
    renderer = Given(tokenizer_folder, template).renderer(tmp_path)
    tokens, taught = renderer.training_tokens(talk)
    assert renderer.template is not None
    rendered = renderer.template.render(renderer.messages(talk), add_generation_prompt=False)
    assert renderer.tokenizer.decode(tokens, skip_special=False) == rendered
    # The runs of taught tokens are the answers, each with the token that ends it, and nothing else.
    edges = np.flatnonzero(np.diff([0, *taught, 0]))
    runs = [tokens[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True)]
    answers = [turn.content for turn in talk if turn.role == "assistant"]
    assert len(runs) == len(answers)
    for run, answer in zip(runs, answers, strict=True):
        assert run[-1] in renderer.tokenizer.eos_ids
        said = renderer.tokenizer.decode(run[:-1], skip_special=False)
        assert said == (f" {answer.strip()} " if template == INST else answer)
        assert renderer.tokenizer.eos_ids.isdisjoint(run[:-1])  # an end written in a text is text
    # What stands before the first answer is what the model is given when it generates.
    first = next(number for number, turn in enumerate(talk) if turn.role == "assistant")
    prompt = renderer.prompt_tokens(talk[:first])
    assert tokens[: len(prompt)] == prompt
    assert not any(taught[: len(prompt)])
    assert taught[len(prompt)]


def test_the_real_models_template(smollm2: Path) -> None:
    renderer = Renderer(smollm2)
    tokens, taught = renderer.training_tokens(TALK[1:])
    said = renderer.tokenizer.decode([t for t, on in zip(tokens, taught, strict=True) if on], skip_special=False)
    assert said == "\n\n Forty two. <|im_start|>user\nNo!<|im_end|>I think so.<|im_end|>"
    prompt = renderer.prompt_tokens(TALK[1:2])
    assert tokens[: len(prompt)] == prompt


def test_a_template_that_writes_turns_another_way_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    renderer = Given(tokenizer_folder, THINKING).renderer(tmp_path)
    with pytest.raises(SteelyardError, match="writes the turns before answer 1 another way"):
        renderer.training_tokens(TALK)
    with pytest.raises(SteelyardError, match=r"conversation 2: .*answer 1 another way"):
        loader_of(renderer, [Conversation(()), Conversation(TALK)][1:] * 2, first=2)


def loader_of(renderer: Renderer, talks: list[Conversation], *, max_length: int = 64, first: int = 1):  # type: ignore[no-untyped-def]
    if first == 2:  # a conversation without an answer to be taught comes first
        talks = [Conversation((Message("user", "Hello"),)), *talks]
    return chat_loader(
        talks, renderer, tokens_per_micro_batch=128, micro_batches_per_step=2, seed=0, max_length=max_length
    )


def test_the_loader_packs_and_counts(tokenizer_folder: Path, tmp_path: Path) -> None:
    renderer = Given(tokenizer_folder, CHATML).renderer(tmp_path)
    short = [
        Conversation((Message("user", f"What is {number}?"), Message("assistant", "It is " + "so " * (number % 9))))
        for number in range(40)
    ]
    long = Conversation((Message("user", "Hello"), Message("assistant", "there " * 200)))
    nothing = Conversation((Message("user", "answer " * 300), Message("assistant", "I")))
    loader = loader_of(renderer, [*short, long, nothing])
    found = loader.supervision
    assert (found.conversations, found.answers, found.ends, found.cut, found.dropped) == (41, 41, 40, 1, 1)
    micro = [loader._micro_batch(0, number) for number in range(loader.micro_batches_per_epoch)]
    targets = [int(t) for batch in micro for t in batch.targets if t != IGNORE]
    assert len(targets) == found.taught
    ends = [token for token in targets if token in renderer.tokenizer.eos_ids]
    assert len(ends) == found.ends
    assert sum(len(batch.tokens) for batch in micro) == found.tokens
    assert max(max(batch.lengths) for batch in micro) <= 64
    assert sorted(s for batch in micro for s in batch.sample_ids) == list(range(41))
    shown = loader.examples(2)[1].pieces
    assert [on for _, on in shown] == [False, True, False]
    assert shown[1][0] == "It is so <|im_end|>"
    assert "".join(text for text, _ in shown).startswith("<|im_start|>user\nWhat is 1?")
    assert loader.digest != loader_of(renderer, [*short[:-1], long]).digest


def test_a_template_without_an_end_teaches_none(tokenizer_folder: Path, tmp_path: Path) -> None:
    renderer = Given(tokenizer_folder, OPEN_ENDED).renderer(tmp_path)
    loader = loader_of(renderer, [Conversation(TALK[1:3])])
    assert loader.supervision.ends == 0  # the preflight stops here
    assert loader.supervision.taught > 0


def test_what_teaches_nothing_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    renderer = Given(tokenizer_folder, CHATML).renderer(tmp_path)
    with pytest.raises(SteelyardError, match="none of 1 conversations teaches a token within 8"):
        loader_of(renderer, [Conversation(TALK)], max_length=8)
    with pytest.raises(UsageError, match="max_length"):
        loader_of(renderer, [Conversation(TALK)], max_length=129)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(SteelyardError, match="no chat template"):
        Renderer(tmp_path).training_tokens(TALK)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"]
