"""Activation checkpointing and saved-tensor hooks, inside and around every transform.

The reference is the same function without them, differentiated by the same transforms; those are tested elsewhere.
"""

import functools

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, create_selective_checkpoint_contexts

from functorch_lite import (
    EscapedTensorError,
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    value_and_grad,
    vjp,
    vmap,
)

non_reentrant = functools.partial(checkpoint, use_reentrant=False)
reentrant = functools.partial(checkpoint, use_reentrant=True)


def as_it_is(function, *args, **kwargs):
    return function(*args, **kwargs)


@pytest.fixture
def x():
    return torch.linspace(-1, 1, 3, dtype=torch.float64)


@pytest.fixture
def xs():
    return torch.linspace(-1, 2, 6, dtype=torch.float64).reshape(2, 3)


# Functions of x[3] -> y[], with the checkpoint as an argument.


def block(x):
    return (x.sin() * x).tanh() + x.exp()


def one(wrap, x):
    return wrap(block, x).pow(2).sum()


def captured(wrap, x):
    w = x.cos()
    return (wrap(lambda x: block(x * w), x) * x).sum()


def chain(wrap, x):
    for _ in range(3):
        x = wrap(block, x).sin()
    return x.sum()


def nested(wrap, x):
    def outer(x):
        return wrap(block, x).sin() * x

    return wrap(outer, x).sum()


def keyword(wrap, x):
    return wrap(lambda x, scale: block(x) * scale["s"], x, scale={"s": x.cos()}).sum()


def several_outputs(wrap, x):
    y, (z, number) = wrap(lambda x: (block(x), [x.sum(), 3]), x)
    return (y * z * number).sum()


def integers(wrap, x):
    values, order = wrap(lambda x: block(x).sort(), x)
    return (values * order * x).sum()


def written(wrap, x):
    def func(x):
        y = torch.zeros(3, dtype=torch.float64)
        y[1:] = x[1:] * 2
        y.mul_(x)
        return y.exp_()

    return wrap(func, x).sum()


def view(wrap, x):
    return (wrap(lambda x: x.view(3, 1), x).squeeze(1) * wrap(lambda x: x, x)).pow(3).sum()


def without_grad(wrap, x):
    def func(x):
        with torch.no_grad():
            scale = x.exp()
        return x.sin() * scale + x.cos().detach() * x

    return wrap(func, x).sum()


def mapped_inside(wrap, x):
    return wrap(lambda x: vmap(lambda e: e.sin() * e)(x), x).pow(2).sum()


def differentiated_inside(wrap, x):
    return wrap(lambda x: grad(lambda y: (y.sin() * x).sum())(x), x).pow(2).sum()


class Cube(torch.autograd.Function):
    """With a derivative that is not the cube's, to see whether it is used."""

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, cotangent):
        (x,) = ctx.saved_tensors
        return 5 * x * cotangent

    @staticmethod
    def jvp(ctx, tangent):
        (x,) = ctx.saved_tensors
        return 5 * x * tangent


def custom_function(wrap, x):
    return wrap(lambda x: Cube.apply(x.sin()) * x, x).sum()


LAYER = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
PARAMETERS = {name: p.detach().clone() for name, p in LAYER.named_parameters()}


def module(wrap, x):
    return wrap(LAYER, x).pow(2).sum()


def swapped_parameters(wrap, x):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = LAYER

        def forward(self, x):
            return wrap(self.layer, x)

    parameters = {f"layer.{name}": p + x.sum() for name, p in PARAMETERS.items()}
    return functional_call(Model(), parameters, x).pow(2).sum()


FUNCTIONS = {
    f.__name__: f
    for f in (
        one, captured, chain, nested, keyword, several_outputs, integers, written, view, without_grad, mapped_inside,
        differentiated_inside, custom_function, module, swapped_parameters,
    )
}  # fmt: skip

TRANSFORMS = {
    "grad": lambda f, x, xs: grad(f)(x),
    "value_and_grad": lambda f, x, xs: value_and_grad(f)(x),
    "vjp": lambda f, x, xs: vjp(f, x)[1](torch.tensor(2.0, dtype=torch.float64)),
    "jvp": lambda f, x, xs: jvp(f, (x,), (x + 1,)),
    "vmap": lambda f, x, xs: vmap(f)(xs),
    "jacrev": lambda f, x, xs: jacrev(lambda x: f(x) * x)(x),
    "jacfwd": lambda f, x, xs: jacfwd(lambda x: f(x) * x)(x),
    "hessian": lambda f, x, xs: hessian(f)(x),
    "vmap(grad)": lambda f, x, xs: vmap(grad(f))(xs),
    "vmap(jvp)": lambda f, x, xs: vmap(lambda x: jvp(f, (x,), (x,))[1])(xs),
    "grad(vmap)": lambda f, x, xs: grad(lambda xs: vmap(f)(xs).pow(2).sum())(xs),
    "jvp(vmap)": lambda f, x, xs: jvp(vmap(f), (xs,), (xs + 1,)),
    "grad(grad)": lambda f, x, xs: grad(lambda x: grad(f)(x).pow(2).sum())(x),
    "jvp(grad)": lambda f, x, xs: jvp(grad(f), (x,), (x + 1,)),
    "grad(jvp)": lambda f, x, xs: grad(lambda x: jvp(f, (x,), (x.detach() + 1,))[1])(x),
    "jvp(jvp)": lambda f, x, xs: jvp(lambda x: jvp(f, (x,), (x,))[1], (x,), (x + 1,)),
    "jacrev(jacrev)": lambda f, x, xs: jacrev(jacrev(f))(x),
    "vmap(hessian)": lambda f, x, xs: vmap(hessian(f))(xs),
    "vmap(vmap(grad))": lambda f, x, xs: vmap(vmap(grad(f)))(torch.stack([xs, -xs])),
    "grad(vmap(grad))": lambda f, x, xs: grad(lambda xs: vmap(grad(f))(xs).pow(2).sum())(xs),
    "grad(grad(grad))": lambda f, x, xs: grad(
        lambda x: grad(lambda x: grad(f)(x).pow(2).sum())(x).sin().sum()
    )(x),
    "vmap(jvp(grad))": lambda f, x, xs: vmap(lambda x: jvp(grad(f), (x,), (x,))[1])(xs),
}  # fmt: skip

WITHOUT_SECOND_DERIVATIVE = {"custom_function": set()}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("variant", [non_reentrant, reentrant], ids=["non_reentrant", "reentrant"])
def test_a_checkpoint_changes_no_number(variant, name, transform, x, xs):
    if variant is reentrant and name == "keyword":
        pytest.skip("PyTorch's reentrant checkpoint takes no keyword arguments")
    func, run = FUNCTIONS[name], TRANSFORMS[transform]
    expected = run(functools.partial(func, as_it_is), x, xs)
    torch.testing.assert_close(run(functools.partial(func, variant), x, xs), expected)
