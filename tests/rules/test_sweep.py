"""The comparison with a loop finds what is wrong: a side that errs on purpose, and the program's table."""

from __future__ import annotations

import sys

import pytest

from tests.support import ops, sweep
from tests.support.forms import Side

SMALL = ops.Extent(samples=1, places=2, dtypes=1)


def _erring(change):
    def vmap(func, in_dims, randomness):
        mapped = sweep.OURS.vmap(func, in_dims, randomness)
        return lambda *args: [change(y) for y in mapped(*args)]

    return Side("erring", vmap, sweep.OURS.vjp, sweep.OURS.jvp)


def _report(change, form="function"):
    return sweep.sweep(ops.OPS["sin"], (sweep.OURS, _erring(change)), (form,), SMALL)


@pytest.mark.parametrize("form", ["function", "method", "in place", "out", "vjp", "jvp"])
def test_wrong_numbers_are_found_in_every_form(form):
    report = _report(lambda y: y * (1 + 1e-5), form)
    tally = report.tallies[form]["erring"]
    assert tally.passes == 1  # the empty batch, which has no numbers
    assert len(tally.wrong) == tally.cases - 1 > 0
    assert report.tallies[form]["functorch_lite"].passes == tally.cases


@pytest.mark.parametrize("change", [lambda y: y.float(), lambda y: y.unsqueeze(-1), lambda y: y[:0]])
def test_wrong_dtypes_and_shapes_are_found(change):
    tally = _report(change).tallies["function"]["erring"]
    assert len(tally.wrong) >= tally.cases - 1 > 0


def test_errors_are_refusals_or_crashes_and_what_the_peer_does_better_is_listed():
    def fail(_):
        raise RuntimeError("vmap: no")

    report = sweep.sweep(ops.OPS["sin"], (_erring(fail), sweep.OURS), ("function",), SMALL)
    tally = report.tallies["function"]["erring"]
    assert len(tally.refusals) == tally.cases == len(report.behind)


def test_the_program_prints_a_table_that_files_can_be_joined_to(tmp_path, monkeypatch, capsys):
    file = tmp_path / "sin.json"
    arguments = [
        "sweep",
        "--samples",
        "1",
        "--places",
        "1",
        "--forms",
        "function",
        "--json",
        str(file),
        "asinh",
        "tril",
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    sweep.main()
    table = capsys.readouterr().out
    assert "functorch_lite runs once for each example: nothing" in table
    monkeypatch.setattr(sys, "argv", ["sweep", "--join", str(file)])
    sweep.main()
    assert capsys.readouterr().out == table
