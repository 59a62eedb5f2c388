"""Every operator that vmap does not run as others, with the reason. The tests fail if an entry is not needed.

An entry names an operator, or one form of it as in "narrow (jvp)".
"""

from __future__ import annotations

#: Results are uninitialised memory: only shapes and dtypes are compared.
ONLY_SHAPES = {"empty_like", "new_empty", "new_empty_strided", "empty_strided"}

#: The shape of the result depends on the data, and an empty batch has none: only batches with examples are compared.
SIZE_FROM_DATA = {"argwhere", "bincount", "masked_select", "nonzero", "tensor_split", "unique", "unique_consecutive"}

#: PyTorch's own `out=` form gives other numbers than the function: for one dimension it is not conjugated.
WRONG_OUT = {"fft.ihfftn"}

#: Plain autograd's derivative, the loop's, is wrong. tests/support/derivatives.py judges ours.
WRONG_VJP = {"as_strided_scatter"}

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

_DUPLICATES = "the samples write several values to one place; which of them stays is undefined"
_NO_REPARAMETRIZATION = "samples have no derivative by the parameters of their distribution"

#: Derivatives that finite differences cannot judge, and why: plain autograd alone does.
NO_DIFFERENCES = {
    "nn.functional.max_unpool1d": _DUPLICATES,
    "nn.functional.max_unpool2d": _DUPLICATES,
    "nn.functional.max_unpool3d": _DUPLICATES,
    "normal": _NO_REPARAMETRIZATION,
    "normal.number_mean": _NO_REPARAMETRIZATION,
    "as_strided.partial_views": "it reads memory around its argument, which a shifted copy does not have",
}

_PYTHON_VALUE = "it makes a Python value of a tensor, and each example has another"
_STATISTICS = "running statistics are written, and every example has its own"

#: Samples that raise our error, and why.
REFUSED = {
    "item": _PYTHON_VALUE,
    "allclose": _PYTHON_VALUE,
    "nn.functional.one_hot": "the largest index is the number of classes, and an empty batch has none",
    "nn.functional.gaussian_nll_loss": "it checks with a Python `if` that the variance is not negative",
    "native_batch_norm": _STATISTICS,
    "_native_batch_norm_legit": _STATISTICS,
    "_batch_norm_with_update": _STATISTICS,
    "nn.functional.batch_norm": _STATISTICS,
    "nn.functional.instance_norm": _STATISTICS,
    "to_sparse": "a sparse tensor cannot be a batch of dense ones",
}

#: Samples whose derivative, or a form of it, raises an error, and why.
WITHOUT_DERIVATIVE = {
    "to_sparse": "a sparse tensor has no forward-mode derivative, and cannot be a batch of dense ones",
    "native_batch_norm": _STATISTICS,
    "_native_batch_norm_legit": _STATISTICS,
    "_batch_norm_with_update": _STATISTICS,
    "nn.functional.batch_norm": _STATISTICS,
    "nn.functional.instance_norm": _STATISTICS,
}

#: Samples that raise PyTorch's own error, and why.
FAILING: dict[str, str] = {}

#: Operators that run once for each example, with the warning. A new release of PyTorch shows its new ones here.
LOOPING = {"unique", "unique_consecutive"}

#: ATen operators that run once for each example, by the reason: those of the names above, and others that few programs
#: call.
LOOPING_ATEN = {
    "the random numbers come from a key that is an argument, or are a mask of one kernel": [
        "_fill_mem_eff_dropout_mask_",
        "_philox_key_fold_in",
        "_philox_key_split",
        "_philox_normal",
        "_philox_normal_",
        "_philox_uniform",
        "_philox_uniform_",
    ],
    "attention kernels of single backends": [
        "_cudnn_attention_backward",
        "_flash_attention_forward.quantized",
        "_flash_attention_forward_no_dropout_inplace",
        "_scaled_dot_product_attention_math_for_mps",
        "_triton_multi_head_attention",
        "_triton_scaled_dot_attention",
    ],
    "recurrent kernels of single backends": [
        "_cudnn_init_dropout_state",
        "_cudnn_rnn",
        "_cudnn_rnn_backward",
        "_cudnn_rnn_flatten_weight",
        "_lstm_mps",
        "_thnn_fused_gru_cell",
        "_thnn_fused_gru_cell_backward",
        "_thnn_fused_lstm_cell",
        "_thnn_fused_lstm_cell_backward_impl",
        "lstm_mps_backward",
        "miopen_rnn",
        "miopen_rnn_backward",
        "mkldnn_rnn_layer",
    ],
    "a loss of single backends, whose general form has a rule": [
        "_cudnn_ctc_loss",
        "_cudnn_ctc_loss.Tensor",
        "miopen_ctc_loss",
        "miopen_ctc_loss.Tensor",
    ],
    "`out=` forms of operators that have no form without": [
        "_amp_foreach_non_finite_check_and_unscale.out",
        "_amp_update_scale.out",
        "_fused_adagrad.out",
        "_fused_adagrad.tensor_lr_out",
        "_fused_adam.out",
        "_fused_adam.tensor_lr_out",
        "_fused_adamw.out",
        "_fused_adamw.tensor_lr_out",
        "_fused_sgd.out",
        "_fused_sgd.tensor_lr_out",
        "_slow_conv2d_backward.grad_input",
        "adaptive_avg_pool3d_backward.grad_input",
    ],
    "observers, which write their statistics": [
        "_fused_moving_avg_obs_fq_helper",
        "_fused_moving_avg_obs_fq_helper_functional",
    ],
    "pieces of batch norm over several GPUs, which write running statistics": [
        "batch_norm_backward_elemt",
        "batch_norm_backward_reduce",
        "batch_norm_elemt",
        "batch_norm_gather_stats",
        "batch_norm_gather_stats_with_counts",
        "batch_norm_stats",
        "batch_norm_update_stats",
    ],
    "low-precision products that only some GPUs have": [
        "_cslt_compress",
        "_cslt_sparse_mm",
        "_grouped_mm",
        "_mixed_dtypes_linear",
        "_scaled_grouped_mm",
        "_scaled_grouped_mm_v2",
        "_scaled_mm",
        "_scaled_mm_v2",
        "_sparse_semi_structured_addmm",
        "_sparse_semi_structured_linear",
        "_sparse_semi_structured_mm",
    ],
    "the layout of a packed weight is that of one matrix": [
        "_convert_weight_to_int4pack",
        "_convert_weight_to_int4pack_for_cpu",
        "_dyn_quant_pack_4bit_weight",
    ],
    "sparse and ragged layouts that are the same for all examples": [
        "_convert_indices_from_csr_to_coo",
        "_jagged_to_padded_dense_forward",
        "_padded_dense_to_jagged_forward",
        "_sparse_mm_reduce_impl",
        "_sparse_mm_reduce_impl_backward",
        "_spsolve",
        "hspmm",
        "sparse_sampled_addmm",
    ],
    "the number of distinct values depends on the data: refused where it differs between examples": [
        "_unique",
        "_unique2",
        "unique_consecutive",
        "unique_dim",
        "unique_dim_consecutive",
    ],
    "steps of operators that have a rule, or of functionalization": [
        "_cummax_helper",
        "_cummin_helper",
        "slice_inverse",
    ],
    "they exist for PyTorch's own tests": [
        "_foobar",
        "_test_autograd_multiple_dispatch.fullcoverage",
        "_test_autograd_multiple_dispatch_view",
        "_test_autograd_multiple_dispatch_view_copy",
        "_test_functorch_fallback",
        "_test_optional_filled_intlist",
        "_test_optional_floatlist",
        "_test_optional_intlist",
        "_test_parallel_materialize",
        "_test_warn_in_autograd",
    ],
}
