"""How benchmarks measure: times of several functions in turns, and peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Times:
    """Microseconds of a call of each function, in each turn."""

    turns: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Of one function."""
        return statistics.median(self.turns[name])

    def ratio(self, name: str, other: str) -> float:
        """The median of the turns' ratios: absolute times drift on shared machines, ratios much less."""
        return statistics.median(a / b for a, b in zip(self.turns[name], self.turns[other], strict=True))


def microseconds(run: Callable[[], object], repeats: int) -> float:
    """Of one call, of the time that this thread had a processor: others that want it do not count."""
    start = time.thread_time()
    for _ in range(repeats):
        run()
    return (time.thread_time() - start) / repeats * 1e6


def in_turns(runs: dict[str, Callable[[], object]], turns: int, turn_us: float = 1e4) -> Times:
    """Time functions in turns. In each, every function runs for about ``turn_us``, and once at least."""
    for run in runs.values():
        run()
        run()
    repeats = {name: max(1, int(turn_us / microseconds(run, 1))) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(turns):
        # Each comes first in its turn: what runs before leaves the caches to what runs next.
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(microseconds(runs[name], repeats[name]))
    return Times(times)


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that ``run`` has allocated on the CPU at any one time, temporaries of kernels included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
