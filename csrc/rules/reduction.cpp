// Reductions, scans, sorting, softmax: whatever acts along dimensions.
#include <ATen/TensorOperators.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/reshape.h>
#include <ATen/ops/result_type.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros_like.h>

#include "rules.h"

namespace functorch_lite {
namespace {

// Unlike other reductions, these take an empty list of dimensions at its word: it reduces nothing.
void all_or_any_rule(BatchCall& call) {
  auto& dims = call.arg("dim");
  if (dims.isNone() || !dims.toIntVector().empty()) return reduce("dim").rule_for(call.schema())(call);
  call.arg(0) = call.to_front(0).unsqueeze(1);
  dims = std::vector<int64_t>{1};
  call.arg("keepdim") = false;
  call.call();
  call.finish();
}

// data[B?,*,n,*], lengths[B?,*,m], axis -> y[B,*,m,*]; the same for its backward operator.
void segment_reduce_rule(BatchCall& call) {
  const auto axis = shift_dim(call.arg("axis").toInt(), call.rank(call.position("data")));
  for (size_t i = 0; i < call.size(); ++i) {
    if (call.is_tensor(i)) call.expand_to_front(i);
  }
  call.arg("axis") = axis;
  if (call.batch_size() == 0 && call.find("unsafe").has_value()) call.arg("unsafe") = true;  // no lengths to check
  call.call();
  call.finish();
}

// boundaries[B?,*,n], values[B?,*,m] -> y[B,*,m]. A single row of boundaries serves values of any shape.
void searchsorted_rule(BatchCall& call) {
  promote_as_seen(call);
  const bool single_row = call.rank(0) == 1;
  const auto sorter = call.position("sorter");
  if (single_row && !call.is_batched(0) && !call.is_batched(sorter)) {
    call.to_front(1);
    call.call();
    return call.finish();
  }
  call.expand_to_front(0);
  if (call.is_tensor(sorter)) call.expand_to_front(sorter);
  const auto values = call.expand_to_front(1);
  call.arg(0) = call.tensor(0).contiguous();
  call.arg(1) = (single_row ? flatten_examples(values) : values).contiguous();
  call.call();
  call.result() = at::reshape_symint(call.result().toTensor(), values.sym_sizes());
  call.finish();
}

// values[B?,*], boundaries[B?,n] -> y[B,*]
void bucketize_rule(BatchCall& call) {
  promote_as_seen(call);
  if (!call.is_batched(1)) {
    call.to_front(0);
    call.call();
    return call.finish();
  }
  const auto values = call.expand_to_front(0);
  const auto y = at::searchsorted(call.to_front(1).contiguous(), flatten_examples(values).contiguous(),
                                  call.arg("out_int32").toBool(), call.arg("right").toBool());
  call.set_results(at::reshape_symint(y, values.sym_sizes()));
  call.finish();
}

// One number in the place of the values.
at::Tensor as_value(const c10::IValue& number, const at::Tensor& boundaries) {
  const auto scalar = number.toScalar();
  return at::scalar_tensor(scalar, boundaries.options().dtype(at::result_type(boundaries, scalar)));
}
void searchsorted_scalar(const c10::OperatorHandle& op, Stack& stack) {
  auto& number = stack[stack.size() - count_arguments(op) + 1];
  number = as_value(number, stack[stack.size() - count_arguments(op)].toTensor());
  find_operator("searchsorted.Tensor").callBoxed(&stack);
}
void bucketize_scalar(const c10::OperatorHandle& op, Stack& stack) {
  auto& number = stack[stack.size() - count_arguments(op)];
  number = as_value(number, stack[stack.size() - count_arguments(op) + 1].toTensor());
  find_operator("bucketize.Tensor").callBoxed(&stack);
}

// x[B?,*], tests[B?,*] -> y[B,*]: whether each element is among the tests.
void isin_rule(BatchCall& call) {
  promote_as_seen(call);
  if (!call.is_batched(1)) {
    call.to_front(0);
    call.call();
    return call.finish();
  }
  const auto dtype = call.tensor(0).scalar_type() == c10::kBool ? c10::kByte : call.tensor(0).scalar_type();
  const auto x = call.expand_to_front(0).to(dtype);
  const auto values = flatten_examples(x);
  const auto tests = std::get<0>(at::sort(flatten_examples(call.to_front(1)), 1));
  at::Tensor found;
  if (tests.sym_size(1) == 0) {
    found = at::zeros_like(values, c10::kBool);
  } else {
    const auto place = at::searchsorted(tests, values).clamp_max(tests.sym_size(1) - 1);
    found = at::gather(tests, 1, place) == values;
  }
  if (call.arg("invert").toBool()) found = found.logical_not();
  call.set_results(found.reshape_symint(x.sym_sizes()));
  call.finish();
}

// Along dimensions too, but the library behind these refuses an empty batch.
Family fourier() {
  return {"along", [](const c10::FunctionSchema& schema) -> Rule {
            return [transform = along({"dim"}).rule_for(schema)](BatchCall& call) {
              if (!finish_without_examples(call)) transform(call);
            };
          }};
}

}  // namespace

void add_reduction_rules(RuleTable& rules) {
  rules.add(reduce("dim"), {"sum.dim_IntList",
                            "nansum",
                            "mean.dim",
                            "amax",
                            "amin",
                            "std.correction",
                            "var.correction",
                            "std_mean.correction",
                            "var_mean.correction",
                            "all.dim",
                            "any.dim",
                            "norm.ScalarOpt_dim",
                            "norm.ScalarOpt_dim_dtype",
                            "linalg_vector_norm",
                            "linalg__powsum",
                            "argmax",
                            "argmin",
                            "prod.dim_int",
                            "logsumexp",
                            "aminmax",
                            "hash_tensor",
                            "count_nonzero",
                            "count_nonzero.dim_IntList"});
  rules.add(&all_or_any_rule, {"all.dims", "any.dims"});
  rules.add(&segment_reduce_rule, {"segment_reduce", "_segment_reduce_backward"});
  rules.add(&searchsorted_rule, {"searchsorted.Tensor"});
  rules.add(&searchsorted_scalar, {"searchsorted.Scalar"});
  rules.add(&bucketize_rule, {"bucketize.Tensor"});
  rules.add(&bucketize_scalar, {"bucketize.Scalar"});
  rules.add(&isin_rule, {"isin.Tensor_Tensor"});
  rules.add(fourier(), {"_fft_c2c", "_fft_r2c", "_fft_c2r"});
  rules.add(reduce_all("sum.dim_IntList"), {"sum"});
  rules.add(reduce_all("mean.dim"), {"mean"});
  rules.add(reduce_all("prod.dim_int"), {"prod"});
  rules.add(reduce_all("amax"), {"max"});
  rules.add(reduce_all("amin"), {"min"});
  rules.add(reduce_all("all.dim"), {"all", "_is_all_true"});
  rules.add(reduce_all("any.dim"), {"any", "_is_any_true"});
  rules.add(reduce_all("median.dim"), {"median"});
  rules.add(reduce_all("nanmedian.dim"), {"nanmedian"});
  rules.add(reduce_all("norm.ScalarOpt_dim"), {"norm.Scalar"});
  rules.add(along({"dim"}), {"max.dim",         "min.dim",      "median.dim",  "nanmedian.dim",  "mode",
                             "kthvalue",        "sort",         "sort.stable", "argsort.stable", "topk",
                             "cumsum",          "cumsum_",      "cumprod",     "cumprod_",       "cummax",
                             "cummin",          "logcumsumexp", "_softmax",    "_log_softmax",   "softmax.int",
                             "log_softmax.int", "glu"});
  rules.add(expanded_along({"dim"}),
            {"_softmax_backward_data", "_log_softmax_backward_data", "glu_backward", "glu_jvp"});
}

}  // namespace functorch_lite
