"""Operators with out= under vmap, against a loop."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.opinfo.core import OpInfo, SampleInput
from torch.utils import _pytree

from functorch_lite import LoopFallbackWarning, grad, jvp, vmap
from tests.support import ops

BATCH_SIZE = 3
from tests.support.oracles import loop_vmap

_DATA_DEPENDENT_SHAPE = "the shape of the result depends on the data, so it would differ between examples"

#: Operators whose out form raises our error, and why.
REFUSED = {
    "lu": "torch.lu resizes its out tensors itself, and resize_as_ is refused",
    "masked_select": _DATA_DEPENDENT_SHAPE,
    "nonzero": _DATA_DEPENDENT_SHAPE,
}
#: Random results, or uninitialised ones: only shapes and dtypes are compared.
RANDOM = {"bernoulli", "multinomial", "normal", "normal.number_mean", "empty_like", "new_empty"}
#: Operators that do not resize out.
RIGHT_SHAPE_ONLY = {"normal.number_mean"}
#: Operators that run once for each example without out, too.
LOOPING = {"histogram", "histc", "hash_tensor"}
#: Entries without a call that can be batched, and why.
WITHOUT_CALL = {
    "equal": "its result is a Python value, and it has no out form",
    "histogramdd": "it has no out form",
    "_batch_norm_with_update": "its out form takes running statistics only, which every example has its own of",
    "sparse.sampled_addmm": "sparse arguments",
    **dict.fromkeys(
        ["arange", "linspace", "logspace", "randn", "ones", "zeros", "full", "empty", "eye"], "no tensor arguments"
    ),
}
WITH_OUT = [name for name, op in ops.OPS.items() if op.supports_out and ops.dtypes_of(op)]


def _tensors(result) -> list[Tensor]:
    return [y for y in _pytree.tree_leaves(result) if isinstance(y, Tensor)]


@dataclass
class Call:
    """A call of an operator as a function of tensors: those of the sample, and those to write into."""

    op: OpInfo
    sample: SampleInput

    def __post_init__(self):
        self.leaves, self.spec = _pytree.tree_flatten((self.sample.input, self.sample.args, self.sample.kwargs))
        self.positions = [i for i, x in enumerate(self.leaves) if isinstance(x, Tensor)]
        self.example = [self.leaves[i].detach() for i in self.positions]

    def run(self, tensors, **keywords):
        values = list(self.leaves)
        for i, x in zip(self.positions, tensors, strict=True):
            values[i] = x
        first, args, kwargs = _pytree.tree_unflatten(values, self.spec)
        return self.op(first, *args, **kwargs, **keywords)

    def __call__(self, *tensors):
        outs = list(tensors[len(self.example) :])
        result = self.run(tensors[: len(self.example)], out=outs[0] if self.kind is None else self.kind(outs))
        for x, y in zip(_tensors(result), outs, strict=False):  # some return None
            assert x is y
        return outs

    def is_valid(self) -> bool:
        """Whether the operator takes the sample with out, too."""
        if not self.example or any(x.layout != torch.strided for x in self.example):
            return False
        try:
            result = self.run(self.example)
            self.kind = None if isinstance(result, Tensor) else list if isinstance(result, list) else tuple
            self.results = _tensors(result)
            self(*self.example, *map(torch.empty_like, self.results))
        except Exception:
            return False
        return True


def _find_call(name) -> Call | None:
    op = ops.OPS[name]
    torch.manual_seed(0)
    # Not op.sample_inputs, which records the whole stack for each of them.
    samples = op.sample_inputs_func(op, "cpu", ops.dtypes_of(op)[0], requires_grad=False)
    return next(filter(Call.is_valid, (Call(op, sample) for sample in itertools.islice(samples, 24))), None)


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def loops(_no_warnings):
    """Collects the warnings that an operator runs as a loop, and drops others."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", LoopFallbackWarning)
        yield caught


@pytest.mark.parametrize("name", WITH_OUT)
def test_operator(name, loops):
    call = _find_call(name)
    assert (call is None) == (name in WITHOUT_CALL)
    if call is None:
        return
    right = [torch.zeros(*y.shape, BATCH_SIZE, dtype=y.dtype) for y in call.results]
    empty = [y.new_empty(BATCH_SIZE, 0) for y in call.results]
    for outs, dim in [(right, -1)] if name in RIGHT_SHAPE_ONLY else [(right, -1), (empty, 0)]:
        args = [*(ops.batch(x, 0, mildly=True) for x in call.example), *outs]
        in_dims = [0] * len(call.example) + [dim % x.dim() for x in outs]
        expected = loop_vmap(call, in_dims, args)
        mapped = vmap(call, tuple(in_dims), randomness="different")
        if name in REFUSED:
            with pytest.raises(NotImplementedError, match="^vmap: "):
                mapped(*args)
            continue
        for y, z in zip(mapped(*args), expected, strict=True):
            assert (y.shape, y.dtype) == (z.shape, z.dtype)
            if name not in RANDOM:
                torch.testing.assert_close(y, z, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert bool(loops) == (name in LOOPING)


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
    with pytest.raises(RuntimeError, match="functions with out=... arguments don't support automatic differentiation"):
        vmap(grad(func, argnums=1))(x, y)
    with pytest.raises(RuntimeError, match="out= function"):
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
