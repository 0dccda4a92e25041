"""SFT and DPO compute what TRL computes: loss and gradient norm on fixed batches, from the same rows on disk."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TEMPLATE, tiny_folder

from steelyard.base.progress import Silent
from steelyard.inference.endpoint import Message
from steelyard.model.chat import Renderer
from steelyard.model.llama import load_llama
from steelyard.train.chat_data import chat_loader
from steelyard.train.conversations import Conversation, Preference
from steelyard.train.dpo import DPO, DPOOptions, reference_log_probs
from steelyard.train.losses import CrossEntropy
from steelyard.train.pairs import assemble_pairs, render_pairs

trl = pytest.importorskip("trl", reason="trl is the oracle: pip install 'steelyard[dev]'")

CHATS = [
    Conversation((Message("user", "How are you?"), Message("assistant", "Very well."))),
    Conversation(
        (
            Message("system", "Be brief."),
            Message("user", "Hi"),
            Message("assistant", "Hello!"),
            Message("user", "Tell me more about it"),
            Message("assistant", "No."),
        )
    ),
    Conversation((Message("user", "1+1?"), Message("assistant", "2, as everybody knows who has learned to count"))),
]
PAIRS = [
    Preference((Message("user", "How are you?"),), "Very well, thank you.", "No."),
    Preference((Message("user", "Hi"), Message("assistant", "Hello!"), Message("user", "Bye")), "See you", "Never!"),
    Preference((Message("system", "Be brief."), Message("user", "2+2?")), "4", "It is a hard question: five."),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A policy and a reference."""
    place = tmp_path_factory.mktemp("trl")
    return tiny_folder(place / "policy", seed=1), tiny_folder(place / "reference", seed=2)


def theirs(trainer: Any) -> tuple[float, float]:
    """Loss and gradient norm of the trainer's first batch."""
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return float(loss.detach()), norm(trainer.model.parameters())


def norm(parameters: Iterable[torch.Tensor]) -> float:
    return float(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm())


def common(tmp_path: Path) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none", "max_length": None,
        "per_device_train_batch_size": 3, "gradient_checkpointing": False, "disable_tqdm": True,
    }  # fmt: skip


def test_sft_equals_trl(folders: tuple[Path, Path], tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    # the same text; TRL finds the answers by marks in the template
    answer = "message['content'] + '<|im_end|>'"
    marked = "{% generation %}{{ " + answer + " }}{% endgeneration %}"
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}"
        + marked
        + "{% else %}{{ "
        + answer
        + " }}{% endif %}{{ '\n' }}{% endfor %}"
    )
    rows = [{"messages": [vars(message) for message in chat.messages]} for chat in CHATS]
    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32),
        args=trl.SFTConfig(**common(tmp_path), assistant_only_loss=True),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    loss, size = theirs(trainer)
    model = load_llama(folders[0]).requires_grad_(True)
    (batch,) = chat_loader(
        CHATS, Renderer(folders[0]), tokens_per_micro_batch=512, micro_batches_per_step=1, seed=0, max_length=512
    ).step(0)
    found = CrossEntropy().loss(model, batch)
    (found.total / found.count).backward()
    assert float(found.total.detach()) / found.count == pytest.approx(loss, rel=1e-3)
    assert norm(model.parameters()) == pytest.approx(size, rel=1e-3)
    assert TEMPLATE in (folders[0] / "chat_template.jinja").read_text()


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, DPOOptions(beta=0.1)),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, DPOOptions(beta=0.3, sft_weight=0.5)),
        ({"loss_type": ["sigmoid_norm"]}, DPOOptions(beta=2.0, length_normalised=True)),
    ],
    ids=["sigmoid", "with-sft", "length-normalised"],
)
def test_dpo_equals_trl(
    folders: tuple[Path, Path], tmp_path: Path, settings: dict[str, Any], options: DPOOptions
) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # TRL's SFT term is a mean over the batch's tokens, so that splitting the batch changes it; ours is one over pairs
    chosen = PAIRS[:1] if options.sft_weight else PAIRS
    rows = [
        {
            "prompt": [vars(message) for message in pair.prompt],
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
        }
        for pair in chosen
    ]
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    # TRL also learns the line end that the template writes behind an answer, which is nobody's to say
    tokenizer.chat_template = TEMPLATE.replace("+ '\n' }}", "}}{% if not loop.last %}{{ '\n' }}{% endif %}")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% if add_generation_prompt %}{{ '", "{% if add_generation_prompt %}{{ '\n"
    )
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders)
    trainer = trl.DPOTrainer(
        model=policy,
        ref_model=reference,
        args=trl.DPOConfig(**common(tmp_path), beta=options.beta, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    loss, size = theirs(trainer)
    pairs, _ = render_pairs(chosen, Renderer(folders[0]), 512, Silent())
    model = load_llama(folders[0]).requires_grad_(True)
    objective = DPO(options, reference_log_probs(load_llama(folders[1]), pairs, progress=Silent()))
    found = objective.loss(model, assemble_pairs(pairs, range(len(pairs))))
    (found.total / found.count).backward()
    assert float(found.total.detach()) / found.count == pytest.approx(loss, rel=1e-3)
    assert norm(model.parameters()) == pytest.approx(size, rel=1e-3)
