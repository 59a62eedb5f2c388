"""Compiled functions do what eager ones do: see tests/support/observations.py and tests/support/compiled_cases.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils import _pytree

from tests.support import observations
from tests.support.compiled_cases import CASES
from tests.support.observations import EAGER, VARIANTS, Implementation, differences


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", CASES)
def test_case(name, variant):
    assert not differences(observations.ours(), CASES[name], variant)


@pytest.mark.parametrize("name", CASES)
def test_cases_are_the_same_whenever_they_run(name):
    assert not differences(EAGER, CASES[name])


def _erring(compile):
    return Implementation(
        "erring", SimpleNamespace(**{**vars(EAGER.api), "aot_function": lambda f, *_, **__: compile(f)})
    )


def _copied(tree):
    return _pytree.tree_map_only(torch.Tensor, torch.clone, tree)


def _remembers(func):
    results = []

    def call(*args):
        results.append(func(*args))
        return results[0]

    return call


def _in_other_mode(func):
    def call(*args):
        with torch.enable_grad():
            return func(*args)

    return call


def _draws(func):
    def call(*args):
        torch.rand(1)
        return func(*args)

    return call


def _writes(func):
    def call(*args):
        with torch.no_grad():
            args[0].mul_(1)
        return func(*args)

    return call


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, g):
        return g * (1 + 1e-12)


#: What a compiler might do wrong, a case that shows it, and what is found.
ERRORS = {
    "numbers": (lambda f: lambda x: f(x) * (1 + 1e-15), "zero_cotangent", "output 0 is"),
    "gradients": (
        lambda f: lambda x: _WrongGradient.apply(f(x)),
        "captured_tensor_that_requires_grad",
        "gradient of leaf 0",
    ),
    "writes lost": (lambda f: lambda *args: f(*_copied(args)), "input_written_once", "input 0 is"),
    "writes made up": (_writes, "zero_cotangent", "input 0, is written"),
    "views copied": (lambda f: lambda *args: _copied(f(*args)), "outputs_share_memory", "shares memory with"),
    "inputs copied": (lambda f: lambda *args: _copied(f(*args)), "output_is_an_input", "output 0, is"),
    "views made up": (lambda f: lambda x: (lambda y: (y[0], y[1]))(torch.stack(f(x))), "where", "shares memory with"),
    "containers": (lambda f: lambda x: list(f(x)), "where", "structure"),
    "strides": (lambda f: lambda x: tuple(y.t().contiguous().t() for y in f(x)), "where", "strides"),
    "random numbers": (_draws, "random_like", "output 0 is"),
    "generator": (_draws, "zero_cotangent", "random state"),
    "constants": (_remembers, "zero_cotangent", "second call: output 0 is"),
    "grad mode": (_in_other_mode, "zero_cotangent", "no_grad: output 0, flags"),
    "derivative lost": (lambda f: lambda x: f(x).detach(), "zero_cotangent", "output 0, flags"),
    "derivative made up": (
        lambda f: lambda x: f(x).detach().requires_grad_(),
        "zero_cotangent",
        "no input requires grad: output 0, flags",
    ),
    "dtype": (lambda f: lambda x: f(x).float(), "zero_cotangent", "output 0, type"),
    "error": (lambda f: lambda x: f(x, x), "zero_cotangent", "raises TypeError"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_found(name):
    compile, case, text = ERRORS[name]
    assert any(text in found for found in differences(_erring(compile), CASES[case]))
