"""The blocks of a Jacobian, one for each output and input, from its rows or its columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functorch_lite import _tree
from functorch_lite._basis import ChunkSize, apply_to_basis
from functorch_lite._vjp import Pullback


def _parts(rows: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    return (rows,) if len(sizes) == 1 else rows.split(sizes)


def needs_imaginary_rows(pullback: Pullback) -> bool:
    """A complex output of a real input: one pass for the real part of the derivative, one for the imaginary part."""
    return any(o.is_complex() and not p.is_complex() for o in pullback.outputs for p in pullback.primals)


def _rows(pullback: Pullback, unit: complex, chunk_size: ChunkSize, keep_graph: bool) -> list[Tensor]:
    """``unit`` times each basis vector, pulled back. For a primal [outputs, *shape], or, of one output, [*shape]."""

    def linear(*cotangents: Tensor) -> list[Tensor]:
        if unit != 1:
            cotangents = tuple([c * unit if c.is_complex() else torch.zeros_like(c) for c in cotangents])
        return pullback.pull(cotangents, keep_graph)

    outputs = pullback.outputs
    if len(outputs) == 1 and outputs[0].numel() == 1:
        return linear(torch.ones_like(outputs[0]))
    # Nothing draws in a backward pass but a checkpoint, which computes the forward pass again.
    return apply_to_basis(linear, outputs, chunk_size, randomness="same")[0]


def by_rows(pullback: Pullback, arguments: _tree.Arguments, chunk_size: ChunkSize) -> Any:
    """The Jacobian at the point of a pullback, in reverse mode. The pullback cannot be used again."""
    outputs = pullback.outputs
    if not outputs:
        return _tree.unflatten([], pullback.output_spec)
    sizes = [output.numel() for output in outputs]
    twice = needs_imaginary_rows(pullback)
    rows = [_parts(row, sizes) for row in _rows(pullback, 1, chunk_size, twice or chunk_size is not None)]
    imaginary_rows = (
        [_parts(row, sizes) for row in _rows(pullback, 1j, chunk_size, chunk_size is not None)] if twice else rows
    )
    blocks = []
    for i, output in enumerate(outputs):
        shaped = []
        for primal, parts, imaginary_parts in zip(pullback.primals, rows, imaginary_rows, strict=True):
            block = parts[i]
            if primal.is_complex():
                block = block.conj()
            elif output.is_complex():
                block = torch.complex(block, imaginary_parts[i])
            shape = output.shape + primal.shape
            shaped.append(block if block.shape == shape else block.reshape(shape))
        blocks.append(arguments.shaped(_tree.unflatten(shaped, pullback.primals_spec)))
    return _tree.unflatten(blocks, pullback.output_spec)


def from_columns(
    columns: Sequence[Tensor],
    primals: Sequence[Tensor],
    spec: _tree.Spec,
    arguments: _tree.Arguments,
    dtype: Callable[[Tensor, Tensor], torch.dtype] = lambda column, primal: column.dtype,
) -> list[Any]:
    """For each output its block of the Jacobian, from its derivatives column[n,*] in the n directions."""
    sizes = [primal.numel() for primal in primals]
    blocks = []
    for column in columns:
        shaped = []
        for part, primal in zip(_parts(column, sizes), primals, strict=True):
            block = part if part.dim() == 1 else part.movedim(0, -1)
            shape = column.shape[1:] + primal.shape
            shaped.append((block if block.shape == shape else block.reshape(shape)).to(dtype(column, primal)))
        blocks.append(arguments.shaped(_tree.unflatten(shaped, spec)))
    return blocks


def dtype_of_rows(column: Tensor, primal: Tensor) -> torch.dtype:
    """The dtype that reverse mode gives a block: it must not depend on which mode is cheaper."""
    return primal.dtype.to_complex() if column.is_complex() else primal.dtype
