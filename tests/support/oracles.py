"""Slow, independent answers to compare with. Nothing here imports the code under test."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree


class ShapesDiffer(Exception):
    """The examples of a batch have results of different shapes, so no tensor holds them all."""


def _examples(in_dims: Sequence[int | None], args: Sequence[Tensor]) -> list[list[Tensor]]:
    size = next(x.shape[dim] for x, dim in zip(args, in_dims, strict=True) if dim is not None)
    return [
        [
            x if dim is None else x.select(dim, i).clone(memory_format=torch.contiguous_format)
            for x, dim in zip(args, in_dims, strict=True)
        ]
        for i in range(size)
    ]


def loop_vmap(
    func: Callable[..., object],
    in_dims: Sequence[int | None],
    args: Sequence[Tensor],
    example: Sequence[Tensor] = (),
) -> list[Tensor]:
    """What ``vmap(func, in_dims)(*args)`` must return, flattened: select, call, stack.

    With batch size 0 there is nothing to call: ``example``, arguments of one example, tells shapes and dtypes.
    """
    calls = _examples(in_dims, args)
    outputs = [_pytree.tree_leaves(func(*call)) for call in calls or [example]]
    if not calls:
        return [y.new_empty((0, *y.shape)) for y in outputs[0]]
    stacked = []
    for column in zip(*outputs, strict=True):
        if len({(y.shape, y.dtype) for y in column}) > 1:
            raise ShapesDiffer([y.shape for y in column])
        stacked.append(torch.stack([y.resolve_conj().resolve_neg() for y in column]))
    return stacked


def plain_vjp(
    func: Callable[..., list[Tensor]], primals: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> list[Tensor]:
    """The outputs of ``func`` and the cotangents of the primals, with torch.autograd."""
    leaves = [x.detach().requires_grad_() for x in primals]
    outputs = func(*leaves)
    grads = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True, materialize_grads=True)
    return [*(y.detach() for y in outputs), *grads]


def plain_jvp(func: Callable[..., list[Tensor]], primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of ``func`` and their tangents, with PyTorch's forward mode."""
    with forward_ad.dual_level():
        outputs = func(*[forward_ad.make_dual(x.detach(), v) for x, v in zip(primals, tangents, strict=True)])
        duals = [forward_ad.unpack_dual(y) for y in outputs]
    values = [dual.primal for dual in duals]
    # Tangents may share memory with what was given.
    return [*values, *(torch.zeros_like(x) if v is None else v.clone() for x, v in duals)]


def finite_difference_jvp(
    func: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor], step: float = 1e-6
) -> Tensor:
    """Directional derivative of ``func`` at ``primals`` along ``tangents``, by a central difference."""
    ahead = func(*[x + step * v for x, v in zip(primals, tangents, strict=True)])
    behind = func(*[x - step * v for x, v in zip(primals, tangents, strict=True)])
    return (ahead - behind) / (2 * step)


def dense_jacobian(func: Callable[..., Tensor], *args: Tensor) -> list[Tensor]:
    """d func / d args[i], of shape ``[*output, *args[i]]``, row by row with torch.autograd."""
    leaves = [x.detach().clone().requires_grad_() for x in args]
    output = func(*leaves)
    rows = [
        torch.autograd.grad(y, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        for y in output.reshape(-1)
    ]
    return [
        torch.stack([row[i] for row in rows]).reshape(*output.shape, *x.shape)
        if rows
        else x.new_zeros(*output.shape, *x.shape)
        for i, x in enumerate(leaves)
    ]
