"""grad, its companions and vjp: which arguments, what comes back, and how often. Judged by torch.autograd."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.utils._pytree as pytree

from functorch_lite import grad, grad_and_value, value_and_grad, vjp

Pair = namedtuple("Pair", ["a", "b"])


@dataclass
class Layer:
    weight: torch.Tensor
    bias: torch.Tensor


pytree.register_dataclass(Layer)


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def equal(got, expected):
    torch.testing.assert_close(got, expected)


def by_autograd(func, *leaves, cotangents=None):
    """The gradients with respect to the leaves, zeros where there is none."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    outputs = func(*leaves)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    kept = [i for i, output in enumerate(outputs) if output.requires_grad]
    cotangents = [torch.ones_like(outputs[i]) if cotangents is None else cotangents[i] for i in kept]
    return torch.autograd.grad(
        [outputs[i] for i in kept], leaves, cotangents, allow_unused=True, materialize_grads=True
    )


def energy(x, y, z):
    return (x.sin() * y + z.exp() * x).sum()


ARGS = (numbers(3), numbers(3, seed=1), numbers(3, seed=2))


@pytest.mark.parametrize("argnums", [0, 1, 2, -1, -3])
def test_argnums_int(argnums):
    equal(grad(energy, argnums)(*ARGS), by_autograd(energy, *ARGS)[argnums])


@pytest.mark.parametrize("argnums", [(0,), (0, 1), (2, 0), (-1, 1), (0, 1, 2)])
def test_argnums_tuple(argnums):
    expected = by_autograd(energy, *ARGS)
    equal(grad(energy, argnums)(*ARGS), tuple(expected[i] for i in argnums))


def test_value_and_gradient_in_both_orders():
    value, (gradient, *_) = energy(*ARGS), by_autograd(energy, *ARGS)
    equal(grad_and_value(energy)(*ARGS), (gradient, value))
    equal(value_and_grad(energy)(*ARGS), (value, gradient))


def test_auxiliary_output():
    f = lambda x: (x.sin().sum(), {"x": x * 2, "name": "aux", "n": 3})
    x = ARGS[0]
    aux = {"x": x * 2, "name": "aux", "n": 3}
    assert_same_tree(grad(f, has_aux=True)(x), (x.cos(), aux))
    assert_same_tree(grad_and_value(f, has_aux=True)(x), (x.cos(), (x.sin().sum(), aux)))
    assert_same_tree(value_and_grad(f, has_aux=True)(x), ((x.sin().sum(), aux), x.cos()))


def assert_same_tree(got, expected):
    got_leaves, got_spec = pytree.tree_flatten(got)
    leaves, spec = pytree.tree_flatten(expected)
    assert got_spec == spec
    for a, b in zip(got_leaves, leaves, strict=True):
        assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b


def test_auxiliary_output_is_not_differentiated():
    _, aux = grad(lambda x: (x.sum(), x.sin()), has_aux=True)(ARGS[0])
    assert not aux.requires_grad
    equal(grad(lambda x: grad(lambda y: ((x * y).sum(), x.sin()), has_aux=True)(x)[1].sum())(ARGS[0]), ARGS[0].cos())


def test_keyword_arguments():
    x = ARGS[0]
    f = lambda x, *, power, scale=None: (x**power * scale).sum()
    equal(grad(f)(x, power=3, scale=ARGS[1]), 3 * x**2 * ARGS[1])


@pytest.mark.parametrize("make", [lambda a, b: {"a": a, "b": b}, lambda a, b: [a, (b,)], Pair, Layer])
def test_pytrees(make):
    a, b = ARGS[:2]
    f = lambda tree: (pytree.tree_leaves(tree)[0] * pytree.tree_leaves(tree)[1].sin()).sum()
    result = grad(f)(make(a, b))
    expected = make(b.sin(), a * b.cos())
    assert type(result) is type(expected)
    assert_same_tree(result, expected)


def test_argnums_of_pytrees():
    params, x = {"w": ARGS[0], "b": [ARGS[1]]}, ARGS[2]
    f = lambda params, x: (params["w"] * x + params["b"][0]).sum()
    assert_same_tree(grad(f, (1, 0))(params, x), (params["w"], {"w": x, "b": [torch.ones_like(x)]}))


def test_unused_arguments_have_a_gradient_of_zeros():
    x, y, z = ARGS
    equal(grad(lambda x, y: x.sum(), 1)(x, y), torch.zeros_like(y))
    equal(grad(lambda d: d["x"].sum())({"x": x, "y": y}), {"x": torch.ones_like(x), "y": torch.zeros_like(y)})
    equal(grad(lambda x: z.sum())(x), torch.zeros_like(x))
    equal(grad(lambda x: x.detach().sum())(x), torch.zeros_like(x))


def test_dependence_through_a_dictionary():
    def f(d):
        d = dict(d)
        d["z"] = d["x"] * d["y"]
        d["x"] = d["z"].sin()
        return d["x"].sum()

    x, y, _ = ARGS
    equal(grad(f)({"x": x, "y": y}), {"x": (x * y).cos() * y, "y": (x * y).cos() * x})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_real_dtypes(dtype):
    x = numbers(5, dtype=dtype)
    result = grad(lambda x: (x * x.sin()).sum())(x)
    assert result.dtype == dtype
    equal(result, by_autograd(lambda x: (x * x.sin()).sum(), x)[0])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_inputs_follow_pytorch(dtype):
    z = torch.complex(numbers(3), numbers(3, seed=1)).to(dtype)
    f = lambda z: (z.sin() * z.conj()).abs().sum()
    equal(grad(f)(z), by_autograd(f, z)[0])
    equal(grad(lambda z: z.abs().square())(z[0]), 2 * z[0])


def test_arguments_that_are_not_differentiated_may_be_anything():
    f = lambda x, n, name, index: (x[index] ** n).sum() if name == "power" else x.sum()
    index = torch.tensor([0, 0, 2])
    expected = torch.zeros(3, dtype=torch.float64)
    expected[0], expected[2] = 6 * ARGS[0][0] ** 2, 3 * ARGS[0][2] ** 2
    equal(grad(f)(ARGS[0], 3, "power", index), expected)


def test_same_tensor_twice_counts_once_each():
    x = ARGS[0]
    equal(grad(lambda x, y: (x * y.sin()).sum(), (0, 1))(x, x), (x.sin(), x * x.cos()))


def test_inputs_that_require_grad_stay_connected():
    x = ARGS[0].clone().requires_grad_()
    gradient = grad(lambda x: (x**3).sum())(x)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    equal(second, (6 * x).detach())


def test_results_of_detached_inputs_do_not_require_grad():
    assert not grad(lambda x: x.sin().sum())(ARGS[0]).requires_grad
    assert not vjp(torch.sin, ARGS[0])[0].requires_grad


def test_vjp_of_one_output():
    x, v = numbers(3, 4), numbers(3, seed=1)
    f = lambda x: x.sin().prod(1)
    output, vjp_fn = vjp(f, x)
    equal(output, f(x))
    equal(vjp_fn(v), by_autograd(f, x, cotangents=[v]))


def test_vjp_of_several_primals_and_outputs():
    x, y, z = ARGS
    f = lambda x, y: (x * y, x.sin().sum(), y.exp())
    (a, b, c), vjp_fn = vjp(f, x, y)
    cotangents = (z, torch.tensor(2.0, dtype=x.dtype), x)
    expected = by_autograd(f, x, y, cotangents=cotangents)
    equal((a, b, c), f(x, y))
    equal(vjp_fn(cotangents), expected)
    equal(vjp_fn(*cotangents), expected)


def test_vjp_of_a_tuple_of_one():
    x = ARGS[0]
    _, vjp_fn = vjp(lambda x: (x.sin(),), x)
    equal(vjp_fn((torch.ones_like(x),)), (x.cos(),))


def test_vjp_of_a_dictionary():
    x, y, v = ARGS
    output, vjp_fn = vjp(lambda d: {"s": d["x"].sin(), "p": [d["x"] * d["y"]]}, {"x": x, "y": y})
    assert output.keys() == {"s", "p"}
    (result,) = vjp_fn({"s": v, "p": [v]})
    equal(result, {"x": v * x.cos() + v * y, "y": v * x})


def test_vjp_with_auxiliary_output():
    x = ARGS[0]
    output, vjp_fn, aux = vjp(lambda x: (x.sin(), {"twice": x * 2, "n": 1}), x, has_aux=True)
    assert_same_tree((output, aux), (x.sin(), {"twice": x * 2, "n": 1}))
    equal(vjp_fn(x), (x * x.cos(),))


def test_vjp_with_keyword_arguments():
    x, w, v = ARGS
    _, vjp_fn = vjp(lambda x, *, w, power=1: w * x**power, x, w=w, power=2)
    equal(vjp_fn(v), (v * w * 2 * x,))


def test_vjp_fn_may_be_called_many_times():
    x, v, w = ARGS
    _, vjp_fn = vjp(torch.exp, x)
    first = vjp_fn(v)
    equal(vjp_fn(w), (w * x.exp(),))
    equal(vjp_fn(v), first)
    equal(vjp_fn(2 * v + w)[0], 2 * first[0] + vjp_fn(w)[0])


def test_vjp_of_outputs_that_do_not_depend_on_the_primals():
    x, y, _ = ARGS
    output, vjp_fn = vjp(lambda x: (y, x.sin(), x.detach()), x)
    equal(output, (y, x.sin(), x))
    equal(vjp_fn((y, y, y)), (y * x.cos(),))


def test_vjp_of_an_output_that_is_the_input():
    x, v, _ = ARGS
    output, vjp_fn = vjp(lambda x: (x, x), x)
    equal(output, (x, x))
    equal(vjp_fn((v, v)), (2 * v,))


def test_vjp_of_an_integer_output_beside_a_real_one():
    x, v, _ = ARGS
    (values, indices), vjp_fn = vjp(lambda x: x.sort(), x)
    (result,) = vjp_fn(torch.return_types.sort((v, torch.zeros_like(indices))))
    equal(result, torch.zeros_like(x).scatter(0, indices, v))


def test_vjp_fn_under_vjp():
    x, v, w = ARGS
    _, vjp_fn = vjp(lambda x: x**3, x)
    # The pullback is linear, so its own pullback applies the transpose.
    _, transposed = vjp(lambda v: vjp_fn(v)[0], v)
    equal(transposed(w), (3 * x**2 * w,))


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 3)])
def test_shapes(shape):
    x = numbers(*shape)
    _, vjp_fn = vjp(torch.sin, x)
    equal(vjp_fn(x), (x * x.cos(),))
    equal(grad(lambda x: x.sin().sum())(x), x.cos())
