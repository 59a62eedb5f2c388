"""Attention and transformers: vmap against a loop over examples, derivatives against torch.autograd."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import functorch_lite
from functorch_lite import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

from .support.oracles import finite_difference_jvp, loop_vmap

aten = torch.ops.aten
B, N, T, E = 3, 2, 4, 6


@pytest.fixture(autouse=True)
def no_loops():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", functorch_lite.LoopFallbackWarning)
        warnings.filterwarnings("ignore", message="enable_nested_tensor is True|Support for mismatched|Converting mask")
        yield


def rand(*shape):
    return torch.rand(*shape, dtype=torch.float64) * 2 - 1


def leaves(result):
    return torch.utils._pytree.tree_leaves(result)


def check(f, args, choices=None):
    """vmap(f) is the loop's result, for every choice of batched arguments and places of the batch."""
    choices = choices or [c for c in itertools.product((True, False), repeat=len(args)) if any(c)]
    for k, choice in enumerate(choices):
        # args hold examples of a batch in front; the batch moves through all places as the choices pass.
        place = lambda x, k=k: k % x.dim()
        given = [x.movedim(0, place(x)) if batched else x[0] for x, batched in zip(args, choice, strict=True)]
        in_dims = tuple(place(x) if batched else None for x, batched in zip(args, choice, strict=True))
        actual = leaves(vmap(f, in_dims)(*given))
        for a, e in zip(actual, loop_vmap(lambda *xs: leaves(f(*xs)), in_dims, given), strict=True):
            torch.testing.assert_close(a, e)


def check_gradients(f, args, count):
    """vmap(grad), grad(vmap) and vmap(jvp) with respect to the first arguments."""
    total = lambda *xs: sum(y.sin().sum() for y in leaves(f(*xs)))
    argnums = tuple(range(count))
    expected = []
    for i in range(len(args[0])):
        variables = [x[i].clone().requires_grad_() for x in args[:count]]
        expected.append(torch.autograd.grad(total(*variables, *[x[i] for x in args[count:]]), variables))
    expected = [torch.stack(column) for column in zip(*expected, strict=True)]
    torch.testing.assert_close(list(vmap(grad(total, argnums=argnums))(*args)), expected)
    around = grad(lambda *xs: vmap(total)(*xs).sum(), argnums=argnums)
    torch.testing.assert_close(list(around(*args)), expected)
    tangents = [torch.ones_like(x) for x in args[:count]]
    push = lambda *xs: jvp(lambda *v: total(*v, *xs[count:]), xs[:count], tuple(t[0] for t in tangents))[1]
    torch.testing.assert_close(vmap(push)(*args), sum(g.flatten(1).sum(1) for g in expected))


class Calls(TorchDispatchMode):
    """Counts the kernels that run outside all levels."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


# scaled_dot_product_attention.


def masks(kind, *lead):
    shape = (B, *lead, 4, 5)
    keep = torch.rand(shape) > 0.4
    keep[..., 2, :] = False  # a row of which everything is masked
    return keep if kind == "bool" else torch.where(keep, rand(*shape), -torch.inf)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("lead", [(), (2,), (2, 2), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("mode", ["plain", "causal", "scale"])
def test_attention(mode, lead, fused):
    options = {"is_causal": mode == "causal", "scale": 0.3 if mode == "scale" else None}
    qkv = rand(B, *lead, 4, 3), rand(B, *lead, 5, 3), rand(B, *lead, 5, 2)
    f = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH] if fused else SDPBackend.MATH):
        check(f, qkv)
        if len(lead) < 3:
            check_gradients(f, qkv, 3)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize(
    ("lead", "mask_lead"),
    [
        ((), ()),
        ((2,), ()),
        ((2,), (2,)),
        ((2, 2), ()),
        ((2, 2), (2,)),
        ((2, 2), (1, 1)),
        ((2, 2), (2, 1)),
        ((2, 2), (2, 2)),
    ],
    ids=str,
)
def test_masks(kind, lead, mask_lead):
    args = rand(B, *lead, 4, 3), rand(B, *lead, 5, 3), rand(B, *lead, 5, 3), masks(kind, *mask_lead)
    f = lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m)
    check(f, args, [(True,) * 4, (True, True, True, False), (False, False, False, True), (True, False, False, True)])
    check_gradients(f, args, 3)


def test_padding_masks():
    """Masks of one row for all queries."""
    mask = torch.tensor([[True, True, False, True, False], [False] * 5, [True] * 5])[:, None, None, None, :]
    args = rand(B, 2, 2, 4, 3), rand(B, 2, 2, 5, 3), rand(B, 2, 2, 5, 3), mask
    check(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), args)


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_rows_that_are_masked_are_zero(backend, kind):
    args = rand(B, 1, 2, 4, 3), rand(B, 1, 2, 5, 3), rand(B, 1, 2, 5, 3), masks(kind)
    f = lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m)
    with sdpa_kernel(backend):
        assert vmap(f)(*args)[..., 2, :].eq(0).all()
        check(f, args)
        gradients = vmap(grad(lambda *xs: f(*xs).sum(), argnums=(0, 1, 2)))(*args)
    assert all(g.isfinite().all() for g in gradients)


def test_a_backend_that_the_machine_does_not_have():
    q = rand(B, 1, 2, 4, 3)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), pytest.raises(RuntimeError, match="No viable backend"):
        vmap(lambda q: F.scaled_dot_product_attention(q, q, q))(q)


def test_grouped_queries():
    args = rand(B, 1, 4, 4, 3), rand(B, 1, 2, 5, 3), rand(B, 1, 2, 5, 3)
    f = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    check(f, args)
    check_gradients(f, args, 3)


def test_arguments_that_broadcast():
    f = F.scaled_dot_product_attention
    check(f, (rand(B, 3, 2, 4, 3), rand(B, 1, 2, 5, 3), rand(B, 1, 2, 5, 3)))
    check(f, (rand(B, 2, 4, 3), rand(B, 5, 3), rand(B, 5, 3)))


@pytest.mark.parametrize("size", [0, 1])
def test_small_batches(size):
    q, mask = rand(size, 2, 2, 4, 3), torch.ones(size, 4, 4).bool()
    f = lambda q, m: F.scaled_dot_product_attention(q, q, q, m)
    assert vmap(f)(q, mask).shape == q.shape
    assert vmap(f, (0, None))(q, torch.ones(4, 4).bool()).shape == q.shape
    assert vmap(grad(lambda q: f(q, None).sum()))(q).shape == q.shape


def test_nested_vmap():
    q, k = rand(B, 2, N, 2, 4, 3), rand(2, N, 2, 5, 3)
    f = lambda q, k: F.scaled_dot_product_attention(q, k, k.sin())
    expected = torch.stack([torch.stack([f(q[i, j], k[j]) for j in range(2)]) for i in range(B)])
    torch.testing.assert_close(vmap(vmap(f), (0, None))(q, k), expected)
    torch.testing.assert_close(vmap(vmap(f, (0, None)), (1, 0), out_dims=1)(q, k), expected)


def test_second_derivatives():
    q, k = rand(2, 1, 2, 3), rand(2, 1, 3, 3)
    f = lambda q, k: F.scaled_dot_product_attention(q, k, k).sin().sum()
    expected = [torch.autograd.functional.hessian(lambda q, k=k: f(q, k), q) for q, k in zip(q, k, strict=True)]
    torch.testing.assert_close(vmap(hessian(f))(q, k), torch.stack(expected))


def test_examples_share_one_call_of_the_fused_kernel():
    q = rand(B, N, 2, 4, 3)
    f = lambda q: F.scaled_dot_product_attention(q, q, q)
    with Calls() as calls:
        vmap(f)(q)
    assert calls.names.count("_scaled_dot_product_flash_attention_for_cpu") == 1
    with Calls() as calls:
        vmap(grad(lambda q: f(q).sum()))(q)
    assert calls.names.count("_scaled_dot_product_flash_attention_for_cpu") == 1
    assert calls.names.count("_scaled_dot_product_flash_attention_for_cpu_backward") == 1
    with Calls() as calls:
        vmap(f)(q.clone().requires_grad_())
    assert "_scaled_dot_product_flash_attention_for_cpu" not in calls.names


def test_dropout():
    q = rand(1, 2, 30, 3).expand(B, 1, 2, 30, 3)
    f = lambda q: F.scaled_dot_product_attention(q, q, torch.ones_like(q), dropout_p=0.5)
    run = lambda f, randomness: vmap(f, randomness=randomness)(q)
    for g in (f, grad(lambda q: f(q).sin().sum())):
        different, same = run(g, "different"), run(g, "same")
        assert not different[0].equal(different[1])
        torch.testing.assert_close(same[0], same[1])
        with pytest.raises(RuntimeError, match="random operator aten::scaled_dot_product_attention"):
            run(f, "error")
    kept = run(f, "different")  # weights that sum to one, of which half are dropped and the others doubled
    assert (kept.mean((1, 2, 3, 4)) - 1).abs().max() < 0.2
    inner = vmap(lambda b: f(q[0]) + 0 * b, randomness="different")(torch.zeros(B, 1, 1, 1, 1))
    assert not inner[0].equal(inner[1])


def test_nothing_batched_stays_unbatched():
    q = rand(1, 2, 4, 3)
    result = vmap(lambda b: (F.scaled_dot_product_attention(q, q, q), b), out_dims=(None, 0))(torch.zeros(B))[0]
    torch.testing.assert_close(result, F.scaled_dot_product_attention(q, q, q))
    kernel = aten._scaled_dot_product_flash_attention_for_cpu
    torch.testing.assert_close(vmap(lambda b: (kernel(q, q, q)[0], b), out_dims=(None, 0))(torch.zeros(B))[0], result)


# Kernels called directly.


@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_cpu_kernel(mask):
    qkv = rand(B, N, 2, 4, 3), rand(B, N, 2, 5, 3), rand(B, N, 2, 5, 3)
    m = None if mask is None else torch.where(masks("bool", N, 1), 0.0, -torch.inf).double()
    if mask == "float":
        m = rand(B, 4, 5)

    def forward(q, k, v, *m):
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=m[0] if m else None)

    def backward(g, q, k, v, *m):
        y, lse = forward(q, k, v, *m)
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, q, k, v, y, lse, 0.0, False, attn_mask=m[0] if m else None
        )

    args = (*qkv, *([] if m is None else [m]))
    check(forward, args)
    check(backward, (rand(B, N, 2, 4, 3), *args))
    assert vmap(forward)(*[x[:0] for x in args])[0].shape == (0, N, 2, 4, 3)


def test_math_called_directly():
    args = rand(B, N, 2, 4, 3), rand(B, N, 2, 5, 3), rand(B, N, 2, 5, 3), masks("bool", N, 2)
    check(lambda q, k, v, m: aten._scaled_dot_product_attention_math(q, k, v, m), args)


def kernels():
    q, k, scores = (N, 2, 8, 16), (N, 2, 8, 16), (N, 2, 8, 8)
    yield "_scaled_dot_product_flash_attention", [q, k, k], (0.0, False, False)
    yield "_scaled_dot_product_efficient_attention", [q, k, k, scores], (True,)
    yield "_scaled_dot_product_cudnn_attention", [q, k, k, scores], (True,)
    yield "_scaled_dot_product_fused_attention_overrideable", [q, k, k, scores], ()


@pytest.mark.parametrize(("name", "shapes", "more"), kernels(), ids=lambda x: x if isinstance(x, str) else "")
def test_kernels_of_other_devices(name, shapes, more):
    """There is no such device here: the shapes are those that one example has, with the batch in front."""
    op = getattr(aten, name)
    example = [torch.empty(shape, device="meta", dtype=torch.float16) for shape in shapes]
    one = op(*example, *more)
    for batched in ((True,) * len(shapes), (True,) + (False,) * (len(shapes) - 1)):
        args = [x.expand(B, *x.shape).clone() if b else x for x, b in zip(example, batched, strict=True)]
        call = lambda *xs: op(*xs, *more)[:2]
        result = vmap(call, tuple(0 if b else None for b in batched))(*args)
        assert [y.shape for y in result] == [(B, *y.shape) for y in one[:2]]


def test_gradients_of_other_devices():
    half = lambda *shape: torch.empty(shape, device="meta", dtype=torch.float16)
    x, lse, seed = half(N, 2, 8, 16), torch.empty(N, 2, 8, device="meta"), torch.empty((), device="meta").long()
    none = torch.empty(0, device="meta").int()
    flash = lambda g, *xs: aten._scaled_dot_product_flash_attention_backward(
        g, *xs, lse, none, none, 8, 8, 0.0, False, seed, seed
    )
    efficient = lambda g, *xs: aten._scaled_dot_product_efficient_attention_backward(
        g, *xs[:3], half(N, 2, 8, 8), xs[3], lse, seed, seed, 0.0, [True] * 4
    )
    for f in (flash, efficient):
        one = f(x, x, x, x, x)
        for k in range(5):
            args = [x.expand(B, *x.shape).clone() if i == k else x for i in range(5)]
            result = vmap(f, tuple(0 if i == k else None for i in range(5)))(*args)
            assert [y.shape for y in result] == [(B, *y.shape) for y in one]


def test_kernels_refuse():
    q = torch.empty(B, N, 2, 8, 16, device="meta", dtype=torch.float16)
    flash = lambda q, p: aten._scaled_dot_product_flash_attention(q, q, q, p)[0]
    with pytest.raises(RuntimeError, match="random operator aten::_scaled_dot_product_flash_attention"):
        vmap(lambda q: flash(q, 0.5))(q)
    with pytest.raises(NotImplementedError, match="vmap: aten::_scaled_dot_product_flash.*randomness='different'"):
        vmap(lambda q: flash(q, 0.5), randomness="same")(q)
    assert vmap(lambda q: flash(q, 0.5), randomness="different")(q).shape == q.shape
    rows = torch.empty(B, 16, 2, 16, device="meta", dtype=torch.float16)
    lengths = torch.tensor([0, 8, 16], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="vmap: aten::_flash_attention_forward.*Give padded sequences"):
        vmap(lambda q: aten._flash_attention_forward(q, q, q, lengths, lengths, 8, 8, 0.0, False, False)[0])(rows)


def test_transform_bias_rescale_qkv():
    f = lambda x, b: aten._transform_bias_rescale_qkv(x, b, 2)
    x, bias = rand(B, N, T, 3 * E), rand(B, 3 * E)
    check(f, (x, bias))
    torch.testing.assert_close(
        jvp(f, (x[0], bias[0]), (x[1], bias[1]))[1],
        tuple(finite_difference_jvp(lambda *a, k=k: f(*a)[k], (x[0], bias[0]), (x[1], bias[1])) for k in range(3)),
    )


# Modules.

PADDING = torch.tensor(
    [[[0, 0, 0, 1], [0, 0, 0, 0]], [[0, 0, 1, 1], [0, 1, 0, 0]], [[1, 0, 0, 0], [0, 0, 1, 0]]]
).bool()
CAUSAL = torch.ones(T, T).triu(1).bool()


def compare_module(models, call, args, places, gradients=True):
    """vmap of call(model, *args) over weights and arguments, with and without PyTorch's fast path, and its gradients.

    places: for the weights and each argument, whether they are batched.
    """
    stacked, _ = stack_module_state(models)
    stacked = {name: p.detach() for name, p in stacked.items()}
    weights_batched, *args_batched = places
    params = stacked if weights_batched else {name: p[0] for name, p in stacked.items()}
    given = [x if b else x[0] for x, b in zip(args, args_batched, strict=True)]
    in_dims = tuple(0 if b else None for b in places)
    run = lambda p, *xs: call(lambda *a, **k: functional_call(models[0], p, a, k), *xs)
    example = lambda i: [
        models[i if weights_batched else 0],
        *[x[i if b else 0] for x, b in zip(args, args_batched, strict=True)],
    ]
    for fast in (True, False):
        with torch.set_grad_enabled(not fast):
            expected = [leaves(call(*example(i))) for i in range(B)]
            actual = leaves(vmap(run, in_dims)(params, *given))
            torch.testing.assert_close(actual, [torch.stack(column) for column in zip(*expected, strict=True)])
    if not gradients:
        return
    ours = vmap(grad(lambda p, *xs: sum(y.sin().sum() for y in leaves(run(p, *xs)))), in_dims)(params, *given)
    for i in range(B):
        model, *xs = example(i)
        names, variables = zip(*model.named_parameters(), strict=True)
        total = sum(y.sin().sum() for y in leaves(call(model, *xs)))
        theirs = torch.autograd.grad(total, variables, allow_unused=True, materialize_grads=True)
        for name, g in zip(names, theirs, strict=True):
            torch.testing.assert_close(ours[name][i], g)


WEIGHTS_AND_INPUT = [(False, True), (True, False), (True, True)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("need", ["averaged", "each", "none"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": True},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"kdim": 3, "vdim": 5},
        {"bias": False},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_multi_head_attention(options, need, training):
    models = [nn.MultiheadAttention(E, 2, **options).double().train(training) for _ in range(B)]
    flags = {"need_weights": need != "none", "average_attn_weights": need == "averaged"}
    call = lambda m, q, k, v: [y for y in m(q, k, v, **flags) if y is not None]
    args = rand(B, N, T, E), rand(B, N, T, models[0].kdim), rand(B, N, T, models[0].vdim)
    for places in [(False, True, True, True), (False, True, False, False), (True, False, False, False), (True,) * 4]:
        compare_module(models, call, args, places, gradients=need == "averaged" and places[0])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masks_batched", [True, False])
def test_multi_head_attention_masks(masks_batched, training):
    models = [nn.MultiheadAttention(E, 2, batch_first=True).double().train(training) for _ in range(B)]
    scores = rand(B, T, T)
    for weights, x in WEIGHTS_AND_INPUT:
        padded = lambda m, x, p: m(x, x, x, key_padding_mask=p)[0]
        compare_module(models, padded, (rand(B, N, T, E), PADDING), (weights, x, masks_batched))
        added = lambda m, x, a: m(x, x, x, attn_mask=a, need_weights=False)[0]
        compare_module(models, added, (rand(B, N, T, E), scores), (weights, x, masks_batched), gradients=False)
    unbatched = lambda m, x: m(x, x, x, attn_mask=CAUSAL, is_causal=True, need_weights=False)[0]
    compare_module(models, unbatched, (rand(B, T, E),), (False, True))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_encoder_layer(activation, norm_first, training):
    options = {"activation": activation, "norm_first": norm_first, "batch_first": True, "dropout": 0.0}
    models = [nn.TransformerEncoderLayer(E, 2, 5, **options).double().train(training) for _ in range(B)]
    x, scores = rand(B, N, T, E), torch.rand(B, T, T) > 0.6
    scores[..., 0] = False  # a key that everybody sees
    for weights, batched in WEIGHTS_AND_INPUT:
        compare_module(models, lambda m, x: m(x), (x,), (weights, batched))
        compare_module(
            models, lambda m, x, p: m(x, src_key_padding_mask=p), (x, PADDING), (weights, batched, True), False
        )
        compare_module(models, lambda m, x, a: m(x, src_mask=a), (x, scores), (weights, batched, False), False)
    compare_module(models, lambda m, x: m(x), (x[:, 0],), (False, True))


@pytest.mark.parametrize("training", [True, False])
def test_encoder_and_decoder(training):
    layer = nn.TransformerEncoderLayer(E, 2, 5, dropout=0.0, batch_first=True)
    encoders = [nn.TransformerEncoder(layer, 2, enable_nested_tensor=False) for _ in range(B)]
    layer = nn.TransformerDecoderLayer(E, 2, 5, dropout=0.0, batch_first=True)
    decoders = [nn.TransformerDecoder(layer, 2) for _ in range(B)]
    for model in (*encoders, *decoders):
        model.double().train(training)
        for p in model.parameters():
            nn.init.uniform_(p, -1, 1)
    x, memory = rand(B, N, T, E), rand(B, N, 3, E)
    for weights, batched in WEIGHTS_AND_INPUT:
        compare_module(encoders, lambda m, x, p: m(x, src_key_padding_mask=p), (x, PADDING), (weights, batched, True))
        causal = lambda m, x: m(x, mask=CAUSAL, is_causal=True)
        compare_module(encoders, causal, (x,), (weights, batched), gradients=False)
        compare_module(decoders, lambda m, x, y: m(x, y), (x, memory), (weights, batched, True))
    masked = lambda m, x, a, p: m(x, x, tgt_mask=a, tgt_is_causal=False, memory_key_padding_mask=p)
    compare_module(decoders, masked, (x, rand(B, T, T), PADDING), (False, True, True, True))


def encoder(**options):
    layer = nn.TransformerEncoderLayer(E, 2, 5, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, **options).double().eval()


def test_encoder_with_nested_tensors():
    """It makes a nested tensor of its input if the padding is at the end of every row and nothing is differentiated."""
    models = [encoder() for _ in range(B)]
    x, call = rand(B, N, T, E), lambda m, x, p: m(x, src_key_padding_mask=p)
    middle = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 0]]).bool().expand(B, N, T)
    compare_module(models, call, (x, middle), (False, True, False))
    compare_module(models, call, (x, middle), (False, True, True))
    compare_module(models, call, (x, middle), (True, False, False))
    message = r"vmap: .*_nested_tensor_from_mask .*enable_nested_tensor=False"
    with torch.no_grad(), pytest.raises(NotImplementedError, match=message):
        vmap(lambda x, p: models[0](x, src_key_padding_mask=p))(x, PADDING)
    params, _ = stack_module_state(models)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="got a nested tensor.*enable_nested_tensor=False"):
        vmap(lambda p: functional_call(models[0], p, (x[0],), {"src_key_padding_mask": PADDING[0]}))(params)


def test_encoder_asks_whether_a_mask_is_causal():
    model, x, scores = encoder(), rand(B, N, T, E), torch.rand(B, T, T) > 0.6
    scores[..., 0] = False
    compare_module([model] * B, lambda m, x, a: m(x, mask=a), (x, scores), (False, True, True))
    scores[0] = torch.ones(T, T).triu(1).bool()
    with pytest.raises(NotImplementedError, match="It turns tensor values into Python values"):
        vmap(lambda x, a: model(x, mask=a))(x, scores)
    compare_module([model] * B, lambda m, x, a: m(x, mask=a, is_causal=False), (x, scores), (False, True, True))


@pytest.mark.parametrize("training", [True, False])
def test_dropout_in_a_layer(training):
    layer = nn.TransformerEncoderLayer(E, 2, 5, dropout=0.5, batch_first=True).double().train(training)
    x = rand(N, T, E).expand(B, N, T, E)
    different, same = (vmap(layer, randomness=randomness)(x) for randomness in ("different", "same"))
    assert different[0].equal(different[1]) != training
    torch.testing.assert_close(same[0], same[1])
    if training:
        with pytest.raises(RuntimeError, match="randomness='error'"):
            vmap(layer)(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padding", [None, PADDING[1]], ids=["none", "padding"])
def test_forward_mode(padding, training):
    """Also without grad mode, where a layer in evaluation takes its fast path."""
    layer = nn.TransformerEncoderLayer(E, 2, 5, dropout=0.0, batch_first=True).double().train(training)
    attention = nn.MultiheadAttention(E, 2, batch_first=True).double().train(training)
    x, v = rand(N, T, E), rand(N, T, E)
    for f in (
        lambda x: layer(x, src_key_padding_mask=padding),
        lambda x: attention(x, x, x, key_padding_mask=padding)[0],
        lambda x: attention(x, x, x, key_padding_mask=padding)[1],
    ):
        for grad_mode in (True, False):
            with torch.set_grad_enabled(grad_mode):
                torch.testing.assert_close(
                    jvp(f, (x,), (v,))[1], finite_difference_jvp(f, (x,), (v,)), atol=1e-7, rtol=1e-6
                )


def test_jacobians_of_an_ensemble():
    models = [nn.TransformerEncoderLayer(2, 1, 3, dropout=0.0, batch_first=True).double() for _ in range(2)]
    params, _ = stack_module_state(models)
    params, x = {name: p.detach() for name, p in params.items()}, rand(1, 2, 2)
    member = lambda p: functional_call(models[0], p, (x,)).sum(1)[0]
    reverse, forward = vmap(jacrev(member))(params), vmap(jacfwd(member))(params)
    for i in range(2):
        names, values = zip(*[(name, p[i]) for name, p in params.items()], strict=True)
        by_values = lambda *values, names=names: member(dict(zip(names, values, strict=True)))
        for name, expected in zip(names, torch.autograd.functional.jacobian(by_values, values), strict=True):
            torch.testing.assert_close(reverse[name][i], expected)
            torch.testing.assert_close(forward[name][i], expected)
