"""What partitioners save for the backward pass: ours beside those of functorch.compile, on the same joint graphs.

Run with ``python benchmarks/partition.py``. Bytes that are saved are those of memory that exists for that only: not
primals, and each storage once. The peak is that of one step, a forward and a backward pass whose values are freed when
they are used for the last time, without what exists before it.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import functorch.compile as peer
import torch
from measuring import peak_bytes
from torch import Tensor, fx, nn
from torch.nn import functional as F

import functorch_lite as fl
from functorch_lite.compile import _passes
from functorch_lite.compile._partition import default_partition, min_cut_rematerialization_partition

WAYS: dict[str, Callable[..., Any]] = {
    "default": default_partition,
    "minimum cut, budget 1": partial(min_cut_rematerialization_partition, memory_budget=1),
    "budget 0.5": partial(min_cut_rematerialization_partition, memory_budget=0.5),
    "budget 0": partial(min_cut_rematerialization_partition, memory_budget=0),
}
PEERS: dict[str, Callable[..., Any]] = {
    "functorch.compile default": peer.default_partition,
    "functorch.compile minimum cut": peer.min_cut_rematerialization_partition,
}


class Joint(NamedTuple):
    """A joint graph and its inputs."""

    module: fx.GraphModule
    primals: list[Tensor]
    tangents: list[Tensor]


def joint_graph(module: nn.Module, x: Tensor) -> Joint:
    """The joint graph of a module, with the tags that a partitioner goes by."""
    names = [name for name, _ in module.named_parameters()]
    primals = [*(param.detach() for param in module.parameters()), x]

    def function(*args: Tensor) -> Tensor:
        return fl.functional_call(module, dict(zip(names, args, strict=False)), args[-1])

    def joint(args: list[Tensor], cotangent: Tensor) -> list[Tensor]:
        output, pull = fl.vjp(function, *args)
        return [output, *pull(cotangent)]

    tangent = torch.randn_like(module(x))
    graph = _passes.simplify(fl.make_fx(joint, tracing_mode="fake")(primals, tangent).graph)
    graph.set_codegen(fx.graph.CodeGen())
    place = {node: place for place, node in enumerate(graph.nodes)}
    tangents = [node for node in graph.nodes if node.op == "placeholder"][len(primals) :]
    first = min(place[user] for node in tangents for user in node.users)
    for node in graph.nodes:
        if node.op == "call_function":
            node.meta["partitioner_tag"] = "is_backward" if place[node] >= first else "is_forward"
    return Joint(fx.GraphModule({}, graph), primals, [tangent])


def with_names_of_the_peer(joint: Joint) -> Joint:
    """The graph with the names by which functorch.compile tells primals from tangents."""
    module = copy.deepcopy(joint.module)
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    count = len(joint.primals)
    for place, node in enumerate(placeholders):
        node.name = node.target = f"primals_{place + 1}" if place < count else f"tangents_{place - count + 1}"
    module.recompile()
    return joint._replace(module=module)


class Layer(nn.Module):
    """A layer of a transformer encoder with dropout."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Attention and a network of two layers, each with a residual and a norm."""
        x = self.norm1(x + _dropout(self.out(self.attend(x))))
        return self.norm2(x + _dropout(self.down(_dropout(F.gelu(self.up(x))))))

    def attend(self, x: Tensor) -> Tensor:
        """Attention, written out."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        weights = _dropout(torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1))
        return (weights @ v).transpose(1, 2).flatten(2)


def _dropout(x: Tensor) -> Tensor:
    return torch.native_dropout(x, 0.1, True)[0]  # that of nn.Dropout writes in place on the CPU


def mlp(batch: int) -> Joint:
    """Eight layers of 1024."""
    layers = [layer for _ in range(8) for layer in (nn.Linear(1024, 1024), nn.LayerNorm(1024), nn.GELU())]
    return joint_graph(nn.Sequential(*layers), torch.randn(batch, 1024))


def transformer() -> Joint:
    """Two layers of width 256 with four heads, batch 8, sequence 128."""
    return joint_graph(nn.Sequential(Layer(256, 4, 1024), Layer(256, 4, 1024)), torch.randn(8, 128, 256))


WORKLOADS = {
    "mlp, batch 256": partial(mlp, 256),  # of which the gradients of the weights take more than what is saved
    "mlp, batch 1024": partial(mlp, 1024),
    "transformer": transformer,
}


class Row(NamedTuple):
    """What one partition takes."""

    saved: int
    peak: int
    seconds: float


def measure(joint: Joint, partition: Callable[..., Any]) -> Row:
    """Partition a graph, and run one step."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        forward, backward = partition(joint.module, (joint.primals, joint.tangents), num_fwd_outputs=1)
        times.append(time.perf_counter() - start)
    saved = forward(*joint.primals)[1:]
    outside = {primal.untyped_storage()._cdata for primal in joint.primals}
    storages = {value.untyped_storage()._cdata: value.untyped_storage().nbytes() for value in saved}
    del saved

    def step() -> object:
        _, *saved = fx.Interpreter(forward).boxed_run(list(joint.primals))
        saved += joint.tangents
        return fx.Interpreter(backward).boxed_run(saved)

    return Row(sum(n for storage, n in storages.items() if storage not in outside), peak_bytes(step), min(times))


def partitions() -> dict[str, dict[str, Row]]:
    """A row for each workload and each partitioner."""
    torch.manual_seed(0)
    table = {}
    for name, make in WORKLOADS.items():
        joint = make()
        rows = {way: measure(joint, partition) for way, partition in WAYS.items()}
        named = with_names_of_the_peer(joint)
        table[name] = rows | {way: measure(named, partition) for way, partition in PEERS.items()}
    return table


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    for name, rows in partitions().items():
        print(name)
        for way, row in rows.items():
            saved, peak = row.saved / 1e6, row.peak / 1e6
            print(f"  {way:30}saved {saved:7.2f} MB   peak {peak:7.2f} MB   partition {row.seconds * 1e3:6.1f} ms")


if __name__ == "__main__":
    main()
