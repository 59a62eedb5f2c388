"""jit: a whole composition of transforms, compiled into one flat graph; and what that graph is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from typing import IO, Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.autograd import profiler
from torch.utils import _pytree as pytree

from functorch_lite import _boundary, _checks

Backend = Literal["replay", "inductor"] | Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]
File = str | PathLike[str] | IO[bytes]

#: So many graphs of one function before a warning says why.
_MANY = 8


def jit(
    func: Callable[..., Any],
    backend: Backend = "replay",
    *,
    dynamic: bool = False,
    donate_argnums: int | tuple[int, ...] = (),
) -> Callable[..., Any]:
    """Compile a function, with all transforms in it, into one flat graph that later calls run.

    The function is traced when it is called for the first time, and again for arguments of other shapes, strides,
    dtypes or devices, for other Python values, and in other modes (grad mode, autocast). What it does is not changed:
    it returns the same, writes the arguments and captured tensors that it writes, draws the same random numbers, can be
    differentiated from outside, and works inside transforms. Tensors that it captures, such as the parameters of a
    module, are read in each call, so that they may have changed.

    Args:
        func: Takes and returns pytrees of tensors and other values. Also a module.
        backend: ``"replay"``: the graph becomes a list of operator calls that a loop in C++ runs; the first call costs
            about a trace. ``"inductor"``: kernels are generated and compiled, which takes seconds and is for long runs.
            Or a compiler of graphs as `functorch_lite.compile.aot_function` takes it. Default ``"replay"``.
        dynamic: Whether sizes become symbols, so that one trace serves many of them. Default False.
        donate_argnums: Positional arguments that the caller does not need any more, as in JAX: their memory is freed
            after its last use, or used for results, and their tensors, and others that share their memory, have no
            contents after the call. A tensor stays as it is where a result shares its memory, inside transforms, and,
            with a warning, where results require grad. Default none.

    Returns:
        A function like ``func``, with the method ``save(file, *args, **kwargs)``, which writes the graph for such
        arguments into a file in the format of ``torch.export``; `load` reads it.

    Raises:
        NotImplementedError: The function cannot be traced: the values of tensors decide what Python does,
            ``backward()`` is called inside, or tensors that are made inside are kept outside.
        TypeError: ``func`` cannot be called, or an argument that is no tensor has no hash.
        ValueError: There is no such backend.

    Example:
        >>> import torch
        >>> from functorch_lite import grad, jit, vmap
        >>> slopes = jit(vmap(grad(torch.sin)))
        >>> slopes(torch.zeros(3))
        tensor([1., 1., 1.])

    Note:
        Everything in Python runs once: a ``print`` inside prints while tracing. A number that changes from call to call
        should be a tensor, for each value of a Python number is another graph. With ``"replay"`` results are those of
        the operators in the graph, to the last bit, with two exceptions: the sign of a zero, and products with an
        identity matrix, which are left out.
    """
    _checks.check_callable("jit", func)
    from functorch_lite.compile import _user

    compiler = _checks.compiler_of("jit", backend, _named_backends())
    name = getattr(func, "__name__", type(func).__name__)
    compiled = _user.compiled_function(func, _user.options_of("jit", compiler, dynamic=dynamic))
    compiled.on_compile = _Watch(name, dynamic)
    compiled.donated = None if donate_argnums == () else donate_argnums

    return _Jitted(func, compiled, (jit, (func, backend), {"dynamic": dynamic, "donate_argnums": donate_argnums}))


class _Jitted(_boundary.Remade):
    """What `jit` returns."""

    __slots__ = ("_compiled", "_func")

    def __init__(self, func: Callable[..., Any], compiled: Any, made_of: _boundary.MadeOf) -> None:
        super().__init__("jit", func, made_of)
        self._func, self._compiled = func, compiled

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        if not profiler._is_profiler_enabled:
            return self._compiled.call_with(args, kwargs, lambda: self._names(args, kwargs))
        with _boundary.Span(self._span):
            return self._compiled.call_with(args, kwargs, lambda: self._names(args, kwargs))

    def _names(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        from functorch_lite.compile import _arguments

        return _arguments.names(self._func, args, kwargs)

    def save(self, file: File, *args: Any, **kwargs: Any) -> None:
        """Write the graph for these arguments, which `load` reads."""
        from functorch_lite.compile._flat_graph import flat_graph

        graph = flat_graph("jit", self._func, args, kwargs, dynamic=False)
        torch.export.save(torch.export.export(_Graph(graph), args, kwargs), file)


def _traced_by_dynamo(jitted: Any, *args: Any, **kwargs: Any) -> Any:
    return jitted._func(*args, **kwargs)


# As for aot_function: what torch.compile puts into a graph of its own.
_Jitted.__call__._torchdynamo_inline = _traced_by_dynamo  # type: ignore[attr-defined]


def _named_backends() -> dict[str, Callable[..., Any]]:
    from functorch_lite.compile import inductor, replay

    return {"replay": replay, "inductor": inductor}


class _Graph(nn.Module):
    """A graph as the method of a module, which ``torch.export`` takes."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.graph_module = graph

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the graph returns."""
        return self.graph_module(*args, **kwargs)


class _Watch:
    """Warns of a function that is compiled again and again."""

    def __init__(self, name: str, dynamic: bool) -> None:
        self._name, self._dynamic = name, dynamic
        self._count = 0
        self._last: dict[str, str] = {}

    def __call__(self, names: Sequence[str], leaves: Sequence[Any]) -> None:
        """A graph is made for these arguments."""
        now = {name: _description(leaf) for name, leaf in zip(names, leaves, strict=True)}
        self._count += 1
        if self._count == _MANY:
            changed = next(((k, self._last.get(k), v) for k, v in now.items() if self._last.get(k) != v), None)
            _boundary.warn(_checks.many_graphs(self._name, self._count, changed, self._dynamic))
        self._last = now


def _description(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return repr(leaf)
    return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"


def load(file: File, backend: Backend = "replay") -> Callable[..., Any]:
    """Read what the ``save`` of a `jit` function has written.

    The file holds the graph with the values that captured tensors had. It is one of ``torch.export``, so that
    ``torch.export.load`` reads it, too, also where this package is not installed.

    Args:
        file: A path, or a file that is open for reading bytes.
        backend: As for `jit`. Default ``"replay"``.

    Returns:
        A function of arguments of the same structure and shapes.

    Raises:
        ValueError: There is no such backend.

    Example:
        >>> import io, torch
        >>> from functorch_lite import grad, jit, load
        >>> file = io.BytesIO()
        >>> jit(grad(torch.sin)).save(file, torch.tensor(0.0))
        >>> _ = file.seek(0)
        >>> load(file)(torch.tensor(0.0))
        tensor(1.)
    """
    _checks.compiler_of("load", backend, _named_backends())
    return jit(torch.export.load(file).module(), backend)


def trace(func: Callable[..., Any], *, dynamic: bool = False) -> Callable[..., fx.GraphModule]:
    """Make the flat graph of a function, as ``jax.make_jaxpr`` does.

    Args:
        func: Takes and returns pytrees of tensors and other values.
        dynamic: Whether sizes become symbols. Default False.

    Returns:
        A function of the arguments of ``func`` that returns a ``torch.fx.GraphModule`` of ATen operators, which is
        called as ``func`` is. Its placeholders are the leaves of the arguments, named after them; captured tensors are
        its parameters and buffers; what ``func`` writes is written by ``copy_`` at the end. Arguments that are no
        tensors are constants. Derivatives from outside are not part of it.

    Raises:
        NotImplementedError: The function cannot be traced, as for `jit`; tensor subclasses; writes into arguments that
            share memory.
        TypeError: ``func`` cannot be called.

    Example:
        >>> import torch
        >>> from functorch_lite import grad, trace
        >>> graph = trace(grad(torch.sin))(torch.tensor(0.0))
        >>> [node.name for node in graph.graph.nodes if node.op == "call_function"][-2:]
        ['cos', 'mul']
        >>> graph(torch.tensor(0.0))
        tensor(1.)
    """
    _checks.check_callable("trace", func)
    from functorch_lite.compile._flat_graph import flat_graph

    def traced(*args: Any, **kwargs: Any) -> fx.GraphModule:
        return flat_graph("trace", func, args, kwargs, dynamic)

    return traced


def eval_shape(func: Callable[..., Any]) -> Callable[..., Any]:
    """Find out what a function returns without computing it, as ``jax.eval_shape`` does.

    Args:
        func: Takes and returns pytrees of tensors and other values. It is traced, so that nothing is computed, written
            or drawn.

    Returns:
        A function of the arguments of ``func``, of which only shapes and dtypes matter. It returns what ``func``
        returns, with tensors on the device ``"meta"``, which have sizes, strides and a dtype, and no memory.

    Raises:
        NotImplementedError: The function cannot be traced, as for `jit`.
        TypeError: ``func`` cannot be called.

    Example:
        >>> import torch
        >>> from functorch_lite import eval_shape, hessian
        >>> eval_shape(hessian(lambda x: x.sin().sum()))(torch.rand(1000)).shape
        torch.Size([1000, 1000])
    """
    _checks.check_callable("eval_shape", func)
    from functorch_lite.compile._flat_graph import flat_graph

    def shapes(*args: Any, **kwargs: Any) -> Any:
        module = flat_graph("eval_shape", func, args, kwargs, dynamic=False)
        outputs = [_shape_of(x) for x in module.graph.output_node().args[0]]  # type: ignore[union-attr]
        return pytree.tree_unflatten(outputs, module._out_spec)  # type: ignore[arg-type]

    return shapes


def _shape_of(output: Any) -> Any:
    if not isinstance(output, fx.Node):
        return output
    value = output.meta["val"]
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
