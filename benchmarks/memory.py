"""Peak bytes of gradients, Jacobians, Hessians and the shared workloads: ours beside plain PyTorch and torch.func.

Run with ``python benchmarks/memory.py``. The profiler reports every allocation and release on the CPU, temporaries of
kernels included, so the numbers are exact and repeat. What exists before the call (parameters, inputs) is not counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from measuring import peak_bytes
from torch import Tensor, nn
from workloads import workloads

import functorch_lite as fl

Params = dict[str, Tensor]
Loss = Callable[[Params], Tensor]


def _loss_of(model: nn.Module, x: Tensor) -> tuple[Loss, Params]:
    params = {name: p.detach() for name, p in model.named_parameters()}
    return lambda params: fl.functional_call(model, params, x).pow(2).mean(), params


def mlp() -> tuple[Loss, Params]:
    """Four layers of 128, batch 256."""
    layers = [layer for _ in range(4) for layer in (nn.Linear(128, 128), nn.Tanh())]
    return _loss_of(nn.Sequential(*layers), torch.randn(256, 128))


def _cnn(norm: Callable[[], nn.Module]) -> tuple[Loss, Params]:
    blocks = [layer for _ in range(3) for layer in (nn.Conv2d(16, 16, 3, padding=1), norm(), nn.ReLU())]
    return _loss_of(nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *blocks), torch.randn(8, 3, 16, 16))


def cnn_batch_norm() -> tuple[Loss, Params]:
    """Three blocks of convolution, batch norm and ReLU."""
    return _cnn(lambda: nn.BatchNorm2d(16, track_running_stats=False))


def cnn_group_norm() -> tuple[Loss, Params]:
    """Three blocks of convolution, group norm and ReLU."""
    return _cnn(lambda: nn.GroupNorm(4, 16))


def transformer() -> tuple[Loss, Params]:
    """One encoder layer of width 64, batch 8, sequence 32."""
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    return _loss_of(layer, torch.randn(8, 32, 64))


def chain() -> tuple[Loss, Params]:
    """One hundred pointwise operators."""

    def loss(params: Params) -> Tensor:
        x = params["x"]
        for _ in range(50):
            x = x.sin() * 1.01
        return x.sum()

    return loss, {"x": torch.randn(10_000)}


WORKLOADS = {
    "mlp": mlp,
    "cnn, batch norm": cnn_batch_norm,
    "cnn, group norm": cnn_group_norm,
    "transformer": transformer,
    "chain": chain,
}


def plain_gradient(loss: Loss, params: Params) -> list[Tensor | None]:
    """What a training step does."""
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    loss(leaves).backward()
    return [p.grad for p in leaves.values()]


def _gradient(loss: Loss, params: Params) -> dict[str, int]:
    return {
        "loss.backward()": peak_bytes(lambda: plain_gradient(loss, params)),
        "grad": peak_bytes(lambda: fl.grad(loss)(params)),
        "value_and_grad": peak_bytes(lambda: fl.value_and_grad(loss)(params)),
        "torch.func.grad": peak_bytes(lambda: torch.func.grad(loss)(params)),
    }


def gradients() -> dict[str, dict[str, int]]:
    """Peak bytes for each workload and each way to take the gradient."""
    torch.manual_seed(0)
    return {name: _gradient(*make()) for name, make in WORKLOADS.items()}


def _network(x: Tensor, weights: list[Tensor]) -> Tensor:
    for w in weights:
        x = (x @ w).tanh()
    return x


def _plain_jacobian(func: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    y = func(x)
    (rows,) = torch.autograd.grad(y, x, torch.eye(y.numel()).view(-1, *y.shape), is_grads_batched=True)
    return rows


def jacobians() -> dict[str, dict[str, int]]:
    """Peak bytes for each way to take a Jacobian or a Hessian."""
    torch.manual_seed(0)
    weights = [torch.randn(64, 64) / 8 for _ in range(6)]
    x = torch.randn(64)

    def vector(x: Tensor) -> Tensor:
        return _network(x, weights)

    def scalar(x: Tensor) -> Tensor:
        return _network(x, weights).pow(2).sum()

    ways: dict[str, dict[str, Any]] = {
        "jacobian": {
            "plain": lambda: _plain_jacobian(vector, x),
            "ours": lambda: fl.jacrev(vector)(x),
            "torch.func": lambda: torch.func.jacrev(vector)(x),
        },
        "jacobian, forward": {
            "ours": lambda: fl.jacfwd(vector)(x),
            "torch.func": lambda: torch.func.jacfwd(vector)(x),
        },
        "hessian": {
            "plain, reverse": lambda: torch.autograd.functional.hessian(scalar, x, vectorize=True),
            "ours": lambda: fl.hessian(scalar)(x),
            "torch.func": lambda: torch.func.hessian(scalar)(x),
        },
    }
    return {name: {way: peak_bytes(run) for way, run in row.items()} for name, row in ways.items()}


def shared_workloads() -> dict[str, dict[str, int]]:
    """Peak bytes of the workloads that other benchmarks time."""

    def peak(function: Callable[..., object], arguments: tuple[Any, ...]) -> int:
        function(*arguments)  # what is made once does not count
        return peak_bytes(lambda: function(*arguments))

    return {
        workload.name + ", larger" * larger: {
            way: peak(function, workload.arguments)
            for way, function in {
                "torch.func": workload.build(torch.func),
                "ours": workload.build(fl),
                "by hand": workload.by_hand,
            }.items()
        }
        for larger in (False, True)
        for workload in workloads(larger)
    }


def show(table: dict[str, dict[str, int]]) -> None:
    """Print kilobytes, and each entry over the first of its row."""
    for name, row in table.items():
        first = next(iter(row.values()))
        entries = "   ".join(f"{way} {bytes_ / 1e3:,.1f} kB ({bytes_ / first:.2f})" for way, bytes_ in row.items())
        print(f"{name:28}{entries}")


def main() -> None:
    """Print the tables."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    show(gradients())
    show(jacobians())
    show(shared_workloads())


if __name__ == "__main__":
    main()
