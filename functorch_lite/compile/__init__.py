"""Ahead-of-time autograd: functions and modules as graphs, forward and backward, for any compiler."""

from functorch_lite.compile._config import config
from functorch_lite.compile._function import clear_compile_cache, num_of_recompilations
from functorch_lite.compile._partition import default_partition, min_cut_rematerialization_partition
from functorch_lite.compile._user import aot_function, aot_module, aot_module_simplified

__all__ = [
    "aot_function",
    "aot_module",
    "aot_module_simplified",
    "clear_compile_cache",
    "config",
    "default_partition",
    "min_cut_rematerialization_partition",
    "num_of_recompilations",
]
