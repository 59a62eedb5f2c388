"""Joint graphs of some functions, made with make_fx over vjp, and the inputs to run them on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.nn import functional as F

import functorch_lite as fl


@dataclass
class JointGraph:
    """A joint graph, the inputs that it was traced with, and the function."""

    module: fx.GraphModule
    primals: list[Any]
    tangents: list[Any]
    num_fwd_outputs: int
    func: Callable[..., Any] | None = None

    @property
    def joint_inputs(self) -> tuple[list[Any], list[Any]]:
        return self.primals, self.tangents

    def split(self, partition: Callable[..., Any], **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        return partition(self.module, self.joint_inputs, num_fwd_outputs=self.num_fwd_outputs, **options)

    def run(self) -> list[Any]:
        torch.manual_seed(0)
        return self.module(*self.primals, *self.tangents)


def joint_graph(func: Callable[..., Any], *primals: Tensor, tracing_mode: str = "fake") -> JointGraph:
    """The joint graph of a function of tensors that returns one or a tuple of tensors."""

    def joint(args: list[Tensor], cotangents: list[Tensor]) -> list[Any]:
        outputs, pull = fl.vjp(lambda *args: pytree.tree_leaves(func(*args)), *args)
        return [*outputs, *pull(list(cotangents))]

    outputs = pytree.tree_leaves(func(*primals))
    tangents = [torch.randn_like(output) for output in outputs]
    module = fl.make_fx(joint, tracing_mode=tracing_mode)(list(primals), tangents)
    module.graph.set_codegen(fx.graph.CodeGen())  # takes the leaves, one by one
    module.recompile()
    return JointGraph(module, list(primals), tangents, len(outputs), func)


def tag(joint: JointGraph) -> JointGraph:
    """Tag what depends on a tangent or comes after the first node that does."""
    tangents = [n for n in joint.module.graph.nodes if n.op == "placeholder"][len(joint.primals) :]
    dependent = set(tangents)
    has_begun = False
    for node in joint.module.graph.nodes:
        if any(one in dependent for one in node.all_input_nodes):
            dependent.add(node)
            has_begun = True
        if has_begun and node.op == "call_function":
            node.meta["partitioner_tag"] = "is_backward"
    return joint


def of_module(module: nn.Module, *inputs: Tensor, tracing_mode: str = "fake") -> JointGraph:
    """The joint graph of a module, with respect to its parameters and inputs."""
    names = [name for name, _ in module.named_parameters()]
    params = [param.detach() for param in module.parameters()]

    def func(*args: Tensor) -> Any:
        return fl.functional_call(module, dict(zip(names, args, strict=False)), args[len(names) :])

    return joint_graph(func, *params, *inputs, tracing_mode=tracing_mode)


def mlp(tracing_mode: str = "fake") -> JointGraph:
    layers = [layer for _ in range(3) for layer in (nn.Linear(16, 16), nn.LayerNorm(16), nn.GELU())]
    return of_module(nn.Sequential(*layers), torch.randn(8, 16), tracing_mode=tracing_mode)


def convolutions(tracing_mode: str = "fake") -> JointGraph:
    layers = [
        layer
        for channels in (3, 8, 8)
        for layer in (nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU())
    ]
    network = nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 5))
    return of_module(network, torch.randn(2, 3, 8, 8), tracing_mode=tracing_mode)


def attention(tracing_mode: str = "fake") -> JointGraph:
    def func(x: Tensor, weight: Tensor) -> Tensor:
        q, k, v = (x @ weight).chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v) + torch.softmax(q @ k.mT / 3, -1) @ v

    return joint_graph(func, torch.randn(2, 4, 6, 8), torch.randn(8, 24), tracing_mode=tracing_mode)


class Layer(nn.Module):
    """A layer of a transformer, with a dropout that is not in place, unlike that of `nn.Dropout` on the CPU."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.drop(self.out(self.attend(x))))
        return self.norm2(x + self.drop(self.down(self.drop(F.gelu(self.up(x))))))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        scores = self.drop(torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1))
        return (scores @ v).transpose(1, 2).flatten(2)

    def drop(self, x: Tensor) -> Tensor:
        return torch.native_dropout(x, self.dropout, True)[0]


def transformer(tracing_mode: str = "fake") -> JointGraph:
    layers = nn.Sequential(*(Layer(16, 2, 32, dropout=0.2) for _ in range(2)))
    return of_module(layers, torch.randn(2, 5, 16), tracing_mode=tracing_mode)


def recurrent(tracing_mode: str = "fake") -> JointGraph:
    def func(xs: Tensor, w: Tensor, u: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        h = c = xs.new_zeros(xs.shape[1], 8)
        for x in xs.unbind():
            i, f, g, o = (x @ w + h @ u + bias).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return h, c

    shapes = (6, 3, 4), (4, 32), (8, 32), (32,)
    return joint_graph(func, *(torch.randn(shape) for shape in shapes), tracing_mode=tracing_mode)


def pointwise_chain(tracing_mode: str = "fake") -> JointGraph:
    def func(x: Tensor) -> Tensor:
        x = x @ x
        for _ in range(40):
            x = (x * 1.01).sin()
        return x

    return joint_graph(func, torch.randn(6, 6), tracing_mode=tracing_mode)


FUNCTIONS = {
    "mlp": mlp,
    "convolutions": convolutions,
    "attention": attention,
    "transformer": transformer,
    "recurrent": recurrent,
    "pointwise chain": pointwise_chain,
}


@cache
def joint_graph_of(name: str, tracing_mode: str, tagged: bool = False) -> JointGraph:
    """One of them, made once."""
    torch.manual_seed(0)
    joint = FUNCTIONS[name](tracing_mode)
    return tag(joint) if tagged else joint
