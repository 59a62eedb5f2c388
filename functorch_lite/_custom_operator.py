"""Forward mode of operators with torch.library.register_autograd, by transposing their backward function.

PyTorch's kernel for them records a Function when an argument requires grad, and otherwise calls the operator without
recording, which drops the tangents. That second way is replaced, inside the kernel, by one that looks for tangents.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from functorch_lite import _C, _checks, _tree
from functorch_lite._custom_function import transposed
from functorch_lite._units import Context, as_tuple

_KERNEL = "make_autograd_impl.<locals>.autograd_impl"
_PLAIN = "forward_no_grad"


def teach_forward_mode(kernel: Any) -> None:
    """Make a kernel of ``register_autograd`` know forward mode; other objects are left alone."""
    if type(kernel) is not FunctionType or kernel.__qualname__ != _KERNEL or kernel.__closure__ is None:
        return
    cells = dict(zip(kernel.__code__.co_freevars, kernel.__closure__, strict=True))
    if _PLAIN in cells and "Generated" in cells:
        cells[_PLAIN].cell_contents = _with_tangents(cells[_PLAIN].cell_contents, cells["Generated"].cell_contents)


def _with_tangents(plain: Callable[..., Any], function: type[Function]) -> Callable[..., Any]:
    if plain.__module__ == __name__:  # taught already
        return plain

    def forward(*args: Any) -> Any:
        level = _C.current_level()
        if not isinstance(level, _C.AutodiffLevel) or level.kind != "jvp" or not torch._C._is_fwd_grad_enabled():
            return plain(*args)
        tangents = [level.tangent_of(leaf) for leaf in _tree.flatten(args[:-1])[0] if isinstance(leaf, Tensor)]
        return plain(*args) if all(t is None for t in tangents) else _push(function, level, args)

    return forward


def _push(function: type[Function], level: _C.AutodiffLevel, args: tuple[Any, ...]) -> Any:
    """The outputs with their tangents. ``args`` are the operator's and one that PyTorch adds."""
    name = function.__name__.replace("GeneratedBackwardFor_", "the operator ")
    if any(isinstance(arg, (list, tuple)) for arg in args):
        _checks.refuse_tensor_lists(name)
    tangents = [level.tangent_of(arg) if isinstance(arg, Tensor) else None for arg in args]
    context = Context([tangent is not None for tangent in tangents])
    with torch.no_grad(), _set_fwd_grad_enabled(False):
        outputs = function.forward(context, *args)
    context.outputs = as_tuple(outputs)
    context.saved_tensors = context.to_save
    values = context.moved(lambda tensor, _: level.value_of(tensor))
    with _C.Below():
        pushed = transposed(name, function.backward, values, tangents)
    results = tuple(
        output if tangent is None else level.lift_dual(value, tangent)
        for output, value, tangent in zip(context.outputs, values.outputs, pushed, strict=True)
    )
    return results if isinstance(outputs, tuple) else results[0]
