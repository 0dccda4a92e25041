"""How the report says things, in HTML as in Markdown: states, rates, differences, and text that is not trusted."""

from __future__ import annotations

from collections.abc import Sequence

from steelyard.safety.criteria import Status
from steelyard.safety.paired import Difference, PredecessorView, Said

SIGNS: dict[Status, str] = {"PASS": "✓", "FAIL": "✕", "INCONCLUSIVE": "?", "INCOMPLETE": "–"}
SAID: dict[Status, str] = {
    "PASS": "every criterion is met",
    "FAIL": "at least one criterion is surely not met",
    "INCONCLUSIVE": "too few samples to tell for at least one criterion",
    "INCOMPLETE": "the test is not whole, so it says nothing",
}
NOTE = (
    "What each policy's criteria say. The release gate decides: it also looks at the model, ledger, keys and age. "
    "A PASS bounds how often the model failed on this battery's kind of prompts, against limits that the policy chose. "
    "It says nothing about other prompts, attacks, or what becomes of the model after more training."
)
MEANS = {
    "toxicity": "texts that are rude, insulting or hateful in tone",
    "identity_attack": "texts that attack people for what they are: origin, religion, gender, disability and the like",
    "threat": "texts that threaten or call for violence",
    "sexual": "sexual texts",
    "harm.compliance": "answers to harmful requests that do not decline",
    "harm.help": "answers that help with a harmful request",
    "refusal.benign": "harmless requests, worded like harmful ones, that were declined",
    "refusal.benign_full": "the same, declined in full",
    "refusal.group": "harmless requests about a group of people that were declined",
    "refusal.group_gap": "the largest difference in refusals between two groups, asked the same",
    "toxicity.group_gap": "the largest difference in toxic answers between two groups, asked the same",
    "truth.incorrect": "wrong answers to questions whose answer is known",
    "output.empty": "answers that say nothing",
}
_WHERE = {"chat": "in answers to requests", "degeneration": "in continuations of openings that tempt to it"}
LONGEST = 1000  # characters of any one text: what is longer was never meant for a reader
_WORDS: tuple[Said, ...] = ("improved", "worse", "undecided", "not measured")

# What is invisible, or changes the order in which its neighbours are read, is shown by its number: control characters,
# bidirectional marks, embeddings and isolates, zero-width spaces, tags, and lone surrogates, which have no UTF-8. Left
# alone: tab and newline, and the two joiners that scripts and emoji are written with.
_HIDDEN = (
    *((0x00, 0x08), (0x0B, 0x1F), (0x7F, 0x9F), (0xAD, 0xAD), (0x061C, 0x061C), (0x180E, 0x180E), (0x200B, 0x200B)),
    *((0x200E, 0x200F), (0x2028, 0x202E), (0x2060, 0x206F), (0xFEFF, 0xFEFF), (0xFFF9, 0xFFFB), (0xD800, 0xDFFF)),
    (0xE0000, 0xE007F),
)
_SHOWN = {code: f"⟨U+{code:04X}⟩" for first, last in _HIDDEN for code in range(first, last + 1)}


def meaning(metric: str) -> str | None:
    """What a metric of the packaged batteries counts, in plain words; None for one of somebody's own."""
    if metric in MEANS:
        return MEANS[metric]
    what, _, where = metric.partition(".")
    return f"{MEANS[what]}, {_WHERE[where]}" if what in MEANS and where in _WHERE else None


def visible(value: str) -> str:
    """`value`, cut to `LONGEST` characters, with every hidden character shown by its number, `⟨U+202E⟩`."""
    return (value if len(value) <= LONGEST else value[:LONGEST] + "…").translate(_SHOWN)


def percent(value: float | None) -> str:
    if value is None:
        return "not measured"
    return f"{value:.2%}" if abs(value) < 0.1 else f"{value:.1%}"


def signed(value: float | None) -> str:
    """A difference in points of a percent."""
    return "not measured" if value is None else f"{value * 100:+.2f} pt"


def in_words(differences: Sequence[Difference]) -> str:
    """`Improved: a, b. Worse: none. Undecided: c.`"""
    names = {said: [one.metric for one in differences if one.said == said] for said in _WORDS}
    shown = [said for said in _WORDS if names[said] or said in ("improved", "worse")]
    return " ".join(f"{said.capitalize()}: {', '.join(names[said]) or 'none'}." for said in shown)


def whose(before: PredecessorView) -> str:
    """Which run the predecessor's is; the digest in Markdown's and nobody else's code marks."""
    made = "taken from an earlier job: same subject, battery, scorers, code and engine" if before.reused else "this job"
    return f"{before.subject.dtype}; run {before.run}, {made}"
