"""Derivatives of attention, against nested torch.autograd through PyTorch's composition of plain operators."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measuring import peak_bytes
from functorch_lite import _C, grad, hessian, jacfwd, jacrev, jvp, make_fx, vjp, vmap

from .support.oracles import finite_difference_jvp

aten = torch.ops.aten
FLASH = "_scaled_dot_product_flash_attention_for_cpu"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=["at_once", "in_chunks"])
def length(request):
    """What is short and what is long: chunks have three queries."""
    if request.param == "in_chunks":
        _C.set_attention_limits(0, 3)
    yield request.param
    _C.set_attention_limits(2**21, 64)


@pytest.fixture
def chunks():
    _C.set_attention_limits(0, 3)
    yield
    _C.set_attention_limits(2**21, 64)


def rand(*shape):
    return torch.rand(*shape, dtype=torch.float64) * 2 - 1


def keep(*shape):
    """A mask of which one row is all false."""
    mask = torch.rand(*shape) > 0.4
    mask[..., -1, :] = False
    return mask


# Arguments, in front those that are differentiated, and options.
CASES = {
    "plain": lambda: ([rand(1, 2, 7, 3), rand(1, 2, 5, 3), rand(1, 2, 5, 2)], [], {}),
    "scale": lambda: ([rand(2, 2, 7, 3), rand(2, 2, 5, 3), rand(2, 2, 5, 3)], [], {"scale": 0.3}),
    "causal": lambda: ([rand(1, 2, 7, 3) for _ in range(3)], [], {"is_causal": True}),
    "causal_more_queries": lambda: ([rand(1, 2, 7, 3), rand(1, 2, 4, 3), rand(1, 2, 4, 3)], [], {"is_causal": True}),
    "causal_more_keys": lambda: ([rand(1, 2, 4, 3), rand(1, 2, 7, 3), rand(1, 2, 7, 3)], [], {"is_causal": True}),
    "rank_2": lambda: ([rand(7, 3), rand(5, 3), rand(5, 3)], [], {}),
    "rank_3": lambda: ([rand(2, 7, 3), rand(2, 5, 3), rand(2, 5, 3)], [keep(7, 5)], {}),
    "rank_5": lambda: ([rand(2, 1, 2, 4, 3), rand(2, 1, 2, 5, 3), rand(2, 1, 2, 5, 3)], [], {}),
    "bool_mask": lambda: ([rand(2, 2, 7, 3), rand(2, 2, 5, 3), rand(2, 2, 5, 3)], [keep(2, 1, 7, 5)], {}),
    "padding": lambda: ([rand(2, 2, 7, 3), rand(2, 2, 5, 3), rand(2, 2, 5, 3)], [torch.rand(2, 1, 1, 5) > 0.3], {}),
    "float_mask": lambda: ([rand(2, 2, 7, 3), rand(2, 2, 5, 3), rand(2, 2, 5, 3)], [rand(7, 5)], {}),
    "mask_with_gradient": lambda: ([rand(1, 2, 7, 3), rand(1, 2, 5, 3), rand(1, 2, 5, 3), rand(2, 7, 5)], [], {}),
    "grouped_queries": lambda: ([rand(1, 4, 7, 3), rand(1, 2, 5, 3), rand(1, 2, 5, 3)], [], {"enable_gqa": True}),
}


def make(case):
    variables, constants, options = CASES[case]()
    return variables, lambda *xs: F.scaled_dot_product_attention(*xs, *constants, **options)


def loss_of(f):
    return lambda *xs: f(*xs).sin().sum()


def all_of(f, n):
    return grad(f, argnums=tuple(range(n)))


def plain_gradients(f, variables, directions=()):
    """The gradient of f, differentiated along each direction in turn, by double backward."""
    xs = [x.clone().requires_grad_() for x in variables]
    with sdpa_kernel(SDPBackend.MATH):
        gradients = torch.autograd.grad(f(*xs), xs, create_graph=True)
        for direction in directions:
            along = sum((g * v).sum() for g, v in zip(gradients, direction, strict=True))
            gradients = torch.autograd.grad(along, xs, create_graph=True)
    return tuple(g.detach() for g in gradients)


def directions(variables, n):
    return [tuple(rand(*x.shape) for x in variables) for _ in range(n)]


@pytest.mark.parametrize("case", CASES)
def test_forward_mode(case, length):
    variables, f = make(case)
    (v,) = directions(variables, 1)
    output, tangent = jvp(f, tuple(variables), v)
    torch.testing.assert_close(output, f(*variables))
    torch.testing.assert_close(tangent, finite_difference_jvp(f, variables, v), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_each_order(case, length):
    variables, f = make(case)
    f, n = loss_of(f), len(variables)
    u, v = directions(variables, 2)
    gradient = all_of(f, n)
    torch.testing.assert_close(gradient(*variables), plain_gradients(f, variables))
    second = plain_gradients(f, variables, [v])
    hvp = lambda *xs: jvp(gradient, xs, v)[1]
    torch.testing.assert_close(hvp(*variables), second)
    along = lambda *xs: sum((g * d).sum() for g, d in zip(gradient(*xs), v, strict=True))
    torch.testing.assert_close(all_of(along, n)(*variables), second)
    torch.testing.assert_close(all_of(lambda *xs: jvp(f, xs, v)[1], n)(*variables), second)
    torch.testing.assert_close(jvp(hvp, tuple(variables), u)[1], plain_gradients(f, variables, [v, u]))


@pytest.mark.parametrize("case", ["plain", "causal", "bool_mask", "padding", "mask_with_gradient"])
def test_examples(case, length):
    """vmap around and within the derivatives, some arguments being the same for all examples."""
    variables, f = make(case)
    f, n = loss_of(f), len(variables)
    batches = [rand(3, *x.shape) for x in variables]
    v = directions(batches, 1)[0]
    for batched in [(True,) * n, (True, *(False,) * (n - 1)), (False, *(True,) * (n - 1))]:
        choose = lambda xs, i, batched=batched: [x[i if b else 0] for x, b in zip(xs, batched, strict=True)]
        given = [x if b else x[0] for x, b in zip(batches, batched, strict=True)]
        ways = [x if b else x[0] for x, b in zip(v, batched, strict=True)]
        dims = tuple(0 if b else None for b in batched)
        expected = [plain_gradients(f, choose(batches, i)) for i in range(3)]
        expected = tuple(torch.stack(column) for column in zip(*expected, strict=True))
        torch.testing.assert_close(vmap(all_of(f, n), dims)(*given), expected)
        shared = tuple(e if b else e.sum(0) for e, b in zip(expected, batched, strict=True))
        torch.testing.assert_close(all_of(lambda *xs, dims=dims: vmap(f, dims)(*xs).sum(), n)(*given), shared)
        hvp = vmap(lambda *xs: jvp(all_of(f, n), xs[:n], xs[n:])[1], dims * 2)(*given, *ways)
        expected = [plain_gradients(f, choose(batches, i), [choose(v, i)]) for i in range(3)]
        torch.testing.assert_close(hvp, tuple(torch.stack(column) for column in zip(*expected, strict=True)))


def test_jacobians(length):
    (q, k, v), f = make("causal")
    g = lambda q: f(q, k, v)[0, 0, 4]
    expected = torch.autograd.functional.jacobian(g, q)
    torch.testing.assert_close(jacrev(g)(q), expected)
    torch.testing.assert_close(jacfwd(g)(q), expected)
    loss = lambda k: loss_of(f)(q, k, v)
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.autograd.functional.hessian(loss, k)
    torch.testing.assert_close(hessian(loss)(k), expected)
    torch.testing.assert_close(jacrev(jacrev(loss))(k), expected)


def test_captured_tensors(length):
    """Plain autograd around: it differentiates what a transform returns."""
    (q, k, v), f = make("plain")
    k.requires_grad_()
    gradient = grad(lambda q: loss_of(f)(q, k, v))(q)
    (mixed,) = torch.autograd.grad((gradient * q).sum(), k)
    _, expected = plain_gradients(lambda q, k: loss_of(f)(q, k, v), [q, k.detach()], [(q, 0 * k)])
    torch.testing.assert_close(mixed, expected)


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
def test_cotangents_with_derivatives(length, backend):
    """A backward pass of the fused kernel that somebody differentiates later."""
    (q, k, v), f = make("causal")
    g, w = rand(*q.shape), rand(*q.shape)
    with sdpa_kernel(backend):
        pull = vjp(f, q, k, v)[1]
        total = lambda g: sum(x.sin().sum() for x in pull(g))
        expected = grad(lambda g: sum(x.sin().sum() for x in vjp(f, q, k, v)[1](g)))(g)
        torch.testing.assert_close(jvp(pull, (g,), (w,))[1], pull(w))
        along = jvp(total, (g,), (w,))[1]
        torch.testing.assert_close(along, (expected * w).sum())
        torch.testing.assert_close(grad(total)(g), expected)
        torch.testing.assert_close(vmap(grad(total))(torch.stack([w, g]))[1], expected)
        plain = g.clone().requires_grad_()
        total(plain).backward()
    torch.testing.assert_close(plain.grad, expected)
    torch.testing.assert_close(finite_difference_jvp(total, (g,), (w,)), along, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("order", ["grad", "vmap_grad", "grad_vmap"])
def test_the_fused_kernel_serves_one_gradient(order):
    (q, k, v), f = make("causal")
    q, f = rand(3, *q.shape), loss_of(f)
    run = {
        "grad": lambda: grad(f)(q[0], k, v),
        "vmap_grad": lambda: vmap(grad(f), (0, None, None))(q, k, v),
        "grad_vmap": lambda: grad(lambda q: vmap(f, (0, None, None))(q, k, v).sum())(q),
    }[order]
    assert {FLASH, FLASH + "_backward"} <= called(run)
    assert "_safe_softmax" not in called(run)


def test_where_the_fused_kernel_does_not_serve():
    (q, k, v), f = make("causal")
    loss = lambda q: loss_of(f)(q, k, v)
    along = lambda q: jvp(loss, (q,), (q,))[1]
    for run in (along, grad(along), grad(lambda q: grad(loss)(q).sum())):
        assert FLASH not in called(lambda run=run: run(q))
    k.requires_grad_()
    assert FLASH not in called(lambda: grad(loss)(q))


def called(run):
    with torch.profiler.profile() as profile:
        run()
    return {event.name.removeprefix("aten::") for event in profile.events()}


@pytest.mark.parametrize("kernel", [FLASH, "_scaled_dot_product_fused_attention_overrideable"])
def test_kernels_called_directly(kernel):
    """Only one of them runs on this machine; of the other the shapes are right."""
    (q, k, v), _ = make("causal")
    if kernel != FLASH:
        q, k, v = (torch.empty(1, 2, 8, 16, device="meta", dtype=torch.float16) for _ in range(3))
    direct = lambda q, k, v: getattr(aten, kernel)(q, k, v, is_causal=True)[0]
    f = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    tangents = tuple(torch.ones_like(x) for x in (q, k, v))
    second = lambda f: all_of(lambda *xs: sum(g.sum() for g in all_of(loss_of(f), 3)(*xs)), 3)(q, k, v)
    for actual, expected in [
        (jvp(direct, (q, k, v), tangents), jvp(f, (q, k, v), tangents)),
        (second(direct), second(f)),
    ]:
        torch.testing.assert_close(actual, expected)


def test_kernels_with_dropout_called_directly():
    q = torch.empty(1, 2, 8, 16, device="meta", dtype=torch.float16)
    f = lambda q: aten._scaled_dot_product_flash_attention(q, q, q, 0.5)[0]
    with pytest.raises(NotImplementedError, match="forward AD.*_scaled_dot_product_flash_attention"):
        jvp(f, (q,), (q,))


def test_dropout(chunks):
    """The pass that computes chunks again draws the same numbers."""
    q, k, v = rand(1, 2, 7, 3), rand(1, 2, 5, 3), torch.eye(5, dtype=torch.float64).expand(1, 2, 5, 5)
    f = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    output, pull = vjp(f, q, k, v)
    assert 0 < output.eq(0).double().mean() < 1  # the weights themselves, some dropped
    (by_v,) = pull(torch.ones_like(output))[2:]
    torch.testing.assert_close(by_v[..., 0], output.sum(-2))
    weights = F.softmax(q @ k.mT / 3**0.5, -1) * 2
    torch.testing.assert_close(output, torch.where(output == 0, 0.0, weights))
    for randomness in ("same", "different"):
        pulled = vmap(grad(lambda v: f(q, k, v).sum()), randomness=randomness)(v.expand(2, *v.shape))
        assert pulled[0].equal(pulled[1]) == (randomness == "same")
    with pytest.raises(RuntimeError, match="randomness='error'"):
        vmap(lambda q: f(q, k, v))(q.expand(2, *q.shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, length):
    (q, k, v), f = make("causal")
    given = [x.to(dtype) for x in (q, k, v)]
    w = directions([q, k, v], 1)[0]
    output, tangent = jvp(f, tuple(given), tuple(x.to(dtype) for x in w))
    expected = jvp(f, (q, k, v), w)
    assert output.dtype == tangent.dtype == dtype
    torch.testing.assert_close((output.double(), tangent.double()), expected, atol=0.05, rtol=0.05)


def test_errors_are_pytorchs(chunks):
    (q, k, v), _ = make("causal")
    both = lambda q: F.scaled_dot_product_attention(q, k, v, keep(7, 7), is_causal=True)
    with pytest.raises(RuntimeError, match="attn_mask should not be set when is_causal=True"):
        jvp(both, (q,), (q,))


def test_empty(length):
    for t, s in itertools.product((0, 5), repeat=2):
        q, k = rand(1, 2, t, 3), rand(1, 2, s, 3)
        f = lambda q, k=k: F.scaled_dot_product_attention(q, k, k)
        assert jvp(f, (q,), (q,))[1].shape == q.shape
        assert jvp(grad(lambda q, f=f: f(q).sum()), (q,), (q,))[1].shape == q.shape


def test_tracing(length):
    (q, k, v), f = make("causal")
    hvp = lambda q: jvp(grad(lambda q: loss_of(f)(q, k, v)), (q,), (v,))[1]
    torch.testing.assert_close(make_fx(hvp)(rand(*q.shape))(q), hvp(q))


LONG = {
    "jvp": lambda f, x, v: jvp(f, (x,), (v,)),
    "hvp": lambda f, x, v: jvp(grad(f), (x,), (v,)),
    "double_backward": lambda f, x, v: grad(lambda x: (grad(f)(x) * v).sum())(x),
    "jvp_of_vmap": lambda f, x, v: jvp(vmap(f), (x[None],), (v[None],)),
    "vmap_of_hvp": lambda f, x, v: vmap(lambda x, v: jvp(grad(f), (x,), (v,)))(x[None], v[None]),
}


@pytest.mark.parametrize("transform", LONG)
@pytest.mark.parametrize("is_causal", [True, False])
def test_memory_is_linear_in_the_length(transform, is_causal):
    """Twice the length takes twice the memory. All scores would take four times as much."""
    _C.set_attention_limits(2**12, 64)
    try:
        peaks = []
        for t in (512, 1024, 2048):
            x, v = (torch.rand(1, 1, t, 8) for _ in range(2))
            f = lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=is_causal).sum()
            peaks.append(peak_bytes(lambda f=f, x=x, v=v: LONG[transform](f, x, v)))
        assert peaks[2] < 2.2 * peaks[1] < 2.2**2 * peaks[0]
        assert peaks[2] < 2048**2 * 4
    finally:
        _C.set_attention_limits(2**21, 64)
