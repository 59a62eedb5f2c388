"""Nested arguments, against torch.utils._pytree, which handles what ours leaves to it."""

from __future__ import annotations

from collections import OrderedDict, namedtuple

import pytest
import torch
import torch.utils._pytree as pytree

from functorch_lite import _C, _tree, grad, vmap

Point = namedtuple("Point", "x y")
X = torch.zeros(2)
TREES = {
    "tensor": X,
    "none": None,
    "text": "text",
    "empty": ((), [], {}),
    "numbers": (1, 2.0, True, 3j, None),
    "nested": {"a": [X, (X, {"b": X})], "c": {}, "d": 1},
    "names made at run time": {"".join(["lay", str(i)]): X for i in range(3)},
    "names that are no text": {0: X, None: X},
    "registered": (Point(X, [X]), OrderedDict(a=X)),
    "unknown leaf": [object, torch.float32, X],
    "deep": [[[[[[X]]]]]],
}


def is_same(a, b):
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", TREES)
def test_there_and_back(name):
    tree = TREES[name]
    leaves, spec = _C.flatten(tree)
    expected_leaves, expected_spec = pytree.tree_flatten(tree)
    assert is_same(leaves, expected_leaves)
    assert spec == expected_spec
    for given in (leaves, tuple(leaves)):
        back = _C.unflatten(given, spec)
        assert type(back) is type(tree)
        assert is_same(pytree.tree_leaves(back), leaves)
        assert pytree.tree_structure(back) == expected_spec
    assert is_same(pytree.tree_leaves(_C.unflatten(leaves, expected_spec)), leaves)


def test_structures_are_made_once():
    one, other = ({"a": X, "b": [X]} for _ in range(2))
    assert _C.flatten(one)[1] is _C.flatten(other)[1]
    assert _C.flatten(one)[1] != _C.flatten({"b": [X], "a": X})[1]


def test_more_structures_than_are_kept():
    first = _C.flatten({"first": X})[1]
    for i in range(1500):
        leaves, spec = _C.flatten({f"name {i}": X})
        assert _C.unflatten(leaves, spec) == {f"name {i}": X}
    assert _C.unflatten([1], first) == {"first": 1}


def test_wrong_number_of_leaves():
    _, spec = _C.flatten([X, X])
    with pytest.raises(ValueError, match="leaves"):
        _C.unflatten([X], spec)


def test_endless_structure():
    endless = []
    endless.append(endless)
    with pytest.raises(RecursionError):
        _C.flatten(endless)


def test_new_dicts_are_the_callers_own():
    tree = {"a": X}
    leaves, spec = _C.flatten(tree)
    back = _C.unflatten(leaves, spec)
    back["b"] = X
    assert list(tree) == ["a"]
    assert list(_C.unflatten(leaves, spec)) == ["a"]


@pytest.mark.parametrize(
    ("dims", "tree", "expected"),
    [
        (0, X, [0]),
        (None, [X, {"a": X}], [None, None]),
        ((0, None), (X, [X, X]), [0, None, None]),
        ({"a": 0, "b": (1, None)}, {"a": [X, X], "b": (X, X)}, [0, 0, 1, None]),
        ((0, 1), (X,), None),
        ((0,), [X], None),
        ({"a": 0}, {"b": X}, None),
        ({"b": 0, "a": 1}, {"a": X, "b": X}, None),
        ([0], X, None),
        ((True,), (X,), None),
        (Point(0, None), Point(X, X), [0, None]),
        ((Point(0, None), 1), (Point(X, [X, X]), X), [0, None, None, 1]),
    ],
)
def test_dimensions_for_leaves(dims, tree, expected):
    assert _tree.broadcast_dims(dims, tree) == expected


def test_transforms_of_arguments_of_all_kinds():
    def f(point, options):
        return (point.x * options["scale"][0]).sum()

    point, options = Point(torch.ones(3), torch.ones(3)), {"scale": [2.0, "unused"], "unused": None}
    assert grad(f)(point, options).x.tolist() == [2.0, 2.0, 2.0]
    points = Point(torch.ones(4, 3), torch.ones(4, 3))
    assert vmap(f, in_dims=(0, None))(points, options).tolist() == [6.0] * 4
