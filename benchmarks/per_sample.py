"""Clipped sums of per-sample gradients, the part of a DP-SGD step that is not noise: time and peak memory.

Run with ``python benchmarks/per_sample.py``; ``--turns 5`` for a quick look, ``--larger`` for sizes where kernels take
most of the time. All ways take turns in one process, on one thread; the numbers are medians. Opacus and BackPACK are
measured if they are installed. The networks are those of `workloads.py`, as modules.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measuring import Times, in_turns, peak_bytes
from torch import Tensor, nn

import functorch_lite as fl

MAX_NORM = 0.1
HEADS = 4
Ways = dict[str, Callable[[], object]]


class Encoder(nn.Module):
    """One layer of a transformer encoder, in parts that all packages know."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, x: Tensor) -> Tensor:
        """As always."""
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(-2, -3) for part in self.qkv(x).chunk(3, -1))
        attended = F.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v
        x = self.norm1(x + self.out(attended.transpose(-2, -3).flatten(-2)))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Mean(nn.Module):
    """Over the places of a sequence."""

    def forward(self, x: Tensor) -> Tensor:
        """As always."""
        return x.mean(1)


def cnn(batch: int, channels: int, size: int) -> tuple[nn.Module, Tensor]:
    layers = [nn.Conv2d(1, channels, 3, padding=1), nn.ReLU()]
    layers += [nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * channels, 10)]
    return nn.Sequential(*layers), torch.randn(batch, 1, size, size)


def transformer(batch: int, length: int, d: int, layers: int) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(*(Encoder(d) for _ in range(layers)), nn.Linear(d, 10), Mean()), torch.randn(batch, length, d)


def clipped(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sum of per-sample gradients, each clipped."""
    norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0).sqrt()
    weights = (MAX_NORM / norms).clamp(max=1)
    return {name: (weights @ g.flatten(1)).view(g.shape[1:]) for name, g in gradients.items()}


def ours(model: nn.Module, x: Tensor, target: Tensor) -> Ways:
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(fl.functional_call(model, params, x[None])[0], target)

    transformed = fl.vmap(fl.grad(loss), (None, 0, 0))
    gradients = fl.per_sample_grads(model, F.cross_entropy)
    sums = fl.clipped_grad_sum(model, F.cross_entropy, MAX_NORM)
    graph = fl.jit(lambda params, batch: sums(params, batch))
    return {
        "vmap(grad)": lambda: clipped(transformed(params, x, target)),
        "per_sample_grads": lambda: clipped(gradients(params, (x, target))),
        "clipped_grad_sum": lambda: sums(params, (x, target))[0],
        "jit(clipped_grad_sum)": lambda: graph(params, (x, target))[0],
    }


def opacus(model: nn.Module, x: Tensor, target: Tensor) -> Ways:
    """With its hooks, and with its ghost clipping, in two backward passes."""
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    hooked = GradSampleModule(copy.deepcopy(model), loss_reduction="sum")
    settings = {"noise_multiplier": 0.0, "max_grad_norm": MAX_NORM, "expected_batch_size": None}
    sgd = torch.optim.SGD(hooked.parameters(), lr=0.0)
    optimizer = DPOptimizer(sgd, loss_reduction="sum", **settings)

    def hooks() -> dict[str, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(hooked(x), target, reduction="sum").backward()
        optimizer.clip_and_accumulate()
        return {name: p.summed_grad for name, p in hooked._module.named_parameters()}

    normed = GradSampleModuleFastGradientClipping(
        copy.deepcopy(model), loss_reduction="sum", max_grad_norm=MAX_NORM, use_ghost_clipping=True
    )
    sgd = torch.optim.SGD(normed.parameters(), lr=0.0)
    ghost_optimizer = DPOptimizerFastGradientClipping(sgd, loss_reduction="sum", **settings)
    criterion = DPLossFastGradientClipping(
        normed, ghost_optimizer, nn.CrossEntropyLoss(reduction="sum"), loss_reduction="sum"
    )

    def ghost() -> dict[str, Tensor]:
        ghost_optimizer.zero_grad(set_to_none=True)
        criterion(normed(x), target).backward()
        return {name: p.grad for name, p in normed._module.named_parameters()}

    return {"Opacus, hooks": hooks, "Opacus, ghost clipping": ghost}


def backpack(model: nn.Module, x: Tensor, target: Tensor) -> Ways:
    """Its BatchGrad."""
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    model = extend(copy.deepcopy(model))

    def batch_grad() -> dict[str, Tensor]:
        model.zero_grad()
        loss = F.cross_entropy(model(x), target, reduction="sum")
        with backpack(BatchGrad()):
            loss.backward()
        sums = clipped({name: p.grad_batch for name, p in model.named_parameters()})
        for p in model.parameters():
            del p.grad_batch
        return sums

    return {"BackPACK, BatchGrad": batch_grad}


def plain(model: nn.Module, x: Tensor, target: Tensor) -> Ways:
    """The sum without clipping: no per-sample gradients at all."""
    named = dict(model.named_parameters())

    def backward() -> dict[str, Tensor]:
        loss = F.cross_entropy(model(x), target, reduction="sum")
        return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))

    return {"plain backward, not clipped": backward}


def ways_of(model: nn.Module, x: Tensor) -> tuple[Ways, dict[str, str]]:
    """What is measured: each way that computes the right sum, and why others do not take part."""
    target = torch.randint(10, (len(x),))
    ways, left_out = ours(model, x, target), {}
    expected = ways["vmap(grad)"]()
    for package, build in {"opacus": opacus, "backpack": backpack}.items():
        if importlib.util.find_spec(package) is None:
            left_out[package] = "not installed"
            continue
        try:
            found = build(model, x, target)
            for way in found.values():
                way()
            ways.update(found)
        except (NotImplementedError, AttributeError) as error:
            left_out[package] = f"does not run this network: {str(error).splitlines()[0]}"
    for name, way in ways.items():
        sums = way()
        for key, value in expected.items():
            torch.testing.assert_close(sums[key], value, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    return ways | plain(model, x, target), left_out


def table(title: str, times: Times, peaks: dict[str, int]) -> None:
    print(f"\n{title}\n{'':30}{'ms':>10}{'/ Opacus hooks':>16}{'peak MiB':>10}")
    for name in times.turns:
        against = f"{times.ratio(name, 'Opacus, hooks'):.2f}" if "Opacus, hooks" in times.turns else "-"
        print(f"{name:30}{times.median(name) / 1e3:10.2f}{against:>16}{peaks[name] / 2**20:10.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--larger", action="store_true", help="sizes where kernels take most of the time")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", module="opacus|backpack|torch")
    if args.larger:
        networks = {
            "CNN, 128 images of 32 by 32, 16 and 32 channels": cnn(128, 16, 32),
            "transformer, 64 sequences of 64, width 64, one layer": transformer(64, 64, 64, 1),
            "transformer, 32 sequences of 64, width 256, two layers": transformer(32, 64, 256, 2),
        }
    else:
        networks = {
            "CNN, 32 images of 16 by 16, 8 and 16 channels": cnn(32, 8, 16),
            "transformer, 16 sequences of 16, width 32, one layer": transformer(16, 16, 32, 1),
        }
    for title, (model, x) in networks.items():
        ways, left_out = ways_of(model, x)
        times = in_turns(ways, args.turns)
        table(title, times, {name: peak_bytes(way) for name, way in ways.items()})
        for package, reason in left_out.items():
            print(f"{package}: {reason}")


if __name__ == "__main__":
    main()
