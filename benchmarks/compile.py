"""Compiled transforms: time per call and of the first call, beside eager code, `torch.compile` and JAX.

Run with ``make bench`` or ``python benchmarks/compile.py``; ``--larger`` takes sizes where kernels dominate. One
thread. Each workload has a process of its own, in which all ways take turns: what is shown are medians, and medians
of the ratios of a turn. First calls are cold: of a function that is new, with Inductor's caches empty, after something
else has been compiled in the same way. JAX's columns are empty if it is not installed, `torch.compile`'s if it refuses.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import torch
from torch.utils import _pytree as pytree
from workloads import Workload, workloads

import functorch_lite as fl
from functorch_lite.compile import aot_function, inductor, nop

try:
    import jax
    import workloads_jax
except ImportError:
    jax = None

Function = Callable[..., Any]
Times = dict[str, list[float]]
Others = dict[str, tuple[str, ...]]

EAGER = ("eager", "torch.func", "by hand")
PEERS = ("torch.compile", "JAX")
COMPILED = ("replay", "inductor", *PEERS)
OVERHEAD = "five tensors"


def jax_jit(function: Function, arguments: tuple[Any, ...]) -> Function:
    """JAX's compiled function, with arguments of its own; it returns when the results are there."""
    compiled = jax.jit(function)
    arrays = pytree.tree_map(workloads_jax.array, arguments)
    return lambda *_: jax.block_until_ready(compiled(*arrays))


def builders(workload: Workload) -> dict[str, Callable[[], Function]]:
    """Each makes a function that nobody has compiled before."""
    found = {
        "eager": lambda: workload.build(fl),
        "torch.func": lambda: workload.build(torch.func),
        "by hand": lambda: workload.by_hand,
        "replay": lambda: fl.jit(workload.build(fl)),
        "inductor": lambda: fl.jit(workload.build(fl), backend="inductor"),
        "torch.compile": lambda: torch.compile(workload.build(torch.func), fullgraph=True),
    }
    if jax is not None:
        found["JAX"] = lambda: jax_jit(workloads_jax.BUILDERS[workload.name](), workload.arguments)
    return found


def five_tensors() -> Function:
    """A new function of five tensors."""

    def f(a: Any, b: Any, c: Any, d: Any, e: Any) -> Any:
        return a * b + c * d + e

    return f


def five_arguments() -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(4) for _ in range(5))


def overhead_builders() -> dict[str, Callable[[], Function]]:
    """What a call costs."""
    found = {
        "eager": five_tensors,
        "replay": lambda: fl.jit(five_tensors()),
        "inductor": lambda: fl.jit(five_tensors(), backend="inductor"),
        "aot_function, nop": lambda: aot_function(five_tensors(), nop),
        "aot_function, inductor": lambda: aot_function(five_tensors(), inductor),
        "torch.compile": lambda: torch.compile(five_tensors(), fullgraph=True),
    }
    if jax is not None:
        found["JAX"] = lambda: jax_jit(five_tensors(), five_arguments())
    return found


def seconds(function: Function, arguments: tuple[Any, ...], repeats: int = 1) -> float:
    """Of one call."""
    start = time.perf_counter()
    for _ in range(repeats):
        function(*arguments)
    return (time.perf_counter() - start) / repeats


def first_call(build: Callable[[], Function], arguments: tuple[Any, ...]) -> tuple[Function, float]:
    """The function, and seconds until its first result."""
    from torch._inductor.utils import fresh_cache

    torch._dynamo.reset()
    with fresh_cache():
        start = time.perf_counter()
        function = build()
        function(*arguments)
        return function, time.perf_counter() - start


def first_calls(
    made: dict[str, Callable[[], Function]], arguments: tuple[Any, ...], turns: int
) -> tuple[dict[str, Function], Times]:
    """The functions, and what their first calls took, each after something else has been compiled in its way."""
    small = overhead_builders()
    for name in made:
        if name in small:
            first_call(small[name], five_arguments())
    functions: dict[str, Function] = {}
    times: Times = {name: [] for name in made}
    for _ in range(turns):
        for name, build in made.items():
            functions[name], taken = first_call(build, arguments)
            times[name].append(taken)
    return functions, times


def calls(functions: dict[str, Function], arguments: tuple[Any, ...], turns: int) -> Times:
    """Seconds per call, in turns."""
    repeats = {}
    for name, function in functions.items():
        seconds(function, arguments, 3)
        repeats[name] = max(1, int(5e-3 / seconds(function, arguments)))
    times: Times = {name: [] for name in functions}
    for _ in range(turns):
        for name, function in functions.items():
            times[name].append(seconds(function, arguments, repeats[name]))
    return times


def measure(name: str, options: argparse.Namespace) -> None:
    """One row, as JSON: the last line that the process prints."""
    if name == OVERHEAD:
        made, arguments = overhead_builders(), five_arguments()
    else:
        workload = next(one for one in workloads(options.larger) if one.name == name)
        made, arguments = builders(workload), workload.arguments
    for left_out in options.without:
        made.pop(left_out, None)
    functions, first = first_calls(made, arguments, options.first)
    times = calls(functions, arguments, options.turns)
    in_microseconds = {name: [taken * 1e6 for taken in turns] for name, turns in times.items()}
    print(json.dumps({"first": first, "calls": in_microseconds}))


def row(name: str, options: argparse.Namespace) -> dict[str, Times]:
    """One row, measured in a process of its own: a function that `torch.compile` refuses leaves torch.func unusable."""
    command = [sys.executable, "-W", "ignore", __file__, "--row", name, f"--turns={options.turns}"]
    command += [f"--first={options.first}", *(["--larger"] if options.larger else [])]
    for without in ([], ["--without", "torch.compile"]):
        process = subprocess.run([*command, *without], capture_output=True, text=True)
        if process.returncode == 0:
            return json.loads(process.stdout.splitlines()[-1])
    sys.exit(process.stderr)


def shown(number: float | None, width: int, form: str) -> str:
    return "-".rjust(width) if number is None else format(number, f"{width}{form}")


def ratio(times: Times, others: tuple[str, ...]) -> float | None:
    """Of `inductor` to the fastest of the others: the median of the turns."""
    present = [name for name in others if name in times]
    if not present:
        return None
    best = min(present, key=lambda name: statistics.median(times[name]))
    return statistics.median(a / b for a, b in zip(times["inductor"], times[best], strict=True))


def table(title: str, measured: dict[str, Times], columns: tuple[str, ...], form: str, others: Others) -> None:
    """One line for each workload."""
    print(f"\n{title}; ratios are those of inductor")
    print(f"{'':18}" + "".join(f"{column:>14}" for column in columns) + "".join(f"{head:>9}" for head in others))
    ratios: dict[str, list[float]] = {head: [] for head in others}
    for name, times in measured.items():
        line = "".join(shown(statistics.median(times[c]) if c in times else None, 14, form) for c in columns)
        for head, names in others.items():
            found = ratio(times, names)
            line += shown(found, 9, ".2f")
            if found is not None:
                ratios[head].append(found)
        print(f"{name:18}" + line)
    means = {head: math.exp(statistics.fmean(map(math.log, found))) for head, found in ratios.items() if found}
    print("geometric means: " + ", ".join(f"{head} {mean:.2f}" for head, mean in means.items()))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=15, help="of calls")
    parser.add_argument("--first", type=int, default=2, help="turns of first calls")
    parser.add_argument("--only", default="", help="only the rows whose name contains this")
    parser.add_argument("--larger", action="store_true")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--without", action="append", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.row:
        measure(options.row, options)
        return
    names = [one.name for one in workloads() if options.only in one.name]
    measured = {}
    for name in names:
        measured[name] = row(name, options)
        print(name, "is measured", file=sys.stderr, flush=True)
    versions = f"torch {torch.__version__}, JAX {jax.__version__ if jax else 'not installed'}"
    print(f"{versions}, {'larger' if options.larger else 'small'} sizes, float32, one thread")
    if measured:
        per_call = {name: found["calls"] for name, found in measured.items()}
        first = {name: found["first"] for name, found in measured.items()}
        columns, others = (*EAGER, *COMPILED), {"/ peer": PEERS, "/ hand": ("by hand",)}
        table("microseconds per call", per_call, columns, ".1f", others)
        table("seconds of the first call", first, COMPILED, ".2f", {"/ torch": ("torch.compile",), "/ JAX": ("JAX",)})
    if options.only in OVERHEAD and not options.larger:
        print("\nmicroseconds per call of a * b + c * d + e, four elements each")
        for name, times in row(OVERHEAD, options)["calls"].items():
            print(f"{name:26}{statistics.median(times):8.2f}")


if __name__ == "__main__":
    main()
