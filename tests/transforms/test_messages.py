"""Every message that a user's mistake can raise: which transform, which argument, what was given, what to do."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import functorch_lite as fl
from functorch_lite import _install, functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

X, M, INT, Z = torch.ones(3), torch.ones(2, 3), torch.arange(3), torch.ones(3, dtype=torch.complex64)
CAPTURED = torch.zeros(3)


def refused(call, kind, *parts):
    """``call`` raises ``kind``, its message has the parts, and no level stays open."""
    with pytest.raises(kind) as caught:
        call()
    for part in parts:
        assert part in str(caught.value), f"{part!r} is not in: {caught.value}"
    assert fl.level_depth() == 0


def cases(*rows):
    return pytest.mark.parametrize(("call", "kind", "parts"), [pytest.param(*row[1:], id=row[0]) for row in rows])


TRANSFORMS = {"vmap": vmap, "grad": grad, "jacrev": jacrev, "jacfwd": jacfwd, "hessian": hessian}
TRANSFORMS |= {"grad_and_value": fl.grad_and_value, "value_and_grad": fl.value_and_grad}
TRANSFORMS |= {"jacobian": fl.jacobian, "value_and_jacobian": fl.value_and_jacobian}
GRADIENTS = [name for name in TRANSFORMS if name != "vmap"]
#: Those that take primals and a direction.
PRODUCTS = ("jvp", "hvp", "vhp")


@pytest.mark.parametrize("name", TRANSFORMS)
def test_no_function(name):
    refused(lambda: TRANSFORMS[name](3), TypeError, f"{name}: expected a function as first argument, got int")


def test_no_function_of_those_that_take_primals():
    refused(lambda: vjp(X, X), TypeError, "vjp: expected a function as first argument, got Tensor")
    refused(lambda: fl.linearize(X, X), TypeError, "linearize: expected a function as first argument, got Tensor")
    refused(lambda: fl.linear_transpose(3, X), TypeError, "linear_transpose: expected a function", "got int")
    for name in PRODUCTS:
        call = lambda name=name: getattr(fl, name)(X, (X,), (X,))
        refused(call, TypeError, f"{name}: expected a function as first argument, got Tensor")
    refused(lambda: fl.gnvp(X, torch.sum, (X,), (X,)), TypeError, "gnvp: expected a function", "got Tensor")
    refused(lambda: fl.gnvp(torch.sin, X, (X,), (X,)), TypeError, "gnvp: expected a function", "got Tensor")


@pytest.mark.parametrize("name", GRADIENTS)
def test_argnums(name):
    call = lambda argnums, *args: TRANSFORMS[name](lambda *args: args[0].sum(), argnums)(*args)
    for wrong in ([0], "x", 1.0, True, (0, "x"), None):
        expected = f"{name}: argnums must be an int or a tuple of ints, got {wrong!r}"
        refused(lambda wrong=wrong: call(wrong, X), TypeError, expected)
    refused(lambda: call((), X), ValueError, f"{name}: argnums is empty; name at least one positional argument")
    refused(lambda: call(1, X), ValueError, f"{name}: argnums=1", "called with 1 positional argument.", "by position")
    refused(
        lambda: call((0, -3), X, X), ValueError, f"{name}: argnums=(0, -3)", "argument -3", "2 positional arguments"
    )
    refused(lambda: call((0, -2), X, X), ValueError, f"{name}: argnums=(0, -2) selects the same argument twice")
    refused(lambda: call(0), ValueError, f"{name}: argnums=0", "0 positional arguments", "by position")


@pytest.mark.parametrize("name", GRADIENTS)
def test_arguments_that_have_no_derivative(name):
    call = lambda arg: TRANSFORMS[name](lambda d, n: X.sum())(arg, 1)
    refused(lambda: call(INT), TypeError, f"{name}: argument 0 has dtype torch.int64", ".to(torch.float32)", "argnums")
    refused(lambda: call({"w": [X, 2.0]}), TypeError, f"{name}: argument 0['w'][1] is a float", "torch.Tensor")
    refused(lambda: call(None), TypeError, f"{name}: argument 0 is a NoneType", "out of argnums")


@cases(
    ("vjp int", lambda: vjp(torch.sin, INT), TypeError, ("vjp: primals[0]", "torch.int64", "vjp(lambda x: f(x, const")),
    ("vjp path", lambda: vjp(lambda d: X, {"a": [1.5]}), TypeError, ("vjp: primals[0]['a'][0] is a float", "capture")),
    ("jvp float", lambda: jvp(torch.mul, (X, 2.0), (X, 1.0)), TypeError, ("jvp: primals[1] is a float", "jvp(lambda")),
    ("jvp int", lambda: jvp(torch.sin, (INT,), (INT,)), TypeError, ("jvp: primals[0]", "torch.int64", "capture it")),
    ("none", lambda: vjp(lambda: X), ValueError, ("vjp: <lambda> was given no primals",)),
    ("list", lambda: jvp(torch.sin, [X], [X]), TypeError, ("jvp: primals must be a tuple", "got list")),
    ("tensor", lambda: jvp(torch.sin, (X,), X), TypeError, ("jvp: tangents must be a tuple", "got Tensor")),
    ("empty", lambda: jvp(torch.sin, (), ()), TypeError, ("jvp: primals must be a tuple", "got an empty tuple")),
    ("number", lambda: jvp(torch.mul, (X, X), (X,)), ValueError, ("jvp: the tangents", "expected (*, *), got (*,)")),
    (
        "shape",
        lambda: jvp(torch.sin, (X,), (M,)),
        ValueError,
        ("jvp: tangents[0]", "shape of primals[0], (3,)", "(2, 3)"),
    ),
    (
        "dtype",
        lambda: jvp(torch.sin, (X,), (X.double(),)),
        ValueError,
        ("jvp: tangents[0]", "torch.float32", "float64"),
    ),
    (
        "no tensor",
        lambda: jvp(torch.sin, (X,), (1.0,)),
        TypeError,
        ("tangents[0] must be a tensor like primals[0]", "float"),
    ),
    (
        "strict",
        lambda: jvp(lambda x: (x, X), (X,), (X,), strict=True),
        ValueError,
        ("output[1]", "strict=False", "zeros"),
    ),
)
def test_primals_and_tangents(call, kind, parts):
    refused(call, kind, *parts)


DIRECTIONS = {
    "hvp": lambda primals, vectors: fl.hvp(lambda *args: args[0].sum(), primals, vectors),
    "vhp": lambda primals, vectors: fl.vhp(lambda *args: args[0].sum(), primals, vectors),
    "gnvp": lambda primals, vectors: fl.gnvp(lambda *args: args[0], torch.sum, primals, vectors),
}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_primals_and_vectors(name):
    call = DIRECTIONS[name]
    refused(lambda: call([X], [X]), TypeError, f"{name}: primals must be a tuple with an entry for each", "got list")
    refused(lambda: call((X,), X), TypeError, f"{name}: vectors must be a tuple", "got Tensor")
    refused(lambda: call((), ()), TypeError, f"{name}: primals must be a tuple", "got an empty tuple")
    refused(lambda: call((X, X), (X,)), ValueError, f"{name}: the vectors", "the primals: expected (*, *), got (*,)")
    refused(lambda: call((X,), (M,)), ValueError, f"{name}: vectors[0] must have the shape of primals[0], (3,)", "2, 3")
    refused(lambda: call((X,), (X.double(),)), ValueError, f"{name}: vectors[0]", "dtype of primals[0], torch.float32")
    refused(lambda: call((X, [X]), (X, [1.0])), TypeError, f"{name}: vectors[1][0] must be a tensor", "got float")
    refused(lambda: call((INT,), (INT,)), TypeError, f"{name}: primals[0] has dtype torch.int64", f"{name}(lambda x")


@pytest.mark.parametrize("name", ["hvp", "vhp"])
def test_values_that_have_no_hessian(name):
    call = lambda func: getattr(fl, name)(func, (X,), (X,))
    refused(lambda: call(torch.sin), ValueError, f"{name}: sin must return a scalar", "got shape (3,)")
    refused(lambda: call(lambda x: (x.sum(), x)), TypeError, f"{name}: <lambda>", "single tensor", "has_aux=True")
    refused(lambda: call(lambda x: x.sum() * 1j), ValueError, name, "complex number (torch.complex64)")


def test_model_and_loss_of_gauss_newton_products():
    call = lambda model, loss: fl.gnvp(model, loss, (X,), (X,))
    refused(lambda: call(torch.sin, torch.cos), ValueError, "gnvp: cos must return a scalar", "got shape (3,)")
    refused(lambda: call(lambda x: {"a": x, "b": 1}, X.sum), TypeError, "gnvp: <lambda>", "int at output['b']")
    expected = ("gnvp: output['i'] of <lambda> has dtype torch.int64", "the loss cannot be differentiated", "only")
    refused(lambda: call(lambda x: {"x": x, "i": x.argmax()}, lambda out: out["x"].sum()), TypeError, *expected)


@pytest.mark.parametrize("name", ["linearize", "linear_transpose"])
def test_primals_of_linear_maps(name):
    transform = getattr(fl, name)
    refused(lambda: transform(lambda: X), ValueError, f"{name}: <lambda> was given no primals to differentiate")
    refused(lambda: transform(torch.neg, INT), TypeError, f"{name}: primals[0] has dtype torch.int64", f"{name}(lambda")
    refused(lambda: transform(lambda d: X, {"a": [1.5]}), TypeError, f"{name}: primals[0]['a'][0] is a float")


PUSH = fl.linearize(lambda tree, x: tree["a"] * x, {"a": X}, X)[1]


def test_tangents_of_a_linear_map():
    refused(lambda: PUSH({"a": X}), ValueError, "jvp_fn: the tangents", "structure of the primals", "got ({'a': *},)")
    refused(lambda: PUSH(({"a": X}, X)), ValueError, "jvp_fn: the tangents", "got (({'a': *}, *),)")
    refused(
        lambda: PUSH({"a": M}, X), ValueError, "jvp_fn: tangents[0]['a'] must have the shape of primals[0]['a'], (3"
    )
    refused(lambda: PUSH({"a": X}, X.double()), ValueError, "jvp_fn: tangents[1]", "torch.float32, got torch.float64")
    refused(lambda: PUSH({"a": X}, 1.0), TypeError, "jvp_fn: tangents[1] must be a tensor like primals[1], got float")
    call = lambda: PUSH({"a": X}, X, retain_graph=True)
    refused(call, TypeError, "jvp_fn: takes tangents by position only", "'retain_graph'", "called many times")


def test_cotangents_of_a_transpose():
    transpose_fn = fl.linear_transpose(lambda x: {"a": x * 2}, X)
    refused(lambda: transpose_fn(X), ValueError, "transpose_fn: the cotangents", "expected {'a': *}, got *")
    refused(lambda: transpose_fn({"a": M}), ValueError, "transpose_fn: the cotangent['a']", "(3,), got (2, 3)")
    refused(lambda: transpose_fn({"a": X}, n=1), TypeError, "transpose_fn: takes cotangents by position only", "'n'")


@pytest.mark.parametrize("func", [torch.square, torch.sin, lambda x: x + 1, lambda x: torch.ones(2), torch.prod])
def test_functions_that_are_not_linear(func):
    name = func.__name__
    refused(lambda: fl.linear_transpose(func, X), ValueError, f"linear_transpose: {name} is not linear", "Use vjp")


PULL = vjp(lambda x: {"a": x, "b": (x,)}, X)[1]


@cases(
    ("none", lambda: PULL(), ValueError, ("vjp_fn: the cotangents", "expected {'a': *, 'b': (*,)}, got ()")),
    ("tensor", lambda: PULL(X), ValueError, ("vjp_fn: the cotangents", "structure of the function's output", "got *")),
    ("type", lambda: PULL({"a": X, "b": [X]}), ValueError, ("got {'a': *, 'b': [*]}, where * is a tensor",)),
    (
        "number",
        lambda: PULL({"a": X, "b": (1.0,)}),
        TypeError,
        ("cotangent['b'][0] must be a tensor like output['b'][0]",),
    ),
    (
        "shape",
        lambda: PULL({"a": M, "b": (X,)}),
        ValueError,
        ("cotangent['a']", "shape of output['a'], (3,), got (2, 3)"),
    ),
    (
        "dtype",
        lambda: PULL({"a": X.double(), "b": (X,)}),
        ValueError,
        ("cotangent['a']", "torch.float32, got torch.float64"),
    ),
)
def test_cotangents(call, kind, parts):
    refused(call, kind, *parts)


def test_options_of_the_pullback():
    call = lambda: PULL({"a": X, "b": (X,)}, retain_graph=True)
    refused(call, TypeError, "vjp_fn: takes cotangents by position only", "'retain_graph'", "called many times")


def test_name_of_the_function():
    def loss(x):
        return x

    refused(lambda: grad(loss)(X), ValueError, "grad: loss must return a scalar")


@pytest.mark.parametrize("name", ["grad", "grad_and_value", "value_and_grad"])
def test_values_that_have_no_gradient(name):
    call = lambda result: TRANSFORMS[name](lambda x: result(x))(X)
    refused(lambda: call(lambda x: x), ValueError, name, "scalar", "got shape (3,)", ".sum()", "jacrev or vjp")
    refused(lambda: call(lambda x: (x.sum(), x)), TypeError, name, "single tensor", "got tuple", "has_aux=True")
    refused(lambda: call(lambda x: {"loss": x.sum()}), TypeError, name, "single tensor", "got dict")
    refused(
        lambda: call(lambda x: x.argmax()), ValueError, name, "torch.int64, which has no gradient", "floating-point"
    )
    refused(lambda: call(lambda x: (x * 1j).sum()), ValueError, name, "complex number (torch.complex64)", ".abs()")
    refused(lambda: call(lambda x: None), TypeError, name, "returned None", "return statement")
    refused(lambda: call(lambda x: x.sum().item()), TypeError, name, "must return a tensor, got float", ".item()")


WITH_AUX = {name: (lambda f, t=TRANSFORMS[name]: t(f, has_aux=True)(X)) for name in GRADIENTS}
WITH_AUX |= {"vjp": lambda f: vjp(f, X, has_aux=True), "linearize": lambda f: fl.linearize(f, X, has_aux=True)}
WITH_AUX |= {name: (lambda f, name=name: getattr(fl, name)(f, (X,), (X,), has_aux=True)) for name in PRODUCTS}


@pytest.mark.parametrize("name", WITH_AUX)
def test_has_aux(name):
    promised = f"{name}: has_aux=True expects <lambda> to return (output, aux), got "
    refused(lambda: WITH_AUX[name](lambda x: x.sum()), TypeError, promised + "Tensor")
    refused(lambda: WITH_AUX[name](lambda x: [x.sum(), x]), TypeError, promised + "list")
    refused(lambda: WITH_AUX[name](lambda x: (x.sum(), x, x)), TypeError, promised + "a tuple of 3")


OUTPUTS = {name: (lambda f, t=TRANSFORMS[name]: t(f)(X)) for name in GRADIENTS if "grad" not in name}
OUTPUTS |= {"vjp": lambda f: vjp(f, X), "jvp": lambda f: jvp(f, (X,), (X,)), "linearize": lambda f: fl.linearize(f, X)}
OUTPUTS["linear_transpose"] = lambda f: fl.linear_transpose(f, X)


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_that_are_no_tensors(name):
    refused(
        lambda: OUTPUTS[name](lambda x: (x, {"n": 3})), TypeError, f"{name}: <lambda>", "int at output[1]['n']", "aux"
    )
    refused(lambda: OUTPUTS[name](lambda x: None), TypeError, f"{name}: <lambda> returned None")
    refused(lambda: OUTPUTS[name](lambda x: 1.0), TypeError, f"{name}: <lambda> must return a tensor, got float")


@pytest.mark.parametrize("name", ["vmap", *(name for name in OUTPUTS if name in TRANSFORMS)])
@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "2"])
def test_chunk_size(name, wrong):
    call = lambda: TRANSFORMS[name](torch.sin, chunk_size=wrong)
    choices = "None or a positive int" if name == "vmap" else "None, 'auto' or a positive int"
    refused(call, ValueError, f"{name}: chunk_size must be {choices}, got {wrong!r}")


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "2 GB", None])
def test_memory_budget(wrong):
    call = lambda: fl.memory_budget(wrong).__enter__()
    refused(call, ValueError, f"memory_budget: expected a positive int, a number of bytes, got {wrong!r}")


@pytest.mark.parametrize("name", ["vmap", "jacfwd", "hessian"])
def test_randomness_setting(name):
    expected = f"{name}: randomness must be 'error', 'same' or 'different', got 'random'"
    refused(lambda: TRANSFORMS[name](torch.sin, randomness="random"), ValueError, expected)


@pytest.mark.parametrize("name", ["jacrev", "jacfwd", "hessian"])
def test_real_output_of_complex_input(name):
    call = lambda: TRANSFORMS[name](lambda z: z.abs().sum())(Z)
    refused(call, ValueError, f"{name}: a real output (torch.float32)", "(torch.complex64)", "grad or vjp")


FIT = "does not fit the"


@cases(
    ("no arguments", lambda: vmap(torch.sin)(), ValueError, ("vmap(sin)", "without positional arguments")),
    ("only kwargs", lambda: vmap(torch.sin)(input=X), ValueError, ("vmap(sin)", "nothing to map over")),
    ("scalar", lambda: vmap(torch.sin)(X.sum()), ValueError, ("vmap(sin): argument 0", "shape is ()", "Pass None")),
    ("range", lambda: vmap(torch.sin, 2)(M), ValueError, ("argument 0 has in_dim 2", "(2, 3)", "[-2, 2)")),
    ("path", lambda: vmap(lambda d: X, -2)({"w": [X]}), ValueError, ("argument 0['w'][0] has in_dim -2", "[-1, 1)")),
    ("float", lambda: vmap(torch.mul)(M, 2.0), ValueError, ("argument 1 has in_dim 0 but is a float", "Pass None")),
    (
        "sizes",
        lambda: vmap(torch.mul)(M, X),
        ValueError,
        ("2 in argument 0 (shape (2, 3)", "3 in argument 1 (shape (3,)"),
    ),
    ("int for none", lambda: vmap(torch.sin, None)(M), ValueError, ("in_dims=None maps no argument", "integer")),
    ("all none", lambda: vmap(torch.mul, (None, None))(M, M), ValueError, ("in_dims=(None, None) maps no argument",)),
    ("no tensor", lambda: vmap(lambda d: X)({}), ValueError, ("in_dims=0 maps no argument", "one tensor")),
    (
        "too few",
        lambda: vmap(torch.mul, (0,))(M, M),
        ValueError,
        (f"in_dims=(0,) {FIT} 2 positional arguments.", "tuple"),
    ),
    ("too many", lambda: vmap(torch.sin, (0, 0))(M), ValueError, (f"in_dims=(0, 0) {FIT} 1 positional argument.",)),
    ("bool", lambda: vmap(torch.sin, True)(M), ValueError, (f"in_dims=True {FIT}", "int or None")),
    ("number", lambda: vmap(torch.sin, 1.0)(M), ValueError, (f"in_dims=1.0 {FIT}",)),
    (
        "keys",
        lambda: vmap(lambda d: X, ({"b": 0},))({"a": M}),
        ValueError,
        (f"in_dims=({{'b': 0}},) {FIT}", "structure"),
    ),
    ("tensor", lambda: vmap(torch.sin, ((0,),))(M), ValueError, (f"in_dims=((0,),) {FIT}",)),
)
def test_in_dims(call, kind, parts):
    refused(call, kind, *parts)


@cases(
    (
        "count",
        lambda: vmap(lambda x: (x, x), 0, (0, 0, 0))(M),
        ValueError,
        ("out_dims=(0, 0, 0)", "output, a tuple", "structure"),
    ),
    ("tensor", lambda: vmap(lambda x: x, 0, (0, 0))(M), ValueError, ("out_dims=(0, 0)", "output, a Tensor")),
    ("text", lambda: vmap(lambda x: x, 0, "0")(M), ValueError, ("out_dims='0'", "int or None")),
    ("range", lambda: vmap(lambda x: (x, x[0]), 0, 1)(M), ValueError, ("out_dims=1", "output[1]", "[-1, 1)")),
    ("none", lambda: vmap(lambda x: {"a": x}, 0, None)(M), ValueError, ("output['a']", "out_dims=None", "differs")),
    ("float", lambda: vmap(lambda x: {"a": [1.0]})(M), TypeError, ("float at output['a'][0]", "out_dims=None")),
    ("chunks", lambda: vmap(lambda x: (x, 1), chunk_size=1)(M), TypeError, ("int at output[1]", "out_dims=None")),
)
def test_outputs_of_vmap(call, kind, parts):
    refused(call, kind, "vmap(<lambda>)", *parts)


PYTHON_VALUE = {
    "item": lambda x: x[0].item(),
    "if": lambda x: x if x.sum() > 0 else -x,
    "float": lambda x: float(x[0]),
    "range": lambda x: range(x[0].long()),
    "index of a list": lambda x: [1, 2][x[0].long()],
    "slice": lambda x: x[: x[0].long()],
    "sorted": lambda x: sorted(x),
    "allclose": lambda x: torch.allclose(x, torch.ones(3)),
    "equal": lambda x: torch.equal(x, torch.ones(3)),
    "any": lambda x: x if (x > 1).any().item() else -x,
    "empty batch": lambda x: vmap(lambda y: y if y > 0 else -y)(x[:0]),
}


@pytest.mark.parametrize("name", PYTHON_VALUE)
def test_python_values_of_a_batch(name):
    two = torch.tensor([[1.0, 1.0, 1.0], [2.0, -3.0, 0.0]])
    refused(
        lambda: vmap(PYTHON_VALUE[name])(two), NotImplementedError, "vmap: aten::", "test_messages.py:", "torch.where"
    )


def test_truth_of_several_elements():
    refused(lambda: vmap(lambda x: x if x > 0 else -x)(M), RuntimeError, "of shape [3] is ambiguous")


DATA_DEPENDENT = {
    "nonzero": torch.nonzero,
    "mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": torch.unique,
    "bincount": lambda x: torch.bincount(x.long().abs()),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long().abs()),
    "tensor_split": lambda x: x.tensor_split(x[:1].long()),
}


@pytest.mark.filterwarnings("ignore::functorch_lite.LoopFallbackWarning")
@pytest.mark.parametrize("name", DATA_DEPENDENT)
def test_shapes_that_depend_on_the_data(name):
    other_sizes = torch.tensor([[1.0, 1.0, 0.0], [2.0, -3.0, 0.0], [3.0, 3.0, 3.0]])
    refused(
        lambda: vmap(DATA_DEPENDENT[name])(other_sizes),
        NotImplementedError,
        "vmap: aten::",
        "test_messages.py:",
        "depends on the data",
        "in one example" if name != "unique" else "in example 0",
        "torch.where",
    )


MEMORY = {
    "numpy": lambda x: x.detach().numpy(),
    "tolist": lambda x: x.tolist(),
    "data_ptr": lambda x: x.data_ptr(),
    "storage": lambda x: x.untyped_storage(),
    "pickle": lambda x: pickle.dumps(x),
    "deepcopy": lambda x: copy.deepcopy(x),
}


@pytest.mark.parametrize("name", MEMORY)
def test_memory_of_a_tensor_inside(name):
    refused(lambda: vmap(MEMORY[name])(M), RuntimeError, "no memory of its own", ".numpy()", "x.clone()", "returns")


def test_other_things_that_pytorch_refuses_inside():
    leaf = M.clone().requires_grad_()
    refused(lambda: vmap(lambda x: x.sum().backward())(leaf), RuntimeError, "vmap: backward()", "vmap(grad(f))")
    refused(lambda: vmap(lambda x: torch.tensor([x[0], x[1]]))(M), RuntimeError, "vmap: torch.tensor", "torch.stack([")
    refused(
        lambda: vmap(lambda x: setattr(x, "data", CAPTURED))(M), RuntimeError, "tensor.data = ...", "Return the new"
    )


WRITES = {
    "add_": lambda x: CAPTURED.add_(x),
    "copy_": lambda x: CAPTURED.copy_(x),
    "index": lambda x: CAPTURED.__setitem__(0, x[0]),
    "out": lambda x: torch.sin(x, out=CAPTURED),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_of_a_batch_into_what_is_none(name):
    refused(
        lambda: vmap(WRITES[name])(M),
        ValueError,
        "vmap: the in-place operator aten::",
        "writes batched values into `CAPTURED`, a tensor from outside the mapped function (shape [",
        "CAPTURED = CAPTURED.clone()",
    )


@pytest.mark.parametrize("name", ["grad", "jvp", "vjp"])
def test_writes_into_captured_tensors(name):
    f = lambda x: CAPTURED.copy_(x).sum()
    call = {"grad": lambda: grad(f)(X), "vjp": lambda: vjp(f, X), "jvp": lambda: jvp(f, (X,), (X,))}[name]
    refused(
        call,
        ValueError,
        f"{name}: ",
        "aten::copy_",
        "`CAPTURED`, a tensor captured from outside (shape [3]",
        "derivative would be lost",
        "CAPTURED.clone()",
    )


@pytest.mark.parametrize("name", ["grad", "jacrev", "vjp", "linearize"])
def test_graph_that_is_freed_inside(name):
    def f(x, **options):
        y = x.exp()
        (slope,) = torch.autograd.grad(y.sum(), x, **options)
        return (slope.detach() + y).sum()

    call = {
        "grad": lambda f: grad(f)(X),
        "jacrev": lambda f: jacrev(f)(X),
        "vjp": lambda f: vjp(f, X)[1](torch.tensor(1.0))[0],
        "linearize": lambda f: fl.linearize(f, X)[1](torch.ones(3)),
    }[name]
    refused(
        lambda: call(f), RuntimeError, name, "freed the part of the graph", "retain_graph=True", "functorch_lite.grad"
    )
    call(lambda x: f(x, retain_graph=True))


NO_DERIVATIVE = {
    "igamma": (lambda x: torch.igamma(x, x).sum(), ("operator igamma", "by its argument 'input'", "custom_vjp")),
    "heaviside": (lambda x: torch.heaviside(x, x).sum(), ("operator heaviside", "has no derivative", "detach")),
    "geqrf": (lambda x: torch.geqrf(torch.diag(x))[0].sum(), ("operator geqrf", "has no derivative")),
    "out": (lambda x: torch.sin(x, out=torch.zeros(3)).sum(), ("sin(..., out=tensor)", "copy_(result)")),
    "airy": (lambda x: torch.special.airy_ai(x).sum(), ("special_airy_ai", "constant, which it is not", "custom_vjp")),
}


@pytest.mark.parametrize("name", ["grad", "jvp", "jacrev", "hessian", "vjp_fn"])
@pytest.mark.parametrize("operator", NO_DERIVATIVE)
def test_operators_without_derivative(operator, name):
    f, parts = NO_DERIVATIVE[operator]
    call = {
        "grad": lambda: grad(f)(X),
        "jvp": lambda: jvp(f, (X,), (X,)),
        "jacrev": lambda: jacrev(f)(X),
        "hessian": lambda: hessian(f)(X),
        "vjp_fn": lambda: vjp(f, X)[1](torch.tensor(1.0)),
    }[name]
    refused(call, (NotImplementedError, RuntimeError), name.removesuffix("_fn"), *parts)


@cases(
    ("error", lambda: vmap(torch.rand_like)(M), RuntimeError, ("aten::rand_like", "test_messages.py:", "='same'")),
    (
        "factory",
        lambda: vmap(lambda x: torch.randn(2))(M),
        RuntimeError,
        ("random operator aten::randn", "='different'"),
    ),
    (
        "fill",
        lambda: vmap(lambda x: CAPTURED.normal_(), randomness="different")(M),
        ValueError,
        ("aten::normal_", "from outside the mapped function (shape [3])", "torch.empty_like(x)"),
    ),
    (
        "rrelu_",
        lambda: vmap(lambda x: torch.rrelu_(CAPTURED, training=True), randomness="different")(M),
        ValueError,
        ("rrelu_with_noise_", "its own copy"),
    ),
    (
        "probability",
        lambda: vmap(lambda x: torch.dropout(x, 2.0, True), randomness="same")(M),
        ValueError,
        ("dropout: p is a probability, got 2",),
    ),
)
def test_random_operators(call, kind, parts):
    refused(call, kind, *parts)


@pytest.fixture(scope="module")
def library():
    """Operators without rules: one draws random numbers, one returns a number."""
    library = torch.library.Library("test_messages", "DEF")
    library.define("draw(Tensor x) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
    library.impl("draw", lambda x: torch.rand(x.shape), "CPU")
    library.define("count(Tensor x) -> int")
    library.impl("count", lambda x: 3, "CPU")
    yield torch.ops.test_messages
    library._destroy()


@pytest.mark.filterwarnings("ignore::functorch_lite.LoopFallbackWarning")
def test_operators_without_rules(library):
    refused(lambda: vmap(library.draw)(M), RuntimeError, "random operator test_messages::draw", "randomness='error'")
    refused(lambda: vmap(library.count)(M), NotImplementedError, "test_messages::count", "result is not a tensor")


def test_data_of_another_level():
    def f(y):
        def g(x):
            x.data = y
            return x.sum()

        return grad(g)(y * 2).sum()

    refused(lambda: grad(f)(X), RuntimeError, "tensor.data = ...", "of the same transform", "Return the new tensor")


def test_noise_that_is_not_batched():
    f = lambda x: torch._C._nn.rrelu_with_noise(x, CAPTURED, 0.1, 0.3, True)
    call = lambda: vmap(f, randomness="different")(M)
    refused(call, ValueError, "rrelu_with_noise", "from outside the mapped function", "its own copy")


def test_escaped_tensors():
    kept = []
    vmap(lambda x: kept.append(x) or x)(M)
    parts = ("shape [3]", "after that vmap has returned", "Return the tensor from the function")
    refused(lambda: kept[0] + 1, fl.EscapedTensorError, *parts)
    refused(lambda: vmap(lambda x: x + kept[0])(M), fl.EscapedTensorError, *parts)


LINEAR, PARAMS = nn.Linear(3, 2), dict(nn.Linear(3, 2).named_parameters())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.ones(3))
        self.b = self.a


@cases(
    ("module", lambda: functional_call(torch.sin, {}, X), TypeError, ("expected a module", "builtin_function")),
    ("dict", lambda: functional_call(LINEAR, X, X), TypeError, ("dictionary of tensors by name", "got Tensor")),
    ("list", lambda: functional_call(LINEAR, [X], X), TypeError, ("list of such dictionaries", "a list of Tensor")),
    ("value", lambda: functional_call(LINEAR, {"weight": 1}, X), TypeError, ("'weight' must be a tensor, got int",)),
    (
        "twice",
        lambda: functional_call(LINEAR, [PARAMS, PARAMS], X),
        ValueError,
        ("'weight' is given in more than one",),
    ),
    ("name", lambda: functional_call(LINEAR, {"wieght": X}, X), ValueError, ("Linear has no parameter", "'wieght'")),
    (
        "path",
        lambda: functional_call(LINEAR, {"a.weight": X}, X),
        ValueError,
        ("no parameter or buffer named 'a.weight'",),
    ),
    (
        "tied",
        lambda: functional_call(Tied(), {"a": X, "b": X + 1}),
        ValueError,
        ("'a', 'b' share", "tie_weights=False"),
    ),
    (
        "strict",
        lambda: functional_call(LINEAR, {}, X, strict=True),
        ValueError,
        ("strict=True", "'bias', 'weight' are not"),
    ),
    ("kwargs", lambda: functional_call(LINEAR, {}, X, (1,)), TypeError, ("kwargs must be a dictionary, got tuple",)),
)
def test_functional_call(call, kind, parts):
    refused(call, kind, "functional_call: ", *parts)


@cases(
    ("none", lambda: stack_module_state([]), ValueError, ("at least one module",)),
    ("one", lambda: stack_module_state(LINEAR), TypeError, ("expected a list of modules, got one Linear",)),
    ("tensors", lambda: stack_module_state([X, X]), TypeError, ("got a list of Tensor",)),
    (
        "mode",
        lambda: stack_module_state([nn.Linear(1, 1), nn.Linear(1, 1).eval()]),
        ValueError,
        ("training mode", "eval"),
    ),
    ("class", lambda: stack_module_state([LINEAR, nn.ReLU()]), ValueError, ("one class, got Linear, ReLU",)),
    (
        "shape",
        lambda: stack_module_state([LINEAR, nn.Linear(3, 4)]),
        ValueError,
        ("'weight'", "shapes [(2, 3), (4, 3)]"),
    ),
    (
        "dtype",
        lambda: stack_module_state([LINEAR, nn.Linear(3, 2).double()]),
        ValueError,
        ("dtypes [torch.float32, torch.f",),
    ),
    (
        "name",
        lambda: stack_module_state([nn.Linear(3, 2, False), LINEAR]),
        ValueError,
        ("only some", "parameter 'bias'"),
    ),
)
def test_stack_module_state(call, kind, parts):
    refused(call, kind, "stack_module_state: ", *parts)


def test_batch_norm():
    norm = nn.BatchNorm1d(3)
    refused(
        lambda: vmap(norm)(torch.ones(2, 4, 3)), ValueError, "running statistics", "replace_all_batch_norm_modules_"
    )
    refused(lambda: fl.replace_all_batch_norm_modules_(3), TypeError, "replace_all_batch_norm_modules_", "got int")


def test_installation(monkeypatch):
    with pytest.raises(ImportError, match=r"(?s)built for torch 1\.0, but torch 2\.0 is running.*pip install"):
        _install.check_torch_version("1.0", "2.0")
    monkeypatch.setitem(__import__("sys").modules, "functorch_lite._built_for", None)
    with pytest.raises(ImportError, match="(?s)extension is not built.*pip install"):
        _install._built_for()


def test_loop_warning_points_at_the_line():
    with pytest.warns(
        fl.LoopFallbackWarning, match="aten::unique_consecutive has no batching rule.*docs/batching_rules.md"
    ) as caught:
        vmap(torch.unique_consecutive)(M)
    assert caught[0].filename == __file__


def test_tracebacks_show_the_users_lines_only(monkeypatch):
    def files():
        with pytest.raises(ValueError, match="scalar") as caught:
            vmap(grad(lambda x: x))(M)
        return [str(entry.path) for entry in caught.traceback]

    monkeypatch.delenv("FUNCTORCH_LITE_FULL_TRACEBACK", raising=False)
    assert all(file == __file__ for file in files())
    monkeypatch.setenv("FUNCTORCH_LITE_FULL_TRACEBACK", "1")
    assert any("functorch_lite/_vjp.py" in file for file in files())


def test_users_own_errors_pass_unchanged():
    def fails(x):
        raise KeyError("mine")

    for call in (
        lambda: vmap(fails)(M),
        lambda: grad(fails)(X),
        lambda: hessian(fails)(X),
        lambda: vmap(grad(fails))(M),
    ):
        refused(call, KeyError, "mine")
