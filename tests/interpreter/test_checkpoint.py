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
    level_depth,
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


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("variant", [non_reentrant, reentrant], ids=["non_reentrant", "reentrant"])
def test_a_checkpoint_changes_no_number(variant, name, transform, x, xs):
    if variant is reentrant and name == "keyword":
        pytest.skip("PyTorch's reentrant checkpoint takes no keyword arguments")
    check(variant, as_it_is, name, transform, x, xs)


def check(inside, around, name, transform, x, xs):
    func, run = FUNCTIONS[name], TRANSFORMS[transform]
    expected = run(functools.partial(func, as_it_is), x, xs)
    torch.testing.assert_close(around(run, functools.partial(func, inside), x, xs), expected)


def saving_halves(function, *args, **kwargs):
    with saved_tensors_hooks(lambda t: t / 2, lambda t: t * 2):
        return function(*args, **kwargs)


def saving_elsewhere(function, *args, **kwargs):
    with save_on_cpu():
        return function(*args, **kwargs)


HOOKED = ["one", "captured", "written", "mapped_inside", "differentiated_inside", "custom_function", "module"]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", HOOKED)
@pytest.mark.parametrize("hooks", [saving_halves, saving_elsewhere])
def test_hooks_inside_and_around_change_no_number(hooks, name, transform, x, xs):
    check(hooks, as_it_is, name, transform, x, xs)
    check(as_it_is, hooks, name, transform, x, xs)


@pytest.mark.parametrize("transform", ["grad", "hessian", "vmap(grad)", "grad(grad)", "jvp(grad)"])
def test_hooks_around_a_checkpoint(transform, x, xs):
    check(non_reentrant, saving_halves, "captured", transform, x, xs)
    check(functools.partial(saving_halves, non_reentrant), as_it_is, "captured", transform, x, xs)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_selective_and_sequential(transform, x, xs):
    policy = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.sin.default])
    check(functools.partial(non_reentrant, context_fn=policy), as_it_is, "captured", transform, x, xs)

    def sequential(layers, x):
        return checkpoint_sequential(list(layers), 2, x, use_reentrant=False)

    check(sequential, as_it_is, "module", transform, x, xs)


def test_contexts_of_the_user_are_entered():
    entered = []

    class Context:
        def __enter__(self):
            entered.append(self)

        def __exit__(self, *exception):
            pass

    contexts = (Context(), Context())
    grad(lambda x: checkpoint(torch.sin, x, use_reentrant=False, context_fn=lambda: contexts))(torch.ones(()))
    assert entered == [contexts[0], contexts[1]]


def test_parameters_that_require_grad_get_theirs(x):
    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    func = lambda wrap, x: (wrap(lambda x: (weight @ x).sin(), x) * x).sum()

    def gradient_of_gradient(wrap):
        inner = grad(functools.partial(func, wrap))(x).pow(2).sum()
        return torch.autograd.grad(inner, weight)

    torch.testing.assert_close(gradient_of_gradient(non_reentrant), gradient_of_gradient(as_it_is))


def test_differentiated_by_plain_pytorch_outside(xs):
    def gradient(wrap):
        leaf = xs.clone().requires_grad_()
        vmap(grad(functools.partial(captured, wrap)))(leaf).pow(2).sum().backward()
        return leaf.grad

    torch.testing.assert_close(gradient(non_reentrant), gradient(as_it_is))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("inside", [as_it_is, non_reentrant])
@pytest.mark.parametrize("around", [non_reentrant, reentrant, saving_halves])
def test_plain_checkpoints_around_a_transform(around, inside, transform, x, xs):
    def gradient(around, inside):
        a, b = x.clone().requires_grad_(), xs.clone().requires_grad_()
        run = lambda a, b: TRANSFORMS[transform](functools.partial(captured, inside), a, b)
        leaves = torch.utils._pytree.tree_leaves(around(run, a, b))
        sum(leaf.pow(2).sum() for leaf in leaves).backward()
        return a.grad, b.grad

    torch.testing.assert_close(gradient(around, inside), gradient(as_it_is, as_it_is))


def test_outside_of_transforms_it_is_pytorchs_own(x):
    calls = []

    def func(x):
        calls.append(x)
        return vmap(torch.sin)(x) * x

    leaf = x.clone().requires_grad_()
    non_reentrant(func, leaf).sum().backward()
    assert len(calls) == 2
    torch.testing.assert_close(leaf.grad, grad(lambda x: (x.sin() * x).sum())(x))
    with pytest.raises(ValueError, match="Unexpected keyword arguments"):
        reentrant(func, leaf, scale=2)


def test_python_code_runs_once(x):
    calls = []

    def func(x):
        calls.append(x)
        return block(x)

    hessian(lambda x: non_reentrant(func, x).sum())(x)
    assert len(calls) == 1


def kept_and_gradient(wrap, x):
    """The mask of a dropout is seen in its output and in its derivative."""
    y = wrap(lambda x: torch.dropout(x, 0.5, True) + 0 * torch.rand(3).sum(), x)
    return y.sum(), y


@pytest.mark.parametrize("wrap", [non_reentrant, reentrant])
def test_the_same_random_numbers_are_drawn_again(wrap):
    def two_masks(x):
        y = wrap(lambda x: torch.dropout(wrap(lambda x: torch.dropout(x, 0.5, True), x), 0.5, True), x)
        return y.sum(), y

    torch.manual_seed(0)
    gradient, y = grad(two_masks, has_aux=True)(torch.ones(64))
    after = torch.rand(())
    torch.testing.assert_close(gradient, y)
    torch.manual_seed(0)
    torch.dropout(torch.dropout(torch.ones(64), 0.5, True), 0.5, True)
    assert after == torch.rand(())  # and the backward pass leaves the generator alone


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_random_numbers_of_examples(chunk_size):
    run = vmap(
        grad(functools.partial(kept_and_gradient, non_reentrant), has_aux=True),
        randomness="different",
        chunk_size=chunk_size,
    )
    gradient, y = run(torch.ones(5, 64))
    torch.testing.assert_close(gradient, y)
    assert len({tuple(row.tolist()) for row in y}) == 5


def test_random_numbers_of_a_generator():
    generator = torch.Generator().manual_seed(0)

    def func(x):
        y = non_reentrant(lambda x: x * torch.rand(64, generator=generator), x)
        return y.sum(), y

    gradient, y = grad(func, has_aux=True)(torch.ones(64))
    torch.testing.assert_close(gradient, y)


def test_random_numbers_are_not_kept_on_request():
    torch.manual_seed(0)
    func = lambda x: checkpoint(torch.dropout, x, 0.5, True, use_reentrant=False, preserve_rng_state=False)
    gradient, y = grad(lambda x: (func(x).sum(), func(x)), has_aux=True)(torch.ones(64))
    assert not gradient.equal(y)


def test_autocast_is_as_it_was():
    weight = torch.randn(8, 8)

    def loss(wrap, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = wrap(lambda x: nn.functional.linear(x, weight).sin(), x)
        return y.float().sum()

    x = torch.randn(4, 8)
    for run in (grad, lambda f: vmap(grad(f))):
        expected = run(functools.partial(loss, as_it_is))(x)
        assert run(functools.partial(loss, non_reentrant))(x).equal(expected)


def test_statistics_are_updated_once():
    norm = nn.BatchNorm1d(3, momentum=0.5).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    gradient = grad(lambda x: non_reentrant(norm, x).pow(3).sum())(x)
    other = nn.BatchNorm1d(3, momentum=0.5).double()
    torch.testing.assert_close(gradient, grad(lambda x: other(x).pow(3).sum())(x))
    torch.testing.assert_close(norm.running_mean, other.running_mean)
    assert norm.num_batches_tracked == 1


def test_a_counter_is_found_as_it_was(x):
    counter = torch.zeros((), dtype=torch.float64)

    def func(x):
        counter.add_(1)
        return x.sin() * counter

    assert grad(lambda x: non_reentrant(func, x).sum())(x).equal(x.cos())
    assert counter == 1


def test_the_result_may_be_written_in_place(x):
    def func(x):
        y = non_reentrant(lambda x: x.view(-1), x)
        y.mul_(3)
        return (y * x).sum()

    torch.testing.assert_close(grad(func)(x), 6 * x)


def test_a_write_into_what_is_differentiated_is_refused(x):
    def func(x):
        y = x * 2
        return non_reentrant(lambda y: y.mul_(3), y).sum()

    with pytest.raises(ValueError, match=r"checkpoint: .*aten::mul_.*from outside.*Double.*clone"):
        grad(func)(x)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, cotangent):
        return 2 * cotangent


def test_a_function_that_writes_is_refused(x):
    with pytest.raises(NotImplementedError, match=r"checkpoint: .*Doubled writes in place.*clone"):
        grad(lambda x: non_reentrant(Doubled.apply, x * 2).sum())(x)


def test_what_leaves_a_checkpoint_by_the_back_door_is_refused(x):
    kept = []

    def func(x):
        y = x.sin()
        kept.extend([y, y.detach()])
        return y * x

    def detached(x):
        return non_reentrant(func, x).sum() + kept[-1].sum()

    def attached(x):
        return non_reentrant(func, x).sum() + kept[-2].sum()

    torch.testing.assert_close(grad(detached)(x), x.sin() + x * x.cos())
    with pytest.raises(EscapedTensorError, match=r"shape \[3\] .*torch.utils.checkpoint.*Return it.*detach"):
        grad(attached)(x)


def test_an_error_leaves_no_level_open(x):
    def func(x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        grad(lambda x: non_reentrant(func, x))(x)
    assert level_depth() == 0
    assert torch.is_grad_enabled()
    assert grad(lambda x: x.sin().sum())(x).equal(x.cos())


def test_printing_inside(capsys, x):
    grad(lambda x: non_reentrant(lambda x: (print(x), x.sin())[1], x).sum())(x)
    assert "TapeTensor(level=2" in capsys.readouterr().out
