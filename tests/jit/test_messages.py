"""Messages of jit, trace, eval_shape and load."""

import io

import pytest
import torch

import functorch_lite as fl

X = torch.ones(2)


def keeper():
    kept = []

    def f(x):
        kept.append(x * 2)
        return x

    return f


@pytest.mark.parametrize(
    ("call", "error", "parts"),
    [
        (lambda: fl.jit(3), TypeError, "jit: expected a function as first argument, got int"),
        (lambda: fl.trace(3), TypeError, "trace: expected a function as first argument, got int"),
        (lambda: fl.eval_shape(3), TypeError, "eval_shape: expected a function as first argument, got int"),
        (lambda: fl.jit(torch.sin, "fast"), ValueError, "jit: got backend='fast', expected 'replay', 'inductor' or"),
        (lambda: fl.load(io.BytesIO(), "fast"), ValueError, "load: got backend='fast', expected 'replay', 'inductor'"),
        (
            lambda: fl.jit(keeper())(X),
            NotImplementedError,
            r"compile: the function keeps 1 of the tensors .* Return them",
        ),
        (
            lambda: fl.jit(lambda x: x if x.sum() > 0 else -x)(X),
            NotImplementedError,
            "the values of a tensor decide what Python does .* Use torch.where",
        ),
        (
            lambda: fl.trace(lambda x, y: x.add_(y))(*(lambda b: (b[:2], b[1:]))(torch.ones(3))),
            NotImplementedError,
            "trace: got a function that .* writes arguments that share memory.* or use functorch_lite.jit",
        ),
        (
            lambda: fl.trace(lambda x: x.t_())(torch.ones(2, 3)),
            NotImplementedError,
            "trace: got a function that changes the shape of an argument in place.*Return the new tensor",
        ),
    ],
)
def test_message(call, error, parts):
    with pytest.raises(error, match=parts):
        call()
    assert fl.level_depth() == 0


def test_an_optimizer_without_state():
    weight = torch.ones(2, requires_grad=True)
    optim = torch.optim.Adam([weight])

    def step(x):
        weight.grad = x
        optim.step()

    with pytest.raises(NotImplementedError, match=r"as an optimizer does in its first step.* call the function once"):
        fl.jit(step)(X)


def test_subclass():
    from torch.testing._internal.two_tensor import TwoTensor

    with pytest.raises(NotImplementedError, match="trace: got a function that takes or returns a tensor subclass"):
        fl.trace(torch.sin)(TwoTensor(X, X))
