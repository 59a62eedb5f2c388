"""Microseconds that a transform adds to each operator: chains of 100 small operators, ours beside torch.func.

Run with ``make bench`` or ``python benchmarks/overhead.py``. The two are timed in turns in one process, on one thread,
and the ratio is the median over the turns: absolute times drift on shared machines, the ratio much less.

Half of the operators take a Python scalar, where PyTorch's forward mode is at its slowest.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import functorch_lite as fl

OPERATORS = 100


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


def timed(function: Callable[[Tensor], object], x: Tensor, repeats: int) -> float:
    """Microseconds per operator of the chain."""
    start = time.perf_counter()
    for _ in range(repeats):
        function(x)
    return (time.perf_counter() - start) / repeats / OPERATORS * 1e6


def pair(
    ours: Callable[[Tensor], object], theirs: Callable[[Tensor], object], turns: int
) -> tuple[float, float, float]:
    """Median times of both, and the median ratio of the turns."""
    x = torch.rand(8, 4)
    for function in (ours, theirs):
        function(x)
        function(x)
    repeats = max(1, int(2e-2 / (timed(theirs, x, 1) * OPERATORS * 1e-6)))
    times = [(timed(ours, x, repeats), timed(theirs, x, repeats)) for _ in range(turns)]
    return (
        statistics.median(a for a, _ in times),
        statistics.median(b for _, b in times),
        statistics.median(a / b for a, b in times),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--only", default="", help="time only the rows whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    import torch.func as peer

    ours, theirs, plain = compositions(fl), compositions(peer), floors()
    print(f"torch {torch.__version__}, 8x4 float32, one thread, microseconds per operator")
    print(f"{'composition':22}{'ours':>8}{'torch.func':>12}{'ratio':>8}{'floor':>8}{'ours/floor':>12}")
    ratios = []
    for name in ours:
        if arguments.only not in name:
            continue
        mine, other, ratio = pair(ours[name], theirs[name], arguments.turns)
        ratios.append(ratio)
        line = f"{name:22}{mine:8.2f}{other:12.2f}{ratio:8.2f}"
        if name in plain:
            _, floor, over = pair(ours[name], plain[name], arguments.turns)
            line += f"{floor:8.2f}{over:12.2f}"
        print(line, flush=True)
    print(f"geometric mean of the ratios: {math.exp(statistics.fmean(map(math.log, ratios))):.2f}")


if __name__ == "__main__":
    main()
