"""nn.Module under transforms: call one with other parameters, stack several, and tame batch norm."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_RECURRENT_WEIGHT = re.compile(r"(weight|bias)_(ih|hh|hr)_l\d+")


def functional_call(
    module: nn.Module,
    parameters_and_buffers: dict[str, Tensor] | Sequence[dict[str, Tensor]],
    args: Any = None,
    kwargs: dict[str, Any] | None = None,
    *,
    tie_weights: bool = True,
    strict: bool = False,
) -> Any:
    """Call ``module`` with the given tensors in the place of its parameters and buffers.

    The module is as before when the call returns. A buffer that the module writes in place (batch-norm statistics)
    is written in the given tensor; one that it replaces is put into the given dictionary.

    Args:
        module: The module to call.
        parameters_and_buffers: Tensors by the names of ``module.named_parameters()`` and ``module.named_buffers()``,
            or several such dictionaries. Names that are left out keep the module's own tensors.
        args: The positional arguments: a tuple, or a single one that is not a tuple. Default none.
        kwargs: The keyword arguments. Default none.
        tie_weights: Whether tensors that the module shares between names stay shared when one of the names is given.
        strict: Whether every parameter and buffer must be given.

    Returns:
        What the module returns.

    Raises:
        ValueError: A name is given in two dictionaries, two tied names get different tensors, a name is unknown, or
            ``strict`` and a name is missing.
        TypeError: A value is not a tensor.

    Example:
        >>> import torch
        >>> from functorch_lite import functional_call, grad
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> loss = lambda params: functional_call(layer, params, torch.ones(2)).sum()
        >>> grad(loss)({"weight": torch.zeros(1, 2)})
        {'weight': tensor([[1., 1.]])}
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"functional_call: expected a module as first argument, got {type(module).__name__}.")
    dictionaries = [parameters_and_buffers] if isinstance(parameters_and_buffers, dict) else parameters_and_buffers
    if not isinstance(dictionaries, (tuple, list)) or not all(isinstance(one, dict) for one in dictionaries):
        raise TypeError(
            f"functional_call: parameters_and_buffers must be a dictionary of tensors by name, or a tuple or list of "
            f"such dictionaries, got {_kinds(dictionaries)}."
        )
    if kwargs is not None and not isinstance(kwargs, dict):
        raise TypeError(f"functional_call: kwargs must be a dictionary, got {type(kwargs).__name__}.")
    given: dict[str, Tensor] = {}
    owner: dict[str, dict[str, Tensor]] = {}
    for dictionary in dictionaries:
        for name, tensor in dictionary.items():
            if name in given:
                raise ValueError(f"functional_call: {name!r} is given in more than one dictionary.")
            if not isinstance(tensor, Tensor):
                raise TypeError(f"functional_call: {name!r} must be a tensor, got {type(tensor).__name__}.")
            given[name], owner[name] = tensor, dictionary
    swaps = _with_tied_names(module, given) if tie_weights else dict(given)
    _check_names(module, given, swaps, strict)
    arguments = args if isinstance(args, tuple) else () if args is None else (args,)
    with _swapped(module, swaps) as written:
        result = module(*arguments, **(kwargs or {}))
        for name, dictionary in owner.items():
            dictionary[name] = written(name)
    return result


def _kinds(given: Any) -> str:
    kind = type(given).__name__
    return f"a {kind} of {type(given[0]).__name__}" if isinstance(given, (tuple, list)) and given else kind


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _with_tied_names(module: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    groups: dict[Tensor, list[str]] = {}
    for name, tensor in _named_tensors(module):
        groups.setdefault(tensor, []).append(name)
    swaps = dict(given)
    for names in groups.values():
        chosen = [name for name in names if name in given]
        if any(given[name] is not given[chosen[0]] for name in chosen):
            raise ValueError(
                f"functional_call: {', '.join(map(repr, chosen))} share one tensor in the module but are given "
                f"different ones. Give one of them, or pass tie_weights=False."
            )
        swaps.update({name: given[chosen[0]] for name in names if chosen})
    return swaps


def _check_names(module: nn.Module, given: dict[str, Tensor], swaps: dict[str, Tensor], strict: bool) -> None:
    known = {name for name, _ in _named_tensors(module)}
    unknown = sorted(given.keys() - known)
    unknown = [name for name in unknown if _slot(module, name) is None]
    if unknown:
        names = ", ".join(map(repr, unknown))
        raise ValueError(f"functional_call: {type(module).__name__} has no parameter or buffer named {names}.")
    missing = sorted(known - swaps.keys())
    if strict and missing:
        raise ValueError(f"functional_call: strict=True, and {', '.join(map(repr, missing))} are not given.")


def _slot(module: nn.Module, name: str) -> tuple[dict[str, Any], str] | None:
    """The dictionary that holds a tensor of the module, and its key there."""
    path, _, key = name.rpartition(".")
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        return None
    for tensors in (owner._parameters, owner._buffers):
        if key in tensors:
            return tensors, key
    return None


@contextmanager
def _swapped(module: nn.Module, swaps: dict[str, Tensor]) -> Iterator[Any]:
    slots = {name: slot for name in swaps if (slot := _slot(module, name)) is not None}
    before = {name: tensors[key] for name, (tensors, key) in slots.items()}

    def current(name: str) -> Tensor:
        tensors, key = slots[name]
        tensor: Tensor = tensors[key]
        return tensor

    try:
        for name, (tensors, key) in slots.items():
            tensors[key] = swaps[name]
        yield current
    finally:
        for name, (tensors, key) in slots.items():
            tensors[key] = before[name]
        _update_recurrent(module, slots)


def _update_recurrent(module: nn.Module, names: Iterable[str]) -> None:
    """Recurrent modules have a list of their weights, which otherwise keeps the given ones until the next call."""
    of_weights = [name.rpartition(".") for name in names if _RECURRENT_WEIGHT.search(name)]
    for path in {path for path, _, _ in of_weights}:
        owner = module.get_submodule(path)
        if isinstance(owner, nn.RNNBase):
            owner._update_flat_weights()


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
    if isinstance(models, nn.Module) and not isinstance(models, (nn.ModuleList, nn.Sequential)):
        raise TypeError(f"stack_module_state: expected a list of modules, got one {type(models).__name__}.")
    models = list(models)
    if not all(isinstance(model, nn.Module) for model in models):
        raise TypeError(f"stack_module_state: expected a list of modules, got {_kinds(models)}.")
    if not models:
        raise ValueError("stack_module_state: expected at least one module, got none.")
    if len({model.training for model in models}) > 1:
        raise ValueError("stack_module_state: some modules are in training mode and some in eval mode; use one.")
    classes = sorted({type(model).__name__ for model in models})
    if len({type(model) for model in models}) > 1:
        raise ValueError(f"stack_module_state: all modules must be of one class, got {', '.join(classes)}.")
    params = _stack("parameter", [dict(model.named_parameters()) for model in models])
    buffers = _stack("buffer", [dict(model.named_buffers()) for model in models])
    return params, buffers


def _stack(kind: str, tensors: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    stacked = {}
    for name in dict.fromkeys(name for one in tensors for name in one):
        column = [one[name] for one in tensors if name in one]
        if len(column) < len(tensors):
            raise ValueError(f"stack_module_state: only some of the modules have a {kind} {name!r}.")
        for what, values in (
            ("shapes", [tuple(tensor.shape) for tensor in column]),
            ("dtypes", [tensor.dtype for tensor in column]),
            ("devices", [tensor.device for tensor in column]),
        ):
            if len(set(values)) > 1:
                raise ValueError(f"stack_module_state: {kind} {name!r} differs between the modules: {what} {values}.")
        stacked[name] = torch.stack([tensor.detach() for tensor in column])
        stacked[name].requires_grad_(column[0].requires_grad)
    return stacked


def replace_all_batch_norm_modules_(root: nn.Module) -> nn.Module:
    """Make every batch norm in ``root`` use the statistics of its batch and keep none, in place.

    Running statistics are written in place, which `vmap` over examples cannot do: each example would write its own.

    Args:
        root: A module.

    Returns:
        The same module.

    Example:
        >>> import torch
        >>> from functorch_lite import replace_all_batch_norm_modules_
        >>> replace_all_batch_norm_modules_(torch.nn.BatchNorm1d(3)).running_mean is None
        True
    """
    if not isinstance(root, nn.Module):
        raise TypeError(f"replace_all_batch_norm_modules_: expected a module, got {type(root).__name__}.")
    for module in root.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return root
