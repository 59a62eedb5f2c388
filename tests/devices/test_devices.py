"""The core on every device: the CPU, a GPU, and "meta", where a tensor that is made on the CPU by mistake is found."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from functorch_lite import (
    construct_in_ensemble,
    functional_call,
    functionalize,
    grad,
    hessian,
    hvp,
    jacfwd,
    jacobian,
    jacrev,
    jit,
    jvp,
    level_depth,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)
from functorch_lite.compile import aot_function, nop
from tests.support.ops import OPS

CUDA = pytest.param("cuda", marks=pytest.mark.cuda)
DEVICES = ["cpu", CUDA]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.complex64]

#: Of each kind of rule some.
NAMES = [
    "add", "mul", "div.no_rounding_mode", "pow", "where", "clamp", "lerp", "addcmul", "masked_fill", "sigmoid",
    "exp", "sum", "mean", "var", "std", "logsumexp", "amax", "argmax", "cumsum", "sort", "topk", "kthvalue",
    "median", "gather", "scatter", "scatter_add", "index_select", "index_put", "index_add", "take_along_dim",
    "masked_select", "nonzero_static", "cat", "stack", "split", "roll", "flip", "tril", "diag_embed", "unfold",
    "expand", "permute", "matmul", "bmm", "einsum", "addmm", "linalg.solve", "linalg.cholesky", "linalg.inv",
    "linalg.qr", "linalg.svd", "linalg.eigh", "linalg.norm", "nn.functional.linear", "nn.functional.conv1d",
    "nn.functional.conv2d", "nn.functional.conv_transpose2d", "nn.functional.layer_norm",
    "nn.functional.group_norm", "nn.functional.embedding", "nn.functional.embedding_bag",
    "nn.functional.max_pool2d", "nn.functional.avg_pool2d", "nn.functional.adaptive_avg_pool2d",
    "nn.functional.interpolate.bilinear", "nn.functional.grid_sample",
    "nn.functional.scaled_dot_product_attention", "softmax", "log_softmax", "nn.functional.cross_entropy",
    "nn.functional.mse_loss", "nn.functional.nll_loss", "nn.functional.huber_loss", "nn.functional.gelu",
    "nn.functional.softplus", "nn.functional.hardswish", "cdist", "searchsorted", "bucketize", "histc", "fft.fft",
    "fft.irfft", "full_like", "new_zeros", "zeros_like", "arange", "eye", "linspace", "linalg.det",
    "constant_pad_nd", "nn.functional.pad.constant",
]  # fmt: skip


def _samples(name, device, dtype, count=3):
    op = OPS[name]
    if dtype not in op.dtypes:
        pytest.skip(f"PyTorch's {name} has no {dtype}")
    torch.manual_seed(0)
    samples = [s for s in op.sample_inputs("cpu", dtype) if isinstance(s.input, torch.Tensor)]
    samples = [s for s in samples if 0 < s.input.numel() < 2000][:count]
    move = lambda x: x.detach().to(device) if isinstance(x, torch.Tensor) else x
    no_device = lambda kwargs: {name: value for name, value in kwargs.items() if name != "device"}
    return [torch.utils._pytree.tree_map(move, (s.input, s.args, no_device(s.kwargs))) for s in samples]


def _batch(x):
    """Three examples, all of them valid arguments."""
    if x.dtype.is_floating_point or x.dtype.is_complex:
        return torch.stack([x, x * 0.5, x * 0.75])
    return torch.stack([x, x, x])


def _tree_close(found, expected, **options):
    flat, others = torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected)
    assert len(flat) == len(others)
    for a, b in zip(flat, others, strict=True):
        assert_close(a, b, **options)


def _is_ambiguous(name):
    """Whether several results are right: signs of vectors, orders of equal values."""
    return name in ("linalg.svd", "linalg.eigh", "linalg.qr", "sort", "topk", "kthvalue", "median")


def _has_a_derivative(name):
    """And one that does not depend on the symmetry of the argument, or, for scatter, on an option."""
    return OPS[name].supports_autograd and not _is_ambiguous(name) and name not in ("linalg.cholesky", "scatter")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_vmap_is_a_loop(name, dtype, device):
    op = OPS[name]
    for x, args, kwargs in _samples(name, device, dtype):
        call = lambda x, args=args, kwargs=kwargs: op(x, *args, **kwargs)
        xs = _batch(x)
        rows = [torch.utils._pytree.tree_leaves(call(x)) for x in xs]
        expected = [torch.stack(column) for column in zip(*rows, strict=True)]
        found = torch.utils._pytree.tree_leaves(vmap(call, randomness="same")(xs))
        for a, b in zip(found, expected, strict=True):
            assert a.device.type == device
            if not _is_ambiguous(name):
                assert_close(a, b, atol=1e-4 if dtype == torch.float32 else 1e-9, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_vmap_makes_nothing_on_the_cpu(name):
    """On "meta" a tensor of another device is an error, or gives a result on that device."""
    op = OPS[name]
    for x, args, kwargs in _samples(name, "cpu", torch.float32):
        move = lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x
        x_meta, args_meta, kwargs_meta = torch.utils._pytree.tree_map(move, (x, args, kwargs))
        try:
            op(x_meta, *args_meta, **kwargs_meta)
        except (NotImplementedError, RuntimeError):
            continue  # needs values
        expected = vmap(lambda x, a=args, k=kwargs: op(x, *a, **k), randomness="same")(_batch(x))
        try:
            found = vmap(lambda x, a=args_meta, k=kwargs_meta: op(x, *a, **k), randomness="same")(_batch(x_meta))
        except NotImplementedError:
            continue  # PyTorch has no meta kernel of the batched operator
        for a, b in zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected), strict=True):
            assert a.is_meta
            assert (a.shape, a.dtype) == (b.shape, b.dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [n for n in NAMES if _has_a_derivative(n)])
def test_derivatives(name, device):
    """Reverse mode as torch.autograd, forward mode as the transpose of it, both under vmap as alone."""
    op = OPS[name]
    for x, args, kwargs in _samples(name, device, torch.float64, count=2):
        call = lambda x, args=args, kwargs=kwargs: op(x, *args, **kwargs)
        outputs = torch.utils._pytree.tree_leaves(call(x.requires_grad_()))
        output = next((o for o in outputs if o.is_floating_point() and o.requires_grad), None)
        x = x.detach()
        if output is None:
            continue
        index = next(i for i, o in enumerate(outputs) if o is output)
        first = lambda x, i=index, call=call: torch.utils._pytree.tree_leaves(call(x))[i]
        y = x.clone().requires_grad_()
        cotangent, tangent = torch.rand_like(output.detach()), torch.rand_like(x)
        (expected,) = torch.autograd.grad(first(y), y, cotangent)
        _, vjp_fn = vjp(first, x)
        assert_close(vjp_fn(cotangent)[0], expected)
        pushed = jvp(first, (x,), (tangent,))[1]
        assert pushed.device.type == device
        assert_close((pushed * cotangent).sum(), (expected * tangent).sum())
        pull = lambda x: vjp(first, x)[1](cotangent)[0]
        assert_close(vmap(pull)(torch.stack([x, x]))[1], expected)


def _energy(x):
    return (x.sin() * x.exp()).prod(-1).sum() + x.pow(3).mean()


@pytest.mark.parametrize("device", [*DEVICES, "meta"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transforms(device, dtype):
    """On the device and in the dtype of the argument; the numbers are those of the CPU."""
    torch.manual_seed(0)
    on_cpu = torch.rand(2, 3).to(dtype)
    if dtype.is_complex:
        energy = lambda x: (x * x.conj()).real.sin().sum()
        programs = {"grad": grad(energy), "vmap_grad": vmap(grad(energy)), "jvp": lambda x: jvp(torch.sin, (x,), (x,))}
    else:
        energy = _energy
        programs = {
            "grad": grad(energy),
            "vmap_grad": vmap(grad(energy)),
            "grad_grad": grad(lambda x: grad(energy)(x).square().sum()),
            "jvp": lambda x: jvp(energy, (x,), (x,)),
            "hvp": lambda x: hvp(energy, (x,), (x,)),
            "jacrev": jacrev(torch.sin),
            "jacfwd": jacfwd(torch.sin),
            "jacrev_chunks": jacrev(torch.sin, chunk_size=2),
            "jacobian": jacobian(torch.sin),
            "vmap_hessian": vmap(hessian(energy)),
            "linearize": lambda x: linearize(energy, x)[1](x),
            "functionalize": functionalize(grad(energy)),
        }
    loose = {"atol": 0.1, "rtol": 0.1} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    for name, program in programs.items():
        expected = torch.utils._pytree.tree_leaves(program(on_cpu))
        found = torch.utils._pytree.tree_leaves(program(on_cpu.to(device)))
        for a, b in zip(found, expected, strict=True):
            assert a.device.type == device, name
            assert (a.shape, a.dtype) == (b.shape, b.dtype), name
            if device != "meta":
                assert_close(a.cpu(), b, **loose)
    assert level_depth() == 0


@pytest.mark.parametrize("device", [*DEVICES, "meta"])
def test_what_the_function_makes_is_where_it_says(device):
    def f(x):
        total = torch.zeros(3, device=x.device)
        total[1:] = x[:2]
        total += torch.arange(3, device=x.device) + torch.ones_like(x) + x.new_zeros(3) + x.new_tensor([1.0, 2.0, 3.0])
        return torch.cat([total, torch.full_like(x, 2.0)])

    x = torch.rand(4, 3, device=device)
    assert vmap(f)(x).device.type == device
    assert vmap(jacrev(f))(x).shape == (4, 6, 3)
    assert vmap(jacfwd(f))(x).device.type == device


@pytest.mark.parametrize("device", [CUDA, "meta"])
@pytest.mark.parametrize(
    "f",
    [
        lambda x, s: x * s,
        lambda x, s: s - x,
        lambda x, s: torch.where(x > 0, x, s),
        lambda x, s: torch.add(x, s, alpha=2),
        lambda x, s: torch.addcmul(x, s, x),
        lambda x, s: x.clone().div_(s),
        lambda x, s: x.clone().fill_(s),
        lambda x, s: x.sum() * s,
    ],
)
def test_a_number_of_each_example_on_the_cpu(f, device):
    """As one number on the CPU may meet any tensor."""
    x, s = torch.rand(4, 3, device=device), torch.rand(4) + 1
    found = vmap(f)(x, s)
    assert found.device.type == device
    loss = lambda x, s: f(x, s).sum()
    assert vmap(grad(loss))(x, s).device.type == device
    if device != "meta":  # from where a gradient cannot come to the CPU
        assert_close(found.cpu(), torch.stack([f(a, b) for a, b in zip(x.cpu(), s, strict=True)]))
        assert_close(vmap(grad(loss, argnums=1))(x, s).cpu(), vmap(grad(loss, argnums=1))(x.cpu(), s))


# Random numbers.


@pytest.mark.parametrize("device", DEVICES)
def test_randomness(device):
    x = torch.zeros(6, 50, device=device)
    draw = lambda x: x + torch.rand_like(x) + torch.nn.functional.dropout(torch.ones_like(x), 0.5)
    same = vmap(draw, randomness="same")(x)
    assert_close(same, same[:1].expand_as(same))
    different = vmap(draw, randomness="different")(x)
    assert not torch.equal(different[0], different[1])
    found = []
    for chunk_size in (None, 2, 4):
        torch.manual_seed(0)
        found.append(vmap(draw, randomness="different", chunk_size=chunk_size)(x))
        assert_close(found[-1], found[0])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(draw)(x)


@pytest.mark.parametrize("device", DEVICES)
def test_random_numbers_of_a_generator(device):
    x = torch.zeros(3, 4, device=device)
    generator = lambda: torch.Generator(device).manual_seed(3)
    one = torch.rand(3, 4, device=device, generator=generator())
    g = generator()
    found = vmap(lambda x: x + torch.rand(4, device=device, generator=g), randomness="different")(x)
    assert_close(found, one)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_draw_the_same_numbers_again(device):
    x = torch.rand(20, device=device)
    f = lambda x: torch.nn.functional.dropout(x, 0.5).square().sum()
    torch.manual_seed(0)
    found = grad(f)(x)
    torch.manual_seed(0)
    y = x.clone().requires_grad_()
    f(y).backward()
    assert_close(found, y.grad)
    torch.manual_seed(0)
    assert_close(jit(grad(f))(x), found)


# Compiled functions.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_jit(device, dtype):
    f = vmap(hessian(_energy))
    compiled = jit(f)
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.rand(4, 3, dtype=dtype).to(device)
        assert_close(compiled(x), f(x))
    y = x.clone().requires_grad_()
    compiled(y).sum().backward()
    assert_close(y.grad, grad(lambda x: f(x).sum())(x))
    assert compiled(x).device.type == device


@pytest.mark.parametrize("device", DEVICES)
def test_aot_function(device):
    f = lambda x, w: (x @ w).tanh().sum()
    x, w = torch.rand(4, 3, device=device), torch.rand(3, 2, device=device, requires_grad=True)
    aot_function(f, nop)(x, w).backward()
    assert_close(w.grad, grad(f, argnums=1)(x, w.detach()))


@pytest.mark.parametrize("device", DEVICES)
def test_torch_compile(device):
    x = torch.rand(4, 3, device=device)
    step = torch.compile(vmap(grad(_energy)), fullgraph=True, backend="aot_eager")
    assert_close(step(x), vmap(grad(_energy))(x))


# Modules.


def _net():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 2)
    )


@pytest.mark.parametrize("device", DEVICES)
def test_modules(device):
    torch.manual_seed(0)
    net, x = _net().double().to(device), torch.rand(3, 1, 6, 6, dtype=torch.float64).to(device)
    plain = copy.deepcopy(net)
    plain(x).sin().sum().backward()
    params = {name: p.detach() for name, p in net.named_parameters()}
    found = grad(lambda p: functional_call(net, p, x, state="commit").sin().sum())(params)
    assert_close(found, {name: p.grad for name, p in plain.named_parameters()})
    assert_close(dict(net.named_buffers()), dict(plain.named_buffers()))
    net.eval()
    loss = lambda p, x: functional_call(net, p, (x[None],)).sin().sum()
    rows = [grad(loss)(params, one) for one in x]
    per_sample = vmap(grad(loss), in_dims=(None, 0))
    expected = {name: torch.stack([row[name] for row in rows]) for name in params}
    assert_close(per_sample(params, x), expected)
    assert_close(jit(per_sample)(params, x), expected)


@pytest.mark.parametrize("device", [*DEVICES, "meta"])
def test_ensembles(device):
    with torch.device(device):
        params, buffers = construct_in_ensemble(nn.Linear, 3, 4, 2, seed=0)
        models = [nn.Linear(4, 2) for _ in range(3)]
    assert all(p.device.type == device for p in params.values())
    stacked, _ = stack_module_state(models)
    x = torch.rand(5, 4, device=device)
    found = vmap(lambda p: functional_call(models[0], p, x))(stacked)
    assert found.shape == (3, 5, 2)
    assert found.device.type == device
    if device != "meta":
        assert_close(found, torch.stack([model(x) for model in models]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("module", [nn.LSTM, nn.GRU, nn.MultiheadAttention])
def test_sequence_models(device, module):
    torch.manual_seed(0)
    net = (module(4, 2, batch_first=True) if module is nn.MultiheadAttention else module(4, 4, batch_first=True)).to(
        device
    )
    x = torch.rand(3, 5, 4).to(device)
    call = lambda p, x: (
        functional_call(net, p, (x[None],) * (3 if module is nn.MultiheadAttention else 1))[0].sin().sum()
    )
    params = {name: p.detach() for name, p in net.named_parameters()}
    found = vmap(grad(call), in_dims=(None, 0))(params, x)
    rows = []
    for one in x:
        net.zero_grad()
        call({}, one).backward()
        rows.append({name: p.grad.clone() for name, p in net.named_parameters()})
    for name in params:
        assert_close(found[name], torch.stack([row[name] for row in rows]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast(device):
    net, x = nn.Linear(8, 8).to(device), torch.rand(4, 8, device=device)
    params = dict(net.named_parameters())
    with torch.autocast(device, torch.bfloat16):
        assert vmap(net)(x).dtype == torch.bfloat16
        found = grad(lambda p: functional_call(net, p, x).float().sin().sum())(params)
    assert found["weight"].dtype == torch.float32
    assert found["weight"].device.type == device


@pytest.mark.parametrize("device", [CUDA])
def test_streams(device):
    """In a stream of its own, and from another device's stream."""
    x = torch.rand(100, 30, device=device)
    expected = vmap(hessian(_energy))(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = vmap(hessian(_energy))(x)
        compiled = jit(vmap(hessian(_energy)))(x)
    torch.cuda.current_stream().wait_stream(stream)
    assert_close(found, expected)
    assert_close(compiled, expected)


@pytest.mark.parametrize("device", [CUDA])
def test_between_devices(device):
    """Copies between devices inside a function have derivatives."""
    f = lambda x: x.to(device).sin().cpu().square().sum()
    x = torch.rand(4, 3)
    assert_close(vmap(grad(f))(x), (2 * x).sin())
    assert_close(jit(vmap(grad(f)))(x), (2 * x).sin())


def test_between_devices_without_values():
    """The same where there is no GPU: shapes and devices of a copy to "meta"."""
    f = lambda x: x.to("meta").sin().sum()
    assert vmap(f)(torch.rand(4, 3)).is_meta
    assert vmap(lambda x: x.to("meta").sin())(torch.rand(4, 3)).shape == (4, 3)


@pytest.mark.parametrize("device", [CUDA])
def test_memory_of_chunks(device):
    x = torch.rand(200, device=device)
    f = lambda x: (x[:, None] * x).sin().sum(1)
    assert_close(jacrev(f, chunk_size="auto")(x), jacrev(f)(x))
