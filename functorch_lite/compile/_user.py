"""What users call: functions and modules to compile."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from functorch_lite import _checks
from functorch_lite._modules import functional_call
from functorch_lite.compile import _arguments
from functorch_lite.compile._backends import Compiler
from functorch_lite.compile._function import CompiledLeaves
from functorch_lite.compile._partition import default_partition
from functorch_lite.compile._specialization import Options
from functorch_lite.compile._trace import Decompositions

Partition = Callable[..., Any]


def aot_function(
    fn: Callable[..., Any],
    fw_compiler: Compiler,
    bw_compiler: Compiler | None = None,
    partition_fn: Partition = default_partition,
    decompositions: Decompositions | None = None,
    num_params_buffers: int = 0,
    keep_inference_input_mutations: bool = False,
    inference_compiler: Compiler | None = None,
    *,
    dynamic: bool = False,
) -> Callable[..., Any]:
    """Trace a function, forward and backward, and have the two graphs compiled.

    What is returned is called as ``fn`` is, and does what ``fn`` does: it returns the same structure, writes the
    arguments that ``fn`` writes, returns views where ``fn`` does, and can be differentiated, any number of times. The
    graphs are made when it is called for the first time, and again when something that they depend on changes: shapes,
    strides, dtypes, devices, ``requires_grad``, arguments that are no tensors, grad mode, autocast.

    Tensors that ``fn`` uses and that are no arguments become inputs of the graphs, too, and have gradients. Which these
    are is found out once: a later change of a global variable is not noticed. Other Python values are constants.

    Args:
        fn: Takes and returns pytrees of tensors and other values.
        fw_compiler: Gets the forward graph, a ``torch.fx.GraphModule`` of ATen operators that returns a list, and a
            list of fake inputs. Returns what is to be called in its place: with inputs by position, or, if it has the
            attribute ``_boxed_call = True``, with one list (`make_boxed_func`).
        bw_compiler: The same for the backward graph. Default: ``fw_compiler``.
        partition_fn: Splits the joint graph: `default_partition`, which saves for the backward pass what eager
            PyTorch saves, `min_cut_rematerialization_partition`, or a function like these.
        decompositions: What to trace in the place of an operator: `default_decompositions`, or a dictionary from
            `get_decompositions`. Default: none.
        num_params_buffers: With ``dynamic``, how many tensors, from the first one, have sizes that never change.
        keep_inference_input_mutations: Accepted for compatibility. Graphs never write their inputs: what was written
            is returned by the graph, and copied.
        inference_compiler: Gets the graph of a call without derivatives. Default: ``fw_compiler``.
        dynamic: Whether sizes become symbols, so that one graph serves many of them.

    Returns:
        The compiled function. Inside the transforms of this package it works as ``fn`` does, and what runs is compiled
        too: ``vmap`` of it runs the compiled ``vmap(fn)``.

    Raises:
        NotImplementedError: Arguments share memory in a way that cannot be seen, and one of them is written.
        TypeError: ``fn`` or a compiler cannot be called, or an argument that is no tensor has no hash.

    Example:
        >>> import torch
        >>> from functorch_lite.compile import aot_function, nop
        >>> compiled = aot_function(lambda x: x.sin().sum(), nop)
        >>> x = torch.zeros(3, requires_grad=True)
        >>> torch.autograd.grad(compiled(x), x)
        (tensor([1., 1., 1.]),)
    """
    _checks.check_callable("aot_function", fn)
    options = options_of(
        "aot_function", fw_compiler, bw_compiler, partition_fn, decompositions, inference_compiler, dynamic
    )

    compiled = compiled_function(fn, options, num_params_buffers)

    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled.call_with(args, kwargs, lambda: _arguments.names(fn, args, kwargs))

    functools.update_wrapper(call, fn)
    call._torchdynamo_inline = fn  # type: ignore[attr-defined]  # what torch.compile puts into a graph of its own
    return call


def compiled_function(fn: Callable[..., Any], options: Options, static_inputs: int = 0) -> CompiledLeaves:
    """A function of pytrees as one of leaves, with the cache of its graphs."""

    def of_leaves(leaves: list[Any], structure: Any) -> tuple[list[Any], Any]:
        args, kwargs = pytree.tree_unflatten(leaves, structure)
        return pytree.tree_flatten(fn(*args, **kwargs))

    return CompiledLeaves(of_leaves, options, static_inputs, is_users=True)


def options_of(
    caller: str,
    forward: Compiler,
    backward: Compiler | None = None,
    partition: Partition = default_partition,
    decompositions: Decompositions | None = None,
    inference: Compiler | None = None,
    dynamic: bool = False,
) -> Options:
    """How graphs are made; what is left out is as for `aot_function`."""
    for compiler in (forward, backward, inference, partition):
        if compiler is not None:
            _checks.check_callable(caller, compiler)
    return Options(forward, backward or forward, inference or forward, partition, dict(decompositions or {}), dynamic)


class _State:
    """Where a module keeps its parameters and buffers. Looked up once, for the walk takes longer than a small graph."""

    def __init__(self, module: nn.Module) -> None:
        self._modules = list(module.modules())
        self._sizes = self._count()
        #: Name, and the dictionary and key under which the tensor is found.
        self._places = [
            (f"{path}.{key}" if path else key, members, key)
            for path, child in module.named_modules()
            for members in (child._parameters, child._buffers)
            for key in members
        ]

    def _count(self) -> tuple[int, ...]:
        return tuple(len(m._modules) + len(m._parameters) + len(m._buffers) for m in self._modules)

    def is_up_to_date(self) -> bool:
        """Whether no module, parameter or buffer was added or removed."""
        return self._sizes == self._count()

    def tensors(self) -> dict[str, Tensor]:
        """By name; a tensor with several names once."""
        result: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, members, key in self._places:
            tensor = members[key]
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                result[name] = tensor
        return result

    def training(self) -> tuple[bool, ...]:
        """The mode of each module."""
        return tuple(module.training for module in self._modules)


class _CompiledModule(nn.Module):
    """A module whose calls are compiled. Parameters and buffers are those of ``orig_mod``."""

    def __init__(self, mod: nn.Module, options: Options) -> None:
        super().__init__()
        self.orig_mod = mod
        self._state = _State(mod)
        self._compiled = CompiledLeaves(self._of_leaves, options, len(self._state.tensors()), is_users=True)

    def _of_leaves(self, leaves: list[Any], structure: Any) -> tuple[list[Any], Any]:
        names, in_structure, _ = structure
        args, kwargs = pytree.tree_unflatten(leaves[len(names) :], in_structure)
        state = dict(zip(names, leaves, strict=False))
        given = dict(state)
        output = functional_call(self.orig_mod, state, args, kwargs)
        replaced = {name: tensor for name, tensor in state.items() if tensor is not given[name]}
        return pytree.tree_flatten((output, replaced))

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any, Callable[[], list[str]]]:
        if not self._state.is_up_to_date():
            self._state = _State(self.orig_mod)
        state = self._state.tensors()
        leaves, structure = pytree.tree_flatten((args, kwargs))

        def names() -> list[str]:
            given = _arguments.names(self.orig_mod.forward, args, kwargs)
            return [_arguments.identifier(name) for name in state] + given

        return [*state.values(), *leaves], (tuple(state), structure, self._state.training()), names

    def prepare(self, args: tuple[Any, ...]) -> None:
        """Compile for certain arguments."""
        leaves, structure, names = self._call(args, {})
        self._compiled.find(_arguments.Arguments(leaves), structure, names).compile()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns."""
        if torch.compiler.is_dynamo_compiling():
            return self.orig_mod(*args, **kwargs)
        outputs, structure = self._compiled.call(*self._call(args, kwargs))
        output, replaced = pytree.tree_unflatten(outputs, structure)
        for name, tensor in replaced.items():
            path, _, attribute = name.rpartition(".")
            setattr(self.orig_mod.get_submodule(path), attribute, tensor)
        return output


def aot_module(
    mod: nn.Module,
    fw_compiler: Compiler,
    bw_compiler: Compiler | None = None,
    partition_fn: Partition = default_partition,
    decompositions: Decompositions | None = None,
    inference_compiler: Compiler | None = None,
    *,
    dynamic: bool = False,
) -> nn.Module:
    """Trace a module, forward and backward, and have the two graphs compiled.

    The parameters and buffers of the module are inputs of the graphs, which are named after them. What the module
    writes into buffers (the statistics of batch norm) it writes into them when compiled, too; tied weights are one
    input. Switching between ``train()`` and ``eval()`` gives another graph.

    Args:
        mod: The module.
        fw_compiler: As for `aot_function`.
        bw_compiler: As for `aot_function`.
        partition_fn: As for `aot_function`.
        decompositions: As for `aot_function`.
        inference_compiler: As for `aot_function`.
        dynamic: As for `aot_function`. The sizes of parameters and buffers are never symbols.

    Returns:
        A module that is called as ``mod`` is. It has ``mod`` as ``orig_mod``, and so its parameters and buffers.

    Raises:
        TypeError: ``mod`` is no module, or a compiler cannot be called.

    Example:
        >>> import torch
        >>> from functorch_lite.compile import aot_module, nop
        >>> layer = torch.nn.Linear(3, 2)
        >>> compiled = aot_module(layer, nop)
        >>> compiled(torch.ones(4, 3)).sum().backward()
        >>> layer.bias.grad
        tensor([4., 4.])
    """
    _checks.check_module("aot_module", mod)
    return _CompiledModule(
        mod,
        options_of("aot_module", fw_compiler, bw_compiler, partition_fn, decompositions, inference_compiler, dynamic),
    )


def aot_module_simplified(
    mod: nn.Module,
    args: Sequence[Any],
    fw_compiler: Compiler,
    bw_compiler: Compiler | None = None,
    partition_fn: Partition = default_partition,
    decompositions: Decompositions | None = None,
    keep_inference_input_mutations: bool = False,
    inference_compiler: Compiler | None = None,
) -> Callable[..., Any]:
    """Compile a module at once, for given arguments.

    Args:
        mod: The module.
        args: The positional arguments of the calls to come, or such as have their shapes.
        fw_compiler: As for `aot_function`.
        bw_compiler: As for `aot_function`.
        partition_fn: As for `aot_function`.
        decompositions: As for `aot_function`.
        keep_inference_input_mutations: As for `aot_function`.
        inference_compiler: As for `aot_function`.

    Returns:
        A function of the arguments of ``mod``. Other shapes than those of ``args`` are compiled when they come.

    Raises:
        TypeError: As for `aot_module`.

    Example:
        >>> import torch
        >>> from functorch_lite.compile import aot_module_simplified, nop
        >>> compiled = aot_module_simplified(torch.nn.ReLU(), [torch.zeros(2)], nop)
        >>> compiled(torch.tensor([-1.0, 1.0]))
        tensor([0., 1.])
    """
    _checks.check_module("aot_module_simplified", mod)
    compiled = _CompiledModule(
        mod,
        options_of(
            "aot_module_simplified", fw_compiler, bw_compiler, partition_fn, decompositions, inference_compiler, False
        ),
    )
    compiled.prepare(tuple(args))
    return compiled.__call__
