"""Decoding steps captured as CUDA graphs: a step is hundreds of kernels, and starting them takes longer than they do.

A graph has fixed shapes, so there is one for each bucket of rows and of table width; a step is padded up to its bucket.
Rows of padding read and write page 0, the executor's scratch page. Captured when a bucket is first met.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

from steelyard.inference.executor import Executor

# Sizes at most a third apart, so that little of a step is padding; beyond the last, steps run without a graph
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
WIDTHS = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # pages
WARM_UP = 3  # runs before capture, in which libraries choose their kernels and allocate


@dataclass
class _Step:
    """A captured step, and where it reads and writes."""

    graph: torch.cuda.CUDAGraph
    tokens: Tensor
    lengths: Tensor
    tables: Tensor
    logits: Tensor


class DecodeGraphs:
    """`Executor.decode` on CUDA, by graphs. The logits given are valid until the next call."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self._steps: dict[tuple[int, int], _Step] = {}
        self._pool = torch.cuda.graph_pool_handle()  # one for all: only one graph runs at a time

    @torch.inference_mode()
    def decode(self, tokens: Tensor, lengths: Tensor, tables: Tensor) -> Tensor:
        """As `Executor.decode`."""
        rows, width = tables.shape
        bucket = bucket_of(rows, width)
        if bucket is None:
            return self.executor.decode(tokens, lengths, tables)
        step = self._steps.get(bucket)
        if step is None:
            step = self._steps[bucket] = self._capture(*bucket)
        step.tokens[:rows] = tokens
        step.tokens[rows:] = 0
        step.lengths[:rows] = lengths
        step.lengths[rows:] = 0
        step.tables[:rows, :width] = tables
        step.tables[:rows, width:] = 0
        step.tables[rows:] = 0
        step.graph.replay()
        return step.logits[:rows]

    def _capture(self, rows: int, width: int) -> _Step:
        device = self.executor.device
        tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        tables = torch.zeros(rows, width, dtype=torch.int32, device=device)
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.executor.decode(tokens, lengths, tables)
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self.executor.decode(tokens, lengths, tables)
        return _Step(graph, tokens, lengths, tables, logits)


def bucket_of(rows: int, width: int) -> tuple[int, int] | None:
    """The smallest bucket (rows, table width) that holds a step; None where none does."""
    row, column = bisect_left(ROWS, rows), bisect_left(WIDTHS, width)
    return (ROWS[row], WIDTHS[column]) if row < len(ROWS) and column < len(WIDTHS) else None
