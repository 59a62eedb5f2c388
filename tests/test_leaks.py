"""Thousands of calls, a third of which fail, leave nothing behind."""

from __future__ import annotations

import gc
import resource

import torch
import torch.autograd.forward_ad as fwad

from functorch_lite import grad, hessian, jacfwd, jacrev, jvp, level_depth, vjp, vmap

CALLS = 10_000


class _Stop(Exception):
    pass


def _fails(x):
    x.sin()
    raise _Stop


def _push(f):
    return lambda x: jvp(f, (x,), (x,))


COMPOSITIONS = [
    vmap,
    grad,
    _push,
    lambda f: lambda x: vjp(f, x),
    lambda f: vmap(grad(f)),
    lambda f: grad(lambda x: vmap(f)(x).sum()),
    lambda f: vmap(_push(f)),
    lambda f: grad(grad(f)) if f is _fails else grad(lambda x: grad(f)(x).sum()),
    jacrev,
    jacfwd,
    hessian,
]


def _work(x):
    return (x * x).sum()


def _call_many(count: int) -> None:
    x = torch.ones(2, 2)
    for i in range(count):
        transform = COMPOSITIONS[i % len(COMPOSITIONS)]
        if i % 3:
            transform(_work)(x)
            continue
        try:
            transform(_fails)(x)
        except _Stop:
            continue
        raise AssertionError("the function's exception was lost")


def _live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_nothing_is_left_behind():
    _call_many(500)
    tensors, memory = _live_tensors(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _call_many(CALLS)
    assert level_depth() == 0
    assert _live_tensors() <= tensors
    # Kilobytes. One tensor for each call would be about 10 MB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 8_000
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    with fwad.dual_level():
        dual = fwad.make_dual(torch.ones(2), torch.ones(2))
        assert fwad.unpack_dual(dual * 2).tangent.eq(2).all()


def test_modes_are_as_before():
    with torch.no_grad():
        _call_many(50)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        _call_many(50)
        assert torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    assert level_depth() == 0
