"""Composable function transforms for PyTorch."""

import importlib

from functorch_lite import _install
from functorch_lite._C import level_depth
from functorch_lite._checks import EscapedTensorError, LoopFallbackWarning
from functorch_lite._custom_derivatives import custom_jvp, custom_vjp
from functorch_lite._ensemble import construct_in_ensemble, stack_module_state
from functorch_lite._functionalize import functionalize
from functorch_lite._jacobian import hessian, jacfwd, jacobian, jacrev, value_and_jacobian
from functorch_lite._jit import eval_shape, jit, load, trace
from functorch_lite._jvp import jvp
from functorch_lite._legacy import combine_state_for_ensemble, make_functional, make_functional_with_buffers
from functorch_lite._linear import linear_transpose, linearize
from functorch_lite._memory_budget import memory_budget
from functorch_lite._modules import functional_call, replace_all_batch_norm_modules_
from functorch_lite._overlay import overlay
from functorch_lite._per_sample import clipped_grad_sum, per_sample_grad_norms, per_sample_grads
from functorch_lite._products import gnvp, hvp, vhp
from functorch_lite._vjp import grad, grad_and_value, value_and_grad, vjp
from functorch_lite._vmap import vmap

__all__ = [
    "EscapedTensorError",
    "LoopFallbackWarning",
    "clipped_grad_sum",
    "combine_state_for_ensemble",
    "construct_in_ensemble",
    "custom_jvp",
    "custom_vjp",
    "eval_shape",
    "functional_call",
    "functionalize",
    "gnvp",
    "grad",
    "grad_and_value",
    "hessian",
    "hvp",
    "jacfwd",
    "jacobian",
    "jacrev",
    "jit",
    "jvp",
    "level_depth",
    "linear_transpose",
    "linearize",
    "load",
    "make_functional",
    "make_functional_with_buffers",
    "make_fx",
    "memory_budget",
    "overlay",
    "per_sample_grad_norms",
    "per_sample_grads",
    "replace_all_batch_norm_modules_",
    "stack_module_state",
    "trace",
    "value_and_grad",
    "value_and_jacobian",
    "vhp",
    "vjp",
    "vmap",
]

__version__ = "0.1.0"

_install.connect()


def __getattr__(name: str) -> object:
    # These two import a tenth of torch: only when asked for.
    if name == "make_fx":
        from torch.fx.experimental.proxy_tensor import make_fx

        return make_fx
    if name == "compile":
        return importlib.import_module("functorch_lite.compile")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
