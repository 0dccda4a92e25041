"""Documents that begin alike and are computed once give what separate documents give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from steelyard.model.llama import Llama, LlamaConfig
from steelyard.model.shared import WORTH, SharedStarts

CONFIG = LlamaConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    initializer_range=0.3,
)
SYSTEM, OTHER = [3] * 10 + [4, 5], [7, 8, 9] * 4


def flat(documents: list[list[int]], behind: list[int]) -> tuple[Tensor, Tensor, list[int], Tensor]:
    """Tokens, positions, lengths, and what is wanted: a document's tokens from `behind` on."""
    tokens = torch.tensor([token for document in documents for token in document])
    positions = torch.cat([torch.arange(len(document)) for document in documents])
    wanted = torch.cat([torch.arange(len(d)) >= b for d, b in zip(documents, behind, strict=True)])
    return tokens, positions, [len(document) for document in documents], wanted


def learn(model: Llama, hidden: Tensor, wanted: Tensor, target: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss = (hidden[wanted] - target).square().sum()
    loss.backward()  # type: ignore[no-untyped-call]
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    ("documents", "behind", "saved"),
    [
        ([[*SYSTEM, 1, 2], [*SYSTEM, 6], [*SYSTEM, 1, 9, 9]], [13, 12, 13], 24),
        ([[*SYSTEM, 1], [*OTHER, 1, 2], [*SYSTEM, 6], [*OTHER, 3], [1, 2, 3]], [12, 13, 12, 12, 2], 24),
        ([[*SYSTEM, 1, 2], SYSTEM, [*SYSTEM, 6, 7]], [13, 11, 12], 22),  # one is all start: it keeps its last token
        ([[*SYSTEM, 1, 2]] * 3, [12] * 3, 24),  # the same document again: what is wanted is its own each time
        ([[*SYSTEM, 1, 2], [*SYSTEM, 6], [*SYSTEM, 5]], [13, 9, 12], 18),  # shared up to what the second one wants
        ([[*SYSTEM, 1], [*SYSTEM[: WORTH - 1], 6, 6], [1]], [12, 7, 0], 0),  # too little in common
        ([[*SYSTEM, 1], [*SYSTEM, 6]], [0, 0], 0),  # everything is wanted: pretraining
    ],
)
def test_outputs_and_gradients_are_those_of_separate_documents(
    documents: list[list[int]], behind: list[int], saved: int
) -> None:
    model = Llama(CONFIG).initialise(1)
    tokens, positions, lengths, wanted = flat(documents, behind)
    shared = SharedStarts(tokens, lengths, wanted)
    assert len(tokens) - len(shared.rows) == saved
    assert set(wanted.nonzero()[:, 0].tolist()) <= set(shared.rows.tolist())  # nothing wanted is lost
    target = torch.randn(int(wanted.sum()), CONFIG.hidden_size, generator=torch.Generator().manual_seed(2))
    theirs = learn(model, model.packed(tokens, positions, lengths), wanted, target)
    rows = shared.rows
    mine = learn(model, model.packed(tokens[rows], positions[rows], shared), wanted[rows], target)
    for ours, plain in zip(mine, theirs, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
