"""Each kind of layer, in both precisions, against the loop over single examples; none of them falls back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from .reference import check

EXAMPLES = 5


def _images(channels, *sizes):
    return lambda: torch.randn(EXAMPLES, channels, *sizes)


def _rows(*sizes):
    return lambda: torch.randn(EXAMPLES, *sizes)


def _ids(*sizes):
    return lambda: torch.randint(7, (EXAMPLES, *sizes))


LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), _rows(4)),
    "linear_no_bias": (lambda: nn.Linear(4, 3, bias=False), _rows(4)),
    "linear_sequence_gram": (lambda: nn.Linear(12, 11), _rows(2, 12)),
    "linear_sequence_direct": (lambda: nn.Linear(4, 3), _rows(9, 4)),
    "linear_two_dims": (lambda: nn.Linear(4, 3), _rows(2, 3, 4)),
    "bilinear": (lambda: Apply(nn.Bilinear(4, 4, 3), lambda layer, x: layer(x, x.sin())), _rows(4)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), _images(2, 9)),
    "conv1d_unequal_same": (lambda: nn.Conv1d(2, 3, 4, padding="same", dilation=3), _images(2, 9)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3), _images(2, 6, 7)),
    "conv2d_same": (lambda: nn.Conv2d(2, 3, (3, 2), padding="same"), _images(2, 6, 7)),
    "conv2d_valid": (lambda: nn.Conv2d(2, 3, 3, padding="valid"), _images(2, 6, 7)),
    "conv2d_reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), _images(2, 6, 7)),
    "conv2d_groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), _images(4, 6, 7)),
    "conv2d_depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), _images(4, 6, 7)),
    "conv2d_all_options": (
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2),
        _images(4, 7, 8),
    ),
    "conv2d_one_by_one": (lambda: nn.Conv2d(4, 3, 1, stride=2), _images(4, 6, 7)),
    "conv2d_gram": (lambda: nn.Conv2d(8, 16, 3), _images(8, 4, 4)),
    "conv2d_patches": (lambda: nn.Conv2d(2, 16, 2), _images(2, 4, 4)),
    "conv2d_groups_gram": (lambda: nn.Conv2d(16, 16, 3, groups=2), _images(16, 4, 3)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=(0, 1, 1)), _images(2, 4, 5, 4)),
    "conv3d_gram": (lambda: nn.Conv3d(4, 9, 2, groups=1, dilation=(1, 2, 1)), _images(4, 3, 3, 2)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1), _images(2, 5)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, dilation=2), _images(4, 4, 3)),
    "conv_transpose2d_gram": (lambda: nn.ConvTranspose2d(16, 9, 3, bias=False), _images(16, 2, 2)),
    "conv_transpose2d_slack": (
        lambda: nn.ConvTranspose2d(2, 3, 3, dilation=3, output_padding=2),
        _images(2, 4, 3),
    ),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=2), _images(2, 2, 3, 2)),
    "conv2d_unbatched": (lambda: Apply(nn.Conv2d(2, 3, 3), lambda layer, x: layer(x[0])[None]), _images(2, 6, 7)),
    "conv2d_frames": (
        lambda: Apply(nn.Conv2d(2, 3, 3), lambda layer, x: layer(x.flatten(0, 1)).unflatten(0, (1, -1))),
        _rows(3, 2, 5, 5),
    ),
    "conv2d_frames_gram": (
        lambda: Apply(nn.Conv2d(8, 9, 3), lambda layer, x: layer(x.flatten(0, 1)).unflatten(0, (1, -1))),
        _rows(2, 8, 4, 3),
    ),
    "conv2d_channels_last": (
        lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
        lambda: torch.randn(EXAMPLES, 3, 6, 7).to(memory_format=torch.channels_last),
    ),
    "embedding": (lambda: nn.Embedding(7, 3), _ids(6)),
    "embedding_padding": (lambda: nn.Embedding(7, 3, padding_idx=2), _ids(6)),
    "embedding_negative_padding": (lambda: nn.Embedding(7, 3, padding_idx=-1), _ids(6)),
    "embedding_two_dims": (lambda: nn.Embedding(7, 3), _ids(3, 4)),
    "embedding_one_id": (lambda: nn.Embedding(7, 3), _ids()),
    "embedding_by_frequency": (lambda: nn.Embedding(7, 3, scale_grad_by_freq=True), _ids(6)),
    "embedding_bag": (lambda: nn.EmbeddingBag(7, 3), _ids(6)),
    "layer_norm": (lambda: nn.LayerNorm(4), _rows(4)),
    "layer_norm_two_dims": (lambda: nn.LayerNorm((3, 4)), _rows(2, 3, 4)),
    "layer_norm_no_bias": (lambda: nn.LayerNorm(4, bias=False), _rows(3, 4)),
    "rms_norm": (lambda: nn.RMSNorm(4), _rows(3, 4)),
    "group_norm": (lambda: nn.GroupNorm(2, 4), _images(4, 3, 5)),
    "group_norm_no_places": (lambda: nn.GroupNorm(2, 4), _rows(4)),
    "instance_norm": (lambda: nn.InstanceNorm2d(3, affine=True), _images(3, 4, 5)),
    "instance_norm_tracking_eval": (
        lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True).eval(),
        _images(3, 5),
    ),
    "batch_norm_eval": (lambda: _with_statistics(nn.BatchNorm2d(3)).eval(), _images(3, 4, 5)),
    "batch_norm_eval_rows": (lambda: _with_statistics(nn.BatchNorm1d(3)).eval(), _rows(3)),
    "batch_norm_without_statistics": (lambda: nn.BatchNorm2d(3, track_running_stats=False), _images(3, 4, 5)),
    "prelu": (lambda: nn.PReLU(4), _rows(4)),
    "self_attention": (lambda: Apply(nn.MultiheadAttention(4, 2, batch_first=True), _attend), _rows(3, 4)),
    "cross_attention": (lambda: Cross(nn.MultiheadAttention(4, 2, batch_first=True)), _rows(3, 4)),
    "attention_of_other_widths": (
        lambda: Cross(nn.MultiheadAttention(4, 2, kdim=4, vdim=3, batch_first=True)),
        _rows(3, 4),
    ),
    "attention_with_bias_kv": (
        lambda: Cross(nn.MultiheadAttention(4, 2, add_bias_kv=True, add_zero_attn=True, batch_first=True)),
        _rows(3, 4),
    ),
    "lstm": (lambda: Apply(nn.LSTM(4, 3, batch_first=True), lambda layer, x: layer(x)[0]), _rows(3, 4)),
    "gru_cell": (lambda: nn.GRUCell(4, 3), _rows(4)),
}


class Apply(nn.Module):
    def __init__(self, layer, call):
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x):
        return self.call(self.layer, x)


class Cross(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        key = x[:, :2] * 2
        return self.attention(x, key, key[..., : self.attention.vdim].cos(), need_weights=False)[0]


def _attend(attention, x):
    return attention(x, x, x)[0]


def _with_statistics(layer):
    for _ in range(3):
        layer(torch.randn(4, 3, *[2] * (isinstance(layer, nn.BatchNorm2d) * 2)))
    return layer


def _loss(output):
    return (output * torch.linspace(0.5, 2, output.numel(), dtype=output.dtype).view(output.shape)).sin().sum()


@pytest.mark.parametrize("name", LAYERS)
def test_float64(name, monkeypatch):
    torch.manual_seed(0)
    make, data = LAYERS[name]
    x = data()
    check(make().double(), _loss, (x.double() if x.is_floating_point() else x,), monkeypatch=monkeypatch)


@pytest.mark.parametrize("name", LAYERS)
def test_float32(name):
    torch.manual_seed(0)
    make, data = LAYERS[name]
    check(make(), _loss, (data(),), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["linear_sequence_direct", "conv2d_all_options", "embedding", "layer_norm"])
def test_one_example(name):
    torch.manual_seed(0)
    make, data = LAYERS[name]
    x = data()[:1]
    check(make().double(), _loss, (x.double() if x.is_floating_point() else x,))


def test_conv2d_patches_on_any_device(monkeypatch):
    """What other devices than the CPU use, where a convolution with many groups is slow."""
    from functorch_lite._per_sample_terms import ConvWeight, Product

    monkeypatch.setattr(ConvWeight, "gradients", Product.gradients)
    torch.manual_seed(0)
    for name in ("conv1d", "conv2d_all_options", "conv2d_depthwise", "conv3d", "conv_transpose2d", "conv2d_frames"):
        make, data = LAYERS[name]
        check(make().double(), _loss, (data().double(),))


def test_dropped_gradient_is_zero():
    """A parameter that the loss does not depend on."""
    layer = nn.Linear(3, 3).double()
    check(
        Apply(nn.ModuleList([layer, nn.Linear(2, 2).double()]), lambda layers, x: layers[0](x)),
        _loss,
        (torch.randn(4, 3).double(),),
    )


def test_cross_entropy_as_it_is():
    torch.manual_seed(0)
    check(nn.Linear(4, 3).double(), F.cross_entropy, (torch.randn(5, 4).double(), torch.randint(3, (5,))))
