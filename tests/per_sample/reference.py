"""The loop over single examples that everything here has to agree with."""

from __future__ import annotations

import torch

import functorch_lite as fl
from functorch_lite import _per_sample_run


def loop(model, loss, batch, batch_dim=0, names=None):
    """The gradients by plain autograd, one example after the other."""
    named = {name: p for name, p in model.named_parameters() if names is None or name in names}
    rows = []
    for i in range(len(batch[-1]) if len(batch) > 1 else batch[0].shape[batch_dim or 0]):
        output = model(batch[0][i] if batch_dim is None else batch[0].narrow(batch_dim, i, 1))
        output = output if batch_dim is None else output.squeeze(batch_dim)
        value = loss(output, *(target[i] for target in batch[1:]))
        found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for g, p in zip(found, named.values(), strict=True)])
    return {name: torch.stack(column) for name, column in zip(named, zip(*rows, strict=True), strict=True)}


def norms_of(gradients):
    return torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0).sqrt()


def parameters(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def check(model, loss, batch, *, batch_dim=0, rtol=1e-7, atol=1e-9, monkeypatch=None, falls_back=False):
    """All three functions against the loop; with ``monkeypatch``, whether they needed vmap(grad)."""
    fell_back = []
    if monkeypatch is not None:
        transforms = _per_sample_run.PerSample._from_transforms
        monkeypatch.setattr(
            _per_sample_run.PerSample,
            "_from_transforms",
            lambda self, *args: (fell_back.append(self.called), transforms(self, *args))[1],
        )
    close = lambda got, want: torch.testing.assert_close(got, want, rtol=rtol, atol=atol, check_dtype=False)
    params, expected = parameters(model), loop(model, loss, batch, batch_dim)
    gradients = fl.per_sample_grads(model, loss, batch_dim=batch_dim)(params, batch)
    assert list(gradients) == list(params)
    for name, want in expected.items():
        assert gradients[name].dtype == params[name].dtype
        close(gradients[name], want)
    norms = norms_of(expected)
    close(fl.per_sample_grad_norms(model, loss, batch_dim=batch_dim)(params, batch), norms)
    # About half of the examples are clipped.
    bound = norms.median().item()
    sums, found = fl.clipped_grad_sum(model, loss, bound, batch_dim=batch_dim)(params, batch)
    close(found, norms)
    weights = (bound / norms).clamp(max=1)
    for name, want in expected.items():
        close(sums[name], torch.einsum("b,b...->...", weights, want))
    assert bool(fell_back) == falls_back or monkeypatch is None
