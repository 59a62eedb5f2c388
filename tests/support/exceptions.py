"""Every operator that vmap does not run as others, with the reason. The tests fail if an entry is not needed.

An entry names an operator, or one form of it as in "narrow (jvp)".
"""

from __future__ import annotations

#: Results are uninitialised memory: only shapes and dtypes are compared.
ONLY_SHAPES = {"empty_like", "new_empty", "new_empty_strided", "empty_strided"}

#: With randomness="same" the numbers are not those of a single example: the kernel draws none for positive elements.
OTHER_NUMBERS = {"nn.functional.rrelu"}

#: The shape of the result depends on the data, and an empty batch has none: only batches with examples are compared.
SIZE_FROM_DATA = {"argwhere", "bincount", "masked_select", "nonzero", "tensor_split", "unique", "unique_consecutive"}

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
_DISTRIBUTION = "randomness='same' with a distribution that differs between examples"
_MASK = "a mask is drawn into a tensor that is not batched"

#: Samples that raise our error, and why.
REFUSED = {
    "item": _PYTHON_VALUE,
    "allclose": _PYTHON_VALUE,
    "equal": _PYTHON_VALUE,
    "cov": "it checks the weights with a Python `if`",
    "nn.functional.one_hot": _DATA_DEPENDENT_SHAPE,
    "nn.functional.ctc_loss": "the size of its workspace depends on the lengths, which are data",
    "nn.functional.gaussian_nll_loss": "it checks with a Python `if` that the variance is not negative",
    "native_batch_norm": _STATISTICS,
    "_native_batch_norm_legit": _STATISTICS,
    "_batch_norm_with_update": _STATISTICS,
    "nn.functional.batch_norm": _STATISTICS,
    "nn.functional.instance_norm": _STATISTICS,
    "to_sparse": "a sparse tensor cannot be a batch of dense ones",
    "bernoulli": _DISTRIBUTION,
    "multinomial": _DISTRIBUTION,
    "normal": _DISTRIBUTION,
    "normal.number_mean": _DISTRIBUTION,
    "nn.functional.dropout2d (jvp)": _MASK,
    "nn.functional.multi_head_attention_forward": _MASK,
    "nn.functional.rrelu": _MASK,
    "nn.functional.cosine_similarity (jvp)": "the formula writes batched values into a tensor that is not batched",
    "nn.functional.linear_cross_entropy.chunked_none (vjp)": "it writes batched values into a tensor it has made",
}

_SCALAR_LOGITS = "a scalar in the place of a row of logits raises PyTorch's error about its dimensions"
_NO_FIRST_EXAMPLE = "randomness='same' takes the shape from the first example of an empty batch"
_COUNTED_WRITE = "the derivative meets a saved tensor that the rule has written into"

#: Samples that raise PyTorch's own error, and why.
FAILING = {
    "nn.functional.multi_margin_loss": _SCALAR_LOGITS,
    "nn.functional.multilabel_margin_loss": _SCALAR_LOGITS,
    "cauchy": _NO_FIRST_EXAMPLE,
    "exponential": _NO_FIRST_EXAMPLE,
    "geometric": _NO_FIRST_EXAMPLE,
    "log_normal": _NO_FIRST_EXAMPLE,
    "uniform": _NO_FIRST_EXAMPLE,
    "normal.in_place": _NO_FIRST_EXAMPLE,
    "rand_like": _NO_FIRST_EXAMPLE,
    "randint_like": _NO_FIRST_EXAMPLE,
    "randn_like": _NO_FIRST_EXAMPLE,
    "nn.functional.dropout2d": _NO_FIRST_EXAMPLE,
    "nn.functional.dropout3d": _NO_FIRST_EXAMPLE,
    "nn.functional.multi_head_attention_forward": _NO_FIRST_EXAMPLE,
    "nn.functional.rrelu": _NO_FIRST_EXAMPLE,
    "native_batch_norm (vjp)": _COUNTED_WRITE,
    "nn.functional.batch_norm (vjp)": _COUNTED_WRITE,
    "nn.functional.instance_norm (vjp)": _COUNTED_WRITE,
    "nn.functional.fractional_max_pool2d (vjp)": "the kernel reads indices that are not contiguous",
    "nn.functional.glu (jvp)": "its formula counts the dimension in the batch",
    "to_sparse (vjp)": "a sparse tensor cannot be a batch of dense ones",
}

#: Operators that run once for each example, with the warning. A new release of PyTorch shows its new ones here.
LOOPING = {
    "unique",
    "unique_consecutive",
    "nn.functional.linear_cross_entropy.chunked",
    "nn.functional.linear_cross_entropy.chunked_none (function)",
    "nn.functional.ctc_loss (vjp)",
    "nn.functional.pdist (vjp)",
}
