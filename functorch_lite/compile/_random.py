"""The states of random number generators, for computations that draw the same numbers again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

States = dict[torch.device, Tensor]


def states(inputs: Sequence[Any]) -> States:
    """Those of the CPU's generator, and of the generators of the devices of ``inputs``."""
    devices = {x.device for x in inputs if isinstance(x, Tensor) and x.device.type == "cuda"}
    return {torch.device("cpu"): torch.get_rng_state()} | {d: torch.cuda.get_rng_state(d) for d in devices}


@contextmanager
def drawn_from(states: States | None) -> Iterator[None]:
    """The enclosed code draws the numbers that were drawn from these states; afterwards all is as before."""
    if states is None:
        yield
        return
    cuda = [device for device in states if device.type == "cuda"]
    with torch.random.fork_rng(devices=cuda):
        for device, state in states.items():
            if device.type == "cuda":
                torch.cuda.set_rng_state(state, device)
            else:
                torch.set_rng_state(state)
        yield
