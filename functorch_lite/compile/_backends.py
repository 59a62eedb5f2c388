"""Compilers of traced graphs, and the calling convention by which inputs are freed when they are no longer needed."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from functorch_lite.compile import _checks
from functorch_lite.compile._decompositions import default_decompositions
from functorch_lite.compile._inductor import inductor

Compiler = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """Another graph with the same parameters, so that the one that was given stays as it is."""
    return fx.GraphModule(gm, copy.deepcopy(gm.graph), type(gm).__name__)


class _BoxedCode(fx.graph.CodeGen):
    """Code that takes its inputs out of a list.

    The generated code sets a name to None after its last use. That frees an input only if nobody else holds it, and
    whoever calls a function with several arguments holds a tuple of them.
    """

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **options: Any) -> str:
        names = [name.split(":")[0].split("=")[0].strip() for name in free_vars if name != "self"]
        taken = f"\n    {', '.join(names)}, = args\n    args.clear()" if names else ""
        return f"def {self._func_name}(self, args){maybe_return_annotation}:{taken}"


def _spread(f: Callable[..., Any], args: list[Any]) -> Any:
    return f(*args)


def make_boxed_func(f: Callable[..., Any]) -> Callable[[list[Any]], Any]:
    """Make a function take its arguments in one list.

    This is what callers expect of a function with ``_boxed_call = True``. They give the list away: the function may
    clear it, and then frees each argument when it has been used for the last time. A GraphModule does that here; of
    another function the caller's list is left as it is.

    Args:
        f: Takes arguments by position. A function that is boxed already is returned as it is.

    Returns:
        A function of one list, with the attribute ``_boxed_call = True``.

    Example:
        >>> from functorch_lite.compile import make_boxed_func
        >>> add = make_boxed_func(lambda x, y: x + y)
        >>> add([1, 2]), add._boxed_call
        (3, True)
    """
    if getattr(f, "_boxed_call", False):
        return f
    if isinstance(f, fx.GraphModule):
        module = _copy(f)
        module.graph.set_codegen(_BoxedCode())
        module.recompile()
        boxed = functools.partial(module)
    else:
        boxed = functools.partial(_spread, f)

    boxed._boxed_call = True  # type: ignore[attr-defined]
    return boxed


def make_boxed_compiler(compiler: Compiler) -> Compiler:
    """Make a compiler return functions that take their arguments in one list.

    Args:
        compiler: Called as ``compiler(graph_module, example_inputs)``. It returns a function of the inputs.

    Returns:
        A compiler whose functions went through `make_boxed_func`.

    Example:
        >>> import torch
        >>> from functorch_lite.compile import make_boxed_compiler
        >>> @make_boxed_compiler
        ... def count(gm, example_inputs):
        ...     print(len(gm.graph.nodes), "nodes")
        ...     return gm
        >>> compiled = count(torch.fx.symbolic_trace(lambda x, y: x * y + y), [])
        5 nodes
        >>> compiled([torch.tensor(2.0), torch.tensor(3.0)])
        tensor(9.)
    """

    @functools.wraps(compiler)
    def boxed_compiler(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return make_boxed_func(compiler(gm, example_inputs))

    return boxed_compiler


@make_boxed_compiler
def nop(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile nothing: run the graph operator by operator.

    For checking that a trace is right, and for looking at what it costs by itself.

    Args:
        gm: The graph.
        example_inputs: Not used.

    Returns:
        A function that takes its inputs in one list and frees each after its last use; see `make_boxed_func`.

    Example:
        >>> import torch
        >>> from functorch_lite.compile import nop
        >>> compiled = nop(torch.fx.symbolic_trace(lambda x: x.sin() + 1), [])
        >>> compiled([torch.zeros(2)])
        tensor([1., 1.])
    """
    return gm


@make_boxed_compiler
def print_compile(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Print the graph as Python code, and run it as `nop` does.

    Each value has its dtype and shape, and the line of the program it comes from stands above.

    Args:
        gm: The graph.
        example_inputs: Not used.

    Returns:
        A function that takes its inputs in one list.

    Example:
        >>> import torch
        >>> from functorch_lite.compile import make_fx, print_compile
        >>> graph = make_fx(lambda x: x.sin() + 1)(torch.zeros(2))
        >>> compiled = print_compile(graph, [])
        class <lambda>(torch.nn.Module):
            def forward(self, x_1: "f32[2]"):
                # No stacktrace found for following nodes
                sin: "f32[2]" = torch.ops.aten.sin.default(x_1);  x_1 = None
                add: "f32[2]" = torch.ops.aten.add.Tensor(sin, 1);  sin = None
                return add
    """
    print(gm.print_readable(print_output=False).strip())
    return gm


def _strip_overloads(graph: fx.Graph) -> None:
    """Name operators and results as TorchScript does."""
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            node.target = node.target.overloadpacket
        # A placeholder is a tensor for TorchScript unless it is told.
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, (int, torch.SymInt)):
            node.type = int
        # The entries of a list have one type.
        if node.op == "output" and isinstance(node.args[0], list):
            node.args = (tuple(node.args[0]),)


@make_boxed_compiler
def ts_compile(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile a graph with TorchScript.

    Args:
        gm: The graph. It stays as it is.
        example_inputs: Not used.

    Returns:
        A function that takes its inputs in one list.

    Raises:
        NotImplementedError: TorchScript cannot express the graph.

    Example:
        >>> import torch
        >>> from functorch_lite.compile import ts_compile
        >>> compiled = ts_compile(torch.fx.symbolic_trace(lambda x: [torch.sin(x) + 1]), [])
        >>> compiled([torch.zeros(2)])
        (tensor([1., 1.]),)

    Note:
        PyTorch no longer develops TorchScript, and does not support it with Python 3.14 and later. Its successor as a
        backend is Inductor, `functorch_lite.compile.inductor`.
    """
    module = _copy(gm)
    _strip_overloads(module.graph)
    module.recompile()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated, and that of modules it does not know everything
        try:
            return torch.jit.script(module)
        except RuntimeError as error:
            _checks.refuse_torchscript(error)


def memory_efficient_fusion(
    fn: Callable[..., Any] | nn.Module, static_argnums: int | Sequence[int] | None = None, **kwargs: Any
) -> Callable[..., Any] | nn.Module:
    """Compile a function or module with Inductor, saving as little as possible for the backward pass.

    What is cheap to compute again is computed again in the backward pass instead of being saved: the graph is
    partitioned by `min_cut_rematerialization_partition`, after `default_decompositions`.

    Args:
        fn: What to compile.
        static_argnums: Positions of arguments of a function that are constants of the graph, such as flags. There is a
            graph for each combination of their values, which have to be hashable. Default None: there are none.
        kwargs: Passed on to `aot_function` or `aot_module`, instead of what is chosen here: ``fw_compiler``,
            ``bw_compiler``, ``partition_fn``, ``decompositions``, ``dynamic`` and so on.

    Returns:
        A function, or a module with the same parameters.

    Raises:
        TypeError: ``static_argnums`` are not positions, or were given for a module, or a static value is not hashable.
        ValueError: A call has too few positional arguments.

    Example:
        >>> import torch
        >>> from functorch_lite.compile import memory_efficient_fusion, nop
        >>> def f(x, how):
        ...     return x.sin() if how == "sin" else x.cos()
        >>> compiled = memory_efficient_fusion(f, static_argnums=1, fw_compiler=nop, bw_compiler=nop)
        >>> compiled(torch.zeros(2), "cos")
        tensor([1., 1.])
    """
    from functorch_lite.compile import aot_function, aot_module, min_cut_rematerialization_partition

    options = {
        "fw_compiler": inductor,
        "bw_compiler": inductor,
        "partition_fn": min_cut_rematerialization_partition,
        "decompositions": default_decompositions,
        **kwargs,
    }
    positions = _checks.static_positions("memory_efficient_fusion", fn, static_argnums)
    if isinstance(fn, nn.Module):
        compiled_module: nn.Module = aot_module(fn, **options)
        return compiled_module
    if positions:
        return _for_each_static_value(fn, positions, lambda function: aot_function(function, **options))
    compiled: Callable[..., Any] = aot_function(fn, **options)
    return compiled


def _for_each_static_value(
    fn: Callable[..., Any], positions: Sequence[int], compiler: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Callable[..., Any]:
    """A function that compiles ``fn`` once for each combination of values at some positions."""

    @functools.cache
    def compiled(types: tuple[type, ...], values: tuple[Any, ...]) -> Callable[..., Any]:
        # 1, 1.0 and True are equal, and mean different things.
        def with_static_values(*rest: Any, **kwargs: Any) -> Any:
            args = list(rest)
            for position, value in zip(positions, values, strict=True):
                args.insert(position, value)
            return fn(*args, **kwargs)

        return compiler(with_static_values)

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        values = _checks.static_values("memory_efficient_fusion", positions, args)
        rest = [arg for position, arg in enumerate(args) if position not in positions]
        return compiled(tuple(map(type, values)), values)(*rest, **kwargs)

    return run
