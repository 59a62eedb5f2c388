// Attention as a composition of plain operators. See plain_attention.h first.
#include "plain_attention.h"

#include <ATen/ops/_scaled_dot_product_attention_math.h>
#include <ATen/ops/zeros_like.h>

#include <limits>

namespace functorch_lite {

void plain_attention(const c10::OperatorHandle& op, Stack& stack) {
  const auto begin = stack.size() - count_arguments(op);
  const auto arg = [&](const char* name) -> const c10::IValue& {
    return stack[begin + *op.schema().argumentIndexWithName(name)];
  };
  const auto& query = arg("query").toTensor();
  auto mask = arg("attn_mask").toOptional<at::Tensor>();
  if (mask.has_value() && mask->defined() && mask->scalar_type() == c10::kBool) {
    // Added to the scores: nothing where the mask is true, minus infinity elsewhere.
    mask = at::zeros_like(*mask, query.scalar_type())
               .masked_fill(mask->logical_not(), -std::numeric_limits<double>::infinity());
  }
  auto result = std::get<0>(at::_scaled_dot_product_attention_math(
      query, arg("key").toTensor(), arg("value").toTensor(), mask, arg("dropout_p").toDouble(),
      arg("is_causal").toBool(), /*dropout_mask=*/{}, arg("scale").toOptional<double>(), arg("enable_gqa").toBool()));
  torch::jit::drop(stack, count_arguments(op));
  torch::jit::push(stack, std::move(result));
}

void choose_plain_attention(const c10::OperatorHandle& op, Stack& stack) {
  constexpr int64_t kPlain = 0;
  torch::jit::drop(stack, count_arguments(op));
  torch::jit::push(stack, kPlain);
}

}  // namespace functorch_lite
