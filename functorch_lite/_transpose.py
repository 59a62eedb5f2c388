"""The transpose of a linear map, by differentiating it in reverse mode.

A backward pass is linear in the gradients of the outputs; its transpose is the forward-mode derivative. The other way
round, the transpose of a jvp rule is the backward pass. Reverse mode at any point gives the transpose; zeros are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from functorch_lite._vjp import Pullback


def transpose(
    linear: Callable[[tuple[Tensor, ...]], Iterable[tuple[Tensor, Tensor]]], inputs: Sequence[Tensor]
) -> list[Tensor]:
    """Apply the transpose of ``linear``, whose arguments are like ``inputs``.

    ``linear`` returns each of its results together with the vector that the transpose is applied to.
    """
    vectors: list[Tensor] = []

    def results(arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        pairs = list(linear(arguments))
        vectors.extend(vector for _, vector in pairs)
        return tuple(_fitted(result, vector) for result, vector in pairs)

    zeros = tuple(torch.zeros_like(x) for x in inputs)
    pullback = Pullback("transpose", results, zeros, lambda: [f"input {i}" for i in range(len(zeros))])
    pullback.run(results, has_aux=False)
    return pullback.pull(vectors, keep_graph=False)


def _fitted(result: Tensor, like: Tensor) -> Tensor:
    """As autograd takes a gradient: summed to the shape of its argument, real where that is, and in its dtype."""
    if result.shape != like.shape:
        result = result.sum_to_size(like.shape)
    if result.is_complex() and not like.is_complex():
        result = result.real
    return result.to(like.dtype)
