"""What `functional_call` and its friends say of modules that they are given."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

#: Tensors without a shape.
LAZY = (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)
_STATES = {
    "write": "buffers are written as the module writes them",
    "commit": "once, when the outermost transform has returned",
    "return": "not written, but returned beside the output",
    "error": "not allowed",
}


def kinds(given: Any) -> str:
    """What something is, for messages: ``a list of Tensor``."""
    kind = type(given).__name__
    return f"a {kind} of {type(given[0]).__name__}" if isinstance(given, (tuple, list)) and given else kind


def check_module(module: Any) -> None:
    """Require a module whose tensors can be exchanged."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"functional_call: expected a module as first argument, got {type(module).__name__}.")
    if isinstance(module, nn.DataParallel):
        raise TypeError(
            "functional_call: nn.DataParallel copies its module to each device in each call, and the copies would not "
            "see the given tensors. Call the module inside, functional_call(model.module, ...)."
        )


def refuse_script(path: str) -> None:
    """Say that TorchScript has its tensors elsewhere."""
    name = f"its submodule {path!r}" if path else "the module"
    raise TypeError(
        f"functional_call: {name} is a ScriptModule, whose tensors cannot be exchanged. Use the module that it was "
        f"scripted or traced from."
    )


def refuse_lazy(name: str) -> None:
    """Say that a module has no tensors yet."""
    raise ValueError(
        f"functional_call: {name!r} is a lazy tensor without a shape. Call the module once with an example of its "
        f"input, and then functional_call."
    )


def check_state(state: Any) -> None:
    """Require a known way to treat buffers."""
    if state not in _STATES:
        known = ", ".join(f"{name!r} ({meaning})" for name, meaning in _STATES.items())
        raise ValueError(f"functional_call: got state={state!r}, expected one of {known}.")


def check_dictionaries(dictionaries: Any, kwargs: Any) -> None:
    """Require dictionaries of tensors, and one of keyword arguments."""
    if not isinstance(dictionaries, (tuple, list)) or not all(isinstance(one, dict) for one in dictionaries):
        raise TypeError(
            f"functional_call: parameters_and_buffers must be a dictionary of tensors by name, or a tuple or list of "
            f"such dictionaries, got {kinds(dictionaries)}."
        )
    if kwargs is not None and not isinstance(kwargs, dict):
        raise TypeError(f"functional_call: kwargs must be a dictionary, got {type(kwargs).__name__}.")


def refuse_unknown(module: nn.Module, unknown: Sequence[str], known: Iterable[str]) -> None:
    """Say which names the module does not have, and what they may be meant to be."""
    names = ", ".join(map(repr, unknown))
    known = sorted(known)
    close = [name for name in known if name.endswith(f".{unknown[0]}")]
    close = close or difflib.get_close_matches(unknown[0], known)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise ValueError(f"functional_call: {type(module).__name__} has no parameter or buffer named {names}.{hint}")


def refuse_two_tensors(names: Sequence[str]) -> None:
    """Say that one tensor of the module was given twice."""
    raise ValueError(
        f"functional_call: {', '.join(map(repr, names))} share one tensor in the module but are given different ones. "
        f"Give one of them, or pass tie_weights=False."
    )


def refuse_write(name: str, owner: nn.Module) -> None:
    """Say that a buffer was written where that was not allowed."""
    kind = type(owner).__name__
    path, _, buffer = name.rpartition(".")
    where = f"{kind} {path!r}" if path else kind
    raise ValueError(
        f"functional_call: state='error', and {where} writes its buffer {buffer!r} ({name!r}). Call eval() if the "
        f"write belongs to training, or pass state='return' to get the new value, or state='commit' to have it written."
    )


def batched_commit(name: str) -> str:
    """A buffer that is there once was to get a value of each example."""
    return (
        f"functional_call: state='commit', and the new value of {name!r} differs between the examples of a vmap, while "
        f"the buffer is there once. Pass state='return' and combine the values, give the buffer with a dimension that "
        f"is mapped, or, for batch norm, call replace_all_batch_norm_modules_ first."
    )


def check_shape(name: str, value: Tensor, target: Tensor) -> None:
    """Require that a buffer keeps its shape."""
    if value.shape != target.shape:
        raise ValueError(
            f"functional_call: state='commit', and the new value of {name!r} has shape {tuple(value.shape)}, but the "
            f"buffer has {tuple(target.shape)}. Pass state='return'."
        )


def check_models(given: Any) -> list[nn.Module]:
    """Require modules of one class, in one mode."""
    if isinstance(given, nn.Module) and not isinstance(given, (nn.ModuleList, nn.Sequential)):
        raise TypeError(f"stack_module_state: expected a list of modules, got one {type(given).__name__}.")
    models: list[nn.Module] = list(given)
    if not all(isinstance(model, nn.Module) for model in models):
        raise TypeError(f"stack_module_state: expected a list of modules, got {kinds(models)}.")
    if not models:
        raise ValueError("stack_module_state: expected at least one module, got none.")
    if len({model.training for model in models}) > 1:
        raise ValueError("stack_module_state: some modules are in training mode and some in eval mode; use one.")
    classes = sorted({type(model).__name__ for model in models})
    if len({type(model) for model in models}) > 1:
        raise ValueError(f"stack_module_state: all modules must be of one class, got {', '.join(classes)}.")
    return models


def check_alike(caller: str, kind: str, name: str, column: Sequence[Tensor | None]) -> None:
    """Require that tensors can be stacked."""
    tensors = [tensor for tensor in column if tensor is not None]
    if len(tensors) < len(column):
        raise ValueError(f"{caller}: only some of the modules have a {kind} {name!r}.")
    for what, values in (
        ("shapes", [tuple(tensor.shape) for tensor in tensors]),
        ("dtypes", [tensor.dtype for tensor in tensors]),
        ("devices", [tensor.device for tensor in tensors]),
    ):
        if len(set(values)) > 1:
            raise ValueError(f"{caller}: {kind} {name!r} differs between the modules: {what} {values}.")


def check_construction(make_model: Any, count: Any, seed: Any) -> None:
    """Require what `construct_in_ensemble` takes."""
    if not callable(make_model):
        raise TypeError(
            f"construct_in_ensemble: expected a class of modules, or a function that makes one, as first argument, "
            f"got {type(make_model).__name__}."
        )
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"construct_in_ensemble: got count={count!r}, expected the number of models, at least 1.")
    if seed is not None and not isinstance(seed, int):
        raise TypeError(f"construct_in_ensemble: got seed={seed!r}, expected an int, or None to draw as now.")


def check_constructed(model: Any) -> nn.Module:
    """Require that a module was made, and has its tensors."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"construct_in_ensemble: the first argument made a {type(model).__name__}, expected a module.")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(tensor, LAZY):
            raise ValueError(
                f"construct_in_ensemble: {name!r} is a lazy tensor without a shape. Make models with known sizes."
            )
    return model


def compiled_state() -> str:
    """Whether a buffer is written is not known while a graph is made."""
    return (
        "functional_call: torch.compile does not see whether a buffer is written, so that state='commit' and "
        "state='error' are not possible inside. Use state='return', or functorch_lite.jit."
    )
