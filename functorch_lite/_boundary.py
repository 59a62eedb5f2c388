"""Where user code meets ours: tracebacks without our frames, and the user's line for messages."""

from __future__ import annotations

import copy
import functools
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from types import FrameType, MethodType, TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import profiler

from functorch_lite import _C, _checks, _commits

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

Span = torch._C._profiler._RecordFunctionFast

_OURS = os.path.dirname(__file__) + os.sep
#: Frames further out have called vmap.
_MAPPING = os.path.join(_OURS, "_vmap.py")
_LIBRARIES = (_OURS, os.path.dirname(torch.__file__) + os.sep)
#: Set to anything but "0" to keep this package's frames in tracebacks.
FULL_TRACEBACK = "FUNCTORCH_LITE_FULL_TRACEBACK"


def _without_our_frames(traceback: TracebackType | None) -> TracebackType | None:
    kept = []
    while traceback is not None:
        if not traceback.tb_frame.f_code.co_filename.startswith(_OURS):
            kept.append(traceback)
        traceback = traceback.tb_next
    result = None
    for entry in reversed(kept):
        entry.tb_next = result
        result = entry
    return result


# PyTorch reads memory without an operator call in a few places. What it says there is about itself.
_NO_MEMORY = (
    "Inside a transform a tensor has no memory of its own, so .numpy(), .tolist(), .data_ptr(), pickle and "
    "copy.deepcopy cannot read it. Use PyTorch's operators (x.clone() in place of a deep copy), or convert what the "
    "transform returns."
)
_EXPLAINED = {
    "Cannot access data pointer of Tensor that doesn't have storage": _NO_MEMORY,
    "Cannot access storage of TensorImpl": _NO_MEMORY,
    "Batching rule not implemented for aten::item": (
        "vmap: torch.tensor of tensors turns them into Python values, and each example has another value. Use "
        "torch.stack, as in torch.stack([x[0], x[1]])."
    ),
    "called inside torch.vmap": (
        "vmap: backward() and torch.autograd.grad cannot run inside vmap, where the examples share one graph, nor "
        "inside several transforms. Differentiate with functorch_lite.grad or functorch_lite.vjp inside, as in "
        "vmap(grad(f)), or call backward() on what the outermost transform returns."
    ),
    "batched == nullptr INTERNAL ASSERT FAILED": _checks.batched_number_in_torch_func(),
    "Nested forward mode AD is not supported": _checks.nested_forward_mode(),
    "Attempted to call `variable.set_data(tensor)`": (
        "tensor.data = ...: a tensor inside a transform can only take the data of another tensor of the same "
        "transform. Return the new tensor from the function instead."
    ),
}


#: What PyTorch says of an operator without a derivative: its name and, in one of the ways, that of an argument.
_NO_DERIVATIVE = re.compile(
    r"^(?:the )?derivative for (?:aten::|'(?:inplace version of )?)"
    r"(?P<op>\w+)(?:: (?P<argument>\w+))?'? is not implemented"
)
_NO_OUT = re.compile(
    r"^(?P<op>\w+)\(\): functions with out=|"
    r"^Trying to use forward AD with (?P<forward>\w+) that does not support it because it is an out="
)


def _explain(transform: str, error: BaseException) -> None:
    """Say what the user can do, where PyTorch's own message does not fit the situation."""
    if not (isinstance(error, RuntimeError) and len(error.args) == 1 and isinstance(error.args[0], str)):
        return
    said = error.args[0]
    for raw, message in _EXPLAINED.items():
        if raw in said:
            error.args = (message,)
    if transform == "vmap":  # the derivative is taken by another transform
        return
    if "Trying to backward through the graph a second time" in said:
        error.args = (_checks.freed_graph(transform),)
    elif found := _NO_DERIVATIVE.search(said):
        error.args = (_checks.no_derivative(transform, found["op"], found["argument"]),)
    elif found := _NO_OUT.search(said):
        error.args = (_checks.no_derivative_of_out(transform, found["op"] or found["forward"].removesuffix("_out")),)


class Remade:
    """A function that is returned to users. pickle and copy.deepcopy make it again from what it was made of."""

    __slots__ = ("__dict__", "__weakref__", "_kind", "_made_of", "_span")

    def __init__(self, kind: str, named: object, made_of: MadeOf | None) -> None:
        # The attributes of a module are not its function's.
        updated = () if isinstance(named, torch.nn.Module) else functools.WRAPPER_UPDATES
        functools.update_wrapper(self, named, updated=updated)  # type: ignore[arg-type]
        self.__dict__.setdefault("__name__", _checks.name_of(named))
        self._kind, self._made_of, self._span = kind, made_of, f"functorch_lite::{kind}"

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return self if instance is None else MethodType(self, instance)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"<{self._kind} of {_checks.name_of(self)}>"

    def __reduce__(self) -> str | tuple[Any, ...]:
        if name := _global_name(self):
            return name
        if self._made_of is None:
            raise TypeError(_checks.not_picklable(self._kind))
        return _make_again, self._made_of

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self if self._made_of is None else _make_again(*copy.deepcopy(self._made_of, memo))


class Transformed(Remade):
    """What transforms return: an error shows the user's lines, a profile the transform, and commits are written."""

    __slots__ = ("_function",)

    def __init__(self, transform: str, function: Callable[..., Any], like: object, made_of: MadeOf | None) -> None:
        super().__init__(transform, like if callable(like) else function, made_of)
        self._function = function

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        try:
            if profiler._is_profiler_enabled:
                with Span(self._span):
                    result = self._function(*args, **kwargs)
            else:
                result = self._function(*args, **kwargs)
            if _commits.waiting:
                _commits.finish(sys._getframe())
            return result
        except BaseException as error:
            if _commits.waiting:
                _commits.discard(sys._getframe())
            _explain(self._kind, error)
            if os.environ.get(FULL_TRACEBACK, "0") == "0":
                error.__traceback__ = _without_our_frames(error.__traceback__)
            raise


_commits.boundary_code.append(Transformed.__call__.__code__)
#: A transform, its arguments and its keyword arguments.
MadeOf = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def _make_again(transform: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return transform(*args, **kwargs)


def _global_name(transformed: Remade) -> str:
    """Its name, if that is what its module has under the name, as with a transform that is a decorator."""
    qualified: str = getattr(transformed, "__qualname__", "")
    found: Any = sys.modules.get(transformed.__module__)
    for name in qualified.split("."):
        found = getattr(found, name, None)
    return qualified if found is transformed else ""


def boundary(transform: str, function: FunctionT, like: object = None, made_of: MadeOf | None = None) -> FunctionT:
    """Wrap what users call. ``like`` lends its name and docstring; ``made_of`` makes it again."""
    return Transformed(transform, function, like, made_of)  # type: ignore[return-value]


def _user_frame() -> FrameType | None:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame = frame.f_back
    return frame


def user_location() -> str:
    """``file.py:12``, the innermost line outside torch and this package."""
    frame = _user_frame()
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else ""


def _is_view_of(view: Tensor, whole: Tensor) -> bool:
    wrapped = _C.is_wrapper(view) or _C.is_wrapper(whole)
    return view is whole or (not wrapped and _C.have_one_storage(view, whole))


def _named_tensors(frame: FrameType) -> Iterator[tuple[str, Tensor]]:
    for name, value in [*frame.f_locals.items(), *frame.f_globals.items()]:
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, torch.nn.Module):
            for path, tensor in [*value.named_parameters(), *value.named_buffers()]:
                yield f"{name}.{path}", tensor


def name_of_tensor(tensor: Tensor) -> str:
    """What the user's program calls a tensor, or the one that it is a view of; an empty string if nobody names it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != _MAPPING:
        for name, candidate in _named_tensors(frame) if not frame.f_code.co_filename.startswith(_LIBRARIES) else ():
            if _is_view_of(tensor, candidate):
                return name
        frame = frame.f_back
    return ""


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, attributed to the user's line."""
    frame = _user_frame()
    if frame is None:
        warnings.warn(message, category, stacklevel=1)
        return
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(message, category, frame.f_code.co_filename, frame.f_lineno, registry=registry)


def warn_loop(operator: str) -> None:
    """Warn that ``operator`` runs example by example."""
    warn(
        f"vmap: {operator} has no batching rule, so it runs once for each example. This is right but slow; "
        f"see docs/batching_rules.md for how to add a rule.",
        _checks.LoopFallbackWarning,
    )
