"""What another process finds by name: functions, transformed functions, and modules and data sets that hold such."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import Dataset, default_collate

from functorch_lite import grad, jacrev, jit, vmap


def energy(x):
    return x.sin().sum()


force = vmap(grad(energy))


@vmap
def decorated(x):
    return x.cos()


class Model(nn.Module):
    """Holds transformed functions: of a function, and of a method, which uses its parameters."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.force = vmap(grad(energy))
        self.compiled = jit(grad(energy))
        self.jacobians = vmap(jacrev(self.one))

    def one(self, x):
        return self.layer(x).tanh()

    def forward(self, x):
        return self.force(x) + self.compiled(x) + self.jacobians(x).sum(-1)


class Forces(Dataset):
    """Computes with transforms in the worker."""

    def __init__(self, transform=force):
        self.transform = transform

    def __len__(self):
        return 6

    def __getitem__(self, index):
        x = torch.full((2, 3), float(index))
        return x, self.transform(x), jacrev(torch.sin)(x[0])


def collate(rows):
    """Adds a derivative of the whole batch."""
    x, forces, jacobians = default_collate(rows)
    return x, forces, jacobians, vmap(force)(x)


def worker_of_torch_multiprocessing(transform, x, queue):
    queue.put(transform(x).tolist())
