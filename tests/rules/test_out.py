"""Operators with out= under vmap, against a loop."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree

from functorch_lite import grad, jvp, vmap
from tests.support.oracles import loop_vmap


def _tensors(result) -> list[Tensor]:
    return [y for y in _pytree.tree_leaves(result) if isinstance(y, Tensor)]


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def _check(func, in_dims, *args):
    expected = loop_vmap(func, in_dims, args)
    for y, z in zip(_tensors(vmap(func, in_dims)(*args)), expected, strict=True):
        assert y.dtype == z.dtype
        torch.testing.assert_close(y, z, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, None, 0), (None, 0, 1), (None, None, 0)])
@pytest.mark.parametrize("length", [0, 3])
def test_places_and_unbatched_arguments(in_dims, length):
    def func(x, y, out):
        out = out[:length]
        assert torch.add(x, y, alpha=2, out=out) is out
        return out

    _check(func, in_dims, *(torch.rand(3, 3) if dim is not None else torch.rand(3) for dim in in_dims))


def test_several_results():
    def func(x):
        values, indices = x.new_empty(0), x.new_empty(3, dtype=torch.int64)
        result = torch.sort(x, out=(values, indices))
        assert result.values is values
        assert result.indices is indices
        parts = [x.new_empty(0), x.new_empty(2)]
        torch.split_with_sizes_copy(x, [1, 2], out=parts)
        return [values, indices, *parts]

    _check(func, (1,), torch.rand(3, 4))


def test_out_is_an_argument_or_a_view():
    def func(x):
        y = x.clone()
        torch.sin(y, out=y)
        torch.cumsum(y[:2], 0, out=y[1:3])
        torch.mul(x[0], 2, out=y[3])
        return y

    def without_overlap(x):
        y = x.sin()
        return torch.cat([y[:1], y[:2].cumsum(0), x[:1] * 2, y[4:]])

    x = torch.rand(2, 5)
    torch.testing.assert_close(vmap(func)(x), torch.stack([without_overlap(x[0]), without_overlap(x[1])]))


def test_results_that_share_memory_with_an_argument_are_copied():
    def func(x):
        out = x.new_empty(0)
        torch.conj_physical(x, out=out)  # of a real tensor: the tensor itself
        out.zero_()
        return out, x

    x = torch.rand(3, 2)
    zeros, same = vmap(func)(x)
    assert not zeros.any()
    assert torch.equal(same, x)
    assert x.all()


def test_dtypes():
    def func(x, n, double, single, whole):
        torch.add(x, n, out=double)
        torch.sum(x, 0, out=whole)  # counts in the dtype of out, as plain PyTorch does
        torch.prod(n, 0, out=single)
        return double, single, whole

    outs = [torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2), torch.zeros(2, dtype=torch.int64)]
    _check(func, (0,) * 5, torch.rand(2, 3) * 4, torch.arange(6).reshape(2, 3) + 1, *outs)


def test_dtype_that_cannot_hold_the_result():
    def func(x):
        return torch.sin(x, out=x.new_empty(0, dtype=torch.int64))

    message = (
        r"vmap: aten::sin has a result of dtype Float, and the tensor given as out is of dtype Long, to which that "
        r"cannot be cast\. Pass an out tensor of the dtype of the result\."
    )
    with pytest.raises(TypeError, match=message):
        vmap(func)(torch.rand(3))


def test_wrong_shape_is_resized_with_a_warning():
    def func(x):
        out = x.new_zeros(2)
        torch.sin(x, out=out)
        return out

    x = torch.rand(3, 4)
    with pytest.warns(
        UserWarning, match=r"vmap: aten::sin resizes the tensor given as out, of shape \[2\], to the shape"
    ):
        result = vmap(func)(x)
    assert torch.equal(result, x.sin())


def test_out_from_outside():
    out, inner = torch.zeros(4), torch.rand(3, 4)
    message = r"vmap: the in-place operator aten::sin writes batched values into `\w*`, a tensor from outside"
    with pytest.raises(ValueError, match=message):
        vmap(lambda x: torch.sin(x, out=out))(torch.rand(3, 4))
    with pytest.raises(ValueError, match=message):
        vmap(lambda x: vmap(lambda y: torch.sin(y, out=x))(inner))(torch.rand(2, 4))
    assert not out.any()


def test_lists_of_another_length():
    def func(x):
        torch.unbind_copy(x, out=[x.new_empty(())])

    with pytest.raises(ValueError, match="has 4 results, and out is a list of 1 tensors. Pass one for each result"):
        vmap(func)(torch.rand(3, 4))


def test_nested():
    def func(x, y):
        outs = [torch.empty(0), torch.zeros(3)]
        torch.add(x, y, out=outs[0])
        torch.mul(outs[0], y, out=outs[1])
        return outs

    x, y = torch.rand(2, 3), torch.rand(4, 3)
    with_inner = vmap(lambda x: vmap(lambda y: func(y, x))(y))(x)
    torch.testing.assert_close(with_inner[0], x[:, None] + y)
    torch.testing.assert_close(with_inner[1], (x[:, None] + y) * x[:, None])


def test_random_operators():
    def func(x):
        out = x.new_empty(0)
        torch.rand(5, out=out)
        torch.normal(out, 1.0, out=out)
        return out

    with pytest.raises(RuntimeError, match="randomness='error'"):
        vmap(func)(torch.rand(3))
    different = vmap(func, randomness="different")(torch.rand(3))
    assert len(different.unique()) == 15

    shared = torch.empty(0)
    vmap(lambda x: x * torch.rand(5, out=shared), randomness="same")(torch.rand(3))
    assert shared.shape == (5,)
    assert shared.all()


def test_derivatives_outside():
    def func(x):
        sine, product = x.new_empty(0), x.clone()
        torch.sin(x, out=sine)
        torch.mul(sine, x, out=product)
        return product

    x = torch.rand(3, 2, dtype=torch.float64)
    expected = x.cos() * x + x.sin()
    torch.testing.assert_close(grad(lambda x: vmap(func)(x).sum())(x), expected)
    torch.testing.assert_close(jvp(vmap(func), (x,), (x,))[1], expected * x)


def test_out_made_inside():
    def func(x):
        fitting, empty, once = torch.zeros(3), torch.empty(0), torch.empty(0)
        parts = [torch.empty(0), torch.empty(0)]
        torch.sin(x, out=fitting)
        torch.cos(x, out=empty)
        torch.matmul(torch.ones(3, 3), torch.arange(3.0), out=once)
        torch.mul(x, once, out=once)
        torch.split_with_sizes_copy(torch.arange(3.0), [1, 2], out=parts)
        torch.mul(parts[1], x[1:], out=parts[1])
        return fitting, empty, once, *parts

    _check(func, (1,), torch.rand(3, 2))


def test_what_autograd_has_saved_is_not_given_away():
    def func(x):
        out = x.new_empty(0)
        torch.exp(x, out=out)
        return out.mul_(2)

    x = torch.rand(3, 2)
    torch.testing.assert_close(grad(lambda x: vmap(func)(x).sum())(x), 2 * x.exp())
    leaf = x.clone().requires_grad_()
    vmap(func)(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, 2 * x.exp())


def test_derivatives_inside():
    """PyTorch refuses an out form of anything that needs a derivative, and allows it for constants."""

    def func(x, y):
        out = y.new_empty(0)
        torch.sin(y, out=out)
        return (x * out).sum()

    x, y = torch.rand(3, 2), torch.rand(3, 2)
    torch.testing.assert_close(vmap(grad(func))(x, y), y.sin())
    with pytest.raises(RuntimeError, match=r"grad: sin\(\.\.\., out=tensor\) cannot .*copy_\(result\)"):
        vmap(grad(func, argnums=1))(x, y)
    with pytest.raises(RuntimeError, match=r"jvp: sin\(\.\.\., out=tensor\) cannot be differentiated"):
        vmap(lambda x, y: jvp(lambda y: func(x, y), (y,), (y,)))(x, y)


@pytest.mark.parametrize("shape", [(0,), (2,), (3,)])
def test_a_write_is_seen_by_whoever_saved_the_tensor(shape):
    def func(x, y, out, when):
        if when == "before":
            torch.sin(y, out=out)
        z = (x[: out.shape[0]] * out).sum()
        if when == "after":
            torch.sin(y, out=out)
        else:
            out.mul_(2)
        return z

    def run(when):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            vmap(lambda x, y: grad(lambda x: func(x, y, y.new_zeros(shape), when))(x))(
                torch.rand(2, 3), torch.rand(2, 3)
            )

    for when in ("before", "after"):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            run(when)


def test_inference_mode():
    x = torch.rand(3, 2)
    with torch.inference_mode():
        assert torch.equal(vmap(lambda x: torch.sin(x, out=x.new_empty(0)))(x), x.sin())


def test_tracing_with_symbolic_sizes():
    def func(x, y):
        fitting, empty = x.new_zeros(x.shape), x.new_empty(0)
        torch.add(x, y, out=fitting)
        torch.mul(fitting, y, out=empty)
        return empty

    traced = make_fx(vmap(func), tracing_mode="symbolic")(torch.rand(3, 4), torch.rand(3, 4))
    x, y = torch.rand(5, 2), torch.rand(5, 2)
    torch.testing.assert_close(traced(x, y), (x + y) * y)
