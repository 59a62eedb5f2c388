"""Small functions of one float64 tensor x[2], smooth near the samples, of many kinds of operators."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[[Tensor], Tensor]

_W = torch.tensor([[0.3, -0.8], [1.1, 0.4], [0.2, 0.9]], dtype=torch.float64)
_B = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
_SPD = torch.tensor([[2.0, 0.3], [0.3, 1.5]], dtype=torch.float64)


def _in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y.mul_(2.0).add_(x.sin())
    return y * x


def _in_place_view(x: Tensor) -> Tensor:
    y = x * 1.5
    y[0].mul_(x[1])
    y[1:] = y[1:] + x[0] ** 2
    return y.sin()


def _write_into_constant(x: Tensor) -> Tensor:
    y = x.new_zeros(3)
    y[:2] = x * x
    y[2] = x.prod()
    return y


def _loop(x: Tensor) -> Tensor:
    y = x
    for _ in range(3):
        y = (y * 0.7 + x).tanh()
    return y


def _where(x: Tensor) -> Tensor:
    return torch.where(x > 0.1, x.sin(), x**3)


def _conv(x: Tensor) -> Tensor:
    weight = _W.reshape(1, 1, 6)[..., :3]
    signal = torch.cat([x, x.sin(), x * x]).reshape(1, 1, 6)
    return F.conv1d(signal, weight, padding=1).sum(-1).flatten()


def _pool(x: Tensor) -> Tensor:
    return F.avg_pool1d(torch.cat([x, x.cos()]).reshape(1, 1, 4) ** 2, 2).flatten()


def _attention(x: Tensor) -> Tensor:
    q = torch.stack([x, x.sin()])
    return F.scaled_dot_product_attention(q[None], q[None].cos(), q[None])[0].sum(0)


def _layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(torch.cat([x, x.sin(), x * 2]), (6,)).pow(2)[:2] * x


def _layer_norm_by_hand(x: Tensor) -> Tensor:
    y = torch.cat([x, x.sin(), x * 2])
    y = y - y.mean()
    y = y / (y.pow(2).mean() + 1e-5).sqrt()
    return y.pow(2)[:2] * x


def _sort(x: Tensor) -> Tensor:
    return torch.sort(torch.stack([x[0], x[1] * 2, x[0] * x[1]])).values.sin()


def _index(x: Tensor) -> Tensor:
    return x[torch.tensor([1, 0, 1])] * x[0]


def _gather(x: Tensor) -> Tensor:
    return torch.gather(x.outer(x), 1, torch.tensor([[1], [0]])).squeeze(1).exp()


def _scatter(x: Tensor) -> Tensor:
    return torch.zeros(3, dtype=x.dtype).scatter_add(0, torch.tensor([2, 0]), x**2) * x.sum()


def _captured_module(x: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, _W, _B)), _W.t())


FUNCTIONS: dict[str, Function] = {
    "sin": torch.sin,
    "polynomial": lambda x: x**3 - 2 * x**2 + 0.5 * x + 1,
    "scalar_arithmetic": lambda x: (x * 1.01 + 0.5) / 2 - (3 - x) * 0.1 + 1 / (x + 5),
    "product": lambda x: x * x.flip(0),
    "exp_log": lambda x: (x.exp() + 1).log(),
    "sum": lambda x: (x.sin() * x).sum(),
    "norm": lambda x: (x * x + 1).sum().sqrt() * x,
    "mean_var": lambda x: torch.cat([x, x**2]).var() * x.mean(),
    "prod": lambda x: (x + 2).prod() * x,
    "cumsum": lambda x: x.exp().cumsum(0) * x,
    "softmax": lambda x: torch.softmax(x, 0) * x.sin(),
    "log_softmax": lambda x: torch.log_softmax(x * 2, -1)[0] * x,
    "logsumexp": lambda x: torch.logsumexp(torch.stack([x, x * 2]), 0),
    "linear": lambda x: F.linear(x, _W, _B).tanh(),
    "captured_module": _captured_module,
    "outer": lambda x: torch.outer(x, x.sin()),
    "matmul": lambda x: torch.stack([x, x.cos()]) @ torch.stack([x.sin(), x]),
    "einsum": lambda x: torch.einsum("i,ij,j->", x, _SPD, x.sin()),
    "bmm": lambda x: torch.bmm(x.outer(x)[None], _SPD[None])[0].sum(0),
    "solve": lambda x: torch.linalg.solve(_SPD + torch.diag(x * x), x),
    "inverse": lambda x: torch.linalg.inv(_SPD + x.outer(x)).sum(0),
    "det": lambda x: torch.linalg.det(_SPD + x.outer(x)) * x,
    "cholesky": lambda x: torch.linalg.cholesky(_SPD + torch.diag(x * x)).sum(0),
    "reshape": lambda x: torch.cat([x, x * x]).reshape(2, 2).t().reshape(-1)[1:] * x[0],
    "transpose": lambda x: x.outer(x.exp()).transpose(0, 1).sum(1),
    "expand": lambda x: x.unsqueeze(0).expand(3, 2).sin().sum(0) * x,
    "stack_split": lambda x: sum(torch.stack([x, x**2, x.sin()]).unbind(0)) * x.chunk(2)[0],
    "where": _where,
    "clamp": lambda x: x.clamp(-2, 2) ** 2 * x,
    "sigmoid_gelu": lambda x: torch.sigmoid(x) * F.gelu(x),
    "in_place": _in_place,
    "in_place_view": _in_place_view,
    "write_into_constant": _write_into_constant,
    "loop": _loop,
    "conv": _conv,
    "pool": _pool,
    "attention": _attention,
    "layer_norm": _layer_norm,
    "sort": _sort,
    "index": _index,
    "gather": _gather,
    "scatter": _scatter,
}

#: Where PyTorch's own higher derivatives are wrong, the same function in other operators, for the reference alone:
#: the third derivative of layer norm differs from finite differences.
REFERENCES: dict[str, Function] = {"layer_norm": _layer_norm_by_hand}
