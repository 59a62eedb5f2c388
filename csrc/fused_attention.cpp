// PyTorch's fused attention kernels at autodiff levels. See fused_attention.h first.
#include "fused_attention.h"

#include <ATen/ops/scaled_dot_product_attention.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>

#include "autodiff_level.h"
#include "fallback.h"

namespace functorch_lite {
namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using NodePtr = decltype(torch::autograd::Edge::function);
using torch::autograd::variable_list;

struct Limits {
  int64_t scores = int64_t{1} << 21;
  int64_t rows = 64;  // about as many as a head has features: then a chunk takes no more memory than the keys
};
Limits limits;

// How many numbers x[*,n,e] has in front of its last two dimensions, hidden batch dimensions too; none if that is
// symbolic.
std::optional<int64_t> leading_size(const at::Tensor& x) {
  const auto all = innermost_value(x).sym_numel().maybe_as_int();
  const auto rows = x.sym_size(-2).maybe_as_int();
  const auto columns = x.sym_size(-1).maybe_as_int();
  if (!all || !rows || !columns) return std::nullopt;
  return *rows * *columns == 0 ? 0 : *all / (*rows * *columns);
}

std::optional<int64_t> chunk_of(const at::Tensor& query, const at::Tensor& key) {
  if (query.dim() < 2 || key.dim() < 2) return std::nullopt;
  const auto of_query = leading_size(query);
  const auto of_key = leading_size(key);
  if (!of_query || !of_key) return std::nullopt;
  const auto rows = query.size(-2);
  const auto scores_of_row = std::max(*of_query, *of_key) * key.size(-2);
  if (scores_of_row * rows <= limits.scores || rows <= limits.rows) return std::nullopt;
  return std::max(limits.rows, limits.scores / scores_of_row);
}

// The node of the kernel, or, where somebody differentiates the backward pass, a composition.
class AttentionBackward final : public Node {
 public:
  AttentionBackward(NodePtr kernel, const std::vector<at::Tensor>& inputs, AttentionOptions options)
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
    for (auto& input : inputs_) {
      inputs.push_back(strip_closed_levels(input.unpack()));
      is_differentiated |= may_be_differentiated(inputs.back(), modes);
    }
    if (!is_differentiated) return (*kernel_)(std::move(grads));
    auto options = options_;
    options.rows = chunk_of(inputs[0], inputs[1]).value_or(inputs[0].size(-2));
    auto results = python_hooks().attend_backward(grads[0], inputs, options);
    results.resize(num_outputs());
    return results;
  }

 private:
  NodePtr kernel_;
  std::vector<SavedVariable> inputs_;
  AttentionOptions options_;
};

// PyTorch has changed the pointer by which it holds nodes.
template <class Pointer, class... Args>
Pointer make_node(Args&&... args) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>) {
    return std::make_shared<AttentionBackward>(std::forward<Args>(args)...);
  } else {
    return c10::make_intrusive<AttentionBackward>(std::forward<Args>(args)...);
  }
}

// Kernels with the arguments of scaled_dot_product_attention, and what they call the mask.
struct Kernel {
  const char* op;
  const char* mask;
};
constexpr Kernel kKernels[] = {
    {"_scaled_dot_product_flash_attention_for_cpu", "attn_mask"},
    {"_scaled_dot_product_flash_attention", nullptr},
    {"_scaled_dot_product_efficient_attention", "attn_bias"},
    {"_scaled_dot_product_cudnn_attention", "attn_bias"},
    {"_scaled_dot_product_fused_attention_overrideable", "attn_bias"},
};

struct KernelCall {
  std::vector<at::Tensor> inputs;
  AttentionOptions options;

  KernelCall(const Kernel& kernel, const NamedArguments& args)
      : inputs{args.tensor("query"), args.tensor("key"), args.tensor("value")},
        options{args["dropout_p"].toDouble(), args.flag("is_causal"), args["scale"].toOptional<double>(),
                inputs[0].sym_size(-3) != inputs[1].sym_size(-3), 0} {
    const auto mask = kernel.mask == nullptr ? std::nullopt : args.optional_tensor(kernel.mask);
    if (mask.has_value()) inputs.push_back(*mask);
  }
};

void record_as_pytorch(const c10::OperatorHandle& op, Stack& stack) {
  op.redispatchBoxed(kAutodiffKeys.remove(c10::DispatchKey::ADInplaceOrView), &stack);
}

template <size_t i>
void record_kernel(AutodiffLevel&, Stack& stack) {
  static const auto op = find_operator(kKernels[i].op);
  KernelCall call(kKernels[i], NamedArguments(op, stack));
  record_as_pytorch(op, stack);
  const auto& output = stack[stack.size() - op.schema().returns().size()].toTensor();
  if (call.options.dropout_p > 0 || !output.requires_grad()) return;
  auto node = make_node<NodePtr>(output.grad_fn(), call.inputs, call.options);
  const auto position = node->add_input_metadata(output);
  torch::autograd::impl::set_gradient_edge(output, {std::move(node), position});
}

// In forward mode the output has a tangent; what else the kernel returns is for its backward pass.
template <size_t i>
void push_through_kernel(AutodiffLevel& level, Stack& stack) {
  static const auto op = find_operator(kKernels[i].op);
  const KernelCall call(kKernels[i], NamedArguments(op, stack));
  const auto& [inputs, options] = call;
  if (options.dropout_p > 0) return record_as_pytorch(op, stack);  // which raises
  level.run_below(op, stack, {});
  stack[stack.size() - op.schema().returns().size()] = at::scaled_dot_product_attention(
      inputs[0], inputs[1], inputs[2], inputs.size() > 3 ? std::optional(inputs[3]) : std::nullopt, /*dropout_p=*/0,
      options.is_causal, options.scale, options.enable_gqa);
}

template <size_t... i>
std::vector<FusedAttentionRow> make_rows(std::index_sequence<i...>) {
  return {{kKernels[i].op, push_through_kernel<i>, record_kernel<i>}...};
}

bool any_requires_grad(const at::Tensor& tensor) {
  return may_be_differentiated(tensor, {.grad = true, .forward_grad = true, .inference = false});
}

}  // namespace

void choose_plain_attention(const c10::OperatorHandle& op, Stack& stack) {
  torch::jit::drop(stack, count_arguments(op));
  torch::jit::push(stack, kPlainAttention);
}

bool fused_attention_serves(const NamedArguments& args) {
  int64_t differentiating = 0;
  for (const auto* level = current_level(); level != nullptr; level = level->parent()) {
    if (!level->differentiates()) continue;
    if (level->is_forward()) return false;
    ++differentiating;
  }
  if (differentiating > 1) return false;
  if (differentiating == 1 && args["dropout_p"].toDouble() > 0) return false;
  for (const auto* name : {"query", "key", "value"}) {
    const auto tensor = args.tensor(name);
    const auto& value = innermost_value(tensor);
    const bool records = differentiating > 0 || AutogradModes::current().grad;
    if ((records && value.requires_grad()) || has_tangent(value)) return false;
  }
  const auto mask = args.optional_tensor("attn_mask");
  return !mask.has_value() || !any_requires_grad(*mask);
}

std::optional<int64_t> attention_chunk(const NamedArguments& args) {
  // An error, of which plain operators tell.
  if (args.flag("is_causal") && args.optional_tensor("attn_mask").has_value()) return std::nullopt;
  return chunk_of(args.tensor("query"), args.tensor("key"));
}

void set_attention_limits(int64_t scores, int64_t rows) { limits = {scores, rows}; }

const std::vector<FusedAttentionRow>& fused_attention_rules() {
  static const auto rows = make_rows(std::make_index_sequence<std::size(kKernels)>());
  return rows;
}

}  // namespace functorch_lite
