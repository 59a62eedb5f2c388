"""functionalize: results and written tensors as in eager PyTorch, and no write in the traced program."""

from __future__ import annotations

import re
import warnings
import zlib

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from functorch_lite import _C, custom_vjp, functionalize, grad, hessian, jacrev, jvp, vjp, vmap
from tests.support.functionalize import (
    aliasing_nodes,
    as_comparable,
    as_eager,
    copied,
    writing_forms,
    writing_nodes,
)
from tests.support.ops import OPS, samples_of

REMOVE = ["mutations", "mutations_and_views"]
MODES = ["real", "fake", "symbolic"]


def numbers(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5


def write_slices(x):
    x[:, 1] = 7
    x[0] += 1
    x[..., -1:] *= 2
    return x.sum()


def write_constants(x):
    y = torch.zeros(3, dtype=x.dtype)
    y[0] = x[0, 1]
    torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype).mul_(x[0, 0])
    v = y.view(3, 1)
    v.add_(x[1, 0])
    return y, v


def write_out(x):
    first, second, third = x.new_empty(0), torch.empty(2, 3), x.new_zeros(4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.add(x, 1, out=first)
    torch.mul(x.float(), 2, out=second)
    torch.sin(x, out=third[1:3])
    torch.kron(x, x, out=(fourth := x.new_empty(4, 9)))
    return first, second, third, fourth


def write_complex(x):
    c = torch.complex(x, 2 * x)
    c.imag.mul_(3)
    d = c.conj()
    d.mul_(1j)
    return c, d, c.imag, c.resolve_conj(), d.resolve_conj(), torch.view_as_real(c)


def write_without_recording(x):
    with torch.no_grad():
        x.mul_(2)
        first = x[0]
    return x + 1, first.clone()


def statistics(x):
    norm = nn.BatchNorm1d(3, dtype=x.dtype)
    return norm(x), norm.running_mean, norm.running_var, norm.num_batches_tracked


FUNCTIONS = {
    "in place": lambda x: x.add_(1),
    "through a view": lambda x: x.view(-1)[1:].mul_(3),
    "through views of views": lambda x: x.t().unsqueeze(0)[:, 1:].diagonal(0, 1, 2).exp_(),
    "slices": write_slices,
    "constants": write_constants,
    "out": write_out,
    "foreach": lambda x: torch._foreach_add_([x, x[0].clone()], 1),
    "index_put": lambda x: x.index_put_((torch.tensor([0, 0]),), x[1].clone(), accumulate=True),
    "masked": lambda x: x.masked_fill_(x > 1, 0.0),
    "split": lambda x: [part.mul_(i + 1) for i, part in enumerate(x.split(2, 1))],
    "unbind": lambda x: [part.mul_(i + 1) for i, part in enumerate(x.unbind(0))],
    "unsafe_chunk": lambda x: [part.mul_(2) for part in x.unsafe_chunk(2, 1)],
    "as_strided": lambda x: x.as_strided((2, 2), (1, 2)).mul_(2),
    "complex": write_complex,
    "item": lambda x: x * x[0, 1].add_(1).item(),
    "cast": lambda x: torch.zeros(2, 3, dtype=torch.int32).copy_(x),
    "itself": lambda x: x.add_(x.flip(0)).mul_(x),
    "t_": lambda x: (x.t_(), x[0].mul_(5))[0],
    "unsqueeze_ and squeeze_": lambda x: x.unsqueeze_(0).squeeze_(0).mul_(2),
    "as_strided_": lambda x: x.as_strided_((3,), (2,)).mul_(2),
    "resize_ to more": lambda x: x.resize_(8).zero_(),
    "resize_ to less": lambda x: x.resize_(4).mul_(2),
    "set_": lambda x: x.set_(torch.ones(4, dtype=x.dtype)),
    "data": lambda x: (x.data.mul_(2), x + 1)[1],
    "other data": lambda x: setattr(x, "data", torch.ones(4, dtype=x.dtype)),
    "detach": lambda x: (x.detach().mul_(2), x + 1)[1],
    "detach_": lambda x: x.clone().detach_().mul_(2),
    "no_grad": write_without_recording,
    "batch norm": statistics,
    "random": lambda x: (torch.manual_seed(0), x.uniform_(), x[0].normal_(), x.clone().bernoulli_(0.5))[1:],
    "dropout": lambda x: (torch.manual_seed(0), nn.functional.dropout(x, 0.5, inplace=True))[1],
}


@pytest.mark.parametrize("remove", REMOVE)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_as_eager(name, remove):
    f = FUNCTIONS[name]
    as_eager(functionalize(f, remove=remove), f, numbers(2, 3))


#: A number of a tensor, another memory, a seed, a module made inside: what a trace does not hold.
UNTRACEABLE = {"item", "other data", "set_", "random", "dropout", "batch norm"}


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
@pytest.mark.parametrize("remove", REMOVE)
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in UNTRACEABLE])
def test_traced(name, remove, mode):
    if mode == "symbolic" and name in ("resize_ to more", "resize_ to less", "out"):
        pytest.skip("PyTorch's functionalization changes sizes only if they are numbers")
    if mode == "symbolic" and name == "unsafe_chunk":
        pytest.skip("PyTorch's unsafe_chunk has no symbolic sizes in C++, without functionalize either")
    f = FUNCTIONS[name]
    traced = make_fx(functionalize(f, remove=remove), tracing_mode=mode)(numbers(2, 3))
    assert not writing_nodes(traced)
    if remove == "mutations_and_views":
        assert not aliasing_nodes(traced)
    as_eager(traced, f, numbers(2, 3, seed=1))


def smooth(x):
    """Differentiable writes: into constants, through views, over and over."""
    y = torch.zeros_like(x)
    y[0] = x[1].sin()
    y.view(-1)[1:].add_(x.view(-1)[:-1].exp())
    z = y.t().clone()
    z.mul_(2).t_()
    w = x.clone()
    w.copy_(z + x)
    w.diagonal().mul_(y[0, 0])
    return (w * y).sum()


COMPOSITIONS = {
    "grad outside": lambda f: grad(functionalize(f)),
    "grad inside": lambda f: functionalize(grad(f)),
    "in grad of grad": lambda f: grad(lambda x: grad(functionalize(f))(x).square().sum()),
    "between grads": lambda f: grad(lambda x: functionalize(grad(f))(x).square().sum()),
    "around grads": lambda f: functionalize(grad(lambda x: grad(f)(x).square().sum())),
    "jvp outside": lambda f: lambda x: jvp(functionalize(f), (x,), (x.cos(),)),
    "jvp inside": lambda f: functionalize(lambda x: jvp(f, (x,), (x.cos(),))),
    "jacrev": lambda f: functionalize(jacrev(f)),
    "hessian inside": lambda f: functionalize(hessian(f)),
    "hessian outside": lambda f: hessian(functionalize(f)),
    "twice": lambda f: functionalize(lambda x: functionalize(f)(x.clone())),
    "twice around grad": lambda f: functionalize(grad(functionalize(f))),
    "vmap outside": lambda f: lambda x: vmap(functionalize(f))(torch.stack([x, x.cos()])),
    "vmap inside": lambda f: lambda x: functionalize(vmap(f))(torch.stack([x, x.cos()])),
    "vmap of grad": lambda f: lambda x: vmap(functionalize(grad(f)))(torch.stack([x, x.cos()])),
    "around vmap of grad": lambda f: lambda x: functionalize(vmap(grad(f)))(torch.stack([x, x.cos()])),
    "without views": lambda f: grad(functionalize(f, remove="mutations_and_views")),
}


def plainly(composition):
    """The same without functionalize."""
    names = composition.__globals__
    kept = names["functionalize"]
    names["functionalize"] = lambda f, remove=None: f
    try:
        return composition(smooth)(numbers(2, 3))
    finally:
        names["functionalize"] = kept


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_compositions(name):
    composition = COMPOSITIONS[name]
    torch.testing.assert_close(composition(smooth)(numbers(2, 3)), plainly(composition))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["grad inside", "jvp inside", "hessian inside", "vmap inside", "around vmap of grad"])
def test_traced_compositions(name, mode):
    if mode == "symbolic" and name in ("jvp inside", "hessian inside"):
        pytest.skip("PyTorch's forward mode through views has no symbolic sizes, without functionalize either")
    f = COMPOSITIONS[name](smooth)
    traced = make_fx(f, tracing_mode=mode)(numbers(2, 3, seed=1))
    assert not writing_nodes(traced)
    torch.testing.assert_close(traced(numbers(2, 3)), f(numbers(2, 3)))


@pytest.mark.parametrize("remove", REMOVE)
def test_autograd_outside(remove):
    w, x = numbers(3).requires_grad_(), numbers(2, 3, seed=1)

    def loss(w, x):
        y = w * x
        y[0].mul_(2)
        v = y[1]
        with torch.no_grad():
            y.mul_(3)  # the numbers change, and the graph does not
            y.detach()[1].add_(1)
        return (v * w).sum() + y.sum()

    expected = torch.autograd.grad(loss(w, x), w)
    torch.testing.assert_close(torch.autograd.grad(functionalize(loss, remove=remove)(w, x), w), expected)
    torch.testing.assert_close(grad(functionalize(loss, remove=remove))(w.detach(), x), expected[0])


def test_autograd_through_a_write_with_as_strided():
    def f(x):
        y = x.clone()
        y.as_strided((2, 2), (1, 2)).mul_(x[:2, :2])
        y.as_strided((2,), (3,), 1).fill_(1)
        return (y * x).sum()

    x = numbers(2, 3).requires_grad_()
    expected = torch.autograd.grad(f(x), x)
    torch.testing.assert_close(torch.autograd.grad(functionalize(f)(x), x), expected)
    torch.testing.assert_close(grad(functionalize(f))(x.detach()), expected[0])


def test_optimizer_step_outside_of_autograd():
    w = numbers(3).requires_grad_()

    def step(w):
        with torch.no_grad():
            w.sub_(0.5 * w)
        return (w * w).sum()

    expected = numbers(3).requires_grad_()
    step(expected).backward()
    functionalize(step)(w).backward()
    torch.testing.assert_close((w.detach(), w.grad), (expected.detach(), expected.grad))
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        functionalize(lambda w: w.mul_(2))(w)


def test_forward_mode_of_a_detached_write():
    def f(x):
        y = x * 2
        y.detach().mul_(3)
        return y * y

    x = numbers(3)
    torch.testing.assert_close(jvp(functionalize(f), (x,), (x,)), jvp(f, (x,), (x,)))


def test_detached_memory_that_nobody_else_sees_takes_derivatives():
    def f(x):
        state = torch.zeros(2, 3, dtype=x.dtype).detach()
        state[0] = x
        state += x
        state.detach_()
        state *= x
        return state.sum()

    x = numbers(3)
    torch.testing.assert_close(grad(functionalize(f))(x), grad(f)(x))


def test_differentiated_value_in_detached_memory_is_refused():
    def f(x):
        y = x * 2
        y.detach().mul_(x)
        return y.sum()

    with pytest.raises(ValueError, match=r"functionalize: a value that is differentiated .* x\.detach\(\)\.clone\(\)"):
        grad(functionalize(f))(numbers(3))


def test_write_after_save_is_noticed():
    def f(x):
        y = x.clone()
        z = y * y
        y.add_(1)
        return z.sum()

    for g in (grad(f), functionalize(grad(f))):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            g(numbers(3))


# Arguments, captured tensors, outputs.


def test_captured_tensor_is_written():
    buffer = torch.ones(3)

    def f(x):
        buffer[0] = x[1]
        buffer.mul_(2)
        return buffer + x

    got = functionalize(f)(torch.arange(3.0))
    torch.testing.assert_close(buffer, torch.tensor([2.0, 2.0, 2.0]))
    torch.testing.assert_close(got, torch.tensor([2.0, 3.0, 4.0]))


def test_nothing_is_written_if_the_function_raises():
    x = torch.ones(3)

    def f(x):
        x.zero_()
        raise KeyError("no")

    with pytest.raises(KeyError):
        functionalize(f)(x)
    assert x.equal(torch.ones(3))


def test_the_same_tensor_twice():
    x = numbers(3)
    as_eager(lambda x: functionalize(lambda a, b: (a.mul_(2), b + 1))(x, x), lambda x: (x.mul_(2), x + 1), x)


def test_shared_memory():
    def write_then_read(a, b):
        a.mul_(2)
        return b + 1

    def read_then_write(a, b):
        c = b + 1
        a.mul_(2)
        return c

    x = torch.arange(4.0)
    for f in (functionalize(write_then_read), functionalize(lambda a, b: write_then_read(a, b.view(-1)))):
        with pytest.raises(ValueError, match=r"functionalize: the function has written .* clone of one"):
            f(x, x[1:])
    y = x[1:]
    with pytest.raises(ValueError, match="shares its memory"):  # captured
        functionalize(lambda x: write_then_read(x, y))(x)
    assert x.equal(torch.arange(4.0))
    as_eager(lambda x: functionalize(read_then_write)(x, x[1:]), lambda x: read_then_write(x, x[1:]), x)
    as_eager(lambda x: functionalize(write_then_read)(x[:2], x[2:]), lambda x: write_then_read(x[:2], x[2:]), x)


def test_outputs_share_memory_as_in_eager():
    x = torch.arange(4.0)

    def f(x):
        y = x * 2
        first = y[0]
        y.add_(1)
        return x, x.mul_(2), x[1:], y, first, x.detach()

    same, written, view, y, first, detached = functionalize(f)(x)
    assert same is x
    assert written is x
    assert view._base is x
    assert view.data_ptr() == x[1:].data_ptr()
    assert first.data_ptr() == y.data_ptr()
    assert detached.data_ptr() == x.data_ptr()
    copies = functionalize(f, remove="mutations_and_views")(x)
    assert copies[0] is x
    assert copies[2].data_ptr() != x[1:].data_ptr()


def test_expanded_memory_is_not_written():
    for remove in REMOVE:
        with pytest.raises(RuntimeError, match=r"functionalize: .* one place in memory.* Write into its clone\(\)"):
            functionalize(lambda x: x.expand(2, 3).mul_(2), remove=remove)(numbers(1, 3))


def test_as_strided_of_memory_that_moved_is_refused():
    def f(x):
        x.mul_(2)
        return x.as_strided((2,), (1,), 4)

    with pytest.raises(ValueError, match="functionalize: as_strided of a tensor that was written"):
        functionalize(f)(torch.arange(8.0)[4:])
    with pytest.raises(ValueError, match="functionalize: as_strided of a view"):
        functionalize(lambda x: x[1:].as_strided((2,), (1,), 1), remove="mutations_and_views")(torch.arange(8.0))


def test_remove_is_checked():
    with pytest.raises(ValueError, match=r"functionalize: got remove='views', expected 'mutations' .*_and_views"):
        functionalize(torch.sin, remove="views")
    with pytest.raises(TypeError, match="functionalize: "):
        functionalize(3)


def test_functionalized_by_pytorch():
    with pytest.raises(RuntimeError, match="functionalize: got a tensor of PyTorch's own functionalization"):
        functionalize(lambda x: x + 1)(torch._to_functional_tensor(numbers(3)))
    with pytest.raises(RuntimeError, match=r"functionalize: got a call inside a transform of torch.func"):
        torch.func.functionalize(functionalize(lambda x: x + 1))(numbers(3))


def test_containers_and_other_leaves():
    def f(tree, *, scale):
        tree["a"][0].mul_(scale)
        return {"b": (tree["a"][0], None, "text")}

    x = numbers(3)
    expected = x * 2
    got = functionalize(f)({"a": [x]}, scale=2)
    assert got["b"] == (x, None, "text")
    torch.testing.assert_close(x, expected)


def test_printed():
    seen = []
    functionalize(lambda x: seen.append(repr(x.mul_(2))))(torch.tensor([1.0]))
    assert seen == ["FunctionalTensor(level=1, value=\n    tensor([2.]))"]


def test_escaped_tensor_is_its_value():
    kept = []

    def f(x):
        y = x.clone()
        kept.append(y[1:])
        y.mul_(2)

    functionalize(f)(torch.arange(3.0))
    torch.testing.assert_close(kept[0] + 1, torch.tensor([3.0, 5.0]))


# Operations with derivatives of their own.


class WritesInside(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone().mul_(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g.clone().mul_(2).mul_(x)


class MarksDirty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, g):
        return g.clone().mul_(2)


class Numpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(x.detach().numpy() * 3)

    @staticmethod
    def backward(ctx, g):
        return g * 3


@custom_vjp
def sine(x):
    return x.clone().sin_()


sine.defvjp(lambda x: (sine(x), x), lambda x, g: (g.clone().mul_(x.cos()),))


def remember(x):
    y = torch.zeros_like(x)
    y.copy_(x)
    return y.sin_() * x


OPERATIONS = {
    "Function": lambda x: WritesInside.apply(x * 1).sin().sum(),
    "mark_dirty": lambda x: MarksDirty.apply(x * 1).sin().sum(),
    "numpy": lambda x: Numpy.apply(x * 1).sin().sum(),
    "custom_vjp": lambda x: sine(x * 1).square().sum(),
    "checkpoint": lambda x: checkpoint(remember, x, use_reentrant=False).sum(),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name):
    f, x = OPERATIONS[name], numbers(2, 3)
    torch.testing.assert_close(functionalize(f)(x), f(x))
    expected = grad(f)(x)
    torch.testing.assert_close(grad(functionalize(f))(x), expected)
    torch.testing.assert_close(functionalize(grad(f))(x), expected)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(functionalize(f)(leaf), leaf)[0], expected)
    if name != "numpy":
        torch.testing.assert_close(vmap(grad(functionalize(f)))(x), vmap(grad(f))(x))
        torch.testing.assert_close(functionalize(vmap(grad(f)))(x), vmap(grad(f))(x))
        assert not writing_nodes(make_fx(functionalize(grad(f)))(x))
    if name not in ("custom_vjp",):
        torch.testing.assert_close(jvp(functionalize(f), (x,), (x,)), jvp(f, (x,), (x,)))
        torch.testing.assert_close(functionalize(lambda x: jvp(f, (x,), (x,)))(x), jvp(f, (x,), (x,)))


@torch.library.custom_op("functorch_lite_test::accumulate", mutates_args=("y",))
def accumulate(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    y.add_(x)
    return x * 2


@accumulate.register_fake
def _(x, y):
    return torch.empty_like(x)


@torch.library.custom_op("functorch_lite_test::increment", mutates_args=("ys",))
def increment(ys: list[torch.Tensor]) -> None:
    for y in ys:
        y.add_(1)


def use_custom_operators(x):
    y = torch.zeros_like(x)
    first = accumulate(x, y)
    second = accumulate(first, y.view(-1).view_as(x))
    increment([y, first])
    return y + first + second


@pytest.mark.parametrize("remove", REMOVE)
def test_custom_operators_that_write(remove):
    as_eager(functionalize(use_custom_operators, remove=remove), use_custom_operators, numbers(2, 3))


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_custom_operators_are_traced_as_functional_ones(mode):
    traced = make_fx(functionalize(use_custom_operators), tracing_mode=mode)(numbers(2, 3))
    assert not writing_nodes(traced)
    higher = [node for node in traced.graph.nodes if isinstance(node.target, torch._ops.HigherOrderOperator)]
    assert [node.args[0] for node in higher] == [
        torch.ops.functorch_lite_test.accumulate.default,
        torch.ops.functorch_lite_test.accumulate.default,
        torch.ops.functorch_lite_test.increment.default,
    ]
    as_eager(traced, use_custom_operators, numbers(2, 3, seed=1))


def test_operator_that_returns_views_is_refused():
    library = torch.library.Library("functorch_lite_views", "DEF")
    library.define("half(Tensor(a) x) -> Tensor(a)")
    library.impl("half", lambda x: x[: len(x) // 2], "CPU")
    with pytest.raises(
        NotImplementedError, match="functionalize: the operator functorch_lite_views::half returns views"
    ):
        functionalize(torch.ops.functorch_lite_views.half)(numbers(4))


# Every operator of PyTorch's sample database.

NAMES = sorted(OPS)
EXPANDED = {"broadcast_to", "broadcast_tensors", "expand", "expand_as", "unfold"} | {
    f"meshgrid.{kind}_tensors" for kind in ("variadic", "list_of")
}
#: (operator, form) -> what is said where eager PyTorch writes.
REFUSED = {(name, "in the result"): "one place in memory|internal overlap" for name in EXPANDED}
REFUSED["as_strided", "in a view"] = REFUSED["as_strided.partial_views", "in a view"] = "as_strided of a view"


@pytest.mark.parametrize("name", NAMES)
def test_operator(name):
    op = OPS[name]
    dtype = next((dtype for dtype in (torch.float64, torch.int64) if dtype in op.supported_dtypes("cpu")), None)
    if dtype is None or op.name.startswith(("empty", "new_empty")):
        pytest.skip("results without meaning, or a dtype of its own")
    for sample in samples_of(op, dtype, requires_grad=False, number=1):
        for form, f in writing_forms(op, sample):
            args = (sample.input, sample.args, sample.kwargs)
            remove = REMOVE[zlib.crc32(f"{name} {form}".encode()) % 2]
            compare_with_eager(functionalize(f, remove=remove), f, args, REFUSED.get((name, form)))


def compare_with_eager(functional, f, args, refused=None):
    try:
        torch.manual_seed(0)
        expected_args = copied(args)
        expected = f(*expected_args)
    except Exception:  # whatever eager PyTorch refuses
        return

    def once(*args):
        torch.manual_seed(0)
        return functional(*args)

    got_args = copied(args)
    try:
        got = once(*got_args)
    except (RuntimeError, ValueError) as error:
        if refused is None or not re.search(refused, str(error)):
            raise
        return
    as_comparable(got, got_args, expected, expected_args)


# The level, as the compiler uses it.


def test_level_tells_memories():
    x = torch.arange(4.0)
    with _C.FunctionalizeLevel(True) as level:
        y = level.lift(x)
        assert level.lift(x) is y
        view = y[1:]
        assert level.memory_of(view) == level.memory_of(y) != level.memory_of(y.clone())
        assert level.memory_of(x) is None
        assert level.is_view(view)
        assert not level.is_view(y)
        assert level.memory_value(y) is x
        with _C.AutodiffLevel(False):
            view.mul_(2)
            assert level.value_of(y).equal(torch.tensor([0.0, 2.0, 4.0, 6.0]))
        assert level.memory_value(view).equal(level.value_of(y))
        again = level.replay_views(view, x)
        assert level.outside_of(view) is x
        assert level.value_of(x).equal(level.value_of(y))  # what code inside reads of it
    assert again.data_ptr() == x[1:].data_ptr()
    assert x.equal(torch.arange(4.0))


def test_levels_are_freed():
    import gc
    import weakref

    x = torch.arange(3.0)
    kept = weakref.ref(x)
    functionalize(lambda x: x.view(-1).mul_(2))(x)
    del x
    gc.collect()
    assert kept() is None


def test_vjp_function_outlives_the_level():
    x = numbers(3)
    output, pull = vjp(functionalize(lambda x: x.clone().mul_(x)), x)
    torch.testing.assert_close(pull(torch.ones_like(output))[0], 2 * x)


def test_leaves_of_results_are_plain():
    results = functionalize(lambda x: (x.clone().t_(), [x[0], x.mul_(2)]))(numbers(2, 3))
    assert not any(_C.is_wrapper(leaf) for leaf in pytree.tree_leaves(results))
