// Attention, and the fused forms of the transformer modules in evaluation mode, as compositions of plain operators.
#include <ATen/TensorOperators.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/softmax.h>

#include <cmath>
#include <limits>

#include "../plain_compositions.h"
#include "rules.h"

namespace functorch_lite {
namespace {

// The boxed arguments of a composition, by name.
class Named {
 public:
  Named(const c10::OperatorHandle& op, Stack& stack) : op_(op), stack_(stack) {}
  const c10::IValue& operator[](const char* name) const {
    return stack_[stack_.size() - count_arguments(op_) + position_of(op_.schema(), name)];
  }
  at::Tensor tensor(const char* name) const { return (*this)[name].toTensor(); }

 private:
  const c10::OperatorHandle& op_;
  Stack& stack_;
};

struct Heads {
  int64_t count;
  at::Tensor qkv_weight, qkv_bias, proj_weight, proj_bias;
  std::optional<at::Tensor> mask;
  int64_t mask_type;

  Heads(const Named& args, const char* count_name)
      : count(args[count_name].toInt()),
        qkv_weight(args.tensor("qkv_weight")),
        qkv_bias(args.tensor("qkv_bias")),
        proj_weight(args.tensor("proj_weight")),
        proj_bias(args.tensor("proj_bias")),
        mask(args["mask"].toOptional<at::Tensor>()),
        mask_type(args["mask_type"].isNone() ? kGeneral : args["mask_type"].toInt()) {}

  enum MaskType : int64_t { kScores = 0, kKeys = 1, kGeneral = 2 };

  // x[N,T,E] -> y[N,H,T,E/H], with a third of the weight: 0 queries, 1 keys, 2 values.
  at::Tensor project(const at::Tensor& x, int64_t third) const {
    const auto width = qkv_weight.sym_size(0) / 3;
    const auto weight = qkv_weight.narrow_symint(0, width * third, width);
    const auto bias = qkv_bias.narrow_symint(0, width * third, width);
    return at::linear(x, weight, bias)
        .reshape_symint({x.sym_size(0), x.sym_size(1), count, width / count})
        .transpose(1, 2);
  }

  // Which scores[N,H,T,S] are left out.
  at::Tensor left_out() const {
    const auto m = mask->to(c10::kBool);
    if (mask_type == kKeys) return m.unsqueeze(1).unsqueeze(1);
    if (mask_type == kScores || m.dim() == 2) return m.unsqueeze(0).unsqueeze(0);
    return m;
  }

  // q[N,T,E], k[N,S,E], v[N,S,E] -> y[N,T,E], weights[N,H,T,S]
  std::pair<at::Tensor, at::Tensor> attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) const {
    const auto queries = project(q, 0);
    const auto scale = 1.0 / std::sqrt(static_cast<double>(queries.size(3)));
    auto scores = at::matmul(queries * scale, project(k, 1).transpose(2, 3));
    if (mask.has_value()) scores = scores.masked_fill(left_out(), -std::numeric_limits<double>::infinity());
    const auto weights = at::softmax(scores, 3);
    const auto joined = at::matmul(weights, project(v, 2)).transpose(1, 2).flatten(2);
    return {at::linear(joined, proj_weight, proj_bias), weights};
  }
};

void multi_head_attention(const c10::OperatorHandle& op, Stack& stack) {
  const Named args(op, stack);
  const Heads heads(args, "num_head");
  auto [y, weights] = heads.attend(args.tensor("query"), args.tensor("key"), args.tensor("value"));
  const bool need_weights = args["need_weights"].toBool();
  if (need_weights && args["average_attn_weights"].toBool()) weights = weights.mean(1);
  torch::jit::drop(stack, count_arguments(op));
  torch::jit::push(stack, y, need_weights ? weights : at::Tensor());
}

void transformer_encoder_layer(const c10::OperatorHandle& op, Stack& stack) {
  const Named args(op, stack);
  const Heads heads(args, "num_heads");
  const auto norm = [&](const at::Tensor& x, const char* weight, const char* bias) {
    return at::layer_norm_symint(x, {x.sym_size(-1)}, args.tensor(weight), args.tensor(bias), args["eps"].toDouble());
  };
  const auto first_norm = [&](const at::Tensor& x) { return norm(x, "norm_weight_1", "norm_bias_1"); };
  const auto second_norm = [&](const at::Tensor& x) { return norm(x, "norm_weight_2", "norm_bias_2"); };
  const auto attend = [&](const at::Tensor& x) { return heads.attend(x, x, x).first; };
  const auto feed_forward = [&](const at::Tensor& x) {
    const auto hidden = at::linear(x, args.tensor("ffn_weight_1"), args.tensor("ffn_bias_1"));
    const auto active = args["use_gelu"].toBool() ? at::gelu(hidden) : at::relu(hidden);
    return at::linear(active, args.tensor("ffn_weight_2"), args.tensor("ffn_bias_2"));
  };
  auto x = args.tensor("src");
  if (args["norm_first"].toBool()) {
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

void add_attention_rules(RuleTable& rules) {
  for (const auto& [name, composition] : plain_compositions()) rules.add(composition, {name});
  rules.add(&choose_plain_attention, {"_fused_sdp_choice"});
  rules.add(&multi_head_attention, {"_native_multi_head_attention"});
  rules.add(&transformer_encoder_layer, {"_transformer_encoder_layer_fwd"});
}

}  // namespace functorch_lite
