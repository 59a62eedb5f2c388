"""torch.autograd.Function under transforms: its own derivative is used at every level, or a clear error is raised."""

from __future__ import annotations

import gc
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from functorch_lite import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

DOUBLE = torch.float64


class Tripled(Function):
    """x -> x^2 with a derivative that only it knows: 3x."""

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x * g

    @staticmethod
    def jvp(ctx, t):
        return 3 * ctx.saved_tensors[0] * t


class Scaled(Function):
    """(x, w, power) -> w * x^power with the derivatives 10 and 20."""

    @staticmethod
    def forward(x, w, power):
        return w * x**power, x + w

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w, ctx.power = inputs
        ctx.save_for_backward(x, w, output[0])

    @staticmethod
    def backward(ctx, g, h):
        assert ctx.power == 2
        return 10 * g + h, 20 * g + h, None


class OldStyle(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] * g


@pytest.fixture
def x():
    return torch.tensor([0.5, 2.0, -1.0], dtype=DOUBLE)


@pytest.mark.parametrize("function", [Tripled, OldStyle])
def test_one_level(function, x):
    f = function.apply
    torch.testing.assert_close(grad(lambda x: f(x).sum())(x), 3 * x)
    torch.testing.assert_close(vmap(f)(x), x * x)
    torch.testing.assert_close(vmap(grad(f))(x), 3 * x)
    torch.testing.assert_close(jacrev(f)(x), torch.diag(3 * x))


def test_second_derivative_is_that_of_the_backward_pass(x):
    gradient = grad(lambda x: Tripled.apply(x).sum())
    torch.testing.assert_close(grad(lambda x: gradient(x).sum())(x), torch.full_like(x, 3))
    torch.testing.assert_close(hessian(lambda x: Tripled.apply(x).sum())(x), 3 * torch.eye(3, dtype=DOUBLE))


def test_value_of_an_inner_level_uses_the_derivative_at_the_outer(x):
    both = lambda x: vjp(Tripled.apply, x)[0].sum()
    torch.testing.assert_close(grad(both)(x), 3 * x)
    torch.testing.assert_close(grad(lambda x: vmap(Tripled.apply)(x).sum())(x), 3 * x)
    torch.testing.assert_close(grad(lambda x: vmap(vmap(Tripled.apply))(x[None]).sum())(x), 3 * x)
    weight = x.clone().requires_grad_()
    vmap(lambda i: Tripled.apply(weight * i))(torch.ones(2, dtype=DOUBLE)).sum().backward()
    torch.testing.assert_close(weight.grad, 6 * x)


def test_forward_mode(x):
    push = lambda f: lambda x: jvp(f, (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(push(Tripled.apply)(x), 3 * x)
    torch.testing.assert_close(jacfwd(Tripled.apply)(x), torch.diag(3 * x))


def test_shared_arguments_and_constants(x):
    def loss(x, w):
        return sum(y.sum() for y in vmap(lambda x: Scaled.apply(x, w, 2), in_dims=0)(x))

    w = torch.tensor(3.0, dtype=DOUBLE)
    dx, dw = grad(loss, argnums=(0, 1))(x, w)
    torch.testing.assert_close(dx, torch.full_like(x, 11))
    torch.testing.assert_close(dw, torch.tensor(63.0, dtype=DOUBLE))


class ScaledIf(Function):
    """(x, None, w) -> w * x with the derivatives 10 w and 10 x."""

    @staticmethod
    def forward(x, nothing, w):
        assert nothing is None
        return w * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, nothing, w = inputs
        assert nothing is None
        ctx.save_for_backward(x, w)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return 10 * g * w, None, 10 * g * x


def test_argument_that_is_none_under_vmap(x):
    w = torch.tensor(3.0, dtype=DOUBLE)
    dx, dw = grad(lambda x, w: vmap(lambda v: ScaledIf.apply(v, None, w))(x).sum(), argnums=(0, 1))(x, w)
    torch.testing.assert_close(dx, torch.full_like(x, 30))
    torch.testing.assert_close(dw, 10 * x.sum())


@pytest.mark.parametrize("function", [Tripled, OldStyle])
def test_call_that_no_batched_argument_reaches(function, x):
    w = torch.tensor(2.0, dtype=DOUBLE)
    inside = lambda w: vmap(lambda v: v * function.apply(w))(x).sum()
    torch.testing.assert_close(grad(inside)(w), 3 * w * x.sum())
    leaf = w.clone().requires_grad_()
    inside(leaf).backward()
    torch.testing.assert_close(leaf.grad, 3 * w * x.sum())


# The vmap staticmethod.


class NumpyCube(Function):
    """x -> x^3 and 3 x^2, with numpy."""

    @staticmethod
    def forward(x):
        values = x.numpy()
        return torch.from_numpy(values**3), torch.from_numpy(3 * values**2)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], output[1])
        ctx.save_for_forward(inputs[0], output[1])

    @staticmethod
    def backward(ctx, g, _):
        x, dx = ctx.saved_tensors
        return g * NumpyMul.apply(x * 0 + 1, dx) + g * 6 * (x - x.detach()) * x.detach()

    @staticmethod
    def vmap(info, in_dims, x):
        return NumpyCube.apply(x), (in_dims[0], in_dims[0])

    @staticmethod
    def jvp(ctx, t):
        x, dx = ctx.saved_tensors
        return NumpyMul.apply(t, dx), None


class NumpyMul(Function):
    """(x, y, scale) -> scale * x * y, with numpy."""

    calls = []

    @staticmethod
    def forward(x, y, scale=1.0):
        return torch.from_numpy(np.asarray(x.numpy() * y.numpy() * scale))

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, ctx.scale = inputs
        ctx.save_for_backward(x, y)
        ctx.save_for_forward(x, y)

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        dx, dy = NumpyMul.apply(g, y, ctx.scale), NumpyMul.apply(g, x, ctx.scale)
        return dx, dy, None

    @staticmethod
    def vmap(info, in_dims, x, y, scale):
        NumpyMul.calls.append((info, in_dims))
        front = [z if dim is None else z.movedim(dim, -1) for z, dim in zip((x, y), in_dims[:2], strict=True)]
        front = [z.unsqueeze(-1) if dim is None else z for z, dim in zip(front, in_dims[:2], strict=True)]
        return NumpyMul.apply(*front, scale), -1

    @staticmethod
    def jvp(ctx, x_t, y_t, _):
        x, y = ctx.saved_tensors
        return NumpyMul.apply(x_t, y, ctx.scale) + NumpyMul.apply(x, y_t, ctx.scale)


class GeneratedMul(Function):
    """(x, y, scale) -> scale * x * y, with a derivative that is 10 times too large."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, y, scale=1.0):
        return scale * x * y

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, ctx.scale = inputs
        ctx.save_for_backward(x, y)
        ctx.save_for_forward(x, y)

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return 10 * ctx.scale * g * y, 10 * ctx.scale * g * x, None

    @staticmethod
    def jvp(ctx, x_t, y_t, _):
        x, y = ctx.saved_tensors
        return 10 * ctx.scale * (x_t * y + x * y_t)


MULTIPLY = pytest.mark.parametrize(("function", "factor"), [(NumpyMul, 1), (GeneratedMul, 10)])


@MULTIPLY
@pytest.mark.parametrize("in_dims", [(0, 0), (1, 0), (0, None), (None, 1)])
def test_vmap_staticmethod_in_all_places(function, factor, in_dims, x):
    a, b = torch.outer(x, x + 1), torch.outer(x + 2, x)
    a, b = (z[0] if dim is None else z for z, dim in zip((a, b), in_dims, strict=True))
    expected = vmap(lambda a, b: 2 * a * b, in_dims)(a, b)
    f = lambda a, b: function.apply(a, b, 2.0)
    torch.testing.assert_close(vmap(f, in_dims)(a, b), expected)
    torch.testing.assert_close(vmap(lambda a, b: function.apply(a, scale=2.0, y=b), in_dims)(a, b), expected)
    torch.testing.assert_close(vmap(vmap(f), in_dims)(a, b), expected)
    # The derivative is the Function's at each level outside and inside.
    plain = lambda a, b: 2 * factor * a * b
    total = lambda f: lambda a, b: f(a, b).sum()
    for result, reference in zip(
        grad(total(vmap(f, in_dims)), argnums=(0, 1))(a, b),
        grad(total(vmap(plain, in_dims)), argnums=(0, 1))(a, b),
        strict=True,
    ):
        torch.testing.assert_close(result, reference)
    gradient = lambda f: vmap(grad(total(f), argnums=(0, 1)), in_dims)(a, b)
    torch.testing.assert_close(gradient(f), gradient(plain))
    push = lambda f: jvp(f, (a, b), (a + 1, b + 2))[1]
    torch.testing.assert_close(push(vmap(f, in_dims)), push(vmap(plain, in_dims)))
    inside = lambda f: vmap(lambda a, b: jvp(f, (a, b), (a + 1, b + 2))[1], in_dims)(a, b)
    torch.testing.assert_close(inside(f), inside(plain))
    jacobian = lambda f: vmap(jacrev(f, argnums=(0, 1)), in_dims)(a, b)
    torch.testing.assert_close(jacobian(f), jacobian(plain))
    torch.testing.assert_close(vmap(jacfwd(f), in_dims)(a, b), jacobian(plain)[0])


def test_vmap_staticmethod_and_second_derivatives(x):
    square = lambda x: NumpyMul.apply(x, x).sum()
    torch.testing.assert_close(hessian(square)(x), 2 * torch.eye(3, dtype=DOUBLE))
    torch.testing.assert_close(vmap(hessian(square))(x[None]), 2 * torch.eye(3, dtype=DOUBLE)[None])
    torch.testing.assert_close(jacrev(jacrev(square))(x), 2 * torch.eye(3, dtype=DOUBLE))
    torch.testing.assert_close(jacfwd(jacfwd(square))(x), 2 * torch.eye(3, dtype=DOUBLE))
    leaf = x.clone().requires_grad_()
    vmap(grad(lambda v: NumpyMul.apply(v, v)))(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, torch.full_like(x, 2))


def test_vmap_staticmethod_of_several_outputs(x):
    cube = lambda x: NumpyCube.apply(x)[0]
    torch.testing.assert_close(vmap(NumpyCube.apply)(x), (x**3, 3 * x**2))
    torch.testing.assert_close(vmap(grad(cube))(x), 3 * x**2)
    torch.testing.assert_close(grad(lambda x: vmap(cube)(x).sum())(x), 3 * x**2)
    torch.testing.assert_close(vmap(lambda x: jvp(cube, (x,), (x,))[1])(x), 3 * x**3)


def test_vmap_staticmethod_with_a_list(x):
    class Total(Function):
        @staticmethod
        def forward(xs):
            return torch.from_numpy(sum(x.numpy() for x in xs))

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def vmap(info, in_dims, xs):
            assert in_dims in (([0],), ([0, 1],))
            return Total.apply([xs[0], *(x.T for x in xs[1:])]), 0

    torch.testing.assert_close(vmap(jacrev(lambda a: a * Total.apply([a])))(x[None]), torch.diag(x)[None])
    total = vmap(lambda a, b: Total.apply([a, b]), in_dims=(0, 1))
    torch.testing.assert_close(total(torch.outer(x, x)[:2], torch.ones(3, 2).double()), torch.outer(x, x)[:2] + 1)


def test_what_the_vmap_staticmethod_gets(x):
    NumpyMul.calls.clear()
    vmap(lambda x: NumpyMul.apply(x, 2 * x[0]), in_dims=1, randomness="same")(torch.outer(x, x)[:2])
    ((info, in_dims),) = NumpyMul.calls
    assert (info.batch_size, info.randomness) == (3, "same")
    assert in_dims == (1, 0, None)


@pytest.mark.parametrize("function", [NumpyMul, GeneratedMul])
def test_call_at_a_vmap_that_nothing_batched_reaches(function, x):
    shared = lambda w: vmap(lambda v: v * function.apply(w, w))(x)
    torch.testing.assert_close(shared(x[0]), x * x[0] ** 2)
    nested = vmap(lambda w: vmap(lambda v: v + function.apply(w, w))(x))
    torch.testing.assert_close(nested(x), x + (x**2)[:, None])


def test_numpy_without_vmap_staticmethod(x):
    class Sine(NumpyMul):
        vmap = Function.vmap

    class OldSine(Function):
        @staticmethod
        def forward(ctx, x):
            return x * x.sum().item()

    torch.testing.assert_close(grad(lambda x: Sine.apply(x, x).sum())(x), 2 * x)
    add = r"staticmethod vmap\(info, in_dims, \*args\) that returns \(outputs, out_dims\)"
    with pytest.raises(NotImplementedError, match=rf"^vmap: .*Function Sine wants the numbers.*{add}"):
        vmap(Sine.apply)(x, x)
    with pytest.raises(NotImplementedError, match=rf"^vmap: .*Function Sine wants the numbers.*{add}"):
        grad(lambda x: vmap(Sine.apply)(x, x).sum())(x)
    with pytest.raises(NotImplementedError, match=rf"^vmap: .*Function OldSine wants the numbers.*{add}"):
        vmap(OldSine.apply)(x[None])


def test_two_rules_are_refused(x):
    class Both(NumpyMul):
        generate_vmap_rule = True

    with pytest.raises(ValueError, match=r"vmap: .*Function Both has generate_vmap_rule = True and a vmap static"):
        vmap(Both.apply)(x, x)


def test_old_style_with_vmap_staticmethod(x):
    class Old(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.from_numpy(np.asarray(x.detach().numpy() ** 2))

        @staticmethod
        def backward(ctx, g):
            return 3 * g * ctx.saved_tensors[0]

        @staticmethod
        def vmap(info, in_dims, x):
            return Old.apply(x), in_dims[0]

    torch.testing.assert_close(vmap(Old.apply)(x), x**2)
    leaf = x.clone().requires_grad_()
    vmap(vmap(Old.apply))(leaf[None]).sum().backward()
    torch.testing.assert_close(leaf.grad, 3 * x)


def test_vmap_staticmethod_that_returns_something_else(x):
    class Wrong(NumpyMul):
        @staticmethod
        def vmap(info, in_dims, x, y, scale):
            return x * y

    with pytest.raises(TypeError, match=r"vmap: the vmap staticmethod of Wrong \(.*must return \(outputs, out_dims\)"):
        vmap(Wrong.apply)(x, x)


class Doubled(Function):
    """Doubles x in place."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.mul_(2)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_dirty(inputs[0])

    @staticmethod
    def backward(ctx, g):
        return 20 * g


class DoubledByRule(Doubled):
    generate_vmap_rule = False

    @staticmethod
    def vmap(info, in_dims, x):
        return DoubledByRule.apply(x), in_dims[0]


@pytest.mark.parametrize("function", [Doubled, DoubledByRule])
def test_function_that_writes(function, x):
    def f(x):
        y = x.clone()
        z = function.apply(y)
        assert z is y
        return y + z

    torch.testing.assert_close(vmap(f)(x), 4 * x)
    torch.testing.assert_close(grad(lambda x: f(x).sum())(x), torch.full_like(x, 40))
    torch.testing.assert_close(vmap(grad(f))(x), torch.full_like(x, 40))
    torch.testing.assert_close(grad(lambda x: vmap(f)(x).sum())(x), torch.full_like(x, 40))
    torch.testing.assert_close(grad(lambda x: grad(lambda x: (f(x) ** 2).sum())(x).sum())(x), torch.full_like(x, 3200))


def test_function_that_cannot_write(x):
    with pytest.raises(ValueError, match=r"^grad: .*Function Doubled writes into the input .*mark_dirty.*x\.clone\(\)"):
        grad(lambda x: Doubled.apply(x).sum())(x)

    class Added(Function):
        @staticmethod
        def forward(ctx, x, y):
            ctx.mark_dirty(x)
            return x.add_(y)

        @staticmethod
        def backward(ctx, g):
            return g, g

    captured = x.clone()
    with pytest.raises(ValueError, match=r"^grad: .*Function Added writes .* captured from outside.*lost.*clone"):
        grad(lambda y: Added.apply(captured, y).sum())(x)
    with pytest.raises(ValueError, match=r"^vmap: the in-place operator aten::add_ writes batched values"):
        grad(lambda y: vmap(lambda y: Added.apply(torch.zeros_like(x[0]), y))(y).sum())(x)


def test_function_that_returns_its_argument(x):
    class Reversed(Function):
        @staticmethod
        def forward(x):
            return x

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, g):
            return -g

    f = lambda x: Reversed.apply(x).sin()
    torch.testing.assert_close(vmap(f)(x), x.sin())
    torch.testing.assert_close(vmap(grad(f))(x), -x.cos())
    torch.testing.assert_close(grad(lambda x: vmap(f)(x).sum())(x), -x.cos())


def test_function_with_a_random_forward_pass():
    class Noisy(Function):
        @staticmethod
        def forward(x):
            return x + torch.rand(x.shape)

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, g):
            return 5 * g

    x = torch.ones(6)
    noisy = vmap(Noisy.apply, randomness="different")
    assert noisy(x).unique().numel() == 6
    torch.testing.assert_close(grad(lambda x: noisy(x).sum())(x), 5 * x)
    with pytest.raises(RuntimeError, match="randomness='error'"):
        grad(lambda x: vmap(Noisy.apply)(x).sum())(x)


def test_no_loop_and_no_warning(x):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vmap(grad(lambda x: NumpyMul.apply(x, x)))(x)


# Backward passes that cannot be differentiated.


class OldNumpySine(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.cosine = x.detach().cos().numpy()
        return torch.from_numpy(np.sin(x.detach().numpy()))

    @staticmethod
    def backward(ctx, g):
        return torch.from_numpy(g.numpy() * ctx.cosine)


class OnceSine(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


@pytest.mark.parametrize("function", [OldNumpySine, OnceSine])
def test_backward_without_derivative(function, x):
    f = lambda x: function.apply(x).sum()
    torch.testing.assert_close(grad(f)(x), x.cos())
    # Nested, where the second derivative is not needed: the level outside differentiates something else.
    torch.testing.assert_close(grad(lambda w: (w * grad(f)(x)).sum())(x), x.cos())
    leaf = x.clone().requires_grad_()
    (grad(f)(x) * leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, x.cos())
    reason = "once_differentiable" if function is OnceSine else "numpy"
    message = rf"Function {function.__name__} is differentiated a second time, but its backward .*{reason}.*operators"
    with pytest.raises(NotImplementedError, match=message):
        grad(lambda x: grad(f)(x).sum())(x)
    if function is OnceSine:
        with pytest.raises(NotImplementedError, match=message):
            grad(f)(x.clone().requires_grad_()).sum().backward()
    with pytest.raises(NotImplementedError, match=message):
        grad(lambda w: grad(lambda y: w.sum() * f(y))(x).sum())(x)


def test_forward_mode_from_a_backward_that_is_differentiable_once(x):
    push = lambda x: jvp(OnceSine.apply, (x,), (x,))[1]
    torch.testing.assert_close(push(x), x * x.cos())
    torch.testing.assert_close(vmap(push)(x), x * x.cos())
    with pytest.raises(NotImplementedError, match=r"Function OnceSine is differentiated a second time"):
        grad(lambda x: push(x).sum())(x)


def test_forward_mode_that_cannot_be_derived(x):
    class Numpy(NumpyMul):
        jvp = Function.jvp

        @staticmethod
        def backward(ctx, g):
            x, y = ctx.saved_tensors
            return torch.from_numpy(g.numpy() * y.numpy()), None, None

    with pytest.raises(NotImplementedError, match=r"^jvp: .*Function Numpy has no jvp.*numpy.*jvp\(ctx, \*tangents\)"):
        jvp(lambda x: Numpy.apply(x, x.detach()), (x,), (x,))
    with pytest.raises(NotImplementedError, match=r"^vmap: the backward pass of .*Function OldNumpySine .*numpy"):
        grad(lambda x: vmap(lambda x: OnlyForwardMapped.apply(x))(x).sum())(x)


class OnlyForwardMapped(Function):
    """Its forward pass runs on a batch, its backward pass does not."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return torch.from_numpy(g.numpy() * ctx.saved_tensors[0].cos().numpy())


OnlyForwardMapped.__name__ = "OldNumpySine"


def test_old_style_vmap_staticmethod_inside_a_derivative(x):
    class Old(Function):
        @staticmethod
        def forward(ctx, x):
            return torch.from_numpy(np.asarray(x.detach().numpy() ** 2))

        @staticmethod
        def backward(ctx, g):
            return g

        @staticmethod
        def vmap(info, in_dims, x):
            return Old.apply(x), in_dims[0]

    with pytest.raises(NotImplementedError, match=r"^vmap: .*Function Old wants the numbers.*split forward.*setup"):
        vmap(grad(Old.apply))(x)


def test_wrong_number_of_gradients(x):
    class Two(Function):
        @staticmethod
        def forward(ctx, x, y):
            return x * y

        @staticmethod
        def backward(ctx, g):
            return g

    with pytest.raises(ValueError, match=r"^grad: the backward pass of .*Function Two must return .*2 argum.*got 1"):
        grad(lambda x: Two.apply(x, x.detach()).sum())(x)


def test_parameters_of_plain_autograd(x):
    weight = torch.nn.Parameter(x.clone())
    gradient = grad(lambda v: OldStyle.apply(v * weight).sum())
    vmap(gradient)(torch.stack([x, x])).sum().backward()
    # d/dw of 3 x w w, for both examples
    torch.testing.assert_close(weight.grad, 2 * 6 * x * weight.detach())


def test_nothing_is_kept_alive(x):
    class Kept(Function):
        @staticmethod
        def forward(ctx, x):
            y = x.exp()
            ctx.save_for_backward(x, y)
            ctx.other = y * 2
            return y

        @staticmethod
        def backward(ctx, g):
            return g * ctx.saved_tensors[1]

    for run in (
        lambda x: grad(lambda x: Kept.apply(x).sum())(x),
        lambda x: grad(lambda x: grad(lambda x: Kept.apply(x).sum())(x).sum())(x),
        lambda x: jvp(Kept.apply, (x,), (x,)),
        lambda x: grad(lambda x: vmap(Kept.apply)(x).sum())(x),
    ):
        gc.collect()
        gc.disable()
        try:
            given = x.clone()
            alive = weakref.ref(given)
            run(given)
            del given
            assert alive() is None
        finally:
            gc.enable()
