"""Every message of functorch_lite.compile, and that plain PyTorch works after it."""

import numpy as np
import pytest
import torch

from functorch_lite.compile import aot_function, aot_module, aot_module_simplified, nop


def _resized(x):
    return x.resize_(6)


def _set(x):
    return x.set_(torch.zeros(2))


def _own_generator(x):
    return x + torch.rand(3, generator=torch.Generator().manual_seed(0))


def _flat_and_ints():
    base = torch.zeros(4)
    return base[:2].view(torch.int32), base[1:]


X = torch.ones(3)
CASES = {
    "branch": (lambda x: x if x.sum() > 0 else -x, (X,), NotImplementedError, ["test_messages.py:", "torch.where"]),
    "tolist": (lambda x: x * x.tolist()[0], (X,), NotImplementedError, ["test_messages.py:", "numbers of a tensor"]),
    "numpy": (lambda x: torch.from_numpy(x.numpy()), (X,), NotImplementedError, ["numbers of a tensor"]),
    "backward": (
        lambda x: x.sum().backward(),
        (torch.ones(3, requires_grad=True),),
        NotImplementedError,
        [".backward() is called inside", "torch.autograd.grad"],
    ),
    "resize": (_resized, (X,), NotImplementedError, ["resize_ makes a tensor larger", "return it"]),
    "set": (_set, (X,), NotImplementedError, ["argument x another memory", "Return the new tensor"]),
    "generator": (_own_generator, (X,), NotImplementedError, ["torch.Generator", "as an argument"]),
    "array": (lambda x, a: x, (X, np.ones(2)), TypeError, ["argument a is a ndarray", "torch.as_tensor"]),
    "set of numbers": (lambda x, options: x, (X, {1}), TypeError, ["argument options is a set", "no hash"]),
    "nested": (
        lambda x: x * 2,
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),),
        NotImplementedError,
        ["argument x is a nested tensor", "padded"],
    ),
    "quantized": (
        lambda x: x.dequantize(),
        (torch.quantize_per_tensor(X, 0.1, 0, torch.qint8),),
        NotImplementedError,
        ["argument x is a quantized tensor", "x.dequantize()"],
    ),
    "shared memory": (
        lambda x, y: x.mul_(2) + y.sum(),
        _flat_and_ints(),
        NotImplementedError,
        ["shares memory with another one", "clone()"],
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_message(name):
    function, args, error, parts = CASES[name]
    with pytest.raises(error) as raised:
        aot_function(function, nop)(*args)
    assert all(part in str(raised.value) for part in parts), str(raised.value)
    assert torch.equal(torch.ones(2) + 1, torch.full((2,), 2.0))
    assert aot_function(torch.sin, nop)(X).equal(X.sin())


def test_operator_without_fake_form():
    @torch.library.custom_op("functorch_lite_tests::without_fake", mutates_args=())
    def without_fake(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    with pytest.raises(NotImplementedError, match="register_fake"):
        aot_function(lambda x: without_fake(x), nop)(X)


def test_errors_of_the_function_are_its_own():
    with pytest.raises(ZeroDivisionError):
        aot_function(lambda x: 1 / 0, nop)(X)
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        aot_function(lambda x: x.add_(1), nop)(torch.ones(2, requires_grad=True))


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda: aot_function(3, nop), ["aot_function", "expected a function", "int"]),
        (lambda: aot_function(torch.sin, 3), ["aot_function", "expected a function", "int"]),
        (lambda: aot_module(torch.sin, nop), ["aot_module", "expected a module", "builtin_function_or_method"]),
        (lambda: aot_module_simplified(3, [], nop), ["aot_module_simplified", "expected a module", "int"]),
    ],
)
def test_wrong_arguments(call, parts):
    with pytest.raises(TypeError) as raised:
        call()
    assert all(part in str(raised.value) for part in parts), str(raised.value)


def test_a_generator_may_be_an_argument():
    generator = torch.Generator().manual_seed(3)
    compiled = aot_function(lambda x, generator: x + torch.rand(3, generator=generator), nop)
    results = [compiled(X, generator), compiled(X, generator)]
    generator.manual_seed(3)
    assert all(result.equal(X + torch.rand(3, generator=generator)) for result in results)
