"""Operators and arguments to test them with: PyTorch's own samples, made into batches.

A sample is one call, `op(input, *args, **kwargs)`. A case is a function of the sample's tensors together with a
choice of which of them are batched, and where.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo, SampleInput
from torch.utils import _pytree

#: FUNCTORCH_LITE_SWEEP=full takes every sample, dtype and place of the batch dimension.
FULL = os.environ.get("FUNCTORCH_LITE_SWEEP") == "full"
BATCH_SIZE = 3
DTYPES = (torch.float64, torch.int64, torch.complex64, torch.bool, torch.float32, torch.bfloat16)
SAMPLES = None if FULL else 3
#: Larger samples exercise no other code.
LARGEST = 20_000


def name_of(op: OpInfo) -> str:
    """The name of an operator and, if it has several sets of samples, of the set."""
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


OPS: dict[str, OpInfo] = {name_of(op): op for op in op_db}


@dataclass(frozen=True)
class Case:
    """One comparison: ``func`` of ``args``, mapped over ``in_dims``."""

    label: str
    func: Callable[..., list[Tensor]]
    args: list[Tensor]
    in_dims: tuple[int | None, ...]
    example: list[Tensor]


def dtypes_of(op: OpInfo) -> list[torch.dtype]:
    """The dtypes to test: in a short run the first two that the operator supports."""
    supported = [dtype for dtype in DTYPES if dtype in op.dtypes]
    return supported if FULL else supported[:2]


def samples_of(op: OpInfo, dtype: torch.dtype) -> Iterator[SampleInput]:
    """Samples, in a short run those that differ in the ranks of their tensors or in keyword arguments first."""
    torch.manual_seed(0)
    samples = iter(op.sample_inputs("cpu", dtype, requires_grad=False))
    if SAMPLES is None:
        yield from samples
        return
    first, others = {}, []
    for sample in itertools.islice(samples, 24):
        tensors = [x for x in _leaves(sample) if isinstance(x, Tensor)]
        if sum(x.numel() for x in tensors if x.layout == torch.strided) > LARGEST:
            continue
        kind = (tuple(x.dim() for x in tensors), tuple(sorted(sample.kwargs)))
        if kind in first:
            others.append(sample)
        else:
            first[kind] = sample
    yield from itertools.islice([*first.values(), *others], SAMPLES)


def _leaves(sample: SampleInput) -> list[Any]:
    return _pytree.tree_leaves((sample.input, sample.args, sample.kwargs))


def _vary(x: Tensor, i: int, mildly: bool) -> Tensor:
    """The tensor for example i: other values, but still a valid argument wherever ``x`` is one, or nearly so."""
    if not mildly and x.dim() > 0:
        x = x.roll(i, -1)
    if i > 0 and (x.is_floating_point() or x.is_complex()):
        x = x * (1 - i / 8)
    return x.clone()


def batch(x: Tensor, dim: int, size: int = BATCH_SIZE, mildly: bool = False) -> Tensor:
    """Stack ``size`` variations of ``x`` along ``dim``. Mild ones differ at most by a factor."""
    if size == 0:
        return x.new_empty((0, *x.shape))
    # The batch dimension is not merely renamed: in memory it is where the index says.
    return torch.stack([_vary(x, i, mildly) for i in range(size)], dim)


def _choices(args: list[Tensor], sample_index: int) -> Iterator[tuple[str, tuple[int | None, ...]]]:
    """Which arguments are batched, and along which dimension."""
    ranks = [x.dim() for x in args]
    seen = set()
    places: list[tuple[str, Callable[[int], int]]] = [
        ("first", lambda _: 0),
        ("middle", lambda rank: (rank + 1) // 2),
        ("last", lambda rank: rank),
    ]
    wanted = [(f"all {place}", tuple(where(r) for r in ranks)) for place, where in places]
    wanted.append(("mixed", tuple(r if i % 2 else 0 for i, r in enumerate(ranks))))
    for i in range(len(args)):
        for place, where in places if FULL else [places[sample_index % 3]]:
            wanted.append((f"only {i} {place}", tuple(where(r) if k == i else None for k, r in enumerate(ranks))))
    for label, dims in wanted:
        if dims not in seen:
            seen.add(dims)
            yield label, dims


def cases_of(op: OpInfo, dtype: torch.dtype, in_place: bool = False) -> Iterator[list[Case]]:
    """For each sample and place of the batch dimension, the same case in order of preference.

    The second one has milder variations, for operators that are strict about their arguments.
    """
    variant = op.inplace_variant if in_place else op
    if variant is None:
        return
    for index, sample in enumerate(samples_of(op, dtype)):
        if in_place and (sample.broadcasts_input or not isinstance(sample.input, Tensor)):
            continue
        leaves, spec = _pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
        positions = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        example = [leaves[i].detach() for i in positions]
        if not positions or any(x.layout != torch.strided or x.is_quantized for x in example):
            continue

        def func(*tensors: Tensor, leaves=leaves, spec=spec, positions=positions) -> list[Tensor]:
            values = list(leaves)
            for i, x in zip(positions, tensors, strict=True):
                values[i] = x
            first, args, kwargs = _pytree.tree_unflatten(values, spec)
            if in_place:
                first = first.clone()
                result = variant(first, *args, **kwargs)
                return [first, *(y for y in _pytree.tree_leaves(result) if isinstance(y, Tensor))]
            # Operators that write into an argument get a copy of it.
            return [y for y in _pytree.tree_leaves(variant(first, *args, **kwargs)) if isinstance(y, Tensor)]

        for label, dims in _choices(example, index):
            if in_place and dims[0] is None:
                continue
            yield [
                Case(
                    f"sample {index}, {label}{' in place' * in_place}",
                    func,
                    [x if d is None else batch(x, d, mildly=mildly) for x, d in zip(example, dims, strict=True)],
                    dims,
                    example,
                )
                for mildly in (False, True)
            ]
        if index == 0:
            empty = [batch(x, 0, 0) for x in example]
            yield [Case(f"sample {index}, empty batch", func, empty, (0,) * len(example), example)]
