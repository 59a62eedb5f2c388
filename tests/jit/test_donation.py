"""Donated arguments: results are the same, the memory is used, and what was given away says so."""

import re

import pytest
import torch
from measuring import peak_bytes
from torch.testing import assert_close

import functorch_lite as fl
from functorch_lite.compile import make_boxed_compiler

N = 1000
GONE = "donated to a call of a functorch_lite.jit function.* Leave it out of donate_argnums"
BACKENDS = ["replay", pytest.param(make_boxed_compiler(lambda gm, _: gm), id="graph")]


def step(params, x):
    slopes = fl.grad(lambda p: (p["w"] * x).sin().sum() + p["b"].square().sum())(params)
    return {name: p - 0.1 * slopes[name] for name, p in params.items()}


def is_gone(tensor):
    try:
        tensor + 1
    except RuntimeError as error:
        return re.search(GONE, str(error)) is not None
    return False


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_are_those_without_donation(backend):
    compiled = fl.jit(step, backend, donate_argnums=0)
    params = {"w": torch.randn(N), "b": torch.randn(3)}
    for _ in range(4):
        x = torch.randn(N)
        expected, before = step(params, x), params
        params = compiled(params, x)
        assert_close(params, expected, rtol=0, atol=0)
        assert is_gone(before["w"])
        assert is_gone(before["b"])
        assert not is_gone(x)


def test_results_take_the_memory():
    compiled = fl.jit(step, donate_argnums=0)
    params = compiled({"w": torch.randn(N), "b": torch.randn(3)}, torch.randn(N))
    for _ in range(3):
        address = params["w"].data_ptr()
        params = compiled(params, torch.randn(N))
        assert params["w"].data_ptr() == address


def test_peak_memory():
    def chain(x):
        return (x * 2).cumsum(0).flip(0)

    peaks = []
    for donated in ((), 0):
        compiled = fl.jit(chain, donate_argnums=donated)
        compiled(torch.randn(N))
        peaks.append(peak_bytes(lambda compiled=compiled: compiled(torch.randn(N))))
    assert peaks[1] == peaks[0] - 4 * N


@pytest.mark.parametrize(
    "f",
    [
        lambda x, y: x.sin() + x.t() @ y,  # read again after a pointwise operator
        lambda x, y: (x + 1, x + 2, y),
        lambda x, y: x.t().add(y).mul(x),
        lambda x, y: x.add(x).add(y).relu().sub(x[0]),
        lambda x, y: torch.where(x > 0, x, y).mul(x.sum()),
        lambda x, y: (x.view(-1)[:2].exp(), x.double() * 2, x.exp()),
        lambda x, y: fl.vmap(fl.grad(lambda a, b: (a * b).tanh().sum()))(x, y),
        lambda x, y: x.mul_(2) + y,
    ],
)
@pytest.mark.parametrize("donated", [0, 1, (0, 1), -1])
def test_values_are_right_whatever_is_read_again(f, donated):
    compiled = fl.jit(f, donate_argnums=donated)
    for _ in range(3):
        x, y = torch.randn(3, 3), torch.randn(3, 3)
        expected = f(x.clone(), y.clone())
        assert_close(compiled(x, y), expected, rtol=0, atol=0)


def test_what_a_result_shows_stays():
    f = fl.jit(lambda x, y: (x, y.t(), x + y), donate_argnums=(0, 1))
    for _ in range(3):
        x, y = torch.randn(2, 2), torch.randn(2, 2)
        same, turned, _ = f(x, y)
        assert same is x
        assert_close(turned, y.t())
    g = fl.jit(lambda x, y: (x, x + y), donate_argnums=(0, 1))
    for _ in range(3):
        x, y = torch.randn(2, 2), torch.randn(2, 2)
        assert g(x, y)[0] is x
        assert not is_gone(x)
        assert is_gone(y)


def test_arguments_that_share_memory_are_gone_together_and_counted_once():
    f = fl.jit(lambda x, y: x * 2 + y, donate_argnums=0)
    for _ in range(3):
        x = torch.randn(4)
        expected = x * 2 + x.flip(0)
        y = torch.as_strided(x, (4,), (1,))
        assert_close(f(x, y.clone().flip(0)), expected)
        x = torch.randn(4)
        expected = x * 3
        assert_close(f(x, x.view(4)), expected)
        assert is_gone(x)


def test_a_tensor_that_was_donated_before():
    f = fl.jit(lambda x, y: x + y, donate_argnums=(0, 1))
    f(torch.ones(2), torch.ones(2))
    x, y = torch.ones(2), torch.ones(2)
    f(x, torch.ones(2))
    with pytest.raises(RuntimeError, match=GONE):
        f(y, x)
    assert_close(y, torch.ones(2))  # nothing is taken when the call is refused
    with pytest.raises(RuntimeError, match=GONE):
        repr(x)


def test_transforms_and_keyword_arguments_keep_theirs():
    f = fl.jit(lambda x, y=0: x.sin() + y, donate_argnums=0)
    x, y = torch.randn(3), torch.randn(3)
    for _ in range(2):
        assert_close(fl.vmap(f)(x), x.sin())
        assert_close(fl.vmap(fl.grad(f))(x), x.cos())
        f(torch.randn(3), y=y)
    assert not is_gone(y)
    assert is_gone(_donated(f))


def _donated(f):
    x = torch.randn(3)
    f(x)
    return x


def test_derivatives_from_outside_keep_them_with_a_warning():
    f = fl.jit(lambda w, x: (w * x).sum(), donate_argnums=(0, 1))
    w, x = torch.randn(3, requires_grad=True), torch.randn(3)
    with pytest.warns(UserWarning, match=r"jit: donated arguments keep their memory.*torch.no_grad"):
        value = f(w, x)
    value.backward()
    assert_close(w.grad, x)
    with torch.no_grad():
        f(w, x)
    assert is_gone(x)


@pytest.mark.parametrize(
    ("donated", "error", "parts"),
    [
        (2, ValueError, r"jit: donate_argnums=2 selects positional argument 2, but the function was called with 1 pos"),
        ("x", TypeError, r"jit: donate_argnums must be an int or a tuple of ints, got 'x'"),
        ((0, -1), ValueError, r"jit: donate_argnums=\(0, -1\) selects the same argument twice"),
    ],
)
def test_messages(donated, error, parts):
    x = torch.ones(2)
    with pytest.raises(error, match=parts):
        fl.jit(torch.sin, donate_argnums=donated)(x)
    assert_close(x, torch.ones(2))
