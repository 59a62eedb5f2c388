"""What PyTorch's own derivative functions need inside our transforms.

`torch.autograd.functional` and `torch.autograd.grad(is_grads_batched=True)` run where autograd records, which is in
reverse mode. To map they use a vmap of PyTorch's, older than `torch.func`, that takes our wrappers for its own; inside
a transform it is ours. `torch.func.linearize` folds what does not depend on the tangents into constants.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, _vmap_internals, fx
from torch.autograd import functional
from torch.fx.experimental import const_fold

from functorch_lite import _C, _checks
from functorch_lite._vmap import vmap

_plain_vmap: Callable[..., Any] = _vmap_internals._vmap
_plain_preprocess: Callable[..., tuple[Tensor, ...]] = functional._grad_preprocess
_plain_split: Callable[..., fx.GraphModule] = const_fold.split_const_subgraphs


def _vmap(func: Callable[..., Any], in_dims: Any = 0, out_dims: Any = 0, allow_none_pass_through: bool = False) -> Any:
    if _C.level_depth() == 0:
        return _plain_vmap(func, in_dims, out_dims, allow_none_pass_through)
    return vmap(func, in_dims, out_dims)


def _grad_preprocess(inputs: tuple[Tensor, ...], create_graph: bool, need_graph: bool) -> tuple[Tensor, ...]:
    level = _C.current_level()
    if level is not None and need_graph and level.kind != "grad":
        _checks.refuse_autograd_functional(level.kind)
    return _plain_preprocess(inputs, create_graph, need_graph)


def _split_const_subgraphs(*args: Any, **kwargs: Any) -> fx.GraphModule:
    level = _C.current_level()
    if level is not None:
        _checks.refuse_folded_constants(level.kind)
    return _plain_split(*args, **kwargs)


def install() -> None:
    """Make them know our transforms. Elsewhere they are PyTorch's own."""
    _vmap_internals._vmap = functional._vmap = _vmap  # type: ignore[attr-defined]
    functional._grad_preprocess = _grad_preprocess
    const_fold.split_const_subgraphs = _split_const_subgraphs  # type: ignore[assignment]
