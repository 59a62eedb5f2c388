"""Programs put together at random from layers, operators and a few parameters that they share."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from .reference import check

WIDTH = 4


class Program(nn.Module):
    """A chain of random steps on values of shape (1, length, WIDTH), each of which may use earlier values."""

    def __init__(self, seed):
        super().__init__()
        self.seed = seed
        self.matrix = nn.Parameter(torch.randn(WIDTH, WIDTH) / 2)
        self.vector = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.table, self.conv = nn.Embedding(6, WIDTH), nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def steps(self):
        """The choice of steps: functions of a value and an earlier one."""
        return [
            lambda x, y: self.linear(x),
            lambda x, y: self.norm(x) + y,
            lambda x, y: self.conv(x.mT).mT,
            lambda x, y: self.attention(x, y, y)[0],
            lambda x, y: F.linear(x, self.matrix, self.vector),
            lambda x, y: F.linear(x, self.linear.weight.T * 0.5, self.linear.bias + self.vector),
            lambda x, y: x @ self.matrix,
            lambda x, y: x @ (self.matrix @ self.linear.weight),
            lambda x, y: x * self.vector + y,
            lambda x, y: x + self.table.weight[: x.shape[1]],
            lambda x, y: x + F.embedding(torch.arange(x.shape[1]), self.table.weight),
            lambda x, y: F.linear(x, self.table.weight)[..., :WIDTH],
            lambda x, y: F.layer_norm(x, (WIDTH,), self.vector, self.linear.bias),
            lambda x, y: torch.einsum("bli,ij->blj", x, self.matrix),
            lambda x, y: self.linear(x).mul_(y),
            lambda x, y: self.conv(x.mT).sigmoid_().mT,
            lambda x, y: torch.cat([x, self.vector.expand(1, 1, -1)], 1)[:, 1:],
            lambda x, y: torch.where(x > 0, x, self.vector * y),
            lambda x, y: F.conv1d(x.mT, self.matrix[..., None] * self.vector[:, None, None]).mT,
            lambda x, y: x.tanh() / self.matrix.norm(),
            lambda x, y: self.table(x.argmax(-1)) + x,
            lambda x, y: x.tanh(),
        ]

    def forward(self, ids):
        choose = random.Random(self.seed)
        values = [self.table(ids)]
        for _ in range(7):
            step = choose.choice(self.steps())
            values.append(step(values[-1], choose.choice(values)))
        return values[-1].mean(1)


@pytest.mark.parametrize("seed", range(40))
def test_program(seed, monkeypatch):
    torch.manual_seed(seed)
    ids, target = torch.randint(6, (3, 5)), torch.randint(WIDTH, (3,))
    check(Program(seed).double(), F.cross_entropy, (ids, target), rtol=1e-6, monkeypatch=monkeypatch)
