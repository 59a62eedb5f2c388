"""Every operator of PyTorch's sample database, compiled: see tests/support/compiled.py.

FUNCTORCH_LITE_SWEEP=full takes every sample, dtype and form.
"""

from __future__ import annotations

import os
import random
import sys
import zlib
from types import SimpleNamespace

import pytest
import torch

import functorch_lite as fl
from tests.support import compiled, observations, ops
from tests.support.observations import EAGER, Implementation

IS_FULL = os.environ.get("FUNCTORCH_LITE_SWEEP") == "full"
EXTENT = ops.FULL if IS_FULL else ops.Extent(1, None, 1)


def _forms(name):
    """In a short run one form, which depends on nothing but the name."""
    forms = list(compiled.FORMS)
    return forms if IS_FULL else [random.Random(zlib.crc32(name.encode())).choice(forms)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ops.OPS)
def test_operator(name):
    ours = observations.ours()
    report = compiled.sweep(ops.OPS[name], [ours], _forms(name), EXTENT)
    assert not report.all("wrong", ours.name)
    tallies = {form: sides[ours.name] for form, sides in report.tallies.items()}
    raising = {form for form, tally in tallies.items() if tally.refused or tally.crashed}
    excepted = {
        form
        for form, tally in tallies.items()
        if tally.cases and (name in compiled.RAISING or f"{name} ({form})" in compiled.RAISING)
    }
    assert raising == excepted, report.all("refused", ours.name) + report.all("crashed", ours.name)
    assert fl.level_depth() == 0


def _erring(change):
    def aot_function(f, *_, **__):
        return lambda *args: torch.utils._pytree.tree_map_only(torch.Tensor, change, f(*args))

    return Implementation("erring", SimpleNamespace(**{**vars(EAGER.api), "aot_function": aot_function}))


class _WrongSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, g):
        return _WrongGradient.apply(g)


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, g):
        return g * (1 + 1e-6)


RUN_AS_GRAPHS = [name for name, form in compiled.FORMS.items() if not form.options.keys() & {"replay", "donated"}]
ERRORS = {
    "numbers": (lambda y: y * (1 + 1e-6), RUN_AS_GRAPHS),
    "gradients": (_WrongGradient.apply, RUN_AS_GRAPHS),
    "second derivatives": (_WrongSecondDerivative.apply, ["double backward"]),
    "shape": (lambda y: y[None], ["function"]),
    "dtype": (lambda y: y.to(torch.complex64), ["function"]),
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", ["sin", "mm", "nn.functional.layer_norm"])
def test_errors_are_found(name, error):
    change, forms = ERRORS[error]
    for form in forms:
        report = compiled.sweep(ops.OPS[name], [_erring(change), EAGER], [form], ops.Extent(1, None, 1))
        tallies = report.tallies[form]
        assert len(tallies["erring"].wrong) == tallies["erring"].cases == tallies["eager"].passes
        assert tallies["erring"].cases or form == "in place"


def test_refusals_and_crashes_are_told_apart():
    def failing(message):
        def aot_function(f, *_, **__):
            raise RuntimeError(message)

        return Implementation(message, SimpleNamespace(**{**vars(EAGER.api), "aot_function": aot_function}))

    sides = [failing("compile: f got a list, expected a tensor."), failing("list index out of range")]
    report = compiled.sweep(ops.OPS["sin"], sides, ["function"], ops.Extent(1, None, 1))
    refused, crashed = (report.tallies["function"][side.name] for side in sides)
    assert len(refused.refused) == refused.cases == 1
    assert len(crashed.crashed) == crashed.cases == 1


def test_the_program_prints_a_table_that_files_can_be_joined_to(tmp_path, monkeypatch, capsys):
    file = tmp_path / "asinh.json"
    monkeypatch.setattr(
        sys, "argv", ["compiled", "--samples", "1", "--forms", "function", "--json", str(file), "asinh"]
    )
    compiled.main()
    table = capsys.readouterr().out
    assert "passes of the peer that are none of ours: 0" in table
    monkeypatch.setattr(sys, "argv", ["compiled", "--join", str(file)])
    compiled.main()
    assert capsys.readouterr().out == table
