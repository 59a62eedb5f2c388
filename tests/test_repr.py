"""What wrappers show when they are printed, and that plain tensors print as ever."""

from __future__ import annotations

import pytest
import torch

from functorch_lite import grad, jvp, vmap

ONES = torch.ones(2, 3)
BATCHED = "BatchedTensor({}, batch_dim=0, batch_size=2, shape=(3,), value=\n"
VALUES = "    tensor([[1., 1., 1.],\n            [1., 1., 1.]]))"


def _printed(transform, *args):
    """What a tensor prints as inside ``transform``, and after it returned."""
    kept = []

    def f(x):
        kept.extend([x, repr(x), str(x), f"{x}"])
        return x.sum()

    transform(f)(*args)
    tensor, *inside = kept
    after = [repr(tensor), str(tensor), f"{tensor}"]
    assert len(set(inside)) == len(set(after)) == 1
    return inside[0], after[0]


def _push(f):
    return lambda x: jvp(f, (x,), (x,))


def test_vmap():
    for text, level in zip(_printed(vmap, ONES), ("level=1", "level closed"), strict=True):
        assert text == BATCHED.format(level) + VALUES


def test_batch_of_scalars():
    inside, _ = _printed(vmap, torch.ones(2))
    assert inside == "BatchedTensor(level=1, batch_dim=0, batch_size=2, shape=(), value=\n    tensor([1., 1.]))"


@pytest.mark.parametrize(("transform", "head"), [(grad, "GradTensor({}, requires_grad=True"), (_push, "DualTensor({}")])
def test_autodiff(transform, head):
    for text, level in zip(_printed(transform, torch.tensor(2.0)), ("level=1", "level closed"), strict=True):
        assert text == head.format(level) + ", value=\n    tensor(2.))"


def test_result_of_an_operator_shows_its_node():
    seen = []
    grad(lambda x: seen.append(repr(x.sin())) or x.sum())(torch.zeros(1))
    assert seen == ["GradTensor(level=1, grad_fn=<SinBackward0>, value=\n    tensor([0.]))"]


@pytest.mark.parametrize(
    ("transform", "order"),
    [
        (lambda f: vmap(grad(f)), ["GradTensor(level=2", "BatchedTensor(level=1", "tensor([["]),
        (lambda f: grad(lambda y: vmap(f)(y).sum()), ["BatchedTensor(level=2", "GradTensor(level=1", "tensor([["]),
        (lambda f: vmap(_push(f)), ["DualTensor(level=2", "BatchedTensor(level=1", "tensor([["]),
        (lambda f: lambda x: _push(lambda y: vmap(f)(y))(x), ["BatchedTensor(level=2", "DualTensor(level=1"]),
    ],
    ids=["vmap-grad", "grad-vmap", "vmap-jvp", "jvp-vmap"],
)
def test_nested(transform, order):
    inside, after = _printed(transform, ONES)
    places = [inside.find(part) for part in order]
    assert -1 not in places
    assert places == sorted(places)
    assert "level closed" in after
    assert "level=" not in after


def test_print(capsys):
    vmap(lambda x: print(x) or x)(ONES)
    assert capsys.readouterr().out == BATCHED.format("level=1") + VALUES + "\n"


def test_printing_inside_does_not_change_the_result():
    x = torch.rand(2, 3)
    f = lambda x: (repr(x), (x * x).sum())[1]  # noqa: E731
    torch.testing.assert_close(vmap(grad(f))(x), 2 * x)


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (torch.tensor(2.5), "tensor(2.5000)"),
        (torch.zeros(2, dtype=torch.float64), "tensor([0., 0.], dtype=torch.float64)"),
        (torch.ones(1, requires_grad=True), "tensor([1.], requires_grad=True)"),
        (torch.ones(0, 2), "tensor([], size=(0, 2))"),
    ],
)
def test_plain_tensors_print_as_before(tensor, text):
    assert repr(tensor) == str(tensor) == text
    seen = []
    vmap(grad(lambda x: seen.append(repr(tensor)) or x))(torch.ones(2))
    assert seen == [text]


def test_plain_format_takes_a_specification():
    assert f"{torch.tensor(2.5):.2f}" == "2.50"
    assert f"{torch.tensor(3):03d}" == "003"
