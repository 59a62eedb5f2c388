// Attention, and the fused forms of the transformer modules in evaluation mode, as compositions of plain operators.
// See plain_compositions.h first.
#include <ATen/TensorOperators.h>
#include <ATen/ops/_fused_sdp_choice.h>
#include <ATen/ops/_scaled_dot_product_attention_math.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>
#include <limits>

#include "fallback.h"
#include "fused_attention.h"
#include "plain_compositions.h"

namespace functorch_lite {
namespace {

constexpr auto kMinusInfinity = -std::numeric_limits<double>::infinity();

// All scores[*,T,S] in one tensor.
at::Tensor attend_at_once(const NamedArguments& args) {
  const auto query = args.tensor("query");
  auto mask = args.optional_tensor("attn_mask");
  if (mask.has_value() && mask->scalar_type() == c10::kBool) {
    // Added to the scores: nothing where the mask is true, minus infinity elsewhere.
    mask = at::zeros_like(*mask, query.scalar_type()).masked_fill(mask->logical_not(), kMinusInfinity);
  }
  return std::get<0>(at::_scaled_dot_product_attention_math(
      query, args.tensor("key"), args.tensor("value"), mask, args["dropout_p"].toDouble(), args.flag("is_causal"),
      /*dropout_mask=*/{}, args["scale"].toOptional<double>(), args.flag("enable_gqa")));
}

bool chooses_fused(const NamedArguments& args) {
  return at::_fused_sdp_choice(args.tensor("query"), args.tensor("key"), args.tensor("value"),
                               args.optional_tensor("attn_mask"), args["dropout_p"].toDouble(), args.flag("is_causal"),
                               args["scale"].toOptional<double>(), args.flag("enable_gqa")) != kPlainAttention;
}

// scaled_dot_product_attention without the fused kernels where those do not serve: they have no second derivative, no
// forward mode, and see one batch only.
void attention_composition(const c10::OperatorHandle& op, Stack& stack) {
  const NamedArguments args(op, stack);
  if (fused_attention_serves(args) && chooses_fused(args)) {
    return op.callBoxedForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd, stack);
  }
  // Both is an error, of which plain operators tell.
  const bool is_error = args.flag("is_causal") && args.optional_tensor("attn_mask").has_value();
  const auto rows = is_error ? std::nullopt : attention_chunk(args.tensor("query"), args.tensor("key"));
  auto result = rows.has_value() ? python_hooks().attend_in_chunks(
                                       args.tensor("query"), args.tensor("key"), args.tensor("value"),
                                       args.optional_tensor("attn_mask"),
                                       {args["dropout_p"].toDouble(), args.flag("is_causal"),
                                        args["scale"].toOptional<double>(), args.flag("enable_gqa"), *rows})
                                 : attend_at_once(args);
  torch::jit::drop(stack, count_arguments(op));
  torch::jit::push(stack, std::move(result));
}

// x[N,T,3*D] -> three y[N,H,T,D/H]
std::vector<at::Tensor> split_heads(const at::Tensor& x, int64_t heads) {
  std::vector<at::Tensor> parts;
  for (const auto& part : x.chunk(3, -1)) {
    parts.push_back(part.unflatten_symint(-1, {c10::SymInt(heads), part.sym_size(-1) / heads}).transpose(1, 2));
  }
  return parts;
}

double scale_of(const at::Tensor& queries) { return 1.0 / std::sqrt(static_cast<double>(queries.size(-1))); }

// qkv[N,T,3*D], qkv_bias[3*D] -> q, scaled for the product with k, and k, v, each [N,H,T,D/H]
void transform_bias_rescale_qkv(const c10::OperatorHandle& op, Stack& stack) {
  const NamedArguments args(op, stack);
  const auto parts = split_heads(args.tensor("qkv") + args.tensor("qkv_bias"), args["num_heads"].toInt());
  torch::jit::drop(stack, count_arguments(op));
  torch::jit::push(stack, parts[0] * scale_of(parts[0]), parts[1], parts[2]);
}

struct Heads {
  int64_t count;
  at::Tensor qkv_weight, qkv_bias, proj_weight, proj_bias;
  std::optional<at::Tensor> mask;
  int64_t mask_type;

  Heads(const NamedArguments& args, const char* count_name)
      : count(args[count_name].toInt()),
        qkv_weight(args.tensor("qkv_weight")),
        qkv_bias(args.tensor("qkv_bias")),
        proj_weight(args.tensor("proj_weight")),
        proj_bias(args.tensor("proj_bias")),
        mask(args.optional_tensor("mask")),
        mask_type(args["mask_type"].isNone() ? kGeneral : args["mask_type"].toInt()) {}

  enum MaskType : int64_t { kScores = 0, kKeys = 1, kGeneral = 2 };

  // x[N,T,E] -> y[N,H,T,E/H], with a third of the weight: 0 queries, 1 keys, 2 values.
  at::Tensor project(const at::Tensor& x, int64_t third) const {
    const auto width = qkv_weight.sym_size(0) / 3;
    const auto weight = qkv_weight.narrow_symint(0, width * third, width);
    const auto bias = qkv_bias.narrow_symint(0, width * third, width);
    return at::linear(x, weight, bias).unflatten_symint(-1, {c10::SymInt(count), width / count}).transpose(1, 2);
  }

  // Self-attention needs one product for all three.
  std::vector<at::Tensor> project_all(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) const {
    if (q.is_same(k) && k.is_same(v)) return split_heads(at::linear(q, qkv_weight, qkv_bias), count);
    return {project(q, 0), project(k, 1), project(v, 2)};
  }

  // Which scores[N,H,T,S] are left out.
  at::Tensor left_out() const {
    const auto m = mask->to(c10::kBool);
    if (mask_type == kKeys) return m.unsqueeze(1).unsqueeze(1);
    if (mask_type == kScores || m.dim() == 2) return m.unsqueeze(0).unsqueeze(0);
    return m;
  }

  // q[N,T,E], k[N,S,E], v[N,S,E] -> y[N,T,E], and weights[N,H,T,S] if they are needed
  std::pair<at::Tensor, at::Tensor> attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                           bool need_weights) const {
    const auto parts = project_all(q, k, v);
    at::Tensor heads;
    at::Tensor weights;
    if (!need_weights && !mask.has_value()) {
      heads = at::scaled_dot_product_attention(parts[0], parts[1], parts[2]);
    } else {
      auto scores = at::matmul(parts[0] * scale_of(parts[0]), parts[1].transpose(2, 3));
      if (mask.has_value()) scores = scores.masked_fill(left_out(), kMinusInfinity);
      weights = at::softmax(scores, 3);
      heads = at::matmul(weights, parts[2]);
    }
    return {at::linear(heads.transpose(1, 2).flatten(2), proj_weight, proj_bias), weights};
  }
};

void multi_head_attention(const c10::OperatorHandle& op, Stack& stack) {
  const NamedArguments args(op, stack);
  const Heads heads(args, "num_head");
  const bool need_weights = args.flag("need_weights");
  auto [y, weights] = heads.attend(args.tensor("query"), args.tensor("key"), args.tensor("value"), need_weights);
  if (need_weights && args.flag("average_attn_weights")) weights = weights.mean(1);
  torch::jit::drop(stack, count_arguments(op));
  torch::jit::push(stack, y, need_weights ? weights : at::Tensor());
}

void transformer_encoder_layer(const c10::OperatorHandle& op, Stack& stack) {
  const NamedArguments args(op, stack);
  const Heads heads(args, "num_heads");
  const auto norm = [&](const at::Tensor& x, const char* weight, const char* bias) {
    return at::layer_norm_symint(x, {x.sym_size(-1)}, args.tensor(weight), args.tensor(bias), args["eps"].toDouble());
  };
  const auto first_norm = [&](const at::Tensor& x) { return norm(x, "norm_weight_1", "norm_bias_1"); };
  const auto second_norm = [&](const at::Tensor& x) { return norm(x, "norm_weight_2", "norm_bias_2"); };
  const auto attend = [&](const at::Tensor& x) { return heads.attend(x, x, x, /*need_weights=*/false).first; };
  const auto feed_forward = [&](const at::Tensor& x) {
    const auto hidden = at::linear(x, args.tensor("ffn_weight_1"), args.tensor("ffn_bias_1"));
    const auto active = args.flag("use_gelu") ? at::gelu(hidden) : at::relu(hidden);
    return at::linear(active, args.tensor("ffn_weight_2"), args.tensor("ffn_bias_2"));
  };
  auto x = args.tensor("src");
  TORCH_CHECK_NOT_IMPLEMENTED(!x.is_nested(), "vmap: ", op.operator_name(), " got a nested tensor. ", kNoNestedTensors);
  if (args.flag("norm_first")) {
    x = x + attend(first_norm(x));
    x = x + feed_forward(second_norm(x));
  } else {
    x = first_norm(x + attend(x));
    x = second_norm(x + feed_forward(x));
  }
  torch::jit::drop(stack, count_arguments(op));
  torch::jit::push(stack, x);
}

}  // namespace

const std::vector<PlainRow>& attention_compositions() {
  static const std::vector<PlainRow> rows{
      {"scaled_dot_product_attention", attention_composition},
      {"_native_multi_head_attention", multi_head_attention},
      {"_transformer_encoder_layer_fwd", transformer_encoder_layer},
      {"_transform_bias_rescale_qkv", transform_bias_rescale_qkv},
  };
  return rows;
}

}  // namespace functorch_lite
