"""Calls whose use of a parameter is known: they run once on all examples and note what its gradients are made of.

A rule takes the arguments of the call. It returns NotImplemented for a form of the call that it does not know.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from functorch_lite import _C
from functorch_lite._per_sample_terms import ConvWeight, Dense, EmbeddingWeight, LinearWeight
from functorch_lite._per_sample_uses import Uses


def _linear(uses: Uses, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if uses.same_for_all(input) or not uses.can_share(weight, bias) or weight.dim() != 2:
        return NotImplemented
    with _C.Below():
        x = uses.batch_of(input)
        result = F.linear(x, uses.shared(weight), uses.shared_or_none(bias))
        value = uses.keep(x)
        return uses.record(
            result, (weight, lambda g: LinearWeight(value, g)), (bias, lambda g: Dense(_sum_places(g, 1)))
        )


def _matmul(uses: Uses, input: Tensor, other: Tensor) -> Any:
    if uses.same_for_all(input) or not uses.can_share(other) or other.dim() != 2:
        return NotImplemented
    with _C.Below():
        x = uses.batch_of(input)
        result = torch.matmul(x, uses.shared(other))
        value = uses.keep(x)
        return uses.record(result, (other, lambda g: LinearWeight(value, g, transposed=True)))


def _sum_places(rows: Tensor, dims: int) -> Tensor:
    """Over all dimensions but the first and the ``dims`` last ones."""
    return rows.sum(tuple(range(1, rows.dim() - dims))) if rows.dim() > dims + 1 else rows


def _sum_channels(rows: Tensor, batch_size: int) -> Tensor:
    """From (examples * n, channels, *) to (examples, channels)."""
    sums = rows.flatten(2).sum(2) if rows.dim() > 2 else rows
    return sums if sums.shape[0] == batch_size else sums.view(batch_size, -1, sums.shape[1]).sum(1)


def _conv(
    function: Callable[..., Tensor],
    uses: Uses,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if uses.same_for_all(input) or not uses.can_share(weight, bias):
        return NotImplemented
    dims, batch_size = weight.dim() - 2, uses.vmap.batch_size
    options: dict[str, Any] = {"stride": _each(stride, dims), "dilation": _each(dilation, dims), "groups": groups}
    with _C.Below():
        batch = uses.batch_of(input)
        x = _joined(batch, dims + 2)
        if padding == "same":
            x, padding = _padded(x, weight.shape[2:], options["dilation"])
        options["padding"] = _each(0 if padding == "valid" else padding, dims)
        result = function(x, uses.shared(weight), uses.shared_or_none(bias), **options)
        value, shape = uses.keep(x), uses.shared(weight)
        return uses.record(
            result,
            (weight, lambda g: ConvWeight(value, g, shape, batch_size, options)),
            (bias, lambda g: Dense(_sum_channels(g, batch_size))),
            shape=(*batch.shape[: -dims - 1], *result.shape[1:]),
        )


def _conv_transpose(
    function: Callable[..., Tensor],
    uses: Uses,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Any:
    dims, batch_size = weight.dim() - 2, uses.vmap.batch_size
    options: dict[str, Any] = {
        "stride": _each(stride, dims),
        "padding": _each(padding, dims),
        "dilation": _each(dilation, dims),
        "groups": groups,
    }
    extra = _each(output_padding, dims)
    slack = any(more >= step for more, step in zip(extra, options["stride"], strict=True))
    if slack or uses.same_for_all(input) or not uses.can_share(weight, bias):
        return NotImplemented
    with _C.Below():
        batch = uses.batch_of(input)
        x = _joined(batch, dims + 2)
        result = function(x, uses.shared(weight), uses.shared_or_none(bias), output_padding=extra, **options)
        value, shape = uses.keep(x), uses.shared(weight)
        # The transpose of a convolution: what went in and the cotangent change places.
        return uses.record(
            result,
            (weight, lambda g: ConvWeight(g, value.to(g.dtype), shape, batch_size, options)),
            (bias, lambda g: Dense(_sum_channels(g, batch_size))),
            shape=(*batch.shape[: -dims - 1], *result.shape[1:]),
        )


def _each(value: Any, dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


def _joined(x: Tensor, rank: int) -> Tensor:
    """The batch of the model's own call joined with the examples."""
    return x if x.dim() == rank else x.flatten(0, 1)


def _padded(x: Tensor, kernel: Any, dilation: list[int]) -> tuple[Tensor, list[int]]:
    """Input and padding for a convolution with ``padding="same"``."""
    total = [gap * (size - 1) for size, gap in zip(kernel, dilation, strict=True)]
    if any(amount % 2 for amount in total):
        x = F.pad(x, [side for amount in reversed(total) for side in (0, amount % 2)])
    return x, [amount // 2 for amount in total]


def _embedding(
    uses: Uses,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    special = max_norm is not None or scale_grad_by_freq
    if special or uses.same_for_all(input) or not uses.can_share(weight):
        return NotImplemented
    rows = weight.shape[0]
    padding = padding_idx if padding_idx is None or padding_idx >= 0 else rows + padding_idx
    with _C.Below():
        ids = uses.batch_of(input)
        result = F.embedding(ids, uses.shared(weight), padding)
        value = uses.keep(ids)
        return uses.record(result, (weight, lambda g: EmbeddingWeight(value, g, rows, padding)))


def _layer_norm(
    uses: Uses,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    dims = len(normalized_shape)

    def run(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.layer_norm(x, normalized_shape, weight, bias, eps)

    return _affine(uses, input, weight, bias, None, run, lambda g: _sum_places(g, dims))


def _rms_norm(
    uses: Uses, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Any:
    dims = len(normalized_shape)

    def run(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.rms_norm(x, normalized_shape, weight, eps)

    return _affine(uses, input, weight, None, None, run, lambda g: _sum_places(g, dims))


def _group_norm(
    uses: Uses,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    def run(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.group_norm(x, num_groups, weight, bias, eps)

    return _channel_norm(uses, input, weight, bias, run)


def _instance_norm(
    uses: Uses,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if running_mean is not None or not use_input_stats:
        return NotImplemented

    def run(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.instance_norm(x, None, None, weight, bias, True, momentum, eps)

    return _channel_norm(uses, input, weight, bias, run)


def _batch_norm(
    uses: Uses,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if training or not uses.can_share(running_mean, running_var):
        return NotImplemented
    mean, variance = (None if x is None else uses.shared(x) for x in (running_mean, running_var))

    def run(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.batch_norm(x, mean, variance, weight, bias, False, momentum, eps)

    return _channel_norm(uses, input, weight, bias, run)


_Normalize = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]


def _channel_norm(uses: Uses, input: Tensor, weight: Tensor | None, bias: Tensor | None, run: _Normalize) -> Any:
    batch_size = uses.vmap.batch_size
    return _affine(uses, input, weight, bias, input.dim(), run, lambda g: _sum_channels(g, batch_size))


def _affine(
    uses: Uses,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    joined_rank: int | None,
    run: _Normalize,
    reduce: Callable[[Tensor], Tensor],
) -> Any:
    """A normalization, scaled and shifted; ``reduce`` sums a cotangent of what it returns in each example."""
    if uses.same_for_all(input) or not uses.can_share(weight, bias):
        return NotImplemented
    with _C.Below():
        batch = uses.batch_of(input)
        x = batch if joined_rank is None else _joined(batch, joined_rank)
        result = run(x, uses.shared_or_none(weight), uses.shared_or_none(bias))
        value = uses.keep(x)
        return uses.record(
            result,
            (weight, lambda g: Dense(reduce(g * run(value.to(g.dtype), None, None)))),
            (bias, lambda g: Dense(reduce(g))),
            shape=batch.shape,
        )


RULES: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
    F.batch_norm: _batch_norm,
    **{f: functools.partial(_conv, f) for f in (F.conv1d, F.conv2d, F.conv3d)},
    **{f: functools.partial(_conv_transpose, f) for f in (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)},
}
