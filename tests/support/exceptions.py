"""Every operator that vmap does not run as others, with the reason. The tests fail if an entry is not needed.

An entry names an operator, or one form of it as in "narrow (jvp)".
"""

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
    "index_fill (vjp)": "whether an index repeats is a Python value",
    "nn.functional.one_hot": _DATA_DEPENDENT_SHAPE,
    "nn.functional.ctc_loss": "the size of its workspace depends on the lengths, which are data",
    "nn.functional.gaussian_nll_loss": "it checks with a Python `if` that the variance is not negative",
    "native_batch_norm": _STATISTICS,
    "_native_batch_norm_legit": _STATISTICS,
    "_batch_norm_with_update": _STATISTICS,
    "nn.functional.batch_norm": _STATISTICS,
    "nn.functional.instance_norm": _STATISTICS,
    "tensor_split": "indices that differ between examples give pieces of different sizes",
    "narrow (vjp)": "a start that is a tensor becomes a Python value before the derivative is recorded",
    "narrow (jvp)": "a start that is a tensor becomes a Python value before the derivative is recorded",
    "index_put": "values at a mask that differs between examples are of different number",
    "resize_": "it gives a tensor another shape in place",
    "resize_as_": "it gives a tensor another shape in place",
    "to_sparse": "a sparse tensor cannot be a batch of dense ones",
    "nn.functional.cosine_similarity (jvp)": "the formula writes batched values into a tensor that is not batched",
    "nn.functional.linear_cross_entropy.chunked_none (vjp)": "it writes batched values into a tensor it has made",
}

_SCALAR_LOGITS = "a scalar in the place of a row of logits raises PyTorch's error about its dimensions"
_EMPTY_BATCH = "the kernel refuses an empty batch"
_COUNTED_WRITE = "the derivative meets a saved tensor that the rule has written into"
_SCALAR_WINDOW = "windows of a scalar"

#: Samples that raise PyTorch's own error, and why.
FAILING = {
    "nn.functional.multi_margin_loss": _SCALAR_LOGITS,
    "nn.functional.multilabel_margin_loss": _SCALAR_LOGITS,
    "_chunk_cat": _EMPTY_BATCH,
    "_segment_reduce.lengths": _EMPTY_BATCH,
    "native_batch_norm (vjp)": _COUNTED_WRITE,
    "nn.functional.batch_norm (vjp)": _COUNTED_WRITE,
    "nn.functional.instance_norm (vjp)": _COUNTED_WRITE,
    "nn.functional.glu (jvp)": "its formula counts the dimension in the batch",
    "unfold (vjp)": _SCALAR_WINDOW,
    "unfold_copy (vjp)": _SCALAR_WINDOW,
    "to_sparse (vjp)": "a sparse tensor cannot be a batch of dense ones",
}

#: Operators that run once for each example, with the warning. A new release of PyTorch shows its new ones here.
LOOPING = {
    "nn.functional.linear_cross_entropy.chunked",
    "nn.functional.linear_cross_entropy.chunked_none (function)",
    "histogram",
    "histogramdd",
    "histc",
    "nonzero_static",
    "hash_tensor",
    "masked_scatter (vjp)",
    "nn.functional.ctc_loss (vjp)",
    "nn.functional.pdist (vjp)",
}
