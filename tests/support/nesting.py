"""Nestings of transforms, with this package and with nested torch.autograd and a loop as the reference."""

from __future__ import annotations

import types

import torch

from functorch_lite import grad, jvp, vmap

# The reference: plain PyTorch.


def torch_grad(f):
    def gradient(x):
        x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        value = f(x)
        if not value.requires_grad:
            return torch.zeros_like(x)
        (result,) = torch.autograd.grad(value, x, create_graph=True, materialize_grads=True)
        return result

    return gradient


def torch_vmap(f):
    return lambda x: torch.stack([f(row) for row in x])


def torch_jvp(f, x, t):
    rows = [torch_grad(lambda x, i=i: f(x).reshape(-1)[i])(x) for i in range(f(x).numel())]
    return f(x), torch.stack([(row * t).sum() for row in rows]).reshape(f(x).shape)


REFERENCE = types.SimpleNamespace(grad=torch_grad, vmap=torch_vmap, jvp=torch_jvp)


# Compositions. `f` maps a vector to a vector; all end in a sum, so that they nest.


def first(d, f):
    return d.grad(lambda x: (f(x) * torch.linspace(1, 2, len(x), dtype=x.dtype)).sum())


def push(d, f):
    return lambda x: d.jvp(f, x, torch.linspace(1, 3, len(x), dtype=x.dtype))[1]


def over(d, f):
    return lambda x: (d.vmap(f)(torch.stack([x, 0.5 * x])) * torch.tensor([[1.0], [3.0]], dtype=x.dtype)).sum(0)


COMPOSITIONS = {
    "grad": [first],
    "grad∘grad": [first, first],
    "grad∘grad∘grad": [first, first, first],
    "vmap": [over],
    "vmap∘grad": [over, first],
    "grad∘vmap": [first, over],
    "grad∘vmap∘vmap": [first, over, over],
    "vmap∘grad∘grad": [over, first, first],
    "grad∘vmap∘grad": [first, over, first],
    "grad∘grad∘vmap": [first, first, over],
    "jvp": [push],
    "jvp∘grad": [push, first],
    "grad∘jvp": [first, push],
    "jvp∘jvp": [push, push],
    "vmap∘jvp": [over, push],
    "jvp∘vmap": [push, over],
    "grad∘vmap∘jvp": [first, over, push],
    "vmap∘jvp∘grad": [over, push, first],
}


def compose(composition, d, f):
    for transform in reversed(COMPOSITIONS[composition]):
        f = transform(d, f)
    return f


OURS = types.SimpleNamespace(grad=grad, vmap=vmap, jvp=lambda f, x, t: jvp(f, (x,), (t,)))
