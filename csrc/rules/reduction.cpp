// Reductions, scans, sorting, softmax: whatever acts along dimensions.
#include <ATen/ops/amax.h>

#include "rules.h"

namespace functorch_lite {

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
                            "count_nonzero.dim_IntList",
                            "argmax",
                            "argmin",
                            "prod.dim_int",
                            "logsumexp",
                            "aminmax"});
  rules.add(reduce_all("sum.dim_IntList"), {"sum"});
  rules.add(reduce_all("mean.dim"), {"mean"});
  rules.add(reduce_all("prod.dim_int"), {"prod"});
  rules.add(reduce_all("amax"), {"max"});
  rules.add(reduce_all("amin"), {"min"});
  rules.add(reduce_all("all.dim"), {"all"});
  rules.add(reduce_all("any.dim"), {"any"});
  rules.add(reduce_all("median.dim"), {"median"});
  rules.add(reduce_all("nanmedian.dim"), {"nanmedian"});
  rules.add(reduce_all("count_nonzero.dim_IntList"), {"count_nonzero"});
  rules.add(reduce_all("norm.ScalarOpt_dim"), {"norm.Scalar"});
  rules.add(along({"dim"}),
            {"max.dim",      "min.dim",     "median.dim",      "nanmedian.dim", "mode",         "kthvalue",
             "sort",         "sort.stable", "argsort.stable",  "topk",          "cumsum",       "cumsum_",
             "cumprod",      "cumprod_",    "cummax",          "cummin",        "logcumsumexp", "_softmax",
             "_log_softmax", "softmax.int", "log_softmax.int", "renorm",        "glu"});
  rules.add(expanded_along({"dim"}), {"_softmax_backward_data", "_log_softmax_backward_data", "glu_backward"});
}

}  // namespace functorch_lite
