"""The notebook that this project started from runs as it is, with `functorch` replaced by `functorch_lite`."""

import runpy
from pathlib import Path

import pytest
import torch

CELLS = runpy.run_path(str(Path(__file__).parent / "data" / "seed_cells.py"))["CELLS"]


@pytest.fixture(scope="module")
def after_each_cell():
    """The variables after each cell; the cells themselves assert what they can."""
    torch.manual_seed(0)
    namespace, snapshots = {}, []
    for i, source in enumerate(CELLS):
        exec(compile(source, f"seed cell {i}", "exec"), namespace)
        snapshots.append(dict(namespace))
    return snapshots


def test_all_cells_are_there():
    assert len(CELLS) == 10
    names = " ".join(CELLS)
    assert all(f"import {name}\n" in names for name in ("grad", "vmap", "vjp", "jvp", "jacrev", "jacfwd", "hessian"))


def test_vmap_of_a_model(after_each_cell):
    v = after_each_cell[1]
    torch.testing.assert_close(v["result"], (v["examples"] @ v["weights"]).relu())
    assert v["result"].requires_grad  # the captured weights do


def test_per_sample_gradients(after_each_cell):
    v = after_each_cell[2]
    rows = []
    for example, target in zip(v["examples"], v["targets"], strict=True):
        weights = v["weights"].detach().requires_grad_()
        rows += torch.autograd.grad(v["compute_loss"](weights, example, target), weights)
    torch.testing.assert_close(v["grad_weight_per_example"], torch.stack(rows))


def test_vjp(after_each_cell):
    v = after_each_cell[3]
    torch.testing.assert_close(v["outputs"], v["inputs"].sin())
    torch.testing.assert_close(v["vjps"], (v["cotangents"][0] * v["inputs"].cos(),))


def test_batched_jacobian(after_each_cell):
    v = after_each_cell[6]
    torch.testing.assert_close(v["jacobian"], torch.diag_embed(v["x"].cos()))


@pytest.mark.parametrize(("cell", "name"), [(8, "hessian0"), (8, "hessian1"), (9, "hess")])
def test_hessians(after_each_cell, cell, name):
    v = after_each_cell[cell]
    torch.testing.assert_close(v[name], torch.diag(-v["x"].sin()))
