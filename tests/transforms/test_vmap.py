"""vmap: what is mapped, where results go, random numbers, chunks, dtypes and writes. Judged by loops."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree

from functorch_lite import grad, vmap

Pair = namedtuple("Pair", ["a", "b"])


@dataclass
class State:
    position: torch.Tensor
    velocity: torch.Tensor


pytree.register_dataclass(State)


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def loop(func, *args, out_dim=0):
    """``func`` of each example, stacked: every argument is mapped over dimension 0."""
    return torch.stack([func(*example) for example in zip(*args, strict=True)], out_dim)


def equal(got, expected):
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_in_dims_int(dim):
    x = numbers(2, 3, 4)
    equal(vmap(lambda x: x.cumsum(0), in_dims=dim)(x), loop(lambda x: x.cumsum(0), x.movedim(dim, 0)))


@pytest.mark.parametrize("in_dims", [(1, None), [1, None], (-1, None)])
def test_in_dims_with_none(in_dims):
    x, w = numbers(3, 2), numbers(3, seed=1)
    equal(vmap(torch.dot, in_dims=in_dims)(x, w), torch.stack([x[:, i] @ w for i in range(2)]))


def test_in_dims_int_maps_every_tensor_of_every_argument():
    x, y = numbers(2, 3), numbers(2, 3, seed=1)
    equal(vmap(lambda t, d: t[0] * d["y"], in_dims=0)((x,), {"y": y}), x * y)


@pytest.mark.parametrize(
    "in_dims",
    [({"w": 0, "b": None}, (1, [0])), ({"w": 0, "b": None}, (1, 0)), [{"w": 0, "b": None}, (-1, [-2])]],
)
def test_in_dims_nested(in_dims):
    tree, rest = {"w": numbers(2, 3), "b": numbers(3, seed=1)}, (numbers(3, 2, seed=2), [numbers(2, 3, seed=3)])
    f = lambda d, rest: d["w"] + d["b"] * rest[0] - rest[1][0]
    equal(vmap(f, in_dims=in_dims)(tree, rest), tree["w"] + tree["b"] * rest[0].T - rest[1][0])


def test_in_dims_prefix_of_one_entry_for_a_whole_argument():
    tree = {"w": numbers(3, 2), "b": [numbers(3, 2, seed=1)]}
    equal(vmap(lambda d, c: d["w"] * d["b"][0] + c, in_dims=(1, None))(tree, 1.5), (tree["w"] * tree["b"][0]).T + 1.5)


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_dictionaries(kind):
    tree = kind(b=numbers(2, 3), a=numbers(3, seed=1))
    result = vmap(lambda d: kind(z=d["b"] - d["a"]), in_dims=(kind(b=0, a=None),))(tree)
    assert type(result) is kind
    equal(result["z"], tree["b"] - tree["a"])


def test_namedtuples():
    pair = Pair(numbers(2, 3), numbers(3, 2, seed=1))
    result = vmap(lambda p: Pair(p.a + p.b, p.a.sum()), in_dims=(Pair(0, 1),), out_dims=Pair(1, 0))(pair)
    assert type(result) is Pair
    equal(result.a, (pair.a + pair.b.T).T)
    equal(result.b, pair.a.sum(1))


def test_registered_dataclasses():
    state = State(numbers(2, 3), numbers(2, 3, seed=1))
    result = vmap(lambda s: State(s.position + s.velocity, s.velocity))(state)
    assert type(result) is State
    equal(result.position, state.position + state.velocity)
    shared = State(state.position, numbers(3))
    f = lambda s: State(s.position * s.velocity, s.velocity)
    result = vmap(f, in_dims=(State(0, None),), out_dims=State(1, None))(shared)
    equal(result.position, (shared.position * shared.velocity).T)
    equal(result.velocity, shared.velocity)


def test_leaves_that_are_no_tensors_pass_with_in_dim_none():
    x = numbers(2, 3)
    f = lambda x, options, power: x**power * options["scale"] if options["name"] == "on" else x
    equal(vmap(f, in_dims=(0, None, None))(x, {"name": "on", "scale": 2.0}, 3), x**3 * 2.0)
    equal(vmap(lambda t: t[0] * t[1], in_dims=((0, None),))((x, 2)), x * 2)


def test_keyword_arguments_are_not_mapped():
    x, w = numbers(2, 3), numbers(2, seed=1)
    equal(vmap(lambda x, *, w, power=1: x.sum() * w**power)(x, w=w, power=2), x.sum(1)[:, None] * w**2)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_out_dims_int(dim):
    x = numbers(2, 3, 4)
    equal(vmap(torch.sin, out_dims=dim)(x), loop(torch.sin, x, out_dim=dim))


def test_out_dims_of_several_outputs():
    x = numbers(2, 3)
    a, b, c = vmap(lambda x: (x, x.sum(), torch.ones(2)), out_dims=(1, 0, None))(x)
    equal(a, x.T)
    equal(b, x.sum(1))
    equal(c, torch.ones(2))


@pytest.mark.parametrize("out_dims", [{"a": 1, "b": (0, -1)}, {"a": 1, "b": [0, 1]}])
def test_out_dims_nested(out_dims):
    x = numbers(2, 3)
    kind = type(out_dims["b"])
    result = vmap(lambda x: {"a": x, "b": kind([x.exp(), x.sin()])}, out_dims=out_dims)(x)
    equal(result, {"a": x.T, "b": kind([x.exp(), x.sin().T])})


def test_out_dims_prefix():
    x = numbers(2, 3)
    result = vmap(lambda x: ([x, x * 2], x.sum()), out_dims=(1, 0))(x)
    equal(result, ([x.T, x.T * 2], x.sum(1)))


def test_outputs_that_do_not_depend_on_the_example():
    c = numbers(4)
    equal(vmap(lambda x: c)(numbers(3, 2)), c.expand(3, 4))
    equal(vmap(lambda x: c, out_dims=1)(numbers(3, 2)), c.expand(3, 4).T)
    assert vmap(lambda x: c, out_dims=None)(numbers(3, 2)).data_ptr() == c.data_ptr()


def test_out_dims_none_passes_other_values_on():
    result = vmap(lambda x: (x, "name", 3, None), out_dims=(0, None, None, None))(numbers(2, 3))
    assert result[1:] == ("name", 3, None)


def test_outputs_are_views_of_inputs():
    x = numbers(2, 3, 4)
    for f in (lambda x: x, lambda x: x[1], lambda x: x.T, lambda x: x[:, ::2]):
        assert vmap(f)(x)._base is x or vmap(f)(x) is x or vmap(f)(x).data_ptr() >= x.data_ptr()
        assert vmap(f)(x).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_writes_into_inputs_are_seen_outside():
    x, before = numbers(2, 3), numbers(2, 3)
    vmap(lambda x: x.mul_(2))(x)
    equal(x, before * 2)
    vmap(lambda x: x[0].zero_(), in_dims=1)(x)
    equal(x, torch.stack([torch.zeros(3, dtype=x.dtype), before[1] * 2]))


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 4, 5, 100])
def test_chunks_change_nothing(chunk_size):
    x, w = numbers(3, 5, 2), numbers(3, seed=1)
    f = lambda x, w: (x.T @ w, (x * 2).sum(), w.sum())
    expected = vmap(f, in_dims=(1, None), out_dims=(1, 0, None))(x, w)
    equal(vmap(f, in_dims=(1, None), out_dims=(1, 0, None), chunk_size=chunk_size)(x, w), expected)


@pytest.mark.parametrize("chunk_size", [1, 2, 7])
def test_chunks_pass_other_outputs_on(chunk_size):
    f = lambda x: {"y": x, "n": None, "s": "text"}
    result = vmap(f, out_dims={"y": -1, "n": None, "s": None}, chunk_size=chunk_size)(numbers(5, 3))
    assert result["n"] is None
    assert result["s"] == "text"
    equal(result["y"], numbers(5, 3).T)


def test_chunks_bound_the_batch():
    seen = []
    vmap(lambda x: seen.append(1) or x, chunk_size=2)(numbers(5, 3))
    assert len(seen) == 3


def test_chunks_write_into_inputs():
    x = numbers(5, 3)
    vmap(lambda x: x.zero_(), chunk_size=2)(x)
    assert not x.any()


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_empty_batch(chunk_size):
    f = lambda x, w: (x @ w, x.sum(), torch.cat([x, x]), x.softmax(-1), w)
    result = vmap(f, in_dims=(0, None), chunk_size=chunk_size)(numbers(0, 3), numbers(3, 2))
    assert [tuple(y.shape) for y in result] == [(0, 2), (0,), (0, 6), (0, 3), (0, 3, 2)]


def test_empty_batch_of_a_gradient():
    assert vmap(grad(lambda x: x.sin().sum()))(numbers(0, 3)).shape == (0, 3)


def test_nested_maps_make_an_outer_product():
    x, y = numbers(2), numbers(3, seed=1)
    equal(vmap(vmap(torch.mul, in_dims=(None, 0)), in_dims=(0, None))(x, y), torch.outer(x, y))
    equal(vmap(vmap(torch.mul, in_dims=(0, None)), in_dims=(None, 0))(x, y), torch.outer(y, x))


@pytest.mark.parametrize(("outer", "inner"), [(0, 0), (1, 0), (2, 1), (-1, -1), (0, 1)])
def test_nested_maps(outer, inner):
    x = numbers(2, 3, 4)
    expected = torch.stack([torch.stack([e.sort().values for e in row.unbind(inner)]) for row in x.unbind(outer)])
    equal(vmap(vmap(lambda x: x.sort().values, in_dims=inner), in_dims=outer)(x), expected)


def test_three_maps_with_captured_values():
    x, y, z = numbers(2), numbers(3, seed=1), numbers(4, seed=2)
    f = lambda x: vmap(lambda y: vmap(lambda z: x * y - z)(z))(y)
    equal(vmap(f)(x), x[:, None, None] * y[:, None] - z)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.int64, torch.uint8, torch.bool]
)
def test_dtypes(dtype):
    x = (numbers(3, 4) * 3).abs().to(dtype)
    f = lambda x: (x.flip(0), x == x[0], x.cumsum(0), torch.where(x == x[0], x, x.flip(0)))
    result = vmap(f)(x)
    equal(list(result), [torch.stack(parts) for parts in zip(*(f(e) for e in x), strict=True)])


@pytest.mark.parametrize("other", [2, 2.5, True, torch.tensor(2.5, dtype=torch.float64), 1j])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.bool])
def test_type_promotion_is_that_of_one_example(other, dtype):
    # An example of x[B] is a number, but its dtype is not that of a Python number.
    for x in (torch.ones(2, dtype=dtype), torch.ones(2, 3, dtype=dtype)):
        equal(vmap(lambda x: x * other)(x), loop(lambda x: x * other, x))


RANDOM = {
    "rand": lambda x: torch.rand(50),
    "randn": lambda x: torch.randn(5, 10),
    "randint": lambda x: torch.randint(0, 1000, (50,)),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "randperm": lambda x: torch.randperm(50),
    "normal": lambda x: torch.normal(0.0, 1.0, (50,)),
    "F.dropout": lambda x: F.dropout(x + 1, 0.5),
    "nn.Dropout": lambda x: torch.nn.Dropout(0.5)(x + 1),
    "bernoulli_": lambda x: torch.empty_like(x).bernoulli_(0.5),
    "normal_": lambda x: torch.empty_like(x).normal_(),
    "uniform_": lambda x: torch.empty_like(x).uniform_(),
}


@pytest.mark.parametrize("name", RANDOM)
def test_randomness_different(name):
    a, b = vmap(RANDOM[name], randomness="different")(torch.zeros(2, 50))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("name", RANDOM)
def test_randomness_same(name):
    a, b = vmap(RANDOM[name], randomness="same")(torch.zeros(2, 50))
    assert torch.equal(a, b)
    assert a.unique().numel() > 1


@pytest.mark.parametrize("name", RANDOM)
def test_randomness_error(name):
    with pytest.raises(RuntimeError, match="randomness='different'"):
        vmap(RANDOM[name])(torch.zeros(2, 50))


def test_bernoulli_draws_from_each_example():
    p = torch.tensor([0.0, 1.0])[:, None].expand(2, 50)
    equal(vmap(torch.bernoulli, randomness="different")(p), p.contiguous())
    half = torch.full((50,), 0.5)
    a, b = vmap(lambda x: torch.bernoulli(half), randomness="different")(p)
    assert not torch.equal(a, b)
    a, b = vmap(lambda x: torch.bernoulli(half), randomness="same")(p)
    assert torch.equal(a, b)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_random_numbers_follow_the_seed(randomness):
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        draws.append(vmap(torch.randn_like, randomness=randomness)(torch.zeros(3, 4)))
    equal(*draws)


def test_randperm_permutes():
    p = vmap(lambda x: torch.randperm(7), randomness="different")(torch.zeros(4))
    equal(p.sort(1).values, torch.arange(7).expand(4, 7))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_dropout_scales_what_it_keeps(randomness):
    x = numbers(3, 400).abs() + 1
    y = vmap(lambda x: F.dropout(x, 0.25), randomness=randomness)(x)
    assert ((y == 0) | (y - x / 0.75).abs().lt(1e-12)).all()
    assert 0.15 < (y == 0).double().mean() < 0.35


def test_dropout_needs_no_randomness_in_eval_mode():
    x = numbers(2, 3)
    equal(vmap(torch.nn.Dropout(0.5).eval())(x), x)
    equal(vmap(lambda x: F.dropout(x, 0.0))(x), x)


def test_randomness_of_the_outer_and_the_inner_map():
    x = torch.zeros(2, 3)
    f = lambda outer, inner: vmap(vmap(torch.randn_like, randomness=inner), randomness=outer)(x)
    same_outside = f("same", "different")
    assert torch.equal(same_outside[0], same_outside[1])
    assert same_outside.unique().numel() == 3
    same_inside = f("different", "same")
    assert torch.equal(same_inside[:, 0], same_inside[:, 1])
    assert same_inside.unique().numel() == 2


def test_chunks_draw_other_numbers():
    assert vmap(torch.randn_like, randomness="different", chunk_size=2)(torch.zeros(6)).unique().numel() == 6


def test_the_name_and_docstring_are_the_functions():
    def energy(x):
        """Of a state."""
        return x

    assert vmap(energy).__name__ == "energy"
    assert vmap(energy).__doc__ == "Of a state."
