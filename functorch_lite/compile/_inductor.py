"""Inductor as a compiler of graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._ops import OpOverload
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from functorch_lite._functionalize import functionalize
from functorch_lite.compile import _checks, _folding, _nodes

_aten = torch.ops.aten

# What Inductor calls between the kernels that it generates.
_NOT_GENERATED = {
    getattr(_aten, name).default
    for name in ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "mv", "addmv")
}

_twins = torch.library.Library("functorch_lite_random", "DEF")


def _twin(operator: OpOverload) -> OpOverload:
    """An operator that does the same, and that Inductor has to call: its own ways draw other numbers."""
    name = operator._schema.name.replace("aten::", "") + "_" + (operator._schema.overload_name or "default")
    if not hasattr(torch.ops.functorch_lite_random, name):
        # Inductor writes names of arguments into Python code, where "from" is no name.
        signature = str(operator._schema).partition("(")[2].replace(" from", " from_")
        _twins.define(f"{name}({signature}", tags=(torch.Tag.nondeterministic_seeded,))
        _twins.impl(name, operator, "CompositeExplicitAutograd")
        torch.library.register_fake(f"functorch_lite_random::{name}", operator, lib=_twins)
    twin: OpOverload = getattr(torch.ops.functorch_lite_random, name).default
    return twin


class _Lowering(fx.Interpreter):
    """Runs a graph with twins for its random operators, and returns also what these drew for nobody.

    Inductor would leave such draws out, and the next ones would be others than those of the graph. Products with
    identity matrices are left out.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self._products = _folding.products_with_identities(module.graph)

    def run_node(self, n: fx.Node) -> Any:
        if n in self._products:
            return self._products[n](*self.fetch_args_kwargs_from_env(n)[0])
        if _nodes.is_random(n) and n.target.namespace == "aten" and not n.target._schema.is_mutable:  # type: ignore[union-attr]
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return _twin(n.target)(*args, **kwargs)  # type: ignore[arg-type]
        return super().run_node(n)

    def output(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        unused = [self.env[node] for node in self.module.graph.nodes if _nodes.is_random(node) and not node.users]  # type: ignore[union-attr]
        return [*args[0], *(leaf for leaf in pytree.tree_leaves(unused) if isinstance(leaf, torch.Tensor))]


def _fake_inputs(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[FakeTensorMode, list[Any]]:
    """Inputs with the sizes that the graph was traced with, which may be symbols."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    inputs = [node.meta.get("val", given) for node, given in zip(placeholders, example_inputs, strict=True)]
    modes = {value.fake_mode for value in inputs if isinstance(value, FakeTensor)}
    # A graph traced with real tensors has a mode for each value.
    mode = modes.pop() if len(modes) == 1 else FakeTensorMode()

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, FakeTensor) and tensor.fake_mode is mode:
            return tensor
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device)

    with mode:
        return mode, pytree.tree_map_only(torch.Tensor, fake, inputs)


def _devices(gm: fx.GraphModule) -> set[str]:
    """The types of devices that the graph has tensors on."""
    values = pytree.tree_leaves([node.meta.get("val") for node in gm.graph.nodes])
    return {value.device.type for value in values if isinstance(value, torch.Tensor)}


def _check_cpp_compiler(gm: fx.GraphModule) -> None:
    """Require a C++ compiler if there is something to compile for the CPU."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    if "cpu" in _devices(gm):
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            _checks.refuse_missing_cpp_compiler(error)


def _calls_from_cpp(gm: fx.GraphModule) -> bool:
    """Whether Inductor shall write the calls of kernels in C++: one file to compile, and no Python between kernels.

    It can, if they are PyTorch's own on the CPU. A file of calls costs as much time to compile as two kernels do.
    """
    operators = [node for node in gm.graph.nodes if isinstance(node.target, OpOverload)]
    is_possible = _devices(gm) == {"cpu"} and all(node.target.namespace in ("aten", "prims") for node in operators)
    return is_possible and _count_kernels(gm) > 2


def _count_kernels(gm: fx.GraphModule) -> int:
    """About how many kernels Inductor generates: it fuses what it does not have to call another kernel between."""
    calls_before: dict[fx.Node, int] = {}
    kernels = set()
    for node in gm.graph.nodes:
        is_called = node.target in _NOT_GENERATED
        calls = max((calls_before[source] for source in node.all_input_nodes), default=0)
        calls_before[node] = calls + is_called
        if isinstance(node.target, OpOverload) and node.all_input_nodes and not is_called and not _nodes.is_view(node):
            kernels.add(calls)
    return len(kernels)


def inductor(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile a graph with Inductor, into fused C++ or Triton kernels.

    Args:
        gm: A graph of ``torch.ops`` operators that returns a list or tuple; it stays as it is. Sizes may be symbolic.
        example_inputs: Real or fake tensors and ints. Where placeholders know what they stand for
            (``node.meta["val"]``), they are not looked at.

    Returns:
        A function that takes its inputs in one list, which it clears. The outputs have the strides of the graph's, and
        random numbers are those that the graph draws.

    Raises:
        RuntimeError: The graph has tensors on the CPU, and there is no C++ compiler.
        TypeError: The graph does not return a list or tuple.

    Example:
        >>> import torch
        >>> from functorch_lite.compile import inductor, make_fx
        >>> x = torch.zeros(1000)
        >>> graph = make_fx(lambda x: [x.sin() + 1])(x)
        >>> compiled = inductor(graph, [x])
        >>> compiled([x])[0].sum()
        tensor(1000.)
    """
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table

    num_outputs = len(_checks.flat_outputs("inductor", gm.graph.output_node().args[0]))
    mode, inputs = _fake_inputs(gm, example_inputs)
    lowering = _Lowering(gm)
    with config.patch(fallback_random=True, size_asserts=False), torch.no_grad():
        with mode, mock.patch.object(mode, "allow_non_fake_inputs", True):
            # Inductor has few kernels that write in place, and calls PyTorch's for the others.
            functional = functionalize(lowering.run)
            lowered = make_fx(functional, decomposition_table=select_decomp_table())(*inputs)
        _check_cpp_compiler(lowered)
        # What is saved for the backward pass is read with the strides of the graph, too.
        lowered.graph.output_node().meta["user_visible_output_idxs"] = list(range(num_outputs))
        compiled = compile_fx_inner(lowered, inputs, layout_opt=False, cpp_wrapper=_calls_from_cpp(lowered))

    def run(args: list[Any]) -> list[Any]:
        return list(compiled(args)[:num_outputs])

    run._boxed_call = True  # type: ignore[attr-defined]
    return run
