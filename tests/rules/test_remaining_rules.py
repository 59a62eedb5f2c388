"""Operators that the Python interface does not call by name, against a loop over the examples."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from functorch_lite import grad, jvp, vmap
from tests.support import ops
from tests.support.oracles import loop_vmap

aten = torch.ops.aten


def rand(*sizes: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(sizes, dtype=dtype, generator=torch.Generator().manual_seed(len(sizes) + sum(sizes)))


def ints(high: int, *sizes: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(high, sizes, generator=torch.Generator().manual_seed(sum(sizes))).to(dtype)


def batch(x: Tensor, dim: int, size: int = 3) -> Tensor:
    return ops.batch(x, dim, size)


def flat(f: Callable[..., object]) -> Callable[..., tuple[Tensor, ...]]:
    def function(*args: Tensor) -> tuple[Tensor, ...]:
        y = f(*args)
        return tuple(y) if isinstance(y, (tuple, list)) else (y,)

    return function


def close(actual: object, expected: list[Tensor]) -> None:
    for y, z in zip(actual, expected, strict=True):
        torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-6)


def places(args: list[Tensor], fixed: tuple[int, ...]) -> Iterator[tuple[int | None, ...]]:
    free = [i for i in range(len(args)) if i not in fixed]
    for count in range(1, len(free) + 1):
        for chosen in itertools.combinations(free, count):
            for where in ("first", "last"):
                yield tuple((0 if where == "first" else x.dim()) if i in chosen else None for i, x in enumerate(args))


def check(f: Callable[..., object], args: list[Tensor], fixed: tuple[int, ...] = (), empty: bool = True) -> None:
    """Every choice of batched arguments, two levels, one example and none."""
    f = flat(f)
    for dims in places(args, fixed):
        batched = [x if d is None else batch(x, d) for x, d in zip(args, dims, strict=True)]
        close(vmap(f, dims)(*batched), loop_vmap(f, dims, batched))
    one = [x if i in fixed else x.unsqueeze(0) for i, x in enumerate(args)]
    dims = tuple(None if i in fixed else 0 for i in range(len(args)))
    close(vmap(f, dims)(*one), loop_vmap(f, dims, one))
    twice = [x if i in fixed else batch(batch(x, 0), 0, 2) for i, x in enumerate(args)]
    close(vmap(vmap(f, dims), dims)(*twice), loop_vmap(lambda *xs: loop_vmap(f, dims, xs), dims, twice))
    if empty:
        none = [x if i in fixed else x.new_empty((0, *x.shape)) for i, x in enumerate(args)]
        for y, z in zip(vmap(f, dims)(*none), f(*args), strict=True):
            assert (y.shape, y.dtype) == ((0, *z.shape), z.dtype)


CONVOLUTIONS = {
    "_slow_conv2d_forward": (
        lambda x, w, b: aten._slow_conv2d_forward(x, w, [3, 2], b, [1, 2], [1, 0]),
        [(2, 4, 5, 4), (6, 4, 3, 2), (6,)],
    ),
    "slow_conv_dilated2d": (
        lambda x, w, b: aten.slow_conv_dilated2d(x, w, [3, 2], b, [1, 1], [1, 0], [1, 2]),
        [(4, 5, 4), (6, 4, 3, 2), (6,)],
    ),
    "slow_conv_transpose2d": (
        lambda x, w, b: aten.slow_conv_transpose2d(x, w, [3, 2], b, [2, 2], [1, 0], [1, 0], [1, 1]),
        [(2, 4, 3, 4), (4, 6, 3, 2), (6,)],
    ),
    "slow_conv3d_forward": (
        lambda x, w: aten.slow_conv3d_forward(x, w, [2, 2, 2], None, [1, 1, 1], [0, 0, 0]),
        [(1, 2, 3, 3, 3), (2, 2, 2, 2, 2)],
    ),
    "mkldnn_convolution": (
        lambda x, w, b: aten.mkldnn_convolution(x, w, b, [1, 0], [1, 2], [1, 1], 2),
        [(2, 4, 5, 4), (6, 2, 3, 2), (6,)],
    ),
    "_slow_conv2d_backward": (
        lambda g, x, w: aten._slow_conv2d_backward.output_mask(g, x, w, [3, 2], [1, 1], [0, 0], [True, True, True]),
        [(2, 6, 3, 3), (2, 4, 5, 4), (6, 4, 3, 2)],
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_of_single_backends(name):
    f, shapes = CONVOLUTIONS[name]
    check(f, [rand(*shape, dtype=torch.float32) for shape in shapes])


def test_convolutions_that_only_gpus_have():
    x, w, z = rand(2, 4, 5, 5), rand(4, 4, 3, 3), rand(2, 4, 5, 5)
    options = ([1, 1], [1, 1], [1, 1], 1)

    def fused(x, w, z):
        return aten.cudnn_convolution_add_relu(x, w, z, 0.5, None, *options)

    def plain(x, w, z):
        return (torch.conv2d(x, w, padding=1) + 0.5 * z - 0).relu()

    xs = torch.stack([x, x - 1])
    torch.testing.assert_close(vmap(fused, (0, None, None))(xs, w, z), torch.stack([plain(x, w, z) for x in xs]))
    theta = rand(2, 3, 2, 3)
    grids = vmap(lambda t: aten.cudnn_affine_grid_generator(t, 3, 1, 4, 5))(theta)
    one_by_one = [torch.nn.functional.affine_grid(t, [3, 1, 4, 5], align_corners=True) for t in theta]
    torch.testing.assert_close(grids, torch.stack(one_by_one))


def test_linear_backward():
    x, g, w = rand(2, 3, 4), rand(2, 3, 5), rand(5, 4)

    def f(x, g, w):
        return aten.linear_backward(x, g, w, [True, True, True])

    def by_autograd(x, g, w):
        x, w, b = x.requires_grad_(), w.clone().requires_grad_(), torch.zeros(5, dtype=w.dtype, requires_grad=True)
        return torch.autograd.grad(torch.nn.functional.linear(x, w, b), [x, w, b], g)

    xs, gs = batch(x, 0), batch(g, 0)
    close(vmap(f, (0, 0, None))(xs, gs, w), loop_vmap(by_autograd, (0, 0, None), [xs, gs, w]))


def test_products_with_a_result_dtype():
    check(torch._int_mm, [ints(50, 17, 8, dtype=torch.int8), ints(50, 8, 8, dtype=torch.int8)])
    a, b = rand(3, 2, 4, dtype=torch.bfloat16), rand(4, 5, dtype=torch.bfloat16)
    wide = vmap(lambda a, b: aten.mm.dtype(a, b, torch.float32), (0, None))(a, b)
    torch.testing.assert_close(wide, a.float() @ b.float())


def test_packed_weights():
    w, scales = ints(100, 8, 16, dtype=torch.int8) - 50, rand(8, dtype=torch.bfloat16)
    check(torch._weight_int8pack_mm, [rand(4, 16, dtype=torch.bfloat16), w, scales], fixed=(1, 2))
    with pytest.raises(NotImplementedError, match="A packed weight is one matrix. Map over the activations only"):
        vmap(torch._weight_int8pack_mm, (None, None, 0))(rand(4, 16, dtype=torch.bfloat16), w, scales.expand(2, 8))


def test_sparse_matrix_times_examples():
    dense = rand(3, 4).tril()
    for sparse in (dense.to_sparse(), dense.to_sparse_csr()):
        for f in (torch.mm, torch.sparse.mm, torch.matmul):
            check(lambda x, f=f, sparse=sparse: f(sparse, x), [rand(4, 2)])


PAIRS = [0.0, 1.0, 2.0, 3.0, float("inf")]


@pytest.mark.parametrize("p", PAIRS)
def test_pdist_backward(p):
    def f(x):
        return grad(lambda x: (torch.pdist(x, p) * torch.arange(1.0, 7.0)).sum())(x)

    def by_autograd(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad((torch.pdist(x, p) * torch.arange(1.0, 7.0)).sum(), x)[0]

    xs = batch(rand(4, 3), 0)
    torch.testing.assert_close(vmap(f)(xs), torch.stack([by_autograd(x) for x in xs]))


@pytest.mark.parametrize("dim", [0, 1])
def test_weight_norm_backward(dim):
    v, g = rand(3, 4), rand(3, 1) if dim == 0 else rand(1, 4)

    def f(v, g):
        return grad(lambda v, g: (torch._weight_norm_interface(v, g, dim)[0] ** 2).sum(), argnums=(0, 1))(v, g)

    def by_autograd(v, g):
        v, g = v.clone().requires_grad_(), g.clone().requires_grad_()
        return torch.autograd.grad((torch._weight_norm_interface(v, g, dim)[0] ** 2).sum(), [v, g])

    for dims in ((0, 0), (None, 0), (0, None)):
        args = [x if d is None else batch(x, d) for x, d in zip((v, g), dims, strict=True)]
        close(vmap(f, dims)(*args), loop_vmap(by_autograd, dims, args))


def test_masked_softmax():
    x = rand(2, 2, 4, 4, dtype=torch.float32)
    for mask, mask_type in ((ints(2, 4, 4), 0), (ints(2, 2, 4), 1), (ints(2, 2, 2, 4, 4), 2)):
        check(lambda x, mask, t=mask_type: torch._masked_softmax(x, mask, -1, t), [x, mask.bool()])
    y, g, mask = rand(2, 4, dtype=torch.float32).softmax(-1), rand(2, 4, dtype=torch.float32), ints(2, 2, 4).bool()
    check(lambda g, y, mask: aten._masked_softmax_backward(g, y, mask, 1), [g, y, mask])


def test_row_indices_to_starts():
    check(lambda x: torch._convert_indices_from_coo_to_csr(x.sort().values, 4, out_int32=True), [ints(4, 6)])


def test_assertions():
    def f(x):
        torch._assert_async(x.sum() > 0, "the sum is not positive")
        torch._assert_tensor_metadata(x, size=[2], dtype=torch.float64)
        return x

    xs = torch.ones(3, 2, dtype=torch.float64)
    assert torch.equal(vmap(f)(xs), xs)
    xs[1] = -1
    with pytest.raises(RuntimeError, match="the sum is not positive"):
        vmap(f)(xs)
    with pytest.raises(RuntimeError, match="sizes mismatch"):
        vmap(lambda x: torch._assert_tensor_metadata(x, size=[3, 2]))(xs)
    with pytest.raises(ValueError, match=r"expected one number, got the shape \[2\]"):
        vmap(torch._assert_async)(xs)


def test_questions_about_memory():
    x = rand(3, 2)
    answers = []
    vmap(lambda x: answers.extend([x.is_pinned(), x.is_set_to(x), x.is_set_to(x.clone())]) or x)(x)
    assert answers == [False, True, False]


FAKE = [ints(20, 3, 4, 2).double() / 7 - 1, torch.tensor([0.1, 0.2, 0.15, 0.3]), torch.tensor([0, 3, 1, 2])]


def test_fake_quantization_of_channels():
    x, scale, zero = FAKE[0].float(), FAKE[1], FAKE[2].int()
    for axis, dims in ((1, (0, 1, 2)), (0, (1, 0, 2)), (2, (0, 2, 1))):
        check(
            lambda x, s, z, axis=axis: torch.fake_quantize_per_channel_affine(x, s, z, axis, 0, 15),
            [x.permute(dims), scale, zero],
        )
        check(
            lambda x, s, z, axis=axis: torch._fake_quantize_learnable_per_channel_affine(x, s, z, axis, 0, 15, 0.5),
            [x.permute(dims), scale, zero.float()],
        )
        check(
            lambda g, x, s, z, axis=axis: aten._fake_quantize_learnable_per_channel_affine_backward(
                g, x, s, z, axis, 0, 15, 0.5
            ),
            [x.permute(dims) + 1, x.permute(dims), scale, zero.float()],
        )


def test_fake_quantization_of_tensors():
    x, scale, zero = FAKE[0].float(), FAKE[1][:1], FAKE[2][1:2].int()
    check(lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 3, 0, 15), [x])
    check(lambda x, s, z: torch.fake_quantize_per_tensor_affine(x, s, z, 0, 15), [x, scale, zero])
    check(lambda x, s, z: torch.fake_quantize_per_tensor_affine(x, s, z, 0, 15), [x[0, 0, 0], scale, zero])
    learnable = torch._fake_quantize_learnable_per_tensor_affine
    check(lambda x, s, z: learnable(x, s, z, 0, 15, 0.5), [x, scale, zero.float()])
    check(
        lambda g, x, s, z: aten._fake_quantize_learnable_per_tensor_affine_backward(g, x, s, z, 0, 15, 0.5),
        [x + 1, x, scale, zero.float()],
    )
    with_switch = aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams
    for enabled in (0, 1):
        check(
            lambda x, s, z, e: with_switch(x, s, z, e, 0, 15),
            [x, scale, zero, torch.tensor([enabled])],
        )


def test_quantized_values():
    check(lambda x: torch.quantize_per_tensor(x, 0.1, 3, torch.quint8).dequantize(), [rand(4, 2, dtype=torch.float32)])


SMALL = {
    "_add_relu": (torch._add_relu, [rand(3, 4, dtype=torch.float32) - 0.5, rand(3, 4, dtype=torch.float32) - 0.5]),
    "_aminmax": (torch._aminmax, [rand(3, 4)]),
    "_aminmax.dim": (lambda x: torch._aminmax(x, 1, keepdim=True), [rand(3, 4)]),
    "_logcumsumexp": (lambda x: aten._logcumsumexp(x, -1), [rand(3, 4)]),
    "glu_backward_jvp": (
        lambda *xs: aten.glu_backward_jvp(*xs, 1),
        [rand(3, 4), rand(3, 2), rand(3, 4), rand(3, 2), rand(3, 4)],
    ),
    "_compute_linear_combination": (torch._compute_linear_combination, [rand(2, 3, 4), rand(5, 2)]),
    "view_as_complex_copy": (torch.view_as_complex_copy, [rand(3, 2)]),
    "detach_copy": (torch.detach_copy, [rand(3, 2)]),
    "_reshape_alias_copy": (lambda x: aten._reshape_alias_copy(x, [2, 3], [3, 1]), [rand(3, 2)]),
    "_lazy_clone": (torch._lazy_clone, [rand(3, 2)]),
    "_stack": (lambda x, y: torch._stack([x, y], -1), [rand(3, 2), rand(3, 2)]),
    "_index_put_impl": (
        lambda x, i, v: aten._index_put_impl(x, [None, i], v, True),
        [rand(3, 4), ints(4, 2), rand(3, 2)],
    ),
    "_grid_sampler_2d_cpu_fallback": (
        lambda x, g: torch._grid_sampler_2d_cpu_fallback(x, g, 0, 0, True),
        [rand(2, 3, 4, 4, dtype=torch.float32), rand(2, 3, 2, 2, dtype=torch.float32)],
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_rows_of_known_families(name):
    # view_as_complex needs pairs that lie together, which a batch dimension behind them would part.
    f, args = SMALL[name]
    if name == "view_as_complex_copy":
        close([vmap(f)(batch(args[0], 0))], loop_vmap(f, (0,), [batch(args[0], 0)]))
    else:
        check(f, args, empty=name not in ("_aminmax",))


REFUSALS = {
    "quantized": (
        lambda x: torch.quantize_per_channel(x, torch.ones(2), torch.zeros(2), 0, torch.qint8),
        "Quantize outside vmap",
    ),
    "sparse": (lambda x: x.to_sparse(), "Convert outside vmap"),
    "sparse parts": (lambda x: x.values(), "has no sparse parts"),
    "nested": (lambda x: aten._nested_tensor_size(x), "padded tensor with a mask"),
    "internal": (lambda x: torch.ops.aten.mkldnn_linear(x, x), "internal to one of PyTorch's backends"),
    "memory": (lambda x: aten.set.source_Tensor(x, x), "out-of-place form"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_say_what_to_do(name):
    f, advice = REFUSALS[name]
    with pytest.raises(NotImplementedError, match=f"vmap: aten::.* cannot run on batched values.*{advice}"):
        vmap(f)(rand(3, 2, 2, dtype=torch.float32))


def test_tangents_are_of_jvp():
    def f(x):
        with torch.autograd.forward_ad.dual_level():
            return torch.autograd.forward_ad.make_dual(x, x)

    with pytest.raises(NotImplementedError, match="Use functorch_lite.jvp"):
        vmap(f)(rand(3))
    assert torch.equal(vmap(lambda x: jvp(torch.sin, (x,), (x,))[1])(rand(3)), rand(3).cos() * rand(3))
