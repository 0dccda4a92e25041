"""The journal of a run: every generation and every score, in the order of a plan fixed before the first one.

A journal is a file of canonical JSON lines (sorted keys, no spaces, UTF-8). Line 1 is the plan. Then, for every batch
of the plan, a block of generations closed by `generated`, and a block of scores and canaries closed by `scored`. The
last line is `end` (or `stopped`, where an early stop ended a run that could not pass any more). A block is one write
and one fsync, so a crash tears at most the block in flight; each is noted in the ledger (`safety.progress`), and a
resumed run cuts back to the last one noted and goes on.

What must hold (`check_journal`), with the code of the finding otherwise:

`unfinished`       the last line is `end`, and whole.
`stopped`          the run was not stopped early.
`missing`, `duplicate`, `unknown`, `order`
                   the lines after the plan are exactly those that plan and battery call for, once each, in order.
`plan`             the plan asks every (probe, sample) of the battery once, never two sets in one batch.
`battery`, `subject`, `scorers`, `seed`
                   digests agree with their contents; every sample's seed is the one derived from battery and probe.
`length`           no completion is longer than the battery's limit; one that ended with `length` has exactly it.
`no-tokens`        token ids of prompt and completion are there (a server may hide them: then nothing can be replayed).
`score-error`      no score is an error, lacks a category or leaves [0, 1].
`canary`           every batch holds every canary of every scorer as planned (else `missing`); of a scorer's canaries
                   at least 90% came out on the right side of the threshold over the whole run, at least 75% in
                   each batch; and of no category's canaries of one kind are significantly fewer right than its card
                   lets expect (`below_card`). An error counts as wrong.
`constant-scores`  in each category the values over all canaries spread by 0.05 or more, and 20 or more different
                   completions did not all get one and the same value; a scorer that gives verdicts (0 or 1, its
                   canaries too) may find every completion innocent, or none: there the canaries alone tell.
"""

from steelyard.safety.journal.canaries import CANARIES_RIGHT, below_card, tally_canaries
from steelyard.safety.journal.checks import check_journal, identical_samples
from steelyard.safety.journal.lines import (
    Against,
    CanaryLabel,
    CanaryLine,
    Committed,
    Countersigned,
    End,
    Finding,
    Generated,
    Generation,
    Plan,
    Scored,
    ScoreLine,
    Shipped,
    Stopped,
    parse_line,
)
from steelyard.safety.journal.planned import needed_scorers, prompt_digest, sample_seed
from steelyard.safety.journal.reading import Journal, read_journal, read_plan
from steelyard.safety.journal.writing import JournalWriter

__all__ = [
    "CANARIES_RIGHT",
    "Against",
    "CanaryLabel",
    "CanaryLine",
    "Committed",
    "Countersigned",
    "End",
    "Finding",
    "Generated",
    "Generation",
    "Journal",
    "JournalWriter",
    "Plan",
    "ScoreLine",
    "Scored",
    "Shipped",
    "Stopped",
    "below_card",
    "check_journal",
    "identical_samples",
    "needed_scorers",
    "parse_line",
    "prompt_digest",
    "read_journal",
    "read_plan",
    "sample_seed",
    "tally_canaries",
]
