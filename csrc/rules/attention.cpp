// Attention: one call of a fused kernel with the examples in its batch where nothing takes a derivative, and a
// composition of plain operators elsewhere.
#include <ATen/core/grad_mode.h>
#include <ATen/ops/reshape.h>

#include "../autodiff_level.h"
#include "../fallback.h"
#include "../plain_compositions.h"
#include "rules.h"

namespace functorch_lite {
namespace {

// Whether a derivative may be taken through the call: at a level outside, or by PyTorch's autograd outside all levels.
bool may_be_differentiated(const Stack& stack, size_t n) {
  for (const auto* level = current_level(); level != nullptr; level = level->parent()) {
    if (level->differentiates()) return true;
  }
  bool any = false;
  for_each_tensor(stack.data() + stack.size() - n, n, [&](const at::Tensor& tensor) {
    const auto& value = innermost_value(tensor);
    any |= (at::GradMode::is_enabled() && value.requires_grad()) || has_tangent(value);
  });
  return any;
}

// x[B,*,h,n,e] -> x[B*..,h,n,e]
at::Tensor flatten_leading(const at::Tensor& x) { return x.flatten(0, -4); }

// Kernels know one batch: q, k and v must have the same dimensions in front of the heads.
bool has_one_batch(const NamedArguments& args) {
  const auto leading = [&](const char* name) {
    const auto sizes = args.tensor(name).sym_sizes();
    return sizes.size() <= 3 ? c10::SymIntArrayRef() : sizes.slice(0, sizes.size() - 3);
  };
  const auto rank = args.tensor("query").dim();
  return rank >= 2 && args.tensor("key").dim() == rank && args.tensor("value").dim() == rank &&
         leading("query") == leading("key") && leading("query") == leading("value");
}

// mask[B?,*,h,l,s], where all but the last two may be missing or 1, -> mask[B*..,h,l,s] or mask[l,s]
void fold_mask(BatchCall& call, size_t i, c10::SymIntArrayRef leading) {
  if (!call.is_tensor(i) || (!call.is_batched(i) && call.rank(i) <= 2)) return;
  const auto& mask = call.expand_to_front(i, static_cast<int64_t>(leading.size()) + 2);
  auto sizes = leading.vec();
  for (const auto& size : mask.sym_sizes().slice(mask.dim() - 3)) sizes.push_back(size);
  call.arg(i) = flatten_leading(mask.expand_symint(sizes));
}

// q[B?,*,h,l,e], k[B?,*,h,s,e], v[B?,*,h,s,f], mask[B?,*,h,l,s] -> y[B,*,h,l,f]
void fold_attention(BatchCall& call) {
  const auto rank = call.rank(0);
  for (size_t i = 0; i < 3; ++i) call.expand_to_front(i, 3);
  auto sizes = call.tensor(0).sym_sizes().vec();
  fold_mask(call, call.position("attn_mask"), c10::SymIntArrayRef(sizes).slice(0, sizes.size() - 3));
  sizes.back() = call.tensor(2).sym_size(-1);
  if (rank == 2) sizes.erase(sizes.begin() + 1);
  for (size_t i = 0; i < 3; ++i) call.arg(i) = flatten_leading(call.tensor(i));
  call.call();
  call.set_results(at::reshape_symint(call.result().toTensor(), sizes));
  call.finish();
}

void attention(const c10::OperatorHandle& op, Stack& stack) {
  const NamedArguments args(op, stack);
  const bool draws = args["dropout_p"].toDouble() > 0;
  auto& level = current_vmap_level();
  if (draws) check_randomness(op, level);
  const bool fused = !may_be_differentiated(stack, count_arguments(op)) && has_one_batch(args);
  if (fused && (!draws || level.randomness() == VmapLevel::Randomness::kDifferent)) {
    BatchCall call(op, stack);
    return fold_attention(call);
  }
  find_plain_composition(op.operator_name())(op, stack);
}

}  // namespace

void add_attention_rules(RuleTable& rules) {
  for (const auto& [op, composition] : attention_compositions()) {
    rules.add(std::string_view(op) == "scaled_dot_product_attention" ? &attention : composition, {op});
  }
  rules.add(&choose_plain_attention, {"_fused_sdp_choice"});
}

}  // namespace functorch_lite
