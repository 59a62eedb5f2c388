// Tensors made in the image of a batched one.
#include <ATen/ops/as_strided.h>
#include <ATen/ops/new_zeros.h>
#include <c10/core/MemoryFormat.h>

#include "rules.h"

namespace functorch_lite {
namespace {

// Zeros z[B,*] of which each example has the given layout: the examples lie behind each other. Made from `like`, so
// that they are batched further down wherever it is.
at::Tensor zeros_with_layout(const at::Tensor& like, const c10::TensorOptions& options, const c10::SymInt& batch_size,
                             std::vector<c10::SymInt> sizes, std::vector<c10::SymInt> strides,
                             const c10::SymInt& offset) {
  c10::SymInt extent = offset + 1;
  for (size_t d = 0; d < sizes.size(); ++d) extent = extent + strides[d] * (sizes[d] - 1).max(0);
  sizes.insert(sizes.begin(), batch_size);
  strides.insert(strides.begin(), extent);
  return at::as_strided_symint(like.new_zeros_symint({batch_size * extent}, options), sizes, strides, offset);
}

void new_empty_strided_rule(BatchCall& call) {
  const auto& x = call.to_front(0);
  auto options = x.options();
  if (!call.arg("dtype").isNone()) options = options.dtype(call.arg("dtype").toScalarType());
  if (!call.arg("device").isNone()) options = options.device(call.arg("device").toDevice());
  call.set_results(zeros_with_layout(x, options, call.batch_size(), call.arg("size").toSymIntVector(),
                                     call.arg("stride").toSymIntVector(), 0));
  call.finish();
}

// Zeros that can be the tangent of other[B?,*]: of its layout, for every example.
void tangent_zeros_rule(BatchCall& call) {
  const auto& other = call.to_front(1);
  auto sizes = other.sym_sizes().vec();
  auto strides = other.sym_strides().vec();
  if (call.is_batched(1)) {
    sizes.erase(sizes.begin());
    strides.erase(strides.begin());
  }
  call.set_results(zeros_with_layout(call.tensor(0), other.options(), call.batch_size(), sizes, strides,
                                     other.sym_storage_offset()));
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
  rules.add(&new_empty_strided_rule, {"new_empty_strided"});
  rules.add(&tangent_zeros_rule, {"_new_zeros_with_same_feature_meta"});
}

}  // namespace functorch_lite
