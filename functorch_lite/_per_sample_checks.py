"""Validation of what `per_sample_grads` and its friends are given, and their messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from torch import Tensor, nn

from functorch_lite import _checks, _tree


def check_batch_dim(called: str, batch_dim: Any) -> None:
    """Require an int or None."""
    if not _tree.is_dim(batch_dim):
        _checks.refuse_type(
            f"{called}: got batch_dim={batch_dim!r}, expected an int, the dimension of examples in what the model "
            f"takes and returns, or None for a model that is written for one example; pass one of these."
        )


def check_params(called: str, model: nn.Module, params: Any, own: Mapping[str, Tensor]) -> None:
    """Require tensors by name, with a floating-point parameter among them and none twice."""
    if not isinstance(params, dict) or not all(isinstance(p, Tensor) for p in params.values()):
        got = type(params).__name__
        if isinstance(params, dict):
            got = next(f"{type(p).__name__} for {name!r}" for name, p in params.items() if not isinstance(p, Tensor))
        _checks.refuse_type(
            f"{called}: got params as {got}, expected a dictionary of tensors by name; pass "
            f"dict(model.named_parameters()), or a part of it."
        )
    names = [name for name in params if name in own]
    if not names:
        raise ValueError(
            f"{called}: got params without any parameter of {type(model).__name__}, expected one at least; pass "
            f"dict(model.named_parameters()), or a part of it."
        )
    first: dict[int, str] = {}
    for name in names:
        other = first.setdefault(id(own[name]), name)
        if other != name:
            raise ValueError(
                f"{called}: got params with {other!r} and {name!r}, which are one parameter of the model; pass one of "
                f"them, as dict(model.named_parameters()) does."
            )
        if not params[name].is_floating_point():
            _checks.refuse_type(
                f"{called}: got dtype {params[name].dtype} for {name!r}, expected a floating-point tensor; leave the "
                f"parameter out of params if it is a constant."
            )


def check_batch(called: str, batch: Any) -> None:
    """Require a tuple."""
    if not isinstance(batch, (tuple, list)) or not batch:
        got = f"an empty {type(batch).__name__}" if isinstance(batch, (tuple, list)) else type(batch).__name__
        _checks.refuse_type(
            f"{called}: got batch as {got}, expected a tuple (input, *targets); pass (input,) if the loss takes the "
            f"output alone."
        )


def batch_size(called: str, batch: Any, tensors: Sequence[Tensor], dims: Sequence[int]) -> int:
    """The one size of all tensors in their dimension of examples."""
    size: int | None = None
    for i, (tensor, dim) in enumerate(zip(tensors, dims, strict=True)):
        if not -tensor.dim() <= dim < tensor.dim():
            raise ValueError(
                f"{called}: got batch{_path(batch, i)} of shape {tuple(tensor.shape)}, expected examples in "
                f"dimension {dim}; pass a value that is the same for all examples as a number, or keep it in the model."
            )
        if size is None:
            size, first = tensor.shape[dim], i
        elif tensor.shape[dim] != size:
            raise ValueError(
                f"{called}: got {size} examples in batch{_path(batch, first)} and {tensor.shape[dim]} in "
                f"batch{_path(batch, i)} (dimension {dim} of {tuple(tensor.shape)}), "
                f"expected one number of examples; pass tensors of the same batch."
            )
    if size is None:
        raise ValueError(f"{called}: got batch without a tensor, expected examples; pass (input, *targets).")
    return size


def _path(batch: Any, index: int) -> str:
    """Of one of the tensors."""
    whole = tuple(batch)
    leaves = zip(_tree.paths(whole), _tree.flatten(whole)[0], strict=True)
    return [path for path, leaf in leaves if isinstance(leaf, Tensor)][index]


def refuse_batch_norm(called: str, name: str, module: nn.Module) -> NoReturn:
    """Raise: examples would mix."""
    kind = type(module).__name__
    raise ValueError(
        f"{called}: got {kind} {name!r} in training mode, expected a model whose examples do not depend on each other, "
        f"as they do through the statistics of a batch; replace it by nn.GroupNorm, or call .eval() on it to use and "
        f"keep its running statistics."
    )


def refuse_output(called: str, model: nn.Module, path: str, leaf: Tensor, dim: int) -> NoReturn:
    """Raise: the output has no dimension for the batch."""
    raise ValueError(
        f"{called}: got output{path} of {type(model).__name__} with shape {tuple(leaf.shape)} for a batch of one, "
        f"expected size 1 in dimension {dim}; pass batch_dim=None and a model that is written for one example."
    )


def check_max_norm(called: str, max_norm: Any) -> None:
    """Require a positive number."""
    number = isinstance(max_norm, (int, float)) and not isinstance(max_norm, bool) and max_norm > 0
    if not number and not (isinstance(max_norm, Tensor) and max_norm.dim() == 0):
        raise ValueError(
            f"{called}: got max_norm={max_norm!r}, expected a positive number or a tensor of shape (); pass the norm "
            f"that no example's gradient may exceed."
        )
