"""A graph and its inputs as a Python script."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor

#: Tensors with more elements are not written out.
LISTED = 64

_FILE = "inputs.pt"


def plain(like: Tensor) -> Tensor:
    """Values that are easy to write down: ones, or zeros for integers, which may be indices."""
    is_number = like.is_floating_point() or like.is_complex() or like.dtype == torch.bool
    return torch.full_like(like, 1 if is_number else 0, memory_format=torch.contiguous_format)


def drawn(like: Tensor) -> Tensor:
    """Random values that a script can draw again."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(like.shape, generator=generator).to(like.dtype).to(like.device)


def _expression(value: Any) -> str:
    """A tensor or number as Python code."""
    if not isinstance(value, Tensor):
        return repr(int(value) if isinstance(value, torch.SymInt) else value)
    size, dtype = tuple(map(int, value.shape)), f", dtype={value.dtype}"
    device = "" if value.device.type == "cpu" else f", device={str(value.device)!r}"
    if isinstance(value, FakeTensor):
        code = f"torch.ones({size}{dtype}{device})"
    elif torch.equal(value, plain(value)):
        code = f"torch.{'zeros' if value.numel() and not value.any() else 'ones'}({size}{dtype}{device})"
    elif value.numel() <= LISTED:
        code = f"torch.tensor({value.tolist()}{dtype}{device}).reshape({size})"
    else:
        code = f"torch.randn({size}, generator=torch.Generator().manual_seed(0)).to({value.dtype})"
        code += f".to({str(value.device)!r})" if device else ""
    if not value.is_contiguous():
        stride = tuple(map(int, value.stride()))
        code = f"torch.empty_strided({size}, {stride}{dtype}{device}).copy_({code})"
    return code + (".requires_grad_()" if value.requires_grad else "")


def _is_written_out(value: Any) -> bool:
    """Whether the expression has the values of the tensor, and not others like them."""
    if not isinstance(value, Tensor) or isinstance(value, FakeTensor) or value.numel() <= LISTED:
        return True
    return torch.equal(value, plain(value)) or (value.is_floating_point() and torch.equal(value, drawn(value)))


def _imported(name: str, value: Any) -> str:
    """The line that makes a name mean what it means in the code of a graph."""
    if isinstance(value, ModuleType):
        return f"import {value.__name__}" + ("" if value.__name__ == name else f" as {name}")
    if isinstance(value, float):
        return f'{name} = float("{value}")' if not math.isfinite(value) else f"{name} = {value!r}"
    if value is type(None):
        return f"{name} = type(None)"
    return f"from {value.__module__} import {value.__qualname__}" + (
        "" if value.__qualname__ == name else f" as {name}"
    )


def _call(check: Callable[..., Any] | None) -> list[str]:
    """The lines that run the check, if a script can import it, and otherwise the graph."""
    module, name = getattr(check, "__module__", "__main__"), getattr(check, "__qualname__", "")
    if check is None or module == "__main__" or getattr(sys.modules.get(module), name, None) is not check:
        return ["    print(graph(*inputs))"]
    return [f"    from {module} import {name}", "", f"    print({name}(graph, inputs))"]


def script(
    gm: fx.GraphModule, inputs: Sequence[Any], check: Callable[..., Any] | None = None, folder: str | None = None
) -> str:
    """Python code that defines ``graph`` and ``inputs``. Values that are too many go into a file in ``folder``."""
    code = gm.graph.python_code("self")
    in_file = folder is not None and not all(map(_is_written_out, inputs))
    if in_file:
        path = os.path.abspath(os.path.join(str(folder), _FILE))
        torch.save(list(inputs), path)
        values = [f"inputs = torch.load({path!r})"]
    else:
        comments = ["" if _is_written_out(value) else "  # the values were others" for value in inputs]
        entries = zip(map(_expression, inputs), comments, strict=True)
        values = ["inputs = [", *(f"    {expression},{comment}" for expression, comment in entries), "]"]
    used = set(re.findall(r"\w+", code.src + "".join(values)))
    names = {"inf": math.inf, "nan": math.nan, **code.globals}
    imports = {_imported(name, value) for name, value in names.items() if name in used}
    count = sum(node.op not in ("placeholder", "output") for node in gm.graph.nodes)
    lines = [
        f"# A graph with {count} operator{'s' * (count != 1)} that fails.",
        *sorted({"import torch", "import torch.fx", *imports}),
        "",
        "",
        "class Graph(torch.nn.Module):",
        *(f"    {line}".rstrip() for line in code.src.strip().splitlines()),
        "",
        "",
        *values,
        "graph = torch.fx.symbolic_trace(Graph())",
        "",
        'if __name__ == "__main__":',
        *_call(check),
    ]
    return "\n".join(lines) + "\n"
