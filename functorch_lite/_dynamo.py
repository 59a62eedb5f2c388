"""How torch.compile sees the transforms. Imported when torch._dynamo is, and not before.

Dynamo traces our Python and the user's function in it. What it cannot trace is a level: here each class of levels has a
stand-in of plain Python, whose methods are calls that Dynamo puts into the graph as they are, and whose results it takes
to be tensors of the shape that the user's function sees. What runs between the opening and the closing of a level
becomes a graph of its own, a *region*, so that the level is closed whatever happens. Whoever runs the graph,
AOTAutograd with its tracers or a backend that runs it as it is, runs the levels.
"""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._dynamo import allow_in_graph, eval_frame, substitute_in_graph
from torch._dynamo.exc import unimplemented
from torch._dynamo.utils import proxy_args_kwargs
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.builder import wrap_fx_proxy
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.torch import TorchInGraphFunctionVariable
from torch.fx.node import has_side_effect

from functorch_lite import _basis, _boundary, _C, _checks, _functionalize, _jacobian, _jvp, _linear, _tree, _vmap

# Calls in the graph.


class _Opaque(VariableTracker):
    """A value of the graph that is no tensor: a level."""

    def __init__(self, proxy: fx.Proxy, **options: Any) -> None:
        super().__init__(**options)
        self.proxy = proxy

    def as_proxy(self) -> fx.Proxy:
        return self.proxy

    def reconstruct(self, codegen: Any) -> NoReturn:
        """Called if it would have to leave the graph."""
        unimplemented(
            gb_type="A level of functorch_lite leaves the graph",
            context="",
            explanation=_checks.compiled_escape("vjp_fn"),
            hints=[],
        )


def _in_graph(example: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Have Dynamo put a function into the graph. ``example`` makes the result, of fake arguments; None: it is opaque."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        def handle(_: Any, tx: Any, *args: VariableTracker) -> VariableTracker:
            proxies, _ = proxy_args_kwargs(args, {})
            proxy = tx.output.create_proxy("call_function", function, proxies, {})
            fakes = pytree.tree_map_only(fx.Proxy, lambda p: p.node.meta.get("example_value"), proxies)
            with tx.fake_mode, torch.enable_grad():
                result = example(*fakes)
            if result is None:
                if function is _enter:
                    tx.output.add_graph_finalizer(_make_regions)
                return _Opaque(proxy)
            return wrap_fx_proxy(tx, proxy, example_value=result)

        allow_in_graph(function)
        TorchInGraphFunctionVariable._get_handlers()[function] = handle
        return function

    return decorate


def _nothing(*_: Any) -> None:
    return None


def _like(tensor: Tensor, shape: Sequence[Any], requires_grad: bool, stride: Sequence[Any] | None = None) -> Tensor:
    """A tensor that is made of others, so that it may be written in place."""
    options: dict[str, Any] = {"dtype": tensor.dtype, "device": tensor.device}
    new = torch.empty(shape, **options) if stride is None else torch.empty_strided(shape, stride, **options)
    return new.requires_grad_().clone() if requires_grad else new


def _same(_: Any, tensor: Tensor, *__: Any) -> Tensor:
    return _like(tensor, tensor.shape, tensor.requires_grad, tensor.stride())


def _variable(_: Any, tensor: Tensor, *__: Any) -> Tensor:
    return _like(tensor, tensor.shape, True, tensor.stride())


def _example(_: Any, tensor: Tensor, dim: int) -> Tensor:
    rest = [i for i in range(tensor.dim()) if i != dim]
    return _like(tensor, [tensor.shape[i] for i in rest], tensor.requires_grad, [tensor.stride(i) for i in rest])


def _batch(_: Any, tensor: Tensor, out_dim: int | None, batch_size: int, __: Any, ___: Any) -> Tensor:
    shape = list(tensor.shape)
    if out_dim is not None:
        shape.insert(out_dim % (len(shape) + 1), batch_size)
    return _like(tensor, shape, tensor.requires_grad)


@_in_graph(_nothing)
def _new_vmap(batch_size: int, randomness: str) -> _C.VmapLevel:
    return _C.VmapLevel(batch_size, getattr(_C.Randomness, randomness))


@_in_graph(_nothing)
def _new_autodiff(forward: bool, transform: str) -> _C.AutodiffLevel:
    return _C.AutodiffLevel(forward, transform)


@_in_graph(_nothing)
@has_side_effect
def _enter(level: _C.Level) -> NoReturn:
    raise AssertionError("part of a region")


@_in_graph(_nothing)
@has_side_effect
def _leave(level: _C.Level) -> NoReturn:
    raise AssertionError("part of a region")


@_in_graph(_example)
def _lift_batched(level: _C.VmapLevel, value: Tensor, dim: int) -> Tensor:
    return level.lift(value, dim)


@_in_graph(_batch)
def _place(
    level: _C.VmapLevel, result: Tensor, out_dim: int | None, batch_size: int, function: str, path: str
) -> Tensor:
    value, bdim = level.unwrap(result)
    placed: Tensor = _vmap._place(_named(function), value, bdim, out_dim, batch_size, lambda: path)
    return placed


@_in_graph(_variable)
def _lift_variable(level: _C.AutodiffLevel, value: Tensor) -> Tensor:
    return level.lift_variable(value)


@_in_graph(_variable)
def _lift_dual(level: _C.AutodiffLevel, value: Tensor, tangent: Tensor) -> Tensor:
    return level.lift_dual(value, tangent)


@_in_graph(_same)
def _value_of(level: _C.AutodiffLevel, result: Tensor) -> Tensor:
    return level.value_of(result)


@_in_graph(_same)
def _tangent_of(level: _C.AutodiffLevel, result: Tensor) -> Tensor | None:
    return level.tangent_of(result)


@_in_graph(lambda tangent, _: _same(_, tangent))
def _zeros_if_none(tangent: Tensor | None, value: Tensor) -> Tensor:
    return _jvp._zeros_if_none(tangent, value)


@_in_graph(lambda tangent, _: _same(_, tangent))
@has_side_effect
def _check_depends(tangent: Tensor | None, message: str) -> Tensor | None:
    if tangent is None:
        raise ValueError(message)
    return tangent


@_in_graph(lambda _, outputs, cotangents, inputs, keep_graph: [_same(_, x) for x in inputs])
def _backward(
    level: _C.AutodiffLevel, outputs: list[Tensor], cotangents: list[Tensor], inputs: list[Tensor], keep_graph: bool
) -> list[Tensor]:
    grads = level.backward(outputs, cotangents, inputs, keep_graph)
    return [
        torch.zeros_like(level.value_of(x)) if grad is None else grad for grad, x in zip(grads, inputs, strict=True)
    ]


def _named(name: str) -> Callable[..., Any]:
    """A function for messages."""

    def function() -> None: ...

    function.__name__ = function.__qualname__ = name
    return function


def _copied(function: Any) -> Any:
    """A function that Dynamo does not take for the one that is substituted."""
    return types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)


# Stand-ins for levels. Dynamo traces what is from here on to the regions.


class _Level:
    handle: Any

    def __enter__(self) -> Any:
        _enter(self.handle)
        return self

    def __exit__(self, *exception: object) -> None:
        _leave(self.handle)


class _VmapLevel(_Level):
    def __init__(self, batch_size: int, randomness: str) -> None:
        self.batch_size = batch_size
        self.handle = _new_vmap(batch_size, randomness)

    def lift(self, value: Tensor, dim: int) -> Tensor:
        return _lift_batched(self.handle, value, dim)


class _AutodiffLevel(_Level):
    def __init__(self, forward: bool, transform: str) -> None:
        self.handle = _new_autodiff(forward, transform)

    def __enter__(self) -> Any:
        _enter(self.handle)
        # The level does this, too, and Dynamo has to know of it.
        self.records = torch.is_grad_enabled()
        if not self.records:
            torch.set_grad_enabled(True)
        return self

    def __exit__(self, *exception: object) -> None:
        if not self.records:
            torch.set_grad_enabled(False)
        _leave(self.handle)

    def lift_variable(self, value: Tensor) -> Tensor:
        return _lift_variable(self.handle, value)

    def lift_dual(self, value: Tensor, tangent: Tensor) -> Tensor:
        return _lift_dual(self.handle, value, tangent)

    def value_of(self, result: Tensor) -> Tensor:
        return _value_of(self.handle, result)

    def tangent_of(self, result: Tensor) -> Tensor:
        return _tangent_of(self.handle, result)

    def backward(self, outputs: Any, cotangents: Any, inputs: Any, keep_graph: bool) -> list[Tensor]:
        if len(inputs) == 0:
            return []
        return _backward(self.handle, outputs, cotangents, inputs, keep_graph)


class _Chunks:
    def begin(self, size: int) -> None: ...


_of_class = functools.partial(substitute_in_graph, is_embedded_type=True, skip_signature_check=True)


@_of_class(_C.VmapLevel)
def _vmap_level(batch_size: int, randomness: Any, chunks: Any = None) -> _VmapLevel:
    if chunks is not None and randomness.name != "error":
        raise NotImplementedError(_checks.compiled_chunks())
    return _VmapLevel(batch_size, randomness.name)


@_of_class(_C.AutodiffLevel)
def _autodiff_level(forward: bool, transform: str = "") -> _AutodiffLevel:
    return _AutodiffLevel(forward, transform)


@_of_class(_C.Chunks)
def _chunks(total: int, generators: Any) -> _Chunks:
    return _Chunks()


@substitute_in_graph(_vmap.generators_in_use)
def _generators_in_use() -> list[torch.Generator]:
    return []


@substitute_in_graph(_boundary.boundary)
def _boundary_(transform: str, function: Any, like: object = None) -> Any:
    return function


@substitute_in_graph(_tree.captured)
def _captured(tree: Any) -> Any:
    return tree


@substitute_in_graph(_tree.flatten)
def _flatten(tree: Any) -> tuple[list[Any], _tree.Spec]:
    return pytree.tree_flatten(tree)


@substitute_in_graph(_tree.unflatten)
def _unflatten(leaves: Any, spec: Any) -> Any:
    return pytree.tree_unflatten(list(leaves), spec)


# A result and its level, in the place of its value and its batch dimension.
@substitute_in_graph(_tree.unwrap)
def _unwrap(level: Any, leaves: Any) -> Any:
    return [(leaf, level) for leaf in leaves]


_place_or_refuse = _copied(_vmap._place)


@substitute_in_graph(_vmap._place)
def _place_result(func: Any, value: Any, bdim: Any, out_dim: Any, batch_size: Any, path: Any) -> Any:
    if not isinstance(value, Tensor) or (out_dim is not None and not -value.dim() - 1 <= out_dim <= value.dim()):
        return _place_or_refuse(func, value, None, out_dim, batch_size, path)
    return _place(bdim.handle, value, out_dim, batch_size, _checks.name_of(func), path() if out_dim is None else "")


@substitute_in_graph(_jvp._zeros_if_none)
def _tangent_or_zeros(tangent: Any, value: Any) -> Any:
    return _zeros_if_none(tangent, value)


@substitute_in_graph(_jvp._check_depends)
def _check_each_depends(transform: str, func: Any, output: Any, tangents: list[Any]) -> None:
    for i, path in enumerate(_tree.paths(output)):
        _check_depends(tangents[i], _checks.no_dependence(transform, func, path))


# AOTAutograd functionalizes whatever it is given.
@substitute_in_graph(_functionalize.run)
def _functionalized(keep_views: bool, func: Any, args: Any, kwargs: Any = None) -> Any:
    output = func(*args, **(kwargs or {}))
    if keep_views:
        return output
    inputs = pytree.tree_leaves((args, kwargs))
    return _tree.map_tensors(lambda leaf: leaf if any(leaf is x for x in inputs) else leaf.clone(), output)


@substitute_in_graph(_linear._has_readable_values)
def _has_readable_values(leaves: Any) -> bool:
    return False


@substitute_in_graph(_jacobian._check_aux)
def _check_aux(transform: str, aux: Any) -> None: ...


@substitute_in_graph(_basis._measured)
def _measured(one_row: Any, leaves: Any, total: int) -> NoReturn:
    raise NotImplementedError(_checks.compiled_auto_chunks())


# Regions.


@has_side_effect
def run_at_level(body: fx.GraphModule, level: _C.Level, *args: Any) -> tuple[Any, ...]:
    """Run a region."""
    with level:
        if fx.traceback.has_preserved_node_meta():
            result: tuple[Any, ...] = fx.Interpreter(body).run(*args)
            return result
        return body(*args)


def _make_regions(module: fx.GraphModule) -> None:
    """Replace what is between the opening and the closing of a level by a call of `run_at_level`."""
    for owner in [m for m in module.modules() if isinstance(m, fx.GraphModule)]:
        opened: list[fx.Node] = []
        for node in list(owner.graph.nodes):
            if node.target is _enter:
                opened.append(node)
            elif node.target is _leave:
                _make_region(owner, opened.pop(), node)
        owner.recompile()


def _make_region(owner: fx.GraphModule, enter: fx.Node, leave: fx.Node) -> None:
    graph, level = owner.graph, enter.args[0]
    nodes = []
    node = enter.next
    while node is not leave:
        nodes.append(node)
        node = node.next
    inside = set(nodes)
    outputs = [n for n in nodes if any(user not in inside for user in n.users)]
    inputs = list(dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inside))
    body = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for n in inputs:
        copies[n] = body.placeholder(n.name)
        copies[n].meta = n.meta.copy()
    for n in nodes:
        copies[n] = body.node_copy(n, lambda old: copies[old])
    body.output(tuple(copies[n] for n in outputs))

    name = f"region_{sum(n.startswith('region_') for n in dict(owner.named_children()))}"
    setattr(owner, name, fx.GraphModule(owner, body, name))
    with graph.inserting_before(leave):
        called = graph.call_function(run_at_level, (graph.get_attr(name), level, *inputs))
        for i, n in enumerate(outputs):
            output = graph.call_function(operator.getitem, (called, i))
            output.meta = n.meta.copy()
            n.replace_all_uses_with(output, lambda user: user not in inside)
    for n in (leave, *reversed(nodes), enter):
        graph.erase_node(n)
