"""Small problems, where overhead is all there is: what a call of a transform costs, and whole workloads.

Run with ``make bench`` or ``python benchmarks/small.py``. Ours, `functorch_lite.jit`, torch.func and the same by hand
are timed in turns in one process, on one thread.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from measuring import Times, in_turns
from torch import Tensor
from workloads import workloads

import functorch_lite as fl

Run = Callable[[], object]


def calls(api: Any) -> dict[str, Run]:
    """Transforms of functions that do nothing, or next to nothing."""
    number, vector, rows = torch.rand(()), torch.rand(4), torch.rand(3, 4)
    numbers, matrices = ({f"p{i}": torch.rand(shape) for i in range(6)} for shape in ((), (3, 4)))

    def same(x: Any) -> Any:
        return x

    def second(x: Any, y: Any) -> Any:
        return y

    def one_of(params: dict[str, Tensor]) -> Tensor:
        return params["p0"]

    def keyword(x: Tensor, *, scale: float) -> Tensor:
        return x

    def squares(x: Tensor) -> Tensor:
        return x * x

    def square(x: Tensor) -> Tensor:
        return x.dot(x)

    mapped, twice, of_params = api.vmap(same), api.vmap(squares), api.vmap(same)
    some, nested = api.vmap(second, (None, 0)), api.vmap(second, (dict.fromkeys(matrices, 0), None), None)
    with_keyword = api.vmap(keyword)
    slope, slopes, both = api.grad(same), api.grad(one_of), api.grad(second, argnums=(0, 1))
    rows_of, columns_of, curvature = api.jacrev(squares), api.jacfwd(squares), api.hessian(square)
    each_slope, each_curvature = api.vmap(api.grad(square)), api.vmap(api.hessian(square))
    return {
        "vmap": lambda: mapped(rows),
        "vmap, 6 parameters": lambda: of_params(matrices),
        "vmap, in_dims=(None, 0)": lambda: some(vector, rows),
        "vmap, in_dims of 6 parameters": lambda: nested(matrices, vector),
        "vmap, keyword argument": lambda: with_keyword(rows, scale=1.0),
        "vmap of x * x": lambda: twice(rows),
        "vmap, made and called": lambda: api.vmap(same)(rows),
        "grad": lambda: slope(number),
        "grad, 6 parameters": lambda: slopes(numbers),
        "grad, argnums=(0, 1)": lambda: both(number, number),
        "vjp": lambda: api.vjp(same, vector),
        "vjp and vjp_fn": lambda: api.vjp(same, vector)[1](vector),
        "jvp": lambda: api.jvp(same, (vector,), (vector,)),
        "jvp, 6 parameters": lambda: api.jvp(one_of, (numbers,), (numbers,)),
        "jacrev of x * x": lambda: rows_of(vector),
        "jacfwd of x * x": lambda: columns_of(vector),
        "hessian of x.dot(x)": lambda: curvature(vector),
        "vmap of grad of x.dot(x)": lambda: each_slope(rows),
        "vmap of hessian of x.dot(x)": lambda: each_curvature(rows),
    }


def print_calls(turns: int, only: str) -> None:
    """The table of single calls."""
    ours, theirs = calls(fl), calls(torch.func)
    print(f"{'us for a call':32}{'ours':>9}{'torch.func':>12}{'ratio':>8}")
    for name, run in ours.items():
        if only in name:
            times = in_turns({"ours": run, "theirs": theirs[name]}, turns)
            line = f"{name:32}{times.median('ours'):9.1f}{times.median('theirs'):12.1f}"
            print(f"{line}{times.ratio('ours', 'theirs'):8.2f}", flush=True)


def timed_workloads(turns: int, only: str) -> dict[str, Times]:
    """Each workload by hand, with each package's transforms, and compiled."""
    result = {}
    for workload in workloads():
        if only not in workload.name:
            continue

        def run(function: Callable[..., object], arguments: tuple[Any, ...] = workload.arguments) -> Run:
            return lambda: function(*arguments)

        ours = workload.build(fl)
        runs = {
            "by hand": workload.by_hand,
            "ours": ours,
            "torch.func": workload.build(torch.func),
            "jit": fl.jit(ours),
        }
        result[workload.name] = in_turns({name: run(function) for name, function in runs.items()}, turns)
    return result


def print_workloads(turns: int, only: str) -> None:
    """The table of workloads."""
    names = ("by hand", "ours", "torch.func", "jit")
    ratios = [("ours", "by hand"), ("torch.func", "by hand"), ("jit", "by hand"), ("ours", "torch.func")]
    header = "".join(f"{a + '/' + b:>20}" for a, b in ratios)
    print(f"\n{'us for a call':20}" + "".join(f"{name:>12}" for name in names) + header)
    rows = timed_workloads(turns, only)
    for name, times in rows.items():
        cells = "".join(f"{times.median(way):12.1f}" for way in names)
        print(f"{name:20}{cells}" + "".join(f"{times.ratio(*pair):20.2f}" for pair in ratios), flush=True)
    means = [math.exp(statistics.fmean(math.log(t.ratio(*pair)) for t in rows.values())) for pair in ratios]
    print(f"{'geometric mean':20}" + " " * 12 * len(names) + "".join(f"{mean:20.2f}" for mean in means))


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--only", default="", help="time only the rows whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, float32, one thread")
    print_calls(options.turns, options.only)
    print_workloads(options.turns, options.only)


if __name__ == "__main__":
    main()
