"""Several models as one: their parameters and buffers stacked, for `vmap`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from functorch_lite import _module_checks


def stack_module_state(models: Sequence[nn.Module] | nn.ModuleList) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Stack the parameters and buffers of several modules of one architecture, for `vmap` over an ensemble.

    Args:
        models: Modules of one class, in one training mode.

    Returns:
        ``(params, buffers)``: for each name a tensor with a new first dimension that counts the models. The
        parameters are leaves that require grad if the models' do.

    Raises:
        ValueError: No models, different classes, different training modes, or tensors of different names, shapes,
            dtypes or devices.
        TypeError: Something else than modules.

    Example:
        >>> import torch
        >>> from functorch_lite import functional_call, stack_module_state, vmap
        >>> models = [torch.nn.Linear(3, 2) for _ in range(5)]
        >>> params, buffers = stack_module_state(models)
        >>> call = lambda params, x: functional_call(models[0], params, x)
        >>> vmap(call, in_dims=(0, None))(params, torch.ones(3)).shape
        torch.Size([5, 2])
    """
    models = _module_checks.check_models(models)
    params = _stack("parameter", [dict(model.named_parameters()) for model in models])
    buffers = _stack("buffer", [dict(model.named_buffers()) for model in models])
    return params, buffers


def _stack(kind: str, tensors: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    stacked = {}
    for name in dict.fromkeys(name for one in tensors for name in one):
        column = [one.get(name) for one in tensors]
        _module_checks.check_alike("stack_module_state", kind, name, column)
        stacked[name] = torch.stack([tensor.detach() for tensor in column if tensor is not None])
        stacked[name].requires_grad_(tensors[0][name].requires_grad)
    return stacked


def construct_in_ensemble(
    make_model: Callable[..., nn.Module], count: int, *args: Any, seed: int | None = None, **kwargs: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Make several models that differ in their random initialisation, as stacked parameters and buffers.

    The same numbers as making the models one after another and stacking them, but no more than one model is in memory
    beside the stack.

    Args:
        make_model: A class of modules, or a function that makes one.
        count: How many models.
        args: The positional arguments of ``make_model``.
        seed: Model number ``i`` is what ``make_model`` makes after ``torch.manual_seed(seed + i)``, and PyTorch's
            generators are as before afterwards. Default None: each model draws on, as in a loop.
        kwargs: The keyword arguments of ``make_model``.

    Returns:
        ``(params, buffers)`` as of `stack_module_state`.

    Raises:
        ValueError: ``count`` is less than 1, the models differ in the names, shapes, dtypes or devices of their
            tensors, or are lazy.
        TypeError: ``make_model`` is not callable or makes no module.

    Example:
        >>> import torch
        >>> from functorch_lite import construct_in_ensemble, functional_call, vmap
        >>> params, buffers = construct_in_ensemble(torch.nn.Linear, 5, 3, 2, seed=0)
        >>> with torch.device("meta"):  # a model without numbers, to call
        ...     model = torch.nn.Linear(3, 2)
        >>> call = lambda params, x: functional_call(model, params, x)
        >>> vmap(call, in_dims=(0, None))(params, torch.ones(3)).shape
        torch.Size([5, 2])
    """
    _module_checks.check_construction(make_model, count, seed)
    stacks: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    with torch.random.fork_rng() if seed is not None else nullcontext():
        for i in range(count):
            if seed is not None:
                torch.manual_seed(seed + i)
            model = _module_checks.check_constructed(make_model(*args, **kwargs))
            for kind, stack, tensors in zip(
                ("parameter", "buffer"), stacks, (model.named_parameters(), model.named_buffers()), strict=True
            ):
                _put(kind, stack, dict(tensors), i, count)
    return stacks


def _put(kind: str, stack: dict[str, Tensor], tensors: dict[str, Tensor], index: int, count: int) -> None:
    """Put the tensors of one model into the stack."""
    with torch.no_grad():
        for name, tensor in tensors.items() if index == 0 else ():
            stack[name] = tensor.new_empty((count, *tensor.shape)).requires_grad_(tensor.requires_grad)
        for name in dict.fromkeys([*stack, *tensors]):
            pair = [stack[name][index] if name in stack else None, tensors.get(name)]
            _module_checks.check_alike("construct_in_ensemble", kind, name, pair)
            stack[name][index] = tensors[name]
