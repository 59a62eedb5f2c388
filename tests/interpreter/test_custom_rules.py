"""Custom operators under transforms: looped, with rules from Python, and with rules recorded by torch.library."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor
from torch.library import custom_op

from functorch_lite import LoopFallbackWarning, grad, hessian, jacrev, jvp, level_depth, make_fx, vmap
from functorch_lite.extend import VmapInfo, register_batching_rule, register_decomposition, remove_rule

DOUBLE = torch.float64


# Elsewhere a loop is an error.
loops = pytest.mark.filterwarnings("ignore::functorch_lite.LoopFallbackWarning")


@pytest.fixture(autouse=True)
def no_level_stays_open():
    yield
    assert level_depth() == 0


def rand(*shape):
    return torch.rand(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(len(shape))) + 0.1


def loop(f, *args, in_dims):
    """The oracle: one call for each example."""
    size = next(a.shape[d] for a, d in zip(args, in_dims, strict=True) if d is not None)
    examples = [
        f(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True))) for i in range(size)
    ]
    return torch.stack(examples)


# Operators. They compute with numpy, so that no transform could run through their code.


@custom_op("fl_test::outer", mutates_args=())
def outer(x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
    return torch.from_numpy(x.numpy()[:, None] * y.numpy()) * scale


def outer_rule(info, in_dims, x, y, scale=1.0):
    x, y = (
        z.expand(info.batch_size, *z.shape) if dim is None else z.movedim(dim, 0)
        for z, dim in zip((x, y), in_dims[:2], strict=True)
    )
    return (x[:, :, None] * y[:, None, :] * scale).movedim(0, 1), 1


@custom_op("fl_test::sine", mutates_args=())
def sine(x: Tensor) -> Tensor:
    return torch.from_numpy(x.numpy()).sin()


@sine.register_fake
def _(x):
    return torch.empty_like(x)


sine.register_autograd(
    lambda ctx, g: g * ctx.saved_tensors[0].cos(),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


@custom_op("fl_test::split", mutates_args=())
def split(xs: list[Tensor], y: Tensor | None, *, sign: int = 1) -> tuple[Tensor, list[Tensor]]:
    total = sum(xs) if y is None else sum(xs) + y
    return total.clone(), [sign * x for x in xs]


@custom_op("fl_test::accumulate", mutates_args={"target", "history"})
def accumulate(target: Tensor, x: Tensor, history: list[Tensor]) -> None:
    target += x
    for entry in history:
        entry.copy_(x)


@custom_op("fl_test::count", mutates_args=())
def count(x: Tensor) -> int:
    return x.numel()


RULES = torch.library.Library("fl_test", "FRAGMENT")
RULES.define("square_(Tensor(a!) x, *, float power=2.0) -> Tensor(a!)")
RULES.impl("square_", lambda x, *, power=2.0: x.copy_(x**power), "CPU")
RULES.define("plus(Tensor x, *, Tensor? y=None) -> Tensor")
RULES.impl("plus", lambda x, *, y=None: x + (0 if y is None else y), "CPU")
RULES.define("noise(Tensor x) -> Tensor", tags=torch.Tag.nondeterministic_seeded)
RULES.impl("noise", lambda x: x + torch.rand(x.shape), "CPU")
RULES.define("pair(Tensor x) -> (Tensor, Tensor)")
RULES.impl("pair", lambda x: (x + 1, x + 2), "CPU")
RULES.define("composed(Tensor x) -> Tensor")
RULES.impl("composed", lambda x: x.sin().cos(), "CompositeImplicitAutograd")


@pytest.fixture
def rule():
    """Registers rules that are gone after the test."""
    ops = set()

    def register(op, function, how=register_batching_rule):
        assert how(op)(function) is function
        ops.add(op)

    yield register
    for op in ops:
        remove_rule(op)


def outer_arguments(in_dims):
    return [rand(3, 3)[i] if dim is None else rand(3, 3) + i for i, dim in enumerate(in_dims)]


# Without a rule: a loop.


def test_loop_warns():
    with pytest.warns(LoopFallbackWarning, match=r"fl_test::outer has no batching rule.*docs/batching_rules.md"):
        vmap(outer)(rand(3, 2), rand(3, 4))


@loops
@pytest.mark.parametrize("in_dims", [(0, 0), (1, None), (None, 1), (1, 0)])
def test_loop_of_one_output(in_dims):
    x, y = outer_arguments(in_dims)
    torch.testing.assert_close(vmap(outer, in_dims)(x, y), loop(outer, x, y, in_dims=in_dims))


@loops
def test_loop_of_lists_optional_and_keyword_arguments():
    xs, y = [rand(3, 2), rand(2)], rand(2, 3)
    total, parts = vmap(lambda x, y: split([x, xs[1]], y, sign=-1), in_dims=(0, 1))(xs[0], y)
    torch.testing.assert_close(total, xs[0] + xs[1] + y.T)
    torch.testing.assert_close(parts[0], -xs[0])
    torch.testing.assert_close(parts[1], -xs[1].expand(3, 2))
    torch.testing.assert_close(vmap(lambda x: split([x], None)[0])(xs[0]), xs[0])


@loops
@pytest.mark.parametrize("in_dims", [(0, 0), (1, 0), (1, None)])
def test_loop_that_writes(in_dims):
    target, x, history = rand(3, 3), rand(3, 3) + 1, rand(3, 3) + 2
    shared = x[0] if in_dims[1] is None else x
    expected = (target.T if in_dims[0] == 1 else target) + shared
    result = vmap(lambda t, x, h: accumulate(t, x, [h]), in_dims=(*in_dims, 0))(target, shared, history)
    assert result is None
    torch.testing.assert_close(target.T if in_dims[0] == 1 else target, expected)
    torch.testing.assert_close(history, shared.expand(3, 3).contiguous())

    def into_new(x):
        total = torch.ones(3, dtype=DOUBLE)
        accumulate(total, x, [])
        return total

    torch.testing.assert_close(vmap(into_new)(x), 1 + x)


@loops
def test_loop_over_an_empty_batch_and_in_two_levels():
    assert vmap(outer)(rand(0, 2), rand(0, 4)).shape == (0, 2, 4)
    assert vmap(sine)(rand(0, 2)).shape == (0, 2)
    x, y = rand(2, 3, 4), rand(3, 5)
    expected = torch.stack([loop(outer, x[i], y, in_dims=(0, 0)) for i in range(2)])
    torch.testing.assert_close(vmap(vmap(outer), in_dims=(0, None))(x, y), expected)


@loops
def test_result_that_is_no_tensor_needs_a_rule():
    with pytest.raises(NotImplementedError, match=r"vmap: fl_test::count.*Its result is not a tensor"):
        vmap(lambda x: x * count(x))(rand(3, 2))


@loops
@pytest.mark.parametrize("with_rule", [False, True])
def test_derivatives_of_a_custom_operator(with_rule, rule):
    if with_rule:
        rule(sine, lambda info, in_dims, x: (sine(x), in_dims[0]))
    x = rand(3, 2)
    total = lambda v: sine(v).sum()
    torch.testing.assert_close(vmap(grad(total))(x), x.cos())
    torch.testing.assert_close(grad(lambda x: vmap(sine)(x).sum())(x), x.cos())
    torch.testing.assert_close(vmap(hessian(total))(x), torch.diag_embed(-x.sin()))
    torch.testing.assert_close(jacrev(vmap(total))(x), torch.einsum("ij,ik->ikj", x.cos(), torch.eye(3).double()))
    torch.testing.assert_close(vmap(vmap(grad(sine)))(x), x.cos())
    leaf = x.clone().requires_grad_()
    vmap(vmap(sine), in_dims=1)(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, x.cos())


@loops
def test_derivatives_of_a_custom_operator_with_lists():
    @custom_op("fl_test::sines", mutates_args=())
    def sines(xs: list[Tensor]) -> list[Tensor]:
        return [x.sin() for x in xs]

    sines.register_autograd(
        lambda ctx, gs: [g * x.cos() for g, x in zip(gs, ctx.saved_tensors, strict=True)],
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[0]),
    )
    x = rand(3, 2)
    total = lambda v: sum(y.sum() for y in sines([v, 2 * v]))
    torch.testing.assert_close(vmap(grad(total))(x), x.cos() + 2 * (2 * x).cos())
    torch.testing.assert_close(grad(lambda x: vmap(total)(x).sum())(x), x.cos() + 2 * (2 * x).cos())


@loops
def test_triton_op():
    @torch.library.triton_op("fl_test::shifted", mutates_args={})
    def shifted(x: Tensor) -> Tensor:
        return x.sin() + 1

    shifted.register_autograd(
        lambda ctx, g: g * ctx.saved_tensors[0].cos(),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
    )
    x = rand(3, 2)
    torch.testing.assert_close(vmap(shifted)(x), x.sin() + 1)
    torch.testing.assert_close(vmap(grad(lambda v: shifted(v).sum()))(x), x.cos())
    torch.testing.assert_close(grad(lambda x: vmap(shifted)(x).sum())(x), x.cos())


# With a rule by functorch_lite.extend.


@pytest.mark.parametrize("in_dims", [(0, 0), (1, None), (None, 1), (1, 0)])
@pytest.mark.parametrize("op", ["fl_test::outer", torch.ops.fl_test.outer.default, torch.ops.fl_test.outer, outer])
def test_rule_of_a_custom_operator(op, in_dims, rule):
    rule(op, outer_rule)
    x, y = outer_arguments(in_dims)
    torch.testing.assert_close(vmap(outer, in_dims)(x, y), loop(outer, x, y, in_dims=in_dims))
    scaled = lambda x, y: outer(x, y, scale=3.0)
    torch.testing.assert_close(vmap(scaled, in_dims)(x, y), 3 * loop(outer, x, y, in_dims=in_dims))


def test_rule_in_two_levels_and_over_an_empty_batch(rule):
    rule(outer, outer_rule)
    x, y = rand(2, 3, 4), rand(3, 5)
    expected = torch.stack([loop(outer, x[i], y, in_dims=(0, 0)) for i in range(2)])
    torch.testing.assert_close(vmap(vmap(outer), in_dims=(0, None))(x, y), expected)
    moved = vmap(vmap(outer), in_dims=(2, None), out_dims=1)(x.permute(1, 2, 0), y)
    torch.testing.assert_close(moved, expected.movedim(0, 1))
    assert vmap(outer)(rand(0, 2), rand(0, 4)).shape == (0, 2, 4)


def test_what_a_rule_gets(rule):
    seen = []

    def split_rule(info, in_dims, xs, y, **options):
        seen.append((info, in_dims, options))
        total = sum(x if dim is None else x.movedim(dim, 0) for x, dim in zip(xs, in_dims[0], strict=True))
        return (total, [x + 1 for x in xs]), (0, in_dims[0])

    rule(split, split_rule)
    a, b = rand(3, 2), rand(2)
    total, parts = vmap(lambda a: split([a, b], None, sign=2), in_dims=1, randomness="same")(a.T)
    assert seen == [(VmapInfo(3, "same"), ([1, None], None), {"sign": 2})]
    assert seen[0][0].batch_size == 3
    torch.testing.assert_close(total, a + b)
    torch.testing.assert_close(parts[0], a + 1)
    torch.testing.assert_close(parts[1], (b + 1).expand(3, 2))


def test_rule_that_writes(rule):
    def accumulate_rule(info, in_dims, target, x, history):
        target.movedim(in_dims[0], 0).add_(x if in_dims[1] is None else x.movedim(in_dims[1], 0))
        return None, None

    rule(accumulate, accumulate_rule)
    target, x = rand(2, 3), rand(3, 2)
    expected = target.T + x
    assert vmap(lambda t, x: accumulate(t, x, []), in_dims=(1, 0))(target, x) is None
    torch.testing.assert_close(target.T, expected)

    def into_new(x):
        total = torch.ones(2, dtype=DOUBLE)
        accumulate(total, x, [])
        return total

    torch.testing.assert_close(vmap(into_new)(x), 1 + x)
    with pytest.raises(ValueError, match=r"vmap: the in-place operator fl_test::accumulate writes batched values"):
        vmap(lambda x: accumulate(target[:, 0], x, []))(x)


def test_rule_of_an_in_place_operator(rule):
    rule("fl_test::square_", lambda info, in_dims, x, *, power=2.0: (x.copy_(x**power), in_dims[0]))
    x = rand(2, 3)
    expected = x**2

    def f(x):
        y = x.clone()
        assert torch.ops.fl_test.square_(y) is not None
        return y, torch.ops.fl_test.square_(x.clone(), power=3.0)

    squares, cubes = vmap(f, in_dims=1, out_dims=1)(x)
    torch.testing.assert_close(squares, expected)
    torch.testing.assert_close(cubes, x**3)


def test_rule_of_a_result_that_is_no_tensor(rule):
    rule(count, lambda info, in_dims, x: (x.numel() // info.batch_size, None))
    torch.testing.assert_close(vmap(lambda x: x * count(x))(torch.ones(3, 2)), torch.full((3, 2), 2.0))


def test_rule_of_a_random_operator(rule):
    """It is asked even if no argument is batched."""

    def noise_rule(info, in_dims, x):
        assert info.randomness == "different"
        x = x.expand(info.batch_size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
        return x + torch.rand(x.shape), 0

    rule("fl_test::noise", noise_rule)
    noisy = vmap(lambda x, y: torch.ops.fl_test.noise(y) + 0 * x, in_dims=(0, None), randomness="different")
    assert noisy(torch.ones(4), torch.ones(2)[0]).unique().numel() == 4


def test_keyword_only_tensors(rule):
    plus = torch.ops.fl_test.plus
    x, y = rand(3, 2), rand(2)
    rule("fl_test::plus", lambda info, in_dims, x, *, y=None: (x + (0 if y is None else y), in_dims[0]))
    torch.testing.assert_close(vmap(lambda x: plus(x, y=y))(x), x + y)
    with pytest.raises(NotImplementedError, match=r"vmap: the batching rule of fl_test::plus.*'y'.*register_decompo"):
        vmap(lambda x, y: plus(x, y=y))(x, x)
    rule_by_example = register_decomposition("fl_test::plus")(lambda x, *, y=None: x + (0 if y is None else y))
    torch.testing.assert_close(vmap(lambda x, y: plus(x, y=y), in_dims=(0, 1))(x, x.T), x + x)
    assert rule_by_example(x) is not None


def test_decomposition(rule):
    rule(outer, lambda x, y, scale=1.0: scale * x[:, None] * y, register_decomposition)
    x, y = rand(2, 3, 4), rand(3, 5)
    torch.testing.assert_close(
        vmap(outer, in_dims=(0, None))(x[:, 0], y[0]), torch.stack([outer(v[0], y[0]) for v in x])
    )
    expected = torch.stack([loop(outer, x[i], y, in_dims=(0, 0)) for i in range(2)])
    torch.testing.assert_close(vmap(vmap(outer), in_dims=(0, None))(x, y), expected)


@pytest.mark.parametrize(
    "name",
    ["aten::cumsum", "aten::sin", "aten::histc", "aten::linear", "aten::special_zeta.other_scalar", "aten::trace"],
)
def test_override_of_a_built_in_operator_and_back(name):
    """With a built-in rule, a shortcut in C++, a loop, a composition, and a decomposition."""
    x = rand(4, 3)
    function = {
        "aten::cumsum": lambda v: v.cumsum(0),
        "aten::sin": lambda v: v.sin() + v,
        "aten::histc": lambda v: v.histc(bins=3, min=0, max=2),
        "aten::linear": lambda v: torch.nn.functional.linear(v, x.T[:, : len(v)]),
        "aten::special_zeta.other_scalar": lambda v: torch.special.zeta(v + 1, 2.0),
        "aten::trace": lambda v: torch.outer(v, v).trace(),
    }[name]
    call = vmap(lambda v: function(v).sum(), in_dims=1)
    expected = loop(lambda v: function(v).sum(), x, in_dims=(1,))
    calls = []

    def counting(*args, **kwargs):
        calls.append(name)
        return args[0] * 0

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(call(x), expected)
        register_decomposition(name)(counting)
        try:
            call(x)
            assert len(calls) == 1
            vmap(vmap(function))(torch.ones(1, 2, 3, dtype=DOUBLE))
            assert len(calls) >= 2
        finally:
            remove_rule(name)
        torch.testing.assert_close(call(x), expected)
        torch.testing.assert_close(make_fx(call)(x)(x), expected)


def test_a_second_rule_replaces_the_first():
    for factor in (2, 3):
        register_batching_rule("aten::cumsum")(lambda info, in_dims, x, dim, factor=factor: (x * factor, in_dims[0]))
    x = rand(2, 3)
    torch.testing.assert_close(vmap(lambda x: x.cumsum(0))(x), x * 3)
    torch.testing.assert_close(make_fx(vmap(lambda x: x.cumsum(0)))(x)(x), x * 3)
    remove_rule("aten::cumsum")
    torch.testing.assert_close(vmap(lambda x: x.cumsum(0))(x), x.cumsum(1))


def test_override_beside_other_operators_and_transforms(rule):
    calls = []

    def sum_rule(info, in_dims, x, dim, keepdim=False, *, dtype=None):
        calls.append(in_dims)
        return x.movedim(in_dims[0], 0).sum([d + 1 for d in dim], keepdim), 0

    rule("aten::sum.dim_IntList", sum_rule)
    f = lambda x: (x.sum(1) ** 2).sum(0)
    x = rand(2, 3, 4)
    expected = torch.stack([2 * v.sum(1, keepdim=True).expand(3, 4) for v in x])
    torch.testing.assert_close(vmap(grad(f))(x), expected)
    torch.testing.assert_close(grad(lambda x: vmap(f)(x).sum())(x), expected)
    torch.testing.assert_close(vmap(lambda x: jvp(f, (x,), (x,))[1])(x), (expected * x).sum((1, 2)))
    assert len(calls) >= 4


def test_composite_operator_of_a_library(rule):
    composed = torch.ops.fl_test.composed
    x = rand(3)
    torch.testing.assert_close(vmap(composed)(x), x.sin().cos())
    rule("fl_test::composed", lambda info, in_dims, x: (x + 1, in_dims[0]))
    torch.testing.assert_close(vmap(composed)(x), x + 1)


def test_rule_under_tracing(rule):
    rule(sine, lambda info, in_dims, x: (x.sin(), in_dims[0]))
    x = rand(3, 2)
    for mode in ("real", "symbolic"):
        graph = make_fx(vmap(grad(lambda v: sine(v).sum())), tracing_mode=mode)(x)
        torch.testing.assert_close(graph(x), x.cos())


def test_argument_that_is_returned_with_another_batch_dimension(rule):
    rule(sine, lambda info, in_dims, x: (x, 1 - in_dims[0]))
    x = rand(3, 3)
    torch.testing.assert_close(vmap(sine)(x), x.T)


# Errors.


def result_of(outputs_and_dims, op="fl_test::outer"):
    return op, lambda info, in_dims, *args: outputs_and_dims


WRONG_RESULTS = {
    "no pair": (rand(3), TypeError, ["must return (outputs, out_dims), got Tensor"]),
    "three": ((rand(3), 0, 0), TypeError, ["must return (outputs, out_dims), got a tuple of 3"]),
    "structure": ((rand(3), (0, 0)), ValueError, ["out_dims=(0, 0)", "does not fit its outputs, a Tensor"]),
    "kind of dim": ((rand(3), "0"), ValueError, ["out_dims='0'", "Give one int or None for all"]),
    "range": ((rand(3), 1), ValueError, ["out_dim 1 for output, whose shape is (3,)"]),
    "size": ((rand(3, 4), 1), ValueError, ["out_dim 1", "shape is (3, 4)", "the batch size is 3"]),
    "no tensor": ((1.0, 0), ValueError, ["out_dim 0 for output, a float", "Give None"]),
    "too many": (
        ((rand(3), rand(3)), (0, 0)),
        TypeError,
        ["returned (Tensor, Tensor), but the operator returns Tensor"],
    ),
    "none": ((None, None), TypeError, ["returned NoneType, but the operator returns Tensor"]),
}


@pytest.mark.parametrize("case", WRONG_RESULTS)
def test_wrong_result_names_the_rule(case, rule):
    result, kind, parts = WRONG_RESULTS[case]
    rule(*result_of(result))
    with pytest.raises(kind) as caught:
        vmap(outer)(rand(3, 2), rand(3, 2))
    message = str(caught.value)
    for part in ["vmap: the batching rule of fl_test::outer (", "test_custom_rules.py:", *parts]:
        assert part in message, message


def test_wrong_number_of_outputs(rule):
    rule(*result_of((rand(3), 0), "fl_test::pair"))
    with pytest.raises(TypeError, match=r"fl_test::pair .*returned Tensor, but the operator returns Tensor, Tensor"):
        vmap(torch.ops.fl_test.pair)(rand(3))
    rule(*result_of(((rand(3), rand(3, 4)), (0, 1)), "fl_test::pair"))
    with pytest.raises(ValueError, match=r"out_dim 1 for output\[1\], whose shape is \(3, 4\)"):
        vmap(torch.ops.fl_test.pair)(rand(3))


def test_rule_that_raises(rule):
    def failing(info, in_dims, x, y):
        raise KeyError("mine")

    rule(outer, failing)
    with pytest.raises(KeyError, match="mine") as caught:
        vmap(outer)(rand(3, 2), rand(3, 2))
    assert any(entry.name == "failing" for entry in caught.traceback)


def test_operator_that_does_not_exist():
    cases = {
        "fl_test::outre": ["there is no operator 'fl_test::outre'", "Import the library that defines it first"],
        "outer": ["there is no operator 'outer'", "'mylib::cube'"],
        "aten::sum.dim": ["There are ", "aten::sum, ", "aten::sum.dim_IntList"],
        "aten::add": ["There are aten::add.Tensor"],
    }
    for name, parts in cases.items():
        for function in (register_batching_rule, register_decomposition, remove_rule):
            with pytest.raises(ValueError, match=f"^{function.__name__}: ") as caught:
                function(name)
            assert all(part in str(caught.value) for part in parts), caught.value
    with pytest.raises(ValueError, match=r"aten.sum has several overloads.*aten::sum.dim_IntList, aten::sum,"):
        register_batching_rule(torch.ops.aten.sum)
    with pytest.raises(TypeError, match=r"register_batching_rule: expected an operator, .* got function"):
        register_batching_rule(lambda x: x)
    with pytest.raises(TypeError, match="register_batching_rule: expected a function as first argument, got int"):
        register_batching_rule("aten::sin")(3)
    with pytest.raises(ValueError, match=r"remove_rule: no rule was registered for aten::sin"):
        remove_rule("aten::sin")


# Rules that torch.library recorded.


def test_register_vmap_of_a_custom_op():
    @custom_op("fl_test::late", mutates_args=())
    def late(x: Tensor, y: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() + y.numpy())

    x = rand(3, 2)
    with pytest.warns(LoopFallbackWarning):
        vmap(late, in_dims=(0, None))(x, x[0])
    for factor in (2, 3):  # the second replaces the first
        late.register_vmap(lambda info, in_dims, x, y, factor=factor: (factor * x, in_dims[0]))
        torch.testing.assert_close(vmap(late, in_dims=(0, None))(x, x[0]), factor * x)
        torch.testing.assert_close(torch.func.vmap(late, in_dims=(0, None))(x, x[0]), factor * x)
    with_ours = lambda info, in_dims, x, y: (x - 1, in_dims[0])
    register_batching_rule(late)(with_ours)
    torch.testing.assert_close(vmap(late, in_dims=(0, None))(x, x[0]), x - 1)
    remove_rule(late)
    torch.testing.assert_close(vmap(late, in_dims=(0, None))(x, x[0]), 3 * x)
    torch.testing.assert_close(make_fx(vmap(late, in_dims=(0, None)))(x, x[0])(x, x[0]), 3 * x)


def test_register_vmap_of_a_defined_operator_lives_as_long_as_its_library():
    x = rand(3, 2)
    with torch.library._scoped_library("fl_test_scoped", "FRAGMENT") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CPU")
        twice = torch.ops.fl_test_scoped.twice
        with torch.library._scoped_library("fl_test_scoped", "FRAGMENT") as rules:

            @torch.library.register_vmap("fl_test_scoped::twice", lib=rules)
            def _(info, in_dims, x):
                assert info.batch_size == 3
                assert info.randomness == "error"
                return x.movedim(in_dims[0], 0) * 20, 0

            torch.testing.assert_close(vmap(twice, in_dims=1)(x.T), 20 * x)
        with pytest.warns(LoopFallbackWarning):
            torch.testing.assert_close(vmap(twice)(x), 2 * x)


def test_redefined_custom_op_has_no_rule():
    def define():
        @custom_op("fl_test::redefined", mutates_args=())
        def redefined(x: Tensor) -> Tensor:
            return x.clone()

        return redefined

    rule = lambda info, in_dims, x: (x + 1, in_dims[0])
    for register in (lambda op: op.register_vmap(rule), lambda op: register_batching_rule(op)(rule)):
        register(define())
        torch.testing.assert_close(vmap(torch.ops.fl_test.redefined)(rand(3)), rand(3) + 1)
        redefined = define()
        with pytest.warns(LoopFallbackWarning):
            torch.testing.assert_close(vmap(redefined)(rand(3)), rand(3))


def test_register_vmap_before_the_import():
    script = """
import warnings
import torch
warnings.simplefilter("error")
from torch.library import custom_op, register_vmap
@custom_op("early::one", mutates_args=())
def one(x: torch.Tensor) -> torch.Tensor:
    return x.clone()
one.register_vmap(lambda info, in_dims, x: (x + 1, in_dims[0]))
torch.library.define("early::two", "(Tensor x) -> Tensor")
torch.library.impl("early::two", "cpu", lambda x: x.clone())
register_vmap("early::two", lambda info, in_dims, x: (x + 2, in_dims[0]))
torch.library.define("early::three", "(Tensor x) -> Tensor")
torch.library.impl("early::three", "cpu", lambda x: x.clone())
import functorch_lite
register_vmap("early::three", lambda info, in_dims, x: (x + 3, in_dims[0]))
x = torch.ones(2)
for name, add in (("one", 1), ("two", 2), ("three", 3)):
    assert functorch_lite.vmap(getattr(torch.ops.early, name))(x).eq(1 + add).all(), name
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
