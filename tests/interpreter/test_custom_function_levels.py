"""torch.autograd.Function in both styles under nested transforms, against nested torch.autograd and a loop."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.autograd import Function

from functorch_lite import grad, vmap
from tests.support.nesting import COMPOSITIONS, OURS, REFERENCE, compose

DOUBLE = torch.float64


class Styles:
    """One Function written with forward(ctx, ...) and with setup_context, and how a vector is passed to it."""

    def __init__(self, name, compute, keep, backward, call=lambda apply, x: apply(x), **members):
        self.name, self.call = name, call

        def forward(ctx, *args):
            output = compute(*args)
            keep(ctx, args, output)
            return output

        common = {"backward": staticmethod(backward), **{key: staticmethod(value) for key, value in members.items()}}
        split = {"forward": staticmethod(compute), "setup_context": staticmethod(keep)}
        self.old = type(name + "Old", (Function,), {"forward": staticmethod(forward), **common})
        self.new = type(name + "New", (Function,), {**split, **common})

    def function(self, style):
        apply = getattr(self, style).apply
        return lambda x: self.call(apply, x)


def keep_nothing(ctx, inputs, output):
    pass


def keep_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def keep_output(ctx, inputs, output):
    ctx.save_for_backward(output)


def keep_attributes(ctx, inputs, output):
    ctx.alpha = inputs[1]
    ctx.tensors = {"input": inputs[0], "other": [inputs[0].exp(), 3]}


def backward_of_attributes(ctx, g):
    other, three = ctx.tensors["other"]
    return ctx.alpha * three * g * ctx.tensors["input"] * other, None


def keep_two_outputs(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.power = output[2]


def keep_without_zeros(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def backward_without_zeros(ctx, g, h):
    (x,) = ctx.saved_tensors
    return 3 * x * g if h is None else 3 * x * g + h


def keep_what_is_needed(ctx, inputs, output):
    x, w, _ = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w if ctx.needs_input_grad[0] else None)


def backward_of_needed(ctx, g):
    x, w = ctx.saved_tensors
    assert ctx.needs_input_grad[:1] == (True,)
    assert ctx.needs_input_grad[2] is False
    dw = 20 * g * x if ctx.needs_input_grad[1] else None
    return 10 * g * w, dw, None


def twice_saved(ctx, g):
    (x,) = ctx.saved_tensors
    (same,) = ctx.saved_tensors
    return g * (x + same.sin())


def write(x):
    return x.mul_(x)


def keep_written(ctx, inputs, output):
    ctx.mark_dirty(inputs[0])
    ctx.save_for_backward(output)


def written(apply, x):
    y = x * 1
    z = apply(y)
    assert z is y
    return y + z.sin()


def written_view(apply, x):
    y = torch.stack([x, x + 1])
    apply(y[0])
    return y.sum(0)


Square = Styles("Square", lambda x: x * x, keep_inputs, lambda ctx, g: 3 * ctx.saved_tensors[0] * g)

CASES = [
    Square,
    Styles("Exp", lambda x: x.exp(), keep_output, lambda ctx, g: 2 * g * ctx.saved_tensors[0]),
    Styles(
        "Intermediate",
        lambda x: x.sin(),
        lambda ctx, inputs, output: ctx.save_for_backward(inputs[0], inputs[0].cos()),
        lambda ctx, g: g * ctx.saved_tensors[1] * ctx.saved_tensors[0],
    ),
    Styles("Attributes", lambda x, a: a * x, keep_attributes, backward_of_attributes, lambda apply, x: apply(x, 0.5)),
    Styles("StraightThrough", lambda x: x.round(), keep_nothing, lambda ctx, g: g, lambda apply, x: apply(x) * x),
    Styles(
        "GradientReversal",
        lambda x, alpha: x.view_as(x),
        lambda ctx, inputs, output: setattr(ctx, "alpha", inputs[1]),
        lambda ctx, g: (-ctx.alpha * g, None),
        lambda apply, x: apply(x, 0.3).sin(),
    ),
    Styles("ReturnsItsArgument", lambda x: x, keep_nothing, lambda ctx, g: -g, lambda apply, x: apply(x).sin()),
    Styles(
        "Clamp",
        lambda x, low, high: x.clamp(low, high),
        lambda ctx, inputs, output: ctx.save_for_backward(output),
        lambda ctx, g: (g * ctx.saved_tensors[0].abs(), None, None),
        lambda apply, x: apply(x, -0.7, 0.7) * x,
    ),
    Styles(
        "TwoOutputs",
        lambda x: (x * x, x.sign(), 3),
        keep_two_outputs,
        lambda ctx, g, _, __: g * ctx.power * ctx.saved_tensors[0] * ctx.saved_tensors[1],
        lambda apply, x: apply(x)[0] + apply(x)[1] * x,
    ),
    Styles(
        "WithoutZeros",
        lambda x: (x * x, x + 1),
        keep_without_zeros,
        backward_without_zeros,
        lambda apply, x: apply(x)[0],
    ),
    Styles(
        "WhatIsNeeded",
        lambda x, w, power: w * x**power,
        keep_what_is_needed,
        backward_of_needed,
        lambda apply, x: apply(x, torch.full_like(x, 2), 2) + apply(x, x.sin(), 1),
    ),
    Styles("TwiceSaved", lambda x: x.sin(), keep_inputs, twice_saved),
    Styles("Written", write, keep_written, lambda ctx, g: g * ctx.saved_tensors[0], written),
    Styles("WrittenView", write, keep_written, lambda ctx, g: g * ctx.saved_tensors[0], written_view),
    Styles(
        "Inner",
        lambda x: Square.old.apply(x) + 1,
        keep_inputs,
        lambda ctx, g: g * Square.old.apply(ctx.saved_tensors[0]),
    ),
    Styles(
        "NoGradient", lambda x, y: x * y, keep_inputs, lambda ctx, g: (None, 5 * g), lambda apply, x: apply(x, x.sin())
    ),
]


@pytest.fixture
def x():
    return torch.tensor([0.4, 1.3, -0.8], dtype=DOUBLE)


@pytest.mark.parametrize("style", ["old", "new"])
@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_nested_autograd(case, composition, style, x):
    function = case.function(style)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = compose(composition, OURS, function)(x)
    torch.testing.assert_close(result, compose(composition, REFERENCE, function)(x))


@pytest.mark.parametrize("style", ["old", "new"])
def test_two_arguments_with_one_value(style, x):
    product = Styles(
        "Product",
        lambda x, y: x * x * y,
        keep_inputs,
        lambda ctx, g: (3 * g * ctx.saved_tensors[0] * ctx.saved_tensors[1], 5 * g * ctx.saved_tensors[0]),
    )
    apply = getattr(product, style).apply
    total = lambda x, y: apply(x, y).sum()
    # The inner level's argument and the captured x are one tensor, seen from below.
    inner = lambda y: grad(lambda z: total(z, x))(y).sum()
    torch.testing.assert_close(grad(inner)(x), 3 * x)
    torch.testing.assert_close(grad(lambda y: grad(lambda z: total(x, z))(y).sum())(x), torch.zeros_like(x))
    both = vmap(lambda a, b: apply(a, b))
    torch.testing.assert_close(grad(lambda x: both(x, x).sum())(x), 3 * x * x + 5 * x)
    torch.testing.assert_close(grad(lambda y: both(y, x).sum())(x), 3 * x * x)
    torch.testing.assert_close(grad(lambda y: grad(lambda z: both(z, x).sum())(y).sum())(x), 3 * x)
