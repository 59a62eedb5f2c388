"""One run of a function at an autodiff level, with tensors from outside as inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from functorch_lite import _C, _commits, _tree
from functorch_lite.compile._annotations import ModuleStack
from functorch_lite.compile._subclasses import plain_tensors

#: From tensors to the leaves of the output.
TensorsFunction = Callable[[list[Any]], list[Any]]

_FAKE = torch._C._TorchDispatchModeKey.FAKE
_PYTHON = torch._C.DispatchKey.Python


@dataclass
class Input:
    """A tensor that the graph takes."""

    name: str
    #: None, once the function has been traced, for arguments; captured tensors are kept.
    tensor: Tensor | None
    #: Whether its gradient is computed.
    differentiated: bool
    is_leaf: bool
    #: Whether its sizes may become symbols.
    dynamic: bool = False
    #: Whether to take it for a tensor that shares no memory with others.
    is_apart: bool = False


@dataclass(frozen=True)
class Source:
    """Where a forward result is found after a run: an argument, a leaf of the output, or the base of one."""

    kind: str
    number: int


class Run:
    """Calls the function with variables of a level, and pulls gradients back."""

    def __init__(self, function: TensorsFunction, inputs: list[Input], grad_mode: bool, copies: bool) -> None:
        """``copies``: whether variables that are no leaves may be written, which takes a copy of them."""
        self.function, self.inputs, self.grad_mode, self.copies = function, inputs, grad_mode, copies
        self.level = _C.AutodiffLevel(False, "compile")
        self.captures = _Captures(self.level, self._capture)
        self.modules = ModuleStack()
        self.variables: list[Tensor] = []
        self.arguments: list[Tensor] = []  # as the function sees them
        self.leaves: list[Any] = []  # of the output
        self.found_elsewhere: dict[int, Tensor] = {}

    def forward(self, values: Sequence[Tensor]) -> None:
        """Call the function, with tensors one level down."""
        with self.level, torch.set_grad_enabled(self.grad_mode), _tree.capturing(self.captures.inside), self.captures:
            for one, value in zip(list(self.inputs), values, strict=True):
                self.lift(one, value)
            with self.modules.watching():
                self.leaves = self.captures.inside(_commits.outermost(self.function, list(self.arguments)))
            self.after_forward()

    def after_forward(self) -> None:
        """For what is to be found out while the level is open."""

    def backward(self, sources: Sequence[Source], tangents: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients of all inputs, for tangents of forward results."""
        which = [i for i, one in enumerate(self.inputs) if one.differentiated]
        variables = [self.variables[i] for i in which]
        with _tree.capturing(self.captures.inside), self.captures:
            found = self.level.backward([self.at(source) for source in sources], list(tangents), variables, False)
        gradients: list[Tensor | None] = [None] * len(self.inputs)
        for i, gradient in zip(which, found, strict=True):
            gradients[i] = gradient
        return gradients

    def at(self, source: Source) -> Any:
        """A forward result."""
        if source.kind == "argument":
            return self.arguments[source.number]
        leaf = self.leaves[source.number]
        return leaf._base if source.kind == "base" else leaf

    def lift(self, one: Input, value: Tensor) -> Tensor:
        """Add an input."""
        variable = self.level.lift_variable(value) if one.differentiated else self.level.lift_constant(value)
        argument = variable.clone() if self.copies and one.differentiated and not one.is_leaf else variable
        self.variables.append(variable)
        self.arguments.append(argument)
        return argument

    def _capture(self, tensor: Tensor) -> Tensor:
        """What takes the place of a tensor from outside, which is an input."""
        for i, (one, argument) in enumerate(zip(self.inputs, self.arguments, strict=False)):
            if one.tensor is tensor:
                self.found_elsewhere[i] = tensor
                return argument
        return self.new_input(tensor)

    def new_input(self, tensor: Tensor) -> Tensor:
        """What takes the place of a tensor from outside that nobody knew of."""
        return tensor


class _Captures(TorchFunctionMode):
    """Puts lifted tensors in the place of real ones, where the function uses such."""

    def __init__(self, level: _C.AutodiffLevel, lift: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._level, self._lift = level, lift

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = self.inside((args, kwargs or {}))
        if func is torch.autograd.grad:  # refuses wrappers
            return self._grad(*args, **kwargs)
        return func(*args, **kwargs)

    def inside(self, tree: Any) -> Any:
        """The tree with lifted tensors."""
        return pytree.tree_map_only(Tensor, self._inside, tree)

    def _inside(self, tensor: Tensor) -> Tensor:
        below = _C.innermost_value(tensor) if _C.is_wrapper(tensor) else tensor
        if isinstance(plain_tensors(below)[0], FakeTensor) or _is_inside_fake_tensors():
            return tensor
        return self._lift(tensor)

    def _grad(
        self,
        outputs: Any,
        inputs: Any,
        grad_outputs: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        only_inputs: bool = True,
        allow_unused: bool | None = None,
        is_grads_batched: bool = False,
        materialize_grads: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """`torch.autograd.grad`, which the function calls."""
        outputs, inputs = _as_list(outputs), _as_list(inputs)
        cotangents = _as_list(grad_outputs) if grad_outputs is not None else [None] * len(outputs)
        given = [torch.ones_like(y) if g is None else g for y, g in zip(outputs, cotangents, strict=True)]
        keep = create_graph if retain_graph is None else retain_graph
        allow = materialize_grads if allow_unused is None else allow_unused
        found = self._level.gradients(outputs, given, inputs, keep, create_graph, allow)
        if materialize_grads:
            found = [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]
        return tuple(found)


def _is_inside_fake_tensors() -> bool:
    """Whether fake tensors compute with real ones, on their own account."""
    return torch._C._get_dispatch_mode(_FAKE) is None or torch._C._dispatch_tls_is_dispatch_key_excluded(_PYTHON)


def _as_list(tensors: Any) -> list[Any]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)
