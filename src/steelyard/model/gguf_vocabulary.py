"""A Hugging Face tokenizer as GGUF metadata: the way out that `gguf_tokenizer` is the way in of.

llama.cpp knows pre-tokenizers by name and has no field for most of what a tokenizer.json can say, so whatever it would
read otherwise is refused by name here. Two families, as on the way in: byte-level BPE, and SentencePiece's BPE.

    >>> vocabulary_metadata(Path("models/smollm2"), rows=49152)["tokenizer.ggml.pre"]
    'smollm'
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from steelyard.base.errors import FormatError
from steelyard.model.chat import ChatTemplate
from steelyard.model.gguf_tokenizer import BYTE, CONTROL, GPT2_WORDS, PRE_TOKENIZERS, UNKNOWN, UNUSED, USER_DEFINED
from steelyard.model.headers import MAX_GGUF_TEXT, quote
from steelyard.model.tokenizer import Tokenizer

_NORMAL = 1
# Of the names that llama.cpp has for one and the same pre-tokenizer, the one its own converter writes.
_PREFERRED = ("gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "deepseek-coder", "default")
_SPACE = "▁"


def vocabulary_metadata(folder: Path, rows: int) -> dict[str, Any]:
    """`tokenizer.*` metadata of a model folder's tokenizer and chat template; `rows`: of the embedding.

    Rows without a token get one of type "unused". Raises FormatError, naming the part, for everything that llama.cpp
    would read in another way.
    """
    tokenizer = Tokenizer.load(folder)
    parts = tokenizer.structure()
    found = _Vocabulary(folder / "tokenizer.json", parts)
    model = parts["model"]
    if model["type"] != "BPE":
        found.refuse("model", f"is {quote(model['type'])}: BPE is exported")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            found.refuse(f"model.{key}", f"is {quote(model[key])}, for which a GGUF has no place")
    tokens = found.tokens(rows)
    family = found.sentencepiece(tokens) if model["byte_fallback"] else found.byte_level()
    kinds = [found.kind(number, token) for number, token in enumerate(tokens)]
    _refuse_other_ids(found, tokenizer)
    return {
        **family,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        **_special_ids(found, tokenizer),
        "tokenizer.ggml.add_bos_token": tokenizer.adds_bos,
        "tokenizer.ggml.add_eos_token": False,
        **_chat_template(folder, tokenizer),
    }


class _Vocabulary:
    """The parts of one tokenizer.json, in the library's own spelling."""

    def __init__(self, path: Path, parts: Mapping[str, Any]) -> None:
        self.path, self.parts = path, parts
        self.added: dict[int, Mapping[str, Any]] = {entry["id"]: entry for entry in parts["added_tokens"]}
        self.unknown: str | None = parts["model"].get("unk_token")
        self.is_sentencepiece: bool = parts["model"].get("byte_fallback") is True
        self.unused: set[int] = set()  # rows of the embedding without a token

    def refuse(self, key: str, what: str) -> NoReturn:
        raise FormatError(f"{self.path}: {key}: {what}")

    def tokens(self, rows: int) -> list[str]:
        """Every token by id, rows of the embedding that no token has filled up."""
        named = {number: token for token, number in self.parts["model"]["vocab"].items()}
        named |= {number: entry["content"] for number, entry in self.added.items()}
        known = max(named, default=-1) + 1
        if known > rows:
            self.refuse("vocab", f"has {known:,} tokens for an embedding of {rows:,} rows: not this model's")
        taken = set(named.values())
        if "" in taken or len(taken) != len(named):
            self.refuse("vocab", "has an empty token, or one twice")
        for number in range(rows):
            if number not in named:
                name = f"[PAD{number}]"
                while name in taken:
                    name += "]"
                named[number] = name
                self.unused.add(number)
        self._check_added()
        return [named[number] for number in range(rows)]

    def kind(self, number: int, token: str) -> int:
        """gguf's TokenType of a token."""
        if number in self.unused:
            return UNUSED
        if (entry := self.added.get(number)) is not None:
            if not entry["special"]:
                return USER_DEFINED
            return UNKNOWN if self.is_sentencepiece and token == self.unknown else CONTROL
        return BYTE if self.is_sentencepiece and re.fullmatch("<0x[0-9A-F]{2}>", token) else _NORMAL

    def _check_added(self) -> None:
        for entry in self.added.values():
            for flag in ("single_word", "lstrip", "rstrip"):
                if entry[flag]:
                    self.refuse(f"added_tokens: {quote(entry['content'])}", f"{flag} has no place in a GGUF")
            if self.is_sentencepiece and entry["normalized"]:
                self.refuse(f"added_tokens: {quote(entry['content'])}", "normalized has no place in a GGUF")
        texts = [entry["content"] for entry in self.added.values()]
        if clash := overlapping(texts):
            self.refuse(
                "added_tokens",
                f"{quote(clash[0])} and {quote(clash[1])} may overlap in a text: llama.cpp would take the other one",
            )

    # --- byte-level BPE ---------------------------------------------------------------------------------------------

    def byte_level(self) -> dict[str, Any]:
        """Metadata of the `gpt2` family."""
        if self.parts["normalizer"] not in (None, {"type": "Sequence", "normalizers": []}):
            self.refuse("normalizer", f"{self.parts['normalizer']['type']} has no place in a GGUF of this family")
        if (self.parts["decoder"] or {}).get("type") != "ByteLevel":
            self.refuse("decoder", "must be ByteLevel")
        model = self.parts["model"]
        # Both drop a byte without a token, but the library then merges across the gap. Text has none of these bytes.
        missing = [byte for byte in range(256) if byte_letter(byte) not in model["vocab"] and not _never_in_text(byte)]
        if missing:
            self.refuse("model.vocab", f"has no token for the byte 0x{missing[0]:02X}")
        merges = [" ".join(pair) for pair in model["merges"]]
        if wrong := next((merge for merge in merges if merge.count(" ") != 1), None):
            self.refuse("model.merges", f"holds {quote(wrong)}, which is not a pair")
        return {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": self._pre_tokenizer(),
            "tokenizer.ggml.merges": merges,
        }

    def _pre_tokenizer(self) -> str:
        patterns, words = self._patterns()
        if patterns and patterns[-1] == GPT2_WORDS and not words:
            patterns, words = patterns[:-1], True
        ignore = bool(self.parts["model"]["ignore_merges"])
        known = {(pre.patterns, pre.words, pre.ignore_merges): name for name, pre in PRE_TOKENIZERS.items()}
        known |= {(pre.patterns, pre.words, pre.ignore_merges): n for n in _PREFERRED if (pre := PRE_TOKENIZERS[n])}
        name = known.get((patterns, words, ignore))
        if name is None:
            what = f"splits as {quote(patterns)}{' and then into words' if words else ''}, ignore_merges {ignore}"
            self.refuse("pre_tokenizer", f"{what}: llama.cpp has no name for it")
        return name

    def _patterns(self) -> tuple[tuple[str, ...], bool]:
        """(the patterns that isolate, in turn; whether GPT-2's own pattern follows)."""
        outer = self.parts["pre_tokenizer"] or {"type": "none"}
        steps: Sequence[Mapping[str, Any]] = outer["pretokenizers"] if outer["type"] == "Sequence" else [outer]
        if not steps or steps[-1]["type"] != "ByteLevel":
            self.refuse("pre_tokenizer", "must end with ByteLevel")
        if steps[-1]["add_prefix_space"]:
            self.refuse("pre_tokenizer", "add_prefix_space has no place in a GGUF of this family")
        patterns = []
        for step in steps[:-1]:
            if step["type"] == "Digits" and step["individual_digits"]:
                patterns.append(r"\p{N}")
            elif step["type"] == "Split" and "Regex" in step["pattern"] and _isolates(step):
                patterns.append(step["pattern"]["Regex"])
            else:
                self.refuse("pre_tokenizer", f"the step {quote(dict(step))} is not one that llama.cpp has")
        return tuple(patterns), bool(steps[-1]["use_regex"])

    # --- SentencePiece's BPE ----------------------------------------------------------------------------------------

    def sentencepiece(self, tokens: Sequence[str]) -> dict[str, Any]:
        """Metadata of the `llama` family."""
        prefix = self._space_prefix()
        known = set(tokens)
        missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in known]
        if missing:
            self.refuse("model.vocab", f"lacks <0x{missing[0]:02X}>: byte fallback needs all 256")
        if self.parts["model"]["ignore_merges"]:
            self.refuse("model.ignore_merges", "has no place in a GGUF of this family")
        return {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": self._scores(tokens),
            "tokenizer.ggml.add_space_prefix": prefix,
        }

    def _space_prefix(self) -> bool:
        """Whether each piece of text gets a space put before it. Raises FormatError for what llama.cpp cannot do."""
        normalizer, splitter, decoder = (self.parts[key] for key in ("normalizer", "pre_tokenizer", "decoder"))
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
        prepend = {"type": "Prepend", "prepend": _SPACE}
        never = {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": "never", "split": False}
        if splitter is None and normalizer == {"type": "Sequence", "normalizers": [prepend, replace]}:
            prefix = True
        elif (splitter is None and normalizer in (replace, {"type": "Sequence", "normalizers": [replace]})) or (
            splitter == never and normalizer in (None, {"type": "Sequence", "normalizers": []})
        ):
            prefix = False
        else:
            what = f"{quote(normalizer)} and {quote(splitter)}"
            self.refuse("normalizer and pre_tokenizer", f"{what}: known are spaces made {_SPACE}, with or without one")
        steps: list[Any] = [
            {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        if prefix:
            steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        if decoder != {"type": "Sequence", "decoders": steps}:
            self.refuse("decoder", f"{quote(decoder)} does not undo the normalizer")
        return prefix

    def _scores(self, tokens: Sequence[str]) -> list[float]:
        """Scores that make llama.cpp, which merges whatever neighbours spell a token, the best-scored first, do what
        the merge table says.

        Raises FormatError where the table lacks a pair that llama.cpp would merge, or ranks pairs that spell one token
        apart from each other. (Of overlapping pairs that spell the same token, llama.cpp takes the left one, the
        library the one ranked first; every converter of such vocabularies lives with that.)
        """
        symbols = set(tokens)
        merges = [(left, right) for left, right in self.parts["model"]["merges"]]
        table = set(merges)
        for token in tokens:
            for cut in range(1, len(token)):
                left, right = token[:cut], token[cut:]
                possible = (cut == 1 or left in symbols) and (cut == len(token) - 1 or right in symbols)
                if possible and (left, right) not in table:
                    self.refuse("model.merges", f"lacks {quote((left, right))}, which llama.cpp would merge")
        order: dict[str, int] = {}
        made = [left + right for left, right in merges]
        for rank, (before, token) in enumerate(pairwise(["", *made])):
            if token != before and order.setdefault(token, rank) != rank:
                self.refuse("model.merges", f"ranks the pairs that spell {quote(token)} apart: not SentencePiece's")
        position = {token: number for number, token in enumerate(order)}
        return [-float(position.get(token, len(position))) for token in tokens]


def byte_letter(byte: int) -> str:
    """The letter that stands for a byte in byte-level BPE (GPT-2, 2019): itself where Latin-1 has a visible sign."""
    visible = (range(33, 127), range(161, 173), range(174, 256))
    if any(byte in part for part in visible):
        return chr(byte)
    return chr(256 + sum(all(lower not in part for part in visible) for lower in range(byte)))


def _never_in_text(byte: int) -> bool:
    """Control characters other than tab and line ends, and lead bytes of no assigned character."""
    return (byte < 32 and byte not in b"\t\n\r") or byte in (0x7F, 0xC0, 0xC1, 0xF1, 0xF2) or byte > 0xF4


def _isolates(step: Mapping[str, Any]) -> bool:
    if step["behavior"] == "Isolated":
        return not step["invert"]
    # "Remove what does not match" isolates, where the pattern leaves nothing over.
    covering = {pattern for known in PRE_TOKENIZERS.values() for pattern in known.patterns if r"|\s+" in pattern}
    return step["behavior"] == "Removed" and step["invert"] and step["pattern"]["Regex"] in covering | {GPT2_WORDS}


def overlapping(texts: Sequence[str]) -> tuple[str, str] | None:
    """Two texts of which an occurrence may overlap so that "leftmost, then longest" (tokenizers) and "longest anywhere"
    (llama.cpp) disagree; None where there are none."""
    by_prefix: dict[str, list[str]] = {}
    for text in texts:
        for end in range(1, len(text)):
            by_prefix.setdefault(text[:end], []).append(text)
    for text in texts:
        for start in range(1, len(text)):
            for other in by_prefix.get(text[start:], ()):
                joined = text + other[len(text) - start :]
                if _leftmost(joined, texts) != _longest_first(joined, texts):
                    return text, other
    return None


def _leftmost(text: str, tokens: Sequence[str]) -> list[str]:
    pattern = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))
    return pattern.findall(text)


def _longest_first(text: str, tokens: Sequence[str]) -> list[str]:
    found, rest = [], [(0, text)]
    for token in sorted((token for token in tokens if token in text), key=len, reverse=True):
        pieces, rest = rest, []
        for start, piece in pieces:
            at = 0
            while (next_at := piece.find(token, at)) >= 0:
                found.append((start + next_at, token))
                rest.append((start + at, piece[at:next_at]))
                at = next_at + len(token)
            rest.append((start + at, piece[at:]))
    return [token for _, token in sorted(found)]


# --- special tokens and the chat template -----------------------------------------------------------------------------


def _special_ids(found: _Vocabulary, tokenizer: Tokenizer) -> dict[str, Any]:
    settings, path = tokenizer.named_ids(), tokenizer.folder / "tokenizer_config.json"
    for name, number in settings.items():
        if not found.added.get(number, {"special": False})["special"]:
            raise FormatError(f"{path}: {name}: is not a special token of tokenizer.json: mark it there")
    ends = sorted(tokenizer.eos_ids)
    if not ends:
        raise FormatError(f"{path}: eos_token: is missing: generation could never end")
    eos = settings.get("eos_token", ends[0])
    ids = {"eos": eos, "bos": settings.get("bos_token"), "padding": settings.get("pad_token")}
    ids["unknown"] = settings.get("unk_token")
    if found.is_sentencepiece and found.unknown is not None:
        ids["unknown"] = found.parts["model"]["vocab"].get(found.unknown)
    further = [number for number in ends if number != eos]
    if len(further) > 2:
        names = ", ".join(str(number) for number in ends)
        raise FormatError(f"{tokenizer.folder}: {len(ends)} tokens end a turn ({names}): a GGUF has a place for three")
    ids |= dict(zip(("eot", "eom"), further, strict=False))
    return {f"tokenizer.ggml.{name}_token_id": number for name, number in ids.items() if number is not None}


def _refuse_other_ids(found: _Vocabulary, tokenizer: Tokenizer) -> None:
    """Raise FormatError where the post-processor adds more than the beginning-of-sequence token."""
    added = tokenizer.post_processed()
    if added not in ([], [tokenizer.bos_id]):
        found.refuse("post_processor", f"adds the tokens {added}: a GGUF can only ask for one beginning-of-sequence")


def _chat_template(folder: Path, tokenizer: Tokenizer) -> dict[str, str]:
    template = ChatTemplate.load(folder)
    if template is None:
        return {}
    if len(template.text.encode()) > MAX_GGUF_TEXT:
        raise FormatError(f"{template.origin}: over {MAX_GGUF_TEXT:,} bytes: no GGUF reader takes that")
    if tokenizer.adds_bos and tokenizer.bos_id is not None:
        bos = tokenizer.decode([tokenizer.bos_id], skip_special=False)
        if not template.render([{"role": "user", "content": "x"}], add_generation_prompt=True).startswith(bos):
            raise FormatError(
                f"{template.origin}: does not begin with {quote(bos)}, which the tokenizer adds: llama.cpp would put "
                "one before each conversation: write it into the template, or set add_bos_token to false"
            )
    return {"tokenizer.chat_template": template.text}
