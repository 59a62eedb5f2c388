"""The workloads of several benchmarks: what people run transforms for, at the small sizes where overhead shows.

Each is built from one package's transforms (`functorch_lite`, `torch.func`), has arguments, and a floor: the same
numbers by hand, with batched operators and explicit derivatives. A floor computes what the transforms compute, only
without them: no Jacobian is avoided by algebra. `workloads_jax.py` has the same for JAX.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d, cross_entropy, gelu, layer_norm, linear, relu, softmax, unfold

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
    """Models that begin alike."""
    return {name: p.expand(n, *p.shape).clone() for name, p in params.items()}


def outer(a: Tensor, b: Tensor) -> Tensor:
    """The outer product of each row of ``a`` and of ``b``."""
    return a.unsqueeze(-1) * b.unsqueeze(-2)


def slope_of_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """By the logits of each example, of its own loss."""
    return softmax(logits, -1) - torch.nn.functional.one_hot(target, logits.shape[-1])


# -- models


def mlp(params: Parameters, x: Tensor) -> Tensor:
    return linear(torch.tanh(linear(x, params["p0"], params["p1"])), params["p2"], params["p3"])


def mlps(params: Parameters, x: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden layers and outputs of a model for each batch of rows."""
    hidden = torch.tanh(torch.baddbmm(params["p1"].unsqueeze(1), x, params["p0"].mT))
    return hidden, torch.baddbmm(params["p3"].unsqueeze(1), hidden, params["p2"].mT)


def slopes_of_mlps(params: Parameters, x: Tensor, hidden: Tensor, cotangent: Tensor) -> Parameters:
    """By the parameters of each model."""
    inner = (cotangent @ params["p2"]) * (1 - hidden * hidden)
    return {"p0": inner.mT @ x, "p1": inner.sum(1), "p2": cotangent.mT @ hidden, "p3": cotangent.sum(1)}


def cnn(params: Parameters, image: Tensor) -> Tensor:
    x = relu(conv2d(image, params["p0"], params["p1"], padding=1))
    x = relu(conv2d(x, params["p2"], params["p3"], stride=2, padding=1))
    return linear(x.mean((-2, -1)), params["p4"], params["p5"])


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


# -- gradients of each example's loss


def per_sample_gradients(name: str, model: Function, params: Parameters, x: Tensor, by_hand: Function) -> Workload:
    """``vmap(grad(loss))``."""

    def loss(params: Parameters, x: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(model(params, x), target)

    target = torch.randint(10, (x.shape[0],))
    return Workload(name, lambda api: api.vmap(api.grad(loss), (None, 0, 0)), (params, x, target), by_hand)


def mlp_gradients(batch: int, features: int, hidden: int) -> Workload:
    params = weights((hidden, features), (hidden,), (10, hidden), (10,))
    return per_sample_gradients("MLP", mlp, params, torch.randn(batch, features), mlp_gradients_by_hand)


def mlp_gradients_by_hand(params: Parameters, x: Tensor, target: Tensor) -> Parameters:
    """Backpropagation for the whole batch, and an outer product for each example."""
    hidden = torch.tanh(linear(x, params["p0"], params["p1"]))
    cotangent = slope_of_cross_entropy(linear(hidden, params["p2"], params["p3"]), target)
    inner = (cotangent @ params["p2"]) * (1 - hidden * hidden)
    return {"p0": outer(inner, x), "p1": inner, "p2": outer(cotangent, hidden), "p3": cotangent}


def cnn_gradients(batch: int, channels: int, size: int) -> Workload:
    shapes = ((channels, 1, 3, 3), (channels,), (2 * channels, channels, 3, 3), (2 * channels,))
    params = weights(*shapes, (10, 2 * channels), (10,))
    return per_sample_gradients("CNN", cnn, params, torch.randn(batch, 1, size, size), cnn_gradients_by_hand)


def cnn_gradients_by_hand(params: Parameters, images: Tensor, target: Tensor) -> Parameters:
    """Backpropagation for the whole batch; a kernel's gradient is unfolded input times cotangent of the output."""
    n = len(images)
    first = conv2d(images, params["p0"], params["p1"], padding=1)
    x = relu(first)
    second = conv2d(x, params["p2"], params["p3"], stride=2, padding=1)
    pooled = relu(second).mean((-2, -1))
    cotangent = slope_of_cross_entropy(linear(pooled, params["p4"], params["p5"]), target)
    area = second.shape[-1] * second.shape[-2]
    above = (cotangent @ params["p4"] / area)[..., None, None] * (second > 0)
    below = conv_transpose2d(above, params["p2"], stride=2, padding=1, output_padding=1) * (first > 0)
    return {
        "p0": (below.flatten(2) @ unfold(images, 3, padding=1).mT).view(n, *params["p0"].shape),
        "p1": below.sum((-2, -1)),
        "p2": (above.flatten(2) @ unfold(x, 3, padding=1, stride=2).mT).view(n, *params["p2"].shape),
        "p3": above.sum((-2, -1)),
        "p4": outer(cotangent, pooled),
        "p5": cotangent,
    }


def transformer_gradients(batch: int, length: int, d: int) -> Workload:
    layer = weights((3 * d, d), (3 * d,), (d, d), (d,), (2 * d, d), (2 * d,), (d, 2 * d), (d,), (10, d), (10,))
    x = torch.randn(batch, length, d)
    return per_sample_gradients("transformer", transformer, layer, x, transformer_gradients_by_hand)


def transformer_gradients_by_hand(params: Parameters, x: Tensor, target: Tensor) -> Parameters:
    """Plain autograd finds the cotangents of what linear layers return, times what went into them."""
    names = {id(p): name for name, p in params.items()}
    layers = []

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = linear(x, weight, bias)
        layers.append((names[id(weight)], names[id(bias)], x.detach(), y))
        return y

    loss = cross_entropy(transformer(params, x.detach().requires_grad_(), layer), target, reduction="sum")
    cotangents = torch.autograd.grad(loss, [y for *_, y in layers])
    slopes = {}
    for (weight, bias, x, _), cotangent in zip(layers, cotangents, strict=True):
        slopes[weight] = cotangent.mT @ x
        slopes[bias] = cotangent.sum(1)
    return slopes


# -- Jacobians and Hessians


def batched_jacobian(points: int, features: int, hidden: int) -> Workload:
    """Of a network with one hidden layer."""

    def f(params: Parameters, x: Tensor) -> Tensor:
        return params["p1"] @ torch.tanh(params["p0"] @ x)

    def by_hand(params: Parameters, x: Tensor) -> Tensor:
        """The chain rule: a product of three matrices, of which one is diagonal."""
        t = torch.tanh(x @ params["p0"].T)
        return (params["p1"] * (1 - t * t).unsqueeze(1)) @ params["p0"]

    arguments = weights((hidden, features), (features, hidden)), torch.randn(points, features)
    return Workload("batched Jacobian", lambda api: api.vmap(api.jacrev(f, 1), (None, 0)), arguments, by_hand)


def shallow(params: Parameters, x: Tensor) -> Tensor:
    return (torch.tanh(params["p0"] @ x) * params["p1"]).sum()


def curvature_of_shallow(params: Parameters, x: Tensor) -> Tensor:
    """By what goes into each hidden unit."""
    t = torch.tanh(x @ params["p0"].T)
    return params["p1"] * -2 * t * (1 - t * t)


def hessian_of_shallow(params: Parameters, x: Tensor) -> Tensor:
    """The chain rule: a product of three matrices, of which one is diagonal."""
    return params["p0"].T @ (curvature_of_shallow(params, x).unsqueeze(-1) * params["p0"])


def hessian(features: int, hidden: int) -> Workload:
    """In one vector."""
    arguments = weights((hidden, features), (hidden,)), torch.randn(features)
    return Workload("Hessian", lambda api: api.hessian(shallow, 1), arguments, hessian_of_shallow)


def vmapped_hessian(points: int, features: int, hidden: int) -> Workload:
    """In many vectors."""
    arguments = weights((hidden, features), (hidden,)), torch.randn(points, features)
    build = lambda api: api.vmap(api.hessian(shallow, 1), (None, 0))  # noqa: E731
    return Workload("vmapped Hessian", build, arguments, hessian_of_shallow)


def hvp(features: int, hidden: int) -> Workload:
    """Forward over reverse mode."""

    def build(api: Any) -> Function:
        def product(params: Parameters, x: Tensor, v: Tensor) -> Tensor:
            return api.jvp(lambda x: api.grad(shallow, 1)(params, x), (x,), (v,))[1]

        return product

    def by_hand(params: Parameters, x: Tensor, v: Tensor) -> Tensor:
        """The chain rule, from right to left."""
        return params["p0"].T @ (curvature_of_shallow(params, x) * (params["p0"] @ v))

    arguments = weights((hidden, features), (hidden,)), torch.randn(features), torch.randn(features)
    return Workload("HVP", build, arguments, by_hand)


def laplacian(points: int, hidden: int) -> Workload:
    """The trace of the Hessian of a network of two hidden layers, as for a physics-informed network."""

    def u(params: Parameters, x: Tensor) -> Tensor:
        inner = torch.tanh(linear(x, params["p0"], params["p1"]))
        return (torch.tanh(linear(inner, params["p2"], params["p3"])) * params["p4"]).sum()

    def build(api: Any) -> Function:
        return api.vmap(lambda params, x: torch.trace(api.hessian(u, 1)(params, x)), (None, 0))

    def by_hand(params: Parameters, x: Tensor) -> Tensor:
        """The second derivative along each axis, in forward mode twice, and their sum."""
        t = torch.tanh(linear(x, params["p0"], params["p1"])).unsqueeze(1)  # (point, axis, hidden)
        slope = 1 - t * t
        first = slope * params["p0"].T
        second = -2 * t * first * params["p0"].T
        t = torch.tanh(linear(t, params["p2"], params["p3"]))
        slope = 1 - t * t
        first, second = first @ params["p2"].T, second @ params["p2"].T
        return ((slope * (second - 2 * t * first * first)) @ params["p4"]).sum(1)

    params = weights((hidden, 2), (hidden,), (hidden, hidden), (hidden,), (hidden,))
    return Workload("PINN Laplacian", build, (params, torch.randn(points, 2)), by_hand)


def ntk(points: int, features: int, hidden: int) -> Workload:
    """The empirical neural tangent kernel, summed over outputs."""

    def build(api: Any) -> Function:
        def kernel(params: Parameters, x: Tensor) -> Tensor:
            jacobian = api.vmap(api.jacrev(mlp), (None, 0))(params, x)
            return sum(j.flatten(1) @ j.flatten(1).T for j in jacobian.values())

        return kernel

    def by_hand(params: Parameters, x: Tensor) -> Tensor:
        """The Jacobian of each point by each parameter, and their products."""
        t = torch.tanh(linear(x, params["p0"], params["p1"]))
        inner = params["p2"] * (1 - t * t).unsqueeze(1)  # (point, output, hidden)
        eye = torch.eye(params["p2"].shape[0]).expand(len(x), -1, -1)
        last = eye.unsqueeze(-1) * t[:, None, None, :]
        jacobian = torch.cat([outer(inner, x.unsqueeze(1)).flatten(1), inner.flatten(1), last.flatten(1)], 1)
        return jacobian @ jacobian.T + eye.flatten(1) @ eye.flatten(1).T

    arguments = weights((hidden, features), (hidden,), (3, hidden), (3,)), torch.randn(points, features)
    return Workload("empirical NTK", build, arguments, by_hand)


# -- steps


def ensemble_step(models: int, batch: int, features: int, hidden: int) -> Workload:
    """A step of gradient descent of each model."""

    def build(api: Any) -> Function:
        def loss(params: Parameters, x: Tensor, target: Tensor) -> Tensor:
            return cross_entropy(mlp(params, x), target)

        def step(params: Parameters, x: Tensor, target: Tensor) -> Parameters:
            slope = api.grad(loss)(params, x, target)
            return {name: p - 0.1 * slope[name] for name, p in params.items()}

        return api.vmap(step, (0, None, None))

    def by_hand(params: Parameters, x: Tensor, target: Tensor) -> Parameters:
        """Backpropagation with products of batches of matrices."""
        rows = x.expand(len(params["p0"]), -1, -1)
        inner, logits = mlps(params, rows)
        slope = slopes_of_mlps(params, rows, inner, slope_of_cross_entropy(logits, target) / len(target))
        return {name: p - 0.1 * slope[name] for name, p in params.items()}

    params = copies(weights((hidden, features), (hidden,), (10, hidden), (10,)), models)
    return Workload(
        "ensemble step", build, (params, torch.randn(batch, features), torch.randint(10, (batch,))), by_hand
    )


def maml_step(tasks: int, batch: int, features: int, hidden: int) -> Workload:
    """The gradient through one inner step."""

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
        """Backpropagation of the adapted loss, and a Hessian-vector product of the first one."""
        n, scale = len(x), 2 / y[0].numel()
        inner = torch.tanh(linear(x, params["p0"], params["p1"]))
        cotangent = scale * (linear(inner, params["p2"], params["p3"]) - y)
        slope = slopes_of_mlps(params, x, inner, cotangent)
        adapted = {name: p - 0.1 * slope[name] for name, p in params.items()}
        hidden, outputs = mlps(adapted, x)
        v = slopes_of_mlps(adapted, x, hidden, (scale / n) * (outputs - y))
        # The gradient v of each task, less 0.1 times the Hessian of its first loss times v: a derivative along v.
        curved = 1 - inner * inner
        along = torch.baddbmm(v["p1"].unsqueeze(1), x, v["p0"].mT) * curved
        cotangent_along = scale * (torch.baddbmm(v["p3"].unsqueeze(1), inner, v["p2"].mT) + along @ params["p2"].T)
        back = cotangent @ params["p2"]
        inner_along = (cotangent_along @ params["p2"] + cotangent @ v["p2"]) * curved - 2 * inner * along * back
        rows, columns = x.flatten(0, 1), inner.flatten(0, 1)
        along, cotangent, cotangent_along, inner_along = (
            value.flatten(0, 1) for value in (along, cotangent, cotangent_along, inner_along)
        )
        product = {
            "p0": inner_along.T @ rows,
            "p1": inner_along.sum(0),
            "p2": cotangent_along.T @ columns + cotangent.T @ along,
            "p3": cotangent_along.sum(0),
        }
        return {name: v[name].sum(0) - 0.1 * product[name] for name in params}

    params = weights((hidden, features), (hidden,), (2, hidden), (2,))
    return Workload(
        "MAML step", build, (params, torch.randn(tasks, batch, features), torch.randn(tasks, batch, 2)), by_hand
    )


def workloads(larger: bool = False) -> list[Workload]:
    """All, with the same arguments each time. The ``larger`` ones are those where kernels take most of the time."""
    torch.manual_seed(0)
    if larger:
        return [
            mlp_gradients(256, 128, 256),
            cnn_gradients(128, 16, 32),
            transformer_gradients(64, 64, 64),
            batched_jacobian(512, 32, 256),
            hessian(512, 512),
            vmapped_hessian(256, 32, 256),
            hvp(1024, 1024),
            ensemble_step(20, 256, 64, 256),
            maml_step(16, 64, 32, 128),
            ntk(128, 16, 128),
            laplacian(2000, 64),
        ]
    return [
        mlp_gradients(64, 20, 64),
        cnn_gradients(32, 8, 16),
        transformer_gradients(16, 16, 32),
        batched_jacobian(64, 8, 32),
        hessian(64, 32),
        vmapped_hessian(64, 8, 32),
        hvp(64, 32),
        ensemble_step(10, 32, 16, 32),
        maml_step(4, 10, 4, 32),
        ntk(16, 8, 32),
        laplacian(50, 32),
    ]
