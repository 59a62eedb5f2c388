"""Each default decomposition computes what its operator computes, on the samples of PyTorch's own database."""

import warnings
from collections import defaultdict

import pytest
import torch
from torch.testing import assert_close
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from functorch_lite.compile._decompositions import default_decompositions, get_decompositions

aten = torch.ops.aten

#: Forward passes whose samples, run forward and backward, call the operators of the default set.
SOURCES = [
    "__getitem__", "log_softmax", "logit", "masked_fill", "nn.functional.batch_norm",
    "nn.functional.binary_cross_entropy", "nn.functional.cross_entropy", "nn.functional.dropout", "nn.functional.elu",
    "nn.functional.gelu", "nn.functional.glu", "nn.functional.group_norm", "nn.functional.hardsigmoid",
    "nn.functional.hardswish", "nn.functional.hardtanh", "nn.functional.huber_loss", "nn.functional.layer_norm",
    "nn.functional.leaky_relu", "nn.functional.logsigmoid", "nn.functional.mish", "nn.functional.mse_loss",
    "nn.functional.nll_loss", "nn.functional.prelu", "nn.functional.relu", "nn.functional.rrelu", "nn.functional.selu",
    "nn.functional.silu", "nn.functional.smooth_l1_loss", "nn.functional.soft_margin_loss", "nn.functional.softplus",
    "nn.functional.threshold", "select", "sigmoid", "softmax", "tanh",
]  # fmt: skip


def described(call):
    """Two calls are alike if this is."""
    return repr(pytree.tree_map_only(torch.Tensor, lambda t: (tuple(t.shape), t.stride(), t.dtype), call))


def in_double(tree):
    def convert(tensor):
        return tensor.to(torch.promote_types(tensor.dtype, torch.float64)) if tensor.is_floating_point() else tensor

    return pytree.tree_map_only(torch.Tensor, convert, tree)


def form(leaf):
    return (leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf


class Harvest(TorchDispatchMode):
    """Keeps the arguments of the calls of the operators that are decomposed."""

    def __init__(self):
        super().__init__()
        self.calls = defaultdict(dict)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        call = (args, kwargs or {})
        if func in default_decompositions and len(self.calls[func]) < 60:
            self.calls[func].setdefault(described(call), pytree.tree_map_only(torch.Tensor, torch.clone, call))
        return func(*args, **(kwargs or {}))


def run_samples(info, dtype):
    for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
        output = info.op(sample.input, *sample.args, **sample.kwargs)
        outputs = [o for o in pytree.tree_leaves(output) if isinstance(o, torch.Tensor) and o.requires_grad]
        if outputs:
            inputs = pytree.tree_leaves((sample.input, sample.args, sample.kwargs))
            leaves = [i for i in inputs if isinstance(i, torch.Tensor) and i.requires_grad]
            torch.autograd.grad(outputs, leaves, [torch.randn_like(o) for o in outputs], allow_unused=True)


@pytest.fixture(scope="module")
def harvest():
    torch.manual_seed(0)
    with Harvest() as harvest, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for dtype in (torch.float64, torch.float32):
            for info in op_db:
                if info.name in SOURCES and info.supports_dtype(dtype, "cpu"):
                    run_samples(info, dtype)
        x = torch.randn(3, 4, requires_grad=True)
        x[1:, ::2].sum().backward()
        out, mask = torch.native_dropout(x, 0.5, True)
        out.sum().backward()
        x.detach()
    return harvest.calls


@pytest.mark.parametrize("operator", default_decompositions, ids=str)
def test_agrees_with_its_operator(operator, harvest):
    calls = harvest[operator].values()
    assert calls
    for args, kwargs in calls:
        got = default_decompositions[operator](*args, **kwargs)
        expected, exact = operator(*args, **kwargs), operator(*in_double(args), **in_double(kwargs))
        # The operators leave open what is in gradients that nobody asked for.
        if "output_mask" in [a.name for a in operator._schema.arguments]:
            got, expected, exact = (
                [r if m else None for r, m in zip(rs, args[-1], strict=True)] for rs in (got, expected, exact)
            )
        assert_close(in_double(got), exact, equal_nan=True, rtol=1.3e-6, atol=1e-5)
        assert pytree.tree_map(form, got) == pytree.tree_map(form, expected)


class Called(TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self):
        super().__init__()
        self.operators = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.add(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("operator", default_decompositions, ids=str)
def test_neither_draws_nor_writes_nor_calls_itself(operator, harvest):
    assert not operator._schema.is_mutable
    for args, kwargs in harvest[operator].values():
        with Called() as called:
            default_decompositions[operator](*args, **kwargs)
        assert operator not in called.operators
        assert not [o for o in called.operators if o._schema.is_mutable or torch.Tag.nondeterministic_seeded in o.tags]


def test_get_decompositions_takes_packets_and_overloads():
    found = get_decompositions([aten.tanh_backward, aten.elu.default])
    assert set(found) == {aten.tanh_backward.default, aten.tanh_backward.grad_input, aten.elu.default}
    y = torch.rand(3)
    assert_close(found[aten.tanh_backward.default](y, y), y * (1 - y * y))


def test_the_result_may_be_changed():
    get_decompositions([aten.elu.default]).clear()
    assert get_decompositions([aten.elu.default])


def test_refuses_what_has_none():
    with pytest.raises(
        ValueError, match=r"^get_decompositions: got aten\.mm\.default, expected .*; leave it out, or put your own"
    ):
        get_decompositions([aten.mm.default])


def test_refuses_what_is_no_operator():
    with pytest.raises(TypeError, match=r"^get_decompositions: got .*, expected operators; name them as in torch.ops"):
        get_decompositions([torch.tanh])
