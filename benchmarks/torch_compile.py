"""torch.compile of steps that call the transforms, against the same steps over torch.func: first call and steady state.

python benchmarks/torch_compile.py [backend ...]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
import torch.func
from torch import nn

import functorch_lite

torch.set_num_threads(1)
torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
MODELS = [nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1)) for _ in range(8)]
X, Y = torch.randn(64, 16), torch.randn(64, 1)

Step = tuple[Callable[..., Any], tuple[Any, ...]]


def steps(library: Any) -> dict[str, Step]:
    """Steps and their arguments."""
    vmap, grad, functional_call = library.vmap, library.grad, library.functional_call
    params = dict(NET.named_parameters())
    stacked, _ = library.stack_module_state(MODELS)

    def loss(params: Any, x: Any, y: Any) -> Any:
        return (functional_call(NET, params, (x,)) - y).square().mean()

    def member(params: Any, x: Any) -> Any:
        return functional_call(MODELS[0], params, (x,)).sum()

    return {
        "per-example gradients": (lambda p, x, y: vmap(grad(loss), (None, 0, 0))(p, x, y), (params, X, Y)),
        "gradients of an ensemble": (lambda p, x: vmap(grad(member), (0, None))(p, x), (stacked, X)),
        "Jacobians": (lambda x: vmap(library.jacrev(NET[:3]))(x), (X,)),
        "Hessians": (lambda x: vmap(library.hessian(lambda v: NET(v).sum()))(x), (X,)),
        "loss of a gradient": (lambda x: vmap(grad(lambda v: NET(v).sum()))(x).square().sum(), (X,)),
    }


def first_call(backend: str, step: Step) -> tuple[Callable[..., Any], float]:
    """The compiled step, and the seconds of its first call."""
    torch._dynamo.reset()
    function = torch.compile(step[0], backend=backend, fullgraph=True)
    start = time.perf_counter()
    function(*step[1])
    return function, time.perf_counter() - start


def seconds(function: Callable[..., Any], args: tuple[Any, ...], count: int = 20) -> float:
    """Of one call."""
    start = time.perf_counter()
    for _ in range(count):
        function(*args)
    return (time.perf_counter() - start) / count


def main(backends: list[str]) -> None:
    """Print the table of docs/performance.md."""
    print(
        "| backend | step | first call, s | over torch.func | a call, us | over torch.func |\n|---|---|---|---|---|---|"
    )
    for backend in backends:
        pairs = zip(steps(functorch_lite).items(), steps(torch.func).values(), strict=True)
        first_call(backend, (lambda x: x.sin().sum(), (X,)))  # what every process does once
        for (name, step), other in pairs:
            # In turns, for a machine is not equally fast all the time; the first round warms the compiler up.
            calls = [[first_call(backend, each) for each in (step, other)] for _ in range(2)][-1]
            rounds = [[seconds(f, step[1]) for f, _ in calls] for _ in range(9)]
            ours, theirs = (min(column) for column in zip(*rounds, strict=True))
            first, other_first = (took for _, took in calls)
            print(f"| {backend} | {name} | {first:.2f} | {other_first:.2f} | {1e6 * ours:.0f} | {1e6 * theirs:.0f} |")


if __name__ == "__main__":
    main(sys.argv[1:] or ["aot_eager", "inductor"])
