// Broadcasting arithmetic, comparison, type conversion, and their in-place and backward forms.
#include <ATen/ops/copy.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/where.h>

#include "rules.h"

namespace functorch_lite {
namespace {

// x[B?,*], end[B?,*], weight[B?,*]: a weight of rank 0 may have another dtype, and takes part in promotion.
void lerp_rule(BatchCall& call) {
  if (call.rank(2) == 0 && call.tensor(0).scalar_type() == call.tensor(1).scalar_type()) {
    const auto dtype = call.schema().is_mutable() ? call.tensor(0).scalar_type() : dtype_as_seen(call);
    for (size_t i = 0; i < 3; ++i) call.arg(i) = call.tensor(i).to(dtype);
  }
  pointwise().rule_for(call.schema())(call);
}

void check_value(BatchCall& call, size_t value) {
  TORCH_CHECK(call.rank(value) == 0, call.schema().name(), ": expected a value of 0 dimensions, got ",
              call.rank(value));
}

// x[B?,*], value[B?] -> x[B,*]: the value of each example fills that example.
void fill_rule(BatchCall& call) {
  check_value(call, 1);
  const bool in_place = call.schema().is_mutable();
  const auto& x = in_place ? call.to_front(0) : call.expand_to_front(0);
  auto value = call.is_batched(1) ? pad_rank(call.to_front(1), call.rank(0)) : call.tensor(1);
  const auto target = in_place ? x : at::empty_like(x);
  target.copy_(value);
  call.set_results(target);
  call.finish();
}

// x[B?,*], y[B?,*] -> y[B,*] in the shape and dtype of x.
void copy_rule(BatchCall& call) {
  call.expand_to_front(0);
  call.to_front(1, call.rank(0));
  call.call();
  call.finish();
}

// x[B?,*], mask[B?,*], value[B?] -> x[B,*].
void masked_fill_rule(BatchCall& call) {
  check_value(call, 2);
  const bool in_place = call.schema().is_mutable();
  const auto rank = std::max(call.rank(0), call.rank(1));
  const auto x = call.to_front(0, rank);
  const auto mask = call.to_front(1, rank);
  const auto value = call.is_batched(2) ? call.to_front(2, rank) : call.tensor(2);
  auto result = at::where(mask, value.to(x.options()), x);
  call.set_results(in_place ? x.copy_(result) : result);
  call.finish();
}

}  // namespace

void add_pointwise_rules(RuleTable& rules) {
  rules.add(&fill_rule, {"fill.Tensor", "fill_.Tensor"});
  rules.add(&copy_rule, {"copy"});
  rules.add(&masked_fill_rule, {"masked_fill.Tensor", "masked_fill_.Tensor"});
  rules.add(&lerp_rule, {"lerp.Tensor", "lerp_.Tensor"});
  // Pointwise, but not tagged so by PyTorch.
  rules.add(pointwise(), {"copy_",
                          "where.self",
                          "masked_fill.Scalar",
                          "masked_fill_.Scalar",
                          "fill.Scalar",
                          "fill_.Scalar",
                          "zero_",
                          "zero",
                          "complex",
                          "polar",
                          "floor_divide",
                          "floor_divide.Scalar",
                          "floor_divide_.Scalar",
                          "floor_divide_.Tensor",
                          "rsub.Tensor",
                          "hardswish",
                          "hardswish_",
                          "_conj_copy",
                          "_neg_view_copy",
                          "_standard_gamma_grad",
                          "_dirichlet_grad",
                          "_masked_scale",
                          "lerp_.Scalar",
                          "_conj",
                          "_conj_physical",
                          "_neg_view",
                          "view_as_real_copy",
                          "real",
                          "imag",
                          "isnan",
                          "isinf",
                          "nan_to_num_",
                          "silu_backward",
                          "gelu_backward",
                          "celu_",
                          "hardswish_backward",
                          "hardsigmoid_backward",
                          "hardtanh_backward",
                          "mish_backward",
                          "elu_backward",
                          "softplus_backward",
                          "softshrink_backward",
                          "hardshrink_backward",
                          "leaky_relu_backward",
                          "logit_backward",
                          "log_sigmoid_backward",
                          "rrelu_with_noise_backward",
                          "threshold_backward",
                          "sigmoid_backward",
                          "tanh_backward",
                          "_prelu_kernel",
                          "_prelu_kernel_backward",
                          "log_sigmoid_forward",
                          "native_dropout_backward",
                          "isin.Tensor_Scalar",
                          "_autocast_to_reduced_precision",
                          "_autocast_to_full_precision",
                          "frexp.Tensor",
                          "_fw_primal",
                          "special_zeta.self_scalar",
                          "special_zeta.other_scalar"});
}

}  // namespace functorch_lite
