"""A compiled function is right whatever it is called with next, and compiles no more often than it has to."""

from __future__ import annotations

import gc
import threading
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from functorch_lite.compile import clear_compile_cache, num_of_recompilations
from tests.support import observations
from tests.support.observations import described, same


def _f(x):
    y = torch.ones(2) * x
    return (y @ y.t() if y.dim() == 2 else y.sin()) + 1, x.t() if x.dim() == 2 else x


def _x(*sizes, **options):
    torch.manual_seed(0)
    return torch.rand(*sizes, **options)


def _under(context, x):
    return lambda: context, x


def _default_dtype(dtype):
    class Context:
        def __enter__(self):
            self.before = torch.get_default_dtype()
            torch.set_default_dtype(dtype)

        def __exit__(self, *_):
            torch.set_default_dtype(self.before)

    return Context()


#: What differs from the plain call: what makes the context, and the argument.
CHANGES = {
    "nothing": (nullcontext, lambda: _x(3, 2)),
    "size": (nullcontext, lambda: _x(4, 2)),
    "rank": (nullcontext, lambda: _x(2)),
    "size one": (nullcontext, lambda: _x(1, 2)),
    "empty": (nullcontext, lambda: _x(0, 2)),
    "dtype": (nullcontext, lambda: _x(3, 2, dtype=torch.float64)),
    "integers": (nullcontext, lambda: torch.arange(6).reshape(3, 2)),
    "complex": (nullcontext, lambda: _x(3, 2, dtype=torch.complex64)),
    "conjugate": (nullcontext, lambda: _x(3, 2, dtype=torch.complex64).conj()),
    "negative": (nullcontext, lambda: _x(3, 2, dtype=torch.complex64).conj().imag),
    "strides": (nullcontext, lambda: _x(2, 3).t()),
    "expanded": (nullcontext, lambda: _x(1, 2).expand(3, 2)),
    "every other row": (nullcontext, lambda: _x(6, 2)[::2]),
    "offset": (nullcontext, lambda: _x(4, 2)[1:]),
    "requires grad": (nullcontext, lambda: _x(3, 2).requires_grad_()),
    "no leaf": (nullcontext, lambda: _x(3, 2).requires_grad_() * 1),
    "parameter": (nullcontext, lambda: nn.Parameter(_x(3, 2))),
    "no_grad": (torch.no_grad, lambda: _x(3, 2).requires_grad_()),
    "inference mode": (torch.inference_mode, lambda: _x(3, 2).requires_grad_()),
    "inference tensor": (torch.inference_mode, lambda: _x(3, 2)),
    "autocast": (lambda: torch.autocast("cpu", torch.bfloat16), lambda: _x(3, 2)),
    "autocast to float16": (lambda: torch.autocast("cpu", torch.float16), lambda: _x(3, 2)),
    "autocast with gradients": (lambda: torch.autocast("cpu", torch.bfloat16), lambda: _x(3, 2).requires_grad_()),
    "default dtype": (lambda: _default_dtype(torch.float64), lambda: _x(3, 2, dtype=torch.float32)),
}


def _seen(f, change):
    context, make = CHANGES[change]
    x = make()
    with context():
        y, z = f(x)
    seen = described("y", y) | described("z", z)
    if y.requires_grad:
        (seen["gradient"],) = torch.autograd.grad(y.sum(), x)
    return seen


def _assert_right(f, change):
    actual, expected = _seen(f, change), _seen(_f, change)
    assert actual.keys() == expected.keys()
    for key in expected:
        assert same(actual[key], expected[key], 8.0), f"{change}: {key}: {actual[key]}, expected {expected[key]}"


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_change_and_change_back(change, dynamic):
    f = observations.ours().function(_f, dynamic=dynamic)
    for one in ("nothing", change, "nothing", change):
        _assert_right(f, one)


@pytest.mark.parametrize("dynamic", [False, True])
def test_all_changes_one_after_another(dynamic):
    f = observations.ours().function(_f, dynamic=dynamic)
    for change in [*CHANGES, *reversed(CHANGES)]:
        _assert_right(f, change)
    clear_compile_cache()
    before = num_of_recompilations()
    for change in CHANGES:
        _assert_right(f, change)
    once = num_of_recompilations() - before
    for change in CHANGES:
        _assert_right(f, change)
    assert num_of_recompilations() - before == once <= len(CHANGES)


STATIC = [1, 2, True, False, 1.0, 0.0, -0.0, 2.5, float("inf"), 1 + 0j, 2j]


def test_static_arguments():
    def f(x, s):
        return x / s, type(s)

    compiled = observations.ours().function(f)
    x = _x(3)
    for s in [*STATIC, *reversed(STATIC)]:
        y, z = compiled(x, s), f(x, s)
        assert torch.equal(y[0], z[0]) or s == 0 and torch.equal(y[0].sign(), z[0].sign())
        assert y[1] is z[1]


def test_other_structures():
    def f(tree, **more):
        return sum(x.sum() for x in torch.utils._pytree.tree_leaves((tree, more)) if isinstance(x, torch.Tensor)) * len(
            tree
        )

    compiled = observations.ours().function(f)
    x, y = _x(3), _x(3) + 1
    calls = [
        ([x, y], {}),
        ((x, y), {}),
        ([x, y, y], {}),
        ({"a": x, "b": y}, {}),
        ({"a": x, "c": y}, {}),
        ([x], {"z": y}),
    ]
    calls += [([x, None], {}), ([None, x], {}), ([[x], y], {})]
    for tree, more in [*calls, *calls]:
        assert torch.equal(compiled(tree, **more), f(tree, **more))


def test_keywords_and_defaults():
    def f(x, scale=2.0, *, shift=1):
        return x * scale + shift

    compiled = observations.ours().function(f)
    x = _x(3)
    for args, kwargs in (((x,), {}), ((x, 3.0), {}), ((x,), {"scale": 3.0}), ((x,), {"shift": x}), ((), {"x": x})) * 2:
        assert torch.equal(compiled(*args, **kwargs), f(*args, **kwargs))


def test_arguments_that_share_memory_or_not():
    def f(x, y):
        x.add_(1)
        return x * y

    compiled = observations.ours().function(f)

    def calls():
        base = _x(4, 3)
        other = _x(4, 3)
        yield base[0], other[0]
        yield base[0], base[0]
        yield base[0], base[1]
        yield (lambda row: (row, row))(other[1])
        yield base.view(-1)[:3], base.view(-1)[1:4]
        yield base[1], base[0]
        yield base.view(-1)[2:5], base.view(-1)[:3]
        yield _x(6)[:3], _x(6)[3:]

    for _ in range(2):
        for actual, expected in zip(calls(), calls(), strict=True):
            assert torch.equal(compiled(*actual), f(*expected))
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_the_base_of_arguments_has_another_size():
    def f(x, y):
        x.mul_(2)
        return x + y

    compiled = observations.ours().function(f)
    for rows in (2, 3, 5):
        base, expected = _x(rows, 2), _x(rows, 2)
        assert torch.equal(compiled(base[0], base[1]), f(expected[0], expected[1]))
        assert torch.equal(base, expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_layouts_with_symbolic_sizes(dynamic):
    """A view for one layout is a copy for another."""

    def f(x):
        return x.reshape(-1), x.contiguous()

    compiled = observations.ours().function(f, dynamic=dynamic)
    makers = [
        lambda: _x(4, 3),
        lambda: _x(3, 4).t(),
        lambda: _x(1, 3).expand(4, 3),
        lambda: _x(4, 1).expand(4, 3),
        lambda: _x(4, 6)[:, ::2],
        lambda: _x(8, 3)[::2],
        lambda: _x(4, 4)[:, :3],
        lambda: _x(5, 3)[1:],
        lambda: _x(3, 8).t()[::2],
    ]
    for make in [*makers, *reversed(makers)]:
        x, other = make(), make()
        for y, z in zip(compiled(x), f(other), strict=True):
            assert torch.equal(y, z)
            assert y.stride() == z.stride()
            assert (y.data_ptr() == x.data_ptr()) == (z.data_ptr() == other.data_ptr())


def test_tensor_that_a_closure_holds_has_changed():
    scale = torch.ones(2)
    compiled = observations.ours().function(lambda x: x * scale)
    x = _x(3, 2)
    for change in (lambda: scale.mul_(3), lambda: scale.requires_grad_(), lambda: scale.requires_grad_(False)):
        assert torch.equal(compiled(x), x * scale)
        change()
        y = compiled(x)
        assert torch.equal(y, x * scale)
        assert y.requires_grad == scale.requires_grad


class _Flags(nn.Module):
    """Its forward pass depends on the flag of a module that is not called."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return F.dropout(x, 0.5, self.drop.training)


@pytest.mark.parametrize("make", [lambda: nn.Dropout(0.5), lambda: nn.Sequential(nn.Dropout(0.5)), _Flags])
def test_training_flag(make):
    module = make()
    compiled = observations.ours().module(module)
    x = torch.ones(100)
    for training in (True, False, True, False):
        module.train(training)
        assert torch.equal(compiled(x), x) != training


def test_training_flag_of_a_part():
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(100, 100))
    compiled = observations.ours().module(module)
    x = torch.ones(100)
    for training in (True, False, True):
        module[0].train(training)
        assert torch.equal(compiled(x), module[1](x)) != training


def test_what_is_called_again_is_not_compiled_again():
    f = observations.ours().function(lambda x, s: x * s)
    clear_compile_cache()
    for _ in range(3):
        for n in (2, 3):
            for s in (1.0, 2.0):
                f(_x(n), s)
    assert num_of_recompilations() == 4


def test_two_compiled_functions_have_caches_of_their_own():
    f, g = (observations.ours().function(h) for h in (torch.sin, torch.cos))
    x = _x(3)
    assert torch.equal(f(x), x.sin())
    assert torch.equal(g(x), x.cos())
    assert torch.equal(f(x), x.sin())


def test_nothing_is_kept():
    """Neither arguments nor results live longer than for whoever called."""
    f = observations.ours().function(lambda x, y: (x.sin() * y, x[0], y))
    for _ in range(2):
        x, y = _x(3, 2).requires_grad_(), _x(3, 2)
        outputs = f(x, y)
        outputs[0].sum().backward()
        watched = [weakref.ref(t) for t in (x, y, *outputs[:2])]
        del x, y, outputs
        gc.collect()
        assert [w() for w in watched] == [None] * 4


def test_a_dropped_function_is_freed():
    def used_once():
        scale = _x(3).requires_grad_()
        observations.ours().function(lambda x: x * scale)(_x(3)).sum().backward()
        return weakref.ref(scale)

    watched = used_once()
    gc.collect()
    assert watched() is None


def test_saved_tensors_are_freed_with_the_backward_pass():
    f = observations.ours().function(lambda x: x.exp().sin())
    x = _x(3).requires_grad_()
    y = f(x)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()
    z = f(x)
    z.sum().backward(retain_graph=True)
    z.sum().backward()


def test_saved_tensor_that_is_written_is_noticed():
    f = observations.ours().function(lambda x, y: x * y)
    x, y = _x(3).requires_grad_(), _x(3)
    z = f(x, y)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_an_error_of_the_function_is_its_own():
    class Stop(Exception):
        pass

    def f(x, fail):
        if fail:
            raise Stop
        return x * 2

    compiled = observations.ours().function(f)
    x = _x(3).requires_grad_()
    for _ in range(2):
        with pytest.raises(Stop):
            compiled(x, True)
        compiled(x, False).sum().backward()


def test_threads():
    f = observations.ours().function(lambda x: x.sin() * x)
    found = []

    def work(n):
        x = _x(n).requires_grad_()
        for _ in range(5):
            y = f(x)
            (g,) = torch.autograd.grad(y.sum(), x)
            found.append(torch.allclose(y, x.sin() * x) and torch.allclose(g, x.cos() * x + x.sin()))

    threads = [threading.Thread(target=work, args=(n,)) for n in (2, 3, 2, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 20
