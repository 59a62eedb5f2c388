"""Compiled functions: the cache of their graphs, and calls of them inside transforms."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from functorch_lite import _C
from functorch_lite.compile import _arguments, _bases, _levels, _trace
from functorch_lite.compile._arguments import Arguments
from functorch_lite.compile._run import Input
from functorch_lite.compile._specialization import Options, Specialization
from functorch_lite.compile._subclasses import is_subclass

#: From leaves and their structure to leaves and the structure of the output.
LeavesFunction = Callable[[list[Any], Any], tuple[list[Any], Any]]

_all: weakref.WeakSet[CompiledLeaves] = weakref.WeakSet()
_compilations = 0
#: The tracer replaces functions of PyTorch while it runs.
_tracing = threading.RLock()


def clear_compile_cache() -> None:
    """Forget the graphs of all compiled functions, which are compiled again when they are next called.

    Returns:
        None. `num_of_recompilations` starts from 0 again.

    Example:
        >>> from functorch_lite.compile import clear_compile_cache, num_of_recompilations
        >>> clear_compile_cache()
        >>> num_of_recompilations()
        0
    """
    global _compilations
    _compilations = 0
    for compiled in list(_all):
        compiled.clear()


def num_of_recompilations() -> int:
    """Count the graphs that have been compiled since the cache was cleared.

    Returns:
        Their number; a forward and a backward graph are counted once.

    Example:
        >>> import torch
        >>> from functorch_lite.compile import aot_function, clear_compile_cache, nop, num_of_recompilations
        >>> clear_compile_cache()
        >>> f = aot_function(torch.sin, nop)
        >>> f(torch.ones(2)), f(torch.zeros(2)), f(torch.ones(3))
        (tensor([0.8415, 0.8415]), tensor([0., 0.]), tensor([0.8415, 0.8415, 0.8415]))
        >>> num_of_recompilations()
        2
    """
    return _compilations


class CompiledLeaves:
    """A function of leaves, and its graphs by what they depend on."""

    def __init__(self, function: LeavesFunction, options: Options, static_inputs: int = 0) -> None:
        self.function, self.options, self._static_inputs = function, options, static_inputs
        self._entries: dict[Any, list[_Entry]] = {}
        #: The function under transforms, by the transform.
        self.derived: dict[Hashable, CompiledLeaves] = {}
        _all.add(self)

    def clear(self) -> None:
        """Forget all graphs."""
        self._entries.clear()
        self.derived.clear()

    def call(self, leaves: list[Any], structure: Any, names: Callable[[], list[str]]) -> tuple[list[Any], Any]:
        """The leaves of the output and their structure, at the innermost level."""
        if _is_traced():
            return self.function(leaves, structure)
        if _C.current_level() is not None:
            return _levels.call(self, leaves, structure, names)
        arguments = Arguments(leaves)
        entry = self.find(arguments, structure, names)
        entry.compile()
        return entry.run(arguments.tensors), entry.structure

    def find(self, arguments: Arguments, structure: Any, names: Callable[[], list[str]]) -> _Entry:
        """The graph for certain arguments, which is made if there is none."""
        try:
            key = (structure, arguments.key(lambda i, tensor: self._describe(arguments, i, tensor)))
            entries = self._entries.setdefault(key, [])
        except (TypeError, RuntimeError):  # no hash, or no sizes
            arguments.check(names())
            raise
        entry = _valid(entries, arguments.tensors)
        if entry is not None:
            return entry
        global _compilations
        with _tracing:
            entry = _valid(entries, arguments.tensors)  # of another thread
            if entry is None:
                _compilations += 1
                entry = _Entry(self, arguments, structure, names())
                entries.append(entry)
            return entry

    def is_dynamic(self, arguments: Arguments, i: int, tensor: Tensor) -> bool:
        """Whether the sizes of tensor i may be symbols."""
        may_be = self.options.dynamic and i >= self._static_inputs
        return may_be and i not in arguments.sharing and not is_subclass(tensor)

    def _describe(self, arguments: Arguments, i: int, tensor: Tensor) -> Any:
        is_dynamic = self.is_dynamic(arguments, i, tensor)
        shape_key = _arguments.dynamic_shape_key if is_dynamic else _arguments.static_shape_key
        return _arguments.layout_key(tensor), shape_key(tensor)


class _Entry:
    """One graph, for certain arguments, and what it depends on beside their key."""

    def __init__(self, compiled: CompiledLeaves, arguments: Arguments, structure: Any, names: Sequence[str]) -> None:
        self.structure: Any = None
        template = arguments.template()

        def function(tensors: list[Any]) -> list[Any]:
            leaves, self.structure = compiled.function(template.filled(tensors), structure)
            return leaves

        arguments.check(names)
        by_tensor = dict(zip(arguments.places, names, strict=True))
        inputs = [
            Input(
                by_tensor[i],
                tensor,
                tensor.requires_grad,
                tensor.is_leaf,
                compiled.is_dynamic(arguments, i, tensor),
                i in arguments.sharing,
            )
            for i, tensor in enumerate(arguments.tensors)
        ]

        def traced(bases: _bases.Bases | None) -> _trace.Trace:
            of_bases = function if bases is None else bases.function(function)
            taken = [replace(x) for x in inputs] if bases is None else bases.inputs(inputs, arguments.tensors)
            options = compiled.options
            return _trace.trace(of_bases, taken, options.decompositions, options.dynamic)

        self._bases = _bases.of_views(arguments.tensors)
        trace = traced(self._bases)
        of_written = _bases.of_written(trace.writes, arguments.shared, arguments.tensors)
        if of_written is not None:
            self._bases = of_written
            trace = traced(self._bases)
        arguments.check_generators(trace.generators())
        self._captured = [(tensor, _captured_key(tensor)) for tensor in trace.captured]
        self._training = [(module, module.training) for module in trace.modules.seen]
        self._owners = [
            (members, name, tensor)
            for tensor, _ in self._captured
            for module in trace.modules.seen
            for members in (module._parameters, module._buffers)
            for name, member in members.items()
            if member is tensor
        ]
        self.specialization = Specialization(trace, compiled.options)
        self._dynamic = [i for i, one in enumerate(inputs) if one.dynamic]
        self._is_compiled = False
        self._guards = trace.guards() if self._dynamic else None

    def compile(self) -> None:
        """Have the graphs compiled, if they are not."""
        if self._is_compiled:
            return
        with _tracing:
            self.specialization.compile()
        self._is_compiled = True
        if self._dynamic:  # compilers may have added guards
            self._guards = self.specialization.trace.guards()

    def is_valid(self, tensors: list[Tensor]) -> bool:
        """Whether the graph is right for these, of which the key is that of the entry."""
        return (
            all(_captured_key(tensor) == key for tensor, key in self._captured)
            and all(module.training == training for module, training in self._training)
            and all(members.get(name) is tensor for members, name, tensor in self._owners)
            and (self._guards is None or self._guards([tensors[i] for i in self._dynamic]))
        )

    def run(self, tensors: list[Tensor], level: _C.AutodiffLevel | None = None) -> list[Any]:
        """The leaves of the output, for tensors of ``level``, the innermost one, or plain ones."""
        if self._bases is None:
            return self.specialization.run(tensors, level)
        leaves = self.specialization.run(self._bases.tensors(tensors), level)
        return [tensors[x.number] if isinstance(x, _bases.Argument) else x for x in leaves]


def _valid(entries: list[_Entry], tensors: list[Tensor]) -> _Entry | None:
    return next((entry for entry in entries if entry.is_valid(tensors)), None)


def _captured_key(tensor: Any) -> Any:
    return _arguments.layout_key(tensor), _arguments.static_shape_key(tensor)


def _is_traced() -> bool:
    """Whether somebody else traces this call: then the function becomes part of that graph."""
    level = _C.current_level()
    return _get_current_dispatch_mode() is not None or (level is not None and _levels.is_inlined(level))
