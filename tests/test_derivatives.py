"""Derivatives of every operator in PyTorch's sample database: see tests/support/derivatives.py.

FUNCTORCH_LITE_SWEEP=full takes every sample.
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest

import functorch_lite as fl
from tests.support import derivatives, exceptions, ops

EXTENT = ops.FULL if os.environ.get("FUNCTORCH_LITE_SWEEP") == "full" else ops.Extent(1, None, None)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name, op in ops.OPS.items() if op.supports_autograd])
def test_operator(name):
    report = derivatives.sweep(ops.OPS[name], {derivatives.OURS: fl}, list(derivatives.FORMS), EXTENT)
    assert not report.all("wrong")
    refused = report.all("refused")
    if name not in exceptions.WITHOUT_DERIVATIVE:
        assert not refused
    elif EXTENT == ops.FULL:
        assert refused, f"{name} is among the exceptions and refuses nothing"
    assert fl.level_depth() == 0


def _erring(change):
    """functorch_lite, with what its vjp and jvp return changed."""

    def vjp(f, *primals):
        output, pullback = fl.vjp(f, *primals)
        return output, lambda *cotangents: tuple(change(x) for x in pullback(*cotangents))

    def jvp(f, primals, tangents):
        output, pushed = fl.jvp(f, primals, tangents)
        return output, [change(x) for x in pushed]

    return SimpleNamespace(vjp=vjp, jvp=jvp, vmap=fl.vmap, jacrev=fl.jacrev, jacfwd=fl.jacfwd, hessian=fl.hessian)


@pytest.mark.parametrize("name", ["sin", "mm", "nn.functional.layer_norm"])
@pytest.mark.parametrize("form", [name for name, form in derivatives.FORMS.items() if not form.is_jacobian])
def test_wrong_numbers_are_found(form, name):
    def change(x):
        return x * (1 + 1e-3)

    op, extent = ops.OPS[name], ops.Extent(1, None, None)
    report = derivatives.sweep(op, {derivatives.OURS: fl, "erring": _erring(change)}, [form], extent)
    tallies = report.tallies[form]
    assert tallies[derivatives.OURS].passes + tallies[derivatives.OURS].unjudged == tallies["erring"].cases
    # Differences are too coarse for one sample in complex numbers.
    assert tallies[derivatives.OURS].passes - len(tallies["erring"].wrong) in (0, 1)
    assert tallies["erring"].wrong


def test_the_program_prints_a_table_that_files_can_be_joined_to(tmp_path, monkeypatch, capsys):
    file = tmp_path / "asinh.json"
    monkeypatch.setattr(
        sys, "argv", ["derivatives", "--samples", "1", "--forms", "vjp,jvp", "--json", str(file), "asinh"]
    )
    derivatives.main()
    table = capsys.readouterr().out
    assert "passes of torch.func that are none of ours: 0" in table
    monkeypatch.setattr(sys, "argv", ["derivatives", "--join", str(file)])
    derivatives.main()
    assert capsys.readouterr().out == table
