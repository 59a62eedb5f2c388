"""How ``vmap`` runs each operator of the running PyTorch, as a list: ``python -m functorch_lite.coverage``.

Every line comes from the tables and the function that decide when ``vmap`` meets the operator.
"""

from __future__ import annotations

import argparse
import collections
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from functorch_lite import _C

#: The kinds in the order of lookup, and what they mean.
KINDS = {
    "one_level_down": "takes no tensor, so nothing of it can be batched",
    "rule": "has a batching rule, of a family or of its own",
    "out_form": "runs as the form without `out=` does, and writes the result there",
    "composition": "runs as PyTorch composes it of other operators",
    "primitive": "is a step of PyTorch's decompositions, and composed of other operators",
    "refusal": "raises an error that says what to do instead",
    "decomposition": "runs as PyTorch decomposes it for tracing",
    "loop": "runs once for each example, with a `LoopFallbackWarning`",
}


@dataclass(frozen=True)
class Operator:
    """One operator and how ``vmap`` runs it.

    Attributes:
        name: As in PyTorch's schemas, without ``aten::``, for example ``"sum.dim_IntList"``.
        kind: A key of `KINDS`.
        detail: The family of its rule, or the advice of the error that refuses it; otherwise empty.
        file: The file with its rule, or an empty string.
    """

    name: str
    kind: str
    detail: str
    file: str


def operators() -> list[Operator]:
    """All operators of ATen, by name.

    Example:
        >>> from functorch_lite.coverage import operators
        >>> next(op for op in operators() if op.name == "cumsum")
        Operator(name='cumsum', kind='rule', detail='along', file='csrc/rules/reduction.cpp')
    """
    result = []
    for full_name in sorted(torch._C._dispatch_get_all_op_names()):
        if full_name.startswith("aten::"):
            name, _, overload = full_name.partition(".")
            handling, detail, file = _C.plan(name, overload)
            path = "csrc/" + file.rpartition("csrc/")[2] if file else ""
            result.append(Operator(full_name.removeprefix("aten::"), handling.name, detail, path))
    return result


def _base(name: str) -> str:
    """``add`` for ``add.Tensor`` and ``add_.Tensor``, ``add(out=)`` for ``add.out``."""
    base, _, overload = name.partition(".")
    if any(argument.is_out for argument in torch._C._get_schema(f"aten::{base}", overload).arguments):
        return f"{base}(out=)"
    return base if base.endswith("__") else base.removesuffix("_")


def _how(op: Operator) -> tuple[str, str, str]:
    return op.kind, op.detail, op.file


def _collapsed(listed: Iterable[Operator]) -> dict[tuple[str, str, str], list[str]]:
    """Names by how they run: overloads and in-place forms under one name where all of them run alike."""
    by_base = collections.defaultdict(list)
    for op in listed:
        by_base[_base(op.name)].append(op)
    result = collections.defaultdict(list)
    for base, group in by_base.items():
        alike = len({_how(op) for op in group}) == 1
        for op in group[:1] if alike else group:
            result[_how(op)].append(base if alike else op.name)
    return result


def _totals(listed: Iterable[Operator]) -> dict[str, int]:
    counts = collections.Counter(op.kind for op in listed)
    return {kind: counts[kind] for kind in KINDS if counts[kind]}


def markdown(listed: Sequence[Operator]) -> str:
    """The page ``docs/coverage.md``.

    Args:
        listed: What `operators` returns.

    Returns:
        Text with a table of totals and one of names for each kind.
    """
    lines = [
        "# Operators under vmap",
        "",
        "Made with `python -m functorch_lite.coverage --markdown > docs/coverage.md` for torch "
        f"{torch.__version__.partition('+')[0]}; a test compares.",
        "Without `--markdown` the command prints one line for each operator: `... coverage cumsum` those whose names",
        "contain a word, `... coverage --kind loop` those of a kind.",
        "",
        "A name stands for its overloads and in-place form, and `name(out=)` for the forms that take `out=`. Where",
        "these run differently, each is listed by its own name. [batching_rules.md](batching_rules.md) explains the",
        "families.",
        "",
        "| kind | operators | what `vmap` does |",
        "| --- | ---: | --- |",
        *(f"| {kind} | {count} | {KINDS[kind]} |" for kind, count in _totals(listed).items()),
    ]
    groups = _collapsed(listed)
    for kind in _totals(listed):
        lines += ["", f"## {kind}", ""]
        rows = sorted((detail, file, names) for (k, detail, file), names in groups.items() if k == kind)
        for detail, file, names in rows:
            head = detail + (f" (`{file}`)" if file else "")
            # A line for each name, so that a new operator is one line of a diff.
            lines += [*([f"**{head}**"] if head else []), *(f"`{name}`" for name in sorted(names)), ""]
        lines.pop()
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the list, or the page for the documentation."""
    parser = argparse.ArgumentParser(
        prog="python -m functorch_lite.coverage",
        description="List how vmap runs each ATen operator of the running PyTorch.",
    )
    parser.add_argument("parts", nargs="*", metavar="part", help="list operators whose names contain any of these")
    parser.add_argument("--kind", choices=list(KINDS), help="list operators of this kind")
    parser.add_argument("--markdown", action="store_true", help="print the page docs/coverage.md")
    options = parser.parse_args(arguments)
    listed = [
        op
        for op in operators()
        if (options.kind in (None, op.kind)) and (not options.parts or any(part in op.name for part in options.parts))
    ]
    if options.markdown:
        print(markdown(listed), end="")
        return
    for op in listed:
        print(f"{op.name:60} {op.kind:15} {op.detail} {op.file}".rstrip())
    print(f"torch {torch.__version__}:", ", ".join(f"{count} {kind}" for kind, count in _totals(listed).items()))


if __name__ == "__main__":
    main()
