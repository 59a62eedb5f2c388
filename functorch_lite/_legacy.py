"""Modules as functions of tuples of tensors: the interface of the functorch package before `functional_call`."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from functorch_lite import _checks
from functorch_lite._ensemble import stack_module_state
from functorch_lite._modules import functional_call


class _Stateless(nn.Module):
    """A module that is called with the tensors of its parameters and buffers, in the order of its names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.stateless_model = model
        self.param_names = tuple(name for name, _ in model.named_parameters())
        self.buffer_names = tuple(name for name, _ in model.named_buffers())

    def _call(
        self, params: Iterable[Tensor], buffers: Iterable[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        state: dict[str, Tensor] = {}
        for kind, names, tensors in (("parameter", self.param_names, params), ("buffer", self.buffer_names, buffers)):
            given = tuple(tensors)
            _checks.check_a_tensor_for_each(type(self).__name__, kind, names, len(given))
            state.update(zip(names, given, strict=True))
        return functional_call(self.stateless_model, state, args, kwargs)


class FunctionalModule(_Stateless):
    """What `make_functional` returns: call it with the parameters and the arguments of the module."""

    @staticmethod
    def _create_from(
        model: nn.Module, disable_autograd_tracking: bool = False
    ) -> tuple[FunctionalModule, tuple[Tensor, ...]]:
        stateless, params, _ = _without_state(model, disable_autograd_tracking)
        return FunctionalModule(stateless), params

    def forward(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> Any:
        """Call the module with other parameters."""
        return self._call(params, (), args, kwargs)


class FunctionalModuleWithBuffers(_Stateless):
    """What `make_functional_with_buffers` returns: call it with parameters, buffers and the arguments of the module."""

    @staticmethod
    def _create_from(
        model: nn.Module, disable_autograd_tracking: bool = False
    ) -> tuple[FunctionalModuleWithBuffers, tuple[Tensor, ...], tuple[Tensor, ...]]:
        stateless, params, buffers = _without_state(model, disable_autograd_tracking)
        return FunctionalModuleWithBuffers(stateless), params, buffers

    def forward(self, params: Iterable[Tensor], buffers: Iterable[Tensor], *args: Any, **kwargs: Any) -> Any:
        """Call the module with other parameters and buffers. Writes into buffers are writes into the given tensors."""
        return self._call(params, buffers, args, kwargs)


def _without_state(
    model: nn.Module, disable_autograd_tracking: bool
) -> tuple[nn.Module, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """A copy of a module with tensors that have no memory, its parameters, and its buffers. Tied ones stay tied."""
    stateless = copy.deepcopy(model)
    params, buffers = tuple(stateless.parameters()), tuple(stateless.buffers())
    empty: dict[Tensor | None, Tensor | None] = {None: None}
    empty.update({p: nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in params})
    empty.update({b: torch.empty_like(b, device="meta") for b in buffers})
    for module in stateless.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: empty[tensor] for name, tensor in tensors.items()})  # type: ignore[misc]
    if disable_autograd_tracking:
        for param in params:
            param.requires_grad_(False)
    return stateless, params, buffers


def make_functional(
    model: nn.Module, disable_autograd_tracking: bool = False
) -> tuple[FunctionalModule, tuple[Tensor, ...]]:
    """Split a module without buffers into a function and its parameters.

    The interface of the functorch package, for programs that were written for it; new ones use `functional_call`.

    Args:
        model: The module. It is copied, and neither changed nor used later.
        disable_autograd_tracking: Whether the returned parameters do not require grad. Default False: they do if the
            module's do.

    Returns:
        ``(func, params)``: ``func(params, *args, **kwargs)`` calls the module with ``params``, a tuple of tensors in
        the order of ``model.parameters()``. Tied parameters are there once.

    Raises:
        RuntimeError: The module has buffers.
        TypeError: Something else than a module.
        ValueError: ``func`` is called with another number of tensors.

    Example:
        >>> import torch
        >>> from functorch_lite import grad, make_functional
        >>> func, params = make_functional(torch.nn.Linear(2, 1))
        >>> grad(lambda params, x: func(params, x).sum())(params, torch.ones(2))
        (tensor([[1., 1.]]), tensor([1.]))
    """
    _checks.check_module("make_functional", model)
    _checks.check_no_buffers("make_functional", [name for name, _ in model.named_buffers()])
    return FunctionalModule._create_from(model, disable_autograd_tracking)


def make_functional_with_buffers(
    model: nn.Module, disable_autograd_tracking: bool = False
) -> tuple[FunctionalModuleWithBuffers, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Split a module into a function, its parameters and its buffers.

    The interface of the functorch package, for programs that were written for it; new ones use `functional_call`.

    Args:
        model: As for `make_functional`.
        disable_autograd_tracking: As for `make_functional`.

    Returns:
        ``(func, params, buffers)``: ``func(params, buffers, *args, **kwargs)`` calls the module with these tuples of
        tensors, in the order of ``model.parameters()`` and ``model.buffers()``.

    Raises:
        TypeError: Something else than a module.
        ValueError: ``func`` is called with another number of tensors.

    Example:
        >>> import torch
        >>> from functorch_lite import make_functional_with_buffers
        >>> func, params, buffers = make_functional_with_buffers(torch.nn.BatchNorm1d(3))
        >>> len(params), len(buffers), func(params, buffers, torch.ones(4, 3)).shape
        (2, 3, torch.Size([4, 3]))
    """
    _checks.check_module("make_functional_with_buffers", model)
    return FunctionalModuleWithBuffers._create_from(model, disable_autograd_tracking)


def combine_state_for_ensemble(
    models: Sequence[nn.Module],
) -> tuple[FunctionalModuleWithBuffers, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Stack the parameters and buffers of several modules of one architecture, and make a function of the module.

    The interface of the functorch package, for programs that were written for it; new ones use `stack_module_state`.

    Args:
        models: Modules of one class, in one training mode.

    Returns:
        ``(func, params, buffers)``, as from `make_functional_with_buffers`, with a new first dimension in each tensor
        that counts the models. The tensors do not require grad.

    Raises:
        ValueError: As for `stack_module_state`.
        TypeError: Something else than modules.

    Example:
        >>> import torch
        >>> from functorch_lite import combine_state_for_ensemble, vmap
        >>> func, params, buffers = combine_state_for_ensemble([torch.nn.Linear(3, 2) for _ in range(5)])
        >>> vmap(func, in_dims=(0, 0, None))(params, buffers, torch.ones(3)).shape
        torch.Size([5, 2])
    """
    params, buffers = stack_module_state(models)
    func, *_ = make_functional_with_buffers(models[0])
    return func, tuple(p.detach() for p in params.values()), tuple(buffers.values())
