"""Derivatives of modules: milliseconds, ours beside torch.func in one run.

Run with ``python benchmarks/modules.py``. The two take turns in one process, on one thread; the numbers are medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import functorch_lite as fl

EXAMPLES = 8


def transformer() -> tuple[nn.Module, Tensor]:
    """One encoder layer of width 64 with 4 heads; 8 examples of 32 tokens."""
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    return layer, torch.randn(EXAMPLES, 32, 64)


def lstm() -> tuple[nn.Module, Tensor]:
    """One layer of width 64; 8 examples of 16 steps."""

    class Outputs(nn.LSTM):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[0]

    return Outputs(32, 64, batch_first=True), torch.randn(EXAMPLES, 16, 32)


def cnn() -> tuple[nn.Module, Tensor]:
    """Two convolutions with group norm, and a linear layer; 8 images of 16 by 16."""
    layers = [nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.GroupNorm(4, 16), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 12 * 12, 10)), torch.randn(EXAMPLES, 3, 16, 16)


def derivatives(api: object, module: nn.Module, xs: Tensor) -> dict[str, Callable[[], object]]:
    """The derivatives that are timed, with respect to the parameters."""
    params = {name: p.detach() for name, p in module.named_parameters()}
    ways = {name: torch.randn_like(p) for name, p in params.items()}

    def loss(params: dict[str, Tensor], xs: Tensor) -> Tensor:
        return api.functional_call(module, params, (xs,)).square().mean()

    def along(params: dict[str, Tensor]) -> Tensor:
        gradient = api.grad(loss)(params, xs)
        return sum((gradient[name] * ways[name]).sum() for name in params)

    return {
        "vmap(grad)": lambda: api.vmap(api.grad(loss), in_dims=(None, 0))(params, xs[:, None]),
        "jvp": lambda: api.jvp(lambda params: loss(params, xs), (params,), (ways,)),
        "hvp": lambda: api.jvp(lambda params: api.grad(loss)(params, xs), (params,), (ways,)),
        "double backward": lambda: api.grad(along)(params),
    }


def milliseconds(runs: dict[str, Callable[[], object]], turns: int) -> dict[str, float | None]:
    """The median of each, run in turns; none for what raises."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    raises = set()
    for turn in range(turns + 1):
        for name, run in runs.items():
            if name in raises:
                continue
            start = time.perf_counter()
            try:
                run()
            except (RuntimeError, NotImplementedError):
                raises.add(name)
            if turn > 0:  # the first is for warming up
                times[name].append(time.perf_counter() - start)
    return {name: None if name in raises else statistics.median(t) * 1e3 for name, t in times.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=15)
    turns = parser.parse_args().turns
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{'ms':30}{'ours':>10}{'torch.func':>12}{'ratio':>8}")
    for make in (transformer, lstm, cnn):
        module, xs = make()
        theirs = derivatives(torch.func, module, xs)
        for name, ours in derivatives(fl, module, xs).items():
            times = milliseconds({"ours": ours, "theirs": theirs[name]}, turns)
            cells = ["raises" if t is None else f"{t:.1f}" for t in times.values()]
            ratio = "" if None in times.values() else f"{times['ours'] / times['theirs']:.2f}"
            print(f"{make.__name__ + ' ' + name:30}{cells[0]:>10}{cells[1]:>12}{ratio:>8}")


if __name__ == "__main__":
    main()
