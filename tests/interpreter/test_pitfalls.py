"""The pitfalls that the design names, one test each."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.autograd.forward_ad as fwad
from torch.utils.checkpoint import checkpoint

import functorch_lite as fl
from functorch_lite import EscapedTensorError, grad, hessian, jacfwd, jacrev, jvp, level_depth, vjp, vmap

DOUBLE = torch.float64


@pytest.fixture
def x():
    return torch.rand(3, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)) + 0.2


def test_perturbation_confusion_reverse():
    # d/dx (x * d/dy (x + y)) = 1, not 2.
    derivative = grad(lambda x: x * grad(lambda y: x + y)(torch.tensor(1.0)))(torch.tensor(1.0))
    assert derivative == 1


def test_perturbation_confusion_forward():
    one = torch.ones(())
    inner = lambda x: jvp(lambda y: x + y, (one,), (one,))[1]
    assert jvp(lambda x: x * inner(x), (one,), (one,))[1] == 1


@pytest.mark.parametrize("outer", [grad, lambda f: lambda x: jvp(f, (x,), (torch.ones_like(x),))[1]])
@pytest.mark.parametrize("inner", [grad, lambda f: lambda y: jvp(f, (y,), (torch.ones_like(y),))[1]])
def test_perturbation_confusion_mixed(outer, inner):
    two = torch.tensor(2.0, dtype=DOUBLE)
    # d/dx [x * d/dy (x * y^2)] at y = x: d/dx (2 x^3) = 6 x^2
    assert outer(lambda x: x * inner(lambda y: x * y**2)(x))(two) == 24


def test_captured_tensor_gets_its_gradient_by_backward(x):
    weight = torch.rand(3, dtype=DOUBLE, requires_grad=True)
    grad(lambda x: (x * weight).sin().sum())(x).sum().backward()
    expected = torch.autograd.grad((weight * (x * weight).cos()).sum(), weight)[0]
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("transform", ["vmap", "jvp", "jacrev", "jacfwd", "hessian"])
def test_captured_tensor_gets_its_gradient_through(transform, x):
    weight = torch.rand(3, dtype=DOUBLE, requires_grad=True)
    f = lambda x: (x * weight).sin()
    if transform == "vmap":
        result, expected = vmap(f)(x.expand(2, 3)), torch.stack([f(x), f(x)])
    elif transform == "jvp":
        result, expected = jvp(f, (x,), (torch.ones_like(x),))[1], weight * (x * weight).cos()
    elif transform == "hessian":
        result, expected = hessian(lambda x: f(x).sum())(x), torch.diag(-(weight**2) * (x * weight).sin())
    else:
        result, expected = getattr(fl, transform)(f)(x), torch.diag(weight * (x * weight).cos())
    (got,) = torch.autograd.grad(result.pow(2).sum(), weight)
    torch.testing.assert_close(got, torch.autograd.grad(expected.pow(2).sum(), weight)[0])


def test_captured_forward_tangent_of_plain_pytorch(x):
    with fwad.dual_level():
        dual = fwad.make_dual(torch.tensor(2.0, dtype=DOUBLE), torch.tensor(1.0, dtype=DOUBLE))
        result = grad(lambda x: (x * dual).sin().sum())(x)
        torch.testing.assert_close(fwad.unpack_dual(result).tangent, (2 * x).cos() - 2 * x * (2 * x).sin())


def test_constants_can_be_written(x):
    def f(x):
        y = torch.zeros(3, dtype=DOUBLE)
        y[0] = x[0] * 2
        view = y[1:]
        view.copy_(x[1:].sin())
        return y.sum()

    expected = torch.stack([torch.tensor(2.0, dtype=DOUBLE), x[1].cos(), x[2].cos()])
    torch.testing.assert_close(grad(f)(x), expected)
    torch.testing.assert_close(jacfwd(f)(x), expected)


def test_detached_tensor_literal_is_a_constant(x):
    torch.testing.assert_close(
        grad(lambda x: (x * torch.tensor([1.0, 2.0, 3.0])).sum())(x), torch.tensor([1.0, 2, 3]).double()
    )


@pytest.mark.parametrize("through_view", [False, True])
@pytest.mark.parametrize("transform", [grad, jacfwd])
def test_write_into_captured_tensor_is_refused(transform, through_view, x):
    captured = torch.zeros(3, dtype=DOUBLE)

    def f(x):
        target = captured[:] if through_view else captured
        target.copy_(x)
        return (x * 2).sum()

    with pytest.raises(ValueError, match=r"in-place operator aten::copy_ .*captured from outside \(shape \[3\]"):
        transform(f)(x)
    assert captured.eq(0).all()
    assert level_depth() == 0


def test_captured_tensor_takes_values_without_derivative(x):
    counter = torch.zeros(())

    def f(x):
        counter.add_(1)
        counter.add_(x.detach().sum().to(counter.dtype))
        return x.sum()

    grad(f)(x)
    torch.testing.assert_close(counter, 1 + x.sum().float())


def test_grad_mode_inside_is_respected_and_outside_does_not_matter(x):
    def f(x):
        with torch.no_grad():
            factor = x.sin()
        with torch.no_grad(), torch.enable_grad():
            return (factor * x).sum()

    torch.testing.assert_close(grad(f)(x), x.sin())
    with torch.no_grad():
        torch.testing.assert_close(grad(f)(x), x.sin())
        assert not torch.is_grad_enabled()
        torch.testing.assert_close(jacfwd(f)(x), x.sin() + x * x.cos())


def test_no_grad_inside_an_inner_level_hides_nothing_from_the_outer(x):
    def inner(y):
        with torch.no_grad():
            return (y * y.sin()).sum()

    torch.testing.assert_close(grad(inner)(x), torch.zeros_like(x))
    both = lambda x: vjp(inner, x)[0]
    torch.testing.assert_close(grad(both)(x), x.sin() + x * x.cos())


def test_inference_mode_outside_and_inside(x):
    with torch.inference_mode():
        y = torch.rand(3, dtype=DOUBLE)
        torch.testing.assert_close(grad(lambda x: x.sin().sum())(y), y.cos())
        torch.testing.assert_close(vmap(grad(torch.sin))(y), y.cos())
        torch.testing.assert_close(hessian(lambda x: x.sin().sum())(y), torch.diag(-y.sin()))
        assert torch.is_inference_mode_enabled()

    def f(x):
        with torch.inference_mode():
            factor = x.sin()
        return (factor.clone() * x).sum()

    torch.testing.assert_close(grad(f)(x), x.sin())


def test_autocast_inside_and_outside(x):
    weight = torch.rand(3, 3)
    f = lambda x: (weight @ x).float().sin().sum()
    single = x.float()

    def reference(v):
        v = v.detach().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = f(v)
        return torch.autograd.grad(y, v)[0]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        outside = grad(f)(single)
        per_sample = vmap(grad(f))(single.expand(2, 3))
        assert vmap(lambda v: weight @ v)(single.expand(2, 3)).dtype == torch.bfloat16

    def inside(v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return f(v)

    torch.testing.assert_close(outside, reference(single))
    torch.testing.assert_close(grad(inside)(single), reference(single))
    torch.testing.assert_close(per_sample, torch.stack([reference(single)] * 2), rtol=2e-2, atol=2e-2)


def test_checkpoint_recomputes_and_records(x):
    f = lambda x: (x.sin() * x).exp().sum()
    checkpointed = lambda x: checkpoint(f, x, use_reentrant=False)
    torch.testing.assert_close(grad(checkpointed)(x), grad(f)(x))
    _, vjp_fn = vjp(checkpointed, x)
    torch.testing.assert_close(vjp_fn(torch.tensor(2.0, dtype=DOUBLE))[0], 2 * grad(f)(x))
    torch.testing.assert_close(vmap(grad(checkpointed))(x.expand(2, 3)), vmap(grad(f))(x.expand(2, 3)))
    with_transform = lambda x: checkpoint(lambda x: vmap(torch.sin)(x).mul(x).exp().sum(), x, use_reentrant=False)
    torch.testing.assert_close(grad(with_transform)(x), grad(f)(x))
    assert level_depth() == 0


def test_second_derivatives_where_formulas_take_a_shortcut_without_grad_mode():
    a = torch.eye(2, dtype=DOUBLE) * 2
    f = lambda x: torch.linalg.solve(a + x.outer(x), x).pow(2).sum()
    v = torch.tensor([0.3, 0.7], dtype=DOUBLE)
    expected = torch.autograd.functional.hessian(f, v)
    for transform in (hessian(f), jacrev(jacrev(f)), jacfwd(jacfwd(f)), jacrev(jacfwd(f))):
        torch.testing.assert_close(transform(v), expected)


def test_leaked_autodiff_tensor_is_its_value(x):
    kept = []
    grad(lambda x: kept.append(x.sin()) or x.sum())(x)
    torch.testing.assert_close(kept[0] + 0, x.sin())


@pytest.mark.parametrize("use", [lambda t: t + 1, lambda t: t.sum(), lambda t: torch.stack([t])])
def test_leaked_batched_tensor_is_an_error_that_explains(use, x):
    kept = []
    vmap(lambda x: kept.append(x * 2) or x)(x)
    with pytest.raises(EscapedTensorError, match=r"shape \[\].*made inside vmap.*Return the tensor from the function"):
        use(kept[0])
    with pytest.raises(EscapedTensorError):
        vmap(lambda y: y + kept[0])(x)


def test_vjp_function_under_later_levels(x):
    f = lambda x: x.sin() * x
    y, vjp_fn = vjp(f, x)
    slope = x.cos() * x + x.sin()
    torch.testing.assert_close(vjp_fn(torch.ones_like(y))[0], slope)
    torch.testing.assert_close(vjp_fn(torch.ones_like(y))[0], slope)
    basis = torch.eye(3, dtype=DOUBLE)
    torch.testing.assert_close(vmap(vjp_fn)(basis)[0], torch.diag(slope))
    torch.testing.assert_close(grad(lambda v: vjp_fn(v)[0].sum())(torch.ones_like(y)), slope)
    torch.testing.assert_close(jvp(lambda v: vjp_fn(v)[0], (y,), (torch.ones_like(y),))[1], slope)


def test_nesting_to_depth_six():
    f = lambda x: x**7
    for _ in range(6):
        f = grad(f)
    torch.testing.assert_close(f(torch.tensor(2.0, dtype=DOUBLE)), torch.tensor(5040.0 * 2, dtype=DOUBLE))
    g = lambda x: x.sin()
    for _ in range(6):
        g = vmap(g)
    deep = torch.rand(2, 1, 2, 1, 2, 1, dtype=DOUBLE)
    torch.testing.assert_close(g(deep), deep.sin())
    mixed = vmap(grad(lambda x: vmap(grad(lambda y: jvp(torch.sin, (y,), (y,))[1]))(x).sum()))
    xs = torch.rand(2, 3, dtype=DOUBLE)
    # d/dx d/dy (y cos y) = -2 sin - x cos
    torch.testing.assert_close(mixed(xs), -2 * xs.sin() - xs * xs.cos())


@pytest.mark.parametrize(
    "fail",
    [
        lambda x: 1 / 0,
        lambda x: torch.ones(2) @ torch.ones(3),
        lambda x: vmap(lambda y: y.item())(x),
        lambda x: grad(lambda y: y * torch.ones(2))(x.sum()),
        lambda x: jacrev(lambda y: vmap(lambda z: 1 / 0)(y))(x),
    ],
)
@pytest.mark.parametrize("outer", [grad, vmap, jacfwd, lambda f: vmap(grad(f)), lambda f: hessian(vmap(f))])
def test_exceptions_unwind_every_level(fail, outer, x):
    with pytest.raises(Exception):  # noqa: B017, PT011 - which one does not matter here
        outer(fail)(x.expand(2, 3).clone())
    assert level_depth() == 0
    assert torch.is_grad_enabled()
    assert (x + 1).requires_grad is False
    torch.testing.assert_close(grad(lambda x: x.sum())(x), torch.ones_like(x))


def test_exception_in_backward_unwinds(x):
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise KeyError("from backward")

    with pytest.raises(KeyError, match="from backward"):
        grad(lambda x: Fails.apply(x).sum())(x)
    assert level_depth() == 0


def test_traceback_shows_only_the_user(x):
    def users_function(x):
        raise KeyError("mine")

    with pytest.raises(KeyError) as caught:
        vmap(grad(users_function))(x)
    names = [entry.name for entry in caught.traceback]
    assert names == ["test_traceback_shows_only_the_user", "users_function"]


def test_threads_agree_with_one(x):
    f = vmap(lambda x: hessian(lambda v: jvp(lambda w: (w.sin() * w).sum(), (v,), (v,))[1])(x))
    xs = torch.rand(4, 3, dtype=DOUBLE)
    expected = f(xs)
    results: list[object] = []

    def work():
        try:
            for _ in range(20):
                torch.testing.assert_close(f(xs), expected)
            results.append(level_depth())
        except BaseException as error:  # noqa: BLE001 - shown by the assertion below
            results.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [0] * 6


def test_levels_are_per_thread(x):
    depths = []

    def f(x):
        thread = threading.Thread(target=lambda: depths.append(level_depth()))
        thread.start()
        thread.join()
        depths.append(level_depth())
        return x.sum()

    vmap(grad(f))(x.expand(2, 3))
    assert depths == [0, 2]


def test_symbolic_sizes_when_tracing():
    f = vmap(grad(lambda x: (x.sin().reshape(-1) * x.shape[0]).sum()))
    graph = fl.make_fx(f, tracing_mode="symbolic")(torch.rand(3, 2, 4))
    for sizes in [(3, 2, 4), (5, 7, 1)]:
        x = torch.rand(*sizes)
        torch.testing.assert_close(graph(x), f(x))


def test_metadata_changes_in_place_are_followed(x):
    def f(x):
        y = x * 2
        y.unsqueeze_(0)
        y.transpose_(0, 1)
        assert y.shape == (3, 1)
        z = y.sin() * y
        return z.squeeze_(1).sum()

    expected = lambda x: ((2 * x).sin() * 2 * x).sum()  # noqa: E731
    torch.testing.assert_close(grad(f)(x), grad(expected)(x))
    torch.testing.assert_close(vmap(f)(x.expand(2, 3)), vmap(expected)(x.expand(2, 3)))
    torch.testing.assert_close(jacfwd(f)(x), grad(expected)(x))


def test_versions_catch_a_write_after_a_save(x):
    weight = x.clone()

    def f(x):
        y = x * weight
        with torch.no_grad():
            weight.mul_(2)
        return y.sum()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grad(f)(x)


def test_custom_operator_sees_values_not_wrappers(x):
    @torch.library.custom_op("functorch_lite_test::double", mutates_args=())
    def double(x: torch.Tensor) -> torch.Tensor:
        assert not fl._C.is_wrapper(x)
        return x.clone().mul_(2)

    double.register_autograd(lambda ctx, g: g * 2)
    torch.testing.assert_close(grad(lambda x: double(x).sin().sum())(x), 2 * (2 * x).cos())
    torch.testing.assert_close(grad(grad(lambda x: double(x).sin()))(x[0]), -4 * (2 * x[0]).sin())
    with pytest.warns(fl.LoopFallbackWarning, match="functorch_lite_test::double has no batching rule"):
        torch.testing.assert_close(
            vmap(grad(lambda x: double(x).sum()))(x.expand(2, 3)), torch.full((2, 3), 2.0).double()
        )


def test_comparison_of_whole_tensors_is_refused_on_a_batch():
    xs = torch.tensor([[1.0, 2.0], [1.0, 3.0]])
    with pytest.raises(NotImplementedError, match=r"aten::equal cannot run on batched values.*Python values"):
        vmap(lambda x: x if torch.equal(x, xs[0]) else -x)(xs)
