// Tensors made in the image of a batched one.
#include <c10/core/MemoryFormat.h>

#include <ATen/ops/zeros.h>

#include "rules.h"

namespace functorch_lite {
namespace {

// The strides are those of one example: the batch is laid out around it.
void new_empty_strided_rule(BatchCall& call) {
  call.to_front(0);
  auto sizes = call.arg("size").toSymIntVector();
  auto strides = call.arg("stride").toSymIntVector();
  c10::SymInt extent = 1;
  for (size_t d = 0; d < sizes.size(); ++d) extent = extent + strides[d] * (sizes[d] - 1);
  sizes.insert(sizes.begin(), call.batch_size());
  strides.insert(strides.begin(), extent.max(1));
  call.arg("size") = sizes;
  call.arg("stride") = strides;
  call.call();
  call.finish();
}

// Zeros for a tangent: of the size of other[B?,*], for every example.
void new_zeros_like_other_rule(BatchCall& call) {
  const auto& other = call.expand_to_front(1);
  call.set_results(at::zeros_symint(other.sym_sizes(), other.options()));
  call.finish();
}

// x[B,*] -> y[B,*] in a memory format. It describes one example, and no format has the same meaning with the batch in
// front, so that all but "preserve" become "contiguous".
void like_rule(BatchCall& call) {
  auto& format = call.arg("memory_format");
  if (format.isNone() || format.toMemoryFormat() == c10::MemoryFormat::Preserve) {
    call.call();
    return call.finish(call.bdim(0));
  }
  call.to_front(0);
  call.arg("memory_format") = c10::MemoryFormat::Contiguous;
  call.call();
  call.finish();
}

}  // namespace

void add_factory_rules(RuleTable& rules) {
  rules.add(&like_rule, {"zeros_like", "ones_like", "full_like", "empty_like", "clone", "_to_copy", "contiguous"});
  rules.add(&new_zeros_like_other_rule, {"_new_zeros_with_same_feature_meta"});
  rules.add(&new_empty_strided_rule, {"new_empty_strided"});
}

}  // namespace functorch_lite
