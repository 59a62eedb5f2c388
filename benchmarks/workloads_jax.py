"""The workloads of `workloads.py` for JAX: the same functions of the same arguments, built from its transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from workloads import HEADS

Array = jax.Array
Function = Callable[..., Any]
Parameters = dict[str, Array]


def linear(x: Array, weight: Array, bias: Array) -> Array:
    return x @ weight.T + bias


def mlp(params: Parameters, x: Array) -> Array:
    return linear(jnp.tanh(linear(x, params["p0"], params["p1"])), params["p2"], params["p3"])


def cnn(params: Parameters, image: Array) -> Array:
    def conv(x: Array, weight: Array, bias: Array, stride: int) -> Array:
        dimensions = ("NCHW", "OIHW", "NCHW")
        y = jax.lax.conv_general_dilated(
            x[None], weight, (stride, stride), [(1, 1), (1, 1)], dimension_numbers=dimensions
        )
        return y[0] + bias[:, None, None]

    x = jax.nn.relu(conv(image, params["p0"], params["p1"], 1))
    x = jax.nn.relu(conv(x, params["p2"], params["p3"], 2))
    return linear(x.mean((-2, -1)), params["p4"], params["p5"])


def layer_norm(x: Array) -> Array:
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)


def transformer(params: Parameters, x: Array) -> Array:
    q, k, v = (
        part.reshape(*part.shape[:-1], HEADS, -1).swapaxes(-2, -3)
        for part in jnp.split(linear(x, params["p0"], params["p1"]), 3, -1)
    )
    attended = jax.nn.softmax(q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5, -1) @ v
    x = x + linear(attended.swapaxes(-2, -3).reshape(x.shape), params["p2"], params["p3"])
    x = layer_norm(x)
    hidden = jax.nn.gelu(linear(x, params["p4"], params["p5"]), approximate=False)
    x = layer_norm(x + linear(hidden, params["p6"], params["p7"]))
    return linear(x, params["p8"], params["p9"]).mean(-2)


def cross_entropy(logits: Array, target: Array) -> Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], -1).mean()


def per_sample_gradients(model: Function) -> Function:
    def loss(params: Parameters, x: Array, target: Array) -> Array:
        return cross_entropy(model(params, x), target)

    return jax.vmap(jax.grad(loss), (None, 0, 0))


def batched_jacobian() -> Function:
    def f(params: Parameters, x: Array) -> Array:
        return params["p1"] @ jnp.tanh(params["p0"] @ x)

    return jax.vmap(jax.jacrev(f, 1), (None, 0))


def shallow(params: Parameters, x: Array) -> Array:
    return (jnp.tanh(params["p0"] @ x) * params["p1"]).sum()


def hvp(params: Parameters, x: Array, v: Array) -> Array:
    return jax.jvp(lambda x: jax.grad(shallow, 1)(params, x), (x,), (v,))[1]


def laplacian() -> Function:
    def u(params: Parameters, x: Array) -> Array:
        hidden = jnp.tanh(linear(x, params["p0"], params["p1"]))
        return (jnp.tanh(linear(hidden, params["p2"], params["p3"])) * params["p4"]).sum()

    return jax.vmap(lambda params, x: jnp.trace(jax.hessian(u, 1)(params, x)), (None, 0))


def ntk(params: Parameters, x: Array) -> Array:
    jacobian = jax.vmap(jax.jacrev(mlp), (None, 0))(params, x)
    flat = [j.reshape(len(x), -1) for j in jacobian.values()]
    return sum(j @ j.T for j in flat)


def ensemble_step() -> Function:
    def loss(params: Parameters, x: Array, target: Array) -> Array:
        return cross_entropy(mlp(params, x), target)

    def step(params: Parameters, x: Array, target: Array) -> Parameters:
        slope = jax.grad(loss)(params, x, target)
        return {name: p - 0.1 * slope[name] for name, p in params.items()}

    return jax.vmap(step, (0, None, None))


def maml_step() -> Function:
    def loss(params: Parameters, x: Array, y: Array) -> Array:
        return jnp.square(mlp(params, x) - y).mean()

    def adapted_loss(params: Parameters, x: Array, y: Array) -> Array:
        slope = jax.grad(loss)(params, x, y)
        return loss({name: p - 0.1 * slope[name] for name, p in params.items()}, x, y)

    def total(params: Parameters, x: Array, y: Array) -> Array:
        return jax.vmap(adapted_loss, (None, 0, 0))(params, x, y).mean()

    return jax.grad(total)


# A builder for each name in `workloads.py`, so that each call gives a function that jax.jit has not seen.
BUILDERS: dict[str, Callable[[], Function]] = {
    "MLP": lambda: per_sample_gradients(mlp),
    "CNN": lambda: per_sample_gradients(cnn),
    "transformer": lambda: per_sample_gradients(transformer),
    "batched Jacobian": batched_jacobian,
    "Hessian": lambda: jax.hessian(shallow, 1),
    "vmapped Hessian": lambda: jax.vmap(jax.hessian(shallow, 1), (None, 0)),
    "HVP": lambda: lambda params, x, v: hvp(params, x, v),
    "PINN Laplacian": laplacian,
    "empirical NTK": lambda: lambda params, x: ntk(params, x),
    "ensemble step": ensemble_step,
    "MAML step": maml_step,
}


def array(x: Any) -> Array:
    """The contents of a tensor."""
    return jnp.asarray(x.numpy())
