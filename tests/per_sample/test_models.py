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
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], dtype=x.dtype)
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
        return F.linear(y, torch.ones(3, 5, dtype=y.dtype), self.bias)


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
    "hooks": (Hooked, _rows(4)),
    "drop_connect_of_nothing": (DropConnect, _rows(4)),
}
FALLING_BACK = {
    "function": (WithFunction, _rows(4)),
    "checkpoint": (Checkpointed, _rows(4)),
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
