"""chunk_size="auto": as many rows at once as fit into memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch

from functorch_lite import _C, _checks

_budget: ContextVar[int | None] = ContextVar("functorch_lite_memory_budget", default=None)
_CGROUP = Path("/sys/fs/cgroup")


@contextmanager
def memory_budget(nbytes: int) -> Iterator[None]:
    """Set how many bytes ``chunk_size="auto"`` may use, for the enclosed code of this thread.

    The budget is for the passes of a Jacobian and the Jacobian itself, which is there twice when its chunks are joined.
    What the function has saved for the passes comes on top. At least one row is computed at a time, whether or not it
    fits. Without a budget it is half of the memory that is available when the passes begin.

    Args:
        nbytes: A positive number of bytes.

    Returns:
        A context manager.

    Raises:
        ValueError: ``nbytes`` is not a positive int.

    Example:
        >>> import torch
        >>> from functorch_lite import jacrev, memory_budget
        >>> with memory_budget(2 * 1024**3):
        ...     jacrev(torch.sin, chunk_size="auto")(torch.zeros(2))
        tensor([[1., 0.],
                [0., 1.]])
    """
    _checks.check_memory_budget(nbytes)
    token = _budget.set(nbytes)
    try:
        yield
    finally:
        _budget.reset(token)


def rows_that_fit(one_row: Callable[[], object], total: int, device: torch.device) -> int:
    """How many of ``total`` rows to compute at once. ``one_row`` computes one, which is measured."""
    with _C.MemoryMeter(device) as meter:
        result = one_row()
        kept = meter.live
    del result
    # What stays of each row, its results and what an outer transform records, does not depend on the number at once.
    passing = max(meter.peak - kept, 1)
    budget = _budget.get()
    if budget is None:
        budget = _available(device) // 2
    return min(max((budget - total * kept) // passing, 1), max(total, 1))


def _available(device: torch.device) -> int:
    """Bytes that could be allocated now."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        _checks.refuse_unknown_memory(device)
    try:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        _checks.refuse_unknown_memory(device)
    for line in _lines(Path("/proc/meminfo")):  # counts the caches that the system would give up
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    return min(available, _left_to_container(available))


def _left_to_container(available: int) -> int:
    """What the control group of a container allows, if that limits memory at all."""
    limit, used = _lines(_CGROUP / "memory.max"), _lines(_CGROUP / "memory.current")
    if not (limit and used and limit[0].isdigit()):
        return available
    caches = [int(line.split()[1]) for line in _lines(_CGROUP / "memory.stat") if line.startswith("inactive_file ")]
    return int(limit[0]) - int(used[0]) + sum(caches)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except OSError:
        return []
