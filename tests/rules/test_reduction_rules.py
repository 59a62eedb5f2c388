"""Histograms, searches, reductions over no dimensions and promotion of dtypes under vmap, against a loop."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch

from functorch_lite import vmap
from tests.support.checks import check_against_loop
from tests.support.oracles import loop_vmap

X = torch.tensor([[0.5, 1, 2, 3, 3.5, -1], [7, 7.25, 8, 9, 8.5, 11], [2, 2, 2, 2, 2, 2]])


check = partial(check_against_loop, equal_nan=True)


HISTOGRAMS = {
    "histc": lambda x: torch.histc(x, 4),
    "histc of a range": lambda x: torch.histc(x, 5, 1, 8.5),
    "histc of an empty range": lambda x: torch.histc(x, 4, 2, 2),
    "histogram": lambda x: torch.histogram(x, 4),
    "histogram of a range": lambda x: torch.histogram(x, 3, range=(1, 8.5)),
    "histogram of an empty range": lambda x: torch.histogram(x, 2, range=(2, 2)),
    "density": lambda x: torch.histogram(x, 4, density=True),
    "weights": lambda x: torch.histogram(x, 4, weight=x.flip(0)),
    "weights, density": lambda x: torch.histogram(x, 4, weight=x.abs(), density=True),
    "edges": lambda x: torch.histogram(x, torch.tensor([0, 1, 3, 8, 9], dtype=x.dtype), density=True),
    "matrix": lambda x: torch.histogram(x.reshape(2, 3), 3),
    "two dimensions": lambda x: torch.histogramdd(x.reshape(3, 2), [2, 3]),
    "two dimensions of a range": lambda x: torch.histogramdd(x.reshape(3, 2), [2, 3], range=[0.0, 3, 1, 9]),
    "two dimensions, density": lambda x: torch.histogramdd(x.reshape(3, 2), [2, 3], weight=x[:3].abs(), density=True),
    "two dimensions at edges": lambda x: torch.histogramdd(x.view(3, 2), [x[:3].cumsum(0), x.new_ones(4).cumsum(0)]),
    "no elements": lambda x: torch.histogram(x[:0], 4),
}  # fmt: skip


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_histograms(name):
    check(HISTOGRAMS[name], (0,), X)
    check(HISTOGRAMS[name], (1,), X.T.contiguous())
    check(HISTOGRAMS[name], (0,), X.double()[:1])


def test_histograms_of_an_empty_batch():
    empty = torch.zeros(0, 6)
    assert vmap(lambda x: torch.histc(x, 4))(empty).shape == (0, 4)
    hist, edges = vmap(lambda x: torch.histogram(x, 4))(empty)
    assert (hist.shape, edges.shape) == ((0, 4), (0, 5))


def test_random_numbers_fall_into_the_bins_of_the_kernel():
    torch.manual_seed(0)
    x = torch.randn(20, 200)
    for dtype, bins in itertools.product((torch.float32, torch.float64, torch.bfloat16, torch.float16), (1, 7, 40)):
        check(lambda x: torch.histc(x, bins, -0.7, 1.3), (0,), x.to(dtype))  # noqa: B023
        check(lambda x: torch.histc(x, bins), (0,), x.to(dtype))  # noqa: B023
    check(lambda x, e: torch.histogram(x, e)[0], (0, 0), x, torch.randn(20, 9).sort().values)


def test_wrong_histograms():
    for f, message in (
        (lambda x: torch.histc(x, 0), "expected bins > 0, got 0"),
        (lambda x: torch.histc(x, 3, 2, 1), "expected min <= max, got 2 and 1"),
        (lambda x: torch.histogram(x, 0), "expected bins > 0, got 0"),
        (lambda x: torch.histc(x / 0, 3), "the range of the values is not finite"),
        (lambda x: torch.histogram(x, 3, weight=x[:2]), "expected one weight of dtype Float for each value"),
        (lambda x: torch.histogram(x, torch.ones(1)), "at least two edges"),
        (lambda x: torch.histogram(x, torch.ones(2).double()), "expected bins of dtype Float, got Double"),
        (lambda x: torch.ops.aten._histogramdd_from_bin_cts(x, [2, 3]), "expected points in 2 dimensions"),
        (lambda x: torch.histogramdd(x.reshape(3, 2), [2, 3], range=[0.0, 1]), "expected 4 limits of the range"),
    ):
        with pytest.raises(RuntimeError, match=message):
            vmap(f)(X)


def test_searches():
    boundaries = X.sort().values
    values = torch.tensor([[2.0, 8], [0, 7], [2, 1]])
    for options in ({}, {"right": True}, {"side": "left", "out_int32": True}):
        check(lambda b, v: torch.searchsorted(b, v, **options), (0, 0), boundaries, values)  # noqa: B023
        check(lambda b, v: torch.searchsorted(b, v[0], **options), (0, None), boundaries, values[0])  # noqa: B023
        check(lambda b: torch.searchsorted(b, 2, **options), (0,), boundaries)  # noqa: B023
    check(lambda b: torch.searchsorted(b.long(), 2.5), (0,), boundaries)
    check(lambda b, v: torch.bucketize(v, b, right=True), (0, 0), boundaries, values)
    check(lambda b: torch.bucketize(2.5, b), (0,), boundaries)
    check(lambda x, s: torch.searchsorted(x, x[:2], sorter=s), (0, 0), X, X.argsort())


def test_isin():
    tests = torch.tensor([[2.0, 8, float("nan")], [7, 9, 9], [1, 3, 4]])
    for invert in (False, True):
        check(lambda x, t: torch.isin(x, t, invert=invert), (0, 0), X, tests)  # noqa: B023
        check(lambda x, t: torch.isin(x.reshape(2, 3), t, invert=invert), (None, 1), X[0], tests.T)  # noqa: B023
        check(lambda x, t: torch.isin(x, t, invert=invert), (0, None), X, tests[0])  # noqa: B023
        check(lambda x, t: torch.isin(x, t[:0], invert=invert), (0, 0), X, tests)  # noqa: B023
    check(lambda x, t: torch.isin(x, t), (0, 0), X.long(), tests.nan_to_num().to(torch.uint8))


def test_no_dimensions():
    for f in (torch.all, torch.any):
        for keepdim in (False, True):
            check(lambda x: f(x, dim=(), keepdim=keepdim), (0,), X > 1)  # noqa: B023
        check(lambda x: f(x.byte(), dim=()), (0,), X.abs())  # noqa: B023
    for f in (torch.sum, torch.mean, torch.amax, torch.std, torch.count_nonzero):
        check(lambda x: f(x.reshape(2, 3), dim=()), (0,), X)  # noqa: B023
    check(lambda x: torch.count_nonzero(x.reshape(2, 3), dim=0), (0,), X)
    check(lambda x: torch.hash_tensor(x.reshape(2, 3), dim=1), (0,), X)


def test_products_that_have_no_batch_of_their_own():
    vector, matrix = torch.arange(3.0), torch.arange(9.0).reshape(3, 3)
    check(lambda x: torch.addmm(x, matrix, matrix, beta=0), (0,), torch.ones(2, 3, 3))
    check(lambda x: torch.addr(x, vector, vector, beta=0, alpha=2), (0,), torch.ones(2, 3, 3))
    check(lambda x: torch.addmv(x, matrix, vector, beta=0), (0,), torch.ones(2, 3))
    flags = torch.tensor([[True, False, True], [True, True, False]])
    check(lambda x: torch.addr(x.expand(3, 3), x, x, beta=2, alpha=2), (0,), flags)


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.complex64, torch.int64, torch.uint8, torch.bool)
BINARY = {
    "add": torch.add,
    "div": torch.div,
    "maximum": torch.maximum,
    "pow": lambda x, y: torch.pow(x + 1, y),
    "eq": torch.eq,
    "atan2": torch.atan2,
    "where": lambda x, y: torch.where(y == 0, x, y),
    "isin": lambda x, y: torch.isin(x, y),
    "lerp": lambda x, y: torch.lerp(x, x, y),
    "searchsorted": lambda x, y: torch.searchsorted(x.reshape(-1).sort()[0], y),
    "cat": lambda x, y: torch.cat([x.reshape(-1), y.reshape(-1)]),
    "add_": lambda x, y: x.clone().add_(y),
    "mul_": lambda x, y: x.clone().mul_(y),
    "copy_": lambda x, y: x.clone().copy_(y),
    "clamp_": lambda x, y: x.clone().clamp_(max=y),
}


@pytest.mark.parametrize("name", BINARY)
def test_promotion_of_dtypes(name):
    f = BINARY[name]
    for first, second in itertools.product(DTYPES, DTYPES):
        for ranks in itertools.product((0, 1), (0, 1)):
            x, y = (torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2.0, 1.0, 0.0]))
            x, y = (
                (z[:, None].expand(3, 2) if r else z).to(d)
                for z, r, d in zip((x, y), ranks, (first, second), strict=True)
            )
            for in_dims, args in (((0, 0), (x, y)), ((0, None), (x, y[0])), ((None, 0), (x[0], y))):
                try:
                    (expected,) = loop_vmap(f, in_dims, args)
                except Exception:  # PyTorch does not take these dtypes
                    continue
                actual = vmap(f, in_dims)(*args)
                case = (first, second, ranks, in_dims)
                assert actual.dtype == expected.dtype, case
                torch.testing.assert_close(actual, expected, equal_nan=True, msg=str(case))
