// Tensors made in the image of a batched one.
#include <ATen/ops/as_strided.h>
#include <ATen/ops/new_empty_strided.h>
#include <ATen/ops/new_zeros.h>
#include <c10/core/MemoryFormat.h>

#include "rules.h"

namespace functorch_lite {
namespace {

// z[B,*] of which each example has the given layout: the examples lie behind each other.
struct BatchLayout {
  std::vector<c10::SymInt> sizes;
  std::vector<c10::SymInt> strides;
  c10::SymInt offset;
  c10::SymInt extent;

  BatchLayout(const c10::SymInt& batch_size, std::vector<c10::SymInt> s, std::vector<c10::SymInt> t, c10::SymInt start)
      : sizes(std::move(s)), strides(std::move(t)), offset(std::move(start)), extent(offset + 1) {
    for (size_t d = 0; d < sizes.size(); ++d) extent = extent + strides[d] * (sizes[d] - 1).max(0);
    sizes.insert(sizes.begin(), batch_size);
    strides.insert(strides.begin(), extent);
  }
};

void new_empty_strided_rule(BatchCall& call) {
  const auto& x = call.to_front(0);
  auto options = x.options();
  if (!call.arg("dtype").isNone()) options = options.dtype(call.arg("dtype").toScalarType());
  if (!call.arg("device").isNone()) options = options.device(call.arg("device").toDevice());
  const BatchLayout layout(call.batch_size(), call.arg("size").toSymIntVector(), call.arg("stride").toSymIntVector(),
                           0);
  call.set_results(x.new_empty_strided_symint(layout.sizes, layout.strides, options));
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
  const BatchLayout layout(call.batch_size(), sizes, strides, other.sym_storage_offset());
  const auto is_zero = [](const c10::SymInt& n) { return n.maybe_as_int() == 0; };
  if (is_zero(layout.offset) && std::none_of(layout.strides.begin(), layout.strides.end(), is_zero)) {
    call.set_results(call.tensor(0).new_empty_strided_symint(layout.sizes, layout.strides, other.options()).zero_());
    return call.finish();
  }
  const auto memory = call.tensor(0).new_zeros_symint({call.batch_size() * layout.extent}, other.options());
  call.set_results(at::as_strided_symint(memory, layout.sizes, layout.strides, layout.offset));
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
