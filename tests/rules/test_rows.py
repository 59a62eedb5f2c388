"""The table of batching rules itself."""

from __future__ import annotations

import collections

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from functorch_lite import _C, vmap


def test_every_row_names_an_operator_of_this_torch():
    if torch.__version__.startswith("2.13"):  # the release that the rows are written for
        assert _C.unknown_operators() == []
    for name, _ in _C.batching_rules():
        assert torch._C._dispatch_has_kernel(name)


def test_no_operator_has_two_rules():
    counts = collections.Counter(name for name, _ in _C.batching_rules())
    assert max(counts.values()) == 1


def test_rules_are_ordinary_registrations():
    for name, _ in _C.batching_rules():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "TESTING_ONLY_GenericWrapper")


def test_the_common_operators_have_rules():
    names = {name for name, _ in _C.batching_rules()}
    for name in ("sin", "add.Tensor", "mm", "convolution", "native_layer_norm", "_softmax", "index.Tensor", "cat"):
        assert f"aten::{name}" in names


class Kernels(TorchDispatchMode):
    """Counts the operators that reach PyTorch's kernels, views aside."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.append(func.name().removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


X = torch.rand(5, 3, 4, 4)
ONE_KERNEL = {
    "mm": (lambda x: x[0] @ x[1], "bmm"),
    "mv": (lambda x: x[0] @ x[1, 0], "bmm"),
    "dot": (lambda x: x[0, 0] @ x[0, 1], "bmm"),
    "addmm": (lambda x: torch.addmm(x[0], x[1], x[2], alpha=2), "baddbmm"),
    "linear": (lambda x: F.linear(x[0], x[1], x[2, 0]), "baddbmm"),
    "sum": (torch.sum, "sum.dim_IntList"),
    "index": (lambda x: x[torch.tensor([1, 0])], "index.Tensor"),
    "inv": (lambda x: torch.linalg.inv_ex(x + torch.eye(4)).inverse, "linalg_inv_ex"),
    "batch_norm": (lambda x: F.batch_norm(x[None], torch.ones(3), torch.ones(3)), "native_batch_norm"),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), "max_pool2d_with_indices"),
}


@pytest.mark.parametrize("name", ONE_KERNEL)
def test_common_operators_are_one_kernel(name):
    function, kernel = ONE_KERNEL[name]
    with Kernels() as kernels:
        result = vmap(function)(X)
    made_inside = {"add.Tensor", "empty.memory_format", "eye", "ones", "lift_fresh", "_to_copy"}
    assert [name for name in kernels.names if name not in made_inside] == [kernel]
    torch.testing.assert_close(result, torch.stack([function(x) for x in X]))


@pytest.mark.parametrize(
    "shapes", [(1, 1), (1, 2), (2, 1), (2, 2), (3, 2), (3, 1), (2, 3), (1, 3), (3, 3), (4, 3), (3, 4)]
)
def test_products_of_all_ranks(shapes):
    sizes = (2, 3, 4, 4)
    a, b = torch.rand(5, *sizes[4 - shapes[0] :]), torch.rand(5, *sizes[4 - shapes[1] :])
    for dims in ((0, 0), (0, None), (None, 0)):
        args = [x if dim == 0 else x[0] for x, dim in zip((a, b), dims, strict=True)]

        def one(i: int, args: list[Tensor] = args, dims: tuple[int | None, ...] = dims) -> Tensor:
            return torch.matmul(*(x if dim is None else x[i] for x, dim in zip(args, dims, strict=True)))

        torch.testing.assert_close(vmap(torch.matmul, dims)(*args), torch.stack([one(i) for i in range(5)]))


def test_a_product_with_a_number_is_an_error():
    with pytest.raises(RuntimeError, match="both arguments need at least one dimension, but they have 0 and 1"):
        vmap(torch.matmul)(torch.rand(3), torch.rand(3, 3))
