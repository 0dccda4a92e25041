"""How much memory the key/value cache may take."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import torch

from steelyard.base.errors import SteelyardError, UsageError
from steelyard.inference.executor import PAGE, Executor
from steelyard.model.llama import LlamaConfig

SHARE = 4  # the cache takes at most 1 / SHARE of the machine's memory unless told otherwise
_CGROUP = Path("/sys/fs/cgroup/memory.max")


def cache_pages(
    config: LlamaConfig, dtype: torch.dtype, device: torch.device, rows: int, cache_bytes: int | None
) -> int:
    """Number of pages, the scratch page included, for a budget in bytes.

    None: a quarter of the machine's memory (of the device's, or of the container's limit), at most what `rows`
    sequences of the model's whole context need. It is taken from what the machine has, not from what is free at the
    moment, so that the same work is done by the same steps another time. On a CPU it is taken page by page as it is
    used. Raises UsageError for under two pages, and for more than the machine has.
    """
    page = Executor.bytes_per_page(config, dtype)
    wanted = rows * -(-config.max_position_embeddings // PAGE) + 1
    memory = memory_bytes(device)
    if cache_bytes is None:
        return max(min(wanted, memory // SHARE // page), 2)
    if cache_bytes > memory:
        raise UsageError(f"cache_bytes {cache_bytes:,}: this {device.type} has {memory:,} bytes of memory in all")
    if cache_bytes < 2 * page:
        raise UsageError(f"cache_bytes {cache_bytes:,}: one page of {PAGE} tokens takes {page:,} bytes; give 2 or more")
    return min(wanted, cache_bytes // page)


def memory_bytes(device: torch.device) -> int:
    """Memory of the device; on a CPU that of the machine, or the limit of the container if that is lower."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = _CGROUP.read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def out_of_memory(error: BaseException) -> bool:
    """Whether torch says that memory ran out. On a CPU it has no exception of its own for that."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):
        return isinstance(error, torch.OutOfMemoryError) or ("alloc" in str(error) and "memory" in str(error))
    return isinstance(error, MemoryError)


def memory_error(what: str, rows: int, pages: int, page_bytes: int) -> SteelyardError:
    """The error for memory that ran out: names the settings that help."""
    return SteelyardError(
        f"out of memory {what}: the cache of {pages * page_bytes:,} bytes (cache_bytes) and a batch of {rows} "
        "(rows) are too much for this machine: lower one of them"
    )
