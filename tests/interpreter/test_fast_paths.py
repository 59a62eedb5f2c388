"""The typed shortcuts of csrc/fast_paths.cpp give the bits of the boxed way, which a call takes without them."""

from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from functorch_lite import _C, EscapedTensorError, grad, hessian, jacrev, jvp, vmap

UNARY = {
    name: getattr(torch, name)
    for name in ("abs", "cos", "exp", "log", "neg", "reciprocal", "relu", "rsqrt", "sigmoid", "sin", "sqrt", "tanh")
}
UNARY |= {f"pow {exponent}": lambda x, exponent=exponent: x**exponent for exponent in (2, 3, -1, 0.5, 2.5, 0)}
BINARY = {
    "add": lambda x, y: torch.add(x, y, alpha=2),
    "sub": lambda x, y: torch.sub(x, y, alpha=3),
    "mul": torch.mul,
    "div": torch.div,
    "maximum": lambda x, y: torch.maximum(x, y if isinstance(y, Tensor) else torch.tensor(y)),
    "minimum": lambda x, y: torch.minimum(x, y if isinstance(y, Tensor) else torch.tensor(y)),
}


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if not dtype.is_floating_point and not dtype.is_complex:
        return torch.randint(1, 5, shape, dtype=dtype, generator=generator)
    return torch.rand(shape, dtype=dtype, generator=generator) + 0.5


#: What an operator may meet beside a tensor x[2, 3] of float32.
OPERANDS: dict[str, Callable[[], object]] = {
    "float": lambda: 1.01,
    "float that no float32 is": lambda: 0.1,
    "large float": lambda: 1e300,
    "nan": lambda: float("nan"),
    "int": lambda: 3,
    "large int": lambda: 2**62 + 1,
    "bool": lambda: True,
    "complex": lambda: 1 + 2j,
    "same shape": lambda: rand(2, 3, seed=1),
    "row": lambda: rand(3, seed=1),
    "more dimensions": lambda: rand(4, 2, 3, seed=1),
    "scalar": lambda: rand(seed=1),
    "double": lambda: rand(2, 3, dtype=torch.float64, seed=1),
    "double scalar": lambda: rand(dtype=torch.float64, seed=1),
    "bfloat16": lambda: rand(2, 3, dtype=torch.bfloat16, seed=1),
    "integers": lambda: rand(2, 3, dtype=torch.int64, seed=1),
    "complex tensor": lambda: rand(2, 3, dtype=torch.complex64, seed=1),
    "requires grad": lambda: rand(2, 3, seed=1).requires_grad_(),
    "requires grad, expanded": lambda: rand(3, seed=1).requires_grad_().expand(2, 3),
    "parameter": lambda: torch.nn.Parameter(rand(3, seed=1)),
    "view": lambda: rand(3, 2, seed=1).t(),
    "conjugate": lambda: rand(2, 3, dtype=torch.complex64, seed=1).conj(),
}

#: How the function is called on a tensor x[2, 3] and, with `batched`, the other operand.
TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], object]]] = {
    "vmap": lambda f: vmap(f),
    "vmap of a last dimension": lambda f: lambda x: vmap(f, -1, -1)(x.movedim(0, -1)),
    "vmap of vmap": lambda f: lambda x: vmap(vmap(f))(x[None]),
    "grad": lambda f: grad(lambda x: total(f(x))),
    "grad of a constant": lambda f: grad(lambda x: total(f(x.detach())) + x.sum()),
    "no_grad in grad": lambda f: grad(lambda x: total(without_recording(f, x)) + x.sum()),
    "grad of grad": lambda f: grad(lambda x: total(grad(lambda x: total(f(x) * x))(x))),
    "jvp": lambda f: lambda x: jvp(f, (x,), (x + 1,)),
    "jvp of jvp": lambda f: lambda x: jvp(lambda x: jvp(f, (x,), (x * x,)), (x,), (x + 1,)),
    "vmap of grad": lambda f: vmap(grad(lambda x: total(f(x)))),
    "grad of vmap": lambda f: grad(lambda x: total(vmap(f)(x))),
    "jvp of grad": lambda f: lambda x: jvp(grad(lambda x: total(f(x))), (x,), (x + 1,)),
    "vmap of jvp": lambda f: vmap(lambda x: jvp(f, (x,), (x + 1,))),
    "jacrev": lambda f: jacrev(f),
    "hessian": lambda f: hessian(lambda x: total(f(x))),
}


def total(x: Tensor) -> Tensor:
    return torch.view_as_real(x).sum() if x.is_complex() else x.sum().float()


def without_recording(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return f(x)


@contextmanager
def boxed():
    _C.set_fast_paths(False)
    try:
        yield
    finally:
        _C.set_fast_paths(True)


def results(run: Callable[[], object]) -> list[Tensor] | str:
    try:
        return torch.utils._pytree.tree_leaves(run())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def check(run: Callable[[], object]) -> list[Tensor] | str:
    fast = results(run)
    with boxed():
        slow = results(run)
    if isinstance(fast, str) or isinstance(slow, str):
        assert fast == slow
        return fast
    assert len(fast) == len(slow)
    for a, b in zip(fast, slow, strict=True):
        assert type(a) is type(b)
        assert (a.dtype, a.shape, a.stride(), a.requires_grad) == (b.dtype, b.shape, b.stride(), b.requires_grad)
        assert a.is_inference() == b.is_inference()
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    return fast


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("op", UNARY)
def test_one_operand(op, transform):
    found = check(lambda: TRANSFORMS[transform](UNARY[op])(rand(2, 3)))
    assert not isinstance(found, str), found


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("op", BINARY)
def test_two_operands(op, transform, operand):
    if op == "sub" and operand == "bool":
        pytest.skip("PyTorch does not subtract bools")
    other = OPERANDS[operand]()
    f = BINARY[op]
    check(lambda: TRANSFORMS[transform](lambda x: f(x, other))(rand(2, 3)))
    if isinstance(other, Tensor):
        check(lambda: TRANSFORMS[transform](lambda x: f(other, x))(rand(2, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.int64])
@pytest.mark.parametrize("number", [0.1, 3, 1e300])
@pytest.mark.parametrize("op", BINARY)
def test_numbers_beside_all_dtypes(op, number, dtype):
    f = BINARY[op]
    for transform in ("vmap", "grad", "jvp"):
        if transform == "vmap" or dtype.is_floating_point:
            check(lambda transform=transform: TRANSFORMS[transform](lambda x: f(x, number))(rand(2, 3, dtype=dtype)))
    check(lambda: vmap(lambda x: f(x, number))(rand(4, dtype=dtype)))  # scalars


@pytest.mark.parametrize("dims", [(0, 0), (0, 1), (1, 0), (1, 1), (0, None), (None, 1), (1, None)])
@pytest.mark.parametrize("shapes", [((4, 4), (4, 4)), ((4, 4), (4,)), ((4,), (4, 4, 4)), ((4,), (4,))])
@pytest.mark.parametrize("op", BINARY)
def test_where_the_batch_is(op, shapes, dims):
    x, y = (rand(*shape, seed=i) for i, shape in enumerate(shapes))
    dims = tuple(None if dim is None else min(dim, z.dim() - 1) for dim, z in zip(dims, (x, y), strict=True))
    found = check(lambda: vmap(BINARY[op], dims)(x, y))
    assert not isinstance(found, str), found


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_autocast_and_modes_around(transform):
    def f(x):
        return torch.sin(x @ x.mT if x.dim() > 1 else x * x.sum()) * 0.1 + x.sum()

    for mode in (lambda: torch.autocast("cpu", torch.bfloat16), torch.inference_mode, torch.no_grad):

        def run(mode=mode):
            with mode():
                return TRANSFORMS[transform](f)(rand(2, 3))

        check(run)


@pytest.mark.parametrize("transform", ["vmap", "grad", "vmap of grad", "jvp"])
def test_autocast_inside(transform):
    weight = rand(3, 3)

    def f(x):
        with torch.autocast("cpu", torch.bfloat16):
            return torch.exp(torch.nn.functional.linear(x, weight)) * 0.1

    found = check(lambda: TRANSFORMS[transform](f)(rand(2, 3)))
    assert not isinstance(found, str), found


@pytest.mark.parametrize("transform", ["vmap", "grad", "vmap of grad"])
def test_subclasses_keep_their_class(transform):
    def run():
        return TRANSFORMS[transform](lambda x: torch.sin(x * 2.0) + 1.0)(TwoTensor(rand(2, 3), rand(2, 3, seed=1)))

    check(run)


def test_dispatch_modes_see_the_numbers_that_the_user_wrote():
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(vmap(lambda x: x * 1.01))(rand(2, 3))
    [call] = [node for node in graph.graph.nodes if node.op == "call_function"]
    assert call.args[1] == 1.01


@pytest.mark.parametrize("op", [torch.sin, lambda x: x * 2.0, lambda x: 2.0 + x, lambda x: x / x])
def test_escaped_tensors(op):
    kept = []
    vmap(lambda x: kept.append(x) or x)(rand(2, 3))
    for run in (
        lambda: op(kept[0]),
        lambda: vmap(lambda y: op(kept[0]) + y)(rand(2, 3)),
        lambda: grad(lambda y: (op(kept[0]) + y).sum())(rand(3)),
    ):
        found = check(run)
        assert isinstance(found, str)
        assert found.startswith(EscapedTensorError.__name__)


@pytest.mark.parametrize("op", [*UNARY.values(), lambda x: x * 2.0, lambda x: x + x])
def test_constants_of_a_closed_level(op):
    kept = []
    grad(lambda x: kept.append(x.detach() + 1) or x.sum())(rand(3))
    for run in (
        lambda: vmap(lambda y: op(kept[0]) + y)(rand(2, 3)),
        lambda: grad(lambda y: (op(kept[0]) + y).sum())(rand(3)),
    ):
        found = check(run)
        assert not isinstance(found, str), found


def test_outer_derivatives_reach_through_one_level():
    x, w = rand(2, 3), rand(3, seed=1).requires_grad_()

    def run():
        y = vmap(lambda x: torch.sin(x * w) * 0.1 + w)(x)
        return torch.autograd.grad(y.sum(), w)

    [found] = check(run)
    expected = torch.autograd.grad((torch.sin(x * w) * 0.1 + w).sum(), w)[0]
    torch.testing.assert_close(found, expected)


def test_views_and_writes_are_seen_outside():
    """Plain kernels are called past autograd: views of plain values and counters of writes stay what they were."""
    x = rand(2, 3)
    y = vmap(lambda x: x[1:])(x)
    assert y._base is x
    before = x._version
    vmap(lambda x: x.mul_(2.0))(x)
    assert x._version == before + 1
    saved = rand(2, 3)
    w = rand(3).requires_grad_()
    product = w * saved
    vmap(lambda x: x.mul_(2.0))(saved)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
