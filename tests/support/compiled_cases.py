"""Functions and modules, each for one thing that is easily wrong in a compiler of forward and backward passes.

Run as a program it prints what the implementations did wrong: `python -m tests.support.compiled_cases [--peer] [PART]`.
"""

from __future__ import annotations

import argparse
import enum
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils.checkpoint import checkpoint

import functorch_lite as fl
from tests.support import observations
from tests.support.observations import VARIANTS, Case, vectors

CASES: dict[str, Case] = {}


def case(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a case of the function, under its name."""

    def register(func: Callable[..., Any]) -> Callable[..., Any]:
        CASES[func.__name__] = Case(func, **options)
        return func

    return register


def copies(*leaves: Any) -> tuple[Any, ...]:
    """Arguments that may be written into: they are no leaves."""
    return tuple(x.clone() if isinstance(x, Tensor) else x for x in leaves)


# Inputs that are written into.


@case(arguments=copies)
def input_written_once(x):
    x.mul_(2)
    return x.sin()


@case(arguments=copies)
def input_written_twice(x):
    x.mul_(2)
    y = x * 3
    x.add_(y)
    return y.cos()


@case(arguments=copies)
def input_written_and_nothing_returned(x):
    x.sin_()


@case(arguments=copies)
def input_written_through_a_view(x):
    x[0].mul_(3)
    x.t()[1].add_(x[0, 0])
    return x.sum()


@case(arguments=copies)
def input_written_with_itself(x):
    x.copy_(x * 2)
    x.copy_(x)
    return x.exp()


@case(arguments=copies)
def input_written_back_to_what_it_was(x):
    x.neg_()
    x.neg_()
    return x * 3


@case()
def leaf_written_under_no_grad(x):
    with torch.no_grad():
        x.mul_(2)
    return x * x


@case()
def leaf_written_through_detach(x):
    x.detach().add_(1)
    return x.sin()


@case(arguments=copies)
def written_under_no_grad_and_not(x):
    y = x * 2
    with torch.no_grad():
        x.add_(1)
    x.mul_(y)
    return y


@case(leaves=vectors(2), arguments=copies)
def only_one_of_two_is_written(x, y):
    y.mul_(x)
    return x * 2


@case(leaves=lambda n: [torch.rand(n, 2, dtype=torch.float64), torch.zeros(n, 2, dtype=torch.int64)])
def integer_input_written(x, counts):
    counts.add_(1)
    return x * counts


@case(leaves=lambda n: [torch.rand(n, 2, dtype=torch.float64)], arguments=lambda x: (x, torch.zeros_like(x)))
def constant_input_takes_a_derivative(x, buffer):
    buffer.copy_(x.sin())
    buffer.mul_(2)
    return buffer.sum()


@case(leaves=lambda n: [torch.rand(n, 2, dtype=torch.float64)], arguments=lambda x: (x, torch.zeros_like(x)))
def slice_of_constant_input_takes_a_derivative(x, buffer):
    buffer[1:] = x[:-1]
    return x * 2


@case(arguments=copies)
def set_by_index(x):
    x[torch.tensor([0, 1])] = x[torch.tensor([1, 0])] * 2
    return x.sum(0)


@case(arguments=copies)
def filled_where_masked(x):
    x.masked_fill_(x > 0.5, 7.0)
    return x * 2


@case(arguments=copies)
def index_put_accumulates(x):
    x.index_put_((torch.tensor([0, 0]),), x[:2] * 3, accumulate=True)
    return x


# Metadata of inputs that changes.


@case(arguments=copies)
def input_transposed_in_place(x):
    x.t_()
    return x * 2


@case(arguments=copies)
def input_unsqueezed_in_place(x):
    x.unsqueeze_(0)
    return x.sum(1)


@case(arguments=copies)
def input_transposed_in_place_and_written(x):
    x.transpose_(0, 1)
    x.mul_(2)
    return x[0]


@case(arguments=lambda x: (x.clone().unsqueeze(0),))
def input_squeezed_in_place(x):
    x.squeeze_(0)
    return x.sin()


# Outputs that are, or show, something else.


@case()
def output_is_an_input(x):
    return x


@case(leaves=vectors(2))
def outputs_are_inputs_in_other_order(x, y):
    return y, x * y, x


@case(arguments=copies)
def output_is_a_written_input(x):
    return x.mul_(2)


@case(arguments=copies)
def output_is_a_view_of_an_input(x):
    return x.t(), x[0], x.view(-1)


@case(arguments=copies)
def output_is_a_view_of_a_written_input(x):
    x.mul_(2)
    return x.view(-1), x[1:]


@case(arguments=copies, circumstances=["first call", "second call", "other sizes", "no input requires grad"])
def view_taken_before_the_write(x):
    y = x[1:]
    x.mul_(2)
    return y, y * 3


@case(arguments=copies)
def views_of_views(x):
    y = x.unsqueeze(0).expand(2, *x.shape).transpose(1, 2)
    return y[0], y.diagonal(dim1=0, dim2=1)


@case()
def output_is_a_detached_input(x):
    return x.detach(), x * 2


@case(used=[1])
def output_is_a_view_under_no_grad(x):
    with torch.no_grad():
        y = x[0]
    return y, x.sum()


@case()
def output_is_a_view_of_an_intermediate(x):
    y = x.sin()
    return y.t(), y[0] * 2


@case()
def outputs_share_memory(x):
    y = x.exp()
    return y, y[1:], y.t(), y.view(-1)


@case()
def two_views_of_an_intermediate(x):
    y = x.exp()
    return y[:1], y[1:]


@case()
def same_output_twice(x):
    y = x.cos()
    return y, y, [y]


@case(leaves=lambda n: [torch.rand(n, 2, dtype=torch.complex128)])
def real_view_of_a_complex_input(z):
    return torch.view_as_real(z), z.real, z.imag * 2


@case(leaves=lambda n: [torch.rand(n, 2, dtype=torch.complex128)])
def conjugate_views(z):
    return z.conj(), (z * 2).conj(), z.mH


@case(leaves=vectors(2), arguments=lambda x, y: (x[:, 0], y.t()))
def arguments_are_views(x, y):
    return x * y[0], x[1:]


# Arguments that share memory.


@case(arguments=lambda x: (x, x))
def same_argument_twice(x, y):
    return x * y.sin()


@case(arguments=lambda x: (lambda y: (y, y))(x.clone()))
def same_argument_twice_and_written(x, y):
    x.mul_(2)
    return y * 3, x + y


@case(arguments=lambda x: (lambda base: (base[:-1], base[1:]))(x.clone()))
def arguments_overlap(x, y):
    return x * y


@case(arguments=lambda x: (lambda base: (base[:-1], base[1:]))(x.clone()))
def arguments_overlap_and_one_is_written(x, y):
    x.mul_(2)
    return y.sin()


@case(arguments=lambda x: (lambda base: (base, base.t()))(x.clone()))
def argument_and_its_transpose_are_written(x, y):
    x.add_(1)
    y.mul_(2)
    return x * 3, y[0]


@case(arguments=lambda x: (lambda base: (base[0], base[1]))(x.clone()))
def arguments_share_storage_without_overlap(x, y):
    x.add_(y)
    return x + y


# Arguments and outputs that are no tensors.


class Color(enum.Enum):
    RED = 1
    BLUE = 2


@case(leaves=lambda n: [*vectors(1)(n), n, 0.5, "sum", None, True, Color.RED])
def arguments_of_other_types(x, n, scale, how, nothing, flag, color):
    y = getattr(x, how)() * scale + n
    return (y if flag and nothing is None else x), y * color.value


@case(leaves=lambda n: [*vectors(1)(n), float(n)])
def float_argument(x, scale):
    return x * scale, x + scale / 2


@case(leaves=lambda n: [*vectors(1)(n), n - 1])
def integer_argument_as_size(x, n):
    return x[:n], x.new_zeros(n)


@case(leaves=lambda n: [*vectors(1)(n), torch.float32, torch.device("cpu"), range(2)])
def dtype_device_and_range(x, dtype, device, rows):
    return x.to(dtype).to(device)[list(rows)]


@case(leaves=vectors(3), arguments=lambda x, y, z: ({"a": x, "b": [y, (z, 2.0)]}, []))
def nested_arguments(tree, empty):
    z, scale = tree["b"][1]
    return {"sum": tree["a"] + tree["b"][0], "more": [z * scale, (empty,)]}


Pair = namedtuple("Pair", ["first", "second"])


@case()
def namedtuple_output(x):
    return Pair(x * 2, Pair(x.sin(), 3))


@dataclass
class Result:
    """An output that pytrees know."""

    value: Tensor
    count: int


_pytree.register_dataclass(Result)


@case()
def dataclass_output(x):
    return Result(x * 2, 3)


@case()
def outputs_of_other_types(x):
    return x * 2, None, 3, 0.5, "text", True, torch.float32


@case()
def sizes_as_outputs(x):
    return x * 2, x.shape[0], x.numel(), list(x.shape)


@case()
def no_tensor_output(x):
    x.sin()
    return 3


@case()
def none_output(x):
    return None


@case(leaves=lambda n: [torch.arange(2 * n).reshape(n, 2), torch.rand(n, 2, dtype=torch.float64)])
def integer_and_boolean_outputs(i, x):
    return i + 1, x > 0.5, x.argmax(), x * i


@case()
def outputs_that_need_no_gradient(x):
    return x.detach() * 2, x * 3, torch.ones(2)


@case(leaves=lambda n: [torch.rand(0, n, dtype=torch.float64)])
def empty_tensors(x):
    return x * 2, x.sum(), torch.cat([x, x])


@case(leaves=lambda n: [torch.rand((), dtype=torch.float64), torch.tensor(2)])
def scalars(x, n):
    return x * n, x**n, x.reshape(1), 2 * x


@case()
def constants_made_inside(x):
    return x * torch.tensor([1.0, 2.0], dtype=x.dtype), torch.tensor(3.0), torch.arange(2)


def _keywords(x, *, scale=1.0, other=None):
    return x * scale + other


@case(leaves=vectors(2), arguments=lambda x, y: ({"scale": 2.0, "other": y}, x))
def keyword_arguments(keywords, x):
    return _keywords(x, **keywords)


@case(leaves=vectors(2))
def unused_argument(x, y):
    return x * 2


# Tensors from outside.


GLOBAL = torch.linspace(0, 1, 2, dtype=torch.float64)
VARIABLE = torch.linspace(1, 2, 2, dtype=torch.float64, requires_grad=True)
COUNTER = torch.zeros(2, dtype=torch.float64)


@case(captured=[GLOBAL])
def captured_tensor(x):
    return x * GLOBAL


@case(captured=[VARIABLE])
def captured_tensor_that_requires_grad(x):
    return (x * VARIABLE).sin()


@case(captured=[VARIABLE])
def captured_tensor_alone(x):
    return VARIABLE * 2


@case(captured=[GLOBAL])
def captured_tensor_is_output(x):
    return GLOBAL, GLOBAL[0], x * 2


@case(captured=[COUNTER])
def captured_tensor_is_written(x):
    COUNTER.add_(1)
    return x * COUNTER


# Grad modes and autocast.


@case()
def region_without_grad(x):
    with torch.no_grad():
        y = x.sin()
    return y * x, y


@case()
def enable_grad_inside_no_grad(x):
    with torch.no_grad():
        a = x * 2
        with torch.enable_grad():
            b = x * 3
    return a, b


@case()
def set_grad_enabled(x):
    with torch.set_grad_enabled(False):
        a = x * 2
    with torch.set_grad_enabled(True):
        return a * x


@case()
def detach(x):
    return x.detach() * x


@case(circumstances=["first call", "second call", "other sizes", "no input requires grad"])
def requires_grad_inside(x):
    y = x.detach().clone().requires_grad_()
    (g,) = torch.autograd.grad((y * y).sum(), y)
    return x * g


@case()
def gradient_inside(x):
    with torch.enable_grad():
        y = x.detach().requires_grad_()
        return torch.autograd.grad(y.sin().sum(), y)[0] * x


@case(leaves=lambda n: [torch.rand(n, 2), torch.rand(2, 2)])
def autocast_inside(x, w):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = x @ w
    return y, (y.float() @ w).sin()


@case(leaves=lambda n: [torch.rand(n, 2), torch.rand(2, 2)])
def autocast_disabled_inside(x, w):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = x @ w
        with torch.autocast("cpu", enabled=False):
            return y.float() @ w


# Random numbers.


@case()
def dropout(x):
    return F.dropout(x, 0.5), F.dropout(x, 0.3)


@case()
def dropout_in_evaluation(x):
    return F.dropout(x, 0.5, training=False)


@case()
def random_like(x):
    return x * torch.rand_like(x) + torch.randn_like(x)


@case()
def random_factories(x):
    return x * torch.rand(2, dtype=x.dtype), torch.randperm(4), torch.randint(5, (3,))


@case()
def random_numbers_that_nobody_uses(x):
    torch.rand(3)
    return x * torch.rand(2, dtype=x.dtype)


@case(arguments=copies)
def random_in_place(x):
    y = torch.empty_like(x).uniform_()
    y.bernoulli_(0.5)
    return x * y, x.clone().exponential_()


@case(leaves=lambda n: [torch.rand(n, 2, dtype=torch.float64)])
def random_samples(x):
    return torch.multinomial(x.detach(), 1), torch.bernoulli(x.detach()), torch.poisson(x.detach())


# Numbers of other kinds.


@case(leaves=lambda n: [torch.rand(n, 2, dtype=torch.complex128)])
def complex_numbers(z):
    return z.exp() * z.conj(), z.abs(), z.real.sin()


@case(leaves=lambda n: [torch.rand(n, 2, dtype=torch.complex128)], arguments=lambda z: ((z * 1).conj(),))
def conjugated_argument(z):
    return z * 2, z.imag


@case(leaves=lambda n: [torch.rand(n, 2, dtype=torch.complex128)], arguments=lambda z: ((z * 1).conj().imag,))
def negated_argument(x):
    return x * 2, x


@case(leaves=lambda n: [torch.rand(n, 2, dtype=torch.bfloat16), torch.rand(n, 2, dtype=torch.float16)])
def short_floats(x, y):
    return x.sin(), (y * 2).float() * x


@case(leaves=lambda n: [torch.rand(n, 2, dtype=torch.float64), torch.rand(n, 2)])
def mixed_precision(x, y):
    return x * y, y.double().exp(), x.float() + y


@case()
def wrapped_numbers(x):
    n = torch.tensor(2.5)
    return x * n, x.float() * torch.tensor(2.5, dtype=torch.float64), 1 / x, 2**x


# Functions with a derivative of their own.


class OldSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x)
        ctx.scale = scale
        return x * x * scale

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * g * x * ctx.scale, None


class Square(torch.autograd.Function):
    @staticmethod
    def forward(x, scale):
        return x * x * scale, x + 1

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], output[0])
        ctx.scale = inputs[1]

    @staticmethod
    def backward(ctx, g, h):
        x, y = ctx.saved_tensors
        return 3 * g * x * ctx.scale + h * y, None


class WritesItsInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, g):
        return 5 * g


@case()
def autograd_function_of_old_style(x):
    return OldSquare.apply(x, 2.0).sin()


@case()
def autograd_function(x):
    return Square.apply(x, 2.0)


@case(arguments=copies, circumstances=["first call", "second call", "other sizes", "no input requires grad"])
def autograd_function_that_writes(x):
    return WritesItsInput.apply(x), x


@torch.library.custom_op("fl_compiled_cases::cube", mutates_args=())
def cube(x: Tensor) -> Tensor:
    return x.detach() ** 3


cube.register_fake(torch.empty_like)
cube.register_autograd(
    lambda ctx, g: 4 * g * ctx.saved_tensors[0] ** 2,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@torch.library.custom_op("fl_compiled_cases::double_", mutates_args={"x"})
def double_(x: Tensor, factor: float) -> None:
    x.mul_(factor)


@case()
def custom_operator(x):
    return cube(x.sin())


@case(leaves=lambda n: [torch.rand(n, 2, dtype=torch.float64)])
def custom_operator_that_writes(x):
    y = x.detach().clone()
    double_(y, 2.0)
    return y, x * y


@case(arguments=lambda x: (x.detach().clone(), x))
def custom_operator_that_writes_an_input(x, y):
    double_(x, 3.0)
    return x * y


# Transforms inside.


@case()
def checkpoint_inside(x):
    return checkpoint(lambda x: x.sin().exp(), x, use_reentrant=False) * x


@case()
def grad_inside(x):
    return fl.grad(lambda x: x.sin().sum())(x) * x


@case()
def vmap_inside(x):
    return fl.vmap(lambda row: row * row.sum())(x)


@case()
def jvp_inside(x):
    return fl.jvp(torch.sin, (x,), (x * 2,))


@case()
def hessian_inside(x):
    return fl.hessian(lambda x: x.prod().sin())(x[0]) * x[1].sum()


@fl.custom_vjp
def _halved(x):
    return x.sin()


_halved.defvjp(lambda x: (x.sin(), x), lambda x, g: (g * x.cos() / 2,))


@case()
def custom_vjp_inside(x):
    return _halved(x) * x


@case()
def checkpoint_in_grad_inside(x):
    return fl.grad(lambda x: checkpoint(lambda x: x.sin().exp(), x, use_reentrant=False).sum())(x) * x


# Writes to what the function made.


@case()
def views_of_views_written(x):
    y = x * 2
    z = y.t()[0]
    z[1:].add_(z[0])
    y[0, 1] = 5.0
    return y, z


@case()
def factories_written(x):
    y = torch.zeros(x.shape, dtype=x.dtype)
    y[0] = x[1]
    y[:, 1] += x[:, 0]
    z = torch.empty_like(x)
    z.copy_(y)
    return z.mul_(2)


@case()
def written_after_it_was_used(x):
    y = x * 2
    a = y * 3
    y.add_(1)
    return a, y


@case()
def results_into_out(x):
    y = torch.empty_like(x.detach())
    torch.sin(x.detach(), out=y)
    return y * x


@case()
def in_place_with_broadcasting(x):
    y = x.new_zeros(2, *x.shape)
    y += x
    y[1].div_(x[0])
    return y


# Selections.


@case()
def where(x):
    return torch.where(x > 0.5, x.sin(), x**2), torch.where(x > 0.5, 1.0, x)


@case()
def sorted_values(x):
    values, indices = x.sort(0)
    return values.sin(), indices, x.topk(1, 0).values, x.max(0)


@case()
def gather_and_scatter(x):
    i = x.argsort(0)
    return x.gather(0, i), torch.zeros_like(x).scatter_add(0, i, x), x.index_select(0, i[:, 0])


@case(leaves=vectors(2))
def products(x, y):
    return x @ y.t(), torch.einsum("ij,kj->ik", x, y), F.linear(x, y), F.softmax(x, 1)


@case()
def split_and_stacked(x):
    a, b = x.unbind(1)
    return torch.stack([b, a]), *x.split(1, 1), torch.cat([x, x.flip(0)])


# Cotangents.


@case(cotangent=lambda y: torch.ones((), dtype=y.dtype).expand(y.shape))
def expanded_cotangent(x):
    return x.sin() * x, x.t()


@case(cotangent=lambda y: torch.randn(y.shape[::-1], dtype=y.dtype).permute(*reversed(range(y.dim()))))
def transposed_cotangent(x):
    return (x.exp() * 2).view(-1), x @ x.t()


@case(cotangent=torch.zeros_like)
def zero_cotangent(x):
    return x.sqrt()


@case(used=[1])
def first_output_unused(x):
    return x.sin(), x.cos(), x.exp()


@case(leaves=vectors(2), used=[0])
def only_first_output_used(x, y):
    return x * 2, y * 3


def _doubled(output):
    output[0].mul_(2)


@case(arguments=copies, after=_doubled)
def view_of_input_written_afterwards(x):
    return x[0], x * 2


@case(after=_doubled)
def result_written_afterwards(x):
    y = x.sin()
    return y * 2, x.cos()


@case(after=_doubled)
def shared_result_written_afterwards(x):
    y = x.sin()
    return y, y.t(), x.cos()


@case(arguments=copies, after=_doubled)
def input_returned_and_written_afterwards(x):
    return x, x * 3


# Memory formats.


@case(leaves=lambda n: [torch.rand(n, 2, 3, 3, dtype=torch.float64).to(memory_format=torch.channels_last)])
def channels_last(x):
    return F.avg_pool2d(x, 2), x * 2, x.contiguous()


@case(arguments=lambda x: (x.t(), x.unsqueeze(0).expand(2, *x.shape)))
def strided_arguments(x, y):
    return x * 2, y.sin(), x.reshape(-1)


@case(leaves=lambda n: [torch.rand(2 * n, 2, dtype=torch.float64)], arguments=lambda x: (x[x.shape[0] // 2 :],))
def argument_with_an_offset(x):
    return x * 2, x[0]


# Modules.


class Tied(nn.Module):
    """An autoencoder whose decoder is the encoder transposed."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.zeros(4))
        self.again = self.weight

    def forward(self, x):
        return F.linear(torch.tanh(F.linear(x, self.weight)), self.again.t(), self.bias)


class Variational(nn.Module):
    """A variational autoencoder. Its loss is an output."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(2, 4)

    def forward(self, x):
        mean, log_variance = self.encoder(x).chunk(2, -1)
        latent = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        return self.decoder(latent), (mean**2 + log_variance.exp() - log_variance).sum()


class Residual(nn.Module):
    """Two convolutions and the input."""

    def __init__(self, channels, stride=1):
        super().__init__()
        inside = channels // stride
        self.conv1, self.norm1 = nn.Conv2d(inside, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(inside, channels, 1, stride)

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(y)).add_(self.shortcut(x)))


class State(nn.Module):
    """A recurrent network whose state is a buffer that is written into."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(4, 3)
        self.register_buffer("state", torch.zeros(2, 3))

    def forward(self, x):
        y = self.cell(x, self.state.clone())
        self.state.copy_(y.detach())
        return y


class Counting(nn.Module):
    """Counts its calls, and remembers a running mean."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        self.calls += 1
        self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return self.layer(x - self.mean) / self.calls


class Lstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x):
        y, (h, _) = self.lstm(x)
        return y, h


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(6, 3), nn.Linear(3, 2)

    def forward(self, tokens):
        return self.out(self.bag(tokens))


class Dictionary(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        y = self.layer(x)
        return {"logits": y, "probabilities": y.softmax(-1), "size": 3, "nothing": None}


class LstmCell(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(4, 3)

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state[0]


def _frozen():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    net[0].requires_grad_(False)
    return net


def _hooked():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    net[1].register_forward_hook(lambda module, args, output: output * 2)
    net.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return net


def _cnn():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )


def _resnet():
    blocks = [layer for width in (4, 8) for layer in (Residual(width, 2), Residual(width))]
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.BatchNorm2d(2),
        nn.ReLU(inplace=True),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def _transformer(layers, dropout):
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, dropout=dropout, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def _floats(*sizes):
    return lambda: torch.rand(sizes, dtype=torch.float64)


#: What makes the module, and what makes an input.
MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), _floats(2, 4)),
    "cnn_group_norm": (_cnn, _floats(2, 1, 6, 6)),
    "resnet": (_resnet, _floats(2, 1, 8, 8)),
    "resnet_block": (lambda: Residual(4), _floats(2, 4, 4, 4)),
    "resnet_eval": (lambda: _resnet().eval(), _floats(2, 1, 8, 8)),
    "transformer": (lambda: _transformer(1, 0.0), _floats(2, 3, 4)),
    "transformer_dropout": (lambda: _transformer(2, 0.3), _floats(2, 3, 4)),
    "transformer_eval": (lambda: _transformer(1, 0.3).eval(), _floats(2, 3, 4)),
    "lstm": (Lstm, _floats(2, 3, 4)),
    "lstm_cell": (LstmCell, _floats(2, 3, 4)),
    "gru_with_state": (State, _floats(2, 4)),
    "variational": (Variational, _floats(2, 4)),
    "tied": (Tied, _floats(2, 4)),
    "counting": (Counting, _floats(2, 4)),
    "embedding_bag": (Bag, lambda: torch.randint(6, (2, 4))),
    "frozen": (_frozen, _floats(2, 4)),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), _floats(2, 4)),
    "hooks": (_hooked, _floats(2, 4)),
    "dictionary": (Dictionary, _floats(2, 4)),
}


def main() -> None:
    """Print a table, and what differs from eager in the cases whose names contain one of the parts."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.compiled_cases", description=main.__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--peer", action="store_true", help="also run functorch.compile")
    options = parser.parse_args()
    names = [name for name in CASES if not options.parts or any(part in name for part in options.parts)]
    sides = [observations.ours(), *([observations.peer()] if options.peer else [])]
    rows = []
    for side in sides:
        for variant in VARIANTS:
            found = {name: observations.differences(side, CASES[name], variant) for name in names}
            raising = [name for name, texts in found.items() if any(": raises " in text for text in texts)]
            wrong = [name for name, texts in found.items() if texts and name not in raising]
            rows.append(
                (side.name, variant, len(names), len(names) - len(raising) - len(wrong), len(wrong), len(raising))
            )
            for name in [*wrong, *raising]:
                print(f"{side.name}: {name}: {found[name][0].splitlines()[0][:200]}", flush=True)
    print(f"{'side':<20}{'variant':<10}{'cases':>8}{'pass':>8}{'wrong':>8}{'raise':>8}")
    for side_name, variant, *numbers in rows:
        print(f"{side_name:<20}{variant:<10}" + "".join(f"{number:>8}" for number in numbers))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
