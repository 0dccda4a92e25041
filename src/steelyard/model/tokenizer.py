"""Text to token ids and back, as the model's own tokenizer.json says.

>>> tokenizer = Tokenizer.load(Path("models/smollm2"))
>>> tokenizer.decode(tokenizer.encode("A steelyard weighs goods.", bos=False))
'A steelyard weighs goods.'
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steelyard.base.errors import FormatError, SteelyardError, require_extra
from steelyard.model.headers import read_json_object
from steelyard.model.identity import chat_template_text

if TYPE_CHECKING:
    import tokenizers

_MAX_BYTES = 64 << 20  # the largest tokenizer.json in use is under 40 MB

# Special tokens that end a turn. A model whose chat template writes one of them must stop there, also where its
# generation config forgets to say so (the first Llama 3 release did).
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>", "<|eom_id|>")


def end_of_turn_ids(special: Mapping[str, int], template: str) -> frozenset[int]:
    """Ids of the known end-of-turn tokens that are among the `special` tokens and that the chat template writes."""
    return frozenset(special[token] for token in END_OF_TURN if token in special and token in template)


def token_ids(value: Any, where: str) -> frozenset[int]:
    """A token id, a list of them or None, as a set. Raises FormatError for anything else."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(item) is int and item >= 0 for item in ids):
        raise FormatError(f"{where}: must be a token id or a list of them")
    return frozenset(ids)


class Tokenizer:
    """The tokenizer of a model folder. Make one with `load`."""

    def __init__(
        self, folder: Path, serialized: str, *, bos_id: int | None, eos_ids: frozenset[int], adds_bos: bool
    ) -> None:
        self.folder, self.bos_id, self.eos_ids, self.adds_bos = folder, bos_id, eos_ids, adds_bos
        self._serialized = serialized

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json and the settings beside it.

        Raises FormatError where tokenizer.json is missing or broken, or a special token is not in the vocabulary.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise FormatError(f"{path}: is missing: only tokenizers with a tokenizer.json are read")
        if path.stat().st_size > _MAX_BYTES:
            raise FormatError(f"{path}: is over {_MAX_BYTES:,} bytes")
        try:
            serialized = path.read_bytes().decode()
        except UnicodeDecodeError:
            raise FormatError(f"{path}: is not UTF-8: download it again") from None
        backend = _backend(path, serialized)
        settings = _optional(folder / "tokenizer_config.json")
        bos = _special_id(folder, backend, settings, "bos_token")
        eos = _special_id(folder, backend, settings, "eos_token")
        generation = folder / "generation_config.json"
        eos_ids = token_ids(_optional(generation).get("eos_token_id"), f"{generation}: eos_token_id")
        special = {
            token.content: number for number, token in backend.get_added_tokens_decoder().items() if token.special
        }
        eos_ids |= end_of_turn_ids(special, chat_template_text(folder))
        adds_bos = settings.get("add_bos_token")
        if not isinstance(adds_bos, bool):
            adds_bos = bos is not None and backend.encode("").ids[:1] == [bos]
        if eos is not None:
            eos_ids |= {eos}
        return cls(folder, serialized, bos_id=bos, eos_ids=eos_ids, adds_bos=adds_bos)

    @cached_property
    def _parsing(self) -> tokenizers.Tokenizer:
        """Reads special tokens written in the text as themselves."""
        return _backend(self.folder / "tokenizer.json", self._serialized)

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """Reads special tokens written in the text as ordinary characters."""
        backend = _backend(self.folder / "tokenizer.json", self._serialized)
        backend.encode_special_tokens = True
        return backend

    @cached_property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; the embedding may have more rows."""
        return self._parsing.get_vocab_size(with_added_tokens=True)

    @cached_property
    def special_ids(self) -> Mapping[str, int]:
        """The special tokens by text."""
        added = self._parsing.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items() if token.special}

    def structure(self) -> dict[str, Any]:
        """tokenizer.json as the library understands it, old spellings made new, without truncation and padding."""
        found: dict[str, Any] = json.loads(self._parsing.to_str())
        return found

    def post_processed(self) -> list[int]:
        """Ids that the post-processor puts before a text; with the text's own where it also puts some behind."""
        plain, whole = (self._parsing.encode("a", add_special_tokens=special).ids for special in (False, True))
        before = whole[: len(whole) - len(plain)]
        return before if [*before, *plain] == whole else whole

    def named_ids(self) -> dict[str, int]:
        """Ids of the tokens that tokenizer_config.json names: bos_token, eos_token, unk_token and pad_token."""
        settings = _optional(self.folder / "tokenizer_config.json")
        keys = ("bos_token", "eos_token", "unk_token", "pad_token")
        ids = {key: _special_id(self.folder, self._parsing, settings, key) for key in keys}
        return {key: number for key, number in ids.items() if number is not None}

    def encode(self, text: str, *, bos: bool, special: bool = False) -> list[int]:
        """Token ids of `text`, after the beginning-of-sequence token where `bos`.

        Special tokens written in `text` are ordinary characters unless `special`: what a user types can't open a turn.
        Raises SteelyardError where `bos` is asked of a tokenizer without that token.
        """
        if bos and self.bos_id is None:
            raise SteelyardError(
                f"{self.folder}: the tokenizer has no beginning-of-sequence token: encode with bos=False"
            )
        backend = self._parsing if special else self._plain
        ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if bos and self.bos_id is not None else ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special tokens written in it as ordinary characters; on every core."""
        return [found.ids for found in self._plain.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of token ids. Ids past the vocabulary (padding rows of the embedding) have no text."""
        text: str = self._parsing.decode(list(ids), skip_special_tokens=skip_special)
        return text


def _backend(path: Path, serialized: str) -> tokenizers.Tokenizer:
    try:
        import tokenizers
    except ImportError:
        raise require_extra("tokenizers", "models") from None
    try:
        backend = tokenizers.Tokenizer.from_str(serialized)
    except Exception as error:  # the library raises bare Exception
        raise FormatError(f"{path}: is not a tokenizer ({_one_line(error)}): download it again") from None
    backend.no_truncation()
    backend.no_padding()
    return backend


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _optional(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _special_id(folder: Path, backend: tokenizers.Tokenizer, settings: Mapping[str, Any], key: str) -> int | None:
    value = settings.get(key)
    token = value.get("content") if isinstance(value, dict) else value
    if token is None:
        return None
    where = f"{folder / 'tokenizer_config.json'}: {key}"
    if not isinstance(token, str):
        raise FormatError(f"{where}: must be a token's text")
    number: int | None = backend.token_to_id(token)
    if number is None:
        raise FormatError(f"{where}: {ascii(token)[:80]} is not in tokenizer.json's vocabulary")
    return number
