// The fused steps of optimizers, and of gradient scaling, as arithmetic on each parameter.
//
// The formulas are those of torch.optim. A step that `found_inf` cancels leaves everything as it is.
#include <ATen/TensorOperators.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/lerp.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include "rules.h"

namespace functorch_lite {
namespace {

using at::Tensor;

// The arguments of a step by name, and what all steps have in common.
class OptimizerStep {
 public:
  OptimizerStep(const c10::OperatorHandle& op, Stack& stack)
      : schema_(op.schema()), arguments_(torch::jit::pop(stack, count_arguments(op))) {
    if (const auto found = scalar("found_inf"); found.defined()) skipped_ = found == 1;
    scale_ = scalar("grad_scale");
    lr_ = scalar("lr");
  }

  const c10::IValue& arg(std::string_view name) const { return arguments_[position_of(schema_, name)]; }
  double number(std::string_view name) const { return arg(name).toDouble(); }
  bool flag(std::string_view name) const { return arg(name).toBool(); }
  Tensor element(std::string_view name, size_t k) const { return arg(name).toListRef()[k].toTensor(); }
  size_t size() const { return arg("self").toListRef().size(); }
  const Tensor& lr() const { return lr_; }
  // The number of the step, in double precision: powers close to 1 are subtracted from 1.
  Tensor count(size_t k) const { return element("state_steps", k).reshape({}).to(c10::kDouble); }

  // The gradient, unscaled and with the sign of a descent. What is unscaled is stored.
  Tensor gradient(size_t k) const {
    auto grad = element("grads", k);
    if (scale_.defined()) {
      const auto unscaled = grad / scale_;
      write(grad, unscaled);
      grad = unscaled;
    }
    return flag("maximize") ? -grad : grad;
  }
  Tensor gradient_with_decay(size_t k) const {
    const auto decay = number("weight_decay");
    return decay == 0 ? gradient(k) : gradient(k) + element("self", k) * decay;
  }

  void write(const Tensor& target, const Tensor& value) const {
    target.copy_(skipped_.defined() ? at::where(skipped_, target, value) : value);
  }

 private:
  // A number, or a tensor with one element that may differ between examples.
  Tensor scalar(std::string_view name) const {
    const auto& value = arg(name);
    if (value.isNone()) return {};
    if (value.isDouble()) return at::scalar_tensor(value.toDouble(), c10::kDouble);
    return value.toTensor().defined() ? value.toTensor().reshape({}) : Tensor();
  }

  const c10::FunctionSchema& schema_;
  const Stack arguments_;
  Tensor skipped_, scale_, lr_;
};

void adam_step(const c10::OperatorHandle& op, Stack& stack) {
  const OptimizerStep step(op, stack);
  const bool decouples_decay = op.operator_name().name == "aten::_fused_adamw_";
  const auto beta1 = step.number("beta1");
  const auto beta2 = step.number("beta2");
  for (size_t k = 0; k < step.size(); ++k) {
    const auto param = step.element("self", k);
    const auto grad = decouples_decay ? step.gradient(k) : step.gradient_with_decay(k);
    const auto decayed = decouples_decay ? param - param * (step.lr() * step.number("weight_decay")) : param;
    const auto mean = at::lerp(step.element("exp_avgs", k), grad, 1 - beta1);
    const auto square = step.element("exp_avg_sqs", k) * beta2 + grad * grad * (1 - beta2);
    step.write(step.element("exp_avgs", k), mean);
    step.write(step.element("exp_avg_sqs", k), square);
    auto largest = square;
    if (step.flag("amsgrad")) {
      largest = at::maximum(step.element("max_exp_avg_sqs", k), square);
      step.write(step.element("max_exp_avg_sqs", k), largest);
    }
    const auto count = step.count(k);
    const auto size = step.lr() / (1 - at::pow(beta1, count));
    const auto denominator = largest.sqrt() / (1 - at::pow(beta2, count)).sqrt() + step.number("eps");
    step.write(param, decayed - mean / denominator * size);
  }
}

void sgd_step(const c10::OperatorHandle& op, Stack& stack) {
  const OptimizerStep step(op, stack);
  const auto momentum = step.number("momentum");
  for (size_t k = 0; k < step.size(); ++k) {
    const auto param = step.element("self", k);
    auto direction = step.gradient_with_decay(k);
    if (momentum != 0) {
      const auto buffer = step.element("momentum_buffer_list", k);
      const auto velocity =
          step.flag("is_first_step") ? direction : buffer * momentum + direction * (1 - step.number("dampening"));
      step.write(buffer, velocity);
      direction = step.flag("nesterov") ? direction + velocity * momentum : velocity;
    }
    step.write(param, param - direction * step.lr());
  }
}

void adagrad_step(const c10::OperatorHandle& op, Stack& stack) {
  const OptimizerStep step(op, stack);
  for (size_t k = 0; k < step.size(); ++k) {
    const auto param = step.element("self", k);
    const auto grad = step.gradient_with_decay(k);
    const auto sum = step.element("state_sums", k) + grad * grad;
    const auto size = step.lr() / ((step.count(k) - 1) * step.number("lr_decay") + 1);
    step.write(step.element("state_sums", k), sum);
    step.write(param, param - grad / (sum.sqrt() + step.number("eps")) * size);
  }
}

// Gradients times inv_scale; found_inf becomes 1 if one of them was not finite.
void unscale_gradients(const c10::OperatorHandle&, Stack& stack) {
  const auto arguments = torch::jit::pop(stack, 3);
  const auto found_inf = arguments[1].toTensor();
  auto found = found_inf;
  for (const Tensor& grad : arguments[0].toTensorVector()) {
    found = at::where(at::isfinite(grad).all(), found, at::ones_like(found));
    grad.mul_(arguments[2].toTensor());
  }
  found_inf.copy_(found);
}

// The scale shrinks after an infinity and grows after `growth_interval` steps without one, unless it would overflow.
void update_scale(const c10::OperatorHandle&, Stack& stack) {
  const auto arguments = torch::jit::pop(stack, 6);
  const auto scale = arguments[0].toTensor();
  const auto tracker = arguments[1].toTensor();
  const auto found = arguments[2].toTensor() > 0;
  const auto grown = scale * arguments[3].toDouble();
  const auto count = at::where(found, at::zeros_like(tracker), tracker + 1);
  const auto complete = count == arguments[5].toInt();
  const auto kept = at::where(complete.logical_and(at::isfinite(grown)), grown, scale);
  scale.copy_(at::where(found, scale * arguments[4].toDouble(), kept));
  tracker.copy_(at::where(complete, at::zeros_like(tracker), count));
  torch::jit::push(stack, scale);
}

// The forms that return what they would write: PyTorch's own, which copy and call the ones above.
void functional_step(const c10::OperatorHandle& op, Stack& stack) {
  op.callBoxedForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd, stack);
}

}  // namespace

void add_optimizer_rules(RuleTable& rules) {
  rules.add(&adam_step, {"_fused_adam_", "_fused_adam_.tensor_lr", "_fused_adamw_", "_fused_adamw_.tensor_lr"});
  rules.add(&sgd_step, {"_fused_sgd_", "_fused_sgd_.tensor_lr"});
  rules.add(&adagrad_step, {"_fused_adagrad_", "_fused_adagrad_.tensor_lr"});
  rules.add(&unscale_gradients, {"_amp_foreach_non_finite_check_and_unscale_"});
  rules.add(&update_scale, {"_amp_update_scale_"});
  rules.add(&functional_step, {"_fused_adam", "_fused_adam.tensor_lr", "_fused_adamw", "_fused_adamw.tensor_lr",
                               "_fused_sgd", "_fused_sgd.tensor_lr", "_fused_adagrad", "_fused_adagrad.tensor_lr",
                               "_amp_foreach_non_finite_check_and_unscale", "_amp_update_scale"});
}

}  // namespace functorch_lite
