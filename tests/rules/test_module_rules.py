"""Modules with one state for each example, as in an ensemble, against a loop over the modules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree

from functorch_lite import functional_call, grad, stack_module_state, vmap

pytestmark = [pytest.mark.filterwarnings("error::functorch_lite.LoopFallbackWarning")]

B = 3


def index(*shape: int) -> Tensor:
    return torch.randint(0, 5, shape)


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(4, 3), (2, 4)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), (2, 4, 6)),
    "Conv1d-circular": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), (4, 6)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2), (2, 4, 6, 6)),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2), (1, 2, 3, 3, 3)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), (2, 4, 6)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 2, 3, output_padding=1, stride=2), (2, 4, 4, 4)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (1, 2, 3, 3, 3)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (3, 4)),
    "BatchNorm2d-eval": (lambda: nn.BatchNorm2d(4).eval(), (3, 4, 2, 2)),
    "BatchNorm3d-no-statistics": (lambda: nn.BatchNorm3d(4, track_running_stats=False), (3, 4, 2, 2, 2)),
    "LayerNorm": (lambda: nn.LayerNorm((3, 4)), (2, 3, 4)),
    "RMSNorm": (lambda: nn.RMSNorm(4), (2, 4)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (2, 4, 3)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True), (2, 3, 4)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(3, affine=True), (2, 3, 4, 4)),
    "PReLU": (lambda: nn.PReLU(4), (2, 4, 3)),
    "PReLU-one": (lambda: nn.PReLU(), (2, 4, 3)),
    "pools": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 1), nn.MaxPool2d(2), nn.LPPool2d(2, 2), nn.AdaptiveAvgPool2d(2)),
        (2, 9, 9),
    ),
    "shapes": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.PixelShuffle(2), nn.ReflectionPad2d(1), nn.Upsample(size=(5, 7))),
        (2, 2, 3, 3),
    ),
}
WITH_INDICES: dict[str, Callable[[], nn.Module]] = {
    "Embedding": lambda: nn.Embedding(5, 3),
    "Embedding-padding": lambda: nn.Embedding(5, 3, padding_idx=1),
    "EmbeddingBag": lambda: nn.EmbeddingBag(5, 3),
    "EmbeddingBag-max": lambda: nn.EmbeddingBag(5, 3, mode="max"),
}
WITH_TWO_INPUTS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, Tensor]]] = {
    "Bilinear": (lambda: nn.Bilinear(4, 3, 2), (torch.randn(2, 4), torch.randn(2, 3))),
    "EmbeddingBag-offsets": (lambda: nn.EmbeddingBag(5, 3, mode="sum"), (index(6), torch.tensor([0, 2, 5]))),
}


def compare(make: Callable[[], nn.Module], *inputs: Tensor, input_batched: bool) -> None:
    torch.manual_seed(0)
    models = [make().double() for _ in range(B)]
    params, buffers = stack_module_state(models)

    def loss(params: dict[str, Tensor], buffers: dict[str, Tensor], *x: Tensor) -> Tensor:
        return functional_call(models[0], (params, buffers), x).sin().square().sum()

    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    if input_batched:
        inputs = tuple(torch.stack([x, x + 1 if x.is_floating_point() else x, x]) for x in inputs)
    dims = (0, 0 if buffers else None, *([0 if input_batched else None] * len(inputs)))
    actual = vmap(grad(loss), dims)(params, buffers, *inputs)
    for i, model in enumerate(models):
        own = [x[i] if input_batched else x for x in inputs]
        expected = torch.autograd.grad(model(*own).sin().square().sum(), list(model.parameters()))
        for (name, _), gradient in zip(model.named_parameters(), expected, strict=True):
            torch.testing.assert_close(actual[name][i], gradient)
        # Training has written the statistics of each.
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(buffers[name][i], buffer)
    assert len(_pytree.tree_leaves(actual)) == len(list(models[0].parameters()))


@pytest.mark.parametrize("input_batched", [False, True])
@pytest.mark.parametrize("name", [*MODULES, *WITH_INDICES, *WITH_TWO_INPUTS])
def test_gradient_of_each_module(name: str, input_batched: bool) -> None:
    if name in MODULES:
        make, shape = MODULES[name]
        compare(make, torch.randn(shape), input_batched=input_batched)
    elif name in WITH_INDICES:
        compare(WITH_INDICES[name], index(2, 4), input_batched=input_batched)
    else:
        make, inputs = WITH_TWO_INPUTS[name]
        compare(make, *inputs, input_batched=input_batched)
