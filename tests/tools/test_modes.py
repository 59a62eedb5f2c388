"""Checkpoints, hooks, anomaly mode, profiles, determinism, defaults and grad modes around and inside of transforms."""

from __future__ import annotations

import json
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from functorch_lite import functional_call, grad, hessian, jacrev, jit, jvp, level_depth, vjp, vmap


def energy(x):
    return x.sin().square().sum()


# Threads.


def test_transforms_in_several_threads():
    """Each thread has its own levels."""
    barrier, wrong = threading.Barrier(4), []

    def work(seed):
        x = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed))
        barrier.wait()
        for _ in range(20):
            found = vmap(hessian(energy))(x)
            expected = torch.diag_embed(2 * (2 * x).cos())
            if not torch.allclose(found, expected, atol=1e-5) or level_depth() != 0:
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_one_compiled_function_in_several_threads():
    slopes, wrong = jit(vmap(grad(energy))), []

    def work(size):
        for _ in range(20):
            x = torch.rand(size, 4)
            if not torch.allclose(slopes(x), (2 * x).sin(), atol=1e-5):
                wrong.append(size)

    threads = [threading.Thread(target=work, args=(size,)) for size in (1, 2, 3, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Checkpoints.


@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(where, use_reentrant):
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    x = torch.rand(4, 3, dtype=torch.float64)
    plain = lambda x: net(x).sum()
    expected = vmap(grad(plain))(x)
    if where == "inside":
        found = vmap(grad(lambda x: checkpoint(plain, x, use_reentrant=use_reentrant)))(x)
        assert_close(
            vmap(grad(lambda x: checkpoint_sequential(net, 2, x, use_reentrant=use_reentrant).sum()))(x), found
        )
    else:
        y = x.clone().requires_grad_()
        found = checkpoint(lambda y: vmap(grad(plain))(y), y, use_reentrant=use_reentrant)
        (slope,) = torch.autograd.grad(found.sum(), y) if not use_reentrant else (None,)
        if slope is not None:
            assert_close(slope, grad(lambda x: vmap(grad(plain))(x).sum())(x))
    assert_close(found, expected)


# Hooks.


def test_tensor_hooks_inside():
    seen = []

    def f(x):
        y = x.sin()
        y.register_hook(lambda g: seen.append(g.shape) or g * 2)
        return y.sum()

    x = torch.rand(3)
    assert_close(grad(f)(x), 2 * x.cos())
    assert_close(vmap(grad(f))(x[None]), 2 * x.cos()[None])
    assert seen == [x.shape, x.shape]


def test_hooks_of_leaves_outside():
    x = torch.rand(3, requires_grad=True)
    accumulated, hooked = [], []
    x.register_post_accumulate_grad_hook(lambda leaf: accumulated.append(leaf.grad.clone()))
    x.register_hook(lambda g: hooked.append(g) or g * 3)
    inner = grad(energy)(x)  # another level: no hook of this one
    assert accumulated == hooked == []
    inner.sum().backward()
    assert_close(hooked[0], 2 * (2 * x.detach()).cos())
    assert_close(accumulated, [3 * hooked[0]])
    assert_close(x.grad, 3 * hooked[0])


def test_saved_tensor_hooks():
    x = torch.rand(3)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(1) or t.clone(), lambda t: t):
        assert_close(grad(energy)(x), (2 * x).sin())
    assert packed


# Anomaly mode.


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomaly_mode_finds_the_operator(inside):
    x = torch.zeros(3)

    def f(x):
        return (x.sqrt() * 0).sum()  # infinity times zero, backwards

    def under_anomaly_mode(x):
        with torch.autograd.detect_anomaly():
            return f(x)

    call = under_anomaly_mode if inside else f
    message = "'SqrtBackward0' returned nan values"
    with torch.autograd.set_detect_anomaly(True), pytest.raises(RuntimeError, match=message):
        grad(call)(x)
    assert level_depth() == 0
    assert grad(f)(x).isnan().all()


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomaly_mode_names_the_line():
    def f(x):
        return (x.sqrt() * 0).sum()  # the line

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match="returned nan values"):
            grad(f)(torch.zeros(3))
    said = [str(warning.message) for warning in seen]
    assert any("Error detected in SqrtBackward0" in text and "# the line" in text for text in said), said


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomaly_mode_changes_nothing_else():
    x = torch.rand(2, 3)
    with torch.autograd.detect_anomaly():
        assert_close(vmap(hessian(energy))(x), torch.diag_embed(2 * (2 * x).cos()))
        assert_close(jit(vmap(grad(energy)))(x), (2 * x).sin())


# Profiles.


def _spans(run, **options):
    with torch.profiler.profile(**options) as profile:
        run()
    return profile


def test_a_profile_shows_transforms_and_the_operators_in_them(tmp_path):
    x = torch.rand(4, 3)
    profile = _spans(lambda: vmap(grad(energy))(x))
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = {event["name"]: event for event in events if event.get("ph") == "X"}
    inside = lambda inner, outer: (
        outer["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]
    )
    assert inside(spans["functorch_lite::grad"], spans["functorch_lite::vmap"])
    for operator in ("aten::sin", "aten::cos"):
        assert inside(spans[operator], spans["functorch_lite::grad"])


@pytest.mark.parametrize(
    ("run", "names"),
    [
        (lambda x: vjp(torch.sin, x)[1](x), {"vjp", "vjp_fn"}),
        (lambda x: jvp(torch.sin, (x,), (x,)), {"jvp"}),
        (lambda x: jacrev(torch.sin)(x), {"jacrev"}),
        (lambda x: hessian(energy)(x), {"hessian"}),
        (lambda x: jit(grad(energy))(x), {"jit", "grad"}),
    ],
)
def test_each_transform_has_its_name(run, names):
    x = torch.rand(3)
    profile = _spans(lambda: run(x))
    found = {
        event.name.removeprefix("functorch_lite::") for event in profile.events() if "functorch_lite" in event.name
    }
    assert found == names
    assert {event.key for event in profile.key_averages()} >= {f"functorch_lite::{name}" for name in names}


def test_spans_end_with_an_error():
    def broken(x):
        raise KeyError("inside")

    def run():
        with pytest.raises(KeyError):
            vmap(grad(broken))(torch.rand(2))
        torch.rand(3).cumsum(0)

    profile = _spans(run)
    spans = {event.name: event.time_range for event in profile.events()}
    assert spans["functorch_lite::vmap"].end <= spans["aten::cumsum"].start


# Global switches.


def test_deterministic_algorithms():
    index, source = torch.tensor([0, 0, 1]), torch.rand(2, 3)
    add = lambda s: torch.zeros(2).index_add(0, index, s)
    expected = torch.stack([add(s) for s in source])
    torch.use_deterministic_algorithms(True)
    try:
        assert_close(vmap(add)(source), expected)
        assert_close(vmap(grad(lambda s: add(s).square().sum()))(source), 2 * expected[:, index])
        assert_close(jit(vmap(add))(source), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        f = lambda x: (x * torch.ones(3) + 0.1).sin().sum()
        x = torch.rand(3)
        slopes = grad(f)(x)
        assert slopes.dtype == torch.float64
        assert_close(slopes, (x + 0.1).cos())
        assert vmap(lambda i: i * 0.5)(torch.arange(3)).dtype == torch.float64
        assert jacrev(torch.sin)(x).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_default_device():
    """What functions make is there, inside as outside."""
    x = torch.rand(2, 3, device="meta")
    with torch.device("meta"):
        made = []
        f = lambda x: made.append(torch.ones(3)) or (x * made[-1] + torch.zeros(3)).sum()
        assert vmap(grad(f))(x).is_meta
        assert all(one.is_meta for one in made)
        assert jacrev(torch.sin)(x).is_meta
    torch.set_default_device("meta")
    try:
        assert vmap(lambda x: x + torch.ones(3))(torch.rand(2, 3)).is_meta
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.set_grad_enabled(False)])
def test_grad_modes_around(mode):
    x = torch.rand(4, 3)
    expected = torch.diag_embed(2 * (2 * x).cos())
    with mode():
        assert_close(vmap(grad(energy))(x), (2 * x).sin())
        assert_close(vmap(hessian(energy))(x), expected)
        assert_close(jit(vmap(hessian(energy)))(x), expected)
        assert_close(jvp(energy, (x,), (x,))[1], ((2 * x).sin() * x).sum())
        made_inside = torch.rand(4, 3)
        assert_close(grad(energy)(made_inside), (2 * made_inside).sin())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_grad_modes_inside(mode):
    def f(x):
        with mode():
            constant = x.sin()
        return (constant.clone() * x).sum()

    x = torch.rand(3)
    assert_close(grad(f)(x), x.sin())
    assert_close(vmap(grad(f))(x[None]), x.sin()[None])


def test_parameters_and_a_forward_pass_in_inference_mode():
    net, x = nn.Linear(3, 2), torch.rand(4, 3)
    with torch.inference_mode():
        params = {name: p.clone() for name, p in net.named_parameters()}  # inference tensors
        found = grad(lambda p: functional_call(net, p, x).sin().sum())(params)
    net(x).sin().sum().backward()
    assert_close(found["weight"], net.weight.grad)
