"""pickle and deepcopy of transformed functions, and of modules that hold them; other processes."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

from functorch_lite import (
    functionalize,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacobian,
    jacrev,
    jit,
    linearize,
    value_and_grad,
    value_and_jacobian,
    vjp,
    vmap,
)

from . import module_level
from .module_level import Forces, Model, collate, energy

TRANSFORMED = {
    "vmap": vmap(torch.sin, 0, 1, "same", chunk_size=2),
    "grad": grad(energy),
    "grad_of_two": grad(torch.dot, argnums=(0, 1)),
    "grad_and_value": grad_and_value(energy),
    "value_and_grad": value_and_grad(energy),
    "jacrev": jacrev(torch.sin, chunk_size=1),
    "jacfwd": jacfwd(torch.sin, randomness="same"),
    "jacobian": jacobian(torch.sin),
    "value_and_jacobian": value_and_jacobian(torch.sin),
    "hessian": hessian(energy),
    "functionalize": functionalize(torch.sin, remove="mutations_and_views"),
    "nested": vmap(grad(grad(torch.sin))),
    "jit": jit(grad(energy)),
    "jit_dynamic": jit(vmap(grad(torch.sin)), dynamic=True),
    "partial": vmap(functools.partial(torch.mul, other=torch.tensor(2.0))),
    "module": vmap(nn.Linear(3, 2)),
    "global": module_level.force,
    "decorated": module_level.decorated,
}


def _arguments(name):
    x = torch.arange(3.0)
    return {
        "grad_of_two": (x, x + 1),
        "vmap": (torch.rand(3, 2),),
        "module": (torch.rand(2, 3),),
        "global": (x[None],),
    }.get(name, (x,))


@pytest.mark.parametrize("again", [copy.deepcopy, copy.copy, lambda f: pickle.loads(pickle.dumps(f))])
@pytest.mark.parametrize("name", TRANSFORMED)
def test_is_made_again(name, again):
    function = TRANSFORMED[name]
    arguments = _arguments(name)
    expected = function(*arguments)
    made = again(function)
    assert_close(made(*arguments), expected)
    assert made.__name__ == function.__name__
    assert_close(again(made)(*arguments), expected)


def test_a_global_is_the_same_object():
    assert pickle.loads(pickle.dumps(module_level.decorated)) is module_level.decorated


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_module_with_transformed_functions(again):
    """A copy has transformed functions of its own parameters."""
    model, x = Model(), torch.rand(2, 3)
    expected = model(x)
    made = again(model)
    assert_close(made(x), expected)
    with torch.no_grad():
        made.layer.weight.zero_()
    assert_close(made.jacobians(x), torch.zeros(2, 3, 3))
    assert_close(model(x), expected)


def test_torch_save(tmp_path):
    model, x = Model(), torch.rand(2, 3)
    torch.save(model, tmp_path / "model.pt")
    assert_close(torch.load(tmp_path / "model.pt", weights_only=False)(x), model(x))


def test_what_cannot_be_pickled():
    _, vjp_fn = vjp(torch.sin, torch.rand(2))
    _, jvp_fn = linearize(torch.sin, torch.rand(2))
    for function, name in ((vjp_fn, "vjp_fn"), (jvp_fn, "jvp_fn")):
        with pytest.raises(
            TypeError, match=f"{name}: got it to pickle, expected what a transform makes.*call the trans"
        ):
            pickle.dumps(function)
        assert copy.deepcopy(function) is function
    with pytest.raises(Exception, match="lambda"):
        pickle.dumps(vmap(lambda x: x))


def test_are_functions_in_every_other_way():
    mapped = vmap(energy)
    assert mapped.__name__ == "energy"
    assert mapped.__wrapped__ is energy
    assert inspect.signature(mapped) == inspect.signature(energy)
    assert repr(mapped) == "<vmap of energy>"

    class Squares:
        factor = 2

        @functools.partial(vmap, in_dims=(None, 0))
        def of(self, x):
            return x**2 * self.factor

    assert_close(Squares().of(torch.arange(3.0)), 2 * torch.arange(3.0) ** 2)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_workers(start):
    """Transforms in data sets and collate functions, made in the parent or in the worker."""
    loader = DataLoader(
        Forces(vmap(grad(energy))), batch_size=2, num_workers=2, collate_fn=collate, multiprocessing_context=start
    )
    count = 0
    for x, forces, jacobians, again in loader:
        assert_close(forces, x.cos())
        assert_close(again, x.cos())
        assert_close(jacobians, torch.diag_embed(x[:, 0].cos()))
        count += len(x)
    assert count == 6


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_another_process(start):
    context = mp.get_context(start)
    queue = context.Queue()
    x = torch.arange(3.0)
    process = context.Process(
        target=module_level.worker_of_torch_multiprocessing, args=(vmap(grad(torch.sin)), x, queue)
    )
    process.start()
    found = queue.get(timeout=120)
    process.join()
    assert_close(torch.tensor(found), x.cos())
