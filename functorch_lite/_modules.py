"""nn.Module under transforms: call one with other parameters, and tame batch norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from functorch_lite import _module_checks, _module_state


def functional_call(
    module: nn.Module,
    parameters_and_buffers: dict[str, Tensor] | Sequence[dict[str, Tensor]],
    args: Any = None,
    kwargs: dict[str, Any] | None = None,
    *,
    tie_weights: bool = True,
    strict: bool = False,
    state: Literal["write", "commit", "return", "error"] = "write",
) -> Any:
    """Call ``module`` with the given tensors in the place of its parameters and buffers.

    The module is as before when the call returns, and its hooks and parametrizations run.

    Args:
        module: The module to call.
        parameters_and_buffers: Tensors by the names of ``module.named_parameters()`` and ``module.named_buffers()``,
            or several such dictionaries; None for one that is to be absent. Names that are left out keep the module's
            own tensors. The name of a parametrized tensor, ``"weight"``, gives what the parametrization computes, and
            ``"parametrizations.weight.original"`` what it computes it from.
        args: The positional arguments: a tuple, or a single one that is not a tuple. Default none.
        kwargs: The keyword arguments. Default none.
        tie_weights: Whether tensors that the module shares between names stay shared when one of the names is given.
        strict: Whether every parameter and buffer must be given.
        state: What becomes of buffers that the module writes, as batch norm does in training. ``"write"``: it writes
            in place in the given tensor or its own; one that it replaces is put into the given dictionary.
            ``"commit"``: new values are written into the given tensors or the module's own, without derivatives, once,
            when the outermost transform has returned without an error. ``"return"``: nothing is written, and the call
            returns ``(output, buffers)``. ``"error"``: a write is an error. Default ``"write"``.

    Returns:
        What the module returns; with ``state="return"`` also a dictionary of all buffers as they are after the call.

    Raises:
        ValueError: A name is given in two dictionaries, two tied names get different tensors, a name is unknown,
            ``strict`` and a name is missing, or the module is lazy; a write that ``state="error"`` does not allow, or
            one of ``state="commit"`` that differs between the examples of a `vmap`.
        TypeError: A value is not a tensor; a ScriptModule or nn.DataParallel.

    Example:
        >>> import torch
        >>> from functorch_lite import functional_call, grad
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> loss = lambda params: functional_call(layer, params, torch.ones(2)).sum()
        >>> grad(loss)({"weight": torch.zeros(1, 2)})
        {'weight': tensor([[1., 1.]])}
        >>> norm = torch.nn.BatchNorm1d(2, affine=False)
        >>> _, buffers = functional_call(norm, {}, torch.rand(4, 2), state="return")
        >>> buffers["num_batches_tracked"], norm.num_batches_tracked
        (tensor(1), tensor(0))

    Note:
        Threads that call the same module in this way take turns. A thread that calls it as ``module(x)`` may see the
        given tensors.
    """
    _module_checks.check_module(module)
    _module_checks.check_state(state)
    dictionaries = [parameters_and_buffers] if isinstance(parameters_and_buffers, dict) else parameters_and_buffers
    _module_checks.check_dictionaries(dictionaries, kwargs)
    given: dict[str, Tensor | None] = {}
    owner: dict[str, Any] = {}
    for dictionary in dictionaries:
        for name, tensor in dictionary.items():
            if name in given:
                raise ValueError(f"functional_call: {name!r} is given in more than one dictionary.")
            if not (tensor is None or isinstance(tensor, Tensor)):
                raise TypeError(f"functional_call: {name!r} must be a tensor, got {type(tensor).__name__}.")
            given[name], owner[name] = tensor, dictionary
    arguments = args if isinstance(args, tuple) else () if args is None else (args,)
    with _module_state.lock_of(module):
        slots = _module_state.Slots(module)
        swaps = _with_tied_names(slots, given) if tie_weights else given
        _check_names(module, slots, given, swaps, strict)
        if state != "write":
            return _call_with_copies(module, slots, swaps, arguments, kwargs or {}, state)
        with _module_state.swapped(slots, swaps):
            result = module(*arguments, **(kwargs or {}))
            for name, dictionary in owner.items():
                if name in slots.places:
                    dictionary[name] = slots.now(name)
    return result


def _call_with_copies(
    module: nn.Module,
    slots: _module_state.Slots,
    swaps: Mapping[str, Tensor | None],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    state: str,
) -> Any:
    copies = _module_state.Copies(slots, swaps, state == "commit")
    with _module_state.swapped(slots, {**swaps, **copies.given}):
        result = module(*args, **kwargs)
        if state == "return":
            return result, copies.now()
        if state == "error":
            copies.refuse_writes()
        else:
            copies.commit()
        return result


def _with_tied_names(slots: _module_state.Slots, given: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    swaps = dict(given)
    for names in slots.names_of_each():
        if len(names) == 1:
            continue
        chosen = [name for name in names if name in given]
        if any(given[name] is not given[chosen[0]] for name in chosen):
            _module_checks.refuse_two_tensors(chosen)
        swaps.update({name: given[chosen[0]] for name in names if chosen})
    return swaps


def _check_names(
    module: nn.Module,
    slots: _module_state.Slots,
    given: dict[str, Tensor | None],
    swaps: dict[str, Tensor | None],
    strict: bool,
) -> None:
    for name, tensor in slots.tensors.items():
        if isinstance(tensor, _module_checks.LAZY):
            _module_checks.refuse_lazy(name)
    unknown = [name for name in given if name not in slots.places and not slots.is_known(name)]
    if unknown:
        _module_checks.refuse_unknown(module, sorted(unknown), slots.places)
    missing = [name for name, tensor in slots.tensors.items() if tensor is not None and name not in swaps]
    if strict and missing:
        names = ", ".join(map(repr, sorted(missing)))
        raise ValueError(f"functional_call: strict=True, and {names} are not given.")


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
