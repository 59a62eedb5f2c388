"""The chunked forms of ``torch.nn.functional.linear_cross_entropy`` as compositions.

PyTorch computes them piece by piece in scratch memory, the gradients together with the loss, which has neither a second
derivative nor a forward mode. `vmap` uses the whole matrix of logits; where a level differentiates, pieces are computed
again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from functorch_lite._remat import remat


def with_gradients(
    x: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    class_weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    *options: object,
) -> tuple[Tensor, ...]:
    """The reduced loss, and its gradients by ``x``, ``linear_weight`` and ``linear_bias`` where asked for."""
    acc_dtype, wanted = options[3], options[-3:]
    logits, class_weight = _wide(acc_dtype, x, linear_weight, linear_bias, class_weight)
    loss = F.cross_entropy(logits, target, class_weight, ignore_index=ignore_index, reduction=reduction)
    classes, scale = _weights_of_rows(target, class_weight, ignore_index)
    scale = scale.to(logits.dtype)
    if reduction == "mean":
        scale = scale / scale.sum()
    by_logits = (logits.softmax(-1) - F.one_hot(classes, logits.shape[-1])) * scale.unsqueeze(-1)
    gradients: tuple[Callable[[], Tensor], ...] = (
        lambda: by_logits @ linear_weight.to(logits.dtype),
        lambda: by_logits.mT @ x.to(logits.dtype),
        lambda: by_logits.sum(0),
    )
    ranks = (2, 2, 1)
    return (
        loss.to(x.dtype),
        *(
            gradient().to(x.dtype) if is_wanted else x.new_empty((0,) * rank)
            for gradient, is_wanted, rank in zip(gradients, wanted, ranks, strict=True)
        ),
    )


def without_reduction(
    x: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    *options: object,
) -> Tensor:
    """The loss of each row."""
    logits, class_weight = _wide(options[2], x, linear_weight, linear_bias, class_weight)
    return F.cross_entropy(logits, target, class_weight, ignore_index=ignore_index, reduction="none").to(x.dtype)


def _each_piece(
    x: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    class_weight: Tensor | None,
    label_smoothing: float,
    rows: int,
    acc_dtype: object,
    ignore_index: int,
    reduction: str,
) -> list[Tensor]:
    """The loss of ``rows`` rows at a time."""

    @remat
    def loss_of(x: Tensor, target: Tensor) -> Tensor:
        logits, wide_class_weight = _wide(acc_dtype, x, linear_weight, linear_bias, class_weight)
        return F.cross_entropy(
            logits,
            target,
            wide_class_weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )

    return [loss_of(*piece) for piece in zip(x.split(rows), target.split(rows), strict=True)]


def differentiable(
    x: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    class_weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    rows: int,
    acc_policy: str,
    acc_dtype: torch.dtype,
    *what_to_compute: bool,
) -> tuple[Tensor, ...]:
    """The reduced loss. In place of the gradients, which only PyTorch's own backward pass reads, empty tensors."""
    parameters = (linear_weight, target, linear_bias, class_weight)
    loss = torch.stack(
        _each_piece(x, *parameters, label_smoothing, rows, acc_dtype, ignore_index, reduction="sum")
    ).sum()
    if reduction == "mean":
        loss = loss / _weights_of_rows(target, class_weight, ignore_index)[1].sum()
    return loss.to(x.dtype), x.new_empty(0, 0), x.new_empty(0, 0), x.new_empty(0)


def differentiable_without_reduction(
    x: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    rows: int,
    acc_policy: str,
    acc_dtype: torch.dtype,
) -> Tensor:
    """The loss of each row."""
    parameters = (linear_weight, target, linear_bias, class_weight)
    losses = _each_piece(x, *parameters, 0.0, rows, acc_dtype, ignore_index, reduction="none")
    return torch.cat(losses).to(x.dtype)


def _weights_of_rows(target: Tensor, class_weight: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The class of each row, 0 where it is ignored, and the row's weight in a mean."""
    kept = target != ignore_index
    classes = torch.where(kept, target, 0)
    return classes, kept if class_weight is None else torch.where(kept, class_weight[classes], 0)


def _wide(
    acc_dtype: object, x: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, class_weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The logits and the weights of the classes in the dtype in which to accumulate."""
    dtype = torch.promote_types(x.dtype, acc_dtype) if isinstance(acc_dtype, torch.dtype) else x.dtype

    def widened(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    return F.linear(x.to(dtype), linear_weight.to(dtype), widened(linear_bias)), widened(class_weight)


#: By name of the operator: at levels that differentiate, and at those that map.
DIFFERENTIABLE: dict[str, Callable[..., Any]] = {
    "torch_nn::_linear_cross_entropy_batch_chunked": differentiable,
    "torch_nn::_linear_cross_entropy_batch_chunked_no_reduction": differentiable_without_reduction,
}
COMPOSITIONS: dict[str, Callable[..., Any]] = {
    "torch_nn::_linear_cross_entropy_batch_chunked": with_gradients,
    "torch_nn::_linear_cross_entropy_batch_chunked_no_reduction": without_reduction,
}
