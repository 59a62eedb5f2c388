"""Whole models: shared weights, weights used in other ways than by their layers, and what has to fall back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import functorch_lite as fl

from .reference import check

EXAMPLES = 5


class Block(nn.Module):
    """A residual block, whose sum is made in place."""

    def __init__(self, channels):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(2, channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(2, channels)

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(y))
        y += x
        return F.relu(y, inplace=True)


def _resnet():
    stem = [nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(inplace=True), Block(4), nn.MaxPool2d(2), Block(4)]
    return nn.Sequential(*stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


class Language(nn.Module):
    """Embeddings of tokens and places, a transformer, and a head that may be tied to the embedding."""

    def __init__(self, tied, layers=2, **options):
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 8, padding_idx=0), nn.Embedding(6, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, **{"dropout": 0.0, **options})
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=x.device, dtype=x.dtype)
        return self.head(self.encoder(x, mask, is_causal=True))


class Vision(nn.Module):
    """A class token and places as bare parameters."""

    def __init__(self):
        super().__init__()
        self.patches, self.norm = nn.Conv2d(1, 8, 2, stride=2), nn.LayerNorm(8)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 10, 8))
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        y = self.norm(x)
        return self.head((x + self.attention(y, y, y, need_weights=False)[0])[:, 0])


class Twice(nn.Module):
    """One layer called twice, at different lengths."""

    def __init__(self, width=4):
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x):
        y = self.norm(self.layer(x)).tanh()
        return self.head(self.norm(self.layer(y[:, :2])).mean(1))


class Bare(nn.Module):
    """Parameters used by operators, not by layers."""

    def __init__(self):
        super().__init__()
        self.w, self.scale = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(5))
        self.mix, self.bias = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.randn(3))

    def forward(self, x):
        y = x @ self.w * self.scale.exp() + F.linear(x, self.w[:, :4].T, None).sum(-1, keepdim=True)
        y = F.linear(y, (self.mix + self.mix.T) / 2, self.w[0]).tanh()
        y = torch.einsum("bi,ij->bj", y, self.mix) * self.w.norm()
        return F.linear(y, torch.ones(3, 5, dtype=y.dtype, device=y.device), self.bias)


class Scale(torch.autograd.Function):
    """Not seen by the calls."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum_to_size(w.shape)


class WithFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.layer = nn.Parameter(torch.randn(4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(Scale.apply(x, self.w))


class WithFunctionOfWeight(nn.Module):
    """A call with a parameter that is seen and a weight that depends on one in a way that is not."""

    def __init__(self):
        super().__init__()
        self.w, self.scale, self.bias = (nn.Parameter(torch.randn(n)) for n in ((3, 4), (4,), (3,)))

    def forward(self, x):
        return F.linear(x, Scale.apply(self.w, self.scale), self.bias)


class InPlace(nn.Module):
    """What each layer returns is written into."""

    def __init__(self):
        super().__init__()
        self.table, self.linear, self.norm = nn.Embedding(7, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.conv, self.groups, self.head = nn.Conv1d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Linear(4, 3)

    def forward(self, ids):
        x = self.table(ids)
        x.mul_(2).sin_()
        y = self.linear(x)
        y[..., 0] = 0.5
        y[:, 1] += x[:, 0]
        z = self.norm(y.clone())
        z[:, :2].tanh_()
        frames = self.conv(z.transpose(1, 2)[0])
        frames.relu_()
        out = self.groups(frames[None])
        out += frames
        out = self.head(out.mean(-1))
        out.exp_()
        return out


class Sequences(nn.Module):
    """A whole nn.Transformer, and an LSTM in both directions."""

    def __init__(self):
        super().__init__()
        self.transformer = nn.Transformer(4, 2, 1, 1, 6, 0.0, batch_first=True)
        self.lstm, self.head = nn.LSTM(4, 3, 2, bidirectional=True, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.lstm(self.transformer(x, x[:, :2]))[0][:, -1])


class Experts(nn.Module):
    """Each example chooses a part of a parameter."""

    def __init__(self):
        super().__init__()
        self.experts, self.gate = nn.Parameter(torch.randn(5, 4, 3)), nn.Linear(4, 5)

    def forward(self, x):
        scores = self.gate(x)
        return (x[:, None] @ self.experts[scores.argmax(-1)])[:, 0] * scores.max()


class Lists(nn.Module):
    """Calls that take lists of parameters, and operators by their own names."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ParameterList([torch.randn(4, 3) for _ in range(3)])
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, x):
        y = torch.stack([x @ part for part in self.parts]).sum(0) + x @ torch.stack(list(self.parts)).mean(0)
        y = y + torch.block_diag(*self.parts).sum() + x @ sum(self.parts) + torch.addmm(self.bias, x, self.parts[0])
        return torch.ops.aten.add.Tensor(y, torch.ops.aten.mul.Tensor(self.bias, 2.0))


class WithVmap(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return fl.vmap(lambda row: self.layer(row).sin())(x)


def _orthogonal():
    return nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)), nn.Linear(4, 3))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.second(checkpoint(lambda x: self.first(x).tanh(), x, use_reentrant=False))


class WithDerivative(nn.Module):
    """A model whose output is a derivative."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        slope = lambda x: self.second(self.first(x).tanh()).sin().sum()
        return fl.grad(slope)(x)[:, :3]


class Written(nn.Module):
    """A parameter is changed in place before it is used."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        w = self.w * 2
        y = F.linear(x, w)
        w.mul_(3)
        return y + F.linear(x.sin(), w)


class DropConnect(nn.Module):
    """Its random numbers are drawn for a weight, in each example others."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return F.linear(x, F.dropout(self.w, 0.0, training=True))


class Hooked(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)
        self.first.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        self.first.register_forward_hook(lambda module, args, output: output.sin() * module.bias)

    def forward(self, x):
        return self.second(self.first(x))


def _weight_norm():
    layers = [nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)]
    return nn.Sequential(*layers)


def _conv_in_loop():
    layer = nn.Conv2d(2, 2, 3, padding=1)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), layer, nn.Flatten(), nn.Linear(2 * 5 * 4, 3))


def _rows(*sizes):
    return lambda: (torch.randn(EXAMPLES, *sizes), torch.randint(3, (EXAMPLES,)))


def _text():
    ids = torch.randint(11, (EXAMPLES, 6))
    return ids, ids.roll(1, 1)


MODELS = {
    "mlp_in_place": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)), _rows(4)),
    "resnet": (_resnet, _rows(1, 13, 13)),
    "transformer": (lambda: Language(False), _text),
    "transformer_norm_first": (lambda: Language(False, norm_first=True, activation="gelu"), _text),
    "transformer_tied": (lambda: Language(True), _text),
    "transformer_tied_eval": (lambda: Language(True).eval(), _text),
    "vision": (Vision, _rows(1, 6, 6)),
    "twice": (Twice, _rows(7, 4)),
    "twice_gram": (lambda: Twice(24), _rows(3, 24)),
    "conv_in_loop": (_conv_in_loop, _rows(2, 5, 4)),
    "bare_parameters": (Bare, _rows(4)),
    "weight_norm": (_weight_norm, _rows(4)),
    "in_place": (InPlace, lambda: (torch.randint(7, (EXAMPLES, 6)), torch.randint(3, (EXAMPLES,)))),
    "spectral_norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)).eval(), _rows(4)),
    "orthogonal": (_orthogonal, _rows(4)),
    "sequences": (Sequences, _rows(5, 4)),
    "experts": (Experts, _rows(4)),
    "lists": (Lists, _rows(4)),
    "hooks": (Hooked, _rows(4)),
    "drop_connect_of_nothing": (DropConnect, _rows(4)),
}
FALLING_BACK = {
    "function": (WithFunction, _rows(4)),
    "function_of_weight": (WithFunctionOfWeight, _rows(4)),
    "checkpoint": (Checkpointed, _rows(4)),
    "vmap": (WithVmap, _rows(4)),
    "derivative": (WithDerivative, _rows(4)),
    "written": (Written, _rows(4)),
}


def _double(batch):
    return tuple(x.double() if x.is_floating_point() else x for x in batch)


@pytest.mark.parametrize("name", MODELS)
def test_by_calls(name, monkeypatch):
    torch.manual_seed(0)
    make, data = MODELS[name]
    check(make().double(), F.cross_entropy, _double(data()), monkeypatch=monkeypatch)


@pytest.mark.parametrize("name", MODELS)
def test_float32(name):
    torch.manual_seed(0)
    make, data = MODELS[name]
    check(make(), F.cross_entropy, data(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", FALLING_BACK)
def test_by_transforms(name, monkeypatch):
    torch.manual_seed(0)
    make, data = FALLING_BACK[name]
    check(make().double(), F.cross_entropy, _double(data()), monkeypatch=monkeypatch, falls_back=True)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and PyTorch found none")
@pytest.mark.parametrize("name", MODELS)
def test_on_a_gpu(name):
    torch.manual_seed(0)
    make, data = MODELS[name]
    check(make().double().cuda(), F.cross_entropy, tuple(x.cuda() for x in _double(data())))
