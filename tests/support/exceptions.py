"""Every operator that vmap does not run as others, with the reason. The tests fail if an entry is not needed."""

from __future__ import annotations

#: Results are uninitialised memory: only shapes and dtypes are compared.
ONLY_SHAPES = {"empty_like", "new_empty", "new_empty_strided", "empty_strided"}

#: Meaning depends on the strides of the argument: compared only where examples are contiguous.
CONTIGUOUS_ONLY = {
    "view",
    "view_as_complex",
    "view_as",
    "as_strided",
    "as_strided_copy",
    "as_strided_scatter",
    "as_strided.partial_views",
}

_DATA_DEPENDENT_SHAPE = "the shape of the result depends on the data, so it would differ between examples"
_PYTHON_VALUE = "it makes a Python value of a tensor, and each example has another"
_STATISTICS = "running statistics are written, and every example has its own"

#: Samples that raise our error, and why.
REFUSED = {
    "item": _PYTHON_VALUE,
    "allclose": _PYTHON_VALUE,
    "equal": _PYTHON_VALUE,
    "cov": "it checks the weights with a Python `if`",
    "combinations": _DATA_DEPENDENT_SHAPE,
    "masked_select": _DATA_DEPENDENT_SHAPE,
    "unique": _DATA_DEPENDENT_SHAPE,
    "unique_consecutive": _DATA_DEPENDENT_SHAPE,
    "bincount": _DATA_DEPENDENT_SHAPE,
    "nonzero": _DATA_DEPENDENT_SHAPE,
    "argwhere": _DATA_DEPENDENT_SHAPE,
    "nn.functional.one_hot": "the largest index is the number of classes, and an empty batch has none",
    "nn.functional.gaussian_nll_loss": "it checks with a Python `if` that the variance is not negative",
    "native_batch_norm": _STATISTICS,
    "_native_batch_norm_legit": _STATISTICS,
    "_batch_norm_with_update": _STATISTICS,
    "nn.functional.batch_norm": _STATISTICS,
    "nn.functional.instance_norm": _STATISTICS,
    "tensor_split": "indices that differ between examples give pieces of different sizes",
    "index_put": "values at a mask that differs between examples are of different number",
    "resize_": "it gives a tensor another shape in place",
    "resize_as_": "it gives a tensor another shape in place",
    "to_sparse": "a sparse tensor cannot be a batch of dense ones",
}

_EMPTY_BATCH = "the kernel refuses an empty batch"

#: Samples that raise PyTorch's own error, and why.
FAILING = {
    "_chunk_cat": _EMPTY_BATCH,
    "_segment_reduce.lengths": _EMPTY_BATCH,
}

#: Operators that run once for each example, with the warning. A new release of PyTorch shows its new ones here.
LOOPING = {
    "histogram",
    "histogramdd",
    "histc",
    "nonzero_static",
    "hash_tensor",
}
