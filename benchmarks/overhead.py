"""Microseconds that a transform adds to each operator: chains of 100 small operators, ours beside torch.func.

Run with ``make bench`` or ``python benchmarks/overhead.py``. The two are timed in turns in one process, on one thread,
and the ratio is the median over the turns: absolute times drift on shared machines, the ratio much less.

Half of the operators take a Python scalar, where PyTorch's forward mode is at its slowest.

With ``--operators``, the operators of benchmarks/rules.py instead, fifty calls of each.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch
from rules import ROWS, SIZES, Row
from torch import Tensor

import functorch_lite as fl

OPERATORS = 100

#: How often `--operators` calls each of them.
CALLS = 50


def chain(x: Tensor) -> Tensor:
    """One hundred operators on a small tensor."""
    for _ in range(OPERATORS // 4):
        x = (x.sin() * 1.01).cos() + 0.5
    return x


def total(x: Tensor) -> Tensor:
    """The chain and a sum."""
    return chain(x).sum()


def compositions(api: object) -> dict[str, Callable[[Tensor], object]]:
    """The compositions that are timed, built from one package's transforms."""
    vmap, grad, jvp = api.vmap, api.grad, api.jvp
    jacrev, jacfwd, hessian = api.jacrev, api.jacfwd, api.hessian

    def summed(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: f(x).sum()

    def push(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: jvp(f, (x,), (x,))[1]

    return {
        "vmap": vmap(chain),
        "vmap of vmap": vmap(vmap(chain)),
        "grad": grad(total),
        "grad of grad": grad(summed(grad(total))),
        "grad of grad of grad": grad(summed(grad(summed(grad(total))))),
        "vmap of grad": vmap(grad(total)),
        "jvp": push(chain),
        "jvp of jvp": push(push(chain)),
        "vmap of jvp": vmap(push(chain)),
        "jacrev": lambda x: jacrev(chain)(x[0]),
        "jacfwd": lambda x: jacfwd(chain)(x[0]),
        "hessian": lambda x: hessian(total)(x[0]),
        "vmap of hessian": vmap(hessian(total)),
    }


def floors() -> dict[str, Callable[[Tensor], object]]:
    """What the same arithmetic costs without any transform."""

    def autograd(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(total(x), x)[0]

    return {"vmap": chain, "vmap of vmap": chain, "grad": autograd, "vmap of grad": autograd}


def timed(function: Callable[..., object], arguments: Sequence[Tensor], repeats: int) -> float:
    """Microseconds of a call, of the time that this thread had a processor: others that want it do not count."""
    start = time.thread_time()
    for _ in range(repeats):
        function(*arguments)
    return (time.thread_time() - start) / repeats * 1e6


def pair(
    ours: Callable[..., object], theirs: Callable[..., object], arguments: Sequence[Tensor], turns: int
) -> tuple[float, float, float]:
    """Median times of both, and the median ratio of the turns."""
    for function in (ours, theirs):
        function(*arguments)
        function(*arguments)
    repeats = max(1, int(2e4 / timed(theirs, arguments, 1)))
    times = [(timed(ours, arguments, repeats), timed(theirs, arguments, repeats)) for _ in range(turns)]
    return (
        statistics.median(a for a, _ in times),
        statistics.median(b for _, b in times),
        statistics.median(a / b for a, b in times),
    )


def operator_compositions(api: object, row: Row, argument: int, dims: tuple[int | None, ...]) -> dict[str, object]:
    """Many calls of an operator under the transforms of one package."""

    def calls(*arguments: Tensor) -> list[Tensor]:
        return [row.function(*arguments) for _ in range(CALLS)]

    def loss(*arguments: Tensor) -> Tensor:
        return torch.stack([y.sum() for y in calls(*arguments)]).sum()

    vmap = partial(api.vmap, in_dims=dims, randomness=row.randomness)
    gradient = api.grad(loss, argnums=argument)
    return {
        "vmap": vmap(lambda *arguments: calls(*arguments)[-1]),
        "grad": gradient,
        "vmap of grad": vmap(gradient),
        "grad of grad": api.grad(lambda *arguments: gradient(*arguments).sum(), argnums=argument),
    }


def print_operators(api: object, only: str, turns: int) -> None:
    """The table of ``--operators``."""
    print(f"torch {torch.__version__}, {CALLS} calls of each operator, one thread")
    print("for each composition: microseconds of a call, and the ratio to torch.func")
    ratios: dict[str, list[float]] = {}
    for row in ROWS:
        if only not in row.name:
            continue
        torch.manual_seed(0)
        batch = row.arguments(*SIZES["small"])
        dims = tuple(None if i in row.shared else 0 for i in range(len(batch)))
        example = [x if dim is None else x[0] for x, dim in zip(batch, dims, strict=True)]
        argument = next((i for i, x in enumerate(batch) if x.is_floating_point()), 0)
        is_smooth = batch[argument].is_floating_point() and row.function(*example).is_floating_point()
        ours, theirs = (operator_compositions(package, row, argument, dims) for package in (fl, api))
        line = f"{row.name:22}"
        for name in ours:
            if name != "vmap" and not is_smooth:
                continue
            arguments = batch if "vmap" in name else example
            try:
                mine, _, ratio = pair(ours[name], theirs[name], arguments, turns)
            except RuntimeError:  # torch.func cannot
                line += f"{name:>14}{'':15}"
                continue
            ratios.setdefault(name, []).append(ratio)
            line += f"{name:>14}{mine / CALLS:8.2f}{ratio:7.2f}"
        print(line, flush=True)
    for name, all_ratios in ratios.items():
        print(f"{name}: geometric mean {math.exp(statistics.fmean(map(math.log, all_ratios))):.2f}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--only", default="", help="time only the rows whose name contains this")
    parser.add_argument("--operators", action="store_true", help="single operators instead of chains")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    import torch.func as peer

    if arguments.operators:
        warnings.simplefilter("ignore")
        print_operators(peer, arguments.only, arguments.turns)
        return
    example = [torch.rand(8, 4)]
    ours, theirs, plain = compositions(fl), compositions(peer), floors()
    print(f"torch {torch.__version__}, 8x4 float32, one thread, microseconds per operator")
    print(f"{'composition':22}{'ours':>8}{'torch.func':>12}{'ratio':>8}{'floor':>8}{'ours/floor':>12}")
    ratios = []
    for name in ours:
        if arguments.only not in name:
            continue
        mine, other, ratio = pair(ours[name], theirs[name], example, arguments.turns)
        ratios.append(ratio)
        line = f"{name:22}{mine / OPERATORS:8.2f}{other / OPERATORS:12.2f}{ratio:8.2f}"
        if name in plain:
            _, floor, over = pair(ours[name], plain[name], example, arguments.turns)
            line += f"{floor / OPERATORS:8.2f}{over:12.2f}"
        print(line, flush=True)
    print(f"geometric mean of the ratios: {math.exp(statistics.fmean(map(math.log, ratios))):.2f}")


if __name__ == "__main__":
    main()
