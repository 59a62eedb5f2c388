"""The backward pass of a level (csrc/backward_pass.cpp) does what PyTorch's engine does with the same graph."""

import threading

import pytest
import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils._python_dispatch import TorchDispatchMode

from functorch_lite import grad, hessian, jacrev, vjp, vmap


def plain(f, *xs: Tensor) -> list[Tensor]:
    """The gradients by plain autograd."""
    xs = [x.detach().clone().requires_grad_() for x in xs]
    found = torch.autograd.grad(f(*xs), xs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(xs, found, strict=True)]


def shared(x: Tensor, y: Tensor) -> Tensor:
    """Nodes whose cotangents are sums of several terms, which depend on the order of adding."""
    a = x.sin() * y
    b = a / 3 + x
    c = torch.stack([a, b, a * b, b.exp(), x]).cumsum(0)
    first, second = c.split([2, 3])
    return (first.sum(0) * second.mean(0) + a - b.tanh() * a).sum()


def views(x: Tensor, y: Tensor) -> Tensor:
    z = x.clone()
    z[0] = y[1] * x[0]
    z[1:].mul_(y[0])
    return (z.t() @ z).diagonal().sum() + y.unfold(0, 2, 1).prod()


def broadcast_and_types(x: Tensor, y: Tensor) -> Tensor:
    return (x.double() * y[0] + y.double().sum() * x[:, :1]).sum().float() + (x * y.half().float()).mean()


def sparse(x: Tensor, y: Tensor) -> Tensor:
    rows = torch.nn.functional.embedding(torch.tensor([0, 1, 1]), x, sparse=True)
    return rows.sin().sum() + (x * y).sum()


def same_twice(x: Tensor, y: Tensor) -> Tensor:
    return (x * x + x + x).sum()


FUNCTIONS = [shared, views, broadcast_and_types, same_twice]


@pytest.mark.parametrize("f", FUNCTIONS)
def test_the_same_bits(f):
    x, y = torch.rand(3, 3), torch.rand(3, 3)
    for found, expected in zip(grad(f, (0, 1))(x, y), plain(f, x, y), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("f", FUNCTIONS)
def test_under_vmap_and_twice(f):
    x, y = torch.rand(4, 3, 3), torch.rand(4, 3, 3)
    for found, column in zip(
        vmap(grad(f, (0, 1)))(x, y), zip(*map(lambda x, y: plain(f, x, y), x, y), strict=True), strict=True
    ):
        torch.testing.assert_close(found, torch.stack(column))

    def curved(x, y):
        return f(x, y) * x.sum()

    variable = x[0].clone().requires_grad_()
    first = torch.autograd.grad(curved(variable, y[0]), variable, create_graph=True)[0]
    second = torch.autograd.grad(first.sin().sum(), variable)[0]
    torch.testing.assert_close(grad(lambda x: grad(curved)(x, y[0]).sin().sum())(x[0]), second)


def test_sparse_beside_dense():
    x, y = torch.rand(3, 3), torch.rand(3, 3)
    torch.testing.assert_close(grad(sparse)(x, y).to_dense(), plain(sparse, x, y)[0].to_dense())


def test_zeros_that_cannot_be_written_into_are_added_to():
    x = torch.tensor([-1.0, 2.0])
    found = grad(lambda x: grad(lambda x: (x.abs() * x).sum())(x).sum())(x)
    assert torch.equal(found, torch.tensor([-2.0, 2.0]))


def test_cotangents_of_the_caller_are_not_written_into():
    x = torch.rand(3)
    cotangent = torch.ones(3)
    _, pull = vjp(lambda x: (x, x, x * 2), x)
    found = pull((cotangent, cotangent, cotangent))[0]
    assert torch.equal(found, torch.full((3,), 4.0))
    assert torch.equal(cotangent, torch.ones(3))
    assert torch.equal(pull((cotangent, cotangent, cotangent))[0], found)  # the graph is kept


def test_inputs_that_are_not_used_or_returned_as_they_are():
    x, y = torch.rand(2), torch.rand(2)
    dx, dy = grad(lambda x, y: x.sum(), (0, 1))(x, y)
    assert torch.equal(dx, torch.ones(2))
    assert torch.equal(dy, torch.zeros(2))
    assert torch.equal(grad(lambda x: x)(torch.tensor(2.0)), torch.tensor(1.0))


def test_the_same_tensor_as_two_inputs():
    x = torch.rand(2)
    dx, dy = grad(lambda x, y: (x * x * y).sum(), (0, 1))(x, x)
    torch.testing.assert_close(dx, 2 * x * x)
    torch.testing.assert_close(dy, x * x)


def test_hooks_run():
    seen = []

    def f(x):
        y = x.sin()
        y.register_hook(lambda g: seen.append(1) or g * 2)
        x.register_hook(lambda g: seen.append(2) or g + 1)
        y.grad_fn.register_hook(lambda *_: seen.append(3))
        return y.sum()

    x = torch.rand(3)
    torch.testing.assert_close(grad(f)(x), 2 * x.cos() + 1)
    assert seen == [1, 3, 2]


def test_retained_gradients():
    kept = []

    def f(x):
        kept.append(x * 2)
        kept[0].retain_grad()
        return kept[0].sin().sum()

    x = torch.rand(3)
    grad(f)(x)
    torch.testing.assert_close(kept[0].grad, (2 * x).cos())


def test_a_leaf_of_the_function_is_not_touched():
    leaves = []

    def f(x):
        leaves.append(torch.ones(3).mul(x.detach()).requires_grad_())
        return (x * leaves[0]).sum()

    x = torch.rand(3)
    torch.testing.assert_close(grad(f)(x), x)
    assert leaves[0].grad is None


def test_anomaly_mode_finds_nan():
    with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match="SqrtBackward0.*nan"):
        grad(lambda x: (x.sqrt() * 0).sum())(torch.zeros(2))


def test_dispatch_modes_learn_which_node_runs():
    seen = []

    class Nodes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if (node := torch._C._current_autograd_node()) is not None:
                seen.append(node.name())
            return func(*args, **(kwargs or {}))

    with Nodes():
        grad(lambda x: x.sin().sum())(torch.rand(3))
    assert "SinBackward0" in seen


class InsideBackward(Function):
    """A Function whose backward pass is a gradient itself, inside PyTorch's engine."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * grad(lambda x: x.sin().sum())(x)


def test_inside_another_backward_pass():
    x = torch.rand(3, requires_grad=True)
    InsideBackward.apply(x).sum().backward()
    torch.testing.assert_close(x.grad, x.detach().cos())
    torch.testing.assert_close(grad(lambda x: InsideBackward.apply(x).sum())(x.detach()), x.detach().cos())


def test_a_function_calls_back_into_python():
    class Double(Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            assert g.shape == (3,)
            return g * 2

    x = torch.rand(3)
    torch.testing.assert_close(grad(lambda x: Double.apply(x).sin().sum())(x), 2 * (2 * x).cos())


def test_errors_of_formulas_arrive():
    class Broken(Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            raise LookupError("this one")

    with pytest.raises(LookupError, match="this one"):
        grad(lambda x: Broken.apply(x).sum())(torch.rand(3))
    assert torch.equal(grad(lambda x: x.sum())(torch.rand(3)), torch.ones(3))


def test_a_gradient_of_the_wrong_shape_is_an_error():
    class Wrong(Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            return torch.ones(5)

    with pytest.raises(RuntimeError, match="WrongBackward returned an invalid gradient at index 0"):
        grad(lambda x: Wrong.apply(x).sum())(torch.rand(3))


def test_the_caller_keeps_its_grad_mode():
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            before = torch.is_grad_enabled()
            grad(lambda x: x.sin().sum())(torch.rand(3))
            assert torch.is_grad_enabled() == before


def test_outer_autograd_differentiates_the_pass():
    x = torch.rand(3, requires_grad=True)
    found = torch.autograd.grad(grad(lambda x: (x**3).sum())(x).sum(), x)[0]
    torch.testing.assert_close(found, 6 * x.detach())
    assert not grad(lambda x: (x**3).sum())(x.detach()).requires_grad


def test_threads_run_their_own():
    x = torch.rand(8, 8)
    expected = plain(shared, x, x)
    results = []

    def work():
        results.extend(grad(shared, (0, 1))(x, x) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    for found in results:
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_long_chains_need_no_deep_stack():
    def f(x):
        for _ in range(20_000):
            x = x * 1.0
        return x

    assert torch.equal(grad(f)(torch.tensor(2.0)), torch.tensor(1.0))


def test_jacobians_and_hessians_of_sums():
    x = torch.rand(4)
    torch.testing.assert_close(
        jacrev(lambda x: x.cumsum(0) * x)(x), torch.tril(x[:, None].expand(4, 4)) + torch.diag(x.cumsum(0))
    )
    torch.testing.assert_close(hessian(lambda x: x.sum() ** 2)(x), torch.full((4, 4), 2.0))


@pytest.mark.parametrize("shape", [(1, 3), (1, 1, 3), (1, 2, 3), (2, 1, 3)])
def test_broadcast_along_leading_dimensions(shape):
    """Cotangents are reduced to the shape of the variable: by a sum, or a view where all leading sizes are 1."""
    x, b = torch.randn(shape, dtype=torch.float64), torch.randn(3, dtype=torch.float64, requires_grad=True)

    def f(b):
        return ((x + b).sin() * b).sum()

    (expected,) = torch.autograd.grad(f(b), b, create_graph=True)
    torch.testing.assert_close(grad(f)(b.detach()), expected.detach())
    (second,) = torch.autograd.grad(expected.sum(), b)
    torch.testing.assert_close(grad(lambda b: grad(f)(b).sum())(b.detach()), second)
