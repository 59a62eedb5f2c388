"""The table of batching rules itself."""

from __future__ import annotations

import collections

import torch

from functorch_lite import _C


def test_every_row_names_an_operator_of_this_torch():
    if torch.__version__.startswith("2.13"):  # the release that the rows are written for
        assert _C.unknown_operators() == []
    for name, _ in _C.batching_rules():
        assert torch._C._dispatch_has_kernel(name)


def test_no_operator_has_two_rules():
    counts = collections.Counter(name for name, _ in _C.batching_rules())
    assert max(counts.values()) == 1


def test_rules_are_ordinary_registrations():
    for name, _ in _C.batching_rules():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "TESTING_ONLY_GenericWrapper")


def test_the_common_operators_have_rules():
    names = {name for name, _ in _C.batching_rules()}
    for name in ("sin", "add.Tensor", "mm", "convolution", "native_layer_norm", "_softmax", "index.Tensor", "cat"):
        assert f"aten::{name}" in names
