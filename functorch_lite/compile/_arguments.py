"""The arguments of one call: which tensors a graph takes, and the key of what a graph depends on."""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from functorch_lite import _C
from functorch_lite.compile import _checks
from functorch_lite.compile._subclasses import is_subclass

#: Devices whose autocast state a graph depends on.
_AUTOCAST_DEVICES = ("cpu", "cuda")


class Arguments:
    """The leaves of the arguments. A tensor that is passed twice is one tensor."""

    def __init__(self, leaves: Sequence[Any]) -> None:
        self.tensors: list[Tensor] = []
        #: For each leaf: the number of its tensor, or None.
        self.places: list[int | None] = []
        #: For each leaf: None for a tensor.
        self.statics: list[Any] = []
        numbers: dict[int, int] = {}
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                number = numbers.setdefault(id(leaf), len(self.tensors))
                if number == len(self.tensors):
                    self.tensors.append(leaf)
                self.places.append(number)
                self.statics.append(None)
            else:
                self.places.append(None)
                self.statics.append(leaf)

    def check(self, names: Sequence[str]) -> None:
        """Require arguments that can be traced."""
        for name, place, static in zip(names, self.places, self.statics, strict=True):
            if place is None:
                _checks.check_hash(name, static, _static_key(static))
            else:
                _checks.check_traceable(name, self.tensors[place])

    def check_generators(self, used: Sequence[torch.Generator]) -> None:
        """Require that they are arguments: one that the function makes would be made once."""
        given = {x._cdata for x in self.statics if isinstance(x, torch.Generator)}  # type: ignore[attr-defined]
        if any(x._cdata not in given for x in used):  # type: ignore[attr-defined]
            _checks.refuse_generator()

    def template(self) -> Arguments:
        """The same without the tensors, which it would keep alive."""
        result = copy.copy(self)
        result.tensors = []
        return result

    def filled(self, tensors: Sequence[Any]) -> list[Any]:
        """The leaves with other tensors."""
        return [
            static if place is None else tensors[place] for place, static in zip(self.places, self.statics, strict=True)
        ]

    @functools.cached_property
    def shared(self) -> list[list[int]]:
        """Groups of tensors that lie in one memory."""
        if len(self.tensors) < 2:
            return []
        groups: dict[int, list[int]] = {}
        for i, tensor in enumerate(self.tensors):
            if tensor.layout == torch.strided and not _C.is_wrapper(tensor):
                groups.setdefault(tensor.untyped_storage()._cdata, []).append(i)
        return [group for group in groups.values() if len(group) > 1]

    @functools.cached_property
    def sharing(self) -> set[int]:
        """The tensors that share memory with others."""
        return {i for group in self.shared for i in group}

    def _sharing_key(self, group: list[int]) -> Any:
        members = [self.tensors[i] for i in group]
        numbers: dict[int, int] = {}
        bases = [(numbers.setdefault(id(_base_of(x)), len(numbers)), layout_key(_base_of(x))) for x in members]
        shapes = [(x.storage_offset(), static_shape_key(_base_of(x))) for x in members]
        return tuple(group), tuple(bases), tuple(shapes), members[0].untyped_storage().nbytes()

    def key(self, describe: Callable[[int, Tensor], Any]) -> Any:
        """What a graph for these arguments depends on, beside the structure."""
        return (
            tuple(self.places),
            tuple(_static_key(static) for static in self.statics),
            tuple(describe(i, tensor) for i, tensor in enumerate(self.tensors)),
            tuple(self._sharing_key(group) for group in self.shared),
            modes(),
        )


def modes() -> Any:
    """The global state that a trace depends on."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device() if torch._C._len_torch_function_stack() > 0 else None,
        torch.are_deterministic_algorithms_enabled(),
        *(
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            for device in _AUTOCAST_DEVICES
        ),
    )


def layout_key(tensor: Tensor) -> Any:
    """What a graph depends on beside sizes."""
    return (
        type(tensor),
        tensor.dtype,
        tensor.device,
        tensor.layout,
        tensor.requires_grad,
        tensor.is_leaf,
        tensor.is_conj(),
        tensor.is_neg(),
        *([] if type(tensor) in (Tensor, torch.nn.Parameter) else _parts_key(tensor)),
    )


def _parts_key(tensor: Tensor) -> Any:
    """Of the tensors that a subclass is made of."""
    if not is_subclass(tensor):
        return []
    names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    parts = [getattr(tensor, name) for name in names]
    return [repr(context), *((layout_key(part), static_shape_key(part)) for part in parts)]


def static_shape_key(tensor: Tensor) -> Any:
    """All sizes, exactly."""
    return tensor.shape, tensor.stride() if tensor.layout == torch.strided else None


def _base_of(tensor: Tensor) -> Tensor:
    return tensor if tensor._base is None else tensor._base


def dynamic_shape_key(tensor: Tensor) -> Any:
    """Sizes 0 and 1, which are never symbols; the guards of a graph speak of the others.

    How strides depend on sizes is known for a contiguous tensor only.
    """
    if not tensor.is_contiguous():
        return static_shape_key(tensor)
    return tuple(size if size < 2 else -1 for size in tensor.shape)


def _static_key(static: Any) -> Any:
    kind = type(static)
    if static is None or kind in (bool, int, str):
        return kind, static
    if kind in (float, complex):
        return kind, repr(static)  # 0.0 and -0.0 are equal
    if kind is slice:
        return kind, _static_key(static.start), _static_key(static.stop), _static_key(static.step)
    return kind, static


def names(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """A name for each leaf of the arguments, after the parameters of the user's function."""
    result = []
    for name, arg in [*zip(positional_names(function, len(args)), args, strict=True), *kwargs.items()]:
        result += [identifier(f"{name}{pytree.keystr(path)}") for path, _ in pytree.tree_flatten_with_path(arg)[0]]
    return result


def positional_names(function: Callable[..., Any], count: int) -> list[str]:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    found = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:count]
    rest = next((p.name for p in parameters if p.kind == p.VAR_POSITIONAL), "arg")
    return found + [f"{rest}_{i}" for i in range(count - len(found))]


def identifier(path: str, otherwise: str = "arg") -> str:
    """``params['layer.weight'][0]`` as ``params_layer_weight_0``; ``otherwise`` if nothing is left."""
    return re.sub(r"\W+", "_", path).strip("_") or otherwise
