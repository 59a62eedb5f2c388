"""Gradients of each example's loss: themselves, their norms, and their clipped sum."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from functorch_lite import _per_sample_checks
from functorch_lite._boundary import boundary
from functorch_lite._per_sample_run import PerSample
from functorch_lite._per_sample_terms import Total, Wanted
from functorch_lite._per_sample_uses import no_autocast

Params = dict[str, Tensor]


def per_sample_grads(
    model: nn.Module, loss: Callable[..., Tensor], *, batch_dim: int | None = 0
) -> Callable[[Params, Any], Params]:
    """Return a function that computes the gradient of each example's loss with respect to the parameters.

    The result is what a loop over the examples would compute, each given to the model as a batch of one. The model
    runs once on all examples. Where it calls layers that are known here, their gradients are products of matrices.

    Args:
        model: Takes a batch. Its training mode counts; its own tensors are used where none are given.
        loss: Called as ``loss(output, *targets)`` for one example, without a batch dimension, as in
            ``torch.nn.functional.cross_entropy(logits, target)`` with logits of shape ``(classes,)``. Returns a scalar.
        batch_dim: The dimension of examples in what the model takes and returns; None for a model that is written for
            one example. Default 0.

    Returns:
        A function of ``params`` and ``batch``. ``params`` has tensors by the names of ``model.named_parameters()``;
        those left out are constants, and so are buffers, which may be given too. ``batch`` is ``(input, *targets)``,
        pytrees whose tensors have the examples in front (input: in ``batch_dim``). An input that is a tuple holds the
        model's arguments. It returns a dictionary with a tensor of shape ``(examples, *shape)`` for each parameter.

    Raises:
        TypeError: ``params`` or ``batch`` is of another form.
        ValueError: Sizes do not fit; a loss is no scalar; batch norm is in training mode, where examples mix.

    Example:
        >>> import torch
        >>> from functorch_lite import per_sample_grads
        >>> model = torch.nn.Linear(3, 2)
        >>> gradients = per_sample_grads(model, torch.nn.functional.cross_entropy)
        >>> params = {name: p.detach() for name, p in model.named_parameters()}
        >>> gradients(params, (torch.randn(5, 3), torch.randint(2, (5,))))["weight"].shape
        torch.Size([5, 2, 3])

    Note:
        Random operators draw other numbers for each example. Under transforms, and for ``params`` that require grad,
        the result can be differentiated.
    """
    run = PerSample("per_sample_grads", Wanted.GRADIENTS, model, loss, batch_dim)

    def gradients(params: Params, batch: Any) -> Params:
        found = run.terms(params, batch)
        with no_autocast(next(iter(params.values()))):
            return {name: found.pop(name).gradients() for name in list(found)}

    return _outside_graphs(boundary("per_sample_grads", gradients))


def per_sample_grad_norms(
    model: nn.Module, loss: Callable[..., Tensor], *, batch_dim: int | None = 0
) -> Callable[[Params, Any], Tensor]:
    """Return a function that computes the norm of the gradient of each example's loss.

    The norm is that of all given parameters together. It is found for one parameter after the other, from the inputs
    and the cotangents of layers where that is cheaper than making the gradients.

    Args:
        model: As for `per_sample_grads`.
        loss: As for `per_sample_grads`.
        batch_dim: As for `per_sample_grads`.

    Returns:
        A function of ``params`` and ``batch`` that returns a tensor of shape ``(examples,)``.

    Raises:
        TypeError: As for `per_sample_grads`.
        ValueError: As for `per_sample_grads`.

    Example:
        >>> import torch
        >>> from functorch_lite import per_sample_grad_norms
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> norms = per_sample_grad_norms(model, lambda output: output.sum())
        >>> norms({"weight": torch.zeros(1, 2)}, (torch.tensor([[3.0, 4.0], [0.0, 1.0]]),))
        tensor([5., 1.])

    References:
        Goodfellow, Efficient per-example gradient computations, 2015. Li, Tramer, Liang, Hashimoto, Large language
        models can be strong differentially private learners, 2022.
    """
    run = PerSample("per_sample_grad_norms", Wanted.NORMS, model, loss, batch_dim)

    def norms(params: Params, batch: Any) -> Tensor:
        found = run.terms(params, batch)
        with no_autocast(next(iter(params.values()))):
            return _norms(found)

    return _outside_graphs(boundary("per_sample_grad_norms", norms))


def clipped_grad_sum(
    model: nn.Module, loss: Callable[..., Tensor], max_norm: float | Tensor, *, batch_dim: int | None = 0
) -> Callable[[Params, Any], tuple[Params, Tensor]]:
    """Return a function that sums the gradients of all examples' losses, each scaled down to a norm of ``max_norm``.

    This is the sum that DP-SGD adds noise to. The model runs forward and backward once; the sum is made from the inputs
    and cotangents of layers that were kept, with the cotangents scaled.

    Args:
        model: As for `per_sample_grads`.
        loss: As for `per_sample_grads`.
        max_norm: A longer gradient is scaled by ``max_norm / norm``; the norm is that of all parameters together.
        batch_dim: As for `per_sample_grads`.

    Returns:
        A function of ``params`` and ``batch`` that returns ``(sums, norms)``: a dictionary like ``params``, and the
        norms before clipping, of shape ``(examples,)``.

    Raises:
        TypeError: As for `per_sample_grads`.
        ValueError: As for `per_sample_grads`, or ``max_norm`` is not positive.

    Example:
        >>> import torch
        >>> from functorch_lite import clipped_grad_sum
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> step = clipped_grad_sum(model, lambda output: output.sum(), max_norm=1.0)
        >>> step({"weight": torch.zeros(1, 2)}, (torch.tensor([[3.0, 4.0], [0.0, 0.5]]),))
        ({'weight': tensor([[0.6000, 1.3000]])}, tensor([5.0000, 0.5000]))

    References:
        Abadi et al., Deep learning with differential privacy, 2016. Bu, Wang, Zha, Karypis, Differentially private
        optimization on large model at small cost, 2023.
    """
    run = PerSample("clipped_grad_sum", Wanted.SUMS, model, loss, batch_dim)
    _per_sample_checks.check_max_norm("clipped_grad_sum", max_norm)

    def clipped(params: Params, batch: Any) -> tuple[Params, Tensor]:
        found = run.terms(params, batch)
        with no_autocast(next(iter(params.values()))):
            norms = _norms(found)
            weights = (max_norm / norms).clamp(max=1.0)
            return {name: found.pop(name).weighted_sum(weights) for name in list(found)}, norms

    return _outside_graphs(boundary("clipped_grad_sum", clipped))


def _norms(found: dict[str, Total]) -> Tensor:
    squares = [total.square_norms() for total in found.values()]
    return torch.stack(squares).sum(0).sqrt()


def _outside_graphs(function: Callable[[Params, Any], Any]) -> Callable[[Params, Any], Any]:
    """Have ``torch.compile`` leave the call out of its graphs, with all that is called inside."""

    def call(params: Params, batch: Any) -> Any:
        dynamo = sys.modules.get("torch._dynamo")
        return (function if dynamo is None else dynamo.disable(function))(params, batch)

    functools.update_wrapper(call, function)
    return call
