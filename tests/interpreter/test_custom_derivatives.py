"""custom_vjp and custom_jvp: which derivative is used at which level, and what the rules may be."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
from torch.autograd import Function

from functorch_lite import custom_jvp, custom_vjp, grad, hessian, jacfwd, jacrev, jvp, make_fx, vjp, vmap
from tests.support.nesting import COMPOSITIONS, OURS, REFERENCE, compose

DOUBLE = torch.float64


@pytest.fixture
def x():
    return torch.tensor([0.4, 1.3, -0.8], dtype=DOUBLE)


def vjp_square(residuals=lambda x: x):
    """x^2 with the derivative 3 times a residual."""
    square = custom_vjp(lambda x: x * x)
    square.defvjp(lambda x: (square(x), residuals(x)), lambda r, g: (3 * r * g,))
    return square


def jvp_square():
    square = custom_jvp(lambda x: x * x)

    @square.defjvp
    def rule(primals, tangents):
        (x,), (t,) = primals, tangents
        return square(x), 3 * x * t

    return square


def torch_square(residuals=lambda x: x):
    """The same in PyTorch: the residuals are computed from the argument, and so differentiated."""

    class Square(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, g):
            return 3 * residuals(*ctx.saved_tensors) * g

    return Square.apply


def sines_by_vjp():
    """Two arguments in a dictionary and two outputs, with the true derivative."""

    @custom_vjp
    def f(args, power):
        return {"product": args["a"] * args["b"].sin() ** power}, [args["a"] + args["b"]]

    def fwd(args, power):
        return f(args, power), {"args": args, "power": power}

    def bwd(residuals, cotangents):
        a, b, n = residuals["args"]["a"], residuals["args"]["b"], residuals["power"]
        g, (h,) = cotangents[0]["product"], cotangents[1]
        return {"a": g * b.sin() ** n + h, "b": g * a * n * b.sin() ** (n - 1) * b.cos() + h}, None

    f.defvjp(fwd, bwd)
    return f


def sines_by_jvp():
    @custom_jvp
    def f(args, power):
        return {"product": args["a"] * args["b"].sin() ** power}, [args["a"] + args["b"]]

    @f.defjvp
    def rule(primals, tangents):
        (args, n), (t, none) = primals, tangents
        assert none is None
        a, b = args["a"], args["b"]
        product = t["a"] * b.sin() ** n + a * n * b.sin() ** (n - 1) * b.cos() * t["b"]
        return f(args, n), ({"product": product}, [t["a"] + t["b"]])

    return f


def of_vector(f):
    def call(x):
        output, (total,) = f({"a": x, "b": x.exp()}, power=2)
        return output["product"] + total**2

    return call


def plain_sines(args, power):
    return {"product": args["a"] * args["b"].sin() ** power}, [args["a"] + args["b"]]


CASES = {
    "vjp": (vjp_square(), torch_square()),
    "vjp, residual of ops": (vjp_square(torch.sin), torch_square(torch.sin)),
    "jvp": (jvp_square(), torch_square()),
    "vjp, pytrees": (of_vector(sines_by_vjp()), of_vector(plain_sines)),
    "jvp, pytrees": (of_vector(sines_by_jvp()), of_vector(plain_sines)),
}


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_nested_autograd(case, composition, x):
    ours, reference = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = compose(composition, OURS, ours)(x)
    torch.testing.assert_close(result, compose(composition, REFERENCE, reference)(x))


@pytest.mark.parametrize("case", CASES)
def test_outside_of_transforms(case, x):
    ours, reference = CASES[case]
    torch.testing.assert_close(compose("grad∘grad", REFERENCE, ours)(x), compose("grad∘grad", REFERENCE, reference)(x))
    # Mapped, and differentiated by plain autograd twice, when the vmap is closed.
    mapped = lambda f: lambda v: f(torch.stack([v, 2 * v])).sum(0)
    torch.testing.assert_close(
        compose("grad∘grad", REFERENCE, mapped(vmap(ours)))(x),
        compose("grad∘grad", REFERENCE, mapped(REFERENCE.vmap(reference)))(x),
    )


@pytest.mark.parametrize("make", [vjp_square, jvp_square])
def test_jacobians(make, x):
    square = make()
    torch.testing.assert_close(jacrev(square)(x), torch.diag(3 * x))
    torch.testing.assert_close(jacfwd(square)(x), torch.diag(3 * x))
    torch.testing.assert_close(hessian(lambda x: square(x).sum())(x), 3 * torch.eye(3, dtype=DOUBLE))
    torch.testing.assert_close(vjp(square, x)[0], x * x)


def test_each_level_uses_the_rule_or_differentiates_it(x):
    """`fwd` computes the value itself: it is plain code for the level outside, whose derivative is 2x."""
    square = custom_vjp(lambda x: x * x)
    square.defvjp(lambda x: (x * x, x), lambda x, g: (3 * x * g,))
    value_of_inner = lambda x: vjp(square, x)[0].sum()
    torch.testing.assert_close(grad(value_of_inner)(x), 2 * x)
    torch.testing.assert_close(grad(lambda x: vjp(vjp_square(), x)[0].sum())(x), 3 * x)


# Arguments.


@pytest.mark.parametrize("make", [sines_by_vjp, sines_by_jvp])
def test_keywords_defaults_and_shared_arguments(make, x):
    f = make()
    loss = lambda args: f(power=3, args=args)[0]["product"].sum()
    expected = {"a": x.exp().sin() ** 3, "b": x * 3 * x.exp().sin() ** 2 * x.exp().cos()}
    torch.testing.assert_close(grad(loss)({"a": x, "b": x.exp()}), expected)
    shared = lambda a, b: vmap(lambda a: f({"a": a, "b": b}, 2)[0]["product"])(a).sum()
    torch.testing.assert_close(
        grad(shared, argnums=(0, 1))(x, x[0]),
        (x[0].sin().expand(3) ** 2, x.sum() * 2 * x[0].sin() * x[0].cos()),
    )


def test_nondiff_argnums(x):
    def apply(f, x, n):
        return f(x) ** n

    by_vjp = custom_vjp(apply, nondiff_argnums=(0, 2))
    by_vjp.defvjp(lambda f, x, n: (by_vjp(f, x, n), x), lambda f, n, x, g: (10 * n * f(x) * g,))
    by_jvp = custom_jvp(apply, nondiff_argnums=(0, 2))
    by_jvp.defjvp(lambda f, n, primals, ts: (by_jvp(f, *primals, n), 10 * n * f(*primals) * ts[0]))
    for f in (by_vjp, by_jvp):
        torch.testing.assert_close(grad(lambda x: f(torch.sin, x, 2).sum())(x), 20 * x.sin())
        torch.testing.assert_close(jvp(lambda x: f(torch.sin, x, n=2), (x,), (x,))[1], 20 * x.sin() * x)


def test_integer_leaves_and_cotangents_that_are_none(x):
    @custom_vjp
    def take(x, index):
        return x[index], index + 1

    def fwd(x, index):
        return take(x, index), (index, x.shape[0])

    def bwd(residuals, cotangent):
        index, size = residuals
        return 7 * cotangent[0] * torch.nn.functional.one_hot(index, size), None

    take.defvjp(fwd, bwd)
    index = torch.tensor(1)
    expected = torch.tensor([0.0, 7.0, 0.0], dtype=DOUBLE)
    torch.testing.assert_close(grad(lambda x: take(x, index)[0])(x), expected)
    torch.testing.assert_close(jvp(lambda x: take(x, index)[0], (x,), (x,))[1], 7 * x[1])
    torch.testing.assert_close(
        vmap(grad(lambda x, i: take(x, i)[0]), (None, 0))(x, torch.arange(3)), 7 * torch.eye(3, dtype=DOUBLE)
    )
    constant = custom_jvp(lambda x: x * x)
    constant.defjvp(lambda primals, _: (constant(*primals), None))
    torch.testing.assert_close(grad(lambda x: constant(x).sum())(x), torch.zeros_like(x))


def test_defjvps(x):
    product = custom_jvp(lambda x, y: x * y)
    product.defjvps(lambda t, output, x, y: 10 * t * y, lambda t, output, x, y: output * t)
    torch.testing.assert_close(
        grad(lambda x, y: product(x, y).sum(), argnums=(0, 1))(x, x + 1), (10 * (x + 1), x * (x + 1))
    )


def test_complex_numbers():
    z = torch.tensor([1.0 + 2.0j, -0.5j], dtype=torch.complex128)
    by_vjp = custom_vjp(lambda z: z * z)
    by_vjp.defvjp(lambda z: (by_vjp(z), z), lambda z, g: (2 * z.conj() * g,))
    by_jvp = custom_jvp(lambda z: z * z)
    by_jvp.defjvp(lambda primals, ts: (by_jvp(*primals), 2 * primals[0] * ts[0]))
    for f in (by_vjp, by_jvp):
        torch.testing.assert_close(grad(lambda z: f(z).abs().sum())(z), grad(lambda z: (z * z).abs().sum())(z))
        torch.testing.assert_close(jvp(f, (z,), (z + 1,))[1], 2 * z * (z + 1))


# Closures.


@pytest.mark.parametrize("kind", ["vjp", "jvp"])
def test_closures(kind, x):
    def scaled(w):
        if kind == "vjp":
            f = custom_vjp(lambda x: w * x)
            f.defvjp(lambda x: (f(x), w * 1), lambda r, g: (10 * r * g,))
        else:
            f = custom_jvp(lambda x: w * x)
            f.defjvp(lambda primals, ts: (f(*primals), 10 * w * ts[0]))
        return f

    # Of levels outside of the one that differentiates: what the rule does is differentiated there.
    gradient = lambda w: grad(lambda x: scaled(w)(x).sum())(x).sum()
    torch.testing.assert_close(grad(gradient)(x), torch.full_like(x, 10))
    torch.testing.assert_close(vmap(lambda w: grad(lambda x: scaled(w)(x).sum())(x))(x), 10 * x[:, None].expand(3, 3))
    torch.testing.assert_close(
        vmap(lambda w: grad(lambda y: vmap(scaled(w))(y).sum())(x))(x), 10 * x[:, None].expand(3, 3)
    )
    leaf = x.clone().requires_grad_()
    gradient(leaf).backward()
    torch.testing.assert_close(leaf.grad, torch.full_like(x, 10))
    # No argument is differentiated: the function is plain code.
    torch.testing.assert_close(grad(lambda w: scaled(w)(x).sum())(x), x)
    # Both are: the rule has nothing to say about the other one.
    message = rf"custom_{kind} function <lambda> uses a tensor that is differentiated and is no .*argument.*detach"
    with pytest.raises(ValueError, match=f"^grad: {message}"):
        grad(lambda w: scaled(w)(w).sum())(x)
    with pytest.raises(ValueError, match=f"^jvp: {message}"):
        jvp(lambda w: scaled(w)(w), (x,), (x,))
    with pytest.raises(ValueError, match=f"^backward: {message}"):
        scaled(leaf)(leaf)
    # Nor does it reach a level below through a level that only captures.
    with pytest.raises(ValueError, match=f"^grad: {message}"):
        grad(lambda y: grad(lambda w: scaled(w)(y).sum())(x).sum())(x)


def test_forward_closure_over_a_batch(x):
    """The function is differentiated below the vmap that its closure belongs to."""

    def mapped(y):
        def each(w, y):
            f = custom_vjp(lambda y: w * y)
            f.defvjp(lambda y: (f(y), w), lambda w, g: (10 * w * g,))
            return f(y)

        return vmap(each)(x, y)

    torch.testing.assert_close(grad(lambda y: mapped(y).sum())(x), 10 * x)
    torch.testing.assert_close(jvp(mapped, (x,), (x,))[1], 10 * x * x)


# Messages.


def test_messages_about_rules(x):
    value = lambda x: {"a": x * x}
    total = lambda f: lambda x: f(x)["a"].sum()
    f = custom_vjp(value)
    with pytest.raises(TypeError, match=r"^custom_vjp function <lambda> has no derivative rule.*defvjp\(fwd, bwd\)"):
        f(x)
    g = custom_jvp(value)
    with pytest.raises(TypeError, match=r"^custom_jvp function <lambda> has no derivative rule.*defjvp or defjvps"):
        g(x)

    def check(fwd, bwd, error, message):
        f.defvjp(fwd, bwd)
        with pytest.raises(error, match=r"^custom_vjp function <lambda>: " + message):
            grad(total(f))(x)

    good = lambda x: (f(x), x)
    check(lambda x: x, lambda r, g: (g,), TypeError, r"fwd must return \(output, residuals\), got Tensor")
    check(good, lambda r, g: g["a"], TypeError, r"bwd must return a tuple of 1, a cotangent for each.*got Tensor")
    check(good, lambda r, g: (g["a"], None), TypeError, r"bwd must return a tuple of 1.*got a tuple of 2")
    check(good, lambda r, g: (g,), ValueError, r"the cotangent of argument 0 .*must have the structure of the argument")
    check(
        good,
        lambda r, g: (g["a"][:2],),
        ValueError,
        r"the cotangent of argument 0 .*\(3,\) and torch.float64, got \(2,\)",
    )
    check(
        good, lambda r, g: (g["a"].float(),), ValueError, r"the cotangent of argument 0 .*got \(3,\) and torch.float32"
    )
    check(good, lambda r, g: (1.0,), TypeError, r"the cotangent of argument 0 .*must be a tensor.*got float")

    def check_jvp(rule, error, message):
        g.defjvp(rule)
        with pytest.raises(error, match=r"^custom_jvp function <lambda>: " + message):
            jvp(g, (x,), (x,))
        with pytest.raises(error, match=r"^custom_jvp function <lambda>: " + message):
            grad(total(g))(x)

    check_jvp(lambda p, t: g(*p), TypeError, r"the jvp rule must return \(output, output's tangent\), got dict")
    check_jvp(lambda p, t: (g(*p), t[0]), ValueError, r"the tangent that .*must have the structure of the output")
    check_jvp(
        lambda p, t: (g(*p), {"a": t[0][:1]}), ValueError, r"the tangent .* for output\['a'\].*\(3,\).*got \(1,\)"
    )
    check_jvp(lambda p, t: (g(*p), {"a": 2}), TypeError, r"the tangent .* for output\['a'\] must be a tensor.*got int")
    g.defjvps(None, None)
    with pytest.raises(TypeError, match="defjvps was given 2 rules.*called with 1"):
        jvp(g, (x,), (x,))


def test_messages_about_arguments(x):
    f = vjp_square()
    with pytest.raises(TypeError, match="custom_vjp: expected a function"):
        custom_vjp(3)
    with pytest.raises(TypeError, match="defvjp: expected a function"):
        f.defvjp(None, lambda r, g: (g,))
    keyword = custom_vjp(lambda x, *, scale=2: scale * x)
    keyword.defvjp(lambda x: (x, None), lambda _, g: (g,))
    with pytest.raises(
        TypeError, match=r"custom_vjp function <lambda>: the argument 'scale'.*keyword only.*positional"
    ):
        keyword(x, scale=3)
    with pytest.raises(TypeError, match=r"custom_jvp function <lambda>: defjvps has no place for nondiff_argnums"):
        custom_jvp(lambda n, x: x, nondiff_argnums=(0,)).defjvps(None)
    custom = custom_vjp(lambda x: x, nondiff_argnums=(4,))
    custom.defvjp(lambda x: (x, None), lambda _, g: (g,))
    with pytest.raises(ValueError, match=r"custom_vjp: argnums=\(4,\) selects positional argument 4"):
        custom(x)
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match=r"^jvp: .*forward_ad.*Use functorch_lite.jvp"),
    ):
        f(torch.autograd.forward_ad.make_dual(x, x))


# Beside the rest of PyTorch.


def test_tracing(x):
    for make in (vjp_square, jvp_square):
        square = make()
        for function in (grad(lambda x: square(x).sum()), vmap(grad(square)), grad(lambda x: vmap(square)(x).sum())):
            graph = make_fx(function)(x)
            torch.testing.assert_close(graph(x + 1), 3 * (x + 1))


def test_modules_and_no_grad(x):
    layer = torch.nn.Linear(3, 3, dtype=DOUBLE)
    square = vjp_square()
    square(layer(x)).sum().backward()
    torch.testing.assert_close(layer.bias.grad, 3 * layer(x).detach())
    with torch.no_grad():
        assert not square(layer(x)).requires_grad
        torch.testing.assert_close(grad(lambda x: square(x).sum())(x), 3 * x)
    assert square(layer(x)).grad_fn is not None


@pytest.mark.parametrize("make", [vjp_square, jvp_square])
def test_nothing_is_kept_alive(make, x):
    square = make()
    for run in (grad(lambda x: square(x).sum()), lambda x: jvp(square, (x,), (x,)), vmap(grad(square))):
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
