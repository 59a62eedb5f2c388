// Which form of attention runs. See fused_attention.h first.
#include "fused_attention.h"

#include <algorithm>

#include "autodiff_level.h"

namespace functorch_lite {
namespace {

struct AttentionLimits {
  int64_t scores = int64_t{1} << 21;
  int64_t rows = 64;  // about as many as a head has features: then a chunk takes no more memory than the keys
};
AttentionLimits attention_limits;

// How many matrices there are in x[*,n,e], in hidden batch dimensions too; none if sizes are symbolic.
std::optional<int64_t> count_matrices(const at::Tensor& x) {
  const auto all = innermost_value(x).sym_numel().maybe_as_int();
  const auto one = (x.sym_size(-2) * x.sym_size(-1)).maybe_as_int();
  if (!all || !one) return std::nullopt;
  return *one == 0 ? 0 : *all / *one;
}

}  // namespace

void choose_plain_attention(const c10::OperatorHandle& op, Stack& stack) {
  torch::jit::drop(stack, count_arguments(op));
  torch::jit::push(stack, kPlainAttention);
}

void ask_attention_kernels(const c10::OperatorHandle& op, Stack& stack) {
  switch (NamedArguments(op, stack).tensor("query").device().type()) {
    case c10::kCPU:
      return op.callBoxedForDispatchKey(c10::DispatchKey::CPU, stack);
    case c10::kCUDA:
      return op.callBoxedForDispatchKey(c10::DispatchKey::CUDA, stack);
    default:
      return op.callBoxed(&stack);
  }
}

bool fused_attention_serves(const NamedArguments& args) {
  int64_t derivatives = 0;
  for (const auto* level = current_level(); level != nullptr; level = level->parent()) {
    if (level->is_forward()) return false;
    derivatives += level->has_variables();
  }
  if (derivatives > 1 || (derivatives == 1 && args["dropout_p"].toDouble() > 0)) return false;
  const bool plain_autograd_records = derivatives == 1 || AutogradModes::current().grad;
  for (const auto* name : {"query", "key", "value"}) {
    const auto tensor = args.tensor(name);
    const auto& value = innermost_value(tensor);
    if ((plain_autograd_records && value.requires_grad()) || has_tangent(value)) return false;
  }
  const auto mask = args.optional_tensor("attn_mask");
  return !mask.has_value() || !may_be_differentiated(*mask);
}

std::optional<int64_t> attention_chunk(const at::Tensor& query, const at::Tensor& key) {
  if (query.dim() < 2 || key.dim() < 2) return std::nullopt;
  const auto queries = count_matrices(query);
  const auto keys = count_matrices(key);
  if (!queries || !keys) return std::nullopt;
  const auto rows = query.size(-2);
  const auto scores_of_row = std::max(*queries, *keys) * key.size(-2);
  if (scores_of_row * rows <= attention_limits.scores || rows <= attention_limits.rows) return std::nullopt;
  return std::max(attention_limits.rows, attention_limits.scores / scores_of_row);
}

void set_attention_limits(int64_t scores, int64_t rows) { attention_limits = {scores, rows}; }

}  // namespace functorch_lite
