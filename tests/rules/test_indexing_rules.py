"""Indexing by tensors under vmap, and what is written at indices and masks, against a loop over the examples."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from functorch_lite import grad, jvp, vmap
from tests.support.checks import check_against_loop
from tests.support.oracles import plain_vjp

B = 3
X = torch.linspace(-2, 3, B * 60, dtype=torch.float64).reshape(B, 3, 4, 5)


check = partial(check_against_loop, tolerance=1e-12)


def masks(count: int, *shape: int) -> Tensor:
    """A mask for each example, with as many true elements."""
    generator = torch.Generator().manual_seed(0)
    n = torch.Size(shape).numel()
    return torch.stack([torch.randperm(n, generator=generator).reshape(shape) < count for _ in range(B)])


ALL = slice(None)
SOME = torch.tensor([0, 2])
ROWS = torch.tensor([[0, 2], [-1, 1], [1, 1]])  # the last one has a duplicate
PATTERNS: dict[str, tuple[Callable[[Tensor], tuple[object, ...]], Tensor]] = {
    "mask": (lambda m: (m,), masks(2, 3)),
    "mask of two dimensions": (lambda m: (m,), masks(5, 3, 4)),
    "mask of all dimensions": (lambda m: (m,), masks(9, 3, 4, 5)),
    "mask behind": (lambda m: (ALL, m), masks(7, 4, 5)),
    "mask at the end": (lambda m: (..., m), masks(2, 5)),
    "mask and slice": (lambda m: (m, slice(1, 3)), masks(2, 3)),
    "mask and number": (lambda m: (m, 2), masks(2, 3)),
    "mask and None": (lambda m: (None, m), masks(2, 3)),
    "mask and indices": (lambda m: (m, SOME), masks(2, 3)),
    "mask apart from indices": (lambda m: (m, ALL, SOME), masks(2, 3)),
    "two masks": (lambda m: (m, torch.tensor([True, False, True, False])), masks(2, 3)),
    "empty mask": (lambda m: (m,), masks(0, 3)),
    "number": (lambda i: (i,), torch.tensor([0, 2, -1])),
    "number behind": (lambda i: (ALL, i), torch.tensor([0, 3, -1])),
    "numbers": (lambda i: (i, ..., i), torch.tensor([0, 2, -1])),
    "number and slice": (lambda i: (i, slice(1, 3), None), torch.tensor([0, 2, -1])),
    "indices": (lambda i: (i,), ROWS),
    "matrix of indices": (lambda i: (i,), ROWS[:, None] - torch.tensor([[0], [1]])),
    "indices behind": (lambda i: (0, ALL, i), ROWS),
    "indices apart": (lambda i: (i, ALL, SOME), ROWS),
    "indices and None": (lambda i: (i, None, SOME), ROWS),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns(name):
    pattern, index = PATTERNS[name]

    def get(x: Tensor, i: Tensor) -> Tensor:
        return x[pattern(i)]

    def put_number(x: Tensor, i: Tensor) -> Tensor:
        y = x.clone()
        y[pattern(i)] = 7.0
        return y

    def put_scalar(x: Tensor, i: Tensor) -> Tensor:
        y = x.clone()
        y[pattern(i)] = x.sum()
        return y

    def put_tensor(x: Tensor, i: Tensor) -> Tensor:
        y = x.clone()
        place = y[pattern(i)]
        # The last of several writes to one place is not defined, so they write the same.
        y[pattern(i)] = place * 2 + x.sum()
        return y

    def add(x: Tensor, i: Tensor) -> Tensor:
        y = x.clone()
        y[pattern(i)] += x.sum()
        return y

    for f in (get, put_number, put_scalar, put_tensor, add):
        check(f, (0, 0), X, index)
        check(f, (0, None), X, index[0])
        check(f, (3, index.dim() - 1), X.movedim(0, 3), index.movedim(0, -1), nested=False)
    check(get, (None, 0), X[0], index)


ACCUMULATE = ["mask", "mask of two dimensions", "mask and indices", "number", "indices", "matrix of indices"]


@pytest.mark.parametrize("name", ACCUMULATE)
def test_accumulate(name):
    pattern, index = PATTERNS[name]

    def add(x: Tensor, i: Tensor, scale: Tensor) -> list[Tensor]:
        place = pattern(i)
        values = x[place] * scale
        row = values.reshape(-1, 5)[0]
        return [
            x.index_put(place, values, accumulate=True),
            x.clone().index_put_(place, row, accumulate=True),
            x.index_put(place, scale, accumulate=True),
            torch.ops.aten._unsafe_index_put(x, place, values, True),
        ]

    scale = torch.tensor([0.5, -1, 2], dtype=torch.float64)
    check(add, (0, 0, 0), X, index, scale)
    check(add, (0, None, 0), X, index[0], scale)
    check(add, (1, 0, None), X.movedim(0, 1), index, scale[0], nested=False)


def test_masks_of_other_counts():
    mask = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 1]], dtype=torch.bool)
    row = X[:, 0, 0]

    def fill(x: Tensor, m: Tensor, row: Tensor) -> list[Tensor]:
        a, b, c, d = (x.clone() for _ in range(4))
        a[m] = 7.0
        b[m] = row.sum()
        c[m] = row
        d[:, m[:, None].expand(3, 4)[0]] = row[None, None]
        return [
            a,
            b,
            c,
            x.index_put((m,), row.sum(), accumulate=True),
            x.index_put((m,), row[None, None], accumulate=True),
            x.masked_fill(m[:, None, None], row.sum()),
        ]

    check(fill, (0, 0, 0), X, mask, row)
    check(fill, (0, 0, None), X, mask, row[0])
    gradient = vmap(grad(lambda x, m: torch.where(m, x, 0).index_put((m,), x.new_tensor(3.0)).sum()))(row[:, :3], mask)
    assert torch.equal(gradient, torch.zeros(3, 3, dtype=torch.float64))


def test_derivatives_at_masks_and_indices():
    mask, index = masks(2, 3), torch.tensor([0, 2, -1])
    loss = lambda x, m, i: (x[m] ** 2).sum() + (x[i] ** 3).sum() + x.index_put((m,), x.sum()).pow(2).sum()
    expected = [
        plain_vjp(lambda x: [loss(x, m, i)], [x], [torch.ones((), dtype=x.dtype)])[1]  # noqa: B023
        for x, m, i in zip(X, mask, index, strict=True)
    ]
    torch.testing.assert_close(vmap(grad(loss))(X, mask, index), torch.stack(expected))
    tangents = vmap(lambda x, m, i: jvp(lambda x: loss(x, m, i), (x,), (x,))[1])(X, mask, index)
    torch.testing.assert_close(tangents, (torch.stack(expected) * X).sum((1, 2, 3)))


def test_number_as_index_of_what_is_differentiated():
    logits, labels = X[:, 0, 0], torch.tensor([4, 0, 2])
    expected = torch.nn.functional.nll_loss(logits.log_softmax(1), labels, reduction="none")
    assert torch.allclose(vmap(lambda x, i: -x.log_softmax(0)[i])(logits, labels), expected)
    gradients = vmap(grad(lambda x, i: -x.log_softmax(0)[i]))(logits, labels)
    assert torch.allclose(gradients, logits.softmax(1) - torch.nn.functional.one_hot(labels, 5))
    pairs = vmap(lambda i: vmap(lambda x: x[i])(logits))(labels)
    assert torch.equal(pairs, logits.T[labels])
    assert torch.equal(vmap(lambda i: logits[0][i])(labels), logits[0][labels])


def test_a_mask_has_the_shape_of_what_it_indexes():
    for in_dims, mask in (((0, 0), torch.ones(B, 2, dtype=torch.bool)), ((0, None), torch.ones(2, dtype=torch.bool))):
        with pytest.raises(IndexError, match=r"shape of the mask \[2\] at index 0 does not match .* \[3, 4, 5\]"):
            vmap(lambda x, m: x[m], in_dims)(X, mask)


def test_scalars():
    x, zero = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(B, 1, dtype=torch.int64)
    for in_dims, index in (((0, 0), zero), ((0, None), zero[0])):
        check(lambda x, i: x.gather(0, i), in_dims, x, index)
        check(lambda x, i: x.gather(0, i[0]), in_dims, x, index)
        check(lambda x, i: x.scatter(0, i, 5.0), in_dims, x, index)
        check(lambda x, i: x.scatter_add(0, i, x[None]), in_dims, x, index)
        check(lambda x, i: x.index_select(0, i), in_dims, x, index)
        check(lambda x, i: x.index_fill(0, i, x * 2), in_dims, x, index)
        check(lambda x, i: x.take(i), in_dims, x, index)
    check(lambda x, i: x[None].gather(0, i[0]), (0, 0), x, zero)


@pytest.mark.parametrize("mode", ["sum", "prod", "mean", "amax", "amin"])
@pytest.mark.parametrize("include_self", [True, False])
def test_scatter_with_reduction(mode, include_self):
    rows = ROWS % 3
    index, source = rows[:, :, None, None].expand(B, 2, 4, 5), X[:, :2].flip(3)
    check(lambda x, i, s: x.scatter_reduce(0, i, s, mode, include_self=include_self), (0, 0, 0), X, index, source)
    check(lambda x, i, s: x.clone().scatter_reduce_(0, i, s, mode), (0, None, 0), X, index[0], source)
    if mode != "sum":
        f = lambda x, i, s: x.index_reduce(0, i, s, mode, include_self=include_self)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "index_reduce")
            check(f, (0, 0, 0), X, rows, source)
            check(f, (None, 0, None), X[0], rows, source[0])


def test_index_fill_by_a_tensor():
    value = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)
    check(lambda x, i, v: x.index_fill(0, i, v), (0, 0, 0), X, ROWS, value)
    check(lambda x, i, v: x.clone().index_fill_(-1, i, v), (1, None, 0), X.movedim(0, 1), ROWS[0], value)
    loss = lambda v, x, i: (x.index_fill(0, i, v) * x).sum()
    rows = ROWS % 3  # PyTorch's own derivative does not take negative ones
    expected = [
        plain_vjp(lambda v: [loss(v, x, i)], [v], [torch.ones((), dtype=v.dtype)])[1]  # noqa: B023
        for v, x, i in zip(value, X, rows, strict=True)
    ]
    torch.testing.assert_close(vmap(grad(loss))(value, X, rows), torch.stack(expected))  # other numbers of indices
    with pytest.raises(RuntimeError, match="value of 0 dimensions"):
        vmap(lambda x, i: x.index_fill(0, i, x))(X, ROWS)


def test_narrow_from_a_tensor():
    start = torch.tensor([0, 2, -2])
    f = lambda x, s: x.narrow(1, s, 2)
    check(f, (0, 0), X, start)
    check(f, (None, 0), X[0], start)
    gradient = vmap(grad(lambda x, s: f(x, s).sum()))(X, start)
    assert torch.equal(gradient.sum((1, 2, 3)), torch.full((B,), 30.0, dtype=torch.float64))
    assert gradient[2, :, 2:].eq(1).all()
    assert torch.equal(vmap(lambda x, s: jvp(lambda x: f(x, s), (x,), (x,))[1])(X, start), vmap(f)(X, start))
    with pytest.raises(RuntimeError, match="integer tensor of 0 dimensions"):
        vmap(lambda x: x.narrow(0, x.long()[:, 0, 0], 1))(X)


def test_take_along_no_dimension():
    index = torch.tensor([[0, 7, 59], [1, 1, 1], [5, 4, 3]])
    f = lambda x, i: torch.take_along_dim(x, i)
    for place in range(4):
        check(f, (place, 0), X.movedim(0, place), index, nested=False)
        gradient = vmap(grad(lambda x, i: f(x, i).sum()), (place, 0), place)(X.movedim(0, place), index)
        assert gradient.sum() == 9


def test_masked_scatter_and_its_derivatives():
    mask, source = X > 0, X.flip(0)
    f = lambda x, m, s: x.masked_scatter(m, s)
    check(f, (0, 0, 0), X, mask, source)
    check(f, (0, None, 0), X, mask[1], source)
    gradient = vmap(grad(lambda s, x, m: (f(x, m, s) * x).sum()))(source, X, mask)
    expected = [
        plain_vjp(lambda s: [(f(x, m, s) * x).sum()], [s], [torch.ones((), dtype=s.dtype)])[1]  # noqa: B023
        for s, x, m in zip(source, X, mask, strict=True)
    ]
    torch.testing.assert_close(gradient, torch.stack(expected))
    with pytest.raises(RuntimeError, match="source of dtype double, got float|source of dtype"):
        vmap(lambda x, m: x.masked_scatter(m, x.float()))(X, mask)


def test_fill_takes_one_value():
    for f in (lambda x: x.masked_fill(x > 0, x), lambda x: torch.fill(x, x)):
        with pytest.raises(RuntimeError, match="expected a value of 0 dimensions, got 3"):
            vmap(f)(X)


def test_as_strided_scatter_where_examples_interleave():
    x = X.movedim(0, 3).contiguous()  # in memory the examples are mixed
    write = lambda x, s: torch.as_strided_scatter(x, s, (3,), (x.stride(0),), 0)
    source = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=torch.float64)
    y = vmap(write, (3, 0))(x, source)
    expected = X.clone()
    expected[:, :, 0, 0] = source
    assert torch.equal(y, expected)
    assert torch.equal(
        vmap(lambda s: torch.as_strided_scatter(torch.zeros(2, 2), s, (2,), (3,)))(source.float()[:, :2])[
            :, [0, 1], [0, 1]
        ],
        source.float()[:, :2],
    )
