"""Peak memory, in bytes that the profiler counts: exact, and the same in each run."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from benchmarks.measuring import peak_bytes
from benchmarks.memory import WORKLOADS, jacobians, plain_gradient
from functorch_lite import _C, grad, jacrev, value_and_grad, vjp, vmap
from functorch_lite._remat import remat

SIZE = 10_000
BYTES = 4 * SIZE  # of one tensor


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("transform", [grad, value_and_grad])
@pytest.mark.parametrize("name", WORKLOADS)
def test_a_gradient_takes_the_memory_of_a_backward_pass(name, transform):
    loss, params = WORKLOADS[name]()
    with sdpa_kernel(SDPBackend.MATH):  # attention is another subject
        plain = peak_bytes(lambda: plain_gradient(loss, params))
        ours = peak_bytes(lambda: transform(loss)(params))
    assert ours <= 1.05 * plain


def test_jacobians_take_no_more_memory_than_others():
    for name, row in jacobians().items():
        ours = row.pop("ours")
        assert ours <= 1.05 * max(row.values()), name


def segment(x):
    for _ in range(10):
        x = x.sin()
    return x


def segments(wrap, x):
    for _ in range(10):
        x = wrap(segment, x)
    return x.sum()


def in_a_checkpoint(func, x):
    return checkpoint(func, x, use_reentrant=False)


def test_a_checkpoint_takes_the_memory_of_its_inputs():
    x = torch.randn(SIZE)

    def plain(wrap):
        leaf = x.detach().requires_grad_()
        segments(wrap, leaf).backward()
        return leaf.grad

    def ours(wrap):
        return grad(lambda x: segments(wrap, x))(x)

    expected = peak_bytes(lambda: plain(in_a_checkpoint))
    assert expected < 25 * BYTES
    # PyTorch stops before it has computed the output again, and holds its cotangent for a shorter time.
    assert peak_bytes(lambda: ours(in_a_checkpoint)) <= expected + 2 * BYTES
    assert peak_bytes(lambda: ours(lambda f, x: remat(f)(x))) <= expected + 2 * BYTES
    assert peak_bytes(lambda: ours(lambda f, x: f(x))) > 100 * BYTES


def test_a_checkpoint_saves_memory_at_second_order():
    x = torch.randn(SIZE)

    def peak(wrap):
        return peak_bytes(lambda: grad(lambda x: grad(lambda x: segments(wrap, x))(x).pow(2).sum())(x))

    assert peak(in_a_checkpoint) < 0.4 * peak(lambda f, x: f(x))


@pytest.mark.parametrize("mapped", [False, True])
def test_only_inputs_live_between_forward_and_backward(mapped):
    live = []

    def func(x):
        _, pull = vjp(lambda x: in_a_checkpoint(segment, x), x)
        live.append(pull)
        return x

    def run():
        live.clear()
        vmap(func)(x) if mapped else func(x)

    x = torch.randn(4, SIZE)
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        x = torch.randn(4, SIZE)
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert sum(event.nbytes() for event in events) <= 2 * 4 * BYTES + 1e5  # x and the output


def test_weights_are_not_copied_by_a_checkpoint():
    layer = nn.Linear(512, 512)
    x = torch.randn(4, 512)
    params = {name: p.detach() for name, p in layer.named_parameters()}
    loss = lambda params: in_a_checkpoint(lambda x: torch.func.functional_call(layer, params, x), x).sum()
    assert peak_bytes(lambda: grad(loss)(params)) < 1.5 * params["weight"].nbytes


def test_peaks_are_measured_with_autograd_functions():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    x = torch.randn(3)
    assert torch.equal(jacrev(Double.apply, chunk_size="auto")(x), 2 * torch.eye(3))
    with _C.MemoryMeter(x.device) as meter:
        Double.apply(x.requires_grad_())
    assert meter.peak >= 12
