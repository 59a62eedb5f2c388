"""The package as a whole: importing it, its extension, and living beside PyTorch's own transforms."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from functorch_lite import _C, _install

ROOT = Path(__file__).parent.parent
PYTHON_SOURCES = sorted((ROOT / "functorch_lite").glob("**/*.py"))
CPP_SOURCES = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp"})


def run_python(script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done


# Import.


def test_import_is_quiet():
    done = run_python("import torch, warnings; warnings.simplefilter('error'); import functorch_lite")
    assert done.stdout == ""
    assert done.stderr == ""


def test_import_and_first_calls_leave_the_compiler_alone():
    run_python(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "from functorch_lite import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap\n"
        "x = torch.arange(3.0)\n"
        "f = lambda x: x.sin().sum()\n"
        "vmap(grad(torch.sin))(x), jacrev(f)(x), jacfwd(f)(x), hessian(f)(x), vjp(f, x)[1](x.sum())\n"
        "jvp(f, (x,), (x,))\n"
        "heavy = ('torch._dynamo', 'torch._inductor', 'torch._functorch', 'torch._decomp', 'sympy')\n"
        "new = sorted(m for m in set(sys.modules) - before if m.startswith(heavy))\n"
        "assert not new, new\n"
    )


def test_import_time_is_printed():
    done = run_python(
        "import time, torch\n"
        "start = time.perf_counter()\n"
        "import functorch_lite\n"
        "print(f'{1000 * (time.perf_counter() - start):.0f} ms')\n"
    )
    print("import functorch_lite, after torch:", done.stdout.strip())


# The extension.


def test_version_check_accepts_the_version_it_was_built_for():
    _install.check_torch_version(torch.__version__, torch.__version__)


def test_version_check_says_what_to_do():
    with pytest.raises(ImportError) as error:
        _install.check_torch_version("2.12.0", "2.13.0")
    message = str(error.value)
    assert "built for torch 2.12.0" in message
    assert "torch 2.13.0 is running" in message
    assert "pip install --no-build-isolation" in message


def stub():
    return ast.parse((ROOT / "functorch_lite" / "_C.pyi").read_text()).body


def public(names):
    return {name for name in names if not name.startswith("_")}


def test_stub_names_what_the_extension_has():
    declared = {node.name for node in stub() if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    assert declared == public(dir(_C))


@pytest.mark.parametrize("name", ["Level", "VmapLevel", "AutodiffLevel", "Outside"])
def test_stub_names_the_methods(name):
    declaration = next(node for node in stub() if isinstance(node, ast.ClassDef) and node.name == name)
    declared = {node.name for node in declaration.body if isinstance(node, ast.FunctionDef)}
    assert public(declared) == public(vars(getattr(_C, name)))


def test_every_row_names_an_operator_that_exists():
    assert len(_C.batching_rules()) == len({operator for operator, _ in _C.batching_rules()})


# PyTorch's own transforms are not used, and not disturbed.


def is_forbidden(module):
    return any(
        module == name or module.startswith(f"{name}.") for name in ("torch.func", "torch._functorch", "functorch")
    )


def dotted(node):
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def names_in(tree):
    """Every module that is imported, and every dotted name that is used."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield dotted(node)


@pytest.mark.parametrize("path", PYTHON_SOURCES, ids=lambda path: path.name)
def test_python_does_not_use_functorch(path):
    names = list(names_in(ast.parse(path.read_text())))
    assert not [name for name in names if is_forbidden(name) or "_C._functorch" in name]


@pytest.mark.parametrize("path", CPP_SOURCES, ids=lambda path: path.name)
def test_cpp_does_not_use_functorch(path):
    assert not re.search(r"at::functorch|torch::functorch|#include\s*[<\"][^>\"]*functorch/", path.read_text())


@pytest.mark.parametrize("module", ["functorch", "torch.func", "torch.func.grad", "torch._functorch.vmap"])
def test_forbidden_modules_are_recognized(module):
    assert is_forbidden(module)
    assert not is_forbidden("functorch_lite._vmap")


def test_pytorch_is_bit_identical_before_and_after():
    run_python(
        "import torch, torch.func as peer\n"
        "def results():\n"
        "    torch.manual_seed(0)\n"
        "    x = torch.randn(4, 3)\n"
        "    net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))\n"
        "    loss = net(torch.nn.functional.dropout(x)).square().mean()\n"
        "    plain = [loss, *torch.autograd.grad(loss, list(net.parameters()))]\n"
        "    f = lambda v: (v.sin() * v.exp()).sum()\n"
        "    transformed = [peer.vmap(peer.grad(f))(x), peer.jacrev(torch.sin)(x[0]), peer.hessian(f)(x[0]),\n"
        "                   peer.jvp(f, (x,), (x,))[1], peer.vmap(torch.rand_like, randomness='different')(x)]\n"
        "    texts = [str(plain), repr(x), f'{x.sum():.3f}', f'{x}']\n"
        "    return plain + transformed, texts\n"
        "before, texts_before = results()\n"
        "import functorch_lite as ours\n"
        "ours.vmap(ours.grad(lambda v: (v.sin() * v.exp()).sum()))(torch.randn(4, 3))\n"
        "ours.jvp(torch.sin, (torch.ones(2),), (torch.ones(2),))\n"
        "after, texts_after = results()\n"
        "assert texts_before == texts_after\n"
        "assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))\n"
    )
