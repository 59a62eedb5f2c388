"""The workloads of several benchmarks: what people run transforms for, at the small sizes where overhead shows.

Each is built from one package's transforms (`functorch_lite`, `torch.func`), has arguments, and a floor: the same
numbers by hand, with batched operators and, where that is natural, plain autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, cross_entropy, gelu, layer_norm, linear, relu, softmax

Function = Callable[..., Any]
Parameters = dict[str, Tensor]


@dataclass(frozen=True)
class Workload:
    """What is timed."""

    name: str
    build: Callable[[Any], Function]
    arguments: tuple[Any, ...]
    by_hand: Function


def weights(*shapes: tuple[int, ...]) -> Parameters:
    """Matrices and biases, scaled by what goes in."""
    return {f"p{i}": torch.randn(shape) / max(1, shape[-1]) ** 0.5 for i, shape in enumerate(shapes)}


def copies(params: Parameters, n: int) -> Parameters:
    """One for each example, so that gradients do not mix."""
    return {name: p.expand(n, *p.shape).clone() for name, p in params.items()}


def gradients(loss: Callable[[Parameters], Tensor], params: Parameters, create_graph: bool = False) -> Parameters:
    """Plain autograd."""
    leaves = {
        name: p if create_graph and p.requires_grad else p.detach().requires_grad_() for name, p in params.items()
    }
    found = torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=create_graph)
    return dict(zip(leaves, found, strict=True))


def batched_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A layer of its own for each example: (n, ..., i), (n, o, i), (n, o)."""
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    return torch.baddbmm(bias.unsqueeze(1), rows, weight.mT).reshape(*x.shape[:-1], -1)


# -- models


def mlp(params: Parameters, x: Tensor) -> Tensor:
    return linear(torch.tanh(linear(x, params["p0"], params["p1"])), params["p2"], params["p3"])


def mlps(params: Parameters, x: Tensor) -> Tensor:
    hidden = torch.tanh(batched_linear(x, params["p0"], params["p1"]))
    return batched_linear(hidden, params["p2"], params["p3"])


def cnn(params: Parameters, image: Tensor) -> Tensor:
    x = relu(conv2d(image, params["p0"], params["p1"], padding=1))
    x = relu(conv2d(x, params["p2"], params["p3"], stride=2, padding=1))
    return linear(x.mean((-2, -1)), params["p4"], params["p5"])


def cnns(params: Parameters, images: Tensor) -> Tensor:
    n = images.shape[0]

    def grouped(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
        x = x.reshape(1, -1, *x.shape[-2:])
        y = conv2d(x, weight.flatten(0, 1), bias.flatten(), stride, padding=1, groups=n)
        return y.reshape(n, -1, *y.shape[-2:])

    x = relu(grouped(images, params["p0"], params["p1"], 1))
    x = relu(grouped(x, params["p2"], params["p3"], 2))
    return batched_linear(x.mean((-2, -1)).unsqueeze(1), params["p4"], params["p5"]).squeeze(1)


HEADS = 4


def transformer(params: Parameters, x: Tensor, layer: Function = linear) -> Tensor:
    """One layer and a linear head; ``x`` is (..., length, features)."""
    q, k, v = (
        part.unflatten(-1, (HEADS, -1)).transpose(-2, -3) for part in layer(x, params["p0"], params["p1"]).chunk(3, -1)
    )
    attended = softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v
    x = x + layer(attended.transpose(-2, -3).flatten(-2), params["p2"], params["p3"])
    x = layer_norm(x, x.shape[-1:])
    hidden = gelu(layer(x, params["p4"], params["p5"]))
    x = layer_norm(x + layer(hidden, params["p6"], params["p7"]), x.shape[-1:])
    return layer(x, params["p8"], params["p9"]).mean(-2)


def transformers(params: Parameters, x: Tensor) -> Tensor:
    return transformer(params, x, batched_linear)


# -- workloads


def per_sample_gradients(name: str, model: Function, models: Function, params: Parameters, x: Tensor) -> Workload:
    """The gradient of each example's loss."""
    n = x.shape[0]
    target = torch.randint(10, (n,))

    def loss(params: Parameters, x: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(model(params, x), target)

    def by_hand(params: Parameters, x: Tensor, target: Tensor) -> Parameters:
        return gradients(lambda p: cross_entropy(models(p, x), target, reduction="sum"), copies(params, n))

    return Workload(name, lambda api: api.vmap(api.grad(loss), (None, 0, 0)), (params, x, target), by_hand)


def shallow(params: Parameters, x: Tensor) -> Tensor:
    return (torch.tanh(params["p0"] @ x) * params["p1"]).sum()


def batched_jacobian() -> Workload:
    """Of a layer of 8, at 64 points."""
    params = weights((32, 8), (8, 32))

    def f(params: Parameters, x: Tensor) -> Tensor:
        return params["p1"] @ torch.tanh(params["p0"] @ x)

    def by_hand(params: Parameters, x: Tensor) -> Tensor:
        slope = 1 - torch.tanh(x @ params["p0"].T) ** 2
        return (params["p1"] * slope.unsqueeze(1)) @ params["p0"]

    return Workload(
        "batched Jacobian", lambda api: api.vmap(api.jacrev(f, 1), (None, 0)), (params, torch.randn(64, 8)), by_hand
    )


def _curvature(params: Parameters, x: Tensor) -> Tensor:
    t = torch.tanh(x @ params["p0"].T)
    return params["p1"] * -2 * t * (1 - t * t)


def hessian() -> Workload:
    """In a vector of 64."""

    def by_hand(params: Parameters, x: Tensor) -> Tensor:
        return params["p0"].T @ (_curvature(params, x).unsqueeze(-1) * params["p0"])

    return Workload(
        "Hessian", lambda api: api.hessian(shallow, 1), (weights((32, 64), (32,)), torch.randn(64)), by_hand
    )


def vmapped_hessian() -> Workload:
    """In vectors of 8, at 64 points."""

    def by_hand(params: Parameters, x: Tensor) -> Tensor:
        return params["p0"].T @ (_curvature(params, x).unsqueeze(-1) * params["p0"])

    return Workload(
        "vmapped Hessian",
        lambda api: api.vmap(api.hessian(shallow, 1), (None, 0)),
        (weights((32, 8), (32,)), torch.randn(64, 8)),
        by_hand,
    )


def hvp() -> Workload:
    """In a vector of 64."""

    def build(api: Any) -> Function:
        def product(params: Parameters, x: Tensor, v: Tensor) -> Tensor:
            return api.jvp(api.grad(lambda x: shallow(params, x)), (x,), (v,))[1]

        return product

    def by_hand(params: Parameters, x: Tensor, v: Tensor) -> Tensor:
        return params["p0"].T @ (_curvature(params, x) * (params["p0"] @ v))

    return Workload("HVP", build, (weights((32, 64), (32,)), torch.randn(64), torch.randn(64)), by_hand)


def ensemble_step() -> Workload:
    """A step of gradient descent of ten models."""
    params = copies(weights((32, 16), (32,), (10, 32), (10,)), 10)

    def build(api: Any) -> Function:
        def loss(params: Parameters, x: Tensor, target: Tensor) -> Tensor:
            return cross_entropy(mlp(params, x), target)

        def step(params: Parameters, x: Tensor, target: Tensor) -> Parameters:
            slope = api.grad(loss)(params, x, target)
            return {name: p - 0.1 * slope[name] for name, p in params.items()}

        return api.vmap(step, (0, None, None))

    def by_hand(params: Parameters, x: Tensor, target: Tensor) -> Parameters:
        def loss(params: Parameters) -> Tensor:
            logits = mlps(params, x.expand(10, *x.shape))
            return cross_entropy(logits.flatten(0, 1), target.repeat(10), reduction="sum") / len(target)

        slope = gradients(loss, params)
        return {name: p - 0.1 * slope[name] for name, p in params.items()}

    return Workload("ensemble step", build, (params, torch.randn(32, 16), torch.randint(10, (32,))), by_hand)


def maml_step() -> Workload:
    """The gradient through one inner step, of four tasks."""

    def build(api: Any) -> Function:
        def loss(params: Parameters, x: Tensor, y: Tensor) -> Tensor:
            return (mlp(params, x) - y).square().mean()

        def adapted_loss(params: Parameters, x: Tensor, y: Tensor) -> Tensor:
            slope = api.grad(loss)(params, x, y)
            return loss({name: p - 0.1 * slope[name] for name, p in params.items()}, x, y)

        def total(params: Parameters, x: Tensor, y: Tensor) -> Tensor:
            return api.vmap(adapted_loss, (None, 0, 0))(params, x, y).mean()

        return api.grad(total)

    def by_hand(params: Parameters, x: Tensor, y: Tensor) -> Parameters:
        def loss(params: Parameters) -> Tensor:
            return (mlps(params, x) - y).square().mean((1, 2)).sum()

        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        tasks = {name: p.expand(4, *p.shape) for name, p in leaves.items()}
        slope = gradients(loss, tasks, create_graph=True)
        total = loss({name: p - 0.1 * slope[name] for name, p in tasks.items()}) / 4
        return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))

    params = weights((32, 4), (32,), (2, 32), (2,))
    return Workload("MAML step", build, (params, torch.randn(4, 10, 4), torch.randn(4, 10, 2)), by_hand)


def ntk() -> Workload:
    """The empirical neural tangent kernel of 16 points."""

    def build(api: Any) -> Function:
        def kernel(params: Parameters, x: Tensor) -> Tensor:
            jacobian = api.vmap(api.jacrev(mlp), (None, 0))(params, x)
            return sum(torch.einsum("iap...,jap...->ij", j.unsqueeze(-1), j.unsqueeze(-1)) for j in jacobian.values())

        return kernel

    def by_hand(params: Parameters, x: Tensor) -> Tensor:
        hidden = torch.tanh(linear(x, params["p0"], params["p1"]))
        back = params["p2"] * (1 - hidden**2).unsqueeze(1)  # (point, output, hidden)
        inner = torch.einsum("iah,jah->ij", back, back)
        return inner * (x @ x.T + 1) + params["p2"].shape[0] * (hidden @ hidden.T + 1)

    return Workload("empirical NTK", build, (weights((32, 8), (32,), (3, 32), (3,)), torch.randn(16, 8)), by_hand)


def laplacian() -> Workload:
    """Of a network of two hidden layers, at 50 points, as for a physics-informed network."""

    def u(params: Parameters, x: Tensor) -> Tensor:
        hidden = torch.tanh(linear(x, params["p0"], params["p1"]))
        return (torch.tanh(linear(hidden, params["p2"], params["p3"])) * params["p4"]).sum()

    def build(api: Any) -> Function:
        return api.vmap(lambda params, x: torch.trace(api.hessian(u, 1)(params, x)), (None, 0))

    def by_hand(params: Parameters, x: Tensor) -> Tensor:
        t = torch.tanh(linear(x, params["p0"], params["p1"]))
        slope = 1 - t * t
        first = slope.unsqueeze(-1) * params["p0"]  # (point, hidden, input)
        second = -2 * t * slope * params["p0"].square().sum(-1)
        t = torch.tanh(linear(t, params["p2"], params["p3"]))
        slope = 1 - t * t
        squares = (params["p2"] @ first).square().sum(-1)
        return ((-2 * t * slope * squares + slope * (second @ params["p2"].T)) * params["p4"]).sum(-1)

    params = weights((32, 2), (32,), (32, 32), (32,), (32,))
    return Workload("PINN Laplacian", build, (params, torch.randn(50, 2)), by_hand)


def workloads() -> list[Workload]:
    """All, with the same arguments each time."""
    torch.manual_seed(0)
    d = 32
    layer = weights((3 * d, d), (3 * d,), (d, d), (d,), (2 * d, d), (2 * d,), (d, 2 * d), (d,), (10, d), (10,))
    return [
        per_sample_gradients("MLP", mlp, mlps_of_rows, weights((64, 20), (64,), (10, 64), (10,)), torch.randn(64, 20)),
        per_sample_gradients(
            "CNN",
            cnn_of_one,
            cnns,
            weights((8, 1, 3, 3), (8,), (16, 8, 3, 3), (16,), (10, 16), (10,)),
            torch.randn(32, 1, 16, 16),
        ),
        per_sample_gradients("transformer", transformer, transformers, layer, torch.randn(16, 16, d)),
        batched_jacobian(),
        hessian(),
        vmapped_hessian(),
        hvp(),
        ensemble_step(),
        maml_step(),
        ntk(),
        laplacian(),
    ]


def mlps_of_rows(params: Parameters, x: Tensor) -> Tensor:
    return mlps(params, x.unsqueeze(1)).squeeze(1)


def cnn_of_one(params: Parameters, image: Tensor) -> Tensor:
    return cnn(params, image)
