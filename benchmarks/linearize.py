"""Milliseconds to linearize and to replay, beside `jvp`, and what torch.func takes for the same.

Run with ``python benchmarks/linearize.py``. All are timed in turns in one process, on one thread, but
torch.func.linearize, which traces and compiles: it gets three rounds of its own. Printed are medians over the turns,
and in brackets of the ratio to one jvp of ours. "all" differentiates the parameters, the other rows the input.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import functorch_lite as fl

Function = Callable[..., Tensor]


def chain(x: Tensor) -> Tensor:
    """One hundred operators on a small tensor."""
    for _ in range(100):
        x = x.sin()
    return x


def perceptron(width: int) -> nn.Module:
    """Four layers."""
    layers = [
        nn.Linear(width, width),
        nn.Tanh(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.Tanh(),
    ]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def convolutions() -> nn.Module:
    """Two convolutions with pooling and a linear layer."""
    first = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(32, 10))


MODELS = {
    "mlp, width 32": (perceptron(32), (16, 32)),
    "mlp, width 512": (perceptron(512), (64, 512)),
    "conv net": (convolutions(), (8, 3, 32, 32)),
    "encoder layer": (nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True), (4, 32, 64)),
}


def cases() -> dict[str, tuple[Function, tuple[Tensor, ...]]]:
    """Functions and their primals."""
    result: dict[str, tuple[Function, tuple[Tensor, ...]]] = {"100 sines": (chain, (torch.randn(8, 4),))}
    for name, (model, shape) in MODELS.items():
        state = {key: parameter.detach() for key, parameter in model.named_parameters()}
        x = torch.randn(shape)

        def of_state(*tensors: Tensor, model: nn.Module = model, keys: tuple[str, ...] = tuple(state), x: Tensor = x):
            return torch.func.functional_call(model, dict(zip(keys, tensors, strict=True)), (x,))

        def of_input(x: Tensor, model: nn.Module = model, state: dict[str, Tensor] = state):
            return torch.func.functional_call(model, state, (x,))

        result[name] = of_input, (x,)
        result[f"{name}, all"] = of_state, tuple(state.values())
    return result


def calls(func: Function, primals: tuple[Tensor, ...]) -> dict[str, Callable[[], object]]:
    """What is timed, ours and torch.func's."""
    tangents = tuple(torch.randn_like(primal) for primal in primals)
    result: dict[str, Callable[[], object]] = {}
    for suffix, api in (("", fl), (" torch", torch.func)):
        try:
            replay = api.linearize(func, *primals)[1]
            api.jvp(func, primals, tangents)
        except NotImplementedError:  # torch.func has no forward mode for an operator
            continue
        result[f"jvp{suffix}"] = lambda api=api: api.jvp(func, primals, tangents)
        result[f"linearize{suffix}"] = lambda api=api: api.linearize(func, *primals)
        result[f"replay{suffix}"] = lambda replay=replay: replay(*tangents)
    return result


def times(timed: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call in each round."""
    result: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, call in timed.items():
            start = time.perf_counter()
            call()
            result[name].append((time.perf_counter() - start) * 1e3)
    return result


def cell(name: str, result: dict[str, list[float]]) -> str:
    """The median time, and the median over the rounds of its ratio to a jvp of ours."""
    if name not in result:
        return "-"
    ratios = [a / b for a, b in zip(result[name], result["jvp"], strict=False)]
    return f"{statistics.median(result[name]):.2f} ({statistics.median(ratios):.2f})"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    columns = ("jvp", "linearize", "replay", "jvp torch", "linearize torch", "replay torch")
    print(f"{'milliseconds (ratio to jvp)':28}" + "".join(f"{column:>18}" for column in columns))
    for name, (func, primals) in cases().items():
        # The backend of attention that torch.func can differentiate forward, for both.
        with sdpa_kernel(SDPBackend.MATH):
            timed = calls(func, primals)
            slow = {key: timed.pop(key) for key in ("linearize torch",) if key in timed}  # it traces and compiles
            result = times(timed, rounds) | times(slow, 3)
        cells = [cell(column, result) for column in columns]
        print(f"{name:28}" + "".join(f"{text:>18}" for text in cells), flush=True)


if __name__ == "__main__":
    main()
