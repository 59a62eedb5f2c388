"""A graph as a program: a list of operator calls, recorded from one run of the graph and run by one loop in C++."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from functorch_lite import _C
from functorch_lite.compile import _nodes
from functorch_lite.compile._backends import make_boxed_func

#: Programs for different sizes that a graph keeps. A size that comes again after so many others is recorded again.
_MOST_PROGRAMS = 128

_UNKNOWN_SIZES = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)
#: So are these marked, for masks among the indices.
_INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten._unsafe_index.Tensor)
_MASKS = (torch.bool, torch.uint8)


@dataclass(frozen=True)
class Recording:
    """The graph for tensors of certain sizes."""

    program: _C.Program
    #: For each output: the number of the program's output, or None.
    places: tuple[int | None, ...]
    #: For each output that is no tensor: what it is.
    others: tuple[Any, ...]

    def outputs(self, tensors: Sequence[Tensor]) -> list[Any]:
        """The outputs of the graph."""
        return [
            other if place is None else tensors[place] for place, other in zip(self.places, self.others, strict=True)
        ]


class Replay:
    """What runs in the place of a graph."""

    _boxed_call = True

    def __init__(self, gm: fx.GraphModule) -> None:
        self._module = gm
        self._simplifies = not any(_writes(node) for node in gm.graph.nodes)
        self._recordings: dict[Hashable, Recording] = {}

    def __call__(self, inputs: list[Any]) -> list[Any]:
        """The outputs. Clears the list, so that each input is freed after its last use."""
        recording = self.recording(inputs)
        if recording is None:
            return self._record(inputs)
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        inputs.clear()
        return recording.outputs(recording.program.run(tensors))

    def recording(self, inputs: Sequence[Any]) -> Recording | None:
        """What was recorded for inputs like these."""
        return self._recordings.get(_key(inputs))

    def _record(self, inputs: Sequence[Any]) -> list[Any]:
        recorder = _C.Recorder(self._simplifies)
        with recorder:
            lifted = [recorder.lift(x) if isinstance(x, Tensor) else x for x in inputs]
            outputs = list(self._module(*lifted))
        which = [i for i, x in enumerate(outputs) if isinstance(x, Tensor)]
        program, tensors = recorder.finish([outputs[i] for i in which])
        places = {i: place for place, i in enumerate(which)}
        recording = Recording(
            program,
            tuple(places.get(i) for i in range(len(outputs))),
            tuple(None if i in places else x for i, x in enumerate(outputs)),
        )
        if len(self._recordings) >= _MOST_PROGRAMS:
            self._recordings.clear()
        self._recordings[_key(inputs)] = recording
        return recording.outputs(tensors)


def _key(inputs: Sequence[Any]) -> Hashable:
    return tuple((x.shape, x.stride()) if isinstance(x, Tensor) else x for x in inputs)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _is_recordable(node: fx.Node) -> bool:
    """Whether the node does the same in each run, for inputs of the same sizes, and consists of calls of operators."""
    if node.op != "call_function":
        return node.op != "call_module"
    if isinstance(node.target, OpOverload):
        values = pytree.tree_leaves(_nodes.value_of(node))
        sizes_are_known = not any(tag in node.target.tags for tag in _UNKNOWN_SIZES)
        if node.target in _INDEXING:
            indices = [_nodes.value_of(source) for source in node.all_input_nodes[1:]]
            sizes_are_known = all(isinstance(x, Tensor) and x.dtype not in _MASKS for x in indices)
        return sizes_are_known and not any(free_unbacked_symbols(x) for x in values if isinstance(x, Tensor))
    return _nodes.is_getitem(node) or _nodes.is_number(node)


def replay(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[[list[Any]], Any]:
    """Compile a graph into a program that runs at once, without Python between operators.

    The first run calls the graph's operators one by one and records them. What does not depend on the inputs is kept
    from then on, views become descriptions of memory, operators that change nothing are left out, and a loop in C++
    calls the rest. Each size of the inputs is recorded once.

    Args:
        gm: A graph of ``torch.ops`` operators that returns a list or tuple; it stays as it is.
        example_inputs: Not used.

    Returns:
        A function that takes its inputs in one list, which it clears. Where the graph has nodes that are no operators,
        or results of unknown size, the graph itself runs, as by `nop`.

    Example:
        >>> import torch
        >>> from functorch_lite.compile import aot_function, replay
        >>> f = aot_function(lambda x: x.sin() + torch.zeros(3), replay)
        >>> f(torch.zeros(3)), f(torch.ones(3))
        (tensor([0., 0., 0.]), tensor([0.8415, 0.8415, 0.8415]))

    Note:
        Results are those of the graph to the last bit, but that a zero may have the other sign, and that a product with
        the identity matrix is left out, also where infinity times its zeros would be NaN.
    """
    if all(_is_recordable(node) for node in gm.graph.nodes):
        return Replay(gm)
    return make_boxed_func(gm)
