"""torch.utils.checkpoint inside transforms: there it is `remat`, and outside of them PyTorch's own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.utils.checkpoint as plain

from functorch_lite._outside import is_outside
from functorch_lite._remat import remat

# What `plain.checkpoint` calls is kept under this name on the function, so that it can be replaced for those who
# have imported `checkpoint` already.
_ENTRY = "__dynamo_disable"
_undecorated: Callable[..., Any] = plain.checkpoint.__wrapped__  # type: ignore[attr-defined]


@functools.cache
def _plain_checkpoint() -> Callable[..., Any]:
    import torch._dynamo  # slow to import: only when asked for

    disabled: Callable[..., Any] = torch._dynamo.disable(_undecorated, True, wrapping=False)
    return disabled


def _checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if is_outside():
        return _plain_checkpoint()(function, *args, **kwargs)
    return _checkpoint_inside(function, *args, **kwargs)


def _checkpoint_inside(
    function: Callable[..., Any],
    *args: Any,
    use_reentrant: bool | None = None,
    context_fn: Callable[[], tuple[Any, Any]] = plain.noop_context_fn,
    determinism_check: str = "default",
    debug: bool = False,
    early_stop: bool = True,
    preserve_rng_state: bool = True,
    **kwargs: Any,
) -> Any:
    """Both variants do the same here, and the function is not called again, so that nothing needs to be checked."""

    def in_context(*args: Any, **kwargs: Any) -> Any:
        with _without_policy(context_fn()[0]):
            return function(*args, **kwargs)

    return remat(in_context, preserve_rng_state, lambda: _without_policy(context_fn()[1]))(*args, **kwargs)


def _without_policy(context: AbstractContextManager[Any]) -> AbstractContextManager[Any]:
    """The context, unless it is a policy's: what that would keep is of no use at another level. All is recomputed."""
    is_policy = isinstance(context, (plain._CachingTorchDispatchMode, plain._CachedTorchDispatchMode))
    return nullcontext() if is_policy else context


def install() -> None:
    """Make `torch.utils.checkpoint.checkpoint` know levels, also where it has been imported before."""
    setattr(_undecorated, _ENTRY, _checkpoint)
