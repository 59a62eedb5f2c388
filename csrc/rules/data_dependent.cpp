// Operators whose results have a size that depends on values. They work where all examples agree on the size.
#include "data_dependent.h"

#include <ATen/ExpandUtils.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/aminmax.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/floor_divide.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/remainder.h>
#include <ATen/ops/scatter.h>
#include <ATen/ops/scatter_add.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>

#include "../fallback.h"
#include "rules.h"

namespace functorch_lite {

bool has_values(const at::Tensor& x) {
  const auto& value = innermost_value(x);
  return !value.is_meta() && !value.key_set().has(c10::DispatchKey::Python);
}

namespace {

// mask[B,n] -> positions[B,size] of the first true elements, in order; 0 where there are fewer.
at::Tensor first_true(const at::Tensor& mask, const c10::SymInt& size) {
  const auto nth = at::cumsum(mask, 1) - 1;
  // All others are written to a slot behind the last.
  const auto slot = at::where(mask, nth.clamp_max(size), at::Scalar(size));
  const auto positions = at::arange(mask.sym_size(1), slot.options()).expand_as(slot);
  const auto slots = slot.new_zeros_symint({mask.sym_size(0), size + 1});
  return at::scatter(slots, 1, slot, positions).narrow_symint(1, 0, size);
}

// positions[B,k] in flattened examples of these sizes -> [B,k,r].
at::Tensor unravel(at::Tensor positions, c10::SymIntArrayRef sizes) {
  std::vector<at::Tensor> indices(sizes.size());
  for (size_t d = sizes.size(); d-- > 0;) {
    const at::Scalar n = sizes[d].max(1);
    indices[d] = at::remainder(positions, n);
    positions = at::floor_divide(positions, n);
  }
  if (indices.empty()) return positions.new_empty_symint({positions.sym_size(0), positions.sym_size(1), 0});
  return at::stack(indices, -1);
}

at::Tensor positions_in_flat(BatchCall& call, const at::Tensor& flat_mask) {
  return first_true(flat_mask, common_size(call.op(), at::sum(flat_mask, 1)));
}

}  // namespace

at::Tensor positions_of_true(BatchCall& call, const at::Tensor& mask) {
  return unravel(positions_in_flat(call, flatten_examples(mask) != 0), mask.sym_sizes().slice(1));
}

namespace {

// x[B,*] -> y[B,k,r]
void nonzero_rule(BatchCall& call) {
  call.set_results(positions_of_true(call, call.to_front(0)));
  call.finish();
}

// x[B,*] -> y[B,size,r], which ends in the fill value.
void nonzero_static_rule(BatchCall& call) {
  const auto& x = call.to_front(0);
  const auto mask = flatten_examples(x) != 0;
  const auto size = call.arg("size").toSymInt();
  const auto positions = unravel(first_true(mask, size), x.sym_sizes().slice(1));
  const auto found = at::arange(size, positions.options()) < at::sum(mask, {1}, /*keepdim=*/true);
  call.set_results(at::where(found.unsqueeze(-1), positions, call.arg("fill_value").toScalar()));
  call.finish();
}

// x[B?,*], mask[B?,*] -> y[B,k]
void masked_select_rule(BatchCall& call) {
  const auto rank = std::max(call.rank(0), call.rank(1));
  const auto x = call.to_front(0, rank);
  const auto mask = call.to_front(1, rank);
  const auto sizes = at::infer_size_symint(x.sym_sizes(), mask.sym_sizes());
  if (call.is_batched(1)) {
    const auto positions = positions_in_flat(call, flatten_examples(mask.expand_symint(sizes)));
    call.set_results(at::gather(flatten_examples(x.expand_symint(sizes)), 1, positions));
  } else {
    const auto one = mask.expand_symint(c10::SymIntArrayRef(sizes).slice(1));
    const auto positions = one.reshape({-1}).nonzero().squeeze(1);
    call.set_results(at::index_select(flatten_examples(x.expand_symint(sizes)), 1, positions));
  }
  call.finish();
}

// x[B?,n], weights[B?,n] -> counts[B,m]
void bincount_rule(BatchCall& call) {
  const auto minlength = call.arg("minlength").toSymInt();
  const bool weighted = call.is_tensor(1);
  TORCH_CHECK(call.rank(0) == 1 && at::isIntegralType(call.tensor(0).scalar_type(), /*includeBool=*/false) &&
                  minlength >= 0 && (!weighted || call.rank(1) == 1),
              "bincount(): expected a vector of integers, a vector of weights and minlength >= 0");
  const auto x = call.expand_to_front(0).to(c10::kLong);
  if (x.sym_size(1) == 0) {
    call.set_results(x.new_zeros_symint({call.batch_size(), minlength}));
    return call.finish();
  }
  auto weights = weighted ? call.expand_to_front(1) : at::ones_like(x);
  TORCH_CHECK(weights.sym_size(1) == x.sym_size(1), "bincount(): expected ", x.sym_size(1), " weights, got ",
              weights.sym_size(1));
  TORCH_CHECK(innermost_value(x).ge(0).all().item<bool>(), "bincount(): expected no negative values");
  const auto size = c10::SymInt(common_size(call.op(), (at::amax(x, 1) + 1).clamp_min(minlength))).max(minlength);
  if (weighted && weights.scalar_type() != c10::kFloat) weights = weights.to(c10::kDouble);
  const auto counts = x.new_zeros_symint({call.batch_size(), size}, weights.options());
  call.set_results(at::scatter_add(counts, 1, x, weights));
  call.finish();
}

// repeats[B,n] -> y[B,m]: the position i for repeats[i] times.
void repeat_interleave_rule(BatchCall& call) {
  TORCH_CHECK(call.rank(0) == 1, "repeat_interleave(): expected a vector of repeats");
  const auto repeats = call.to_front(0).contiguous();
  TORCH_CHECK(innermost_value(repeats).ge(0).all().item<bool>(), "repeat_interleave(): expected no negative repeats");
  c10::SymInt size = common_size(call.op(), at::sum(repeats, 1));
  if (!call.arg("output_size").isNone()) {
    TORCH_CHECK(call.batch_size() == 0 || call.arg("output_size").toSymInt() == size,
                "repeat_interleave(): expected output_size=", size, ", the sum of the repeats");
    size = call.arg("output_size").toSymInt();
  }
  const auto slots = at::arange(size, repeats.options()).expand_symint({call.batch_size(), size}).contiguous();
  const auto y = at::searchsorted(at::cumsum(repeats, 1, repeats.scalar_type()), slots,
                                  /*out_int32=*/repeats.scalar_type() == c10::kInt, /*right=*/true);
  call.set_results(y);
  call.finish();
}

}  // namespace

void add_data_dependent_rules(RuleTable& rules) {
  rules.add(&nonzero_rule, {"nonzero"});
  rules.add(&nonzero_static_rule, {"nonzero_static"});
  rules.add(&masked_select_rule, {"masked_select"});
  rules.add(&bincount_rule, {"bincount"});
  rules.add(&repeat_interleave_rule, {"repeat_interleave.Tensor"});
}

}  // namespace functorch_lite
