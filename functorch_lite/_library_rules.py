"""What torch.library.register_vmap and CustomOpDef.register_vmap record is a batching rule here, too.

PyTorch makes a kernel of the user's function and registers it, with `Library.impl`, on a key of torch.func. That is
where it is seen: the function is taken out of the kernel's closure and registered on our key in the same library, so
that both live equally long. `Library.define` is where an operator is seen that comes again under the same name, as when
a cell of a notebook is run twice: rules of the earlier one are not for it.

The kernels of torch.library.register_autograd are seen in the same places, and learn forward mode:
`_custom_operator.py`.
"""

from __future__ import annotations

import functools
import gc
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch._ops import OpOverload
from torch.library import Library

from functorch_lite import _custom_operator, _linear_cross_entropy, _rules

_KEY = "FuncTorchBatched"
# Where operators arrive at a level that differentiates: kBelowAutograd in csrc/keys.h, with autograd on top.
_AUTODIFF_KEY = "AutogradPrivateUse3"
_plain_impl: Callable[..., None] = Library.impl
_plain_define: Callable[..., Any] = Library.define


def _closure(kernel: Any) -> dict[str, Any]:
    """What a kernel made by ``register_vmap`` captured; empty for any other function."""
    if type(kernel) is not FunctionType or not kernel.__qualname__.endswith(
        "register_vmap.<locals>.register.<locals>.wrapped_func"
    ):
        return {}
    return dict(inspect.getclosurevars(kernel).nonlocals)


def _adopt(library: Library, op: OpOverload, captured: dict[str, Any]) -> None:
    definition = captured.get("self")

    def find_rule() -> Any:
        # A CustomOpDef may get another function later, without another registration.
        return definition._vmap_fn if definition is not None else captured["func"]

    # PyTorch's own rules for these are loops.
    ours = _linear_cross_entropy.COMPOSITIONS.get(op.name())
    _rules.library_rules[op.name()] = ours or _rules.OperatorRule(op, find_rule)
    name = op.name().partition("::")[2]
    _plain_impl(library, name, _rules.kernel_of(op), _rules.RULES_KEY)
    composition = _linear_cross_entropy.DIFFERENTIABLE.get(op.name())
    if composition is not None:
        _plain_impl(library, name, composition, _AUTODIFF_KEY)


@functools.wraps(_plain_impl)
def _impl(self: Library, op_name: Any, fn: Any, dispatch_key: str = "", **options: Any) -> None:
    _plain_impl(self, op_name, fn, dispatch_key, **options)
    if dispatch_key == "Autograd":
        _custom_operator.teach_forward_mode(fn)
    captured = _closure(fn) if dispatch_key == _KEY else {}
    if captured:
        name = op_name.name() if isinstance(op_name, OpOverload) else op_name
        op = _rules.find_operator(f"{self.ns}::{name.rpartition('::')[2]}")
        if op is not None:
            _adopt(self, op, captured)


@functools.wraps(_plain_define)
def _define(self: Library, schema: str, *args: Any, **options: Any) -> Any:
    defined = _plain_define(self, schema, *args, **options)
    _rules.forget(f"{self.ns}::{schema.partition('(')[0].rpartition('::')[2]}")
    return defined


def _adopt_earlier() -> None:
    """Find what was registered before this package was imported."""
    if not any(key.endswith((f"/{_KEY}", "/Autograd")) for key in torch.library._impls):
        return
    objects = [found for generation in (2, 1, 0) for found in gc.get_objects(generation)]
    for found in objects:
        _custom_operator.teach_forward_mode(found)
    libraries = [found for found in objects if type(found) is Library]
    for captured in filter(None, map(_closure, objects)):
        # The name of the variable depends on the release.
        op: Any = (
            captured["self"]._opoverload if "self" in captured else captured.get("op_overload", captured.get("op"))
        )
        key = f"{op.name().replace('::', '/')}/{_KEY}"
        for library in libraries:
            if key in library._op_impls:
                _adopt(library, op, captured)


def install() -> None:
    """From now on, and for what was registered before."""
    _adopt_earlier()
    Library.impl = _impl  # type: ignore[method-assign]
    Library.define = _define  # type: ignore[method-assign]
