"""Compiled functions: the cache of their graphs, and calls of them inside transforms."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _get_current_dispatch_mode

from functorch_lite import _C
from functorch_lite.compile import _arguments, _bases, _checks, _donation, _levels, _trace
from functorch_lite.compile._arguments import Arguments
from functorch_lite.compile._run import Input
from functorch_lite.compile._specialization import Options, Specialization
from functorch_lite.compile._subclasses import is_subclass

#: From leaves and their structure to leaves and the structure of the output.
LeavesFunction = Callable[[list[Any], Any], tuple[list[Any], Any]]
#: Of the leaves of the arguments.
Names = Callable[[], list[str]]

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

    def __init__(
        self, function: LeavesFunction, options: Options, static_inputs: int = 0, is_users: bool = False
    ) -> None:
        """``static_inputs``: how many have sizes that never change. ``is_users``: no other one calls the user's."""
        self.is_users = is_users
        self.function, self.options, self._static_inputs = function, options, static_inputs
        self._entries: dict[Any, list[_Entry]] = {}
        #: Told of each graph, with the names and leaves of the arguments.
        self.on_compile: Callable[[Sequence[str], Sequence[Any]], None] | None = None
        #: Of the arguments that callers give away.
        self.donated: int | tuple[int, ...] | None = None
        #: Finds entries without Python where that is simple.
        self._shortcuts = _C.CallCache()
        #: The function under transforms, by the transform.
        self.derived: dict[Hashable, CompiledLeaves] = {}
        _all.add(self)

    def clear(self) -> None:
        """Forget all graphs."""
        self._entries.clear()
        self._shortcuts.clear()
        self.derived.clear()

    def call(self, leaves: list[Any], structure: Any, names: Names) -> tuple[list[Any], Any]:
        """The leaves of the output and their structure, at the innermost level."""
        if _is_traced():
            return self.function(leaves, structure)
        if _C.current_level() is not None:
            return _levels.call(self, leaves, structure, names)
        arguments = Arguments(leaves)
        entry = self._compiled_entry(arguments, structure, names)
        return entry.run(arguments.tensors), entry.structure

    def call_with(self, args: tuple[Any, ...], kwargs: dict[str, Any], names: Names) -> Any:
        """The output, for arguments that have been flattened by `torch.utils._pytree`."""
        output = self._shortcuts.call(args, kwargs)
        if output is not ...:
            return output
        leaves, structure = pytree.tree_flatten((args, kwargs))
        if _is_traced() or _C.current_level() is not None:
            return pytree.tree_unflatten(*self.call(leaves, structure, names))
        arguments = Arguments(leaves)
        candidates = () if self.donated is None else _donation.candidates(self.donated, args, arguments)
        entry = self._compiled_entry(arguments, structure, names)
        results = entry.run(arguments.tensors)
        donated = _donation.usable(candidates, arguments.tensors, results)
        if (shortcut := entry.shortcut(arguments.tensors, donated)) is not None:
            self._shortcuts.add(args, kwargs, *shortcut)
        for i in donated:
            _C.take_memory(arguments.tensors[i])
        return pytree.tree_unflatten(results, entry.structure)

    def _compiled_entry(self, arguments: Arguments, structure: Any, names: Names) -> _Entry:
        entry = self.find(arguments, structure, names)
        entry.compile()
        return entry

    def find(self, arguments: Arguments, structure: Any, names: Names) -> _Entry:
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
                if self.on_compile is not None:
                    self.on_compile(names(), arguments.filled(arguments.tensors))
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
        self._same_tensors = trace.found_elsewhere
        #: Whether the function writes tensors that are there before it is called.
        self.writes = bool(trace.writes)
        if self.writes and self._shares_captured(arguments.tensors):
            _checks.refuse_shared_memory()
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
        # With symbolic sizes PyTorch's tracer keeps some itself.
        if compiled.is_users and not compiled.options.dynamic:
            trace.check_that_nothing_is_kept()
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
            and self._finds_the_same(tensors)
            and all(module.training == training for module, training in self._training)
            and all(members.get(name) is tensor for members, name, tensor in self._owners)
            and (self._guards is None or self._guards([tensors[i] for i in self._dynamic]))
        )

    def _finds_the_same(self, tensors: list[Tensor]) -> bool:
        """Whether arguments and captured tensors are the same ones, and share memory, where they did in the trace."""
        if self._same_tensors:
            given = tensors if self._bases is None else self._bases.tensors(tensors)
            if any(given[i] is not tensor for i, tensor in self._same_tensors.items()):
                return False
        return not (self.writes and self._shares_captured(tensors))

    def _shares_captured(self, tensors: list[Tensor]) -> bool:
        memories = {_donation.memory(tensor) for tensor, _ in self._captured}
        return not memories.isdisjoint(map(_donation.memory, tensors))

    def shortcut(self, tensors: list[Tensor], donated: list[int]) -> tuple[Any, ...] | None:
        """What `_C.CallCache` has to know about calls with tensors like these. None if Python has to do them."""
        if self._bases is not None or self._same_tensors:
            return None
        found = self.specialization.shortcut(tensors)
        if found is None:
            return None
        structure = _template(self.structure)
        graph = found.compute, found.captured, found.writes, found.outputs, structure
        return *graph, self._training, self._owners, donated

    def run(self, tensors: list[Tensor], level: _C.AutodiffLevel | None = None) -> list[Any]:
        """The leaves of the output, for tensors of ``level``, the innermost one, or plain ones."""
        if self._bases is None:
            return self.specialization.run(tensors, level)
        leaves = self.specialization.run(self._bases.tensors(tensors), level)
        return [tensors[x.number] if isinstance(x, _bases.Argument) else x for x in leaves]


def _valid(entries: list[_Entry], tensors: list[Tensor]) -> _Entry | None:
    return next((entry for entry in entries if entry.is_valid(tensors)), None)


def _template(structure: pytree.TreeSpec) -> Any:
    """The structure with the numbers of its leaves; or, where it is not made of Python's containers, a function."""

    def is_plain(spec: pytree.TreeSpec) -> bool:
        return spec.is_leaf() or (spec.type in (tuple, list, dict) and all(map(is_plain, spec.children())))

    if is_plain(structure):
        return pytree.tree_unflatten(range(structure.num_leaves), structure)
    return lambda leaves: pytree.tree_unflatten(leaves, structure)


def _captured_key(tensor: Any) -> Any:
    return _arguments.layout_key(tensor), _arguments.static_shape_key(tensor)


def _is_traced() -> bool:
    """Whether somebody else traces this call: then the function becomes part of that graph."""
    level = _C.current_level()
    return _get_current_dispatch_mode() is not None or (level is not None and _levels.is_inlined(level))
