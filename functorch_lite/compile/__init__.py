"""Ahead-of-time autograd: functions and modules as graphs, forward and backward, for any compiler."""

from torch.fx.experimental.proxy_tensor import make_fx

from functorch_lite.compile._backends import (
    make_boxed_compiler,
    make_boxed_func,
    memory_efficient_fusion,
    nop,
    print_compile,
    ts_compile,
)
from functorch_lite.compile._config import config
from functorch_lite.compile._decompositions import default_decompositions, get_decompositions
from functorch_lite.compile._draw import draw_graph, draw_joint_graph
from functorch_lite.compile._function import clear_compile_cache, num_of_recompilations
from functorch_lite.compile._inductor import inductor
from functorch_lite.compile._minifier import minifier
from functorch_lite.compile._partition import default_partition, min_cut_rematerialization_partition
from functorch_lite.compile._partition_report import partition_report
from functorch_lite.compile._replay import replay
from functorch_lite.compile._user import aot_function, aot_module, aot_module_simplified

__all__ = [
    "aot_function",
    "aot_module",
    "aot_module_simplified",
    "clear_compile_cache",
    "config",
    "default_decompositions",
    "default_partition",
    "draw_graph",
    "draw_joint_graph",
    "get_decompositions",
    "inductor",
    "make_boxed_compiler",
    "make_boxed_func",
    "make_fx",
    "memory_efficient_fusion",
    "min_cut_rematerialization_partition",
    "minifier",
    "nop",
    "num_of_recompilations",
    "partition_report",
    "print_compile",
    "replay",
    "ts_compile",
]
