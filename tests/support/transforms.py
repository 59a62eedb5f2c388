"""Each transform as a map from functions of one tensor to functions of one tensor, ours and an independent one.

The independent ones use nothing but `torch.autograd.grad` with ``create_graph=True`` and loops, and compose as plain
Python functions do. `jvp` is the transpose of `vjp`, so even forward mode is judged by double backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

import functorch_lite as fl

Function = Callable[[Tensor], Tensor]


def _direction(like: Tensor) -> Tensor:
    """A fixed tensor of a shape: tangents and cotangents."""
    return torch.linspace(0.3, 1.1, like.numel(), dtype=like.dtype).reshape(like.shape)


def _autograd(y: Tensor, x: Tensor, cotangent: Tensor) -> Tensor:
    if not y.requires_grad:
        return torch.zeros_like(x)
    (result,) = torch.autograd.grad(y, x, cotangent, create_graph=True, allow_unused=True)
    return torch.zeros_like(x) if result is None else result


def _variable(x: Tensor) -> Tensor:
    # A new node of the graph: derivatives with respect to it alone, also where x itself is one of another derivative.
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()


def reference_grad(f: Function) -> Function:
    def gradient(x: Tensor) -> Tensor:
        x = _variable(x)
        y = f(x).sum()
        return _autograd(y, x, torch.ones_like(y))

    return gradient


def reference_vjp(f: Function) -> Function:
    def pull(x: Tensor) -> Tensor:
        x = _variable(x)
        y = f(x)
        return _autograd(y, x, _direction(y))

    return pull


def reference_jvp(f: Function) -> Function:
    def push(x: Tensor) -> Tensor:
        x = _variable(x)
        y = f(x)
        v = torch.zeros_like(y).requires_grad_()
        return _autograd(_autograd(y, x, v), v, _direction(x))

    return push


def reference_jacobian(f: Function) -> Function:
    def jacobian(x: Tensor) -> Tensor:
        x = _variable(x)
        y = f(x)
        basis = torch.eye(y.numel(), dtype=y.dtype).reshape(y.numel(), *y.shape)
        rows = [_autograd(y, x, e) for e in basis]
        return torch.stack(rows).reshape(y.shape + x.shape)

    return jacobian


def reference_vmap(f: Function) -> Function:
    return lambda x: torch.stack([f(example) for example in x])


@dataclass(frozen=True)
class Transform:
    """One transform, ours and the reference."""

    name: str
    ours: Callable[[Function], Function]
    reference: Callable[[Function], Function]


TRANSFORMS = {
    transform.name: transform
    for transform in (
        Transform("vmap", fl.vmap, reference_vmap),
        Transform("grad", lambda f: fl.grad(lambda x: f(x).sum()), reference_grad),
        Transform("vjp", lambda f: lambda x: _our_vjp(f, x), reference_vjp),
        Transform("jvp", lambda f: lambda x: fl.jvp(f, (x,), (_direction(x),))[1], reference_jvp),
        Transform("linearize", lambda f: lambda x: fl.linearize(f, x)[1](_direction(x)), reference_jvp),
        Transform("jacrev", fl.jacrev, reference_jacobian),
        Transform("jacfwd", fl.jacfwd, reference_jacobian),
        Transform("hessian", fl.hessian, lambda f: reference_jacobian(reference_jacobian(f))),
    )
}


def _our_vjp(f: Function, x: Tensor) -> Tensor:
    y, vjp_fn = fl.vjp(f, x)
    return vjp_fn(_direction(y))[0]


def compositions(length: int) -> list[tuple[str, ...]]:
    """All ordered compositions of ``length`` transforms, outermost first."""
    return list(product(TRANSFORMS, repeat=length))


def compose(names: Iterable[str], f: Function, side: str) -> Function:
    """Apply the transforms, the last name first."""
    for name in reversed(tuple(names)):
        f = getattr(TRANSFORMS[name], side)(f)
    return f


def sample(names: Iterable[str], size: int = 2) -> Tensor:
    """x[size] with a batch dimension of size 2 for each vmap."""
    batch = [2] * sum(name == "vmap" for name in names)
    generator = torch.Generator().manual_seed(7)
    return torch.rand(*batch, size, dtype=torch.float64, generator=generator) * 0.8 + 0.2
