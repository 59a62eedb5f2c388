"""construct_in_ensemble, beside models that are made one by one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from functorch_lite import construct_in_ensemble, functional_call, stack_module_state, vmap


class Net(nn.Module):
    def __init__(self, width, *, bias=True):
        super().__init__()
        self.layer, self.norm = nn.Linear(3, width, bias=bias), nn.BatchNorm1d(width)
        self.register_buffer("shift", torch.rand(width))
        self.fixed = nn.Parameter(torch.zeros(2), requires_grad=False)

    def forward(self, x):
        return self.norm(self.layer(x)) + self.shift


@pytest.mark.parametrize("seed", [None, 7])
def test_is_what_models_one_by_one_are(seed):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    found = construct_in_ensemble(Net, 4, 5, seed=seed, bias=False)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    models = []
    for i in range(4):
        if seed is not None:
            torch.manual_seed(seed + i)
        models.append(Net(5, bias=False))
    expected = stack_module_state(models)
    assert_close(found, expected)
    assert [list(tensors) for tensors in found] == [list(tensors) for tensors in expected]
    for tensors, others in zip(found, expected, strict=True):
        for name, tensor in tensors.items():
            assert tensor.is_leaf
            assert tensor.requires_grad == others[name].requires_grad
    if seed is None:
        assert torch.equal(after, torch.get_rng_state())
    else:
        assert torch.equal(after, state)


def test_runs():
    params, buffers = construct_in_ensemble(lambda: Net(2).eval(), 3, seed=0)
    with torch.device("meta"):
        skeleton = Net(2).eval()
    x = torch.rand(4, 3)
    found = vmap(lambda p, b: functional_call(skeleton, (p, b), x), in_dims=(0, 0))(params, buffers)
    for i in range(3):
        torch.manual_seed(i)
        assert_close(found[i], Net(2).eval()(x))


def test_dtype_and_device_are_those_of_the_models():
    params, _ = construct_in_ensemble(nn.Linear, 2, 3, 4, dtype=torch.float64, device="meta")
    assert params["weight"].dtype == torch.float64
    assert params["weight"].is_meta
    assert params["weight"].shape == (2, 4, 3)


def _sizes():
    sizes = iter([1, 2])
    return lambda: nn.Linear(next(sizes), 2)


def _kinds():
    kinds = iter([nn.Linear(2, 2), nn.Linear(2, 2, bias=False)])
    return lambda: next(kinds)


@pytest.mark.parametrize(
    ("make", "arguments", "error", "message"),
    [
        (3, (2,), TypeError, "expected a class of modules"),
        (Net, (0, 2), ValueError, "got count=0, expected the number of models"),
        (Net, (2.5, 2), ValueError, "got count=2.5, expected the number of models"),
        (lambda: 3, (2,), TypeError, "made a int, expected a module"),
        (nn.LazyLinear, (2, 3), ValueError, "'weight' is a lazy tensor without a shape"),
        (_sizes(), (2,), ValueError, "parameter 'weight' differs between the modules: shapes"),
        (_kinds(), (2,), ValueError, "only some of the modules have a parameter 'bias'"),
    ],
)
def test_refuses(make, arguments, error, message):
    with pytest.raises(error, match=message):
        construct_in_ensemble(make, *arguments)


def test_refuses_a_seed():
    with pytest.raises(TypeError, match="got seed='a', expected an int"):
        construct_in_ensemble(Net, 2, 2, seed="a")
