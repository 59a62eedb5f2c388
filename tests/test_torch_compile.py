"""torch.compile of functions that call the transforms: one graph, and the numbers of plain PyTorch."""

import contextlib
import copy
import functools
import subprocess
import sys
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch._dynamo
import torch.utils._pytree as pytree
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import functorch_lite as fl
from functorch_lite import _install
from functorch_lite.compile import aot_function, aot_module, nop

BACKENDS = ["eager", "aot_eager"]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    assert fl.level_depth() == 0
    torch._dynamo.reset()


def compiled(step, backend="aot_eager", **options):
    """The compiled step, and what counts its graphs."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(step, fullgraph=True, backend=counter, **options), counter


def check_one_graph(step, *args, backend="aot_eager", expected=None):
    """The step compiles to one graph, which gives the numbers of the step, or the expected ones."""
    function, counter = compiled(step, backend)
    torch.manual_seed(1)
    want = step(*args) if expected is None else expected
    for _ in range(2):
        torch.manual_seed(1)
        assert_close(function(*args), want)
    assert counter.frame_count == 1
    return function


def sum_of_squares(tree):
    return sum(leaf.square().sum() for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def check_gradients(step, parameters, *args, backend="aot_eager", expected=None):
    """So do the gradients of the result with respect to what the step captures."""
    got = check_one_graph(step, *args, backend=backend)(*args)
    want = (step if expected is None else expected)(*args)
    gradients = [torch.autograd.grad(sum_of_squares(y), parameters, allow_unused=True) for y in (got, want)]
    assert_close(*gradients)


# Every transform, against plain autograd.


@functools.cache
def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, generator=generator), torch.randn(3, generator=generator)


W = inputs()[1].clone().requires_grad_()


def energy(x):
    return (x.sin() * W).sum()


def field(x):
    return x.sin() * W


# The same in plain PyTorch: energy has the diagonal Hessian -sin(x) w.
def gradient(x):
    return x.cos() * W


def hessian_times(x, v):
    return -x.sin() * W * v


def field_jacobian(x):
    return torch.einsum("ij,ik,jl,j->ijkl", x.cos(), torch.eye(4), torch.eye(3), W)


def energy_hessian(x):
    return torch.einsum("ij,ik,jl,j->ijkl", -x.sin(), torch.eye(4), torch.eye(3), W)


TRANSFORMS = {
    "grad": (lambda x: fl.grad(energy)(x), gradient),
    "grad_and_value": (lambda x: fl.grad_and_value(energy)(x), lambda x: (gradient(x), energy(x))),
    "value_and_grad": (lambda x: fl.value_and_grad(energy)(x), lambda x: (energy(x), gradient(x))),
    "vmap": (lambda x: fl.vmap(energy)(x), lambda x: torch.stack([energy(row) for row in x])),
    "vmap of grad": (lambda x: fl.vmap(fl.grad(energy))(x), gradient),
    "grad of vmap": (lambda x: fl.grad(lambda x: fl.vmap(energy)(x).sum())(x), gradient),
    "vjp": (lambda x: fl.vjp(field, x)[1](2 * x), lambda x: (gradient(x) * 2 * x,)),
    "vmap of vjp_fn": (lambda x: fl.vmap(fl.vjp(field, x)[1])(x.expand(2, 4, 3))[0][1], lambda x: gradient(x) * x),
    "jvp": (lambda x: fl.jvp(field, (x,), (x,)), lambda x: (field(x), gradient(x) * x)),
    "jvp strict": (lambda x: fl.jvp(field, (x,), (x,), strict=True), lambda x: (field(x), gradient(x) * x)),
    "jvp of a constant": (lambda x: fl.jvp(lambda x: 2 * W, (x,), (x,)), lambda x: (2 * W, torch.zeros(3))),
    "jacrev": (lambda x: fl.jacrev(field)(x), field_jacobian),
    "jacrev in chunks": (lambda x: fl.jacrev(field, chunk_size=5)(x), field_jacobian),
    "jacfwd": (lambda x: fl.jacfwd(field)(x), field_jacobian),
    "jacobian": (lambda x: fl.jacobian(field)(x), field_jacobian),
    "jacobian by columns": (
        lambda x: fl.jacobian(lambda s: field(x) * s)(x.sum()),
        lambda x: field(x),
    ),
    "value_and_jacobian": (lambda x: fl.value_and_jacobian(field)(x), lambda x: (field(x), field_jacobian(x))),
    "hessian": (lambda x: fl.hessian(energy)(x), energy_hessian),
    "jacfwd of jacrev": (lambda x: fl.jacfwd(fl.jacrev(energy))(x), energy_hessian),
    "jacrev of grad": (lambda x: fl.jacrev(fl.grad(energy))(x), energy_hessian),
    "hvp": (lambda x: fl.hvp(energy, (x,), (2 * x,)), lambda x: (energy(x), (hessian_times(x, 2 * x),))),
    "vhp": (lambda x: fl.vhp(energy, (x,), (2 * x,)), lambda x: (energy(x), (hessian_times(x, 2 * x),))),
    "gnvp": (
        lambda x: fl.gnvp(field, lambda y: (y**2).sum(), (x,), (x,)),
        lambda x: ((field(x) ** 2).sum(), (2 * gradient(x) ** 2 * x,)),
    ),
    "linearize": (
        lambda x: (lambda out, push: (out, push(x), push(2 * x)))(*fl.linearize(field, x)),
        lambda x: (field(x), gradient(x) * x, gradient(x) * 2 * x),
    ),
    "linear_transpose": (
        lambda x: fl.linear_transpose(lambda x: x.cumsum(0) * W, torch.zeros(4, 3))(x),
        lambda x: ((x * W).flip(0).cumsum(0).flip(0),),
    ),
    "functionalize": (lambda x: fl.functionalize(lambda x: x.clone().mul_(W))(x), lambda x: x * W),
    "functionalize of vmap": (lambda x: fl.functionalize(fl.vmap(lambda x: x.clone().mul_(W)))(x), lambda x: x * W),
    "third derivative": (
        lambda x: fl.vmap(fl.vmap(fl.grad(fl.grad(fl.grad(lambda x: x**4 * W[0])))))(x),
        lambda x: 24 * x * W[0],
    ),
    "vmap in chunks": (lambda x: fl.vmap(fl.grad(energy), chunk_size=3)(x), gradient),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transform(name, backend):
    step, plain = TRANSFORMS[name]
    x, _ = inputs()
    check_one_graph(step, x, backend=backend, expected=plain(x))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_gradient_of_a_captured_parameter(name):
    step, plain = TRANSFORMS[name]
    check_gradients(step, [W], inputs()[0], expected=plain)


@pytest.mark.parametrize("name", ["vmap of grad", "hessian", "jvp", "linearize", "vmap in chunks"])
def test_inductor(name):
    step, plain = TRANSFORMS[name]
    check_gradients(step, [W], inputs()[0], backend="inductor", expected=plain)


def test_second_gradient_of_a_captured_parameter():
    x, _ = inputs()
    step, _ = compiled(lambda x: fl.grad(lambda x: (x * W).sin().sum())(x))
    (first,) = torch.autograd.grad(step(x).sum(), W, create_graph=False)
    v = x * W
    (want,) = torch.autograd.grad((v.cos() * W).sum(), W)
    assert_close(first, want)


def test_transform_is_the_compiled_function():
    x, _ = inputs()
    check_one_graph(fl.vmap(fl.grad(energy)), x, expected=gradient(x))


def test_transform_that_was_made_outside():
    x, _ = inputs()
    per_row = fl.vmap(fl.grad(energy))

    @fl.vmap
    def doubled(row):
        return 2 * row

    check_one_graph(lambda x: per_row(x) + doubled(x), x, expected=gradient(x) + 2 * x)


# Kinds of steps.


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@dataclass
class Record:
    first: torch.Tensor
    second: torch.Tensor


pytree.register_dataclass(Record)


class Scaled:
    def __init__(self):
        self.scale = W

    def __call__(self, x):
        return (x * self.scale).sum()

    def loss(self, x):
        return self(x) ** 2


class Forces(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))

    def energy(self, x):
        return self.net(x).sum()

    def forward(self, x):
        return fl.grad(self.energy)(x) + fl.vmap(fl.grad(self.energy))(x)


def append_inside(x):
    seen = []

    def loss(y):
        seen.append((2 * y).sum())
        return energy(y)

    return fl.grad(loss)(x), seen


def swallow(x):
    def loss(y):
        try:
            raise KeyError("inside")
        except KeyError:
            return energy(y)

    with contextlib.suppress(ZeroDivisionError):
        fl.grad(lambda y: 1 // 0)(x)
    return fl.grad(loss)(x)


def no_grad_around(x):
    with torch.no_grad():
        return fl.grad(lambda y: energy(y) if torch.is_grad_enabled() else y.sum())(x)


def no_grad_inside(x):
    def loss(y):
        with torch.no_grad():
            z = y.exp()
        return (z * y * W).sum()

    return fl.grad(loss)(x)


def autocast_around(x):
    with torch.autocast("cpu", torch.bfloat16):
        return fl.vmap(fl.grad(lambda y: (W.detach() @ y[:, None]).float().sum()))(x)


def autocast_inside(x):
    def loss(y):
        with torch.autocast("cpu", torch.bfloat16):
            return (W.detach() @ y[:, None]).float().sum()

    return fl.vmap(fl.grad(loss))(x)


def write_captured(x):
    total = torch.zeros(3)

    def loss(y):
        total.add_(y.detach().sum(0))
        return energy(y)

    return fl.grad(loss)(x), total


def set_item(x):
    def loss(y):
        z = torch.zeros(4, 3)
        z[0] = y[0] * 2
        return z.sum()

    return fl.grad(loss)(x)


STEPS = {
    "dictionary": lambda x: fl.grad(lambda p: (p["a"] * p["b"][0] * W).sum())({"a": x, "b": [x]}),
    "named tuple": lambda x: fl.grad(lambda p: (p.first * p.second * W).sum())(Pair(x, 2 * x)),
    "dataclass": lambda x: pytree.tree_leaves(fl.grad(lambda p: (p.first * p.second).sum())(Record(x, 2 * x))),
    "argnums": lambda x: fl.grad(lambda a, b, c: (a * b * c).sum(), argnums=(0, -1))(x, x, W),
    "aux": lambda x: fl.grad_and_value(lambda x: (energy(x), {"twice": 2 * x, "n": 3}), has_aux=True)(x),
    "aux of jacobians": lambda x: fl.jacrev(lambda x: (field(x), x.sum()), has_aux=True)(x)[1],
    "aux of jacfwd": lambda x: fl.jacfwd(lambda x: (field(x), x.sum()), has_aux=True)(x)[1],
    "keywords": lambda x: fl.grad(lambda x, scale=1.0, *, power: (x**power * scale * W).sum())(x, scale=2.0, power=3),
    "numbers": lambda x: fl.grad(lambda x, k, s: (x * k).sum() if s == "a" else x.sum())(x, 3, "a"),
    "in_dims": lambda x: fl.vmap(lambda p, q: p["a"] * q, in_dims=({"a": 1}, None), out_dims=-1)({"a": x}, x[:, 0]),
    "nested in_dims": lambda x: fl.vmap(lambda p: p[0] * p[1][0], in_dims=((0, [None]),))((x, [x[0]])),
    "other outputs": lambda x: fl.vmap(lambda y: (y, W.sum(), None, 3), out_dims=(1, None, 0, None))(x),
    "outer product": lambda x: fl.vmap(fl.vmap(torch.dot, (0, None)), (None, 0))(x, x),
    "callable object": lambda x: fl.vmap(fl.grad(Scaled()))(x),
    "bound method": lambda x: fl.vmap(fl.grad(Scaled().loss))(x),
    "partial": lambda x: functools.partial(fl.grad(lambda a, b: (a * b * W).sum()), x)(2 * x),
    "complex": lambda x: fl.jacrev(lambda z: torch.complex(z, 2 * z) ** 2)(x),
    "python state": append_inside,
    "exceptions": swallow,
    "no_grad around": no_grad_around,
    "no_grad inside": no_grad_inside,
    "autocast around": autocast_around,
    "autocast inside": autocast_inside,
    "write into a captured tensor": write_captured,
    "write into an argument": lambda x: fl.vmap(lambda y: y.mul_(2))(x.clone()),
    "write into zeros": set_item,
    "level_depth": lambda x: fl.vmap(fl.grad(lambda y: (y * fl.level_depth()).sum()))(x) + fl.level_depth(),
    "other numbers for each": lambda x: fl.vmap(lambda y: y + torch.randn(3), randomness="different")(x),
    "the same numbers": lambda x: fl.vmap(lambda y: y + torch.randn(3), randomness="same")(x),
    "dropout": lambda x: fl.vmap(fl.grad(lambda y: nn.functional.dropout(y, 0.5).sum()), randomness="different")(x),
    "attention": lambda x: fl.vmap(
        fl.grad(lambda q: nn.functional.scaled_dot_product_attention(q, q, q).square().sum())
    )(x.view(2, 1, 2, 3)),
    "no examples": lambda x: fl.vmap(torch.sin)(x[:0]),
    "copies of views": lambda x: (
        fl.functionalize(lambda y: y.view(-1), remove="mutations_and_views")(x).mul_(0) + x.view(-1)
    ),
    "cond": lambda x: torch.cond(x.sum() > 0, lambda x: fl.grad(energy)(x), lambda x: x.clone(), (x,)),
    "aot_function": lambda x: COMPILED(x),
    "vmap of aot_function": lambda x: fl.vmap(COMPILED)(x),
    "aot_module": lambda x: fl.vmap(COMPILED_MODULE)(x),
    "jit": lambda x: fl.vmap(JITTED)(x),
    "vmap of a compiled function": lambda x: fl.vmap(torch.compile(lambda y: y * y))(x),
}  # fmt: skip
COMPILED = aot_function(field, nop)
JITTED = fl.jit(field)
COMPILED_MODULE = aot_module(nn.Linear(3, 2), nop)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", STEPS)
def test_step(name, backend):
    check_one_graph(STEPS[name], inputs()[0], backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_mode_around_the_compiled_function(mode, backend):
    x, _ = inputs()
    with mode():
        check_one_graph(lambda x: fl.jvp(field, (x,), (x,)), x, backend=backend, expected=(field(x), gradient(x) * x))
        check_one_graph(lambda x: fl.grad(energy)(x), x, backend=backend, expected=gradient(x))


# Modules.


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def functional_step(net):
    def loss(params, x):
        return fl.functional_call(net, params, (x,)).square().sum()

    return lambda x: fl.vmap(fl.grad(loss), in_dims=(None, 0))(dict(net.named_parameters()), x)


MODULE_STEPS = {
    "called": lambda net: lambda x: fl.vmap(fl.grad(lambda y: net(y).sum()))(x),
    "hessian": lambda net: lambda x: fl.vmap(fl.hessian(lambda y: net(y).sum()))(x),
    "functional_call": functional_step,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODULE_STEPS)
def test_module(name, backend):
    net = network()
    check_gradients(MODULE_STEPS[name](net), list(net.parameters()), inputs()[0], backend=backend)


def test_per_example_gradients_are_those_of_a_loop():
    net = network()
    x, _ = inputs()
    rows = [torch.autograd.grad(net(row).square().sum(), net.parameters()) for row in x]
    expected = {name: torch.stack(each) for (name, _), each in zip(net.named_parameters(), zip(*rows), strict=True)}  # noqa: B905
    check_one_graph(functional_step(net), x, expected=expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms_in_forward(backend):
    net = Forces()
    x = inputs()[0]

    def plain(x):
        y = x.clone().requires_grad_()
        return 2 * torch.autograd.grad(net.energy(y), y, create_graph=True)[0]

    check_gradients(net, list(net.parameters()), x, backend=backend, expected=plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ensemble(backend):
    models = [nn.Linear(3, 2) for _ in range(3)]
    params, buffers = fl.stack_module_state(models)
    step = lambda x: fl.vmap(lambda p, x: fl.functional_call(models[0], (p, buffers), x), (0, None))(params, x)
    x, _ = inputs()
    check_one_graph(step, x, backend=backend, expected=torch.stack([model(x) for model in models]))
    check_gradients(step, list(params.values()), x, backend=backend)


def test_training():
    """Three steps of an optimizer, with one graph."""
    x, _ = inputs()
    trained, other = network(), network()

    def losses(net):
        def loss(x):
            y = fl.vmap(fl.grad(lambda row: net(row).sum()))(x)
            return y.square().sum() + fl.vmap(net)(x).sum()

        return loss

    def plain(x):
        y = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(other(y).sum(), y, create_graph=True)
        return g.square().sum() + other(x).sum()

    step, counter = compiled(losses(trained))
    for net, loss in ((trained, step), (other, plain)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss(x).backward()
            optimizer.step()
    assert counter.frame_count == 1
    assert_close(trained.state_dict(), other.state_dict())


@pytest.mark.parametrize("backend", BACKENDS)
def test_buffers_that_are_written_inside(backend):
    norm = nn.BatchNorm1d(3)
    other = copy.deepcopy(norm)
    x = inputs()[0].clone().requires_grad_()
    step, _ = compiled(lambda x: fl.grad(lambda x: norm(x).pow(3).sum())(x), backend)
    (expected,) = torch.autograd.grad(other(x).pow(3).sum(), x)
    assert_close(step(x.detach()), expected)
    assert_close(norm.state_dict(), other.state_dict())
    assert norm.num_batches_tracked == 1


def test_buffers_that_are_given():
    norm = nn.BatchNorm1d(3)
    other = copy.deepcopy(norm)

    def step(x):
        buffers = {name: buffer.clone() for name, buffer in norm.named_buffers()}
        loss = lambda p: fl.functional_call(norm, (p, buffers), x).pow(3).sum()
        return fl.grad(loss)(dict(norm.named_parameters())), buffers

    x, _ = inputs()
    _, buffers = check_one_graph(step, x)(x)
    other(x)
    assert_close(buffers, dict(other.named_buffers()))
    assert norm.num_batches_tracked == 0


# Functions with derivatives of their own.


class Square(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return 20 * g * ctx.saved_tensors[0]


class OldSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 20 * g * ctx.saved_tensors[0]


@fl.custom_vjp
def scaled_sin(x, k):
    return x.sin() * k


scaled_sin.defvjp(lambda x, k: (scaled_sin(x, k), (x, k)), lambda saved, g: (7 * g * saved[0].cos() * saved[1], None))


@fl.custom_jvp
def other_sin(x):
    return x.sin()


other_sin.defjvp(lambda primals, tangents: (other_sin(*primals), 7 * tangents[0] * primals[0].cos()))

CUSTOM = {
    "Function": (lambda x: fl.grad(lambda y: Square.apply(y).sum())(x), lambda x: 20 * x),
    "Function, old style": (lambda x: fl.grad(lambda y: OldSquare.apply(y).sum())(x), lambda x: 20 * x),
    "Function under vmap": (lambda x: fl.vmap(fl.grad(lambda y: Square.apply(y).sum()))(x), lambda x: 20 * x),
    "its apply": (lambda x: fl.vmap(Square.apply)(x), lambda x: x * x),
    "custom_vjp": (lambda x: fl.grad(lambda y: scaled_sin(y, 2.0).sum())(x), lambda x: 14 * x.cos()),
    "custom_vjp under vmap": (
        lambda x: fl.vmap(fl.grad(lambda y: scaled_sin(y, k=2.0).sum()))(x),
        lambda x: 14 * x.cos(),
    ),
    "custom_vjp alone": (lambda x: scaled_sin(x, 2.0), lambda x: 2 * x.sin()),
    "custom_jvp": (lambda x: fl.jvp(other_sin, (x,), (x,)), lambda x: (x.sin(), 7 * x.cos() * x)),
    "custom_jvp in reverse": (lambda x: fl.grad(lambda y: other_sin(y).sum())(x), lambda x: 7 * x.cos()),
    "checkpoint inside": (
        lambda x: fl.grad(lambda y: checkpoint(field, y, use_reentrant=False).sum())(x),
        lambda x: x.cos() * W,
    ),
    "checkpoint around": (lambda x: checkpoint(fl.grad(energy), x, use_reentrant=False), lambda x: x.cos() * W),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CUSTOM)
def test_custom_derivative(name, backend):
    step, plain = CUSTOM[name]
    x, _ = inputs()
    check_one_graph(step, x, backend=backend, expected=plain(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_custom_derivative_of_what_is_differentiated_outside(backend):
    x = inputs()[0].clone().requires_grad_()
    for step in (lambda x: scaled_sin(x, 2.0), lambda x: fl.vmap(lambda y: scaled_sin(y, 2.0))(x)):
        (got,) = torch.autograd.grad(compiled(step, backend)[0](x).sum(), x)
        assert_close(got, 14 * x.detach().cos())
    (got,) = torch.autograd.grad(compiled(lambda x: fl.vmap(Square.apply)(x), backend)[0](x).sum(), x)
    assert_close(got, 20 * x.detach())


def test_custom_derivative_rule_is_guarded():
    x, _ = inputs()
    functions = []
    for factor in (2, 3):
        f = fl.custom_vjp(torch.sin)
        f.defvjp(lambda x, f=f: (f(x), x), lambda x, g, factor=factor: (factor * g,))
        functions.append(f)
    holder = {"f": functions[0]}
    step, counter = compiled(lambda x: fl.grad(lambda x: holder["f"](x).sum())(x))
    assert_close(step(x), torch.full_like(x, 2))
    holder["f"] = functions[1]
    assert_close(step(x), torch.full_like(x, 3))
    assert counter.frame_count == 2


# Guards.


def test_captured_values_that_change():
    x, _ = inputs()
    layer = nn.Linear(3, 3)
    state = {"scale": 2.0}
    step, counter = compiled(lambda x: fl.grad(lambda x: (layer(x) * state["scale"]).sum())(x))
    expected = lambda: state["scale"] * layer.weight.sum(0).expand(4, 3)
    assert_close(step(x), expected())
    with torch.no_grad():
        layer.weight.mul_(3)
    assert_close(step(x), expected())
    layer.weight = nn.Parameter(torch.randn(3, 3))
    assert_close(step(x), expected())
    assert counter.frame_count == 1
    state["scale"] = 3.0
    assert_close(step(x), expected())
    assert counter.frame_count == 2


def test_arguments_that_change():
    x, _ = inputs()
    step, counter = compiled(lambda x, dim, name: fl.vmap(lambda y: y.sum() if name == "sum" else y.prod(), dim)(x))
    for dim, name in ((0, "sum"), (1, "sum"), (0, "prod"), (-1, "sum"), (0, "sum")):
        assert_close(step(x, dim, name), x.sum(1 - dim % 2) if name == "sum" else x.prod(1 - dim % 2))
    assert counter.frame_count > 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dynamic", "graphs"), [(True, 1), (None, 2), (False, 4)])
def test_other_shapes(dynamic, graphs, backend):
    def step(x):
        return (
            fl.vmap(fl.grad(lambda y: (y.sin() * y).sum()))(x),
            fl.jacrev(torch.sin)(x[0]),
            fl.hessian(energy_3)(x[0]),
        )

    energy_3 = lambda x: (x**3).sum()
    function, counter = compiled(step, backend, dynamic=dynamic)
    for n in (3, 4, 5, 8):
        x = torch.randn(n, n + 2)
        expected = (x.sin() + x * x.cos(), x[0].cos().diag(), (6 * x[0]).diag())
        assert_close(function(x), expected)
    assert counter.frame_count == graphs


def test_other_steps_do_not_share_a_cached_graph():
    x, _ = inputs()
    for f, derivative in ((torch.sin, torch.cos), (torch.cos, lambda x: -x.sin()), (torch.exp, torch.exp)):
        torch._dynamo.reset()
        step = torch.compile(lambda x, f=f: fl.vmap(fl.grad(lambda y: f(y).sum()))(x), fullgraph=True)
        assert_close(step(x), derivative(x))


# Compiled functions and graph breaks around and inside transforms.


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("backend", [*BACKENDS, "inductor"])
def test_compiled_function_inside_a_transform(backend, fullgraph):
    x, _ = inputs()
    f = torch.compile(field, backend=backend, fullgraph=fullgraph)
    module = nn.Linear(3, 3)
    compiled_module = torch.compile(module, backend=backend, fullgraph=fullgraph)
    for _ in range(2):  # before and after it is compiled
        assert_close(fl.vmap(f)(x), field(x))
        assert_close(fl.vmap(fl.grad(lambda y: f(y).sum()))(x), gradient(x))
        assert_close(fl.vmap(compiled_module)(x), module(x))
        assert_close(f(x), field(x))


def test_transform_of_a_compiled_function_that_has_transforms():
    x, _ = inputs()
    inner = torch.compile(fl.grad(energy), backend="aot_eager")
    check_one_graph(lambda x: fl.vmap(inner)(x), x, expected=gradient(x))
    assert_close(fl.vmap(inner)(x), gradient(x))


def break_inside(y):
    y = y.sin()
    torch._dynamo.graph_break()
    return (y * W).sum()


def print_inside(y):
    print("", end="")
    return energy(y)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("f", [break_inside, print_inside])
def test_graph_break_inside(f, backend):
    x, _ = inputs()
    counter = CompileCounterWithBackend(backend)
    made_outside = fl.vmap(fl.grad(f))
    step = torch.compile(lambda x: fl.vmap(fl.grad(f))(2 * x) + made_outside(2 * x) + 1, backend=counter)
    for _ in range(2):
        assert_close(step(x), 2 * gradient(2 * x) + 1)
        assert_close(torch.compile(made_outside, backend=counter)(x), gradient(x))
    for transform in (fl.jvp, fl.vjp):
        args = ((x,), (x,)) if transform is fl.jvp else (x,)
        assert_close(torch.compile(lambda args: transform(f, *args)[0] + 1, backend=counter)(args), energy(x) + 1)  # noqa: B023
    assert_close(torch.compile(lambda x: fl.functionalize(f)(x) + 1, backend=counter)(x), energy(x) + 1)
    assert counter.frame_count > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_graph_break_around(backend):
    x, _ = inputs()
    counter = CompileCounterWithBackend(backend)

    @functools.partial(torch.compile, backend=counter)
    def step(x):
        y = fl.vmap(fl.grad(energy))(x)
        torch._dynamo.graph_break()
        return y + fl.grad(energy)(x)

    assert_close(step(x), 2 * gradient(x))
    assert counter.frame_count == 2


# Errors.


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("outside", [True, False])
def test_error_in_the_users_function(outside, fullgraph):
    def broken(x):
        raise ValueError("the user's message")

    transformed = fl.vmap(fl.grad(broken))
    step = transformed if outside else lambda x: fl.vmap(fl.grad(broken))(x)
    error = torch._dynamo.exc.Unsupported if fullgraph else ValueError
    with pytest.raises(error, match="the user's message"):
        torch.compile(step, backend="eager", fullgraph=fullgraph)(inputs()[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_error_at_run_time_closes_the_levels(backend):
    x, _ = inputs()
    step, counter = compiled(lambda x, i: fl.vmap(fl.grad(lambda y: y[i].square().sum()))(x), backend)
    good, bad = torch.tensor([0, 1]), torch.tensor([0, 7])
    first = step(x, good)
    with pytest.raises(IndexError) as caught:
        step(x, bad)
    assert fl.level_depth() == 0
    assert caught.value.__traceback__ is not None  # it refers to the frames of the graph
    assert_close(step(x, good), first)
    assert counter.frame_count == 1


REFUSED = {
    "randomness": (lambda x: fl.vmap(lambda y: y + torch.rand(3))(x), r"vmap: .*random operator.*randomness='error'"),
    "out_dims": (lambda x: fl.vmap(energy, out_dims=4)(x), r"out_dims=4 is out of range for output"),
    "out_dims None": (
        lambda x: fl.vmap(lambda y: {"a": y}, out_dims=None)(x),
        r"output\['a'\] has out_dims=None but differs between examples",
    ),
    "no tensor": (lambda x: fl.vmap(lambda y: "text")(x), "the function must return tensors, got str"),
    "in_dims": (lambda x: fl.vmap(energy, in_dims=5)(x), "in_dim 5"),
    "strict": (lambda x: fl.jvp(lambda y: W, (x,), (x,), strict=True), "does not depend on the primals"),
    "not a scalar": (lambda x: fl.grad(torch.sin)(x), "grad"),
    "not a function": (lambda x: fl.grad(3)(x), "grad"),
    "no derivative": (
        lambda x: fl.grad(lambda y: torch.ops.aten._standard_gamma_grad(y.abs(), y.abs()).sum())(x),
        "grad: .*_standard_gamma_grad",
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", REFUSED)
def test_error_of_a_transform(name, backend):
    step, message = REFUSED[name]
    x, _ = inputs()
    with pytest.raises(Exception, match=message):  # noqa: B017
        step(x)
    with pytest.raises(Exception, match=message):  # noqa: B017
        compiled(step, backend)[0](x)
    assert fl.level_depth() == 0


def keep_inside(x):
    seen = []
    fl.vmap(lambda y: (seen.append(2 * y), y)[1])(x)
    return seen


def make_custom(x):
    f = fl.custom_vjp(torch.sin)
    f.defvjp(lambda x: (f(x), x), lambda x, g: (g,))
    return f(x)


TABLE = torch.arange(3.0)
capturing = fl.custom_vjp(lambda x: x * TABLE)
capturing.defvjp(lambda x: (capturing(x), None), lambda _, g: (g * TABLE,))

# What compiled functions cannot do, with the message in docs/torch_compile.md.
LIMITS = {
    "vjp_fn leaves": (lambda x: fl.vjp(torch.sin, x), "the function that they return cannot be passed"),
    "jvp_fn leaves": (lambda x: fl.linearize(torch.sin, x), "the function that they return cannot be passed"),
    "chunks": (
        lambda x: fl.vmap(lambda y: y + torch.rand(3), randomness="different", chunk_size=2)(x),
        "vmap: got chunk_size and a randomness other than 'error'",
    ),
    "auto": (lambda x: fl.jacrev(field, chunk_size="auto")(x), "chunk_size='auto' measures memory"),
    "stack": (lambda x: fl.stack_module_state([nn.Linear(3, 3)])[0]["weight"] + x[0], "Call it outside torch.compile"),
    "stack captured": (lambda x: fl.stack_module_state(LAYERS)[0]["weight"] @ x[0], "stack_module_state: "),
    "custom": (make_custom, "was made inside the compiled function"),
    "escape": (keep_inside, "made inside vmap is used after that vmap has returned"),
}
LAYERS = [nn.Linear(3, 3), nn.Linear(3, 3)]


@pytest.mark.parametrize("name", LIMITS)
def test_limit(name):
    step, message = LIMITS[name]
    with pytest.raises(Exception, match=message):  # noqa: B017
        compiled(step)[0](inputs()[0])
    assert fl.level_depth() == 0


@pytest.mark.parametrize("name", ["vjp_fn leaves", "jvp_fn leaves", "chunks", "auto", "stack captured", "custom"])
def test_limit_with_graph_breaks(name):
    """Without fullgraph, what cannot be compiled runs as it is."""
    x, _ = inputs()
    step, _ = LIMITS[name]
    function = torch.compile(step, backend="aot_eager")
    torch.manual_seed(1)
    got = function(x)
    torch.manual_seed(1)
    want = step(x)
    tensors = lambda result: [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    assert_close(tensors(got), tensors(want))
    if name.endswith("leaves"):
        assert_close(got[1](x), want[1](x))


def test_limit_of_a_function_from_outside():
    x, _ = inputs()
    _, vjp_fn = fl.vjp(torch.sin, x)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="the function that they return cannot be passed"):
        torch.compile(lambda v: vjp_fn(v)[0], backend="eager", fullgraph=True)(x)
    assert_close(torch.compile(lambda v: vjp_fn(v)[0] + 1, backend="eager")(x), x.cos() * x + 1)


def test_limit_of_a_rule_that_captures():
    x, _ = inputs()
    step = lambda x: fl.grad(lambda x: capturing(x).sum())(x)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="uses a tensor that is no argument"):
        compiled(step)[0](x)
    assert_close(torch.compile(step, backend="aot_eager")(x), TABLE.expand(4, 3))


def test_error_in_a_branch_closes_the_levels():
    def branch(x):
        return fl.vmap(lambda y: y + torch.rand(3))(x)

    with pytest.raises(Exception, match="random"):  # noqa: B017
        compiled(lambda x: torch.cond(x.sum() > 0, branch, lambda x: x.clone(), (x,)))[0](inputs()[0])
    assert fl.level_depth() == 0


# Import.


def run_python(script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("first", ["torch._dynamo, functorch_lite", "functorch_lite, torch._dynamo", "functorch_lite"])
def test_order_of_imports(first):
    run_python(
        f"import torch, {first}\n"
        "x = torch.ones(3, 2)\n"
        "from functorch_lite import grad, vmap\n"
        "f = lambda x: vmap(grad(lambda y: (y * y).sum()))(x)\n"
        "assert torch.compile(f, backend='eager', fullgraph=True)(x).equal(2 * x)\n"
    )


def test_dynamo_is_imported_by_those_who_need_it():
    run_python("import sys, functorch_lite\nassert 'functorch_lite._dynamo' not in sys.modules\n")


def test_a_torch_that_has_another_dynamo(monkeypatch):
    monkeypatch.setitem(sys.modules, "functorch_lite._dynamo", None)
    with pytest.warns(UserWarning, match=r"torch\.compile does not understand the transforms"):
        _install.import_after("torch._dynamo", "functorch_lite._dynamo")


def test_nothing_is_cached_under_a_wrong_key():
    counters.clear()
    test_other_steps_do_not_share_a_cached_graph()
    assert counters["aot_autograd"]["autograd_cache_hit"] == 0
