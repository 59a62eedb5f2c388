"""`overlay`: our transforms in the places of PyTorch's, and the two kinds of transforms inside each other."""

import importlib
import inspect
import itertools
import pickle
import sys
import threading
import types

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import functorch_lite as fl
from functorch_lite import _overlay, level_depth, overlay

NAMES = sorted(set(dir(torch.func)) & set(_overlay._OURS))
PLACES = [importlib.import_module(place) for place in _overlay._PLACES]


def depth_inside(vmap):
    """How many levels of ours ``vmap`` opens."""
    depths = []
    vmap(lambda x: (depths.append(level_depth()), x)[1])(torch.ones(2))
    return depths[0]


def contents():
    """Every attribute of the modules of PyTorch, and of this one."""
    modules = [m for name, m in sys.modules.items() if name.partition(".")[0] in ("torch", "functorch", "tests")]
    return {(m.__name__, name): id(value) for m in modules for name, value in vars(m).items() if callable(value)}


@pytest.fixture
def client():
    """A loaded module of another package, which imports from PyTorch in all the ways."""
    module = types.ModuleType("client_of_torch_func")
    sys.modules[module.__name__] = module
    exec("import torch\nfrom torch.func import vmap as mapped, grad\nfrom torch import vmap", module.__dict__)
    yield module
    del sys.modules[module.__name__]


# In place, and taken back.


def test_all_public_transforms_are_ours_inside_and_pytorchs_outside(client):
    import functorch

    def found():
        return [torch.vmap, torch.func.vmap, functorch.vmap, client.vmap, client.mapped, client.torch.func.vmap]

    before = found()
    assert [depth_inside(vmap) for vmap in before[:2]] == [0, 0]
    with overlay():
        assert [depth_inside(vmap) for vmap in found()] == [1] * 6
        exec("from torch._functorch.apis import vmap as imported_meanwhile", client.__dict__)
        assert depth_inside(client.imported_meanwhile) == 1
    assert all(a is b for a, b in zip(found(), before, strict=True))
    assert client.imported_meanwhile is torch.vmap


def test_everything_is_as_before():
    importlib.import_module("functorch.experimental")
    before = contents()
    with overlay():
        inside = contents()
    changed = {name for (_, name), value in inside.items() if before.get((_, name)) != value}
    assert set(NAMES) <= changed
    assert contents() == before


def test_names_that_stay_pytorchs_are_those_of_the_documentation():
    public = {name for name in dir(torch.func) if not name.startswith("_")}
    assert public - set(_overlay._OURS) == {"debug_unwrap", "rearrange"}
    before = torch.func.debug_unwrap, torch.func.rearrange
    with overlay():
        assert before == (torch.func.debug_unwrap, torch.func.rearrange)


def test_own_imports_of_ours_stay(client):
    client.own = fl.vmap
    with overlay():
        pass
    assert client.own is fl.vmap
    assert fl.vmap is not torch.vmap


def test_blocks_nest_and_end_with_exceptions():
    block = overlay()
    with block, block:
        with pytest.raises(KeyError), overlay():
            raise KeyError
        assert depth_inside(torch.vmap) == 1
    assert depth_inside(torch.vmap) == 0


def test_installed_for_the_program():
    try:
        overlay.install()
        overlay.install()
        with overlay():
            pass
        assert depth_inside(torch.vmap) == 1
        with overlay():
            overlay.remove()
            assert depth_inside(torch.vmap) == 1
        assert depth_inside(torch.vmap) == 0
        overlay.remove()
        assert depth_inside(torch.vmap) == 0
    finally:
        overlay.remove()


def test_threads(client):
    """Whoever is inside of a block sees ours, whatever the others do."""
    before, seen = client.vmap, []

    def work():
        for _ in range(10):
            with overlay():
                seen.append(depth_inside(client.vmap) + depth_inside(torch.func.vmap))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [2] * 40
    assert client.vmap is before is torch.vmap


def test_pickles_as_pytorchs():
    with overlay():
        pickled = pickle.dumps(torch.func.vmap)
        assert pickle.loads(pickled) is torch.func.vmap
    assert pickle.loads(pickled) is torch.func.vmap


def test_pytorch_uses_its_own():
    """Flex attention maps mask functions by torch.vmap, which is not ours for it."""
    from torch.nn.attention.flex_attention import create_block_mask

    depths = []

    def causal(batch, head, query, key):
        depths.append(level_depth())
        return query >= key

    expected = create_block_mask(causal, 1, 1, 16, 16, device="cpu").to_dense()
    with overlay():
        assert_close(create_block_mask(causal, 1, 1, 16, 16, device="cpu").to_dense(), expected)
    assert set(depths) == {0}


@pytest.mark.slow
def test_torch_compile():
    """Compiled functions use what is in place when they are compiled. Dynamo knows PyTorch's own all the time."""
    f = lambda x: torch.func.vmap(torch.func.grad(lambda x: x.sin().sum()))(x)
    x = torch.randn(4, 3)
    outside = torch.compile(f, fullgraph=True, backend="eager")
    assert_close(outside(x), x.cos())
    with overlay():
        inside = torch.compile(f, fullgraph=True, backend="eager")
        assert_close(inside(x), x.cos())
        assert_close(outside(x), x.cos())
    assert_close(inside(x), x.cos())
    assert_close(outside(x), x.cos())


@pytest.mark.slow
def test_dynamo_imported_meanwhile():
    """In a process of its own: Dynamo looks up PyTorch's transforms when it is imported."""
    import subprocess

    script = (
        "import torch, functorch_lite\n"
        "own = [torch.func.jacrev]  # not by a name that is replaced\n"
        "with functorch_lite.overlay():\n"
        "    stand_in = torch.func.jacrev\n"
        "    import torch._dynamo\n"
        "    from torch._dynamo.trace_rules import get_torch_obj_rule_map\n"
        "    assert own[0] in get_torch_obj_rule_map() and stand_in not in get_torch_obj_rule_map()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Arguments: all that PyTorch's accept.


def f(x, y=None):
    return (x.sin() * (1 if y is None else y)).sum()


def pair(x, y=None):
    return f(x, y), x.cos()


X, Y = torch.linspace(0, 1, 6, dtype=torch.float64).view(2, 3), torch.linspace(2, 3, 6, dtype=torch.float64).view(2, 3)
MODEL = nn.Linear(3, 2).double()
STATE = {name: p.detach() + 1 for name, p in MODEL.named_parameters()}
ARGUMENTS = {
    "vmap": [
        lambda t: t.vmap(f, in_dims=(1, None), out_dims=0, randomness="same", chunk_size=2)(X, Y[:, 0]),
        lambda t: t.vmap(pair, -1, (0, 1), "different")(X, y=2.0),
        lambda t: t.vmap(lambda d: d["a"] + d["b"][0], in_dims=({"a": 0, "b": None},))({"a": X, "b": [Y[0]]}),
    ],
    "grad": [lambda t: t.grad(f, argnums=(0, 1))(X, Y), lambda t: t.grad(pair, 0, True)(X, y=Y)],
    "grad_and_value": [
        lambda t: t.grad_and_value(f, argnums=1)(X, Y),
        lambda t: t.grad_and_value(pair, has_aux=True)(X),
    ],
    "jacrev": [
        lambda t: t.jacrev(lambda x, y: x * y, argnums=(0, 1), chunk_size=2, _preallocate_and_copy=True)(X, Y),
        lambda t: t.jacrev(pair, has_aux=True)(X),
    ],
    "jacfwd": [
        lambda t: t.jacfwd(lambda x, y: x * y, argnums=1, randomness="same")(X, Y),
        lambda t: t.jacfwd(pair, 0, True)(X),
    ],
    "hessian": [lambda t: t.hessian(f, argnums=(0, 1))(X, Y)],
    "vjp": [
        lambda t: t.vjp(f, X, Y)[1](torch.tensor(2.0).double(), retain_graph=True, create_graph=False),
        lambda t: [t.vjp(pair, X, has_aux=True)[i] for i in (0, 2)],
    ],
    "jvp": [
        lambda t: t.jvp(f, (X, Y), (Y, X), strict=True),
        lambda t: t.jvp(func=pair, primals=(X,), tangents=(Y,), has_aux=True),
    ],
    "linearize": [lambda t: t.linearize(lambda x: x.sin() * 2, X)[1](Y), lambda t: t.linearize(f, X, Y)[0]],
    "functionalize": [lambda t: t.functionalize(lambda x: x.clone().add_(1), remove="mutations_and_views")(X)],
    "functional_call": [
        lambda t: t.functional_call(MODEL, STATE, X),
        lambda t: t.functional_call(MODEL, parameter_and_buffer_dicts=(STATE,), args=(X,), kwargs={}, strict=True),
        lambda t: t.functional_call(MODEL, STATE, (), {"input": X}, tie_weights=False),
    ],
    "stack_module_state": [lambda t: t.stack_module_state([MODEL, nn.Linear(3, 2).double()])[0]["weight"][0]],
    "replace_all_batch_norm_modules_": [
        lambda t: t.replace_all_batch_norm_modules_(nn.Sequential(nn.BatchNorm1d(3))).double()(X)
    ],
}


@pytest.mark.parametrize(
    ("name", "call"),
    [(name, call) for name, calls in ARGUMENTS.items() for call in calls],
    ids=lambda value: str(value)[:20],
)
def test_arguments_of_pytorchs(name, call):
    expected, signature = call(torch.func), inspect.signature(getattr(torch.func, name))
    with overlay():
        assert_close(call(torch.func), expected)
        assert inspect.signature(getattr(torch.func, name)) == signature


def test_all_are_called():
    assert sorted(ARGUMENTS) == NAMES


class Holder(nn.Module):
    """Reads a tensor that is no parameter and no buffer."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.offset = torch.zeros(3)

    def forward(self, x):
        return self.inner(x) + self.offset + getattr(self, "extra", 0)


def test_functional_call_takes_names_that_a_module_does_not_have():
    module, x = Holder(), torch.ones(2, 3)
    state = {
        "offset": torch.ones(3),
        "extra": torch.ones(3),
        "inner.unused": torch.ones(3),
        "inner.bias": torch.zeros(3),
    }
    call = lambda: torch.func.functional_call(module, state, (x,))
    expected = call()
    with overlay():
        assert_close(call(), expected)
        with pytest.raises(ValueError, match="offset"):
            torch.func.functional_call(module, state, (x,), strict=True)
        with pytest.raises(ZeroDivisionError):
            torch.func.functional_call(module, {"extra": x}, (1 / 0,))
    assert not hasattr(module, "extra")
    assert not hasattr(module.inner, "unused")
    assert_close(module.offset, torch.zeros(3))


# One kind of transform inside the other, without the overlay.


def transforms(library):
    return {
        "grad": lambda f: library.grad(f),
        "jacrev": lambda f: library.jacrev(f),
        "jacfwd": lambda f: library.jacfwd(f),
        "hessian": lambda f: library.hessian(f),
        "vjp": lambda f: lambda x: library.vjp(f, x)[1](torch.ones((), dtype=x.dtype))[0],
        "jvp": lambda f: lambda x: library.jvp(f, (x,), (torch.ones_like(x),))[1],
        "linearize": lambda f: lambda x: library.linearize(f, x)[1](torch.ones_like(x)),
        "vmap": lambda f: lambda x: library.vmap(lambda factor: f(factor * x))(torch.arange(1.0, 3.0, dtype=x.dtype)),
        "functionalize": lambda f: library.functionalize(f),
    }


OURS, THEIRS = transforms(fl), transforms(torch.func)
FORWARD = {"jacfwd", "hessian", "jvp"}


def cubic(x):
    return (x.sin() * x).sum()


@pytest.mark.parametrize(("outer", "inner"), itertools.product(OURS, THEIRS))
def test_theirs_inside_ours(outer, inner):
    def nested(inner):
        return OURS[outer](lambda x: inner(cubic)(x).sin().sum())(X[1])

    if inner == "linearize" and outer not in (*FORWARD, "vmap"):
        with pytest.raises(
            NotImplementedError, match="torch.func.linearize: got a call inside .* functorch_lite.linearize"
        ):
            nested(THEIRS[inner])
    elif inner == "linearize" and outer == "vmap":
        with pytest.raises(NotImplementedError, match="Use functorch_lite.jvp"):
            nested(THEIRS[inner])
    elif inner in {*FORWARD, "linearize"} and outer in FORWARD:
        with pytest.raises(RuntimeError, match="got torch.func.jvp, .*, inside forward mode of functorch_lite"):
            nested(THEIRS[inner])
    else:
        assert_close(nested(THEIRS[inner]), nested(OURS[inner]))


@pytest.mark.parametrize(("outer", "inner"), itertools.product(THEIRS, OURS))
def test_ours_inside_theirs(outer, inner):
    if outer == "linearize":  # a traced graph and no transform of PyTorch's interpreter
        nested = lambda outer: outer(lambda x: OURS[inner](cubic)(x).sin().sum())(X[1])
        assert_close(nested(THEIRS[outer]), nested(OURS[outer]))
        return
    with pytest.raises(
        RuntimeError, match=r"\w+: got a call inside a transform of torch.func.* functorch_lite.overlay"
    ):
        THEIRS[outer](lambda x: OURS[inner](cubic)(x).sum())(X[1])
    assert_close(OURS[inner](cubic)(X[1]), OURS[inner](cubic)(X[1]))
    assert level_depth() == 0


def test_theirs_returned_from_inside_ours():
    """A vjp of torch.func leaves wrappers behind, which carry our derivatives."""

    def pulled_late(x):
        kept = []
        _, pull = torch.func.vjp(lambda y: (kept.append(y), y.sin() * y)[1], x)
        return (pull(x)[0] * kept[0] + kept[0].exp()).sum()

    expected = lambda x: ((x.cos() * x + x.sin()) * x * x + x.exp()).sum()
    x = X[1]
    assert_close(fl.grad(pulled_late)(x), fl.grad(expected)(x))
    assert_close(fl.vmap(pulled_late)(X), torch.stack([expected(row) for row in X]))
    assert_close(fl.vmap(fl.grad(pulled_late))(X), fl.vmap(fl.grad(expected))(X))
    assert_close(fl.jvp(pulled_late, (x,), (x,)), fl.jvp(expected, (x,), (x,)))


class Doubled(torch.autograd.Function):
    """Twice the derivative of the sine, so that nobody can miss it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, cotangent):
        return 2 * cotangent * ctx.saved_tensors[0].cos()


@pytest.mark.parametrize("outer", ["grad", "vmap", "jacrev", "functionalize"])
def test_functions_and_new_tensors_inside_theirs_inside_ours(outer):
    f = lambda x: (Doubled.apply(x) * x.new_tensor([2.0]) + x.new(3).zero_()).sum()
    nested = lambda inner: OURS[outer](lambda x: inner(f)(x).sum())(X[1])
    assert_close(nested(torch.func.grad), nested(fl.grad))
    assert_close(fl.grad(f)(X[1]), 4 * X[1].cos())


def test_a_batched_number_inside_torch_func():
    number = torch.tensor([1, 2])
    mapped = lambda number: fl.vmap(lambda n, x: torch.func.vmap(lambda y: y * n)(x))(number, X)
    with pytest.raises(RuntimeError, match=r"torch.func got an integer without dimensions .* n\[None\]"):
        mapped(number)
    assert_close(mapped(number[:, None]), (X * number[:, None])[:, :, None])


def jacobian(vectorize, create_graph=False):
    def of(f):
        return lambda x: torch.autograd.functional.jacobian(f, x, create_graph=create_graph, vectorize=vectorize)

    return of


AUTOGRAD = {
    "jacobian": jacobian(vectorize=False),
    "vectorized jacobian": jacobian(vectorize=True),
    "hessian": lambda f: lambda x: torch.autograd.functional.hessian(lambda x: f(x).sum(), x, vectorize=True),
    "vjp": lambda f: lambda x: torch.autograd.functional.vjp(f, x, torch.ones_like(x))[1],
    "hvp": lambda f: lambda x: torch.autograd.functional.hvp(lambda x: f(x).sum(), x, torch.ones_like(x))[1],
}


@pytest.mark.parametrize("name", AUTOGRAD)
@pytest.mark.parametrize("outer", ["grad", "jacrev", "vjp"])
def test_autograd_functional_inside_reverse_mode(outer, name):
    """Its results are constants unless asked otherwise."""
    inner, weight = AUTOGRAD[name], torch.arange(1.0, 4.0, dtype=torch.float64)
    f = lambda x: x.sin() * x.sum()
    constant = inner(f)(X[1])
    nested = OURS[outer](lambda x: (inner(f)(x) * x * weight).sum())(X[1])
    assert_close(nested, OURS[outer](lambda x: (constant * x * weight).sum())(X[1]))


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("outer", ["grad", "jacrev", "vjp"])
def test_jacobians_of_autograd_are_differentiated(outer, vectorize):
    f = lambda x: x.sin() * x.sum()
    nested = lambda inner: OURS[outer](lambda x: (inner(f)(x) * x).sum())(X[1])
    assert_close(nested(jacobian(vectorize, create_graph=True)), nested(fl.jacrev))


@pytest.mark.parametrize("name", AUTOGRAD)
@pytest.mark.parametrize("outer", ["vmap", "jvp", "functionalize"])
def test_autograd_functional_elsewhere(outer, name):
    with pytest.raises(
        NotImplementedError, match=rf"torch.autograd.functional: got a call inside {outer} of functorch_lite"
    ):
        OURS[outer](lambda x: AUTOGRAD[name](lambda x: x.sin() * x.sum())(x).sum())(X[1])


def test_batched_gradients_of_autograd():
    def rows(x):
        x = x.detach().requires_grad_()
        y = x.sin() * x.sum()
        return torch.autograd.grad(y, x, torch.eye(3, dtype=x.dtype), is_grads_batched=True)[0]

    f = lambda x: x.sin() * x.sum()
    assert_close(rows(X[1]), fl.jacrev(f)(X[1]))
    assert_close(fl.grad(lambda x: (rows(x) * x).sum())(X[1]), fl.jacrev(f)(X[1]).sum(0))


# The old interface of functorch.


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(3)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x, *, scale=1.0):
        return self.norm(self.second(self.first(x)) * self.frozen) * scale


@pytest.mark.filterwarnings("ignore:We've integrated functorch")
@pytest.mark.parametrize("disable", [False, True])
def test_make_functional_with_buffers(disable):
    import functorch

    torch.manual_seed(0)
    model, x = Tied(), torch.randn(4, 3)
    results = []
    for library in (functorch, fl):
        func, params, buffers = library.make_functional_with_buffers(model, disable_autograd_tracking=disable)
        requires = [p.requires_grad for p in params]
        output = func(params, buffers, x, scale=2.0)
        gradients = fl.grad(lambda params: func(params, buffers, x, scale=2.0).pow(3).sum())(params)  # noqa: B023
        results.append((func.param_names, func.buffer_names, requires, output, gradients, params, buffers))
        assert isinstance(params, tuple)
        assert isinstance(func, nn.Module)
    theirs, ours = results
    assert ours[:3] == theirs[:3]
    assert_close(ours[3:], theirs[3:])
    assert model.norm.num_batches_tracked == 0  # the given tensors are written


@pytest.mark.filterwarnings("ignore:We've integrated functorch")
def test_make_functional():
    import functorch

    model, x = nn.Sequential(nn.Linear(3, 2), nn.Tanh()), torch.randn(4, 3)
    func, params = fl.make_functional(model)
    their_func, their_params = functorch.make_functional(model)
    assert_close(params, their_params)
    assert func.param_names == their_func.param_names
    assert_close(func([p + 1 for p in params], x), their_func([p + 1 for p in params], x))
    params[0].data.zero_()
    assert model[0].weight.any()  # a copy
    assert all(p.is_meta for p in func.parameters())


@pytest.mark.filterwarnings("ignore:We've integrated functorch")
def test_combine_state_for_ensemble():
    import functorch

    models, x = [Tied().eval() for _ in range(3)], torch.randn(4, 3)
    func, params, buffers = fl.combine_state_for_ensemble(models)
    their_func, their_params, their_buffers = functorch.combine_state_for_ensemble(models)
    assert_close(params, their_params)
    assert_close(buffers, their_buffers)
    assert not any(p.requires_grad for p in params)
    outputs = fl.vmap(func, in_dims=(0, 0, None))(params, buffers, x)
    assert_close(outputs, torch.stack([model(x) for model in models]))
    assert_close(outputs, torch.vmap(their_func, in_dims=(0, 0, None))(params, buffers, x))


@pytest.mark.filterwarnings("ignore:We've integrated functorch")
def test_the_overlay_has_the_old_interface():
    import functorch

    with overlay():
        func, _ = functorch.make_functional(nn.Linear(3, 2))
        assert isinstance(func, functorch.FunctionalModule)
        assert isinstance(func, _overlay._legacy.FunctionalModule)
    assert not isinstance(func, functorch.FunctionalModule)


def test_messages_of_the_old_interface():
    with pytest.raises(
        RuntimeError, match=r"make_functional: got a module with buffers \(running_mean, .*make_functional_with_"
    ):
        fl.make_functional(nn.BatchNorm1d(3))
    with pytest.raises(TypeError, match="make_functional: expected a module as first argument, got int"):
        fl.make_functional(3)
    func, params = fl.make_functional(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="FunctionalModule: got 1 parameter tensors, expected 2: weight, bias"):
        func(params[:1], torch.ones(3))
    with pytest.raises(ValueError, match="stack_module_state: expected at least one module"):
        fl.combine_state_for_ensemble([])
