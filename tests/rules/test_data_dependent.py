"""Operators whose results have a size that depends on values: they work where all examples agree on it."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from functorch_lite import LoopFallbackWarning, grad, jvp, vmap
from tests.support.checks import check_against_loop
from tests.support.oracles import loop_vmap

AGREEING = torch.tensor([[0, 3, 0, 2], [1, 0, 2, 0], [0, 0, 4, 1]])
DIFFERING = torch.tensor([[0, 3, 0, 2], [1, 0, 0, 0], [1, 1, 1, 1]])
VALUES = torch.arange(12.0, dtype=torch.float64).reshape(3, 4)


ONE = {
    "nonzero": torch.nonzero,
    "argwhere": torch.argwhere,
    "nonzero as tuple": lambda x: torch.nonzero(x, as_tuple=True),
    "where": lambda x: torch.where(x > 0),
    "nonzero of a matrix": lambda x: x.reshape(2, 2).nonzero(),
    "nonzero_static": lambda x: torch.nonzero_static(x, size=2),
    "nonzero_static, cut": lambda x: torch.nonzero_static(x, size=1),
    "nonzero_static, filled": lambda x: torch.nonzero_static(x.reshape(2, 2), size=5, fill_value=9),
    "masked_select": lambda x: x.masked_select(x > 0),
    "mask": lambda x: x[x > 0],
    "mask of bytes": lambda x: x[(x > 0).byte()],
    "masked matrix": lambda x: x.reshape(2, 2)[x.reshape(2, 2) > 0],
    "masked rows": lambda x: x.reshape(4, 1).expand(4, 3)[x > 0],
    "masked columns": lambda x: x.expand(3, 4)[:, x > 0],
    "mask and indices": lambda x: x.reshape(4, 1).expand(4, 3)[x > 0, torch.tensor([2, 0])],
    "mask, slice and None": lambda x: x.expand(3, 2, 4)[None, 1:, :, x > 0],
    "combinations": torch.combinations,
    "repeat_interleave": torch.repeat_interleave,
}


@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")
@pytest.mark.parametrize("name", ONE)
def test_examples_that_agree(name):
    x = AGREEING if name != "repeat_interleave" else torch.tensor([[1, 0, 4, 0], [2, 2, 1, 0], [0, 0, 0, 5]])
    check_against_loop(ONE[name], (0,), x)
    check_against_loop(ONE[name], (1,), x.T.contiguous())
    check_against_loop(ONE[name], (0,), x[:1])


def test_scalars():
    check_against_loop(torch.nonzero, (0,), torch.ones(3))
    check_against_loop(torch.nonzero, (0,), torch.zeros(3))
    check_against_loop(lambda x: torch.nonzero_static(x, size=2), (0,), torch.tensor([0, 1, 2]))
    check_against_loop(lambda x: x.masked_select(x > 0), (0,), torch.ones(3))


def test_two_arguments():
    mask = AGREEING > 0
    check_against_loop(lambda x, m: x[m], (0, 0), VALUES, mask)
    check_against_loop(lambda x, m: x[m], (None, 0), VALUES[0], mask)
    check_against_loop(lambda x, m: x[m], (0, None), VALUES, mask[0])
    check_against_loop(lambda x, m: x.masked_select(m), (0, None), VALUES, mask[0])
    check_against_loop(lambda x, m: x.masked_select(m), (None, 1), VALUES[:, :1], mask.T)  # they broadcast
    check_against_loop(
        lambda x, r: x.repeat_interleave(r, output_size=5), (0, 0), VALUES, torch.tensor([[1, 0, 4, 0]] * 3)
    )
    check_against_loop(
        lambda x, r: x.repeat_interleave(r.int()),
        (0, 0),
        VALUES,
        torch.tensor([[1, 0, 4, 0], [2, 3, 0, 0], [5, 0, 0, 0]]),
    )


def test_bincount():
    x = torch.tensor([[0, 3, 1], [3, 3, 3], [2, 1, 3]])
    check_against_loop(torch.bincount, (0,), x)
    check_against_loop(lambda x: torch.bincount(x.to(torch.uint8), minlength=2), (0,), x)
    check_against_loop(lambda x: torch.bincount(x, minlength=6), (0,), torch.tensor([[0, 3, 1], [5, 2, 3]]))
    for dtype in (torch.float32, torch.float64, torch.int64, torch.bfloat16):
        weights = torch.arange(9).reshape(3, 3).to(dtype)
        check_against_loop(lambda x, w: torch.bincount(x, w), (0, 0), x, weights)
        check_against_loop(lambda x, w: torch.bincount(x, w), (0, None), x, weights[0])
        check_against_loop(lambda x, w: torch.bincount(x, w), (None, 1), x[0], weights)
    check_against_loop(lambda x, w: torch.bincount(x, w, minlength=2), (0, 0), x[:, :0], torch.zeros(3, 0))


def test_splitting_at_a_tensor():
    x = torch.arange(18.0).reshape(3, 6)
    check_against_loop(lambda x, i: x.tensor_split(i), (0, 0), x, torch.tensor([[1, 4], [1, 4], [1, 4]]))
    check_against_loop(lambda x, i: x.tensor_split(i), (None, 0), x[0], torch.tensor([2, 2, 2]))
    sums = lambda x, i: (x.tensor_split(i)[1] * 3).sum()
    assert torch.equal(
        vmap(grad(sums))(VALUES, torch.tensor([[1, 3]] * 3)), torch.tensor([[0.0, 3, 3, 0]] * 3).double()
    )
    assert vmap(lambda x, i: jvp(lambda x: x.tensor_split(i)[1], (x,), (x,))[1])(
        VALUES, torch.tensor([[1, 3]] * 3)
    ).shape == (3, 2)


UNIQUE = {
    "unique": torch.unique,
    "all results": lambda x: torch.unique(x, return_inverse=True, return_counts=True),
    "dim": lambda x: torch.unique(x.expand(2, 4), dim=1),
    "consecutive": torch.unique_consecutive,
}


@pytest.mark.parametrize("name", UNIQUE)
def test_unique_runs_once_for_each_example(name):
    x = torch.tensor([[1, 0, 0, 2], [3, 3, 2, 1], [4, 5, 5, 6]])
    with pytest.warns(LoopFallbackWarning):
        actual = vmap(UNIQUE[name])(x)
    for y, z in zip(actual if isinstance(actual, tuple) else [actual], loop_vmap(UNIQUE[name], (0,), [x]), strict=True):
        assert torch.equal(y, z)


REFUSED = {
    "nonzero": (torch.nonzero, "it is 1 in one example and 4 in another"),
    "mask": (lambda x: x[x > 0], "it is 1 in one example and 4 in another"),
    "masked_select": (lambda x: x.masked_select(x > 0), "it is 1 in one example and 4 in another"),
    "bincount": (torch.bincount, "it is 2 in one example and 4 in another"),
    "repeat_interleave": (torch.repeat_interleave, "it is 1 in one example and 5 in another"),
    "tensor_split": (lambda x: x.tensor_split(x[:1]), "it is 0 in one example and 1 in another"),
    "values at a mask": (
        lambda x: x.index_put((x > 0,), x[:2]),
        "it is 1 in one example and 4 in another",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_examples_that_differ(name):
    function, sizes = REFUSED[name]
    for f, x in ((function, DIFFERING), (vmap(function), DIFFERING[:, None])):
        with pytest.raises(NotImplementedError, match=re.escape(sizes)) as caught:
            vmap(f)(x)
        message = str(caught.value)
        assert message.startswith("vmap: aten::")
        assert "test_data_dependent.py:" in message
        assert "depends on the data" in message
        assert "torch.where" in message


def test_shapes_of_a_loop_that_differ():
    shapes = r"it is \[3\] in example 0 and \[2\] in example 1\. Use .* torch.where"
    with pytest.warns(LoopFallbackWarning), pytest.raises(NotImplementedError, match=shapes):
        vmap(torch.unique)(DIFFERING)


def test_an_empty_batch_has_no_size_to_disagree_on():
    empty = torch.zeros(0, 4, dtype=torch.int64)
    assert vmap(torch.nonzero)(empty).shape == (0, 0, 1)
    assert vmap(lambda x: x[x > 0])(empty).shape == (0, 0)
    assert vmap(lambda x: torch.bincount(x, minlength=3))(empty).shape == (0, 3)
    assert vmap(lambda x: torch.repeat_interleave(x, output_size=3))(empty).shape == (0, 3)
    assert vmap(lambda x: torch.nonzero_static(x, size=2))(empty).shape == (0, 2, 1)


WRONG = {
    "negative": (lambda x: torch.bincount(x - 3), "no negative values"),
    "weights": (lambda x: torch.bincount(x, x[:2]), "expected 4 weights, got 2"),
    "matrix": (lambda x: torch.bincount(x.reshape(2, 2)), "a vector of integers"),
    "negative repeats": (lambda x: torch.repeat_interleave(x - 3), "no negative repeats"),
    "output size": (lambda x: torch.repeat_interleave(x * 0 + 1, output_size=3), "output_size=4"),
    "repeats": (lambda x: torch.repeat_interleave(x.reshape(2, 2)), "a vector of repeats"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    function, message = WRONG[name]
    with pytest.raises(RuntimeError, match=message):
        vmap(function)(AGREEING)


RESIZED = {
    "as many": lambda x: x.clone().resize_(2, 2),
    "fewer": lambda x: x.clone().resize_(3),
    "none": lambda x: x.clone().resize_(0),
    "more": lambda x: x.clone().resize_(2, 3).view(-1)[:4],
    "as another": lambda x: x.clone().resize_as_(x.new_zeros(2, 2)),
}


@pytest.mark.parametrize("name", RESIZED)
def test_resize(name):
    check_against_loop(RESIZED[name], (0,), VALUES)
    check_against_loop(RESIZED[name], (1,), VALUES.T)


def test_resize_to_the_shape_of_a_batched_tensor():
    x = torch.zeros(2)

    def f(y: Tensor) -> Tensor:
        return torch.ones(4).resize_as_(y) + y

    assert torch.equal(vmap(f)(torch.zeros(3, 2, 2)), torch.ones(3, 2, 2))
    assert x.shape == (2,)
