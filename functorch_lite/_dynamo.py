"""How torch.compile sees the transforms. Imported when torch._dynamo is, and not before.

Dynamo traces our Python and the user's function in it. What it cannot trace is a level: here each class of levels has
a stand-in of plain Python, whose methods are calls that Dynamo puts into the graph as they are, and whose results it
takes to be tensors of the shape that the user's function sees. What runs between the opening and the closing of a level
becomes a graph of its own, a *region*, so that the level is closed whatever happens. Whoever runs the graph,
AOTAutograd with its tracers or a backend that runs it as it is, runs the levels.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._C._dynamo.eval_frame import _FrameAction as FrameAction
from torch._C._dynamo.eval_frame import _FrameExecStrategy as FrameExecStrategy
from torch._C._dynamo.eval_frame import set_code_exec_strategy, set_fullgraph_compiled_frame_count
from torch._dynamo import allow_in_graph, eval_frame, substitute_in_graph, trace_rules
from torch._dynamo.exc import unimplemented
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.utils import proxy_args_kwargs
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.builder import VariableBuilder, wrap_fx_proxy
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.misc import GetAttrVariable
from torch._dynamo.variables.torch import TorchInGraphFunctionVariable
from torch._ops import HigherOrderOperator
from torch.autograd import Function
from torch.fx.node import has_side_effect

from functorch_lite import (
    _C,
    _basis,
    _boundary,
    _checks,
    _commits,
    _custom_derivatives,
    _ensemble,
    _functionalize,
    _jacobian,
    _jvp,
    _linear,
    _module_checks,
    _module_state,
    _overlay,
    _tree,
    _vjp,
    _vmap,
)

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def _refuse(message: str) -> NoReturn:
    """Break the graph, or, if it is to be the only one, raise. May be called by what Dynamo traces."""
    unimplemented(gb_type="functorch_lite cannot compile this", context="", explanation=message, hints=[])


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
        _refuse(_checks.compiled_map())


def _handle(function: Callable[..., Any], handler: Callable[..., VariableTracker]) -> None:
    """Have Dynamo call ``handler(_, tx, *args)``, of variables, in the place of a function."""
    allow_in_graph(function)
    TorchInGraphFunctionVariable._get_handlers()[function] = handler


_handle(_refuse, lambda _, tx, message: _refuse(message.as_python_constant()))


# The overlay. What calls a stand-in is the frame around that which asks. Dynamo knows PyTorch's transforms by identity.


def _torch_is_calling(_: Any, tx: Any) -> VariableTracker:
    return ConstantVariable.create(tx.parent is not None and _overlay.is_of_torch(tx.parent.f_globals["__name__"]))


_handle(_overlay.torch_is_calling, _torch_is_calling)
_rules = trace_rules.get_torch_obj_rule_map()
_rules.update({theirs: _rules.pop(ours) for ours, theirs in _overlay.theirs_by_stand_in().items() if ours in _rules})


def _in_graph(example: Callable[..., Any]) -> Callable[[FunctionT], FunctionT]:
    """Have Dynamo put a function into the graph. ``example`` makes the result of fake arguments; None for a level."""

    def decorate(function: FunctionT) -> FunctionT:
        def handle(_: Any, tx: Any, *args: VariableTracker) -> VariableTracker:
            proxies, _ = proxy_args_kwargs(args, {})
            proxy = tx.output.create_proxy("call_function", function, proxies, {})
            fakes = pytree.tree_map_only(fx.Proxy, lambda p: p.node.meta.get("example_value"), proxies)
            with tx.fake_mode, torch.enable_grad():
                result = example(*fakes)
            if result is None:
                if function is _enter and _make_regions not in tx.output.register_finalizer_fns:
                    tx.output.add_graph_finalizer(_make_regions)
                    tx.output.add_cleanup_hook(_close_levels)
                return _Opaque(proxy)
            return wrap_fx_proxy(tx, proxy, example_value=result)

        _handle(function, handle)
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
def _new_chunk(batch_size: int) -> _C.VmapLevel:
    return _C.VmapLevel(batch_size, _C.Randomness.error, _C.Chunks(batch_size, []))


@_in_graph(_nothing)
def _new_autodiff(forward: bool, transform: str) -> _C.AutodiffLevel:
    return _C.AutodiffLevel(forward, transform)


# The borders of regions. They are called only where Dynamo tries the branches of an operator such as torch.cond.
@_in_graph(_nothing)
@has_side_effect
def _enter(level: _C.Level) -> None:
    level.__enter__()
    _opened.append(level)


@_in_graph(_nothing)
@has_side_effect
def _leave(level: _C.Level) -> None:
    _opened.pop().__exit__(None, None, None)


_opened: list[_C.Level] = []


def _close_levels() -> None:
    """Close what a branch has left open, as it has raised."""
    while _opened:
        _opened.pop().__exit__(None, None, None)


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
    with _explained(level):
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
    def __init__(self, batch_size: int, randomness: str, is_chunk: bool) -> None:
        self.handle = _new_chunk(batch_size) if is_chunk else _new_vmap(batch_size, randomness)

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

    def tangent_of(self, result: Tensor) -> Tensor | None:
        return _tangent_of(self.handle, result)

    def backward(self, outputs: Any, cotangents: Any, inputs: Any, keep_graph: bool) -> list[Tensor]:
        if len(inputs) == 0:
            return []
        return _backward(self.handle, outputs, cotangents, inputs, keep_graph)


class _Chunks:
    def begin(self, size: int) -> None: ...


def _of_class(cls: type) -> Callable[[FunctionT], FunctionT]:
    decorate: Any = substitute_in_graph(cls, is_embedded_type=True, skip_signature_check=True)
    return decorate  # type: ignore[no-any-return]


@_of_class(_C.VmapLevel)
def _vmap_level(batch_size: int, randomness: Any, chunks: Any = None) -> _VmapLevel:
    if chunks is not None and randomness.name == "different":
        _refuse(_checks.compiled_chunks())
    return _VmapLevel(batch_size, randomness.name, chunks is not None)


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
def _boundary_(transform: str, function: Any, like: object = None, made_of: Any = None) -> Any:
    return function


# Somebody else shows errors in compiled functions.
@substitute_in_graph(_boundary._explain)
def _explain(transform: str, error: BaseException) -> None: ...


@substitute_in_graph(_boundary._without_our_frames)
def _without_our_frames(traceback: Any) -> Any:
    return traceback


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
@substitute_in_graph(_tree.broadcast_dims)
def _broadcast_dims(dims: Any, tree: Any) -> Any:
    return _tree._broadcast_prefix(dims, tree)


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


_stack = _copied(_ensemble._stack)


@substitute_in_graph(_ensemble._stack)
def _stack_buffers(kind: str, tensors: Any) -> Any:
    if any(tensor.requires_grad for one in tensors for tensor in one.values()):
        _refuse(_checks.compiled_stack())
    return _stack(kind, tensors)


@substitute_in_graph(_module_state.was_written)
def _was_written(original: Tensor, copy: Tensor, version: int | None) -> NoReturn:
    _refuse(_module_checks.compiled_state())


@substitute_in_graph(_commits.current)
def _current(target: Tensor) -> NoReturn:
    _refuse(_module_checks.compiled_state())


@substitute_in_graph(_basis._basis)
def _rows_of_basis(leaves: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
    parts = []
    offset = 0
    for leaf in leaves:
        n = leaf.numel()
        row = torch.arange(start, stop, device=leaf.device)
        column = torch.arange(offset, offset + n, device=leaf.device)
        parts.append((row[:, None] == column).to(leaf.dtype).view(stop - start, *leaf.shape))
        offset += n
    return parts


@substitute_in_graph(_basis._measured)
def _measured(one_row: Any, leaves: Any, total: int) -> NoReturn:
    _refuse(_checks.compiled_auto_chunks())


# What looks at levels from inside.


def _refuse_level(_: Any, level: _C.Level) -> NoReturn:
    _refuse(_checks.compiled_map())


VariableBuilder._type_dispatch()[_C.AutodiffLevel] = _refuse_level


def _depth(_: Any, tx: Any) -> VariableTracker:
    targets = [node.target for node in tx.output.graph.nodes]
    return ConstantVariable.create(targets.count(_enter) - targets.count(_leave))


_handle(_C.level_depth, _depth)


def _name_of(_: Any, tx: Any, func: VariableTracker) -> VariableTracker:
    if isinstance(func, GetAttrVariable):  # the apply of a torch.autograd.Function
        return ConstantVariable.create(func.name)
    name: VariableTracker = VariableTracker.build(tx, _name_of_other).call_function(tx, [func], {})
    return name


_name_of_other = _copied(_checks.name_of)
_handle(_checks.name_of, _name_of)


def _check_callable(_: Any, tx: Any, transform: VariableTracker, func: VariableTracker) -> VariableTracker:
    if func.is_python_constant():
        _checks.check_callable(transform.as_python_constant(), func.as_python_constant())
    return ConstantVariable.create(None)


_handle(_checks.check_callable, _check_callable)


def _call_custom(_: Any, tx: Any, custom: VariableTracker, args: VariableTracker, kwargs: VariableTracker) -> Any:
    """A function with a derivative of its own: what it computes is the business of those who run the graph."""
    function = getattr(custom, "value", None)
    is_changed = tx.output.side_effects.has_pending_mutation(custom)
    if is_changed or custom.source is None or not isinstance(function, _custom_derivatives._Custom):
        _refuse(_checks.compiled_custom("custom_vjp, custom_jvp"))
    install_guard(custom.source.make_guard(GuardBuilder.ID_MATCH))
    given, spec = pytree.tree_flatten(proxy_args_kwargs([args, kwargs], {})[0])
    places = [i for i, leaf in enumerate(given) if isinstance(leaf, fx.Proxy)]
    out_specs: list[Any] = []

    def call_custom(*tensors: Any) -> list[Any]:
        leaves = list(given)
        for i, tensor in zip(places, tensors, strict=True):
            leaves[i] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        try:
            outputs, out_spec = pytree.tree_flatten(function(*args, **kwargs))
        except AssertionError as error:
            if "FakeTensor" in str(error):
                raise NotImplementedError(_checks.compiled_capture(function._name)) from None
            raise
        out_specs.append(out_spec)
        return outputs

    proxies = [given[i] for i in places]
    proxy = tx.output.create_proxy("call_function", call_custom, tuple(proxies), {})
    with tx.fake_mode, torch.enable_grad():
        try:
            example = call_custom(*(p.node.meta["example_value"] for p in proxies))
        except NotImplementedError as error:
            _refuse(str(error))
    leaves = wrap_fx_proxy(tx, proxy, example_value=example)
    unflatten = VariableTracker.build(tx, pytree.tree_unflatten)
    return unflatten.call_function(tx, [leaves, VariableTracker.build(tx, out_specs[0])], {})


_handle(_custom_derivatives._call, _call_custom)


@_of_class(_custom_derivatives.custom_vjp)
def _new_custom_vjp(func: Any, nondiff_argnums: Any = ()) -> NoReturn:
    _refuse(_checks.compiled_custom("custom_vjp"))


@_of_class(_custom_derivatives.custom_jvp)
def _new_custom_jvp(func: Any, nondiff_argnums: Any = ()) -> NoReturn:
    _refuse(_checks.compiled_custom("custom_jvp"))


# Compiled functions inside levels.

_callback_from_stance = eval_frame._callback_from_stance


def _callback_outside_levels(callback: Any) -> Any:
    """Inside a level nothing is compiled: its tensors are not what a compiler takes them for."""
    if _C.level_depth() == 0:
        return _callback_from_stance(callback)
    set_fullgraph_compiled_frame_count(-1)  # nobody is to miss the graph
    return None


eval_frame._callback_from_stance = _callback_outside_levels

# Nor what runs inside, if Dynamo comes here after a graph break.
for _function in (_vjp.Pullback.run, _vjp.Pullback.pull, _jvp.push_forward, _vmap._map, _functionalize.run):
    set_code_exec_strategy(_function.__code__, FrameExecStrategy(FrameAction.SKIP, FrameAction.SKIP))

# Regions.


class Region(nn.Module):
    """What runs at a level. A module, for torch.export takes attributes that functions get for parameters."""

    _is_impure = True  # or fx would leave out what only writes

    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__()
        self.body = body

    def forward(self, level: _C.Level, *args: Any) -> Any:
        """Run it."""
        with level, _explained(level):
            if fx.traceback.has_preserved_node_meta():
                return fx.Interpreter(self.body).run(*args)
            return self.body(*args)


@contextmanager
def _explained(level: _C.Level) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(level, _C.VmapLevel) and level.chunks is not None and "randomness='error'" in str(error):
            raise NotImplementedError(_checks.compiled_chunks()) from None
        _boundary._explain(level.kind, error)
        raise


def _apply_function(
    fwd: fx.GraphModule,
    bwd: fx.GraphModule,
    *args: Any,
    non_differentiable_idx: Sequence[int],
    dirty_idx: Sequence[int] = (),
    **_: Any,
) -> Any:
    """A user's torch.autograd.Function, as Dynamo puts it into a graph. What it saves belongs to its level."""

    class Applied(Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output, saved = fwd(*args)
            ctx.places = [i for i, value in enumerate(saved) if isinstance(value, Tensor)]
            ctx.others = [None if isinstance(value, Tensor) else value for value in saved]
            ctx.save_for_backward(*(saved[i] for i in ctx.places))
            outputs = output if isinstance(output, (tuple, list)) else [output]
            ctx.mark_dirty(*(outputs[i] for i in dirty_idx))
            ctx.mark_non_differentiable(*(outputs[i] for i in non_differentiable_idx))
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            saved = list(ctx.others)
            for i, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
                saved[i] = tensor
            return bwd(*grads, *saved)

    return Applied.apply(*args)  # type: ignore[no-untyped-call]


def _value_outside(result: Any) -> Any:
    """What has left a region by way of a variable of the user's."""
    return _C.strip_closed_levels(result) if isinstance(result, Tensor) else result


def _make_regions(module: fx.GraphModule) -> None:
    """Replace what is between the opening and the closing of a level by a call of a `Region`."""
    for owner in [m for m in module.modules() if isinstance(m, fx.GraphModule)]:
        opened: list[fx.Node] = []
        for node in list(owner.graph.nodes):
            if node.target is _enter:
                opened.append(node)
            elif node.target is _leave:
                _make_region(owner, opened.pop(), node)
        (output,) = owner.graph.find_nodes(op="output")
        for escaped in [n for n in output.all_input_nodes if n.meta.get("functorch_lite_inside")]:
            with owner.graph.inserting_before(output):
                output.replace_input_with(escaped, owner.graph.call_function(_value_outside, (escaped,)))
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
        if isinstance(n.target, HigherOrderOperator) and n.target.name() == "autograd_function_apply":
            copies[n].target = _apply_function
    body.output(tuple(copies[n] for n in outputs))

    name = f"region_{sum(n.startswith('region_') for n in dict(owner.named_children()))}"
    setattr(owner, name, Region(fx.GraphModule(owner, body, name)))
    with graph.inserting_before(leave):
        called = graph.call_module(name, (level, *inputs))
        for i, n in enumerate(outputs):
            output = graph.call_function(operator.getitem, (called, i))
            output.meta = {**n.meta, "functorch_lite_inside": True}
            n.replace_all_uses_with(output, lambda user: user not in inside)
    for n in (leave, *reversed(nodes), enter):
        graph.erase_node(n)
