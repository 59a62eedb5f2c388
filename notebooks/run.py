"""Runs the code cells of a notebook in order, without Jupyter, and prints what they would show.

python notebooks/run.py notebooks/whirlwind_tour.ipynb [--figures DIRECTORY]

Several notebooks run one after the other, each in a process of its own, and a table has their times. What they print is
in files beside the pictures.
"""

from __future__ import annotations

import argparse
import ast
import json
import linecache
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def code_cells(path: Path) -> Iterator[tuple[str, str, str]]:
    """(id, nearest heading above, source) of each code cell."""
    title = path.stem
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            yield cell["id"], title, source
            continue
        headings = [line.lstrip("# ") for line in source.splitlines() if line.startswith("#")]
        title = headings[-1] if headings else title


def run_cell(source: str, name: str, namespace: dict[str, Any]) -> None:
    """Execute a cell and print the value of its last line, as a notebook does; a semicolon at its end prevents it."""
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # as Jupyter does
    statements = ast.parse(source, name).body
    last = statements.pop() if statements and isinstance(statements[-1], ast.Expr) else None
    exec(compile(ast.Module(statements, []), name, "exec"), namespace)
    if last is None:
        return
    value = eval(compile(ast.Expression(last.value), name, "eval"), namespace)
    if value is not None and not source.rstrip().endswith(";"):
        print(repr(value))


def save_figures(directory: Path, prefix: str) -> None:
    """Write the open figures as PNG files and close them."""
    for number in plt.get_fignums():
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{prefix}-{number}.png"
        plt.figure(number).savefig(path, dpi=120, bbox_inches="tight")
        print(f"[figure: {path}]")
    plt.close("all")


def run(path: Path, figures: Path) -> int:
    """Run the notebook; returns how many cells there were."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    shown = None
    cells = list(code_cells(path))
    for cell_id, title, source in cells:
        if title != shown:
            print(f"\n== {title}", flush=True)
        shown = title
        run_cell(source, f"{path.name}:{cell_id}", namespace)
        save_figures(figures, f"{path.stem}-{cell_id}")
    return len(cells)


def processor_seconds_of_children() -> float:
    """What processes that have ended took."""
    times = os.times()
    return times.children_user + times.children_system


def run_all(paths: Sequence[Path], figures: Path) -> bool:
    """Run each notebook in a process of its own and print a table of times; returns whether all ran."""
    figures.mkdir(parents=True, exist_ok=True)
    failed = False
    print(f"{'notebook':20} {'seconds':>8} {'of processors':>14}")
    for path in paths:
        log, start, before = figures / f"{path.stem}.txt", time.perf_counter(), processor_seconds_of_children()
        with log.open("w", encoding="utf-8") as output:
            command = [sys.executable, __file__, str(path), "--figures", str(figures)]
            code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
        failed |= code != 0
        seconds, busy = time.perf_counter() - start, processor_seconds_of_children() - before
        print(f"{path.stem:20} {seconds:8.1f} {busy:14.1f}" + (f"  failed: {log}" if code else ""), flush=True)
    return not failed


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Run the code cells of notebooks in order.")
    parser.add_argument("notebooks", type=Path, nargs="+", metavar="notebook")
    parser.add_argument("--figures", type=Path, default=Path("build/figures"), help="where pictures are written")
    arguments = parser.parse_args()
    if len(arguments.notebooks) > 1:
        sys.exit(not run_all(arguments.notebooks, arguments.figures))
    (path,) = arguments.notebooks
    print(f"\n{path}: {run(path, arguments.figures)} cells ran.")


if __name__ == "__main__":
    main()
