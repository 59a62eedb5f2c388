"""Time of vmap for sixty operators, beside torch.func and beside a loop over the examples.

Run with ``make bench`` or ``python benchmarks/rules.py``. The three are timed in turns in one process, on one thread,
and each ratio is the median over the turns: absolute times drift on shared machines, the ratios much less. Small
examples show what a rule costs, large ones what it computes. In the last column a ratio above one is a rule slower than
no rule, or the cost of vmap itself.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import functorch_lite as fl

#: Batch size, rows and columns.
SIZES = {"small": (8, 4), "large": (64, 32)}


@dataclass(frozen=True)
class Row:
    """An operator with arguments of a size; those at positions in ``shared`` are the same for all examples."""

    name: str
    function: Callable[..., Tensor]
    arguments: Callable[[int, int], Sequence[Tensor]]
    shared: tuple[int, ...] = ()
    randomness: str = "error"


def matrices(count: int) -> Callable[[int, int], list[Tensor]]:
    return lambda b, n: [torch.rand(b, n, n) for _ in range(count)]


def definite(b: int, n: int) -> Tensor:
    x = torch.rand(b, n, n)
    return x @ x.mT + n * torch.eye(n)


def images(b: int, n: int) -> Tensor:
    return torch.rand(b, 2, 4, n, n)


def indexed(b: int, n: int) -> list[Tensor]:
    return [torch.rand(b, n, n), torch.randint(n, (b, n, n))]


def labels(b: int, n: int) -> list[Tensor]:
    return [torch.rand(b, n, n), torch.randint(n, (b, n))]


def with_parameters(b: int, n: int) -> list[Tensor]:
    return [torch.rand(b, n, n), torch.rand(n), torch.rand(n)]


def channels(b: int, n: int) -> list[Tensor]:
    return [images(b, n), *(torch.rand(4) for _ in range(4))]


def add_in_place(x: Tensor, y: Tensor) -> Tensor:
    return x.clone().add_(y)


def put_in_place(x: Tensor, y: Tensor) -> Tensor:
    z = x.clone()
    z[1] = y[0]
    return z


ROWS = [
    # Arithmetic.
    Row("add", torch.add, matrices(2)),
    Row("mul, one shared", torch.mul, lambda b, n: [torch.rand(b, n, n), torch.rand(n)], shared=(1,)),
    Row("pow", lambda x: x**3, matrices(1)),
    Row("maximum", torch.maximum, matrices(2)),
    Row("clamp", lambda x: x.clamp(0.2, 0.8), matrices(1)),
    Row("where", lambda x, y: torch.where(x > 0.5, x, y), matrices(2)),
    Row("masked_fill", lambda x: x.masked_fill(x > 0.5, 0), matrices(1)),
    Row("gelu", F.gelu, matrices(1)),
    Row("lerp", lambda x, y: torch.lerp(x, y, 0.3), matrices(2)),
    Row("add_", add_in_place, matrices(2)),
    Row("to", lambda x: x.to(torch.float64), matrices(1)),
    # Products.
    Row("mm", torch.mm, matrices(2)),
    Row("mm, one shared", torch.mm, lambda b, n: [torch.rand(b, n, n), torch.rand(n, n)], shared=(1,)),
    Row("mv", torch.mv, lambda b, n: [torch.rand(b, n, n), torch.rand(b, n)]),
    Row("dot", torch.dot, lambda b, n: [torch.rand(b, n * n), torch.rand(b, n * n)]),
    Row("bmm", torch.bmm, lambda b, n: [torch.rand(b, 4, n, n), torch.rand(b, 4, n, n)]),
    Row("matmul of ranks", torch.matmul, lambda b, n: [torch.rand(b, 4, n, n), torch.rand(b, n, n)]),
    Row("addmm", torch.addmm, matrices(3)),
    Row("linear", F.linear, lambda b, n: [torch.rand(b, n, n), torch.rand(n, n), torch.rand(n)], shared=(1, 2)),
    Row("linear, own weights", F.linear, lambda b, n: [torch.rand(b, n, n), torch.rand(b, n, n), torch.rand(b, n)]),
    Row("einsum", lambda x, y: torch.einsum("ij,kj->ik", x, y), matrices(2)),
    Row("cdist", torch.cdist, matrices(2)),
    # Neural networks.
    Row("conv1d", F.conv1d, lambda b, n: [torch.rand(b, 2, 4, n), torch.rand(4, 4, 3)], shared=(1,)),
    Row("conv2d", F.conv2d, lambda b, n: [images(b, n), torch.rand(4, 4, 3, 3)], shared=(1,)),
    Row("conv2d, own weights", F.conv2d, lambda b, n: [images(b, n), torch.rand(b, 4, 4, 3, 3)]),
    Row("max_pool2d", lambda x: F.max_pool2d(x, 2), lambda b, n: [images(b, n)]),
    Row("avg_pool2d", lambda x: F.avg_pool2d(x, 2), lambda b, n: [images(b, n)]),
    Row("interpolate", lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), lambda b, n: [images(b, n)]),
    Row(
        "grid_sample",
        lambda x, grid: F.grid_sample(x, grid, align_corners=False),
        lambda b, n: [images(b, n), torch.rand(b, 2, n, n, 2)],
    ),
    Row("softmax", lambda x: x.softmax(-1), matrices(1)),
    Row("log_softmax", lambda x: x.log_softmax(0), matrices(1)),
    Row("layer_norm", lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b), with_parameters, shared=(1, 2)),
    Row("batch_norm", F.batch_norm, channels, shared=(1, 2, 3, 4)),
    Row("group_norm", lambda x, w, b, *_: F.group_norm(x, 2, w, b), channels, shared=(1, 2, 3, 4)),
    Row("embedding", F.embedding, lambda b, n: [torch.randint(n, (b, n)), torch.rand(n, n)], shared=(1,)),
    Row("dropout", F.dropout, matrices(1), randomness="different"),
    Row("one_hot", lambda x: F.one_hot(x, 32), lambda b, n: [torch.randint(n, (b, n))]),
    Row("attention", F.scaled_dot_product_attention, lambda b, n: [torch.rand(b, 1, n, n) for _ in range(3)]),
    Row("cross_entropy", F.cross_entropy, labels),
    Row("mse_loss", F.mse_loss, matrices(2)),
    # Reductions and scans.
    Row("sum", torch.sum, matrices(1)),
    Row("mean of a dim", lambda x: x.mean(-1), matrices(1)),
    Row("amax", lambda x: x.amax(0), matrices(1)),
    Row("var", lambda x: x.var(-1), matrices(1)),
    Row("logsumexp", lambda x: x.logsumexp(-1), matrices(1)),
    Row("norm", torch.linalg.norm, matrices(1)),
    Row("argmax", lambda x: x.argmax(-1), matrices(1)),
    Row("cumsum", lambda x: x.cumsum(0), matrices(1)),
    Row("sort", lambda x: x.sort(-1).values, matrices(1)),
    Row("topk", lambda x: x.topk(2).values, matrices(1)),
    # Indexing.
    Row("gather", lambda x, i: x.gather(0, i), indexed),
    Row("scatter_add", lambda x, i: torch.scatter_add(x, 0, i, x), indexed),
    Row("index", lambda x, i: x[i], labels),
    Row("index, shared", lambda x, i: x[i], lambda b, n: [torch.rand(b, n, n), torch.arange(n)], shared=(1,)),
    Row("index_put", lambda x, i: x.index_put((i,), x), lambda b, n: [torch.rand(b, n, n), torch.randint(n, (b, n))]),
    Row("index_select", lambda x, i: x.index_select(0, i), labels),
    Row("x[1] = y", put_in_place, matrices(2)),
    # Views and joins.
    Row("cat", lambda x, y: torch.cat([x, y]), matrices(2)),
    Row("stack", lambda x, y: torch.stack([x, y], -1), matrices(2)),
    Row("reshape", lambda x: x.mT.reshape(-1), matrices(1)),
    Row("permute, expand", lambda x: x.permute(1, 0).expand(2, -1, -1) + 1, matrices(1)),
    Row("slice", lambda x: x[1:, ::2], matrices(1)),
    Row("pad", lambda x: F.pad(x, (1, 1)), matrices(1)),
    Row("tril", torch.tril, matrices(1)),
    Row("roll", lambda x: x.roll(1, 0), matrices(1)),
    # Linear algebra.
    Row("inv", torch.linalg.inv, lambda b, n: [definite(b, n)]),
    Row("solve", torch.linalg.solve, lambda b, n: [definite(b, n), torch.rand(b, n)]),
    Row("cholesky", torch.linalg.cholesky, lambda b, n: [definite(b, n)]),
    Row("det", torch.linalg.det, lambda b, n: [definite(b, n)]),
    Row("svd", lambda x: torch.linalg.svd(x).S, matrices(1)),
    Row("eigh", lambda x: torch.linalg.eigh(x).eigenvalues, lambda b, n: [definite(b, n)]),
    Row("fft", lambda x: torch.fft.fft(x), matrices(1)),
]


def loop(function: Callable[..., Tensor], dims: Sequence[int | None]) -> Callable[..., Tensor]:
    """The same without vmap: one call for each example."""

    def looped(*arguments: Tensor) -> Tensor:
        pairs = list(zip(arguments, dims, strict=True))
        size = next(x.shape[0] for x, dim in pairs if dim == 0)
        return torch.stack([function(*(x if dim is None else x[i] for x, dim in pairs)) for i in range(size)])

    return looped


def timed(function: Callable[..., Tensor], arguments: Sequence[Tensor], repeats: int) -> float:
    """Microseconds of one call, of the time that this thread had a processor: others that want it do not count."""
    start = time.thread_time()
    for _ in range(repeats):
        function(*arguments)
    return (time.thread_time() - start) / repeats * 1e6


def compare(row: Row, size: tuple[int, int], turns: int) -> tuple[float, float, float, float, float]:
    """Median times of ours, torch.func and the loop, and the median ratios of ours to the other two."""
    import torch.func as peer

    torch.manual_seed(0)
    arguments = row.arguments(*size)
    dims = tuple(None if i in row.shared else 0 for i in range(len(arguments)))
    functions = [
        fl.vmap(row.function, dims, randomness=row.randomness),
        peer.vmap(row.function, dims, randomness=row.randomness),
        loop(row.function, dims),
    ]
    for function in functions:
        function(*arguments)
    repeats = [max(1, int(2e3 / timed(function, arguments, 2))) for function in functions]
    times = [[0.0] * len(functions) for _ in range(turns)]
    for turn, row_of_times in enumerate(times):
        # Each comes first in its turn: what runs before leaves the caches to what runs next.
        for k in range(len(functions)):
            i = (turn + k) % len(functions)
            row_of_times[i] = timed(functions[i], arguments, repeats[i])
    ours, theirs, looped = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(a / b for a, b, _ in times)
    to_loop = statistics.median(a / c for a, _, c in times)
    return ours, theirs, looped, ratio, to_loop


def main() -> None:
    """Print a table for each size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=25)
    parser.add_argument("--quick", action="store_true", help="few turns: a rough picture in half a minute")
    parser.add_argument("--only", default="", help="time only the rows whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for label, size in SIZES.items():
        batch, n = size
        print(f"torch {torch.__version__}, {label}: {batch} examples of {n}x{n}, one thread, microseconds of a call")
        print(f"{'operator':22}{'ours':>10}{'torch.func':>12}{'loop':>10}{'to torch.func':>15}{'to the loop':>13}")
        ratios = {}
        for row in ROWS:
            if options.only in row.name:
                ours, theirs, looped, ratio, to_loop = compare(row, size, 5 if options.quick else options.turns)
                ratios[row.name] = ratio
                print(f"{row.name:22}{ours:10.1f}{theirs:12.1f}{looped:10.1f}{ratio:15.2f}{to_loop:13.2f}", flush=True)
        mean = math.exp(statistics.fmean(map(math.log, ratios.values())))
        worst = max(ratios, key=ratios.__getitem__)
        print(f"to torch.func: geometric mean {mean:.2f}, at most {ratios[worst]:.2f} ({worst})\n")


if __name__ == "__main__":
    main()
