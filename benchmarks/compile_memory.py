"""Memory and time of compiled training steps: eager, ours and functorch.compile in turns, on one thread.

Run with ``python benchmarks/compile_memory.py``. Graphs run operator by operator, and free each input after its last
use, on both sides. *saved* is what the forward pass keeps for the backward pass, parameters and inputs not counted;
*peak* the most that a step (forward and backward) has allocated at any one time, its gradients included. *trace* is the
first call, in which everything is compiled, *step* any later one.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable

import functorch.compile
import torch
from measuring import peak_bytes
from torch import Tensor, nn

import functorch_lite.compile


def mlp() -> tuple[nn.Module, Tensor]:
    """Four layers of 256 with GELU; 256 examples."""
    layers = [layer for _ in range(4) for layer in (nn.Linear(256, 256), nn.GELU())]
    return nn.Sequential(*layers), torch.randn(256, 256)


def transformer() -> tuple[nn.Module, Tensor]:
    """Two encoder layers of width 128 with 4 heads and dropout; 16 examples of 64 tokens."""
    layer = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(16, 64, 128)


WORKLOADS = {"mlp": mlp, "transformer": transformer}
SIDES = {"functorch_lite": functorch_lite.compile, "functorch.compile": functorch.compile}


def ways() -> dict[str, Callable[[nn.Module], nn.Module]]:
    """How a module is run: eager, and by both sides with each partition."""
    found: dict[str, Callable[[nn.Module], nn.Module]] = {"eager": lambda module: module}
    for side, api in SIDES.items():
        for name in ("default_partition", "min_cut_rematerialization_partition"):
            partition = getattr(api, name)
            found[f"{side}, {name.split('_')[0]}"] = lambda module, api=api, partition=partition: api.aot_module(
                module, functorch_lite.compile.nop, partition_fn=partition
            )
    return found


def saved_bytes(module: nn.Module, call: nn.Module, x: Tensor) -> int:
    """What autograd keeps between the passes."""
    outside = {t.untyped_storage()._cdata for t in (x, *module.parameters(), *module.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in outside:
            storages[storage._cdata] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call(x).square().mean()
    return sum(storage.nbytes() for storage in storages.values())


def step(module: nn.Module, call: nn.Module, x: Tensor) -> None:
    """One forward and backward pass."""
    module.zero_grad(set_to_none=True)
    call(x).square().mean().backward()


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(make: Callable[[], tuple[nn.Module, Tensor]], turns: int) -> dict[str, tuple[int, int, float, float]]:
    """For each way: saved bytes, peak bytes, and the medians of the first call and of later ones, taken in turns."""
    torch.manual_seed(0)
    module, x = make()
    modules = {name: copy.deepcopy(module) for name in ways()}
    first: dict[str, list[float]] = {name: [] for name in modules}
    calls = {}
    for turn in range(4):
        for name, compile in ways().items():
            calls[name] = compile(modules[name])
            seconds = _seconds(lambda name=name: step(modules[name], calls[name], x))  # type: ignore[misc]
            if turn > 0:  # the first imports what it needs
                first[name].append(seconds)
    later: dict[str, list[float]] = {name: [] for name in modules}
    for _ in range(turns):
        for name in modules:
            later[name].append(_seconds(lambda name=name: step(modules[name], calls[name], x)))  # type: ignore[misc]
    return {
        name: (
            saved_bytes(modules[name], calls[name], x),
            peak_bytes(lambda name=name: step(modules[name], calls[name], x)),  # type: ignore[misc]
            statistics.median(first[name]),
            statistics.median(later[name]),
        )
        for name in modules
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=15)
    turns = parser.parse_args().turns
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"{'':42}{'saved, KiB':>12}{'peak, KiB':>12}{'trace, ms':>12}{'step, ms':>12}")
    for workload, make in WORKLOADS.items():
        for name, (saved, peak, first, later) in measure(make, turns).items():
            trace = "" if name == "eager" else f"{first * 1e3:.0f}"
            print(f"{workload + ', ' + name:42}{saved >> 10:>12}{peak >> 10:>12}{trace:>12}{later * 1e3:>12.1f}")


if __name__ == "__main__":
    main()
