// Normalisation: over the examples of a training batch, over layers, over groups of channels.
#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/native_group_norm_backward.h>
#include <ATen/ops/native_layer_norm_backward.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/var.h>

#include "rules.h"

namespace functorch_lite {
namespace {

// --- Batch norm. "Batch" in its name is N, user code's own; each example of vmap has statistics of its own. ---

// p[B?,c] -> p[B*c], a copy.
c10::IValue fold_parameter(BatchCall& call, std::string_view name) {
  const auto i = call.position(name);
  if (!call.is_tensor(i)) return {};
  return call.expand_to_front(i).clone(c10::MemoryFormat::Contiguous).flatten();
}

// x[B?,N,c,*] -> x[N,B*c,*]
at::Tensor fold_channels(BatchCall& call, std::string_view name) {
  return fold_batch(call.expand_to_front(call.position(name)), 0, 1);
}

// p[B*c] -> p[B,c]; also for the empty statistics of eval mode.
at::Tensor unfold_parameter(const at::Tensor& p, const c10::SymInt& batch_size) {
  return at::Tensor(p.defined() ? unfold_batch(p, 0, batch_size) : p);
}

// y[B?,N,c,*], weight[B?,c], bias[B?,c] -> weight * y + bias in the dtype of y. `rank` is the rank of y[N,c,*].
at::Tensor scale_channels(const at::Tensor& y, const at::Tensor& weight, const at::Tensor& bias, int64_t rank) {
  const auto across = [&](const at::Tensor& p) {
    auto result = p.unsqueeze(-2);
    for (int64_t d = 2; d < rank; ++d) result = result.unsqueeze(-1);
    return result;
  };
  auto result = y;
  if (weight.defined()) result = result * across(weight);
  if (bias.defined()) result = result + across(bias);
  return result.to(y.scalar_type());
}

// The tensor of an optional argument, its batch in front, or an undefined one.
at::Tensor optional_tensor(BatchCall& call, std::string_view name) {
  const auto i = call.position(name);
  return call.is_tensor(i) ? call.to_front(i) : at::Tensor();
}

bool is_batched(BatchCall& call, std::string_view name) { return call.is_batched(call.position(name)); }

// x[B?,N,c,*], weight[B?,c], bias[B?,c], running[B?,c] -> y[B,N,c,*], mean[B,c], invstd[B,c]. All of it is one batch
// norm of B*c channels, unless only weight and bias are batched. The eight arguments of all forms are alike.
void batch_norm_rule(BatchCall& call) {
  const bool training = call.arg("training").toBool();
  if (finish_without_examples(call)) return;
  static const auto native = find_operator("native_batch_norm");
  const auto rank = call.rank(call.position("input"));
  const auto& momentum = call.arg(6);
  const auto& eps = call.arg(7);

  const bool shared =
      !is_batched(call, "input") && !is_batched(call, "running_mean") && !is_batched(call, "running_var");
  if (shared) {
    const auto weight = optional_tensor(call, "weight");
    const auto bias = optional_tensor(call, "bias");
    Stack stack{call.arg("input"),       c10::IValue(),        c10::IValue(), call.arg("running_mean"),
                call.arg("running_var"), call.arg("training"), momentum,      eps};
    native.callBoxed(&stack);
    const auto y = scale_channels(stack[0].toTensor(), weight, bias, rank);
    call.set_results(y, expand_batch(stack[1].toTensor(), call.batch_size()),
                     expand_batch(stack[2].toTensor(), call.batch_size()));
    return call.finish();
  }
  const bool only_input = !is_batched(call, "running_mean") && !is_batched(call, "running_var") &&
                          !is_batched(call, "weight") && !is_batched(call, "bias");
  if (!training && only_input) {
    // One scale for each channel, whatever image it is in: x[B*N,c,*].
    const auto x = call.position("input");
    Stack stack{fold_batch(call.tensor(x), call.bdim(x), 0),
                call.arg("weight"),
                call.arg("bias"),
                call.arg("running_mean"),
                call.arg("running_var"),
                training,
                momentum,
                eps};
    native.callBoxed(&stack);
    call.set_results(unfold_batch(stack[0].toTensor(), 0, call.batch_size()),
                     expand_batch(stack[1].toTensor(), call.batch_size()),
                     expand_batch(stack[2].toTensor(), call.batch_size()));
    return call.finish();
  }
  const auto mean = fold_parameter(call, "running_mean");
  const auto var = fold_parameter(call, "running_var");
  Stack stack{fold_channels(call, "input"),
              fold_parameter(call, "weight"),
              fold_parameter(call, "bias"),
              mean,
              var,
              training,
              momentum,
              eps};
  native.callBoxed(&stack);
  if (training && mean.isTensor()) {
    // Autograd saves the statistics before, and does not mind that training changes them.
    copy_uncounted(call.tensor(call.position("running_mean")), unfold_parameter(mean.toTensor(), call.batch_size()));
    copy_uncounted(call.tensor(call.position("running_var")), unfold_parameter(var.toTensor(), call.batch_size()));
  }
  call.set_results(unfold_batch(stack[0].toTensor(), 1, call.batch_size()),
                   unfold_parameter(stack[1].toTensor(), call.batch_size()),
                   unfold_parameter(stack[2].toTensor(), call.batch_size()));
  call.finish();
}

// Training writes the running statistics. Only the schema of _native_batch_norm_legit says so, from which vmap knows
// that statistics made in the function need a batch.
void batch_norm(const c10::OperatorHandle& op, Stack& stack) {
  static const auto writing = find_operator("_native_batch_norm_legit");
  static const auto native = find_operator("native_batch_norm");
  const auto& level = current_vmap_level();
  const auto* arguments = stack.data() + stack.size() - count_arguments(op);
  const auto argument = [&](std::string_view name) { return arguments[position_of(op.schema(), name)]; };
  const auto is_given = [&](std::string_view name) {
    return argument(name).isTensor() && argument(name).toTensor().defined();
  };
  const auto wrapper_of = [&](std::string_view name) -> const Wrapper* {
    return is_given(name) ? wrapper_at(argument(name).toTensor(), &level) : nullptr;
  };
  const auto has_batch = [&](std::string_view name) {
    return any_batched(arguments + position_of(op.schema(), name), 1);
  };
  const bool writes = argument("training").toBool() && is_given("running_mean") && is_given("running_var");
  const bool batched = has_batch("input") || has_batch("running_mean") || has_batch("running_var");
  if (writes && batched && !(has_batch("running_mean") && has_batch("running_var"))) {
    TORCH_CHECK_VALUE(wrapper_of("running_mean") != nullptr && wrapper_of("running_var") != nullptr,
                      "vmap: batch norm in training mode writes its running statistics, and every example has others, "
                      "but running_mean and running_var are not batched. Use "
                      "functorch_lite.replace_all_batch_norm_modules_(model) to keep none, call model.eval() to use "
                      "them as they are, or map over them too (functorch_lite.stack_module_state).");
    return writing.callBoxed(&stack);
  }
  BatchCall call(native, stack);
  batch_norm_rule(call);
}

void push_workspace(Stack& stack) {
  const auto y = stack[stack.size() - 3].toTensor();
  stack.emplace_back(at::empty({0}, y.options().dtype(c10::kByte)));
}

void cudnn_batch_norm(const c10::OperatorHandle& op, Stack& stack) {
  batch_norm(op, stack);
  push_workspace(stack);
}

// The gradients of weight[B?,c] are those of B*c channels: sums over one example each.
void run_batch_norm_backward(BatchCall& call, const char* grad, const char* save_var, const c10::IValue& train,
                             const c10::IValue& eps, const c10::IValue& mask) {
  if (finish_without_examples(call)) return;
  static const auto native = find_operator("native_batch_norm_backward");
  Stack stack{fold_channels(call, grad),
              fold_channels(call, "input"),
              fold_parameter(call, "weight"),
              fold_parameter(call, "running_mean"),
              fold_parameter(call, "running_var"),
              fold_parameter(call, "save_mean"),
              fold_parameter(call, save_var),
              train,
              eps,
              mask};
  native.callBoxed(&stack);
  const auto grad_input = stack[0].toTensor();
  call.set_results(grad_input.defined() ? unfold_batch(grad_input, 1, call.batch_size()) : grad_input,
                   unfold_parameter(stack[1].toTensor(), call.batch_size()),
                   unfold_parameter(stack[2].toTensor(), call.batch_size()));
  call.finish();
}
void batch_norm_backward_rule(BatchCall& call) {
  run_batch_norm_backward(call, "grad_out", "save_invstd", call.arg("train"), call.arg("eps"), call.arg("output_mask"));
}
void cudnn_batch_norm_backward_rule(BatchCall& call) {
  const c10::List<bool> everything{true, true, true};
  run_batch_norm_backward(call, "grad_output", "save_var", /*train=*/true, call.arg("epsilon"), everything);
}

// The variants with fewer arguments, as the full one. Those that write are for training.
void full_batch_norm(const c10::OperatorHandle& op, Stack& stack) {
  static const auto native = find_operator("native_batch_norm");
  const auto given = torch::jit::pop(stack, count_arguments(op));
  for (const auto& argument : native.schema().arguments()) {
    const auto index = op.schema().argumentIndexWithName(argument.name());
    const auto missing = argument.name() == "training" ? c10::IValue(op.schema().is_mutable()) : c10::IValue();
    stack.push_back(index.has_value() ? given[*index] : missing);
  }
  native.callBoxed(&stack);
  if (op.schema().returns().size() > 3) push_workspace(stack);
}

// --- Layer norm ---

// x[B?,*,s], shape s, weight[B?,s], bias[B?,s] -> y[B,*,s], mean[B,*,1], rstd[B,*,1]
void layer_norm_rule(BatchCall& call) {
  const bool batched = call.is_batched(0);
  call.to_front(0);
  const auto rank = call.rank(0);
  at::Tensor weight, bias;
  if (is_batched(call, "weight") || is_batched(call, "bias")) {
    const auto padded = [&](const at::Tensor& p, bool has_batch) { return has_batch ? pad_rank(p, rank) : p; };
    weight = padded(optional_tensor(call, "weight"), is_batched(call, "weight"));
    bias = padded(optional_tensor(call, "bias"), is_batched(call, "bias"));
    call.arg("weight") = c10::IValue();
    call.arg("bias") = c10::IValue();
  }
  call.call();
  const auto normalized = call.result(0).toTensor();
  auto y = normalized;
  if (weight.defined()) y = y * weight;
  if (bias.defined()) y = y + bias;
  call.result(0) = y.to(normalized.scalar_type());
  if (!batched) {
    for (size_t i = 1; i < 3; ++i) call.result(i) = expand_batch(call.result(i).toTensor(), call.batch_size());
  }
  call.finish();
}

// sum over the first n dimensions behind the batch: x[B,*,s] -> x[B,s]
at::Tensor sum_examples(const at::Tensor& x, int64_t n) {
  if (n == 0) return x;
  std::vector<int64_t> dims;
  for (int64_t d = 1; d <= n; ++d) dims.push_back(d);
  return x.sum(dims);
}

// (x - mean) / std over the dimensions s of x[B,*,s]. PyTorch calls the saved statistics constants when it
// differentiates, which they are not if a level further out differentiates this: so they are made anew, with the
// epsilon that is in `rstd`.
at::Tensor normalize(const at::Tensor& x, const at::Tensor& rstd, int64_t normalized_rank) {
  std::vector<int64_t> dims;
  for (auto d = x.dim() - normalized_rank; d < x.dim(); ++d) dims.push_back(d);
  const auto wide = x.to(rstd.scalar_type());
  const auto var = at::var(wide, dims, /*correction=*/0, /*keepdim=*/true);
  const auto eps = (rstd.pow(-2) - var).detach();
  return (wide - wide.mean(dims, /*keepdim=*/true)) * at::rsqrt(var + eps);
}

// grad[B?,*,s], x[B?,*,s], mean, rstd[B?,*,1], weight[B?,s] -> grad_x[B,*,s], grad_weight[B,s], grad_bias[B,s]
void layer_norm_backward_rule(BatchCall& call) {
  if (finish_without_examples(call)) return;
  const auto mask = call.arg("output_mask").toBoolList();
  const auto shape = call.arg("normalized_shape").toSymIntVector();
  const auto grad = call.expand_to_front(call.position("grad_out"));
  const auto x = call.expand_to_front(call.position("input"));
  // The kernel reads the statistics as if they were contiguous.
  const auto mean = call.expand_to_front(call.position("mean")).contiguous();
  const auto rstd = call.expand_to_front(call.position("rstd")).contiguous();
  const auto weight = optional_tensor(call, "weight");
  const bool own_weights = is_batched(call, "weight");
  const auto normalized_rank = static_cast<int64_t>(shape.size());
  const auto leading = x.dim() - 1 - normalized_rank;

  at::Tensor grad_x, grad_weight, grad_bias;
  if (mask[0]) {
    const auto scaled = own_weights ? (grad * pad_rank(weight, x.dim() - 1)).to(grad.scalar_type()) : grad;
    grad_x = std::get<0>(at::native_layer_norm_backward_symint(
        scaled, x, shape, mean, rstd, own_weights ? at::Tensor() : weight, at::Tensor(), {true, false, false}));
  }
  if (mask[1] && weight.defined()) {
    grad_weight = sum_examples(grad * normalize(x, rstd, normalized_rank), leading).to(weight.scalar_type());
  }
  const auto bias = optional_tensor(call, "bias");
  if (mask[2] && bias.defined()) grad_bias = sum_examples(grad, leading).to(bias.scalar_type());
  call.set_results(grad_x, grad_weight, grad_bias);
  call.finish();
}

// --- Group norm ---

// x[B?,N,*] -> x[B*N,*]
at::Tensor fold_images(BatchCall& call, std::string_view name) {
  return merge_dims(call.expand_to_front(call.position(name)), 0).contiguous();
}

// x[B?,N,c,*], weight[B?,c], bias[B?,c] -> y[B,N,c,*], mean[B,N,g], rstd[B,N,g]
void group_norm_rule(BatchCall& call) {
  if (finish_without_examples(call)) return;
  const auto rank = call.rank(0);
  const bool batched = call.is_batched(0);
  const auto dtype = call.tensor(0).scalar_type();
  auto statistics_dtype = std::optional<c10::ScalarType>();
  at::Tensor weight, bias;
  if (is_batched(call, "weight") || is_batched(call, "bias")) {
    weight = optional_tensor(call, "weight");
    bias = optional_tensor(call, "bias");
    call.arg("weight") = c10::IValue();
    call.arg("bias") = c10::IValue();
    // As the kernel does it, scaled before it is rounded.
    statistics_dtype = (weight.defined() ? weight : bias).scalar_type();
    call.arg("input") = call.tensor(0).to(at::toOpMathType(dtype));
  }
  if (batched) {
    call.arg("input") = fold_images(call, "input");
    call.arg("N") = call.arg("N").toSymInt() * call.batch_size();
  }
  call.call();
  for (size_t i = 0; i < 3; ++i) {
    const auto& result = call.result(i).toTensor();
    if (batched) call.result(i) = unfold_batch(result, 0, call.batch_size());
    if (!batched && i > 0) call.result(i) = expand_batch(result, call.batch_size());
    if (statistics_dtype && i > 0) call.result(i) = call.result(i).toTensor().to(*statistics_dtype);
  }
  call.result(0) = scale_channels(call.result(0).toTensor(), weight, bias, rank).to(dtype);
  call.finish();
}

// grad[B?,N,c,*], x[B?,N,c,*], mean[B?,N,g], rstd[B?,N,g], weight[B?,c] -> grad_x[B,N,c,*], grad_weight[B,c],
// grad_bias[B,c]
void group_norm_backward_rule(BatchCall& call) {
  if (finish_without_examples(call)) return;
  const auto mask = call.arg("output_mask").toBoolList();
  const auto grad = call.expand_to_front(call.position("grad_out"));
  const auto x = call.expand_to_front(call.position("input"));
  const auto mean = call.expand_to_front(call.position("mean"));
  const auto rstd = call.expand_to_front(call.position("rstd"));
  const auto weight = optional_tensor(call, "weight");
  const bool own_weights = is_batched(call, "weight");
  const auto n = call.arg("N").toSymInt(), c = call.arg("C").toSymInt(), pixels = call.arg("HxW").toSymInt();
  const auto groups = call.arg("group").toInt();

  at::Tensor grad_x, grad_weight, grad_bias;
  if (mask[0]) {
    const auto scaled = own_weights ? scale_channels(grad, weight, {}, x.dim() - 1) : grad;
    const auto folded = std::get<0>(at::native_group_norm_backward_symint(
        merge_dims(scaled, 0).contiguous(), merge_dims(x, 0).contiguous(), merge_dims(mean, 0).contiguous(),
        merge_dims(rstd, 0).contiguous(), own_weights ? at::Tensor() : weight, n * call.batch_size(), c, pixels, groups,
        {true, false, false}));
    grad_x = unfold_batch(folded, 0, call.batch_size());
  }
  if (mask[1]) {
    const std::vector<c10::SymInt> by_group{call.batch_size(), n, groups, c / groups, pixels};
    const auto across = [](const at::Tensor& p) { return p.unsqueeze(-1).unsqueeze(-1); };
    const auto normalized = (x.reshape_symint(by_group) - across(mean)) * across(rstd);
    grad_weight = (grad.reshape_symint(by_group) * normalized).sum({1, 4}).flatten(1);
    grad_weight = grad_weight.to(weight.defined() ? weight.scalar_type() : grad.scalar_type());
  }
  if (mask[2]) grad_bias = grad.reshape_symint({call.batch_size(), n, c, pixels}).sum({1, 3});
  call.set_results(grad_x, grad_weight, grad_bias);
  call.finish();
}

}  // namespace

void add_normalization_rules(RuleTable& rules) {
  // cuDNN's and MIOpen's forms run the native one: the saved statistics are the same.
  rules.add(&batch_norm, {"native_batch_norm", "_native_batch_norm_legit", "miopen_batch_norm"});
  rules.add(&cudnn_batch_norm, {"cudnn_batch_norm"});
  rules.add(&batch_norm_backward_rule, {"native_batch_norm_backward"});
  rules.add(&cudnn_batch_norm_backward_rule, {"cudnn_batch_norm_backward", "miopen_batch_norm_backward"});
  rules.add(&full_batch_norm, {"_native_batch_norm_legit.no_stats", "_native_batch_norm_legit_no_training",
                               "_batch_norm_with_update", "_batch_norm_no_update"});
  rules.add(&layer_norm_rule, {"native_layer_norm"});
  rules.add(&layer_norm_backward_rule, {"native_layer_norm_backward"});
  rules.add(&group_norm_rule, {"native_group_norm"});
  rules.add(&group_norm_backward_rule, {"native_group_norm_backward"});
}

}  // namespace functorch_lite
