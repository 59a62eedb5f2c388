"""jacrev, jacfwd, jacobian and hessian: structures, chunks, dtypes, memory. Judged row by row and analytically."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import functorch_lite as fl
from functorch_lite import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

EACH = pytest.mark.parametrize("jacobian", [jacrev, jacfwd, fl.jacobian])


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def equal(got, expected):
    torch.testing.assert_close(got, expected)


def row_by_row(func, *args):
    """The Jacobian of a real function of real tensors, one torch.autograd.grad for each element of the output."""
    args = [arg.detach().clone().requires_grad_() for arg in args]
    output = func(*args)
    rows = [
        torch.autograd.grad(element, args, retain_graph=True, materialize_grads=True) if element.requires_grad else None
        for element in output.reshape(-1)
    ]
    return tuple(
        torch.stack([torch.zeros_like(arg) if row is None else row[i] for row in rows]).view(output.shape + arg.shape)
        for i, arg in enumerate(args)
    )


def hessian_by_autograd(func, *args):
    return torch.autograd.functional.hessian(func, args)


X, Y, M = numbers(3), numbers(4, seed=1), numbers(2, 3, seed=2)


def mixed(x, y):
    return torch.outer(x.sin(), y.exp()) * x.sum()


@EACH
@pytest.mark.parametrize("argnums", [0, 1, -1])
def test_argnums_int(jacobian, argnums):
    equal(jacobian(mixed, argnums)(X, Y), row_by_row(mixed, X, Y)[argnums])


@EACH
@pytest.mark.parametrize("argnums", [(0,), (0, 1), (1, 0), (-1, 0)])
def test_argnums_tuple(jacobian, argnums):
    expected = row_by_row(mixed, X, Y)
    equal(jacobian(mixed, argnums)(X, Y), tuple(expected[i] for i in argnums))


@EACH
@pytest.mark.parametrize("chunk_size", [1, 2, 5, 12, 1000])
def test_chunks_change_nothing(jacobian, chunk_size):
    equal(jacobian(mixed, (0, 1), chunk_size=chunk_size)(X, Y), jacobian(mixed, (0, 1))(X, Y))


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 1000])
def test_chunks_of_a_hessian_change_nothing(chunk_size):
    f = lambda x, y: mixed(x, y).sum()
    equal(hessian(f, (0, 1), chunk_size=chunk_size)(X, Y), hessian_by_autograd(f, X, Y))


@EACH
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_auxiliary_output(jacobian, chunk_size):
    f = lambda x: (x.sin(), {"twice": x * 2, "name": "aux", "n": 3})
    result, aux = jacobian(f, has_aux=True, chunk_size=chunk_size)(X)
    equal(result, torch.diag(X.cos()))
    equal(aux["twice"], X * 2)
    assert (aux["name"], aux["n"]) == ("aux", 3)


def test_auxiliary_output_of_a_hessian():
    result, aux = hessian(lambda x: ((x**3).sum(), [x * 2, "aux"]), has_aux=True)(X)
    equal(result, torch.diag(6 * X))
    equal(aux[0], X * 2)
    assert aux[1] == "aux"


@EACH
def test_keyword_arguments(jacobian):
    f = lambda x, *, w, power=1: w * x**power
    equal(jacobian(f)(X, w=X, power=2), torch.diag(2 * X**2))


def test_keyword_arguments_of_a_hessian():
    equal(hessian(lambda x, *, w: (w * x**2).sum())(X, w=X), torch.diag(2 * X))


@EACH
def test_pytrees_in(jacobian):
    f = lambda d: d["w"] @ d["b"][0]
    result = jacobian(f)({"w": M, "b": [X]})
    expected = row_by_row(lambda w, b: w @ b, M, X)
    equal(result, {"w": expected[0], "b": [expected[1]]})


@EACH
def test_pytrees_out(jacobian):
    result = jacobian(lambda x: {"s": x.sin(), "rest": (x.sum(), [torch.outer(x, x)])})(X)
    outer = row_by_row(lambda x: torch.outer(x, x), X)[0]
    equal(result, {"s": torch.diag(X.cos()), "rest": (torch.ones_like(X), [outer])})


@EACH
def test_pytrees_in_and_out_and_argnums(jacobian):
    f = lambda p, y: (p["x"] * 2, {"o": torch.outer(p["x"], y)})
    result = jacobian(f, (0, 1))({"x": X}, Y)
    one = row_by_row(lambda x, y: x * 2, X, Y)
    two = row_by_row(torch.outer, X, Y)
    equal(result, (({"x": one[0]}, one[1]), {"o": ({"x": two[0]}, two[1])}))


@EACH
def test_several_outputs(jacobian):
    result = jacobian(lambda x: (x.exp(), x.prod()))(X)
    equal(result, (torch.diag(X.exp()), row_by_row(lambda x: x.prod(), X)[0]))


@EACH
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 1, 2)])
def test_shapes(jacobian, shape):
    x = numbers(*shape)
    f = lambda x: x.sin() * x.sum()
    equal(jacobian(f)(x), row_by_row(f, x)[0])
    equal(jacobian(lambda x: f(x).sum())(x), row_by_row(lambda x: f(x).sum(), x)[0])


@EACH
def test_empty_input_and_empty_output(jacobian):
    assert jacobian(torch.sin)(torch.ones(0)).shape == (0, 0)
    assert jacobian(lambda x: x.sum())(torch.ones(0)).shape == (0,)
    assert jacobian(lambda x: x[:0])(torch.ones(3)).shape == (0, 3)
    assert jacobian(lambda x: (x, x.sum()), chunk_size=1)(torch.ones(2, 0))[1].shape == (2, 0)


def test_empty_hessian():
    assert hessian(lambda x: x.sin().sum())(torch.ones(0)).shape == (0, 0)


@EACH
def test_outputs_that_do_not_depend_on_the_input(jacobian):
    equal(jacobian(lambda x: (Y, x.detach(), x))(X)[0], torch.zeros(4, 3, dtype=X.dtype))
    equal(jacobian(lambda x: x.detach())(X), torch.zeros(3, 3, dtype=X.dtype))
    equal(jacobian(lambda x, y: x * 2, 1)(X, Y), torch.zeros(3, 4, dtype=X.dtype))


@pytest.mark.parametrize("argnums", [0, 1, (0,), (0, 1), (1, 0)])
def test_hessian_blocks(argnums):
    f = lambda x, y: (mixed(x, y) ** 2).sum()
    blocks = hessian_by_autograd(f, X, Y)
    if isinstance(argnums, int):
        expected = blocks[argnums][argnums]
    else:
        expected = tuple(tuple(blocks[i][j] for j in argnums) for i in argnums)
    equal(hessian(f, argnums)(X, Y), expected)


def test_hessian_of_a_pytree():
    result = hessian(lambda d: (d["a"] ** 2 * d["b"]).sum())({"a": X, "b": X * 2})
    zeros, cross = torch.zeros(3, 3, dtype=X.dtype), torch.diag(2 * X)
    equal(result, {"a": {"a": torch.diag(4 * X), "b": cross}, "b": {"a": cross, "b": zeros}})


def test_hessian_of_several_outputs():
    first, second = hessian(lambda x: ((x**3).sum(), x**2))(X)
    equal(first, torch.diag(6 * X))
    expected = torch.zeros(3, 3, 3, dtype=X.dtype)
    for i in range(3):
        expected[i, i, i] = 2
    equal(second, expected)


@pytest.mark.parametrize("outer", [jacrev, jacfwd])
@pytest.mark.parametrize("inner", [jacrev, jacfwd])
def test_every_way_to_a_hessian(outer, inner):
    f = lambda x: (x.sin() * x.sum() ** 2).sum()
    equal(outer(inner(f))(X), hessian_by_autograd(f, X)[0][0])


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_real_dtypes(jacobian, dtype):
    x = X.to(dtype)
    result = jacobian(lambda x: x * x)(x)
    assert result.dtype == dtype
    equal(result, torch.diag(2 * x))
    assert hessian(lambda x: (x * x).sum())(x).dtype == dtype


@EACH
def test_inputs_of_two_dtypes(jacobian):
    a, b = jacobian(lambda x, y: x.double() * y, (0, 1))(X.float(), X)
    # Reverse mode counts in the input's dtype, forward mode in the output's, as in torch.func.
    assert a.dtype == (torch.float64 if jacobian is jacfwd else torch.float32)
    equal(a.float(), torch.diag(X).float())
    equal(b, torch.diag(X.float().double()))


Z = torch.complex(numbers(3), numbers(3, seed=1))
HOLOMORPHIC = {
    "square": (lambda z: z**2, lambda z: 2 * z),
    "exp": (torch.exp, torch.exp),
    "sin": (torch.sin, torch.cos),
    "reciprocal": (torch.reciprocal, lambda z: -1 / z**2),
    "multiple": (lambda z: (2 + 3j) * z, lambda z: torch.full_like(z, 2 + 3j)),
    "two conjugations": (lambda z: (z.conj() ** 2).conj(), lambda z: 2 * z),
}


@EACH
@pytest.mark.parametrize("name", HOLOMORPHIC)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_holomorphic_functions(jacobian, name, chunk_size):
    function, derivative = HOLOMORPHIC[name]
    equal(jacobian(function, chunk_size=chunk_size)(Z).resolve_conj(), torch.diag(derivative(Z)))


def test_second_derivative_of_a_holomorphic_function():
    z = Z[0]
    for outer in (jacrev, jacfwd):
        for inner in (jacrev, jacfwd):
            equal(outer(inner(lambda z: z**3))(z).resolve_conj(), 6 * z)


@EACH
def test_complex_linear_map(jacobian):
    a = torch.complex(numbers(2, 3, seed=3), numbers(2, 3, seed=4))
    equal(jacobian(lambda z: a @ z)(Z).resolve_conj(), a)


@EACH
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_complex_functions_of_real_inputs(jacobian, chunk_size):
    result = jacobian(lambda x: torch.exp(2j * x) + x, chunk_size=chunk_size)(X)
    equal(result, torch.diag(2j * torch.exp(2j * X) + 1))


@EACH
def test_complex_and_real_outputs_of_a_real_input(jacobian):
    a, b = jacobian(lambda x: (x.sin(), 1j * x**2))(X)
    equal(a, torch.diag(X.cos()))
    equal(b, torch.diag(2j * X))


@EACH
def test_complex_output_of_a_real_and_a_complex_input(jacobian):
    a, b = jacobian(lambda x, z: x * z, (0, 1))(X, Z)
    equal(a, torch.diag(Z))
    equal(b.resolve_conj(), torch.diag(X + 0j))


@EACH
@pytest.mark.parametrize("function", [torch.abs, torch.real, torch.angle])
def test_real_functions_of_complex_inputs_are_refused(jacobian, function):
    with pytest.raises(ValueError, match=r"real output \(torch.float64\) of a complex input \(torch.complex128\)"):
        jacobian(function)(Z)
    assert fl.level_depth() == 0


def test_randomness_of_forward_mode():
    f = lambda x: x * torch.rand(3, dtype=x.dtype)
    with pytest.raises(RuntimeError, match="randomness"):
        jacfwd(f)(X)
    torch.manual_seed(0)
    result = jacfwd(f, randomness="same")(X)
    torch.manual_seed(0)
    equal(result, torch.diag(torch.rand(3, dtype=X.dtype)))
    rows = jacfwd(lambda x: x.sum() * torch.rand(3, dtype=x.dtype), randomness="different")(X)
    assert not torch.equal(rows[:, 0], rows[:, 1])


def test_inputs_that_require_grad_stay_connected():
    for jacobian in (jacrev, jacfwd):
        x = X.clone().requires_grad_()
        (second,) = torch.autograd.grad(jacobian(lambda x: x**3)(x).sum(), x)
        equal(second, 6 * X)


@EACH
def test_jacobians_of_a_batch(jacobian):
    batch = numbers(5, 3)
    equal(vmap(jacobian(mixed), in_dims=(0, None))(batch, Y), torch.stack([row_by_row(mixed, x, Y)[0] for x in batch]))


# Tall matrices are computed by columns and wide ones by rows.
TALL = {
    "real": lambda x: torch.outer(x.sin(), torch.cat([x, x * 2])),
    "trees": lambda x: {"a": torch.outer(x, x), "b": (x.exp(), x.prod())},
    "partly constant": lambda x: (torch.ones(5, dtype=x.dtype), x.detach(), x * x[0]),
    "integers": lambda x: (x.sort().values.repeat(2), x.argsort()),
    "scalars": lambda x: tuple(x.sum() ** n for n in range(5)),
}


@pytest.mark.parametrize("name", TALL)
@pytest.mark.parametrize("chunk_size", [None, 2, "auto"])
def test_tall_jacobians(name, chunk_size):
    value, got = fl.value_and_jacobian(TALL[name], chunk_size=chunk_size)(X)
    equal(value, TALL[name](X))
    equal(got, jacrev(TALL[name])(X))


@pytest.mark.parametrize("func", [lambda x: x.sum(), lambda x: x.repeat(3)], ids=["wide", "tall"])
@pytest.mark.parametrize("chunk_size", [None, 1, "auto"])
def test_the_function_is_evaluated_once(func, chunk_size):
    for transform in (fl.jacobian, fl.value_and_jacobian):
        calls = []
        transform(lambda x, calls=calls: calls.append(1) or func(x), chunk_size=chunk_size)(X)
        assert calls == [1]


def test_values_and_auxiliary_output():
    f = lambda x, *, n: (x.repeat(n), {"twice": x * 2})
    (value, aux), matrix = fl.value_and_jacobian(f, has_aux=True)(X, n=2)
    equal((value, aux["twice"], matrix), (X.repeat(2), X * 2, torch.eye(3, dtype=X.dtype).repeat(2, 1)))
    equal(fl.jacobian(f, has_aux=True)(X, n=2), (matrix, aux))


@pytest.mark.parametrize("func", [lambda x: (x**3).prod(), lambda x: torch.outer(x.sin(), x**2)], ids=["wide", "tall"])
@pytest.mark.parametrize("chunk_size", [None, "auto"])
def test_derivatives_of_values_and_jacobians(func, chunk_size):
    def energy(x):
        value, matrix = fl.value_and_jacobian(func, chunk_size=chunk_size)(x * 2)
        return value.pow(2).sum() + matrix.pow(2).sum()

    def by_autograd(x):
        matrix = torch.autograd.functional.jacobian(func, x * 2, create_graph=True)
        return func(x * 2).pow(2).sum() + matrix.pow(2).sum()

    x = X.clone().requires_grad_()
    equal((grad(energy)(X),), torch.autograd.grad(by_autograd(x), x))
    equal(hessian(energy)(X), hessian_by_autograd(by_autograd, X)[0][0])
    batch = numbers(4, 3, seed=7)
    equal(vmap(grad(energy))(batch), torch.stack([grad(energy)(x) for x in batch]))


class AllocatedBytes(TorchDispatchMode):
    """Follows the storages that operators make: the most bytes that were alive at one time."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._known.update(storage._cdata for storage in self._storages((args, kwargs)))
        result = func(*args, **(kwargs or {}))
        for storage in self._storages(result):
            if storage._cdata not in self._known:
                self._follow(storage, storage._cdata, storage.nbytes())
        return result

    @staticmethod
    def _storages(tree):
        return [leaf.untyped_storage() for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]

    def _follow(self, storage, key, nbytes):
        self._known.add(key)
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, nbytes)

    def _forget(self, key, nbytes):
        self._known.discard(key)
        self.live -= nbytes


UP, DOWN = numbers(512, 64, seed=11) / 8, numbers(64, 512, seed=13) / 32
WIDE_INPUT = numbers(64, seed=12)


def residual_network(x):
    for _ in range(3):
        x = x + DOWN @ (UP @ x).sin()
    return x


MATRICES = {
    "jacrev": (jacrev, residual_network),
    "jacfwd": (jacfwd, residual_network),
    "hessian": (hessian, lambda x: residual_network(x).sin().sum()),
    "jacobian, wide": (fl.jacobian, lambda x: residual_network(x)[:32]),
    "jacobian, tall": (fl.jacobian, lambda x: residual_network(x).repeat(2)),
}


def measured(call):
    """The result of a call, and the most bytes that it had allocated at one time, and has at the end."""
    with AllocatedBytes() as allocated:
        result = call()
        return result, allocated.peak, allocated.live


@pytest.mark.parametrize("name", MATRICES)
def test_a_memory_budget_is_kept(name):
    transform, func = MATRICES[name]
    expected, whole, _ = measured(lambda: transform(func)(WIDE_INPUT))
    _, _, saved = measured(lambda: fl.linearize(func, WIDE_INPUT))
    for share in (0.4, 0.7):
        with fl.memory_budget(int(whole * share)):
            result, peak, _ = measured(lambda: transform(func, chunk_size="auto")(WIDE_INPUT))
        assert 0.3 * whole * share < peak <= whole * share + saved
        assert saved < 0.1 * whole
        equal(result, expected)


def passes_of(transform, func, **options):
    """The level at which each backward pass of ``func`` ran: the batch size of a vmap, 1 without one, or a name."""
    levels = []

    class Observed(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, cotangent):
            level = fl._C.current_level()
            alone = level is None
            levels.append(1 if alone else level.batch_size if level.kind == "vmap" else level.kind)
            return cotangent.clone()

    transform(lambda x: func(Observed.apply(x)), **options)(X)
    return levels


def test_the_mode_is_that_of_fewer_passes():
    for func, rows in ((torch.sum, 1), (torch.sin, 3), (lambda x: x[:2], 2)):
        assert passes_of(fl.jacobian, func) == [rows]
    for func in (lambda x: x.repeat(2), lambda x: (x, x[0]), lambda x: x[:2] + 1j):
        assert passes_of(fl.jacobian, func) == ["grad"]  # recorded once, in a pass that is transposed


def test_a_large_budget_makes_one_chunk_and_a_tiny_one_single_rows():
    auto = lambda: passes_of(jacrev, torch.sin, chunk_size="auto")
    assert auto() == [1, 3]  # one row is measured
    with fl.memory_budget(2**40):
        assert auto() == [1, 3]
        with fl.memory_budget(1):
            assert auto() == [1, 1, 1, 1]
        assert auto() == [1, 3]


@pytest.mark.parametrize("transform", [jacrev, jacfwd, fl.jacobian])
@pytest.mark.parametrize("budget", [1, 3000, 2**40])
def test_automatic_chunks_inside_other_transforms(transform, budget):
    energy = lambda x, **options: transform(mixed, (0, 1), **options)(x, Y)[0].pow(2).sum()
    batch = numbers(4, 3, seed=7)
    expected = vmap(grad(energy))(batch)
    with fl.memory_budget(budget):
        equal(vmap(grad(lambda x: energy(x, chunk_size="auto")))(batch), expected)
        equal(
            vmap(lambda x: jvp(lambda x: energy(x, chunk_size="auto"), (x,), (x,))[1])(batch), (expected * batch).sum(1)
        )


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_measuring_draws_no_random_numbers(randomness):
    f = lambda x: x * torch.rand(3, dtype=x.dtype)
    results = []
    for chunk_size in (None, "auto", 1):
        torch.manual_seed(0)
        with fl.memory_budget(1 if chunk_size == "auto" else 2**40):
            results.append((jacfwd(f, randomness=randomness, chunk_size=chunk_size)(X), torch.rand(3)))
    equal(results[1], results[0])
    equal(results[2], results[0])


def test_measuring_under_a_profiler():
    with torch.profiler.profile(profile_memory=True) as profile:
        equal(jacrev(torch.sin, chunk_size="auto")(X), torch.diag(X.cos()))
        (X + 1).sum()
    assert any(event.key == "aten::sum" for event in profile.key_averages())


def test_measuring_inside_measuring():
    inner = lambda x: jacrev(residual_network, chunk_size="auto")(x)[0]
    outer = lambda: jacfwd(inner, chunk_size="auto")(WIDE_INPUT)
    equal(outer(), jacfwd(jacrev(lambda x: residual_network(x)[0]))(WIDE_INPUT))
    with fl._C.MemoryMeter(X.device) as around, fl._C.MemoryMeter(X.device) as inside:
        x = numbers(1000)
    assert around.live == inside.live >= x.nbytes


def test_automatic_chunks_can_be_traced():
    graph = fl.make_fx(jacrev(mixed, chunk_size="auto"))(X, Y)
    equal(graph(X * 2, Y), jacrev(mixed)(X * 2, Y))


def test_memory_is_not_known_on_every_device():
    x = torch.ones(3, device="meta")
    with pytest.raises(NotImplementedError, match=r"chunk_size='auto'.*device meta.*memory_budget\(nbytes\)"):
        jacrev(torch.sin, chunk_size="auto")(x)
    with fl.memory_budget(100):
        assert jacrev(torch.sin, chunk_size="auto")(x).shape == (3, 3)
    assert fl.level_depth() == 0


# The calls that torch.func knows too, where its semantics are right.
SHARED = {
    "grad": lambda t: t.grad(lambda x: (x.sin() * x).sum())(X),
    "grad argnums": lambda t: t.grad(lambda x, y: mixed(x, y).sum(), argnums=(0, 1))(X, Y),
    "grad aux": lambda t: t.grad(lambda x: (x.exp().sum(), x * 2), has_aux=True)(X),
    "grad_and_value": lambda t: t.grad_and_value(lambda x: (x**3).sum())(X),
    "grad_and_value aux": lambda t: t.grad_and_value(lambda x: ((x**3).sum(), [x]), has_aux=True)(X),
    "grad kwargs": lambda t: t.grad(lambda x, *, w: (x * w).sum())(X, w=X),
    "vjp": lambda t: t.vjp(mixed, X, Y)[1](mixed(X, Y)),
    "vjp aux": lambda t: t.vjp(lambda x: (x.sin(), x), X, has_aux=True)[2],
    "vjp several": lambda t: t.vjp(lambda x: (x.sin(), x.exp()), X)[1]((X, X)),
    "jvp": lambda t: t.jvp(mixed, (X, Y), (X, Y)),
    "jvp aux": lambda t: t.jvp(lambda x: (x.sin(), {"x": x}), (X,), (X,), has_aux=True),
    "jvp strict": lambda t: t.jvp(torch.sin, (X,), (X,), strict=True),
    "vmap": lambda t: t.vmap(torch.dot)(M, M),
    "vmap in_dims": lambda t: t.vmap(torch.mul, in_dims=(1, None), out_dims=1)(M, M[:, 0]),
    "vmap dict": lambda t: t.vmap(lambda d: d["a"] @ d["b"], in_dims=({"a": 0, "b": None},))({"a": M, "b": X}),
    "vmap chunks": lambda t: t.vmap(torch.sin, out_dims=-1, chunk_size=2)(numbers(5, 2)),
    "vmap grad": lambda t: t.vmap(t.grad(lambda x: x.sin().sum()))(M),
    "jacrev": lambda t: t.jacrev(mixed, argnums=(0, 1))(X, Y),
    "jacrev chunks": lambda t: t.jacrev(mixed, chunk_size=2)(X, Y),
    "jacrev aux": lambda t: t.jacrev(lambda x: (x.sin(), x), has_aux=True)(X),
    "jacfwd": lambda t: t.jacfwd(mixed, argnums=(0, 1))(X, Y),
    "jacfwd aux": lambda t: t.jacfwd(lambda x: ({"s": x.sin()}, x), has_aux=True)(X),
    "jacfwd randomness": lambda t: t.jacfwd(mixed, argnums=1, randomness="same")(X, Y),
    "hessian": lambda t: t.hessian(lambda x: mixed(x, Y).sum())(X),
    "hessian argnums": lambda t: t.hessian(lambda x, y: mixed(x, y).sum(), argnums=(0, 1))(X, Y),
}


@pytest.mark.parametrize("name", SHARED)
def test_same_result_as_torch_func(name):
    import torch.func

    ours, theirs = SHARED[name](fl), SHARED[name](torch.func)
    assert pytree.tree_structure(ours) == pytree.tree_structure(theirs)
    equal(pytree.tree_leaves(ours), pytree.tree_leaves(theirs))


def test_the_definitions_in_terms_of_each_other():
    f = lambda x: mixed(x, Y).reshape(-1)
    matrix = jacrev(f)(X)
    equal(matrix @ X, jvp(f, (X,), (X,))[1])
    equal(matrix.sum(0), vjp(f, X)[1](torch.ones(12, dtype=X.dtype))[0])
    equal(matrix.sum(0), grad(lambda x: f(x).sum())(X))
