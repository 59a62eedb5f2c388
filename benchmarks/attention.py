"""Derivatives of attention at long sequences: peak memory and time, ours beside all scores at once and torch.func.

Run with ``python benchmarks/attention.py``. Memory is what a call allocates at its peak, temporaries of kernels
included; query, key and value, which exist before, are not counted.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from measuring import peak_bytes
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import functorch_lite as fl
from functorch_lite import _C

HEADS, FEATURES = 4, 64


def derivatives(api: object) -> dict[str, Callable[..., object]]:
    """The derivatives that are measured, as functions of query, key, value and a direction for each."""

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v).square().sum()

    gradient = api.grad(loss, argnums=(0, 1, 2))
    return {
        "jvp": lambda *args: api.jvp(F.scaled_dot_product_attention, args[:3], args[3:]),
        "grad": lambda *args: gradient(*args[:3]),
        "hvp": lambda *args: api.jvp(gradient, args[:3], args[3:]),
    }


@contextmanager
def all_scores_at_once() -> Iterator[None]:
    """Ours with the composition of plain operators for sequences of any length."""
    _C.set_attention_limits(2**62, 64)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        _C.set_attention_limits(2**21, 64)


def arguments(length: int) -> list[Tensor]:
    """Query, key, value and their directions."""
    return [torch.randn(1, HEADS, length, FEATURES) for _ in range(6)]


def measure(run: Callable[[], object]) -> tuple[float, float]:
    """Peak megabytes, and seconds in the better of two runs."""
    peak = peak_bytes(run)
    times = []
    for _ in range(2):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return peak / 1e6, min(times)


def report(run: Callable[[], object]) -> str:
    """What was measured, or that the call raises."""
    try:
        megabytes, seconds = measure(run)
    except (RuntimeError, NotImplementedError):
        return "raises"
    return f"{megabytes:7.0f} MB {seconds:6.2f} s"


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=4096)
    length = parser.parse_args().length
    torch.set_num_threads(1)
    torch.manual_seed(0)
    args = arguments(length)
    print(f"{HEADS} heads of {FEATURES}, {length} queries and keys, one thread")
    print(f"{'':6}{'ours':>20}{'all scores':>20}{'torch.func':>20}")
    for name, ours in derivatives(fl).items():
        theirs = derivatives(torch.func)[name]
        cells = [report(partial(ours, *args))]
        with all_scores_at_once():
            cells.append(report(partial(ours, *args)))
        cells.append(report(partial(theirs, *args)))
        print(f"{name:6}" + "".join(f"{cell:>20}" for cell in cells))
    lengths = [length // 4, length // 2, length, length * 2]
    print(f"\nours, megabytes\n{'':6}" + "".join(f"{n:>8}" for n in lengths))
    for name, ours in derivatives(fl).items():
        peaks = [measure(partial(ours, *arguments(n)))[0] for n in lengths]
        print(f"{name:6}" + "".join(f"{peak:8.0f}" for peak in peaks))


if __name__ == "__main__":
    main()
