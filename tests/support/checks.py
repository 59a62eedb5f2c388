"""Comparisons that several test files make."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils import _pytree

from functorch_lite import vmap
from tests.support.oracles import loop_vmap


def check_against_loop(
    f: Callable[..., object],
    in_dims: tuple[int | None, ...],
    *args: Tensor,
    tolerance: float = 0.0,
    equal_nan: bool = False,
    nested: bool = True,
) -> None:
    """The results of vmap, and their dtypes, are those of the loop, alone and below another vmap."""
    expected = loop_vmap(f, in_dims, args)
    runs = [(vmap(f, in_dims)(*args), expected)]
    if nested:
        twice = vmap(vmap(f, in_dims))(*[torch.stack([x, x]) for x in args])
        runs.append((twice, [torch.stack([z, z]) for z in expected]))
    for results, wanted in runs:
        for y, z in zip(_pytree.tree_leaves(results), wanted, strict=True):
            torch.testing.assert_close(y, z, rtol=tolerance, atol=tolerance, equal_nan=equal_nan)
