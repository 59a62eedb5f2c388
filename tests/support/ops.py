"""Operators and arguments to test them with: PyTorch's own samples, and batches of variations of them."""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.testing._internal import common_utils
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo import core
from torch.testing._internal.opinfo.core import OpInfo, SampleInput
from torch.utils import _pytree

# For each sample it looks through the stack for a unittest.TestCase, which takes most of the time where many modules
# have been imported.
common_utils.extract_test_fn = core.extract_test_fn = lambda: None

T = TypeVar("T")

DTYPES = (torch.float64, torch.int64, torch.complex64, torch.bool, torch.float32, torch.bfloat16)
#: Derivatives are compared in the first that an operator has; with all samples, in complex numbers too.
DERIVATIVE_DTYPES = (torch.float64, torch.complex128, torch.float32)
#: Larger samples exercise no other code.
LARGEST = 20_000


def name_of(op: OpInfo) -> str:
    """The name of an operator and, if it has several sets of samples, of the set."""
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


OPS: dict[str, OpInfo] = {name_of(op): op for op in op_db}


@dataclass(frozen=True)
class Extent:
    """How much to run. None: everything there is."""

    samples: int | None
    places: int | None
    dtypes: int | None


SHORT = Extent(samples=3, places=4, dtypes=2)
FULL = Extent(None, None, None)


def pick(items: Sequence[T], number: int | None, key: str) -> list[T]:
    """The first item and ``number`` - 1 of the others, which depend on nothing but ``key``."""
    if number is None or len(items) <= number:
        return list(items)
    return [items[0], *random.Random(zlib.crc32(key.encode())).sample(items[1:], number - 1)]


def dtypes_of(op: OpInfo, form: str, extent: Extent) -> list[torch.dtype]:
    """The dtypes to test the operator with: in a short run two for the function, and one for its other forms."""
    dtypes = pick([dtype for dtype in DTYPES if dtype in op.dtypes], extent.dtypes, f"{name_of(op)} {form}")
    return dtypes if form == "function" or extent.dtypes is None else dtypes[-1:]


def derivative_dtypes_of(op: OpInfo, extent: Extent) -> list[torch.dtype]:
    """The dtypes to test the derivatives of the operator with."""
    supported = [dtype for dtype in DERIVATIVE_DTYPES if dtype in op.supported_backward_dtypes("cpu")]
    return supported[: 1 if extent.dtypes or torch.complex128 not in supported else 2]


def samples_of(op: OpInfo, dtype: torch.dtype, requires_grad: bool, number: int | None) -> Iterator[SampleInput]:
    """Samples; if only a ``number`` is asked for, those first that differ in ranks or keyword arguments."""
    torch.manual_seed(0)
    samples = iter(op.sample_inputs("cpu", dtype, requires_grad=requires_grad))
    if number is None:
        yield from samples
        return
    first, others = {}, []
    for sample in itertools.islice(samples, 8 * number):
        tensors = tensors_of(sample)
        if sum(x.numel() for x in tensors if x.layout == torch.strided) > LARGEST:
            continue
        kind = (tuple(x.dim() for x in tensors), tuple(sorted(sample.kwargs)))
        if kind in first:
            others.append(sample)
        else:
            first[kind] = sample
    yield from itertools.islice([*first.values(), *others], number)


def tensors_of(structure: Any) -> list[Tensor]:
    """All tensors of a sample or of another structure."""
    if isinstance(structure, SampleInput):
        structure = (structure.input, structure.args, structure.kwargs)
    return [x for x in _pytree.tree_leaves(structure) if isinstance(x, Tensor)]


def _vary(x: Tensor, i: int, mildly: bool) -> Tensor:
    """The tensor for example i: other values, but still a valid argument wherever ``x`` is one, or nearly so."""
    if not mildly and x.dim() > 0:
        x = x.roll(i, -1)
    if i > 0 and (x.is_floating_point() or x.is_complex()):
        x = x * (1 - i / 8)
    return x.clone()


def batch(x: Tensor, dim: int, size: int, mildly: bool = False) -> Tensor:
    """Stack ``size`` variations of ``x`` along ``dim``. Mild ones differ at most by a factor."""
    if size == 0:
        return x.new_empty((*x.shape[:dim], 0, *x.shape[dim:]))
    # The batch dimension is not merely renamed: in memory it is where the index says.
    return torch.stack([_vary(x, i, mildly) for i in range(size)], dim)
