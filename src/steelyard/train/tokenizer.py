"""A tokenizer from nothing: byte-level BPE, trained on documents, saved as a Hugging Face folder.

Text is split as by GPT-2's pattern, and every digit stands alone (LLaMA, section 2: "split all numbers into individual
digits"); llama.cpp knows this splitting by the name `smollm`. All 256 bytes are tokens, so any text can be written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from steelyard.base.errors import SteelyardError, UsageError, require_extra
from steelyard.base.files import new_folder
from steelyard.base.progress import Progress, Silent

PRE = "smollm"  # the splitting's name in GGUF files
BOS, EOS, PAD, TURN, END = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (BOS, EOS, PAD, TURN, END)
"""The special tokens, ids 0 to 4: a text's beginning and end, padding, a turn's beginning and end."""

# ChatML behind the beginning of a text. A conversation looks the same to a model however it is cut into turns.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MIN_VOCABULARY = 256 + len(SPECIAL)


def train_tokenizer(
    documents: Iterable[str],
    out: Path,
    *,
    vocab_size: int,
    max_length: int,
    min_frequency: int = 2,
    progress: Progress | None = None,
) -> int:
    """Learn a vocabulary of up to `vocab_size` tokens (special ones included) from `documents`, write it to `out`.

    `max_length` is the context of the model it is for, in tokens, as tokenizer_config.json says it. Returns how many
    tokens there are: fewer than asked for where the text has no more pairs that occur `min_frequency` times. The same
    documents in the same order give the same bytes. Raises UsageError for a vocabulary too small for the bytes,
    SteelyardError where `out` exists or there is no document.
    """
    if vocab_size < MIN_VOCABULARY:
        raise UsageError(f"a vocabulary of {vocab_size}: bytes and special tokens alone are {MIN_VOCABULARY}")
    try:
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, processors, trainers
    except ImportError:
        raise require_extra("tokenizers", "models") from None
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(r"\p{N}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    count = 0

    def counted() -> Iterable[str]:
        nonlocal count
        for document in documents:
            count += 1
            yield document

    (progress or Silent()).say(f"training a tokenizer of {vocab_size:,} tokens")
    backend.train_from_iterator(counted(), trainer)
    if not count:
        raise SteelyardError("there is no document to learn a vocabulary from")
    bos = backend.token_to_id(BOS)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS}:0 $A:0", pair=f"{BOS}:0 $A:0 {BOS}:1 $B:1", special_tokens=[(BOS, bos)]
    )
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    with new_folder(out) as folder:
        (folder / "tokenizer.json").write_text(backend.to_str(pretty=False), encoding="utf-8")
        for name, value in (("tokenizer_config.json", settings | names), ("special_tokens_map.json", names)):
            (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return int(backend.get_vocab_size(with_added_tokens=True))
