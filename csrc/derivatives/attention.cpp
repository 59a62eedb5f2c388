// PyTorch's fused attention kernels at autodiff levels. Their backward kernels have no derivative; where somebody
// differentiates the backward pass, a composition takes their place.
#include <ATen/ops/scaled_dot_product_attention.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>

#include "../derivative_node.h"
#include "../derivative_rules.h"
#include "../fallback.h"
#include "../fused_attention.h"

namespace functorch_lite {
namespace {

using torch::autograd::Node;
using torch::autograd::variable_list;

// Runs the node of the kernel, or the composition.
class AttentionBackward final : public Node {
 public:
  AttentionBackward(NodePtr kernel, const std::vector<at::Tensor>& inputs, const AttentionOptions& options)
      : Node(torch::autograd::edge_list(kernel->next_edges())), kernel_(std::move(kernel)), options_(options) {
    for (const auto& input : inputs) inputs_.emplace_back(input, /*is_output=*/false);
  }
  std::string name() const override { return "AttentionBackward"; }
  void release_variables() override {
    kernel_->release_variables();
    for (auto& input : inputs_) input.reset_data();
  }

 protected:
  variable_list apply(variable_list&& grads) override {
    if (!grads[0].defined()) return variable_list(num_outputs());
    const auto modes = AutogradModes::current();
    bool is_differentiated = may_be_differentiated(grads[0], modes);
    std::vector<at::Tensor> inputs;
    for (const auto& saved : inputs_) {
      inputs.push_back(strip_closed_levels(saved.unpack()));
      is_differentiated |= may_be_differentiated(inputs.back(), modes);
    }
    if (!is_differentiated) return (*kernel_)(std::move(grads));
    auto options = options_;
    options.rows = attention_chunk(inputs[0], inputs[1]).value_or(inputs[0].size(-2));
    auto results = python_hooks().attend_backward(grads[0], inputs, options);
    results.resize(num_outputs());
    return results;
  }

 private:
  NodePtr kernel_;
  std::vector<torch::autograd::SavedVariable> inputs_;
  AttentionOptions options_;
};

// The arguments of a kernel.
struct KernelCall {
  std::vector<at::Tensor> inputs;
  std::optional<at::Tensor> mask;
  AttentionOptions options;

  KernelCall(const Operator& op, const Stack& stack) {
    const NamedArguments args(op, stack);
    inputs = {args.tensor("query"), args.tensor("key"), args.tensor("value")};
    for (const auto* name : {"attn_mask", "attn_bias"}) {
      if (args.has(name)) mask = args.optional_tensor(name);
    }
    options = {args["dropout_p"].toDouble(), args.flag("is_causal"), args["scale"].toOptional<double>(),
               /*enable_gqa=*/inputs[0].sym_size(-3) != inputs[1].sym_size(-3), /*rows=*/0};
  }
};

void record_as_pytorch(const Operator& op, Stack& stack) {
  op.redispatchBoxed(kAutodiffKeys.remove(c10::DispatchKey::ADInplaceOrView), &stack);
}

const at::Tensor& first_result(const Operator& op, const Stack& stack) {
  return stack[stack.size() - op.schema().returns().size()].toTensor();
}

void record_kernel(AutodiffLevel&, const Operator& op, Stack& stack) {
  KernelCall call(op, stack);
  record_as_pytorch(op, stack);
  const auto& output = first_result(op, stack);
  if (call.options.dropout_p > 0 || !output.requires_grad()) return;
  if (call.mask.has_value()) call.inputs.push_back(*call.mask);
  auto node = make_node<AttentionBackward>(output.grad_fn(), call.inputs, call.options);
  const auto position = node->add_input_metadata(output);
  torch::autograd::impl::set_gradient_edge(output, {std::move(node), position});
}

// The output has a tangent; what else the kernel returns is for its backward pass.
void push_through_kernel(AutodiffLevel& level, const Operator& op, Stack& stack) {
  const KernelCall call(op, stack);
  if (call.options.dropout_p > 0) return record_as_pytorch(op, stack);  // which raises
  const auto& [inputs, mask, options] = call;
  level.run_below(op, stack, {});
  stack[stack.size() - op.schema().returns().size()] = at::scaled_dot_product_attention(
      inputs[0], inputs[1], inputs[2], mask, /*dropout_p=*/0, options.is_causal, options.scale, options.enable_gqa);
}

}  // namespace

const std::vector<DerivativeRow>& attention_derivatives() {
  static const auto rows = [] {
    std::vector<DerivativeRow> result;
    for (const auto* op : {"_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
                           "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
                           "_scaled_dot_product_fused_attention_overrideable"}) {
      result.push_back({op, push_through_kernel, record_kernel, /*reverse_from=*/0});
    }
    return result;
  }();
  return rows;
}

}  // namespace functorch_lite
