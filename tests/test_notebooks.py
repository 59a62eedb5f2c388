"""The notebooks run from top to bottom, and are kept as they should be in the repository."""

import json
import runpy
from pathlib import Path

import pytest

from functorch_lite import _rules

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run = runpy.run_path(str(path.parent / "run.py"))["run"]
    assert run(path, tmp_path) == sum(cell["cell_type"] == "code" for cell in cells(path))
    assert "==" in capsys.readouterr().out


def test_tour_shows_what_it_promises(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = next(path for path in NOTEBOOKS if path.stem == "whirlwind_tour")
    runpy.run_path(str(path.parent / "run.py"))["run"](path, tmp_path)
    printed = capsys.readouterr().out
    parts = ("BatchedTensor(level=1", "cannot run on batched values", "torch.ops.aten.cos", "[figure: ")
    for part in (*parts, "code: return (x @ weights).tanh().square().sum()"):
        assert part in printed
    assert [picture.suffix for picture in tmp_path.iterdir()] == [".png"]


def test_custom_rules_shows_the_warning_and_removes_what_it_overrides(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = next(path for path in NOTEBOOKS if path.stem == "custom_rules")
    runpy.run_path(str(path.parent / "run.py"))["run"](path, tmp_path)
    printed = capsys.readouterr().out
    for part in ("notebook::counts has no batching rule", "with the built-in rule", "tensor(65.88"):
        assert part in printed
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
    first_text = "".join(cells(path)[0]["source"])
    first_code = next("".join(cell["source"]) for cell in cells(path) if cell["cell_type"] == "code")
    assert (
        f"colab.research.google.com/github/functorch-lite/functorch_lite/blob/main/notebooks/{path.name}" in first_text
    )
    assert 'find_spec("functorch_lite")' in first_code
