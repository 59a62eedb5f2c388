"""Losses, embeddings, linear algebra and attention: vmap against a loop over examples, derivatives against autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from functorch_lite import functional_call, grad, vjp, vmap

pytestmark = [pytest.mark.filterwarnings("error::functorch_lite.LoopFallbackWarning")]

B = 3


def tuples(x):
    return tuple(x) if isinstance(x, (tuple, list)) else (x,)


def loop(f, dims, args):
    """f on each example, results stacked."""
    examples = [
        tuples(f(*[a if d is None else a.select(d, i) for a, d in zip(args, dims, strict=True)])) for i in range(B)
    ]
    return [torch.stack(parts) for parts in zip(*examples, strict=True)]


def batched(x, dim):
    """B different tensors like x, stacked at dim (0, or -1: behind all others)."""
    if x.is_floating_point() or x.is_complex():
        examples = [x + 0.1 * i * torch.cos(x + i) for i in range(B)]
    elif x.dtype == torch.bool:
        examples = [x.roll(i, -1) for i in range(B)]
    else:
        examples = [x.roll(i, -1) if x.dim() else (x + i) % 2 for i in range(B)]
    return torch.stack(examples, dim if dim == 0 else x.dim())


def positions(args, fixed=()):
    choices = [(None,) if i in fixed else (None, 0, -1) for i in range(len(args))]
    return [dims for dims in itertools.product(*choices) if any(d is not None for d in dims)]


def check(f, args, fixed=(), nested=True, empty=True, keep=lambda dims: True):
    """vmap(f) for every choice of batched arguments and batch dimension, twice nested, and for an empty batch."""
    for dims in filter(keep, positions(args, fixed)):
        inputs = [x if d is None else batched(x, d) for x, d in zip(args, dims, strict=True)]
        expected = loop(f, dims, inputs)
        actual = tuples(vmap(f, dims)(*inputs))
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-8, equal_nan=True)
        if nested and -1 not in dims:
            # The outer batch is another one: its last dimension in the input.
            outer = [x if d is None else torch.stack([x, x.flip(0)], -1) for x, d in zip(inputs, dims, strict=True)]
            twice = tuples(vmap(vmap(f, dims), [None if d is None else -1 for d in dims])(*outer))
            for a, e in zip(twice, expected, strict=True):
                torch.testing.assert_close(a[0], e, rtol=1e-6, atol=1e-8, equal_nan=True)
                torch.testing.assert_close(a[1], e.flip(0), rtol=1e-6, atol=1e-8, equal_nan=True)
        if empty and -1 not in dims:
            nothing = [x if d is None else x.narrow(d, 0, 0) for x, d in zip(inputs, dims, strict=True)]
            for a, e in zip(tuples(vmap(f, dims)(*nothing)), expected, strict=True):
                assert a.shape == (0, *e.shape[1:])


def check_gradients(f, args, fixed=(), differentiable=(0,), again=True, keep=lambda dims: True):
    """vmap(grad) and grad(vmap), and vmap(grad(grad)), against torch.autograd on each example."""

    def scalar(*xs):
        total = 0.0
        for y in tuples(f(*xs)):
            if y.is_complex():
                y = torch.view_as_real(y.resolve_conj())
            if y.is_floating_point():
                total = total + (y * torch.cos(torch.arange(y.numel(), dtype=y.dtype).view(y.shape))).sum()
        return total

    def autograd(*xs):
        xs = [x.detach().requires_grad_(i in differentiable) for i, x in enumerate(xs)]
        return torch.autograd.grad(scalar(*xs), [xs[i] for i in differentiable])

    def autograd_twice(*xs):
        xs = [x.detach().requires_grad_(i in differentiable) for i, x in enumerate(xs)]
        variables = [xs[i] for i in differentiable]
        first = torch.autograd.grad(scalar(*xs), variables, create_graph=True)
        total = sum(wave(g) for g in first)
        if not total.requires_grad:
            return [torch.zeros_like(x) for x in variables]
        return torch.autograd.grad(total, variables, allow_unused=True, materialize_grads=True)

    def wave(g):
        return (torch.view_as_real(g.resolve_conj()) if g.is_complex() else g).sin().sum()

    for dims in filter(keep, positions(args, fixed)):
        if -1 in dims:
            continue
        inputs = [x if d is None else batched(x, d) for x, d in zip(args, dims, strict=True)]
        expected = loop(autograd, dims, inputs)
        inner = grad(scalar, argnums=differentiable)
        for a, e in zip(vmap(inner, dims)(*inputs), expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-8)
        outer = grad(lambda *xs, dims=dims: vmap(scalar, dims)(*xs).sum(), argnums=differentiable)(*inputs)
        for i, a, e in zip(differentiable, outer, expected, strict=True):
            torch.testing.assert_close(a, e.sum(0) if dims[i] is None else e, rtol=1e-6, atol=1e-8)
        if again:
            second = grad(lambda *xs, inner=inner: sum(wave(g) for g in inner(*xs)), argnums=differentiable)
            for a, e in zip(
                vmap(second, dims)(*inputs),
                loop(autograd_twice, dims, inputs),
                strict=True,
            ):
                torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-7)


def rand(*sizes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(sizes) + len(sizes))
    return torch.randn(*sizes, dtype=dtype, generator=generator)


def matrix(n=3, dtype=torch.float64):
    return rand(n, n, dtype=dtype) + 3 * torch.eye(n, dtype=dtype)


def hermitian(n=3, dtype=torch.float64):
    a = rand(n, n, dtype=dtype)
    return a @ a.mH + torch.diag(torch.arange(2.0, n + 2)).to(dtype)


# Losses.

REDUCTIONS = ["none", "mean", "sum"]
ELEMENTWISE = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "smooth_l1": F.smooth_l1_loss,
    "huber": lambda x, t, reduction: F.huber_loss(x, t, reduction=reduction, delta=0.7),
    "kl_div": lambda x, t, reduction: F.kl_div(x, t.sigmoid(), reduction=reduction),
    "bce": lambda x, t, reduction: F.binary_cross_entropy(x.sigmoid(), t.sigmoid(), reduction=reduction),
    "bce_logits": lambda x, t, reduction: F.binary_cross_entropy_with_logits(x, t, reduction=reduction),
    "soft_margin": lambda x, t, reduction: F.soft_margin_loss(x, t.sign(), reduction=reduction),
    "poisson": lambda x, t, reduction: F.poisson_nll_loss(x, t.abs(), reduction=reduction),
    "hinge": lambda x, t, reduction: F.hinge_embedding_loss(x, t.sign(), reduction=reduction),
    "cosine": lambda x, t, reduction: F.cosine_embedding_loss(x, t, x.new_ones(2), reduction=reduction),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_losses(name, reduction):
    args = rand(2, 4), rand(4, 2).t().contiguous()
    f = lambda x, t: ELEMENTWISE[name](x, t, reduction=reduction)
    check(f, args)
    check_gradients(f, args)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["binary_cross_entropy", "binary_cross_entropy_with_logits"])
def test_weighted_binary_losses(name, reduction):
    f = lambda x, t, w: getattr(F, name)(x.sigmoid(), t.sigmoid(), w, reduction=reduction)
    check(f, (rand(2, 4), rand(4, 2).t(), rand(4)))
    check_gradients(f, (rand(2, 4), rand(4, 2).t(), rand(4)))


def test_positive_weight():
    f = lambda x, t, w: F.binary_cross_entropy_with_logits(x, t, pos_weight=w)
    check_gradients(f, (rand(2, 4), rand(4, 2).t(), rand(4)))


LOGITS = {
    "row": ((5,), torch.tensor(1)),
    "rows": ((4, 5), torch.tensor([0, 2, 1, 4])),
    "image": (
        (2, 5, 2, 3),
        torch.tensor([[[0, 2, 1], [4, 4, 2]], [[3, 2, 1], [0, 0, 2]]]),
    ),
    "series": ((2, 5, 3), torch.tensor([[0, 2, 1], [4, 4, 2]])),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", LOGITS)
def test_cross_entropy(shape, reduction):
    sizes, target = LOGITS[shape]
    f = lambda x, t: F.cross_entropy(x, t, reduction=reduction, ignore_index=2)
    check(f, (rand(*sizes), target))
    check_gradients(f, (rand(*sizes), target))
    # PyTorch's composition writes into a tensor like the logits, so with label smoothing those must be batched.
    for smoothing, dims in [(0.0, (0, 1, 2)), (0.1, (0,)), (0.1, (0, 2))]:
        g = lambda x, t, w, s=smoothing: F.cross_entropy(
            x, t, w.exp(), reduction=reduction, ignore_index=2, label_smoothing=s
        )
        fixed = [i for i in range(3) if i not in dims]
        keep = (lambda d: True) if smoothing == 0.0 else (lambda d: d[0] is not None)
        check(g, (rand(*sizes), target, rand(5)), fixed, nested=False, keep=keep)
        check_gradients(g, (rand(*sizes), target, rand(5)), fixed, again=False, keep=keep)


def test_cross_entropy_with_probabilities():
    f = lambda x, t: F.cross_entropy(x, t.softmax(-1), label_smoothing=0.1)
    check(f, (rand(2, 4), rand(4, 2).t()))


def test_class_out_of_range_is_an_error():
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        vmap(F.cross_entropy)(rand(2, 3, 4), torch.tensor([[0, 1, 2], [3, 4, 0]]))


def test_tensors_made_inside():
    """torch.tensor in a differentiated function, written into, at every level."""
    x = rand(3, 2)

    def f(x):
        t = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
        t[0] = x.sin()
        return (t * t).sum()

    torch.testing.assert_close(grad(f)(x[0]), (2 * x[0].sin() * x[0].cos()))
    torch.testing.assert_close(grad(lambda x: grad(f)(x).sum())(x[0]), 2 * torch.cos(2 * x[0]))
    scaled = lambda x: (torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64) * x.sin()).sum()
    torch.testing.assert_close(vmap(grad(scaled))(x), torch.tensor([4.0, 6.0], dtype=torch.float64) * x.cos())


def test_written_in_place_at_two_levels():
    f = lambda x: (x * x).sqrt_().sin().sum()
    x = rand(3, 2).abs()
    torch.testing.assert_close(vmap(grad(lambda x: grad(f)(x).sum()))(x), -x.sin())


def test_ignored_target_hides_infinities():
    x = torch.tensor([[[0.0, float("inf")], [1.0, 2.0]]])
    target = torch.tensor([[-100, 1]])
    torch.testing.assert_close(vmap(F.nll_loss)(x, target)[0], F.nll_loss(x[0], target[0]))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_margin_losses(reduction):
    f = lambda x, t, w: F.multi_margin_loss(x, t, weight=w, p=2, reduction=reduction)
    check(f, (rand(4, 5), torch.tensor([0, 2, 1, 4]), rand(5)))
    check_gradients(f, (rand(4, 5), torch.tensor([0, 2, 1, 4]), rand(5)), again=False)
    row = lambda x, t: F.multi_margin_loss(x, t, reduction=reduction)
    check(row, (rand(5), torch.tensor(1)))
    check_gradients(row, (rand(5), torch.tensor(1)), again=False)
    labels = torch.tensor([[0, 2, -1, 1], [3, -1, 0, 0]])
    h = lambda x, t: F.multilabel_margin_loss(x, t, reduction=reduction)
    check(h, (rand(2, 4), labels), fixed=(1,))
    check_gradients(h, (rand(2, 4), labels), fixed=(1,), again=False)
    check(lambda t, x: h(x, t), (labels, rand(2, 4)), fixed=(0,))
    check(h, (rand(4), labels[0]), fixed=(1,))


@pytest.mark.parametrize("f", [F.multi_margin_loss, F.multilabel_margin_loss])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_margin_losses_of_a_single_class(f, reduction):
    h = lambda x, t: f(x, t, reduction=reduction)
    check(h, (rand(1)[0], torch.tensor(0)), fixed=(1,))
    check_gradients(h, (rand(1)[0], torch.tensor(0)), fixed=(1,), again=False)


T, N, C, S = 6, 2, 4, 3  # of ctc_loss: steps, sequences, classes with the blank, longest target


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ctc_loss(reduction):
    log_probs = rand(T, N, C).log_softmax(-1)
    targets, lengths = torch.tensor([[1, 2, 3], [3, 1, 1]]), torch.tensor([5, 6])
    f = lambda x, t, m, n: F.ctc_loss(x, t, m, n, reduction=reduction)
    check(f, (log_probs, targets, lengths, torch.tensor([3, 1])), keep=lambda dims: len(set(dims)) < 3)
    check_gradients(f, (log_probs, targets, lengths, torch.tensor([3, 1])), again=False)
    # Lengths in lists, and a single sequence.
    g = lambda x, t: F.ctc_loss(x, t, (5, 6), (3, 1), reduction=reduction)
    check(g, (log_probs, targets))
    check_gradients(g, (log_probs, targets), again=False)
    check(f, (log_probs[:, 0], targets[0], torch.tensor(6), torch.tensor(3)), fixed=(2, 3))


def test_ctc_loss_of_targets_in_a_row():
    log_probs, targets = rand(B, T, N, C).log_softmax(-1), torch.tensor([[1, 2, 3, 1], [3, 1, 2, 2], [1, 1, 1, 3]])
    lengths = torch.tensor([[2, 2], [3, 1], [1, 3]])
    f = lambda x, t, n: F.ctc_loss(x, t, torch.full((N,), T), n)
    torch.testing.assert_close(
        vmap(f)(log_probs, targets, lengths), loop(f, (0, 0, 0), (log_probs, targets, lengths))[0]
    )
    with pytest.raises(RuntimeError, match="vmap: ctc_loss: .* do not add up to the number of targets of each example"):
        vmap(f)(log_probs, targets, torch.tensor([[2, 2], [2, 1], [2, 3]]))


@pytest.mark.parametrize("zero_infinity", [False, True])
def test_ctc_loss_without_an_alignment(zero_infinity):
    """Two steps cannot hold three labels."""
    f = lambda x: F.ctc_loss(x, torch.tensor([[1, 2, 3]]), (2,), (3,), zero_infinity=zero_infinity)
    x = rand(B, T, 1, C)
    expected = torch.full((B,), 0.0 if zero_infinity else float("inf"), dtype=x.dtype)
    torch.testing.assert_close(vmap(f)(x), expected)
    if zero_infinity:
        torch.testing.assert_close(vmap(grad(f))(x), torch.zeros_like(x))


def test_cotangents_of_an_unbatched_ctc_loss():
    log_probs, targets = rand(T, N, C).log_softmax(-1), torch.tensor([[1, 2, 3], [3, 1, 1]])
    _, pull = vjp(lambda x: F.ctc_loss(x, targets, (5, 6), (3, 1), reduction="none"), log_probs)
    cotangents = rand(B, N)
    torch.testing.assert_close(vmap(pull)(cotangents)[0], torch.stack([pull(v)[0] for v in cotangents]))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ignored", [-100, 2])
def test_chunked_linear_cross_entropy(reduction, ignored):
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=2)
    f = lambda x, w, t, b, c: F.linear_cross_entropy(
        x, w, t, linear_bias=b, weight=c, options=options, reduction=reduction, ignore_index=ignored
    )
    args = (rand(5, 3), rand(4, 3), torch.tensor([0, 3, 2, 1, 1]), rand(4), rand(4).abs())
    # All, all but one, or one of the arguments.
    keep = lambda dims: -1 not in dims and (dims.count(0) != 2 and dims.count(0) != 3)
    check(f, args, nested=False, keep=keep)
    check_gradients(f, args, differentiable=(0, 1, 3), again=False, keep=keep)


# Embeddings.


@pytest.mark.parametrize("options", [{}, {"padding_idx": 1}, {"scale_grad_by_freq": True}])
@pytest.mark.parametrize(
    "index",
    [torch.tensor(1), torch.tensor([0, 1, 3, 1]), torch.tensor([[0, 3, 3], [2, 1, 0]])],
)
def test_embedding(index, options):
    f = lambda w, i: F.embedding(i, w, **options)
    check(f, (rand(4, 2), index))
    check_gradients(f, (rand(4, 2), index), again="scale_grad_by_freq" not in options)


def test_index_of_another_example_is_out_of_range():
    for dims in [(0, 0), (None, 0), (0, None)]:
        w = rand(2, 4, 2) if dims[0] == 0 else rand(4, 2)
        i = torch.tensor([[0, 5], [1, 1]]) if dims[1] == 0 else torch.tensor([0, 5])
        with pytest.raises((RuntimeError, IndexError), match="out of"):
            vmap(lambda w, i: F.embedding(i, w), dims)(w, i)


def test_embedding_renorm():
    def f(w, i):
        shortened = w.clone()
        return F.embedding(i, shortened, max_norm=0.5), shortened

    check(
        f,
        (rand(4, 2), torch.tensor([0, 1, 3, 1])),
        nested=False,
        empty=False,
        fixed=(1,),
    )
    check(
        lambda i, w: f(w, i),
        (torch.tensor([0, 1]), batched(rand(4, 2), 0)[0]),
        nested=False,
        fixed=(0,),
    )


def test_one_hot():
    check(lambda i: F.one_hot(i, 5), (torch.tensor([[0, 1, 4], [2, 2, 0]]),))


def test_one_hot_with_as_many_classes_as_the_largest_index_says():
    check(F.one_hot, (torch.tensor([0, 1, 4]),), empty=False)
    torch.testing.assert_close(vmap(F.one_hot)(torch.tensor([2, 2])), F.one_hot(torch.tensor([2, 2])))
    with pytest.raises(ValueError, match="the examples differ in it .the largest of all is 3.. Pass num_classes"):
        vmap(F.one_hot)(torch.tensor([[0, 1], [2, 3]]))
    with pytest.raises(ValueError, match="of an empty tensor does not know the number of classes. Pass num_classes"):
        vmap(F.one_hot)(torch.zeros(2, 0, dtype=torch.long))


# Where offsets end before the indices do, PyTorch's own kernels disagree with each other.
LAST_OFFSETS = torch.tensor([0, 2, 2, 7])
INDICES = torch.tensor([0, 1, 3, 1, 2, 2, 0])
OFFSETS = torch.tensor([0, 2, 2, 5])


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 1}, {"include_last_offset": True}])
def test_embedding_bag(mode, options):
    f = lambda w, i, o: F.embedding_bag(i, w, o, mode=mode, **options)
    offsets = LAST_OFFSETS if options.get("include_last_offset") else OFFSETS
    check(f, (rand(4, 3), INDICES, offsets), fixed=(2,))
    check_gradients(f, (rand(4, 3), INDICES, offsets), fixed=(2,), again=False)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bag_offsets_of_each_example(mode):
    offsets = torch.tensor([[0, 2, 2, 5], [0, 1, 6, 6], [0, 0, 0, 7]])
    f = lambda w, i, o: F.embedding_bag(i, w, o, mode=mode)
    w = rand(4, 3)
    for dims in [(None, None, 0), (None, 0, 0), (0, 0, 0)]:
        inputs = [x if d is None else batched(x, d) for x, d in zip((w, INDICES), dims, strict=False)] + [offsets]
        torch.testing.assert_close(vmap(f, dims)(*inputs), loop(f, dims, inputs)[0])


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bag_rows_and_frequency(mode):
    rows = torch.tensor([[0, 1, 3], [1, 1, 2]])
    check_gradients(lambda w, i: F.embedding_bag(i, w, mode=mode), (rand(4, 3), rows), again=False)
    if mode != "max":
        f = lambda w, i: F.embedding_bag(i, w, mode=mode, scale_grad_by_freq=True)
        check_gradients(f, (rand(4, 3), rows), again=False)


def test_embedding_bag_sample_weights():
    f = lambda w, s, i: F.embedding_bag(i, w, OFFSETS, mode="sum", per_sample_weights=s, padding_idx=1)
    args = rand(4, 3), rand(7), INDICES
    check(f, args)
    check_gradients(f, args, differentiable=(0, 1), again=False)


def test_cotangents_of_an_unbatched_bag():
    """Forward on one input, backward on a batch of cotangents: the saved values are the kernel's own."""
    from functorch_lite import jacrev

    for mode in ("sum", "mean", "max"):
        f = lambda w, mode=mode: F.embedding_bag(INDICES, w, OFFSETS, mode=mode)
        expected = torch.autograd.functional.jacobian(f, rand(4, 3))
        torch.testing.assert_close(jacrev(f)(rand(4, 3)), expected)


def test_per_sample_gradients_of_a_bag_classifier():
    bag, head = nn.EmbeddingBag(10, 4, mode="mean").double(), nn.Linear(4, 3).double()
    params = {f"bag.{k}": v.detach() for k, v in bag.named_parameters()}
    params |= {f"head.{k}": v.detach() for k, v in head.named_parameters()}
    model = nn.ModuleDict({"bag": bag, "head": head})
    text, label = torch.randint(0, 10, (B, 6)), torch.randint(0, 3, (B,))

    def loss(p, x, y):
        hidden = functional_call(
            model["bag"],
            {k[4:]: v for k, v in p.items() if k[:3] == "bag"},
            (x.unsqueeze(0),),
        )
        logits = functional_call(
            model["head"],
            {k[5:]: v for k, v in p.items() if k[:4] == "head"},
            (hidden,),
        )
        return F.cross_entropy(logits, y.unsqueeze(0))

    actual = vmap(grad(loss), (None, 0, 0))(params, text, label)
    for i in range(B):
        variables = {k: v.detach().clone().requires_grad_() for k, v in params.items()}
        expected = torch.autograd.grad(loss(variables, text[i], label[i]), list(variables.values()))
        for key, e in zip(variables, expected, strict=True):
            torch.testing.assert_close(actual[key][i], e)


# Linear algebra.

DTYPES = [torch.float64, torch.complex128]


def lower(x):
    return torch.linalg.cholesky(x @ x.mH + 2 * torch.eye(x.shape[-1], dtype=x.dtype))


def definite(x):
    return x @ x.mH + torch.diag(torch.arange(2.0, x.shape[-1] + 2)).to(x.dtype)


# The eigenvectors as they enter a function that does not depend on their phases.
def from_eigh(values, vectors):
    return values, (vectors * values.unsqueeze(-2).exp()) @ vectors.mH


def from_svd(u, s, vh):
    return s, u @ torch.diag(s.exp()).to(u.dtype) @ vh


def from_eig(values, vectors):
    return vectors @ torch.diag(values) @ torch.linalg.inv(vectors)


MATRIX = {
    "inv": torch.linalg.inv,
    "inv_ex": torch.linalg.inv_ex,
    "cholesky": lower,
    "cholesky_upper": lambda x: torch.linalg.cholesky(definite(x), upper=True),
    "legacy_cholesky": lambda x: torch.cholesky(definite(x)),
    "cholesky_inverse": lambda x: torch.cholesky_inverse(lower(x)),
    "det": torch.linalg.det,
    "logdet": lambda x: torch.logdet(definite(x)),
    "slogdet": torch.linalg.slogdet,
    "matrix_exp": torch.linalg.matrix_exp,
    "matrix_power": lambda x: torch.linalg.matrix_power(x, 3),
    "matrix_power_negative": lambda x: torch.linalg.matrix_power(x, -2),
    "eigvalsh": lambda x: torch.linalg.eigvalsh(definite(x)),
    "eigh": lambda x: from_eigh(*torch.linalg.eigh(definite(x))),
    "svdvals": torch.linalg.svdvals,
    "svd": lambda x: from_svd(*torch.linalg.svd(x)),
    "qr": torch.linalg.qr,
    "pinv": torch.linalg.pinv,
    "lu": lambda x: torch.linalg.lu(x)[1:],
    "trace": torch.trace,
    "householder": lambda x: torch.linalg.householder_product(x * 0.1, x[0] * 0.1),
    "matrix_norm": lambda x: torch.linalg.matrix_norm(x, "nuc"),
}
VALUES_ONLY = {
    "eigvals": lambda x: torch.linalg.eigvals(x).sum(),
    "eig": lambda x: from_eig(*torch.linalg.eig(x)),
    "qr_r": lambda x: torch.linalg.qr(x, mode="r"),
    "qr_complete": lambda x: torch.linalg.qr(x[:, :2], mode="complete"),
    "lu_factor_ex": torch.linalg.lu_factor_ex,
    "lu_no_pivot": lambda x: torch.lu_unpack(*torch.linalg.lu_factor(x), unpack_pivots=False),
    "lu_pivots": lambda x: torch.lu_unpack(*torch.linalg.lu_factor(x), unpack_data=False),
    "ldl": lambda x: torch.linalg.ldl_factor_ex(definite(x), hermitian=True),
    "geqrf": torch.geqrf,
    "matrix_rank": torch.linalg.matrix_rank,
    "cond": torch.linalg.cond,
    "svd_legacy": lambda x: torch.svd(x, compute_uv=False)[1],
    "pinv_tolerance": lambda x: torch.linalg.pinv(x, atol=torch.tensor(0.5, dtype=torch.float64)),
    "tril": lambda x: (x.tril(), x.triu(1)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*MATRIX, *VALUES_ONLY])
def test_functions_of_a_matrix(name, dtype):
    f = (MATRIX | VALUES_ONLY)[name]
    check(f, (matrix(dtype=dtype),))
    if name in ("svd", "qr", "lu", "matrix_exp", "inv", "det"):
        # A stack of matrices is one example.
        stack = torch.stack([matrix(dtype=dtype), 2 * matrix(dtype=dtype).mH])
        g = {"svd": torch.linalg.svdvals}.get(name, f)
        check(g, (stack,), nested=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MATRIX)
def test_derivatives_of_functions_of_a_matrix(name, dtype):
    # The second derivative of complex eigh fails under vmap in PyTorch's own formula.
    again = name in ("inv", "det", "slogdet", "cholesky", "eigvalsh", "trace") or (
        name == "eigh" and not dtype.is_complex
    )
    check_gradients(MATRIX[name], (matrix(dtype=dtype),), again=again)


TWO = {
    "solve": (torch.linalg.solve, matrix, [(3,), (3, 2), (3, 3), (2, 3, 2)]),
    "solve_ex": (torch.linalg.solve_ex, matrix, [(3,), (3, 3)]),
    "solve_right": (
        lambda a, b: torch.linalg.solve(a, b, left=False),
        matrix,
        [(2, 3), (3, 3)],
    ),
    "lu_solve": (
        lambda a, b: torch.linalg.lu_solve(*torch.linalg.lu_factor(a), b),
        matrix,
        [(3, 2), (3, 3)],
    ),
    "lu_solve_right": (
        lambda a, b: torch.linalg.lu_solve(*torch.linalg.lu_factor(a), b, left=False, adjoint=True),
        matrix,
        [(2, 3), (2, 2, 3)],
    ),
    "solve_triangular": (
        lambda a, b: torch.linalg.solve_triangular(a, b, upper=True),
        matrix,
        [(3, 2), (2, 3, 2)],
    ),
    "solve_triangular_right": (
        lambda a, b: torch.linalg.solve_triangular(a, b, upper=False, left=False),
        matrix,
        [(2, 3), (3, 3)],
    ),
    "triangular_solve": (
        lambda a, b: torch.triangular_solve(b, a)[0],
        matrix,
        [(3, 2), (3, 3)],
    ),
    "cholesky_solve": (
        lambda a, b: torch.cholesky_solve(b, lower(a)),
        matrix,
        [(3, 2), (3, 3), (2, 3, 2)],
    ),
    "lstsq": (
        lambda a, b: torch.linalg.lstsq(a, b).solution,
        lambda dtype: rand(4, 3, dtype=dtype),
        [(4, 2), (4, 4)],
    ),
    "cross": (torch.linalg.cross, matrix, [(3, 3)]),
    "kron": (torch.kron, matrix, [(2, 2), (3,)]),
    "multi_dot": (lambda a, b: torch.linalg.multi_dot([a, b, a]), matrix, [(3, 3)]),
    "tensordot": (lambda a, b: torch.tensordot(a, b, 1), matrix, [(3, 2)]),
}
CASES = [(name, shape) for name, (_, _, shapes) in TWO.items() for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "shape"), CASES)
def test_functions_of_two_matrices(name, shape, dtype):
    f, make, _ = TWO[name]
    args = make(dtype=dtype), rand(*shape, dtype=dtype)
    check(f, args)
    check_gradients(
        f,
        args,
        differentiable=(0, 1),
        again=name in ("solve", "cholesky_solve", "lu_solve"),
    )


def test_batch_size_of_the_matrix_size():
    """vmap(solve) must not take the columns of an unbatched right-hand side for a batch of vectors."""
    a, b = batched(matrix(), 0), rand(3, 3)
    torch.testing.assert_close(
        vmap(torch.linalg.solve, (0, None))(a, b),
        torch.stack([x.inverse() @ b for x in a]),
    )
    torch.testing.assert_close(
        vmap(torch.linalg.solve, (None, 0))(b, a),
        torch.stack([b.inverse() @ x for x in a]),
    )


@pytest.mark.parametrize("driver", [None, "gels", "gelsy", "gelsd", "gelss"])
@pytest.mark.parametrize("shape", [(4,), (4, 2)])
def test_lstsq_results(driver, shape):
    f = lambda a, b: torch.linalg.lstsq(a, b.reshape(shape) if len(shape) == 2 else b.unsqueeze(-1), driver=driver)
    check(f, (rand(4, 3), rand(*shape)))


@pytest.mark.parametrize("hermitian_matrix", [True, False])
def test_ldl_solve(hermitian_matrix):
    f = lambda a, b: torch.linalg.ldl_solve(*torch.linalg.ldl_factor(a + a.mT, hermitian=hermitian_matrix), b)
    check(f, (hermitian(), rand(3, 2)))


def test_ormqr():
    check(lambda a, b: torch.ormqr(*torch.geqrf(a), b), (matrix(), rand(3, 2)))


def test_pinv_tolerance_of_each_example():
    f = lambda a, tol: torch.linalg.pinv(a, atol=tol)
    check(f, (matrix(), torch.tensor(2.0, dtype=torch.float64)), nested=False)


@pytest.mark.parametrize(
    "f",
    [torch.linalg.inv, torch.linalg.cholesky, lambda x: torch.linalg.solve(x, x[0])],
)
def test_a_singular_example_is_an_error(f):
    x = torch.stack([torch.eye(3), torch.zeros(3, 3)])
    with pytest.raises(torch.linalg.LinAlgError, match="Batch element 1"):
        vmap(f)(x)


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 3.0, float("inf")])
@pytest.mark.parametrize("rows", [4, 30])
def test_cdist(p, rows):
    f = lambda x, y: torch.cdist(x, y, p=p)
    args = rand(rows, 3), rand(2, 5, 3)
    check(f, args, nested=rows == 4)
    check_gradients(f, args, differentiable=(0, 1), again=False)


def test_euclidean_distance():
    check(torch.ops.aten._euclidean_dist, (rand(4, 3), rand(5, 3)))


def test_bilinear():
    args = rand(4, 2), rand(4, 3), rand(5, 2, 3), rand(5)
    check(F.bilinear, args)
    check_gradients(F.bilinear, args, differentiable=(0, 1, 2, 3))


# Attention.


@pytest.mark.parametrize("mode", ["plain", "causal", "added", "mask", "grouped", "scale"])
def test_attention(mode):
    mask = {
        "added": rand(4, 5),
        "mask": torch.tensor([True, False, True, True, False]).expand(4, 5),
    }.get(mode)
    options = {
        "is_causal": mode == "causal",
        "enable_gqa": mode == "grouped",
        "scale": 0.3 if mode == "scale" else None,
    }
    heads = 1 if mode == "grouped" else 2
    qkv = rand(1, 2, 4, 3), rand(1, heads, 5, 3), rand(1, heads, 5, 2)
    if mask is None:
        args, f = (
            qkv,
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options),
        )
    else:
        args, f = (
            (*qkv, mask),
            lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m, **options),
        )
    check(f, args, nested=mask is None, empty=False)
    check_gradients(f, args, differentiable=(0, 1, 2), again=mode == "plain")


def masks(kind):
    padding = torch.tensor([[False, False, False, True], [False, True, False, False]])
    causal = torch.ones(4, 4).triu(1).bool()
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "causal": {"attn_mask": causal},
        "both": {"key_padding_mask": padding, "attn_mask": causal},
    }[kind]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["none", "padding", "causal", "both"])
@pytest.mark.parametrize("params_batched", [False, True])
@pytest.mark.filterwarnings("ignore:Converting mask")
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_multi_head_attention(training, kind, params_batched):
    module = nn.MultiheadAttention(6, 2, batch_first=True).double().train(training)
    params = {k: v.detach() for k, v in module.named_parameters()}
    call = lambda p, x: functional_call(module, p, (x, x, x), masks(kind))
    compare_modules(call, params, rand(2, 4, 6), params_batched)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("params_batched", [False, True])
@pytest.mark.filterwarnings("ignore:Converting mask")
def test_transformer_encoder_layer(training, norm_first, activation, params_batched):
    module = nn.TransformerEncoderLayer(
        6,
        2,
        5,
        dropout=0.0,
        batch_first=True,
        norm_first=norm_first,
        activation=activation,
    )
    module = module.double().train(training)
    params = {k: v.detach() for k, v in module.named_parameters()}
    mask = masks("padding")["key_padding_mask"]
    call = lambda p, x: functional_call(module, p, (x,), {"src_key_padding_mask": mask})
    compare_modules(call, params, rand(2, 4, 6), params_batched)


def compare_modules(call, params, x, params_batched):
    """vmap and vmap(grad) of a module, in no_grad too, where PyTorch takes its fused path."""
    if params_batched:
        params = {k: batched(v, 0) for k, v in params.items()}
    xs = batched(x, 0)
    dims = (0 if params_batched else None, 0)
    example = lambda i: {k: v[i] for k, v in params.items()} if params_batched else params
    for fused in (False, True):
        with torch.set_grad_enabled(not fused):
            expected = [torch.stack(y) for y in zip(*[outputs(call(example(i), xs[i])) for i in range(B)], strict=True)]
            for a, e in zip(
                vmap(lambda p, x: outputs(call(p, x)), dims)(params, xs),
                expected,
                strict=True,
            ):
                torch.testing.assert_close(a, e)
    loss = lambda p, x: sum(y.sin().sum() for y in outputs(call(p, x)))
    actual = vmap(grad(loss), dims)(params, xs)
    for i in range(B):
        variables = {k: v.detach().clone().requires_grad_() for k, v in example(i).items()}
        expected = torch.autograd.grad(loss(variables, xs[i]), list(variables.values()))
        for key, e in zip(variables, expected, strict=True):
            torch.testing.assert_close(actual[key][i], e)


def outputs(y):
    return tuple(y) if isinstance(y, tuple) else (y,)
