"""Writing batched values into tensors that the mapped function makes: they become batched, and so do their views."""

import copy
import gc

import pytest
import torch

from functorch_lite import functional_call, grad, hessian, jacfwd, jacrev, jvp, make_fx, stack_module_state, vjp, vmap
from functorch_lite._C import describe
from tests.support.oracles import loop_vmap

DOUBLE = torch.float64


@pytest.fixture
def xs():
    return torch.linspace(-1, 2, 12, dtype=DOUBLE).view(4, 3)


@pytest.fixture
def captured():
    return torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE)


def item(x):
    y = torch.zeros(3, dtype=DOUBLE)
    y[1] = x[0]
    return y


def chain_of_views(x):
    y = torch.zeros(2, 5, dtype=DOUBLE)
    y[1, 2:] += x
    y.t()[0] *= 3
    y.view(-1)[::2][1:3] -= x[:2]
    return y


def live_views(x):
    y = torch.ones(3, 3, dtype=DOUBLE)
    before = y.unsqueeze(0), y.diagonal(), y[1:], y.t()[0], y.expand(2, 3, 3), y.view(9)
    y[0] = x
    before[1].add_(x)
    return [y, *before]


def pieces(x):
    y = torch.zeros(6, dtype=DOUBLE)
    first, second = y.split(3)
    rows = y.view(2, 3).unbind()
    first.copy_(x)
    second.add_(first)
    rows[1].mul_(x)
    return [y, first, second, *rows, *torch.chunk(y, 2)]


def write_before_and_after(x):
    y = torch.zeros(3, dtype=DOUBLE)
    y += 2
    y[0] = 5
    y *= x
    y[2] = 7
    return y


def of_a_batched_one(x):
    y = x.new_empty(2, 3)
    y[0] = 1
    y[1] = x
    z = torch.empty_like(x)
    z.copy_(x)
    return [y, z]


def complex_parts(x):
    z = torch.zeros(3, dtype=torch.complex128)
    real, imag, conj = z.real, torch.view_as_real(z)[..., 1], z.conj()
    real += x
    imag[0] = x[1]
    return [torch.view_as_real(z), real, imag, torch.view_as_real(conj.resolve_conj())]


def another_dtype(x):
    z = torch.zeros(3, dtype=torch.int64)
    as_float = z.view(DOUBLE)
    as_float.copy_(x)
    return [z, as_float]


def transposed_memory(x):
    y = torch.zeros(3, 2, dtype=DOUBLE).t().clone()
    assert y.stride() == (1, 2)
    flat = y.t().view(6)
    y[0] = x
    flat[1] += x[0]
    return [y, flat]


def detached_and_data(x):
    y = torch.zeros(3, dtype=DOUBLE)
    detached, data = y.detach(), y.data
    data[0] = x[0]
    detached[1] = x[1]
    y[2] = x[2]
    return [y, detached, data]


def in_place_views(x):
    y = torch.zeros(3, dtype=DOUBLE)
    y.unsqueeze_(0)
    z = y[0]
    y.t_()
    y[0] = x[0]
    z[1] = x[1]
    return [y, z]


def from_python(x):
    y = torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE)
    z = torch.as_tensor([[1.0], [2.0]], dtype=DOUBLE)
    y[0] = x[0]
    z[1] += x[2]
    return [y, z]


def masks_and_indices(x):
    y = torch.arange(3, dtype=DOUBLE)
    y[torch.tensor([True, False, True])] = x[1]
    y[x > 0] = 9.0
    y.index_add_(0, torch.tensor([0, 0]), x[:2])
    y.scatter_(0, torch.tensor([1]), x[:1])
    y.masked_fill_(x < -0.5, -1.0)
    return y


def accumulator(x):
    total = torch.zeros((), dtype=DOUBLE)
    for v in x.unbind():
        total += v * v
    return total


FUNCTIONS = [
    item,
    chain_of_views,
    live_views,
    pieces,
    write_before_and_after,
    of_a_batched_one,
    complex_parts,
    another_dtype,
    transposed_memory,
    detached_and_data,
    in_place_views,
    from_python,
    masks_and_indices,
    accumulator,
]
DIFFERENTIABLE = [item, chain_of_views, live_views, pieces, write_before_and_after, of_a_batched_one, accumulator]
by_name = pytest.mark.parametrize("func", FUNCTIONS, ids=lambda f: f.__name__)
differentiable = pytest.mark.parametrize("func", DIFFERENTIABLE, ids=lambda f: f.__name__)


def flat(output):
    return [*output] if isinstance(output, (list, tuple)) else [output]


def check(func, in_dims, *args):
    expected = loop_vmap(lambda *a: flat(func(*a)), in_dims, list(args), list(args))
    actual = flat(vmap(func, in_dims)(*args))
    for y, z in zip(actual, expected, strict=True):
        torch.testing.assert_close(y, z)


@by_name
def test_against_a_loop(func, xs):
    check(func, (0,), xs)
    check(func, (1,), xs.t().contiguous())
    check(func, (0,), xs[:1])


@by_name
def test_nested_and_empty(func, xs):
    both = torch.stack([xs, 2 * xs, xs - 3])
    expected = [torch.stack(y) for y in zip(*[flat(vmap(func)(x)) for x in both], strict=True)]
    for y, z in zip(flat(vmap(vmap(func))(both)), expected, strict=True):
        torch.testing.assert_close(y, z)
    example = flat(func(xs[0]))
    for y, z in zip(flat(vmap(func)(xs[:0])), example, strict=True):
        assert y.shape == (0, *z.shape)


def total(func):
    return lambda x: sum((y * y).sum() for y in flat(func(x)))


def gradient_of_each(func, xs):
    leaves = [x.clone().requires_grad_() for x in xs]
    return torch.stack([torch.autograd.grad(total(fresh(func))(x), x)[0] for x in leaves])


def fresh(func):
    """The function, for plain autograd: it takes a view written through another one for a leaf, unless asked."""
    return {live_views: live_views_for_autograd, pieces: pieces_for_autograd}.get(func, func)


def live_views_for_autograd(x):
    y = torch.ones(3, 3, dtype=DOUBLE)
    y[0] = x
    y.diagonal().add_(x)
    return [y, y.unsqueeze(0), y.diagonal(), y[1:], y.t()[0], y.expand(2, 3, 3), y.view(9)]


def pieces_for_autograd(x):
    second = x * x
    return [torch.cat([x, second]), x, second, x, second, x, second]


@differentiable
def test_grad_inside_and_outside(func, xs):
    if func is pieces:  # split and unbind give views that autograd refuses to write into, here as there
        with pytest.raises(RuntimeError, match="output of a function that returns multiple views"):
            vmap(grad(total(func)))(xs)
        return
    expected = gradient_of_each(func, xs)
    torch.testing.assert_close(vmap(grad(total(func)))(xs), expected)
    torch.testing.assert_close(grad(lambda xs: vmap(total(func))(xs).sum())(xs), expected)
    leaf = xs.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(vmap(total(func))(leaf).sum(), leaf)[0], expected)


@pytest.mark.parametrize("func", [item, chain_of_views, write_before_and_after, accumulator])
def test_jacobians_and_hessians(func, xs):
    jacobians = vmap(jacrev(func))(xs)
    torch.testing.assert_close(vmap(jacfwd(func))(xs), jacobians)
    torch.testing.assert_close(jacobians, torch.stack([torch.autograd.functional.jacobian(func, x) for x in xs]))
    torch.testing.assert_close(
        vmap(hessian(total(func)))(xs),
        torch.stack([torch.autograd.functional.hessian(total(func), x) for x in xs]),
    )
    along = lambda x, v: jvp(func, (x,), (v,))[1]
    torch.testing.assert_close(vmap(along)(xs, 2 * xs), torch.einsum("b...i,bi->b...", jacobians, 2 * xs))


def test_value_of_the_outer_level_then_of_the_inner(xs, captured):
    def inner(x, w):
        y = torch.zeros(3, dtype=DOUBLE)
        y[0] = w[0]  # batched at the outer vmap only
        y[1] = x[1]  # batched at the inner one too
        return y

    both = vmap(lambda w: vmap(lambda x: inner(x, w))(xs))(torch.stack([captured, -captured]))
    for i, w in enumerate([captured, -captured]):
        torch.testing.assert_close(both[i], torch.stack([inner(x, w) for x in xs]))


def test_derivative_written_before_the_batch(xs, captured):
    def func(w, x):
        y = torch.zeros(3, dtype=DOUBLE)
        y[0] = w[0] ** 2
        y[1:] = x[:2] * w[1]
        return y.prod()

    expected = torch.autograd.functional.jacobian(lambda w: sum(func(w, x) for x in xs), captured)
    torch.testing.assert_close(grad(lambda w: vmap(func, (None, 0))(w, xs).sum())(captured), expected)
    torch.testing.assert_close(vmap(grad(func), (None, 0))(captured, xs).sum(0), expected)


def test_clone_and_results_of_captured_tensors(xs, captured):
    def func(x):
        copy, sine = captured.clone(), captured.sin()
        copy[0] = x[0]
        sine += x
        return copy, sine

    copy, sine = vmap(func)(xs)
    torch.testing.assert_close(sine, captured.sin() + xs)
    torch.testing.assert_close(copy[:, 0], xs[:, 0])
    assert captured.tolist() == [1, 2, 3]


def test_weight_in_a_graph_of_plain_autograd(xs, captured):
    captured.requires_grad_()

    def func(x):
        y = captured * 2
        z = y.exp()
        y[0] = x[0]
        return (y * z).sum()

    vmap(func)(xs).sum().backward()
    other = captured.detach().clone().requires_grad_()
    captured_gradient = captured.grad
    scaled = torch.stack([torch.cat([x[:1], (other * 2)[1:]]) for x in xs])
    (scaled * (other * 2).exp()).sum().backward()
    torch.testing.assert_close(captured_gradient, other.grad)


def test_write_after_it_was_saved_is_noticed(captured, xs):
    def func(w, x):
        y = w * 2
        z = y * y  # saves y
        y += x
        return z.sum() + y.sum()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grad(lambda w: vmap(func, (None, 0))(w, xs).sum())(captured)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        vmap(grad(func), (None, 0))(captured, xs)


def test_what_is_the_same_for_all_reads_like_a_plain_tensor(xs):
    def func(x):
        y = torch.arange(3.0)
        assert y.tolist() == [0, 1, 2]
        assert y.numpy().sum() == 3
        assert repr(y) == "tensor([0., 1., 2.])"
        assert f"{y.sum():.1f}" == "3.0"
        assert y.sum().item() == 3
        assert [float(v) for v in y] == [0, 1, 2]
        return x * y

    torch.testing.assert_close(vmap(func)(xs), xs * torch.arange(3.0))


def test_written_tensor_has_no_memory_to_read(xs):
    def func(x):
        y = torch.zeros(3, dtype=DOUBLE)
        y += x
        return y.tolist()

    with pytest.raises(RuntimeError, match=r"no memory of its own, so \.numpy\(\), \.tolist\(\)"):
        vmap(func)(xs)


def test_shape_given_in_place(xs):
    def func(x):
        y, z = torch.arange(3.0), torch.zeros(2)
        assert y.resize_(2).tolist() == [0, 1]
        assert z.set_(torch.ones(4)).tolist() == [1, 1, 1, 1]
        assert copy.copy(y).tolist() == [0, 1]
        y[1] = x[1]
        return y

    torch.testing.assert_close(vmap(func)(xs)[:, 1], xs[:, 1].float())


def test_tensor_that_outlives_the_call(xs):
    kept = []

    def func(x):
        kept.append(torch.arange(3.0))
        return x

    vmap(func)(xs)
    assert (kept[0] + 1).tolist() == [1, 2, 3]
    assert kept[0].numpy().tolist() == [0, 1, 2]


def test_dropped_views_are_forgotten(xs):
    def func(x):
        y = torch.zeros(300, dtype=DOUBLE)
        for i in range(300):
            y[i] = 1.0
        y[:3] = x
        return y

    gc.collect()
    torch.testing.assert_close(vmap(func)(xs)[:, :3], xs)


@pytest.mark.parametrize("same", [torch.Tensor.contiguous, lambda w: w.to(w.dtype), lambda w: w.reshape(3)])
def test_what_may_be_the_captured_tensor_itself(same, xs, captured):
    def func(x):
        same(captured)[0] = x[0]
        return x

    with pytest.raises(ValueError, match="writes batched values into `captured`, a tensor from outside"):
        vmap(func)(xs)
    assert captured.tolist() == [1, 2, 3]


def test_writes_of_plain_values_into_captured_tensors_are_allowed(xs, captured):
    def func(x):
        captured.add_(1)
        captured.view(3)[0] = 7
        return x * captured

    torch.testing.assert_close(vmap(func)(xs), xs * torch.tensor([7.0, 3, 4], dtype=DOUBLE))
    assert captured.tolist() == [7, 3, 4]


def test_messages_name_the_captured_tensor(xs):
    buffer = torch.zeros(3, dtype=DOUBLE)
    norm = torch.nn.BatchNorm1d(3).double()

    def view_of_it(x):
        buffer[1:] += x[:2]
        return x

    with pytest.raises(ValueError, match=r"aten::add_ .*`buffer`.*shape \[2\].*as in buffer = buffer\.clone\(\)"):
        vmap(view_of_it)(xs)
    with pytest.raises(ValueError, match=r"`norm\.running_mean`, a tensor from outside the mapped function"):
        vmap(lambda x: norm.running_mean.add_(x))(xs)
    with pytest.raises(ValueError, match=r"writes batched values into `w`.*pass w as an argument that vmap maps"):
        vmap(lambda x, w: w.add_(x), (0, None))(xs, buffer)
    with pytest.raises(ValueError, match=r"writes batched values into a tensor from outside"):
        vmap([buffer.clone()][0].add_)(xs)
    assert buffer.tolist() == [0, 0, 0]


def test_operators_that_return_their_argument(xs, captured):
    def func(x):
        y = torch.zeros(3, dtype=DOUBLE)
        for dropped in (
            torch.dropout(y, 0.5, False),
            torch.dropout(y, 0.0, True),
            torch.feature_dropout(y, 0.5, False),
        ):
            dropped += x
        return y

    check(func, (0,), xs)
    with pytest.raises(ValueError, match=r"writes batched values into `captured`"):
        vmap(lambda x: torch.dropout(captured, 0.5, False).add_(x))(xs)


def test_message_beside_tensors_without_a_storage(xs):
    def func(x):
        sparse, buffer = torch.eye(3).to_sparse(), captured
        return buffer.add_(x), sparse

    captured = torch.zeros(3, dtype=DOUBLE)
    with pytest.raises(ValueError, match=r"writes batched values into `buffer`"):
        vmap(func)(xs)


def test_data_of_a_tensor_with_views(xs):
    def func(x):
        y = torch.zeros(3, dtype=DOUBLE).clone()
        view = y[:2]
        y.data = torch.ones(3, dtype=DOUBLE).clone()
        return y, view

    with pytest.raises(RuntimeError, match=r"tensor\.data = \.\.\.: there are views of this tensor"):
        vmap(func)(xs)


def test_python_values_that_all_examples_share(xs):
    def func(x):
        if (x * x < 0).any():
            raise AssertionError("no example is here")
        return x if torch.allclose(x, x) and not torch.equal(x, x + 1) else -x

    torch.testing.assert_close(vmap(func)(xs), xs)
    torch.testing.assert_close(vmap(grad(lambda x: func(x).sum()))(xs), torch.ones_like(xs))


def test_module_with_a_scratch_buffer(xs):
    class Scratch(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 2, dtype=DOUBLE)

        def forward(self, x):
            out = torch.zeros(4, dtype=DOUBLE)
            out[:2] = self.linear(x)
            out[2:].copy_(out[:2].relu())
            return out

    models = [Scratch() for _ in range(3)]
    state = stack_module_state(models)
    together = vmap(lambda p, b, x: functional_call(models[0], (p, b), (x,)), (0, 0, None))(*state, xs[0])
    torch.testing.assert_close(together, torch.stack([m(xs[0]) for m in models]))


def test_pullback_under_vmap(xs):
    _, pull = vjp(chain_of_views, xs[0])
    cotangents = torch.randn(5, 2, 5, dtype=DOUBLE)
    torch.testing.assert_close(vmap(pull)(cotangents)[0], torch.stack([pull(c)[0] for c in cotangents]))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_traced(mode, xs):
    graph = make_fx(vmap(grad(total(chain_of_views))), tracing_mode=mode)(xs)
    torch.testing.assert_close(graph(xs + 1), vmap(grad(total(chain_of_views)))(xs + 1))
    if mode == "symbolic":
        longer = torch.cat([xs, xs])
        torch.testing.assert_close(graph(longer), vmap(grad(total(chain_of_views)))(longer))


def test_repr_before_and_after(xs):
    seen = []

    def func(x):
        y = torch.zeros(2, dtype=DOUBLE)
        seen.append((repr(y), describe(y)[3]))
        y += x[0]
        seen.append((repr(y).split("(")[0], describe(y)[3]))
        return y

    vmap(func)(xs)
    assert seen == [("tensor([0., 0.], dtype=torch.float64)", None), ("BatchedTensor", 0)]
