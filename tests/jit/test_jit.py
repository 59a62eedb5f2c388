"""jit does what the function does, at each call, for other numbers than those of the first one."""

import io
import threading
import warnings
import weakref
from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils import _pytree as pytree

import functorch_lite as fl
from functorch_lite.compile import clear_compile_cache, num_of_recompilations

BACKENDS = ["replay", pytest.param(lambda gm, inputs: gm, id="graph")]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2))


NET = network()
PARAMS = {name: p.detach() for name, p in NET.named_parameters()}


def loss(params, x):
    return fl.functional_call(NET, params, (x,)).square().sum()


def energy(x):
    return (x.sin() * x.flip(0)).sum() ** 2


def sgd(params, x):
    slopes, value = fl.grad_and_value(loss)(params, x)
    return {name: p - 0.1 * slopes[name] for name, p in params.items()}, value


COMPOSITIONS = {
    "per-sample gradients": (fl.vmap(fl.grad(loss), (None, 0)), lambda: (PARAMS, torch.randn(4, 3))),
    "hessian": (fl.hessian(energy), lambda: (torch.randn(5),)),
    "vmap of hessian": (fl.vmap(fl.hessian(energy)), lambda: (torch.randn(3, 4),)),
    "jacfwd": (fl.jacfwd(lambda x: x.sin().cumsum(0)), lambda: (torch.randn(4),)),
    "jvp of grad": (lambda x, v: fl.jvp(fl.grad(energy), (x,), (v,)), lambda: (torch.randn(4), torch.randn(4))),
    "hvp": (lambda x, v: fl.hvp(energy, (x,), (v,)), lambda: (torch.randn(4), torch.randn(4))),
    "vjp": (lambda x, v: fl.vjp(torch.sin, x)[1](v), lambda: (torch.randn(4), torch.randn(4))),
    "linearize": (lambda x, v: fl.linearize(torch.sin, x)[1](v), lambda: (torch.randn(4), torch.randn(4))),
    "functionalize": (fl.functionalize(lambda x: x.clone().mul_(2)), lambda: (torch.randn(4),)),
    "a step": (sgd, lambda: (PARAMS, torch.randn(4, 3))),
    "loop and numbers": (
        lambda x, n, s: sum(x * i for i in range(n)) if s == "sum" else x,
        lambda: (torch.ones(2), 3, "sum"),
    ),
    "tuples": (lambda p, q=None: {"a": (p[0] + 1, [p[1]]), "b": q}, lambda: ((torch.ones(2), torch.randn(1)),)),
    "empty": (fl.vmap(fl.grad(energy)), lambda: (torch.randn(0, 3),)),
    "complex": (fl.grad(lambda z: (z * z.conj()).real.sum()), lambda: (torch.randn(3, dtype=torch.complex64),)),
    "half": (fl.vmap(torch.softmax, (0, None)), lambda: (torch.randn(2, 3, dtype=torch.bfloat16), 0)),
    "convolution": (fl.grad(lambda x: NET_2D(x).sum()), lambda: (torch.randn(2, 1, 6, 6),)),
}
NET_2D = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2)).requires_grad_(False)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_equals_eager(name, backend, dynamic):
    function, arguments = COMPOSITIONS[name]
    compiled = fl.jit(function, backend, dynamic=dynamic)
    for seed in range(3):
        torch.manual_seed(seed)
        args = arguments()
        got, expected = compiled(*args), function(*args)
        assert pytree.tree_structure(got) == pytree.tree_structure(expected)
        assert_close(got, expected)


@pytest.mark.parametrize("name", ["per-sample gradients", "vmap of hessian", "a step"])
def test_inductor(name):
    function, arguments = COMPOSITIONS[name]
    compiled = fl.jit(function, "inductor")
    for seed in range(2):
        torch.manual_seed(seed)
        args = arguments()
        assert_close(compiled(*args), function(*args), rtol=1e-4, atol=1e-5)


def test_is_compiled_once_for_each_signature():
    clear_compile_cache()
    calls = []

    def f(x, scale):
        calls.append(scale)
        return x * scale

    compiled = fl.jit(f)
    for _ in range(3):
        assert_close(compiled(torch.ones(2), 2.0), torch.full((2,), 2.0))
        assert_close(compiled(torch.ones(2), 3.0), torch.full((2,), 3.0))
        assert_close(compiled(torch.ones(3), 2.0), torch.full((3,), 2.0))
        assert_close(compiled(torch.ones(2, dtype=torch.float64), 2.0), torch.full((2,), 2.0, dtype=torch.float64))
        assert_close(compiled(torch.ones(2), scale=2.0), torch.full((2,), 2.0))
    assert len(calls) == num_of_recompilations() == 5
    clear_compile_cache()
    compiled(torch.ones(2), 2.0)
    assert len(calls) == 6


@pytest.mark.parametrize(("one", "other"), [(1, True), (0.0, -0.0), (1, 1.0), ("a" * 3, "aab"), ((1,), [1]), (None, 0)])
def test_arguments_that_differ(one, other):
    seen = []
    compiled = fl.jit(lambda x, y: seen.append(y) or x)
    for y in (one, other, one, other):
        compiled(torch.ones(1), y)
    assert [repr(y) for y in seen] == [repr(one), repr(other)]


def test_strings_that_are_not_interned():
    compiled = fl.jit(lambda tensors: tensors["some key"[:4] + "where"] * 2)
    for _ in range(3):
        key = "".join(["some", "where"])
        assert_close(compiled({key: torch.ones(1)}), torch.full((1,), 2.0))
        with pytest.raises(KeyError):
            compiled({"".join(["some", "thing"]): torch.ones(1)})


def test_modes():
    compiled = fl.jit(lambda x: x @ x if torch.is_grad_enabled() else x)
    x = torch.full((2, 2), 2.0)
    for _ in range(2):
        assert_close(compiled(x), x @ x)
        with torch.no_grad():
            assert_close(compiled(x), x)
        with torch.inference_mode():
            assert_close(compiled(x), x)
        with torch.autocast("cpu", torch.bfloat16):
            assert compiled(x).dtype is torch.bfloat16


def test_captured_tensors_are_read_at_each_call():
    weight = torch.tensor([1.0, 2.0])
    net = network()
    compiled = fl.jit(lambda x: (x * weight, net(x[0].expand(3))))
    for factor in (1.0, 3.0):
        weight.fill_(factor)
        with torch.no_grad():
            net[0].weight.mul_(factor)
        x = torch.randn(2)
        with torch.no_grad():
            assert_close(compiled(x), (x * factor, net(x[0].expand(3))))
    net[0].weight = nn.Parameter(torch.zeros(5, 3))
    assert_close(compiled(x)[1], net(x[0].expand(3)))


def test_training_mode():
    net = nn.Sequential(nn.Dropout(0.5)).train()
    compiled = fl.jit(net)
    x = torch.ones(1000)
    for training in (True, False, True, False):
        net.train(training)
        assert (compiled(x) == 0).any() == training


def test_an_argument_that_is_captured_too():
    weight = torch.tensor([2.0])
    compiled = fl.jit(lambda x: x * weight)
    for x in (weight, torch.tensor([10.0]), weight, torch.tensor([5.0])):
        assert_close(compiled(x), x * 2)


def test_an_argument_that_is_captured_and_written():
    weight = torch.ones(2)

    def f(x):
        x.mul_(2)
        return weight + 1

    compiled = fl.jit(f)
    for _ in range(2):
        assert_close(compiled(torch.ones(2)), torch.full((2,), 2.0))
    assert_close(compiled(weight), torch.full((2,), 3.0))
    assert_close(compiled(torch.ones(2)), torch.full((2,), 3.0))


def test_arguments_that_share_memory():
    def f(x, y):
        x.add_(1)
        return y * 1

    compiled = fl.jit(f)
    for _ in range(2):
        assert_close(compiled(torch.zeros(2), torch.zeros(2)), torch.zeros(2))
        x = torch.zeros(2)
        assert_close(compiled(x, x), torch.ones(2))
        base = torch.zeros(3)
        assert_close(compiled(base[:2], base[1:]), torch.tensor([1.0, 0.0]))


def test_random_numbers_advance_as_in_eager():
    def f(x):
        torch.rand(3)  # nobody uses it, but it moves the generator on
        return nn.functional.dropout(x, 0.5), torch.randn(2), fl.vmap(torch.rand_like, randomness="different")(x)

    compiled = fl.jit(f)
    x = torch.ones(4, 5)
    for _ in range(3):
        state = torch.get_rng_state()
        got, after = compiled(x), torch.get_rng_state()
        torch.set_rng_state(state)
        assert_close(got, f(x), rtol=0, atol=0)
        assert torch.equal(torch.get_rng_state(), after)


def test_writes():
    counter = torch.zeros(1)

    def f(x, d):
        counter.add_(1)
        d["y"].mul_(x)
        return x, d["y"], counter * 1

    compiled = fl.jit(f)
    y = torch.full((1,), 3.0)
    for i in range(1, 4):
        x = torch.full((1,), 2.0)
        version = y._version
        first, second, count = compiled(x, {"y": y})
        assert first is x
        assert second is y
        assert y._version > version
        assert (y.item(), count.item(), counter.item()) == (3 * 2**i, i, i)


@pytest.mark.parametrize(
    ("optimizer", "options", "eager_steps"),
    [
        (torch.optim.SGD, {"lr": 0.1}, 0),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, 1),
        (torch.optim.Adam, {"lr": 0.1, "fused": True}, 1),
        (torch.optim.AdamW, {"lr": 0.1, "fused": True}, 1),
    ],
)
def test_a_training_step(optimizer, options, eager_steps):
    def losses(compile_after):
        net = network()
        params = dict(net.named_parameters())
        optim = optimizer(net.parameters(), **options)

        def step(x):
            slopes, value = fl.grad_and_value(lambda p: fl.functional_call(net, p, (x,)).square().sum())(params)
            for name, p in params.items():
                p.grad = slopes[name]
            optim.step()
            return value.detach()

        compiled = fl.jit(step)
        torch.manual_seed(1)
        return [(step if i < compile_after else compiled)(torch.randn(4, 3)) for i in range(5)]

    assert_close(losses(eager_steps), losses(5))


def test_derivatives_from_outside():
    net = network()
    compiled = fl.jit(lambda x: fl.functional_call(net, dict(net.named_parameters()), (x,)).square().sum())
    for _ in range(2):
        x = torch.randn(3, requires_grad=True)
        expected = torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()])
        assert_close(torch.autograd.grad(compiled(x), [x, *net.parameters()]), expected)
    f = fl.jit(lambda x: x.sin().prod())
    x = torch.randn(3)
    assert_close(fl.hessian(f)(x), fl.hessian(lambda x: x.sin().prod())(x))
    assert_close(fl.vmap(fl.grad(f))(torch.ones(2, 3)), fl.vmap(fl.grad(lambda x: x.sin().prod()))(torch.ones(2, 3)))
    assert_close(fl.jit(fl.grad(f))(x), fl.grad(lambda x: x.sin().prod())(x))


def test_outputs_are_tensors_of_their_own():
    compiled = fl.jit(lambda x: (torch.zeros(3), x + torch.zeros(3), x * 1, torch.eye(3) @ x[:, None], x.view(3)))
    x = torch.arange(3.0)
    expected = [y.clone() for y in compiled(x)]
    for y in compiled(x)[:4]:
        y.fill_(7)
    assert_close(x, torch.arange(3.0))
    assert_close(list(compiled(x)), expected)
    compiled(x)[4].fill_(5)  # a view, as in eager
    assert_close(x, torch.full((3,), 5.0))


def test_outputs_of_one_memory():
    def f(x):
        y = x * 2
        return y, y[1:], y

    for _ in range(2):
        compiled = fl.jit(f)
        compiled(torch.ones(3))
        y, z, same = compiled(torch.ones(3))
        y.zero_()
        assert_close((z, same), (torch.zeros(2), torch.zeros(3)))


def test_nested_containers():
    Point = namedtuple("Point", "x y")
    compiled = fl.jit(lambda p: Point(p.y, {"s": p.x + 1}))
    for _ in range(2):
        got = compiled(Point(torch.zeros(1), torch.ones(1)))
        assert isinstance(got, Point)
        assert_close(got, Point(torch.ones(1), {"s": torch.ones(1)}))


def test_subclasses_and_layouts():
    class Tagged(torch.Tensor):
        pass

    compiled = fl.jit(lambda x: x + 1)
    x = torch.randn(3, 4)
    for given in (x, x.T, x[:, ::2], x.expand(2, 3, 4), nn.Parameter(x), x.as_subclass(Tagged), x[:0]):
        for _ in range(2):
            got = compiled(given)
            assert_close(got.as_subclass(torch.Tensor), given.as_subclass(torch.Tensor) + 1)
            assert got.stride() == (given + 1).stride()


def test_warns_of_many_graphs():
    compiled = fl.jit(lambda x, rate: x * rate)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(10):
            compiled(torch.ones(1), 0.5 + i)
    (warning,) = caught
    assert warning.filename == __file__
    text = str(warning.message)
    assert "was compiled 8 times" in text
    assert "The last time rate was 7.5 and before that 6.5." in text
    assert "pass tensors" in text


def test_a_tensor_in_place_of_a_number():
    clear_compile_cache()
    compiled = fl.jit(lambda x, rate: x * rate)
    for i in range(3):
        assert_close(compiled(torch.ones(1), torch.tensor(float(i))), torch.full((1,), float(i)))
    assert num_of_recompilations() == 1


def test_dynamic_sizes():
    clear_compile_cache()
    compiled = fl.jit(fl.vmap(fl.grad(energy)), dynamic=True)
    for n in (2, 3, 5, 3, 2):
        x = torch.randn(n, 4)
        assert_close(compiled(x), fl.vmap(fl.grad(energy))(x))
    assert num_of_recompilations() == 1


def test_threads():
    compiled = fl.jit(fl.vmap(fl.grad(energy)))
    failures = []

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        for n in (2, 3, 2, 3):
            x = torch.randn(n, 4, generator=generator)
            try:
                assert_close(compiled(x), 2 * (x.sin() * x.flip(1)).sum(1, keepdim=True) * slope(x))
            except BaseException as error:
                failures.append(error)

    def slope(x):
        return x.cos() * x.flip(1) + x.flip(1).sin()

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_lets_go_of_arguments_and_results():
    compiled = fl.jit(lambda x: (x + 1, x.sin()))
    for _ in range(3):
        x = torch.ones(3)
        y, _ = compiled(x)
        watched = [weakref.ref(t) for t in (x, y)]
        del x, y, _
        assert [w() for w in watched] == [None, None]


def test_works_after_an_error():
    compiled = fl.jit(lambda x: x.reshape(2, 2) @ x.reshape(2, 2))
    with pytest.raises(RuntimeError):
        compiled(torch.ones(3))
    assert_close(compiled(torch.ones(4)), torch.full((2, 2), 2.0))
    with pytest.raises(RuntimeError):
        compiled(torch.ones(3))
    assert fl.level_depth() == 0


def test_is_inlined_in_other_transforms_and_tracers():
    inner = fl.jit(lambda x: x.sin() * 2)
    assert_close(fl.jit(lambda x: inner(x) + 1)(torch.ones(2)), torch.ones(2).sin() * 2 + 1)
    graph = fl.make_fx(inner)(torch.ones(2))
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == [
        torch.ops.aten.sin.default,
        torch.ops.aten.mul.Tensor,
    ]


@pytest.mark.parametrize("name", ["per-sample gradients", "a step", "tuples", "vmap of hessian"])
def test_save_and_load(name, tmp_path):
    function, arguments = COMPOSITIONS[name]
    args = arguments()
    fl.jit(function).save(tmp_path / "f.pt2", *args)
    loaded = fl.load(tmp_path / "f.pt2")
    torch.manual_seed(5)
    args = arguments()
    expected = function(*args)
    for _ in range(2):
        assert_close(loaded(*args), expected)
    assert_close(torch.export.load(tmp_path / "f.pt2").module()(*args), expected)


def test_save_and_load_with_state():
    counter, net = torch.zeros(()), network()

    def f(x, *, scale):
        counter.add_(1)
        return net(x) * scale * counter

    file = io.BytesIO()
    fl.jit(f).save(file, torch.ones(3), scale=torch.tensor(2.0))
    assert counter.item() == 0
    file.seek(0)
    loaded = fl.load(file)
    x = torch.randn(3)
    for i in range(1, 4):
        assert_close(loaded(x, scale=torch.tensor(3.0)), net(x) * 3 * i)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x.new_zeros(len(x)) + x.sum(),
        lambda x: x.reshape(len(x), -1).sum(1),
        lambda x: torch.zeros(int(x.shape[0])) + x.sum(),
        lambda x: sum(x[i] for i in range(x.shape[0])),
        lambda x: x.sum() * float(x.shape[0]),
        lambda x: x * 2 if x.shape[0] > 4 else x * 3,
        lambda x: torch.stack(list(x)).cumsum(0),
    ],
)
def test_sizes_that_python_reads_are_not_those_of_other_calls(f):
    compiled = fl.jit(f, dynamic=True)
    for n in (5, 7, 3, 5, 2, 1, 7):
        x = torch.randn(n, 2)
        assert_close(compiled(x), f(x))
