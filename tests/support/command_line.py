"""The command line of the sweeps over all operators: which to take, how much of each, where to keep the results."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch.testing._internal.opinfo.core import OpInfo

from tests.support import ops


def print_sums(reports: Sequence[Any], columns: Sequence[str], forms: Iterable[str]) -> list[str]:
    """A row for each form and side, and for all forms, of the ``numbers()`` of tallies. Returns the sides."""
    sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0] * len(columns))
    for report in reports:
        for form, sides in report.tallies.items():
            for side, tally in sides.items():
                for key in (form, "all"):
                    sums[key, side] = [a + b for a, b in zip(sums[key, side], tally.numbers(), strict=True)]
    print(f"{'form':<20}{'':<18}" + "".join(f"{column:>10}" for column in columns))
    for form in [*forms, "all"]:
        for (key, side), numbers in sums.items():
            if key == form:
                print(f"{form:<20}{side:<18}" + "".join(f"{number:>10}" for number in numbers))
    return list(dict.fromkeys(side for _, side in sums))


def run(
    program: str,
    forms: Iterable[str],
    default: ops.Extent,
    sweep: Callable[[OpInfo, bool, Sequence[str], ops.Extent], Any],
    read: Callable[[dict[str, Any]], Any],
    show: Callable[[Any], None],
    show_table: Callable[[Sequence[Any]], None],
) -> None:
    """Run ``sweep(op, with_peer, forms, extent)`` for the operators that are asked for.

    It returns a report, a dataclass, which ``read`` makes again of its fields. ``show`` prints one report, and
    ``show_table`` all.
    """
    description = "Print what happened to the operators whose names contain one of the parts."
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=description)
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--peer", action="store_true", help="also run PyTorch's own")
    parser.add_argument("--full", action="store_true", help="all there is: every sample, dtype and place of the batch")
    for extent_field in fields(ops.Extent):
        parser.add_argument(f"--{extent_field.name}", type=int, help="at most so many; see --full for all")
    forms = list(forms)
    parser.add_argument("--forms", default=",".join(forms), help=f"of {', '.join(forms)}")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="only every Nth operator, beginning with the Ith")
    parser.add_argument("--json", type=Path, help="append the results to this file, a line for each operator")
    parser.add_argument("--join", type=Path, nargs="+", help="print the table of such files, and run nothing")
    options = parser.parse_args()
    if options.join:
        show_table([read(json.loads(line)) for path in options.join for line in path.read_text().splitlines()])
        return
    given = asdict(ops.FULL if options.full else default)
    given |= {name: getattr(options, name) for name in given if getattr(options, name) is not None}
    first, step = map(int, options.shard.split("/"))
    names = [name for name in ops.OPS if not options.parts or any(part in name for part in options.parts)]
    reports = []
    for name in names[first - 1 :: step]:
        reports.append(sweep(ops.OPS[name], options.peer, options.forms.split(","), ops.Extent(**given)))
        show(reports[-1])
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps(asdict(reports[-1])) + "\n")
    show_table(reports)
