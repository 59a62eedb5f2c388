"""The list of operators and how vmap runs them: it is what happens, and the page in docs/ shows it."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from functorch_lite import LoopFallbackWarning, vmap
from functorch_lite.coverage import KINDS, main, operators
from tests.support import exceptions

ROOT = Path(__file__).parent.parent
aten = torch.ops.aten


def test_the_page_in_docs_is_up_to_date():
    if not torch.__version__.startswith("2.13."):
        pytest.skip("docs/coverage.md lists the operators of torch 2.13")
    page = (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8")
    # In a process of its own: this one may have imported packages that define operators.
    program = [sys.executable, "-W", "ignore", "-m", "functorch_lite.coverage", "--markdown"]
    printed = subprocess.run(program, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert page == printed, "run python -m functorch_lite.coverage --markdown > docs/coverage.md"


def test_every_operator_that_loops_has_a_reason():
    known = {name for names in exceptions.LOOPING_ATEN.values() for name in names}
    looping = {op.name for op in operators() if op.kind == "loop"}
    assert not looping - known, "operators without a batching rule: see docs/batching_rules.md"
    if torch.__version__.startswith("2.13."):
        assert not known - looping, "they do not loop any more: take them out of LOOPING_ATEN"


X = torch.rand(3, 2, 2)
CALLS = {
    "arange": lambda x: x + torch.arange(2),
    "eye": lambda x: x + torch.eye(2),
    "sin": torch.sin,
    "cumsum": lambda x: x.cumsum(0),
    "squeeze_": lambda x: x.clone().squeeze_(),
    "sin.out": lambda x: torch.sin(x, out=torch.empty_like(x)),
    "chunk": lambda x: x.chunk(2)[0],
    "kron": lambda x: torch.kron(x, x),
    "nonzero": torch.nonzero,
    "equal": lambda x: torch.tensor(torch.equal(x, x)),
    "resize_": lambda x: x.clone().resize_(4),
    "_to_sparse": lambda x: x.to_sparse(),
    "sparse_dim": lambda x: torch.tensor(x.sparse_dim()),
    "rot90": lambda x: x.rot90(),
    "dist": lambda x: torch.dist(x, x + 1),
    "_test_optional_intlist": lambda x: aten._test_optional_intlist(x.flatten().int(), [1, 2, 3, 4]),
    "_test_parallel_materialize": lambda x: aten._test_parallel_materialize(x, 1),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_listed_is_what_happens(name):
    (op,) = (op for op in operators() if op.name == name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", LoopFallbackWarning)
        try:
            result = vmap(CALLS[name])(X)
            happened = "loop" if caught else "runs"
        except NotImplementedError as error:
            happened, message = "refusal", str(error)
    assert happened == (op.kind if op.kind in ("loop", "refusal") else "runs")
    if happened == "refusal":
        assert f"aten::{name} cannot run on batched values" in message
        assert message.endswith(op.detail)
    else:
        torch.testing.assert_close(result, torch.stack([CALLS[name](x) for x in X]))


def test_those_calls_are_of_every_kind():
    kinds = {op.name: op.kind for op in operators()}
    assert {kinds[name] for name in CALLS} == set(kinds.values()) <= set(KINDS)


def test_options_filter(capsys):
    main(["cumsum"])
    lines = capsys.readouterr().out.splitlines()
    assert "cumsum_ rule along csrc/rules/reduction.cpp" in {" ".join(line.split()) for line in lines}
    assert lines[-1].startswith(f"torch {torch.__version__}: ")
    assert all("cumsum" in line for line in lines[:-1])
    main(["--kind", "refusal", "_nested_get"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 3
    assert all("Use a padded tensor with a mask" in line for line in lines[:-1])


@pytest.mark.parametrize("arguments", [["--kind", "fast"], ["--colour"]])
def test_unknown_options_are_errors(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert arguments[-1] in capsys.readouterr().err
