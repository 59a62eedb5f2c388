"""Random operators under vmap: what each setting means, in chunks, in nested maps and under derivatives."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import distributions
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from functorch_lite import _C, grad, hessian, jacfwd, jacrev, jvp, vmap

MODES = ["same", "different"]
aten = torch.ops.aten


def probabilities(*shape, seed=1):
    return 0.1 + 0.8 * torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def seeded(func, *args):
    """The results of ``func``, a tensor or several, and the state in which it leaves the generator."""
    torch.manual_seed(0)
    result = func(*args)
    return [*([result] if isinstance(result, torch.Tensor) else result), torch.get_rng_state()]


def assert_equal(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0, equal_nan=True) if a.is_floating_point() else None
        assert a.is_floating_point() or torch.equal(a, b)


def assert_same_bits(got, expected):
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def filled(name, *args):
    return lambda x: getattr(torch.empty_like(x), name)(*args)


# Functions of an example of any shape, of numbers between 0 and 1.
FACTORIES = {
    "rand": lambda x: torch.rand(3, 2),
    "rand double": lambda x: torch.rand(3, dtype=torch.float64),
    "randn": lambda x: torch.randn(20),
    "randint": lambda x: torch.randint(9, (4,)),
    "randint.low": lambda x: torch.randint(3, 9, (4,)),
    "normal.float_float": lambda x: torch.normal(1.0, 2.0, (3,)),
}
SHAPED = {
    "randperm": lambda x: torch.randperm(6),
    "rand_like": torch.rand_like,
    "rand_like of a transposed": lambda x: torch.rand_like(x.expand(2, *x.shape).transpose(0, -1)),
    "rand_like in a format": lambda x: (
        torch.rand_like(x.expand(2, 3, 4, *x.shape[:1]), memory_format=torch.channels_last)
        if x.dim() == 1
        else torch.rand_like(x)
    ),
    "randn_like": torch.randn_like,
    "randint_like": lambda x: torch.randint_like(x, 9),
    "randint_like.low_dtype": lambda x: torch.randint_like(x, 3, 9),
    "randint_like.Tensor": lambda x: torch.randint_like(x, torch.tensor(7)),
    "bernoulli.p": lambda x: torch.bernoulli(x, 0.4),
    "normal_functional": aten.normal_functional,
    "uniform": aten.uniform,
    "exponential": aten.exponential,
    "geometric": lambda x: aten.geometric(x, 0.3),
    "cauchy": aten.cauchy,
    "log_normal": aten.log_normal,
    "random": aten.random,
    "random.from": lambda x: aten.random(x, 3, 9),
    "random.to": lambda x: aten.random(x, 9),
}
IN_PLACE = {
    **{name: filled(name) for name in ("normal_", "uniform_", "exponential_", "cauchy_", "log_normal_", "random_")},
    "bernoulli_.float": filled("bernoulli_", 0.4),
    "bernoulli_.Tensor": lambda x: torch.empty_like(x).bernoulli_(x),
    "geometric_": filled("geometric_", 0.3),
    "random_.from": filled("random_", 3, 9),
    "random_.to": filled("random_", 9),
    "rand.out": lambda x: torch.rand(3, out=x.new_empty(3)),
    "randperm.out": lambda x: torch.randperm(3, out=x.new_empty(3, dtype=torch.int64)),
    "multinomial.out": lambda x: torch.multinomial(flat(x), 1, out=x.new_empty(1, dtype=torch.int64)),
    "normal.out": lambda x: torch.normal(x, 1.0, out=torch.empty_like(x)),
    "bernoulli.out": lambda x: torch.bernoulli(x, out=torch.empty_like(x)),
    "bernoulli.float_out": lambda x: aten.bernoulli.float_out(x, 0.4, out=torch.empty_like(x)),
    "native_dropout.out": lambda x: aten.native_dropout.out(
        x, 0.4, True, out0=torch.empty_like(x), out1=torch.empty_like(x, dtype=torch.bool)
    )[0],
    "nn.init.kaiming_uniform_": lambda x: torch.nn.init.kaiming_uniform_(x.new_empty(3, 4)),
    "nn.init.orthogonal_": lambda x: torch.nn.init.orthogonal_(x.new_empty(3, 4)),
    "nn.init.sparse_": lambda x: torch.nn.init.sparse_(x.new_empty(4, 3), 0.5),
}
WITH_PARAMETERS = {
    "bernoulli": torch.bernoulli,
    "bernoulli double": lambda x: torch.bernoulli(x.double()),
    "bernoulli bfloat16": lambda x: torch.bernoulli(x.bfloat16()),
    "bernoulli.Tensor": lambda x: aten.bernoulli.Tensor(torch.zeros_like(x), x),
    "normal.Tensor_Tensor": lambda x: torch.normal(x, x * 2),
    "normal of two ranks": lambda x: torch.normal(torch.ones(2, *x.shape), x.flatten()[0]),
    "normal.Tensor_float": lambda x: torch.normal(x, 2.0),
    "normal.float_Tensor": lambda x: torch.normal(1.5, x),
    "multinomial": lambda x: torch.multinomial(x.reshape(-1), 1),
    "multinomial several": lambda x: torch.multinomial(x.reshape(-1), x.numel() // 2 + 1),
    "multinomial of a matrix": lambda x: torch.multinomial(torch.stack([x.reshape(-1)] * 2), 1),
    "multinomial with replacement": lambda x: torch.multinomial(x.reshape(-1), 5, replacement=True),
    "poisson": lambda x: torch.poisson(9 * x),
    "_standard_gamma": torch._standard_gamma,
    "binomial": lambda x: torch.binomial(torch.full_like(x, 9.0), x),
    "_sample_dirichlet": lambda x: torch._sample_dirichlet(x.reshape(-1)),
}
NN = {
    "dropout": lambda x: F.dropout(x, 0.4),
    "dropout all": lambda x: F.dropout(x, 1.0),
    "dropout_": lambda x: F.dropout(x.clone(), 0.4, inplace=True),
    "native_dropout": lambda x: torch.native_dropout(x, 0.4, True)[0],
    "mask of native_dropout": lambda x: torch.native_dropout(x, 0.4, True)[1],
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.4, True),
    "alpha_dropout_": lambda x: F.alpha_dropout(x.clone(), 0.4, True, inplace=True),
    "feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x.reshape(1, -1, 1), 0.4, True),
    "feature_dropout_": lambda x: torch.feature_dropout_(x.reshape(1, -1, 1).clone(), 0.4, True),
    "dropout1d": lambda x: F.dropout1d(x.reshape(-1, 1), 0.4),
    "dropout2d": lambda x: F.dropout2d(x.reshape(1, -1, 1, 1), 0.4),
    "dropout3d": lambda x: F.dropout3d(x.reshape(-1, 1, 1, 1), 0.4),
    "rrelu": lambda x: F.rrelu(x - 0.5, training=True),
    "rrelu bfloat16": lambda x: F.rrelu((x - 0.5).bfloat16(), training=True),
    "rrelu double": lambda x: F.rrelu((x - 0.5).double(), training=True),
    "rrelu_": lambda x: F.rrelu_(x - 0.5, training=True),
    "gumbel_softmax": lambda x: F.gumbel_softmax(x.reshape(-1), hard=True),
    "fractional_max_pool2d": lambda x: F.fractional_max_pool2d(x.sum() * torch.arange(50.0).reshape(2, 5, 5), 2, 3),
    "fractional_max_pool3d": lambda x: F.fractional_max_pool3d(x.sum() * torch.arange(250.0).reshape(2, 5, 5, 5), 2, 3),
}


def sample(distribution, *parameters):
    def func(x):
        made = distribution(*(p(x) for p in parameters), validate_args=False)
        return made.rsample() if made.has_rsample else made.sample()

    return func


def itself(x):
    return x


def flat(x):
    return x.reshape(-1)


DISTRIBUTIONS = {
    "Bernoulli": sample(distributions.Bernoulli, itself),
    "Beta": sample(distributions.Beta, itself, itself),
    "Binomial": sample(distributions.Binomial, lambda x: 9, itself),
    "Categorical": sample(distributions.Categorical, flat),
    "Cauchy": sample(distributions.Cauchy, itself, itself),
    "Dirichlet": sample(distributions.Dirichlet, flat),
    "Exponential": sample(distributions.Exponential, itself),
    "Gamma": sample(distributions.Gamma, itself, itself),
    "Geometric": sample(distributions.Geometric, itself),
    "Gumbel": sample(distributions.Gumbel, itself, itself),
    "Laplace": sample(distributions.Laplace, itself, itself),
    "MultivariateNormal": sample(distributions.MultivariateNormal, flat, lambda x: torch.eye(x.numel())),
    "Normal": sample(distributions.Normal, itself, itself),
    "Poisson": sample(distributions.Poisson, itself),
    "Uniform": sample(distributions.Uniform, itself, lambda x: x + 1),
}
ALL = {**FACTORIES, **SHAPED, **IN_PLACE, **WITH_PARAMETERS, **NN, **DISTRIBUTIONS}
every_function = pytest.mark.parametrize("func", ALL.values(), ids=ALL.keys())


@every_function
@pytest.mark.parametrize("shape", [(3,), (2, 4, 5), (1, 3)], ids=str)
def test_same_is_each_example_with_the_same_seed(func, shape):
    xs = probabilities(*shape)
    expected = torch.stack([seeded(func, x)[0] for x in xs])
    assert_equal(seeded(vmap(func, randomness="same"), xs)[:1], [expected])


@pytest.mark.parametrize("func", [pytest.param(f, id=name) for name, f in ALL.items() if "rrelu" not in name])
def test_same_leaves_the_generator_as_the_first_example_does(func):
    xs = probabilities(3, 6)
    assert torch.equal(seeded(vmap(func, randomness="same"), xs)[-1], seeded(func, xs[0])[-1])


@pytest.mark.parametrize("func", FACTORIES.values(), ids=FACTORIES.keys())
@pytest.mark.parametrize("batch_size", [0, 1, 3])
def test_different_factories_draw_one_tensor(func, batch_size):
    sizes = {"rand": (3, 2), "rand double": (3,), "randn": (20,), "normal.float_float": (3,)}
    name = next(name for name, candidate in FACTORIES.items() if candidate is func)
    size = (batch_size, *sizes.get(name, (4,)))
    plain = {
        "rand": lambda: torch.rand(size),
        "rand double": lambda: torch.rand(size, dtype=torch.float64),
        "randn": lambda: torch.randn(size),
        "randint": lambda: torch.randint(9, size),
        "randint.low": lambda: torch.randint(3, 9, size),
        "normal.float_float": lambda: torch.normal(1.0, 2.0, size),
    }[name]
    assert_same_bits(seeded(vmap(func, randomness="different"), torch.zeros(batch_size)), seeded(plain))


@every_function
def test_different_examples_have_different_numbers(func):
    x = probabilities(40).expand(6, 40)
    got = vmap(func, randomness="different")(x)
    assert got.shape == (6, *func(x[0]).shape)
    assert got.double().unique(dim=0).shape[0] > 1 or func is NN["dropout all"]


@every_function
@pytest.mark.parametrize("randomness", MODES)
def test_empty_batches(func, randomness):
    x = probabilities(2, 6)
    got = vmap(func, randomness=randomness)(x[:0])
    assert got.shape == (0, *func(x[0]).shape)
    assert got.dtype == func(x[0]).dtype


@every_function
@pytest.mark.parametrize("randomness", MODES)
def test_numbers_do_not_depend_on_where_the_batch_is(func, randomness):
    x = probabilities(3, 4)
    front = seeded(vmap(func, randomness=randomness), x)
    assert_equal(seeded(vmap(func, in_dims=1, randomness=randomness), x.T.contiguous()), front)


@every_function
@pytest.mark.parametrize("randomness", MODES)
def test_chunks_draw_the_same_numbers(func, randomness):
    several = lambda x: (func(x), torch.rand(3), func(x), torch.randn(20))
    xs = probabilities(5, 6)
    expected = seeded(vmap(several, randomness=randomness), xs)
    for chunk_size in (1, 3):
        assert_equal(seeded(vmap(several, randomness=randomness, chunk_size=chunk_size), xs), expected)


NESTED = ("randn", "rand_like", "normal_", "bernoulli", "normal of two ranks", "multinomial", "dropout", "rrelu")
SAMPLED = ("poisson", "_standard_gamma", "multinomial with replacement", "randperm", "Dirichlet")


@pytest.mark.parametrize("name", [*NESTED, *SAMPLED])
@pytest.mark.parametrize("outer", MODES)
@pytest.mark.parametrize("inner", MODES)
def test_chunks_in_nested_maps(name, outer, inner):
    several = lambda x, _: (ALL[name](x), torch.rand(3), ALL[name](x))

    def run(x, dims, outer_chunk=None, inner_chunk=None):
        inside = vmap(several, (dims[1], 0), randomness=inner, chunk_size=inner_chunk)
        both = vmap(inside, (dims[0], None), randomness=outer, chunk_size=outer_chunk)
        return seeded(lambda: both(x, torch.zeros(4)))

    x = probabilities(3, 4, 5)
    for part, dims in ((x, (0, 0)), (x[:, 0], (0, None))):
        expected = run(part, dims)
        for outer_chunk, inner_chunk in ((2, None), (None, 3), (2, 3)):
            assert_equal(run(part, dims, outer_chunk, inner_chunk), expected)


def test_settings_of_nested_maps():
    x = torch.zeros(2, 3, 4)
    for outer, inner in itertools.product(MODES, MODES):
        y = vmap(vmap(torch.randn_like, randomness=inner), randomness=outer)(x)
        assert torch.equal(y[0], y[1]) == (outer == "same")
        assert torch.equal(y[:, 0], y[:, 1]) == (inner == "same")


def test_numbers_of_parameters_that_only_the_inner_map_has():
    p = probabilities(3, 4)
    both = lambda mode: vmap(lambda _: vmap(torch.bernoulli, randomness="same")(p), randomness=mode)(torch.zeros(2))
    assert torch.equal(*both("same"))
    torch.manual_seed(0)
    assert not torch.equal(*both("different"))


WITH_GENERATOR = {
    "rand": lambda x, g: torch.rand(3, generator=g),
    "randn": lambda x, g: torch.randn(20, generator=g),
    "randint": lambda x, g: torch.randint(9, (5,), generator=g),
    "randperm": lambda x, g: torch.randperm(5, generator=g),
    "rand_like": lambda x, g: torch.rand_like(x, generator=g),
    "normal_": lambda x, g: torch.empty_like(x).normal_(generator=g),
    "bernoulli": lambda x, g: torch.bernoulli(x, generator=g),
    "normal": lambda x, g: torch.normal(x, x, generator=g),
    "multinomial": lambda x, g: torch.multinomial(x, 2, generator=g),
    "poisson": lambda x, g: torch.poisson(x, generator=g),
    "binomial": lambda x, g: torch.binomial(9 * torch.ones_like(x), x, generator=g),
    "rrelu": lambda x, g: torch.rrelu(x - 0.5, training=True, generator=g),
}


@pytest.mark.parametrize("func", WITH_GENERATOR.values(), ids=WITH_GENERATOR.keys())
@pytest.mark.parametrize("randomness", MODES)
def test_explicit_generators(func, randomness):
    xs = probabilities(5, 6)

    def run(chunk_size=None):
        generator = torch.Generator().manual_seed(3)
        both = lambda x: (func(x, generator), torch.rand(2), func(x, generator))
        return [*seeded(vmap(both, randomness=randomness, chunk_size=chunk_size), xs), generator.get_state()]

    expected = run()
    default = vmap(lambda x: func(x, None), randomness=randomness)
    torch.manual_seed(3)
    assert_equal([expected[0]], [default(xs)])
    for chunk_size in (2, 4):
        assert_equal(run(chunk_size), expected)


def test_fills_of_captured_tensors():
    captured = torch.zeros(4)
    torch.manual_seed(0)
    vmap(lambda x: x + captured.normal_(), randomness="same")(torch.zeros(3, 4))
    torch.manual_seed(0)
    assert torch.equal(captured, torch.zeros(4).normal_())


@pytest.mark.parametrize("name", ["rand", "rand_like", "bernoulli", "poisson", "dropout", "multinomial", "normal_"])
def test_the_error_names_the_operator_and_the_line(name):
    with pytest.raises(RuntimeError, match=rf"aten::{name}.*test_randomness\.py:\d+.*randomness='different'"):
        vmap(ALL[name])(probabilities(2, 3))


def test_the_error_of_every_random_function():
    for func in ALL.values():
        if func is not NN["dropout all"]:
            with pytest.raises(RuntimeError, match=r"called the random operator aten::\w+"):
                vmap(func)(probabilities(2, 3))


def test_nothing_is_drawn_in_evaluation_mode():
    x = torch.randn(3, 4)
    for dropout in (F.dropout, F.alpha_dropout, F.feature_alpha_dropout):
        assert torch.equal(vmap(lambda x, f=dropout: f(x, 0.5, False))(x), x)
    assert torch.equal(vmap(lambda x: F.rrelu(x, training=False))(x), F.rrelu(x, training=False))
    assert torch.equal(vmap(lambda x: torch.native_dropout(x, 0.5, False)[0])(x), x)


def test_parameters_outside_their_range():
    bad = torch.tensor([[0.5, 0.5], [0.5, -1.0]])
    for func in (torch.bernoulli, lambda x: torch.normal(0.0, x), lambda x: torch.multinomial(x, 1)):
        for randomness in MODES:
            with pytest.raises(RuntimeError):
                vmap(func, randomness=randomness)(bad)


@pytest.mark.parametrize("randomness", MODES)
def test_derivatives(randomness):
    x = probabilities(3, 50) + 1
    for func in (lambda x: F.dropout(x, 0.4).sum(), lambda x: torch.native_dropout(x, 0.4, True)[0].sum()):
        gradient, _ = seeded(vmap(grad(func), randomness=randomness), x)
        assert set(gradient.unique().tolist()) == {0.0, gradient.max().item()}
        assert gradient.max().item() == pytest.approx(1 / 0.6)
        outside, _ = seeded(grad(lambda x, f=func: vmap(f, randomness=randomness)(x).sum()), x)
        assert torch.equal(gradient, outside)


@pytest.mark.parametrize("in_place", [False, True])
def test_derivatives_of_rrelu(in_place):
    x = torch.randn(3, 6, dtype=torch.float64)
    func = lambda x: F.rrelu(x.clone(), training=True, inplace=in_place).square().sum()
    for randomness in MODES:
        inside, _ = seeded(vmap(grad(func), randomness=randomness), x)
        outside, _ = seeded(grad(lambda x, r=randomness: vmap(func, randomness=r)(x).sum()), x)
        torch.testing.assert_close(inside, outside)
        torch.testing.assert_close(inside[x > 0], 2 * x[x > 0])
        assert inside[x < 0].div(2 * x[x < 0]).sqrt().sub(0.23).abs().max() < 0.11


def test_tracing_with_symbolic_sizes():
    for name in (
        "dropout",
        "rand_like",
        "normal_",
        "bernoulli",
        "normal.Tensor_Tensor",
        "multinomial",
        "rrelu",
        "randperm",
    ):
        for randomness in MODES:
            mapped = vmap(ALL[name], randomness=randomness)
            graph = make_fx(mapped, tracing_mode="symbolic")(probabilities(3, 4))
            x = probabilities(5, 4)
            assert_equal(seeded(graph, x), seeded(mapped, x))


@pytest.mark.parametrize("name", ["Normal", "Gamma", "Exponential", "Laplace"])
@pytest.mark.parametrize("randomness", MODES)
def test_derivatives_of_reparametrized_samples(name, randomness):
    x = probabilities(3, 4).double() + 0.5
    func = lambda x: ALL[name](x).square().sum()
    inside, _ = seeded(vmap(grad(func), randomness=randomness), x)
    outside, _ = seeded(grad(lambda x: vmap(func, randomness=randomness)(x).sum()), x)
    torch.testing.assert_close(inside, outside)
    if randomness == "same":
        for i in range(3):
            leaf = x[i].clone().requires_grad_()
            torch.manual_seed(0)
            torch.testing.assert_close(inside[i], torch.autograd.grad(func(leaf), leaf)[0])


def test_tangents_of_reparametrized_samples():
    x, t = probabilities(3, 4).double(), probabilities(3, 4, seed=2).double()
    func = sample(distributions.Normal, itself, itself)
    y, tangent, _ = seeded(vmap(lambda x, t: jvp(func, (x,), (t,)), randomness="different"), x, t)
    torch.testing.assert_close(tangent, t * y / x)


def test_draws_have_no_derivative():
    x = probabilities(3, 4)
    for func in (torch.bernoulli, lambda x: torch.normal(x, x), torch.poisson):
        for randomness in MODES:
            gradient = grad(lambda x, f=func, r=randomness: vmap(f, randomness=r)(x).sum() + x.sum())(x)
            assert torch.equal(gradient, torch.ones(3, 4))


def test_permutations_are_uniform():
    torch.manual_seed(0)
    n = 6000
    got = vmap(lambda _: torch.randperm(3), randomness="different")(torch.zeros(n))
    _, counts = got.unique(dim=0, return_counts=True)
    assert counts.shape == (6,)
    assert ((counts - n / 6).abs() < 5 * math.sqrt(n / 6)).all()


def test_permutations_of_many_elements():
    # With keys of 24 random bits, about 190 of 80000 would be equal, and equal keys keep their order.
    p = vmap(lambda _: torch.randperm(80000, dtype=torch.int32), randomness="different")(torch.zeros(2))
    assert p.dtype == torch.int32
    assert torch.equal(p.sort().values, torch.arange(80000, dtype=torch.int32).expand(2, -1))


MOMENTS = {
    "randn": (lambda _: torch.randn(()), 0.0, 1.0),
    "rand": (lambda _: torch.rand(()), 0.5, 1 / 12),
    "bernoulli": (lambda _: torch.bernoulli(torch.tensor(0.3)), 0.3, 0.21),
    "poisson": (lambda _: torch.poisson(torch.tensor(4.0)), 4.0, 4.0),
    "gamma": (lambda _: torch._standard_gamma(torch.tensor(2.0)), 2.0, 2.0),
    "binomial": (lambda _: torch.binomial(torch.tensor(10.0), torch.tensor(0.3)), 3.0, 2.1),
    "exponential": (lambda _: aten.exponential(torch.zeros(()), 0.5), 2.0, 4.0),
    "geometric": (lambda _: aten.geometric(torch.zeros(()), 0.5), 2.0, 2.0),
    "multinomial": (lambda _: torch.multinomial(torch.tensor([0.3, 0.7]), 1)[0].float(), 0.7, 0.21),
    "dropout": (lambda _: F.dropout(torch.ones(()), 0.2), 1.0, 0.25),
    "rrelu": (lambda _: F.rrelu(-torch.ones(()), 0.1, 0.5, True), -0.3, 0.16 / 12),
}


@pytest.mark.parametrize(("func", "mean", "variance"), MOMENTS.values(), ids=MOMENTS.keys())
@pytest.mark.parametrize("nested", [False, True])
def test_mean_and_variance(func, mean, variance, nested):
    n = 2500
    mapped = vmap(func, randomness="different")
    if nested:
        mapped = vmap(mapped, randomness="different")
    y, _ = seeded(mapped, torch.zeros(50, 50) if nested else torch.zeros(n))
    y = y.double().flatten()
    assert abs(y.mean() - mean) < 5 * math.sqrt(variance / n)
    assert abs(y.var() - variance) < 0.25 * variance
    assert abs((y[1:] - mean) @ (y[:-1] - mean) / n) < 5 * variance / math.sqrt(n)


# jacfwd, jacrev and hessian


def masked(x):
    return F.dropout(x.sin(), 0.5)


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_passes_of_forward_mode_share_the_mask(chunk_size):
    x = torch.randn(7, dtype=torch.float64)
    got, _ = seeded(jacfwd(masked, randomness="same", chunk_size=chunk_size), x)
    (mask, _) = seeded(lambda: F.dropout(torch.ones_like(x), 0.5))
    torch.testing.assert_close(got, torch.diag(mask * x.cos()))
    curvature, _ = seeded(hessian(lambda x: masked(x).sum(), randomness="same", chunk_size=chunk_size), x)
    torch.testing.assert_close(curvature, torch.diag(-mask * x.sin()))


@pytest.mark.parametrize("randomness", MODES)
def test_chunks_of_forward_mode(randomness):
    x = torch.randn(2, 4)
    func = lambda x: x.sum() * torch.rand(3) + torch.poisson(x.abs()).sum() + torch.randn(20).sum() * x.sum()
    expected = seeded(jacfwd(func, randomness=randomness), x)
    for chunk_size in (1, 3, 5):
        assert_equal(seeded(jacfwd(func, randomness=randomness, chunk_size=chunk_size), x), expected)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_checkpoints_in_reverse_mode_repeat_the_mask(chunk_size):
    x = torch.randn(5, dtype=torch.float64)
    func = lambda x: checkpoint(masked, x, use_reentrant=False)
    got = seeded(jacrev(func, chunk_size=chunk_size), x)
    assert_equal(got, seeded(jacrev(masked), x))


def test_auxiliary_output_that_differs_between_passes():
    func = lambda x: (x.sin(), torch.rand(2))
    jacobian, aux = jacfwd(func, has_aux=True, randomness="same")(torch.ones(3))
    assert aux.shape == (2,)
    with pytest.raises(ValueError, match="jacfwd: the auxiliary output depends on random numbers.*randomness='same'"):
        jacfwd(func, has_aux=True, randomness="different")(torch.ones(3))


# Operators without a rule


@pytest.fixture(scope="module")
def draw():
    library = torch.library.Library("test_randomness", "DEF")
    library.define("draw(Tensor x) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
    library.impl("draw", torch.poisson, "CPU")
    yield torch.ops.test_randomness.draw
    library._destroy()


@pytest.mark.filterwarnings("ignore::functorch_lite.LoopFallbackWarning")
def test_operators_without_a_rule(draw):
    xs = 9 * probabilities(5, 6)
    expected = torch.stack([seeded(draw, x)[0] for x in xs])
    assert torch.equal(seeded(vmap(draw, randomness="same"), xs)[0], expected)
    for randomness in MODES:
        several = lambda x: (draw(x), torch.rand(2), draw(x))
        whole = seeded(vmap(several, randomness=randomness), xs)
        assert not torch.equal(*whole[0][:2])
        assert_same_bits(seeded(vmap(several, randomness=randomness, chunk_size=2), xs), whole)


def test_every_random_operator_is_known():
    """Each has a rule, or is composed of others, or is a kernel that attention and recurrent layers choose."""
    kernels = ("attention", "sdp", "_rnn", "lstm_mps", "dropout_state", "dropout_mask", "_nested_tensor_softmax")
    rules = {name for name, _ in _C.batching_rules()}
    for name in torch._C._dispatch_get_all_op_names():
        packet, _, overload = name.removeprefix("aten::").partition(".")
        if not name.startswith("aten::") or any(kernel in name for kernel in kernels) or overload.endswith("out"):
            continue
        op = getattr(getattr(aten, packet, None), overload or "default", None)
        composed = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
        if op is not None and torch.Tag.nondeterministic_seeded in op.tags and not composed:
            assert name in rules


class Noisy(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x + torch.rand(3) + torch.poisson(x.abs())

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return 2 * g


@pytest.mark.parametrize("randomness", MODES)
def test_chunks_of_functions(randomness):
    xs = probabilities(5, 3)
    func = lambda x: (Noisy.apply(x), torch.rand(2))
    both = lambda chunk_size: vmap(func, randomness=randomness, chunk_size=chunk_size)
    for chunk_size in (2, 3):
        assert_equal(seeded(both(chunk_size), xs), seeded(both(None), xs))
        outside = lambda c: grad(lambda x: sum(y.square().sum() for y in both(c)(x)))(xs)
        assert_equal(seeded(outside, chunk_size), seeded(outside, None))


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_new_tensors_of_wrappers():
    def made(x):
        empty = [x.new(2, 3), x.new(torch.Size([2])), x.new()]
        filled = [x.new([1, 2]), x.new(torch.ones(2)), x.new_tensor(3.0), x.new_tensor([1.5], dtype=torch.float64)]
        filled += [x.new_tensor(torch.ones(2)), x.new_tensor(1, device="cpu")]
        return [*(torch.zeros_like(y) for y in empty), *filled]

    x = torch.ones(3)
    expected = made(x)
    assert_same_bits(grad(lambda x: (x.sum(), made(x)), has_aux=True)(x)[1], expected)
    for result, one in zip(vmap(made)(torch.ones(2, 3)), expected, strict=True):
        assert result.dtype == one.dtype
        assert torch.equal(result, one.expand(2, *one.shape))
