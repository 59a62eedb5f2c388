"""Attention in memory that is linear in the length of the sequences, at any order of differentiation.

Queries attend in chunks, each computed again where a derivative needs its scores: Rabe and Staats, "Self-attention Does
Not Need O(n^2) Memory", 2021.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from functorch_lite import _C
from functorch_lite._remat import FlatFunction, remat


def attend_in_chunks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    rows: int,
) -> Tensor:
    """Attention of query[*,T,E] to key[*,S,E] and value[*,S,F] with mask[*,T,S], ``rows`` queries at a time."""
    outputs = []
    for start in range(0, query.shape[-2], rows):
        queries = query[..., start : start + rows, :]
        mask_chunk = mask
        if mask is not None and mask.dim() > 1 and mask.shape[-2] > 1:
            mask_chunk = mask[..., start : start + rows, :]
        attend = remat(_chunk(start if is_causal else None, dropout_p, scale, enable_gqa))
        # All of key and value: the cotangents of slices would wait for one another in a backward pass, one for each
        # chunk.
        outputs += attend(queries, key, value, mask_chunk)
    return torch.cat(outputs, -2)


def _chunk(first: int | None, dropout_p: float, scale: float | None, enable_gqa: bool) -> FlatFunction:
    """The attention of some queries; ``first`` is the position of the first one if they see no key after them."""

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> list[Tensor]:
        if first is not None:
            seen = first + query.shape[-2]  # nobody in this chunk sees what comes after it
            key, value = key[..., :seen, :], value[..., :seen, :]
            mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril(first)
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
        math = torch.ops.aten._scaled_dot_product_attention_math
        return [math(query, key, value, mask, dropout_p, scale=scale, enable_gqa=enable_gqa)[0]]

    return attend


def attend_backward(
    grad: Tensor, inputs: Sequence[Tensor], is_causal: bool, scale: float | None, enable_gqa: bool, rows: int
) -> list[Tensor | None]:
    """The cotangents of query, key, value and, if there is a fourth, mask, as differentiable functions of all."""
    with _C.AutodiffLevel(False) as level:
        lifted = [level.lift_variable(x) for x in inputs]
        query, key, value, *masks = lifted
        mask = masks[0] if masks else None
        output = attend_in_chunks(query, key, value, mask, 0.0, is_causal, scale, enable_gqa, rows)
    return level.backward([output], [grad], lifted, False)
