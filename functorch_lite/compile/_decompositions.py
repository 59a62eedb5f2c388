"""Operators that graphs write with simpler ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._decomp import decomposition_table
from torch._ops import OpOverload, OpOverloadPacket

from functorch_lite.compile import _checks

aten = torch.ops.aten


def get_decompositions(
    aten_ops: Iterable[OpOverload | OpOverloadPacket],
) -> dict[OpOverload, Callable[..., Any]]:
    """Look up how PyTorch writes operators with simpler ones.

    The result is what ``decompositions`` arguments take: a dict from an operator to a function that computes the same
    with other operators. A traced graph then has these instead.

    Args:
        aten_ops: Operators. ``torch.ops.aten.elu_backward`` stands for all its overloads that can be decomposed,
            ``torch.ops.aten.elu_backward.default`` for one.

    Returns:
        A new dict, which may be changed.

    Raises:
        TypeError: Something is not an operator.
        ValueError: There is no decomposition of an operator.

    Example:
        >>> import torch
        >>> from functorch_lite.compile import get_decompositions
        >>> list(get_decompositions([torch.ops.aten.tanh_backward.default]))
        [<OpOverload(op='aten.tanh_backward', overload='default')>]

    Note:
        Decompositions of random operators, such as ``aten.bernoulli``, draw other numbers than the operator does.
    """
    decompositions: dict[OpOverload, Callable[..., Any]] = {}
    for operator in aten_ops:
        _checks.check_operator("get_decompositions", operator)
        overloads = (
            [operator] if isinstance(operator, OpOverload) else [getattr(operator, o) for o in operator.overloads()]
        )
        found = {overload: decomposition_table[overload] for overload in overloads if overload in decomposition_table}
        _checks.check_has_decomposition("get_decompositions", operator, found)
        decompositions.update(found)
    return decompositions


# Kernels of the backward pass that do in one go what pointwise operators and reductions can do: as such they can be
# fused with their neighbours, and computed again instead of being saved.
_BACKWARD = [
    aten._log_softmax_backward_data.default,
    aten._prelu_kernel_backward.default,
    aten._softmax_backward_data.default,
    aten.binary_cross_entropy_backward.default,
    aten.elu_backward.default,
    aten.gelu_backward.default,
    aten.glu_backward.default,
    aten.hardsigmoid_backward.default,
    aten.hardswish_backward.default,
    aten.hardtanh_backward.default,
    aten.huber_loss_backward.default,
    aten.leaky_relu_backward.default,
    aten.log_sigmoid_backward.default,
    aten.logit_backward.default,
    aten.mish_backward.default,
    aten.mse_loss_backward.default,
    aten.native_batch_norm_backward.default,
    aten.native_dropout_backward.default,
    aten.native_group_norm_backward.default,
    aten.native_layer_norm_backward.default,
    aten.nll_loss2d_backward.default,
    aten.nll_loss_backward.default,
    aten.rrelu_with_noise_backward.default,
    aten.select_backward.default,
    aten.sigmoid_backward.default,
    aten.silu_backward.default,
    aten.slice_backward.default,
    aten.smooth_l1_loss_backward.default,
    aten.soft_margin_loss_backward.default,
    aten.softplus_backward.default,
    aten.tanh_backward.default,
    aten.threshold_backward.default,
]

# The pointwise operators of forward passes that are a short expression of commoner ones.
_FORWARD = [
    aten.detach.default,
    aten.elu.default,
    aten.hardsigmoid.default,
    aten.hardswish.default,
    aten.hardtanh.default,
    aten.huber_loss.default,
    aten.leaky_relu.default,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.mse_loss.default,
    aten.smooth_l1_loss.default,
    aten.soft_margin_loss.default,
]

#: What `memory_efficient_fusion` takes apart. None of them is random, and the results are those of the operators.
default_decompositions = get_decompositions([*_BACKWARD, *_FORWARD])
