"""What users call: functions and modules to compile."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from functorch_lite._modules import functional_call
from functorch_lite.compile import _arguments
from functorch_lite.compile._function import CompiledLeaves
from functorch_lite.compile._partition import default_partition
from functorch_lite.compile._specialization import Compiler, Options

Partition = Callable[..., Any]
Decompositions = Mapping[Any, Callable[..., Any]]


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
    """x."""
    options = Options(
        fw_compiler, bw_compiler or fw_compiler, inference_compiler or fw_compiler, partition_fn, decompositions or {},
        dynamic,
    )

    def of_leaves(leaves: list[Any], structure: Any) -> tuple[list[Any], Any]:
        args, kwargs = pytree.tree_unflatten(leaves, structure)
        return pytree.tree_flatten(fn(*args, **kwargs))

    compiled = CompiledLeaves(of_leaves, options, num_params_buffers)

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = pytree.tree_flatten((args, kwargs))
        outputs, structure = compiled.call(leaves, structure, lambda: _arguments.names(fn, args, kwargs))
        return pytree.tree_unflatten(outputs, structure)

    return call


def aot_module(mod: nn.Module, *args: Any, **kwargs: Any) -> nn.Module: ...
def aot_module_simplified(mod: nn.Module, *args: Any, **kwargs: Any) -> nn.Module: ...
