"""The notebooks run from top to bottom, show what they promise, and are kept as they should be in the repository."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch

from functorch_lite import _rules

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
BADGE = "colab.research.google.com/github/functorch-lite/functorch_lite/blob/main/notebooks"

#: What a notebook prints.
SHOWS = {
    "custom_rules": ["notebook::counts has no batching rule", "with the built-in rule", "tensor(65.88"],
    "partitioner": ["code: return (x @ weight).tanh().square().sum()", "<Picture 'joint graph'", "budget 0.25"],
    "whirlwind_tour": [
        *("BatchedTensor(level=1", "cannot run on batched values", "torch.ops.aten.cos"),
        "code: return (x @ weights).tanh().square().sum()",
    ],
}

#: The numbers after these words, with bounds: comparisons with independent references, which the notebooks make.
NUMBERS = {
    "ensembles": {
        "largest difference of a weight": (0, 1e-10),
        "disagreement in the gap, in units of that at the data": (5, 100),
        "learned noise, in units of the true one": (0.8, 1.2),
    },
    "implicit": {
        "Kepler, derivatives against formulas": (0, 1e-12),
        "implicit against the unrolled loop, relative": (0, 1e-13),
        "slope of the validation loss against differences": (0, 1e-8),
        "loss on new examples, in units of that at the start": (0.5, 0.8),
        "penalties of what does not matter minus those of what does": (2, 10),
    },
    "maml": {
        "largest difference from torch.optim.SGD": (0, 1e-13),
        "largest difference from plain autograd": (0, 1e-12),
        "MAML, error after two steps, in units of that before": (0, 0.4),
        "MAML against pretrained after two steps": (0, 0.5),
    },
    "ntk": {
        "Jacobians against products": (0, 1e-12),
        "kernel against autograd": (0, 1e-12),
        "width 512, network against its kernel": (0, 0.03),
        "width 512 in units of width 16": (0, 0.4),
    },
    "partitioner": {
        "default partition, largest difference of a gradient from eager": (0, 0),
        "minimum cut, largest difference of a gradient from eager": (0, 0),
        "kept by the minimum cut, counted, in units of the report": (0.999, 1.001),
        "kept by the minimum cut, in units of the default partition": (0.3, 0.6),
    },
    "per_sample": {
        "vmap(grad) against the loop": (0, 1e-5),
        "per_sample_grads against the loop": (0, 1e-5),
        "norms against the loop, relative": (0, 1e-5),
        "clipped sum against the loop, relative": (0, 1e-5),
        "accountant against integration, relative": (0, 1e-9),
        "share of wrong labels among as many suspects": (0.5, 1),
        "what one example adds to the clipped sum": (0, 1.0001),
        "accuracy with noise 2.0": (0.7, 1),
        "epsilon with noise 2.0": (2, 5),
    },
    "pinn": {
        "second derivative against differences": (0, 1e-4),
        "relative error after Adam": (0, 0.1),
        "relative error after Gauss-Newton": (0, 1e-3),
    },
    "second_order": {
        "Jacobian against finite differences": (0, 1e-7),
        "gradient at the fit": (0, 1e-8),
        "Laplace against other fits, largest ratio": (1, 1.25),
        "Gauss-Newton product against the matrix": (0, 1e-12),
        "Lanczos against the matrix": (0, 1e-9),
        "loss after Gauss-Newton": (0, 0.02),
    },
}


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def number_after(words, printed):
    (found,) = re.findall(rf"^{re.escape(words)}: (\S+?),?$", printed, re.MULTILINE)
    return float(found)


@pytest.fixture
def _default_dtype():
    """Notebooks may choose another one."""
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@pytest.mark.slow
@pytest.mark.usefixtures("_default_dtype")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_and_shows_what_it_promises(path, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run = runpy.run_path(str(path.parent / "run.py"))["run"]
    assert run(path, tmp_path) == sum(cell["cell_type"] == "code" for cell in cells(path))
    printed = capsys.readouterr().out
    for part in SHOWS.get(path.stem, []):
        assert part in printed
    for words, (low, high) in NUMBERS.get(path.stem, {}).items():
        assert low <= number_after(words, printed) <= high, words
    assert [picture.suffix for picture in tmp_path.iterdir()].count(".png") >= (path.stem != "custom_rules")
    assert not [name for name in _rules.overrides if name.startswith("aten::")]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_valid_and_stripped(path):
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(path, as_version=4))
    for cell in cells(path):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
            assert len(cell["source"]) <= 20, f"{cell['id']} is long"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_opens_in_colab_and_installs_first(path):
    assert f"{BADGE}/{path.name}" in "".join(cells(path)[0]["source"])
    install = next("".join(cell["source"]) for cell in cells(path) if cell["cell_type"] == "code")
    assert 'find_spec("functorch_lite")' in install
    assert "building takes one to two minutes" in install
    assert install.count("subprocess.run") == install.count("timeout=")
    first = next("".join(cell["source"]) for cell in cells(NOTEBOOKS[0]) if cell["cell_type"] == "code")
    assert install == first  # all of them install in the same way


def test_every_recipe_compares_numbers():
    tours = {"custom_rules", "whirlwind_tour"}
    assert {path.stem for path in NOTEBOOKS} - tours == set(NUMBERS)


def test_several_notebooks_make_a_table(tmp_path, capsys):
    run_all = runpy.run_path(str(NOTEBOOKS[0].parent / "run.py"))["run_all"]
    good, bad = tmp_path / "good.ipynb", tmp_path / "bad.ipynb"
    for path, source in ((good, "1 + 1"), (bad, "1 / 0")):
        cell = {"cell_type": "code", "id": "cell", "source": [source]}
        path.write_text(json.dumps({"cells": [cell]}))
    assert run_all([good], tmp_path)
    assert not run_all([good, bad], tmp_path)
    assert re.search(r"^bad +\d+\.\d +\d+\.\d  failed: .*bad\.txt$", capsys.readouterr().out, re.MULTILINE)
    assert "ZeroDivisionError" in (tmp_path / "bad.txt").read_text()
