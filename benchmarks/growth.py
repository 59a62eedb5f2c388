"""How time grows: for each operator as chains get longer, for each example as batches get larger.

Run with ``make bench`` or ``python benchmarks/growth.py``. Where the time of an operator does not depend on how many
there are, a line has the same number everywhere. Ours and torch.func are timed in turns in one process, on one thread.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from measuring import Times, in_turns
from torch import Tensor

import functorch_lite as fl

LENGTHS = (10, 30, 100, 300, 1000)
BATCHES = (1, 4, 16, 64, 256, 1024, 4096)


def chain(operators: int) -> Callable[[Tensor], Tensor]:
    """That many operators on a vector, and a sum."""

    def total(x: Tensor) -> Tensor:
        for _ in range(operators // 2):
            x = x.sin() * 1.01
        return x.sum()

    return total


def transformed(api: Any, operators: int) -> dict[str, Callable[[Tensor], object]]:
    """The chain under the transforms of one package."""
    f = chain(operators)
    return {
        "vmap": api.vmap(f),
        "vmap of grad": api.vmap(api.grad(f)),
        "vmap of hessian": api.vmap(api.hessian(f)),
    }


def timed(operators: int, batch: int, turns: int) -> dict[str, Times]:
    """Both packages, for each composition."""
    x = torch.rand(batch, 4)
    ours, theirs = transformed(fl, operators), transformed(torch.func, operators)
    return {
        name: in_turns({"ours": lambda f=run: f(x), "torch.func": lambda f=theirs[name]: f(x)}, turns)
        for name, run in ours.items()
    }


def show(title: str, counts: tuple[int, ...], rows: list[dict[str, Times]], digits: int) -> None:
    """Print the time for each of ``counts``, by composition."""
    print(f"\n{title:32}" + "".join(f"{count:>9}" for count in counts))
    for name in rows[0]:
        for package in ("ours", "torch.func"):
            times = [row[name].median(package) / count for count, row in zip(counts, rows, strict=True)]
            print(f"{name + ', ' + package:32}" + "".join(f"{time:9.{digits}f}" for time in times))


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=7)
    turns = parser.parse_args().turns
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, float32, one thread")
    lengths = [timed(operators, batch=8, turns=turns) for operators in LENGTHS]
    show("us for each operator, of", LENGTHS, lengths, 2)
    batches = [timed(operators=10, batch=batch, turns=turns) for batch in BATCHES]
    show("us for each example, of", BATCHES, batches, 3)


if __name__ == "__main__":
    main()
