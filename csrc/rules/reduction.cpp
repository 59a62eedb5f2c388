// Reductions, scans, sorting, softmax: whatever acts along dimensions.
#include <ATen/ops/reshape.h>
#include <ATen/ops/searchsorted.h>

#include "rules.h"

namespace functorch_lite {
namespace {

// data[B?,*,n,*], lengths[B?,*,m], axis -> y[B,*,m,*]; the same for its backward operator.
void segment_reduce_rule(BatchCall& call) {
  const auto axis = shift_dim(call.arg("axis").toInt(), call.rank(call.position("data")));
  for (size_t i = 0; i < call.size(); ++i) {
    if (call.is_tensor(i)) call.expand_to_front(i);
  }
  call.arg("axis") = axis;
  call.call();
  call.finish();
}

// boundaries[B?,*,n], values[B?,*,m] -> y[B,*,m]. A single row of boundaries serves values of any shape.
void searchsorted_rule(BatchCall& call) {
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
  if (single_row) call.arg(1) = flatten_examples(values);
  call.call();
  call.result() = at::reshape_symint(call.result().toTensor(), values.sym_sizes());
  call.finish();
}

// values[B?,*], boundaries[B?,n] -> y[B,*]
void bucketize_rule(BatchCall& call) {
  if (!call.is_batched(1)) {
    call.to_front(0);
    call.call();
    return call.finish();
  }
  const auto values = call.expand_to_front(0);
  const auto y = at::searchsorted(call.to_front(1), flatten_examples(values), call.arg("out_int32").toBool(),
                                  call.arg("right").toBool());
  call.set_results(at::reshape_symint(y, values.sym_sizes()));
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
                            "all.dims",
                            "any.dim",
                            "any.dims",
                            "norm.ScalarOpt_dim",
                            "norm.ScalarOpt_dim_dtype",
                            "linalg_vector_norm",
                            "linalg__powsum",
                            "count_nonzero.dim_IntList",
                            "argmax",
                            "argmin",
                            "prod.dim_int",
                            "logsumexp",
                            "aminmax"});
  rules.add(&segment_reduce_rule, {"segment_reduce", "_segment_reduce_backward"});
  rules.add(&searchsorted_rule, {"searchsorted.Tensor"});
  rules.add(&bucketize_rule, {"bucketize.Tensor"});
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
  rules.add(reduce_all("count_nonzero.dim_IntList"), {"count_nonzero"});
  rules.add(reduce_all("norm.ScalarOpt_dim"), {"norm.Scalar"});
  rules.add(along({"dim"}), {"max.dim",         "min.dim",      "median.dim",  "nanmedian.dim",  "mode",
                             "kthvalue",        "sort",         "sort.stable", "argsort.stable", "topk",
                             "cumsum",          "cumsum_",      "cumprod",     "cumprod_",       "cummax",
                             "cummin",          "logcumsumexp", "_softmax",    "_log_softmax",   "softmax.int",
                             "log_softmax.int", "glu"});
  rules.add(expanded_along({"dim"}), {"_softmax_backward_data", "_log_softmax_backward_data", "glu_backward"});
}

}  // namespace functorch_lite
