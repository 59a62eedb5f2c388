"""torch.export of modules that call transforms: programs of ATen operators, which run without this package."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from functorch_lite import (
    functional_call,
    functionalize,
    grad,
    hessian,
    hvp,
    jacfwd,
    jacobian,
    jacrev,
    jit,
    jvp,
    linearize,
    value_and_grad,
    vjp,
    vmap,
)


class Energy(nn.Module):
    """Calls ``run(module, x)``; ``self(x)`` of one example is ``energy``."""

    def __init__(self, run):
        super().__init__()
        self.layer, self.norm, self.run = nn.Linear(3, 3), nn.LayerNorm(3), run

    def features(self, x):
        return self.norm(self.layer(x)).tanh()

    def energy(self, x):
        return self.features(x).sin().sum()

    def forward(self, x):
        return self.run(self, x)


def _of_params(module, x):
    params = dict(module.layer.named_parameters())
    return grad(lambda p: functional_call(module.layer, p, x).sin().sum())(params)


PROGRAMS = {
    "vmap": lambda m, x: vmap(m.features)(x),
    "grad": lambda m, x: grad(m.energy)(x),
    "value_and_grad": lambda m, x: value_and_grad(m.energy)(x),
    "vmap_grad": lambda m, x: vmap(grad(m.energy))(x),
    "grad_vmap": lambda m, x: grad(lambda x: vmap(m.energy)(x).sum())(x),
    "grad_grad": lambda m, x: grad(lambda x: grad(m.energy)(x).square().sum())(x),
    "vjp": lambda m, x: vjp(m.features, x)[1](torch.ones_like(x)),
    "jvp": lambda m, x: jvp(m.features, (x,), (torch.ones_like(x),)),
    "jacrev": lambda m, x: vmap(jacrev(m.features))(x),
    "jacfwd": lambda m, x: vmap(jacfwd(m.features))(x),
    "jacobian": lambda m, x: jacobian(m.features)(x[0]),
    "hessian": lambda m, x: vmap(hessian(m.energy))(x),
    "hvp": lambda m, x: hvp(m.energy, (x,), (torch.ones_like(x),)),
    "linearize": lambda m, x: linearize(m.features, x)[1](torch.ones_like(x)),
    "functionalize": lambda m, x: functionalize(grad(m.energy))(x),
    "of_parameters": _of_params,
    "jit": lambda m, x: jit(vmap(grad(m.energy)))(x),
    "between": lambda m, x: grad(m.energy)(x.sin()).cos(),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", PROGRAMS)
def test_program_is_what_eager_computes(name, strict):
    if name == "jit" and strict:
        pytest.skip("Dynamo does not trace what makes a compiled function, see test_a_compiled_function_from_outside")
    torch.manual_seed(0)
    module = Energy(PROGRAMS[name])
    program = torch.export.export(module, (torch.rand(4, 3),), strict=strict)
    torch.manual_seed(1)
    x = torch.rand(4, 3)
    assert_close(program.module()(x), module(x))
    with torch.no_grad():  # parameters are inputs of the program
        for p in module.parameters():
            p.mul_(1.5)
    decomposed = torch.export.export(module, (x,), strict=strict).run_decompositions()
    assert_close(decomposed.module()(x), module(x))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    # functionalize writes, if there is something to write, in the grad mode of the write.
    ours = [target for target in targets if target != "wrap_with_set_grad_enabled"]
    assert all(target.startswith("aten.") or "getitem" in target for target in ours)
    assert not program.constants  # nothing that was computed while tracing


@pytest.mark.parametrize("strict", [False, True])
def test_a_compiled_function_from_outside(strict):
    module = Energy(None)
    compiled = jit(vmap(grad(module.energy)))
    module.run = lambda module, x: compiled(x)
    x = torch.rand(4, 3)
    program = torch.export.export(module, (x,), strict=strict)
    assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["vmap", "grad", "vmap_grad", "jacrev", "hessian"])
def test_dynamic_sizes(name, strict):
    module = Energy(PROGRAMS[name])
    sizes = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(module, (torch.rand(4, 3),), dynamic_shapes=sizes, strict=strict)
    x = torch.rand(7, 3)
    assert_close(program.module()(x), module(x))


def test_program_runs_where_this_package_is_not():
    module = Energy(PROGRAMS["hessian"])
    x = torch.rand(4, 3)
    file = io.BytesIO()
    torch.export.save(torch.export.export(module, (x,)), file)
    code = (
        "import io, sys, torch\n"
        "program = torch.export.load(io.BytesIO(sys.stdin.buffer.read()))\n"
        "assert 'functorch_lite' not in sys.modules\n"
        f"print(program.module()(torch.tensor({x.tolist()})).sum().item())\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], input=file.getvalue(), capture_output=True, check=False)
    assert ran.returncode == 0, ran.stderr.decode()
    assert_close(torch.tensor(float(ran.stdout)), module(x).sum().detach(), atol=1e-4, rtol=1e-4)


def test_gradients_of_a_program():
    """A loss with a derivative inside, as of a force, differentiated by the parameters."""
    module = Energy(PROGRAMS["vmap_grad"])
    x = torch.rand(4, 3)
    program = torch.export.export(module, (x,)).module()
    program(x).square().sum().backward()
    module(x).square().sum().backward()
    for name, p in module.named_parameters():
        assert_close(program.get_parameter(name).grad, p.grad)
